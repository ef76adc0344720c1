// One tensor as the kernels of operations see it, and its elements by blocks. Included by sources that are
// compiled once for each instruction set (blocks) and by their drivers (operands).
#pragma once

#include <cstdint>

namespace lopt {

constexpr int kMostAverages = 8;  // of each kind: momenta, second moments, factored moments

// What an operation writes: the new parameter, what is to be added to it, or the step alone.
enum class Output : int32_t { parameter = 0, delta = 1, step = 2 };

// Everything lies densely in the parameter's memory order; the averages of one kind are `stride` elements
// apart.
template <typename T>
struct Operand {
  int64_t n;  // elements
  const T *param, *grad;
  T* output;
  T *momentum, *second_moment, *diagonal;  // diagonal: factored moments below rank 2, else null
  int64_t momentum_stride, second_moment_stride, diagonal_stride;
  int32_t momenta, second_moments, diagonals;                                              // how many
  T d_momentum[kMostAverages], d_second_moment[kMostAverages], d_factored[kMostAverages];  // 1 - decay
  T grad_scale, grad_bound;  // g = clip(grad * grad_scale, +-grad_bound)
  Output result;  // p - (s + decay * p), -(s + decay * p), or s: s is the step times the learning rate
  T decay;        // learning rate * weight decay; 0 for the step alone
};

}  // namespace lopt
