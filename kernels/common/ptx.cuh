// Thin wrappers, one for each PTX instruction that kernels use. Kernels contain no asm: what is not plain
// CUDA C++ comes from here. Each wrapper has two bodies, inline asm for the device and a call into the test
// simulator for the host (see launch.cuh).
//
// Architectures: mma.sync, ldmatrix and cp.async need sm_80; mbarrier, TMA and clusters sm_90
// (PYSEQNET_SM90); wgmma and setmaxnreg sm_90a alone (PYSEQNET_SM90A). A wrapper that is called on a device
// compiled without its instruction traps.
#pragma once
#include "common/launch.cuh"
#include "common/tensor_map.cuh"

#ifdef __CUDACC__
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define PYSEQNET_SM90 1
#else
#define PYSEQNET_SM90 0
#endif
#if defined(__CUDA_ARCH__) && defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define PYSEQNET_SM90A 1
#else
#define PYSEQNET_SM90A 0
#endif
#else
#define PYSEQNET_SM90 1
#define PYSEQNET_SM90A 1
#endif

// The two bodies of a wrapper, by what the instruction needs.
#ifndef __CUDACC__
#define PYSEQNET_PTX(host, ...) host
#define PYSEQNET_PTX90(host, ...) host
#define PYSEQNET_PTX90A(host, ...) host
#else
#define PYSEQNET_PTX(host, ...) __VA_ARGS__
#if PYSEQNET_SM90
#define PYSEQNET_PTX90(host, ...) __VA_ARGS__
#else
#define PYSEQNET_PTX90(host, ...) __trap()
#endif
#if PYSEQNET_SM90A
#define PYSEQNET_PTX90A(host, ...) __VA_ARGS__
#else
#define PYSEQNET_PTX90A(host, ...) __trap()
#endif
#endif

namespace pyseqnet::ptx {

PYSEQNET_DEVICE uint32_t smem_u32(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

// ---------------------------------------------------------------- mma.sync
PYSEQNET_DEVICE void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                       const float (&c)[4]) {
  PYSEQNET_PTX(
      cusim::mma(cusim::Mma::bf16_16816, d, a, b, c),
      asm volatile(
          "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
          "{%10,%11,%12,%13};\n" : "=f"(d[0]),
          "=f"(d[1]), "=f"(d[2]), "=f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]),
          "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3])));
}
PYSEQNET_DEVICE void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                      const float (&c)[4]) {
  PYSEQNET_PTX(
      cusim::mma(cusim::Mma::f16_16816, d, a, b, c),
      asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                   "{%10,%11,%12,%13};\n" : "=f"(d[0]),
                   "=f"(d[1]), "=f"(d[2]), "=f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]),
                   "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3])));
}
PYSEQNET_DEVICE void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                      const float (&c)[4]) {
  PYSEQNET_PTX(
      cusim::mma(cusim::Mma::tf32_1688, d, a, b, c),
      asm volatile(
          "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
          "{%10,%11,%12,%13};\n" : "=f"(d[0]),
          "=f"(d[1]), "=f"(d[2]), "=f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]),
          "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3])));
}
// By the type of A and B: __nv_bfloat16 or __half.
template <class T>
PYSEQNET_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                  const float (&c)[4]) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>);
  if constexpr (std::is_same_v<T, __half>)
    mma_m16n8k16_f16(d, a, b, c);
  else
    mma_m16n8k16_bf16(d, a, b, c);
}
// The bits of a float rounded to TF32, to nearest with ties away from zero. mma.sync alone would truncate.
PYSEQNET_DEVICE uint32_t round_to_tf32(uint32_t bits) {
#ifdef __CUDACC__
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(bits)));
  return rounded;
#else
  const bool finite = (bits & 0x7F800000u) != 0x7F800000u;
  return finite ? (bits + 0x1000u) & ~0x1FFFu : bits;
#endif
}
// ---------------------------------------------------------------- ldmatrix
// N matrices of 8 x 8 16-bit numbers: lane 8 i + j names the 16 bytes of row j of matrix i. Lane l receives
// elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4 of each; transposed, of column l / 4.
PYSEQNET_DEVICE void ldmatrix_x1(uint32_t (&r)[1], uint32_t addr) {
  PYSEQNET_PTX(cusim::ldmatrix(r, 1, false, addr),
               asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];\n" : "=r"(r[0]) : "r"(
                   addr) : "memory"));
}
PYSEQNET_DEVICE void ldmatrix_x2(uint32_t (&r)[2], uint32_t addr) {
  PYSEQNET_PTX(cusim::ldmatrix(r, 2, false, addr),
               asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];\n" : "=r"(r[0]),
                            "=r"(r[1]) : "r"(addr) : "memory"));
}
PYSEQNET_DEVICE void ldmatrix_x4(uint32_t (&r)[4], uint32_t addr) {
  PYSEQNET_PTX(cusim::ldmatrix(r, 4, false, addr),
               asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n" : "=r"(r[0]),
                            "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(addr) : "memory"));
}
PYSEQNET_DEVICE void ldmatrix_x1_trans(uint32_t (&r)[1], uint32_t addr) {
  PYSEQNET_PTX(cusim::ldmatrix(r, 1, true, addr),
               asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];\n" : "=r"(r[0]) : "r"(
                   addr) : "memory"));
}
PYSEQNET_DEVICE void ldmatrix_x2_trans(uint32_t (&r)[2], uint32_t addr) {
  PYSEQNET_PTX(cusim::ldmatrix(r, 2, true, addr),
               asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];\n" : "=r"(r[0]),
                            "=r"(r[1]) : "r"(addr) : "memory"));
}
PYSEQNET_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t addr) {
  PYSEQNET_PTX(
      cusim::ldmatrix(r, 4, true, addr),
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n" : "=r"(r[0]),
                   "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(addr) : "memory"));
}
// sm_90. The inverse of ldmatrix.
PYSEQNET_DEVICE void stmatrix_x1(uint32_t addr, const uint32_t (&r)[1]) {
  PYSEQNET_PTX90(cusim::stmatrix(r, 1, false, addr),
                 asm volatile("stmatrix.sync.aligned.m8n8.x1.shared.b16 [%0], {%1};\n" ::"r"(addr),
                              "r"(r[0]) : "memory"));
}
PYSEQNET_DEVICE void stmatrix_x2(uint32_t addr, const uint32_t (&r)[2]) {
  PYSEQNET_PTX90(cusim::stmatrix(r, 2, false, addr),
                 asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1,%2};\n" ::"r"(addr),
                              "r"(r[0]), "r"(r[1]) : "memory"));
}
PYSEQNET_DEVICE void stmatrix_x4(uint32_t addr, const uint32_t (&r)[4]) {
  PYSEQNET_PTX90(cusim::stmatrix(r, 4, false, addr),
                 asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};\n" ::"r"(addr),
                              "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory"));
}
PYSEQNET_DEVICE void stmatrix_x1_trans(uint32_t addr, const uint32_t (&r)[1]) {
  PYSEQNET_PTX90(cusim::stmatrix(r, 1, true, addr),
                 asm volatile("stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%0], {%1};\n" ::"r"(addr),
                              "r"(r[0]) : "memory"));
}
PYSEQNET_DEVICE void stmatrix_x2_trans(uint32_t addr, const uint32_t (&r)[2]) {
  PYSEQNET_PTX90(cusim::stmatrix(r, 2, true, addr),
                 asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1,%2};\n" ::"r"(addr),
                              "r"(r[0]), "r"(r[1]) : "memory"));
}
PYSEQNET_DEVICE void stmatrix_x4_trans(uint32_t addr, const uint32_t (&r)[4]) {
  PYSEQNET_PTX90(
      cusim::stmatrix(r, 4, true, addr),
      asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};\n" ::"r"(addr),
                   "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory"));
}
// ---------------------------------------------------------------- cp.async
PYSEQNET_DEVICE void cp_async_16(uint32_t dst, const void* src, bool pred = true) {  // zero-fills when !pred
#ifdef __CUDACC__
  int n = pred ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(dst), "l"(src), "r"(n) : "memory");
