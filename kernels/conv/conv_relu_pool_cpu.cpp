// The forward pass of the fused block in one sweep: the convolution's output lives in a strip of a few rows,
// in the first-level cache, between its sums and the windows that read them. Every stride, padding, dilation,
// window and layout, float32 and the 16-bit types, computed in float.
//
// Lanes are filters, rows of a register tile are pixels: 2 rows x 6 pixels x 2 vectors of filters, each image
// element broadcast to both vectors. An image row is staged once, padded, split by its remainder modulo the
// stride, so that neighbouring pixels of the output read neighbouring elements at every tap, and a tile needs
// two pointers and one table of tap offsets. With filters in the lanes a pool is an elementwise maximum,
// whatever the window; a register transpose brings planar results home.
//
// A work item is a band of rows of windows of one image and group, all its filters. Windows that do not
// overlap need a strip of one or two rows of windows at a time; others keep the band's.
//
// Bound: FMA, 24 of them for 12 broadcasts and two loads. Where many input channels make the convolution
// outweigh the rest, the composed kernel is faster: it multiplies less (Winograd); also without pooling.
#include "common/transpose.h"
#include "conv/relu_pool.h"

namespace pyseqnet {
inline namespace PYSEQNET_ISA {
namespace relu_pool {
namespace fused {

constexpr int PANEL_VECTORS = 2;
constexpr int TILE_PIXELS = VL == 16 ? 6 : 3;  // of each of two rows: 24 or 12 sums
// Sums are cut into pieces of about this length: the error of one long sum would grow with its root.
constexpr int64_t SUM_LENGTH = 96;
constexpr int64_t MOST_DEPTH = 160;        // input channels times taps
constexpr int64_t BAND_WINDOWS = 256;      // their results stay in the second-level cache
constexpr int64_t ENOUGH_ITEMS = 16;       // for the threads of a small machine, or few images
constexpr int64_t LEAST_BAND_ROWS = 4;     // rows of z under a band: a smaller one stages its edges too often
constexpr int64_t STAGED_BYTES = 4 << 20;  // of a band, at most
constexpr int64_t LARGEST_EXTENT = 1 << 20;

PYSEQNET_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
PYSEQNET_INLINE int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }
PYSEQNET_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Sizes {
  int64_t channels, filters, vectors, taps;  // of a group
  int64_t band, bands;                       // rows of windows of an item
  int64_t strip;                             // rows of windows whose z is held at once
  int64_t z_columns, z_rows;                 // of a strip
  int64_t pitch, row, rows, plane;           // staged: one remainder of a row, a row, rows of a band
  int64_t items;

  int64_t panels() const { return ceil_div(vectors, PANEL_VECTORS); }
  int64_t packed() const { return vectors * VL * channels * taps; }  // floats of a group's filters
};
PYSEQNET_INLINE Sizes sizes(const ConvReluPoolProblem& f) {
  const ConvProblem& p = f.conv;
  Sizes z;
  z.channels = p.group_channels();
  z.filters = p.group_filters();
  z.vectors = ceil_div(z.filters, VL);
  z.taps = p.R * p.S;
  z.band = smaller(f.U, larger(1, BAND_WINDOWS / f.V));
  const int64_t shares = ceil_div(ENOUGH_ITEMS, p.N * p.groups);  // of an image
  const int64_t least = ceil_div(LEAST_BAND_ROWS, f.pool_stride_h);
  z.band = larger(smaller(z.band, ceil_div(f.U, shares)), smaller(least, z.band));
  z.bands = ceil_div(f.U, z.band);
  z.strip = !f.disjoint() ? z.band : f.pool_h % 2 == 0 ? 1 : smaller(2, z.band);
  z.z_columns = (f.V - 1) * f.pool_stride_w + f.pool_w;
  z.z_rows = (z.strip - 1) * f.pool_stride_h + f.pool_h;
  z.pitch = ceil_div((z.z_columns - 1) * p.stride_w + (p.S - 1) * p.dilation_w + 1, p.stride_w);
  z.row = z.pitch * p.stride_w;
  z.rows = ((z.band - 1) * f.pool_stride_h + f.pool_h - 1) * p.stride_h + (p.R - 1) * p.dilation_h + 1;
  z.plane = z.rows * z.row;
  z.items = p.N * p.groups * z.bands;
  return z;
}

// ---- the register tile

struct TileJob {
  const float *a0, *a1;    // first tap of the first pixel in two rows of z
  const float* w;          // [channel][tap][NV * VL]
  const int64_t* offsets;  // of the taps
  int64_t taps, channels, plane;
  float *z0, *z1;  // [pixel][NV * VL]
};
template <int NV, int PX>
void tile(const TileJob& t) {
  const int64_t piece = larger(1, SUM_LENGTH / t.taps);
  const float *a0 = t.a0, *a1 = t.a1, *w = t.w;
  for (int64_t c0 = 0; c0 < t.channels; c0 += piece) {
    vf sum[2][PX][NV] = {};
    for (int64_t c = c0; c < smaller(t.channels, c0 + piece); ++c, a0 += t.plane, a1 += t.plane)
      for (int64_t k = 0; k < t.taps; ++k, w += NV * VL) {
        const float *p0 = a0 + t.offsets[k], *p1 = a1 + t.offsets[k];
        vf wv[NV];
#pragma GCC unroll 2
        for (int j = 0; j < NV; ++j) wv[j] = load(w + j * VL);
#pragma GCC unroll 8
        for (int q = 0; q < PX; ++q) {
          const vf x0 = set1(p0[q]), x1 = set1(p1[q]);
#pragma GCC unroll 2
          for (int j = 0; j < NV; ++j) {
            sum[0][q][j] += x0 * wv[j];
            sum[1][q][j] += x1 * wv[j];
          }
        }
      }
#pragma GCC unroll 8
    for (int q = 0; q < PX; ++q)
#pragma GCC unroll 2
      for (int j = 0; j < NV; ++j) {
        float *z0 = t.z0 + (q * NV + j) * VL, *z1 = t.z1 + (q * NV + j) * VL;
        // Both are read before one is written: a single row is both rows.
        const vf v0 = c0 ? load(z0) + sum[0][q][j] : sum[0][q][j];
        const vf v1 = c0 ? load(z1) + sum[1][q][j] : sum[1][q][j];
        store(z0, v0);
        store(z1, v1);
      }
  }
}

// ---- an item

struct Scratch {
  float *stage, *z, *best, *bias;
  int32_t* tap;
  int64_t* offsets;
  int64_t bytes;
};
Scratch scratch_of(const ConvReluPoolProblem& f, const Sizes& z, std::byte* base) {
  constexpr int64_t lanes = PANEL_VECTORS * VL;
  const bool planes = f.conv.layout == Layout::nchw;
  Carver carver(base);
  Scratch s;
  s.stage = carver.take<float>(z.channels * z.plane);
  s.z = carver.take<float>(z.z_rows * z.z_columns * lanes);
  s.bias = carver.take<float>(z.vectors * VL);
  s.offsets = carver.take<int64_t>(z.taps);
  s.best = carver.take<float>(planes ? z.band * f.V * lanes : 0);
  // turn_tap_bytes() reads VL rows of VL bytes
  s.tap = carver.take<int32_t>(planes && f.with_arg ? z.band * f.V * lanes + VL * VL / 4 : 0);
  s.bytes = carver.used();
  return s;
}

template <class T, class Tap>
struct Item {
  const ConvReluPoolProblem& f;
  const Sizes& z;
  const ConvReluPoolTensors& t;
  const float* filters;  // packed
  const Scratch& s;
  const ConvProblem& p = f.conv;
  int64_t n = 0, group = 0, first = 0, rows = 0;  // the band: rows of windows

  void run(int64_t item) {
    first = item % z.bands * z.band;
    group = item / z.bands % p.groups;
    n = item / z.bands / p.groups;
    rows = smaller(z.band, f.U - first);
    stage();
    for (int64_t r = 0; r < p.R; ++r)
      for (int64_t k = 0; k < p.S; ++k) {
        const int64_t column = k * p.dilation_w;
        s.offsets[r * p.S + k] =
            r * p.dilation_h * z.row + column % p.stride_w * z.pitch + column / p.stride_w;
      }
    const T* bias = static_cast<const T*>(t.bias);
    for (int64_t k = 0; k < z.vectors * VL; ++k)
      s.bias[k] = bias && k < z.filters ? to_float(bias[group * z.filters + k]) : 0.0f;
    for (int64_t panel = 0; panel < z.panels(); ++panel) {
      if (panel * PANEL_VECTORS + 1 < z.vectors)
        run_panel<2>(panel);
      else
        run_panel<1>(panel);
    }
  }

  // The rows that the band reads: [channel][row][remainder][column], zero outside the image.
  void stage() const {
    const Strides xs = p.x_strides();
    const T* x = static_cast<const T*>(t.x) + n * xs.n + group * z.channels * xs.c;
    const int64_t top = first * f.pool_stride_h * p.stride_h - p.pad_h;
    for (int64_t c = 0; c < z.channels; ++c)
      for (int64_t i = 0; i < z.rows; ++i) {
        float* to = s.stage + c * z.plane + i * z.row;
        const int64_t h = top + i;
        if (h < 0 || h >= p.H) {
          for (int64_t e = 0; e < z.row; e += VL) store_lanes_n(to + e, vf{}, z.row - e);
          continue;
        }
        const T* from = x + c * xs.c + h * xs.h;
        if (p.stride_w == 1 && xs.w == 1) {
          for (int64_t e = 0; e < z.row; e += VL)
            store_lanes_n(to + e, load_between(from + e - p.pad_w, p.pad_w - e, p.W + p.pad_w - e, vf{}),
                          z.row - e);
          continue;
        }
        for (int64_t phase = 0; phase < p.stride_w; ++phase)
          for (int64_t e = 0; e < z.pitch; ++e) {
            const int64_t w = e * p.stride_w + phase - p.pad_w;
            to[phase * z.pitch + e] = w >= 0 && w < p.W ? to_float(from[w * xs.w]) : 0.0f;
          }
      }
  }

  template <int NV>
  void run_panel(int64_t panel) const {
    const int64_t vector = panel * PANEL_VECTORS;
    const float* w = filters + group * z.packed() + vector * VL * z.channels * z.taps;
    for (int64_t u = 0; u < rows; u += z.strip) {
      const int64_t count = smaller(z.strip, rows - u);
      convolve<NV>(w, u * f.pool_stride_h, (count - 1) * f.pool_stride_h + f.pool_h);
      const bool two = f.pool_h == 2 && f.pool_w == 2;
      for (int64_t i = 0; i < count; ++i) {
        const float* from = s.z + i * f.pool_stride_h * z.z_columns * NV * VL;
        if (two)
          pool<NV, 2>(from, u + i, vector);
        else
          pool<NV, 0>(from, u + i, vector);
      }
    }
    if (p.layout == Layout::nchw) bring_home<NV>(vector);
  }

  // Rows first_row ... of the band's z, two at a time; an odd last one is computed with the one before it.
  template <int NV>
  void convolve(const float* w, int64_t first_row, int64_t count) const {
    using Tile = void (*)(const TileJob&);
    static constexpr Tile tiles[] = {tile<NV, 1>,        tile<NV, 2>,        tile<NV, 3>,
                                     tile < NV,          VL == 16 ? 4 : 1 >, tile < NV,
                                     VL == 16 ? 5 : 1 >, tile < NV,          VL == 16 ? 6 : 1 > };
    const int64_t tile_count = ceil_div(z.z_columns, TILE_PIXELS);
    for (int64_t i = 0; i < count; i += 2) {
      const int64_t i0 = i + 1 < count || i == 0 ? i : i - 1, i1 = smaller(i0 + 1, count - 1);
      const float *a0 = s.stage + (first_row + i0) * p.stride_h * z.row,
                  *a1 = s.stage + (first_row + i1) * p.stride_h * z.row;
      float *z0 = s.z + i0 * z.z_columns * NV * VL, *z1 = s.z + i1 * z.z_columns * NV * VL;
      for (int64_t k = 0, q = 0; k < tile_count; ++k) {  // tiles of nearly equal width
        const int64_t width = (z.z_columns - q + tile_count - k - 1) / (tile_count - k);
        tiles[width - 1](
            {a0 + q, a1 + q, w, s.offsets, z.taps, z.channels, z.plane, z0 + q * NV * VL, z1 + q * NV * VL});
        q += width;
      }
    }
  }

  // One row of windows, number u of the band, whose z begins at `from`. W x W windows, or any (0).
  template <int NV, int W>
  void pool(const float* from, int64_t u, int64_t vector) const {
    const bool planes = p.layout == Layout::nchw, args = f.with_arg;
    const Strides ys = f.y_strides();
    const int64_t k = vector * VL, K = z.filters;
    const int64_t row = n * ys.n + (group * K + k) * ys.c + (first + u) * ys.h;  // where channels are last
    T* y = static_cast<T*>(t.y);
    Tap* arg = static_cast<Tap*>(t.arg);
    vf bias[NV];
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) bias[j] = load(s.bias + k + j * VL);
    for (int64_t v = 0; v < f.V; ++v) {
      const float* corner = from + v * f.pool_stride_w * NV * VL;
#pragma GCC unroll 2
      for (int j = 0; j < NV; ++j) {
        const auto winner = winner_of<NV, W>(corner + j * VL, bias[j]);
        const int64_t at = (u * f.V + v) * NV * VL + j * VL;
        if (planes) {
          store(s.best + at, winner.best);
          if (args) hold(winner.tap, u * f.V + v, j, at);
        } else {
          store_lanes_n(y + row + v * ys.w + j * VL, winner.best, K - k - j * VL);
          if (args) store_taps(arg + row + v * ys.w + j * VL, winner.tap, K - k - j * VL);
        }
      }
    }
  }

  using Winning = typename WinnerOf<Tap>::type;
  template <int NV, int W>
  PYSEQNET_INLINE Winning winner_of(const float* corner, vf bias) const {
    const auto value = [&](int64_t i, int64_t e) PYSEQNET_LAMBDA {
      return as_stored(load(corner + (i * z.z_columns + e) * NV * VL) + bias, T{});
    };
#if defined(__AVX512F__)
    if constexpr (W == 2 && sizeof(Tap) == 1) {  // one comparison a tap, unless there is a NaN (or inf - inf)
      const vf a = value(0, 0), b = value(0, 1), c = value(1, 0), d = value(1, 1);
      if (__builtin_expect(!nan_lanes((a + b) + (c + d)), 1)) {
        Winning winner(f.closed());
        winner.consider_number(a, 0);
        winner.consider_number(b, 1);
        winner.consider_number(c, 2);
        winner.consider_number(d, 3);
        return winner;
      }
    }
#endif
    Winning winner(f.closed());
    int32_t tap = 0;
    const int64_t height = W ? W : f.pool_h, width = W ? W : f.pool_w;
#pragma GCC unroll 2
    for (int64_t i = 0; i < height; ++i)
#pragma GCC unroll 2
      for (int64_t e = 0; e < width; ++e) winner.consider(value(i, e), tap++);
    return winner;
  }

  // Taps on their way to planes: bytes [vector][window][lane], or words [window][vector][lane].
#if defined(__AVX512F__)
  PYSEQNET_INLINE uint8_t* held_bytes(int64_t window, int j) const {
    return (uint8_t*)s.tap + (j * z.band * f.V + window) * VL;
  }
  PYSEQNET_INLINE void hold(TapBytes taps, int64_t window, int j, int64_t) const {
    store_taps(held_bytes(window, j), taps, VL);
  }
#endif
  PYSEQNET_INLINE void hold(vi taps, int64_t, int, int64_t at) const { store((float*)s.tap + at, (vf)taps); }

  // [window][filter] -> [filter][window]
  template <int NV>
  void bring_home(int64_t vector) const {
    const int64_t windows = rows * f.V, plane = f.U * f.V;
    for (int j = 0; j < NV; ++j) {
      const int64_t k = (vector + j) * VL;
      const int columns = int(smaller(VL, z.filters - k));
      const int64_t to = (n * p.K + group * z.filters + k) * plane + first * f.V;
      for (int64_t e = 0; e < windows; e += VL) {
        const int count = int(smaller(VL, windows - e));
        transpose_block_exact(s.best + (e * NV + j) * VL, NV * VL, count, columns,
                              static_cast<T*>(t.y) + to + e, plane);
        if (!f.with_arg) continue;
        Tap* taps = static_cast<Tap*>(t.arg) + to + e;
#if defined(__AVX512F__)
        if constexpr (sizeof(Tap) == 1) {
          turn_tap_bytes(held_bytes(e, j), count, columns, taps, plane);
          continue;
        }
#endif
        turn_taps((const float*)s.tap + (e * NV + j) * VL, NV * VL, count, columns, taps, plane);
      }
    }
  }
  static void turn_taps(const float* from, int64_t stride, int count, int columns, Tap* to, int64_t plane) {
    vf r[VL];
#pragma GCC unroll 16
    for (int i = 0; i < VL; ++i) r[i] = load(from + (i < count ? i : count - 1) * stride);
    transpose(r);
#pragma GCC unroll 16
    for (int i = 0; i < VL; ++i)
      if (i < columns) store_taps(to + i * plane, (vi)r[i], count);
  }
};

// ---- filters: [group][panel][channel][tap][lane], zero in lanes beyond the filters. An item is one channel
// of one vector of filters.
template <class T>
void pack_filters(const ConvReluPoolProblem& f, const Sizes& z, const T* w, float* to, int64_t begin,
                  int64_t end) {
  const ConvProblem& p = f.conv;
  const Strides ws = p.w_strides();
  for (int64_t item = begin; item < end; ++item) {
    const int64_t c = item % z.channels, vector = item / z.channels % z.vectors;
    const int64_t group = item / z.channels / z.vectors, panel = vector / PANEL_VECTORS;
    const int64_t width = smaller(PANEL_VECTORS, z.vectors - panel * PANEL_VECTORS) * VL;
    float* dst = to + group * z.packed() + panel * PANEL_VECTORS * VL * z.channels * z.taps +
                 c * z.taps * width + vector % PANEL_VECTORS * VL;
    for (int64_t l = 0; l < VL; ++l) {
      const int64_t k = vector * VL + l;
      const T* src = w + (group * z.filters + k) * ws.n + c * ws.c;
      for (int64_t r = 0; r < p.R; ++r)
        for (int64_t s = 0; s < p.S; ++s)
          dst[(r * p.S + s) * width + l] = k < z.filters ? to_float(src[r * ws.h + s * ws.w]) : 0.0f;
    }
  }
}

WorkPlan plan(const ConvReluPoolProblem& f) {
  constexpr double fmas_in_20_us = 1e6;
  const Sizes z = sizes(f);
  WorkPlan plan;
  plan.shared_bytes = f.conv.groups * z.packed() * int64_t(sizeof(float));
  plan.thread_bytes = scratch_of(f, z, nullptr).bytes;
  plan.add_phase(f.conv.groups * z.vectors * z.channels, 1 + 20000 / (VL * z.taps));
  plan.add_phase(z.items, 1 + int64_t(fmas_in_20_us * double(z.items) / (f.conv.flops() / 2 + 1)));
  return plan;
}
void run(const ConvReluPoolProblem& f, const ConvReluPoolTensors& t, const WorkSlice& slice) {
  const Sizes z = sizes(f);
  float* filters = reinterpret_cast<float*>(slice.shared);
  with_types(f, [&](auto element, auto tap) PYSEQNET_LAMBDA {
    using T = decltype(element);
    if (slice.phase == 0)
      return pack_filters(f, z, static_cast<const T*>(t.w), filters, slice.begin, slice.end);
    const Scratch s = scratch_of(f, z, slice.scratch);
    Item<T, decltype(tap)> item{f, z, t, filters, s};
    for (int64_t i = slice.begin; i < slice.end; ++i) item.run(i);
  });
}

Refusal refuses(const ConvReluPoolProblem& f) {
  const ConvProblem& p = f.conv;
  if (p.dtype == DType::f64) return "computes in float, not double";
  // Measured, 1x1 to 5x5: z goes straight to y there, and reading it once more is cheaper than the strip.
  if (!f.pooled) return "nothing is pooled: the composed kernel is faster";
  if (p.N == 0 || p.C == 0 || p.K == 0) return "an extent is zero";
  if (p.groups > 1 && p.group_filters() < VL) return "few filters in a group would leave lanes empty";
  if (p.group_channels() * p.R * p.S > MOST_DEPTH)
    return "many input channels: the composed kernel is faster";
  if (p.H > LARGEST_EXTENT || p.W > LARGEST_EXTENT || p.P > LARGEST_EXTENT || p.Q > LARGEST_EXTENT ||
      p.pad_h > LARGEST_EXTENT || p.pad_w > LARGEST_EXTENT)
    return "the image is too large to be staged";
  const Sizes z = sizes(f);
  const int64_t held = z.channels * z.plane + z.z_rows * z.z_columns * PANEL_VECTORS * VL;
  return held * int64_t(sizeof(float)) > STAGED_BYTES ? "a band is too large to be staged" : accepted;
}

}  // namespace fused
}  // namespace relu_pool

extern const ConvReluPoolCpuKernel conv_relu_pool_tile_forward;
const ConvReluPoolCpuKernel conv_relu_pool_tile_forward = {"tile_" PYSEQNET_ISA_NAME, this_isa,
                                                           relu_pool::fused::refuses, relu_pool::fused::plan,
                                                           relu_pool::fused::run};

}  // namespace PYSEQNET_ISA
}  // namespace pyseqnet
