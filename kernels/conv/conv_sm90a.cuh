// Convolution for Hopper: TMA's im2col mode, wgmma, warp specialisation. conv_sm90a.cu says for which problems,
// and what it should take.
//
// product_wgmma: forward and input gradient. A block is three warpgroups: one thread of the first fills a ring
// of stages, 64 channels of 128 pixels as one tap sees them (one im2col copy) and of the tap's filters (one
// copy of a box). The blocks are persistent, one a multiprocessor, and the other two warpgroups take their
// tiles in turn ("ping-pong"): while one writes its tile the other multiplies, and the producer is already at
// the next. Nothing is computed about addresses but where a tile begins: the copies walk the image and
// zero-fill what lies outside.
//
// An input gradient of stride 2 has up to four residues of pixels. Each is a convolution of stride 1 over its
// own taps and has a tensor map of its own; their tiles follow one another.
//
// Results leave from registers: four lanes of a quad exchange words until each holds 16 bytes of one pixel.
#pragma once
#include "conv/conv_tensor_core.cuh"

namespace pyseqnet {

constexpr int wgmma_depth = 64;  // channels of a stage: 128 bytes, the swizzle's span
constexpr int wgmma_threads = 384, warpgroup = 128;
constexpr int most_residues = 4;

// Of one residue, or of the forward pass.
struct WgmmaResidue {
  TapAxis h, w;
  int lower_h, lower_w;  // where pixel 0 meets the first tap in memory
  int tap_h, tap_w;      // from one tap to the next, positive
  bool turned;           // taps come in the order of memory, the last filter tap first
  unsigned row_tiles;  // all tiles of pixels, of filters and of groups are row_tiles * column_tiles * groups
};

struct WgmmaProduct {
  WgmmaResidue residue[most_residues];
  int images, columns, channel_steps, group_channels, filter_taps_w;
  unsigned column_tiles, groups, tiles;
  Strides out;
  bool relu;
};

struct WgmmaMaps {
  ptx::TensorMap image[most_residues];
  ptx::TensorMap filters;
};

template <int columns_>
struct WgmmaTile {
  static constexpr int columns = columns_;
  static constexpr int stages = columns == 128 ? 6 : 8;  // 192 KiB
  static constexpr unsigned image_bytes = product_rows * wgmma_depth * 2;
  static constexpr unsigned stage_bytes = image_bytes + columns * wgmma_depth * 2;
  static constexpr unsigned shared_bytes = stages * stage_bytes;
};

// One tile of the list that persistent blocks share.
struct WgmmaPlace {
  int residue, first_column, group;
  int64_t first_pixel;
  PYSEQNET_DEVICE WgmmaPlace(const WgmmaProduct& g, unsigned tile, int columns) {
    residue = 0;
    for (;;) {
      const unsigned here = g.residue[residue].row_tiles * g.column_tiles * g.groups;
      if (tile < here) break;
      tile -= here, residue++;
    }
    first_column = int(tile % g.column_tiles) * columns;
    tile /= g.column_tiles;
    first_pixel = int64_t(tile % g.residue[residue].row_tiles) * product_rows;
    group = int(tile / g.residue[residue].row_tiles);
  }
};

// Slot and phase of a ring of mbarriers.
template <int stages>
struct RingPlace {
  int slot = 0;
  uint32_t phase = 0;
  PYSEQNET_DEVICE void next() {
    if (++slot == stages) slot = 0, phase ^= 1;
  }
  PYSEQNET_DEVICE void skip(int steps) {
    slot += steps % stages;
    phase ^= uint32_t(steps / stages) & 1;
    if (slot >= stages) slot -= stages, phase ^= 1;
  }
};

template <class T>
PYSEQNET_DEVICE uint32_t pack_pair(float low, float high) {
  if constexpr (std::is_same_v<T, __half>)
    return ptx::pack_f16(low, high);
  else
    return ptx::pack_bf16(low, high);
}

// Lane t of a quad gives word j of four and gets word t of lane j: what was a column of pairs becomes 16 bytes.
PYSEQNET_DEVICE void transpose_quad(uint32_t (&word)[4], int lane) {
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2)
#pragma unroll
    for (int k = 0; k < 4; k++) {
      if (k & bit) continue;
      const bool upper = lane & bit;
      const uint32_t got = __shfl_xor_sync(0xffffffffu, upper ? word[k] : word[k | bit], bit);
      if (upper)
        word[k] = got;
      else
        word[k | bit] = got;
    }
}

