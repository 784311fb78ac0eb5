// Depthwise convolution (as many groups as channels and filters) on any CUDA device. Each output is R*S
// products, so all of it is bound by memory, and by the instructions around a product; no tile of a matrix
// product would be filled.
//
// correlate_3x3: forward of the common filter, stride 1 or 2 down the lines. A thread computes four lines of
// one column and loads the three pixels of an input line once for all of them.
//
// correlate_columns (conv_depthwise.cuh): forward of four or more neighbouring taps a row, stride 1: 5x5, 7x7,
// and the long filters of speech. Four columns slide over the taps.
//
// correlate: forward of every other filter. Four lines of one column (one where there are fewer) share index
// arithmetic, weights and the test of a tap's column. What several outputs read comes from the L1 cache.
// The input gradient of stride 1 is the same three, with the filter turned around.
//
// gather_strided: input gradient of a stride above 1. Every pixel sums the taps that meet an output. Whether
// tap r does is kept as a quotient and a remainder by the stride, which change by constants from tap to tap.
//
// correlate_sums_3x3, correlate_sums: weight gradient. A thread keeps the sums of nine taps over its share of
// the pixels; blocks are summed as conv_generic.cuh says. Filters of more than nine taps take several blocks.
//
// Neighbouring threads hold neighbouring elements of the output: pixels in NCHW, channels in NHWC. Outputs
// are numbered in the order of memory, so planes of any size fill the warps, and a thread walks that
// numbering by constant steps.
//
// Instructions an output (counted in sm_90a code, float32 / bfloat16): correlate_3x3 67 / 90,
// correlate_sums_3x3 55 / 75, correlate 15 a product. A GPU of 132 multiprocessors issues 30e12 a second, so
// float32 is near the bandwidth and 16 bits are bound by instructions. 40 to 122 registers, no spills.
//
// Predicted before any measurement, for an H200 (4.3 TB/s), N32 C64 56x56 3x3 pad 1 (51 MB in float32, 12
// us): forward and input gradient 15 us in float32, 19 us in bfloat16; weight gradient 17 us and 20 us.
// Measured on an H200 with `correlate` for 7x7 (2x96x56x56): 55 us in float32, 60 in bfloat16, by 147 blocks of
// threads that walked four items each: instructions (15 a product, 15 us) and latency with one block a
// multiprocessor. correlate_columns has about 4 a product, and blocks enough: 6 us predicted.
#include "conv/conv_depthwise.cuh"

