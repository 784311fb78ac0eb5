// gemm.h -- packed single-thread sgemm building blocks with a fused epilogue.
//
// Layers, from the inside out:
//   mk_rows / mk_cols   register-tile micro-kernels: R rows x NV vectors of C stay in registers over the K
//   loop.
//                       AVX-512: 12x2 or 6x4 tiles (24 accumulators), AVX2: 6x2 or 3x4. A is read by
//                       broadcast, either row-major through R row pointers (mk_rows; no packing, rows may
//                       live anywhere) or K-major (mk_cols; packed A, or A^T given row-major). B is read as
//                       contiguous vectors.
//   pack_b_*            B -> panels of NV*VL columns, K-major, zero padded: b[panel][k][NV*VL].
//   gemm_prepacked      C = epi(A * B) for a B packed once and used many times (RNN steps, small M).
//   gemm                cache-blocked C (+)= A * B that packs both operands per block.
//
// The epilogue is any callable epi(Int<R>, Int<NV>, row, col, ncols, acc) taking the register tile; ncols is
// the number of valid columns. It sees the finished sum (gemm: in the last K block).
//
// Bound: FMA throughput. Per K step a 6x4 tile issues 24 FMA, 4 vector loads and 6 broadcasts, a 12x2 tile
// 24/2/12; both leave the load ports under 60 % busy, and B may stream from L2 (11 resp. 5 bytes per cycle).
#pragma once
#include "common/simd.h"

namespace pyseqnet {
inline namespace PYSEQNET_ISA {

// Rows per register tile for a tile NV vectors wide.
template <int NV>
constexpr int mr() {
  return (VL == 16 ? 24 : 12) / NV;
}

// c[R][NV] += A[R][K] * B[K][NV*VL];  a[i] -> row i (unit stride in k), b row stride bks.
template <int R, int NV>
PYSEQNET_INLINE void mk_rows(long K, const float* const* a, const float* b, long bks, vf (&c)[R][NV]) {
  const float* ap[R];
#pragma GCC unroll 32
  for (int i = 0; i < R; ++i) ap[i] = a[i];
  for (long k = 0; k < K; ++k, b += bks) {
    vf bv[NV];
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) bv[j] = load(b + j * VL);
#pragma GCC unroll 32
    for (int i = 0; i < R; ++i) {
      vf av = set1(ap[i][k]);
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) c[i][j] += av * bv[j];
    }
  }
}
// Same with A K-major: element (i, k) at a[i + k*aks].
template <int R, int NV>
PYSEQNET_INLINE void mk_cols(long K, const float* a, long aks, const float* b, long bks, vf (&c)[R][NV]) {
  for (long k = 0; k < K; ++k, a += aks, b += bks) {
    vf bv[NV];
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) bv[j] = load(b + j * VL);
#pragma GCC unroll 32
    for (int i = 0; i < R; ++i) {
      vf av = set1(a[i]);
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) c[i][j] += av * bv[j];
    }
  }
}
template <int R, int NV>
PYSEQNET_INLINE void zero(vf (&c)[R][NV]) {
#pragma GCC unroll 32
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) c[i][j] = vf{};
}

// Epilogue: C = acc + beta * C.
struct StoreC {
  float* c;
  long ldc;
  float beta;
  template <int R, int NV>
  PYSEQNET_INLINE void operator()(Int<R>, Int<NV>, long i, long j, long n, vf (&acc)[R][NV]) const {
#pragma GCC unroll 32
    for (int r = 0; r < R; ++r) {
      float* p = c + (i + r) * ldc + j;
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) {
        int left = (int)(n - v * VL);
        if (left <= 0) break;
        vf x = acc[r][v];
        if (beta != 0) x += beta * load_n(p + v * VL, left);
        store_n(p + v * VL, x, left);
      }
    }
  }
};

