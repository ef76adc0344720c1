// What the driver (csrc/operations.cc) and the kernels (cpu.cc) of statistics agree on.
#pragma once

#include <cstdint>

#include "kernels/common/operands.h"

namespace lopt {

// Of some numbers: their mean and the sum of their squared distances from it.
struct Spread {
  double mean, squares;
};

// `a` of `count` numbers, then of those and `others` more whose spread is `b`. Means are weighted rather than
// moved by a difference: infinite ones stay infinite.
inline __attribute__((always_inline)) void merge(Spread& a, double count, const Spread& b, double others) {
  const double total = count + others, distance = b.mean - a.mean;
  a.squares += b.squares + distance * distance * (count * others / total);
  a.mean = (count * a.mean + others * b.mean) / total;
}

// Of a tensor's statistics there are: the parameter, the gradient, its absolute values (whose mean alone is
// used), each momentum, each second moment.
constexpr int kFirstAverage = 3;
constexpr int kMostQuantities = kFirstAverage + 2 * kMostAverages;
template <typename T>
int quantities(const Operand<T>& t) {
  return kFirstAverage + t.momenta + t.second_moments;
}

template <typename T>
struct StatisticsTable {
  // Spreads of all quantities of elements begin to end. `moved`: of the averages after this gradient, which
  // are not written.
  void (*spreads)(const Operand<T>&, bool moved, int64_t begin, int64_t end, Spread* spreads);
};

struct StatisticsKernels {
  StatisticsTable<float> f32;
  StatisticsTable<double> f64;
};

#define LOPT_DECLARE_STATISTICS(isa)     \
  namespace isa {                        \
  const StatisticsKernels& statistics(); \
  }
LOPT_DECLARE_STATISTICS(v4)
LOPT_DECLARE_STATISTICS(v3)
LOPT_DECLARE_STATISTICS(v2)
LOPT_DECLARE_STATISTICS(portable)

}  // namespace lopt
