// Settings of the emulated GPU (csrc/gpu.h, gpu_emulator), for tests.
#pragma once

#include <cstdint>

namespace lopt {

struct EmulatorSettings {
  int32_t multiprocessors = 8;  // blocks that hold an item at the same time
  int64_t l2_bytes = 1 << 20;
  int32_t compute_capability = 90;
  uint64_t seed = 0;         // not 0: items are done in a random order that a device could take
  uint64_t thread_seed = 0;  // not 0: so are the threads of a block (csrc/emulated_block.h)
  int64_t launches = 0;
};
EmulatorSettings& emulator_settings();

}  // namespace lopt
