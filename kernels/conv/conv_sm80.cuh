// Convolution on tensor cores with mma.sync, cp.async and ldmatrix: forward and input gradient.
//
// gathered_product: forward and input gradient (conv_tensor_core.cuh). A block computes 128 pixels x 128, 64
// or 32 filters. Its operands travel by cp.async through a ring of three stages of 128 bytes of depth a line
// (64 values of 16 bits, 32 floats), a chunk of 16 bytes a thread: 128 bytes may be one tap's channels or,
// where channels are few, several taps'. What a chunk reads outside of the image is zero-filled by the copy
// itself. Chunks are exchanged within a line by the line's number, so that neither the copies nor ldmatrix
// meet a bank conflict. A warp multiplies 64 x 32 (32 x 32): 24 fragments loaded for 64 products of m16n8k16.
//
// Sums are float32. float32 operands are rounded to TF32 (to nearest) in registers, after ldmatrix.
#pragma once
#include <type_traits>

#include "conv/conv_tensor_core.cuh"

namespace pyseqnet {

constexpr int ring_stages = 3, line_bytes = 128, line_chunks = line_bytes / chunk_bytes;

struct alignas(chunk_bytes) Chunk16 {
  uint32_t word[4];
};

// ---- One product of fragments. The same registers hold 16 x 16 of 16 bits or 16 x 8 floats.
PYSEQNET_DEVICE void multiply_fragments(__nv_bfloat16, float (&d)[4], const uint32_t (&a)[4],
                                        const uint32_t (&b)[2]) {
  ptx::mma_m16n8k16_bf16(d, a, b, d);
}
PYSEQNET_DEVICE void multiply_fragments(__half, float (&d)[4], const uint32_t (&a)[4],
                                        const uint32_t (&b)[2]) {
  ptx::mma_m16n8k16_f16(d, a, b, d);
}
PYSEQNET_DEVICE void multiply_fragments(float, float (&d)[4], const uint32_t (&a)[4],
                                        const uint32_t (&b)[2]) {
  ptx::mma_m16n8k8_tf32(d, a, b, d);
}
template <class T, int n>
PYSEQNET_DEVICE void round_fragment(uint32_t (&words)[n]) {
  if constexpr (std::is_same_v<T, float>)
#pragma unroll
    for (int i = 0; i < n; i++) words[i] = ptx::round_to_tf32(words[i]);
}

// Of a line of 128 bytes, where its chunk lies.
PYSEQNET_DEVICE uint32_t swizzled_chunk(int line, int chunk) {
  return uint32_t(line * line_bytes + ((chunk ^ (line & 7)) << 4));
}

template <int columns_>
struct ProductTile {
  static constexpr int columns = columns_;
  static constexpr int warp_rows = columns == 32 ? 32 : 64, warp_columns = 32;
  static constexpr int warps_across = columns / warp_columns;
  static constexpr int blocks = columns == 128 ? 2 : 3;  // on a multiprocessor of Hopper
  static constexpr int threads = product_rows / warp_rows * warps_across * 32;
  static constexpr int fragment_rows = warp_rows / 16, fragment_columns = warp_columns / 8;
  static constexpr unsigned image_bytes = product_rows * line_bytes;
  static constexpr unsigned stage_bytes = image_bytes + columns * line_bytes;
  static constexpr unsigned shared_bytes = ring_stages * stage_bytes;
  static constexpr int thread_lines = threads / line_chunks;  // lines that all threads copy at once
};

struct ProductRows {
  unsigned offset[product_rows];  // of tap 0, in chunks; wraps where that is outside
  int h[product_rows], w[product_rows];
  int64_t out[product_rows];  // -1: no such pixel
};
// No sum with it lies in an image, nor overflows.
constexpr int beyond_image = -int(coordinate_limit);

// Pixel `row` of the tile whose windows begin at first_window.
PYSEQNET_DEVICE void list_row(ProductRows& rows, const GatheredProduct& g, const TileAxes& axes,
                              int64_t first_window, int64_t windows, int row) {
  const int taps = axes.h.window * axes.w.window, tile_windows = product_rows / taps;
  const int in_tile = row / taps;
  if (in_tile >= tile_windows || first_window + in_tile >= windows) {
    rows.offset[row] = 0, rows.h[row] = rows.w[row] = beyond_image, rows.out[row] = -1;
    return;
  }
  const TilePixel at(axes, int(first_window + in_tile), row - in_tile * taps);
  const int h = axes.h.origin + (at.u * axes.h.window_step + at.i) * axes.h.step;
  const int w = axes.w.origin + (at.v * axes.w.window_step + at.j) * axes.w.step;
  rows.h[row] = h, rows.w[row] = w;
  rows.offset[row] = unsigned(at.n) * g.image_n + unsigned(h) * g.image_row + unsigned(w) * g.image_pixel;
  rows.out[row] = at.n * g.out.n + (axes.h.out_first + int64_t(at.u) * axes.h.out_step) * g.out.h +
                  (axes.w.out_first + int64_t(at.v) * axes.w.out_step) * g.out.w;
}

// Copies the operands, line_chunks chunks of depth a step.
template <class Tile>
class ProductCopies {
 public:
  PYSEQNET_DEVICE ProductCopies(const GatheredProduct& g, const TileAxes& axes, const ProductRows& rows,
                                const Chunk16* image, const Chunk16* filters, int columns_left, int t)
      : g_(g), axes_(axes), image_(image), filters_(filters), columns_left_(columns_left), t_(t) {
#pragma unroll
    for (int i = 0; i < image_lines; i++) {
      const int row = t / line_chunks + i * Tile::thread_lines;
      offset_[i] = rows.offset[row], h_[i] = rows.h[row], w_[i] = rows.w[row];
    }
    radix_.extent[0] = axes.h.taps, radix_.extent[1] = axes.w.taps, radix_.extent[2] = g.chunks;
    tap_ = split(t % line_chunks);
    const Digits<3> step = split(line_chunks);
#pragma unroll
    for (int i = 0; i < 3; i++) radix_.step[i] = step.digit[i];
  }

