// The elements of an `Operand` by blocks of whole vectors. Included by sources that are compiled once for
// each instruction set; everything is internal to them.
#pragma once

#include "kernels/common/operands.h"
#include "kernels/common/simd.h"

namespace lopt {
namespace {

// Elements of a block: a row of 512 bytes. Rows of a block's arrays are a cache line further apart, so that
// no two of them begin at the same place of a page.
template <typename T>
constexpr int64_t kBlock = 512 / int64_t(sizeof(T));
template <typename T>
constexpr int64_t kRowStride = kBlock<T> + 64 / int64_t(sizeof(T));

// Exponential moving average with d = 1 - decay: two products, so that x is not lost where d is near 1.
template <typename V, typename D>
LOPT_INLINE V average(V a, D d, V x) {
  return (a - d * a) + d * x;
}

// Where the elements of a block lie.
template <typename T>
struct Streams {
  const T *p, *g;
  T* out;
  T *m[kMostAverages], *v[kMostAverages], *d[kMostAverages];
};

template <typename T>
LOPT_INLINE Streams<T> streams_at(const Operand<T>& t, int64_t start) {
  Streams<T> s;
  s.p = t.param + start;
  s.g = t.grad + start;
  s.out = t.output ? t.output + start : nullptr;
  for (int k = 0; k < t.momenta; ++k) s.m[k] = t.momentum + k * t.momentum_stride + start;
  for (int k = 0; k < t.second_moments; ++k) s.v[k] = t.second_moment + k * t.second_moment_stride + start;
  for (int k = 0; k < t.diagonals; ++k) s.d[k] = t.diagonal + k * t.diagonal_stride + start;
  return s;
}

// Copies of the elements of a block that are not whole vectors, with zeros behind.
template <typename T>
struct Padded {
  T rows[3 * kMostAverages + 3][kBlock<T>];

  // Calls f(pointer of `t`, its copy) for each array of a block that is read, and written where it is an
  // average.
  template <typename F>
  LOPT_INLINE void each(const Operand<T>& t, Streams<T>& s, F f) {
    T(*row)[kBlock<T>] = rows;
    for (int k = 0; k < t.momenta; ++k) f(s.m[k], *row++);
    for (int k = 0; k < t.second_moments; ++k) f(s.v[k], *row++);
    for (int k = 0; k < t.diagonals; ++k) f(s.d[k], *row++);
  }
  static LOPT_INLINE void copy(T* to, const T* from, int64_t n) {
    __builtin_memset(to, 0, sizeof(rows[0]));
    __builtin_memcpy(to, from, size_t(n) * sizeof(T));
  }

  __attribute__((noinline)) Streams<T> read(const Operand<T>& t, Streams<T> s, int64_t n) {
    each(t, s, [&](T*& from, T* row) {
      copy(row, from, n);
      from = row;
    });
    T(*others)[kBlock<T>] = rows + 3 * kMostAverages;
    copy(others[0], s.p, n);
    copy(others[1], s.g, n);
    s.p = others[0], s.g = others[1];
    if (s.out) s.out = others[2];
    return s;
  }
  __attribute__((noinline)) void write(const Operand<T>& t, Streams<T> s, int64_t n) {
    if (s.out) __builtin_memcpy(s.out, rows[3 * kMostAverages + 2], size_t(n) * sizeof(T));
    each(t, s, [&](T* to, T* row) { __builtin_memcpy(to, row, size_t(n) * sizeof(T)); });
  }
};

// Calls f(streams, start, n, padded) for blocks of n elements from `begin` to `end`; f may read and write up
// to `padded` of them, whole vectors.
template <bool Write, typename T, typename F>
LOPT_INLINE void for_each_block(const Operand<T>& t, int64_t begin, int64_t end, F f) {
  constexpr int W = kLanes<T>;
  Padded<T> padded;
  for (int64_t start = begin; start < end; start += kBlock<T>) {
    const int64_t n = end - start < kBlock<T> ? end - start : kBlock<T>;
    const Streams<T> streams = streams_at(t, start);
    const bool whole = n % W == 0;
    f(whole ? streams : padded.read(t, streams, n), start, n, (n + W - 1) / W * W);
    if (Write && !whole) padded.write(t, streams, n);
  }
}

template <typename T>
LOPT_INLINE Vec<T> clipped(Vec<T> x, Vec<T> bound) {
  return at_most<T>(bound, at_least<T>(-bound, x));
}

// Stores the result of vector i of a block whose steps, times the learning rate, are x.
template <typename T>
LOPT_INLINE void store_result(const Operand<T>& t, const Streams<T>& s, int64_t i, Vec<T> x) {
  if (t.result != Output::step) {
    const Vec<T> p = load(s.p + i);
    x = (t.result == Output::parameter ? p : Vec<T>{}) - (x + t.decay * p);
  }
  store<T>(s.out + i, x);
}

// The root, correctly rounded.
template <typename T>
LOPT_INLINE Vec<T> root(Vec<T> x) {
  Vec<T> y;
  for (int i = 0; i < kLanes<T>; ++i) y[i] = std::sqrt(x[i]);
  return y;
}
#if defined(__AVX512F__)
template <>
LOPT_INLINE Vec<float> root<float>(Vec<float> x) {
  return (Vec<float>)_mm512_sqrt_ps((__m512)x);
}
template <>
LOPT_INLINE Vec<double> root<double>(Vec<double> x) {
  return (Vec<double>)_mm512_sqrt_pd((__m512d)x);
}
#elif defined(__AVX2__)
template <>
LOPT_INLINE Vec<float> root<float>(Vec<float> x) {
  return (Vec<float>)_mm256_sqrt_ps((__m256)x);
}
template <>
LOPT_INLINE Vec<double> root<double>(Vec<double> x) {
  return (Vec<double>)_mm256_sqrt_pd((__m256d)x);
}
#elif defined(__SSE2__)
template <>
LOPT_INLINE Vec<float> root<float>(Vec<float> x) {
  return (Vec<float>)_mm_sqrt_ps((__m128)x);
}
template <>
LOPT_INLINE Vec<double> root<double>(Vec<double> x) {
  return (Vec<double>)_mm_sqrt_pd((__m128d)x);
}
#endif

}  // namespace
}  // namespace lopt
