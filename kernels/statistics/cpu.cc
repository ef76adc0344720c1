// statistics on processors with SIMD units: see README.md. Compiled once for each instruction set.
#include "kernels/statistics/kernel.h"
#include "kernels/statistics/spreads.h"

namespace lopt {
namespace {

template <typename T>
void spreads(const Operand<T>& t, bool moved, int64_t begin, int64_t end, Spread* spreads) {
  Spreads<T> seen(t, spreads);
  for_each_block<false>(t, begin, end, [&](const Streams<T>& s, int64_t, int64_t n, int64_t padded) {
    seen.add_inputs(s, n, padded);
    seen.add_averages(s, n, moved);
  });
  seen.finish();
}

}  // namespace

namespace LOPT_ISA {
const StatisticsKernels& statistics() {
  static constexpr StatisticsKernels kernels = {{spreads<float>}, {spreads<double>}};
  return kernels;
}
}  // namespace LOPT_ISA
}  // namespace lopt
