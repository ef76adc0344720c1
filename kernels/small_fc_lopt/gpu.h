// What the GPU driver (csrc/gpu.cc) and the GPU kernels (gpu_passes.h) of small_fc_lopt agree on: a step cut
// into work items, where the partial results of each lie, and the table that is passed by value with a
// launch.
#pragma once

#include <cstdint>

#include "kernels/common/constants.h"
#include "kernels/common/device.h"

namespace lopt {

#if defined(__CUDACC__)
#define LOPT_BOTH __host__ __device__ __forceinline__
#else
#define LOPT_BOTH inline
#endif

// Work on one tensor, in the order in which its phases follow each other. An item of a phase needs all items
// of the phases before.
enum Phase : int32_t {
  kClipSums,     // a tile: sum of g^2, for clipping by the global norm
  kFactorSums,   // a tile, pass 1: sums of g^2 along both factored axes
  kAxes,         // a segment: adds them up, moves the row and column accumulators, sums for their normalisers
  kFold,         // a segment: factors and biases of each row and column
  kFeatureSums,  // a tile, pass 2: sums of the squares of the features
  kNetwork,      // the tensor: folds normalisers and numbers of the step into the network
  kApply,        // a tile, pass 3
  kFinish,       // lagged: a segment, accumulators of the next step; its first item, mean squares as well
  kPhases
};

// What a launch does.
enum class LaunchKind : int32_t {
  items,       // work items first_item .. last_item of the table
  clip_total,  // the factors of the clip groups
  count,       // step counters
  // A step over parts of tensors (gpu_parts.h), between the items of parts and those of whole tensors:
  take_sums,
  cut_places,
  give_sums,
};
LOPT_BOTH bool is_of_parts(LaunchKind kind) { return kind >= LaunchKind::take_sums; }

// A number of the step: `bits` is a double, or an address where `type` is not kHostScalar.
constexpr int32_t kHostScalar = 4;
struct Scalar {
  uint64_t bits;
};

struct TensorRecord {
  const void *param, *grad;
  void *output, *momentum, *second_moment;
  float *row, *column, *mean_squares;
  const float* theta;
  Scalar lr, weight_decay, t;
  int64_t* step;
  int64_t momentum_stride;
  int64_t scratch;  // offset of this tensor's scratch, in floats
  int64_t x, y;
  int32_t batch0, batch1, batch2;
  int32_t row_tiles, column_tiles;  // of the whole tensor
  int32_t rows_per_tile, columns_per_tile;
  int32_t x_segments, y_segments;  // 0 where not factored
  int32_t clip_group, clip_tile;   // group or -1; where its sums begin
  uint8_t lr_type, weight_decay_type, t_type;
  uint8_t parameter, gradient, state;  // Storage
  bool factored, x_is_row, apply;
  bool vector;  // four elements at a time, wherever a row begins; else one by one
};
static_assert(sizeof(TensorRecord) == 192, "the table is sized for this");

struct ClipRecord {
  Scalar max_norm;
  int32_t type;
  int32_t group, begin, end;  // its tiles' sums
};

// Where a part lies in its tensor. Axes in memory order; those that are not cut are merged with the axis
// before them, unless one of the two is factored.
constexpr int kPartAxes = 12;
struct PartRecord {
  const int32_t* begin;  // of the part, along each axis before merging
  float *factors, *squares;
  int64_t copies;
  int64_t size[kPartAxes], whole[kPartAxes];
  int64_t step[kPartAxes];   // how far one place of the first of the merged axes goes
  uint8_t first[kPartAxes];  // that axis
  int32_t axes, x_axis, y_axis;
  int32_t first_block;  // of those that work on this tensor
};
constexpr int kTableParts = 39;
struct PartTable {
  PartPhase phase;
  int32_t blocks;
  TensorRecord local[kTableParts];  // the part: its tiles
  TensorRecord whole[kTableParts];  // row and column of the whole tensor: their segments
  PartRecord parts[kTableParts];
};

constexpr int kTableTensors = 152;  // as many as ViT-B/16 has; GPT-2 124M has 148
constexpr int kTableSpans = 570;
constexpr int kTableGroups = 512;

// What holds for all items of a launch.
struct StepHeader {
  int32_t hidden_size, hidden_layers;
  int32_t grad_scale_type;
  bool lagged, parameter_rms, divide;
  bool wait;  // items wait for those that they need; else all of these belong to earlier launches
  Scalar grad_scale;
  double step_mult, exp_mult, scale_epsilon;
  const float* found_inf;
  float* scratch;
  int32_t *done, *ticket;  // items done of each phase of each tensor: done[tensor * kPhases + phase]; or null
  double *clip_sums, *clip_factors;
};

// The list of a launch's items consists of spans: all items of one phase of one tensor, or (kOneEach) of
// several that follow each other and have one each.
constexpr int32_t kOneEach = 1 << 15;
struct GpuLaunch {
  LaunchKind kind;
  int32_t width;  // units computed: the hidden size, padded to a power of two with units that are zero
  MlpVariant variant;
  int32_t tensors, spans, first_item, last_item;
  StepHeader step;
  union {
    TensorRecord records[kTableTensors];
    ClipRecord groups[kTableGroups];
    PartTable parts;
  };
  uint32_t span_first[kTableSpans + 1];  // first item of each span; behind them the number of items
  uint16_t span_what[kTableSpans];       // tensor * kPhases + phase, and whether kOneEach
};
static_assert(sizeof(PartTable) <= sizeof(TensorRecord) * kTableTensors, "no larger than the other tables");
static_assert(sizeof(GpuLaunch) <= 32764, "a kernel's arguments");
static_assert(kTableTensors * kPhases <= kOneEach, "span_what");

struct WorkItem {
  int32_t tensor, phase, index;
};
LOPT_BOTH WorkItem item_in_span(const GpuLaunch& launch, int32_t span, int32_t item) {
  const int32_t what = launch.span_what[span], index = item - int32_t(launch.span_first[span]);
  const int32_t tensor = what % kOneEach / kPhases, phase = what % kPhases;
  return what & kOneEach ? WorkItem{tensor + index, phase, 0} : WorkItem{tensor, phase, index};
}

LOPT_BOTH int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
LOPT_BOTH int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
LOPT_BOTH int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// ---- geometry ----

// A tensor as a matrix: a row is one (batch0, x), its columns are (batch1, y, batch2). Element (r, c) lies at
// r * columns + c. Its place along y is batch0 * columns + c, along x r * per_row + c / run * batch2 + c %
// batch2.
struct Matrix {
  int64_t rows, columns;
  int64_t run;      // y * batch2
  int64_t per_row;  // places along x in a row: batch1 * batch2
  int64_t x_size, y_size;
};
LOPT_BOTH Matrix matrix_of(const TensorRecord& r) {
  Matrix m;
  m.rows = r.batch0 * r.x;
  m.run = r.y * r.batch2;
  m.columns = r.batch1 * m.run;
  m.per_row = int64_t(r.batch1) * r.batch2;
  m.x_size = m.rows * m.per_row;
  m.y_size = r.batch0 * m.columns;
  return m;
}

// Rows and columns of a tile. A tile lies within one batch0, or (several) covers whole ones.
struct Tile {
  int32_t row_tile, column_tile;
  int64_t row, column;
  int32_t rows, columns, batch0;  // batch0: the first
};
LOPT_BOTH bool several(const TensorRecord& r) { return r.rows_per_tile > r.x; }
LOPT_BOTH int32_t row_tiles_in_batch(const TensorRecord& r) {
  return several(r) ? 1 : r.row_tiles / r.batch0;
}
LOPT_BOTH Tile tile_at(const TensorRecord& r, int32_t index) {
  Tile t;
  t.row_tile = index / r.column_tiles;
  t.column_tile = index - t.row_tile * r.column_tiles;
  t.column = int64_t(t.column_tile) * r.columns_per_tile;
  t.columns = int32_t(smaller(r.columns_per_tile, r.batch1 * r.y * r.batch2 - t.column));
  if (several(r)) {
    t.batch0 = t.row_tile * (r.rows_per_tile / int32_t(r.x));
    t.row = int64_t(t.row_tile) * r.rows_per_tile;
    t.rows = int32_t(smaller(r.rows_per_tile, r.batch0 * r.x - t.row));
    return t;
  }
  const int32_t in_batch = row_tiles_in_batch(r);
  t.batch0 = t.row_tile / in_batch;
  const int64_t x = int64_t(t.row_tile - t.batch0 * in_batch) * r.rows_per_tile;
  t.row = t.batch0 * r.x + x;
  t.rows = int32_t(smaller(r.rows_per_tile, r.x - x));
  return t;
}

// How the threads of a block lie on a tile, E elements each: `columns` (a power of two) beside each other.
struct Arrangement {
  int32_t columns, rows, shift;  // columns is 2^shift
};
LOPT_BOTH Arrangement arrangement_of(const TensorRecord& r, int elements) {
  int32_t shift = 0;
  while ((1 << shift) < kThreads && (elements << shift) < r.columns_per_tile) ++shift;
  return {1 << shift, kThreads >> shift, shift};
}

// Sums of rows that a block keeps in shared memory, several for each row where it spans several warps. Bounds
// the rows of a tile.
constexpr int32_t kRowSums = 2048;
LOPT_BOTH int64_t most_rows(int64_t columns_per_tile) {
  int64_t warps = 1;
  while (warps < kWarps && warps * kWarpLanes < columns_per_tile) warps *= 2;
  return kRowSums / warps;
}

// One axis' vector (x or y), cut into segments. `partials` sums of each place were written by the tiles.
struct Axis {
  int64_t size;
  int32_t partials;  // at most, of one place
  int32_t segment, segments;
  int32_t parts;  // threads that add up one place together
};
LOPT_BOTH Axis axis_of(int64_t size, int64_t partials) {
  Axis a;
  a.size = size;
  a.partials = int32_t(partials);
  a.parts = partials >= 64 ? 8 : partials >= 16 ? 4 : 1;
  const int64_t group = kThreads / a.parts;
  a.segment = int32_t(group * divide_up(divide_up(size, 1024), group));
  a.segments = int32_t(divide_up(size, a.segment));
  return a;
}
LOPT_BOTH Axis x_axis(const TensorRecord& r) {
  return axis_of(r.batch0 * r.x * r.batch1 * r.batch2, r.column_tiles);
}
LOPT_BOTH Axis y_axis(const TensorRecord& r) {
  return axis_of(r.batch0 * r.batch1 * r.y * r.batch2, row_tiles_in_batch(r));
}

// ---- scratch of a tensor (offsets in floats, all multiples of 4) ----

constexpr int kAxisSums = 2 * kFactored;  // of a segment: squares of the accumulators, and of their roots

// Floats of one place of an axis: three factors, one unused, the biases of the hidden units.
LOPT_BOTH int32_t place_floats(int width) { return 4 + (width < 4 ? 4 : width); }

// The folded network; weights of unit j from k at w1[j * H + k].
template <int H>
struct alignas(16) Folded {
  float w0[kFeatures][H];
  float b0[H];
  float w1[H * H], b1[H];
  float w_out[2][H];  // direction, magnitude
  float b_out[2];
  float limit[kFeatures];
  float param_scale;
  float unused[3];
};
LOPT_BOTH int64_t folded_floats(int64_t h) {
  return kFeatures * h + h + h * h + h + 2 * h + 2 + kFeatures + 4;
}

struct ScratchLayout {
  int64_t network;             // Folded
  int64_t x_places, y_places;  // [size][place_floats]
  int64_t feature_sums;        // [tiles][kFeatures]
  int64_t x_sums, y_sums;      // [column_tiles + batch1 - 1][rows * batch2], [row tiles of a batch0][y_size]
  int64_t x_axis_sums, y_axis_sums;  // [segments][kAxisSums]
  int64_t size;
};
LOPT_BOTH int64_t padded(int64_t n) { return (n + 3) / 4 * 4; }
LOPT_BOTH ScratchLayout scratch_layout(const TensorRecord& r, int width) {
  ScratchLayout s;
  const Matrix m = matrix_of(r);
  const int64_t factored = r.factored ? 1 : 0;
  s.network = 0;
  s.x_places = padded(folded_floats(width));
  s.y_places = s.x_places + factored * m.x_size * place_floats(width);
  s.feature_sums = s.y_places + factored * m.y_size * place_floats(width);
  s.x_sums = s.feature_sums + padded(int64_t(r.row_tiles) * r.column_tiles * kFeatures);
  s.y_sums = s.x_sums + factored * padded((r.column_tiles + r.batch1 - 1) * m.rows * r.batch2);
  s.x_axis_sums = s.y_sums + factored * padded(row_tiles_in_batch(r) * m.y_size);
  s.y_axis_sums = s.x_axis_sums + padded(kAxisSums * r.x_segments);
  s.size = s.y_axis_sums + padded(kAxisSums * r.y_segments);
  return s;
}

// What a phase of a tensor consists of: tiles, segments, or the tensor.
LOPT_BOTH int32_t units_of(const TensorRecord& r, int32_t phase, bool lagged) {
  if (r.row_tiles == 0) return 0;
  const int32_t tiles = r.row_tiles * r.column_tiles;
  const int32_t segments = r.x_segments + r.y_segments;
  // Lagged statistics need passes 1 and 2 in the first step alone.
  const bool exact = !lagged || r.t_type != kHostScalar || r.t.bits == 0;  // the bits of 0.0
  switch (phase) {
    case kClipSums:
      return r.clip_group >= 0 ? tiles : 0;
    case kFactorSums:
      return r.factored && exact ? tiles : 0;
    case kAxes:
    case kFold:
      return segments;
    case kFeatureSums:
      return exact ? tiles : 0;
    case kNetwork:
      return 1;
    case kApply:
      return tiles;
    default:
      return lagged ? (segments > 0 ? segments : 1) : 0;
  }
}

// An item costs a block about two microseconds beside its units: ticket, waiting, numbers of the step.
// Where the host does not know the number of steps, passes 1 and 2 of lagged statistics have few items, so
// that they cost next to nothing in all steps but the first. A tile of pass 1 is often 16 KiB, as long as
// that: an item has up to four, as long as there are enough items for every block of a device.
constexpr int32_t kFirstStepItems = 8, kLeastFactorItems = 128, kFactorTiles = 4;

// Items of a phase of a tensor. Item i works on the units i, i + items, i + 2 items, ...: sums are formed by
// unit, so that nothing but the time depends on how many items there are.
LOPT_BOTH int32_t items_of(const TensorRecord& r, int32_t phase, bool lagged) {
  const int32_t units = units_of(r, phase, lagged);
  if (lagged && r.t_type != kHostScalar && (phase == kFactorSums || phase == kFeatureSums))
    return int32_t(smaller(units, kFirstStepItems));
  if (phase == kFactorSums)
    return int32_t(larger(smaller(units, kLeastFactorItems), divide_up(units, kFactorTiles)));
  return units;
}

// Offsets of the meta-parameters in the flat array (lopt_fast.reference.flatten_theta).
struct GpuTheta {
  int32_t w0, b0, w1, b1, w_out, b_out, decays, size;
};
LOPT_BOTH GpuTheta theta_of(int32_t h, int32_t layers) {
  GpuTheta t;
  t.w0 = 0;
  t.b0 = kInputs * h;
  t.w1 = t.b0 + h;
  t.b1 = layers == 2 ? t.w1 + h * h : t.w1;
  t.w_out = layers == 2 ? t.b1 + h : t.w1;
  t.b_out = t.w_out + 2 * h;
  t.decays = t.b_out + 2;
  t.size = t.decays + kMomenta + 1 + kFactored;
  return t;
}

}  // namespace lopt
