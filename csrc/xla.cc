// XLA custom call of `small_fc_step`: unwraps operands and attributes, runs the core on XLA's own threads.
//
// One call updates a whole pytree. lopt_fast/jax/call.py writes it:
//
//   operands: count (s32); scalars (3: learning rate, weight decay, max_norm); `thetas` flat arrays of
//       meta-parameters of different types; `buffers` state buffers; each leaf's parameter; each leaf's
//       gradient
//   results: the state buffers (aliased to the operands); each leaf's output
//   attributes, all of them arrays:
//       call (s64): format, thetas, leaves, hidden_size, hidden_layers, parameter_rms, lagged, clip, apply
//       reals (f64): step_mult, exp_mult, scale_epsilon
//       sizes (s64): elements of each state buffer
//       leaves (s64, 17 for each leaf): the seven numbers of lopt_fast.layout.Loops, then (buffer, offset) of
//           momentum, second moment, row, column and mean squares; buffer -1 where a leaf has none
//
// Under vmap every operand and result has the same leading batch dimensions. Those of the meta-parameters,
// whose own rank is 1, tell how many there are; the sizes of everything else are checked against them.

#include "csrc/xla.h"

#include <atomic>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "csrc/core.h"
#include "csrc/xla_abi.h"

namespace lopt {
namespace {

constexpr int64_t kFormat = 1;
constexpr int64_t kCallFields = 9, kRealFields = 3, kLeafFields = 17, kScalarFields = 3;

void require(bool condition, const char* what) {
  if (!condition) throw std::invalid_argument(what);
}

// ---- XLA's intra-op thread pool ----

// Tasks of one Pool::run, drained by whoever comes. It outlives the call that made it: a helper that XLA
// starts late finds the counter exhausted, touches nothing else and leaves.
struct Job {
  std::atomic<int64_t> next{0}, done{0}, references{1};
  std::atomic<bool> failed{false};
  std::exception_ptr error;  // of the first task that failed; to be read when all are done
  int64_t tasks;
  void (*fn)(void*, int64_t);
  void* argument;

  void drain() {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
      try {
        fn(argument, i);
      } catch (...) {
        if (!failed.exchange(true)) error = std::current_exception();
      }
      done.fetch_add(1, std::memory_order_release);
    }
  }
  void release() {
    if (references.fetch_sub(1, std::memory_order_acq_rel) == 1) delete this;
  }
};

void run_helper(void* data) {
  Job* job = static_cast<Job*>(data);
  job->drain();
  job->release();
}

struct XlaThreads {
  const xla::Api* api;
  xla::Context* context;
  int64_t count;

  explicit XlaThreads(const xla::CallFrame& frame) : api(frame.api), context(frame.context), count(1) {
    xla::NumThreads query{sizeof(xla::NumThreads), nullptr, context, &count};
    if (!succeeded(api->num_threads(&query)) || count < 1) count = 1;
  }

  bool succeeded(xla::Error* error) const {
    if (error == nullptr) return true;
    xla::ErrorDestroy destroy{sizeof(xla::ErrorDestroy), nullptr, error};
    api->error_destroy(&destroy);
    return false;
  }

  void run(int64_t tasks, void (*fn)(void*, int64_t), void* argument) const {
    const int64_t helpers = (tasks < count ? tasks : count) - 1;
    if (helpers < 1) {
      for (int64_t i = 0; i < tasks; ++i) fn(argument, i);
      return;
    }
    Job* job = new Job;
    job->tasks = tasks;
    job->fn = fn;
    job->argument = argument;
    for (int64_t i = 0; i < helpers; ++i) {
      job->references.fetch_add(1, std::memory_order_relaxed);
      xla::Schedule schedule{sizeof(xla::Schedule), nullptr, context, run_helper, job};
      if (!succeeded(api->schedule(&schedule))) {
        job->release();
        break;
      }
    }
    job->drain();
    // Every task has been taken. What is still missing runs on another thread at this moment, so waiting
    // cannot hang: a helper that has not started (all threads may be inside such calls) is never waited for.
    for (int spins = 0; job->done.load(std::memory_order_acquire) < tasks; ++spins) {
      if (spins > 2000) std::this_thread::yield();
    }
    const std::exception_ptr error = job->error;
    job->release();
    if (error) std::rethrow_exception(error);
  }

