// A step over parts of tensors (csrc/core.h) on GPUs: what is handed over between work items of gpu_passes.h.
//
// Each tensor has two records. `local` is the part: its tiles are those of kFactorSums, kFeatureSums,
// kNetwork and kApply. `whole` stands for the row and column of the whole tensor: kAxes, kFold and kFinish
// work on its segments. It has no elements, and a tile for each batch0 only so that every place of an axis
// has one partial sum.
#pragma once

#include "kernels/small_fc_lopt/gpu_passes.h"

namespace lopt {

// Nothing here depends on the width of the network but where things lie in scratch memory: compiled once.
struct PartShared {
  Shared<2> base;  // its record is `local`
  Matrix whole_matrix;
  ScratchLayout whole_layout;
  int64_t begin[kPartAxes];
  int32_t tensor;
  int32_t share, shares;  // this block's share of the work on the tensor
};

template <class Block>
struct PartPasses : Passes<Block, 2> {
  using Base = Passes<Block, 2>;
  using Base::block, Base::shared, Base::step, Base::r, Base::m, Base::layout;

  const PartShared& own;
  const TensorRecord& whole;
  const PartRecord& part;
  const PartPhase phase;
  const int32_t width;

  // After open_part.
  LOPT_DEVICE PartPasses(Block& block, PartShared& own, const GpuLaunch& launch)
      : Base(block, own.base),
        own(own),
        whole(launch.parts.whole[own.tensor]),
        part(launch.parts.parts[own.tensor]),
        phase(launch.parts.phase),
        width(launch.width) {}

  // Means of g^2 over the whole become the partial sums of `whole`, mean squares of the features those of
  // both records. The accumulators are copied where those of `whole` are not those of the state.
  LOPT_DEVICE void take() {
    if (r.factored) {
      take_means(true);
      take_means(false);
      if (whole.row != r.row) {
        copy(r.row, whole.row, this->is_row(true));
        copy(r.column, whole.column, this->is_row(false));
      }
    }
    if (r.row_tiles) take_squares(r, layout, double(m.rows) * double(m.columns));
    take_squares(whole, own.whole_layout, double(own.whole_matrix.rows) * double(own.whole_matrix.columns));
  }

  // Factors and biases of the part's rows and columns.
  LOPT_DEVICE void cut() {
    if (!r.factored || r.row_tiles == 0) return;
    cut_axis(true);
    cut_axis(false);
  }

  // What the part adds to the means over the whole, from the sums of its tiles.
  LOPT_DEVICE void give() {
    if (r.row_tiles == 0) return;
    if (step.lagged && phase != PartPhase::apply && read(r.t, r.t_type) != 0) return;  // no sums were formed
    if (phase != PartPhase::feature_sums && r.factored) {
      give_means(true);
      give_means(false);
    }
    if (phase != PartPhase::factor_sums && own.share == 0) give_squares();
  }

 private:
  // f(0) .. f(count - 1), by all blocks of the tensor.
  template <typename F>
  LOPT_DEVICE void for_each(int64_t count, F f) {
    block.each([&](int thread) {
      for (int64_t i = int64_t(own.share) * kThreads + thread; i < count; i += int64_t(own.shares) * kThreads)
        f(i);
    });
  }

  LOPT_DEVICE float* scratch_of(const TensorRecord& record) const {
    return global(step.scratch) + record.scratch;
  }

  // Elements of the whole that a place of an axis stands for.
  LOPT_DEVICE double count(bool x) const { return double(x ? whole.y : whole.x); }
  LOPT_DEVICE const float* means(bool x) const { return part.factors + (x ? 0 : own.whole_matrix.x_size); }

  // Place in the whole of a place of the part.
  LOPT_DEVICE int64_t place_in_whole(bool x, int64_t place) const {
    const int32_t without = x ? part.y_axis : part.x_axis;
    int64_t at = 0, stride = 1;
    LOPT_NO_UNROLL
    for (int32_t axis = part.axes - 1; axis >= 0; --axis) {
      if (axis == without) continue;
      const int64_t size = part.size[axis], next = place / size;
      at += (own.begin[axis] + place - next * size) * stride;
      stride *= part.whole[axis];
      place = next;
    }
    return at;
  }

  LOPT_DEVICE void take_means(bool x) {
    const Matrix& w = own.whole_matrix;
    const float* from = means(x);
    float* to = scratch_of(whole) + (x ? own.whole_layout.x_sums : own.whole_layout.y_sums);
    const int64_t batch2 = whole.batch2;
    for_each(x ? w.x_size : w.y_size, [&](int64_t place) {
      int64_t at = place;
      if (x) {  // sums along x lie as [batch1][row][batch2]
        const int64_t row = place / w.per_row, in_row = place - row * w.per_row, batch1 = in_row / batch2;
        at = (batch1 * w.rows + row) * batch2 + in_row - batch1 * batch2;
      }
      to[at] = float(double(from[place]) * count(x));
    });
  }

