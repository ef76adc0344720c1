#include "csrc/operations_python.h"

#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "csrc/operations.h"

namespace py = pybind11;

namespace lopt {
namespace {

void* pointer(uintptr_t address) { return reinterpret_cast<void*>(address); }
const double* numbers(uintptr_t address) { return reinterpret_cast<const double*>(address); }

// How a tensor lies in memory: (is float64, loops, elements that share normalisers).
using Layout = std::tuple<bool, std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, bool, bool>, int64_t>;
// (layout, addresses of parameter, gradient, output, momentum, second moment, row and column, strides of the
// last four, learning rate, weight decay)
using TensorTuple = std::tuple<Layout, std::array<uintptr_t, 7>, std::array<int64_t, 4>, double, double>;

std::vector<OperationTensor> tensors_of(const std::vector<TensorTuple>& tuples) {
  std::vector<OperationTensor> tensors;
  tensors.reserve(tuples.size());
  for (const auto& [layout, a, strides, lr, weight_decay] : tuples) {
    const auto& [is_float64, loops, normalised_over] = layout;
    const auto [batch0, x, batch1, y, batch2, x_is_row, factored] = loops;
    tensors.push_back({is_float64 ? Dtype::float64 : Dtype::float32,
                       {batch0, x, batch1, y, batch2, x_is_row, factored},
                       pointer(a[0]),
                       pointer(a[1]),
                       pointer(a[2]),
                       pointer(a[3]),
                       pointer(a[4]),
                       pointer(a[5]),
                       pointer(a[6]),
                       strides[0],
                       strides[1],
                       strides[2],
                       strides[3],
                       normalised_over,
                       lr,
                       weight_decay});
  }
  return tensors;
}

// 1 - decay of momenta, second moments and factored moments.
using Rates = std::array<std::vector<double>, 3>;

Averages averages_of(const Rates& rates) { return {rates[0], rates[1], rates[2]}; }

Output output_of(const std::string& name) {
  if (name == "parameter") return Output::parameter;
  if (name == "delta") return Output::delta;
  if (name == "step") return Output::step;
  throw std::invalid_argument("output " + name + ": must be parameter, delta or step");
}

// (address of w, address of b, inputs, outputs, numbers from one tensor's w to the next, the same of b)
using LayerTuple = std::tuple<uintptr_t, uintptr_t, int64_t, int64_t, int64_t, int64_t>;

void call_element_mlp(const MlpSpec& spec, const Rates& rates, const std::vector<LayerTuple>& layer_tuples,
                      const std::vector<TensorTuple>& tuples, uintptr_t multipliers, double grad_scale,
                      double grad_bound, const std::string& output, uintptr_t messages,
                      const std::string& pool, int threads) {
  if (layer_tuples.size() != size_t(spec.hidden_layers) + 1)
    throw std::invalid_argument("hidden_layers + 1 layers are needed");
  std::vector<MlpLayer> layers;
  for (const auto& [w, b, inputs, outputs, w_stride, b_stride] : layer_tuples)
    layers.push_back({numbers(w), numbers(b), inputs, outputs, w_stride, b_stride});
  const std::vector<OperationTensor> tensors = tensors_of(tuples);
  const Output result = output_of(output);
  const Pool chosen = named_pool(pool.c_str(), threads);
  py::gil_scoped_release release;
  element_mlp(spec, averages_of(rates), layers.data(), tensors.data(), int64_t(tensors.size()),
              numbers(multipliers), {grad_scale, grad_bound}, result, static_cast<double*>(pointer(messages)),
              chosen);
}

void call_adam(const std::vector<TensorTuple>& tuples, uintptr_t scalars, double grad_scale,
               double grad_bound, const std::string& output, const std::string& pool, int threads) {
  const std::vector<OperationTensor> tensors = tensors_of(tuples);
  const Output result = output_of(output);
  const Pool chosen = named_pool(pool.c_str(), threads);
  py::gil_scoped_release release;
  adam(tensors.data(), int64_t(tensors.size()), static_cast<const AdamScalars*>(pointer(scalars)),
       {grad_scale, grad_bound}, result, chosen);
}

void call_statistics(const Rates& rates, bool moved, const std::vector<TensorTuple>& tuples,
                     double grad_scale, double grad_bound, uintptr_t out, const std::string& pool,
                     int threads) {
  const std::vector<OperationTensor> tensors = tensors_of(tuples);
  const Pool chosen = named_pool(pool.c_str(), threads);
  py::gil_scoped_release release;
  statistics(averages_of(rates), moved, tensors.data(), int64_t(tensors.size()), {grad_scale, grad_bound},
             static_cast<double*>(pointer(out)), chosen);
}

}  // namespace

void bind_operations(py::module_& m) {
  py::class_<MlpSpec>(m, "MlpSpec")
      .def(py::init([](const std::vector<std::string>& groups, int32_t hidden_size, int32_t hidden_layers,
                       int32_t messages, double step_mult, double exp_mult, bool parameter_rms,
                       double scale_epsilon, double scale_cap, bool tanh, double rms_epsilon,
                       double diagonal_momentum_epsilon, double normaliser_epsilon, bool factored_vectors) {
             MlpSpec spec{{},
                          hidden_size,
                          hidden_layers,
                          messages,
                          step_mult,
                          exp_mult,
                          parameter_rms,
                          scale_epsilon,
                          scale_cap,
                          tanh,
                          rms_epsilon,
                          diagonal_momentum_epsilon,
                          normaliser_epsilon,
                          factored_vectors};
             for (const std::string& name : groups) spec.groups.push_back(group_of(name));
             return spec;
           }),
           py::kw_only(), py::arg("groups"), py::arg("hidden_size"), py::arg("hidden_layers"),
           py::arg("messages"), py::arg("step_mult"), py::arg("exp_mult"), py::arg("parameter_rms"),
           py::arg("scale_epsilon"), py::arg("scale_cap"), py::arg("tanh"), py::arg("rms_epsilon"),
           py::arg("diagonal_momentum_epsilon"), py::arg("normaliser_epsilon"), py::arg("factored_vectors"));
  m.def("element_mlp", &call_element_mlp, py::kw_only(), py::arg("spec"), py::arg("rates"), py::arg("layers"),
        py::arg("tensors"), py::arg("multipliers"), py::arg("grad_scale"), py::arg("grad_bound"),
        py::arg("output"), py::arg("messages"), py::arg("pool"), py::arg("threads"));
  m.def("adam", &call_adam, py::kw_only(), py::arg("tensors"), py::arg("scalars"), py::arg("grad_scale"),
        py::arg("grad_bound"), py::arg("output"), py::arg("pool"), py::arg("threads"));
  m.def("statistics", &call_statistics, py::kw_only(), py::arg("rates"), py::arg("moved"), py::arg("tensors"),
        py::arg("grad_scale"), py::arg("grad_bound"), py::arg("out"), py::arg("pool"), py::arg("threads"));
}

}  // namespace lopt
