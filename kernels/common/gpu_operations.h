// What the driver (csrc/gpu_operations.cc) and the GPU kernels of the operations (kernels/*/gpu.h) agree on:
// a launch, its table of tensors, and how blocks of threads share the elements of a tensor.
//
// A launch is one phase of an operation for all tensors of the table; every block has one item of it. A
// tensor is [batch0, x, batch1, y, batch2] in memory order (lopt_fast.layout.Loops): for each (batch0,
// batch1), a group, a matrix of x rows and run = y * batch2 columns, its rows batch1 * run elements apart. A
// tile is some rows and columns of a group. Operations that do not look at axes see one row of n columns.
#pragma once

#include <cstdint>

#include "csrc/operations.h"
#include "kernels/common/device.h"
#include "kernels/common/operands.h"

namespace lopt {

enum class OperationPhase : int32_t {
  factor_sums,  // element_mlp, a tile: sums of g^2 along both factored axes
  move_axes,    // kThreads places of an axis: adds them up, moves the factored moments on
  row_scales,   // all other axes at one place: 1 / mean of the row accumulators along theirs
  column_sums,  // a tile: sums of the squares of the columns
  fold,         // a tensor: normalisers and all that multiplies the step, into the weights
  apply,        // a tile: new averages, columns, network, output
  messages,     // a tensor
  adam,         // a tile
  spreads,      // statistics, a tile: means and squared distances
  merge,        // a tensor: those of its tiles together
};

constexpr int kGroups = 15;        // of columns: `Group` in csrc/operations.h
constexpr int kMostColumns = 43;   // their sums take 1 KiB each of a block's shared memory, 48 KiB at most
constexpr int kMostGpuLayers = 2;  // hidden ones
constexpr int kMostGpuHidden = 32;
constexpr int kMostFactoredColumns = 1024;  // of a tile of a factored tensor; 4 at least

struct OperationRecord {
  const void *param, *grad;
  void* output;
  float *momentum, *second_moment;  // the averages of a kind are `stride` apart
  float *x_accumulator,
      *y_accumulator;  // factored moments along x and y; not factored: of every element, none
  int64_t momentum_stride, second_moment_stride, x_stride, y_stride;

  int64_t n, x, run;
  int32_t groups, batch1, batch2;
  int32_t rows_per_tile, column_shift;  // a tile has 2^column_shift columns
  int32_t x_tiles, run_tiles;
  int32_t model, tensor;    // its place among the tensors of its model
  uint8_t storage;          // `Storage` of parameter, gradient and output
  bool factored, x_is_row;  // x_is_row: x is the axis that row accumulators keep
  bool vector;              // four elements at a time: all addresses and strides are multiples of their size

