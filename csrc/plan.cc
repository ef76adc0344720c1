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

bool is_empty(const std::vector<int64_t>& shape) {
  return std::find(shape.begin(), shape.end(), 0) != shape.end();
}

std::vector<int64_t> in_order(const std::vector<int64_t>& order, const int64_t* values) {
  std::vector<int64_t> result(order.size());
  for (size_t i = 0; i < order.size(); ++i) result[i] = values[order[i]];
  return result;
}

}  // namespace

Plan::Snapshot::Snapshot(py::dict dict) : dict_(std::move(dict)) {
  PyObject *key, *value;
  for (Py_ssize_t i = 0; PyDict_Next(dict_.ptr(), &i, &key, &value);) {
    items_.push_back(py::reinterpret_borrow<py::object>(key));
    items_.push_back(py::reinterpret_borrow<py::object>(value));
  }
}

bool Plan::Snapshot::unchanged() const {
  if (size_t(PyDict_Size(dict_.ptr())) * 2 != items_.size()) return false;
  PyObject *key, *value;
  auto item = items_.begin();
  for (Py_ssize_t i = 0; PyDict_Next(dict_.ptr(), &i, &key, &value); item += 2)
    if (item[0].ptr() != key || item[1].ptr() != value) return false;
  return true;
}

int Plan::Snapshot::traverse(visitproc visit, void* arg) const {
  Py_VISIT(dict_.ptr());
  for (const py::object& item : items_) Py_VISIT(item.ptr());
  return 0;
}

Plan::Plan(const Spec& spec, uintptr_t theta_float32, uintptr_t theta_float64, py::dict state,
           py::capsule exchange, py::object is_negated)
    : spec_(spec),
      theta_{reinterpret_cast<void*>(theta_float32), reinterpret_cast<void*>(theta_float64)},
      state_(std::move(state)),
      exchange_capsule_(std::move(exchange)),
      is_negated_(std::move(is_negated)),
      grad_name_(py::reinterpret_steal<py::str>(PyUnicode_InternFromString("grad"))) {
  exchange_ =
      static_cast<const DlExchangeApi*>(PyCapsule_GetPointer(exchange_capsule_.ptr(), "dlpack_exchange_api"));
  if (!exchange_) throw py::error_already_set();
  while (exchange_ && exchange_->major_version != kDlMajorVersion) exchange_ = exchange_->previous;
  if (!exchange_ || !exchange_->tensor_from_object)
    throw std::invalid_argument(
        "this PyTorch does not offer DLPack exchange of major version 1: use 2.13 or later");
}

void Plan::add(py::object parameter, size_t group, const Record& record, std::vector<int64_t> order,
               py::dict state, py::object memory, uintptr_t step) {
  DlTensor tensor;
  if (!read(parameter.ptr(), &tensor) || size_t(tensor.ndim) != order.size() ||
      order.size() != record.sizes.size())
    throw std::invalid_argument("a planned parameter cannot be read");
  Entry entry;
  entry.parameter = std::move(parameter);
  entry.group = group;
  entry.role = Role::planned;
  entry.record = record;
  entry.order = std::move(order);
  entry.shape.assign(tensor.shape, tensor.shape + tensor.ndim);
  entry.strides.assign(tensor.strides, tensor.strides + tensor.ndim);
  entry.dense_strides.resize(entry.order.size());
  int64_t stride = 1;
  for (size_t i = entry.order.size(); i-- > 0;) {
    entry.dense_strides[entry.order[i]] = stride;
    stride *= std::max<int64_t>(record.sizes[i], 1);
  }
  if (!same_strides(entry.shape, entry.strides.data(), entry.dense_strides.data()))
    entry.memory_strides = in_order(entry.order, entry.strides.data());
  entry.grad_strides.resize(entry.order.size());
  entry.momentum = state["momentum"];
  entry.state = Snapshot(std::move(state));
  entry.memory = std::move(memory);
  entry.step = reinterpret_cast<int64_t*>(step);
  entries_.push_back(std::move(entry));
}

void Plan::add_idle(py::object parameter, size_t group) {
  Entry entry;
  entry.parameter = std::move(parameter);
  entry.group = group;
  entries_.push_back(std::move(entry));
}

void Plan::add_foreign(py::object parameter, size_t group) {
  add_idle(std::move(parameter), group);
  entries_.back().role = Role::foreign;
}

bool Plan::read(PyObject* object, DlTensor* tensor) const {
  if (exchange_->tensor_from_object(object, tensor) == 0) return true;
  PyErr_Clear();  // Python finds out why
  return false;
}

bool Plan::fits(const Entry& entry, const DlTensor& tensor) const {
  const uint8_t bits = entry.record.dtype == Dtype::float32 ? 32 : 64;
  return tensor.device_type == kDlCpu && tensor.type_code == kDlFloat && tensor.type_bits == bits &&
         tensor.type_lanes == 1 && size_t(tensor.ndim) == entry.shape.size() &&
         std::equal(entry.shape.begin(), entry.shape.end(), tensor.shape) &&
         (tensor.data || is_empty(entry.shape));
}

