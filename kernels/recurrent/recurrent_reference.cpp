// The oracle of the recurrent family: the formulae of recurrent.h in plain loops, for every cell, dtype and
// kind of sequence. It is also the kernel that serves what the fast ones refuse (float64).
//
// All sums and states are double, whatever the dtype; only what the contract stores is rounded.
//
//   forward   an item is one sequence in one direction: it walks the steps with its state.
//   backward  phase 0 walks each sequence back and leaves the gradients of all slots' sums in the workspace;
//             phase 1 makes gx of one sequence an item, phase 2 one row of the weights' gradients an item,
//             phase 3 one unit's row of w_hr's, and its parameters'.
#include "recurrent/recurrent.h"

namespace pyseqnet {
namespace {

using Math = ScalarMath<double>;

// Units one after the other (cells/rows.h).
struct PlainRow {
  using Real = double;
  using Math = ScalarMath<double>;
  struct Units {
    int64_t u, end;
    bool inside() const { return u < end; }
    void next() { u++; }
  };
  Units units(int64_t H) const { return {0, H}; }
  double load(const double* p, Units u) const { return p[u.u]; }
  void store(double* p, Units u, double v) const { p[u.u] = v; }
  double flags(const uint8_t* p, Units u) const { return p[u.u] ? 1 : 0; }
  double total(double x) const { return x; }
  double within(Units, double x) const { return x; }
};

template <class T>
const T* as(const void* p) {
  return static_cast<const T*>(p);
}
template <class T>
T* as(void* p) {
  return static_cast<T*>(p);
}
template <class T>
double value(const void* p, int64_t i) {
  return p ? to_double(as<T>(p)[i]) : 0;
}
template <class T>
void put(void* p, int64_t i, double v) {
  if (p) round_to(as<T>(p)[i], v);
}

// What a walk over the steps of one sequence keeps; all rows of doubles.
struct Walk {
  double *state, *next, *m, *c, *slots, *recurrent, *parameters;  // both passes
  double *dstate, *passed, *dc, *dm, *dsum, *sums, *parameter_gradients, *c_before, *h_before;

  Walk(const RecurrentProblem& p, Carver& carver) {
    const CellFacts facts = p.facts();
    const int64_t R = p.R(), H = p.H;
    state = carver.take<double>(R), next = carver.take<double>(R);
    m = carver.take<double>(H), c = carver.take<double>(H);
    slots = carver.take<double>(facts.slots * H), recurrent = carver.take<double>(facts.gates * H);
    parameters = carver.take<double>(facts.parameters * H);
    dstate = carver.take<double>(R), passed = carver.take<double>(R), dc = carver.take<double>(H);
    dm = carver.take<double>(H), dsum = carver.take<double>(R);
    sums = carver.take<double>(facts.sums() * H);
    parameter_gradients = carver.take<double>(facts.parameters * H);
    c_before = carver.take<double>(H), h_before = carver.take<double>(R);
  }
};

// T: storage; A: the reserve's type.
template <class T, class A>
struct Reference {
  const RecurrentProblem& p;
  const RecurrentTensors& t;
  const CellFacts facts = p.facts();
  const int64_t S = p.saved(), H = p.H, R = p.R(), G = p.gates();
  const CellOptions<double> options{p.limit, p.zone_h, p.zone_c, p.limit != 0};

  int64_t gates_at(int64_t d, int64_t row, int64_t slot, int64_t u) const {
    return ((d * p.rows() + row) * S + slot) * H + u;
  }
  int64_t cell_at(int64_t d, int64_t row) const { return (d * p.rows() + row) * p.cell_width(); }
  // Where the states before step s of a sequence lie: in y or the cells of the step before, or in h0 and c0.
  double h_before(int64_t d, int64_t b, int64_t s, int64_t j) const {
    if (s == 0) return value<T>(t.h0, (d * p.B + b) * R + j);
    const int64_t step = p.step(s - 1, b, d);
    if (p.is_jordan()) return as<A>(t.cells)[cell_at(d, p.row(step, b)) + j];
    return value<T>(t.y, p.y_at(step, b) + d * R + j);
  }
  double c_before(int64_t d, int64_t b, int64_t s, int64_t u) const {
    if (s == 0) return value<T>(t.c0, (d * p.B + b) * H + u);
    return as<A>(t.cells)[cell_at(d, p.row(p.step(s - 1, b, d), b)) + u];
  }
  double zone_of_h(int64_t d, int64_t row, int64_t j) const {
    return t.zone_h ? double(t.zone_h[(d * p.rows() + row) * R + j] != 0) : p.zone_h;
  }
  const uint8_t* zone_of_c(int64_t d, int64_t row) const {
    return t.zone_c ? t.zone_c + (d * p.rows() + row) * H : nullptr;
  }

