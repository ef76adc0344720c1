// Python's view of csrc/gpu.h: steps on raw addresses, for tests and benchmarks.
#pragma once

#include <pybind11/pybind11.h>

namespace lopt {

// Name of the capsules that hold a `const GpuDevice*`.
constexpr const char* kGpuDeviceCapsule = "lopt_fast.GpuDevice";

void bind_gpu(pybind11::module_& m);

}  // namespace lopt
