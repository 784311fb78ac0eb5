// The oracle of the convolution family: the sums of conv.h, written down as loops. Every product and every
// sum is a double, rounded once to the stored type. It takes every problem, so it also serves what the fast
// kernels refuse (float64).
//
// A work item is one row of an output tensor: it is written by nobody else, and its sums always run in the
// same order, so results do not depend on how the items are shared out.
#include "common/numerics.h"
#include "conv/conv.h"

namespace pyseqnet {
namespace {

template <class T>
struct Sums {
  const ConvProblem& p;
  const ConvTensors& t;
  Strides xs = p.x_strides(), ys = p.y_strides(), ws = p.w_strides();

  const T* x() const { return static_cast<const T*>(t.x); }
  const T* w() const { return static_cast<const T*>(t.w); }
  const T* gy() const { return static_cast<const T*>(t.gy); }

  // y[n,k,row,:] = bias[k] + sum over c, r, s of w[k,c,r,s] x[n, gC' + c, row stride + r dilation - pad, ...]
  void forward_row(int64_t item) const {
    const int64_t row = item % p.P, k = item / p.P % p.K, n = item / p.P / p.K;
    const int64_t Cg = p.group_channels(), first_c = k / p.group_filters() * Cg;
    const T* bias = static_cast<const T*>(t.bias);
    T* y = static_cast<T*>(t.y) + n * ys.n + k * ys.c + row * ys.h;
    for (int64_t q = 0; q < p.Q; q++) {
      double sum = bias ? to_double(bias[k]) : 0.0;
      for (int64_t c = 0; c < Cg; c++)
        for (int64_t r = 0; r < p.R; r++) {
          const int64_t h = row * p.stride_h + r * p.dilation_h - p.pad_h;
          if (h < 0 || h >= p.H) continue;
          for (int64_t s = 0; s < p.S; s++) {
            const int64_t u = q * p.stride_w + s * p.dilation_w - p.pad_w;
            if (u < 0 || u >= p.W) continue;
            sum += to_double(w()[k * ws.n + c * ws.c + r * ws.h + s * ws.w]) *
                   to_double(x()[n * xs.n + (first_c + c) * xs.c + h * xs.h + u * xs.w]);
          }
        }
      round_to(y[q * ys.w], sum);
    }
  }

  // gx[n,c,h,:] = sum over the outputs that read it: k in c's group, and r, s with
  // p stride + r dilation - pad = h
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
            sum +=
                to_double(w()[k * ws.n + c % Cg * ws.c + r * ws.h + s * ws.w]) *
                to_double(gy()[n * ys.n + k * ys.c + row / p.stride_h * ys.h + column / p.stride_w * ys.w]);
          }
        }
      round_to(gx[u * xs.w], sum);
    }
  }

  // gw[k,c,r,:] = sum over n, p, q of gy[n,k,p,q] x[n, gC' + c, p stride + r dilation - pad, ...]
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
            sum += to_double(gy()[n * ys.n + k * ys.c + row * ys.h + q * ys.w]) *
                   to_double(x()[n * xs.n + channel * xs.c + h * xs.h + u * xs.w]);
          }
        }
      round_to(gw[s * ws.w], sum);
    }
  }

  // gb[k] = sum over n, p, q of gy[n,k,p,q]
  void bias_gradient(int64_t k) const {
    double sum = 0.0;
    for (int64_t n = 0; n < p.N; n++)
      for (int64_t row = 0; row < p.P; row++)
        for (int64_t q = 0; q < p.Q; q++) sum += to_double(gy()[n * ys.n + k * ys.c + row * ys.h + q * ys.w]);
    round_to(static_cast<T*>(t.gb)[k], sum);
  }
};

template <ConvPass pass, class T>
void run_items(const ConvProblem& p, const ConvTensors& t, const WorkSlice& slice) {
  const Sums<T> sums{p, t};
  for (int64_t item = slice.begin; item < slice.end; item++) {
    if constexpr (pass == ConvPass::forward) sums.forward_row(item);
    if constexpr (pass == ConvPass::input_gradient) sums.input_gradient_row(item);
    if constexpr (pass == ConvPass::weight_gradient) sums.weight_gradient_row(item);
    if constexpr (pass == ConvPass::bias_gradient) sums.bias_gradient(item);
  }
}

template <ConvPass pass>
void run(const ConvProblem& p, const ConvTensors& t, const WorkSlice& slice) {
  switch (p.dtype) {
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
WorkPlan plan(const ConvProblem& p) {
  constexpr double products_in_20_us = 10000;  // plain loops do about one in two nanoseconds
  const int64_t items = pass == ConvPass::forward           ? p.N * p.K * p.P
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

Refusal takes_everything(const ConvProblem&) { return accepted; }

template <ConvPass pass>
constexpr ConvCpuKernel reference = {"reference", Isa::portable, takes_everything, plan<pass>, run<pass>};

}  // namespace

extern const ConvCpuKernel conv_reference_forward, conv_reference_input_gradient,
    conv_reference_weight_gradient, conv_reference_bias_gradient;
const ConvCpuKernel conv_reference_forward = reference<ConvPass::forward>;
const ConvCpuKernel conv_reference_input_gradient = reference<ConvPass::input_gradient>;
const ConvCpuKernel conv_reference_weight_gradient = reference<ConvPass::weight_gradient>;
const ConvCpuKernel conv_reference_bias_gradient = reference<ConvPass::bias_gradient>;

}  // namespace pyseqnet
