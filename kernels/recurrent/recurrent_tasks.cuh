// What recurrent_step does with the sums of a step: the cells forward and backward, the projection, and the
// gradient of h. A task says which sequences have a step (takes), what is multiplied with the weights
// (source), and what becomes of the sums of a unit (finish).
//
// States are kept in the accumulation type: h twice, because other blocks still read the state before while
// the new one is written; c and what passes backward once, because only the unit's own thread touches them.
#pragma once
#include "recurrent/recurrent_step.cuh"

namespace pyseqnet {

// The cells, with what the kernels are compiled for: rnn_tanh and rnn_relu share their code.
struct LstmTask {
  static constexpr int gates = 4;
  static constexpr bool is_gru = false, is_rnn = false;
  template <class Math>
  using Cell = LstmCell<Math>;
};
struct GruTask {
  static constexpr int gates = 3;
  static constexpr bool is_gru = true, is_rnn = false;
  template <class Math>
  using Cell = GruCell<Math>;
};
struct RnnTask {
  static constexpr int gates = 1;
  static constexpr bool is_gru = false, is_rnn = true;
  template <class Math>
  using Cell = TanhCell<Math>;
};

template <class T>
PYSEQNET_DEVICE accumulator_t<T> load_or_zero(const T* p, int64_t i) {
  return p ? load(p + i) : accumulator_t<T>(0);
}

// ---------------------------------------------------------------- forward
template <class T, class Kind>
struct ForwardCell {
  using Element = T;
  using Acc = accumulator_t<T>;
  using Math = ScalarMath<Acc>;
  using Cell = typename Kind::template Cell<Math>;
  static constexpr int gates = Kind::gates, slots = Cell::slots;

  StepWeights<T> product;
  Sequences sequences;
  int64_t H, R;
  bool relu;
  const Acc* h_before;  // (D, B, R)
  Acc *h_after, *c;     // (D, B, R), (D, B, H); h_after null: to `unprojected` instead
  Acc* unprojected;     // (D, B, H)
  // The input's part of the sum of row r and slot s lies at  (r * slots + s) * H + unit - origin.
  const Acc* sums;
  int64_t sums_origin[max_directions];
  Acc *saved, *cells;                       // the reserve; null: not wanted
  const T* recurrent_bias[max_directions];  // of a GRU's third gate; null: zeros
  T *y, *h_n, *c_n;
  int64_t y_t, y_b;

  PYSEQNET_DEVICE bool takes(int d, int64_t b) const { return product.t[d] < sequences.length(b); }
  PYSEQNET_DEVICE const Acc* source(int d, int64_t b) const { return h_before + (d * sequences.B + b) * R; }

  PYSEQNET_DEVICE void finish(int d, int64_t b, int64_t unit, const Acc (&sum)[gates]) const {
    const int64_t t = product.t[d], row = sequences.row(t, b), state = d * sequences.B + b;
    const Acc* from_input = sums + (row * slots * H + unit - sums_origin[d]);
    Acc slot[slots];
    if constexpr (Kind::is_gru) {
      slot[0] = from_input[0] + sum[0];
      slot[1] = from_input[H] + sum[1];
      slot[2] = from_input[2 * H];
      slot[3] = sum[2] + load_or_zero(recurrent_bias[d], unit);
    } else {
#pragma unroll
      for (int g = 0; g < gates; g++) slot[g] = from_input[g * H] + sum[g];
    }
    CellState<Acc> before = {0, 0};
    if constexpr (Kind::is_gru) before.h = h_before[state * R + unit];
    if constexpr (Cell::has_cell) before.c = c[state * H + unit];
    CellState<Acc> after;
    if constexpr (Kind::is_rnn)
      after = relu ? ReluCell<Math>::forward(slot, before) : Cell::forward(slot, before);
    else
      after = Cell::forward(slot, before);

    if (!Kind::is_rnn && saved) {
      Acc* to = saved + (d * sequences.N + row) * slots * H + unit;
#pragma unroll
      for (int s = 0; s < slots; s++) to[s * H] = slot[s];
    }
    const bool last = sequences.ends(t, b, d);
    if constexpr (Cell::has_cell) {
      c[state * H + unit] = after.c;
      if (cells) cells[(d * sequences.N + row) * H + unit] = after.c;
      if (last && c_n) store(c_n + state * H + unit, after.c);
      if (!h_after) {
        unprojected[state * H + unit] = after.h;
        return;
      }
    }
    h_after[state * R + unit] = after.h;
    store(y + sequences.at(t, b, y_t, y_b) + d * R + unit, after.h);
    if (last && h_n) store(h_n + state * R + unit, after.h);
  }
};

// h = W_hr (o tanh(c)): units are the projected features.
template <class T>
struct ForwardProjection {
  using Element = T;
  using Acc = accumulator_t<T>;
  static constexpr int gates = 1;

