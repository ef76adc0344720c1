// Factors of the second moment from factored accumulators, and numbers of vectors along an axis. Included by
// sources that are compiled once for each instruction set; everything is internal to them.
#pragma once

#include "kernels/common/constants.h"
#include "kernels/common/simd.h"

namespace lopt {
namespace {

template <typename T>
LOPT_INLINE T factor_of(T x) {
  const T floored = x < T(kFactorFloor) ? T(kFactorFloor) : x;  // keeps NaN
  return T(1) / std::sqrt(floored);
}

// R: row / (mean of row over its axis + ...), the accumulator seen as [outer, axis, inner].
template <typename T>
void row_factor(const T* a, int64_t outer, int64_t axis, int64_t inner, T* factor) {
  for (int64_t b = 0; b < outer; ++b)
    for (int64_t e = 0; e < inner; ++e) {
      const T* in = a + b * axis * inner + e;
      T* out = factor + b * axis * inner + e;
      double total = 0;
      for (int64_t i = 0; i < axis; ++i) total += double(in[i * inner]);
      const T mean = T(total / double(axis)) + T(kRowMeanEpsilon);
      for (int64_t i = 0; i < axis; ++i) out[i * inner] = factor_of(in[i * inner] / mean);
    }
}

template <typename T>
double mean_square(const T* a, int64_t n) {
  using V = Vec<T>;
  constexpr int W = kLanes<T>;
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += 4096) {
    const int64_t end = begin + 4096 < n ? begin + 4096 : n;
    V part = {};
    int64_t i = begin;
    for (; i + W <= end; i += W) part += load(a + i) * load(a + i);
    if (i < end) {
      const V x = load_n(a + i, end - i);
      part += x * x;
    }
    total += double(sum<T>(part));
  }
  return total / double(n);
}

// out[i] = 1 / sqrt(a[i] + epsilon)
template <typename T>
void inverse_roots(const T* a, int64_t n, T epsilon, T* out) {
  constexpr int W = kLanes<T>;
  int64_t i = 0;
  for (; i + W <= n; i += W) store(out + i, rsqrt<T>(load(a + i) + epsilon));
  if (i < n) store_n(out + i, rsqrt<T>(load_n(a + i, n - i) + epsilon), n - i);
}

}  // namespace
}  // namespace lopt
