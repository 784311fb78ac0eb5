// A FlashAttention-2 style forward, bfloat16, head dimension 64: mma.sync, ldmatrix and cp.async with two
// buffers. Covers the sm_80 half of ptx.cuh.
#include "faults.h"

namespace pyseqnet::faults {

using bf16 = __nv_bfloat16;
constexpr int Br = 64, Bc = 64, D = 64, threads = 128;
constexpr unsigned row_bytes = D * sizeof(bf16), tile_bytes = Bc * row_bytes;
constexpr unsigned shared_bytes = 5 * tile_bytes;  // Q, two K, two V

struct AttentionParams {
  const bf16 *q, *k, *v;  // (B * H, N, 64)
  bf16* out;
  float* lse;
  const int* key_lengths;  // may be null
  int heads, queries, keys;
  float scale;
  bool causal;
  int fault;
};

// Offset of the 16-byte chunk c of row r; chunks are exchanged by row, so that ldmatrix meets no bank
// conflict.
PYSEQNET_DEVICE uint32_t chunk(int r, int c) { return uint32_t(r * row_bytes + ((c ^ (r & 7)) << 4)); }

PYSEQNET_DEVICE void load_tile(uint32_t to, const bf16* from, int row0, int rows, int fault) {
  for (int i = threadIdx.x; i < Bc * 8; i += threads) {
    const int r = i >> 3, c = i & 7;
    const bool inside = row0 + r < rows;
    const bf16* source = from + size_t(row0 + r) * D + c * 8;
    if (fault == 6)
      ptx::cp_async_16(to + chunk(r, c), source);
    else
      ptx::cp_async_16(to + chunk(r, c), inside ? source : from, inside);
  }
}

// One key block: s = Q K^T, masked.
PYSEQNET_DEVICE void scores(float (&s)[8][4], const uint32_t (&qf)[4][4], uint32_t k_tile, int row, int key0,
                            int q0, int keys, bool causal, int fault) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int n = 0; n < 8; n++) s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0.f;
#pragma unroll
  for (int kk = 0; kk < 4; kk++)
#pragma unroll
    for (int n = 0; n < 4; n++) {
      uint32_t kf[4];
      ptx::ldmatrix_x4(kf,
                       k_tile + chunk(n * 16 + (lane & 7) + ((lane >> 4) << 3), kk * 2 + ((lane >> 3) & 1)));
      const uint32_t b0[2] = {kf[0], kf[1]};
      const uint32_t b1[2] = {fault == 3 ? kf[0] : kf[2], fault == 3 ? kf[1] : kf[3]};
      ptx::mma_m16n8k16_bf16(s[n * 2], qf[kk], b0, s[n * 2]);
      ptx::mma_m16n8k16_bf16(s[n * 2 + 1], qf[kk], b1, s[n * 2 + 1]);
    }
  if (key0 + Bc <= keys && !(causal && key0 + Bc > q0)) return;
#pragma unroll
  for (int n = 0; n < 8; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const int key = key0 + (lane & 3) * 2 + n * 8 + (e & 1), r = fault == 4 ? row : row + (e >> 1) * 8;
      if (key >= keys || (causal && key > r)) s[n][e] = -INFINITY;
    }
}

