// The wrappers of Hopper: stmatrix, mbarriers, TMA with each swizzle, bulk copies, clusters, wgmma of every kind.
#include "golden.h"

namespace pyseqnet::conformance {

// ---------------------------------------------------------------- stmatrix
template <int N, bool trans>
__global__ void store_matrices(float* y) {
#if PYSEQNET_SM90
  PYSEQNET_SHARED(alignas(16) uint16_t, tile, [256]);
  const int lane = int(threadIdx.x);
  for (int i = lane; i < 256; i += 32) tile[i] = 9999;
  __syncwarp();
  uint32_t r[N];
  for (int m = 0; m < N; m++) {
    const uint32_t first = uint32_t(64 * m + 2 * lane);
    r[m] = first | (first + 1) << 16;
  }
  const uint32_t row = ptx::smem_u32(tile + lane * 8);
  if constexpr (N == 1 && !trans) ptx::stmatrix_x1(row, r);
  if constexpr (N == 2 && !trans) ptx::stmatrix_x2(row, r);
  if constexpr (N == 4 && !trans) ptx::stmatrix_x4(row, r);
  if constexpr (N == 1 && trans) ptx::stmatrix_x1_trans(row, r);
  if constexpr (N == 2 && trans) ptx::stmatrix_x2_trans(row, r);
  if constexpr (N == 4 && trans) ptx::stmatrix_x4_trans(row, r);
  __syncwarp();
  for (int i = lane; i < 256; i += 32) y[i] = float(tile[i]);
#endif
}
template <int N, bool trans>
static std::vector<float> stored_matrices() {
  std::vector<float> y(256, 9999.f);
  for (int m = 0; m < N; m++)
    for (int row = 0; row < 8; row++)
      for (int column = 0; column < 8; column++)
        y[size_t(64 * m + 8 * row + column)] = float(64 * m + (trans ? 8 * column + row : 8 * row + column));
  return y;
}

// ---------------------------------------------------------------- mbarriers
// Arrivals of half the threads, bytes of a bulk copy, cp.async and a poll, phase after phase.
__global__ void mbarriers(const float* x, float* y) {
#if PYSEQNET_SM90
  PYSEQNET_SHARED(alignas(16) float, tile, [128]);
  PYSEQNET_SHARED(uint64_t, bars, [3]);
  const int t = int(threadIdx.x);
  const uint32_t arrivals = ptx::smem_u32(bars), bytes = arrivals + 8, copies = arrivals + 16;
  if (t == 0) {
    ptx::mbar_init(arrivals, 32);
    ptx::mbar_init(bytes, 1);
    ptx::mbar_init(copies, 32);
    ptx::mbar_fence_init();
  }
  __syncthreads();
  for (int phase = 0; phase < 3; phase++) {
    if (t < 32) {
      tile[t] = float(100 * phase + t);
      ptx::mbar_arrive(arrivals);
    } else {
      ptx::mbar_wait(arrivals, uint32_t(phase & 1));
      y[phase * 32 + t - 32] = tile[63 - t];
    }
    ptx::fence_async_proxy();
    __syncthreads();
  }
  if (t == 0) {
    ptx::mbar_expect_tx(bytes, 128);
    ptx::mbar_arrive_expect_tx(bytes, 128);
    ptx::bulk_load(ptx::smem_u32(tile), x, 128, bytes);
    ptx::bulk_load(ptx::smem_u32(tile + 32), x + 64, 128, bytes);
  }
  if (t < 32) {
    ptx::cp_async_small<4>(ptx::smem_u32(tile + 64 + t), x + 2 * t);
    ptx::mbar_arrive_cp_async(copies);
  }
  while (!ptx::mbar_try_wait(bytes, 0)) {
  }
  y[96 + t] = tile[t];
  ptx::mbar_wait(copies, 0);
  if (t < 32) y[160 + t] = tile[95 - t];
  __syncthreads();
  if (t == 0) ptx::mbar_invalidate(arrivals);
#endif
}

// ---------------------------------------------------------------- TMA
// Where a swizzle puts what: shared memory as it lies, after a box of rows as long as the span.
__global__ void swizzled_box(const __grid_constant__ ptx::TensorMap map, float* y, int bytes) {
#if PYSEQNET_SM90
  PYSEQNET_DYNAMIC_SHARED(uint16_t, tile);
  PYSEQNET_SHARED(uint64_t, bars, [1]);
  const uint32_t bar = ptx::smem_u32(bars);
  if (threadIdx.x == 0) {
    ptx::tma_prefetch_map(&map);
    ptx::mbar_init(bar, 1);
    ptx::mbar_fence_init();
    ptx::mbar_arrive_expect_tx(bar, uint32_t(bytes));
    ptx::tma_load(ptx::smem_u32(tile), &map, {0, 0}, bar);
  }
  __syncthreads();
  ptx::mbar_wait(bar, 0);
  for (int i = int(threadIdx.x); i < bytes / 2; i += int(blockDim.x))
    y[i] = __bfloat162float(reinterpret_cast<__nv_bfloat16*>(tile)[i]);
#endif
}

// ---------------------------------------------------------------- bulk copies
__global__ void bulk_copies(const float* x, float* y) {
#if PYSEQNET_SM90
  PYSEQNET_SHARED(alignas(16) float, tile, [64]);
  const int t = int(threadIdx.x);
  tile[t] = x[t];
  tile[t + 32] = 1.f;
  ptx::fence_async_proxy();
  __syncwarp();
  if (t == 0) {
    ptx::bulk_store(y, ptx::smem_u32(tile), 128);
    ptx::bulk_commit();
    ptx::bulk_wait<0>();
    ptx::bulk_reduce_add(y, ptx::smem_u32(tile + 32), 64);
    ptx::bulk_commit();
    ptx::bulk_wait_read<0>();
  }
#endif
}

// ---------------------------------------------------------------- clusters
constexpr int cluster_blocks = 4;

// Each block sends to the next one by st.async and tells it by a remote arrival; then all read from all.
__global__ void cluster_exchange(float* y) {
#if PYSEQNET_SM90
  PYSEQNET_SHARED(alignas(16) float, box, [8]);
  PYSEQNET_SHARED(float, own, [1]);
  PYSEQNET_SHARED(uint64_t, bars, [2]);
  const int t = int(threadIdx.x);
  const uint32_t rank = ptx::cluster_rank(), size = ptx::cluster_size(), next = (rank + 1) % size;
  const uint32_t bytes = ptx::smem_u32(bars), arrivals = bytes + 8;
  if (t == 0) {
    ptx::mbar_init(bytes, 1);
    ptx::mbar_init(arrivals, 2);
    ptx::mbar_fence_init();
    ptx::mbar_arrive_expect_tx(bytes, 20);
    own[0] = float(10 * rank + 1);
  }
  ptx::cluster_arrive();
  ptx::cluster_wait();
  if (t == 0) {
    const uint32_t bar = ptx::map_shared(bytes, next);
    ptx::st_async(ptx::map_shared(ptx::smem_u32(box), next), float(rank), bar);
    ptx::st_async(ptx::map_shared(ptx::smem_u32(box + 4), next), float4{1.f, 2.f, 3.f, float(rank)}, bar);
    *ptx::map_shared_rank(&box[1], next) = float(100 + rank);
    ptx::mbar_arrive_cluster(arrivals, next);
    ptx::mbar_arrive_expect_tx_cluster(arrivals, next, 0);
  }
  ptx::mbar_wait(bytes, 0);
  ptx::mbar_wait_cluster(arrivals, 0);
  float* out = y + rank * 16;
  if (t < 8 && (t < 2 || t > 3)) out[t] = box[t];
  if (t == 2) out[2] = float(size);
  if (t == 3) out[3] = float(rank);
  if (t >= 8 && t < 8 + cluster_blocks) out[t] = *ptx::map_shared_rank(&own[0], uint32_t(t - 8));
  if (t >= 12 && t < 16) out[t] = 0;
  ptx::cluster_sync();
#endif
}

// ---------------------------------------------------------------- wgmma
// A (64 x 64 columns of K, or 64 x 32 of tf32) and B^T (N rows) lie in shared memory as a swizzle has them: element
// (row, k) is input(row, k). Written by threads, so that no other wrapper is needed.
template <class T>
PYSEQNET_DEVICE T number(int v) {
  if constexpr (std::is_same_v<T, float>)
    return float(v);
  else if constexpr (std::is_same_v<T, __half>)
    return __float2half(float(v));
  else
    return __float2bfloat16(float(v));
}

template <class T, int N, int a_mn, int b_mn, int span, bool a_in_registers>
__global__ void __launch_bounds__(128) one_wgmma(float* y) {
#if PYSEQNET_SM90A
  PYSEQNET_DYNAMIC_SHARED(unsigned char, shared);
  constexpr int size = int(sizeof(T)), k_step = 32 / size, chunk = 16 / size;
  constexpr Swizzle swizzle = Swizzle(span);
  constexpr int in_span = (span ? span : 16) / size;  // elements
  constexpr uint32_t b_offset = 64 * 1024;
  const int t = int(threadIdx.x);
  // Bytes of element (row, k) of an operand with `rows` rows, and the strides of its descriptor.
  struct Strides {
    uint32_t leading, stride;
  };
  const auto strides_of = [](bool mn, int rows) -> Strides {
    if (span && !mn) return {16, 8 * span};
    if (span) return {uint32_t(8 * span * (k_step / 8)), uint32_t(8 * span)};
    if (!mn) return {128, uint32_t(128 * (k_step / chunk))};
    return {uint32_t(128 * ((rows + chunk - 1) / chunk)), 128};
  };
  const auto place = [](bool mn, const Strides& s, int row, int k) -> uint32_t {
    uint32_t o;
    if (span && !mn)
      o = uint32_t(row % 8 * span + row / 8 * int(s.stride) + k * size);
    else if (span)
      o = uint32_t(row % in_span * size + row / in_span * int(s.leading) + k % 8 * span +
                   k / 8 * int(s.stride));
    else if (!mn)
      o = uint32_t(row % 8 * 16 + row / 8 * int(s.stride) + k / chunk * int(s.leading) + k % chunk * size);
    else
      o = uint32_t(row % chunk * size + row / chunk * int(s.stride) + k % 8 * 16 + k / 8 * int(s.leading));
    return o ^ (o >> 3 & (span == 128 ? 0x70u : span == 64 ? 0x30u : span == 32 ? 0x10u : 0u));
  };
  const Strides sa = strides_of(a_mn, 64), sb = strides_of(b_mn, N);
  for (int i = t; i < 64 * k_step; i += 128)
    *reinterpret_cast<T*>(shared + place(a_mn, sa, i / k_step, i % k_step)) = number<T>(input(unsigned(i)));
  for (int i = t; i < N * k_step; i += 128)
    *reinterpret_cast<T*>(shared + b_offset + place(b_mn, sb, i / k_step, i % k_step)) =
        number<T>(input(unsigned(5000 + i)));
  ptx::fence_async_proxy();
  __syncthreads();
  float d[N / 2];
  for (int i = 0; i < N / 2; i++) d[i] = 1.f;
  const uint32_t base = ptx::smem_u32(shared);
  const uint64_t a = ptx::wgmma_descriptor(base, sa.leading, sa.stride, swizzle);
  const uint64_t b = ptx::wgmma_descriptor(base + b_offset, sb.leading, sb.stride, swizzle);
  const int lane = t % 32, row = t / 32 * 16 + lane / 4;
  uint32_t r[4];
  for (int i = 0; i < 4; i++) {
    const int at = (row + i % 2 * 8) * k_step;
    if constexpr (size == 4) {
      r[i] = ptx::round_to_tf32(__float_as_uint(float(input(unsigned(at + lane % 4 + i / 2 * 4)))));
    } else {
      const int k = lane % 4 * 2 + i / 2 * 8;
      r[i] = ptx::pack<T>(float(input(unsigned(at + k))), float(input(unsigned(at + k + 1))));
    }
  }
  ptx::wgmma_fence(d);
  if constexpr (a_in_registers)
    ptx::wgmma<T, b_mn>(d, r, b, 1);
  else
    ptx::wgmma<T, a_mn, b_mn>(d, a, b, 1);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  for (int i = 0; i < N / 2; i++) y[(row + i / 2 % 2 * 8) * N + i / 4 * 8 + lane % 4 * 2 + i % 2] = d[i];
#endif
}
template <class T, int N>
static std::vector<float> wgmma_product() {
  constexpr int depth = 32 / int(sizeof(T));
  std::vector<float> y(64 * N);
  for (int i = 0; i < 64; i++)
    for (int j = 0; j < N; j++) {
      float sum = 1;
      for (int k = 0; k < depth; k++)
        sum += float(input(unsigned(i * depth + k)) * input(unsigned(5000 + j * depth + k)));
      y[size_t(i * N + j)] = sum;
    }
  return y;
}

// Registers change hands between warpgroups.
__global__ void __launch_bounds__(256, 1) hand_over(float* y) {
#if PYSEQNET_SM90A
  if (threadIdx.x < 128)
    ptx::setmaxnreg_dec<40>();
  else
    ptx::setmaxnreg_inc<216>();
  y[threadIdx.x] = float(threadIdx.x);
#endif
}

}  // namespace pyseqnet::conformance