  StepWeights<T> product;
  Sequences sequences;
  int64_t H, R;
  const Acc* unprojected;
  Acc* h_after;
  T *y, *h_n;
  int64_t y_t, y_b;

  PYSEQNET_DEVICE bool takes(int d, int64_t b) const { return product.t[d] < sequences.length(b); }
  PYSEQNET_DEVICE const Acc* source(int d, int64_t b) const {
    return unprojected + (d * sequences.B + b) * H;
  }
  PYSEQNET_DEVICE void finish(int d, int64_t b, int64_t j, const Acc (&sum)[1]) const {
    const int64_t t = product.t[d], state = d * sequences.B + b;
    h_after[state * R + j] = sum[0];
    store(y + sequences.at(t, b, y_t, y_b) + d * R + j, sum[0]);
    if (h_n && sequences.ends(t, b, d)) store(h_n + state * R + j, sum[0]);
  }
};

// ---------------------------------------------------------------- backward
// The gradients of the slots' sums of the step after (t, b), which the recurrent weights carry back to t.
// Null: the sequence ends at t.
template <class Acc>
PYSEQNET_DEVICE const Acc* slots_after(const Sequences& q, const Acc* slot_gradients, int64_t row_width,
                                       int d, int64_t b, int64_t t) {
  if (q.ends(t, b, d)) return nullptr;
  return slot_gradients + (d * q.N + q.row(d ? t - 1 : t + 1, b)) * row_width;
}

// The whole gradient of h at a step, units being the features of h: what comes from the step after, or from
// h_n, and what comes from y. With a projection each step needs it by itself, in its own memory. At the end
// it gives the gradient of h0: the "step" before the first, of all sequences that have one.
template <class T>
struct BackwardState {
  using Element = T;
  using Acc = accumulator_t<T>;
  static constexpr int gates = 1;

  StepWeights<T> product;
  Sequences sequences;
  int64_t R, row_width;
  const Acc* slot_gradients;  // (D, N, slots, H)
  const Acc* passed;          // (D, B, R), what reaches h past the product; null: nothing
  const T *gy, *gh_n;
  int64_t gy_t, gy_b;
  Acc* h_gradients;  // (D, N, R)
  T* gh0;            // not null: the gradient of h0 is wanted

  PYSEQNET_DEVICE bool takes(int d, int64_t b) const {
    return gh0 ? sequences.length(b) > 0 : product.t[d] < sequences.length(b);
  }
  PYSEQNET_DEVICE const Acc* source(int d, int64_t b) const {
    if (!gh0) return slots_after(sequences, slot_gradients, row_width, d, b, product.t[d]);
    const int64_t first = d ? sequences.length(b) - 1 : 0;
    return slot_gradients + (d * sequences.N + sequences.row(first, b)) * row_width;
  }
  PYSEQNET_DEVICE void finish(int d, int64_t b, int64_t j, const Acc (&sum)[1]) const {
    const int64_t state = (d * sequences.B + b) * R + j;
    if (gh0) {
      store(gh0 + state, passed ? sum[0] + passed[state] : sum[0]);
      return;
    }
    const int64_t t = product.t[d];
    Acc gradient = sequences.ends(t, b, d) ? load_or_zero(gh_n, state) : sum[0];
    if (gy) gradient += load(gy + sequences.at(t, b, gy_t, gy_b) + d * R + j);
    h_gradients[(d * sequences.N + sequences.row(t, b)) * R + j] = gradient;
  }
};

template <class T, class Kind>
struct BackwardCell {
  using Element = T;
  using Acc = accumulator_t<T>;
  using Math = ScalarMath<Acc>;
  using Cell = typename Kind::template Cell<Math>;
  static constexpr int gates = 1, slots = Cell::slots;

