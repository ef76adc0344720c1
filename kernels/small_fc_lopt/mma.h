// The network of small_fc_lopt on tensor cores: 32 elements by one warp, products of 16 elements x 8 inputs x
// 8 units (mma.sync). Between the features and the two outputs everything stays in registers.
//
// A lane is (g, t) = (lane / 4, lane % 4), and the four lanes of a quad work on their own four elements: slot
// 4 g + s is row g + 8 (s % 2) of tile s / 2. The accumulators of a product,
//     lane (g, t): rows g and g + 8, units 8 n + 2 t and 8 n + 2 t + 1,
// are the first operand of the next one as they lie, with its inputs in another order: a sum over inputs may
// take them in any order, so only the weights are arranged for it (`prepare_matmul`). The outputs are sums
// over the lanes of a quad; each lane keeps those of its own element.
//
// Accuracy. float32 (`Bfloat16` false): each factor is split into two tf32 numbers, x = hi + lo, and
// x w ~ lo(x) hi(w) + hi(x) lo(w) + hi(x) hi(w). With M the same network of absolute values (|weights|,
// |biases|, |features|), direction and exponent are within layers * kMatmulError * M of the exact ones.
// bfloat16: one product of factors with 8 bits, within layers * kMatmulBfloat16Error * M. Two bfloat16 terms
// with three products would take half the tensor-core time of tf32, but are 40 times less accurate than
// float32 and miss its bound where products cancel.
//
// NaN and infinity come out as from float32 arithmetic: hi is bounded by the largest finite number, so that
// lo = x - hi is infinite where x is, and not NaN.
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/common/device.h"
#include "kernels/small_fc_lopt/gpu.h"