bool Plan::collect(const py::list& parameter_lists, const std::vector<double>& lrs,
                   const std::vector<double>& weight_decays, double grad_scale, bool clip) {
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
    DlTensor p, g, m;
    if (entry.role == Role::idle || !read(entry.parameter.ptr(), &p) || !read(gradient.ptr(), &g) ||
        !fits(entry, p) || !fits(entry, g) || !same_strides(entry.shape, p.strides, entry.strides.data()) ||
        !entry.state.unchanged() || !read(entry.momentum.ptr(), &m) || m.data != entry.record.momentum)
      return false;
    PyObject* arguments[] = {gradient.ptr()};
    const py::object negated =
        py::reinterpret_steal<py::object>(PyObject_Vectorcall(is_negated_.ptr(), arguments, 1, nullptr));
    if (!negated) throw py::error_already_set();
    if (negated.ptr() != Py_False) return false;
    if (is_empty(entry.shape)) {
      active_.push_back(&entry);
      continue;
    }

    const int64_t* grad_strides = nullptr;
    if (!same_strides(entry.shape, g.strides, entry.dense_strides.data())) {
      for (size_t i = 0; i < entry.order.size(); ++i) entry.grad_strides[i] = g.strides[entry.order[i]];
      grad_strides = entry.grad_strides.data();
    }
    const Record& r = entry.record;
    scalars_.push_back({lrs[entry.group], weight_decays[entry.group], grad_scale, *entry.step});
    const View param{static_cast<char*>(p.data) + p.byte_offset,
                     entry.memory_strides.empty() ? nullptr : entry.memory_strides.data()};
    const View grad{static_cast<char*>(g.data) + g.byte_offset, grad_strides};
    tensors_.push_back({r.dtype, r.loops, int32_t(r.sizes.size()), r.sizes.data(), param, grad, param, true,
                        r.momentum, r.second_moment, r.row, r.column, r.mean_squares, theta_[int(r.dtype)],
                        nullptr, clip ? 0 : -1, r.momentum_stride});
    active_.push_back(&entry);
    gradients_.push_back(std::move(gradient));
  }
  for (size_t i = 0; i < tensors_.size(); ++i) tensors_[i].scalars = &scalars_[i];
  return true;
}

py::object Plan::step(py::list parameter_lists, py::dict state, const std::vector<double>& lrs,
                      const std::vector<double>& weight_decays, double grad_scale, py::object max_grad_norm,
                      int threads) {
  const bool clip = !max_grad_norm.is_none();
  const double max_norm = clip ? max_grad_norm.cast<double>() : 0.0;
  if (lrs.size() != parameter_lists.size() || weight_decays.size() != parameter_lists.size())
    throw std::invalid_argument("one learning rate and one weight decay are needed for each group");
  if (running_.exchange(true))
    throw std::runtime_error(
        "another thread is in step() of this optimizer: give each thread its own optimizer");
  struct Finish {
    Plan* plan;
    ~Finish() {
      plan->tensors_.clear();
      plan->scalars_.clear();
      plan->active_.clear();
      plan->gradients_.clear();
      plan->running_ = false;
    }
  } finish{this};

  if (state.ptr() != state_.dict() || !state_.unchanged()) return py::none();
  if (!collect(parameter_lists, lrs, weight_decays, grad_scale, clip)) return py::none();
  if (!tensors_.empty()) {
    py::gil_scoped_release release;
    small_fc_step(spec_, tensors_.data(), int64_t(tensors_.size()), &max_norm, clip ? 1 : 0,
                  openmp_pool(threads));
  }
  py::list updated(active_.size());
  for (size_t i = 0; i < active_.size(); ++i) {
    ++*active_[i]->step;
    PyList_SET_ITEM(updated.ptr(), Py_ssize_t(i), active_[i]->parameter.inc_ref().ptr());
  }
  return updated;
}

int Plan::traverse(visitproc visit, void* arg) const {
  if (const int stop = state_.traverse(visit, arg)) return stop;
  Py_VISIT(is_negated_.ptr());
  for (const Entry& entry : entries_) {
    Py_VISIT(entry.parameter.ptr());
    Py_VISIT(entry.momentum.ptr());
    Py_VISIT(entry.memory.ptr());
    if (const int stop = entry.state.traverse(visit, arg)) return stop;
  }
  return 0;
}

void Plan::clear() {
  std::vector<Entry> entries = std::move(entries_);  // freeing them may run any Python code
  Snapshot state = std::move(state_);
}

void bind_plan(py::module_& m) {
  const auto collectable = [](PyHeapTypeObject* heap_type) {
    PyTypeObject* type = &heap_type->ht_type;
    type->tp_flags |= Py_TPFLAGS_HAVE_GC;
    type->tp_traverse = [](PyObject* self, visitproc visit, void* arg) {
      Py_VISIT(Py_TYPE(self));
      return py::detail::is_holder_constructed(self) ? py::cast<Plan&>(py::handle(self)).traverse(visit, arg)
                                                     : 0;
    };
    type->tp_clear = [](PyObject* self) {
      if (py::detail::is_holder_constructed(self)) py::cast<Plan&>(py::handle(self)).clear();
      return 0;
    };
  };
  py::class_<Plan>(m, "Plan", py::custom_type_setup(collectable))
      .def(py::init<const Spec&, uintptr_t, uintptr_t, py::dict, py::capsule, py::object>(), py::kw_only(),
           py::arg("spec"), py::arg("theta_float32"), py::arg("theta_float64"), py::arg("state"),
           py::arg("exchange"), py::arg("is_negated"))
      .def("add", &Plan::add, py::kw_only(), py::arg("parameter"), py::arg("group"), py::arg("record"),
           py::arg("order"), py::arg("state"), py::arg("memory"), py::arg("step"))
      .def("add_idle", &Plan::add_idle, py::arg("parameter"), py::arg("group"))
      .def("add_foreign", &Plan::add_foreign, py::arg("parameter"), py::arg("group"))
      .def("step", &Plan::step, py::arg("parameter_lists"), py::arg("state"), py::arg("lrs"),
           py::arg("weight_decays"), py::arg("grad_scale"), py::arg("max_grad_norm"), py::arg("threads"));
}

}  // namespace lopt
