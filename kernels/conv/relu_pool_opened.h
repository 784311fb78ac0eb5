// An image's gradients, opened: which windows pass a gradient on, how much, and where to. What the sparse
// gradient kernels begin with.
#pragma once
#include "common/transpose.h"
#include "conv/relu_pool.h"

namespace pyseqnet {
inline namespace PYSEQNET_ISA {
namespace relu_pool {

PYSEQNET_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
PYSEQNET_INLINE int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }
PYSEQNET_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
PYSEQNET_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

struct OpenedSizes {
  int64_t windows;  // of an image
  int64_t filters;  // K, padded to vectors
};

// g: gy, zero where closed. at: table[tap], table[closed] where closed, plus filter_step times the number of
// the filter. [filter][window] or, transposed, [window][filter]; rows are padded to whole vectors.
struct Opened {
  float* g;
  int32_t* at;
};
constexpr int64_t TABLE = 256;  // one entry a tap and one for closed: a window has at most 255

// Rows of `count` elements, row_stride apart, from `rows` rows of gy and arg; returns whether all are finite.
// Going down a row adds row_step to `at`, going a column to the right column_step.
template <class T>
inline bool open_rows(const T* gy, const uint8_t* arg, int64_t rows, int64_t count, int64_t row_stride,
                      int32_t closed, const int32_t* table, int32_t row_step, int32_t column_step, Opened to,
                      int64_t to_stride) {
  vi odd = {};
  const bool small = closed < VL;  // the table fits a register: a shuffle, not a gather
  const vi entries = (vi)load((const float*)table), of_columns = iota() * column_step;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t e = 0; e < count; e += VL) {
      const int64_t n = count - e;
      const vi tap = load_taps(arg + r * row_stride + e, n);
      const vi open = (tap >= 0) & (tap < closed);
      const vf loaded = load_lanes_n(gy + r * row_stride + e, n);
      const vf g = open ? loaded : vf{};
      odd |= (g - g) != vf{};
      const vi entry = open ? tap : closed - vi{};
      const vi of_place = of_columns + (int32_t(e) * column_step + int32_t(r) * row_step);
      const vi at = of_place + (small ? look_up(entries, entry) : (vi)gather((const float*)table, entry));
      store_lanes_n(to.g + r * to_stride + e, g, n);
      store_lanes_n((float*)to.at + r * to_stride + e, (vf)at, n);
    }
  int32_t any = 0;
  for (int l = 0; l < VL; ++l) any |= odd[l];
  return any == 0;
}
// to[c][r] = from[r][c]; rows of `to` are whole vectors, zero beyond `rows`.
inline void turn(const float* from, int64_t from_stride, int64_t rows, int64_t columns, float* to,
                 int64_t to_stride) {
  for (int64_t r = 0; r < rows; r += VL)
    for (int64_t c = 0; c < columns; c += VL)
      transpose_block(from + r * from_stride + c, from_stride, int(smaller(VL, rows - r)),
                      int(smaller(VL, columns - c)), to + c * to_stride + r, to_stride);
}

#if defined(__AVX512F__)
// open_rows() and turn() of planes at once: [filter][window] is read, [window][filter] written, and no opened
// copy lies in between.
template <class T>
inline bool open_turned(const T* gy, const uint8_t* arg, int64_t filters, int64_t windows, int32_t closed,
                        const int32_t* table, int32_t filter_step, Opened to, int64_t to_stride) {
  vi odd = {};
  const bool small = closed < VL;
  const vi entries = (vi)load((const float*)table);
  for (int64_t k = 0; k < filters; k += VL) {
    const int rows = int(smaller(VL, filters - k));
    const vi of_place = (iota() + int32_t(k)) * filter_step;
    for (int64_t w = 0; w < windows; w += VL) {
      const int columns = int(smaller(VL, windows - w));
      TapBytes taps[VL];
      load_turned_taps(arg + k * windows + w, windows, rows, columns, taps);
      vf g[VL];
#pragma GCC unroll 16
      for (int i = 0; i < VL; ++i) g[i] = i < rows ? load_lanes_n(gy + (k + i) * windows + w, columns) : vf{};
      transpose(g);
#pragma GCC unroll 16
      for (int i = 0; i < VL; ++i) {
        if (i >= columns) break;
        const vi tap = (vi)_mm512_cvtepu8_epi32(taps[i]), open = tap < closed;
        const vf passed = open ? g[i] : vf{};
        odd |= (passed - passed) != vf{};
        const vi entry = open ? tap : closed - vi{};
        const vi at = of_place + (small ? look_up(entries, entry) : (vi)gather((const float*)table, entry));
        store(to.g + (w + i) * to_stride + k, passed);
        store((float*)to.at + (w + i) * to_stride + k, (vf)at);
      }
    }
  }
  int32_t any = 0;
  for (int l = 0; l < VL; ++l) any |= odd[l];
  return any == 0;
}
#endif

// An image's gradients in the wanted order; `spare` holds another such pair.
template <class T>
inline bool open_image(const ConvReluPoolProblem& f, const OpenedSizes& z, const T* gy, const uint8_t* arg,
                       const int32_t* table, int32_t filter_step, bool by_window, Opened to, Opened spare) {
  const int64_t K = f.conv.K, W = z.windows, turned = round_up(W, VL);
  const int32_t closed = int32_t(f.closed());
  const bool planes = f.conv.layout == Layout::nchw, as_it_comes = planes != by_window;
  const Opened opened = as_it_comes ? to : spare;
#if defined(__AVX512F__)
  if (planes && by_window) return open_turned(gy, arg, K, W, closed, table, filter_step, to, z.filters);
#endif
  if (planes) {
    const bool finite = open_rows(gy, arg, K, W, W, closed, table, filter_step, 0, opened, turned);
    if (as_it_comes) return finite;
    turn(spare.g, turned, K, W, to.g, z.filters);
    turn((float*)spare.at, turned, K, W, (float*)to.at, z.filters);
    return finite;
  }
  const bool finite = open_rows(gy, arg, W, K, K, closed, table, 0, filter_step, opened, z.filters);
  if (as_it_comes) return finite;
  turn(spare.g, z.filters, W, K, to.g, turned);
  turn((float*)spare.at, z.filters, W, K, (float*)to.at, turned);
  return finite;
}
PYSEQNET_INLINE int64_t opened_floats(const OpenedSizes& z) { return round_up(z.windows, VL) * z.filters; }
PYSEQNET_INLINE Opened take_opened(const OpenedSizes& z, Carver& carver) {
  float* g = carver.take<float>(opened_floats(z));
  return {g, carver.take<int32_t>(opened_floats(z))};
}

}  // namespace relu_pool
}  // namespace PYSEQNET_ISA
}  // namespace pyseqnet
