// The work items of small_fc_lopt on GPUs, one block of kThreads threads each, written against a Block policy
// (kernels/common/device.h): cuda.cu runs them on the device, csrc/gpu_emulator.cc on the processor. Formulas
// and passes: README.md. Everything that is summed is summed in an order that depends on the shapes alone.
#pragma once

#include <utility>

#include "kernels/small_fc_lopt/gpu.h"

namespace lopt {

template <int I>
struct Index {
  static constexpr int value = I;
};

// Entries of the tables in constants.h: device code may use them as constants alone.
template <int... F>
LOPT_DEVICE int column_of_feature(int feature, std::integer_sequence<int, F...>) {
  int column = 0;
  ((column = feature == F ? Index<kColumnOfFeature[F]>::value : column), ...);
  return column;
}
LOPT_DEVICE int column_of_feature(int feature) {
  return column_of_feature(feature, std::make_integer_sequence<int, kFeatures>());
}
template <int I>
LOPT_DEVICE double timescale() {
  constexpr double value = kTimescales[I];
  return value;
}
template <int... I>
LOPT_DEVICE double timescale(int index, std::integer_sequence<int, I...>) {
  double value = 1;
  ((value = index == I ? timescale<I>() : value), ...);
  return value;
}

// Elements of one thread at a time in pass 3: as many as leave the units of a layer in 128 registers; with
// lagged statistics it keeps its sums there, too.
template <int H, bool Lagged>
constexpr int kElements = Lagged ? (H <= 4   ? 4
                                    : H <= 8 ? 2
                                             : 1)
                                 : (H <= 8    ? 4
                                    : H <= 16 ? 2
                                              : 1);

// Floats in shared memory for what threads keep while they walk down the rows: y biases, of
// some widths the y factors, too. Those of wider networks are read again for each row, next to which their
// products are many; lagged, the sums of their features lie here.
template <int H>
constexpr int kStaged = H <= 8    ? 4 * (H + kFactored) * kThreads
                        : H == 16 ? 2 * H * kThreads
                                  : kFeatures * kThreads;

// Numbers of the step and of the tensor, read once per item.
struct Numbers {
  float grad_scale;
  float momentum[kMomenta], second_moment, factored[kFactored];  // 1 - decay
  int64_t t;
  bool first;            // t is 0
  bool skip;             // found_inf
  int32_t phase, items;  // of the item, of its phase
  int32_t zero;
};

// A tile and how the threads of a block lie on it.
struct Walk {
  Tile tile;
  Arrangement lanes;
  int32_t steps;  // of lanes.columns * E columns
  int32_t index;  // of the tile; here, since it is needed again behind the loops
};

template <int H>
struct alignas(16) Shared {
  StepHeader step;
  TensorRecord record;
  Matrix matrix;
  ScratchLayout layout;
  Walk walk;
  Numbers numbers;
  double time[kTimeColumns];
  float mean[kFactored][64];
  union {
    alignas(16) float staged[kStaged<H>];
    float sums[kFeatures][kThreads];
    double parts[kThreads];
  };
  union {
    Folded<H> network;
    struct {
      float weight[2 * kFactored][H], b0[H], scale[2 * kFactored];
    } fold;
  };
  union {
    struct {
      union {
        float column[4 * kThreads];
        uint32_t x_in_row[4][kThreads];
      };
      float row[kRowSums];
    };
    double total[32][8];
    double squares[kFeatures];
    double row_parts[kFactored][kThreads];
  };
};

LOPT_DEVICE double read(const Scalar& scalar, int32_t type) {
  if (type != kHostScalar)
    return value_of(reinterpret_cast<const void*>(uintptr_t(scalar.bits)), ScalarType(type));
  double value;
  memcpy(&value, &scalar.bits, sizeof value);
  return value;
}

// x, computed where it stands. Of sums in two branches the compiler makes one behind them, and keeps
// registers for what each branch adds; what does not change in a loop it computes before, and keeps.
LOPT_DEVICE float in_place(float x) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+f"(x));
#endif
  return x;
}
LOPT_DEVICE int in_place(int x) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+r"(x));
#endif
  return x;
}

template <int N>
LOPT_DEVICE void load_floats(const float* from, float (&x)[N]) {
  static_assert(N % 4 == 0 || N == 2, "16 or 8 bytes at a time");
  constexpr int B = N % 4 ? 8 : 16;
  LOPT_UNROLL
  for (int i = 0; i < N; i += B / 4) {
    const Packed<B> packed = *reinterpret_cast<const Packed<B>*>(from + i);
    LOPT_UNROLL
    for (int k = 0; k < B / 4; ++k) x[i + k] = float_of(packed.word[k]);
  }
}

// E floats on a multiple of their size.
template <int E>
LOPT_DEVICE void load_elements(const float* from, float (&x)[E]) {
  if constexpr (E == 1)
    x[0] = *from;
  else
    load_floats(from, x);
}

// a[j] += w[j] * x
template <int H, int E>
LOPT_DEVICE void add_products(const float* w, const float (&x)[E], float (&a)[H][E]) {
  constexpr int W = H < 4 ? H : 4;
  LOPT_UNROLL
  for (int j = 0; j < H; j += W) {
    float weight[W];
    load_floats(w + j, weight);
    LOPT_UNROLL
    for (int q = 0; q < W; ++q) {
      LOPT_UNROLL
      for (int i = 0; i < E; ++i) a[j + q][i] += weight[q] * x[i];
    }
  }
}

// The first layer where features need neither clipping nor sums.
template <int H, int E>
struct ExactLayer {
  static constexpr bool kFolded = true;
  const Folded<H>& network;
  float (&a)[H][E];

  template <int F>
  LOPT_DEVICE void operator()(Index<F>, const float (&x)[E]) const {
    add_products<H, E>(network.w0[F], x, a);
  }
  // r * (w_r + sum over k of w_k m_k): saves the products m_k * r.
  LOPT_DEVICE void ratios(const float (&m)[kMomenta][E], const float (&r)[E]) const {
    constexpr int W = H < 4 ? H : 4;
    LOPT_UNROLL
    for (int j = 0; j < H; j += W) {
      float w_r[W], w_m[kMomenta][W];
      load_floats(network.w0[fRsqrtV] + j, w_r);
      LOPT_UNROLL
      for (int k = 0; k < kMomenta; ++k) load_floats(network.w0[fMRsqrtV + k] + j, w_m[k]);
      LOPT_UNROLL
      for (int q = 0; q < W; ++q) {
        LOPT_UNROLL
        for (int i = 0; i < E; ++i) {
          const float w = w_r[q] + w_m[0][q] * m[0][i] + w_m[1][q] * m[1][i] + w_m[2][q] * m[2][i];
          a[j + q][i] += r[i] * w;
        }
      }
    }
  }
};

template <int E>
LOPT_DEVICE void add_squares(const float (&x)[E], float& sum) {
  LOPT_UNROLL
  for (int i = 0; i < E; ++i) sum += x[i] * x[i];
}

// The first layer with lagged statistics: sums for the next step, `Stride` apart, and bounds.
template <int H, int E, int Stride>
struct LaggedLayer {
  static constexpr bool kFolded = false;
  const Folded<H>& network;
  float (&a)[H][E];
  float* sums;

  template <int F>
  LOPT_DEVICE void operator()(Index<F>, const float (&x)[E]) const {
    add_squares(x, sums[F * Stride]);
    const float bound = network.limit[F];
    float clipped[E];
    LOPT_UNROLL
    for (int i = 0; i < E; ++i) clipped[i] = at_most(bound, at_least(-bound, x[i]));
    add_products<H, E>(network.w0[F], clipped, a);
  }
};

template <int E>
struct SumSquares {
  static constexpr bool kFolded = false;
  float* sums;
  template <int F>
  LOPT_DEVICE void operator()(Index<F>, const float (&x)[E]) const {
    add_squares(x, sums[F]);
  }
};

struct NoScale {};

// What a thread reads of its elements, before anything is computed.
template <int E>
struct Inputs {
  float g[E], p[E], v[E], m[kMomenta][E];
};