// Copies the transpose of a VL-column strip: dst[k*ld + j] = src[j][k], j < n (others 0), k < K.
PYSEQNET_INLINE void transpose_strip(float* dst, long ld, const float* const* src, int n, long K) {
  long k = 0;
#if defined(__AVX512F__)
  static const float zeros[16] = {};
  for (; k + 16 <= K; k += 16) {
    __m512 r[16], t[16];
#pragma GCC unroll 16
    for (int j = 0; j < 16; ++j) r[j] = _mm512_loadu_ps(j < n ? src[j] + k : zeros);
#pragma GCC unroll 8
    for (int j = 0; j < 16; j += 2) {
      t[j] = _mm512_unpacklo_ps(r[j], r[j + 1]);
      t[j + 1] = _mm512_unpackhi_ps(r[j], r[j + 1]);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 16; j += 4)
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        __m512d x = _mm512_castps_pd(t[j + h]), y = _mm512_castps_pd(t[j + 2 + h]);
        r[j + 2 * h] = _mm512_castpd_ps(_mm512_unpacklo_pd(x, y));
        r[j + 2 * h + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(x, y));
      }
    // r[4g + q] lane-block l holds column 4l + q of rows 4g..4g+3
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
      __m512 a = _mm512_shuffle_f32x4(r[q], r[4 + q], 0x88),
             b = _mm512_shuffle_f32x4(r[8 + q], r[12 + q], 0x88);
      __m512 c = _mm512_shuffle_f32x4(r[q], r[4 + q], 0xdd),
             d = _mm512_shuffle_f32x4(r[8 + q], r[12 + q], 0xdd);
      _mm512_storeu_ps(dst + (k + q) * ld, _mm512_shuffle_f32x4(a, b, 0x88));
      _mm512_storeu_ps(dst + (k + 4 + q) * ld, _mm512_shuffle_f32x4(c, d, 0x88));
      _mm512_storeu_ps(dst + (k + 8 + q) * ld, _mm512_shuffle_f32x4(a, b, 0xdd));
      _mm512_storeu_ps(dst + (k + 12 + q) * ld, _mm512_shuffle_f32x4(c, d, 0xdd));
    }
  }
#endif
  for (; k < K; ++k)
    for (int j = 0; j < VL; ++j) dst[k * ld + j] = j < n ? src[j][k] : 0.0f;
}

// B[k][j] = col(j)[k]: B given by columns (for x * W^T, col(j) is row j of W). col(j) may be null: zeros.
template <int NV, class Col>
void pack_b_cols(float* dst, long K, long N, Col&& col) {
  constexpr int NR = NV * VL;
  static const float zeros[1] = {};
  for (long j0 = 0; j0 < N; j0 += NR, dst += K * NR)
    for (int v = 0; v < NV; ++v) {
      const float* src[VL];
      int n = 0;
      bool holes = false;
      for (int j = 0; j < VL; ++j) {
        long jj = j0 + v * VL + j;
        src[j] = jj < N ? col(jj) : nullptr;
        if (src[j]) {
          holes |= n != j;
          n = j + 1;
        } else
          src[j] = zeros;
      }
      if (!holes)
        transpose_strip(dst + v * VL, NR, src, n, K);
      else
        for (long k = 0; k < K; ++k)
          for (int j = 0; j < VL; ++j) dst[k * NR + v * VL + j] = src[j] == zeros ? 0 : src[j][k];
    }
}
// B given by rows: row(k) -> N contiguous values, or null for a zero row.
template <int NV, class Row>
void pack_b_rows(float* dst, long K, long N, Row&& row) {
  constexpr int NR = NV * VL;
  for (long k = 0; k < K; ++k) {
    const float* s = row(k);
    for (long j0 = 0; j0 < N; j0 += NR) {
      float* d = dst + j0 * K + k * NR;
      for (int v = 0; v < NV; ++v) {
        int left = (int)(N - j0 - v * VL);
        store(d + v * VL, s && left > 0 ? load_n(s + j0 + v * VL, left) : vf{});
      }
    }
  }
}
constexpr long packed_size(long K, long N, int nr) { return K * ((N + nr - 1) / nr) * nr; }

