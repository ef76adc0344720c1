// One tensor during one step, for the drivers (core.cc, parts.cc): tiling, scratch memory and the folding of
// the network.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "csrc/arena.h"
#include "csrc/core.h"
#include "kernels/small_fc_lopt/kernel.h"

namespace lopt {

// Kernels of the instruction set in use.
template <typename T>
const KernelTable<T>& table();
template <>
const KernelTable<float>& table<float>();
template <>
const KernelTable<double>& table<double>();

// Throws std::invalid_argument if one of the tensors cannot be updated.
void check(const Spec& spec, const Tensor* tensors, int64_t count, int32_t clip_groups);
[[noreturn]] void refuse(int64_t index, const std::string& why);

namespace {  // internal to each source

inline int64_t elements(const Tensor& t) {
  return t.loops.batch0 * t.loops.x * t.loops.batch1 * t.loops.y * t.loops.batch2;
}

// ---- tiling ----

constexpr int64_t kTileElements = 16384;  // least work of a task
constexpr int64_t kLargeTensor = 65536;   // from here on the tiles of one tensor go to several threads
constexpr int64_t kMostRowTiles = 64;     // bounds the scratch for sums along x
constexpr int64_t kLongestRun = 65536;    // a longer row is cut

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline Tiling tiling_of(const Loops& l) {
  Tiling t = {};
  t.rows = l.batch0 * l.x * l.batch1;
  t.run = l.y * l.batch2;
  if (t.rows == 0 || t.run == 0) return t;  // no tiles
  // Vectors have a single row: cut that one as finely as tasks are to be.
  t.run_per_tile = t.rows == 1 ? kTileElements : kLongestRun;
  if (t.run_per_tile > t.run) t.run_per_tile = t.run;
  t.run_tiles = divide_up(t.run, t.run_per_tile);
  t.rows_per_tile = divide_up(kTileElements, t.run_per_tile);
  if (t.rows_per_tile * kMostRowTiles < t.rows) t.rows_per_tile = divide_up(t.rows, kMostRowTiles);
  if (t.rows_per_tile > t.rows) t.rows_per_tile = t.rows;
  t.row_tiles = divide_up(t.rows, t.rows_per_tile);
  return t;
}

// ---- one tensor ----

constexpr double kLog2E = 1.4426950408889634;

// Offsets of the meta-parameters in the flat array (lopt_fast.reference.flatten_theta).
struct ThetaLayout {
  int64_t w0, b0, w1, b1, w_out, b_out, decays, size;
  explicit ThetaLayout(const Spec& s) {
    const int64_t h = s.hidden_size;
    w0 = 0;
    b0 = w0 + kInputs * h;
    w1 = b0 + h;
    b1 = s.hidden_layers == 2 ? w1 + h * h : w1;
    w_out = s.hidden_layers == 2 ? b1 + h : w1;
    b_out = w_out + 2 * h;
    decays = b_out + 2;
    size = decays + kMomenta + 1 + kFactored;
  }
};

template <typename T>
TensorStep<T> describe(const Spec& spec, const Tensor& tensor, double clip) {
  const Loops& l = tensor.loops;
  const ThetaLayout at(spec);
  TensorStep<T> c = {};
  c.tensor = tensor;
  c.tiling = tiling_of(l);
  c.x_size = l.batch0 * l.x * l.batch1 * l.batch2;
  c.y_size = l.batch0 * l.batch1 * l.y * l.batch2;
  c.n = c.tiling.rows * c.tiling.run;
  c.hidden_size = spec.hidden_size;
  c.hidden_layers = spec.hidden_layers;
  c.lagged = spec.lagged && tensor.scalars->t > 0;

  const StepScalars& now = *tensor.scalars;
  c.grad_scale = T(now.grad_scale * clip);
  const double decay = now.lr * now.weight_decay;
  c.param_scale = T(tensor.apply ? 1.0 - decay : -decay);
  c.theta = static_cast<const T*>(tensor.theta);
  const T* d = c.theta + at.decays;
  for (int k = 0; k < kMomenta; ++k) c.d_momentum[k] = d[k];
  c.d_second_moment = d[kMomenta];
  for (int k = 0; k < kFactored; ++k) c.d_factored[k] = d[kMomenta + 1 + k];
  c.slow = true;
  for (int k = 1; k < kMomenta + 1; ++k) c.slow = c.slow && d[k] <= T(0.5);
  c.w1 = c.theta + at.w1;
  c.b1 = c.theta + at.b1;

  c.momentum = static_cast<T*>(tensor.momentum);
  c.momentum_stride = tensor.momentum_stride ? tensor.momentum_stride : c.n;
  c.second_moment = static_cast<T*>(tensor.second_moment);
  c.mean_squares = static_cast<T*>(tensor.mean_squares);
  if (l.factored) {
    c.x_accumulator = static_cast<T*>(l.x_is_row ? tensor.row : tensor.column);
    c.y_accumulator = static_cast<T*>(l.x_is_row ? tensor.column : tensor.row);
  } else {
    c.diagonal = static_cast<T*>(tensor.row);
  }
  return c;
}

template <typename T>
void take_scratch(TensorStep<T>& c, Arena& arena) {
  const Tiling& t = c.tiling;
  const Loops& l = c.tensor.loops;
  const int64_t h = c.hidden_size;
  c.x_stride = c.x_size + kPadding;
  c.y_stride = c.y_size + kPadding;
  c.w0 = arena.take<T>(kFeatures * h);
  c.b0 = arena.take<T>(h);
  c.w_out = arena.take<T>(2 * h);
  c.sums = arena.take<double>(t.tiles() * kFeatures);
  if (!l.factored) return;
  c.x_sums = arena.take<T>(t.run_tiles * c.x_size);
  c.y_sums = arena.take<T>((l.batch0 + t.row_tiles) * l.batch1 * t.run);
  c.scratch = arena.take<T>(c.x_stride > c.y_stride ? c.x_stride : c.y_stride);
  c.x_factor = arena.take<T>(kFactored * c.x_stride);
  c.y_factor = arena.take<T>(kFactored * c.y_stride);
  c.x_bias = arena.take<T>(h * c.x_stride);
  c.y_bias = arena.take<T>(h * c.y_stride);
}

template <typename T>
size_t scratch_bytes_of(const Spec& spec, const Tensor& tensor) {
  TensorStep<T> c = describe<T>(spec, tensor, 1.0);
  return Arena::bytes([&](Arena& counter) { take_scratch(c, counter); });
}

inline size_t scratch_bytes(const Spec& spec, const Tensor& tensor) {
  return tensor.dtype == Dtype::float32 ? scratch_bytes_of<float>(spec, tensor)
                                        : scratch_bytes_of<double>(spec, tensor);
}

// Bias of the first layer with the time columns: what of the network does not depend on statistics.
template <typename T>
void fold_time(TensorStep<T>& c, const Spec& spec) {
  const ThetaLayout at(spec);
  const int64_t h = spec.hidden_size;
  const double t = double(c.tensor.scalars->t);
  double time[kTimeColumns];
  for (int x = 0; x < kTimeColumns; ++x) time[x] = std::tanh(t / kTimescales[x] - 1.0);
  for (int64_t j = 0; j < h; ++j) {
    double bias = double(c.theta[at.b0 + j]);
    for (int x = 0; x < kTimeColumns; ++x)
      bias += time[x] * double(c.theta[at.w0 + (kNormalised + x) * h + j]);
    c.b0[j] = T(bias);
  }
}

// Mean squares of the features over the tensor: sums of all tiles, in their order.
template <typename T>
void mean_squares(const TensorStep<T>& c, double* out) {
  for (int f = 0; f < c.features(); ++f) {
    double total = 0;
    for (int64_t tile = 0; tile < c.tiling.tiles(); ++tile) total += c.sums[tile * kFeatures + f];
    out[f] = total / double(c.n);
  }
}

template <typename T>
void read_mean_squares(const TensorStep<T>& c, double* out) {
  for (int f = 0; f < c.features(); ++f) out[f] = double(c.mean_squares[kColumnOfFeature[f]]);
}

template <typename T>
void write_mean_squares(const TensorStep<T>& c, const double* from) {
  for (int column = 0; column < kNormalised; ++column) c.mean_squares[column] = T(0);
  for (int f = 0; f < c.features(); ++f) {
    c.mean_squares[kColumnOfFeature[f]] = T(from[f]);
    if (f >= fDiagonal) c.mean_squares[kColumnOfFeature[f] + kDiagonalTwin] = T(from[f]);
  }
}

// First layer with the normalisers, last layer with everything that multiplies the step.
template <typename T>
void fold_network(TensorStep<T>& c, const Spec& spec, const double* squares) {
  const ThetaLayout at(spec);
  const int64_t h = spec.hidden_size;
  const T* w0 = c.theta + at.w0;
  for (int f = 0; f < c.features(); ++f) {
    const double root = std::sqrt(squares[f] + kNormaliserEpsilon);
    const double scale = 1.0 / root;
    c.limits[f][1] = T(kLaggedClip * root);
    c.limits[f][0] = -c.limits[f][1];
    const int64_t column = kColumnOfFeature[f];
    for (int64_t j = 0; j < h; ++j) {
      double w = double(w0[column * h + j]);
      if (f >= fDiagonal) w += double(w0[(column + kDiagonalTwin) * h + j]);
      c.w0[f * h + j] = T(scale * w);
    }
  }
  double step = c.tensor.scalars->lr * spec.step_mult;
  if (spec.parameter_rms) step *= std::sqrt(squares[fP] + spec.scale_epsilon);
  const double multiplier[2] = {step, spec.exp_mult * kLog2E};
  for (int o = 0; o < 2; ++o) {
    for (int64_t j = 0; j < h; ++j)
      c.w_out[2 * j + o] = T(multiplier[o] * double(c.theta[at.w_out + 2 * j + o]));
    c.b_out[o] = T(multiplier[o] * double(c.theta[at.b_out + o]));
  }
}

// Runs `pass` over all tiles. Passes alternate in direction: each begins where the cache still holds what the
// one before read last.
template <typename T>
void run_tiles(const Pool& pool, const TensorStep<T>& c, void (*pass)(const TensorStep<T>&, int64_t),
               bool backwards = false) {
  struct Work {
    const TensorStep<T>* c;
    void (*pass)(const TensorStep<T>&, int64_t);
    int64_t first, direction;
  };
  const int64_t tiles = c.tiling.tiles();
  Work work = {&c, pass, backwards ? tiles - 1 : 0, backwards ? -1 : 1};
  if (tiles == 1) return pass(c, 0);
  pool.run(
      pool.context, tiles,
      [](void* w, int64_t i) {
        const Work& work = *static_cast<Work*>(w);
        work.pass(*work.c, work.first + i * work.direction);
      },
      &work);
}

// A tensor of a step: its place in the list, its work, and the scratch memory that it takes.
struct Share {
  int64_t index, elements;
  size_t scratch;
};

// Calls step(index, pool, arena, whole) for every tensor. Small ones go to one thread each, several to a
// task, with a pool of that thread alone and `whole` false; large ones are spread over all threads by their
// tiles. All memory is had before the first call. Throws std::bad_alloc.
template <typename Step>
void for_each_tensor(const std::vector<Share>& tensors, const Pool& pool, const Step& step) {
  struct Batch {
    int64_t begin, end;
  };
  std::vector<int64_t> small, large;
  std::vector<Batch> batches;
  size_t small_bytes = 0, large_bytes = 0;
  int64_t work = 0;
  for (const Share& t : tensors) {
    const bool is_small = t.elements < kLargeTensor;
    (is_small ? small : large).push_back(t.index);
    size_t& bytes = is_small ? small_bytes : large_bytes;
    bytes = std::max(bytes, t.scratch);
    if (!is_small) continue;
    if (work == 0) batches.push_back({int64_t(small.size()) - 1, 0});
    batches.back().end = int64_t(small.size());
    work += t.elements + 256;  // the constant: what a tensor costs besides its elements
    if (work >= kTileElements) work = 0;
  }
  const int64_t threads = pool.threads(pool.context);
  Arenas arenas(std::min(threads, int64_t(batches.size())), small_bytes);
  Arena arena;
  arena.reserve(large_bytes);
  struct Work {
    const std::vector<int64_t>& small;
    const std::vector<Batch>& batches;
    const Step& step;
    Arenas& arenas;
    Pool serial;
  } shared = {small, batches, step, arenas, serial_pool()};
  if (!batches.empty())
    pool.run(
        pool.context, int64_t(batches.size()),
        [](void* w, int64_t b) {
          const Work& work = *static_cast<Work*>(w);
          const Batch& batch = work.batches[size_t(b)];
          work.arenas.lend([&](Arena& arena) {
            for (int64_t i = batch.begin; i < batch.end; ++i)
              work.step(work.small[size_t(i)], work.serial, arena, false);
          });
        },
        &shared);
  for (int64_t i : large) step(i, pool, arena, true);
}

}  // namespace
}  // namespace lopt
