// small_fc_lopt on NVIDIA GPUs: the kernels around the work items of gpu_passes.h. Compiled once for each
// width of the network, with LOPT_WIDTH naming it.
//
// Blocks are persistent and take the items of a launch in order. An item needs items before it in the list
// alone; a block that takes one waits until those are done. The first item that is not done never waits, so
// there is no deadlock, however many blocks there are.
#include <cuda_runtime.h>

#include "kernels/small_fc_lopt/cuda.h"
#include "kernels/small_fc_lopt/gpu_matmul.h"

namespace lopt {
namespace {

// Registers: 65,536 for a multiprocessor, 128 for a thread with two blocks on it, 255 with one.
template <int H>
constexpr int kBlocks = H <= 32 ? 2 : 1;

__device__ __forceinline__ int32_t unknown_zero() {
  int32_t zero;
  asm volatile("mov.b32 %0, 0;" : "=r"(zero));
  return zero;
}

__device__ __forceinline__ int32_t read_acquire(const int32_t* from) {
  int32_t x;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(x) : "l"(from) : "memory");
  return x;
}

// After a barrier it makes known what any thread of the block has written.
__device__ __forceinline__ void add_release(int32_t* to) {
  asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(to) : "memory");
}

// The last span that begins at or before an item, `from` being one: items of a block come in their order.
__device__ __forceinline__ int32_t span_of(const GpuLaunch& launch, int32_t item, int32_t from) {
  int32_t low = from, high = from + 1;
  while (high < launch.spans && launch.span_first[high] <= uint32_t(item)) {
    const int32_t step = 2 * (high - low);
    low = high;
    high += step;
  }
  if (high > launch.spans) high = launch.spans;
  while (high - low > 1) {
    const int32_t middle = (low + high) / 2;
    if (launch.span_first[middle] <= uint32_t(item))
      low = middle;
    else
      high = middle;
  }
  return low;
}

// Waits until the phases before `phase` are done. The last of them waited for the ones before it.
__device__ __forceinline__ void wait_for(const GpuLaunch& launch, int32_t tensor, int32_t phase) {
  for (int32_t before = phase - 1; before >= kFactorSums; --before) {
    const int32_t items = items_of(launch.records[tensor], before, launch.step.lagged);
    if (!items) continue;
    const int32_t* done = launch.step.done + tensor * kPhases + before;
    while (read_acquire(done) < items) __nanosleep(64);
    return;
  }
}

template <typename S>
__device__ __forceinline__ S& shared_memory() {
  extern __shared__ char lopt_shared_memory[];
  return *reinterpret_cast<S*>(lopt_shared_memory);
}

// A function for each part: inlined into one kernel they would spill, and take the assembler ten times as
// long.
template <int H, typename Part>
__device__ __noinline__ void run_part(Part part, int32_t item) {
  DeviceBlock block;
  auto& shared = shared_memory<Shared<H>>();
  const int32_t zero = *static_cast<const volatile int32_t*>(&shared.numbers.zero);
  Passes<DeviceBlock, H, Part::lagged>(block, *(&shared + zero)).run_item(part, item);
}

// Pass 3 on tensor cores.
template <int H, bool Bfloat16>
__device__ __noinline__ void run_matmul(int32_t item) {
  DeviceBlock block;
  auto& shared = shared_memory<MatmulShared<H, Bfloat16>>();
  const int32_t zero = *static_cast<const volatile int32_t*>(&shared.base.numbers.zero);
  MatmulPasses<DeviceBlock, H, Bfloat16>(block, *(&shared + zero)).apply_matmul(item);
}