  Pool pool() {
    return {this, [](void* self) { return static_cast<int32_t>(static_cast<XlaThreads*>(self)->count); },
            [](void* self, int64_t tasks, void (*fn)(void*, int64_t), void* argument) {
              static_cast<XlaThreads*>(self)->run(tasks, fn, argument);
            }};
  }
};

// ---- Decoding ----

const xla::Array& attribute(const xla::CallFrame& frame, const char* name, int32_t dtype) {
  for (int64_t i = 0; i < frame.attributes.size; ++i) {
    const xla::ByteSpan& found = *frame.attributes.names[i];
    if (found.size != std::strlen(name) || std::memcmp(found.data, name, found.size) != 0) continue;
    require(frame.attributes.types[i] == xla::kArrayAttribute, "an attribute is not an array");
    const auto& array = *static_cast<const xla::Array*>(frame.attributes.values[i]);
    require(array.dtype == dtype, "an attribute has the wrong type");
    return array;
  }
  throw std::invalid_argument(std::string("attribute missing: ") + name);
}

Dtype dtype_of(const xla::Buffer& buffer) {
  require(buffer.dtype == xla::kF32 || buffer.dtype == xla::kF64,
          "an operand is neither float32 nor float64");
  return buffer.dtype == xla::kF32 ? Dtype::float32 : Dtype::float64;
}

size_t bytes_of(const xla::Buffer& buffer) { return buffer.dtype == xla::kF64 ? 8 : 4; }

double real_at(const xla::Buffer& buffer, int64_t i) {
  return buffer.dtype == xla::kF64 ? static_cast<const double*>(buffer.data)[i]
                                   : static_cast<double>(static_cast<const float*>(buffer.data)[i]);
}

// The batch dimensions that vmap has put before every operand and result.
struct Batch {
  int64_t rank, size;
  const int64_t* dims;

  explicit Batch(const xla::Buffer& theta) : rank(theta.rank - 1), size(1), dims(theta.dims) {
    require(theta.rank >= 1, "meta-parameters must have rank 1 or more");
    for (int64_t i = 0; i < rank; ++i) size *= dims[i];
  }

