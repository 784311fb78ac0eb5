// The dispatch tables of the max-pooling family: ordered, first acceptance wins.
#include <cstdio>

#include "pool/max_pool.h"

namespace pyseqnet {

#define DECLARE_CPU_KERNELS \
  extern const MaxPoolCpuKernel max_pool_forward, max_pool_backward, max_pool_indices
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

extern const MaxPoolCpuKernel max_pool_reference_forward, max_pool_reference_backward,
    max_pool_reference_indices;

namespace {

#if defined(__x86_64__)
#define EVERY_ISA(kernel) &avx512::kernel, &avx2::kernel, &portable::kernel
#else
#define EVERY_ISA(kernel) &portable::kernel
#endif

constexpr const MaxPoolCpuKernel* forward[] = {EVERY_ISA(max_pool_forward), &max_pool_reference_forward};
constexpr const MaxPoolCpuKernel* backward[] = {EVERY_ISA(max_pool_backward), &max_pool_reference_backward};
constexpr const MaxPoolCpuKernel* indices[] = {EVERY_ISA(max_pool_indices), &max_pool_reference_indices};

}  // namespace

Table<MaxPoolCpuKernel> max_pool_cpu_table(MaxPoolPass pass) {
  switch (pass) {
    case MaxPoolPass::forward:
      return table_of(forward);
    case MaxPoolPass::backward:
      return table_of(backward);
    case MaxPoolPass::indices:
      return table_of(indices);
  }
  return {};
}

#if defined(PYSEQNET_WITH_CUDA)
extern const MaxPoolCudaKernel max_pool_forward_cuda, max_pool_backward_cuda, max_pool_indices_cuda;

namespace {
constexpr const MaxPoolCudaKernel* cuda_forward[] = {&max_pool_forward_cuda};
constexpr const MaxPoolCudaKernel* cuda_backward[] = {&max_pool_backward_cuda};
constexpr const MaxPoolCudaKernel* cuda_indices[] = {&max_pool_indices_cuda};
}  // namespace

Table<MaxPoolCudaKernel> max_pool_cuda_table(MaxPoolPass pass) {
  switch (pass) {
    case MaxPoolPass::forward:
      return table_of(cuda_forward);
    case MaxPoolPass::backward:
      return table_of(cuda_backward);
    case MaxPoolPass::indices:
      return table_of(cuda_indices);
  }
  return {};
}
#else
Table<MaxPoolCudaKernel> max_pool_cuda_table(MaxPoolPass) { return {}; }
#endif

std::string describe(const MaxPoolProblem& p) {
  char text[256];
  std::snprintf(
      text, sizeof text,
      "N%lld C%lld %lldx%lld window %lldx%lld -> %lldx%lld s%lldx%lld p%lldx%lld d%lldx%lld %s %s%s",
      (long long)p.N, (long long)p.C, (long long)p.H, (long long)p.W, (long long)p.R, (long long)p.S,
      (long long)p.P, (long long)p.Q, (long long)p.stride_h, (long long)p.stride_w, (long long)p.pad_h,
      (long long)p.pad_w, (long long)p.dilation_h, (long long)p.dilation_w, name_of(p.dtype),
      name_of(p.layout), p.with_arg ? "" : " without arg");
  return text;
}

}  // namespace pyseqnet