#else
  cusim::cp_async(dst, src, 16, pred ? 16 : 0);
#endif
}
// 4 or 8 bytes, through L1; zero-fills when !pred.
template <int bytes>
PYSEQNET_DEVICE void cp_async_small(uint32_t dst, const void* src, bool pred = true) {
  static_assert(bytes == 4 || bytes == 8);
  PYSEQNET_PTX(cusim::cp_async(dst, src, bytes, pred ? bytes : 0),
               asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;\n" ::"r"(dst), "l"(src),
                            "n"(bytes), "r"(pred ? bytes : 0) : "memory"));
}
PYSEQNET_DEVICE void cp_async_commit() {
  PYSEQNET_PTX(cusim::cp_async_commit(), asm volatile("cp.async.commit_group;\n" :: : "memory"));
}
template <int N>
PYSEQNET_DEVICE void cp_async_wait() {
  PYSEQNET_PTX(cusim::cp_async_wait(N), asm volatile("cp.async.wait_group %0;\n" ::"n"(N) : "memory"));
}
// ---------------------------------------------------------------- scalars
PYSEQNET_DEVICE float ex2(float x) {
#ifdef __CUDACC__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::exp2(x);
#endif
}
PYSEQNET_DEVICE float tanh_approx(float x) {
#ifdef __CUDACC__
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::tanh(x);
#endif
}
PYSEQNET_DEVICE uint32_t pack_bf16(float lo, float hi) {
#ifdef __CUDACC__
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
#else
  __nv_bfloat162 v = __floats2bfloat162_rn(lo, hi);
  uint32_t r;
  std::memcpy(&r, &v, 4);
  return r;
#endif
}
PYSEQNET_DEVICE uint32_t pack_f16(float lo, float hi) {
#ifdef __CUDACC__
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
#else
  __half2 v = __floats2half2_rn(lo, hi);
  uint32_t r;
  std::memcpy(&r, &v, 4);
  return r;
#endif
}
template <class T>
PYSEQNET_DEVICE uint32_t pack(float lo, float hi) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>);
  if constexpr (std::is_same_v<T, __half>)
    return pack_f16(lo, hi);
  else
    return pack_bf16(lo, hi);
}
// True in one lane of a converged warp; which one is not said.
PYSEQNET_DEVICE bool elect_one() {
#ifndef __CUDACC__
  return cusim::elect_one();
#elif PYSEQNET_SM90
  uint32_t elected;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.b32 %0, 1, 0, p;\n}" : "=r"(elected));
  return elected != 0;
#else
  return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % 32 == 0;
#endif
}
// ---------------------------------------------------------------- memory model
// Flags and counters between blocks. An acquire that sees what a release wrote sees all that its thread, and
// those which met it at a barrier before, had written.
PYSEQNET_DEVICE unsigned ld_acquire(const unsigned* p) {
#ifdef __CUDACC__
  unsigned v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
#else
  return cusim::load_acquire(p);
#endif
}
PYSEQNET_DEVICE void red_release_add(unsigned* p, unsigned v) {
  PYSEQNET_PTX(cusim::red_release_add(p, v),
               asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory"));
}
PYSEQNET_DEVICE void st_release(unsigned* p, unsigned v) {
  PYSEQNET_PTX(cusim::store_release(p, v),
               asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory"));
}
PYSEQNET_DEVICE float ld_cg(const float* p) {
#ifdef __CUDACC__
  float v;
  asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(p) : "memory");
  return v;
#else
  return *p;
#endif
}
// ---------------------------------------------------------------- barriers
// Barriers 1 to 15 (0 is __syncthreads) of n threads, a multiple of 32; bar_arrive does not wait.
PYSEQNET_DEVICE void bar_sync(int id, int n) {
  PYSEQNET_PTX(cusim::sync_block(id, n, false),
               asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(n) : "memory"));
}
PYSEQNET_DEVICE void bar_arrive(int id, int n) {
  PYSEQNET_PTX(cusim::sync_block(id, n, true),
               asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(n) : "memory"));
}
// Grid barrier for cooperative launches. `ctr` starts at 0 and only grows; epoch counts barriers from 1.
PYSEQNET_DEVICE void grid_barrier(unsigned* ctr, unsigned nblocks, unsigned epoch) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    red_release_add(ctr, 1u);
    while (ld_acquire(ctr) < nblocks * epoch) {
    }
  }
  __syncthreads();
}