  void read_parameters(int64_t d, const Walk& at) const {
    const auto blocks = parameter_blocks<const void*>(p.cell, t.weights[d]);
    double* to = at.parameters;
    for (int k = 0; k < blocks.count; k++)
      for (int64_t i = 0; i < blocks.block[k].rows * H; i++)
        *to++ = value<T>(blocks.block[k].values, i) + value<T>(blocks.block[k].also, i);
  }

  // The sums of one step, from x and the states.
  void sums(int64_t d, int64_t b, int64_t step, const Walk& at) const {
    const RecurrentWeights& w = t.weights[d];
    const T* x = as<T>(t.x) + p.x_at(step, b);
    for (int64_t k = 0; k < G * H; k++) {
      double from_x = 0, from_h = 0;
      if (!facts.over_units) {  // else biases are parameters
        from_x = value<T>(w.b_ih, k);
        from_h = value<T>(w.b_hh, k);
      }
      for (int64_t i = 0; i < p.I; i++) from_x += value<T>(w.w_ih, k * p.I + i) * to_double(x[i]);
      for (int64_t j = 0; j < R; j++) from_h += value<T>(w.w_hh, k * R + j) * at.state[j];
      for (int64_t u = 0; facts.feeds_cell && u < H; u++) from_h += value<T>(w.w_ch, k * H + u) * at.c[u];
      at.slots[k] = from_x, at.recurrent[k] = from_h;
    }
  }
  // From m to the output and the next state.
  void output(int64_t d, int64_t b, int64_t step, const Walk& at) const {
    const RecurrentWeights& w = t.weights[d];
    for (int64_t j = 0; j < R; j++) {
      double y = at.m[j % H], state = 0;
      if (p.P) {
        y = p.is_jordan() ? value<T>(w.b_hr, j) : 0;
        for (int64_t u = 0; u < H; u++) y += value<T>(w.w_hr, j * H + u) * at.m[u];
      }
      if (p.is_jordan()) y = JordanOutput<Math>::forward(p.output, y);
      state = p.is_jordan() ? JordanOutput<Math>::state(at.state[j], y, p.decay) : y;
      at.next[j] = zoned(zone_of_h(d, p.row(step, b), j), at.state[j], state);
      put<T>(t.y, p.y_at(step, b) + d * R + j, p.is_jordan() ? y : at.next[j]);
    }
    for (int64_t j = 0; j < R; j++) at.state[j] = at.next[j];
  }

  template <class Cell>
  void forward_sequence(int64_t d, int64_t b, const Walk& at) const {
    for (int64_t j = 0; j < R; j++) at.state[j] = value<T>(t.h0, (d * p.B + b) * R + j);
    for (int64_t u = 0; u < H; u++) at.c[u] = value<T>(t.c0, (d * p.B + b) * H + u);
    read_parameters(d, at);
    for (int64_t s = 0; s < p.length(b); s++) {
      const int64_t step = p.step(s, b, d), row = p.row(step, b);
      sums(d, b, step, at);
      forward_row<Cell>(PlainRow{}, H,
                        RowForward<double>{at.slots, at.recurrent, nullptr, at.parameters, at.state, at.c,
                                           at.m, at.c, zone_of_c(d, row), options, true});
      output(d, b, step, at);
      if (!p.reserve) continue;
      for (int64_t k = 0; k < S * H; k++) as<A>(t.gates)[gates_at(d, row, 0, k)] = A(at.slots[k]);
      const double* cell = p.is_jordan() ? at.state : at.c;
      for (int64_t k = 0; k < p.cell_width(); k++) as<A>(t.cells)[cell_at(d, row) + k] = A(cell[k]);
    }
    for (int64_t step = p.length(b); !p.packed() && step < p.T; step++)
      for (int64_t j = 0; j < R; j++) put<T>(t.y, p.y_at(step, b) + d * R + j, 0);
    for (int64_t j = 0; j < R; j++) put<T>(t.h_n, (d * p.B + b) * R + j, at.state[j]);
    for (int64_t u = 0; u < H; u++) put<T>(t.c_n, (d * p.B + b) * H + u, at.c[u]);
  }

