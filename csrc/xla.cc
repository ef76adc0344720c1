// The XLA custom call on the CPU: runs the core on XLA's own threads.
#include "csrc/xla.h"

#include <atomic>
#include <cstring>
#include <exception>
#include <thread>
#include <vector>

#include "csrc/core.h"
#include "csrc/xla_call.h"

namespace lopt {
namespace {

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

// ---- The call ----

double real_at(const void* address, int32_t dtype) {
  return dtype == xla::kF64 ? *static_cast<const double*>(address)
                            : static_cast<double>(*static_cast<const float*>(address));
}

void small_fc_step_from(const xla::CallFrame& frame) {
  const xla::Call call = xla::decode(frame, /*with_scratch=*/false);
  std::vector<StepScalars> scalars(call.batch);
  std::vector<double> max_norms(call.clip ? call.batch : 0);
  for (int64_t b = 0; b < call.batch; ++b) {
    auto real = [&](int64_t k) { return real_at(call.scalar(b, k), call.scalar_dtype); };
    scalars[b] = {real(0), real(1), 1.0, reinterpret_cast<const int32_t*>(call.count)[b]};
    if (call.clip) max_norms[b] = real(2);
  }
  std::vector<Tensor> tensors;
  tensors.reserve(call.tensors.size());
  for (const xla::CallTensor& t : call.tensors) {
    tensors.push_back({t.dtype == xla::kF64 ? Dtype::float64 : Dtype::float32,
                       t.loops,
                       0,
                       nullptr,
                       {t.param, nullptr},
                       {t.grad, nullptr},
                       {t.output, nullptr},
                       call.apply,
                       t.momentum,
                       t.second_moment,
                       t.row,
                       t.column,
                       t.mean_squares,
                       t.theta,
                       &scalars[t.batch],
                       call.clip ? static_cast<int32_t>(t.batch) : -1,
                       0});
  }
  for (const xla::CallCopy& copy : call.copies) std::memcpy(copy.to, copy.from, copy.bytes);
  XlaThreads threads(frame);
  small_fc_step(call.spec, tensors.data(), static_cast<int64_t>(tensors.size()), max_norms.data(),
                static_cast<int32_t>(max_norms.size()), threads.pool());
}

xla::Error* handle(xla::CallFrame* frame) { return xla::respond(frame, 0, small_fc_step_from); }

}  // namespace

void* xla_small_fc_cpu_handler() { return reinterpret_cast<void*>(&handle); }

}  // namespace lopt