namespace lopt {

constexpr double kMatmulError = 1.0 / (1 << 17);
constexpr double kMatmulBfloat16Error = 1.01 / (1 << 7);

// Elements of a lane in one call, and floats from one feature to the next: 8 banks apart, so that the lanes
// of a quarter of a warp read 16 bytes each without conflicts.
template <int H>
constexpr int kMatmulElements = 1;
template <int H>
constexpr int kMatmulStride = 40;

namespace matmul {

// A feature of some slots of a quad.
template <int N>
struct alignas(4 * N) Slots {
  float v[N];
};

// Two inputs of two rows: accumulators in the order of mma.sync, [2 * row + unit].
struct Slice {
  float v[4];
};

// A slice as first operand, and the weights of 8 inputs x 8 units as second one.
template <bool Bfloat16>
struct Operand;
template <bool Bfloat16>
struct Weights;
template <>
struct Operand<false> {
  float hi[4], lo[4];
};
template <>
struct alignas(16) Weights<false> {
  float hi[2], lo[2];
};
template <>
struct Operand<true> {
  uint32_t row[2];  // two numbers each
};
template <>
struct Weights<true> {
  uint32_t both;
};

constexpr float kLargest = 3.402823466e38f;
constexpr float kLargestTf32 = 3.401162134e38f;  // 0x7f7fe000: rounds to itself
constexpr uint32_t kTf32Bits = 0xffffe000u;

// x cut to tf32.
LOPT_DEVICE float cut(float x) { return float_of(bits_of(x) & kTf32Bits); }
// x to the nearest tf32, ties away from zero; infinity stays, NaN may be lost.
LOPT_DEVICE float nearest(float x) { return float_of((bits_of(x) + 0x1000u) & kTf32Bits); }

// Two floats to bfloat16, the first one in the low half.
LOPT_DEVICE uint32_t pack_bfloat16(float low, float high) {
#if defined(__CUDA_ARCH__)
  uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
#else
  return uint32_t(to_bfloat16(low)) | uint32_t(to_bfloat16(high)) << 16;
#endif
}

// `positive`: no number is below zero. NaN goes to hi, infinity to lo.
LOPT_DEVICE void to_operand(const Slice& x, bool positive, Operand<false>& to) {
  LOPT_UNROLL
  for (int i = 0; i < 4; ++i) {
    to.hi[i] = cut(at_most(kLargest, positive ? x.v[i] : at_least(-kLargest, x.v[i])));
    to.lo[i] = nearest(x.v[i] - to.hi[i]);
  }
}
LOPT_DEVICE void to_operand(const Slice& x, bool, Operand<true>& to) {
  to.row[0] = pack_bfloat16(x.v[0], x.v[1]);
  to.row[1] = pack_bfloat16(x.v[2], x.v[3]);
}

LOPT_DEVICE void to_weights(const float (&w)[2], Weights<false>& to) {
  LOPT_UNROLL
  for (int i = 0; i < 2; ++i) {
    // Rounded, not cut: lo has either sign, so that the products of two low parts, which are left out, do not
    // add up.
    const float bounded = at_most(kLargestTf32, at_least(-kLargestTf32, w[i]));
    to.hi[i] = bounded == bounded ? nearest(bounded) : bounded;
    to.lo[i] = nearest(w[i] - to.hi[i]);
  }
}
LOPT_DEVICE void to_weights(const float (&w)[2], Weights<true>& to) { to.both = pack_bfloat16(w[0], w[1]); }

// ---- instructions of a warp ----

// c += a b for 8 inputs in tf32, m16n8k8; term 0: lo hi, 1: hi lo, 2: hi hi. Input t of the instruction is
// the first number of lane t, input t + 4 its second. The same in bfloat16 for 8 inputs, m16n8k8, or 16,
// m16n8k16: inputs 2 t and 2 t + 1 lie in lane t. exchange: x of the lane whose number differs in `bit`.
#if defined(__CUDACC__)

LOPT_DEVICE void mma(OwnValue<Slice>& c, const OwnValue<Operand<false>>& a, const OwnValue<Weights<false>>& b,
                     int term) {
  float (&d)[4] = c.value.v;
  const float (&x)[4] = term == 0 ? a.value.lo : a.value.hi;
  const float (&w)[2] = term == 1 ? b.value.lo : b.value.hi;
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(bits_of(x[0])), "r"(bits_of(x[2])), "r"(bits_of(x[1])), "r"(bits_of(x[3])), "r"(bits_of(w[0])),
        "r"(bits_of(w[1])));
}
LOPT_DEVICE void mma(OwnValue<Slice>& c, const OwnValue<Operand<true>>& a, const OwnValue<Weights<true>>& b) {
  float (&d)[4] = c.value.v;
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a.value.row[0]), "r"(a.value.row[1]), "r"(b.value.both));
}
LOPT_DEVICE void mma(OwnValue<Slice>& c, const OwnValue<Operand<true>>& a0, const OwnValue<Operand<true>>& a1,
                     const OwnValue<Weights<true>>& b0, const OwnValue<Weights<true>>& b1) {
  float (&d)[4] = c.value.v;
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0.value.row[0]), "r"(a0.value.row[1]), "r"(a1.value.row[0]), "r"(a1.value.row[1]),
        "r"(b0.value.both), "r"(b1.value.both));
}
LOPT_DEVICE void exchange(OwnValue<float>& x, int bit) {
  x.value = __shfl_xor_sync(0xffffffffu, x.value, bit);
}

#else

template <typename T>
using All = AllValues<T, kWarpLanes>;

// For a (16, K) and b (K, 8) given by element, as the PTX ISA lays them out. Products are exact; the sum is
// cut to float32 after every instruction, which tensor cores do no worse.
template <int K, typename A, typename B>
void emulate_mma(All<Slice>& c, A a, B b) {
  for (int lane = 0; lane < kWarpLanes; ++lane)
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
      double sum = double(c[lane].v[i]);
      for (int k = 0; k < K; ++k) sum += double(a(row, k)) * double(b(k, column));
      float rounded = float(sum);
      if (std::fabs(double(rounded)) > std::fabs(sum)) rounded = std::nextafter(rounded, 0.0f);
      c[lane].v[i] = rounded;
    }
}
inline void mma(All<Slice>& c, const All<Operand<false>>& a, const All<Weights<false>>& b, int term) {
  emulate_mma<8>(
      c,
      [&](int row, int k) {
        const Operand<false>& from = a[row % 8 * 4 + k % 4];
        return (term == 0 ? from.lo : from.hi)[row / 8 * 2 + k / 4];
      },
      [&](int k, int column) {
        const Weights<false>& from = b[column * 4 + k % 4];
        return (term == 1 ? from.lo : from.hi)[k / 4];
      });
}
inline float half_of(uint32_t both, int i) { return from_bfloat16(uint16_t(i ? both >> 16 : both)); }
inline void mma(All<Slice>& c, const All<Operand<true>>& a, const All<Weights<true>>& b) {
  emulate_mma<8>(
      c, [&](int row, int k) { return half_of(a[row % 8 * 4 + k / 2].row[row / 8], k % 2); },
      [&](int k, int column) { return half_of(b[column * 4 + k / 2].both, k % 2); });
}
inline void mma(All<Slice>& c, const All<Operand<true>>& a0, const All<Operand<true>>& a1,
                const All<Weights<true>>& b0, const All<Weights<true>>& b1) {
  emulate_mma<16>(
      c,
      [&](int row, int k) { return half_of((k < 8 ? a0 : a1)[row % 8 * 4 + k % 8 / 2].row[row / 8], k % 2); },
      [&](int k, int column) { return half_of((k < 8 ? b0 : b1)[column * 4 + k % 8 / 2].both, k % 2); });
}
inline void exchange(All<float>& x, int bit) {
  const All<float> from = x;
  for (int lane = 0; lane < kWarpLanes; ++lane) x[lane] = from[lane ^ bit];
}

