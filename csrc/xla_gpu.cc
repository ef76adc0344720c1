// The XLA custom call on a GPU: enqueues a step on XLA's stream.
//
// Safe to be captured into a command buffer (a CUDA graph), and declared so: it allocates nothing, waits for
// nothing, reads no device memory on the host, and what it launches depends on attributes, shapes and
// addresses alone. Scratch memory is a result buffer because of that: what XLA's scratch allocator gives is
// freed when the handler returns, so a captured graph would use memory that is someone else's by then.

#include "csrc/xla_gpu.h"

#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "csrc/gpu.h"
#include "csrc/xla.h"
#include "csrc/xla_call.h"
#include "csrc/xla_frame.h"

namespace lopt {
namespace {

constexpr int64_t kAlignment = 256;  // of scratch memory

void check(const char* error, const char* what) {
  if (error != nullptr) throw std::runtime_error(std::string(what) + ": " + error);
}

Storage storage_of(int32_t dtype) {
  if (dtype == xla::kF64) throw std::invalid_argument("the GPU kernel does not take float64 parameters");
  if (dtype == xla::kBF16) return Storage::bfloat16;
  return dtype == xla::kF16 ? Storage::float16 : Storage::float32;
}

ScalarType scalar_type(const xla::Call& call) {
  return call.scalar_dtype == xla::kF64 ? ScalarType::float64 : ScalarType::float32;
}

std::vector<GpuTensor> gpu_tensors(const xla::Call& call) {
  const ScalarType real = scalar_type(call);
  std::vector<GpuTensor> tensors;
  tensors.reserve(call.tensors.size());
  for (const xla::CallTensor& t : call.tensors) {
    GpuTensor tensor{};
    tensor.loops = t.loops;
    tensor.parameter = tensor.gradient = storage_of(t.dtype);
    tensor.state = storage_of(t.averages);
    tensor.param = t.param;
    tensor.grad = t.grad;
    tensor.output = t.output;
    tensor.apply = call.apply;
    tensor.momentum = t.momentum;
    tensor.second_moment = t.second_moment;
    tensor.row = static_cast<float*>(t.row);
    tensor.column = static_cast<float*>(t.column);
    tensor.mean_squares = static_cast<float*>(t.mean_squares);
    tensor.theta = static_cast<const float*>(t.theta);
    tensor.lr = {0.0, call.scalar(t.batch, 0), real};
    tensor.weight_decay = {0.0, call.scalar(t.batch, 1), real};
    tensor.t = {0.0, call.count + t.batch * sizeof(int32_t), ScalarType::int32};
    tensor.step = nullptr;  // the next count is an operation of the program around this call
    tensor.clip_group = call.clip ? static_cast<int32_t>(t.batch) : -1;
    tensors.push_back(tensor);
  }
  return tensors;
}

// The scratch memory of a call, of which `needed` bytes are used.
void* scratch_of(const xla::Call& call, int64_t needed) {
  const uintptr_t start = reinterpret_cast<uintptr_t>(call.scratch);
  const uintptr_t aligned = (start + kAlignment - 1) / kAlignment * kAlignment;
  if (needed + static_cast<int64_t>(aligned - start) > call.scratch_bytes)
    throw std::invalid_argument("too little scratch memory");
  return reinterpret_cast<void*>(aligned);
}

// Copies what XLA has not aliased. The current device.
int32_t begin(const xla::Call& call, const GpuDevice& device, void* stream) {
  int32_t ordinal = 0;  // XLA activates the device's context before it calls
  check(device.current(&ordinal), "current device");
  for (const xla::CallCopy& copy : call.copies)
    check(device.copy(copy.to, copy.from, copy.bytes, stream), "copy of the state");
  return ordinal;
}

void enqueue(const xla::CallFrame& frame, const GpuDevice& device, void* stream) {
  xla::CallShape shape;
  shape.scratch = true;
  const xla::Call call = xla::decode(frame, shape);
  std::vector<DeviceScalar> max_norms;
  for (int64_t b = 0; call.clip && b < call.batch; ++b)
    max_norms.push_back({0.0, call.scalar(b, 2), scalar_type(call)});
  const std::vector<GpuTensor> tensors = gpu_tensors(call);
  GpuStep step{};
  step.spec = call.spec;
  step.tensors = tensors.data();
  step.count = static_cast<int64_t>(tensors.size());
  step.max_norms = max_norms.data();
  step.clip_groups = static_cast<int32_t>(max_norms.size());
  step.grad_scale = {1.0, nullptr, ScalarType::float64};

  void* const scratch = scratch_of(call, gpu_scratch_bytes(step));
  gpu_step(step, device, begin(call, device, stream), scratch, stream);
}

void enqueue_phase(const xla::CallFrame& frame, const GpuDevice& device, void* stream) {
  const xla::PhaseCall found = xla::decode_phase(frame, true);
  const xla::Call& call = found.call;
  for (const xla::Buffer* b : {found.factors, found.squares, found.new_factors, found.new_squares})
    xla::require(b->dtype == xla::kF32, "sums are not float32");
  const std::vector<GpuTensor> tensors = gpu_tensors(call);
  std::vector<GpuPartTensor> parts;
  const auto* axis = static_cast<const int32_t*>(found.begin->data);
  for (size_t i = 0; i < tensors.size(); ++i) {
    parts.push_back({tensors[i], found.parts[i], axis});
    axis += found.parts[i].ndim;
  }
  const int64_t count = static_cast<int64_t>(parts.size());
  GpuPartStep step{};
  step.spec = call.spec;
  step.tensors = parts.data();
  step.count = count;
  step.factors = static_cast<float*>(found.new_factors->data);
  step.squares = static_cast<float*>(found.new_squares->data);
  step.grad_scale = {0.0, call.scalar(0, 2), scalar_type(call)};
  void* const scratch = scratch_of(call, gpu_phase_scratch_bytes(step));
  const int32_t ordinal = begin(call, device, stream);
  const auto copy = [&](const xla::Buffer* from, const xla::Buffer* to, int64_t floats) {
    if (floats > 0) check(device.copy(to->data, from->data, size_t(4 * floats), stream), "copy of the sums");
  };
  copy(found.factors, found.new_factors, found.sums);
  copy(found.squares, found.new_squares, count * kPartSquares);
  gpu_phase(step, found.phase, device, ordinal, scratch, stream);
}

std::atomic<const GpuDevice*> registered{nullptr};

xla::Error* handle_device(xla::CallFrame* frame) {
  return xla::respond(frame, "small_fc_step", xla::kCommandBufferCompatible,
                      [](const xla::CallFrame& f) { enqueue(f, xla_device(), xla_stream(f)); });
}

xla::Error* handle_emulated(xla::CallFrame* frame) {
  return xla::respond(frame, "small_fc_step", 0,
                      [](const xla::CallFrame& f) { enqueue(f, gpu_emulator(), nullptr); });
}

xla::Error* handle_device_phase(xla::CallFrame* frame) {
  return xla::respond(frame, "small_fc_phase", xla::kCommandBufferCompatible,
                      [](const xla::CallFrame& f) { enqueue_phase(f, xla_device(), xla_stream(f)); });
}

xla::Error* handle_emulated_phase(xla::CallFrame* frame) {
  return xla::respond(frame, "small_fc_phase", 0,
                      [](const xla::CallFrame& f) { enqueue_phase(f, gpu_emulator(), nullptr); });
}

// A tensor of these loops that only tells how much scratch memory it needs: addresses are checked for null,
// never followed.
GpuTensor shape_alone(const Loops& loops) {
  static float somewhere = 0;
  GpuTensor t{};
  t.loops = loops;
  t.param = t.grad = t.output = t.momentum = t.second_moment = &somewhere;
  t.row = t.column = t.mean_squares = &somewhere;
  t.theta = &somewhere;
  t.clip_group = -1;
  return t;
}

}  // namespace

void* xla_stream(const xla::CallFrame& frame) {
  xla::StreamGet query{sizeof(xla::StreamGet), nullptr, frame.context, nullptr};
  if (xla::Error* error = frame.api->stream_get(&query)) {
    xla::ErrorDestroy destroy{sizeof(xla::ErrorDestroy), nullptr, error};
    frame.api->error_destroy(&destroy);
    throw std::runtime_error("XLA gives no stream");
  }
  return query.stream;
}

const GpuDevice& xla_device() {
  const GpuDevice* device = registered.load(std::memory_order_acquire);
  if (device == nullptr) throw std::runtime_error("no device has been set");
  return *device;
}

void* xla_small_fc_gpu_handler() { return reinterpret_cast<void*>(&handle_device); }
void* xla_small_fc_emulated_handler() { return reinterpret_cast<void*>(&handle_emulated); }
void* xla_small_fc_gpu_phase_handler() { return reinterpret_cast<void*>(&handle_device_phase); }
void* xla_small_fc_emulated_phase_handler() { return reinterpret_cast<void*>(&handle_emulated_phase); }

void xla_set_device(const GpuDevice& device) {
  if (device.abi != kGpuAbi)
    throw std::invalid_argument("the CUDA module and the core are of different versions: reinstall both");
  registered.store(&device, std::memory_order_release);
}

int64_t xla_gpu_scratch_bytes(const Spec& spec, const std::vector<Loops>& leaves, bool clip) {
  std::vector<GpuTensor> tensors;
  for (const Loops& loops : leaves) {
    tensors.push_back(shape_alone(loops));
    tensors.back().clip_group = clip ? 0 : -1;
  }
  const DeviceScalar max_norm{};
  GpuStep step{};
  step.spec = spec;
  step.tensors = tensors.data();
  step.count = static_cast<int64_t>(tensors.size());
  step.max_norms = clip ? &max_norm : nullptr;
  step.clip_groups = clip ? 1 : 0;
  step.grad_scale = {1.0, nullptr, ScalarType::float64};
  return gpu_scratch_bytes(step) + kAlignment;
}

int64_t xla_gpu_phase_scratch_bytes(const Spec& spec, const std::vector<Loops>& leaves,
                                    const std::vector<TensorPart>& parts) {
  const int32_t begin = 0;
  float sums = 0;
  std::vector<GpuPartTensor> tensors;
  for (size_t i = 0; i < leaves.size(); ++i) tensors.push_back({shape_alone(leaves[i]), parts[i], &begin});
  GpuPartStep step{};
  step.spec = spec;
  step.tensors = tensors.data();
  step.count = static_cast<int64_t>(tensors.size());
  step.factors = step.squares = &sums;
  return gpu_phase_scratch_bytes(step) + kAlignment;
}

}  // namespace lopt
