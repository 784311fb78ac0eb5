// LSTM with layer normalisation in the form of its paper (Ba, Kiros & Hinton, Layer normalization, 2016,
// equations 20 to 22), which haste's LayerNormLSTM and PyTorch's benchmark of recurrent networks share:
//   i, f, g, o = LN(W_ih x; gain_ih) + LN(W_hh h'; gain_hh) + b_ih + b_hh;   i, f, o: sigmoid, g: tanh
//   c = f c' + i g
//   h = o tanh(LN(c; gain_c, bias_c))
// LN(a; gain) = gain (a - mean) / sqrt(variance + 1e-5). Statistics of the two products are taken over all 4 * H
// gates of a step, those of c over its H units; variances are biased, as torch's LayerNorm. b_ih and b_hh are
// the paper's two offsets: they come after the normalisation.
//
// Parameters of a unit: gain_ih (4), gain_hh (4), gain_c, bias_c, b_ih + b_hh (4). Slots: both products as they
// came (4 each), then i, f, g, o. c may be clipped as in lstm.h. Statistics need all units of a row before one of
// them can go on, so the passes over a row stand here instead of a unit's forward and backward.
#pragma once
#include "recurrent/cells/lstm.h"
#include "recurrent/cells/rows.h"

namespace pyseqnet {

template <class Math>
struct LayerNormLstmCell {
  using Real = typename Math::Real;
  static constexpr int gains_ih = 0, gains_hh = 4, gain_c = 8, bias_c = 9, biases = 10, all_parameters = 14;
  static constexpr CellFacts facts = {.name = "lstm_layer_norm",
                                      .gates = 4,
                                      .slots = 12,
                                      .apart_from = 0,
                                      .keeps_slots = true,
                                      .parameters = all_parameters,
                                      .has_cell = true,
                                      .over_units = true};
  static constexpr int products = 8;  // slots before i, f, g, o
  using Unit = CellUnit<Real, all_parameters>;

  struct Moments {
    Real mean, inverse;  // 1 / standard deviation
    PYSEQNET_HOST_DEVICE Real normal(Real x) const { return (x - mean) * inverse; }
  };
  // Two passes over what is normalised: a difference of squares would lose digits. The rows of a block share its
  // moments; blocks that are ready together are summed together, and their totals overlap.
  static constexpr double epsilon = 1e-5;
  template <int count>
  struct Sum {
    Real of[count] = {};
    template <class Row>
    PYSEQNET_HOST_DEVICE Real total(const Row& row) const {
      Real all = of[0];
      for (int k = 1; k < count; k++) all += of[k];
      return row.total(all);
    }
    template <class Row, class Units, class Acc>
    PYSEQNET_HOST_DEVICE void add(const Row& row, int64_t H, Units u, const Acc* values) {
      PYSEQNET_UNROLL
      for (int k = 0; k < count; k++) of[k] += row.load(values + k * H, u);
    }
    template <class Row, class Units, class Acc>
    PYSEQNET_HOST_DEVICE void add_squares(const Row& row, int64_t H, Units u, const Acc* values, Real mean) {
      PYSEQNET_UNROLL
      for (int k = 0; k < count; k++) {
        const Real x = row.within(u, row.load(values + k * H, u) - mean);
        of[k] += x * x;
      }
    }
  };
  template <int count, class Acc, class Row>
  PYSEQNET_HOST_DEVICE static Moments moments_of(const Row& row, int64_t H, Real mean,
                                                 const Sum<count>& squares) {
    return {mean, Math::inverse_root(squares.total(row) * (Acc(1) / (Acc(H) * Acc(count))) + Acc(epsilon))};
  }