#endif

// c[i] += a[i][0 .. Slices] times the weights of 8 units, `w` with `stride` entries from a slice to the next.
template <bool Bfloat16, int Slices, int Tiles, int Most, typename Warp>
LOPT_DEVICE void dense(Warp& warp, typename Warp::template Lanes<Slice> (&c)[Tiles],
                       const typename Warp::template Lanes<Operand<Bfloat16>> (&a)[Tiles][Most],
                       const Weights<Bfloat16>* w, int stride) {
  typename Warp::template Lanes<Weights<Bfloat16>> b[2];
  if constexpr (Bfloat16) {
    LOPT_UNROLL
    for (int j = 0; j + 1 < Slices; j += 2) {
      warp.each([&](int lane) {
        b[0][lane] = w[j * stride + lane];
        b[1][lane] = w[(j + 1) * stride + lane];
      });
      LOPT_UNROLL
      for (int i = 0; i < Tiles; ++i) mma(c[i], a[i][j], a[i][j + 1], b[0], b[1]);
    }
    if constexpr (Slices % 2 == 1) {
      warp.each([&](int lane) { b[0][lane] = w[(Slices - 1) * stride + lane]; });
      LOPT_UNROLL
      for (int i = 0; i < Tiles; ++i) mma(c[i], a[i][Slices - 1], b[0]);
    }
  } else {
    // Tensor cores cut sums instead of rounding them: the small terms have their own accumulators, and what c
    // starts from is added afterwards.
    typename Warp::template Lanes<Slice> large[Tiles], small[Tiles];
    warp.each([&](int lane) {
      LOPT_UNROLL
      for (int i = 0; i < Tiles; ++i) large[i][lane] = small[i][lane] = Slice{};
    });
    LOPT_UNROLL
    for (int j = 0; j < Slices; ++j) {
      warp.each([&](int lane) { b[0][lane] = w[j * stride + lane]; });
      LOPT_UNROLL
      for (int i = 0; i < Tiles; ++i) {
        mma(small[i], a[i][j], b[0], 0);
        mma(small[i], a[i][j], b[0], 1);
        mma(large[i], a[i][j], b[0], 2);
      }
    }
    warp.each([&](int lane) {
      LOPT_UNROLL
      for (int i = 0; i < Tiles; ++i) {
        LOPT_UNROLL
        for (int k = 0; k < 4; ++k) c[i][lane].v[k] += large[i][lane].v[k] + small[i][lane].v[k];
      }
    });
  }
}

}  // namespace matmul

// A tensor's network in shared memory: weights of 8 inputs x 8 units as the lanes need them.
template <int H, bool Bfloat16>
struct alignas(16) MatmulNetwork {
  static constexpr int kBlocks = H < 8 ? 1 : H / 8;  // of 8 units; narrow networks are filled up with zeros
  matmul::Weights<Bfloat16> w0[3][kBlocks][32], w1[kBlocks][kBlocks][32];
  float w_out[8 * kBlocks][2], b1[8 * kBlocks], b_out[2];
};

