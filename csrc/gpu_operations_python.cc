#include "csrc/gpu_operations_python.h"

#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "csrc/gpu_operations.h"
#include "csrc/gpu_python.h"

namespace py = pybind11;

namespace lopt {
namespace {

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

template <typename T, size_t N>
T named(const char* what, const std::string& name, const char* const (&names)[N]) {
  for (size_t i = 0; i < N; ++i)
    if (name == names[i]) return T(i);
  throw std::invalid_argument(what + (" " + name) + " is unknown");
}

constexpr const char* kStorages[] = {"float32", "bfloat16", "float16"};
constexpr const char* kOutputs[] = {"parameter", "delta", "step"};
constexpr const char* kOperations[] = {"element_mlp", "adam", "statistics"};

using LoopNumbers = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, bool, bool>;
// (type, loops, addresses of parameter, gradient, output, momentum, second moment, row and column, strides of
// the last four)
using TensorTuple = std::tuple<std::string, LoopNumbers, std::array<uintptr_t, 7>, std::array<int64_t, 4>>;
// (address of w, address of b, inputs, outputs, numbers from one tensor's w to the next, the same of b)
using LayerTuple = std::tuple<uintptr_t, uintptr_t, int64_t, int64_t, int64_t, int64_t>;

GpuOperationTensor tensor_of(const TensorTuple& tuple) {
  const auto& [type, loops, a, strides] = tuple;
  const auto [batch0, x, batch1, y, batch2, x_is_row, factored] = loops;
  return {{batch0, x, batch1, y, batch2, x_is_row, factored},
          named<Storage>("type", type, kStorages),
          pointer<void>(a[0]),
          pointer<void>(a[1]),
          pointer<void>(a[2]),
          pointer<float>(a[3]),
          pointer<float>(a[4]),
          pointer<float>(a[5]),
          pointer<float>(a[6]),
          strides[0],
          strides[1],
          strides[2],
          strides[3]};
}

// A GpuOperation with what it points to on the host.
class OperationOnGpu {
 public:
  OperationOnGpu(const std::string& operation, const std::vector<TensorTuple>& tensors,
                 const std::array<int32_t, 3>& averages, uintptr_t numbers, uintptr_t found_inf,
                 uintptr_t results, const std::string& output, bool moved, const std::optional<MlpSpec>& spec,
                 const std::vector<LayerTuple>& layers, bool multiplied) {
    for (const TensorTuple& tuple : tensors) tensors_.push_back(tensor_of(tuple));
    for (const auto& [w, b, inputs, outputs, w_stride, b_stride] : layers)
      layers_.push_back({pointer<float>(w), pointer<float>(b), inputs, outputs, w_stride, b_stride, 0, 0});
    call_.operation = named<Operation>("operation", operation, kOperations);
    if (call_.operation == Operation::element_mlp) {
      if (!spec || layers_.size() != size_t(spec->hidden_layers) + 1)
        throw std::invalid_argument("element_mlp needs a specification and its hidden_layers + 1 layers");
      spec_ = *spec;
    }
    call_.count = int64_t(tensors_.size());
    call_.models = 1;
    call_.averages = averages;
    call_.numbers = pointer<float>(numbers);
    call_.found_inf = pointer<float>(found_inf);
    call_.results = pointer<float>(results);
    call_.output = named<Output>("output", output, kOutputs);
    call_.moved = moved;
    call_.multiplied = multiplied;
  }

  int64_t scratch_bytes() const { return gpu_operation_scratch_bytes(call()); }

  void run(const py::capsule& device, uintptr_t scratch, uintptr_t stream) const {
    const auto* gpu = static_cast<const GpuDevice*>(PyCapsule_GetPointer(device.ptr(), kGpuDeviceCapsule));
    if (!gpu) throw py::error_already_set();
    py::gil_scoped_release release;
    gpu_operation(call(), *gpu, pointer<void>(scratch), pointer<void>(stream));
  }

 private:
  GpuOperation call() const {
    GpuOperation call = call_;
    call.tensors = tensors_.data();
    call.spec = &spec_;
    call.layers = layers_.data();
    return call;
  }

  GpuOperation call_ = {};
  MlpSpec spec_ = {};
  std::vector<GpuOperationTensor> tensors_;
  std::vector<GpuMlpLayer> layers_;
};

std::optional<std::string> mlp_refusal(const MlpSpec& spec, const std::array<int32_t, 3>& averages) {
  const char* refusal = gpu_mlp_refusal(spec, averages);
  return refusal ? std::optional<std::string>(refusal) : std::nullopt;
}

}  // namespace

void bind_gpu_operations(py::module_& m) {
  py::class_<OperationOnGpu>(m, "GpuOperation")
      .def(py::init<const std::string&, const std::vector<TensorTuple>&, const std::array<int32_t, 3>&,
                    uintptr_t, uintptr_t, uintptr_t, const std::string&, bool, const std::optional<MlpSpec>&,
                    const std::vector<LayerTuple>&, bool>(),
           py::arg("operation"), py::kw_only(), py::arg("tensors"), py::arg("averages"), py::arg("numbers"),
           py::arg("found_inf") = 0, py::arg("results") = 0, py::arg("output") = "step",
           py::arg("moved") = false, py::arg("spec") = py::none(),
           py::arg("layers") = std::vector<LayerTuple>(), py::arg("multiplied") = false)
      .def("scratch_bytes", &OperationOnGpu::scratch_bytes)
      .def("run", &OperationOnGpu::run, py::arg("device"), py::kw_only(), py::arg("scratch"),
           py::arg("stream") = 0);
  m.def("gpu_mlp_refusal", &mlp_refusal, py::arg("spec"), py::arg("averages"));
}

}  // namespace lopt
