// The steps of one PyTorch optimizer: everything that stays equal from step to step, checked cheaply at each.
#pragma once

#include <pybind11/pybind11.h>

#include <atomic>
#include <cstdint>
#include <string>
#include <vector>

#include "csrc/core.h"
#include "csrc/dlpack_abi.h"

namespace lopt {

// What does not change of one tensor: how it lies in memory, where its state is.
struct Record {
  Dtype dtype;
  Loops loops;
  std::vector<int64_t> sizes;  // memory order, outermost first
  void *momentum, *second_moment, *row, *column, *mean_squares;
  int64_t momentum_stride;
};

// Built by lopt_fast/torch/plan.py, which has checked everything in it. A step compares what it meets with
// what the plan was built for; where they differ it does nothing and says so, and Python looks closer: it
// raises the error or builds a new plan. So all messages are written in one place, and a step costs well
// under a microsecond per tensor.
class Plan {
 public:
  // `exchange` is torch.Tensor.__dlpack_c_exchange_api__, `is_negated` is torch.Tensor.is_neg: a lazily
  // negated gradient has the memory of another.
  Plan(const Spec& spec, uintptr_t theta_float32, uintptr_t theta_float64, pybind11::dict state,
       pybind11::capsule exchange, pybind11::object is_negated);

  // Parameters in the order of the optimizer's groups. `order`: axes from the outermost to the innermost in
  // memory. `state` is the parameter's dictionary; `memory` are the storages of the tensors in it, kept alive
  // with the plan.
  void add(pybind11::object parameter, size_t group, const Record& record, std::vector<int64_t> order,
           pybind11::dict state, pybind11::object memory, uintptr_t step);
  // A parameter that has had no gradient yet: when it gets one, the plan no longer fits.
  void add_idle(pybind11::object parameter, size_t group);
  // A parameter that this plan leaves to others.
  void add_foreign(pybind11::object parameter, size_t group);

  // One step over all parameters that have a gradient. Returns the list of these; None if the plan does not
  // fit what it met. In both that case and that of an exception nothing has been written.
  pybind11::object step(pybind11::list parameter_lists, pybind11::dict state, const std::vector<double>& lrs,
                        const std::vector<double>& weight_decays, double grad_scale,
                        pybind11::object max_grad_norm, int threads);

  // For Python's garbage collector: a hook of a parameter may hold the optimizer, which holds the plan.
  int traverse(visitproc visit, void* arg) const;
  void clear();

 private:
  // A dictionary and what it held when the plan was built.
  class Snapshot {
   public:
    Snapshot() = default;
    explicit Snapshot(pybind11::dict dict);
    bool unchanged() const;
    PyObject* dict() const { return dict_.ptr(); }
    int traverse(visitproc visit, void* arg) const;

   private:
    pybind11::dict dict_;
    std::vector<pybind11::object> items_;  // key, value, key, value, ...
  };
  enum class Role { planned, idle, foreign };
  struct Entry {
    pybind11::object parameter;
    size_t group = 0;
    Role role = Role::idle;
    Record record{};
    std::vector<int64_t> order, shape, strides;  // axes of the tensor
    std::vector<int64_t> memory_strides;         // of the parameter, in memory order; empty: dense
    std::vector<int64_t> dense_strides;          // axes of the tensor
    std::vector<int64_t> grad_strides;           // of this step's gradient, in memory order
    Snapshot state;
    pybind11::object
        momentum;  // its address is read at each step: state that was swapped through .data is noticed
    pybind11::object memory;
    int64_t* step = nullptr;
  };

  bool read(PyObject* object, DlTensor* tensor) const;
  bool fits(const Entry& entry, const DlTensor& tensor) const;
  // Whether the plan fits; fills tensors_, active_ and gradients_.
  bool collect(const pybind11::list& parameter_lists, const std::vector<double>& lrs,
               const std::vector<double>& weight_decays, double grad_scale, bool clip);

  Spec spec_;
  void* theta_[2];
  Snapshot state_;
  pybind11::capsule exchange_capsule_;
  const DlExchangeApi* exchange_;
  pybind11::object is_negated_;
  pybind11::str grad_name_;
  std::vector<Entry> entries_;
  std::atomic<bool> running_{false};

  // Of the step in progress.
  std::vector<Tensor> tensors_;
  std::vector<StepScalars> scalars_;
  std::vector<Entry*> active_;
  std::vector<pybind11::object> gradients_;
};

void bind_plan(pybind11::module_& m);

}  // namespace lopt
