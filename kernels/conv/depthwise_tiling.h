// The geometry of the depthwise kernels: how results are cut into tiles, which inputs a tile needs, and which
// taps meet which of its columns. Nothing here touches tensor elements.
#pragma once
#include "conv/depthwise_channels.h"
#include "conv/depthwise_tile.h"

namespace pyseqnet {
inline namespace PYSEQNET_ISA {
namespace {

// Vectors of a tile of inputs: 256 KiB with AVX-512, a share of the second-level cache.
constexpr int64_t tile_vectors = 4096;
// Outputs that are collected before they are transposed and stored: still in the first-level cache.
constexpr int64_t collected_outputs = 256;

// Channels-last images are worked on a few blocks of channels at a time, tile by tile, so that a pixel's
// memory is read in one stretch and the tile's share of the tensor is still cached for its last block.
int64_t channel_blocks(const ConvProblem& p) { return ceil_div(p.C, VL); }
int64_t blocks_at_once(const ConvProblem& p) {
  constexpr int64_t channels_at_once = 128;  // 512 bytes of a pixel in float32
  return p.layout == Layout::nchw ? 1 : smaller(channel_blocks(p), channels_at_once / VL);
}
int64_t block_groups(const ConvProblem& p) { return ceil_div(channel_blocks(p), blocks_at_once(p)); }

// One axis of a tile: results (outputs, or pixels of gx) are cut into bands of `band`.
struct Bands {
  int64_t band, count;
  Bands(int64_t extent, int64_t band_)
      : band(larger(1, smaller(band_, extent))), count(ceil_div(extent, band)) {}
};

// How a pass cuts its results into tiles, and which taps go with which input columns.
struct Tiling {
  // Both gradients of a result band read inputs [first, first + length) of the other tensor. Strided passes
  // (forward, weight gradient) keep stride_w phases of `length` columns; input_gradient one row of gy.
  bool transposed;           // input gradient
  int64_t budget;            // vectors of a tile of inputs
  int64_t H, W;              // the results
  int64_t reach_h, reach_w;  // (R - 1) dilation_h, (S - 1) dilation_w
  int64_t shift;             // the farthest tap, in columns of a phase (strided) or of gy (input gradient)
  Bands columns, rows;
  int64_t length;  // columns of a phase of the tile
  int64_t phases;  // of a tile row
  int64_t pitch;   // floats of a tile row
  int64_t tile_rows;

  Tiling(const ConvProblem& p, bool transposed_)
      : transposed(transposed_),
        budget(smaller(tile_vectors, 2 * tile_vectors / blocks_at_once(p))),
        H(transposed ? p.H : p.P),
        W(transposed ? p.W : p.Q),
        reach_h((p.R - 1) * p.dilation_h),
        reach_w((p.S - 1) * p.dilation_w),
        shift(reach_w / p.stride_w),
        columns(W, band_columns(p)),
        rows(1, 1) {
    length = row_length(p, columns.band);
    phases = transposed ? 1 : p.stride_w;
    pitch = phases * length * VL;
    const int64_t fit = larger(1, budget / (phases * length));  // tile rows within the budget
    rows = Bands(H, transposed ? (fit - 1) * p.stride_h - reach_h : (fit - 1 - reach_h) / p.stride_h + 1);
    tile_rows =
        transposed ? (rows.band - 1 + reach_h) / p.stride_h + 2 : (rows.band - 1) * p.stride_h + reach_h + 1;
  }
  int64_t row_length(const ConvProblem& p, int64_t band) const {
    const int64_t positions = transposed ? (band - 1) / p.stride_w + 2 : band;
    return round_up(positions, outputs_at_once) + shift + 1;
  }
  // All columns if a row of results then fits the budget, else so many that halos stay a small part.
  int64_t band_columns(const ConvProblem& p) const {
    const int64_t high = transposed ? reach_h / p.stride_h + 1 : reach_h + 1;
    const int64_t across = larger(1, budget / (high * (transposed ? 1 : p.stride_w)));
    if (row_length(p, W) <= across) return larger(1, W);
    const int64_t least = larger(8 * outputs_at_once, shift);
    return larger(least, across - shift - outputs_at_once - 1) / outputs_at_once * outputs_at_once *
           (transposed ? p.stride_w : 1);
  }
  int64_t tiles() const { return rows.count * columns.count; }
  Rectangle results(int64_t tile) const {
    const int64_t h = tile / columns.count * rows.band, w = tile % columns.count * columns.band;
    return {h, smaller(H, h + rows.band), w, smaller(W, w + columns.band)};
  }
};

// The taps of one phase of the results, as runs.
struct Phase {
  const Run* runs;
  int64_t count;
};

// Everything a range needs in scratch.
struct Scratch {
  float *tile, *gradient_tile, *results, *filter, *sums;
  int64_t *column, *gradient_column;
  Run* runs;
  int32_t* order;         // [S] reordered position -> s
  int64_t* begin;         // [stride_w + 1] runs of each phase
  int64_t* tap_column;    // [S] by position: input column at position 0 of the results (RowGeometry)
  Run* tensor_runs;       // the runs with offsets in a channels-last tensor
  RowPair<float>* pairs;  // [R]
  int64_t bytes;

  Scratch(const ConvProblem& p, const Tiling& t, ConvPass pass, std::byte* memory) {
    const bool weights = pass == ConvPass::weight_gradient;
    Carver carve(memory);
    tile = carve.take<float>(t.tile_rows * t.pitch);
    filter = carve.take<float>(weights ? 0 : blocks_at_once(p) * p.R * p.S * VL);
    results = carve.take<float>(weights ? 0 : (collected_outputs + 2 * t.columns.band + VL) * VL);
    gradient_tile = carve.take<float>(weights ? t.rows.band * t.columns.band * VL : 0);
    sums = carve.take<float>(weights ? blocks_at_once(p) * p.R * p.S * VL : 0);
    column = carve.take<int64_t>(t.phases * t.length);
    gradient_column = carve.take<int64_t>(weights ? t.columns.band : 0);
    runs = carve.take<Run>(p.S);
    order = carve.take<int32_t>(p.S);
    begin = carve.take<int64_t>(p.stride_w + 1);
    tap_column = carve.take<int64_t>(p.S);
    tensor_runs = carve.take<Run>(p.S);
    pairs = carve.take<RowPair<float>>(p.R);
    bytes = carve.used();
  }
  Phase phase(int64_t f) const { return {runs + begin[f], begin[f + 1] - begin[f]}; }
};

// Groups the taps by phase and cuts them into runs of neighbours. Strided: tap s reads phase s dilation %
// stride, s dilation / stride columns after the output. Input gradient: phase f of gx (f = (w + pad) %
// stride) meets the taps with s dilation = f (mod stride), farthest first, at column l - (s dilation - f) /
// stride.
void plan_runs(const ConvProblem& p, const Tiling& t, Scratch& scratch) {
  int32_t tap = 0;
  int64_t run = 0;
  for (int64_t f = 0; f < p.stride_w; f++) {
    scratch.begin[f] = run;
    int64_t previous = 0;
    bool open = false;
    for (int64_t k = 0; k < p.S; k++) {
      const int64_t s = t.transposed ? p.S - 1 - k : k, distance = s * p.dilation_w;
      if (distance % p.stride_w != f) continue;
      const int64_t at = t.transposed ? t.shift - (distance - f) / p.stride_w : distance / p.stride_w;
      if (open && at == previous + 1 && scratch.runs[run - 1].length < longest_run) {
        scratch.runs[run - 1].length++;
      } else {
        scratch.runs[run++] = {((t.transposed ? 0 : f * t.length) + at) * VL, tap, 1};
      }
      open = true;
      previous = at;
      scratch.order[tap++] = int32_t(s);
    }
  }
  scratch.begin[p.stride_w] = run;
  for (int64_t k = 0; k < p.S; k++) {
    const int64_t distance = scratch.order[k] * p.dilation_w;
    scratch.tap_column[k] = t.transposed ? -(distance / p.stride_w) : distance - p.pad_w;
  }
  for (int64_t k = 0; k < run; k++) {
    scratch.tensor_runs[k] = scratch.runs[k];
    scratch.tensor_runs[k].offset = scratch.tap_column[scratch.runs[k].first] * p.C;
  }
}

// Where each column of the image (from part.w0 on) goes in a tile row, for the tile whose first column is
// `first` (in padded columns of x when strided).
void place_columns(const ConvProblem& p, const Tiling& t, const Rectangle& part, int64_t first,
                   int64_t* column) {
  for (int64_t w = part.w0; w < part.w1; w++) {
    const int64_t u = w - first;
    column[w - part.w0] = (t.transposed ? u : u % p.stride_w * t.length + u / p.stride_w) * VL;
  }
}

// The inputs that a rectangle of results reads.
struct Inputs {
  Rectangle part;
  int64_t first;  // image column (x) or column of gy at tile column 0; may lie in the padding
};
Inputs inputs_of(const ConvProblem& p, const Tiling& t, const Rectangle& out) {
  Inputs in;
  if (t.transposed) {
    in.first = floor_div(out.w0 + p.pad_w, p.stride_w) - t.shift;
    in.part.w0 = larger(0, in.first);
    in.part.w1 = smaller(p.Q, in.first + t.length);
    in.part.h0 = larger(0, ceil_div(out.h0 + p.pad_h - t.reach_h, p.stride_h));
    in.part.h1 = smaller(p.P, floor_div(out.h1 - 1 + p.pad_h, p.stride_h) + 1);
  } else {
    in.first = out.w0 * p.stride_w - p.pad_w;
    in.part.w0 = larger(0, in.first);
    in.part.w1 = smaller(p.W, in.first + t.length * p.stride_w);
    in.part.h0 = larger(0, out.h0 * p.stride_h - p.pad_h);
    in.part.h1 = smaller(p.H, (out.h1 - 1) * p.stride_h - p.pad_h + t.reach_h + 1);
  }
  if (in.part.h1 < in.part.h0) in.part.h1 = in.part.h0;
  if (in.part.w1 < in.part.w0) in.part.w1 = in.part.w0;
  return in;
}

// The row of inputs that row h of the results meets through filter row r; negative if none.
PYSEQNET_INLINE int64_t input_row(const ConvProblem& p, const Tiling& t, int64_t h, int64_t r) {
  if (!t.transposed) return h * p.stride_h - p.pad_h + r * p.dilation_h;
  const int64_t distance = h + p.pad_h - r * p.dilation_h;
  if (p.stride_h == 1) return distance;
  return distance < 0 || distance % p.stride_h ? -1 : distance / p.stride_h;
}

// The filter rows that row h of the results meets, with their rows of the tile.
int64_t pair_rows(const ConvProblem& p, const Tiling& t, const Inputs& in, int64_t h, const float* filter,
                  const Scratch& scratch) {
  int64_t n = 0;
  for (int64_t r = 0; r < p.R; r++) {
    const int64_t row = input_row(p, t, h, r);
    if (row < in.part.h0 || row >= in.part.h1) continue;
    scratch.pairs[n++] = {scratch.tile + (row - in.part.h0) * t.pitch, filter + r * p.S * VL};
  }
  return n;
}

// Channels-last: how the results of one phase (transposed) or all results meet the input columns.
RowGeometry row_geometry(const ConvProblem& p, const Tiling& t, const Scratch& scratch, int64_t f,
                         const Rectangle& out) {
  RowGeometry g;
  const int64_t first_run = t.transposed ? scratch.begin[f] : 0;
  const int64_t end_run = scratch.begin[t.transposed ? f + 1 : p.stride_w];
  g.tap_column = scratch.tap_column;
  g.runs = scratch.tensor_runs + first_run;
  g.run_count = end_run - first_run;
  g.k0 = g.run_count ? g.runs[0].first : 0;
  g.k1 = g.run_count ? g.runs[g.run_count - 1].first + g.runs[g.run_count - 1].length : 0;
  if (t.transposed) {
    g.in_stride = 1, g.in_columns = p.Q, g.out_stride = p.stride_w, g.out_first = f - p.pad_w;
    g.l0 = ceil_div(out.w0 + p.pad_w - f, p.stride_w);
    g.l1 = larger(g.l0, ceil_div(out.w1 + p.pad_w - f, p.stride_w));
  } else {
    g.in_stride = p.stride_w, g.in_columns = p.W, g.out_stride = 1, g.out_first = 0;
    g.l0 = out.w0, g.l1 = out.w1;
  }
  int64_t lowest = 0, highest = 0;
  for (int64_t k = g.k0; k < g.k1; k++) {
    lowest = k == g.k0 ? g.tap_column[k] : smaller(lowest, g.tap_column[k]);
    highest = k == g.k0 ? g.tap_column[k] : larger(highest, g.tap_column[k]);
  }
  const InnerRange inner = g.run_count ? inner_range(lowest, highest, g.in_stride, g.in_columns, g.l0, g.l1)
                                       : InnerRange{g.l0, g.l1};
  g.inner0 = inner.begin, g.inner1 = inner.end;
  return g;
}

}  // namespace
}  // namespace PYSEQNET_ISA
}  // namespace pyseqnet
