// Softmax attention on the CPU, backward: gradients of query, key, value and of a bias; float32, bfloat16,
// float16.
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
// The gradient of a bias that many heads share recomputes the two row products tile by tile and adds them up
// in the fixed order of heads; one item is a block of the bias's rows.
//
// Bound: FMA, 6 D + 4 E a visible pair (the bias's gradient 2 D + 2 E more).
#include "attention/attention_tile.h"

namespace pyseqnet {
inline namespace PYSEQNET_ISA {
namespace {

constexpr int64_t KEYS = 96;  // keys of a tile: a multiple of every ROWS and PANEL
constexpr int64_t MOST_RUNS = 4, RUN = 2 * KEYS, WANTED_ITEMS = 8;
static_assert(KEYS >= block_tile && BLOCK >= block_tile);

int64_t block_rows(const AttentionProblem& p) { return p.with_blocks ? block_tile : BLOCK; }
int64_t tile_keys(const AttentionProblem& p) { return p.with_blocks ? block_tile : KEYS; }

// ---- a block of queries against a tile of keys ----

struct KeyTile {
  float *rows, *panels, *value_panels, *value_rows;
  KeyTile(Carver& carve, const AttentionProblem& p) {
    rows = carve.take<float>(KEYS * round_up(p.D, VL));
    value_rows = carve.take<float>(KEYS * round_up(p.E, VL));
    panels = carve.take<float>(KEYS * p.D);
    value_panels = carve.take<float>(KEYS * p.E);
  }
};
struct QueryBlock {
  float *q, *gout, *lse, *delta, *probabilities, *gradients;
  float* slopes;  // of the soft cap, for a register tile
  QueryBlock(Carver& carve, const AttentionProblem& p) {
    q = carve.take<float>(BLOCK * round_up(p.D, VL));
    gout = carve.take<float>(BLOCK * round_up(p.E, VL));
    lse = carve.take<float>(BLOCK);
    delta = carve.take<float>(BLOCK);
    probabilities = carve.take<float>(BLOCK * KEYS);
    gradients = carve.take<float>(BLOCK * KEYS);
    slopes = carve.take<float>(ROWS * KEYS);
  }
};

// Query head, first query and number of queries of a block; first key and number of keys of a tile; the bit
// tile of a pattern that goes with the pair, or null.
struct Pair {
  int64_t h, i0, n, j0, keys;
  const uint64_t* bits;
};
const uint64_t* bits_of(const AttentionTensors& t, AttentionBlockEntry entry) {
  return entry.bits == block_full ? nullptr : t.blocks.bits + entry.bits * block_tile;
}

template <class T>
void pack_key_tile(const AttentionProblem& p, const AttentionTensors& t, const AttentionSequence& at,
                   int64_t hk, int64_t j0, int64_t n, const KeyTile& tile) {
  pack_keys(p, t, at, static_cast<const T*>(t.k), p.k_strides, p.D, hk, j0, n, 0, at.L, tile.rows);
  pack_keys(p, t, at, static_cast<const T*>(t.v), p.v_strides, p.E, hk, j0, n, 0, at.L, tile.value_rows);
  pack_panels(tile.rows, round_up(p.D, VL), n, p.D, tile.panels);
  pack_panels(tile.value_rows, round_up(p.E, VL), n, p.E, tile.value_panels);
}

// Scaled queries, gradients and statistics of a block. A row that sees no key becomes zero, whatever it
// holds, and so do the rows up to the next register tile.
template <class T>
void pack_query_block(const AttentionProblem& p, const AttentionTensors& t, const AttentionSequence& at,
                      int64_t h, int64_t i0, int64_t n, const QueryBlock& block) {
  const int64_t padded_d = round_up(p.D, VL), padded_e = round_up(p.E, VL), first = lse_row(at, h, i0);
  const T* q = static_cast<const T*>(t.q) + query_offset(p.q_strides, at, h, i0);
  const T* gout = static_cast<const T*>(t.gout) + query_offset(p.gout_strides, at, h, i0);
  pack_rows(q, p.q_strides.n, n, p.D, float(p.scale), block.q);
  pack_rows(gout, p.gout_strides.n, n, p.E, 1.0f, block.gout);
  for (int64_t r = 0; r < round_up(n, ROWS); ++r) {
    const float lse = r < n ? static_cast<const float*>(t.lse)[first + r] : -INFINITE;
    block.lse[r] = lse == -INFINITE ? INFINITE : lse;
    block.delta[r] = r < n ? static_cast<const float*>(t.delta)[first + r] : 0.0f;
    if (lse != -INFINITE) continue;
    memset(block.q + r * padded_d, 0, size_t(padded_d) * sizeof(float));
    memset(block.gout + r * padded_e, 0, size_t(padded_e) * sizeof(float));
  }
}

template <class T>
PYSEQNET_NOINLINE void add_weight_gradients(const T* gweights, int64_t stride, int64_t n,
                                            const int32_t* limits, float* dw) {
  for (int64_t r = 0; r < n; ++r, gweights += stride, dw += KEYS)
    for (int64_t c = 0; c < limits[r]; c += VL)
      store(dw + c, load(dw + c) + load_between(gweights + c, 0, limits[r] - c, vf{}));
}

// P, dW -> W, dZ for n rows; zero beyond each limit up to `columns`. slopes: what dZ is multiplied with, or
// null.
PYSEQNET_NOINLINE void softmax_gradient_tile(const Dropout& dropout, int64_t first_row, int64_t n, int64_t j0,
                                             int64_t columns, const int32_t* limits, float* probabilities,
                                             float* gradients, const float* delta, const float* slopes) {
  for (int64_t r = 0; r < n; ++r, probabilities += KEYS, gradients += KEYS) {
    const uint64_t key = dropout.on ? dropout_row_key(dropout.seed, first_row + r) : 0;
    int64_t c = 0;
    for (; c < limits[r]; c += VL) {
      const vf probability = load(probabilities + c);
      vf gradient = load(gradients + c);
      if (dropout.on) {
        const vf keep = keep_lanes(dropout, key, j0 + c);
        gradient *= keep;
        store(probabilities + c, probability * keep);
      }
      vf dz = probability * (gradient - delta[r]);
      if (slopes) dz = probability == 0.0f ? vf{} : dz * load(slopes + r * KEYS + c);
      store(gradients + c, dz);
    }
    for (; c < columns; c += VL) store(gradients + c, vf{});
  }
}

// Weights and gradients of rows r0 .. r0 + n of a block against a tile of keys: of the scores, or (of_logits)
// before the soft cap. Returns the columns that were computed, the others are zero; but with a width of 0 and
// no pattern nothing was written.
template <class T>
Columns gradient_tile(const AttentionProblem& p, const AttentionTensors& t, const Dropout& dropout,
                      const AttentionSequence& at, const Pair& pair, int64_t r0, int64_t n,
                      const KeyTile& tile, const QueryBlock& block, bool of_logits) {
  const int64_t padded_d = round_up(p.D, VL), padded_e = round_up(p.E, VL), i0 = pair.i0 + r0;
  int32_t limits[ROWS];
  const Columns columns =
      columns_of(p, at, i0, n, pair.j0, pair.keys, pair.bits ? pair.bits + r0 : nullptr, limits);
  const int64_t first = columns.first, j0 = pair.j0 + first, end = round_up(pair.keys, VL) - first;
  float *weights = block.probabilities + r0 * KEYS, *gradients = block.gradients + r0 * KEYS;
  const bool hidden = columns.width > 0 && mask_hides_tile(p, t, at, pair.h, i0, n, j0, limits);
  if (hidden || (columns.width == 0 && pair.bits)) {
    memset(weights, 0, size_t(n * KEYS) * sizeof(float));
    memset(gradients, 0, size_t(n * KEYS) * sizeof(float));
    return columns;
  }
  if (columns.width == 0) return columns;
  for (int64_t r = 0; first > 0 && r < n; ++r) {
    memset(weights + r * KEYS, 0, size_t(first) * sizeof(float));
    memset(gradients + r * KEYS, 0, size_t(first) * sizeof(float));
  }
  weights += first, gradients += first;
  const int64_t vectors = (columns.width + VL - 1) / VL;
  float* slopes = p.softcap > 0 && !of_logits ? block.slopes : nullptr;
  multiply_panels(n, p.D, block.q + r0 * padded_d, padded_d, tile.panels, first / VL, vectors, weights, KEYS);
  to_logits(p, t, at, pair.h, i0, n, j0, columns, limits, weights, KEYS, slopes);
  probabilities_tile(n, end, limits, weights, KEYS, block.lse + r0);
  multiply_panels(n, p.E, block.gout + r0 * padded_e, padded_e, tile.value_panels, first / VL, vectors,
                  gradients, KEYS);
  if (p.with_gweights)
    add_weight_gradients(static_cast<const T*>(t.gweights) + weights_offset(p, at, pair.h, i0) + j0, p.S, n,
                         limits, gradients);
  softmax_gradient_tile(dropout, lse_row(at, pair.h, i0), n, j0, end, limits, weights, gradients,
                        block.delta + r0, slopes);
  return columns;
}

template <class T>
void write_rows(T* dst, int64_t stride, int64_t n, int64_t width, float scale, const float* src) {
  const int64_t padded = round_up(width, VL);
  for (int64_t i = 0; i < n; ++i, dst += stride, src += padded)
    for (int64_t d = 0; d < width; d += VL) store_lanes_n(dst + d, load(src + d) * scale, width - d);
}

Refusal refuses(const AttentionProblem& p) {
  if (p.dtype == DType::f64) return "float64 is left to the reference";
  return accepted;
}

// ---- gradients of query, key and value ----

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

struct Scratch {
  KeyTile tile;
  QueryBlock block;
  float *gk, *gv, *gq;
  Scratch(Carver& carve, const AttentionProblem& p)
      : tile(carve, p),
        block(carve, p),
        gk(carve.take<float>(KEYS * round_up(p.D, VL))),
        gv(carve.take<float>(KEYS * round_up(p.E, VL))),
        gq(carve.take<float>(p.need_q && runs_of(p).count == 1 ? p.group() * query_sums(p) : 0)) {}
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

// Adds what the queries of one block say about a tile of keys.
template <class T>
void backward_block(const AttentionProblem& p, const AttentionTensors& t, const Dropout& dropout,
                    const AttentionSequence& at, const Pair& pair, const Scratch& s, float* gq) {
  const int64_t padded_d = round_up(p.D, VL), padded_e = round_up(p.E, VL);
  pack_query_block<T>(p, t, at, pair.h, pair.i0, pair.n, s.block);
  RowsSeen seen;
  for (int64_t r0 = 0; r0 < pair.n; r0 += ROWS) {
    const int64_t rows = smaller(ROWS, pair.n - r0);
    const Columns columns = gradient_tile<T>(p, t, dropout, at, pair, r0, rows, s.tile, s.block, false);
    seen.begin[r0 / ROWS] = columns.first, seen.end[r0 / ROWS] = columns.first + columns.width;
    if (columns.width > 0 && p.need_q)
      accumulate(rows, columns.width, padded_d, s.block.gradients + r0 * KEYS + columns.first, KEYS,
                 s.tile.rows + columns.first * padded_d, gq + (pair.i0 + r0) * padded_d, nullptr);
  }
  if (!p.need_kv) return;
  for (int64_t c = 0; c < pair.keys; c += ROWS) {
    int64_t from, to;
    seen.range(c, pair.n, from, to);
    // Rows above the causal diagonal see none of these keys.
    if (p.causal) from = larger(from, pair.j0 + c - at.causal_offset - pair.i0);
    if (from >= to) continue;
    const int64_t rows = smaller(ROWS, pair.keys - c);
    accumulate_transposed(rows, to - from, padded_e, s.block.probabilities + from * KEYS + c, KEYS,
                          s.block.gout + from * padded_e, s.gv + c * padded_e);
    accumulate_transposed(rows, to - from, padded_d, s.block.gradients + from * KEYS + c, KEYS,
                          s.block.q + from * padded_d, s.gk + c * padded_d);
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
    write_rows(gk, p.gk_strides.n, whole, p.D, 1.0f, s.gk);  // the packed queries carried the scale
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
  with_element(p.dtype, [&](auto tag) {
    using T = decltype(tag);
    for (int64_t k = slice.begin; k < slice.end; ++k)
      if (slice.phase == 0)
        backward_item<T>(p, t, dropout, k, s, shared_gq);
      else
        add_runs<T>(p, t, k, shared_gq);
  });
}

// ---- gradient of a bias ----

struct BiasItem {
  int64_t mb, mh, i0, i1;  // of the bias's batch and head; the queries that it reads
};
int64_t bias_blocks(const AttentionProblem& p) {
  return p.bias_L == 1 ? 1 : (p.L + block_rows(p) - 1) / block_rows(p);
}
BiasItem bias_item_of(const AttentionProblem& p, int64_t k) {
  const int64_t blocks = bias_blocks(p), head = k / blocks, i0 = k % blocks * block_rows(p);
  return {head / p.bias_H, head % p.bias_H, i0, p.bias_L == 1 ? p.L : smaller(i0 + block_rows(p), p.L)};
}

struct BiasScratch {
  KeyTile tile;
  QueryBlock block;
  float* sums;  // [rows of the bias][round_up(S, KEYS)]
  BiasScratch(Carver& carve, const AttentionProblem& p)
      : tile(carve, p),
        block(carve, p),
        sums(carve.take<float>((p.bias_L == 1 ? 1 : smaller(p.L, block_rows(p))) * round_up(p.S, KEYS))) {}
};

template <class T>
void add_bias_gradients(const AttentionProblem& p, const AttentionTensors& t, const Dropout& dropout,
                        const AttentionSequence& at, const Pair& pair, const BiasScratch& s, int64_t row) {
  const int64_t row_length = round_up(p.S, KEYS), columns = round_up(pair.keys, VL);
  pack_query_block<T>(p, t, at, pair.h, pair.i0, pair.n, s.block);
  for (int64_t r0 = 0; r0 < pair.n; r0 += ROWS) {
    const int64_t rows = smaller(ROWS, pair.n - r0);
    if (gradient_tile<T>(p, t, dropout, at, pair, r0, rows, s.tile, s.block, true).width == 0) continue;
    for (int64_t r = r0; r < r0 + rows; ++r) {
      float* sums = s.sums + (p.bias_L == 1 ? 0 : (row + r) * row_length) + pair.j0;
      for (int64_t c = 0; c < columns; c += VL)
        store(sums + c, load(sums + c) + load(s.block.gradients + r * KEYS + c));
    }
  }
}

// Adds what head h of a batch entry says about the rows of an item.
template <class T>
void add_head(const AttentionProblem& p, const AttentionTensors& t, const Dropout& dropout,
              const BiasItem& item, const AttentionSequence& at, int64_t h, const BiasScratch& s) {
  const int64_t i1 = smaller(item.i1, at.L), step = block_rows(p);
  if (i1 <= item.i0) return;
  const int64_t seen = visible_to(p, at, i1 - 1);
  const auto meet = [&](int64_t i0, int64_t j0, int64_t keys, const uint64_t* bits) {
    add_bias_gradients<T>(p, t, dropout, at, {h, i0, smaller(step, i1 - i0), j0, keys, bits}, s,
                          i0 - item.i0);
  };
  if (!p.with_blocks) {
    for (int64_t j0 = 0; j0 < seen; j0 += KEYS) {
      const int64_t keys = smaller(KEYS, seen - j0);
      pack_key_tile<T>(p, t, at, h / p.group(), j0, keys, s.tile);
      for (int64_t i0 = item.i0; i0 < i1; i0 += step) meet(i0, j0, keys, nullptr);
    }
    return;
  }
  for (int64_t i0 = item.i0; i0 < i1; i0 += step) {
    const int64_t row = block_row(p, h, i0);
    for (int32_t e = t.blocks.row_begin[row]; e < t.blocks.row_begin[row + 1]; ++e) {
      const AttentionBlockEntry entry = t.blocks.row_entries[e];
      const int64_t j0 = entry.tile * block_tile, keys = smaller(block_tile, seen - j0);
      if (keys <= 0) break;
      pack_key_tile<T>(p, t, at, h / p.group(), j0, keys, s.tile);
      meet(i0, j0, keys, bits_of(t, entry));
    }
  }
}

template <class M>
void write_bias_gradient(const AttentionProblem& p, const AttentionTensors& t, const BiasItem& at,
                         const BiasScratch& s) {
  const int64_t columns = round_up(p.S, KEYS), rows = p.bias_L == 1 ? 1 : at.i1 - at.i0;
  M* gbias = static_cast<M*>(t.gbias) +
             ((at.mb * p.bias_H + at.mh) * p.bias_L + (p.bias_L == 1 ? 0 : at.i0)) * p.bias_S;
  for (int64_t r = 0; r < rows; ++r, gbias += p.bias_S) {
    const float* sums = s.sums + r * columns;
    if (p.bias_S == 1) {
      vf sum = {};
      for (int64_t c = 0; c < columns; c += VL) sum += load(sums + c);
      round_to(gbias[0], hsum(sum));
    } else {
      for (int64_t c = 0; c < p.S; c += VL) store_lanes_n(gbias + c, load(sums + c), p.S - c);
    }
  }
}

WorkPlan plan_bias_gradient(const AttentionProblem& p) {
  WorkPlan plan;
  plan.add_phase(p.bias_L > 0 ? p.bias_B * p.bias_H * bias_blocks(p) : 0);
  Carver carve(nullptr);
  BiasScratch(carve, p);
  plan.thread_bytes = carve.used();
  return plan;
}

void run_bias_gradient(const AttentionProblem& p, const AttentionTensors& t, const WorkSlice& slice) {
  FlushDenormals guard;
  Carver carve(slice.scratch);
  const BiasScratch s(carve, p);
  const Dropout dropout(p, t);
  with_element(p.dtype, [&](auto tag) {
    using T = decltype(tag);
    for (int64_t k = slice.begin; k < slice.end; ++k) {
      const BiasItem at = bias_item_of(p, k);
      const int64_t rows = p.bias_L == 1 ? 1 : at.i1 - at.i0;
      memset(s.sums, 0, size_t(rows * round_up(p.S, KEYS)) * sizeof(float));
      for (int64_t b = at.mb; b < (p.bias_B == 1 ? p.B : at.mb + 1); ++b)
        for (int64_t h = at.mh; h < (p.bias_H == 1 ? p.H : at.mh + 1); ++h)
          add_head<T>(p, t, dropout, at, sequence_of(p, t, b), h, s);
      if (p.bias_dtype == DType::f32)
        write_bias_gradient<float>(p, t, at, s);
      else
        write_bias_gradient<T>(p, t, at, s);
    }
  });
}

// ---- delta ----

template <class T>
PYSEQNET_NOINLINE float dot_rows(const T* a, const T* b, int64_t n) {
  vf sum = {};
  int64_t d = 0;
  for (; d + VL <= n; d += VL) sum += load_lanes(a + d) * load_lanes(b + d);
  if (d < n) sum += load_between(a + d, 0, n - d, vf{}) * load_between(b + d, 0, n - d, vf{});
  return hsum(sum);
}

WorkPlan plan_delta(const AttentionProblem& p) {
  constexpr int64_t worth_a_thread = 100000;  // elements: about 20 microseconds
  WorkPlan plan;
  plan.add_phase(p.B * p.H * p.L, worth_a_thread / (p.E + (p.with_gweights ? p.S : 0)) + 1);
  return plan;
}

void run_delta(const AttentionProblem& p, const AttentionTensors& t, const WorkSlice& slice) {
  FlushDenormals guard;
  with_element(p.dtype, [&](auto tag) {
    using T = decltype(tag);
    for (int64_t item = slice.begin; item < slice.end; ++item) {
      const int64_t i = item % p.L, h = item / p.L % p.H;
      const AttentionSequence at = sequence_of(p, t, item / p.L / p.H);
      if (i >= at.L) continue;
      const int64_t row = lse_row(at, h, i);
      float* delta = static_cast<float*>(t.delta) + row;
      *delta = 0;
      if (static_cast<const float*>(t.lse)[row] == -INFINITE) continue;
      float sum = dot_rows(static_cast<const T*>(t.gout) + query_offset(p.gout_strides, at, h, i),
                           static_cast<const T*>(t.out) + query_offset(p.out_strides, at, h, i), p.E);
      if (p.with_gweights) {
        const int64_t weights = weights_offset(p, at, h, i);
        sum += dot_rows(static_cast<const T*>(t.weights) + weights,
                        static_cast<const T*>(t.gweights) + weights, p.S);
      }
      if (p.with_glse) sum -= static_cast<const float*>(t.glse)[row];
      *delta = sum;
    }
  });
}

}  // namespace

extern const AttentionCpuKernel attention_tile_backward, attention_tile_bias_gradient, attention_rows_delta;
const AttentionCpuKernel attention_tile_backward = {"tile_" PYSEQNET_ISA_NAME, this_isa, refuses,
                                                    plan_backward, run_backward};
const AttentionCpuKernel attention_tile_bias_gradient = {"tile_" PYSEQNET_ISA_NAME, this_isa, refuses,
                                                         plan_bias_gradient, run_bias_gradient};
const AttentionCpuKernel attention_rows_delta = {"rows_" PYSEQNET_ISA_NAME, this_isa, refuses, plan_delta,
                                                 run_delta};

}  // namespace PYSEQNET_ISA
}  // namespace pyseqnet
