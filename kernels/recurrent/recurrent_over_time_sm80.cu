// Products of a recurrent layer over all steps at once, in bfloat16 or float16 with sums in float: see
// recurrent_over_time.h. One kernel for all of them,
//
//   out[row, column] = biases[column] + sum over sources, sum over depth of  rows[row, depth] columns[column,
//   depth]
//
// with rows or depths that are listed, so that padding costs nothing and is never read. mma_gemm.cuh has the
// tiles and the mma. Three stages of 32 depths travel from memory by cp.async while one is multiplied.
// Operands whose rows do not begin on 16 bytes come element by element: right, and about four times slower.
//
// A sum over all rows (a weight's gradient) is cut into parts, one a block, so that few results fill a GPU;
// sum_recurrent_parts() adds the parts in order: the same bits in every run.
//
// Bound: the tensor cores' issue. mma.sync gives at most about 60 % of what wgmma gives on an H200; with 12
// ldmatrix and 32 mma a warp and stage, shared memory is read for 96 of every 256 cycles that the mma take.
// Predicted for an H200 before any measurement (none was made when this was written): 350 TFLOP/s, so for
// LSTM T 512 B 64 I = H = 1024 (275 GFLOP) 0.8 ms forward, 2.4 ms for both gradients; the output in float is
// 537 MB, 0.12 ms of that.
#include <algorithm>

#include "common/mma_gemm.cuh"
#include "recurrent/recurrent_gemm.cuh"
#include "recurrent/recurrent_over_time.h"

