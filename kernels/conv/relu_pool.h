// ReLU and max-pooling of lanes, and the bytes that remember which tap won: what every fused kernel shares.
#pragma once
#include "common/element_lanes.h"
#include "common/even_lanes.h"
#include "conv/conv_relu_pool.h"

namespace pyseqnet {
inline namespace PYSEQNET_ISA {
namespace relu_pool {

typedef uint8_t vbyte __attribute__((vector_size(VL)));

// The running maximum of a window. It begins at ReLU's 0 with no winner: what does not exceed it is closed.
struct Winner {
  vf best;
  vi tap;
  PYSEQNET_INLINE explicit Winner(int64_t closed) : best{}, tap(int32_t(closed) - vi{}) {}
  // The first of equal taps wins, and every NaN.
  PYSEQNET_INLINE void consider(vf v, int32_t number) {
    const vi take = (v > best) | (v != v);
    best = take ? v : best;
    tap = take ? number - vi{} : tap;
  }
};

PYSEQNET_INLINE vf relu(vf v) {
  const vi open = (v > vf{}) | (v != v);
  return open ? v : vf{};
}

// The first n lanes, n <= VL or more.
PYSEQNET_INLINE void store_taps(int32_t* to, vi taps, int64_t n) {
  for (int64_t l = 0; l < (n < VL ? n : VL); ++l) to[l] = taps[l];
}
PYSEQNET_INLINE void store_taps(uint8_t* to, vi taps, int64_t n) {
#if defined(__AVX512F__)
  const __mmask16 lanes = n >= VL ? (__mmask16)0xffff : (__mmask16)((1u << n) - 1);
  _mm512_mask_cvtepi32_storeu_epi8(to, lanes, (__m512i)taps);
#else
  const vbyte bytes = __builtin_convertvector(taps, vbyte);
  for (int64_t l = 0; l < (n < VL ? n : VL); ++l) to[l] = bytes[l];
#endif
}
PYSEQNET_INLINE vi load_taps(const int32_t* from, int64_t n) {
  vi taps = {};
  for (int64_t l = 0; l < (n < VL ? n : VL); ++l) taps[l] = from[l];
  return taps;
}
PYSEQNET_INLINE vi load_taps(const uint8_t* from, int64_t n) {
#if defined(__AVX512F__)
  const __mmask16 lanes = n >= VL ? (__mmask16)0xffff : (__mmask16)((1u << n) - 1);
  return (vi)_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(lanes, from));
#else
  vi taps = {};
  for (int64_t l = 0; l < (n < VL ? n : VL); ++l) taps[l] = from[l];
  return taps;
#endif
}

// The same with the taps as bytes, which move at a quarter of the cost.
#if defined(__AVX512F__)
typedef __m128i TapBytes;
PYSEQNET_INLINE TapBytes tap_bytes(int tap) { return _mm_set1_epi8(char(tap)); }
PYSEQNET_INLINE __mmask16 nan_lanes(vf v) { return _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q); }
struct ByteWinner {
  vf best = {};
  TapBytes tap;
  PYSEQNET_INLINE explicit ByteWinner(int64_t closed) : tap(tap_bytes(int(closed))) {}
  PYSEQNET_INLINE void take(__mmask16 lanes, vf v, int number) {
    best = (vf)_mm512_mask_mov_ps((__m512)best, lanes, (__m512)v);
    tap = _mm_mask_mov_epi8(tap, lanes, tap_bytes(number));
  }
  PYSEQNET_INLINE void consider(vf v, int32_t number) {
    take(_mm512_cmp_ps_mask((__m512)v, (__m512)best, _CMP_GT_OQ) | nan_lanes(v), v, number);
  }
  // Where no value is NaN.
  PYSEQNET_INLINE void consider_number(vf v, int32_t number) {
    take(_mm512_cmp_ps_mask((__m512)v, (__m512)best, _CMP_GT_OQ), v, number);
  }
};
PYSEQNET_INLINE void store_taps(uint8_t* to, TapBytes taps, int64_t n) {
  if (n >= VL)
    _mm_storeu_si128((__m128i*)to, taps);
  else
    _mm_mask_storeu_epi8(to, (__mmask16)((1u << n) - 1), taps);
}
template <class Tap>
struct WinnerOf {
  using type = Winner;
};
template <>
struct WinnerOf<uint8_t> {
  using type = ByteWinner;
};
// 16 x 16 bytes: z[i] holds rows 4i .. 4i + 3; becomes columns, to[c] = byte c of every row.
PYSEQNET_INLINE void transpose_bytes(const __m512i (&rows)[4], TapBytes (&to)[VL]) {
  const __m512i gather = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
  const __m512i within =
      _mm512_broadcast_i32x4(_mm_set_epi8(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0));
  __m512i z[4];  // dword k of quarter g: column 4g + k of four rows
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) z[i] = _mm512_shuffle_epi8(_mm512_permutexvar_epi32(gather, rows[i]), within);
  const __m512i low01 = _mm512_unpacklo_epi32(z[0], z[1]), high01 = _mm512_unpackhi_epi32(z[0], z[1]);
  const __m512i low23 = _mm512_unpacklo_epi32(z[2], z[3]), high23 = _mm512_unpackhi_epi32(z[2], z[3]);
  const __m512i turned[4] = {_mm512_unpacklo_epi64(low01, low23), _mm512_unpackhi_epi64(low01, low23),
                             _mm512_unpacklo_epi64(high01, high23),
                             _mm512_unpackhi_epi64(high01, high23)};  // quarter g: 4g + k
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    to[k] = _mm512_castsi512_si128(turned[k]);
    to[4 + k] = _mm512_extracti32x4_epi32(turned[k], 1);
    to[8 + k] = _mm512_extracti32x4_epi32(turned[k], 2);
    to[12 + k] = _mm512_extracti32x4_epi32(turned[k], 3);
  }
}
// to[i * stride + w] = from[w * VL + i] for w < count, i < columns; VL rows can be read.
PYSEQNET_INLINE void turn_tap_bytes(const uint8_t* from, int count, int columns, uint8_t* to,
                                    int64_t stride) {
  const __m512i rows[4] = {_mm512_loadu_si512(from), _mm512_loadu_si512(from + 64),
                           _mm512_loadu_si512(from + 128), _mm512_loadu_si512(from + 192)};
  TapBytes turned[VL];
  transpose_bytes(rows, turned);
#pragma GCC unroll 16
  for (int i = 0; i < VL; ++i)
    if (i < columns) store_taps(to + i * stride, turned[i], count);
}
// to[c] = byte c of rows from + r * stride, r < count, of which the first `columns` bytes exist; zero elsewhere.
PYSEQNET_INLINE void load_turned_taps(const uint8_t* from, int64_t stride, int count, int columns,
                                      TapBytes (&to)[VL]) {
  const __mmask16 exist = columns >= VL ? (__mmask16)0xffff : (__mmask16)((1u << columns) - 1);
  __m512i rows[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    TapBytes row[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r)
      row[r] =
          4 * i + r < count ? _mm_maskz_loadu_epi8(exist, from + (4 * i + r) * stride) : _mm_setzero_si128();
    rows[i] = _mm512_inserti32x4(_mm512_castsi128_si512(row[0]), row[1], 1);
    rows[i] = _mm512_inserti32x4(_mm512_inserti32x4(rows[i], row[2], 2), row[3], 3);
  }
  transpose_bytes(rows, to);
}
#else
template <class Tap>
struct WinnerOf {
  using type = Winner;
};
#endif

