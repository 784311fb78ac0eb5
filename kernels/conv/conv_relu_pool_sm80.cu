// The fused block's forward pass on tensor cores: one kernel (gathered_product, conv_sm80.cuh) whose tiles hold
// whole pooling windows. The 128 pixels of a tile are listed window by window, so that after bias and rounding
// the tile in shared memory is reduced by one thread a window and channel, which writes y and one byte. The
// convolution's output reaches no memory beyond shared. Without pooling the same kernel applies ReLU.
//
// Windows that overlap would be computed more than once, and are left to the composed kernels; so are windows
// that do not fit a tile.
//
// Bound: the convolution's, and less than it in memory. Predicted for an H200, 64x64x56x56 bfloat16
// channels-last, 64 filters 3x3, 2x2 windows: reads 25.7 MB, writes 6.4 + 3.2 MB, 14.8 GFLOP: at about 350
// TFLOP/s of mma.sync 42 us; the separate layers move 25.7 + 3 x 25.7 + 6.4 + 25.7 MB (int64 argmax) beside
// the same product. A first layer of one channel (64x1x28x28, 32 filters 5x5): 0.1 + 0.8 + 0.4 MB, launch
// latency of three kernels, about 8 us.
#include "conv/conv_relu_pool.h"
#include "conv/conv_sm80.h"

namespace pyseqnet {
namespace {

Refusal refuses(const ConvReluPoolProblem& f) {
  if (const Refusal why = refuse_tensor_cores(f.conv)) return why;
  if (!f.pooled) return accepted;
  if (f.U == 0 || f.V == 0) return "there are no windows";
  if (!f.disjoint()) return "windows overlap: pixels would be computed more than once";
  if (f.window() > product_rows) return "a window of more than 128 pixels does not fit a tile";
  return accepted;
}

int64_t workspace_bytes(const ConvReluPoolProblem& f) {
  return product_workspace_sm80(ConvPass::forward, f.conv);
}

int launch_forward(const ConvReluPoolProblem& f, const ConvReluPoolTensors& t, void* workspace,
                   void* stream) {
  ConvEpilogue epilogue;
  epilogue.relu = true, epilogue.pooled = f.pooled;
  epilogue.pool_h = f.pool_h, epilogue.pool_w = f.pool_w;
  epilogue.pool_stride_h = f.pool_stride_h, epilogue.pool_stride_w = f.pool_stride_w;
  epilogue.U = f.U, epilogue.V = f.V;
  epilogue.arg = f.with_arg && f.pooled ? static_cast<uint8_t*>(t.arg) : nullptr;
  ConvTensors c;
  c.x = t.x, c.w = t.w, c.bias = t.bias, c.y = t.y;
  return launch_product_sm80(ConvPass::forward, f.conv, c, epilogue, workspace, stream);
}

}  // namespace

extern const ConvReluPoolCudaKernel conv_relu_pool_sm80_forward_cuda;
const ConvReluPoolCudaKernel conv_relu_pool_sm80_forward_cuda = {
    "fused_sm80", 80, 0, refuses, workspace_bytes, launch_forward};

}  // namespace pyseqnet