// ---------------------------------------------------------------- sm_90: mbarriers
// A phase ends when `count` threads have arrived and as many bytes as were expected. Its parity is 0, 1, 0, ...:
// mbar_wait(bar, 0) returns after the first phase, and mbar_wait(bar, 1) on a fresh barrier at once. Addresses
// are of shared memory (smem_u32); those of `_cluster` belong to any block of the cluster (map_shared).
PYSEQNET_DEVICE void mbar_init(uint32_t bar, uint32_t count) {
  PYSEQNET_PTX90(cusim::mbar_init(bar, count),
                 asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory"));
}
// After mbar_init, before the barrier that tells others (and TMA) of it.
PYSEQNET_DEVICE void mbar_fence_init() {
#ifdef __CUDACC__
#if PYSEQNET_SM90
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#else
  __trap();
#endif
#endif
}
// Before the memory of a barrier is used for something else.
PYSEQNET_DEVICE void mbar_invalidate(uint32_t bar) {
  PYSEQNET_PTX90(cusim::mbar_inval(bar),
                 asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(bar) : "memory"));
}
PYSEQNET_DEVICE void mbar_arrive(uint32_t bar) {
  PYSEQNET_PTX90(cusim::mbar_arrive(bar, 1, 0),
                 asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory"));
}
PYSEQNET_DEVICE void mbar_arrive_expect_tx(uint32_t bar, uint32_t bytes) {
  PYSEQNET_PTX90(cusim::mbar_arrive(bar, 1, bytes),
                 asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar),
                              "r"(bytes) : "memory"));
}
// Without an arrival: the phase cannot end before these bytes have come.
PYSEQNET_DEVICE void mbar_expect_tx(uint32_t bar, uint32_t bytes) {
  PYSEQNET_PTX90(cusim::mbar_expect_tx(bar, bytes),
                 asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(bar),
                              "r"(bytes) : "memory"));
}
// Arrives for this thread when all its earlier cp.async are complete; the barrier counts it as an arrival.
PYSEQNET_DEVICE void mbar_arrive_cp_async(uint32_t bar) {
  PYSEQNET_PTX90(cusim::mbar_arrive_cp_async(bar),
                 asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(bar) : "memory"));
}
// At the same offset in block `rank` of the cluster.
PYSEQNET_DEVICE void mbar_arrive_cluster(uint32_t bar, uint32_t rank) {
  PYSEQNET_PTX90(
      cusim::mbar_arrive(cusim::mapa(bar, rank), 1, 0),
      asm volatile("{\n.reg .b32 ra;\nmapa.shared::cluster.u32 ra, %0, "
                   "%1;\nmbarrier.arrive.release.cluster.shared::cluster.b64 _, [ra];\n}" ::"r"(bar),
                   "r"(rank) : "memory"));
}
PYSEQNET_DEVICE void mbar_arrive_expect_tx_cluster(uint32_t bar, uint32_t rank, uint32_t bytes) {
  PYSEQNET_PTX90(
      cusim::mbar_arrive(cusim::mapa(bar, rank), 1, bytes),
      asm volatile(
          "{\n.reg .b32 ra;\nmapa.shared::cluster.u32 ra, %0, "
          "%1;\nmbarrier.arrive.expect_tx.release.cluster.shared::cluster.b64 _, [ra], %2;\n}" ::"r"(bar),
          "r"(rank), "r"(bytes) : "memory"));
}
PYSEQNET_DEVICE void mbar_wait(uint32_t bar, uint32_t parity) {
  PYSEQNET_PTX90(cusim::mbar_wait(bar, parity),
                 asm volatile("{\n.reg .pred p;\nW: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], "
                              "%1;\n@p bra.uni D;\nbra.uni "
                              "W;\nD:\n}" ::"r"(bar),
                              "r"(parity) : "memory"));
}
// Where the arrivals come from other blocks of the cluster, and what they wrote is read.
PYSEQNET_DEVICE void mbar_wait_cluster(uint32_t bar, uint32_t parity) {
  PYSEQNET_PTX90(cusim::mbar_wait(bar, parity),
                 asm volatile("{\n.reg .pred p;\nW: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 "
                              "p, [%0], %1;\n@p bra.uni "
                              "D;\nbra.uni W;\nD:\n}" ::"r"(bar),
                              "r"(parity) : "memory"));
}
// Whether that phase is over, after waiting for a time that the hardware chooses.
PYSEQNET_DEVICE bool mbar_try_wait(uint32_t bar, uint32_t parity) {
#ifndef __CUDACC__
  return cusim::mbar_try_wait(bar, parity);
#elif PYSEQNET_SM90
  uint32_t done;
  asm volatile(
      "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.b32 %0, 1, 0, p;\n}"
      : "=r"(done)
      : "r"(bar), "r"(parity)
      : "memory");
  return done != 0;
#else
  __trap();
  return false;
#endif
}
// Orders this thread's accesses to shared memory before later ones of TMA, bulk copies and wgmma: between
// ordinary stores and what reads them, and the barrier that tells the reader follows the fence.
PYSEQNET_DEVICE void fence_async_proxy() {
  PYSEQNET_PTX90(cusim::fence_async_proxy(false),
                 asm volatile("fence.proxy.async.shared::cta;" :: : "memory"));
}
// The same for global memory: a kernel that writes what TMA reads later in the same launch.
PYSEQNET_DEVICE void fence_async_proxy_global() {
  PYSEQNET_PTX90(cusim::fence_async_proxy(true), asm volatile("fence.proxy.async.global;" :: : "memory"));
}

// ---------------------------------------------------------------- sm_90: TMA and bulk copies
// One thread issues a copy; bytes arrive at `bar` (mbar_arrive_expect_tx says how many: whole boxes, zeros
// included). Coordinates come as {x}, {x, y} ... {x, y, z, u, v}, dimension 0 first, one for each dimension
// of the map. The multicast forms write the same shared offsets, and complete the barrier at the same offset,
// in each block of the cluster that `blocks` has a bit for.
//
// One text for every number of dimensions. Operands: 0 shared address, 1 map, 2 barrier, 3 blocks, from 4 on
// coordinates, then offsets.
#define PYSEQNET_AT1(c) "r"(c[0])
#define PYSEQNET_AT2(c) PYSEQNET_AT1(c), "r"(c[1])
#define PYSEQNET_AT3(c) PYSEQNET_AT2(c), "r"(c[2])
#define PYSEQNET_AT4(c) PYSEQNET_AT3(c), "r"(c[3])
#define PYSEQNET_AT5(c) PYSEQNET_AT4(c), "r"(c[4])
#define PYSEQNET_TMA(text, shared, map, bar, blocks, ...) \
  asm volatile(text::"r"(shared), "l"(map), "r"(bar), "h"(blocks), __VA_ARGS__ : "memory")
#define PYSEQNET_TMA_BY_RANK(before, after, shared, map, bar, blocks, at)                             \
  if constexpr (R == 1)                                                                               \
    PYSEQNET_TMA(before("1d", "{%4}") after, shared, map, bar, blocks, PYSEQNET_AT1(at));             \
  else if constexpr (R == 2)                                                                          \
    PYSEQNET_TMA(before("2d", "{%4, %5}") after, shared, map, bar, blocks, PYSEQNET_AT2(at));         \
  else if constexpr (R == 3)                                                                          \
    PYSEQNET_TMA(before("3d", "{%4, %5, %6}") after, shared, map, bar, blocks, PYSEQNET_AT3(at));     \
  else if constexpr (R == 4)                                                                          \
    PYSEQNET_TMA(before("4d", "{%4, %5, %6, %7}") after, shared, map, bar, blocks, PYSEQNET_AT4(at)); \
  else                                                                                                \
    PYSEQNET_TMA(before("5d", "{%4, %5, %6, %7, %8}") after, shared, map, bar, blocks, PYSEQNET_AT5(at))
