// The oracle of the recurrent family: the formulae of recurrent.h in plain loops, for every cell, dtype and
// kind of sequence. It is also the kernel that serves what the fast ones refuse (float64).
//
// All sums and states are double, whatever the dtype; only what the contract stores is rounded.
//
//   forward   an item is one sequence in one direction: it walks the steps with its state.
//   backward  phase 0 walks each sequence back and leaves the gradients of all slots' sums in the workspace;
//             phase 1 makes gx of one sequence an item, phase 2 one row of the weights' gradients an item.
#include "recurrent/cells.h"
#include "recurrent/recurrent.h"

namespace pyseqnet {
namespace {

using Math = ScalarMath<double>;

// Which slot takes the recurrent part of gate g: the third gate of a GRU keeps its two parts apart.
int64_t recurrent_slot(const RecurrentProblem& p, int64_t g) {
  return p.cell == RecurrentCell::gru && g == 2 ? 3 : g;
}
int64_t slots_of(const RecurrentProblem& p) { return p.saved() ? p.saved() : 1; }

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

// T: storage; A: the reserve's type.
template <class T, class A>
struct Reference {
  const RecurrentProblem& p;
  const RecurrentTensors& t;
  const int64_t S = slots_of(p), H = p.H, R = p.R(), G = p.gates();

  // Where the states before step s of a sequence lie: y and the cells of the step before, or h0 and c0.
  double h_before(int64_t d, int64_t b, int64_t s, int64_t j) const {
    if (s == 0) return value<T>(t.h0, (d * p.B + b) * R + j);
    return value<T>(t.y, p.y_at(p.step(s - 1, b, d), b) + d * R + j);
  }
  double c_before(int64_t d, int64_t b, int64_t s, int64_t u) const {
    if (s == 0) return value<T>(t.c0, (d * p.B + b) * H + u);
    return as<A>(t.cells)[(d * p.rows() + p.row(p.step(s - 1, b, d), b)) * H + u];
  }
  int64_t gates_at(int64_t d, int64_t row, int64_t slot, int64_t u) const {
    return ((d * p.rows() + row) * S + slot) * H + u;
  }

  // The slots' sums of step `at`, from x and the state h.
  void sums(int64_t d, int64_t b, int64_t step, const double* h, double* slot) const {
    const RecurrentWeights& w = t.weights[d];
    const T* x = as<T>(t.x) + p.x_at(step, b);
    for (int64_t k = 0; k < S * H; k++) slot[k] = 0;
    for (int64_t g = 0; g < G; g++)
      for (int64_t u = 0; u < H; u++) {
        const int64_t row = g * H + u;
        double from_x = value<T>(w.b_ih, row), from_h = value<T>(w.b_hh, row);
        for (int64_t i = 0; i < p.I; i++) from_x += value<T>(w.w_ih, row * p.I + i) * to_double(x[i]);
        for (int64_t j = 0; j < R; j++) from_h += value<T>(w.w_hh, row * R + j) * h[j];
        slot[g * H + u] += from_x;
        slot[recurrent_slot(p, g) * H + u] += from_h;
      }
  }

  template <class Cell>
  void forward_sequence(int64_t d, int64_t b, double* scratch) const {
    double *h = scratch, *m = h + R, *c = m + H, *slot = c + H;
    for (int64_t j = 0; j < R; j++) h[j] = value<T>(t.h0, (d * p.B + b) * R + j);
    for (int64_t u = 0; u < H; u++) c[u] = value<T>(t.c0, (d * p.B + b) * H + u);
    for (int64_t s = 0; s < p.length(b); s++) {
      const int64_t step = p.step(s, b, d), row = p.row(step, b);
      sums(d, b, step, h, slot);
      for (int64_t u = 0; u < H; u++) {
        double at[Cell::slots];
        for (int k = 0; k < Cell::slots; k++) at[k] = slot[k * H + u];
        const CellState<double> next = Cell::forward(at, {p.P ? 0 : h[u], c[u]});
        m[u] = next.h, c[u] = next.c;
        if (!p.reserve) continue;
        if (p.saved())
          for (int k = 0; k < Cell::slots; k++) as<A>(t.gates)[gates_at(d, row, k, u)] = A(at[k]);
        if (p.has_cell()) as<A>(t.cells)[(d * p.rows() + row) * H + u] = A(next.c);
      }
      for (int64_t j = 0; j < R; j++) {
        h[j] = m[j];
        if (p.P) {
          h[j] = 0;
          for (int64_t u = 0; u < H; u++) h[j] += value<T>(t.weights[d].w_hr, j * H + u) * m[u];
        }
        put<T>(t.y, p.y_at(step, b) + d * R + j, h[j]);
      }
    }
    for (int64_t step = p.length(b); !p.packed() && step < p.T; step++)
      for (int64_t j = 0; j < R; j++) put<T>(t.y, p.y_at(step, b) + d * R + j, 0);
    for (int64_t j = 0; j < R; j++) put<T>(t.h_n, (d * p.B + b) * R + j, h[j]);
    for (int64_t u = 0; u < H; u++) put<T>(t.c_n, (d * p.B + b) * H + u, c[u]);
  }