// Fills `to` from the folded network in global memory, by the whole block.
template <int H, bool Bfloat16, typename Block>
LOPT_DEVICE void prepare_matmul(Block& block, const Folded<H>& folded, bool factored, int layers,
                                MatmulNetwork<H, Bfloat16>& to) {
  constexpr int blocks = MatmulNetwork<H, Bfloat16>::kBlocks, units = 8 * blocks;
  const int features = factored ? kFactoredFeatures : kFeatures;
  block.each([&](int thread) {
    // Inputs of lane t in a slice: t and t + 4 in the first layer, units 2 t and 2 t + 1 in the second.
    for (int i = thread; i < 3 * blocks * 32; i += kThreads) {
      const int lane = i % 32, unit = i / 32 % blocks * 8 + lane / 4, slice = i / 32 / blocks;
      float w[2];
      for (int k = 0; k < 2; ++k) {
        const int feature = 8 * slice + lane % 4 + 4 * k;
        w[k] = feature < features && unit < H ? folded.w0[feature][unit] : 0.0f;
      }
      matmul::to_weights(w, to.w0[slice][unit / 8][lane]);
    }
    for (int i = thread; i < (layers == 2 ? blocks * blocks * 32 : 0); i += kThreads) {
      const int lane = i % 32, unit = i / 32 % blocks * 8 + lane / 4, slice = i / 32 / blocks;
      float w[2];
      for (int k = 0; k < 2; ++k) {
        const int from = 8 * slice + 2 * (lane % 4) + k;
        w[k] = from < H && unit < H ? folded.w1[unit * H + from] : 0.0f;
      }
      matmul::to_weights(w, to.w1[slice][unit / 8][lane]);
    }
    for (int i = thread; i < 2 * units; i += kThreads)
      to.w_out[i / 2][i % 2] = i / 2 < H ? folded.w_out[i % 2][i / 2] : 0.0f;
    for (int i = thread; i < units; i += kThreads) to.b1[i] = layers == 2 && i < H ? folded.b1[i] : 0.0f;
    if (thread < 2) to.b_out[thread] = folded.b_out[thread];
  });
}

