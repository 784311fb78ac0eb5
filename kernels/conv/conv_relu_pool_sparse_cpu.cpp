// Gradients of the fused block where pooling thins them out: each window hands its gradient to one pixel, so
// 2x2 pooling leaves a quarter of the dense products. Made for few input channels, the first layers of a
// network, where the dense kernels are bound by memory as well.
//
//   weight gradient   gw[k] = sum over windows of  gy * patch of x under the pixel that won.  The patches of
//   a
//                     strip of rows are laid out once (im2col, some KiB) and used by all filters; the sums of
//                     a few filters stay in registers while the strip passes by. A closed window multiplies
//                     by 0, which costs less than a branch.
//   input gradient    gx under a window = sum over filters of  gy * filter, shifted by the pixel that won.
//                     Every filter is laid out once for each tap, shifted within the area that a window can
//                     reach: a table look-up instead of a branch, and no two-dimensional addressing.
//
// Lanes are the elements of a patch, or of an area, channel fastest: 25 of 32 for one channel and 5x5, 27 of
// 32 for colours and 3x3. Images are the unit of work; the weight gradient adds a fixed number of chunks of
// them in order.
//
// Bound: one load and one multiply-add a vector; about half the FMA peak on a quarter of the products.
#include "conv/relu_pool_opened.h"

