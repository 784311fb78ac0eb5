// Max-pooling at the border to torch: reads shapes, allocates, hands the problem to the dispatch tables.
#include "pool/max_pool.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "run_on_cpu.h"
#if defined(PYSEQNET_WITH_CUDA)
#include "run_on_cuda.h"
#endif

namespace pyseqnet {
namespace {

struct Geometry {
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  bool ceil_mode;
};

// torch's rule: with ceil_mode the last window must start inside the image or its left padding.
int64_t output_extent(int64_t input, int64_t taps, int64_t pad, int64_t stride, int64_t dilation,
                      bool ceil_mode) {
  constexpr const char* too_large = "max_pool: the dilated window is larger than the padded input";
  const int64_t room = input + 2 * pad - reach(taps, dilation, too_large);
  require(room >= 0, too_large);
  int64_t extent = room / stride + (ceil_mode && room % stride != 0) + 1;
  if (extent > 1 && ceil_mode && (extent - 1) * stride >= input + pad) extent--;
  return extent;
}

MaxPoolProblem make_problem(const ImageShape& image, DType dtype, Layout layout, const Geometry& g) {
  require(g.kernel_h > 0 && g.kernel_w > 0 && g.stride_h > 0 && g.stride_w > 0 && g.dilation_h > 0 &&
              g.dilation_w > 0,
          "max_pool: kernel size, stride and dilation must be positive");
  require(g.pad_h >= 0 && g.pad_w >= 0 && g.pad_h <= g.kernel_h / 2 && g.pad_w <= g.kernel_w / 2,
          "max_pool: padding must be between 0 and half the kernel size");
  require(product_fits({g.kernel_h, g.kernel_w}) && g.kernel_h * g.kernel_w < (int64_t(1) << 31),
          "max_pool: the window has too many taps");
  require(image.c > 0 && image.h > 0 && image.w > 0, "max_pool: only the batch may be empty");
  require(image.h < (int64_t(1) << 58) && image.w < (int64_t(1) << 58), "max_pool: the image is too large");
  MaxPoolProblem p;
  p.dtype = dtype;
  p.layout = layout;
  p.N = image.n, p.C = image.c, p.H = image.h, p.W = image.w;
  p.R = g.kernel_h, p.S = g.kernel_w;
  p.pad_h = g.pad_h, p.pad_w = g.pad_w;
  p.P = output_extent(p.H, p.R, p.pad_h, g.stride_h, g.dilation_h, g.ceil_mode);
  p.Q = output_extent(p.W, p.S, p.pad_w, g.stride_w, g.dilation_w, g.ceil_mode);
  // A step that is never taken is 1: however large it was, kernels may multiply with it.
  p.stride_h = p.P > 1 ? g.stride_h : 1, p.stride_w = p.Q > 1 ? g.stride_w : 1;
  p.dilation_h = p.R > 1 ? g.dilation_h : 1, p.dilation_w = p.S > 1 ? g.dilation_w : 1;
  return p;
}

using RunPass = void (*)(MaxPoolPass, const MaxPoolProblem&, const MaxPoolTensors&, const Tensor& like);

void run_pass_on_cpu(MaxPoolPass pass, const MaxPoolProblem& p, const MaxPoolTensors& t, const Tensor& like) {
  run_on_cpu("max_pool", operation_of(pass), max_pool_cpu_table(pass), p, t, like);
}

std::tuple<Tensor, Tensor> forward(const Tensor& input, const Geometry& geometry, bool with_arg,
                                   RunPass run) {
  using torch::headeronly::ScalarType;
  const ImageShape image = image_shape(input, "max_pool: input must have 3 or 4 dimensions");
  MaxPoolProblem p = make_problem(image, dtype_of(input), suggested_layout(input), geometry);
  p.with_arg = with_arg;
  const Tensor x = dense(input, p.layout);
  const ImageShape out{p.N, p.C, p.P, p.Q};
  const ScalarType arg_type = p.wide_arg() ? ScalarType::Int : ScalarType::Byte;
  Tensor y = new_image(x, out, p.layout, x.dim(), x.scalar_type());
  Tensor arg = with_arg ? new_image(x, out, p.layout, x.dim(), arg_type) : new_vector(x, 0, arg_type);
  MaxPoolTensors t;
  t.x = x.const_data_ptr(), t.y = y.mutable_data_ptr();
  if (with_arg) t.arg = arg.mutable_data_ptr();
  run(MaxPoolPass::forward, p, t, x);
  return {y, arg};
}

// `arg` as forward made it, dense in the layout that the caller goes on with.
Tensor checked_arg(const Tensor& arg, const MaxPoolProblem& p, int64_t rank) {
  using torch::headeronly::ScalarType;
  const ImageShape s = image_shape(arg, "max_pool: arg must have 3 or 4 dimensions");
  require(arg.dim() == rank && s.n == p.N && s.c == p.C && s.h == p.P && s.w == p.Q,
          "max_pool: arg does not have the output's shape");
  require(arg.scalar_type() == (p.wide_arg() ? ScalarType::Int : ScalarType::Byte),
          "max_pool: arg has the wrong dtype");
  return dense(arg, p.layout);
}

Tensor backward(const Tensor& grad_output, const Tensor& saved_arg, int64_t height, int64_t width,
                const Geometry& geometry, RunPass run) {
  const ImageShape out = image_shape(grad_output, "max_pool: grad_output must have 3 or 4 dimensions");
  const MaxPoolProblem p = make_problem({out.n, out.c, height, width}, dtype_of(grad_output),
                                        suggested_layout(saved_arg), geometry);
  require(out.h == p.P && out.w == p.Q, "max_pool: grad_output does not have the output's shape");
  require(grad_output.device() == saved_arg.device(),
          "max_pool: grad_output and arg must be on the same device");
  const Tensor gy = dense(grad_output, p.layout), arg = checked_arg(saved_arg, p, grad_output.dim());
  Tensor gx = new_image(gy, {p.N, p.C, p.H, p.W}, p.layout, gy.dim(), gy.scalar_type());
  MaxPoolTensors t;
  t.gy = gy.const_data_ptr(), t.gx = gx.mutable_data_ptr();
  t.arg = const_cast<void*>(arg.const_data_ptr());
  run(MaxPoolPass::backward, p, t, gy);
  return gx;
}

Tensor indices(const Tensor& saved_arg, int64_t height, int64_t width, const Geometry& geometry,
               RunPass run) {
  const ImageShape out = image_shape(saved_arg, "max_pool: arg must have 3 or 4 dimensions");
  // The dtype of the pooled values plays no part here.
  const MaxPoolProblem p =
      make_problem({out.n, out.c, height, width}, DType::f32, suggested_layout(saved_arg), geometry);
  const Tensor arg = checked_arg(saved_arg, p, saved_arg.dim());
  Tensor result = new_image(arg, out, p.layout, arg.dim(), torch::headeronly::ScalarType::Long);
  MaxPoolTensors t;
  t.arg = const_cast<void*>(arg.const_data_ptr());
  t.indices = static_cast<int64_t*>(result.mutable_data_ptr());
  run(MaxPoolPass::indices, p, t, arg);
  return result;
}

#define GEOMETRY_PARAMETERS                                                                             \
  int64_t kernel_h, int64_t kernel_w, int64_t stride_h, int64_t stride_w, int64_t pad_h, int64_t pad_w, \
      int64_t dilation_h, int64_t dilation_w, bool ceil_mode
#define GEOMETRY \
  Geometry { kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, ceil_mode }

std::tuple<Tensor, Tensor> forward_cpu(const Tensor& input, GEOMETRY_PARAMETERS, bool with_arg) {
  return forward(input, GEOMETRY, with_arg, run_pass_on_cpu);
}
Tensor backward_cpu(const Tensor& grad_output, const Tensor& arg, int64_t height, int64_t width,
                    GEOMETRY_PARAMETERS) {
  return backward(grad_output, arg, height, width, GEOMETRY, run_pass_on_cpu);
}
Tensor indices_cpu(const Tensor& arg, int64_t height, int64_t width, GEOMETRY_PARAMETERS) {
  return indices(arg, height, width, GEOMETRY, run_pass_on_cpu);
}

STABLE_TORCH_LIBRARY_IMPL(pyseqnet, CPU, m) {
  m.impl("max_pool_forward", TORCH_BOX(&forward_cpu));
  m.impl("max_pool_backward", TORCH_BOX(&backward_cpu));
  m.impl("max_pool_indices", TORCH_BOX(&indices_cpu));
}

#if defined(PYSEQNET_WITH_CUDA)
void run_pass_on_cuda(MaxPoolPass pass, const MaxPoolProblem& p, const MaxPoolTensors& t,
                      const Tensor& like) {
  run_on_cuda("max_pool", operation_of(pass), max_pool_cuda_table(pass), p, t, like);
}
std::tuple<Tensor, Tensor> forward_cuda(const Tensor& input, GEOMETRY_PARAMETERS, bool with_arg) {
  return forward(input, GEOMETRY, with_arg, run_pass_on_cuda);
}
Tensor backward_cuda(const Tensor& grad_output, const Tensor& arg, int64_t height, int64_t width,
                     GEOMETRY_PARAMETERS) {
  return backward(grad_output, arg, height, width, GEOMETRY, run_pass_on_cuda);
}
Tensor indices_cuda(const Tensor& arg, int64_t height, int64_t width, GEOMETRY_PARAMETERS) {
  return indices(arg, height, width, GEOMETRY, run_pass_on_cuda);
}

STABLE_TORCH_LIBRARY_IMPL(pyseqnet, CUDA, m) {
  m.impl("max_pool_forward", TORCH_BOX(&forward_cuda));
  m.impl("max_pool_backward", TORCH_BOX(&backward_cuda));
  m.impl("max_pool_indices", TORCH_BOX(&indices_cuda));
}
#endif

}  // namespace
}  // namespace pyseqnet