// Reads the elements from `at` on.
template <int E>
LOPT_DEVICE void read_inputs(const TensorRecord& r, int64_t at, Inputs<E>& in) {
  load(r.grad, Storage(r.gradient), at, in.g);
  load(r.param, Storage(r.parameter), at, in.p);
  load(r.second_moment, Storage(r.state), at, in.v);
  LOPT_UNROLL
  for (int k = 0; k < kMomenta; ++k) load(r.momentum, Storage(r.state), at + k * r.momentum_stride, in.m[k]);
}
// Moves momenta and second moment on.
template <int E>
LOPT_DEVICE void move_inputs(const Numbers& n, Inputs<E>& in) {
  LOPT_UNROLL
  for (int i = 0; i < E; ++i) {
    in.g[i] *= n.grad_scale;
    in.v[i] = average(in.v[i], n.second_moment, in.g[i] * in.g[i]);
    LOPT_UNROLL
    for (int k = 0; k < kMomenta; ++k) in.m[k][i] = average(in.m[k][i], n.momentum[k], in.g[i]);
  }
}
template <int E>
LOPT_DEVICE void write_state(const TensorRecord& r, const Numbers& n, int64_t at, const Inputs<E>& in) {
  if (Storage(r.state) == Storage::float32) {
    store_floats(static_cast<float*>(global(r.second_moment)) + at, in.v);
    LOPT_UNROLL
    for (int k = 0; k < kMomenta; ++k)
      store_floats(static_cast<float*>(global(r.momentum)) + at + k * r.momentum_stride, in.m[k]);
    return;
  }
  uint32_t random[E];
  LOPT_UNROLL
  for (int i = 0; i < E; ++i) random[i] = random_bits(2 * (at + i), n.t);
  store_rounded(r.second_moment, at, in.v, random, 0);
  store_rounded(r.momentum, at, in.m[0], random, 16);
  LOPT_UNROLL
  for (int i = 0; i < E; ++i) random[i] = random_bits(2 * (at + i) + 1, n.t);
  store_rounded(r.momentum, at + r.momentum_stride, in.m[1], random, 0);
  store_rounded(r.momentum, at + 2 * r.momentum_stride, in.m[2], random, 16);
}

// Calls emit(Index<feature>, values) for each feature; scale(Index<k>, out) gives the products of the factors
// where the tensor is factored. Where it is not, moves the full-size accumulators on, and writes them if
// Write.
template <int E, bool Factored, bool Write, typename Scale, typename Emit>
LOPT_DEVICE void features(const TensorRecord& r, const Numbers& n, int64_t elements, int64_t at,
                          const Inputs<E>& in, const Scale& scale, const Emit& emit) {
  emit(Index<fG>{}, in.g);
  emit(Index<fP>{}, in.p);
  emit(Index<fM>{}, in.m[0]);
  emit(Index<fM + 1>{}, in.m[1]);
  emit(Index<fM + 2>{}, in.m[2]);
  emit(Index<fV>{}, in.v);
  float root[E], f[E];
  LOPT_UNROLL
  for (int i = 0; i < E; ++i) root[i] = inverse_root(in.v[i] + float(kRmsEpsilon));
  if constexpr (Emit::kFolded) {
    emit.ratios(in.m, root);
  } else {
    emit(Index<fRsqrtV>{}, root);
    const auto ratio = [&](auto k) {
      LOPT_UNROLL
      for (int i = 0; i < E; ++i) f[i] = in.m[k.value][i] * root[i];
      emit(Index<fMRsqrtV + k.value>{}, f);
    };
    ratio(Index<0>{});
    ratio(Index<1>{});
    ratio(Index<2>{});
  }
  const auto factored = [&](auto k) {
    float scale_g[E], scale_m[E];
    if constexpr (Factored) {
      scale(k, scale_g);
      LOPT_UNROLL
      for (int i = 0; i < E; ++i) scale_m[i] = scale_g[i];
    } else {
      float d[E];
      load(r.row, Storage::float32, at + k.value * elements, d);
      LOPT_UNROLL
      for (int i = 0; i < E; ++i) {
        d[i] = average(d[i], n.factored[k.value], in.g[i] * in.g[i] + float(kSquareEpsilon));
        scale_g[i] = inverse_root(at_least(float(kFactorFloor), d[i] + float(kDiagonalEpsilon)));
        scale_m[i] = inverse_root(d[i] + float(kRmsEpsilon));
        f[i] = inverse_root(d[i] + float(kFactorEpsilon));
      }
      if (Write) store_floats(global(r.row) + at + k.value * elements, d);
      emit(Index<fDiagonal + k.value>{}, d);
      emit(Index<fRsqrtDiagonal + k.value>{}, f);
    }
    LOPT_UNROLL
    for (int i = 0; i < E; ++i) f[i] = in.g[i] * scale_g[i];
    emit(Index<fFacG + k.value>{}, f);
    LOPT_UNROLL
    for (int i = 0; i < E; ++i) f[i] = in.m[k.value][i] * scale_m[i];
    emit(Index<fFacM + k.value>{}, f);
  };
  factored(Index<0>{});
  factored(Index<1>{});
  factored(Index<2>{});
}

// What the code of a phase differs by, and call(Part) for the part that an item needs. `lagged` matters to
// pass 3 alone.
template <int P, bool V, bool F, bool L = false>
struct Part {
  static constexpr int phase = P;
  static constexpr bool vector = V, factored = F, lagged = L;
};
template <int Phase, bool Factored, bool Lagged = false, typename Call>
LOPT_DEVICE void call_vector(const TensorRecord& r, Call call) {
  if (r.vector)
    call(Part<Phase, true, Factored, Lagged>{});
  else
    call(Part<Phase, false, Factored, Lagged>{});
}
template <int Phase, bool Lagged = false, typename Call>
LOPT_DEVICE void call_any(const TensorRecord& r, Call call) {
  if (r.factored)
    call_vector<Phase, true, Lagged>(r, call);
  else
    call_vector<Phase, false, Lagged>(r, call);
}
// All phases but kApply.
template <typename Call>
LOPT_DEVICE void call_part(int32_t phase, const TensorRecord& r, Call call) {
  switch (phase) {
    case kClipSums:
      return call_vector<kClipSums, false>(r, call);
    case kFactorSums:
      return call_vector<kFactorSums, true>(r, call);
    case kAxes:
      return call(Part<kAxes, false, true>{});
    case kFold:
      return call(Part<kFold, false, true>{});
    case kFeatureSums:
      return call_any<kFeatureSums>(r, call);
    case kNetwork:
      return call(Part<kNetwork, false, false>{});
    default:
      return call(Part<kFinish, false, false>{});
  }
}
// kApply, element-wise.
template <int H, bool Lagged, typename Call>
LOPT_DEVICE void call_apply(const TensorRecord& r, Call call) {
  if constexpr (kElements<H, Lagged> > 1)
    call_any<kApply, Lagged>(r, call);
  else if (r.factored)  // one element at a time, wherever rows begin
    call(Part<kApply, false, true, Lagged>{});
  else
    call(Part<kApply, false, false, Lagged>{});
}

// The part that comes before the phase's own where `gathers` says so: sums of g^2 along the factored axes
// that kFactorSums, lagged kApply, does not form on the way.
using GatherPart = Part<kPhases, false, true>;
template <int H>
LOPT_DEVICE bool gathers(const Shared<H>& shared, int32_t phase) {
  const TensorRecord& r = shared.record;
  const bool sums = phase == kFactorSums || (phase == kApply && shared.step.lagged);
  return sums && r.factored && (several(r) || shared.matrix.per_row != 1);
}

