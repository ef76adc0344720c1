// Pass 3 of small_fc_lopt with the network on tensor cores (mma.h). All other phases are those of
// gpu_passes.h.
//
// Every thread has one parameter at a time: it moves the state on and puts the features of that parameter
// into the memory of its warp; the warp computes the network for its 32 parameters; every thread writes its
// own. A warp takes part as a whole, whatever of it lies beside the tile.
#pragma once

#include "kernels/small_fc_lopt/gpu_passes.h"
#include "kernels/small_fc_lopt/mma.h"

namespace lopt {

// Narrower networks are filled up to this width with units that are zero.
constexpr int kMatmulLeast = 8;

// Features of the parameters of a warp, in whole slices of 8.
template <int H>
constexpr int kWarpFeatures = 24 * kMatmulStride<H>;

template <int H, bool Bfloat16>
struct alignas(16) MatmulShared {
  Shared<H> base;
  MatmulNetwork<H, Bfloat16> network;
  float x[kWarps][kWarpFeatures<H>];
  // Of each thread's parameter, while the warp needs the registers: places along x and y, value; lagged, sum
  // of g^2 along its column.
  const float* place[2][kThreads];
  float p[kThreads], column_sum[kThreads];
};

// Puts features into the memory of the warp; lagged, clips them and adds up their squares.
template <int H, bool Lagged>
struct StageFeatures {
  static constexpr bool kFolded = false;
  float* slot;
  float* sums;
  const float* limit;

  template <int F>
  LOPT_DEVICE void operator()(Index<F>, const float (&x)[1]) const {
    float value = x[0];
    if constexpr (Lagged) {
      add_squares(x, sums[F * kThreads]);
      value = at_most(limit[F], at_least(-limit[F], value));
    }
    slot[F * kMatmulStride<H>] = value;
  }
};

// Whether the tensor is factored and statistics are lagged is known at run time: the network, which is most
// of the code, depends on neither.
template <class Block, int H, bool Bfloat16>
struct MatmulPasses : Passes<Block, H> {
  static_assert(H >= kMatmulLeast && kMatmulElements<H> == 1, "a parameter for each lane");
  using Base = Passes<Block, H>;
  using Own = MatmulShared<H, Bfloat16>;
  template <typename T>
  using Threads = typename Block::template Threads<T>;
  using ColumnSums = typename Base::template ColumnSums<1>;
  using Base::block, Base::shared, Base::step, Base::r, Base::m, Base::layout;

  Own& own;

  // After open_item.
  LOPT_DEVICE MatmulPasses(Block& block, Own& own) : Base(block, own.base), own(own) {}

  // One item of kApply.
  LOPT_DEVICE void apply_matmul(int32_t index) {
    if (shared.numbers.skip) return;
    open_network();
    this->template open_tile<1>(index);
    const Walk& w = shared.walk;
    // As in Passes::apply: what the lagged sums of the factored axes are made from.
    const bool together = !several(r);
    const bool lagged = step.lagged, rows = r.factored && lagged && m.per_row == 1 && together;
    const bool columns = r.factored && lagged && together;
    if (lagged) {
      block.each([&](int thread) {
        LOPT_UNROLL
        for (int f = 0; f < kFeatures; ++f) shared.sums[f][thread] = 0;
      });
    }
    LOPT_NO_UNROLL
    for (int32_t turn = 0; turn < w.steps; ++turn) {
      block.sync();  // the turn before may still be reading what lies where places along x go
      block.each([&](int thread) {
        own.column_sum[thread] = 0;
        const int32_t column = column_of(w, turn, thread);
        if (r.factored && m.per_row != 1 && column < w.tile.columns)
          shared.x_in_row[0][thread] = this->x_in_row(w.tile.column + column);
      });
      LOPT_NO_UNROLL
      for (int32_t base = 0; base < w.tile.rows; base += w.lanes.rows) {
        Threads<Values<1>> row_sum;
        block.each([&](int thread) {
          row_sum[thread].v[0] = 0;
          stage(turn, base, thread, row_sum[thread].v[0]);
        });
        if (rows) {  // before the network, which needs the registers
          group_sum(block, row_sum, w.lanes.columns < kWarpLanes ? w.lanes.columns : kWarpLanes);
          block.each([&](int thread) {
            this->keep_row_sum(w, turn, base + this->row_of(w, thread), thread, row_sum[thread].v[0]);
          });
        }
        block.warps([&](auto& warp, int index) {
          // Its first lane is inside if any is.
          if (!inside(shared.walk, turn, base, index * kWarpLanes)) return;
          Own& here = *(&own + this->zero());
          const bool factored = here.base.record.factored;
          const auto bias = [&](int slot, int j, float (&to)[2]) {
            if (factored) {
              float x[2], y[2];
              load_floats(here.place[0][index * kWarpLanes + slot] + 4 + j, x);
              load_floats(here.place[1][index * kWarpLanes + slot] + 4 + j, y);
              to[0] = x[0] + y[0], to[1] = x[1] + y[1];
            } else {
              to[0] = here.base.network.b0[j], to[1] = here.base.network.b0[j + 1];
            }
          };
          warp.sync();
          matmul_mlp(warp, here.network, factored, here.base.step.hidden_layers, here.x[index], bias,
                     here.x[index]);
        });
        block.each([&](int thread) { write(turn, base, thread); });
        block.warps([&](auto& warp, int) { warp.sync(); });  // before features lie where outputs were
      }
      if (columns) {
        Threads<ColumnSums> column_sums;
        block.each([&](int thread) { column_sums[thread].v[0] = own.column_sum[thread]; });
        this->template write_column_sums<1>(w, turn, column_sums);
      }
    }
    if (!lagged) return;
    if (rows) this->write_row_sums(w);
    float* out = this->scratch() + layout.feature_sums + int64_t(w.index) * kFeatures;
    this->sum_threads(r.factored ? int(kFactoredFeatures) : int(kFeatures),
                      [&](int f, float total) { out[f] = total; });
  }