  // What backward keeps in the workspace, a row for each direction and row of the data: gradients of the slots'
  // sums in blocks, of the parameters, and for w_hr its output's (P) and what it was made of (H).
  struct Kept {
    double *sums, *parameters, *outputs, *unprojected;

    Kept(const RecurrentProblem& p, Carver& carver) {
      const int64_t rows = p.D * p.rows();
      sums = carver.take<double>(rows * p.facts().sums() * p.H);
      parameters = carver.take<double>(rows * p.facts().parameters * p.H);
      outputs = carver.take<double>(rows * p.P);
      unprojected = carver.take<double>(p.P ? rows * p.H : 0);
    }
  };

  // From the gradient of the state that a step leaves to that of m, and what reaches the state before.
  void output_backward(int64_t d, int64_t b, int64_t step, const Walk& at, const Kept& kept) const {
    const RecurrentWeights& w = t.weights[d];
    const int64_t row = p.row(step, b);
    for (int64_t j = 0; j < R; j++) {
      const double zone = zone_of_h(d, row, j), gy = t.gy ? value<T>(t.gy, p.gy_at(step, b) + d * R + j) : 0;
      double arriving = at.dstate[j];
      if (!p.is_jordan()) arriving += gy;
      at.dsum[j] = arriving - zone * arriving, at.passed[j] = zone * arriving;
      if (p.is_jordan()) {
        const double y = value<T>(t.y, p.y_at(step, b) + d * R + j);
        at.passed[j] += p.decay * at.dsum[j];
        at.dsum[j] = JordanOutput<Math>::backward(p.output, y, at.dsum[j] + gy);
      }
      if (p.P) kept.outputs[(d * p.rows() + row) * R + j] = at.dsum[j];
    }
    for (int64_t u = 0; u < H; u++) {
      at.dm[u] = p.P ? 0 : at.dsum[u];
      for (int64_t j = 0; j < p.P; j++) at.dm[u] += at.dsum[j] * value<T>(w.w_hr, j * H + u);
    }
  }

  template <class Cell>
  void backward_sequence(int64_t d, int64_t b, const Kept& kept, const Walk& at) const {
    const RecurrentWeights& w = t.weights[d];
    read_parameters(d, at);
    for (int64_t j = 0; j < R; j++) at.dstate[j] = value<T>(t.gh_n, (d * p.B + b) * R + j);
    for (int64_t u = 0; u < H; u++) at.dc[u] = value<T>(t.gc_n, (d * p.B + b) * H + u);
    for (int64_t s = p.length(b) - 1; s >= 0; s--) {
      const int64_t step = p.step(s, b, d), row = d * p.rows() + p.row(step, b);
      output_backward(d, b, step, at, kept);
      for (int64_t u = 0; u < H; u++) {
        if (S == 0) at.slots[u] = value<T>(t.y, p.y_at(step, b) + d * R + u);
        if (facts.reads_h) at.h_before[u] = h_before(d, b, s, u);
        if (facts.has_cell) at.c_before[u] = c_before(d, b, s, u);
      }
      for (int64_t k = 0; k < S * H; k++) at.slots[k] = as<A>(t.gates)[gates_at(d, p.row(step, b), 0, k)];
      double* sums = kept.sums + row * facts.sums() * H;
      double* of_parameters = kept.parameters + row * facts.parameters * H;
      for (int64_t k = 0; k < facts.parameters * H; k++) of_parameters[k] = 0;
      backward_row<Cell>(
          PlainRow{}, H,
          RowBackward<double, double>{at.slots, at.parameters, at.h_before, at.c_before, at.dm, at.dc, sums,
                                      of_parameters, p.P ? kept.unprojected + row * H : nullptr,
                                      zone_of_c(d, p.row(step, b)), options, false});
      const double* of_h = sums + facts.first_recurrent_block() * H;
      for (int64_t j = 0; j < R; j++) {
        at.dstate[j] = at.passed[j] + (facts.reads_h ? at.dm[j] : 0);
        for (int64_t k = 0; k < G * H; k++) at.dstate[j] += of_h[k] * value<T>(w.w_hh, k * R + j);
      }
      for (int64_t u = 0; facts.feeds_cell && u < H; u++)
        for (int64_t k = 0; k < G * H; k++) at.dc[u] += of_h[k] * value<T>(w.w_ch, k * H + u);
    }
    for (int64_t j = 0; j < R; j++) put<T>(t.gh0, (d * p.B + b) * R + j, at.dstate[j]);
    for (int64_t u = 0; u < H; u++) put<T>(t.gc0, (d * p.B + b) * H + u, at.dc[u]);
  }

