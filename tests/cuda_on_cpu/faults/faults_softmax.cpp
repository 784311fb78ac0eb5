// Row softmax, one block a row: a reduction through warp shuffles and shared memory.
#include "faults.h"

namespace pyseqnet::faults {

constexpr int threads = 256, warps = threads / 32;

__global__ void __launch_bounds__(threads)
    softmax(const float* __restrict__ x, float* __restrict__ y, int cols, int fault) {
  PYSEQNET_SHARED(float, red, [warps]);
  PYSEQNET_SHARED(float, red2_own, [warps]);
  float* red2 = fault == 3 ? red : red2_own;
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const size_t row = blockIdx.x;
  x += row * cols;
  y += row * cols;
  float m = -INFINITY;
  for (int i = threadIdx.x; i < cols; i += threads) m = fmaxf(m, x[i]);
  for (int o = 16; o; o >>= 1) m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, o));
  if (lane == 0) red[warp] = m;
  if (fault != 1) __syncthreads();
  m = lane < warps || (fault == 2 && lane == warps) ? red[lane] : -INFINITY;
  for (int o = 16; o; o >>= 1) m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, o));

  float s = 0.f;
  for (int i = threadIdx.x; i < cols; i += threads) s += __expf(x[i] - m);
  for (int o = 16; o; o >>= 1) s += __shfl_xor_sync(0xffffffffu, s, o);
  if (lane == 0) red2[warp] = s;
  __syncthreads();
  s = lane < warps ? red2[lane] : 0.f;
  for (int o = 16; o; o >>= 1) s += __shfl_xor_sync(0xffffffffu, s, o);

  const int end = fault == 4 ? cols + 1 : cols;
  for (int i = threadIdx.x; i < end; i += threads) y[i] = __expf(x[i] - m) / s;
}

}  // namespace pyseqnet::faults

using namespace pyseqnet;
using namespace pyseqnet::faults;

int main() {
  Program program("softmax", {{1, "no barrier between write and read", "RACE"},
                              {2, "reads one slot past the last warp's", "OUT OF BOUNDS"},
                              {3, "buffer reused without a barrier", "RACE (write after read)"},
                              {4, "writes one element past the row", "OUT OF BOUNDS"}});
  Random random(1);
  for (const auto& [rows, cols] : {std::pair{5, 1000}, {3, 77}, {1, 2048}}) {
    device_memory::free_all();
    const auto x = normals<float>(rows * cols, random, 3);
    std::vector<double> want(x.size());
    for (int r = 0; r < rows; r++) {
      double m = -INFINITY, s = 0;
      for (int c = 0; c < cols; c++) m = std::fmax(m, x[r * cols + c]);
      for (int c = 0; c < cols; c++) s += std::exp(x[r * cols + c] - m);
      for (int c = 0; c < cols; c++) want[r * cols + c] = std::exp(x[r * cols + c] - m) / s;
    }
    Buffer<float> dx(x, "x"), dy(x.size(), "y");
    program.run(
        [&, rows = rows, cols = cols](int fault) {
          dy.poison();
          return launch({.grid = dim3(rows), .block = dim3(threads)}, softmax, dx.device, dy.device, cols,
                        fault);
        },
        [&] { return close(dy, want, 1e-7, 1e-5); });
  }
  return program.finish();
}
