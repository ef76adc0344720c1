// element_mlp on NVIDIA GPUs: a kernel for each phase of gpu.h, in this order. CUDA.md explains them.
#include "kernels/common/cuda_operations.h"
#include "kernels/element_mlp/gpu.h"

namespace lopt {
namespace {

// So many blocks on a multiprocessor at least: each thread may have 65,536 / kThreads / blocks registers.
#define LOPT_KERNEL(blocks) __global__ void __launch_bounds__(kThreads, blocks)

// Pass 1 and what follows it, of factored tensors alone.
LOPT_KERNEL(3) factor_sums_kernel(const __grid_constant__ OperationLaunch launch) {
  DeviceBlock block;
  factor_sums(block, *reinterpret_cast<FactorShared*>(shared_floats()), launch, this_item(launch));
}
LOPT_KERNEL(8) move_axes_kernel(const __grid_constant__ OperationLaunch launch) {
  DeviceBlock block;
  move_axes(block, launch, this_item(launch));
}
LOPT_KERNEL(8) row_scales_kernel(const __grid_constant__ OperationLaunch launch) {
  DeviceBlock block;
  row_scales(block, shared_floats(), launch, this_item(launch));
}

// Pass 2, and the network of each tensor.
LOPT_KERNEL(3) column_sums_kernel(const __grid_constant__ OperationLaunch launch) {
  DeviceBlock block;
  column_sums(block, shared_floats(), launch, this_item(launch));
}
LOPT_KERNEL(4) fold_kernel(const __grid_constant__ OperationLaunch launch) {
  DeviceBlock block;
  fold(block, shared_floats(), launch, this_item(launch));
}

// Pass 3. H: units computed.
template <int H>
LOPT_KERNEL(2)
apply_kernel(const __grid_constant__ OperationLaunch launch) {
  DeviceBlock block;
  apply<H>(block, shared_floats(), launch, this_item(launch));
}
LOPT_KERNEL(4) messages_kernel(const __grid_constant__ OperationLaunch launch) {
  DeviceBlock block;
  messages(block, shared_floats(), launch, this_item(launch));
}

using Kernel = void (*)(const OperationLaunch);

Kernel kernel_of(OperationPhase phase, int32_t units) {
  switch (phase) {
    case OperationPhase::factor_sums:
      return factor_sums_kernel;
    case OperationPhase::move_axes:
      return move_axes_kernel;
    case OperationPhase::row_scales:
      return row_scales_kernel;
    case OperationPhase::column_sums:
      return column_sums_kernel;
    case OperationPhase::fold:
      return fold_kernel;
    case OperationPhase::apply:
      return units == 4 ? apply_kernel<4> : units == 8 ? apply_kernel<8> : apply_kernel<32>;
    default:
      return messages_kernel;
  }
}

}  // namespace

const char* launch_element_mlp(const OperationLaunch& launch, void* stream) {
  return launch_items(kernel_of(launch.phase, launch.call.mlp.units), mlp_shared(launch.phase, launch.call),
                      launch, stream);
}

}  // namespace lopt