// Makes an item known to the whole block, whose threads have left the item before. What lies in device memory
// is read by several warps, so that it is under way at the same time.
template <class Block, int H>
LOPT_DEVICE void open_item(Block& block, Shared<H>& shared, const GpuLaunch& launch, const WorkItem& item) {
  static_assert(sizeof(StepHeader) % 4 == 0 && sizeof(TensorRecord) % 4 == 0, "copied by words");
  constexpr int kStepWords = sizeof(StepHeader) / 4, kWords = kStepWords + sizeof(TensorRecord) / 4;
  static_assert(kWords <= 3 * kWarpLanes, "by the first warps");
  block.each([&](int thread) {
    const StepHeader& step = launch.step;
    const TensorRecord& r = launch.records[item.tensor];
    Numbers& n = shared.numbers;
    thread = in_place(thread);  // else registers would be held from item to item
    const int lane = thread % kWarpLanes;
    switch (thread / kWarpLanes) {
      case 3:
        if (lane == 0) {
          double scale = read(step.grad_scale, step.grad_scale_type);
          if (step.divide) scale = 1.0 / scale;
          if (r.clip_group >= 0 && item.phase != kClipSums) scale *= step.clip_factors[r.clip_group];
          n.grad_scale = float(scale);
        }
        break;
      case 4:
        if (lane <= kMomenta + kFactored) {
          const int32_t decays = theta_of(step.hidden_size, step.hidden_layers).decays;
          const float decay = global(r.theta)[decays + lane];
          if (lane < kMomenta)
            n.momentum[lane] = decay;
          else if (lane == kMomenta)
            n.second_moment = decay;
          else
            n.factored[lane - kMomenta - 1] = decay;
        }
        break;
      case 5:
        if (lane == 0) {
          n.t = int64_t(read(r.t, r.t_type));
          n.first = n.t == 0;
        }
        break;
      case 6:
        if (lane == 0) {
          n.skip = step.found_inf && *step.found_inf != 0.0f;
          n.zero = 0;
        }
        break;
      case 7:
        if (lane == 0) {
          n.phase = item.phase;
          n.items = items_of(r, item.phase, step.lagged);
          shared.matrix = matrix_of(r);
          shared.layout = scratch_layout(r, H);
        }
        break;
      default:
        if (thread < kStepWords)
          reinterpret_cast<Word*>(&shared.step)[thread] = reinterpret_cast<const Word*>(&step)[thread];
        else if (thread < kWords)
          reinterpret_cast<Word*>(&shared.record)[thread - kStepWords] =
              reinterpret_cast<const Word*>(&r)[thread - kStepWords];
    }
  });
  block.sync();
}

// One item. H: hidden units, padded to a power of two; Lagged: that of the part.
template <class Block, int H, bool Lagged = false>
struct Passes {
  template <typename T>
  using Threads = typename Block::template Threads<T>;
  struct FeatureSums {
    float v[kFeatures];
  };

  Block& block;
  Shared<H>& shared;
  const StepHeader& step;
  const TensorRecord& r;
  const Matrix& m;
  const ScratchLayout& layout;

  // After open_item.
  LOPT_DEVICE Passes(Block& block, Shared<H>& shared)
      : block(block),
        shared(shared),
        step(shared.step),
        r(shared.record),
        m(shared.matrix),
        layout(shared.layout) {}

  // The part of an item that goes over its units from `first` on.
  template <typename Part>
  LOPT_DEVICE void run_item(Part part, int32_t first) {
    if constexpr (Part::phase == kFactorSums || Part::phase == kFeatureSums ||
                  Part::phase == GatherPart::phase) {
      const Numbers& n = shared.numbers;
      if (step.lagged && !n.first && n.phase != kApply) return;  // they were formed in the step before
      for (int32_t unit = first; unit < r.row_tiles * r.column_tiles; unit += n.items) {
        run(part, unit);
        block.sync();
      }
    } else {
      run(part, first);
    }
  }

  // One unit of a phase; `Vector` and `Factored` are the record's.
  template <int Phase, bool Vector, bool Factored>
  LOPT_DEVICE void run(Part<Phase, Vector, Factored, Lagged>, int32_t item) {
    if (shared.numbers.skip) return;
    constexpr int E = Vector ? 4 : 1;
    const bool first = shared.numbers.first;
    // Every other pass goes backwards: it begins where the cache still holds what the one before read last.
    const int32_t back = r.row_tiles * r.column_tiles - 1 - item;
    if constexpr (Phase == kClipSums) {
      clip_sums<E>(item);
    } else if constexpr (Phase == kFactorSums) {
      factor_sums<E>(item);
    } else if constexpr (Phase == kAxes) {
      axes(item, !step.lagged || first, true);
    } else if constexpr (Phase == kFold) {
      fold(item);
    } else if constexpr (Phase == kFeatureSums) {
      feature_sums<!Factored && Vector ? 2 : E, Factored>(back);
    } else if constexpr (Phase == kNetwork) {
      network();
    } else if constexpr (Phase == GatherPart::phase) {
      gather_sums(item);
    } else if constexpr (Phase == kApply) {
      constexpr int kMost = kElements<H, Lagged>;
      apply < !Vector ? 1 : Factored || kMost<2 ? kMost : 2, Factored>(item);
    } else {
      if (item == 0) keep_mean_squares();
      if (r.factored && !first) axes(item, true, false);
    }
  }

 protected:
  // 0, unknown to the compiler. Added to addresses or to the thread's number in a loop it keeps the compiler
  // from holding in registers what is read there, and a pointer for each stream: together these would be more
  // than there are.
  LOPT_DEVICE int32_t zero() const { return *static_cast<const volatile int32_t*>(&shared.numbers.zero); }

  LOPT_DEVICE float* scratch() const { return global(step.scratch) + r.scratch; }

  // ---- elements of a thread ----

  template <int E>
  LOPT_DEVICE Walk walk_of(int32_t index) const {
    Walk w;
    w.index = index;
    w.tile = tile_at(r, index);
    w.lanes = arrangement_of(r, E);
    w.steps = int32_t(divide_up(w.tile.columns, w.lanes.columns * E));
    return w;
  }
  // Elements of a thread: E consecutive ones from `at` on, none where it lies beside the tile.
  struct Access {
    int64_t at;
    bool inside;
  };
  // Those in row 0 of the tile.
  template <int E>
  LOPT_DEVICE Access access(const Walk& w, int32_t turn, int thread) const {
    const int32_t column = (turn * w.lanes.columns + (thread & (w.lanes.columns - 1))) * E;
    return {w.tile.row * m.columns + w.tile.column + column, column < w.tile.columns};
  }
  LOPT_DEVICE static int32_t row_of(const Walk& w, int thread) { return thread >> w.lanes.shift; }

  LOPT_DEVICE uint32_t x_in_row(int64_t column) const {
    const uint32_t batch2 = uint32_t(r.batch2);
    if (m.columns <= 0x7fffffff) {
      const uint32_t c = uint32_t(column);
      return c / uint32_t(m.run) * batch2 + c % batch2;
    }
    return uint32_t(column / m.run) * batch2 + uint32_t(column % batch2);
  }
  // Makes the tile known to the whole block.
  template <int E>
  LOPT_DEVICE void open_tile(int32_t index) {
    block.sync();
    block.each([&](int thread) {
      if (thread == 0) shared.walk = walk_of<E>(index);
    });
    block.sync();
  }

  // y factors of a thread's columns, kept while it walks down the rows.
  template <int E>
  struct Factors {
    float v[kFactored][E];
  };
  template <int E>
  LOPT_DEVICE static void keep_factors(const float* places, Factors<E>& y) {
    LOPT_UNROLL
    for (int i = 0; i < E; ++i) {
      float factors[4];
      load_floats(places + i * place_floats(H), factors);
      LOPT_UNROLL
      for (int k = 0; k < kFactored; ++k) y.v[k][i] = factors[k];
    }
  }
  // Places of the columns along both axes: along x to shared memory, along y what is there.
  template <int E>
  LOPT_DEVICE const float* open_columns(const Access& a, int thread, Factors<E>& kept) {
    const Walk& w = shared.walk;
    const int64_t column = a.at - w.tile.row * m.columns;
    if (m.per_row != 1) {
      LOPT_UNROLL
      for (int i = 0; i < E; ++i) shared.x_in_row[i][thread] = x_in_row(column + i);
    }
    const float* y = scratch() + layout.y_places + (w.tile.batch0 * m.columns + column) * place_floats(H);
    if (E > 1 || !several(r)) keep_factors(y, kept);
    return y;
  }

  // What is staged in shared memory for a thread: biases of unit j, or factor j - H.
  template <int E, typename S>
  LOPT_DEVICE static auto* staged(S& shared, int j, int thread) {
    return shared.staged + (j * kThreads + thread) * E;
  }
  static constexpr bool kStageFactors = Lagged ? H <= 8 : H == 8;

