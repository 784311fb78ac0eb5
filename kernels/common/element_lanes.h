// Lanes of float from and to the storage types f32, bf16 and f16, whole vectors and parts of them.
//
// Loading is exact. Storing rounds to nearest even, so a value that came from the storage type goes back
// unchanged. Partial forms touch the named elements only; where the instruction set has no masked access for
// a type they go through a small copy, which is slow: call them at edges.
#pragma once
#include "common/numerics.h"
#include "common/simd.h"

namespace pyseqnet {
inline namespace PYSEQNET_ISA {

typedef uint16_t vh __attribute__((vector_size(VL * 2)));  // one 16-bit element a lane
typedef uint16_t vh_u __attribute__((vector_size(VL * 2), aligned(2), may_alias));
typedef uint32_t vw __attribute__((vector_size(VL * 4)));

PYSEQNET_INLINE vf widen_bf16(vh b) { return (vf)(__builtin_convertvector(b, vw) << 16); }
PYSEQNET_INLINE vh round_bf16(vf x) {
#if defined(__AVX512BF16__)
  // The instruction takes subnormal numbers for zero: those lanes, which hardly ever occur, go the long way.
  constexpr int subnormal = 0x20;
  if (__builtin_expect(!_mm512_fpclass_ps_mask((__m512)x, subnormal), 1))
    return (vh)_mm512_cvtneps_pbh((__m512)x);
#endif
  const vw b = (vw)x;
  const vw rounded = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
  const vw quiet = (b >> 16) | 0x40;
  return __builtin_convertvector((vw)(x != x ? (vi)quiet : (vi)rounded), vh);
}
PYSEQNET_INLINE vf widen_f16(vh h) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps((__m256i)h);
#elif defined(__AVX2__)
  return (vf)_mm256_cvtph_ps((__m128i)h);
#else
  const vw w = __builtin_convertvector(h, vw), rest = w & 0x7fff;
  const vw finite = (vw)((vf)(rest << 13) * 0x1p112f);  // moves the exponent's bias from 15 to 127, exactly
  const vw special = (vw)(rest >= 0x7c00) & 0x7f800000;
  return (vf)(finite | special | (w & 0x8000) << 16);
#endif
}
PYSEQNET_INLINE vh round_f16(vf x) {
#if defined(__AVX512F__)
  return (vh)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  return (vh)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  vh h;
  for (int i = 0; i < VL; ++i) h[i] = float_to_f16_bits(x[i]);
  return h;
#endif
}

PYSEQNET_INLINE vf load_lanes(const float* p) { return load(p); }
PYSEQNET_INLINE vf load_lanes(const bfloat16* p) { return widen_bf16(*(const vh_u*)p); }
PYSEQNET_INLINE vf load_lanes(const float16* p) { return widen_f16(*(const vh_u*)p); }

PYSEQNET_INLINE void store_lanes(float* p, vf v) { store(p, v); }
PYSEQNET_INLINE void store_lanes(bfloat16* p, vf v) { *(vh_u*)p = round_bf16(v); }
PYSEQNET_INLINE void store_lanes(float16* p, vf v) { *(vh_u*)p = round_f16(v); }

// One element at a time where the instruction set has no masked access: kept out of line, for it is the edge
// of every loop.
#if defined(__AVX512F__)
#define PYSEQNET_PARTIAL PYSEQNET_INLINE
#define PYSEQNET_PARTIAL_FLOAT PYSEQNET_INLINE
#elif defined(__AVX2__)
#define PYSEQNET_PARTIAL inline __attribute__((noinline))
#define PYSEQNET_PARTIAL_FLOAT PYSEQNET_INLINE
#else
#define PYSEQNET_PARTIAL inline __attribute__((noinline))
#define PYSEQNET_PARTIAL_FLOAT inline __attribute__((noinline))
#endif

// Lanes lo <= l < hi (any integers) hold p[l], the others `fill`.
PYSEQNET_PARTIAL_FLOAT vf load_between(const float* p, int64_t lo, int64_t hi, vf fill) {
  lo = lo < 0 ? 0 : lo;
  hi = hi > VL ? VL : hi;
  if (lo >= hi) return fill;
#if defined(__AVX512F__)
  return (vf)_mm512_mask_loadu_ps((__m512)fill, (__mmask16)((1u << hi) - (1u << lo)), p);
#elif defined(__AVX2__)
  const vi lane = iota(), inside = (lane >= int32_t(lo)) & (lane < int32_t(hi));
  const vf v = (vf)_mm256_maskload_ps(p, (__m256i)inside);
  return inside ? v : fill;
#else
  for (int64_t l = lo; l < hi; ++l) fill[l] = p[l];
  return fill;
#endif
}
PYSEQNET_PARTIAL vh load_bits_between(const uint16_t* p, int64_t lo, int64_t hi) {
  lo = lo < 0 ? 0 : lo;
  hi = hi > VL ? VL : hi;
#if defined(__AVX512F__)
  const __mmask16 inside = lo < hi ? (__mmask16)((1u << hi) - (1u << lo)) : (__mmask16)0;
  return (vh)_mm256_maskz_loadu_epi16(inside, p);
#else
  vh h = {};
  for (int64_t l = lo; l < hi; ++l) h[l] = p[l];
  return h;
#endif
}
PYSEQNET_INLINE vf fill_outside(vf v, int64_t lo, int64_t hi, vf fill) {
  const vi lane = iota();
  const int32_t first = int32_t(lo < 0    ? 0
                                : lo > VL ? VL
                                          : lo),
                last = int32_t(hi < 0    ? 0
                               : hi > VL ? VL
                                         : hi);
  return (lane >= first) & (lane < last) ? v : fill;
}
PYSEQNET_INLINE vf load_between(const bfloat16* p, int64_t lo, int64_t hi, vf fill) {
  return fill_outside(widen_bf16(load_bits_between((const uint16_t*)p, lo, hi)), lo, hi, fill);
}
PYSEQNET_INLINE vf load_between(const float16* p, int64_t lo, int64_t hi, vf fill) {
  return fill_outside(widen_f16(load_bits_between((const uint16_t*)p, lo, hi)), lo, hi, fill);
}

// The first n lanes, n <= VL or more; the others read as zero.
PYSEQNET_INLINE vf load_lanes_n(const float* p, int64_t n) { return load_n(p, int(n)); }
template <class T>
PYSEQNET_INLINE vf load_lanes_n(const T* p, int64_t n) {
  return n >= VL ? load_lanes(p) : load_between(p, 0, n, vf{});
}

// The first n lanes, n <= VL or more.
PYSEQNET_INLINE void store_lanes_n(float* p, vf v, int64_t n) {
  if (n >= VL) return store(p, v);
#if defined(__AVX2__) && !defined(__AVX512F__)
  _mm256_maskstore_ps(p, (__m256i)(iota() < int32_t(n)), (__m256)v);
#else
  store_n(p, v, int(n));
#endif
}
PYSEQNET_PARTIAL void store_bits_n(uint16_t* p, vh h, int64_t n) {
#if defined(__AVX512F__)
  _mm256_mask_storeu_epi16(p, (__mmask16)((1u << n) - 1), (__m256i)h);
#else
  for (int64_t l = 0; l < n; ++l) p[l] = h[l];
#endif
}
PYSEQNET_INLINE void store_lanes_n(bfloat16* p, vf v, int64_t n) {
  n >= VL ? store_lanes(p, v) : store_bits_n((uint16_t*)p, round_bf16(v), n);
}
PYSEQNET_INLINE void store_lanes_n(float16* p, vf v, int64_t n) {
  n >= VL ? store_lanes(p, v) : store_bits_n((uint16_t*)p, round_f16(v), n);
}

// Calls f(T{}) for the element type; float64 has no lanes here.
template <class F>
PYSEQNET_INLINE void with_element(DType dtype, F&& f) {
  if (dtype == DType::f32) f(float{});
  if (dtype == DType::bf16) f(bfloat16{});
  if (dtype == DType::f16) f(float16{});
}

}  // namespace PYSEQNET_ISA
}  // namespace pyseqnet
