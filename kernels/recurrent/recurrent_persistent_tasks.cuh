// What the persistent kernel does at one unit in one step: the cells forward and backward. A task says where
// a weight lies, what a unit needs beside its sums (read), what becomes of them and what the others get to
// see (finish), and what only later calls read (write).
//
// Products read h and the gradients of the gates' sums rounded to the tensors' dtype; the state that a unit
// keeps for itself (c of an LSTM, h of a GRU, and their gradients) stays in float.
#pragma once
#include "recurrent/cells.h"
#include "recurrent/recurrent_persistent.cuh"

namespace pyseqnet {

// For results that are rounded to 16 bits: the hardware's exponential, tanh by way of it. Errors of 1e-7 of
// the value range, 2^-14 of a bfloat16's rounding.
struct FastMath {
  using Real = float;
  PYSEQNET_DEVICE static float sigmoid(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }
  PYSEQNET_DEVICE static float tanh(float x) { return 1.0f - __fdividef(2.0f, 1.0f + __expf(2.0f * x)); }
  PYSEQNET_DEVICE static float relu(float x) { return x < 0.0f ? 0.0f : x; }
  PYSEQNET_DEVICE static float where_positive(float y, float x) { return y > 0.0f ? x : 0.0f; }
  PYSEQNET_DEVICE static float clip(float x, float limit) { return ScalarMath<float>::clip(x, limit); }
  PYSEQNET_DEVICE static float unless_beyond(float x, float limit, float y) {
    return ScalarMath<float>::unless_beyond(x, limit, y);
  }
};

struct LstmUnit {
  static constexpr int gates = 4;
  static constexpr bool is_gru = false, is_rnn = false;
  using Cell = LstmCell<FastMath>;
};
struct GruUnit {
  static constexpr int gates = 3;
  static constexpr bool is_gru = true, is_rnn = false;
  using Cell = GruCell<FastMath>;
};
struct RnnUnit {
  static constexpr int gates = 1;
  static constexpr bool is_gru = false, is_rnn = true;
  using Cell = TanhCell<FastMath>;
};

template <class T>
PYSEQNET_DEVICE float float_or_zero(const T* p, int64_t i) {
  return p ? load(p + i) : 0.0f;
}

// What both passes know. Pointers of tensors with directions are those of direction 0.
template <class T>
struct PersistentLayer {
  Sequences sequences;
  const int* order;  // of sequences, longest first; null: as they come
  const T* weights[max_directions];
  int H;
  bool relu;
  const T *h0, *c0;  // null: zeros
  int64_t y_t, y_b;

  PYSEQNET_DEVICE int64_t row_of(int d, int t, int b) const {
    return (d ? sequences.N : 0) + sequences.row(t, b);
  }
  PYSEQNET_DEVICE int64_t state_of(int d, int b, int unit) const {
    return (d ? sequences.B + b : int64_t(b)) * H + unit;
  }
  PYSEQNET_DEVICE int64_t at(int t, int b, int64_t stride_t, int64_t stride_b) const {
    return sequences.at(t, b, stride_t, stride_b);
  }
};

template <class T, class Unit>
struct PersistentForward : PersistentLayer<T> {
  using Element = T;
  using Cell = typename Unit::Cell;
  using Layer = PersistentLayer<T>;
  static constexpr bool is_forward = true;
  static constexpr int gates = Unit::gates, slots = Cell::facts.slots, source_gates = 1;
  static constexpr int halves = gates == 1 ? 2 : 1;  // a tile of rows is 16 units, or two gates of 8

  const float* from_input;                  // the input's part: (D, N, slots, H)
  const T* recurrent_bias[max_directions];  // of a GRU's third gate; null: zeros
  float *saved, *cells;                     // the reserve; null: not wanted
  T *y, *h_n, *c_n;

  struct Input {
    float from_input[gates];
  };
  struct Output {
    float slot[slots];
    CellState<float> state;
  };

