// Max-pooling on any CUDA device: every dtype, layout, window, stride and dilation of max_pool.h.
//
// All of it is bound by memory. One view serves both layouts: an NCHW tensor is a channels-last tensor of N*C
// images with one channel each. Neighbouring threads hold neighbouring addresses (channels, or pixels where
// there is one channel), so that a warp reads and writes whole lines; where the channels allow it a thread
// moves 16 bytes at a time.
//
//   forward_direct   a thread computes one output of 1 or 16 bytes' worth of channels. Taps outside the image
//                    are read from the nearest pixel and ruled out afterwards, not branched around: all loads
//                    of a window are in flight together.
//   forward_tiled    one channel, overlapping windows: a block stages the pixels of a 32 x 32 tile of outputs
//                    in shared memory, where a pixel that several windows want is read from memory once.
//                    Padding is staged as -infinity: it cannot win, because only a greater value does.
//   forward_strips,  stride 2 on planes whose rows are whole vectors: max_pool_strips.cuh.
//   backward_strips
//   backward_gather  a thread owns a pixel of gx and adds up, row by row, the windows that it won: it meets
//                    them in the order in which the oracle does. Nothing is scattered, so no atomics, and the
//                    result is the same bits in every run.
//   tap_to_index     arg -> int64 indices.
//
// Traffic, in bytes an element of y, with e the element size and a = stride_h * stride_w pixels an output:
//   forward  a*e + e + 1    backward  e + 1 + a*e    indices  9
// For 2x2/2 in float32 that is 21 bytes either way. At the copy bandwidth measured on an H100 (3.0 TB/s) an
// output costs 7.0 ps, on an H200 (4.3 TB/s) 4.9 ps. Predicted before any measurement: 85 % of copy bandwidth
// in float32 and wherever 16-byte accesses are taken; 60 % for 16-bit NCHW one element a thread, where the
// instructions of a tap cost as much as its bytes (hence the strips, not measured yet). Measured on an H200,
// 3x3/2 over 64 x 64 images of 112 x 112 in bfloat16, channels last (the benchmark's resnet50_stem): forward
// 62 us, 2.1 TB/s, 49 % of copy bandwidth: forward_direct, too, is bound by its comparisons there.
#include <algorithm>
#include <type_traits>

#include "common/fast_divide.cuh"
#include "common/launch.cuh"
#include "pool/max_pool.h"
#include "pool/max_pool_device.cuh"
#include "pool/max_pool_strips.cuh"

