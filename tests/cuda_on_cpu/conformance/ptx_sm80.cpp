// The wrappers that every device has: mma.sync, ldmatrix, cp.async, scalars, named barriers, flags between blocks.
#include "golden.h"

namespace pyseqnet::conformance {

template <class T>
PYSEQNET_DEVICE uint32_t pair(int low, int high) {
  return ptx::pack<T>(float(low), float(high));
}

// D = A B + C in fragments as the instruction set lays them out; y holds the four values of each lane.
template <class T>
__global__ void mma_k16(float* y) {
  const int lane = int(threadIdx.x), g = lane / 4, t = lane % 4;
  const auto a_at = [](int row, int k) { return input(unsigned(row * 16 + k)); };
  const auto b_at = [](int k, int column) { return input(unsigned(1000 + k * 8 + column)); };
  uint32_t a[4], b[2];
  for (int i = 0; i < 4; i++) {
    const int row = g + i % 2 * 8, k = t * 2 + i / 2 * 8;
    a[i] = pair<T>(a_at(row, k), a_at(row, k + 1));
  }
  for (int i = 0; i < 2; i++) b[i] = pair<T>(b_at(t * 2 + i * 8, g), b_at(t * 2 + 1 + i * 8, g));
  float d[4], c[4];
  for (int i = 0; i < 4; i++) c[i] = float(input(unsigned(2000 + lane * 4 + i)));
  ptx::mma_m16n8k16<T>(d, a, b, c);
  for (int i = 0; i < 4; i++) y[lane * 4 + i] = d[i];
}
__global__ void mma_tf32(float* y) {
  const int lane = int(threadIdx.x), g = lane / 4, t = lane % 4;
  uint32_t a[4], b[2];
  for (int i = 0; i < 4; i++)
    a[i] = ptx::round_to_tf32(__float_as_uint(float(input(unsigned((g + i % 2 * 8) * 16 + t + i / 2 * 4)))));
  for (int i = 0; i < 2; i++)
    b[i] = ptx::round_to_tf32(__float_as_uint(float(input(unsigned(1000 + (t + i * 4) * 8 + g)))));
  float d[4], c[4];
  for (int i = 0; i < 4; i++) c[i] = float(input(unsigned(2000 + lane * 4 + i)));
  ptx::mma_m16n8k8_tf32(d, a, b, c);
  for (int i = 0; i < 4; i++) y[lane * 4 + i] = d[i];
}
static std::vector<float> product(int depth) {
  std::vector<float> y(128);
  for (int lane = 0; lane < 32; lane++)
    for (int i = 0; i < 4; i++) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      float sum = float(input(unsigned(2000 + lane * 4 + i)));
      for (int k = 0; k < depth; k++)
        sum += float(input(unsigned(row * 16 + k)) * input(unsigned(1000 + k * 8 + column)));
      y[size_t(lane * 4 + i)] = sum;
    }
  return y;
}

// Matrix m, row r, column c holds 64 m + 8 r + c; y gets both halves of each register.
template <int N, bool trans>
__global__ void load_matrices(float* y) {
  PYSEQNET_SHARED(alignas(16) uint16_t, tile, [256]);
  const int lane = int(threadIdx.x);
  for (int i = lane; i < 256; i += 32) tile[i] = uint16_t(i);
  __syncwarp();
  uint32_t r[N];
  const uint32_t row = ptx::smem_u32(tile + lane * 8);
  if constexpr (N == 1 && !trans) ptx::ldmatrix_x1(r, row);
  if constexpr (N == 2 && !trans) ptx::ldmatrix_x2(r, row);
  if constexpr (N == 4 && !trans) ptx::ldmatrix_x4(r, row);
  if constexpr (N == 1 && trans) ptx::ldmatrix_x1_trans(r, row);
  if constexpr (N == 2 && trans) ptx::ldmatrix_x2_trans(r, row);
  if constexpr (N == 4 && trans) ptx::ldmatrix_x4_trans(r, row);
  for (int i = 0; i < N; i++) {
    y[(lane * N + i) * 2] = float(r[i] & 0xFFFF);
    y[(lane * N + i) * 2 + 1] = float(r[i] >> 16);
  }
}
template <int N, bool trans>
static std::vector<float> matrices() {
  std::vector<float> y;
  for (int lane = 0; lane < 32; lane++)
    for (int m = 0; m < N; m++)
      for (int h = 0; h < 2; h++) {
        const int a = lane / 4, b = lane % 4 * 2 + h;
        y.push_back(float(64 * m + (trans ? 8 * b + a : 8 * a + b)));
      }
  return y;
}

