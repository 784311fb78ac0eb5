// Every generic CUDA kernel of the recurrent family against the oracle, forward and backward, within the
// rounding of their sums. Its kernels: list_rows, zero_padding, begin_states, recurrent_product,
// sum_recurrent_parts, and recurrent_step with its tasks (cells forward and backward, projection, gradient of
// h).
// Sources: recurrent/recurrent_generic.cu recurrent/recurrent_reference.cpp
#include "recurrent_case.h"

namespace pyseqnet {
extern const RecurrentCudaKernel recurrent_forward_cuda, recurrent_backward_cuda;
}  // namespace pyseqnet

using namespace pyseqnet;
using namespace pyseqnet::testing;

namespace {

void check_case(Suite& suite, const Case& c) {
  check_case(suite, c, {recurrent_forward_cuda, recurrent_backward_cuda, false});
}

void check_every_cell(Suite& suite) {
  // Tails everywhere: units, features, sequences; three steps; both directions; every dtype.
  for (RecurrentCell cell : all_cells)
    for (DType dtype : all_dtypes)
      for (Form form : all_forms) {
        if (cell == RecurrentCell::rnn_relu && form != Form::lengths) continue;
        if ((dtype == DType::f16 || dtype == DType::bf16) && form == Form::dense) continue;
        check_case(suite, make(dtype, cell, 3, 3, 5, 7, 2, 0, {.form = form, .gaps = form == Form::lengths}));
      }
  for (DType dtype : all_dtypes)
    check_case(suite, make(dtype, RecurrentCell::lstm, 3, 3, 4, 6, 2, 5, {.form = Form::lengths}));
  check_case(suite, make(DType::f32, RecurrentCell::lstm, 3, 3, 4, 6, 1, 5, {.form = Form::packed}));
}

void check_edges(Suite& suite) {
  constexpr RecurrentCell lstm = RecurrentCell::lstm, gru = RecurrentCell::gru, rnn = RecurrentCell::rnn_tanh;
  constexpr DType f32 = DType::f32, f64 = DType::f64, bf16 = DType::bf16;
  const Choices lengths = {.form = Form::lengths}, packed = {.form = Form::packed};
  const Choices few = {.gx = false, .weights = false};  // no products over all steps
  const Case edges[] = {
      make(f32, lstm, 1, 1, 1, 1, 1),                // one element
      make(f32, lstm, 0, 2, 3, 4, 2),                // no steps: states and their gradients pass
      make(f32, gru, 3, 0, 3, 4, 1),                 // no sequences
      make(f32, rnn, 3, 2, 0, 4, 1),                 // no features: biases alone
      make(f64, lstm, 0, 2, 3, 4, 1, 2),             // no steps, projected
      make(f32, lstm, 3, 33, 3, 17, 1, 0, lengths),  // two tiles of sequences, five of units
      make(bf16, gru, 3, 35, 2, 20, 2, 0, packed),   // sequences run out: fewer tiles later
      make(f32, rnn, 3, 2, 3, 150, 1),               // tiles of units with one gate; several chunks of depth
      make(f32, lstm, 2, 2, 70, 70, 1),              // many tiles in products
      make(f64, gru, 2, 2, 9, 70, 1),                // in double
      make(f32, lstm, 3, 3, 2, 130, 1, 0, lengths),  // back through time in parts
      make(f64, gru, 2, 2, 1, 172, 1, 0, few),       // in double
      make(bf16, lstm, 2, 1, 1, 530, 1, 3, few),     // the projection in parts
      make(f32, rnn, 270, 1, 2, 3, 2, 0, lengths),   // the input's part in chunks of steps
      make(f32, rnn, 5, 130, 2, 3, 2),  // weights' sums in two parts of two runs; five tiles of sequences
      make(f32, lstm, 1, 1, 1, 4090, 1, 9, few),    // a block takes all its warps' columns: one slice
      make(bf16, lstm, 1, 1, 1, 2043, 1, 18, few),  // two slices
      make(f64, lstm, 1, 1, 2, 1020, 1, 3, few),    // four
  };
  for (const Case& c : edges) check_case(suite, c);

  // Nothing but padding, and a mixture: lengths of 0.
  Case without_steps = make(f32, lstm, 3, 2, 2, 3, 2, 0, lengths);
  for (int64_t k = 0; k < 3; k++) check_case(suite, without_steps);

  const Choices variants[] = {
      {.batch_first = true},
      {.form = Form::lengths, .batch_first = true, .gaps = true},
      {.form = Form::packed, .gaps = true},
      {.biases = false, .states = false},
      {.form = Form::packed, .states = false, .gy_expanded = true},
      {.form = Form::lengths, .gy = false},
      {.gy_expanded = true, .g_states = false},
      {.gx = false},
      {.to_states = false},
      {.form = Form::lengths, .weights = false},
      {.gx = false, .to_states = false},
  };
  for (const Choices& v : variants)
    for (RecurrentCell cell : {lstm, gru}) check_case(suite, make(f32, cell, 3, 2, 3, 5, 2, 0, v));
  for (RecurrentCell cell : all_cells)
    for (Form form : {Form::dense, Form::lengths}) {
      Case c = make(bf16, cell, 4, 2, 3, 5, 2, cell == lstm && form == Form::dense ? 3 : 0, {.form = form});
      c.p.reserve = false;
      check_case(suite, c);
    }
}

void check_random(Suite& suite) {
  Random& random = suite.random;
  for (int k = 0; k < suite.random_problems; k++) {
    Choices v;
    v.form = random.any(all_forms);
    v.batch_first = random.chance(0.4), v.gaps = random.chance(0.3);
    v.biases = random.chance(0.7), v.states = random.chance(0.7);
    v.gy = random.chance(0.9), v.gy_expanded = random.chance(0.2), v.g_states = random.chance(0.7);
    v.gx = random.chance(0.8), v.to_states = random.chance(0.8), v.weights = random.chance(0.8);
    Case c = make(random.any(all_dtypes), random.any(all_cells), random.in(1, 6), random.in(1, 6),
                  random.in(1, 12), random.in(1, 20), random.in(1, 2),
                  random.chance(0.4) ? random.in(1, 9) : 0, v);
    c.p.reserve = random.chance(0.8);
    check_case(suite, c);
  }
}

// Chunks of steps that fill their memory, and more than 2^31 elements of y. Real devices only: the oracle
// takes minutes.
void check_large(Suite& suite) {
  Case chunks = make(DType::f32, RecurrentCell::lstm, 700, 64, 32, 128, 2, 0, {.form = Form::lengths});
  chunks.p.reserve = false;
  check_case(suite, chunks);
  Case wide = make(DType::bf16, RecurrentCell::rnn_tanh, 65, 8200, 2, 2048, 2);
  check_case(suite, wide);
}

}  // namespace

int main(int argc, char** argv) {
  Suite suite(argc, argv);
  check_every_cell(suite);
  check_edges(suite);
  check_random(suite);
  if (suite.large) check_large(suite);
  return suite.finish();
}
