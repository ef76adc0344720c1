// csrc/operations.h for Python: lopt_fast/native_operations.py calls it.
#pragma once

#include <pybind11/pybind11.h>

namespace lopt {

void bind_operations(pybind11::module_& m);

}  // namespace lopt
