// Convolution fused with ReLU and max-pooling at the border to torch: reads shapes, allocates, hands the
// problem to the dispatch tables.
#include "conv/conv_relu_pool.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "conv_geometry.h"
#include "run_on_cpu.h"
#if defined(PYSEQNET_WITH_CUDA)
#include "run_on_cuda.h"
#endif

namespace pyseqnet {
namespace {

using torch::headeronly::ScalarType;

struct PoolGeometry {
  int64_t window_h, window_w, stride_h, stride_w;
};

ConvReluPoolProblem make_problem(const Tensor& x, const Tensor& w, const ConvGeometry& conv,
                                 const PoolGeometry& pool) {
  ConvReluPoolProblem p;
  p.conv = conv_problem(x, w, conv);
  require(pool.window_h > 0 && pool.window_w > 0 && pool.stride_h > 0 && pool.stride_w > 0,
          "conv_relu_pool: pool size and pool stride must be positive");
  require(pool.window_h <= p.conv.P && pool.window_w <= p.conv.Q,
          "conv_relu_pool: the pool's window is larger than the convolution's output");
  require(product_fits({pool.window_h, pool.window_w}) && pool.window_h * pool.window_w < (int64_t(1) << 31),
          "conv_relu_pool: the pool's window has too many taps");
  require(product_fits({p.conv.N, p.conv.K, p.conv.P, p.conv.Q}),
          "conv_relu_pool: the convolution's output is too large");
  p.pooled = pool.window_h != 1 || pool.window_w != 1 || pool.stride_h != 1 || pool.stride_w != 1;
  p.pool_h = pool.window_h, p.pool_w = pool.window_w;
  p.U = (p.conv.P - p.pool_h) / pool.stride_h + 1, p.V = (p.conv.Q - p.pool_w) / pool.stride_w + 1;
  // A step that is never taken may be shortened: however large it was, kernels may multiply with it.
  p.pool_stride_h = std::min(pool.stride_h, p.conv.P), p.pool_stride_w = std::min(pool.stride_w, p.conv.Q);
  return p;
}

ScalarType arg_type(const ConvReluPoolProblem& p) {
  return p.wide_arg() ? ScalarType::Int : ScalarType::Byte;
}

// Runs the forward pass, or all gradients whose pointers are set, on the device that `like` is on.
using Run = void (*)(ConvReluPoolProblem, const ConvReluPoolTensors&, const Tensor& like);

constexpr ConvPass gradient_passes[] = {ConvPass::input_gradient, ConvPass::weight_gradient,
                                        ConvPass::bias_gradient};
const void* output_of(ConvPass pass, const ConvReluPoolTensors& t) {
  return pass == ConvPass::input_gradient ? t.gx : pass == ConvPass::weight_gradient ? t.gw : t.gb;
}

void run_pass_on_cpu(ConvPass pass, const ConvReluPoolProblem& p, const ConvReluPoolTensors& t,
                     const Tensor& like) {
  run_on_cpu("conv_relu_pool", fused_operation_of(pass), conv_relu_pool_cpu_table(pass), p, t, like);
}
void run_forward_on_cpu(ConvReluPoolProblem p, const ConvReluPoolTensors& t, const Tensor& like) {
  run_pass_on_cpu(ConvPass::forward, p, t, like);
}
// One sweep where all the gradients have the same kernel.
void run_gradients_on_cpu(ConvReluPoolProblem p, const ConvReluPoolTensors& t, const Tensor& like) {
  const ConvReluPoolCpuKernel* kernels[3];
  int wanted = 0;
  bool same = true;
  for (ConvPass pass : gradient_passes) {
    if (!output_of(pass, t)) continue;
    kernels[wanted] =
        kernel_on_cpu("conv_relu_pool", fused_operation_of(pass), conv_relu_pool_cpu_table(pass), p);
    same = same && kernels[wanted]->run == kernels[0]->run;
    wanted++;
  }
  if (wanted > 0 && same) return run_plan(*kernels[0], p, t, like);
  const ConvReluPoolCpuKernel** next = kernels;
  for (ConvPass pass : gradient_passes) {
    if (!output_of(pass, t)) continue;
    ConvReluPoolTensors only = t;
    only.gx = pass == ConvPass::input_gradient ? t.gx : nullptr;
    only.gw = pass == ConvPass::weight_gradient ? t.gw : nullptr;
    only.gb = pass == ConvPass::bias_gradient ? t.gb : nullptr;
    run_plan(**next++, p, only, like);
  }
}

std::tuple<Tensor, Tensor> forward(const Tensor& input, const Tensor& weight,
                                   const std::optional<Tensor>& bias, const ConvGeometry& conv,
                                   const PoolGeometry& pool, bool with_arg, bool allow_tf32, Run run) {
  ConvReluPoolProblem p = make_problem(input, weight, conv, pool);
  p.conv.allow_tf32 = allow_tf32;
  p.with_arg = with_arg && p.pooled;
  const Layout layout = p.conv.layout;
  const Tensor x = dense(input, layout), w = dense(weight, p.conv.filter_layout);
  ConvReluPoolTensors t;
  t.x = x.const_data_ptr(), t.w = w.const_data_ptr();
  Tensor b = x;
  if (bias) {
    require(bias->dim() == 1 && bias->size(0) == p.conv.K,
            "conv: bias must have one element per output channel");
    require(dtype_of(*bias) == p.conv.dtype && bias->device() == x.device(),
            "conv: bias must have the input's dtype and device");
    b = dense(*bias, Layout::nchw);
    t.bias = b.const_data_ptr();
  }
  const ImageShape out{p.conv.N, p.conv.K, p.U, p.V};
  Tensor y = new_image(x, out, layout, x.dim(), x.scalar_type());
  Tensor arg = p.with_arg ? new_image(x, out, layout, x.dim(), arg_type(p)) : new_vector(x, 0, arg_type(p));
  t.y = y.mutable_data_ptr();
  if (p.with_arg) t.arg = arg.mutable_data_ptr();
  p.conv.aligned = all_aligned(t.x, t.w, t.bias);
  run(p, t, x);
  return {y, arg};
}

bool has_output_shape(const Tensor& t, const ConvReluPoolProblem& p, int64_t rank) {
  const ImageShape s = image_shape(t, "conv_relu_pool: grad_output and saved must have 3 or 4 dimensions");
  return t.dim() == rank && s.n == p.conv.N && s.c == p.conv.K && s.h == p.U && s.w == p.V;
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& saved,
                                            const Tensor& input, const Tensor& weight,
                                            const ConvGeometry& conv, const PoolGeometry& pool,
                                            bool need_input, bool need_weight, bool need_bias,
                                            bool allow_tf32, Run run) {
  ConvReluPoolProblem p = make_problem(input, weight, conv, pool);
  p.conv.allow_tf32 = allow_tf32;
  const Layout layout = p.conv.layout;
  require(has_output_shape(grad_output, p, input.dim()),
          "conv_relu_pool: grad_output does not have the output's shape");
  require(dtype_of(grad_output) == p.conv.dtype && grad_output.device() == input.device(),
          "conv_relu_pool: grad_output must have the input's dtype and device");
  require(has_output_shape(saved, p, input.dim()), "conv_relu_pool: saved does not have the output's shape");
  require(saved.scalar_type() == (p.pooled ? arg_type(p) : input.scalar_type()) &&
              saved.device() == input.device(),
          "conv_relu_pool: saved must be forward's arg, or its output where nothing is pooled");
  const ScalarType type = input.scalar_type();
  const Tensor gy = dense(grad_output, layout), arg = dense(saved, layout);
  // What nobody needs is empty; each of them its own, since results of an operation may not alias.
  Tensor gx = new_vector(gy, 0, type), gw = new_vector(gy, 0, type), gb = new_vector(gy, 0, type);
  ConvReluPoolTensors t;
  t.gy = gy.const_data_ptr();
  t.arg = const_cast<void*>(arg.const_data_ptr());
  const Tensor w = need_input ? dense(weight, p.conv.filter_layout) : gy;
  const Tensor x = need_weight ? dense(input, layout) : gy;
  if (need_input) {
    gx = new_image(gy, {p.conv.N, p.conv.C, p.conv.H, p.conv.W}, layout, input.dim(), type);
    t.w = w.const_data_ptr(), t.gx = gx.mutable_data_ptr();
  }
  if (need_weight) {
    gw = new_image(gy, {p.conv.K, p.conv.group_channels(), p.conv.R, p.conv.S}, p.conv.filter_layout,
                   weight.dim(), type);
    t.x = x.const_data_ptr(), t.gw = gw.mutable_data_ptr();
  }
  if (need_bias) {
    gb = new_vector(gy, p.conv.K, type);
    t.gb = gb.mutable_data_ptr();
  }
  run(p, t, gy);
  return {gx, gw, gb};
}

#define POOL_GEOMETRY_PARAMETERS int64_t pool_h, int64_t pool_w, int64_t pool_stride_h, int64_t pool_stride_w
#define POOL_GEOMETRY \
  PoolGeometry { pool_h, pool_w, pool_stride_h, pool_stride_w }

std::tuple<Tensor, Tensor> forward_cpu(const Tensor& input, const Tensor& weight, std::optional<Tensor> bias,
                                       CONV_GEOMETRY_PARAMETERS, POOL_GEOMETRY_PARAMETERS, bool with_arg,
                                       bool allow_tf32) {
  return forward(input, weight, bias, CONV_GEOMETRY, POOL_GEOMETRY, with_arg, allow_tf32, run_forward_on_cpu);
}
std::tuple<Tensor, Tensor, Tensor> backward_cpu(const Tensor& grad_output, const Tensor& saved,
                                                const Tensor& input, const Tensor& weight,
                                                CONV_GEOMETRY_PARAMETERS, POOL_GEOMETRY_PARAMETERS,
                                                bool need_input, bool need_weight, bool need_bias,
                                                bool allow_tf32) {
  return backward(grad_output, saved, input, weight, CONV_GEOMETRY, POOL_GEOMETRY, need_input, need_weight,
                  need_bias, allow_tf32, run_gradients_on_cpu);
}

STABLE_TORCH_LIBRARY_IMPL(pyseqnet, CPU, m) {
  m.impl("conv_relu_pool_forward", TORCH_BOX(&forward_cpu));
  m.impl("conv_relu_pool_backward", TORCH_BOX(&backward_cpu));
}

#if defined(PYSEQNET_WITH_CUDA)
void run_pass_on_cuda(ConvPass pass, const ConvReluPoolProblem& p, const ConvReluPoolTensors& t,
                      const Tensor& like) {
  run_on_cuda("conv_relu_pool", fused_operation_of(pass), conv_relu_pool_cuda_table(pass), p, t, like);
}
void run_forward_on_cuda(ConvReluPoolProblem p, const ConvReluPoolTensors& t, const Tensor& like) {
  run_pass_on_cuda(ConvPass::forward, p, t, like);
}
void run_gradients_on_cuda(ConvReluPoolProblem p, const ConvReluPoolTensors& t, const Tensor& like) {
  for (ConvPass pass : gradient_passes) {
    if (!output_of(pass, t)) continue;
    if (pass != ConvPass::bias_gradient)
      p.conv.aligned = all_aligned(t.gy, pass == ConvPass::input_gradient ? t.w : t.x);
    run_pass_on_cuda(pass, p, t, like);
  }
}
std::tuple<Tensor, Tensor> forward_cuda(const Tensor& input, const Tensor& weight, std::optional<Tensor> bias,
                                        CONV_GEOMETRY_PARAMETERS, POOL_GEOMETRY_PARAMETERS, bool with_arg,
                                        bool allow_tf32) {
  return forward(input, weight, bias, CONV_GEOMETRY, POOL_GEOMETRY, with_arg, allow_tf32,
                 run_forward_on_cuda);
}
std::tuple<Tensor, Tensor, Tensor> backward_cuda(const Tensor& grad_output, const Tensor& saved,
                                                 const Tensor& input, const Tensor& weight,
                                                 CONV_GEOMETRY_PARAMETERS, POOL_GEOMETRY_PARAMETERS,
                                                 bool need_input, bool need_weight, bool need_bias,
                                                 bool allow_tf32) {
  return backward(grad_output, saved, input, weight, CONV_GEOMETRY, POOL_GEOMETRY, need_input, need_weight,
                  need_bias, allow_tf32, run_gradients_on_cuda);
}

STABLE_TORCH_LIBRARY_IMPL(pyseqnet, CUDA, m) {
  m.impl("conv_relu_pool_forward", TORCH_BOX(&forward_cuda));
  m.impl("conv_relu_pool_backward", TORCH_BOX(&backward_cuda));
}
#endif

}  // namespace
}  // namespace pyseqnet
