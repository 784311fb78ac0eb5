// The weight gradient on Hopper: TMA, wgmma, warp specialisation; bfloat16 and float16, channels last.
//
//   gw[filter, (r, s, c)] = sum over pixels of  gy[pixel, filter] * x[place(pixel) + (r, s), c]
//
// weight_wgmma: depth is pixels, 64 a stage. Both operands lie in memory with pixels as rows, and stay so in
// shared memory: wgmma reads either operand along its rows as well. A block of gy is a box of 64 pixels x 64
// filters, one of x an im2col copy: 64 pixels as one tap sees them, 64 channels. One thread fills the ring; two
// warpgroups multiply, 128 filters x 128 columns (a column is a tap and a channel) or, where there are no
// more than 64 filters, 64 x 256. Depth is split over blocks in parts of whole stages; each writes its sums to
// the workspace, sum_filter_parts (conv_pack.cu) adds the parts in order.
//
// Bound: the second-level cache, as in conv_sm90a.cu: 32 KiB a stage of 2.1 MFLOP, 350 TFLOP/s on an H200 (64
// filters: 40 KiB, 280). Counted for ResNet-50, bfloat16, batch 64, predicted before any measurement:
//   64 -> 64, 3x3, 56x56     14.8 GFLOP   72 us: 9 of 12 places in the column tiles are filled; 44 parts
//   128 -> 128, 3x3, 28x28   14.8 GFLOP   46 us, 14 parts of 0.6 MB
//   256 -> 256, 3x3, 14x14   14.8 GFLOP   52 us, 3 parts of 2.4 MB (108 of 132 blocks)
//   512 -> 512, 3x3, 7x7     14.8 GFLOP   78 us: 144 tiles are two turns of 132 blocks
#include "conv/conv_sm90a.cuh"

