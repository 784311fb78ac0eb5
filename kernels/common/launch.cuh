// The one header that every .cu file includes first. It makes a CUDA source executable in two places:
//   nvcc (__CUDACC__)     the CUDA runtime;
//   a host C++ compiler   the test simulator (tests/cuda_on_cpu/, on the include path of the tests only).
//
// That is why kernels declare shared memory through two macros, are launched through launch(), and take
// everything that is not plain CUDA C++ from ptx.cuh:
//
//   __global__ void __launch_bounds__(128) kernel(const float* x, float* y, int64_t n) {
//     PYSEQNET_SHARED(float, tile, [32][33]);        // static; PYSEQNET_SHARED(int, last, ) for a scalar
//     PYSEQNET_DYNAMIC_SHARED(float, staging);       // LaunchConfig::dynamic_shared_bytes of it
//     ...
//   }
//   int error = launch({.grid = dim3(blocks), .block = dim3(128), .stream = stream}, kernel, x, y, n);
//
// T and dims of PYSEQNET_SHARED may not contain a comma outside parentheses: name such a type first.
#pragma once
#include <cstdint>
#include <type_traits>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define PYSEQNET_SHARED(T, name, dims) __shared__ T name dims
// One symbol for a whole translation unit: nvcc rejects two `extern __shared__` arrays of different types.
// 1024 bytes is what the 128-byte swizzle of TMA and wgmma repeats after.
extern __shared__ __align__(1024) unsigned char pyseqnet_dynamic_shared_[];
#define PYSEQNET_DYNAMIC_SHARED(T, name) T* name = reinterpret_cast<T*>(pyseqnet_dynamic_shared_)
#define PYSEQNET_DEVICE __device__ __forceinline__

#else
#include <tuple>

#include "cuda_sim.h"

#define PYSEQNET_SHARED(T, name, dims)                              \
  using name##_shared_t = T dims;                                   \
  auto& name = *static_cast<name##_shared_t*>(::cusim::smem_static( \
      []() -> const void* {                                         \
        static const char tag = 0;                                  \
        return &tag;                                                \
      }(),                                                          \
      sizeof(name##_shared_t), alignof(name##_shared_t)))
#define PYSEQNET_DYNAMIC_SHARED(T, name) T* name = reinterpret_cast<T*>(::cusim::smem_dynamic())
#define PYSEQNET_DEVICE inline __attribute__((always_inline))
#endif

#include "common/numerics.h"  // PYSEQNET_HOST_DEVICE

namespace pyseqnet {

struct LaunchConfig {
  dim3 grid{1, 1, 1}, block{1, 1, 1};
  unsigned dynamic_shared_bytes = 0;
  void* stream = nullptr;  // a cudaStream_t, as it comes through the contracts
  dim3 cluster{1, 1, 1};   // sm_90 and newer; the grid must be a multiple of it
  bool cooperative = false;
};

constexpr int launch_ok = 0;  // = cudaSuccess

#ifdef __CUDACC__
// What a kernel may use without asking for more.
constexpr unsigned default_dynamic_shared_limit = 48 * 1024;
constexpr unsigned portable_cluster_blocks = 8;

// Enqueues the kernel; returns a cudaError_t. An error is taken off the runtime's books: it is the caller's
// to report, and must not surface in somebody else's next CUDA call.
template <class... Parameters, class... Arguments>
int launch(const LaunchConfig& config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  cudaError_t error = cudaSuccess;
  if (config.dynamic_shared_bytes > default_dynamic_shared_limit)
    error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, int(config.dynamic_shared_bytes));
  const unsigned cluster_blocks = config.cluster.x * config.cluster.y * config.cluster.z;
  if (error == cudaSuccess && cluster_blocks > portable_cluster_blocks)
    error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                 cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (error == cudaSuccess) {
    cudaLaunchConfig_t device_config = {};
    device_config.gridDim = config.grid;
    device_config.blockDim = config.block;
    device_config.dynamicSmemBytes = config.dynamic_shared_bytes;
    device_config.stream = static_cast<cudaStream_t>(config.stream);
    cudaLaunchAttribute attributes[2];
    unsigned count = 0;
    if (cluster_blocks > 1) {
      attributes[count].id = cudaLaunchAttributeClusterDimension;
      attributes[count].val.clusterDim = {config.cluster.x, config.cluster.y, config.cluster.z};
      count++;
    }
    if (config.cooperative) {
      attributes[count].id = cudaLaunchAttributeCooperative;
      attributes[count].val.cooperative = 1;
      count++;
    }
    device_config.attrs = attributes;
    device_config.numAttrs = count;
    error = cudaLaunchKernelEx(&device_config, kernel, static_cast<Parameters>(arguments)...);
  }
  if (error != cudaSuccess) (void)cudaGetLastError();
  return int(error);
}
#else
// Runs the kernel to its end on the simulator. Returns 0, or not 0 where the simulator found a fault: its
// words are in cusim::last_error(). The parameters are copied once; each CUDA thread gets its own copy.
template <class... Parameters, class... Arguments>
int launch(const LaunchConfig& config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<std::remove_const_t<Parameters>...> parameters;
  } call{kernel, {static_cast<Parameters>(arguments)...}};
  const cusim::Config sim{config.grid, config.block, config.cluster, config.dynamic_shared_bytes,
                          config.cooperative};
  return cusim::run(
      sim, reinterpret_cast<const void*>(kernel),
      [](void* p) {
        auto& c = *static_cast<Call*>(p);
        std::apply(c.kernel, c.parameters);
      },
      &call);
}
#endif

}  // namespace pyseqnet
