// Convolution on tensor cores from sm_80 on, in bfloat16, float16 and, where torch allows TF32, float32: every
// stride, padding, dilation, group and channel count, both layouts. The kernels are in conv_sm80.cuh and
// conv_weight_sm80.cuh; this file says what their operands are, and how wide a tile is.
//
//                     rows            columns         depth        operands
//   forward           pixels of y     filters         r, s, c      x gathered, w as (k, r, s, c)
//   input gradient    pixels of x     channels        r, s, k      gy gathered, w turned to (c, r, s, k)
//   weight gradient   filters         r, s, channels  pixels       gy, x gathered
//
// All operands are read as chunks of 16 bytes of neighbouring channels, which NHWC with a multiple of eight
// (float: four) channels is. NCHW and other channel counts are packed into that form first (conv_pack.h): a
// gather by elements would be paid again by every tile of filters, and by every tap, while packing costs two
// accesses an element, once. Results in NCHW are stored directly, pixels across the lanes. Few channels are
// packed as runs of taps x channels: of ResNet-50's first layer 21 of 24 values of depth are real.
//
// Bound: mma.sync issue for 3x3 layers, memory for 1x1. Counted for ResNet-50, bfloat16 NHWC, batch 64, and
// predicted before any measurement for an H200 at 350 TFLOP/s (mma.sync reaches about 0.6 of wgmma's rate
// there) and 4.2 TB/s, forward:
//   64 -> 64, 3x3, 56x56       14.8 GFLOP   51 MB   42 us (12 by memory)
//   64 -> 256, 1x1, 56x56       6.6 GFLOP  128 MB   31 us (19 by issue)
//   128 -> 128, 3x3, 28x28     14.8 GFLOP   26 MB   42 us
//   256 -> 256, 3x3, 14x14     14.8 GFLOP   14 MB   48 us (196 tiles on 264 places)
//   512 -> 512, 3x3, 7x7       14.8 GFLOP   11 MB   52 us (tiles of 64 columns, for there to be 200)
//   3 -> 64, 7x7 / 2, 224x224  17.3 GFLOP  276 MB   66 us (25 of them packing: 96 MB)
// Input gradients cost the same and a packing of the filters (2 to 4 us); at stride 2 a residue of pixels has
// a quarter of the taps, so no more than forward. Weight gradients cost the same and their parts: 264 blocks
// in float32, at most 34 MB written and read, 16 us.
#include "conv/conv_sm80.cuh"
#include "conv/conv_sm80.h"
#include "conv/conv_weight_sm80.cuh"

namespace pyseqnet {
namespace {

// Two blocks on each of 132 multiprocessors.
constexpr int64_t device_blocks = 264;

// Where the operands of forward and input gradient lie in the workspace, if they must be packed.
struct ProductPlan {
  ConvProblem conv;  // simplified
  PackedConv packed;
  bool pack_image, pack_filters;
  PackPlan image, filters;
  int64_t image_at = 0, filters_at = 0;
  WorkspacePlan workspace;

  ProductPlan(ConvPass pass, const ConvProblem& p)
      : conv(simplified(p)), packed(packed_conv(conv, pass == ConvPass::forward)) {
    const bool forward = pass == ConvPass::forward;
    pack_image = forward ? packed.pack_x : packed.pack_gy;
    pack_filters = !forward || packed.pack_w;
    image = forward ? pyseqnet::pack_image(conv, packed) : pack_output(conv, packed);
    filters = forward ? pyseqnet::pack_filters(conv, packed) : pack_filters_turned(conv, packed);
    if (pack_image) image_at = workspace.take(image.bytes());
    if (pack_filters) filters_at = workspace.take(filters.bytes());
  }
};

// Wide tiles read less; narrow ones waste less of a narrow product, and there are more of them.
int tile_columns(int64_t columns, int64_t row_tiles) {
  if (columns <= 32) return 32;
  const int64_t wide = ceil_div(columns, 128), narrow = ceil_div(columns, 64);
  if (narrow == 1 || row_tiles * wide < device_blocks / 2) return 64;
  return 2 * wide > narrow && narrow < 5 ? 64 : 128;  // up to a fifth of the columns may be padding
}

template <class T, int columns>
int launch_tiles(GatheredProduct g, int64_t row_tiles, const void* image, const void* filters,
                 const void* bias, void* out, uint8_t* arg, void* stream) {
  using Tile = ProductTile<columns>;
  const int64_t column_tiles = ceil_div(g.columns, columns);
  g.column_tiles = unsigned(column_tiles), g.row_tiles = unsigned(row_tiles);
  return launch({.grid = dim3(unsigned(column_tiles * row_tiles * g.groups * residues_of(g))),
                 .block = dim3(Tile::threads),
                 .dynamic_shared_bytes = Tile::shared_bytes,
                 .stream = stream},
                gathered_product<T, columns>, static_cast<const Chunk16*>(image),
                static_cast<const Chunk16*>(filters), static_cast<const T*>(bias), static_cast<T*>(out), arg,
                g);
}

int64_t row_tiles_of(const GatheredProduct& g) {
  const int64_t taps = g.by_residue ? 1 : int64_t(g.h.window) * g.w.window;
  return ceil_div(windows_of(g), product_rows / taps);
}

// The weight gradient's operands and its parts in the workspace.
struct WeightPlan {
  ConvProblem conv;
  PackedConv packed;
  PackPlan image, gy;
  int64_t image_at = 0, gy_at = 0, partial_at = 0;
  int rows;  // of a tile
  Split split;
  WorkspacePlan workspace;
  WeightProduct product = {};

