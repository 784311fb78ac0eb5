// Depthwise convolution (Chollet, 2017; groups = channels = filters) on the CPU: forward, input gradient,
// weight gradient; every stride, dilation and padding; planar and channels-last images.
//
// A depthwise filter never mixes channels, so channels are lanes: a tile holds VL channels of a part of an
// image, one vector a pixel (depthwise_tile.h), and every tap is one aligned load and one multiply-add, never
// shifted or masked (depthwise_taps.h).
// Planar images with few taps and stride 1 keep their columns in lanes (depthwise_planar.h): there
// transposing would cost more than the taps. Channels-last images need no tile (depthwise_channels.h), but
// for a last block of fewer channels.
//   forward           a tile of x, columns split by stride; rows of outputs in blocks of 8 sums.
//   input gradient    a pixel of gx meets the taps whose distance to it the stride divides: one set of taps
//                     for each phase of the stride, each a correlation of gy with stride 1.
//   weight gradient   tiles of x and gy; the sums of a run of taps stay in registers for a whole tile. Where
//                     there are too few channels to share out, groups of images are summed apart and meet in
//                     shared memory; what the groups are depends on the problem only.
// Bound: multiply-adds, 2 R S an output and pass, from about 5 x 5 taps on; below it the memory traffic.
#include "conv/depthwise_channels.h"
#include "conv/depthwise_planar.h"
#include "conv/depthwise_taps.h"
#include "conv/depthwise_tile.h"
#include "conv/depthwise_tiling.h"

