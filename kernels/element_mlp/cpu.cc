// element_mlp on processors with SIMD units: the passes of README.md over a part of one tensor.
//
// Compiled once for each instruction set with LOPT_ISA naming it. All functions but the table are internal to
// this file, and nothing of the standard library is instantiated.
#include "kernels/common/blocks.h"
#include "kernels/common/factors.h"
#include "kernels/element_mlp/kernel.h"
#include "kernels/statistics/spreads.h"

namespace lopt {
namespace {

LOPT_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// The gradient as everything sees it.
template <typename T>
struct Gradient {
  Vec<T> scale, bound;
  explicit LOPT_INLINE Gradient(const Operand<T>& t)
      : scale(splat(t.grad_scale)), bound(splat(t.grad_bound)) {}
  LOPT_INLINE Vec<T> operator()(Vec<T> g) const { return clipped<T>(g * scale, bound); }
};

// ---- pass 1 ----

struct Row {
  int64_t o, batch0, x, batch1;
};

LOPT_INLINE Row row_at(const Loops& l, int64_t o) {
  return {o, o / (l.x * l.batch1), (o / l.batch1) % l.x, o % l.batch1};
}
LOPT_INLINE void advance(const Loops& l, Row& row) {
  ++row.o;
  if (++row.batch1 < l.batch1) return;
  row.batch1 = 0;
  if (++row.x < l.x) return;
  row.x = 0;
  ++row.batch0;
}

// Adds g^2 of elements e .. e + n of a row to the sums along both axes.
template <typename T>
LOPT_INLINE void add_squares(const MlpStep<T>& c, const Gradient<T>& gradient, const T* g, int64_t e,
                             int64_t n, T* x, T* y) {
  using V = Vec<T>;
  constexpr int W = kLanes<T>;
  V total = {};
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    const V a = gradient(load(g + i)), square = a * a;
    store<T>(y + i, load(y + i) + square);
    total += square;
  }
  if (i < n) {
    const V a = gradient(load_n(g + i, n - i)), square = a * a;
    store_n<T>(y + i, load_n(y + i, n - i) + square, n - i);
    total += square;
  }
  const int64_t batch2 = c.loops.batch2;
  if (batch2 == 1) {
    *x += sum<T>(total);
    return;
  }
  int64_t phase = e % batch2;
  for (i = 0; i < n; ++i) {
    const T a = gradient(splat(g[i]))[0];
    x[phase] += a * a;
    if (++phase == batch2) phase = 0;
  }
}

template <typename T>
void factor_sums(const MlpStep<T>& c, int64_t tile) {
  const Loops& l = c.loops;
  const RowTiles& t = c.tiles;
  const int64_t row_tile = tile / t.run_tiles, run_tile = tile % t.run_tiles;
  const int64_t row_begin = row_tile * t.rows_per_tile,
                row_end = smaller(row_begin + t.rows_per_tile, t.rows);
  const int64_t begin = run_tile * t.run_per_tile, n = smaller(t.run_per_tile, t.run - begin);
  T* x = c.x_sums + run_tile * c.x_size;
  __builtin_memset(x + row_begin * l.batch2, 0, size_t((row_end - row_begin) * l.batch2) * sizeof(T));
  const auto y_at = [&](int64_t batch0, int64_t batch1) {
    return c.y_sums + ((batch0 + row_tile) * l.batch1 + batch1) * t.run + begin;
  };
  for (int64_t b0 = row_at(l, row_begin).batch0; b0 <= row_at(l, row_end - 1).batch0; ++b0)
    for (int64_t b1 = 0; b1 < l.batch1; ++b1) __builtin_memset(y_at(b0, b1), 0, size_t(n) * sizeof(T));
  const Gradient<T> gradient(c.operand);
  for (Row row = row_at(l, row_begin); row.o < row_end; advance(l, row))
    add_squares(c, gradient, c.operand.grad + row.o * t.run + begin, begin, n, x + row.o * l.batch2,
                y_at(row.batch0, row.batch1));
}

// ---- between passes 1 and 2: accumulators, factors, biases ----

template <typename T>
void move_accumulator(const MlpStep<T>& c, T* accumulator, int64_t stride, int64_t size, const T* sums,
                      T count) {
  for (int k = 0; k < c.factored_moments; ++k) {
    T* a = accumulator + k * stride;
    const T d = c.operand.d_factored[k];
    for (int64_t i = 0; i < size; ++i) a[i] = average(a[i], d, sums[i] / count + T(kSquareEpsilon));
  }
}

template <typename T>
void factors(const MlpStep<T>& c) {
  const Loops& l = c.loops;
  const RowTiles& t = c.tiles;
  for (int64_t tile = 1; tile < t.run_tiles; ++tile)
    for (int64_t i = 0; i < c.x_size; ++i) c.x_sums[i] += c.x_sums[tile * c.x_size + i];
  move_accumulator(c, c.x_accumulator, c.x_accumulator_stride, c.x_size, c.x_sums, T(l.y));

  const int64_t width = l.batch1 * t.run;
  __builtin_memset(c.scratch, 0, size_t(c.y_size) * sizeof(T));
  for (int64_t tile = 0; tile < t.row_tiles; ++tile) {
    const int64_t begin = tile * t.rows_per_tile, end = smaller(begin + t.rows_per_tile, t.rows);
    for (int64_t b = row_at(l, begin).batch0; b <= row_at(l, end - 1).batch0; ++b) {
      T* to = c.scratch + b * width;
      const T* from = c.y_sums + (b + tile) * width;
      for (int64_t i = 0; i < width; ++i) to[i] += from[i];
    }
  }
  move_accumulator(c, c.y_accumulator, c.y_accumulator_stride, c.y_size, c.scratch, T(l.x));

  for (int k = 0; k < c.factored_moments; ++k) {
    const T *x = c.x_accumulator + k * c.x_accumulator_stride,
            *y = c.y_accumulator + k * c.y_accumulator_stride;
    T *x_factor = c.x_factor + k * c.x_stride, *y_factor = c.y_factor + k * c.y_stride;
    if (l.x_is_row) {
      row_factor(x, l.batch0, l.x, l.batch1 * l.batch2, x_factor);
      for (int64_t i = 0; i < c.y_size; ++i) y_factor[i] = factor_of(y[i]);
    } else {
      row_factor(y, l.batch0 * l.batch1, l.y, l.batch2, y_factor);
      for (int64_t i = 0; i < c.x_size; ++i) x_factor[i] = factor_of(x[i]);
    }
  }
}

// Adds the column `values`, normalised, times weights (hidden) to `bias`. Whole vectors are read and written.
template <typename T>
void add_column(const MlpStep<T>& c, const T* values, int64_t size, const T* weights, T* bias,
                int64_t stride) {
  constexpr int W = kLanes<T>;
  const double scale = 1.0 / std::sqrt(mean_square(values, size) + double(c.normaliser_epsilon));
  for (int j = 0; j < c.hidden_size; ++j) {
    const Vec<T> w = splat(T(scale * double(weights[j])));
    T* b = bias + j * stride;
    for (int64_t i = 0; i < size; i += W) {
      const Vec<T> x = i + W <= size ? load(values + i) : load_n(values + i, size - i);
      store<T>(b + i, load(b + i) + w * x);
    }
  }
}

template <typename T>
void axis_bias(const MlpStep<T>& c, const T* accumulator, int64_t accumulator_stride, int64_t size,
               const T* weights, const T* root_weights, T* bias, int64_t stride) {
  for (int k = 0; k < c.factored_moments; ++k) {
    const T* a = accumulator + k * accumulator_stride;
    if (weights) add_column(c, a, size, weights + k * c.hidden_size, bias, stride);
    if (!root_weights) continue;
    inverse_roots(a, size, T(kFactorEpsilon), c.scratch);
    add_column(c, c.scratch, size, root_weights + k * c.hidden_size, bias, stride);
  }
}

template <typename T>
void axis_biases(const MlpStep<T>& c, const T* b0) {
  for (int j = 0; j < c.hidden_size; ++j) {
    for (int64_t i = 0; i < c.x_size; ++i) c.x_bias[j * c.x_stride + i] = b0[j];
    __builtin_memset(c.y_bias + j * c.y_stride, 0, size_t(c.y_stride) * sizeof(T));
  }
  axis_bias(c, c.x_accumulator, c.x_accumulator_stride, c.x_size, c.x_weights, c.x_root_weights, c.x_bias,
            c.x_stride);
  axis_bias(c, c.y_accumulator, c.y_accumulator_stride, c.y_size, c.y_weights, c.y_root_weights, c.y_bias,
            c.y_stride);
}

template <typename T>
void axis_mean_squares(const MlpStep<T>& c, bool x, bool roots, double* out) {
  const T* a = x ? c.x_accumulator : c.y_accumulator;
  const int64_t stride = x ? c.x_accumulator_stride : c.y_accumulator_stride, size = x ? c.x_size : c.y_size;
  for (int k = 0; k < c.factored_moments; ++k, a += stride) {
    if (roots) inverse_roots(a, size, T(kFactorEpsilon), c.scratch);
    out[k] = mean_square(roots ? c.scratch : a, size);
  }
}

// ---- features ----

// Calls f(at, x, y, length) for pieces of elements start .. start + n along which the index y of the inner
// axis moves with the element, and the index x of the outer one too (batch2 > 1) or not at all.
template <typename F>
LOPT_INLINE void for_each_piece(const Loops& l, int64_t start, int64_t n, F f) {
  const int64_t run = l.y * l.batch2;
  int64_t row = start / run, position = start % run;
  for (int64_t at = 0; at < n;) {
    const int64_t first =
        l.batch0 == 1 && l.batch1 == 1 ? 0 : (row / (l.x * l.batch1) * l.batch1 + row % l.batch1) * run;
    const int64_t phase = l.batch2 == 1 ? 0 : position % l.batch2;
    const int64_t longest = l.batch2 == 1 ? run - position : l.batch2 - phase;
    const int64_t length = smaller(longest, n - at);
    f(at, row * l.batch2 + phase, first + position, length);
    at += length;
    position += length;
    if (position == run) position = 0, ++row;
  }
}

// to[k] = op(x[k], y[k]) for the elements of a block, k < count, read from arrays along the axes. Whole
// vectors are read and written: what follows is written later, or padding.
template <typename T, typename Op>
LOPT_INLINE void expand(const MlpStep<T>& c, int64_t start, int64_t n, int count, const T* x_values,
                        const T* y_values, T* to, Op op) {
  using V = Vec<T>;
  constexpr int W = kLanes<T>;
  const bool moves = c.loops.batch2 != 1;
  for_each_piece(c.loops, start, n, [&](int64_t at, int64_t x, int64_t y, int64_t length) {
    for (int k = 0; k < count; ++k) {
      const T *xs = x_values + k * c.x_stride + x, *ys = y_values + k * c.y_stride + y;
      T* out = to + k * kRowStride<T> + at;
      if (moves) {
        for (int64_t i = 0; i < length; i += W) store<T>(out + i, op(load(xs + i), load(ys + i)));
      } else {
        const V value = splat(*xs);
        for (int64_t i = 0; i < length; i += W) store<T>(out + i, op(value, load(ys + i)));
      }
    }
  });
}

// Features of a factored tensor that its axes show: each element's accumulators.
template <typename T>
__attribute__((noinline)) void axis_features(const MlpStep<T>& c, int64_t start, int64_t n, T* rows) {
  const FeatureRows& at = c.at;
  const int32_t x_row = c.loops.x_is_row ? at.row : at.column, y_row = c.loops.x_is_row ? at.column : at.row;
  const int32_t x_root = c.loops.x_is_row ? at.row_root : at.column_root,
                y_root = c.loops.x_is_row ? at.column_root : at.row_root;
  const auto put = [&](int32_t row, int32_t root_row, int k, int64_t i, T value) {
    if (row >= 0) rows[(row + k) * kRowStride<T> + i] = value;
    if (root_row >= 0) rows[(root_row + k) * kRowStride<T> + i] = T(1) / std::sqrt(value + T(kFactorEpsilon));
  };
  for_each_piece(c.loops, start, n, [&](int64_t first, int64_t x, int64_t y, int64_t length) {
    for (int k = 0; k < c.factored_moments; ++k)
      for (int64_t i = 0; i < length; ++i) {
        put(x_row, x_root, k, first + i,
            c.x_accumulator[k * c.x_accumulator_stride + x + (c.loops.batch2 == 1 ? 0 : i)]);
        put(y_row, y_root, k, first + i, c.y_accumulator[k * c.y_accumulator_stride + y + i]);
      }
  });
}

// log(x) for x > 0. float: 2 artanh((m - 1) / (m + 1)) of the mantissa m, as a series.
LOPT_INLINE Vec<double> logarithm(Vec<double> x) {
  Vec<double> y;
  for (int i = 0; i < kLanes<double>; ++i) y[i] = __builtin_log(x[i]);
  return y;
}
LOPT_INLINE Vec<float> logarithm(Vec<float> x) {
  using V = Vec<float>;
  typedef int32_t Int __attribute__((vector_size(kVectorBytes)));
  const Int exponent = ((Int)x - 0x3f3504f3) >> 23;  // the mantissa lies between the roots of 1/2 and 2
  const V m = (V)((Int)x - (exponent << 23)), s = (m - 1.0f) / (m + 1.0f), z = s * s;
  const V series = 2.0f + z * (2.0f / 3 + z * (2.0f / 5 + z * (2.0f / 7 + z * (2.0f / 9))));
  const V y = s * series + __builtin_convertvector(exponent, V) * 0.693147180559945f;
  return x < splat(__builtin_inff()) ? y : x;
}

template <int I>
struct Number {
  static constexpr int value = I;
};

// Counts that are known at compile time (all but -1), or those of the step.
template <int Momenta, int SecondMoments, int Factored>
struct Counts {
  static constexpr bool pairs = Momenta >= 0;
  int momenta, second_moments, factored;
  template <typename T>
  explicit LOPT_INLINE Counts(const MlpStep<T>& c)
      : momenta(Momenta < 0 ? c.operand.momenta : Momenta),
        second_moments(SecondMoments < 0 ? c.operand.second_moments : SecondMoments),
        factored(Factored < 0 ? c.factored_moments : Factored) {}
};

// Streams are read this many bytes ahead: more of them than the processor's own prefetchers keep up with.
constexpr int64_t kAhead = 1024;

template <bool Vector, typename Count, typename T>
LOPT_INLINE void prefetch(const Count& count, const Streams<T>& s, int64_t i) {
  const int64_t at = i + kAhead / int64_t(sizeof(T));
  __builtin_prefetch(s.g + at);
  __builtin_prefetch(s.p + at);
  for (int k = 0; k < count.momenta; ++k) __builtin_prefetch(s.m[k] + at);
  for (int k = 0; k < count.second_moments; ++k) __builtin_prefetch(s.v[k] + at);
  if (Vector)
    for (int k = 0; k < count.factored; ++k) __builtin_prefetch(s.d[k] + at);
}

// Calls emit(row, vectors) for each feature of the N vectors of elements from i on; where Write, the averages
// move on. `products`: row factor times column factor, of factored tensors.
template <bool Vector, bool Write, int N, typename Count, typename T, typename Emit>
LOPT_INLINE void features(const MlpStep<T>& c, const Count& count, const FeatureRows& at, const Streams<T>& s,
                          int64_t i, const T* products, Emit emit) {
  using V = Vec<T>;
  constexpr int W = kLanes<T>;
  const auto put = [&](int32_t row, int k, const V* x) __attribute__((always_inline)) {
    if (row >= 0) emit(row + k, x);
  };
  prefetch<Vector>(count, s, i);
  const Gradient<T> gradient(c.operand);
  V g[N], square[N], m[kMostAverages][N], x[N];
  for (int n = 0; n < N; ++n) {
    g[n] = gradient(load(s.g + i + n * W));
    square[n] = g[n] * g[n];
  }
  put(at.g, 0, g);
  if (at.clip_g >= 0) {
    for (int n = 0; n < N; ++n) x[n] = clipped<T>(g[n], splat(T(kGradientBound)));
    emit(at.clip_g, x);
  }
  if (at.p >= 0) {
    for (int n = 0; n < N; ++n) x[n] = load(s.p + i + n * W);
    emit(at.p, x);
  }
  if (at.log_abs_p >= 0) {
    for (int n = 0; n < N; ++n) {
      const V p = load(s.p + i + n * W);
      x[n] = logarithm(at_least<T>(p, -p) + T(kLogEpsilon));
    }
    emit(at.log_abs_p, x);
  }
  for (int k = 0; k < count.momenta; ++k) {
    for (int n = 0; n < N; ++n) {
      m[k][n] = average(load(s.m[k] + i + n * W), c.operand.d_momentum[k], g[n]);
      if (Write) store<T>(s.m[k] + i + n * W, m[k][n]);
    }
    put(at.m, k, m[k]);
  }
  for (int k = 0; k < count.second_moments; ++k) {
    V v[N], r[N];
    for (int n = 0; n < N; ++n) {
      v[n] = average(load(s.v[k] + i + n * W), c.operand.d_second_moment[k], square[n]);
      if (Write) store<T>(s.v[k] + i + n * W, v[n]);
      r[n] = rsqrt<T>(v[n] + c.rms_epsilon);
    }
    put(at.v, k, v);
    put(at.root_v, k, r);
    if (at.g_root_v >= 0) {
      for (int n = 0; n < N; ++n) x[n] = g[n] * r[n];
      emit(at.g_root_v + k, x);
    }
    if (at.m_root_v < 0) continue;
    const int first = count.second_moments == 1 ? 0 : k,
              last = count.second_moments == 1 ? count.momenta : k + 1;
    for (int j = first; j < last; ++j) {
      for (int n = 0; n < N; ++n) x[n] = m[j][n] * r[n];
      emit(at.m_root_v + j, x);
    }
  }
  for (int k = 0; k < count.factored; ++k) {
    V scale_g[N], scale_m[N];
    for (int n = 0; n < N; ++n) {
      if constexpr (Vector) {
        const V d = average(load(s.d[k] + i + n * W), c.operand.d_factored[k], square[n] + T(kSquareEpsilon));
        if (Write) store<T>(s.d[k] + i + n * W, d);
        x[n] = d;
        scale_g[n] = rsqrt<T>(at_least<T>(splat(T(kFactorFloor)), d + T(kDiagonalEpsilon)));
        scale_m[n] = rsqrt<T>(d + c.diagonal_momentum_epsilon);
      } else {
        scale_g[n] = scale_m[n] = load(products + k * kRowStride<T> + i + n * W);
      }
    }
    if constexpr (Vector) {
      put(at.row, k, x);
      if (at.row_root >= 0) {
        for (int n = 0; n < N; ++n) x[n] = rsqrt<T>(x[n] + T(kFactorEpsilon));
        emit(at.row_root + k, x);
      }
    }
    if (at.fac_g >= 0) {
      for (int n = 0; n < N; ++n) x[n] = g[n] * scale_g[n];
      emit(at.fac_g + k, x);
    }
    if (at.fac_m >= 0) {
      for (int n = 0; n < N; ++n) x[n] = m[k][n] * scale_m[n];
      emit(at.fac_m + k, x);
    }
  }
}

// Calls emit(i, row, vectors, number of vectors) for each feature of the n elements of a block, whole
// vectors: two at a time where the counts are known, so that what does not depend on the element is found
// once for both.
template <bool Vector, bool Write, typename Count, typename T, typename Emit>
LOPT_INLINE void features_of_block(const MlpStep<T>& c, const Streams<T>& streams, int64_t n,
                                   const T* products, Emit emit) {
  constexpr int W = kLanes<T>, N = Count::pairs ? 2 : 1;
  const Count count(c);
  const FeatureRows at = c.at;
  const Streams<T> s = streams;
  int64_t i = 0;
  for (; i + N * W <= n; i += N * W)
    features<Vector, Write, N>(c, count, at, s, i, products,
                               [&](int32_t row, const Vec<T>* x)
                                   __attribute__((always_inline)) { emit(i, row, x, Number<N>{}); });
  for (; N > 1 && i < n; i += W)
    features<Vector, Write, 1>(c, count, at, s, i, products,
                               [&](int32_t row, const Vec<T>* x)
                                   __attribute__((always_inline)) { emit(i, row, x, Number<1>{}); });
}

template <bool Vector, bool Write, typename T, typename Emit>
LOPT_INLINE void features_of_counts(const MlpStep<T>& c, const Streams<T>& s, int64_t n, const T* products,
                                    Emit emit) {
  if constexpr (sizeof(T) == sizeof(float))  // VeLO's and Celo's
    if (c.operand.momenta == 3 && c.operand.second_moments == 1 && c.factored_moments == 3)
      return features_of_block<Vector, Write, Counts<3, 1, 3>>(c, s, n, products, emit);
  features_of_block<Vector, Write, Counts<-1, -1, -1>>(c, s, n, products, emit);
}

template <bool Write, typename T, typename Emit>
LOPT_INLINE void block_features(const MlpStep<T>& c, const Streams<T>& s, int64_t start, int64_t n,
                                int64_t padded, T* products, Emit emit) {
  if (!c.factored()) return features_of_counts<true, Write>(c, s, padded, products, emit);
  if (c.at.fac_g >= 0 || c.at.fac_m >= 0)
    expand(c, start, n, c.factored_moments, c.x_factor, c.y_factor, products,
           [](Vec<T> x, Vec<T> y) { return x * y; });
  features_of_counts<false, Write>(c, s, padded, products, emit);
}

// ---- pass 2 ----

template <typename T>
T* aligned(void* memory) {
  return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory) + 63) / 64 * 64);
}

