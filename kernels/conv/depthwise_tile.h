// Private tiles of the depthwise kernels: VL channels of a part of an image, one vector a pixel, in float.
//
// Whatever the tensor's layout and type, a tile looks the same: padding columns are zeros in memory and, for
// a strided convolution, columns are split into their stride phases, so that neighbouring outputs read
// neighbouring vectors. Planar tensors are transposed on the way through registers, across row ends: rows of
// 7 pixels cost no more than rows of 16.
#pragma once
#include "common/element_lanes.h"
#include "common/transpose.h"
#include "conv/conv.h"

namespace pyseqnet {
inline namespace PYSEQNET_ISA {

PYSEQNET_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
PYSEQNET_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
PYSEQNET_INLINE int64_t ceil_div(int64_t a, int64_t b) { return a > 0 ? (a + b - 1) / b : -(-a / b); }
PYSEQNET_INLINE int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }
PYSEQNET_INLINE int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

// Up to VL channels of one image in a dense tensor of H x W pixels.
template <class T>
struct Slice {
  T* at;                   // first channel, first pixel
  int64_t channels;        // <= VL
  int64_t channel, pixel;  // element strides: planar H W and 1, channels last 1 and C
  int64_t H, W;
};
template <class T>
PYSEQNET_INLINE Slice<T> slice_of(T* tensor, Layout layout, int64_t n, int64_t c, int64_t C, int64_t H,
                                  int64_t W) {
  const int64_t channels = smaller(VL, C - c);
  if (layout == Layout::nchw) return {tensor + (n * C + c) * H * W, channels, H * W, 1, H, W};
  return {tensor + n * H * W * C + c, channels, 1, C, H, W};
}

// A rectangle of pixels: rows h0 <= h < h1, columns w0 <= w < w1.
struct Rectangle {
  int64_t h0, h1, w0, w1;
  PYSEQNET_INLINE bool empty() const { return h0 >= h1 || w0 >= w1; }
};

// Rectangle -> tile. Row h goes to tile + (h - h0) pitch, column w to column[w - w0] in it (floats).
template <class T>
PYSEQNET_INLINE void load_tile(const Slice<const T>& x, const Rectangle& part, const int64_t* column,
                               int64_t pitch, float* tile) {
  if (part.empty()) return;
  const int64_t columns = part.w1 - part.w0;
  if (x.channel == 1) {
    for (int64_t h = part.h0; h < part.h1; h++, tile += pitch) {
      const T* row = x.at + (h * x.W + part.w0) * x.pixel;
      for (int64_t w = 0; w < columns; w++, row += x.pixel)
        store(tile + column[w], x.channels == VL ? load_lanes(row) : load_between(row, 0, x.channels, vf{}));
    }
    return;
  }
  // Whole rows follow each other in memory: one long run of pixels. Otherwise a run a row.
  const bool whole_rows = columns == x.W;
  const int64_t run = whole_rows ? columns * (part.h1 - part.h0) : columns;
  int64_t w = 0;
  for (int64_t h = part.h0; h < (whole_rows ? part.h0 + 1 : part.h1); h++) {
    const T* first = x.at + h * x.W + part.w0;
    for (int64_t e = 0; e < run; e += VL) {
      const int64_t count = smaller(VL, run - e);
      vf v[VL];
#pragma GCC unroll 16
      for (int c = 0; c < VL; c++) {
        const T* from = first + c * x.channel + e;
        v[c] = c >= x.channels ? vf{} : count == VL ? load_lanes(from) : load_between(from, 0, count, vf{});
      }
      transpose(v);
      if (count == VL && w + VL <= columns) {
#pragma GCC unroll 16
        for (int k = 0; k < VL; k++) store(tile + column[w + k], v[k]);
        w += VL;
      } else {
        for (int64_t k = 0; k < count; k++) {
          if (w == columns) w = 0, tile += pitch;
          store(tile + column[w++], v[k]);
        }
      }
      if (w == columns && e + VL < run) w = 0, tile += pitch;
    }
    if (!whole_rows) w = 0, tile += pitch;
  }
}

// Compact tile (one vector a pixel, rows of w1 - w0) -> rectangle. tile is read in whole vectors of pixels:
// VL vectors of slack behind it.
template <class T>
PYSEQNET_INLINE void store_tile(const float* tile, const Rectangle& part, const Slice<T>& y) {
  if (part.empty()) return;
  const int64_t columns = part.w1 - part.w0;
  if (y.channel == 1) {
    for (int64_t h = part.h0; h < part.h1; h++) {
      T* row = y.at + (h * y.W + part.w0) * y.pixel;
      for (int64_t w = 0; w < columns; w++, row += y.pixel, tile += VL)
        store_lanes_n(row, load(tile), y.channels);
    }
    return;
  }
  const bool whole_rows = columns == y.W;
  const int64_t run = whole_rows ? columns * (part.h1 - part.h0) : columns;
  for (int64_t h = part.h0; h < (whole_rows ? part.h0 + 1 : part.h1); h++, tile += run * VL) {
    T* first = y.at + h * y.W + part.w0;
    for (int64_t e = 0; e < run; e += VL) {
      vf v[VL];
#pragma GCC unroll 16
      for (int k = 0; k < VL; k++) v[k] = load(tile + (e + k) * VL);
      transpose(v);
#pragma GCC unroll 16
      for (int c = 0; c < VL; c++)
        if (c < y.channels) store_lanes_n(first + c * y.channel + e, v[c], run - e);
    }
  }
}

}  // namespace PYSEQNET_ISA
}  // namespace pyseqnet
