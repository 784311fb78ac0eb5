// Contract of the max-pooling family (Yamaguchi et al., 1990), two-dimensional; one dimension is H = R = P
// = 1.
//
//   y[n,c,p,q] = maximum over r < R, s < S of  x[n, c, p*stride_h + r*dilation_h - pad_h, q*stride_w +
//   s*dilation_w - pad_w]
//
// over the taps inside the image. Rules, those of torch:
//   - padding never wins, not even against -inf: a window of -inf only reports its first tap inside the
//   image;
//   - of equal maxima the first tap (row-major) wins;
//   - a NaN wins, the last NaN of a window over earlier ones.
//
// Tensors (dense, owned by the caller):
//   x, gx    (N, C, H, W)   in `layout`, in the problem's dtype
//   y, gy    (N, C, P, Q)   likewise
//   arg      (N, C, P, Q)   in `layout`: the tap r*S + s that won. One byte an element where R*S <= 256, else
//   an int32 indices  (N, C, P, Q)   in `layout`, int64: torch's h*W + w of the winner
// `arg` is what backward needs: one byte where torch keeps eight. Indices are derived from it when asked for.
#pragma once
#include <string>

#include "common/dispatch.h"
#include "common/types.h"

namespace pyseqnet {

struct MaxPoolProblem {
  DType dtype = DType::f32;
  Layout layout = Layout::nchw;
  int64_t N = 0, C = 0, H = 1, W = 0;  // input
  int64_t P = 1, Q = 0;                // output
  int64_t R = 1, S = 1;                // window
  int64_t stride_h = 1, stride_w = 1, pad_h = 0, pad_w = 0, dilation_h = 1, dilation_w = 1;
  bool with_arg = true;  // forward: whether arg is written

  bool wide_arg() const { return R * S > 256; }
  int64_t arg_bytes() const { return wide_arg() ? 4 : 1; }
  Strides x_strides() const { return dense_strides(layout, C, H, W); }
  Strides y_strides() const { return dense_strides(layout, C, P, Q); }
};

// Pointers of one call.
//   forward   x -> y, arg (null unless with_arg)
//   backward  gy, arg -> gx (every element written; a pixel that won several windows gets their sum)
//   indices   arg -> indices
struct MaxPoolTensors {
  const void *x = nullptr, *gy = nullptr;
  void *y = nullptr, *gx = nullptr;
  void* arg = nullptr;
  int64_t* indices = nullptr;
};

enum class MaxPoolPass : int32_t { forward, backward, indices };
constexpr const char* operation_of(MaxPoolPass pass) {
  return pass == MaxPoolPass::forward    ? "max_pool_forward"
         : pass == MaxPoolPass::backward ? "max_pool_backward"
                                         : "max_pool_indices";
}

std::string describe(const MaxPoolProblem&);

using MaxPoolCpuKernel = CpuKernel<MaxPoolProblem, MaxPoolTensors>;
using MaxPoolCudaKernel = CudaKernel<MaxPoolProblem, MaxPoolTensors>;
Table<MaxPoolCpuKernel> max_pool_cpu_table(MaxPoolPass);    // max_pool_table.cpp
Table<MaxPoolCudaKernel> max_pool_cuda_table(MaxPoolPass);  // max_pool_table.cpp; empty without CUDA

}  // namespace pyseqnet
