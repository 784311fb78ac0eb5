// Max-pooling of planar images, forward, for the window of the networks' first layer: 3x3, stride 2, padding 0 or 1.
//
// Windows overlap in rows and columns. An image row is reduced once to the maxima of its windows of 3 columns;
// the row that two rows of windows share is kept for the second of them. Its vectors are loaded where they lie,
// one shuffle each gives the even and the odd columns, and the third column of a window is the next one's first:
// the same lanes, moved by one. Rows are read from top to bottom, a strip of columns at a time, as the memory
// likes it. Row-major order survives: the first winner of a row, then the first row.
//
// Bound: memory traffic, as for all small windows; a NaN sends a vector of windows to small_window_with_nan().
#pragma once
#include "pool/max_pool_planes.h"

namespace pyseqnet {
inline namespace PYSEQNET_ISA {

// edge[0], v[0], v[1] .. and v[1], v[2] .., edge[0].
template <int... I>
PYSEQNET_INLINE vf moved_up(vf v, vf edge, LaneList<I...>) {
  return __builtin_shufflevector(v, edge, (I == 0 ? VL : I - 1)...);
}
template <int... I>
PYSEQNET_INLINE vf moved_down(vf v, vf edge, LaneList<I...>) {
  return __builtin_shufflevector(v, edge, (I + 1)...);
}

// A vector of windows, number j of the row and on.
struct ThreeColumns {
  int64_t column;  // of the image: the first window's second (pad 1) or first (pad 0) tap
  int64_t edge;    // of the image: the tap that no lane of the two vectors holds
  bool has_edge;
  Part low, high;  // of the two vectors, inside the image
  vi first;        // the first tap inside the image
  int64_t count;   // of windows
};
template <int pad>
PYSEQNET_INLINE ThreeColumns three_columns(const MaxPoolProblem& p, int64_t j) {
  const int64_t column = 2 * j, edge = pad ? column - 1 : column + 2 * VL;
  const vi outside = iota() * 2 + int32_t(smaller(column, 2)) < pad;
  return {column,
          edge,
          edge >= 0 && edge < p.W,
          lanes_between(0, p.W - column),
          lanes_between(0, p.W - column - VL),
          outside ? set1_tap(1) : vi{},
          smaller(VL, p.Q - j)};
}
// The maxima of a row, and their columns.
template <class T, int pad, bool with_arg>
PYSEQNET_INLINE Best row_of_three(const ThreeColumns& c, const T* row, Extent<T> all, Lanes& nan) {
  const vf lowest = set1(minus_infinity);
  const vf a = load_part_or(row + c.column, c.low, lowest, all);
  const vf b = load_part_or(row + c.column + VL, c.high, lowest, all);
  const vf edge = c.has_edge ? set1(to_float(row[c.edge])) : lowest;
  const vf even = even_of(a, b), odd = odd_of(a, b);
  const vf beside = pad ? moved_up(odd, edge, EveryLane{}) : moved_down(even, edge, EveryLane{});
  nan = either_nan(even, odd) | either_nan(beside, beside);
  Best best{pad ? beside : even, c.first};
  best.consider<false, with_arg>(pad ? even : odd, set1_tap(1));
  best.consider<false, with_arg>(pad ? odd : beside, set1_tap(2));
  return best;
}

// Asks for the two rows that a vector of windows adds, some rows before they are read. Strips of columns jump from row to
// row, which hardware does not foresee on every machine: without this an image beyond the caches comes at a seventh of
// the speed on Zen 5.
template <class T>
PYSEQNET_INLINE void ask_ahead(const MaxPoolProblem& p, const T* row, int64_t column) {
  constexpr int64_t bytes_ahead = 8192, line = 64 / int64_t(sizeof(T));
  const T* ahead = row + column + bytes_ahead / int64_t(sizeof(T));
#pragma GCC unroll 4
  for (int64_t c = 0; c < 2 * VL; c += line)
    __builtin_prefetch(ahead + c), __builtin_prefetch(ahead + p.W + c);
}

// Output rows [i0, i1) of one plane.
template <class T, int pad, bool with_arg>
void rows_of_three(const MaxPoolProblem& p, const T* x, Extent<T> all, int64_t i0, int64_t i1, T* y,
                   uint8_t* arg) {
  constexpr int vectors = 64 / VL;  // of a strip
  for (int64_t j0 = 0; j0 < p.Q; j0 += vectors * VL) {
    const int64_t count = smaller(vectors, ceil_div(p.Q - j0, VL));
    ThreeColumns columns[vectors];
    Best shared[vectors];
    Lanes shared_nan[vectors];
    for (int64_t k = 0; k < count; k++) columns[k] = three_columns<pad>(p, j0 + k * VL);
    for (int64_t i = i0; i < i1; i++) {
      const int64_t h = 2 * i - p.pad_h;
      const T* row = x + h * p.W;
      const bool top = h >= 0, bottom = h + 2 < p.H;
      for (int64_t k = 0; k < count; k++) {
        const ThreeColumns& c = columns[k];
        const int64_t j = j0 + k * VL;
        ask_ahead(p, row + p.W, c.column);
        Best best;
        Lanes nan = {}, nan_of_row;
        if (top) {
          best = i > i0 ? shared[k] : row_of_three<T, pad, with_arg>(c, row, all, nan);
          if (i > i0) nan = shared_nan[k];
        }
        const Best middle = row_of_three<T, pad, with_arg>(c, row + p.W, all, nan_of_row);
        nan |= nan_of_row;
        const vi tap = middle.tap + 3;
        if (top)
          best.consider<false, with_arg>(middle.value, tap);
        else
          best = {middle.value, tap};
        if (bottom) {
          shared[k] = row_of_three<T, pad, with_arg>(c, row + 2 * p.W, all, shared_nan[k]);
          nan |= shared_nan[k];
          best.consider<false, with_arg>(shared[k].value, shared[k].tap + 6);
        }
        T* to = y + i * p.Q + j;
        uint8_t* taps = with_arg ? arg + i * p.Q + j : nullptr;
        if (__builtin_expect(any(nan), 0)) {
          small_window_with_nan<T, 3, 3, 2, with_arg>(p, x, all, i, j, c.count, to, taps);
          continue;
        }
        store_lanes_n(to, best.value, c.count);
        if (with_arg) store_taps_n(taps, best.tap, c.count);
      }
    }
  }
}

// The kernel for this window, or null.
template <class T>
PYSEQNET_INLINE SmallWindowRows<T> window_of_three(const MaxPoolProblem& p) {
  // Windows whose middle row or column lies outside the image are left to others.
  if (p.R != 3 || p.S != 3 || p.stride_h != 2 || p.stride_w != 2 || p.dilation_h != 1 || p.dilation_w != 1 ||
      p.pad_h > 1 || 2 * p.P - p.pad_h > p.H || 2 * p.Q - p.pad_w > p.W)
    return nullptr;
  if (p.pad_w == 0) return p.with_arg ? rows_of_three<T, 0, true> : rows_of_three<T, 0, false>;
  if (p.pad_w == 1) return p.with_arg ? rows_of_three<T, 1, true> : rows_of_three<T, 1, false>;
  return nullptr;
}

}  // namespace PYSEQNET_ISA
}  // namespace pyseqnet
