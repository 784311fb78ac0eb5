// Convolution as implicit matrix products on any CUDA device: every dtype, both layouts, both filter layouts,
// stride, padding, dilation, groups. The kernel is in conv_implicit_gemm.cuh; this file says what its
// matrices are:
//
//                     dense               gathered  rows    columns      depth
//   forward           w                   x         k       (n, p, q)    (c, r, s)
//   weight gradient   gy                  x         k       (c, r, s)    (n, p, q)
//   input gradient    w, group's filters  gy        c       (n, h, w)    (k, r, s)
//
// The input gradient gathers: every pixel sums its own taps, without atomics. Where the stride is more than
// 1, only every stride-th tap of a pixel meets an output, which ones depends on the pixel modulo the stride.
// The pixels are therefore taken residue by residue: within one it is a convolution of stride 1 over the taps
// that fit, and no product with nothing is formed.
//
// The weight gradient is short and narrow, and deep: its depth is split over blocks. Each writes its part to
// the workspace, sum_parts adds the parts in order. So is that of the other passes where they have less than
// half a block for each multiprocessor: a small batch of small images.
//
// Predicted before any measurement, for an H200 at 60 TFLOP/s, N32 C64 56x56 K64 3x3 pad 1 (7.4 GFLOP, 51
// MB), in every 16- and 32-bit type:
//   forward, input gradient: 175 us, 42 TFLOP/s (784 blocks, two rounds of 396);
//   weight gradient: 230 us, 32 TFLOP/s (1020 blocks in three rounds, 4.5 of 5 tiles filled; 30 MB of parts
//   written and read).
// Measured there, twice the batch: forward 31.5 TFLOP/s in bfloat16. The FMA peak itself measured 51 TFLOP/s,
// not 60, which explains most of the miss; the rest is open.
#include <numeric>
#include <type_traits>
#include <utility>

#include "conv/conv_implicit_gemm.cuh"

