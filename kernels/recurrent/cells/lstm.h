// Long short-term memory (Hochreiter & Schmidhuber, 1997; forget gate: Gers, Schmidhuber & Cummins, 2000):
//   i, f, g, o = W_ih x + b_ih + W_hh h' + b_hh;   i, f, o: sigmoid, g: tanh
//   c = f c' + i g
//   h = o tanh(c)
// With a limit, c is clipped to [-limit, limit] before h is made of it (Sak, Senior & Beaufays, 2014).
#pragma once
#include "recurrent/cells/cell.h"

namespace pyseqnet {

template <class Math>
struct LstmCell {
  using Real = typename Math::Real;
  static constexpr CellFacts facts = {
      .name = "lstm", .gates = 4, .slots = 4, .apart_from = 4, .keeps_slots = true, .has_cell = true};

  template <int parameters>
  PYSEQNET_HOST_DEVICE static Real clipped(Real c, const CellUnit<Real, parameters>& unit) {
    return unit.clips ? Math::clip(c, unit.limit) : c;
  }

  PYSEQNET_HOST_DEVICE static CellState<Real> forward(Real (&slot)[4], const CellState<Real>& previous,
                                                      const CellUnit<Real, 0>& unit = {}) {
    const Real i = Math::sigmoid(slot[0]), f = Math::sigmoid(slot[1]);
    const Real g = Math::tanh(slot[2]), o = Math::sigmoid(slot[3]);
    slot[0] = i, slot[1] = f, slot[2] = g, slot[3] = o;
    const Real c = clipped(f * previous.c + i * g, unit);
    return {o * Math::tanh(c), c};
  }
  // Fills d with the gradients of the slots' sums; returns what passes to the step before.
  PYSEQNET_HOST_DEVICE static CellState<Real> backward(const CellBackward<Real, 4>& at,
                                                       const CellUnit<Real, 0>& unit, Real (&d)[4],
                                                       CellGradient<Real, 0>&) {
    const Real i = at.kept[0], f = at.kept[1], g = at.kept[2], o = at.kept[3];
    const Real sum = f * at.previous.c + i * g;
    const Real t = Math::tanh(clipped(sum, unit));
    Real dc = at.gradient.c + at.gradient.h * o * (1 - t * t);
    if (unit.clips) dc = Math::unless_beyond(sum, unit.limit, dc);
    d[0] = dc * g * i * (1 - i);
    d[1] = dc * at.previous.c * f * (1 - f);
    d[2] = dc * i * (1 - g * g);
    d[3] = at.gradient.h * t * o * (1 - o);
    return {Real{}, dc * f};
  }
  // What a projection was made of.
  PYSEQNET_HOST_DEVICE static Real unprojected(const CellBackward<Real, 4>& at,
                                               const CellUnit<Real, 0>& unit) {
    return at.kept[3] * Math::tanh(clipped(at.kept[1] * at.previous.c + at.kept[0] * at.kept[2], unit));
  }
};

}  // namespace pyseqnet