using namespace pyseqnet;
using namespace pyseqnet::conformance;

template <int N, bool trans>
static void check_stmatrix(Golden& golden) {
  golden.check(
      "stmatrix_x" + std::to_string(N) + (trans ? "_trans" : ""), 256,
      [](float* y) { return launch({.block = dim3(32)}, store_matrices<N, trans>, y); },
      stored_matrices<N, trans>());
}
template <class T, int N, int a_mn, int b_mn, int span, bool a_in_registers = false>
static void check_wgmma(Golden& golden) {
  const char* type = std::is_same_v<T, float> ? "tf32" : std::is_same_v<T, __half> ? "f16" : "bf16";
  const std::string name = std::string("wgmma_n") + std::to_string(N) + "_" + type +
                           (a_in_registers ? "_registers"
                            : a_mn         ? "_m"
                                           : "_k") +
                           (b_mn ? "n" : "k") + "_swizzle" + std::to_string(span);
  golden.check(
      name, size_t(64 * N),
      [](float* y) {
        return launch({.block = dim3(128), .dynamic_shared_bytes = 128 * 1024},
                      one_wgmma<T, N, a_mn, b_mn, span, a_in_registers>, y);
      },
      wgmma_product<T, N>());
}
static const float* numbers(size_t count) {
  std::vector<float> x(count);
  for (size_t i = 0; i < count; i++) x[i] = float(i + 1);
  auto* from = static_cast<float*>(device_memory::allocate(count * 4, "x"));
  device_memory::upload(from, x.data(), count * 4);
  return from;
}
static void check_swizzle(Golden& golden, Swizzle swizzle, uint32_t span) {
  const uint32_t rows = 16, columns = span / 2;
  golden.check("tma_load,swizzle" + std::to_string(int(swizzle)), rows * columns, [=](float* y) {
    std::vector<__nv_bfloat16> x(rows * columns);
    for (size_t i = 0; i < x.size(); i++) x[i] = __float2bfloat16(float(i % 256));
    auto* from = static_cast<__nv_bfloat16*>(device_memory::allocate(x.size() * 2, "x"));
    device_memory::upload(from, x.data(), x.size() * 2);
    ptx::TensorMap map;
    if (int error =
            make_tensor_map_2d(&map, from, rows, columns, columns, rows, columns, DType::bf16, swizzle))
      return error;
    return launch({.block = dim3(32), .dynamic_shared_bytes = rows * span}, swizzled_box, map, y,
                  int(rows * span));
  });
}

