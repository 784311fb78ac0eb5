// 3 x 3 convolution, stride 1, dilation 1, float32, by Winograd F(4x4, 3x3): forward, input gradient, weight
// gradient. A quarter of the multiplications of the direct sum, for transforms that cost 15 to 30 % of the
// rest.
//
// Design
//   Lanes are channels, so the transforms (winograd_points.h) are elementwise arithmetic on one tile, and the
//   products are 36 independent matrix products with a register tile of 14 tiles x 2 vectors
//   (winograd_panels.h). The input gradient is the forward routine on gy with turned filters and C and K
//   exchanged. There are two orders of the same work:
//     by tiles     the transformed filters of all channels are kept; blocks of tiles pass through transform,
//                  products and transform back inside the second-level cache. For many tiles.
//     by channels  the transformed tiles of the whole batch are kept; panels of output channels pass through
//                  products and transform back, and transform their filters on the way, which then are never
//                  written to memory (36 / 9 times their size). For few tiles and many channels.
//   The weight gradient likewise: by tiles, each of a fixed number of chunks of tiles sums its own U', and a
//   last phase adds them in order; by channels, a 2 VL x 2 VL panel of U' stays in the cache over all tiles.
//   Chunks and blocks depend on the problem only, and so do the results.
//
// Bound: FMA in the products.
// Accuracy: root mean square of the error <= 2e-6, largest error <= 5e-6 of the largest result
// (tests/cpp/test_conv_winograd.cpp). PYSEQNET_WINOGRAD=0 in the environment, read at every call, turns these
// kernels off.
// Infinite and NaN inputs: a tile is computed as a whole, so one such pixel makes every output of the tiles
// that read it NaN (up to 4 pixels away with padding 1), where the direct sum keeps it within 3 x 3 outputs.
#include <cstdlib>

#include "conv/conv.h"
#include "conv/winograd_panels.h"

