// The inner loops of the depthwise kernels: vectors of channels, a block of neighbouring outputs, runs of
// neighbouring taps.
//
// A run is up to `longest_run` taps whose inputs follow each other in the tile (every dilation that divides
// the stride gives such runs; others give runs of one). Walking over the inputs, each input vector is loaded
// once and multiplied by every weight of the run: outputs + run - 1 loads for outputs * run multiply-adds.
#pragma once
#include "common/element_lanes.h"

namespace pyseqnet {
inline namespace PYSEQNET_ISA {

// Registers: a block of sums, the run's weights, one input. 8 + 8 + 1 of 32, or 8 + 4 + 1 of 16.
constexpr int longest_run = VL == 16 ? 8 : 4;
constexpr int outputs_at_once = 8;

struct Run {
  int64_t offset;  // elements from the block's first output position to the first tap's input
  int32_t first;   // index of its first tap in the reordered filter row
  int32_t length;
};

// sum[q] += sum over taps t of x[(q + t) step] w[t]. x is a tile (float, step VL) or a channels-last tensor.
template <int outputs, int taps, class T>
PYSEQNET_INLINE void multiply_run(vf (&sum)[outputs], const T* x, int64_t step, const float* w) {
  vf weight[taps];
#pragma GCC unroll 8
  for (int t = 0; t < taps; t++) weight[t] = load(w + t * VL);
#pragma GCC unroll 16
  for (int i = 0; i < outputs + taps - 1; i++) {
    const vf v = load_lanes(x + i * step);
#pragma GCC unroll 8
    for (int t = 0; t < taps; t++)
      if (i - t >= 0 && i - t < outputs) sum[i - t] += v * weight[t];
  }
}

template <int outputs, class T>
PYSEQNET_INLINE void multiply_run(int length, vf (&sum)[outputs], const T* x, int64_t step, const float* w) {
  switch (length) {
    case 1:
      return multiply_run<outputs, 1>(sum, x, step, w);
    case 2:
      return multiply_run<outputs, 2>(sum, x, step, w);
    case 3:
      return multiply_run<outputs, 3>(sum, x, step, w);
    case 4:
      return multiply_run<outputs, 4>(sum, x, step, w);
#if defined(__AVX512F__)
    case 5:
      return multiply_run<outputs, 5>(sum, x, step, w);
    case 6:
      return multiply_run<outputs, 6>(sum, x, step, w);
    case 7:
      return multiply_run<outputs, 7>(sum, x, step, w);
    case 8:
      return multiply_run<outputs, 8>(sum, x, step, w);
#endif
  }
}

// One row of the filter against one row of inputs, and where each is.
template <class T>
struct RowPair {
  const T* x;
  const float* w;
};

// What a row of outputs is summed from.
template <class T>
struct Taps {
  const RowPair<T>* rows;
  int64_t row_count;
  const Run* runs;
  int64_t run_count;
  int64_t step;  // elements from the input of one output to that of the next
};

// Block of outputs from position l: start + the sum over rows and runs, to out, out + step ..; the first n.
template <int outputs, class In, class Out>
PYSEQNET_INLINE void correlate_block(const Taps<In>& taps, vf start, int64_t l, int64_t n, Out* out,
                                     int64_t step) {
  vf sum[outputs];
#pragma GCC unroll 8
  for (int q = 0; q < outputs; q++) sum[q] = start;
  for (int64_t r = 0; r < taps.row_count; r++)
    for (int64_t k = 0; k < taps.run_count; k++) {
      const Run& run = taps.runs[k];
      multiply_run<outputs>(run.length, sum, taps.rows[r].x + run.offset + l * taps.step, taps.step,
                            taps.rows[r].w + run.first * VL);
    }
#pragma GCC unroll 8
  for (int q = 0; q < outputs; q++)
    if (q < n) store_lanes(out + q * step, sum[q]);
}

// A row of `count` outputs of a tile, which is readable to the end of the last block of outputs_at_once.
PYSEQNET_INLINE void correlate_tile_row(Taps<float> taps, vf start, int64_t count, float* out, int64_t step) {
  taps.step = VL;
  int64_t l = 0;
  for (; l + outputs_at_once / 2 < count; l += outputs_at_once)
    correlate_block<outputs_at_once>(taps, start, l, count - l, out + l * step, step);
  if (l < count) correlate_block<outputs_at_once / 2>(taps, start, l, count - l, out + l * step, step);
}

// A row of `count` outputs of a tensor, all of whose taps lie inside the image: exact. The last block begins
// early; what it does again comes out the same.
template <class In, class Out>
PYSEQNET_INLINE void correlate_tensor_row(const Taps<In>& taps, vf start, int64_t first, int64_t end,
                                          Out* out, int64_t step) {
  if (end - first >= outputs_at_once) {
    for (int64_t l = first; l < end; l += outputs_at_once) {
      const int64_t from = l + outputs_at_once <= end ? l : end - outputs_at_once;
      correlate_block<outputs_at_once>(taps, start, from, outputs_at_once, out + from * step, step);
    }
    return;
  }
  int64_t l = first;
  if (l + 4 <= end) correlate_block<4>(taps, start, l, 4, out + l * step, step), l += 4;
  for (; l < end; l++) correlate_block<1>(taps, start, l, 1, out + l * step, step);
}

// gradient[t] += sum over rows and outputs q of g[q g_step] x[(q + t) x_step].
// A float sum is closed after this many products and added to the gradient: the rounding of one long chain
// over a whole batch of images would exceed that of a blocked matrix product.
constexpr int64_t products_in_a_sum = 256;
constexpr int pixels_at_once = VL == 16 ? 8 : 4;
template <class T>
struct GradientRows {
  const T *x, *g;
  int64_t x_step, x_pitch, g_step, g_pitch;  // elements between outputs, between rows
  int64_t rows, count;
};
template <int taps, class T>
PYSEQNET_INLINE void gradient_of_run(GradientRows<T> in, float* gradient) {
  constexpr int chains = taps <= 2 ? 4 : taps <= 4 ? 2 : 1;  // independent sums, to cover the latency
  vf sum[chains][taps] = {};
  int64_t products = 0;
  auto close = [&]() PYSEQNET_LAMBDA {
#pragma GCC unroll 8
    for (int t = 0; t < taps; t++) {
      vf total = sum[0][t];
      sum[0][t] = vf{};
#pragma GCC unroll 4
      for (int c = 1; c < chains; c++) total += sum[c][t], sum[c][t] = vf{};
      store(gradient + t * VL, load(gradient + t * VL) + total);
    }
    products = 0;
  };
  for (int64_t r = 0; r < in.rows; r++, in.x += in.x_pitch, in.g += in.g_pitch) {
    if ((products += in.count) > products_in_a_sum) close();
    int64_t q = 0;
    for (; q + pixels_at_once <= in.count; q += pixels_at_once) {
      const T *x = in.x + q * in.x_step, *g = in.g + q * in.g_step;
      vf pixel[pixels_at_once];
#pragma GCC unroll 8
      for (int k = 0; k < pixels_at_once; k++) pixel[k] = load_lanes(g + k * in.g_step);
#pragma GCC unroll 16
      for (int i = 0; i < pixels_at_once + taps - 1; i++) {
        const vf v = load_lanes(x + i * in.x_step);
#pragma GCC unroll 8
        for (int t = 0; t < taps; t++)
          if (i - t >= 0 && i - t < pixels_at_once) sum[(i - t) % chains][t] += pixel[i - t] * v;
      }
    }
    // One by one, not padded with zeros: what lies beyond the row may be infinite.
    for (; q < in.count; q++) {
      const vf pixel = load_lanes(in.g + q * in.g_step);
#pragma GCC unroll 8
      for (int t = 0; t < taps; t++) sum[0][t] += pixel * load_lanes(in.x + (q + t) * in.x_step);
    }
  }
  close();
}

template <class T>
void gradient_of_run(int length, const GradientRows<T>& in, float* gradient) {
  switch (length) {
    case 1:
      return gradient_of_run<1>(in, gradient);
    case 2:
      return gradient_of_run<2>(in, gradient);
    case 3:
      return gradient_of_run<3>(in, gradient);
    case 4:
      return gradient_of_run<4>(in, gradient);
#if defined(__AVX512F__)
    case 5:
      return gradient_of_run<5>(in, gradient);
    case 6:
      return gradient_of_run<6>(in, gradient);
    case 7:
      return gradient_of_run<7>(in, gradient);
    case 8:
      return gradient_of_run<8>(in, gradient);
#endif
  }
}

}  // namespace PYSEQNET_ISA
}  // namespace pyseqnet
