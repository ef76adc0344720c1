// What the XLA custom calls on GPUs share.
#pragma once

#include "csrc/gpu.h"
#include "csrc/xla_frame.h"

namespace lopt {

// XLA's stream for a call.
void* xla_stream(const xla::CallFrame& frame);

// The device that xla_set_device (csrc/xla.h) has named. Throws std::runtime_error if there is none.
const GpuDevice& xla_device();

}  // namespace lopt
