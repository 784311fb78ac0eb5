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
// Rows of gradients lie in the order (step of processing, rank of length): no padding. A row's blocks are in
// the order of CellFacts: the first gates of them meet x, the last gates of them h.
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
  CellFacts facts;
  int64_t rows;           // of all sequences together
  int64_t width, stride;  // a row of gradients: width elements, in whole words
  int64_t kept;           // a row of what forward kept
  int64_t x_panels, h_panels, m_panels, c_panels;
  bool x_in_place, h_in_place;  // few rows multiply a weight where it lies: packing would cost more
  int64_t batch, input_blocks;
  bool splits;  // the gradient of m is not that of the state
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

  explicit Sizes(const RecurrentProblem& p) : facts(p.facts()) {
    rows = p.packed() ? p.rows() : 0;
    for (int64_t b = 0; !p.packed() && b < p.B; b++) rows += p.length(b);
    width = facts.sums() * p.H, kept = p.saved() * p.H;
    splits = p.P > 0 || p.zoneout();
    stride = pairs ? 2 * words(width + p.gates() * p.H % 2) : width;  // a product may read one more element
    x_panels = (p.I + panel - 1) / panel, h_panels = (p.R() + panel - 1) / panel;
    const bool few = !pairs && p.dtype == DType::f32 && rows <= few_rows;
    x_in_place = few && p.I % panel == 0, h_in_place = few && p.R() % panel == 0;
    if (x_in_place) x_panels = 0;
    if (h_in_place) h_panels = 0;
    m_panels = p.P ? (p.H + panel - 1) / panel : 0;
    c_panels = facts.feeds_cell ? (p.H + panel - 1) / panel : 0;
    batch = Batch::batch_bound(p);
    input_blocks = (rows + input_block - 1) / input_block;
    parts = facts.apart() ? facts.sums() : 1;
    part = width / parts;
    gate_blocks = blocks(part, p.D * parts);
    gate_block = (part + gate_blocks - 1) / gate_blocks;
    projection_blocks = p.P ? blocks(p.P, p.D) : 0;
    projection_block = p.P ? (p.P + projection_blocks - 1) / projection_blocks : 0;
  }
  int64_t packing_items(const RecurrentProblem& p) const {
    return 1 + p.D * (1 + x_panels + h_panels + m_panels + c_panels);
  }
  int64_t gate_items(const RecurrentProblem& p) const { return p.D * parts * gate_blocks; }
};

struct Shared {
  Schedule schedule;
  float *w_ih[max_directions], *w_hh[max_directions], *w_hr[max_directions], *w_ch[max_directions];
  float* parameters[max_directions];
  float* parameter_gradients[max_directions];  // of each sequence (B, parameters, H)
  float*
      initial[max_directions];  // the state before the first step in float, where others are cells (B, width)
  const void** c_rows[max_directions];  // of each row of gradients: its c of the step before
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
      w_ch[d] = shared.take<float>(z.c_panels * panel * z.facts.gates * p.H);
      parameters[d] = shared.take<float>(z.facts.parameters * p.H);
      parameter_gradients[d] = shared.take<float>(p.B * z.facts.parameters * p.H);
      initial[d] = shared.take<float>(p.is_jordan() || z.facts.feeds_cell ? p.B * p.cell_width() : 0);
      c_rows[d] = shared.take<const void*>(z.facts.feeds_cell ? z.rows : 0);
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
  const int64_t each = 1 + z.x_panels + z.h_panels + z.m_panels + z.c_panels, d = (item - 1) / each,
                K = z.facts.gates * p.H;
  int64_t which = (item - 1) % each;
  const RecurrentWeights& w = t.weights[d];
  if (which-- == 0) return gather_parameters(p, w, shared.parameters[d]);
  const auto as_stored = [](int64_t k) { return k; };
  if (which < z.x_panels)
    return pack_panel(
        p.dtype, w.w_ih, K, p.I, which,
        [&](int64_t k) { return z.facts.gate_of_input_block(int(k / p.H)) * p.H + k % p.H; }, shared.w_ih[d]);
  which -= z.x_panels;
  if (which < z.h_panels) return pack_panel(p.dtype, w.w_hh, K, p.R(), which, as_stored, shared.w_hh[d]);
  which -= z.h_panels;
  if (which < z.c_panels) return pack_panel(p.dtype, w.w_ch, K, p.H, which, as_stored, shared.w_ch[d]);
  pack_panel(p.dtype, w.w_hr, p.P, p.H, which - z.c_panels, as_stored, shared.w_hr[d]);
}

