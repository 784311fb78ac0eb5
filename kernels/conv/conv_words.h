// What the register tiles multiply: words of 32 bits.
//
// A word is one float, which the storage types are converted to. In the build for AVX-512 BF16 it is a pair
// of bfloat16: one instruction multiplies 16 pairs by 16 pairs and adds both products of each to a float, at
// twice the rate. A pair is two neighbouring channels in forward and input gradient, and the same pixel of
// two neighbouring images in the weight gradient, so that shifting by a tap never tears one apart. Where the
// number is odd, the last partner is zero on both sides. A single channel pairs its taps, while they are
// gathered into a panel.
#pragma once
#include "common/element_lanes.h"
#include "common/transpose.h"

namespace pyseqnet {
inline namespace PYSEQNET_ISA {
namespace conv {

#if defined(__AVX512BF16__)
constexpr int PAIR = 2;
#else
constexpr int PAIR = 1;
#endif
template <class T>
constexpr bool paired = PAIR == 2 && sizeof(T) == 2;

// What a tile can store itself.
template <class T>
constexpr bool tile_stores = sizeof(T) == sizeof(float) || paired<T>;

// Where the second element of a pair lies, in elements after the first; not present: it is zero.
struct Partner {
  int64_t offset = 0;
  bool present = false;
};

// Lanes lo <= l < hi hold the words that begin at p[l], the others zero.
template <class T>
PYSEQNET_INLINE vf load_words(const T* p, int64_t lo, int64_t hi, Partner partner) {
  if constexpr (paired<T>) {
    const vh first = load_bits_between((const uint16_t*)p, lo, hi);
    vw words = __builtin_convertvector(first, vw);
    if (partner.present) {
      const vh second = load_bits_between((const uint16_t*)p + partner.offset, lo, hi);
      words |= __builtin_convertvector(second, vw) << 16;
    }
    return (vf)words;
  } else {
    return load_between(p, lo, hi, vf{});
  }
}
template <class T>
PYSEQNET_INLINE float load_word(const T* p, Partner partner) {
  if constexpr (paired<T>)
    return bits_float(uint32_t(p->bits) | (partner.present ? uint32_t(p[partner.offset].bits) << 16 : 0u));
  else
    return to_float(*p);
}

// The first n lanes of finished sums, rounded to the storage type.
template <class T>
PYSEQNET_INLINE void store_result(T* to, vf v, int64_t n) {
  store_lanes_n(to, v, n);
}

// Results go to memory that is seldom in the cache: fetched while the sums are still being worked out.
template <class T>
PYSEQNET_INLINE void prefetch_results(const T* to, int64_t count) {
  constexpr int64_t line = 64 / int64_t(sizeof(T));
  for (int64_t i = 0; i < count; i += line) __builtin_prefetch(to + i, 1);
}

// to[c][r] = from[r][c] as words, or converted to another storage type; nothing else is touched.
template <class From, class To>
PYSEQNET_INLINE void transpose_words(const From* from, int64_t from_stride, int64_t rows, int64_t columns,
                                     To* to, int64_t to_stride, Partner partner = {}) {
  for (int64_t r0 = 0; r0 < rows; r0 += VL)
    for (int64_t c0 = 0; c0 < columns; c0 += VL) {
      const From* src = from + r0 * from_stride + c0;
      To* dst = to + c0 * to_stride + r0;
      const int64_t nr = rows - r0, nc = columns - c0;
      vf v[VL];
      if (nr >= VL && nc >= VL) {
#pragma GCC unroll 16
        for (int i = 0; i < VL; ++i) v[i] = load_words(src + i * from_stride, 0, VL, partner);
        transpose(v);
#pragma GCC unroll 16
        for (int i = 0; i < VL; ++i) store_lanes(dst + i * to_stride, v[i]);
      } else {
      // Rows beyond the last repeat it: their lanes are not stored.
#pragma GCC unroll 16
        for (int i = 0; i < VL; ++i)
          v[i] = load_words(src + (i < nr ? i : nr - 1) * from_stride, 0, nc, partner);
        transpose(v);
#pragma GCC unroll 16
        for (int i = 0; i < VL; ++i)
          if (i < nc) store_lanes_n(dst + i * to_stride, v[i], nr);
      }
    }
}

// to[i] = the word at from[i * step]
template <class T>
PYSEQNET_INLINE void copy_words(float* to, const T* from, int64_t step, int64_t count, Partner partner = {}) {
  if (step == 1) {
    int64_t i = 0;
    for (; i + VL <= count; i += VL) store(to + i, load_words(from + i, 0, VL, partner));
    if (i < count) store_lanes_n(to + i, load_words(from + i, 0, count - i, partner), count - i);
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = load_word(from + i * step, partner);
  }
}
PYSEQNET_INLINE void fill_zero(float* to, int64_t count) {
  for (int64_t i = 0; i < count; i += VL) store_lanes_n(to + i, vf{}, count - i);
}

}  // namespace conv
}  // namespace PYSEQNET_ISA
}  // namespace pyseqnet
