// C = A B^T in bfloat16 with TMA, an mbarrier ring and wgmma, warp-specialised: two warpgroups consume, one
// produces; clusters of two blocks multicast B. Then two small kernels: a sum through distributed shared
// memory, and wgmma with B stored along N. Covers the sm_90a half of ptx.cuh.
#include "faults.h"

namespace pyseqnet::faults {

using bf16 = __nv_bfloat16;
constexpr int BM = 128, BN = 128, BK = 64, stages = 3, threads = 384;
constexpr unsigned a_bytes = BM * BK * sizeof(bf16), stage_bytes = a_bytes + BN * BK * sizeof(bf16);
constexpr unsigned gemm_shared_bytes = stages * stage_bytes;

template <int cluster>
PYSEQNET_DEVICE void release_slot(uint32_t bar) {
  if ((threadIdx.x & 127) != 0) return;
  for (int c = 0; c < cluster; c++) {
    if (cluster > 1)
      ptx::mbar_arrive_cluster(bar, c);
    else
      ptx::mbar_arrive(bar);
  }
}

template <int cluster>
__global__ void __launch_bounds__(threads, 1)
    gemm(const __grid_constant__ ptx::TensorMap map_a, const __grid_constant__ ptx::TensorMap map_b,
         float* __restrict__ C, int M, int N, int K, int fault_wanted) {
#if PYSEQNET_SM90A
  const int fault = planted(fault_wanted);
  PYSEQNET_DYNAMIC_SHARED(unsigned char, shared);
  PYSEQNET_SHARED(uint64_t, bars, [2 * stages]);
  const uint32_t tiles = ptx::smem_u32(shared), full = ptx::smem_u32(bars), empty = full + 8 * stages;
  const int group = threadIdx.x >> 7, steps = (K + BK - 1) / BK;
  const int m0 = blockIdx.x * BM, n0 = blockIdx.y * BN;
  const uint32_t rank = cluster > 1 ? ptx::cluster_rank() : 0;
  if (threadIdx.x == 0) {
    for (int s = 0; s < stages; s++) {
      ptx::mbar_init(full + 8 * s, 1);
      ptx::mbar_init(empty + 8 * s, 2 * cluster);
    }
    ptx::mbar_fence_init();
  }
  if (cluster > 1)
    ptx::cluster_sync();
  else
    __syncthreads();

  if (group == 2) {
    ptx::setmaxnreg_dec<40>();
    for (int k = 0; k < steps && threadIdx.x == 256; k++) {
      const int s = k % stages;
      const uint32_t phase = (k / stages) & 1, a = tiles + s * stage_bytes, b = a + a_bytes;
      if (fault == 7)
        ptx::mbar_wait(empty + 8 * s, phase);
      else if (fault != 8)
        ptx::mbar_wait(empty + 8 * s, phase ^ 1);
      ptx::mbar_arrive_expect_tx(full + 8 * s, fault == 4 ? stage_bytes + 16 : stage_bytes);
      ptx::tma_load(a, &map_a, {k * BK, m0}, full + 8 * s);
      if (cluster == 1)
        ptx::tma_load(b, &map_b, {k * BK, n0}, full + 8 * s);
      else
        ptx::tma_load_multicast(b + rank * (BN / cluster) * 128, &map_b,
                                {k * BK, n0 + int(rank) * (BN / cluster)}, full + 8 * s,
                                uint16_t((1 << cluster) - 1));
    }
  } else {
    ptx::setmaxnreg_inc<232>();
    float acc[64];
#pragma unroll
    for (int i = 0; i < 64; i++) acc[i] = 0.f;
    for (int k = 0; k < steps; k++) {
      const int s = k % stages;
      const uint32_t phase = (k / stages) & 1, a = tiles + s * stage_bytes + group * 64 * 128,
                     b = tiles + s * stage_bytes + a_bytes;
      if (fault != 1) ptx::mbar_wait(full + 8 * s, phase);
      ptx::wgmma_fence();
#pragma unroll
      for (int i = 0; i < BK / 16; i++)
        ptx::wgmma<bf16>(acc,
                         ptx::wgmma_desc_sw128(a + i * (fault == 3 ? 16 : 32), 16, fault == 9 ? 512 : 1024),
                         ptx::wgmma_desc_sw128(b + i * 32), 1);
      ptx::wgmma_commit();
      if (fault == 2) release_slot<cluster>(empty + 8 * s);
      if (fault != 6) ptx::wgmma_wait<0>();
      if (fault != 2) {
        ptx::bar_sync(1 + group, 128);
        release_slot<cluster>(empty + 8 * s);
      }
    }
    const int lane = threadIdx.x & 31, w = (threadIdx.x >> 5) & 3;
    const int r0 = m0 + group * 64 + w * 16 + (lane >> 2), c0 = n0 + (lane & 3) * 2;
#pragma unroll
    for (int j = 0; j < 16; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int r = r0 + (e >> 1) * 8, c = c0 + j * 8 + (e & 1);
        if (r < M && c < N) C[size_t(r) * N + c] = acc[j * 4 + e];
      }
  }
  if (cluster > 1 && fault != 5) ptx::cluster_sync();
#endif
}

constexpr int sum_blocks = 4, sum_threads = 128;

// Every block adds its part into the array of rank 0, which writes the cluster's total.
__global__ void __launch_bounds__(sum_threads)
    cluster_sum(const float* __restrict__ x, float* __restrict__ y, int each, int fault) {
#if PYSEQNET_SM90
  PYSEQNET_SHARED(float, part, [sum_blocks]);
  PYSEQNET_SHARED(float, red, [4]);
  const uint32_t rank = ptx::cluster_rank();
  float s = 0.f;
  for (int i = threadIdx.x; i < each; i += sum_threads) s += x[size_t(blockIdx.x) * each + i];
  for (int o = 16; o; o >>= 1) s += __shfl_xor_sync(0xffffffffu, s, o);
  if ((threadIdx.x & 31) == 0) red[threadIdx.x >> 5] = s;
  if (fault == 2)
    __syncthreads();
  else
    ptx::cluster_sync();  // rank 0 must have started
  if (threadIdx.x == 0) *ptx::map_shared_rank(&part[rank], 0) = red[0] + red[1] + red[2] + red[3];
  if (fault != 1) ptx::cluster_sync();
  if (rank == 0 && threadIdx.x == 0) y[blockIdx.x / sum_blocks] = part[0] + part[1] + part[2] + part[3];
#endif
}

// D (64, 128) = A (64, 64) B (64, 128), B row-major: along N for wgmma.
__global__ void __launch_bounds__(128)
    wgmma_along_n(const __grid_constant__ ptx::TensorMap map_a, const __grid_constant__ ptx::TensorMap map_b,
                  float* __restrict__ D, int fault) {
#if PYSEQNET_SM90A
  PYSEQNET_DYNAMIC_SHARED(unsigned char, shared);
  PYSEQNET_SHARED(uint64_t, bars, [1]);
  constexpr uint32_t half = 64 * 128;
  const uint32_t a = ptx::smem_u32(shared), b = a + half, bar = ptx::smem_u32(bars);
  if (threadIdx.x == 0) {
    ptx::mbar_init(bar, 1);
    ptx::mbar_fence_init();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::mbar_arrive_expect_tx(bar, 3 * half);
    ptx::tma_load(a, &map_a, {0, 0}, bar);
    ptx::tma_load(b, &map_b, {0, 0}, bar);
    ptx::tma_load(b + half, &map_b, {64, 0}, bar);
  }
  ptx::mbar_wait(bar, 0);
  float acc[64];
#pragma unroll
  for (int i = 0; i < 64; i++) acc[i] = 0.f;
  ptx::wgmma_fence();
#pragma unroll
  for (int k = 0; k < 4; k++)
    ptx::wgmma<bf16, 0, 1>(acc, ptx::wgmma_desc_sw128(a + k * 32),
                           ptx::wgmma_desc_sw128(b + k * 2048, fault ? half / 2 : half), 1);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  const int lane = threadIdx.x & 31, r0 = (threadIdx.x >> 5) * 16 + (lane >> 2), c0 = (lane & 3) * 2;
#pragma unroll
  for (int j = 0; j < 16; j++)
#pragma unroll
    for (int e = 0; e < 4; e++) D[(r0 + (e >> 1) * 8) * 128 + c0 + j * 8 + (e & 1)] = acc[j * 4 + e];
#endif
}

template <int cluster>
static void check_gemm(Program& program, Random& random, int M, int N, int K) {
  device_memory::free_all();
  const auto a = normals<bf16>(M * K, random), b = normals<bf16>(N * K, random);
  std::vector<double> want(M * N);
  for (int i = 0; i < M; i++)
    for (int j = 0; j < N; j++)
      for (int k = 0; k < K; k++)
        want[i * N + j] += double(float(a[i * K + k])) * double(float(b[j * K + k]));
  Buffer<bf16> da(a, "A"), db(b, "B");
  Buffer<float> dc(want.size(), "C");
  ptx::TensorMap map_a, map_b;
  make_tensor_map_2d(&map_a, da.device, M, K, K, BM, BK);
  make_tensor_map_2d(&map_b, db.device, N, K, K, BN / cluster, BK);
  program.run(
      [&](int fault) {
        dc.poison();
        const unsigned across = ((M + BM - 1) / BM + cluster - 1) / cluster * cluster;
        return launch({.grid = dim3(across, (N + BN - 1) / BN),
                       .block = dim3(threads),
                       .dynamic_shared_bytes = gemm_shared_bytes,
                       .cluster = dim3(cluster)},
                      gemm<cluster>, map_a, map_b, dc.device, M, N, K, fault);
      },
      [&] { return close(dc, want, 1e-3, 1e-4); });
}

static int check_cluster_sum(Random& random) {
  device_memory::free_all();
  Program program("cluster_sum", {{1, "no cluster barrier before the total", "RACE"},
                                  {2, "writes to a block that may not have started", "CLUSTER"}});
  const int each = 200, blocks = 2 * sum_blocks;
  const auto x = normals<float>(blocks * each, random);
  std::vector<double> want(2);
  for (size_t i = 0; i < x.size(); i++) want[i / (sum_blocks * each)] += x[i];
  Buffer<float> dx(x, "x"), dy(2, "y");
  program.run(
      [&](int fault) {
        dy.poison();
        return launch({.grid = dim3(blocks), .block = dim3(sum_threads), .cluster = dim3(sum_blocks)},
                      cluster_sum, dx.device, dy.device, each, fault);
      },
      [&] { return close(dy, want, 1e-3, 1e-5); });
  return program.finish();
}

static int check_along_n(Random& random) {
  device_memory::free_all();
  Program program("wgmma_along_n", {{1, "wrong stride between the halves of B", by_values}});
  const auto a = normals<bf16>(64 * 64, random), b = normals<bf16>(64 * 128, random);
  std::vector<double> want(64 * 128);
  for (int i = 0; i < 64; i++)
    for (int j = 0; j < 128; j++)
      for (int k = 0; k < 64; k++)
        want[i * 128 + j] += double(float(a[i * 64 + k])) * double(float(b[k * 128 + j]));
  Buffer<bf16> da(a, "a"), db(b, "b");
  Buffer<float> dd(want.size(), "d");
  ptx::TensorMap map_a, map_b;
  make_tensor_map_2d(&map_a, da.device, 64, 64, 64, 64, 64);
  make_tensor_map_2d(&map_b, db.device, 64, 128, 128, 64, 64);
  program.run(
      [&](int fault) {
        dd.poison();
        return launch({.grid = dim3(1), .block = dim3(128), .dynamic_shared_bytes = 3 * 64 * 128},
                      wgmma_along_n, map_a, map_b, dd.device, fault);
      },
      [&] { return close(dd, want, 1e-3, 1e-4); });
  return program.finish();
}

}  // namespace pyseqnet::faults

using namespace pyseqnet;
using namespace pyseqnet::faults;

int main() {
  Program program("gemm", {{1, "does not wait for the tiles", "RACE"},
                           {2, "slot released before wgmma has read it", "RACE"},
                           {3, "descriptor advanced by the wrong number of bytes", by_values},
                           {4, "mbarrier expects the wrong number of bytes", "DEADLOCK"},
                           {6, "never waits for wgmma", by_values},
                           {7, "wrong parity at the start", "DEADLOCK"},
                           {8, "producer does not wait for a free slot", "more arrivals"},
                           {9, "wrong stride between groups of 8 rows", by_values}});
  Random random(1);
  check_gemm<1>(program, random, 100, 72, 264);
  int failed = program.finish();
  Program pair("gemm, clusters of two", {{5, "exits while its peer still multicasts into it", "CLUSTER"}});
  check_gemm<2>(pair, random, 200, 40, 264);
  failed += pair.finish();
  failed += check_cluster_sum(random) + check_along_n(random);
  return failed != 0;
}