  PYSEQNET_DEVICE int64_t row_at(int gate, int unit) const {
    return (int64_t(gate) * this->H + unit) * this->H;
  }
  PYSEQNET_DEVICE int64_t depth_at(int, int unit) const { return unit; }
  PYSEQNET_DEVICE int64_t depth_stride() const { return 1; }
  PYSEQNET_DEVICE bool wants_first() const { return false; }
  PYSEQNET_DEVICE void finish_first(int, int, int, float, float) const {}

  PYSEQNET_DEVICE float begin(int d, int b, int length, int unit, float (&published)[1]) const {
    const int64_t at = this->state_of(d, b, unit);
    const float h = float_or_zero(this->h0, at),
                c = Cell::facts.has_cell ? float_or_zero(this->c0, at) : 0.0f;
    if (length == 0) {
      if (h_n) store(h_n + at, h);
      if (Cell::facts.has_cell && c_n) store(c_n + at, c);
    }
    published[0] = h;
    return Cell::facts.has_cell ? c : h;
  }
  PYSEQNET_DEVICE Input read(int d, const Moment& m, int unit) const {
    const float* const slot = from_input + this->row_of(d, m.t, m.b) * (slots * this->H) + unit;
    Input in;
#pragma unroll
    for (int g = 0; g < gates; g++) in.from_input[g] = slot[g * this->H];
    return in;
  }
  PYSEQNET_DEVICE Output finish(int d, const Moment&, int unit, const Input& in, const float (&sum)[gates],
                                float& state, float (&published)[1]) const {
    Output out;
    CellState<float> before = {};
    if constexpr (Unit::is_gru) {
      out.slot[0] = in.from_input[0] + sum[0];
      out.slot[1] = in.from_input[1] + sum[1];
      out.slot[2] = in.from_input[2];
      out.slot[3] = sum[2] + float_or_zero(d ? recurrent_bias[1] : recurrent_bias[0], unit);
      before.h = state;
    } else {
#pragma unroll
      for (int g = 0; g < gates; g++) out.slot[g] = in.from_input[g] + sum[g];
      before.c = state;
    }
    if constexpr (Unit::is_rnn)
      out.state = this->relu ? ReluCell<FastMath>::forward(out.slot, before, {})
                             : Cell::forward(out.slot, before, {});
    else
      out.state = Cell::forward(out.slot, before, {});
    state = Cell::facts.has_cell ? out.state.c : out.state.h;
    published[0] = out.state.h;
    return out;
  }
  PYSEQNET_DEVICE void write(int d, const Moment& m, int unit, const Output& out) const {
    const int64_t row = this->row_of(d, m.t, m.b);
    if (!Unit::is_rnn && saved) {
      float* const to = saved + row * (slots * this->H) + unit;
#pragma unroll
      for (int s = 0; s < slots; s++) to[s * this->H] = out.slot[s];
    }
    if (Cell::facts.has_cell && cells) cells[row * this->H + unit] = out.state.c;
    store(y + this->at(m.t, m.b, this->y_t, this->y_b) + d * this->H + unit, out.state.h);
    if (!m.last) return;
    const int64_t at = this->state_of(d, m.b, unit);
    if (h_n) store(h_n + at, out.state.h);
    if (Cell::facts.has_cell && c_n) store(c_n + at, out.state.c);
  }
};

template <class T, class Unit>
struct PersistentBackward : PersistentLayer<T> {
  using Element = T;
  using Cell = typename Unit::Cell;
  static constexpr bool is_forward = false;
  static constexpr int gates = 1, slots = Cell::facts.slots, source_gates = Unit::gates, halves = 2;

  const float *saved, *cells;  // the reserve
  const T *y, *gy, *gh_n, *gc_n;
  int64_t gy_t, gy_b;
  T* slot_gradients;  // (D, N, slots, H)
  T *gh0, *gc0;       // null: not wanted

  struct Input {
    CellBackward<float, slots> at;  // but for what the product brings
  };
  struct Output {
    float gradient[slots];
    float to_before;
  };

  // Rows are the features of h, depths the gates' units.
  PYSEQNET_DEVICE int64_t row_at(int, int unit) const { return unit; }
  PYSEQNET_DEVICE int64_t depth_at(int gate, int unit) const {
    return (int64_t(gate) * this->H + unit) * this->H;
  }
  PYSEQNET_DEVICE int64_t depth_stride() const { return this->H; }
  PYSEQNET_DEVICE bool wants_first() const { return gh0 != nullptr; }