  void input_gradient(int64_t b, const Kept& kept, double* sum) const {
    for (int64_t step = 0; step < p.T; step++) {
      if (step >= p.length(b) && p.packed()) return;
      for (int64_t i = 0; i < p.I; i++) sum[i] = 0;
      for (int64_t d = 0; d < p.D && step < p.length(b); d++)
        for (int64_t k = 0; k < G * H; k++) {
          const double gradient = kept.sums[(d * p.rows() + p.row(step, b)) * facts.sums() * H + k];
          const int64_t row = facts.gate_of_input_block(int(k / H)) * H + k % H;
          for (int64_t i = 0; i < p.I; i++) sum[i] += gradient * value<T>(t.weights[d].w_ih, row * p.I + i);
        }
      for (int64_t i = 0; i < p.I; i++) put<T>(t.gx, p.gx_at(step, b) + i, sum[i]);
    }
  }

  // Row g*H + u of the gradients of w_ih, w_hh, w_ch and both biases.
  void weight_gradient(int64_t d, int g, int64_t u, const Kept& kept, double* sum) const {
    double *wx = sum, *wh = wx + p.I, *wc = wh + R, bx = 0, bh = 0;
    for (int64_t k = 0; k < p.I + R + H; k++) sum[k] = 0;
    const int64_t x_block = facts.gradient_block(g), h_block = facts.gradient_block(facts.recurrent_slot(g));
    for (int64_t b = 0; b < p.B; b++)
      for (int64_t s = 0; s < p.length(b); s++) {
        const int64_t step = p.step(s, b, d);
        const double* gradients = kept.sums + (d * p.rows() + p.row(step, b)) * facts.sums() * H + u;
        const double of_x = gradients[x_block * H], of_h = gradients[h_block * H];
        const T* x = as<T>(t.x) + p.x_at(step, b);
        for (int64_t i = 0; i < p.I; i++) wx[i] += of_x * to_double(x[i]);
        for (int64_t j = 0; j < R; j++) wh[j] += of_h * h_before(d, b, s, j);
        for (int64_t k = 0; facts.feeds_cell && k < H; k++) wc[k] += of_h * c_before(d, b, s, k);
        bx += of_x, bh += of_h;
      }
    const RecurrentGradients& to = t.gradients[d];
    const int64_t row = g * H + u;
    for (int64_t i = 0; i < p.I; i++) put<T>(to.w_ih, row * p.I + i, wx[i]);
    for (int64_t j = 0; j < R; j++) put<T>(to.w_hh, row * R + j, wh[j]);
    for (int64_t k = 0; facts.feeds_cell && k < H; k++) put<T>(to.w_ch, row * H + k, wc[k]);
    if (facts.over_units) return;
    put<T>(to.b_ih, row, bx);
    put<T>(to.b_hh, row, bh);
  }