// Adds the squares of the first n elements of the rows that axis_features writes.
template <typename T>
__attribute__((noinline)) void add_axis_squares(const MlpStep<T>& c, int64_t n, const T* rows, double* sums) {
  const FeatureRows& at = c.at;
  const int32_t groups[] = {at.row, at.column, at.row_root, at.column_root};
  for (int32_t first : groups)
    for (int32_t f = first; first >= 0 && f < first + c.factored_moments; ++f)
      for (int64_t i = 0; i < n; ++i)
        sums[f] += double(rows[f * kRowStride<T> + i] * rows[f * kRowStride<T> + i]);
}

template <typename T>
void feature_sums(const MlpStep<T>& c, int64_t begin, int64_t end, double* sums, Spread* spreads,
                  bool moved) {
  using V = Vec<T>;
  constexpr int W = kLanes<T>;
  const int count = c.at.count;
  const bool axes = c.axes_are_features();
  const int64_t all_rows = c.factored_moments + (axes ? count : 0);
  T* products = aligned<T>(__builtin_alloca(size_t(all_rows) * kRowStride<T> * sizeof(T) + 64));
  T* rows = products + c.factored_moments * kRowStride<T>;
  V* parts = aligned<V>(__builtin_alloca(size_t(count + 1) * sizeof(V) + 64));
  for (int f = 0; f <= count; ++f) parts[f] = V{};
  int64_t elements = 0;
  const auto flush = [&] {
    for (int f = 0; f <= count; ++f) {
      sums[f] += double(sum<T>(parts[f]));
      parts[f] = V{};
    }
    elements = 0;
  };
  Spreads<T> seen(c.operand, spreads);
  for_each_block<false>(
      c.operand, begin, end, [&](const Streams<T>& s, int64_t start, int64_t n, int64_t padded) {
        if (spreads) {
          seen.add_inputs(s, n, padded);
          seen.add_averages(s, n, moved);
        }
        const bool whole = n == padded;
        block_features<false>(c, s, start, n, padded, products,
                              [&](int64_t i, int32_t row, const V* x, auto number)
                                  __attribute__((always_inline)) {
                                    V total = parts[row];
                                    for (int v = 0; v < number.value; ++v) {
                                      // Inverse roots are not zero where the averages are, as they are behind
                                      // the n elements.
                                      const V y = whole ? x[v] : first_lanes<T>(x[v], n - i - v * W);
                                      total += y * y;
                                    }
                                    parts[row] = total;
                                  });
        if (c.at.p < 0)
          for (int64_t i = 0; i < padded; i += W) parts[count] += load(s.p + i) * load(s.p + i);
        if (axes) {
          axis_features(c, start, n, rows);
          add_axis_squares(c, n, rows, sums);
        }
        if ((elements += n) >= 8192) flush();
      });
  flush();
  if (spreads) seen.finish();
  if (c.at.p >= 0) sums[count] = sums[c.at.p];
}

