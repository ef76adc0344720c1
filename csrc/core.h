// Public interface of the core: raw pointers, no framework. Bindings only unwrap arguments and call these.
#pragma once

#include <cstdint>

namespace lopt {

enum class Dtype : int32_t { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3 };

// Mirrors lopt_fast.spec.Spec for the default feature set (39 columns, decays 3 / 1 / 3).
struct Spec {
  int32_t hidden_size;    // 2 to 256
  int32_t hidden_layers;  // 1 or 2
  double step_mult;
  double exp_mult;
  bool parameter_rms;  // multiply the step by sqrt(mean p^2 + scale_epsilon)
  double scale_epsilon;
  bool lagged;  // statistics of the step before (but for the first step), columns clipped
};

// Mirrors lopt_fast.layout.Loops: the tensor in memory order as [batch0, x, batch1, y, batch2].
struct Loops {
  int64_t batch0, x, batch1, y, batch2;
  bool x_is_row;
  bool factored;
};

// Numbers that change from step to step.
struct StepScalars {
  double lr;
  double weight_decay;
  double grad_scale;  // multiplies the gradient first
  int64_t t;          // steps taken before this one
};

// A parameter, gradient or output. `strides` has one entry (in elements) for each axis of Tensor::sizes; null
// where the elements lie contiguous in loop order. `dtype`: that of the tensor, or with float32 arithmetic
// bfloat16 or float16 as well, which results are rounded to (to nearest even). Each view has its own.
struct View {
  void* data;
  const int64_t* strides;
  Dtype dtype;
};

// One tensor of a step. State is contiguous in loop order, the decays outermost:
//   momentum (3, n), momentum_stride elements apart, second_moment (1, n),
//   row (3, n / d0 size) and column (3, n / d1 size); where not factored, row is (3, n) and column is unused,
//   mean_squares (28): lagged statistics alone, else null.
struct Tensor {
  Dtype dtype;  // of arithmetic, state and meta-parameters: float32 or float64
  Loops loops;
  int32_t ndim;          // axes in memory order, outermost first; needed where a View has strides
  const int64_t* sizes;  // (ndim)
  View param;
  View grad;
  View output;  // may be the parameter itself
  bool apply;   // output = p - lr * (step + weight_decay * p); else output = -lr * (step + weight_decay * p)
  void* momentum;
  void* second_moment;
  void* row;
  void* column;
  void* mean_squares;
  const void* theta;  // flat meta-parameters, order of lopt_fast.reference.flatten_theta, of type `dtype`
  const StepScalars* scalars;
  int32_t clip_group;       // index into max_norms; -1: not clipped
  int64_t momentum_stride;  // elements from one momentum to the next; 0: n
};

// Runs fn(argument, i) for every i in [0, tasks), in any order, on any threads, `threads` of them at most,
// and returns when all are done. If one throws, the caller gets the first exception, once no other is
// running.
struct Pool {
  void* context;
  int32_t (*threads)(void* context);
  void (*run)(void* context, int64_t tasks, void (*fn)(void* argument, int64_t i), void* argument);
};

Pool serial_pool();          // the calling thread alone
Pool own_pool(int threads);  // std::thread workers, started at first use; threads <= 0: all processors
// libgomp that the process has already loaded (PyTorch's); falls back to own_pool where there is none.
Pool openmp_pool(int threads);
// "serial", "own" or "openmp"; throws std::invalid_argument for another name.
Pool named_pool(const char* name, int threads);

// Seconds that a step spent in each pass: wall time where a pass runs on all threads, else the sum over the
// threads divided by their number.
struct PassTimes {
  double factor_statistics, feature_statistics, apply;
};

// One step over all tensors: bitwise the same for any pool. `max_norms` (clip_groups): gradients of the
// tensors of group i are scaled by min(1, max_norms[i] / (norm + 1e-6)), norm over all of them together,
// after grad_scale. `times`: where the times of the passes are added; null: not taken. Throws
// std::invalid_argument if a value is out of range and std::bad_alloc, both before anything is written.
void small_fc_step(const Spec& spec, const Tensor* tensors, int64_t count, const double* max_norms,
                   int32_t clip_groups, const Pool& pool, PassTimes* times = nullptr);

// ---- a step over parts of tensors ----

// Where one tensor lies in several places (devices, processes), each holds a part of it and the whole of its
// row, column and mean squares; and a step is a sequence of phases, the same in all places. What a phase
// gives is added up over all of them (an all-reduce) before the next phase takes it.
//   exact:  factor_sums, + , feature_sums, + , apply
//   lagged: apply, + , finish; at the first step factor_sums, + , feature_sums, + before them
enum class PartPhase : int32_t {
  factor_sums,   // gives `factors`
  feature_sums,  // takes `factors`, gives `squares`
  apply,         // takes both (lagged: at the first step alone), writes output and state; lagged: gives both
  finish,        // lagged: takes both, for the state of the next step
};

// The elements [begin, begin + sizes) of a tensor of sizes `whole`; axes in memory order.
struct TensorPart {
  int32_t ndim;  // 1 to 64
  const int64_t *sizes, *whole, *begin;
  int32_t x_axis, y_axis;  // those of Tensor::loops
  int64_t copies;          // how many places hold this very part
};

// `tensor` describes the part: loops, views, momentum, second moment and, where the whole tensor is not
// factored, row. Row and column of a factored tensor and the mean squares are of the whole.
struct PartTensor {
  Tensor tensor;
  TensorPart part;
  double* factors;  // (part_sums): means of g^2, along x and then along y
  double* squares;  // (kPartSquares): mean squares of the features
};
constexpr int64_t kPartSquares = 22;

// Length of `factors`: elements of row and column; 0 where the tensor is not factored.
int64_t part_sums(const TensorPart& part, bool factored);

// One phase over all tensors: bitwise the same for any pool. The gradient is scaled by
// StepScalars::grad_scale alone: tensors are in no clip group. Throws as small_fc_step does.
void small_fc_phase(const Spec& spec, PartPhase phase, const PartTensor* tensors, int64_t count,
                    const Pool& pool);

// Number of meta-parameters that `theta` holds for this specification.
int64_t theta_size(const Spec& spec);

// "x86-64-v4", "x86-64-v3", "x86-64-v2" or "portable": what is in use, and a way to force one (tests, bench).
// Throws std::invalid_argument for a name that this processor or this build does not have.
const char* instruction_set();
void set_instruction_set(const char* name);
const char* const* available_instruction_sets();  // null-terminated, best first

}  // namespace lopt
