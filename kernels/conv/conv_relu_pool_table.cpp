// The dispatch tables of the fused block: ordered, first acceptance wins.
#include "conv/conv_relu_pool.h"

namespace pyseqnet {

#define DECLARE_CPU_KERNELS                                                            \
  extern const ConvReluPoolCpuKernel conv_relu_pool_composed_forward,                  \
      conv_relu_pool_composed_input_gradient, conv_relu_pool_composed_weight_gradient, \
      conv_relu_pool_bias_gradient, conv_relu_pool_sparse_input_gradient,              \
      conv_relu_pool_sparse_weight_gradient, conv_relu_pool_tile_forward,              \
      conv_relu_pool_blocks_weight_gradient
namespace portable {
DECLARE_CPU_KERNELS;
}
#if defined(__x86_64__)
namespace avx2 {
DECLARE_CPU_KERNELS;
}
namespace avx512 {
DECLARE_CPU_KERNELS;
extern const ConvReluPoolCpuKernel conv_relu_pool_blocks_input_gradient,
    conv_relu_pool_windows_input_gradient, conv_relu_pool_windows_weight_gradient,
    conv_relu_pool_windows_bias_gradient;
}  // namespace avx512
#endif
#undef DECLARE_CPU_KERNELS

extern const ConvReluPoolCpuKernel conv_relu_pool_reference_forward, conv_relu_pool_reference_input_gradient,
    conv_relu_pool_reference_weight_gradient, conv_relu_pool_reference_bias_gradient;

namespace {

#if defined(__x86_64__)
#define EVERY_ISA(kernel) &avx512::kernel, &avx2::kernel, &portable::kernel
#define ONLY_AVX512(kernel) &avx512::kernel,  // with its comma: elsewhere there is nothing
#else
#define EVERY_ISA(kernel) &portable::kernel
#define ONLY_AVX512(kernel)
#endif

constexpr const ConvReluPoolCpuKernel* forward[] = {EVERY_ISA(conv_relu_pool_tile_forward),
                                                    EVERY_ISA(conv_relu_pool_composed_forward),
                                                    &conv_relu_pool_reference_forward};
constexpr const ConvReluPoolCpuKernel* input_gradient[] = {
    ONLY_AVX512(conv_relu_pool_windows_input_gradient) EVERY_ISA(conv_relu_pool_sparse_input_gradient),
    ONLY_AVX512(conv_relu_pool_blocks_input_gradient) EVERY_ISA(conv_relu_pool_composed_input_gradient),
    &conv_relu_pool_reference_input_gradient};
constexpr const ConvReluPoolCpuKernel* weight_gradient[] = {
    ONLY_AVX512(conv_relu_pool_windows_weight_gradient) EVERY_ISA(conv_relu_pool_sparse_weight_gradient),
    EVERY_ISA(conv_relu_pool_blocks_weight_gradient), EVERY_ISA(conv_relu_pool_composed_weight_gradient),
    &conv_relu_pool_reference_weight_gradient};
constexpr const ConvReluPoolCpuKernel* bias_gradient[] = {ONLY_AVX512(conv_relu_pool_windows_bias_gradient)
                                                              EVERY_ISA(conv_relu_pool_bias_gradient),
                                                          &conv_relu_pool_reference_bias_gradient};

}  // namespace

Table<ConvReluPoolCpuKernel> conv_relu_pool_cpu_table(ConvPass pass) {
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
extern const ConvReluPoolCudaKernel conv_relu_pool_forward_cuda, conv_relu_pool_input_gradient_cuda,
    conv_relu_pool_weight_gradient_cuda, conv_relu_pool_bias_gradient_cuda, conv_relu_pool_sm80_forward_cuda;

namespace {
constexpr const ConvReluPoolCudaKernel* cuda_forward[] = {&conv_relu_pool_sm80_forward_cuda,
                                                          &conv_relu_pool_forward_cuda};
constexpr const ConvReluPoolCudaKernel* cuda_input_gradient[] = {&conv_relu_pool_input_gradient_cuda};
constexpr const ConvReluPoolCudaKernel* cuda_weight_gradient[] = {&conv_relu_pool_weight_gradient_cuda};
constexpr const ConvReluPoolCudaKernel* cuda_bias_gradient[] = {&conv_relu_pool_bias_gradient_cuda};
}  // namespace

Table<ConvReluPoolCudaKernel> conv_relu_pool_cuda_table(ConvPass pass) {
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
Table<ConvReluPoolCudaKernel> conv_relu_pool_cuda_table(ConvPass) { return {}; }
#endif

std::string describe(const ConvReluPoolProblem& p) {
  std::string text = describe(p.conv) + " relu";
  if (p.pooled)
    text += " pool " + std::to_string(p.pool_h) + "x" + std::to_string(p.pool_w) + " s" +
            std::to_string(p.pool_stride_h) + "x" + std::to_string(p.pool_stride_w) + " -> " +
            std::to_string(p.U) + "x" + std::to_string(p.V);
  return text;
}

}  // namespace pyseqnet
