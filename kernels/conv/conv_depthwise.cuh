// Depthwise convolution: how outputs are numbered, and the kernel for long rows of taps.
#pragma once
#include "conv/conv_generic.cuh"

namespace pyseqnet {

constexpr int depthwise_threads = 256;
constexpr int lines_together = 4, columns_together = 4;

// One spatial axis of correlate: output i reads the input at i * stride - pad + tap * dilation.
// Of gather_strided: pixel i reads gy at (i + pad - tap * dilation) / stride where that is whole.
struct SpatialAxis {
  int in, out, taps, stride, pad, dilation;
  int back, rest;  // the dilation divided by the stride: quotient and remainder
};

// The outputs, numbered in the order of memory: (n, c, line group, column) or (n, line group, column, c).
struct Depthwise {
  Radix<4> radix;
  int64_t items;
  int walk;  // items a thread computes, one after the other
  bool channels_last;
  SpatialAxis h, w;
  Strides in, out;
  // Where the weight of tap 0, 0 of channel 0 lies, and the way to the next channel, row and column.
  int weight_origin, weight_c, weight_h, weight_w;
};

struct Position {
  int n, c, line, column;
  PYSEQNET_DEVICE Position(const Depthwise& d, const Digits<4>& i)
      : n(i.digit[0]),
        c(d.channels_last ? i.digit[3] : i.digit[1]),
        line(d.channels_last ? i.digit[1] : i.digit[2]),
        column(d.channels_last ? i.digit[2] : i.digit[3]) {}
};

// Calls f(Position) for the thread's share of the outputs.
template <class F>
PYSEQNET_DEVICE void walk_outputs(const Depthwise& d, F&& f) {
  int64_t item = int64_t(blockIdx.x) * (depthwise_threads * d.walk) + threadIdx.x;
  if (item >= d.items) return;
  Digits<4> digits = digits_of(item, d.radix.extent);
  for (int left = d.walk; left > 0 && item < d.items; left--, item += depthwise_threads) {
    f(Position(d, digits));
    advance(digits, d.radix);
  }
}

// Filters of four or more neighbouring taps a row at stride 1. A thread computes four neighbouring columns and
// slides along the taps: each step loads one pixel and one weight for four products.
template <class T>
__global__ void __launch_bounds__(depthwise_threads, 4)
    correlate_columns(const T* __restrict__ in, const T* __restrict__ weights, const T* __restrict__ bias,
                      T* __restrict__ out, Depthwise d) {
  using Acc = accumulator_t<T>;
  const int64_t row_step = d.h.dilation * d.in.h;
  walk_outputs(d, [&](Position at) {
    const int first = at.column * columns_together;
    const int top = at.line * d.h.stride - d.h.pad, left = first - d.w.pad;
    const T* row = in + (at.n * d.in.n + at.c * d.in.c + top * d.in.h + left * d.in.w);
    const T* weight_row = weights + (d.weight_origin + int64_t(at.c) * d.weight_c);
    Acc sum[columns_together];
#pragma unroll
    for (int i = 0; i < columns_together; i++) sum[i] = bias ? load(bias + at.c) : Acc(0);
    for (int r = 0, h = top; r < d.h.taps;
         r++, h += d.h.dilation, row += row_step, weight_row += d.weight_h) {
      if (unsigned(h) >= unsigned(d.h.in)) continue;
      const T *next = row, *weight = weight_row;
      int w = left;
      Acc pixel[columns_together];
#pragma unroll
      for (int i = 0; i < columns_together - 1; i++, w++, next += d.in.w)
        pixel[i] = unsigned(w) < unsigned(d.w.in) ? load(next) : Acc(0);
#pragma unroll 4
      for (int s = 0; s < d.w.taps; s++, w++, next += d.in.w, weight += d.weight_w) {
        pixel[columns_together - 1] = unsigned(w) < unsigned(d.w.in) ? load(next) : Acc(0);
        const Acc v = load(weight);
#pragma unroll
        for (int i = 0; i < columns_together; i++) sum[i] += v * pixel[i];
#pragma unroll
        for (int i = 0; i < columns_together - 1; i++) pixel[i] = pixel[i + 1];
      }
    }
    T* result = out + (at.n * d.out.n + at.c * d.out.c + at.line * d.out.h + first * d.out.w);
#pragma unroll
    for (int i = 0; i < columns_together; i++)
      if (first + i < d.w.out) store(result + i * d.out.w, sum[i]);
  });
}

}  // namespace pyseqnet
