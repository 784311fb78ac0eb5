// Correlation for planar tensors (NCHW): lanes are pixels, so results are stored where they belong, without a
// transpose, and a few output channels waste nothing.
//
//   out[row][pixel] = filters[row][channel, tap] * panel[channel, tap][pixel]
//
// The filters are read by broadcast, row-major. The panel, 4 vectors of pixels wide, gathers what the taps of
// those pixels see (im2col) and is swept by all filters while it lies in the second-level cache. A panel
// vector is one load of the staged planes, or one for each image row that its pixels lie in.
//
// A work item is a block of pixels x a block of filters of one group. Long sums are cut into depth blocks of
// channels, whose partial sums wait in private scratch.
//
// Bound: FMA; packing costs about 4 cycles for a panel vector, which then serves one multiply-add a filter.
#pragma once
#include "common/cpu_work.h"
#include "conv/conv_stage.h"
#include "conv/conv_tile.h"

namespace pyseqnet {
inline namespace PYSEQNET_ISA {
namespace conv {

// A work item should last some 40 microseconds, counted in vector multiply-adds, about three a nanosecond for
// a machine with two 512-bit pipes and one for a modest one.
constexpr int64_t ITEM_FMAS = 100 * 1000;
constexpr int64_t GRAIN_FMAS = 50 * 1000;
constexpr int64_t ENOUGH_ITEMS = 16;         // for the threads of a small machine to share them evenly
constexpr int64_t PANEL_DEPTH = 768;         // a panel of 64 lanes takes 192 KiB of the second-level cache
constexpr int64_t STAGE_FLOATS = 64 * 1024;  // 256 KiB, beside the panel
constexpr int64_t SUMS_FLOATS = 64 * 1024;   // likewise
constexpr int64_t MIN_ROW_BLOCK = 64;        // filters that share the packing of a panel
constexpr int64_t MAX_BLOCK_VECTORS = 64;

PYSEQNET_INLINE int64_t grain_of(double fmas, int64_t items) {
  return items > 0 && fmas < double(GRAIN_FMAS) * double(items)
             ? int64_t(double(GRAIN_FMAS) * double(items) / (fmas + 1.0)) + 1
             : 1;
}

struct PlanarSizes {
  int64_t block_vectors, blocks;      // of pixels
  int64_t row_block, row_blocks;      // of filters
  int64_t depth_block, depth_blocks;  // of channels
  int64_t items;
  BlockLimits limits;
  int64_t plane;  // floats of a staged plane, at most
};

PYSEQNET_INLINE PlanarSizes planar_sizes(const Correlation& k) {
  PlanarSizes z;
  const int64_t vectors = ceil_div(k.pixels(), VL), depth = k.depth * k.tap_words();
  z.depth_block = larger(1, PANEL_DEPTH / larger(1, k.tap_words()));
  z.depth_blocks = larger(1, ceil_div(k.depth, z.depth_block));
  z.depth_block = ceil_div(k.depth, z.depth_blocks);

  const int64_t fmas = larger(1, k.rows * depth);  // for one vector of pixels
  z.block_vectors =
      smaller(larger(round_up(ITEM_FMAS / fmas, TILE_VECTORS), TILE_VECTORS), MAX_BLOCK_VECTORS);
  for (;; z.block_vectors -= TILE_VECTORS) {
    const int64_t pixels = z.block_vectors * VL;
    z.limits = block_limits(k, pixels);
    z.plane = staged_plane(k, z.limits);
    if (z.block_vectors == TILE_VECTORS) break;
    if (z.plane * z.depth_block > STAGE_FLOATS) continue;
    if (z.depth_blocks > 1 && pixels * k.rows > SUMS_FLOATS) continue;
    break;
  }
  z.blocks = ceil_div(vectors, z.block_vectors);
  z.row_blocks = 1;
  const int64_t shared_out = z.blocks * k.groups;
  if (shared_out > 0 && shared_out < ENOUGH_ITEMS && fmas * smaller(vectors, z.block_vectors) > ITEM_FMAS)
    z.row_blocks = larger(1, smaller(ceil_div(ENOUGH_ITEMS, shared_out), k.rows / MIN_ROW_BLOCK));
  z.row_block = ceil_div(k.rows, z.row_blocks);
  z.row_blocks = z.row_block > 0 ? ceil_div(k.rows, z.row_block) : 0;
  z.items = z.blocks * k.groups * z.row_blocks;
  return z;
}

// Where the pixels of a panel are stored: `length` lanes from `lane` on, `step` elements apart.
struct OutRun {
  int64_t lane, length, offset;
};
// Where the lanes of a panel vector are loaded: those from `lanes` on at planes + offset.
struct Source {
  int64_t offset;
  LanesFrom lanes;
};

struct PlanarScratch {
  Segment* segments;
  Piece* pieces;
  int64_t* segment_offsets;
  int64_t* tap_offsets;
  float *stage, *panel, *sums, *tile, *bias;
  int64_t bytes;
};
PYSEQNET_INLINE PlanarScratch planar_scratch(const Correlation& k, const PlanarSizes& z, std::byte* base) {
  Carver carver(base);
  PlanarScratch s;
  s.segments = carver.take<Segment>(z.limits.segments);
  s.pieces = carver.take<Piece>(z.limits.pieces);
  s.segment_offsets = carver.take<int64_t>(z.limits.segments);
  s.tap_offsets = carver.take<int64_t>(k.taps());
  s.stage = carver.take<float>(z.plane * z.depth_block + VL);
  s.panel = carver.take<float>(z.depth_block * k.tap_words() * TILE_LANES);
  s.sums = carver.take<float>(z.depth_blocks > 1 ? z.block_vectors * VL * z.row_block : 0);
  s.tile = carver.take<float>(TILE_ROWS * TILE_LANES);
  s.bias = carver.take<float>(z.row_block);
  s.bytes = carver.used();
  return s;
}

// to[l * step] = from[l]: the pixels of one remainder of a strided input gradient.
template <class T>
PYSEQNET_INLINE void store_strided(T* to, int64_t step, const float* from, int64_t count) {
  int64_t l = 0;
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == sizeof(float)) {
    if (step == 2) {
      const __m512i low = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
      const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
      constexpr uint32_t even = 0x55555555;
      for (; l < count; l += VL) {
        const int left = count - l < VL ? int(count - l) : VL;
        const uint32_t lanes = even & uint32_t((uint64_t(1) << 2 * left) - 1);
        const __m512 v = _mm512_loadu_ps(from + l);
        _mm512_mask_storeu_ps(to + 2 * l, __mmask16(lanes), _mm512_permutexvar_ps(low, v));
        _mm512_mask_storeu_ps(to + 2 * l + VL, __mmask16(lanes >> VL), _mm512_permutexvar_ps(high, v));
      }
    }
  }
#endif
  for (; l < count; ++l) round_to(to[l * step], from[l]);
}

// dst[channel, tap] = what that tap of those channels sees of the panel's pixels. A panel vector has up to
// two sources here: a load, and a load merged into the lanes of the next image row (or none: the same again).
template <int vectors, int sources>
PYSEQNET_INLINE void pack_rows(const float* planes, int64_t channel_stride, int64_t channels,
                               const int64_t* tap_offsets, int64_t taps,
                               const Source (&source)[TILE_VECTORS][2], float* dst) {
  for (int64_t c = 0; c < channels; ++c, planes += channel_stride)
    for (int64_t t = 0; t < taps; ++t, dst += vectors * VL) {
      const float* p = planes + tap_offsets[t];
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        if (taps == 1) __builtin_prefetch(p + 12 * channel_stride + source[v][0].offset);
        vf x = load(p + source[v][0].offset);
        if (sources == 2) x = merge(x, source[v][1].lanes, p + source[v][1].offset);
        store(dst + v * VL, x);
      }
    }
}
// The same for the one channel whose taps are paired: words hold one element so far, the other half is zero.
template <int vectors, int sources>
PYSEQNET_INLINE void pack_tap_pairs(const float* plane, const int64_t* tap_offsets, int64_t taps,
                                    const Source (&source)[TILE_VECTORS][2], float* dst) {
  auto see = [&](int64_t t, int v) PYSEQNET_LAMBDA {
    const float* p = plane + tap_offsets[t];
    const vf x = load(p + source[v][0].offset);
    return (vw)(sources == 2 ? merge(x, source[v][1].lanes, p + source[v][1].offset) : x);
  };
  for (int64_t t = 0; t < taps; t += 2, dst += vectors * VL)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v)
      store(dst + v * VL, (vf)(t + 1 < taps ? see(t, v) | see(t + 1, v) << 16 : see(t, v)));
}
// One vector of a panel from any number of rows: small images.
PYSEQNET_INLINE void pack_vector(const float* planes, int64_t channel_stride, int64_t channels,
                                 const int64_t* tap_offsets, int64_t taps, const Source* source, int count,
                                 float* dst, int64_t stride) {
  for (int64_t c = 0; c < channels; ++c, planes += channel_stride)
    for (int64_t t = 0; t < taps; ++t, dst += stride) {
      const float* p = planes + tap_offsets[t];
      vf v = load(p + source[0].offset);
      for (int s = 1; s < count; ++s) v = merge(v, source[s].lanes, p + source[s].offset);
      store(dst, v);
    }
}

