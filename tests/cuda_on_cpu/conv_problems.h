// Problems of convolution, and their names: what the cases of its kernels share.
#pragma once
#include "conv/conv.h"
#include "harness.h"

namespace pyseqnet::testing {

constexpr DType all_dtypes[] = {DType::f32, DType::bf16, DType::f16, DType::f64};
constexpr Layout all_layouts[] = {Layout::nchw, Layout::nhwc};

inline std::string label(const ConvProblem& p, bool with_bias) {
  char words[400];
  std::snprintf(words, sizeof words,
                "%s %s filters %s N%lld C%lld H%lld W%lld K%lld %lldx%lld P%lld Q%lld stride %lldx%lld pad "
                "%lldx%lld dilation %lldx%lld groups %lld%s",
                name_of(p.dtype), name_of(p.layout), name_of(p.filter_layout), (long long)p.N, (long long)p.C,
                (long long)p.H, (long long)p.W, (long long)p.K, (long long)p.R, (long long)p.S,
                (long long)p.P, (long long)p.Q, (long long)p.stride_h, (long long)p.stride_w,
                (long long)p.pad_h, (long long)p.pad_w, (long long)p.dilation_h, (long long)p.dilation_w,
                (long long)p.groups, with_bias ? " bias" : "");
  return words;
}

inline int64_t outputs(int64_t extent, int64_t taps, int64_t stride, int64_t pad, int64_t dilation) {
  const int64_t room = extent + 2 * pad - dilation * (taps - 1) - 1;
  return room < 0 ? 0 : room / stride + 1;
}

inline ConvProblem with_outputs(ConvProblem p) {
  p.P = outputs(p.H, p.R, p.stride_h, p.pad_h, p.dilation_h);
  p.Q = outputs(p.W, p.S, p.stride_w, p.pad_w, p.dilation_w);
  return p;
}

struct Pair {
  int64_t h, w;
};

inline ConvProblem problem(int64_t N, int64_t C, Pair image, int64_t K, Pair filter, Pair stride, Pair pad,
                           Pair dilation = {1, 1}, int64_t groups = 1) {
  ConvProblem p;
  p.N = N, p.C = C, p.H = image.h, p.W = image.w, p.K = K, p.R = filter.h, p.S = filter.w;
  p.stride_h = stride.h, p.stride_w = stride.w, p.pad_h = pad.h, p.pad_w = pad.w;
  p.dilation_h = dilation.h, p.dilation_w = dilation.w, p.groups = groups;
  return with_outputs(p);
}

// What follows the last row or column differs from what precedes the first.
inline ConvProblem sized(ConvProblem p, int64_t P, int64_t Q) {
  p.P = P, p.Q = Q;
  return p;
}

}  // namespace pyseqnet::testing
