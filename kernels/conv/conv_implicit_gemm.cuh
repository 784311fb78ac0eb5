// One matrix product for all passes of a convolution:  out[row, column] = sum over depth of  dense[row,
// depth] * gathered[depth, column],  where one operand is a plain matrix and the other is gathered from an
// image.
//
// A column and a depth are three digits each, and the place of an element in the image is linear in all six
// of them: its offset, its line and its pixel are the sum of what the column adds and what the depth adds. So
// one kernel serves every pass; what differs are the strides in ImplicitGemm. Places of the block's columns
// are worked out once, those of the next eight depths by eight threads a step ahead; both lie in shared
// memory, and the loop that loads elements neither divides nor multiplies.
//
// The tile: 128 threads compute 64 x 128 (32 x 128 where there are few rows, 32 x 64 in double) results, 8 x
// 8 each, from double-buffered shared memory, 8 depths at a time. The next tile travels from global memory to
// registers while the present one is multiplied. Neighbouring threads load neighbouring columns or
// neighbouring depths, whichever are neighbours in memory.
//
// Bound: FMA issue. A warp's step of 8 depths is 512 FMA among about 700 instructions (counted in sm_90a
// code), so 73 % of FMA peak; with 32 rows 256 among 430, 60 %. Registers: 157 to 167 with 64 rows, 108 to
// 128 with 32 and in double; no spills on sm_80 and 120, two values on sm_90a and 100 with 32 rows; three or
// four blocks a multiprocessor.
#pragma once
#include "conv/conv_generic.cuh"

namespace pyseqnet {

constexpr int gemm_threads = 128;
constexpr int row_threads = 8, column_threads = gemm_threads / row_threads;
constexpr int step_depth = 8;  // eight floats of neighbouring channels are a whole sector of memory
// Where registers allow it (the tile of 32 rows), a sum in float is cut into pieces of 256 terms: the error
// of one long chain grows with the root of its length.
constexpr int chunk_steps = 32;

// Each thread owns row_groups x 2 squares of a 16-byte vector's width: shared memory is read by vectors.
template <class T, int row_groups_>
struct GemmTile {
  using Element = T;
  using Acc = accumulator_t<T>;
  static constexpr int group = 16 / int(sizeof(Acc));
  static constexpr int row_groups = row_groups_, column_groups = 2;
  static constexpr bool chunked = row_groups == 1;
  static constexpr int thread_rows = row_groups * group, thread_columns = column_groups * group;
  static constexpr int rows = row_threads * thread_rows, columns = column_threads * thread_columns;
  static constexpr int dense_loads = rows * step_depth / gemm_threads;
  static constexpr int gathered_loads = columns * step_depth / gemm_threads;
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
  static_assert(Tile::rows <= gemm_threads && Tile::columns <= gemm_threads);
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
  static_assert(gemm_threads % extent == 0 || extent % gemm_threads == 0);
  PYSEQNET_DEVICE static int line(int t, int j) {
    return along_depth ? t / step_depth + j * (gemm_threads / step_depth) : t % extent;
  }
  PYSEQNET_DEVICE static int depth(int t, int j) {
    return along_depth ? t % step_depth : t / extent + j * (gemm_threads / extent);
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
__global__ void __launch_bounds__(gemm_threads, GemmTile<T, row_groups>::blocks_per_multiprocessor)
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
  Acc total[Tile::thread_rows][Tile::thread_columns] = {};  // of finished pieces, where there are such
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
    if (Tile::chunked && (step + 1) % chunk_steps == 0)
#pragma unroll
      for (int i = 0; i < Tile::thread_rows; i++)
#pragma unroll
        for (int j = 0; j < Tile::thread_columns; j++) {
          total[i][j] += sum[i][j];
          sum[i][j] = 0;
        }
  }
  if (Tile::chunked)
#pragma unroll
    for (int i = 0; i < Tile::thread_rows; i++)
#pragma unroll
      for (int j = 0; j < Tile::thread_columns; j++) sum[i][j] += total[i][j];

  if (bias && part == 0) {
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

}  // namespace pyseqnet