__global__ void __launch_bounds__(threads) attention(const AttentionParams p) {
  PYSEQNET_DYNAMIC_SHARED(unsigned char, shared);
  const uint32_t q_tile = ptx::smem_u32(shared), k_tiles = q_tile + tile_bytes,
                 v_tiles = k_tiles + 2 * tile_bytes;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, fault = p.fault;
  const int q0 = blockIdx.x * Br;
  const size_t bh = size_t(blockIdx.z) * p.heads + blockIdx.y;
  const bf16 *q = p.q + bh * p.queries * D, *k = p.k + bh * p.keys * D, *v = p.v + bh * p.keys * D;
  const int keys = p.key_lengths ? min(p.key_lengths[blockIdx.z], p.keys) : p.keys;
  int blocks = (keys + Bc - 1) / Bc;
  if (p.causal) blocks = min(blocks, (min(q0 + Br, p.queries) + Bc - 1) / Bc);

  load_tile(q_tile, q, q0, p.queries, fault);
  if (blocks > 0) {
    load_tile(k_tiles, k, 0, keys, fault);
    load_tile(v_tiles, v, 0, keys, fault);
  }
  ptx::cp_async_commit();

  float out[8][4];
  if (fault != 10) {
#pragma unroll
    for (int i = 0; i < 8; i++)
#pragma unroll
      for (int j = 0; j < 4; j++) out[i][j] = 0.f;
  }
  float m[2] = {-INFINITY, -INFINITY}, l[2] = {0.f, 0.f};
  uint32_t qf[4][4];
  const float scale2 = p.scale * 1.4426950408889634f;  // log2(e)
  const int row = q0 + warp * 16 + (lane >> 2);

  for (int j = 0; j < blocks; j++) {
    const int stage = j & 1, other = stage ^ 1;
    if (fault == 7)
      ptx::cp_async_wait<1>();
    else if (fault != 1)
      ptx::cp_async_wait<0>();
    if (fault != 2) __syncthreads();
    if (j + 1 < blocks) {
      load_tile(k_tiles + (fault == 9 ? stage : other) * tile_bytes, k, (j + 1) * Bc, keys, fault);
      load_tile(v_tiles + other * tile_bytes, v, (j + 1) * Bc, keys, fault);
    }
    ptx::cp_async_commit();
    if (j == 0) {
#pragma unroll
      for (int kk = 0; kk < 4; kk++)
        ptx::ldmatrix_x4(qf[kk], q_tile + chunk(warp * 16 + (lane & 15), kk * 2 + (lane >> 4)));
    }
    float s[8][4];
    scores(s, qf, k_tiles + stage * tile_bytes, row, j * Bc, q0, keys, p.causal, fault);

#pragma unroll
    for (int half = 0; half < 2; half++) {
      float mx = m[half];
#pragma unroll
      for (int n = 0; n < 8; n++) mx = fmaxf(mx, fmaxf(s[n][half * 2], s[n][half * 2 + 1]));
      mx = fmaxf(mx, __shfl_xor_sync(0xffffffffu, mx, 1));
      if (fault != 5) mx = fmaxf(mx, __shfl_xor_sync(0xffffffffu, mx, 2));
      const float shift = mx == -INFINITY ? 0.f : mx * scale2,
                  correction = ptx::ex2(m[half] * scale2 - shift);
      m[half] = mx;
      float sum = 0.f;
#pragma unroll
      for (int n = 0; n < 8; n++)
#pragma unroll
        for (int e = half * 2; e < half * 2 + 2; e++) {
          s[n][e] = ptx::ex2(s[n][e] * scale2 - shift);
          sum += s[n][e];
          out[n][e] *= correction;
        }
      l[half] = l[half] * correction + sum;
    }
#pragma unroll
    for (int kk = 0; kk < 4; kk++) {
      const uint32_t pf[4] = {ptx::pack_bf16(s[kk * 2][0], s[kk * 2][1]),
                              ptx::pack_bf16(s[kk * 2][2], s[kk * 2][3]),
                              ptx::pack_bf16(s[kk * 2 + 1][0], s[kk * 2 + 1][1]),
                              ptx::pack_bf16(s[kk * 2 + 1][2], s[kk * 2 + 1][3])};
#pragma unroll
      for (int d = 0; d < 4; d++) {
        uint32_t vf[4];
        ptx::ldmatrix_x4_trans(
            vf, v_tiles + stage * tile_bytes + chunk(kk * 16 + (lane & 15), d * 2 + (lane >> 4)));
        const uint32_t b0[2] = {vf[0], vf[1]}, b1[2] = {vf[2], vf[3]};
        ptx::mma_m16n8k16_bf16(out[d * 2], pf, b0, out[d * 2]);
        ptx::mma_m16n8k16_bf16(out[d * 2 + 1], pf, b1, out[d * 2 + 1]);
      }
    }
  }
#pragma unroll
  for (int half = 0; half < 2; half++) {
    l[half] += __shfl_xor_sync(0xffffffffu, l[half], 1);
    l[half] += __shfl_xor_sync(0xffffffffu, l[half], 2);
    const int r = row + half * 8;
    const float inverse = l[half] > 0.f ? 1.f / l[half] : 0.f;
    if (r >= p.queries) continue;
#pragma unroll
    for (int d = 0; d < 8; d++)
      *reinterpret_cast<uint32_t*>(p.out + (bh * p.queries + r) * D + d * 8 + (lane & 3) * 2) =
          ptx::pack_bf16(out[d][half * 2] * inverse, out[d][half * 2 + 1] * inverse);
    if ((lane & 3) == 0 || fault == 8)
      p.lse[bh * p.queries + r] = l[half] > 0.f ? m[half] * p.scale + __logf(l[half]) : -INFINITY;
  }
}

