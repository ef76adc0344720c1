// The XLA custom call of the operations on a GPU (csrc/gpu_operations.h), one for all three. It enqueues, and
// like small_fc_lopt's (csrc/xla_gpu.cc) it may be captured. lopt_fast/jax/gpu_operations.py writes it:
//
//   operands, all float32: `numbers`, as OperationCall in kernels/common/gpu_operations.h; element_mlp: w and
//   b of each
//       layer; each tensor's parameter, gradient, and momentum, second moment, row and column as far as it
//       has them
//   results: element_mlp and adam: each tensor's output and its averages (aliased to the operands); then
//   `last` numbers
//       for each tensor, if there are any: messages, or statistics; then scratch memory (u8)
//   attributes, all of them arrays:
//       call (s64): format, operation (`Operation`), tensors, momenta, second moments, factored moments,
//       output
//           (`Output`; statistics: whether they are of moved averages), last
//       tensors (s64, 7 for each): lopt_fast.layout.Loops
//     element_mlp: spec, reals, groups and layers as in csrc/xla_operations.h, no mean squares given
//
// Under vmap everything has the same leading batch dimensions; the tensors of all models are those of one
// call.
#pragma once

namespace lopt {

// Addresses of the XLA FFI handlers: by the device that xla_set_device has named, and in the emulator (for
// tests).
void* xla_gpu_operation_handler();
void* xla_emulated_operation_handler();

}  // namespace lopt