// Direction and exponent of 32 elements (slots), by one warp.
//   x     shared memory of this warp, on a multiple of 16 bytes: feature f of slot s at x[f *
//   kMatmulStride<H> + s]; 16 features where
//         factored, else 22 and two of zeros
//   bias  bias(slot, j, out): out[0], out[1] = initial values of units j, j + 1 of the first layer, j even
//   out   direction at out[slot], exponent at out[32 + slot]; may be x
template <int H, bool Bfloat16, typename Warp, typename Bias>
LOPT_DEVICE void matmul_mlp(Warp& warp, const MatmulNetwork<H, Bfloat16>& network, bool factored, int layers,
                            const float* x, Bias bias, float* out) {
  using matmul::Slice;
  using Operand = matmul::Operand<Bfloat16>;
  constexpr int blocks = MatmulNetwork<H, Bfloat16>::kBlocks;
  // Tiles that share the weights as they are read. Two of a wide layer would not fit the registers.
  constexpr int tiles = H == 64 && !Bfloat16 ? 1 : 2;
  struct Pair {
    float v[2];
  };
  typename Warp::template Lanes<Pair> result;

  // Features 8 j .. 8 j + 8 of the slots of some tiles.
  const auto read = [&](int lane, int tile, int j, auto& to) {
    Slice slice[tiles];
    LOPT_UNROLL
    for (int k = 0; k < 2; ++k) {
      using Slots = matmul::Slots<2 * tiles>;
      const auto& slots = *reinterpret_cast<const Slots*>(x + (8 * j + lane % 4 + 4 * k) * kMatmulStride<H> +
                                                          lane / 4 * 4 + 2 * tile);
      LOPT_UNROLL
      for (int s = 0; s < 2 * tiles; ++s) slice[s / 2].v[2 * (s % 2) + k] = slots.v[s];
    }
    LOPT_UNROLL
    for (int i = 0; i < tiles; ++i) matmul::to_operand(slice[i], false, to[i][j % 2][lane]);
  };

  LOPT_NO_UNROLL
  for (int tile = 0; tile < 2; tile += tiles) {
    typename Warp::template Lanes<Operand> features[tiles][2], hidden[tiles][blocks];
    typename Warp::template Lanes<Slice> c[tiles], units[tiles][blocks];
    struct Outputs {
      float v[2 * tiles][2];
    };
    typename Warp::template Lanes<Outputs> outputs;
    warp.each([&](int lane) {
      read(lane, tile, 0, features);
      read(lane, tile, 1, features);
      outputs[lane] = Outputs{};
    });

    // ReLU of the accumulators of units 8 n .. 8 n + 8; adds their share of the outputs where the layer is
    // the last one.
    const auto activate = [&](int n, bool last) {
      warp.each([&](int lane) {
        const float* w = network.w_out[8 * n + 2 * (lane % 4)];
        LOPT_UNROLL
        for (int i = 0; i < tiles; ++i) {
          LOPT_UNROLL
          for (int k = 0; k < 4; ++k) {
            float& unit = c[i][lane].v[k];
            unit = 2 * (lane % 4) < H ? relu(unit) : 0.0f;  // not infinity times the 0 of a unit that is none
            LOPT_UNROLL
            for (int o = 0; o < 2; ++o)
              if (last) outputs[lane].v[2 * i + k / 2][o] += w[k % 2 * 2 + o] * unit;
          }
        }
      });
    };

    LOPT_UNROLL
    for (int n = 0; n < blocks; ++n) {
      warp.sync();  // so that the loads of all blocks are not hoisted: their registers are needed
      warp.each([&](int lane) {
        const int unit = 8 * n + 2 * (lane % 4);
        LOPT_UNROLL
        for (int s = 0; s < 2 * tiles; ++s) {
          float start[2] = {0.0f, 0.0f};
          if (unit < H) bias(lane / 4 * 4 + 2 * tile + s, unit, start);
          c[s / 2][lane].v[2 * (s % 2)] = start[0];
          c[s / 2][lane].v[2 * (s % 2) + 1] = start[1];
        }
      });
      matmul::dense<Bfloat16, 2>(warp, c, features, network.w0[0][n], blocks * 32);
      if (!factored) {
        typename Warp::template Lanes<Operand> more[tiles][1];
        warp.each([&](int lane) { read(lane, tile, 2, more); });
        matmul::dense<Bfloat16, 1>(warp, c, more, network.w0[2][n], blocks * 32);
      }
      activate(n, layers == 1);
      warp.each([&](int lane) {
        LOPT_UNROLL
        for (int i = 0; i < tiles; ++i) units[i][n][lane] = c[i][lane];
      });
    }
    if (layers == 2) {
      warp.sync();  // arranged (and split) no earlier: their registers are those of the features
      warp.each([&](int lane) {
        LOPT_UNROLL
        for (int i = 0; i < tiles; ++i) {
          LOPT_UNROLL
          for (int n = 0; n < blocks; ++n) matmul::to_operand(units[i][n][lane], true, hidden[i][n][lane]);
        }
      });
      LOPT_NO_UNROLL
      for (int n = 0; n < blocks; ++n) {
        warp.each([&](int lane) {
          const float* b = network.b1 + 8 * n + 2 * (lane % 4);
          LOPT_UNROLL
          for (int i = 0; i < tiles; ++i) {
            LOPT_UNROLL
            for (int k = 0; k < 4; ++k) c[i][lane].v[k] = b[k % 2];
          }
        });
        matmul::dense<Bfloat16, blocks>(warp, c, hidden, network.w1[0][n], blocks * 32);
        activate(n, true);
      }
    }

    // Sums over the quad: lane t keeps those of slot t.
    LOPT_UNROLL
    for (int i = 0; i < tiles; ++i) {
      LOPT_UNROLL
      for (int o = 0; o < 2; ++o) {
        typename Warp::template Lanes<float> kept, other;
        // Chosen among two registers: an index would put them into memory.
        warp.each([&](int lane) {
          const auto& v = outputs[lane].v;
          const float even = v[2 * i][o], odd = v[2 * i + 1][o];
          other[lane] = lane % 2 ? even : odd;
        });
        matmul::exchange(other, 1);
        warp.each([&](int lane) {
          const auto& v = outputs[lane].v;
          const float even = v[2 * i][o], odd = v[2 * i + 1][o];
          kept[lane] = (lane % 2 ? odd : even) + other[lane];
          other[lane] = kept[lane];
        });
        matmul::exchange(other, 2);
        warp.each([&](int lane) {
          if (lane % 4 / 2 == tile + i) result[lane].v[o] = kept[lane] + other[lane] + network.b_out[o];
        });
      }
    }
  }
  warp.sync();  // all lanes have read x
  warp.each([&](int lane) {
    LOPT_UNROLL
    for (int o = 0; o < 2; ++o) out[32 * o + lane] = result[lane].v[o];
  });
  warp.sync();
}

}  // namespace lopt