namespace pyseqnet {
inline namespace PYSEQNET_ISA {
namespace relu_pool {
namespace sparse {

constexpr int MOST_VECTORS = 4;                 // of a patch or an area, in registers at once
constexpr int64_t STRIP_BYTES = 20 * 1024;      // patches of a strip: in the first-level cache
constexpr int64_t FILTER_BYTES = 24 * 1024;     // shifted filters of a block: the same
constexpr int64_t SHIFTED_BYTES = 1024 * 1024;  // of all filters, at most
constexpr int64_t MOST_PATCH = 160;             // elements: beyond, the dense kernels are as fast
constexpr int64_t STAGED_BYTES = 4 << 20;       // one padded image, at most
constexpr int64_t CHUNKS = 16;                  // of images
constexpr int64_t PART_BYTES = 1 << 20;         // of one chunk's sums, at most
constexpr int64_t LARGEST_EXTENT = 1 << 20;

// An image with its padding, channels fastest: row h of the image is row h + pad_h.
struct Sizes : OpenedSizes {
  int64_t rows, columns, line;                // of the padded image; line = columns * C
  int64_t patch, patch_floats;                // elements under one pixel of z, padded to vectors
  int64_t strip;                              // rows of windows whose patches are laid out together
  int64_t strip_rows, z_columns;              // pixels of z that a strip's windows cover
  int64_t area_h, area_w, area, area_floats;  // what a window can reach, padded to half a vector
  int64_t chunks, part;                       // of images; floats of one chunk's sums

  int64_t staged() const { return rows * line + VL; }  // whole vectors may be read from any element
};
PYSEQNET_INLINE int64_t span(int64_t outputs, int64_t stride, int64_t taps, int64_t dilation) {
  return (outputs - 1) * stride + (taps - 1) * dilation + 1;
}
PYSEQNET_INLINE Sizes sizes(const ConvReluPoolProblem& f) {
  const ConvProblem& p = f.conv;
  Sizes z;
  const int64_t z_rows = (f.U - 1) * f.pool_stride_h + f.pool_h;
  z.z_columns = (f.V - 1) * f.pool_stride_w + f.pool_w;
  z.rows = larger(span(z_rows, p.stride_h, p.R, p.dilation_h), p.H + p.pad_h);
  z.columns = larger(span(z.z_columns, p.stride_w, p.S, p.dilation_w), p.W + p.pad_w);
  z.line = z.columns * p.C;
  z.windows = f.U * f.V;
  z.patch = p.R * p.S * p.C;
  z.patch_floats = round_up(z.patch, VL);
  const int64_t row_bytes = z.z_columns * z.patch_floats * int64_t(sizeof(float));
  z.strip = 1;
  while (z.strip < f.U && ((z.strip * f.pool_stride_h) + f.pool_h) * row_bytes <= STRIP_BYTES) ++z.strip;
  z.strip_rows = (z.strip - 1) * f.pool_stride_h + f.pool_h;
  z.area_h = span(f.pool_h, p.stride_h, p.R, p.dilation_h);
  z.area_w = span(f.pool_w, p.stride_w, p.S, p.dilation_w);
  z.area = z.area_h * z.area_w * p.C;
  z.area_floats = round_up(z.area, VL / 2);
  z.filters = round_up(p.K, VL);
  z.chunks = smaller(p.N, CHUNKS);
  z.part = p.K * z.patch_floats;
  return z;
}

// ---- an image in, an image out

template <class T>
void stage_image(const ConvProblem& p, const Sizes& z, const T* x, float* to) {
  const Strides xs = p.x_strides();
  const int64_t C = p.C;
  for (int64_t e = 0; e < z.staged(); e += VL) store_lanes_n(to + e, vf{}, z.staged() - e);
  for (int64_t h = 0; h < p.H; ++h) {
    float* row = to + (h + p.pad_h) * z.line + p.pad_w * C;
    const T* from = x + h * xs.h;
    if (xs.c == 1 || C == 1) {
      for (int64_t e = 0; e < p.W * C; e += VL)
        store_lanes_n(row + e, load_lanes_n(from + e, p.W * C - e), p.W * C - e);
    } else {
      for (int64_t c = 0; c < C; ++c)
        for (int64_t w = 0; w < p.W; ++w) row[w * C + c] = to_float(from[c * xs.c + w]);
    }
  }
}
template <class T>
void unstage_image(const ConvProblem& p, const Sizes& z, const float* from, T* gx) {
  const Strides xs = p.x_strides();
  const int64_t C = p.C;
  for (int64_t h = 0; h < p.H; ++h) {
    const float* row = from + (h + p.pad_h) * z.line + p.pad_w * C;
    T* to = gx + h * xs.h;
    if (xs.c == 1 || C == 1) {
      for (int64_t e = 0; e < p.W * C; e += VL)
        store_lanes_n(to + e, load_lanes_n(row + e, p.W * C - e), p.W * C - e);
    } else {
      for (int64_t c = 0; c < C; ++c)
        for (int64_t w = 0; w < p.W; ++w) round_to(to[c * xs.c + w], row[w * C + c]);
    }
  }
}

// ---- the weight gradient

// A vector of a patch, put together from rows of the image that are shorter than a vector: lanes from `lane`
// on come from from[offset + lane ...].
constexpr int MOST_PIECES = 4;
struct Pieces {
  int count = 0;
  int64_t offset[MOST_PIECES];
  LanesFrom lanes[MOST_PIECES];
};
// Vector `number` of patches whose rows have `length` elements and lie `down` apart; false if of more pieces.
bool find_pieces(int64_t number, int64_t rows, int64_t length, int64_t down, Pieces& pieces) {
  const int64_t first = number * VL;
  pieces.count = 0;
  for (int64_t r = first / length; r < rows && r * length < first + VL; ++r) {
    if (pieces.count == MOST_PIECES) return false;
    const int64_t lane = larger(0, r * length - first);
    pieces.offset[pieces.count] = r * down + first - r * length;  // of lane 0
    pieces.lanes[pieces.count++] = lanes_from(int(lane));
  }
  return true;
}
template <int N>
void lay_out_vectors(const Pieces& pieces, const float* from, int64_t step, int64_t count, float* to,
                     int64_t to_step) {
  for (int64_t q = 0; q < count; ++q, from += step, to += to_step) {
    vf v = load(from + pieces.offset[0]);
#pragma GCC unroll 4
    for (int i = 1; i < N; ++i) v = merge(v, pieces.lanes[i], from + pieces.offset[i]);
    store(to, v);
  }
}

// The patches under `rows` x z_columns pixels of z, from row first of z on: [pixel][r][s][c]. Whole vectors:
// what is written too far is overwritten by the next run, or lies beyond the patch.
void lay_out_patches(const ConvProblem& p, const Sizes& z, const float* image, int64_t first, int64_t rows,
                     float* to) {
  const bool whole_rows = p.dilation_w == 1;
  const int64_t runs = whole_rows ? 1 : p.S, length = whole_rows ? p.S * p.C : p.C;
  const int64_t step = p.stride_w * p.C, down = p.dilation_h * z.line;
  Pieces pieces;
  if (whole_rows && length <= VL && find_pieces(0, p.R, length, down, pieces)) {  // the first has the most
    for (int64_t j = 0; j < z.patch_floats / VL; ++j) {
      find_pieces(j, p.R, length, down, pieces);
      for (int64_t i = 0; i < rows; ++i)
        with_rows<MOST_PIECES>(pieces.count, [&](auto n) PYSEQNET_LAMBDA {
          lay_out_vectors<decltype(n)::value>(pieces, image + (first + i) * p.stride_h * z.line, step,
                                              z.z_columns, to + i * z.z_columns * z.patch_floats + j * VL,
                                              z.patch_floats);
        });
    }
    return;
  }
  for (int64_t i = 0; i < rows; ++i) {
    const float* from = image + (first + i) * p.stride_h * z.line;
    for (int64_t q = 0; q < z.z_columns; ++q, from += step, to += z.patch_floats) {
      float* dst = to;
      for (int64_t r = 0; r < p.R; ++r)
        for (int64_t s = 0; s < runs; ++s, dst += length) {
          const float* src = from + r * down + s * p.dilation_w * p.C;
          for (int64_t e = 0; e < length; e += VL) store(dst + e, load(src + e));
        }
    }
  }
}

// sums[f][...] += g * patch over the windows of a strip, for F filters and NV vectors of the patch.
template <int F, int NV>
void add_windows(const ConvReluPoolProblem& f, const Sizes& z, const float* patches, int64_t strip_rows,
                 const float* g, const int32_t* at, int64_t filter_stride, float* sums) {
  vf sum[F][NV] = {};
  for (int64_t u = 0; u < strip_rows; ++u) {
    const float* row = patches + u * f.pool_stride_h * z.z_columns * z.patch_floats;
    const int64_t step = f.pool_stride_w * z.patch_floats;
    for (int64_t v = 0; v < f.V; ++v, row += step, ++g, ++at)
#pragma GCC unroll 8
      for (int i = 0; i < F; ++i) {
        const float* patch = row + at[i * filter_stride];
        const vf gv = set1(g[i * filter_stride]);
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) sum[i][j] += gv * load(patch + j * VL);
      }
  }
#pragma GCC unroll 8
  for (int i = 0; i < F; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      float* to = sums + i * z.patch_floats + j * VL;
      store(to, load(to) + sum[i][j]);
    }
}
template <int NV>
void add_strip(const ConvReluPoolProblem& f, const Sizes& z, const float* patches, int64_t strip_rows,
               const float* g, const int32_t* at, int64_t filter_stride, float* sums) {
  constexpr int F = (VL == 16 ? 16 : 8) / (NV == 3 ? 4 : NV);
  int64_t k = 0;
  for (; k + F <= f.conv.K; k += F)
    add_windows<F, NV>(f, z, patches, strip_rows, g + k * filter_stride, at + k * filter_stride,
                       filter_stride, sums + k * z.patch_floats);
  for (; k < f.conv.K; ++k)
    add_windows<1, NV>(f, z, patches, strip_rows, g + k * filter_stride, at + k * filter_stride,
                       filter_stride, sums + k * z.patch_floats);
}
// Calls f(Int<n>, first) for blocks of at most MOST_VECTORS vectors.
template <class F>
PYSEQNET_INLINE void for_vector_blocks(int64_t floats, F&& f) {
  for (int64_t first = 0; first < floats; first += MOST_VECTORS * VL)
    with_rows<MOST_VECTORS>(int(smaller(MOST_VECTORS, (floats - first) / VL)),
                            [&](auto n) PYSEQNET_LAMBDA { f(n, first); });
}

struct WeightScratch {
  float *image, *patches;
  int32_t* table;
  Opened opened, spare;
  int64_t bytes;
};
WeightScratch weight_scratch(const Sizes& z, std::byte* base) {
  Carver carver(base);
  WeightScratch s;
  s.image = carver.take<float>(z.staged());
  s.patches = carver.take<float>(z.strip_rows * z.z_columns * z.patch_floats + MOST_PATCH + VL);
  s.table = carver.take<int32_t>(TABLE);
  s.opened = take_opened(z, carver);
  s.spare = take_opened(z, carver);
  s.bytes = carver.used();
  return s;
}

template <class T>
void weight_chunk(const ConvReluPoolProblem& f, const Sizes& z, const ConvReluPoolTensors& t, int64_t chunk,
                  float* sums, const WeightScratch& s) {
  const ConvProblem& p = f.conv;
  const int64_t of_x = p.C * p.H * p.W, of_y = p.K * z.windows, stride = round_up(z.windows, VL);
  for (int64_t e = 0; e < z.part; e += VL) store(sums + e, vf{});
  for (int64_t n = p.N * chunk / z.chunks; n < p.N * (chunk + 1) / z.chunks; ++n) {
    stage_image(p, z, static_cast<const T*>(t.x) + n * of_x, s.image);
    open_image(f, z, static_cast<const T*>(t.gy) + n * of_y, static_cast<const uint8_t*>(t.arg) + n * of_y,
               s.table, 0, false, s.opened, s.spare);
    for (int64_t u = 0; u < f.U; u += z.strip) {
      const int64_t rows = smaller(z.strip, f.U - u);
      lay_out_patches(p, z, s.image, u * f.pool_stride_h, (rows - 1) * f.pool_stride_h + f.pool_h, s.patches);
      for_vector_blocks(z.patch_floats, [&](auto vectors, int64_t first) PYSEQNET_LAMBDA {
        add_strip<decltype(vectors)::value>(f, z, s.patches + first, rows, s.opened.g + u * f.V,
                                            s.opened.at + u * f.V, stride, sums + first);
      });
    }
  }
}
// One filter of gw: the chunks' sums in order.
template <class T>
void reduce_filter(const ConvProblem& p, const Sizes& z, const float* parts, int64_t k, T* gw) {
  const Strides ws = p.w_strides();
  for (int64_t r = 0, e = 0; r < p.R; ++r)
    for (int64_t s = 0; s < p.S; ++s)
      for (int64_t c = 0; c < p.C; ++c, ++e) {
        float sum = 0;
        for (int64_t chunk = 0; chunk < z.chunks; ++chunk)
          sum += parts[chunk * z.part + k * z.patch_floats + e];
        round_to(gw[k * ws.n + c * ws.c + r * ws.h + s * ws.w], sum);
      }
}

WorkPlan plan_weight(const ConvReluPoolProblem& f) {
  const Sizes z = sizes(f);
  WorkPlan plan;
  plan.add_phase(z.chunks);
  plan.add_phase(f.conv.K, 1 + 8000 / (z.patch * larger(1, z.chunks)));
  plan.shared_bytes = z.chunks * z.part * int64_t(sizeof(float));
  plan.thread_bytes = weight_scratch(z, nullptr).bytes;
  return plan;
}
void run_weight(const ConvReluPoolProblem& f, const ConvReluPoolTensors& t, const WorkSlice& slice) {
  const Sizes z = sizes(f);
  float* parts = reinterpret_cast<float*>(slice.shared);
  with_element(f.conv.dtype, [&](auto element) PYSEQNET_LAMBDA {
    using T = decltype(element);
    if (slice.phase == 1) {
      for (int64_t k = slice.begin; k < slice.end; ++k)
        reduce_filter(f.conv, z, parts, k, static_cast<T*>(t.gw));
      return;
    }
    const WeightScratch s = weight_scratch(z, slice.scratch);
    s.table[f.closed()] = 0;  // its gradient is zero
    for (int64_t tap = 0; tap < f.window(); ++tap)
      s.table[tap] = int32_t((tap / f.pool_w * z.z_columns + tap % f.pool_w) * z.patch_floats);
    for (int64_t chunk = slice.begin; chunk < slice.end; ++chunk)
      weight_chunk<T>(f, z, t, chunk, parts + chunk * z.part, s);
  });
}

// ---- the input gradient

// Filter k for every tap that may win: [tap][area], zero where the shifted filter does not reach.
template <class T>
void shift_filter(const ConvReluPoolProblem& f, const Sizes& z, const T* w, int64_t k, float* to) {
  const ConvProblem& p = f.conv;
  const Strides ws = p.w_strides();
  for (int64_t tap = 0; tap < f.window(); ++tap, to += z.area_floats) {
    for (int64_t e = 0; e < z.area_floats; ++e) to[e] = 0.0f;
    const int64_t i = tap / f.pool_w * p.stride_h, j = tap % f.pool_w * p.stride_w;
    for (int64_t r = 0; r < p.R; ++r)
      for (int64_t s = 0; s < p.S; ++s)
        for (int64_t c = 0; c < p.C; ++c)
          to[((i + r * p.dilation_h) * z.area_w + j + s * p.dilation_w) * p.C + c] =
              to_float(w[k * ws.n + c * ws.c + r * ws.h + s * ws.w]);
  }
}

typedef float half_vector __attribute__((vector_size(VL * 2)));
typedef float half_vector_u __attribute__((vector_size(VL * 2), aligned(4), may_alias));

// area = sum over filters of g * shifted filter, NV vectors of it and, if asked, half of one.
template <int NV, bool half>
void sum_filters(const float* shifted, const float* g, const int32_t* at, int64_t filters, float* area) {
  vf even[NV + 1] = {}, odd[NV + 1] = {};
  half_vector even_half = {}, odd_half = {};
  int64_t k = 0;
  for (; k + 2 <= filters; k += 2) {
    const float *a = shifted + at[k], *b = shifted + at[k + 1];
    const vf ga = set1(g[k]), gb = set1(g[k + 1]);
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      even[j] += ga * load(a + j * VL);
      odd[j] += gb * load(b + j * VL);
    }
    if constexpr (half) {
      even_half += g[k] * *(const half_vector_u*)(a + NV * VL);
      odd_half += g[k + 1] * *(const half_vector_u*)(b + NV * VL);
    }
  }
  if (k < filters) {
    const vf ga = set1(g[k]);
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) even[j] += ga * load(shifted + at[k] + j * VL);
    if constexpr (half) even_half += g[k] * *(const half_vector_u*)(shifted + at[k] + NV * VL);
  }
#pragma GCC unroll 4
  for (int j = 0; j < NV; ++j) store(area + j * VL, even[j] + odd[j]);
  if constexpr (half) *(half_vector_u*)(area + NV * VL) = even_half + odd_half;
}
void sum_filters(const float* shifted, const float* g, const int32_t* at, int64_t filters, float* area,
                 int64_t floats) {
  for (; floats > 0; floats -= MOST_VECTORS * VL, shifted += MOST_VECTORS * VL, area += MOST_VECTORS * VL) {
    const bool half = floats < MOST_VECTORS * VL && floats % VL;
    const int vectors = int(smaller(MOST_VECTORS, floats / VL));
    if (!vectors) return sum_filters<0, true>(shifted, g, at, filters, area);
    with_rows<MOST_VECTORS>(vectors, [&](auto n) PYSEQNET_LAMBDA {
      if (half)
        sum_filters<decltype(n)::value, true>(shifted, g, at, filters, area);
      else
        sum_filters<decltype(n)::value, false>(shifted, g, at, filters, area);
    });
  }
}

// Where a gradient is infinite or NaN, a product with a shifted filter's zeros would spread it: element by
// element then.
void add_exactly(const ConvReluPoolProblem& f, const Sizes& z, const float* shifted, const Opened& o,
                 int64_t first, int64_t last, float* image) {
  const ConvProblem& p = f.conv;
  for (int64_t window = 0; window < z.windows; ++window) {
    float* corner = image + window / f.V * f.pool_stride_h * p.stride_h * z.line +
                    window % f.V * f.pool_stride_w * p.stride_w * p.C;
    for (int64_t k = first; k < last; ++k) {
      const float g = o.g[window * z.filters + k];
      if (g == 0) continue;
      const int64_t at = o.at[window * z.filters + k];
      const int64_t tap = (at / z.area_floats) % f.window();
      const int64_t i = tap / f.pool_w * p.stride_h, j = tap % f.pool_w * p.stride_w;
      for (int64_t r = 0; r < p.R; ++r)
        for (int64_t s = 0; s < p.S; ++s) {
          const int64_t row = i + r * p.dilation_h, column = (j + s * p.dilation_w) * p.C;
          for (int64_t c = 0; c < p.C; ++c)
            corner[row * z.line + column + c] += g * shifted[at + row * z.area_w * p.C + column + c];
        }
    }
  }
}

struct InputScratch {
  float *image, *area;
  int32_t* table;
  Opened opened, spare;
  int64_t bytes;
};
InputScratch input_scratch(const Sizes& z, std::byte* base) {
  Carver carver(base);
  InputScratch s;
  s.image = carver.take<float>(z.staged());
  s.area = carver.take<float>(z.area_floats + VL);
  s.table = carver.take<int32_t>(TABLE);
  s.opened = take_opened(z, carver);
  s.spare = take_opened(z, carver);
  s.bytes = carver.used();
  return s;
}

// Filters first .. last, whose shifted copies stay in the cache, over all windows of an image.
void add_filters(const ConvReluPoolProblem& f, const Sizes& z, const float* shifted, const Opened& o,
                 int64_t first, int64_t last, float* area, float* image) {
  const ConvProblem& p = f.conv;
  const int64_t length = z.area_w * p.C;
  for (int64_t u = 0, window = 0; u < f.U; ++u)
    for (int64_t v = 0; v < f.V; ++v, ++window) {
      const float* g = o.g + window * z.filters + first;
      const int32_t* at = o.at + window * z.filters + first;
      sum_filters(shifted, g, at, last - first, area, z.area_floats);
      float* corner =
          image + u * f.pool_stride_h * p.stride_h * z.line + v * f.pool_stride_w * p.stride_w * p.C;
      for (int64_t i = 0; i < z.area_h; ++i, corner += z.line)
        for (int64_t e = 0; e < length; e += VL) {
          const int n = int(smaller(VL, length - e));
          store_lanes_n(corner + e, load_lanes_n(corner + e, n) + load(area + i * length + e), n);
        }
    }
}

template <class T>
void input_image(const ConvReluPoolProblem& f, const Sizes& z, const ConvReluPoolTensors& t, int64_t n,
                 const float* shifted, const InputScratch& s) {
  const ConvProblem& p = f.conv;
  const int64_t of_x = p.C * p.H * p.W, of_y = p.K * z.windows;
  const int64_t of_filter = f.window() * z.area_floats;
  // In the order of the filters' places, not of the taps' within one.
  const bool finite =
      open_image(f, z, static_cast<const T*>(t.gy) + n * of_y, static_cast<const uint8_t*>(t.arg) + n * of_y,
                 s.table, int32_t(of_filter), true, s.opened, s.spare);
  for (int64_t e = 0; e < z.staged(); e += VL) store_lanes_n(s.image + e, vf{}, z.staged() - e);
  const int64_t block = larger(2, FILTER_BYTES / (of_filter * int64_t(sizeof(float))) / 2 * 2);
  for (int64_t k = 0; k < p.K; k += block) {
    const int64_t last = smaller(k + block, p.K);
    if (finite)
      add_filters(f, z, shifted, s.opened, k, last, s.area, s.image);
    else
      add_exactly(f, z, shifted, s.opened, k, last, s.image);
  }
  unstage_image(p, z, s.image, static_cast<T*>(t.gx) + n * of_x);
}

WorkPlan plan_input(const ConvReluPoolProblem& f) {
  const Sizes z = sizes(f);
  const int64_t shifted = f.conv.K * f.window() * z.area_floats;
  WorkPlan plan;
  plan.add_phase(f.conv.K, 1 + 20000 * f.conv.K / larger(1, shifted));
  plan.add_phase(f.conv.N, 1 + 4000 / (z.windows * f.conv.K));
  plan.shared_bytes = shifted * int64_t(sizeof(float));
  plan.thread_bytes = input_scratch(z, nullptr).bytes;
  return plan;
}
void run_input(const ConvReluPoolProblem& f, const ConvReluPoolTensors& t, const WorkSlice& slice) {
  const Sizes z = sizes(f);
  float* shifted = reinterpret_cast<float*>(slice.shared);
  with_element(f.conv.dtype, [&](auto element) PYSEQNET_LAMBDA {
    using T = decltype(element);
    if (slice.phase == 0) {
      for (int64_t k = slice.begin; k < slice.end; ++k)
        shift_filter(f, z, static_cast<const T*>(t.w), k, shifted + k * f.window() * z.area_floats);
      return;
    }
    const InputScratch s = input_scratch(z, slice.scratch);
    s.table[f.closed()] = 0;  // its gradient is zero
    for (int64_t tap = 0; tap < f.window(); ++tap) s.table[tap] = int32_t(tap * z.area_floats);
    for (int64_t n = slice.begin; n < slice.end; ++n) input_image<T>(f, z, t, n, shifted, s);
  });
}

// ---- what is taken

Refusal refuses_both(const ConvReluPoolProblem& f) {
  const ConvProblem& p = f.conv;
  if (p.dtype == DType::f64) return "computes in float, not double";
  if (!f.pooled || f.wide_arg()) return "needs pooling, with at most 255 taps a window";
  if (p.groups != 1) return "one group only";
  if (p.N == 0 || p.C == 0 || p.K == 0) return "an extent is zero";
  if (2 * f.U * f.V > p.P * p.Q) return "more than half the pixels may win: dense products are faster";
  if (p.C * p.R * p.S > MOST_PATCH) return "many input channels: dense products are faster";
  if (p.H > LARGEST_EXTENT || p.W > LARGEST_EXTENT || p.P > LARGEST_EXTENT || p.Q > LARGEST_EXTENT ||
      p.pad_h > LARGEST_EXTENT || p.pad_w > LARGEST_EXTENT)
    return "the image is too large to be laid out";
  const Sizes z = sizes(f);
  if (z.staged() * int64_t(sizeof(float)) > STAGED_BYTES) return "the image is too large to be laid out";
  return accepted;
}
Refusal refuses_weight(const ConvReluPoolProblem& f) {
  if (const Refusal why = refuses_both(f)) return why;
  const Sizes z = sizes(f);
  if (z.part * int64_t(sizeof(float)) > PART_BYTES) return "too many filters for sums of its own";
  if (z.strip_rows * z.z_columns * z.patch_floats * int64_t(sizeof(float)) > 8 * STRIP_BYTES)
    return "a row of patches does not fit the cache";
  return accepted;
}
Refusal refuses_input(const ConvReluPoolProblem& f) {
  if (const Refusal why = refuses_both(f)) return why;
  const Sizes z = sizes(f);
  if (f.conv.K * f.window() * z.area_floats * int64_t(sizeof(float)) > SHIFTED_BYTES)
    return "the shifted filters do not fit the cache";
  if (z.area_floats * 2 > z.patch * 5) return "the window reaches much further than the filter";
  return accepted;
}

}  // namespace sparse
}  // namespace relu_pool

extern const ConvReluPoolCpuKernel conv_relu_pool_sparse_input_gradient,
    conv_relu_pool_sparse_weight_gradient;
const ConvReluPoolCpuKernel conv_relu_pool_sparse_input_gradient = {
    "sparse_" PYSEQNET_ISA_NAME, this_isa, relu_pool::sparse::refuses_input, relu_pool::sparse::plan_input,
    relu_pool::sparse::run_input};
const ConvReluPoolCpuKernel conv_relu_pool_sparse_weight_gradient = {
    "sparse_" PYSEQNET_ISA_NAME, this_isa, relu_pool::sparse::refuses_weight, relu_pool::sparse::plan_weight,
    relu_pool::sparse::run_weight};

}  // namespace PYSEQNET_ISA
}  // namespace pyseqnet
