// statistics on GPUs: a block of kThreads threads for each tile, then one for each tensor
// (kernels/common/gpu_operations.h). Means and squared distances are merged by the pairwise formula of Chan,
// Golub and LeVeque 1979, without differences of large numbers: of a thread's elements, threads, tiles.
#pragma once

#include <cmath>

#include "kernels/common/gpu_operations.h"

namespace lopt {

// Of some numbers: how many, their mean, and the sum of their squared distances from it.
struct GpuSpread {
  float count, mean, squares;
};

// Means are weighted rather than moved by a difference: infinite ones stay infinite.
LOPT_DEVICE GpuSpread merged(const GpuSpread& a, const GpuSpread& b) {
  if (a.count == 0.0f) return b;
  if (b.count == 0.0f) return a;
  const float count = a.count + b.count, distance = b.mean - a.mean;
  return {count, a.mean * (a.count / count) + b.mean * (b.count / count),
          a.squares + b.squares + distance * distance * (a.count / count * b.count)};
}

// Quantities in this order: parameter, gradient, its absolute value, momenta, second moments.
LOPT_HOST_DEVICE int32_t quantities_of(const OperationCall& call) {
  return 3 + call.momenta + call.second_moments;
}
// Numbers of a tensor's result: of the absolute gradient there is no variance.
LOPT_HOST_DEVICE int32_t statistics_size(const OperationCall& call) { return 2 * quantities_of(call) - 1; }

// Of each thread in shared memory: (quantities, kThreads) means, the same of squares, (kThreads) counts.
struct ThreadSpreads {
  float *means, *squares, *counts;