// Stores eight neighbouring channels, of which `count` exist.
template <class T>
PYSEQNET_DEVICE void store_eight(T* to, const uint32_t (&word)[4], int count) {
  struct alignas(16) Eight {
    uint32_t word[4];
  };
  if (count >= 8 && reinterpret_cast<uintptr_t>(to) % sizeof(Eight) == 0) {
    *reinterpret_cast<Eight*>(to) = {{word[0], word[1], word[2], word[3]}};
    return;
  }
#pragma unroll
  for (int k = 0; k < 8; k++)
    if (k < count) reinterpret_cast<uint16_t*>(to)[k] = uint16_t(word[k / 2] >> k % 2 * 16);
}

template <class T, int columns>
__global__ void __launch_bounds__(wgmma_threads, 1)
    product_wgmma(const __grid_constant__ WgmmaMaps maps, const __grid_constant__ WgmmaProduct g,
                  const T* __restrict__ bias, T* __restrict__ out) {
#if PYSEQNET_SM90A
  using Tile = WgmmaTile<columns>;
  constexpr int stages = Tile::stages;
  PYSEQNET_DYNAMIC_SHARED(unsigned char, ring);
  PYSEQNET_SHARED(uint64_t, bars, [2 * stages]);
  const uint32_t tiles = ptx::smem_u32(ring), full = ptx::smem_u32(bars), empty = full + 8 * stages;
  const int t = int(threadIdx.x), group_of_warps = t / warpgroup;
  if (t == 0) {
    for (int s = 0; s < stages; s++) {
      ptx::mbar_init(full + 8 * s, 1);
      ptx::mbar_init(empty + 8 * s, 1);
    }
    ptx::mbar_fence_init();
  }
  __syncthreads();
  RingPlace<stages> at;

  if (group_of_warps == 0) {
    ptx::setmaxnreg_dec<40>();
    if (t != 0) return;
    for (unsigned tile = blockIdx.x; tile < g.tiles; tile += gridDim.x) {
      const WgmmaPlace place(g, tile, columns);
      const WgmmaResidue& r = g.residue[place.residue];
      const int first = int(place.first_pixel);
      const int row = first / r.w.outputs, image = row / r.h.outputs;
      const int w = r.lower_w + (first - row * r.w.outputs) * r.w.step;
      const int h = r.lower_h + (row - image * r.h.outputs) * r.h.step;
      for (int y = 0; y < r.h.taps; y++)
        for (int x = 0; x < r.w.taps; x++) {
          const int filter_y = r.h.filter_first + (r.turned ? r.h.taps - 1 - y : y) * r.h.filter_step;
          const int filter_x = r.w.filter_first + (r.turned ? r.w.taps - 1 - x : x) * r.w.filter_step;
          const uint16_t tap[2] = {uint16_t(x * r.tap_w), uint16_t(y * r.tap_h)};
          for (int c = 0; c < g.channel_steps; c++, at.next()) {
            const uint32_t bar = full + 8 * at.slot, to = tiles + at.slot * Tile::stage_bytes;
            ptx::mbar_wait(empty + 8 * at.slot, at.phase ^ 1);
            ptx::mbar_arrive_expect_tx(bar, Tile::stage_bytes);
            const int pixel[4] = {place.group * g.group_channels + c * wgmma_depth, w, h, image};
            ptx::tma_load_im2col(to, &maps.image[place.residue], pixel, tap, bar);
            const int filter[3] = {c * wgmma_depth, filter_y * g.filter_taps_w + filter_x,
                                   place.group * g.columns + place.first_column};
            ptx::tma_load(to + Tile::image_bytes, &maps.filters, filter, bar);
          }
        }
    }
    return;
  }

  ptx::setmaxnreg_inc<232>();
  const int consumer = group_of_warps - 1, lane = t % 32, warp = t / 32 % 4;
  constexpr int halves = product_rows / 64;  // of a tile: what one wgmma multiplies
  int turn = 0;
  for (unsigned tile = blockIdx.x; tile < g.tiles; tile += gridDim.x, turn ^= 1) {
    const WgmmaPlace place(g, tile, columns);
    const WgmmaResidue& r = g.residue[place.residue];
    const int steps = r.h.taps * r.w.taps * g.channel_steps;
    if (turn != consumer) {
      at.skip(steps);
      continue;
    }
    float sum[halves][columns / 2];
#pragma unroll
    for (int m = 0; m < halves; m++)
#pragma unroll
      for (int i = 0; i < columns / 2; i++) sum[m][i] = 0;
    // A slot is given back one step late: while its product still runs the next one is already queued.
    int before = 0;
    for (int step = 0; step < steps; step++) {
      ptx::mbar_wait(full + 8 * at.slot, at.phase);
      const uint32_t image = tiles + at.slot * Tile::stage_bytes;
      const uint32_t filters = tiles + at.slot * Tile::stage_bytes + Tile::image_bytes;
      ptx::wgmma_fence();
#pragma unroll
      for (int k = 0; k < wgmma_depth / 16; k++)
#pragma unroll
        for (int m = 0; m < halves; m++)
          ptx::wgmma<T>(sum[m], ptx::wgmma_desc_sw128(image + m * 64 * wgmma_depth * 2 + k * 32),
                        ptx::wgmma_desc_sw128(filters + k * 32), 1);
      ptx::wgmma_commit();
      ptx::wgmma_wait<1>();
      if (step > 0 && t % warpgroup == 0) ptx::mbar_arrive(empty + 8 * before);
      before = at.slot;
      at.next();
    }
    ptx::wgmma_wait<0>();
    if (steps > 0 && t % warpgroup == 0) ptx::mbar_arrive(empty + 8 * before);

    const int columns_left = g.columns - place.first_column;
    const int64_t pixels = int64_t(g.images) * r.h.outputs * r.w.outputs;
    T* tile_out = out + (int64_t(place.group) * g.columns + place.first_column) * g.out.c;
    const T* tile_bias = bias ? bias + int64_t(place.group) * g.columns + place.first_column : nullptr;
#pragma unroll
    for (int line = 0; line < 2 * halves; line++) {
      const int m = line / 2, half = line % 2;
      const int64_t pixel = place.first_pixel + m * 64 + warp * 16 + half * 8 + lane / 4;
      const int row = int(pixel) / r.w.outputs, image = row / r.h.outputs;
      T* to = tile_out + image * g.out.n +
              (r.h.out_first + int64_t(row - image * r.h.outputs) * r.h.out_step) * g.out.h +
              (r.w.out_first + int64_t(int(pixel) - row * r.w.outputs) * r.w.out_step) * g.out.w;
#pragma unroll
      for (int j = 0; j < columns / 8; j += 4) {
        uint32_t word[4];
#pragma unroll
        for (int k = 0; k < 4; k++) {
          const int column = (j + k) * 8 + lane % 4 * 2;
          float v[2];
#pragma unroll
          for (int e = 0; e < 2; e++) {
            v[e] = sum[m][(j + k) * 4 + half * 2 + e];
            if (tile_bias && column + e < columns_left) v[e] += load(tile_bias + column + e);
            if (g.relu && v[e] <= 0) v[e] = 0;
          }
          word[k] = pack_pair<T>(v[0], v[1]);
        }
        transpose_quad(word, lane);
        const int column = (j + lane % 4) * 8;
        if (pixel < pixels && column < columns_left) store_eight(to + column, word, columns_left - column);
      }
    }
  }
#endif
}

