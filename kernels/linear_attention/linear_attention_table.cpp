// The dispatch tables of the linear-attention family: ordered, first acceptance wins.
#include <cstdio>

#include "linear_attention/linear_attention.h"

namespace pyseqnet {

#define DECLARE_CPU_KERNELS \
  extern const LinearAttentionCpuKernel linear_attention_forward, linear_attention_backward
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

extern const LinearAttentionCpuKernel linear_attention_reference_forward, linear_attention_reference_backward;

namespace {

#if defined(__x86_64__)
#define EVERY_ISA(kernel) &avx512::kernel, &avx2::kernel, &portable::kernel
#else
#define EVERY_ISA(kernel) &portable::kernel
#endif

constexpr const LinearAttentionCpuKernel* forward[] = {EVERY_ISA(linear_attention_forward),
                                                       &linear_attention_reference_forward};
constexpr const LinearAttentionCpuKernel* backward[] = {EVERY_ISA(linear_attention_backward),
                                                        &linear_attention_reference_backward};

}  // namespace

Table<LinearAttentionCpuKernel> linear_attention_cpu_table(LinearAttentionPass pass) {
  return pass == LinearAttentionPass::forward ? table_of(forward) : table_of(backward);
}

#if defined(PYSEQNET_WITH_CUDA)
extern const LinearAttentionCudaKernel linear_attention_forward_sm80, linear_attention_forward_cuda,
    linear_attention_backward_cuda;

namespace {
constexpr const LinearAttentionCudaKernel* cuda_forward[] = {&linear_attention_forward_sm80,
                                                             &linear_attention_forward_cuda};
constexpr const LinearAttentionCudaKernel* cuda_backward[] = {&linear_attention_backward_cuda};
}  // namespace

Table<LinearAttentionCudaKernel> linear_attention_cuda_table(LinearAttentionPass pass) {
  return pass == LinearAttentionPass::forward ? table_of(cuda_forward) : table_of(cuda_backward);
}
#else
Table<LinearAttentionCudaKernel> linear_attention_cuda_table(LinearAttentionPass) { return {}; }
#endif

std::string describe(const LinearAttentionProblem& p) {
  char text[256];
  std::snprintf(text, sizeof text, "B%lld H%lld L%lld S%lld D%lld E%lld %s%s%s%s%s %s", (long long)p.B,
                (long long)p.H, (long long)p.L, (long long)p.S, (long long)p.D, (long long)p.E,
                name_of(p.feature_map), p.causal ? " causal" : "", p.normalize ? " normalised" : "",
                p.decayed ? " decayed" : "", p.packed ? " packed" : "", name_of(p.dtype));
  return text;
}

}  // namespace pyseqnet
