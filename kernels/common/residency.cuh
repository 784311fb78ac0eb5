// What the current device holds at once, for kernels whose blocks wait for each other: they are launched only
// where all of them run together. In the simulator a test says what the device is like.
#pragma once
#include "common/launch.cuh"

namespace pyseqnet {

struct DeviceLimits {
  int multiprocessors = 0;
  int shared_bytes = 0;  // of a block, with what it must ask for
  int capability = 0;    // 80 = 8.0
};

#ifdef __CUDACC__
// Zeros where the device cannot be asked: such a device holds nothing.
inline DeviceLimits device_limits() {
  int device = 0, major = 0, minor = 0;
  DeviceLimits limits;
  cudaError_t error = cudaGetDevice(&device);
  const auto ask = [&](int* value, cudaDeviceAttr attribute) {
    if (!error) error = cudaDeviceGetAttribute(value, attribute, device);
  };
  ask(&limits.multiprocessors, cudaDevAttrMultiProcessorCount);
  ask(&limits.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  ask(&major, cudaDevAttrComputeCapabilityMajor);
  ask(&minor, cudaDevAttrComputeCapabilityMinor);
  limits.capability = major * 10 + minor;
  if (!error) return limits;
  (void)cudaGetLastError();
  return {};
}

// Blocks of a kernel that run at the same time on the whole device.
template <class... Parameters>
int blocks_at_once(void (*kernel)(Parameters...), int threads, unsigned dynamic_shared_bytes) {
  int of_each = 0;
  cudaError_t error = cudaSuccess;
  if (dynamic_shared_bytes > default_dynamic_shared_limit)
    error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                 cudaFuncAttributeMaxDynamicSharedMemorySize, int(dynamic_shared_bytes));
  if (!error)
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&of_each, kernel, threads, dynamic_shared_bytes);
  if (!error) return of_each * device_limits().multiprocessors;
  (void)cudaGetLastError();
  return 0;
}
#else
inline DeviceLimits& simulated_device() {
  static DeviceLimits limits{132, 232448, 90};
  return limits;
}
inline DeviceLimits device_limits() { return simulated_device(); }
template <class... Parameters>
int blocks_at_once(void (*)(Parameters...), int, unsigned dynamic_shared_bytes) {
  const DeviceLimits limits = simulated_device();
  return int(dynamic_shared_bytes) <= limits.shared_bytes ? limits.multiprocessors : 0;
}
#endif

}  // namespace pyseqnet
