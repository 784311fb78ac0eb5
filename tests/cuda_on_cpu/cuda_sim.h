// The vocabulary of CUDA for a host compiler, so that kernel source runs on the CPU, for tests. Included by
// common/launch.cuh instead of the CUDA runtime; nvcc never sees it. The types and conversions (bfloat16,
// float16, vectors, dim3) are the toolkit's own headers. README.md says what the simulator catches.
#pragma once
#ifdef __CUDACC__
#error "cuda_sim.h is for host compilers only"
#endif
#define CUSIM 1

// These must be set before the toolkit headers see them (they honour #ifndef).
#define __shared__ CUSIM_plain___shared___is_not_supported_use_PYSEQNET_SHARED
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <vector_functions.h>
#include <vector_types.h>
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __cluster_dims__
#define __cluster_dims__(...)

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

namespace cusim {

// ---------------------------------------------------------------- per-thread view
struct Block;
struct Warp;
struct Thread {  // public part first: kernels read these through macros
  uint3 tid, bid;
  dim3 bdim, gdim;
  int lane, warp, lin;  // lane in warp, warp in block, linear thread in block
  int gid;              // index among resident threads (race detector)
  Block* blk;
  Warp* wp;
  struct ThreadState* p;
};
extern Thread* cur;  // running CUDA thread; null on the host side

// ---------------------------------------------------------------- launch / configuration
struct Config {
  dim3 grid{1, 1, 1}, block{1, 1, 1}, cluster{1, 1, 1};
  unsigned smem = 0;
  bool cooperative = false;
};
enum Policy : int { kInOrder = 0, kRandom = 1, kPct = 2, kReverse = 3, kAuto = 99 };
struct Options {
  uint64_t seed = 1;
  int policy = kAuto;          // kAuto: chosen from the seed
  int async_mode = -1;         // -1 random per op, 0 as late as possible, 1 at issue
  bool strict_barrier = true;  // __syncthreads while other threads of the block have exited = error
  int max_resident = 1;        // >1: run several independent blocks interleaved
};
extern Options opt;
struct Stats {
  uint64_t switches, collectives, barriers, mma, mem_checks, async_ops;
  double seconds;
};
extern Stats stats;

// Runs thunk(arg) as every CUDA thread of the grid. Returns 0, or 1 where a fault was found (deadlock, race,
// out of bounds ...): last_error() has the words. `kernel` is the address that launched_kernels() will name.
int run(const Config&, const void* kernel, void (*thunk)(void*), void* arg);
const char* last_error();  // sticky until clear_error()
void clear_error();
int error_count();
void note_launch(const void* kernel);
void append_launched_kernels(const char* path);  // one demangled name a line
[[noreturn]] void fail(const char* fmt, ...) __attribute__((format(printf, 1, 2)));
void report(const char* fmt, ...) __attribute__((format(printf, 1, 2)));  // record, do not stop

// Device heap: guard-paged, NaN-poisoned, known to the race/bounds checker.
void* dmalloc(size_t bytes, const char* name);
void dfree_all();
bool instrumented();  // true when the kernels were built with -fsanitize=thread hooks

// ---------------------------------------------------------------- synchronisation
void sync_block(int id, int nthreads, bool arrive_only);  // bar.sync / bar.arrive
int sync_block_count(bool predicate);  // __syncthreads, and in how many threads the predicate is true
void sync_warp(uint32_t mask);
void sync_grid();
void cluster_arrive();
void cluster_wait();
void yield(void* pc = nullptr);  // every spin loop must reach this (nanosleep, ld.acquire, try_wait)
bool collective_arrive(uint32_t mask, int op, void* arg);  // true: caller is last, must compute + release
void collective_release(uint32_t mask);

// ---------------------------------------------------------------- shared memory
char* smem_dynamic();
void* smem_static(const void* tag, size_t bytes, size_t align);
uint32_t smem_addr(const void* p);  // generic -> shared window offset (aborts when not shared)
char* smem_ptr(uint32_t addr, size_t bytes, const char* what);  // shared (or shared::cluster) -> host pointer
uint32_t mapa(uint32_t addr, uint32_t rank);
void* map_shared_rank(const void* p, uint32_t rank);
uint32_t cluster_rank();
uint32_t cluster_size();

extern bool checks_on;
#define CUSIM_PC __builtin_return_address(0)

// ---------------------------------------------------------------- atomics (out of line: never instrumented)
#define CUSIM_ATOMIC_OPS(T)  \
  T atomic_add(T*, T);       \
  T atomic_exch(T*, T);      \
  T atomic_cas(T*, T, T);    \
  T atomic_max(T*, T);       \
  T atomic_min(T*, T);       \
  T load_acquire(const T*);  \
  void store_release(T*, T); \
  T load_relaxed(const T*);  \
  void store_relaxed(T*, T);
CUSIM_ATOMIC_OPS(int)
CUSIM_ATOMIC_OPS(unsigned)
CUSIM_ATOMIC_OPS(unsigned long long)
CUSIM_ATOMIC_OPS(float)
CUSIM_ATOMIC_OPS(double)
#undef CUSIM_ATOMIC_OPS
int atomic_and(int*, int);
int atomic_or(int*, int);
int atomic_xor(int*, int);
unsigned atomic_and(unsigned*, unsigned);
unsigned atomic_or(unsigned*, unsigned);
unsigned atomic_xor(unsigned*, unsigned);
__half2 atomic_add(__half2*, __half2);
__nv_bfloat162 atomic_add(__nv_bfloat162*, __nv_bfloat162);

void red_release_add(unsigned*, unsigned);  // unlike atomic_add, it needs no fence before it
void fence();

// ---------------------------------------------------------------- warp data exchange
enum Op { kShfl = 1, kVote, kMatch, kMma, kLdsm, kWgmma, kWgCommit, kWgWait, kRedux, kElect };
struct alignas(16) ShflArg {  // a host compiler may write both numbers as one vector
  uint64_t v, out;
  int src;
};
void shfl(uint32_t mask, ShflArg* a);
uint32_t vote(uint32_t mask, bool pred);
uint32_t exists(uint32_t mask);                 // without the lanes that a partial last warp lacks
uint32_t match_any(uint32_t mask, uint64_t v);  // lanes of the mask with the same value
enum class Reduce { add, min, max, land, lor, lxor };
uint32_t reduce(uint32_t mask, Reduce, bool is_signed, uint32_t v);
bool elect_one();
template <class T>
inline T shfl_any(uint32_t mask, T v, int src) {
  static_assert(sizeof(T) <= 8);
  ShflArg a{0, 0, src};
  std::memcpy(&a.v, (const void*)&v, sizeof(T));
  shfl(mask, &a);
  T r;
  std::memcpy((void*)&r, &a.out, sizeof(T));
  return r;
}

// ---------------------------------------------------------------- PTX level
enum class Mma { bf16_16816, f16_16816, tf32_1688 };
void mma(Mma, float* d, const uint32_t* a, const uint32_t* b, const float* c);
void ldmatrix(uint32_t* r, int num, bool trans, uint32_t addr);
void stmatrix(const uint32_t* r, int num, bool trans, uint32_t addr);
void cp_async(uint32_t dst, const void* src, int bytes, int src_bytes);
void cp_async_commit();
void cp_async_wait(int n);
// Hopper
void mbar_init(uint32_t a, uint32_t count);
void mbar_inval(uint32_t a);
void mbar_arrive(uint32_t a, uint32_t count, uint32_t tx);  // a may be shared::cluster
void mbar_expect_tx(uint32_t a, uint32_t tx);
bool mbar_try_wait(uint32_t a, uint32_t parity);
void mbar_wait(uint32_t a, uint32_t parity);
void mbar_arrive_cp_async(uint32_t a);
void st_async(uint32_t addr, const float* v, int n, uint32_t mbar);
void fence_async_proxy(bool global);
enum class Numbers { none, f32, bf16, f16, f64 };
struct TensorMap {  // stand-in for CUtensorMap: see common/tensor_map.cuh
  char* base;
  int rank, element_bytes, swizzle;  // swizzle: span in bytes, 0 for none
  Numbers numbers;
  uint64_t extent[5], stride[5];  // elements, bytes
  uint32_t step[5];
  uint32_t box[5];  // tiled
  bool im2col;
  int lower[3], upper[3];
  uint32_t channels, pixels;
};
int check_tiled(const TensorMap&);  // 0, or not 0 and a report of the rule that the map breaks
int check_im2col(const TensorMap&);
void tma_load(uint32_t dst, const TensorMap* m, int rank, const int* at, uint32_t mbar, uint16_t blocks);
void tma_load_im2col(uint32_t dst, const TensorMap* m, int rank, const int* at, const uint16_t* tap,
                     uint32_t mbar, uint16_t blocks);
void tma_store(const TensorMap* m, uint32_t src, int rank, const int* at, bool add);
void bulk_load(uint32_t dst, const void* src, uint32_t bytes, uint32_t mbar);
void bulk_store(void* dst, uint32_t src, uint32_t bytes, Numbers add);
void bulk_commit();
void bulk_wait(int n, bool read);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int n);
void wgmma(float* d, int n, const uint32_t* a_regs, uint64_t desc_a, uint64_t desc_b, bool scale_d,
           bool a_mn_major, bool b_mn_major, Numbers);

