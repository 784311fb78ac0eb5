// The register tiles of conv_tile.h for every shape, behind one table.
#include "common/gemm.h"
#include "conv/conv_tile.h"

namespace pyseqnet {
inline namespace PYSEQNET_ISA {
namespace conv {

template <int R, int NV>
void tile(const TileJob& t) {
  vf c[R][NV];
  if (t.start) {
#pragma GCC unroll 32
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) c[i][j] = load(t.start + i * t.start_stride + j * VL);
  } else if (t.row_start) {
#pragma GCC unroll 32
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) c[i][j] = set1(t.row_start[i]);
  } else {
    zero(c);
  }
  const float* b = t.b;
  for (int64_t r = 0; r < t.run_count; ++r) {
    const Run run = t.runs[r];
    const float* a[R];
#pragma GCC unroll 32
    for (int i = 0; i < R; ++i) a[i] = t.a[i] + run.offset;
    mk_rows<R, NV>(run.length, a, b, t.b_stride, c);
    b += run.length * t.b_stride;
  }
#pragma GCC unroll 32
  for (int i = 0; i < R; ++i) {
    float* p = t.c[i];
#pragma GCC unroll 8
    for (int j = 0; j < NV - 1; ++j) store(p + j * VL, c[i][j]);
    store_n(p + (NV - 1) * VL, c[i][NV - 1], t.last_lanes);
  }
}

using TileFunction = void (*)(const TileJob&);
struct TileTable {
  TileFunction f[TILE_VECTORS][TILE_ROWS] = {};
};
template <int NV, int R = tile_rows(NV)>
constexpr void fill(TileTable& t) {
  t.f[NV - 1][R - 1] = tile<R, NV>;
  if constexpr (R > 1) fill<NV, R - 1>(t);
}
constexpr TileTable make_table() {
  TileTable t;
  fill<1>(t);
  fill<2>(t);
  fill<3>(t);
  fill<4>(t);
  return t;
}
static constexpr TileTable table = make_table();

void run_tile(int rows, int vectors, const TileJob& job) { table.f[vectors - 1][rows - 1](job); }

}  // namespace conv
}  // namespace PYSEQNET_ISA
}  // namespace pyseqnet
