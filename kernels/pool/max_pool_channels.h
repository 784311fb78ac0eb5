// Max-pooling of channels-last images (NHWC). Lanes are channels: every tap of every window is one contiguous
// load, whatever the stride, padding or dilation.
//
//   forward    a few vectors of channels of one window stay in registers while its taps go by. A window in
//              which a NaN turns up is done again in the exact form.
//   backward   gather: a pixel adds the gradients of the windows that cover it and name it, in row-major
//              order; every element is written once. Large windows and very few channels are scattered
//              instead, a block of channels of an image at a time.
// The last vector of channels begins early rather than being short; fewer channels than lanes are masked.
#pragma once
#include "pool/max_pool_planes_backward.h"

namespace pyseqnet {
inline namespace PYSEQNET_ISA {

// One window, `vectors` vectors of channels (or the first n < VL channels if partial). x points to channel c
// of the image.
template <class T, class Tap, int vectors, bool partial, bool exact, bool with_arg>
PYSEQNET_INLINE bool channel_window(const MaxPoolProblem& p, const T* x, Extent<T> all, int64_t h0,
                                    int64_t w0, TapRange rows, TapRange columns, int64_t n, T* y, Tap* arg) {
  const vf lowest = set1(minus_infinity);
  const vi first = set1_tap(first_tap(h0, p.dilation_h, p.R) * p.S + first_tap(w0, p.dilation_w, p.S));
  Best best[vectors];
  Lanes nan = {};
#pragma GCC unroll 4
  for (int k = 0; k < vectors; k++) best[k] = {lowest, first};
  for (int64_t r = rows.first; r < rows.end; r++) {
    const T* pixel = x + ((h0 + r * p.dilation_h) * p.W + w0 + columns.first * p.dilation_w) * p.C;
    vi tap = set1_tap(r * p.S + columns.first);
    for (int64_t s = columns.first; s < columns.end; s++, pixel += p.dilation_w * p.C, tap += 1) {
      vf v[vectors];
#pragma GCC unroll 4
      for (int k = 0; k < vectors; k++)
        v[k] = partial ? load_clipped(pixel, 0, n, lowest, all) : load_lanes(pixel + k * VL);
      if (!exact) {
        if constexpr (vectors == 1) nan |= either_nan(v[0], v[0]);
#pragma GCC unroll 2
        for (int k = 0; k + 1 < vectors; k += 2) nan |= either_nan(v[k], v[k + 1]);
      }
#pragma GCC unroll 4
      for (int k = 0; k < vectors; k++) best[k].template consider<exact, with_arg>(v[k], tap);
    }
  }
  if (!exact && __builtin_expect(any(nan), 0)) return false;
#pragma GCC unroll 4
  for (int k = 0; k < vectors; k++)
    if (partial) {
      store_lanes_n(y, best[0].value, n);
      if (with_arg) store_taps_n(arg, best[0].tap, n);
    } else {
      store_lanes(y + k * VL, best[k].value);
      if (with_arg) store_taps(arg + k * VL, best[k].tap);
    }
  return true;
}

template <class T, class Tap, int vectors, bool partial, bool with_arg>
__attribute__((noinline)) void channel_window_with_nan(const MaxPoolProblem& p, const T* x, Extent<T> all,
                                                       int64_t h0, int64_t w0, TapRange rows,
                                                       TapRange columns, int64_t n, T* y, Tap* arg) {
  channel_window<T, Tap, vectors, partial, true, with_arg>(p, x, all, h0, w0, rows, columns, n, y, arg);
}

// Calls f(Int<vectors>, partial, c, n) for blocks of channels that cover [0, C).
template <int widest, class F>
PYSEQNET_INLINE void for_channel_blocks(int64_t C, F&& f) {
  if (C < VL) return f(Int<1>{}, Int<1>{}, 0, C);
  int64_t c = 0;
  for (; c + widest * VL <= C; c += widest * VL) f(Int<widest>{}, Int<0>{}, c, widest * VL);
  for (; c < C; c += VL) f(Int<1>{}, Int<0>{}, smaller(c, C - VL), VL);
}

// Items are rows of output windows: n P + i.
template <class T, class Tap, bool with_arg>
void channel_rows(const MaxPoolProblem& p, const T* x, T* y, Tap* arg, int64_t begin, int64_t end) {
  const Extent<T> all = {x, x + p.N * p.H * p.W * p.C};
  for (int64_t item = begin; item < end; item++) {
    const int64_t n = item / p.P, h0 = item % p.P * p.stride_h - p.pad_h;
    const T* image = x + n * p.H * p.W * p.C;
    const TapRange rows = taps_inside(h0, p.dilation_h, p.R, p.H);
    for (int64_t j = 0; j < p.Q; j++) {
      const int64_t w0 = j * p.stride_w - p.pad_w, o = (item * p.Q + j) * p.C;
      const TapRange columns = taps_inside(w0, p.dilation_w, p.S, p.W);
      for_channel_blocks<4>(p.C, [&](auto vectors, auto partial, int64_t c, int64_t count) PYSEQNET_LAMBDA {
        constexpr int V = decltype(vectors)::value;
        constexpr bool part = decltype(partial)::value != 0;
        Tap* taps = with_arg ? arg + o + c : nullptr;
        if (!channel_window<T, Tap, V, part, false, with_arg>(p, image + c, all, h0, w0, rows, columns, count,
                                                              y + o + c, taps))
          channel_window_with_nan<T, Tap, V, part, with_arg>(p, image + c, all, h0, w0, rows, columns, count,
                                                             y + o + c, taps);
      });
    }
  }
}

// One pixel of gx from the windows that cover it. o: offset of window row i, column 0, channel c.
template <class T, int vectors, bool partial, bool stream>
PYSEQNET_INLINE void channel_gradient(const MaxPoolProblem& p, const T* gy, const uint8_t* arg,
                                      Extent<T> all_gy, Extent<uint8_t> all_arg, int64_t h, int64_t w,
                                      CoveringRows rows, CoveringRows columns, int64_t n, T* gx) {
  vf sum[vectors] = {};
  for (int64_t i = rows.first; i < rows.end; i++) {
    const int64_t dh = h + p.pad_h - i * p.stride_h;
    if (p.dilation_h != 1 && dh % p.dilation_h) continue;
    const int64_t r = p.dilation_h == 1 ? dh : dh / p.dilation_h;
    for (int64_t j = columns.first; j < columns.end; j++) {
      const int64_t dw = w + p.pad_w - j * p.stride_w;
      if (p.dilation_w != 1 && dw % p.dilation_w) continue;
      const int tap = int(r * p.S + (p.dilation_w == 1 ? dw : dw / p.dilation_w));
      const int64_t o = (i * p.Q + j) * p.C;
#pragma GCC unroll 4
      for (int k = 0; k < vectors; k++) {
        const T* g = gy + o + k * VL;
        const uint8_t* a = arg + o + k * VL;
        const bool whole = !partial || (a >= all_arg.begin && a + VL <= all_arg.end);
        const vb taps = whole ? load_taps(a) : load_taps_between(a, 0, n);
        sum[k] = add_where(taps_equal(taps, tap), sum[k],
                           partial ? load_clipped(g, 0, n, vf{}, all_gy) : load_lanes(g));
      }
    }
  }
#pragma GCC unroll 4
  for (int k = 0; k < vectors; k++)
    if (partial)
      store_lanes_n(gx, sum[k], n);
    else if (stream)
      stream_lanes(gx + k * VL, sum[k]);
    else
      store_lanes(gx + k * VL, sum[k]);
}

PYSEQNET_INLINE CoveringRows covering_columns(const MaxPoolProblem& p, int64_t w) {
  const int64_t reach = w + p.pad_w - (p.S - 1) * p.dilation_w;
  return {reach > 0 ? ceil_div(reach, p.stride_w) : 0, smaller(p.Q, (w + p.pad_w) / p.stride_w + 1)};
}

// Items are rows of gx: n H + h.
template <class T, bool stream>
void channel_gradient_rows(const MaxPoolProblem& p, const T* gy, const uint8_t* arg, T* gx, int64_t begin,
                           int64_t end) {
  const int64_t windows = p.P * p.Q * p.C;
  const Extent<T> all_gy = {gy, gy + p.N * windows};
  const Extent<uint8_t> all_arg = {arg, arg + p.N * windows};
  for (int64_t item = begin; item < end; item++) {
    const int64_t n = item / p.H, h = item % p.H;
    const CoveringRows rows = covering_rows(p, h);
    for (int64_t w = 0; w < p.W; w++) {
      const CoveringRows columns = covering_columns(p, w);
      for_channel_blocks<4>(p.C, [&](auto vectors, auto partial, int64_t c, int64_t count) PYSEQNET_LAMBDA {
        channel_gradient<T, decltype(vectors)::value, decltype(partial)::value != 0, stream>(
            p, gy + n * windows + c, arg + n * windows + c, all_gy, all_arg, h, w, rows, columns, count,
            gx + (item * p.W + w) * p.C + c);
      });
    }
  }
}

// The scatter form takes an image's channels in blocks: all of them if few, else a vector's worth at a time,
// so that the sums stay in the cache.
PYSEQNET_INLINE int64_t scatter_block(const MaxPoolProblem& p) {
  constexpr int64_t few_channels = 64;
  return p.C <= few_channels ? larger(1, p.C) : VL;
}

// Items are blocks of channels of an image: n ceil(C / block) + b. float32 is summed in place, the 16-bit
// types in scratch.
template <class T, class Tap, bool checked>
void scatter_channels(const MaxPoolProblem& p, const T* gy, const Tap* arg, T* gx, int64_t begin, int64_t end,
                      std::byte* scratch) {
  constexpr bool in_place = sizeof(T) == 4;
  const int64_t block = scatter_block(p), blocks = ceil_div(p.C, block), pixels = p.H * p.W;
  Carver carve(scratch);
  int64_t* offset = carve.take<int64_t>(p.R * p.S);
  float* scratch_sum = carve.take<float>(in_place ? 0 : pixels * block);
  const int64_t pitch = in_place ? p.C : block;
  tap_offsets(p, offset);
  for (int64_t t = 0; t < p.R * p.S; t++) offset[t] *= pitch;
  for (int64_t item = begin; item < end; item++) {
    const int64_t n = item / blocks, c = item % blocks * block, count = smaller(block, p.C - c);
    T* out = gx + n * pixels * p.C + c;
    float* sum = in_place ? reinterpret_cast<float*>(out) : scratch_sum;
    const bool dense = count == pitch;
    for (int64_t k = 0; k < (dense ? 1 : pixels); k++)
      for (int64_t l = 0; l < (dense ? pixels * pitch : count); l++) sum[k * pitch + l] = 0;
    for (int64_t i = 0; i < p.P; i++)
      for (int64_t j = 0; j < p.Q; j++) {
        const int64_t h0 = i * p.stride_h - p.pad_h, w0 = j * p.stride_w - p.pad_w;
        const int64_t o = ((n * p.P + i) * p.Q + j) * p.C + c, corner = (h0 * p.W + w0) * pitch;
        for (int64_t l = 0; l < count; l++) {
          const int64_t tap = arg[o + l];
          if (uint64_t(tap) >= uint64_t(p.R * p.S)) continue;  // forged, see scatter_plane
          if (checked) {
            const int64_t h = h0 + tap / p.S * p.dilation_h, w = w0 + tap % p.S * p.dilation_w;
            if (h < 0 || h >= p.H || w < 0 || w >= p.W) continue;
          }
          const int64_t pixel = corner + offset[tap];
          if (uint64_t(pixel) < uint64_t(pixels * pitch)) sum[pixel + l] += to_float(gy[o + l]);
        }
      }
    if constexpr (!in_place)
      for (int64_t k = 0; k < pixels; k++)
        for (int64_t l = 0; l < count; l++) round_to(out[k * p.C + l], sum[k * pitch + l]);
  }
}
PYSEQNET_INLINE int64_t scatter_channels_bytes(const MaxPoolProblem& p) {
  return align_up(p.R * p.S * 8) + (p.dtype == DType::f32 ? 0 : align_up(p.H * p.W * scatter_block(p) * 4));
}

}  // namespace PYSEQNET_ISA
}  // namespace pyseqnet
