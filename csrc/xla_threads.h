// XLA's intra-op thread pool as a `Pool`, for the handlers on the processor.
#pragma once

#include <cstdint>

#include "csrc/core.h"
#include "csrc/xla_abi.h"

namespace lopt::xla {

// During one call. Runs may be nested: a task may use the pool as well.
class Threads {
 public:
  explicit Threads(const CallFrame& frame);
  Pool pool();  // valid as long as this is

 private:
  bool succeeded(Error* error) const;
  void run(int64_t tasks, void (*fn)(void*, int64_t), void* argument) const;

  const Api* api_;
  Context* context_;
  int64_t count_;
};

}  // namespace lopt::xla
