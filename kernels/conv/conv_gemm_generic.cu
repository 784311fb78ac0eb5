// Convolution as implicit matrix products on any CUDA device: every dtype, both layouts, both filter layouts,
// stride, padding, dilation, groups.
//
// All three passes are one product  out[row, column] = sum over depth of dense[row, depth] * gathered[depth,
// column], in which one operand is a plain matrix and the other is gathered from an image:
//
//                     dense               gathered  rows    columns      depth
//   forward           w                   x         k       (n, p, q)    (c, r, s)
//   weight gradient   gy                  x         k       (c, r, s)    (n, p, q)
//   input gradient    w, group's filters  gy        c       (n, h, w)    (k, r, s)
//
// A column and a depth are three digits each, and the place of an element in the image is linear in all six
// of them: its offset, its line and its pixel are the sum of what the column adds and what the depth adds. So
// the same kernel serves all passes; what differs are the strides in ImplicitGemm. Places of the block's
// columns are worked out once, those of the next eight depths by eight threads a step ahead; both lie in
// shared memory, and the loop that loads elements neither divides nor multiplies.
//
// The input gradient gathers: every pixel sums its own taps, without atomics. Where the stride is more than
// 1, only every stride-th tap of a pixel meets an output, which ones depends on the pixel modulo the stride.
// The pixels are therefore taken residue by residue: within one it is a convolution of stride 1 over the taps
// that fit, and no product with nothing is formed.
//
// The weight gradient is short and narrow, and deep: its depth is split over blocks. Each writes its part to
// the workspace, sum_parts adds the parts in order.
//
// The tile: 128 threads compute 64 x 128 (32 x 128 where there are few rows, 32 x 64 in double) results, 8 x
// 8 each, from double-buffered shared memory, 8 depths at a time. The next tile travels from global memory to
// registers while the present one is multiplied. In NCHW neighbouring threads load neighbouring pixels, in
// NHWC neighbouring channels.
//
// Bound: FMA issue. A thread's step of 8 depths is 512 FMA, 32 shared loads of 16 bytes, and about 12 element
// loads of 9 instructions: FMA is at most 512 of about 690 issue slots, 75 %.
//@PREDICTION@
#include <numeric>
#include <type_traits>
#include <utility>

#include "conv/conv_generic.cuh"