__global__ void scalars(float* y) {
  const float x[4] = {0.25f, -1.5f, 3.0f, -0.125f};
  for (int i = 0; i < 4; i++) {
    y[i] = ptx::ex2(x[i]);
    y[4 + i] = ptx::tanh_approx(x[i]);
  }
}
// 16-bit halves of packed pairs, and the upper bits of a rounded tf32, as numbers.
__global__ void conversions(float* y) {
  const float x[4] = {1.00390625f, -3.1415927f, 65504.0f, 1e-3f};  // the first lies between two bfloat16
  for (int i = 0; i < 4; i++) {
    const uint32_t b = ptx::pack_bf16(x[i], -x[i]), h = ptx::pack_f16(x[i], -x[i]),
                   t = ptx::round_to_tf32(__float_as_uint(x[i]));
    y[i * 5] = float(b & 0xFFFF);
    y[i * 5 + 1] = float(b >> 16);
    y[i * 5 + 2] = float(h & 0xFFFF);
    y[i * 5 + 3] = float(h >> 16);
    y[i * 5 + 4] = float(t >> 13);
  }
}

// Copies of 16, 8 and 4 bytes, of which some are zeros.
__global__ void async_copies(const float* x, float* y) {
  PYSEQNET_SHARED(alignas(16) float, tile, [128]);
  const int t = int(threadIdx.x);
  tile[t] = tile[t + 32] = tile[t + 64] = tile[t + 96] = -1.f;
  __syncwarp();
  if (t < 8) ptx::cp_async_16(ptx::smem_u32(tile + 4 * t), x + 4 * t, t != 3);
  ptx::cp_async_commit();
  if (t < 16) ptx::cp_async_small<8>(ptx::smem_u32(tile + 32 + 2 * t), x + 32 + 2 * t, t != 5);
  ptx::cp_async_small<4>(ptx::smem_u32(tile + 64 + t), x + 64 + t, t % 7 != 0);
  ptx::cp_async_commit();
  ptx::cp_async_wait<1>();
  __syncwarp();
  y[t] = tile[t];
  ptx::cp_async_wait<0>();
  __syncwarp();
  for (int i = 1; i < 4; i++) y[32 * i + t] = tile[32 * i + t];
}

// Two warps produce, two consume: a named arrival and a named barrier.
__global__ void named_barriers(float* y) {
  PYSEQNET_SHARED(float, box, [64]);
  const int t = int(threadIdx.x);
  if (t < 64) {
    box[t] = float(t * t);
    ptx::bar_arrive(3, 128);
  } else {
    ptx::bar_sync(3, 128);
    y[t - 64] = box[127 - t];
  }
}

// Block 0 hands on through block 1 ... : acquire and release; then all meet at a barrier of the grid.
__global__ void flags(float* y, float* box, unsigned* flag, unsigned* counter) {
  const unsigned b = blockIdx.x, blocks = gridDim.x;
  if (threadIdx.x == 0) {
    if (b > 0)
      while (ptx::ld_acquire(flag) != b) {
      }
    box[b] = b == 0 ? 1.f : 2.f * ptx::ld_cg(box + b - 1) + 1.f;
    ptx::st_release(flag, b + 1);
  }
  ptx::grid_barrier(counter, blocks, 1);
  if (threadIdx.x == 0) y[b] = ptx::ld_cg(box + blocks - 1 - b);
  if (threadIdx.x == 1) ptx::red_release_add(counter + 1, b);
  ptx::grid_barrier(counter, blocks, 2);
  if (threadIdx.x == 0) y[blocks + b] = float(ptx::ld_acquire(counter + 1));
}

__global__ void one_lane(float* y) {
  y[threadIdx.x] = 0;
  __syncwarp();
  const bool mine = ptx::elect_one();
  y[threadIdx.x] = float(__popc(__ballot_sync(0xffffffffu, mine)));
}

