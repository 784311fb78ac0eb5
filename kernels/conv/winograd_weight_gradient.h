// Winograd weight gradient: gw = G' (sum over tiles of (B' x B) . (A gy A')) G. U' is the sum; two orders of
// summing it, and which one a problem gets.
#pragma once
#include "conv/conv.h"
#include "conv/winograd_panels.h"

namespace pyseqnet {
inline namespace PYSEQNET_ISA {
namespace winograd {

struct WeightGradient {
  Image<const void*> x, gy;
  Filters<void*> gw;  // lanes k, rows c
  int64_t pad_h, pad_w;
  Tiling tiling;
  int64_t C() const { return x.C; }
  int64_t K() const { return gy.C; }

  WeightGradient(const ConvProblem& p, const ConvTensors& t)
      : x{t.x, p.dtype, p.x_strides(), p.C, p.H, p.W},
        gy{t.gy, p.dtype, p.y_strides(), p.K, p.P, p.Q},
        gw{t.gw, p.dtype, p.w_strides().n, p.w_strides().c, p.w_strides().w, p.K, p.C, false},
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

inline WorkPlan plan_weight_gradient(const ConvProblem& p) {
  const WeightGradient g(p, {});
  return by_channels(g) ? GradientByChannels{g}.plan() : GradientByTiles(g).plan();
}
inline void run_weight_gradient(const ConvProblem& p, const ConvTensors& t, const WorkSlice& slice) {
  const WeightGradient g(p, t);
  by_channels(g) ? GradientByChannels{g}.run(slice) : GradientByTiles(g).run(slice);
}

}  // namespace winograd
}  // namespace PYSEQNET_ISA
}  // namespace pyseqnet
