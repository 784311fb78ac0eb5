// The current CUDA stream and device of the torch that loaded us. One binary serves CPU and CUDA builds of
// torch, so the symbol is looked up at run time, in the library that a CUDA build has already loaded. A
// StreamId is never cast to a stream.
#pragma once
#include <dlfcn.h>

#include <stdexcept>

#include "tensor_checks.h"

namespace pyseqnet {

inline void* current_cuda_stream(int32_t device) {
  using GetStream = AOTITorchError (*)(int32_t, void**);
  static const GetStream get_stream = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    return library ? reinterpret_cast<GetStream>(dlsym(library, "aoti_torch_get_current_cuda_stream"))
                   : nullptr;
  }();
  if (!get_stream) throw std::runtime_error("pyseqnet: a CUDA tensor, but this torch has no CUDA");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(get_stream(device, &stream));
  return stream;
}

class CurrentDevice {
 public:
  explicit CurrentDevice(int32_t device) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_create_device_guard(device, &guard_));
  }
  ~CurrentDevice() { aoti_torch_delete_device_guard(guard_); }
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

 private:
  DeviceGuardHandle guard_ = nullptr;
};

}  // namespace pyseqnet
