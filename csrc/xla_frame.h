// What XLA hands to a custom call, read with checks, and the body that all handlers share. Addresses are
// taken as they are and never followed, so they may be a device's.
#pragma once

#include <cstddef>
#include <cstdint>

#include "csrc/xla_abi.h"

namespace lopt::xla {

// Throws std::invalid_argument with this message if the condition does not hold.
void require(bool condition, const char* what);

// The attribute of this name, which must be an array of this type.
const Array& attribute(const CallFrame& frame, const char* name, int32_t dtype);

// Bytes of an element, which must be a float32 or float64.
size_t real_bytes(const Buffer& buffer);

// Bytes of an element, which must be a float32, float64, bfloat16 or float16.
size_t storage_bytes(const Buffer& buffer);

// The number at a host address, of type kF32 or kF64.
double real_at(const void* address, int32_t dtype);

// The batch dimensions that vmap has put before every operand and result.
struct Batch {
  int64_t rank, size;
  const int64_t* dims;

  // Read off a buffer whose rank without them is `own_rank`.
  Batch(const Buffer& buffer, int64_t own_rank);
  // Elements of the buffer in each batch element.
  int64_t elements(const Buffer& buffer) const;
  // The buffer, which must hold `wanted` elements in each batch element.
  const Buffer& check(const Buffer& buffer, int64_t wanted) const;
};

// The body of a handler of the operation `name`: answers a query for metadata with `traits`, runs `run` at
// the execution stage and turns exceptions into XLA's errors.
Error* respond(CallFrame* frame, const char* name, uint32_t traits, void (*run)(const CallFrame& frame));

}  // namespace lopt::xla