namespace pyseqnet {
namespace {

constexpr int threads = 128;
constexpr int row_threads = 8, column_threads = threads / row_threads;
// The shortest part of a weight gradient's depth: a block's fixed cost is about that of 20 steps of eight.
constexpr int64_t shortest_part = 256;
constexpr int step_depth = 8;  // eight floats of neighbouring channels are a whole sector of memory

// Each thread owns row_groups x 2 squares of a 16-byte vector's width: shared memory is read by vectors.
template <class T, int row_groups_>
struct GemmTile {
  using Element = T;
  using Acc = accumulator_t<T>;
  static constexpr int group = 16 / int(sizeof(Acc));
  static constexpr int row_groups = row_groups_, column_groups = 2;
  static constexpr int thread_rows = row_groups * group, thread_columns = column_groups * group;
  static constexpr int rows = row_threads * thread_rows, columns = column_threads * thread_columns;
  static constexpr int dense_loads = rows * step_depth / threads;
  static constexpr int gathered_loads = columns * step_depth / threads;
  // Allows 168 registers a thread for 8 x 8 results in float, 128 for half as many.
  static constexpr int blocks_per_multiprocessor =
      thread_rows * thread_columns * int(sizeof(Acc)) > 128 ? 3 : 4;
  // One vector of padding a line: eight depths of four neighbours are written to 32 different banks.
  static constexpr int padding = group;
};

// Where an element of the gathered image lies; what a column adds or what a depth adds to that.
struct Place {
  int64_t offset;
  int h, w;
};
// No sum with it lies in an image, nor overflows.
constexpr int outside = -int(coordinate_limit);

// One digit of a column or of a depth.
struct Axis {
  int extent;
  int h, w;         // what a step along it adds to the place
  int64_t offset;   // likewise
  int64_t partner;  // what it adds to the offset of the output (columns) or of the dense operand (depths)
};

// One spatial axis of the input gradient, whose pixels are taken by their residue modulo the stride.
struct ResidueAxis {
  int count;  // of residues that occur
  int stride, pad, dilation;
  int pixels, taps;
  int tap_step;                  // the taps that fit one residue are this far apart
  int64_t gathered, out, dense;  // strides along the axis of gy, gx and w
};

struct ImplicitGemm {
  Axis column[3], depth[3];
  int H, W;      // of the gathered image
  Place origin;  // of column 0, depth 0
  int64_t rows;  // of one group
  int64_t dense_origin, dense_row, out_origin, out_row;
  int64_t dense_group, gathered_group, out_group;
  unsigned row_tiles, column_tiles, groups, parts;
  int64_t part_depths, part_stride;
  bool accumulators_out;  // out is the workspace
  bool by_residue;        // column[1..2] are pixels of residue_h and residue_w, and two depths their taps
  ResidueAxis residue_h, residue_w;
};

// Offsets of operands are in bytes here, so that an address is one addition.
template <class Tile>
struct alignas(16) TileMemory {
  typename Tile::Acc dense[2][step_depth][Tile::rows + Tile::padding];
  typename Tile::Acc gathered[2][step_depth][Tile::columns + Tile::padding];
  Place column[Tile::columns];
  int64_t row[Tile::rows];  // of the dense operand
  int64_t column_out[Tile::columns];
  Place depth[2][step_depth];
  int64_t depth_dense[2][step_depth];  // -1: past the end
};

// Narrows one spatial axis to the pixels  residue + stride * u  and the taps that reach an output from there:
// tap r does where residue + pad - r * dilation is a multiple of the stride. They are every tap_step-th, from
// the first that does.
PYSEQNET_DEVICE void enter_residue(const ResidueAxis& a, int residue, ImplicitGemm& g, Axis& column,
                                   Axis& tap, int& origin) {
  int first = 0;
  const int candidates = a.tap_step < a.taps ? a.tap_step : a.taps;
  while (first < candidates && (residue + a.pad - first * a.dilation) % a.stride != 0) first++;
  const bool any = first < candidates;
  column.extent = (a.pixels - residue + a.stride - 1) / a.stride;
  tap.extent = any ? (a.taps - first - 1) / a.tap_step + 1 : 0;
  origin = any ? (residue + a.pad - first * a.dilation) / a.stride : 0;
  g.origin.offset += origin * a.gathered;
  g.out_origin += residue * a.out;
  g.dense_origin += any ? first * a.dense : 0;
}

PYSEQNET_DEVICE int64_t size_of(const Axis (&axis)[3]) {
  return int64_t(axis[0].extent) * axis[1].extent * axis[2].extent;
}

PYSEQNET_DEVICE Place place_of(const Digits<3>& d, const Axis (&axis)[3]) {
  Place p = {0, 0, 0};
#pragma unroll
  for (int i = 0; i < 3; i++) {
    p.offset += d.digit[i] * axis[i].offset;
    p.h += d.digit[i] * axis[i].h;
    p.w += d.digit[i] * axis[i].w;
  }
  return p;
}

PYSEQNET_DEVICE int64_t partner_of(const Digits<3>& d, const Axis (&axis)[3]) {
  return d.digit[0] * axis[0].partner + d.digit[1] * axis[1].partner + d.digit[2] * axis[2].partner;
}

// Lists the rows and columns of the block, one thread each. Rows past the last read the last: their results
// are not stored. Columns past the last lie outside of the image, and nothing is read for them.
template <class Tile>
PYSEQNET_DEVICE void list_lines(TileMemory<Tile>& memory, const ImplicitGemm& g, int64_t first_row,
                                int64_t first_column, int t) {
  constexpr int64_t bytes = sizeof(typename Tile::Element);
  static_assert(Tile::rows <= threads && Tile::columns <= threads);
  if (t < Tile::rows)
    memory.row[t] = (first_row + t < g.rows ? first_row + t : g.rows - 1) * g.dense_row * bytes;
  if (t >= Tile::columns) return;
  Place place = {0, outside, outside};
  int64_t out = 0;
  if (first_column + t < size_of(g.column)) {
    const int extent[3] = {g.column[0].extent, g.column[1].extent, g.column[2].extent};
    const Digits<3> d = digits_of(first_column + t, extent);
    place = place_of(d, g.column);
    place.offset = (place.offset + g.origin.offset) * bytes;
    place.h += g.origin.h;
    place.w += g.origin.w;
    out = partner_of(d, g.column);
  }
  memory.column[t] = place;
  memory.column_out[t] = out;
}

// Walks the depths begin + t, begin + t + 8, ... of the first eight threads and lists their places.
class DepthWalk {
 public:
  PYSEQNET_DEVICE DepthWalk(const ImplicitGemm& g, int64_t begin, int64_t end, int t)
      : depth_(begin + t), end_(end), mine_(t < step_depth), t_(t) {
    if (!mine_ || depth_ >= end) return;
#pragma unroll
    for (int i = 0; i < 3; i++) radix_.extent[i] = g.depth[i].extent;
    const Digits<3> step = digits_of(step_depth, radix_.extent);
#pragma unroll
    for (int i = 0; i < 3; i++) radix_.step[i] = step.digit[i];
    digits_ = digits_of(depth_, radix_.extent);
  }

