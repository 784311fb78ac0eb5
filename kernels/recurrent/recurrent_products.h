// The products of the recurrent kernels. Factors are rows of words: a word is a float, or, where the
// processor multiplies bfloat16 (AVX-512-BF16), a pair of neighbours along the summed dimension: twice the
// products an instruction, and half the memory. 16-bit rows are then read where they lie, and what the
// kernels feed back (h, gradients of sums) is rounded to bfloat16 first, as torch does; sums stay float.
#pragma once
#include "common/gemm.h"
#include "recurrent/recurrent_lanes.h"

namespace pyseqnet {
inline namespace PYSEQNET_ISA {
namespace recurrent {

#if defined(__AVX512BF16__)
constexpr bool pairs = true;
using Factor = bfloat16;  // element of a row that a product reads
#else
constexpr bool pairs = false;
using Factor = float;
#endif
// So many rows in all, or fewer, are few: packing a weight would cost more than multiplying with it.
constexpr int64_t few_rows = 128;
typedef float word_u __attribute__((aligned(2), may_alias));  // a pair may begin at any element
constexpr int64_t words(int64_t elements) { return pairs ? (elements + 1) / 2 : elements; }
PYSEQNET_INLINE const float* as_words(const Factor* p) { return reinterpret_cast<const float*>(p); }

// Row of n elements as words: where it lies, or in `copy` (words(n) floats).
inline const float* word_row(DType dtype, const void* from, int64_t at, int64_t n, float* copy) {
  if constexpr (pairs) {
    const bfloat16* row = static_cast<const bfloat16*>(from) + at;
    if (n % 2 == 0 && reinterpret_cast<uintptr_t>(row) % sizeof(float) == 0)
      return as_words((const Factor*)row);
    bfloat16* to = reinterpret_cast<bfloat16*>(copy);
    memcpy(to, row, size_t(n) * sizeof(bfloat16));
    if (n % 2) to[n] = {};  // the last word's other half
    return copy;
  } else {
    return float_row(dtype, from, at, n, copy);
  }
}

// c += A * B over K words of depth: A by rows (mk_rows), or word (i, k) at a[i + k * a_stride] (mk_cols).
template <int R, int NV>
PYSEQNET_INLINE void tile_of_rows(int64_t K, const float* const* a, const float* b, int64_t b_stride,
                                  vf (&c)[R][NV]) {
#if defined(__AVX512BF16__)
  for (int64_t k = 0; k < K; ++k, b += b_stride) {
    __m512bh bv[NV];
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) bv[j] = (__m512bh)load(b + j * VL);
#pragma GCC unroll 32
    for (int i = 0; i < R; ++i) {
      const __m512bh av = (__m512bh)_mm512_set1_ps(*(const word_u*)(a[i] + k));
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) c[i][j] = (vf)_mm512_dpbf16_ps((__m512)c[i][j], av, bv[j]);
    }
  }
#else
  mk_rows<R, NV>(K, a, b, b_stride, c);
#endif
}
template <int R, int NV>
PYSEQNET_INLINE void tile_of_columns(int64_t K, const float* a, int64_t a_stride, const float* b,
                                     int64_t b_stride, vf (&c)[R][NV]) {
#if defined(__AVX512BF16__)
  for (int64_t k = 0; k < K; ++k, a += a_stride, b += b_stride) {
    __m512bh bv[NV];
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) bv[j] = (__m512bh)load(b + j * VL);
#pragma GCC unroll 32
    for (int i = 0; i < R; ++i) {
      const __m512bh av = (__m512bh)_mm512_set1_ps(a[i]);
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) c[i][j] = (vf)_mm512_dpbf16_ps((__m512)c[i][j], av, bv[j]);
    }
  }
#else
  mk_cols<R, NV>(K, a, a_stride, b, b_stride, c);
#endif
}

