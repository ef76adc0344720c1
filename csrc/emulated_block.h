// The threads of a block on the processor, for the emulator.
#pragma once

#include <cstdint>
#include <functional>

#include "kernels/common/device.h"

namespace lopt {

// Runs a kernel for one block. `state` 0: all threads go together from each() to each(). That is fast and
// blind to a barrier that is missing between two of them. Any other: the state of a random generator. Every
// thread has a stack of its own and runs alone up to the next barrier; which of those that can go on is next,
// is random. Where a barrier is missing, a thread then reads what is not there yet or no longer, and results
// change, unless the order of those accesses does not matter. What a warp does together (Block::warps) is run
// by its first lane for all of them.
//
// null, or what went wrong: threads that wait for others at a barrier that these do not come to.
const char* run_threads(uint64_t& state, const std::function<void(HostBlock&)>& kernel);

}  // namespace lopt
