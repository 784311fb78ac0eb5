// The vector vocabulary of the max-pooling kernels: lane masks, the running maximum of a vector of windows,
// splitting and merging of strided columns, and storage of taps.
#pragma once
#include "common/element_lanes.h"

namespace pyseqnet {
inline namespace PYSEQNET_ISA {

constexpr float minus_infinity = -__builtin_inff();

// A set of lanes: a mask register on AVX-512, all-ones lanes elsewhere.
#if defined(__AVX512F__)
typedef __mmask16 Lanes;
PYSEQNET_INLINE Lanes greater(vf a, vf b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ); }
PYSEQNET_INLINE Lanes either_nan(vf a, vf b) {
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_UNORD_Q);
}
PYSEQNET_INLINE vf pick(Lanes m, vf a, vf b) { return (vf)_mm512_mask_mov_ps((__m512)b, m, (__m512)a); }
PYSEQNET_INLINE vi pick(Lanes m, vi a, vi b) { return (vi)_mm512_mask_mov_epi32((__m512i)b, m, (__m512i)a); }
PYSEQNET_INLINE vf add_where(Lanes m, vf sum, vf v) {
  return (vf)_mm512_mask_add_ps((__m512)sum, m, (__m512)sum, (__m512)v);
}
PYSEQNET_INLINE bool any(Lanes m) { return m != 0; }
#else
typedef vi Lanes;
PYSEQNET_INLINE Lanes greater(vf a, vf b) { return a > b; }
#if defined(__AVX2__)
PYSEQNET_INLINE Lanes either_nan(vf a, vf b) { return (vi)_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_UNORD_Q); }
PYSEQNET_INLINE vf pick(Lanes m, vf a, vf b) { return (vf)_mm256_blendv_ps((__m256)b, (__m256)a, (__m256)m); }
PYSEQNET_INLINE vi pick(Lanes m, vi a, vi b) { return (vi)pick(m, (vf)a, (vf)b); }
PYSEQNET_INLINE bool any(Lanes m) { return _mm256_movemask_ps((__m256)m) != 0; }
#else
PYSEQNET_INLINE Lanes either_nan(vf a, vf b) { return (a != a) | (b != b); }
PYSEQNET_INLINE vf pick(Lanes m, vf a, vf b) { return m ? a : b; }
PYSEQNET_INLINE vi pick(Lanes m, vi a, vi b) { return m ? a : b; }
PYSEQNET_INLINE bool any(Lanes m) {
  int32_t all = 0;
  for (int i = 0; i < VL; ++i) all |= m[i];
  return all != 0;
}
#endif
PYSEQNET_INLINE vf add_where(Lanes m, vf sum, vf v) { return sum + (vf)((vi)v & m); }
#endif

PYSEQNET_INLINE vi set1_tap(int64_t tap) { return int32_t(tap) - vi{}; }

// Running maxima of VL windows and the taps that hold them. Offered in row-major order, the first of equal
// maxima stays. The quick form must not see a NaN; in the exact form the last NaN wins. (Once a NaN is held,
// no number compares greater.)
struct Best {
  vf value;
  vi tap;
  template <bool exact, bool with_arg>
  PYSEQNET_INLINE void consider(vf v, vi t) {
    Lanes take = greater(v, value);
    if (exact) take |= either_nan(v, v);
    value = exact ? pick(take, v, value) : vmax(v, value);
    if (with_arg) tap = pick(take, t, tap);
  }
};

// Compile-time lists of lane numbers, for shuffles written once for every vector length.
template <int... I>
struct LaneList {};
template <int n, int... I>
struct MakeLanes : MakeLanes<n - 1, n - 1, I...> {};
template <int... I>
struct MakeLanes<0, I...> {
  using type = LaneList<I...>;
};
using EveryLane = typename MakeLanes<VL>::type;

