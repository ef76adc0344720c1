// Spreads of a tensor's quantities, added up block by block by any kernel that passes over its elements: see
// README.md. Included by sources that are compiled once for each instruction set.
#pragma once

#include "kernels/common/blocks.h"
#include "kernels/statistics/kernel.h"

namespace lopt {
namespace {

// Of the elements of consecutive blocks of a range: for each block `add_inputs`, then `add_averages`; at the
// end `finish`.
template <typename T>
class Spreads {
  using V = Vec<T>;
  static constexpr int W = kLanes<T>;
  static constexpr int64_t kGroup = 8 * kBlock<T>;  // elements whose distances are from one number

 public:
  // spreads: (quantities), written; null: no function may be called.
  LOPT_INLINE Spreads(const Operand<T>& t, Spread* spreads) : t_(t), spreads_(spreads) {
    for (int q = 0; spreads && q < quantities(t); ++q) {
      spreads_[q] = {0, 0};
      sums_[q] = Sums{V{}, V{}, T(0)};
    }
  }

  // Parameter and gradient of n elements, `padded` with zeros to whole vectors.
  __attribute__((noinline)) void add_inputs(const Streams<T>& s, int64_t n, int64_t padded) {
    add(0, n, [&](int64_t i) __attribute__((always_inline)) { return load(s.p + i); });
    for (int64_t i = 0; i < padded; i += W)
      store<T>(g_ + i, clipped<T>(load(s.g + i) * t_.grad_scale, splat(t_.grad_bound)));
    add(1, n, [&](int64_t i) __attribute__((always_inline)) { return load(g_ + i); });
    add(2, n, [&](int64_t i) __attribute__((always_inline)) {
      const V x = load(g_ + i);
      return at_least<T>(x, -x);
    });
  }

  // The averages of the same elements, as they are; where `moved`, as they are after the gradient.
  __attribute__((noinline)) void add_averages(const Streams<T>& s, int64_t n, bool moved) {
    for (int k = 0; k < t_.momenta; ++k) {
      const T *m = s.m[k], d = t_.d_momentum[k];
      add_average(kFirstAverage + k, n, moved, m, [&](int64_t i) __attribute__((always_inline)) {
        return average(load(m + i), d, load(g_ + i));
      });
    }
    for (int k = 0; k < t_.second_moments; ++k) {
      const T *v = s.v[k], d = t_.d_second_moment[k];
      add_average(kFirstAverage + t_.momenta + k, n, moved, v, [&](int64_t i) __attribute__((always_inline)) {
        const V g = load(g_ + i);
        return average(load(v + i), d, g * g);
      });
    }
    if ((group_ += n) >= kGroup) merge_group();
  }

  void finish() {
    if (group_) merge_group();
  }

 private:
  // Of the elements since the last merge: distances from `center`, and their squares.
  struct Sums {
    V distances, squares;
    T center;
  };

  static T finite(double x) { return x - x == 0 ? T(x) : T(0); }

  template <typename F>
  LOPT_INLINE void add_average(int q, int64_t n, bool moved, const T* old, F new_value) {
    if (moved)
      add(q, n, new_value);
    else
      add(q, n, [&](int64_t i) __attribute__((always_inline)) { return load(old + i); });
  }

  // n numbers: value(i) gives those from i on, a vector.
  template <typename F>
  LOPT_INLINE void add(int q, int64_t n, F value) {
    Sums& sums = sums_[q];
    if (count_ + group_ == 0) sums.center = mean(n, value);
    const V center = splat(sums.center);
    V a = sums.distances, b = {}, squares = sums.squares, others = {};
    int64_t i = 0;
    for (; i + 2 * W <= n; i += 2 * W) {
      const V x = value(i) - center, y = value(i + W) - center;
      a += x, b += y;
      squares += x * x, others += y * y;
    }
    for (; i < n; i += W) {
      const V x = i + W <= n ? value(i) - center : first_lanes<T>(value(i) - center, n - i);
      a += x;
      squares += x * x;
    }
    sums.distances = a + b;
    sums.squares = squares + others;
  }

  template <typename F>
  LOPT_INLINE T mean(int64_t n, F value) const {
    V total = {};
    for (int64_t i = 0; i < n; i += W) total += i + W <= n ? value(i) : first_lanes<T>(value(i), n - i);
    return finite(double(sum<T>(total)) / double(n));
  }

  __attribute__((noinline)) void merge_group() {
    const double n = double(group_);
    for (int q = 0; q < quantities(t_); ++q) {
      Sums& sums = sums_[q];
      const double distance = double(sum<T>(sums.distances));
      const double about_mean = double(sum<T>(sums.squares)) - distance * distance / n;
      const Spread group = {double(sums.center) + distance / n, about_mean < 0 ? 0.0 : about_mean};
      merge(spreads_[q], double(count_), group, n);
      sums = Sums{V{}, V{}, finite(group.mean)};
    }
    count_ += group_;
    group_ = 0;
  }

  const Operand<T>& t_;
  Spread* spreads_;
  int64_t count_ = 0, group_ = 0;  // elements: merged, and since then
  Sums sums_[kMostQuantities];
  alignas(64) T g_[kBlock<T>];  // the block's gradient
};

}  // namespace
}  // namespace lopt
