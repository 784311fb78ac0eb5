// Runs a CPU kernel's plan on torch's own thread pool: torch.set_num_threads holds, and no second pool
// competes.
#pragma once
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/ops.h>

#include <cstddef>

#include "common/dispatch.h"
#include "tensor_checks.h"

namespace pyseqnet {

inline Refusal fits_this_cpu(Isa needed) {
  return needed <= best_isa() ? accepted : "this processor (or PYSEQNET_ISA) lacks the instruction set";
}

template <class Problem, class Tensors>
void run_plan(const CpuKernel<Problem, Tensors>& kernel, const Problem& problem, const Tensors& tensors,
              const Tensor& like) {
  const WorkPlan plan = kernel.plan(problem);
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t shared = align_up(plan.shared_bytes), scratch = align_up(plan.thread_bytes);
  const int64_t bytes = shared + threads * scratch;
  std::byte* base = nullptr;
  Tensor workspace = like;  // a second reference; replaced when there is something to hold
  if (bytes > 0) {
    workspace = new_vector(like, bytes + workspace_alignment, torch::headeronly::ScalarType::Byte);
    const auto address = reinterpret_cast<uintptr_t>(workspace.mutable_data_ptr());
    base = reinterpret_cast<std::byte*>((address + workspace_alignment - 1) / workspace_alignment *
                                        workspace_alignment);
  }
  for (int phase = 0; phase < plan.phases; phase++) {
    const auto [items, grain] = plan.phase[phase];
    if (items <= 0) continue;
    if (threads == 1 || items <= grain) {
      kernel.run(problem, tensors, {phase, 0, items, base, base + shared});
      continue;
    }
    torch::stable::parallel_for(0, items, grain, [&](int64_t begin, int64_t end) {
      uint32_t thread = 0;
      STABLE_TORCH_ERROR_CODE_CHECK(torch_get_thread_idx(&thread));
      kernel.run(problem, tensors, {phase, begin, end, base, base + shared + thread * scratch});
    });
  }
}

// The kernel to run; throws where none takes the problem.
template <class Problem, class Tensors>
const CpuKernel<Problem, Tensors>* kernel_on_cpu(const char* family, const char* operation,
                                                 Table<CpuKernel<Problem, Tensors>> table,
                                                 const Problem& problem) {
  const auto choice =
      choose(family, operation, table, problem, [](const auto& kernel) { return fits_this_cpu(kernel.isa); });
  if (!choice.kernel) throw std::runtime_error(choice.error);
  return choice.kernel;
}

template <class Problem, class Tensors>
void run_on_cpu(const char* family, const char* operation, Table<CpuKernel<Problem, Tensors>> table,
                const Problem& problem, const Tensors& tensors, const Tensor& like) {
  run_plan(*kernel_on_cpu(family, operation, table, problem), problem, tensors, like);
}

}  // namespace pyseqnet
