// Transposes of matrices through registers: VL x VL blocks of float lanes, log2(VL) shuffles a vector. The
// side that is a tensor may hold 16-bit elements.
//
// Kernels that put channels into lanes read planar images (NCHW) with transpose_block and write them back
// with transpose_block_exact. A block costs about as much as copying it four times, so it is worth keeping in
// the first-level cache and using more than once.
#pragma once
#include "common/element_lanes.h"

namespace pyseqnet {
inline namespace PYSEQNET_ISA {

// r[i][j] <-> r[j][i]
PYSEQNET_INLINE void transpose(vf (&r)[VL]) {
#if defined(__AVX512F__)
  __m512 a[16], b[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_ps((__m512)r[i], (__m512)r[i + 1]);
    a[i + 1] = _mm512_unpackhi_ps((__m512)r[i], (__m512)r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      const __m512d x = _mm512_castps_pd(a[i + h]), y = _mm512_castps_pd(a[i + 2 + h]);
      b[i + 2 * h] = _mm512_castpd_ps(_mm512_unpacklo_pd(x, y));
      b[i + 2 * h + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(x, y));
    }
  // Quarter l of b[4g + q] now holds column 4l + q of rows 4g .. 4g + 3.
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q) {
    const __m512 even01 = _mm512_shuffle_f32x4(b[q], b[4 + q], 0x88);
    const __m512 even23 = _mm512_shuffle_f32x4(b[8 + q], b[12 + q], 0x88);
    const __m512 odd01 = _mm512_shuffle_f32x4(b[q], b[4 + q], 0xdd);
    const __m512 odd23 = _mm512_shuffle_f32x4(b[8 + q], b[12 + q], 0xdd);
    r[q] = (vf)_mm512_shuffle_f32x4(even01, even23, 0x88);
    r[4 + q] = (vf)_mm512_shuffle_f32x4(odd01, odd23, 0x88);
    r[8 + q] = (vf)_mm512_shuffle_f32x4(even01, even23, 0xdd);
    r[12 + q] = (vf)_mm512_shuffle_f32x4(odd01, odd23, 0xdd);
  }
#elif defined(__AVX2__)
  __m256 a[8], b[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps((__m256)r[i], (__m256)r[i + 1]);
    a[i + 1] = _mm256_unpackhi_ps((__m256)r[i], (__m256)r[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4)
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      b[i + 2 * h] = _mm256_shuffle_ps(a[i + h], a[i + 2 + h], 0x44);
      b[i + 2 * h + 1] = _mm256_shuffle_ps(a[i + h], a[i + 2 + h], 0xee);
    }
  // Half l of b[4g + q] now holds column 4l + q of rows 4g .. 4g + 3.
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q) {
    r[q] = (vf)_mm256_permute2f128_ps(b[q], b[4 + q], 0x20);
    r[4 + q] = (vf)_mm256_permute2f128_ps(b[q], b[4 + q], 0x31);
  }
#else
  vf t[VL];
  for (int i = 0; i < VL; ++i)
    for (int j = 0; j < VL; ++j) t[i][j] = r[j][i];
  for (int i = 0; i < VL; ++i) r[i] = t[i];
#endif
}

// dst[c][r] = src[r][c] for r < rows <= VL, c < columns <= VL; each of the `columns` destination rows is
// written as a whole vector, zero beyond `rows`: for private layouts padded to VL lanes.
template <class T>
PYSEQNET_INLINE void transpose_block(const T* src, int64_t src_stride, int rows, int columns, float* dst,
                                     int64_t dst_stride) {
  vf r[VL];
  if (rows == VL && columns == VL) {
#pragma GCC unroll 16
    for (int i = 0; i < VL; ++i) r[i] = load_lanes(src + i * src_stride);
    transpose(r);
#pragma GCC unroll 16
    for (int i = 0; i < VL; ++i) store(dst + i * dst_stride, r[i]);
    return;
  }
#pragma GCC unroll 16
  for (int i = 0; i < VL; ++i) r[i] = i < rows ? load_lanes_n(src + i * src_stride, columns) : vf{};
  transpose(r);
#pragma GCC unroll 16
  for (int i = 0; i < VL; ++i)
    if (i < columns) store(dst + i * dst_stride, r[i]);
}

// dst[c][r] = src[r][c]; writes columns x rows elements and nothing else. Source rows are private: they are
// read as whole vectors.
template <class T>
PYSEQNET_INLINE void transpose_block_exact(const float* src, int64_t src_stride, int rows, int columns,
                                           T* dst, int64_t dst_stride) {
  vf r[VL];
  if (rows == VL && columns == VL) {
#pragma GCC unroll 16
    for (int i = 0; i < VL; ++i) r[i] = load(src + i * src_stride);
    transpose(r);
#pragma GCC unroll 16
    for (int i = 0; i < VL; ++i) store_lanes(dst + i * dst_stride, r[i]);
    return;
  }
#pragma GCC unroll 16
  for (int i = 0; i < VL; ++i) r[i] = i < rows ? load(src + i * src_stride) : vf{};
  transpose(r);
#pragma GCC unroll 16
  for (int i = 0; i < VL; ++i)
    if (i < columns) store_lanes_n(dst + i * dst_stride, r[i], rows);
}

}  // namespace PYSEQNET_ISA
}  // namespace pyseqnet
