// The dispatch tables of the attention family: ordered, first acceptance wins.
#include <cstdio>

#include "attention/attention.h"

namespace pyseqnet {

#define DECLARE_CPU_KERNELS                                                                                \
  extern const AttentionCpuKernel attention_tile_forward, attention_tile_weights, attention_tile_backward, \
      attention_tile_bias_gradient, attention_rows_delta, attention_few_queries_forward,                   \
      attention_few_queries_backward
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
extern const AttentionCpuKernel attention_tile_forward, attention_tile_weights, attention_tile_backward,
    attention_tile_bias_gradient;
}
#endif
#undef DECLARE_CPU_KERNELS

extern const AttentionCpuKernel attention_reference_forward, attention_reference_weights,
    attention_reference_delta, attention_reference_backward, attention_reference_bias_gradient;

namespace {

#if defined(__x86_64__)
#define EVERY_ISA(kernel) &avx512::kernel, &avx2::kernel, &portable::kernel
#define WITH_BF16(kernel) &avx512bf16::kernel, EVERY_ISA(kernel)
#else
#define EVERY_ISA(kernel) &portable::kernel
#define WITH_BF16(kernel) EVERY_ISA(kernel)
#endif

constexpr const AttentionCpuKernel* forward[] = {EVERY_ISA(attention_few_queries_forward),
                                                 WITH_BF16(attention_tile_forward),
                                                 &attention_reference_forward};
constexpr const AttentionCpuKernel* weights[] = {WITH_BF16(attention_tile_weights),
                                                 &attention_reference_weights};
constexpr const AttentionCpuKernel* delta[] = {EVERY_ISA(attention_rows_delta), &attention_reference_delta};
constexpr const AttentionCpuKernel* backward[] = {EVERY_ISA(attention_few_queries_backward),
                                                  WITH_BF16(attention_tile_backward),
                                                  &attention_reference_backward};
constexpr const AttentionCpuKernel* bias_gradient[] = {WITH_BF16(attention_tile_bias_gradient),
                                                       &attention_reference_bias_gradient};

}  // namespace

Table<AttentionCpuKernel> attention_cpu_table(AttentionPass pass) {
  switch (pass) {
    case AttentionPass::forward:
      return table_of(forward);
    case AttentionPass::weights:
      return table_of(weights);
    case AttentionPass::delta:
      return table_of(delta);
    case AttentionPass::backward:
      return table_of(backward);
    case AttentionPass::bias_gradient:
      return table_of(bias_gradient);
  }
  return {};
}

#if defined(PYSEQNET_WITH_CUDA)
extern const AttentionCudaKernel attention_forward_cuda, attention_weights_cuda, attention_delta_cuda,
    attention_backward_cuda, attention_bias_gradient_cuda, attention_forward_sm80, attention_forward_sm90a,
    attention_backward_sm80;

namespace {
constexpr const AttentionCudaKernel* cuda_forward[] = {&attention_forward_sm90a, &attention_forward_sm80,
                                                       &attention_forward_cuda};
constexpr const AttentionCudaKernel* cuda_weights[] = {&attention_weights_cuda};
constexpr const AttentionCudaKernel* cuda_delta[] = {&attention_delta_cuda};
constexpr const AttentionCudaKernel* cuda_backward[] = {&attention_backward_sm80, &attention_backward_cuda};
constexpr const AttentionCudaKernel* cuda_bias_gradient[] = {&attention_bias_gradient_cuda};
}  // namespace

Table<AttentionCudaKernel> attention_cuda_table(AttentionPass pass) {
  switch (pass) {
    case AttentionPass::forward:
      return table_of(cuda_forward);
    case AttentionPass::weights:
      return table_of(cuda_weights);
    case AttentionPass::delta:
      return table_of(cuda_delta);
    case AttentionPass::backward:
      return table_of(cuda_backward);
    case AttentionPass::bias_gradient:
      return table_of(cuda_bias_gradient);
  }
  return {};
}
#else
Table<AttentionCudaKernel> attention_cuda_table(AttentionPass) { return {}; }
#endif

std::string describe(const AttentionProblem& p) {
  char heads[48], pattern[48] = "", text[320];
  std::snprintf(heads, sizeof heads, p.H == p.Hk ? "H%lld" : "H%lld/%lld", (long long)p.H, (long long)p.Hk);
  if (p.with_blocks)
    std::snprintf(pattern, sizeof pattern, " pattern(%lld tiles)", (long long)p.block_entries);
  std::snprintf(text, sizeof text, "B%lld %s L%lld S%lld D%lld E%lld %s%s%s%s%s%s%s%s%s%s", (long long)p.B,
                heads, (long long)p.L, (long long)p.S, (long long)p.D, (long long)p.E, name_of(p.dtype),
                p.packed ? " packed" : "", p.causal ? " causal" : "", p.with_mask ? " mask" : "",
                p.with_bias ? " bias" : "", p.with_slopes ? " alibi" : "", pattern,
                p.softcap > 0 ? " softcap" : "", p.with_key_lengths ? " lengths" : "",
                p.dropout_p > 0 ? " dropout" : "");
  return text;
}

}  // namespace pyseqnet