  template <class Tile>
  PYSEQNET_DEVICE void list_next(TileMemory<Tile>& memory, const ImplicitGemm& g, int slot) {
    if (!mine_) return;
    constexpr int64_t bytes = sizeof(typename Tile::Element);
    Place place = {0, outside, outside};
    int64_t dense = -1;
    if (depth_ < end_) {
      place = place_of(digits_, g.depth);
      place.offset *= bytes;
      dense = partner_of(digits_, g.depth) * bytes;
    }
    memory.depth[slot][t_] = place;
    memory.depth_dense[slot][t_] = dense;
    depth_ += step_depth;
    if (depth_ < end_) advance(digits_, radix_);
  }

 private:
  int64_t depth_, end_;
  bool mine_;
  int t_;
  Radix<3> radix_ = {};
  Digits<3> digits_ = {};
};

// Which element of a tile `extent` wide a thread moves in its j-th load: neighbouring threads hold
// neighbouring depths, or neighbouring rows or columns.
template <int extent, bool along_depth>
struct Share {
  static_assert(threads % extent == 0 || extent % threads == 0);
  PYSEQNET_DEVICE static int line(int t, int j) {
    return along_depth ? t / step_depth + j * (threads / step_depth) : t % extent;
  }
  PYSEQNET_DEVICE static int depth(int t, int j) {
    return along_depth ? t % step_depth : t / extent + j * (threads / extent);
  }
};

// What a thread has on the way from global to shared memory.
template <class T, class Tile, bool gathered_along_depth, bool dense_along_depth>
struct Fetched {
  using GatheredShare = Share<Tile::columns, gathered_along_depth>;
  using DenseShare = Share<Tile::rows, dense_along_depth>;
  T gathered[Tile::gathered_loads], dense[Tile::dense_loads];

  // Of the two places that make an element, one is the same in all of a thread's loads; it goes first into
  // the address.
  PYSEQNET_DEVICE void load(const char* __restrict__ image, const char* __restrict__ matrix,
                            const ImplicitGemm& g, const TileMemory<Tile>& memory, int slot, int t) {
    const T zero = from_accumulator<T>(0);
#pragma unroll
    for (int j = 0; j < Tile::gathered_loads; j++) {
      const Place column = memory.column[GatheredShare::line(t, j)];
      const Place depth = memory.depth[slot][GatheredShare::depth(t, j)];
      const bool inside =
          unsigned(column.h + depth.h) < unsigned(g.H) && unsigned(column.w + depth.w) < unsigned(g.W);
      const auto* base = image + (gathered_along_depth ? depth.offset : column.offset);
      const auto* element = base + (gathered_along_depth ? column.offset : depth.offset);
      gathered[j] = inside ? *reinterpret_cast<const T*>(element) : zero;
    }
#pragma unroll
    for (int j = 0; j < Tile::dense_loads; j++) {
      const int64_t row = memory.row[DenseShare::line(t, j)];
      const int64_t depth = memory.depth_dense[slot][DenseShare::depth(t, j)];
      const auto* base = matrix + (dense_along_depth ? depth : row);
      const auto* element = base + (dense_along_depth ? row : depth);
      dense[j] = depth >= 0 ? *reinterpret_cast<const T*>(element) : zero;
    }
  }

