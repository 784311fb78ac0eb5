// Measures the two ceilings of one CPU thread: fp32 fused multiply-adds and copying. See probe.h.
//
// Why measured and not looked up: clock, boost, a neighbour on the other hyper-thread and a virtual machine's
// share of the memory bus decide what can be had here and now; a data sheet knows none of them.
#include <time.h>

#include "common/probe.h"
#include "common/simd.h"

namespace pyseqnet {
inline namespace PYSEQNET_ISA {
namespace {

// Two FMA units with a latency of 4 or 5 cycles want 8 to 10 chains in flight; 12 fit 16 registers beside the
// two operands.
constexpr int chains = 12;
constexpr long fma_steps = 20000;  // a round: about 100 microseconds, shorter than a scheduler's time slice

double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

volatile float sink;  // keeps the sums alive

__attribute__((noinline)) void fma_round() {
  vf sum[chains];
#pragma GCC unroll 16
  for (int i = 0; i < chains; ++i) sum[i] = set1(float(i));
  const vf factor = set1(0.999f), term = set1(0.001f);  // the sums stay near 1: no denormals, no overflow
  for (long step = 0; step < fma_steps; ++step) {
#pragma GCC unroll 16
    for (int i = 0; i < chains; ++i) sum[i] = sum[i] * factor + term;
  }
  vf total = sum[0];
  for (int i = 1; i < chains; ++i) total += sum[i];
  sink = hsum(total);
}

}  // namespace

double probe_fma_gflops(double seconds) {
  constexpr double flops = 2.0 * fma_steps * chains * VL;
  double best = 1e30;
  const double end = now() + seconds;
  for (double start = now(); start < end;) {
    fma_round();
    const double stop = now();
    if (stop - start < best) best = stop - start;
    start = stop;
  }
  return flops / best * 1e-9;
}

double probe_copy_gbps(double seconds, int64_t bytes) {
  constexpr int64_t smallest = 4096, long_enough = int64_t(1) << 20;
  const int64_t half = (bytes < smallest ? smallest : bytes) / 2;
  // A round copies at least a megabyte, so that the clock's own cost does not show.
  const int64_t copies = half >= long_enough ? 1 : (long_enough + half - 1) / half;
  char* from = static_cast<char*>(__builtin_malloc(size_t(half)));
  char* to = static_cast<char*>(__builtin_malloc(size_t(half)));
  if (!from || !to) {
    __builtin_free(from);
    __builtin_free(to);
    return 0;
  }
  memset(from, 1, size_t(half));  // touches every page before the clock runs
  memset(to, 2, size_t(half));
  double best = 1e30;
  const double end = now() + seconds;
  for (double start = now(); start < end;) {
    for (int64_t i = 0; i < copies; ++i) {
      memcpy(to, from, size_t(half));
      asm volatile("" ::"r"(to), "r"(from) : "memory");  // the next copy may not be merged with this one
    }
    const double stop = now();
    if (stop - start < best) best = stop - start;
    start = stop;
  }
  __builtin_free(from);
  __builtin_free(to);
  return 2.0 * double(half * copies) / best * 1e-9;
}

}  // namespace PYSEQNET_ISA
}  // namespace pyseqnet