// What CUDA itself has, which the simulator plays, too.
__global__ void warp_functions(float* y) {
  const int lane = int(threadIdx.x);
  const unsigned mask = lane < 20 ? 0x000FFFFFu : 0xFFF00000u;
  y[lane] = float(__popc(__match_any_sync(mask, lane % 3)));
  y[32 + lane] = float(__reduce_add_sync(mask, unsigned(lane)));
  y[64 + lane] = float(__reduce_min_sync(mask, 7 - lane));
  y[96 + lane] = float(__reduce_xor_sync(mask, unsigned(lane)) & 0xFF);
  y[128 + lane] = float(__all_sync(mask, lane < 20) + 2 * __any_sync(mask, lane == 3));
  y[160 + lane] = float(__syncthreads_count(lane % 5 == 0) + 100 * __syncthreads_or(lane == 40));
}

}  // namespace pyseqnet::conformance

using namespace pyseqnet;
using namespace pyseqnet::conformance;

template <class Kernel, class... Arguments>
static auto one_block(unsigned threads, Kernel kernel, Arguments... arguments) {
  return [=](float* y) { return launch({.grid = dim3(1), .block = dim3(threads)}, kernel, arguments..., y); };
}
template <int N, bool trans>
static void check_ldmatrix(Golden& golden) {
  golden.check("ldmatrix_x" + std::to_string(N) + (trans ? "_trans" : ""), 64 * N,
               one_block(32, load_matrices<N, trans>), matrices<N, trans>());
}

int main(int argc, char** argv) {
  Golden golden(argc, argv, __FILE__);
  golden.check("mma_m16n8k16_bf16", 128, one_block(32, mma_k16<__nv_bfloat16>), product(16));
  golden.check("mma_m16n8k16_f16", 128, one_block(32, mma_k16<__half>), product(16));
  golden.check("mma_m16n8k8_tf32", 128, one_block(32, mma_tf32), product(8));
  check_ldmatrix<1, false>(golden);
  check_ldmatrix<2, false>(golden);
  check_ldmatrix<4, false>(golden);
  check_ldmatrix<1, true>(golden);
  check_ldmatrix<2, true>(golden);
  check_ldmatrix<4, true>(golden);
  std::vector<float> approximate;
  for (float x : {0.25f, -1.5f, 3.0f, -0.125f}) approximate.push_back(std::exp2(x));
  for (float x : {0.25f, -1.5f, 3.0f, -0.125f}) approximate.push_back(std::tanh(x));
  golden.check("ex2,tanh_approx", 8, one_block(1, scalars), approximate, 1e-3f);
  golden.check("pack_bf16,pack_f16,round_to_tf32", 20, one_block(1, conversions));
  golden.check("cp_async", 128, [](float* y) {
    std::vector<float> x(128);
    for (size_t i = 0; i < x.size(); i++) x[i] = float(i + 1);
    auto* from = static_cast<float*>(device_memory::allocate(512, "x"));
    device_memory::upload(from, x.data(), 512);
    return launch({.grid = dim3(1), .block = dim3(32)}, async_copies, from, y);
  });
  golden.check("bar_sync,bar_arrive", 64, one_block(128, named_barriers));
  golden.check("ld_acquire,st_release,red_release_add,grid_barrier,ld_cg", 8, [](float* y) {
    auto* box = static_cast<float*>(device_memory::allocate(16, "box"));
    auto* flag = static_cast<unsigned*>(device_memory::allocate(4, "flag"));
    auto* counter = static_cast<unsigned*>(device_memory::allocate(8, "counter"));
    const unsigned zeros[2] = {};
    device_memory::upload(flag, zeros, 4);
    device_memory::upload(counter, zeros, 8);
    return launch({.grid = dim3(4), .block = dim3(64), .cooperative = true}, flags, y, box, flag, counter);
  });
  golden.check("elect_one", 32, one_block(32, one_lane), std::vector<float>(32, 1.f));
  golden.check("match,reduce,vote,syncthreads_count", 192, one_block(32, warp_functions));
  return golden.finish();
}