#define PYSEQNET_LOAD_TEXT(dims, at)                                                                      \
  "cp.async.bulk.tensor." dims ".shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, " at \
  "], [%2]"
#define PYSEQNET_MULTICAST_TEXT(dims, at)                                                       \
  "cp.async.bulk.tensor." dims                                                                  \
  ".shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, " at \
  "], [%2], "                                                                                   \
  "%3"
#define PYSEQNET_STORE_TEXT(dims, at) \
  "cp.async.bulk.tensor." dims ".global.shared::cta.tile.bulk_group [%1, " at "], [%0]"
#define PYSEQNET_REDUCE_TEXT(dims, at) \
  "cp.reduce.async.bulk.tensor." dims ".global.shared::cta.add.tile.bulk_group [%1, " at "], [%0]"

template <int R>
PYSEQNET_DEVICE void tma_load(uint32_t dst, const TensorMap* map, const int (&at)[R], uint32_t bar) {
  static_assert(R <= tma_dimensions);
#ifndef __CUDACC__
  cusim::tma_load(dst, map, R, at, bar, 0);
#elif PYSEQNET_SM90
  PYSEQNET_TMA_BY_RANK(PYSEQNET_LOAD_TEXT, ";", dst, map, bar, uint16_t(0), at);
#else
  __trap();
#endif
}
template <int R>
PYSEQNET_DEVICE void tma_load_multicast(uint32_t dst, const TensorMap* map, const int (&at)[R], uint32_t bar,
                                        uint16_t blocks) {
  static_assert(R <= tma_dimensions);
#ifndef __CUDACC__
  cusim::tma_load(dst, map, R, at, bar, blocks);
#elif PYSEQNET_SM90
  PYSEQNET_TMA_BY_RANK(PYSEQNET_MULTICAST_TEXT, ";", dst, map, bar, blocks, at);
#else
  __trap();
#endif
}

// {c, w, n}, {s}; {c, w, h, n}, {s, r}; {c, w, h, d, n}, {s, r, t}: tensor_map.cuh says what moves.
template <int R, int S>
PYSEQNET_DEVICE void tma_load_im2col(uint32_t dst, const TensorMap* map, const int (&at)[R],
                                     const uint16_t (&tap)[S], uint32_t bar) {
  static_assert(R >= 3 && R <= tma_dimensions && S == R - 2);
#ifndef __CUDACC__
  cusim::tma_load_im2col(dst, map, R, at, tap, bar, 0);
#elif PYSEQNET_SM90
#define PYSEQNET_IM2COL(dims, coordinates, offsets, ...)                                             \
  PYSEQNET_TMA("cp.async.bulk.tensor." dims                                                          \
               ".shared::cluster.global.im2col.mbarrier::complete_tx::bytes [%0], [%1, " coordinates \
               "], [%2], " offsets ";",                                                              \
               dst, map, bar, uint16_t(0), __VA_ARGS__)
  if constexpr (R == 3)
    PYSEQNET_IM2COL("3d", "{%4, %5, %6}", "{%7}", PYSEQNET_AT3(at), "h"(tap[0]));
  else if constexpr (R == 4)
    PYSEQNET_IM2COL("4d", "{%4, %5, %6, %7}", "{%8, %9}", PYSEQNET_AT4(at), "h"(tap[0]), "h"(tap[1]));
  else
    PYSEQNET_IM2COL("5d", "{%4, %5, %6, %7, %8}", "{%9, %10, %11}", PYSEQNET_AT5(at), "h"(tap[0]),
                    "h"(tap[1]), "h"(tap[2]));
#undef PYSEQNET_IM2COL
#else
  __trap();
#endif
}
template <int R, int S>
PYSEQNET_DEVICE void tma_load_im2col_multicast(uint32_t dst, const TensorMap* map, const int (&at)[R],
                                               const uint16_t (&tap)[S], uint32_t bar, uint16_t blocks) {
  static_assert(R >= 3 && R <= tma_dimensions && S == R - 2);
#ifndef __CUDACC__
  cusim::tma_load_im2col(dst, map, R, at, tap, bar, blocks);
#elif PYSEQNET_SM90
#define PYSEQNET_IM2COL(dims, coordinates, offsets, ...)                                               \
  PYSEQNET_TMA("cp.async.bulk.tensor." dims                                                            \
               ".shared::cluster.global.im2col.mbarrier::complete_tx::bytes.multicast::cluster [%0], " \
               "[%1, " coordinates "], [%2], " offsets ", %3;",                                        \
               dst, map, bar, blocks, __VA_ARGS__)
  if constexpr (R == 3)
    PYSEQNET_IM2COL("3d", "{%4, %5, %6}", "{%7}", PYSEQNET_AT3(at), "h"(tap[0]));
  else if constexpr (R == 4)
    PYSEQNET_IM2COL("4d", "{%4, %5, %6, %7}", "{%8, %9}", PYSEQNET_AT4(at), "h"(tap[0]), "h"(tap[1]));
  else
    PYSEQNET_IM2COL("5d", "{%4, %5, %6, %7, %8}", "{%9, %10, %11}", PYSEQNET_AT5(at), "h"(tap[0]),
                    "h"(tap[1]), "h"(tap[2]));
#undef PYSEQNET_IM2COL
#else
  __trap();
#endif
}

// Writes a box back to global memory; the box belongs to the thread's next bulk group.
template <int R>
PYSEQNET_DEVICE void tma_store(const TensorMap* map, uint32_t src, const int (&at)[R]) {
  static_assert(R <= tma_dimensions);
#ifndef __CUDACC__
  cusim::tma_store(map, src, R, at, false);
#elif PYSEQNET_SM90
  PYSEQNET_TMA_BY_RANK(PYSEQNET_STORE_TEXT, ";", src, map, 0, uint16_t(0), at);
#else
  __trap();
#endif
}
// Adds a box to global memory, element by element, in no order: the sum of several is not deterministic.
template <int R>
PYSEQNET_DEVICE void tma_reduce_add(const TensorMap* map, uint32_t src, const int (&at)[R]) {
  static_assert(R <= tma_dimensions);
#ifndef __CUDACC__
  cusim::tma_store(map, src, R, at, true);
#elif PYSEQNET_SM90
  PYSEQNET_TMA_BY_RANK(PYSEQNET_REDUCE_TEXT, ";", src, map, 0, uint16_t(0), at);
#else
  __trap();
#endif
}
#undef PYSEQNET_AT1
#undef PYSEQNET_AT2
#undef PYSEQNET_AT3
#undef PYSEQNET_AT4
#undef PYSEQNET_AT5
#undef PYSEQNET_TMA
#undef PYSEQNET_TMA_BY_RANK
#undef PYSEQNET_LOAD_TEXT
#undef PYSEQNET_MULTICAST_TEXT
#undef PYSEQNET_STORE_TEXT
#undef PYSEQNET_REDUCE_TEXT