// ---------------------------------------------------------------- host side

// What cuTensorMapEncodeIm2col allows for images.
constexpr int least_corner = -128, most_corner = 127, most_offset = 255, most_step = 8;

struct WgmmaPlan {
  ConvProblem conv;
  PackedConv packed;
  GatheredProduct gathered;
  bool forward, pack_filters;
  PackPlan filters;
  WgmmaProduct product = {};
  Im2colBox box[most_residues];
  int residues;
  Refusal refusal = accepted;

  WgmmaPlan(ConvPass pass, const ConvProblem& p)
      : conv(simplified(p)), packed(packed_conv(conv, false)), forward(pass == ConvPass::forward) {
    gathered = gathered_product_of(pass, conv, packed);
    pack_filters = !forward || packed.pack_w;
    filters = forward ? pyseqnet::pack_filters(conv, packed) : pack_filters_turned(conv, packed);
    const int64_t channels = forward ? conv.group_channels() : conv.group_filters();
    WgmmaProduct& g = product;
    g.images = int(conv.N), g.columns = gathered.columns, g.groups = unsigned(conv.groups);
    g.group_channels = int(channels), g.channel_steps = int(ceil_div(channels, wgmma_depth));
    g.filter_taps_w = int(conv.S), g.out = gathered.out;
    residues = 0;
    const int64_t all = residues_of(gathered);
    if (all > most_residues) {
      refusal = "more than four residues of the stride";
      return;
    }
    for (int i = 0; i < all; i++) add_residue(i);
  }