  // Products of the factors, each formed when it is needed.
  template <int E, bool Staged>
  struct Scale {
    const Factors<E>* y;
    const float* staged;     // factors, where they lie in shared memory
    const float* x;          // first place along x of the row
    const uint32_t* in_row;  // each element's place from there on, kThreads apart, in shared memory
    bool uniform;            // rows have one place
    LOPT_DEVICE const float* place(int i) const {
      return global(x + int64_t(in_row[i * kThreads]) * place_floats(H));
    }
    template <int K>
    LOPT_DEVICE void operator()(Index<K>, float (&out)[E]) const {
      if constexpr (Staged) {
        load_elements(staged + K * kThreads * E, out);
      } else {
        LOPT_UNROLL
        for (int i = 0; i < E; ++i) out[i] = y->v[K][i];
      }
      if (uniform) {
        const float factor = x[K];
        LOPT_UNROLL
        for (int i = 0; i < E; ++i) out[i] *= factor;
      } else {
        LOPT_UNROLL
        for (int i = 0; i < E; ++i) out[i] *= place(i)[K];
      }
    }
  };
  // Place along y of the element `at` in row `row` of the tile; tiles may span several batch0.
  LOPT_DEVICE static const float* y_place(const Shared<H>& here, int32_t row, int64_t at) {
    const int64_t r = here.walk.tile.row + row, columns = here.matrix.columns;
    const int64_t batch0 =
        here.walk.tile.batch0 + (several(here.record) ? uint32_t(row) / uint32_t(here.record.x) : 0);
    return global(here.step.scratch) + here.record.scratch + here.layout.y_places +
           (batch0 * columns + (at - r * columns)) * place_floats(H);
  }
  template <int E, bool Staged>
  LOPT_DEVICE static Scale<E, Staged> scale_at(const Shared<H>& here, int32_t row, int thread, int64_t at,
                                               Factors<E>& kept) {
    if (E == 1 && several(here.record)) keep_factors(y_place(here, row, at), kept);
    const float* x = global(here.step.scratch) + here.record.scratch + here.layout.x_places +
                     (here.walk.tile.row + row) * here.matrix.per_row * place_floats(H);
    return {&kept, Staged ? staged<E>(here, H, thread) : nullptr, x, &here.x_in_row[0][thread],
            here.matrix.per_row == 1};
  }

  // ---- sums over a block ----

  // store(i, sum over the threads of shared.sums[i]) for i < count.
  template <typename Store>
  LOPT_DEVICE void sum_threads(int count, Store store) {
    block.sync();
    for (int begin = 0; begin < count; begin += kWarps) {
      Threads<Values<1>> total;
      block.each([&](int thread) {
        const int i = begin + thread / kWarpLanes;
        float sum = 0;
        if (i < count)
          for (int part = thread % kWarpLanes; part < kThreads; part += kWarpLanes)
            sum += shared.sums[i][part];
        total[thread].v[0] = sum;
      });
      group_sum(block, total, kWarpLanes);
      block.each([&](int thread) {
        const int i = begin + thread / kWarpLanes;
        if (thread % kWarpLanes == 0 && i < count) store(i, total[thread].v[0]);
      });
    }
    block.sync();
  }

  LOPT_DEVICE void keep_feature_sums(int32_t tile, const Threads<FeatureSums>& sums) {
    const int count = r.factored ? int(kFactoredFeatures) : int(kFeatures);
    block.sync();  // sums share memory with what was staged
    block.each([&](int thread) {
      LOPT_UNROLL
      for (int f = 0; f < kFeatures; ++f)
        if (f < count) shared.sums[f][thread] = sums[thread].v[f];
    });
    float* out = scratch() + layout.feature_sums + int64_t(tile) * kFeatures;
    sum_threads(count, [&](int f, float total) { out[f] = total; });
  }

  // ---- clipping ----

  template <int E>
  LOPT_DEVICE void clip_sums(int32_t index) {
    const Walk w = walk_of<E>(index);
    block.each([&](int thread) {
      float sum = 0;
      for (int32_t turn = 0; turn < w.steps; ++turn) {
        Access a = access<E>(w, turn, thread);
        if (!a.inside) continue;
        a.at += row_of(w, thread) * m.columns;
        for (int32_t row = row_of(w, thread); row < w.tile.rows; row += w.lanes.rows) {
          float g[E];
          load(r.grad, Storage(r.gradient), a.at, g);
          LOPT_UNROLL
          for (int i = 0; i < E; ++i) g[i] *= shared.numbers.grad_scale;
          add_squares(g, sum);
          a.at += w.lanes.rows * m.columns;
        }
      }
      shared.sums[0][thread] = sum;
    });
    sum_threads(1, [&](int, float total) { step.clip_sums[r.clip_tile + index] = double(total); });
  }

  // ---- pass 1 ----

  // Sums of g^2 along the factored axes that a thread keeps while it walks down its columns.
  template <int E>
  struct ColumnSums {
    float v[E];
  };

  // Adds what the rows' groups of lanes hold to the sums of the tile's rows.
  LOPT_DEVICE int32_t warps_in_row(const Walk& w) const {
    return w.lanes.columns > kWarpLanes ? w.lanes.columns / kWarpLanes : 1;
  }
  LOPT_DEVICE void keep_row_sum(const Walk& w, int32_t turn, int32_t row, int thread, float sum) {
    const int32_t column = thread & (w.lanes.columns - 1);
    if (column % kWarpLanes || row >= w.tile.rows) return;
    float& at = shared.row[row * warps_in_row(w) + column / kWarpLanes];
    at = turn == 0 ? sum : at + sum;
  }
  LOPT_DEVICE void write_row_sums(const Walk& w) {
    float* out = scratch() + layout.x_sums + w.tile.column_tile * m.rows + w.tile.row;
    const int32_t warps = warps_in_row(w);
    block.sync();
    block.each([&](int thread) {
      for (int32_t row = thread; row < w.tile.rows; row += kThreads) {
        float sum = 0;
        for (int32_t i = 0; i < warps; ++i) sum += shared.row[row * warps + i];
        out[row] = sum;
      }
    });
  }
  template <int E>
  LOPT_DEVICE void write_column_sums(const Walk& w, int32_t turn, const Threads<ColumnSums<E>>& sums) {
    const int32_t width = w.lanes.columns * E;
    block.sync();
    block.each([&](int thread) {
      const int32_t column = thread & (w.lanes.columns - 1);
      float* to = shared.column + (thread >> w.lanes.shift) * width;
      LOPT_UNROLL
      for (int i = 0; i < E; ++i) to[column * E + i] = sums[thread].v[i];
    });
    block.sync();
    const int32_t begin = turn * width, left = w.tile.columns - begin, count = left < width ? left : width;
    const int32_t in_batch = w.tile.row_tile - w.tile.batch0 * row_tiles_in_batch(r);
    float* out =
        scratch() + layout.y_sums + in_batch * m.y_size + w.tile.batch0 * m.columns + w.tile.column + begin;
    block.each([&](int thread) {
      for (int32_t c = thread; c < count; c += kThreads) {
        float sum = 0;
        for (int32_t row = 0; row < w.lanes.rows; ++row) sum += shared.column[row * width + c];
        out[c] = sum;
      }
    });
  }

  LOPT_DEVICE float square_at(int64_t at) const {
    float g[1];
    load(r.grad, Storage(r.gradient), at, g);
    g[0] *= shared.numbers.grad_scale;
    return g[0] * g[0];
  }
  // The same sums, each place by a thread of its own: along x where rows hold several places, along both axes
  // where tiles span several batches. Reads the tile on its own.
  LOPT_DEVICE void gather_sums(int32_t index) {
    const Tile tile = tile_at(r, index);
    gather_x_sums(tile);
    if (several(r)) gather_y_sums(tile);
  }
  LOPT_DEVICE void gather_x_sums(const Tile& t) {
    const int64_t end = t.column + t.columns;
    const int32_t first = int32_t(t.column / m.run), last = int32_t((end - 1) / m.run);
    const int64_t in_row = int64_t(last - first + 1) * r.batch2;
    float* out = scratch() + layout.x_sums;
    block.each([&](int thread) {
      for (int64_t i = thread; i < t.rows * in_row; i += kThreads) {
        const int64_t row = t.row + i / in_row;
        const int32_t place = int32_t(i % in_row), batch1 = first + place / r.batch2,
                      batch2 = place % r.batch2;
        const int64_t begin = batch1 * m.run + batch2;  // column of y = 0
        const int64_t y0 = larger(0, divide_up(t.column - begin, r.batch2));
        const int64_t y1 = smaller(r.y, divide_up(end - begin, r.batch2));
        float sum = 0;
        for (int64_t y = y0; y < y1; ++y) sum += square_at(row * m.columns + begin + y * r.batch2);
        out[(t.column_tile + batch1) * (m.rows * r.batch2) + row * r.batch2 + batch2] = sum;
      }
    });
  }
  LOPT_DEVICE void gather_y_sums(const Tile& t) {
    float* out = scratch() + layout.y_sums + t.row / r.x * m.columns;
    const int32_t x = int32_t(r.x), columns = t.columns;  // all of them
    block.each([&](int thread) {
      for (int32_t i = thread; i < t.rows / x * columns; i += kThreads) {
        const int64_t begin = (t.row + i / columns * x) * m.columns + i % columns;
        float sum = 0;
        for (int32_t row = 0; row < x; ++row) sum += square_at(begin + row * m.columns);
        out[i] = sum;
      }
    });
  }

