// The large products of the CPU kernels' backward pass, over all rows of gradients at once, read through row
// pointers: the gradient of x, a block of rows an item, and those of the weights, a block of gate rows an item.
#pragma once
#include "recurrent/recurrent_backward_memory.h"

namespace pyseqnet {
inline namespace PYSEQNET_ISA {
namespace recurrent {

// ---- Phase 2: gx, a block of rows. ----

inline void input_gradient(const RecurrentProblem& p, const RecurrentTensors& t, const BackwardSizes& z,
                           const BackwardShared& shared, int64_t block, float* scratch) {
  const Schedule& schedule = shared.schedule;
  const int64_t begin = block * BackwardSizes::input_block, K = words(p.gates() * p.H);
  const int64_t n = z.rows - begin < BackwardSizes::input_block ? z.rows - begin : BackwardSizes::input_block;
  const float* a_rows[max_directions][BackwardSizes::input_block];
  float* to_rows[BackwardSizes::input_block];
  int64_t at[BackwardSizes::input_block];
  // The step that row `begin` belongs to: the last one that starts at or before it.
  int64_t low = 0, high = p.T;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (schedule.start[middle] <= begin ? low : high) = middle;
  }
  for (int64_t k = 0, step = low; k < n; k++) {
    while (schedule.start[step + 1] <= begin + k) step++;
    const int64_t rank = begin + k - schedule.start[step], b = schedule.order[rank];
    at[k] = p.gx_at(step, b);
    for (int64_t d = 0; d < p.D; d++)
      a_rows[d][k] = as_words(shared.gradients[d] + (schedule.start[p.step(step, b, d)] + rank) * z.stride);
    to_rows[k] = p.dtype == DType::f32 ? static_cast<float*>(t.gx) + at[k] : scratch + k * p.I;
  }
  for (int64_t d = 0; d < p.D; d++) {
    if (!z.x_in_place) {
      multiply_rows(n, p.I, K, a_rows[d], shared.w_ih[d], to_rows, d > 0);
      continue;
    }
    // A row of gradients begins with the gates that keep parts apart, which are the weight's last.
    const float* w = static_cast<const float*>(t.weights[d].w_ih);
    const int64_t apart = z.facts.apart() * p.H;
    if (apart)
      multiply_rows(n, p.I, apart, a_rows[d], w + z.facts.apart_from * p.H * p.I, to_rows, d > 0,
                    Panels::in_place);
    if (apart == K) continue;
    for (int64_t k = 0; k < n; k++) a_rows[d][k] += apart;
    multiply_rows(n, p.I, K - apart, a_rows[d], w, to_rows, apart || d > 0, Panels::in_place);
  }
  if (p.dtype != DType::f32)
    for (int64_t k = 0; k < n; k++) store_row(p.dtype, to_rows[k], t.gx, at[k], p.I);
}

// ---- Phase 3: gradients of the weights. ----

// The weights' products sum over rows, in blocks of them: so many that adding a block's sums to the rest costs
// little, few enough for what is packed to stay in the second-level cache. Each block's sums are closed first.
constexpr int64_t summed_rows = 192;

// What the gradients are multiplied with: b_rows (N elements each), into product (M x N).
struct Target {
  DType dtype;
  const void* const* b_rows;
  int64_t N;
  float* product;
};

// product += A^T B over one block of rows. A: M columns of `rows` rows as words, M apart. Out of line: one
// copy serves all weights.
__attribute__((noinline)) void add_block(int64_t M, int64_t rows, const float* a, const Target& target,
                                         int64_t row, float* packed) {
  pack_rows(target.dtype, target.b_rows + row, rows, 0, target.N, packed);
  product_of_columns<4>(M, target.N, words(rows), a, M, packed,
                        StoreC{target.product, target.N, row ? 1.0f : 0.0f});
}

// n lanes of word k of a column block, and what they add to the columns' sums.
PYSEQNET_INLINE vf column_words(const Factor* a, int64_t stride, int64_t k, int64_t rows, int64_t n,
                                vf& sum) {
#if defined(__AVX512BF16__)
  const vh low = load_bits_up_to(a + 2 * k * stride, n);
  const vh high = 2 * k + 1 < rows ? load_bits_up_to(a + (2 * k + 1) * stride, n) : vh{};
  sum += widen_bf16(low) + widen_bf16(high);
  return pair_lanes(low, high);
#else
  (void)rows;
  const vf x = n >= VL ? load(a + k * stride) : load_n(a + k * stride, int(n));
  sum += x;
  return x;
#endif
}
// Copies M columns of `rows` rows side by side, on the way adding each column to its sum.
inline void copy_and_sum(int64_t M, int64_t rows, const Factor* a, int64_t stride, float* copy, float* sums) {
  constexpr int NV = 4;  // a whole stretch of 4 vectors a row: what the prefetchers like
  const int64_t depth = words(rows);
  int64_t m = 0;
  for (; m + NV * VL <= M; m += NV * VL) {
    vf sum[NV] = {};
    for (int64_t k = 0; k < depth; k++)
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++)
        store(copy + k * M + m + v * VL, column_words(a + m + v * VL, stride, k, rows, VL, sum[v]));
    for (int v = 0; v < NV; v++) store(sums + m + v * VL, load(sums + m + v * VL) + sum[v]);
  }
  for (; m < M; m += VL) {
    const int n = M - m < VL ? int(M - m) : VL;
    vf sum{};
    for (int64_t k = 0; k < depth; k++)
      store_n(copy + k * M + m, column_words(a + m, stride, k, rows, n, sum), n);
    store_n(sums + m, load_n(sums + m, n) + sum, n);
  }
}

// All products of M columns of the gradients, which are copied side by side once for all of them, and the sum
// of each column.
inline void multiply_transposed(int64_t M, int64_t rows, const Factor* a, int64_t stride,
                                const Target* targets, int count, float* copy, float* packed, float* sums) {
  for (int k = 0; k < count && rows == 0; k++)
    memset(targets[k].product, 0, size_t(M * targets[k].N) * sizeof(float));
  memset(sums, 0, size_t(M) * sizeof(float));
  for (int64_t row = 0; row < rows; row += summed_rows) {
    const int64_t n = rows - row < summed_rows ? rows - row : summed_rows;
    copy_and_sum(M, n, a + row * stride, stride, copy, sums);
    for (int k = 0; k < count; k++) add_block(M, n, copy, targets[k], row, packed);
  }
}

struct WeightScratch {
  float *products[3], *sums, *copy, *packed;
  WeightScratch(Carver& scratch, const RecurrentProblem& p, const BackwardSizes& z) {
    const int64_t most = p.I > p.R() ? p.I : p.R(), widest = p.H > most ? p.H : most;
    const int64_t rows = z.gate_block > z.projection_block ? z.gate_block : z.projection_block;
    for (float*& product : products) product = scratch.take<float>(p.dtype == DType::f32 ? 0 : rows * widest);
    sums = scratch.take<float>(rows);
    copy = scratch.take<float>(summed_rows * rows);
    packed = scratch.take<float>(packed_size(summed_rows, widest, panel));
  }
};

// Where the product of rows `row` on of a weight's gradient is summed: in place, or before it is rounded.
inline float* product_of(const RecurrentProblem& p, void* to, int64_t row, int64_t N, float* scratch) {
  return p.dtype == DType::f32 ? static_cast<float*>(to) + row * N : scratch;
}

// Items: direction, part of the row of gradients, block of it.
inline void gate_gradient(const RecurrentProblem& p, const RecurrentTensors& t, const BackwardSizes& z,
                          const BackwardShared& shared, int64_t item, const WeightScratch& scratch) {
  const int64_t first = item % z.gate_blocks * z.gate_block, part = item / z.gate_blocks % z.parts,
                d = item / z.gate_blocks / z.parts;
  const int64_t M = z.part - first < z.gate_block ? z.part - first : z.gate_block;
  if (M <= 0) return;
  const RecurrentGradients& to = t.gradients[d];
  const Factor* a = shared.gradients[d] + part * z.part + first;
  // The rows of the weights that this part of the gradients belongs to, if it does.
  const CellFacts& facts = z.facts;
  const bool whole = z.parts == 1, halves = z.parts == 2;  // halves: all of x, all of h
  const bool of_x = whole || (halves ? part == 0 : part < facts.gates);
  const bool of_h = whole || (halves ? part == 1 : part >= facts.apart());
  const int64_t x_row = (whole || halves || !of_x ? 0 : facts.gate_of_input_block(int(part)) * p.H) + first;
  const int64_t h_row = (whole || halves || !of_h ? 0 : (part - facts.apart()) * p.H) + first;
  Target targets[3];
  int count = 0;
  if (of_x)
    targets[count++] = {p.dtype, shared.x_rows[d], p.I,
                        product_of(p, to.w_ih, x_row, p.I, scratch.products[0])};
  if (of_h)
    targets[count++] = {p.is_jordan() ? DType::f32 : p.dtype, shared.h_rows[d], p.R(),
                        product_of(p, to.w_hh, h_row, p.R(), scratch.products[1])};
  if (facts.feeds_cell)
    targets[count++] = {DType::f32, shared.c_rows[d], p.H,
                        product_of(p, to.w_ch, h_row, p.H, scratch.products[2])};
  multiply_transposed(M, z.rows, a, z.stride, targets, count, scratch.copy, scratch.packed, scratch.sums);
  if (p.dtype != DType::f32) {
    if (of_x) store_row(p.dtype, scratch.products[0], to.w_ih, x_row * p.I, M * p.I);
    if (of_h) store_row(p.dtype, scratch.products[1], to.w_hh, h_row * p.R(), M * p.R());
    if (facts.feeds_cell) store_row(p.dtype, scratch.products[2], to.w_ch, h_row * p.H, M * p.H);
  }
  if (!to.b_ih || facts.over_units) return;
  if (of_x) store_row(p.dtype, scratch.sums, to.b_ih, x_row, M);
  if (of_h) store_row(p.dtype, scratch.sums, to.b_hh, h_row, M);
}
// The gradients of the cell's parameters: the sum over sequences, in one order.
inline void parameter_gradient(const RecurrentProblem& p, const RecurrentTensors& t, const BackwardSizes& z,
                               const BackwardShared& shared, int64_t d) {
  const int64_t n = z.facts.parameters * p.H;
  float* sum = shared.parameter_gradients[d];
  for (int64_t b = 1; b < p.B; b++) add_row(DType::f32, sum, b * n, n, sum);
  if (p.B == 0) sum = nullptr;
  const auto blocks = parameter_blocks<void*>(p.cell, t.gradients[d]);
  int64_t first = 0;
  for (int k = 0; k < blocks.count; first += blocks.block[k++].rows * p.H)
    for (void* to : {blocks.block[k].values, blocks.block[k].also}) {
      if (to && sum) store_row(p.dtype, sum + first, to, 0, blocks.block[k].rows * p.H);
      if (to && !sum) zero_row(p.dtype, to, 0, blocks.block[k].rows * p.H);
    }
}
inline void projection_gradient(const RecurrentProblem& p, const RecurrentTensors& t, const BackwardSizes& z,
                                const BackwardShared& shared, int64_t item, const WeightScratch& scratch,
                                const void** m_rows) {
  const int64_t d = item / z.projection_blocks, j = item % z.projection_blocks * z.projection_block;
  const int64_t M = p.P - j < z.projection_block ? p.P - j : z.projection_block;
  if (M <= 0) return;
  for (int64_t k = 0; k < z.rows; k++) m_rows[k] = shared.m[d] + k * p.H;
  void* to = t.gradients[d].w_hr;
  const Target target{DType::f32, m_rows, p.H, product_of(p, to, j, p.H, scratch.products[0])};
  const Factor* a = reinterpret_cast<const Factor*>(shared.h_gradients[d]) + j;  // float: pairs refuse it
  multiply_transposed(M, z.rows, a, p.P, &target, 1, scratch.copy, scratch.packed, scratch.sums);
  if (p.dtype != DType::f32) store_row(p.dtype, scratch.products[0], to, j * p.H, M * p.H);
  if (t.gradients[d].b_hr) store_row(p.dtype, scratch.sums, t.gradients[d].b_hr, j, M);
}

}  // namespace recurrent
}  // namespace PYSEQNET_ISA
}  // namespace pyseqnet
