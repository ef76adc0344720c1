// The three pools of core.h. Everything they own is leaked on purpose: worker threads outlive static
// destruction.
//
// In all of them tasks are taken from an atomic counter, the caller takes part, and it never waits for a
// thread that has not started: a run ends when the tasks are done, whoever did them. A run that starts while
// its pool is busy (another thread's, or nested in a task) is done by its caller alone. A task that throws:
// csrc/job.h.

#include <dlfcn.h>
#include <pthread.h>
#include <signal.h>
#if defined(__linux__)
#include <link.h>
#endif

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstring>
#include <exception>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>

#include "csrc/core.h"
#include "csrc/job.h"

namespace lopt {
namespace {

using Task = void (*)(void* argument, int64_t i);

constexpr int kMaxThreads = 256;
constexpr int kSpins =
    1000;  // some 20 microseconds: passes of one step follow each other faster than a thread wakes

void pause_processor() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

int processors() { return std::clamp(int(std::thread::hardware_concurrency()), 1, kMaxThreads); }

void run_alone(int64_t tasks, Task fn, void* argument) {
  for (int64_t i = 0; i < tasks; ++i) fn(argument, i);
}

// ---- own_pool ----

// Worker threads and what they wait on. One job at a time, which lives on the stack of its caller: workers
// join it under the mutex while it is open, and the caller returns when it is closed and those that joined
// have left.
class Workers {
 public:
  explicit Workers(int count) : spins_(count < processors() ? kSpins : 0) {
    // Signals belong to the threads of the program.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    try {
      for (int i = 0; i < count; ++i) std::thread([this] { work(); }).detach();
    } catch (const std::exception&) {  // no more threads to be had: those that started do the work
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }

  void run(Job& job) noexcept {
    int asleep;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = &job;
      round_.fetch_add(1, std::memory_order_release);
      asleep = asleep_;
    }
    for (int64_t i = std::min<int64_t>(asleep, job.tasks - 1); i > 0; --i) wake_.notify_one();
    job.drain();
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = nullptr;
    }
    for (int i = 0; i < spins_ && joined_.load(std::memory_order_acquire) != 0; ++i) pause_processor();
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return joined_.load(std::memory_order_relaxed) == 0; });
  }

 private:
  void work() {
    uint64_t seen = 0;
    for (;;) {
      for (int i = 0; i < spins_ && round_.load(std::memory_order_acquire) == seen; ++i) pause_processor();
      Job* job;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        ++asleep_;
        wake_.wait(lock, [&] { return round_.load(std::memory_order_relaxed) != seen; });
        --asleep_;
        seen = round_.load(std::memory_order_relaxed);
        job = job_;
        if (!job) continue;
        joined_.fetch_add(1, std::memory_order_relaxed);
      }
      job->drain();
      std::lock_guard<std::mutex> lock(mutex_);
      if (joined_.fetch_sub(1, std::memory_order_release) == 1) done_.notify_one();
    }
  }

  const int spins_;
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  Job* job_ = nullptr;              // open to workers; guarded by mutex_
  int asleep_ = 0;                  // guarded by mutex_
  std::atomic<uint64_t> round_{0};  // number of jobs so far
  std::atomic<int> joined_{0};      // workers inside the job; written under mutex_
};

struct OwnPool {
  std::atomic<bool> busy{false};
  Workers* workers = nullptr;  // started by the first run; touched only while `busy` is held
};

OwnPool own_pools[kMaxThreads + 1];  // one for each number of threads

int32_t own_threads(void* context) { return int32_t(static_cast<OwnPool*>(context) - own_pools); }

// Of a fork: OpenMP's threads are gone as well, and libgomp would wait for them.
std::atomic<bool> in_child{false};

// In the child of a fork there are no workers, and the mutexes may be locked for ever: start afresh.
void after_fork_in_child() {
  for (OwnPool& pool : own_pools) {
    pool.workers = nullptr;
    pool.busy.store(false);
  }
  in_child.store(true);
}

// When the library is loaded, not at the first run: OpenMP's threads may be those of PyTorch alone until
// then.
__attribute__((constructor)) void handle_forks() { pthread_atfork(nullptr, nullptr, after_fork_in_child); }

