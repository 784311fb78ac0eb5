// 3x3 stride-2 pooling of one plane, a tile of 8 x 32 outputs staged through a two-dimensional shared array.
#include "faults.h"

namespace pyseqnet::faults {

constexpr int tile_y = 8, tile_x = 32;

__global__ void __launch_bounds__(tile_x* tile_y)
    max_pool(const float* __restrict__ x, float* __restrict__ y, int H, int W, int P, int Q, int fault) {
  constexpr int rows = 2 * tile_y + 1, columns = 2 * tile_x + 1;
  PYSEQNET_SHARED(float, tile, [rows][columns + 1]);
  const int p0 = blockIdx.y * tile_y, q0 = blockIdx.x * tile_x;
  for (int i = threadIdx.y * tile_x + threadIdx.x; i < rows * columns; i += tile_x * tile_y) {
    const int r = i / columns, c = i % columns, h = p0 * 2 - 1 + r, w = q0 * 2 - 1 + c;
    const bool before = h < 0 || w < 0;
    tile[r][c] = (!before || fault == 1) && h < H && w < W ? x[h * W + w] : -INFINITY;
  }
  if (fault != 2) __syncthreads();
  const int p = p0 + threadIdx.y, q = q0 + threadIdx.x;
  if (p >= P || q >= Q) return;
  float best = -INFINITY;
  for (int r = 0; r < 3; r++)
    for (int s = 0; s < 3; s++)
      best = fmaxf(best, tile[threadIdx.y * 2 + r + (fault == 3)][threadIdx.x * 2 + s]);
  y[p * Q + q] = best;
}

}  // namespace pyseqnet::faults

using namespace pyseqnet;
using namespace pyseqnet::faults;

int main() {
  Program program("max_pool", {{1, "the bounds test forgets the upper edge", "OUT OF BOUNDS"},
                               {2, "no barrier between staging and use", "RACE"},
                               {3, "row index runs past the tile", "UNDEFINED"}});
  Random random(1);
  for (const auto& [H, W] : {std::pair{40, 70}, {33, 17}}) {
    device_memory::free_all();
    const int P = (H - 1) / 2 + 1, Q = (W - 1) / 2 + 1;
    const auto x = normals<float>(H * W, random);
    std::vector<double> want(P * Q, -INFINITY);
    for (int p = 0; p < P; p++)
      for (int q = 0; q < Q; q++)
        for (int r = 0; r < 3; r++)
          for (int s = 0; s < 3; s++) {
            const int h = p * 2 - 1 + r, w = q * 2 - 1 + s;
            if (h >= 0 && h < H && w >= 0 && w < W)
              want[p * Q + q] = std::fmax(want[p * Q + q], x[h * W + w]);
          }
    Buffer<float> dx(x, "x"), dy(P * Q, "y");
    program.run(
        [&, H = H, W = W](int fault) {
          dy.poison();
          const dim3 grid((Q + tile_x - 1) / tile_x, (P + tile_y - 1) / tile_y);
          return launch({.grid = grid, .block = dim3(tile_x, tile_y)}, max_pool, dx.device, dy.device, H, W,
                        P, Q, fault);
        },
        [&] { return close(dy, want, 0, 0); });
  }
  return program.finish();
}
