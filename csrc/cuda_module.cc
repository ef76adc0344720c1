// The Python module lopt_fast._cuda: the kernels of kernels/*/cuda.cu as a GpuDevice. Imports without a
// driver.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <string>

#include "csrc/gpu.h"
#include "csrc/gpu_python.h"
#include "kernels/common/cuda_operations.h"
#include "kernels/small_fc_lopt/cuda.h"
#include "kernels/small_fc_lopt/gpu.h"

namespace py = pybind11;

namespace lopt {
namespace {

constexpr int32_t kLeastCapability = 80;  // arch=compute_80 in CMakeLists.txt

const char* text_of(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

// Attributes alone: creates no context.
cudaError_t read(int32_t ordinal, GpuProperties* out) {
  int major = 0, minor = 0, multiprocessors = 0, l2 = 0;
  cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, ordinal);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, ordinal);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, ordinal);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&l2, cudaDevAttrL2CacheSize, ordinal);
  *out = {multiprocessors, 10 * major + minor, l2};
  return error;
}

const char* properties(int32_t ordinal, GpuProperties* out) { return text_of(read(ordinal, out)); }

const char* clear(void* memory, size_t bytes, void* stream) {
  return text_of(cudaMemsetAsync(memory, 0, bytes, static_cast<cudaStream_t>(stream)));
}

const char* copy(void* to, const void* from, size_t bytes, void* stream) {
  return text_of(
      cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, static_cast<cudaStream_t>(stream)));
}

const char* current(int32_t* ordinal) { return text_of(cudaGetDevice(ordinal)); }

const char* launch(const GpuLaunch& launch, void* stream) {
  if (is_of_parts(launch.kind)) return launch_parts(launch, stream);
  switch (launch.width) {
    case 2:
      return launch_width_2(launch, stream);
    case 4:
      return launch_width_4(launch, stream);
    case 8:
      return launch_width_8(launch, stream);
    case 16:
      return launch_width_16(launch, stream);
    case 32:
      return launch_width_32(launch, stream);
    case 64:
      return launch_width_64(launch, stream);
  }
  return "no kernel for this width";
}

const char* launch_operation(const OperationLaunch& launch, void* stream) {
  switch (launch.phase) {
    case OperationPhase::adam:
      return launch_adam(launch, stream);
    case OperationPhase::spreads:
    case OperationPhase::merge:
      return launch_statistics(launch, stream);
    default:
      return launch_element_mlp(launch, stream);
  }
}

constexpr GpuDevice kDevice = {kGpuAbi, "cuda", properties, clear, launch, copy, current, launch_operation};

// Why the kernels cannot run on a device, or nothing.
std::optional<std::string> problem(int32_t ordinal) {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaErrorInsufficientDriver || error == cudaErrorNoDevice || error == cudaErrorStubLibrary)
    return "no NVIDIA driver, or one that is too old: " + std::string(cudaGetErrorString(error));
  if (error != cudaSuccess) return std::string(cudaGetErrorString(error));
  if (ordinal < 0 || ordinal >= count) return "there is no device " + std::to_string(ordinal);
  GpuProperties found = {};
  if (const char* why = properties(ordinal, &found)) return std::string(why);
  const int32_t capability = found.compute_capability;
  if (capability < kLeastCapability)
    return "compute capability " + std::to_string(capability / 10) + "." + std::to_string(capability % 10) +
           " is below 8.0";
  return std::nullopt;
}

}  // namespace
}  // namespace lopt

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of lopt_fast. Private: see lopt_fast.backends.";
  m.def("device", [] { return py::capsule(&lopt::kDevice, lopt::kGpuDeviceCapsule); });
  m.def("problem", &lopt::problem, py::arg("ordinal") = 0);
}
