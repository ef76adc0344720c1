// Times of the passes inside real steps, for `lopt-fast bench passes`.
#pragma once

#include <vector>

#include "csrc/core.h"

namespace lopt {

// One entry per timed step, in seconds.
struct StepTimes {
  std::vector<double> step, factor_statistics, feature_statistics, apply;
};

// Takes `steps` steps after an untimed one on `count` float32 tensors with these loops, made for the purpose.
// `theta`: flat meta-parameters, float32. Throws as small_fc_step does.
StepTimes time_passes(const Spec& spec, const Loops& loops, int64_t count, const float* theta,
                      const Pool& pool, int steps);

}  // namespace lopt
