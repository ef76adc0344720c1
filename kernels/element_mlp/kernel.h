// What the driver (csrc/operations.cc) and the kernels (cpu.cc) of element_mlp agree on: one tensor during
// one step.
#pragma once

#include <cstdint>

#include "csrc/core.h"
#include "kernels/common/operands.h"
#include "kernels/statistics/kernel.h"

namespace lopt {

constexpr int kMostLayers = 8;  // hidden ones
constexpr int kMostHidden = 256;
// Arrays in scratch memory are followed by this many elements: whole vectors may be read and written there.
constexpr int64_t kScratchPadding = 64;

// Features are what differs from element to element among the inputs of the network. Of a group of columns
// with several members: the row of the first, the others follow; -1: the group is not an input.
struct FeatureRows {
  int32_t count = 0;
  int32_t g = -1, clip_g = -1, p = -1, log_abs_p = -1, m = -1, v = -1, root_v = -1, g_root_v = -1,
          m_root_v = -1;
  int32_t fac_g = -1, fac_m = -1;
  // Below rank 2 `row` and `row_root` stand for both axes. Of factored tensors these four are features where
  // normalisers differ from matrix to matrix; else they are in x_bias and y_bias.
  int32_t row = -1, column = -1, row_root = -1, column_root = -1;
};

// How pass 1 cuts a factored tensor: tiles of whole or partial rows. A row is one value of (batch0, x,
// batch1) and holds run = y * batch2 elements. By shape alone, so that sums do not depend on the threads.
struct RowTiles {
  int64_t rows, run;
  int64_t rows_per_tile, row_tiles;
  int64_t run_per_tile, run_tiles;
  int64_t count() const { return row_tiles * run_tiles; }
};

// Weights with everything folded in that multiplies them. Layer i has `outputs` of layer i - 1 as its inputs.
template <typename T>
struct Network {
  int32_t hidden_layers, hidden_size;
  T *w[kMostLayers + 1], *b[kMostLayers + 1];  // (inputs, outputs), (outputs); the last: direction, magnitude
};

template <typename T>
struct MlpStep {
  Operand<T> operand;
  Loops loops;
  bool tanh;
  FeatureRows at;
  int32_t factored_moments;
  T rms_epsilon, diagonal_momentum_epsilon, normaliser_epsilon;
  int32_t hidden_size;
  int64_t normalised_over;  // elements that share normalisers: n or fewer

  // Factored tensors alone. Axes x and y are row and column or the other way round; accumulators of x have
  // x_size elements, each `accumulator_stride` after the one before.
  RowTiles tiles;
  int64_t x_size, y_size;
  T *x_accumulator, *y_accumulator;
  int64_t x_accumulator_stride, y_accumulator_stride;
  // Scratch; rows of (k, size) arrays are x_stride and y_stride apart.
  int64_t x_stride, y_stride;
  T* x_sums;               // (run_tiles, x_size) sums of g^2 over y, by tile column
  T* y_sums;               // (batch0 + row_tiles, batch1 * run) sums of g^2 over x, by tile row
  T *x_factor, *y_factor;  // (factored_moments, size): row factor R or column factor C
  T *x_bias, *y_bias;      // (hidden_size, size): what the columns of an axis add to the first layer
  T* scratch;              // (max(x_stride, y_stride))
  // First-layer weights (factored_moments, hidden_size) of the columns of each axis, null where not inputs.
  const T *x_weights, *x_root_weights, *y_weights, *y_root_weights;

  bool factored() const { return loops.factored; }
  bool has_axis_biases() const { return x_weights || x_root_weights || y_weights || y_root_weights; }
  bool axes_are_features() const { return loops.factored && normalised_over < operand.n; }
};

// One instruction set's kernels, in the order of a step.
template <typename T>
struct MlpTable {
  // Pass 1 over one tile: sums of g^2 along both factored axes.
  void (*factor_sums)(const MlpStep<T>&, int64_t tile);
  // Adds up pass 1, moves the accumulators on, and computes the factors.
  void (*factors)(const MlpStep<T>&);
  // x_bias (from the bias b0 on) and y_bias.
  void (*axis_biases)(const MlpStep<T>&, const T* b0);
  // Mean squares of the columns that show axis x, or y: of the accumulators, or of their inverse roots.
  void (*axis_mean_squares)(const MlpStep<T>&, bool x, bool roots, double* out);
  // Pass 2 over elements begin to end: adds sums of the squares of the features, then that of the parameter.
  // spreads: as in statistics, of the averages after this gradient where `moved`; or null.
  void (*feature_sums)(const MlpStep<T>&, int64_t begin, int64_t end, double* sums, Spread* spreads,
                       bool moved);
  // Pass 3: new averages, features, network, output. `hidden_sums` (hidden_size): where the sums of the last
  // hidden units are added, or null.
  void (*apply)(const MlpStep<T>&, const Network<T>&, int64_t begin, int64_t end, double* hidden_sums);
};

struct MlpKernels {
  MlpTable<float> f32;
  MlpTable<double> f64;
};

#define LOPT_DECLARE_MLP(isa)      \
  namespace isa {                  \
  const MlpKernels& element_mlp(); \
  }
LOPT_DECLARE_MLP(v4)
LOPT_DECLARE_MLP(v3)
LOPT_DECLARE_MLP(v2)
LOPT_DECLARE_MLP(portable)

}  // namespace lopt