// Elements `first`, first + 2, first + 4 .. of the 2 VL elements that a and b hold.
template <int first, int... I>
PYSEQNET_INLINE vf every_second(vf a, vf b, LaneList<I...>) {
  return __builtin_shufflevector(a, b, (first + 2 * I)...);
}
PYSEQNET_INLINE vf even_of(vf a, vf b) { return every_second<0>(a, b, EveryLane{}); }
PYSEQNET_INLINE vf odd_of(vf a, vf b) { return every_second<1>(a, b, EveryLane{}); }
// The even elements of the 2 VL that begin with a; b begins one element early, at element VL - 1, so that no
// more than element 2 VL - 2 is read.
template <int... I>
PYSEQNET_INLINE vf even_short(vf a, vf b, LaneList<I...>) {
  return __builtin_shufflevector(a, b, (2 * I < VL ? 2 * I : 2 * I + 1)...);
}
// a0 b0 a1 b1 .., its first and second half.
template <int... I>
PYSEQNET_INLINE vf merge_low(vf a, vf b, LaneList<I...>) {
  return __builtin_shufflevector(a, b, (I / 2 + (I % 2) * VL)...);
}
template <int... I>
PYSEQNET_INLINE vf merge_high(vf a, vf b, LaneList<I...>) {
  return __builtin_shufflevector(a, b, (VL / 2 + I / 2 + (I % 2) * VL)...);
}

// v[k] holds elements k VL .. of n VL contiguous ones; afterwards v[f] holds elements f, f + n, f + 2n ..
template <int n, int f, int... I>
PYSEQNET_INLINE vf every_third(const vf* v, LaneList<I...>) {
  const vf front = __builtin_shufflevector(v[0], v[1], (f + 3 * I < 2 * VL ? f + 3 * I : 0)...);
  return __builtin_shufflevector(front, v[2], (f + 3 * I < 2 * VL ? I : f + 3 * I - VL)...);
}
#if defined(__AVX512F__) || defined(__AVX2__)
PYSEQNET_INLINE vf permute(vf v, vi lanes) {
#if defined(__AVX512F__)
  return (vf)_mm512_permutexvar_ps((__m512i)lanes, (__m512)v);
#else
  return (vf)_mm256_permutevar8x32_ps((__m256)v, (__m256i)lanes);
#endif
}
// Elements f, f + n, f + 2n .. by one permutation of each vector.
template <int n>
PYSEQNET_INLINE vf every_nth(const vf* v, int f) {
  const vi element = iota() * n + f, lane = element & (VL - 1), vector = element / VL;
  vf result = permute(v[0], lane);
#pragma GCC unroll 8
  for (int k = 1; k < n; k++) {
    const vi here = vector == k;
    result = here ? permute(v[k], lane) : result;
  }
  return result;
}
#endif
template <int n>
PYSEQNET_INLINE void split(vf (&v)[n]) {
  if constexpr (n == 2) {
    const vf e = even_of(v[0], v[1]), o = odd_of(v[0], v[1]);
    v[0] = e, v[1] = o;
  } else if constexpr (n == 3) {
    const vf a = every_third<3, 0>(v, EveryLane{}), b = every_third<3, 1>(v, EveryLane{}),
             c = every_third<3, 2>(v, EveryLane{});
    v[0] = a, v[1] = b, v[2] = c;
  } else if constexpr (n == 4) {
    const vf e0 = even_of(v[0], v[1]), o0 = odd_of(v[0], v[1]), e1 = even_of(v[2], v[3]),
             o1 = odd_of(v[2], v[3]);
    v[0] = even_of(e0, e1), v[1] = even_of(o0, o1), v[2] = odd_of(e0, e1), v[3] = odd_of(o0, o1);
  } else if constexpr (n > 4) {
    vf phase[n];
#pragma GCC unroll 8
    for (int f = 0; f < n; f++) phase[f] = every_nth<n>(v, f);
#pragma GCC unroll 8
    for (int f = 0; f < n; f++) v[f] = phase[f];
  }
}
// The inverse of split.
template <int k, int... I>
PYSEQNET_INLINE vf merge_third(const vf* v, LaneList<I...>) {
  const vf front = __builtin_shufflevector(
      v[0], v[1], ((k * VL + I) % 3 < 2 ? (k * VL + I) / 3 + (k * VL + I) % 3 * VL : 0)...);
  return __builtin_shufflevector(front, v[2], ((k * VL + I) % 3 < 2 ? I : (k * VL + I) / 3 + VL)...);
}
template <int n>
PYSEQNET_INLINE void merge(vf (&v)[n]) {
  if constexpr (n == 2) {
    const vf lo = merge_low(v[0], v[1], EveryLane{}), hi = merge_high(v[0], v[1], EveryLane{});
    v[0] = lo, v[1] = hi;
  } else if constexpr (n == 3) {
    const vf a = merge_third<0>(v, EveryLane{}), b = merge_third<1>(v, EveryLane{}),
             c = merge_third<2>(v, EveryLane{});
    v[0] = a, v[1] = b, v[2] = c;
  } else if constexpr (n == 4) {
    const vf e0 = merge_low(v[0], v[2], EveryLane{}), e1 = merge_high(v[0], v[2], EveryLane{}),
             o0 = merge_low(v[1], v[3], EveryLane{}), o1 = merge_high(v[1], v[3], EveryLane{});
    v[0] = merge_low(e0, o0, EveryLane{}), v[1] = merge_high(e0, o0, EveryLane{});
    v[2] = merge_low(e1, o1, EveryLane{}), v[3] = merge_high(e1, o1, EveryLane{});
  }
}

