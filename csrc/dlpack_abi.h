// The part of DLPack's C exchange interface (version 1.3, dmlc/dlpack) that reads a tensor without owning it.
// PyTorch's tensor type has it as the attribute __dlpack_c_exchange_api__, first in kOldestPyTorch, which
// pyproject.toml asks for; a call costs some 30 ns, a tenth of reading pointer, shape, strides, type and
// device as Python attributes.
#pragma once

#include <cstdint>

namespace lopt {

struct DlTensor {
  void* data;
  int32_t device_type;
  int32_t device_id;
  int32_t ndim;
  uint8_t type_code;
  uint8_t type_bits;
  uint16_t type_lanes;
  int64_t* shape;
  int64_t* strides;  // in elements
  uint64_t byte_offset;
};

constexpr uint8_t kDlFloat = 2;
constexpr uint8_t kDlBfloat = 4;
constexpr uint32_t kDlMajorVersion = 1;
constexpr char kOldestPyTorch[] = "2.10";

struct DlExchangeApi {
  uint32_t major_version;
  uint32_t minor_version;
  DlExchangeApi* previous;
  void* unused_allocator;
  void* unused_managed_from_object;
  void* unused_managed_to_object;
  int (*tensor_from_object)(void* object, DlTensor* out);  // 0, or -1 with a Python error set
  void* unused_current_work_stream;
};

}  // namespace lopt
