// LSTM whose gates look into the cell through diagonal peepholes (Gers & Schmidhuber, Recurrent nets that time
// and count, 2000; Graves, 2013): i and f see c', o sees the new c, the candidate g sees neither.
//   i = sigmoid(a_i + p_i c'),  f = sigmoid(a_f + p_f c'),  g = tanh(a_g)
//   c = f c' + i g
//   o = sigmoid(a_o + p_o c),   h = o tanh(c)
// Parameters: p_i, p_f, p_o, one number a unit each (w_ch, 3 * H). c may be clipped as in lstm.h.
#pragma once
#include "recurrent/cells/lstm.h"

namespace pyseqnet {

template <class Math>
struct PeepholeLstmCell {
  using Real = typename Math::Real;
  static constexpr CellFacts facts = {.name = "lstm_peephole",
                                      .gates = 4,
                                      .slots = 4,
                                      .apart_from = 4,
                                      .keeps_slots = true,
                                      .parameters = 3,
                                      .has_cell = true};

  PYSEQNET_HOST_DEVICE static CellState<Real> forward(Real (&slot)[4], const CellState<Real>& previous,
                                                      const CellUnit<Real, 3>& unit) {
    const Real i = Math::sigmoid(slot[0] + unit.parameter[0] * previous.c);
    const Real f = Math::sigmoid(slot[1] + unit.parameter[1] * previous.c);
    const Real g = Math::tanh(slot[2]);
    const Real c = LstmCell<Math>::clipped(f * previous.c + i * g, unit);
    const Real o = Math::sigmoid(slot[3] + unit.parameter[2] * c);
    slot[0] = i, slot[1] = f, slot[2] = g, slot[3] = o;
    return {o * Math::tanh(c), c};
  }
  PYSEQNET_HOST_DEVICE static CellState<Real> backward(const CellBackward<Real, 4>& at,
                                                       const CellUnit<Real, 3>& unit, Real (&d)[4],
                                                       CellGradient<Real, 3>& gradient) {
    const Real i = at.kept[0], f = at.kept[1], g = at.kept[2], o = at.kept[3];
    const Real sum = f * at.previous.c + i * g, c = LstmCell<Math>::clipped(sum, unit), t = Math::tanh(c);
    d[3] = at.gradient.h * t * o * (1 - o);
    Real dc = at.gradient.c + at.gradient.h * o * (1 - t * t) + d[3] * unit.parameter[2];
    if (unit.clips) dc = Math::unless_beyond(sum, unit.limit, dc);
    d[0] = dc * g * i * (1 - i);
    d[1] = dc * at.previous.c * f * (1 - f);
    d[2] = dc * i * (1 - g * g);
    gradient.parameter[0] = d[0] * at.previous.c;
    gradient.parameter[1] = d[1] * at.previous.c;
    gradient.parameter[2] = d[3] * c;
    return {Real{}, dc * f + d[0] * unit.parameter[0] + d[1] * unit.parameter[1]};
  }
  PYSEQNET_HOST_DEVICE static Real unprojected(const CellBackward<Real, 4>& at,
                                               const CellUnit<Real, 3>& unit) {
    return at.kept[3] *
           Math::tanh(LstmCell<Math>::clipped(at.kept[1] * at.previous.c + at.kept[0] * at.kept[2], unit));
  }
};

}  // namespace pyseqnet
