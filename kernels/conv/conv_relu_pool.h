// Contract of the fused block: convolution, bias, ReLU and max-pooling as one operation. Its definition are
// the separate layers, each rounding to the stored type:
//
//   z = conv(x, w) + bias                                  conv.h
//   y[n,k,u,v] = max over i < pool_h, j < pool_w of  max(0, z[n, k, u*pool_stride_h + i, v*pool_stride_w +
//   j])
//
// z never exists as a result: what the backward pass needs of it is one small integer an element of y.
//   arg[n,k,u,v] = i * pool_w + j of the tap that won, or closed() where no tap is positive: there ReLU's
//   gradient, 0, is all that flows back.
// Of equal taps the first wins; a NaN wins over everything, the last of them over the others: as torch's
// max_pool2d does. Windows lie inside z: there is no padding and no dilation of the pool.
//
// Without pooling (pooled = false: windows of one pixel, U = P and V = Q) there is no arg either: y <= 0 says
// which pixels are closed, so y itself is what is kept. A NaN is open.
//
// Tensors (all dense, owned by the caller):
//   x, gx, w, gw, bias, gb   as in conv.h
//   y, gy  (N, K, U, V)      in conv.layout
//   arg    (N, K, U, V)      in conv.layout, uint8; int32 where the window has more than 255 taps
// Accumulation, and outputs, as in conv.h.
#pragma once
#include <string>

#include "conv/conv.h"

namespace pyseqnet {

struct ConvReluPoolProblem {
  ConvProblem conv;
  bool pooled = true;
  int64_t pool_h = 1, pool_w = 1, pool_stride_h = 1, pool_stride_w = 1;
  int64_t U = 1, V = 0;  // output
  bool with_arg = true;  // forward: whether arg is wanted

  int64_t window() const { return pool_h * pool_w; }
  int64_t closed() const { return window(); }
  bool wide_arg() const { return window() > 255; }
  // No pixel is in two windows.
  bool disjoint() const { return (pool_stride_h >= pool_h || U <= 1) && (pool_stride_w >= pool_w || V <= 1); }
  Strides y_strides() const { return dense_strides(conv.layout, conv.K, U, V); }
};

// Pointers of one call; a pass reads and writes only what its line names. `arg` is y where nothing is pooled.
//   forward          x, w, bias (may be null) -> y, arg (null unless with_arg)
//   input_gradient   gy, arg, w -> gx
//   weight_gradient  gy, arg, x -> gw
//   bias_gradient    gy, arg -> gb
// Gradients whose kernels share one run() are computed by one call, which writes those that are not null.
struct ConvReluPoolTensors {
  const void *x = nullptr, *w = nullptr, *bias = nullptr, *gy = nullptr;
  void *y = nullptr, *arg = nullptr, *gx = nullptr, *gw = nullptr, *gb = nullptr;
};

constexpr const char* fused_operation_of(ConvPass pass) {
  return pass == ConvPass::forward           ? "conv_relu_pool_forward"
         : pass == ConvPass::input_gradient  ? "conv_relu_pool_input_gradient"
         : pass == ConvPass::weight_gradient ? "conv_relu_pool_weight_gradient"
                                             : "conv_relu_pool_bias_gradient";
}

std::string describe(const ConvReluPoolProblem&);

using ConvReluPoolCpuKernel = CpuKernel<ConvReluPoolProblem, ConvReluPoolTensors>;
using ConvReluPoolCudaKernel = CudaKernel<ConvReluPoolProblem, ConvReluPoolTensors>;
Table<ConvReluPoolCpuKernel> conv_relu_pool_cpu_table(ConvPass);    // conv_relu_pool_table.cpp
Table<ConvReluPoolCudaKernel> conv_relu_pool_cuda_table(ConvPass);  // the same; empty without CUDA

}  // namespace pyseqnet
