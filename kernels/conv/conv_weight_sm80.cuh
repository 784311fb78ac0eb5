// The weight gradient on tensor cores with mma.sync, cp.async and ldmatrix.
//
// weight_product: the weight gradient, filters x (taps, channels), deep in pixels. Both operands lie with
// pixels as lines, so depth is across: 16-bit fragments come transposed from ldmatrix, floats by plain loads
// from a swizzle of their own. Depth is split over blocks; each writes its part to the workspace.
#pragma once
#include "conv/conv_sm80.cuh"

namespace pyseqnet {

struct WeightProduct {
  int rows;     // filters of a group
  int columns;  // chunks of a filter: R * S * chunks of a tap
  int chunks, taps_w;
  int H, W, P, Q;  // of the image, of gy
  int stride_h, stride_w, dilation_h, dilation_w, pad_h, pad_w;
  int row_chunks;  // of a group's filters in a pixel of gy
  unsigned image_n, image_row, image_pixel, gy_pixel;
  unsigned row_tiles, column_tiles, groups;
  int64_t pixels, part_pixels, part_stride;  // elements of one part
};

// 128 columns (taps, channels) x 128 or 64 filters; a stage is a line of each for 64 pixels (32 in float).
template <class T, int rows_>
struct WeightTile {
  static constexpr int rows = rows_, columns = 128, threads = rows * 2;
  static constexpr int elements = chunk_bytes / int(sizeof(T));  // of a chunk
  static constexpr int depth = 32 * elements / 4;                // pixels of a stage
  static constexpr int row_chunks = rows / elements, column_chunks = columns / elements;
  static constexpr int warps_across = 4;  // 64 x 32 a warp
  // Fragments of floats are loaded word by word: their addresses take registers.
  static constexpr int blocks = std::is_same_v<T, float> && rows == 128 ? 1 : 2;
  static constexpr unsigned gy_bytes = depth * row_chunks * chunk_bytes;
  static constexpr unsigned stage_bytes = gy_bytes + depth * column_chunks * chunk_bytes;
  static constexpr unsigned shared_bytes = ring_stages * stage_bytes;
  static constexpr int gy_lines = threads / row_chunks, image_lines = threads / column_chunks;  // at once
};

// Lines are pixels of `chunks` chunks. ldmatrix reads the same chunk of eight lines, a float fragment two
// neighbouring chunks of four lines: both meet all banks once.
template <class T>
PYSEQNET_DEVICE uint32_t pixel_chunk(int line, int chunk, int chunks) {
  const int exchanged = std::is_same_v<T, float> ? chunk ^ (line & 3) << 1 : chunk ^ (line & 7);
  return uint32_t(line * chunks + exchanged) * chunk_bytes;
}

template <class T, class Tile>
class WeightCopies {
 public:
  PYSEQNET_DEVICE WeightCopies(const WeightProduct& g, const Chunk16* gy, const Chunk16* image, int first_row,
                               int first_column, int64_t begin, int64_t end, int t)
      : g_(g), gy_(gy), image_(image), t_(t), end_(int(end)) {
    gy_pixel_ = int(begin) + t / Tile::row_chunks;
    const int row_chunk = first_row / Tile::elements + t % Tile::row_chunks;
    gy_column_ = row_chunk;
    gy_exists_ = row_chunk < g.row_chunks;
    pixel_ = int(begin) + t / Tile::column_chunks;
    const int column = first_column / Tile::elements + t % Tile::column_chunks;
    image_exists_ = column < g.columns;
    const int tap = column / g.chunks, r = tap / g.taps_w, s = tap - r * g.taps_w;
    h_ = r * g.dilation_h - g.pad_h, w_ = s * g.dilation_w - g.pad_w;
    chunk_ = column - tap * g.chunks;
    int rest = pixel_ / g.Q;
    at_.digit[2] = pixel_ - rest * g.Q;
    at_.digit[0] = rest / g.P;
    at_.digit[1] = rest - at_.digit[0] * g.P;
    radix_.extent[1] = g.P, radix_.extent[2] = g.Q;
    rest = Tile::image_lines / g.Q;
    radix_.step[2] = Tile::image_lines - rest * g.Q;
    radix_.step[0] = rest / g.P;
    radix_.step[1] = rest - radix_.step[0] * g.P;
  }