// Register tiles of `vectors` columns of vectors over M rows, which are split evenly among them.
template <int vectors, int MR, class Tile, class Epi>
PYSEQNET_INLINE void for_rows_of_tiles(int64_t M, const float* b, int64_t column, int64_t columns,
                                       Tile&& tile, Epi&& epi) {
  const int64_t blocks = (M + MR - 1) / MR;
  int64_t i0 = 0;
  for (int64_t k = 0; k < blocks; ++k) {
    const int rows = int((M - i0 + blocks - k - 1) / (blocks - k));
    with_rows<MR>(rows, [&](auto height) PYSEQNET_LAMBDA {
      constexpr int R = decltype(height)::value;
      vf c[R][vectors];
      zero(c);
      tile(Int<R>{}, i0, b, c);
      epi(Int<R>{}, Int<vectors>{}, i0, column, columns, c);
    });
    i0 += rows;
  }
}
// Walks all register tiles of an M x N product, panels of B (`panel_step` words apart) outside. With `narrows`
// the last panel's tiles have no more vectors than it needs: an epilogue must take any number of them.
template <int NV, bool narrows = false, class Tile, class Epi>
PYSEQNET_INLINE void for_tiles(int64_t M, int64_t N, const float* b, int64_t panel_step, Tile&& tile,
                               Epi&& epi) {
  constexpr int NR = NV * VL, MR = mr<NV>();
  for (int64_t j0 = 0; j0 < N; j0 += NR, b += panel_step) {
    const int64_t left = N - j0;
    if constexpr (narrows)
      if (left <= NR - VL) {
        with_rows<NV - 1>(int((left + VL - 1) / VL), [&](auto vectors) PYSEQNET_LAMBDA {
          for_rows_of_tiles<decltype(vectors)::value, MR>(M, b, j0, left, tile, epi);
        });
        return;
      }
    for_rows_of_tiles<NV, MR>(M, b, j0, left < NR ? left : NR, tile, epi);
  }
}
// epi(A * B): A by row pointers, row(i) -> K words; B packed in panels of NV vectors (or laid out as said).
template <int NV, bool narrows = false, class Row, class Epi>
PYSEQNET_INLINE void product_of_rows(int64_t M, int64_t N, int64_t K, Row&& row, const float* b,
                                     int64_t b_stride, int64_t panel_step, Epi&& epi) {
  for_tiles<NV, narrows>(
      M, N, b, panel_step,
      [&](auto height, int64_t i0, const float* panel, auto& c) PYSEQNET_LAMBDA {
        constexpr int R = decltype(height)::value;
        const float* a[R];
        for (int i = 0; i < R; ++i) a[i] = row(i0 + i);
        tile_of_rows(K, a, panel, b_stride, c);
      },
      epi);
}
template <int NV, class Row, class Epi>
PYSEQNET_INLINE void product_of_rows(int64_t M, int64_t N, int64_t K, Row&& row, const float* b, Epi&& epi) {
  product_of_rows<NV>(M, N, K, row, b, NV * VL, K * NV * VL, epi);
}
// epi(A^T * B): word (i, k) of A^T at a[i + k * a_stride].
template <int NV, class Epi>
PYSEQNET_INLINE void product_of_columns(int64_t M, int64_t N, int64_t K, const float* a, int64_t a_stride,
                                        const float* b, Epi&& epi) {
  for_tiles<NV, true>(
      M, N, b, K * NV * VL,
      [&](auto, int64_t i0, const float* panel, auto& c)
          PYSEQNET_LAMBDA { tile_of_columns(K, a + i0, a_stride, panel, NV * VL, c); },
      epi);
}

// ---- Packing. A panel is NV vectors wide, depth-major: panel[k][NV * VL] words. ----

// VL columns of a panel from rows of a matrix: to[k * ld + j] = word k of rows[j], j < n.
// `copy`: VL * words(K) floats. Depth goes in short stretches, which leave whole lines in the cache.
template <class Row>
void pack_columns(DType dtype, const void* matrix, int64_t K, int n, Row row, float* to, int64_t ld,
                  float* copy) {
  static const float nothing[1] = {};
  const float* sources[VL];
  for (int j = 0; j < VL; ++j)
    sources[j] = j < n ? word_row(dtype, matrix, row(j) * K, K, copy + j * words(K)) : nothing;
  transpose_strip(to, ld, sources, n, words(K));
}

template <class T>
PYSEQNET_INLINE vf load_up_to(const T* p, int64_t left) {
  return !p || left <= 0 ? vf{} : left >= VL ? load_lanes(p) : load_between(p, 0, left, vf{});
}
PYSEQNET_INLINE vh load_bits_up_to(const bfloat16* p, int64_t left) {
  if (!p || left <= 0) return vh{};
  return left >= VL ? *(const vh_u*)p : load_bits_between((const uint16_t*)p, 0, left);
}
// Lane l holds the pair (low[l], high[l]).
PYSEQNET_INLINE vf pair_lanes(vh low, vh high) {
  return (vf)(__builtin_convertvector(low, vw) | __builtin_convertvector(high, vw) << 16);
}

