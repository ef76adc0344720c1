// Scratch memory of a step, allocated before the first tensor is written: out of memory, a step changes
// nothing.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

namespace lopt {

// Hands out aligned pieces of one block.
class Arena {
 public:
  static constexpr size_t kAlignment = 64;

  Arena() = default;
  explicit Arena(char* piece) : block_(piece) {}  // a piece of another arena, cut further
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  // How many bytes take_all(arena) takes. It gets an arena that only counts: the pieces are null.
  template <typename F>
  static size_t bytes(const F& take_all) {
    Arena counter;
    take_all(counter);
    return counter.used_;
  }

  // Makes room for this many bytes. No piece may be in use. Throws std::bad_alloc.
  void reserve(size_t bytes) {
    clear();
    if (bytes <= size_) return;
    size_ = 0;
    owned_.reset();
    owned_.reset(static_cast<char*>(std::aligned_alloc(kAlignment, rounded(bytes))));
    block_ = owned_.get();
    if (!block_) throw std::bad_alloc();
    size_ = bytes;
  }

  template <typename U>
  U* take(int64_t count) {
    char* piece = block_ ? block_ + used_ : nullptr;
    used_ += rounded(size_t(count) * sizeof(U));
    return reinterpret_cast<U*>(piece);
  }

  // Takes all pieces back.
  void clear() { used_ = 0; }

 private:
  struct Free {
    void operator()(char* block) const { std::free(block); }
  };
  static size_t rounded(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

  std::unique_ptr<char, Free> owned_;
  char* block_ = nullptr;
  size_t size_ = 0, used_ = 0;
};

// Arenas for the tasks that run at once.
class Arenas {
 public:
  // Throws std::bad_alloc.
  Arenas(int64_t count, size_t bytes) : bytes_(bytes), all_(size_t(count)) {
    for (Arena& arena : all_) {
      arena.reserve(bytes);
      free_.push_back(&arena);
    }
  }

  // f(arena), with one that no other task uses meanwhile.
  template <typename F>
  void lend(const F& f) {
    Arena more;  // only where a pool runs more tasks at once than it said
    Arena* arena = pop();
    if (!arena) (arena = &more)->reserve(bytes_);
    const Return back{*this, arena == &more ? nullptr : arena};
    f(*arena);
  }

 private:
  struct Return {
    Arenas& to;
    Arena* arena;
    ~Return() {
      const std::lock_guard<std::mutex> lock(to.mutex_);
      if (arena) to.free_.push_back(arena);
    }
  };

  Arena* pop() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (free_.empty()) return nullptr;
    Arena* arena = free_.back();
    free_.pop_back();
    return arena;
  }

  const size_t bytes_;
  std::mutex mutex_;
  std::vector<Arena> all_;
  std::vector<Arena*> free_;  // guarded by mutex_
};

}  // namespace lopt
