// The inner loops of the depthwise kernels: vectors of channels, a block of neighbouring outputs, runs of
// neighbouring taps.
//
// A run is up to `longest_run` taps whose inputs follow each other in the tile (every dilation that divides
// the stride gives such runs; others give runs of one). Walking over the inputs, each input vector is loaded
// once and multiplied by every weight of the run: outputs + run - 1 loads for outputs * run multiply-adds.
#pragma once
#include "common/simd.h"

namespace pyseqnet {
inline namespace PYSEQNET_ISA {

// Registers: a block of sums, the run's weights, one input. 8 + 8 + 1 of 32, or 8 + 4 + 1 of 16.
constexpr int longest_run = VL == 16 ? 8 : 4;
constexpr int outputs_at_once = 8;

struct Run {
  int64_t offset;  // floats from the block's first output position to the first tap's input
  int32_t first;   // index of its first tap in the reordered filter row
  int32_t length;
};

// sum[q] += sum over taps t of x[q + t] w[t]
template <int outputs, int taps>
PYSEQNET_INLINE void multiply_run(vf (&sum)[outputs], const float* x, const float* w) {
  vf weight[taps];
#pragma GCC unroll 8
  for (int t = 0; t < taps; t++) weight[t] = load(w + t * VL);
#pragma GCC unroll 16
  for (int i = 0; i < outputs + taps - 1; i++) {
    const vf v = load(x + i * VL);
#pragma GCC unroll 8
    for (int t = 0; t < taps; t++)
      if (i - t >= 0 && i - t < outputs) sum[i - t] += v * weight[t];
  }
}

template <int outputs>
PYSEQNET_INLINE void multiply_run(int length, vf (&sum)[outputs], const float* x, const float* w) {
  switch (length) {
    case 1:
      return multiply_run<outputs, 1>(sum, x, w);
    case 2:
      return multiply_run<outputs, 2>(sum, x, w);
    case 3:
      return multiply_run<outputs, 3>(sum, x, w);
    case 4:
      return multiply_run<outputs, 4>(sum, x, w);
#if defined(__AVX512F__)
    case 5:
      return multiply_run<outputs, 5>(sum, x, w);
    case 6:
      return multiply_run<outputs, 6>(sum, x, w);
    case 7:
      return multiply_run<outputs, 7>(sum, x, w);
    case 8:
      return multiply_run<outputs, 8>(sum, x, w);
#endif
  }
}

// One row of the filter against one row of a tile, and where each is.
struct RowPair {
  const float *x, *w;
};

// Block of outputs from position l: start + the sum over rows and runs, to out, out + step ..; the first n.
template <int outputs>
PYSEQNET_INLINE void correlate_block(const RowPair* rows, int64_t row_count, const Run* runs,
                                     int64_t run_count, vf start, int64_t l, int64_t n, float* out,
                                     int64_t step) {
  vf sum[outputs];
#pragma GCC unroll 8
  for (int q = 0; q < outputs; q++) sum[q] = start;
  for (int64_t r = 0; r < row_count; r++)
    for (int64_t k = 0; k < run_count; k++)
      multiply_run<outputs>(runs[k].length, sum, rows[r].x + runs[k].offset + l * VL,
                            rows[r].w + runs[k].first * VL);
#pragma GCC unroll 8
  for (int q = 0; q < outputs; q++)
    if (q < n) store(out + q * step, sum[q]);
}

// A row of `count` outputs. Tiles are readable to the end of the last block of outputs_at_once.
PYSEQNET_INLINE void correlate_row(const RowPair* rows, int64_t row_count, const Run* runs, int64_t run_count,
                                   vf start, int64_t count, float* out, int64_t step) {
  int64_t l = 0;
  for (; l + outputs_at_once / 2 < count; l += outputs_at_once)
    correlate_block<outputs_at_once>(rows, row_count, runs, run_count, start, l, count - l, out + l * step,
                                     step);
  if (l < count)
    correlate_block<outputs_at_once / 2>(rows, row_count, runs, run_count, start, l, count - l,
                                         out + l * step, step);
}

// gradient[t] += sum over rows and outputs q of g[q] x[q + t].
constexpr int pixels_at_once = VL == 16 ? 8 : 4;
template <int taps>
PYSEQNET_INLINE void gradient_of_run(const float* x, int64_t x_pitch, const float* g, int64_t g_pitch,
                                     int64_t rows, int64_t count, float* gradient) {
  constexpr int chains = taps <= 2 ? 4 : taps <= 4 ? 2 : 1;  // independent sums, to cover the latency
  vf sum[chains][taps] = {};
  for (int64_t r = 0; r < rows; r++, x += x_pitch, g += g_pitch) {
    int64_t q = 0;
    for (; q + pixels_at_once <= count; q += pixels_at_once) {
      vf pixel[pixels_at_once];
#pragma GCC unroll 8
      for (int k = 0; k < pixels_at_once; k++) pixel[k] = load(g + (q + k) * VL);
#pragma GCC unroll 16
      for (int i = 0; i < pixels_at_once + taps - 1; i++) {
        const vf v = load(x + (q + i) * VL);
#pragma GCC unroll 8
        for (int t = 0; t < taps; t++)
          if (i - t >= 0 && i - t < pixels_at_once) sum[(i - t) % chains][t] += pixel[i - t] * v;
      }
    }
    // One by one, not padded with zeros: what lies beyond the row may be infinite.
    for (; q < count; q++) {
      const vf pixel = load(g + q * VL);
#pragma GCC unroll 8
      for (int t = 0; t < taps; t++) sum[0][t] += pixel * load(x + (q + t) * VL);
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < taps; t++) {
    vf total = sum[0][t];
#pragma GCC unroll 4
    for (int c = 1; c < chains; c++) total += sum[c][t];
    store(gradient + t * VL, load(gradient + t * VL) + total);
  }
}

inline void gradient_of_run(int length, const float* x, int64_t x_pitch, const float* g, int64_t g_pitch,
                            int64_t rows, int64_t count, float* gradient) {
  switch (length) {
    case 1:
      return gradient_of_run<1>(x, x_pitch, g, g_pitch, rows, count, gradient);
    case 2:
      return gradient_of_run<2>(x, x_pitch, g, g_pitch, rows, count, gradient);
    case 3:
      return gradient_of_run<3>(x, x_pitch, g, g_pitch, rows, count, gradient);
    case 4:
      return gradient_of_run<4>(x, x_pitch, g, g_pitch, rows, count, gradient);
#if defined(__AVX512F__)
    case 5:
      return gradient_of_run<5>(x, x_pitch, g, g_pitch, rows, count, gradient);
    case 6:
      return gradient_of_run<6>(x, x_pitch, g, g_pitch, rows, count, gradient);
    case 7:
      return gradient_of_run<7>(x, x_pitch, g, g_pitch, rows, count, gradient);
    case 8:
      return gradient_of_run<8>(x, x_pitch, g, g_pitch, rows, count, gradient);
#endif
  }
}

}  // namespace PYSEQNET_ISA
}  // namespace pyseqnet
