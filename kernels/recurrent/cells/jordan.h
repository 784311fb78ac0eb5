// Jordan's network (Serial order: a parallel distributed processing approach, 1986): what is fed back is the
// output, by way of a state unit that may decay.
//   m = tanh(a)  or  max(a, 0),   a = W_ih x + b_ih + W_hh s' + b_hh         H hidden units
//   y = phi(W_hr m + b_hr)                                                   P outputs
//   s = decay s' + y                                                         decay 0: s is y
// phi is the identity, tanh, max(., 0) or the logistic function. s is the state that a step leaves to the next.
#pragma once
#include "recurrent/cells/elman.h"

namespace pyseqnet {

enum class OutputUnit : int32_t { identity, tanh, relu, sigmoid };
constexpr const char* name_of(OutputUnit unit) {
  return unit == OutputUnit::identity ? "identity"
         : unit == OutputUnit::tanh   ? "tanh"
         : unit == OutputUnit::relu   ? "relu"
                                      : "sigmoid";
}

template <class Math>
struct JordanTanhCell : ElmanCell<Math, TanhUnit<Math>> {
  static constexpr CellFacts facts = {.name = "jordan_tanh",
                                      .gates = 1,
                                      .slots = 1,
                                      .apart_from = 1,
                                      .keeps_slots = true,
                                      .feeds_output = true};
};
template <class Math>
struct JordanReluCell : ElmanCell<Math, ReluUnit<Math>> {
  static constexpr CellFacts facts = {.name = "jordan_relu",
                                      .gates = 1,
                                      .slots = 1,
                                      .apart_from = 1,
                                      .keeps_slots = true,
                                      .feeds_output = true};
};

// The output layer's units, and the state that they leave.
template <class Math>
struct JordanOutput {
  using Real = typename Math::Real;

  PYSEQNET_HOST_DEVICE static Real forward(OutputUnit unit, Real sum) {
    return unit == OutputUnit::tanh      ? Math::tanh(sum)
           : unit == OutputUnit::relu    ? Math::relu(sum)
           : unit == OutputUnit::sigmoid ? Math::sigmoid(sum)
                                         : sum;
  }
  // The gradient of the sum, from that of y.
  PYSEQNET_HOST_DEVICE static Real backward(OutputUnit unit, Real y, Real gradient) {
    return unit == OutputUnit::tanh      ? gradient * (1 - y * y)
           : unit == OutputUnit::relu    ? Math::where_positive(y, gradient)
           : unit == OutputUnit::sigmoid ? gradient * y * (1 - y)
                                         : gradient;
  }
  PYSEQNET_HOST_DEVICE static Real state(Real before, Real y, Real decay) { return decay * before + y; }
};

}  // namespace pyseqnet
