// Correlation for channels-last tensors (NHWC): rows are pixels, lanes are filters.
//
//   out[pixel][filter] = image[pixel + tap][channel] * panel[tap, channel][filter]
//
// The image is read where it lies (or in its staged copy) through one pointer a pixel; no im2col is ever
// written. Filters are packed once a call into panels of up to 4 vectors of filters. Neighbouring taps of a
// row are neighbours in memory, so undilated filters need one run of S * channels a filter row.
//
// A work item is a block of pixels x all filter panels of a group, or one of them where items are few.
// Bound: FMA; panels stream from the second-level cache.
#pragma once
#include "conv/conv_gemm_planar.h"

namespace pyseqnet {
inline namespace PYSEQNET_ISA {
namespace conv {

constexpr int64_t MIN_BLOCK_PIXELS = 24, MAX_BLOCK_PIXELS = 512;

struct ChannelsLastSizes {
  int64_t vectors, panels;  // of filters
  int64_t block_pixels, blocks;
  int64_t panel_items;                // items that share out the panels of a block: 1 or `panels`
  int64_t depth_block, depth_blocks;  // in [tap][channel]
  int64_t items;
  BlockLimits limits;
};

PYSEQNET_INLINE ChannelsLastSizes channels_last_sizes(const Correlation& k) {
  ChannelsLastSizes z;
  const int64_t depth = k.depth * k.taps();
  z.vectors = ceil_div(k.rows, VL);
  z.panels = ceil_div(z.vectors, TILE_VECTORS);
  z.depth_blocks = larger(1, ceil_div(depth, PANEL_DEPTH));
  z.depth_block = ceil_div(depth, z.depth_blocks);
  const int64_t fmas = larger(1, z.vectors * depth);  // for one pixel
  z.block_pixels =
      smaller(larger(round_up(ITEM_FMAS / fmas, MIN_BLOCK_PIXELS), MIN_BLOCK_PIXELS), MAX_BLOCK_PIXELS);
  for (;; z.block_pixels -= MIN_BLOCK_PIXELS) {
    z.limits = block_limits(k, z.block_pixels);
    if (z.block_pixels <= 2 * MIN_BLOCK_PIXELS || staged_pixels_size(k, z.limits) <= STAGE_FLOATS) break;
  }
  z.blocks = ceil_div(k.pixels(), z.block_pixels);
  z.panel_items = z.blocks * k.groups < ENOUGH_ITEMS && fmas * z.block_pixels > ITEM_FMAS ? z.panels : 1;
  z.items = z.panels > 0 ? z.blocks * k.groups * z.panel_items : 0;
  return z;
}
PYSEQNET_INLINE int64_t panel_begin(const ChannelsLastSizes& z, int64_t panel) {
  return z.vectors * panel / z.panels;
}

struct ChannelsLastScratch {
  Segment* segments;
  Piece* pieces;
  Run* runs;
  const float** a;
  int64_t* out_offsets;
  float *stage, *sums, *tile, *bias;
  int64_t bytes;
};
PYSEQNET_INLINE ChannelsLastScratch channels_last_scratch(const Correlation& k, const ChannelsLastSizes& z,
                                                          std::byte* base) {
  Carver carver(base);
  ChannelsLastScratch s;
  s.segments = carver.take<Segment>(z.limits.segments);
  s.pieces = carver.take<Piece>(z.limits.pieces);
  s.runs = carver.take<Run>(k.taps());
  s.a = carver.take<const float*>(z.block_pixels);
  s.out_offsets = carver.take<int64_t>(z.block_pixels);
  s.stage = carver.take<float>(staged_pixels_size(k, z.limits));
  s.sums = carver.take<float>(z.depth_blocks > 1 ? z.block_pixels * TILE_LANES : 0);
  s.tile = carver.take<float>(TILE_ROWS * TILE_LANES);
  s.bias = carver.take<float>(z.vectors * VL);
  s.bytes = carver.used();
  return s;
}

template <class T>
struct ChannelsLast {
  const Correlation& k;
  const ChannelsLastSizes& z;
  const T* in;
  const float* filters;  // [group][panel][tap][channel][lane]
  const T* bias;
  T* out;
  ChannelsLastScratch s;
  PixelBlock block{};
  int64_t run_length = 0;  // all runs but those cut by a depth block are equally long

  // Pointers to the first tap of every pixel, and the offsets of the taps.
  void locate_pixels(int64_t group) {
    const T* from = in + group * k.group_in;
    int64_t row = k.in.h / PAIR, column = k.in.w / PAIR;
    const bool words = PAIR * sizeof(T) == sizeof(float) && k.channels % PAIR == 0 &&
                       reinterpret_cast<uintptr_t>(in) % sizeof(float) == 0;
    const bool in_place = words && k.h.inside() && k.w.inside();
    Pixels pixels{};
    if (!in_place) {
      pixels = staged_pixels(k, block);
      row = pixels.row;
      column = pixels.column;
      stage_pixels(k, block, pixels, from, s.stage);
    }
    for (int64_t g = 0; g < block.segment_count; ++g) {
      const Segment& sg = block.segments[g];
      const Piece& piece = block.pieces[sg.piece];
      const float* a = in_place ? (const float*)from + sg.n * (k.in.n / PAIR) +
                                      (sg.i * k.h.in_step + k.h.tap_offset) * row +
                                      (sg.j * k.w.in_step + k.w.tap_offset) * column
                                : s.stage + (piece.slot + (sg.i - piece.i0) * pixels.kept_step) * row +
                                      (sg.j - piece.j0) * k.w.in_step * column;
      for (int64_t j = 0; j < sg.length; ++j) s.a[sg.first + j] = a + j * k.w.in_step * column;
    }
    const bool merged = k.w.tap_step == 1 && column == k.depth;
    run_length = merged ? k.w.taps * k.depth : k.depth;
    int64_t t = 0;
    for (int64_t r = 0; r < k.h.taps; ++r)
      for (int64_t c = 0; c < (merged ? 1 : k.w.taps); ++c)
        s.runs[t++].offset = r * k.h.tap_step * row + c * k.w.tap_step * column;
  }

  void run_item(int64_t item) {
    const int64_t panel_item = item % z.panel_items, group = item / z.panel_items % k.groups;
    const int64_t index = item / z.panel_items / k.groups;
    block = {index * z.block_pixels, smaller((index + 1) * z.block_pixels, k.pixels()), s.segments, s.pieces};
    split_block(k, block);
    for (int64_t g = 0; g < block.segment_count; ++g) {
      const Segment& sg = block.segments[g];
      const int64_t offset = sg.n * k.out.n + (k.h.out_first + sg.i * k.h.out_step) * k.out.h +
                             (k.w.out_first + sg.j * k.w.out_step) * k.out.w;
      for (int64_t j = 0; j < sg.length; ++j)
        s.out_offsets[sg.first + j] = offset + j * k.w.out_step * k.out.w;
    }
    if (bias)
      for (int64_t m = 0; m < z.vectors * VL; ++m)
        s.bias[m] = m < k.rows ? to_float(bias[group * k.rows + m]) : 0.0f;
    if (k.depth * k.taps() > 0) {
      locate_pixels(group);
    } else {
      for (int64_t i = 0; i < block.pixels(); ++i) s.a[i] = nullptr;
    }
    const int64_t first = z.panel_items == 1 ? 0 : panel_item,
                  last = z.panel_items == 1 ? z.panels : first + 1;
    for (int64_t panel = first; panel < last; ++panel)
      for (int64_t d = 0; d < z.depth_blocks; ++d) run_panel(group, panel, d);
  }

  void run_panel(int64_t group, int64_t panel, int64_t d) {
    const int64_t v0 = panel_begin(z, panel), vectors = panel_begin(z, panel + 1) - v0, lanes = vectors * VL;
    const int64_t depth = k.depth * k.taps();
    const int64_t k0 = d * z.depth_block, k1 = smaller(depth, k0 + z.depth_block);
    const int64_t valid = smaller(lanes, k.rows - v0 * VL);
    const float* b = filters + (group * z.vectors + v0) * VL * depth + k0 * lanes;
    const bool last_depth = k1 == depth, direct = tile_stores<T>;
    // The runs that [k0, k1) of the depth touches; the first and the last may be cut.
    Run* runs = s.runs;
    int64_t run_count = 0, cut = 0;
    if (k1 > k0) {
      const int64_t r0 = k0 / run_length, r1 = ceil_div(k1, run_length);
      runs += r0;
      run_count = r1 - r0;
      cut = k0 - r0 * run_length;
      for (int64_t r = 0; r < run_count; ++r) runs[r].length = run_length;
      runs[run_count - 1].length -= r1 * run_length - k1;
      runs[0].offset += cut;
      runs[0].length -= cut;
    }
    const float* start = d ? s.sums : bias ? s.bias + v0 * VL : nullptr;
    const int64_t start_stride = d ? lanes : 0;
    for_even_tiles(block.pixels(), tile_rows(int(vectors)), [&](int64_t e0, int64_t rows) PYSEQNET_LAMBDA {
      float* c[TILE_ROWS];
      for (int64_t i = 0; i < rows; ++i)
        c[i] = !last_depth ? s.sums + (e0 + i) * lanes
               : direct    ? (float*)(out + s.out_offsets[e0 + i] + (group * k.rows + v0 * VL) * k.out.c)
                           : s.tile + i * lanes;
      if (last_depth && !direct)
        for (int64_t i = 0; i < rows; ++i)
          prefetch_results(out + s.out_offsets[e0 + i] + (group * k.rows + v0 * VL) * k.out.c, valid);
      run_tile(int(rows), int(vectors),
               {s.a + e0, runs, run_count, b, lanes, start ? start + e0 * start_stride : nullptr,
                start_stride, nullptr, c, last_depth && direct ? int(valid - (vectors - 1) * VL) : VL,
                last_depth && direct && paired<T>});
      if (last_depth && !direct)
        for (int64_t i = 0; i < rows; ++i) {
          T* to = out + s.out_offsets[e0 + i] + (group * k.rows + v0 * VL) * k.out.c;
          for (int64_t l = 0; l < valid; l += VL)
            store_result(to + l, load(s.tile + i * lanes + l), valid - l);
        }
    });
    if (cut) runs[0].offset -= cut;
  }
};

// The two halves of every pair of filter channels are neighbours, and every pair is aligned.
template <class T>
bool words_lie_together(const Correlation& k, const T* w) {
  return k.filter_partner == 1 && k.channels % 2 == 0 && k.row_stride % 2 == 0 &&
         reinterpret_cast<uintptr_t>(w) % sizeof(float) == 0;
}

// One item is one tap of one panel: [channel][lane], zero in the lanes beyond the filters.
template <class T>
void pack_channels_last_filters(const Correlation& k, const ChannelsLastSizes& z, const T* w, float* to,
                                int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t taps = k.taps(), tap = item % taps, panel = item / taps % z.panels;
    const int64_t group = item / taps / z.panels, r = tap / k.w.taps, c = tap % k.w.taps;
    const int64_t v0 = panel_begin(z, panel), lanes = (panel_begin(z, panel + 1) - v0) * VL;
    const int64_t valid = smaller(lanes, k.rows - v0 * VL);
    const T* src = w + k.filter_offset(group, v0 * VL, 0, r, c);
    float* dst = to + (group * z.vectors + v0) * VL * taps * k.depth + tap * k.depth * lanes;
    if (k.depth_stride == 1 || (words_lie_together(k, w) && paired<T>)) {
      // Channels are neighbours in memory: transposed word by word.
      const float* rows = (const float*)src;
      if constexpr (paired<T>)
        transpose_words(rows, k.row_stride / 2, valid, k.depth, dst, lanes);
      else
        transpose_words(src, k.row_stride, valid, k.depth, dst, lanes);
    } else {
      for (int64_t d = 0; d < k.depth; ++d)
        copy_words(dst + d * lanes, src + d * k.depth_stride, k.row_stride, valid,
                   k.channel_partner(k.filter_partner, d));
    }
    for (int64_t d = 0; valid < lanes && d < k.depth; ++d) fill_zero(dst + d * lanes + valid, lanes - valid);
  }
}

}  // namespace conv
}  // namespace PYSEQNET_ISA
}  // namespace pyseqnet