  // Column u of the gradient of w_hr (gradients of its outputs times what they were made of), b_hr with the
  // first, and all parameters of unit u.
  void unit_gradient(int64_t d, int64_t u, const Kept& kept, double* sum) const {
    const RecurrentGradients& to = t.gradients[d];
    double* const bias = sum + p.P;
    double* const of_parameters = bias + p.P;
    for (int64_t k = 0; k < 2 * p.P + facts.parameters; k++) sum[k] = 0;
    for (int64_t b = 0; b < p.B; b++)
      for (int64_t step = 0; step < p.length(b); step++) {
        const int64_t row = d * p.rows() + p.row(step, b);
        for (int64_t j = 0; j < p.P; j++) {
          const double gradient = kept.outputs[row * p.P + j];
          sum[j] += gradient * kept.unprojected[row * H + u], bias[j] += gradient;
        }
        for (int k = 0; k < facts.parameters; k++)
          of_parameters[k] += kept.parameters[(row * facts.parameters + k) * H + u];
      }
    for (int64_t j = 0; j < p.P; j++) put<T>(to.w_hr, j * H + u, sum[j]);
    for (int64_t j = 0; u == 0 && j < p.P; j++) put<T>(to.b_hr, j, bias[j]);
    const auto blocks = parameter_blocks<void*>(p.cell, to);
    for (int k = 0, n = 0; k < blocks.count; k++)
      for (int64_t i = 0; i < blocks.block[k].rows; i++, n++) {
        put<T>(blocks.block[k].values, i * H + u, of_parameters[n]);
        put<T>(blocks.block[k].also, i * H + u, of_parameters[n]);
      }
  }
};

// Calls f with the problem's Reference.
template <class F>
void with_reference(const RecurrentProblem& p, const RecurrentTensors& t, F f) {
  switch (p.dtype) {
    case DType::f32:
      return f(Reference<float, float>{p, t});
    case DType::bf16:
      return f(Reference<bfloat16, float>{p, t});
    case DType::f16:
      return f(Reference<float16, float>{p, t});
    case DType::f64:
      return f(Reference<double, double>{p, t});
  }
}
int64_t unit_items(const RecurrentProblem& p) { return p.P || p.facts().parameters ? p.D * p.H : 0; }

Refusal refuses(const RecurrentProblem&) { return accepted; }

WorkPlan plan_forward(const RecurrentProblem& p) {
  WorkPlan plan;
  plan.add_phase(p.D * p.B);
  Carver scratch(nullptr);
  Walk(p, scratch);
  plan.thread_bytes = scratch.used();
  return plan;
}
WorkPlan plan_backward(const RecurrentProblem& p) {
  WorkPlan plan;
  plan.add_phase(p.D * p.B);
  plan.add_phase(p.B);
  plan.add_phase(p.D * p.gates() * p.H);
  plan.add_phase(unit_items(p));
  Carver shared(nullptr), scratch(nullptr);
  Reference<float, float>::Kept(p, shared);
  Walk(p, scratch);
  const int64_t sums = p.I + p.R() + p.H + 2 * p.P + p.facts().parameters;
  const int64_t bytes = align_up(sums * int64_t(sizeof(double)));
  plan.shared_bytes = shared.used();
  plan.thread_bytes = bytes > scratch.used() ? bytes : scratch.used();
  return plan;
}

void run_forward(const RecurrentProblem& p, const RecurrentTensors& t, const WorkSlice& slice) {
  Carver carver(slice.scratch);
  const Walk walk(p, carver);
  with_reference(p, t, [&](const auto& reference) {
    with_cell<Math>(p.cell, [&](auto cell) {
      for (int64_t k = slice.begin; k < slice.end; k++)
        reference.template forward_sequence<decltype(cell)>(k / p.B, k % p.B, walk);
    });
  });
}
void run_backward(const RecurrentProblem& p, const RecurrentTensors& t, const WorkSlice& slice) {
  Carver shared(slice.shared), carver(slice.scratch);
  const Walk walk(p, carver);
  double* sums = reinterpret_cast<double*>(slice.scratch);
  with_reference(p, t, [&](const auto& reference) {
    const typename std::decay_t<decltype(reference)>::Kept kept(p, shared);
    for (int64_t k = slice.begin; k < slice.end; k++) {
      if (slice.phase == 0)
        with_cell<Math>(p.cell, [&](auto cell) {
          reference.template backward_sequence<decltype(cell)>(k / p.B, k % p.B, kept, walk);
        });
      if (slice.phase == 1 && t.gx) reference.input_gradient(k, kept, sums);
      if (slice.phase >= 2 && !t.weights_wanted()) continue;
      const int64_t rows = p.gates() * p.H;
      if (slice.phase == 2) reference.weight_gradient(k / rows, int(k % rows / p.H), k % p.H, kept, sums);
      if (slice.phase == 3) reference.unit_gradient(k / p.H, k % p.H, kept, sums);
    }
  });
}

}  // namespace

extern const RecurrentCpuKernel recurrent_reference_forward, recurrent_reference_backward;
const RecurrentCpuKernel recurrent_reference_forward = {"reference", Isa::portable, refuses, plan_forward,
                                                        run_forward};
const RecurrentCpuKernel recurrent_reference_backward = {"reference", Isa::portable, refuses, plan_backward,
                                                         run_backward};

}  // namespace pyseqnet
