// LSTM with full-matrix peepholes, as the lectures draw it: c' is concatenated to the input of all four gates,
// the candidate and the output gate included.
//   i, f, g, o = W_ih x + b_ih + W_hh h' + b_hh + W_ch c';   i, f, o: sigmoid, g: tanh
//   c = f c' + i g,   h = o tanh(c)
// W_ch is (4 * H, H). Its product is the engine's (feeds_cell); a unit is that of the plain LSTM.
#pragma once
#include "recurrent/cells/lstm.h"

namespace pyseqnet {

template <class Math>
struct FullPeepholeLstmCell : LstmCell<Math> {
  static constexpr CellFacts facts = {.name = "lstm_full_peephole",
                                      .gates = 4,
                                      .slots = 4,
                                      .apart_from = 4,
                                      .keeps_slots = true,
                                      .has_cell = true,
                                      .feeds_cell = true};
};

}  // namespace pyseqnet
