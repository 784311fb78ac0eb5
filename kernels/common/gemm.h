// Building blocks of single-thread float matrix products with a fused epilogue. Scratch is the caller's.
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
#include "common/transpose.h"

namespace pyseqnet {
inline namespace PYSEQNET_ISA {

// Rows per register tile for a tile NV vectors wide.
template <int NV>
constexpr int mr() {
  return (VL == 16 ? 24 : 12) / NV;
}

// c[R][NV] += A[R][K] * B[K][NV*VL];  a[i] -> row i (unit stride in k), b row stride bks.
template <int R, int NV>
PYSEQNET_INLINE void mk_rows(int64_t K, const float* const* a, const float* b, int64_t bks, vf (&c)[R][NV]) {
  const float* ap[R];
#pragma GCC unroll 32
  for (int i = 0; i < R; ++i) ap[i] = a[i];
  for (int64_t k = 0; k < K; ++k, b += bks) {
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
PYSEQNET_INLINE void mk_cols(int64_t K, const float* a, int64_t aks, const float* b, int64_t bks,
                             vf (&c)[R][NV]) {
  for (int64_t k = 0; k < K; ++k, a += aks, b += bks) {
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
  int64_t ldc;
  float beta;
  template <int R, int NV>
  PYSEQNET_INLINE void operator()(Int<R>, Int<NV>, int64_t i, int64_t j, int64_t n, vf (&acc)[R][NV]) const {
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
PYSEQNET_INLINE void transpose_strip(float* dst, int64_t ld, const float* const* src, int n, int64_t K) {
  for (int64_t k = 0; k < K; k += VL) {
    const int left = K - k < VL ? int(K - k) : VL;
    vf r[VL];
#pragma GCC unroll 16
    for (int j = 0; j < VL; ++j) r[j] = j < n ? load_n(src[j] + k, left) : vf{};
    transpose(r);
#pragma GCC unroll 16
    for (int j = 0; j < VL; ++j)
      if (j < left) store(dst + (k + j) * ld, r[j]);
  }
}

// B[k][j] = col(j)[k]: B given by columns (for x * W^T, col(j) is row j of W). col(j) may be null: zeros.
template <int NV, class Col>
void pack_b_cols(float* dst, int64_t K, int64_t N, Col&& col) {
  constexpr int NR = NV * VL;
  static const float zeros[1] = {};
  for (int64_t j0 = 0; j0 < N; j0 += NR, dst += K * NR)
    for (int v = 0; v < NV; ++v) {
      const float* src[VL];
      int n = 0;
      bool holes = false;
      for (int j = 0; j < VL; ++j) {
        int64_t jj = j0 + v * VL + j;
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
        for (int64_t k = 0; k < K; ++k)
          for (int j = 0; j < VL; ++j) dst[k * NR + v * VL + j] = src[j] == zeros ? 0 : src[j][k];
    }
}
// B given by rows: row(k) -> N contiguous values, or null for a zero row.
template <int NV, class Row>
void pack_b_rows(float* dst, int64_t K, int64_t N, Row&& row) {
  constexpr int NR = NV * VL;
  for (int64_t k = 0; k < K; ++k) {
    const float* s = row(k);
    for (int64_t j0 = 0; j0 < N; j0 += NR) {
      float* d = dst + j0 * K + k * NR;
      for (int v = 0; v < NV; ++v) {
        int left = (int)(N - j0 - v * VL);
        store(d + v * VL, s && left > 0 ? load_n(s + j0 + v * VL, left) : vf{});
      }
    }
  }
}
constexpr int64_t packed_size(int64_t K, int64_t N, int nr) { return K * ((N + nr - 1) / nr) * nr; }

// C = epi(A * B): A by row pointers (row(i) -> K contiguous values), B packed with NV. Rows are split evenly
// so that no tile is much shorter than the others (32 rows -> 6,6,5,5,5,5).
template <int NV, class Row, class Epi>
PYSEQNET_INLINE void gemm_prepacked(int64_t M, int64_t N, int64_t K, Row&& row, const float* bp, Epi&& epi) {
  constexpr int NR = NV * VL, MR = mr<NV>();
  int64_t nb = (M + MR - 1) / MR;
  for (int64_t j0 = 0; j0 < N; j0 += NR, bp += K * NR) {
    int64_t i0 = 0;
    for (int64_t b = 0; b < nb; ++b) {
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
  int64_t rs, cs;
};

// One K block of the blocked gemm: all row tiles against all panels of a packed B (kc x nc).
// A is read in place: row-major by row pointers, A^T (rs == 1) K-major.
template <int NV, class Epi>
PYSEQNET_INLINE void gemm_block(int64_t M, int64_t nc, int64_t kc, View a, const float* bp, Epi&& epi) {
  constexpr int NR = NV * VL, MR = mr<NV>();
  int64_t nb = (M + MR - 1) / MR;
  for (int64_t j0 = 0; j0 < nc; j0 += NR, bp += kc * NR) {
    int64_t i0 = 0, n = nc - j0 < NR ? nc - j0 : NR;
    for (int64_t t = 0; t < nb; ++t) {
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

// Floats of scratch that gemm() needs: a packed block of B, and a block of A where A^T is copied.
struct GemmBlocks {
  static constexpr int64_t KC = 512, MC = 240,
                           NC = 1024;  // B block 2 MiB at most, A block in the second-level cache
  static constexpr int64_t LONG_ROWS = 512, NARROW = 64;
  static constexpr bool copies(int64_t N, View a) { return a.rs == 1 && a.cs > LONG_ROWS && N > NARROW; }
};
PYSEQNET_INLINE int64_t gemm_scratch(int64_t N, int64_t K, View a) {
  const int64_t kc = K < GemmBlocks::KC ? K : GemmBlocks::KC, nc = N < GemmBlocks::NC ? N : GemmBlocks::NC;
  return packed_size(kc, nc, 4 * VL) + (GemmBlocks::copies(N, a) ? GemmBlocks::MC * kc : 0);
}

// C = epi(A * B + beta * C). Loop order: n-block, k-block, m-block, B panel, row tile. B comes from a packer
// pack(dst, k0, kc, n0, nc) (panels of 4 vectors), so its rows may be gathered from anywhere; a panel of KC x
// NR is swept by all row tiles of an m-block. StoreC carries the sum from one K block to the next. A is read
// in place, except A^T with long rows, which is copied block by block (one new page per k step otherwise).
// `scratch` holds gemm_scratch(N, K, a) floats.
template <class Pack, class Epi>
void gemm(int64_t M, int64_t N, int64_t K, View a, Pack&& pack, float* c, int64_t ldc, float beta, Epi&& epi,
          float* scratch) {
  constexpr int NV = 4, NR = NV * VL;
  constexpr int64_t KC = GemmBlocks::KC, MC = GemmBlocks::MC, NC = GemmBlocks::NC;
  const bool copy = GemmBlocks::copies(N, a);
  float* bp = scratch;
  float* ac = scratch + packed_size(K < KC ? K : KC, N < NC ? N : NC, NR);
  for (int64_t n0 = 0; n0 < N; n0 += NC) {
    const int64_t nc = N - n0 < NC ? N - n0 : NC;
    for (int64_t k0 = 0; k0 < K; k0 += KC) {
      const int64_t kc = K - k0 < KC ? K - k0 : KC;
      pack(bp, k0, kc, n0, nc);
      for (int64_t m0 = 0; m0 < M; m0 += MC) {
        const int64_t mc = M - m0 < MC ? M - m0 : MC;
        View ab{a.p + m0 * a.rs + k0 * a.cs, a.rs, a.cs};
        if (copy) {
          for (int64_t k = 0; k < kc; ++k) memcpy(ac + k * mc, ab.p + k * a.cs, size_t(mc) * sizeof(float));
          ab = {ac, 1, mc};
        }
        const StoreC part{c + m0 * ldc + n0, ldc, k0 ? 1.0f : beta};
        const bool last = k0 + kc == K;
        gemm_block<NV>(mc, nc, kc, ab, bp,
                       [&](auto R, auto V, int64_t i, int64_t j, int64_t n, auto& acc) PYSEQNET_LAMBDA {
                         part(R, V, i, j, n, acc);
                         if (last) epi(R, V, m0 + i, n0 + j, n, acc);
                       });
      }
    }
  }
}
template <class Epi>
void gemm(int64_t M, int64_t N, int64_t K, View a, View b, float* c, int64_t ldc, float beta, Epi&& epi,
          float* scratch) {
  auto pack = [&](float* dst, int64_t k0, int64_t kc, int64_t n0, int64_t nc) {
    if (b.cs == 1)
      pack_b_rows<4>(dst, kc, nc, [&](int64_t k) { return b.p + (k0 + k) * b.rs + n0; });
    else
      pack_b_cols<4>(dst, kc, nc, [&](int64_t j) { return b.p + (n0 + j) * b.cs + k0; });  // needs b.rs == 1
  };
  gemm(M, N, K, a, pack, c, ldc, beta, static_cast<Epi&&>(epi), scratch);
}

// ---- Small in-place products for tiled kernels: B is used where it lies, C is updated in memory. ----
constexpr int TILE = 4 * VL;  // columns of the widest register tile
constexpr int MR = mr<4>();   // and its rows

// Calls f(Int<NV>, column) so that the pieces cover D columns (D a multiple of VL).
template <class F>
PYSEQNET_INLINE void columns(int64_t D, F&& f) {
  int64_t d = 0;
  for (; d + 4 * VL <= D; d += 4 * VL) f(Int<4>{}, d);
  for (; d + 2 * VL <= D; d += 2 * VL) f(Int<2>{}, d);
  for (; d + VL <= D; d += VL) f(Int<1>{}, d);
}
// c[R][D] = fac[r] * c + A * B, A rows at a (stride lda), B [K][D] in place.
template <int R>
PYSEQNET_INLINE void rows_update(int64_t K, int64_t D, const float* a, int64_t lda, const float* b, float* c,
                                 const float* fac) {
  const float* ar[R];
  for (int r = 0; r < R; ++r) ar[r] = a + r * lda;
  columns(D, [&](auto nv, int64_t d) PYSEQNET_LAMBDA {
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
PYSEQNET_INLINE void cols_update(int64_t M, int64_t K, int64_t D, const float* a, int64_t lda, const float* b,
                                 float* c) {
  columns(D, [&](auto nv, int64_t d) PYSEQNET_LAMBDA {
    constexpr int NV = decltype(nv)::value;
    int64_t nb = (M + mr<NV>() - 1) / mr<NV>(), i0 = 0;
    for (int64_t t = 0; t < nb; ++t) {
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
