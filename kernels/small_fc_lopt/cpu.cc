// small_fc_lopt on processors with SIMD units: the three passes of README.md, one tile of one tensor at a
// time.
//
// Compiled once for each instruction set with LOPT_ISA naming it. All functions but the table are internal to
// this file, and nothing of the standard library is instantiated: the linker must never find two versions of
// a function.
#include "kernels/common/factors.h"
#include "kernels/common/half.h"
#include "kernels/common/simd.h"
#include "kernels/small_fc_lopt/kernel.h"

namespace lopt {
namespace {

// How the factors and biases of an element are found.
enum class Mode {
  row_scalar,  // x factors are constant along a row, y factors are read beside the elements
  expanded,    // products and sums of both were written out for a segment: short rows, or a batch axis inside
  unfactored,  // rank < 2: every column is per parameter
};

template <int I>
struct Index {
  static constexpr int value = I;
};

// Exponential moving average with d = 1 - decay: two products, whatever d is.
template <typename V, typename D>
LOPT_INLINE V average(V a, D d, V x) {
  return (a - d * a) + d * x;
}
// The same with one product, for d <= 1/2: with d near 1 it would lose x where x << a.
template <typename V, typename D>
LOPT_INLINE V slow_average(V a, D d, V x) {
  return a + d * (x - a);
}

// Position in the tensor by rows: row o is (batch0, x, batch1).
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
template <typename T>
LOPT_INLINE int64_t x_offset(const TensorStep<T>& c, const Row& row) {
  return row.o * c.tensor.loops.batch2;
}
template <typename T>
LOPT_INLINE int64_t y_offset(const TensorStep<T>& c, const Row& row) {
  return (row.batch0 * c.tensor.loops.batch1 + row.batch1) * c.tiling.run;
}

struct Tile {
  int64_t row_tile, run_tile, row_begin, row_end, run_begin, run_end;
};
LOPT_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <typename T>
LOPT_INLINE Tile tile_at(const TensorStep<T>& c, int64_t index) {
  const Tiling& t = c.tiling;
  Tile tile;
  tile.row_tile = index / t.run_tiles;
  tile.run_tile = index % t.run_tiles;
  tile.row_begin = tile.row_tile * t.rows_per_tile;
  tile.row_end = smaller(tile.row_begin + t.rows_per_tile, t.rows);
  tile.run_begin = tile.run_tile * t.run_per_tile;
  tile.run_end = smaller(tile.run_begin + t.run_per_tile, t.run);
  return tile;
}

// Calls f(first row, run offset, length, rows) for pieces of a tile that are contiguous in loop order: a part
// of one row of at most `longest` elements, or several whole rows where one is shorter than that and `join`
// is set.
template <typename T, typename F>
LOPT_INLINE void for_each_segment(const TensorStep<T>& c, const Tile& tile, int64_t longest, bool join, F f) {
  const int64_t run = c.tiling.run;
  Row row = row_at(c.tensor.loops, tile.row_begin);
  if (join && run <= longest) {
    const int64_t group = longest / run;
    while (row.o < tile.row_end) {
      const int64_t rows = smaller(group, tile.row_end - row.o);
      f(row, int64_t(0), rows * run, rows);
      for (int64_t i = 0; i < rows; ++i) advance(c.tensor.loops, row);
    }
    return;
  }
  for (; row.o < tile.row_end; advance(c.tensor.loops, row))
    for (int64_t e = tile.run_begin; e < tile.run_end; e += longest)
      f(row, e, smaller(longest, tile.run_end - e), int64_t(1));
}

// ---- tensors whose elements do not lie in loop order, or in another type than that of the arithmetic ----

template <typename T>
constexpr Dtype kDtype = sizeof(T) == sizeof(float) ? Dtype::float32 : Dtype::float64;

// Whether the kernels take the elements where they lie.
template <typename T>
LOPT_INLINE bool direct(const View& view) {
  return !view.strides && view.dtype == kDtype<T>;
}

// Calls f(i, offset) for elements start .. start + n of the tensor in loop order, offset as `strides` give
// it.
template <typename F>
LOPT_INLINE void for_each_offset(const Tensor& tensor, const int64_t* strides, int64_t start, int64_t n,
                                 F f) {
  int64_t index[64];
  int64_t offset = 0;
  const int last = tensor.ndim - 1;
  for (int axis = last; axis >= 0; --axis) {
    index[axis] = start % tensor.sizes[axis];
    start /= tensor.sizes[axis];
    offset += index[axis] * strides[axis];
  }
  for (int64_t i = 0; i < n; ++i) {
    f(i, offset);
    for (int axis = last; axis >= 0; --axis) {
      offset += strides[axis];
      if (++index[axis] < tensor.sizes[axis]) break;
      offset -= index[axis] * strides[axis];
      index[axis] = 0;
    }
  }
}

// Copies elements start .. start + n to `buffer` and back. U: their type in memory.
template <typename U>
LOPT_INLINE void collect(const Tensor& tensor, const View& view, int64_t start, int64_t n, U* buffer) {
  const U* data = static_cast<const U*>(view.data);
  for_each_offset(tensor, view.strides, start, n,
                  [&](int64_t i, int64_t offset) { buffer[i] = data[offset]; });
}
template <typename U>
LOPT_INLINE void spread(const Tensor& tensor, const View& view, int64_t start, int64_t n, const U* buffer) {
  U* data = static_cast<U*>(view.data);
  for_each_offset(tensor, view.strides, start, n,
                  [&](int64_t i, int64_t offset) { data[offset] = buffer[i]; });
}

// The same in the type of the arithmetic, for at most kSegment elements. Not inlined: what is rare shall not
// take registers from what is not.
template <typename T>
__attribute__((noinline)) void read(const Tensor& tensor, const View& view, int64_t start, int64_t n,
                                    T* buffer) {
  if (view.dtype == kDtype<T>) return collect(tensor, view, start, n, buffer);
  if constexpr (sizeof(T) == sizeof(float)) {
    uint16_t stored[kSegment];
    if (view.strides) collect(tensor, view, start, n, stored);
    widen(view.dtype, view.strides ? stored : static_cast<const uint16_t*>(view.data) + start, n, buffer);
  }
}
template <typename T>
__attribute__((noinline)) void write(const Tensor& tensor, const View& view, int64_t start, int64_t n,
                                     const T* buffer) {
  if (view.dtype == kDtype<T>) return spread(tensor, view, start, n, buffer);
  if constexpr (sizeof(T) == sizeof(float)) {
    uint16_t stored[kSegment];
    narrow(view.dtype, buffer, n, view.strides ? stored : static_cast<uint16_t*>(view.data) + start);
    if (view.strides) spread(tensor, view, start, n, stored);
  }
}

// Elements start .. start + n where they lie, or a copy of them.
template <typename T>
LOPT_INLINE const T* gather(const Tensor& tensor, const View& view, int64_t start, int64_t n, T* buffer) {
  if (direct<T>(view)) return static_cast<const T*>(view.data) + start;
  read(tensor, view, start, n, buffer);
  return buffer;
}

template <typename T>
LOPT_INLINE bool all_direct(const TensorStep<T>& c) {
  return direct<T>(c.tensor.param) && direct<T>(c.tensor.grad) && direct<T>(c.tensor.output);
}

// ---- pass 1 ----

template <typename T>
void clear_factor_sums(const TensorStep<T>& c, const Tile& tile) {
  const Loops& l = c.tensor.loops;
  const int64_t b2 = l.batch2, x0 = tile.run_tile * c.x_size;
  __builtin_memset(c.x_sums + x0 + tile.row_begin * b2, 0,
                   size_t(tile.row_end - tile.row_begin) * b2 * sizeof(T));
  const int64_t first = row_at(l, tile.row_begin).batch0, last = row_at(l, tile.row_end - 1).batch0;
  for (int64_t b = first; b <= last; ++b)
    for (int64_t b1 = 0; b1 < l.batch1; ++b1)
      __builtin_memset(c.y_sums + ((b + tile.row_tile) * l.batch1 + b1) * c.tiling.run + tile.run_begin, 0,
                       size_t(tile.run_end - tile.run_begin) * sizeof(T));
}

// Adds g^2 of elements e .. e + n of Rows rows, which have the same y, to both sums; `g` is the first row's.
template <typename T, int Rows = 1>
LOPT_INLINE void add_squares(const TensorStep<T>& c, const Tile& tile, const Row& row, int64_t e, const T* g,
                             int64_t n) {
  using V = Vec<T>;
  constexpr int W = kLanes<T>;
  const Loops& l = c.tensor.loops;
  const V scale = splat(c.grad_scale);
  T* y = c.y_sums + ((row.batch0 + tile.row_tile) * l.batch1 + row.batch1) * c.tiling.run + e;
  T* x = c.x_sums + tile.run_tile * c.x_size + row.o * l.batch2;
  V total[Rows] = {};
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    V squares = load(y + i);
    for (int r = 0; r < Rows; ++r) {
      const V a = load(g + r * c.tiling.run + i) * scale, square = a * a;
      squares += square;
      total[r] += square;
    }
    store(y + i, squares);
  }
  if (i < n) {
    V squares = load_n(y + i, n - i);
    for (int r = 0; r < Rows; ++r) {
      const V a = load_n(g + r * c.tiling.run + i, n - i) * scale, square = a * a;
      squares += square;
      total[r] += square;
    }
    store_n(y + i, squares, n - i);
  }
  if (l.batch2 == 1) {
    for (int r = 0; r < Rows; ++r) x[r] += sum<T>(total[r]);
    return;
  }
  int64_t phase = e % l.batch2;
  for (i = 0; i < n; ++i) {
    const T a = g[i] * c.grad_scale;
    x[phase] += a * a;
    if (++phase == l.batch2) phase = 0;
  }
}

template <typename T>
void factor_statistics(const TensorStep<T>& c, int64_t index) {
  const Tile tile = tile_at(c, index);
  const Loops& l = c.tensor.loops;
  clear_factor_sums(c, tile);
  const T* grad = static_cast<const T*>(c.tensor.grad.data);
  Row row = row_at(l, tile.row_begin);
  if (direct<T>(c.tensor.grad) && l.batch1 == 1 && l.batch2 == 1) {
    // Several rows at a time: processors read more from memory where it comes in several streams.
    constexpr int kRows = 4;
    const int64_t e = tile.run_begin, n = tile.run_end - e;
    while (row.o < tile.row_end) {
      const T* g = grad + row.o * c.tiling.run + e;
      const bool together = row.o + kRows <= tile.row_end && row.x + kRows <= l.x;
      if (together)
        add_squares<T, kRows>(c, tile, row, e, g, n);
      else
        add_squares(c, tile, row, e, g, n);
      for (int r = 0; r < (together ? kRows : 1); ++r) advance(l, row);
    }
    return;
  }
  T buffer[kSegment];
  const int64_t longest = direct<T>(c.tensor.grad) ? c.tiling.run : kSegment;
  for_each_segment(c, tile, longest, false, [&](const Row& row, int64_t e, int64_t n, int64_t) {
    add_squares(c, tile, row, e, gather(c.tensor, c.tensor.grad, row.o * c.tiling.run + e, n, buffer), n);
  });
}

template <typename T>
double square_sum(const TensorStep<T>& c, int64_t index) {
  using V = Vec<T>;
  constexpr int W = kLanes<T>;
  const Tile tile = tile_at(c, index);
  T buffer[kSegment];
  double total = 0;
  for_each_segment(c, tile, kSegment, true, [&](const Row& row, int64_t e, int64_t n, int64_t) {
    const T* g = gather(c.tensor, c.tensor.grad, row.o * c.tiling.run + e, n, buffer);
    const V scale = splat(c.grad_scale);
    V part = {};
    int64_t i = 0;
    for (; i + W <= n; i += W) {
      const V a = load(g + i) * scale;
      part += a * a;
    }
    if (i < n) {
      const V a = load_n(g + i, n - i) * scale;
      part += a * a;
    }
    total += double(sum<T>(part));
  });
  return total;
}

// ---- between passes 1 and 2: accumulators and factors ----

template <typename T>
void move_accumulator(const TensorStep<T>& c, T* accumulator, int64_t size, const T* sums, T count) {
  for (int k = 0; k < kFactored; ++k) {
    T* a = accumulator + k * size;
    const T d = c.d_factored[k];
    for (int64_t i = 0; i < size; ++i) a[i] = average(a[i], d, sums[i] / count + T(kSquareEpsilon));
  }
}

template <typename T>
void move_factors(const TensorStep<T>& c, const T* x_sums, T x_count, const T* y_sums, T y_count) {
  move_accumulator(c, c.x_accumulator, c.x_size, x_sums, x_count);
  move_accumulator(c, c.y_accumulator, c.y_size, y_sums, y_count);
}

template <typename T>
void add_factor_sums(const TensorStep<T>& c) {
  const Loops& l = c.tensor.loops;
  const Tiling& t = c.tiling;
  for (int64_t tile = 1; tile < t.run_tiles; ++tile)
    for (int64_t i = 0; i < c.x_size; ++i) c.x_sums[i] += c.x_sums[tile * c.x_size + i];

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
}

// What the columns of one accumulator (raw and inverse root, normalised) add to the hidden units, from `bias`
// on.
template <typename T>
void add_bias(const TensorStep<T>& c, const T* accumulator, int64_t size, int raw_column, int root_column,
              T* bias, int64_t stride) {
  using V = Vec<T>;
  constexpr int W = kLanes<T>;
  const int hidden = c.hidden_size;
  for (int k = 0; k < kFactored; ++k) {
    const T* a = accumulator + k * size;
    T* roots = c.scratch;
    inverse_roots(a, size, T(kFactorEpsilon), roots);
    const T raw_scale = T(1.0 / std::sqrt(mean_square(a, size) + kNormaliserEpsilon));
    const T root_scale = T(1.0 / std::sqrt(mean_square(roots, size) + kNormaliserEpsilon));
    for (int j = 0; j < hidden; ++j) {
      const V raw = splat(T(raw_scale * c.theta[(raw_column + k) * hidden + j]));
      const V root = splat(T(root_scale * c.theta[(root_column + k) * hidden + j]));
      T* b = bias + j * stride;
      int64_t i = 0;
      for (; i + W <= size; i += W) store(b + i, load(b + i) + (raw * load(a + i) + root * load(roots + i)));
      if (i < size)
        store_n(
            b + i,
            load_n(b + i, size - i) + (raw * load_n(a + i, size - i) + root * load_n(roots + i, size - i)),
            size - i);
    }
  }
}

template <typename T>
void fold_factors(const TensorStep<T>& c) {
  const Loops& l = c.tensor.loops;
  for (int k = 0; k < kFactored; ++k) {
    const T *x = c.x_accumulator + k * c.x_size, *y = c.y_accumulator + k * c.y_size;
    T *x_factor = c.x_factor + k * c.x_stride, *y_factor = c.y_factor + k * c.y_stride;
    if (l.x_is_row) {
      row_factor(x, l.batch0, l.x, l.batch1 * l.batch2, x_factor);
      for (int64_t i = 0; i < c.y_size; ++i) y_factor[i] = factor_of(y[i]);
    } else {
      row_factor(y, l.batch0 * l.batch1, l.y, l.batch2, y_factor);
      for (int64_t i = 0; i < c.x_size; ++i) x_factor[i] = factor_of(x[i]);
    }
  }
  for (int j = 0; j < c.hidden_size; ++j) {
    for (int64_t i = 0; i < c.x_size; ++i) c.x_bias[j * c.x_stride + i] = c.b0[j];
    __builtin_memset(c.y_bias + j * c.y_stride, 0, size_t(c.y_size) * sizeof(T));
  }
  add_bias(c, c.x_accumulator, c.x_size, l.x_is_row ? kRow : kCol, l.x_is_row ? kRsqrtRow : kRsqrtCol,
           c.x_bias, c.x_stride);
  add_bias(c, c.y_accumulator, c.y_size, l.x_is_row ? kCol : kRow, l.x_is_row ? kRsqrtCol : kRsqrtRow,
           c.y_bias, c.y_stride);
}

// ---- features ----

// One segment: pointers to its first element.
template <typename T>
struct Segment {
  const T *g, *p;
  T* out;
  T* m[kMomenta];
  T* v;
  T* d[kFactored];        // diagonal accumulators (unfactored)
  const T* y[kFactored];  // row_scalar: y factors; expanded: products of both factors
  T x[kFactored];         // row_scalar: x factors
  const T*
      w_factored;  // first-layer weights of the factored features, times the row's factors (pass 3, exact)
};

template <typename T>
LOPT_INLINE Segment<T> segment_at(const TensorStep<T>& c, int64_t start) {
  Segment<T> s = {};
  for (int k = 0; k < kMomenta; ++k) s.m[k] = c.momentum + k * c.momentum_stride + start;
  s.v = c.second_moment + start;
  if (c.diagonal)
    for (int k = 0; k < kFactored; ++k) s.d[k] = c.diagonal + k * c.n + start;
  return s;
}

// Products of the factors, and sums of the biases, of both axes for elements e .. e + n (or `rows` whole
// rows).
template <typename T>
void expand(const TensorStep<T>& c, Row row, int64_t e, int64_t n, int64_t rows, T* products, T* biases,
            int64_t stride) {
  using V = Vec<T>;
  constexpr int W = kLanes<T>;
  const Loops& l = c.tensor.loops;
  const int hidden = biases ? c.hidden_size : 0;
  int64_t at = 0;
  for (int64_t r = 0; r < rows; ++r, advance(l, row)) {
    const int64_t length = rows > 1 ? c.tiling.run : n;
    const int64_t x0 = x_offset(c, row), y0 = y_offset(c, row);
    for (int64_t i = 0; i < length;) {
      // A unit: along it the x index is constant (batch2 == 1) or moves with the element.
      const int64_t phase = (e + i) % l.batch2;
      const int64_t unit = l.batch2 == 1 ? length - i : smaller(l.batch2 - phase, length - i);
      for (int64_t u = 0; u < unit; u += W) {  // writes whole vectors: what follows is written later
        const int64_t y = y0 + e + i + u, x = x0 + phase + (l.batch2 == 1 ? 0 : u), to = at + i + u;
        for (int k = 0; k < kFactored; ++k) {
          const T* xf = c.x_factor + k * c.x_stride + x;
          const V factor = l.batch2 == 1 ? splat(*xf) : load(xf);
          store<T>(products + k * stride + to, factor * load(c.y_factor + k * c.y_stride + y));
        }
        for (int j = 0; j < hidden; ++j) {
          const T* xb = c.x_bias + j * c.x_stride + x;
          const V bias = l.batch2 == 1 ? splat(*xb) : load(xb);
          store<T>(biases + j * stride + to, bias + load(c.y_bias + j * c.y_stride + y));
        }
      }
      i += unit;
    }
    at += length;
  }
}

// Rates of the accumulators as vectors, and how they move. Slow: those of the second moment and of all
// momenta but the first are at most 1/2. The first momentum is often meta-trained to forget at once.
template <typename T, bool Slow>
struct Rates {
  Vec<T> grad_scale, momentum[kMomenta], second_moment, factored[kFactored];
  explicit LOPT_INLINE Rates(const TensorStep<T>& c)
      : grad_scale(splat(c.grad_scale)), second_moment(splat(c.d_second_moment)) {
    for (int k = 0; k < kMomenta; ++k) momentum[k] = splat(c.d_momentum[k]);
    for (int k = 0; k < kFactored; ++k) factored[k] = splat(c.d_factored[k]);
  }
  LOPT_INLINE Vec<T> move_momentum(int k, Vec<T> m, Vec<T> g) const {
    return Slow && k > 0 ? slow_average(m, momentum[k], g) : average(m, momentum[k], g);
  }
  LOPT_INLINE Vec<T> move_second_moment(Vec<T> v, Vec<T> square) const {
    return Slow ? slow_average(v, second_moment, square) : average(v, second_moment, square);
  }
};

// Asks for the line that the streams of a segment reach kAhead bytes further on: six to eleven streams with
// tens of operations for each line are more than the processor's own prefetchers keep up with.
constexpr int64_t kAhead = 1024;

template <typename T, Mode M>
LOPT_INLINE void prefetch_bytes(const Segment<T>& s, int64_t i, int64_t begin, int64_t end) {
  for (int64_t line = begin; line < end; line += 64) {
    const int64_t at = i + line / int64_t(sizeof(T));
    __builtin_prefetch(s.g + at);
    __builtin_prefetch(s.p + at);
    __builtin_prefetch(s.v + at);
    for (int k = 0; k < kMomenta; ++k) __builtin_prefetch(s.m[k] + at);
    if (M == Mode::unfactored)
      for (int k = 0; k < kFactored; ++k) __builtin_prefetch(s.d[k] + at);
  }
}
template <typename T, Mode M, int N>
LOPT_INLINE void prefetch(const Segment<T>& s, int64_t i) {
  prefetch_bytes<T, M>(s, i, kAhead, kAhead + N * kVectorBytes);
}

// Reads N vectors of elements from i on (the first `lanes` of one vector where Tail), moves the accumulators
// on, writes them back where Write, and calls emit(Index<feature>, vectors) for each feature. `p` receives
// the parameters.
//
// Each decay's features follow one another, so that few vectors live at a time. Where Folded, the products of
// g and m with other features are left to the caller, on whose weights they cost less: instead of the ratios
// and the factored features it gets emit.gradient(g, factors) and emit.momentum(Index<k>, m, 1/sqrt(v),
// factors), where the factors lack those of the row (row_scalar).
template <typename T, Mode M, int N, bool Tail, bool Write, bool Folded, bool Slow, typename Emit>
LOPT_INLINE void features(const Rates<T, Slow>& rate, const Segment<T>& s, int64_t i, int64_t lanes,
                          Vec<T>* p, Emit emit) {
  using V = Vec<T>;
  constexpr int W = kLanes<T>;
  const auto in = [&](const T* from, int n) __attribute__((always_inline)) {
    return Tail ? load_n(from + i, lanes) : load(from + i + n * W);
  };
  const auto out = [&](T* to, int n, V x) __attribute__((always_inline)) {
    if (Tail)
      store_n<T>(to + i, x, lanes);
    else
      store<T>(to + i + n * W, x);
  };
  if (!Tail) prefetch<T, M, N>(s, i);
  V g[N], v[N], r[N], f[N], m[N];
  for (int n = 0; n < N; ++n) {
    g[n] = in(s.g, n) * rate.grad_scale;
    v[n] = rate.move_second_moment(in(s.v, n), g[n] * g[n]);
    if (Write) out(s.v, n, v[n]);
  }
  const auto factor = [&](int k, int n) __attribute__((always_inline)) {
    const V y = in(s.y[k], n);
    return M == Mode::row_scalar && !Folded ? y * s.x[k] : y;
  };
  if constexpr (Folded && M != Mode::unfactored)
    emit.gradient(g, factor);
  else
    emit(Index<fG>{}, g);
  emit(Index<fV>{}, v);
  for (int n = 0; n < N; ++n) r[n] = rsqrt<T>(v[n] + T(kRmsEpsilon));
  emit(Index<fRsqrtV>{}, r);
  for (int n = 0; n < N; ++n) p[n] = in(s.p, n);
  emit(Index<fP>{}, p);
  const auto decay = [&](auto k) __attribute__((always_inline)) {
    for (int n = 0; n < N; ++n) {
      m[n] = rate.move_momentum(k.value, in(s.m[k.value], n), g[n]);
      if (Write) out(s.m[k.value], n, m[n]);
    }
    if constexpr (!Folded) {
      emit(Index<fM + k.value>{}, m);
      for (int n = 0; n < N; ++n) f[n] = m[n] * r[n];
      emit(Index<fMRsqrtV + k.value>{}, f);
    }
    V scale_g[N], scale_m[N];
    if constexpr (M == Mode::unfactored) {
      V d[N], root[N];
      for (int n = 0; n < N; ++n) {
        d[n] = in(s.d[k.value], n);
        d[n] = average(d[n], rate.factored[k.value], g[n] * g[n] + T(kSquareEpsilon));
        if (Write) out(s.d[k.value], n, d[n]);
        scale_g[n] = rsqrt<T>(at_least<T>(splat(T(kFactorFloor)), d[n] + T(kDiagonalEpsilon)));
        scale_m[n] = rsqrt<T>(d[n] + T(kRmsEpsilon));
        root[n] = rsqrt<T>(d[n] + T(kFactorEpsilon));
      }
      emit(Index<fDiagonal + k.value>{}, d);
      emit(Index<fRsqrtDiagonal + k.value>{}, root);
    } else {
      for (int n = 0; n < N; ++n) scale_g[n] = scale_m[n] = factor(k.value, n);
    }
    if constexpr (!Folded || M == Mode::unfactored) {
      for (int n = 0; n < N; ++n) f[n] = g[n] * scale_g[n];
      emit(Index<fFacG + k.value>{}, f);
    }
    if constexpr (Folded) {
      emit.momentum(k, m, r, scale_m);
    } else {
      for (int n = 0; n < N; ++n) f[n] = m[n] * scale_m[n];
      emit(Index<fFacM + k.value>{}, f);
    }
  };
  decay(Index<0>{});
  decay(Index<1>{});
  decay(Index<2>{});
}

// Sums of squares in vectors of T, moved to double before they grow long.
template <typename T>
struct SquareSums {
  Vec<T> part[kFeatures] = {};
  double total[kFeatures] = {};
  int64_t count = 0;

