// The steps of one PyTorch optimizer: everything that stays equal from step to step, checked cheaply at each.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "csrc/core.h"
#include "csrc/dlpack_abi.h"
#include "csrc/gpu.h"

namespace lopt {

// What does not change of one tensor: how it lies in memory, where its state is.
struct Record {
  Dtype dtype;  // of the arithmetic; with the CPU kernels of everything in memory as well
  Loops loops;
  std::vector<int64_t> sizes;  // memory order, outermost first
  void *momentum, *second_moment, *row, *column, *mean_squares;
  int64_t momentum_stride;
};

// Built by lopt_fast/torch/plan.py, which has checked everything in it. A step compares what it meets with
// what the plan was built for; where they differ it does nothing and says so, and Python looks closer: it
// raises the error or builds a new plan. So all messages are written in one place, and a step costs well
// under a microsecond per tensor.
//
// A plan is the share of one device and backend. A step is begin(), the run() of the derived class, end(); so
// that with several shares all of them begin, and nothing has been written if one does not fit.
class PlanBase {
 public:
  // `exchange` is torch.Tensor.__dlpack_c_exchange_api__, `is_negated` is torch.Tensor.is_neg: a lazily
  // negated gradient has the memory of another.
  PlanBase(const Spec& spec, pybind11::dict state, pybind11::capsule exchange, pybind11::object is_negated);
  virtual ~PlanBase() = default;
  PlanBase(const PlanBase&) = delete;
  PlanBase& operator=(const PlanBase&) = delete;

  // Parameters in the order of the optimizer's groups. `order`: axes from the outermost to the innermost in
  // memory. `state` is the parameter's dictionary; `memory` are the storages of the tensors in it, kept alive
  // with the plan. `state_type`: of momentum and second moment.
  void add(pybind11::object parameter, size_t group, const Record& record, std::vector<int64_t> order,
           pybind11::dict state, pybind11::object memory, uintptr_t step, Storage state_type);
  // A parameter that has had no gradient yet: when it gets one, the plan no longer fits.
  void add_idle(pybind11::object parameter, size_t group);
  // A parameter that this plan leaves to others.
  void add_foreign(pybind11::object parameter, size_t group);

  // Collects all parameters that have a gradient. False if the plan does not fit what it met; then, and after
  // an exception, there is nothing to end. One thread at a time may be between begin() and end(): the
  // optimizer sees to that.
  bool begin(const pybind11::list& parameter_lists, const pybind11::dict& state);
  void end();

  // For Python's garbage collector: a hook of a parameter may hold the optimizer, which holds the plan.
  virtual int traverse(visitproc visit, void* arg) const;
  virtual void clear();

 protected:
  // A dictionary and what it held when the plan was built.
  class Snapshot {
   public:
    Snapshot() = default;
    explicit Snapshot(pybind11::dict dict);
    bool unchanged() const;
    PyObject* dict() const { return dict_.ptr(); }
    size_t size() const { return items_.size() / 2; }
    PyObject* value(size_t i) const { return items_[2 * i + 1].ptr(); }
    int traverse(visitproc visit, void* arg) const;

   private:
    pybind11::dict dict_;
    std::vector<pybind11::object> items_;  // key, value, key, value, ...
  };
  // How a tensor lies in memory.
  struct Layout {
    int32_t device_type = 0, device_id = 0;
    uint8_t type_code = 0, type_bits = 0;
    std::vector<int64_t> shape, strides;  // axes of the tensor

    Layout() = default;
    explicit Layout(const DlTensor& tensor);
    bool fits(const DlTensor& tensor) const;  // all but strides
    bool empty() const;
  };
  // Where a tensor of the state lies, and how: what was swapped through .data, or freed, is noticed.
  struct Place {
    void* address;
    int32_t ndim;
    uint8_t type_code, type_bits;
    std::vector<int64_t> sizes;  // shape, then strides

    explicit Place(const DlTensor& tensor);
    bool is(const DlTensor& tensor) const;
  };
  enum class Role { planned, idle, foreign };
  struct Entry {
    pybind11::object parameter;
    size_t group = 0;
    Role role = Role::idle;
    Record record{};
    Storage state_type = Storage::float32;
    Layout layout;                        // of the parameter
    std::vector<int64_t> order;           // axes of the tensor
    std::vector<int64_t> memory_strides;  // of the parameter, in memory order; empty: dense
    std::vector<int64_t> dense_strides;   // axes of the tensor
    std::vector<int64_t> grad_strides;    // of this step's gradient, in memory order
    Snapshot state;
    std::vector<Place> places;  // of the tensors in `state`, in its order
    pybind11::object memory;
    int64_t* step = nullptr;
  };

