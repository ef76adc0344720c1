// statistics on NVIDIA GPUs.
#include "kernels/common/cuda_operations.h"
#include "kernels/statistics/gpu.h"

namespace lopt {
namespace {

__global__ void __launch_bounds__(kThreads) spreads_kernel(const __grid_constant__ OperationLaunch launch) {
  DeviceBlock block;
  spreads(block, shared_floats(), launch, this_item(launch));
}
__global__ void __launch_bounds__(kThreads) merge_kernel(const __grid_constant__ OperationLaunch launch) {
  DeviceBlock block;
  merge(block, shared_floats(), launch, this_item(launch));
}

}  // namespace

const char* launch_statistics(const OperationLaunch& launch, void* stream) {
  const bool tiles = launch.phase == OperationPhase::spreads;
  return launch_items(tiles ? spreads_kernel : merge_kernel, statistics_shared(launch.call), launch, stream);
}

}  // namespace lopt
