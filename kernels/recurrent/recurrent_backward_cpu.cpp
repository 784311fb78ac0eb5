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
#include "recurrent/recurrent_gradients.h"

namespace pyseqnet {
inline namespace PYSEQNET_ISA {
namespace recurrent {
namespace {

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
void pack_item(const RecurrentProblem& p, const RecurrentTensors& t, const BackwardSizes& z, int64_t item,
               const BackwardShared& shared) {
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

  Scratch(Carver& scratch, const RecurrentProblem& p, const BackwardSizes& z)
      : batch(Batch::carve(scratch, p)) {
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
  with_lane_row(H, [&](auto row) PYSEQNET_LAMBDA { backward_row<Cell>(row, H, rows); });
}

struct BackThroughTime {
  const RecurrentProblem& p;
  const RecurrentTensors& t;
  const BackwardSizes& z;
  const BackwardShared& shared;
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
    output_row_backward(LaneRow<false>{}, R, row);
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

  // What cell() of the sequence after k, or of the first one a step earlier, will read and write far away.
  void prefetch_after(const Batch& q, int64_t k, int64_t s, int64_t n) const {
    const bool same_step = k + 1 < n;
    if (!same_step && s == 0) return;
    const int64_t next = same_step ? k + 1 : 0, step = same_step ? s : s - 1;
    prefetch_to_write(shared.gradients[q.d] + gradient_row(q, next, step) * z.stride,
                      z.stride * int64_t(sizeof(Factor)));
    if (z.kept)
      prefetch_to_read(static_cast<const float*>(t.gates) + data_row(q, next, step) * z.kept,
                       z.kept * int64_t(sizeof(float)));
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
        prefetch_after(q, k, s, n);
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

WorkPlan plan_backward(const RecurrentProblem& p) {
  constexpr int64_t elements_worth_a_thread = 20000, products_worth_a_thread = 1000000;
  const BackwardSizes z(p);
  const int64_t K = p.gates() * p.H;
  WorkPlan plan;
  plan.add_phase(z.packing_items(p), 1 + elements_worth_a_thread / (panel * K));
  plan.add_phase(p.D * p.B, sequence_grain(p));
  plan.add_phase(z.input_blocks,
                 1 + products_worth_a_thread / (p.D * BackwardSizes::input_block * K * (p.I + 1)));
  plan.add_phase(z.gate_items(p) + p.D * (z.projection_blocks + 1),
                 1 + products_worth_a_thread / (z.gate_block * (p.I + p.R()) * (z.rows + 1)));
  Carver shared(nullptr), walking(nullptr), inputs(nullptr), weights(nullptr);
  BackwardShared(shared, p, z);
  Scratch(walking, p, z);
  inputs.take<float>(BackwardSizes::input_block * p.I);
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
  const BackwardSizes z(p);
  Carver shared_memory(slice.shared), scratch_memory(slice.scratch);
  const BackwardShared shared(shared_memory, p, z);
  if (slice.phase == 0)
    for (int64_t item = slice.begin; item < slice.end; item++) pack_item(p, t, z, item, shared);
  if (slice.phase == 1) {
    Scratch scratch(scratch_memory, p, z);
    const BackThroughTime walk{p, t, z, shared, scratch};
    for_batches(p, shared.schedule, slice.begin, slice.end, scratch.batch,
                [&](const Batch& q) { walk.run(q); });
  }
  if (slice.phase == 2 && t.gx) {
    float* rows = scratch_memory.take<float>(BackwardSizes::input_block * p.I);
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
