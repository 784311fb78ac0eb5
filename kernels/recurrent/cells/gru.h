// Gated recurrent unit (Cho et al., 2014), in torch's form: the reset after the product.
//   r = sigmoid(a_r),  z = sigmoid(a_z);   a of both parts
//   q = W_hn h' + b_hn,   n = tanh(W_in x + b_in + r q)
//   h = (1 - z) n + z h'
// Slots r, z, n, q: of the third gate, the input's part in n and the recurrent part in q.
#pragma once
#include "recurrent/cells/cell.h"

namespace pyseqnet {

template <class Math>
struct GruCell {
  using Real = typename Math::Real;
  static constexpr CellFacts facts = {
      .name = "gru", .gates = 3, .slots = 4, .apart_from = 2, .keeps_slots = true, .reads_h = true};

  PYSEQNET_HOST_DEVICE static CellState<Real> forward(Real (&slot)[4], const CellState<Real>& previous,
                                                      const CellUnit<Real, 0>& = {}) {
    const Real r = Math::sigmoid(slot[0]), z = Math::sigmoid(slot[1]);
    const Real n = Math::tanh(slot[2] + r * slot[3]);
    slot[0] = r, slot[1] = z, slot[2] = n;  // q stays as it is
    return {n + z * (previous.h - n), Real{}};
  }
  PYSEQNET_HOST_DEVICE static CellState<Real> backward(const CellBackward<Real, 4>& at,
                                                       const CellUnit<Real, 0>&, Real (&d)[4],
                                                       CellGradient<Real, 0>&) {
    const Real r = at.kept[0], z = at.kept[1], n = at.kept[2], q = at.kept[3];
    const Real dn = at.gradient.h * (1 - z) * (1 - n * n);
    d[0] = dn * q * r * (1 - r);
    d[1] = at.gradient.h * (at.previous.h - n) * z * (1 - z);
    d[2] = dn;
    d[3] = dn * r;
    return {at.gradient.h * z, Real{}};
  }
};

}  // namespace pyseqnet