  // One parameter of the step: all that is needed of `p` and `g` is read here.
  virtual void take(Entry& entry, const DlTensor& p, const DlTensor& g, pybind11::object gradient) = 0;
  // Forgets what take() has collected.
  virtual void forget() = 0;
  bool read(PyObject* object, DlTensor* tensor) const;
  pybind11::list updated() const;

  Spec spec_;
  std::vector<Entry*> active_;  // in the step in progress

 private:
  bool collect(const pybind11::list& parameter_lists);
  bool fits(const Entry& entry, const DlTensor& p, const DlTensor& g) const;

  Snapshot state_;
  pybind11::capsule exchange_capsule_;
  const DlExchangeApi* exchange_;
  pybind11::object is_negated_;
  pybind11::str grad_name_;
  std::vector<Entry> entries_;
};

// The share of the CPU kernels.
class Plan final : public PlanBase {
 public:
  Plan(const Spec& spec, uintptr_t theta_float32, uintptr_t theta_float64, pybind11::dict state,
       pybind11::capsule exchange, pybind11::object is_negated);

  // The step that begin() collected. Returns the list of its parameters.
  pybind11::list run(const std::vector<double>& lrs, const std::vector<double>& weight_decays,
                     double grad_scale, std::optional<double> max_grad_norm, int threads);

 private:
  void take(Entry& entry, const DlTensor& p, const DlTensor& g, pybind11::object gradient) override;
  void forget() override;

  void* theta_[2];
  // Of the step in progress.
  std::vector<Tensor> tensors_;
  std::vector<StepScalars> scalars_;
  std::vector<size_t> groups_;
  std::vector<pybind11::object> gradients_;
};

// The share of one device with csrc/gpu.h.
class GpuPlan final : public PlanBase {
 public:
  // (value, address on the device or 0, its ScalarType)
  using Scalar = std::tuple<double, uintptr_t, int32_t>;

  // `device` holds a const GpuDevice*. `theta` lies on the device. `dense(tensor, strides)` returns a copy
  // with these strides, `copy(to, from)` writes one back: for parameters and gradients that do not lie in
  // memory as the kernels take them.
  GpuPlan(const Spec& spec, pybind11::capsule device, int32_t ordinal, uintptr_t theta, pybind11::dict state,
          pybind11::capsule exchange, pybind11::object is_negated, pybind11::object dense,
          pybind11::object copy);

  // Enqueues the step that begin() collected on `stream`; the device must be the current one. One of `lrs`
  // and `weight_decays` for each group. `found_inf`: address of a float on the device, or 0. `scratch(bytes)`
  // returns the address of that much device memory. Returns the list of the step's parameters.
  pybind11::list run(const std::vector<Scalar>& lrs, const std::vector<Scalar>& weight_decays,
                     const Scalar& grad_scale, bool divide, std::optional<Scalar> max_grad_norm,
                     uintptr_t found_inf, int32_t variant, int32_t schedule, const pybind11::object& scratch,
                     uintptr_t stream);

  int traverse(visitproc visit, void* arg) const override;

 private:
  void take(Entry& entry, const DlTensor& p, const DlTensor& g, pybind11::object gradient) override;
  void forget() override;
  // A copy of `tensor` that is dense in the entry's order, and its address.
  std::pair<pybind11::object, void*> dense(const Entry& entry, const pybind11::object& tensor) const;

  pybind11::capsule capsule_;
  const GpuDevice* device_;
  int32_t ordinal_;
  const float* theta_;
  pybind11::object dense_, copy_;
  // Of the step in progress.
  std::vector<GpuTensor> tensors_;
  std::vector<size_t> groups_;
  std::vector<pybind11::object> alive_;                                // gradients and copies of them
  std::vector<std::pair<pybind11::object, pybind11::object>> copied_;  // parameters and their copies
};

// The share of a backend that is written in Python: what begin() has checked.
class ListPlan final : public PlanBase {
 public:
  using PlanBase::PlanBase;
  // [(parameter, its gradient), ...]
  pybind11::list run() const;

 private:
  void take(Entry&, const DlTensor&, const DlTensor&, pybind11::object gradient) override {
    gradients_.push_back(std::move(gradient));
  }
  void forget() override { gradients_.clear(); }

  std::vector<pybind11::object> gradients_;  // of active_
};

void bind_plan(pybind11::module_& m);

}  // namespace lopt
