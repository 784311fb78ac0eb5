// Max-pooling of planar images (NCHW), forward. Lanes are neighbouring output columns.
//
// Two ways to the same bits:
//   small windows   (up to 3 x 3, stride 1 or 2, no dilation in width): a vector of windows stays in
//                   registers; strided columns are split by one shuffle of two loads. Blocks that touch
//                   padding use masked loads.
//   any window      an input row is first written to scratch, padded with -inf and split into its stride_w
//                   phases, so that every tap of a vector of windows is one plain load. Then the maximum is
//                   taken along the row (S taps), kept in a ring of rows, and along the column (R taps): R +
//                   S comparisons where the window has R S. Row-major order survives: the first (for NaN:
//                   last) winner of a row, then the first (last) row.
// Both have a quick form that ignores NaN and an exact one, used for the block or row where a NaN was met.
// Bound: memory traffic for the small windows, 4 (1 + 5/4 P Q / (H W)) bytes an input element in float32.
#pragma once
#include "pool/max_pool.h"
#include "pool/max_pool_lanes.h"

namespace pyseqnet {
inline namespace PYSEQNET_ISA {

PYSEQNET_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
PYSEQNET_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
PYSEQNET_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
PYSEQNET_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// The taps of a window that lie inside the image, along one axis: first <= t < end; none if first >= end.
struct TapRange {
  int64_t first, end;
};
PYSEQNET_INLINE TapRange taps_inside(int64_t start, int64_t dilation, int64_t taps, int64_t extent) {
  return {start < 0 ? ceil_div(-start, dilation) : 0,
          start < extent ? smaller(taps, ceil_div(extent - start, dilation)) : 0};
}
// The tap that a window reports before any comparison (max_pool.h: its first tap inside the image).
PYSEQNET_INLINE int64_t first_tap(int64_t start, int64_t dilation, int64_t taps) {
  return start < 0 ? smaller(taps - 1, ceil_div(-start, dilation)) : 0;
}

// A tensor's memory: partial vectors may be read as whole ones as long as they stay within it.
template <class T>
struct Extent {
  const T *begin, *end;
};

// Lanes lo <= l < hi hold p[l], the others `fill`.
template <class T>
PYSEQNET_INLINE vf load_clipped(const T* p, int64_t lo, int64_t hi, vf fill, Extent<T> all) {
#if defined(__AVX512F__)
  constexpr bool masked = true;
#elif defined(__AVX2__)
  constexpr bool masked = sizeof(T) == 4;
#else
  constexpr bool masked = false;
#endif
  if (!masked && p >= all.begin && p + VL <= all.end) return fill_outside(load_lanes(p), lo, hi, fill);
  return load_between(p, lo, hi, fill);
}

// The same for many vectors that share lo and hi; lanes outside are zero (of taps: anything).
#if defined(__AVX512F__)
typedef __mmask16 Part;
#else
struct Part {
  int64_t lo, hi;
};
#endif
PYSEQNET_INLINE Part lanes_between(int64_t lo, int64_t hi) {
  lo = lo < 0 ? 0 : lo;
  hi = hi > VL ? VL : hi;
#if defined(__AVX512F__)
  return lo < hi ? (__mmask16)((1u << hi) - (1u << lo)) : (__mmask16)0;
#else
  return {lo, hi};
#endif
}
template <class T>
PYSEQNET_INLINE vf load_part(const T* p, Part part, Extent<T> all) {
#if defined(__AVX512F__)
  (void)all;
  if constexpr (sizeof(T) == 4) {
    return (vf)_mm512_maskz_loadu_ps(part, p);
  } else {
    const vh bits = (vh)_mm256_maskz_loadu_epi16(part, p);
    return __is_same(T, bfloat16) ? widen_bf16(bits) : widen_f16(bits);
  }
#else
  return load_clipped(p, part.lo, part.hi, vf{}, all);
#endif
}
// Lanes outside hold `fill`.
template <class T>
PYSEQNET_INLINE vf load_part_or(const T* p, Part part, vf fill, Extent<T> all) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return (vf)_mm512_mask_loadu_ps((__m512)fill, part, p);
  return (vf)_mm512_mask_mov_ps((__m512)fill, part, (__m512)load_part(p, part, all));
#else
  return load_clipped(p, part.lo, part.hi, fill, all);
#endif
}
PYSEQNET_INLINE vb load_taps_part(const uint8_t* p, Part part, Extent<uint8_t> all) {
#if defined(__AVX512F__)
  (void)all;
  return (vb)_mm_maskz_loadu_epi8(part, p);
#else
  if (p >= all.begin && p + VL <= all.end) return load_taps(p);
  return load_taps_between(p, part.lo, part.hi);
#endif
}

// ---- small windows

// The loads that a vector of windows makes of an image row, each so many columns after the first window's
// first tap, and their lanes inside the image: the same for every row.
template <int S, int stride>
struct WindowLoads {
  static constexpr int count = stride == 1 ? S : S == 3 ? 4 : 2;
  static constexpr int column(int k) { return stride == 1 ? k : (k & 1) * VL + (k & 2) - (k == 3); }
  Part part[count];
  WindowLoads(const MaxPoolProblem& p, int64_t j) {
    const int64_t c = j * stride - p.pad_w;
#pragma GCC unroll 4
    for (int k = 0; k < count; k++) part[k] = lanes_between(-c - column(k), p.W - c - column(k));
  }
};

template <class T, int R, int S, int stride, bool inside, bool exact, bool with_arg>
PYSEQNET_INLINE bool small_window_block(const MaxPoolProblem& p, const T* x, Extent<T> all, int64_t i,
                                        int64_t j, const WindowLoads<S, stride>& loads, int64_t count, T* y,
                                        uint8_t* arg) {
  const int64_t h0 = i * p.stride_h - p.pad_h, c = j * stride - p.pad_w;
  const vf lowest = set1(minus_infinity);
  vi first = set1_tap(first_tap(h0, p.dilation_h, R) * S);
  if (!inside && c < 0) {
    const vi start = iota() * stride + int32_t(c), before = start < 0 ? -start : vi{};
    first += before < S - 1 ? before : set1_tap(S - 1);
  }
  Best best{lowest, first};
  Lanes nan = {};
#pragma GCC unroll 3
  for (int r = 0; r < R; r++) {
    const int64_t h = h0 + r * p.dilation_h;
    if (h < 0 || h >= p.H) continue;
    const T* row = x + h * p.W;
    auto columns = [&](int k) PYSEQNET_LAMBDA {
      const T* at = row + c + WindowLoads<S, stride>::column(k);
      return inside ? load_lanes(at) : load_part_or(at, loads.part[k], lowest, all);
    };
    vf v[S];
    if constexpr (stride == 1) {
#pragma GCC unroll 3
      for (int s = 0; s < S; s++) v[s] = columns(s);
    } else {
      static_assert(stride == 2 && S >= 2);
      const vf a = columns(0), b = columns(1);
      v[0] = even_of(a, b);
      v[1] = odd_of(a, b);
      if constexpr (S == 3) v[2] = even_short(columns(2), columns(3), EveryLane{});
    }
    if (!exact) {
      nan |= either_nan(v[0], v[1]);
      if (S == 3) nan |= either_nan(v[2], v[2]);
    }
#pragma GCC unroll 3
    for (int s = 0; s < S; s++) best.consider<exact, with_arg>(v[s], set1_tap(r * S + s));
  }
  if (!exact && __builtin_expect(any(nan), 0)) return false;
  if (inside || count == VL) {
    store_lanes(y, best.value);
    if (with_arg) store_taps(arg, best.tap);
  } else {
    store_lanes_n(y, best.value, count);
    if (with_arg) store_taps_n(arg, best.tap, count);
  }
  return true;
}

template <class T, int R, int S, int stride, bool with_arg>
__attribute__((noinline)) void small_window_with_nan(const MaxPoolProblem& p, const T* x, Extent<T> all,
                                                     int64_t i, int64_t j, int64_t count, T* y,
                                                     uint8_t* arg) {
  small_window_block<T, R, S, stride, false, true, with_arg>(p, x, all, i, j, {p, j}, count, y, arg);
}

// Output rows [i0, i1) of one plane, a few at a time, so that what a block of columns loads is worked out once
// for all of them. The last block of a row begins early rather than being short.
template <class T, int R, int S, int stride, bool with_arg>
void small_window_rows(const MaxPoolProblem& p, const T* x, Extent<T> all, int64_t i0, int64_t i1, T* y,
                       uint8_t* arg) {
  constexpr int64_t rows_at_once = 8;
  for (; i0 < i1; i0 += rows_at_once)
    for (int64_t block = 0; block < p.Q; block += VL) {
      const int64_t j = block + VL > p.Q ? larger(0, p.Q - VL) : block, count = smaller(VL, p.Q - j);
      const int64_t c = j * stride - p.pad_w;
      const bool inside = c >= 0 && c + stride * (VL - 1) + S <= p.W && count == VL;
      const WindowLoads<S, stride> loads(p, j);
      for (int64_t i = i0; i < smaller(i1, i0 + rows_at_once); i++) {
        T* to = y + i * p.Q + j;
        uint8_t* taps = with_arg ? arg + i * p.Q + j : nullptr;
        const bool done = inside ? small_window_block<T, R, S, stride, true, false, with_arg>(
                                       p, x, all, i, j, loads, VL, to, taps)
                                 : small_window_block<T, R, S, stride, false, false, with_arg>(
                                       p, x, all, i, j, loads, count, to, taps);
        if (!done) small_window_with_nan<T, R, S, stride, with_arg>(p, x, all, i, j, count, to, taps);
      }
    }
}

template <class T>
using SmallWindowRows = void (*)(const MaxPoolProblem&, const T*, Extent<T>, int64_t, int64_t, T*, uint8_t*);

template <class T, int R, int S>
PYSEQNET_INLINE SmallWindowRows<T> small_window(int64_t stride, bool with_arg) {
  if (stride == 1)
    return with_arg ? small_window_rows<T, R, S, 1, true> : small_window_rows<T, R, S, 1, false>;
  if (stride == 2)
    return with_arg ? small_window_rows<T, R, S, 2, true> : small_window_rows<T, R, S, 2, false>;
  return nullptr;
}
// The register kernel for this window, or null.
template <class T>
PYSEQNET_INLINE SmallWindowRows<T> small_window(const MaxPoolProblem& p) {
  if (p.dilation_w != 1) return nullptr;
  if (p.R == 1 && p.S == 2) return small_window<T, 1, 2>(p.stride_w, p.with_arg);
  if (p.R == 1 && p.S == 3) return small_window<T, 1, 3>(p.stride_w, p.with_arg);
  if (p.R == 2 && p.S == 2) return small_window<T, 2, 2>(p.stride_w, p.with_arg);
  if (p.R == 3 && p.S == 3) return small_window<T, 3, 3>(p.stride_w, p.with_arg);
  return nullptr;
}

// ---- any window

// Where things lie in the scratch of the general kernel, for blocks of `columns` outputs.
struct RowCache {
  int64_t columns;       // outputs of a column block, whole vectors
  int64_t phase_length;  // elements of one phase of an input row
  int64_t ring;          // input rows whose row maxima are kept
  float* phases;         // [stride_w][phase_length]: column w of the image is element (w + pad_w - first) /
                         // stride_w of phase (w + pad_w) % stride_w
  float* value;          // [ring][columns] maximum of each window's taps in this row
  int32_t* tap;          // [ring][columns] and its tap
  int32_t* first;        // [columns] tap to report if all are -inf
  int64_t* held;         // [ring] row that this slot of the ring holds, -1 = none
  int64_t* tap_at;       // [S] where each tap's column of the first window lies in phases
  int64_t* at;           // [R] where the row of each tap of the current windows begins in value and tap
  uint8_t* nan;          // [ring] whether a NaN was met in it
  int64_t bytes;