  StepWeights<T> product;
  Sequences sequences;
  int64_t H, R;
  bool relu;
  const T *h0, *c0, *y, *gy, *gh_n, *gc_n;  // null: zeros
  int64_t y_t, y_b, gy_t, gy_b;
  const Acc *saved, *cells;  // the reserve
  Acc* slot_gradients;       // (D, N, slots, H)
  const Acc* h_gradients;    // (D, N, P) with a projection, else null
  Acc* unprojected;          // (D, N, H) with a projection: o tanh(c), which the gradient of w_hr needs
  Acc* passed;               // (D, B, H): what reaches c of the step before, in a GRU h, past the product
  T* gc0;

  PYSEQNET_DEVICE bool takes(int d, int64_t b) const { return product.t[d] < sequences.length(b); }
  PYSEQNET_DEVICE const Acc* source(int d, int64_t b) const {
    const int64_t t = product.t[d];
    if (h_gradients) return h_gradients + (d * sequences.N + sequences.row(t, b)) * R;
    return slots_after(sequences, slot_gradients, slots * H, d, b, t);
  }

  PYSEQNET_DEVICE void finish(int d, int64_t b, int64_t unit, const Acc (&sum)[1]) const {
    const int64_t t = product.t[d], state = (d * sequences.B + b) * H + unit;
    const int64_t in_direction = d * sequences.N + sequences.row(t, b);
    const bool first = sequences.begins(t, b, d), last = sequences.ends(t, b, d);
    const int64_t before = d ? t + 1 : t - 1;
    CellBackward<Acc, slots> at = {};
    at.gradient.h = sum[0];
    if (!h_gradients) {
      if (last) at.gradient.h = load_or_zero(gh_n, state);
      if (Kind::is_gru && !last) at.gradient.h += passed[state];
      if (gy) at.gradient.h += load(gy + sequences.at(t, b, gy_t, gy_b) + d * R + unit);
    }
    if constexpr (!Kind::is_rnn) {
#pragma unroll
      for (int s = 0; s < slots; s++) at.saved[s] = saved[(in_direction * slots + s) * H + unit];
    }
    if constexpr (Cell::has_cell) {
      at.c = cells[in_direction * H + unit];
      at.previous.c =
          first ? load_or_zero(c0, state) : cells[(d * sequences.N + sequences.row(before, b)) * H + unit];
      at.gradient.c = last ? load_or_zero(gc_n, state) : passed[state];
      if (unprojected) unprojected[in_direction * H + unit] = at.saved[3] * Math::tanh(at.c);
    } else if constexpr (Kind::is_gru) {
      at.previous.h =
          first ? load_or_zero(h0, state) : load(y + sequences.at(before, b, y_t, y_b) + d * R + unit);
    } else {
      at.h = load(y + sequences.at(t, b, y_t, y_b) + d * R + unit);
    }
    Acc gradient[slots];
    CellState<Acc> to_before;
    if constexpr (Kind::is_rnn)
      to_before = relu ? ReluCell<Math>::backward(at, gradient) : Cell::backward(at, gradient);
    else
      to_before = Cell::backward(at, gradient);
#pragma unroll
    for (int s = 0; s < slots; s++) slot_gradients[(in_direction * slots + s) * H + unit] = gradient[s];
    if constexpr (Kind::is_gru) passed[state] = to_before.h;
    if constexpr (Cell::has_cell) {
      passed[state] = to_before.c;
      if (first && gc0) store(gc0 + state, to_before.c);
    }
  }
};

}  // namespace pyseqnet
