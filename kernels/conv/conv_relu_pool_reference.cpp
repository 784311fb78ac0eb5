// The oracle of the fused block: the formulas of conv_relu_pool.h, written down as loops. Sums are doubles;
// what the separate layers would store, the convolution's output, is rounded to the stored type before it is
// compared. The gradients gather: every element asks which windows it won.
//
// A work item is one row of an output tensor. It takes every problem and serves float64.
#include "common/numerics.h"
#include "conv/conv_relu_pool.h"

namespace pyseqnet {
namespace {

template <class T>
struct Fused {
  const ConvReluPoolProblem& f;
  const ConvReluPoolTensors& t;
  const ConvProblem& p = f.conv;
  Strides xs = p.x_strides(), ys = f.y_strides(), ws = p.w_strides();

  const T* x() const { return static_cast<const T*>(t.x); }
  const T* w() const { return static_cast<const T*>(t.w); }
  const T* gy() const { return static_cast<const T*>(t.gy); }

  // The convolution's output at one place, as it would be stored.
  double conv_output(int64_t n, int64_t k, int64_t row, int64_t column) const {
    const int64_t Cg = p.group_channels(), first_c = k / p.group_filters() * Cg;
    double sum = t.bias ? to_double(static_cast<const T*>(t.bias)[k]) : 0.0;
    for (int64_t c = 0; c < Cg; c++)
      for (int64_t r = 0; r < p.R; r++) {
        const int64_t h = row * p.stride_h + r * p.dilation_h - p.pad_h;
        if (h < 0 || h >= p.H) continue;
        for (int64_t s = 0; s < p.S; s++) {
          const int64_t u = column * p.stride_w + s * p.dilation_w - p.pad_w;
          if (u < 0 || u >= p.W) continue;
          sum += to_double(w()[k * ws.n + c * ws.c + r * ws.h + s * ws.w]) *
                 to_double(x()[n * xs.n + (first_c + c) * xs.c + h * xs.h + u * xs.w]);
        }
      }
    T stored;
    round_to(stored, sum);
    return to_double(stored);
  }

  int64_t arg_at(int64_t i) const {
    return f.wide_arg() ? int64_t(static_cast<const int32_t*>(t.arg)[i])
                        : int64_t(static_cast<const uint8_t*>(t.arg)[i]);
  }
  void set_arg(int64_t i, int64_t tap) const {
    if (f.wide_arg())
      static_cast<int32_t*>(t.arg)[i] = int32_t(tap);
    else
      static_cast<uint8_t*>(t.arg)[i] = uint8_t(tap);
  }

  void forward_row(int64_t item) const {
    const int64_t row = item % f.U, k = item / f.U % p.K, n = item / f.U / p.K;
    for (int64_t v = 0; v < f.V; v++) {
      double best = 0.0;  // ReLU's
      int64_t winner = f.closed();
      for (int64_t i = 0; i < f.pool_h; i++)
        for (int64_t j = 0; j < f.pool_w; j++) {
          const double z = conv_output(n, k, row * f.pool_stride_h + i, v * f.pool_stride_w + j);
          if (z > best || z != z) best = z, winner = i * f.pool_w + j;
        }
      const int64_t at = n * ys.n + k * ys.c + row * ys.h + v * ys.w;
      round_to(static_cast<T*>(t.y)[at], best);
      if (f.pooled && f.with_arg) set_arg(at, winner);
    }
  }

  // First and last window that covers a pixel.
  static int64_t first_window(int64_t pixel, int64_t window, int64_t stride) {
    return pixel < window ? 0 : (pixel - window) / stride + 1;
  }
  static int64_t last_window(int64_t pixel, int64_t stride, int64_t windows) {
    return pixel / stride < windows ? pixel / stride : windows - 1;
  }

  // The gradient of the convolution's output at one place: the sum over the windows it won.
  double conv_gradient(int64_t n, int64_t k, int64_t row, int64_t column) const {
    const int64_t plane = n * ys.n + k * ys.c;
    if (!f.pooled) {
      const int64_t at = plane + row * ys.h + column * ys.w;
      return to_double(static_cast<const T*>(t.arg)[at]) <= 0 ? 0.0 : to_double(gy()[at]);
    }
    double sum = 0.0;
    for (int64_t u = first_window(row, f.pool_h, f.pool_stride_h),
                 u1 = last_window(row, f.pool_stride_h, f.U);
         u <= u1; u++)
      for (int64_t v = first_window(column, f.pool_w, f.pool_stride_w),
                   v1 = last_window(column, f.pool_stride_w, f.V);
           v <= v1; v++) {
        const int64_t at = plane + u * ys.h + v * ys.w;
        const int64_t tap = (row - u * f.pool_stride_h) * f.pool_w + column - v * f.pool_stride_w;
        if (arg_at(at) == tap) sum += to_double(gy()[at]);
      }
    return sum;
  }

