// Packs operands for the tensor-core convolutions (conv_pack.h) and sums the parts of their weight gradient.
//
// pack_lines: a thread fills chunks of 16 bytes, gathering 8 (float: 4) elements each. A warp is 16
// neighbouring lines x 2 chunks: it reads 32 bytes (float: 64) of each channel's plane and writes 32 bytes of
// each line. So every sector of 32 bytes that is touched is used whole in both directions, without shared
// memory, for NCHW and for filters turned around; eight loads are in flight a thread.
//
// Bound: memory, 2 bytes read and 2 written an element (16-bit types). Predicted for an H200: a 64x64x56x56
// image in bfloat16 from NCHW is 51 MB, 13 us; the filters of 512x512x3x3 9.4 MB, 4 us; the expanded image of
// ResNet-50's first layer (64x3x224x224, 7x7, stride 2) reads 19 and writes 77 MB, 25 us.
//
// sum_filter_parts: one output is summed by 8 threads over the parts, in a fixed order, as in sum_parts.
#include "conv/conv_generic.cuh"
#include "conv/conv_pack.h"

namespace pyseqnet {
namespace {

constexpr int pack_threads = 256, warp_lines = 16, block_lines = pack_threads / 32 * warp_lines;

template <class T>
struct alignas(chunk_bytes) Chunk {
  static constexpr int elements = chunk_bytes / int(sizeof(T));
  T element[elements];
};

struct PackLines {
  int extent[3];
  int64_t lines, from[3], to[3], from_group, to_group, from_outer, from_inner, from_origin;
  int outer, inner, chunks;
  int limit, first, step, tap_step;
  unsigned line_blocks;
};

template <class T>
__global__ void __launch_bounds__(pack_threads)
    pack_lines(const T* __restrict__ from, Chunk<T>* __restrict__ to, PackLines p) {
  constexpr int elements = Chunk<T>::elements;
  const int t = int(threadIdx.x);
  const int64_t line =
      int64_t(blockIdx.x % p.line_blocks) * block_lines + t / 32 * warp_lines + t % warp_lines;
  const int64_t group = blockIdx.x / p.line_blocks;
  if (line >= p.lines) return;
  const Digits<3> d = digits_of(line, p.extent);
  from += group * p.from_group + p.from_origin;
  to += group * p.to_group;
#pragma unroll
  for (int i = 0; i < 3; i++) {
    from += d.digit[i] * p.from[i];
    to += d.digit[i] * p.to[i];
  }
  const int place = p.first + d.digit[2] * p.step;
  const T zero = from_accumulator<T>(0);
  for (int chunk = t % 32 / warp_lines; chunk < p.chunks; chunk += 32 / warp_lines) {
    int outer = chunk * elements / p.inner, inner = chunk * elements - outer * p.inner;
    Chunk<T> gathered;
#pragma unroll
    for (int i = 0; i < elements; i++) {
      const bool exists =
          outer < p.outer && (p.limit == 0 || unsigned(place + outer * p.tap_step) < unsigned(p.limit));
      gathered.element[i] = exists ? from[outer * p.from_outer + inner * p.from_inner] : zero;
      if (++inner == p.inner) inner = 0, outer++;
    }
    to[chunk] = gathered;
  }
}

// The element of gw that column `column` of a packed filter is: (r, s, c) of (R, S, chunks of channels).
struct FilterColumns {
  int64_t columns, filters;  // of a filter; filters
  int r_columns, tap_columns, inner, taps_w, channels;
  bool expanded;
  Strides gw;
};

template <class T>
__global__ void __launch_bounds__(sum_parts_elements* sum_parts_lanes)
    sum_filter_parts(const float* __restrict__ partial, T* __restrict__ gw, int64_t parts, FilterColumns f) {
  PYSEQNET_SHARED(float, lanes, [sum_parts_lanes][sum_parts_elements]);
  const int x = int(threadIdx.x), y = int(threadIdx.y);
  const int64_t count = f.filters * f.columns;
  const int64_t element = int64_t(blockIdx.x) * sum_parts_elements + x;
  float sum = 0;
  if (element < count)
    for (int64_t part = y; part < parts; part += sum_parts_lanes) sum += partial[part * count + element];
  lanes[y][x] = sum;
  __syncthreads();
  if (y != 0 || element >= count) return;
  for (int lane = 1; lane < sum_parts_lanes; lane++) sum += lanes[lane][x];
  const int64_t filter = element / f.columns;
  const int column = int(element - filter * f.columns);
  const int r = column / f.r_columns, in_row = column - r * f.r_columns;
  const int s = in_row / (f.expanded ? f.channels : f.tap_columns);
  const int c = in_row - s * (f.expanded ? f.channels : f.tap_columns);
  if (s >= f.taps_w || c >= f.channels) return;  // padding
  store(gw + filter * f.gw.n + c * f.gw.c + r * f.gw.h + s * f.gw.w, sum);
}

int64_t elements_of_chunk(const ConvProblem& p) { return chunk_bytes / bytes_of(p.dtype); }

}  // namespace

int launch_pack(DType dtype, const PackPlan& plan, const void* from, void* to, void* stream) {
  PackLines p = {};
  for (int i = 0; i < 3; i++)
    p.extent[i] = int(plan.extent[i]), p.from[i] = plan.from[i], p.to[i] = plan.to[i];
  p.lines = plan.lines();
  p.from_group = plan.from_group, p.to_group = plan.to_group;
  p.from_outer = plan.from_outer, p.from_inner = plan.from_inner, p.from_origin = plan.from_origin;
  p.outer = int(plan.outer), p.inner = int(plan.inner), p.chunks = int(plan.chunks);
  p.limit = int(plan.limit), p.first = int(plan.first), p.step = int(plan.step);
  p.tap_step = int(plan.tap_step);
  p.line_blocks = unsigned(ceil_div(p.lines, block_lines));
  const LaunchConfig config = {
      .grid = dim3(unsigned(p.line_blocks * plan.groups)), .block = dim3(pack_threads), .stream = stream};
  // Only bits are moved: types of one size share a kernel.
  if (bytes_of(dtype) == 2)
    return launch(config, pack_lines<__half>, static_cast<const __half*>(from),
                  static_cast<Chunk<__half>*>(to), p);
  return launch(config, pack_lines<float>, static_cast<const float*>(from), static_cast<Chunk<float>*>(to),
                p);
}

PackedConv packed_conv(const ConvProblem& p, bool expand) {
  PackedConv packed;
  ConvProblem& c = packed.conv;
  c = p;
  c.layout = c.filter_layout = Layout::nhwc;
  const int64_t chunk = elements_of_chunk(p);
  const int64_t channels = p.group_channels(), filters = p.group_filters();
  packed.expanded = expand && p.S > 1 && channels < chunk &&
                    ceil_div(p.S * channels, chunk) < p.S * ceil_div(channels, chunk);
  packed.x_chunks = ceil_div(packed.expanded ? p.S * channels : channels, chunk);
  packed.y_chunks = ceil_div(filters, chunk);
  const auto channels_first = [&](int64_t h, int64_t w, int64_t all) {
    return p.layout == Layout::nchw && h * w > 1 && all > 1;
  };
  packed.pack_x = packed.expanded || !p.aligned || channels % chunk || channels_first(p.H, p.W, p.C);
  packed.pack_gy = !p.aligned || filters % chunk || channels_first(p.P, p.Q, p.K);
  packed.pack_w = packed.expanded || !p.aligned || channels % chunk ||
                  (p.filter_layout == Layout::nchw && p.R * p.S > 1 && channels > 1);
  c.C = packed.x_chunks * chunk * p.groups, c.K = packed.y_chunks * chunk * p.groups;
  if (packed.expanded) {
    c.W = p.Q, c.S = 1, c.stride_w = c.dilation_w = 1, c.pad_w = 0;
  }
  return packed;
}

PackPlan pack_image(const ConvProblem& p, const PackedConv& packed) {
  const Strides xs = p.x_strides();
  const int64_t pixel = packed.x_chunks * p.groups;
  PackPlan plan = {};
  plan.groups = p.groups;
  plan.from_group = p.group_channels() * xs.c, plan.to_group = packed.x_chunks;
  plan.chunks = packed.x_chunks;
  plan.outer = 1, plan.inner = p.group_channels(), plan.from_inner = xs.c;
  const int64_t columns = packed.expanded ? p.Q : p.W;
  const int64_t extent[3] = {p.N, p.H, columns}, to[3] = {p.H * columns * pixel, columns * pixel, pixel};
  const int64_t from[3] = {xs.n, xs.h, packed.expanded ? p.stride_w * xs.w : xs.w};
  for (int i = 0; i < 3; i++) plan.extent[i] = extent[i], plan.from[i] = from[i], plan.to[i] = to[i];
  if (packed.expanded) {
    plan.outer = p.S, plan.from_outer = p.dilation_w * xs.w;
    plan.limit = p.W, plan.first = -p.pad_w, plan.step = p.stride_w, plan.tap_step = p.dilation_w;
    plan.from_origin = -p.pad_w * xs.w;
  }
  return plan;
}

PackPlan pack_output(const ConvProblem& p, const PackedConv& packed) {
  ConvProblem of_y = p;  // y read as an image
  of_y.C = p.K, of_y.H = p.P, of_y.W = p.Q;
  PackedConv as_x;
  as_x.x_chunks = packed.y_chunks;
  return pack_image(of_y, as_x);
}

PackPlan pack_filters(const ConvProblem& p, const PackedConv& packed) {
  const Strides ws = p.w_strides();
  const int64_t taps = packed.conv.S, line = packed.x_chunks;
  PackPlan plan = {};
  plan.groups = 1, plan.chunks = packed.x_chunks;
  const int64_t extent[3] = {p.K, p.R, taps}, from[3] = {ws.n, ws.h, ws.w};
  const int64_t to[3] = {p.R * taps * line, taps * line, line};
  for (int i = 0; i < 3; i++) plan.extent[i] = extent[i], plan.from[i] = from[i], plan.to[i] = to[i];
  plan.outer = packed.expanded ? p.S : 1, plan.from_outer = ws.w;
  plan.inner = p.group_channels(), plan.from_inner = ws.c;
  return plan;
}

PackPlan pack_filters_turned(const ConvProblem& p, const PackedConv& packed) {
  const Strides ws = p.w_strides();
  const int64_t line = packed.y_chunks, row = p.R * p.S * line;
  PackPlan plan = {};
  plan.groups = p.groups, plan.chunks = line;
  plan.from_group = p.group_filters() * ws.n, plan.to_group = p.group_channels() * row;
  // Neighbours in memory last.
  const bool channels_last = ws.c == 1;
  const int64_t extent[2][3] = {{p.group_channels(), p.R, p.S}, {p.R, p.S, p.group_channels()}};
  const int64_t from[2][3] = {{ws.c, ws.h, ws.w}, {ws.h, ws.w, ws.c}};
  const int64_t to[2][3] = {{row, p.S * line, line}, {p.S * line, line, row}};
  for (int i = 0; i < 3; i++) {
    plan.extent[i] = extent[channels_last][i];
    plan.from[i] = from[channels_last][i];
    plan.to[i] = to[channels_last][i];
  }
  plan.outer = 1, plan.inner = p.group_filters(), plan.from_inner = ws.n;
  return plan;
}

int launch_sum_filters(const ConvProblem& p, const PackedConv& packed, const float* partial, int64_t parts,
                       void* gw, void* stream) {
  FilterColumns f = {};
  f.filters = p.K;
  f.tap_columns = int(packed.x_chunks * elements_of_chunk(p));
  f.r_columns = int(packed.conv.S) * f.tap_columns;
  f.columns = p.R * f.r_columns;
  f.taps_w = int(p.S), f.channels = int(p.group_channels()), f.expanded = packed.expanded;
  f.gw = p.w_strides();
  const LaunchConfig config = {.grid = dim3(unsigned(ceil_div(f.filters * f.columns, sum_parts_elements))),
                               .block = dim3(sum_parts_elements, sum_parts_lanes),
                               .stream = stream};
  return dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if constexpr (std::is_same_v<T, double>)
      return -1;  // refused
    else
      return launch(config, sum_filter_parts<T>, partial, static_cast<T*>(gw), parts, f);
  });
}

