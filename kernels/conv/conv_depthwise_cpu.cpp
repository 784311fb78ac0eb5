// Depthwise convolution (Chollet, 2017; groups = channels = filters) on the CPU: forward, input gradient,
// weight gradient; every stride, dilation and padding; planar and channels-last images.
//
// A depthwise filter never mixes channels, so channels are lanes: a tile holds VL channels of a part of an
// image, one vector a pixel (depthwise_tile.h), and every tap is one aligned load and one multiply-add, never
// shifted or masked (depthwise_taps.h).
//   forward           a tile of x, columns split by stride; rows of outputs in blocks of 8 sums.
//   input gradient    a pixel of gx meets the taps whose distance to it the stride divides: one set of taps
//   for
//                     each phase of the stride, each a correlation of gy with stride 1.
//   weight gradient   tiles of x and gy; the sums of a run of taps stay in registers for a whole tile.
//   Partial
//                     sums of groups of images meet in shared memory where there are too few channels to
//                     share out; what the groups are depends on the problem only.
// Bound: multiply-adds, 2 R S an output and pass, from about 5 x 5 taps on; below it the memory traffic.
#include "conv/depthwise_taps.h"
#include "conv/depthwise_tile.h"

namespace pyseqnet {
inline namespace PYSEQNET_ISA {
namespace {

// Vectors of a tile of inputs: 256 KiB with AVX-512, a share of the second-level cache.
constexpr int64_t tile_vectors = 4096;
// Outputs that are collected before they are transposed and stored: still in the first-level cache.
constexpr int64_t collected_outputs = 256;
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

template <class F>
PYSEQNET_INLINE void with_element(DType dtype, F&& f) {
  if (dtype == DType::f32) f(float{});
  if (dtype == DType::bf16) f(bfloat16{});
  if (dtype == DType::f16) f(float16{});
}

// One axis of a tile: results (outputs, or pixels of gx) are cut into bands of `band`.
struct Bands {
  int64_t band, count;
  Bands(int64_t extent, int64_t band_)
      : band(larger(1, smaller(band_, extent))), count(ceil_div(extent, band)) {}
};

// How a pass cuts its results into tiles, and which taps go with which input columns.
struct Tiling {
  // Both gradients of a result band read inputs [first, first + length) of the other tensor. Strided passes
  // (forward, weight gradient) keep stride_w phases of `length` columns; input_gradient one row of gy.
  bool transposed;           // input gradient
  int64_t H, W;              // the results
  int64_t reach_h, reach_w;  // (R - 1) dilation_h, (S - 1) dilation_w
  int64_t shift;             // the farthest tap, in columns of a phase (strided) or of gy (input gradient)
  Bands columns, rows;
  int64_t length;  // columns of a phase of the tile
  int64_t phases;  // of a tile row
  int64_t pitch;   // floats of a tile row
  int64_t tile_rows;

  Tiling(const ConvProblem& p, bool transposed_)
      : transposed(transposed_),
        H(transposed ? p.H : p.P),
        W(transposed ? p.W : p.Q),
        reach_h((p.R - 1) * p.dilation_h),
        reach_w((p.S - 1) * p.dilation_w),
        shift(reach_w / p.stride_w),
        columns(W, band_columns(p)),
        rows(1, 1) {
    length = row_length(p, columns.band);
    phases = transposed ? 1 : p.stride_w;
    pitch = phases * length * VL;
    const int64_t fit = larger(1, tile_vectors / (phases * length));  // tile rows within the budget
    rows = Bands(H, transposed ? (fit - 1) * p.stride_h - reach_h : (fit - 1 - reach_h) / p.stride_h + 1);
    tile_rows =
        transposed ? (rows.band - 1 + reach_h) / p.stride_h + 2 : (rows.band - 1) * p.stride_h + reach_h + 1;
  }
  int64_t row_length(const ConvProblem& p, int64_t band) const {
    const int64_t positions = transposed ? (band - 1) / p.stride_w + 2 : band;
    return round_up(positions, outputs_at_once) + shift + 1;
  }
  // All columns if a row of results then fits the budget, else so many that halos stay a small part.
  int64_t band_columns(const ConvProblem& p) const {
    const int64_t high = transposed ? reach_h / p.stride_h + 1 : reach_h + 1;
    const int64_t across = larger(1, tile_vectors / (high * (transposed ? 1 : p.stride_w)));
    if (row_length(p, W) <= across) return larger(1, W);
    const int64_t least = larger(8 * outputs_at_once, shift);
    return larger(least, across - shift - outputs_at_once - 1) / outputs_at_once * outputs_at_once *
           (transposed ? p.stride_w : 1);
  }
  int64_t tiles() const { return rows.count * columns.count; }
  Rectangle results(int64_t tile) const {
    const int64_t h = tile / columns.count * rows.band, w = tile % columns.count * columns.band;
    return {h, smaller(H, h + rows.band), w, smaller(W, w + columns.band)};
  }
};

// The taps of one phase of the results, as runs.
struct Phase {
  const Run* runs;
  int64_t count;
};

// Everything a range needs in scratch.
struct Scratch {
  float *tile, *gradient_tile, *results, *filter, *sums;
  int64_t *column, *gradient_column;
  Run* runs;
  int32_t* order;  // [S] reordered position -> s
  int64_t* begin;  // [stride_w + 1] runs of each phase
  RowPair* pairs;  // [R]
  int64_t bytes;

  Scratch(const ConvProblem& p, const Tiling& t, ConvPass pass, std::byte* memory) {
    const bool weights = pass == ConvPass::weight_gradient;
    Carver carve(memory);
    tile = carve.take<float>(t.tile_rows * t.pitch);
    filter = carve.take<float>(p.R * p.S * VL);
    results = carve.take<float>(weights ? 0 : (collected_outputs + 2 * t.columns.band + VL) * VL);
    gradient_tile = carve.take<float>(weights ? t.rows.band * t.columns.band * VL : 0);
    sums = carve.take<float>(weights ? p.R * p.S * VL : 0);
    column = carve.take<int64_t>(t.phases * t.length);
    gradient_column = carve.take<int64_t>(weights ? t.columns.band : 0);
    runs = carve.take<Run>(p.S);
    order = carve.take<int32_t>(p.S);
    begin = carve.take<int64_t>(p.stride_w + 1);
    pairs = carve.take<RowPair>(p.R);
    bytes = carve.used();
  }
  Phase phase(int64_t f) const { return {runs + begin[f], begin[f + 1] - begin[f]}; }
};

// Groups the taps by phase and cuts them into runs of neighbours. Strided: tap s reads phase s dilation %
// stride, s dilation / stride columns after the output. Input gradient: phase f of gx (f = (w + pad) %
// stride) meets the taps with s dilation = f (mod stride), farthest first, at column l - (s dilation - f) /
// stride.
void plan_runs(const ConvProblem& p, const Tiling& t, Scratch& scratch) {
  int32_t tap = 0;
  int64_t run = 0;
  for (int64_t f = 0; f < p.stride_w; f++) {
    scratch.begin[f] = run;
    int64_t previous = 0;
    bool open = false;
    for (int64_t k = 0; k < p.S; k++) {
      const int64_t s = t.transposed ? p.S - 1 - k : k, distance = s * p.dilation_w;
      if (distance % p.stride_w != f) continue;
      const int64_t at = t.transposed ? t.shift - (distance - f) / p.stride_w : distance / p.stride_w;
      if (open && at == previous + 1 && scratch.runs[run - 1].length < longest_run) {
        scratch.runs[run - 1].length++;
      } else {
        scratch.runs[run++] = {((t.transposed ? 0 : f * t.length) + at) * VL, tap, 1};
      }
      open = true;
      previous = at;
      scratch.order[tap++] = int32_t(s);
    }
  }
  scratch.begin[p.stride_w] = run;
}

// filter[r][position][lane] = w[c + lane][r][order[position]]; both filter layouts are K R S here.
template <class T>
void load_filter(const ConvProblem& p, const T* w, int64_t c, const Scratch& scratch) {
  for (int64_t r = 0; r < p.R; r++)
    for (int64_t k = 0; k < p.S; k++) {
      float* to = scratch.filter + (r * p.S + k) * VL;
      const T* from = w + (c * p.R + r) * p.S + scratch.order[k];
      for (int64_t l = 0; l < VL; l++) to[l] = l < p.C - c ? to_float(from[l * p.R * p.S]) : 0.0f;
    }
}

void clear(float* p, int64_t count) {
  for (int64_t i = 0; i < count; i += VL) store(p + i, vf{});
}

// Where each column of the image (from part.w0 on) goes in a tile row, for the tile whose first column is
// `first` (in padded columns of x when strided).
void place_columns(const ConvProblem& p, const Tiling& t, const Rectangle& part, int64_t first,
                   int64_t* column) {
  for (int64_t w = part.w0; w < part.w1; w++) {
    const int64_t u = w - first;
    column[w - part.w0] = (t.transposed ? u : u % p.stride_w * t.length + u / p.stride_w) * VL;
  }
}

// The inputs that a rectangle of results reads.
struct Inputs {
  Rectangle part;
  int64_t first;  // image column (x) or column of gy at tile column 0; may lie in the padding
};
Inputs inputs_of(const ConvProblem& p, const Tiling& t, const Rectangle& out) {
  Inputs in;
  if (t.transposed) {
    in.first = floor_div(out.w0 + p.pad_w, p.stride_w) - t.shift;
    in.part.w0 = larger(0, in.first);
    in.part.w1 = smaller(p.Q, in.first + t.length);
    in.part.h0 = larger(0, ceil_div(out.h0 + p.pad_h - t.reach_h, p.stride_h));
    in.part.h1 = smaller(p.P, floor_div(out.h1 - 1 + p.pad_h, p.stride_h) + 1);
  } else {
    in.first = out.w0 * p.stride_w - p.pad_w;
    in.part.w0 = larger(0, in.first);
    in.part.w1 = smaller(p.W, in.first + t.length * p.stride_w);
    in.part.h0 = larger(0, out.h0 * p.stride_h - p.pad_h);
    in.part.h1 = smaller(p.H, (out.h1 - 1) * p.stride_h - p.pad_h + t.reach_h + 1);
  }
  if (in.part.h1 < in.part.h0) in.part.h1 = in.part.h0;
  if (in.part.w1 < in.part.w0) in.part.w1 = in.part.w0;
  return in;
}

// The filter rows that row h of the results meets, with their rows of the tile.
int64_t pair_rows(const ConvProblem& p, const Tiling& t, const Inputs& in, int64_t h,
                  const Scratch& scratch) {
  int64_t n = 0;
  for (int64_t r = 0; r < p.R; r++) {
    int64_t row = h * p.stride_h - p.pad_h + r * p.dilation_h;
    if (t.transposed) {
      const int64_t distance = h + p.pad_h - r * p.dilation_h;
      if (distance % p.stride_h) continue;
      row = distance / p.stride_h;
    }
    if (row < in.part.h0 || row >= in.part.h1) continue;
    scratch.pairs[n++] = {scratch.tile + (row - in.part.h0) * t.pitch, scratch.filter + r * p.S * VL};
  }
  return n;
}

// Forward, or the input gradient if tiling.transposed, of one tile of results.
template <class T>
void correlate_tile(const ConvProblem& p, const Tiling& t, const Scratch& scratch, const Rectangle& out,
                    const Slice<const T>& x, vf start, const Slice<T>& y) {
  const Inputs in = inputs_of(p, t, out);
  place_columns(p, t, in.part, in.first, scratch.column);
  if (t.tiles() > 1) clear(scratch.tile, t.tile_rows * t.pitch);
  load_tile(x, in.part, scratch.column, t.pitch, scratch.tile);

  const int64_t columns = out.w1 - out.w0;
  int64_t collected = 0, first_row = out.h0;
  for (int64_t h = out.h0; h < out.h1; h++) {
    const int64_t rows = pair_rows(p, t, in, h, scratch);
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
        correlate_row(scratch.pairs, rows, phase.runs, phase.count, start, count, row + (w - out.w0) * VL,
                      p.stride_w * VL);
        for (int64_t r = 0; r < rows; r++) scratch.pairs[r].x -= skipped;
      }
    } else {
      correlate_row(scratch.pairs, rows, scratch.runs, scratch.begin[p.stride_w], start, columns, row, VL);
    }
    collected += columns;
    if (collected >= collected_outputs || h + 1 == out.h1) {
      store_tile(scratch.results, {first_row, h + 1, out.w0, out.w1}, y);
      collected = 0, first_row = h + 1;
    }
  }
}

int64_t channel_blocks(const ConvProblem& p) { return ceil_div(p.C, VL); }

// Items: (block of channels, image, tile), tiles fastest, so that a range seldom changes its filter.
WorkPlan plan_correlation(const ConvProblem& p, ConvPass pass) {
  const Tiling t(p, pass == ConvPass::input_gradient);
  WorkPlan plan;
  const int64_t work = t.rows.band * t.columns.band * (p.R * p.S + 8);
  plan.add_phase(channel_blocks(p) * p.N * t.tiles(), larger(1, grain_work / larger(1, work)));
  plan.thread_bytes = Scratch(p, t, pass, nullptr).bytes;
  return plan;
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
  int64_t loaded = -1;
  vf start = {};
  for (int64_t item = slice.begin; item < slice.end; item++) {
    const int64_t tile = item % t.tiles(), n = item / t.tiles() % p.N, block = item / t.tiles() / p.N,
                  c = block * VL;
    if (block != loaded) {
      loaded = block;
      load_filter(p, w, c, scratch);
      if (bias) start = load_between(bias + c, 0, p.C - c, vf{});
    }
    correlate_tile<T>(p, t, scratch, t.results(tile), slice_of(x, p.layout, n, c, p.C, H, W), start,
                      slice_of(y, p.layout, n, c, p.C, t.H, t.W));
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
  return larger(1, smaller(p.N, ceil_div(wanted_items, channel_blocks(p))));
}

WorkPlan plan_weight_gradient(const ConvProblem& p) {
  const Tiling t(p, false);
  const int64_t groups = image_groups(p), items = channel_blocks(p) * groups;
  const int64_t work = p.N * p.P * p.Q / groups * (p.R * p.S + 16);
  WorkPlan plan;
  plan.add_phase(items, larger(1, grain_work / larger(1, work)));
  if (groups > 1) {
    plan.add_phase(channel_blocks(p), larger(1, grain_work / (groups * p.R * p.S * VL)));
    plan.shared_bytes = align_up(items * p.R * p.S * VL * int64_t(sizeof(float)));
  }
  plan.thread_bytes = Scratch(p, t, ConvPass::weight_gradient, nullptr).bytes;
  return plan;
}

// Adds one tile of outputs of one image to scratch.sums [r][position][lane].
template <class T>
void gradient_of_tile(const ConvProblem& p, const Tiling& t, const Scratch& scratch, const Rectangle& out,
                      const Slice<const T>& x, const Slice<const T>& gy) {
  const Inputs in = inputs_of(p, t, out);
  place_columns(p, t, in.part, in.first, scratch.column);
  if (t.tiles() > 1) clear(scratch.tile, t.tile_rows * t.pitch);
  load_tile(x, in.part, scratch.column, t.pitch, scratch.tile);
  const int64_t columns = out.w1 - out.w0, pitch = columns * VL;
  for (int64_t q = 0; q < columns; q++) scratch.gradient_column[q] = q * VL;
  load_tile(gy, out, scratch.gradient_column, pitch, scratch.gradient_tile);

  for (int64_t r = 0; r < p.R; r++) {
    // Output rows whose tap r lies inside the image.
    const int64_t before = p.pad_h - r * p.dilation_h;
    const int64_t i0 = larger(out.h0, ceil_div(before, p.stride_h));
    const int64_t i1 = smaller(out.h1, floor_div(p.H - 1 + before, p.stride_h) + 1);
    if (i0 >= i1) continue;
    const float* rows = scratch.tile + (i0 * p.stride_h - before - in.part.h0) * t.pitch;
    for (int64_t k = 0; k < scratch.begin[p.stride_w]; k++) {
      const Run& run = scratch.runs[k];
      gradient_of_run(run.length, rows + run.offset, p.stride_h * t.pitch,
                      scratch.gradient_tile + (i0 - out.h0) * pitch, pitch, i1 - i0, columns,
                      scratch.sums + (r * p.S + run.first) * VL);
    }
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
  const int64_t groups = image_groups(p), taps = p.R * p.S * VL;
  float* partial = reinterpret_cast<float*>(slice.shared);
  if (slice.phase == 1) {
    for (int64_t block = slice.begin; block < slice.end; block++) {
      clear(scratch.sums, taps);
      for (int64_t g = 0; g < groups; g++)
        for (int64_t k = 0; k < taps; k += VL)
          store(scratch.sums + k, load(scratch.sums + k) + load(partial + (block * groups + g) * taps + k));
      store_filter_gradient(p, scratch.sums, scratch.order, block * VL, gw);
    }
    return;
  }
  clear(scratch.tile, t.tile_rows * t.pitch);
  for (int64_t item = slice.begin; item < slice.end; item++) {
    const int64_t block = item / groups, g = item % groups, c = block * VL;
    clear(scratch.sums, taps);
    for (int64_t n = p.N * g / groups; n < p.N * (g + 1) / groups; n++)
      for (int64_t tile = 0; tile < t.tiles(); tile++)
        gradient_of_tile<T>(p, t, scratch, t.results(tile), slice_of(x, p.layout, n, c, p.C, p.H, p.W),
                            slice_of(gy, p.layout, n, c, p.C, p.P, p.Q));
    if (groups == 1) {
      store_filter_gradient(p, scratch.sums, scratch.order, c, gw);
    } else {
      for (int64_t k = 0; k < taps; k += VL) store(partial + item * taps + k, load(scratch.sums + k));
    }
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
