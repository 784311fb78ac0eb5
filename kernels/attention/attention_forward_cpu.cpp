// Softmax attention on the CPU, forward: out, lse and, on request, the weights; float32, bfloat16, float16.
//
// An item is a chunk of queries of one key/value head (with all query heads that share it). Its keys are
// packed once: K as transposed panels, V as rows. For each block of 96 queries and each span of 256 keys,
// tiles of 12 queries go through three steps that meet in a small buffer in the first-level cache: logits (a
// product of register tiles), masks and online softmax (rolled loops, any mask), and the update of the output
// rows. The buffer costs two vector accesses a logit, some percent, and buys that masks, dropout and tails
// are plain code beside two lean products.
//
// Tiles past the causal diagonal or the key length are never computed, nor those that a boolean mask hides
// entirely. What a row computes depends on the keys it sees only: a later token changes no bit of an earlier
// output. Memory: scratch linear in S. Bound: FMA, 2 (D + E) a visible pair.
#include "attention/attention_tile.h"

namespace pyseqnet {
inline namespace PYSEQNET_ISA {
namespace {

constexpr int64_t SPAN = 256;         // keys a tile sees at once: a multiple of every PANEL
constexpr int64_t LDZ = SPAN + VL;    // not a power of two, lest the rows fall into few cache sets
constexpr int64_t CHUNK = 4 * BLOCK;  // queries that repay packing the keys again
constexpr int64_t WANTED_ITEMS = 8;   // where there are fewer, chunks are cut down to a block

struct Chunks {
  int64_t rows, count;
};
Chunks chunks_of(const AttentionProblem& p) {
  int64_t rows = CHUNK;
  while (rows > BLOCK && p.B * p.Hk * ((p.L + rows - 1) / rows) < WANTED_ITEMS) rows -= BLOCK;
  return {rows, (p.L + rows - 1) / rows};
}
// Chunks of a causal problem cost more towards the end: early and late ones alternate, so that halves are
// equal.
int64_t balanced(int64_t c, int64_t count) { return c % 2 ? count - 1 - c / 2 : c / 2; }

struct Item {
  int64_t b, hk, i0, i1, length, seen;
};
Item item_of(const AttentionProblem& p, const AttentionTensors& t, int64_t k) {
  const Chunks chunks = chunks_of(p);
  Item item;
  item.i0 = balanced(k % chunks.count, chunks.count) * chunks.rows;
  item.i1 = smaller(item.i0 + chunks.rows, p.L);
  item.hk = k / chunks.count % p.Hk, item.b = k / chunks.count / p.Hk;
  item.length = length_of(p, t, item.b);
  item.seen = visible_keys(p.causal, p.causal_offset, item.length, item.i1 - 1);
  return item;
}

struct Scratch {
  float *panels, *values, *rows, *q, *out, *z, *largest, *sums;
  Scratch(Carver& carve, const AttentionProblem& p, bool with_values) {
    const int64_t padded_d = round_up(p.D, VL), padded_e = round_up(p.E, VL);
    panels = carve.take<float>(round_up(p.S, PANEL) * p.D);
    rows = carve.take<float>(PANEL * padded_d);
    q = carve.take<float>(BLOCK * padded_d);
    z = carve.take<float>(ROWS * LDZ);
    largest = carve.take<float>(BLOCK);
    sums = carve.take<float>(BLOCK * VL);
    values = with_values ? carve.take<float>(p.S * padded_e) : nullptr;
    out = with_values ? carve.take<float>(BLOCK * padded_e) : nullptr;
  }
};

template <class T>
void pack_key_panels(const AttentionProblem& p, const AttentionTensors& t, const Item& at, const Scratch& s) {
  const T* keys = static_cast<const T*>(t.k);
  if constexpr (sizeof(T) == sizeof(float)) {
    if (p.mask == AttentionMask::none)
      return pack_panels(keys + at.b * p.k_strides.b + at.hk * p.k_strides.h, p.k_strides.n, at.seen, p.D,
                         s.panels);
  }
  for (int64_t j = 0; j < at.seen; j += PANEL) {
    const int64_t n = smaller(PANEL, at.seen - j);
    pack_keys(p, t, keys, p.k_strides, p.D, at.b, at.hk, j, n, at.i0, at.i1, s.rows);
    pack_panels(s.rows, round_up(p.D, VL), n, p.D, s.panels + j * p.D);
  }
}

// Scaled queries of a block; rows in excess of the last register tile are zero.
template <class T>
void pack_queries(const AttentionProblem& p, const AttentionTensors& t, int64_t b, int64_t h, int64_t i0,
                  int64_t n, float* q) {
  const T* queries = static_cast<const T*>(t.q) + b * p.q_strides.b + h * p.q_strides.h + i0 * p.q_strides.n;
  pack_rows(queries, p.q_strides.n, n, p.D, float(p.scale), q);
  const int64_t padded = round_up(p.D, VL);
  memset(q + n * padded, 0, size_t((round_up(n, ROWS) - n) * padded) * sizeof(float));
}

template <class T>
void write_block(const AttentionProblem& p, const AttentionTensors& t, int64_t b, int64_t h, int64_t i0,
                 int64_t n, const Scratch& s) {
  const int64_t padded = round_up(p.E, VL);
  T* out = static_cast<T*>(t.out) + b * p.out_strides.b + h * p.out_strides.h + i0 * p.out_strides.n;
  float* lse = static_cast<float*>(t.lse) + (b * p.H + h) * p.L + i0;
  alignas(64) float inverse[BLOCK];
  for (int64_t r = 0; r < n; r += VL) {
    vf sums[VL];
#pragma GCC unroll 16
    for (int l = 0; l < VL; ++l) sums[l] = load(s.sums + (r + l) * VL);
    transpose(sums);
    vf sum = sums[0];
#pragma GCC unroll 16
    for (int l = 1; l < VL; ++l) sum += sums[l];
    const vf largest = load(s.largest + r), origin = largest == -INFINITE ? vf{} : largest;
    const vf logarithm = log2v(sum) * LN2 + (sum - sum);  // of a NaN, NaN
    store(inverse + r, sum == 0.0f ? vf{} : 1.0f / sum);
    store_n(lse + r, sum == 0.0f ? set1(-INFINITE) : origin + logarithm, int(smaller(n - r, VL)));
  }
  for (int64_t r = 0; r < n; ++r, out += p.out_strides.n)
    for (int64_t e = 0; e < p.E; e += VL)
      store_lanes_n(out + e, load(s.out + r * padded + e) * inverse[r], p.E - e);
}

template <class T>
void forward_item(const AttentionProblem& p, const AttentionTensors& t, const Dropout& dropout,
                  const Item& at, const Scratch& s) {
  const int64_t padded_d = round_up(p.D, VL), padded_e = round_up(p.E, VL);
  pack_key_panels<T>(p, t, at, s);
  pack_keys(p, t, static_cast<const T*>(t.v), p.v_strides, p.E, at.b, at.hk, 0, at.seen, at.i0, at.i1,
            s.values);
  int32_t limits[ROWS];
  float factors[ROWS] = {};
  for (int64_t h = at.hk * p.group(); h < (at.hk + 1) * p.group(); ++h)
    for (int64_t q0 = at.i0; q0 < at.i1; q0 += BLOCK) {
      const int64_t nq = smaller(BLOCK, at.i1 - q0);
      pack_queries<T>(p, t, at.b, h, q0, nq, s.q);
      memset(s.out, 0, size_t(round_up(nq, ROWS) * padded_e) * sizeof(float));
      memset(s.sums, 0, size_t(nq * VL) * sizeof(float));
      for (int64_t r = 0; r < nq; ++r) s.largest[r] = -INFINITE;
      const int64_t end = visible_keys(p.causal, p.causal_offset, at.length, q0 + nq - 1);
      for (int64_t j0 = 0; j0 < end; j0 += SPAN)
        for (int64_t r0 = 0; r0 < nq; r0 += ROWS) {
          const int64_t n = smaller(ROWS, nq - r0), i0 = q0 + r0;
          const int64_t width = set_limits(p, at.length, i0, n, j0, SPAN, limits);
          if (width == 0 || mask_hides_tile(p, t, at.b, h, i0, n, j0, limits)) continue;
          const int64_t vectors = (width + VL - 1) / VL, columns = vectors * VL;
          multiply_panels(n, p.D, s.q + r0 * padded_d, padded_d, s.panels + j0 * p.D, vectors, s.z, LDZ);
          apply_mask(p, t, at.b, h, i0, n, j0, limits, s.z, LDZ);
          softmax_tile(n, columns, limits, s.z, LDZ, {s.largest + r0, s.sums + r0 * VL}, factors);
          if (dropout.on) drop_tile(dropout, (at.b * p.H + h) * p.L + i0, n, j0, columns, s.z, LDZ);
          accumulate(n, width, padded_e, s.z, LDZ, s.values + j0 * padded_e, s.out + r0 * padded_e, factors);
        }
      write_block<T>(p, t, at.b, h, q0, nq, s);
    }
}

template <class T>
void weights_item(const AttentionProblem& p, const AttentionTensors& t, const Dropout& dropout,
                  const Item& at, const Scratch& s) {
  const int64_t padded_d = round_up(p.D, VL);
  pack_key_panels<T>(p, t, at, s);
  int32_t limits[ROWS];
  for (int64_t h = at.hk * p.group(); h < (at.hk + 1) * p.group(); ++h)
    for (int64_t q0 = at.i0; q0 < at.i1; q0 += BLOCK) {
      const int64_t nq = smaller(BLOCK, at.i1 - q0), first = (at.b * p.H + h) * p.L + q0;
      pack_queries<T>(p, t, at.b, h, q0, nq, s.q);
      for (int64_t r = 0; r < nq; ++r) {
        const float lse = static_cast<const float*>(t.lse)[first + r];
        s.largest[r] = lse == -INFINITE ? INFINITE : lse;
      }
      for (int64_t j0 = 0; j0 < p.S; j0 += SPAN)
        for (int64_t r0 = 0; r0 < nq; r0 += ROWS) {
          const int64_t n = smaller(ROWS, nq - r0), whole = smaller(SPAN, p.S - j0);
          const int64_t width = set_limits(p, at.length, q0 + r0, n, j0, SPAN, limits);
          const int64_t vectors = (width + VL - 1) / VL;
          multiply_panels(n, p.D, s.q + r0 * padded_d, padded_d, s.panels + j0 * p.D, vectors, s.z, LDZ);
          apply_mask(p, t, at.b, h, q0 + r0, n, j0, limits, s.z, LDZ);
          probabilities_tile(n, whole, limits, s.z, LDZ, s.largest + r0);
          if (dropout.on) drop_tile(dropout, first + r0, n, j0, whole, s.z, LDZ);
          T* weights = static_cast<T*>(t.weights) + (first + r0) * p.S + j0;
          for (int64_t r = 0; r < n; ++r)
            for (int64_t c = 0; c < whole; c += VL)
              store_lanes_n(weights + r * p.S + c, load(s.z + r * LDZ + c), whole - c);
        }
    }
}

Refusal refuses(const AttentionProblem& p) {
  if (p.dtype == DType::f64) return "float64 is left to the reference";
  return accepted;
}

WorkPlan plan_items(const AttentionProblem& p, bool with_values) {
  constexpr int64_t worth_a_thread = 400000;  // multiplications: about 20 microseconds
  WorkPlan plan;
  const Chunks chunks = chunks_of(p);
  const int64_t work = smaller(chunks.rows, p.L) * p.group() * p.S * (p.D + p.E);
  plan.add_phase(p.B * p.Hk * chunks.count, work < worth_a_thread ? worth_a_thread / (work + 1) + 1 : 1);
  Carver carve(nullptr);
  Scratch(carve, p, with_values);
  plan.thread_bytes = carve.used();
  return plan;
}
WorkPlan plan_forward(const AttentionProblem& p) { return plan_items(p, true); }
WorkPlan plan_weights(const AttentionProblem& p) { return plan_items(p, false); }

void run_forward(const AttentionProblem& p, const AttentionTensors& t, const WorkSlice& slice) {
  FlushDenormals guard;
  Carver carve(slice.scratch);
  const Scratch s(carve, p, true);
  const Dropout dropout(p, t);
  with_element(p.dtype, [&](auto tag) {
    for (int64_t k = slice.begin; k < slice.end; ++k)
      forward_item<decltype(tag)>(p, t, dropout, item_of(p, t, k), s);
  });
}
void run_weights(const AttentionProblem& p, const AttentionTensors& t, const WorkSlice& slice) {
  FlushDenormals guard;
  Carver carve(slice.scratch);
  const Scratch s(carve, p, false);
  const Dropout dropout(p, t);
  with_element(p.dtype, [&](auto tag) {
    for (int64_t k = slice.begin; k < slice.end; ++k)
      weights_item<decltype(tag)>(p, t, dropout, item_of(p, t, k), s);
  });
}

}  // namespace

extern const AttentionCpuKernel attention_tile_forward, attention_tile_weights;
const AttentionCpuKernel attention_tile_forward = {"tile_" PYSEQNET_ISA_NAME, this_isa, refuses, plan_forward,
                                                   run_forward};
const AttentionCpuKernel attention_tile_weights = {"tile_" PYSEQNET_ISA_NAME, this_isa, refuses, plan_weights,
                                                   run_weights};

}  // namespace PYSEQNET_ISA
}  // namespace pyseqnet
