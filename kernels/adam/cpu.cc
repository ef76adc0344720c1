// adam on processors with SIMD units: see README.md. Compiled once for each instruction set.
#include "kernels/adam/kernel.h"
#include "kernels/common/blocks.h"
#include "kernels/statistics/spreads.h"

namespace lopt {
namespace {

template <typename T>
void update(const Operand<T>& t, const AdamNumbers<T>& numbers, int64_t begin, int64_t end, Spread* spreads) {
  using V = Vec<T>;
  const AdamNumbers<T> a = numbers;
  const V bound = splat(t.grad_bound);
  Spreads<T> seen(t, spreads);
  for_each_block<true>(t, begin, end, [&](const Streams<T>& s, int64_t, int64_t n, int64_t padded) {
    if (spreads) seen.add_inputs(s, n, padded);
    for (int64_t i = 0; i < padded; i += kLanes<T>) {
      const V g = clipped<T>(load(s.g + i) * t.grad_scale, bound) + a.l2 * load(s.p + i);
      const V m = average(load(s.m[0] + i), t.d_momentum[0], g);
      const V v = average(load(s.v[0] + i), t.d_second_moment[0], g * g);
      store<T>(s.m[0] + i, m);
      store<T>(s.v[0] + i, v);
      const V numerator = a.scale * (a.momentum_factor * m + a.gradient_factor * g);
      store_result(t, s, i, numerator / (a.epsilon + root<T>(a.v_factor * v + a.root_epsilon)));
    }
    if (spreads) seen.add_averages(s, n, false);
  });
  if (spreads) seen.finish();
}

}  // namespace

namespace LOPT_ISA {
const AdamKernels& adam() {
  static constexpr AdamKernels kernels = {{update<float>}, {update<double>}};
  return kernels;
}
}  // namespace LOPT_ISA
}  // namespace lopt
