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

// Parts as the attributes and the operand `begins` describe them.
struct Parts {
  std::vector<int64_t> begin;
  std::vector<TensorPart> of_leaf;  // points into `begin`, and to the attributes

  Parts(const xla::Array& table, const xla::Buffer& begins) {
    const xla::Batch unbatched(begins, 1);
    xla::require(unbatched.size == 1 && begins.dtype == xla::kS32, "begin is batched, or not int32");
    begin.resize(size_t(unbatched.elements(begins)));
    std::copy_n(static_cast<const int32_t*>(begins.data), begin.size(), begin.begin());
    const auto* numbers = static_cast<const int64_t*>(table.data);
    size_t axes = 0;
    for (size_t at = 0; at < table.size;) {
      const int64_t* n = numbers + at;
      const int64_t ndim = n[0];
      xla::require(ndim >= 1 && ndim <= 64 && at + 4 + 2 * size_t(ndim) <= table.size &&
                       axes + size_t(ndim) <= begin.size(),
                   "the table of parts has the wrong size");
      of_leaf.push_back(
          {int32_t(ndim), n + 4, n + 4 + ndim, begin.data() + axes, int32_t(n[1]), int32_t(n[2]), n[3]});
      at += 4 + 2 * size_t(ndim);
      axes += size_t(ndim);
    }
  }
};

void small_fc_phase_from(const xla::CallFrame& frame) {
  const xla::Array& number = xla::attribute(frame, "phase", xla::kS64);
  xla::require(number.size == 1 && frame.operands.size >= 3, "a phase and its operands are needed");
  const auto phase = PartPhase(*static_cast<const int64_t*>(number.data));
  const auto operand = [&](int64_t from_last) -> const xla::Buffer& {
    return *static_cast<const xla::Buffer*>(frame.operands.values[frame.operands.size - from_last]);
  };
  const Parts parts(xla::attribute(frame, "parts", xla::kS64), operand(3));

  xla::CallShape shape;
  shape.operands = 3;
  shape.state = phase == PartPhase::apply || phase == PartPhase::finish;
  shape.outputs = phase == PartPhase::apply;
  shape.parts = parts.of_leaf.data();
  shape.results = 2;
  const xla::Call call = xla::decode(frame, shape);
  xla::require(call.batch == 1 && !call.clip && parts.of_leaf.size() == call.tensors.size(),
               "each leaf needs its part, and there is no batch");
  const auto real = [&](int64_t k) { return xla::real_at(call.scalar(0, k), call.scalar_dtype); };
  const StepScalars scalars = {real(0), real(1), real(2), *reinterpret_cast<const int32_t*>(call.count)};
  const std::vector<Tensor> tensors = cpu_tensors(call, &scalars);

  int64_t sums = 0;
  for (size_t i = 0; i < tensors.size(); ++i) sums += part_sums(parts.of_leaf[i], tensors[i].loops.factored);
  const int64_t count = static_cast<int64_t>(tensors.size());
  const auto result = [&](int64_t from_last) -> const xla::Buffer& {
    return *static_cast<const xla::Buffer*>(frame.results.values[frame.results.size - from_last]);
  };
  const xla::Batch unbatched(operand(3), 1);
  for (const xla::Buffer* b : {&operand(2), &result(2)}) unbatched.check(*b, sums);
  for (const xla::Buffer* b : {&operand(1), &result(1)}) unbatched.check(*b, count * kPartSquares);
  std::vector<double> factors = reals_of(operand(2), sums),
                      squares = reals_of(operand(1), count * kPartSquares);
  std::vector<PartTensor> all;
  double* next = factors.data();
  for (size_t i = 0; i < tensors.size(); ++i) {
    const TensorPart& part = parts.of_leaf[i];
    all.push_back({tensors[i], part, next, squares.data() + int64_t(i) * kPartSquares});
    next += part_sums(part, tensors[i].loops.factored);
  }
  for (const xla::CallCopy& copy : call.copies) std::memcpy(copy.to, copy.from, copy.bytes);
  xla::Threads threads(frame);
  small_fc_phase(call.spec, phase, all.data(), count, threads.pool());
  write_reals(factors, result(2));
  write_reals(squares, result(1));
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
