// The matrix products of tiled attention and the packing that feeds them. Factors are packed words, padded to
// whole vectors and free of what no query sees. A word is a float or, where the processor multiplies bfloat16
// (AVX-512-BF16), a pair of neighbours along the summed dimension: twice the products an instruction and half
// the memory. What a kernel feeds back there (weights, logit gradients) is rounded to bfloat16 first, as every
// attention in that dtype does; sums stay float. Shapes, with R <= ROWS rows of a register tile and depth, n
// counted in words:
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

#if defined(__AVX512BF16__)
typedef bfloat16 Factor;
#else
typedef float Factor;
#endif
constexpr int PAIR = sizeof(float) / sizeof(Factor);  // factors of a word
constexpr int ROWS = mr<2>();
constexpr int PANEL = 2 * VL;
static_assert(ROWS % PAIR == 0 && VL % PAIR == 0);

PYSEQNET_INLINE int64_t words_of(int64_t factors) { return (factors + PAIR - 1) / PAIR; }
PYSEQNET_INLINE int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
PYSEQNET_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
PYSEQNET_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
// Words of a packed row.
PYSEQNET_INLINE int64_t row_words(int64_t width) { return round_up(words_of(width), VL); }

// Calls f(T{}) for the element types that this copy multiplies.
template <class F>
PYSEQNET_INLINE void with_factor_element(DType dtype, F&& f) {
  if constexpr (PAIR == 1)
    with_element(dtype, f);
  else
    f(bfloat16{});
}
PYSEQNET_INLINE Refusal refuses_factors(DType dtype) {
  if (dtype == DType::f64) return "float64 is left to the reference";
  if (PAIR == 2 && dtype != DType::bf16) return "multiplies bfloat16 only";
  return accepted;
}
// The scale of the scores: on the queries, where packing can round the product to float only.
PYSEQNET_INLINE float query_scale(double scale) { return PAIR == 1 ? float(scale) : 1.0f; }
PYSEQNET_INLINE float score_scale(double scale) { return PAIR == 1 ? 1.0f : float(scale); }

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

// c += a * b, word by word.
PYSEQNET_INLINE vf multiply_add(vf a, vf b, vf c) {
#if defined(__AVX512BF16__)
  return (vf)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
#else
  return c + a * b;
#endif
}
// A word in every lane.
PYSEQNET_INLINE vf spread(const float* word) {
#if defined(__AVX512F__)
  return (vf)_mm512_set1_ps(*word);
#else
  return set1(*word);
#endif
}
// c += A * B over words of depth: word (i, k) of A is at(i, k). Two steps at a time: with one the loop's own
// instructions cost 5 percent.
template <int R, int NV, class At>
PYSEQNET_INLINE void multiply_tile(int64_t words, At&& at, const float* b, int64_t b_stride, vf (&c)[R][NV]) {
  const auto step = [&](int64_t k) PYSEQNET_LAMBDA {
    vf bv[NV];
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) bv[j] = load(b + j * VL);
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      const vf av = spread(at(i, k));
#pragma GCC unroll 2
      for (int j = 0; j < NV; ++j) c[i][j] = multiply_add(av, bv[j], c[i][j]);
    }
    b += b_stride;
  };
  int64_t k = 0;
  for (; k + 2 <= words; k += 2) step(k), step(k + 1);
  if (k < words) step(k);
}
template <int R, int NV>
PYSEQNET_INLINE void tile_of_rows(int64_t words, const float* const (&a)[R], const float* b, int64_t b_stride,
                                  vf (&c)[R][NV]) {
  multiply_tile(words, [&](int i, int64_t k) PYSEQNET_LAMBDA { return a[i] + k; }, b, b_stride, c);
}
template <int R, int NV>
PYSEQNET_INLINE void tile_of_columns(int64_t words, const float* a, int64_t a_stride, const float* b,
                                     int64_t b_stride, vf (&c)[R][NV]) {
  multiply_tile(
      words, [&](int i, int64_t k) PYSEQNET_LAMBDA { return a + k * a_stride + i; }, b, b_stride, c);
}

// z = scale * a x K^T for `vectors` vectors of keys from vector `first` of the panels on; of a panel only the
// half that is asked for. scale must be 1 where words are floats.
PYSEQNET_NOINLINE void multiply_panels(int64_t rows, int64_t depth, const float* a, int64_t lda,
                                       const float* panels, int64_t first, int64_t vectors, float* z,
                                       int64_t ldz, float scale = 1.0f) {
  const auto scaled = [&](vf sum) PYSEQNET_LAMBDA { return PAIR == 1 ? sum : sum * scale; };
  with_rounded_rows(rows, [&](auto rr) PYSEQNET_LAMBDA {
    constexpr int R = decltype(rr)::value;
    const float* ar[R];
    for (int r = 0; r < R; ++r) ar[r] = a + r * lda;
    for (int64_t v = first; v < first + vectors; z += VL) {
      const float* panel = panels + v / 2 * depth * PANEL + v % 2 * VL;
      if (v % 2 == 0 && v + 2 <= first + vectors) {
        vf c[R][2];
        zero(c);
        tile_of_rows<R, 2>(depth, ar, panel, PANEL, c);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          store(z + r * ldz, scaled(c[r][0]));
          store(z + r * ldz + VL, scaled(c[r][1]));
        }
        v += 2, z += VL;
      } else {
        vf c[R][1];
        zero(c);
        tile_of_rows<R, 1>(depth, ar, panel, PANEL, c);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) store(z + r * ldz, scaled(c[r][0]));
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
                         [&](auto& acc) PYSEQNET_LAMBDA { tile_of_rows<R, 2>(n, ar, b + d, width, acc); });
    if (d < width)
      update_strip<R, 1>(c + d, width, factors,
                         [&](auto& acc) PYSEQNET_LAMBDA { tile_of_rows<R, 1>(n, ar, b + d, width, acc); });
  });
}