  PYSEQNET_DEVICE void copy_next(uint32_t stage) {
    const bool exists = tap_.digit[0] < axes_.h.taps;
    const int dh = tap_.digit[0] * axes_.h.tap_step, dw = tap_.digit[1] * axes_.w.tap_step;
    const unsigned image_tap =
        unsigned(dh) * g_.image_row + unsigned(dw) * g_.image_pixel + unsigned(tap_.digit[2]);
    const int r = axes_.h.filter_first + tap_.digit[0] * axes_.h.filter_step;
    const int s = axes_.w.filter_first + tap_.digit[1] * axes_.w.filter_step;
    const unsigned filter_tap = unsigned(r * g_.filter_taps_w + s) * unsigned(g_.chunks) + tap_.digit[2];
    const int line = t_ / line_chunks, chunk = t_ % line_chunks;
    const uint32_t to = stage + swizzled_chunk(line, chunk);  // thread_lines is a multiple of 8
#pragma unroll
    for (int i = 0; i < image_lines; i++) {
      const bool inside = exists && unsigned(h_[i] + dh) < unsigned(axes_.h.limit) &&
                          unsigned(w_[i] + dw) < unsigned(axes_.w.limit);
      ptx::cp_async_16(to + i * Tile::thread_lines * line_bytes,
                       image_ + (inside ? offset_[i] + image_tap : 0u), inside);
    }
#pragma unroll
    for (int j = 0; j < filter_lines; j++) {
      const int column = line + j * Tile::thread_lines;
      const bool inside = exists && column < columns_left_;
      ptx::cp_async_16(to + Tile::image_bytes + j * Tile::thread_lines * line_bytes,
                       filters_ + (inside ? unsigned(column) * g_.filter_row + filter_tap : 0u), inside);
    }
    advance(tap_, radix_);
  }

 private:
  static constexpr int image_lines = product_rows / Tile::thread_lines;
  static constexpr int filter_lines = Tile::columns / Tile::thread_lines;
  static_assert(Tile::thread_lines % 8 == 0);

  PYSEQNET_DEVICE Digits<3> split(int chunk) const {
    Digits<3> d;
    const int tap = chunk / radix_.extent[2];
    d.digit[2] = chunk - tap * radix_.extent[2];
    d.digit[0] = tap / radix_.extent[1];
    d.digit[1] = tap - d.digit[0] * radix_.extent[1];
    return d;
  }

