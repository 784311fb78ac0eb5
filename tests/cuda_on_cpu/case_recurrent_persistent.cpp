// The persistent CUDA kernels of the recurrent family against the oracle, forward and backward:
// recurrent_persistent with its tasks and exchanges, order_sequences, recurrent_mma_product.
//
// What a team is like depends on the device, so the simulator is given small ones: teams that come one after
// the other, directions that do, sources that do not fit into shared memory at once.
// Sources: recurrent/recurrent_block_sm80.cu recurrent/recurrent_cluster_sm90.cu
// Sources: recurrent/recurrent_grid_sm80.cu recurrent/recurrent_over_time_sm80.cu
// Sources: recurrent/recurrent_reference.cpp
#include "common/residency.cuh"
#include "recurrent_case.h"

namespace pyseqnet {
extern const RecurrentCudaKernel recurrent_forward_block, recurrent_backward_block;
extern const RecurrentCudaKernel recurrent_forward_cluster, recurrent_backward_cluster;
extern const RecurrentCudaKernel recurrent_forward_grid, recurrent_backward_grid;
}  // namespace pyseqnet

using namespace pyseqnet;
using namespace pyseqnet::testing;

namespace {

constexpr RecurrentCell lstm = RecurrentCell::lstm, gru = RecurrentCell::gru, rnn = RecurrentCell::rnn_tanh;
constexpr DType bf16 = DType::bf16, f16 = DType::f16;
const Choices lengths = {.form = Form::lengths}, packed = {.form = Form::packed};
const RecurrentKernels block = {recurrent_forward_block, recurrent_backward_block, true};
const RecurrentKernels cluster = {recurrent_forward_cluster, recurrent_backward_cluster, true};
const RecurrentKernels grid = {recurrent_forward_grid, recurrent_backward_grid, true};

// On a real device there is nothing to choose.
void on_device([[maybe_unused]] int multiprocessors, [[maybe_unused]] int shared_kilobytes) {
#ifndef __CUDACC__
  simulated_device() = {multiprocessors, shared_kilobytes << 10, 90};
#endif
}

void check_block(Suite& suite) {
  on_device(132, 227);
  for (RecurrentCell cell : all_cells)
    for (Form form : all_forms)
      check_case(suite, make(cell == gru ? f16 : bf16, cell, 3, 5, 5, 20, 2, 0, {.form = form}), block);
  const Choices variants[] = {
      {.form = Form::lengths, .batch_first = true, .gaps = true},
      {.form = Form::packed, .biases = false, .states = false, .gy_expanded = true},
      {.form = Form::lengths, .gy = false, .weights = false},
      {.g_states = false, .gx = false, .to_states = false},
  };
  for (const Choices& v : variants)
    for (RecurrentCell cell : {lstm, gru, rnn})
      check_case(suite, make(bf16, cell, 4, 3, 8, 16, 2, 0, v), block);
  Case edges[] = {
      make(bf16, lstm, 1, 1, 1, 1, 1),                // one element
      make(bf16, lstm, 0, 2, 3, 4, 2),                // no steps: states and their gradients pass
      make(bf16, gru, 3, 0, 3, 4, 1),                 // no sequences
      make(f16, lstm, 3, 2, 0, 4, 1),                 // no features
      make(f16, lstm, 4, 17, 3, 9, 2, 0, lengths),    // three tiles
      make(f16, gru, 4, 3, 16, 64, 1, 0, packed),     // vectors
      make(bf16, lstm, 3, 9, 8, 128, 1, 0, lengths),  // all warps; some weights in shared memory
      make(bf16, rnn, 3, 9, 8, 250, 1, 0, lengths),   // two halves of units
      make(bf16, rnn, 90, 6, 136, 8, 1, 0, lengths),  // sums over all steps: tiles and parts
  };
  for (Case& c : edges) check_case(suite, c, block);
  for (RecurrentCell cell : {lstm, gru, rnn}) {
    Case c = make(bf16, cell, 4, 2, 3, 5, 2, 0, lengths);
    c.p.reserve = false;
    check_case(suite, c, block);
  }
  on_device(2, 227);  // several tiles of sequences a block
  check_case(suite, make(bf16, lstm, 3, 19, 3, 20, 2, 0, lengths), block);
}

// Layers too large for a block.
void check_teams(Suite& suite) {
  on_device(132, 227);
  const bool has_clusters = device_limits().capability >= 90;
  for (const RecurrentKernels* kernels : {&cluster, &grid}) {
    if (kernels == &cluster && !has_clusters) continue;
    check_case(suite, make(bf16, lstm, 3, 9, 5, 133, 2, 0, lengths), *kernels);
    check_case(suite, make(f16, gru, 3, 3, 4, 136, 1, 0, packed), *kernels);
    check_case(suite, make(bf16, rnn, 4, 3, 4, 270, 1), *kernels);
    check_case(suite, make(bf16, lstm, 1, 1, 1, 130, 1), *kernels);  // one step: nobody waits in backward
    check_case(suite, make(bf16, lstm, 0, 2, 2, 130, 1), *kernels);
  }
  if (has_clusters) check_case(suite, make(bf16, lstm, 2, 2, 2, 260, 1), cluster);  // four blocks
  on_device(3, 227);  // one team at a time; one direction at a time
  check_case(suite, make(bf16, lstm, 3, 19, 5, 130, 2, 0, lengths), grid);
  on_device(4, 64);  // sources in rounds
  check_case(suite, make(bf16, lstm, 3, 35, 5, 130, 1, 0, lengths), grid);
  on_device(132, 227);
}

#ifndef __CUDACC__
// Who does not fit is told so.
void check_refusals(Suite& suite) {
  if (!suite.begin("refusals")) return;
  const auto expect = [&](const RecurrentCudaKernel& kernel, const RecurrentProblem& p, bool refused) {
    if ((kernel.refuses(p) != accepted) != refused)
      suite.fail(kernel.name, refused ? "takes what it should refuse" : kernel.refuses(p));
  };
  on_device(132, 227);
  const RecurrentProblem wide = make(bf16, lstm, 3, 4, 4, 2048, 1).p;
  expect(recurrent_forward_block, wide, true);
  expect(recurrent_forward_cluster, wide, true);
  expect(recurrent_forward_grid, make(bf16, lstm, 3, 4, 4, 1024, 2).p, false);
  expect(recurrent_backward_grid, make(bf16, lstm, 3, 4, 4, 1024, 2).p, false);
  expect(recurrent_forward_cluster, make(bf16, lstm, 3, 4, 4, 512, 1).p, false);
  expect(recurrent_backward_cluster, make(bf16, lstm, 3, 4, 4, 384, 1).p, false);
  expect(recurrent_backward_cluster, make(bf16, lstm, 3, 4, 4, 512, 1).p, true);
  expect(recurrent_forward_grid, make(bf16, lstm, 3, 4, 4, 4096, 1).p, true);
  for (const RecurrentCudaKernel* kernel :
       {&recurrent_forward_block, &recurrent_forward_cluster, &recurrent_forward_grid}) {
    expect(*kernel, make(DType::f32, lstm, 3, 4, 4, 16, 1).p, true);
    expect(*kernel, make(bf16, lstm, 3, 4, 4, 16, 1, 5).p, true);
  }
  on_device(0, 0);
  expect(recurrent_forward_grid, make(bf16, lstm, 3, 4, 4, 16, 1).p, true);
  on_device(132, 227);
}
#else
void check_refusals(Suite&) {}
#endif

}  // namespace

int main(int argc, char** argv) {
  Suite suite(argc, argv);
  check_block(suite);
  check_teams(suite);
  check_refusals(suite);
  return suite.finish();
}
