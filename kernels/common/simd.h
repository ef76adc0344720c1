// One vector type per scalar type and the few operations that the language does not have. Included by a
// source that is compiled once for each instruction set; everything is internal to that source, so that the
// linker can never swap one set's function for another's.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace lopt {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

#define LOPT_INLINE inline __attribute__((always_inline))

template <typename T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
  typedef float unaligned __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
  typedef int32_t integer;
  typedef int32_t index __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
  typedef double unaligned __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
  typedef int64_t integer;
  typedef int64_t index __attribute__((vector_size(kVectorBytes)));
};

template <typename T>
using Vec = typename VectorOf<T>::type;
template <typename T>
constexpr int kLanes = kVectorBytes / int(sizeof(T));

template <typename T>
LOPT_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename VectorOf<T>::unaligned*>(p);
}
template <typename T>
LOPT_INLINE void store(T* p, Vec<T> x) {
  *reinterpret_cast<typename VectorOf<T>::unaligned*>(p) = x;
}
template <typename T>
LOPT_INLINE Vec<T> splat(T x) {
  return x - Vec<T>{};  // x - 0 is x for every x, so this is a broadcast; 0 + x would add
}

// The first n lanes from memory, zeros behind; never touches what lies behind.
template <typename T>
LOPT_INLINE Vec<T> load_n(const T* p, int64_t n) {
  Vec<T> x = {};
  __builtin_memcpy(&x, p, size_t(n) * sizeof(T));
  return x;
}
template <typename T>
LOPT_INLINE void store_n(T* p, Vec<T> x, int64_t n) {
  __builtin_memcpy(p, &x, size_t(n) * sizeof(T));
}
#if defined(__AVX512F__)
template <>
LOPT_INLINE Vec<float> load_n<float>(const float* p, int64_t n) {
  return (Vec<float>)_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p);
}
template <>
LOPT_INLINE void store_n<float>(float* p, Vec<float> x, int64_t n) {
  _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), (__m512)x);
}
#elif defined(__AVX2__)
// Read from memory: masks that are computed are kept in registers that the loops before a tail need.
constexpr int32_t kLaneMasks[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
LOPT_INLINE __m256i lanes_below(int64_t n) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kLaneMasks + 8 - n));
}
template <>
LOPT_INLINE Vec<float> load_n<float>(const float* p, int64_t n) {
  return (Vec<float>)_mm256_maskload_ps(p, lanes_below(n));
}
template <>
LOPT_INLINE void store_n<float>(float* p, Vec<float> x, int64_t n) {
  _mm256_maskstore_ps(p, lanes_below(n), (__m256)x);
}
#endif

// x in the first n lanes, zeros behind.
template <typename T>
LOPT_INLINE Vec<T> first_lanes(Vec<T> x, int64_t n) {
  typename VectorOf<T>::index lane;
  for (int i = 0; i < kLanes<T>; ++i) lane[i] = i;
  return lane < typename VectorOf<T>::integer(n) ? x : Vec<T>{};
}

