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
#include "recurrent/cells/cell.h"

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
  Acc* slots;                 // in: the input's parts; out: kept slots
  const Acc* recurrent;       // W_hh h' (gates, H), of a cell that feeds c with W_ch c'
  const Acc* recurrent_bias;  // of gates that keep parts apart (apart, H)
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
template <class Cell, class Row, class Units, class Acc>
PYSEQNET_HOST_DEVICE void load_sums(const Row& row, int64_t H, Units u, const RowForward<Acc>& at,
                                    typename Row::Real* slot) {
  constexpr CellFacts facts = Cell::facts;
#pragma GCC unroll 8
  for (int g = 0; g < facts.gates; g++) {
    slot[g] = row.load(at.slots + g * H, u);
    const typename Row::Real recurrent = row.load(at.recurrent + g * H, u);
    if (g < facts.apart_from) {
      slot[g] += recurrent;
    } else {
      slot[facts.recurrent_slot(g)] = recurrent;
      if (at.recurrent_bias)
        slot[facts.recurrent_slot(g)] += row.load(at.recurrent_bias + (g - facts.apart_from) * H, u);
    }
  }
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
      if (at.keep)
#pragma GCC unroll 8
        for (int k = 0; k < facts.slots; k++) row.store(at.slots + k * H, u, slot[k]);
      if constexpr (facts.has_cell)
        row.store(at.c, u, next.c + zone_of(row, u, at.zone, at.options.zone_c) * (previous.c - next.c));
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
#pragma GCC unroll 8
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
#pragma GCC unroll 8
      for (int k = 0; k < facts.slots; k++) row.store(at.sums + facts.gradient_block(k) * H, u, d[k]);
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

}  // namespace pyseqnet
