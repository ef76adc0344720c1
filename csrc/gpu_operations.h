// The operations of lopt_fast/operations on a GPU: raw device addresses and a raw stream, no framework and no
// CUDA header. csrc/gpu_operations.cc turns a call into launches (host code, the same for every device); a
// GpuDevice (csrc/gpu.h) runs them.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "csrc/gpu.h"
#include "csrc/operations.h"
#include "kernels/common/gpu_operations.h"

namespace lopt {

// One tensor, all addresses on the device; everything lies as in OperationTensor (csrc/operations.h), state
// in float32.
struct GpuOperationTensor {
  Loops loops;
  Storage storage;  // of parameter, gradient and output
  const void *param, *grad;
  void* output;  // may be the parameter itself, or the gradient; statistics: null
  float *momentum, *second_moment, *row, *column;
  int64_t momentum_stride, second_moment_stride, row_stride, column_stride;
};

enum class Operation : int32_t { element_mlp, adam, statistics };

struct GpuOperation {
  Operation operation;
  const GpuOperationTensor* tensors;  // (models, count)
  int64_t count;
  int64_t models;                   // whose tensors are alike: one, or those of vmap in JAX
  std::array<int32_t, 3> averages;  // how many momenta, second moments and factored moments
  const float *numbers, *found_inf;
  float* results;
  Output output;  // element_mlp and adam
  bool moved;     // statistics
  // element_mlp. layers: hidden_layers + 1, those of all models behind each other.
  const MlpSpec* spec;
  const GpuMlpLayer* layers;
  bool multiplied;
};
// numbers, found_inf, results, multiplied (of each model): see OperationCall
// (kernels/common/gpu_operations.h).

// Why there are no kernels for such networks, or null.
const char* gpu_mlp_refusal(const MlpSpec& spec, const std::array<int32_t, 3>& averages);

// How many `numbers` a model has.
int64_t gpu_operation_numbers(const GpuOperation& call);

// Bytes of device memory that a call needs while it runs: O(rows + columns), and sums for each tile. Aligned
// to 256.
int64_t gpu_operation_scratch_bytes(const GpuOperation& call);

// Enqueues an operation on `stream` of the current device. Nothing on the host waits for it. Throws
// std::invalid_argument before anything is enqueued if a value is out of range, std::runtime_error if a
// launch fails.
void gpu_operation(const GpuOperation& call, const GpuDevice& device, void* scratch, void* stream);

// Runs a launch on the processor: what the emulator's GpuDevice offers. null, or what went wrong.
// thread_state: that of run_threads (csrc/emulated_block.h).
const char* emulate_operation(const OperationLaunch& launch, uint64_t& thread_state);

}  // namespace lopt