  PYSEQNET_DEVICE void stash(TileMemory<Tile>& memory, int buffer, int t) const {
#pragma unroll
    for (int j = 0; j < Tile::gathered_loads; j++)
      memory.gathered[buffer][GatheredShare::depth(t, j)][GatheredShare::line(t, j)] =
          to_accumulator(gathered[j]);
#pragma unroll
    for (int j = 0; j < Tile::dense_loads; j++)
      memory.dense[buffer][DenseShare::depth(t, j)][DenseShare::line(t, j)] = to_accumulator(dense[j]);
  }
};

// A warp is 4 x 8 threads: its vectors of one depth are 64 and 128 bytes of shared memory.
struct ThreadPlace {
  int row, column;
  PYSEQNET_DEVICE explicit ThreadPlace(int t)
      : row(t % 32 / 8 + t / 64 * 4), column(t % 8 + t / 32 % 2 * 8) {}
};

template <class T, int n>
struct alignas(sizeof(T) * n) Vector {
  T element[n];
};

template <class Tile>
PYSEQNET_DEVICE void multiply(typename Tile::Acc (&sum)[Tile::thread_rows][Tile::thread_columns],
                              const TileMemory<Tile>& memory, int buffer, ThreadPlace at) {
  constexpr int group = Tile::group;
  using Group = Vector<typename Tile::Acc, group>;
#pragma unroll
  for (int depth = 0; depth < step_depth; depth++) {
    Group a[Tile::row_groups], b[Tile::column_groups];
#pragma unroll
    for (int i = 0; i < Tile::row_groups; i++)
      a[i] =
          *reinterpret_cast<const Group*>(&memory.dense[buffer][depth][(i * row_threads + at.row) * group]);
#pragma unroll
    for (int j = 0; j < Tile::column_groups; j++)
      b[j] = *reinterpret_cast<const Group*>(
          &memory.gathered[buffer][depth][(j * column_threads + at.column) * group]);
#pragma unroll
    for (int i = 0; i < Tile::thread_rows; i++)
#pragma unroll
      for (int j = 0; j < Tile::thread_columns; j++)
        sum[i][j] += a[i / group].element[i % group] * b[j / group].element[j % group];
  }
}

// Writes a group of results that are neighbours in the output: `count` of them exist.
template <class Out, int group, class Acc>
PYSEQNET_DEVICE void store_neighbours(Out* out, const Acc (&value)[group], int64_t count) {
  if (count >= group && reinterpret_cast<uintptr_t>(out) % sizeof(Vector<Out, group>) == 0) {
    Vector<Out, group> v;
#pragma unroll
    for (int j = 0; j < group; j++) v.element[j] = from_accumulator<Out>(value[j]);
    *reinterpret_cast<Vector<Out, group>*>(out) = v;
    return;
  }
#pragma unroll
  for (int j = 0; j < group; j++)
    if (j < count) store(out + j, value[j]);
}

// Writes a thread's squares of results, by vectors along whichever of rows and columns are neighbours in the
// output, by elements where neither are.
template <class Out, class Tile>
PYSEQNET_DEVICE void store_results(Out* out,
                                   const typename Tile::Acc (&sum)[Tile::thread_rows][Tile::thread_columns],
                                   const TileMemory<Tile>& memory, const ImplicitGemm& g, int64_t rows_left,
                                   int64_t columns_left, ThreadPlace at) {
  constexpr int group = Tile::group;
#pragma unroll
  for (int square = 0; square < Tile::row_groups * Tile::column_groups; square++) {
    const int i0 = square / Tile::column_groups * group, j0 = square % Tile::column_groups * group;
    const int row = i0 * row_threads + at.row * group, column = j0 * column_threads + at.column * group;
    if (row >= rows_left || column >= columns_left) continue;
    const int64_t* place = memory.column_out + column;
    const bool rows_are_neighbours = g.out_row == 1;
    bool columns_are_neighbours = true;
#pragma unroll
    for (int k = 1; k < group; k++) columns_are_neighbours &= place[k] == place[0] + k;
#pragma unroll
    for (int line = 0; line < group; line++) {
      typename Tile::Acc value[group];
#pragma unroll
      for (int k = 0; k < group; k++)
        value[k] = rows_are_neighbours ? sum[i0 + k][j0 + line] : sum[i0 + line][j0 + k];
      if (rows_are_neighbours) {
        if (column + line < columns_left) store_neighbours(out + place[line] + row, value, rows_left - row);
      } else if (row + line < rows_left) {
        Out* at_row = out + (row + line) * g.out_row;
        if (columns_are_neighbours) {
          store_neighbours(at_row + place[0], value, columns_left - column);
        } else {
#pragma unroll
          for (int k = 0; k < group; k++)
            if (column + k < columns_left) store(at_row + place[k], value[k]);
        }
      }
    }
  }
}

template <class T, int row_groups, bool gathered_along_depth, bool dense_along_depth>
__global__ void __launch_bounds__(threads, GemmTile<T, row_groups>::blocks_per_multiprocessor)
    implicit_gemm(const T* __restrict__ dense, const T* __restrict__ gathered, const T* __restrict__ bias,
                  void* __restrict__ out, ImplicitGemm g) {
  using Tile = GemmTile<T, row_groups>;
  using Acc = typename Tile::Acc;
  PYSEQNET_SHARED(TileMemory<Tile>, memory, );
  const int t = int(threadIdx.x);

  // Blocks that share columns are neighbours: they find the image in the L2 cache.
  unsigned block = blockIdx.x;
  const int64_t first_row = int64_t(block % g.row_tiles) * Tile::rows;
  block /= g.row_tiles;
  const int64_t first_column = int64_t(block % g.column_tiles) * Tile::columns;
  block /= g.column_tiles;
  const int64_t group = block % g.groups;
  block /= g.groups;
  const int64_t part = block % g.parts;
  if (g.by_residue) {
    const int residue = int(block / g.parts);
    constexpr int tap = gathered_along_depth ? 0 : 1;
    enter_residue(g.residue_h, residue / g.residue_w.count, g, g.column[1], g.depth[tap], g.origin.h);
    enter_residue(g.residue_w, residue % g.residue_w.count, g, g.column[2], g.depth[tap + 1], g.origin.w);
  }
  const int64_t columns_left = size_of(g.column) - first_column, rows_left = g.rows - first_row;
  if (columns_left <= 0) return;  // residues differ in their number of pixels

  const auto* image = reinterpret_cast<const char*>(gathered + group * g.gathered_group);
  const auto* matrix = reinterpret_cast<const char*>(dense + g.dense_origin + group * g.dense_group);
  const int64_t begin = part * g.part_depths, depths = size_of(g.depth);
  const int64_t end = begin + g.part_depths < depths ? begin + g.part_depths : depths;
  const int64_t steps = end > begin ? (end - begin + step_depth - 1) / step_depth : 0;

  Acc sum[Tile::thread_rows][Tile::thread_columns] = {};
  Fetched<T, Tile, gathered_along_depth, dense_along_depth> next;
  const ThreadPlace at(t);
  DepthWalk walk(g, begin, end, t);
  list_lines(memory, g, first_row, first_column, t);
  walk.list_next(memory, g, 0);
  walk.list_next(memory, g, 1);
  __syncthreads();
  next.load(image, matrix, g, memory, 0, t);
  next.stash(memory, 0, t);
  __syncthreads();
  // In step i buffer i % 2 is multiplied, list (i + 1) % 2 is read, and the other buffer and list, last read
  // in the step before, are written: one barrier a step.
  for (int64_t step = 0; step < steps; step++) {
    const int now = int(step % 2);
    next.load(image, matrix, g, memory, 1 - now, t);
    walk.list_next(memory, g, now);
    multiply(sum, memory, now, at);
    next.stash(memory, 1 - now, t);
    __syncthreads();
  }

  if (bias) {
#pragma unroll
    for (int i = 0; i < Tile::thread_rows; i++) {
      const int row = (i / Tile::group * row_threads + at.row) * Tile::group + i % Tile::group;
      const Acc b = row < rows_left ? load(bias + group * g.rows + first_row + row) : Acc(0);
#pragma unroll
      for (int j = 0; j < Tile::thread_columns; j++) sum[i][j] += b;
    }
  }
  const int64_t out_first = g.out_origin + group * g.out_group + first_row * g.out_row + part * g.part_stride;
  if (g.accumulators_out)
    store_results(static_cast<Acc*>(out) + out_first, sum, memory, g, rows_left, columns_left, at);
  else
    store_results(static_cast<T*>(out) + out_first, sum, memory, g, rows_left, columns_left, at);
}

// ------------------------------------------------------------------------------------------------ host side

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
  Split split = {1, extent_of(g.depth)};
  if (pass == ConvPass::weight_gradient)
    split =
        split_reduction(extent_of(g.depth), row_tiles * column_tiles * p.groups, shortest_part, step_depth);
  plan.blocks =
      double(row_tiles) * double(column_tiles) * double(p.groups) * double(split.count) * double(residues);
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
    const int error = launch({.grid = dim3(unsigned(plan.blocks)), .block = dim3(threads), .stream = stream},
                             kernel, dense, gathered, bias, split ? workspace : result, plan.gemm);
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
