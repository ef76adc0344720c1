// What the drivers gpu.cc and gpu_parts.cc share.
#pragma once

#include <cstdint>
#include <string>

#include "csrc/gpu.h"
#include "kernels/small_fc_lopt/gpu.h"

namespace lopt::gpu {

// Throws std::invalid_argument, naming the tensor.
[[noreturn]] void refuse(int64_t index, const std::string& why);

// Throws std::invalid_argument if a value of the step is out of range.
void check(const GpuStep& step);

constexpr int64_t kMost = 0x7fffffff;

// Scratch memory is handed out in pieces of so many bytes.
constexpr int64_t kAlign = 256;
inline int64_t align(int64_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

// The tensor with its tiles; `scratch` is not set.
TensorRecord record_of(const GpuTensor& t);

// What the device can run. Throws std::runtime_error if it was built for another version, or does not answer;
// std::invalid_argument if `scratch` is not aligned.
GpuProperties open_device(const GpuDevice& device, int32_t ordinal, const void* scratch);

// The variant that runs there. Throws std::invalid_argument if the one asked for cannot.
MlpVariant variant_of(const GpuStep& step, const GpuProperties& properties);
// Units computed.
int32_t width_of(const Spec& spec, bool matmul);

// Numbers of the step, network and variant; the rest of the header is 0.
void open_launch(GpuLaunch& launch, const GpuStep& step, MlpVariant variant);

// Adds the items of a phase of a tensor of the launch to its list. Whether there is room for them.
bool add_span(GpuLaunch& launch, int32_t tensor, int32_t phase);

// Throws std::runtime_error with what the device said, unless that is null.
void require_ok(const GpuDevice& device, const char* error);

}  // namespace lopt::gpu
