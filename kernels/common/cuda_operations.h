// How the phases of operations become CUDA kernels: a kernel for each, a block for each item. Included by
// kernels/*/cuda.cu; csrc/cuda_module.cc calls what is declared here. null, or what went wrong.
#pragma once

#include "kernels/common/gpu_operations.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#endif

namespace lopt {

const char* launch_element_mlp(const OperationLaunch& launch, void* stream);
const char* launch_adam(const OperationLaunch& launch, void* stream);
const char* launch_statistics(const OperationLaunch& launch, void* stream);

#if defined(__CUDACC__)

// On a multiple of 16 bytes.
__device__ __forceinline__ float* shared_floats() {
  extern __shared__ float4 lopt_shared_floats[];
  return reinterpret_cast<float*>(lopt_shared_floats);
}

__device__ __forceinline__ Item this_item(const OperationLaunch& launch) {
  return item_of(launch, int32_t(blockIdx.x));
}

inline const char* launch_items(void (*kernel)(const OperationLaunch), int64_t floats_of_shared_memory,
                                const OperationLaunch& launch, void* stream) {
  const int32_t items = launch.first_item[launch.tensors];
  kernel<<<items, kThreads, size_t(floats_of_shared_memory) * sizeof(float),
           static_cast<cudaStream_t>(stream)>>>(launch);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

#endif

}  // namespace lopt
