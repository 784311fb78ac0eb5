// The recurrent weights spread over as many blocks as it takes, which meet at a barrier in global memory:
// 16-bit layers of up to 2048 hidden units forward and 1536 backward (LSTM on 132 multiprocessors of an
// H200), from sm_80 on. The __global__ function is in recurrent_persistent.cuh, with what a block does.
//
// A team is launched only where all of its blocks run together: as a cooperative launch, and no more teams at
// a time than the device holds; others follow in a launch of their own. A team that the device cannot hold is
// refused.
//
// The exchange: each block writes its slice of the next sources, (sequences, width), to a buffer in the L2
// cache, and adds one to its team's counter, with release; a block goes on when the counter says that all
// have. Then it copies what it needs to shared memory, past its own L1 cache. There are two buffers in turn:
// who overwrites one has seen everybody finish the step that read it.
//
// Many blocks to a team means little of the weights in each, few means that the sequences can be split over
// more teams, each of whose blocks reads the sources of its own sequences only: the cheapest by a count of
// cycles (choose_team).
//
// Counted for an LSTM of H 1024 in bfloat16, B 64, one direction, on 132 multiprocessors: weights 8 MiB, in
// each of 32 blocks of 32 units 96 KiB in registers and 160 KiB in shared memory; four teams of 16 sequences.
//   exchange each block reads 32 KiB of h from L2 a step, 4 MiB in all
//   product  32 mma of each of 16 warps a tile of 8 sequences, two tiles: 2050 cycles of tensor cores each,
//            as long as shared memory takes to give the weights; sums of 4 warps meet in shared memory, 260
//   barrier  one atomic a block, then the line of the counter travels to 32 blocks; with the fence before it
//            and the first bytes of h after it 2500 cycles
// Predicted for an H200 before any measurement (none was made when this was written), at 1.75 GHz:
//   forward  7700 cycles, 4.4 us a step, 2.3 ms for T 512; for B 16, 64 blocks of 16 units: 2.2 us, 1.1 ms,
//            for B 128 7.4 us and 3.8 ms. T 1000 takes 2.2 ms at least: the floor of this tier is 2 us a step
//   backward sources four times as wide: 6.5 us a step and 3.3 ms for T 512 and B 64; 2.7 us for B 16
#include "recurrent/recurrent_exchanges.cuh"
#include "recurrent/recurrent_persistent_host.cuh"

namespace pyseqnet {
namespace {

struct GridTier {
  static Refusal plan(const RecurrentProblem& p, RecurrentPass pass, Team& team) {
    const DeviceLimits device = device_limits();
    if (choose_team(team, p, shape_of(p, pass), 1, device.multiprocessors, false, Sources::staged,
                    {.step = 2500, .byte = 1.0 / 64}, device, device.multiprocessors))
      return accepted;
    return "the multiprocessors do not hold the recurrent weights";
  }
  static int64_t exchange_bytes(const Team& team, const RecurrentProblem& p) {
    return p.D * team.teams * 2 * team.sequences * int64_t(team.blocks) * team.width * 2;
  }

  template <class T, class Task>
  static int launch(const Task& task, Team team, void* exchange, unsigned* counters, int64_t directions,
                    void* stream) {
    using Exchange = GridExchange<T>;
    const auto kernel = recurrent_persistent<Task, Exchange>;
    const int threads = team.warps() * 32;
    const int64_t held = blocks_at_once(kernel, threads, team.bytes) / team.blocks;
    if (held == 0) return launch_too_large;
    // Both directions side by side where they fit, else one after the other.
    const int64_t together = held >= directions ? directions : 1, teams = held / together;
    for (int64_t d = 0; d < directions; d += together)
      for (team.first_team = 0; team.first_team < team.teams; team.first_team += int(teams)) {
        const int64_t now = std::min<int64_t>(teams, team.teams - team.first_team);
        team.first_direction = int(d);
        const int error = pyseqnet::launch({.grid = dim3(unsigned(now * team.blocks), unsigned(together)),
                                            .block = dim3(unsigned(threads)),
                                            .dynamic_shared_bytes = team.bytes,
                                            .stream = stream,
                                            .cooperative = true},
                                           kernel, task, team,
                                           typename Exchange::Memory{static_cast<T*>(exchange), counters});
        if (error) return error;
      }
    return launch_ok;
  }
  static constexpr int launch_too_large = 720;  // = cudaErrorCooperativeLaunchTooLarge
};

using Forward = PersistentEntry<GridTier, RecurrentPass::forward>;
using Backward = PersistentEntry<GridTier, RecurrentPass::backward>;

}  // namespace

extern const RecurrentCudaKernel recurrent_forward_grid, recurrent_backward_grid;
const RecurrentCudaKernel recurrent_forward_grid = {
    "grid_sm80", 80, 0, Forward::refuses, Forward::workspace_bytes, Forward::launch};
const RecurrentCudaKernel recurrent_backward_grid = {
    "grid_sm80", 80, 0, Backward::refuses, Backward::workspace_bytes, Backward::launch};

}  // namespace pyseqnet
