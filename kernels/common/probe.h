// What this machine can do at most: the two ceilings that every benchmark row is held against.
//
// Both run in the calling thread and measure for about `seconds`, returning the best of many short rounds:
// a ceiling is what the machine does undisturbed. They hold no state; several threads may run them at once
// (a binding releases the interpreter lock for them).
#pragma once
#include <cstdint>

#define PYSEQNET_DECLARE_PROBES                                                                           \
  /* fp32 fused multiply-adds on independent accumulators, two operations each: GFLOP/s of one thread. */ \
  double probe_fma_gflops(double seconds);                                                                \
  /* A copy whose source and destination fill `bytes` together: GB/s, reads and writes both counted. */   \
  double probe_copy_gbps(double seconds, int64_t bytes);

namespace pyseqnet {
#ifdef PYSEQNET_ISA  // inside a *_cpu.cpp: the copy for this instruction set
inline namespace PYSEQNET_ISA {
PYSEQNET_DECLARE_PROBES
}
#else
namespace portable {
PYSEQNET_DECLARE_PROBES
}
namespace avx2 {
PYSEQNET_DECLARE_PROBES
}
namespace avx512 {
PYSEQNET_DECLARE_PROBES
}
#endif
}  // namespace pyseqnet

#undef PYSEQNET_DECLARE_PROBES