  PYSEQNET_DEVICE float begin(int d, int b, int length, int unit, float (&)[source_gates]) const {
    if (length > 0) return 0;
    // A sequence without steps passes gradients on as they came.
    const int64_t at = this->state_of(d, b, unit);
    if (gh0) store(gh0 + at, float_or_zero(gh_n, at));
    if (Cell::facts.has_cell && gc0) store(gc0 + at, float_or_zero(gc_n, at));
    return 0;
  }
  // The step that came before this one in its direction.
  PYSEQNET_DEVICE static int before(int d, const Moment& m) { return d ? m.t + 1 : m.t - 1; }
  PYSEQNET_DEVICE Input read(int d, const Moment& m, int unit) const {
    const int64_t row = this->row_of(d, m.t, m.b), state = this->state_of(d, m.b, unit);
    Input in = {};
    CellBackward<float, slots>& at = in.at;
    if (m.last) {
      at.gradient.h = float_or_zero(gh_n, state);
      if constexpr (Cell::facts.has_cell) at.gradient.c = float_or_zero(gc_n, state);
    }
    if (gy) at.gradient.h += load(gy + this->at(m.t, m.b, gy_t, gy_b) + d * this->H + unit);
    if constexpr (!Unit::is_rnn) {
      const float* const slot = saved + row * (slots * this->H) + unit;
#pragma unroll
      for (int s = 0; s < slots; s++) at.kept[s] = slot[s * this->H];
    }
    if constexpr (Cell::facts.has_cell) {
      at.previous.c = m.first ? float_or_zero(this->c0, state)
                              : cells[this->row_of(d, before(d, m), m.b) * this->H + unit];
    } else if constexpr (Unit::is_gru) {
      at.previous.h = m.first
                          ? float_or_zero(this->h0, state)
                          : load(y + this->at(before(d, m), m.b, this->y_t, this->y_b) + d * this->H + unit);
    } else {
      at.kept[0] = load(y + this->at(m.t, m.b, this->y_t, this->y_b) + d * this->H + unit);
    }
    return in;
  }
  PYSEQNET_DEVICE Output finish(int, const Moment& m, int, const Input& in, const float (&sum)[1],
                                float& state, float (&published)[source_gates]) const {
    CellBackward<float, slots> at = in.at;
    if (!m.last) {
      at.gradient.h += sum[0];
      (Cell::facts.has_cell ? at.gradient.c : at.gradient.h) += state;
    }
    Output out;
    CellState<float> to_before;
    CellGradient<float, 0> none;
    if constexpr (Unit::is_rnn)
      to_before = this->relu ? ReluCell<FastMath>::backward(at, {}, out.gradient, none)
                             : Cell::backward(at, {}, out.gradient, none);
    else
      to_before = Cell::backward(at, {}, out.gradient, none);
    out.to_before = state = Unit::is_rnn ? 0.0f : Cell::facts.has_cell ? to_before.c : to_before.h;
    // Of a GRU's third gate, the recurrent part has a slot of its own.
#pragma unroll
    for (int g = 0; g < source_gates; g++) published[g] = out.gradient[g == 2 && Unit::is_gru ? 3 : g];
    return out;
  }
  PYSEQNET_DEVICE void write(int d, const Moment& m, int unit, const Output& out) const {
    T* const to = slot_gradients + this->row_of(d, m.t, m.b) * (slots * this->H) + unit;
#pragma unroll
    for (int s = 0; s < slots; s++) store(to + s * this->H, out.gradient[s]);
    if (Cell::facts.has_cell && gc0 && m.first) store(gc0 + this->state_of(d, m.b, unit), out.to_before);
  }
  PYSEQNET_DEVICE void finish_first(int d, int b, int unit, float sum, float state) const {
    store(gh0 + this->state_of(d, b, unit), Unit::is_gru ? sum + state : sum);
  }
};

}  // namespace pyseqnet
