// Recurrent layers on the CPU, backward.
// ISA: +avx512bf16
//
// Phase 0 packs the weights by rows. Phase 1 walks each batch of sequences back through time: the cell's
// backward leaves the gradients of the sums, one row for each sequence and step, and one product turns them
// into the gradient of h of the step before. Only this part is sequential. Everything else is three large
// products over all rows at once, read through row pointers, so that padded, packed and reversed data need no
// copy: phase 2 makes gx, a block of rows an item; phase 3 makes the weights' gradients, a block of gate rows
// an item, each summed over all rows in one fixed order.
//
// Rows of gradients lie in the order (step of processing, rank of length): no padding. A GRU's row is n r z
// q: its first three parts meet x, its last three h.
//
// Bound: FMA throughput, 4 * rows * G * H * (I + R) in all. The rows of gradients are written once and read
// three times from the third level; a product reads each of them for at least 64 columns.
#include "recurrent/recurrent_products.h"
#include "recurrent/recurrent_schedule.h"

namespace pyseqnet {
inline namespace PYSEQNET_ISA {
namespace recurrent {
namespace {

constexpr int64_t panel = 4 * VL;

struct Sizes {
  int64_t rows;                  // of all sequences together
  int64_t slots, width, stride;  // a row of gradients: slots * H elements, in whole words
  int64_t x_panels, h_panels, m_panels;
  bool x_in_place, h_in_place;  // few rows multiply a weight where it lies: packing would cost more
  int64_t batch, input_blocks;
  // A row of gradients in parts that are one piece of each weight's rows, the parts in blocks: one item each.
  int64_t parts, part, gate_blocks, gate_block;
  int64_t projection_blocks, projection_block;

  // Rows of gx that make one item: their gradients and a panel share the second level.
  static constexpr int64_t input_block = 96;

  // Rows of a product to an item: many share what is packed for them, but there are a few items to share out.
  static int64_t blocks(int64_t extent, int64_t parts) {
    constexpr int64_t widest = 512, narrowest = 48, items_wanted = 4;
    int64_t count = (extent + widest - 1) / widest;
    while (count * parts < items_wanted && extent / (count + 1) >= narrowest) count++;
    return count;
  }

  explicit Sizes(const RecurrentProblem& p) {
    rows = p.packed() ? p.rows() : 0;
    for (int64_t b = 0; !p.packed() && b < p.B; b++) rows += p.length(b);
    slots = p.saved() ? p.saved() : 1;
    width = slots * p.H;
    stride = pairs ? 2 * words(width + p.gates() * p.H % 2) : width;  // a product may read one more element
    x_panels = (p.I + panel - 1) / panel, h_panels = (p.R() + panel - 1) / panel;
    const bool few = !pairs && p.dtype == DType::f32 && rows <= few_rows;
    x_in_place = few && p.I % panel == 0, h_in_place = few && p.R() % panel == 0;
    if (x_in_place) x_panels = 0;
    if (h_in_place) h_panels = 0;
    m_panels = p.P ? (p.H + panel - 1) / panel : 0;
    batch = Batch::batch_bound(p);
    input_blocks = (rows + input_block - 1) / input_block;
    parts = p.cell == RecurrentCell::gru ? slots : 1;
    part = width / parts;
    gate_blocks = blocks(part, p.D * parts);
    gate_block = (part + gate_blocks - 1) / gate_blocks;
    projection_blocks = p.P ? blocks(p.P, p.D) : 0;
    projection_block = p.P ? (p.P + projection_blocks - 1) / projection_blocks : 0;
  }
  int64_t packing_items(const RecurrentProblem& p) const {
    return 1 + p.D * (x_panels + h_panels + m_panels);
  }
  int64_t gate_items(const RecurrentProblem& p) const { return p.D * parts * gate_blocks; }
};

// A GRU's row of gradients begins with n. Which gate of the weights its part k of the input's side is.
int64_t input_gate(const RecurrentProblem& p, int64_t k) {
  return p.cell == RecurrentCell::gru ? (k + 2) % 3 : k;
}
// Where the recurrent side of a row of gradients begins.
int64_t recurrent_part(const RecurrentProblem& p) { return p.cell == RecurrentCell::gru ? p.H : 0; }

struct Shared {
  Schedule schedule;
  float *w_ih[max_directions], *w_hh[max_directions], *w_hr[max_directions];
  Factor* gradients[max_directions];    // rows x stride
  const void** x_rows[max_directions];  // of each row of gradients: its x
  const void** h_rows[max_directions];  // and its h of the step before, null for zeros
  float* h_gradients[max_directions];   // rows x P, and
  float* m[max_directions];             // rows x H: what a projection was made of

  Shared(Carver& shared, const RecurrentProblem& p, const Sizes& z) : schedule(Schedule::carve(shared, p)) {
    for (int64_t d = 0; d < p.D; d++) {
      w_ih[d] = shared.take<float>(z.x_panels * panel * words(p.gates() * p.H));
      w_hh[d] = shared.take<float>(z.h_panels * panel * words(p.gates() * p.H));
      w_hr[d] = shared.take<float>(z.m_panels * panel * p.P);
      gradients[d] = shared.take<Factor>(z.rows * z.stride);
      x_rows[d] = shared.take<const void*>(z.rows);
      h_rows[d] = shared.take<const void*>(z.rows);
      h_gradients[d] = shared.take<float>(p.P ? z.rows * p.P : 0);
      m[d] = shared.take<float>(p.P ? z.rows * p.H : 0);
    }
  }
};

// ---- Phase 0. ----

// One panel of a matrix with K rows of N elements: `row(k)` says which row comes k-th.
template <class Row>
void pack_panel(DType dtype, const void* matrix, int64_t K, int64_t N, int64_t which, Row row, float* to) {
  const int64_t column = which * panel, n = N - column < panel ? N - column : panel;
  constexpr int64_t at_once = pairs ? 2 : 1;  // rows that share a word
  for (int64_t k = 0; k < K; k += at_once) {
    const void* rows[at_once];
    for (int64_t i = 0; i < at_once; i++)
      rows[i] = k + i < K ? element(dtype, matrix, row(k + i) * N) : nullptr;
    pack_rows(dtype, rows, at_once, column, n, to + which * panel * words(K) + words(k) * panel);
  }
}
void pack_item(const RecurrentProblem& p, const RecurrentTensors& t, const Sizes& z, int64_t item,
               const Shared& shared) {
  if (item == 0) return shared.schedule.make(p);
  const int64_t each = z.x_panels + z.h_panels + z.m_panels, d = (item - 1) / each, K = p.gates() * p.H;
  int64_t which = (item - 1) % each;
  const RecurrentWeights& w = t.weights[d];
  const auto as_stored = [](int64_t k) { return k; };
  if (which < z.x_panels)
    return pack_panel(
        p.dtype, w.w_ih, K, p.I, which, [&](int64_t k) { return input_gate(p, k / p.H) * p.H + k % p.H; },
        shared.w_ih[d]);
  which -= z.x_panels;
  if (which < z.h_panels) return pack_panel(p.dtype, w.w_hh, K, p.R(), which, as_stored, shared.w_hh[d]);
  pack_panel(p.dtype, w.w_hr, p.P, p.H, which - z.h_panels, as_stored, shared.w_hr[d]);
}

// ---- Phase 1: back through time. ----

struct Scratch {
  Batch batch;
  float *dh, *dm, *dc, *h, *h_before, *c_before;
  const float** a_rows;
  float** to_rows;

  Scratch(Carver& scratch, const RecurrentProblem& p, const Sizes& z) : batch(Batch::carve(scratch, p)) {
    dh = scratch.take<float>(z.batch * p.R());
    dm = scratch.take<float>(p.P ? z.batch * p.H : 0);
    dc = scratch.take<float>(p.has_cell() ? z.batch * p.H : 0);
    h = scratch.take<float>(p.R());
    h_before = scratch.take<float>(p.R());
    c_before = scratch.take<float>(p.H);
    a_rows = scratch.take<const float*>(z.batch);
    to_rows = scratch.take<float*>(z.batch);
  }
};

// Cells whose rows pass by way of sums that they have stored keep these in floats.
template <class Cell>
constexpr bool fits = !pairs || !Cell::facts.over_units;

// All units of one sequence and step.
template <class Cell>
__attribute__((noinline)) void cell_row(int64_t H, const RowBackward<float, Factor>& rows) {
  backward_row<Cell>(LaneRow{}, H, rows);
}

struct BackThroughTime {
  const RecurrentProblem& p;
  const RecurrentTensors& t;
  const Sizes& z;
  const Shared& shared;
  Scratch& at;

  // h of the step before step s, as it lies in y or h0; null: zeros.
  const void* h_before(int64_t d, int64_t b, int64_t s) const {
    if (s > 0) return element(p.dtype, t.y, p.y_at(p.step(s - 1, b, d), b) + d * p.R());
    return t.h0 ? element(p.dtype, t.h0, (d * p.B + b) * p.R()) : nullptr;
  }
  const float* widened(const void* row, int64_t n, float* copy) const {
    if (row) return float_row(p.dtype, row, 0, n, copy);
    load_row(p.dtype, nullptr, 0, n, copy);
    return copy;
  }

  void cell(const Batch& q, int64_t k, int64_t s) const {
    const int64_t d = q.d, b = q.sequence[k], H = p.H, step = p.step(s, b, d), row = p.row(step, b);
    const int64_t to = shared.schedule.start[s] + q.rank[k];
    const float *gates = static_cast<const float*>(t.gates), *cells = static_cast<const float*>(t.cells);
    const void* h = h_before(d, b, s);
    shared.x_rows[d][to] = element(p.dtype, t.x, p.x_at(step, b));
    shared.h_rows[d][to] = h;
    float* dh = at.dh + k * p.R();
    if (t.gy) add_row(p.dtype, t.gy, p.gy_at(step, b) + d * p.R(), p.R(), dh);
    RowBackward<float, Factor> rows{};
    rows.h_gradient = p.P ? at.dm + k * H : dh;
    rows.sums = shared.gradients[d] + to * z.stride;
    if (z.stride > z.width) rows.sums[z.width] = {};  // the last word's other half
    rows.kept = p.saved() ? gates + (d * p.rows() + row) * z.width
                          : float_row(p.dtype, t.y, p.y_at(step, b) + d * H, H, at.h);
    if (p.facts().reads_h) rows.h_before = widened(h, H, at.h_before);
    if (p.has_cell()) {
      rows.c_before =
          s > 0 ? cells + (d * p.rows() + p.row(p.step(s - 1, b, d), b)) * H
                : widened(t.c0 ? element(p.dtype, t.c0, (d * p.B + b) * H) : nullptr, H, at.c_before);
      rows.c_gradient = at.dc + k * H;
    }
    if (p.P) {
      float* whole = shared.h_gradients[d] + to * p.P;
      memcpy(whole, dh, size_t(p.P) * sizeof(float));
      float* const to_row = rows.h_gradient;
      const float* const a_row = whole;
      multiply_rows(1, H, p.P, &a_row, shared.w_hr[d], &to_row, false);
      rows.unprojected = shared.m[d] + to * H;
    }
    with_cell<LaneMath>(p.cell, [&](auto cell) PYSEQNET_LAMBDA {
      if constexpr (fits<decltype(cell)>) cell_row<decltype(cell)>(H, rows);
    });
  }

  void run(const Batch& q) const {
    const int64_t d = q.d, R = p.R(), K = words(p.gates() * p.H);
    for (int64_t k = 0; k < q.n; k++) {
      const int64_t b = q.sequence[k], state = d * p.B + b;
      load_row(p.dtype, t.gh_n, state * R, R, at.dh + k * R);
      if (p.has_cell()) load_row(p.dtype, t.gc_n, state * p.H, p.H, at.dc + k * p.H);
      at.to_rows[k] = at.dh + k * R;
      for (int64_t step = q.length[k]; t.gx && d == 0 && !p.packed() && step < p.T; step++)
        zero_row(p.dtype, t.gx, p.gx_at(step, b), p.I);
    }
    int64_t n = 0;
    for (int64_t s = q.steps() - 1; s >= 0; s--) {
      n = q.active(s, n);
      for (int64_t k = 0; k < n; k++) {
        cell(q, k, s);
        at.a_rows[k] = as_words(shared.gradients[d] + (shared.schedule.start[s] + q.rank[k]) * z.stride +
                                recurrent_part(p));
      }
      if (s > 0 || t.gh0)
        multiply_rows(
            n, R, K, at.a_rows, z.h_in_place ? static_cast<const float*>(t.weights[d].w_hh) : shared.w_hh[d],
            at.to_rows, p.cell == RecurrentCell::gru, z.h_in_place ? Panels::in_place : Panels::packed);
    }
    for (int64_t k = 0; k < q.n; k++) {
      const int64_t state = d * p.B + q.sequence[k];
      if (t.gh0) store_row(p.dtype, at.dh + k * R, t.gh0, state * R, R);
      if (t.gc0) store_row(p.dtype, at.dc + k * p.H, t.gc0, state * p.H, p.H);
    }
  }
};

// ---- Phase 2: gx, a block of rows. ----

void input_gradient(const RecurrentProblem& p, const RecurrentTensors& t, const Sizes& z,
                    const Shared& shared, int64_t block, float* scratch) {
  const Schedule& schedule = shared.schedule;
  const int64_t begin = block * Sizes::input_block, K = words(p.gates() * p.H);
  const int64_t n = z.rows - begin < Sizes::input_block ? z.rows - begin : Sizes::input_block;
  const float* a_rows[max_directions][Sizes::input_block];
  float* to_rows[Sizes::input_block];
  int64_t at[Sizes::input_block];
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
    // A GRU's row of gradients begins with its third gate.
    const float* w = static_cast<const float*>(t.weights[d].w_ih);
    const int64_t third = p.cell == RecurrentCell::gru ? p.H : 0;
    if (third) multiply_rows(n, p.I, third, a_rows[d], w + 2 * p.H * p.I, to_rows, d > 0, Panels::in_place);
    for (int64_t k = 0; k < n; k++) a_rows[d][k] += third;
    multiply_rows(n, p.I, K - third, a_rows[d], w, to_rows, third || d > 0, Panels::in_place);
  }
  if (p.dtype != DType::f32)
    for (int64_t k = 0; k < n; k++) store_row(p.dtype, to_rows[k], t.gx, at[k], p.I);
}

// ---- Phase 3: gradients of the weights. ----

// The weights' products sum over rows. They do so in blocks of rows, small enough for a panel of B to stay in
// the first-level cache while all tiles of A pass; each block's sums are closed before they are added up.
constexpr int64_t summed_rows = pairs ? 192 : 96;

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
void copy_and_sum(int64_t M, int64_t rows, const Factor* a, int64_t stride, float* copy, float* sums) {
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
void multiply_transposed(int64_t M, int64_t rows, const Factor* a, int64_t stride, const Target* targets,
                         int count, float* copy, float* packed, float* sums) {
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
  float *products[2], *sums, *copy, *packed;
  WeightScratch(Carver& scratch, const RecurrentProblem& p, const Sizes& z) {
    const int64_t most = p.I > p.R() ? p.I : p.R(), widest = p.P && p.H > most ? p.H : most;
    const int64_t rows = z.gate_block > z.projection_block ? z.gate_block : z.projection_block;
    for (float*& product : products) product = scratch.take<float>(p.dtype == DType::f32 ? 0 : rows * widest);
    sums = scratch.take<float>(rows);
    copy = scratch.take<float>(summed_rows * rows);
    packed = scratch.take<float>(packed_size(summed_rows, widest, panel));
  }
};

// Where the product of rows `row` on of a weight's gradient is summed: in place, or before it is rounded.
float* product_of(const RecurrentProblem& p, void* to, int64_t row, int64_t N, float* scratch) {
  return p.dtype == DType::f32 ? static_cast<float*>(to) + row * N : scratch;
}

// Items: direction, part of the row of gradients, block of it.
void gate_gradient(const RecurrentProblem& p, const RecurrentTensors& t, const Sizes& z, const Shared& shared,
                   int64_t item, const WeightScratch& scratch) {
  const int64_t first = item % z.gate_blocks * z.gate_block, part = item / z.gate_blocks % z.parts,
                d = item / z.gate_blocks / z.parts;
  const int64_t M = z.part - first < z.gate_block ? z.part - first : z.gate_block;
  if (M <= 0) return;
  const RecurrentGradients& to = t.gradients[d];
  const Factor* a = shared.gradients[d] + part * z.part + first;
  // The rows of the weights that this part of the gradients belongs to, if it does: part k of a GRU's row is
  // gate k - 1 of w_hh.
  const bool gru = p.cell == RecurrentCell::gru, of_x = !gru || part < 3, of_h = !gru || part > 0;
  const int64_t x_row = (gru ? input_gate(p, part) * p.H : 0) + first;
  const int64_t h_row = (gru ? (part - 1) * p.H : 0) + first;
  Target targets[2];
  int count = 0;
  if (of_x)
    targets[count++] = {p.dtype, shared.x_rows[d], p.I,
                        product_of(p, to.w_ih, x_row, p.I, scratch.products[0])};
  if (of_h)
    targets[count++] = {p.dtype, shared.h_rows[d], p.R(),
                        product_of(p, to.w_hh, h_row, p.R(), scratch.products[1])};
  multiply_transposed(M, z.rows, a, z.stride, targets, count, scratch.copy, scratch.packed, scratch.sums);
  if (p.dtype != DType::f32) {
    if (of_x) store_row(p.dtype, scratch.products[0], to.w_ih, x_row * p.I, M * p.I);
    if (of_h) store_row(p.dtype, scratch.products[1], to.w_hh, h_row * p.R(), M * p.R());
  }
  if (!to.b_ih) return;
  if (of_x) store_row(p.dtype, scratch.sums, to.b_ih, x_row, M);
  if (of_h) store_row(p.dtype, scratch.sums, to.b_hh, h_row, M);
}
void projection_gradient(const RecurrentProblem& p, const RecurrentTensors& t, const Sizes& z,
                         const Shared& shared, int64_t item, const WeightScratch& scratch,
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
}

WorkPlan plan_backward(const RecurrentProblem& p) {
  constexpr int64_t elements_worth_a_thread = 20000, products_worth_a_thread = 1000000;
  const Sizes z(p);
  const int64_t K = p.gates() * p.H;
  WorkPlan plan;
  plan.add_phase(z.packing_items(p), 1 + elements_worth_a_thread / (panel * K));
  plan.add_phase(p.D * p.B, sequence_grain(p));
  plan.add_phase(z.input_blocks, 1 + products_worth_a_thread / (p.D * Sizes::input_block * K * (p.I + 1)));
  plan.add_phase(z.gate_items(p) + p.D * z.projection_blocks,
                 1 + products_worth_a_thread / (z.gate_block * (p.I + p.R()) * (z.rows + 1)));
  Carver shared(nullptr), walking(nullptr), inputs(nullptr), weights(nullptr);
  Shared(shared, p, z);
  Scratch(walking, p, z);
  inputs.take<float>(Sizes::input_block * p.I);
  WeightScratch(weights, p, z);
  weights.take<const void*>(p.P ? z.rows : 0);
  plan.shared_bytes = shared.used();
  plan.thread_bytes = walking.used();
  for (int64_t used : {inputs.used(), weights.used()})
    if (used > plan.thread_bytes) plan.thread_bytes = used;
  return plan;
}

void run_backward(const RecurrentProblem& p, const RecurrentTensors& t, const WorkSlice& slice) {
  const FlushResults guard;
  const Sizes z(p);
  Carver shared_memory(slice.shared), scratch_memory(slice.scratch);
  const Shared shared(shared_memory, p, z);
  if (slice.phase == 0)
    for (int64_t item = slice.begin; item < slice.end; item++) pack_item(p, t, z, item, shared);
  if (slice.phase == 1) {
    Scratch scratch(scratch_memory, p, z);
    const BackThroughTime walk{p, t, z, shared, scratch};
    for_batches(p, shared.schedule, slice.begin, slice.end, scratch.batch,
                [&](const Batch& q) { walk.run(q); });
  }
  if (slice.phase == 2 && t.gx) {
    float* rows = scratch_memory.take<float>(Sizes::input_block * p.I);
    for (int64_t item = slice.begin; item < slice.end; item++) input_gradient(p, t, z, shared, item, rows);
  }
  if (slice.phase == 3 && t.weights_wanted()) {
    const WeightScratch scratch(scratch_memory, p, z);
    const void** m_rows = scratch_memory.take<const void*>(p.P ? z.rows : 0);
    const int64_t gates = z.gate_items(p);
    for (int64_t item = slice.begin; item < slice.end; item++)
      if (item < gates)
        gate_gradient(p, t, z, shared, item, scratch);
      else
        projection_gradient(p, t, z, shared, item - gates, scratch, m_rows);
  }
}

}  // namespace
}  // namespace recurrent

extern const RecurrentCpuKernel recurrent_backward;
const RecurrentCpuKernel recurrent_backward = {"fused_" PYSEQNET_ISA_NAME, this_isa, recurrent::refuses,
                                               recurrent::plan_backward, recurrent::run_backward};

}  // namespace PYSEQNET_ISA
}  // namespace pyseqnet
