// Thin wrappers, one for each PTX instruction that kernels use. Kernels contain no asm: what is not plain
// CUDA C++ comes from here. Each wrapper has two bodies, inline asm for the device and a call into the test
// simulator for the host (see launch.cuh).
//
// Architectures: mma.sync, ldmatrix and cp.async need sm_80; mbarrier, TMA and clusters sm_90
// (PYSEQNET_SM90); wgmma and setmaxnreg sm_90a alone (PYSEQNET_SM90A). A wrapper that is called on a device
// compiled without its instruction traps.
#pragma once
#include "common/launch.cuh"

#ifdef __CUDACC__
#include <cuda.h>
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

namespace pyseqnet::ptx {

PYSEQNET_DEVICE uint32_t smem_u32(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

// ---------------------------------------------------------------- mma.sync
PYSEQNET_DEVICE void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                       const float (&c)[4]) {
#ifdef __CUDACC__
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%10,%11,%12,%13};\n"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]),
        "f"(c[3]));
#else
  cusim::mma(cusim::Mma::bf16_16816, d, a, b, c);
#endif
}
PYSEQNET_DEVICE void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                      const float (&c)[4]) {
#ifdef __CUDACC__
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%10,%11,%12,%13};\n"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]),
        "f"(c[3]));
#else
  cusim::mma(cusim::Mma::f16_16816, d, a, b, c);
#endif
}
PYSEQNET_DEVICE void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                      const float (&c)[4]) {
#ifdef __CUDACC__
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%10,%11,%12,%13};\n"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]),
        "f"(c[3]));
#else
  cusim::mma(cusim::Mma::tf32_1688, d, a, b, c);
#endif
}
// ---------------------------------------------------------------- ldmatrix
PYSEQNET_DEVICE void ldmatrix_x4(uint32_t (&r)[4], uint32_t addr) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(addr)
               : "memory");
#else
  cusim::ldmatrix(r, 4, false, addr);
#endif
}
PYSEQNET_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t addr) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(addr)
               : "memory");
#else
  cusim::ldmatrix(r, 4, true, addr);
#endif
}
// sm_90. The inverse of ldmatrix: each of lanes 8i .. 8i+7 names a 16-byte row of matrix i.
PYSEQNET_DEVICE void stmatrix_x4(uint32_t addr, const uint32_t (&r)[4]) {
#ifndef __CUDACC__
  cusim::stmatrix(r, 4, false, addr);
#elif PYSEQNET_SM90
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};\n" ::"r"(addr), "r"(r[0]),
               "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
#else
  __trap();
#endif
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
PYSEQNET_DEVICE void cp_async_commit() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;\n" ::: "memory");
#else
  cusim::cp_async_commit();
#endif
}
template <int N>
PYSEQNET_DEVICE void cp_async_wait() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;\n" ::"n"(N) : "memory");
#else
  cusim::cp_async_wait(N);
#endif
}
// ---------------------------------------------------------------- scalar helpers
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
// ---------------------------------------------------------------- memory model
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
#ifdef __CUDACC__
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
#else
  cusim::atomic_add(p, v);
#endif
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
PYSEQNET_DEVICE void bar_sync(int id, int n) {
#ifdef __CUDACC__
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(n) : "memory");
#else
  cusim::sync_block(id, n, false);
#endif
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

