// The XLA custom calls of the core. Attributes and operands are described in csrc/xla_call.h and written by
// lopt_fast/jax/call.py.
#pragma once

#include <cstdint>
#include <vector>

#include "csrc/core.h"
#include "csrc/gpu.h"

namespace lopt {

// Addresses of the XLA FFI handlers of `small_fc_step`: on the CPU; on a GPU, by the device that
// xla_set_device has named; and in the emulator, with addresses of the processor's memory and no stream (for
// tests).
void* xla_small_fc_cpu_handler();
void* xla_small_fc_gpu_handler();
void* xla_small_fc_emulated_handler();
// Those of a phase of a step over parts of tensors.
void* xla_small_fc_phase_handler();
void* xla_small_fc_gpu_phase_handler();
void* xla_small_fc_emulated_phase_handler();

// What the handler for GPUs launches through; it must stay. Throws std::invalid_argument if it was built
// against another version of csrc/gpu.h.
void xla_set_device(const GpuDevice& device);

// Bytes of scratch memory that a call on a GPU must bring for each batch element of these leaves; aligned
// to 1.
int64_t xla_gpu_scratch_bytes(const Spec& spec, const std::vector<Loops>& leaves, bool clip);
// The same for a phase of a step over parts with these loops.
int64_t xla_gpu_phase_scratch_bytes(const Spec& spec, const std::vector<Loops>& leaves,
                                    const std::vector<TensorPart>& parts);

}  // namespace lopt
