// What the CPU kernels of linear attention compute on: small row-major float tiles of private memory, their
// rows padded to whole vectors with zeros, so that products need no edges and every dtype and stride is met
// in load_tile and store_tile only.
//
// The products keep a tile of rows x vectors in registers (gemm.h) and are single functions that every caller
// shares: inlined at each call they would be most of the binary.
#pragma once
#include "common/element_lanes.h"
#include "common/gemm.h"
#include "linear_attention/linear_attention.h"
#include "linear_attention/linear_attention_features.h"

#define PYSEQNET_SHARED_CODE static __attribute__((noinline, unused))

namespace pyseqnet {
inline namespace PYSEQNET_ISA {
namespace {

constexpr int64_t chunk = LinearAttentionProblem::chunk_rows;
static_assert(chunk % (4 * VL) == 0, "a row of a chunk's matrix is whole register tiles");

PYSEQNET_INLINE int64_t padded(int64_t n) { return (n + VL - 1) / VL * VL; }
PYSEQNET_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
PYSEQNET_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
PYSEQNET_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
PYSEQNET_INLINE void clear(float* p, int64_t n) { memset(p, 0, size_t(n) * sizeof(float)); }

// ---------------------------------------------------------------- products

// Rows of a register tile NV vectors wide. Narrow tiles take fewer rows than the registers would hold: enough
// independent sums to hide the latency of an addition, and less code.
template <int NV>
constexpr int tile_rows() {
  return NV == 4 ? mr<4>() : VL == 16 ? 8 : 6;
}
// Calls f(Int<NV>, column) so that the pieces cover n columns, a multiple of VL.
template <class F>
PYSEQNET_INLINE void each_panel(int64_t n, F&& f) {
  int64_t j = 0;
  for (; j + 4 * VL <= n; j += 4 * VL) f(Int<4>{}, j);
  for (; j + 2 * VL <= n; j += 2 * VL) f(Int<2>{}, j);
  for (; j + VL <= n; j += VL) f(Int<1>{}, j);
}
// Calls f(Int<R>, row) so that the blocks cover m rows evenly.
template <int most, class F>
PYSEQNET_INLINE void each_row_block(int64_t m, F&& f) {
  const int64_t blocks = ceil_div(m, most);
  int64_t i = 0;
  for (int64_t t = 0; t < blocks; t++) {
    const int rows = int((m - i + blocks - t - 1) / (blocks - t));
    with_rows<most>(rows, [&](auto r) PYSEQNET_LAMBDA { f(r, i); });
    i += rows;
  }
}
// Adds a finished tile to c, or stores it there. Added at the end and not summed on from the start: a state
// is then a sum of chunks' sums, whose error grows with the number of chunks rather than that of positions.
template <int R, int NV>
PYSEQNET_INLINE void finish_tile(float* c, int64_t ldc, bool accumulate, const vf (&acc)[R][NV]) {
  if (accumulate) {
#pragma GCC unroll 32
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) store(c + r * ldc + v * VL, load(c + r * ldc + v * VL) + acc[r][v]);
    return;
  }
#pragma GCC unroll 32
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) store(c + r * ldc + v * VL, acc[r][v]);
}

// c[M][N] (+)= a[M][K] b[K][N], N whole vectors. `lower`: a is lower triangular, K of row i ends after i.
PYSEQNET_SHARED_CODE void rows_product(int64_t M, int64_t N, int64_t K, const float* a, int64_t lda,
                                       const float* b, int64_t ldb, float* c, int64_t ldc, bool accumulate,
                                       bool lower) {
  each_panel(N, [&](auto nv, int64_t j) PYSEQNET_LAMBDA {
    constexpr int NV = decltype(nv)::value;
    each_row_block<tile_rows<NV>()>(M, [&](auto rows, int64_t i) PYSEQNET_LAMBDA {
      constexpr int R = decltype(rows)::value;
      const float* row[R];
      for (int r = 0; r < R; ++r) row[r] = a + (i + r) * lda;
      vf acc[R][NV];
      zero(acc);
      mk_rows<R, NV>(lower ? smaller(K, i + R) : K, row, b + j, ldb, acc);
      finish_tile<R, NV>(c + i * ldc + j, ldc, accumulate, acc);
    });
  });
}
// c[M][N] (+)= a[K][M]^T b[K][N], N whole vectors. `lower`: a is lower triangular, K of column i begins at i.
PYSEQNET_SHARED_CODE void columns_product(int64_t M, int64_t N, int64_t K, const float* a, int64_t lda,
                                          const float* b, int64_t ldb, float* c, int64_t ldc, bool accumulate,
                                          bool lower) {
  each_panel(N, [&](auto nv, int64_t j) PYSEQNET_LAMBDA {
    constexpr int NV = decltype(nv)::value;
    each_row_block<tile_rows<NV>()>(M, [&](auto rows, int64_t i) PYSEQNET_LAMBDA {
      constexpr int R = decltype(rows)::value;
      const int64_t first = lower ? smaller(i, K) : 0;
      vf acc[R][NV];
      zero(acc);
      mk_cols<R, NV>(K - first, a + first * lda + i, lda, b + first * ldb + j, ldb, acc);
      finish_tile<R, NV>(c + i * ldc + j, ldc, accumulate, acc);
    });
  });
}
// c[n][chunk] = a[n][K] b[K][chunk] + add[i], at and below the diagonal; zeros above it.
PYSEQNET_SHARED_CODE void lower_product(int64_t n, int64_t K, const float* a, int64_t lda, const float* b,
                                        const float* add, float* c) {
  each_row_block<tile_rows<4>()>(n, [&](auto rows, int64_t i) PYSEQNET_LAMBDA {
    constexpr int R = decltype(rows)::value;
    const float* row[R];
    for (int r = 0; r < R; ++r) row[r] = a + (i + r) * lda;
    const int64_t end = smaller(chunk, padded(i + R));
    const auto panel = [&](auto nv, int64_t j) PYSEQNET_LAMBDA {
      constexpr int NV = decltype(nv)::value;
      vf acc[R][NV];
      zero(acc);
      mk_rows<R, NV>(K, row, b + j, chunk, acc);
#pragma GCC unroll 32
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
          const vf x = add ? acc[r][v] + add[i + r] : acc[r][v];
          store(c + (i + r) * chunk + j + v * VL, iota() + int(j + v * VL) <= int(i + r) ? x : vf{});
        }
    };
    int64_t j = 0;
    for (; end - j > 2 * VL; j += 4 * VL) panel(Int<4>{}, j);
    for (; end - j > VL; j += 2 * VL) panel(Int<2>{}, j);
    for (; end > j; j += VL) panel(Int<1>{}, j);
    for (int r = 0; r < R; ++r) clear(c + (i + r) * chunk + j, larger(0, chunk - j));
  });
}