 private:
  LOPT_DEVICE static int32_t column_of(const Walk& w, int32_t turn, int thread) {
    return turn * w.lanes.columns + (thread & (w.lanes.columns - 1));
  }
  LOPT_DEVICE static bool inside(const Walk& w, int32_t turn, int32_t base, int thread) {
    return column_of(w, turn, thread) < w.tile.columns && base + Base::row_of(w, thread) < w.tile.rows;
  }

  // The network to shared memory, and of the folded one what is needed beside it.
  LOPT_DEVICE void open_network() {
    const auto& folded = *reinterpret_cast<const Folded<H>*>(this->scratch() + layout.network);
    prepare_matmul(block, folded, r.factored, step.hidden_layers, own.network);
    block.each([&](int thread) {
      for (int i = thread; i < H; i += kThreads) shared.network.b0[i] = folded.b0[i];
      if (thread < kFeatures) shared.network.limit[thread] = folded.limit[thread];
      if (thread == 0) shared.network.param_scale = folded.param_scale;
      float* x = own.x[thread / kWarpLanes];
      for (int i = thread % kWarpLanes; i < kWarpFeatures<H>; i += kWarpLanes) x[i] = 0;
    });
    block.sync();
  }

  // Moves a thread's parameter on, all but its value, and puts its features where the warp reads them.
  LOPT_DEVICE void stage(int32_t turn, int32_t base, int thread, float& row_sum) {
    Own& own_here = *(&own + this->zero());
    Shared<H>& here = own_here.base;
    float* slot = own_here.x[thread / kWarpLanes] + thread % kWarpLanes;
    const TensorRecord& r = here.record;
    if (!inside(here.walk, turn, base, thread)) {  // any finite numbers, and a place that there is
      LOPT_UNROLL
      for (int f = 0; f < kFeatures; ++f) slot[f * kMatmulStride<H>] = 0;
      const float* places = here.step.scratch + r.scratch;
      own_here.place[0][thread] = places + here.layout.x_places;
      own_here.place[1][thread] = places + here.layout.y_places;
      return;
    }
    const int32_t row = base + Base::row_of(here.walk, thread);
    const int64_t at = (here.walk.tile.row + row) * here.matrix.columns + here.walk.tile.column +
                       column_of(here.walk, turn, thread);
    Inputs<1> in;
    read_inputs(r, at, in);
    move_inputs(here.numbers, in);
    write_state(r, here.numbers, at, in);
    const float square = in.g[0] * in.g[0];  // for lagged statistics
    own_here.column_sum[thread] += square;
    row_sum = square;
    own_here.p[thread] = in.p[0];
    if (!r.factored) return stage_features<false>(here, at, in, NoScale(), slot, thread);
    typename Base::template Factors<1> factors;
    const float* x = here.step.scratch + r.scratch + here.layout.x_places +
                     (here.walk.tile.row + row) * here.matrix.per_row * place_floats(H);
    if (here.matrix.per_row != 1) x += int64_t(here.x_in_row[0][thread]) * place_floats(H);
    const float* y = Base::y_place(here, row, at);
    Base::keep_factors(y, factors);
    own_here.place[0][thread] = x;
    own_here.place[1][thread] = y;
    const typename Base::template Scale<1, false> scale = {&factors, nullptr, x, nullptr, true};
    stage_features<true>(here, at, in, scale, slot, thread);
  }
  template <bool Factored, typename Scale>
  LOPT_DEVICE static void stage_features(Shared<H>& here, int64_t at, const Inputs<1>& in, const Scale& scale,
                                         float* slot, int thread) {
    const auto stage = [&](const auto& to) {
      features<1, Factored, true>(here.record, here.numbers, here.matrix.columns, at, in, scale, to);
    };
    if (here.step.lagged)
      stage(StageFeatures<H, true>{slot, here.sums[0] + thread, here.network.limit});
    else
      stage(StageFeatures<H, false>{slot, nullptr, nullptr});
  }

  // Writes a thread's parameter, given the outputs of the network.
  LOPT_DEVICE void write(int32_t turn, int32_t base, int thread) {
    const Own& own_here = *(&own + this->zero());
    const Shared<H>& here = own_here.base;
    if (!inside(here.walk, turn, base, thread)) return;
    const int32_t row = base + Base::row_of(here.walk, thread);
    const int64_t at = (here.walk.tile.row + row) * here.matrix.columns + here.walk.tile.column +
                       column_of(here.walk, turn, thread);
    const float* out = own_here.x[thread / kWarpLanes] + thread % kWarpLanes;
    const float value[1] = {here.network.param_scale * own_here.p[thread] -
                            out[0] * exp2_of(out[kWarpLanes])};
    store(here.record.output, Storage(here.record.parameter), at, value);
  }
};

}  // namespace lopt