PYSEQNET_INLINE void pack_vector_of_tap_pairs(const float* plane, const int64_t* tap_offsets, int64_t taps,
                                              const Source* source, int count, float* dst, int64_t stride) {
  for (int64_t t = 0; t < taps; ++t) {
    const float* p = plane + tap_offsets[t];
    vf v = load(p + source[0].offset);
    for (int s = 1; s < count; ++s) v = merge(v, source[s].lanes, p + source[s].offset);
    float* word = dst + t / 2 * stride;
    store(word, t % 2 ? (vf)((vw)load(word) | (vw)v << 16) : v);
  }
}

template <class T>
struct Planar {
  const Correlation& k;
  const PlanarSizes& z;
  const T* in;
  const float* filters;  // [group][row][channel][tap]
  const T* bias;
  T* out;
  int64_t in_elements;
  PlanarScratch s;
  PixelBlock block{};
  Planes planes{};
  const float* staged = nullptr;  // this depth block's first plane

  // Channels [d0, d0 + channels) of the group become readable at `staged`.
  void stage(int64_t group, int64_t d0, int64_t channels) {
    const T* from = in + group * k.group_in + d0 * k.in.c;
    if (planes_in_place<T>(k)) {
      // Whole vectors are loaded: the last one must not leave the tensor.
      const Segment& last = block.segments[block.segment_count - 1];
      const int64_t end = in_place_offset(k, last) + last.length + group * k.group_in +
                          (k.depth - 1) * k.in.c + (k.h.reach() - 1) * k.in.h + k.w.reach() - 1 + VL;
      if (end <= in_elements) {
        planes = in_place_planes(k);
        for (int64_t i = 0; i < block.segment_count; ++i)
          s.segment_offsets[i] = in_place_offset(k, block.segments[i]);
        staged = (const float*)from;
        return;
      }
    }
    planes = staged_planes(k, block);
    for (int64_t i = 0; i < block.segment_count; ++i)
      s.segment_offsets[i] = staged_offset(planes, block, block.segments[i]);
    stage_planes(k, block, planes, from, d0, channels, s.stage);
    staged = s.stage;
  }

