// One matrix product for everything in a recurrent layer that is a product over all steps at once:
//
//   out[row, column] = bias[column] + sum over sources, sum over depth of  rows[row, depth] * columns[column,
//   depth]
//
// with rows, columns and depths that may be listed (see list_rows): the input's part of all gates, and the
// gradients of x and of all weights. Elements are widened where they are loaded.
//
// The tile: 128 threads compute 64 x 128 results (32 x 64 in double), 8 x 8 each (4 x 4), from
// double-buffered shared memory, 8 depths at a time; the next 8 travel from global memory to registers while
// the present ones are multiplied. Neighbouring threads load neighbouring lines or neighbouring depths,
// whichever are neighbours in memory.
//
// A sum over all steps (a weight's gradient) is cut twice. Into parts, one a block, so that few results still
// fill a GPU; and each part into runs of 256 terms, whose sums are added to the part's result in memory: the
// error of a float sum grows with its length. sum_recurrent_parts() adds the parts in order: the same bits in
// every run. The row sums that come along are the gradients of the biases.
//
// Bound: FMA issue. Of what a warp executes in a step of 8 depths 512 instructions are FMA and, as estimated
// from the sm_90a code, about 200 are not: 70 % of FMA peak at most. 207 to 255 registers in float, 190 to
// 234 in double: two blocks a multiprocessor.
#pragma once
#include "recurrent/recurrent_sequences.cuh"

namespace pyseqnet {

constexpr int product_threads = 128;
constexpr int product_row_threads = 8, product_column_threads = product_threads / product_row_threads;
constexpr int product_depth = 8;        // eight floats are a whole sector of memory
constexpr int64_t longest_run = 256;    // terms that are added without an intermediate result
constexpr int64_t shortest_part = 512;  // terms that are worth a block of their own

template <class Acc_>
struct ProductTile {
  using Acc = Acc_;
  static constexpr int group = 16 / int(sizeof(Acc)), extent = 2 * group;  // a thread's results: extent^2
  static constexpr int rows = product_row_threads * extent, columns = product_column_threads * extent;
  static constexpr int row_loads = rows * product_depth / product_threads;
  static constexpr int column_loads = columns * product_depth / product_threads;
  static constexpr int blocks_per_multiprocessor = 2;

  // One vector of padding a line: eight depths of four neighbours are written to 32 different banks.
  Acc row[2][product_depth][rows + group];
  Acc column[2][product_depth][columns + group];
  int64_t row_at[rows], column_at[columns];  // of each line's depth 0
};

// One side of a product. Its element (line, depth) lies at  place(line) + place(depth).
struct Operand {
  const void* elements = nullptr;
  const void* alternate = nullptr;     // where depth_list holds ~i: element i of this; null: zeros
  const int64_t* line_list = nullptr;  // place(line) = line_list[line] * line_stride; null: the line's number
  const int64_t* depth_list = nullptr;  // likewise
  int64_t line_stride = 1, depth_stride = 1;
  int64_t gap_from = INT64_MAX, gap = 0;  // lines from gap_from on lie `gap` further
  bool along_depth = false;               // neighbouring depths are neighbours in memory; no list of depths
};

struct ProductSource {
  Operand row, column;
};

struct Product {
  ProductSource source[max_directions];
  int sources = 1;
  int64_t rows = 0, columns = 0, depth = 0;
  // Row r is written at  out_list[r] * out_stride - out_origin; without a list at  r * out_stride -
  // out_origin.
  const int64_t* out_list = nullptr;
  int64_t out_stride = 0, out_origin = 0;
  // Of the column operand's type; the second one for columns below second_bias_columns. Null: none.
  const void *bias = nullptr, *second_bias = nullptr;
  int64_t second_bias_columns = 0;
  // In parts: out is the workspace, a part has rows * columns results, then the sums of the rows.
  bool in_parts = false;
  int64_t parts = 1, part_depth = 0;
  int64_t row_tiles = 1, column_tiles = 1;

