// What a recurrent cell is to the engine: facts, and what happens at one unit in one step, forward and
// backward. A cell's file is the whole truth about it; the engine (recurrent.h) owns time, sequences, products
// and what goes across cells (projection, zoneout).
//
//   facts       sizes that the engine lays out memory by (CellFacts)
//   forward     (slot sums, states of the step before, parameters) -> kept slots, new states
//   backward    (kept slots, states of the step before, gradients reaching the new states, parameters)
//               -> gradients of the slot sums and of the parameters, and the parts of the gradients of the
//               states of the step before that pass no product
//
// A slot's sum is made of the input's part (W_ih x + b_ih) and the recurrent part (W_hh h' + b_hh); gates from
// `apart_from` on keep the two in slots of their own. A cell overwrites slots with what backward needs.
// Derivatives are taken from results, not from sums: s (1 - s) and 1 - t^2.
//
// The maths is written once for the oracle, the CPU kernels and the CUDA kernels: Real is float, double or a
// vector of lanes, Math brings sigmoid and tanh. A cell with statistics over all units of a row (layer
// normalisation) writes its passes over a row itself; rows.h has those of all others.
#pragma once
#include <cmath>
#include <cstdint>

#include "common/numerics.h"

#if defined(__CUDACC__)
#define PYSEQNET_UNROLL _Pragma("unroll")
#else
#define PYSEQNET_UNROLL _Pragma("GCC unroll 8")
#endif

namespace pyseqnet {

struct CellFacts {
  const char* name;
  int gates;                  // blocks of H rows in w_ih and w_hh
  int slots;                  // values a unit, in and out
  int apart_from;             // the first gate whose two parts have slots of their own; = gates: none
  bool keeps_slots;           // false: backward needs slot 0 alone, and that is h itself
  int parameters = 0;         // of each unit: peepholes, gains and biases of normalisations
  bool has_cell = false;      // a state c beside h
  bool reads_h = false;       // looks at its own h'
  bool feeds_cell = false;    // c' enters the gates by a matrix w_ch (gates * H, H)
  bool over_units = false;    // statistics over all units of a row
  bool feeds_output = false;  // what is fed back is the output layer's (Jordan)

  PYSEQNET_HOST_DEVICE constexpr int apart() const { return gates - apart_from; }
  PYSEQNET_HOST_DEVICE constexpr int sums() const {
    return gates + apart();
  }  // slots that hold sums; the first ones
  // The slot of a gate's recurrent part. Of its input's part: the gate's own number.
  PYSEQNET_HOST_DEVICE constexpr int recurrent_slot(int gate) const {
    return gate < apart_from ? gate : gate + apart();
  }
  // Gradients of the sums lie in blocks of H: input's parts of gates that keep parts apart, sums of both parts,
  // recurrent parts. So what meets x and what meets h' are `gates` blocks in a row each.
  PYSEQNET_HOST_DEVICE constexpr int gradient_block(int slot) const {
    return slot < apart_from ? apart() + slot : slot < gates ? slot - apart_from : slot;
  }
  PYSEQNET_HOST_DEVICE constexpr int gate_of_input_block(int block) const {
    return block < apart() ? apart_from + block : block - apart();
  }
  PYSEQNET_HOST_DEVICE constexpr int first_recurrent_block() const { return apart(); }
};

// sigmoid and tanh of a scalar. The logistic function by way of tanh would lose its small values: 1 / (1 +
// exp(-x)) keeps their relative accuracy, and exp overflows to infinity, giving 0, as it should.
template <class T>
struct ScalarMath {
  using Real = T;
  PYSEQNET_HOST_DEVICE static T sigmoid(T x) { return T(1) / (T(1) + exponential(-x)); }
  PYSEQNET_HOST_DEVICE static T tanh(T x) { return hyperbolic_tangent(x); }
  // A NaN stays one in all three, as in torch.
  PYSEQNET_HOST_DEVICE static T relu(T x) { return x < T(0) ? T(0) : x; }
  PYSEQNET_HOST_DEVICE static T clip(T x, T limit) { return x > limit ? limit : x < -limit ? -limit : x; }
  PYSEQNET_HOST_DEVICE static T unless_beyond(T x, T limit, T y) {
    return x > limit ? T(0) : x < -limit ? T(0) : y;
  }
  PYSEQNET_HOST_DEVICE static T where_positive(T y, T x) { return y > T(0) ? x : T(0); }
  PYSEQNET_HOST_DEVICE static T inverse_root(T x) { return T(1) / root(x); }

 private:
  PYSEQNET_HOST_DEVICE static float exponential(float x) { return ::expf(x); }
  PYSEQNET_HOST_DEVICE static double exponential(double x) { return ::exp(x); }
  PYSEQNET_HOST_DEVICE static float hyperbolic_tangent(float x) { return ::tanhf(x); }
  PYSEQNET_HOST_DEVICE static double hyperbolic_tangent(double x) { return ::tanh(x); }
  PYSEQNET_HOST_DEVICE static float root(float x) { return ::sqrtf(x); }
  PYSEQNET_HOST_DEVICE static double root(double x) { return ::sqrt(x); }
};

template <class Real>
struct CellState {
  Real h, c;  // c is meaningless where the cell has none
};

// What a unit has beside its sums and states.
template <class Real, int parameters>
struct CellUnit {
  Real parameter[parameters > 0 ? parameters : 1];
  Real limit;  // of c, or of an Elman unit's h
  bool clips = false;

  PYSEQNET_HOST_DEVICE CellUnit() {}  // neither clips nor has parameters
};

// What backward of one unit and step starts from.
template <class Real, int slots>
struct CellBackward {
  Real kept[slots];          // as forward left them
  CellState<Real> previous;  // states of the step before
  CellState<Real> gradient;  // of this step's states, before zoneout and projection
};

// Gradients of a unit's parameters.
template <class Real, int parameters>
struct CellGradient {
  Real parameter[parameters > 0 ? parameters : 1];
};

}  // namespace pyseqnet
