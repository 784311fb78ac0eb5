// The cells: what happens at one unit in one step, forward and backward, written once for the oracle, the CPU
// kernel (Real a vector of lanes) and the CUDA kernel.
//
// A cell is a small pluggable unit; the engine around it owns time, sequences and products. It says
//   slots       sums that the engine hands it for each unit, and that it may overwrite with what backward needs
//   has_cell    whether it has a state c beside h
//   forward     (slot sums, states of the step before) -> saved slots, new states
//   backward    (what was saved, states, gradients reaching h and c) -> gradients of the slot sums, of c of the
//               step before, and the part of the gradient of h of the step before that passes no product
//
// A slot's sum is made of the input's part and the recurrent part, both with their biases:
//   lstm       slots i, f, g, o      each the sum of both parts
//   gru        slots r, z, n, q      r and z the sum of both; n the input's part of the third gate, q its
//                                    recurrent part
//   rnn        one slot
//
// Real is float, double or a vector; Math brings sigmoid and tanh. Derivatives are taken from results, not
// from sums: s (1 - s) and 1 - t^2.
#pragma once
#include <cmath>

#include "common/numerics.h"

namespace pyseqnet {

// sigmoid and tanh of a scalar. The logistic function by way of tanh would lose its small values: 1 / (1 +
// exp(-x)) keeps their relative accuracy, and exp overflows to infinity, giving 0, as it should.
template <class T>
struct ScalarMath {
  using Real = T;
  PYSEQNET_HOST_DEVICE static T sigmoid(T x) { return T(1) / (T(1) + exponential(-x)); }
  PYSEQNET_HOST_DEVICE static T tanh(T x) { return hyperbolic_tangent(x); }
  PYSEQNET_HOST_DEVICE static T relu(T x) { return x < T(0) ? T(0) : x; }  // a NaN stays one, as in torch
  PYSEQNET_HOST_DEVICE static T where_positive(T y, T x) { return y > T(0) ? x : T(0); }

 private:
  PYSEQNET_HOST_DEVICE static float exponential(float x) { return ::expf(x); }
  PYSEQNET_HOST_DEVICE static double exponential(double x) { return ::exp(x); }
  PYSEQNET_HOST_DEVICE static float hyperbolic_tangent(float x) { return ::tanhf(x); }
  PYSEQNET_HOST_DEVICE static double hyperbolic_tangent(double x) { return ::tanh(x); }
};

template <class Real>
struct CellState {
  Real h, c;  // c is meaningless where the cell has none
};

// What backward of one unit and step starts from.
template <class Real, int slots>
struct CellBackward {
  Real saved[slots];         // as forward left them; unused where the engine saves nothing
  Real h;                    // of this step; before a projection. Only cells that save nothing look at it
  CellState<Real> previous;  // states of the step before
  Real c;                    // of this step
  CellState<Real> gradient;  // of this step's states
};

template <class Math>
struct LstmCell {
  using Real = typename Math::Real;
  static constexpr int slots = 4;
  static constexpr bool has_cell = true;

  PYSEQNET_HOST_DEVICE static CellState<Real> forward(Real (&slot)[4], const CellState<Real>& previous) {
    const Real i = Math::sigmoid(slot[0]), f = Math::sigmoid(slot[1]);
    const Real g = Math::tanh(slot[2]), o = Math::sigmoid(slot[3]);
    slot[0] = i, slot[1] = f, slot[2] = g, slot[3] = o;
    const Real c = f * previous.c + i * g;
    return {o * Math::tanh(c), c};
  }
  // Fills d with the gradients of the slots' sums; returns what passes to the step before.
  PYSEQNET_HOST_DEVICE static CellState<Real> backward(const CellBackward<Real, 4>& at, Real (&d)[4]) {
    const Real i = at.saved[0], f = at.saved[1], g = at.saved[2], o = at.saved[3];
    const Real t = Math::tanh(at.c);
    const Real dc = at.gradient.c + at.gradient.h * o * (1 - t * t);
    d[0] = dc * g * i * (1 - i);
    d[1] = dc * at.previous.c * f * (1 - f);
    d[2] = dc * i * (1 - g * g);
    d[3] = at.gradient.h * t * o * (1 - o);
    return {Real{}, dc * f};
  }
};

template <class Math>
struct GruCell {
  using Real = typename Math::Real;
  static constexpr int slots = 4;
  static constexpr bool has_cell = false;

  PYSEQNET_HOST_DEVICE static CellState<Real> forward(Real (&slot)[4], const CellState<Real>& previous) {
    const Real r = Math::sigmoid(slot[0]), z = Math::sigmoid(slot[1]);
    const Real n = Math::tanh(slot[2] + r * slot[3]);
    slot[0] = r, slot[1] = z, slot[2] = n;  // q stays as it is
    return {n + z * (previous.h - n), Real{}};
  }
  PYSEQNET_HOST_DEVICE static CellState<Real> backward(const CellBackward<Real, 4>& at, Real (&d)[4]) {
    const Real r = at.saved[0], z = at.saved[1], n = at.saved[2], q = at.saved[3];
    const Real dn = at.gradient.h * (1 - z) * (1 - n * n);
    d[0] = dn * q * r * (1 - r);
    d[1] = at.gradient.h * (at.previous.h - n) * z * (1 - z);
    d[2] = dn;
    d[3] = dn * r;
    return {at.gradient.h * z, Real{}};
  }
};

template <class Math>
struct TanhCell {
  using Real = typename Math::Real;
  static constexpr int slots = 1;
  static constexpr bool has_cell = false;

  PYSEQNET_HOST_DEVICE static CellState<Real> forward(Real (&slot)[1], const CellState<Real>&) {
    return {Math::tanh(slot[0]), Real{}};
  }
  PYSEQNET_HOST_DEVICE static CellState<Real> backward(const CellBackward<Real, 1>& at, Real (&d)[1]) {
    d[0] = at.gradient.h * (1 - at.h * at.h);
    return {Real{}, Real{}};
  }
};

template <class Math>
struct ReluCell {
  using Real = typename Math::Real;
  static constexpr int slots = 1;
  static constexpr bool has_cell = false;

  PYSEQNET_HOST_DEVICE static CellState<Real> forward(Real (&slot)[1], const CellState<Real>&) {
    return {Math::relu(slot[0]), Real{}};
  }
  PYSEQNET_HOST_DEVICE static CellState<Real> backward(const CellBackward<Real, 1>& at, Real (&d)[1]) {
    d[0] = Math::where_positive(at.h, at.gradient.h);
    return {Real{}, Real{}};
  }
};

}  // namespace pyseqnet