namespace pyseqnet {
namespace {

constexpr int stages = 3;
constexpr int elements_at_once = 8;  // of 16 bytes

// Copies 32 depths of 128 lines, those of [depth, end) and of the first `lines` that exist, zeros for the
// others.
template <bool along_depth, class T>
PYSEQNET_DEVICE void fetch_tile(T* to, const Operand& o, const int64_t* line_at, int64_t lines, int64_t depth,
                                int64_t end, bool by_vectors, int thread) {
  constexpr int inner = along_depth ? mma_depth : mma_lines;  // neighbours in memory
  const auto* const elements = static_cast<const T*>(o.elements);
  const auto* const alternate = static_cast<const T*>(o.alternate);
  const auto source = [&](int outer, int within, const T*& from) {
    const int line = along_depth ? outer : within, k = along_depth ? within : outer;
    if (depth + k >= end || line >= lines) return false;
    int64_t place = along_depth ? depth + k : (depth + k) * o.depth_stride;
    from = elements;
    if (!along_depth && o.depth_list) {
      place = o.depth_list[depth + k];
      if (place < 0) from = alternate, place = ~place;
      place *= o.depth_stride;
    }
    if (!from) return false;
    from += place + line_at[line];
    return true;
  };
  if (by_vectors) {
    constexpr int vectors = inner / elements_at_once, count = mma_lines * mma_depth / elements_at_once;
#pragma unroll 1  // two rounds; side by side their addresses would not fit into registers
    for (int i = thread; i < count; i += mma_threads) {
      const int outer = i / vectors, within = i % vectors * elements_at_once;
      const T* from = elements;
      const bool exists = source(outer, within, from);
      ptx::cp_async_16(ptx::smem_u32(to + outer * MmaTile<along_depth>::stride + within),
                       exists ? from : elements, exists);
    }
  } else {
#pragma unroll 1
    for (int i = thread; i < mma_lines * mma_depth; i += mma_threads) {
      const int outer = i / inner, within = i % inner;
      const T* from = nullptr;
      to[outer * MmaTile<along_depth>::stride + within] =
          source(outer, within, from) ? *from : from_accumulator<T>(0);
    }
  }
}

template <class T, class Out, bool row_along, bool column_along>
__global__ void __launch_bounds__(mma_threads, 2)
    recurrent_mma_product(const Product p, Out* __restrict__ out, bool row_vectors, bool column_vectors) {
  using RowTile = MmaTile<row_along>;
  using ColumnTile = MmaTile<column_along>;
  PYSEQNET_DYNAMIC_SHARED(unsigned char, shared);
  PYSEQNET_SHARED(int64_t, row_at, [mma_lines]);
  PYSEQNET_SHARED(int64_t, column_at, [mma_lines]);
  T* const tiles = reinterpret_cast<T*>(shared);
  const int thread = int(threadIdx.x);
  const int64_t block = blockIdx.x, tile = block % (p.column_tiles * p.row_tiles);
  const int64_t first_column = tile % p.column_tiles * mma_lines;
  const int64_t first_row = tile / p.column_tiles * mma_lines;
  const int64_t part = block / (p.column_tiles * p.row_tiles);
  const int64_t begin = p.in_parts ? part * p.part_depth : 0;
  const int64_t end = p.in_parts && begin + p.part_depth < p.depth ? begin + p.part_depth : p.depth;
  const bool sum_rows = p.in_parts && first_column == 0;
  const MmaPlace at(thread);
  MmaSums sums = {};
  float row_sum = 0;

  const auto list_lines = [&](int64_t* to, const Operand& o, int64_t first, int64_t count) {
    const int64_t line = first + thread;
    if (thread >= mma_lines || line >= count) return;
    to[thread] = (o.line_list ? o.line_list[line] : line + (line >= o.gap_from ? o.gap : 0)) * o.line_stride;
  };
  for (int s = 0; s < p.sources; s++) {
    const Operand &row = p.source[s].row, &column = p.source[s].column;
    list_lines(row_at, row, first_row, p.rows);
    list_lines(column_at, column, first_column, p.columns);
    __syncthreads();
    const auto fetch = [&](int stage, int64_t depth) {
      T* const rows = tiles + stage * (RowTile::elements + ColumnTile::elements);
      fetch_tile<row_along>(rows, row, row_at, p.rows - first_row, depth, end, row_vectors, thread);
      if (column.elements)
        fetch_tile<column_along>(rows + RowTile::elements, column, column_at, p.columns - first_column, depth,
                                 end, column_vectors, thread);
      ptx::cp_async_commit();
    };
#pragma unroll
    for (int stage = 0; stage < stages - 1; stage++) fetch(stage, begin + stage * mma_depth);
    int now = 0;
    for (int64_t depth = begin; depth < end; depth += mma_depth) {
      ptx::cp_async_wait<stages - 2>();
      __syncthreads();  // the stage is there for all, and all are done with the one before
      fetch(now == 0 ? stages - 1 : now - 1, depth + (stages - 1) * mma_depth);
      const T* const rows = tiles + now * (RowTile::elements + ColumnTile::elements);
      if (column.elements) multiply_tiles<row_along, column_along>(sums, rows, rows + RowTile::elements, at);
      if (sum_rows && thread < mma_lines)
        for (int k = 0; k < mma_depth; k++) row_sum += load(rows + RowTile::at(thread, k));
      now = now + 1 == stages ? 0 : now + 1;
    }
    ptx::cp_async_wait<0>();
    __syncthreads();
  }

  Out* const part_out = out + part * p.part_results() * (p.in_parts ? 1 : 0);
#pragma unroll
  for (int i = 0; i < mma_warp_rows / 16; i++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int64_t row = first_row + at.row_of(i, 2 * half);
      if (row >= p.rows) continue;
      Out* const line = part_out + ((p.out_list ? p.out_list[row] : row) * p.out_stride - p.out_origin);
#pragma unroll
      for (int j = 0; j < mma_warp_columns / 8; j++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const int64_t c = first_column + at.column_of(j, e);
          if (c >= p.columns) continue;
          float value = sums.value[i][j][2 * half + e];
          if (p.bias) value += load(static_cast<const T*>(p.bias) + c);
          if (p.second_bias && c < p.second_bias_columns)
            value += load(static_cast<const T*>(p.second_bias) + c);
          store(line + c, value);
        }
    }
  if (sum_rows && thread < mma_lines && first_row + thread < p.rows)
    store(part_out + p.rows * p.columns + first_row + thread, row_sum);
}

template <bool along_depth>
bool can_load_vectors(const Operand& o, bool listed_on_vectors, int64_t depth, int64_t lines) {
  const auto divides = [](int64_t n) { return n % elements_at_once == 0; };
  const bool aligned =
      reinterpret_cast<uintptr_t>(o.elements) % 16 == 0 && reinterpret_cast<uintptr_t>(o.alternate) % 16 == 0;
  if (!aligned || !listed_on_vectors) return false;
  if (along_depth) return divides(o.line_stride) && divides(depth);
  return divides(o.depth_stride) && divides(lines) && o.line_stride == 1 &&
         (o.gap == 0 || (divides(o.gap) && divides(o.gap_from)));
}

// How a sum over `depth` is cut; it depends on the problem only. Parts of 256 terms at least.
void cut_for_mma(Product& p) {
  constexpr int64_t blocks_wanted = 528, fewest_terms = 256;  // four blocks a multiprocessor
  const int64_t tiles = std::max<int64_t>(
      ceil_divide(p.rows, mma_lines) * ceil_divide(std::max<int64_t>(p.columns, 1), mma_lines), 1);
  const int64_t wanted = std::min({ceil_divide(blocks_wanted, tiles), most_parts,
                                   std::max<int64_t>(ceil_divide(p.depth, fewest_terms), 1)});
  p.in_parts = true;
  p.part_depth = ceil_divide(ceil_divide(p.depth, wanted), mma_depth) * mma_depth;
  p.parts = p.part_depth > 0 ? ceil_divide(p.depth, p.part_depth) : 1;
}

// `lists_on_vectors`: whether what the operands' lists hold, times their strides, is a multiple of 16 bytes.
template <class T, class Out, bool row_along, bool column_along>
int launch_mma_product(Product p, void* out, bool row_lists_on_vectors, bool column_lists_on_vectors,
                       void* stream) {
  if (p.rows == 0 || (p.columns == 0 && !p.in_parts)) return launch_ok;
  p.row_tiles = ceil_divide(p.rows, mma_lines);
  p.column_tiles = p.columns > 0 ? ceil_divide(p.columns, mma_lines) : 1;
  if (p.columns == 0) p.source[0].column.elements = p.source[0].column.alternate = nullptr;
  if (p.in_parts) p.out_stride = p.columns;
  bool row_vectors = true, column_vectors = true;
  for (int s = 0; s < p.sources; s++) {
    row_vectors &= can_load_vectors<row_along>(p.source[s].row, row_lists_on_vectors, p.depth, p.rows);
    column_vectors &=
        can_load_vectors<column_along>(p.source[s].column, column_lists_on_vectors, p.depth, p.columns);
  }
  const unsigned bytes =
      stages * (MmaTile<row_along>::elements + MmaTile<column_along>::elements) * unsigned(sizeof(T));
  return launch({.grid = grid_of(p.row_tiles * p.column_tiles * p.parts),
                 .block = dim3(mma_threads),
                 .dynamic_shared_bytes = bytes,
                 .stream = stream},
                recurrent_mma_product<T, Out, row_along, column_along>, p, static_cast<Out*>(out),
                row_vectors, column_vectors);
}

template <class F>
int dispatch_short(DType dtype, F&& f) {
  return dtype == DType::bf16 ? f(TypeTag<__nv_bfloat16>{}) : f(TypeTag<__half>{});
}

int64_t slots_of(const RecurrentProblem& p) { return p.saved() ? p.saved() : 1; }
// The third gate of a GRU has two slots: what counts for h is the second one.
int64_t third_gate_of(const RecurrentProblem& p) {
  return p.cell == RecurrentCell::gru ? 2 * p.H : INT64_MAX;
}
bool divides_rows(int64_t stride_t, int64_t stride_b) {
  return stride_t % elements_at_once == 0 && stride_b % elements_at_once == 0;
}

Product weight_product(const RecurrentProblem& p, int64_t columns, int64_t rows) {
  Product product;
  product.rows = p.gates() * p.H, product.columns = columns, product.depth = rows;
  cut_for_mma(product);
  return product;
}

}  // namespace

int launch_input_part(const RecurrentProblem& p, const RecurrentTensors& t, const TimeRows& rows, float* sums,
                      int64_t d, void* stream) {
  const RecurrentWeights& w = t.weights[d];
  Product product;
  product.rows = rows.count, product.columns = p.gates() * p.H, product.depth = p.I;
  Operand &x = product.source[0].row, &w_ih = product.source[0].column;
  x.elements = t.x, x.line_list = rows.x;
  w_ih.elements = w.w_ih, w_ih.line_stride = p.I;
  product.bias = w.b_ih, product.second_bias = w.b_hh;
  product.second_bias_columns = std::min(third_gate_of(p), product.columns);
  product.out_list = rows.row, product.out_stride = slots_of(p) * p.H;
  product.out_origin = -d * p.rows() * product.out_stride;
  // A list of places that are multiples of a vector is as good as such a stride.
  const bool on_vectors = divides_rows(p.x_t, p.x_b);
  x.line_stride = 1;
  return dispatch_short(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return launch_mma_product<T, float, true, true>(product, sums, on_vectors, true, stream);
  });
}

