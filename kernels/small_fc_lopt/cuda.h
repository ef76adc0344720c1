// The kernels of cuda.cu: work items, one function for each width of the network; and that of cuda_parts.cu.
// null, or what went wrong.
#pragma once

namespace lopt {

struct GpuLaunch;

const char* launch_width_2(const GpuLaunch& launch, void* stream);
const char* launch_width_4(const GpuLaunch& launch, void* stream);
const char* launch_width_8(const GpuLaunch& launch, void* stream);
const char* launch_width_16(const GpuLaunch& launch, void* stream);
const char* launch_width_32(const GpuLaunch& launch, void* stream);
const char* launch_width_64(const GpuLaunch& launch, void* stream);
const char* launch_parts(const GpuLaunch& launch, void* stream);

}  // namespace lopt
