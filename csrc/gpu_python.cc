#include "csrc/gpu_python.h"

#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "csrc/gpu.h"
#include "csrc/gpu_emulator.h"
#include "csrc/parts_python.h"
#include "kernels/small_fc_lopt/gpu.h"

namespace py = pybind11;

namespace lopt {
namespace {

void* pointer(uintptr_t address) { return reinterpret_cast<void*>(address); }

Storage storage_of(const std::string& name) {
  if (name == "float32") return Storage::float32;
  if (name == "bfloat16") return Storage::bfloat16;
  if (name == "float16") return Storage::float16;
  throw std::invalid_argument("type " + name + ": must be float32, bfloat16 or float16");
}

ScalarType scalar_type_of(const std::string& name) {
  if (name == "float32") return ScalarType::float32;
  if (name == "float64") return ScalarType::float64;
  if (name == "int32") return ScalarType::int32;
  if (name == "int64") return ScalarType::int64;
  throw std::invalid_argument("type " + name + ": must be float32, float64, int32 or int64");
}

// A number, or (address, type).
DeviceScalar scalar_of(const py::handle& object) {
  if (!py::isinstance<py::tuple>(object)) return {object.cast<double>(), nullptr, ScalarType::float64};
  const auto [address, type] = object.cast<std::pair<uintptr_t, std::string>>();
  if (!address) throw std::invalid_argument("a number on the device at address 0");
  return {0.0, pointer(address), scalar_type_of(type)};
}

MlpVariant variant_of(const std::string& name) {
  if (name == "automatic") return MlpVariant::automatic;
  if (name == "elementwise") return MlpVariant::elementwise;
  if (name == "matmul") return MlpVariant::matmul;
  if (name == "matmul_bfloat16") return MlpVariant::matmul_bfloat16;
  throw std::invalid_argument("variant " + name +
                              ": must be automatic, elementwise, matmul or matmul_bfloat16");
}

GpuSchedule schedule_of(const std::string& name) {
  if (name == "automatic") return GpuSchedule::automatic;
  if (name == "single_launch") return GpuSchedule::single_launch;
  if (name == "phased") return GpuSchedule::phased;
  throw std::invalid_argument("schedule " + name + ": must be automatic, single_launch or phased");
}

using LoopNumbers = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, bool, bool>;

GpuTensor make_tensor(const LoopNumbers& loops, const std::string& parameter, const std::string& gradient,
                      const std::string& state, uintptr_t param, uintptr_t grad, uintptr_t output, bool apply,
                      uintptr_t momentum, uintptr_t second_moment, uintptr_t row, uintptr_t column,
                      uintptr_t mean_squares, int64_t momentum_stride, uintptr_t theta, const py::object& lr,
                      const py::object& weight_decay, const py::object& t, uintptr_t step,
                      int32_t clip_group) {
  const auto [batch0, x, batch1, y, batch2, x_is_row, factored] = loops;
  GpuTensor out = {};
  out.loops = {batch0, x, batch1, y, batch2, x_is_row, factored};
  out.parameter = storage_of(parameter);
  out.gradient = storage_of(gradient);
  out.state = storage_of(state);
  out.param = pointer(param);
  out.grad = pointer(grad);
  out.output = pointer(output);
  out.apply = apply;
  out.momentum = pointer(momentum);
  out.second_moment = pointer(second_moment);
  out.row = static_cast<float*>(pointer(row));
  out.column = static_cast<float*>(pointer(column));
  out.mean_squares = static_cast<float*>(pointer(mean_squares));
  out.momentum_stride = momentum_stride;
  out.theta = static_cast<const float*>(pointer(theta));
  out.lr = scalar_of(lr);
  out.weight_decay = scalar_of(weight_decay);
  out.t = scalar_of(t);
  out.step = static_cast<int64_t*>(pointer(step));
  out.clip_group = clip_group;
  return out;
}

int32_t phase_of(const std::string& name) {
  static const char* const names[] = {"clip_sums",    "factor_sums", "axes",  "fold",
                                      "feature_sums", "network",     "apply", "finish"};
  static_assert(sizeof names / sizeof *names == kPhases, "a name for each phase");
  for (int32_t phase = 0; phase < kPhases; ++phase)
    if (name == names[phase]) return phase;
  throw std::invalid_argument("phase " + name + ": see enum Phase in kernels/small_fc_lopt/gpu.h");
}

std::vector<GpuTensor> tensors_of(const std::vector<GpuTensor*>& pointers) {
  std::vector<GpuTensor> tensors;
  for (const GpuTensor* t : pointers) tensors.push_back(*t);
  return tensors;
}

int64_t scratch_bytes(const Spec& spec, const std::vector<GpuTensor*>& pointers, int32_t clip_groups) {
  const std::vector<GpuTensor> tensors = tensors_of(pointers);
  const std::vector<DeviceScalar> norms(size_t(clip_groups), DeviceScalar{1.0, nullptr, ScalarType::float64});
  GpuStep step = {};
  step.spec = spec;
  step.tensors = tensors.data();
  step.count = int64_t(tensors.size());
  step.max_norms = norms.data();
  step.clip_groups = clip_groups;
  return gpu_scratch_bytes(step);
}

void step_on(const py::capsule& device, const Spec& spec, const std::vector<GpuTensor*>& pointers,
             const py::sequence& max_norms, const py::object& grad_scale, bool divide, uintptr_t found_inf,
             const std::string& variant, const std::string& schedule, const std::vector<std::string>& phases,
             int32_t ordinal, uintptr_t scratch, uintptr_t stream) {
  const auto* gpu = static_cast<const GpuDevice*>(PyCapsule_GetPointer(device.ptr(), kGpuDeviceCapsule));
  if (!gpu) throw py::error_already_set();
  const std::vector<GpuTensor> tensors = tensors_of(pointers);
  std::vector<DeviceScalar> norms;
  for (const py::handle& norm : max_norms) norms.push_back(scalar_of(norm));
  GpuStep step = {};
  step.spec = spec;
  step.tensors = tensors.data();
  step.count = int64_t(tensors.size());
  step.max_norms = norms.data();
  step.clip_groups = int32_t(norms.size());
  step.grad_scale = scalar_of(grad_scale);
  step.divide = divide;
  step.found_inf = static_cast<const float*>(pointer(found_inf));
  step.variant = variant_of(variant);
  step.schedule = schedule_of(schedule);
  for (const std::string& phase : phases) step.phases |= 1u << phase_of(phase);
  if (step.phases && step.schedule != GpuSchedule::phased)
    throw std::invalid_argument("phases alone need schedule phased");
  py::gil_scoped_release release;
  gpu_step(step, *gpu, ordinal, pointer(scratch), pointer(stream));
}

std::vector<GpuPartTensor> part_tensors_of(const std::vector<GpuTensor*>& tensors,
                                           const std::vector<OwnedPart*>& parts,
                                           const std::vector<uintptr_t>& begins) {
  if (parts.size() != tensors.size() || begins.size() != tensors.size())
    throw std::invalid_argument("each tensor needs its part, and where that begins");
  std::vector<GpuPartTensor> found;
  for (size_t i = 0; i < tensors.size(); ++i)
    found.push_back({*tensors[i], parts[i]->view(), static_cast<const int32_t*>(pointer(begins[i]))});
  return found;
}

int64_t phase_scratch_bytes(const Spec& spec, const std::vector<GpuTensor*>& tensors,
                            const std::vector<OwnedPart*>& parts, const std::vector<uintptr_t>& begins) {
  const std::vector<GpuPartTensor> all = part_tensors_of(tensors, parts, begins);
  float somewhere = 0;
  const GpuPartStep step = {spec, all.data(), int64_t(all.size()), &somewhere, &somewhere, {}, {}};
  return gpu_phase_scratch_bytes(step);
}

// `begins`: addresses of int32 on the device; `factors`, `squares`: of float32.
void phase_on(const py::capsule& device, const Spec& spec, const std::string& phase,
              const std::vector<GpuTensor*>& tensors, const std::vector<OwnedPart*>& parts,
              const std::vector<uintptr_t>& begins, uintptr_t factors, uintptr_t squares,
              const py::object& grad_scale, const std::string& variant, int32_t ordinal, uintptr_t scratch,
              uintptr_t stream) {
  const auto* gpu = static_cast<const GpuDevice*>(PyCapsule_GetPointer(device.ptr(), kGpuDeviceCapsule));
  if (!gpu) throw py::error_already_set();
  const std::vector<GpuPartTensor> all = part_tensors_of(tensors, parts, begins);
  const GpuPartStep step = {spec,
                            all.data(),
                            int64_t(all.size()),
                            static_cast<float*>(pointer(factors)),
                            static_cast<float*>(pointer(squares)),
                            scalar_of(grad_scale),
                            variant_of(variant)};
  const PartPhase chosen = part_phase_of(phase);
  py::gil_scoped_release release;
  gpu_phase(step, chosen, *gpu, ordinal, pointer(scratch), pointer(stream));
}

py::dict set_emulator(int32_t multiprocessors, int64_t l2_bytes, int32_t compute_capability, uint64_t seed,
                      uint64_t thread_seed) {
  if (multiprocessors < 1) throw std::invalid_argument("multiprocessors must be positive");
  EmulatorSettings& settings = emulator_settings();
  py::dict old;
  old["multiprocessors"] = settings.multiprocessors;
  old["l2_bytes"] = settings.l2_bytes;
  old["compute_capability"] = settings.compute_capability;
  old["seed"] = settings.seed;
  old["thread_seed"] = settings.thread_seed;
  settings.multiprocessors = multiprocessors;
  settings.l2_bytes = l2_bytes;
  settings.compute_capability = compute_capability;
  settings.seed = seed;
  settings.thread_seed = thread_seed;
  return old;
}

}  // namespace

void bind_gpu(py::module_& m) {
  py::class_<GpuTensor>(m, "GpuTensor")
      .def(py::init(&make_tensor), py::kw_only(), py::arg("loops"), py::arg("parameter"), py::arg("gradient"),
           py::arg("state"), py::arg("param"), py::arg("grad"), py::arg("output"), py::arg("apply"),
           py::arg("momentum"), py::arg("second_moment"), py::arg("row"), py::arg("column"),
           py::arg("mean_squares"), py::arg("momentum_stride"), py::arg("theta"), py::arg("lr"),
           py::arg("weight_decay"), py::arg("t"), py::arg("step"), py::arg("clip_group"));
  m.def("gpu_emulator", [] { return py::capsule(&gpu_emulator(), kGpuDeviceCapsule); });
  m.def("set_emulator", &set_emulator, py::kw_only(), py::arg("multiprocessors") = 8,
        py::arg("l2_bytes") = int64_t(1) << 20, py::arg("compute_capability") = 90, py::arg("seed") = 0,
        py::arg("thread_seed") = 0);
  m.def("emulator_launches", [] { return emulator_settings().launches; });
  m.def("gpu_scratch_bytes", &scratch_bytes, py::arg("spec"), py::arg("tensors"), py::arg("clip_groups") = 0);
  m.def("gpu_step", &step_on, py::arg("device"), py::kw_only(), py::arg("spec"), py::arg("tensors"),
        py::arg("max_norms") = py::tuple(), py::arg("grad_scale") = 1.0, py::arg("divide") = false,
        py::arg("found_inf") = 0, py::arg("variant") = "automatic", py::arg("schedule") = "automatic",
        py::arg("phases") = py::list(), py::arg("ordinal") = 0, py::arg("scratch"), py::arg("stream") = 0);
  m.def("gpu_phase_scratch_bytes", &phase_scratch_bytes, py::arg("spec"), py::arg("tensors"),
        py::arg("parts"), py::arg("begins"));
  m.def("gpu_phase", &phase_on, py::arg("device"), py::kw_only(), py::arg("spec"), py::arg("phase"),
        py::arg("tensors"), py::arg("parts"), py::arg("begins"), py::arg("factors"), py::arg("squares"),
        py::arg("grad_scale") = 1.0, py::arg("variant") = "automatic", py::arg("ordinal") = 0,
        py::arg("scratch"), py::arg("stream") = 0);
}

}  // namespace lopt
