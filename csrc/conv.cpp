// Convolution at the border to torch: reads shapes, allocates, hands the problem to the dispatch tables.
#include "conv/conv.h"

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "run_on_cpu.h"
#if defined(PYSEQNET_WITH_CUDA)
#include "run_on_cuda.h"
#endif

namespace pyseqnet {
namespace {

struct Geometry {
  int64_t stride_h, stride_w, pad_top, pad_left, pad_bottom, pad_right, dilation_h, dilation_w, groups;
};

constexpr const char* kernel_too_large = "conv: the dilated kernel is larger than the padded input";

int64_t output_extent(int64_t input, int64_t taps, int64_t pad, int64_t stride, int64_t dilation) {
  const int64_t room = input + pad - reach(taps, dilation, kernel_too_large);
  require(room >= 0, kernel_too_large);
  return room / stride + 1;
}

ConvProblem make_problem(const Tensor& x, const Tensor& w, const Geometry& g) {
  const ImageShape image = image_shape(x, "conv: input must have 3 or 4 dimensions");
  const ImageShape filter = image_shape(w, "conv: weight must have 3 or 4 dimensions");
  require(x.dim() == w.dim(), "conv: input and weight must have the same number of dimensions");
  require(dtype_of(x) == dtype_of(w), "conv: input and weight must have the same dtype");
  require(x.device() == w.device(), "conv: input and weight must be on the same device");
  require(g.groups > 0 && g.stride_h > 0 && g.stride_w > 0 && g.dilation_h > 0 && g.dilation_w > 0,
          "conv: stride, dilation and groups must be positive");
  require(g.pad_top >= 0 && g.pad_left >= 0 && g.pad_bottom >= 0 && g.pad_right >= 0,
          "conv: padding must not be negative");
  require(g.pad_top <= largest_padding && g.pad_left <= largest_padding && g.pad_bottom <= largest_padding &&
              g.pad_right <= largest_padding,
          "conv: padding is too large");
  require(filter.n > 0 && filter.h > 0 && filter.w > 0,
          "conv: there must be a filter, and it must not be empty");
  require(image.n == 0 || image.c == 0 || (image.h > 0 && image.w > 0),
          "conv: only the batch or the channels may be empty");
  // The quotient comes first: a product of what a caller claims could overflow.
  require(image.c % g.groups == 0 && image.c / g.groups == filter.c,
          "conv: input channels must be weight.size(1) * groups");
  require(filter.n % g.groups == 0, "conv: output channels must be divisible by groups");
  ConvProblem p;
  p.dtype = dtype_of(x);
  p.layout = suggested_layout(x);
  p.filter_layout = suggested_layout(w);
  p.N = image.n, p.C = image.c, p.H = image.h, p.W = image.w;
  p.K = filter.n, p.R = filter.h, p.S = filter.w;
  p.P = output_extent(p.H, p.R, g.pad_top + g.pad_bottom, g.stride_h, g.dilation_h);
  p.Q = output_extent(p.W, p.S, g.pad_left + g.pad_right, g.stride_w, g.dilation_w);
  // A step that is never taken is 1: however large it was, kernels may multiply with it.
  p.stride_h = p.P > 1 ? g.stride_h : 1, p.stride_w = p.Q > 1 ? g.stride_w : 1;
  p.dilation_h = p.R > 1 ? g.dilation_h : 1, p.dilation_w = p.S > 1 ? g.dilation_w : 1;
  p.pad_h = g.pad_top, p.pad_w = g.pad_left, p.groups = g.groups;
  return p;
}

// Runs one pass on the device that `like` is on.
using RunPass = void (*)(ConvPass, const ConvProblem&, const ConvTensors&, const Tensor& like);

void run_pass_on_cpu(ConvPass pass, const ConvProblem& p, const ConvTensors& t, const Tensor& like) {
  run_on_cpu("conv", operation_of(pass), conv_cpu_table(pass), p, t, like);
}

Tensor forward(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
               const Geometry& geometry, RunPass run) {
  const ConvProblem p = make_problem(input, weight, geometry);
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
  run(ConvPass::forward, p, t, x);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& input,
                                            const Tensor& weight, const Geometry& geometry, bool need_input,
                                            bool need_weight, bool need_bias, RunPass run) {
  const ConvProblem p = make_problem(input, weight, geometry);
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
    run(ConvPass::input_gradient, p, t, gy);
  }
  if (need_weight) {
    const Tensor x = dense(input, p.layout);
    gw = new_image(gy, {p.K, p.group_channels(), p.R, p.S}, p.filter_layout, weight.dim(), type);
    t.x = x.const_data_ptr(), t.gw = gw.mutable_data_ptr();
    run(ConvPass::weight_gradient, p, t, gy);
  }
  if (need_bias) {
    gb = new_vector(gy, p.K, type);
    t.gb = gb.mutable_data_ptr();
    run(ConvPass::bias_gradient, p, t, gy);
  }
  return {gx, gw, gb};
}

#define GEOMETRY_PARAMETERS                                                                  \
  int64_t stride_h, int64_t stride_w, int64_t pad_top, int64_t pad_left, int64_t pad_bottom, \
      int64_t pad_right, int64_t dilation_h, int64_t dilation_w, int64_t groups
#define GEOMETRY \
  Geometry { stride_h, stride_w, pad_top, pad_left, pad_bottom, pad_right, dilation_h, dilation_w, groups }

Tensor forward_cpu(const Tensor& input, const Tensor& weight, std::optional<Tensor> bias,
                   GEOMETRY_PARAMETERS) {
  return forward(input, weight, bias, GEOMETRY, run_pass_on_cpu);
}
std::tuple<Tensor, Tensor, Tensor> backward_cpu(const Tensor& grad_output, const Tensor& input,
                                                const Tensor& weight, GEOMETRY_PARAMETERS, bool need_input,
                                                bool need_weight, bool need_bias) {
  return backward(grad_output, input, weight, GEOMETRY, need_input, need_weight, need_bias, run_pass_on_cpu);
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
                    GEOMETRY_PARAMETERS) {
  return forward(input, weight, bias, GEOMETRY, run_pass_on_cuda);
}
std::tuple<Tensor, Tensor, Tensor> backward_cuda(const Tensor& grad_output, const Tensor& input,
                                                 const Tensor& weight, GEOMETRY_PARAMETERS, bool need_input,
                                                 bool need_weight, bool need_bias) {
  return backward(grad_output, input, weight, GEOMETRY, need_input, need_weight, need_bias, run_pass_on_cuda);
}

STABLE_TORCH_LIBRARY_IMPL(pyseqnet, CUDA, m) {
  m.impl("conv_forward", TORCH_BOX(&forward_cuda));
  m.impl("conv_backward", TORCH_BOX(&backward_cuda));
}
#endif

}  // namespace
}  // namespace pyseqnet
