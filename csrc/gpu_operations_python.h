// Python's view of csrc/gpu_operations.h: operations on raw addresses.
#pragma once

#include <pybind11/pybind11.h>

namespace lopt {

void bind_gpu_operations(pybind11::module_& m);

}  // namespace lopt