PYSEQNET_NOINLINE void accumulate_transposed(int64_t rows, int64_t n, int64_t width, const float* a,
                                             int64_t lda, const float* b, float* c) {
  with_rounded_rows(rows, [&](auto rr) PYSEQNET_LAMBDA {
    constexpr int R = decltype(rr)::value;
    int64_t d = 0;
    for (; d + 2 * VL <= width; d += 2 * VL)
      update_strip<R, 2>(c + d, width, nullptr, [&](auto& acc) PYSEQNET_LAMBDA {
        tile_of_columns<R, 2>(n, a, lda, b + d, width, acc);
      });
    if (d < width)
      update_strip<R, 1>(c + d, width, nullptr, [&](auto& acc) PYSEQNET_LAMBDA {
        tile_of_columns<R, 1>(n, a, lda, b + d, width, acc);
      });
  });
}

// ---- packing ----

// dst[n][row_words(width)] = scale * src, rows `stride` elements apart; the padding is zero.
template <class T>
PYSEQNET_NOINLINE void pack_rows(const T* src, int64_t stride, int64_t n, int64_t width, float scale,
                                 float* dst) {
  const int64_t words = row_words(width);
  for (int64_t i = 0; i < n; ++i, src += stride, dst += words) {
    Factor* row = reinterpret_cast<Factor*>(dst);
    int64_t d = 0;
    for (; d + VL <= width; d += VL) store_lanes(row + d, load_lanes(src + d) * scale);
    if (d < width) store_lanes(row + d, load_between(src + d, 0, width - d, vf{}) * scale), d += VL;
    if (d < words * PAIR) store_lanes(row + d, vf{});
  }
}

// panels[n / PANEL][width][PANEL] from rows of `width` words, `stride` apart; lanes beyond n are zero, but
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

#if defined(__AVX512BF16__)
alignas(64) constexpr uint16_t interleaving[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                   21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                   11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
// Words of the lanes of two rows, the first row's in the lower half.
PYSEQNET_INLINE vf interleave_lanes(__m512i rows) {
  return (vf)_mm512_permutexvar_epi16(_mm512_load_si512(interleaving), rows);
}
#endif
// dst[words_of(n)][round_up(width, VL)] from packed rows, for sums over rows: a word holds a column's factors of
// PAIR rows, zero past the last. Where words are floats that is what the rows are.
PYSEQNET_NOINLINE void pair_rows(const float* rows, int64_t n, int64_t width, float* dst) {
#if defined(__AVX512BF16__)
  const int64_t words = row_words(width), padded = round_up(width, VL);
  for (int64_t r = 0; r < n; r += 2, rows += 2 * words, dst += padded) {
    const bfloat16 *even = reinterpret_cast<const bfloat16*>(rows),
                   *odd = reinterpret_cast<const bfloat16*>(rows + words);
    for (int64_t d = 0; d < padded; d += VL) {
      const __m256i low = _mm256_loadu_si256((const __m256i*)(even + d));
      const __m256i high = r + 1 < n ? _mm256_loadu_si256((const __m256i*)(odd + d)) : _mm256_setzero_si256();
      store(dst + d, interleave_lanes(_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1)));
    }
  }
#else
  memcpy(dst, rows, size_t(n * round_up(width, VL)) * sizeof(float));
#endif
}

// ---- a tile of floats becomes words ----

// Along columns: row r's words at words + r * ldw, which may be the row itself.
PYSEQNET_NOINLINE void round_rows(int64_t n, int64_t columns, const float* z, int64_t ldz, float* words,
                                  int64_t ldw) {
  for (int64_t r = 0; r < n; ++r, z += ldz, words += ldw) {
    int64_t c = 0;
#if defined(__AVX512BF16__)
    for (; c + 2 * VL <= columns; c += 2 * VL)
      store(words + c / 2, (vf)_mm512_cvtne2ps_pbh((__m512)load(z + c + VL), (__m512)load(z + c)));
#endif
    for (; c < columns; c += VL) store_lanes(reinterpret_cast<Factor*>(words) + c, load(z + c));
  }
}
// Along rows: the words of rows r, r + 1 take the place of row r.
PYSEQNET_NOINLINE void round_row_pairs([[maybe_unused]] int64_t n, [[maybe_unused]] int64_t columns,
                                       [[maybe_unused]] float* z, [[maybe_unused]] int64_t ldz) {
#if defined(__AVX512BF16__)
  for (int64_t r = 0; r < n; r += 2, z += 2 * ldz)
    for (int64_t c = 0; c < columns; c += VL) {
      const vf odd = r + 1 < n ? load(z + ldz + c) : vf{};
      store(z + c, interleave_lanes((__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)load(z + c))));
    }
#endif
}

// Of a packed row.
PYSEQNET_INLINE bool all_finite(const float* row, int64_t words) {
  vi odd = {};
  for (int64_t d = 0; d < words * PAIR; d += VL) {
    const vf x = load_lanes(reinterpret_cast<const Factor*>(row) + d);
    odd |= (x - x != 0.0f);
  }
  int32_t any = 0;
  for (int l = 0; l < VL; ++l) any |= odd[l];
  return any == 0;
}

}  // namespace PYSEQNET_ISA
}  // namespace pyseqnet
