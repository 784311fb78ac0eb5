// Portable SIMD layer for the CPU kernels.
//
// Every *_cpu.cpp is compiled once per instruction set, with -DPYSEQNET_ISA=<name> and the matching flags.
// All code lives in the inline namespace pyseqnet::PYSEQNET_ISA, so the copies never collide; a table in the
// family's room picks among them at run time. Nothing here needs a run-time branch on the instruction set.
//
// The vector type is a GCC/Clang vector extension: + - * < ?: work on it on every target; only the handful of
// operations with no portable spelling (max, round, scale by 2^n, reciprocal) have an intrinsic per
// instruction set.
//
// Standard-library templates are kept out of these sources: a weak symbol compiled with AVX-512 could be the
// copy that the linker keeps for the whole program. The build checks this.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/isa.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#ifndef PYSEQNET_ISA
#define PYSEQNET_ISA portable
#endif
#define PYSEQNET_STRING2(x) #x
#define PYSEQNET_STRING(x) PYSEQNET_STRING2(x)
#define PYSEQNET_ISA_NAME PYSEQNET_STRING(PYSEQNET_ISA)
#define PYSEQNET_INLINE inline __attribute__((always_inline))
#define PYSEQNET_LAMBDA __attribute__((always_inline))

namespace pyseqnet {
inline namespace PYSEQNET_ISA {

#if defined(__AVX512F__)
constexpr int VL = 16;
#elif defined(__AVX2__)
constexpr int VL = 8;
#else
constexpr int VL = 4;
#endif
constexpr Isa this_isa = Isa::PYSEQNET_ISA;

typedef float vf __attribute__((vector_size(VL * 4)));
typedef float vf_u __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(VL * 4)));

