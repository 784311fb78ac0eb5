// All gradients of the fused block in one sweep, for the first layers of a network: few input channels, windows
// of 2x2. Images are the unit of work; each is opened once (which windows pass a gradient on, how much, where
// to) for the three of them.
//
// What a window can reach, its area, is a few vectors in registers: rows of 4, 8 or 16 pixels of one channel,
// an area of 6x6 (a 5x5 filter, one channel) or 3x4x4 (3x3, colours) is 3 vectors.
//
//   input gradient    area = sum over filters of  gy * filter, shifted by the tap that won. Every filter is laid
//                     out once for each tap: a look-up instead of a branch. Areas overlap: the sums of a row
//                     of windows move on through the registers, so that each pixel is written once a row and
//                     nothing just stored is read.
//   weight gradient   gw[k] = sum over windows of  gy * patch of x under the tap that won. The four patches of a
//                     window are permutations of its area, laid out once for all filters.
//   bias gradient     gb[k] = sum of what was opened.
//
// Shifted filters and patches both have the four taps one vector apart, so that one offset serves both. A
// closed window multiplies by 0, which costs less than a branch. The sums of a fixed number of chunks of images
// are added in order.
//
// Bound: one load and one multiply-add a vector, on a quarter of the dense products.
#include "conv/relu_pool_windows.h"

namespace pyseqnet {
inline namespace PYSEQNET_ISA {
#if defined(__AVX512F__)
namespace relu_pool {
namespace windows {

// ---- the weight gradient

// A vector of an area: rows of `row` pixels, the image's pitch apart.
template <int row>
PYSEQNET_INLINE __m512 load_area(const float* p, int64_t pitch) {
  if constexpr (row == 4) {
    const __m256 low =
        _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps(p + pitch), 1);
    p += 2 * pitch;
    const __m256 high =
        _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps(p + pitch), 1);
    return _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
  }
  if constexpr (row == 8)
    return _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_loadu_ps(p)), _mm256_loadu_ps(p + pitch), 1);
  return _mm512_loadu_ps(p);
}
// The patches of `rows` rows of windows from row u on: [window][vector][tap][lane].
template <int row>
void lay_out_patches(const ConvReluPoolProblem& f, const Sizes& z, const Patches& patches, const float* image,
                     int64_t u, int64_t rows, float* to) {
  const int64_t down = VL / row * z.pitch, of_window = z.patch * TAPS * VL;
  const auto begin = [&](int64_t vector) { return vector / z.vectors * z.plane + vector % z.vectors * down; };
  for (int j = 0; j < patches.count; ++j) {
    const Patches::Vector& v = patches.vector[j];
    __m512i lanes[TAPS];
    for (int tap = 0; tap < TAPS; ++tap) lanes[tap] = _mm512_load_si512(v.lanes[tap]);
    const int64_t a0 = begin(v.from[0]), b0 = begin(smaller(v.from[1], z.area - 1));
    for (int64_t i = 0; i < rows; ++i) {
      const float* from = image + (u + i) * z.step_h * z.pitch;
      float* dst = to + i * f.V * of_window + j * TAPS * VL;
      for (int64_t w = 0; w < f.V; ++w, from += z.step_w, dst += of_window) {
        const __m512 a = load_area<row>(from + a0, z.pitch), b = load_area<row>(from + b0, z.pitch);
#pragma GCC unroll 4
        for (int tap = 0; tap < TAPS; ++tap)
          store(dst + tap * VL, (vf)_mm512_permutex2var_ps(a, lanes[tap], b));
      }
    }
  }
}
// sums[f][vector] += g * patch over some windows, for F filters.
template <int F, int NV>
void add_windows(const Sizes& z, const float* patches, int64_t windows, const Gradients& o, float* sums) {
  vf sum[F][NV] = {};
  const float* g = o.g;
  const uint16_t* at = o.at;
  for (int64_t w = 0; w < windows; ++w, patches += NV * TAPS * VL, g += z.filters, at += z.filters)
#pragma GCC unroll 16
    for (int i = 0; i < F; ++i) {
      const float* patch = patches + at[i];
      const vf gv = set1(g[i]);
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) sum[i][j] += gv * load(patch + j * TAPS * VL);
    }
