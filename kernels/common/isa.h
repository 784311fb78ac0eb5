// CPU instruction sets that kernels are compiled for. A source named *_cpu.cpp is compiled once for each,
// with PYSEQNET_ISA set to the name of the namespace it must live in and the matching compiler flags.
#pragma once
#include <cstdint>

namespace pyseqnet {

enum class Isa : int32_t { portable, avx2, avx512, avx512bf16 };
constexpr const char* name_of(Isa isa) {
  return isa == Isa::portable ? "portable"
         : isa == Isa::avx2   ? "avx2"
         : isa == Isa::avx512 ? "avx512"
                              : "avx512bf16";
}

// What this processor runs, capped by the environment variable PYSEQNET_ISA (read on every call).
Isa detected_isa();
Isa best_isa();

}  // namespace pyseqnet
