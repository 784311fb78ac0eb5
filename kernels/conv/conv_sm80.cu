#include "conv/conv_sm80.cuh"

#include "conv/conv_sm80.h"

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
                static_cast<const Chunk16*>(filters), static_cast<const T*>(bias), static_cast<T*>(out), arg, g);
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
constexpr ConvCudaKernel product_sm80 = {"gemm_sm80",          80, 0, refuses<pass>, workspace_bytes<pass>,
                                         launch_pass<pass>};

}  // namespace

extern const ConvCudaKernel conv_sm80_forward_cuda, conv_sm80_input_gradient_cuda,
    conv_sm80_weight_gradient_cuda;
const ConvCudaKernel conv_sm80_forward_cuda = product_sm80<ConvPass::forward>;
const ConvCudaKernel conv_sm80_input_gradient_cuda = product_sm80<ConvPass::input_gradient>;
const ConvCudaKernel conv_sm80_weight_gradient_cuda = {
    "gemm_sm80", 80, 0, refuses<ConvPass::weight_gradient>, weight_workspace, launch_weight_gradient};

}  // namespace pyseqnet
