// Softmax attention on the CPU, forward: out, lse and, on request, the weights; float32, bfloat16, float16.
//
// An item is a chunk of queries of one key/value head, with all query heads that share it. Their rows and
// sums wait in scratch while spans of 256 keys go by: a span is packed once (K as transposed panels, V as
// rows) and stays in the second-level cache while blocks of 96 queries meet it. Tiles of 12 queries go
// through three steps that share a small buffer in the first-level cache: logits (a product of register
// tiles), masks and online softmax (rolled loops, any mask), and the update of the output rows. The buffer
// costs two vector accesses a logit, some percent, and buys that masks, dropout and tails are plain code
// beside two lean products.
//
// Tiles past the causal diagonal or the key length are never computed, nor those that a boolean mask hides
// entirely. What a row computes depends on the keys it sees only: a later token changes no bit of an earlier
// output. Scratch does not grow with L or S. Bound: FMA, 2 (D + E) a visible pair.
#include "attention/attention_tile.h"

namespace pyseqnet {
inline namespace PYSEQNET_ISA {
namespace {

constexpr int64_t SPAN = 256;         // keys a tile sees at once: a multiple of every PANEL
constexpr int64_t LDZ = SPAN + VL;    // not a power of two, lest the rows fall into few cache sets
constexpr int64_t CHUNK = 4 * BLOCK;  // rows that repay packing the keys again
constexpr int64_t WANTED_ITEMS = 8;   // where there are fewer, chunks are cut down to a block

// Queries of a chunk: each comes once a query head.
struct Chunks {
  int64_t rows, count;
};
Chunks chunks_of(const AttentionProblem& p) {
  int64_t rows = larger(CHUNK / p.group() / BLOCK, 1) * BLOCK;
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

// One block of queries on its way through the keys.
struct Block {
  int64_t h, q0, n;  // query head, first query, queries
  float *q, *out, *largest, *sums;
};

struct Scratch {
  float *panels, *values, *rows, *z, *q, *out, *largest, *sums;
  Scratch(Carver& carve, const AttentionProblem& p, bool with_values) {
    const int64_t padded_d = round_up(p.D, VL), padded_e = round_up(p.E, VL);
    const int64_t waiting = p.group() * smaller(chunks_of(p).rows, round_up(p.L, BLOCK));
    const int64_t span = smaller(SPAN, round_up(p.S, PANEL));
    panels = carve.take<float>(span * p.D);
    rows = carve.take<float>(PANEL * padded_d);
    z = carve.take<float>(ROWS * LDZ);
    q = carve.take<float>(waiting * padded_d);
    largest = carve.take<float>(waiting);
    sums = carve.take<float>(with_values ? waiting * VL : 0);
    values = carve.take<float>(with_values ? span * padded_e : 0);
    out = carve.take<float>(with_values ? waiting * padded_e : 0);
  }
};

// Calls f(block) for every block of an item.
template <class F>
PYSEQNET_INLINE void for_blocks(const AttentionProblem& p, const Item& at, const Scratch& s, F&& f) {
  int64_t row = 0;
  for (int64_t h = at.hk * p.group(); h < (at.hk + 1) * p.group(); ++h)
    for (int64_t q0 = at.i0; q0 < at.i1; q0 += BLOCK, row += BLOCK)
      f(Block{h, q0, smaller(BLOCK, at.i1 - q0), s.q + row * round_up(p.D, VL),
              s.out + row * round_up(p.E, VL), s.largest + row, s.sums + row * VL});
}

// K of n keys from j0 on as panels.
template <class T>
void pack_key_panels(const AttentionProblem& p, const AttentionTensors& t, const Item& at, int64_t j0,
                     int64_t n, const Scratch& s) {
  const T* keys = static_cast<const T*>(t.k);
  if constexpr (sizeof(T) == sizeof(float)) {
    if (p.mask == AttentionMask::none)
      return pack_panels(keys + at.b * p.k_strides.b + at.hk * p.k_strides.h + j0 * p.k_strides.n,
                         p.k_strides.n, n, p.D, s.panels);
  }
  for (int64_t j = 0; j < n; j += PANEL) {
    const int64_t some = smaller(PANEL, n - j);
    pack_keys(p, t, keys, p.k_strides, p.D, at.b, at.hk, j0 + j, some, at.i0, at.i1, s.rows);
    pack_panels(s.rows, round_up(p.D, VL), some, p.D, s.panels + j * p.D);
  }
}

// Scaled queries of a block; rows in excess of the last register tile are zero.
template <class T>
void pack_queries(const AttentionProblem& p, const AttentionTensors& t, int64_t b, const Block& block) {
  const T* queries = static_cast<const T*>(t.q) + b * p.q_strides.b + block.h * p.q_strides.h;
  pack_rows(queries + block.q0 * p.q_strides.n, p.q_strides.n, block.n, p.D, float(p.scale), block.q);
  const int64_t padded = round_up(p.D, VL);
  memset(block.q + block.n * padded, 0, size_t((round_up(block.n, ROWS) - block.n) * padded) * sizeof(float));
}

template <class T>
void write_block(const AttentionProblem& p, const AttentionTensors& t, int64_t b, const Block& block) {
  const int64_t padded = round_up(p.E, VL);
  T* out =
      static_cast<T*>(t.out) + b * p.out_strides.b + block.h * p.out_strides.h + block.q0 * p.out_strides.n;
  float* lse = static_cast<float*>(t.lse) + (b * p.H + block.h) * p.L + block.q0;
  alignas(64) float inverse[BLOCK];
  for (int64_t r = 0; r < block.n; r += VL) {
    vf sums[VL];
#pragma GCC unroll 16
    for (int l = 0; l < VL; ++l) sums[l] = load(block.sums + (r + l) * VL);
    transpose(sums);
    vf sum = sums[0];
#pragma GCC unroll 16
    for (int l = 1; l < VL; ++l) sum += sums[l];
    const vf largest = load(block.largest + r), origin = largest == -INFINITE ? vf{} : largest;
    const vf logarithm = log2v(sum) * LN2 + (sum - sum);  // of a NaN, NaN
    store(inverse + r, sum == 0.0f ? vf{} : 1.0f / sum);
    store_n(lse + r, sum == 0.0f ? set1(-INFINITE) : origin + logarithm, int(smaller(block.n - r, VL)));
  }
  for (int64_t r = 0; r < block.n; ++r, out += p.out_strides.n)
    for (int64_t e = 0; e < p.E; e += VL)
      store_lanes_n(out + e, load(block.out + r * padded + e) * inverse[r], p.E - e);
}

// A block meets the packed span of keys from j0 on.
void attend(const AttentionProblem& p, const AttentionTensors& t, const Dropout& dropout, const Item& at,
            const Block& block, int64_t j0, const Scratch& s) {
  const int64_t padded_d = round_up(p.D, VL), padded_e = round_up(p.E, VL);
  int32_t limits[ROWS];
  float factors[ROWS] = {};
  for (int64_t r0 = 0; r0 < block.n; r0 += ROWS) {
    const int64_t n = smaller(ROWS, block.n - r0), i0 = block.q0 + r0;
    const int64_t width = set_limits(p, at.length, i0, n, j0, SPAN, limits);
    if (width == 0 || mask_hides_tile(p, t, at.b, block.h, i0, n, j0, limits)) continue;
    const int64_t vectors = (width + VL - 1) / VL, columns = vectors * VL;
    multiply_panels(n, p.D, block.q + r0 * padded_d, padded_d, s.panels, vectors, s.z, LDZ);
    apply_mask(p, t, at.b, block.h, i0, n, j0, limits, s.z, LDZ);
    softmax_tile(n, columns, limits, s.z, LDZ, {block.largest + r0, block.sums + r0 * VL}, factors);
    if (dropout.on) drop_tile(dropout, (at.b * p.H + block.h) * p.L + i0, n, j0, columns, s.z, LDZ);
    accumulate(n, width, padded_e, s.z, LDZ, s.values, block.out + r0 * padded_e, factors);
  }
}

template <class T>
void forward_item(const AttentionProblem& p, const AttentionTensors& t, const Dropout& dropout,
                  const Item& at, const Scratch& s) {
  for_blocks(p, at, s, [&](const Block& block) {
    pack_queries<T>(p, t, at.b, block);
    memset(block.out, 0, size_t(round_up(block.n, ROWS) * round_up(p.E, VL)) * sizeof(float));
    memset(block.sums, 0, size_t(block.n * VL) * sizeof(float));
    for (int64_t r = 0; r < block.n; ++r) block.largest[r] = -INFINITE;
  });
  for (int64_t j0 = 0; j0 < at.seen; j0 += SPAN) {
    const int64_t keys = smaller(SPAN, at.seen - j0);
    pack_key_panels<T>(p, t, at, j0, keys, s);
    pack_keys(p, t, static_cast<const T*>(t.v), p.v_strides, p.E, at.b, at.hk, j0, keys, at.i0, at.i1,
              s.values);
    for_blocks(p, at, s, [&](const Block& block) {
      if (j0 < visible_keys(p.causal, p.causal_offset, at.length, block.q0 + block.n - 1))
        attend(p, t, dropout, at, block, j0, s);
    });
  }
  for_blocks(p, at, s, [&](const Block& block) { write_block<T>(p, t, at.b, block); });
}

// Weights of a block and a span of keys; zero where the span is not seen.
template <class T>
void write_weights(const AttentionProblem& p, const AttentionTensors& t, const Dropout& dropout,
                   const Item& at, const Block& block, int64_t j0, const Scratch& s) {
  const int64_t padded_d = round_up(p.D, VL), keys = smaller(SPAN, p.S - j0);
  int32_t limits[ROWS];
  for (int64_t r0 = 0; r0 < block.n; r0 += ROWS) {
    const int64_t n = smaller(ROWS, block.n - r0), i0 = block.q0 + r0,
                  row = (at.b * p.H + block.h) * p.L + i0;
    const int64_t width = set_limits(p, at.length, i0, n, j0, SPAN, limits);
    multiply_panels(n, p.D, block.q + r0 * padded_d, padded_d, s.panels, (width + VL - 1) / VL, s.z, LDZ);
    apply_mask(p, t, at.b, block.h, i0, n, j0, limits, s.z, LDZ);
    probabilities_tile(n, keys, limits, s.z, LDZ, block.largest + r0);
    if (dropout.on) drop_tile(dropout, row, n, j0, keys, s.z, LDZ);
    T* weights = static_cast<T*>(t.weights) + row * p.S + j0;
    for (int64_t r = 0; r < n; ++r)
      for (int64_t c = 0; c < keys; c += VL)
        store_lanes_n(weights + r * p.S + c, load(s.z + r * LDZ + c), keys - c);
  }
}

template <class T>
void weights_item(const AttentionProblem& p, const AttentionTensors& t, const Dropout& dropout,
                  const Item& at, const Scratch& s) {
  for_blocks(p, at, s, [&](const Block& block) {
    pack_queries<T>(p, t, at.b, block);
    const float* lse = static_cast<const float*>(t.lse) + (at.b * p.H + block.h) * p.L + block.q0;
    for (int64_t r = 0; r < block.n; ++r) block.largest[r] = lse[r] == -INFINITE ? INFINITE : lse[r];
  });
  for (int64_t j0 = 0; j0 < p.S; j0 += SPAN) {
    if (j0 < at.seen) pack_key_panels<T>(p, t, at, j0, smaller(SPAN, at.seen - j0), s);
    for_blocks(p, at, s, [&](const Block& block) { write_weights<T>(p, t, dropout, at, block, j0, s); });
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
