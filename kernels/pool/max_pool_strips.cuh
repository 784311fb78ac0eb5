// Max-pooling of planes (NCHW) with stride 2 and windows of 2x2 or 3x3, the two of most networks, by strips: a
// thread owns four neighbouring outputs in each of several rows, so that 16-bit types, too, move by vectors.
//
//   forward_strips    reads the strip's rows once, 8 pixels a vector (and the one pixel beside them that a
//                     3x3 window needs, from L1): all loads are in flight before the first comparison. In
//                     16-bit types value and tap are one integer, and a row that two windows share is
//                     searched once.
//   backward_strips   reads the strip's taps and gradients once, four a vector, then sums each pixel's windows
//                     in the oracle's order; which tap of which window a pixel is, is known at compile time.
//
// Why: one output a thread takes about 120 instructions in 16-bit NCHW, 3x3/2 (counted in the source): 2-byte
// loads into shared memory with bounds and addresses, nine 2-byte loads from there. For 64 x 64 images of 112
// x 112 that is 52 us of issue on an H200, where the bytes (141 MB) take 34. Here sm_90a code has about 60
// instructions an output forward, 26 us of issue, and 14 a pixel backward, 24 us. Predicted for the same
// images, before any measurement: 37 us forward and backward, 90 % of copy bandwidth.
#pragma once
#include <type_traits>

#include "common/fast_divide.cuh"
#include "pool/max_pool_device.cuh"

namespace pyseqnet {

constexpr int strip_threads = 256;
constexpr int strip_outputs = 4, strip_pixels = 2 * strip_outputs;  // columns of a thread
// Rows of outputs of a thread: as many as its registers hold.
template <class T>
constexpr int strip_rows = sizeof(T) == 2 ? 4 : 2;

struct Strips {
  int32_t H, W, P, Q;
  int32_t groups, strips;  // of a row, of an image
  int32_t threads;         // all of them
  FastDivider<int32_t> by_groups, by_strips;
};

struct StripPlace {
  int64_t image;
  int32_t row, column;  // of its first output
  PYSEQNET_DEVICE StripPlace(const Strips& v, int32_t thread, int32_t rows) {
    const int32_t outer = v.by_groups.divide(thread), whole = v.by_strips.divide(outer);
    image = whole;
    row = (outer - whole * v.strips) * rows;
    column = (thread - outer * v.groups) * strip_outputs;
  }
};

// 16 bytes at a time.
template <class T, int n>
PYSEQNET_DEVICE Pack<T, n> load_strip(const T* from) {
  constexpr int step = sizeof(T) * n < 16 ? n : int(16 / sizeof(T));
  Pack<T, n> all;
#pragma unroll
  for (int i = 0; i < n; i += step) {
    const auto part = *reinterpret_cast<const Pack<T, step>*>(from + i);
#pragma unroll
    for (int k = 0; k < step; k++) all.value[i + k] = part.value[k];
  }
  return all;
}
template <class T, int n>
PYSEQNET_DEVICE void store_strip(T* to, const Pack<T, n>& all) {
  constexpr int step = sizeof(T) * n < 16 ? n : int(16 / sizeof(T));
#pragma unroll
  for (int i = 0; i < n; i += step) {
    Pack<T, step> part;
#pragma unroll
    for (int k = 0; k < step; k++) part.value[k] = all.value[i + k];
    *reinterpret_cast<Pack<T, step>*>(to + i) = part;
  }
}

// The pixels of one row that a strip sees, for `window` a side with `pad` of it before the image. Element is
// the type, or its bits.
template <class Element, int window, int pad>
struct StripRow {
  Pack<Element, strip_pixels> middle;
  Element beside;  // to the left where pad is 1, else to the right
  bool inside, beside_inside;

