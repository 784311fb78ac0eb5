// What the three Winograd passes share: the layout of transformed operands, the products at the 36 points,
// and the ways in and out (strips of the image, rows of filters).
//
// Layout: [point][channel / PANEL][row][PANEL]. A row is a tile (x, gy, y) or an input channel (filters); all
// strides inside a product are compile-time constants. The lanes of the last panel beyond the last channel
// hold zero up to a multiple of VL, and nothing defined after that.
#pragma once
#include "common/cpu_work.h"
#include "common/transpose.h"
#include "common/types.h"
#include "conv/winograd_points.h"

namespace pyseqnet {
inline namespace PYSEQNET_ISA {
namespace winograd {

constexpr int64_t PANEL = 2 * VL;  // channels of a panel: two vectors, the width of the register tile
constexpr int MAX_ROWS =
    VL == 16 ? 14 : 6;  // rows of the register tile: 28 of 32, 12 of 16 registers accumulate
// A sum runs in registers over at most this many products and is then added to its cell in memory: errors
// grow with the square root of 64 plus that of the number of such pieces, instead of that of their product.
constexpr int64_t SUM_LENGTH = 64;

constexpr int64_t KIB = 1024, MIB = 1024 * KIB;
constexpr int64_t float_bytes = int64_t(sizeof(float));
// A workspace is allocated for each call. Larger ones come fresh from the operating system every time
// (glibc's limit is 32 MiB), and touching new pages costs more than the work that such an order saves.
constexpr int64_t WORKSPACE_BYTES = 30 * MIB;
// Enough blocks for the threads of a small machine to share the work evenly.
constexpr int64_t ENOUGH_BLOCKS = 16;
// A work item of the transform phases: this many channels of a strip, or rows of VL filters.
constexpr int64_t TRANSFORM_CHANNELS = 64;
constexpr int64_t TRANSFORM_GRAIN = 4;  // such an item takes about 5 microseconds

PYSEQNET_INLINE int64_t least(int64_t x, int64_t y) { return x < y ? x : y; }
PYSEQNET_INLINE int64_t most(int64_t x, int64_t y) { return x > y ? x : y; }
PYSEQNET_INLINE int64_t within(int64_t x, int64_t low, int64_t high) { return most(low, least(x, high)); }
PYSEQNET_INLINE int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

struct Panels {
  float* p;
  int64_t rows;
  int64_t point;  // distance between points

  // One line more than the data: with power-of-two sizes all points would else share one cache set.
  static int64_t point_size(int64_t channels, int64_t rows) {
    return ceil_div(channels, PANEL) * PANEL * rows + workspace_alignment / int64_t(sizeof(float));
  }
  static int64_t size(int64_t channels, int64_t rows) { return points * point_size(channels, rows); }
  Panels(float* memory, int64_t channels, int64_t rows)
      : p(memory), rows(rows), point(point_size(channels, rows)) {}
  int64_t panel() const { return rows * PANEL; }  // distance between panels
  float* at(int64_t pt, int64_t row, int64_t channel) const {
    return p + pt * point + (channel / PANEL * rows + row) * PANEL + channel % PANEL;
  }
};

// ---- Products ----

// How the left operand of a product runs: the filters' depth is channels (lanes of A, panel after panel), the
// weight gradient's depth is tiles (rows of A).
enum class Depth { channels, tiles };

// C[R][NV vectors] = (add ? C : 0) + A B. Rows of B and C lie PANEL apart; A as Depth says.
template <Depth over, int R, int NV>
__attribute__((noinline)) void register_tile(const float* A, int64_t a_panel, const float* B, int64_t depth,
                                             float* C, bool add) {
  constexpr int64_t row_step = over == Depth::channels ? PANEL : 1,
                    step = over == Depth::channels ? 1 : PANEL;
  constexpr int64_t run = over == Depth::channels ? PANEL : SUM_LENGTH;  // depth that is contiguous in A
  const int64_t run_step = over == Depth::channels ? a_panel : run * step;
  for (int64_t d0 = 0; d0 < depth; d0 += SUM_LENGTH) {
    vf acc[R][NV] = {};
    for (int64_t d = d0; d < least(d0 + SUM_LENGTH, depth); d += run, A += run_step) {
      const float* pa = A;
      for (int64_t i = least(run, depth - d); i > 0; --i, pa += step, B += PANEL) {
        vf b[NV];
#pragma GCC unroll 2
        for (int v = 0; v < NV; ++v) b[v] = load(B + v * VL);
#pragma GCC unroll 14
        for (int r = 0; r < R; ++r) {
          const vf s = set1(pa[r * row_step]);
#pragma GCC unroll 2
          for (int v = 0; v < NV; ++v) acc[r][v] += s * b[v];
        }
      }
    }
    const bool more = add || d0 > 0;
#pragma GCC unroll 14
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) {
        float* c = C + r * PANEL + v * VL;
        store(c, more ? load(c) + acc[r][v] : acc[r][v]);
      }
  }
}

// `rows` rows of one panel of C, `lanes` of its channels; cut evenly into register tiles.
template <Depth over>
PYSEQNET_INLINE void panel_product(int64_t rows, int64_t lanes, const float* A, int64_t a_panel,
                                   const float* B, int64_t depth, float* C, bool add) {
  const int64_t parts = ceil_div(rows, MAX_ROWS);
  for (int64_t part = 0, r = 0; part < parts; ++part) {
    const int64_t n = (rows - r) / (parts - part);
    const float* a = A + r * (over == Depth::channels ? PANEL : 1);
    with_rows<MAX_ROWS>(int(n), [&](auto count) PYSEQNET_LAMBDA {
      constexpr int R = decltype(count)::value;
      if (lanes > VL)
        register_tile<over, R, 2>(a, a_panel, B, depth, C + r * PANEL, add);
      else
        register_tile<over, R, 1>(a, a_panel, B, depth, C + r * PANEL, add);
    });
    r += n;
  }
}

// ---- Images ----

template <class Pointer>
struct Image {  // a batch of images; where they lie is in the strides
  Pointer p;
  DType dtype;
  Strides s;
  int64_t C, H, W;
};

// Tiles are worked through strip by strip: a strip is a piece of a row of tiles, short enough for VL channels
// of it to stay in the first-level cache between the gather and the transform.
struct Tiling {
  static constexpr int64_t longest_strip = 14;  // 6 rows x 58 columns x 64 bytes = 22 KiB
  int64_t tile_rows, strips_a_row, strip_tiles, strips;
  Tiling(int64_t images, int64_t P, int64_t Q) {
    const int64_t tiles = ceil_div(Q, M);
    tile_rows = ceil_div(P, M);
    strips_a_row = ceil_div(tiles, longest_strip);
    strip_tiles = ceil_div(tiles, strips_a_row);
    strips = images * tile_rows * strips_a_row;
  }
  int64_t tiles() const { return strips * strip_tiles; }
  int64_t image(int64_t strip) const { return strip / strips_a_row / tile_rows; }
  int64_t row(int64_t strip) const { return strip / strips_a_row % tile_rows * M; }       // of outputs
  int64_t column(int64_t strip) const { return strip % strips_a_row * strip_tiles * M; }  // of outputs
  int64_t gather_floats() const {
    return T * (strip_tiles * M + T - M) * VL;
  }  // scratch of every strip function
};

// The pixels of a run follow each other in a planar image; in a strip they are lines of `width` vectors,
// `pitch` floats apart. A run is worked off in blocks of VL pixels. The last block ends with the run, over
// pixels that are already done if need be: doing them again is cheaper than masking (masked stores above
// all).
struct Run {
  int64_t pixels, width, pitch;
  template <class Block>
  PYSEQNET_INLINE void blocks(Block&& block) const {
    for (int64_t i = 0; i < pixels; i += VL) {
      const int64_t from = pixels - i < VL && pixels >= VL ? pixels - VL : i;
      block(from, int(least(VL, pixels - from)));
    }
  }
  // Calls f(j, address) for `count` pixels of a strip from pixel i on.
  template <class F>
  PYSEQNET_INLINE void each(float* strip, int64_t i, int count, F&& f) const {
    float* line = strip + i / width * pitch;
    int64_t q = i % width;
#pragma GCC unroll 16
    for (int j = 0; j < VL; ++j) {
      if (j < count) f(j, line + q * VL);
      if (++q == width) {
        q = 0;
        line += pitch;
      }
    }
  }
};
template <class E>
PYSEQNET_INLINE void gather_run(const Run& run, const E* src, int64_t channel_stride, int lanes,
                                float* strip) {
  run.blocks([&](int64_t i, int count) PYSEQNET_LAMBDA {
    vf r[VL];
#pragma GCC unroll 16
    for (int c = 0; c < VL; ++c) r[c] = c < lanes ? load_lanes_n(src + c * channel_stride + i, count) : vf{};
    transpose(r);
    run.each(strip, i, count, [&](int j, float* to) PYSEQNET_LAMBDA { store(to, r[j]); });
  });
}
template <class E>
PYSEQNET_INLINE void scatter_run(const Run& run, float* strip, E* dst, int64_t channel_stride, int lanes) {
  run.blocks([&](int64_t i, int count) PYSEQNET_LAMBDA {
    vf r[VL] = {};
    run.each(strip, i, count, [&](int j, const float* from) PYSEQNET_LAMBDA { r[j] = load(from); });
    transpose(r);
#pragma GCC unroll 16
    for (int c = 0; c < VL; ++c)
      if (c < lanes) store_lanes_n(dst + c * channel_stride + i, r[c], count);
  });
}

// strip[r][q][VL] = channels c0 .. c0 + VL of rows h0 + r and columns w0 + q; zero outside the image.
template <class E>
inline void gather_strip(const Image<const void*>& x, int64_t n, int64_t c0, int64_t h0, int64_t lines,
                         int64_t w0, int64_t columns, float* strip) {
  const int lanes = int(least(VL, x.C - c0));
  const int64_t pitch = columns * VL;
  const int64_t top = within(-h0, 0, lines), bottom = within(x.H - h0, top, lines);
  const int64_t left = within(-w0, 0, columns), right = within(x.W - w0, left, columns), width = right - left;
  for (int64_t r = 0; r < lines; ++r) {
    const bool inside = r >= top && r < bottom;
    for (int64_t q = 0; q < (inside ? left : columns); ++q) store(strip + r * pitch + q * VL, vf{});
    for (int64_t q = inside ? right : columns; q < columns; ++q) store(strip + r * pitch + q * VL, vf{});
  }
  if (width == 0) return;
  const E* src =
      static_cast<const E*>(x.p) + n * x.s.n + c0 * x.s.c + (h0 + top) * x.s.h + (w0 + left) * x.s.w;
  float* dst = strip + top * pitch + left * VL;
  if (x.s.c == 1) {
    for (int64_t r = top; r < bottom; ++r, src += x.s.h, dst += pitch)
      for (int64_t q = 0; q < width; ++q) store(dst + q * VL, load_lanes_n(src + q * x.s.w, lanes));
  } else if (width == x.W) {
    gather_run({(bottom - top) * width, width, pitch}, src, x.s.c, lanes, dst);
  } else {
    for (int64_t r = top; r < bottom; ++r, src += x.s.h, dst += pitch)
      gather_run({width, width, pitch}, src, x.s.c, lanes, dst);
  }
}

// The way back: rows h0 + r < H and columns w0 + q < W of channels c0 .. c0 + VL.
template <class E>
inline void scatter_strip(float* strip, const Image<void*>& y, int64_t n, int64_t c0, int64_t h0,
                          int64_t lines, int64_t w0, int64_t columns) {
  const int lanes = int(least(VL, y.C - c0));
  const int64_t pitch = columns * VL;
  const int64_t width = least(columns, y.W - w0), height = least(lines, y.H - h0);
  E* dst = static_cast<E*>(y.p) + n * y.s.n + c0 * y.s.c + h0 * y.s.h + w0 * y.s.w;
  if (y.s.c == 1) {
    for (int64_t r = 0; r < height; ++r, dst += y.s.h, strip += pitch)
      for (int64_t q = 0; q < width; ++q) store_lanes_n(dst + q * y.s.w, load(strip + q * VL), lanes);
  } else if (width == y.W) {
    scatter_run({height * width, width, pitch}, strip, dst, y.s.c, lanes);
  } else {
    for (int64_t r = 0; r < height; ++r, dst += y.s.h, strip += pitch)
      scatter_run({width, width, pitch}, strip, dst, y.s.c, lanes);
  }
}

// Channels c0 .. c0 + VL of a strip of inputs (B' x B) or of output gradients (A gy A') -> rows row ...,
// channels at ... of V.
template <class Transform>
inline void transform_strip(const Image<const void*>& x, const Tiling& t, int64_t strip, int64_t pad_h,
                            int64_t pad_w, int64_t c0, float* scratch, const Panels& V, int64_t row,
                            int64_t at) {
  constexpr int64_t lines = Transform::in;
  const int64_t columns = t.strip_tiles * M + lines - M;
  with_element(x.dtype, [&](auto element) PYSEQNET_LAMBDA {
    gather_strip<decltype(element)>(x, t.image(strip), c0, t.row(strip) - pad_h, lines,
                                    t.column(strip) - pad_w, columns, scratch);
  });
  for (int64_t j = 0; j < t.strip_tiles; ++j) {
    const float* s = scratch + j * M * VL;
    float* v = V.at(0, row + j, at);
    transform<Transform>([&](int r, int q) PYSEQNET_LAMBDA { return load(s + (r * columns + q) * VL); },
                         [&](int r, int q, vf u) PYSEQNET_LAMBDA { store(v + (r * T + q) * V.point, u); });
  }
}

// Rows row ... of the products -> A'mA + bias -> channels k0 .. k0 + VL of a strip of y. `at` is the channel
// of the products that holds k0.
inline void output_strip(const Panels& products, int64_t row, int64_t at, const void* bias, const Tiling& t,
                         int64_t strip, int64_t k0, float* scratch, const Image<void*>& y) {
  const int64_t columns = t.strip_tiles * M;
  vf shift = {};
  if (bias)
    with_element(y.dtype, [&](auto element) PYSEQNET_LAMBDA {
      shift = load_lanes_n(static_cast<const decltype(element)*>(bias) + k0, least(VL, y.C - k0));
    });
  for (int64_t j = 0; j < t.strip_tiles; ++j) {
    const float* m = products.at(0, row + j, at);
    float* s = scratch + j * M * VL;
    transform<OutputTransform>(
        [&](int r, int q) PYSEQNET_LAMBDA { return load(m + (r * T + q) * products.point); },
        [&](int r, int q, vf u) PYSEQNET_LAMBDA { store(s + (r * columns + q) * VL, u + shift); });
  }
  with_element(y.dtype, [&](auto element) PYSEQNET_LAMBDA {
    scatter_strip<decltype(element)>(scratch, y, t.image(strip), k0, t.row(strip), M, t.column(strip),
                                     columns);
  });
}

// ---- Filters ----

// Filters as the products see them: `lanes` output channels side by side, `rows` summed channels below each
// other. The input gradient sums over k, and its filters are turned by 180 degrees.
template <class Pointer>
struct Filters {
  Pointer w;
  DType dtype;
  int64_t lane, row, tap;  // strides
  int64_t lanes, rows;
  bool turned;
};
constexpr int64_t FILTER_ROWS = 16;  // filters are read in pieces of 16 x VL: 144 x VL floats of scratch
constexpr int64_t filter_floats = FILTER_ROWS * taps * VL;

// Rows r0 .. r0 + count (at most FILTER_ROWS) and lanes l0 .. l0 + VL -> scratch[r][tap][VL].
template <class E>
inline void load_filters(const Filters<const void*>& f, int64_t l0, int64_t r0, int64_t count,
                         float* scratch) {
  const int n = int(least(VL, f.lanes - l0));
  const E* src = static_cast<const E*>(f.w) + l0 * f.lane + r0 * f.row;
  if (f.lane == 1) {
    for (int64_t r = 0; r < count; ++r)
      for (int64_t i = 0; i < taps; ++i)
        store(scratch + (r * taps + i) * VL, load_lanes_n(src + r * f.row + i * f.tap, n));
  } else if (f.row == 1) {
    for (int64_t i = 0; i < taps; ++i)
      for (int64_t r = 0; r < count; r += VL)
        transpose_block(src + i * f.tap + r, f.lane, n, int(least(VL, count - r)),
                        scratch + (r * taps + i) * VL, taps * VL);
  } else {
    const bool dense = f.row == taps;  // then the taps of all rows follow each other
    const int64_t run = dense ? count * taps : taps;
    for (int64_t r = 0; r < (dense ? 1 : count); ++r)
      for (int64_t i = 0; i < run; i += VL)
        transpose_block(src + r * f.row + i, f.lane, n, int(least(VL, run - i)),
                        scratch + (r * taps + i) * VL, VL);
  }
}

// G w G' of these rows and lanes -> rows row ... of U.
inline void transform_filters(const Filters<const void*>& f, int64_t l0, int64_t r0, int64_t count,
                              float* scratch, const Panels& U, int64_t row, int64_t lane) {
  with_element(f.dtype, [&](auto element)
                            PYSEQNET_LAMBDA { load_filters<decltype(element)>(f, l0, r0, count, scratch); });
  const int64_t first = f.turned ? taps - 1 : 0, step = f.turned ? -VL : VL;
  for (int64_t r = 0; r < count; ++r) {
    const float* s = scratch + (r * taps + first) * VL;
    float* u = U.at(0, row + r, lane);
    transform<FilterTransform>([&](int i, int j) PYSEQNET_LAMBDA { return load(s + (i * 3 + j) * step); },
                               [&](int i, int j, vf v)
                                   PYSEQNET_LAMBDA { store(u + (i * T + j) * U.point, v); });
  }
}

// The way back for the weight gradient: scratch[r][tap][VL] -> rows r0 ..., lanes l0 ... of gw.
template <class E>
inline void store_filters_as(const float* scratch, const Filters<void*>& f, int64_t l0, int64_t r0,
                             int64_t count) {
  const int n = int(least(VL, f.lanes - l0));
  E* dst = static_cast<E*>(f.w) + l0 * f.lane + r0 * f.row;
  if (f.tap == 1) {
    for (int64_t i = 0; i < count * taps; i += VL)
      transpose_block_exact(scratch + i * VL, VL, int(least(VL, count * taps - i)), n, dst + i, f.lane);
  } else {
    for (int64_t i = 0; i < taps; ++i)
      for (int64_t r = 0; r < count; r += VL)
        transpose_block_exact(scratch + (r * taps + i) * VL, taps * VL, int(least(VL, count - r)), n,
                              dst + i * f.tap + r, f.lane);
  }
}

inline void store_filters(const float* scratch, const Filters<void*>& f, int64_t l0, int64_t r0,
                          int64_t count) {
  with_element(f.dtype, [&](auto element) PYSEQNET_LAMBDA {
    store_filters_as<decltype(element)>(scratch, f, l0, r0, count);
  });
}

}  // namespace winograd
}  // namespace PYSEQNET_ISA
}  // namespace pyseqnet
