// The part of XLA's C interface for custom calls that is used here, written out by hand.
//
// XLA's own header pins the runtime that it came with; the offsets below are the same in every release so
// far. tests/test_jax_abi.py compares them with the header of the installed jaxlib (xla/ffi/api/c_api.h).
#pragma once

#include <cstddef>
#include <cstdint>

namespace lopt::xla {

enum : int32_t { kMetadataExtension = 1, kExecute = 3 };
enum : int32_t { kS32 = 4, kS64 = 5, kU8 = 6, kF16 = 10, kF32 = 11, kF64 = 12, kBF16 = 16 };
enum : uint32_t { kCommandBufferCompatible = 1 };  // traits
enum : int32_t { kArrayAttribute = 1, kInvalidArgument = 3, kInternal = 13 };

struct Extension {
  size_t struct_size;
  int32_t type;
  Extension* next;
};

struct Version {
  size_t struct_size;
  Extension* extensions;
  int32_t major, minor;
};

struct Metadata {
  size_t struct_size;
  Version version;
  uint32_t traits;
};

struct MetadataExtension {
  Extension base;
  Metadata* metadata;
};

struct Buffer {
  size_t struct_size;
  Extension* extensions;
  int32_t dtype;
  void* data;
  int64_t rank;
  int64_t* dims;
};

struct ByteSpan {
  const char* data;
  size_t size;
};

struct Array {
  int32_t dtype;
  size_t size;
  void* data;
};

// Operands, results: `values` are Buffer*. Attributes (sorted by name): `values` are Array* where the type
// says so.
struct Buffers {
  size_t struct_size;
  Extension* extensions;
  int64_t size;
  int32_t* types;
  void** values;
};

struct Attributes {
  size_t struct_size;
  Extension* extensions;
  int64_t size;
  int32_t* types;
  ByteSpan** names;
  void** values;
};

struct Error;
struct Context;

struct ErrorCreate {
  size_t struct_size;
  Extension* extensions;
  const char* message;
  int32_t code;
};

struct ErrorDestroy {
  size_t struct_size;
  Extension* extensions;
  Error* error;
};

struct StreamGet {
  size_t struct_size;
  Extension* extensions;
  Context* context;
  void* stream;  // CUDA: a CUstream
};

struct Schedule {
  size_t struct_size;
  Extension* extensions;
  Context* context;
  void (*task)(void* data);
  void* data;
};

struct NumThreads {
  size_t struct_size;
  Extension* extensions;
  Context* context;
  int64_t* threads;
};

struct Api {
  size_t struct_size;
  Extension* extensions;
  Version version;
  const void* internal;
  Error* (*error_create)(ErrorCreate*);
  void* error_get_message;
  void (*error_destroy)(ErrorDestroy*);
  void* handler_register;
  Error* (*stream_get)(StreamGet*);
  void* unused[6];  // types, state, device memory
  Error* (*schedule)(Schedule*);
  Error* (*num_threads)(NumThreads*);
};

struct CallFrame {
  size_t struct_size;
  Extension* extensions;
  const Api* api;
  Context* context;
  int32_t stage;
  Buffers operands;
  Buffers results;
  Attributes attributes;
};

}  // namespace lopt::xla