// dst[columns][to] = src[rows][columns] transposed, to >= rows whole vectors, zeros beyond rows.
PYSEQNET_SHARED_CODE void transpose_tile(int64_t rows, int64_t columns, const float* src, int64_t src_stride,
                                         float* dst, int64_t to) {
  for (int64_t r = 0; r < to; r += VL)
    for (int64_t c = 0; c < columns; c += VL)
      transpose_block(src + r * src_stride + c, src_stride, int(larger(0, smaller(rows - r, VL))),
                      int(smaller(columns - c, VL)), dst + c * to + r, to);
}

// ---------------------------------------------------------------- rows from and to the caller's tensors

// Calls f(typed pointer) for a pointer to elements of a dtype that these kernels take.
template <class F>
PYSEQNET_INLINE void with_elements(DType dtype, const void* p, F&& f) {
  if (dtype == DType::f32) return f(static_cast<const float*>(p));
  if (dtype == DType::bf16) return f(static_cast<const bfloat16*>(p));
  f(static_cast<const float16*>(p));
}
template <class F>
PYSEQNET_INLINE void with_elements(DType dtype, void* p, F&& f) {
  if (dtype == DType::f32) return f(static_cast<float*>(p));
  if (dtype == DType::bf16) return f(static_cast<bfloat16*>(p));
  f(static_cast<float16*>(p));
}

// Asks for a row that will be read later, `distance` elements away; harmless where there is none.
template <class T>
PYSEQNET_INLINE void prefetch_row(const T* row, int64_t distance, int64_t columns) {
  constexpr int64_t line = 64;
  const uintptr_t at = uintptr_t(row) + uintptr_t(distance * int64_t(sizeof(T)));
  for (int64_t x = 0; x < columns * int64_t(sizeof(T)); x += line)
    __builtin_prefetch(reinterpret_cast<const char*>(at + uintptr_t(x)), 0, 2);
}