  // Where the lanes of panel vector [begin, begin + VL) come from; `segment` advances to its first row.
  int sources_of(int64_t begin, int64_t& segment, Source* source) const {
    const int64_t end = smaller(begin + VL, block.pixels());
    while (block.segments[segment].first + block.segments[segment].length <= begin) ++segment;
    int count = 0;
    for (int64_t g = segment; g < block.segment_count && block.segments[g].first < end; ++g) {
      const int64_t lane = block.segments[g].first - begin;
      source[count++] = {s.segment_offsets[g] - lane, lanes_from(lane > 0 ? int(lane) : 0)};
    }
    return count;
  }

  void pack_panel(int64_t first, int vectors, int64_t channels, int64_t segment) {
    Source pairs[TILE_VECTORS][2];
    int most = 1;
    int64_t walk = segment;
    for (int v = 0; v < vectors; ++v) {
      Source source[VL];
      const int count = sources_of(first + v * VL, walk, source);
      most = count > most ? count : most;
      pairs[v][0] = source[0];
      pairs[v][1] = source[count == 1 ? 0 : 1];
    }
    if (most <= 2) {
      auto pack = [&](auto n) PYSEQNET_LAMBDA {
        if (PAIR == 2 && k.paired_taps)
          most == 1 ? pack_tap_pairs<n.value, 1>(staged, s.tap_offsets, k.taps(), pairs, s.panel)
                    : pack_tap_pairs<n.value, 2>(staged, s.tap_offsets, k.taps(), pairs, s.panel);
        else if (most == 1)
          pack_rows<n.value, 1>(staged, planes.channel, channels, s.tap_offsets, k.taps(), pairs, s.panel);
        else
          pack_rows<n.value, 2>(staged, planes.channel, channels, s.tap_offsets, k.taps(), pairs, s.panel);
      };
      with_rows<TILE_VECTORS>(vectors, pack);
      return;
    }
    for (int v = 0; v < vectors; ++v) {
      Source source[VL];
      const int count = sources_of(first + v * VL, segment, source);
      if (PAIR == 2 && k.paired_taps)
        pack_vector_of_tap_pairs(staged, s.tap_offsets, k.taps(), source, count, s.panel + v * VL,
                                 vectors * VL);
      else
        pack_vector(staged, planes.channel, channels, s.tap_offsets, k.taps(), source, count,
                    s.panel + v * VL, vectors * VL);
    }
  }