// Fetches the map itself, which lies in the kernel's parameters, ahead of its first use.
PYSEQNET_DEVICE void tma_prefetch_map(const TensorMap* map) {
#ifdef __CUDACC__
#if PYSEQNET_SM90
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
#else
  __trap();
#endif
#else
  (void)map;
#endif
}
// Contiguous bytes without a map: addresses and size are multiples of 16.
PYSEQNET_DEVICE void bulk_load(uint32_t dst, const void* src, uint32_t bytes, uint32_t bar) {
  PYSEQNET_PTX90(
      cusim::bulk_load(dst, src, bytes, bar),
      asm volatile(
          "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
              dst),
          "l"(src), "r"(bytes), "r"(bar) : "memory"));
}
PYSEQNET_DEVICE void bulk_store(void* dst, uint32_t src, uint32_t bytes) {
  PYSEQNET_PTX90(cusim::bulk_store(dst, src, bytes, cusim::Numbers::none),
                 asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(dst),
                              "r"(src), "r"(bytes) : "memory"));
}
// Adds floats to global memory, in no order.
PYSEQNET_DEVICE void bulk_reduce_add(float* dst, uint32_t src, uint32_t bytes) {
  PYSEQNET_PTX90(
      cusim::bulk_store(dst, src, bytes, cusim::Numbers::f32),
      asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(dst),
                   "r"(src), "r"(bytes) : "memory"));
}
PYSEQNET_DEVICE void bulk_commit() {
  PYSEQNET_PTX90(cusim::bulk_commit(), asm volatile("cp.async.bulk.commit_group;" :: : "memory"));
}
// Waits until at most N of the thread's bulk groups still read shared memory: their source may be
// overwritten, their results need not be visible.
template <int N>
PYSEQNET_DEVICE void bulk_wait_read() {
  PYSEQNET_PTX90(cusim::bulk_wait(N, true),
                 asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory"));
}
// Waits until at most N of the thread's bulk groups are unfinished.
template <int N>
PYSEQNET_DEVICE void bulk_wait() {
  PYSEQNET_PTX90(cusim::bulk_wait(N, false),
                 asm volatile("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory"));
}

// ---------------------------------------------------------------- sm_90: clusters
PYSEQNET_DEVICE void cluster_arrive() {
  PYSEQNET_PTX90(cusim::cluster_arrive(),
                 asm volatile("barrier.cluster.arrive.release.aligned;" :: : "memory"));
}
PYSEQNET_DEVICE void cluster_wait() {
  PYSEQNET_PTX90(cusim::cluster_wait(), asm volatile("barrier.cluster.wait.acquire.aligned;" :: : "memory"));
}
// All threads of all blocks of the cluster. Needed before the first access to another block (it may not have
// started) and after the last one (it must not have left).
PYSEQNET_DEVICE void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}
PYSEQNET_DEVICE uint32_t cluster_rank() {
#ifndef __CUDACC__
  return cusim::cluster_rank();
#elif PYSEQNET_SM90
  uint32_t r;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
#else
  __trap();
  return 0;
#endif
}
PYSEQNET_DEVICE uint32_t cluster_size() {
#ifndef __CUDACC__
  return cusim::cluster_size();
#elif PYSEQNET_SM90
  uint32_t r;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(r));
  return r;
#else
  __trap();
  return 1;
#endif
}
// The address of the same variable in block `rank`: for st_async.
PYSEQNET_DEVICE uint32_t map_shared(uint32_t addr, uint32_t rank) {
#ifndef __CUDACC__
  return cusim::mapa(addr, rank);
#elif PYSEQNET_SM90
  uint32_t r;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(addr), "r"(rank));
  return r;
#else
  __trap();
  return 0;
