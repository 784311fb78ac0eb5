// The dispatch tables of additive attention: ordered, first acceptance wins.
#include <cstdio>

#include "attention/additive.h"

namespace pyseqnet {

#define DECLARE_CPU_KERNELS \
  extern const AdditiveCpuKernel additive_tile_forward, additive_tile_weights, additive_tile_backward
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
#endif
#undef DECLARE_CPU_KERNELS

extern const AdditiveCpuKernel additive_reference_forward, additive_reference_weights,
    additive_reference_backward;

namespace {

#if defined(__x86_64__)
#define EVERY_ISA(kernel) &avx512::kernel, &avx2::kernel, &portable::kernel
#else
#define EVERY_ISA(kernel) &portable::kernel
#endif

constexpr const AdditiveCpuKernel* forward[] = {EVERY_ISA(additive_tile_forward),
                                                &additive_reference_forward};
constexpr const AdditiveCpuKernel* weights[] = {EVERY_ISA(additive_tile_weights),
                                                &additive_reference_weights};
constexpr const AdditiveCpuKernel* backward[] = {EVERY_ISA(additive_tile_backward),
                                                 &additive_reference_backward};

}  // namespace

Table<AdditiveCpuKernel> additive_cpu_table(AdditivePass pass) {
  switch (pass) {
    case AdditivePass::forward:
      return table_of(forward);
    case AdditivePass::weights:
      return table_of(weights);
    case AdditivePass::backward:
      return table_of(backward);
  }
  return {};
}

#if defined(PYSEQNET_WITH_CUDA)
extern const AdditiveCudaKernel additive_forward_cuda, additive_weights_cuda, additive_backward_cuda;

namespace {
constexpr const AdditiveCudaKernel* cuda_forward[] = {&additive_forward_cuda};
constexpr const AdditiveCudaKernel* cuda_weights[] = {&additive_weights_cuda};
constexpr const AdditiveCudaKernel* cuda_backward[] = {&additive_backward_cuda};
}  // namespace

Table<AdditiveCudaKernel> additive_cuda_table(AdditivePass pass) {
  switch (pass) {
    case AdditivePass::forward:
      return table_of(cuda_forward);
    case AdditivePass::weights:
      return table_of(cuda_weights);
    case AdditivePass::backward:
      return table_of(cuda_backward);
  }
  return {};
}
#else
Table<AdditiveCudaKernel> additive_cuda_table(AdditivePass) { return {}; }
#endif

std::string describe(const AdditiveProblem& p) {
  char text[160];
  std::snprintf(text, sizeof text, "B%lld L%lld S%lld D%lld E%lld %s%s%s", (long long)p.B, (long long)p.L,
                (long long)p.S, (long long)p.D, (long long)p.E, name_of(p.dtype), p.with_bias ? " bias" : "",
                p.with_key_lengths ? " lengths" : "");
  return text;
}

}  // namespace pyseqnet