  template <class Row, class Acc>
  PYSEQNET_HOST_DEVICE static void forward_row(const Row& row, int64_t H, const RowForward<Acc>& at) {
    const Acc share = Acc(1) / Acc(H), quarter = share / 4;
    Sum<4> x_sum, h_sum, x_squares, h_squares;
    for (auto u = row.units(H); u.inside(); u.next())
      x_sum.add(row, H, u, at.slots), h_sum.add(row, H, u, at.recurrent);
    const Real x_mean = x_sum.total(row) * quarter, h_mean = h_sum.total(row) * quarter;
    for (auto u = row.units(H); u.inside(); u.next()) {
      x_squares.add_squares(row, H, u, at.slots, x_mean);
      h_squares.add_squares(row, H, u, at.recurrent, h_mean);
    }
    const Moments of_x = moments_of<4, Acc>(row, H, x_mean, x_squares);
    const Moments of_h = moments_of<4, Acc>(row, H, h_mean, h_squares);
    Real c_sum = {};
    for (auto u = row.units(H); u.inside(); u.next()) {
      const Unit unit = unit_of<LayerNormLstmCell>(row, H, u, at.parameters, at.options);
      Real gate[4];
      for (int g = 0; g < 4; g++) {
        const Real product = row.load(at.recurrent + g * H, u);
        if (at.keep) row.store(at.slots + (4 + g) * H, u, product);
        gate[g] = unit.parameter[gains_ih + g] * of_x.normal(row.load(at.slots + g * H, u)) +
                  unit.parameter[gains_hh + g] * of_h.normal(product) + unit.parameter[biases + g];
        gate[g] = g == 2 ? Math::tanh(gate[g]) : Math::sigmoid(gate[g]);
        row.store(at.slots + (products + g) * H, u, gate[g]);
      }
      const Real before = row.load(at.c_before, u);
      const Real c = LstmCell<Math>::clipped(gate[1] * before + gate[0] * gate[2], unit);
      row.store(at.c, u, zoned(zone_of(row, u, at.zone, at.options.zone_c), before, c));
      row.store(at.h, u, c);  // until its statistics are known
      c_sum += row.within(u, c);
    }
    const Real c_mean = row.total(c_sum) * share;
    Sum<1> c_squares;
    for (auto u = row.units(H); u.inside(); u.next()) c_squares.add_squares(row, H, u, at.h, c_mean);
    const Moments of_c = moments_of<1, Acc>(row, H, c_mean, c_squares);
    for (auto u = row.units(H); u.inside(); u.next()) {
      const Real normal = of_c.normal(row.load(at.h, u));
      row.store(at.h, u,
                row.load(at.slots + (products + 3) * H, u) *
                    Math::tanh(row.load(at.parameters + gain_c * H, u) * normal +
                               row.load(at.parameters + bias_c * H, u)));
    }
  }

  // c of this step before zoneout, and before clipping.
  template <class Row, class Units, class Acc, class Gradient>
  PYSEQNET_HOST_DEVICE static Real cell_sum(const Row& row, int64_t H, Units u,
                                            const RowBackward<Acc, Gradient>& at) {
    const Acc* gates = at.kept + products * H;
    return row.load(gates + H, u) * row.load(at.c_before, u) +
           row.load(gates, u) * row.load(gates + 2 * H, u);
  }
  template <class Row, class Units, class Acc, class Gradient>
  PYSEQNET_HOST_DEVICE static Real cell_of(const Row& row, int64_t H, Units u,
                                           const RowBackward<Acc, Gradient>& at) {
    Unit unit = {};
    unit.limit = at.options.limit - Real{}, unit.clips = at.options.clips;
    return LstmCell<Math>::clipped(cell_sum(row, H, u, at), unit);
  }
  // The gradient of what was normalised: inverse (d - mean(d) - normal mean(d normal)).
  struct Means {
    Real of_gradient, of_product;
    PYSEQNET_HOST_DEVICE Real back(Real gradient, Real normal, const Moments& m) const {
      return m.inverse * (gradient - of_gradient - normal * of_product);
    }
  };
  template <class Row, class Units, class Acc>
  PYSEQNET_HOST_DEVICE static void add(const Row& row, Acc* sums, int64_t at, Units u, Real x) {
    row.store(sums + at, u, row.load(sums + at, u) + x);
  }

