// The XLA custom call on the CPU: runs the core on XLA's own threads.
#include "csrc/xla.h"

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

void small_fc_step_from(const xla::CallFrame& frame) {
  const xla::Call call = xla::decode(frame, /*with_scratch=*/false);
  std::vector<StepScalars> scalars(call.batch);
  std::vector<double> max_norms(call.clip ? call.batch : 0);
  for (int64_t b = 0; b < call.batch; ++b) {
    auto real = [&](int64_t k) { return xla::real_at(call.scalar(b, k), call.scalar_dtype); };
    scalars[b] = {real(0), real(1), 1.0, reinterpret_cast<const int32_t*>(call.count)[b]};
    if (call.clip) max_norms[b] = real(2);
  }
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
  for (const xla::CallCopy& copy : call.copies) std::memcpy(copy.to, copy.from, copy.bytes);
  xla::Threads threads(frame);
  small_fc_step(call.spec, tensors.data(), static_cast<int64_t>(tensors.size()), max_norms.data(),
                static_cast<int32_t>(max_norms.size()), threads.pool());
}

xla::Error* handle(xla::CallFrame* frame) {
  return xla::respond(frame, "small_fc_step", 0, small_fc_step_from);
}

}  // namespace

void* xla_small_fc_cpu_handler() { return reinterpret_cast<void*>(&handle); }

}  // namespace lopt