uint64_t rng();
}  // namespace cusim

// ================================================================ CUDA names
#define threadIdx (::cusim::cur->tid)
#define blockIdx (::cusim::cur->bid)
#define blockDim (::cusim::cur->bdim)
#define gridDim (::cusim::cur->gdim)
static constexpr int warpSize = 32;

inline void __syncthreads() { ::cusim::sync_block(0, -1, false); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { ::cusim::sync_warp(mask); }
inline int __syncthreads_count(int p) { return ::cusim::sync_block_count(p != 0); }
inline int __syncthreads_or(int p) { return ::cusim::sync_block_count(p != 0) != 0; }
inline int __syncthreads_and(int p) { return ::cusim::sync_block_count(p == 0) == 0; }
inline void __threadfence() { ::cusim::fence(); }
inline void __threadfence_block() { ::cusim::fence(); }
inline void __threadfence_system() { ::cusim::fence(); }
inline void __nanosleep(unsigned) { ::cusim::yield(); }
[[noreturn]] inline void __trap() { ::cusim::fail("__trap()"); }
inline long long clock64() {
  static long long c;
  return c += 17;
}

namespace cusim {
inline int seg_src(int lane, int w, int s) { return (lane & ~(w - 1)) + (s & (w - 1)); }
}  // namespace cusim
template <class T>
inline T __shfl_sync(unsigned m, T v, int src, int w = 32) {
  return cusim::shfl_any(m, v, cusim::seg_src(cusim::cur->lane, w, src));
}
template <class T>
inline T __shfl_xor_sync(unsigned m, T v, int x, int w = 32) {
  int l = cusim::cur->lane, s = l ^ x;
  if ((s & ~(w - 1)) > (l & ~(w - 1))) s = l;
  return cusim::shfl_any(m, v, s);
}
template <class T>
inline T __shfl_up_sync(unsigned m, T v, unsigned d, int w = 32) {
  int l = cusim::cur->lane;
  return cusim::shfl_any(m, v, (l & (w - 1)) < (int)d ? l : l - (int)d);
}
template <class T>
inline T __shfl_down_sync(unsigned m, T v, unsigned d, int w = 32) {
  int l = cusim::cur->lane;
  return cusim::shfl_any(m, v, (l & (w - 1)) + (int)d >= w ? l : l + (int)d);
}
inline unsigned __ballot_sync(unsigned m, int p) { return cusim::vote(m, p != 0); }
inline int __any_sync(unsigned m, int p) { return cusim::vote(m, p != 0) != 0; }
inline int __all_sync(unsigned m, int p) { return cusim::vote(m, p == 0) == 0; }
inline int __uni_sync(unsigned m, int p) {
  const unsigned yes = cusim::vote(m, p != 0);
  return yes == 0 || yes == cusim::exists(m);
}
template <class T>
inline unsigned __match_any_sync(unsigned m, T v) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &v, sizeof v);
  return cusim::match_any(m, bits);
}
template <class T>
inline unsigned __match_all_sync(unsigned m, T v, int* all) {
  const unsigned same = __match_any_sync(m, v);
  *all = same == cusim::exists(m);
  return *all ? same : 0;
}
#define CUSIM_REDUCE(name, op)                                                                           \
  inline unsigned name(unsigned m, unsigned v) { return cusim::reduce(m, cusim::Reduce::op, false, v); } \
  inline int name(unsigned m, int v) { return int(cusim::reduce(m, cusim::Reduce::op, true, unsigned(v))); }
