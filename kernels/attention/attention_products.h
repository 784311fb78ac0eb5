// The matrix products of tiled attention and the packing that feeds them. All operands are packed float:
// converted, padded to whole vectors, free of what no query sees. Shapes, with R <= ROWS rows of a register
// tile:
//
//   multiply_panels       z[R][keys]  = a[R][depth] x K^T        K as panels of PANEL keys, depth-major
//   accumulate            c[R][width] = f[R] c + a[R][n] x b[n][width]
//   accumulate_transposed c[R][width] += a[n][R]^T x b[n][width]
//
// A register tile is two vectors wide: 12 x 2 on AVX-512, 6 x 2 elsewhere. The narrow panel makes the
// staircase of a causal mask cost little, and an operand row feeds 12 rows, so it may stream from the
// second-level cache. The number of rows is rounded up to an even one (few instances to compile); the rows in
// excess lie in scratch.
#pragma once
#include "attention/attention.h"
#include "common/element_lanes.h"
#include "common/gemm.h"

namespace pyseqnet {
inline namespace PYSEQNET_ISA {

#define PYSEQNET_NOINLINE inline __attribute__((noinline))

constexpr int ROWS = mr<2>();
constexpr int PANEL = 2 * VL;

PYSEQNET_INLINE int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
PYSEQNET_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
PYSEQNET_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Calls f(Int<R>) with the smallest compiled R >= n.
template <class F>
PYSEQNET_INLINE void with_rounded_rows(int64_t n, F&& f) {
  if (n <= 1) return f(Int<1>{});
  if (n <= 2) return f(Int<2>{});
  if (n <= 4) return f(Int<4>{});
  if constexpr (ROWS > 6) {
    if (n <= 6) return f(Int<6>{});
    if (n <= 8) return f(Int<8>{});
    if (n <= 10) return f(Int<10>{});
  }
  f(Int<ROWS>{});
}

// z = a x K^T for `vectors` vectors of keys from vector `first` of the panels on; of a panel only the half that
// is asked for.
PYSEQNET_NOINLINE void multiply_panels(int64_t rows, int64_t depth, const float* a, int64_t lda,
                                       const float* panels, int64_t first, int64_t vectors, float* z,
                                       int64_t ldz) {
  with_rounded_rows(rows, [&](auto rr) PYSEQNET_LAMBDA {
    constexpr int R = decltype(rr)::value;
    const float* ar[R];
    for (int r = 0; r < R; ++r) ar[r] = a + r * lda;
    for (int64_t v = first; v < first + vectors; z += VL) {
      const float* panel = panels + v / 2 * depth * PANEL + v % 2 * VL;
      if (v % 2 == 0 && v + 2 <= first + vectors) {
        vf c[R][2];
        zero(c);
        mk_rows<R, 2>(depth, ar, panel, PANEL, c);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          store(z + r * ldz, c[r][0]);
          store(z + r * ldz + VL, c[r][1]);
        }
        v += 2, z += VL;
      } else {
        vf c[R][1];
        zero(c);
        mk_rows<R, 1>(depth, ar, panel, PANEL, c);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) store(z + r * ldz, c[r][0]);
        v += 1;
      }
    }
  });
}

// One column strip of an accumulating product: c = f c + tile, where `sum` adds the tile to zeros. Summing
// the tile by itself first keeps rounding small: a long sum would otherwise round every term to its own size.
template <int R, int NV, class Sum>
PYSEQNET_INLINE void update_strip(float* c, int64_t ldc, const float* factors, Sum&& sum) {
  vf acc[R][NV];
  zero(acc);
  sum(acc);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) {
      float* at = c + r * ldc + v * VL;
      store(at, factors ? load(at) * factors[r] + acc[r][v] : load(at) + acc[r][v]);
    }
}

// factors may be null (1).
PYSEQNET_NOINLINE void accumulate(int64_t rows, int64_t n, int64_t width, const float* a, int64_t lda,
                                  const float* b, float* c, const float* factors) {
  with_rounded_rows(rows, [&](auto rr) PYSEQNET_LAMBDA {
    constexpr int R = decltype(rr)::value;
    const float* ar[R];
    for (int r = 0; r < R; ++r) ar[r] = a + r * lda;
    int64_t d = 0;
    for (; d + 2 * VL <= width; d += 2 * VL)
      update_strip<R, 2>(c + d, width, factors,
                         [&](auto& acc) PYSEQNET_LAMBDA { mk_rows<R, 2>(n, ar, b + d, width, acc); });
    if (d < width)
      update_strip<R, 1>(c + d, width, factors,
                         [&](auto& acc) PYSEQNET_LAMBDA { mk_rows<R, 1>(n, ar, b + d, width, acc); });
  });
}

PYSEQNET_NOINLINE void accumulate_transposed(int64_t rows, int64_t n, int64_t width, const float* a,
                                             int64_t lda, const float* b, float* c) {
  with_rounded_rows(rows, [&](auto rr) PYSEQNET_LAMBDA {
    constexpr int R = decltype(rr)::value;
    int64_t d = 0;
    for (; d + 2 * VL <= width; d += 2 * VL)
      update_strip<R, 2>(c + d, width, nullptr,
                         [&](auto& acc) PYSEQNET_LAMBDA { mk_cols<R, 2>(n, a, lda, b + d, width, acc); });
    if (d < width)
      update_strip<R, 1>(c + d, width, nullptr,
                         [&](auto& acc) PYSEQNET_LAMBDA { mk_cols<R, 1>(n, a, lda, b + d, width, acc); });
  });
}

// ---- packing ----

// dst[n][round_up(width, VL)] = scale * src, rows `stride` elements apart; the padding is zero.
template <class T>
PYSEQNET_NOINLINE void pack_rows(const T* src, int64_t stride, int64_t n, int64_t width, float scale,
                                 float* dst) {
  const int64_t padded = round_up(width, VL);
  for (int64_t i = 0; i < n; ++i, src += stride, dst += padded) {
    int64_t d = 0;
    for (; d + VL <= width; d += VL) store(dst + d, load_lanes(src + d) * scale);
    if (d < width) store(dst + d, load_between(src + d, 0, width - d, vf{}) * scale);
  }
}

// panels[n / PANEL][width][PANEL] from packed or float rows `stride` apart; lanes beyond n are zero, but
// the second half of a panel that is wholly beyond stays as it is: nobody reads it.
PYSEQNET_NOINLINE void pack_panels(const float* rows, int64_t stride, int64_t n, int64_t width,
                                   float* panels) {
  for (int64_t j = 0; j < n; j += PANEL, panels += width * PANEL)
    for (int v = 0; v < 2; ++v) {
      const int64_t first = j + v * VL, left = n - first;
      if (left <= 0) break;
      for (int64_t d = 0; d < width; d += VL)
        transpose_block(rows + first * stride + d, stride, int(smaller(left, VL)),
                        int(smaller(width - d, VL)), panels + d * PANEL + v * VL, PANEL);
    }
}

PYSEQNET_INLINE bool all_finite(const float* row, int64_t padded) {
  vi odd = {};
  for (int64_t d = 0; d < padded; d += VL) {
    const vf x = load(row + d);
    odd |= (x - x != 0.0f);
  }
  int32_t any = 0;
  for (int l = 0; l < VL; ++l) any |= odd[l];
  return any == 0;
}

}  // namespace PYSEQNET_ISA
}  // namespace pyseqnet
