// All recurrent weights inside one block: 16-bit layers of up to 128 hidden units (LSTM, GRU), 256 (Elman).
// The block runs 8 sequences of one direction through all their steps (recurrent_persistent.cuh); blocks know
// nothing of each other, so any number of them may wait for their turn.
//
// Why: a step of a small layer is shorter than any way to tell another block of it. Here it ends with one
// __syncthreads. What the step before leaves to all is h in shared memory, two copies in turn.
//
// Counted for an LSTM of H 128 in bfloat16, a block of 8 sequences:
//   resident 128 KiB of weights: 96 KiB in registers, 48 of each of 512 threads, 32 KiB in shared memory
//   a step     16 mma of each of 16 warps; shared memory gives 64 KiB of h and 32 KiB of weights;
//            16 KiB of the input's part come from memory, 2 KiB of y and, in training, 20 KiB of gates and
//            cells go there
//   exchange 2 KiB of h, in the block's own shared memory; one __syncthreads
// Predicted for an H200 before any measurement (none was made when this was written): 64 mma a scheduler at 8
// cycles, or 96 KiB of shared memory at 128 bytes a cycle, 770 cycles; the cell and its addresses 600 of
// issue, half of it beside the product; latencies of a barrier, a fragment and the exponentials 250: about
// 1400 cycles, 0.8 us. T 512, B 16 to 128 (2 to 16 blocks): 0.4 ms forward; backward (8 tiles of 16 rows
// twice as deep, sums of two warps meet in shared memory) 0.5 ms; the products over all steps less than a
// tenth of that. T 1000 takes 0.8 ms: the floor of this tier, whatever B up to 1056.
#include "recurrent/recurrent_exchanges.cuh"
#include "recurrent/recurrent_persistent_host.cuh"

namespace pyseqnet {
namespace {

struct BlockTier {
  static Refusal plan(const RecurrentProblem& p, RecurrentPass pass, Team& team) {
    const DeviceLimits device = device_limits();
    if (choose_team(team, p, shape_of(p, pass), 1, 1, true, Sources::doubled, {.step = 100, .byte = 0},
                    device, device.multiprocessors))
      return accepted;
    return "recurrent weights do not fit into a block";
  }
  static int64_t exchange_bytes(const Team&, const RecurrentProblem&) { return 0; }

  template <class T, class Task>
  static int launch(const Task& task, const Team& team, void*, unsigned*, int64_t directions, void* stream) {
    if (team.teams == 0) return launch_ok;
    using Exchange = BlockExchange<T>;
    return pyseqnet::launch({.grid = dim3(unsigned(team.teams), unsigned(directions)),
                             .block = dim3(unsigned(team.warps()) * 32),
                             .dynamic_shared_bytes = team.bytes,
                             .stream = stream},
                            recurrent_persistent<Task, Exchange>, task, team, typename Exchange::Memory{});
  }
};

using Forward = PersistentEntry<BlockTier, RecurrentPass::forward>;
using Backward = PersistentEntry<BlockTier, RecurrentPass::backward>;

}  // namespace

extern const RecurrentCudaKernel recurrent_forward_block, recurrent_backward_block;
const RecurrentCudaKernel recurrent_forward_block = {
    "block_sm80", 80, 0, Forward::refuses, Forward::workspace_bytes, Forward::launch};
const RecurrentCudaKernel recurrent_backward_block = {
    "block_sm80", 80, 0, Backward::refuses, Backward::workspace_bytes, Backward::launch};

}  // namespace pyseqnet
