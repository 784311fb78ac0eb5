// Correct but tricky patterns that the checker must not flag, each with the broken twin that it must.
#include "faults.h"

namespace pyseqnet::faults {

constexpr int threads = 128;

// The last block reduces: partial sums are published with a fence and an atomic counter.
__global__ void last_block_sum(const float* x, float* part, unsigned* counter, float* out, int n, int fault) {
  PYSEQNET_SHARED(float, red, [4]);
  PYSEQNET_SHARED(int, last, );
  float s = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) s += x[i];
  for (int o = 16; o; o >>= 1) s += __shfl_xor_sync(~0u, s, o);
  if (threadIdx.x % 32 == 0) red[threadIdx.x / 32] = s;
  __syncthreads();
  if (threadIdx.x == 0) {
    part[blockIdx.x] = red[0] + red[1] + red[2] + red[3];
    if (fault != 2) __threadfence();
    last = fault == 1 ? blockIdx.x == gridDim.x - 1 : atomicAdd(counter, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (last && threadIdx.x == 0) {
    float t = 0;
    for (unsigned b = 0; b < gridDim.x; b++) t += part[b];
    *out = t;
  }
}

// A transpose that is private to a warp needs __syncwarp only.
__global__ void warp_transpose(const float* x, float* y, int fault) {
  PYSEQNET_SHARED(float, tile, [4][32][33]);
  const int w = threadIdx.x / 32, l = threadIdx.x % 32;
  for (int r = 0; r < 32; r++) tile[w][r][l] = x[(w * 32 + r) * 32 + l];
  if (!fault) __syncwarp();
  for (int r = 0; r < 32; r++) y[(w * 32 + r) * 32 + l] = tile[w][l][r];
}

// Neighbouring threads write neighbouring elements of less than a word; the broken twin overlaps them.
__global__ void narrow_stores(__nv_bfloat16* y, unsigned char* bytes, int n, int fault) {
  PYSEQNET_SHARED(__nv_bfloat16, s, [threads]);
  PYSEQNET_SHARED(unsigned char, b, [threads + 1]);
  s[threadIdx.x] = __float2bfloat16(float(threadIdx.x));
  b[threadIdx.x] = static_cast<unsigned char>(threadIdx.x);
  if (fault) b[threadIdx.x + 1] = static_cast<unsigned char>(threadIdx.x + 1);
  __syncthreads();
  const int i = blockIdx.x * threads + threadIdx.x;
  if (i < n) y[i] = s[threads - 1 - threadIdx.x], bytes[i] = b[threads - 1 - threadIdx.x];
}

__global__ void histogram(const int* x, int* h, int n, int fault) {
  PYSEQNET_SHARED(int, s, [16]);
  if (threadIdx.x < 16) s[threadIdx.x] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    if (fault)
      s[x[i]]++;
    else
      atomicAdd(&s[x[i]], 1);
  }
  __syncthreads();
  if (threadIdx.x < 16) atomicAdd(&h[threadIdx.x], s[threadIdx.x]);
}

__global__ void wide_load(const float* x, float* y, int fault) {
  const float4 v = *reinterpret_cast<const float4*>(x + fault + 4 * threadIdx.x);
  y[threadIdx.x] = v.x + v.y + v.z + v.w;
}

__global__ void barrier_by_all(float* y, int fault) {
  if (!fault || threadIdx.x < 64) __syncthreads();
  y[threadIdx.x] = 1.f;
}

__global__ void shuffle_by_all(float* y, int fault) {
  float v = threadIdx.x;
  if (!fault || threadIdx.x % 32 < 16) v = __shfl_xor_sync(0xffffffffu, v, 1);
  y[threadIdx.x] = v;
}

__global__ void shared_read(float* y, int fault) {
  PYSEQNET_SHARED(float, s, [threads]);
  if (!fault || threadIdx.x < 100) s[threadIdx.x] = 1.f;
  __syncthreads();
  y[threadIdx.x] = fmaxf(1.f, s[threads - 1 - threadIdx.x]);  // swallows the poison: the value does not tell
}

// Writes of ordinary stores reach TMA only behind a fence.
__global__ void proxy_fence(const float* x, const __grid_constant__ ptx::TensorMap map, int fault) {
#if PYSEQNET_SM90
  PYSEQNET_DYNAMIC_SHARED(__nv_bfloat16, s);
  for (int i = threadIdx.x; i < 16 * 64; i += threads) {
    uint32_t o = i * 2;
    o ^= (o >> 3) & 0x70;
    s[o / 2] = __float2bfloat16(x[i]);
  }
  if (!fault) ptx::fence_async_proxy();
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::tma_store(&map, ptx::smem_u32(s), {0, 0});
    ptx::bulk_commit();
    ptx::bulk_wait_read<0>();
  }
#endif
}

}  // namespace pyseqnet::faults

using namespace pyseqnet;
using namespace pyseqnet::faults;

