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

// A tensor as lopt_fast/native_tensors.py describes it: how it lies in memory, addresses, and the distances
// of the averages of each kind.
struct TensorRow {
  int64_t is_float64, batch0, x, batch1, y, batch2, x_is_row, factored, normalised_over;
  int64_t param, grad, output, momentum, second_moment, row, column;
  int64_t momentum_stride, second_moment_stride, row_stride, column_stride;
};
struct TensorRates {
  double lr, weight_decay;
};
// (tensors, address of their rows, address of their rates)
using TensorTable = std::tuple<int64_t, uintptr_t, uintptr_t>;

std::vector<OperationTensor> tensors_of(const TensorTable& table) {
  const auto [count, row_address, rate_address] = table;
  const auto* rows = static_cast<const TensorRow*>(pointer(row_address));
  const auto* rates = static_cast<const TensorRates*>(pointer(rate_address));
  std::vector<OperationTensor> tensors;
  tensors.reserve(size_t(count));
  for (int64_t i = 0; i < count; ++i) {
    const TensorRow& r = rows[i];
    tensors.push_back({r.is_float64 ? Dtype::float64 : Dtype::float32,
                       {r.batch0, r.x, r.batch1, r.y, r.batch2, r.x_is_row != 0, r.factored != 0},
                       pointer(uintptr_t(r.param)),
                       pointer(uintptr_t(r.grad)),
                       pointer(uintptr_t(r.output)),
                       pointer(uintptr_t(r.momentum)),
                       pointer(uintptr_t(r.second_moment)),
                       pointer(uintptr_t(r.row)),
                       pointer(uintptr_t(r.column)),
                       r.momentum_stride,
                       r.second_moment_stride,
                       r.row_stride,
                       r.column_stride,
                       r.normalised_over,
                       rates[i].lr,
                       rates[i].weight_decay});
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
                      const TensorTable& table, uintptr_t multipliers, uintptr_t column_mean_square,
                      double grad_scale, double grad_bound, const std::string& output, uintptr_t messages,
                      const std::string& pool, int threads) {
  if (layer_tuples.size() != size_t(spec.hidden_layers) + 1)
    throw std::invalid_argument("hidden_layers + 1 layers are needed");
  std::vector<MlpLayer> layers;
  for (const auto& [w, b, inputs, outputs, w_stride, b_stride] : layer_tuples)
    layers.push_back({numbers(w), numbers(b), inputs, outputs, w_stride, b_stride});
  const std::vector<OperationTensor> tensors = tensors_of(table);
  const Output result = output_of(output);
  const Pool chosen = named_pool(pool.c_str(), threads);
  py::gil_scoped_release release;
  element_mlp(spec, averages_of(rates), layers.data(), tensors.data(), int64_t(tensors.size()),
              numbers(multipliers), numbers(column_mean_square), {grad_scale, grad_bound}, result,
              static_cast<double*>(pointer(messages)), chosen);
}

void call_adam(const TensorTable& table, uintptr_t scalars, double grad_scale, double grad_bound,
               const std::string& output, uintptr_t statistics, const std::string& pool, int threads) {
  const std::vector<OperationTensor> tensors = tensors_of(table);
  const Output result = output_of(output);
  const Pool chosen = named_pool(pool.c_str(), threads);
  py::gil_scoped_release release;
  adam(tensors.data(), int64_t(tensors.size()), static_cast<const AdamScalars*>(pointer(scalars)),
       {grad_scale, grad_bound}, result, static_cast<double*>(pointer(statistics)), chosen);
}

void call_statistics(const Rates& rates, const MlpSpec* columns, bool moved, const TensorTable& table,
                     double grad_scale, double grad_bound, uintptr_t out, const std::string& pool,
                     int threads) {
  const std::vector<OperationTensor> tensors = tensors_of(table);
  const Pool chosen = named_pool(pool.c_str(), threads);
  py::gil_scoped_release release;
  statistics(averages_of(rates), columns, moved, tensors.data(), int64_t(tensors.size()),
             {grad_scale, grad_bound}, static_cast<double*>(pointer(out)), chosen);
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
        py::arg("tensors"), py::arg("multipliers"), py::arg("column_mean_square") = 0, py::arg("grad_scale"),
        py::arg("grad_bound"), py::arg("output"), py::arg("messages"), py::arg("pool"), py::arg("threads"));
  m.def("adam", &call_adam, py::kw_only(), py::arg("tensors"), py::arg("scalars"), py::arg("grad_scale"),
        py::arg("grad_bound"), py::arg("output"), py::arg("statistics") = 0, py::arg("pool"),
        py::arg("threads"));
  m.def("statistics", &call_statistics, py::kw_only(), py::arg("rates"), py::arg("columns") = py::none(),
        py::arg("moved"), py::arg("tensors"), py::arg("grad_scale"), py::arg("grad_bound"), py::arg("out"),
        py::arg("pool"), py::arg("threads"));
}

}  // namespace lopt