void own_run(void* context, int64_t tasks, Task fn, void* argument) {
  OwnPool& pool = *static_cast<OwnPool*>(context);
  const int threads = own_threads(context);
  if (tasks <= 1 || threads <= 1 || pool.busy.exchange(true, std::memory_order_acquire)) {
    return run_alone(tasks, fn, argument);
  }
  const struct Release {
    std::atomic<bool>& busy;
    ~Release() { busy.store(false, std::memory_order_release); }
  } release{pool.busy};
  if (!pool.workers) pool.workers = new (std::nothrow) Workers(threads - 1);
  if (!pool.workers) return run_alone(tasks, fn, argument);
  Job job{fn, argument, tasks};
  pool.workers->run(job);
  job.rethrow();
}

// ---- openmp_pool ----

struct OpenMp {
  void (*parallel)(void (*fn)(void*), void* data, unsigned threads, unsigned flags);  // GOMP_parallel
  int (*max_threads)();
  int (*in_parallel)();
};

// Handle of PyTorch's libgomp: the one that is loaded as libgomp.so.1, or else one under a folder `torch...`
// (wheels may rename their copy). Other packages' private copies do not count: two thread pools would take
// turns, slowly.
void* loaded_libgomp() {
  if (void* handle = dlopen("libgomp.so.1", RTLD_NOLOAD | RTLD_LAZY)) return handle;
  std::string path;
#if defined(__linux__)
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* found) {
        const char* file = std::strrchr(info->dlpi_name, '/');
        if (!file || std::strncmp(file, "/libgomp", 8) != 0 || !std::strstr(info->dlpi_name, "/torch"))
          return 0;
        *static_cast<std::string*>(found) = info->dlpi_name;
        return 1;
      },
      &path);
#endif
  return path.empty() ? nullptr : dlopen(path.c_str(), RTLD_NOLOAD | RTLD_LAZY);
}

const OpenMp* find_openmp() {
  static std::atomic<const OpenMp*> known{nullptr};  // not a static of its value: it may be loaded later
  if (const OpenMp* openmp = known.load(std::memory_order_acquire)) return openmp;
  void* library = loaded_libgomp();
  if (!library) return nullptr;
  const OpenMp found{reinterpret_cast<decltype(OpenMp::parallel)>(dlsym(library, "GOMP_parallel")),
                     reinterpret_cast<decltype(OpenMp::max_threads)>(dlsym(library, "omp_get_max_threads")),
                     reinterpret_cast<decltype(OpenMp::in_parallel)>(dlsym(library, "omp_in_parallel"))};
  if (!found.parallel || !found.max_threads || !found.in_parallel) return nullptr;
  known.store(new OpenMp(found), std::memory_order_release);
  return known.load(std::memory_order_acquire);
}

// The context is the number of threads; 0: as many as OpenMP uses (torch.set_num_threads).
int32_t openmp_threads(void* context) {
  const int threads = int(reinterpret_cast<intptr_t>(context));
  return threads > 0 ? threads : find_openmp()->max_threads();
}

void openmp_run(void* context, int64_t tasks, Task fn, void* argument) {
  const OpenMp* openmp = find_openmp();
  const int threads = openmp_threads(context);
  if (tasks <= 1 || threads <= 1 || openmp->in_parallel()) return run_alone(tasks, fn, argument);
  if (in_child.load(std::memory_order_relaxed)) {
    const Pool own = own_pool(threads);
    return own.run(own.context, tasks, fn, argument);
  }
  Job job{fn, argument, tasks};
  // The whole team even for few tasks: libgomp ends the threads that a smaller team leaves over.
  openmp->parallel([](void* shared) { static_cast<Job*>(shared)->drain(); }, &job, unsigned(threads), 0);
  job.rethrow();
}

}  // namespace

Pool serial_pool() {
  return {nullptr, [](void*) -> int32_t { return 1; },
          [](void*, int64_t tasks, Task fn, void* argument) { run_alone(tasks, fn, argument); }};
}

Pool own_pool(int threads) {
  return {&own_pools[threads <= 0 ? processors() : std::min(threads, kMaxThreads)], own_threads, own_run};
}

Pool openmp_pool(int threads) {
  if (!find_openmp()) return own_pool(threads);
  return {reinterpret_cast<void*>(intptr_t(std::clamp(threads, 0, kMaxThreads))), openmp_threads, openmp_run};
}

Pool named_pool(const char* name, int threads) {
  const std::string pool = name;
  if (pool == "serial") return serial_pool();
  if (pool == "own") return own_pool(threads);
  if (pool == "openmp") return openmp_pool(threads);
  throw std::invalid_argument("pool " + pool + ": must be serial, own or openmp");
}

}  // namespace lopt
