// Steps over parts of tensors: the phases of csrc/core.h.
#include "csrc/parts.h"

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "csrc/tensor_step.h"

namespace lopt {
namespace {

static_assert(kPartSquares == kFeatures, "core.h says how many squares there are");

constexpr int32_t kMostAxes = 64;

int64_t product(const int64_t* sizes, int32_t begin, int32_t end) {
  int64_t n = 1;
  for (int32_t axis = begin; axis < end; ++axis) n *= sizes[axis];
  return n;
}

// Calls f(place in the whole, place in the part, length) for the runs of elements that a vector along all
// axes but `without` has in the part.
template <typename F>
void for_each_run(const TensorPart& part, int32_t without, const F& f) {
  int32_t axes[kMostAxes];
  int32_t count = 0;
  for (int32_t axis = 0; axis < part.ndim; ++axis)
    if (axis != without) axes[count++] = axis;
  int64_t place = 0, stride = 1, runs = 1, length = 1;
  int64_t strides[kMostAxes], at[kMostAxes] = {};
  for (int32_t i = count; i-- > 0; stride *= part.whole[axes[i]]) {
    strides[i] = stride;
    place += stride * part.begin[axes[i]];
    (i + 1 == count ? length : runs) *= part.sizes[axes[i]];
  }
  for (int64_t run = 0; run < runs; ++run) {
    f(place, run * length, length);
    for (int32_t i = count - 1; i-- > 0;) {
      place += strides[i];
      if (++at[i] < part.sizes[axes[i]]) break;
      place -= strides[i] * part.sizes[axes[i]];
      at[i] = 0;
    }
  }
}

// The vectors along the two axes of the whole tensor, as fold_factors and move_factors take them. Its
// accumulators are those of the state, until `copy` makes them scratch memory.
template <typename T>
struct Whole {
  TensorStep<T> c;
  T *x_copy = nullptr, *y_copy = nullptr;

  Whole(const TensorStep<T>& part, const PartTensor& t, Arena& arena) : c(part) {
    c.tensor.loops = loops_of(t.part, t.part.whole, part.tensor.loops);
    if (!part.tensor.loops.factored) return;
    const Loops& l = c.tensor.loops;
    c.x_size = l.batch0 * l.x * l.batch1 * l.batch2;
    c.y_size = l.batch0 * l.batch1 * l.y * l.batch2;
    c.x_stride = c.x_size + kPadding;
    c.y_stride = c.y_size + kPadding;
    c.x_sums = arena.take<T>(c.x_size);
    c.y_sums = arena.take<T>(c.y_size);
    c.scratch = arena.take<T>(std::max(c.x_stride, c.y_stride));
    c.x_factor = arena.take<T>(kFactored * c.x_stride);
    c.y_factor = arena.take<T>(kFactored * c.y_stride);
    c.x_bias = arena.take<T>(c.hidden_size * c.x_stride);
    c.y_bias = arena.take<T>(c.hidden_size * c.y_stride);
    x_copy = arena.take<T>(kFactored * c.x_size);
    y_copy = arena.take<T>(kFactored * c.y_size);
  }

  void copy() {
    std::copy_n(c.x_accumulator, kFactored * c.x_size, x_copy);
    std::copy_n(c.y_accumulator, kFactored * c.y_size, y_copy);
    c.x_accumulator = x_copy;
    c.y_accumulator = y_copy;
  }

  // Moves the accumulators on by the means of g^2 along both axes.
  void move(const double* means) {
    for (int64_t i = 0; i < c.x_size; ++i) c.x_sums[i] = T(means[i]);
    for (int64_t i = 0; i < c.y_size; ++i) c.y_sums[i] = T(means[c.x_size + i]);
    table<T>().move_factors(c, c.x_sums, T(1), c.y_sums, T(1));
  }