Refusal refuse_tensor_cores(const ConvProblem& given) {
  if (given.dtype == DType::f64) return "float64 needs an exact product";
  if (given.dtype == DType::f32 && !given.allow_tf32)
    return "TF32 is not allowed: float32 needs an exact product";
  const ConvProblem p = simplified(given);
  if (const Refusal why = refuse_beyond_coordinates(p)) return why;
  for (int64_t extent : {p.N, p.C, p.H, p.W, p.K, p.R, p.S, p.P, p.Q})
    if (extent == 0) return "there is nothing to multiply";
  if (p.depthwise() && p.groups > 1) return "depthwise: a tile would hold a single filter";
  // Offsets count chunks in 32 bits, and positions are 32 bits.
  const auto beyond = [](int64_t a, int64_t b, int64_t c, int64_t d) {
    return double(a) * double(b) * double(c) * double(d) >= double(coordinate_limit);
  };
  const int64_t chunk = elements_of_chunk(p);
  const int64_t x_chunks = ceil_div(p.group_channels(), chunk) * p.groups;
  const int64_t y_chunks = ceil_div(p.group_filters(), chunk) * p.groups;
  if (beyond(p.N, p.H, p.W > p.Q ? p.W : p.Q, x_chunks * p.S) || beyond(p.N, p.P, p.Q, y_chunks) ||
      beyond(p.R, p.S, p.K, x_chunks) || beyond(p.R, p.S, p.C, y_chunks))
    return "2^30 or more chunks of 16 bytes";
  return accepted;
}

}  // namespace pyseqnet
