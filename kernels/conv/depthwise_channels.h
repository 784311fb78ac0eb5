// Depthwise convolution of channels-last images without a tile: a pixel's channels are contiguous already, so
// the inner loops of depthwise_taps.h read the tensors themselves, VL channels at a time. Outputs whose taps
// all lie inside a row of the image go in blocks; the few at its ends go tap by tap.
#pragma once
#include "conv/depthwise_taps.h"

namespace pyseqnet {
inline namespace PYSEQNET_ISA {

// How positions along a row of results meet columns of the inputs, for one phase of the results:
//   input column  = l in_stride + tap_column[k]     for its taps k0 <= k < k1 (positions in the filter row)
//   result column = l out_stride + out_first        for l0 <= l < l1
struct RowGeometry {
  const int64_t* tap_column;
  int64_t k0, k1;
  const Run* runs;  // their offsets are in elements of the tensor
  int64_t run_count;
  int64_t in_stride, in_columns;
  int64_t out_stride, out_first;
  int64_t l0, l1;
  int64_t inner0, inner1;  // l0 <= inner0 <= inner1 <= l1: all taps k0 .. k1 - 1 inside
};

struct InnerRange {
  int64_t begin, end;
};
// Positions of [l0, l1) whose taps, between columns `lowest` and `highest` at l = 0, all lie inside a row.
PYSEQNET_INLINE InnerRange inner_range(int64_t lowest, int64_t highest, int64_t stride, int64_t columns,
                                       int64_t l0, int64_t l1) {
  int64_t begin = lowest < 0 ? (-lowest + stride - 1) / stride : 0;
  int64_t end = highest < columns ? (columns - 1 - highest) / stride + 1 : 0;
  begin = begin < l0 ? l0 : begin > l1 ? l1 : begin;
  end = end > l1 ? l1 : end;
  return {begin, end < begin ? begin : end};
}

// One row of results, VL channels. in.x of `rows`: the input row; out: the result row.
template <class T>
PYSEQNET_INLINE void correlate_channels_row(const RowGeometry& g, const RowPair<T>* rows, int64_t row_count,
                                            vf start, int64_t C, T* out) {
  T* results = out + g.out_first * C;
  correlate_tensor_row<T, T>({rows, row_count, g.runs, g.run_count, g.in_stride * C}, start, g.inner0,
                             g.inner1, results, g.out_stride * C);
  for (int64_t l = g.l0; l < g.l1; l++) {
    if (l == g.inner0) l = g.inner1;
    if (l >= g.l1) break;
    vf sum = start;
    for (int64_t r = 0; r < row_count; r++)
      for (int64_t k = g.k0; k < g.k1; k++) {
        const int64_t column = l * g.in_stride + g.tap_column[k];
        if (column >= 0 && column < g.in_columns)
          sum += load_lanes(rows[r].x + column * C) * load(rows[r].w + k * VL);
      }
    store_lanes(results + l * g.out_stride * C, sum);
  }
}

// Adds to gradient[k] for the taps of one run, over `rows` rows of outputs. x: the input row that the first
// of them meets, g: the gradient's row.
template <class T>
PYSEQNET_INLINE void gradient_of_channels_run(const RowGeometry& geometry, const Run& run, const T* x,
                                              int64_t x_pitch, const T* g, int64_t g_pitch, int64_t rows,
                                              int64_t C, float* gradient) {
  const int64_t* column = geometry.tap_column + run.first;
  const int64_t stride = geometry.in_stride;
  const InnerRange inner =
      inner_range(column[0], column[run.length - 1], stride, geometry.in_columns, geometry.l0, geometry.l1);
  if (inner.begin < inner.end)
    gradient_of_run<T>(run.length,
                       {x + (inner.begin * stride + column[0]) * C, g + inner.begin * C, stride * C, x_pitch,
                        C, g_pitch, rows, inner.end - inner.begin},
                       gradient);
  for (int t = 0; t < run.length; t++) {
    vf sum = load(gradient + t * VL);
    for (int64_t l = geometry.l0; l < geometry.l1; l++) {
      if (l == inner.begin) l = inner.end;
      if (l >= geometry.l1) break;
      const int64_t at = l * stride + column[t];
      if (at < 0 || at >= geometry.in_columns) continue;
      for (int64_t r = 0; r < rows; r++)
        sum += load_lanes(g + r * g_pitch + l * C) * load_lanes(x + r * x_pitch + at * C);
    }
    store(gradient + t * VL, sum);
  }
}

}  // namespace PYSEQNET_ISA
}  // namespace pyseqnet