  template <int E>
  LOPT_DEVICE void factor_sums(int32_t index) {
    constexpr int kRows = 4;  // rows read at once: loads in flight
    const Walk w = walk_of<E>(index);
    if (E == 1 && several(r)) return;  // gathered
    const bool rows = m.per_row == 1;
    const int lanes = w.lanes.columns < kWarpLanes ? w.lanes.columns : kWarpLanes;
    for (int32_t turn = 0; turn < w.steps; ++turn) {
      Threads<ColumnSums<E>> sums;
      Threads<Access> at;
      block.each([&](int thread) {
        at[thread] = access<E>(w, turn, thread);
        at[thread].at += row_of(w, thread) * m.columns;
        sums[thread] = {};
      });
      LOPT_NO_UNROLL
      for (int32_t base = 0; base < w.tile.rows; base += kRows * w.lanes.rows) {
        Threads<Values<kRows>> row_sums;
        block.each([&](int thread) {
          Access& a = at[thread];
          float g[kRows][E];
          LOPT_UNROLL
          for (int q = 0; q < kRows; ++q) {
            const bool inside = base + q * w.lanes.rows + row_of(w, thread) < w.tile.rows;
            LOPT_UNROLL
            for (int i = 0; i < E; ++i) g[q][i] = 0;
            if (inside && a.inside) load(r.grad, Storage(r.gradient), a.at, g[q]);
            a.at += w.lanes.rows * m.columns;
          }
          LOPT_UNROLL
          for (int q = 0; q < kRows; ++q) {
            float sum = 0;
            LOPT_UNROLL
            for (int i = 0; i < E; ++i) {
              g[q][i] *= shared.numbers.grad_scale;
              const float square = g[q][i] * g[q][i];
              sums[thread].v[i] += square;
              sum += square;
            }
            row_sums[thread].v[q] = sum;
          }
        });
        if (!rows) continue;
        group_sum(block, row_sums, lanes);
        block.each([&](int thread) {
          LOPT_UNROLL
          for (int q = 0; q < kRows; ++q)
            keep_row_sum(w, turn, base + q * w.lanes.rows + row_of(w, thread), thread, row_sums[thread].v[q]);
        });
      }
      write_column_sums<E>(w, turn, sums);
    }
    if (rows) write_row_sums(w);
  }

  // ---- between passes 1 and 2: accumulators and factors ----

  LOPT_DEVICE bool is_row(bool x) const { return x == r.x_is_row; }
  LOPT_DEVICE float* accumulator(bool x) const { return global(is_row(x) ? r.row : r.column); }

  // Sum of every `parts`-th partial sum of a place, from `part` on.
  LOPT_DEVICE double partial_sum(bool x, const Axis& axis, int64_t place, int32_t part) const {
    double total = 0;
    if (!x) {
      const float* from = scratch() + layout.y_sums + place;
      for (int32_t i = part; i < axis.partials; i += axis.parts) total += double(from[i * axis.size]);
      return total;
    }
    int32_t first = 0, last = axis.partials - 1;
    int64_t batch1 = 0, at = place;
    if (m.per_row != 1) {  // those of the tiles that hold columns of this batch1
      const int64_t row = place / m.per_row, in_row = place - row * m.per_row;
      batch1 = in_row / r.batch2;
      first = int32_t(batch1 * m.run / r.columns_per_tile);
      last = int32_t(((batch1 + 1) * m.run - 1) / r.columns_per_tile);
      at = row * r.batch2 + (in_row - batch1 * r.batch2);
    }
    const float* from = scratch() + layout.x_sums + at;
    for (int32_t i = first + part; i <= last; i += axis.parts)
      total += double(from[(i + batch1) * (m.rows * r.batch2)]);
    return total;
  }

  LOPT_DEVICE void axes(int32_t item, bool move, bool keep_sums) {
    const bool x = item < r.x_segments;
    const Axis axis = x ? x_axis(r) : y_axis(r);
    const int32_t index = x ? item : item - r.x_segments;
    const int64_t begin = int64_t(index) * axis.segment, end = smaller(begin + axis.segment, axis.size);
    const double count = double(x ? r.y : r.x);
    const int32_t places = kThreads / axis.parts;  // at once
    float* const a = accumulator(x);
    Threads<Values<kAxisSums>> sums;
    block.each([&](int thread) { sums[thread] = {}; });
    for (int64_t base = begin; base < end; base += places) {
      block.sync();
      if (move)
        block.each([&](int thread) {
          const int64_t place = base + thread % places;
          shared.parts[thread] = place < end ? partial_sum(x, axis, place, thread / places) : 0.0;
        });
      block.sync();
      block.each([&](int thread) {
        const int64_t place = base + thread;
        if (thread >= places || place >= end) return;
        double total = 0;
        if (move)
          for (int32_t part = 0; part < axis.parts; ++part) total += shared.parts[part * places + thread];
        const float mean = float(total / count) + float(kSquareEpsilon);
        LOPT_UNROLL
        for (int k = 0; k < kFactored; ++k) {
          float value = a[k * axis.size + place];
          if (move) {
            value = average(value, shared.numbers.factored[k], mean);
            a[k * axis.size + place] = value;
          }
          const float root = inverse_root(value + float(kFactorEpsilon));
          sums[thread].v[k] += value * value;
          sums[thread].v[kFactored + k] += root * root;
        }
      });
    }
    if (!keep_sums) return;
    block.sync();
    block.each([&](int thread) {
      LOPT_UNROLL
      for (int k = 0; k < kAxisSums; ++k) shared.sums[k][thread] = sums[thread].v[k];
    });
    float* out = scratch() + (x ? layout.x_axis_sums : layout.y_axis_sums) + index * kAxisSums;
    sum_threads(kAxisSums, [&](int k, float total) { out[k] = total; });
  }

  // shared.time, then b(j): bias of the first layer and the time columns.
  LOPT_DEVICE void time_columns() {
    block.each([&](int thread) {
      if (thread < kTimeColumns) {
        const double scale = timescale(thread, std::make_integer_sequence<int, kTimeColumns>());
        shared.time[thread] = double(tanhf(float(double(shared.numbers.t) / scale - 1.0)));
      }
    });
    block.sync();
  }
  LOPT_DEVICE float time_bias(int j) const {
    const int h = step.hidden_size;
    if (j >= h) return 0.0f;
    double bias = double(r.theta[theta_of(h, step.hidden_layers).b0 + j]);
    for (int i = 0; i < kTimeColumns; ++i)
      bias += shared.time[i] * double(r.theta[(kNormalised + i) * h + j]);
    return float(bias);
  }

  // Scales of the columns of one axis: shared.fold.scale.
  LOPT_DEVICE void axis_scales(bool x, const Axis& axis) {
    const float* from = scratch() + (x ? layout.x_axis_sums : layout.y_axis_sums);
    const int32_t segments = x ? r.x_segments : r.y_segments;
    block.each([&](int thread) {
      const int k = thread % 8, part = thread / 8;
      double total = 0;
      if (k < kAxisSums)
        for (int32_t i = part; i < segments; i += 32) total += double(from[i * kAxisSums + k]);
      shared.total[part][k] = total;
    });
    block.sync();
    block.each([&](int thread) {
      if (thread >= kAxisSums) return;
      double total = 0;
      for (int part = 0; part < 32; ++part) total += shared.total[part][thread];
      shared.fold.scale[thread] = float(1.0 / sqrt(total / double(axis.size) + kNormaliserEpsilon));
    });
    block.sync();
  }

