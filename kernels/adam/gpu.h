// adam on GPUs: one pass, a block of kThreads threads for each tile (kernels/common/gpu_operations.h).
#pragma once

#include <cmath>

#include "kernels/common/gpu_operations.h"

namespace lopt {

// As lopt_fast.operations.AdamScalars, of one tensor.
struct GpuAdamScalars {
  float beta1, beta2, scale, momentum_factor, gradient_factor, v_factor, epsilon, root_epsilon, l2;
};

template <int E, typename Block>
LOPT_DEVICE void adam_tile(Block& block, const OperationCall& call, const OperationRecord& r, int32_t index) {
  const OperationTile t = tile_of(r, index);
  const GradientNumbers numbers = gradient_numbers(call, r);
  const ResultNumbers result = result_numbers(call, r);
  const GpuAdamScalars s = reinterpret_cast<const GpuAdamScalars*>(own_numbers(call, r))[r.tensor];
  block.each([&](int thread) {
    over_tile<E>(thread, r, t, [&](int64_t at, int64_t, int64_t) {
      float g[E], p[E], m[E], v[E], step[E];
      load_gradient<E>(r, numbers, at, g);
      load<E>(r.param, Storage(r.storage), at, p);
      load<E>(r.momentum, Storage::float32, at, m);
      load<E>(r.second_moment, Storage::float32, at, v);
      LOPT_UNROLL
      for (int e = 0; e < E; ++e) {
        g[e] += s.l2 * p[e];
        m[e] = s.beta1 * m[e] + (1.0f - s.beta1) * g[e];
        v[e] = s.beta2 * v[e] + (1.0f - s.beta2) * g[e] * g[e];
        const float numerator = s.momentum_factor * m[e] + s.gradient_factor * g[e];
        step[e] = s.scale * numerator / (s.epsilon + std::sqrt(s.v_factor * v[e] + s.root_epsilon));
      }
      store<E>(r.momentum, Storage::float32, at, m);
      store<E>(r.second_moment, Storage::float32, at, v);
      store_result<E>(r, call.output, result, at, p, step);
    });
  });
}

template <typename Block>
LOPT_DEVICE void adam(Block& block, const OperationLaunch& launch, Item item) {
  if (stopped(launch.call)) return;
  const OperationRecord& r = launch.records[item.record];
  if (r.vector)
    adam_tile<4>(block, launch.call, r, item.index);
  else
    adam_tile<1>(block, launch.call, r, item.index);
}

}  // namespace lopt
