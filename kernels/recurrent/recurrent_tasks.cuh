// What recurrent_step does with the sums of a step: the cells forward and backward, the projection, and the
// gradient of h. A task says which sequences have a step (takes), what is multiplied with the weights
// (sources + source_at; -1: nothing, and finish looks at no sum), what a unit needs beside its sums (read),
// and what becomes of them (finish).
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
  static constexpr int gates = Kind::gates, slots = Cell::facts.slots;

  StepWeights<T> product;
  Sequences sequences;
  int64_t H, R;
  bool relu;
  const Acc* sources;                         // h before the step (D, B, R)
  Acc *h_after, *c;                           // (D, B, R), (D, B, H); h_after null: to `unprojected` instead
  Acc* unprojected;                           // (D, B, H)
  const Acc* from_input;                      // the input's part of row r and slot s lies at
  int64_t from_input_origin[max_directions];  // (r * slots + s) * H + unit - origin
  Acc *saved, *cells;                         // the reserve; null: not wanted
  const T* recurrent_bias[max_directions];    // of a GRU's third gate; null: zeros
  T *y, *h_n, *c_n;
  int64_t y_t, y_b;

  struct Inputs {
    Acc from_input[gates];
    CellState<Acc> before;
    bool last;
  };

  PYSEQNET_DEVICE int64_t step(int d) const { return d ? product.t[1] : product.t[0]; }
  PYSEQNET_DEVICE bool takes(int d, int64_t b) const { return step(d) < sequences.length(b); }
  PYSEQNET_DEVICE int64_t source_at(int d, int64_t b) const { return (d * sequences.B + b) * R; }

  PYSEQNET_DEVICE Inputs read(int d, int64_t b, int64_t unit) const {
    const int64_t t = step(d), state = d * sequences.B + b;
    Inputs in = {};
    const int64_t row = sequences.row(t, b);
    in.last = sequences.ends(t, b, d);
    const Acc* slot =
        from_input + (row * slots * H + unit - (d ? from_input_origin[1] : from_input_origin[0]));
#pragma unroll
    for (int g = 0; g < gates; g++) in.from_input[g] = slot[g * H];
    if constexpr (Kind::is_gru) in.before.h = sources[state * R + unit];
    if constexpr (Cell::facts.has_cell) in.before.c = c[state * H + unit];
    return in;
  }

  PYSEQNET_DEVICE void finish(int d, int64_t b, int64_t unit, const Inputs& in,
                              const Acc (&sum)[gates]) const {
    const int64_t state = d * sequences.B + b, row = sequences.row(step(d), b);
    Acc slot[slots];
    if constexpr (Kind::is_gru) {
      slot[0] = in.from_input[0] + sum[0];
      slot[1] = in.from_input[1] + sum[1];
      slot[2] = in.from_input[2];
      slot[3] = sum[2] + load_or_zero(d ? recurrent_bias[1] : recurrent_bias[0], unit);
    } else {
#pragma unroll
      for (int g = 0; g < gates; g++) slot[g] = in.from_input[g] + sum[g];
    }
    CellState<Acc> after;
    if constexpr (Kind::is_rnn)
      after = relu ? ReluCell<Math>::forward(slot, in.before, {}) : Cell::forward(slot, in.before, {});
    else
      after = Cell::forward(slot, in.before);

    if (!Kind::is_rnn && saved) {
      Acc* to = saved + (d * sequences.N + row) * slots * H + unit;
#pragma unroll
      for (int s = 0; s < slots; s++) to[s * H] = slot[s];
    }
    if constexpr (Cell::facts.has_cell) {
      c[state * H + unit] = after.c;
      if (cells) cells[(d * sequences.N + row) * H + unit] = after.c;
      if (in.last && c_n) store(c_n + state * H + unit, after.c);
      if (!h_after) {
        unprojected[state * H + unit] = after.h;
        return;
      }
    }
    h_after[state * R + unit] = after.h;
    store(y + sequences.at(step(d), b, y_t, y_b) + d * R + unit, after.h);
    if (in.last && h_n) store(h_n + state * R + unit, after.h);
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
  const Acc* sources;  // o tanh(c) (D, B, H)
  Acc* h_after;
  T *y, *h_n;
  int64_t y_t, y_b;

  struct Inputs {};

  PYSEQNET_DEVICE int64_t step(int d) const { return d ? product.t[1] : product.t[0]; }
  PYSEQNET_DEVICE bool takes(int d, int64_t b) const { return step(d) < sequences.length(b); }
  PYSEQNET_DEVICE int64_t source_at(int d, int64_t b) const { return (d * sequences.B + b) * H; }
  PYSEQNET_DEVICE Inputs read(int, int64_t, int64_t) const { return {}; }
  PYSEQNET_DEVICE void finish(int d, int64_t b, int64_t j, const Inputs&, const Acc (&sum)[1]) const {
    const int64_t t = step(d), state = d * sequences.B + b;
    h_after[state * R + j] = sum[0];
    store(y + sequences.at(t, b, y_t, y_b) + d * R + j, sum[0]);
    if (h_n && sequences.ends(t, b, d)) store(h_n + state * R + j, sum[0]);
  }
};

