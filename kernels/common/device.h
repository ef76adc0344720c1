// What the GPU kernels are written in: the same source is compiled by nvcc for the device and by the host
// compiler for the emulator. Code in which several threads take part is written against a policy, Block or
// Warp: what happens between two synchronisations is a call of each().
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "csrc/gpu.h"

#if defined(__CUDACC__)
#define LOPT_DEVICE __device__ __forceinline__
#define LOPT_UNROLL _Pragma("unroll")
#define LOPT_NO_UNROLL _Pragma("unroll 1")
#else
#define LOPT_DEVICE inline
#define LOPT_UNROLL
#define LOPT_NO_UNROLL
#endif

namespace lopt {

constexpr int kThreads = 256;  // of a block
constexpr int kWarpLanes = 32;
constexpr int kWarps = kThreads / kWarpLanes;

// ---- arithmetic ----

LOPT_DEVICE uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
LOPT_DEVICE float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// max(low, x), min(high, x): NaN stays.
LOPT_DEVICE float at_least(float low, float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(low), "f"(x));
  return y;
#else
  return x < low ? low : x;
#endif
}
LOPT_DEVICE float at_most(float high, float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(high), "f"(x));
  return y;
#else
  return x > high ? high : x;
#endif
}
LOPT_DEVICE float relu(float x) { return at_least(0.0f, x); }

// 1 / sqrt(x) for normal x > 0, 0 for infinity; relative error below 2^-22.9 on the device (PTX ISA,
// rsqrt.approx.ftz.f32).
LOPT_DEVICE float inverse_root(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.0f / std::sqrt(x);
#endif
}

// 2^x, relative error about 2^-22 on the device (PTX ISA, ex2.approx.ftz.f32); results below 2^-126 are 0.
LOPT_DEVICE float exp2_of(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::exp2(x);
#endif
}

// Exponential moving average with d = 1 - decay: two fused operations, exact whatever d is.
LOPT_DEVICE float average(float a, float d, float x) { return (a - d * a) + d * x; }

// ---- storage types ----

// bfloat16 of the number with these bits and `added` to them; infinity and NaN stay what they are. Without
// branches: these would hold registers of several values at once.
LOPT_DEVICE uint16_t cut_to_bfloat16(uint32_t bits, uint32_t added) {
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t sum = bits + (magnitude < 0x7f800000u ? added : 0u);
  return uint16_t((magnitude > 0x7f800000u ? sum | 0x400000u : sum) >> 16);
}
LOPT_DEVICE uint16_t to_bfloat16(float x) {  // to nearest even
  const uint32_t bits = bits_of(x);
  return cut_to_bfloat16(bits, 0x7fffu + ((bits >> 16) & 1));
}
// Rounds up with the probability of what is cut off, given 16 random bits. State needs that: a second
// moment with decay 0.999 moves by about a thousandth a step, less than half of the last of bfloat16's eight
// bits, and would stand still if rounded to nearest.
LOPT_DEVICE uint16_t to_bfloat16(float x, uint32_t random16) { return cut_to_bfloat16(bits_of(x), random16); }
LOPT_DEVICE float from_bfloat16(uint16_t x) { return float_of(uint32_t(x) << 16); }

LOPT_DEVICE float from_float16(uint16_t x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
  return y;
#else
  const uint32_t sign = uint32_t(x & 0x8000) << 16, exponent = (x >> 10) & 31, mantissa = x & 1023;
  if (exponent == 31) return float_of(sign | 0x7f800000u | (mantissa << 13));
  if (exponent) return float_of(sign | ((exponent + 112) << 23) | (mantissa << 13));
  const float y = float(mantissa) * 5.9604644775390625e-8f;  // 2^-24
  return sign ? -y : y;
#endif
}
LOPT_DEVICE uint16_t to_float16(float x) {  // to nearest even
#if defined(__CUDA_ARCH__)
  uint16_t y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
#else
  const uint32_t bits = bits_of(x), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return uint16_t(sign | 0x7fff);
  if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00);  // 65520 and above
  if (magnitude < 0x38800000u)                                   // subnormal: units of 2^-24
    return uint16_t(sign | uint32_t(std::nearbyint(float_of(magnitude) * 16777216.0f)));
  return uint16_t(sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1)) >> 13));
#endif
}

// 32 random bits for element `at` in step `t`: a mixing of both (constants of the MurmurHash3 finaliser).
LOPT_DEVICE uint32_t random_bits(int64_t at, int64_t t) {
  uint32_t x = uint32_t(at) ^ (uint32_t(uint64_t(at) >> 32) * 0x9e3779b9u) ^ (uint32_t(t) * 0x85ebca77u);
  x = (x ^ (x >> 16)) * 0x85ebca6bu;
  x = (x ^ (x >> 13)) * 0xc2b2ae35u;
  return x ^ (x >> 16);
}

