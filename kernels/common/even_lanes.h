// Every other lane of two neighbouring vectors: what a stride of 2 reads.
#pragma once
#include "common/simd.h"

namespace pyseqnet {
inline namespace PYSEQNET_ISA {

// Lanes 0, 2, 4, .. of two neighbouring vectors.
PYSEQNET_INLINE vf even_lanes(vf low, vf high) {
#if defined(__AVX512F__)
  return __builtin_shufflevector(low, high, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
#elif defined(__AVX2__)
  return __builtin_shufflevector(low, high, 0, 2, 4, 6, 8, 10, 12, 14);
#else
  return __builtin_shufflevector(low, high, 0, 2, 4, 6);
#endif
}

}  // namespace PYSEQNET_ISA
}  // namespace pyseqnet