namespace pyseqnet {
namespace {

constexpr int64_t device_blocks = 132;
constexpr int span = 64;  // of filters or channels: 128 bytes, the swizzle's
constexpr unsigned block_bytes = wgmma_depth * span * 2;

struct WeightWgmma {
  TapAxis h, w;
  int lower_h, lower_w, tap_h, tap_w;
  int taps, channel_blocks, channels, filters;  // of a group
  unsigned row_tiles, column_tiles, groups;
  int64_t pixels, part_pixels, part_stride;
};

struct WeightMaps {
  ptx::TensorMap gy, x;
};

template <int rows_>
struct WeightWgmmaTile {
  static constexpr int rows = rows_, row_blocks = rows / span, column_blocks = rows == 64 ? 4 : 2;
  static constexpr int stages = rows == 64 ? 4 : 6;
  static constexpr unsigned stage_bytes = (row_blocks + column_blocks) * block_bytes;
  static constexpr unsigned shared_bytes = stages * stage_bytes;
};

template <class T, int rows>
__global__ void __launch_bounds__(wgmma_threads, 1)
    weight_wgmma(const __grid_constant__ WeightMaps maps, const __grid_constant__ WeightWgmma g,
                 float* __restrict__ partial) {
#if PYSEQNET_SM90A
  using Tile = WeightWgmmaTile<rows>;
  constexpr int stages = Tile::stages;
  PYSEQNET_DYNAMIC_SHARED(unsigned char, ring);
  PYSEQNET_SHARED(uint64_t, bars, [2 * stages]);
  const uint32_t slots = ptx::smem_u32(ring), full = ptx::smem_u32(bars), empty = full + 8 * stages;
  const int t = int(threadIdx.x), group_of_warps = t / warpgroup;
  if (t == 0) {
    for (int s = 0; s < stages; s++) {
      ptx::mbar_init(full + 8 * s, 1);
      ptx::mbar_init(empty + 8 * s, 2);
    }
    ptx::mbar_fence_init();
  }
  __syncthreads();

  unsigned block = blockIdx.x;
  const int first_block = int(block % g.column_tiles) * Tile::column_blocks;
  block /= g.column_tiles;
  const int first_row = int(block % g.row_tiles) * rows;
  block /= g.row_tiles;
  const int group = int(block % g.groups);
  const int64_t part = block / g.groups, begin = part * g.part_pixels;
  const int64_t end = begin + g.part_pixels < g.pixels ? begin + g.part_pixels : g.pixels;
  const int steps = int((end - begin + wgmma_depth - 1) / wgmma_depth);
  const int blocks = g.taps * g.channel_blocks;
  RingPlace<stages> at;

  if (group_of_warps == 0) {
    ptx::setmaxnreg_dec<40>();
    if (t != 0) return;
    for (int step = 0; step < steps; step++, at.next()) {
      const uint32_t bar = full + 8 * at.slot, to = slots + at.slot * Tile::stage_bytes;
      const int pixel = int(begin) + step * wgmma_depth;
      const int row = pixel / g.w.outputs, image = row / g.h.outputs;
      const int w = g.lower_w + (pixel - row * g.w.outputs) * g.w.step;
      const int h = g.lower_h + (row - image * g.h.outputs) * g.h.step;
      ptx::mbar_wait(empty + 8 * at.slot, at.phase ^ 1);
      ptx::mbar_arrive_expect_tx(bar, Tile::stage_bytes);
#pragma unroll
      for (int i = 0; i < Tile::row_blocks; i++) {
        const int from[2] = {group * g.filters + first_row + i * span, pixel};
        ptx::tma_load(to + i * block_bytes, &maps.gy, from, bar);
      }
#pragma unroll
      for (int i = 0; i < Tile::column_blocks; i++) {
        // Blocks past the last repeat it: their sums are not stored.
        const int column = first_block + i < blocks ? first_block + i : blocks - 1;
        const int tap = column / g.channel_blocks, r = tap / g.w.taps, s = tap - r * g.w.taps;
        const int from[4] = {group * g.channels + (column - tap * g.channel_blocks) * span, w, h, image};
        const uint16_t offset[2] = {uint16_t(s * g.tap_w), uint16_t(r * g.tap_h)};
        ptx::tma_load_im2col(to + (Tile::row_blocks + i) * block_bytes, &maps.x, from, offset, bar);
      }
    }
    return;
  }

  ptx::setmaxnreg_inc<232>();
  const int consumer = group_of_warps - 1, lane = t % 32, warp = t / 32 % 4;
  const int my_row = rows == 128 ? consumer : 0, my_column = rows == 128 ? 0 : 2 * consumer;  // blocks
  float sum[64];
#pragma unroll
  for (int i = 0; i < 64; i++) sum[i] = 0;
  int before = 0;
  for (int step = 0; step < steps; step++) {
    ptx::mbar_wait(full + 8 * at.slot, at.phase);
    const uint32_t from = slots + at.slot * Tile::stage_bytes;
    const uint32_t gy = from + my_row * block_bytes;
    const uint32_t x = from + (Tile::row_blocks + my_column) * block_bytes;
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < wgmma_depth / 16; k++)
      ptx::wgmma<T, 1, 1>(sum, ptx::wgmma_descriptor(gy + k * 2048, block_bytes, 1024, Swizzle::b128),
                          ptx::wgmma_descriptor(x + k * 2048, block_bytes, 1024, Swizzle::b128), 1);
    ptx::wgmma_commit();
    ptx::wgmma_wait<1>();
    if (step > 0 && t % warpgroup == 0) ptx::mbar_arrive(empty + 8 * before);
    before = at.slot;
    at.next();
  }
  ptx::wgmma_wait<0>();

  const int64_t width = int64_t(g.taps) * g.channels;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int row = first_row + my_row * span + warp * 16 + half * 8 + lane / 4;
    if (row >= g.filters) continue;
    float* out = partial + part * g.part_stride + (int64_t(group) * g.filters + row) * width;
#pragma unroll
    for (int j = 0; j < 16; j++) {
      const int column = first_block + my_column + j / 8, tap = column / g.channel_blocks;
      const int channel = (column - tap * g.channel_blocks) * span + j % 8 * 8 + lane % 4 * 2;
      if (column >= blocks || channel >= g.channels) continue;
      struct alignas(8) Two {
        float element[2];
      };
      *reinterpret_cast<Two*>(out + tap * g.channels +
                              channel) = {{sum[j * 4 + half * 2], sum[j * 4 + half * 2 + 1]}};
    }
  }
#endif
}

struct WeightWgmmaPlan {
  WgmmaPlan forward;
  WeightWgmma product = {};
  int rows;
  Split split;

