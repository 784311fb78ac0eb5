// All units of one sequence and step: what the oracle, the CPU kernels and the CUDA kernels do around a cell.
//
// A Row says how units are walked: one after the other in double (the oracle), VL at a time (the CPU kernels),
// a thread a unit (CUDA, a block a row).
//   Real, Math      as a cell's
//   units(H)        where to begin: for (auto u = row.units(H); u.inside(); u.next())
//   load, store     VL or one element of a row of numbers;  flags: of a row of bytes, as 0 or 1
//   within(u, x)    x, but 0 in lanes past the last unit
//   total(x)        sum over all lanes and threads, the same for all of them
#pragma once
#include "recurrent/cells/jordan.h"

namespace pyseqnet {

// Options across cells. Zoneout (Krueger et al., 2017): a state becomes z s' + (1 - z) s with z of 0 and 1 in
// training, the rate itself in evaluation.
template <class Acc>
struct CellOptions {
  Acc limit = 0, zone_h = 0, zone_c = 0;  // zone_*: z where no mask is given
  bool clips = false;
};

// Row pointers; value k of unit u at k * H + u. Null where a cell has no use for it.
template <class Acc>
struct RowForward {
  Acc* slots;            // in: the input's parts; out: kept slots
  const Acc* recurrent;  // W_hh h' (gates, H), of a cell that feeds c with W_ch c'
  const Acc* bias;       // of the slots' sums (sums, H); null: none, or they have it already
  const Acc* parameters;
  const Acc *h_before, *c_before;
  Acc *h, *c;           // h before zoneout and projection; c may be c_before
  const uint8_t* zone;  // of c, (H)
  CellOptions<Acc> options;
  bool keep;  // whether slots are wanted
};
template <class Acc, class Gradient>
struct RowBackward {
  const Acc* kept;
  const Acc* parameters;
  const Acc *h_before, *c_before;
  Acc* h_gradient;           // in: of h before zoneout and projection; out: what reaches h' past the product
  Acc* c_gradient;           // in: of c; out: of c', past the product
  Gradient* sums;            // in blocks (CellFacts::gradient_block)
  Acc* parameter_gradients;  // added to
  Acc* unprojected;          // h before projection; null: not wanted
  const uint8_t* zone;
  CellOptions<Acc> options;
  bool slot_order;  // blocks of `sums` lie in the slots' order instead
};

template <class Cell, class Row, class Units, class Acc>
PYSEQNET_HOST_DEVICE auto unit_of(const Row& row, int64_t H, Units u, const Acc* parameters,
                                  const CellOptions<Acc>& options) {
  CellUnit<typename Row::Real, Cell::facts.parameters> unit = {};
  for (int k = 0; k < Cell::facts.parameters; k++) unit.parameter[k] = row.load(parameters + k * H, u);
  unit.limit = options.limit - typename Row::Real{};
  unit.clips = options.clips;
  return unit;
}
template <class Row, class Units, class Acc>
PYSEQNET_HOST_DEVICE typename Row::Real zone_of(const Row& row, Units u, const uint8_t* mask, Acc rate) {
  return mask ? row.flags(mask, u) : rate - typename Row::Real{};
}
// Exactly one of both where z is 0 or 1.
template <class Real>
PYSEQNET_HOST_DEVICE Real zoned(Real z, Real before, Real after) {
  return z * before + (1 - z) * after;
}
template <class Cell, class Row, class Units, class Acc>
PYSEQNET_HOST_DEVICE void load_sums(const Row& row, int64_t H, Units u, const RowForward<Acc>& at,
                                    typename Row::Real* slot) {
  constexpr CellFacts facts = Cell::facts;
  PYSEQNET_UNROLL
  for (int g = 0; g < facts.gates; g++) slot[g] = row.load(at.slots + g * H, u);
  PYSEQNET_UNROLL
  for (int g = 0; g < facts.gates; g++) {
    const typename Row::Real recurrent = row.load(at.recurrent + g * H, u);
    if (g < facts.apart_from)
      slot[g] += recurrent;
    else
      slot[facts.recurrent_slot(g)] = recurrent;
  }
  if (at.bias)
    for (int k = 0; k < facts.sums(); k++) slot[k] += row.load(at.bias + k * H, u);
}

template <class Cell, class Row, class Acc>
PYSEQNET_HOST_DEVICE void forward_row(const Row& row, int64_t H, const RowForward<Acc>& at) {
  using Real = typename Row::Real;
  constexpr CellFacts facts = Cell::facts;
  if constexpr (facts.over_units) {
    Cell::forward_row(row, H, at);
  } else {
    for (auto u = row.units(H); u.inside(); u.next()) {
      Real slot[facts.slots];
      load_sums<Cell>(row, H, u, at, slot);
      CellState<Real> previous = {};
      if constexpr (facts.reads_h) previous.h = row.load(at.h_before, u);
      if constexpr (facts.has_cell) previous.c = row.load(at.c_before, u);
      const CellState<Real> next =
          Cell::forward(slot, previous, unit_of<Cell>(row, H, u, at.parameters, at.options));
      if (at.keep) PYSEQNET_UNROLL
      for (int k = 0; k < facts.slots; k++) row.store(at.slots + k * H, u, slot[k]);
      if constexpr (facts.has_cell)
        row.store(at.c, u, zoned(zone_of(row, u, at.zone, at.options.zone_c), previous.c, next.c));
      row.store(at.h, u, next.h);
    }
  }
}

template <class Cell, class Row, class Acc, class Gradient>
PYSEQNET_HOST_DEVICE void backward_row(const Row& row, int64_t H, const RowBackward<Acc, Gradient>& at) {
  using Real = typename Row::Real;
  constexpr CellFacts facts = Cell::facts;
  if constexpr (facts.over_units) {
    Cell::backward_row(row, H, at);
  } else {
    for (auto u = row.units(H); u.inside(); u.next()) {
      CellBackward<Real, facts.slots> of = {};
      PYSEQNET_UNROLL
      for (int k = 0; k < facts.slots; k++) of.kept[k] = row.load(at.kept + k * H, u);
      Real zone = {}, c_gradient = {};
      of.gradient.h = row.load(at.h_gradient, u);
      if constexpr (facts.reads_h) of.previous.h = row.load(at.h_before, u);
      if constexpr (facts.has_cell) {
        of.previous.c = row.load(at.c_before, u);
        c_gradient = row.load(at.c_gradient, u);
        zone = zone_of(row, u, at.zone, at.options.zone_c);
        of.gradient.c = c_gradient - zone * c_gradient;
      }
      const auto unit = unit_of<Cell>(row, H, u, at.parameters, at.options);
      Real d[facts.slots];
      CellGradient<Real, facts.parameters> gradient;
      const CellState<Real> passed = Cell::backward(of, unit, d, gradient);
      PYSEQNET_UNROLL
      for (int k = 0; k < facts.slots; k++)
        row.store(at.sums + (at.slot_order ? k : facts.gradient_block(k)) * H, u, d[k]);
      for (int k = 0; k < facts.parameters; k++) {
        Acc* sum = at.parameter_gradients + k * H;
        row.store(sum, u, row.load(sum, u) + gradient.parameter[k]);
      }
      row.store(at.h_gradient, u, passed.h);
      if constexpr (facts.has_cell) {
        row.store(at.c_gradient, u, passed.c + zone * c_gradient);
        if (at.unprojected) row.store(at.unprojected, u, Cell::unprojected(of, unit));
      } else {
        if (at.unprojected) row.store(at.unprojected, u, of.kept[0]);
      }
    }
  }
}

// The step's end, feature by feature: output layer of a Jordan net, zoneout. `sums` is m, or a projection of it.
template <class Acc>
struct OutputForward {
  const Acc* sums;
  const Acc* bias;    // of a Jordan net's output; null: none
  const Acc* before;  // the state of the step before
  Acc *state, *y;     // y: of a Jordan net; elsewhere the state is the output
  const uint8_t* zone;
  Acc zone_rate, decay;
  OutputUnit unit;
  bool is_jordan;
};
template <class Row, class Acc>
PYSEQNET_HOST_DEVICE void output_row(const Row& row, int64_t R, const OutputForward<Acc>& at) {
  using Output = JordanOutput<typename Row::Math>;
  for (auto u = row.units(R); u.inside(); u.next()) {
    typename Row::Real state = row.load(at.sums, u);
    const typename Row::Real before = row.load(at.before, u);
    if (at.is_jordan) {
      if (at.bias) state += row.load(at.bias, u);
      state = Output::forward(at.unit, state);
      row.store(at.y, u, state);
      state = Output::state(before, state, at.decay - typename Row::Real{});
    }
    row.store(at.state, u, zoned(zone_of(row, u, at.zone, at.zone_rate), before, state));
  }
}
template <class Acc>
struct OutputBackward {
  Acc* state;     // in: the gradient of the state; out: what reaches the state before
  const Acc* gy;  // of the output; null: none
  const Acc* y;   // of a Jordan net
  Acc* sums;      // out
  const uint8_t* zone;
  Acc zone_rate, decay;
  OutputUnit unit;
  bool is_jordan;
};
template <class Row, class Acc>
PYSEQNET_HOST_DEVICE void output_row_backward(const Row& row, int64_t R, const OutputBackward<Acc>& at) {
  using Real = typename Row::Real;
  for (auto u = row.units(R); u.inside(); u.next()) {
    const Real gy = at.gy ? row.load(at.gy, u) : Real{}, arriving = row.load(at.state, u);
    const Real whole = at.is_jordan ? arriving : arriving + gy;
    Real passed = zone_of(row, u, at.zone, at.zone_rate) * whole, of_sum = whole - passed;
    if (at.is_jordan) {
      passed += at.decay * of_sum;
      of_sum = JordanOutput<typename Row::Math>::backward(at.unit, row.load(at.y, u), of_sum + gy);
    }
    row.store(at.state, u, passed);
    row.store(at.sums, u, of_sum);
  }
}

}  // namespace pyseqnet