  PYSEQNET_DEVICE void read(const Element* plane, const Strips& v, int32_t h, int32_t w) {
    inside = h >= 0 && h < v.H;
    const Element* row = plane + (inside ? int64_t(h) * v.W : 0) + w;
    middle = load_strip<Element, strip_pixels>(row);
    if (window < 3) return;
    const int32_t j = pad ? -1 : strip_pixels;
    beside_inside = w + j >= 0 && w + j < v.W;
    beside = row[beside_inside ? j : 0];
  }
  PYSEQNET_DEVICE static bool is_beside(int j) { return j < 0 || j >= strip_pixels; }
  PYSEQNET_DEVICE Element pixel(int j) const { return is_beside(j) ? beside : middle.value[j]; }
};

// ---- float: values and taps apart. There are more bytes to wait for.
template <class T, int window, int pad>
PYSEQNET_DEVICE void forward_strip_by_values(const Strips& v, const StripPlace& at, const T* x, T* y,
                                             uint8_t* arg) {
  constexpr int rows = strip_rows<T>, pixel_rows = 2 * (rows - 1) + window;
  const T* plane = x + at.image * (int64_t(v.H) * v.W);
  StripRow<T, window, pad> row[pixel_rows];
#pragma unroll
  for (int i = 0; i < pixel_rows; i++) row[i].read(plane, v, 2 * at.row - pad + i, 2 * at.column);
#pragma unroll
  for (int o = 0; o < rows; o++) {
    const int32_t p = at.row + o;
    if (p >= v.P) break;
    Pack<T, strip_outputs> best;
    Pack<uint8_t, strip_outputs> tap;
#pragma unroll
    for (int c = 0; c < strip_outputs; c++) {
      // Should nothing beat -infinity: the first tap inside of the image.
      T winner = lowest<T>();
      int32_t won = (2 * p < pad ? window : 0) + (2 * (at.column + c) < pad ? 1 : 0);
#pragma unroll
      for (int r = 0; r < window; r++)
#pragma unroll
        for (int s = 0; s < window; s++) {
          const auto& here = row[2 * o + r];
          const int j = 2 * c - pad + s;
          const bool inside = here.inside && (!here.is_beside(j) || here.beside_inside);
          if (inside && beats(here.pixel(j), winner)) winner = here.pixel(j), won = r * window + s;
        }
      best.value[c] = winner, tap.value[c] = uint8_t(won);
    }
    const int64_t to = at.image * (int64_t(v.P) * v.Q) + int64_t(p) * v.Q + at.column;
    store_strip(y + to, best);
    if (arg) store_strip(arg + to, tap);
  }
}

// ---- 16-bit types: value and tap in one integer, so that a comparison is one instruction.
//
// The upper half orders the values, both zeros as 0. The lower bits are the tap's row and column, two each,
// complemented: of equal values the first tap is the greatest. Rows and columns outside of the image are read
// from its edge: what a window then holds twice cannot change its maximum, and of two equal taps the one
// outside is recognised by its position. NaNs have no such order: a strip that holds one is searched tap by tap.
template <class T>
PYSEQNET_DEVICE uint32_t nan_bits(uint32_t two_elements) {
  // Magnitudes above infinity's reach bit 15.
  constexpr uint32_t lift = std::is_same_v<T, __half> ? 0x03FF03FFu : 0x007F007Fu;
  return ((two_elements & 0x7FFF7FFFu) + lift) & 0x80008000u;
}

struct KeyParts {
  int32_t folded, sign;  // the key is folded - sign + what the tap adds
};
PYSEQNET_DEVICE KeyParts key_parts(int32_t upper_half) {
  const int32_t sign = upper_half >> 31;
  return {(upper_half & 0x7FFF0000) ^ sign, sign};
}

// One row: its pixels as four words, and the one beside them.
template <class T, int window, int pad>
struct KeyRow {
  Pack<uint32_t, strip_pixels / 2> words;
  uint32_t beside;