namespace pyseqnet {
namespace {

// The shortest part of a weight gradient's depth: a block's fixed cost is about that of 20 steps of eight.
constexpr int64_t shortest_part = 256;
// Forward and input gradient have many results, and each part of them costs a write and a read: they are
// split until there are about two blocks a multiprocessor, no further.
constexpr int64_t few_blocks = 264;

// Fills one axis; all extents and coordinates are below the limits of refuse_beyond_coordinates.
Axis axis(int64_t extent, int64_t h, int64_t w, int64_t offset, int64_t partner) {
  return {int(extent), int(h), int(w), offset, partner};
}

int64_t extent_of(const Axis (&a)[3]) { return int64_t(a[0].extent) * a[1].extent * a[2].extent; }

// The digits of the depth or column over channels and taps: neighbouring elements of the image come last.
template <class A>
void order_taps(Axis (&axes)[3], Layout layout, const A& channel, const A& r, const A& s) {
  const bool planes = layout == Layout::nchw;
  axes[0] = planes ? channel : r;
  axes[1] = planes ? r : s;
  axes[2] = planes ? s : channel;
}

// The forward pass. Its image and its digits are also those of the weight gradient.
ImplicitGemm forward_gemm(const ConvProblem& p) {
  const Strides xs = p.x_strides(), ys = p.y_strides(), ws = p.w_strides();
  ImplicitGemm g = {};
  g.column[0] = axis(p.N, 0, 0, xs.n, ys.n);
  g.column[1] = axis(p.P, p.stride_h, 0, p.stride_h * xs.h, ys.h);
  g.column[2] = axis(p.Q, 0, p.stride_w, p.stride_w * xs.w, ys.w);
  order_taps(g.depth, p.layout, axis(p.group_channels(), 0, 0, xs.c, ws.c),
             axis(p.R, p.dilation_h, 0, p.dilation_h * xs.h, ws.h),
             axis(p.S, 0, p.dilation_w, p.dilation_w * xs.w, ws.w));
  g.H = int(p.H), g.W = int(p.W);
  g.origin = {-p.pad_h * xs.h - p.pad_w * xs.w, -int(p.pad_h), -int(p.pad_w)};
  g.rows = p.group_filters();
  g.dense_row = ws.n, g.dense_group = g.rows * ws.n;
  g.out_row = ys.c, g.out_group = g.rows * ys.c;
  g.gathered_group = p.group_channels() * xs.c;
  return g;
}

// The same products summed over the pixels instead of the taps: columns and depths change places, and so do w
// and y.
ImplicitGemm weight_gradient_gemm(const ConvProblem& p) {
  ImplicitGemm g = forward_gemm(p);
  for (int i = 0; i < 3; i++) std::swap(g.column[i], g.depth[i]);
  std::swap(g.dense_row, g.out_row);
  std::swap(g.dense_group, g.out_group);
  return g;
}

ResidueAxis residue_axis(int64_t pixels, int64_t taps, int64_t stride, int64_t pad, int64_t dilation,
                         int64_t gathered, int64_t out, int64_t dense) {
  const int64_t count = pixels < stride ? pixels : stride;
  return {int(count),
          int(stride),
          int(pad),
          int(dilation),
          int(pixels),
          int(taps),
          int(stride / std::gcd(stride, dilation)),
          gathered,
          out,
          dense};
}

ImplicitGemm input_gradient_gemm(const ConvProblem& p) {
  const Strides xs = p.x_strides(), ys = p.y_strides(), ws = p.w_strides();
  ImplicitGemm g = {};
  g.by_residue = true;
  g.residue_h = residue_axis(p.H, p.R, p.stride_h, p.pad_h, p.dilation_h, ys.h, xs.h, ws.h);
  g.residue_w = residue_axis(p.W, p.S, p.stride_w, p.pad_w, p.dilation_w, ys.w, xs.w, ws.w);
  // Extents of the largest residue. From one pixel of a residue to the next it is one output; from one of its
  // taps to the next, tap_step * dilation / stride outputs back.
  const int64_t back_h = g.residue_h.tap_step * p.dilation_h / p.stride_h;
  const int64_t back_w = g.residue_w.tap_step * p.dilation_w / p.stride_w;
  g.column[0] = axis(p.N, 0, 0, ys.n, xs.n);
  g.column[1] = axis(ceil_div(p.H, p.stride_h), 1, 0, ys.h, p.stride_h * xs.h);
  g.column[2] = axis(ceil_div(p.W, p.stride_w), 0, 1, ys.w, p.stride_w * xs.w);
  order_taps(g.depth, p.layout, axis(p.group_filters(), 0, 0, ys.c, ws.n),
             axis(p.R, -back_h, 0, -back_h * ys.h, g.residue_h.tap_step * ws.h),
             axis(p.S, 0, -back_w, -back_w * ys.w, g.residue_w.tap_step * ws.w));
  g.H = int(p.P), g.W = int(p.Q);
  g.rows = p.group_channels();
  g.dense_row = ws.c, g.dense_group = p.group_filters() * ws.n;
  g.out_row = xs.c, g.out_group = g.rows * xs.c;
  g.gathered_group = p.group_filters() * ys.c;
  return g;
}

// A filled-in product, and what its launch needs to know beside it.
struct GemmPlan {
  ImplicitGemm gemm;
  int row_groups;
  bool gathered_along_depth, dense_along_depth;
  int64_t results;  // elements of the output
  double blocks;
};

GemmPlan plan_gemm(ConvPass pass, const ConvProblem& problem) {
  const ConvProblem p = simplified(problem);
  const bool planes = p.layout == Layout::nchw, filter_planes = p.filter_layout == Layout::nchw;
  GemmPlan plan = {};
  ImplicitGemm& g = plan.gemm;
  if (pass == ConvPass::forward) {
    g = forward_gemm(p);
    plan.gathered_along_depth = !planes;
    plan.dense_along_depth = true;
    plan.results = p.N * p.K * p.P * p.Q;
  } else if (pass == ConvPass::input_gradient) {
    g = input_gradient_gemm(p);
    plan.gathered_along_depth = !planes;
    plan.dense_along_depth = filter_planes;
    plan.results = p.N * p.C * p.H * p.W;
  } else {
    g = weight_gradient_gemm(p);
    plan.gathered_along_depth = plan.dense_along_depth = planes;
    plan.results = p.K * p.group_channels() * p.R * p.S;
  }
  const bool wide = p.dtype == DType::f64;
  const int64_t low_rows = GemmTile<float, 1>::rows;
  plan.row_groups = wide || g.rows > low_rows ? 2 : 1;
  const int64_t tile_rows = wide                   ? GemmTile<double, 2>::rows
                            : plan.row_groups == 2 ? GemmTile<float, 2>::rows
                                                   : low_rows;
  const int64_t tile_columns = wide ? GemmTile<double, 2>::columns : GemmTile<float, 2>::columns;
  const int64_t row_tiles = ceil_div(g.rows, tile_rows);
  const int64_t column_tiles = ceil_div(extent_of(g.column), tile_columns);
  const int64_t residues = g.by_residue ? int64_t(g.residue_h.count) * g.residue_w.count : 1;
  const double blocks = double(row_tiles) * double(column_tiles) * double(p.groups) * double(residues);
  Split split = {1, extent_of(g.depth)};
  if (pass == ConvPass::weight_gradient)
    split =
        split_reduction(extent_of(g.depth), row_tiles * column_tiles * p.groups, shortest_part, step_depth);
  else if (blocks < double(few_blocks))
    split = split_reduction(extent_of(g.depth), int64_t(blocks), shortest_part, step_depth, few_blocks);
  plan.blocks = blocks * double(split.count);
  g.row_tiles = unsigned(row_tiles), g.column_tiles = unsigned(column_tiles), g.groups = unsigned(p.groups);
  g.parts = unsigned(split.count), g.part_depths = split.length;
  g.accumulators_out = split.count > 1;
  g.part_stride = g.accumulators_out ? plan.results : 0;
  return plan;
}

template <ConvPass pass>
Refusal refuses(const ConvProblem& p) {
  if (const Refusal why = refuse_beyond_coordinates(simplified(p))) return why;
  const GemmPlan plan = plan_gemm(pass, p);
  return plan.results > 0 && plan.blocks > double(grid_limit) ? "more tiles than a grid has blocks"
                                                              : accepted;
}

template <ConvPass pass>
int64_t workspace_bytes(const ConvProblem& p) {
  const GemmPlan plan = plan_gemm(pass, p);
  return parts_bytes(p.dtype, plan.gemm.parts, plan.results);
}

template <class T, int row_groups>
auto kernel_of(const GemmPlan& plan) {
  if (plan.gathered_along_depth)
    return plan.dense_along_depth ? implicit_gemm<T, row_groups, true, true>
                                  : implicit_gemm<T, row_groups, true, false>;
  return plan.dense_along_depth ? implicit_gemm<T, row_groups, false, true>
                                : implicit_gemm<T, row_groups, false, false>;
}

template <ConvPass pass>
int launch_pass(const ConvProblem& p, const ConvTensors& tensors, void* workspace, void* stream) {
  const GemmPlan plan = plan_gemm(pass, p);
  if (plan.results == 0) return launch_ok;
  const bool split = plan.gemm.accumulators_out;
  void* result = pass == ConvPass::forward          ? tensors.y
                 : pass == ConvPass::input_gradient ? tensors.gx
                                                    : tensors.gw;
  return dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto* dense = static_cast<const T*>(pass == ConvPass::weight_gradient ? tensors.gy : tensors.w);
    const auto* gathered = static_cast<const T*>(pass == ConvPass::input_gradient ? tensors.gy : tensors.x);
    const auto* bias = static_cast<const T*>(pass == ConvPass::forward ? tensors.bias : nullptr);
    auto kernel = kernel_of<T, 2>(plan);
    if constexpr (!std::is_same_v<T, double>)
      if (plan.row_groups == 1) kernel = kernel_of<T, 1>(plan);
    const int error =
        launch({.grid = dim3(unsigned(plan.blocks)), .block = dim3(gemm_threads), .stream = stream}, kernel,
               dense, gathered, bias, split ? workspace : result, plan.gemm);
    if (error != launch_ok || !split) return error;
    return launch_sum_parts<T>(workspace, result, plan.results, plan.gemm.parts, stream);
  });
}

template <ConvPass pass>
constexpr ConvCudaKernel gemm_generic = {"gemm_generic",   80, 0, refuses<pass>, workspace_bytes<pass>,
                                         launch_pass<pass>};

}  // namespace

extern const ConvCudaKernel conv_gemm_forward_cuda, conv_gemm_input_gradient_cuda,
    conv_gemm_weight_gradient_cuda;
const ConvCudaKernel conv_gemm_forward_cuda = gemm_generic<ConvPass::forward>;
const ConvCudaKernel conv_gemm_input_gradient_cuda = gemm_generic<ConvPass::input_gradient>;
const ConvCudaKernel conv_gemm_weight_gradient_cuda = gemm_generic<ConvPass::weight_gradient>;

}  // namespace pyseqnet