namespace pyseqnet {
namespace {

template <class T, int lines>
__global__ void __launch_bounds__(depthwise_threads, lines == 1 ? 5 : 3)
    correlate(const T* __restrict__ in, const T* __restrict__ weights, const T* __restrict__ bias,
              T* __restrict__ out, Depthwise d) {
  using Acc = accumulator_t<T>;
  const int64_t tap_step = d.w.dilation * d.in.w, row_step = d.h.dilation * d.in.h;
  const int64_t line_step = d.h.stride * d.in.h;
  walk_outputs(d, [&](Position at) {
    const int first = at.line * lines;
    const int top = first * d.h.stride - d.h.pad, left = at.column * d.w.stride - d.w.pad;
    const T* row = in + (at.n * d.in.n + at.c * d.in.c + top * d.in.h + left * d.in.w);
    const T* weight_row = weights + (d.weight_origin + int64_t(at.c) * d.weight_c);
    Acc sum[lines];
#pragma unroll
    for (int i = 0; i < lines; i++) sum[i] = bias ? load(bias + at.c) : Acc(0);
    for (int r = 0, h = top; r < d.h.taps; r++, h += d.h.dilation) {
      const T *pixel = row, *weight = weight_row;
#pragma unroll 2
      for (int s = 0, w = left; s < d.w.taps; s++, w += d.w.dilation) {
        if (unsigned(w) < unsigned(d.w.in)) {
          const Acc v = load(weight);
#pragma unroll
          for (int i = 0; i < lines; i++)
            if (unsigned(h + i * d.h.stride) < unsigned(d.h.in)) sum[i] += v * load(pixel + i * line_step);
        }
        pixel += tap_step;
        weight += d.weight_w;
      }
      row += row_step;
      weight_row += d.weight_h;
    }
    T* result = out + (at.n * d.out.n + at.c * d.out.c + first * d.out.h + at.column * d.out.w);
#pragma unroll
    for (int i = 0; i < lines; i++)
      if (first + i < d.h.out) store(result + i * d.out.h, sum[i]);
  });
}

// The input lines under `lines_together` outputs of a 3 x 3 filter, one after the other from the top: three
// pixels each, zero where they lie outside.
template <class T, int stride>
struct InputLines {
  static constexpr int count = (lines_together - 1) * stride + 3;
  const T* line;
  int64_t line_step, pixel_step;
  int h, lines_in;
  bool column_inside[3];
  PYSEQNET_DEVICE InputLines(const T* corner, const Strides& in, const SpatialAxis& rows,
                             const SpatialAxis& columns, int top, int left)
      : line(corner), line_step(in.h), pixel_step(in.w), h(top), lines_in(rows.in) {
#pragma unroll
    for (int s = 0; s < 3; s++) column_inside[s] = unsigned(left + s) < unsigned(columns.in);
  }
  PYSEQNET_DEVICE void next(accumulator_t<T> (&pixel)[3]) {
    const bool inside = unsigned(h) < unsigned(lines_in);
    const T* at = line;
#pragma unroll
    for (int s = 0; s < 3; s++, at += pixel_step)
      pixel[s] = inside && column_inside[s] ? load(at) : accumulator_t<T>(0);
    line += line_step;
    h++;
  }
  // The output whose tap row r lies on input line j, or -1.
  PYSEQNET_DEVICE static constexpr int output(int j, int r) {
    return j >= r && (j - r) % stride == 0 && (j - r) / stride < lines_together ? (j - r) / stride : -1;
  }
};

template <class T, int stride>
__global__ void __launch_bounds__(depthwise_threads, 3)
    correlate_3x3(const T* __restrict__ in, const T* __restrict__ weights, const T* __restrict__ bias,
                  T* __restrict__ out, Depthwise d) {
  using Acc = accumulator_t<T>;
  using Lines = InputLines<T, stride>;
  walk_outputs(d, [&](Position at) {
    const int first = at.line * lines_together;
    const int top = first * stride - d.h.pad, left = at.column * d.w.stride - d.w.pad;
    Lines lines(in + (at.n * d.in.n + at.c * d.in.c + top * d.in.h + left * d.in.w), d.in, d.h, d.w, top,
                left);
    const T* filter = weights + (d.weight_origin + int64_t(at.c) * d.weight_c);
    Acc weight[3][3], sum[lines_together];
#pragma unroll
    for (int tap = 0; tap < 9; tap++)
      weight[tap / 3][tap % 3] = load(filter + (tap / 3 * d.weight_h + tap % 3 * d.weight_w));
    const Acc b = bias ? load(bias + at.c) : Acc(0);
#pragma unroll
    for (int i = 0; i < lines_together; i++) sum[i] = b;
#pragma unroll
    for (int j = 0; j < Lines::count; j++) {
      Acc pixel[3];
      lines.next(pixel);
#pragma unroll
      for (int r = 0; r < 3; r++)
        if (const int i = Lines::output(j, r); i >= 0)
#pragma unroll
          for (int s = 0; s < 3; s++) sum[i] += weight[r][s] * pixel[s];
    }
    T* result = out + (at.n * d.out.n + at.c * d.out.c + first * d.out.h + at.column * d.out.w);
#pragma unroll
    for (int i = 0; i < lines_together; i++)
      if (first + i < d.h.out) store(result + i * d.out.h, sum[i]);
  });
}

// (pixel + pad - tap * dilation) / stride for tap = 0, 1, ...: whole where the remainder is zero.
struct OutputOfTap {
  int quotient, remainder;
  PYSEQNET_DEVICE OutputOfTap(const SpatialAxis& a, int pixel) {
    const int start = pixel + a.pad;
    quotient = start >= 0 ? start / a.stride : -((a.stride - 1 - start) / a.stride);
    remainder = start - quotient * a.stride;
  }
  PYSEQNET_DEVICE bool exists(const SpatialAxis& a) const {
    return remainder == 0 && unsigned(quotient) < unsigned(a.in);
  }
  PYSEQNET_DEVICE void next_tap(const SpatialAxis& a) {
    remainder -= a.rest;
    quotient -= a.back;
    if (remainder < 0) remainder += a.stride, quotient--;
  }
};

template <class T>
__global__ void __launch_bounds__(depthwise_threads, 5)
    gather_strided(const T* __restrict__ gy, const T* __restrict__ weights, T* __restrict__ gx, Depthwise d) {
  using Acc = accumulator_t<T>;
  walk_outputs(d, [&](Position at) {
    const T* image = gy + at.n * d.in.n + at.c * d.in.c;
    const T* weight = weights + int64_t(at.c) * d.weight_c;
    Acc sum = 0;
    OutputOfTap row(d.h, at.line);
    for (int r = 0; r < d.h.taps; r++, row.next_tap(d.h)) {
      if (!row.exists(d.h)) continue;
      const T* line = image + row.quotient * d.in.h;
      OutputOfTap column(d.w, at.column);
      for (int s = 0; s < d.w.taps; s++, column.next_tap(d.w))
        if (column.exists(d.w))
          sum += load(weight + r * d.weight_h + s * d.weight_w) * load(line + column.quotient * d.in.w);
    }
    store(gx + at.n * d.out.n + at.c * d.out.c + at.line * d.out.h + at.column * d.out.w, sum);
  });
}

// ------------------------------------------------------------------------------------------ weight gradient

constexpr int taps_together = 9;  // 3 x 3

// What a tap adds to the place of an output's first pixel.
struct Tap {
  int64_t offset;
  int h, w;
};

struct DepthwiseSums {
  ChannelSums sums;
  SpatialAxis h, w;
  Strides x;
};

// Writes a thread's `count` sums of taps, from first_tap on, to the workspace or to gw.
template <class T, class Acc>
PYSEQNET_DEVICE void store_taps(const Acc (&sum)[taps_together], void* out, const ChannelSums& s,
                                int64_t channel, int filter, int first_tap, int count) {
  const int64_t part = blockIdx.x / s.channel_blocks % s.parts;
  const int64_t first = (s.accumulators_out ? part * s.channels + channel : channel) * filter + first_tap;
#pragma unroll
  for (int k = 0; k < taps_together; k++) {
    if (k >= count) break;
    if (s.accumulators_out)
      static_cast<Acc*>(out)[first + k] = sum[k];
    else
      store(static_cast<T*>(out) + first + k, sum[k]);
  }
}

template <class T>
__global__ void __launch_bounds__(channel_threads, sizeof(T) == 8 ? 2 : 3)
    correlate_sums(const T* __restrict__ gy, const T* __restrict__ x, void* __restrict__ out,
                   DepthwiseSums d) {
  using Acc = accumulator_t<T>;
  PYSEQNET_SHARED(Acc, memory, [taps_together][channel_threads]);
  PYSEQNET_SHARED(Tap, taps, [taps_together]);
  const ChannelSums& s = d.sums;
  const int t = int(threadIdx.x), pixel_lanes = channel_threads / s.channel_lanes;
  const int filter = d.h.taps * d.w.taps;
  const int first_tap = int(blockIdx.x / (s.channel_blocks * s.parts)) * taps_together;
  const int count = filter - first_tap < taps_together ? filter - first_tap : taps_together;
  if (t < count) {
    const int h = (first_tap + t) / d.w.taps * d.h.dilation, w = (first_tap + t) % d.w.taps * d.w.dilation;
    taps[t] = {h * d.x.h + w * d.x.w, h, w};
  }
  __syncthreads();

  const ChannelShare mine(s, t);
  Acc sum[taps_together] = {};
  if (mine.channel < s.channels && mine.begin < mine.end) {
    gy += mine.channel * s.gy.c;
    x += mine.channel * d.x.c;
    Digits<3> i = digits_of(mine.begin, s.item.extent);
    for (int64_t item = mine.begin; item < mine.end; item += pixel_lanes) {
      const Acc g = load(gy + (i.digit[0] * s.gy.n + i.digit[1] * s.gy.h + i.digit[2] * s.gy.w));
      const int top = i.digit[1] * d.h.stride - d.h.pad, left = i.digit[2] * d.w.stride - d.w.pad;
      const T* corner = x + (i.digit[0] * d.x.n + top * d.x.h + left * d.x.w);
#pragma unroll
      for (int k = 0; k < taps_together; k++) {
        if (k >= count) break;
        const Tap tap = taps[k];
        if (unsigned(top + tap.h) < unsigned(d.h.in) && unsigned(left + tap.w) < unsigned(d.w.in))
          sum[k] += g * load(corner + tap.offset);
      }
      advance(i, s.item);
    }
  }
  add_pixel_lanes(sum, memory, t, s.channel_lanes);
  if (t < s.channel_lanes && mine.channel < s.channels)
    store_taps<T>(sum, out, s, mine.channel, filter, first_tap, count);
}

template <class T, int stride>
__global__ void __launch_bounds__(channel_threads, 2)
    correlate_sums_3x3(const T* __restrict__ gy, const T* __restrict__ x, void* __restrict__ out,
                       DepthwiseSums d) {
  using Acc = accumulator_t<T>;
  using Lines = InputLines<T, stride>;
  PYSEQNET_SHARED(Acc, memory, [taps_together][channel_threads]);
  const ChannelSums& s = d.sums;
  const int t = int(threadIdx.x), pixel_lanes = channel_threads / s.channel_lanes;
  const ChannelShare mine(s, t);
  Acc sum[taps_together] = {};
  if (mine.channel < s.channels && mine.begin < mine.end) {
    gy += mine.channel * s.gy.c;
    x += mine.channel * d.x.c;
    Digits<3> at = digits_of(mine.begin, s.item.extent);
    for (int64_t item = mine.begin; item < mine.end; item += pixel_lanes) {
      const int first = at.digit[1] * lines_together;
      const T* gradient = gy + (at.digit[0] * s.gy.n + first * s.gy.h + at.digit[2] * s.gy.w);
      Acc g[lines_together];
#pragma unroll
      for (int i = 0; i < lines_together; i++)
        g[i] = first + i < d.h.out ? load(gradient + i * s.gy.h) : Acc(0);
      const int top = first * stride - d.h.pad, left = at.digit[2] * d.w.stride - d.w.pad;
      Lines lines(x + (at.digit[0] * d.x.n + top * d.x.h + left * d.x.w), d.x, d.h, d.w, top, left);
#pragma unroll
      for (int j = 0; j < Lines::count; j++) {
        Acc pixel[3];
        lines.next(pixel);
#pragma unroll
        for (int r = 0; r < 3; r++)
          if (const int i = Lines::output(j, r); i >= 0)
#pragma unroll
            for (int k = 0; k < 3; k++) sum[r * 3 + k] += g[i] * pixel[k];
      }
      advance(at, s.item);
    }
  }
  add_pixel_lanes(sum, memory, t, s.channel_lanes);
  if (t < s.channel_lanes && mine.channel < s.channels)
    store_taps<T>(sum, out, s, mine.channel, taps_together, 0, taps_together);
}

// ------------------------------------------------------------------------------------------------ host side

constexpr int short_walk = 2, long_walk = 4;
constexpr int64_t enough_blocks = 528;  // four a multiprocessor

SpatialAxis spatial(int64_t in, int64_t out, int64_t taps, int64_t stride, int64_t pad, int64_t dilation) {
  return {int(in),
          int(out),
          int(taps),
          int(stride),
          int(pad),
          int(dilation),
          int(dilation / stride),
          int(dilation % stride)};
}

// Numbers N x C x ceil(lines / together) x columns outputs in the order of memory.
void number_outputs(Depthwise& d, const ConvProblem& p, int64_t lines, int64_t columns, int64_t together) {
  const int64_t groups = ceil_div(lines, together);
  d.channels_last = p.layout == Layout::nhwc;
  d.items = p.N * p.C * groups * columns;
  if (d.items == 0) return;
  // A walk saves divisions; where there are few outputs a long one leaves multiprocessors without work.
  d.walk = d.items < depthwise_threads * long_walk * enough_blocks ? short_walk : long_walk;
  if (d.channels_last)
    d.radix = radix_of<4>({p.N, groups, columns, p.C}, depthwise_threads);
  else
    d.radix = radix_of<4>({p.N, p.C, groups, columns}, depthwise_threads);
}

LaunchConfig config_of(const Depthwise& d, void* stream) {
  return {.grid = dim3(unsigned(ceil_div(d.items, depthwise_threads * d.walk))),
          .block = dim3(depthwise_threads),
          .stream = stream};
}

// Blocks over which the taps of a channel are shared out.
int64_t tap_blocks(const ConvProblem& p) { return ceil_div(p.R * p.S, taps_together); }

Refusal refuses(const ConvProblem& p) {
  if (!p.depthwise()) return "not depthwise: groups, channels and filters differ in number";
  if (p.R * p.S >= coordinate_limit) return "a filter of 2^30 taps or more";
  if (const Refusal why = refuse_beyond_coordinates(simplified(p))) return why;
  if (double(p.C) * double(tap_blocks(p)) > double(grid_limit)) return "more taps than a grid has blocks";
  const double outputs = double(p.N) * double(p.C) * (double(p.P) * double(p.Q) + double(p.H) * double(p.W));
  return outputs > double(grid_limit) * depthwise_threads ? "more outputs than a grid has threads" : accepted;
}

int64_t no_workspace(const ConvProblem&) { return 0; }

// Whether the kernels for 3 x 3 filters take it: neighbouring taps, lines that overlap.
bool common_filter(const SpatialAxis& h, const SpatialAxis& w) {
  return h.taps == 3 && w.taps == 3 && h.dilation == 1 && w.dilation == 1 && (h.stride == 1 || h.stride == 2);
}

template <class T>
int launch_correlate(Depthwise& d, const ConvProblem& p, const void* in, const void* w, const void* bias,
                     void* out, void* stream) {
  if (d.w.taps >= columns_together && d.w.stride == 1 && d.w.dilation == 1 && d.w.out >= columns_together) {
    number_outputs(d, p, d.h.out, ceil_div(d.w.out, columns_together), 1);
    if (d.items == 0) return launch_ok;
    return launch(config_of(d, stream), correlate_columns<T>, static_cast<const T*>(in),
                  static_cast<const T*>(w), static_cast<const T*>(bias), static_cast<T*>(out), d);
  }
  const bool together = d.h.out >= lines_together;
  number_outputs(d, p, d.h.out, d.w.out, together ? lines_together : 1);
  if (d.items == 0) return launch_ok;
  auto kernel = together ? correlate<T, lines_together> : correlate<T, 1>;
  if (together && common_filter(d.h, d.w))
    kernel = d.h.stride == 1 ? correlate_3x3<T, 1> : correlate_3x3<T, 2>;
  return launch(config_of(d, stream), kernel, static_cast<const T*>(in), static_cast<const T*>(w),
                static_cast<const T*>(bias), static_cast<T*>(out), d);
}

int launch_forward(const ConvProblem& problem, const ConvTensors& tensors, void*, void* stream) {
  const ConvProblem p = simplified(problem);
  Depthwise d = {};
  d.h = spatial(p.H, p.P, p.R, p.stride_h, p.pad_h, p.dilation_h);
  d.w = spatial(p.W, p.Q, p.S, p.stride_w, p.pad_w, p.dilation_w);
  d.in = p.x_strides(), d.out = p.y_strides();
  d.weight_c = int(p.R * p.S), d.weight_h = int(p.S), d.weight_w = 1;
  return dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return launch_correlate<T>(d, p, tensors.x, tensors.w, tensors.bias, tensors.y, stream);
  });
}