// ---------------------------------------------------------------- backward
// Where the gradients of the slots' sums of the step after (t, b) lie, which the recurrent weights carry back
// to t; -1: the sequence ends at t.
PYSEQNET_DEVICE int64_t slots_after(const Sequences& q, int64_t row_width, int d, int64_t b, int64_t t) {
  return q.ends(t, b, d) ? -1 : (d * q.N + q.row(d ? t - 1 : t + 1, b)) * row_width;
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
  const Acc* sources;  // gradients of the slots' sums (D, N, slots, H)
  const Acc* passed;   // (D, B, R), what reaches h0 past the product; null: nothing
  const T *gy, *gh_n;
  int64_t gy_t, gy_b;
  Acc* h_gradients;  // (D, N, R)
  T* gh0;            // not null: the gradient of h0 is wanted

  struct Inputs {
    Acc gradient;  // what is added to the sum, or stands in its place
    bool last;
  };

  PYSEQNET_DEVICE int64_t step(int d) const { return d ? product.t[1] : product.t[0]; }
  PYSEQNET_DEVICE bool takes(int d, int64_t b) const {
    return gh0 ? sequences.length(b) > 0 : step(d) < sequences.length(b);
  }
  PYSEQNET_DEVICE int64_t source_at(int d, int64_t b) const {
    if (!gh0) return slots_after(sequences, row_width, d, b, step(d));
    const int64_t first = d ? sequences.length(b) - 1 : 0;
    return (d * sequences.N + sequences.row(first, b)) * row_width;
  }
  PYSEQNET_DEVICE Inputs read(int d, int64_t b, int64_t j) const {
    const int64_t state = (d * sequences.B + b) * R + j;
    if (gh0) return {passed ? passed[state] : Acc(0), false};
    const int64_t t = step(d);
    Inputs in = {0, sequences.ends(t, b, d)};
    if (in.last) in.gradient = load_or_zero(gh_n, state);
    if (gy) in.gradient += load(gy + sequences.at(t, b, gy_t, gy_b) + d * R + j);
    return in;
  }
  PYSEQNET_DEVICE void finish(int d, int64_t b, int64_t j, const Inputs& in, const Acc (&sum)[1]) const {
    const Acc gradient = in.last ? in.gradient : in.gradient + sum[0];
    if (gh0)
      store(gh0 + (d * sequences.B + b) * R + j, gradient);
    else
      h_gradients[(d * sequences.N + sequences.row(step(d), b)) * R + j] = gradient;
  }
};

template <class T, class Kind>
struct BackwardCell {
  using Element = T;
  using Acc = accumulator_t<T>;
  using Math = ScalarMath<Acc>;
  using Cell = typename Kind::template Cell<Math>;
  static constexpr int gates = 1, slots = Cell::facts.slots;

