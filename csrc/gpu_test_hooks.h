// Pieces of the GPU kernels on the processor, for tests alone.
#pragma once

#include <pybind11/pybind11.h>

namespace lopt {

void bind_gpu_test_hooks(pybind11::module_& m);

}  // namespace lopt