namespace pyseqnet {
inline namespace PYSEQNET_ISA {
namespace {

// With fewer channels most lanes would be idle, and one channel is an ordinary convolution.
constexpr int64_t fewest_channels = 4;
// Items that the weight gradient wants at least, so that threads can share it.
constexpr int64_t wanted_items = 16;
// About 20 microseconds, in vector multiply-adds with their loads and stores.
constexpr int64_t grain_work = 40 * 1000;

Refusal refuses(const ConvProblem& p) {
  if (!p.depthwise()) return "not depthwise: groups, channels and filters differ";
  if (p.dtype == DType::f64) return "float64 is served by the reference";
  if (p.C < fewest_channels) return "fewer than 4 channels: lanes are channels";
  if (p.R < 1 || p.S < 1) return "an empty filter";
  return accepted;
}

// Whether whole blocks of channels are read straight from the tensor: not where 16-bit elements would be
// converted again for each of many taps.
template <class T>
bool reads_tensor(const ConvProblem& p) {
  constexpr int64_t few_taps = 9;
  return p.layout == Layout::nhwc && (sizeof(T) == 4 || p.R * p.S <= few_taps);
}

// Whether columns are lanes: few taps, stride 1, rows of several vectors, most of which no padding touches.
bool columns_are_lanes(const ConvProblem& p) {
  return p.layout == Layout::nchw && p.R * p.S <= most_planar_taps && p.stride_h == 1 && p.stride_w == 1 &&
         smaller(p.Q, p.W) >= 4 * VL;
}

// filter[r][position][lane] = w[c + lane][r][order[position]]; both filter layouts are K R S here.
template <class T>
void load_filter(const ConvProblem& p, const T* w, int64_t c, const int32_t* order, float* filter) {
  for (int64_t r = 0; r < p.R; r++)
    for (int64_t k = 0; k < p.S; k++) {
      float* to = filter + (r * p.S + k) * VL;
      const T* from = w + (c * p.R + r) * p.S + order[k];
      for (int64_t l = 0; l < VL; l++) to[l] = l < p.C - c ? to_float(from[l * p.R * p.S]) : 0.0f;
    }
}

void clear(float* p, int64_t count) {
  for (int64_t i = 0; i < count; i += VL) store(p + i, vf{});
}

// The inner loops read and write one line of memory a pixel, too far apart for the hardware to foresee; a row
// is fetched in order while the one before it is worked on.
template <bool write, class T>
PYSEQNET_INLINE void prefetch_pixels(const T* row, int64_t pixels, int64_t C, int64_t blocks) {
  constexpr int64_t line = 64 / sizeof(T);
  for (int64_t w = 0; w < pixels; w++)
    for (int64_t c = 0; c < blocks * VL; c += line) __builtin_prefetch(row + w * C + c, write, 3);
}

// Forward or input gradient of one rectangle of results of one channels-last image, `blocks` whole blocks of
// channels. Rows outside, blocks inside: a row of pixels is read in one stretch.
template <class T>
void correlate_channels(const ConvProblem& p, const Tiling& t, const Scratch& scratch, const Rectangle& out,
                        const T* x, const float* filter, const T* bias, int64_t blocks, T* y) {
  RowPair<T>* pairs = reinterpret_cast<RowPair<T>*>(scratch.pairs);
  const int64_t in_row = (t.transposed ? p.Q : p.W) * p.C;
  const Rectangle rows_in = {0, t.transposed ? p.P : p.H, 0, 0};
  for (int64_t h = out.h0; h < out.h1; h++) {
    if (h + 1 < out.h1) {
      const int64_t next = input_row(p, t, h + 1, t.transposed ? 0 : p.R - 1);
      if (next >= 0 && next < rows_in.h1)
        prefetch_pixels<false>(x + next * in_row, in_row / p.C, p.C, blocks);
      prefetch_pixels<true>(y + (h + 1) * t.W * p.C, t.W, p.C, blocks);
    }
    for (int64_t block = 0; block < blocks; block++) {
      int64_t rows = 0;
      for (int64_t r = 0; r < p.R; r++) {
        const int64_t row = input_row(p, t, h, r);
        if (row >= rows_in.h0 && row < rows_in.h1)
          pairs[rows++] = {x + row * in_row + block * VL, filter + (block * p.R + r) * p.S * VL};
      }
      const vf start = bias ? load_lanes(bias + block * VL) : vf{};
      for (int64_t f = 0; f < (t.transposed ? p.stride_w : 1); f++)
        correlate_channels_row(row_geometry(p, t, scratch, f, out), pairs, rows, start, p.C,
                               y + h * t.W * p.C + block * VL);
    }
  }
}

// Forward, or the input gradient if tiling.transposed, of one tile of results.
template <class T>
void correlate_tile(const ConvProblem& p, const Tiling& t, const Scratch& scratch, const Rectangle& out,
                    const Slice<const T>& x, const float* filter, vf start, const Slice<T>& y) {
  const Inputs in = inputs_of(p, t, out);
  place_columns(p, t, in.part, in.first, scratch.column);
  if (t.tiles() > 1) clear(scratch.tile, t.tile_rows * t.pitch);
  load_tile(x, in.part, scratch.column, t.pitch, scratch.tile);

  const int64_t columns = out.w1 - out.w0;
  int64_t collected = 0, first_row = out.h0;
  for (int64_t h = out.h0; h < out.h1; h++) {
    const int64_t rows = pair_rows(p, t, in, h, filter, scratch);
    float* row = scratch.results + collected * VL;
    if (t.transposed) {
      const int64_t start_column = floor_div(out.w0 + p.pad_w, p.stride_w);
      for (int64_t f = 0; f < p.stride_w; f++) {
        // Column w of phase f is position l = (w + pad_w - f) / stride_w.
        const int64_t l = ceil_div(out.w0 + p.pad_w - f, p.stride_w), w = l * p.stride_w + f - p.pad_w;
        const int64_t count = w < out.w1 ? (out.w1 - 1 - w) / p.stride_w + 1 : 0;
        const int64_t skipped = (l - start_column) * VL;
        for (int64_t r = 0; r < rows; r++) scratch.pairs[r].x += skipped;
        const Phase phase = scratch.phase(f);
        correlate_tile_row({scratch.pairs, rows, phase.runs, phase.count, VL}, start, count,
                           row + (w - out.w0) * VL, p.stride_w * VL);
        for (int64_t r = 0; r < rows; r++) scratch.pairs[r].x -= skipped;
      }
    } else {
      correlate_tile_row({scratch.pairs, rows, scratch.runs, scratch.begin[p.stride_w], VL}, start, columns,
                         row, VL);
    }
    collected += columns;
    if (collected >= collected_outputs || h + 1 == out.h1) {
      store_tile(scratch.results, {first_row, h + 1, out.w0, out.w1}, y);
      collected = 0, first_row = h + 1;
    }
  }
}

// Items: (blocks of channels, image, tile), tiles fastest, so that a range seldom changes its filters.
WorkPlan plan_correlation(const ConvProblem& p, ConvPass pass) {
  const Tiling t(p, pass == ConvPass::input_gradient);
  WorkPlan plan;
  const int64_t work = t.rows.band * t.columns.band * (p.R * p.S + 8);
  plan.add_phase(block_groups(p) * p.N * t.tiles(),
                 larger(1, grain_work / larger(1, work * blocks_at_once(p))));
  plan.thread_bytes = Scratch(p, t, pass, nullptr).bytes;
  return plan;
}

// Forward or input gradient of a rectangle of results of one plane, columns in lanes.
template <class T>
void correlate_plane(const ConvProblem& p, const Tiling& t, const Rectangle& out, const T* in, const T* w,
                     float start, T* results) {
  float weight[most_planar_taps];
  const int64_t taps = p.R * p.S;
  for (int64_t k = 0; k < taps; k++) weight[k] = to_float(w[t.transposed ? taps - 1 - k : k]);
  const PlanarCorrelation<T> plane = {in,
                                      t.transposed ? p.P : p.H,
                                      t.transposed ? p.Q : p.W,
                                      results,
                                      t.W,
                                      weight,
                                      p.R,
                                      p.S,
                                      t.transposed ? t.reach_h - p.pad_h : p.pad_h,
                                      t.transposed ? t.reach_w - p.pad_w : p.pad_w,
                                      p.dilation_h,
                                      p.dilation_w,
                                      start};
  for (int64_t h = out.h0; h < out.h1; h++) planar_row(plane, h, out.w0, out.w1);
}

template <class T>
PYSEQNET_INLINE void run_correlation(const ConvProblem& p, const T* x, const T* w, const T* bias, T* y,
                                     bool transposed, const WorkSlice& slice) {
  const ConvPass pass = transposed ? ConvPass::input_gradient : ConvPass::forward;
  const Tiling t(p, transposed);
  Scratch scratch(p, t, pass, slice.scratch);
  plan_runs(p, t, scratch);
  clear(scratch.tile, t.tile_rows * t.pitch);
  const int64_t H = transposed ? p.P : p.H, W = transposed ? p.Q : p.W;
  const int64_t together = blocks_at_once(p), taps = p.R * p.S * VL;
  const bool planar = columns_are_lanes(p);
  int64_t loaded = -1;
  for (int64_t item = slice.begin; item < slice.end; item++) {
    const int64_t tile = item % t.tiles(), n = item / t.tiles() % p.N, group = item / t.tiles() / p.N;
    const int64_t first = group * together, end = smaller(channel_blocks(p), first + together);
    if (planar) {
      for (int64_t c = first * VL; c < smaller(p.C, end * VL); c++)
        correlate_plane(p, t, t.results(tile), x + (n * p.C + c) * H * W, w + c * p.R * p.S,
                        bias ? to_float(bias[c]) : 0.0f, y + (n * p.C + c) * t.H * t.W);
      continue;
    }
    for (int64_t block = first; block < end && group != loaded; block++)
      load_filter(p, w, block * VL, scratch.order, scratch.filter + (block - first) * taps);
    loaded = group;
    const int64_t direct = reads_tensor<T>(p) ? smaller(end, p.C / VL) : first;
    if (direct > first)
      correlate_channels<T>(p, t, scratch, t.results(tile), x + n * H * W * p.C + first * VL, scratch.filter,
                            bias ? bias + first * VL : nullptr, direct - first,
                            y + n * t.H * t.W * p.C + first * VL);
    for (int64_t block = direct; block < end; block++) {
      const int64_t c = block * VL;
      const vf start = bias ? load_between(bias + c, 0, p.C - c, vf{}) : vf{};
      correlate_tile<T>(p, t, scratch, t.results(tile), slice_of(x, p.layout, n, c, p.C, H, W),
                        scratch.filter + (block - first) * taps, start,
                        slice_of(y, p.layout, n, c, p.C, t.H, t.W));
    }
  }
}

WorkPlan plan_forward(const ConvProblem& p) { return plan_correlation(p, ConvPass::forward); }
void run_forward(const ConvProblem& p, const ConvTensors& t, const WorkSlice& slice) {
  with_element(p.dtype, [&](auto element) PYSEQNET_LAMBDA {
    using T = decltype(element);
    run_correlation(p, static_cast<const T*>(t.x), static_cast<const T*>(t.w), static_cast<const T*>(t.bias),
                    static_cast<T*>(t.y), false, slice);
  });
}

WorkPlan plan_input_gradient(const ConvProblem& p) { return plan_correlation(p, ConvPass::input_gradient); }
void run_input_gradient(const ConvProblem& p, const ConvTensors& t, const WorkSlice& slice) {
  with_element(p.dtype, [&](auto element) PYSEQNET_LAMBDA {
    using T = decltype(element);
    run_correlation(p, static_cast<const T*>(t.gy), static_cast<const T*>(t.w),
                    static_cast<const T*>(nullptr), static_cast<T*>(t.gx), true, slice);
  });
}

// ---- weight gradient

// Images are summed in this many groups, so that a few channels still make work for several threads.
int64_t image_groups(const ConvProblem& p) {
  return larger(1, smaller(p.N, ceil_div(wanted_items, block_groups(p))));
}

WorkPlan plan_weight_gradient(const ConvProblem& p) {
  const Tiling t(p, false);
  const int64_t groups = image_groups(p), items = block_groups(p) * groups;
  const int64_t work = p.N * p.P * p.Q / groups * blocks_at_once(p) * (p.R * p.S + 16);
  WorkPlan plan;
  plan.add_phase(items, larger(1, grain_work / larger(1, work)));
  if (groups > 1) {
    plan.add_phase(channel_blocks(p), larger(1, grain_work / (groups * p.R * p.S * VL)));
    plan.shared_bytes = align_up(items * blocks_at_once(p) * p.R * p.S * VL * int64_t(sizeof(float)));
  }
  plan.thread_bytes = Scratch(p, t, ConvPass::weight_gradient, nullptr).bytes;
  return plan;
}

// Output rows of a rectangle whose tap r lies inside the image.
struct OutputRows {
  int64_t begin, end;
};
OutputRows rows_of_tap(const ConvProblem& p, const Rectangle& out, int64_t r) {
  const int64_t before = p.pad_h - r * p.dilation_h;
  return {larger(out.h0, ceil_div(before, p.stride_h)),
          smaller(out.h1, floor_div(p.H - 1 + before, p.stride_h) + 1)};
}

// Adds one tile of outputs of one image to sums [r][position][lane].
template <class T>
void gradient_of_tile(const ConvProblem& p, const Tiling& t, const Scratch& scratch, const Rectangle& out,
                      const Slice<const T>& x, const Slice<const T>& gy, float* sums) {
  const Inputs in = inputs_of(p, t, out);
  place_columns(p, t, in.part, in.first, scratch.column);
  if (t.tiles() > 1) clear(scratch.tile, t.tile_rows * t.pitch);
  load_tile(x, in.part, scratch.column, t.pitch, scratch.tile);
  const int64_t columns = out.w1 - out.w0, pitch = columns * VL;
  for (int64_t q = 0; q < columns; q++) scratch.gradient_column[q] = q * VL;
  load_tile(gy, out, scratch.gradient_column, pitch, scratch.gradient_tile);

  for (int64_t r = 0; r < p.R; r++) {
    const auto [i0, i1] = rows_of_tap(p, out, r);
    if (i0 >= i1) continue;
    const float* rows = scratch.tile + (input_row(p, t, i0, r) - in.part.h0) * t.pitch;
    for (int64_t k = 0; k < scratch.begin[p.stride_w]; k++) {
      const Run& run = scratch.runs[k];
      gradient_of_run<float>(run.length,
                             {rows + run.offset, scratch.gradient_tile + (i0 - out.h0) * pitch, VL,
                              p.stride_h * t.pitch, VL, pitch, i1 - i0, columns},
                             sums + (r * p.S + run.first) * VL);
    }
  }
}

// The same for whole blocks of channels of a channels-last image.
template <class T>
void gradient_of_channels(const ConvProblem& p, const Tiling& t, const Scratch& scratch, const Rectangle& out,
                          const T* x, const T* gy, float* sums) {
  const RowGeometry geometry = row_geometry(p, t, scratch, 0, out);
  const int64_t x_row = p.W * p.C, g_row = p.Q * p.C;
  for (int64_t r = 0; r < p.R; r++) {
    const OutputRows rows = rows_of_tap(p, out, r);
    if (rows.begin >= rows.end) continue;
    for (int64_t k = 0; k < geometry.run_count; k++)
      gradient_of_channels_run(geometry, geometry.runs[k], x + input_row(p, t, rows.begin, r) * x_row,
                               p.stride_h * x_row, gy + rows.begin * g_row, g_row, rows.end - rows.begin, p.C,
                               sums + (r * p.S + geometry.runs[k].first) * VL);
  }
}

// The same for a block of planes, columns in lanes.
template <class T>
void gradient_of_planes(const ConvProblem& p, const Rectangle& out, const T* x, const T* gy, int64_t planes,
                        float* sums) {
  for (int64_t l = 0; l < planes; l++, x += p.H * p.W, gy += p.P * p.Q)
    for (int64_t r = 0; r < p.R; r++) {
      const OutputRows rows = rows_of_tap(p, out, r);
      if (rows.begin >= rows.end) continue;
      const int64_t row = rows.begin - p.pad_h + r * p.dilation_h;
      planar_gradient(p.S, x + row * p.W, p.W, p.W, p.pad_w, p.dilation_w, gy + rows.begin * p.Q, p.Q,
                      rows.end - rows.begin, out.w0, out.w1, sums + r * p.S * VL + l, VL);
    }
}

template <class T>
void store_filter_gradient(const ConvProblem& p, const float* sums, const int32_t* order, int64_t c, T* gw) {
  const int64_t channels = smaller(VL, p.C - c);
  for (int64_t r = 0; r < p.R; r++)
    for (int64_t k = 0; k < p.S; k++)
      for (int64_t l = 0; l < channels; l++)
        round_to(gw[((c + l) * p.R + r) * p.S + order[k]], sums[(r * p.S + k) * VL + l]);
}

template <class T>
PYSEQNET_INLINE void run_weight_gradient_of(const ConvProblem& p, const T* x, const T* gy, T* gw,
                                            const WorkSlice& slice) {
  const Tiling t(p, false);
  Scratch scratch(p, t, ConvPass::weight_gradient, slice.scratch);
  plan_runs(p, t, scratch);
  const int64_t groups = image_groups(p), together = blocks_at_once(p), taps = p.R * p.S * VL;
  float* partial = reinterpret_cast<float*>(slice.shared);  // [block group][image group][block][taps]
  if (slice.phase == 1) {
    for (int64_t block = slice.begin; block < slice.end; block++) {
      const float* first = partial + (block / together * groups * together + block % together) * taps;
      clear(scratch.sums, taps);
      for (int64_t g = 0; g < groups; g++)
        for (int64_t k = 0; k < taps; k += VL)
          store(scratch.sums + k, load(scratch.sums + k) + load(first + g * together * taps + k));
      store_filter_gradient(p, scratch.sums, scratch.order, block * VL, gw);
    }
    return;
  }
  clear(scratch.tile, t.tile_rows * t.pitch);
  for (int64_t item = slice.begin; item < slice.end; item++) {
    const int64_t g = item % groups, first = item / groups * together;
    const int64_t end = smaller(channel_blocks(p), first + together);
    float* sums = groups == 1 ? scratch.sums : partial + item * together * taps;
    clear(sums, together * taps);
    for (int64_t n = p.N * g / groups; n < p.N * (g + 1) / groups; n++)
      for (int64_t tile = 0; tile < t.tiles(); tile++)
        for (int64_t block = first; block < end; block++) {
          const int64_t c = block * VL;
          if (columns_are_lanes(p)) {
            gradient_of_planes(p, t.results(tile), x + (n * p.C + c) * p.H * p.W,
                               gy + (n * p.C + c) * p.P * p.Q, smaller(VL, p.C - c),
                               sums + (block - first) * taps);
            continue;
          }
          if (reads_tensor<T>(p) && c + VL <= p.C) {
            gradient_of_channels(p, t, scratch, t.results(tile), x + n * p.H * p.W * p.C + c,
                                 gy + n * p.P * p.Q * p.C + c, sums + (block - first) * taps);
            continue;
          }
          gradient_of_tile<T>(p, t, scratch, t.results(tile), slice_of(x, p.layout, n, c, p.C, p.H, p.W),
                              slice_of(gy, p.layout, n, c, p.C, p.P, p.Q), sums + (block - first) * taps);
        }
    for (int64_t block = first; block < end && groups == 1; block++)
      store_filter_gradient(p, sums + (block - first) * taps, scratch.order, block * VL, gw);
  }
}

void run_weight_gradient(const ConvProblem& p, const ConvTensors& t, const WorkSlice& slice) {
  with_element(p.dtype, [&](auto element) PYSEQNET_LAMBDA {
    using T = decltype(element);
    run_weight_gradient_of(p, static_cast<const T*>(t.x), static_cast<const T*>(t.gy), static_cast<T*>(t.gw),
                           slice);
  });
}

}  // namespace

extern const ConvCpuKernel conv_depthwise_forward, conv_depthwise_input_gradient,
    conv_depthwise_weight_gradient;
const ConvCpuKernel conv_depthwise_forward = {"depthwise_" PYSEQNET_ISA_NAME, this_isa, refuses, plan_forward,
                                              run_forward};
const ConvCpuKernel conv_depthwise_input_gradient = {"depthwise_" PYSEQNET_ISA_NAME, this_isa, refuses,
                                                     plan_input_gradient, run_input_gradient};
const ConvCpuKernel conv_depthwise_weight_gradient = {"depthwise_" PYSEQNET_ISA_NAME, this_isa, refuses,
                                                      plan_weight_gradient, run_weight_gradient};

}  // namespace PYSEQNET_ISA
}  // namespace pyseqnet
