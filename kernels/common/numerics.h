// Conversions between the storage types and the types that arithmetic happens in. One copy of the maths for
// host and device, bit for bit the same on both; no table, no branch on the machine.
//
// Always inlined: a plain inline function would leave a weak symbol in every object, and the copy compiled
// with AVX-512 could be the one that the linker keeps for the whole program.
#pragma once
#include <cstdint>

#include "common/types.h"

#if defined(__CUDACC__)
#define PYSEQNET_HOST_DEVICE __host__ __device__ __forceinline__
#elif defined(_MSC_VER)
#define PYSEQNET_HOST_DEVICE __forceinline
#else
#define PYSEQNET_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace pyseqnet {

PYSEQNET_HOST_DEVICE uint32_t float_bits(float x) { return __builtin_bit_cast(uint32_t, x); }
PYSEQNET_HOST_DEVICE float bits_float(uint32_t b) { return __builtin_bit_cast(float, b); }

// bfloat16 is the upper half of a float.
PYSEQNET_HOST_DEVICE float bf16_bits_to_float(uint16_t b) { return bits_float(uint32_t(b) << 16); }

// Round to nearest, ties to even. A NaN stays one: it becomes quiet, because the bits that made it a NaN may
// be in the half that is cut off.
PYSEQNET_HOST_DEVICE uint16_t float_to_bf16_bits(float x) {
  const uint32_t b = float_bits(x);
  if ((b & 0x7fffffffu) > 0x7f800000u) return uint16_t((b >> 16) | 0x0040u);
  return uint16_t((b + 0x7fffu + ((b >> 16) & 1u)) >> 16);
}

// Every float16 is a normal float; only the exponent is biased differently (15 against 127).
PYSEQNET_HOST_DEVICE float f16_bits_to_float(uint16_t h) {
  constexpr uint32_t exponent_mask = 0x7c00u << 13;
  const uint32_t sign = uint32_t(h & 0x8000u) << 16;
  uint32_t b = uint32_t(h & 0x7fffu) << 13;
  const uint32_t exponent = b & exponent_mask;
  b += uint32_t(127 - 15) << 23;
  if (exponent == exponent_mask) {
    b += uint32_t(128 - 16) << 23;  // infinity or NaN
    if (b & 0x007fffffu) b |= 0x00400000u;
  } else if (exponent == 0) {
    // Subnormal: as a fraction of the smallest normal; the subtraction is exact and normalises.
    b = float_bits(bits_float(b + (1u << 23)) - bits_float(113u << 23));
  }
  return bits_float(b | sign);
}

// Round to nearest, ties to even, with float16 subnormals; overflow gives infinity, a NaN stays a quiet NaN.
PYSEQNET_HOST_DEVICE uint16_t float_to_f16_bits(float x) {
  constexpr uint32_t smallest_normal = 113u << 23;  // 2^-14
  constexpr uint32_t beyond_largest = uint32_t(143)
                                      << 23;  // 2^16; what rounds up to it carries into infinity
  const uint32_t all = float_bits(x);
  const uint16_t sign = uint16_t((all >> 16) & 0x8000u);
  const uint32_t b = all & 0x7fffffffu;
  if (b > 0x7f800000u) return uint16_t(sign | 0x7e00u | ((b >> 13) & 0x03ffu));
  if (b >= beyond_largest) return uint16_t(sign | 0x7c00u);
  if (b < smallest_normal) {
    // Adding 1/2 aligns the ten subnormal bits with the end of the mantissa: the addition does the rounding.
    constexpr uint32_t half = 126u << 23;
    return uint16_t(sign | (float_bits(bits_float(b) + bits_float(half)) - half));
  }
  const uint32_t odd = (b >> 13) & 1u;
  return uint16_t(sign | ((b - (uint32_t(127 - 15) << 23) + 0x0fffu + odd) >> 13));
}

PYSEQNET_HOST_DEVICE float to_float(float x) { return x; }
PYSEQNET_HOST_DEVICE float to_float(bfloat16 x) { return bf16_bits_to_float(x.bits); }
PYSEQNET_HOST_DEVICE float to_float(float16 x) { return f16_bits_to_float(x.bits); }

PYSEQNET_HOST_DEVICE double to_double(double x) { return x; }
PYSEQNET_HOST_DEVICE double to_double(float x) { return double(x); }
PYSEQNET_HOST_DEVICE double to_double(bfloat16 x) { return double(to_float(x)); }
PYSEQNET_HOST_DEVICE double to_double(float16 x) { return double(to_float(x)); }

// Rounds a finished sum to what is stored.
PYSEQNET_HOST_DEVICE void round_to(float& to, float x) { to = x; }
PYSEQNET_HOST_DEVICE void round_to(bfloat16& to, float x) { to.bits = float_to_bf16_bits(x); }
PYSEQNET_HOST_DEVICE void round_to(float16& to, float x) { to.bits = float_to_f16_bits(x); }
PYSEQNET_HOST_DEVICE void round_to(double& to, double x) { to = x; }
PYSEQNET_HOST_DEVICE void round_to(float& to, double x) { to = float(x); }
PYSEQNET_HOST_DEVICE void round_to(bfloat16& to, double x) { round_to(to, float(x)); }
PYSEQNET_HOST_DEVICE void round_to(float16& to, double x) { round_to(to, float(x)); }

}  // namespace pyseqnet
