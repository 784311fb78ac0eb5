// What attention does to a tile of logits that lies in scratch: masks, softmax, dropout, and which keys a
// problem's queries see. Rows of a tile are queries i0 .. i0 + n, columns keys from j0 on; limits[r] says how
// many leading columns row r may see by length and causality. Logits are in natural units: a bias of the
// lowest finite float stays finite.
//
// Bound: about twelve vector operations a logit for the exponential, against 2 D + 2 E multiplications a
// pair.
#pragma once
#include "attention/attention_math.h"
#include "attention/attention_products.h"
#include "common/random.h"

namespace pyseqnet {
inline namespace PYSEQNET_ISA {

constexpr int64_t BLOCK = 96;  // queries that share a packed block: a multiple of every ROWS
constexpr float INFINITE = __builtin_inff();

// e^x for x <= 0: relative error about 3e-7; exactly 0 for -inf, NaN stays NaN. One maths with exp2_of, in
// lanes.
PYSEQNET_INLINE vf exp_lanes(vf x) {
  const vf scaled = x * float(log2_e);
#if defined(__AVX512F__)
  // Below, 2^n underflows to 0; of a NaN the second operand of the maximum comes back.
  const vf y = vmax(set1(-200.0f), scaled);
  const vf n = (vf)_mm512_roundscale_ps((__m512)y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const vf y = vmin(set1(127.0f), vmax(set1(-126.0f), scaled));
  const vf magic = set1(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const vf shifted = y + magic, n = shifted - magic;
#endif
  const vf f = y - n;
  vf p = set1(0.00132647239f);  // weighted least squares for 2^f on [-1/2, 1/2]
  p = p * f + 0.00967151287f;
  p = p * f + 0.0555073375f;
  p = p * f + 0.240222421f;
  p = p * f + 0.693146978f;
  p = p * f + 1.0f;
#if defined(__AVX512F__)
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  const vf result = (vf)((vi)p + (((vi)shifted - (vi)magic) << 23));
  const vf flushed = scaled < -126.0f ? vf{} : result;
  return scaled == scaled ? flushed : scaled;
#endif
}
PYSEQNET_INLINE vi first_lanes(int64_t n) { return iota() < int32_t(n); }

// ---- which keys ----

PYSEQNET_INLINE AttentionSequence sequence_of(const AttentionProblem& p, const AttentionTensors& t,
                                              int64_t b) {
  return pyseqnet::sequence_of(p, t.key_lengths, t.cu_q, t.cu_k, b);
}
PYSEQNET_INLINE int64_t visible_to(const AttentionProblem& p, const AttentionSequence& at, int64_t i) {
  return visible_keys(p.causal, at.causal_offset, at.length, i);
}

// The columns of a tile that a register tile of rows has to compute: width of them from `first` on, which is a
// multiple of VL. bits: the rows' words of a bit tile of the pattern, or null.
struct Columns {
  int64_t first, width;
  const uint64_t* bits;
};
// For queries i0 .. i0 + n and the tile of keys that begins at j0; limits count from `first`.
PYSEQNET_INLINE Columns columns_of(const AttentionProblem& p, const AttentionSequence& at, int64_t i0,
                                   int64_t n, int64_t j0, int64_t width, const uint64_t* bits,
                                   int32_t* limits) {
  int64_t limit = 0;
  for (int64_t r = 0; r < n; ++r) {
    const int64_t keys = visible_to(p, at, i0 + r) - j0;
    limit = keys < 0 ? 0 : smaller(keys, width);
    limits[r] = int32_t(limit);
  }
  Columns columns = {0, limit, nullptr};  // the last row's limit is the largest
  if (bits && limit > 0) {
    uint64_t any = 0;
    for (int64_t r = 0; r < n; ++r) any |= bits[r];
    if (limit < block_tile) any &= (uint64_t(1) << limit) - 1;
    if (any == 0) return {0, 0, nullptr};
    const int64_t end = block_tile - __builtin_clzll(any);
    columns.first = __builtin_ctzll(any) / VL * VL;
    columns.width = end - columns.first, columns.bits = bits;
    for (int64_t r = 0; r < n; ++r) limits[r] = int32_t(larger(smaller(limits[r], end) - columns.first, 0));
  }
  return columns;
}

// Pairs that there are to compute for a query head, before causality and lengths.
PYSEQNET_INLINE int64_t pairs_of_a_head(const AttentionProblem& p) {
  return p.with_blocks ? p.block_entries / p.block_heads * block_tile * block_tile : p.L * p.S;
}

// Where the mask, or the bias, of a head begins.
PYSEQNET_INLINE int64_t mask_offset(const AttentionStrides& s, const AttentionSequence& at, int64_t h) {
  return at.b * s.b + h * s.h;
}

// Whether something other than length and causality hides keys.
PYSEQNET_INLINE bool hides_pairs(const AttentionProblem& p) {
  return p.with_mask || p.with_bias || p.with_blocks;
}
// Whether one of the queries i0 <= i < i1 of the heads of hk sees key j. Slow: asked only for keys that hold
// NaN or infinity under a mask, a bias or a pattern.
PYSEQNET_NOINLINE bool key_is_seen(const AttentionProblem& p, const AttentionTensors& t,
                                   const AttentionSequence& at, int64_t hk, int64_t j, int64_t i0,
                                   int64_t i1) {
  for (int64_t h = hk * p.group(); h < (hk + 1) * p.group(); ++h)
    for (int64_t i = i0; i < i1; ++i) {
      if (j >= visible_to(p, at, i)) continue;
      if (p.with_blocks && !block_sees(t.blocks, block_row(p, h, i), i, j)) continue;
      if (p.with_mask &&
          !static_cast<const uint8_t*>(
              t.mask)[mask_offset(p.mask_strides, at, h) + i * p.mask_strides.n + j * p.mask_stride_s])
        continue;
      bool hidden = false;
      if (p.with_bias)
        with_element(p.bias_dtype, [&](auto tag) PYSEQNET_LAMBDA {
          hidden =
              to_float(static_cast<const decltype(tag)*>(
                  t.bias)[mask_offset(p.bias_strides, at, h) + i * p.bias_strides.n + j * p.bias_stride_s]) ==
              -INFINITE;
        });
      if (!hidden) return true;
    }
  return false;
}

// Packs n keys (or values) from j0 on as rows; those that no query i0 <= i < i1 sees become zero if they hold
// NaN or infinity, for 0 * NaN would leak. Where nothing hides single pairs, every key packed is seen.
template <class T>
PYSEQNET_NOINLINE void pack_keys(const AttentionProblem& p, const AttentionTensors& t,
                                 const AttentionSequence& at, const T* src, const AttentionStrides& strides,
                                 int64_t width, int64_t hk, int64_t j0, int64_t n, int64_t i0, int64_t i1,
                                 float* dst) {
  pack_rows(src + key_offset(strides, at, hk, j0), strides.n, n, width, 1.0f, dst);
  if (!hides_pairs(p)) return;
  const int64_t words = row_words(width);
  for (int64_t j = 0; j < n; ++j)
    if (!all_finite(dst + j * words, words) && !key_is_seen(p, t, at, hk, j0 + j, i0, i1))
      memset(dst + j * words, 0, size_t(words) * sizeof(float));
}

// ---- scores become logits ----

PYSEQNET_INLINE vi mask_lanes(const uint8_t* bytes) {
  typedef uint8_t vb __attribute__((vector_size(VL)));
  vb b;
  memcpy(&b, bytes, VL);
  return __builtin_convertvector(b, vi) != 0;
}
PYSEQNET_NOINLINE void apply_mask(const uint8_t* mask, int64_t stride_n, int64_t stride_s, int64_t n,
                                  const int32_t* limits, float* z, int64_t ldz) {
  for (int64_t r = 0; r < n; ++r, mask += stride_n, z += ldz) {
    int64_t c = 0;
    if (stride_s == 1)
      for (; c + VL <= limits[r]; c += VL) store(z + c, mask_lanes(mask + c) ? load(z + c) : set1(-INFINITE));
    for (; c < limits[r]; ++c) z[c] = mask[c * stride_s] ? z[c] : -INFINITE;
  }
}
template <class M>
PYSEQNET_NOINLINE void add_bias(const M* bias, int64_t stride_n, int64_t stride_s, int64_t n,
                                const int32_t* limits, float* z, int64_t ldz) {
  for (int64_t r = 0; r < n; ++r, bias += stride_n, z += ldz) {
    int64_t c = 0;
    if (stride_s == 1)
      for (; c + VL <= limits[r]; c += VL) {
        const vf m = load_lanes(bias + c);
        store(z + c, m == -INFINITE ? m : load(z + c) + m);  // -inf masks whatever the logit is
      }
    for (; c < limits[r]; ++c) {
      const float m = to_float(bias[c * stride_s]);
      z[c] = m == -INFINITE ? m : z[c] + m;
    }
  }
}
PYSEQNET_NOINLINE void apply_bits(const Columns& columns, int64_t n, const int32_t* limits, float* z,
                                  int64_t ldz) {
  for (int64_t r = 0; r < n; ++r, z += ldz) {
    const uint64_t word = columns.bits[r] >> columns.first;
    for (int64_t c = 0; c < limits[r]; c += VL) {
      const vw lane = ((vw{} + uint32_t(word >> c)) >> (vw)iota()) & 1;
      store(z + c, lane != 0 ? load(z + c) : set1(-INFINITE));
    }
  }
}
// z = cap tanh(z / cap); slopes, unless null, the derivative.
PYSEQNET_NOINLINE void cap_scores(float cap, int64_t n, const int32_t* limits, float* z, int64_t ldz,
                                  float* slopes) {
  for (int64_t r = 0; r < n; ++r, z += ldz)
    for (int64_t c = 0; c < limits[r]; c += VL) {
      const vf x = load(z + c) * (1.0f / cap), t = x == x ? tanhv(x) : x;
      store(z + c, t * cap);
      if (slopes) store(slopes + r * ldz + c, 1.0f - t * t);
    }
}
// distance: of the first row's query from the first column's key.
PYSEQNET_NOINLINE void add_alibi(float slope, int64_t distance, int64_t n, const int32_t* limits, float* z,
                                 int64_t ldz) {
  const vf columns = __builtin_convertvector(iota(), vf);
  for (int64_t r = 0; r < n; ++r, z += ldz)
    for (int64_t c = 0; c < limits[r]; c += VL) {
      const vf d = float(distance + r - c) - columns;
      store(z + c, load(z + c) - slope * vmax(d, -d));
    }
}

// Scores of queries i0 .. i0 + n of head h and the columns of a tile of keys become logits, -infinity where a
// pair is hidden. j0 is the key of z's first column; slopes as in cap_scores.
PYSEQNET_INLINE void to_logits(const AttentionProblem& p, const AttentionTensors& t,
                               const AttentionSequence& at, int64_t h, int64_t i0, int64_t n, int64_t j0,
                               const Columns& columns, const int32_t* limits, float* z, int64_t ldz,
                               float* slopes = nullptr) {
  if (p.softcap > 0) cap_scores(float(p.softcap), n, limits, z, ldz, slopes);
  if (p.with_slopes)
    add_alibi(static_cast<const float*>(t.slopes)[at.b * p.slopes_stride_b + h], i0 + at.alibi_offset - j0, n,
              limits, z, ldz);
  if (p.with_bias)
    with_element(p.bias_dtype, [&](auto tag) PYSEQNET_LAMBDA {
      const auto* bias = static_cast<const decltype(tag)*>(t.bias) + mask_offset(p.bias_strides, at, h);
      add_bias(bias + i0 * p.bias_strides.n + j0 * p.bias_stride_s, p.bias_strides.n, p.bias_stride_s, n,
               limits, z, ldz);
    });
  if (p.with_mask)
    apply_mask(static_cast<const uint8_t*>(t.mask) + mask_offset(p.mask_strides, at, h) +
                   i0 * p.mask_strides.n + j0 * p.mask_stride_s,
               p.mask_strides.n, p.mask_stride_s, n, limits, z, ldz);
  if (columns.bits) apply_bits(columns, n, limits, z, ldz);
}

// Whether a boolean mask lets nothing of the tile through: then its products need not be computed. A scan of
// bytes, a fraction of a percent of the tile's work.
PYSEQNET_NOINLINE bool mask_hides_tile(const AttentionProblem& p, const AttentionTensors& t,
                                       const AttentionSequence& at, int64_t h, int64_t i0, int64_t n,
                                       int64_t j0, const int32_t* limits) {
  if (!p.with_mask || p.mask_stride_s != 1) return false;
  const uint8_t* mask =
      static_cast<const uint8_t*>(t.mask) + mask_offset(p.mask_strides, at, h) + i0 * p.mask_strides.n + j0;
  const int64_t rows = p.mask_strides.n == 0 ? n - 1 : 0;  // one row stands for all: the last sees most keys
  for (int64_t r = rows; r < n; ++r) {
    const uint8_t* row = mask + r * p.mask_strides.n;
    int64_t c = 0;
    for (; c + 8 <= limits[r]; c += 8) {
      uint64_t eight;
      memcpy(&eight, row + c, 8);
      if (eight) return false;
    }
    for (; c < limits[r]; ++c)
      if (row[c]) return false;
  }
  return true;
}

// ---- softmax ----

// Statistics of the rows of a block while their keys go by.
struct RowSums {
  float* largest;  // [rows]
  float* sums;     // [rows][VL]: lanes are added up at the end
};

// One online step for n rows: z becomes exp(z - largest), zero beyond each limit up to `columns`; factors[r]
// is what rows summed so far must be multiplied with.
PYSEQNET_NOINLINE void softmax_tile(int64_t n, int64_t columns, const int32_t* limits, float* z, int64_t ldz,
                                    const RowSums& rows, float* factors) {
  alignas(64) float change[ROWS + VL], origin[ROWS];
  for (int64_t r = 0; r < n; ++r) {
    float* row = z + r * ldz;
    vf top = set1(-INFINITE), other = top;
    int64_t c = 0;
    for (; c + 2 * VL <= limits[r]; c += 2 * VL) {
      top = vmax(top, load(row + c));
      other = vmax(other, load(row + c + VL));
    }
    for (; c < limits[r]; c += VL) {
      const vf tail = first_lanes(limits[r] - c) ? load(row + c) : set1(-INFINITE);
      store(row + c, tail);
      top = vmax(top, tail);
    }
    const float tile_largest = hmax(vmax(top, other)), before = rows.largest[r];
    const float largest = tile_largest > before ? tile_largest : before;
    rows.largest[r] = largest;
    origin[r] = softmax_origin(largest);
    change[r] = before - origin[r];
  }
  for (int64_t r = 0; r < n; r += VL) store(change + r, exp_lanes(load(change + r)));
  for (int64_t r = 0; r < n; ++r) {
    float* row = z + r * ldz;
    vf sum = load(rows.sums + r * VL) * change[r], other = {};
    factors[r] = change[r];
    int64_t c = 0;
    for (; c + VL < limits[r]; c += 2 * VL) {
      const vf e0 = exp_lanes(load(row + c) - origin[r]), e1 = exp_lanes(load(row + c + VL) - origin[r]);
      store(row + c, e0);
      store(row + c + VL, e1);
      sum += e0;
      other += e1;
    }
    for (; c < limits[r]; c += VL) {
      const vf e = exp_lanes(load(row + c) - origin[r]);
      store(row + c, e);
      sum += e;
    }
    for (; c < columns; c += VL) store(row + c, vf{});
    store(rows.sums + r * VL, sum + other);
  }
}

// z becomes the probabilities exp(z - lse), zero beyond each limit up to `columns`. lse = +inf stands for a
// row that sees no key. A probability is at most 1: that keeps rows finite whose logits are too large to
// carry a sum.
PYSEQNET_NOINLINE void probabilities_tile(int64_t n, int64_t columns, const int32_t* limits, float* z,
                                          int64_t ldz, const float* lse) {
  for (int64_t r = 0; r < n; ++r, z += ldz) {
    int64_t c = 0;
    for (; c + VL <= limits[r]; c += VL) {
      const vf x = load(z + c) - lse[r];
      store(z + c, exp_lanes(x > 0.0f ? vf{} : x));
    }
    if (c < limits[r]) {
      const vf x = load(z + c) - lse[r];
      store(z + c, first_lanes(limits[r] - c) ? exp_lanes(x > 0.0f ? vf{} : x) : vf{});
      c += VL;
    }
    for (; c < columns; c += VL) store(z + c, vf{});
  }
}

// ---- dropout ----

struct Dropout {
  int64_t seed = 0;
  uint32_t threshold = 0;
  float scale = 1;  // of what is kept
  bool on = false;

  Dropout(const AttentionProblem& p, const AttentionTensors& t) : on(p.dropout_p > 0) {
    if (on) seed = *t.seed, threshold = dropout_threshold(p.dropout_p), scale = float(1 / (1 - p.dropout_p));
  }
};
// The factors (0 or scale) of VL weights from column j on.
PYSEQNET_INLINE vf keep_lanes(const Dropout& dropout, uint64_t row_key, int64_t j) {
  const vw column = (vw)iota() + (uint32_t(j) + uint32_t(row_key));
  const vw bits = dropout_mix(column, uint32_t(row_key >> 32));
  return bits >= dropout.threshold ? set1(dropout.scale) : vf{};
}
PYSEQNET_NOINLINE void drop_tile(const Dropout& dropout, int64_t first_row, int64_t n, int64_t j0,
                                 int64_t columns, float* z, int64_t ldz) {
  for (int64_t r = 0; r < n; ++r, z += ldz) {
    const uint64_t key = dropout_row_key(dropout.seed, first_row + r);
    for (int64_t c = 0; c < columns; c += VL) store(z + c, load(z + c) * keep_lanes(dropout, key, j0 + c));
  }
}

}  // namespace PYSEQNET_ISA
}  // namespace pyseqnet
