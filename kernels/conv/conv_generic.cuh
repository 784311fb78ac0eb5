// What the generic CUDA convolution kernels share: walking a multi-dimensional index without dividing,
// summing the partial results of a split reduction, and the limits within which 32-bit coordinates are safe.
#pragma once
#include "common/cuda_numerics.cuh"
#include "conv/conv.h"

namespace pyseqnet {

// Coordinates inside an image are int: at most one sum of two of them is formed, so half the range is
// allowed.
constexpr int64_t coordinate_limit = int64_t(1) << 30;
// Blocks are numbered in one dimension of the grid.
constexpr int64_t grid_limit = (int64_t(1) << 31) - 1;

// The same problem without what cannot matter: the stride of a single output, the dilation of a single tap.
inline ConvProblem simplified(ConvProblem p) {
  const auto at_most = [](int64_t v, int64_t most) { return v < most ? v : most > 1 ? most : 1; };
  if (p.P <= 1) p.stride_h = at_most(p.stride_h, p.H);
  if (p.Q <= 1) p.stride_w = at_most(p.stride_w, p.W);
  if (p.R <= 1) p.dilation_h = 1;
  if (p.S <= 1) p.dilation_w = 1;
  return p;
}

// For a simplified problem.
inline Refusal refuse_beyond_coordinates(const ConvProblem& p) {
  const int64_t extents[] = {p.N, p.C, p.K, p.H, p.W, p.P, p.Q, p.R, p.S};
  for (int64_t extent : extents)
    if (extent >= coordinate_limit) return "an extent of 2^30 or more";
  const auto beyond = [](int64_t in, int64_t out, int64_t taps, int64_t stride, int64_t pad,
                         int64_t dilation) {
    if (stride >= coordinate_limit || dilation >= coordinate_limit) return true;  // else no product overflows
    return in + out * stride + taps * dilation + (pad < 0 ? -pad : pad) >= coordinate_limit;
  };
  if (beyond(p.H, p.P, p.R, p.stride_h, p.pad_h, p.dilation_h) ||
      beyond(p.W, p.Q, p.S, p.stride_w, p.pad_w, p.dilation_w))
    return "stride, padding and dilation reach 2^30 or more positions";
  return accepted;
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// An index written in mixed radix, most significant digit first. Taking it apart divides, once; advance() by
// a constant step needs additions and one comparison a digit, because every digit of the step is smaller than
// its extent. The first digit has no upper end: whoever walks knows when to stop.
template <int n>
struct Digits {
  int digit[n];
};
template <int n>
struct Radix {
  int extent[n];
  int step[n];
};

template <int n>
PYSEQNET_HOST_DEVICE Digits<n> digits_of(int64_t index, const int (&extent)[n]) {
  Digits<n> d;
#pragma unroll
  for (int i = n - 1; i > 0; i--) {
    const int64_t rest = index / extent[i];
    d.digit[i] = int(index - rest * extent[i]);
    index = rest;
  }
  d.digit[0] = int(index);
  return d;
}

template <int n>
PYSEQNET_HOST_DEVICE void advance(Digits<n>& d, const Radix<n>& radix) {
  int carry = 0;
#pragma unroll
  for (int i = n - 1; i > 0; i--) {
    const int sum = d.digit[i] + radix.step[i] + carry;
    carry = sum >= radix.extent[i];
    d.digit[i] = carry ? sum - radix.extent[i] : sum;
  }
  d.digit[0] += radix.step[0] + carry;
}

// The radix of these extents (none zero), walked in steps of `step`.
template <int n>
Radix<n> radix_of(const int64_t (&extent)[n], int64_t step) {
  Radix<n> radix;
  for (int i = 0; i < n; i++) radix.extent[i] = int(extent[i]);
  const Digits<n> digits = digits_of(step, radix.extent);
  for (int i = 0; i < n; i++) radix.step[i] = digits.digit[i];
  return radix;
}

// How a long reduction is split over blocks, so that few outputs still fill a GPU. It depends on the problem
// only, so results are bitwise equal from run to run and from device to device of one architecture.
struct Split {
  int64_t count = 1;   // of parts
  int64_t length = 0;  // terms in a part, but for the last
};
// About eight blocks a multiprocessor on the largest GPUs (132 to 148 of them).
constexpr int64_t split_target_blocks = 1024;

inline Split split_reduction(int64_t terms, int64_t blocks_per_part, int64_t shortest, int64_t multiple,
                             int64_t target_blocks = split_target_blocks) {
  Split split;
  if (terms <= 0) return split;
  const int64_t most = ceil_div(terms, shortest);
  int64_t wanted = target_blocks / (blocks_per_part > 0 ? blocks_per_part : 1);
  wanted = wanted < 1 ? 1 : wanted > most ? most : wanted;
  split.length = ceil_div(ceil_div(terms, wanted), multiple) * multiple;
  split.count = ceil_div(terms, split.length);
  return split;
}

// out[i] = sum over the parts of partial[part][i]. A block sums 32 elements, each by 8 threads that take
// every eighth part, then adds the eight in order: the order of additions is fixed. Reads are coalesced.
constexpr int sum_parts_elements = 32, sum_parts_lanes = 8;

template <class T>
__global__ void __launch_bounds__(sum_parts_elements* sum_parts_lanes)
    sum_parts(const accumulator_t<T>* __restrict__ partial, T* __restrict__ out, int64_t count,
              int64_t parts) {
  using Acc = accumulator_t<T>;
  PYSEQNET_SHARED(Acc, lanes, [sum_parts_lanes][sum_parts_elements]);
  const int x = int(threadIdx.x), y = int(threadIdx.y);
  const int64_t element = int64_t(blockIdx.x) * sum_parts_elements + x;
  Acc sum = 0;
  if (element < count)
    for (int64_t part = y; part < parts; part += sum_parts_lanes) sum += partial[part * count + element];
  lanes[y][x] = sum;
  __syncthreads();
  if (y == 0 && element < count) {
    for (int lane = 1; lane < sum_parts_lanes; lane++) sum += lanes[lane][x];
    store(out + element, sum);
  }
}

template <class T>
int launch_sum_parts(const void* partial, void* out, int64_t count, int64_t parts, void* stream) {
  return launch({.grid = dim3(unsigned(ceil_div(count, sum_parts_elements))),
                 .block = dim3(sum_parts_elements, sum_parts_lanes),
                 .stream = stream},
                sum_parts<T>, static_cast<const accumulator_t<T>*>(partial), static_cast<T*>(out), count,
                parts);
}

// A workspace of `parts` x `count` accumulators; nothing where one part writes the result itself.
inline int64_t parts_bytes(DType dtype, int64_t parts, int64_t count) {
  return parts > 1 ? parts * count * (dtype == DType::f64 ? 8 : 4) : 0;
}

// ---- Sums over the pixels of each channel: the bias gradient and the depthwise weight gradient.
//
// A block takes channel_lanes neighbouring channels (one in NCHW, up to a warp's width in NHWC) and a part of
// the items, an item being a pixel (n, p, q) or several lines of a column of them; its threads are
// channel_lanes x pixel_lanes, so that a warp reads neighbouring addresses in both layouts. Each thread adds
// every pixel_lanes-th item of the part; then halves are added to halves.
constexpr int channel_threads = 256;

struct ChannelSums {
  Radix<3> item;  // (n, p / lines, q), walked by pixel_lanes
  Strides gy;
  int64_t channels, items, part_items;
  int channel_lanes;
  unsigned channel_blocks, parts;
  bool accumulators_out;  // out is the workspace
};

// A thread's own: first item, the part's end, channel (which may be past the last).
struct ChannelShare {
  int64_t begin, end, channel;
  PYSEQNET_DEVICE ChannelShare(const ChannelSums& s, int t) {
    channel = int64_t(blockIdx.x % s.channel_blocks) * s.channel_lanes + t % s.channel_lanes;
    begin = int64_t(blockIdx.x / s.channel_blocks % s.parts) * s.part_items;
    end = begin + s.part_items < s.items ? begin + s.part_items : s.items;
    begin += t / s.channel_lanes;
  }
};

// Leaves in thread t < channel_lanes the sums of all threads of its channel, always added in the same order.
template <int count, class Acc>
PYSEQNET_DEVICE void add_pixel_lanes(Acc (&sum)[count], Acc (*memory)[channel_threads], int t,
                                     int channel_lanes) {
#pragma unroll
  for (int k = 0; k < count; k++) memory[k][t] = sum[k];
  for (int half = channel_threads / 2; half >= channel_lanes; half /= 2) {
    __syncthreads();
    if (t < half)
#pragma unroll
      for (int k = 0; k < count; k++) memory[k][t] = sum[k] += memory[k][t + half];
  }
}

// lines: pixels of an item. blocks_per_channels: blocks that take the same channels and the same part.
inline ChannelSums channel_sums(const ConvProblem& p, int64_t lines = 1, int64_t blocks_per_channels = 1) {
  // Enough pixels for a thread to make the block's fixed cost small beside them.
  constexpr int64_t least_pixels_per_lane = 16;
  const int64_t line_groups = ceil_div(p.P, lines);
  ChannelSums s = {};
  s.gy = p.y_strides();
  s.channels = p.K;
  s.items = p.N * line_groups * p.Q;
  s.channel_lanes = 1;
  if (p.layout == Layout::nhwc)
    while (s.channel_lanes < 32 && s.channel_lanes < p.K) s.channel_lanes *= 2;
  const int64_t pixel_lanes = channel_threads / s.channel_lanes;
  const int64_t channel_blocks = ceil_div(p.K, s.channel_lanes);
  const Split split = split_reduction(s.items, channel_blocks * blocks_per_channels,
                                      pixel_lanes * ceil_div(least_pixels_per_lane, lines), pixel_lanes);
  if (s.items > 0) s.item = radix_of<3>({p.N, line_groups, p.Q}, pixel_lanes);
  s.part_items = split.length;
  s.channel_blocks = unsigned(channel_blocks);
  s.parts = unsigned(split.count);
  s.accumulators_out = split.count > 1;
  return s;
}

}  // namespace pyseqnet