template <class T>
PYSEQNET_INLINE void pack_rows_of(const void* const* rows, int64_t K, int64_t column, int64_t N, float* to) {
  constexpr int NR = 4 * VL;
  for (int64_t k = 0; k < K; ++k) {
    const T* from = static_cast<const T*>(rows[k]);
    if (from) from += column;
    for (int64_t j0 = 0; j0 < N; j0 += NR)
      for (int v = 0; v < 4; ++v)
        store(to + j0 * K + k * NR + v * VL,
              load_up_to(from ? from + j0 + v * VL : nullptr, N - j0 - v * VL));
  }
}
PYSEQNET_INLINE void pack_pairs_of_rows(const void* const* rows, int64_t K, int64_t column, int64_t N,
                                        float* to) {
  constexpr int NR = 4 * VL;
  const int64_t depth = words(K);
  const auto row = [&](int64_t k) {
    const bfloat16* from = k < K ? static_cast<const bfloat16*>(rows[k]) : nullptr;
    return from ? from + column : nullptr;
  };
  for (int64_t k = 0; k < depth; ++k) {
    const bfloat16 *low = row(2 * k), *high = row(2 * k + 1);
    for (int64_t j0 = 0; j0 < N; j0 += NR)
      for (int v = 0; v < 4; ++v) {
        const int64_t j = j0 + v * VL;
        store(to + j0 * depth + k * NR + v * VL,
              pair_lanes(load_bits_up_to(low ? low + j : nullptr, N - j),
                         load_bits_up_to(high ? high + j : nullptr, N - j)));
      }
  }
}
// Panels of 4 vectors from K rows that lie anywhere (null: zeros): columns `column` .. column + N.
inline void pack_rows(DType dtype, const void* const* rows, int64_t K, int64_t column, int64_t N, float* to) {
  if constexpr (pairs) return pack_pairs_of_rows(rows, K, column, N, to);
  if (dtype == DType::f32)
    pack_rows_of<float>(rows, K, column, N, to);
  else if (dtype == DType::bf16)
    pack_rows_of<bfloat16>(rows, K, column, N, to);
  else
    pack_rows_of<float16>(rows, K, column, N, to);
}

// Epilogue: row i of the product goes to rows[i] (plus what is there already).
struct StoreRows {
  float* const* rows;
  bool add;
  template <int R, int NV>
  PYSEQNET_INLINE void operator()(Int<R>, Int<NV>, int64_t i, int64_t j, int64_t n, vf (&acc)[R][NV]) const {
#pragma GCC unroll 32
    for (int r = 0; r < R; ++r) {
      float* p = rows[i + r] + j;
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) {
        const int64_t left = n - v * VL;
        if (left <= 0) break;
        vf x = acc[r][v];
        if (add) x += load_n(p + v * VL, left < VL ? int(left) : VL);
        store_n(p + v * VL, x, left < VL ? int(left) : VL);
      }
    }
  }
};
// Where the panels of B lie: packed, or in a matrix of K rows whose N columns are a multiple of a panel.
enum class Panels { packed, in_place };
// rows[i] (+)= a[i] * B over K words. Out of line: one copy serves every product.
__attribute__((noinline)) inline void multiply_rows(int64_t M, int64_t N, int64_t K, const float* const* a,
                                                    const float* b, float* const* rows, bool add,
                                                    Panels panels = Panels::packed) {
  constexpr int64_t NR = 4 * VL;
  const int64_t stride = panels == Panels::packed ? NR : N, step = panels == Panels::packed ? K * NR : NR;
  product_of_rows<4, true>(M, N, K, [&](int64_t i) { return a[i]; }, b, stride, step, StoreRows{rows, add});
}

// A cell that is fused, with nothing that goes across cells but a projection.
inline bool is_plain(const RecurrentProblem& p) { return has_kernels_of_its_own(p.cell) && !p.has_options(); }
// What products of words cannot do.
inline Refusal refuses_products(const RecurrentProblem& p) {
  if (p.dtype == DType::f64) return "float64 runs on the reference";
  if (pairs && p.dtype != DType::bf16) return "multiplies bfloat16 only";
  if (pairs && p.cell == RecurrentCell::rnn_relu)
    return "a rounded state could change which units relu passes";
  if (pairs && p.P) return "a projection is left to the kernels that sum in float";
  if (pairs && !is_plain(p)) return "only the plain cells are multiplied in bfloat16";
  return accepted;
}

}  // namespace recurrent
}  // namespace PYSEQNET_ISA
}  // namespace pyseqnet