#endif
}
// Stores into another block without waiting; the bytes (4, or 16) count at `bar`, an mbarrier of that block.
PYSEQNET_DEVICE void st_async(uint32_t addr, float v, uint32_t bar) {
  PYSEQNET_PTX90(
      cusim::st_async(addr, &v, 1, bar),
      asm volatile(
          "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(addr),
          "f"(v), "r"(bar) : "memory"));
}
PYSEQNET_DEVICE void st_async(uint32_t addr, float4 v, uint32_t bar) {
  PYSEQNET_PTX90(
      cusim::st_async(addr, &v.x, 4, bar),
      asm volatile(
          "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1,%2,%3,%4}, [%5];" ::
              "r"(addr),
          "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w), "r"(bar) : "memory"));
}
template <class T>
PYSEQNET_DEVICE T* map_shared_rank(T* p, uint32_t rank) {  // DSMEM, generic pointer
#ifndef __CUDACC__
  return static_cast<T*>(cusim::map_shared_rank(p, rank));
#elif PYSEQNET_SM90
  uint64_t r;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(r) : "l"((uint64_t)p), "r"(rank));
  return reinterpret_cast<T*>(r);
#else
  __trap();
  return p;
#endif
}
// ---------------------------------------------------------------- sm_90a: register hand-over, wgmma
// Registers of a thread, a multiple of 8 from 24 to 256, for whole warpgroups: those that give up come first.
template <int N>
PYSEQNET_DEVICE void setmaxnreg_inc() {
#ifdef __CUDACC__
#if PYSEQNET_SM90A
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
#else
  __trap();
#endif
#endif
}
template <int N>
PYSEQNET_DEVICE void setmaxnreg_dec() {
#ifdef __CUDACC__
#if PYSEQNET_SM90A
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
#else
  __trap();
#endif
#endif
}
PYSEQNET_DEVICE void wgmma_fence() {
  PYSEQNET_PTX90A(cusim::wgmma_fence(), asm volatile("wgmma.fence.sync.aligned;" :: : "memory"));
}
// The same, and the compiler computes what these accumulators hold before it, not behind it (where ptxas would
// have to put a fence of its own).
template <int v>
PYSEQNET_DEVICE void wgmma_fence(float (&d)[v]) {
#ifdef __CUDACC__
#pragma unroll
  for (int i = 0; i < v; i++) asm volatile("" : "+f"(d[i])::"memory");
#else
  (void)d;
#endif
  wgmma_fence();
}
PYSEQNET_DEVICE void wgmma_commit() {
  PYSEQNET_PTX90A(cusim::wgmma_commit(), asm volatile("wgmma.commit_group.sync.aligned;" :: : "memory"));
}
template <int N>
PYSEQNET_DEVICE void wgmma_wait() {
  PYSEQNET_PTX90A(cusim::wgmma_wait(N),
                  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"));
}
// Descriptor of an operand in shared memory. Rows are those of A and of B^T (M and N), as long as the swizzle's
// span along the contiguous dimension; what lies outside one swizzle atom of eight rows is found through two
// strides in bytes. Distances in the layouts of CUTLASS, T elements of 16 bits (or 32: tf32 is K-major only):
//
//   K-major, swizzled       atom 8 rows x span of K; stride: from one group of 8 rows to the next (8 * span
//                           where they are dense); leading: not used. The next 16 of K: address + 32
//   MN-major, swizzled      atom 8 of K x span of rows; leading: from one span of rows to the next; stride:
//                           from 8 of K to the next 8. The next 16 of K: address + 2 * stride
//   K-major, no swizzle     atom 8 rows x 16 bytes of K; leading: to the next 16 bytes of K; stride: to the
//                           next 8 rows
//   MN-major, no swizzle    atom 8 of K x 16 bytes of rows; leading: to the next 8 of K; stride: to the next
//                           16 bytes of rows
PYSEQNET_DEVICE uint64_t wgmma_descriptor(uint32_t addr, uint32_t leading_bytes, uint32_t stride_bytes,
                                          Swizzle swizzle) {
  const uint64_t mode = swizzle == Swizzle::b128  ? 1
                        : swizzle == Swizzle::b64 ? 2
                        : swizzle == Swizzle::b32 ? 3
                                                  : 0;
  return uint64_t((addr & 0x3FFFF) >> 4) | uint64_t(leading_bytes >> 4) << 16 |
         uint64_t(stride_bytes >> 4) << 32 | mode << 62;
}
// K-major with dense rows of 128 bytes: what a TMA box with Swizzle::b128 is.
PYSEQNET_DEVICE uint64_t wgmma_desc_sw128(uint32_t addr, uint32_t leading_bytes = 16,
                                          uint32_t stride_bytes = 1024) {
  return wgmma_descriptor(addr, leading_bytes, stride_bytes, Swizzle::b128);
}

// D (64 x N of a warpgroup, float) = A B, or += where `accumulate` is not 0. N is twice the accumulators of a
// thread: any multiple of 8 up to 256. T: __nv_bfloat16 or __half, K = 16, or float (tf32), K = 8. Value
// 4 j + 2 i + e of lane l in warp w is D[16 w + 8 i + l / 4][8 j + 2 (l % 4) + e].
//   wgmma(d, a, b, accumulate)          A and B by descriptor; a_mn_major, b_mn_major: 1 where stored along M, N
//   wgmma(d, registers, b, accumulate)  A in registers, in the fragments of mma_m16n8k16 (tf32: m16n8k8)
// Registers of A and D may be touched again after wgmma_wait; between other writes to them and wgmma stands a
// wgmma_fence.
#ifndef __CUDACC__
template <class T>
constexpr cusim::Numbers numbers_of = std::is_same_v<T, float>    ? cusim::Numbers::f32
                                      : std::is_same_v<T, __half> ? cusim::Numbers::f16
                                                                  : cusim::Numbers::bf16;
template <class T, int a_mn_major = 0, int b_mn_major = 0, int v>
PYSEQNET_DEVICE void wgmma(float (&d)[v], uint64_t a, uint64_t b, int accumulate) {
  static_assert(v % 4 == 0 && v <= 128 && !(std::is_same_v<T, float> && (a_mn_major || b_mn_major)));
  cusim::wgmma(d, 2 * v, nullptr, a, b, accumulate, a_mn_major, b_mn_major, numbers_of<T>);
}
template <class T, int b_mn_major = 0, int v>
PYSEQNET_DEVICE void wgmma(float (&d)[v], const uint32_t (&a)[4], uint64_t b, int accumulate) {
  static_assert(v % 4 == 0 && v <= 128 && !(std::is_same_v<T, float> && b_mn_major));
  cusim::wgmma(d, 2 * v, a, 0, b, accumulate, false, b_mn_major, numbers_of<T>);
}
#elif PYSEQNET_SM90A
// clang-format off
#define PYSEQNET_F4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define PYSEQNET_NAMES_4 "%0,%1,%2,%3"
#define PYSEQNET_VALUES_4(d) PYSEQNET_F4(d, 0)
#define PYSEQNET_NAMES_8 PYSEQNET_NAMES_4 ",%4,%5,%6,%7"
#define PYSEQNET_VALUES_8(d) PYSEQNET_VALUES_4(d), PYSEQNET_F4(d, 4)
#define PYSEQNET_NAMES_12 PYSEQNET_NAMES_8 ",%8,%9,%10,%11"
#define PYSEQNET_VALUES_12(d) PYSEQNET_VALUES_8(d), PYSEQNET_F4(d, 8)
#define PYSEQNET_NAMES_16 PYSEQNET_NAMES_12 ",%12,%13,%14,%15"
#define PYSEQNET_VALUES_16(d) PYSEQNET_VALUES_12(d), PYSEQNET_F4(d, 12)
#define PYSEQNET_NAMES_20 PYSEQNET_NAMES_16 ",%16,%17,%18,%19"
#define PYSEQNET_VALUES_20(d) PYSEQNET_VALUES_16(d), PYSEQNET_F4(d, 16)
#define PYSEQNET_NAMES_24 PYSEQNET_NAMES_20 ",%20,%21,%22,%23"
#define PYSEQNET_VALUES_24(d) PYSEQNET_VALUES_20(d), PYSEQNET_F4(d, 20)
#define PYSEQNET_NAMES_28 PYSEQNET_NAMES_24 ",%24,%25,%26,%27"
#define PYSEQNET_VALUES_28(d) PYSEQNET_VALUES_24(d), PYSEQNET_F4(d, 24)
#define PYSEQNET_NAMES_32 PYSEQNET_NAMES_28 ",%28,%29,%30,%31"
#define PYSEQNET_VALUES_32(d) PYSEQNET_VALUES_28(d), PYSEQNET_F4(d, 28)
#define PYSEQNET_NAMES_36 PYSEQNET_NAMES_32 ",%32,%33,%34,%35"
#define PYSEQNET_VALUES_36(d) PYSEQNET_VALUES_32(d), PYSEQNET_F4(d, 32)
#define PYSEQNET_NAMES_40 PYSEQNET_NAMES_36 ",%36,%37,%38,%39"
#define PYSEQNET_VALUES_40(d) PYSEQNET_VALUES_36(d), PYSEQNET_F4(d, 36)
#define PYSEQNET_NAMES_44 PYSEQNET_NAMES_40 ",%40,%41,%42,%43"
#define PYSEQNET_VALUES_44(d) PYSEQNET_VALUES_40(d), PYSEQNET_F4(d, 40)
#define PYSEQNET_NAMES_48 PYSEQNET_NAMES_44 ",%44,%45,%46,%47"
#define PYSEQNET_VALUES_48(d) PYSEQNET_VALUES_44(d), PYSEQNET_F4(d, 44)
#define PYSEQNET_NAMES_52 PYSEQNET_NAMES_48 ",%48,%49,%50,%51"
#define PYSEQNET_VALUES_52(d) PYSEQNET_VALUES_48(d), PYSEQNET_F4(d, 48)
#define PYSEQNET_NAMES_56 PYSEQNET_NAMES_52 ",%52,%53,%54,%55"
#define PYSEQNET_VALUES_56(d) PYSEQNET_VALUES_52(d), PYSEQNET_F4(d, 52)
#define PYSEQNET_NAMES_60 PYSEQNET_NAMES_56 ",%56,%57,%58,%59"
#define PYSEQNET_VALUES_60(d) PYSEQNET_VALUES_56(d), PYSEQNET_F4(d, 56)
#define PYSEQNET_NAMES_64 PYSEQNET_NAMES_60 ",%60,%61,%62,%63"
#define PYSEQNET_VALUES_64(d) PYSEQNET_VALUES_60(d), PYSEQNET_F4(d, 60)
#define PYSEQNET_NAMES_68 PYSEQNET_NAMES_64 ",%64,%65,%66,%67"
#define PYSEQNET_VALUES_68(d) PYSEQNET_VALUES_64(d), PYSEQNET_F4(d, 64)
#define PYSEQNET_NAMES_72 PYSEQNET_NAMES_68 ",%68,%69,%70,%71"
#define PYSEQNET_VALUES_72(d) PYSEQNET_VALUES_68(d), PYSEQNET_F4(d, 68)
#define PYSEQNET_NAMES_76 PYSEQNET_NAMES_72 ",%72,%73,%74,%75"
#define PYSEQNET_VALUES_76(d) PYSEQNET_VALUES_72(d), PYSEQNET_F4(d, 72)
#define PYSEQNET_NAMES_80 PYSEQNET_NAMES_76 ",%76,%77,%78,%79"
#define PYSEQNET_VALUES_80(d) PYSEQNET_VALUES_76(d), PYSEQNET_F4(d, 76)
#define PYSEQNET_NAMES_84 PYSEQNET_NAMES_80 ",%80,%81,%82,%83"
#define PYSEQNET_VALUES_84(d) PYSEQNET_VALUES_80(d), PYSEQNET_F4(d, 80)
#define PYSEQNET_NAMES_88 PYSEQNET_NAMES_84 ",%84,%85,%86,%87"
#define PYSEQNET_VALUES_88(d) PYSEQNET_VALUES_84(d), PYSEQNET_F4(d, 84)
#define PYSEQNET_NAMES_92 PYSEQNET_NAMES_88 ",%88,%89,%90,%91"
#define PYSEQNET_VALUES_92(d) PYSEQNET_VALUES_88(d), PYSEQNET_F4(d, 88)
#define PYSEQNET_NAMES_96 PYSEQNET_NAMES_92 ",%92,%93,%94,%95"
#define PYSEQNET_VALUES_96(d) PYSEQNET_VALUES_92(d), PYSEQNET_F4(d, 92)
#define PYSEQNET_NAMES_100 PYSEQNET_NAMES_96 ",%96,%97,%98,%99"
#define PYSEQNET_VALUES_100(d) PYSEQNET_VALUES_96(d), PYSEQNET_F4(d, 96)
#define PYSEQNET_NAMES_104 PYSEQNET_NAMES_100 ",%100,%101,%102,%103"
#define PYSEQNET_VALUES_104(d) PYSEQNET_VALUES_100(d), PYSEQNET_F4(d, 100)
#define PYSEQNET_NAMES_108 PYSEQNET_NAMES_104 ",%104,%105,%106,%107"
#define PYSEQNET_VALUES_108(d) PYSEQNET_VALUES_104(d), PYSEQNET_F4(d, 104)
#define PYSEQNET_NAMES_112 PYSEQNET_NAMES_108 ",%108,%109,%110,%111"
#define PYSEQNET_VALUES_112(d) PYSEQNET_VALUES_108(d), PYSEQNET_F4(d, 108)
#define PYSEQNET_NAMES_116 PYSEQNET_NAMES_112 ",%112,%113,%114,%115"
#define PYSEQNET_VALUES_116(d) PYSEQNET_VALUES_112(d), PYSEQNET_F4(d, 112)
#define PYSEQNET_NAMES_120 PYSEQNET_NAMES_116 ",%116,%117,%118,%119"
#define PYSEQNET_VALUES_120(d) PYSEQNET_VALUES_116(d), PYSEQNET_F4(d, 116)
#define PYSEQNET_NAMES_124 PYSEQNET_NAMES_120 ",%120,%121,%122,%123"
#define PYSEQNET_VALUES_124(d) PYSEQNET_VALUES_120(d), PYSEQNET_F4(d, 120)
#define PYSEQNET_NAMES_128 PYSEQNET_NAMES_124 ",%124,%125,%126,%127"
#define PYSEQNET_VALUES_128(d) PYSEQNET_VALUES_124(d), PYSEQNET_F4(d, 124)
// v: accumulators of a thread; n: columns; i0 ...: the operands behind them, by number.
#define PYSEQNET_WGMMA(v, n, i0, i1, i2, i3, i4, i5, i6)                                                     \
  template <class T, int a_mn_major = 0, int b_mn_major = 0>                                                 \
  PYSEQNET_DEVICE void wgmma(float (&d)[v], uint64_t a, uint64_t b, int accumulate) {                        \
    if constexpr (std::is_same_v<T, float>) {                                                                \
      static_assert(!a_mn_major && !b_mn_major, "tf32 is K-major");                                          \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #i2                                                  \
                   ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n "k8.f32.tf32.tf32 {" PYSEQNET_NAMES_##v     \
                   "}, %" #i0 ", %" #i1 ", p, 1, 1;\n}"                                                      \
                   : PYSEQNET_VALUES_##v(d)                                                                  \
                   : "l"(a), "l"(b), "r"(accumulate));                                                       \
    } else if constexpr (std::is_same_v<T, __half>) {                                                        \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #i2                                                  \
                   ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n "k16.f32.f16.f16 {" PYSEQNET_NAMES_##v      \
                   "}, %" #i0 ", %" #i1 ", p, 1, 1, %" #i3 ", %" #i4 ";\n}"                                  \
                   : PYSEQNET_VALUES_##v(d)                                                                  \
                   : "l"(a), "l"(b), "r"(accumulate), "n"(a_mn_major), "n"(b_mn_major));                     \
    } else {                                                                                                 \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #i2                                                  \
                   ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 {" PYSEQNET_NAMES_##v    \
                   "}, %" #i0 ", %" #i1 ", p, 1, 1, %" #i3 ", %" #i4 ";\n}"                                  \
                   : PYSEQNET_VALUES_##v(d)                                                                  \
                   : "l"(a), "l"(b), "r"(accumulate), "n"(a_mn_major), "n"(b_mn_major));                     \
    }                                                                                                        \
  }                                                                                                          \
  template <class T, int b_mn_major = 0>                                                                     \
  PYSEQNET_DEVICE void wgmma(float (&d)[v], const uint32_t (&a)[4], uint64_t b, int accumulate) {            \
    if constexpr (std::is_same_v<T, float>) {                                                                \
      static_assert(!b_mn_major, "tf32 is K-major");                                                         \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #i5                                                  \
                   ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n "k8.f32.tf32.tf32 {" PYSEQNET_NAMES_##v     \
                   "}, {%" #i0 ",%" #i1 ",%" #i2 ",%" #i3 "}, %" #i4 ", p, 1, 1;\n}"                         \
                   : PYSEQNET_VALUES_##v(d)                                                                  \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));                   \
    } else if constexpr (std::is_same_v<T, __half>) {                                                        \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #i5                                                  \
                   ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n "k16.f32.f16.f16 {" PYSEQNET_NAMES_##v      \
                   "}, {%" #i0 ",%" #i1 ",%" #i2 ",%" #i3 "}, %" #i4 ", p, 1, 1, %" #i6 ";\n}"               \
                   : PYSEQNET_VALUES_##v(d)                                                                  \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(b_mn_major));  \
    } else {                                                                                                 \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #i5                                                  \
                   ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 {" PYSEQNET_NAMES_##v    \
                   "}, {%" #i0 ",%" #i1 ",%" #i2 ",%" #i3 "}, %" #i4 ", p, 1, 1, %" #i6 ";\n}"               \
                   : PYSEQNET_VALUES_##v(d)                                                                  \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(b_mn_major));  \
    }                                                                                                        \
  }