  PYSEQNET_HOST_DEVICE int64_t part_results() const { return rows * columns + rows; }
};

// Which elements of a tile a thread moves: (line, depth), then `loads` times a step of one of both.
struct ProductShare {
  int line, depth, line_step, depth_step;
  PYSEQNET_DEVICE ProductShare(int t, int extent, bool along_depth)
      : line(along_depth ? t / product_depth : t % extent),
        depth(along_depth ? t % product_depth : t / extent),
        line_step(along_depth ? product_threads / product_depth : 0),
        depth_step(along_depth ? 0 : product_threads / extent) {}
};

// Lines past the last read the last: their results are not stored.
template <int lines>
PYSEQNET_DEVICE void list_lines(int64_t (&at)[lines], const Operand& o, int64_t first, int64_t count, int t) {
  static_assert(lines <= product_threads);
  if (t >= lines) return;
  const int64_t line = first + t < count ? first + t : count > 0 ? count - 1 : 0;
  at[t] = (o.line_list ? o.line_list[line] : line + (line >= o.gap_from ? o.gap : 0)) * o.line_stride;
}

// Loads a thread's elements of the depths that begin at `begin`, zeros from `end` on. The three cases are
// alike for all threads; in the first all of a thread's elements have one depth, in the others one line.
template <class Element, int lines, int loads>
PYSEQNET_DEVICE void fetch_operand(Element (&to)[loads], const Operand& o, const int64_t (&line_at)[lines],
                                   const ProductShare& share, int64_t begin, int64_t end) {
  const auto* const elements = static_cast<const Element*>(o.elements);
  const Element zero = from_accumulator<Element>(0);
  const int64_t depth = begin + share.depth;
  if (!elements) end = begin;  // a product without columns, for its row sums
  if (o.along_depth) {
    const bool inside = depth < end;
    const Element* const at_depth = elements + depth;
#pragma unroll
    for (int j = 0; j < loads; j++)
      to[j] = inside ? at_depth[line_at[share.line + j * share.line_step]] : zero;
  } else if (!o.depth_list) {
    const Element* const at_line = elements + (line_at[share.line] + depth * o.depth_stride);
    const int64_t stride = share.depth_step * o.depth_stride;
#pragma unroll
    for (int j = 0; j < loads; j++) to[j] = depth + j * share.depth_step < end ? at_line[j * stride] : zero;
  } else {
    const int64_t line = line_at[share.line];
    const int64_t* const list = o.depth_list + depth;
#pragma unroll
    for (int j = 0; j < loads; j++) {
      to[j] = zero;
      if (depth + j * share.depth_step >= end) continue;
      const int64_t place = list[j * share.depth_step];
      const auto* from = place < 0 ? static_cast<const Element*>(o.alternate) : elements;
      if (from) to[j] = from[(place < 0 ? ~place : place) * o.depth_stride + line];
    }
  }
}

template <class Element, class Acc, int width, int loads>
PYSEQNET_DEVICE void stash_operand(Acc (&to)[product_depth][width], const Element (&from)[loads],
                                   const ProductShare& share) {
#pragma unroll
  for (int j = 0; j < loads; j++)
    to[share.depth + j * share.depth_step][share.line + j * share.line_step] = to_accumulator(from[j]);
}

template <class T, int n>
struct alignas(sizeof(T) * n) ProductVector {
  T element[n];
};

// A warp is 4 x 8 threads: its vectors of one depth are 64 and 128 bytes of shared memory.
struct ProductPlace {
  int row, column;
  PYSEQNET_DEVICE explicit ProductPlace(int t)
      : row(t % 32 / 8 + t / 64 * 4), column(t % 8 + t / 32 % 2 * 8) {}
  template <class Tile>
  PYSEQNET_DEVICE int row_of(int i) const {
    return (i / Tile::group * product_row_threads + row) * Tile::group + i % Tile::group;
  }
  template <class Tile>
  PYSEQNET_DEVICE int column_of(int j) const {
    return (j / Tile::group * product_column_threads + column) * Tile::group + j % Tile::group;
  }
};

template <class Tile>
PYSEQNET_DEVICE void multiply_tiles(typename Tile::Acc (&sum)[Tile::extent][Tile::extent], const Tile& memory,
                                    int buffer, const ProductPlace& at) {
  using Group = ProductVector<typename Tile::Acc, Tile::group>;
#pragma unroll
  for (int depth = 0; depth < product_depth; depth++) {
    Group a[2], b[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      a[i] = *reinterpret_cast<const Group*>(
          &memory.row[buffer][depth][at.template row_of<Tile>(i * Tile::group)]);
      b[i] = *reinterpret_cast<const Group*>(
          &memory.column[buffer][depth][at.template column_of<Tile>(i * Tile::group)]);
    }
#pragma unroll
    for (int i = 0; i < Tile::extent; i++)
#pragma unroll
      for (int j = 0; j < Tile::extent; j++)
        sum[i][j] +=
            a[i / Tile::group].element[i % Tile::group] * b[j / Tile::group].element[j % Tile::group];
  }
}

// Adds the depths [begin, end) of a source, whose lines are listed. All threads leave together.
template <class Row, class Column, class Tile>
PYSEQNET_DEVICE void add_depths(typename Tile::Acc (&sum)[Tile::extent][Tile::extent],
                                typename Tile::Acc& row_sum, bool sum_rows, Tile& memory,
                                const ProductSource& s, int64_t begin, int64_t end, int t) {
  const ProductPlace at(t);
  const ProductShare row_share(t, Tile::rows, s.row.along_depth);
  const ProductShare column_share(t, Tile::columns, s.column.along_depth);
  Row row[Tile::row_loads];
  Column column[Tile::column_loads];
  fetch_operand(row, s.row, memory.row_at, row_share, begin, end);
  fetch_operand(column, s.column, memory.column_at, column_share, begin, end);
  stash_operand(memory.row[0], row, row_share);
  stash_operand(memory.column[0], column, column_share);
  __syncthreads();
  // The buffer that is written was last read in the step before: one barrier a step.
  int now = 0;
  for (int64_t depth = begin; depth < end; depth += product_depth, now = 1 - now) {
    fetch_operand(row, s.row, memory.row_at, row_share, depth + product_depth, end);
    fetch_operand(column, s.column, memory.column_at, column_share, depth + product_depth, end);
    multiply_tiles(sum, memory, now, at);
    if (sum_rows && t < Tile::rows)
#pragma unroll
      for (int k = 0; k < product_depth; k++) row_sum += memory.row[now][k][t];
    stash_operand(memory.row[1 - now], row, row_share);
    stash_operand(memory.column[1 - now], column, column_share);
    __syncthreads();
  }
}

// Writes `count` of a group of neighbours, or adds to them.
template <class Out, int group, class Acc>
PYSEQNET_DEVICE void put_neighbours(Out* out, const Acc (&value)[group], int64_t count, bool add) {
  using Group = ProductVector<Out, group>;
  if (count >= group && reinterpret_cast<uintptr_t>(out) % sizeof(Group) == 0) {
    Group v;
    if (add) v = *reinterpret_cast<const Group*>(out);
#pragma unroll
    for (int j = 0; j < group; j++)
      v.element[j] = from_accumulator<Out>(add ? to_accumulator(v.element[j]) + value[j] : value[j]);
    *reinterpret_cast<Group*>(out) = v;
    return;
  }
#pragma unroll
  for (int j = 0; j < group; j++)
    if (j < count) store(out + j, add ? load(out + j) + value[j] : value[j]);
}

template <class Tile, class Column, class Out>
PYSEQNET_DEVICE void put_results(Out* out, typename Tile::Acc (&sum)[Tile::extent][Tile::extent],
                                 const Product& p, int64_t first_row, int64_t first_column,
                                 const ProductPlace& at, bool add) {
  using Acc = typename Tile::Acc;
#pragma unroll
  for (int i = 0; i < Tile::extent; i++) {
    const int64_t row = first_row + at.template row_of<Tile>(i);
    if (row >= p.rows) continue;
    Out* line = out + ((p.out_list ? p.out_list[row] : row) * p.out_stride - p.out_origin);
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const int64_t column = first_column + at.template column_of<Tile>(j * Tile::group);
      if (column >= p.columns) continue;
      Acc value[Tile::group];
#pragma unroll
      for (int k = 0; k < Tile::group; k++) {
        const int64_t c = column + k;
        value[k] = sum[i][j * Tile::group + k];
        if (p.bias && c < p.columns) value[k] += load(static_cast<const Column*>(p.bias) + c);
        if (p.second_bias && c < p.second_bias_columns)
          value[k] += load(static_cast<const Column*>(p.second_bias) + c);
      }
      put_neighbours(line + column, value, p.columns - column, add);
    }
  }
}

