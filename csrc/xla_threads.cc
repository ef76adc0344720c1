#include "csrc/xla_threads.h"

#include <atomic>
#include <exception>
#include <thread>

#include "csrc/job.h"

namespace lopt::xla {
namespace {

// It outlives the call that made it: a helper that XLA starts late finds the counter exhausted, touches
// nothing else and leaves.
struct SharedJob {
  Job job;
  std::atomic<int64_t> done{0}, references{1};

  void drain() { done.fetch_add(job.drain(), std::memory_order_release); }
  void release() {
    if (references.fetch_sub(1, std::memory_order_acq_rel) == 1) delete this;
  }
};

void run_helper(void* data) {
  SharedJob* shared = static_cast<SharedJob*>(data);
  shared->drain();
  shared->release();
}

}  // namespace

Threads::Threads(const CallFrame& frame) : api_(frame.api), context_(frame.context), count_(1) {
  NumThreads query{sizeof(NumThreads), nullptr, context_, &count_};
  if (!succeeded(api_->num_threads(&query)) || count_ < 1) count_ = 1;
}

bool Threads::succeeded(Error* error) const {
  if (error == nullptr) return true;
  ErrorDestroy destroy{sizeof(ErrorDestroy), nullptr, error};
  api_->error_destroy(&destroy);
  return false;
}

void Threads::run(int64_t tasks, void (*fn)(void*, int64_t), void* argument) const {
  const int64_t helpers = (tasks < count_ ? tasks : count_) - 1;
  if (helpers < 1) {
    for (int64_t i = 0; i < tasks; ++i) fn(argument, i);
    return;
  }
  SharedJob* shared = new SharedJob{{fn, argument, tasks}};
  for (int64_t i = 0; i < helpers; ++i) {
    shared->references.fetch_add(1, std::memory_order_relaxed);
    Schedule schedule{sizeof(Schedule), nullptr, context_, run_helper, shared};
    if (!succeeded(api_->schedule(&schedule))) {
      shared->release();
      break;
    }
  }
  shared->drain();
  // Every task has been taken. What is still missing runs on another thread at this moment, so waiting
  // cannot hang: a helper that has not started (all threads may be inside such calls) is never waited for.
  for (int spins = 0; shared->done.load(std::memory_order_acquire) < tasks; ++spins) {
    if (spins > 2000) std::this_thread::yield();
  }
  const std::exception_ptr error = shared->job.error;
  shared->release();
  if (error) std::rethrow_exception(error);
}

Pool Threads::pool() {
  return {this, [](void* self) { return static_cast<int32_t>(static_cast<Threads*>(self)->count_); },
          [](void* self, int64_t tasks, void (*fn)(void*, int64_t), void* argument) {
            static_cast<Threads*>(self)->run(tasks, fn, argument);
          }};
}

}  // namespace lopt::xla
