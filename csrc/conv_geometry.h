// Reading a convolution's arguments at the border: shared by the convolution and by what is fused with it.
#pragma once
#include "conv/conv.h"
#include "tensor_checks.h"

namespace pyseqnet {

struct ConvGeometry {
  int64_t stride_h, stride_w, pad_top, pad_left, pad_bottom, pad_right, dilation_h, dilation_w, groups;
};

constexpr const char* conv_kernel_too_large = "conv: the dilated kernel is larger than the padded input";

inline int64_t conv_output_extent(int64_t input, int64_t taps, int64_t pad, int64_t stride,
                                  int64_t dilation) {
  const int64_t room = input + pad - reach(taps, dilation, conv_kernel_too_large);
  require(room >= 0, conv_kernel_too_large);
  return room / stride + 1;
}

inline ConvProblem conv_problem(const Tensor& x, const Tensor& w, const ConvGeometry& g) {
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
  p.P = conv_output_extent(p.H, p.R, g.pad_top + g.pad_bottom, g.stride_h, g.dilation_h);
  p.Q = conv_output_extent(p.W, p.S, g.pad_left + g.pad_right, g.stride_w, g.dilation_w);
  // A step that is never taken is 1: however large it was, kernels may multiply with it.
  p.stride_h = p.P > 1 ? g.stride_h : 1, p.stride_w = p.Q > 1 ? g.stride_w : 1;
  p.dilation_h = p.R > 1 ? g.dilation_h : 1, p.dilation_w = p.S > 1 ? g.dilation_w : 1;
  p.pad_h = g.pad_top, p.pad_w = g.pad_left, p.groups = g.groups;
  return p;
}

// Whether all of these begin at a multiple of 16 bytes, as ConvProblem::aligned wants to know. A view may not.
template <class... Pointers>
bool all_aligned(Pointers... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

// A convolution's integers as parameters of an operation, and as a ConvGeometry.
#define CONV_GEOMETRY_PARAMETERS                                                             \
  int64_t stride_h, int64_t stride_w, int64_t pad_top, int64_t pad_left, int64_t pad_bottom, \
      int64_t pad_right, int64_t dilation_h, int64_t dilation_w, int64_t groups
#define CONV_GEOMETRY                                                                            \
  ConvGeometry {                                                                                 \
    stride_h, stride_w, pad_top, pad_left, pad_bottom, pad_right, dilation_h, dilation_w, groups \
  }

}  // namespace pyseqnet
