// Winograd forward and input gradient: two orders of the same work, and which one a problem gets. The input
// gradient is a convolution of gy with turned filters, C and K exchanged.
#pragma once
#include "conv/conv.h"
#include "conv/winograd_panels.h"

namespace pyseqnet {
inline namespace PYSEQNET_ISA {
namespace winograd {

// Transformed inputs and products of a block of tiles: they share the second-level cache (1 MiB on the
// machines at hand) with the filters that stream through it.
constexpr int64_t BLOCK_BYTES = 640 * KIB;

struct Convolution {
  Image<const void*> in;
  Image<void*> out;
  Filters<const void*> filters;
  const void* bias;
  int64_t pad_h, pad_w;
  Tiling tiling;
  int64_t C() const { return in.C; }
  int64_t K() const { return out.C; }
};

template <ConvPass pass>
Convolution convolution(const ConvProblem& p, const ConvTensors& t) {
  const Strides x = p.x_strides(), y = p.y_strides(), w = p.w_strides();
  if (pass == ConvPass::forward)
    return {{t.x, p.dtype, x, p.C, p.H, p.W},
            {t.y, p.dtype, y, p.K, p.P, p.Q},
            {t.w, p.dtype, w.n, w.c, w.w, p.K, p.C, false},
            t.bias,
            p.pad_h,
            p.pad_w,
            Tiling(p.N, p.P, p.Q)};
  // gx[h] = sum over r of gy[h + pad - r] w[r]: with r = 2 - r', a convolution of padding 2 - pad.
  return {{t.gy, p.dtype, y, p.K, p.P, p.Q},
          {t.gx, p.dtype, x, p.C, p.H, p.W},
          {t.w, p.dtype, w.c, w.n, w.w, p.C, p.K, true},
          nullptr,
          2 - p.pad_h,
          2 - p.pad_w,
          Tiling(p.N, p.H, p.W)};
}

// ---- by tiles ----

struct ByTiles {
  const Convolution& c;
  int64_t block_strips, blocks;
  int64_t filter_pieces = ceil_div(c.C(), TRANSFORM_CHANNELS);

  explicit ByTiles(const Convolution& c) : c(c) {
    const int64_t strip_bytes = points * (c.C() + c.K()) * float_bytes * c.tiling.strip_tiles;
    block_strips = within(BLOCK_BYTES / strip_bytes, 1, ceil_div(c.tiling.strips, ENOUGH_BLOCKS));
    blocks = ceil_div(c.tiling.strips, block_strips);
  }
  int64_t block_tiles() const { return block_strips * c.tiling.strip_tiles; }
  Panels filters(Carver& shared) const {
    return Panels(shared.take<float>(Panels::size(c.K(), c.C())), c.K(), c.C());
  }
  struct Scratch {
    float* strip;
    Panels inputs, products;
  };
  Scratch scratch(Carver& carver) const {
    float* strip = carver.take<float>(most(c.tiling.gather_floats(), filter_floats));
    float* inputs = carver.take<float>(Panels::size(c.C(), block_tiles()));
    float* products = carver.take<float>(Panels::size(c.K(), block_tiles()));
    return {strip, Panels(inputs, c.C(), block_tiles()), Panels(products, c.K(), block_tiles())};
  }
  WorkPlan plan() const {
    WorkPlan plan;
    plan.add_phase(ceil_div(c.K(), VL) * filter_pieces, TRANSFORM_GRAIN);
    plan.add_phase(blocks);
    Carver shared(nullptr), thread(nullptr);
    filters(shared);
    scratch(thread);
    plan.shared_bytes = shared.used();
    plan.thread_bytes = thread.used();
    return plan;
  }
  void transform_piece(int64_t item, const Panels& U, const Scratch& s) const {
    const int64_t k = item / filter_pieces * VL, first = item % filter_pieces * TRANSFORM_CHANNELS;
    const int64_t last = least(first + TRANSFORM_CHANNELS, c.C());
    for (int64_t row = first; row < last; row += FILTER_ROWS)
      transform_filters(c.filters, k, row, least(FILTER_ROWS, last - row), s.strip, U, row, k);
  }
  void convolve_block(int64_t block, const Panels& U, const Scratch& s) const {
    const Tiling& t = c.tiling;
    const int64_t first = block * block_strips, count = least(block_strips, t.strips - first);
    for (int64_t i = 0; i < count; ++i)
      for (int64_t ch = 0; ch < c.C(); ch += VL)
        transform_strip<InputTransform>(c.in, t, first + i, c.pad_h, c.pad_w, ch, s.strip, s.inputs,
                                        i * t.strip_tiles, ch);
    for (int64_t pt = 0; pt < points; ++pt)
      for (int64_t k = 0; k < c.K(); k += PANEL)
        panel_product<Depth::channels>(count * t.strip_tiles, c.K() - k, s.inputs.at(pt, 0, 0),
                                       s.inputs.panel(), U.at(pt, 0, k), c.C(), s.products.at(pt, 0, k),
                                       false);
    for (int64_t i = 0; i < count; ++i)
      for (int64_t k = 0; k < c.K(); k += VL)
        output_strip(s.products, i * t.strip_tiles, k, c.bias, t, first + i, k, s.strip, c.out);
  }
  void run(const WorkSlice& slice) const {
    Carver shared(slice.shared), thread(slice.scratch);
    const Panels U = filters(shared);
    const Scratch s = scratch(thread);
    for (int64_t item = slice.begin; item < slice.end; ++item)
      slice.phase == 0 ? transform_piece(item, U, s) : convolve_block(item, U, s);
  }
};

// ---- by channels ----

// Tiles and input channels of a product: products (36 x 96 x PANEL) and transformed filters (36 x 64 x PANEL)
// together fill 3/4 of the second-level cache.
constexpr int64_t CHANNEL_BLOCK_TILES = 96;
constexpr int64_t CHANNEL_BLOCK_DEPTH = SUM_LENGTH;

// Few tiles: their transforms are a phase of their own, and an item is one panel of output channels of a
// block. Many tiles: an item is a block with all its channels, and the transformed inputs are private.
struct ByChannels {
  const Convolution& c;
  int64_t pieces = ceil_div(c.C(), TRANSFORM_CHANNELS), panels = ceil_div(c.K(), PANEL);
  int64_t block_strips, blocks;
  bool share_inputs;

  explicit ByChannels(const Convolution& c) : c(c) {
    const int64_t wanted = most(1, ceil_div(c.tiling.tiles(), CHANNEL_BLOCK_TILES));
    block_strips = most(1, ceil_div(c.tiling.strips, wanted));
    blocks = ceil_div(c.tiling.strips, block_strips);
    share_inputs = blocks < ENOUGH_BLOCKS;
  }
  Panels inputs(Carver& carver) const {
    const int64_t tiles = (share_inputs ? c.tiling.strips : block_strips) * c.tiling.strip_tiles;
    return Panels(carver.take<float>(Panels::size(c.C(), tiles)), c.C(), tiles);
  }
  struct Scratch {
    float* strip;
    Panels filters, products;
  };
  Scratch scratch(Carver& carver) const {
    const int64_t tiles = block_strips * c.tiling.strip_tiles;
    float* strip = carver.take<float>(most(c.tiling.gather_floats(), filter_floats));
    float* filters = carver.take<float>(Panels::size(PANEL, CHANNEL_BLOCK_DEPTH));
    float* products = carver.take<float>(Panels::size(PANEL, tiles));
    return {strip, Panels(filters, PANEL, CHANNEL_BLOCK_DEPTH), Panels(products, PANEL, tiles)};
  }
  WorkPlan plan() const {
    WorkPlan plan;
    Carver shared(nullptr), thread(nullptr);
    scratch(thread);
    if (share_inputs) {
      plan.add_phase(c.tiling.strips * pieces, TRANSFORM_GRAIN);
      plan.add_phase(blocks * panels);
      inputs(shared);
    } else {
      plan.add_phase(blocks);
      inputs(thread);
    }
    plan.shared_bytes = shared.used();
    plan.thread_bytes = thread.used();
    return plan;
  }
  // Channels first .. first + count of a strip -> rows row ... of V.
  void transform_piece(int64_t strip, int64_t first, int64_t count, const Panels& V, int64_t row,
                       const Scratch& s) const {
    for (int64_t ch = first; ch < least(first + count, c.C()); ch += VL)
      transform_strip<InputTransform>(c.in, c.tiling, strip, c.pad_h, c.pad_w, ch, s.strip, V, row, ch);
  }
  // A panel of output channels of `count` strips; their tiles are rows row ... of V.
  void convolve_panel(int64_t panel, int64_t first, int64_t count, const Panels& V, int64_t row,
                      const Scratch& s) const {
    const Tiling& t = c.tiling;
    const int64_t k0 = panel * PANEL, lanes = least(PANEL, c.K() - k0);
    for (int64_t c0 = 0; c0 < c.C(); c0 += CHANNEL_BLOCK_DEPTH) {
      const int64_t depth = least(CHANNEL_BLOCK_DEPTH, c.C() - c0);
      for (int64_t k = 0; k < lanes; k += VL)
        for (int64_t r = 0; r < depth; r += FILTER_ROWS)
          transform_filters(c.filters, k0 + k, c0 + r, least(FILTER_ROWS, depth - r), s.strip, s.filters, r,
                            k);
      for (int64_t pt = 0; pt < points; ++pt)
        panel_product<Depth::channels>(count * t.strip_tiles, lanes, V.at(pt, row, c0), V.panel(),
                                       s.filters.at(pt, 0, 0), depth, s.products.at(pt, 0, 0), c0 > 0);
    }
    for (int64_t i = 0; i < count; ++i)
      for (int64_t k = 0; k < lanes; k += VL)
        output_strip(s.products, i * t.strip_tiles, k, c.bias, t, first + i, k0 + k, s.strip, c.out);
  }
  void convolve_block(int64_t block, int64_t first_panel, int64_t last_panel, const Panels& V,
                      const Scratch& s) const {
    const int64_t first = block * block_strips, count = least(block_strips, c.tiling.strips - first);
    const int64_t tiles = c.tiling.strip_tiles;
    if (!share_inputs)
      for (int64_t i = 0; i < count; ++i) transform_piece(first + i, 0, c.C(), V, i * tiles, s);
    for (int64_t panel = first_panel; panel < last_panel; ++panel)
      convolve_panel(panel, first, count, V, share_inputs ? first * tiles : 0, s);
  }
  void run(const WorkSlice& slice) const {
    Carver shared(slice.shared), thread(slice.scratch);
    const Scratch s = scratch(thread);
    const Panels V = inputs(share_inputs ? shared : thread);
    for (int64_t item = slice.begin; item < slice.end; ++item)
      if (!share_inputs)
        convolve_block(item, 0, panels, V, s);
      else if (slice.phase == 0)
        transform_piece(item / pieces, item % pieces * TRANSFORM_CHANNELS, TRANSFORM_CHANNELS, V,
                        item / pieces * c.tiling.strip_tiles, s);
      else
        convolve_block(item / panels, item % panels, item % panels + 1, V, s);
  }
};

// Filters of all channels, transformed: larger ones do not stay in the third-level cache, and by tiles they
// are read once for every block.
constexpr int64_t MOST_FILTER_BYTES = 12 * MIB;
PYSEQNET_INLINE bool by_channels(const Convolution& c) {
  return c.tiling.tiles() <= (c.C() + c.K()) / 2 || points * c.C() * c.K() * float_bytes > MOST_FILTER_BYTES;
}

template <ConvPass pass>
WorkPlan plan_convolution(const ConvProblem& p) {
  const Convolution c = convolution<pass>(p, {});
  return by_channels(c) ? ByChannels(c).plan() : ByTiles(c).plan();
}
template <ConvPass pass>
void run_convolution(const ConvProblem& p, const ConvTensors& t, const WorkSlice& slice) {
  const Convolution c = convolution<pass>(p, t);
  by_channels(c) ? ByChannels(c).run(slice) : ByTiles(c).run(slice);
}

}  // namespace winograd
}  // namespace PYSEQNET_ISA
}  // namespace pyseqnet
