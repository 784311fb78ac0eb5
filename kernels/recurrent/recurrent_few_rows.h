// Products of few rows: packing a weight would cost more than multiplying with it once. Here both factors are
// read where they lie, along the summed dimension: lanes are summed, and VL sums are folded together at the
// end.
//
// Bound: reading the weights once, from whichever level holds them; with many rows FMA throughput, less about
// a tenth for folding.
#pragma once
#include "recurrent/recurrent_products.h"

namespace pyseqnet {
inline namespace PYSEQNET_ISA {
namespace recurrent {

// One term of a sum: rows of words times rows of a weight (as stored; words where the processor multiplies
// pairs).
template <class T>
struct Term {
  const float* const* a;
  const T* w;
  int64_t depth;
};

// Fused in every tile: whether the compiler contracts a product must not depend on a tile's height.
PYSEQNET_INLINE vf add_products(vf sum, vf a, vf w) {
#if defined(__AVX512BF16__)
  return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)w);
#elif defined(__AVX512F__)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)w, (__m512)sum);
#elif defined(__AVX2__)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)w, (__m256)sum);
#else
  return sum + a * w;
#endif
}
PYSEQNET_INLINE vf load_some(const float* p, int64_t n) { return load_n(p, int(n)); }
template <class T>
PYSEQNET_INLINE vf load_some(const T* p, int64_t n) {
  return load_between(p, 0, n, vf{});
}

// R rows times VL / R rows of the weights, of which `columns` exist: to[row][column] = sum of the terms, plus
// what is there already with `add`.
template <int R, class T>
__attribute__((noinline)) void dot_tile(const Term<T>* terms, int count, int64_t row, int64_t column,
                                        int columns, float* const* to, bool add) {
  constexpr int C = VL / R;
  vf sum[VL];
#pragma GCC unroll 16
  for (int i = 0; i < VL; ++i) sum[i] = vf{};
  for (int t = 0; t < count; ++t) {
    const int64_t depth = terms[t].depth;
    const float* a[R];
    const T* w[C];
    for (int r = 0; r < R; ++r) a[r] = terms[t].a[row + r];
    for (int c = 0; c < C; ++c) w[c] = terms[t].w + (column + (c < columns ? c : columns - 1)) * depth;
    int64_t k = 0;
    for (; k + VL <= depth; k += VL) {
      vf x[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) x[r] = load(a[r] + k);
#pragma GCC unroll 16
      for (int c = 0; c < C; ++c) {
        const vf weight = load_lanes(w[c] + k);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) sum[r * C + c] = add_products(sum[r * C + c], x[r], weight);
      }
    }
    if (k == depth) continue;
    const int64_t left = depth - k;
    vf x[R];
    for (int r = 0; r < R; ++r) x[r] = load_some(a[r] + k, left);
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) {
      const vf weight = load_some(w[c] + k, left);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sum[r * C + c] = add_products(sum[r * C + c], x[r], weight);
    }
  }
  transpose(sum);
  vf total = sum[0];
#pragma GCC unroll 16
  for (int i = 1; i < VL; ++i) total += sum[i];
  float totals[VL];
  store(totals, total);
  for (int r = 0; r < R; ++r) {
    float* p = to[row + r] + column;
    const vf x = load_n(totals + r * C, columns);
    store_n(p, add ? x + load_n(p, columns) : x, columns);
  }
}

// to[row][column] for all rows and columns of the terms.
template <class T>
void dot_rows(const Term<T>* terms, int count, int64_t rows, int64_t columns, float* const* to,
              bool add = false) {
  constexpr int most = VL, fewer = VL / 2;  // of one row alone, of two
  if (rows == 1) {
    for (int64_t j = 0; j < columns; j += most)
      dot_tile<1>(terms, count, 0, j, int(columns - j < most ? columns - j : most), to, add);
    return;
  }
  for (int64_t j = 0; j < columns; j += fewer) {
    const int n = int(columns - j < fewer ? columns - j : fewer);
    int64_t row = 0;
    for (; row + 2 <= rows; row += 2) dot_tile<2>(terms, count, row, j, n, to, add);
    if (row < rows) dot_tile<1>(terms, count, row, j, n, to, add);
  }
}

}  // namespace recurrent
}  // namespace PYSEQNET_ISA
}  // namespace pyseqnet