// Runs the items of a launch: apply(record, index) those of pass 3.
template <int H, typename Apply>
__device__ __forceinline__ void run_items(const GpuLaunch& arguments, Apply apply) {
  // What is needed behind an item lies in shared memory: it would take registers from the item.
  __shared__ int32_t taken, span;
  __shared__ int32_t* done;  // of the item before: where it is counted
  if (threadIdx.x == 0) {
    taken = arguments.first_item + int32_t(blockIdx.x) - int32_t(gridDim.x);
    span = 0;
    done = nullptr;
  }
  for (;;) {
    // Read again for every item: what the compiler keeps of the arguments takes registers from the item, too.
    const GpuLaunch& launch = *(&arguments + unknown_zero());
    __syncthreads();
    // The next item is drawn while the one before is made known to all blocks.
    if (threadIdx.x == kWarpLanes && done) add_release(done);
    if (threadIdx.x == 0) {
      taken = launch.step.wait ? atomicAdd(launch.step.ticket, 1) : taken + int32_t(gridDim.x);
      if (taken < launch.last_item) span = span_of(launch, taken, span);
    }
    __syncthreads();
    if (taken >= launch.last_item) return;
    const WorkItem item = item_in_span(launch, span, taken);
    if (threadIdx.x == 0 && launch.step.wait) {
      wait_for(launch, item.tensor, item.phase);
      done = launch.step.done + item.tensor * kPhases + item.phase;
    }
    auto& shared = shared_memory<Shared<H>>();
    DeviceBlock block;
    open_item(block, shared, launch, item);
    if (gathers(shared, item.phase)) run_part<H>(GatherPart(), item.index);
    if (item.phase == kApply)
      apply(shared.record, item.index);
    else
      call_part(item.phase, shared.record, [&](auto part) { run_part<H>(part, item.index); });
  }
}

// What is not made of items: a block for each clip group, or a thread for each step counter.
template <int H>
__global__ void __launch_bounds__(kThreads) other_kernel(const __grid_constant__ GpuLaunch launch) {
  if (launch.kind == LaunchKind::clip_total) {
    DeviceBlock block;
    clip_total(block, shared_memory<Shared<H>>(), launch, int32_t(blockIdx.x));
  } else {
    const int32_t tensor = int32_t(blockIdx.x * kThreads + threadIdx.x);
    if (tensor < launch.tensors) count_step(launch, tensor);
  }
}

// The kernels share all phases but pass 3. Registers are allotted for a kernel with all that it calls: parts
// of pass 3 with different needs are kept apart, so that none of them spills for the sake of another.
template <int H, bool Lagged>
__global__ void __launch_bounds__(kThreads, kBlocks<H>)
    items_kernel(const __grid_constant__ GpuLaunch launch) {
  run_items<H>(launch, [](const TensorRecord& r, int32_t index) {
    call_apply<H, Lagged>(r, [&](auto part) { run_part<H>(part, index); });
  });
}
template <int H>
__global__ void __launch_bounds__(kThreads, kBlocks<H>)
    matmul_kernel(const __grid_constant__ GpuLaunch launch) {
  run_items<H>(launch, [&](const TensorRecord&, int32_t index) {
    if (launch.variant == MlpVariant::matmul)
      run_matmul<H, false>(index);
    else
      run_matmul<H, true>(index);
  });
}

template <typename Kernel>
const char* launch_kernel(Kernel* kernel, size_t bytes, const GpuLaunch& launch, cudaStream_t stream) {
  int device, multiprocessors, blocks;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess && bytes > 48 * 1024)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess)
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads, bytes);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  int32_t grid = launch.tensors;
  if (launch.kind == LaunchKind::items) {
    const int32_t items = launch.last_item - launch.first_item, most = blocks * multiprocessors;
    grid = items < most ? items : most;
  }
  kernel<<<grid, kThreads, bytes, stream>>>(launch);
  error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <int H>
const char* launch_items(const GpuLaunch& launch, cudaStream_t stream) {
  if (launch.variant == MlpVariant::elementwise)
    return launch_kernel(launch.step.lagged ? items_kernel<H, true> : items_kernel<H, false>,
                         sizeof(Shared<H>), launch, stream);
  if constexpr (H >= kMatmulLeast) {
    const bool split = launch.variant == MlpVariant::matmul;
    const size_t bytes = split ? sizeof(MatmulShared<H, false>) : sizeof(MatmulShared<H, true>);
    return launch_kernel(matmul_kernel<H>, bytes, launch, stream);
  }
  return "no kernel of this variant of the network for this width";
}

}  // namespace

#define LOPT_JOIN_(a, b) a##b
#define LOPT_JOIN(a, b) LOPT_JOIN_(a, b)

const char* LOPT_JOIN(launch_width_, LOPT_WIDTH)(const GpuLaunch& launch, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  if (launch.kind == LaunchKind::items) return launch_items<LOPT_WIDTH>(launch, s);
  return launch_kernel(other_kernel<LOPT_WIDTH>, sizeof(Shared<LOPT_WIDTH>), launch, s);
}

}  // namespace lopt
