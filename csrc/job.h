// The tasks of one Pool::run, for the pools that spread them over threads.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>

namespace lopt {

// Taken by whoever comes. A task that throws does not end its thread: the others are skipped, and the caller
// of the run gets the exception once all threads have left.
struct Job {
  void (*fn)(void* argument, int64_t i);
  void* argument;
  int64_t tasks;
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error{};  // of the task that failed first; to be read when all threads have left

  // Returns how many tasks it took.
  int64_t drain() noexcept {
    int64_t taken = 0;
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks; ++taken) {
      if (failed.load(std::memory_order_relaxed)) continue;
      try {
        fn(argument, i);
      } catch (...) {
        if (!failed.exchange(true)) error = std::current_exception();
      }
    }
    return taken;
  }

  void rethrow() const {
    if (error) std::rethrow_exception(error);
  }
};

}  // namespace lopt