static int last_block(Random& random) {
  Program program("last_block_sum", {{1, "the last block does not wait for the others", "RACE"},
                                     {2, "no fence before the counter", "RACE"}});
  const int n = 5000, blocks = 9;
  const auto x = normals<float>(n, random);
  std::vector<double> want(1);
  for (float v : x) want[0] += v;
  Buffer<float> dx(x, "x"), part(blocks, "part"), out(1, "out");
  Buffer<unsigned> counter(1, "counter");
  program.run(
      [&](int fault) {
        counter.zero();
        part.poison();
        return launch({.grid = dim3(blocks), .block = dim3(threads)}, last_block_sum, dx.device, part.device,
                      counter.device, out.device, n, fault);
      },
      [&] { return close(out, want, 1e-3, 1e-5); });
  return program.finish();
}

static int transpose(Random& random) {
  Program program("warp_transpose", {{1, "no __syncwarp", "RACE"}});
  const auto x = normals<float>(4096, random);
  std::vector<double> want(4096);
  for (int w = 0; w < 4; w++)
    for (int r = 0; r < 32; r++)
      for (int l = 0; l < 32; l++) want[(w * 32 + r) * 32 + l] = x[(w * 32 + l) * 32 + r];
  Buffer<float> dx(x, "x"), dy(4096, "y");
  program.run(
      [&](int fault) {
        dy.poison();
        return launch({.grid = dim3(1), .block = dim3(threads)}, warp_transpose, dx.device, dy.device, fault);
      },
      [&] { return close(dy, want, 0, 0); });
  return program.finish();
}

static int narrow() {
  Program program("narrow_stores", {{1, "two threads write the same byte", "RACE (write after write)"}});
  const int n = 500;
  std::vector<double> want(n);
  for (int i = 0; i < n; i++) want[i] = threads - 1 - i % threads;
  Buffer<__nv_bfloat16> y(n, "y");
  Buffer<unsigned char> bytes(n, "bytes");
  program.run(
      [&](int fault) {
        return launch({.grid = dim3(4), .block = dim3(threads)}, narrow_stores, y.device, bytes.device, n,
                      fault);
      },
      [&] { return close(y, want, 0, 0) && close(bytes, want, 0, 0); });
  return program.finish();
}

static int atomics(Random& random) {
  Program program("histogram", {{1, "increments without an atomic", "RACE"}});
  std::vector<int> x(3000);
  std::vector<double> want(16);
  for (int& v : x) v = int(random.in(0, 15)), want[v]++;
  Buffer<int> dx(x, "x"), h(16, "h");
  program.run(
      [&](int fault) {
        h.zero();
        return launch({.grid = dim3(1), .block = dim3(threads)}, histogram, dx.device, h.device,
                      int(x.size()), fault);
      },
      [&] { return close(h, want, 0, 0); });
  return program.finish();
}

template <class Kernel>
static int ones(const char* name, Fault fault, Kernel kernel) {
  Program program(name, {fault});
  Buffer<float> y(threads, "y");
  program.run([&](int f) { return launch({.grid = dim3(1), .block = dim3(threads)}, kernel, y.device, f); },
              [] { return true; });
  return program.finish();
}

static int alignment(Random& random) {
  Program program("wide_load", {{1, "float4 from an address that is not a multiple of 16", "UNDEFINED"}});
  const auto x = normals<float>(4 * threads + 4, random);
  Buffer<float> dx(x, "x"), y(threads, "y");
  program.run(
      [&](int fault) {
        return launch({.grid = dim3(1), .block = dim3(threads)}, wide_load, dx.device, y.device, fault);
      },
      [] { return true; });
  return program.finish();
}

static int proxy(Random& random) {
  Program program("proxy_fence", {{1, "no fence between stores and TMA", "fence.proxy.async"}});
  const auto x = normals<float>(16 * 64, random);
  std::vector<double> want(x.size());
  for (size_t i = 0; i < x.size(); i++) want[i] = double(float(__float2bfloat16(x[i])));
  Buffer<float> dx(x, "x");
  Buffer<__nv_bfloat16> y(x.size(), "y");
  ptx::TensorMap map;
  if (make_tensor_map_2d(&map, y.device, 16, 64, 64, 16, 64)) return 1;
  program.run(
      [&](int fault) {
        y.poison();
        return launch({.grid = dim3(1), .block = dim3(threads), .dynamic_shared_bytes = 2048}, proxy_fence,
                      dx.device, map, fault);
      },
      [&] { return close(y, want, 0, 0); });
  return program.finish();
}

static int too_many_threads() {
  Program program("launch", {{1, "a block of 2048 threads", "LAUNCH"}});
  Buffer<float> y(threads, "y");
  program.run(
      [&](int fault) {
        return launch({.grid = dim3(1), .block = dim3(fault ? 2048 : threads)}, barrier_by_all, y.device, 0);
      },
      [] { return true; });
  return program.finish();
}

int main() {
  Random random(1);
  int failed = last_block(random) + transpose(random) + narrow() + atomics(random) + alignment(random);
  failed += ones("barrier_by_all", {1, "__syncthreads in a branch", "SYNC"}, barrier_by_all);
  failed += ones("shuffle_by_all", {1, "shuffle in a branch, full mask", "warp collective"}, shuffle_by_all);
  failed += ones("shared_read", {1, "reads shared memory that nobody wrote", "UNINITIALISED"}, shared_read);
  failed += proxy(random) + too_many_threads();
  return failed != 0;
}
