// Runs a CUDA kernel on the current stream of the tensors' device, with a workspace from torch's caching
// allocator.
#pragma once
#include <string>

#include "common/cuda_device.h"
#include "common/dispatch.h"
#include "cuda_stream.h"
#include "tensor_checks.h"

namespace pyseqnet {

template <class Problem, class Tensors>
void run_on_cuda(const char* family, const char* operation, Table<CudaKernel<Problem, Tensors>> table,
                 const Problem& problem, const Tensors& tensors, const Tensor& like) {
  int32_t device = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device));
  const CurrentDevice guard(device);
  const int capability = compute_capability(device);
  if (capability < 0)
    throw std::runtime_error(std::string(operation) + ": cannot query CUDA device " + std::to_string(device) +
                             ": " + cuda_error_text(-capability));
  const auto choice = choose(family, operation, table, problem, [&](const auto& kernel) -> Refusal {
    if (capability < kernel.min_capability) return "this device's compute capability is too low";
    if (kernel.max_capability && capability > kernel.max_capability)
      return "this device is of another generation";
    return accepted;
  });
  if (!choice.kernel) throw std::runtime_error(choice.error);
  const int64_t bytes = choice.kernel->workspace_bytes(problem);
  Tensor workspace = like;
  void* memory = nullptr;
  if (bytes > 0) {
    workspace = new_vector(like, bytes, torch::headeronly::ScalarType::Byte);
    memory = workspace.mutable_data_ptr();
  }
  const int error = choice.kernel->launch(problem, tensors, memory, current_cuda_stream(device));
  if (error)
    throw std::runtime_error(std::string(operation) + ": kernel " + choice.kernel->name +
                             " failed on device " + std::to_string(device) + " (compute capability " +
                             std::to_string(capability / 10) + "." + std::to_string(capability % 10) +
                             "; built for " + cuda_archs() + "): " + cuda_error_text(error));
}

}  // namespace pyseqnet