struct Shape {
  int B, H, queries, keys;
  bool causal;
  std::vector<int> key_lengths;
};

static void check(Program& program, Random& random, const Shape& s) {
  device_memory::free_all();
  const double scale = 0.125;
  const auto q = normals<bf16>(s.B * s.H * s.queries * D, random),
             k = normals<bf16>(s.B * s.H * s.keys * D, random);
  const auto v = normals<bf16>(k.size(), random);
  std::vector<double> want(q.size()), want_lse(s.B * s.H * s.queries);
  for (int bh = 0; bh < s.B * s.H; bh++)
    for (int i = 0; i < s.queries; i++) {
      int n = s.key_lengths.empty() ? s.keys : s.key_lengths[bh / s.H];
      if (s.causal) n = std::min(n, i + 1);
      std::vector<double> w(n);
      double m = -INFINITY, l = 0;
      const auto at = [&](const std::vector<bf16>& t, int rows, int r, int d) {
        return double(float(t[(size_t(bh) * rows + r) * D + d]));
      };
      for (int j = 0; j < n; j++) {
        for (int d = 0; d < D; d++) w[j] += at(q, s.queries, i, d) * at(k, s.keys, j, d) * scale;
        m = std::fmax(m, w[j]);
      }
      for (double& x : w) l += x = std::exp(x - m);
      for (int d = 0; d < D; d++) {
        double sum = 0;
        for (int j = 0; j < n; j++) sum += w[j] / l * at(v, s.keys, j, d);
        want[(size_t(bh) * s.queries + i) * D + d] = sum;
      }
      want_lse[bh * s.queries + i] = n ? m + std::log(l) : -INFINITY;
    }
  Buffer<bf16> dq(q, "q"), dk(k, "k"), dv(v, "v"), out(q.size(), "out");
  Buffer<float> lse(want_lse.size(), "lse");
  Buffer<int> lengths(s.key_lengths, "key_lengths");
  program.run(
      [&](int fault) {
        out.poison(), lse.poison();
        const AttentionParams p{dq.device,    dk.device,  dv.device,
                                out.device,   lse.device, s.key_lengths.empty() ? nullptr : lengths.device,
                                s.H,          s.queries,  s.keys,
                                float(scale), s.causal,   fault};
        const dim3 grid((s.queries + Br - 1) / Br, s.H, s.B);
        return launch({.grid = grid, .block = dim3(threads), .dynamic_shared_bytes = shared_bytes}, attention,
                      p);
      },
      [&] { return close(out, want, 1e-2, 1e-2) && close(lse, want_lse, 1e-4, 1e-4); });
}

}  // namespace pyseqnet::faults

using namespace pyseqnet;
using namespace pyseqnet::faults;

int main() {
  Program program("attention", {{1, "no wait for cp.async", "RACE"},
                                {2, "no barrier: tiles of other threads", "RACE"},
                                {3, "wrong fragment of K", by_values},
                                {4, "mask uses the wrong row of the fragment", by_values},
                                {5, "reduction over half of a quad", by_values},
                                {6, "cp.async reads past the keys", "OUT OF BOUNDS"},
                                {7, "waits for one group too few", "RACE"},
                                {8, "four lanes store the same number", "RACE (write after write)"},
                                {9, "prefetch into the buffer in use", "RACE"},
                                {10, "accumulators not zeroed", by_values}});
  Random random(1);
  check(program, random, {1, 1, 64, 150, false, {}});
  check(program, random, {2, 1, 100, 100, true, {1, 77}});
  return program.finish();
}
