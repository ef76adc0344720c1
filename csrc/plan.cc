#include "csrc/plan.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>

namespace py = pybind11;

namespace lopt {
namespace {

// Strides of axes of size 1 say nothing.
bool same_strides(const std::vector<int64_t>& shape, const int64_t* a, const int64_t* b) {
  for (size_t axis = 0; axis < shape.size(); ++axis)
    if (shape[axis] != 1 && a[axis] != b[axis]) return false;
  return true;
}

std::vector<int64_t> in_order(const std::vector<int64_t>& order, const int64_t* values) {
  std::vector<int64_t> result(order.size());
  for (size_t i = 0; i < order.size(); ++i) result[i] = values[order[i]];
  return result;
}

// Type in memory of a tensor that Python has let through to the CPU kernels.
Dtype dtype_of(const DlTensor& tensor) {
  if (tensor.type_code == kDlBfloat) return Dtype::bfloat16;
  if (tensor.type_bits == 16) return Dtype::float16;
  return tensor.type_bits == 32 ? Dtype::float32 : Dtype::float64;
}

char* address_of(const DlTensor& tensor) { return static_cast<char*>(tensor.data) + tensor.byte_offset; }

// `capsule` is torch.Tensor.__dlpack_c_exchange_api__.
const DlExchangeApi* exchange_of(const py::capsule& capsule) {
  const auto* exchange =
      static_cast<const DlExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (!exchange) throw py::error_already_set();
  while (exchange && exchange->major_version != kDlMajorVersion) exchange = exchange->previous;
  if (!exchange || !exchange->tensor_from_object)
    throw std::invalid_argument(
        std::string("this PyTorch does not offer DLPack exchange of major version 1: use ") + kOldestPyTorch +
        " or later");
  return exchange;
}

}  // namespace

PlanBase::Layout::Layout(const DlTensor& t)
    : device_type(t.device_type),
      device_id(t.device_id),
      type_code(t.type_code),
      type_bits(t.type_bits),
      shape(t.shape, t.shape + t.ndim),
      strides(t.strides, t.strides + t.ndim) {}

bool PlanBase::Layout::fits(const DlTensor& t) const {
  return t.device_type == device_type && t.device_id == device_id && t.type_code == type_code &&
         t.type_bits == type_bits && t.type_lanes == 1 && size_t(t.ndim) == shape.size() &&
         std::equal(shape.begin(), shape.end(), t.shape) && (t.data || empty());
}

PlanBase::Place::Place(const DlTensor& t)
    : address(address_of(t)),
      ndim(t.ndim),
      type_code(t.type_code),
      type_bits(t.type_bits),
      sizes(t.shape, t.shape + t.ndim) {
  sizes.insert(sizes.end(), t.strides, t.strides + t.ndim);
}

bool PlanBase::Place::is(const DlTensor& t) const {
  return address_of(t) == address && t.ndim == ndim && t.type_code == type_code && t.type_bits == type_bits &&
         std::equal(t.shape, t.shape + ndim, sizes.data()) &&
         std::equal(t.strides, t.strides + ndim, sizes.data() + ndim);
}

bool PlanBase::Layout::empty() const { return std::find(shape.begin(), shape.end(), 0) != shape.end(); }

PlanBase::Snapshot::Snapshot(py::dict dict) : dict_(std::move(dict)) {
  PyObject *key, *value;
  for (Py_ssize_t i = 0; PyDict_Next(dict_.ptr(), &i, &key, &value);) {
    items_.push_back(py::reinterpret_borrow<py::object>(key));
    items_.push_back(py::reinterpret_borrow<py::object>(value));
  }
}

bool PlanBase::Snapshot::unchanged() const {
  if (size_t(PyDict_Size(dict_.ptr())) * 2 != items_.size()) return false;
  PyObject *key, *value;
  auto item = items_.begin();
  for (Py_ssize_t i = 0; PyDict_Next(dict_.ptr(), &i, &key, &value); item += 2)
    if (item[0].ptr() != key || item[1].ptr() != value) return false;
  return true;
}

int PlanBase::Snapshot::traverse(visitproc visit, void* arg) const {
  Py_VISIT(dict_.ptr());
  for (const py::object& item : items_) Py_VISIT(item.ptr());
  return 0;
}

PlanBase::PlanBase(const Spec& spec, py::dict state, py::capsule exchange, py::object is_negated)
    : spec_(spec),
      state_(std::move(state)),
      exchange_capsule_(std::move(exchange)),
      is_negated_(std::move(is_negated)),
      grad_name_(py::reinterpret_steal<py::str>(PyUnicode_InternFromString("grad"))) {
  exchange_ = exchange_of(exchange_capsule_);
}

void PlanBase::add(py::object parameter, size_t group, const Record& record, std::vector<int64_t> order,
                   py::dict state, py::object memory, uintptr_t step, Storage state_type) {
  DlTensor tensor;
  if (!read(parameter.ptr(), &tensor) || size_t(tensor.ndim) != order.size() ||
      order.size() != record.sizes.size())
    throw std::invalid_argument("a planned parameter cannot be read");
  Entry entry;
  entry.parameter = std::move(parameter);
  entry.group = group;
  entry.role = Role::planned;
  entry.record = record;
  entry.state_type = state_type;
  entry.layout = Layout(tensor);
  entry.order = std::move(order);
  entry.dense_strides.resize(entry.order.size());
  int64_t stride = 1;
  for (size_t i = entry.order.size(); i-- > 0;) {
    entry.dense_strides[entry.order[i]] = stride;
    stride *= std::max<int64_t>(record.sizes[i], 1);
  }
  if (!same_strides(entry.layout.shape, entry.layout.strides.data(), entry.dense_strides.data()))
    entry.memory_strides = in_order(entry.order, entry.layout.strides.data());
  entry.grad_strides.resize(entry.order.size());
  entry.state = Snapshot(std::move(state));
  for (size_t i = 0; i < entry.state.size(); ++i) {
    if (!read(entry.state.value(i), &tensor)) throw std::invalid_argument("planned state cannot be read");
    entry.places.emplace_back(tensor);
  }
  entry.memory = std::move(memory);
  entry.step = reinterpret_cast<int64_t*>(step);
  entries_.push_back(std::move(entry));
}

void PlanBase::add_idle(py::object parameter, size_t group) {
  Entry entry;
  entry.parameter = std::move(parameter);
  entry.group = group;
  entries_.push_back(std::move(entry));
}

void PlanBase::add_foreign(py::object parameter, size_t group) {
  add_idle(std::move(parameter), group);
  entries_.back().role = Role::foreign;
}

bool PlanBase::read(PyObject* object, DlTensor* tensor) const {
  if (exchange_->tensor_from_object(object, tensor) == 0) return true;
  PyErr_Clear();  // Python finds out why
  return false;
}

bool PlanBase::fits(const Entry& entry, const DlTensor& p, const DlTensor& g) const {
  const Layout& layout = entry.layout;
  if (!layout.fits(p) || !same_strides(layout.shape, p.strides, layout.strides.data()) || !layout.fits(g) ||
      !entry.state.unchanged())
    return false;
  DlTensor held;
  for (size_t i = 0; i < entry.places.size(); ++i)
    if (!read(entry.state.value(i), &held) || !entry.places[i].is(held)) return false;
  return true;
}

bool PlanBase::collect(const py::list& parameter_lists) {
  size_t listed = 0;
  for (const py::handle list : parameter_lists) {
    if (!PyList_Check(list.ptr())) return false;
    listed += size_t(PyList_GET_SIZE(list.ptr()));
  }
  if (listed != entries_.size()) return false;

  size_t group = 0;
  Py_ssize_t position = 0;
  for (Entry& entry : entries_) {
    for (; group != entry.group; ++group, position = 0)
      if (group + 1 > parameter_lists.size()) return false;
    if (group >= parameter_lists.size()) return false;
    PyObject* list = PyList_GET_ITEM(parameter_lists.ptr(), Py_ssize_t(group));
    if (position >= PyList_GET_SIZE(list) || PyList_GET_ITEM(list, position) != entry.parameter.ptr())
      return false;
    ++position;
    if (entry.role == Role::foreign) continue;

    py::object gradient =
        py::reinterpret_steal<py::object>(PyObject_GetAttr(entry.parameter.ptr(), grad_name_.ptr()));
    if (!gradient) throw py::error_already_set();
    if (gradient.is_none()) continue;
    DlTensor p, g;
    if (entry.role == Role::idle || !read(entry.parameter.ptr(), &p) || !read(gradient.ptr(), &g) ||
        !fits(entry, p, g))
      return false;
    PyObject* arguments[] = {gradient.ptr()};
    const py::object negated =
        py::reinterpret_steal<py::object>(PyObject_Vectorcall(is_negated_.ptr(), arguments, 1, nullptr));
    if (!negated) throw py::error_already_set();
    if (negated.ptr() != Py_False) return false;
    active_.push_back(&entry);
    take(entry, p, g, std::move(gradient));
  }
  return true;
}

bool PlanBase::begin(const py::list& parameter_lists, const py::dict& state) {
  struct EndUnlessReady {
    PlanBase* plan;
    bool ready = false;
    ~EndUnlessReady() {
      if (!ready) plan->end();
    }
  } guard{this};
  return guard.ready = state.ptr() == state_.dict() && state_.unchanged() && collect(parameter_lists);
}

void PlanBase::end() {
  active_.clear();
  forget();
}

py::list PlanBase::updated() const {
  py::list parameters(active_.size());
  for (size_t i = 0; i < active_.size(); ++i)
    PyList_SET_ITEM(parameters.ptr(), Py_ssize_t(i), active_[i]->parameter.inc_ref().ptr());
  return parameters;
}

int PlanBase::traverse(visitproc visit, void* arg) const {
  if (const int stop = state_.traverse(visit, arg)) return stop;
  Py_VISIT(is_negated_.ptr());
  for (const Entry& entry : entries_) {
    Py_VISIT(entry.parameter.ptr());
    Py_VISIT(entry.memory.ptr());
    if (const int stop = entry.state.traverse(visit, arg)) return stop;
  }
  return 0;
}

void PlanBase::clear() {
  std::vector<Entry> entries = std::move(entries_);  // freeing them may run any Python code
  Snapshot state = std::move(state_);
}

Plan::Plan(const Spec& spec, uintptr_t theta_float32, uintptr_t theta_float64, py::dict state,
           py::capsule exchange, py::object is_negated)
    : PlanBase(spec, std::move(state), std::move(exchange), std::move(is_negated)),
      theta_{reinterpret_cast<void*>(theta_float32), reinterpret_cast<void*>(theta_float64)} {}

void Plan::take(Entry& entry, const DlTensor& p, const DlTensor& g, py::object gradient) {
  if (entry.layout.empty()) return;
  const int64_t* grad_strides = nullptr;
  if (!same_strides(entry.layout.shape, g.strides, entry.dense_strides.data())) {
    for (size_t i = 0; i < entry.order.size(); ++i) entry.grad_strides[i] = g.strides[entry.order[i]];
    grad_strides = entry.grad_strides.data();
  }
  const Record& r = entry.record;
  const View param{address_of(p), entry.memory_strides.empty() ? nullptr : entry.memory_strides.data(),
                   dtype_of(p)};
  tensors_.push_back({r.dtype,
                      r.loops,
                      int32_t(r.sizes.size()),
                      r.sizes.data(),
                      param,
                      {address_of(g), grad_strides, dtype_of(g)},
                      param,
                      true,
                      r.momentum,
                      r.second_moment,
                      r.row,
                      r.column,
                      r.mean_squares,
                      theta_[int(r.dtype)],
                      nullptr,
                      -1,
                      r.momentum_stride});
  scalars_.push_back({0.0, 0.0, 1.0, *entry.step});
  groups_.push_back(entry.group);
  gradients_.push_back(std::move(gradient));
}

void Plan::forget() {
  tensors_.clear();
  scalars_.clear();
  groups_.clear();
  gradients_.clear();
}

py::list Plan::run(const std::vector<double>& lrs, const std::vector<double>& weight_decays,
                   double grad_scale, std::optional<double> max_grad_norm, int threads) {
  for (size_t i = 0; i < tensors_.size(); ++i) {
    const size_t group = groups_[i];
    scalars_[i].lr = lrs.at(group);
    scalars_[i].weight_decay = weight_decays.at(group);
    scalars_[i].grad_scale = grad_scale;
    tensors_[i].scalars = &scalars_[i];
    tensors_[i].clip_group = max_grad_norm ? 0 : -1;
  }
  const double max_norm = max_grad_norm.value_or(0.0);
  if (!tensors_.empty()) {
    py::gil_scoped_release release;
    small_fc_step(spec_, tensors_.data(), int64_t(tensors_.size()), &max_norm, max_grad_norm ? 1 : 0,
                  openmp_pool(threads));
  }
  for (Entry* entry : active_) ++*entry->step;
  return updated();
}

namespace {

DeviceScalar scalar_of(const GpuPlan::Scalar& scalar) {
  const auto [value, address, type] = scalar;
  return {value, reinterpret_cast<const void*>(address), ScalarType(type)};
}

// Type in memory of a tensor that Python has let through.
Storage storage_of(const DlTensor& tensor) {
  if (tensor.type_code == kDlFloat && tensor.type_bits == 32) return Storage::float32;
  if (tensor.type_code == kDlFloat && tensor.type_bits == 16) return Storage::float16;
  if (tensor.type_code == kDlBfloat && tensor.type_bits == 16) return Storage::bfloat16;
  throw std::invalid_argument("GPU kernels take float32, bfloat16 and float16");
}

}  // namespace

GpuPlan::GpuPlan(const Spec& spec, py::capsule device, int32_t ordinal, uintptr_t theta, py::dict state,
                 py::capsule exchange, py::object is_negated, py::object dense, py::object copy)
    : PlanBase(spec, std::move(state), std::move(exchange), std::move(is_negated)),
      capsule_(std::move(device)),
      device_(static_cast<const GpuDevice*>(PyCapsule_GetPointer(capsule_.ptr(), "lopt_fast.GpuDevice"))),
      ordinal_(ordinal),
      theta_(reinterpret_cast<const float*>(theta)),
      dense_(std::move(dense)),
      copy_(std::move(copy)) {
  if (!device_) throw py::error_already_set();
  if (device_->abi != kGpuAbi)
    throw std::runtime_error("the module with the GPU kernels is from another build: reinstall lopt_fast");
}

std::pair<py::object, void*> GpuPlan::dense(const Entry& entry, const py::object& tensor) const {
  py::object copy = dense_(tensor, entry.dense_strides);
  DlTensor found;
  if (!read(copy.ptr(), &found)) throw std::runtime_error("a dense copy cannot be read");
  return {std::move(copy), address_of(found)};
}

void GpuPlan::take(Entry& entry, const DlTensor& p, const DlTensor& g, py::object gradient) {
  void *param = address_of(p), *grad = address_of(g);
  const bool empty = entry.layout.empty();
  if (!empty && !entry.memory_strides.empty()) {
    py::object copy;
    std::tie(copy, param) = dense(entry, entry.parameter);
    copied_.emplace_back(entry.parameter, std::move(copy));
  }
  if (!empty && !same_strides(entry.layout.shape, g.strides, entry.dense_strides.data()))
    std::tie(gradient, grad) = dense(entry, gradient);
  const Record& r = entry.record;
  GpuTensor tensor{};
  tensor.loops = r.loops;
  tensor.parameter = storage_of(p);
  tensor.gradient = storage_of(g);
  tensor.state = entry.state_type;
  tensor.param = tensor.output = param;
  tensor.grad = grad;
  tensor.apply = true;
  tensor.momentum = r.momentum;
  tensor.second_moment = r.second_moment;
  tensor.row = static_cast<float*>(r.row);
  tensor.column = static_cast<float*>(r.column);
  tensor.mean_squares = static_cast<float*>(r.mean_squares);
  tensor.momentum_stride = r.momentum_stride;
  tensor.theta = theta_;
  tensor.t = {0.0, entry.step, ScalarType::int64};
  tensor.step = entry.step;
  tensors_.push_back(tensor);
  groups_.push_back(entry.group);
  alive_.push_back(std::move(gradient));
}

void GpuPlan::forget() {
  tensors_.clear();
  groups_.clear();
  alive_.clear();
  copied_.clear();
}

py::list GpuPlan::run(const std::vector<Scalar>& lrs, const std::vector<Scalar>& weight_decays,
                      const Scalar& grad_scale, bool divide, std::optional<Scalar> max_grad_norm,
                      uintptr_t found_inf, int32_t variant, int32_t schedule, const py::object& scratch,
                      uintptr_t stream) {
  if (tensors_.empty()) return updated();
  for (size_t i = 0; i < tensors_.size(); ++i) {
    tensors_[i].lr = scalar_of(lrs.at(groups_[i]));
    tensors_[i].weight_decay = scalar_of(weight_decays.at(groups_[i]));
    tensors_[i].clip_group = max_grad_norm ? 0 : -1;
  }
  const DeviceScalar max_norm = max_grad_norm ? scalar_of(*max_grad_norm) : DeviceScalar{};
  GpuStep step{};
  step.spec = spec_;
  step.tensors = tensors_.data();
  step.count = int64_t(tensors_.size());
  step.max_norms = &max_norm;
  step.clip_groups = max_grad_norm ? 1 : 0;
  step.grad_scale = scalar_of(grad_scale);
  step.divide = divide;
  step.found_inf = reinterpret_cast<const float*>(found_inf);
  step.variant = MlpVariant(variant);
  step.schedule = GpuSchedule(schedule);
  void* memory = reinterpret_cast<void*>(scratch(gpu_scratch_bytes(step)).cast<uintptr_t>());
  {
    py::gil_scoped_release release;
    gpu_step(step, *device_, ordinal_, memory, reinterpret_cast<void*>(stream));
  }
  for (const auto& [parameter, copy] : copied_) copy_(parameter, copy);
  return updated();
}

int GpuPlan::traverse(visitproc visit, void* arg) const {
  Py_VISIT(dense_.ptr());
  Py_VISIT(copy_.ptr());
  return PlanBase::traverse(visit, arg);
}

py::list ListPlan::run() const {
  py::list found;
  for (size_t i = 0; i < active_.size(); ++i)
    found.append(py::make_tuple(active_[i]->parameter, gradients_[i]));
  return found;
}

// Where tensors lie, and how (device, type, sizes, strides), each as bytes to compare with those of another
// time; None if one of them cannot be read.
py::object described(const py::list& tensors, const py::capsule& exchange) {
  const DlExchangeApi* api = exchange_of(exchange);
  std::vector<int64_t> addresses, layouts;
  addresses.reserve(tensors.size());
  layouts.reserve(tensors.size() * 8);
  for (const py::handle object : tensors) {
    DlTensor t;
    if (api->tensor_from_object(object.ptr(), &t) != 0) {
      PyErr_Clear();
      return py::none();
    }
    addresses.push_back(int64_t(reinterpret_cast<intptr_t>(address_of(t))));
    layouts.insert(layouts.end(),
                   {t.device_type, t.device_id, t.type_code, t.type_bits, t.type_lanes, t.ndim});
    layouts.insert(layouts.end(), t.shape, t.shape + t.ndim);
    layouts.insert(layouts.end(), t.strides, t.strides + t.ndim);
  }
  const auto bytes = [](const std::vector<int64_t>& values) {
    return py::bytes(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(int64_t));
  };
  return py::make_tuple(bytes(addresses), bytes(layouts));
}

void bind_plan(py::module_& m) {
  m.def("described", &described, py::arg("tensors"), py::arg("exchange"));
  const auto collectable = [](PyHeapTypeObject* heap_type) {
    PyTypeObject* type = &heap_type->ht_type;
    type->tp_flags |= Py_TPFLAGS_HAVE_GC;
    type->tp_traverse = [](PyObject* self, visitproc visit, void* arg) {
      Py_VISIT(Py_TYPE(self));
      return py::detail::is_holder_constructed(self)
                 ? py::cast<PlanBase&>(py::handle(self)).traverse(visit, arg)
                 : 0;
    };
    type->tp_clear = [](PyObject* self) {
      if (py::detail::is_holder_constructed(self)) py::cast<PlanBase&>(py::handle(self)).clear();
      return 0;
    };
  };
  py::enum_<Storage>(m, "Storage")
      .value("float32", Storage::float32)
      .value("bfloat16", Storage::bfloat16)
      .value("float16", Storage::float16);
  py::class_<PlanBase>(m, "PlanBase", py::custom_type_setup(collectable))
      .def("add", &PlanBase::add, py::kw_only(), py::arg("parameter"), py::arg("group"), py::arg("record"),
           py::arg("order"), py::arg("state"), py::arg("memory"), py::arg("step"),
           py::arg("state_type") = Storage::float32)
      .def("add_idle", &PlanBase::add_idle, py::arg("parameter"), py::arg("group"))
      .def("add_foreign", &PlanBase::add_foreign, py::arg("parameter"), py::arg("group"))
      .def("begin", &PlanBase::begin, py::arg("parameter_lists"), py::arg("state"))
      .def("end", &PlanBase::end);
  py::class_<Plan, PlanBase>(m, "Plan", py::custom_type_setup(collectable))
      .def(py::init<const Spec&, uintptr_t, uintptr_t, py::dict, py::capsule, py::object>(), py::kw_only(),
           py::arg("spec"), py::arg("theta_float32"), py::arg("theta_float64"), py::arg("state"),
           py::arg("exchange"), py::arg("is_negated"))
      .def("run", &Plan::run, py::arg("lrs"), py::arg("weight_decays"), py::arg("grad_scale"),
           py::arg("max_grad_norm"), py::arg("threads"));
  py::class_<GpuPlan, PlanBase>(m, "GpuPlan", py::custom_type_setup(collectable))
      .def(py::init<const Spec&, py::capsule, int32_t, uintptr_t, py::dict, py::capsule, py::object,
                    py::object, py::object>(),
           py::kw_only(), py::arg("spec"), py::arg("device"), py::arg("ordinal"), py::arg("theta"),
           py::arg("state"), py::arg("exchange"), py::arg("is_negated"), py::arg("dense"), py::arg("copy"))
      .def("run", &GpuPlan::run, py::kw_only(), py::arg("lrs"), py::arg("weight_decays"),
           py::arg("grad_scale"), py::arg("divide"), py::arg("max_grad_norm"), py::arg("found_inf"),
           py::arg("variant"), py::arg("schedule"), py::arg("scratch"), py::arg("stream"));
  py::class_<ListPlan, PlanBase>(m, "ListPlan", py::custom_type_setup(collectable))
      .def(py::init<const Spec&, py::dict, py::capsule, py::object>(), py::kw_only(), py::arg("spec"),
           py::arg("state"), py::arg("exchange"), py::arg("is_negated"))
      .def("run", &ListPlan::run);
}

}  // namespace lopt