  // Scratch memory.
  float *x_sums, *y_sums;  // (run_tiles, places along x), (x_tiles, places along y)
  float* row_scales;       // (factored moments, batches)
  float* tile_sums;        // (sums, tiles)
  float* network;
};

// A layer's (inputs, outputs) and (outputs) in device memory: of the first tensor of the first model, the
// others `stride` numbers apart (0: all alike), other models `w_model` and `b_model`.
struct GpuMlpLayer {
  const float *w, *b;
  int64_t inputs, outputs;
  int64_t w_stride, b_stride, w_model, b_model;
};

struct GpuMlp {
  int32_t place[2]
               [kGroups];  // of a group's first column in the input of the network; -1: none. [1]: factored
  int32_t columns;
  int32_t hidden_size,
      units;  // units: hidden_size, padded with units that are zero, to what there are kernels for
  int32_t hidden_layers, messages;
  bool tanh, parameter_rms, multiplied;
  float step_mult, exp_mult, scale_epsilon, scale_cap;
  float rms_epsilon, diagonal_momentum_epsilon, normaliser_epsilon;
  GpuMlpLayer layer[kMostGpuLayers + 1];
};

// What holds for all tensors of a call. There may be several models, whose tensors are alike and whose
// numbers are not: those of vmap in JAX.
struct OperationCall {
  // In device memory, of each model `numbers_size`: 1 - decay of momenta, second moments and factored
  // moments; scale and bound of gradients; learning rates (tensors), weight decays (tensors); then
  // element_mlp: multipliers (tensors), if `multiplied`; adam: AdamScalars (tensors, 9).
  const float* numbers;
  const float* found_inf;  // null, or where it is not 0 nothing is written but scratch memory and `results`
  // (models, tensors, ...): element_mlp: messages; statistics: statistics_size
  float* results;
  int64_t numbers_size;
  int32_t tensors;  // of a model
  int32_t momenta, second_moments, factored_moments;
  Output output;
  bool moved;  // statistics: of the averages after this gradient
  GpuMlp mlp;
};

constexpr int kTableRecords = 164;  // ResNet-50 has 161 tensors

struct OperationLaunch {
  OperationPhase phase;
  int32_t tensors;
  OperationCall call;
  OperationRecord records[kTableRecords];
  int32_t first_item[kTableRecords + 1];  // of each tensor; behind them the number of items
};
static_assert(sizeof(OperationLaunch) <= 32764, "a kernel's arguments");

#if defined(__CUDACC__)
#define LOPT_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define LOPT_HOST_DEVICE inline
#endif

LOPT_HOST_DEVICE int64_t tiles_of(const OperationRecord& r) {
  return int64_t(r.groups) * r.x_tiles * r.run_tiles;
}
LOPT_HOST_DEVICE int64_t batches_of(const OperationRecord& r) { return int64_t(r.groups) * r.batch2; }
LOPT_HOST_DEVICE int64_t x_places(const OperationRecord& r) { return batches_of(r) * r.x; }
LOPT_HOST_DEVICE int64_t y_places(const OperationRecord& r) { return r.groups * r.run; }
LOPT_HOST_DEVICE int64_t
sums_of(const GpuMlp& mlp) {  // of a tile, whatever the pass: squares, or hidden units
  const int64_t squares = mlp.columns + (mlp.parameter_rms ? 1 : 0);
  return squares < mlp.units ? mlp.units : squares;
}

// What a block works on.
struct Item {
  int32_t record;
  int32_t index;  // of the tensor's items
};
LOPT_DEVICE Item item_of(const OperationLaunch& launch, int32_t block) {
  // Pass 2 goes backwards: it and pass 3 begin where the cache still holds what the one before read last.
  if (launch.phase == OperationPhase::column_sums) block = launch.first_item[launch.tensors] - 1 - block;
  int32_t low = 0, high = launch.tensors;  // the last tensor whose items begin at or before the block
  while (high - low > 1) {
    const int32_t middle = (low + high) / 2;
    if (launch.first_item[middle] <= block)
      low = middle;
    else
      high = middle;
  }
  return {low, block - launch.first_item[low]};
}

LOPT_DEVICE bool stopped(const OperationCall& call) { return call.found_inf && *call.found_inf != 0.0f; }

// ---- tiles ----

struct OperationTile {
  int32_t group, x_tile, run_tile;
  int64_t row, column;  // the first ones
  int32_t rows, columns;
  int64_t base, pitch;  // element (row, column) of the group lies at base + row * pitch + column
};
LOPT_DEVICE OperationTile tile_of(const OperationRecord& r, int32_t index) {
  OperationTile t;
  const int32_t tiles = r.x_tiles * r.run_tiles;
  t.group = index / tiles;
  const int32_t inside = index - t.group * tiles;
  t.x_tile = inside / r.run_tiles;
  t.run_tile = inside - t.x_tile * r.run_tiles;
  t.row = int64_t(t.x_tile) * r.rows_per_tile;
  t.column = int64_t(t.run_tile) << r.column_shift;
  const int64_t rows = r.x - t.row, columns = r.run - t.column;
  t.rows = int32_t(rows < r.rows_per_tile ? rows : r.rows_per_tile);
  t.columns = int32_t(columns < int64_t(1) << r.column_shift ? columns : int64_t(1) << r.column_shift);
  const int32_t batch0 = t.group / r.batch1;
  t.base = (batch0 * r.x * r.batch1 + (t.group - batch0 * r.batch1)) * r.run;
  t.pitch = r.batch1 * r.run;
  return t;
}

// Calls f(element, row, column), rows and columns of the group, for what a thread has of a tile: E elements
// from there on, as many as there are threads beside each other.
template <int E, typename F>
LOPT_DEVICE void over_tile(int thread, const OperationRecord& r, const OperationTile& t, F f) {
  const int32_t slots = t.rows << r.column_shift, mask = (1 << r.column_shift) - 1;
  LOPT_NO_UNROLL
  for (int32_t slot = thread * E; slot < slots; slot += kThreads * E) {
    const int32_t column = slot & mask;
    if (column >= t.columns) continue;
    const int64_t row = t.row + (slot >> r.column_shift);
    f(t.base + row * t.pitch + t.column + column, row, t.column + column);
  }
}

// ---- gradients, averages, results ----

LOPT_DEVICE int32_t rates_of(const OperationCall& call) {
  return call.momenta + call.second_moments + call.factored_moments;
}
LOPT_DEVICE const float* numbers_of(const OperationCall& call, const OperationRecord& r) {
  return call.numbers + r.model * call.numbers_size;
}
// The numbers of an operation's own.
LOPT_DEVICE const float* own_numbers(const OperationCall& call, const OperationRecord& r) {
  return numbers_of(call, r) + rates_of(call) + 2 + 2 * int64_t(call.tensors);
}
// Where the results of a tensor lie, `size` of them.
LOPT_DEVICE float* results_of(const OperationCall& call, const OperationRecord& r, int32_t size) {
  return call.results + (int64_t(r.model) * call.tensors + r.tensor) * size;
}

struct GradientNumbers {
  float scale, bound;
};
LOPT_DEVICE GradientNumbers gradient_numbers(const OperationCall& call, const OperationRecord& r) {
  const float* numbers = numbers_of(call, r) + rates_of(call);
  return {numbers[0], numbers[1]};
}

template <int E>
LOPT_DEVICE void load_gradient(const OperationRecord& r, const GradientNumbers& numbers, int64_t at,
                               float (&g)[E]) {
  load<E>(r.grad, Storage(r.storage), at, g);
  LOPT_UNROLL
  for (int e = 0; e < E; ++e) g[e] = at_most(numbers.bound, at_least(-numbers.bound, g[e] * numbers.scale));
}

// The running averages `array` after `x`.
template <int E>
LOPT_DEVICE void load_moved(const float* array, int64_t at, float rate, const float (&x)[E],
                            float (&out)[E]) {
  load<E>(array, Storage::float32, at, out);
  LOPT_UNROLL
  for (int e = 0; e < E; ++e) out[e] = average(out[e], rate, x[e]);
}

struct ResultNumbers {
  float lr, weight_decay;
};
LOPT_DEVICE ResultNumbers result_numbers(const OperationCall& call, const OperationRecord& r) {
  const float* numbers = numbers_of(call, r) + rates_of(call) + 2;
  return {numbers[r.tensor], numbers[call.tensors + r.tensor]};
}

// What a step gives: see `Output`.
template <int E>
LOPT_DEVICE void store_result(const OperationRecord& r, Output output, const ResultNumbers& numbers,
                              int64_t at, const float (&p)[E], const float (&step)[E]) {
  float result[E];
  LOPT_UNROLL
  for (int e = 0; e < E; ++e) {
    const float delta = -numbers.lr * (step[e] + numbers.weight_decay * p[e]);
    result[e] = output == Output::step ? step[e] : output == Output::delta ? delta : p[e] + delta;
  }
  store<E>(r.output, Storage(r.storage), at, result);
}

// ---- sums ----

// Of each thread, (sums, kThreads), in shared memory.
LOPT_DEVICE float& sum_of(float* sums, int32_t i, int thread) { return sums[i * kThreads + thread]; }

template <typename Block>
LOPT_DEVICE void clear_sums(Block& block, float* sums, int32_t count) {
  block.each([&](int thread) {
    for (int32_t i = 0; i < count; ++i) sum_of(sums, i, thread) = 0.0f;
  });
}

// Calls store(i, total) once for each of the sums, the threads added in an order that never changes.
template <typename Block, typename F>
LOPT_DEVICE void add_threads(Block& block, const float* sums, int32_t count, F store) {
  block.sync();
  LOPT_NO_UNROLL
  for (int32_t first = 0; first < count; first += kWarps) {  // a warp for each
    typename Block::template Threads<Values<1>> total;
    block.each([&](int thread) {
      const int32_t i = first + thread / kWarpLanes;
      total[thread].v[0] = 0.0f;
      if (i < count)
        for (int part = 0; part < kWarps; ++part)
          total[thread].v[0] += sums[i * kThreads + part * kWarpLanes + thread % kWarpLanes];
    });
    group_sum(block, total, kWarpLanes);
    block.each([&](int thread) {
      const int32_t i = first + thread / kWarpLanes;
      if (i < count && thread % kWarpLanes == 0) store(i, total[thread].v[0]);
    });
  }
  block.sync();
}

// Adds the sums of a tensor's tiles, (count, tiles), up and calls store(i, total) for each.
template <typename Block, typename F>
LOPT_DEVICE void add_tiles(Block& block, const OperationRecord& r, float* sums, int32_t count, F store) {
  const int64_t tiles = tiles_of(r);
  block.each([&](int thread) {
    for (int32_t i = 0; i < count; ++i) {
      float total = 0.0f;
      for (int64_t tile = thread; tile < tiles; tile += kThreads) total += r.tile_sums[i * tiles + tile];
      sum_of(sums, i, thread) = total;
    }
  });
  add_threads(block, sums, count, store);
}

}  // namespace lopt