  LOPT_DEVICE GpuSpread get(int32_t quantity, int thread) const {
    return {counts[thread], sum_of(means, quantity, thread), sum_of(squares, quantity, thread)};
  }
  LOPT_DEVICE void set(int32_t quantity, int thread, const GpuSpread& spread) const {
    sum_of(means, quantity, thread) = spread.mean;
    sum_of(squares, quantity, thread) = spread.squares;
  }
};
LOPT_DEVICE ThreadSpreads thread_spreads(float* shared, const OperationCall& call) {
  const int32_t size = quantities_of(call) * kThreads;
  return {shared, shared + size, shared + 2 * size};
}
LOPT_HOST_DEVICE int64_t statistics_shared(const OperationCall& call) {
  return int64_t(2 * quantities_of(call) + 1) * kThreads;
}

// Merges all threads into the first, halves by halves.
template <typename Block>
LOPT_DEVICE void merge_threads(Block& block, const ThreadSpreads& spreads, int32_t quantities) {
  for (int half = kThreads / 2; half > 0; half /= 2) {
    block.sync();
    block.each([&](int thread) {
      if (thread >= half) return;
      for (int32_t q = 0; q < quantities; ++q)
        spreads.set(q, thread, merged(spreads.get(q, thread), spreads.get(q, thread + half)));
      spreads.counts[thread] += spreads.counts[thread + half];
    });
  }
  block.sync();
}

template <int E>
LOPT_DEVICE GpuSpread spread_of(const float (&x)[E]) {
  GpuSpread spread = {float(E), 0.0f, 0.0f};
  LOPT_UNROLL
  for (int e = 0; e < E; ++e) spread.mean += x[e] * (1.0f / E);
  LOPT_UNROLL
  for (int e = 0; e < E; ++e) spread.squares += (x[e] - spread.mean) * (x[e] - spread.mean);
  return spread;
}

template <int E, typename Block>
LOPT_DEVICE void spreads_of_tile(Block& block, float* shared, const OperationCall& call,
                                 const OperationRecord& r, int32_t index) {
  const OperationTile t = tile_of(r, index);
  const GradientNumbers numbers = gradient_numbers(call, r);
  const ThreadSpreads spreads = thread_spreads(shared, call);
  const int32_t quantities = quantities_of(call);
  block.each([&](int thread) {
    spreads.counts[thread] = 0.0f;
    for (int32_t q = 0; q < quantities; ++q) spreads.set(q, thread, {0.0f, 0.0f, 0.0f});
    const auto add = [&](int32_t q, const float (&x)[E]) {
      spreads.set(q, thread, merged(spreads.get(q, thread), spread_of(x)));
    };
    over_tile<E>(thread, r, t, [&](int64_t at, int64_t, int64_t) {
      float g[E], x[E];
      load<E>(r.param, Storage(r.storage), at, x);
      add(0, x);
      load_gradient<E>(r, numbers, at, g);
      add(1, g);
      LOPT_UNROLL
      for (int e = 0; e < E; ++e) x[e] = std::fabs(g[e]);
      add(2, x);
      for (int32_t k = 0; k < call.momenta; ++k) {
        const float* array = r.momentum + k * r.momentum_stride;
        if (call.moved)
          load_moved<E>(array, at, numbers_of(call, r)[k], g, x);
        else
          load<E>(array, Storage::float32, at, x);
        add(3 + k, x);
      }
      LOPT_UNROLL
      for (int e = 0; e < E; ++e) g[e] *= g[e];
      for (int32_t k = 0; k < call.second_moments; ++k) {
        const float* array = r.second_moment + k * r.second_moment_stride;
        if (call.moved)
          load_moved<E>(array, at, numbers_of(call, r)[call.momenta + k], g, x);
        else
          load<E>(array, Storage::float32, at, x);
        add(3 + call.momenta + k, x);
      }
      spreads.counts[thread] += float(E);
    });
  });
  merge_threads(block, spreads, quantities);
  block.each([&](int thread) {
    if (thread >= quantities) return;
    const int64_t tiles = tiles_of(r);
    const GpuSpread spread = spreads.get(thread, 0);
    r.tile_sums[(2 * thread) * tiles + index] = spread.mean;
    r.tile_sums[(2 * thread + 1) * tiles + index] = spread.squares;
  });
}
template <typename Block>
LOPT_DEVICE void spreads(Block& block, float* shared, const OperationLaunch& launch, Item item) {
  const OperationRecord& r = launch.records[item.record];
  if (r.vector)
    spreads_of_tile<4>(block, shared, launch.call, r, item.index);
  else
    spreads_of_tile<1>(block, shared, launch.call, r, item.index);
}

// results: of a tensor, mean and variance of parameter and gradient, mean of the absolute gradient, means and
// then variances of momenta, the same of second moments.
template <typename Block>
LOPT_DEVICE void merge(Block& block, float* shared, const OperationLaunch& launch, Item item) {
  const OperationCall& call = launch.call;
  const OperationRecord& r = launch.records[item.record];
  const ThreadSpreads spreads = thread_spreads(shared, call);
  const int32_t quantities = quantities_of(call);
  const int64_t tiles = tiles_of(r);
  block.each([&](int thread) {
    float count = 0.0f;
    for (int32_t q = 0; q < quantities; ++q) {
      GpuSpread spread = {0.0f, 0.0f, 0.0f};
      for (int64_t tile = thread; tile < tiles; tile += kThreads)
        spread = merged(spread, {float(tile_of(r, int32_t(tile)).columns), r.tile_sums[2 * q * tiles + tile],
                                 r.tile_sums[(2 * q + 1) * tiles + tile]});
      spreads.set(q, thread, spread);
      count = spread.count;
    }
    spreads.counts[thread] = count;
  });
  merge_threads(block, spreads, quantities);
  block.each([&](int thread) {
    if (thread >= quantities) return;
    const GpuSpread spread = spreads.get(thread, 0);
    const float variance = spread.squares / spread.count;
    float* const to = results_of(call, r, statistics_size(call));
    if (thread < 3) {
      to[2 * thread] = spread.count > 0.0f ? spread.mean : variance;  // nothing: NaN
      if (thread < 2) to[2 * thread + 1] = variance;
    } else {
      const bool second = thread >= 3 + call.momenta;
      const int32_t count = second ? call.second_moments : call.momenta;
      float* const means = to + 5 + (second ? 2 * call.momenta : 0);
      const int32_t k = thread - 3 - (second ? call.momenta : 0);
      means[k] = spread.count > 0.0f ? spread.mean : variance;
      means[count + k] = variance;
    }
  });
}

}  // namespace lopt