  explicit WeightPlan(const ConvProblem& p) : conv(simplified(p)), packed(packed_conv(conv, true)) {
    const ConvProblem& c = packed.conv;
    image = pack_image(conv, packed), gy = pack_output(conv, packed);
    if (packed.pack_x) image_at = workspace.take(image.bytes());
    if (packed.pack_gy) gy_at = workspace.take(gy.bytes());
    const int64_t chunk = chunk_bytes / bytes_of(p.dtype);
    rows = conv.group_filters() <= 64 ? 64 : 128;
    WeightProduct& g = product;
    g.rows = int(conv.group_filters()), g.columns = int(c.R * c.S * packed.x_chunks);
    g.chunks = int(packed.x_chunks), g.taps_w = int(c.S);
    g.H = int(c.H), g.W = int(c.W), g.P = int(c.P), g.Q = int(c.Q);
    g.stride_h = int(c.stride_h), g.stride_w = int(c.stride_w);
    g.dilation_h = int(c.dilation_h), g.dilation_w = int(c.dilation_w);
    g.pad_h = int(c.pad_h), g.pad_w = int(c.pad_w);
    g.row_chunks = int(packed.y_chunks);
    g.image_pixel = unsigned(packed.x_chunks * c.groups);
    g.image_row = unsigned(c.W) * g.image_pixel, g.image_n = unsigned(c.H) * g.image_row;
    g.gy_pixel = unsigned(packed.y_chunks * c.groups);
    const int64_t row_tiles = ceil_div(g.rows, rows), column_tiles = ceil_div(g.columns * chunk, 128);
    g.row_tiles = unsigned(row_tiles), g.column_tiles = unsigned(column_tiles), g.groups = unsigned(c.groups);
    g.pixels = c.N * c.P * c.Q;
    // A part is worth its write and read: at least as many steps as the ring has stages.
    const int64_t depth = 8 * chunk;
    split = split_reduction(g.pixels, row_tiles * column_tiles * c.groups, (ring_stages + 1) * depth, depth,
                            device_blocks);
    g.part_pixels = split.length;
    g.part_stride = conv.K * g.columns * chunk;
    partial_at = workspace.take(split.count * g.part_stride * int64_t(sizeof(float)));
  }
};

template <class T, int rows>
int launch_parts(const WeightPlan& plan, const void* gy, const void* image, float* partial, void* stream) {
  using Tile = WeightTile<T, rows>;
  const WeightProduct& g = plan.product;
  const double blocks = double(g.row_tiles) * g.column_tiles * g.groups * double(plan.split.count);
  return launch({.grid = dim3(unsigned(blocks)),
                 .block = dim3(Tile::threads),
                 .dynamic_shared_bytes = Tile::shared_bytes,
                 .stream = stream},
                weight_product<T, rows>, static_cast<const Chunk16*>(gy), static_cast<const Chunk16*>(image),
                partial, g);
}

int64_t weight_workspace(const ConvProblem& p) { return WeightPlan(p).workspace.bytes(); }

int launch_weight_gradient(const ConvProblem& p, const ConvTensors& tensors, void* workspace, void* stream) {
  const WeightPlan plan(p);
  char* memory = static_cast<char*>(workspace);
  const void *image = tensors.x, *gy = tensors.gy;
  int error = launch_ok;
  if (plan.packed.pack_x) {
    error = launch_pack(p.dtype, plan.image, image, memory + plan.image_at, stream);
    image = memory + plan.image_at;
  }
  if (error == launch_ok && plan.packed.pack_gy) {
    error = launch_pack(p.dtype, plan.gy, gy, memory + plan.gy_at, stream);
    gy = memory + plan.gy_at;
  }
  if (error != launch_ok) return error;
  auto* partial = reinterpret_cast<float*>(memory + plan.partial_at);
  error = dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if constexpr (std::is_same_v<T, double>)
      return -1;  // refused
    else
      return plan.rows == 64 ? launch_parts<T, 64>(plan, gy, image, partial, stream)
                             : launch_parts<T, 128>(plan, gy, image, partial, stream);
  });
  if (error != launch_ok) return error;
  return launch_sum_filters(plan.conv, plan.packed, partial, plan.split.count, tensors.gw, stream);
}