  // Factors and biases, of which the part gets its own.
  void fold(const TensorPart& axes, const TensorStep<T>& part) const {
    table<T>().fold_factors(c);
    const auto cut = [&](int32_t without, const T* from, int64_t from_stride, T* to, int64_t to_stride,
                         int64_t vectors) {
      for_each_run(axes, without, [&](int64_t whole, int64_t place, int64_t n) {
        for (int64_t k = 0; k < vectors; ++k)
          std::copy_n(from + k * from_stride + whole, n, to + k * to_stride + place);
      });
    };
    cut(axes.y_axis, c.x_factor, c.x_stride, part.x_factor, part.x_stride, kFactored);
    cut(axes.y_axis, c.x_bias, c.x_stride, part.x_bias, part.x_stride, c.hidden_size);
    cut(axes.x_axis, c.y_factor, c.y_stride, part.y_factor, part.y_stride, kFactored);
    cut(axes.x_axis, c.y_bias, c.y_stride, part.y_bias, part.y_stride, c.hidden_size);
  }
};

// One tensor during one phase.
template <typename T>
class PartStep {
 public:
  PartStep(const Spec& spec, const PartTensor& tensor, const Pool& pool, Arena& arena)
      : spec_(spec),
        t_(tensor),
        pool_(pool),
        c_(prepared(spec, tensor, arena)),
        whole_(c_, tensor, arena),
        factored_(tensor.tensor.loops.factored),
        here_(c_.n > 0),
        exact_(!c_.lagged) {}

  void factor_sums() {
    const bool sums = factored_ && here_ && exact_;
    if (sums) run_tiles(pool_, c_, k_.factor_statistics);
    give_factors(sums);
  }

  void feature_sums() {
    const bool sums = here_ && exact_;
    if (sums) {
      fold_factors(true);
      run_tiles(pool_, c_, k_.feature_statistics);
    }
    give_squares(sums);
  }

  void apply() {
    fold_factors(spec_.lagged);
    if (here_) {
      double squares[kFeatures];
      if (exact_)
        std::copy_n(t_.squares, kFeatures, squares);
      else
        read_mean_squares(c_, squares);
      fold_network(c_, spec_, squares);
      c_.lagged = spec_.lagged;
      run_tiles(pool_, c_, k_.apply);
    }
    if (!spec_.lagged) return;
    give_factors(factored_ && here_);
    give_squares(here_);
  }

  void finish() {
    if (factored_) whole_.move(t_.factors);
    write_mean_squares(c_, t_.squares);
  }

 private:
  static TensorStep<T> prepared(const Spec& spec, const PartTensor& tensor, Arena& arena) {
    TensorStep<T> c = describe<T>(spec, tensor.tensor, 1.0);
    arena.clear();
    take_scratch(c, arena);
    fold_time(c, spec);
    return c;
  }

  // The factors of this phase's tiles. The state moves on unless it is kept: then a copy does.
  void fold_factors(bool keep) {
    if (!factored_) return;
    if (keep) whole_.copy();
    if (exact_) whole_.move(t_.factors);
    if (here_) whole_.fold(t_.part, c_);
  }

  // What the part adds to the means of g^2 over the whole, from the sums of its tiles.
  void give_factors(bool sums) {
    std::fill_n(t_.factors, part_sums(t_.part, factored_), 0.0);
    if (!sums) return;
    k_.add_factor_sums(c_);
    const Loops& l = whole_.c.tensor.loops;
    const auto spread = [&](int32_t without, const T* from, int64_t count, double* to) {
      const double squares = double(count) * double(t_.part.copies);
      for_each_run(t_.part, without, [&](int64_t whole, int64_t place, int64_t n) {
        for (int64_t i = 0; i < n; ++i) to[whole + i] = double(from[place + i]) / squares;
      });
    };
    spread(t_.part.y_axis, c_.x_sums, l.y, t_.factors);
    spread(t_.part.x_axis, c_.scratch, l.x, t_.factors + whole_.c.x_size);
  }

  // What the part adds to the mean squares of the features, likewise.
  void give_squares(bool sums) {
    std::fill_n(t_.squares, kFeatures, 0.0);
    if (!sums) return;
    mean_squares(c_, t_.squares);
    const double share = double(c_.n) / (double(whole_elements(t_.part)) * double(t_.part.copies));
    for (int f = 0; f < c_.features(); ++f) t_.squares[f] *= share;
  }