  LOPT_DEVICE void fold(int32_t item) {
    const bool x = item < r.x_segments;
    const Axis axis = x ? x_axis(r) : y_axis(r);
    const int32_t index = x ? item : item - r.x_segments, h = step.hidden_size;
    const int64_t begin = int64_t(index) * axis.segment, end = smaller(begin + axis.segment, axis.size);
    const float* const a = accumulator(x);
    float* const out = scratch() + (x ? layout.x_places : layout.y_places);
    time_columns();
    axis_scales(x, axis);
    block.each([&](int thread) {
      for (int i = thread; i < 2 * kFactored * H; i += kThreads) {
        const int k = i / H, j = i % H;
        const int column =
            (is_row(x) ? (k < kFactored ? kRow : kRsqrtRow) : (k < kFactored ? kCol : kRsqrtCol)) +
            k % kFactored;
        shared.fold.weight[k][j] = j < h ? shared.fold.scale[k] * r.theta[column * h + j] : 0.0f;
      }
      for (int j = thread; j < H; j += kThreads) shared.fold.b0[j] = x ? time_bias(j) : 0.0f;
    });
    block.sync();
    // Rows are divided by their mean over the factored axis, the vector seen as [outer, length, inner].
    const int64_t length = x ? r.x : r.y, inner = x ? m.per_row : r.batch2, outer = length * inner;
    // Few of them are added up where they are needed, many by the whole block, for one `outer` at a time.
    const bool row = is_row(x), together = row && length > 32 && inner <= 64;
    int32_t lanes = 1;
    while (lanes < inner) lanes *= 2;
    const int32_t parts = kThreads / lanes < 64 ? kThreads / lanes : 64;
    LOPT_NO_UNROLL
    for (int64_t from = begin; from < end;) {
      const int64_t o = from / outer, to = together ? smaller(end, (o + 1) * outer) : end;
      if (together) row_means(a + o * outer, axis.size, length, int32_t(inner), lanes, parts);
      fold_places(row, a, axis.size, from, to, out, [&](int k, int64_t place) {
        if (together) return shared.mean[k][place % inner];
        const float* first = a + k * axis.size + place / outer * outer + place % inner;
        double total = 0;
        LOPT_NO_UNROLL
        for (int64_t i = 0; i < length; ++i) total += double(first[i * inner]);
        return float(total / double(length));
      });
      from = to;
    }
  }

  // shared.mean[k][lane]: of the `length` values from[k * size + i * inner + lane], with `parts` threads for
  // each lane.
  LOPT_DEVICE void row_means(const float* from, int64_t size, int64_t length, int32_t inner, int32_t lanes,
                             int32_t parts) {
    block.sync();
    block.each([&](int thread) {
      const int32_t lane = thread & (lanes - 1), part = thread / lanes;
      if (lane >= inner || part >= parts) return;
      double total[kFactored] = {};
      for (int64_t i = part; i < length; i += parts) {
        LOPT_UNROLL
        for (int k = 0; k < kFactored; ++k) total[k] += double(from[k * size + i * inner + lane]);
      }
      LOPT_UNROLL
      for (int k = 0; k < kFactored; ++k) shared.row_parts[k][thread] = total[k];
    });
    block.sync();
    block.each([&](int thread) {
      for (int i = thread; i < kFactored * inner; i += kThreads) {
        const int k = i / inner, lane = i % inner;
        double total = 0;
        LOPT_NO_UNROLL
        for (int part = 0; part < parts; ++part) total += shared.row_parts[k][part * lanes + lane];
        shared.mean[k][lane] = float(total / double(length));
      }
    });
    block.sync();
  }

  // Factors and biases of places begin .. end of an axis with accumulators a[k * size + place]; mean(k,
  // place) divides those of the rows.
  template <typename Mean>
  LOPT_DEVICE void fold_places(bool row, const float* a, int64_t size, int64_t begin, int64_t end, float* out,
                               Mean mean) {
    constexpr int kQuads = (H < 4 ? 4 : H) / 4 + 1;
    block.each([&](int thread) {
      LOPT_NO_UNROLL
      for (int64_t i = thread; i < (end - begin) * kQuads; i += kThreads) {
        const int64_t place = begin + i / kQuads;
        const int quad = int(i % kQuads);
        float value[kFactored], result[4] = {};
        LOPT_UNROLL
        for (int k = 0; k < kFactored; ++k) value[k] = a[k * size + place];
        if (quad == 0) {
          LOPT_NO_UNROLL
          for (int k = 0; k < kFactored; ++k) {
            const float accumulator = a[k * size + place];
            const float relative =
                row ? accumulator / (mean(k, place) + float(kRowMeanEpsilon)) : accumulator;
            const float factor = inverse_root(at_least(float(kFactorFloor), relative));
            LOPT_UNROLL
            for (int q = 0; q < kFactored; ++q) result[q] = q == k ? factor : result[q];
          }
        } else {
          LOPT_UNROLL
          for (int q = 0; q < 4; ++q) {
            const int j = 4 * (quad - 1) + q;
            if (j >= H) continue;
            result[q] = shared.fold.b0[j];
            LOPT_UNROLL
            for (int k = 0; k < kFactored; ++k)
              result[q] +=
                  shared.fold.weight[k][j] * value[k] +
                  shared.fold.weight[kFactored + k][j] * inverse_root(value[k] + float(kFactorEpsilon));
          }
        }
        store_floats(out + place * place_floats(H) + 4 * quad, result);
      }
    });
  }

  // ---- pass 2 ----

  template <int E, bool Factored>
  LOPT_DEVICE void feature_sums(int32_t index) {
    open_tile<E>(index);
    const Walk& w = shared.walk;
    Threads<FeatureSums> sums;
    block.each([&](int thread) { sums[thread] = {}; });
    LOPT_NO_UNROLL
    for (int32_t turn = 0; turn < w.steps; ++turn)
      block.each([&](int thread) {
        Access a = access<E>(w, turn, thread);
        if (!a.inside) return;
        Factors<E> kept;
        if (Factored) open_columns<E>(a, thread, kept);
        a.at += row_of(w, thread) * m.columns;
        LOPT_NO_UNROLL
        for (int32_t row = row_of(w, thread); row < w.tile.rows; row += w.lanes.rows) {
          if constexpr (Factored)
            square_elements<E>(row, thread, a.at + zero(), kept, sums[thread]);
          else
            square_unfactored<E>(a.at + zero(), sums[thread]);
          a.at += w.lanes.rows * m.columns;
        }
      });
    keep_feature_sums(w.index, sums);
  }

  template <int E>
  LOPT_DEVICE void square_unfactored(int64_t at, FeatureSums& sums) const {
    const Shared<H>& here = *(&shared + zero());
    Inputs<E> in;
    read_inputs(here.record, at, in);
    move_inputs(here.numbers, in);
    features<E, false, false>(here.record, here.numbers, here.matrix.columns, at, in, NoScale(),
                              SumSquares<E>{sums.v});
  }

  // The squares are formed from m^2 and 1 / (v + ...) rather than from the features.
  template <int E>
  LOPT_DEVICE void square_elements(int32_t row, int thread, int64_t at, Factors<E>& kept,
                                   FeatureSums& sums) const {
    const Shared<H>& here = *(&shared + zero());
    Inputs<E> in;
    read_inputs(here.record, at, in);
    const auto scale = scale_at<E, false>(here, row, thread, at, kept);
    move_inputs(here.numbers, in);
    float inverse[E];
    LOPT_UNROLL
    for (int i = 0; i < E; ++i) {
      const float root = inverse_root(in.v[i] + float(kRmsEpsilon));
      inverse[i] = root * root;
      sums.v[fV] += in.v[i] * in.v[i];
      sums.v[fP] += in.p[i] * in.p[i];
      sums.v[fRsqrtV] += inverse[i];
      in.g[i] *= in.g[i];
      sums.v[fG] += in.g[i];
    }
    const auto momentum = [&](auto k) {
      float factor[E];
      scale(k, factor);
      LOPT_UNROLL
      for (int i = 0; i < E; ++i) {
        const float square = in.m[k.value][i] * in.m[k.value][i];
        factor[i] *= factor[i];
        sums.v[fM + k.value] += square;
        sums.v[fMRsqrtV + k.value] += square * inverse[i];
        sums.v[fFacG + k.value] += in.g[i] * factor[i];
        sums.v[fFacM + k.value] += square * factor[i];
      }
    };
    momentum(Index<0>{});
    momentum(Index<1>{});
    momentum(Index<2>{});
  }