  // What backward keeps in the workspace: gradients of the slots' sums (D, N, S, H), and for a projection the
  // whole gradient of h (D, N, P).
  static int64_t workspace(const RecurrentProblem& p) {
    return p.D * p.rows() * (slots_of(p) * p.H + p.P) * int64_t(sizeof(double));
  }
  double* slot_gradients(double* shared) const { return shared; }
  double* h_gradients(double* shared) const { return shared + p.D * p.rows() * S * H; }

  template <class Cell>
  void backward_sequence(int64_t d, int64_t b, double* shared, double* scratch) const {
    const RecurrentWeights& w = t.weights[d];
    double *dh = scratch, *dm = dh + R, *dc = dm + H;
    double* ds = slot_gradients(shared);
    for (int64_t j = 0; j < R; j++) dh[j] = value<T>(t.gh_n, (d * p.B + b) * R + j);
    for (int64_t u = 0; u < H; u++) dc[u] = value<T>(t.gc_n, (d * p.B + b) * H + u);
    for (int64_t s = p.length(b) - 1; s >= 0; s--) {
      const int64_t step = p.step(s, b, d), row = p.row(step, b);
      for (int64_t j = 0; j < R; j++) {
        if (t.gy) dh[j] += value<T>(t.gy, p.gy_at(step, b) + d * R + j);
        if (p.P) h_gradients(shared)[(d * p.rows() + row) * R + j] = dh[j];
      }
      for (int64_t u = 0; u < H; u++) {
        dm[u] = p.P ? 0 : dh[u];
        for (int64_t j = 0; j < p.P; j++) dm[u] += dh[j] * value<T>(w.w_hr, j * H + u);
      }
      for (int64_t j = 0; j < R; j++) dh[j] = 0;
      for (int64_t u = 0; u < H; u++) {
        CellBackward<double, Cell::slots> at{};
        if (p.saved())
          for (int k = 0; k < Cell::slots; k++) at.saved[k] = as<A>(t.gates)[gates_at(d, row, k, u)];
        if (!p.P) {
          at.h = value<T>(t.y, p.y_at(step, b) + d * R + u);
          at.previous.h = h_before(d, b, s, u);
        }
        if (Cell::has_cell) {
          at.c = as<A>(t.cells)[(d * p.rows() + row) * H + u];
          at.previous.c = c_before(d, b, s, u);
        }
        at.gradient = {dm[u], dc[u]};
        double gradient[Cell::slots];
        const CellState<double> passed = Cell::backward(at, gradient);
        dc[u] = passed.c;
        if (!p.P) dh[u] += passed.h;
        for (int k = 0; k < Cell::slots; k++) ds[gates_at(d, row, k, u)] = gradient[k];
      }
      for (int64_t g = 0; g < G; g++)
        for (int64_t u = 0; u < H; u++) {
          const double gradient = ds[gates_at(d, row, recurrent_slot(p, g), u)];
          for (int64_t j = 0; j < R; j++) dh[j] += gradient * value<T>(w.w_hh, (g * H + u) * R + j);
        }
    }
    for (int64_t j = 0; j < R; j++) put<T>(t.gh0, (d * p.B + b) * R + j, dh[j]);
    for (int64_t u = 0; u < H; u++) put<T>(t.gc0, (d * p.B + b) * H + u, dc[u]);
  }

  void input_gradient(int64_t b, double* shared, double* sum) const {
    const double* ds = slot_gradients(shared);
    for (int64_t step = 0; step < p.T; step++) {
      if (step >= p.length(b) && p.packed()) return;
      for (int64_t i = 0; i < p.I; i++) sum[i] = 0;
      for (int64_t d = 0; d < p.D && step < p.length(b); d++)
        for (int64_t k = 0; k < G * H; k++) {
          const double gradient = ds[gates_at(d, p.row(step, b), 0, k)];
          for (int64_t i = 0; i < p.I; i++) sum[i] += gradient * value<T>(t.weights[d].w_ih, k * p.I + i);
        }
      for (int64_t i = 0; i < p.I; i++) put<T>(t.gx, p.gx_at(step, b) + i, sum[i]);
    }
  }

