// The XLA custom calls on the CPU: run the core on XLA's own threads.
#include "csrc/xla.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "csrc/core.h"
#include "csrc/xla_call.h"
#include "csrc/xla_frame.h"
#include "csrc/xla_threads.h"

namespace lopt {
namespace {

Dtype dtype_of(int32_t dtype) {
  if (dtype == xla::kF64) return Dtype::float64;
  if (dtype == xla::kBF16) return Dtype::bfloat16;
  return dtype == xla::kF16 ? Dtype::float16 : Dtype::float32;
}

// The tensors of a call, with the numbers of each batch element.
std::vector<Tensor> cpu_tensors(const xla::Call& call, const StepScalars* scalars) {
  std::vector<Tensor> tensors;
  tensors.reserve(call.tensors.size());
  for (const xla::CallTensor& t : call.tensors) {
    xla::require(t.averages == xla::arithmetic(t.dtype), "state in bfloat16 is for GPUs alone");
    const Dtype stored = dtype_of(t.dtype);
    tensors.push_back({dtype_of(xla::arithmetic(t.dtype)),
                       t.loops,
                       0,
                       nullptr,
                       {t.param, nullptr, stored},
                       {t.grad, nullptr, stored},
                       {t.output, nullptr, stored},
                       call.apply,
                       t.momentum,
                       t.second_moment,
                       t.row,
                       t.column,
                       t.mean_squares,
                       t.theta,
                       &scalars[t.batch],
                       call.clip ? static_cast<int32_t>(t.batch) : -1,
                       0});
  }
  return tensors;
}

void small_fc_step_from(const xla::CallFrame& frame) {
  const xla::Call call = xla::decode(frame, {});
  std::vector<StepScalars> scalars(call.batch);
  std::vector<double> max_norms(call.clip ? call.batch : 0);
  for (int64_t b = 0; b < call.batch; ++b) {
    auto real = [&](int64_t k) { return xla::real_at(call.scalar(b, k), call.scalar_dtype); };
    scalars[b] = {real(0), real(1), 1.0, reinterpret_cast<const int32_t*>(call.count)[b]};
    if (call.clip) max_norms[b] = real(2);
  }
  const std::vector<Tensor> tensors = cpu_tensors(call, scalars.data());
  for (const xla::CallCopy& copy : call.copies) std::memcpy(copy.to, copy.from, copy.bytes);
  xla::Threads threads(frame);
  small_fc_step(call.spec, tensors.data(), static_cast<int64_t>(tensors.size()), max_norms.data(),
                static_cast<int32_t>(max_norms.size()), threads.pool());
}

// Reals of an operand or result as doubles, and back.
std::vector<double> reals_of(const xla::Buffer& buffer, int64_t count) {
  std::vector<double> values(static_cast<size_t>(count));
  const size_t bytes = xla::real_bytes(buffer);
  for (int64_t i = 0; i < count; ++i)
    values[size_t(i)] = xla::real_at(static_cast<const char*>(buffer.data) + size_t(i) * bytes, buffer.dtype);
  return values;
}

void write_reals(const std::vector<double>& values, const xla::Buffer& buffer) {
  if (xla::real_bytes(buffer) == sizeof(double)) {
    std::copy(values.begin(), values.end(), static_cast<double*>(buffer.data));
  } else {
    std::transform(values.begin(), values.end(), static_cast<float*>(buffer.data),
                   [](double x) { return float(x); });
  }
}

void small_fc_phase_from(const xla::CallFrame& frame) {
  xla::PhaseCall found = xla::decode_phase(frame, false);
  const xla::Call& call = found.call;
  const int64_t count = static_cast<int64_t>(found.parts.size());
  const auto real = [&](int64_t k) { return xla::real_at(call.scalar(0, k), call.scalar_dtype); };
  const StepScalars scalars = {real(0), real(1), real(2), *reinterpret_cast<const int32_t*>(call.count)};
  const std::vector<Tensor> tensors = cpu_tensors(call, &scalars);
  const auto* const begins = static_cast<const int32_t*>(found.begin->data);
  const std::vector<int64_t> begin(begins, begins + found.axes);
  std::vector<double> factors = reals_of(*found.factors, found.sums),
                      squares = reals_of(*found.squares, count * kPartSquares);
  std::vector<PartTensor> all;
  double* next = factors.data();
  const int64_t* axis = begin.data();
  for (size_t i = 0; i < tensors.size(); ++i) {
    TensorPart& part = found.parts[i];
    part.begin = axis;
    all.push_back({tensors[i], part, next, squares.data() + int64_t(i) * kPartSquares});
    axis += part.ndim;
    next += part_sums(part, tensors[i].loops.factored);
  }
  for (const xla::CallCopy& copy : call.copies) std::memcpy(copy.to, copy.from, copy.bytes);
  xla::Threads threads(frame);
  small_fc_phase(call.spec, found.phase, all.data(), count, threads.pool());
  write_reals(factors, *found.new_factors);
  write_reals(squares, *found.new_squares);
}

xla::Error* handle(xla::CallFrame* frame) {
  return xla::respond(frame, "small_fc_step", 0, small_fc_step_from);
}

xla::Error* handle_phase(xla::CallFrame* frame) {
  return xla::respond(frame, "small_fc_phase", 0, small_fc_phase_from);
}

}  // namespace

void* xla_small_fc_cpu_handler() { return reinterpret_cast<void*>(&handle); }
void* xla_small_fc_phase_handler() { return reinterpret_cast<void*>(&handle_phase); }

}  // namespace lopt
