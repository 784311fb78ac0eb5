// What the binding asks about CUDA devices, so that csrc/ needs no CUDA header. Defined in cuda_device.cu.
#pragma once

namespace pyseqnet {

// 80 for compute capability 8.0; a negative cudaError_t when the device cannot be queried. Cached per device.
int compute_capability(int device);
const char* cuda_error_text(int error);
// The architectures this binary holds code for, as given to the build: "80, 90a, 100, 120 + PTX 80".
const char* cuda_archs();

}  // namespace pyseqnet