// tile[rows][padded(columns)] = rows of p, `offset` elements in. The rows that lie `ahead` of these are asked
// for meanwhile: they come from memory while this chunk's products run.
PYSEQNET_SHARED_CODE void load_tile(DType dtype, const void* p, int64_t offset, int64_t stride, int64_t rows,
                                    int64_t columns, float* tile, int64_t ahead = 0) {
  with_elements(dtype, p, [&](auto* base) PYSEQNET_LAMBDA {
    const int64_t whole = columns / VL * VL, width = padded(columns);
    for (int64_t i = 0; i < rows; i++) {
      const auto* from = base + offset + i * stride;
      float* to = tile + i * width;
      if (ahead) prefetch_row(from, ahead * stride, columns);
      for (int64_t x = 0; x < whole; x += VL) store(to + x, load_lanes(from + x));
      if (whole < columns) store(to + whole, load_between(from + whole, 0, columns - whole, vf{}));
    }
  });
}
PYSEQNET_SHARED_CODE void store_tile(DType dtype, void* p, int64_t offset, int64_t stride, int64_t rows,
                                     int64_t columns, const float* tile) {
  with_elements(dtype, p, [&](auto* base) PYSEQNET_LAMBDA {
    const int64_t width = padded(columns);
    for (int64_t i = 0; i < rows; i++) {
      auto* to = base + offset + i * stride;
      const float* from = tile + i * width;
      for (int64_t x = 0; x < columns; x += VL)
        store_lanes_n(to + x, load(from + x), smaller(VL, columns - x));
    }
  });
}
// Rows of zeros.
PYSEQNET_SHARED_CODE void clear_rows(DType dtype, void* p, int64_t offset, int64_t stride, int64_t rows,
                                     int64_t columns) {
  with_elements(dtype, p, [&](auto* base) PYSEQNET_LAMBDA {
    for (int64_t i = 0; i < rows; i++)
      memset((void*)(base + offset + i * stride), 0, size_t(columns) * sizeof(*base));
  });
}

// tile = phi(scale tile), in place; the padding of each row stays zero.
PYSEQNET_SHARED_CODE void apply_features(FeatureMap map, float scale, int64_t rows, int64_t columns,
                                         float* tile) {
  const int64_t width = padded(columns), whole = columns / VL * VL;
  with_feature_map(map, [&](auto tag) PYSEQNET_LAMBDA {
    constexpr FeatureMap m = decltype(tag)::map;
    if (m == FeatureMap::identity && scale == 1) return;
    const auto of = [&](vf x) PYSEQNET_LAMBDA {
      return feature<m>(x * scale, [](vf y) PYSEQNET_LAMBDA { return y != y ? y : expv(y); });
    };
    for (float* row = tile; row < tile + rows * width; row += width) {
      for (int64_t x = 0; x < whole; x += VL) store(row + x, of(load(row + x)));
      if (whole < columns) store(row + whole, iota() < int(columns - whole) ? of(load(row + whole)) : vf{});
    }
  });
}
// Efficient attention's queries: each row of the tile becomes exp(scale x - its largest).
PYSEQNET_SHARED_CODE void exponentials_of_rows(float scale, int64_t rows, int64_t columns, float* tile) {
  const int64_t width = padded(columns);
  for (float* row = tile; row < tile + rows * width; row += width) {
    const auto at = [&](int64_t x) PYSEQNET_LAMBDA {
      return iota() < int(columns - x) ? load(row + x) * scale : set1(-HUGE_VALF);
    };
    vf most = at(0);
    for (int64_t x = VL; x < width; x += VL) most = vmax(most, at(x));
    const vf largest = set1(hmax(most));
    for (int64_t x = 0; x < width; x += VL) {
      const vf y = at(x) - largest;
      store(row + x, iota() < int(columns - x) ? (y != y ? y : expv(y)) : vf{});
    }
  }
}
// Its keys: row -= shift, before the map exp.
PYSEQNET_SHARED_CODE void shift_rows(int64_t rows, int64_t width, const float* shift, float* tile) {
  for (int64_t i = 0; i < rows; i++)
    for (int64_t x = 0; x < width; x += VL)
      store(tile + i * width + x, load(tile + i * width + x) - load(shift + x));
}
// g = (g + weight[i] z) phi'(f) scale, in place; without weights the row z is added as it is.
PYSEQNET_SHARED_CODE void finish_gradient(FeatureMap map, float scale, int64_t rows, int64_t width,
                                          const float* weight, const float* z, const float* f, float* g) {
  with_feature_map(map, [&](auto tag) PYSEQNET_LAMBDA {
    constexpr FeatureMap m = decltype(tag)::map;
    for (int64_t i = 0; i < rows; i++)
      for (int64_t x = 0; x < width; x += VL) {
        const int64_t at = i * width + x;
        const vf sum = weight ? load(g + at) + load(z + x) * weight[i] : load(g + at) + load(z + x);
        store(g + at, sum * feature_gradient<m>(load(f + at)) * scale);
      }
  });
}

// ---------------------------------------------------------------- states