  const KernelTable<T>& k_ = table<T>();
  const Spec& spec_;
  const PartTensor& t_;
  const Pool& pool_;
  TensorStep<T> c_;
  Whole<T> whole_;
  const bool factored_, here_;
  const bool exact_;  // the statistics are those of this step
};

template <typename T>
void run(const Spec& spec, PartPhase phase, const PartTensor& tensor, const Pool& pool, Arena& arena) {
  PartStep<T> step(spec, tensor, pool, arena);
  switch (phase) {
    case PartPhase::factor_sums:
      return step.factor_sums();
    case PartPhase::feature_sums:
      return step.feature_sums();
    case PartPhase::apply:
      return step.apply();
    case PartPhase::finish:
      return step.finish();
  }
}

template <typename T>
size_t bytes_of(const Spec& spec, const PartTensor& tensor) {
  TensorStep<T> c = describe<T>(spec, tensor.tensor, 1.0);
  return Arena::bytes([&](Arena& counter) {
    take_scratch(c, counter);
    Whole<T>(c, tensor, counter);
  });
}

void check_parts(const Spec& spec, PartPhase phase, const PartTensor* tensors, int64_t count) {
  check_phase(spec, phase);
  for (int64_t i = 0; i < count; ++i) {
    const auto& [tensor, part, factors, squares] = tensors[i];
    if (!part.begin) refuse(i, "a part needs a begin");
    check_part(i, part, tensor.loops);
    if (tensor.clip_group >= 0) refuse(i, "a part is in no clip group");
    if (whole_elements(part) == 0) continue;
    if (!squares || (tensor.loops.factored && (!factors || !tensor.row || !tensor.column)) ||
        (spec.lagged && !tensor.mean_squares))
      refuse(i, "a pointer is null");
  }
}

}  // namespace

int64_t whole_elements(const TensorPart& part) { return product(part.whole, 0, part.ndim); }

Loops loops_of(const TensorPart& part, const int64_t* sizes, const Loops& like) {
  if (!like.factored) return {1, 1, 1, product(sizes, 0, part.ndim), 1, like.x_is_row, false};
  return {product(sizes, 0, part.x_axis),
          sizes[part.x_axis],
          product(sizes, part.x_axis + 1, part.y_axis),
          sizes[part.y_axis],
          product(sizes, part.y_axis + 1, part.ndim),
          like.x_is_row,
          true};
}

void check_part(int64_t index, const TensorPart& part, const Loops& l) {
  if (part.ndim < 1 || part.ndim > kMostAxes || !part.sizes || !part.whole || part.copies < 1)
    refuse(index, "a part needs 1 to 64 axes, and a copy");
  for (int32_t axis = 0; axis < part.ndim; ++axis) {
    const int64_t size = part.sizes[axis], begin = part.begin ? part.begin[axis] : 0;
    if (size < 0 || begin < 0 || begin > part.whole[axis] - size)
      refuse(index, "the part does not lie in the whole");
  }
  if (l.factored && !(0 <= part.x_axis && part.x_axis < part.y_axis && part.y_axis < part.ndim))
    refuse(index, "the part has no such factored axes");
  const Loops own = loops_of(part, part.sizes, l);
  if (own.batch0 != l.batch0 || own.x != l.x || own.batch1 != l.batch1 || own.y != l.y ||
      own.batch2 != l.batch2)
    refuse(index, "the loops do not agree with the part");
}

void check_phase(const Spec& spec, PartPhase phase) {
  if (int32_t(phase) < 0 || phase > PartPhase::finish) throw std::invalid_argument("unknown phase of a step");
  if (phase == PartPhase::finish && !spec.lagged)
    throw std::invalid_argument("only lagged statistics have a phase `finish`");
}

int64_t part_sums(const TensorPart& part, bool factored) {
  if (!factored) return 0;
  const int64_t n = whole_elements(part);
  return n == 0 ? 0 : n / part.whole[part.y_axis] + n / part.whole[part.x_axis];
}

void small_fc_phase(const Spec& spec, PartPhase phase, const PartTensor* tensors, int64_t count,
                    const Pool& pool) {
  check_parts(spec, phase, tensors, count);
  std::vector<Tensor> plain;
  plain.reserve(size_t(count));
  for (int64_t i = 0; i < count; ++i) plain.push_back(tensors[i].tensor);
  check(spec, plain.data(), count, 0);
  std::vector<Share> shares;
  for (int64_t i = 0; i < count; ++i) {
    const PartTensor& t = tensors[i];
    if (whole_elements(t.part) == 0) continue;
    const bool single = t.tensor.dtype == Dtype::float32;
    shares.push_back({i, elements(t.tensor), single ? bytes_of<float>(spec, t) : bytes_of<double>(spec, t)});
  }
  for_each_tensor(shares, pool, [&](int64_t i, const Pool& threads, Arena& arena, bool) {
    if (tensors[i].tensor.dtype == Dtype::float32)
      run<float>(spec, phase, tensors[i], threads, arena);
    else
      run<double>(spec, phase, tensors[i], threads, arena);
  });
}

}  // namespace lopt