  LOPT_DEVICE void copy(const float* from, float* to, bool x) {
    for_each(kFactored * (x ? own.whole_matrix.x_size : own.whole_matrix.y_size),
             [&](int64_t i) { to[i] = from[i]; });
  }

  LOPT_DEVICE void take_squares(const TensorRecord& record, const ScratchLayout& at, double elements) {
    float* to = scratch_of(record) + at.feature_sums;
    const int64_t tiles = int64_t(record.row_tiles) * record.column_tiles;
    for_each(tiles * kFeatures, [&](int64_t i) {
      to[i] = float(double(part.squares[i % kFeatures]) * (elements / double(tiles)));
    });
  }

  LOPT_DEVICE void cut_axis(bool x) {
    const int64_t floats = place_floats(width), quads = floats / 4;
    const float* from = scratch_of(whole) + (x ? own.whole_layout.x_places : own.whole_layout.y_places);
    float* to = scratch_of(r) + (x ? layout.x_places : layout.y_places);
    for_each((x ? m.x_size : m.y_size) * quads, [&](int64_t i) {
      const int64_t place = i / quads, quad = i - place * quads;
      float value[4];
      load_floats(from + place_in_whole(x, place) * floats + 4 * quad, value);
      store_floats(to + place * floats + 4 * quad, value);
    });
  }

  LOPT_DEVICE void give_means(bool x) {
    const Axis axis = x ? x_axis(r) : y_axis(r);
    const int32_t places = kThreads / axis.parts;  // at once
    float* to = part.factors + (x ? 0 : own.whole_matrix.x_size);
    const double squares = count(x) * double(part.copies);
    for (int64_t base = int64_t(own.share) * places; base < axis.size; base += int64_t(own.shares) * places) {
      block.sync();
      block.each([&](int thread) {
        const int64_t place = base + thread % places;
        shared.parts[thread] = place < axis.size ? this->partial_sum(x, axis, place, thread / places) : 0.0;
      });
      block.sync();
      block.each([&](int thread) {
        const int64_t place = base + thread;
        if (thread >= places || place >= axis.size) return;
        double total = 0;
        for (int32_t i = 0; i < axis.parts; ++i) total += shared.parts[i * places + thread];
        to[place_in_whole(x, place)] = float(total / squares);
      });
    }
  }

  LOPT_DEVICE void give_squares() {
    this->total_feature_sums();
    const Matrix& w = own.whole_matrix;
    const double scale =
        double(m.rows) * double(m.columns) / (double(w.rows) * double(w.columns) * double(part.copies));
    block.each([&](int thread) {
      if (thread < (r.factored ? int(kFactoredFeatures) : int(kFeatures)))
        part.squares[thread] = float(shared.squares[thread] * scale);
    });
  }
};

// Makes the tensor of block `index` known to all its threads.
template <class Block>
LOPT_DEVICE void open_part(Block& block, PartShared& shared, const GpuLaunch& launch, int32_t index) {
  block.each([&](int thread) {
    if (thread) return;
    int32_t tensor = 0;
    while (tensor + 1 < launch.tensors && launch.parts.parts[tensor + 1].first_block <= index) ++tensor;
    const TensorRecord& local = launch.parts.local[tensor];
    const TensorRecord& whole = launch.parts.whole[tensor];
    const PartRecord& part = launch.parts.parts[tensor];
    const int32_t end =
        tensor + 1 < launch.tensors ? launch.parts.parts[tensor + 1].first_block : launch.parts.blocks;
    shared.tensor = tensor;
    shared.share = index - part.first_block;
    shared.shares = end - part.first_block;
    shared.base.step = launch.step;
    shared.base.record = local;
    shared.base.matrix = matrix_of(local);
    if (local.row_tiles) shared.base.layout = scratch_layout(local, launch.width);  // else it holds nothing
    shared.whole_matrix = matrix_of(whole);
    shared.whole_layout = scratch_layout(whole, launch.width);
    LOPT_NO_UNROLL
    for (int32_t axis = 0; axis < part.axes; ++axis)
      shared.begin[axis] = int64_t(part.begin[part.first[axis]]) * part.step[axis];
  });
  block.sync();
}

// Block `index` of a launch of these kinds, 0 .. launch.parts.blocks - 1.
template <class Block>
LOPT_DEVICE void part_block(Block& block, PartShared& shared, const GpuLaunch& launch, int32_t index) {
  open_part(block, shared, launch, index);
  PartPasses<Block> passes(block, shared, launch);
  if (launch.kind == LaunchKind::take_sums)
    passes.take();
  else if (launch.kind == LaunchKind::cut_places)
    passes.cut();
  else
    passes.give();
}

}  // namespace lopt
