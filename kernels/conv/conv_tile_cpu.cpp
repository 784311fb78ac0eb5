// ISA: +avx512bf16
//
// The register tiles of conv_tile.h for every shape, behind one table.
#include "common/gemm.h"
#include "conv/conv_tile.h"
#include "conv/conv_words.h"

namespace pyseqnet {
inline namespace PYSEQNET_ISA {
namespace conv {

// Float sums are cut into chunks: the error of one long sum would grow with the root of its length. At this
// length the additions to memory cost a few per cent and the sums are as accurate as the best libraries'.
constexpr int64_t CHUNK = 96;

// kept = c, or kept += c; c = 0
template <int R, int NV>
PYSEQNET_INLINE void keep(vf (&c)[R][NV], vf (&kept)[R][NV], bool add) {
#pragma GCC unroll 32
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) kept[i][j] = add ? kept[i][j] + c[i][j] : c[i][j];
  zero(c);
}

// c += a * b over n words of depth.
template <int R, int NV>
PYSEQNET_INLINE void multiply_add(int64_t n, const float* const* a, const float* b, int64_t b_stride,
                                  vf (&c)[R][NV]) {
#if defined(__AVX512BF16__)
  for (int64_t k = 0; k < n; ++k, b += b_stride) {
    __m512bh bv[NV];
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) bv[j] = (__m512bh)load(b + j * VL);
#pragma GCC unroll 32
    for (int i = 0; i < R; ++i) {
      const __m512bh av = (__m512bh)_mm512_set1_ps(a[i][k]);
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) c[i][j] = (vf)_mm512_dpbf16_ps((__m512)c[i][j], av, bv[j]);
    }
  }
#else
  mk_rows<R, NV>(n, a, b, b_stride, c);
#endif
}

template <int R, int NV, class Term>
PYSEQNET_INLINE void add(vf (&c)[R][NV], Term&& term) {
#pragma GCC unroll 32
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) c[i][j] += term(i, j);
}

template <int R, int NV>
void tile(const TileJob& t) {
  vf c[R][NV];
  zero(c);
  // The results go to memory that is seldom in the cache: fetching it now costs nothing, waiting for it does.
  const int64_t result_bytes = t.narrow ? VL * 2 : VL * 4;
#pragma GCC unroll 32
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) __builtin_prefetch((const char*)t.c[i] + j * result_bytes, 1);
  vf kept[R][NV];  // in memory: the sums of earlier chunks
  bool any_kept = false;
  int64_t summed = 0;
  const float* b = t.b;
  for (int64_t r = 0; r < t.run_count; ++r) {
    const Run run = t.runs[r];
    for (int64_t k = 0; k < run.length;) {
      if (summed >= CHUNK) {
        keep(c, kept, any_kept);
        any_kept = true;
        summed = 0;
      }
      const int64_t n = run.length - k < CHUNK ? run.length - k : CHUNK;
      const float* a[R];
#pragma GCC unroll 32
      for (int i = 0; i < R; ++i) a[i] = t.a[i] + run.offset + k;
      multiply_add<R, NV>(n, a, b, t.b_stride, c);
      b += n * t.b_stride;
      summed += n;
      k += n;
    }
  }
  if (any_kept) add<R, NV>(c, [&](int i, int j) PYSEQNET_LAMBDA { return kept[i][j]; });
  // What the sum goes on from comes last: added first, it would be as inaccurate as one long sum.
  if (t.start)
    add<R, NV>(c, [&](int i, int j) PYSEQNET_LAMBDA { return load(t.start + i * t.start_stride + j * VL); });
  else if (t.row_start)
    add<R, NV>(c, [&](int i, int) PYSEQNET_LAMBDA { return set1(t.row_start[i]); });
#if defined(__AVX512BF16__)
  if (t.narrow) {
#pragma GCC unroll 32
    for (int i = 0; i < R; ++i) {
      bfloat16* p = (bfloat16*)t.c[i];
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) store_result(p + j * VL, c[i][j], j < NV - 1 ? VL : t.last_lanes);
    }
    return;
  }
#endif
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
