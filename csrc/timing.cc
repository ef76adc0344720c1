#include "csrc/timing.h"

#include <chrono>
#include <stdexcept>

namespace lopt {
namespace {

struct Buffers {
  std::vector<float> param, grad, momentum, second_moment, row, column, mean_squares;

  explicit Buffers(const Loops& l) {
    const size_t n = size_t(l.batch0 * l.x * l.batch1 * l.y * l.batch2);
    const size_t row_size = l.factored ? n / size_t(l.x_is_row ? l.y : l.x) : n;
    const size_t column_size = l.factored ? n / size_t(l.x_is_row ? l.x : l.y) : 0;
    param.resize(n);
    grad.resize(n);
    momentum.resize(3 * n);
    second_moment.resize(n);
    row.resize(3 * row_size);
    column.resize(3 * column_size);
    mean_squares.resize(28);
    uint32_t seed = 1;  // a linear congruential generator: the values only have to differ
    const auto next = [&] {
      return float((seed = seed * 1664525u + 1013904223u) >> 8) / float(1 << 24) - 0.5f;
    };
    for (size_t i = 0; i < n; ++i) param[i] = 0.1f * next(), grad[i] = 0.01f * next();
  }
};

}  // namespace

StepTimes time_passes(const Spec& spec, const Loops& loops, int64_t count, const float* theta,
                      const Pool& pool, int steps) {
  if (loops.batch0 * loops.x * loops.batch1 * loops.y * loops.batch2 <= 0 || count <= 0 || steps <= 0)
    throw std::invalid_argument("time_passes needs at least one element, one tensor and one step");
  std::vector<Buffers> buffers;
  buffers.reserve(size_t(count));
  StepScalars scalars = {1.0, 0.0, 1.0, 0};
  std::vector<Tensor> tensors(size_t(count), Tensor{});
  for (Tensor& tensor : tensors) {
    Buffers& b = buffers.emplace_back(loops);
    tensor.dtype = Dtype::float32;
    tensor.loops = loops;
    tensor.param.data = tensor.output.data = b.param.data();
    tensor.grad.data = b.grad.data();
    tensor.apply = true;
    tensor.momentum = b.momentum.data();
    tensor.second_moment = b.second_moment.data();
    tensor.row = b.row.data();
    tensor.column = b.column.data();
    tensor.mean_squares = b.mean_squares.data();
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
