// Softmax attention on the CPU, backward: gradients of query, key and value; float32, bfloat16, float16.
// ISA: +avx512bf16
//
// An item is a run of keys of one key/value head. Tiles of 96 keys are the outer loop, blocks of 96 queries
// (of every query head that shares the keys) the inner one. Five products a pair of tiles: logits and the
// gradient of the weights in 12-row register tiles, which the softmax's gradient turns into P and dZ in
// second-level cache; then gq += dZ K row by row, and gv += P^T gout, gk += dZ^T q reading P and dZ
// key-major. The accumulators of keys stay in cache for a whole tile of keys, those of queries in scratch.
//
// Nothing is shared between items but gq. A problem with few heads splits its keys into up to four runs; each
// then sums a gq of its own, and a second phase adds them in order: deterministic, and no workspace grows
// with L x S.
//
// With a pattern both kinds of tile are its 64 positions, and a tile of keys meets the blocks that its list
// names. Of a bit tile the row products compute the vectors of keys that one row of a register tile sees, and
// the key products the rows between the first and the last that see one of their keys.
//
// Bound: FMA, 6 D + 4 E a visible pair.
#include "attention/attention_gradient_tile.h"

namespace pyseqnet {
inline namespace PYSEQNET_ISA {
namespace {

constexpr int64_t MOST_RUNS = 4, RUN = 2 * KEYS, WANTED_ITEMS = 8;

int64_t tile_keys(const AttentionProblem& p) { return p.with_blocks ? block_tile : KEYS; }

template <class T>
void write_rows(T* dst, int64_t stride, int64_t n, int64_t width, float scale, const float* src) {
  const int64_t padded = round_up(width, VL);
  for (int64_t i = 0; i < n; ++i, dst += stride, src += padded)
    for (int64_t d = 0; d < width; d += VL) store_lanes_n(dst + d, load(src + d) * scale, width - d);
}

struct Runs {
  int64_t keys, count;
};
Runs runs_of(const AttentionProblem& p) {
  const int64_t heads = larger(p.B * p.Hk, 1),
                wanted = smaller((WANTED_ITEMS + heads - 1) / heads, MOST_RUNS);
  const int64_t most = larger(p.S / RUN, 1), count = smaller(wanted, most);
  const int64_t keys = round_up(larger((p.S + count - 1) / count, 1), tile_keys(p));
  return {keys, larger((p.S + keys - 1) / keys, 1)};
}
// Under a causal mask early keys cost most: early and late runs alternate, so that halves are equal.
int64_t balanced(int64_t c, int64_t count) { return c % 2 ? count - 1 - c / 2 : c / 2; }

int64_t padded_queries(const AttentionProblem& p) { return round_up(p.L, ROWS); }
int64_t query_sums(const AttentionProblem& p) {  // floats of gq of one head
  return padded_queries(p) * round_up(p.D, VL);
}

// Blocks of queries that stay packed while the tiles of keys go by: all of an item's, or, where they are many or
// meet one tile only, one at a time.
int64_t blocks_of(const AttentionProblem& p) { return (p.L + block_rows(p) - 1) / block_rows(p); }
int64_t slots_of(const AttentionProblem& p) {
  constexpr int64_t most_floats = 1 << 19;  // two second-level caches
  const int64_t blocks = p.group() * blocks_of(p);
  const bool fit = blocks * BLOCK * (p.D + p.E) <= most_floats && p.S > tile_keys(p);
  return fit ? larger(blocks, 1) : 1;
}

struct Scratch {
  KeyTile tile;
  QueryBlock block;
  float *gk, *gv, *gq;
  float* gradient_words;  // dZ of a register tile for the sum over keys, where words are not floats
  uint8_t* packed;        // whether a slot's block is, or null: nothing stays packed
  Scratch(Carver& carve, const AttentionProblem& p)
      : tile(carve, p),
        block(carve, p, slots_of(p)),
        gk(carve.take<float>(KEYS * round_up(p.D, VL))),
        gv(carve.take<float>(KEYS * round_up(p.E, VL))),
        gq(carve.take<float>(p.need_q && runs_of(p).count == 1 ? p.group() * query_sums(p) : 0)),
        gradient_words(PAIR == 1 ? nullptr : carve.take<float>(ROWS * words_of(KEYS))),
        packed(slots_of(p) > 1 ? carve.take<uint8_t>(slots_of(p)) : nullptr) {}
};

// The rows of a block that the products by key have to sum over: register tiles of rows (r0 / ROWS) and the
// columns that they computed.
struct RowsSeen {
  int64_t begin[BLOCK / ROWS], end[BLOCK / ROWS];

  // First and past the last row whose columns touch [c, c + ROWS), of n rows.
  void range(int64_t c, int64_t n, int64_t& from, int64_t& to) const {
    from = n, to = 0;
    for (int64_t r0 = 0; r0 < n; r0 += ROWS) {
      if (end[r0 / ROWS] <= c || begin[r0 / ROWS] >= c + ROWS) continue;
      from = smaller(from, r0), to = smaller(r0 + ROWS, n);
    }
  }
};

// gq += dZ K for a register tile of rows.
void add_query_gradients(int64_t rows, const Columns& columns, int64_t padded_d, const float* gradients,
                         const Scratch& s, float* gq) {
  const float* words = gradients + columns.first;
  int64_t ldw = KEYS;
  if constexpr (PAIR > 1) {
    words = s.gradient_words, ldw = words_of(KEYS);
    round_rows(rows, round_up(columns.width, VL), gradients + columns.first, KEYS, s.gradient_words, ldw);
  }
  accumulate(rows, words_of(columns.width), padded_d, words, ldw,
             s.tile.row_pairs + words_of(columns.first) * padded_d, gq, nullptr);
}

// The block of a pair, packed now or before.
template <class T>
QueryBlock packed_block(const AttentionProblem& p, const AttentionTensors& t, const AttentionSequence& at,
                        const Pair& pair, const Scratch& s) {
  const int64_t slot = s.packed ? pair.h % p.group() * blocks_of(p) + pair.i0 / block_rows(p) : 0;
  const QueryBlock block = s.block.in_slot(p, slot);
  if (s.packed && s.packed[slot]) return block;
  pack_query_block<T>(p, t, at, pair.h, pair.i0, pair.n, block);
  if (PAIR > 1 && p.need_kv) {
    pair_rows(block.q, pair.n, p.D, block.q_pairs);
    pair_rows(block.gout, pair.n, p.E, block.gout_pairs);
  }
  if (s.packed) s.packed[slot] = 1;
  return block;
}

// Adds what the queries of one block say about a tile of keys.
template <class T>
void backward_block(const AttentionProblem& p, const AttentionTensors& t, const Dropout& dropout,
                    const AttentionSequence& at, const Pair& pair, const Scratch& s, float* gq) {
  const int64_t padded_d = round_up(p.D, VL), padded_e = round_up(p.E, VL);
  const QueryBlock block = packed_block<T>(p, t, at, pair, s);
  RowsSeen seen;
  for (int64_t r0 = 0; r0 < pair.n; r0 += ROWS) {
    const int64_t rows = smaller(ROWS, pair.n - r0);
    const Columns columns = gradient_tile<T>(p, t, dropout, at, pair, r0, rows, s.tile, block, false);
    seen.begin[r0 / ROWS] = columns.first, seen.end[r0 / ROWS] = columns.first + columns.width;
    if (columns.width == 0) continue;
    float *weights = block.probabilities + r0 * KEYS, *gradients = block.gradients + r0 * KEYS;
    if (p.need_q) add_query_gradients(rows, columns, padded_d, gradients, s, gq + (pair.i0 + r0) * padded_d);
    if (PAIR > 1 && p.need_kv) {
      round_row_pairs(rows, round_up(pair.keys, VL), weights, KEYS);
      round_row_pairs(rows, round_up(pair.keys, VL), gradients, KEYS);
    }
  }
  if (!p.need_kv) return;
  for (int64_t c = 0; c < pair.keys; c += ROWS) {
    int64_t from, to;
    seen.range(c, pair.n, from, to);
    // Rows above the causal diagonal see none of these keys.
    if (p.causal) from = larger(from, (pair.j0 + c - at.causal_offset - pair.i0) / PAIR * PAIR);
    if (from >= to) continue;
    const int64_t rows = smaller(ROWS, pair.keys - c), words = words_of(to - from);
    accumulate_transposed(rows, words, padded_e, block.probabilities + from * KEYS + c, PAIR * KEYS,
                          block.gout_pairs + from / PAIR * padded_e, s.gv + c * padded_e);
    accumulate_transposed(rows, words, padded_d, block.gradients + from * KEYS + c, PAIR * KEYS,
                          block.q_pairs + from / PAIR * padded_d, s.gk + c * padded_d);
  }
}

// Calls f(Pair) for every block of queries of head h that may see keys j0 .. j0 + keys.
template <class F>
void for_query_blocks(const AttentionProblem& p, const AttentionTensors& t, const AttentionSequence& at,
                      int64_t h, int64_t j0, int64_t keys, F&& f) {
  const int64_t step = block_rows(p);
  const int64_t first = p.causal ? larger(j0 - at.causal_offset, 0) / step * step : 0;
  if (!p.with_blocks) {
    for (int64_t i0 = first; i0 < at.L; i0 += step)
      f(Pair{h, i0, smaller(step, at.L - i0), j0, keys, nullptr});
    return;
  }
  const int64_t column = block_column(p, h, j0);
  for (int32_t e = t.blocks.column_begin[column]; e < t.blocks.column_begin[column + 1]; ++e) {
    const AttentionBlockEntry entry = t.blocks.column_entries[e];
    const int64_t i0 = entry.tile * block_tile;
    if (i0 >= first && i0 < at.L) f(Pair{h, i0, smaller(step, at.L - i0), j0, keys, bits_of(t, entry)});
  }
}

template <class T>
void backward_item(const AttentionProblem& p, const AttentionTensors& t, const Dropout& dropout, int64_t item,
                   const Scratch& s, float* shared_gq) {
  const Runs runs = runs_of(p);
  const int64_t run = balanced(item % runs.count, runs.count), head = item / runs.count;
  const int64_t hk = head % p.Hk, b = head / p.Hk, group = p.group();
  const int64_t padded_d = round_up(p.D, VL), padded_e = round_up(p.E, VL), step = tile_keys(p);
  const AttentionSequence at = sequence_of(p, t, b);
  const int64_t seen = at.L > 0 ? visible_to(p, at, at.L - 1) : 0;
  float* gq = !p.need_q        ? nullptr
              : runs.count > 1 ? shared_gq + (run * p.B * p.H + b * p.H + hk * group) * query_sums(p)
                               : s.gq;
  if (p.need_q) memset(gq, 0, size_t(group * query_sums(p)) * sizeof(float));
  if (s.packed) memset(s.packed, 0, size_t(slots_of(p)));
  const int64_t end = smaller((run + 1) * runs.keys, at.S);
  for (int64_t j0 = run * runs.keys; j0 < end; j0 += step) {
    const int64_t whole = smaller(step, end - j0), keys = smaller(whole, larger(seen - j0, 0));
    const int64_t summed = smaller(round_up(whole, ROWS), KEYS);  // register tiles round rows up
    memset(s.gk, 0, size_t(summed * padded_d) * sizeof(float));
    memset(s.gv, 0, size_t(summed * padded_e) * sizeof(float));
    bool packed = false;
    for (int64_t g = 0; keys > 0 && g < group; ++g)
      for_query_blocks(p, t, at, hk * group + g, j0, keys, [&](const Pair& pair) {
        if (!packed) pack_key_tile<T>(p, t, at, hk, j0, keys, s.tile);
        packed = true;
        backward_block<T>(p, t, dropout, at, pair, s, p.need_q ? gq + g * query_sums(p) : nullptr);
      });
    if (!p.need_kv) continue;
    T* gk = static_cast<T*>(t.gk) + key_offset(p.gk_strides, at, hk, j0);
    T* gv = static_cast<T*>(t.gv) + key_offset(p.gv_strides, at, hk, j0);
    write_rows(gk, p.gk_strides.n, whole, p.D, score_scale(p.scale), s.gk);  // or the queries carried it
    write_rows(gv, p.gv_strides.n, whole, p.E, 1.0f, s.gv);
  }
  if (!p.need_q || runs.count > 1) return;
  for (int64_t g = 0; g < group; ++g)
    write_rows(static_cast<T*>(t.gq) + query_offset(p.gq_strides, at, hk * group + g, 0), p.gq_strides.n,
               at.L, p.D, float(p.scale), s.gq + g * query_sums(p));
}

// Adds the runs' shares of a block of gq, into the first of them.
template <class T>
void add_runs(const AttentionProblem& p, const AttentionTensors& t, int64_t item, float* shared_gq) {
  const int64_t blocks = (p.L + BLOCK - 1) / BLOCK, i0 = item % blocks * BLOCK, head = item / blocks;
  const AttentionSequence at = sequence_of(p, t, head / p.H);
  const int64_t padded_d = round_up(p.D, VL), n = smaller(BLOCK, at.L - i0);
  const int64_t share = p.B * p.H * query_sums(p);
  float* sums = shared_gq + head * query_sums(p) + i0 * padded_d;
  for (int64_t run = 1; run < runs_of(p).count; ++run)
    for (int64_t d = 0; d < n * padded_d; d += VL)
      store(sums + d, load(sums + d) + load(sums + run * share + d));
  if (n > 0)
    write_rows(static_cast<T*>(t.gq) + query_offset(p.gq_strides, at, head % p.H, i0), p.gq_strides.n, n, p.D,
               float(p.scale), sums);
}

WorkPlan plan_backward(const AttentionProblem& p) {
  constexpr int64_t worth_a_thread = 400000;  // multiplications: about 20 microseconds
  WorkPlan plan;
  const Runs runs = runs_of(p);
  const int64_t work = pairs_of_a_head(p) / runs.count * p.group() * (3 * p.D + 2 * p.E);
  plan.add_phase(p.B * p.Hk * runs.count, work < worth_a_thread ? worth_a_thread / (work + 1) + 1 : 1);
  if (p.need_q && runs.count > 1) {
    plan.add_phase(p.B * p.H * ((p.L + BLOCK - 1) / BLOCK), 8);
    plan.shared_bytes = align_up(runs.count * p.B * p.H * query_sums(p) * int64_t(sizeof(float)));
  }
  Carver carve(nullptr);
  Scratch(carve, p);
  plan.thread_bytes = carve.used();
  return plan;
}

void run_backward(const AttentionProblem& p, const AttentionTensors& t, const WorkSlice& slice) {
  FlushDenormals guard;
  Carver carve(slice.scratch);
  const Scratch s(carve, p);
  const Dropout dropout(p, t);
  float* shared_gq = reinterpret_cast<float*>(slice.shared);
  with_factor_element(p.dtype, [&](auto tag) {
    using T = decltype(tag);
    for (int64_t k = slice.begin; k < slice.end; ++k)
      if (slice.phase == 0)
        backward_item<T>(p, t, dropout, k, s, shared_gq);
      else
        add_runs<T>(p, t, k, shared_gq);
  });
}

Refusal refuses(const AttentionProblem& p) { return refuses_factors(p.dtype); }

}  // namespace

extern const AttentionCpuKernel attention_tile_backward;
const AttentionCpuKernel attention_tile_backward = {"tile_" PYSEQNET_ISA_NAME, this_isa, refuses,
                                                    plan_backward, run_backward};

}  // namespace PYSEQNET_ISA
}  // namespace pyseqnet