  explicit WeightWgmmaPlan(const ConvProblem& p) : forward(ConvPass::forward, p) {
    const ConvProblem& c = forward.conv;
    const WgmmaResidue& r = forward.product.residue[0];
    WeightWgmma& g = product;
    g.h = r.h, g.w = r.w, g.lower_h = r.lower_h, g.lower_w = r.lower_w, g.tap_h = r.tap_h, g.tap_w = r.tap_w;
    g.taps = int(c.R * c.S), g.channels = int(c.group_channels()), g.filters = int(c.group_filters());
    g.channel_blocks = int(ceil_div(g.channels, span));
    rows = g.filters <= 64 ? 64 : 128;
    const int64_t row_tiles = ceil_div(g.filters, rows);
    const int64_t column_tiles = ceil_div(int64_t(g.taps) * g.channel_blocks, rows == 64 ? 4 : 2);
    g.row_tiles = unsigned(row_tiles), g.column_tiles = unsigned(column_tiles), g.groups = unsigned(c.groups);
    g.pixels = c.N * c.P * c.Q;
    // A part is worth its write and read: twice the stages of a ring.
    split = split_reduction(g.pixels, row_tiles * column_tiles * c.groups, 12 * wgmma_depth, wgmma_depth,
                            device_blocks);
    g.part_pixels = split.length;
    g.part_stride = c.K * g.taps * g.channels;
  }
  double blocks() const {
    return double(product.row_tiles) * product.column_tiles * product.groups * double(split.count);
  }
};

Refusal refuses(const ConvProblem& p) {
  if (p.dtype != DType::bf16 && p.dtype != DType::f16) return "only 16-bit types have this kernel";
  if (const Refusal why = refuse_tensor_cores(p)) return why;
  const WeightWgmmaPlan plan(p);
  if (plan.forward.packed.pack_x || plan.forward.packed.pack_gy)
    return "NCHW, or channels that do not fill chunks of 16 bytes, or begin off one";
  if (plan.product.channels <= span / 2 || plan.product.filters <= span / 2)
    return "channels or filters would fill less than half of each block";
  if (plan.forward.refusal) return plan.forward.refusal;
  return plan.blocks() > double(grid_limit) ? "more tiles than a grid has blocks" : accepted;
}

int64_t workspace_bytes(const ConvProblem& p) {
  const WeightWgmmaPlan plan(p);
  return plan.split.count * plan.product.part_stride * int64_t(sizeof(float));
}

template <class T, int rows>
int launch_parts(const WeightWgmmaPlan& plan, const WeightMaps& maps, float* partial, void* stream) {
  return launch({.grid = dim3(unsigned(plan.blocks())),
                 .block = dim3(wgmma_threads),
                 .dynamic_shared_bytes = WeightWgmmaTile<rows>::shared_bytes,
                 .stream = stream},
                weight_wgmma<T, rows>, maps, plan.product, partial);
}

int launch_weight_gradient(const ConvProblem& p, const ConvTensors& tensors, void* workspace, void* stream) {
  const WeightWgmmaPlan plan(p);
  const ConvProblem& c = plan.forward.conv;
  WeightMaps maps = {};
  if (const int error = make_tensor_map_2d(&maps.gy, tensors.gy, uint64_t(plan.product.pixels), uint64_t(c.K),
                                           uint64_t(c.K), wgmma_depth, span, p.dtype))
    return error;
  TmaTensor x = nhwc_tensor(tensors.x, p.dtype, c.C, c.W, c.H, c.N);
  x.step[1] = uint32_t(plan.product.w.step), x.step[2] = uint32_t(plan.product.h.step);
  Im2colBox box = plan.forward.box[0];
  box.pixels = wgmma_depth;
  if (const int error = make_im2col_map(&maps.x, x, box)) return error;
  auto* partial = static_cast<float*>(workspace);
  const auto launch_as = [&](auto tag) {
    using T = typename decltype(tag)::type;
    return plan.rows == 64 ? launch_parts<T, 64>(plan, maps, partial, stream)
                           : launch_parts<T, 128>(plan, maps, partial, stream);
  };
  const int error =
      p.dtype == DType::bf16 ? launch_as(TypeTag<__nv_bfloat16>{}) : launch_as(TypeTag<__half>{});
  if (error != launch_ok) return error;
  return launch_sum_filters(c, plan.forward.packed, partial, plan.split.count, tensors.gw, stream);
}

}  // namespace

extern const ConvCudaKernel conv_sm90a_weight_gradient_cuda;
const ConvCudaKernel conv_sm90a_weight_gradient_cuda = {
    "gemm_sm90a", 90, 90, refuses, workspace_bytes, launch_weight_gradient};

}  // namespace pyseqnet