#pragma GCC unroll 16
  for (int i = 0; i < F; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      float* to = sums + (i * NV + j) * VL;
      store(to, load(to) + sum[i][j]);
    }
}
template <int NV>
void add_strip(const Sizes& z, const float* patches, int64_t windows, const Gradients& o, float* sums) {
  constexpr int F = NV == 1 ? 16 : NV == 2 ? 8 : 4;
  for (int64_t k = 0; k < z.filters; k += F)
    add_windows<F, NV>(z, patches, windows, {o.g + k, o.at + k}, sums + k * NV * VL);
}
void add_weight_gradient(const ConvReluPoolProblem& f, const Sizes& z, const Patches& p, const float* image,
                         const Gradients& o, float* patches, float* sums) {
  for (int64_t u = 0; u < f.U; u += z.strip) {
    const int64_t rows = smaller(z.strip, f.U - u), first = u * f.V;
    (z.row == 4   ? lay_out_patches<4>
     : z.row == 8 ? lay_out_patches<8>
                  : lay_out_patches<16>)(f, z, p, image, u, rows, patches);
    const Gradients of_strip = {o.g + first * z.filters, o.at + first * z.filters};
    with_rows<MOST_VECTORS>(int(z.patch), [&](auto n) PYSEQNET_LAMBDA {
      add_strip<decltype(n)::value>(z, patches, rows * f.V, of_strip, sums);
    });
  }
}

// ---- the input gradient

PYSEQNET_INLINE int64_t in_filter(const Patches& patches, int64_t tap, int64_t e) {
  const int64_t at = patches.in_area[tap][e];
  return (at / VL * TAPS + tap) * VL + at % VL;
}
// Filter k for every tap that may win: [vector][tap][lane], zero where the shifted filter does not reach.
template <class T>
void shift_filter(const ConvProblem& p, const Sizes& z, const Patches& patches, const T* w, int64_t k,
                  float* to) {
  const Strides ws = p.w_strides();
  for (int64_t i = 0; i < z.of_filter(); i += VL) store(to + i, vf{});
  int64_t e = 0;
  for (int64_t c = 0; c < p.C; ++c)
    for (int64_t r = 0; r < p.R; ++r)
      for (int64_t s = 0; s < p.S; ++s, ++e) {
        const float value = to_float(w[k * ws.n + c * ws.c + r * ws.h + s * ws.w]);
        for (int64_t tap = 0; tap < TAPS; ++tap) to[in_filter(patches, tap, e)] = value;
      }
}

