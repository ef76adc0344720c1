// Steps over parts of tensors on NVIDIA GPUs: the kernel around gpu_parts.h, for networks of every width.
#include <cuda_runtime.h>

#include "kernels/small_fc_lopt/cuda.h"
#include "kernels/small_fc_lopt/gpu_parts.h"

namespace lopt {
namespace {

__global__ void __launch_bounds__(kThreads) part_kernel(const __grid_constant__ GpuLaunch launch) {
  __shared__ PartShared shared;
  DeviceBlock block;
  part_block(block, shared, launch, int32_t(blockIdx.x));
}

}  // namespace

const char* launch_parts(const GpuLaunch& launch, void* stream) {
  part_kernel<<<launch.parts.blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(launch);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace lopt