  PYSEQNET_DEVICE void read(const uint16_t* plane, const Strips& v, int32_t h, int32_t w) {
    h = h < 0 ? 0 : h >= v.H ? v.H - 1 : h;
    const uint16_t* row = plane + (h * v.W + w);
    words = *reinterpret_cast<const Pack<uint32_t, strip_pixels / 2>*>(row);
    if (window < 3) return;
    const int32_t j = pad ? -1 : strip_pixels;
    beside = row[w + j < 0 ? 0 : w + j >= v.W ? v.W - 1 - w : j];
  }
  PYSEQNET_DEVICE uint32_t nans() const {
    uint32_t found = window < 3 ? 0 : nan_bits<T>(beside);
#pragma unroll
    for (int i = 0; i < strip_pixels / 2; i++) found |= nan_bits<T>(words.value[i]);
    return found;
  }
  // The greatest key of output c's taps.
  PYSEQNET_DEVICE int32_t search(int c) const {
    int32_t best = INT32_MIN;
#pragma unroll
    for (int s = 0; s < window; s++) {
      const int j = 2 * c - pad + s;
      const uint32_t word = j < 0 || j >= strip_pixels ? beside : words.value[j / 2];
      const bool upper = j >= 0 && j < strip_pixels && j % 2;
      const KeyParts parts = key_parts(int32_t(upper ? word & 0xFFFF0000u : word << 16));
      best = max(best, parts.folded - parts.sign + (3 - s));
    }
    return best;
  }
};

// A strip that holds a NaN, tap by tap.
template <class T, int window, int pad>
PYSEQNET_DEVICE void forward_strip_with_nans(const Strips& v, const StripPlace& at, const T* x, T* y,
                                             uint8_t* arg) {
  const T* plane = x + at.image * (int64_t(v.H) * v.W);
  const int32_t end = at.row + strip_rows<T> < v.P ? at.row + strip_rows<T> : v.P;
#pragma unroll 1
  for (int32_t i = at.row * strip_outputs; i < end * strip_outputs; i++) {
    const int32_t p = i / strip_outputs, q = at.column + i % strip_outputs;
    T winner = lowest<T>();
    int32_t won = -1;
#pragma unroll 1
    for (int32_t tap = 0; tap < window * window; tap++) {
      const int32_t h = 2 * p - pad + tap / window, w = 2 * q - pad + tap % window;
      if (h < 0 || h >= v.H || w < 0 || w >= v.W) continue;
      const T candidate = plane[h * v.W + w];
      if (won < 0 || beats(candidate, winner)) winner = candidate, won = tap;
    }
    const int64_t to = at.image * (int64_t(v.P) * v.Q) + (p * v.Q + q);
    y[to] = winner;
    if (arg) arg[to] = uint8_t(won);
  }
}

// False, and nothing is written, where the strip holds a NaN.
template <class T, int window, int pad>
PYSEQNET_DEVICE bool forward_strip_by_keys(const Strips& v, const StripPlace& at, const T* x, T* y,
                                           uint8_t* arg) {
  constexpr int rows = strip_rows<T>, pixel_rows = 2 * (rows - 1) + window;
  const auto* plane = reinterpret_cast<const uint16_t*>(x) + at.image * (int64_t(v.H) * v.W);
  KeyRow<T, window, pad> row[pixel_rows];
#pragma unroll
  for (int i = 0; i < pixel_rows; i++) row[i].read(plane, v, 2 * at.row - pad + i, 2 * at.column);
  uint32_t nans = 0;
#pragma unroll
  for (int i = 0; i < pixel_rows; i++) nans |= row[i].nans();
  if (nans) return false;

  int32_t last[strip_outputs];  // of the row that the next output shares
#pragma unroll
  for (int o = 0; o < rows; o++) {
    const int32_t p = at.row + o;
    int32_t key[strip_outputs];
#pragma unroll
    for (int c = 0; c < strip_outputs; c++) {
      key[c] = INT32_MIN;
#pragma unroll
      for (int r = 0; r < window; r++) {
        const int32_t found = window == 3 && r == 0 && o > 0 ? last[c] : row[2 * o + r].search(c);
        key[c] = max(key[c], found + (3 - r) * 4);
        if (r == window - 1) last[c] = found;
      }
    }
    if (p >= v.P) break;
    Pack<uint16_t, strip_outputs> best;
    Pack<uint8_t, strip_outputs> tap;
#pragma unroll
    for (int c = 0; c < strip_outputs; c++) {
      const int32_t code = key[c] & 15 ^ 15, h0 = 2 * p - pad, w0 = 2 * (at.column + c) - pad;
      int32_t r = code >> 2, s = code & 3;
      if (pad && h0 + r < 0) r = 1;
      if (pad && w0 + s < 0) s = 1;
      best.value[c] = plane[(h0 + r) * v.W + w0 + s];  // its own bits: keys do not tell zeros apart
      tap.value[c] = uint8_t(r * window + s);
    }
    const int64_t to = at.image * (int64_t(v.P) * v.Q) + (p * v.Q + at.column);
    store_strip(reinterpret_cast<uint16_t*>(y) + to, best);
    if (arg) store_strip(arg + to, tap);
  }
  return true;
}

template <class T, int window, int pad>
__global__ void __launch_bounds__(strip_threads)
    max_pool_forward_strips(const Strips v, const T* __restrict__ x, T* __restrict__ y,
                            uint8_t* __restrict__ arg) {
  const int32_t thread = int32_t(blockIdx.x) * strip_threads + int32_t(threadIdx.x);
  if (thread >= v.threads) return;
  const StripPlace at(v, thread, strip_rows<T>);
  if constexpr (sizeof(T) > 2)
    forward_strip_by_values<T, window, pad>(v, at, x, y, arg);
  else if (!forward_strip_by_keys<T, window, pad>(v, at, x, y, arg))
    forward_strip_with_nans<T, window, pad>(v, at, x, y, arg);
}

template <class T, int window, int pad>
__global__ void __launch_bounds__(strip_threads)
    max_pool_backward_strips(const Strips v, const T* __restrict__ gy, const uint8_t* __restrict__ arg,
                             T* __restrict__ gx) {
  constexpr int rows = strip_rows<T>, extra = window == 3;
  constexpr int before = extra && !pad;  // outputs above and to the left of the strip that reach into it
  constexpr int down = rows + extra, across = strip_outputs + extra;
  constexpr uint8_t none = 255;
  const int32_t thread = int32_t(blockIdx.x) * strip_threads + int32_t(threadIdx.x);
  if (thread >= v.threads) return;
  const StripPlace at(v, thread, rows);
  const int64_t image = at.image * (int64_t(v.P) * v.Q);
  T gradient[down][across];
  uint8_t tap[down][across];
#pragma unroll
  for (int i = 0; i < down; i++) {
    const int32_t p = at.row - before + i;
    const bool inside = p >= 0 && p < v.P;
    const int64_t from = image + int64_t(p) * v.Q + at.column;
#pragma unroll
    for (int j = 0; j < across; j++) gradient[i][j] = from_accumulator<T>(0), tap[i][j] = none;
    if (!inside) continue;
    // Columns past the last output are whole groups of four: rows of gx may be longer than theirs.
    if (at.column < v.Q) {
      const auto four = load_strip<T, strip_outputs>(gy + from);
      const auto taps = load_strip<uint8_t, strip_outputs>(arg + from);
#pragma unroll
      for (int j = 0; j < strip_outputs; j++)
        gradient[i][before + j] = four.value[j], tap[i][before + j] = taps.value[j];
    }
    if (extra) {
      const int32_t j = before ? -1 : strip_outputs;
      const int32_t q = at.column + j;
      if (q >= 0 && q < v.Q) {
        gradient[i][before ? 0 : across - 1] = gy[from + j];
        tap[i][before ? 0 : across - 1] = arg[from + j];
      }
    }
  }
#pragma unroll
  for (int k = 0; k < 2 * rows; k++) {
    accumulator_t<T> sum[strip_pixels] = {};
#pragma unroll
    for (int i = 0; i < down; i++) {
      const int r = k + pad - 2 * (i - before);
      if (r < 0 || r >= window) continue;
#pragma unroll
      for (int w = 0; w < strip_pixels; w++)
#pragma unroll
        for (int j = 0; j < across; j++) {
          const int s = w + pad - 2 * (j - before);
          if (s < 0 || s >= window) continue;
          if (tap[i][j] == r * window + s) sum[w] += to_accumulator(gradient[i][j]);
        }
    }
    const int32_t h = 2 * at.row + k;
    if (h >= v.H) break;
    Pack<T, strip_pixels> result;
#pragma unroll
    for (int w = 0; w < strip_pixels; w++) result.value[w] = from_accumulator<T>(sum[w]);
    store_strip(gx + at.image * (int64_t(v.H) * v.W) + int64_t(h) * v.W + 2 * at.column, result);
  }
}

}  // namespace pyseqnet