// Rows of an area's vector to a band of the image's pitch.
template <int row>
PYSEQNET_INLINE void store_area(float* p, int64_t pitch, __m512 v) {
  if constexpr (row == 4) {
    _mm_storeu_ps(p, _mm512_castps512_ps128(v));
    _mm_storeu_ps(p + pitch, _mm512_extractf32x4_ps(v, 1));
    _mm_storeu_ps(p + 2 * pitch, _mm512_extractf32x4_ps(v, 2));
    _mm_storeu_ps(p + 3 * pitch, _mm512_extractf32x4_ps(v, 3));
  } else if constexpr (row == 8) {
    _mm256_storeu_ps(p, _mm512_castps512_ps256(v));
    _mm256_storeu_ps(p + pitch, _mm512_extractf32x8_ps(v, 1));
  } else {
    _mm512_storeu_ps(p, v);
  }
}
// One row of windows, `filters` filters: band[channel][row][column] = the sum of its areas.
template <int row, int NV>
void sum_row(const ConvReluPoolProblem& f, const Sizes& z, const float* shifted, Gradients o, int64_t filters,
             float* band) {
  // Lanes of a row move up by step_w, the last are zero.
  const vi lane = iota(), in_row = lane & (row - 1);
  const __m512i source = (__m512i)(lane + int32_t(z.step_w));
  const __mmask16 stay =
      _mm512_cmplt_epi32_mask((__m512i)(in_row + int32_t(z.step_w)), _mm512_set1_epi32(row));
  __m512 area[NV] = {};
  float* to[NV];
  for (int64_t j = 0; j < NV; ++j) to[j] = band + j * (VL / row) * z.pitch;
  for (int64_t w = 0; w < f.V; ++w, o.g += z.filters, o.at += z.filters) {
    vf even[NV] = {}, odd[NV] = {};
    const float* filter = shifted;
    for (int64_t k = 0; k < filters; k += 2, filter += 2 * NV * TAPS * VL) {
      const float *a = filter + o.at[k], *b = filter + NV * TAPS * VL + o.at[k + 1];
      const vf ga = set1(o.g[k]), gb = set1(o.g[k + 1]);
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) {
        even[j] += ga * load(a + j * TAPS * VL);
        odd[j] += gb * load(b + j * TAPS * VL);
      }
    }
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      area[j] = (__m512)((vf)_mm512_maskz_permutexvar_ps(stay, source, area[j]) + (even[j] + odd[j]));
      store_area<row>(to[j], z.pitch, area[j]);
      to[j] += z.step_w;
    }
  }
}
template <int row>
void add_filters(const ConvReluPoolProblem& f, const Sizes& z, const float* shifted, const Gradients& o,
                 int64_t filters, float* band, float* image) {
  const int64_t of_band = z.band();
  for (int64_t u = 0; u < f.U; ++u) {
    const Gradients of_row = {o.g + u * f.V * z.filters, o.at + u * f.V * z.filters};
    with_rows<MOST_VECTORS>(int(z.area), [&](auto n) PYSEQNET_LAMBDA {
      sum_row<row, decltype(n)::value>(f, z, shifted, of_row, filters, band);
    });
    for (int64_t c = 0; c < f.conv.C; ++c) {
      float* to = image + c * z.plane + u * z.step_h * z.pitch;
      for (int64_t e = 0; e < of_band; e += VL)
        store_lanes_n(to + e, load_lanes_n(to + e, of_band - e) + load(band + c * of_band + e), of_band - e);
    }
  }
}
// Where a gradient is infinite or NaN, a product with a shifted filter's zeros would spread it: element by
// element then.
void add_exactly(const ConvReluPoolProblem& f, const Sizes& z, const Patches& patches, const float* shifted,
                 const Gradients& o, float* image) {
  const int64_t elements = f.conv.C * f.conv.R * f.conv.S, rows = VL / z.row;
  for (int64_t window = 0; window < z.windows; ++window) {
    float* corner = image + window / f.V * z.step_h * z.pitch + window % f.V * z.step_w;
    for (int64_t k = 0; k < f.conv.K; ++k) {
      const float g = o.g[window * z.filters + k];
      if (g == 0) continue;
      const int64_t tap = o.at[window * z.filters + k] / VL;
      for (int64_t e = 0; e < elements; ++e) {
        const int64_t at = patches.in_area[tap][e], vector = at / VL, lane = at % VL;
        const int64_t row = vector % z.vectors * rows + lane / z.row;
        corner[vector / z.vectors * z.plane + row * z.pitch + lane % z.row] +=
            g * shifted[k * z.of_filter() + in_filter(patches, tap, e)];
      }
    }
  }
}

// ---- a chunk of images

