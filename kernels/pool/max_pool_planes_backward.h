// Max-pooling of planar images (NCHW), backward. Lanes are neighbouring columns of gx.
//
// Small windows, gather form: a pixel adds the gradients of the windows that cover it and name it in arg, in
// the row-major order of the windows. Every element of gx is written once: no zero fill, no atomics. Columns
// of one phase (w + pad_w modulo stride_w) meet neighbouring windows, so each (window row, tap) is one load
// of gy, one of arg, one comparison and one masked addition; the phases are merged by shuffles before the
// store.
//
// Other windows than the small ones cost less as a scatter: one plane is cleared, its windows add to it one
// by one. A plane belongs to one item, so the order of the additions is fixed. Bound: memory traffic; gx that
// cannot stay in the cache is written past it.
#pragma once
#include "pool/max_pool_planes.h"

namespace pyseqnet {
inline namespace PYSEQNET_ISA {

// Writes past the cache; p is aligned to a whole vector.
PYSEQNET_INLINE void stream_lanes(float* p, vf v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, (__m512)v);
#elif defined(__AVX2__)
  _mm256_stream_ps(p, (__m256)v);
#elif defined(__SSE2__)
  _mm_stream_ps(p, (__m128)v);
#else
  store(p, v);
#endif
}
template <class T>
PYSEQNET_INLINE void stream_lanes(T* p, vf v) {
  store_lanes(p, v);
}
PYSEQNET_INLINE void end_streaming() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// n image columns (whole vectors except the last) of merged phases.
template <bool stream, class T, int stride>
PYSEQNET_INLINE void store_columns(T* row, int64_t n, vf (&v)[stride]) {
#pragma GCC unroll 4
  for (int k = 0; k < stride; k++) {
    const int64_t left = n - k * VL;
    if (left <= 0) break;
    if (stream)
      stream_lanes(row + k * VL, v[k]);
    else
      store_lanes_n(row + k * VL, v[k], left);
  }
}

// The rows of windows that cover row h of the image, first to last, each with the first tap of its row r.
struct CoveringRows {
  int64_t first, end;  // window rows first <= i < end, of which those with (h + pad_h - i stride_h) divisible
};
PYSEQNET_INLINE CoveringRows covering_rows(const MaxPoolProblem& p, int64_t h) {
  const int64_t reach = h + p.pad_h - (p.R - 1) * p.dilation_h;
  return {reach > 0 ? ceil_div(reach, p.stride_h) : 0, smaller(p.P, (h + p.pad_h) / p.stride_h + 1)};
}

// ---- small windows

constexpr int floor_div(int a, int b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }

// What the taps of a vector of pixels need of a row of windows: columns l + low .. l + high + VL - 1. The
// lanes that are windows are the same for every row.
template <int S, int stride, int pad>
struct WindowColumns {
  static constexpr int low = floor_div(pad - (S - 1), stride), high = floor_div(stride - 1 + pad, stride);
  static constexpr int shifts = high - low + 1;
};

template <class T, int S, int stride, int pad, bool inside, bool stream>
PYSEQNET_INLINE void small_gradient_rows_of_block(const MaxPoolProblem& p, const T* gy, const uint8_t* arg,
                                                  Extent<T> all_gy, Extent<uint8_t> all_arg, int64_t h0,
                                                  int64_t h1, int64_t l, T* gx) {
  using Columns = WindowColumns<S, stride, pad>;
  Part part[Columns::shifts];
#pragma GCC unroll 4
  for (int k = 0; k < Columns::shifts; k++)
    part[k] = lanes_between(-l - Columns::low - k, p.Q - l - Columns::low - k);
  const int64_t n = p.W - l * stride;
  for (int64_t h = h0; h < h1; h++) {
    const CoveringRows rows = covering_rows(p, h);
    vf sum[stride] = {};
    for (int64_t i = rows.first; i < rows.end; i++) {
      const int r = int(h + p.pad_h - i * p.stride_h);
      const T* pg = gy + i * p.Q + l + Columns::low;
      const uint8_t* pa = arg + i * p.Q + l + Columns::low;
      vf g[Columns::shifts];
      vb a[Columns::shifts];
#pragma GCC unroll 4
      for (int k = 0; k < Columns::shifts; k++) {
        g[k] = inside ? load_lanes(pg + k) : load_part(pg + k, part[k], all_gy);
        a[k] = inside ? load_taps(pa + k) : load_taps_part(pa + k, part[k], all_arg);
      }
#pragma GCC unroll 4
      for (int f = 0; f < stride; f++)
#pragma GCC unroll 4
        for (int s = S - 1; s >= 0; s--)
          if ((f + pad - s) % stride == 0) {
            const int k = (f + pad - s) / stride - Columns::low;
            sum[f] = add_where(taps_equal(a[k], r * S + s), sum[f], g[k]);
          }
    }
    merge(sum);
    store_columns<stream>(gx + h * p.W + l * stride, inside ? stride * VL : n, sum);
  }
}

// Rows [h0, h1) of gx of one plane, a few at a time: so the masks of a block are made once for all of them,
// and a wide plane is still written almost row by row.
template <class T, int S, int stride, int pad, bool stream>
void small_gradient_rows(const MaxPoolProblem& p, const T* gy, const uint8_t* arg, Extent<T> all_gy,
                         Extent<uint8_t> all_arg, int64_t h0, int64_t h1, T* gx) {
  using Columns = WindowColumns<S, stride, pad>;
  constexpr int64_t rows_at_once = 8;
  const int64_t lanes = ceil_div(p.W, stride);
  for (; h0 < h1; h0 += rows_at_once)
    for (int64_t block = 0; block < lanes; block += VL) {
      const int64_t l = !stream && block + VL > lanes ? larger(0, lanes - VL) : block;
      const bool inside = l + Columns::low >= 0 && l + VL + Columns::high <= p.Q && (l + VL) * stride <= p.W;
      (inside
           ? small_gradient_rows_of_block<T, S, stride, pad, true, stream>
           : small_gradient_rows_of_block<T, S, stride, pad, false, stream>)(p, gy, arg, all_gy, all_arg, h0,
                                                                             smaller(h1, h0 + rows_at_once),
                                                                             l, gx);
    }
}

template <class T>
using SmallGradientRows = void (*)(const MaxPoolProblem&, const T*, const uint8_t*, Extent<T>,
                                   Extent<uint8_t>, int64_t, int64_t, T*);
template <class T, bool stream>
PYSEQNET_INLINE SmallGradientRows<T> small_gradient(const MaxPoolProblem& p) {
  const bool small = p.dilation_w == 1 && p.dilation_h == 1 && p.R <= 3 && p.pad_w <= 1;
  const int64_t window = small ? p.S * 100 + p.stride_w * 10 + p.pad_w : 0;
  switch (window) {
    case 110:
      return small_gradient_rows<T, 1, 1, 0, stream>;
    case 210:
      return small_gradient_rows<T, 2, 1, 0, stream>;
    case 211:
      return small_gradient_rows<T, 2, 1, 1, stream>;
    case 220:
      return small_gradient_rows<T, 2, 2, 0, stream>;
    case 310:
      return small_gradient_rows<T, 3, 1, 0, stream>;
    case 311:
      return small_gradient_rows<T, 3, 1, 1, stream>;
    case 221:
      return small_gradient_rows<T, 2, 2, 1, stream>;
    case 320:
      return small_gradient_rows<T, 3, 2, 0, stream>;
    case 321:
      return small_gradient_rows<T, 3, 2, 1, stream>;
    default:
      return nullptr;
  }
}

// ---- other windows

// Whether every window has a tap inside the image. With dilation a window may jump over a small image; such a
// window names a pixel outside and passes no gradient on.
PYSEQNET_INLINE bool every_window_inside(const MaxPoolProblem& p) {
  for (int64_t i = 0; i < p.P; i++) {
    const TapRange t = taps_inside(i * p.stride_h - p.pad_h, p.dilation_h, p.R, p.H);
    if (t.first >= t.end) return false;
  }
  for (int64_t j = 0; j < p.Q; j++) {
    const TapRange t = taps_inside(j * p.stride_w - p.pad_w, p.dilation_w, p.S, p.W);
    if (t.first >= t.end) return false;
  }
  return true;
}

template <class T, class Tap, bool checked>
void scatter_plane(const MaxPoolProblem& p, const T* gy, const Tap* arg, const int64_t* offset, float* sum) {
  // arg comes from a caller: one that forward did not write must not make us write outside the plane.
  const uint64_t taps = p.R * p.S, pixels = p.H * p.W;
  for (uint64_t k = 0; k < pixels; k++) sum[k] = 0;
  for (int64_t i = 0; i < p.P; i++)
    for (int64_t j = 0; j < p.Q; j++, gy++, arg++) {
      const int64_t h0 = i * p.stride_h - p.pad_h, w0 = j * p.stride_w - p.pad_w, tap = *arg;
      if (uint64_t(tap) >= taps) continue;
      if (checked) {
        const int64_t h = h0 + tap / p.S * p.dilation_h, w = w0 + tap % p.S * p.dilation_w;
        if (h < 0 || h >= p.H || w < 0 || w >= p.W) continue;
      }
      const int64_t pixel = h0 * p.W + w0 + offset[tap];
      if (uint64_t(pixel) < pixels) sum[pixel] += to_float(*gy);
    }
}

PYSEQNET_INLINE void tap_offsets(const MaxPoolProblem& p, int64_t* offset) {
  for (int64_t r = 0; r < p.R; r++)
    for (int64_t s = 0; s < p.S; s++) offset[r * p.S + s] = r * p.dilation_h * p.W + s * p.dilation_w;
}

template <class T, class Tap, bool checked>
void scatter_planes(const MaxPoolProblem& p, const T* gy, const Tap* arg, T* gx, int64_t begin, int64_t end,
                    std::byte* scratch) {
  Carver carve(scratch);
  int64_t* offset = carve.take<int64_t>(p.R * p.S);
  const int64_t pixels = p.H * p.W, windows = p.P * p.Q;
  float* plane = carve.take<float>(sizeof(T) == 4 ? 0 : pixels);
  tap_offsets(p, offset);
  for (int64_t k = begin; k < end; k++) {
    T* out = gx + k * pixels;
    float* sum = sizeof(T) == 4 ? reinterpret_cast<float*>(out) : plane;
    scatter_plane<T, Tap, checked>(p, gy + k * windows, arg + k * windows, offset, sum);
    if constexpr (sizeof(T) != 4)
      for (int64_t e = 0; e < pixels; e += VL)
        store_lanes_n(out + e,
                      e + VL <= pixels ? load(plane + e) : load_between(plane + e, 0, pixels - e, vf{}),
                      pixels - e);
  }
}
PYSEQNET_INLINE int64_t scatter_bytes(const MaxPoolProblem& p) {
  return align_up(p.R * p.S * 8) + (p.dtype == DType::f32 ? 0 : align_up(p.H * p.W * 4));
}

}  // namespace PYSEQNET_ISA
}  // namespace pyseqnet