  // The panel's pixels as runs of the output tensor (its group 0, row 0).
  int out_runs(int64_t first, int64_t pixels, int64_t segment, OutRun* runs) const {
    const int64_t step = out_step();
    int count = 0;
    for (int64_t g = segment; g < block.segment_count && block.segments[g].first < first + pixels; ++g) {
      const Segment& sg = block.segments[g];
      const int64_t a = larger(sg.first, first), b = smaller(sg.first + sg.length, first + pixels);
      const int64_t offset = sg.n * k.out.n + (k.h.out_first + sg.i * k.h.out_step) * k.out.h +
                             (k.w.out_first + (sg.j + a - sg.first) * k.w.out_step) * k.out.w;
      if (count && runs[count - 1].offset + runs[count - 1].length * step == offset)
        runs[count - 1].length += b - a;
      else
        runs[count++] = {a - first, b - a, offset};
    }
    return count;
  }
  int64_t out_step() const { return k.w.out_step * k.out.w; }

  void store_rows(const float* tile, int64_t rows, int64_t lanes, const OutRun* runs, int count,
                  T* to) const {
    const int64_t step = out_step();
    for (int64_t r = 0; r < rows; ++r)
      for (int i = 0; i < count; ++i) {
        const float* src = tile + r * lanes + runs[i].lane;
        T* dst = to + r * k.out.c + runs[i].offset;
        const int64_t n = runs[i].length;
        if (step == 1) {
          for (int64_t l = 0; l < n; l += VL) store_result(dst + l, load(src + l), n - l);
        } else {
          store_strided(dst, step, src, n);
        }
      }
  }