// A state in private memory: S [D][padded(E)], then z [padded(D)].
PYSEQNET_INLINE int64_t tile_state_size(const LinearAttentionProblem& p) {
  return p.D * padded(p.E) + padded(p.D);
}
PYSEQNET_INLINE float* normalizer_of(const LinearAttentionProblem& p, float* s) {
  return s + p.D * padded(p.E);
}
// From and to the caller's dense rows; null pointers read as zeros and are not written.
PYSEQNET_SHARED_CODE void read_state(const LinearAttentionProblem& p, const float* state,
                                     const float* normalizer, float* s) {
  const int64_t width = padded(p.E);
  if (!state || !normalizer) clear(s, tile_state_size(p));
  if (state) load_tile(DType::f32, state, 0, p.E, p.D, p.E, s);
  if (normalizer) load_tile(DType::f32, normalizer, 0, p.D, 1, p.D, s + p.D * width);
}
PYSEQNET_SHARED_CODE void write_state(const LinearAttentionProblem& p, const float* s, float* state,
                                      float* normalizer) {
  const int64_t width = padded(p.E);
  if (state) store_tile(DType::f32, state, 0, p.E, p.D, p.E, s);
  if (normalizer) store_tile(DType::f32, normalizer, 0, p.D, 1, p.D, s + p.D * width);
}
// to += from
PYSEQNET_SHARED_CODE void add_vectors(int64_t n, const float* from, float* to) {
  for (int64_t x = 0; x < n; x += VL) store(to + x, load(to + x) + load(from + x));
}
PYSEQNET_INLINE void scale_vectors(int64_t n, float by, float* x) {
  for (int64_t i = 0; i < n; i += VL) store(x + i, load(x + i) * by);
}
// powers[n] = g^n for n up to a chunk; from 2 chunks on g^(chunk-1) .. g^0 and then as many zeros. Behind
// them the same of the derivatives n g^(n-1).
constexpr int64_t powers_size = 4 * chunk;
PYSEQNET_INLINE void write_powers(double g, float* powers) {
  float* derivatives = powers + powers_size;
  clear(powers, 2 * powers_size);
  double power = 1, before = 0;
  for (int64_t n = 0; n <= chunk; n++) {
    powers[n] = float(power), derivatives[n] = float(double(n) * before);
    if (n < chunk) powers[3 * chunk - 1 - n] = powers[n], derivatives[3 * chunk - 1 - n] = derivatives[n];
    before = power, power *= g;
  }
}
// z += sum of weight[i] f[i], or of f[i]
PYSEQNET_SHARED_CODE void add_rows(int64_t rows, int64_t width, const float* weight, const float* f,
                                   float* z) {
  for (int64_t x = 0; x < width; x += VL) {
    vf sum = {};
    for (int64_t i = 0; i < rows; i++) {
      const vf row = load(f + i * width + x);
      sum += weight ? row * weight[i] : row;
    }
    store(z + x, load(z + x) + sum);
  }
}
PYSEQNET_INLINE float sum_of(int64_t width, const float* a) {
  vf sum = {};
  for (int64_t x = 0; x < width; x += VL) sum += load(a + x);
  return hsum(sum);
}
PYSEQNET_INLINE float dot(int64_t width, const float* a, const float* b) {
  vf sum = {};
  for (int64_t x = 0; x < width; x += VL) sum += load(a + x) * load(b + x);
  return hsum(sum);
}

// ---------------------------------------------------------------- scratch

// Decoding: one query, one key at most, and nothing kept for backward.
bool is_single_position(const LinearAttentionProblem& p) {
  return p.L == 1 && p.S == 1 && !p.with_saved && !p.packed;
}

struct Scratch {
  float *a, *f, *v, *wide, *weights, *powers;
  float *dn = nullptr, *A = nullptr, *dA = nullptr, *turned = nullptr, *state = nullptr;
  // Backward needs all of it. A single position needs five rows: the rest would cost it a page fault each 4
  // KB.
  Scratch(const LinearAttentionProblem& p, Carver& carver, bool backward) {
    const int64_t D = padded(p.D), E = padded(p.E);
    const bool single = is_single_position(p) && !backward;
    const int64_t rows = single ? 1 : chunk;
    a = carver.take<float>(rows * D);
    f = carver.take<float>(rows * D);
    v = carver.take<float>(rows * E);
    wide = carver.take<float>(rows * larger(D, E));
    weights = carver.take<float>(rows);
    powers = carver.take<float>(p.decayed ? 2 * powers_size : 0);
    if (single) return;
    state = carver.take<float>(tile_state_size(p));
    A = carver.take<float>(chunk * chunk);
    turned = carver.take<float>(larger(p.D, p.E) * larger(chunk, D));
    if (!backward) return;
    dn = carver.take<float>(chunk * E);
    dA = carver.take<float>(chunk * chunk);
  }
};
int64_t scratch_bytes(const LinearAttentionProblem& p, bool backward) {
  Carver carver(nullptr);
  Scratch(p, carver, backward);
  return carver.used();
}

}  // namespace
}  // namespace PYSEQNET_ISA
}  // namespace pyseqnet
