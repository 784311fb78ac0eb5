// Elman's network (Finding structure in time, 1990):
//   h = tanh(a)  or  max(a, 0),   a = W_ih x + b_ih + W_hh h' + b_hh
// With a limit, h is clipped to [-limit, limit] (clipped ReLU: Hannun et al., Deep Speech, 2014).
#pragma once
#include "recurrent/cells/cell.h"

namespace pyseqnet {

template <class Math>
struct TanhUnit {
  using Real = typename Math::Real;
  PYSEQNET_HOST_DEVICE static Real forward(Real a) { return Math::tanh(a); }
  PYSEQNET_HOST_DEVICE static Real backward(Real h, Real gradient) { return gradient * (1 - h * h); }
};
template <class Math>
struct ReluUnit {
  using Real = typename Math::Real;
  PYSEQNET_HOST_DEVICE static Real forward(Real a) { return Math::relu(a); }
  PYSEQNET_HOST_DEVICE static Real backward(Real h, Real gradient) {
    return Math::where_positive(h, gradient);
  }
};

template <class Math, class Unit>
struct ElmanCell {
  using Real = typename Math::Real;

  PYSEQNET_HOST_DEVICE static CellState<Real> forward(Real (&slot)[1], const CellState<Real>&,
                                                      const CellUnit<Real, 0>& unit) {
    Real h = Unit::forward(slot[0]);
    if (unit.clips) h = Math::clip(h, unit.limit);
    slot[0] = h;
    return {h, Real{}};
  }
  PYSEQNET_HOST_DEVICE static CellState<Real> backward(const CellBackward<Real, 1>& at,
                                                       const CellUnit<Real, 0>& unit, Real (&d)[1],
                                                       CellGradient<Real, 0>&) {
    const Real h = at.kept[0];
    d[0] = Unit::backward(h, at.gradient.h);
    if (unit.clips) d[0] = Math::where_positive(unit.limit - h, Math::where_positive(unit.limit + h, d[0]));
    return {Real{}, Real{}};
  }
};

template <class Math>
struct TanhCell : ElmanCell<Math, TanhUnit<Math>> {
  static constexpr CellFacts facts = {
      .name = "rnn_tanh", .gates = 1, .slots = 1, .apart_from = 1, .keeps_slots = false};
};
template <class Math>
struct ReluCell : ElmanCell<Math, ReluUnit<Math>> {
  static constexpr CellFacts facts = {
      .name = "rnn_relu", .gates = 1, .slots = 1, .apart_from = 1, .keeps_slots = false};
};

}  // namespace pyseqnet