  void run_item(int64_t item) {
    const int64_t row_block = item % z.row_blocks, group = item / z.row_blocks % k.groups;
    const int64_t index = item / z.row_blocks / k.groups;
    const int64_t m0 = row_block * z.row_block, rows = smaller(z.row_block, k.rows - m0);
    block = {index * z.block_vectors * VL, smaller((index + 1) * z.block_vectors * VL, k.pixels()),
             s.segments, s.pieces};
    split_block(k, block);
    if (bias)
      for (int64_t m = 0; m < rows; ++m) s.bias[m] = to_float(bias[group * k.rows + m0 + m]);

    for (int64_t d = 0; d < z.depth_blocks; ++d) {
      const int64_t d0 = d * z.depth_block, channels = smaller(z.depth_block, k.depth - d0);
      if (channels * k.taps() > 0) {
        stage(group, d0, channels);
        for (int64_t r = 0, t = 0; r < k.h.taps; ++r)
          for (int64_t c = 0; c < k.w.taps; ++c) s.tap_offsets[t++] = planes.tap(k, r, c);
      }
      const float* first_filter = filters + ((group * k.rows + m0) * k.depth + d0) * k.tap_words();
      float* sums = s.sums;
      int64_t segment = 0, first = 0;
      for_even_tiles(
          ceil_div(block.pixels(), VL), TILE_VECTORS, [&](int64_t, int64_t vectors) PYSEQNET_LAMBDA {
            run_panel(group, m0, rows, first, int(vectors), d, channels, first_filter, sums, segment);
            first += vectors * VL;
            sums += rows * vectors * VL;
          });
    }
  }

  void run_panel(int64_t group, int64_t m0, int64_t rows, int64_t first, int vectors, int64_t d,
                 int64_t channels, const float* first_filter, float* sums, int64_t& segment) {
    const int64_t pixels = smaller(vectors * VL, block.pixels() - first), lanes = vectors * VL;
    while (block.segments[segment].first + block.segments[segment].length <= first) ++segment;
    if (channels * k.taps() > 0) pack_panel(first, vectors, channels, segment);
    OutRun out_run[TILE_LANES];
    const int out_run_count = out_runs(first, pixels, segment, out_run);
    const bool last_depth = d + 1 == z.depth_blocks;
    const bool direct = tile_stores<T> && out_run_count == 1 && out_step() == 1;
    const Run run = {0, channels * k.tap_words()};
    const int tail = last_depth && direct ? int(pixels - (vectors - 1) * VL) : VL;
    for_even_tiles(rows, tile_rows(vectors), [&](int64_t r0, int64_t r) PYSEQNET_LAMBDA {
      const float* a[TILE_ROWS];
      float* c[TILE_ROWS];
      T* to = out + (group * k.rows + m0 + r0) * k.out.c;
      for (int64_t i = 0; i < r; ++i) {
        a[i] = first_filter + (r0 + i) * k.depth * k.tap_words();
        if (!last_depth)
          c[i] = sums + (r0 + i) * lanes;
        else if (direct)
          c[i] = (float*)(to + i * k.out.c + out_run[0].offset);
        else
          c[i] = s.tile + i * lanes;
        if (last_depth && !direct)
          for (int g = 0; g < out_run_count; ++g)
            prefetch_results(to + i * k.out.c + out_run[g].offset, out_run[g].length * out_step());
      }
      run_tile(int(r), vectors,
               {a, &run, 1, s.panel, lanes, d ? sums + r0 * lanes : nullptr, lanes,
                bias ? s.bias + r0 : nullptr, c, tail, last_depth && direct && paired<T>});
      if (last_depth && !direct) store_rows(s.tile, r, lanes, out_run, out_run_count, to);
    });
  }
};