// ---------------------------------------------------------------- sm_90: mbarrier, TMA, clusters
#ifdef __CUDACC__
using TensorMap = CUtensorMap;
#else
using TensorMap = cusim::TensorMap;
#endif
PYSEQNET_DEVICE void mbar_init(uint32_t bar, uint32_t count) {
#ifndef __CUDACC__
  cusim::mbar_init(bar, count);
#elif PYSEQNET_SM90
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
#else
  __trap();
#endif
}
PYSEQNET_DEVICE void mbar_fence_init() {
#ifdef __CUDACC__
#if PYSEQNET_SM90
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#else
  __trap();
#endif
#endif
}
PYSEQNET_DEVICE void mbar_arrive_expect_tx(uint32_t bar, uint32_t bytes) {
#ifndef __CUDACC__
  cusim::mbar_arrive(bar, 1, bytes);
#elif PYSEQNET_SM90
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
#else
  __trap();
#endif
}
PYSEQNET_DEVICE void mbar_arrive(uint32_t bar) {
#ifndef __CUDACC__
  cusim::mbar_arrive(bar, 1, 0);
#elif PYSEQNET_SM90
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
#else
  __trap();
#endif
}
PYSEQNET_DEVICE void mbar_arrive_cluster(uint32_t bar, uint32_t cta) {  // remote arrive
#ifndef __CUDACC__
  cusim::mbar_arrive(cusim::mapa(bar, cta), 1, 0);
#elif PYSEQNET_SM90
  asm volatile(
      "{\n.reg .b32 ra;\nmapa.shared::cluster.u32 ra, %0, "
      "%1;\nmbarrier.arrive.release.cluster.shared::cluster.b64 _, [ra];\n}" ::"r"(bar),
      "r"(cta)
      : "memory");
#else
  __trap();
#endif
}
PYSEQNET_DEVICE void mbar_wait(uint32_t bar, uint32_t parity) {
#ifndef __CUDACC__
  cusim::mbar_wait(bar, parity);
#elif PYSEQNET_SM90
  asm volatile(
      "{\n.reg .pred p;\nW: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra.uni D;\nbra.uni "
      "W;\nD:\n}" ::"r"(bar),
      "r"(parity)
      : "memory");
#else
  __trap();
#endif
}
PYSEQNET_DEVICE void fence_async_proxy() {
#ifndef __CUDACC__
  cusim::fence_async_proxy();
#elif PYSEQNET_SM90
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#else
  __trap();
#endif
}
PYSEQNET_DEVICE void tma_load_2d(uint32_t dst, const TensorMap* map, int x, int y, uint32_t bar) {
#ifndef __CUDACC__
  cusim::tma_load_2d(dst, map, x, y, bar, 0);
#elif PYSEQNET_SM90
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], "
      "[%2];" ::"r"(dst),
      "l"(map), "r"(bar), "r"(x), "r"(y)
      : "memory");
#else
  __trap();
#endif
}
PYSEQNET_DEVICE void tma_load_2d_multicast(uint32_t dst, const TensorMap* map, int x, int y, uint32_t bar,
                                           uint16_t mask) {
#ifndef __CUDACC__
  cusim::tma_load_2d(dst, map, x, y, bar, mask);
#elif PYSEQNET_SM90
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1, {%3, %4}], [%2], %5;" ::"r"(dst),
      "l"(map), "r"(bar), "r"(x), "r"(y), "h"(mask)
      : "memory");
#else
  __trap();
#endif
}
// Writes a box back to global memory; the box belongs to the thread's next bulk group.
PYSEQNET_DEVICE void tma_store_2d(const TensorMap* map, uint32_t src, int x, int y) {
#ifndef __CUDACC__
  cusim::tma_store_2d(map, src, x, y);
#elif PYSEQNET_SM90
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
               "r"(src), "r"(x), "r"(y)
               : "memory");
#else
  __trap();