template <ConvPass pass>
Refusal refuses(const ConvProblem& given) {
  if (const Refusal why = refuse_tensor_cores(given)) return why;
  double blocks;
  if constexpr (pass == ConvPass::weight_gradient) {
    const WeightPlan plan(given);
    const WeightProduct& g = plan.product;
    blocks = double(g.row_tiles) * g.column_tiles * g.groups * double(plan.split.count);
  } else {
    const ProductPlan plan(pass, given);
    const GatheredProduct g = gathered_product_of(pass, plan.conv, plan.packed);
    blocks = double(row_tiles_of(g)) * double(ceil_div(g.columns, 32)) * g.groups * double(residues_of(g));
  }
  return blocks > double(grid_limit) ? "more tiles than a grid has blocks" : accepted;
}

}  // namespace

int64_t product_workspace_sm80(ConvPass pass, const ConvProblem& p) {
  return ProductPlan(pass, p).workspace.bytes();
}

int launch_product_sm80(ConvPass pass, const ConvProblem& p, const ConvTensors& tensors,
                        const ConvEpilogue& epilogue, void* workspace, void* stream) {
  const ProductPlan plan(pass, p);
  const bool forward = pass == ConvPass::forward;
  char* memory = static_cast<char*>(workspace);
  const void *image = forward ? tensors.x : tensors.gy, *filters = tensors.w;
  int error = launch_ok;
  if (plan.pack_image) {
    error = launch_pack(p.dtype, plan.image, image, memory + plan.image_at, stream);
    image = memory + plan.image_at;
  }
  if (error == launch_ok && plan.pack_filters) {
    error = launch_pack(p.dtype, plan.filters, filters, memory + plan.filters_at, stream);
    filters = memory + plan.filters_at;
  }
  if (error != launch_ok) return error;
  const GatheredProduct g = gathered_product_of(pass, plan.conv, plan.packed, epilogue);
  const int64_t row_tiles = row_tiles_of(g);
  const int columns = tile_columns(g.columns, row_tiles * int64_t(g.groups) * residues_of(g));
  void* out = forward ? tensors.y : tensors.gx;
  const void* bias = forward ? tensors.bias : nullptr;
  return dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if constexpr (std::is_same_v<T, double>) {
      return -1;  // refused
    } else {
      const auto kernel = columns == 32   ? launch_tiles<T, 32>
                          : columns == 64 ? launch_tiles<T, 64>
                                          : launch_tiles<T, 128>;
      return kernel(g, row_tiles, image, filters, bias, out, epilogue.arg, stream);
    }
  });
}

namespace {

template <ConvPass pass>
int64_t workspace_bytes(const ConvProblem& p) {
  return product_workspace_sm80(pass, p);
}
template <ConvPass pass>
int launch_pass(const ConvProblem& p, const ConvTensors& tensors, void* workspace, void* stream) {
  return launch_product_sm80(pass, p, tensors, {}, workspace, stream);
}
template <ConvPass pass>
constexpr ConvCudaKernel product_sm80 = {"gemm_sm80",      80, 0, refuses<pass>, workspace_bytes<pass>,
                                         launch_pass<pass>};

}  // namespace

extern const ConvCudaKernel conv_sm80_forward_cuda, conv_sm80_input_gradient_cuda,
    conv_sm80_weight_gradient_cuda;
const ConvCudaKernel conv_sm80_forward_cuda = product_sm80<ConvPass::forward>;
const ConvCudaKernel conv_sm80_input_gradient_cuda = product_sm80<ConvPass::input_gradient>;
const ConvCudaKernel conv_sm80_weight_gradient_cuda = {
    "gemm_sm80", 80, 0, refuses<ConvPass::weight_gradient>, weight_workspace, launch_weight_gradient};

}  // namespace pyseqnet
