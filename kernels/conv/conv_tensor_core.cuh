// What the tensor-core kernels of convolution share: a forward pass or input gradient as a product of
// gathered pixels and filters, and how a finished tile leaves through shared memory.
//
//   out[pixel, column] = sum over taps (r, s) and channels c of  image[place(pixel) + tap, c] * filters[column, tap, c]
//
// Both passes are this product. The input gradient takes the pixels residue by residue of the stride (dgrad
// by parity): within one it is a convolution of stride 1 over the taps that fit, and nothing is multiplied by
// zero. Pixels may be listed window by window of a following max-pool, so that a tile holds whole windows.
#pragma once
#include <numeric>

#include "common/ptx.cuh"
#include "common/tensor_map.cuh"
#include "conv/conv_generic.cuh"
#include "conv/conv_pack.h"

namespace pyseqnet {

// One spatial axis: output u of window row i, tap t meets input  origin + (u * window_step + i) * step + t *
// tap_step, if that is in [0, limit), with filter tap  filter_first + t * filter_step.
struct TapAxis {
  int limit, outputs, taps;
  int step, tap_step, origin;
  int filter_first, filter_step;
  int out_first, out_step;  // output u lies there
  int window, window_step;  // of the max-pool behind it; 1, 1 where there is none
};

// The pixels  residue + stride * u  of an input gradient. Tap r meets an output from there where residue + pad
// - r * dilation is a multiple of the stride: every tap_step-th, from the first that does.
struct StrideAxis {
  int count;  // of residues
  int stride, pad, dilation, pixels, taps, tap_step, limit;
};

PYSEQNET_HOST_DEVICE TapAxis residue_axis(const StrideAxis& a, int residue) {
  int first = 0;
  const int candidates = a.tap_step < a.taps ? a.tap_step : a.taps;
  while (first < candidates && (residue + a.pad - first * a.dilation) % a.stride != 0) first++;
  const bool any = first < candidates;
  TapAxis x;
  x.limit = a.limit;
  x.outputs = (a.pixels - residue + a.stride - 1) / a.stride;
  x.taps = any ? (a.taps - first - 1) / a.tap_step + 1 : 0;
  x.step = 1, x.tap_step = -(a.tap_step * a.dilation / a.stride);
  x.origin = any ? (residue + a.pad - first * a.dilation) / a.stride : 0;
  x.filter_first = first, x.filter_step = a.tap_step;
  x.out_first = residue, x.out_step = a.stride;
  x.window = x.window_step = 1;
  return x;
}

constexpr int product_rows = 128;  // pixels of a tile

// Offsets of operands count chunks of 16 bytes.
struct GatheredProduct {
  TapAxis h, w;  // unless by_residue
  StrideAxis residue_h, residue_w;
  bool by_residue;
  int images, columns;  // columns of a group: rows of the filters
  int chunks;           // of a group's channels in a pixel, and of a tap in the filters
  unsigned image_n, image_row, image_pixel, filter_row;
  int filter_taps_w;
  unsigned column_tiles, row_tiles, groups;
  Strides out;  // of y or gx, in elements
  bool relu, pooled;
};

// The residue's axes, or those of the forward pass.
struct TileAxes {
  TapAxis h, w;
  PYSEQNET_DEVICE TileAxes(const GatheredProduct& g, int residue) {
    if (g.by_residue) {
      h = residue_axis(g.residue_h, residue / g.residue_w.count);
      w = residue_axis(g.residue_w, residue % g.residue_w.count);
    } else {
      h = g.h, w = g.w;
    }
  }
};

// A pixel of a tile: image, window and tap of the window.
struct TilePixel {
  int n, u, v, i, j;
  PYSEQNET_DEVICE TilePixel(const TileAxes& axes, int window, int tap) {
    v = window % axes.w.outputs, window /= axes.w.outputs;
    u = window % axes.h.outputs, n = window / axes.h.outputs;
    i = tap / axes.w.window, j = tap - i * axes.w.window;
  }
};

// ---------------------------------------------------------------- host side

// What the forward pass does with a sum before it stores it.
struct ConvEpilogue {
  bool relu = false, pooled = false;  // pooled: relu, too
  int64_t pool_h = 1, pool_w = 1, pool_stride_h = 1, pool_stride_w = 1, U = 1, V = 0;
  uint8_t* arg = nullptr;  // may be null
};

// The product of a simplified problem, of which `packed` is what tensor cores see.
inline GatheredProduct gathered_product_of(ConvPass pass, const ConvProblem& p, const PackedConv& packed,
                                           const ConvEpilogue& e = {}) {
  const ConvProblem& c = packed.conv;
  GatheredProduct g = {};
  g.images = int(p.N), g.groups = unsigned(p.groups);
  if (pass == ConvPass::forward) {
    g.h = {int(c.H), int(p.P), int(c.R), int(c.stride_h), int(c.dilation_h), int(-c.pad_h), 0, 1, 0, 1, 1, 1};
    g.w = {int(c.W), int(p.Q), int(c.S), int(c.stride_w), int(c.dilation_w), int(-c.pad_w), 0, 1, 0, 1, 1, 1};
    if (e.pooled) {
      g.h.outputs = int(e.U), g.h.window = int(e.pool_h), g.h.window_step = int(e.pool_stride_h);
      g.w.outputs = int(e.V), g.w.window = int(e.pool_w), g.w.window_step = int(e.pool_stride_w);
    }
    g.columns = int(p.group_filters()), g.chunks = int(packed.x_chunks);
    g.image_pixel = unsigned(packed.x_chunks * p.groups);
    g.image_row = unsigned(c.W) * g.image_pixel, g.image_n = unsigned(c.H) * g.image_row;
    g.filter_row = unsigned(c.R * c.S * packed.x_chunks), g.filter_taps_w = int(c.S);
    g.out = e.pooled ? dense_strides(p.layout, p.K, e.U, e.V) : p.y_strides();
    g.relu = e.relu || e.pooled, g.pooled = e.pooled;
    return g;
  }
  const auto axis = [](int64_t pixels, int64_t outputs, int64_t taps, int64_t stride, int64_t pad,
                       int64_t dilation) {
    return StrideAxis{int(pixels < stride ? pixels : stride),
                      int(stride),
                      int(pad),
                      int(dilation),
                      int(pixels),
                      int(taps),
                      int(stride / std::gcd(stride, dilation)),
                      int(outputs)};
  };
  g.by_residue = true;
  g.residue_h = axis(p.H, p.P, p.R, p.stride_h, p.pad_h, p.dilation_h);
  g.residue_w = axis(p.W, p.Q, p.S, p.stride_w, p.pad_w, p.dilation_w);
  g.columns = int(p.group_channels()), g.chunks = int(packed.y_chunks);
  g.image_pixel = unsigned(packed.y_chunks * p.groups);
  g.image_row = unsigned(p.Q) * g.image_pixel, g.image_n = unsigned(p.P) * g.image_row;
  g.filter_row = unsigned(p.R * p.S * packed.y_chunks), g.filter_taps_w = int(p.S);
  g.out = p.x_strides();
  return g;
}

// Windows of the largest residue.
inline int64_t windows_of(const GatheredProduct& g) {
  const auto outputs = [&](const TapAxis& axis, const StrideAxis& residue) {
    return g.by_residue ? ceil_div(residue.pixels, residue.stride) : int64_t(axis.outputs);
  };
  return g.images * outputs(g.h, g.residue_h) * outputs(g.w, g.residue_w);
}
inline int64_t residues_of(const GatheredProduct& g) {
  return g.by_residue ? int64_t(g.residue_h.count) * g.residue_w.count : 1;
}

// The workspace of a call, handed out in whole lines.
class WorkspacePlan {
 public:
  int64_t take(int64_t bytes) {
    const int64_t at = bytes_;
    bytes_ += (bytes + line - 1) / line * line;
    return at;
  }
  int64_t bytes() const { return bytes_; }

 private:
  static constexpr int64_t line = 256;
  int64_t bytes_ = 0;
};

}  // namespace pyseqnet