#endif
}
PYSEQNET_DEVICE void bulk_commit() {
#ifndef __CUDACC__
  cusim::bulk_commit();
#elif PYSEQNET_SM90
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#else
  __trap();
#endif
}
// Waits until at most N groups still read shared memory.
template <int N>
PYSEQNET_DEVICE void bulk_wait_read() {
#ifndef __CUDACC__
  cusim::bulk_wait(N, true);
#elif PYSEQNET_SM90
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
#else
  __trap();
#endif
}
PYSEQNET_DEVICE void cluster_sync() {
#ifndef __CUDACC__
  cusim::cluster_arrive();
  cusim::cluster_wait();
#elif PYSEQNET_SM90
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __trap();
#endif
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
#ifndef __CUDACC__
  cusim::wgmma_fence();
#elif PYSEQNET_SM90A
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#else
  __trap();
#endif
}
PYSEQNET_DEVICE void wgmma_commit() {
#ifndef __CUDACC__
  cusim::wgmma_commit();
#elif PYSEQNET_SM90A
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#else
  __trap();
#endif
}
template <int N>
PYSEQNET_DEVICE void wgmma_wait() {
#ifndef __CUDACC__
  cusim::wgmma_wait(N);
#elif PYSEQNET_SM90A
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
#else
  __trap();
#endif
}
// Shared-memory matrix descriptor, 128-byte swizzle, K-major: rows of 128 bytes, groups of 8 rows = 1024
// bytes.
PYSEQNET_DEVICE uint64_t wgmma_desc_sw128(uint32_t addr, uint32_t lbo_bytes = 16, uint32_t sbo_bytes = 1024) {
  return (uint64_t)((addr & 0x3FFFF) >> 4) | (uint64_t)(lbo_bytes >> 4) << 16 |
         (uint64_t)(sbo_bytes >> 4) << 32 | (uint64_t)1 << 62;
}
#define PYSEQNET_R4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define PYSEQNET_R16(d, i) \
  PYSEQNET_R4(d, i), PYSEQNET_R4(d, i + 4), PYSEQNET_R4(d, i + 8), PYSEQNET_R4(d, i + 12)
// D[64xN per warpgroup] (+)= A(smem, K-major) * B(smem, K-major or MN-major). N = 128.
template <int TransB = 0>
PYSEQNET_DEVICE void wgmma_m64n128k16_bf16(float (&d)[64], uint64_t da, uint64_t db, int scale_d) {
#ifndef __CUDACC__
  cusim::wgmma(d, 128, nullptr, da, db, scale_d, false, TransB, true);
#elif PYSEQNET_SM90A
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%"
      "27,%28,%29,%30,%31,"
      "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%"
      "57,%58,%59,%60,%61,%62,%63},"
      " %64, %65, p, 1, 1, 0, %67;\n}\n"
      : PYSEQNET_R16(d, 0), PYSEQNET_R16(d, 16), PYSEQNET_R16(d, 32), PYSEQNET_R16(d, 48)
      : "l"(da), "l"(db), "r"(scale_d), "n"(TransB));
#else
  __trap();
#endif
}

#undef PYSEQNET_R4
#undef PYSEQNET_R16
}  // namespace pyseqnet::ptx

namespace pyseqnet {

// Host: describes a row-major matrix of bfloat16 (rows x cols, `row_elements` apart) whose boxes of box_rows
// x box_cols TMA moves with the 128-byte swizzle. Returns 0, or a cudaError_t.
inline int make_tensor_map_2d(ptx::TensorMap* map, const void* base, uint64_t rows, uint64_t cols,
                              uint64_t row_elements, uint32_t box_rows, uint32_t box_cols) {
#ifdef __CUDACC__
  // The driver's function comes through the runtime, so that nothing links against libcuda.
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found;
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
  if (error != cudaSuccess) return int(error);
  if (found != cudaDriverEntryPointSuccess || !entry) return int(cudaErrorNotSupported);
  const cuuint64_t extent[2] = {cols, rows}, stride_bytes[1] = {row_elements * 2};
  const cuuint32_t box[2] = {box_cols, box_rows}, element_stride[2] = {1, 1};
  const CUresult result = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry)(
      map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void*>(base), extent, stride_bytes, box,
      element_stride, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? 0 : int(cudaErrorInvalidValue);
#else
  *map = {const_cast<char*>(static_cast<const char*>(base)),
          {cols, rows},
          row_elements * 2,
          {box_cols, box_rows},
          2,
          128};
  return 0;
#endif
}

}  // namespace pyseqnet