int launch_input_gradient(const ConvProblem& problem, const ConvTensors& tensors, void*, void* stream) {
  const ConvProblem p = simplified(problem);
  Depthwise d = {};
  d.in = p.y_strides(), d.out = p.x_strides();
  d.weight_c = int(p.R * p.S);
  if (p.stride_h == 1 && p.stride_w == 1) {
    // Tap r of gx[h] is gy[h + pad - r * dilation]: the filter from its end, padded by what is left of it.
    d.h = spatial(p.P, p.H, p.R, 1, (p.R - 1) * p.dilation_h - p.pad_h, p.dilation_h);
    d.w = spatial(p.Q, p.W, p.S, 1, (p.S - 1) * p.dilation_w - p.pad_w, p.dilation_w);
    d.weight_origin = int(p.R * p.S) - 1, d.weight_h = -int(p.S), d.weight_w = -1;
    return dispatch_dtype(p.dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      return launch_correlate<T>(d, p, tensors.gy, tensors.w, nullptr, tensors.gx, stream);
    });
  }
  d.h = spatial(p.P, p.H, p.R, p.stride_h, p.pad_h, p.dilation_h);
  d.w = spatial(p.Q, p.W, p.S, p.stride_w, p.pad_w, p.dilation_w);
  d.weight_h = int(p.S), d.weight_w = 1;
  number_outputs(d, p, p.H, p.W, 1);
  if (d.items == 0) return launch_ok;
  return dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return launch(config_of(d, stream), gather_strided<T>, static_cast<const T*>(tensors.gy),
                  static_cast<const T*>(tensors.w), static_cast<T*>(tensors.gx), d);
  });
}

