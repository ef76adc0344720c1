// The GPU kernels of the operations on the processor, for tests: the very code of the phases
// (kernels/*/gpu.h), block by block, the last one first: nothing may depend on their order.
#include <limits>
#include <vector>

#include "csrc/emulated_block.h"
#include "csrc/gpu_operations.h"
#include "kernels/adam/gpu.h"
#include "kernels/element_mlp/gpu.h"
#include "kernels/statistics/gpu.h"

namespace lopt {
namespace {

// Runs phase(block, shared, launch, item) for all items, with as much shared memory as the device gives it,
// 16 bytes aligned and not zero.
template <typename Phase>
const char* run_items(const OperationLaunch& launch, uint64_t& thread_state, int64_t shared_floats,
                      Phase phase) {
  if (shared_floats > 48 * 256) return "more than 48 KiB of shared memory";
  std::vector<Packed<16>> memory(size_t(shared_floats / 4 + 1));
  float* const shared = reinterpret_cast<float*>(memory.data());
  for (int32_t item = launch.first_item[launch.tensors] - 1; item >= 0; --item) {
    for (Packed<16>& p : memory)
      for (Word& word : p.word) word = bits_of(std::numeric_limits<float>::quiet_NaN());
    const char* error = run_threads(
        thread_state, [&](HostBlock& block) { phase(block, shared, launch, item_of(launch, item)); });
    if (error) return error;
  }
  return nullptr;
}

}  // namespace

const char* emulate_operation(const OperationLaunch& launch, uint64_t& thread_state) {
  const auto run = [&](int64_t shared_floats, auto phase) {
    return run_items(launch, thread_state, shared_floats, phase);
  };
  const int64_t of_mlp = mlp_shared(launch.phase, launch.call);
  switch (launch.phase) {
    case OperationPhase::factor_sums:
      return run(of_mlp, [](HostBlock& block, float* shared, const OperationLaunch& l, Item item) {
        factor_sums(block, *reinterpret_cast<FactorShared*>(shared), l, item);
      });
    case OperationPhase::move_axes:
      return run(of_mlp, [](HostBlock& block, float*, const OperationLaunch& l, Item item) {
        move_axes(block, l, item);
      });
    case OperationPhase::row_scales:
      return run(of_mlp, row_scales<HostBlock>);
    case OperationPhase::column_sums:
      return run(of_mlp, [](HostBlock& block, float* shared, const OperationLaunch& l, Item item) {
        column_sums(block, shared, l, item);
      });
    case OperationPhase::fold:
      return run(of_mlp, fold<HostBlock>);
    case OperationPhase::apply:
      return run(of_mlp, [](HostBlock& block, float* shared, const OperationLaunch& l, Item item) {
        switch (l.call.mlp.units) {
          case 4:
            return apply<4>(block, shared, l, item);
          case 8:
            return apply<8>(block, shared, l, item);
          default:
            return apply<32>(block, shared, l, item);
        }
      });
    case OperationPhase::messages:
      return run(of_mlp, messages<HostBlock>);
    case OperationPhase::adam:
      return run(0,
                 [](HostBlock& block, float*, const OperationLaunch& l, Item item) { adam(block, l, item); });
    case OperationPhase::spreads:
      return run(statistics_shared(launch.call), spreads<HostBlock>);
    case OperationPhase::merge:
      return run(statistics_shared(launch.call), merge<HostBlock>);
  }
  return "unknown phase";
}

}  // namespace lopt