PYSEQNET_INLINE vf load(const float* p) { return *(const vf_u*)p; }
PYSEQNET_INLINE void store(float* p, vf v) { *(vf_u*)p = v; }
PYSEQNET_INLINE vf set1(float x) { return x - vf{}; }
PYSEQNET_INLINE vi iota() {
  vi v;
  for (int i = 0; i < VL; ++i) v[i] = i;
  return v;
}
// First n lanes (0 <= n <= VL); the other lanes read as zero / are left alone.
PYSEQNET_INLINE vf load_n(const float* p, int n) {
  if (n >= VL) return load(p);
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
#else
  float t[VL] = {};
  for (int i = 0; i < n; ++i) t[i] = p[i];
  return load(t);
#endif
}
PYSEQNET_INLINE void store_n(float* p, vf v, int n) {
  if (n >= VL) return store(p, v);
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
#else
  for (int i = 0; i < n; ++i) p[i] = v[i];
#endif
}
// Which lanes come from the second source: those from `first` on. Made once, outside the loop that merges.
#if defined(__AVX512F__)
typedef __mmask16 LanesFrom;
PYSEQNET_INLINE LanesFrom lanes_from(int first) { return (LanesFrom)(0xffffu << first); }
PYSEQNET_INLINE vf merge(vf v, LanesFrom lanes, const float* p) {
  return (vf)_mm512_mask_loadu_ps((__m512)v, lanes, p);
}
#else
typedef vi LanesFrom;
PYSEQNET_INLINE LanesFrom lanes_from(int first) { return iota() >= first; }
PYSEQNET_INLINE vf merge(vf v, LanesFrom lanes, const float* p) { return lanes ? load(p) : v; }
#endif
PYSEQNET_INLINE vf vmax(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
PYSEQNET_INLINE vf vmin(vf a, vf b) { return -vmax(-a, -b); }
PYSEQNET_INLINE float hsum(vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float s = 0;
  for (int i = 0; i < VL; ++i) s += v[i];
  return s;
#endif
}
PYSEQNET_INLINE float hmax(vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float s = v[0];
  for (int i = 1; i < VL; ++i) s = s > v[i] ? s : v[i];
  return s;
#endif
}
// 1/x for normal x (about 1 ulp on AVX-512, exact division elsewhere).
PYSEQNET_INLINE vf recip(vf x) {
#if defined(__AVX512F__)
  vf r = (vf)_mm512_rcp14_ps((__m512)x);
  return r + r * (1.0f - x * r);
#else
  return 1.0f / x;
#endif
}
// 2^x, relative error about 2e-7; x is clamped below at -126, so -inf and any large negative give (almost)
// zero.
PYSEQNET_INLINE vf exp2v(vf x) {
  x = vmax(x, set1(-126.0f));
#if defined(__AVX512F__)
  vf n = (vf)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const vf magic = set1(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  x = vmin(x, set1(127.0f));
  vf nm = x + magic;
  vf n = nm - magic;
#endif
  vf f = x - n;
  vf p = set1(0.00132647239f);  // weighted least squares for 2^f on [-1/2, 1/2]
  p = p * f + 0.00967151287f;
  p = p * f + 0.0555073375f;
  p = p * f + 0.240222421f;
  p = p * f + 0.693146978f;
  p = p * f + 1.0f;
#if defined(__AVX512F__)
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  return (vf)((vi)p + (((vi)nm - (vi)magic) << 23));
#endif
}
constexpr float LOG2E = 1.44269504088896341f, LN2 = 0.69314718055994531f;
PYSEQNET_INLINE vf expv(vf x) { return exp2v(x * LOG2E); }
// log2 of a normal positive x (about 1e-7 absolute near 1): exponent plus the Cephes logf polynomial.
PYSEQNET_INLINE vf log2v(vf x) {
  vi b = (vi)x, e = (b - 0x3f3504f3) >> 23;  // mantissa in [sqrt(1/2), sqrt(2))
  vf f = (vf)(b - (e << 23)) - 1.0f;
  vf p = set1(7.0376836292e-2f);
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  vf y = f * f * (p * f - 0.5f) + f;
  return y * LOG2E + __builtin_convertvector(e, vf);
}
PYSEQNET_INLINE vf gather(const float* p, vi i) {
#if defined(__AVX512F__)
  return (vf)_mm512_i32gather_ps((__m512i)i, p, 4);
#elif defined(__AVX2__)
  return (vf)_mm256_i32gather_ps(p, (__m256i)i, 4);
#else
  vf v;
  for (int k = 0; k < VL; ++k) v[k] = p[i[k]];
  return v;
#endif
}
PYSEQNET_INLINE vf sigmoid(vf x) { return recip(1.0f + exp2v(vmin(x * -LOG2E, set1(126.0f)))); }
// Odd rational approximation (degree 13/6), relatively accurate also near zero.
PYSEQNET_INLINE vf tanhv(vf x) {
  x = vmin(vmax(x, set1(-7.90531110763549805f)), set1(7.90531110763549805f));
  vf y = x * x;
  vf p = set1(-2.76076847742355e-16f);
  p = p * y + 2.00018790482477e-13f;
  p = p * y + -8.60467152213735e-11f;
  p = p * y + 5.12229709037114e-08f;
  p = p * y + 1.48572235717979e-05f;
  p = p * y + 6.37261928875436e-04f;
  p = p * y + 4.89352455891786e-03f;
  vf q = set1(1.19825839466702e-06f);
  q = q * y + 1.18534705686654e-04f;
  q = q * y + 2.26843463243900e-03f;
  q = q * y + 4.89352518554385e-03f;
  return x * p * recip(q);
}

// Flush denormals for the life of a kernel call: gradients that decay through time otherwise cost ~100 cycles
// each.
struct FlushDenormals {
#if defined(__x86_64__)
  unsigned saved = _mm_getcsr();
  FlushDenormals() { _mm_setcsr(saved | 0x8040); }  // FTZ | DAZ
  ~FlushDenormals() { _mm_setcsr(saved); }
#endif
};

template <int N>
struct Int {
  static constexpr int value = N;
};
// Calls f(Int<r>) for the run-time r in 1..RMAX: turns a remainder row count into a template argument.
template <int RMAX, class F>
PYSEQNET_INLINE void with_rows(int r, F&& f) {
  if constexpr (RMAX > 1)
    if (r < RMAX) return with_rows<RMAX - 1>(r, static_cast<F&&>(f));
  f(Int<RMAX>{});
}

}  // namespace PYSEQNET_ISA
}  // namespace pyseqnet
