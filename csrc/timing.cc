#include "csrc/timing.h"

#include <algorithm>
#include <chrono>
#include <stdexcept>

#include "csrc/arena.h"

namespace lopt {
namespace {

// One tensor's arrays, on cache lines as the frameworks' are.
struct Buffers {
  size_t n, row_size, column_size;
  float *param, *grad, *momentum, *second_moment, *row, *column, *mean_squares;

  Buffers(Arena& arena, const Loops& l)
      : n(size_t(l.batch0 * l.x * l.batch1 * l.y * l.batch2)),
        row_size(l.factored ? n / size_t(l.x_is_row ? l.y : l.x) : n),
        column_size(l.factored ? n / size_t(l.x_is_row ? l.x : l.y) : 0) {
    const auto take = [&](size_t size) { return arena.take<float>(int64_t(size)); };
    param = take(n);
    grad = take(n);
    momentum = take(3 * n);
    second_moment = take(n);
    row = take(3 * row_size);
    column = take(3 * column_size);
    mean_squares = take(28);
  }

  void fill() const {
    uint32_t seed = 1;  // a linear congruential generator: the values only have to differ
    const auto next = [&] {
      return float((seed = seed * 1664525u + 1013904223u) >> 8) / float(1 << 24) - 0.5f;
    };
    for (size_t i = 0; i < n; ++i) param[i] = 0.1f * next(), grad[i] = 0.01f * next();
    std::fill_n(momentum, 3 * n, 0.0f);
    std::fill_n(second_moment, n, 0.0f);
    std::fill_n(row, 3 * row_size, 0.0f);
    std::fill_n(column, 3 * column_size, 0.0f);
    std::fill_n(mean_squares, 28, 0.0f);
  }
};

}  // namespace

StepTimes time_passes(const Spec& spec, const Loops& loops, int64_t count, const float* theta,
                      const Pool& pool, int steps) {
  if (loops.batch0 * loops.x * loops.batch1 * loops.y * loops.batch2 <= 0 || count <= 0 || steps <= 0)
    throw std::invalid_argument("time_passes needs at least one element, one tensor and one step");
  Arena arena;
  arena.reserve(size_t(count) * Arena::bytes([&](Arena& counter) { Buffers(counter, loops); }));
  StepScalars scalars = {1.0, 0.0, 1.0, 0};
  std::vector<Tensor> tensors(size_t(count), Tensor{});
  for (Tensor& tensor : tensors) {
    const Buffers b(arena, loops);
    b.fill();
    tensor.dtype = Dtype::float32;
    tensor.loops = loops;
    tensor.param.data = tensor.output.data = b.param;
    tensor.grad.data = b.grad;
    tensor.apply = true;
    tensor.momentum = b.momentum;
    tensor.second_moment = b.second_moment;
    tensor.row = b.row;
    tensor.column = b.column;
    tensor.mean_squares = b.mean_squares;
    tensor.theta = theta;
    tensor.scalars = &scalars;
    tensor.clip_group = -1;
  }
  StepTimes out;
  for (int i = 0; i <= steps; ++i, ++scalars.t) {
    PassTimes passes = {};
    const auto begin = std::chrono::steady_clock::now();
    small_fc_step(spec, tensors.data(), count, nullptr, 0, pool, &passes);
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - begin;
    if (i == 0) continue;
    out.step.push_back(taken.count());
    out.factor_statistics.push_back(passes.factor_statistics);
    out.feature_statistics.push_back(passes.feature_statistics);
    out.apply.push_back(passes.apply);
  }
  return out;
}

}  // namespace lopt