  template <bool Tail, int N, typename K>
  LOPT_INLINE void add(K feature, const Vec<T>* x, int64_t lanes) {
    // Only inverse roots of accumulators differ from zero where the input is zero, as it is behind a tail.
    constexpr bool masked = Tail && (K::value == fRsqrtV || K::value >= fRsqrtDiagonal);
    for (int n = 0; n < N; ++n) {
      const Vec<T> y = masked ? first_lanes<T>(x[n], lanes) : x[n];
      part[feature.value] += y * y;
    }
  }
  LOPT_INLINE void flush(int64_t elements, int features) {
    count += elements;
    if (count < 8192 && elements) return;
    for (int f = 0; f < features; ++f) {
      total[f] += double(sum<T>(part[f]));
      part[f] = Vec<T>{};
    }
    count = 0;
  }
};

template <typename T>
LOPT_INLINE void keep_sums(const TensorStep<T>& c, int64_t tile, SquareSums<T>& sums) {
  sums.flush(0, c.features());
  for (int f = 0; f < c.features(); ++f) c.sums[tile * kFeatures + f] = sums.total[f];
}

// Segments of a tile with everything that the features need, for passes 2 and 3. f(segment, n, row, biases,
// start).
template <typename T, Mode M, typename F>
LOPT_INLINE void for_each_feature_segment(const TensorStep<T>& c, const Tile& tile, int64_t longest,
                                          T* products, T* biases, int64_t stride, F f) {
  for_each_segment(c, tile, longest, M == Mode::expanded,
                   [&](const Row& row, int64_t e, int64_t n, int64_t rows) __attribute__((always_inline)) {
                     const int64_t start = row.o * c.tiling.run + e;
                     Segment<T> s = segment_at(c, start);
                     if (M == Mode::expanded) {
                       expand(c, row, e, n, rows, products, biases, stride);
                       for (int k = 0; k < kFactored; ++k) s.y[k] = products + k * stride;
                     } else if (M == Mode::row_scalar) {
                       for (int k = 0; k < kFactored; ++k) {
                         s.y[k] = c.y_factor + k * c.y_stride + y_offset(c, row) + e;
                         s.x[k] = c.x_factor[k * c.x_stride + row.o];
                       }
                     }
                     f(s, row, e, n, rows, start);
                   });
}

template <typename T>
LOPT_INLINE bool rows_are_long(const TensorStep<T>& c) {
  return c.tensor.loops.batch2 == 1 && c.tiling.run >= 48;
}

// ---- pass 2 ----

// Sums of the squares of the features. The squares are formed from m^2 and 1 / (v + ...) rather than from the
// features: 25 products instead of 40 for each vector. `factored_sums`: those of the factored features, which
// lack the square of their row's factor.
template <typename T, Mode M, bool Tail, bool Slow>
LOPT_INLINE void add_feature_squares(const Rates<T, Slow>& rate, const Segment<T>& s, int64_t i,
                                     int64_t lanes, Vec<T>* sums, Vec<T>* factored_sums) {
  using V = Vec<T>;
  const auto in = [&](const T* from) __attribute__((always_inline)) {
    return Tail ? load_n(from + i, lanes) : load(from + i);
  };
  const auto inverse_of = [&](V x)
                              __attribute__((always_inline)) {  // zero where the input is behind the tail
                                return Tail ? first_lanes<T>(reciprocal<T>(x), lanes) : reciprocal<T>(x);
                              };
  if (!Tail) prefetch<T, M, 1>(s, i);
  const V g = in(s.g) * rate.grad_scale, p = in(s.p), g_square = g * g;
  const V v = rate.move_second_moment(in(s.v), g_square), inverse = inverse_of(v + T(kRmsEpsilon));
  sums[fG] += g_square;
  sums[fP] += p * p;
  sums[fV] += v * v;
  sums[fRsqrtV] += inverse;
  for (int k = 0; k < kMomenta; ++k) {
    const V m = rate.move_momentum(k, in(s.m[k]), g), m_square = m * m;
    sums[fM + k] += m_square;
    if constexpr (M == Mode::unfactored) {
      // As g * (g / d) rather than g^2 / d: 0 where g^2 is beyond the range, as the feature is.
      const V d = average(in(s.d[k]), rate.factored[k], g_square + T(kSquareEpsilon));
      sums[fMRsqrtV + k] += m * (m * inverse);
      sums[fDiagonal + k] += d * d;
      sums[fRsqrtDiagonal + k] += inverse_of(d + T(kFactorEpsilon));
      factored_sums[k] +=
          g * (g * reciprocal<T>(at_least<T>(splat(T(kFactorFloor)), d + T(kDiagonalEpsilon))));
      factored_sums[kFactored + k] += m * (m * reciprocal<T>(d + T(kRmsEpsilon)));
    } else {
      const V y = in(s.y[k]), y_square = y * y;
      sums[fMRsqrtV + k] += m_square * inverse;
      factored_sums[k] += g_square * y_square;
      factored_sums[kFactored + k] += m_square * y_square;
    }
  }
}

template <typename T, Mode M, bool Slow>
void feature_statistics_in(const TensorStep<T>& c, int64_t index) {
  using V = Vec<T>;
  constexpr int W = kLanes<T>;
  const Tile tile = tile_at(c, index);
  const Rates<T, Slow> rate(c);
  SquareSums<T> sums;
  T g_buffer[kSegment], p_buffer[kSegment];
  T products[M == Mode::expanded ? kFactored * (kSegment + kPadding) : 1];
  const int64_t longest = M == Mode::expanded || !all_direct(c) ? kSegment : 8192;
  for_each_feature_segment<T, M>(c, tile, longest, products, static_cast<T*>(nullptr), kSegment + kPadding,
                                 [&](Segment<T>& s, const Row&, int64_t, int64_t n, int64_t,
                                     int64_t start) __attribute__((always_inline)) {
                                   s.g = gather(c.tensor, c.tensor.grad, start, n, g_buffer);
                                   s.p = gather(c.tensor, c.tensor.param, start, n, p_buffer);
                                   int64_t i = 0;
                                   V factored[2 * kFactored] = {};
                                   for (; i + W <= n; i += W)
                                     add_feature_squares<T, M, false>(rate, s, i, W, sums.part, factored);
                                   if (i < n)
                                     add_feature_squares<T, M, true>(rate, s, i, n - i, sums.part, factored);
                                   for (int k = 0; k < kFactored; ++k) {
                                     const T x = M == Mode::row_scalar ? s.x[k] * s.x[k] : T(1);
                                     sums.part[fFacG + k] += x * factored[k];
                                     sums.part[fFacM + k] += x * factored[kFactored + k];
                                   }
                                   sums.flush(n, c.features());
                                 });
  keep_sums(c, index, sums);
}

template <typename T, Mode M>
void feature_statistics_as(const TensorStep<T>& c, int64_t tile) {
  return c.slow ? feature_statistics_in<T, M, true>(c, tile) : feature_statistics_in<T, M, false>(c, tile);
}

template <typename T>
void feature_statistics(const TensorStep<T>& c, int64_t tile) {
  if (!c.tensor.loops.factored) return feature_statistics_as<T, Mode::unfactored>(c, tile);
  if (rows_are_long(c)) return feature_statistics_as<T, Mode::row_scalar>(c, tile);
  return feature_statistics_as<T, Mode::expanded>(c, tile);
}

// ---- pass 3, narrow networks: all units of all layers in registers ----

template <typename T, int H>
struct Biases {
  const T* y[H];  // beside the elements; null where unfactored
  T x[H];         // constant along the row (row_scalar, unfactored)
};

// a[j] += w[j] * x
template <typename T, int H, int N>
LOPT_INLINE void add_products(const T* w, const Vec<T>* x, Vec<T> (*a)[N]) {
  for (int j = 0; j < H; ++j) {
    const Vec<T> weight = splat(w[j]);
    for (int n = 0; n < N; ++n) a[j][n] += weight * x[n];
  }
}

// The first layer where features need no clipping and no sums: takes them as `features` with Folded gives
// them.
template <typename T, int H, int N>
struct ExactLayer {
  using V = Vec<T>;
  const T *w0, *w_factored;
  V (*a)[N];

