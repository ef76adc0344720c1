// What the driver (csrc/operations.cc) and the kernels (cpu.cc) of adam agree on.
#pragma once

#include <cstdint>

#include "kernels/common/operands.h"
#include "kernels/statistics/kernel.h"

namespace lopt {

// Numbers of one tensor, see lopt_fast.operations.AdamScalars; the decays are in the operand.
template <typename T>
struct AdamNumbers {
  T scale, momentum_factor, gradient_factor, v_factor, epsilon, root_epsilon,
      l2;  // scale: times learning rate
};

template <typename T>
struct AdamTable {
  // Elements begin to end. spreads: (quantities), written, of the averages after this step; or null.
  void (*update)(const Operand<T>&, const AdamNumbers<T>&, int64_t begin, int64_t end, Spread* spreads);
};

struct AdamKernels {
  AdamTable<float> f32;
  AdamTable<double> f64;
};

#define LOPT_DECLARE_ADAM(isa) \
  namespace isa {              \
  const AdamKernels& adam();   \
  }
LOPT_DECLARE_ADAM(v4)
LOPT_DECLARE_ADAM(v3)
LOPT_DECLARE_ADAM(v2)
LOPT_DECLARE_ADAM(portable)

}  // namespace lopt