  // ---- between passes 2 and 3: the network ----

  // Mean squares of the features over the tensor, from the sums of all tiles: shared.squares.
  LOPT_DEVICE void total_feature_sums() {
    const int count = r.factored ? int(kFactoredFeatures) : int(kFeatures);
    const int32_t tiles = r.row_tiles * r.column_tiles;
    const float* from = scratch() + layout.feature_sums;
    block.sync();
    block.each([&](int thread) {
      const int f = thread % kWarpLanes, part = thread / kWarpLanes;
      double total = 0;
      if (f < count)
        for (int32_t i = part; i < tiles; i += kWarps) total += double(from[int64_t(i) * kFeatures + f]);
      shared.parts[thread] = total;
    });
    block.sync();
    block.each([&](int thread) {
      if (thread >= count) return;
      double total = 0;
      for (int part = 0; part < kWarps; ++part) total += shared.parts[part * kWarpLanes + thread];
      shared.squares[thread] = total / (double(m.rows) * double(m.columns));
    });
    block.sync();
  }

  LOPT_DEVICE void keep_mean_squares() {
    total_feature_sums();
    const int count = r.factored ? int(kFactoredFeatures) : int(kFeatures);
    block.each([&](int thread) {
      if (thread >= kNormalised) return;
      float value = 0;
      for (int f = 0; f < count; ++f) {
        const int column = column_of_feature(f);
        if (column == thread || (f >= fDiagonal && column + kDiagonalTwin == thread))
          value = float(shared.squares[f]);
      }
      r.mean_squares[thread] = value;
    });
    block.sync();
  }

  LOPT_DEVICE void network() {
    const int count = r.factored ? int(kFactoredFeatures) : int(kFeatures);
    const int32_t h = step.hidden_size;
    if (step.lagged && !shared.numbers.first) {
      block.each([&](int thread) {
        if (thread < count) shared.squares[thread] = double(r.mean_squares[column_of_feature(thread)]);
      });
      block.sync();
    } else {
      total_feature_sums();
    }
    time_columns();
    Folded<H>* out = reinterpret_cast<Folded<H>*>(scratch() + layout.network);
    block.each([&](int thread) {
      const GpuTheta at = theta_of(h, step.hidden_layers);
      for (int i = thread; i < kFeatures * H; i += kThreads) {
        const int f = i / H, j = i % H;
        float w = 0;
        if (f < count) {
          const double root = sqrt(shared.squares[f] + kNormaliserEpsilon);
          if (j == 0) out->limit[f] = float(kLaggedClip * root);
          if (j < h) {
            const int column = column_of_feature(f);
            double sum = double(r.theta[column * h + j]);
            if (f >= fDiagonal) sum += double(r.theta[(column + kDiagonalTwin) * h + j]);
            w = float(sum / root);
          }
        }
        out->w0[f][j] = w;
      }
      for (int j = thread; j < H; j += kThreads) out->b0[j] = time_bias(j);
      if (step.hidden_layers == 2) {
        for (int i = thread; i < H * H; i += kThreads) {
          const int j = i / H, k = i % H;
          out->w1[i] = j < h && k < h ? r.theta[at.w1 + k * h + j] : 0.0f;
        }
        for (int j = thread; j < H; j += kThreads) out->b1[j] = j < h ? r.theta[at.b1 + j] : 0.0f;
      }
      const double lr = read(r.lr, r.lr_type);
      double multiplier = lr * step.step_mult;
      if (step.parameter_rms) multiplier *= sqrt(shared.squares[fP] + step.scale_epsilon);
      const double exponent = step.exp_mult * 1.4426950408889634;  // log2(e)
      for (int i = thread; i < 2 * H; i += kThreads) {
        const int o = i / H, j = i % H;
        out->w_out[o][j] =
            j < h ? float((o ? exponent : multiplier) * double(r.theta[at.w_out + 2 * j + o])) : 0.0f;
      }
      if (thread < 2)
        out->b_out[thread] = float((thread ? exponent : multiplier) * double(r.theta[at.b_out + thread]));
      if (thread == 0) {
        const double decay = lr * read(r.weight_decay, r.weight_decay_type);
        out->param_scale = float(r.apply ? 1.0 - decay : -decay);
      }
    });
  }

  // ---- pass 3 ----

  LOPT_DEVICE void load_network() {
    const float* from = scratch() + layout.network;
    float* to = reinterpret_cast<float*>(&shared.network);
    block.each([&](int thread) {
      for (int i = 4 * thread; i < int(folded_floats(H)); i += 4 * kThreads) {
        float x[4];
        load_floats(from + i, x);
        LOPT_UNROLL
        for (int k = 0; k < 4; ++k) to[i + k] = x[k];
      }
    });
    block.sync();
  }

  // What an axis adds to the units of the first layer for the elements of a thread.
  template <int E>
  LOPT_DEVICE static void add_biases(const float* place, int i, float (&a)[H][E]) {
    constexpr int W = H < 4 ? H : 4;
    LOPT_UNROLL
    for (int j = 0; j < H; j += W) {
      float b[W];
      load_floats(place + 4 + j, b);
      LOPT_UNROLL
      for (int q = 0; q < W; ++q) a[j + q][i] += b[q];
    }
  }

  template <int E>
  LOPT_DEVICE static void clear_units(float (&a)[H][E]) {
    LOPT_UNROLL
    for (int j = 0; j < H; ++j) {
      LOPT_UNROLL
      for (int i = 0; i < E; ++i) a[j][i] = 0;
    }
  }
  // The same where it is equal for all elements.
  template <int E>
  LOPT_DEVICE static void add_uniform_biases(const float* place, float (&a)[H][E]) {
    constexpr int W = H < 4 ? H : 4;
    LOPT_UNROLL
    for (int j = 0; j < H; j += W) {
      float b[W];
      load_floats(place + 4 + j, b);
      LOPT_UNROLL
      for (int q = 0; q < W; ++q) {
        LOPT_UNROLL
        for (int i = 0; i < E; ++i) a[j + q][i] = in_place(a[j + q][i] + b[q]);
      }
    }
  }

  // Hidden units to output: relu, second layer, last layer.
  template <int E>
  LOPT_DEVICE void outputs(const Folded<H>& net, float (&a)[H][E], float (&direction)[E],
                           float (&magnitude)[E]) const {
    constexpr int W = H < 4 ? H : 4;
    LOPT_UNROLL
    for (int i = 0; i < E; ++i) direction[i] = net.b_out[0], magnitude[i] = net.b_out[1];
    LOPT_UNROLL
    for (int j = 0; j < H; ++j) {
      LOPT_UNROLL
      for (int i = 0; i < E; ++i) a[j][i] = relu(a[j][i]);
    }
    if (step.hidden_layers == 2) {
      constexpr int kUnroll = H <= 4 ? H : H == 8 ? 2 : 1;
#if defined(__CUDACC__)
#pragma unroll kUnroll
#endif
      for (int j = 0; j < H; ++j) {
        float unit[E];
        LOPT_UNROLL
        for (int i = 0; i < E; ++i) unit[i] = net.b1[j];
        LOPT_UNROLL
        for (int k = 0; k < H; k += W) {
          float w[W];
          load_floats(net.w1 + j * H + k, w);
          LOPT_UNROLL
          for (int q = 0; q < W; ++q) {
            LOPT_UNROLL
            for (int i = 0; i < E; ++i) unit[i] += w[q] * a[k + q][i];
          }
        }
        const float w_direction = net.w_out[0][j], w_magnitude = net.w_out[1][j];
        LOPT_UNROLL
        for (int i = 0; i < E; ++i) {
          unit[i] = relu(unit[i]);
          direction[i] += w_direction * unit[i];
          magnitude[i] += w_magnitude * unit[i];
        }
      }
      (void)kUnroll;
      return;
    }
    LOPT_UNROLL
    for (int j = 0; j < H; j += W) {
      float w_direction[W], w_magnitude[W];
      load_floats(net.w_out[0] + j, w_direction);
      load_floats(net.w_out[1] + j, w_magnitude);
      LOPT_UNROLL
      for (int q = 0; q < W; ++q) {
        LOPT_UNROLL
        for (int i = 0; i < E; ++i) {
          direction[i] += w_direction[q] * a[j + q][i];
          magnitude[i] += w_magnitude[q] * a[j + q][i];
        }
      }
    }
  }

