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
#include "recurrent/recurrent_forward_walk.h"

namespace pyseqnet {
inline namespace PYSEQNET_ISA {
namespace recurrent {
namespace {

constexpr int64_t panel = 4 * VL;
int64_t panels_of(int64_t columns) { return (columns + panel - 1) / panel; }

struct Sizes : ForwardSizes {
  CellFacts facts;
  bool few;  // weights are read where they lie
  int64_t gates;

  explicit Sizes(const RecurrentProblem& p) : ForwardSizes(p, p.facts().slots * p.H), facts(p.facts()) {
    few = p.T * p.B <= few_rows;
    gates = facts.gates * p.H;
  }
  int64_t packing_items_of_direction(const RecurrentProblem& p) const {
    return 1 + (few ? 0 : (facts.feeds_cell ? 3 : 2) * panels_of(gates) + panels_of(p.P));
  }
  int64_t packing_items(const RecurrentProblem& p) const { return 1 + p.D * packing_items_of_direction(p); }
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

struct Scratch : ForwardScratch {
  float *m, *sums, *recurrent;
  const float** c_rows;

  Scratch(Carver& scratch, const RecurrentProblem& p, const Sizes& z) : ForwardScratch(scratch, p, z) {
    m = scratch.take<float>(z.batch * p.H), sums = scratch.take<float>(z.batch * p.P);
    recurrent = scratch.take<float>(z.batch * z.gates);
    c_rows = scratch.take<const float*>(z.batch);
  }
};

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
void pack_item(const RecurrentProblem& p, const RecurrentTensors& t, const Sizes& z, int64_t item,
               const Shared& shared, float* copy) {
  if (item == 0) return shared.schedule.make(p);
  const int64_t each = z.packing_items_of_direction(p), d = (item - 1) / each, of_gates = panels_of(z.gates);
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
  with_lane_row(H, [&](auto row) PYSEQNET_LAMBDA { forward_row<Cell>(row, H, at); });
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

struct Forward : ForwardWalk {
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

  void input_part(const Batch& q, int64_t rows) const {
    const Factors of = {at.x_rows, shared.packed[q.d].w_ih, t.weights[q.d].w_ih, p.I};
    multiply(&of, 1, rows, z.gates, at.slot_rows);
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
    // The slots behind the input's part, which a first touch would wait for.
    const int64_t untouched = row.keep ? z.slots - z.gates : 0;
    for (int64_t k = 0; k < n; k++) {
      if (k + 1 < n) prefetch_to_write(slots[k + 1] + z.gates, untouched * int64_t(sizeof(float)));
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
      output_row(LaneRow<false>{}, R, row);
    }
  }
  void step(const Batch& q, int64_t s, int64_t n, int64_t row) const {
    cells(q, s, n, at.slot_rows + row);
    outputs(q, s, n);
  }
};

struct Rows {
  using Sizes = recurrent::Sizes;
  using Shared = recurrent::Shared;
  using Scratch = recurrent::Scratch;
  using Walk = Forward;
  static constexpr auto pack = pack_item;
};

Refusal refuses_rows(const RecurrentProblem& p) {
  return p.dtype == DType::f64 ? "float64 runs on the reference" : accepted;
}

}  // namespace
}  // namespace recurrent

extern const RecurrentCpuKernel recurrent_rows_forward;
const RecurrentCpuKernel recurrent_rows_forward = {
    "rows_" PYSEQNET_ISA_NAME, this_isa, recurrent::refuses_rows, recurrent::plan_forward<recurrent::Rows>,
    recurrent::run_forward<recurrent::Rows>};

}  // namespace PYSEQNET_ISA
}  // namespace pyseqnet
