#include "csrc/xla_gpu_operations.h"

#include <cstdint>
#include <stdexcept>
#include <vector>

#include "csrc/gpu_operations.h"
#include "csrc/xla_frame.h"
#include "csrc/xla_gpu.h"
#include "csrc/xla_operations.h"

namespace lopt {
namespace {

using xla::Buffer;
using xla::CallFrame;
using xla::require;

constexpr int64_t kFormat = 1;  // of the attributes
constexpr int64_t kCallFields = 8, kTensorFields = 7, kLayerFields = 4;
constexpr int64_t kAlignment = 256;  // of scratch memory

const int64_t* integers(const CallFrame& frame, const char* name, int64_t size) {
  const xla::Array& array = xla::attribute(frame, name, xla::kS64);
  require(static_cast<int64_t>(array.size) == size, "an attribute has the wrong size");
  return static_cast<const int64_t*>(array.data);
}

// Buffers in their order, every one of which holds `elements` float32 in each batch element.
class Buffers {
 public:
  Buffers(const xla::Buffers& buffers, const xla::Batch& batch) : buffers_(buffers), batch_(batch) {}

  // Those of the first batch element; the others lie behind them.
  float* next(int64_t elements) {
    const Buffer& buffer = batch_.check(take(), elements);
    require(buffer.dtype == xla::kF32, "the GPU kernels take float32 alone");
    return static_cast<float*>(buffer.data);
  }
  const Buffer& take() {
    require(next_ < buffers_.size, "too few operands or results");
    return *static_cast<const Buffer*>(buffers_.values[next_++]);
  }
  void require_end() const { require(next_ == buffers_.size, "too many operands or results"); }