  template <class Row, class Acc, class Gradient>
  PYSEQNET_HOST_DEVICE static void backward_row(const Row& row, int64_t H,
                                                const RowBackward<Acc, Gradient>& at) {
    // h = o tanh(LN(c)): the gradient of o's sum to its block, of LN(c) to h_gradient.
    const Acc* gates = at.kept + products * H;
    const Acc share = Acc(1) / Acc(H), quarter = share / 4;
    Sum<4> x_sum, h_sum, x_squares, h_squares;
    Sum<1> c_squares;
    Real c_sum = {};
    for (auto u = row.units(H); u.inside(); u.next()) {
      const Real c = cell_of(row, H, u, at);
      row.store(at.sums, u, c);  // until its statistics are known
      c_sum += row.within(u, c);
      x_sum.add(row, H, u, at.kept), h_sum.add(row, H, u, at.kept + 4 * H);
    }
    const Real c_mean = row.total(c_sum) * share;
    const Real x_mean = x_sum.total(row) * quarter, h_mean = h_sum.total(row) * quarter;
    for (auto u = row.units(H); u.inside(); u.next()) {
      c_squares.add_squares(row, H, u, at.sums, c_mean);
      x_squares.add_squares(row, H, u, at.kept, x_mean);
      h_squares.add_squares(row, H, u, at.kept + 4 * H, h_mean);
    }
    const Moments of_c = moments_of<1, Acc>(row, H, c_mean, c_squares);
    const Moments of_x = moments_of<4, Acc>(row, H, x_mean, x_squares);
    const Moments of_h = moments_of<4, Acc>(row, H, h_mean, h_squares);
    Real gradients = {}, with_normals = {};
    for (auto u = row.units(H); u.inside(); u.next()) {
      const Real o = row.load(gates + 3 * H, u), gain = row.load(at.parameters + gain_c * H, u);
      const Real normal = of_c.normal(row.load(at.sums, u)), dh = row.load(at.h_gradient, u);
      const Real t = Math::tanh(gain * normal + row.load(at.parameters + bias_c * H, u));
      const Real dt = dh * o * (1 - t * t);
      add(row, at.parameter_gradients, gain_c * H, u, dt * normal);
      add(row, at.parameter_gradients, bias_c * H, u, dt);
      if (at.unprojected) row.store(at.unprojected, u, o * t);
      row.store(at.sums + 3 * H, u, dh * t * o * (1 - o));
      row.store(at.h_gradient, u, dt * gain);
      gradients += dt * gain, with_normals += dt * gain * row.within(u, normal);
    }
    const Means of_cell = {row.total(gradients) * share, row.total(with_normals) * share};

    // c = f c' + i g: the gradients of the gates' sums to their blocks.
    Real x_gradients = {}, x_with_normals = {}, h_gradients = {}, h_with_normals = {};
    for (auto u = row.units(H); u.inside(); u.next()) {
      const Unit unit = unit_of<LayerNormLstmCell>(row, H, u, at.parameters, at.options);
      const Real i = row.load(gates, u), f = row.load(gates + H, u), g = row.load(gates + 2 * H, u);
      const Real before = row.load(at.c_before, u), arriving = row.load(at.c_gradient, u);
      const Real zone = zone_of(row, u, at.zone, at.options.zone_c);
      const Real c = cell_of(row, H, u, at);
      Real dc = arriving - zone * arriving + of_cell.back(row.load(at.h_gradient, u), of_c.normal(c), of_c);
      if (unit.clips) dc = Math::unless_beyond(cell_sum(row, H, u, at), unit.limit, dc);
      const Real d[4] = {dc * g * i * (1 - i), dc * before * f * (1 - f), dc * i * (1 - g * g),
                         row.load(at.sums + 3 * H, u)};
      row.store(at.c_gradient, u, dc * f + zone * arriving);
      row.store(at.h_gradient, u, Real{});
      for (int k = 0; k < 4; k++) {
        const Real x = of_x.normal(row.load(at.kept + k * H, u)),
                   h = of_h.normal(row.load(at.kept + (4 + k) * H, u));
        row.store(at.sums + k * H, u, d[k]);
        add(row, at.parameter_gradients, (gains_ih + k) * H, u, d[k] * x);
        add(row, at.parameter_gradients, (gains_hh + k) * H, u, d[k] * h);
        add(row, at.parameter_gradients, (biases + k) * H, u, d[k]);
        const Real dx = d[k] * unit.parameter[gains_ih + k], dh = d[k] * unit.parameter[gains_hh + k];
        x_gradients += dx, x_with_normals += dx * row.within(u, x);
        h_gradients += dh, h_with_normals += dh * row.within(u, h);
      }
    }
    const Means x_means = {row.total(x_gradients) * quarter, row.total(x_with_normals) * quarter};
    const Means h_means = {row.total(h_gradients) * quarter, row.total(h_with_normals) * quarter};
    for (auto u = row.units(H); u.inside(); u.next())
      for (int k = 0; k < 4; k++) {
        const Real d = row.load(at.sums + k * H, u);
        const Real x = of_x.normal(row.load(at.kept + k * H, u)),
                   h = of_h.normal(row.load(at.kept + (4 + k) * H, u));
        row.store(at.sums + k * H, u,
                  x_means.back(d * row.load(at.parameters + (gains_ih + k) * H, u), x, of_x));
        row.store(at.sums + (4 + k) * H, u,
                  h_means.back(d * row.load(at.parameters + (gains_hh + k) * H, u), h, of_h));
      }
  }
};

}  // namespace pyseqnet