struct Scratch {
  float *x, *gx, *band, *patches;
  Gradients opened;
  int64_t bytes;
};
Scratch scratch_of(const ConvReluPoolProblem& f, const Sizes& z, std::byte* base) {
  Carver carver(base);
  Scratch s;
  s.x = carver.take<float>(z.staged(f.conv.C));
  s.gx = carver.take<float>(z.staged(f.conv.C));
  s.band = carver.take<float>(f.conv.C * z.band() + VL);
  s.patches = carver.take<float>(z.strip * f.V * z.patch * TAPS * VL);
  s.opened.g = carver.take<float>(z.windows * z.filters);
  s.opened.at = carver.take<uint16_t>(z.windows * z.filters);
  s.bytes = carver.used();
  return s;
}
template <class T>
void do_image(const ConvReluPoolProblem& f, const Sizes& z, const Patches& patches,
              const ConvReluPoolTensors& t, int64_t n, const float* shifted, float* part, const Scratch& s) {
  const ConvProblem& p = f.conv;
  const int64_t of_x = p.C * p.H * p.W, of_y = p.K * z.windows;
  const bool finite =
      open_image(f, z, static_cast<const T*>(t.gy) + n * of_y, static_cast<const uint8_t*>(t.arg) + n * of_y,
                 s.opened, part + z.filters * z.patch * VL);
  if (t.gw) {
    stage_image(p, z, static_cast<const T*>(t.x) + n * of_x, s.x);
    add_weight_gradient(f, z, patches, s.x, s.opened, s.patches, part);
  }
  if (!t.gx) return;
  for (int64_t e = 0; e < z.staged(p.C); e += VL) store_lanes_n(s.gx + e, vf{}, z.staged(p.C) - e);
  if (!finite) {
    add_exactly(f, z, patches, shifted, s.opened, s.gx);
  } else {
    const auto add = z.row == 4 ? add_filters<4> : z.row == 8 ? add_filters<8> : add_filters<16>;
    const int64_t most = larger(2, FILTER_BYTES / (z.of_filter() * int64_t(sizeof(float))) / 2 * 2);
    const int64_t blocks = ceil_div(p.K, most), block = round_up(ceil_div(p.K, blocks), 2);
    for (int64_t k = 0; k < p.K; k += block)
      add(f, z, shifted + k * z.of_filter(), {s.opened.g + k, s.opened.at + k},
          round_up(smaller(block, p.K - k), 2), s.band, s.gx);
  }
  unstage_image(p, z, s.gx, static_cast<T*>(t.gx) + n * of_x);
}
// The chunks' sums in order.
template <class T>
void reduce(const ConvReluPoolProblem& f, const Sizes& z, const ConvReluPoolTensors& t, const float* parts,
            const Patches& patches, int64_t k) {
  const ConvProblem& p = f.conv;
  const Strides ws = p.w_strides();
  int64_t e = 0;
  const auto sum_of = [&](int64_t at) {
    float sum = 0;
    for (int64_t chunk = 0; chunk < z.chunks; ++chunk) sum += parts[chunk * z.part + at];
    return sum;
  };
  for (int64_t c = 0; c < p.C && t.gw; ++c)
    for (int64_t r = 0; r < p.R; ++r)
      for (int64_t s = 0; s < p.S; ++s, ++e)
        round_to(static_cast<T*>(t.gw)[k * ws.n + c * ws.c + r * ws.h + s * ws.w],
                 sum_of(k * z.patch * VL + patches.in_patch[e]));
  if (T* gb = static_cast<T*>(t.gb)) round_to(gb[k], sum_of(z.filters * z.patch * VL + k));
}