// C = epi(A * B): A by row pointers (row(i) -> K contiguous values), B packed with NV. Rows are split evenly
// so that no tile is much shorter than the others (32 rows -> 6,6,5,5,5,5).
template <int NV, class Row, class Epi>
PYSEQNET_INLINE void gemm_prepacked(long M, long N, long K, Row&& row, const float* bp, Epi&& epi) {
  constexpr int NR = NV * VL, MR = mr<NV>();
  long nb = (M + MR - 1) / MR;
  for (long j0 = 0; j0 < N; j0 += NR, bp += K * NR) {
    long i0 = 0;
    for (long b = 0; b < nb; ++b) {
      int r = (int)((M - i0 + nb - b - 1) / (nb - b));
      with_rows<MR>(r, [&](auto rr) PYSEQNET_LAMBDA {
        constexpr int R = decltype(rr)::value;
        const float* a[R];
        for (int i = 0; i < R; ++i) a[i] = row(i0 + i);
        vf c[R][NV];
        zero(c);
        mk_rows<R, NV>(K, a, bp, NR, c);
        epi(Int<R>{}, Int<NV>{}, i0, j0, N - j0 < NR ? N - j0 : NR, c);
      });
      i0 += r;
    }
  }
}

// Strided matrix view: element (i, k) at p[i*rs + k*cs].
struct View {
  const float* p;
  long rs, cs;
};

// One K block of the blocked gemm: all row tiles against all panels of a packed B (kc x nc).
// A is read in place: row-major by row pointers, A^T (rs == 1) K-major.
template <int NV, class Epi>
PYSEQNET_INLINE void gemm_block(long M, long nc, long kc, View a, const float* bp, Epi&& epi) {
  constexpr int NR = NV * VL, MR = mr<NV>();
  long nb = (M + MR - 1) / MR;
  for (long j0 = 0; j0 < nc; j0 += NR, bp += kc * NR) {
    long i0 = 0, n = nc - j0 < NR ? nc - j0 : NR;
    for (long t = 0; t < nb; ++t) {
      int r = (int)((M - i0 + nb - t - 1) / (nb - t));
      with_rows<MR>(r, [&](auto rr) PYSEQNET_LAMBDA {
        constexpr int R = decltype(rr)::value;
        vf acc[R][NV];
        zero(acc);
        if (a.rs == 1)
          mk_cols<R, NV>(kc, a.p + i0, a.cs, bp, NR, acc);
        else {
          const float* ar[R];
          for (int i = 0; i < R; ++i) ar[i] = a.p + (i0 + i) * a.rs;
          mk_rows<R, NV>(kc, ar, bp, NR, acc);
        }
        epi(Int<R>{}, Int<NV>{}, i0, j0, n, acc);
      });
      i0 += r;
    }
  }
}

// C = epi(A * B + beta * C). Loop order: n-block, k-block, m-block, B panel, row tile. B comes from a packer
// pack(dst, k0, kc, n0, nc) (panels of 4 vectors), so its rows may be gathered from anywhere; a panel of KC x
// NR is swept by all row tiles of an m-block. StoreC carries the sum from one K block to the next. A is read
// in place, except A^T with long rows, which is copied block by block (one new page per k step otherwise).
template <class Pack, class Epi>
void gemm(long M, long N, long K, View a, Pack&& pack, float* c, long ldc, float beta, Epi&& epi) {
  constexpr int NV = 4, NR = NV * VL;
  constexpr long KC = 512, MC = 240, NC = 1024;
  const bool copy = a.rs == 1 && a.cs > 512 && N > 64;
  Buf bp(packed_size(K < KC ? K : KC, N < NC ? N : NC, NR)), ac(copy ? MC * (K < KC ? K : KC) : 0);
  for (long n0 = 0; n0 < N; n0 += NC) {
    long nc = N - n0 < NC ? N - n0 : NC;
    for (long k0 = 0; k0 < K; k0 += KC) {
      long kc = K - k0 < KC ? K - k0 : KC;
      pack((float*)bp, k0, kc, n0, nc);
      for (long m0 = 0; m0 < M; m0 += MC) {
        long mc = M - m0 < MC ? M - m0 : MC;
        View ab{a.p + m0 * a.rs + k0 * a.cs, a.rs, a.cs};
        if (copy) {
          for (long k = 0; k < kc; ++k) memcpy(ac + k * mc, ab.p + k * a.cs, mc * sizeof(float));
          ab = {ac, 1, mc};
        }
        StoreC part{c + m0 * ldc + n0, ldc, k0 ? 1.0f : beta};
        bool last = k0 + kc == K;
        gemm_block<NV>(mc, nc, kc, ab, bp,
                       [&](auto R, auto V, long i, long j, long n, auto& acc) PYSEQNET_LAMBDA {
                         part(R, V, i, j, n, acc);
                         if (last) epi(R, V, m0 + i, n0 + j, n, acc);
                       });
      }
    }
  }
}
template <class Epi>
void gemm(long M, long N, long K, View a, View b, float* c, long ldc, float beta, Epi&& epi) {
  auto pack = [&](float* dst, long k0, long kc, long n0, long nc) {
    if (b.cs == 1)
      pack_b_rows<4>(dst, kc, nc, [&](long k) { return b.p + (k0 + k) * b.rs + n0; });
    else
      pack_b_cols<4>(dst, kc, nc, [&](long j) { return b.p + (n0 + j) * b.cs + k0; });  // needs b.rs == 1
  };
  gemm(M, N, K, a, pack, c, ldc, beta, static_cast<Epi&&>(epi));
}
// ---- Small in-place products for tiled kernels: B is used where it lies, C is updated in memory. ----
constexpr int TILE = 4 * VL;  // columns of the widest register tile
constexpr int MR = mr<4>();   // and its rows

