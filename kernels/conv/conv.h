// Contract of the convolution family: cross-correlation in two dimensions, grouped, dilated, strided (LeCun
// et al., 1998; Dumoulin & Visin, 2016). One dimension is H = R = P = 1.
//
//   y[n,k,p,q] = bias[k] + sum over c, r, s of  w[k,c,r,s] * x[n, g*C/G + c, p*stride_h + r*dilation_h -
//   pad_h, q*stride_w + s*dilation_w - pad_w]
//
// with g = k / (K/G) the group of filter k; positions outside the image count as zero.
//
// Tensors (all dense, in the problem's dtype, owned by the caller):
//   x, gx  (N, C, H, W)         in `layout`
//   w, gw  (K, C/groups, R, S)  in `filter_layout`
//   y, gy  (N, K, P, Q)         in `layout`
//   bias, gb  (K)
// Accumulation is float32, for float64 it is float64. Every output element is written exactly once; outputs
// need no initialisation. Any extent may be zero (an empty output is no work; an empty sum is 0).
#pragma once
#include <string>

#include "common/dispatch.h"
#include "common/types.h"

namespace pyseqnet {

struct ConvProblem {
  DType dtype = DType::f32;
  Layout layout = Layout::nchw;
  Layout filter_layout = Layout::nchw;
  int64_t N = 0, C = 0, H = 1, W = 0;  // input
  int64_t K = 0, R = 1, S = 0;         // filters
  int64_t P = 1, Q = 0;                // output
  int64_t stride_h = 1, stride_w = 1;
  int64_t pad_h = 0,
          pad_w = 0;  // before the first row and column; what follows the last is implied by P and Q
  int64_t dilation_h = 1, dilation_w = 1;
  int64_t groups = 1;
  // CUDA: whether float32 may be multiplied as TF32 (10 bits of mantissa, sums in float32), as torch's settings
  // say, and whether every tensor begins at a multiple of 16 bytes.
  bool allow_tf32 = false, aligned = true;

  int64_t group_channels() const { return C / groups; }  // input channels a filter sees
  int64_t group_filters() const { return K / groups; }
  bool depthwise() const { return groups == C && groups == K; }
  Strides x_strides() const { return dense_strides(layout, C, H, W); }
  Strides y_strides() const { return dense_strides(layout, K, P, Q); }
  Strides w_strides() const {
    return dense_strides(filter_layout, group_channels(), R, S);
  }  // n = k, h = r, w = s
  double flops() const {
    return 2.0 * double(N) * double(K) * double(P * Q) * double(group_channels() * R * S);
  }
};

// Pointers of one call; a pass reads and writes only what its line names.
//   forward          x, w, bias (may be null) -> y
//   input_gradient   gy, w -> gx
//   weight_gradient  gy, x -> gw
//   bias_gradient    gy -> gb
struct ConvTensors {
  const void *x = nullptr, *w = nullptr, *bias = nullptr, *gy = nullptr;
  void *y = nullptr, *gx = nullptr, *gw = nullptr, *gb = nullptr;
};

enum class ConvPass : int32_t { forward, input_gradient, weight_gradient, bias_gradient };
constexpr const char* operation_of(ConvPass pass) {
  return pass == ConvPass::forward           ? "conv_forward"
         : pass == ConvPass::input_gradient  ? "conv_input_gradient"
         : pass == ConvPass::weight_gradient ? "conv_weight_gradient"
                                             : "conv_bias_gradient";
}

std::string describe(const ConvProblem&);

using ConvCpuKernel = CpuKernel<ConvProblem, ConvTensors>;
using ConvCudaKernel = CudaKernel<ConvProblem, ConvTensors>;
Table<ConvCpuKernel> conv_cpu_table(ConvPass);    // conv_table.cpp
Table<ConvCudaKernel> conv_cuda_table(ConvPass);  // conv_table.cpp; empty without CUDA

}  // namespace pyseqnet
