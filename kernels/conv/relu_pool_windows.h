// What the windows kernel computes on: where the pixels that a window can reach lie in vectors, images with
// their padding, and the gradients of an image, opened. AVX-512 only.
#pragma once
#include "common/transpose.h"
#include "conv/relu_pool_opened.h"

namespace pyseqnet {
inline namespace PYSEQNET_ISA {
#if defined(__AVX512F__)
namespace relu_pool {
namespace windows {

constexpr int TAPS = 4;                         // of a window
constexpr int MOST_VECTORS = 4;                 // of an area, of a patch
constexpr int64_t FILTER_BYTES = 24 * 1024;     // shifted filters of a block: in the first-level cache
constexpr int64_t STRIP_BYTES = 24 * 1024;      // patches and gradients of a strip of windows: the same
constexpr int64_t SHIFTED_BYTES = 1024 * 1024;  // of all filters, at most
constexpr int64_t STAGED_BYTES = 4 << 20;       // one padded image, at most
constexpr int64_t CHUNKS = 32;                  // of images
constexpr int64_t PART_BYTES = 1 << 20;         // of one chunk's sums, at most
constexpr int64_t LARGEST_EXTENT = 1 << 20;

struct Sizes : OpenedSizes {
  int64_t step_h, step_w;      // from a window's area to the next
  int64_t area_h, area_w;      // what a window can reach
  int row;                     // its width in a vector
  int64_t vectors, area;       // of a channel's part of the area; of all
  int64_t rows, pitch, plane;  // of the padded image
  int64_t patch;               // vectors
  int64_t strip;               // rows of windows whose patches are laid out together
  int64_t chunks, part;        // of images; floats of one chunk's sums: filters, then biases
  int64_t of_filter() const { return area * TAPS * VL; }
  int64_t band() const { return vectors * (VL / row) * pitch; }  // of a channel
  int64_t staged(int64_t channels) const { return channels * plane + VL; }
};
PYSEQNET_INLINE int64_t reach(int64_t stride, int64_t taps, int64_t dilation) {
  return stride + (taps - 1) * dilation + 1;  // of two pixels of z
}

// Where the elements of a filter, and of a patch, lie. A vector of a patch takes its elements from two vectors of
// the area, the same two for all taps.
struct Patches {
  struct Vector {
    int64_t from[2];  // vectors of the area
    int count = 0;
    alignas(64) int32_t lanes[TAPS][VL] = {};  // of the two, as vpermt2ps counts them
  };
  int count = 0;
  Vector vector[MOST_VECTORS];
  // Of element (c, r, s), number (c * R + r) * S + s, under a tap: in the area, vector * VL + lane; in the patch.
  int32_t in_area[TAPS][MOST_VECTORS * VL], in_patch[MOST_VECTORS * VL];
};
// False where a patch would have too many vectors.
inline bool lay_out(const ConvProblem& p, const Sizes& z, Patches& patches) {
  const int64_t elements = p.C * p.R * p.S;
  if (elements > MOST_VECTORS * VL) return false;
  const int rows = VL / z.row;  // of a vector
  patches.count = 0;
  int64_t e = 0;
  for (int64_t c = 0; c < p.C; ++c)
    for (int64_t r = 0; r < p.R; ++r)
      for (int64_t s = 0; s < p.S; ++s, ++e) {
        for (int64_t tap = 0; tap < TAPS; ++tap) {
          const int i = int(tap / 2 * p.stride_h + r * p.dilation_h),
                    j = int(tap % 2 * p.stride_w + s * p.dilation_w);
          patches.in_area[tap][e] = (int(c * z.vectors) + i / rows) * VL + i % rows * z.row + j;
        }
        const int64_t low = patches.in_area[0][e] / VL, high = patches.in_area[TAPS - 1][e] / VL;
        if (high > low + 1) return false;
        Patches::Vector* v = patches.count ? &patches.vector[patches.count - 1] : nullptr;
        if (!v || v->count == VL || low < v->from[0] || high > v->from[1]) {
          if (patches.count == MOST_VECTORS) return false;
          v = &patches.vector[patches.count++];
          *v = {{low, low + 1}};
        }
        for (int64_t tap = 0; tap < TAPS; ++tap)
          v->lanes[tap][v->count] = patches.in_area[tap][e] - int32_t(v->from[0]) * VL;
        patches.in_patch[e] = (patches.count - 1) * VL + v->count++;
      }
  return true;
}

// patch = 0 where it would have too many vectors.
inline Sizes sizes(const ConvReluPoolProblem& f) {
  const ConvProblem& p = f.conv;
  Sizes z;
  z.windows = f.U * f.V;
  z.filters = round_up(p.K, VL);
  z.step_h = f.pool_stride_h * p.stride_h, z.step_w = f.pool_stride_w * p.stride_w;
  z.area_h = reach(p.stride_h, p.R, p.dilation_h), z.area_w = reach(p.stride_w, p.S, p.dilation_w);
  z.row = z.area_w <= 4 ? 4 : z.area_w <= 8 ? 8 : 16;
  z.vectors = ceil_div(z.area_h, VL / z.row), z.area = p.C * z.vectors;
  z.rows = larger((f.U - 1) * z.step_h + z.vectors * (VL / z.row), p.H + p.pad_h);
  z.pitch = larger((f.V - 1) * z.step_w + z.row, p.W + p.pad_w);
  z.plane = z.rows * z.pitch;
  Patches patches;
  z.patch = z.area_w <= VL && z.area <= MOST_VECTORS && lay_out(p, z, patches) ? patches.count : 0;
  const int64_t of_window = TAPS * z.patch * VL * 4 + z.filters * 6;
  z.strip = larger(1, smaller(f.U, STRIP_BYTES / (of_window * f.V)));
  z.chunks = smaller(p.N, CHUNKS);
  z.part = z.filters * (z.patch * VL + 1);
  return z;
}

// ---- an image in, an image out

// Planes with zeros around.
template <class T>
inline void stage_image(const ConvProblem& p, const Sizes& z, const T* x, float* to) {
  const Strides xs = p.x_strides();
  for (int64_t e = 0; e < z.staged(p.C); e += VL) store_lanes_n(to + e, vf{}, z.staged(p.C) - e);
  for (int64_t c = 0; c < p.C; ++c)
    for (int64_t h = 0; h < p.H; ++h) {
      float* row = to + c * z.plane + (h + p.pad_h) * z.pitch + p.pad_w;
      const T* from = x + c * xs.c + h * xs.h;
      for (int64_t w = 0; w < p.W; w += VL)
        store_lanes_n(row + w, load_every(from + w * xs.w, xs.w, p.W - w), p.W - w);
    }
}
template <class T>
inline void unstage_image(const ConvProblem& p, const Sizes& z, const float* from, T* gx) {
  const Strides xs = p.x_strides();
  for (int64_t c = 0; c < p.C; ++c)
    for (int64_t h = 0; h < p.H; ++h) {
      const float* row = from + c * z.plane + (h + p.pad_h) * z.pitch + p.pad_w;
      T* to = gx + c * xs.c + h * xs.h;
      if (xs.w == 1)
        for (int64_t w = 0; w < p.W; w += VL) store_lanes_n(to + w, load_lanes_n(row + w, p.W - w), p.W - w);
      else
        for (int64_t w = 0; w < p.W; ++w) round_to(to[w * xs.w], row[w]);
    }
}

// ---- the gradients of an image

// [window][filter], filters padded to vectors. g: gy, zero where closed; at: where the tap's vector begins.
struct Gradients {
  float* g;
  uint16_t* at;
};
PYSEQNET_INLINE vf open(vf g, TapBytes taps, int64_t to, const Gradients& opened, vi& odd) {
  const __mmask16 passes = _mm_cmplt_epu8_mask(taps, _mm_set1_epi8(TAPS));
  const vf passed = (vf)_mm512_maskz_mov_ps(passes, (__m512)g);
  odd |= (passed - passed) != vf{};
  store(opened.g + to, passed);
  const __m256i at = _mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm_maskz_mov_epi8(passes, taps)), 4);
  _mm256_storeu_si256((__m256i*)(opened.at + to), at);
  return passed;
}
static_assert(VL == 1 << 4);
// Adds to gb; returns whether all are finite.
template <class T>
inline bool open_image(const ConvReluPoolProblem& f, const Sizes& z, const T* gy, const uint8_t* arg,
                       const Gradients& to, float* gb) {
  vi odd = {};
  const int64_t K = f.conv.K;
  const bool planes = f.conv.layout == Layout::nchw;
  for (int64_t k = 0; k < z.filters; k += VL) {
    const int rows = int(smaller(VL, K - k));
    vf sum = {};
    for (int64_t w = 0; w < z.windows; w += planes ? VL : 1) {
      if (!planes) {
        const TapBytes taps = _mm_maskz_loadu_epi8((__mmask16)((1u << rows) - 1), arg + w * K + k);
        sum += open(load_lanes_n(gy + w * K + k, rows), taps, w * z.filters + k, to, odd);
        continue;
      }
      const int columns = int(smaller(VL, z.windows - w));
      TapBytes taps[VL];
      load_turned_taps(arg + k * z.windows + w, z.windows, rows, columns, taps);
      vf g[VL];
#pragma GCC unroll 16
      for (int i = 0; i < VL; ++i)
        g[i] = i < rows ? load_lanes_n(gy + (k + i) * z.windows + w, columns) : vf{};
      transpose(g);
#pragma GCC unroll 16
      for (int i = 0; i < VL; ++i)
        if (i < columns) sum += open(g[i], taps[i], (w + i) * z.filters + k, to, odd);
    }
    store(gb + k, load(gb + k) + sum);
  }
  int32_t any = 0;
  for (int l = 0; l < VL; ++l) any |= odd[l];
  return any == 0;
}

}  // namespace windows
}  // namespace relu_pool
#endif
}  // namespace PYSEQNET_ISA
}  // namespace pyseqnet