int launch_input_gradient(const RecurrentProblem& p, const RecurrentTensors& t, const TimeRows& rows,
                          const void* slot_gradients, void* stream) {
  const int64_t row_width = slots_of(p) * p.H;
  Product product;
  product.rows = rows.count, product.columns = p.I, product.depth = p.gates() * p.H;
  product.sources = int(p.D);
  for (int64_t d = 0; d < p.D; d++) {
    Operand &slots = product.source[d].row, &w_ih = product.source[d].column;
    slots.elements = static_cast<const uint16_t*>(slot_gradients) + d * p.rows() * row_width;
    slots.line_list = rows.row, slots.line_stride = row_width;
    w_ih.elements = t.weights[d].w_ih, w_ih.depth_stride = p.I;
  }
  product.out_list = rows.gx, product.out_stride = 1;
  return dispatch_short(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return launch_mma_product<T, T, true, false>(product, t.gx, true, true, stream);
  });
}

int launch_weight_gradients(const RecurrentProblem& p, const RecurrentTensors& t, const TimeRows& rows,
                            const void* slot_gradients, float* partial, int64_t d, void* stream) {
  const RecurrentGradients& to = t.gradients[d];
  const int64_t row_width = slots_of(p) * p.H;
  Operand slots;
  slots.elements = static_cast<const uint16_t*>(slot_gradients) + d * p.rows() * row_width;
  slots.depth_list = rows.row, slots.depth_stride = row_width;
  return dispatch_short(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto run = [&](const Product& product, bool lists_on_vectors, void* gradient, void* row_sums) {
      const int error =
          launch_mma_product<T, float, false, false>(product, partial, true, lists_on_vectors, stream);
      return error ? error : launch_sum_recurrent_parts<T>(product, partial, gradient, row_sums, stream);
    };
    Product of_input = weight_product(p, p.I, rows.count);
    of_input.source[0].row = slots;
    of_input.source[0].column.elements = t.x, of_input.source[0].column.depth_list = rows.x;
    const int error = run(of_input, divides_rows(p.x_t, p.x_b), to.w_ih, to.b_ih);
    if (error) return error;

    Product of_h = weight_product(p, p.H, rows.count);
    of_h.source[0].row = slots;
    of_h.source[0].row.gap_from = third_gate_of(p), of_h.source[0].row.gap = p.H;
    Operand& before = of_h.source[0].column;
    before.elements = t.y, before.alternate = t.h0, before.depth_list = rows.before[d];
    // The listed places hold d * H and, in h0, multiples of H.
    return run(of_h, divides_rows(p.y_t, p.y_b) && p.H % elements_at_once == 0, to.w_hh, to.b_hh);
  });
}

int64_t weight_gradient_partials(const RecurrentProblem& p, int64_t rows) {
  const Product of_input = weight_product(p, p.I, rows), of_h = weight_product(p, p.H, rows);
  return std::max(of_input.parts * of_input.part_results(), of_h.parts * of_h.part_results());
}

}  // namespace pyseqnet
