// Softmax attention on the CPU, forward: out, lse and, on request, the weights; float32, bfloat16, float16.
// ISA: +avx512bf16
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
// entirely. With a pattern blocks are its 64 queries and spans its tiles of 64 keys: a chunk walks over the
// tiles that any of its blocks lists, a block computes those in its own list, and of a bit tile a register
// tile computes only the vectors of keys that one of its rows sees. What a row computes depends on the keys it
// sees only: a later token changes no bit of an earlier output. Scratch does not grow with L or S. Bound: FMA,
// 2 (D + E) a visible pair.
#include "attention/attention_tile.h"

namespace pyseqnet {
inline namespace PYSEQNET_ISA {
namespace {

constexpr int64_t SPAN = 256;         // keys a tile sees at once: a multiple of every PANEL
constexpr int64_t LDZ = SPAN + VL;    // not a power of two, lest the rows fall into few cache sets
constexpr int64_t CHUNK = 4 * BLOCK;  // rows that repay packing the keys again
constexpr int64_t WANTED_ITEMS = 8;   // where there are fewer, chunks are cut down to a block
static_assert(CHUNK % block_tile == 0 && BLOCK >= block_tile && SPAN >= block_tile);

int64_t block_rows(const AttentionProblem& p) { return p.with_blocks ? block_tile : BLOCK; }
int64_t span_of(const AttentionProblem& p) { return p.with_blocks ? block_tile : SPAN; }

// Queries of a chunk: each comes once a query head.
struct Chunks {
  int64_t rows, count;
};
Chunks chunks_of(const AttentionProblem& p) {
  const int64_t block = block_rows(p);
  int64_t rows = larger(CHUNK / p.group() / block, 1) * block;
  while (rows > block && p.B * p.Hk * ((p.L + rows - 1) / rows) < WANTED_ITEMS) rows -= block;
  return {rows, (p.L + rows - 1) / rows};
}
// Chunks of a causal problem cost more towards the end: early and late ones alternate, so that halves are
// equal.
int64_t balanced(int64_t c, int64_t count) { return c % 2 ? count - 1 - c / 2 : c / 2; }

struct Item {
  AttentionSequence at;
  int64_t hk, i0, i1, seen;  // key head, queries, keys that they see at most
};
Item item_of(const AttentionProblem& p, const AttentionTensors& t, int64_t k) {
  const Chunks chunks = chunks_of(p);
  Item item;
  item.at = sequence_of(p, t, k / chunks.count / p.Hk);
  item.i0 = balanced(k % chunks.count, chunks.count) * chunks.rows;
  item.i1 = larger(smaller(item.i0 + chunks.rows, item.at.L), item.i0);
  item.hk = k / chunks.count % p.Hk;
  item.seen = item.i1 > item.i0 ? visible_to(p, item.at, item.i1 - 1) : 0;
  return item;
}

// One block of queries on its way through the keys.
struct Block {
  int64_t h, q0, n;  // query head, first query, queries
  float *q, *out, *largest, *sums;
  int32_t* cursor;  // in the list of a pattern
};

struct Scratch {
  float *panels, *values, *rows, *z, *q, *out, *largest, *sums;  // panels, values, rows, q: words
  int32_t* cursors;
  int64_t block_stride;  // rows from block to block
  Scratch(Carver& carve, const AttentionProblem& p, bool with_values)
      : block_stride(round_up(block_rows(p), ROWS)) {
    const int64_t padded_e = round_up(p.E, VL);
    const int64_t blocks =
        p.group() * ((smaller(chunks_of(p).rows, p.L) + block_rows(p) - 1) / block_rows(p));
    const int64_t waiting = blocks * block_stride, span = smaller(span_of(p), round_up(p.S, PANEL));
    panels = carve.take<float>(span * words_of(p.D));
    rows = carve.take<float>(PANEL * row_words(larger(p.D, p.E)));
    z = carve.take<float>(ROWS * LDZ);
    q = carve.take<float>(waiting * row_words(p.D));
    largest = carve.take<float>(waiting);
    cursors = carve.take<int32_t>(blocks);
    sums = carve.take<float>(with_values ? waiting * VL : 0);
    values = carve.take<float>(with_values ? words_of(span) * padded_e : 0);
    out = carve.take<float>(with_values ? waiting * padded_e : 0);
  }
};

// Calls f(block) for every block of an item.
template <class F>
PYSEQNET_INLINE void for_blocks(const AttentionProblem& p, const Item& item, const Scratch& s, F&& f) {
  const int64_t step = block_rows(p);
  int64_t row = 0, k = 0;
  for (int64_t h = item.hk * p.group(); h < (item.hk + 1) * p.group(); ++h)
    for (int64_t q0 = item.i0; q0 < item.i1; q0 += step, row += s.block_stride, ++k)
      f(Block{h, q0, smaller(step, item.i1 - q0), s.q + row * row_words(p.D), s.out + row * round_up(p.E, VL),
              s.largest + row, s.sums + row * VL, s.cursors + k});
}

// ---- a pattern's lists ----

void begin_lists(const AttentionProblem& p, const AttentionTensors& t, const Item& item, const Scratch& s) {
  if (!p.with_blocks) return;
  for_blocks(p, item, s, [&](const Block& block) {
    *block.cursor = t.blocks.row_begin[block_row(p, block.h, block.q0)];
  });
}
// The block's entry for the keys from j0 on, which must not fall from call to call; null where it has none.
const AttentionBlockEntry* entry_of(const AttentionProblem& p, const AttentionTensors& t, const Block& block,
                                    int64_t j0, bool or_later = false) {
  const int32_t end = t.blocks.row_begin[block_row(p, block.h, block.q0) + 1];
  const AttentionBlockEntry* entries = t.blocks.row_entries;
  while (*block.cursor < end && entries[*block.cursor].tile < j0 / block_tile) ++*block.cursor;
  if (*block.cursor == end) return nullptr;
  const AttentionBlockEntry* entry = entries + *block.cursor;
  return or_later || entry->tile == j0 / block_tile ? entry : nullptr;
}
// The first span of keys from j0 on that a block sees.
int64_t next_span(const AttentionProblem& p, const AttentionTensors& t, const Item& item, const Scratch& s,
                  int64_t j0) {
  if (!p.with_blocks) return j0;
  int64_t next = item.seen;
  for_blocks(p, item, s, [&](const Block& block) {
    const AttentionBlockEntry* entry = entry_of(p, t, block, j0, true);
    if (entry) next = smaller(next, entry->tile * block_tile);
  });
  return next;
}
// Whether a block meets the span from j0 on, and the bit tile that goes with it.
bool meets(const AttentionProblem& p, const AttentionTensors& t, const Item& item, const Block& block,
           int64_t j0, const uint64_t** bits) {
  *bits = nullptr;
  if (j0 >= visible_to(p, item.at, block.q0 + block.n - 1)) return false;
  if (!p.with_blocks) return true;
  const AttentionBlockEntry* entry = entry_of(p, t, block, j0);
  if (!entry) return false;
  if (entry->bits != block_full) *bits = t.blocks.bits + entry->bits * block_tile;
  return true;
}

// K of n keys from j0 on as panels.
template <class T>
void pack_key_panels(const AttentionProblem& p, const AttentionTensors& t, const Item& item, int64_t j0,
                     int64_t n, const Scratch& s) {
  const T* keys = static_cast<const T*>(t.k);
  const int64_t words = words_of(p.D);
  if constexpr (sizeof(T) == sizeof(float)) {
    if (!hides_pairs(p))
      return pack_panels(keys + key_offset(p.k_strides, item.at, item.hk, j0), p.k_strides.n, n, p.D,
                         s.panels);
  }
  for (int64_t j = 0; j < n; j += PANEL) {
    const int64_t some = smaller(PANEL, n - j);
    pack_keys(p, t, item.at, keys, p.k_strides, p.D, item.hk, j0 + j, some, item.i0, item.i1, s.rows);
    pack_panels(s.rows, row_words(p.D), some, words, s.panels + j * words);
  }
}
// V of n keys from j0 on, for sums over keys.
template <class T>
void pack_value_words(const AttentionProblem& p, const AttentionTensors& t, const Item& item, int64_t j0,
                      int64_t n, const Scratch& s) {
  const T* values = static_cast<const T*>(t.v);
  if constexpr (PAIR == 1)
    return pack_keys(p, t, item.at, values, p.v_strides, p.E, item.hk, j0, n, item.i0, item.i1, s.values);
  for (int64_t j = 0; j < n; j += PANEL) {
    const int64_t some = smaller(PANEL, n - j);
    pack_keys(p, t, item.at, values, p.v_strides, p.E, item.hk, j0 + j, some, item.i0, item.i1, s.rows);
    pair_rows(s.rows, some, p.E, s.values + words_of(j) * round_up(p.E, VL));
  }
}

// Queries of a block; rows in excess of the last register tile are zero.
template <class T>
void pack_queries(const AttentionProblem& p, const AttentionTensors& t, const Item& item,
                  const Block& block) {
  const T* queries = static_cast<const T*>(t.q) + query_offset(p.q_strides, item.at, block.h, block.q0);
  pack_rows(queries, p.q_strides.n, block.n, p.D, query_scale(p.scale), block.q);
  const int64_t words = row_words(p.D);
  memset(block.q + block.n * words, 0, size_t((round_up(block.n, ROWS) - block.n) * words) * sizeof(float));
}

template <class T>
void write_block(const AttentionProblem& p, const AttentionTensors& t, const Item& item, const Block& block) {
  const int64_t padded = round_up(p.E, VL);
  T* out = static_cast<T*>(t.out) + query_offset(p.out_strides, item.at, block.h, block.q0);
  float* lse = static_cast<float*>(t.lse) + lse_row(item.at, block.h, block.q0);
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
void attend(const AttentionProblem& p, const AttentionTensors& t, const Dropout& dropout, const Item& item,
            const Block& block, int64_t j0, const uint64_t* bits, const Scratch& s) {
  const int64_t padded_e = round_up(p.E, VL), words = row_words(p.D);
  int32_t limits[ROWS];
  float factors[ROWS] = {};
  for (int64_t r0 = 0; r0 < block.n; r0 += ROWS) {
    const int64_t n = smaller(ROWS, block.n - r0), i0 = block.q0 + r0;
    const Columns columns = columns_of(p, item.at, i0, n, j0, span_of(p), bits ? bits + r0 : nullptr, limits);
    const int64_t j = j0 + columns.first;
    if (columns.width == 0 || mask_hides_tile(p, t, item.at, block.h, i0, n, j, limits)) continue;
    const int64_t vectors = (columns.width + VL - 1) / VL;
    multiply_panels(n, words_of(p.D), block.q + r0 * words, words, s.panels, columns.first / VL, vectors, s.z,
                    LDZ, score_scale(p.scale));
    to_logits(p, t, item.at, block.h, i0, n, j, columns, limits, s.z, LDZ);
    softmax_tile(n, vectors * VL, limits, s.z, LDZ, {block.largest + r0, block.sums + r0 * VL}, factors);
    if (dropout.on) drop_tile(dropout, lse_row(item.at, block.h, i0), n, j, vectors * VL, s.z, LDZ);
    if constexpr (PAIR > 1) round_rows(n, vectors * VL, s.z, LDZ, s.z, LDZ);
    accumulate(n, words_of(columns.width), padded_e, s.z, LDZ, s.values + words_of(columns.first) * padded_e,
               block.out + r0 * padded_e, factors);
  }
}

template <class T>
void forward_item(const AttentionProblem& p, const AttentionTensors& t, const Dropout& dropout,
                  const Item& item, const Scratch& s) {
  for_blocks(p, item, s, [&](const Block& block) {
    pack_queries<T>(p, t, item, block);
    memset(block.out, 0, size_t(round_up(block.n, ROWS) * round_up(p.E, VL)) * sizeof(float));
    memset(block.sums, 0, size_t(block.n * VL) * sizeof(float));
    for (int64_t r = 0; r < block.n; ++r) block.largest[r] = -INFINITE;
  });
  begin_lists(p, t, item, s);
  const int64_t span = span_of(p);
  for (int64_t j0 = next_span(p, t, item, s, 0); j0 < item.seen; j0 = next_span(p, t, item, s, j0 + span)) {
    const int64_t keys = smaller(span, item.seen - j0);
    pack_key_panels<T>(p, t, item, j0, keys, s);
    pack_value_words<T>(p, t, item, j0, keys, s);
    for_blocks(p, item, s, [&](const Block& block) {
      const uint64_t* bits;
      if (meets(p, t, item, block, j0, &bits)) attend(p, t, dropout, item, block, j0, bits, s);
    });
  }
  for_blocks(p, item, s, [&](const Block& block) { write_block<T>(p, t, item, block); });
}

// Weights of a block and a span of keys; zero where the span is not seen.
template <class T>
void write_weights(const AttentionProblem& p, const AttentionTensors& t, const Dropout& dropout,
                   const Item& item, const Block& block, int64_t j0, const Scratch& s) {
  const int64_t words = row_words(p.D), keys = smaller(span_of(p), p.S - j0);
  const uint64_t* bits;
  const bool met = meets(p, t, item, block, j0, &bits);
  int32_t limits[ROWS];
  for (int64_t r0 = 0; r0 < block.n; r0 += ROWS) {
    const int64_t n = smaller(ROWS, block.n - r0), i0 = block.q0 + r0;
    Columns columns = {0, 0, nullptr};
    if (met) columns = columns_of(p, item.at, i0, n, j0, keys, bits ? bits + r0 : nullptr, limits);
    if (columns.width == 0)
      for (int64_t r = 0; r < n; ++r) limits[r] = 0;
    const int64_t j = j0 + columns.first, rest = keys - columns.first;
    multiply_panels(n, words_of(p.D), block.q + r0 * words, words, s.panels, columns.first / VL,
                    (columns.width + VL - 1) / VL, s.z, LDZ, score_scale(p.scale));
    to_logits(p, t, item.at, block.h, i0, n, j, columns, limits, s.z, LDZ);
    probabilities_tile(n, rest, limits, s.z, LDZ, block.largest + r0);
    if (dropout.on) drop_tile(dropout, lse_row(item.at, block.h, i0), n, j, rest, s.z, LDZ);
    T* weights = static_cast<T*>(t.weights) + weights_offset(p, item.at, block.h, i0) + j;
    for (int64_t r = 0; r < n; ++r, weights += p.S) {
      if (columns.first > 0) memset(weights - columns.first, 0, size_t(columns.first) * sizeof(T));
      for (int64_t c = 0; c < rest; c += VL) store_lanes_n(weights + c, load(s.z + r * LDZ + c), rest - c);
    }
  }
}

template <class T>
void weights_item(const AttentionProblem& p, const AttentionTensors& t, const Dropout& dropout,
                  const Item& item, const Scratch& s) {
  for_blocks(p, item, s, [&](const Block& block) {
    pack_queries<T>(p, t, item, block);
    const float* lse = static_cast<const float*>(t.lse) + lse_row(item.at, block.h, block.q0);
    for (int64_t r = 0; r < block.n; ++r) block.largest[r] = lse[r] == -INFINITE ? INFINITE : lse[r];
  });
  begin_lists(p, t, item, s);
  const int64_t span = span_of(p);
  int64_t met = next_span(p, t, item, s, 0);
  for (int64_t j0 = 0; j0 < p.S; j0 += span) {
    const bool packed = j0 == met && j0 < item.seen;
    if (packed) pack_key_panels<T>(p, t, item, j0, smaller(span, item.seen - j0), s);
    for_blocks(p, item, s, [&](const Block& block) { write_weights<T>(p, t, dropout, item, block, j0, s); });
    if (packed) met = next_span(p, t, item, s, j0 + span);
  }
  // Rows of the chunk that a shorter sequence does not have.
  const int64_t end = smaller(item.i0 + chunks_of(p).rows, p.L);
  for (int64_t h = item.hk * p.group(); item.i1 < end && h < (item.hk + 1) * p.group(); ++h)
    memset(static_cast<T*>(t.weights) + weights_offset(p, item.at, h, item.i1), 0,
           size_t((end - item.i1) * p.S) * sizeof(T));
}

Refusal refuses(const AttentionProblem& p) { return refuses_factors(p.dtype); }

WorkPlan plan_items(const AttentionProblem& p, bool with_values) {
  constexpr int64_t worth_a_thread = 400000;  // multiplications: about 20 microseconds
  WorkPlan plan;
  const Chunks chunks = chunks_of(p);
  const int64_t work = pairs_of_a_head(p) / larger(chunks.count, 1) * p.group() * (p.D + p.E);
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
  with_factor_element(p.dtype, [&](auto tag) {
    for (int64_t k = slice.begin; k < slice.end; ++k)
      forward_item<decltype(tag)>(p, t, dropout, item_of(p, t, k), s);
  });
}
void run_weights(const AttentionProblem& p, const AttentionTensors& t, const WorkSlice& slice) {
  FlushDenormals guard;
  Carver carve(slice.scratch);
  const Scratch s(carve, p, false);
  const Dropout dropout(p, t);
  with_factor_element(p.dtype, [&](auto tag) {
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
