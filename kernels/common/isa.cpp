// Which instruction sets this processor has, capped by PYSEQNET_ISA.
#include "common/isa.h"

#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace pyseqnet {

Isa detected_isa() {
#if defined(__x86_64__)
  static const Isa found = [] {
    __builtin_cpu_init();
    // The avx512 objects are compiled for x86-64-v4, so every member of that level must be there.
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi") &&
                      __builtin_cpu_supports("bmi2");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl");
    if (avx512 && __builtin_cpu_supports("avx512bf16")) return Isa::avx512bf16;
    return avx512 ? Isa::avx512 : avx2 ? Isa::avx2 : Isa::portable;
  }();
  return found;
#else
  return Isa::portable;
#endif
}

Isa best_isa() {
  const Isa found = detected_isa();
  const char* cap = std::getenv("PYSEQNET_ISA");
  if (!cap || !*cap) return found;
  for (Isa isa : {Isa::portable, Isa::avx2, Isa::avx512, Isa::avx512bf16})
    if (!std::strcmp(cap, name_of(isa))) return isa < found ? isa : found;
  return found;
}

}  // namespace pyseqnet