  template <int F>
  LOPT_INLINE void operator()(Index<F>, const V* x) const {
    add_products<T, H, N>(weights<F>(), x, a);
  }
  // g * (w + sum over k of w_k y_k): saves the products g * y_k.
  template <typename Factor>
  LOPT_INLINE void gradient(const V* g, Factor factor) const {
    for (int j = 0; j < H; ++j) {
      V w[N];
      for (int n = 0; n < N; ++n) w[n] = splat(weights<fG>()[j]);
      for (int k = 0; k < kFactored; ++k) {
        const V weight = splat(w_factored[k * H + j]);
        for (int n = 0; n < N; ++n) w[n] += weight * factor(k, n);
      }
      for (int n = 0; n < N; ++n) a[j][n] += w[n] * g[n];
    }
  }
  // m * (w + w_r r + w_y y): saves the products m * r and m * y.
  template <int K>
  LOPT_INLINE void momentum(Index<K>, const V* m, const V* r, const V* y) const {
    for (int j = 0; j < H; ++j) {
      V w[N];
      for (int n = 0; n < N; ++n) w[n] = splat(weights<fM + K>()[j]);
      add_weight<fMRsqrtV + K>(j, r, w);
      add_weight<fFacM + K>(j, y, w);
      for (int n = 0; n < N; ++n) a[j][n] += w[n] * m[n];
    }
  }

