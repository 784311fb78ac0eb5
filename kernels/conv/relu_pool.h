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
