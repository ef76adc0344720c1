// adam on NVIDIA GPUs.
#include "kernels/adam/gpu.h"
#include "kernels/common/cuda_operations.h"

namespace lopt {
namespace {

__global__ void __launch_bounds__(kThreads) adam_kernel(const __grid_constant__ OperationLaunch launch) {
  DeviceBlock block;
  adam(block, launch, this_item(launch));
}

}  // namespace

const char* launch_adam(const OperationLaunch& launch, void* stream) {
  return launch_items(adam_kernel, 0, launch, stream);
}

}  // namespace lopt
