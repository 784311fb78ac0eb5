// Gradients of the fused block for many input channels, where pooling leaves a pixel of each window: lanes
// are a block of input channels, stride 1, no dilation, square filters.
//
//   weight gradient   gw[k][r][s] += gy * x[pixel + r, s]: 3x3 (or 5x5) sums of one filter stay in registers
//                     while all windows of a strip pass by; the strip, a block of channels wide, stays in the
//                     first-level cache.
//   input gradient    2x2 windows: the pixels that a window reaches stay in registers (4x4; for 5x5 filters,
//                     three of their rows at a time), and the filters that its pixels won are added, sorted
//                     by the pixel, a bit mask each: no address depends on the winner.
//
// Images are the unit of work; the weight gradient adds a fixed number of chunks of them in order.
//
// Bound: one load and one multiply-add a vector, about half the FMA peak, on a quarter of the products.
#include "conv/relu_pool_opened.h"

namespace pyseqnet {
inline namespace PYSEQNET_ISA {
namespace relu_pool {
namespace blocks {

constexpr int64_t STRIP_BYTES = 20 * 1024;  // of a block of channels: in the first-level cache
constexpr int64_t MASK_FILTERS = 32;        // filters sorted by one mask; 3x3 of each: 18 KiB
constexpr int64_t CHUNKS = 16;              // of images
constexpr int64_t PART_BYTES = 1 << 20;     // of one chunk's sums, at most
constexpr int64_t BLOCK_BYTES = 1 << 20;    // of one image's block of channels, at most
constexpr int64_t LARGEST_EXTENT = 1 << 16;

// A block of channels of an image with its padding: [row][column][lane].
struct Sizes : OpenedSizes {
  int64_t rows, columns, line;  // line = columns * VL
  int64_t blocks, taps;
  int64_t strip;         // rows of windows
  int64_t chunks, part;  // of images; floats of one chunk's sums

  int64_t staged() const { return rows * line; }
};
PYSEQNET_INLINE Sizes sizes(const ConvReluPoolProblem& f) {
  const ConvProblem& p = f.conv;
  Sizes z;
  z.windows = f.U * f.V;
  z.filters = round_up(p.K, VL);
  z.rows = larger((f.U - 1) * f.pool_stride_h + f.pool_h + p.R - 1, p.H + p.pad_h);
  z.columns = larger((f.V - 1) * f.pool_stride_w + f.pool_w + p.S - 1, p.W + p.pad_w);
  z.line = z.columns * VL;
  z.blocks = ceil_div(p.C, VL);
  z.taps = p.R * p.S;
  const int64_t line_bytes = z.line * int64_t(sizeof(float));
  const int64_t lines = larger(1, STRIP_BYTES / line_bytes) - (f.pool_h + p.R - 1);
  z.strip = smaller(f.U, larger(1, lines / f.pool_stride_h + 1));
  z.chunks = smaller(p.N, CHUNKS);
  z.part = z.blocks * p.K * z.taps * VL;
  return z;
}

template <class T>
void stage_block(const ConvProblem& p, const Sizes& z, const T* x, int64_t block, float* to) {
  const Strides xs = p.x_strides();
  const int64_t c = block * VL, channels = smaller(VL, p.C - c);
  for (int64_t e = 0; e < z.staged(); e += VL) store(to + e, vf{});
  for (int64_t h = 0; h < p.H; ++h) {
    float* row = to + (h + p.pad_h) * z.line + p.pad_w * VL;
    const T* from = x + c * xs.c + h * xs.h;
    if (xs.c == 1)
      for (int64_t w = 0; w < p.W; ++w) store(row + w * VL, load_lanes_n(from + w * xs.w, channels));
    else
      for (int64_t w = 0; w < p.W; w += VL)
        transpose_block(from + w, xs.c, int(channels), int(smaller(VL, p.W - w)), row + w * VL, VL);
  }
}
template <class T>
void unstage_block(const ConvProblem& p, const Sizes& z, const float* from, int64_t block, T* gx) {
  const Strides xs = p.x_strides();
  const int64_t c = block * VL, channels = smaller(VL, p.C - c);
  for (int64_t h = 0; h < p.H; ++h) {
    const float* row = from + (h + p.pad_h) * z.line + p.pad_w * VL;
    T* to = gx + c * xs.c + h * xs.h;
    if (xs.c == 1)
      for (int64_t w = 0; w < p.W; ++w) store_lanes_n(to + w * xs.w, load(row + w * VL), channels);
    else
      for (int64_t w = 0; w < p.W; w += VL)
        transpose_block_exact(row + w * VL, VL, int(smaller(VL, p.W - w)), int(channels), to + w, xs.c);
  }
}

// ---- the weight gradient

// sums[tap] += g * x over rows u0 .. u1 of windows, for RB rows of filters S wide.
template <int RB, int S>
PYSEQNET_INLINE void add_windows(const ConvReluPoolProblem& f, const Sizes& z, const float* x, int64_t u0,
                                 int64_t u1, const float* g, const int32_t* at, float* sums) {
  vf sum[RB][S];
#pragma GCC unroll 5
  for (int r = 0; r < RB; ++r)
#pragma GCC unroll 5
    for (int s = 0; s < S; ++s) sum[r][s] = load(sums + (r * S + s) * VL);
  for (int64_t u = u0; u < u1; ++u) {
    const float* corner = x + u * f.pool_stride_h * z.line;
    for (int64_t v = u * f.V; v < (u + 1) * f.V; ++v, corner += f.pool_stride_w * VL) {
      const float* row = corner + at[v];
      const vf gv = set1(g[v]);
#pragma GCC unroll 5
      for (int r = 0; r < RB; ++r, row += z.line)
#pragma GCC unroll 5
        for (int s = 0; s < S; ++s) sum[r][s] += gv * load(row + s * VL);
    }
  }
#pragma GCC unroll 5
  for (int r = 0; r < RB; ++r)
#pragma GCC unroll 5
    for (int s = 0; s < S; ++s) store(sums + (r * S + s) * VL, sum[r][s]);
}
// All filters over a strip of one block of channels. 5x5 sums need AVX-512's registers; others take a row.
template <int S>
void add_strip(const ConvReluPoolProblem& f, const Sizes& z, const float* x, int64_t u0, int64_t u1,
               const Opened& o, int64_t filter_stride, float* sums) {
  constexpr int RB = S * S <= 9 || VL == 16 ? S : 1;
  for (int64_t k = 0; k < f.conv.K; ++k, sums += S * S * VL)
    for (int r = 0; r < S; r += RB)
      add_windows<RB, S>(f, z, x + r * z.line, u0, u1, o.g + k * filter_stride, o.at + k * filter_stride,
                         sums + r * S * VL);
}

struct Scratch {
  float* block;
  int32_t* table;
  Opened opened, spare;
  int64_t bytes;
};
Scratch scratch_of(const Sizes& z, std::byte* base) {
  Carver carver(base);
  Scratch s;
  s.block = carver.take<float>(z.staged());
  s.table = carver.take<int32_t>(TABLE);
  s.opened = take_opened(z, carver);
  s.spare = take_opened(z, carver);
  s.bytes = carver.used();
  return s;
}

template <class T>
void weight_chunk(const ConvReluPoolProblem& f, const Sizes& z, const ConvReluPoolTensors& t, int64_t chunk,
                  float* sums, const Scratch& s) {
  const ConvProblem& p = f.conv;
  const int64_t of_x = p.C * p.H * p.W, of_y = p.K * z.windows, stride = round_up(z.windows, VL);
  for (int64_t e = 0; e < z.part; e += VL) store(sums + e, vf{});
  for (int64_t n = p.N * chunk / z.chunks; n < p.N * (chunk + 1) / z.chunks; ++n) {
    open_image(f, z, static_cast<const T*>(t.gy) + n * of_y, static_cast<const uint8_t*>(t.arg) + n * of_y,
               s.table, 0, false, s.opened, s.spare);
    for (int64_t block = 0; block < z.blocks; ++block) {
      stage_block(p, z, static_cast<const T*>(t.x) + n * of_x, block, s.block);
      float* to = sums + block * p.K * z.taps * VL;
      for (int64_t u = 0; u < f.U; u += z.strip) {
        const int64_t last = smaller(u + z.strip, f.U);
        if (p.S == 3)
          add_strip<3>(f, z, s.block, u, last, s.opened, stride, to);
        else
          add_strip<5>(f, z, s.block, u, last, s.opened, stride, to);
      }
    }
  }
}
// One filter of gw: the chunks' sums in order.
template <class T>
void reduce_filter(const ConvProblem& p, const Sizes& z, const float* parts, int64_t k, T* gw) {
  const Strides ws = p.w_strides();
  for (int64_t block = 0; block < z.blocks; ++block)
    for (int64_t tap = 0; tap < z.taps; ++tap) {
      const float* from = parts + ((block * p.K + k) * z.taps + tap) * VL;
      vf sum = {};
      for (int64_t chunk = 0; chunk < z.chunks; ++chunk) sum += load(from + chunk * z.part);
      for (int64_t l = 0; l < smaller(VL, p.C - block * VL); ++l)
        round_to(gw[k * ws.n + (block * VL + l) * ws.c + tap / p.S * ws.h + tap % p.S * ws.w], sum[l]);
    }
}

WorkPlan plan_weight(const ConvReluPoolProblem& f) {
  const Sizes z = sizes(f);
  WorkPlan plan;
  plan.add_phase(z.chunks);
  plan.add_phase(f.conv.K, 1 + 8000 / (z.blocks * z.taps * larger(1, z.chunks)));
  plan.shared_bytes = z.chunks * z.part * int64_t(sizeof(float));
  plan.thread_bytes = scratch_of(z, nullptr).bytes;
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
    const Scratch s = scratch_of(z, slice.scratch);
    s.table[f.closed()] = 0;  // its gradient is zero
    for (int64_t tap = 0; tap < f.window(); ++tap)
      s.table[tap] = int32_t(tap / f.pool_w * z.line + tap % f.pool_w * VL);
    for (int64_t chunk = slice.begin; chunk < slice.end; ++chunk)
      weight_chunk<T>(f, z, t, chunk, parts + chunk * z.part, s);
  });
}

// ---- the input gradient: 2x2 windows

PYSEQNET_INLINE uint32_t lanes_equal(vi v, int32_t to) {
#if defined(__AVX512F__)
  return _mm512_cmpeq_epi32_mask((__m512i)v, _mm512_set1_epi32(to));
#else
  uint32_t mask = 0;
  for (int l = 0; l < VL; ++l) mask |= uint32_t(v[l] == to) << l;
  return mask;
#endif
}

// The filters of a mask, whose pixel is number A of the window: RB rows of filters S wide.
template <int A, int RB, int S>
PYSEQNET_INLINE void add_filters(vf (&sum)[RB + 1][S + 1], uint32_t mask, const float* g, const float* w) {
  for (; mask; mask &= mask - 1) {
    const int k = __builtin_ctz(mask);
    const vf gv = set1(g[k]);
    const float* filter = w + k * S * S * VL;
#pragma GCC unroll 3
    for (int r = 0; r < RB; ++r)
#pragma GCC unroll 5
      for (int s = 0; s < S; ++s) sum[r + A / 2][s + A % 2] += gv * load(filter + (r * S + s) * VL);
  }
}

// At most MASK_FILTERS filters, their rows first_row .. first_row + RB, over all windows of an image;
// w: [filter][tap][lane].
template <int RB, int S>
void add_image(const ConvReluPoolProblem& f, const Sizes& z, const Opened& o, int64_t first, int64_t last,
               int first_row, const float* w, float* image) {
  w += first_row * S * VL;
  for (int64_t u = 0; u < f.U; ++u)
    for (int64_t v = 0; v < f.V; ++v) {
      const int64_t window = u * f.V + v;
      const float* g = o.g + window * z.filters + first;
      const float* at = (const float*)o.at + window * z.filters + first;
      uint32_t who[4] = {};
      for (int64_t k = 0; k < last - first; k += VL) {
        const vi tap = (vi)load(at + k);
#pragma GCC unroll 4
        for (int a = 0; a < 4; ++a) who[a] |= lanes_equal(tap, a) << k;
      }
      float* corner = image + (u * f.pool_stride_h + first_row) * z.line + v * f.pool_stride_w * VL;
      vf sum[RB + 1][S + 1];
#pragma GCC unroll 4
      for (int r = 0; r <= RB; ++r)
#pragma GCC unroll 6
        for (int s = 0; s <= S; ++s) sum[r][s] = load(corner + r * z.line + s * VL);
      add_filters<0, RB, S>(sum, who[0], g, w);
      add_filters<1, RB, S>(sum, who[1], g, w);
      add_filters<2, RB, S>(sum, who[2], g, w);
      add_filters<3, RB, S>(sum, who[3], g, w);
#pragma GCC unroll 4
      for (int r = 0; r <= RB; ++r)
#pragma GCC unroll 6
        for (int s = 0; s <= S; ++s) store(corner + r * z.line + s * VL, sum[r][s]);
    }
}

// One block of channels of one filter: [block][filter][tap][lane].
template <class T>
void pack_filter(const ConvProblem& p, const Sizes& z, const T* w, int64_t item, float* to) {
  const Strides ws = p.w_strides();
  const int64_t k = item % p.K, c = item / p.K * VL;
  for (int64_t tap = 0; tap < z.taps; ++tap)
    for (int64_t l = 0; l < VL; ++l)
      to[tap * VL + l] =
          c + l < p.C ? to_float(w[k * ws.n + (c + l) * ws.c + tap / p.S * ws.h + tap % p.S * ws.w]) : 0.0f;
}

template <class T>
void input_image(const ConvReluPoolProblem& f, const Sizes& z, const ConvReluPoolTensors& t, int64_t n,
                 const float* filters, const Scratch& s) {
  const ConvProblem& p = f.conv;
  const int64_t of_x = p.C * p.H * p.W, of_y = p.K * z.windows;
  open_image(f, z, static_cast<const T*>(t.gy) + n * of_y, static_cast<const uint8_t*>(t.arg) + n * of_y,
             s.table, 0, true, s.opened, s.spare);
  // Lanes beyond the filters won nothing.
  for (int64_t window = 0; window < z.windows; ++window)
    for (int64_t k = p.K; k < z.filters; ++k) s.opened.at[window * z.filters + k] = s.table[f.closed()];
  for (int64_t block = 0; block < z.blocks; ++block) {
    for (int64_t e = 0; e < z.staged(); e += VL) store(s.block + e, vf{});
    for (int64_t k = 0; k < p.K; k += MASK_FILTERS) {
      const int64_t last = smaller(k + MASK_FILTERS, p.K);
      const float* w = filters + (block * p.K + k) * z.taps * VL;
      if (p.R == 3) {
        add_image<3, 3>(f, z, s.opened, k, last, 0, w, s.block);
      } else {
        add_image<3, 5>(f, z, s.opened, k, last, 0, w, s.block);
        add_image<2, 5>(f, z, s.opened, k, last, 3, w, s.block);
      }
    }
    unstage_block(p, z, s.block, block, static_cast<T*>(t.gx) + n * of_x);
  }
}

WorkPlan plan_input(const ConvReluPoolProblem& f) {
  const Sizes z = sizes(f);
  const ConvProblem& p = f.conv;
  WorkPlan plan;
  plan.add_phase(z.blocks * p.K, 1 + 10000 / (z.taps * VL));
  plan.add_phase(p.N);
  plan.shared_bytes = z.blocks * p.K * z.taps * VL * int64_t(sizeof(float));
  plan.thread_bytes = scratch_of(z, nullptr).bytes;
  return plan;
}
void run_input(const ConvReluPoolProblem& f, const ConvReluPoolTensors& t, const WorkSlice& slice) {
  const Sizes z = sizes(f);
  float* filters = reinterpret_cast<float*>(slice.shared);
  with_element(f.conv.dtype, [&](auto element) PYSEQNET_LAMBDA {
    using T = decltype(element);
    if (slice.phase == 0) {
      for (int64_t item = slice.begin; item < slice.end; ++item)
        pack_filter(f.conv, z, static_cast<const T*>(t.w), item, filters + item * z.taps * VL);
      return;
    }
    const Scratch s = scratch_of(z, slice.scratch);
    s.table[f.closed()] = -1;  // in no mask
    for (int64_t tap = 0; tap < f.window(); ++tap) s.table[tap] = int32_t(tap);
    for (int64_t n = slice.begin; n < slice.end; ++n) input_image<T>(f, z, t, n, filters, s);
  });
}

// ---- what is taken

Refusal refuses_both(const ConvReluPoolProblem& f) {
  const ConvProblem& p = f.conv;
  if (p.dtype == DType::f64) return "computes in float, not double";
  if (!f.pooled || f.wide_arg()) return "needs pooling, with at most 255 taps a window";
  if (p.groups != 1) return "one group only";
  if (p.R != p.S || (p.R != 3 && p.R != 5)) return "3x3 and 5x5 filters only";
  if (p.stride_h != 1 || p.stride_w != 1 || p.dilation_h != 1 || p.dilation_w != 1)
    return "stride 1 and dilation 1 only";
  if (p.N == 0 || p.C == 0 || p.K == 0) return "an extent is zero";
  if (2 * f.U * f.V > p.P * p.Q) return "more than half the pixels may win: dense products are faster";
  if (2 * p.C <= VL) return "few input channels would leave lanes empty";
  if (p.H > LARGEST_EXTENT || p.W > LARGEST_EXTENT || p.P > LARGEST_EXTENT || p.Q > LARGEST_EXTENT ||
      p.pad_h > LARGEST_EXTENT || p.pad_w > LARGEST_EXTENT)
    return "the image is too large to be laid out";
  if (sizes(f).staged() * int64_t(sizeof(float)) > BLOCK_BYTES)
    return "the image is too large to be laid out";
  return accepted;
}
Refusal refuses_weight(const ConvReluPoolProblem& f) {
  if (const Refusal why = refuses_both(f)) return why;
  return sizes(f).part * int64_t(sizeof(float)) > PART_BYTES ? "too many filters for sums of its own"
                                                             : accepted;
}
Refusal refuses_input(const ConvReluPoolProblem& f) {
  if (const Refusal why = refuses_both(f)) return why;
  if (VL != 16) return "keeps 4x4 pixels and more in registers, of which AVX-512 has enough";
  if (f.pool_h != 2 || f.pool_w != 2) return "2x2 windows only";
  return accepted;
}

}  // namespace blocks
}  // namespace relu_pool

extern const ConvReluPoolCpuKernel conv_relu_pool_blocks_input_gradient,
    conv_relu_pool_blocks_weight_gradient;
const ConvReluPoolCpuKernel conv_relu_pool_blocks_input_gradient = {
    "blocks_" PYSEQNET_ISA_NAME, this_isa, relu_pool::blocks::refuses_input, relu_pool::blocks::plan_input,
    relu_pool::blocks::run_input};
const ConvReluPoolCpuKernel conv_relu_pool_blocks_weight_gradient = {
    "blocks_" PYSEQNET_ISA_NAME, this_isa, relu_pool::blocks::refuses_weight, relu_pool::blocks::plan_weight,
    relu_pool::blocks::run_weight};

}  // namespace PYSEQNET_ISA
}  // namespace pyseqnet
