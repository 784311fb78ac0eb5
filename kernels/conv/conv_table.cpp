// The dispatch tables of the convolution family: ordered, first acceptance wins.
#include <cstdio>

#include "conv/conv.h"

namespace pyseqnet {

#define DECLARE_CPU_KERNELS                                                                                  \
  extern const ConvCpuKernel conv_depthwise_forward, conv_depthwise_input_gradient,                          \
      conv_depthwise_weight_gradient, conv_winograd_forward, conv_winograd_input_gradient,                   \
      conv_winograd_weight_gradient, conv_gemm_forward, conv_gemm_input_gradient, conv_gemm_weight_gradient, \
      conv_bias_gradient
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
extern const ConvCpuKernel conv_gemm_forward, conv_gemm_input_gradient, conv_gemm_weight_gradient;
}
#endif
#undef DECLARE_CPU_KERNELS

extern const ConvCpuKernel conv_reference_forward, conv_reference_input_gradient,
    conv_reference_weight_gradient, conv_reference_bias_gradient;

namespace {

#if defined(__x86_64__)
#define EVERY_ISA(kernel) &avx512::kernel, &avx2::kernel, &portable::kernel
#define ONLY_AVX(kernel) &avx512::kernel, &avx2::kernel,  // with its comma: elsewhere there is nothing
#define WITH_BF16(kernel) &avx512bf16::kernel, EVERY_ISA(kernel)
#else
#define EVERY_ISA(kernel) &portable::kernel
#define ONLY_AVX(kernel)
#define WITH_BF16(kernel) EVERY_ISA(kernel)
#endif

// Depthwise first: it refuses everything that is not depthwise. Winograd refuses what it is slower at.
constexpr const ConvCpuKernel* forward[] = {EVERY_ISA(conv_depthwise_forward),
                                            ONLY_AVX(conv_winograd_forward) WITH_BF16(conv_gemm_forward),
                                            &conv_reference_forward};
constexpr const ConvCpuKernel* input_gradient[] = {EVERY_ISA(conv_depthwise_input_gradient),
                                                   ONLY_AVX(conv_winograd_input_gradient)
                                                       WITH_BF16(conv_gemm_input_gradient),
                                                   &conv_reference_input_gradient};
constexpr const ConvCpuKernel* weight_gradient[] = {EVERY_ISA(conv_depthwise_weight_gradient),
                                                    ONLY_AVX(conv_winograd_weight_gradient)
                                                        WITH_BF16(conv_gemm_weight_gradient),
                                                    &conv_reference_weight_gradient};
constexpr const ConvCpuKernel* bias_gradient[] = {EVERY_ISA(conv_bias_gradient),
                                                  &conv_reference_bias_gradient};

}  // namespace

Table<ConvCpuKernel> conv_cpu_table(ConvPass pass) {
  switch (pass) {
    case ConvPass::forward:
      return table_of(forward);
    case ConvPass::input_gradient:
      return table_of(input_gradient);
    case ConvPass::weight_gradient:
      return table_of(weight_gradient);
    case ConvPass::bias_gradient:
      return table_of(bias_gradient);
  }
  return {};
}

#if defined(PYSEQNET_WITH_CUDA)
extern const ConvCudaKernel conv_gemm_forward_cuda, conv_gemm_input_gradient_cuda,
    conv_gemm_weight_gradient_cuda, conv_bias_gradient_cuda, conv_depthwise_forward_cuda,
    conv_depthwise_input_gradient_cuda, conv_depthwise_weight_gradient_cuda, conv_sm80_forward_cuda,
    conv_sm80_input_gradient_cuda, conv_sm80_weight_gradient_cuda, conv_sm90a_forward_cuda,
    conv_sm90a_input_gradient_cuda, conv_sm90a_weight_gradient_cuda;

namespace {
constexpr const ConvCudaKernel* cuda_forward[] = {&conv_depthwise_forward_cuda, &conv_sm90a_forward_cuda,
                                                  &conv_sm80_forward_cuda, &conv_gemm_forward_cuda};
constexpr const ConvCudaKernel* cuda_input_gradient[] = {
    &conv_depthwise_input_gradient_cuda, &conv_sm90a_input_gradient_cuda, &conv_sm80_input_gradient_cuda,
    &conv_gemm_input_gradient_cuda};
constexpr const ConvCudaKernel* cuda_weight_gradient[] = {
    &conv_depthwise_weight_gradient_cuda, &conv_sm90a_weight_gradient_cuda, &conv_sm80_weight_gradient_cuda,
    &conv_gemm_weight_gradient_cuda};
constexpr const ConvCudaKernel* cuda_bias_gradient[] = {&conv_bias_gradient_cuda};
}  // namespace

Table<ConvCudaKernel> conv_cuda_table(ConvPass pass) {
  switch (pass) {
    case ConvPass::forward:
      return table_of(cuda_forward);
    case ConvPass::input_gradient:
      return table_of(cuda_input_gradient);
    case ConvPass::weight_gradient:
      return table_of(cuda_weight_gradient);
    case ConvPass::bias_gradient:
      return table_of(cuda_bias_gradient);
  }
  return {};
}
#else
Table<ConvCudaKernel> conv_cuda_table(ConvPass) { return {}; }
#endif

std::string describe(const ConvProblem& p) {
  char text[256];
  std::snprintf(
      text, sizeof text,
      "N%lld C%lld %lldx%lld K%lld k%lldx%lld -> %lldx%lld s%lldx%lld p%lldx%lld d%lldx%lld g%lld %s %s",
      (long long)p.N, (long long)p.C, (long long)p.H, (long long)p.W, (long long)p.K, (long long)p.R,
      (long long)p.S, (long long)p.P, (long long)p.Q, (long long)p.stride_h, (long long)p.stride_w,
      (long long)p.pad_h, (long long)p.pad_w, (long long)p.dilation_h, (long long)p.dilation_w,
      (long long)p.groups, name_of(p.dtype), name_of(p.layout));
  return text;
}

}  // namespace pyseqnet
