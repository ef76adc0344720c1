// Pieces of the GPU kernels on the processor, for tests alone.
#include "csrc/gpu_test_hooks.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "csrc/emulated_block.h"
#include "kernels/small_fc_lopt/mma.h"

namespace py = pybind11;

namespace lopt {
namespace {

// `features` (features, count), `start` (count, H): pre-activations of the first layer without the features'
// share; `out` (2, count): direction and exponent.
template <int H, bool Bfloat16>
void run_matmul(const Folded<H>& folded, bool factored, int layers, int64_t count, const float* features,
                const float* start, float* out) {
  const auto network = std::make_unique<MatmulNetwork<H, Bfloat16>>();
  HostBlock block;
  prepare_matmul(block, folded, factored, layers, *network);
  const int used = factored ? kFactoredFeatures : kFeatures, stride = kMatmulStride<H>;
  for (int64_t first = 0; first < count; first += kWarpLanes) {
    alignas(16) float x[24 * kMatmulStride<H>] = {};
    const int slots = int(std::min<int64_t>(kWarpLanes, count - first));
    for (int f = 0; f < used; ++f)
      std::memcpy(x + f * stride, features + f * count + first, size_t(slots) * sizeof(float));
    HostWarp warp;
    const auto bias = [&](int slot, int j, float (&to)[2]) {
      for (int i = 0; i < 2; ++i) to[i] = slot < slots ? start[(first + slot) * H + j + i] : 0.0f;
    };
    matmul_mlp(warp, *network, factored, layers, x, bias, x);
    for (int o = 0; o < 2; ++o)
      std::memcpy(out + o * count + first, x + kWarpLanes * o, size_t(slots) * sizeof(float));
  }
}

template <int H>
void matmul_of_width(bool bfloat16, bool factored, int layers, int64_t count, const float* folded,
                     const float* features, const float* start, float* out) {
  Folded<H> network = {};
  std::memcpy(&network, folded, offsetof(Folded<H>, limit));
  if (bfloat16)
    run_matmul<H, true>(network, factored, layers, count, features, start, out);
  else
    run_matmul<H, false>(network, factored, layers, count, features, start, out);
}

void matmul_mlp_of(int hidden_size, bool bfloat16, bool factored, int layers, int64_t count, uintptr_t folded,
                   uintptr_t features, uintptr_t start, uintptr_t out) {
  const auto run = [&](auto f) {
    const auto at = [](uintptr_t address) { return reinterpret_cast<float*>(address); };
    f(bfloat16, factored, layers, count, at(folded), at(features), at(start), at(out));
  };
  switch (hidden_size) {
    case 2:
      return run(matmul_of_width<2>);
    case 4:
      return run(matmul_of_width<4>);
    case 8:
      return run(matmul_of_width<8>);
    case 16:
      return run(matmul_of_width<16>);
    case 32:
      return run(matmul_of_width<32>);
    case 64:
      return run(matmul_of_width<64>);
    default:
      throw std::invalid_argument("hidden_size " + std::to_string(hidden_size) +
                                  ": the kernels have 2, 4, 8, 16, 32 and 64");
  }
}

// Every thread writes its number to shared memory and reads that of the next; `threads` of them wait at a
// barrier between the two. As many as there are: right. None: a race.
std::vector<int> next_numbers(uint64_t thread_seed, int threads) {
  std::vector<int> shared(kThreads, -1), found(kThreads, -1);
  const auto kernel = [&](HostBlock& block) {
    block.each([&](int thread) { shared[size_t(thread)] = thread; });
    if (threads == kThreads || (block.alone && block.alone->thread() < threads)) block.sync();
    block.each([&](int thread) { found[size_t(thread)] = shared[size_t(thread + 1) % kThreads]; });
  };
  if (const char* error = run_threads(thread_seed, kernel)) throw std::runtime_error(error);
  return found;
}

}  // namespace

void bind_gpu_test_hooks(py::module_& m) {
  m.def("gpu_test_matmul", &matmul_mlp_of, py::kw_only(), py::arg("hidden_size"), py::arg("bfloat16"),
        py::arg("factored"), py::arg("layers"), py::arg("count"), py::arg("folded"), py::arg("features"),
        py::arg("start"), py::arg("out"));
  m.def("gpu_test_next_numbers", &next_numbers, py::kw_only(), py::arg("thread_seed"), py::arg("threads"));
  m.attr("gpu_test_matmul_errors") = py::make_tuple(kMatmulError, kMatmulBfloat16Error);
}

}  // namespace lopt