template <class Row, class Column, class Out>
__global__ void __launch_bounds__(product_threads,
                                  ProductTile<accumulator_t<Column>>::blocks_per_multiprocessor)
    recurrent_product(const Product p, Out* __restrict__ out) {
  using Acc = accumulator_t<Column>;
  using Tile = ProductTile<Acc>;
  PYSEQNET_SHARED(Tile, memory, );
  const int t = int(threadIdx.x);
  // Blocks that share rows are neighbours: there are more rows than columns where both are large.
  const int64_t block = blockIdx.x, tile = block % (p.column_tiles * p.row_tiles);
  const int64_t first_column = tile % p.column_tiles * Tile::columns;
  const int64_t first_row = tile / p.column_tiles * Tile::rows;
  const int64_t part = block / (p.column_tiles * p.row_tiles);
  const ProductPlace at(t);
  Acc sum[Tile::extent][Tile::extent] = {};
  Acc row_sum = 0;

  Out* const part_out = out + part * p.part_results();
  const bool sum_rows = p.in_parts && first_column == 0;
  const int64_t begin = p.in_parts ? part * p.part_depth : 0;
  const int64_t end = p.in_parts && begin + p.part_depth < p.depth ? begin + p.part_depth : p.depth;
  const int64_t run = p.in_parts ? longest_run : p.depth;
  for (int s = 0; s < p.sources; s++) {
    list_lines(memory.row_at, p.source[s].row, first_row, p.rows, t);
    list_lines(memory.column_at, p.source[s].column, first_column, p.columns, t);
    __syncthreads();
    int64_t depth = begin;
    do {
      const int64_t run_end = depth + run < end ? depth + run : end;
      add_depths<Row, Column>(sum, row_sum, sum_rows, memory, p.source[s], depth, run_end, t);
      const bool add = depth > begin;
      depth += run;
      if (!p.in_parts && (s + 1 < p.sources || depth < end)) continue;
      put_results<Tile, Column>(part_out, sum, p, first_row, first_column, at, add && p.in_parts);
      if (sum_rows && t < Tile::rows && first_row + t < p.rows) {
        Out* to = part_out + p.rows * p.columns + first_row + t;
        store(to, add ? load(to) + row_sum : row_sum);
      }
#pragma unroll
      for (int i = 0; i < Tile::extent; i++)
#pragma unroll
        for (int j = 0; j < Tile::extent; j++) sum[i][j] = 0;
      row_sum = 0;
    } while (depth < end);
  }
}

