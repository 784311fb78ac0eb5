// The recurrent weights spread over a cluster of 2 to 8 blocks, which write h into each other's shared
// memory: 16-bit layers of up to 512 hidden units forward and 384 backward (LSTM), from sm_90 on. See
// recurrent_persistent.cuh for what a block does.
//
// The exchange: each block has the sources of all units, two copies in turn. When its slice of the next ones
// is there, its threads copy it, 16 bytes each, into the same place of every other block (distributed shared
// memory), and the barrier of the cluster makes it visible. What only later calls read is written between
// arriving at the barrier and waiting for it. Clusters know nothing of each other: any number may wait.
//
// How many blocks and sequences: the cheapest by a count of cycles (choose_team).
//
// Counted for an LSTM of H 256 in bfloat16, B 64, 8 sequences a cluster: weights 512 KiB in 8 blocks of 32
// units, all in registers. A step: 8 mma of each of 16 warps, sums of four warps meet in shared memory; the
// exchange is 512 bytes of h to each of seven neighbours.
// Predicted for an H200 before any measurement (none was made when this was written), at 1.75 GHz:
//   barrier  of a cluster with a store before it 250 ns, 450 cycles
//   forward  1400 cycles and latencies of 400, 1.0 us a step; T 512, B 16 to 64 (2 to 8 clusters): 0.53 ms;
//            B 128 in clusters of 4 blocks 0.6 ms; T 1000 1.0 ms, the floor of this tier about 0.8
//   backward sources four times as wide: 1.2 us a step, 0.6 ms for T 512
//   H 512    forward, 8 blocks of 64 units: 160 KiB of weights in shared memory are read for every 8
//            sequences: 3050 cycles, 1.8 us a step, 0.9 ms for T 512. Backward, the sources of both parities
//            take 64 KiB, and the weights do not fit beside them: above H 384 the grid tier takes it
#include "recurrent/recurrent_exchanges.cuh"
#include "recurrent/recurrent_persistent_host.cuh"

namespace pyseqnet {
namespace {

struct ClusterTier {
  static Refusal plan(const RecurrentProblem& p, RecurrentPass pass, Team& team) {
    const DeviceLimits device = device_limits();
    constexpr int most_blocks = 8;  // more are not portable
    // Clusters do not cross the device's groups of multiprocessors: about one in eight of those is left over.
    if (choose_team(team, p, shape_of(p, pass), 2, most_blocks, true, Sources::doubled,
                    {.step = 450, .byte = 1.0 / 32}, device, int64_t(device.multiprocessors) * 7 / 8))
      return accepted;
    return "recurrent weights do not fit into a cluster of eight blocks";
  }
  static int64_t exchange_bytes(const Team&, const RecurrentProblem&) { return 0; }

  template <class T, class Task>
  static int launch(const Task& task, const Team& team, void*, unsigned*, int64_t directions, void* stream) {
    if (team.teams == 0) return launch_ok;
    using Exchange = ClusterExchange<T>;
    return pyseqnet::launch({.grid = dim3(unsigned(team.teams * team.blocks), unsigned(directions)),
                             .block = dim3(unsigned(team.warps()) * 32),
                             .dynamic_shared_bytes = team.bytes,
                             .stream = stream,
                             .cluster = dim3(unsigned(team.blocks))},
                            recurrent_persistent<Task, Exchange>, task, team, typename Exchange::Memory{});
  }
};

using Forward = PersistentEntry<ClusterTier, RecurrentPass::forward>;
using Backward = PersistentEntry<ClusterTier, RecurrentPass::backward>;

}  // namespace

extern const RecurrentCudaKernel recurrent_forward_cluster, recurrent_backward_cluster;
const RecurrentCudaKernel recurrent_forward_cluster = {
    "cluster_sm90", 90, 0, Forward::refuses, Forward::workspace_bytes, Forward::launch};
const RecurrentCudaKernel recurrent_backward_cluster = {
    "cluster_sm90", 90, 0, Backward::refuses, Backward::workspace_bytes, Backward::launch};

}  // namespace pyseqnet