namespace pyseqnet {
inline namespace PYSEQNET_ISA {
namespace winograd {

constexpr int64_t KIB = 1024, MIB = 1024 * KIB;
constexpr int64_t float_bytes = int64_t(sizeof(float));
// Transformed inputs and products of a block of tiles: they share the second-level cache (1 MiB on the
// machines at hand) with the filters that stream through it.
constexpr int64_t BLOCK_BYTES = 640 * KIB;
// A workspace is allocated for each call. Larger ones come fresh from the operating system every time
// (glibc's limit is 32 MiB), and touching new pages costs more than the work that such an order saves.
constexpr int64_t WORKSPACE_BYTES = 30 * MIB;
// Enough blocks for the threads of a small machine to share the work evenly.
constexpr int64_t ENOUGH_BLOCKS = 16;
// A work item of the transform phases: this many channels of a strip, or rows of VL filters.
constexpr int64_t TRANSFORM_CHANNELS = 64;
constexpr int64_t TRANSFORM_GRAIN = 4;  // such an item takes about 5 microseconds

// ---------------------------------------------------------------- forward and input gradient

struct Convolution {
  Image<const float*> in;
  Image<float*> out;
  Filters<const float*> filters;
  const float* bias;
  int64_t pad_h, pad_w;
  Tiling tiling;
  int64_t C() const { return in.C; }
  int64_t K() const { return out.C; }
};

template <ConvPass pass>
Convolution convolution(const ConvProblem& p, const ConvTensors& t) {
  const Strides x = p.x_strides(), y = p.y_strides(), w = p.w_strides();
  const float* filters = static_cast<const float*>(t.w);
  if (pass == ConvPass::forward)
    return {{static_cast<const float*>(t.x), x, p.C, p.H, p.W},
            {static_cast<float*>(t.y), y, p.K, p.P, p.Q},
            {filters, w.n, w.c, w.w, p.K, p.C, false},
            static_cast<const float*>(t.bias),
            p.pad_h,
            p.pad_w,
            Tiling(p.N, p.P, p.Q)};
  // gx[h] = sum over r of gy[h + pad - r] w[r]: with r = 2 - r', a convolution of padding 2 - pad.
  return {{static_cast<const float*>(t.gy), y, p.K, p.P, p.Q},
          {static_cast<float*>(t.gx), x, p.C, p.H, p.W},
          {filters, w.c, w.n, w.w, p.C, p.K, true},
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

// ---------------------------------------------------------------- weight gradient

struct WeightGradient {
  Image<const float*> x, gy;
  Filters<float*> gw;  // lanes k, rows c
  int64_t pad_h, pad_w;
  Tiling tiling;
  int64_t C() const { return x.C; }
  int64_t K() const { return gy.C; }

  WeightGradient(const ConvProblem& p, const ConvTensors& t)
      : x{static_cast<const float*>(t.x), p.x_strides(), p.C, p.H, p.W},
        gy{static_cast<const float*>(t.gy), p.y_strides(), p.K, p.P, p.Q},
        gw{static_cast<float*>(t.gw), p.w_strides().n, p.w_strides().c, p.w_strides().w, p.K, p.C, false},
        pad_h(p.pad_h),
        pad_w(p.pad_w),
        tiling(p.N, p.P, p.Q) {}

  void transform_x(int64_t strip, int64_t c, float* scratch, const Panels& V, int64_t row, int64_t at) const {
    transform_strip<InputTransform>(x, tiling, strip, pad_h, pad_w, c, scratch, V, row, at);
  }
  void transform_gy(int64_t strip, int64_t k, float* scratch, const Panels& Y, int64_t row,
                    int64_t at) const {
    transform_strip<OutputGradientTransform>(gy, tiling, strip, 0, 0, k, scratch, Y, row, at);
  }
};

// G'U'G of one row, VL lanes; read(pt) yields U' at a point.
template <class Read>
PYSEQNET_INLINE void transform_gradient(Read&& read, float* taps_of_row) {
  transform<FilterGradientTransform>([&](int r, int q) PYSEQNET_LAMBDA { return read(r * T + q); },
                                     [&](int r, int q, vf v)
                                         PYSEQNET_LAMBDA { store(taps_of_row + (r * 3 + q) * VL, v); });
}

// ---- by tiles ----

// A block of tiles reads and writes U' once: it should be as large as U', or fill the second-level cache and
// more.
constexpr int64_t GRADIENT_BLOCK_BYTES = 1792 * KIB;
constexpr int64_t CHUNK_TILES = 96;  // fewer are not worth a U' of their own
// An item is a chunk, or, where few chunks are allowed, the part of it that belongs to some of the filters;
// each part transforms x again, so it is not narrower than this.
constexpr int64_t PART_FILTERS = 128;

struct GradientByTiles {
  const WeightGradient& g;
  int64_t chunks, block_strips, part_filters, parts;
  int64_t pieces = ceil_div(g.C(), FILTER_ROWS);

  explicit GradientByTiles(const WeightGradient& g) : g(g) {
    const Tiling& t = g.tiling;
    const int64_t sum_bytes = Panels::size(g.K(), g.C()) * float_bytes;
    chunks = within(least(t.tiles() / CHUNK_TILES, WORKSPACE_BYTES / sum_bytes), 1,
                    least(ENOUGH_BLOCKS, t.strips));
    const int64_t wanted = 2 * chunks > ENOUGH_BLOCKS ? 1 : ceil_div(g.K(), PART_FILTERS);
    part_filters = ceil_div(ceil_div(g.K(), PANEL), wanted) * PANEL;
    parts = ceil_div(g.K(), part_filters);
    const int64_t strip_bytes = points * (g.C() + part_filters) * float_bytes * t.strip_tiles;
    block_strips =
        within(most(GRADIENT_BLOCK_BYTES, sum_bytes / parts) / strip_bytes, 1, ceil_div(t.strips, chunks));
  }
  Panels sum(Carver& shared) const {
    return Panels(shared.take<float>(Panels::size(g.K(), g.C())), g.K(), g.C());
  }
  struct Scratch {
    float* strip;
    Panels x, gy;
  };
  Scratch scratch(Carver& carver) const {
    const int64_t tiles = block_strips * g.tiling.strip_tiles;
    float* strip = carver.take<float>(most(g.tiling.gather_floats(), filter_floats));
    float* x = carver.take<float>(Panels::size(g.C(), tiles));
    float* gy = carver.take<float>(Panels::size(part_filters, tiles));
    return {strip, Panels(x, g.C(), tiles), Panels(gy, part_filters, tiles)};
  }
  WorkPlan plan() const {
    WorkPlan plan;
    plan.add_phase(chunks * parts);
    plan.add_phase(ceil_div(g.K(), VL) * pieces, TRANSFORM_GRAIN);
    Carver shared(nullptr), thread(nullptr);
    for (int64_t i = 0; i < chunks; ++i) sum(shared);
    scratch(thread);
    plan.shared_bytes = shared.used();
    plan.thread_bytes = thread.used();
    return plan;
  }
  void sum_chunk(int64_t chunk, int64_t part, const Panels& U, const Scratch& s) const {
    const int64_t tiles = g.tiling.strip_tiles;
    const int64_t first = chunk * g.tiling.strips / chunks, last = (chunk + 1) * g.tiling.strips / chunks;
    const int64_t k0 = part * part_filters, filters = least(part_filters, g.K() - k0);
    for (int64_t strip = first; strip < last; strip += block_strips) {
      const int64_t count = least(block_strips, last - strip);
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t c = 0; c < g.C(); c += VL) g.transform_x(strip + i, c, s.strip, s.x, i * tiles, c);
        for (int64_t k = 0; k < filters; k += VL)
          g.transform_gy(strip + i, k0 + k, s.strip, s.gy, i * tiles, k);
      }
      for (int64_t pt = 0; pt < points; ++pt)
        for (int64_t k = 0; k < filters; k += PANEL)
          for (int64_t c = 0; c < g.C(); c += PANEL)
            panel_product<Depth::tiles>(least(PANEL, g.C() - c), filters - k, s.x.at(pt, 0, c), 0,
                                        s.gy.at(pt, 0, k), count * tiles, U.at(pt, c, k0 + k), strip > first);
    }
  }
  void finish_piece(int64_t item, const Panels& U, int64_t chunk_floats, const Scratch& s) const {
    const int64_t k = item / pieces * VL, c0 = item % pieces * FILTER_ROWS,
                  count = least(FILTER_ROWS, g.C() - c0);
    for (int64_t r = 0; r < count; ++r) {
      const float* u = U.at(0, c0 + r, k);
      transform_gradient(
          [&](int pt) PYSEQNET_LAMBDA {
            vf v = load(u + pt * U.point);
            for (int64_t i = 1; i < chunks; ++i) v += load(u + pt * U.point + i * chunk_floats);
            return v;
          },
          s.strip + r * taps * VL);
    }
    store_filters(s.strip, g.gw, k, c0, count);
  }
  void run(const WorkSlice& slice) const {
    Carver shared(slice.shared), thread(slice.scratch);
    const Panels U = sum(shared);
    const int64_t chunk_floats = shared.used() / float_bytes;
    const Scratch s = scratch(thread);
    for (int64_t item = slice.begin; item < slice.end; ++item)
      if (slice.phase == 0)
        sum_chunk(item / parts, item % parts, Panels(U.p + item / parts * chunk_floats, g.K(), g.C()), s);
      else
        finish_piece(item, U, chunk_floats, s);
  }
};

// ---- by channels ----

struct GradientByChannels {
  const WeightGradient& g;
  int64_t x_pieces = ceil_div(g.C(), TRANSFORM_CHANNELS), gy_pieces = ceil_div(g.K(), TRANSFORM_CHANNELS);
  int64_t c_panels = ceil_div(g.C(), PANEL), k_panels = ceil_div(g.K(), PANEL);

  struct Operands {
    Panels x, gy;
  };
  Operands operands(Carver& shared) const {
    const int64_t tiles = g.tiling.tiles();
    float* x = shared.take<float>(Panels::size(g.C(), tiles));
    float* gy = shared.take<float>(Panels::size(g.K(), tiles));
    return {Panels(x, g.C(), tiles), Panels(gy, g.K(), tiles)};
  }
  struct Scratch {
    float* strip;
    Panels sum;
  };
  Scratch scratch(Carver& carver) const {
    float* strip = carver.take<float>(most(g.tiling.gather_floats(), filter_floats));
    float* sum = carver.take<float>(Panels::size(PANEL, PANEL));
    return {strip, Panels(sum, PANEL, PANEL)};
  }
  WorkPlan plan() const {
    WorkPlan plan;
    plan.add_phase(g.tiling.strips * (x_pieces + gy_pieces), TRANSFORM_GRAIN);
    plan.add_phase(c_panels * k_panels);
    Carver shared(nullptr), thread(nullptr);
    operands(shared);
    scratch(thread);
    plan.shared_bytes = shared.used();
    plan.thread_bytes = thread.used();
    return plan;
  }
  void transform_piece(int64_t item, const Operands& o, const Scratch& s) const {
    const int64_t strip = item / (x_pieces + gy_pieces), piece = item % (x_pieces + gy_pieces);
    const int64_t row = strip * g.tiling.strip_tiles;
    if (piece < x_pieces) {
      const int64_t first = piece * TRANSFORM_CHANNELS, last = least(first + TRANSFORM_CHANNELS, g.C());
      for (int64_t c = first; c < last; c += VL) g.transform_x(strip, c, s.strip, o.x, row, c);
    } else {
      const int64_t first = (piece - x_pieces) * TRANSFORM_CHANNELS,
                    last = least(first + TRANSFORM_CHANNELS, g.K());
      for (int64_t k = first; k < last; k += VL) g.transform_gy(strip, k, s.strip, o.gy, row, k);
    }
  }
  void sum_panel(int64_t item, const Operands& o, const Scratch& s) const {
    const int64_t c0 = item / k_panels * PANEL, k0 = item % k_panels * PANEL;
    const int64_t rows = least(PANEL, g.C() - c0), lanes = least(PANEL, g.K() - k0);
    for (int64_t pt = 0; pt < points; ++pt)
      panel_product<Depth::tiles>(rows, lanes, o.x.at(pt, 0, c0), 0, o.gy.at(pt, 0, k0), g.tiling.tiles(),
                                  s.sum.at(pt, 0, 0), false);
    for (int64_t k = 0; k < lanes; k += VL)
      for (int64_t c = 0; c < rows; c += FILTER_ROWS) {
        const int64_t count = least(FILTER_ROWS, rows - c);
        for (int64_t r = 0; r < count; ++r) {
          const float* u = s.sum.at(0, c + r, k);
          transform_gradient([&](int pt) PYSEQNET_LAMBDA { return load(u + pt * s.sum.point); },
                             s.strip + r * taps * VL);
        }
        store_filters(s.strip, g.gw, k0 + k, c0 + c, count);
      }
  }
  void run(const WorkSlice& slice) const {
    Carver shared(slice.shared), thread(slice.scratch);
    const Operands o = operands(shared);
    const Scratch s = scratch(thread);
    for (int64_t item = slice.begin; item < slice.end; ++item)
      slice.phase == 0 ? transform_piece(item, o, s) : sum_panel(item, o, s);
  }
};

PYSEQNET_INLINE bool by_channels(const WeightGradient& g) {
  const int64_t operands = g.tiling.tiles() * (g.C() + g.K()), sums = g.C() * g.K();
  return operands * points * float_bytes <= WORKSPACE_BYTES && 4 * sums >= operands;
}

WorkPlan plan_weight_gradient(const ConvProblem& p) {
  const WeightGradient g(p, {});
  return by_channels(g) ? GradientByChannels{g}.plan() : GradientByTiles(g).plan();
}
void run_weight_gradient(const ConvProblem& p, const ConvTensors& t, const WorkSlice& slice) {
  const WeightGradient g(p, t);
  by_channels(g) ? GradientByChannels{g}.run(slice) : GradientByTiles(g).run(slice);
}

// ---------------------------------------------------------------- refusals

// Costs in vector operations, of the size of a multiply-add of VL channels (measured with 4 to 256 channels
// on images of 2 to 56 pixels: where the two sides are equal, so are the times of this and the general
// kernel).
constexpr double TRANSFORM_COST = 250;  // one tile, VL channels: in or out, with its gather or scatter
constexpr double FILTER_COST = 170;     // one filter of VL output channels

// Whether the transforms cost less than they save; the direct sum is taken at full speed.
template <ConvPass pass>
bool pays(const ConvProblem& p) {
  const bool turned = pass == ConvPass::input_gradient;
  const int64_t C = turned ? p.K : p.C, K = turned ? p.C : p.K, P = turned ? p.H : p.P,
                Q = turned ? p.W : p.Q;
  const double pixels = double(p.N) * double(P) * double(Q), tiles = double(Tiling(p.N, P, Q).tiles());
  const double c = double(ceil_div(C, VL)), k = double(ceil_div(K, VL));
  const double direct = double(taps) * pixels * double(C) * double(K) / VL;
  const double products = double(points) * tiles * double(C) * k;
  return products + TRANSFORM_COST * tiles * (c + k) + FILTER_COST * double(C) * k <= direct;
}

template <ConvPass pass>
Refusal refuses(const ConvProblem& p) {
  const char* wanted = std::getenv("PYSEQNET_WINOGRAD");
  if (wanted && wanted[0] == '0' && !wanted[1]) return "PYSEQNET_WINOGRAD=0 turns it off";
  if (this_isa == Isa::portable) return "needs AVX2 or AVX-512";
  if (p.dtype != DType::f32) return "float32 only";
  if (p.R != 3 || p.S != 3) return "3x3 filters only";
  if (p.stride_h != 1 || p.stride_w != 1) return "stride 1 only";
  if (p.dilation_h != 1 || p.dilation_w != 1) return "dilation 1 only";
  if (p.groups != 1) return "groups = 1 only";
  if (p.N == 0 || p.C == 0 || p.K == 0 || p.H == 0 || p.W == 0 || p.P == 0 || p.Q == 0)
    return "an extent is zero";
  if (!pays<pass>(p)) return "too few channels or pixels: the transforms would cost more than they save";
  return accepted;
}

}  // namespace winograd

extern const ConvCpuKernel conv_winograd_forward, conv_winograd_input_gradient, conv_winograd_weight_gradient;
const ConvCpuKernel conv_winograd_forward = {
    "winograd_" PYSEQNET_ISA_NAME, this_isa, winograd::refuses<ConvPass::forward>,
    winograd::plan_convolution<ConvPass::forward>, winograd::run_convolution<ConvPass::forward>};
const ConvCpuKernel conv_winograd_input_gradient = {"winograd_" PYSEQNET_ISA_NAME, this_isa,
                                                    winograd::refuses<ConvPass::input_gradient>,
                                                    winograd::plan_convolution<ConvPass::input_gradient>,
                                                    winograd::run_convolution<ConvPass::input_gradient>};
const ConvCpuKernel conv_winograd_weight_gradient = {
    "winograd_" PYSEQNET_ISA_NAME, this_isa, winograd::refuses<ConvPass::weight_gradient>,
    winograd::plan_weight_gradient, winograd::run_weight_gradient};

}  // namespace PYSEQNET_ISA
}  // namespace pyseqnet
