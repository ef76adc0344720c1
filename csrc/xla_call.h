// A custom call of `small_fc_step` decoded: what the handlers of all platforms share. Addresses are taken as
// they are and never followed, so they may be a device's.
//
// One call updates a whole pytree. lopt_fast/jax/call.py writes it:
//
//   operands: count (s32); scalars (3: learning rate, weight decay, max_norm); `thetas` flat arrays of
//       meta-parameters of different types; `buffers` state buffers; each leaf's parameter; each leaf's
//       gradient, of its parameter's type
//   results: the state buffers (aliased to the operands); each leaf's output; where the platform is a GPU,
//       scratch memory (bytes, as many as xla_gpu_scratch_bytes says)
//   attributes, all of them arrays:
//       call (s64): format, thetas, leaves, hidden_size, hidden_layers, parameter_rms, lagged, clip, apply
//       reals (f64): step_mult, exp_mult, scale_epsilon
//       sizes (s64): elements of each state buffer
//       leaves (s64, 17 for each leaf): the seven numbers of lopt_fast.layout.Loops, then (buffer, offset) of
//           momentum, second moment, row, column and mean squares; buffer -1 where a leaf has none
//
// Parameters are float32, float64, bfloat16 or float16. Arithmetic is in float64 where the parameter is, else
// in float32. State is of the type of the arithmetic, as are the meta-parameters; momentum and second moment
// may be bfloat16.
//
// A phase of a step over parts of tensors (lopt_fast/jax/sharded.py) has besides, where the leaves are parts:
//
//   operands: begin (s32): where each leaf's part begins, along all its axes; factors, squares (reals, of
//       float32 on GPUs): the arrays of PartTensor for all leaves, one after the other
//   results: of `apply` and `finish` the state buffers, of `apply` the outputs; on GPUs scratch memory
//       (xla_gpu_phase_scratch_bytes); factors and squares, as they are after the phase
//   attributes: phase (s64): PartPhase; parts (s64, for each leaf): axes, x_axis, y_axis, copies, sizes of
//       the part, sizes of the whole
//   and scalar 2 is what multiplies the gradient. There is no vmap of it.
//
// Under vmap every operand and result has the same leading batch dimensions. Those of the meta-parameters,
// whose own rank is 1, tell how many there are; the sizes of everything else are checked against them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "csrc/core.h"
#include "csrc/xla_abi.h"

namespace lopt::xla {

// kF64 or kF32: the type in which a parameter of this type is computed.
inline int32_t arithmetic(int32_t dtype) { return dtype == kF64 ? kF64 : kF32; }

// One leaf of one batch element.
struct CallTensor {
  Loops loops;
  int32_t dtype;     // of parameter, gradient and output
  int32_t averages;  // of momentum and second moment
  int64_t batch;     // index of its batch element
  void *param, *grad, *output;
  void *momentum, *second_moment, *row, *column, *mean_squares;  // null where it has none
  const void* theta;
};

// A state buffer that XLA has not aliased: to be copied before the step, which works in place.
struct CallCopy {
  void* to;
  const void* from;
  size_t bytes;
};

struct Call {
  Spec spec;
  bool clip, apply;
  int64_t batch;                    // batch elements
  std::vector<CallTensor> tensors;  // all leaves of the first batch element, then of the next
  std::vector<CallCopy> copies;
  const char *count, *scalars;  // (batch) int32; (batch, 3) of `scalar_dtype`
  int32_t scalar_dtype;         // kF32 or kF64
  void* scratch;                // null where the platform needs none
  int64_t scratch_bytes;

  static constexpr int64_t kScalars = 3;
  size_t scalar_bytes() const { return scalar_dtype == kF64 ? 8 : 4; }
  // Address of scalar k (0 learning rate, 1 weight decay, 2 max_norm) of a batch element.
  const void* scalar(int64_t b, int64_t k) const { return scalars + (b * kScalars + k) * scalar_bytes(); }
};

// What a call has beside the operands and results of a step, or has not.
struct CallShape {
  int64_t operands = 0, results = 0;  // behind the others; one result where `scratch`
  bool scratch = false;
  bool state = true, outputs = true;  // are results; else they are the operands, and not to be written
  const TensorPart* parts = nullptr;  // of each leaf: row and column are of the whole; null: leaves are whole
};

// Throws std::invalid_argument if the call does not fit.
Call decode(const CallFrame& frame, const CallShape& shape);

// A phase of a step over parts.
struct PhaseCall {
  PartPhase phase;
  Call call;
  std::vector<TensorPart> parts;  // of each leaf, but for `begin`; points to the attributes
  int64_t axes;                   // of all leaves together: the length of `begin`
  int64_t sums;                   // length of `factors`
  const Buffer *begin, *factors, *squares;
  const Buffer *new_factors, *new_squares;  // results
};
PhaseCall decode_phase(const CallFrame& frame, bool scratch);

}  // namespace lopt::xla