  // The buffer, which must hold `elements` of them for each batch element.
  const xla::Buffer& check(const xla::Buffer& buffer, int64_t elements) const {
    require(buffer.rank >= rank, "an operand lacks batch dimensions");
    int64_t own = 1;
    for (int64_t i = 0; i < buffer.rank; ++i) {
      if (i < rank) require(buffer.dims[i] == dims[i], "batch dimensions differ between operands");
      if (i >= rank) own *= buffer.dims[i];
    }
    require(own == elements, "an operand has the wrong size");
    return buffer;
  }
};

struct Slot {
  int64_t buffer, offset;
};

void small_fc_step_from(const xla::CallFrame& frame) {
  const xla::Array& call = attribute(frame, "call", xla::kS64);
  const xla::Array& reals = attribute(frame, "reals", xla::kF64);
  const xla::Array& sizes = attribute(frame, "sizes", xla::kS64);
  const xla::Array& table = attribute(frame, "leaves", xla::kS64);
  const auto* c = static_cast<const int64_t*>(call.data);
  const auto* r = static_cast<const double*>(reals.data);
  require(call.size == kCallFields && reals.size == kRealFields && c[0] == kFormat,
          "this call was written for another version of lopt_fast");
  const int64_t thetas = c[1], leaves = c[2], buffers = static_cast<int64_t>(sizes.size);
  require(thetas >= 1 && leaves >= 0 && table.size == static_cast<size_t>(leaves * kLeafFields),
          "the table of leaves has the wrong size");
  require(frame.operands.size == 2 + thetas + buffers + 2 * leaves && frame.results.size == buffers + leaves,
          "wrong number of operands or results");
  const Spec spec{
      static_cast<int32_t>(c[3]), static_cast<int32_t>(c[4]), r[0], r[1], c[5] != 0, r[2], c[6] != 0};
  const bool clip = c[7] != 0, apply = c[8] != 0;

  auto operand = [&](int64_t i) -> const xla::Buffer& {
    return *static_cast<const xla::Buffer*>(frame.operands.values[i]);
  };
  auto result = [&](int64_t i) -> const xla::Buffer& {
    return *static_cast<const xla::Buffer*>(frame.results.values[i]);
  };

  const Batch batch(operand(2));
  const xla::Buffer& count = batch.check(operand(0), 1);
  const xla::Buffer& numbers = batch.check(operand(1), kScalarFields);
  require(count.dtype == xla::kS32, "count is not int32");
  dtype_of(numbers);
  const int64_t meta_parameters = theta_size(spec);
  for (int64_t i = 0; i < thetas; ++i) dtype_of(batch.check(operand(2 + i), meta_parameters));
  const int64_t* size_of = static_cast<const int64_t*>(sizes.data);
  const int64_t first_state = 2 + thetas, first_param = first_state + buffers,
                first_grad = first_param + leaves;
  for (int64_t i = 0; i < buffers; ++i) {
    dtype_of(batch.check(operand(first_state + i), size_of[i]));
    require(batch.check(result(i), size_of[i]).dtype == operand(first_state + i).dtype,
            "state changes its type");
  }
  if (batch.size == 0) return;

  std::vector<StepScalars> scalars(batch.size);
  std::vector<double> max_norms(clip ? batch.size : 0);
  for (int64_t b = 0; b < batch.size; ++b) {
    scalars[b] = {real_at(numbers, b * kScalarFields), real_at(numbers, b * kScalarFields + 1), 1.0,
                  static_cast<const int32_t*>(count.data)[b]};
    if (clip) max_norms[b] = real_at(numbers, b * kScalarFields + 2);
  }

  std::vector<Tensor> tensors(batch.size * leaves);
  for (int64_t leaf = 0; leaf < leaves; ++leaf) {
    const int64_t* f = static_cast<const int64_t*>(table.data) + leaf * kLeafFields;
    const Loops loops{f[0], f[1], f[2], f[3], f[4], f[5] != 0, f[6] != 0};
    const int64_t n = loops.batch0 * loops.x * loops.batch1 * loops.y * loops.batch2;
    const xla::Buffer& param = batch.check(operand(first_param + leaf), n);
    const xla::Buffer& grad = batch.check(operand(first_grad + leaf), n);
    const xla::Buffer& output = batch.check(result(buffers + leaf), n);
    const Dtype dtype = dtype_of(param);
    const size_t bytes = bytes_of(param);
    require(grad.dtype == param.dtype && output.dtype == param.dtype,
            "a gradient's type is not its parameter's");
    int64_t theta = 0;
    while (theta < thetas && operand(2 + theta).dtype != param.dtype) ++theta;
    require(theta < thetas, "no meta-parameters of a parameter's type");

    const int64_t d1 = loops.x_is_row ? loops.x : loops.y, d0 = loops.x_is_row ? loops.y : loops.x;
    const int64_t slot_sizes[5] = {3 * n, n, loops.factored ? (d0 ? 3 * n / d0 : 0) : 3 * n,
                                   loops.factored ? (d1 ? 3 * n / d1 : 0) : 0, spec.lagged ? 28 : 0};
    char* slots[5];
    size_t slot_strides[5];
    for (int k = 0; k < 5; ++k) {
      const Slot slot{f[7 + 2 * k], f[8 + 2 * k]};
      slots[k] = nullptr;
      slot_strides[k] = 0;
      if (slot_sizes[k] == 0) continue;
      require(slot.buffer >= 0 && slot.buffer < buffers && slot.offset >= 0 &&
                  slot.offset <= size_of[slot.buffer] - slot_sizes[k],
              "a leaf's state lies outside its buffer");
      const xla::Buffer& buffer = result(slot.buffer);
      require(buffer.dtype == param.dtype, "a leaf's state is of another type");
      slots[k] = static_cast<char*>(buffer.data) + slot.offset * bytes;
      slot_strides[k] = size_of[slot.buffer] * bytes;
    }

    for (int64_t b = 0; b < batch.size; ++b) {
      auto at = [&](const xla::Buffer& buffer, int64_t elements) {
        return View{static_cast<char*>(buffer.data) + b * elements * bytes, nullptr};
      };
      auto state = [&](int k) -> void* { return slots[k] ? slots[k] + b * slot_strides[k] : nullptr; };
      Tensor& tensor = tensors[b * leaves + leaf];
      tensor.dtype = dtype;
      tensor.loops = loops;
      tensor.ndim = 0;
      tensor.sizes = nullptr;
      tensor.param = at(param, n);
      tensor.grad = at(grad, n);
      tensor.output = at(output, n);
      tensor.apply = apply;
      tensor.momentum = state(0);
      tensor.second_moment = state(1);
      tensor.row = state(2);
      tensor.column = state(3);
      tensor.mean_squares = state(4);
      tensor.theta = at(operand(2 + theta), meta_parameters).data;
      tensor.scalars = &scalars[b];
      tensor.clip_group = clip ? static_cast<int32_t>(b) : -1;
    }
  }

  for (int64_t i = 0; i < buffers; ++i) {  // in place: XLA has aliased, or else copied, the state
    const xla::Buffer& from = operand(first_state + i);
    if (from.data == result(i).data) continue;
    std::memcpy(result(i).data, from.data, batch.size * size_of[i] * bytes_of(from));
  }
  XlaThreads threads(frame);
  small_fc_step(spec, tensors.data(), static_cast<int64_t>(tensors.size()), clip ? max_norms.data() : nullptr,
                clip ? static_cast<int32_t>(batch.size) : 0, threads.pool());
}

xla::Error* fail(const xla::Api* api, int32_t code, const char* what) {
  const std::string message = std::string("lopt_fast small_fc_step: ") + what;
  xla::ErrorCreate create{sizeof(xla::ErrorCreate), nullptr, message.c_str(), code};
  return api->error_create(&create);
}

xla::Error* handle(xla::CallFrame* frame) {
  // Asked for metadata: claim the version of the runtime that asks, since the part of it used here never
  // changed.
  for (xla::Extension* e = frame->extensions; e != nullptr; e = e->next) {
    if (e->type != xla::kMetadataExtension) continue;
    xla::Metadata* metadata = reinterpret_cast<xla::MetadataExtension*>(e)->metadata;
    metadata->version.major = 0;
    metadata->version.minor = frame->api ? frame->api->version.minor : 1;
    metadata->traits = 0;
    return nullptr;
  }
  if (frame->stage != xla::kExecute) return nullptr;
  try {
    small_fc_step_from(*frame);
  } catch (const std::invalid_argument& error) {
    return fail(frame->api, xla::kInvalidArgument, error.what());
  } catch (const std::exception& error) {
    return fail(frame->api, xla::kInternal, error.what());
  } catch (...) {
    return fail(frame->api, xla::kInternal, "unknown error");
  }
  return nullptr;
}

}  // namespace

void* xla_small_fc_handler() { return reinterpret_cast<void*>(&handle); }

}  // namespace lopt