  PYSEQNET_DEVICE void copy_next(uint32_t stage) {
#pragma unroll
    for (int i = 0; i < Tile::depth / Tile::gy_lines; i++, gy_pixel_ += Tile::gy_lines) {
      const int line = t_ / Tile::row_chunks + i * Tile::gy_lines;
      const bool inside = gy_exists_ && gy_pixel_ < end_;
      ptx::cp_async_16(stage + pixel_chunk<T>(line, t_ % Tile::row_chunks, Tile::row_chunks),
                       gy_ + (inside ? unsigned(gy_pixel_) * g_.gy_pixel + gy_column_ : 0u), inside);
    }
#pragma unroll
    for (int i = 0; i < Tile::depth / Tile::image_lines; i++, pixel_ += Tile::image_lines) {
      const int line = t_ / Tile::column_chunks + i * Tile::image_lines;
      const int h = at_.digit[1] * g_.stride_h + h_, w = at_.digit[2] * g_.stride_w + w_;
      const bool inside =
          image_exists_ && pixel_ < end_ && unsigned(h) < unsigned(g_.H) && unsigned(w) < unsigned(g_.W);
      const unsigned from = unsigned(at_.digit[0]) * g_.image_n + unsigned(h) * g_.image_row +
                            unsigned(w) * g_.image_pixel + unsigned(chunk_);
      ptx::cp_async_16(
          stage + Tile::gy_bytes + pixel_chunk<T>(line, t_ % Tile::column_chunks, Tile::column_chunks),
          image_ + (inside ? from : 0u), inside);
      advance(at_, radix_);
    }
  }