  void add_residue(int i) {
    WgmmaResidue r = {};
    r.h = forward ? gathered.h : residue_axis(gathered.residue_h, i / gathered.residue_w.count);
    r.w = forward ? gathered.w : residue_axis(gathered.residue_w, i % gathered.residue_w.count);
    r.turned = !forward;
    if (r.h.taps == 0 || r.w.taps == 0) r.h.taps = r.w.taps = 0;
    Im2colBox& b = box[residues];
    place_axis(r.h, r.lower_h, r.tap_h, b.lower[1], b.upper[1]);
    place_axis(r.w, r.lower_w, r.tap_w, b.lower[0], b.upper[0]);
    b.channels = wgmma_depth, b.pixels = product_rows;
    const int64_t pixels = conv.N * r.h.outputs * r.w.outputs;
    r.row_tiles = unsigned(ceil_div(pixels, product_rows));
    product.residue[residues++] = r;
  }

  // The corners leave exactly the outputs' positions: whatever padding follows the last one.
  void place_axis(const TapAxis& axis, int& lower, int& tap, int& corner_low, int& corner_high) {
    if (axis.taps == 0) {
      lower = tap = corner_low = 0, corner_high = 0;
      return;
    }
    tap = axis.tap_step < 0 ? -axis.tap_step : axis.tap_step;
    lower = axis.origin + (axis.tap_step < 0 ? (axis.taps - 1) * axis.tap_step : 0);
    const int64_t high = lower + int64_t(axis.outputs - 1) * axis.step + 1 - axis.limit;
    corner_low = lower, corner_high = int(high);
    if (lower < least_corner || high > most_corner || high < least_corner || lower > most_corner)
      refusal = "padding beyond what TMA's im2col mode reaches";
    if (int64_t(axis.taps - 1) * tap > most_offset) refusal = "taps beyond what TMA's im2col mode reaches";
    if (axis.step > most_step) refusal = "a stride of more than 8";
  }
};

// A dense NHWC tensor of 16-bit elements.
inline TmaTensor nhwc_tensor(const void* data, DType type, int64_t channels, int64_t width, int64_t height,
                             int64_t images) {
  TmaTensor t;
  t.data = data, t.type = type, t.rank = 4;
  const int64_t extents[4] = {channels, width, height, images};
  uint64_t stride = 2;
  for (int i = 0; i < 4; i++)
    t.extent[i] = uint64_t(extents[i]), t.stride_bytes[i] = stride, stride *= uint64_t(extents[i]);
  return t;
}

}  // namespace pyseqnet
