// Forward and input gradient on Hopper, in bfloat16 and float16, channels last, channels in whole chunks of 16
// bytes and more than 32 (fewer would leave half of each stage empty: conv_sm80.cu puts several taps there).
// The kernel is in conv_sm90a.cuh. The input gradient is the forward product of gy with filters turned to
// (c, r, s, k); at stride 2 one of each residue of pixels. What TMA's im2col mode cannot express (padding and
// dilation of more than about 128 pixels, strides above 8) is refused, and falls to conv_sm80.cu.
//
// Bound: memory for 1x1 layers, the second-level cache for 3x3. A stage of 128 pixels x 128 filters x 64
// channels is 32 KiB for 2.1 MFLOP, every byte of it read from L2, of whose about 5.5 TB/s a multiprocessor gets
// 24 bytes a clock: 1340 clocks a stage, 350 TFLOP/s, while wgmma needs 512. Tiles of 64 filters: 24 KiB for
// 1.05 MFLOP, 240 TFLOP/s. Counted for ResNet-50, bfloat16, batch 64, and predicted before any measurement
// for an H200 (4.2 TB/s of memory), forward; the input gradient is the same and 3 us of turning filters:
//   64 -> 64, 3x3, 56x56     14.8 GFLOP   51 MB   62 us, L2
//   64 -> 256, 1x1, 56x56     6.6 GFLOP  128 MB   31 us, memory
//   128 -> 128, 3x3, 28x28   14.8 GFLOP   26 MB   43 us, L2 (392 tiles, three turns of 132 blocks)
//   256 -> 256, 3x3, 14x14   14.8 GFLOP   14 MB   56 us, L2 (196 tiles: two turns, 74 % filled)
//   512 -> 512, 3x3, 7x7     14.8 GFLOP   11 MB   56 us, L2 (100 tiles of 72 stages)
#include "conv/conv_sm90a.cuh"

namespace pyseqnet {
namespace {

// One block on each multiprocessor.
constexpr unsigned device_blocks = 132;

template <ConvPass pass>
Refusal refuses(const ConvProblem& p) {
  if (p.dtype != DType::bf16 && p.dtype != DType::f16) return "only 16-bit types have this kernel";
  if (const Refusal why = refuse_tensor_cores(p)) return why;
  const WgmmaPlan plan(pass, p);
  if (p.layout != Layout::nhwc && plan.conv.H * plan.conv.W * plan.conv.P * plan.conv.Q > 1)
    return "results in NCHW";
  if (pass == ConvPass::forward ? plan.packed.pack_x : plan.packed.pack_gy)
    return "channels that do not fill chunks of 16 bytes, or begin off one";
  const int64_t channels = plan.product.group_channels;
  if (channels <= wgmma_depth / 2) return "channels would fill less than half of each stage";
  if (p.groups > 1 && channels % wgmma_depth) return "stages would hold channels of two groups";
  if (plan.refusal) return plan.refusal;
  double tiles = 0;
  for (int i = 0; i < plan.residues; i++) tiles += plan.product.residue[i].row_tiles;
  return tiles * double(ceil_div(plan.product.columns, 64)) * double(p.groups) > double(grid_limit)
             ? "more tiles than are counted"
             : accepted;
}

template <ConvPass pass>
int64_t workspace_bytes(const ConvProblem& p) {
  const WgmmaPlan plan(pass, p);
  return plan.pack_filters ? plan.filters.bytes() : 0;
}

template <class T, int columns>
int launch_tiles(WgmmaProduct g, int residues, WgmmaMaps& maps, const TmaTensor& filters, const void* bias,
                 void* out, void* stream) {
  using Tile = WgmmaTile<columns>;
  if (const int error = make_tensor_map(&maps.filters, filters, {{wgmma_depth, 1, columns, 1, 1}}))
    return error;
  g.column_tiles = unsigned(ceil_div(g.columns, columns));
  g.tiles = 0;
  for (int i = 0; i < residues; i++) g.tiles += g.residue[i].row_tiles * g.column_tiles * g.groups;
  return launch({.grid = dim3(g.tiles < device_blocks ? g.tiles : device_blocks),
                 .block = dim3(wgmma_threads),
                 .dynamic_shared_bytes = Tile::shared_bytes,
                 .stream = stream},
                product_wgmma<T, columns>, maps, g, static_cast<const T*>(bias), static_cast<T*>(out));
}

template <ConvPass pass>
int launch_pass(const ConvProblem& p, const ConvTensors& tensors, void* workspace, void* stream) {
  const WgmmaPlan plan(pass, p);
  const ConvProblem& c = plan.conv;
  const bool forward = plan.forward;
  const void* filters = tensors.w;
  if (plan.pack_filters) {
    if (const int error = launch_pack(p.dtype, plan.filters, filters, workspace, stream)) return error;
    filters = workspace;
  }
  const auto extent = [](int64_t v) { return uint64_t(v); };
  TmaTensor image = forward ? nhwc_tensor(tensors.x, p.dtype, c.C, c.W, c.H, c.N)
                            : nhwc_tensor(tensors.gy, p.dtype, c.K, c.Q, c.P, c.N);
  WgmmaMaps maps = {};
  for (int i = 0; i < plan.residues; i++) {
    if (plan.product.residue[i].h.taps == 0) continue;
    image.step[1] = uint32_t(plan.product.residue[i].w.step);
    image.step[2] = uint32_t(plan.product.residue[i].h.step);
    if (const int error = make_im2col_map(&maps.image[i], image, plan.box[i])) return error;
  }
  const uint64_t depth = extent(plan.product.group_channels), taps = extent(c.R * c.S);
  TmaTensor of_filters;
  of_filters.data = filters, of_filters.type = p.dtype, of_filters.rank = 3;
  of_filters.extent[0] = depth, of_filters.extent[1] = taps;
  of_filters.extent[2] = extent(forward ? c.K : c.C);
  of_filters.stride_bytes[1] = 2 * depth, of_filters.stride_bytes[2] = 2 * depth * taps;
  const void* bias = forward ? tensors.bias : nullptr;
  void* out = forward ? tensors.y : tensors.gx;
  const auto launch_as = [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto kernel = plan.product.columns <= 64 ? launch_tiles<T, 64> : launch_tiles<T, 128>;
    return kernel(plan.product, plan.residues, maps, of_filters, bias, out, stream);
  };
  return p.dtype == DType::bf16 ? launch_as(TypeTag<__nv_bfloat16>{}) : launch_as(TypeTag<__half>{});
}

template <ConvPass pass>
constexpr ConvCudaKernel product_sm90a = {"gemm_sm90a",     90, 90, refuses<pass>, workspace_bytes<pass>,
                                          launch_pass<pass>};

}  // namespace

extern const ConvCudaKernel conv_sm90a_forward_cuda, conv_sm90a_input_gradient_cuda;
const ConvCudaKernel conv_sm90a_forward_cuda = product_sm90a<ConvPass::forward>;
const ConvCudaKernel conv_sm90a_input_gradient_cuda = product_sm90a<ConvPass::input_gradient>;

}  // namespace pyseqnet