 private:
  template <int F>
  LOPT_INLINE const T* weights() const {
    return F >= fFacG && F < kFactoredFeatures ? w_factored + (F - fFacG) * H : w0 + F * H;
  }
  template <int F>
  LOPT_INLINE void add_weight(int j, const V* x, V* w) const {
    const V weight = splat(weights<F>()[j]);
    for (int n = 0; n < N; ++n) w[n] += weight * x[n];
  }
};

// Hidden units of the first layer for N vectors of elements, before ReLU; moves the state on.
template <typename T, int H, Mode M, bool Lagged, int N, bool Tail>
LOPT_INLINE void first_layer(const TensorStep<T>& c, const Rates<T, true>& rate, const Segment<T>& s,
                             const Biases<T, H>& bias, int64_t i, int64_t lanes, SquareSums<T>* sums,
                             Vec<T> (*a)[N], Vec<T>* p) {
  using V = Vec<T>;
  constexpr int W = kLanes<T>;
  const T *w0 = c.w0, *w_factored = s.w_factored, (*limits)[2] = c.limits;
  // Hide where the weights lie, so that they stay broadcast loads: hoisted, they would be spilled as whole
  // vectors.
  __asm__("" : "+r"(w0), "+r"(w_factored), "+r"(limits));
  for (int j = 0; j < H; ++j)
    for (int n = 0; n < N; ++n) {
      if (M == Mode::unfactored)
        a[j][n] = splat(bias.x[j]);
      else
        a[j][n] = Tail ? load_n(bias.y[j] + i, lanes) : load(bias.y[j] + i + n * W);
      if (M == Mode::row_scalar) a[j][n] += bias.x[j];
    }
  if constexpr (Lagged) {
    features<T, M, N, Tail, true, false>(rate, s, i, lanes, p,
                                         [&](auto f, const V* x) __attribute__((always_inline)) {
                                           sums->template add<Tail, N>(f, x, lanes);
                                           const T* limit = limits[f.value];
                                           const V low = splat(limit[0]), high = splat(limit[1]);
                                           V clipped[N];
                                           for (int n = 0; n < N; ++n)
                                             clipped[n] = at_most<T>(high, at_least<T>(low, x[n]));
                                           add_products<T, H, N>(w0 + f.value * H, clipped, a);
                                         });
  } else {
    features<T, M, N, Tail, true, true>(rate, s, i, lanes, p, ExactLayer<T, H, N>{w0, w_factored, a});
  }
}

// The other layers and the output.
template <typename T, int H, int Layers, int N, bool Tail>
LOPT_INLINE void finish(const TensorStep<T>& c, T* out, int64_t lanes, Vec<T> (*a)[N], const Vec<T>* p) {
  using V = Vec<T>;
  constexpr int W = kLanes<T>;
  const T *w1 = c.w1, *b1 = c.b1, *w_out = c.w_out;
  __asm__("" : "+r"(w1), "+r"(b1), "+r"(w_out));
  for (int j = 0; j < H; ++j)
    for (int n = 0; n < N; ++n) a[j][n] = relu<T>(a[j][n]);
  if constexpr (Layers == 2) {
    V h[H][N];
    for (int j = 0; j < H; ++j) {
      for (int n = 0; n < N; ++n) h[j][n] = splat(b1[j]);
      for (int k = 0; k < H; ++k) {
        const V w = splat(w1[k * H + j]);
        for (int n = 0; n < N; ++n) h[j][n] += w * a[k][n];
      }
    }
    for (int j = 0; j < H; ++j)
      for (int n = 0; n < N; ++n) a[j][n] = relu<T>(h[j][n]);
  }
  V direction[N], magnitude[N];
  for (int n = 0; n < N; ++n) direction[n] = splat(c.b_out[0]), magnitude[n] = splat(c.b_out[1]);
  for (int k = 0; k < H; ++k) {
    const V wd = splat(w_out[2 * k]), wm = splat(w_out[2 * k + 1]);
    for (int n = 0; n < N; ++n) direction[n] += wd * a[k][n], magnitude[n] += wm * a[k][n];
  }
  for (int n = 0; n < N; ++n) {
    const V result = c.param_scale * p[n] - direction[n] * exp2(magnitude[n]);
    if (Tail)
      store_n<T>(out, result, lanes);
    else
      store<T>(out + n * W, result);
  }
}

// The elements behind the last whole block. Not inlined, and with copies of what the loop over blocks keeps
// in registers: the compiler would keep fewer.
template <typename T, int H, int Layers, Mode M, bool Lagged>
__attribute__((noinline)) void apply_tail(const TensorStep<T>& c, Segment<T> s, Biases<T, H> bias, int64_t i,
                                          int64_t n, SquareSums<T>* sums) {
  constexpr int W = kLanes<T>;
  const Rates<T, true> rate(c);
  Vec<T> a[H][1], p[1];
  for (; i < n; i += W) {
    const int64_t lanes = smaller(W, n - i);
    first_layer<T, H, M, Lagged, 1, true>(c, rate, s, bias, i, lanes, sums, a, p);
    finish<T, H, Layers, 1, true>(c, s.out + i, lanes, a, p);
  }
}

template <typename T, int H, int Layers, Mode M, bool Lagged>
LOPT_INLINE void apply_elements(const TensorStep<T>& c, const Rates<T, true>& rate, const Segment<T>& s,
                                const Biases<T, H>& bias, int64_t n, SquareSums<T>* sums) {
  constexpr int W = kLanes<T>;
  constexpr int N = H >= 8 ? 1 : 8 / H;  // eight independent chains of products hide their latency
  Vec<T> a[H][N], p[N];
  int64_t i = 0;
  for (; i + N * W <= n; i += N * W) {
    first_layer<T, H, M, Lagged, N, false>(c, rate, s, bias, i, W, sums, a, p);
    finish<T, H, Layers, N, false>(c, s.out + i, W, a, p);
  }
  if (i < n) apply_tail<T, H, Layers, M, Lagged>(c, s, bias, i, n, sums);
}

// Sums of pass 1 for the next step, where pass 3 is the only one.
template <typename T>
LOPT_INLINE void add_squares_of_rows(const TensorStep<T>& c, const Tile& tile, Row row, int64_t e, const T* g,
                                     int64_t n, int64_t rows) {
  if (!c.tensor.loops.factored) return;
  if (rows == 1) return add_squares(c, tile, row, e, g, n);
  for (int64_t r = 0; r < rows; ++r, advance(c.tensor.loops, row))
    add_squares(c, tile, row, int64_t(0), g + r * c.tiling.run, c.tiling.run);
}

template <typename T, int H, int Layers, Mode M, bool Lagged>
void apply_narrow(const TensorStep<T>& c, int64_t index) {
  const Tile tile = tile_at(c, index);
  const Rates<T, true> rate(c);
  SquareSums<T> sums;
  T g_buffer[kSegment], p_buffer[kSegment], out_buffer[kSegment];
  constexpr int64_t stride = kSegment + kPadding;
  T products[M == Mode::expanded ? kFactored * stride : 1], biases[M == Mode::expanded ? H * stride : 1];
  const bool in_place = direct<T>(c.tensor.output);
  const int64_t longest = M == Mode::expanded || !all_direct(c) ? kSegment : Lagged ? 2048 : 8192;
  if (Lagged && c.tensor.loops.factored) clear_factor_sums(c, tile);
  for_each_feature_segment<T, M>(
      c, tile, longest, products, biases, stride,
      [&](Segment<T>& s, const Row& row, int64_t e, int64_t n, int64_t rows, int64_t start)
          __attribute__((always_inline)) {
            s.g = gather(c.tensor, c.tensor.grad, start, n, g_buffer);
            s.p = gather(c.tensor, c.tensor.param, start, n, p_buffer);
            s.out = in_place ? static_cast<T*>(c.tensor.output.data) + start : out_buffer;
            if (Lagged) add_squares_of_rows(c, tile, row, e, s.g, n, rows);
            T w_factored[2 * kFactored * H];
            s.w_factored = c.w0 + fFacG * H;
            if (M == Mode::row_scalar && !Lagged) {
              for (int f = 0; f < 2 * kFactored; ++f)
                for (int j = 0; j < H; ++j)
                  w_factored[f * H + j] = s.w_factored[f * H + j] * s.x[f % kFactored];
              s.w_factored = w_factored;
            }
            Biases<T, H> bias = {};
            for (int j = 0; j < H; ++j) {
              if (M == Mode::unfactored) {
                bias.x[j] = c.b0[j];
              } else if (M == Mode::expanded) {
                bias.y[j] = biases + j * stride;
              } else {
                bias.y[j] = c.y_bias + j * c.y_stride + y_offset(c, row) + e;
                bias.x[j] = c.x_bias[j * c.x_stride + row.o];
              }
            }
            apply_elements<T, H, Layers, M, Lagged>(c, rate, s, bias, n, Lagged ? &sums : nullptr);
            if (Lagged) sums.flush(n, c.features());
            if (!in_place) write(c.tensor, c.tensor.output, start, n, out_buffer);
          });
  if (Lagged) keep_sums(c, index, sums);
}

// ---- pass 3, any width: features and units of a short segment in memory that stays in the first-level cache
// ----

// Rows of the segment's arrays are this far apart: a whole vector may be written past the end of one.
constexpr int64_t kWideStride = kWideSegment + 16;

// out[j] = init(j) + sum over k of w[k, j] * in[k], then ReLU, for units j .. j + J at once, over one
// segment.
template <typename T, int J, bool Relu, typename Init>
LOPT_INLINE void dense_units(int inputs, int units, int j, const T* in, const T* w, T* out, Init init) {
  using V = Vec<T>;
  constexpr int W = kLanes<T>;
  constexpr int N = kVectorBytes == 64 ? 4 : 2;
  static_assert(kWideSegment % (N * W) == 0, "whole vectors");
  for (int64_t i = 0; i < kWideSegment; i += N * W) {
    V a[J][N];
    for (int q = 0; q < J; ++q)
      for (int n = 0; n < N; ++n) a[q][n] = init(j + q, i + n * W);
    for (int k = 0; k < inputs; ++k) {
      V x[N];
      for (int n = 0; n < N; ++n) x[n] = load(in + k * kWideStride + i + n * W);
      for (int q = 0; q < J; ++q) {
        const V weight = splat(w[int64_t(k) * units + j + q]);
        for (int n = 0; n < N; ++n) a[q][n] += weight * x[n];
      }
    }
    for (int q = 0; q < J; ++q)
      for (int n = 0; n < N; ++n)
        store<T>(out + (j + q) * kWideStride + i + n * W, Relu ? relu<T>(a[q][n]) : a[q][n]);
  }
}

template <typename T, bool Relu, typename Init>
LOPT_INLINE void dense(int inputs, int units, const T* in, const T* w, T* out, Init init) {
  int j = 0;
  for (; j + 4 <= units; j += 4) dense_units<T, 4, Relu>(inputs, units, j, in, w, out, init);
  for (; j + 2 <= units; j += 2) dense_units<T, 2, Relu>(inputs, units, j, in, w, out, init);
  for (; j < units; ++j) dense_units<T, 1, Relu>(inputs, units, j, in, w, out, init);
}

template <typename T, Mode M, bool Lagged>
void apply_wide(const TensorStep<T>& c, int64_t index) {
  using V = Vec<T>;
  constexpr int W = kLanes<T>;
  constexpr int64_t S = kWideSegment;
  const Tile tile = tile_at(c, index);
  const Rates<T, false> rate(c);
  SquareSums<T> sums;
  const int hidden = c.hidden_size;
  T g_buffer[S], p_buffer[S], out_buffer[S], p_values[S] = {}, products[kFactored * kWideStride];
  T inputs[kFeatures * kWideStride] = {}, outputs[2 * kWideStride];
  // Hidden units of both layers, and the biases of the factored columns for them.
  T* units = static_cast<T*>(__builtin_alloca(size_t(3 * hidden * kWideStride) * sizeof(T)));
  T *first = units, *second = units + hidden * kWideStride, *biases = units + 2 * hidden * kWideStride;
  __builtin_memset(biases, 0, size_t(hidden * kWideStride) * sizeof(T));
  if (Lagged && c.tensor.loops.factored) clear_factor_sums(c, tile);
  for_each_feature_segment<T, M>(
      c, tile, S, products, biases, kWideStride,
      [&](Segment<T>& s, const Row& row, int64_t e, int64_t n, int64_t rows, int64_t start) {
        s.g = gather(c.tensor, c.tensor.grad, start, n, g_buffer);
        s.p = gather(c.tensor, c.tensor.param, start, n, p_buffer);
        if (Lagged) add_squares_of_rows(c, tile, row, e, s.g, n, rows);
        int64_t i = 0;
        const auto keep = [&](auto f, const V* x, int64_t lanes, auto tail) __attribute__((always_inline)) {
          V y = x[0];
          if constexpr (Lagged) {
            sums.template add<decltype(tail)::value != 0, 1>(f, x, lanes);
            const T* limit = c.limits[f.value];
            y = at_most<T>(splat(limit[1]), at_least<T>(splat(limit[0]), y));
          }
          store<T>(inputs + f.value * kWideStride + i, y);
        };
        V p[1];
        for (; i + W <= n; i += W) {
          features<T, M, 1, false, true, false>(
              rate, s, i, W, p,
              [&](auto f, const V* x) __attribute__((always_inline)) { keep(f, x, W, Index<0>{}); });
          store<T>(p_values + i, p[0]);
        }
        if (i < n) {
          features<T, M, 1, true, true, false>(
              rate, s, i, n - i, p,
              [&](auto f, const V* x) __attribute__((always_inline)) { keep(f, x, n - i, Index<1>{}); });
          store<T>(p_values + i, p[0]);
        }
        if (Lagged) sums.flush(n, c.features());

        dense<T, true>(c.features(), hidden, inputs, c.w0, first,
                       [&](int j, int64_t at) __attribute__((always_inline)) {
                         if (M == Mode::expanded) return load(biases + j * kWideStride + at);
                         if (M == Mode::unfactored) return splat(c.b0[j]);
                         return load(c.y_bias + j * c.y_stride + y_offset(c, row) + e + at) +
                                c.x_bias[j * c.x_stride + row.o];
                       });
        const T* last = first;
        if (c.hidden_layers == 2) {
          dense<T, true>(hidden, hidden, first, c.w1, second,
                         [&](int j, int64_t) __attribute__((always_inline)) { return splat(c.b1[j]); });
          last = second;
        }
        dense<T, false>(hidden, 2, last, c.w_out, outputs,
                        [&](int o, int64_t) __attribute__((always_inline)) { return splat(c.b_out[o]); });

        const bool in_place = direct<T>(c.tensor.output);
        T* out = in_place ? static_cast<T*>(c.tensor.output.data) + start : out_buffer;
        for (i = 0; i < n; i += W) {
          const V result =
              c.param_scale * load(p_values + i) - load(outputs + i) * exp2(load(outputs + kWideStride + i));
          if (i + W <= n)
            store<T>(out + i, result);
          else
            store_n<T>(out + i, result, n - i);
        }
        if (!in_place) write(c.tensor, c.tensor.output, start, n, out_buffer);
      });
  if (Lagged) keep_sums(c, index, sums);
}

template <typename T, int H, int Layers, bool Lagged>
void apply_narrow_in(const TensorStep<T>& c, int64_t tile) {
  if (!c.tensor.loops.factored) return apply_narrow<T, H, Layers, Mode::unfactored, Lagged>(c, tile);
  if (rows_are_long(c)) return apply_narrow<T, H, Layers, Mode::row_scalar, Lagged>(c, tile);
  return apply_narrow<T, H, Layers, Mode::expanded, Lagged>(c, tile);
}

template <typename T, bool Lagged>
void apply_as(const TensorStep<T>& c, int64_t tile) {
  if constexpr (sizeof(T) == sizeof(float)) {
    // Other rates above 1/2 are rare: they go the way of the wide networks.
    switch (c.slow ? 10 * c.hidden_size + c.hidden_layers : 0) {
      case 21:
        return apply_narrow_in<T, 2, 1, Lagged>(c, tile);
      case 22:
        return apply_narrow_in<T, 2, 2, Lagged>(c, tile);
      case 41:
        return apply_narrow_in<T, 4, 1, Lagged>(c, tile);
      case 42:
        return apply_narrow_in<T, 4, 2, Lagged>(c, tile);
      case 81:
        return apply_narrow_in<T, 8, 1, Lagged>(c, tile);
      case 82:
        return apply_narrow_in<T, 8, 2, Lagged>(c, tile);
    }
  }
  if (!c.tensor.loops.factored) return apply_wide<T, Mode::unfactored, Lagged>(c, tile);
  if (rows_are_long(c)) return apply_wide<T, Mode::row_scalar, Lagged>(c, tile);
  return apply_wide<T, Mode::expanded, Lagged>(c, tile);
}

template <typename T>
void apply(const TensorStep<T>& c, int64_t tile) {
  return c.lagged ? apply_as<T, true>(c, tile) : apply_as<T, false>(c, tile);
}

}  // namespace

#define LOPT_STRING_(x) #x
#define LOPT_STRING(x) LOPT_STRING_(x)

namespace LOPT_ISA {
const Kernels& small_fc() {
  static constexpr Kernels kernels = {
      LOPT_STRING(LOPT_ISA),
      {factor_statistics<float>, add_factor_sums<float>, move_factors<float>, fold_factors<float>,
       feature_statistics<float>, apply<float>, square_sum<float>},
      {factor_statistics<double>, add_factor_sums<double>, move_factors<double>, fold_factors<double>,
       feature_statistics<double>, apply<double>, square_sum<double>},
  };
  return kernels;
}
}  // namespace LOPT_ISA
}  // namespace lopt
