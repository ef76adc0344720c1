// The phases of element_mlp on GPUs, one block of kThreads threads for each item, written against a Block
// policy (kernels/common/device.h): cuda.cu runs them on the device, csrc/gpu_emulator.cc on the processor.
// What they compute: README.md; how a tensor is cut and what a launch is: kernels/common/gpu_operations.h;
// all phases together: CUDA.md. Everything that is summed is summed in an order that depends on shapes alone.
#pragma once

#include <cmath>

#include "kernels/common/constants.h"
#include "kernels/common/gpu_operations.h"

namespace lopt {

// ---- pass 1: factored moments ----

constexpr int kChunk = 2048;  // squares of so many elements at a time lie in shared memory

struct FactorShared {
  float square[kChunk + kChunk / 4];  // rows of an odd length, 5 at least: no bank conflicts either way
  float over_x[kMostFactoredColumns];
};

// Of a tile: sums of g^2 over its columns, for each row and place along batch2, and over its rows.
template <typename Block>
LOPT_DEVICE void factor_sums(Block& block, FactorShared& shared, const OperationLaunch& launch, Item item) {
  const OperationRecord& r = launch.records[item.record];
  const OperationTile t = tile_of(r, item.index);
  const GradientNumbers numbers = gradient_numbers(launch.call, r);
  const int32_t width = 1 << r.column_shift, line = width + 1;
  const int32_t most = kChunk >> r.column_shift;  // rows of a chunk
  const int32_t batch0 = t.group / r.batch1, batch1 = t.group - batch0 * r.batch1;
  float* x_sums = global(r.x_sums) + t.run_tile * x_places(r);
  block.each([&](int thread) {
    for (int32_t c = thread; c < width; c += kThreads) shared.over_x[c] = 0.0f;
  });
  LOPT_NO_UNROLL
  for (int32_t first = 0; first < t.rows; first += most) {
    const int32_t rows = t.rows - first < most ? t.rows - first : most;
    block.sync();
    block.each([&](int thread) {
      LOPT_UNROLL
      for (int i = 0; i < kChunk / kThreads; ++i) {
        const int32_t slot = i * kThreads + thread, row = slot >> r.column_shift, column = slot & (width - 1);
        float g[1] = {0.0f};
        if (row < rows && column < t.columns)
          load_gradient<1>(r, numbers, t.base + (t.row + first + row) * t.pitch + t.column + column, g);
        shared.square[row * line + column] = g[0] * g[0];
      }
    });
    block.sync();
    block.each([&](int thread) {
      for (int32_t c = thread; c < width; c += kThreads)
        for (int32_t row = 0; row < rows; ++row) shared.over_x[c] += shared.square[row * line + c];
      for (int32_t i = thread; i < rows * r.batch2; i += kThreads) {
        const int32_t row = i / r.batch2, b = i - row * r.batch2;
        // Columns of the tile whose place along batch2 is b.
        const int32_t begin = int32_t((b + r.batch2 - t.column % r.batch2) % r.batch2);
        float sum = 0.0f;
        for (int32_t c = begin; c < t.columns; c += r.batch2) sum += shared.square[row * line + c];
        const int64_t x = t.row + first + row;
        x_sums[((batch0 * r.x + x) * r.batch1 + batch1) * r.batch2 + b] = sum;
      }
    });
  }
  block.each([&](int thread) {
    float* y_sums = global(r.y_sums) + t.x_tile * y_places(r) + t.group * r.run + t.column;
    for (int32_t c = thread; c < t.columns; c += kThreads) y_sums[c] = shared.over_x[c];
  });
}

LOPT_HOST_DEVICE int64_t axis_items(int64_t places) { return (places + kThreads - 1) / kThreads; }

// Adds the tiles' sums of some places along x, or along y, up and moves the factored moments there on.
template <typename Block>
LOPT_DEVICE void move_axes(Block& block, const OperationLaunch& launch, Item item) {
  const OperationCall& call = launch.call;
  if (stopped(call)) return;
  const OperationRecord& r = launch.records[item.record];
  const int32_t x_items = int32_t(axis_items(x_places(r)));
  const bool along_x = item.index < x_items;
  const int64_t places = along_x ? x_places(r) : y_places(r);
  const int64_t first = int64_t(along_x ? item.index : item.index - x_items) * kThreads;
  const float* sums = global(along_x ? r.x_sums : r.y_sums);
  const int32_t tiles = along_x ? r.run_tiles : r.x_tiles;
  const float others = float(along_x ? r.run / r.batch2 : r.x);
  float* const accumulator = global(along_x ? r.x_accumulator : r.y_accumulator);
  const int64_t stride = along_x ? r.x_stride : r.y_stride;
  const float* rates = numbers_of(call, r) + call.momenta + call.second_moments;
  block.each([&](int thread) {
    const int64_t at = first + thread;
    if (at >= places) return;
    float square = 0.0f;
    for (int32_t tile = 0; tile < tiles; ++tile) square += sums[tile * places + at];
    const float mean_square[1] = {square / others + float(kSquareEpsilon)};
    for (int32_t k = 0; k < call.factored_moments; ++k) {
      float moved[1];
      load_moved<1>(accumulator + k * stride, at, rates[k], mean_square, moved);
      accumulator[k * stride + at] = moved[0];
    }
  });
}

// 1 / (mean + epsilon) of the row accumulators along their axis, for one place on all other axes.
template <typename Block>
LOPT_DEVICE void row_scales(Block& block, float* sums, const OperationLaunch& launch, Item item) {
  const OperationRecord& r = launch.records[item.record];
  const int32_t moments = launch.call.factored_moments;
  const int32_t group = item.index / r.batch2, b = item.index - group * r.batch2;
  const int32_t batch0 = group / r.batch1, batch1 = group - batch0 * r.batch1;
  const float* accumulator = global(r.x_is_row ? r.x_accumulator : r.y_accumulator);
  const int64_t moment_stride = r.x_is_row ? r.x_stride : r.y_stride;
  const int64_t first = r.x_is_row ? (batch0 * r.x * r.batch1 + batch1) * r.batch2 + b : group * r.run + b;
  const int64_t stride = r.x_is_row ? int64_t(r.batch1) * r.batch2 : r.batch2;
  const int64_t length = r.x_is_row ? r.x : r.run / r.batch2;
  block.each([&](int thread) {
    for (int32_t k = 0; k < moments; ++k) {
      float sum = 0.0f;
      for (int64_t i = thread; i < length; i += kThreads)
        sum += accumulator[k * moment_stride + first + i * stride];
      sum_of(sums, k, thread) = sum;
    }
  });
  const int64_t batches = batches_of(r);
  float* to = global(r.row_scales) + item.index;
  add_threads(block, sums, moments, [&](int32_t k, float sum) {
    to[k * batches] = 1.0f / (sum / float(length) + float(kRowMeanEpsilon));
  });
}

// ---- columns: what passes 2 and 3 share ----

// a % b: of 64 bits it takes a hundred instructions.
LOPT_DEVICE int32_t modulo(int64_t a, int32_t b) {
  return b == 1 ? 0 : a <= 0x7fffffff ? int32_t(a) % b : int32_t(a % b);
}

LOPT_DEVICE float floored_root(float x) { return inverse_root(at_least(float(kFactorFloor), x)); }

// Calls visit(place in the input, column) for the columns of E elements, and visit_row(place, value) for
// those that show x, which are equal for all E; the order is not that of the input. Write: stores the new
// averages.
template <int E, bool Write, typename Visit, typename VisitRow>
LOPT_DEVICE void visit_columns(const OperationCall& call, const OperationRecord& r, int32_t group, int64_t at,
                               int64_t row, int64_t column, const float (&g)[E], const float (&p)[E],
                               Visit visit, VisitRow visit_row) {
  const GpuMlp& mlp = call.mlp;
  const auto place = [&](Group of) { return mlp.place[r.factored][int(of)]; };
  // Shows f(e) of each element as member k of a group, if the network has it.
  const auto show = [&](Group of, int32_t k, auto f) {
    const int32_t first = place(of);
    if (first < 0) return;
    float x[E];
    LOPT_UNROLL
    for (int e = 0; e < E; ++e) x[e] = f(e);
    visit(first + k, x);
  };
  const auto show_row = [&](Group of, int32_t k, float x) {
    if (place(of) >= 0) visit_row(place(of) + k, x);
  };
  const auto moved = [&](float* array, int64_t stride, int32_t k, float rate, const float (&x)[E],
                         float (&out)[E]) {
    float* const average = global(array) + k * stride;
    load_moved<E>(average, at, rate, x, out);
    if constexpr (Write) store<E>(average, Storage::float32, at, out);
  };

  show(Group::g, 0, [&](int e) { return g[e]; });
  show(Group::clip_g, 0,
       [&](int e) { return at_most(float(kGradientBound), at_least(-float(kGradientBound), g[e])); });
  show(Group::p, 0, [&](int e) { return p[e]; });
  show(Group::log_abs_p, 0, [&](int e) { return std::log(std::fabs(p[e]) + float(kLogEpsilon)); });

  float square[E],
      root[E];  // root: of the second moment that belongs to a momentum: 1 / sqrt, of the only one or k
  LOPT_UNROLL
  for (int e = 0; e < E; ++e) square[e] = g[e] * g[e], root[e] = 0.0f;
  // Along x and y; the place of an element on the axes that are neither.
  int64_t x_at = 0, y_at = 0, batch = 0;
  if (r.factored) {
    const int32_t batch0 = group / r.batch1, phase = modulo(column, r.batch2);
    x_at = ((batch0 * r.x + row) * r.batch1 + (group - batch0 * r.batch1)) * r.batch2 + phase;
    y_at = group * r.run + column;
    batch = int64_t(group) * r.batch2 + phase;
  }
  const int32_t pairs = call.momenta > call.second_moments ? call.momenta : call.second_moments;
  const int32_t most = pairs > call.factored_moments ? pairs : call.factored_moments;
  LOPT_NO_UNROLL
  for (int32_t k = 0; k < most; ++k) {
    const float* rates = numbers_of(call, r) + k;
    float m[E] = {};
    if (k < call.momenta) {
      moved(r.momentum, r.momentum_stride, k, rates[0], g, m);
      show(Group::m, k, [&](int e) { return m[e]; });
    }
    if (k < call.second_moments) {
      float v[E];
      moved(r.second_moment, r.second_moment_stride, k, rates[call.momenta], square, v);
      LOPT_UNROLL
      for (int e = 0; e < E; ++e) root[e] = inverse_root(v[e] + mlp.rms_epsilon);
      show(Group::rms, k, [&](int e) { return v[e]; });
      show(Group::rsqrt_rms, k, [&](int e) { return root[e]; });
      show(Group::g_rsqrt_rms, k, [&](int e) { return g[e] * root[e]; });
    }
    if (k < call.momenta) show(Group::m_rsqrt_rms, k, [&](int e) { return m[e] * root[e]; });
    if (k >= call.factored_moments) continue;

    float d[E];  // factored moments along y, or of every element
    if (r.factored) {
      const float x = global(r.x_accumulator)[k * r.x_stride + x_at];
      const float scale = global(r.row_scales)[k * batches_of(r) + batch];
      load<E>(r.y_accumulator, Storage::float32, k * r.y_stride + y_at, d);
      const float x_factor = floored_root(r.x_is_row ? x * scale : x), y_scale = r.x_is_row ? 1.0f : scale;
      float factor[E];
      LOPT_UNROLL
      for (int e = 0; e < E; ++e) factor[e] = x_factor * floored_root(d[e] * y_scale);
      show(Group::fac_g, k, [&](int e) { return g[e] * factor[e]; });
      show(Group::fac_m, k, [&](int e) { return m[e] * factor[e]; });
      const auto inverse = [](float moment) { return inverse_root(moment + float(kFactorEpsilon)); };
      show_row(r.x_is_row ? Group::fac_row : Group::fac_column, k, x);
      show_row(r.x_is_row ? Group::rsqrt_fac_row : Group::rsqrt_fac_column, k, inverse(x));
      show(r.x_is_row ? Group::fac_column : Group::fac_row, k, [&](int e) { return d[e]; });
      show(r.x_is_row ? Group::rsqrt_fac_column : Group::rsqrt_fac_row, k,
           [&](int e) { return inverse(d[e]); });
    } else {
      float mean_square[E];
      LOPT_UNROLL
      for (int e = 0; e < E; ++e) mean_square[e] = square[e] + float(kSquareEpsilon);
      moved(r.x_accumulator, r.x_stride, k, rates[call.momenta + call.second_moments], mean_square, d);
      show(Group::fac_g, k, [&](int e) { return g[e] * floored_root(d[e] + float(kDiagonalEpsilon)); });
      show(Group::fac_m, k, [&](int e) { return m[e] * inverse_root(d[e] + mlp.diagonal_momentum_epsilon); });
      const auto inverse = [&](int e) { return inverse_root(d[e] + float(kFactorEpsilon)); };
      show(Group::fac_row, k, [&](int e) { return d[e]; });
      show(Group::fac_column, k, [&](int e) { return d[e]; });
      show(Group::rsqrt_fac_row, k, inverse);
      show(Group::rsqrt_fac_column, k, inverse);
    }
  }
}

// ---- pass 2 ----

template <int E, typename Block>
LOPT_DEVICE void column_sums(Block& block, float* sums, const OperationCall& call, const OperationRecord& r,
                             int32_t index) {
  const OperationTile t = tile_of(r, index);
  const GradientNumbers numbers = gradient_numbers(call, r);
  const GpuMlp& mlp = call.mlp;
  const int32_t count = mlp.columns + (mlp.parameter_rms ? 1 : 0);
  clear_sums(block, sums, count);
  block.each([&](int thread) {
    const auto add_squares = [&](int32_t i, const float (&x)[E]) {
      float square = 0.0f;
      LOPT_UNROLL
      for (int e = 0; e < E; ++e) square += x[e] * x[e];
      sum_of(sums, i, thread) += square;
    };
    over_tile<E>(thread, r, t, [&](int64_t at, int64_t row, int64_t column) {
      float g[E], p[E];
      load_gradient<E>(r, numbers, at, g);
      load<E>(r.param, Storage(r.storage), at, p);
      visit_columns<E, false>(call, r, t.group, at, row, column, g, p, add_squares,
                              [&](int32_t i, float x) { sum_of(sums, i, thread) += float(E) * (x * x); });
      if (mlp.parameter_rms) add_squares(mlp.columns, p);
    });
  });
  const int64_t tiles = tiles_of(r);
  add_threads(block, sums, count, [&](int32_t i, float total) { r.tile_sums[i * tiles + index] = total; });
}
template <typename Block>
LOPT_DEVICE void column_sums(Block& block, float* sums, const OperationLaunch& launch, Item item) {
  const OperationRecord& r = launch.records[item.record];
  if (r.vector)
    column_sums<4>(block, sums, launch.call, r, item.index);
  else
    column_sums<1>(block, sums, launch.call, r, item.index);
}

// ---- the network ----

// Weights with everything folded in that multiplies them; units beyond hidden_size are zero. Layer i + 1 is
// (units, units) from the first layer's end on; of the last one the weights of direction and of magnitude,
// then both biases.
struct NetworkLayout {
  int32_t b0, w1, b1, direction, magnitude, b_out, size;
};
LOPT_HOST_DEVICE NetworkLayout network_layout(const GpuMlp& mlp, int32_t units) {
  NetworkLayout at;
  at.b0 = mlp.columns * units;
  at.w1 = at.b0 + units;
  at.b1 = at.w1 + (mlp.hidden_layers == 2 ? units * units : 0);
  at.direction = at.b1 + (mlp.hidden_layers == 2 ? units : 0);
  at.magnitude = at.direction + units;
  at.b_out = at.magnitude + units;
  at.size = at.b_out + 4;
  return at;
}

LOPT_DEVICE const float* weights_of(const GpuMlpLayer& layer, const OperationRecord& r) {
  return layer.w + r.model * layer.w_model + r.tensor * layer.w_stride;
}
LOPT_DEVICE const float* biases_of(const GpuMlpLayer& layer, const OperationRecord& r) {
  return layer.b + r.model * layer.b_model + r.tensor * layer.b_stride;
}

template <typename Block>
LOPT_DEVICE void fold(Block& block, float* shared, const OperationLaunch& launch, Item item) {
  const OperationCall& call = launch.call;
  const OperationRecord& r = launch.records[item.record];
  const GpuMlp& mlp = call.mlp;
  const int32_t columns = mlp.columns, units = mlp.units, layers = mlp.hidden_layers;
  float* const scale = shared + (columns + 1) * kThreads;  // of each column; behind them the mean square of p
  add_tiles(block, r, shared, columns + (mlp.parameter_rms ? 1 : 0), [&](int32_t i, float total) {
    const float mean = total / float(r.n);
    scale[i] = i < columns ? 1.0f / std::sqrt(mean + mlp.normaliser_epsilon) : mean;
  });
  float direction = mlp.step_mult;
  if (mlp.parameter_rms) {
    const float rms = std::sqrt(scale[columns] + mlp.scale_epsilon);
    direction *= at_most(mlp.scale_cap * std::sqrt(float(r.n)), rms);
  }
  if (mlp.multiplied) direction *= own_numbers(call, r)[r.tensor];
  const float magnitude = mlp.exp_mult * 1.4426950408889634f;  // log2 e
  const NetworkLayout at = network_layout(mlp, units);
  float* const network = global(r.network);
  block.each([&](int thread) {
    // Layer i from `inputs` to all units at w, its bias at b.
    const auto hidden = [&](int i, int32_t inputs, int32_t used, int32_t w, int32_t b) {
      const GpuMlpLayer& layer = mlp.layer[i];
      const float *from = weights_of(layer, r), *bias = biases_of(layer, r);
      for (int32_t k = thread; k < (inputs + 1) * units; k += kThreads) {
        const int32_t input = k / units, unit = k - input * units;
        const bool there = unit < mlp.hidden_size;
        if (input == inputs)
          network[b + unit] = there ? bias[unit] : 0.0f;
        else
          network[w + k] = there && input < used
                               ? from[input * layer.outputs + unit] * (i == 0 ? scale[input] : 1.0f)
                               : 0.0f;
      }
    };
    hidden(0, columns, columns, 0, at.b0);
    if (layers == 2) hidden(1, units, mlp.hidden_size, at.w1, at.b1);
    const GpuMlpLayer& last = mlp.layer[layers];
    const float *from = weights_of(last, r), *bias = biases_of(last, r);
    if (thread < units) {
      const bool there = thread < mlp.hidden_size;
      network[at.direction + thread] = there ? from[thread * last.outputs] * direction : 0.0f;
      network[at.magnitude + thread] = there ? from[thread * last.outputs + 1] * magnitude : 0.0f;
    }
    if (thread == 0) {
      network[at.b_out] = bias[0] * direction;
      network[at.b_out + 1] = bias[1] * magnitude;
      network[at.b_out + 2] = network[at.b_out + 3] = 0.0f;
    }
  });
}

// ---- pass 3 ----

// Four weights at once; on a multiple of 16 bytes of shared memory.
LOPT_DEVICE void load_weights(const float* from, float (&w)[4]) {
  const Packed<16> packed = *reinterpret_cast<const Packed<16>*>(from);
  LOPT_UNROLL
  for (int i = 0; i < 4; ++i) w[i] = float_of(packed.word[i]);
}

// units[j] += x w[j]
template <int H>
LOPT_DEVICE void add_products(const float* weights, float x, float (&units)[H]) {
  LOPT_UNROLL
  for (int j = 0; j < H; j += 4) {
    float w[4];
    load_weights(weights + j, w);
    LOPT_UNROLL
    for (int i = 0; i < 4; ++i) units[j + i] += x * w[i];
  }
}
template <int E, int H>
LOPT_DEVICE void add_products(const float* weights, const float (&x)[E], float (&units)[E][H]) {
  LOPT_UNROLL
  for (int j = 0; j < H; j += 4) {
    float w[4];
    load_weights(weights + j, w);
    LOPT_UNROLL
    for (int e = 0; e < E; ++e) LOPT_UNROLL
    for (int i = 0; i < 4; ++i) units[e][j + i] += x[e] * w[i];
  }
}

// The network from the second layer on, for E elements whose first hidden units, before activation, are
// `units`. Calls visit_hidden(j, sum over the elements) for the last hidden units.
template <int H, int E, typename VisitHidden>
LOPT_DEVICE void network_outputs(const GpuMlp& mlp, const float* network, float (&units)[E][H],
                                 VisitHidden visit_hidden, float (&direction)[E], float (&magnitude)[E]) {
  const NetworkLayout at = network_layout(mlp, H);
  const auto activation = [&](float x) { return mlp.tanh ? std::tanh(x) : relu(x); };
  LOPT_UNROLL
  for (int e = 0; e < E; ++e) {
    direction[e] = network[at.b_out];
    magnitude[e] = network[at.b_out + 1];
    LOPT_UNROLL
    for (int j = 0; j < H; ++j) units[e][j] = activation(units[e][j]);
  }
  // The outputs' share of the last hidden units j to j + 3.
  const auto add_outputs = [&](int j, const auto& hidden) {
    float w_direction[4], w_magnitude[4];
    load_weights(network + at.direction + j, w_direction);
    load_weights(network + at.magnitude + j, w_magnitude);
    LOPT_UNROLL
    for (int i = 0; i < 4; ++i) {
      float sum = 0.0f;
      LOPT_UNROLL
      for (int e = 0; e < E; ++e) {
        const float unit = hidden(e, i);
        direction[e] += unit * w_direction[i];
        magnitude[e] += unit * w_magnitude[i];
        sum += unit;
      }
      visit_hidden(j + i, sum);
    }
  };
  if (mlp.hidden_layers == 1) {
    LOPT_UNROLL
    for (int j = 0; j < H; j += 4) add_outputs(j, [&](int e, int i) { return units[e][j + i]; });
    return;
  }
  LOPT_NO_UNROLL
  for (int j = 0; j < H; j += 4) {
    float second[E][4], b[4];
    load_weights(network + at.b1 + j, b);
    LOPT_UNROLL
    for (int e = 0; e < E; ++e) LOPT_UNROLL
    for (int i = 0; i < 4; ++i) second[e][i] = b[i];
    LOPT_UNROLL
    for (int k = 0; k < H; ++k) {
      float w[4];
      load_weights(network + at.w1 + k * H + j, w);
      LOPT_UNROLL
      for (int e = 0; e < E; ++e) LOPT_UNROLL
      for (int i = 0; i < 4; ++i) second[e][i] += units[e][k] * w[i];
    }
    add_outputs(j, [&](int e, int i) { return activation(second[e][i]); });
  }
}

template <int H, int E, typename Block>
LOPT_DEVICE void apply(Block& block, float* shared, const OperationCall& call, const OperationRecord& r,
                       int32_t index) {
  const GpuMlp& mlp = call.mlp;
  const OperationTile t = tile_of(r, index);
  const GradientNumbers numbers = gradient_numbers(call, r);
  const ResultNumbers result = result_numbers(call, r);
  const NetworkLayout at_network = network_layout(mlp, H);
  float *const network = shared, *const hidden = shared + at_network.size;
  if (mlp.messages) clear_sums(block, hidden, H);
  block.each([&](int thread) {
    for (int32_t i = thread; i < at_network.size; i += kThreads) network[i] = global(r.network)[i];
  });
  block.sync();
  block.each([&](int thread) {
    over_tile<E>(thread, r, t, [&](int64_t at, int64_t row, int64_t column) {
      float g[E], p[E], units[E][H], row_units[H], direction[E], magnitude[E], step[E];
      load_gradient<E>(r, numbers, at, g);
      load<E>(r.param, Storage(r.storage), at, p);
      LOPT_UNROLL
      for (int j = 0; j < H; ++j) {
        const float b = network[at_network.b0 + j];
        row_units[j] = E == 1 ? 0.0f : b;
        LOPT_UNROLL
        for (int e = 0; e < E; ++e) units[e][j] = E == 1 ? b : 0.0f;
      }
      visit_columns<E, true>(
          call, r, t.group, at, row, column, g, p,
          [&](int32_t i, const float (&x)[E]) { add_products(network + i * H, x, units); },
          [&](int32_t i, float x) { add_products(network + i * H, x, E == 1 ? units[0] : row_units); });
      LOPT_UNROLL
      for (int j = 0; j < H; ++j) LOPT_UNROLL
      for (int e = 0; e < E; ++e) units[e][j] += E == 1 ? 0.0f : row_units[j];
      const auto add_hidden = [&](int j, float sum) {
        if (mlp.messages) sum_of(hidden, j, thread) += sum;
      };
      network_outputs<H, E>(mlp, network, units, add_hidden, direction, magnitude);
      LOPT_UNROLL
      for (int e = 0; e < E; ++e) step[e] = direction[e] * exp2_of(magnitude[e]);
      store_result<E>(r, call.output, result, at, p, step);
    });
  });
  if (!mlp.messages) return;
  const int64_t tiles = tiles_of(r);
  add_threads(block, hidden, H, [&](int32_t j, float sum) { r.tile_sums[j * tiles + index] = sum; });
}
template <int H, typename Block>
LOPT_DEVICE void apply(Block& block, float* shared, const OperationLaunch& launch, Item item) {
  if (stopped(launch.call)) return;
  const OperationRecord& r = launch.records[item.record];
  constexpr int E = H <= 4 ? 4 : H <= 8 ? 2 : 1;  // as many as leave the units of a layer in registers
  if (E > 1 && r.vector)
    apply<H, E>(block, shared, launch.call, r, item.index);
  else
    apply<H, 1>(block, shared, launch.call, r, item.index);
}

// Messages are means of outputs: the last layer of the mean of its inputs.
template <typename Block>
LOPT_DEVICE void messages(Block& block, float* shared, const OperationLaunch& launch, Item item) {
  const OperationCall& call = launch.call;
  const OperationRecord& r = launch.records[item.record];
  const GpuMlp& mlp = call.mlp;
  float* const mean = shared + mlp.units * kThreads;
  add_tiles(block, r, shared, mlp.units, [&](int32_t j, float sum) { mean[j] = sum / float(r.n); });
  const GpuMlpLayer& last = mlp.layer[mlp.hidden_layers];
  const float *w = weights_of(last, r), *b = biases_of(last, r);
  block.each([&](int thread) {
    for (int32_t i = thread; i < mlp.messages; i += kThreads) {
      float sum = b[2 + i];
      for (int32_t j = 0; j < mlp.hidden_size; ++j) sum += mean[j] * w[j * last.outputs + 2 + i];
      results_of(call, r, mlp.messages)[i] = sum;
    }
  });
}

// Floats of shared memory that a phase needs.
LOPT_HOST_DEVICE int64_t mlp_shared(OperationPhase phase, const OperationCall& call) {
  const GpuMlp& mlp = call.mlp;
  switch (phase) {
    case OperationPhase::factor_sums:
      return int64_t(sizeof(FactorShared) / sizeof(float));
    case OperationPhase::row_scales:
      return int64_t(call.factored_moments) * kThreads;
    case OperationPhase::column_sums:
      return int64_t(mlp.columns + 1) * kThreads;
    case OperationPhase::fold:
      return int64_t(mlp.columns + 1) * (kThreads + 1);  // scales behind the sums
    case OperationPhase::apply:
      return network_layout(mlp, mlp.units).size + (mlp.messages ? mlp.units * kThreads : 0);
    case OperationPhase::messages:
      return int64_t(mlp.units) * (kThreads + 1);  // means behind the sums
    default:
      return 0;
  }
}

}  // namespace lopt
