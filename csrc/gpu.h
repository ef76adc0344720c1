// Public interface of the GPU side of the core: raw device addresses and a raw stream, no framework and no
// CUDA header. csrc/gpu.cc turns a step into launches (host code, the same for every device); a GpuDevice
// runs them: lopt_fast._cuda on NVIDIA GPUs, the emulator (csrc/gpu_emulator.cc) on the processor, for tests.
#pragma once

#include <cstddef>
#include <cstdint>

#include "csrc/core.h"

namespace lopt {

// Type in memory; arithmetic is in float32 whatever it is.
enum class Storage : int32_t { float32 = 0, bfloat16 = 1, float16 = 2 };

enum class ScalarType : int32_t { float32 = 0, float64 = 1, int32 = 2, int64 = 3 };

// A number of the step: `value`, or, where `device` is not null, what lies there when the step runs: replays
// of a captured graph and XLA see new numbers.
struct DeviceScalar {
  double value;
  const void* device;
  ScalarType type;
};

// One tensor of a step, all addresses on the device. Everything lies dense in loop order
// (lopt_fast.layout.Loops).
struct GpuTensor {
  Loops loops;
  Storage parameter, gradient, state;
  const void* param;
  const void* grad;
  void* output;  // type of the parameter; may be the parameter or the gradient itself
  bool apply;    // output = p - lr * (step + weight_decay * p); else what is to be added to p
  void *momentum, *second_moment;      // (3, n), (1, n), type `state`
  float *row, *column, *mean_squares;  // as in core.h, always float32
  int64_t momentum_stride;             // elements from one momentum to the next; 0: n
  const float* theta;                  // flat meta-parameters, order of lopt_fast.reference.flatten_theta
  DeviceScalar lr, weight_decay, t;    // t: steps taken before this one
  int64_t* step;                       // one is added at the end of the step; null: not counted here
  int32_t clip_group;                  // index into max_norms; -1: not clipped
};

// How the network is computed.
enum class MlpVariant : int32_t {
  automatic = 0,       // what the table in kernels/small_fc_lopt/README.md says for the width
  elementwise = 1,     // in registers, one element a thread and unit by unit
  matmul = 2,          // tensor cores, products split so that the float32 error bound holds
  matmul_bfloat16 = 3  // tensor cores, plain bfloat16 products: its own error bound
};

// How the passes follow each other; the results are the same bits.
enum class GpuSchedule : int32_t {
  automatic = 0,
  single_launch =
      1,      // one launch for all passes: blocks take work items in order and wait for what they need
  phased = 2  // a launch for each pass
};

struct GpuStep {
  Spec spec;
  const GpuTensor* tensors;
  int64_t count;
  const DeviceScalar* max_norms;  // (clip_groups)
  int32_t clip_groups;
  DeviceScalar grad_scale;  // gradients are multiplied by it first,
  bool divide;              // or divided (torch.amp.GradScaler)
  const float*
      found_inf;  // on the device, or null: where it is not 0 the step writes nothing and counts nothing
  MlpVariant variant;
  GpuSchedule schedule;
  uint32_t phases;  // schedule phased: bits 1 << Phase (kernels/small_fc_lopt/gpu.h) of what is launched, to
                    // time each alone, with the scratch memory of a whole step before; 0: all
};

struct GpuProperties {
  int32_t multiprocessors;
  int32_t compute_capability;  // 10 * major + minor
  int64_t l2_bytes;
};

struct GpuLaunch;        // kernels/small_fc_lopt/gpu.h
struct OperationLaunch;  // kernels/common/gpu_operations.h

// What a module that can launch the kernels offers. Functions return null, or what went wrong (a static
// string).
constexpr int32_t kGpuAbi = 4;
struct GpuDevice {
  int32_t abi;  // kGpuAbi
  const char* name;
  const char* (*properties)(int32_t ordinal, GpuProperties* out);
  const char* (*clear)(void* memory, size_t bytes, void* stream);                // sets to zero
  const char* (*launch)(const GpuLaunch& launch, void* stream);                  // on the current device
  const char* (*copy)(void* to, const void* from, size_t bytes, void* stream);   // device to device
  const char* (*current)(int32_t* ordinal);                                      // the current device
  const char* (*launch_operation)(const OperationLaunch& launch, void* stream);  // on the current device
};

// Bytes of device memory that a step needs while it runs: O(rows + columns), and sums for each tile. Aligned
// to 256.
int64_t gpu_scratch_bytes(const GpuStep& step);

// Enqueues one step on `stream` of device `ordinal`, which must be the current one. Nothing on the host waits
// for it. Throws std::invalid_argument before anything is enqueued if a value is out of range,
// std::runtime_error if a launch fails.
void gpu_step(const GpuStep& step, const GpuDevice& device, int32_t ordinal, void* scratch, void* stream);

// ---- a step over parts of tensors: the phases of csrc/core.h ----

// `tensor` describes the part as PartTensor::tensor does; it counts no steps and is in no clip group.
struct GpuPartTensor {
  GpuTensor tensor;
  TensorPart part;       // without `begin`:
  const int32_t* begin;  // (ndim), on the device; what does not lie in the whole is not noticed
};

struct GpuPartStep {
  Spec spec;
  const GpuPartTensor* tensors;
  int64_t count;
  float* factors;           // on the device: those of all tensors, one after the other (part_sums)
  float* squares;           // (count, kPartSquares), likewise
  DeviceScalar grad_scale;  // gradients are multiplied by it
  MlpVariant variant;
};

// As gpu_scratch_bytes, for any phase. Nothing in the scratch memory is kept from phase to phase.
int64_t gpu_phase_scratch_bytes(const GpuPartStep& step);

// Enqueues one phase, as gpu_step does a step. `feature_sums` moves copies of the row and column
// accumulators, `apply` the accumulators themselves. Lagged: `factor_sums` and `feature_sums` give zeros in
// all steps but the first, and `finish` moves nothing in the first, where `apply` has.
void gpu_phase(const GpuPartStep& step, PartPhase phase, const GpuDevice& device, int32_t ordinal,
               void* scratch, void* stream);

const GpuDevice& gpu_emulator();

}  // namespace lopt