// ---- pass 3 ----

// A bias of each unit, or of each unit and element (rows of a block).
template <typename T>
struct Bias {
  const T* values;
  bool rows;
};

// out[j] = bias[j] + sum over k of w[k, j] * in[k], then ReLU if wished, for units j .. j + J at once, N
// vectors each.
template <typename T, int J, int N>
LOPT_INLINE void dense_units(int inputs, int units, int j, int64_t i, const T* in, const T* w, Bias<T> bias,
                             bool with_relu, T* out) {
  using V = Vec<T>;
  constexpr int W = kLanes<T>;
  V a[J][N];
  for (int q = 0; q < J; ++q)
    for (int v = 0; v < N; ++v)
      a[q][v] =
          bias.rows ? load(bias.values + (j + q) * kRowStride<T> + i + v * W) : splat(bias.values[j + q]);
  const T *x = in + i, *weights = w + j;
  for (int k = 0; k < inputs; ++k, x += kRowStride<T>, weights += units) {
    V values[N];
    for (int v = 0; v < N; ++v) values[v] = load(x + v * W);
    for (int q = 0; q < J; ++q) {
      const V weight = splat(weights[q]);
      for (int v = 0; v < N; ++v) a[q][v] += weight * values[v];
    }
  }
  for (int q = 0; q < J; ++q)
    for (int v = 0; v < N; ++v)
      store<T>(out + (j + q) * kRowStride<T> + i + v * W, with_relu ? relu<T>(a[q][v]) : a[q][v]);
}