int main(int argc, char** argv) {
  Golden golden(argc, argv, __FILE__);
  check_stmatrix<1, false>(golden);
  check_stmatrix<2, false>(golden);
  check_stmatrix<4, false>(golden);
  check_stmatrix<1, true>(golden);
  check_stmatrix<2, true>(golden);
  check_stmatrix<4, true>(golden);
  golden.check("mbarriers,bulk_load", 192,
               [](float* y) { return launch({.block = dim3(64)}, mbarriers, numbers(128), y); });
  check_swizzle(golden, Swizzle::none, 64);
  check_swizzle(golden, Swizzle::b32, 32);
  check_swizzle(golden, Swizzle::b64, 64);
  check_swizzle(golden, Swizzle::b128, 128);
  golden.check("bulk_store,bulk_reduce_add", 32,
               [](float* y) { return launch({.block = dim3(32)}, bulk_copies, numbers(32), y); });
  golden.check("clusters,st_async", 16 * cluster_blocks, [](float* y) {
    return launch({.grid = dim3(cluster_blocks), .block = dim3(32), .cluster = dim3(cluster_blocks)},
                  cluster_exchange, y);
  });
  golden.check("setmaxnreg", 256, [](float* y) { return launch({.block = dim3(256)}, hand_over, y); });
  using bf16 = __nv_bfloat16;
  check_wgmma<bf16, 8, 0, 0, 128>(golden);
  check_wgmma<bf16, 24, 0, 0, 128>(golden);
  check_wgmma<bf16, 64, 0, 0, 128>(golden);
  check_wgmma<bf16, 96, 0, 0, 128>(golden);
  check_wgmma<bf16, 192, 0, 0, 128>(golden);
  check_wgmma<bf16, 256, 0, 0, 128>(golden);
  check_wgmma<bf16, 64, 0, 0, 64>(golden);
  check_wgmma<bf16, 64, 0, 0, 32>(golden);
  check_wgmma<bf16, 64, 0, 0, 0>(golden);
  check_wgmma<bf16, 128, 1, 1, 128>(golden);
  check_wgmma<bf16, 64, 1, 1, 64>(golden);
  check_wgmma<bf16, 64, 1, 1, 32>(golden);
  check_wgmma<bf16, 64, 1, 1, 0>(golden);
  check_wgmma<bf16, 128, 0, 1, 128>(golden);
  check_wgmma<bf16, 64, 0, 0, 128, true>(golden);
  check_wgmma<bf16, 256, 0, 1, 128, true>(golden);
  check_wgmma<__half, 128, 0, 0, 128>(golden);
  check_wgmma<__half, 64, 1, 1, 128>(golden);
  check_wgmma<__half, 64, 0, 0, 128, true>(golden);
  check_wgmma<float, 64, 0, 0, 128>(golden);
  check_wgmma<float, 128, 0, 0, 64>(golden);
  check_wgmma<float, 64, 0, 0, 128, true>(golden);
  return golden.finish();
}