DepthwiseSums weight_gradient_sums(const ConvProblem& problem) {
  const ConvProblem p = simplified(problem);
  DepthwiseSums d = {};
  d.h = spatial(p.H, p.P, p.R, p.stride_h, p.pad_h, p.dilation_h);
  d.w = spatial(p.W, p.Q, p.S, p.stride_w, p.pad_w, p.dilation_w);
  d.x = p.x_strides();
  d.sums = channel_sums(p, common_filter(d.h, d.w) ? lines_together : 1, tap_blocks(p));
  return d;
}

int64_t weight_gradient_workspace_bytes(const ConvProblem& p) {
  return parts_bytes(p.dtype, weight_gradient_sums(p).sums.parts, p.C * p.R * p.S);
}

int launch_weight_gradient(const ConvProblem& p, const ConvTensors& tensors, void* workspace, void* stream) {
  const int64_t weights = p.C * p.R * p.S;
  if (weights == 0) return launch_ok;
  const DepthwiseSums d = weight_gradient_sums(p);
  const ChannelSums& s = d.sums;
  const unsigned blocks = s.channel_blocks * s.parts * unsigned(tap_blocks(p));
  return dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    auto kernel = correlate_sums<T>;
    if (common_filter(d.h, d.w))
      kernel = d.h.stride == 1 ? correlate_sums_3x3<T, 1> : correlate_sums_3x3<T, 2>;
    const int error = launch({.grid = dim3(blocks), .block = dim3(channel_threads), .stream = stream}, kernel,
                             static_cast<const T*>(tensors.gy), static_cast<const T*>(tensors.x),
                             s.accumulators_out ? workspace : tensors.gw, d);
    if (error != launch_ok || !s.accumulators_out) return error;
    return launch_sum_parts<T>(workspace, tensors.gw, weights, s.parts, stream);
  });
}

}  // namespace

extern const ConvCudaKernel conv_depthwise_forward_cuda, conv_depthwise_input_gradient_cuda,
    conv_depthwise_weight_gradient_cuda;
const ConvCudaKernel conv_depthwise_forward_cuda = {"depthwise_generic", 80, 0, refuses, no_workspace,
                                                    launch_forward};
const ConvCudaKernel conv_depthwise_input_gradient_cuda = {"depthwise_generic",  80, 0, refuses, no_workspace,
                                                           launch_input_gradient};
const ConvCudaKernel conv_depthwise_weight_gradient_cuda = {
    "depthwise_generic", 80, 0, refuses, weight_gradient_workspace_bytes, launch_weight_gradient};

}  // namespace pyseqnet