// One layer for n elements, whole vectors: rows `in` to rows `out`.
template <typename T>
__attribute__((noinline)) void dense(int64_t n, int inputs, int units, const T* in, const T* w, Bias<T> bias,
                                     bool with_relu, T* out) {
  constexpr int W = kLanes<T>, wide = kVectorBytes == 64 ? 2 : 1;  // twice the registers
  const auto units_at = [&](int j, auto at_once, auto vectors) __attribute__((always_inline)) {
    constexpr int J = decltype(at_once)::value, N = decltype(vectors)::value;
    int64_t i = 0;
    for (; i + N * W <= n; i += N * W) dense_units<T, J, N>(inputs, units, j, i, in, w, bias, with_relu, out);
    for (; i < n; i += W) dense_units<T, J, 1>(inputs, units, j, i, in, w, bias, with_relu, out);
  };
  int j = 0;
  for (; j + 4 <= units; j += 4) units_at(j, Number<4>{}, Number<2 * wide>{});
  for (; j + 2 <= units; j += 2) units_at(j, Number<2>{}, Number<4 * wide>{});
  for (; j < units; ++j) units_at(j, Number<1>{}, Number<4 * wide>{});
}

constexpr double kLog2E = 1.4426950408889634;

// tanh. float: the series below 1/4, 1 - 2 / (exp(2x) + 1) above.
LOPT_INLINE Vec<double> hyperbolic(Vec<double> x) {
  Vec<double> y;
  for (int i = 0; i < kLanes<double>; ++i) y[i] = __builtin_tanh(x[i]);
  return y;
}
LOPT_INLINE Vec<float> hyperbolic(Vec<float> x) {
  using V = Vec<float>;
  const V z = x * x;
  const V series = x + x * z * (-1.0f / 3 + z * (2.0f / 15 + z * (-17.0f / 315 + z * (62.0f / 2835))));
  const V other = 1.0f - 2.0f / (exp2(x * float(2 * kLog2E)) + 1.0f);
  return z >= splat(0.0625f) ? other : series;  // NaN: the series, as exp2 may lose it
}

