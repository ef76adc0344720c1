// Python's view of a part of a tensor, for python.cc and gpu_python.cc.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

#include "csrc/core.h"

namespace lopt {

// TensorPart with the sizes that it points to.
struct OwnedPart {
  std::vector<int64_t> sizes, whole, begin;
  int32_t x_axis, y_axis;
  int64_t copies;

  TensorPart view() const {
    return {int32_t(sizes.size()), sizes.data(), whole.data(), begin.data(), x_axis, y_axis, copies};
  }
};

inline PartPhase part_phase_of(const std::string& name) {
  static const char* const kNames[] = {"factor_sums", "feature_sums", "apply", "finish"};
  const auto* const found = std::find(std::begin(kNames), std::end(kNames), name);
  if (found == std::end(kNames)) throw std::invalid_argument("unknown phase " + name);
  return PartPhase(found - kNames);
}

}  // namespace lopt