CUSIM_REDUCE(__reduce_add_sync, add)
CUSIM_REDUCE(__reduce_min_sync, min)
CUSIM_REDUCE(__reduce_max_sync, max)
#undef CUSIM_REDUCE
inline unsigned __reduce_and_sync(unsigned m, unsigned v) {
  return cusim::reduce(m, cusim::Reduce::land, false, v);
}
inline unsigned __reduce_or_sync(unsigned m, unsigned v) {
  return cusim::reduce(m, cusim::Reduce::lor, false, v);
}
inline unsigned __reduce_xor_sync(unsigned m, unsigned v) {
  return cusim::reduce(m, cusim::Reduce::lxor, false, v);
}

template <class T>
inline T __ldg(const T* p) {
  return *p;
}
template <class T>
inline T __ldcs(const T* p) {
  return *p;
}
template <class T>
inline T __ldcg(const T* p) {
  return *p;
}
template <class T>
inline void __stcs(T* p, T v) {
  *p = v;
}
template <class T>
inline void __stcg(T* p, T v) {
  *p = v;
}
template <class T>
inline T atomicAdd(T* p, std::type_identity_t<T> v) {
  return cusim::atomic_add(p, v);
}
template <class T>
inline T atomicSub(T* p, std::type_identity_t<T> v) {
  return cusim::atomic_add(p, T(-v));
}
template <class T>
inline T atomicXor(T* p, std::type_identity_t<T> v) {
  return cusim::atomic_xor(p, v);
}
template <class T>
inline T atomicMax(T* p, std::type_identity_t<T> v) {
  return cusim::atomic_max(p, v);
}
template <class T>
inline T atomicMin(T* p, std::type_identity_t<T> v) {
  return cusim::atomic_min(p, v);
}
template <class T>
inline T atomicExch(T* p, std::type_identity_t<T> v) {
  return cusim::atomic_exch(p, v);
}
template <class T>
inline T atomicCAS(T* p, std::type_identity_t<T> c, std::type_identity_t<T> v) {
  return cusim::atomic_cas(p, c, v);
}
template <class T>
inline T atomicOr(T* p, std::type_identity_t<T> v) {
  return cusim::atomic_or(p, v);
}
template <class T>
inline T atomicAnd(T* p, std::type_identity_t<T> v) {
  return cusim::atomic_and(p, v);
}

inline size_t __cvta_generic_to_shared(const void* p) { return cusim::smem_addr(p); }

// math intrinsics: same name, host accuracy
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __saturatef(float x) { return x < 0 ? 0.f : (x > 1 ? 1.f : x); }
template <class D, class S>
inline D cusim_bits(S s) {
  D d;
  static_assert(sizeof d == sizeof s);
  std::memcpy(&d, &s, sizeof d);
  return d;
}
inline int __float_as_int(float f) { return cusim_bits<int>(f); }
inline unsigned __float_as_uint(float f) { return cusim_bits<unsigned>(f); }
inline float __int_as_float(int i) { return cusim_bits<float>(i); }
inline float __uint_as_float(unsigned i) { return cusim_bits<float>(i); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)(((uint64_t)a * b) >> 32); }
template <class T>
inline T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
inline T max(T a, T b) {
  return a < b ? b : a;
}