WorkPlan plan(const ConvReluPoolProblem& f) {
  const Sizes z = sizes(f);
  const int64_t shifted = round_up(f.conv.K, 2) * z.of_filter();
  WorkPlan plan;
  plan.add_phase(round_up(f.conv.K, 2), 1 + 20000 / z.of_filter());
  plan.add_phase(z.chunks);
  plan.add_phase(f.conv.K, 1 + 40000 / (z.patch * VL * z.chunks));
  plan.shared_bytes = (shifted + z.chunks * z.part) * int64_t(sizeof(float));
  plan.thread_bytes = scratch_of(f, z, nullptr).bytes;
  return plan;
}
void run(const ConvReluPoolProblem& f, const ConvReluPoolTensors& t, const WorkSlice& slice) {
  const Sizes z = sizes(f);
  const int64_t N = f.conv.N, K = f.conv.K;
  float* shifted = reinterpret_cast<float*>(slice.shared);
  Patches patches;
  lay_out(f.conv, z, patches);
  float* parts = shifted + round_up(K, 2) * z.of_filter();
  with_element(f.conv.dtype, [&](auto element) PYSEQNET_LAMBDA {
    using T = decltype(element);
    if (slice.phase == 0) {
      for (int64_t k = slice.begin; k < slice.end && t.gx; ++k) {
        float* to = shifted + k * z.of_filter();
        if (k < K)
          shift_filter(f.conv, z, patches, static_cast<const T*>(t.w), k, to);
        else  // is multiplied by zero
          for (int64_t e = 0; e < z.of_filter(); ++e) to[e] = 0.0f;
      }
    } else if (slice.phase == 1) {
      const Scratch s = scratch_of(f, z, slice.scratch);
      for (int64_t e = 0; e < f.conv.C * z.band() + VL; ++e) s.band[e] = 0.0f;
      for (int64_t chunk = slice.begin; chunk < slice.end; ++chunk) {
        float* part = parts + chunk * z.part;
        for (int64_t e = 0; e < z.part; e += VL) store(part + e, vf{});
        for (int64_t n = N * chunk / z.chunks; n < N * (chunk + 1) / z.chunks; ++n)
          do_image<T>(f, z, patches, t, n, shifted, part, s);
      }
    } else {
      for (int64_t k = slice.begin; k < slice.end; ++k) reduce<T>(f, z, t, parts, patches, k);
    }
  });
}

Refusal refuses(const ConvReluPoolProblem& f) {
  const ConvProblem& p = f.conv;
  if (p.dtype == DType::f64) return "computes in float, not double";
  if (!f.pooled || f.pool_h != 2 || f.pool_w != 2) return "2x2 windows only";
  if (p.groups != 1) return "one group only";
  if (p.N == 0 || p.C == 0 || p.K == 0) return "an extent is zero";
  if (2 * f.U * f.V > p.P * p.Q) return "more than half the pixels may win: dense products are faster";
  if (p.H > LARGEST_EXTENT || p.W > LARGEST_EXTENT || p.P > LARGEST_EXTENT || p.Q > LARGEST_EXTENT ||
      p.pad_h > LARGEST_EXTENT || p.pad_w > LARGEST_EXTENT)
    return "the image is too large to be laid out";
  if (p.R * p.S * p.C > MOST_VECTORS * VL) return "many input channels, or taps";
  const Sizes z = sizes(f);
  if (!z.patch) return "a window reaches too many pixels for the registers";
  if (z.step_w > z.row) return "gaps between the windows";
  if (z.staged(p.C) * int64_t(sizeof(float)) > STAGED_BYTES) return "the image is too large to be laid out";
  if (z.part * int64_t(sizeof(float)) > PART_BYTES || p.K * z.of_filter() * 4 > SHIFTED_BYTES)
    return "too many filters for sums of their own";
  return f.V * z.patch * TAPS * VL * 4 > 8 * STRIP_BYTES ? "a row of patches does not fit the cache"
                                                         : accepted;
}

}  // namespace windows
}  // namespace relu_pool

extern const ConvReluPoolCpuKernel conv_relu_pool_windows_input_gradient,
    conv_relu_pool_windows_weight_gradient, conv_relu_pool_windows_bias_gradient;
const ConvReluPoolCpuKernel conv_relu_pool_windows_input_gradient = {
    "windows_" PYSEQNET_ISA_NAME, this_isa, relu_pool::windows::refuses, relu_pool::windows::plan,
    relu_pool::windows::run};
const ConvReluPoolCpuKernel conv_relu_pool_windows_weight_gradient = conv_relu_pool_windows_input_gradient;
const ConvReluPoolCpuKernel conv_relu_pool_windows_bias_gradient = conv_relu_pool_windows_input_gradient;
#endif

}  // namespace PYSEQNET_ISA
}  // namespace pyseqnet
