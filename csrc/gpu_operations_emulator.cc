// The GPU kernels of the operations on the processor, for tests: the very code of the phases
// (kernels/*/gpu.h), block by block, the last one first: nothing may depend on their order.
#include <limits>
#include <vector>

#include "csrc/gpu_operations.h"
#include "kernels/adam/gpu.h"
#include "kernels/element_mlp/gpu.h"
#include "kernels/statistics/gpu.h"

namespace lopt {
namespace {

// Runs phase(shared, item) for all items, with as much shared memory as the device gives it, 16 bytes aligned
// and not zero.
template <typename Phase>
const char* run_items(const OperationLaunch& launch, int64_t shared_floats, Phase phase) {
  if (shared_floats > 48 * 256) return "more than 48 KiB of shared memory";
  std::vector<Packed<16>> memory(size_t(shared_floats / 4 + 1));
  for (int32_t item = launch.first_item[launch.tensors] - 1; item >= 0; --item) {
    for (Packed<16>& p : memory)
      for (Word& word : p.word) word = bits_of(std::numeric_limits<float>::quiet_NaN());
    phase(reinterpret_cast<float*>(memory.data()), item_of(launch, item));
  }
  return nullptr;
}

}  // namespace

const char* emulate_operation(const OperationLaunch& launch) {
  HostBlock block;
  const auto run = [&](int64_t shared_floats, auto phase) { return run_items(launch, shared_floats, phase); };
  const int64_t of_mlp = mlp_shared(launch.phase, launch.call);
  switch (launch.phase) {
    case OperationPhase::factor_sums:
      return run(of_mlp, [&](float* shared, Item item) {
        factor_sums(block, *reinterpret_cast<FactorShared*>(shared), launch, item);
      });
    case OperationPhase::move_axes:
      return run(of_mlp, [&](float*, Item item) { move_axes(block, launch, item); });
    case OperationPhase::row_scales:
      return run(of_mlp, [&](float* shared, Item item) { row_scales(block, shared, launch, item); });
    case OperationPhase::column_sums:
      return run(of_mlp, [&](float* shared, Item item) { column_sums(block, shared, launch, item); });
    case OperationPhase::fold:
      return run(of_mlp, [&](float* shared, Item item) { fold(block, shared, launch, item); });
    case OperationPhase::apply:
      return run(of_mlp, [&](float* shared, Item item) {
        switch (launch.call.mlp.units) {
          case 4:
            return apply<4>(block, shared, launch, item);
          case 8:
            return apply<8>(block, shared, launch, item);
          default:
            return apply<32>(block, shared, launch, item);
        }
      });
    case OperationPhase::messages:
      return run(of_mlp, [&](float* shared, Item item) { messages(block, shared, launch, item); });
    case OperationPhase::adam:
      return run(0, [&](float*, Item item) { adam(block, launch, item); });
    case OperationPhase::spreads:
      return run(statistics_shared(launch.call),
                 [&](float* shared, Item item) { spreads(block, shared, launch, item); });
    case OperationPhase::merge:
      return run(statistics_shared(launch.call),
                 [&](float* shared, Item item) { merge(block, shared, launch, item); });
  }
  return "unknown phase";
}

}  // namespace lopt