// Lane l is table[index[l]], 0 <= index < VL.
PYSEQNET_INLINE vi look_up(vi table, vi index) {
#if defined(__AVX512F__)
  return (vi)_mm512_permutexvar_epi32((__m512i)index, (__m512i)table);
#elif defined(__AVX2__)
  return (vi)_mm256_permutevar8x32_epi32((__m256i)table, (__m256i)index);
#else
  vi found;
  for (int l = 0; l < VL; ++l) found[l] = table[index[l]];
  return found;
#endif
}

// Lanes l < n hold p[l * step], the others zero; nothing beyond p[(n - 1) * step] is read.
template <class T>
PYSEQNET_INLINE vf load_every(const T* p, int64_t step, int64_t n) {
  if (step == 1) return load_lanes_n(p, n);
  if (n > VL) n = VL;
  if (step == 2) {
    const int64_t span = 2 * n - 1;
    const vf low = load_between(p, 0, span, vf{}), high = load_between(p + VL, 0, span - VL, vf{});
    return even_lanes(low, high);
  }
  vf v = {};
  for (int64_t l = 0; l < n; ++l) v[l] = to_float(p[l * step]);
  return v;
}

// A value as the separate layers would have stored it.
PYSEQNET_INLINE vf as_stored(vf v, float) { return v; }
PYSEQNET_INLINE vf as_stored(vf v, bfloat16) { return widen_bf16(round_bf16(v)); }
PYSEQNET_INLINE vf as_stored(vf v, float16) { return widen_f16(round_f16(v)); }

// The windows [first, last] of one dimension that cover a pixel; none where last < first.
struct Covering {
  int64_t first, last;
};
PYSEQNET_INLINE Covering covering(int64_t pixel, int64_t window, int64_t stride, int64_t windows) {
  const int64_t first = pixel < window ? 0 : (pixel - window) / stride + 1, last = pixel / stride;
  return {first, last < windows ? last : windows - 1};
}

// Calls f(element, tap) with pointers' types: float, bfloat16 or float16, and uint8_t or int32_t.
template <class F>
PYSEQNET_INLINE void with_types(const ConvReluPoolProblem& p, F&& f) {
  with_element(p.conv.dtype, [&](auto element) PYSEQNET_LAMBDA {
    if (p.wide_arg())
      f(element, int32_t{});
    else
      f(element, uint8_t{});
  });
}

}  // namespace relu_pool
}  // namespace PYSEQNET_ISA
}  // namespace pyseqnet