// Sum of the lanes, in a fixed order: halves are added until one lane is left.
template <typename T>
LOPT_INLINE T sum(Vec<T> x) {
  T lanes[kLanes<T>];
  store(lanes, x);
  for (int width = kLanes<T> / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

// max(low, x), min(high, x): NaN in x stays; NaN in the bound becomes x.
template <typename T>
LOPT_INLINE Vec<T> at_least(Vec<T> low, Vec<T> x) {
  return x < low ? low : x;
}
template <typename T>
LOPT_INLINE Vec<T> at_most(Vec<T> high, Vec<T> x) {
  return x > high ? high : x;
}
#if defined(__AVX512F__)
template <>
LOPT_INLINE Vec<float> at_least<float>(Vec<float> low, Vec<float> x) {
  return (Vec<float>)_mm512_max_ps((__m512)low, (__m512)x);
}
template <>
LOPT_INLINE Vec<float> at_most<float>(Vec<float> high, Vec<float> x) {
  return (Vec<float>)_mm512_min_ps((__m512)high, (__m512)x);
}
#elif defined(__AVX2__)
template <>
LOPT_INLINE Vec<float> at_least<float>(Vec<float> low, Vec<float> x) {
  return (Vec<float>)_mm256_max_ps((__m256)low, (__m256)x);
}
template <>
LOPT_INLINE Vec<float> at_most<float>(Vec<float> high, Vec<float> x) {
  return (Vec<float>)_mm256_min_ps((__m256)high, (__m256)x);
}
#elif defined(__SSE2__)
template <>
LOPT_INLINE Vec<float> at_least<float>(Vec<float> low, Vec<float> x) {
  return (Vec<float>)_mm_max_ps((__m128)low, (__m128)x);
}
template <>
LOPT_INLINE Vec<float> at_most<float>(Vec<float> high, Vec<float> x) {
  return (Vec<float>)_mm_min_ps((__m128)high, (__m128)x);
}
#endif
template <typename T>
LOPT_INLINE Vec<T> relu(Vec<T> x) {
  return at_least<T>(Vec<T>{}, x);
}

// 1 / sqrt(x) for x > 0, 0 for infinity. float: the processor's estimate and one Newton step, relative error
// below 3e-7 (23 bits); double: correctly rounded root and quotient.
template <typename T>
LOPT_INLINE Vec<T> rsqrt(Vec<T> x) {
  Vec<T> y;
  for (int i = 0; i < kLanes<T>; ++i) y[i] = T(1) / std::sqrt(x[i]);
  return y;
}
#if defined(__SSE2__)
template <>
LOPT_INLINE Vec<float> rsqrt<float>(Vec<float> x) {
#if defined(__AVX512F__)
  Vec<float> y = (Vec<float>)_mm512_rsqrt14_ps((__m512)x);
#elif defined(__AVX2__)
  Vec<float> y = (Vec<float>)_mm256_rsqrt_ps((__m256)x);
#else
  Vec<float> y = (Vec<float>)_mm_rsqrt_ps((__m128)x);
#endif
  // Infinity: y is 0 and 1 - infinity * 0 not a number, of which at_least makes -1.
  const Vec<float> error = at_least<float>(1.0f - (x * y) * y, splat(-1.0f));
  return y + (0.5f * y) * error;
}
#endif

// 1 / x for x > 0, 0 for infinity. float: the processor's estimate and one Newton step, relative error below
// 3e-7.
template <typename T>
LOPT_INLINE Vec<T> reciprocal(Vec<T> x) {
  return T(1) / x;
}
#if defined(__SSE2__)
template <>
LOPT_INLINE Vec<float> reciprocal<float>(Vec<float> x) {
#if defined(__AVX512F__)
  const Vec<float> y = (Vec<float>)_mm512_rcp14_ps((__m512)x);
#elif defined(__AVX2__)
  const Vec<float> y = (Vec<float>)_mm256_rcp_ps((__m256)x);
#else
  const Vec<float> y = (Vec<float>)_mm_rcp_ps((__m128)x);
#endif
  return y + y * at_least<float>(1.0f - x * y, splat(-1.0f));  // as in rsqrt
}
#endif

// 2^x. float: relative error below 3e-7, infinity above the range, 2^-126 below it (with AVX-512 down to 0).
LOPT_INLINE Vec<double> exp2(Vec<double> x) {
  Vec<double> y;
  for (int i = 0; i < kLanes<double>; ++i) y[i] = std::exp2(x[i]);
  return y;
}
LOPT_INLINE Vec<float> exp2(Vec<float> x) {
#if defined(__AVX512F__)
  const Vec<float> whole =
      (Vec<float>)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  x = at_least<float>(splat(-126.0f), at_most<float>(splat(128.0f), x));
  const Vec<float> magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec<float> shifted = x + magic, whole = shifted - magic;
#endif
  const Vec<float> r = x - whole;  // exact, in [-0.5, 0.5]
  // Minimax polynomial of 2^r on that interval, relative error 2e-7 with rounding.
  // In pairs: a product more than one after the other, and half as long a chain.
  const Vec<float> r2 = r * r, low = 6.931468559e-01f * r + 1.0f,
                   middle = 5.550892952e-02f * r + 2.402223800e-01f,
                   high = 1.321867248e-03f * r + 9.671697938e-03f;
  const Vec<float> y = (high * r2 + middle) * r2 + low;
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_scalef_ps((__m512)y, (__m512)whole);
#else
  // The integer stands in the lowest bits of `shifted`; moved up, it is added to the exponent: 1.0 and 128
  // give infinity. A NaN may become another value here, so a caller multiplies by what is NaN with it.
  typedef int32_t Int __attribute__((vector_size(kVectorBytes)));
  return (Vec<float>)((Int)y + ((Int)shifted << 23));
#endif
}

}  // namespace
}  // namespace lopt
