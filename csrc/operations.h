// The operations of lopt_fast/operations on the processor: raw pointers, no framework. Bindings only unwrap
// arguments and call these. All throw std::invalid_argument before anything is written if a value is out of
// range, and give bitwise the same for any pool.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "csrc/core.h"
#include "kernels/common/operands.h"

namespace lopt {

// One tensor. Parameter, gradient and output lie densely in loop order (Loops). State as well, without the
// axis that is averaged away: momentum (momenta, n), second_moment (second moments, n), row (factored
// moments, n / d0 size) and column (factored moments, n / d1 size); below rank 2 row is (factored moments, n)
// and column is unused. Strides are elements from one average to the next. What is not used is null.
struct OperationTensor {
  Dtype dtype;
  Loops loops;
  const void *param, *grad;
  void* output;  // may be the parameter itself, or the gradient
  void *momentum, *second_moment, *row, *column;
  int64_t momentum_stride, second_moment_stride, row_stride, column_stride;
  int64_t normalised_over;  // elements of the innermost axes that share normalisers; 0: all
  double lr, weight_decay;
};

// How many running averages of each kind, and 1 - decay of each.
struct Averages {
  std::vector<double> momentum, second_moment, factored;
};

// g = clip(grad * scale, +-bound)
struct GradientRule {
  double scale = 1.0, bound = __builtin_inf();
};

// Groups of columns, see lopt_fast.reference.columns.
// clang-format off: as there
enum class Group : int32_t {
  g, clip_g, p, log_abs_p, m, rms, m_rsqrt_rms, rsqrt_rms, g_rsqrt_rms, fac_g,
  fac_row, fac_column, rsqrt_fac_row, rsqrt_fac_column, fac_m,
};
// clang-format on
Group group_of(const std::string& name);  // throws std::invalid_argument for an unknown one

// Mirrors lopt_fast.operations.ElementMlp; the averages give the numbers of moments.
struct MlpSpec {
  std::vector<Group> groups;
  int32_t hidden_size, hidden_layers, messages;
  double step_mult, exp_mult;
  bool parameter_rms;
  double scale_epsilon, scale_cap;  // infinity: no bound
  bool tanh;
  double rms_epsilon, diagonal_momentum_epsilon, normaliser_epsilon;
  bool factored_vectors;
};

// A layer's (inputs, outputs) and (outputs): of the first tensor, the others `stride` numbers apart (0: all
// alike).
struct MlpLayer {
  const double *w, *b;
  int64_t inputs, outputs;
  int64_t w_stride, b_stride;
};

// Mirrors lopt_fast.operations.AdamScalars, of one tensor.
struct AdamScalars {
  double beta1, beta2, scale, momentum_factor, gradient_factor, v_factor, epsilon, root_epsilon, l2;
};

// layers: hidden_layers + 1. multipliers: (count) or null. column_mean_square: (count, columns) as statistics
// gives them, or null: a pass over all tensors finds them. messages: (count, spec.messages), written.
void element_mlp(const MlpSpec& spec, const Averages& averages, const MlpLayer* layers,
                 const OperationTensor* tensors, int64_t count, const double* multipliers,
                 const double* column_mean_square, const GradientRule& rule, Output output, double* messages,
                 const Pool& pool);

// statistics: null, or written as by `statistics` of one momentum and one second moment: of parameters before
// the step, and averages after it.
void adam(const OperationTensor* tensors, int64_t count, const AdamScalars* scalars, const GradientRule& rule,
          Output output, double* statistics, const Pool& pool);

// Statistics of each tensor, in the order of lopt_fast.operations.Statistics: mean and variance of the
// parameter; mean, variance and mean absolute value of the gradient; means and variances of the momenta, then
// of the second moments; mean squares of the columns of `columns`, unless that is null. `moved`: of the
// averages after this gradient; else as they are (columns always see those after it; without columns only the
// numbers of averages count then). out: (count, statistics_size(averages, columns)).
int64_t statistics_size(const Averages& averages, const MlpSpec* columns);
void statistics(const Averages& averages, const MlpSpec* columns, bool moved, const OperationTensor* tensors,
                int64_t count, const GradientRule& rule, double* out, const Pool& pool);

}  // namespace lopt
