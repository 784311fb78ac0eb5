// Products of a recurrent layer over all steps at once, on tensor cores: the input's part of all gates, and
// the gradients of x and of the weights. For the kernels that multiply 16-bit numbers and keep the recurrent
// weights resident; the generic kernels have their own.
#pragma once
#include "recurrent/recurrent.h"

namespace pyseqnet {

// Where the rows that exist lie, in the order of list_rows().
struct TimeRows {
  const int64_t *row = nullptr, *x = nullptr, *gx = nullptr;
  const int64_t* before[max_directions] = {};
  int64_t count = 0;
};

// The input's part of all slots of direction d, biases included: sums (D, N, slots, H).
int launch_input_part(const RecurrentProblem&, const RecurrentTensors&, const TimeRows&, float* sums,
                      int64_t d, void* stream);
// From the gradients of the slots' sums (D, N, slots, H) in the problem's dtype.
int launch_input_gradient(const RecurrentProblem&, const RecurrentTensors&, const TimeRows&,
                          const void* slot_gradients, void* stream);
int launch_weight_gradients(const RecurrentProblem&, const RecurrentTensors&, const TimeRows&,
                            const void* slot_gradients, float* partial, int64_t d, void* stream);
// Elements of `partial`.
int64_t weight_gradient_partials(const RecurrentProblem&, int64_t rows);

}  // namespace pyseqnet
