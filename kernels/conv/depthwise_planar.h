// Depthwise convolution of planar images with few taps and stride 1: lanes are neighbouring columns.
//
// Transposing a plane into lanes of channels costs more than a handful of multiply-adds saves. Here every tap
// is an unaligned load from the tensor itself and a broadcast weight; the columns near the padding use
// partial loads. The input gradient is the same loop with the filter reversed.
#pragma once
#include "common/element_lanes.h"

namespace pyseqnet {
inline namespace PYSEQNET_ISA {

// One plane: out[h][w] = start + sum over r, s of in[h + r dilation_h - pad_h][w + s dilation_w - pad_w]
// weight[r S + s]
template <class T>
struct PlanarCorrelation {
  const T* in;
  int64_t in_rows, in_columns;
  T* out;
  int64_t out_columns;
  const float* weight;
  int64_t R, S, pad_h, pad_w, dilation_h, dilation_w;
  float start;
};

// `vectors` vectors of outputs from column w; whole: every tap of every lane lies inside the row.
template <int vectors, bool whole, class T>
PYSEQNET_INLINE void planar_block(const PlanarCorrelation<T>& c, int64_t h, int64_t w, int64_t count) {
  vf sum[vectors];
#pragma GCC unroll 4
  for (int k = 0; k < vectors; k++) sum[k] = set1(c.start);
  for (int64_t r = 0; r < c.R; r++) {
    const int64_t row = h + r * c.dilation_h - c.pad_h;
    if (row < 0 || row >= c.in_rows) continue;
    const T* in = c.in + row * c.in_columns;
    for (int64_t s = 0; s < c.S; s++) {
      const int64_t at = w + s * c.dilation_w - c.pad_w;
      const vf weight = set1(c.weight[r * c.S + s]);
#pragma GCC unroll 4
      for (int k = 0; k < vectors; k++)
        sum[k] += weight * (whole ? load_lanes(in + at + k * VL)
                                  : load_between(in + at, -at, c.in_columns - at, vf{}));
    }
  }
  T* out = c.out + h * c.out_columns + w;
#pragma GCC unroll 4
  for (int k = 0; k < vectors; k++)
    if (whole)
      store_lanes(out + k * VL, sum[k]);
    else
      store_lanes_n(out, sum[k], count);
}

// Columns [w0, w1) of row h. The last whole block begins early rather than being short: what it does again
// comes out the same.
template <class T>
PYSEQNET_INLINE void planar_row(const PlanarCorrelation<T>& c, int64_t h, int64_t w0, int64_t w1) {
  const int64_t reach = (c.S - 1) * c.dilation_w;
  int64_t first = c.pad_w > w0 ? c.pad_w : w0,
          end = c.in_columns + c.pad_w - reach;  // where all taps are inside
  if (end > w1) end = w1;
  if (end - first < VL) first = end = w1;
  for (int64_t w = w0; w < first; w += VL) planar_block<1, false>(c, h, w, w1 - w < VL ? w1 - w : VL);
  int64_t w = first;
  for (; w + 4 * VL <= end; w += 4 * VL) planar_block<4, true>(c, h, w, 4 * VL);
  for (; w < end; w += VL) planar_block<1, true>(c, h, w + VL <= end ? w : end - VL, VL);
  for (w = end; w < w1; w += VL) planar_block<1, false>(c, h, w, w1 - w < VL ? w1 - w : VL);
}

// sum[s] += sum over rows and columns of g[w] x[w + s dilation], for one row of taps of one plane; x points
// to the column of the first tap at output column 0.
template <int taps, class T>
PYSEQNET_INLINE void planar_gradient(const T* x, int64_t x_pitch, int64_t x_columns, int64_t pad,
                                     int64_t dilation, const T* g, int64_t g_pitch, int64_t rows, int64_t w0,
                                     int64_t w1, float* sum, int64_t sum_step) {
  constexpr int chains = taps <= 2 ? 4 : taps <= 4 ? 2 : 1;  // independent sums, to cover the latency
  int64_t first = pad > w0 ? pad : w0, end = x_columns + pad - (taps - 1) * dilation;
  if (first > w1) first = w1;
  if (end > w1) end = w1;
  if (end < first) end = first;
  const int64_t whole = end - (end - first) % VL;
  vf total[chains][taps] = {};
  for (int64_t r = 0; r < rows; r++, x += x_pitch, g += g_pitch) {
    int64_t w = first;
    for (; w + chains * VL <= whole; w += chains * VL)
#pragma GCC unroll 4
      for (int k = 0; k < chains; k++) {
        const vf gradient = load_lanes(g + w + k * VL);
#pragma GCC unroll 5
        for (int t = 0; t < taps; t++)
          total[k][t] += gradient * load_lanes(x + w + k * VL - pad + t * dilation);
      }
    for (; w < whole; w += VL) {
      const vf gradient = load_lanes(g + w);
#pragma GCC unroll 5
      for (int t = 0; t < taps; t++) total[0][t] += gradient * load_lanes(x + w - pad + t * dilation);
    }
    // The ends of the row: lanes that are no output, or whose tap is outside, are zero on both sides.
    auto part = [&](int64_t from, int64_t to) PYSEQNET_LAMBDA {
      for (int64_t w = from; w < to; w += VL) {
        const vf gradient = load_between(g + w, 0, to - w, vf{});
#pragma GCC unroll 5
        for (int t = 0; t < taps; t++) {
          const int64_t at = w - pad + t * dilation, left = x_columns - at < to - w ? x_columns - at : to - w;
          total[0][t] += gradient * load_between(x + at, -at, left, vf{});
        }
      }
    };
    part(w0, first);
    part(whole, w1);
  }
#pragma GCC unroll 5
  for (int t = 0; t < taps; t++) {
    vf all = total[0][t];
#pragma GCC unroll 4
    for (int k = 1; k < chains; k++) all += total[k][t];
    sum[t * sum_step] += hsum(all);
  }
}

constexpr int64_t most_planar_taps = 5;

template <class T>
void planar_gradient(int64_t taps, const T* x, int64_t x_pitch, int64_t x_columns, int64_t pad,
                     int64_t dilation, const T* g, int64_t g_pitch, int64_t rows, int64_t w0, int64_t w1,
                     float* sum, int64_t sum_step) {
#define PYSEQNET_TAPS(n) \
  case n:                \
    return planar_gradient<n>(x, x_pitch, x_columns, pad, dilation, g, g_pitch, rows, w0, w1, sum, sum_step)
  switch (taps) {
    PYSEQNET_TAPS(1);
    PYSEQNET_TAPS(2);
    PYSEQNET_TAPS(3);
    PYSEQNET_TAPS(4);
    PYSEQNET_TAPS(5);
  }
#undef PYSEQNET_TAPS
}

}  // namespace PYSEQNET_ISA
}  // namespace pyseqnet
