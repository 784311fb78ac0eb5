// Convolution at the border to torch: reads shapes, allocates, hands the problem to the dispatch tables.
#include "conv/conv.h"

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "conv_geometry.h"
#include "run_on_cpu.h"
#if defined(PYSEQNET_WITH_CUDA)
#include "run_on_cuda.h"
#endif

namespace pyseqnet {
namespace {

// Runs one pass on the device that `like` is on.
using RunPass = void (*)(ConvPass, const ConvProblem&, const ConvTensors&, const Tensor& like);

void run_pass_on_cpu(ConvPass pass, const ConvProblem& p, const ConvTensors& t, const Tensor& like) {
  run_on_cpu("conv", operation_of(pass), conv_cpu_table(pass), p, t, like);
}

Tensor forward(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
               const ConvGeometry& geometry, bool allow_tf32, RunPass run) {
  ConvProblem p = conv_problem(input, weight, geometry);
  p.allow_tf32 = allow_tf32;
  const Tensor x = dense(input, p.layout), w = dense(weight, p.filter_layout);
  ConvTensors t;
  t.x = x.const_data_ptr(), t.w = w.const_data_ptr();
  Tensor b = x;
  if (bias) {
    require(bias->dim() == 1 && bias->size(0) == p.K, "conv: bias must have one element per output channel");
    require(dtype_of(*bias) == p.dtype && bias->device() == x.device(),
            "conv: bias must have the input's dtype and device");
    b = dense(*bias, Layout::nchw);
    t.bias = b.const_data_ptr();
  }
  Tensor y = new_image(x, {p.N, p.K, p.P, p.Q}, p.layout, x.dim(), x.scalar_type());
  t.y = y.mutable_data_ptr();
  p.aligned = all_aligned(t.x, t.w, t.bias);
  run(ConvPass::forward, p, t, x);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& input,
                                            const Tensor& weight, const ConvGeometry& geometry,
                                            bool need_input, bool need_weight, bool need_bias,
                                            bool allow_tf32, RunPass run) {
  ConvProblem p = conv_problem(input, weight, geometry);
  p.allow_tf32 = allow_tf32;
  const ImageShape grad = image_shape(grad_output, "conv: grad_output must have 3 or 4 dimensions");
  require(
      grad_output.dim() == input.dim() && grad.n == p.N && grad.c == p.K && grad.h == p.P && grad.w == p.Q,
      "conv: grad_output does not have the output's shape");
  require(dtype_of(grad_output) == p.dtype && grad_output.device() == input.device(),
          "conv: grad_output must have the input's dtype and device");
  const auto type = input.scalar_type();
  const Tensor gy = dense(grad_output, p.layout);
  Tensor gx = new_vector(gy, 0, type), gw = gx, gb = gx;  // one empty tensor stands for what nobody needs
  ConvTensors t;
  t.gy = gy.const_data_ptr();
  if (need_input) {
    const Tensor w = dense(weight, p.filter_layout);
    gx = new_image(gy, {p.N, p.C, p.H, p.W}, p.layout, input.dim(), type);
    t.w = w.const_data_ptr(), t.gx = gx.mutable_data_ptr();
    p.aligned = all_aligned(t.gy, t.w);
    run(ConvPass::input_gradient, p, t, gy);
  }
  if (need_weight) {
    const Tensor x = dense(input, p.layout);
    gw = new_image(gy, {p.K, p.group_channels(), p.R, p.S}, p.filter_layout, weight.dim(), type);
    t.x = x.const_data_ptr(), t.gw = gw.mutable_data_ptr();
    p.aligned = all_aligned(t.gy, t.x);
    run(ConvPass::weight_gradient, p, t, gy);
  }
  if (need_bias) {
    gb = new_vector(gy, p.K, type);
    t.gb = gb.mutable_data_ptr();
    run(ConvPass::bias_gradient, p, t, gy);
  }
  return {gx, gw, gb};
}

Tensor forward_cpu(const Tensor& input, const Tensor& weight, std::optional<Tensor> bias,
                   CONV_GEOMETRY_PARAMETERS, bool allow_tf32) {
  return forward(input, weight, bias, CONV_GEOMETRY, allow_tf32, run_pass_on_cpu);
}
std::tuple<Tensor, Tensor, Tensor> backward_cpu(const Tensor& grad_output, const Tensor& input,
                                                const Tensor& weight, CONV_GEOMETRY_PARAMETERS,
                                                bool need_input, bool need_weight, bool need_bias,
                                                bool allow_tf32) {
  return backward(grad_output, input, weight, CONV_GEOMETRY, need_input, need_weight, need_bias, allow_tf32,
                  run_pass_on_cpu);
}

STABLE_TORCH_LIBRARY_IMPL(pyseqnet, CPU, m) {
  m.impl("conv_forward", TORCH_BOX(&forward_cpu));
  m.impl("conv_backward", TORCH_BOX(&backward_cpu));
}

#if defined(PYSEQNET_WITH_CUDA)
void run_pass_on_cuda(ConvPass pass, const ConvProblem& p, const ConvTensors& t, const Tensor& like) {
  run_on_cuda("conv", operation_of(pass), conv_cuda_table(pass), p, t, like);
}
Tensor forward_cuda(const Tensor& input, const Tensor& weight, std::optional<Tensor> bias,
                    CONV_GEOMETRY_PARAMETERS, bool allow_tf32) {
  return forward(input, weight, bias, CONV_GEOMETRY, allow_tf32, run_pass_on_cuda);
}
std::tuple<Tensor, Tensor, Tensor> backward_cuda(const Tensor& grad_output, const Tensor& input,
                                                 const Tensor& weight, CONV_GEOMETRY_PARAMETERS,
                                                 bool need_input, bool need_weight, bool need_bias,
                                                 bool allow_tf32) {
  return backward(grad_output, input, weight, CONV_GEOMETRY, need_input, need_weight, need_bias, allow_tf32,
                  run_pass_on_cuda);
}

STABLE_TORCH_LIBRARY_IMPL(pyseqnet, CUDA, m) {
  m.impl("conv_forward", TORCH_BOX(&forward_cuda));
  m.impl("conv_backward", TORCH_BOX(&backward_cuda));
}
#endif

}  // namespace
}  // namespace pyseqnet
