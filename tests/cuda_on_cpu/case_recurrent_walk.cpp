// The kernels that walk a sequence in a block, against the oracle, forward and backward: every cell and option.
// Its kernels: walk_forward, walk_backward, gather_parameters, sum_parameter_gradients; and list_rows,
// zero_padding, recurrent_product and sum_recurrent_parts, which case_recurrent tries on more shapes.
// Sources: recurrent/recurrent_walk.cu recurrent/recurrent_reference.cpp
#include "recurrent_case.h"

namespace pyseqnet {
extern const RecurrentCudaKernel recurrent_walk_forward_cuda, recurrent_walk_backward_cuda;
}  // namespace pyseqnet

using namespace pyseqnet;
using namespace pyseqnet::testing;

namespace {

void check(Suite& suite, const Case& c) {
  check_case(suite, c, {recurrent_walk_forward_cuda, recurrent_walk_backward_cuda, false});
}

Case with_options(Case c, int masks_or_rates, bool clips, OutputUnit output = OutputUnit::identity) {
  c.p.zone_masks = masks_or_rates == 1;
  if (masks_or_rates == 2) c.p.zone_h = 0.25, c.p.zone_c = c.p.has_cell() ? 0.125 : 0;
  if (clips && c.p.cell != RecurrentCell::gru) c.p.limit = 0.5;
  if (c.p.is_jordan()) c.p.output = output, c.p.decay = 0.5;
  return c;
}

void check_every_cell(Suite& suite) {
  for (int k = 0; k < recurrent_cells; k++) {
    const RecurrentCell cell = RecurrentCell(k);
    const int64_t P = facts_of(cell).feeds_output ? 4 : 0, H = facts_of(cell).over_units ? 11 : 7;
    for (DType dtype : all_dtypes) {
      const bool wide = dtype == DType::f32 || dtype == DType::f64;
      const Form form = dtype == DType::f32    ? Form::lengths
                        : dtype == DType::bf16 ? Form::packed
                                               : Form::dense;
      const Case c = make(dtype, cell, 3, 3, 5, H, 2, P, {.form = form, .gaps = form == Form::lengths});
      check(suite, c);
      if (wide)
        check(suite, with_options(c, dtype == DType::f32 ? 1 : 2, dtype == DType::f32, OutputUnit::tanh));
    }
    if (facts_of(cell).has_cell)  // projected
      check(suite, with_options(make(DType::f32, cell, 3, 3, 4, H, 2, 5, {.form = Form::lengths}), 1, false));
  }
}

// One element and one step, of every cell; clipping and each kind of zoneout for itself.
void check_options(Suite& suite) {
  for (int k = 0; k < recurrent_cells; k++) {
    const RecurrentCell cell = RecurrentCell(k);
    const int64_t P = facts_of(cell).feeds_output ? 1 : 0;
    check(suite, make(DType::f32, cell, 1, 1, 1, 1, 2, P));
    check(suite, with_options(make(DType::f16, cell, 2, 2, 3, 6, 2, 3 * P), 0, true));
    check(suite,
          with_options(make(DType::bf16, cell, 3, 2, 3, 5, 2, 2 * P, {.form = Form::packed}), 1, false));
    check(suite, with_options(make(DType::f32, cell, 1, 2, 3, 6, 1, 3 * P), 2, true, OutputUnit::sigmoid));
  }
}

void check_edges(Suite& suite) {
  constexpr DType f32 = DType::f32, f64 = DType::f64, f16 = DType::f16, bf16 = DType::bf16;
  constexpr RecurrentCell diagonal = RecurrentCell::lstm_peephole, full = RecurrentCell::lstm_full_peephole,
                          normal = RecurrentCell::lstm_layer_norm, jordan = RecurrentCell::jordan_tanh;
  const Choices lengths = {.form = Form::lengths};
  const Case edges[] = {
      make(f32, diagonal, 1, 1, 1, 1, 1),               // one element
      make(f32, full, 0, 2, 3, 4, 2),                   // no steps: states and their gradients pass
      make(f32, normal, 3, 0, 3, 4, 1),                 // no sequences
      make(f32, jordan, 3, 2, 0, 4, 1, 2),              // no features: biases alone
      make(f32, normal, 2, 2, 3, 300, 1, 0, lengths),   // more units than threads
      make(f64, full, 2, 1, 2, 40, 1, 33),              // more outputs than lanes
      make(f32, jordan, 2, 1, 2, 3, 1, 270),            // more outputs than threads
      make(f16, full, 2, 1, 2, 260, 1),                 // more units and states than threads
      make(f32, RecurrentCell::gru, 2, 1, 2, 259, 2),   // both parts of a gate apart
      make(f64, diagonal, 90, 2, 3, 4, 2, 0, lengths),  // many steps: sums over them in parts
      make(bf16, diagonal, 4, 2, 3, 33, 2, 0, {.form = Form::lengths, .biases = false, .states = false}),
      make(f32, normal, 3, 2, 3, 9, 1, 0, {.biases = false, .gx = false}),
      make(f32, normal, 3, 2, 3, 9, 2, 0, {.form = Form::lengths, .weights = false}),
      make(f32, full, 3, 2, 3, 5, 1, 0, {.gy = false, .to_states = false}),
      make(f32, jordan, 3, 2, 3, 5, 2, 3, {.form = Form::packed, .batch_first = false, .gy_expanded = true}),
  };
  for (const Case& c : edges) check(suite, c);
  for (RecurrentCell cell : {diagonal, full, normal, jordan, RecurrentCell::rnn_relu}) {
    Case c = make(bf16, cell, 4, 2, 3, 9, 2, cell == jordan ? 3 : 0, lengths);
    c.p.reserve = false;
    check(suite, c);
  }
  for (OutputUnit unit : {OutputUnit::identity, OutputUnit::relu, OutputUnit::sigmoid})
    check(suite, with_options(make(f64, jordan, 3, 2, 3, 5, 1, 3), 0, false, unit));
}

}  // namespace

int main(int argc, char** argv) {
  Suite suite(argc, argv);
  check_every_cell(suite);
  check_options(suite);
  check_edges(suite);
  return suite.finish();
}
