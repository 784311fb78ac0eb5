// ISA: +avx512bf16
//
// General weight gradient: every stride, padding, dilation and group count, both layouts, f32, bf16 and f16.
//
//   gw[row = (channel, tap)][filter] = sum over pixels of  x[channel, pixel + tap] * gy[pixel][filter]
//
// Rows are taps of channels, read where they lie in planes (the image itself or its staged copy), lanes are
// filters, depth runs along pixels. gy is transposed once into a panel of up to 4 vectors of filters; in
// channels-last it is such a panel already.
//
// The sum over N * P * Q pixels is cut into blocks, each summed in registers and then added to a float sum in
// private scratch: long sums stay accurate. A work item owns some panels of filters x a block of channels.
// Where these are too few to share out, the pixels are also cut into a fixed number of chunks with sums of
// their own in the shared workspace, which a second phase adds in order.
//
// Bound: FMA.
#include "conv/conv_gemm_planar.h"

namespace pyseqnet {
inline namespace PYSEQNET_ISA {
namespace conv {
namespace weights {

constexpr int64_t BLOCK_PIXELS = 320;  // a panel of 64 lanes takes 80 KiB
constexpr int64_t MIN_BLOCK_PIXELS = 64;
constexpr int64_t BLOCK_ROWS = 768;       // their sums with 64 lanes take 192 KiB
constexpr int64_t ITEM_SUMS = 48 * 1024;  // floats: 192 KiB
constexpr int64_t REDUCE_ROWS = 64;       // rows of a work item of the second phase

struct Sizes {
  int64_t vectors, panels;  // of filters, in a group
  int64_t panel_block, panel_blocks;
  int64_t channel_block, channel_blocks;
  int64_t block_pixels, blocks;
  int64_t chunks, chunk_blocks;
  int64_t items;
  int64_t reduce_channels, reduce_slices, reduce_items;
  BlockLimits limits;
  int64_t plane;
  int64_t chunk_floats;  // sums of all groups

  int64_t panel_begin(int64_t panel) const { return vectors * panel / panels; }
};

Sizes sizes(const Correlation& k) {
  Sizes z;
  const int64_t taps = k.taps();
  z.vectors = ceil_div(k.rows, VL);
  z.panels = ceil_div(z.vectors, TILE_VECTORS);
  z.channel_blocks = ceil_div(k.depth, larger(1, BLOCK_ROWS / larger(1, taps)));
  z.channel_block = z.channel_blocks > 0 ? ceil_div(k.depth, z.channel_blocks) : 0;
  z.channel_blocks = z.channel_block > 0 ? ceil_div(k.depth, z.channel_block) : 0;
  // Several panels share a staged block where their sums fit the cache together: short filters.
  z.panel_block =
      smaller(larger(1, z.panels), larger(1, ITEM_SUMS / larger(1, z.channel_block * taps * TILE_LANES)));
  z.panel_blocks = ceil_div(z.panels, z.panel_block);
  z.panel_block = z.panel_blocks > 0 ? ceil_div(z.panels, z.panel_blocks) : 1;
  for (z.block_pixels = BLOCK_PIXELS;; z.block_pixels -= MIN_BLOCK_PIXELS) {
    z.limits = block_limits(k, z.block_pixels);
    z.plane = staged_plane(k, z.limits);
    if (z.block_pixels <= MIN_BLOCK_PIXELS || z.plane * z.channel_block <= STAGE_FLOATS) break;
  }
  z.blocks = ceil_div(k.pixels(), z.block_pixels);
  const int64_t alone = k.groups * z.panel_blocks * z.channel_blocks;
  const double fmas = double(k.pixels()) * double(k.groups * z.vectors) * double(k.depth * taps);
  z.chunks = 1;
  if (alone > 0 && alone < ENOUGH_ITEMS)
    z.chunks = larger(1, smaller(smaller(ceil_div(ENOUGH_ITEMS, alone), z.blocks),
                                 int64_t(fmas / double(ITEM_FMAS * alone))));
  z.chunk_blocks = ceil_div(z.blocks, z.chunks);
  z.chunks = z.chunk_blocks > 0 ? ceil_div(z.blocks, z.chunk_blocks) : 1;
  z.items = taps > 0 ? alone * z.chunks : 0;
  z.reduce_channels = smaller(z.channel_block, larger(1, REDUCE_ROWS / larger(1, taps)));
  z.reduce_slices = z.reduce_channels > 0 ? ceil_div(z.channel_block, z.reduce_channels) : 0;
  z.reduce_items = z.chunks > 1 ? k.groups * z.panels * z.channel_blocks * z.reduce_slices : 0;
  z.chunk_floats = k.groups * z.vectors * VL * k.depth * taps;
  return z;
}

struct Scratch {
  Segment* segments;
  Piece* pieces;
  Run* runs;
  const float** rows;
  float *stage, *panel, *sums;
  int64_t bytes;
};
Scratch scratch_of(const Correlation& k, const Sizes& z, std::byte* base) {
  Carver carver(base);
  Scratch s;
  s.segments = carver.take<Segment>(z.limits.segments);
  s.pieces = carver.take<Piece>(z.limits.pieces);
  s.runs = carver.take<Run>(z.limits.segments);
  s.rows = carver.take<const float*>(z.channel_block * k.taps());
  s.stage = carver.take<float>(z.plane * z.channel_block + VL);
  s.panel = carver.take<float>(z.block_pixels * TILE_LANES);
  s.sums = carver.take<float>(z.panel_block * z.channel_block * k.taps() * TILE_LANES);
  s.bytes = carver.used();
  return s;
}

template <class T>
struct Kernel {
  const ConvProblem& p;
  const Correlation& k;
  const Sizes& z;
  const T *x, *gy;
  T* gw;
  float* chunk_sums;  // [chunk][group][panel][channel block][row][lane]
  Scratch s;

  // The item's place: a block of channels of a group, and the panel of filters at hand.
  int64_t group = 0, c0 = 0, channels = 0, v0 = 0, lanes = 0, valid = 0;
  void select_channels(int64_t group_, int64_t channel_block) {
    group = group_;
    c0 = channel_block * z.channel_block;
    channels = smaller(z.channel_block, k.depth - c0);
  }
  void select_panel(int64_t panel) {
    v0 = z.panel_begin(panel);
    lanes = (z.panel_begin(panel + 1) - v0) * VL;
    valid = smaller(lanes, k.rows - v0 * VL);
  }
  float* sums_of_chunk(int64_t chunk) const {
    return chunk_sums + chunk * z.chunk_floats + (group * z.vectors + v0) * VL * k.depth * k.taps() +
           c0 * k.taps() * lanes;
  }
  // Rows are numbered as the filters store them, [channel][tap] or [tap][channel], so that the results are
  // runs of the filter tensor.
  bool channel_major() const { return p.filter_layout == Layout::nchw; }

  void run_item(int64_t item) {
    const int64_t alone = k.groups * z.panel_blocks * z.channel_blocks;
    const int64_t place = item % alone, chunk = item / alone;
    select_channels(place / z.channel_blocks / z.panel_blocks, place % z.channel_blocks);
    const int64_t p0 = place / z.channel_blocks % z.panel_blocks * z.panel_block;
    const int64_t p1 = smaller(p0 + z.panel_block, z.panels);
    const int64_t first = chunk * z.chunk_blocks, last = smaller(first + z.chunk_blocks, z.blocks);
    for (int64_t b = first; b < last; ++b) add_block(b, b > first, chunk, p0, p1);
    for (int64_t panel = p0; panel < p1; ++panel) {
      select_panel(panel);
      float* sums = item_sums(chunk, p0);
      if (first >= last)
        for (int64_t i = 0; i < channels * k.taps() * lanes; i += VL) store(sums + i, vf{});
      if (z.chunks == 1) store_rows(sums, 0, channels);
    }
  }
  // Where the panel at hand is summed, in an item whose first panel is p0.
  float* item_sums(int64_t chunk, int64_t p0) const {
    return z.chunks > 1 ? sums_of_chunk(chunk) : s.sums + (v0 - z.panel_begin(p0)) * VL * channels * k.taps();
  }

  void add_block(int64_t index, bool further, int64_t chunk, int64_t p0, int64_t p1) {
    PixelBlock block = {index * z.block_pixels, smaller((index + 1) * z.block_pixels, k.pixels()), s.segments,
                        s.pieces};
    split_block(k, block);
    int64_t run_count = 0;
    locate_rows(block, run_count);
    for (int64_t panel = p0; panel < p1; ++panel) {
      select_panel(panel);
      float* sums = item_sums(chunk, p0);
      int64_t b_stride = lanes;
      const float* b = filter_panel(block, b_stride);
      const int vectors = int(lanes / VL);
      for_even_tiles(channels * k.taps(), tile_rows(vectors), [&](int64_t r0, int64_t r) PYSEQNET_LAMBDA {
        float* c[TILE_ROWS];
        for (int64_t i = 0; i < r; ++i) c[i] = sums + (r0 + i) * lanes;
        run_tile(
            int(r), vectors,
            {s.rows + r0, s.runs, run_count, b, b_stride, further ? c[0] : nullptr, lanes, nullptr, c, VL});
      });
    }
  }

  // Row pointers, and the runs of pixels that the block consists of.
  void locate_rows(const PixelBlock& block, int64_t& run_count) {
    const bool in_place = planes_in_place<T>(k);
    const T* from = x + group * k.group_in + c0 * k.in.c;
    const Planes planes = in_place ? in_place_planes(k) : staged_planes(k, block);
    if (!in_place) stage_planes(k, block, planes, from, c0, channels, s.stage);
    for (int64_t g = 0; g < block.segment_count; ++g) {
      const Segment& sg = block.segments[g];
      const int64_t offset = in_place ? in_place_offset(k, sg) : staged_offset(planes, block, sg);
      if (run_count && s.runs[run_count - 1].offset + s.runs[run_count - 1].length == offset)
        s.runs[run_count - 1].length += sg.length;
      else
        s.runs[run_count++] = {offset, sg.length};
    }
    const float* base = in_place ? (const float*)from : s.stage;
    const int64_t taps = k.taps();
    const int64_t c_step = channel_major() ? taps : 1, t_step = channel_major() ? 1 : channels;
    for (int64_t r = 0, t = 0; r < k.h.taps; ++r)
      for (int64_t q = 0; q < k.w.taps; ++q, ++t) {
        const float* tap = base + planes.tap(k, r, q);
        for (int64_t c = 0; c < channels; ++c) s.rows[c * c_step + t * t_step] = tap + c * planes.channel;
      }
  }

  // gy as [pixel][lane].
  const float* filter_panel(const PixelBlock& block, int64_t& stride) {
    const int64_t filter = (group * k.rows + v0 * VL) * k.out.c;
    // Channels-last is such a panel already; whole vectors are loaded, the last one must not leave the
    // tensor.
    if (k.layout == Layout::nhwc && sizeof(T) == sizeof(float) &&
        (block.end - 1) * k.out.w + filter + lanes <= k.pixels() * k.out.w) {
      stride = k.out.w;
      return (const float*)gy + block.begin * k.out.w + filter;
    }
    const int64_t image = k.image_pixels();
    for (int64_t e = block.begin; e < block.end;) {
      const int64_t n = e / image, first = e % image, count = smaller(block.end - e, image - first);
      const Partner partner = k.image_partner(k.out_partner, n);
      const T* from = gy + n * k.out.n + filter;
      float* to = s.panel + (e - block.begin) * lanes;
      if (k.layout == Layout::nhwc)
        for (int64_t i = 0; i < count; ++i)
          copy_words(to + i * lanes, from + (first + i) * k.out.w, 1, valid, partner);
      else
        transpose_words(from + first, k.out.c, valid, count, to, lanes, partner);
      for (int64_t i = 0; valid < lanes && i < count; ++i) fill_zero(to + i * lanes + valid, lanes - valid);
      e += count;
    }
    return s.panel;
  }

  // Channels [from, to) of the block to the filter tensor; `sums` holds the rows of these channels only.
  void store_rows(const float* sums, int64_t from, int64_t to) {
    const int64_t taps = k.taps(), count = to - from;
    T* first = gw + (group * k.rows + v0 * VL) * k.row_stride;
    if (channel_major()) {
      transpose_words(sums, lanes, count * taps, valid, first + (c0 + from) * taps, k.row_stride);
    } else {
      for (int64_t t = 0; t < taps; ++t)
        transpose_words(sums + t * count * lanes, lanes, count, valid, first + t * k.depth + c0 + from,
                        k.row_stride);
    }
  }

  // Adds a slice of channels over the chunks, in order.
  void reduce_item(int64_t item) {
    const int64_t slice = item % z.reduce_slices, place = item / z.reduce_slices;
    select_channels(place / z.channel_blocks / z.panels, place % z.channel_blocks);
    select_panel(place / z.channel_blocks % z.panels);
    const int64_t from = slice * z.reduce_channels, to = smaller(from + z.reduce_channels, channels);
    if (from >= to) return;
    const int64_t taps = k.taps();
    const int64_t parts = channel_major() ? 1 : taps;
    const int64_t part_rows = channel_major() ? (to - from) * taps : to - from;
    float* dst = s.sums;
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t row = channel_major() ? from * taps : part * channels + from;
      for (int64_t i = 0; i < part_rows * lanes; i += VL) {
        vf sum = load(sums_of_chunk(0) + row * lanes + i);
        for (int64_t chunk = 1; chunk < z.chunks; ++chunk)
          sum += load(sums_of_chunk(chunk) + row * lanes + i);
        store(dst + i, sum);
      }
      dst += part_rows * lanes;
    }
    store_rows(s.sums, from, to);
  }
};

Refusal refuses(const ConvProblem& p) {
  if (PAIR == 2 && p.dtype != DType::bf16) return "multiplies pairs of bfloat16";
  if (PAIR == 2 && p.N < 2) return "pairs images, and there is one";
  return p.dtype == DType::f64 ? "computes in float, not double" : accepted;
}

WorkPlan plan(const ConvProblem& p) {
  const Correlation k = correlation(p, ConvPass::weight_gradient, 0);
  const Sizes z = sizes(k);
  WorkPlan plan;
  plan.add_phase(z.items, grain_of(p.flops() / (2 * VL), z.items));
  if (z.chunks > 1) {
    plan.add_phase(z.reduce_items, grain_of(double(z.chunks * z.chunk_floats / VL), z.reduce_items));
    plan.shared_bytes = z.chunks * z.chunk_floats * int64_t(sizeof(float));
  }
  plan.thread_bytes = scratch_of(k, z, nullptr).bytes;
  return plan;
}

template <class T>
void run_as(const ConvProblem& p, const ConvTensors& t, const WorkSlice& slice) {
  const Correlation k = correlation(p, ConvPass::weight_gradient, 0);
  const Sizes z = sizes(k);
  Kernel<T> kernel{p,
                   k,
                   z,
                   static_cast<const T*>(t.x),
                   static_cast<const T*>(t.gy),
                   static_cast<T*>(t.gw),
                   reinterpret_cast<float*>(slice.shared),
                   scratch_of(k, z, slice.scratch)};
  for (int64_t item = slice.begin; item < slice.end; ++item)
    slice.phase == 0 ? kernel.run_item(item) : kernel.reduce_item(item);
}

void run(const ConvProblem& p, const ConvTensors& t, const WorkSlice& slice) {
#if defined(__AVX512BF16__)
  run_as<bfloat16>(p, t, slice);
#else
  switch (p.dtype) {
    case DType::f32:
      return run_as<float>(p, t, slice);
    case DType::bf16:
      return run_as<bfloat16>(p, t, slice);
    case DType::f16:
      return run_as<float16>(p, t, slice);
    case DType::f64:
      return;  // refused
  }
#endif
}

}  // namespace weights
}  // namespace conv

extern const ConvCpuKernel conv_gemm_weight_gradient;
const ConvCpuKernel conv_gemm_weight_gradient = {"gemm_" PYSEQNET_ISA_NAME, this_isa, conv::weights::refuses,
                                                 conv::weights::plan, conv::weights::run};

}  // namespace PYSEQNET_ISA
}  // namespace pyseqnet
