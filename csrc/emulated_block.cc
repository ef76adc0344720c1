#include "csrc/emulated_block.h"

#include <cstring>
#include <memory>
#include <vector>

#if defined(__linux__) && defined(__GLIBC__)
#include <sys/mman.h>
#include <ucontext.h>
#define LOPT_OWN_STACKS
#endif

namespace lopt {

#if defined(LOPT_OWN_STACKS)

namespace {

constexpr size_t kStack = size_t(1) << 20;  // of a thread; what is not touched takes no memory

class Threads final : public ThreadSwitch {
 public:
  Threads() {
    stacks_ = mmap(nullptr, kThreads * kStack, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  }
  ~Threads() override {
    if (stacks_ != MAP_FAILED) munmap(stacks_, kThreads * kStack);
  }

  const char* run(uint64_t& state, const std::function<void(HostBlock&)>& kernel) {
    if (stacks_ == MAP_FAILED) return "no memory for the stacks of a block";
    kernel_ = &kernel;
    waiting_ = done_ = 0;
    std::fill_n(waiting_in_warp_, kWarps, 0);
    ready_.clear();
    for (int i = 0; i < kThreads; ++i) {
      ucontext_t& context = contexts_[i];
      getcontext(&context);
      context.uc_stack.ss_sp = static_cast<char*>(stacks_) + size_t(i) * kStack;
      context.uc_stack.ss_size = kStack;
      context.uc_link = &main_;
      running_ = this;
      makecontext(&context, start, 0);
      ready_.push_back(i);
    }
    while (!ready_.empty()) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      const size_t next = size_t((state >> 33) % ready_.size());
      thread_ = ready_[next];
      ready_[next] = ready_.back();
      ready_.pop_back();
      swapcontext(&main_, &contexts_[thread_]);
    }
    return done_ == kThreads ? nullptr : "threads wait at a barrier that others do not come to";
  }

  int thread() const override { return thread_; }

  void wait_block() override {
    if (++waiting_ == kThreads) {
      waiting_ = 0;
      for (int i = 0; i < kThreads; ++i) ready_.push_back(i);
    }
    leave();
  }

  void wait_warp() override {
    const int warp = thread_ / kWarpLanes;
    if (++waiting_in_warp_[warp] == kWarpLanes) {
      waiting_in_warp_[warp] = 0;
      for (int lane = 0; lane < kWarpLanes; ++lane) ready_.push_back(warp * kWarpLanes + lane);
    }
    leave();
  }

  void exchange(const void* own, size_t bytes, void* all) override {
    // Two places in turn: nobody gives the next value but one before all have read this one.
    Exchange& e = exchanges_[thread_ / kWarpLanes][turns_[thread_] ^= 1];
    std::memcpy(e.memory + size_t(thread_ % kWarpLanes) * bytes, own, bytes);
    wait_warp();
    std::memcpy(all, e.memory, kWarpLanes * bytes);
  }

 private:
  struct Exchange {
    char memory[kWarpLanes * kMostExchanged];
  };

  static void start() {
    Threads& threads = *running_;
    HostBlock block{&threads};
    (*threads.kernel_)(block);
    threads.done_ += 1;
  }

  void leave() { swapcontext(&contexts_[thread_], &main_); }

  static thread_local Threads* running_;
  void* stacks_;
  const std::function<void(HostBlock&)>* kernel_ = nullptr;
  ucontext_t main_, contexts_[kThreads];
  std::vector<int> ready_;
  int thread_ = 0, waiting_ = 0, done_ = 0, waiting_in_warp_[kWarps] = {};
  Exchange exchanges_[kWarps][2];
  uint8_t turns_[kThreads] = {};
};

thread_local Threads* Threads::running_ = nullptr;

}  // namespace

const char* run_threads(uint64_t& state, const std::function<void(HostBlock&)>& kernel) {
  if (!state) {
    HostBlock block;
    kernel(block);
    return nullptr;
  }
  static thread_local std::unique_ptr<Threads> threads;
  if (!threads) threads.reset(new Threads());
  return threads->run(state, kernel);
}

#else

const char* run_threads(uint64_t& state, const std::function<void(HostBlock&)>& kernel) {
  if (state) return "threads on stacks of their own need Linux and glibc";
  HostBlock block;
  kernel(block);
  return nullptr;
}

#endif

}  // namespace lopt