template <typename T>
__attribute__((noinline)) void tanh_rows(int64_t n, int units, T* rows) {
  for (int j = 0; j < units; ++j)
    for (int64_t i = 0; i < n; i += kLanes<T>)
      store<T>(rows + j * kRowStride<T> + i, hyperbolic(load(rows + j * kRowStride<T> + i)));
}

// A hidden layer of either activation.
template <typename T>
LOPT_INLINE void hidden_layer(bool tanh, int64_t n, int inputs, int units, const T* in, const T* w,
                              Bias<T> bias, T* out) {
  dense(n, inputs, units, in, w, bias, !tanh, out);
  if (tanh) tanh_rows(n, units, out);
}

template <typename T>
void apply(const MlpStep<T>& c, const Network<T>& net, int64_t begin, int64_t end, double* hidden_sums) {
  using V = Vec<T>;
  constexpr int W = kLanes<T>;
  const int hidden = net.hidden_size, layers = net.hidden_layers;
  const bool axis_biases = c.has_axis_biases();
  const int64_t all_rows = c.factored_moments + c.at.count + 3 * hidden + 2;
  T* products = aligned<T>(__builtin_alloca(size_t(all_rows) * kRowStride<T> * sizeof(T) + 64));
  T* rows = products + c.factored_moments * kRowStride<T>;
  T* bias = rows + c.at.count * kRowStride<T>;
  T *one = bias + hidden * kRowStride<T>, *other = one + hidden * kRowStride<T>,
    *outputs = other + hidden * kRowStride<T>;
  for_each_block<true>(
      c.operand, begin, end, [&](const Streams<T>& s, int64_t start, int64_t n, int64_t padded) {
        block_features<true>(c, s, start, n, padded, products,
                             [&](int64_t i, int32_t row, const V* x, auto number)
                                 __attribute__((always_inline)) {
                                   T* to = rows + row * kRowStride<T> + i;
                                   for (int v = 0; v < number.value; ++v) store<T>(to + v * W, x[v]);
                                 });
        if (c.axes_are_features()) axis_features(c, start, n, rows);
        if (axis_biases)
          expand(c, start, n, hidden, c.x_bias, c.y_bias, bias, [](V x, V y) { return x + y; });
        hidden_layer(c.tanh, padded, c.at.count, hidden, rows, net.w[0],
                     Bias<T>{axis_biases ? bias : net.b[0], axis_biases}, one);
        T *in = one, *out = other;
        for (int layer = 1; layer < layers; ++layer) {
          hidden_layer(c.tanh, padded, hidden, hidden, in, net.w[layer], Bias<T>{net.b[layer], false}, out);
          T* next = in;
          in = out;
          out = next;
        }
        if (hidden_sums)
          for (int j = 0; j < hidden; ++j) {
            V total = {};
            int64_t i = 0;
            for (; i + W <= n; i += W) total += load(in + j * kRowStride<T> + i);
            if (i < n) total += first_lanes<T>(load(in + j * kRowStride<T> + i), n - i);
            hidden_sums[j] += double(sum<T>(total));
          }
        dense(padded, hidden, 2, in, net.w[layers], Bias<T>{net.b[layers], false}, false, outputs);
        for (int64_t i = 0; i < padded; i += W)
          store_result(c.operand, s, i, load(outputs + i) * exp2(load(outputs + kRowStride<T> + i)));
      });
}

}  // namespace

namespace LOPT_ISA {
const MlpKernels& element_mlp() {
  static constexpr MlpKernels kernels = {
      {factor_sums<float>, factors<float>, axis_biases<float>, axis_mean_squares<float>, feature_sums<float>,
       apply<float>},
      {factor_sums<double>, factors<double>, axis_biases<double>, axis_mean_squares<double>,
       feature_sums<double>, apply<double>},
  };
  return kernels;
}
}  // namespace LOPT_ISA
}  // namespace lopt
