// statistics on processors with SIMD units: see README.md. Compiled once for each instruction set.
#include "kernels/common/blocks.h"
#include "kernels/statistics/kernel.h"

namespace lopt {
namespace {

// Spread of the n numbers of a row, zeros behind them up to a whole vector: first the mean, then the
// distances from it, whose sum corrects both. The row lies in the first-level cache.
template <typename T>
LOPT_INLINE Spread row_spread(const T* row, int64_t n) {
  using V = Vec<T>;
  constexpr int W = kLanes<T>;
  V a = {}, b = {};
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W) a += load(row + i), b += load(row + i + W);
  for (; i < n; i += W) a += load(row + i);
  const T center = T(double(sum<T>(a + b)) / double(n));
  V squares = a = b = V{};
  V others = {};
  for (i = 0; i + 2 * W <= n; i += 2 * W) {
    const V x = load(row + i) - center, y = load(row + i + W) - center;
    a += x, b += y;
    squares += x * x, others += y * y;
  }
  for (; i < n; i += W) {
    const V x = i + W <= n ? load(row + i) - center : first_lanes<T>(load(row + i) - center, n - i);
    a += x;
    squares += x * x;
  }
  const double distance = double(sum<T>(a + b)), total = double(sum<T>(squares + others));
  if (!(total - total == 0)) return {double(center), total};  // not finite
  const double about_mean = total - distance * distance / double(n);
  return {double(center) + distance / double(n), about_mean > 0 ? about_mean : 0.0};
}

template <typename T>
LOPT_INLINE double abs_sum_of(const T* row, int64_t n) {
  Vec<T> total = {};
  for (int64_t i = 0; i < n; i += kLanes<T>) {
    const Vec<T> x = load(row + i);
    total += at_least<T>(x, -x);
  }
  return double(sum<T>(total));
}

template <typename T>
void spreads(const Operand<T>& t, bool moved, int64_t begin, int64_t end, Spread* spreads, double* abs_sum) {
  using V = Vec<T>;
  constexpr int W = kLanes<T>;
  alignas(64) T row[kBlock<T>], g[kBlock<T>];
  const int quantities = 2 + t.momenta + t.second_moments;
  for (int q = 0; q < quantities; ++q) spreads[q] = {0, 0};
  *abs_sum = 0;
  for_each_block<false>(t, begin, end, [&](const Streams<T>& s, int64_t start, int64_t n, int64_t padded) {
    const auto add = [&](int q, const T* values) __attribute__((always_inline)) {
      merge(spreads[q], double(start - begin), row_spread(values, n), double(n));
    };
    add(0, s.p);
    for (int64_t i = 0; i < padded; i += W)
      store<T>(g + i, clipped<T>(load(s.g + i) * t.grad_scale, splat(t.grad_bound)));
    add(1, g);
    *abs_sum += abs_sum_of(g, padded);
    for (int k = 0; k < t.momenta; ++k) {
      if (!moved) {
        add(2 + k, s.m[k]);
        continue;
      }
      for (int64_t i = 0; i < padded; i += W)
        store<T>(row + i, average(load(s.m[k] + i), t.d_momentum[k], load(g + i)));
      add(2 + k, row);
    }
    for (int k = 0; k < t.second_moments; ++k) {
      if (!moved) {
        add(2 + t.momenta + k, s.v[k]);
        continue;
      }
      for (int64_t i = 0; i < padded; i += W) {
        const V x = load(g + i);
        store<T>(row + i, average(load(s.v[k] + i), t.d_second_moment[k], x * x));
      }
      add(2 + t.momenta + k, row);
    }
  });
}

}  // namespace

namespace LOPT_ISA {
const StatisticsKernels& statistics() {
  static constexpr StatisticsKernels kernels = {{spreads<float>}, {spreads<double>}};
  return kernels;
}
}  // namespace LOPT_ISA
}  // namespace lopt