  // The y biases of a thread's columns are kept while it walks down the rows: in registers where these
  // suffice, in shared memory where that does.
  static constexpr bool kKeepBiases = !Lagged && H <= 4;
  static constexpr bool kStageBiases = !kKeepBiases && H <= 16;
  static constexpr bool kStageSums = Lagged && H >= 32;
  template <int E>
  struct Kept {
    Factors<E> factors;
    float bias[kKeepBiases ? H : 1][E];
  };

  template <int E, bool Factored>
  LOPT_DEVICE void apply(int32_t index) {
    load_network();
    open_tile<E>(index);
    const Walk& w = shared.walk;
    const bool together = E > 1 || !several(r);  // all rows in one batch0
    const bool rows = Factored && Lagged && m.per_row == 1 && together;
    const bool columns = Factored && Lagged && together;
    Threads<FeatureSums> sums;
    if constexpr (Lagged) {
      block.each([&](int thread) {
        sums[thread] = {};
        if (kStageSums)
          for (int f = 0; f < kFeatures; ++f) shared.staged[f * kThreads + thread] = 0;
      });
    }
    LOPT_NO_UNROLL
    for (int32_t turn = 0; turn < w.steps; ++turn) {
      Threads<int32_t> column;  // of the first element in the tile, or -1
      Threads<Kept<E>> kept;
      Threads<ColumnSums<E>> column_sums;
      block.sync();  // the turn before may still be reading what lies where places along x go
      block.each([&](int thread) {
        thread += zero();
        const Access a = access<E>(w, turn, thread);
        column[thread] = a.inside ? (turn * w.lanes.columns + (thread & (w.lanes.columns - 1))) * E : -1;
        if (Lagged) column_sums[thread] = {};
        if (Factored && a.inside) {
          const float* y = open_columns<E>(a, thread, kept[thread].factors);
          if constexpr (kKeepBiases) {
            if (together) {
              clear_units<E>(kept[thread].bias);
              LOPT_UNROLL
              for (int i = 0; i < E; ++i) add_biases<E>(y + i * place_floats(H), i, kept[thread].bias);
            }
          } else if constexpr (kStageBiases) {
            if (together) {
              LOPT_NO_UNROLL
              for (int j = 0; j < H; ++j) {
                LOPT_UNROLL
                for (int i = 0; i < E; ++i) staged<E>(shared, j, thread)[i] = y[i * place_floats(H) + 4 + j];
              }
              if constexpr (kStageFactors) {
                LOPT_UNROLL
                for (int k = 0; k < kFactored; ++k) {
                  LOPT_UNROLL
                  for (int i = 0; i < E; ++i)
                    staged<E>(shared, H + k, thread)[i] = kept[thread].factors.v[k][i];
                }
              }
            }
          }
        }
      });
      LOPT_NO_UNROLL
      for (int32_t base = 0; base < w.tile.rows; base += w.lanes.rows) {
        Threads<Values<1>> row_sum;
        block.each([&](int thread) {
          thread += zero();
          row_sum[thread].v[0] = 0;
          const int32_t row = base + row_of(w, thread);
          if (column[thread] >= 0 && row < w.tile.rows)
            apply_elements<E, Factored>(row, thread, column[thread], kept[thread], sums[thread],
                                        column_sums[thread], row_sum[thread].v[0]);
        });
        if (rows) {
          group_sum(block, row_sum, w.lanes.columns < kWarpLanes ? w.lanes.columns : kWarpLanes);
          block.each([&](int thread) {
            keep_row_sum(w, turn, base + row_of(w, thread), thread, row_sum[thread].v[0]);
          });
        }
      }
      if (columns) write_column_sums<E>(w, turn, column_sums);
    }
    if (!Lagged) return;
    if (rows) write_row_sums(w);
    if (kStageSums)
      block.each([&](int thread) {
        LOPT_UNROLL
        for (int f = 0; f < kFeatures; ++f) sums[thread].v[f] = shared.staged[f * kThreads + thread];
      });
    keep_feature_sums(w.index, sums);
  }

  // The elements of a thread in a row of the tile. Nothing but the arguments is kept in registers from one
  // row to the next.
  template <int E, bool Factored>
  LOPT_DEVICE void apply_elements(int32_t row, int thread, int32_t column, Kept<E>& kept, FeatureSums& sums,
                                  ColumnSums<E>& column_sums, float& row_sum) {
    Shared<H>& here = *(&shared + zero());
    const int64_t at = (here.walk.tile.row + row) * here.matrix.columns + here.walk.tile.column + column;
    const TensorRecord& r = here.record;
    const Numbers& n = here.numbers;
    const Folded<H>& net = here.network;
    float units[H][E];
    Inputs<E> in;
    read_inputs(r, at, in);
    if constexpr (Factored) {
      const bool together = E > 1 || !several(r);
      if (kKeepBiases && together) {
        LOPT_UNROLL
        for (int j = 0; j < H; ++j) {
          LOPT_UNROLL
          for (int i = 0; i < E; ++i) units[j][i] = kept.bias[kKeepBiases ? j : 0][i];
        }
      } else if (kStageBiases && together) {
        LOPT_UNROLL
        for (int j = 0; j < H; ++j) load_elements(staged<E>(here, j, thread), units[j]);
      } else {
        const float* y = y_place(here, row, at);
        clear_units<E>(units);
        LOPT_UNROLL
        for (int i = 0; i < E; ++i) add_biases<E>(y + i * place_floats(H), i, units);
      }
    } else {
      LOPT_UNROLL
      for (int j = 0; j < H; ++j) {
        LOPT_UNROLL
        for (int i = 0; i < E; ++i) units[j][i] = net.b0[j];
      }
    }
    constexpr bool kStaged = Factored && kStageFactors && E > 1;
    Scale<E, kStaged> scale = {};
    if constexpr (Factored) {
      scale = scale_at<E, kStaged>(here, row, thread, at, kept.factors);
      if (scale.uniform) {
        add_uniform_biases<E>(scale.x, units);
      } else {
        LOPT_UNROLL
        for (int i = 0; i < E; ++i) add_biases<E>(scale.place(i), i, units);
      }
    }
    move_inputs(n, in);
    write_state(r, n, at, in);
    if constexpr (Lagged) {
      LOPT_UNROLL
      for (int i = 0; i < E; ++i) {
        const float square = in.g[i] * in.g[i];
        column_sums.v[i] += square;
        row_sum += square;
      }
      features<E, Factored, true>(r, n, here.matrix.columns, at, in, scale,
                                  LaggedLayer<H, E, kStageSums ? kThreads : 1>{
                                      net, units, kStageSums ? here.staged + thread : sums.v});
    } else {
      features<E, Factored, true>(r, n, here.matrix.columns, at, in, scale, ExactLayer<H, E>{net, units});
    }
    float direction[E], magnitude[E];
    outputs<E>(net, units, direction, magnitude);
    LOPT_UNROLL
    for (int i = 0; i < E; ++i) in.p[i] = net.param_scale * in.p[i] - direction[i] * exp2_of(magnitude[i]);
    store(r.output, Storage(r.parameter), at, in.p);
  }
};

// ---- launches that are not made of items ----

// The factor of one clip group: min(1, max_norm / (norm + ...)), NaN as in PyTorch.
template <class Block, int H>
LOPT_DEVICE void clip_total(Block& block, Shared<H>& shared, const GpuLaunch& launch, int32_t index) {
  const ClipRecord& group = launch.groups[index];
  block.sync();
  block.each([&](int thread) {
    double total = 0;
    for (int32_t i = group.begin + thread; i < group.end; i += kThreads) total += launch.step.clip_sums[i];
    shared.parts[thread] = total;
  });
  block.sync();
  block.each([&](int thread) {
    if (thread) return;
    double total = 0;
    for (int i = 0; i < kThreads; ++i) total += shared.parts[i];
    const double factor = read(group.max_norm, group.type) / (sqrt(total) + kClipEpsilon);
    launch.step.clip_factors[group.group] = factor >= 1.0 ? 1.0 : factor;
  });
}

LOPT_DEVICE void count_step(const GpuLaunch& launch, int32_t tensor) {
  if (launch.step.found_inf && *launch.step.found_inf != 0.0f) return;
  int64_t* step = launch.records[tensor].step;
  if (step) *step += 1;
}

}  // namespace lopt