// Taps as bytes.
typedef uint8_t vb __attribute__((vector_size(VL)));
typedef uint8_t vb_u __attribute__((vector_size(VL), aligned(1), may_alias));
typedef int32_t vi_u __attribute__((vector_size(VL * 4), aligned(4), may_alias));

PYSEQNET_INLINE vb tap_bytes(vi taps) {
#if defined(__AVX512F__)
  return (vb)_mm512_cvtepi32_epi8((__m512i)taps);
#elif defined(__AVX2__)
  const __m256i bytes = _mm256_shuffle_epi8((__m256i)taps, _mm256_set1_epi32(0x0c080400));
  const __m128i low = _mm256_castsi256_si128(bytes), high = _mm256_extracti128_si256(bytes, 1);
  return (vb)_mm_cvtsi128_si64(_mm_unpacklo_epi32(low, high));
#else
  return __builtin_convertvector(taps, vb);
#endif
}
PYSEQNET_INLINE void store_taps(uint8_t* p, vi taps) { *(vb_u*)p = tap_bytes(taps); }
PYSEQNET_INLINE void store_taps(int32_t* p, vi taps) { *(vi_u*)p = taps; }
PYSEQNET_PARTIAL void store_taps_n(uint8_t* p, vi taps, int64_t n) {
  if (n >= VL) return store_taps(p, taps);
  const vb b = tap_bytes(taps);
#if defined(__AVX512F__)
  _mm_mask_storeu_epi8(p, (__mmask16)((1u << n) - 1), (__m128i)b);
#else
  for (int64_t l = 0; l < n; ++l) p[l] = b[l];
#endif
}
PYSEQNET_INLINE void store_taps_n(int32_t* p, vi taps, int64_t n) {
  if (n >= VL) return store_taps(p, taps);
  for (int64_t l = 0; l < n; ++l) p[l] = taps[l];
}

// Lanes whose tap is `tap`.
PYSEQNET_INLINE Lanes taps_equal(vb taps, int tap) {
#if defined(__AVX512F__)
  return _mm_cmpeq_epi8_mask((__m128i)taps, _mm_set1_epi8(char(tap)));
#elif defined(__AVX2__)
  // Compared as bytes: one instruction widens the result.
  const __m128i equal = _mm_cmpeq_epi8(_mm_cvtsi64_si128((long long)taps), _mm_set1_epi8(char(tap)));
  return (vi)_mm256_cvtepi8_epi32(equal);
#else
  return __builtin_convertvector(taps, vi) == tap;
#endif
}
PYSEQNET_INLINE vb load_taps(const uint8_t* p) { return *(const vb_u*)p; }
// Lanes lo <= l < hi hold p[l]; the others anything.
PYSEQNET_PARTIAL vb load_taps_between(const uint8_t* p, int64_t lo, int64_t hi) {
  lo = lo < 0 ? 0 : lo;
  hi = hi > VL ? VL : hi;
#if defined(__AVX512F__)
  return (vb)_mm_maskz_loadu_epi8(lo < hi ? (__mmask16)((1u << hi) - (1u << lo)) : (__mmask16)0, p);
#else
  vb b = {};
  for (int64_t l = lo; l < hi; ++l) b[l] = p[l];
  return b;
#endif
}

}  // namespace PYSEQNET_ISA
}  // namespace pyseqnet
