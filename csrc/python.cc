// The Python module lopt_fast._native: unwraps arguments, calls csrc/core.h. Knows neither torch nor NumPy.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <iterator>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "csrc/core.h"
#include "csrc/gpu_operations_python.h"
#include "csrc/gpu_python.h"
#include "csrc/gpu_test_hooks.h"
#include "csrc/operations_python.h"
#include "csrc/parts_python.h"
#include "csrc/plan.h"
#include "csrc/timing.h"
#include "csrc/xla.h"
#include "csrc/xla_gpu_operations.h"
#include "csrc/xla_operations.h"

namespace py = pybind11;

namespace {

using lopt::Dtype;
using lopt::OwnedPart;
using lopt::Record;

void* pointer(uintptr_t address) { return reinterpret_cast<void*>(address); }

Dtype dtype_of(const std::string& name) {
  if (name == "float32") return Dtype::float32;
  if (name == "float64") return Dtype::float64;
  if (name == "bfloat16") return Dtype::bfloat16;
  if (name == "float16") return Dtype::float16;
  throw std::invalid_argument("dtype " + name + ": the kernels take float32, float64, bfloat16 and float16");
}

lopt::Pool pool_of(const std::string& name, int threads) { return lopt::named_pool(name.c_str(), threads); }

py::capsule xla_handler(void* address) { return py::capsule(address, "xla._CUSTOM_CALL_TARGET"); }

using LoopNumbers = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, bool, bool>;

Record make_record(const std::string& dtype, const LoopNumbers& loops, std::vector<int64_t> sizes,
                   uintptr_t momentum, uintptr_t second_moment, uintptr_t row, uintptr_t column,
                   uintptr_t mean_squares, int64_t momentum_stride) {
  const auto [batch0, x, batch1, y, batch2, x_is_row, factored] = loops;
  return {dtype_of(dtype),        {batch0, x, batch1, y, batch2, x_is_row, factored},
          std::move(sizes),       pointer(momentum),
          pointer(second_moment), pointer(row),
          pointer(column),        pointer(mean_squares),
          momentum_stride};
}

// Address, strides (in elements, axes in memory order; none: dense) and type of an array during one call.
using Address = std::tuple<uintptr_t, std::optional<std::vector<int64_t>>, std::string>;

lopt::View view_of(const Address& array) {
  const auto& [address, strides, dtype] = array;
  return {pointer(address), strides ? strides->data() : nullptr, dtype_of(dtype)};
}

void check_rank(const Record& record, const Address& array, const char* what) {
  const auto& strides = std::get<1>(array);
  if (strides && strides->size() != record.sizes.size())
    throw std::invalid_argument(std::string(what) + ": one stride is needed for each axis");
}

// The tensors of a call; `scalars` are those of each tensor, `clip_group` of all.
std::vector<lopt::Tensor> tensors_of(uintptr_t theta_float32, uintptr_t theta_float64,
                                     const std::vector<Record*>& records, const std::vector<Address>& params,
                                     const std::vector<Address>& grads, const std::vector<Address>& outputs,
                                     bool apply, const std::vector<lopt::StepScalars>& scalars,
                                     int32_t clip_group) {
  const size_t count = records.size();
  if (params.size() != count || grads.size() != count || outputs.size() != count || scalars.size() != count)
    throw std::invalid_argument("what is given for each tensor must be equally many");
  std::vector<lopt::Tensor> tensors(count);
  for (size_t i = 0; i < count; ++i) {
    const Record& r = *records[i];
    check_rank(r, params[i], "params");
    check_rank(r, grads[i], "grads");
    check_rank(r, outputs[i], "outputs");
    const uintptr_t theta = r.dtype == Dtype::float32 ? theta_float32 : theta_float64;
    tensors[i] = {r.dtype,
                  r.loops,
                  int32_t(r.sizes.size()),
                  r.sizes.data(),
                  view_of(params[i]),
                  view_of(grads[i]),
                  view_of(outputs[i]),
                  apply,
                  r.momentum,
                  r.second_moment,
                  r.row,
                  r.column,
                  r.mean_squares,
                  pointer(theta),
                  &scalars[i],
                  clip_group,
                  r.momentum_stride};
  }
  return tensors;
}

void small_fc_step(const lopt::Spec& spec, uintptr_t theta_float32, uintptr_t theta_float64,
                   const std::vector<Record*>& records, const std::vector<Address>& params,
                   const std::vector<Address>& grads, const std::vector<Address>& outputs, bool apply,
                   double lr, double weight_decay, double grad_scale, int64_t t,
                   std::optional<double> max_grad_norm, const std::string& pool, int threads) {
  const std::vector<lopt::StepScalars> scalars(records.size(), {lr, weight_decay, grad_scale, t});
  const std::vector<lopt::Tensor> tensors = tensors_of(theta_float32, theta_float64, records, params, grads,
                                                       outputs, apply, scalars, max_grad_norm ? 0 : -1);
  const lopt::Pool chosen = pool_of(pool, threads);
  const double max_norm = max_grad_norm.value_or(0.0);
  py::gil_scoped_release release;
  lopt::small_fc_step(spec, tensors.data(), int64_t(tensors.size()), &max_norm, max_grad_norm ? 1 : 0,
                      chosen);
}

OwnedPart make_part(std::vector<int64_t> sizes, std::vector<int64_t> whole, std::vector<int64_t> begin,
                    int32_t x_axis, int32_t y_axis, int64_t copies) {
  if (sizes.size() != whole.size() || sizes.size() != begin.size())
    throw std::invalid_argument("sizes, whole and begin must be equally many");
  return {std::move(sizes), std::move(whole), std::move(begin), x_axis, y_axis, copies};
}

using ScalarNumbers = std::tuple<double, double, double, int64_t>;  // lopt::StepScalars

// `factors`: address of the sums of all tensors, one after the other; `squares` likewise.
void small_fc_phase(const lopt::Spec& spec, const std::string& phase, uintptr_t theta_float32,
                    uintptr_t theta_float64, const std::vector<Record*>& records,
                    const std::vector<OwnedPart*>& parts, const std::vector<Address>& params,
                    const std::vector<Address>& grads, const std::vector<ScalarNumbers>& numbers,
                    uintptr_t factors, uintptr_t squares, const std::string& pool, int threads) {
  const lopt::PartPhase chosen_phase = lopt::part_phase_of(phase);
  if (parts.size() != records.size()) throw std::invalid_argument("each tensor needs its part");
  std::vector<lopt::StepScalars> scalars;
  for (const auto& [lr, weight_decay, grad_scale, t] : numbers)
    scalars.push_back({lr, weight_decay, grad_scale, t});
  const std::vector<lopt::Tensor> tensors =
      tensors_of(theta_float32, theta_float64, records, params, grads, params, true, scalars, -1);
  std::vector<lopt::PartTensor> all;
  auto* sums = static_cast<double*>(pointer(factors));
  for (size_t i = 0; i < tensors.size(); ++i) {
    const lopt::TensorPart part = parts[i]->view();
    all.push_back(
        {tensors[i], part, sums, static_cast<double*>(pointer(squares)) + int64_t(i) * lopt::kPartSquares});
    sums += lopt::part_sums(part, tensors[i].loops.factored);
  }
  const lopt::Pool chosen = pool_of(pool, threads);
  py::gil_scoped_release release;
  lopt::small_fc_phase(spec, chosen_phase, all.data(), int64_t(all.size()), chosen);
}

std::vector<std::string> available_instruction_sets() {
  std::vector<std::string> names;
  for (const char* const* name = lopt::available_instruction_sets(); *name; ++name) names.emplace_back(*name);
  return names;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Kernels of lopt_fast. Private: use lopt_fast.torch, lopt_fast.jax or lopt_fast.native.";

  py::class_<lopt::Spec>(m, "KernelSpec")
      .def(py::init([](int32_t hidden_size, int32_t hidden_layers, double step_mult, double exp_mult,
                       bool parameter_rms, double scale_epsilon, bool lagged) {
             return lopt::Spec{hidden_size,   hidden_layers, step_mult, exp_mult,
                               parameter_rms, scale_epsilon, lagged};
           }),
           py::kw_only(), py::arg("hidden_size"), py::arg("hidden_layers"), py::arg("step_mult"),
           py::arg("exp_mult"), py::arg("parameter_rms"), py::arg("scale_epsilon"), py::arg("lagged"))
      .def_property_readonly("theta_size", &lopt::theta_size);

  py::class_<Record>(m, "Record")
      .def(py::init(&make_record), py::kw_only(), py::arg("dtype"), py::arg("loops"), py::arg("sizes"),
           py::arg("momentum"), py::arg("second_moment"), py::arg("row"), py::arg("column"),
           py::arg("mean_squares"), py::arg("momentum_stride"));

  m.def("small_fc_step", &small_fc_step, py::kw_only(), py::arg("spec"), py::arg("theta_float32"),
        py::arg("theta_float64"), py::arg("records"), py::arg("params"), py::arg("grads"), py::arg("outputs"),
        py::arg("apply"), py::arg("lr"), py::arg("weight_decay"), py::arg("grad_scale"), py::arg("t"),
        py::arg("max_grad_norm"), py::arg("pool"), py::arg("threads"));

  py::class_<OwnedPart>(m, "Part")
      .def(py::init(&make_part), py::kw_only(), py::arg("sizes"), py::arg("whole"), py::arg("begin"),
           py::arg("x_axis"), py::arg("y_axis"), py::arg("copies"))
      .def(
          "sums", [](const OwnedPart& part, bool factored) { return lopt::part_sums(part.view(), factored); },
          py::arg("factored"));
  m.attr("part_squares") = lopt::kPartSquares;
  m.def("small_fc_phase", &small_fc_phase, py::kw_only(), py::arg("spec"), py::arg("phase"),
        py::arg("theta_float32"), py::arg("theta_float64"), py::arg("records"), py::arg("parts"),
        py::arg("params"), py::arg("grads"), py::arg("numbers"), py::arg("factors"), py::arg("squares"),
        py::arg("pool"), py::arg("threads"));

  m.attr("cuda_build") = LOPT_CUDA_BUILD;  // why lopt_fast._cuda was not built; empty: it was

  lopt::bind_plan(m);
  lopt::bind_operations(m);
  lopt::bind_gpu(m);
  lopt::bind_gpu_operations(m);
  lopt::bind_gpu_test_hooks(m);

  m.def("xla_handlers", [] {  // of small_fc_lopt, by platform
    py::dict handlers;
    handlers["cpu"] = xla_handler(lopt::xla_small_fc_cpu_handler());
    handlers["cuda"] = xla_handler(lopt::xla_small_fc_gpu_handler());
    handlers["emulator"] = xla_handler(lopt::xla_small_fc_emulated_handler());
    return handlers;
  });
  m.def("xla_phase_handlers", [] {  // of a phase of small_fc_lopt over parts, by platform
    py::dict handlers;
    handlers["cpu"] = xla_handler(lopt::xla_small_fc_phase_handler());
    handlers["cuda"] = xla_handler(lopt::xla_small_fc_gpu_phase_handler());
    handlers["emulator"] = xla_handler(lopt::xla_small_fc_emulated_phase_handler());
    return handlers;
  });
  m.def("xla_operation_handlers", [] {  // by operation, on the CPU
    py::dict handlers;
    handlers["element_mlp"] = xla_handler(lopt::xla_element_mlp_handler());
    handlers["adam"] = xla_handler(lopt::xla_adam_handler());
    handlers["statistics"] = xla_handler(lopt::xla_statistics_handler());
    return handlers;
  });
  m.def("xla_gpu_operation_handlers", [] {  // of all operations
    py::dict handlers;
    handlers["cuda"] = xla_handler(lopt::xla_gpu_operation_handler());
    handlers["emulator"] = xla_handler(lopt::xla_emulated_operation_handler());
    return handlers;
  });
  m.def("xla_set_device", [](const py::capsule& device) {  // as lopt_fast._cuda.device() gives it
    const void* held = PyCapsule_GetPointer(device.ptr(), lopt::kGpuDeviceCapsule);
    if (held == nullptr) throw py::error_already_set();
    lopt::xla_set_device(*static_cast<const lopt::GpuDevice*>(held));
  });
  m.def(
      "xla_gpu_scratch_bytes",
      [](const lopt::Spec& spec, const std::vector<LoopNumbers>& leaves, bool clip) {
        std::vector<lopt::Loops> loops;
        for (const auto& [batch0, x, batch1, y, batch2, x_is_row, factored] : leaves)
          loops.push_back({batch0, x, batch1, y, batch2, x_is_row, factored});
        return lopt::xla_gpu_scratch_bytes(spec, loops, clip);
      },
      py::kw_only(), py::arg("spec"), py::arg("leaves"), py::arg("clip"));
  m.def(
      "xla_gpu_phase_scratch_bytes",
      [](const lopt::Spec& spec, const std::vector<LoopNumbers>& leaves,
         const std::vector<OwnedPart*>& parts) {
        if (parts.size() != leaves.size()) throw std::invalid_argument("each leaf needs its part");
        std::vector<lopt::Loops> loops;
        std::vector<lopt::TensorPart> views;
        for (const auto& [batch0, x, batch1, y, batch2, x_is_row, factored] : leaves)
          loops.push_back({batch0, x, batch1, y, batch2, x_is_row, factored});
        for (const OwnedPart* part : parts) views.push_back(part->view());
        return lopt::xla_gpu_phase_scratch_bytes(spec, loops, views);
      },
      py::kw_only(), py::arg("spec"), py::arg("leaves"), py::arg("parts"));

  m.def(
      "time_passes",
      [](const lopt::Spec& spec, const LoopNumbers& numbers, int64_t count, uintptr_t theta,
         const std::string& pool, int threads, int steps) {
        const auto [batch0, x, batch1, y, batch2, x_is_row, factored] = numbers;
        const lopt::Loops loops = {batch0, x, batch1, y, batch2, x_is_row, factored};
        lopt::StepTimes times;
        {
          py::gil_scoped_release release;
          times = lopt::time_passes(spec, loops, count, static_cast<const float*>(pointer(theta)),
                                    pool_of(pool, threads), steps);
        }
        py::dict out;
        out["step"] = times.step;
        out["factor_statistics"] = times.factor_statistics;
        out["feature_statistics"] = times.feature_statistics;
        out["apply"] = times.apply;
        return out;
      },
      py::kw_only(), py::arg("spec"), py::arg("loops"), py::arg("count"), py::arg("theta"), py::arg("pool"),
      py::arg("threads"), py::arg("steps"));
  m.def(
      "pool_test",  // for tests alone: task number `failing` runs out of memory, the others count
      [](const std::string& pool, int threads, int64_t tasks, int64_t failing) {
        struct Work {
          int64_t failing;
          std::atomic<int64_t> done{0};
        } work{failing};
        const lopt::Pool chosen = pool_of(pool, threads);
        py::gil_scoped_release release;
        chosen.run(
            chosen.context, tasks,
            [](void* argument, int64_t i) {
              Work& work = *static_cast<Work*>(argument);
              if (i == work.failing) throw std::bad_alloc();
              ++work.done;
            },
            &work);
        return work.done.load();
      },
      py::kw_only(), py::arg("pool"), py::arg("threads"), py::arg("tasks"), py::arg("failing"));
  m.def("instruction_set", &lopt::instruction_set);
  m.def("set_instruction_set", [](const std::string& name) { lopt::set_instruction_set(name.c_str()); });
  m.def("available_instruction_sets", &available_instruction_sets);
}
