// A persistent LSTM over T steps: each block of a cooperative grid owns some hidden units and keeps their
// weights in shared memory; h goes through global memory and a grid barrier a step.
#include "faults.h"

namespace pyseqnet::faults {

constexpr int threads = 128, units = 8;  // hidden units a block

struct LstmParams {
  const float *xg, *weight, *h0, *c0;  // xg (T, B, 4, H): the input's part of the gates
  float *hs, *c_last;
  unsigned* counter;
  int T, B, H, fault;
};

PYSEQNET_DEVICE float sigmoid(float x) { return 1.f / (1.f + __expf(-x)); }

__global__ void __launch_bounds__(threads) lstm(const LstmParams p) {
  PYSEQNET_DYNAMIC_SHARED(float, shared);
  const int u0 = blockIdx.x * units, tid = threadIdx.x, H = p.H, B = p.B;
  float *w = shared, *h = w + 4 * units * H, *gates = h + B * H, *c = gates + B * 4 * units;
  for (int i = tid; i < 4 * units * H; i += threads) {
    const int row = i / H, gate = row / units, u = row % units;
    w[i] = p.weight[(size_t(gate) * H + u0 + u) * H + i % H];
  }
  for (int i = tid; i < B * units; i += threads) c[i] = p.c0[(i / units) * H + u0 + i % units];
  for (int t = 0; t < p.T; t++) {
    const float* before = t ? p.hs + size_t(t - 1) * B * H : p.h0;
    for (int i = tid; i < B * H; i += threads) h[i] = ptx::ld_cg(before + i);
    __syncthreads();
    for (int i = tid; i < B * 4 * units; i += threads) {
      const int b = i / (4 * units), row = i % (4 * units), gate = row / units, u = row % units;
      float sum = p.xg[((size_t(t) * B + b) * 4 + gate) * H + u0 + u];
      for (int k = 0; k < H; k++) sum += w[row * H + k] * h[b * H + k];
      gates[i] = sum;
    }
    if (p.fault != 1) __syncthreads();
    for (int i = tid; i < B * units; i += threads) {
      const int b = i / units, u = i % units;
      const float* g = gates + b * 4 * units + u;
      c[i] = sigmoid(g[units]) * c[i] + sigmoid(g[0]) * tanhf(g[2 * units]);
      p.hs[(size_t(t) * B + b) * H + u0 + u] = sigmoid(g[3 * units]) * tanhf(c[i]);
    }
    if (p.fault == 2)
      __syncthreads();
    else if (p.fault == 3)
      ptx::grid_barrier(p.counter, gridDim.x, t + 2);
    else if (t + 1 < p.T)
      ptx::grid_barrier(p.counter, gridDim.x, t + 1);
  }
  for (int i = tid; i < B * units; i += threads) p.c_last[(i / units) * H + u0 + i % units] = c[i];
}

}  // namespace pyseqnet::faults

using namespace pyseqnet;
using namespace pyseqnet::faults;

int main() {
  Program program("lstm", {{1, "no barrier before the gates are combined", "RACE"},
                           {2, "no grid barrier between steps", "RACE"},
                           {3, "grid barrier waits for an epoch that never comes", "LIVELOCK"}});
  Random random(1);
  const int T = 3, B = 2, H = 32;
  const auto xg = normals<float>(T * B * 4 * H, random), w = normals<float>(4 * H * H, random, 0.1f);
  const auto h0 = normals<float>(B * H, random), c0 = normals<float>(B * H, random);
  const auto sigma = [](double x) { return 1 / (1 + std::exp(-x)); };
  std::vector<double> hs(T * B * H), c(c0.begin(), c0.end()), h(h0.begin(), h0.end());
  for (int t = 0; t < T; t++) {
    std::vector<double> next(h.size());
    for (int b = 0; b < B; b++)
      for (int u = 0; u < H; u++) {
        double g[4];
        for (int k = 0; k < 4; k++) {
          g[k] = xg[((t * B + b) * 4 + k) * H + u];
          for (int j = 0; j < H; j++) g[k] += double(w[(k * H + u) * H + j]) * h[b * H + j];
        }
        double& cell = c[b * H + u];
        cell = sigma(g[1]) * cell + sigma(g[0]) * std::tanh(g[2]);
        next[b * H + u] = hs[(t * B + b) * H + u] = sigma(g[3]) * std::tanh(cell);
      }
    h = next;
  }
  Buffer<float> dxg(xg, "xg"), dw(w, "weight"), dh0(h0, "h0"), dc0(c0, "c0"), dhs(hs.size(), "hs");
  Buffer<float> dc(c0.size(), "c_last");
  Buffer<unsigned> counter(1, "counter");
  const unsigned bytes = (4 * units * H + B * H + B * 4 * units + B * units) * sizeof(float);
  program.run(
      [&](int fault) {
        dhs.poison();
        counter.zero();
        const LstmParams p{dxg.device,     dw.device, dh0.device, dc0.device, dhs.device, dc.device,
                           counter.device, T,         B,          H,          fault};
        return launch({.grid = dim3(H / units),
                       .block = dim3(threads),
                       .dynamic_shared_bytes = bytes,
                       .cooperative = true},
                      lstm, p);
      },
      [&] { return close(dhs, hs, 1e-5, 1e-4) && close(dc, c, 1e-5, 1e-4); });
  return program.finish();
}
