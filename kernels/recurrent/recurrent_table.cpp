// The dispatch tables of the recurrent family: ordered, first acceptance wins.
#include <cstdio>

#include "recurrent/recurrent.h"

namespace pyseqnet {

#define DECLARE_CPU_KERNELS \
  extern const RecurrentCpuKernel recurrent_forward, recurrent_rows_forward, recurrent_backward
namespace portable {
DECLARE_CPU_KERNELS;
}
#if defined(__x86_64__)
namespace avx2 {
DECLARE_CPU_KERNELS;
}
namespace avx512 {
DECLARE_CPU_KERNELS;
}
namespace avx512bf16 {
extern const RecurrentCpuKernel recurrent_forward, recurrent_backward;
}
#endif
#undef DECLARE_CPU_KERNELS

extern const RecurrentCpuKernel recurrent_reference_forward, recurrent_reference_backward;

namespace {

#if defined(__x86_64__)
#define FLOAT_ISA(kernel) &avx512::kernel, &avx2::kernel, &portable::kernel
#define EVERY_ISA(kernel) &avx512bf16::kernel, FLOAT_ISA(kernel)
#else
#define FLOAT_ISA(kernel) &portable::kernel
#define EVERY_ISA(kernel) FLOAT_ISA(kernel)
#endif

constexpr const RecurrentCpuKernel* forward[] = {
    EVERY_ISA(recurrent_forward), FLOAT_ISA(recurrent_rows_forward), &recurrent_reference_forward};
constexpr const RecurrentCpuKernel* backward[] = {EVERY_ISA(recurrent_backward),
                                                  &recurrent_reference_backward};

}  // namespace

Table<RecurrentCpuKernel> recurrent_cpu_table(RecurrentPass pass) {
  return pass == RecurrentPass::forward ? table_of(forward) : table_of(backward);
}

#if defined(PYSEQNET_WITH_CUDA)
extern const RecurrentCudaKernel recurrent_forward_block, recurrent_backward_block;
extern const RecurrentCudaKernel recurrent_forward_cluster, recurrent_backward_cluster;
extern const RecurrentCudaKernel recurrent_forward_grid, recurrent_backward_grid;
extern const RecurrentCudaKernel recurrent_forward_cuda, recurrent_backward_cuda;
extern const RecurrentCudaKernel recurrent_walk_forward_cuda, recurrent_walk_backward_cuda;

namespace {
constexpr const RecurrentCudaKernel* cuda_forward[] = {&recurrent_forward_block, &recurrent_forward_cluster,
                                                       &recurrent_forward_grid, &recurrent_forward_cuda,
                                                       &recurrent_walk_forward_cuda};
constexpr const RecurrentCudaKernel* cuda_backward[] = {
    &recurrent_backward_block, &recurrent_backward_cluster, &recurrent_backward_grid,
    &recurrent_backward_cuda, &recurrent_walk_backward_cuda};
}  // namespace

Table<RecurrentCudaKernel> recurrent_cuda_table(RecurrentPass pass) {
  return pass == RecurrentPass::forward ? table_of(cuda_forward) : table_of(cuda_backward);
}
#else
Table<RecurrentCudaKernel> recurrent_cuda_table(RecurrentPass) { return {}; }
#endif

bool find_cell(const std::string& name, RecurrentCell& cell) {
  for (int k = 0; k < recurrent_cells; k++)
    if (name == name_of(RecurrentCell(k))) {
      cell = RecurrentCell(k);
      return true;
    }
  return false;
}
bool find_output_unit(const std::string& name, OutputUnit& unit) {
  for (OutputUnit u : {OutputUnit::identity, OutputUnit::tanh, OutputUnit::relu, OutputUnit::sigmoid})
    if (name == name_of(u)) {
      unit = u;
      return true;
    }
  return false;
}

std::string describe(const RecurrentProblem& p) {
  char text[320];
  std::snprintf(text, sizeof text, "%s T%lld B%lld I%lld H%lld%s%lld D%lld %s %s%s%s%s", name_of(p.cell),
                (long long)p.T, (long long)p.B, (long long)p.I, (long long)p.H, p.P ? " P" : " R",
                (long long)p.R(), (long long)p.D, name_of(p.dtype),
                p.packed()  ? "packed"
                : p.lengths ? "lengths"
                            : "dense",
                p.zoneout() ? " zoneout" : "", p.limit != 0 ? " clipped" : "",
                p.reserve ? "" : " without reserve");
  return text;
}

}  // namespace pyseqnet