// Words that may lie on anything.
#if defined(__CUDACC__)
#define LOPT_MAY_ALIAS
#else
#define LOPT_MAY_ALIAS __attribute__((may_alias))
#endif
typedef uint32_t LOPT_MAY_ALIAS Word;
template <int Bytes>
struct alignas(Bytes) Packed {
  Word word[Bytes / 4];
};

// Writes all words to global memory in one instruction, to a multiple of their size. (As an assignment it may
// become one for each word.)
template <int Bytes>
LOPT_DEVICE void store_packed(void* to, const Packed<Bytes>& x) {
#if defined(__CUDA_ARCH__)
  const size_t at = __cvta_generic_to_global(to);
  if constexpr (Bytes == 16)
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(x.word[0]), "r"(x.word[1]),
                 "r"(x.word[2]), "r"(x.word[3])
                 : "memory");
  else if constexpr (Bytes == 8)
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(at), "r"(x.word[0]), "r"(x.word[1]) : "memory");
  else
    *static_cast<Packed<Bytes>*>(to) = x;
#else
  *static_cast<Packed<Bytes>*>(to) = x;
#endif
}

LOPT_DEVICE float from_half(uint16_t x, Storage storage) {
  return storage == Storage::bfloat16 ? from_bfloat16(x) : from_float16(x);
}
LOPT_DEVICE uint16_t to_half(float x, Storage storage) {
  return storage == Storage::bfloat16 ? to_bfloat16(x) : to_float16(x);
}

// The same pointer, known to be one to global memory: those that come from a table in shared memory are not.
template <typename T>
LOPT_DEVICE T* global(T* p) {
#if defined(__CUDA_ARCH__)
  __builtin_assume(__isGlobal(p));
#endif
  return p;
}

// E consecutive elements from `at` on; where E > 1 that lies on a multiple of their size. Global memory.
template <int E>
LOPT_DEVICE void load(const void* from, Storage storage, int64_t at, float (&x)[E]) {
  const auto* halves = static_cast<const uint16_t*>(global(from)) + at;
  const auto* floats = static_cast<const float*>(global(from)) + at;
  if constexpr (E == 1) {
    x[0] = storage == Storage::float32 ? *floats : from_half(*halves, storage);
  } else if (storage == Storage::float32) {
    const Packed<4 * E> packed = *reinterpret_cast<const Packed<4 * E>*>(floats);
    LOPT_UNROLL
    for (int i = 0; i < E; ++i) x[i] = float_of(packed.word[i]);
  } else {
    const Packed<2 * E> packed = *reinterpret_cast<const Packed<2 * E>*>(halves);
    LOPT_UNROLL
    for (int i = 0; i < E; ++i) x[i] = from_half(uint16_t(packed.word[i / 2] >> (16 * (i % 2))), storage);
  }
}

template <int E>
LOPT_DEVICE void store_floats(float* to, const float (&x)[E]) {
  if constexpr (E == 1) {
    *to = x[0];
  } else {
    Packed<4 * E> packed;
    LOPT_UNROLL
    for (int i = 0; i < E; ++i) packed.word[i] = bits_of(x[i]);
    store_packed(to, packed);
  }
}
template <int E>
LOPT_DEVICE void store_halves(uint16_t* to, const uint16_t (&half)[E]) {
  if constexpr (E == 1) {
    *to = half[0];
  } else {
    Packed<2 * E> packed;
    LOPT_UNROLL
    for (int i = 0; i < E / 2; ++i) packed.word[i] = uint32_t(half[2 * i]) | uint32_t(half[2 * i + 1]) << 16;
    store_packed(to, packed);
  }
}

template <int E>
LOPT_DEVICE void store(void* to, Storage storage, int64_t at, const float (&x)[E]) {
  if (storage == Storage::float32) return store_floats(static_cast<float*>(global(to)) + at, x);
  uint16_t half[E];
  LOPT_UNROLL
  for (int i = 0; i < E; ++i) half[i] = to_half(x[i], storage);
  store_halves(static_cast<uint16_t*>(global(to)) + at, half);
}

// State in bfloat16, rounded with the 16 bits of `random` from `shift` on.
template <int E>
LOPT_DEVICE void store_rounded(void* to, int64_t at, const float (&x)[E], const uint32_t (&random)[E],
                               int shift) {
  uint16_t half[E];
  LOPT_UNROLL
  for (int i = 0; i < E; ++i) half[i] = to_bfloat16(x[i], (random[i] >> shift) & 0xffffu);
  store_halves(static_cast<uint16_t*>(global(to)) + at, half);
}

