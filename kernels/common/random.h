// Counter-based random bits for dropout: a pure function of (seed, row, column), so that no mask is stored
// and any tiling, thread or device finds the same bits again in the backward pass.
//
// Two stages. A row key of 64 bits comes from SplitMix64's finalizer (Steele, Lea and Flood, 2014), applied
// to the seed and again to the seed's stream at the row: about ten operations a row. Each element then mixes
// its column with the key by the 32-bit finalizer "lowbias32" (Wellons, 2018; two multiplications, bias 0.1
// of the ideal), the key's upper half entering between its rounds: two rows whose lower halves collide or are
// near each other still get unrelated bits. Thirteen vector operations an element against about twenty for
// Philox-4x32-10, no 32 x 32 -> 64 bit product, and no group of four outputs that would tie the result to a
// tiling.
#pragma once
#include <cstdint>

#include "common/numerics.h"

namespace pyseqnet {

PYSEQNET_HOST_DEVICE uint64_t mix64(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

// The element's mixer: of a uint32_t, or of a vector of them, lane by lane.
template <class U>
PYSEQNET_HOST_DEVICE U dropout_mix(U x, uint32_t upper_key) {
  x = (x ^ (x >> 16)) * 0x21f0aaadu;
  x = ((x ^ (x >> 15)) ^ upper_key) * 0x735a2d97u;
  x = (x ^ (x >> 15)) * 0x21f0aaadu;
  return x ^ (x >> 16);
}

// 64 bits for a row (any numbering) of a random matrix.
PYSEQNET_HOST_DEVICE uint64_t dropout_row_key(int64_t seed, int64_t row) {
  constexpr uint64_t golden = 0x9e3779b97f4a7c15ull;  // 2^64 / golden ratio: SplitMix64's step
  return mix64(mix64(uint64_t(seed) + golden) + golden * (uint64_t(row) + 1));
}

// 32 uniform bits for a column of that row. Columns beyond 2^32 would repeat.
PYSEQNET_HOST_DEVICE uint32_t dropout_bits(uint64_t row_key, int64_t column) {
  return dropout_mix(uint32_t(column) + uint32_t(row_key), uint32_t(row_key >> 32));
}

// An element is dropped with probability p: when its bits are below p * 2^32.
PYSEQNET_HOST_DEVICE uint32_t dropout_threshold(double p) {
  const double bound = p * 4294967296.0;
  return bound >= 4294967295.0 ? 4294967295u : uint32_t(bound + 0.5);
}
PYSEQNET_HOST_DEVICE bool dropout_keeps(uint64_t row_key, int64_t column, uint32_t threshold) {
  return dropout_bits(row_key, column) >= threshold;
}

}  // namespace pyseqnet
