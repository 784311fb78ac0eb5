// Recurrent layers of any cell on the CPU, forward: what the fused kernel leaves, because its cells want more
// than their own sums: unit parameters, statistics over a row, masks, the other state, an output layer.
//
// As in recurrent_forward_cpu.cpp, weights are packed once a call, the input's part of several steps is one
// product, and sequences run in lockstep, longest first. A step is a product of the states with the packed
// weights into rows of sums, then the cell over each row (cells/rows.h), then the output's end. Where there are
// few rows in all, weights are read where they lie.
//
// Bound: FMA throughput, as the fused kernel; in addition a row of G * H sums is written and read once a step,
// in the first or second level.
#include "recurrent/recurrent_few_rows.h"
#include "recurrent/recurrent_products.h"
#include "recurrent/recurrent_schedule.h"

namespace pyseqnet {
inline namespace PYSEQNET_ISA {
namespace recurrent {
namespace {

constexpr int64_t panel = 4 * VL;
int64_t panels_of(int64_t columns) { return (columns + panel - 1) / panel; }

// Sizes that plan() and run() agree on.
struct Sizes {
  CellFacts facts;
  bool few;  // weights are read where they lie
  int64_t gates, slots, chunk, batch;

  explicit Sizes(const RecurrentProblem& p) : facts(p.facts()) {
    constexpr int64_t chunk_floats = 1 << 18, longest_chunk = 384;  // half of a second-level cache
    few = p.T * p.B <= few_rows;
    gates = facts.gates * p.H, slots = facts.slots * p.H;
    chunk = chunk_floats / (slots + 1) + 1;
    chunk = chunk < longest_chunk ? chunk : longest_chunk;
    batch = Batch::batch_bound(p);
  }
  int64_t rows() const { return chunk + batch; }
};

// Weights as products read them: (columns, depth) each.
struct Packed {
  float *w_ih, *w_hh, *w_ch, *w_hr;
  float *bias, *parameters, *output_bias;

  Packed(Carver& shared, const RecurrentProblem& p, const Sizes& z) {
    const auto take = [&](int64_t columns, int64_t depth) {
      return shared.take<float>(z.few ? 0 : panels_of(columns) * panel * depth);
    };
    w_ih = take(z.gates, p.I), w_hh = take(z.gates, p.R());
    w_ch = take(z.facts.feeds_cell ? z.gates : 0, p.H), w_hr = take(p.P, p.H);
    bias = shared.take<float>(z.facts.sums() * p.H);
    parameters = shared.take<float>(z.facts.parameters * p.H);
    output_bias = shared.take<float>(p.P);
  }
  Packed() = default;
};
struct Shared {
  Schedule schedule;
  Packed packed[max_directions];

  Shared(Carver& shared, const RecurrentProblem& p, const Sizes& z) : schedule(Schedule::carve(shared, p)) {
    for (int64_t d = 0; d < p.D; d++) packed[d] = Packed(shared, p, z);
  }
};

struct Scratch {
  Batch batch;
  float *h, *h_next, *c, *m, *sums, *y, *slots, *recurrent, *x;
  const float **x_rows, **a_rows, **c_rows;
  float **slot_rows, **to_rows;

  Scratch(Carver& scratch, const RecurrentProblem& p, const Sizes& z) : batch(Batch::carve(scratch, p)) {
    const int64_t n = z.batch;
    h = scratch.take<float>(n * p.R()), h_next = scratch.take<float>(n * p.R());
    c = scratch.take<float>(p.has_cell() ? n * p.H : 0);
    m = scratch.take<float>(n * p.H), sums = scratch.take<float>(n * p.P);
    y = scratch.take<float>(p.is_jordan() ? n * p.P : 0);
    slots = scratch.take<float>(p.reserve && p.saved() ? 0 : z.rows() * z.slots);
    recurrent = scratch.take<float>(n * z.gates);
    x = scratch.take<float>(p.dtype == DType::f32 ? 0 : z.rows() * p.I);
    x_rows = scratch.take<const float*>(z.rows()), slot_rows = scratch.take<float*>(z.rows());
    a_rows = scratch.take<const float*>(n), c_rows = scratch.take<const float*>(n);
    to_rows = scratch.take<float*>(n);
  }
};
int64_t packing_floats(const RecurrentProblem& p) {
  const int64_t longest = p.I > p.R() ? p.I : p.R();
  return VL * (longest > p.H ? longest : p.H) + p.H;
}

// ---- Phase 0: packing. Items: the schedule; for each direction its vectors, then the panels of its weights. ----

void add_rows(DType dtype, const void* from, int64_t at, int64_t n, float* to) {
  if (from) add_row(dtype, from, at, n, to);
}
void pack_vectors(const RecurrentProblem& p, const RecurrentWeights& w, const Sizes& z, const Packed& to) {
  const int64_t H = p.H;
  memset(to.bias, 0, size_t(z.facts.sums() * H) * sizeof(float));
  for (int g = 0; g < z.facts.gates && !z.facts.over_units; g++) {
    add_rows(p.dtype, w.b_ih, g * H, H, to.bias + g * H);
    float copy[VL];
    for (int64_t u = 0; w.b_hh && u < H; u += VL) {
      const int64_t n = H - u < VL ? H - u : VL;
      load_row(p.dtype, w.b_hh, g * H + u, n, copy);
      add_row(DType::f32, copy, 0, n, to.bias + z.facts.recurrent_slot(g) * H + u);
    }
  }
  gather_parameters(p, w, to.parameters);
  load_row(p.dtype, w.b_hr, 0, p.P, to.output_bias);
}
void pack_panel(DType dtype, const void* w, int64_t columns, int64_t depth, int64_t which, float* to,
                float* copy) {
  for (int v = 0; v < 4; v++) {
    const int64_t first = which * panel + v * VL;
    const int n = int(first >= columns ? 0 : columns - first < VL ? columns - first : VL);
    pack_columns(
        dtype, w, depth, n, [&](int j) { return first + j; }, to + which * panel * depth + v * VL, panel,
        copy);
  }
}
int64_t packing_items(const RecurrentProblem& p, const Sizes& z) {
  return 1 + (z.few ? 0 : (z.facts.feeds_cell ? 3 : 2) * panels_of(z.gates) + panels_of(p.P));
}
void pack_item(const RecurrentProblem& p, const RecurrentTensors& t, const Sizes& z, int64_t item,
               const Shared& shared, float* copy) {
  if (item == 0) return shared.schedule.make(p);
  const int64_t each = packing_items(p, z), d = (item - 1) / each, of_gates = panels_of(z.gates);
  int64_t which = (item - 1) % each;
  const RecurrentWeights& w = t.weights[d];
  const Packed& to = shared.packed[d];
  if (which-- == 0) return pack_vectors(p, w, z, to);
  if (which < of_gates) return pack_panel(p.dtype, w.w_ih, z.gates, p.I, which, to.w_ih, copy);
  which -= of_gates;
  if (which < of_gates) return pack_panel(p.dtype, w.w_hh, z.gates, p.R(), which, to.w_hh, copy);
  which -= of_gates;
  if (z.facts.feeds_cell) {
    if (which < of_gates) return pack_panel(p.dtype, w.w_ch, z.gates, p.H, which, to.w_ch, copy);
    which -= of_gates;
  }
  pack_panel(p.dtype, w.w_hr, p.P, p.H, which, to.w_hr, copy);
}

// ---- Phase 1: sequences. ----

template <class Cell>
__attribute__((noinline)) void cell_row(int64_t H, const RowForward<float>& at) {
  forward_row<Cell>(LaneRow{}, H, at);
}

// One product or the sum of two, with weights as packed, and as they lie.
struct Factors {
  const float* const* rows;
  const float* packed;
  const void* weight;
  int64_t depth;
};
template <class T>
void multiply_few(const Factors* of, int count, int64_t n, int64_t columns, float* const* to) {
  Term<T> terms[2];
  for (int k = 0; k < count; k++) terms[k] = {of[k].rows, static_cast<const T*>(of[k].weight), of[k].depth};
  dot_rows(terms, count, n, columns, to);
}

struct Forward {
  const RecurrentProblem& p;
  const RecurrentTensors& t;
  const Sizes& z;
  const Shared& shared;
  Scratch& at;

  void multiply(const Factors* of, int count, int64_t n, int64_t columns, float* const* to) const {
    if (!z.few)
      for (int k = 0; k < count; k++)
        multiply_rows(n, columns, of[k].depth, of[k].rows, of[k].packed, to, k > 0);
    else if (p.dtype == DType::f32)
      multiply_few<float>(of, count, n, columns, to);
    else if (p.dtype == DType::bf16)
      multiply_few<bfloat16>(of, count, n, columns, to);
    else
      multiply_few<float16>(of, count, n, columns, to);
  }

  int64_t row_at(const Batch& q, int64_t k, int64_t s) const {
    const int64_t b = q.sequence[k];
    return q.d * p.rows() + p.row(p.step(s, b, q.d), b);
  }
  // Where rows of the slots and of x lie for step s.
  void place_rows(const Batch& q, int64_t s, int64_t n, int64_t first) const {
    float* reserve = p.reserve && p.saved() ? static_cast<float*>(t.gates) : nullptr;
    for (int64_t k = 0; k < n; k++) {
      const int64_t b = q.sequence[k], step = p.step(s, b, q.d), row = first + k;
      at.x_rows[row] = float_row(p.dtype, t.x, p.x_at(step, b), p.I, at.x + row * p.I);
      at.slot_rows[row] = reserve ? reserve + row_at(q, k, s) * z.slots : at.slots + row * z.slots;
    }
  }

  // Sums and cells of the first n sequences: m, and c in place.
  void cells(const Batch& q, int64_t s, int64_t n, float* const* slots) const {
    const Packed& w = shared.packed[q.d];
    for (int64_t k = 0; k < n; k++) {
      at.a_rows[k] = at.h + k * p.R(), at.to_rows[k] = at.recurrent + k * z.gates;
      at.c_rows[k] = at.c + k * p.H;
    }
    const Factors of[] = {{at.a_rows, w.w_hh, t.weights[q.d].w_hh, p.R()},
                          {at.c_rows, w.w_ch, t.weights[q.d].w_ch, p.H}};
    multiply(of, z.facts.feeds_cell ? 2 : 1, n, z.gates, at.to_rows);
    RowForward<float> row{};
    row.bias = z.facts.over_units ? nullptr : w.bias;
    row.parameters = w.parameters;
    row.options = {float(p.limit), float(p.zone_h), float(p.zone_c), p.limit != 0};
    row.keep = p.reserve && p.saved();
    for (int64_t k = 0; k < n; k++) {
      row.slots = slots[k], row.recurrent = at.recurrent + k * z.gates;
      row.h_before = at.h + k * p.R(), row.c_before = row.c = at.c + k * p.H;
      row.h = at.m + k * p.H;
      row.zone = t.zone_c ? t.zone_c + row_at(q, k, s) * p.H : nullptr;
      with_cell<LaneMath>(p.cell, [&](auto cell) PYSEQNET_LAMBDA { cell_row<decltype(cell)>(p.H, row); });
    }
  }
  // From m to the next state, and a Jordan net's output.
  void outputs(const Batch& q, int64_t s, int64_t n) const {
    const int64_t R = p.R();
    const Packed& w = shared.packed[q.d];
    if (p.P) {
      for (int64_t k = 0; k < n; k++) at.a_rows[k] = at.m + k * p.H, at.to_rows[k] = at.sums + k * p.P;
      const Factors of = {at.a_rows, w.w_hr, t.weights[q.d].w_hr, p.H};
      multiply(&of, 1, n, p.P, at.to_rows);
    }
    OutputForward<float> row{};
    row.bias = w.output_bias, row.zone_rate = float(p.zone_h), row.decay = float(p.decay);
    row.unit = p.output, row.is_jordan = p.is_jordan();
    for (int64_t k = 0; k < n; k++) {
      row.sums = p.P ? at.sums + k * p.P : at.m + k * p.H;
      row.before = at.h + k * R, row.state = at.h_next + k * R, row.y = at.y + k * p.P;
      row.zone = t.zone_h ? t.zone_h + row_at(q, k, s) * R : nullptr;
      output_row(LaneRow{}, R, row);
    }
    float* spare = at.h;
    at.h = at.h_next, at.h_next = spare;
  }

  void store_final(const Batch& q, int64_t k) const {
    const int64_t state = q.d * p.B + q.sequence[k];
    store_row(p.dtype, at.h + k * p.R(), t.h_n, state * p.R(), p.R());
    if (p.has_cell()) store_row(p.dtype, at.c + k * p.H, t.c_n, state * p.H, p.H);
  }
  void store_step(const Batch& q, int64_t s, int64_t n) const {
    const int64_t R = p.R(), width = p.cell_width();
    for (int64_t k = 0; k < n; k++) {
      const int64_t b = q.sequence[k], step = p.step(s, b, q.d);
      store_row(p.dtype, (p.is_jordan() ? at.y : at.h) + k * R, t.y, p.y_at(step, b) + q.d * R, R);
      if (width && p.reserve)
        memcpy(static_cast<float*>(t.cells) + row_at(q, k, s) * width,
               (p.is_jordan() ? at.h : at.c) + k * width, size_t(width) * sizeof(float));
      if (q.length[k] == s + 1) store_final(q, k);
    }
  }

  void run(const Batch& q) const {
    const int64_t R = p.R();
    for (int64_t k = 0; k < q.n; k++) {
      const int64_t b = q.sequence[k], state = q.d * p.B + b;
      load_row(p.dtype, t.h0, state * R, R, at.h + k * R);
      if (p.has_cell()) load_row(p.dtype, t.c0, state * p.H, p.H, at.c + k * p.H);
      if (q.length[k] == 0) store_final(q, k);
      for (int64_t step = q.length[k]; !p.packed() && step < p.T; step++)
        zero_row(p.dtype, t.y, p.y_at(step, b) + q.d * R, R);
    }
    int64_t ahead = q.n, n = q.n;
    for (int64_t s = 0; s < q.steps();) {
      int64_t rows = 0, end = s;
      for (; end < q.steps() && rows < z.chunk; end++) {
        ahead = q.active(end, ahead);
        place_rows(q, end, ahead, rows);
        rows += ahead;
      }
      const Factors of = {at.x_rows, shared.packed[q.d].w_ih, t.weights[q.d].w_ih, p.I};
      multiply(&of, 1, rows, z.gates, at.slot_rows);
      for (int64_t row = 0; s < end; s++, row += n) {
        n = q.active(s, n);
        cells(q, s, n, at.slot_rows + row);
        outputs(q, s, n);
        store_step(q, s, n);
      }
    }
  }
};

WorkPlan plan_forward(const RecurrentProblem& p) {
  constexpr int64_t elements_worth_a_thread = 20000;
  const Sizes z(p);
  WorkPlan plan;
  plan.add_phase(1 + p.D * packing_items(p, z), 1 + elements_worth_a_thread / (panel * (p.I + p.R() + 1)));
  plan.add_phase(p.D * p.B, sequence_grain(p));
  Carver shared(nullptr), scratch(nullptr), packing(nullptr);
  Shared(shared, p, z);
  Scratch(scratch, p, z);
  packing.take<float>(packing_floats(p));
  plan.shared_bytes = shared.used();
  plan.thread_bytes = scratch.used() > packing.used() ? scratch.used() : packing.used();
  return plan;
}

void run_forward(const RecurrentProblem& p, const RecurrentTensors& t, const WorkSlice& slice) {
  const FlushSmall guard(p.dtype);
  const Sizes z(p);
  Carver shared_memory(slice.shared), scratch_memory(slice.scratch);
  const Shared shared(shared_memory, p, z);
  if (slice.phase == 0) {
    float* copy = scratch_memory.take<float>(packing_floats(p));
    for (int64_t item = slice.begin; item < slice.end; item++) pack_item(p, t, z, item, shared, copy);
    return;
  }
  Scratch scratch(scratch_memory, p, z);
  const Forward forward{p, t, z, shared, scratch};
  for_batches(p, shared.schedule, slice.begin, slice.end, scratch.batch,
              [&](const Batch& q) { forward.run(q); });
}

Refusal refuses_rows(const RecurrentProblem& p) {
  return p.dtype == DType::f64 ? "float64 runs on the reference" : accepted;
}

}  // namespace
}  // namespace recurrent

extern const RecurrentCpuKernel recurrent_rows_forward;
const RecurrentCpuKernel recurrent_rows_forward = {"rows_" PYSEQNET_ISA_NAME, this_isa,
                                                   recurrent::refuses_rows, recurrent::plan_forward,
                                                   recurrent::run_forward};

}  // namespace PYSEQNET_ISA
}  // namespace pyseqnet
