// What the driver (csrc/core.cc) and the kernels (cpu.cc) of small_fc_lopt agree on: one tensor during one
// step.
#pragma once

#include <cstdint>

#include "csrc/core.h"
#include "kernels/common/constants.h"

namespace lopt {

// A tensor is cut into tiles of whole or partial rows; a row is one value of (batch0, x, batch1) and holds
// run = y * batch2 elements. The cut depends on the shape alone, so that sums do not depend on the threads.
struct Tiling {
  int64_t rows, run;
  int64_t rows_per_tile, row_tiles;
  int64_t run_per_tile, run_tiles;
  int64_t tiles() const { return row_tiles * run_tiles; }
};

// Longest piece of a row that is gathered, expanded or staged at once (elements).
constexpr int64_t kSegment = 256;
constexpr int64_t kWideSegment = 64;
// Scratch arrays are padded by this many elements: a whole segment may be read, a whole vector written past
// their end.
constexpr int64_t kPadding = 64;

template <typename T>
struct TensorStep {
  Tensor tensor;
  Tiling tiling;
  int64_t n;       // elements
  int64_t x_size;  // batch0 * x * batch1 * batch2: length of the accumulator along x
  int64_t y_size;  // batch0 * batch1 * y * batch2
  int32_t hidden_size, hidden_layers;
  bool lagged;  // steady state of lagged statistics: statistics are given, sums are for the next step

  // Numbers of the step.
  T grad_scale;
  T param_scale;                                                   // output = param_scale * p - step
  T d_momentum[kMomenta], d_second_moment, d_factored[kFactored];  // 1 - decay
  bool slow;                                                       // no 1 - decay is above 1/2

  // State.
  T *momentum, *second_moment;
  int64_t momentum_stride;
  T *x_accumulator, *y_accumulator;  // (3, x_size), (3, y_size): row and column or the other way round
  T* diagonal;                       // (3, n) where not factored
  T* mean_squares;                   // (kNormalised), lagged alone

  // Scratch. Rows of (k, size) arrays are `stride` elements apart: x_stride, y_stride.
  int64_t x_stride, y_stride;
  T* x_sums;    // (run_tiles, x_size) sums of g^2 over y, by tile column
  T* y_sums;    // (batch0 + row_tiles, batch1 * run) sums of g^2 over x, by tile row
  T* x_factor;  // (3, x_stride): row factor R or column factor C
  T* y_factor;
  T* x_bias;  // (hidden, x_stride): what the row and column columns add to each hidden unit
  T* y_bias;
  T* scratch;    // max(x_stride, y_stride): means while factors are computed
  double* sums;  // (tiles, kFeatures) sums of the squares of the features

  // Network, folded: normalisers in the first layer, step multiplier, learning rate and log2(e) in the last.
  const T* theta;
  T* w0;             // (features, hidden)
  T* b0;             // (hidden): bias and time columns
  const T *w1, *b1;  // (hidden, hidden), (hidden): two hidden layers
  T* w_out;          // (hidden, 2)
  T b_out[2];
  T limits[kFeatures][2];  // lowest and highest of a feature before normalisation: lagged alone

  int features() const { return tensor.loops.factored ? int(kFactoredFeatures) : int(kFeatures); }
};

// One instruction set's kernels.
template <typename T>
struct KernelTable {
  // Pass 1 over one tile: sums of g^2 along both factored axes (x_sums, y_sums).
  void (*factor_statistics)(const TensorStep<T>&, int64_t tile);
  // Adds up pass 1: the sums along y are then in x_sums, those along x in `scratch`.
  void (*add_factor_sums)(const TensorStep<T>&);
  // Moves the accumulators on, by such sums of so many squares each.
  void (*move_factors)(const TensorStep<T>&, const T* x_sums, T x_count, const T* y_sums, T y_count);
  // x_factor, y_factor, x_bias, y_bias from the accumulators.
  void (*fold_factors)(const TensorStep<T>&);
  // Pass 2 over one tile: sums of the squares of the features.
  void (*feature_statistics)(const TensorStep<T>&, int64_t tile);
  // Pass 3 over one tile: new momentum and second moment, features, MLP, output. Where `lagged` is set, also
  // the sums of passes 1 and 2.
  void (*apply)(const TensorStep<T>&, int64_t tile);
  // Sum of g^2 over one tile, before clipping.
  double (*square_sum)(const TensorStep<T>&, int64_t tile);
};

struct Kernels {
  const char* name;
  KernelTable<float> f32;
  KernelTable<double> f64;
};

#define LOPT_DECLARE_KERNELS(isa) \
  namespace isa {                 \
  const Kernels& small_fc();      \
  }
LOPT_DECLARE_KERNELS(v4)
LOPT_DECLARE_KERNELS(v3)
LOPT_DECLARE_KERNELS(v2)
LOPT_DECLARE_KERNELS(portable)

}  // namespace lopt
