// What the drivers of steps over parts of tensors share (parts.cc, gpu_parts.cc).
#pragma once

#include <cstdint>

#include "csrc/core.h"

namespace lopt {

// Elements of the whole tensor.
int64_t whole_elements(const TensorPart& part);

// Axes of these sizes, merged as lopt_fast.layout.Loops does; x_is_row and factored as in `like`.
Loops loops_of(const TensorPart& part, const int64_t* sizes, const Loops& like);

// Throws std::invalid_argument, naming tensor `index`, unless the part is one of `begin` and these loops.
// `begin` may be null: then it is not looked at.
void check_part(int64_t index, const TensorPart& part, const Loops& loops);
// The same if `phase` is none of this specification.
void check_phase(const Spec& spec, PartPhase phase);

}  // namespace lopt
