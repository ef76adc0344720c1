// A GPU on the processor, for tests: runs the very code of the kernels (kernels/small_fc_lopt/gpu_passes.h),
// one block after the other, and checks what the order of the work items promises.
#include "csrc/gpu_emulator.h"

#include <cstring>
#include <memory>
#include <vector>

#include "csrc/emulated_block.h"
#include "csrc/gpu_operations.h"
#include "kernels/small_fc_lopt/gpu_matmul.h"
#include "kernels/small_fc_lopt/gpu_parts.h"

namespace lopt {
namespace {

EmulatorSettings settings;

const char* properties(int32_t, GpuProperties* out) {
  *out = {settings.multiprocessors, settings.compute_capability, settings.l2_bytes};
  return nullptr;
}

const char* clear(void* memory, size_t bytes, void*) {
  std::memset(memory, 0, bytes);
  return nullptr;
}

// Whether all items that an item needs are done, as far as it is counted.
bool ready(const GpuLaunch& launch, const WorkItem& item) {
  if (!launch.step.done) return true;
  const TensorRecord& r = launch.records[item.tensor];
  for (int32_t phase = kFactorSums; phase < item.phase; ++phase)
    if (launch.step.done[item.tensor * kPhases + phase] < items_of(r, phase, launch.step.lagged))
      return false;
  return true;
}

// Not zero: nothing may depend on what shared memory holds.
template <typename S>
std::unique_ptr<S> shared_memory() {
  std::unique_ptr<S> shared(new S);
  std::memset(static_cast<void*>(shared.get()), 0xff, sizeof(S));
  return shared;
}

// Pass 3 on tensor cores.
template <int H, bool Bfloat16>
void run_matmul(HostBlock& block, MatmulShared<H, Bfloat16>& shared, const GpuLaunch& launch,
                const WorkItem& item) {
  open_item(block, shared.base, launch, item);
  if (gathers(shared.base, item.phase))
    Passes<HostBlock, H>(block, shared.base).run_item(GatherPart(), item.index);
  MatmulPasses<HostBlock, H, Bfloat16>(block, shared).apply_matmul(item.index);
}

// Everything else.
template <int H>
void run_passes(HostBlock& block, Shared<H>& shared, const GpuLaunch& launch, const WorkItem& item) {
  open_item(block, shared, launch, item);
  const auto run = [&](auto part) {
    Passes<HostBlock, H, decltype(part)::lagged>(block, shared).run_item(part, item.index);
  };
  if (gathers(shared, item.phase)) run(GatherPart());
  if (item.phase != kApply)
    call_part(item.phase, shared.record, run);
  else
    launch.step.lagged ? call_apply<H, true>(shared.record, run) : call_apply<H, false>(shared.record, run);
}

template <int H>
const char* run_item(const GpuLaunch& launch, const WorkItem& item) {
  if (!ready(launch, item)) return "an item came before one that it needs";
  const auto run = [&](auto shared, auto passes) {
    return run_threads(settings.thread_seed, [&](HostBlock& block) { passes(block, *shared, launch, item); });
  };
  const char* error = nullptr;
  if (item.phase != kApply || launch.variant == MlpVariant::elementwise) {
    error = run(shared_memory<Shared<H>>(), run_passes<H>);
  } else {
    if constexpr (H < kMatmulLeast)
      error = "no kernel of this variant of the network for this width";
    else if (launch.variant == MlpVariant::matmul)
      error = run(shared_memory<MatmulShared<H, false>>(), run_matmul<H, false>);
    else
      error = run(shared_memory<MatmulShared<H, true>>(), run_matmul<H, true>);
  }
  if (launch.step.done) launch.step.done[item.tensor * kPhases + item.phase] += 1;
  return error;
}

template <int H>
const char* run_items(const GpuLaunch& launch) {
  std::vector<WorkItem> items;
  int32_t span = 0;
  for (int32_t i = launch.first_item; i < launch.last_item; ++i) {
    while (int32_t(launch.span_first[span + 1]) <= i) ++span;
    items.push_back(item_in_span(launch, span, i));
  }
  if (!settings.seed) {
    for (const WorkItem& item : items)
      if (const char* error = run_item<H>(launch, item)) return error;
    return nullptr;
  }
  // As many blocks as a device would run hold an item each, taken in order; any that is ready may be done
  // first.
  uint64_t state = settings.seed;
  const auto random = [&](size_t n) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return size_t((state >> 33) % n);
  };
  std::vector<WorkItem> held;
  size_t next = 0;
  while (next < items.size() || !held.empty()) {
    while (next < items.size() && held.size() < size_t(settings.multiprocessors))
      held.push_back(items[next++]);
    std::vector<size_t> can;
    for (size_t i = 0; i < held.size(); ++i)
      if (ready(launch, held[i])) can.push_back(i);
    if (can.empty()) return "all blocks wait for each other";
    const size_t chosen = can[random(can.size())];
    if (const char* error = run_item<H>(launch, held[chosen])) return error;
    held.erase(held.begin() + int64_t(chosen));
  }
  return nullptr;
}

template <int H>
const char* run(const GpuLaunch& launch) {
  if (launch.kind == LaunchKind::items) return run_items<H>(launch);
  const auto shared = shared_memory<Shared<H>>();
  for (int32_t i = 0; i < launch.tensors; ++i) {
    if (launch.kind == LaunchKind::count) {
      count_step(launch, i);
      continue;
    }
    const auto kernel = [&](HostBlock& block) { clip_total(block, *shared, launch, i); };
    if (const char* error = run_threads(settings.thread_seed, kernel)) return error;
  }
  return nullptr;
}

const char* run_parts(const GpuLaunch& launch) {
  const auto shared = shared_memory<PartShared>();
  for (int32_t i = 0; i < launch.parts.blocks; ++i) {
    const auto kernel = [&](HostBlock& block) { part_block(block, *shared, launch, i); };
    if (const char* error = run_threads(settings.thread_seed, kernel)) return error;
  }
  return nullptr;
}

const char* launch(const GpuLaunch& original, void*) {
  // A kernel sees a copy of its arguments.
  const std::unique_ptr<GpuLaunch> copy(new GpuLaunch(original));
  settings.launches += 1;
  if (is_of_parts(copy->kind)) return run_parts(*copy);
  switch (copy->width) {
    case 2:
      return run<2>(*copy);
    case 4:
      return run<4>(*copy);
    case 8:
      return run<8>(*copy);
    case 16:
      return run<16>(*copy);
    case 32:
      return run<32>(*copy);
    case 64:
      return run<64>(*copy);
  }
  return "no kernel for this width";
}

const char* copy(void* to, const void* from, size_t bytes, void*) {
  std::memmove(to, from, bytes);
  return nullptr;
}

const char* current(int32_t* ordinal) {
  *ordinal = 0;
  return nullptr;
}

const char* launch_operation(const OperationLaunch& launch, void*) {
  settings.launches += 1;
  return emulate_operation(launch, settings.thread_seed);
}

}  // namespace

EmulatorSettings& emulator_settings() { return settings; }

const GpuDevice& gpu_emulator() {
  static const GpuDevice device = {kGpuAbi, "emulator", properties, clear,
                                   launch,  copy,       current,    launch_operation};
  return device;
}

}  // namespace lopt