  const GatheredProduct& g_;
  const TileAxes& axes_;
  const Chunk16 *image_, *filters_;
  int columns_left_, t_;
  unsigned offset_[image_lines];
  int h_[image_lines], w_[image_lines];
  Digits<3> tap_;
  Radix<3> radix_;
};

// Adds one stage's products to a warp's sums.
template <class T, class Tile>
PYSEQNET_DEVICE void multiply_stage(float (&sum)[Tile::fragment_rows][Tile::fragment_columns][4],
                                    uint32_t stage, int first_row, int first_column, int lane) {
  const uint32_t image = stage, filters = stage + Tile::image_bytes;
  constexpr int unrolled = std::is_same_v<T, float> ? 4 : 2;  // as many as registers allow
#pragma unroll unrolled
  for (int k = 0; k < line_chunks / 2; k++) {
    uint32_t a[Tile::fragment_rows][4], b[Tile::fragment_columns / 2][4];
#pragma unroll
    for (int i = 0; i < Tile::fragment_rows; i++) {
      ptx::ldmatrix_x4(a[i], image + swizzled_chunk(first_row + i * 16 + lane % 16, k * 2 + lane / 16));
      round_fragment<T>(a[i]);
    }
#pragma unroll
    for (int j = 0; j < Tile::fragment_columns / 2; j++) {
      ptx::ldmatrix_x4(b[j], filters + swizzled_chunk(first_column + j * 16 + lane % 8 + lane / 16 * 8,
                                                      k * 2 + lane / 8 % 2));
      round_fragment<T>(b[j]);
    }
#pragma unroll
    for (int i = 0; i < Tile::fragment_rows; i++)
#pragma unroll
      for (int j = 0; j < Tile::fragment_columns; j++) {
        const uint32_t pair[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
        multiply_fragments(T{}, sum[i][j], a[i], pair);
      }
  }
}

// ---- A finished tile, (rows, columns) in shared memory in the storage type, `pitch` elements a row.

// Bytes of a vector of outputs.
template <class T>
struct alignas(chunk_bytes) OutputVector {
  static constexpr int elements = chunk_bytes / int(sizeof(T));
  T element[elements];
};

// Writes the tile's pixels: by vectors along channels where these are neighbours, else lane by lane along
// pixels.
template <class T, int columns, int threads>
PYSEQNET_DEVICE void store_tile(T* __restrict__ out, const T* tile, int pitch, const int64_t* row_out,
                                int64_t channel_stride, int columns_left, int t) {
  constexpr int vector = OutputVector<T>::elements;
  if (channel_stride == 1) {
    for (int i = t; i < product_rows * (columns / vector); i += threads) {
      const int row = i / (columns / vector), column = i % (columns / vector) * vector;
      if (row_out[row] < 0 || column >= columns_left) continue;
      T* to = out + row_out[row] + column;
      const T* from = tile + row * pitch + column;
      if (column + vector <= columns_left && reinterpret_cast<uintptr_t>(to) % chunk_bytes == 0) {
        *reinterpret_cast<OutputVector<T>*>(to) = *reinterpret_cast<const OutputVector<T>*>(from);
      } else {
        for (int k = 0; k < vector && column + k < columns_left; k++) to[k] = from[k];
      }
    }
  } else {
    for (int i = t; i < product_rows * columns; i += threads) {
      const int row = i % product_rows, column = i / product_rows;
      if (row_out[row] >= 0 && column < columns_left)
        out[row_out[row] + column * channel_stride] = tile[row * pitch + column];
    }
  }
}

// The same through a max-pool: the first of equal taps wins, the last NaN over everything; nothing positive
// leaves 0 and `taps`. Rows are listed window by window; row_out of a window's first row is the window's.
template <class T, int columns, int threads>
PYSEQNET_DEVICE void store_pooled_tile(T* __restrict__ out, uint8_t* __restrict__ arg, const T* tile,
                                       int pitch, const int64_t* row_out, int taps, int64_t channel_stride,
                                       int columns_left, int t) {
  const int windows = product_rows / taps;
  const bool planes = channel_stride != 1;
  for (int i = t; i < windows * columns; i += threads) {
    const int window = planes ? i % windows : i / columns, column = planes ? i / windows : i % columns;
    const int64_t to = row_out[window * taps];
    if (to < 0 || column >= columns_left) continue;
    float best = 0;
    int winner = taps;
    for (int tap = 0; tap < taps; tap++) {
      const float v = load(tile + (window * taps + tap) * pitch + column);
      if (v > best || v != v) best = v, winner = tap;
    }
    store(out + to + column * channel_stride, best);
    if (arg) arg[to + column * channel_stride] = uint8_t(winner);
  }
}

template <class T, int columns>
__global__ void __launch_bounds__(ProductTile<columns>::threads, ProductTile<columns>::blocks)
    gathered_product(const Chunk16* __restrict__ image, const Chunk16* __restrict__ filters,
                     const T* __restrict__ bias, T* __restrict__ out, uint8_t* __restrict__ arg,
                     const __grid_constant__ GatheredProduct g) {
  using Tile = ProductTile<columns>;
  PYSEQNET_DYNAMIC_SHARED(unsigned char, ring);
  PYSEQNET_SHARED(ProductRows, rows, );
  const int t = int(threadIdx.x), lane = t % 32, warp = t / 32;

  // Blocks that share pixels are neighbours: they find the image in the L2 cache.
  unsigned block = blockIdx.x;
  const int first_column = int(block % g.column_tiles) * columns;
  block /= g.column_tiles;
  const unsigned row_tile = block % g.row_tiles;
  block /= g.row_tiles;
  const int64_t group = block % g.groups;
  const TileAxes axes(g, int(block / g.groups));
  const int taps = axes.h.window * axes.w.window;
  const int64_t windows = int64_t(g.images) * axes.h.outputs * axes.w.outputs;
  const int64_t first_window = int64_t(row_tile) * (product_rows / taps);
  if (first_window >= windows) return;  // residues differ in their number of pixels
  const int columns_left = g.columns - first_column;

  for (int row = t; row < product_rows; row += Tile::threads)
    list_row(rows, g, axes, first_window, windows, row);
  __syncthreads();

  const int depth_taps = axes.h.taps * axes.w.taps;
  const int steps = (depth_taps * g.chunks + line_chunks - 1) / line_chunks;
  float sum[Tile::fragment_rows][Tile::fragment_columns][4] = {};
  const int warp_row = warp / Tile::warps_across * Tile::warp_rows;
  const int warp_column = warp % Tile::warps_across * Tile::warp_columns;
  if (steps > 0) {
    const uint32_t stages = ptx::smem_u32(ring);
    ProductCopies<Tile> copies(g, axes, rows, image + group * g.chunks,
                               filters + (group * g.columns + first_column) * g.filter_row, columns_left, t);
#pragma unroll
    for (int s = 0; s < ring_stages - 1; s++) {
      if (s < steps) copies.copy_next(stages + s * Tile::stage_bytes);
      ptx::cp_async_commit();
    }
    // In step i, stage i % 3 is multiplied and the one multiplied in the step before is filled: one barrier.
    for (int step = 0, now = 0, free = ring_stages - 1; step < steps; step++) {
      ptx::cp_async_wait<ring_stages - 2>();
      __syncthreads();
      if (step + ring_stages - 1 < steps) copies.copy_next(stages + free * Tile::stage_bytes);
      ptx::cp_async_commit();
      multiply_stage<T, Tile>(sum, stages + now * Tile::stage_bytes, warp_row, warp_column, lane);
      free = now;
      now = now + 1 == ring_stages ? 0 : now + 1;
    }
    ptx::cp_async_wait<0>();
    __syncthreads();
  }

  // Rows padded so that fragments, vectors along a row and elements along a column meet few bank conflicts.
  constexpr int vector = OutputVector<T>::elements;
  const int pitch = columns + (g.out.c == 1 ? vector : 2);
  static_assert(product_rows * (columns + vector) * sizeof(T) <= Tile::shared_bytes);
  T* tile = reinterpret_cast<T*>(ring);
#pragma unroll
  for (int j = 0; j < Tile::fragment_columns; j++) {
    const int column = warp_column + j * 8 + lane % 4 * 2;
    float b[2] = {0, 0};
#pragma unroll
    for (int k = 0; k < 2; k++)
      if (bias && column + k < columns_left)
        b[k] = load(bias + group * g.columns + first_column + column + k);
#pragma unroll
    for (int i = 0; i < Tile::fragment_rows; i++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        struct alignas(2 * sizeof(T)) Two {
          T element[2];
        } two;
#pragma unroll
        for (int k = 0; k < 2; k++) {
          const float v = sum[i][j][half * 2 + k] + b[k];
          two.element[k] = from_accumulator<T>(g.relu && v <= 0 ? 0.f : v);
        }
        const int row = warp_row + i * 16 + half * 8 + lane / 4;
        *reinterpret_cast<Two*>(tile + row * pitch + column) = two;
      }
  }
  __syncthreads();
  T* to = out + (group * g.columns + first_column) * g.out.c;
  if (g.pooled)
    store_pooled_tile<T, columns, Tile::threads>(
        to, arg ? arg + (group * g.columns + first_column) * g.out.c : nullptr, tile, pitch, rows.out, taps,
        g.out.c, columns_left, t);
  else
    store_tile<T, columns, Tile::threads>(to, tile, pitch, rows.out, g.out.c, columns_left, t);
}

}  // namespace pyseqnet
