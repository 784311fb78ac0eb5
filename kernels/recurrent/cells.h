// The cells that the engine knows: one file each. To add one: write its file, name it here twice, and give it a
// case in the tests.
#pragma once
#include "recurrent/cells/elman.h"
#include "recurrent/cells/gru.h"
#include "recurrent/cells/jordan.h"
#include "recurrent/cells/lstm.h"
#include "recurrent/cells/lstm_full_peephole.h"
#include "recurrent/cells/lstm_layer_norm.h"
#include "recurrent/cells/lstm_peephole.h"

namespace pyseqnet {

enum class RecurrentCell : int32_t {
  rnn_tanh,
  rnn_relu,
  lstm,
  gru,
  lstm_peephole,
  lstm_full_peephole,
  lstm_layer_norm,
  jordan_tanh,
  jordan_relu
};
constexpr int recurrent_cells = 9;

// The cells that fused, step-by-step and persistent kernels have code of their own for; every other cell is walked
// by its facts.
PYSEQNET_HOST_DEVICE constexpr bool has_kernels_of_its_own(RecurrentCell cell) {
  return cell == RecurrentCell::rnn_tanh || cell == RecurrentCell::rnn_relu || cell == RecurrentCell::lstm ||
         cell == RecurrentCell::gru;
}

// f(Cell{}) for the cell with this Math.
template <class Math, class F>
PYSEQNET_HOST_DEVICE constexpr auto with_cell(RecurrentCell cell, F&& f) {
  switch (cell) {
    case RecurrentCell::rnn_tanh:
      return f(TanhCell<Math>{});
    case RecurrentCell::rnn_relu:
      return f(ReluCell<Math>{});
    case RecurrentCell::gru:
      return f(GruCell<Math>{});
    case RecurrentCell::lstm_peephole:
      return f(PeepholeLstmCell<Math>{});
    case RecurrentCell::lstm_full_peephole:
      return f(FullPeepholeLstmCell<Math>{});
    case RecurrentCell::lstm_layer_norm:
      return f(LayerNormLstmCell<Math>{});
    case RecurrentCell::jordan_tanh:
      return f(JordanTanhCell<Math>{});
    case RecurrentCell::jordan_relu:
      return f(JordanReluCell<Math>{});
    case RecurrentCell::lstm:
      break;
  }
  return f(LstmCell<Math>{});
}
PYSEQNET_HOST_DEVICE constexpr CellFacts facts_of(RecurrentCell cell) {
  return with_cell<ScalarMath<double>>(cell, [](auto c) { return decltype(c)::facts; });
}

}  // namespace pyseqnet
