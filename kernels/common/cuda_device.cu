// Device queries through the CUDA runtime that is linked into this binary.
#include <cuda_runtime_api.h>

#include <atomic>

#include "common/cuda_device.h"

namespace pyseqnet {

int compute_capability(int device) {
  constexpr int most_devices = 64;
  static std::atomic<int> cache[most_devices];  // 0 = not asked yet
  if (device < 0) return -int(cudaErrorInvalidDevice);
  if (device < most_devices && cache[device].load()) return cache[device].load();
  int major = 0, minor = 0;
  cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (!error) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (error) return -int(error);
  if (device < most_devices) cache[device].store(major * 10 + minor);
  return major * 10 + minor;
}

const char* cuda_error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

const char* cuda_archs() { return PYSEQNET_CUDA_ARCHS; }

}  // namespace pyseqnet