  RowCache(const MaxPoolProblem& p, std::byte* scratch) {
    constexpr int64_t ring_elements = 32 * 1024;  // value and tap: 256 KiB, a share of the second-level cache
    ring = (p.R - 1) * p.dilation_h + 1;
    columns = larger(4 * VL, ring_elements / ring / VL * VL);
    columns = smaller(columns, round_up(p.Q, VL));
    phase_length = round_up(columns + (p.S - 1) * p.dilation_w / p.stride_w, VL);
    Carver carve(scratch);
    phases = carve.take<float>(p.stride_w * phase_length);
    value = carve.take<float>(ring * columns);
    tap = carve.take<int32_t>(ring * columns);
    first = carve.take<int32_t>(columns);
    held = carve.take<int64_t>(ring);
    tap_at = carve.take<int64_t>(p.S);
    at = carve.take<int64_t>(p.R);
    nan = carve.take<uint8_t>(ring);
    bytes = carve.used();
  }
  void find_taps(const MaxPoolProblem& p) {
    for (int64_t s = 0; s < p.S; s++)
      tap_at[s] = s * p.dilation_w % p.stride_w * phase_length + s * p.dilation_w / p.stride_w;
  }
};

// Strides that have shuffles of their own; above, one element at a time is as fast.
#if defined(__AVX512F__) || defined(__AVX2__)
constexpr int64_t widest_shuffle = 8;
#else
constexpr int64_t widest_shuffle = 4;
#endif

// Splits one image row into its phases, beginning with padded column `start` (a multiple of stride_w).
// Returns whether a NaN was met. `stride` is stride_w, or 0 for those without shuffles of their own.
template <class T, int stride>
bool split_row(const MaxPoolProblem& p, const RowCache& cache, const T* row, Extent<T> all, int64_t start) {
  const vf lowest = set1(minus_infinity);
  const int64_t step = stride ? stride : p.stride_w, length = cache.phase_length;
  Lanes nan = {};
  if constexpr (stride != 0) {
    for (int64_t l = 0; l < length; l += VL) {
      const int64_t w = start + l * stride - p.pad_w;
      vf v[stride];
      if (w >= 0 && w + stride * VL <= p.W) {
#pragma GCC unroll 8
        for (int k = 0; k < stride; k++) v[k] = load_lanes(row + w + k * VL);
      } else {
#pragma GCC unroll 8
        for (int k = 0; k < stride; k++)
          v[k] = load_clipped(row + w + k * VL, -w - k * VL, p.W - w - k * VL, lowest, all);
      }
#pragma GCC unroll 8
      for (int k = 0; k < stride; k++) nan |= either_nan(v[k], v[k]);
      split(v);
#pragma GCC unroll 8
      for (int k = 0; k < stride; k++) store(cache.phases + k * cache.phase_length + l, v[k]);
    }
    return any(nan);
  }
  const int64_t phases = smaller(step, (p.S - 1) * p.dilation_w + 1);
  for (int64_t f = 0; f < phases; f++) {
    float* phase = cache.phases + f * cache.phase_length;
    const int64_t w = start + f - p.pad_w;
    const int64_t lo = smaller(length, w < 0 ? ceil_div(-w, step) : 0);
    const int64_t hi = larger(lo, smaller(length, w < p.W ? ceil_div(p.W - w, step) : 0));
    for (int64_t l = 0; l < lo; l++) phase[l] = minus_infinity;
    for (int64_t l = lo; l < hi; l++) phase[l] = to_float(row[w + l * step]);
    for (int64_t l = hi; l < length; l++) phase[l] = minus_infinity;
    for (int64_t l = 0; l < length; l += VL) {
      const vf v = load(phase + l);
      nan |= either_nan(v, v);
    }
  }
  return any(nan);
}

template <int vectors, bool exact, bool with_arg>
PYSEQNET_INLINE void row_maxima_block(const MaxPoolProblem& p, const RowCache& cache, int64_t j, float* value,
                                      int32_t* tap) {
  Best best[vectors];
#pragma GCC unroll 4
  for (int k = 0; k < vectors; k++)
    best[k] = {set1(minus_infinity), *(const vi_u*)(cache.first + j + k * VL)};
  for (int64_t s = 0; s < p.S; s++) {
    const float* column = cache.phases + cache.tap_at[s] + j;
#pragma GCC unroll 4
    for (int k = 0; k < vectors; k++)
      best[k].template consider<exact, with_arg>(load(column + k * VL), set1_tap(s));
  }
#pragma GCC unroll 4
  for (int k = 0; k < vectors; k++) {
    store(value + j + k * VL, best[k].value);
    if (with_arg) store_taps(tap + j + k * VL, best[k].tap);
  }
}

template <bool exact, bool with_arg>
void row_maxima(const MaxPoolProblem& p, const RowCache& cache, float* value, int32_t* tap) {
  int64_t j = 0;
  for (; j + 4 * VL <= cache.columns; j += 4 * VL)
    row_maxima_block<4, exact, with_arg>(p, cache, j, value, tap);
  for (; j < cache.columns; j += VL) row_maxima_block<1, exact, with_arg>(p, cache, j, value, tap);
}

template <class T, class Tap, bool exact, bool with_arg>
void column_maxima(const MaxPoolProblem& p, const RowCache& cache, TapRange rows, int64_t count, T* y,
                   Tap* arg) {
  for (int64_t j = 0; j < count; j += VL) {
    const int64_t slot = cache.at[rows.first] + j;
    Best best{load(cache.value + slot), {}};
    if (with_arg) best.tap = *(const vi_u*)(cache.tap + slot) + int32_t(rows.first * p.S);
    for (int64_t r = rows.first + 1; r < rows.end; r++) {
      const int64_t next = cache.at[r] + j;
      const vi tap = with_arg ? *(const vi_u*)(cache.tap + next) + int32_t(r * p.S) : vi{};
      best.consider<exact, with_arg>(load(cache.value + next), tap);
    }
    store_lanes_n(y + j, best.value, count - j);
    if (with_arg) store_taps_n(arg + j, best.tap, count - j);
  }
}

// A window that dilation carries past every row of the image: -inf, and the tap that max_pool.h names.
template <class T, class Tap, bool with_arg>
void empty_windows(const MaxPoolProblem& p, const RowCache& cache, int64_t h0, int64_t count, T* y,
                   Tap* arg) {
  for (int64_t j = 0; j < count; j++) {
    round_to(y[j], minus_infinity);
    if (with_arg) arg[j] = Tap(first_tap(h0, p.dilation_h, p.R) * p.S + cache.first[j]);
  }
}

template <class T>
PYSEQNET_INLINE bool split_row_any(const MaxPoolProblem& p, const RowCache& cache, const T* row,
                                   Extent<T> all, int64_t start) {
  switch (p.stride_w) {
    case 1:
      return split_row<T, 1>(p, cache, row, all, start);
    case 2:
      return split_row<T, 2>(p, cache, row, all, start);
    case 3:
      return split_row<T, 3>(p, cache, row, all, start);
    case 4:
      return split_row<T, 4>(p, cache, row, all, start);
#if defined(__AVX512F__) || defined(__AVX2__)
    case 5:
      return split_row<T, 5>(p, cache, row, all, start);
    case 6:
      return split_row<T, 6>(p, cache, row, all, start);
    case 7:
      return split_row<T, 7>(p, cache, row, all, start);
    case 8:
      return split_row<T, 8>(p, cache, row, all, start);
#endif
    default:
      return split_row<T, 0>(p, cache, row, all, start);
  }
}

// Output rows [i0, i1) of one plane.
template <class T, class Tap, bool with_arg>
void any_window_rows(const MaxPoolProblem& p, const T* x, Extent<T> all, int64_t i0, int64_t i1, T* y,
                     Tap* arg, std::byte* scratch) {
  RowCache cache(p, scratch);
  cache.find_taps(p);
  for (int64_t j0 = 0; j0 < p.Q; j0 += cache.columns) {
    const int64_t count = smaller(cache.columns, p.Q - j0);
    for (int64_t j = 0; j < cache.columns; j++)
      cache.first[j] = int32_t(first_tap((j0 + j) * p.stride_w - p.pad_w, p.dilation_w, p.S));
    for (int64_t k = 0; k < cache.ring; k++) cache.held[k] = -1;
    for (int64_t i = i0; i < i1; i++) {
      const int64_t h0 = i * p.stride_h - p.pad_h, out = i * p.Q + j0;
      const TapRange rows = taps_inside(h0, p.dilation_h, p.R, p.H);
      Tap* taps = with_arg ? arg + out : nullptr;
      if (rows.first >= rows.end) {
        empty_windows<T, Tap, with_arg>(p, cache, h0, count, y + out, taps);
        continue;
      }
      bool nan = false;
      for (int64_t r = rows.first; r < rows.end; r++) {
        const int64_t h = h0 + r * p.dilation_h, slot = h % cache.ring;
        if (cache.held[slot] != h) {
          cache.held[slot] = h;
          cache.nan[slot] = split_row_any(p, cache, x + h * p.W, all, j0 * p.stride_w);
          (cache.nan[slot] ? row_maxima<true, with_arg>
                           : row_maxima<false, with_arg>)(p, cache, cache.value + slot * cache.columns,
                                                          cache.tap + slot * cache.columns);
        }
        cache.at[r] = slot * cache.columns;
        nan |= cache.nan[slot];
      }
      (nan ? column_maxima<T, Tap, true, with_arg>
           : column_maxima<T, Tap, false, with_arg>)(p, cache, rows, count, y + out, taps);
    }
  }
}

// ---- few windows with long rows of taps

// Whether lanes = taps cost less than lanes = windows: instructions per row of windows, roughly. Wide strides
// pay for the split, few windows leave lanes empty.
PYSEQNET_INLINE bool better_along_taps(const MaxPoolProblem& p) {
  if (p.dilation_w != 1) return false;
  const int64_t vectors = ceil_div(p.Q, VL), new_rows = smaller(p.R, p.stride_h);
  const int64_t split = p.stride_w <= 4                ? 2 * p.stride_w
                        : p.stride_w <= widest_shuffle ? p.stride_w * p.stride_w
                                                       : p.stride_w * VL;
  const int64_t windows = new_rows * (vectors * (3 * p.S + split) + 10) + vectors * 3 * p.R;
  const bool one_run = p.S == p.W && p.Q == 1 && p.pad_w == 0 && p.dilation_h == 1;
  const int64_t runs = one_run ? 1 : p.R, length = one_run ? p.R * p.S : p.S;
  const int64_t taps = p.Q * (runs * (3 * ceil_div(length, VL) + 3) + 20);
  return taps < windows;
}

// The smallest tap among the lanes that hold the maximum.
PYSEQNET_INLINE int64_t first_highest(const Best& best) {
  const float highest = hmax(best.value);
#if defined(__AVX512F__)
  const __mmask16 holds = _mm512_cmp_ps_mask((__m512)best.value, (__m512)set1(highest), _CMP_EQ_OQ);
  return _mm512_mask_reduce_min_epi32(holds, (__m512i)best.tap);
#else
  int32_t tap = INT32_MAX;
  for (int l = 0; l < VL; l++) tap = best.value[l] == highest && best.tap[l] < tap ? best.tap[l] : tap;
  return tap;
#endif
}

// Output rows [i0, i1) of one plane, one window after the other; its columns of taps are lanes.
template <class T, class Tap, bool with_arg>
void window_along_taps(const MaxPoolProblem& p, const T* x, Extent<T> all, int64_t i0, int64_t i1, T* y,
                       Tap* arg) {
  const vf lowest = set1(minus_infinity);
  for (int64_t i = i0; i < i1; i++)
    for (int64_t j = 0; j < p.Q; j++) {
      const int64_t h0 = i * p.stride_h - p.pad_h, w0 = j * p.stride_w - p.pad_w;
      const TapRange rows = taps_inside(h0, p.dilation_h, p.R, p.H), columns = taps_inside(w0, 1, p.S, p.W);
      const int64_t first = first_tap(h0, p.dilation_h, p.R) * p.S + first_tap(w0, 1, p.S);
      // A window as wide as the image (global pooling) is one run of taps, not R short ones.
      const bool one_run = p.S == p.W && w0 == 0 && p.dilation_h == 1;
      const int64_t runs = one_run ? smaller(rows.first + 1, rows.end) : rows.end;
      const int64_t end = one_run ? (rows.end - rows.first) * p.S : columns.end;
      Best best{lowest, set1_tap(first)};
      Lanes nan = {};
      for (int64_t r = rows.first; r < runs; r++) {
        const T* row = x + (h0 + r * p.dilation_h) * p.W + w0;
        for (int64_t s = columns.first; s < end; s += VL) {
          const int64_t left = end - s;
          const vf v = left >= VL ? load_lanes(row + s) : load_clipped(row + s, 0, left, lowest, all);
          nan |= either_nan(v, v);
          best.consider<false, true>(v, set1_tap(r * p.S + s) + iota());
        }
      }
      // The first of equal maxima; where all are -inf every lane still holds `first`.
      int64_t tap = first;
      if (any(nan)) {
        for (int64_t r = rows.first; r < rows.end; r++)
          for (int64_t s = columns.first; s < columns.end; s++) {
            const float v = to_float(x[(h0 + r * p.dilation_h) * p.W + w0 + s]);
            if (v != v) tap = r * p.S + s;
          }
      } else {
        tap = first_highest(best);
      }
      const int64_t h = h0 + tap / p.S * p.dilation_h, w = w0 + tap % p.S;
      if (h < p.H && w < p.W)
        y[i * p.Q + j] = x[h * p.W + w];
      else
        round_to(y[i * p.Q + j], minus_infinity);
      if (with_arg) arg[i * p.Q + j] = Tap(tap);
    }
}

}  // namespace PYSEQNET_ISA
}  // namespace pyseqnet
