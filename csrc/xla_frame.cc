#include "csrc/xla_frame.h"

#include <cstring>
#include <exception>
#include <stdexcept>
#include <string>

namespace lopt::xla {
namespace {

Error* fail(const Api* api, const char* name, int32_t code, const char* what) {
  const std::string message = std::string("lopt_fast ") + name + ": " + what;
  ErrorCreate create{sizeof(ErrorCreate), nullptr, message.c_str(), code};
  return api->error_create(&create);
}

}  // namespace

void require(bool condition, const char* what) {
  if (!condition) throw std::invalid_argument(what);
}

const Array& attribute(const CallFrame& frame, const char* name, int32_t dtype) {
  for (int64_t i = 0; i < frame.attributes.size; ++i) {
    const ByteSpan& found = *frame.attributes.names[i];
    if (found.size != std::strlen(name) || std::memcmp(found.data, name, found.size) != 0) continue;
    require(frame.attributes.types[i] == kArrayAttribute, "an attribute is not an array");
    const auto& array = *static_cast<const Array*>(frame.attributes.values[i]);
    require(array.dtype == dtype, "an attribute has the wrong type");
    return array;
  }
  throw std::invalid_argument(std::string("attribute missing: ") + name);
}

size_t real_bytes(const Buffer& buffer) {
  require(buffer.dtype == kF32 || buffer.dtype == kF64, "an operand has a type that this call does not take");
  return buffer.dtype == kF64 ? 8 : 4;
}

size_t storage_bytes(const Buffer& buffer) {
  return buffer.dtype == kBF16 || buffer.dtype == kF16 ? 2 : real_bytes(buffer);
}

double real_at(const void* address, int32_t dtype) {
  return dtype == kF64 ? *static_cast<const double*>(address)
                       : static_cast<double>(*static_cast<const float*>(address));
}

Batch::Batch(const Buffer& buffer, int64_t own_rank)
    : rank(buffer.rank - own_rank), size(1), dims(buffer.dims) {
  require(rank >= 0, "an operand lacks dimensions");
  for (int64_t i = 0; i < rank; ++i) size *= dims[i];
}

int64_t Batch::elements(const Buffer& buffer) const {
  require(buffer.rank >= rank, "an operand lacks batch dimensions");
  int64_t own = 1;
  for (int64_t i = 0; i < buffer.rank; ++i) {
    if (i < rank) require(buffer.dims[i] == dims[i], "batch dimensions differ between operands");
    if (i >= rank) own *= buffer.dims[i];
  }
  return own;
}

const Buffer& Batch::check(const Buffer& buffer, int64_t wanted) const {
  require(elements(buffer) == wanted, "an operand has the wrong size");
  return buffer;
}

Error* respond(CallFrame* frame, const char* name, uint32_t traits, void (*run)(const CallFrame& frame)) {
  // Asked for metadata: claim the version of the runtime that asks, since the part of it used here never
  // changed.
  for (Extension* e = frame->extensions; e != nullptr; e = e->next) {
    if (e->type != kMetadataExtension) continue;
    Metadata* metadata = reinterpret_cast<MetadataExtension*>(e)->metadata;
    metadata->version.major = 0;
    metadata->version.minor = frame->api ? frame->api->version.minor : 1;
    metadata->traits = traits;
    return nullptr;
  }
  if (frame->stage != kExecute) return nullptr;
  try {
    run(*frame);
  } catch (const std::invalid_argument& error) {
    return fail(frame->api, name, kInvalidArgument, error.what());
  } catch (const std::exception& error) {
    return fail(frame->api, name, kInternal, error.what());
  } catch (...) {
    return fail(frame->api, name, kInternal, "unknown error");
  }
  return nullptr;
}

}  // namespace lopt::xla