// The taps of a correlation out of the R * S elements of one filter channel that lie together in memory: a
// permutation, where they fit a vector.
struct TapPermutation {
  bool usable = false;
#if defined(__AVX512F__)
  __m512i from;
#endif
  int elements, taps;
};
PYSEQNET_INLINE TapPermutation tap_permutation(const Correlation& k, int64_t filter_elements) {
  TapPermutation p;
  p.elements = int(filter_elements);
  p.taps = int(k.taps());
#if defined(__AVX512F__)
  p.usable = filter_elements <= VL && k.s_stride == 1 && k.taps() > 1 && !k.paired_taps;
  if (p.usable) {
    alignas(64) int32_t index[VL] = {};
    for (int64_t r = 0, t = 0; r < k.h.taps; ++r)
      for (int64_t c = 0; c < k.w.taps; ++c) index[t++] = int32_t(k.filter_offset(0, 0, 0, r, c));
    p.from = _mm512_load_si512(index);
  }
#endif
  return p;
}
template <class T>
PYSEQNET_INLINE void permute_taps(const TapPermutation& p, const T* from, Partner partner, float* to) {
#if defined(__AVX512F__)
  const vf all = load_words(from, 0, p.elements, partner);
  store_lanes_n(to, (vf)_mm512_permutexvar_ps(p.from, (__m512)all), p.taps);
#else
  (void)p, (void)from, (void)partner, (void)to;
#endif
}

// Filters as rows of [channel][tap], in words. One item is a block of rows of one group: for an input
// gradient neighbouring rows are neighbours in the filter tensor, so that whole cache lines are used.
constexpr int64_t PACK_ROWS = 16;
PYSEQNET_INLINE int64_t planar_pack_items(const Correlation& k) {
  return k.groups * ceil_div(k.rows, PACK_ROWS);
}
template <class T>
void pack_planar_filters(const Correlation& k, int64_t filter_elements, const T* w, float* to, int64_t begin,
                         int64_t end) {
  const TapPermutation permutation = tap_permutation(k, filter_elements);
  const int64_t blocks = ceil_div(k.rows, PACK_ROWS), depth = k.depth * k.tap_words();
  for (int64_t item = begin; item < end; ++item) {
    const int64_t group = item / blocks, m0 = item % blocks * PACK_ROWS;
    const int64_t rows = smaller(PACK_ROWS, k.rows - m0);
    float* dst = to + (group * k.rows + m0) * depth;
    // The filters are walked in the order in which they are stored.
    const bool by_rows = k.row_stride > k.depth_stride;
    for (int64_t outer = 0; outer < (by_rows ? rows : k.depth); ++outer)
      for (int64_t inner = 0; inner < (by_rows ? k.depth : rows); ++inner) {
        const int64_t m = by_rows ? outer : inner, d = by_rows ? inner : outer;
        float* row = dst + m * depth + d * k.tap_words();
        const Partner partner = k.channel_partner(k.filter_partner, d);
        if (permutation.usable) {
          const T* all = w + group * k.group_stride + (m0 + m) * k.row_stride + d * k.depth_stride;
          permute_taps(permutation, all, partner, row);
          continue;
        }
        const T* src = w + k.filter_offset(group, m0 + m, d, 0, 0);
        if (PAIR == 2 && k.paired_taps) {
          auto tap_at = [&](int64_t t) PYSEQNET_LAMBDA {
            return t / k.w.taps * k.h.filter_step * k.r_stride + t % k.w.taps * k.w.filter_step * k.s_stride;
          };
          for (int64_t t = 0; t < k.taps(); t += 2)
            *row++ = load_word(src + tap_at(t), {tap_at(t + 1) - tap_at(t), t + 1 < k.taps()});
          continue;
        }
        for (int64_t r = 0; r < k.h.taps; ++r)
          for (int64_t c = 0; c < k.w.taps; ++c)
            *row++ =
                load_word(src + r * k.h.filter_step * k.r_stride + c * k.w.filter_step * k.s_stride, partner);
      }
  }
}

}  // namespace conv
}  // namespace PYSEQNET_ISA
}  // namespace pyseqnet