// ---- Phase 1: back through time. ----

struct Scratch {
  Batch batch;
  float *dh, *dm, *dc, *h, *h_before, *c_before, *gy;
  const float **a_rows, **sum_rows;
  float **to_rows, **m_rows, **c_rows;

  Scratch(Carver& scratch, const RecurrentProblem& p, const Sizes& z) : batch(Batch::carve(scratch, p)) {
    dh = scratch.take<float>(z.batch * p.R());
    dm = scratch.take<float>(z.splits ? z.batch * p.H : 0);
    dc = scratch.take<float>(p.has_cell() ? z.batch * p.H : 0);
    h = scratch.take<float>(p.R()), gy = scratch.take<float>(p.R());
    h_before = scratch.take<float>(p.R());
    c_before = scratch.take<float>(p.H);
    a_rows = scratch.take<const float*>(z.batch), sum_rows = scratch.take<const float*>(z.batch);
    to_rows = scratch.take<float*>(z.batch), m_rows = scratch.take<float*>(z.batch);
    c_rows = scratch.take<float*>(z.batch);
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

  // The state before step s as it lies: h in y or h0, c in cells or c0, in a Jordan net s in cells or h0. Null:
  // zeros. Cells are float, so what lies beside them is, too.
  const float* cell_before(int64_t d, int64_t b, int64_t s) const {
    const int64_t width = p.cell_width();
    if (s > 0)
      return static_cast<const float*>(t.cells) + (d * p.rows() + p.row(p.step(s - 1, b, d), b)) * width;
    return shared.initial[d] + b * width;
  }
  const void* h_before(int64_t d, int64_t b, int64_t s) const {
    if (p.is_jordan()) return cell_before(d, b, s);
    if (s > 0) return element(p.dtype, t.y, p.y_at(p.step(s - 1, b, d), b) + d * p.R());
    return t.h0 ? element(p.dtype, t.h0, (d * p.B + b) * p.R()) : nullptr;
  }
  const float* widened(const void* row, int64_t n, float* copy) const {
    if (row) return float_row(p.dtype, row, 0, n, copy);
    load_row(p.dtype, nullptr, 0, n, copy);
    return copy;
  }

  // The rows of sequence k at step s: its gradients, and those of its sequence and step in the data.
  int64_t gradient_row(const Batch& q, int64_t k, int64_t s) const {
    return shared.schedule.start[s] + q.rank[k];
  }
  int64_t data_row(const Batch& q, int64_t k, int64_t s) const {
    const int64_t b = q.sequence[k];
    return q.d * p.rows() + p.row(p.step(s, b, q.d), b);
  }

  // From the gradient of the state (in dh) and of the output to that of m, or of what it is projected to; dh is
  // left with what reaches the state before past all products.
  void output(const Batch& q, int64_t k, int64_t s) const {
    const int64_t d = q.d, b = q.sequence[k], R = p.R(), step = p.step(s, b, d);
    float* dh = at.dh + k * R;
    float* const whole = p.P ? shared.h_gradients[d] + gradient_row(q, k, s) * R : at.dm + k * R;
    at.sum_rows[k] = whole, at.m_rows[k] = at.dm + k * p.H;
    OutputBackward<float> row{};
    row.state = dh, row.sums = whole, row.decay = float(p.decay), row.zone_rate = float(p.zone_h);
    if (t.gy) row.gy = float_row(p.dtype, t.gy, p.gy_at(step, b) + d * R, R, at.gy);
    row.unit = p.output, row.is_jordan = p.is_jordan();
    if (row.is_jordan) row.y = float_row(p.dtype, t.y, p.y_at(step, b) + d * R, R, at.h);
    row.zone = t.zone_h ? t.zone_h + data_row(q, k, s) * R : nullptr;
    output_row_backward(LaneRow{}, R, row);
  }

  void cell(const Batch& q, int64_t k, int64_t s) const {
    const int64_t d = q.d, b = q.sequence[k], H = p.H, step = p.step(s, b, d), row = data_row(q, k, s);
    const int64_t to = gradient_row(q, k, s);
    const void* h = h_before(d, b, s);
    shared.x_rows[d][to] = element(p.dtype, t.x, p.x_at(step, b));
    shared.h_rows[d][to] = h;
    float* dh = at.dh + k * p.R();
    if (t.gy && !z.splits) add_row(p.dtype, t.gy, p.gy_at(step, b) + d * p.R(), p.R(), dh);
    RowBackward<float, Factor> rows{};
    rows.h_gradient = z.splits ? at.dm + k * H : dh;
    rows.sums = shared.gradients[d] + to * z.stride;
    if (z.stride > z.width) rows.sums[z.width] = {};  // the last word's other half
    rows.kept = z.kept ? static_cast<const float*>(t.gates) + row * z.kept
                       : float_row(p.dtype, t.y, p.y_at(step, b) + d * H, H, at.h);
    rows.parameters = shared.parameters[d];
    rows.parameter_gradients = shared.parameter_gradients[d] + b * z.facts.parameters * H;
    rows.options = {float(p.limit), float(p.zone_h), float(p.zone_c), p.limit != 0};
    rows.zone = t.zone_c ? t.zone_c + row * H : nullptr;
    if (z.facts.reads_h) rows.h_before = widened(h, H, at.h_before);
    if (z.facts.has_cell) {
      rows.c_before =
          s > 0 || z.facts.feeds_cell
              ? cell_before(d, b, s)
              : widened(t.c0 ? element(p.dtype, t.c0, (d * p.B + b) * H) : nullptr, H, at.c_before);
      rows.c_gradient = at.dc + k * H;
      if (z.facts.feeds_cell) shared.c_rows[d][to] = rows.c_before;
    }
    if (p.P) rows.unprojected = shared.m[d] + to * H;
    with_cell<LaneMath>(p.cell, [&](auto cell) PYSEQNET_LAMBDA {
      if constexpr (fits<decltype(cell)>) cell_row<decltype(cell)>(H, rows);
    });
    if (z.splits && z.facts.reads_h) add_row(DType::f32, rows.h_gradient, 0, H, dh);
  }

  void begin(const Batch& q) const {
    const int64_t d = q.d, R = p.R(), width = p.cell_width();
    for (int64_t k = 0; k < q.n; k++) {
      const int64_t b = q.sequence[k], state = d * p.B + b;
      load_row(p.dtype, t.gh_n, state * R, R, at.dh + k * R);
      if (p.has_cell()) load_row(p.dtype, t.gc_n, state * p.H, p.H, at.dc + k * p.H);
      at.to_rows[k] = at.dh + k * R, at.c_rows[k] = at.dc + k * p.H;
      if (p.is_jordan()) load_row(p.dtype, t.h0, state * width, width, shared.initial[d] + b * width);
      if (z.facts.feeds_cell) load_row(p.dtype, t.c0, state * width, width, shared.initial[d] + b * width);
      memset(shared.parameter_gradients[d] + b * z.facts.parameters * p.H, 0,
             size_t(z.facts.parameters * p.H) * sizeof(float));
      for (int64_t step = q.length[k]; t.gx && d == 0 && !p.packed() && step < p.T; step++)
        zero_row(p.dtype, t.gx, p.gx_at(step, b), p.I);
    }
  }

  void run(const Batch& q) const {
    const int64_t d = q.d, R = p.R(), K = words(z.facts.gates * p.H);
    const bool adds = z.facts.reads_h || p.is_jordan() || p.zoneout();  // to what passed beside the product
    begin(q);
    int64_t n = 0;
    for (int64_t s = q.steps() - 1; s >= 0; s--) {
      n = q.active(s, n);
      if (z.splits)
        for (int64_t k = 0; k < n; k++) output(q, k, s);
      if (p.P) multiply_rows(n, p.H, p.P, at.sum_rows, shared.w_hr[d], at.m_rows, false);
      for (int64_t k = 0; k < n; k++) {
        cell(q, k, s);
        at.a_rows[k] = as_words(shared.gradients[d] + gradient_row(q, k, s) * z.stride +
                                z.facts.first_recurrent_block() * p.H);
      }
      if (s > 0 || t.gh0)
        multiply_rows(n, R, K, at.a_rows,
                      z.h_in_place ? static_cast<const float*>(t.weights[d].w_hh) : shared.w_hh[d],
                      at.to_rows, adds, z.h_in_place ? Panels::in_place : Panels::packed);
      if (z.facts.feeds_cell && (s > 0 || t.gc0))
        multiply_rows(n, p.H, K, at.a_rows, shared.w_ch[d], at.c_rows, true);
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
  float *products[3], *sums, *copy, *packed;
  WeightScratch(Carver& scratch, const RecurrentProblem& p, const Sizes& z) {
    const int64_t most = p.I > p.R() ? p.I : p.R(), widest = p.H > most ? p.H : most;
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
  // The rows of the weights that this part of the gradients belongs to, if it does.
  const CellFacts& facts = z.facts;
  const bool whole = z.parts == 1, of_x = whole || part < facts.gates, of_h = whole || part >= facts.apart();
  const int64_t x_row = (whole || !of_x ? 0 : facts.gate_of_input_block(int(part)) * p.H) + first;
  const int64_t h_row = (whole || !of_h ? 0 : (part - facts.apart()) * p.H) + first;
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
void parameter_gradient(const RecurrentProblem& p, const RecurrentTensors& t, const Sizes& z,
                        const Shared& shared, int64_t d) {
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
  if (t.gradients[d].b_hr) store_row(p.dtype, scratch.sums, t.gradients[d].b_hr, j, M);
}

WorkPlan plan_backward(const RecurrentProblem& p) {
  constexpr int64_t elements_worth_a_thread = 20000, products_worth_a_thread = 1000000;
  const Sizes z(p);
  const int64_t K = p.gates() * p.H;
  WorkPlan plan;
  plan.add_phase(z.packing_items(p), 1 + elements_worth_a_thread / (panel * K));
  plan.add_phase(p.D * p.B, sequence_grain(p));
  plan.add_phase(z.input_blocks, 1 + products_worth_a_thread / (p.D * Sizes::input_block * K * (p.I + 1)));
  plan.add_phase(z.gate_items(p) + p.D * (z.projection_blocks + 1),
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
  const FlushSmall guard(p.dtype);
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
    const int64_t gates = z.gate_items(p), projections = gates + p.D * z.projection_blocks;
    for (int64_t item = slice.begin; item < slice.end; item++)
      if (item < gates)
        gate_gradient(p, t, z, shared, item, scratch);
      else if (item < projections)
        projection_gradient(p, t, z, shared, item - gates, scratch, m_rows);
      else
        parameter_gradient(p, t, z, shared, item - projections);
  }
}

}  // namespace
}  // namespace recurrent

extern const RecurrentCpuKernel recurrent_backward;
const RecurrentCpuKernel recurrent_backward = {"fused_" PYSEQNET_ISA_NAME, this_isa,
                                               recurrent::refuses_products, recurrent::plan_backward,
                                               recurrent::run_backward};

}  // namespace PYSEQNET_ISA
}  // namespace pyseqnet