LOPT_DEVICE double value_of(const void* from, ScalarType type) {
  switch (type) {
    case ScalarType::float32:
      return double(*static_cast<const float*>(from));
    case ScalarType::float64:
      return *static_cast<const double*>(from);
    case ScalarType::int32:
      return double(*static_cast<const int32_t*>(from));
    default:
      return double(*static_cast<const int64_t*>(from));
  }
}

// ---- policies ----

#if defined(__CUDACC__)

template <typename T>
struct OwnValue {
  T value;
  LOPT_DEVICE T& operator[](int) { return value; }
  LOPT_DEVICE const T& operator[](int) const { return value; }
};

struct DeviceWarp {
  template <typename T>
  using Lanes = OwnValue<T>;
  template <typename F>
  LOPT_DEVICE void each(F f) {
    f(int(threadIdx.x % kWarpLanes));
  }
  LOPT_DEVICE void sync() { __syncwarp(); }
};

struct DeviceBlock {
  using Warp = DeviceWarp;
  template <typename T>
  using Threads = OwnValue<T>;
  template <typename F>
  LOPT_DEVICE void each(F f) {
    f(int(threadIdx.x));
  }
  template <typename F>
  LOPT_DEVICE void warps(F f) {
    DeviceWarp warp;
    f(warp, int(threadIdx.x / kWarpLanes));
  }
  LOPT_DEVICE void sync() { __syncthreads(); }
};

#endif

// The threads of a block on the processor, for the emulator: all of them in turn.
template <typename T, int N>
struct AllValues {
  T value[N];
  T& operator[](int i) { return value[i]; }
  const T& operator[](int i) const { return value[i]; }
};

struct HostWarp {
  template <typename T>
  using Lanes = AllValues<T, kWarpLanes>;
  template <typename F>
  void each(F f) {
    for (int lane = 0; lane < kWarpLanes; ++lane) f(lane);
  }
  void sync() {}
};

// Or each on its own from barrier to barrier (csrc/emulated_block.h).
constexpr size_t kMostExchanged = 64;
struct ThreadSwitch {
  virtual ~ThreadSwitch() = default;
  virtual int thread() const = 0;  // the one that is running
  virtual void wait_block() = 0;
  virtual void wait_warp() = 0;
  // `all`: what the lanes of the warp give, `bytes` each.
  virtual void exchange(const void* own, size_t bytes, void* all) = 0;
};

struct HostBlock {
  using Warp = HostWarp;
  template <typename T>
  using Threads = AllValues<T, kThreads>;

  ThreadSwitch* alone = nullptr;

  template <typename F>
  void each(F f) {
    if (alone) return f(alone->thread());
    for (int thread = 0; thread < kThreads; ++thread) f(thread);
  }
  template <typename F>
  void warps(F f) {
    HostWarp w;
    if (alone) {
      alone->wait_warp();
      if (alone->thread() % kWarpLanes == 0) f(w, alone->thread() / kWarpLanes);
      return alone->wait_warp();
    }
    for (int warp = 0; warp < kWarps; ++warp) f(w, warp);
  }
  void sync() {
    if (alone) alone->wait_block();
  }
};

// x[thread][i] becomes its sum over each group of `lanes` neighbours (a power of two up to 32), in every one
// of them: halves are exchanged and added, so that all lanes hold the same bits.
template <int N>
struct Values {
  float v[N];
};
#if defined(__CUDACC__)
template <int N>
LOPT_DEVICE void group_sum(DeviceBlock&, OwnValue<Values<N>>& x, int lanes) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) {
    LOPT_UNROLL
    for (int i = 0; i < N; ++i) x.value.v[i] += __shfl_xor_sync(0xffffffffu, x.value.v[i], offset);
  }
}
#endif
template <int N>
void group_sum(HostBlock& block, AllValues<Values<N>, kThreads>& x, int lanes) {
  const auto sum = [&](auto& values, int count) {
    for (int offset = lanes / 2; offset > 0; offset /= 2) {
      const auto old = values;
      for (int thread = 0; thread < count; ++thread)
        for (int i = 0; i < N; ++i) values[thread].v[i] += old[thread ^ offset].v[i];
    }
  };
  if (!block.alone) return sum(x, kThreads);
  static_assert(sizeof(Values<N>) <= kMostExchanged, "a place for each lane");
  AllValues<Values<N>, kWarpLanes> warp;
  Values<N>& own = x[block.alone->thread()];
  block.alone->exchange(&own, sizeof own, &warp);
  sum(warp, kWarpLanes);
  own = warp[block.alone->thread() % kWarpLanes];
}

}  // namespace lopt