namespace pyseqnet {
namespace {

constexpr int block_threads = 256;
constexpr int max_block_z = 64;                // of CUDA
constexpr int64_t max_blocks = 2147483647;     // of CUDA, along x
constexpr int vector_bytes = 16;               // the widest access of one thread
constexpr int tile_rows = 32, tile_cols = 32;  // outputs of a block of forward_tiled
constexpr int tile_threads_y = block_threads / tile_cols;
constexpr unsigned tile_bytes_limit = 48 * 1024;  // shared memory that needs no opt-in; four blocks an SM

// The problem as channels-last images. Index counts positions inside one image and everything that leads to
// one; int32_t is taken where all of that stays below 2^30, so that sums of two cannot overflow. Offsets
// between images are always 64 bits wide.
template <class Index>
struct View {
  int64_t images;
  Index channels, H, W, P, Q, R, S;
  Index stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  FastDivider<Index> by_Q, by_W, by_S, by_stride_h, by_stride_w, by_dilation_h, by_dilation_w;
  bool wide_arg;
};

template <class Index>
View<Index> view_of(const MaxPoolProblem& p) {
  const bool planes = p.layout == Layout::nchw;
  const auto index = [](int64_t v) { return static_cast<Index>(v); };
  const auto divider = [](int64_t v) { return FastDivider<Index>(static_cast<Index>(v > 0 ? v : 1)); };
  return {planes ? p.N * p.C : p.N,
          planes ? Index{1} : index(p.C),
          index(p.H),
          index(p.W),
          index(p.P),
          index(p.Q),
          index(p.R),
          index(p.S),
          index(p.stride_h),
          index(p.stride_w),
          index(p.pad_h),
          index(p.pad_w),
          index(p.dilation_h),
          index(p.dilation_w),
          divider(p.Q),
          divider(p.W),
          divider(p.S),
          divider(p.stride_h),
          divider(p.stride_w),
          divider(p.dilation_h),
          divider(p.dilation_w),
          p.wide_arg()};
}

bool fits_32_bits(const MaxPoolProblem& p) {
  constexpr int64_t limit = int64_t{1} << 30;
  const int64_t channels = p.layout == Layout::nchw ? 1 : p.C;
  const auto small = [](int64_t v) { return v <= limit; };
  // Factors first: products of what is checked already cannot overflow 64 bits.
  return small(p.H) && small(p.W) && small(p.P) && small(p.Q) && small(p.R) && small(p.S) &&
         small(p.stride_h) && small(p.stride_w) && small(p.dilation_h) && small(p.dilation_w) &&
         small(p.pad_h) && small(p.pad_w) && small(channels) && small(p.H * p.W) && small(p.P * p.Q) &&
         small(p.R * p.S) && small(p.H * p.W * channels) && small(p.P * p.Q * channels) &&
         small(p.P * p.stride_h + p.R * p.dilation_h) && small(p.Q * p.stride_w + p.S * p.dilation_w);
}

// ---------------------------------------------------------------- shared by the kernels
template <class Index>
PYSEQNET_DEVICE Index clamp_to(Index i, Index extent) {
  return i < 0 ? 0 : i >= extent ? extent - 1 : i;
}

PYSEQNET_DEVICE int32_t load_arg(const void* arg, int64_t i, bool wide) {
  return wide ? static_cast<const int32_t*>(arg)[i] : static_cast<const uint8_t*>(arg)[i];
}
PYSEQNET_DEVICE void store_arg(void* arg, int64_t i, bool wide, int32_t tap) {
  if (wide)
    static_cast<int32_t*>(arg)[i] = tap;
  else
    static_cast<uint8_t*>(arg)[i] = static_cast<uint8_t>(tap);
}

// How blocks and threads are laid over images x pixels x channel steps. A block covers as many channels as
// there are, then pixels, then images, so that small images share one; blocks count in the same order. Every
// thread has one position and does not loop. Blocks are fewer than 2^31.
struct Shape {
  FastDivider<int32_t> by_channel_blocks, by_pixel_blocks;
  int32_t channel_blocks, pixel_blocks;
};

template <class Index>
struct Position {
  int64_t image;
  Index pixel, channel;
};

template <class Index>
PYSEQNET_DEVICE Position<Index> position_of(const Shape& shape, Index channels_a_thread) {
  const int32_t block = int32_t(blockIdx.x), outer = shape.by_channel_blocks.divide(block);
  const int32_t image_block = shape.by_pixel_blocks.divide(outer);
  const int32_t channel_block = block - outer * shape.channel_blocks;
  const int32_t pixel_block = outer - image_block * shape.pixel_blocks;
  return {int64_t(image_block) * blockDim.z + threadIdx.z,
          Index(pixel_block) * Index(blockDim.y) + Index(threadIdx.y),
          (Index(channel_block) * Index(blockDim.x) + Index(threadIdx.x)) * channels_a_thread};
}

// ---------------------------------------------------------------- forward
// kR x kS is the window where it is known at compile time, 0 x 0 any window. n channels a thread.
template <class T, int n, int kR, int kS, class Index>
__global__ void __launch_bounds__(block_threads)
    max_pool_forward_direct(const View<Index> v, const Shape shape, const T* __restrict__ x,
                            T* __restrict__ y, void* __restrict__ arg) {
  const auto [image, pixel, channel] = position_of<Index>(shape, n);
  if (image >= v.images || pixel >= v.P * v.Q || channel >= v.channels) return;
  const Index R = kR ? kR : v.R, S = kS ? kS : v.S;
  const Index p = v.by_Q.divide(pixel), q = pixel - p * v.Q;
  const Index h0 = p * v.stride_h - v.pad_h, w0 = q * v.stride_w - v.pad_w;
  const T* from = x + image * (int64_t(v.H) * v.W * v.channels) + channel;
  const int32_t nothing_won = int32_t(first_tap(h0, v.dilation_h, R) * S + first_tap(w0, v.dilation_w, S));
  Pack<T, n> winner;
  int32_t tap[n];
#pragma unroll
  for (int i = 0; i < n; i++) winner.value[i] = lowest<T>(), tap[i] = nothing_won;
#pragma unroll
  for (Index r = 0; r < R; r++) {
    const Index h = h0 + r * v.dilation_h, row = clamp_to(h, v.H);
#pragma unroll
    for (Index s = 0; s < S; s++) {
      const Index w = w0 + s * v.dilation_w, column = clamp_to(w, v.W);
      const bool inside = row == h && column == w;
      const auto candidate = *reinterpret_cast<const Pack<T, n>*>(from + (row * v.W + column) * v.channels);
#pragma unroll
      for (int i = 0; i < n; i++)
        if (inside && beats(candidate.value[i], winner.value[i]))
          winner.value[i] = candidate.value[i], tap[i] = int32_t(r * S + s);
    }
  }
  const int64_t to = (image * (int64_t(v.P) * v.Q) + pixel) * v.channels + channel;
  *reinterpret_cast<Pack<T, n>*>(y + to) = winner;
  if (!arg) return;
  if (n == 1) {
    store_arg(arg, to, v.wide_arg, tap[0]);
  } else {
    Pack<uint8_t, n> taps;
#pragma unroll
    for (int i = 0; i < n; i++) taps.value[i] = static_cast<uint8_t>(tap[i]);
    *reinterpret_cast<Pack<uint8_t, n>*>(static_cast<uint8_t*>(arg) + to) = taps;
  }
}

// The tiles of all images, one a block.
struct Tiles {
  FastDivider<int32_t> by_across, by_down;
  int32_t across, down;
};

PYSEQNET_HOST_DEVICE int32_t tile_extent(int32_t outputs, int32_t stride, int32_t taps, int32_t dilation) {
  return (outputs - 1) * stride + (taps - 1) * dilation + 1;
}

template <class T, int kR, int kS>
__global__ void __launch_bounds__(block_threads)
    max_pool_forward_tiled(const View<int32_t> v, const Tiles tiles, const T* __restrict__ x,
                           T* __restrict__ y, void* __restrict__ arg) {
  PYSEQNET_DYNAMIC_SHARED(T, tile);
  const int32_t R = kR ? kR : v.R, S = kS ? kS : v.S;
  const int32_t block = int32_t(blockIdx.x), outer = tiles.by_across.divide(block);
  const int32_t image = tiles.by_down.divide(outer);
  const int32_t p0 = (outer - image * tiles.down) * tile_rows,
                q0 = (block - outer * tiles.across) * tile_cols;
  const int32_t h0 = p0 * v.stride_h - v.pad_h, w0 = q0 * v.stride_w - v.pad_w;
  const int32_t height = tile_extent(tile_rows, v.stride_h, R, v.dilation_h);
  const int32_t width = tile_extent(tile_cols, v.stride_w, S, v.dilation_w);
  const int32_t tx = int32_t(threadIdx.x), ty = int32_t(threadIdx.y);

  const T* from = x + image * (int64_t(v.H) * v.W);
  for (int32_t i = ty; i < height; i += tile_threads_y)
    for (int32_t j = tx; j < width; j += tile_cols) {
      const int32_t h = h0 + i, w = w0 + j;
      tile[i * width + j] = h >= 0 && h < v.H && w >= 0 && w < v.W ? from[h * v.W + w] : lowest<T>();
    }
  __syncthreads();

  const int32_t q = q0 + tx;
  if (q >= v.Q) return;
  const int32_t tap_before_s = first_tap(w0 + tx * v.stride_w, v.dilation_w, S);
  for (int32_t k = ty; k < tile_rows && p0 + k < v.P; k += tile_threads_y) {
    T winner = lowest<T>();
    int32_t tap = first_tap(h0 + k * v.stride_h, v.dilation_h, R) * S + tap_before_s;
    const T* window = tile + k * v.stride_h * width + tx * v.stride_w;
#pragma unroll
    for (int32_t r = 0; r < R; r++)
#pragma unroll
      for (int32_t s = 0; s < S; s++) {
        const T candidate = window[r * v.dilation_h * width + s * v.dilation_w];
        if (beats(candidate, winner)) winner = candidate, tap = r * S + s;
      }
    const int64_t to = image * (int64_t(v.P) * v.Q) + (p0 + k) * v.Q + q;
    y[to] = winner;
    if (arg) store_arg(arg, to, v.wide_arg, tap);
  }
}

// ---------------------------------------------------------------- backward
// The windows that can have won position i: those with i + pad = p * stride + r * dilation, 0 <= r < taps.
template <class Index>
struct Candidates {
  Index begin, end, at;  // outputs [begin, end), at = i + pad
};
template <class Index>
PYSEQNET_DEVICE Candidates<Index> candidates(Index i, Index pad, Index stride,
                                             const FastDivider<Index>& by_stride, Index dilation, Index taps,
                                             Index outputs) {
  const Index at = i + pad, reach = (taps - 1) * dilation;
  const Index begin = at <= reach ? 0 : by_stride.divide(at - reach + stride - 1);
  const Index end = by_stride.divide(at) + 1;
  return {begin, end < outputs ? end : outputs, at};
}

// Blocks an SM must hold: with 64 registers a thread nothing is spilled, where ptxas left to itself aims for
// 40 and spills.
template <class Index>
constexpr int backward_blocks = sizeof(Index) == sizeof(int32_t) ? 4 : 1;

// n channels a thread; a window without dilation takes every candidate, without a division.
template <class T, int n, bool dilated, class Index>
__global__ void __launch_bounds__(block_threads, backward_blocks<Index>)
    max_pool_backward_gather(const View<Index> v, const Shape shape, const T* __restrict__ gy,
                             const void* __restrict__ arg, T* __restrict__ gx) {
  const auto [image, pixel, channel] = position_of<Index>(shape, n);
  if (image >= v.images || pixel >= v.H * v.W || channel >= v.channels) return;
  const Index h = v.by_W.divide(pixel), w = pixel - h * v.W;
  const auto rows = candidates(h, v.pad_h, v.stride_h, v.by_stride_h, v.dilation_h, v.R, v.P);
  const auto columns = candidates(w, v.pad_w, v.stride_w, v.by_stride_w, v.dilation_w, v.S, v.Q);
  const int64_t from = image * (int64_t(v.P) * v.Q * v.channels) + channel;
  accumulator_t<T> sum[n];
#pragma unroll
  for (int i = 0; i < n; i++) sum[i] = 0;
  for (Index p = rows.begin; p < rows.end; p++) {
    const Index down = rows.at - p * v.stride_h, r = dilated ? v.by_dilation_h.divide(down) : down;
    if (dilated && r * v.dilation_h != down) continue;
    for (Index q = columns.begin; q < columns.end; q++) {
      const Index right = columns.at - q * v.stride_w, s = dilated ? v.by_dilation_w.divide(right) : right;
      if (dilated && s * v.dilation_w != right) continue;
      const int32_t tap = int32_t(r * v.S + s);
      const int64_t o = from + (p * v.Q + q) * v.channels;
      if (n == 1) {
        if (load_arg(arg, o, v.wide_arg) == tap) sum[0] += to_accumulator(gy[o]);
      } else {
        const auto taps = *reinterpret_cast<const Pack<uint8_t, n>*>(static_cast<const uint8_t*>(arg) + o);
        const auto gradient = *reinterpret_cast<const Pack<T, n>*>(gy + o);
#pragma unroll
        for (int i = 0; i < n; i++)
          if (taps.value[i] == tap) sum[i] += to_accumulator(gradient.value[i]);
      }
    }
  }
  Pack<T, n> result;
#pragma unroll
  for (int i = 0; i < n; i++) result.value[i] = from_accumulator<T>(sum[i]);
  *reinterpret_cast<Pack<T, n>*>(gx + (image * (int64_t(v.H) * v.W) + pixel) * v.channels + channel) = result;
}

// ---------------------------------------------------------------- indices
template <class Index>
__global__ void __launch_bounds__(block_threads)
    max_pool_tap_to_index(const View<Index> v, const Shape shape, const void* __restrict__ arg,
                          int64_t* __restrict__ indices) {
  const auto [image, pixel, channel] = position_of<Index>(shape, 1);
  if (image >= v.images || pixel >= v.P * v.Q || channel >= v.channels) return;
  const int64_t o = (image * (int64_t(v.P) * v.Q) + pixel) * v.channels + channel;
  const Index p = v.by_Q.divide(pixel), q = pixel - p * v.Q;
  const Index tap = Index(load_arg(arg, o, v.wide_arg)), r = v.by_S.divide(tap), s = tap - r * v.S;
  const Index h = p * v.stride_h - v.pad_h + r * v.dilation_h;
  const Index w = q * v.stride_w - v.pad_w + s * v.dilation_w;
  indices[o] = int64_t(h) * v.W + w;
}

// ---------------------------------------------------------------- launching
int64_t round_up_to_power_of_two(int64_t v, int64_t limit) {
  int64_t power = 1;
  while (power < v && power < limit) power *= 2;
  return power;
}
int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Work for more blocks than a grid holds (terabytes of tensors) is refused by launch(), not cut short.
dim3 grid_of(int64_t blocks) { return dim3(unsigned(std::min(blocks, max_blocks + 1))); }

struct Coverage {
  Shape shape;
  LaunchConfig config;
};
Coverage cover(int64_t images, int64_t pixels, int64_t channel_steps, void* stream) {
  const int64_t x = round_up_to_power_of_two(channel_steps, block_threads);
  const int64_t y = round_up_to_power_of_two(pixels, block_threads / x);
  const int64_t z = std::min<int64_t>(block_threads / (x * y), max_block_z);
  const int64_t channel_blocks = ceil_divide(channel_steps, x), pixel_blocks = ceil_divide(pixels, y);
  Coverage c;
  c.shape.channel_blocks = int32_t(std::min(channel_blocks, max_blocks));
  c.shape.pixel_blocks = int32_t(std::min(pixel_blocks, max_blocks));
  c.shape.by_channel_blocks = FastDivider<int32_t>(c.shape.channel_blocks);
  c.shape.by_pixel_blocks = FastDivider<int32_t>(c.shape.pixel_blocks);
  c.config.grid = grid_of(channel_blocks * pixel_blocks * ceil_divide(images, z));
  c.config.block = dim3(unsigned(x), unsigned(y), unsigned(z));
  c.config.stream = stream;
  return c;
}

bool aligned(const void* p, size_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

// Whether threads may move 16 bytes of channels, and their one-byte taps, at a time.
template <class T>
bool vectorizes(const MaxPoolProblem& p, const void* image_side, const void* output_side, const void* arg) {
  constexpr int64_t n = vector_bytes / sizeof(T);
  return p.layout == Layout::nhwc && p.C % n == 0 && !p.wide_arg() && aligned(image_side, vector_bytes) &&
         aligned(output_side, vector_bytes) && aligned(arg, n);
}

template <class T, int n, class Index>
int launch_forward_direct(const MaxPoolProblem& p, const T* x, T* y, void* arg, void* stream) {
  const auto v = view_of<Index>(p);
  const auto [shape, config] = cover(v.images, p.P * p.Q, v.channels / n, stream);
  if constexpr (sizeof(Index) == sizeof(int32_t)) {
    if (p.R == 2 && p.S == 2)
      return launch(config, max_pool_forward_direct<T, n, 2, 2, Index>, v, shape, x, y, arg);
    if (p.R == 3 && p.S == 3)
      return launch(config, max_pool_forward_direct<T, n, 3, 3, Index>, v, shape, x, y, arg);
  }
  return launch(config, max_pool_forward_direct<T, n, 0, 0, Index>, v, shape, x, y, arg);
}

// The bytes of shared memory of forward_tiled, or 0 where it does not pay: windows that do not overlap, or
// images much smaller than a tile. Only asked where 32 bits are enough.
template <class T>
unsigned tile_bytes(const MaxPoolProblem& p) {
  const bool overlap = p.R > p.stride_h || p.S > p.stride_w;
  if (p.layout != Layout::nchw || !overlap || p.Q < tile_cols || p.P < tile_threads_y) return 0;
  const auto extent = [](int64_t outputs, int64_t stride, int64_t taps, int64_t dilation) {
    return (outputs - 1) * stride + (taps - 1) * dilation + 1;
  };
  const int64_t height = extent(tile_rows, p.stride_h, p.R, p.dilation_h);
  const int64_t width = extent(tile_cols, p.stride_w, p.S, p.dilation_w);
  const int64_t limit = tile_bytes_limit / int64_t(sizeof(T));
  return height <= limit && width <= limit && height * width <= limit
             ? unsigned(height * width * int64_t(sizeof(T)))
             : 0;
}

template <class T>
int launch_forward_tiled(const MaxPoolProblem& p, unsigned shared_bytes, const T* x, T* y, void* arg,
                         void* stream) {
  const auto v = view_of<int32_t>(p);
  Tiles tiles;
  tiles.across = int32_t(ceil_divide(p.Q, tile_cols));
  tiles.down = int32_t(ceil_divide(p.P, tile_rows));
  tiles.by_across = FastDivider<int32_t>(tiles.across);
  tiles.by_down = FastDivider<int32_t>(tiles.down);
  LaunchConfig config;
  config.grid = grid_of(int64_t(tiles.across) * tiles.down * v.images);
  config.block = dim3(tile_cols, tile_threads_y);
  config.dynamic_shared_bytes = shared_bytes;
  config.stream = stream;
  if (p.R == 3 && p.S == 3) return launch(config, max_pool_forward_tiled<T, 3, 3>, v, tiles, x, y, arg);
  return launch(config, max_pool_forward_tiled<T, 0, 0>, v, tiles, x, y, arg);
}

// Whether strips of planes fit: windows of 2x2, or of 3x3 with the same padding on both axes, at stride 2, and
// rows of whole vectors. Then Q <= W / 2, so that no strip's vector leaves its row.
template <class T>
bool takes_strips(const MaxPoolProblem& p, const void* image_side, const void* output_side, const void* arg) {
  return p.layout == Layout::nchw && p.stride_h == 2 && p.stride_w == 2 && p.dilation_h == 1 &&
         p.dilation_w == 1 && p.R == p.S && p.pad_h == p.pad_w &&
         ((p.R == 2 && p.pad_h == 0) || (p.R == 3 && p.pad_h <= 1)) && p.W % strip_pixels == 0 &&
         p.Q % strip_outputs == 0 && p.Q > 0 && aligned(image_side, vector_bytes) &&
         aligned(output_side, vector_bytes) && aligned(arg, strip_outputs) &&
         double(p.N) * double(p.C) * double(p.H) * double(p.W) / strip_pixels < double(1 << 30);
}

// Calls f(window, pad) with compile-time constants.
template <class F>
int with_window(const MaxPoolProblem& p, F&& f) {
  if (p.R == 2) return f(std::integral_constant<int, 2>{}, std::integral_constant<int, 0>{});
  if (p.pad_h == 0) return f(std::integral_constant<int, 3>{}, std::integral_constant<int, 0>{});
  return f(std::integral_constant<int, 3>{}, std::integral_constant<int, 1>{});
}

// Strips that cover `columns` x `rows` outputs: those of y, or as many as gx has pairs of pixels.
template <class T>
Strips strips_of(const MaxPoolProblem& p, int64_t rows, int64_t columns) {
  Strips v = {};
  v.H = int32_t(p.H), v.W = int32_t(p.W), v.P = int32_t(p.P), v.Q = int32_t(p.Q);
  v.groups = int32_t(ceil_divide(columns, strip_outputs));
  v.strips = int32_t(ceil_divide(rows, strip_rows<T>));
  v.threads = int32_t(p.N * p.C * v.strips * v.groups);
  v.by_groups = FastDivider<int32_t>(v.groups), v.by_strips = FastDivider<int32_t>(v.strips);
  return v;
}

template <class T, class Kernel, class... Pointers>
int launch_strips(Kernel* kernel, const Strips& v, void* stream, Pointers... pointers) {
  LaunchConfig config;
  config.grid = grid_of(ceil_divide(v.threads, strip_threads));
  config.block = dim3(strip_threads);
  config.stream = stream;
  return launch(config, kernel, v, pointers...);
}

template <class T>
int launch_forward(const MaxPoolProblem& p, const T* x, T* y, void* arg, void* stream) {
  constexpr int n = vector_bytes / sizeof(T);
  if (!fits_32_bits(p)) return launch_forward_direct<T, 1, int64_t>(p, x, y, arg, stream);
  if constexpr (sizeof(T) < 8)
    if (takes_strips<T>(p, x, y, arg))
      return with_window(p, [&](auto window, auto pad) {
        return launch_strips<T>(max_pool_forward_strips<T, window(), pad()>, strips_of<T>(p, p.P, p.Q),
                                stream, x, y, static_cast<uint8_t*>(arg));
      });
  if (const unsigned bytes = tile_bytes<T>(p)) return launch_forward_tiled<T>(p, bytes, x, y, arg, stream);
  if (vectorizes<T>(p, x, y, arg)) return launch_forward_direct<T, n, int32_t>(p, x, y, arg, stream);
  return launch_forward_direct<T, 1, int32_t>(p, x, y, arg, stream);
}

template <class T, int n, class Index>
int launch_backward(const MaxPoolProblem& p, const T* gy, const void* arg, T* gx, void* stream) {
  const auto v = view_of<Index>(p);
  const auto [shape, config] = cover(v.images, p.H * p.W, v.channels / n, stream);
  if constexpr (sizeof(Index) == sizeof(int32_t))
    if (p.dilation_h == 1 && p.dilation_w == 1)
      return launch(config, max_pool_backward_gather<T, n, false, Index>, v, shape, gy, arg, gx);
  return launch(config, max_pool_backward_gather<T, n, true, Index>, v, shape, gy, arg, gx);
}

template <class Index>
int launch_indices(const MaxPoolProblem& p, const void* arg, int64_t* indices, void* stream) {
  const auto v = view_of<Index>(p);
  const auto [shape, config] = cover(v.images, p.P * p.Q, v.channels, stream);
  return launch(config, max_pool_tap_to_index<Index>, v, shape, arg, indices);
}

int forward(const MaxPoolProblem& p, const MaxPoolTensors& t, void*, void* stream) {
  if (p.N * p.C * p.P * p.Q == 0) return launch_ok;
  return dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return launch_forward<T>(p, static_cast<const T*>(t.x), static_cast<T*>(t.y),
                             p.with_arg ? t.arg : nullptr, stream);
  });
}

int backward(const MaxPoolProblem& p, const MaxPoolTensors& t, void*, void* stream) {
  if (p.N * p.C * p.H * p.W == 0) return launch_ok;
  return dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int n = vector_bytes / sizeof(T);
    const T* gy = static_cast<const T*>(t.gy);
    T* gx = static_cast<T*>(t.gx);
    if (!fits_32_bits(p)) return launch_backward<T, 1, int64_t>(p, gy, t.arg, gx, stream);
    if constexpr (sizeof(T) < 8)
      if (takes_strips<T>(p, gx, gy, t.arg))
        return with_window(p, [&](auto window, auto pad) {
          return launch_strips<T>(max_pool_backward_strips<T, window(), pad()>,
                                  strips_of<T>(p, ceil_divide(p.H, 2), p.W / 2), stream, gy,
                                  static_cast<const uint8_t*>(t.arg), gx);
        });
    if (vectorizes<T>(p, gx, gy, t.arg)) return launch_backward<T, n, int32_t>(p, gy, t.arg, gx, stream);
    return launch_backward<T, 1, int32_t>(p, gy, t.arg, gx, stream);
  });
}

int indices(const MaxPoolProblem& p, const MaxPoolTensors& t, void*, void* stream) {
  if (p.N * p.C * p.P * p.Q == 0) return launch_ok;
  return fits_32_bits(p) ? launch_indices<int32_t>(p, t.arg, t.indices, stream)
                         : launch_indices<int64_t>(p, t.arg, t.indices, stream);
}

Refusal refuses(const MaxPoolProblem& p) {
  if (p.H * p.W == 0 && p.P * p.Q > 0) return "an image without pixels has no maximum";
  return accepted;
}
int64_t no_workspace(const MaxPoolProblem&) { return 0; }

}  // namespace

extern const MaxPoolCudaKernel max_pool_forward_cuda, max_pool_backward_cuda, max_pool_indices_cuda;
const MaxPoolCudaKernel max_pool_forward_cuda = {"cuda_generic", 80, 0, refuses, no_workspace, forward};
const MaxPoolCudaKernel max_pool_backward_cuda = {"cuda_generic", 80, 0, refuses, no_workspace, backward};
const MaxPoolCudaKernel max_pool_indices_cuda = {"cuda_generic", 80, 0, refuses, no_workspace, indices};

}  // namespace pyseqnet