// About eight blocks a multiprocessor on the largest GPUs (132 to 148 of them).
constexpr int64_t product_target_blocks = 1024;
// Each part is written once and read once; more of them than this would cost more than they bring.
constexpr int64_t most_parts = 32;

// How a sum over `depth` is cut. It depends on the problem only: the same bits on every device.
template <class Acc>
void cut_into_parts(Product& p) {
  using Tile = ProductTile<Acc>;
  const int64_t tiles =
      ceil_divide(p.rows, Tile::rows) * ceil_divide(p.columns > 0 ? p.columns : 1, Tile::columns);
  const int64_t most = ceil_divide(p.depth, shortest_part);
  int64_t wanted = ceil_divide(product_target_blocks, tiles > 0 ? tiles : 1);
  wanted = wanted > most_parts ? most_parts : wanted;
  wanted = wanted > most ? most : wanted;
  p.in_parts = true;
  p.part_depth = ceil_divide(ceil_divide(p.depth, wanted > 0 ? wanted : 1), product_depth) * product_depth;
  p.parts = p.part_depth > 0 ? ceil_divide(p.depth, p.part_depth) : 1;
}

template <class Row, class Column, class Out>
int launch_product(Product p, void* out, void* stream) {
  using Tile = ProductTile<accumulator_t<Column>>;
  if (p.rows == 0 || (p.columns == 0 && !p.in_parts)) return launch_ok;
  p.row_tiles = ceil_divide(p.rows, Tile::rows);
  p.column_tiles = p.columns > 0 ? ceil_divide(p.columns, Tile::columns) : 1;
  if (p.columns == 0) p.source[0].column.elements = p.source[0].column.alternate = nullptr;
  if (p.in_parts) p.out_stride = p.columns;
  const int64_t blocks = p.row_tiles * p.column_tiles * p.parts;
  return launch({.grid = grid_of(blocks), .block = dim3(product_threads), .stream = stream},
                recurrent_product<Row, Column, Out>, p, static_cast<Out*>(out));
}

// out[i] = sum over the parts of partial[part][i]: first `results` elements of out, then of row_sums (null:
// not wanted).
constexpr int parts_threads = 128;

template <class T>
__global__ void __launch_bounds__(parts_threads)
    sum_recurrent_parts(const accumulator_t<T>* __restrict__ partial, T* __restrict__ out,
                        T* __restrict__ row_sums, int64_t results, int64_t count, int64_t parts) {
  const int64_t i = int64_t(blockIdx.x) * parts_threads + threadIdx.x;
  if (i >= count) return;
  T* to = i < results ? out + i : row_sums ? row_sums + (i - results) : nullptr;
  if (!to) return;
  accumulator_t<T> sum = 0;
  for (int64_t part = 0; part < parts; part++) sum += partial[part * count + i];
  store(to, sum);
}

template <class T>
int launch_sum_recurrent_parts(const Product& p, const void* partial, void* out, void* row_sums,
                               void* stream) {
  const int64_t count = p.part_results();
  if (count == 0) return launch_ok;
  return launch(
      {.grid = grid_of(ceil_divide(count, parts_threads)), .block = dim3(parts_threads), .stream = stream},
      sum_recurrent_parts<T>, static_cast<const accumulator_t<T>*>(partial), static_cast<T*>(out),
      static_cast<T*>(row_sums), p.rows * p.columns, count, p.parts);
}

}  // namespace pyseqnet