PYSEQNET_WGMMA(4, 8, 4, 5, 6, 7, 8, 9, 10)
PYSEQNET_WGMMA(8, 16, 8, 9, 10, 11, 12, 13, 14)
PYSEQNET_WGMMA(12, 24, 12, 13, 14, 15, 16, 17, 18)
PYSEQNET_WGMMA(16, 32, 16, 17, 18, 19, 20, 21, 22)
PYSEQNET_WGMMA(20, 40, 20, 21, 22, 23, 24, 25, 26)
PYSEQNET_WGMMA(24, 48, 24, 25, 26, 27, 28, 29, 30)
PYSEQNET_WGMMA(28, 56, 28, 29, 30, 31, 32, 33, 34)
PYSEQNET_WGMMA(32, 64, 32, 33, 34, 35, 36, 37, 38)
PYSEQNET_WGMMA(36, 72, 36, 37, 38, 39, 40, 41, 42)
PYSEQNET_WGMMA(40, 80, 40, 41, 42, 43, 44, 45, 46)
PYSEQNET_WGMMA(44, 88, 44, 45, 46, 47, 48, 49, 50)
PYSEQNET_WGMMA(48, 96, 48, 49, 50, 51, 52, 53, 54)
PYSEQNET_WGMMA(52, 104, 52, 53, 54, 55, 56, 57, 58)
PYSEQNET_WGMMA(56, 112, 56, 57, 58, 59, 60, 61, 62)
PYSEQNET_WGMMA(60, 120, 60, 61, 62, 63, 64, 65, 66)
PYSEQNET_WGMMA(64, 128, 64, 65, 66, 67, 68, 69, 70)
PYSEQNET_WGMMA(68, 136, 68, 69, 70, 71, 72, 73, 74)
PYSEQNET_WGMMA(72, 144, 72, 73, 74, 75, 76, 77, 78)
PYSEQNET_WGMMA(76, 152, 76, 77, 78, 79, 80, 81, 82)
PYSEQNET_WGMMA(80, 160, 80, 81, 82, 83, 84, 85, 86)
PYSEQNET_WGMMA(84, 168, 84, 85, 86, 87, 88, 89, 90)
PYSEQNET_WGMMA(88, 176, 88, 89, 90, 91, 92, 93, 94)
PYSEQNET_WGMMA(92, 184, 92, 93, 94, 95, 96, 97, 98)
PYSEQNET_WGMMA(96, 192, 96, 97, 98, 99, 100, 101, 102)
PYSEQNET_WGMMA(100, 200, 100, 101, 102, 103, 104, 105, 106)
PYSEQNET_WGMMA(104, 208, 104, 105, 106, 107, 108, 109, 110)
PYSEQNET_WGMMA(108, 216, 108, 109, 110, 111, 112, 113, 114)
PYSEQNET_WGMMA(112, 224, 112, 113, 114, 115, 116, 117, 118)
PYSEQNET_WGMMA(116, 232, 116, 117, 118, 119, 120, 121, 122)
PYSEQNET_WGMMA(120, 240, 120, 121, 122, 123, 124, 125, 126)
PYSEQNET_WGMMA(124, 248, 124, 125, 126, 127, 128, 129, 130)
PYSEQNET_WGMMA(128, 256, 128, 129, 130, 131, 132, 133, 134)
#undef PYSEQNET_WGMMA
// clang-format on
#else
template <class T, int a_mn_major = 0, int b_mn_major = 0, int v>
PYSEQNET_DEVICE void wgmma(float (&)[v], uint64_t, uint64_t, int) {
  __trap();
}
template <class T, int b_mn_major = 0, int v>
PYSEQNET_DEVICE void wgmma(float (&)[v], const uint32_t (&)[4], uint64_t, int) {
  __trap();
}
#endif

}  // namespace pyseqnet::ptx

#undef PYSEQNET_PTX
#undef PYSEQNET_PTX90
#undef PYSEQNET_PTX90A