 private:
  const xla::Buffers& buffers_;
  const xla::Batch& batch_;
  int64_t next_ = 0;
};

struct Copy {
  float* to;
  const float* from;
  int64_t elements;
};

// All models of the batch.
void enqueue(const CallFrame& frame, const GpuDevice& device, void* stream) {
  require(frame.operands.size > 0, "too few operands");
  const xla::Batch batch(*static_cast<const Buffer*>(frame.operands.values[0]), 1);
  if (batch.size == 0) return;
  const int64_t* header = integers(frame, "call", kCallFields);
  require(header[0] == kFormat, "this call was written for another version of lopt_fast");
  require(header[1] >= 0 && header[1] <= 2 && header[2] >= 0 && header[6] >= 0 && header[6] <= 2,
          "a number of the call is out of range");
  const int64_t count = header[2], last = header[7];
  GpuOperation call = {};
  call.operation = Operation(header[1]);
  call.count = count;
  call.models = batch.size;
  for (int k = 0; k < 3; ++k) {
    require(header[3 + k] >= 0 && header[3 + k] <= kMostAverages, "a number of the call is out of range");
    call.averages[size_t(k)] = int32_t(header[3 + k]);
  }
  const bool writes = call.operation != Operation::statistics;
  if (writes)
    call.output = Output(header[6]);
  else
    call.moved = header[6] != 0;

  Buffers operands(frame.operands, batch), results(frame.results, batch);
  MlpSpec spec = {};
  std::vector<GpuMlpLayer> layers;
  if (call.operation == Operation::element_mlp) {
    spec = xla_mlp_spec(frame);
    call.multiplied = xla_mlp_multiplied(frame);
  }
  call.numbers = operands.next(gpu_operation_numbers(call));
  if (call.operation == Operation::element_mlp) {
    const int64_t* table = integers(frame, "layers", kLayerFields * (spec.hidden_layers + 1));
    for (int32_t i = 0; i <= spec.hidden_layers; ++i, table += kLayerFields) {
      const int64_t outputs = table[1], w = table[0] * outputs;
      GpuMlpLayer layer = {};
      layer.inputs = table[0], layer.outputs = outputs;
      layer.w_stride = table[2] ? w : 0, layer.b_stride = table[3] ? outputs : 0;
      layer.w = operands.next(w * (table[2] ? count : 1));
      layer.b = operands.next(outputs * (table[3] ? count : 1));
      layers.push_back(layer);
    }
    call.spec = &spec;
    call.layers = layers.data();
  }

  std::vector<GpuOperationTensor> tensors(size_t(batch.size * count));
  std::vector<Copy> copies;
  const int64_t* table = integers(frame, "tensors", count * kTensorFields);
  for (int64_t i = 0; i < count; ++i, table += kTensorFields) {
    const Loops l{table[0], table[1], table[2], table[3], table[4], table[5] != 0, table[6] != 0};
    const int64_t n = l.batch0 * l.x * l.batch1 * l.y * l.batch2;
    const int64_t d1 = l.x_is_row ? l.x : l.y, d0 = l.x_is_row ? l.y : l.x;
    const int64_t row = !l.factored ? n : d0 ? n / d0 : 0, column = l.factored && d1 ? n / d1 : 0;
    const int64_t counts[4] = {header[3], header[4], header[5], l.factored ? header[5] : 0};
    const int64_t sizes[4] = {n, n, row, column};
    const float *const param = operands.next(n), *const grad = operands.next(n);
    float* const output = writes ? results.next(n) : nullptr;
    float* state[4] = {};
    for (int k = 0; k < 4; ++k) {
      if (!counts[k]) continue;
      const int64_t elements = counts[k] * sizes[k];
      float* const from = operands.next(elements);
      state[k] = writes ? results.next(elements) : from;
      if (state[k] != from && elements) copies.push_back({state[k], from, batch.size * elements});
    }
    for (int64_t model = 0; model < batch.size; ++model) {
      const auto of_model = [&](int k) {
        return state[k] ? state[k] + model * counts[k] * sizes[k] : nullptr;
      };
      GpuOperationTensor& t = tensors[size_t(model * count + i)];
      t.loops = l;
      t.storage = Storage::float32;
      t.param = param + model * n, t.grad = grad + model * n;
      t.output = writes ? output + model * n : nullptr;
      t.momentum = of_model(0), t.second_moment = of_model(1), t.row = of_model(2), t.column = of_model(3);
      t.momentum_stride = t.second_moment_stride = n, t.row_stride = row, t.column_stride = column;
    }
  }
  operands.require_end();
  call.tensors = tensors.data();
  if (last) call.results = results.next(count * last);
  const Buffer& scratch = results.take();
  results.require_end();
  require(scratch.dtype == xla::kU8, "scratch memory is bytes");

  const int64_t bytes = batch.size * batch.elements(scratch);
  const uintptr_t start = reinterpret_cast<uintptr_t>(scratch.data);
  const uintptr_t aligned = (start + kAlignment - 1) / kAlignment * kAlignment;
  require(gpu_operation_scratch_bytes(call) + int64_t(aligned - start) <= bytes, "too little scratch memory");
  for (const Copy& copy : copies) {
    const char* error = device.copy(copy.to, copy.from, size_t(copy.elements) * sizeof(float), stream);
    if (error) throw std::runtime_error(error);
  }
  gpu_operation(call, device, reinterpret_cast<void*>(aligned), stream);
}

xla::Error* handle_device(xla::CallFrame* frame) {
  return xla::respond(frame, "operation", xla::kCommandBufferCompatible,
                      [](const CallFrame& f) { enqueue(f, xla_device(), xla_stream(f)); });
}

xla::Error* handle_emulated(xla::CallFrame* frame) {
  return xla::respond(frame, "operation", 0, [](const CallFrame& f) { enqueue(f, gpu_emulator(), nullptr); });
}

}  // namespace

void* xla_gpu_operation_handler() { return reinterpret_cast<void*>(&handle_device); }
void* xla_emulated_operation_handler() { return reinterpret_cast<void*>(&handle_emulated); }

}  // namespace lopt
