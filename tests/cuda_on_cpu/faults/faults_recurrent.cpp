// The persistent recurrent kernel with faults planted into how the blocks of a team meet: an exchange that
// leaves out one barrier, or waits for the wrong one. The __global__ function is the header's own.
#include "faults.h"
#include "recurrent/recurrent_exchanges.cuh"
#include "recurrent/recurrent_persistent_host.cuh"

namespace pyseqnet::faults {

using T = __nv_bfloat16;
using Task = PersistentForward<T, LstmUnit>;

template <class Base>
struct Planted : Base {
  struct Memory {
    typename Base::Memory base;
    int fault;
  };
  int fault;
  PYSEQNET_DEVICE Planted(const Team& team, const Memory& m, unsigned char* shared)
      : Base(team, m.base, shared), fault(m.fault) {}
};

struct PlantedBlock : Planted<BlockExchange<T>> {
  using Planted::Planted;
  PYSEQNET_DEVICE void wait() const {
    if (fault != 1) Planted::wait();
  }
};

struct PlantedCluster : Planted<ClusterExchange<T>> {
  using Planted::Planted;
  PYSEQNET_DEVICE void begin() const {
    if (fault != 1)
      Planted::begin();
    else
      __syncthreads();
  }
  PYSEQNET_DEVICE void publish(int parity) const {
    if (fault != 2) __syncthreads();
    copy(parity);
    if (fault != 3) ptx::cluster_arrive();
  }
  PYSEQNET_DEVICE void wait() const {
    if (fault == 3)
      __syncthreads();
    else
      ptx::cluster_wait();
  }
};

struct PlantedGrid : Planted<GridExchange<T>> {
  using Planted::Planted;
  PYSEQNET_DEVICE void publish(int parity) const {
    if (fault != 1) __syncthreads();
    copy(parity);
    if (fault != 2) __syncthreads();
    arrive();
  }
  PYSEQNET_DEVICE void wait() {
    ++epoch;
    if (fault != 3) wait_for(fault == 4 ? epoch + 1 : fault == 5 ? epoch - 1 : epoch);
    __syncthreads();
  }
};

// A small LSTM, T 4, B 3; its team's blocks have 16 units or fewer.
constexpr int H = 27, steps = 4, sequences = 3;

template <class Exchange>
int check(const char* name, const std::vector<Fault>& list, int blocks, Sources in) {
  device_memory::free_all();
  Program program(name, list);
  Random random(3);
  const auto sums = normals<float>(steps * sequences * 4 * H, random);
  const auto w = normals<T>(4 * H * H, random, 0.2f), h0 = normals<T>(sequences * H, random);
  std::vector<double> y(steps * sequences * H), h(h0.size()), c(h0.size());
  for (size_t i = 0; i < h.size(); i++) h[i] = double(float(h0[i]));
  const auto sigma = [](double x) { return 1 / (1 + std::exp(-x)); };
  for (int t = 0; t < steps; t++) {
    std::vector<double> next(h.size());
    for (int b = 0; b < sequences; b++)
      for (int u = 0; u < H; u++) {
        double g[4];
        for (int k = 0; k < 4; k++) {
          g[k] = double(sums[((t * sequences + b) * 4 + k) * H + u]);
          for (int j = 0; j < H; j++) g[k] += double(float(w[(k * H + u) * H + j])) * h[b * H + j];
        }
        double& cell = c[b * H + u];
        cell = sigma(g[1]) * cell + sigma(g[0]) * std::tanh(g[2]);
        next[b * H + u] = y[(t * sequences + b) * H + u] = sigma(g[3]) * std::tanh(cell);
      }
    h = next;
  }
  Buffer<float> dsums(sums, "sums");
  Buffer<T> dw(w, "w_hh"), dh0(h0, "h0"), dy(y.size(), "y");

  Team team;
  RecurrentProblem p;
  p.dtype = DType::bf16, p.T = steps, p.B = sequences, p.H = H;
  plan_team(team, shape_of(p, RecurrentPass::forward), H, blocks, tile_sequences, in, {132, 232448, 90});
  Buffer<T> exchange(size_t(2 * team.sequences * team.blocks * team.width), "exchange");
  Buffer<unsigned> counter(1, "counter");
  Task task = {};
  task.sequences = {steps, sequences, steps * sequences, nullptr, nullptr};
  task.weights[0] = dw.device, task.H = H, task.h0 = dh0.device, task.from_input = dsums.device;
  task.y = dy.device, task.y_t = sequences * H, task.y_b = H;
  program.run(
      [&](int fault) {
        dy.poison();
        exchange.poison();
        counter.zero();
        typename Exchange::Memory memory = {};
        memory.fault = fault;
        if constexpr (Exchange::stages) memory.base = {exchange.device, counter.device};
        return launch({.grid = dim3(unsigned(team.blocks)),
                       .block = dim3(unsigned(team.warps()) * 32),
                       .dynamic_shared_bytes = team.bytes,
                       .cluster = dim3(Exchange::needs_sm90 ? unsigned(team.blocks) : 1u),
                       .cooperative = Exchange::stages},
                      recurrent_persistent<Task, Exchange>, task, team, memory);
      },
      [&] { return close(dy, y, 0.02, 0.02); });
  return program.finish();
}

}  // namespace pyseqnet::faults

using namespace pyseqnet;
using namespace pyseqnet::faults;

int main() {
  int failed =
      check<PlantedBlock>("recurrent, block", {{1, "no barrier between steps", "RACE"}}, 1, Sources::doubled);
  failed += check<PlantedCluster>("recurrent, cluster",
                                  {{1, "writes to a neighbour that may not have begun", "CLUSTER"},
                                   {2, "copies a slice that is not whole", "RACE"},
                                   {3, "no barrier of the cluster between steps", "RACE"}},
                                  2, Sources::doubled);
  failed += check<PlantedGrid>("recurrent, grid",
                               {{1, "copies a slice that is not whole", "RACE"},
                                {2, "arrives before all of the block have copied", "RACE"},
                                {3, "no grid barrier between steps", "RACE"},
                                {4, "waits for an epoch that never comes", "LIVELOCK"},
                                {5, "waits for the epoch before", "RACE"}},
                               2, Sources::staged);
  return failed != 0;
}