 private:
  const WeightProduct& g_;
  const Chunk16 *gy_, *image_;
  int t_, end_, gy_pixel_, pixel_, h_, w_, chunk_;
  unsigned gy_column_;
  bool gy_exists_, image_exists_;
  Digits<3> at_;  // (n, p, q) of pixel_
  Radix<3> radix_;
};

// Adds one stage's products to a warp's sums, 16 lines of depth (8 in float) at a time.
template <class T, class Tile>
PYSEQNET_DEVICE void multiply_weight_stage(float (&sum)[4][4][4], const unsigned char* stage, int first_row,
                                           int first_column, int lane) {
  constexpr int step = 2 * Tile::elements;  // depth of a fragment
  const unsigned char *gy = stage, *image = stage + Tile::gy_bytes;
#pragma unroll 2
  for (int k = 0; k < Tile::depth; k += step) {
    uint32_t a[4][4], b[2][4];
    if constexpr (std::is_same_v<T, float>) {
      const int line = k + lane % 4;
#pragma unroll
      for (int i = 0; i < 4; i++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const int row = first_row + i * 16 + e % 2 * 8 + lane / 4;
          a[i][e] = *reinterpret_cast<const uint32_t*>(
              gy + pixel_chunk<T>(line + e / 2 * 4, row / 4, Tile::row_chunks) + row % 4 * 4);
        }
#pragma unroll
      for (int j = 0; j < 2; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const int column = first_column + j * 16 + e / 2 * 8 + lane / 4;
          b[j][e] = *reinterpret_cast<const uint32_t*>(
              image + pixel_chunk<T>(line + e % 2 * 4, column / 4, Tile::column_chunks) + column % 4 * 4);
        }
    } else {
      const uint32_t gy_u32 = ptx::smem_u32(gy), image_u32 = ptx::smem_u32(image);
#pragma unroll
      for (int i = 0; i < 4; i++)
        ptx::ldmatrix_x4_trans(
            a[i], gy_u32 + pixel_chunk<T>(k + lane % 8 + lane / 16 * 8, first_row / 8 + i * 2 + lane / 8 % 2,
                                          Tile::row_chunks));
#pragma unroll
      for (int j = 0; j < 2; j++)
        ptx::ldmatrix_x4_trans(
            b[j], image_u32 + pixel_chunk<T>(k + lane % 8 + lane / 8 % 2 * 8,
                                             first_column / 8 + j * 2 + lane / 16, Tile::column_chunks));
    }
#pragma unroll
    for (int i = 0; i < 4; i++) round_fragment<T>(a[i]);
#pragma unroll
    for (int j = 0; j < 2; j++) round_fragment<T>(b[j]);
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const uint32_t pair[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
        multiply_fragments(T{}, sum[i][j], a[i], pair);
      }
  }
}

template <class T, int rows>
__global__ void __launch_bounds__(WeightTile<T, rows>::threads, WeightTile<T, rows>::blocks)
    weight_product(const Chunk16* __restrict__ gy, const Chunk16* __restrict__ image,
                   float* __restrict__ partial, const __grid_constant__ WeightProduct g) {
  using Tile = WeightTile<T, rows>;
  PYSEQNET_DYNAMIC_SHARED(unsigned char, ring);
  const int t = int(threadIdx.x), lane = t % 32, warp = t / 32;
  unsigned block = blockIdx.x;
  const int first_column = int(block % g.column_tiles) * Tile::columns;
  block /= g.column_tiles;
  const int first_row = int(block % g.row_tiles) * rows;
  block /= g.row_tiles;
  const int64_t group = block % g.groups, part = block / g.groups;
  const int64_t begin = part * g.part_pixels;
  const int64_t end = begin + g.part_pixels < g.pixels ? begin + g.part_pixels : g.pixels;
  const int steps = int((end - begin + Tile::depth - 1) / Tile::depth);

  const uint32_t stages = ptx::smem_u32(ring);
  WeightCopies<T, Tile> copies(g, gy + group * g.row_chunks, image + group * g.chunks, first_row,
                               first_column, begin, end, t);
  float sum[4][4][4] = {};
  const int warp_row = warp / Tile::warps_across * 64, warp_column = warp % Tile::warps_across * 32;
#pragma unroll
  for (int s = 0; s < ring_stages - 1; s++) {
    if (s < steps) copies.copy_next(stages + s * Tile::stage_bytes);
    ptx::cp_async_commit();
  }
  for (int step = 0, now = 0, free = ring_stages - 1; step < steps; step++) {
    ptx::cp_async_wait<ring_stages - 2>();
    __syncthreads();
    if (step + ring_stages - 1 < steps) copies.copy_next(stages + free * Tile::stage_bytes);
    ptx::cp_async_commit();
    multiply_weight_stage<T, Tile>(sum, ring + now * Tile::stage_bytes, warp_row, warp_column, lane);
    free = now;
    now = now + 1 == ring_stages ? 0 : now + 1;
  }
  ptx::cp_async_wait<0>();

  const int64_t width = int64_t(g.columns) * Tile::elements;
  float* out = partial + part * g.part_stride + (group * g.rows + first_row) * width + first_column;
#pragma unroll
  for (int i = 0; i < 4; i++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int row = warp_row + i * 16 + half * 8 + lane / 4;
      if (first_row + row >= g.rows) continue;
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const int column = warp_column + j * 8 + lane % 4 * 2;
        if (first_column + column < width) {  // widths are whole chunks
          struct alignas(8) Two {
            float element[2];
          };
          *reinterpret_cast<Two*>(out + row * width +
                                  column) = {{sum[i][j][half * 2], sum[i][j][half * 2 + 1]}};
        }
      }
    }
}

}  // namespace pyseqnet