// Calls f(Int<NV>, column) so that the pieces cover D columns (D a multiple of VL).
template <class F>
PYSEQNET_INLINE void columns(long D, F&& f) {
  long d = 0;
  for (; d + 4 * VL <= D; d += 4 * VL) f(Int<4>{}, d);
  for (; d + 2 * VL <= D; d += 2 * VL) f(Int<2>{}, d);
  for (; d + VL <= D; d += VL) f(Int<1>{}, d);
}
// c[R][D] = fac[r] * c + A * B, A rows at a (stride lda), B [K][D] in place.
template <int R>
PYSEQNET_INLINE void rows_update(long K, long D, const float* a, long lda, const float* b, float* c,
                                 const float* fac) {
  const float* ar[R];
  for (int r = 0; r < R; ++r) ar[r] = a + r * lda;
  columns(D, [&](auto nv, long d) PYSEQNET_LAMBDA {
    constexpr int NV = decltype(nv)::value;
    vf acc[R][NV];
#pragma GCC unroll 32
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[r][v] = load(c + r * D + d + v * VL) * (fac ? fac[r] : 1.0f);
    mk_rows<R, NV>(K, ar, b + d, D, acc);
#pragma GCC unroll 32
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) store(c + r * D + d + v * VL, acc[r][v]);
  });
}
// c[M][D] += A^T * B: A [K][lda] read K-major (M columns of it), B [K][D] in place.
PYSEQNET_INLINE void cols_update(long M, long K, long D, const float* a, long lda, const float* b, float* c) {
  columns(D, [&](auto nv, long d) PYSEQNET_LAMBDA {
    constexpr int NV = decltype(nv)::value;
    long nb = (M + mr<NV>() - 1) / mr<NV>(), i0 = 0;
    for (long t = 0; t < nb; ++t) {
      int rows = (int)((M - i0 + nb - t - 1) / (nb - t));
      with_rows<mr<NV>()>(rows, [&](auto rr) PYSEQNET_LAMBDA {
        constexpr int R = decltype(rr)::value;
        float* p = c + i0 * D + d;
        vf acc[R][NV];
#pragma GCC unroll 32
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
          for (int v = 0; v < NV; ++v) acc[r][v] = load(p + r * D + v * VL);
        mk_cols<R, NV>(K, a + i0, lda, b + d, D, acc);
#pragma GCC unroll 32
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
          for (int v = 0; v < NV; ++v) store(p + r * D + v * VL, acc[r][v]);
      });
      i0 += rows;
    }
  });
}

struct NoEpi {
  template <class... T>
  PYSEQNET_INLINE void operator()(T&&...) const {}
};

}  // namespace PYSEQNET_ISA
}  // namespace pyseqnet