  StepWeights<T> product;
  Sequences sequences;
  int64_t H, R;
  bool relu, projected;
  const Acc* sources;  // gradients of the slots' sums (D, N, slots, H); projected: of h (D, N, P)
  const T *h0, *c0, *y, *gy, *gh_n, *gc_n;  // null: zeros
  int64_t y_t, y_b, gy_t, gy_b;
  const Acc *saved, *cells;  // the reserve
  Acc* slot_gradients;       // (D, N, slots, H)
  Acc* unprojected;          // (D, N, H) with a projection: o tanh(c), which the gradient of w_hr needs
  Acc* passed;               // (D, B, H): what reaches c of the step before, in a GRU h, past the product
  T* gc0;

  struct Inputs {
    CellBackward<Acc, slots> at;  // but for the sum's part of the gradient of h
    bool adds_sum;
  };

  PYSEQNET_DEVICE int64_t step(int d) const { return d ? product.t[1] : product.t[0]; }
  PYSEQNET_DEVICE bool takes(int d, int64_t b) const { return step(d) < sequences.length(b); }
  PYSEQNET_DEVICE int64_t source_at(int d, int64_t b) const {
    if (projected) return (d * sequences.N + sequences.row(step(d), b)) * R;
    return slots_after(sequences, slots * H, d, b, step(d));
  }

  PYSEQNET_DEVICE Inputs read(int d, int64_t b, int64_t unit) const {
    const int64_t t = step(d), before = d ? t + 1 : t - 1, state = (d * sequences.B + b) * H + unit;
    const bool last = sequences.ends(t, b, d);
    Inputs in = {};
    const int64_t row = d * sequences.N + sequences.row(t, b);
    const bool first = sequences.begins(t, b, d);
    in.adds_sum = projected || !last;
    CellBackward<Acc, slots>& at = in.at;
    if (!projected) {
      if (last) at.gradient.h = load_or_zero(gh_n, state);
      if (Kind::is_gru && !last) at.gradient.h = passed[state];
      if (gy) at.gradient.h += load(gy + sequences.at(t, b, gy_t, gy_b) + d * R + unit);
    }
    if constexpr (!Kind::is_rnn) {
#pragma unroll
      for (int s = 0; s < slots; s++) at.kept[s] = saved[(row * slots + s) * H + unit];
    }
    if constexpr (Cell::facts.has_cell) {
      at.previous.c =
          first ? load_or_zero(c0, state) : cells[(d * sequences.N + sequences.row(before, b)) * H + unit];
      at.gradient.c = last ? load_or_zero(gc_n, state) : passed[state];
    } else if constexpr (Kind::is_gru) {
      at.previous.h =
          first ? load_or_zero(h0, state) : load(y + sequences.at(before, b, y_t, y_b) + d * R + unit);
    } else {
      at.kept[0] = load(y + sequences.at(t, b, y_t, y_b) + d * R + unit);
    }
    return in;
  }

  PYSEQNET_DEVICE void finish(int d, int64_t b, int64_t unit, const Inputs& in, const Acc (&sum)[1]) const {
    const int64_t t = step(d), state = (d * sequences.B + b) * H + unit;
    const int64_t row = d * sequences.N + sequences.row(t, b);
    CellBackward<Acc, slots> at = in.at;
    if (in.adds_sum) at.gradient.h += sum[0];
    Acc gradient[slots];
    CellGradient<Acc, 0> none;
    CellState<Acc> to_before;
    if constexpr (Kind::is_rnn)
      to_before =
          relu ? ReluCell<Math>::backward(at, {}, gradient, none) : Cell::backward(at, {}, gradient, none);
    else
      to_before = Cell::backward(at, {}, gradient, none);
#pragma unroll
    for (int s = 0; s < slots; s++) slot_gradients[(row * slots + s) * H + unit] = gradient[s];
    if constexpr (Kind::is_gru) passed[state] = to_before.h;
    if constexpr (Cell::facts.has_cell) {
      passed[state] = to_before.c;
      if (gc0 && sequences.begins(t, b, d)) store(gc0 + state, to_before.c);
      if (unprojected) unprojected[row * H + unit] = Cell::unprojected(at, {});
    }
  }
};

}  // namespace pyseqnet
