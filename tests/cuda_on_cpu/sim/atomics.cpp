// Atomics. Integer ones order the threads that meet at an address: whoever sees the number knows what the other
// had written before its last fence (its own, or one that it met at a barrier since). That the reader needs a
// fence, too, is not modelled. Floating-point ones order nothing: using a sum before a barrier is a race.
// Acquire and relaxed loads yield: a spin loop made of them lets others run.
#include "internal.h"

namespace cusim {
template <class T>
static T rmw(T* p, T (*f)(T, T), T v, bool sync, void* pc) {
  access(p, sizeof(T), true, kAtomic, pc);
  if (sync) sync_point(p, true, Release::fenced);
  running.idle = 0;
  T o;
  memcpy(&o, p, sizeof o);
  T n = f(o, v);
  memcpy(p, &n, sizeof n);
  return o;
}
#define CUSIM_DEF(T, S)                                                       \
  T atomic_add(T* p, T v) {                                                   \
    return rmw<T>(p, [](T a, T b) { return (T)(a + b); }, v, S, CUSIM_PC);    \
  }                                                                           \
  T atomic_exch(T* p, T v) {                                                  \
    return rmw<T>(p, [](T, T b) { return b; }, v, S, CUSIM_PC);               \
  }                                                                           \
  T atomic_max(T* p, T v) {                                                   \
    return rmw<T>(p, [](T a, T b) { return a > b ? a : b; }, v, S, CUSIM_PC); \
  }                                                                           \
  T atomic_min(T* p, T v) {                                                   \
    return rmw<T>(p, [](T a, T b) { return a < b ? a : b; }, v, S, CUSIM_PC); \
  }                                                                           \
  T atomic_cas(T* p, T c, T v) {                                              \
    access(p, sizeof(T), true, kAtomic, CUSIM_PC);                            \
    if (S) sync_point(p, true, Release::fenced);                              \
    running.idle = 0;                                                         \
    T o = *p;                                                                 \
    if (!memcmp(&o, &c, sizeof o)) *p = v;                                    \
    return o;                                                                 \
  }                                                                           \
  T load_acquire(const T* p) {                                                \
    access(p, sizeof(T), false, kAtomic, CUSIM_PC);                           \
    sync_point(p, true, Release::nothing);                                    \
    T o = *p;                                                                 \
    yield(CUSIM_PC);                                                          \
    return o;                                                                 \
  }                                                                           \
  T load_relaxed(const T* p) {                                                \
    access(p, sizeof(T), false, kAtomic, CUSIM_PC);                           \
    T o = *p;                                                                 \
    yield(CUSIM_PC);                                                          \
    return o;                                                                 \
  }                                                                           \
  void store_release(T* p, T v) {                                             \
    access(p, sizeof(T), true, kAtomic, CUSIM_PC);                            \
    sync_point(p, false, Release::all);                                       \
    running.idle = 0;                                                         \
    *p = v;                                                                   \
  }                                                                           \
  void store_relaxed(T* p, T v) {                                             \
    access(p, sizeof(T), true, kAtomic, CUSIM_PC);                            \
    *p = v;                                                                   \
  }
// clang-format off
CUSIM_DEF(int, true)
CUSIM_DEF(unsigned, true)
CUSIM_DEF(unsigned long long, true)
CUSIM_DEF(float, false)
CUSIM_DEF(double, false)
// clang-format on
void red_release_add(unsigned* p, unsigned v) {
  access(p, sizeof *p, true, kAtomic, CUSIM_PC);
  sync_point(p, false, Release::all);
  running.idle = 0;
  *p += v;
}
void fence() {
  if (!checks_on) return;
  cur->p->fenced = nullptr;
  clock_release(cur, cur->p->fenced);
}
int atomic_and(int* p, int v) {
  return rmw<int>(p, [](int a, int b) { return a & b; }, v, true, CUSIM_PC);
}
int atomic_or(int* p, int v) {
  return rmw<int>(p, [](int a, int b) { return a | b; }, v, true, CUSIM_PC);
}
int atomic_xor(int* p, int v) {
  return rmw<int>(p, [](int a, int b) { return a ^ b; }, v, true, CUSIM_PC);
}
unsigned atomic_xor(unsigned* p, unsigned v) {
  return rmw<unsigned>(p, [](unsigned a, unsigned b) { return a ^ b; }, v, true, CUSIM_PC);
}
// Each half is atomic, the pair need not be.
__half2 atomic_add(__half2* p, __half2 v) {
  return rmw<__half2>(p, [](__half2 a, __half2 b) { return __hadd2(a, b); }, v, false, CUSIM_PC);
}
__nv_bfloat162 atomic_add(__nv_bfloat162* p, __nv_bfloat162 v) {
  return rmw<__nv_bfloat162>(
      p, [](__nv_bfloat162 a, __nv_bfloat162 b) { return __hadd2(a, b); }, v, false, CUSIM_PC);
}
unsigned atomic_and(unsigned* p, unsigned v) {
  return rmw<unsigned>(p, [](unsigned a, unsigned b) { return a & b; }, v, true, CUSIM_PC);
}
unsigned atomic_or(unsigned* p, unsigned v) {
  return rmw<unsigned>(p, [](unsigned a, unsigned b) { return a | b; }, v, true, CUSIM_PC);
}

}  // namespace cusim
