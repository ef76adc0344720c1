// bfloat16 and float16 in memory, float in the arithmetic. Included, as simd.h, by sources that are compiled
// once for each instruction set.
#pragma once

#include "csrc/core.h"
#include "kernels/common/simd.h"

namespace lopt {
namespace {

LOPT_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}
LOPT_INLINE float float_of(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

// To nearest even; NaN stays NaN, what is beyond the range becomes infinity. Without branches, for the
// compiler to make vectors of.
LOPT_INLINE float from_bfloat16(uint16_t x) { return float_of(uint32_t(x) << 16); }
LOPT_INLINE uint16_t to_bfloat16(float x) {
  const uint32_t bits = bits_of(x), rounded = bits + 0x7fffu + ((bits >> 16) & 1);
  return uint16_t(((bits & 0x7fffffffu) > 0x7f800000u ? bits | 0x400000u : rounded) >> 16);
}

#if defined(__F16C__)
LOPT_INLINE float from_float16(uint16_t x) { return _cvtsh_ss(x); }
LOPT_INLINE uint16_t to_float16(float x) { return uint16_t(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT)); }
#else
// Subnormal numbers by an addition that aligns their bits, as no subnormal float may take part: the processor
// may be set to make zeros of them.
LOPT_INLINE float from_float16(uint16_t x) {
  const uint32_t magnitude = x & 0x7fffu, moved = magnitude << 13;
  const uint32_t small = bits_of(float_of(moved + 0x38800000u) - float_of(0x38800000u));  // - 2^-14
  const uint32_t normal = moved + (magnitude < 0x7c00u ? 0x38000000u : 0x70000000u);
  return float_of((magnitude < 0x400u ? small : normal) | uint32_t(x & 0x8000) << 16);
}
LOPT_INLINE uint16_t to_float16(float x) {
  const uint32_t bits = bits_of(x), magnitude = bits & 0x7fffffffu;
  const uint32_t small = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;  // in units of 2^-24
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1)) >> 13;
  const uint32_t finite = magnitude < 0x38800000u ? small : normal;
  const uint32_t beyond = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  return uint16_t((magnitude < 0x47800000u ? finite : beyond) | (bits >> 16 & 0x8000u));
}
#endif

// n elements of type `stored`, bfloat16 or float16.
LOPT_INLINE void widen(Dtype stored, const uint16_t* from, int64_t n, float* to) {
  int64_t i = 0;
  if (stored == Dtype::bfloat16) {
    for (; i < n; ++i) to[i] = from_bfloat16(from[i]);
    return;
  }
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
#endif
  for (; i < n; ++i) to[i] = from_float16(from[i]);
}
LOPT_INLINE void narrow(Dtype stored, const float* from, int64_t n, uint16_t* to) {
  int64_t i = 0;
  if (stored == Dtype::bfloat16) {
    for (; i < n; ++i) to[i] = to_bfloat16(from[i]);
    return;
  }
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
#endif
  for (; i < n; ++i) to[i] = to_float16(from[i]);
}

}  // namespace
}  // namespace lopt