  // Row g*H + u of the gradients of w_ih, w_hh and both biases.
  void weight_gradient(int64_t d, int64_t g, int64_t u, double* shared, double* sum) const {
    const double* ds = slot_gradients(shared);
    double *wx = sum, *wh = sum + p.I, bx = 0, bh = 0;
    for (int64_t k = 0; k < p.I + R; k++) sum[k] = 0;
    for (int64_t b = 0; b < p.B; b++)
      for (int64_t s = 0; s < p.length(b); s++) {
        const int64_t step = p.step(s, b, d), row = p.row(step, b);
        const double of_x = ds[gates_at(d, row, g, u)], of_h = ds[gates_at(d, row, recurrent_slot(p, g), u)];
        const T* x = as<T>(t.x) + p.x_at(step, b);
        for (int64_t i = 0; i < p.I; i++) wx[i] += of_x * to_double(x[i]);
        for (int64_t j = 0; j < R; j++) wh[j] += of_h * h_before(d, b, s, j);
        bx += of_x, bh += of_h;
      }
    const RecurrentGradients& to = t.gradients[d];
    const int64_t row = g * H + u;
    for (int64_t i = 0; i < p.I; i++) put<T>(to.w_ih, row * p.I + i, wx[i]);
    for (int64_t j = 0; j < R; j++) put<T>(to.w_hh, row * R + j, wh[j]);
    put<T>(to.b_ih, row, bx);
    put<T>(to.b_hh, row, bh);
  }

  // Column u of the gradient of w_hr: gradients of h times o tanh(c).
  void projection_gradient(int64_t d, int64_t u, double* shared, double* sum) const {
    for (int64_t j = 0; j < p.P; j++) sum[j] = 0;
    for (int64_t b = 0; b < p.B; b++)
      for (int64_t step = 0; step < p.length(b); step++) {
        const int64_t row = p.row(step, b);
        const double m =
            as<A>(t.gates)[gates_at(d, row, 3, u)] * Math::tanh(as<A>(t.cells)[(d * p.rows() + row) * H + u]);
        for (int64_t j = 0; j < p.P; j++) sum[j] += h_gradients(shared)[(d * p.rows() + row) * R + j] * m;
      }
    for (int64_t j = 0; j < p.P; j++) put<T>(t.gradients[d].w_hr, j * H + u, sum[j]);
  }
};

// Calls f with the problem's Reference and then its cell.
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
template <class F>
void with_cell(RecurrentCell cell, F f) {
  switch (cell) {
    case RecurrentCell::rnn_tanh:
      return f(TanhCell<Math>{});
    case RecurrentCell::rnn_relu:
      return f(ReluCell<Math>{});
    case RecurrentCell::lstm:
      return f(LstmCell<Math>{});
    case RecurrentCell::gru:
      return f(GruCell<Math>{});
  }
}

Refusal refuses(const RecurrentProblem&) { return accepted; }

WorkPlan plan_forward(const RecurrentProblem& p) {
  WorkPlan plan;
  plan.add_phase(p.D * p.B);
  plan.thread_bytes = align_up((p.R() + (2 + slots_of(p)) * p.H) * int64_t(sizeof(double)));
  return plan;
}
WorkPlan plan_backward(const RecurrentProblem& p) {
  WorkPlan plan;
  plan.add_phase(p.D * p.B);
  plan.add_phase(p.B);
  plan.add_phase(p.D * p.gates() * p.H);
  plan.add_phase(p.P ? p.D * p.H : 0);
  plan.shared_bytes = Reference<float, float>::workspace(p);
  plan.thread_bytes = align_up((p.I + 2 * p.R() + 2 * p.H) * int64_t(sizeof(double)));
  return plan;
}

void run_forward(const RecurrentProblem& p, const RecurrentTensors& t, const WorkSlice& slice) {
  double* scratch = reinterpret_cast<double*>(slice.scratch);
  with_reference(p, t, [&](const auto& reference) {
    with_cell(p.cell, [&](auto cell) {
      for (int64_t k = slice.begin; k < slice.end; k++)
        reference.template forward_sequence<decltype(cell)>(k / p.B, k % p.B, scratch);
    });
  });
}
void run_backward(const RecurrentProblem& p, const RecurrentTensors& t, const WorkSlice& slice) {
  double *scratch = reinterpret_cast<double*>(slice.scratch),
         *shared = reinterpret_cast<double*>(slice.shared);
  with_reference(p, t, [&](const auto& reference) {
    for (int64_t k = slice.begin; k < slice.end; k++) {
      if (slice.phase == 0)
        with_cell(p.cell, [&](auto cell) {
          reference.template backward_sequence<decltype(cell)>(k / p.B, k % p.B, shared, scratch);
        });
      if (slice.phase == 1 && t.gx) reference.input_gradient(k, shared, scratch);
      if (slice.phase >= 2 && !t.weights_wanted()) continue;
      const int64_t rows = p.gates() * p.H;
      if (slice.phase == 2) reference.weight_gradient(k / rows, k % rows / p.H, k % p.H, shared, scratch);
      if (slice.phase == 3) reference.projection_gradient(k / p.H, k % p.H, shared, scratch);
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
