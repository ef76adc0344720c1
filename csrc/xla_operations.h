// The XLA custom calls of the operations (csrc/operations.h), on the CPU.
//
// One call computes an operation for all tensors of a model. lopt_fast/jax/operations.py writes it:
//
//   operands: `numbers`, one flat array: 1 - decay of momenta, second moments and factored moments; the scale
//       and the bound of gradients (infinity: none); learning rates (tensors); weight decays (tensors); then
//       element_mlp: multipliers (tensors) and mean squares of columns (tensors, columns), as far as it has
//           them; adam: AdamScalars (tensors, 9)
//     element_mlp: w and b of each layer, the same for all tensors or with a leading axis over them
//     each tensor's parameter, gradient, and momentum, second moment, row and column as far as it has them
//   results: statistics: (tensors, statistics_size)
//     element_mlp and adam: each tensor's output and its averages (aliased to the operands); then
//     element_mlp: messages (tensors, messages), if it has them
//     adam: statistics (tensors, statistics_size), if they are wanted
//   attributes, all of them arrays:
//       call (s64): format, tensors, momenta, second moments, factored moments; mode: of the output
//       (`Output`),
//           or whether statistics are of moved averages; of adam whether statistics are wanted, of statistics
//           whether columns are, else 0
//       tensors (s64, 8 for each): the seven numbers of lopt_fast.layout.Loops, elements that share
//       normalisers
//     element_mlp, and statistics with columns:
//       spec (s64): hidden_size, hidden_layers, messages, parameter_rms, tanh, factored_vectors, whether
//       there
//           are multipliers, how many mean squares of columns are given for each tensor
//       reals (f64): step_mult, exp_mult, scale_epsilon, scale_cap, epsilons of rms, of the diagonal momentum
//           and of normalisers
//       groups (u8): names, each followed by a space
//     element_mlp:
//       layers (s64, 4 for each): inputs, outputs, whether each tensor has its own w, and its own b
//
// Every operand and result is float32 or float64: tensors as their parameter, the others in any mixture.
// Under vmap all have the same leading batch dimensions; those of `numbers`, whose own rank is 1, tell how
// many there are. Models of a batch are computed side by side, each with the same bits as alone.
#pragma once

#include "csrc/operations.h"
#include "csrc/xla_frame.h"

namespace lopt {

// The attributes spec, reals and groups; whether there are multipliers.
MlpSpec xla_mlp_spec(const xla::CallFrame& frame);
bool xla_mlp_multiplied(const xla::CallFrame& frame);

// Addresses of the XLA FFI handlers.
void* xla_element_mlp_handler();
void* xla_adam_handler();
void* xla_statistics_handler();

}  // namespace lopt