  void input_gradient_row(int64_t item) const {
    const int64_t h = item % p.H, c = item / p.H % p.C, n = item / p.H / p.C;
    const int64_t Cg = p.group_channels(), Kg = p.group_filters(), first_k = c / Cg * Kg;
    T* gx = static_cast<T*>(t.gx) + n * xs.n + c * xs.c + h * xs.h;
    for (int64_t u = 0; u < p.W; u++) {
      double sum = 0.0;
      for (int64_t k = first_k; k < first_k + Kg; k++)
        for (int64_t r = 0; r < p.R; r++) {
          const int64_t row = h + p.pad_h - r * p.dilation_h;
          if (row < 0 || row % p.stride_h || row / p.stride_h >= p.P) continue;
          for (int64_t s = 0; s < p.S; s++) {
            const int64_t column = u + p.pad_w - s * p.dilation_w;
            if (column < 0 || column % p.stride_w || column / p.stride_w >= p.Q) continue;
            sum += to_double(w()[k * ws.n + c % Cg * ws.c + r * ws.h + s * ws.w]) *
                   conv_gradient(n, k, row / p.stride_h, column / p.stride_w);
          }
        }
      round_to(gx[u * xs.w], sum);
    }
  }

  void weight_gradient_row(int64_t item) const {
    const int64_t Cg = p.group_channels();
    const int64_t r = item % p.R, c = item / p.R % Cg, k = item / p.R / Cg;
    const int64_t channel = k / p.group_filters() * Cg + c;
    T* gw = static_cast<T*>(t.gw) + k * ws.n + c * ws.c + r * ws.h;
    for (int64_t s = 0; s < p.S; s++) {
      double sum = 0.0;
      for (int64_t n = 0; n < p.N; n++)
        for (int64_t row = 0; row < p.P; row++) {
          const int64_t h = row * p.stride_h + r * p.dilation_h - p.pad_h;
          if (h < 0 || h >= p.H) continue;
          for (int64_t q = 0; q < p.Q; q++) {
            const int64_t u = q * p.stride_w + s * p.dilation_w - p.pad_w;
            if (u < 0 || u >= p.W) continue;
            sum +=
                conv_gradient(n, k, row, q) * to_double(x()[n * xs.n + channel * xs.c + h * xs.h + u * xs.w]);
          }
        }
      round_to(gw[s * ws.w], sum);
    }
  }

  void bias_gradient(int64_t k) const {
    double sum = 0.0;
    for (int64_t n = 0; n < p.N; n++)
      for (int64_t row = 0; row < p.P; row++)
        for (int64_t q = 0; q < p.Q; q++) sum += conv_gradient(n, k, row, q);
    round_to(static_cast<T*>(t.gb)[k], sum);
  }
};

template <ConvPass pass, class T>
void run_items(const ConvReluPoolProblem& p, const ConvReluPoolTensors& t, const WorkSlice& slice) {
  const Fused<T> fused{p, t};
  for (int64_t item = slice.begin; item < slice.end; item++) {
    if constexpr (pass == ConvPass::forward) fused.forward_row(item);
    if constexpr (pass == ConvPass::input_gradient) fused.input_gradient_row(item);
    if constexpr (pass == ConvPass::weight_gradient) fused.weight_gradient_row(item);
    if constexpr (pass == ConvPass::bias_gradient) fused.bias_gradient(item);
  }
}

template <ConvPass pass>
void run(const ConvReluPoolProblem& p, const ConvReluPoolTensors& t, const WorkSlice& slice) {
  switch (p.conv.dtype) {
    case DType::f32:
      return run_items<pass, float>(p, t, slice);
    case DType::bf16:
      return run_items<pass, bfloat16>(p, t, slice);
    case DType::f16:
      return run_items<pass, float16>(p, t, slice);
    case DType::f64:
      return run_items<pass, double>(p, t, slice);
  }
}

template <ConvPass pass>
WorkPlan plan(const ConvReluPoolProblem& f) {
  constexpr double products_in_20_us = 10000;  // plain loops do about one in two nanoseconds
  const ConvProblem& p = f.conv;
  const int64_t items = pass == ConvPass::forward           ? p.N * p.K * f.U
                        : pass == ConvPass::input_gradient  ? p.N * p.C * p.H
                        : pass == ConvPass::weight_gradient ? p.K * p.group_channels() * p.R
                                                            : p.K;
  const double products =
      pass == ConvPass::bias_gradient ? double(p.N) * double(p.K) * double(p.P * p.Q) : p.flops() / 2;
  WorkPlan plan;
  const double a_item = items > 0 ? products / double(items) : 0.0;
  plan.add_phase(items, a_item >= products_in_20_us ? 1 : int64_t(products_in_20_us / (a_item + 1.0)) + 1);
  return plan;
}

Refusal takes_everything(const ConvReluPoolProblem&) { return accepted; }

template <ConvPass pass>
constexpr ConvReluPoolCpuKernel reference = {"reference", Isa::portable, takes_everything, plan<pass>,
                                             run<pass>};

}  // namespace

extern const ConvReluPoolCpuKernel conv_relu_pool_reference_forward, conv_relu_pool_reference_input_gradient,
    conv_relu_pool_reference_weight_gradient, conv_relu_pool_reference_bias_gradient;
const ConvReluPoolCpuKernel conv_relu_pool_reference_forward = reference<ConvPass::forward>;
const ConvReluPoolCpuKernel conv_relu_pool_reference_input_gradient = reference<ConvPass::input_gradient>;
const ConvReluPoolCpuKernel conv_relu_pool_reference_weight_gradient = reference<ConvPass::weight_gradient>;
const ConvReluPoolCpuKernel conv_relu_pool_reference_bias_gradient = reference<ConvPass::bias_gradient>;

}  // namespace pyseqnet
