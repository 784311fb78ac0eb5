// The memory that a test case gives to kernels. One interface, two bodies: the simulator's heap (guard pages,
// NaN poison, bounds checks) where a host compiler builds the case, cudaMalloc where nvcc does. On a real
// device nothing watches single accesses; there every allocation lies between two guard bands, and free_all()
// says whether a kernel wrote into one.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#ifdef __CUDACC__
#include <cuda_runtime.h>
#else
#include "cuda_sim.h"
#endif

namespace device_memory {

// Every float type reads as NaN where all bits are set; an int8 argmax of 255, an index of -1.
constexpr int poison_byte = 0xFF;

#ifdef __CUDACC__
constexpr bool simulated = false;
constexpr size_t guard_bytes = 4096;
constexpr int guard_byte = 0xA5;

struct Allocation {
  unsigned char* base;
  size_t bytes;
  std::string name;
};
inline std::vector<Allocation>& allocations() {
  static std::vector<Allocation> list;
  return list;
}
inline std::string words_of(int error) {
  return error == int(cudaSuccess) ? "" : cudaGetErrorString(static_cast<cudaError_t>(error));
}
[[noreturn]] inline void die(const char* what, int error) {
  std::fprintf(stderr, "%s: %s\n", what, words_of(error).c_str());
  std::exit(3);
}
inline void must(const char* what, cudaError_t error) {
  if (error != cudaSuccess) die(what, int(error));
}

inline void* allocate(size_t bytes, const char* name) {
  unsigned char* base = nullptr;
  must("cudaMalloc", cudaMalloc(&base, bytes + 2 * guard_bytes));
  must("cudaMemset", cudaMemset(base, guard_byte, bytes + 2 * guard_bytes));
  must("cudaMemset", cudaMemset(base + guard_bytes, poison_byte, bytes));
  allocations().push_back({base, bytes, name});
  return base + guard_bytes;
}
inline void poison(void* p, size_t bytes) { must("cudaMemset", cudaMemset(p, poison_byte, bytes)); }
inline void upload(void* device, const void* host, size_t bytes) {
  must("cudaMemcpy", cudaMemcpy(device, host, bytes, cudaMemcpyHostToDevice));
}
inline void download(void* host, const void* device, size_t bytes) {
  must("cudaMemcpy", cudaMemcpy(host, device, bytes, cudaMemcpyDeviceToHost));
}
// Waits for the launch; returns "" or what went wrong.
inline std::string finish(int launch_error) {
  if (launch_error == int(cudaSuccess)) launch_error = int(cudaDeviceSynchronize());
  return words_of(launch_error);
}
// Frees everything; returns "" or which buffer was written outside its bounds.
inline std::string free_all() {
  std::string damage;
  std::vector<unsigned char> guard(guard_bytes);
  for (auto& a : allocations()) {
    for (unsigned char* at : {a.base, a.base + guard_bytes + a.bytes}) {
      download(guard.data(), at, guard_bytes);
      for (unsigned char c : guard)
        if (c != guard_byte) {
          damage =
              std::string("a kernel wrote ") + (at == a.base ? "before" : "behind") + " '" + a.name + "'";
          break;
        }
    }
    must("cudaFree", cudaFree(a.base));
  }
  allocations().clear();
  return damage;
}
inline void set_seed(uint64_t) {}

#else
constexpr bool simulated = true;

inline void* allocate(size_t bytes, const char* name) { return cusim::dmalloc(bytes, name); }
inline void poison(void* p, size_t bytes) { std::memset(p, poison_byte, bytes); }
inline void upload(void* device, const void* host, size_t bytes) {
  if (bytes) std::memcpy(device, host, bytes);
}
inline void download(void* host, const void* device, size_t bytes) {
  if (bytes) std::memcpy(host, device, bytes);
}
inline std::string finish(int launch_error) {
  std::string words;
  if (launch_error || cusim::error_count()) words = cusim::last_error();
  if (launch_error && words.empty()) words = "launch error " + std::to_string(launch_error);
  cusim::clear_error();
  return words;
}
inline std::string free_all() {
  cusim::dfree_all();
  return "";
}
inline void set_seed(uint64_t seed) { cusim::opt.seed = seed; }
#endif

}  // namespace device_memory
