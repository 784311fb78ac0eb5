// Softmax attention on the CPU, backward: gradients of query, key, value and of an additive mask; float32,
// bfloat16, float16.
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
// The gradient of a mask that many heads share recomputes the two row products tile by tile and adds them up
// in the fixed order of heads; one item is a block of the mask's rows.
//
// Bound: FMA, 6 D + 4 E a visible pair (the mask's gradient 2 D + 2 E more).
#include "attention/attention_tile.h"

namespace pyseqnet {
inline namespace PYSEQNET_ISA {
namespace {

constexpr int64_t KEYS = 96;  // keys of a tile: a multiple of every ROWS and PANEL
constexpr int64_t MOST_RUNS = 4, RUN = 2 * KEYS, WANTED_ITEMS = 8;

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
  QueryBlock(Carver& carve, const AttentionProblem& p) {
    q = carve.take<float>(BLOCK * round_up(p.D, VL));
    gout = carve.take<float>(BLOCK * round_up(p.E, VL));
    lse = carve.take<float>(BLOCK);
    delta = carve.take<float>(BLOCK);
    probabilities = carve.take<float>(BLOCK * KEYS);
    gradients = carve.take<float>(BLOCK * KEYS);
  }
};

template <class T>
void pack_key_tile(const AttentionProblem& p, const AttentionTensors& t, int64_t b, int64_t hk, int64_t j0,
                   int64_t n, const KeyTile& tile) {
  pack_keys(p, t, static_cast<const T*>(t.k), p.k_strides, p.D, b, hk, j0, n, 0, p.L, tile.rows);
  pack_keys(p, t, static_cast<const T*>(t.v), p.v_strides, p.E, b, hk, j0, n, 0, p.L, tile.value_rows);
  pack_panels(tile.rows, round_up(p.D, VL), n, p.D, tile.panels);
  pack_panels(tile.value_rows, round_up(p.E, VL), n, p.E, tile.value_panels);
}

// Scaled queries, gradients and statistics of a block. A row that sees no key becomes zero, whatever it
// holds, and so do the rows up to the next register tile.
template <class T>
void pack_query_block(const AttentionProblem& p, const AttentionTensors& t, int64_t b, int64_t h, int64_t i0,
                      int64_t n, const QueryBlock& block) {
  const int64_t padded_d = round_up(p.D, VL), padded_e = round_up(p.E, VL), first = (b * p.H + h) * p.L + i0;
  const T* q = static_cast<const T*>(t.q) + b * p.q_strides.b + h * p.q_strides.h + i0 * p.q_strides.n;
  const T* gout =
      static_cast<const T*>(t.gout) + b * p.gout_strides.b + h * p.gout_strides.h + i0 * p.gout_strides.n;
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

// P, dW -> W, dZ for n rows; zero beyond each limit up to `columns`.
PYSEQNET_NOINLINE void softmax_gradient_tile(const Dropout& dropout, int64_t first_row, int64_t n, int64_t j0,
                                             int64_t columns, const int32_t* limits, float* probabilities,
                                             float* gradients, const float* delta) {
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
      store(gradients + c, probability * (gradient - delta[r]));
    }
    for (; c < columns; c += VL) store(gradients + c, vf{});
  }
}

// Weights and logit gradients of rows r0 .. r0 + n of a block (queries i0 + r0 on) against a tile of keys.
// Returns the number of leading columns in use; with 0 nothing was written.
template <class T>
int64_t gradient_tile(const AttentionProblem& p, const AttentionTensors& t, const Dropout& dropout, int64_t b,
                      int64_t h, int64_t i0, int64_t r0, int64_t n, int64_t j0, int64_t keys, int64_t length,
                      const KeyTile& tile, const QueryBlock& block) {
  const int64_t padded_d = round_up(p.D, VL), padded_e = round_up(p.E, VL);
  const int64_t row = (b * p.H + h) * p.L + i0 + r0;
  int32_t limits[ROWS];
  const int64_t width = set_limits(p, length, i0 + r0, n, j0, keys, limits);
  if (width == 0) return 0;
  float *weights = block.probabilities + r0 * KEYS, *gradients = block.gradients + r0 * KEYS;
  if (mask_hides_tile(p, t, b, h, i0 + r0, n, j0, limits)) {
    memset(weights, 0, size_t(n * KEYS) * sizeof(float));
    memset(gradients, 0, size_t(n * KEYS) * sizeof(float));
    return width;
  }
  const int64_t vectors = (width + VL - 1) / VL, columns = round_up(keys, VL);
  multiply_panels(n, p.D, block.q + r0 * padded_d, padded_d, tile.panels, vectors, weights, KEYS);
  apply_mask(p, t, b, h, i0 + r0, n, j0, limits, weights, KEYS);
  probabilities_tile(n, columns, limits, weights, KEYS, block.lse + r0);
  multiply_panels(n, p.E, block.gout + r0 * padded_e, padded_e, tile.value_panels, vectors, gradients, KEYS);
  if (p.with_gweights)
    add_weight_gradients(static_cast<const T*>(t.gweights) + row * p.S + j0, p.S, n, limits, gradients);
  softmax_gradient_tile(dropout, row, n, j0, columns, limits, weights, gradients, block.delta + r0);
  return width;
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
  const int64_t keys = round_up(larger((p.S + count - 1) / count, 1), KEYS);
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

// Adds what the queries of one block say about a tile of keys.
template <class T>
void backward_block(const AttentionProblem& p, const AttentionTensors& t, const Dropout& dropout, int64_t b,
                    int64_t h, int64_t i0, int64_t n, int64_t j0, int64_t keys, int64_t length,
                    const Scratch& s, float* gq) {
  const int64_t padded_d = round_up(p.D, VL), padded_e = round_up(p.E, VL);
  pack_query_block<T>(p, t, b, h, i0, n, s.block);
  int64_t first = n;  // the first row that sees a key of the tile
  for (int64_t r0 = 0; r0 < n; r0 += ROWS) {
    const int64_t rows = smaller(ROWS, n - r0);
    const int64_t width =
        gradient_tile<T>(p, t, dropout, b, h, i0, r0, rows, j0, keys, length, s.tile, s.block);
    if (width == 0) continue;
    if (first == n) first = r0;
    if (p.need_q)
      accumulate(rows, width, padded_d, s.block.gradients + r0 * KEYS, KEYS, s.tile.rows,
                 gq + (i0 + r0) * padded_d, nullptr);
  }
  if (!p.need_kv || first == n) return;
  for (int64_t c = 0; c < keys; c += ROWS) {
    // Rows above the causal diagonal see none of these keys.
    const int64_t from = p.causal ? larger(first, smaller(j0 + c - p.causal_offset - i0, n)) : first;
    const int64_t rows = smaller(ROWS, keys - c);
    accumulate_transposed(rows, n - from, padded_e, s.block.probabilities + from * KEYS + c, KEYS,
                          s.block.gout + from * padded_e, s.gv + c * padded_e);
    accumulate_transposed(rows, n - from, padded_d, s.block.gradients + from * KEYS + c, KEYS,
                          s.block.q + from * padded_d, s.gk + c * padded_d);
  }
}

template <class T>
void backward_item(const AttentionProblem& p, const AttentionTensors& t, const Dropout& dropout, int64_t item,
                   const Scratch& s, float* shared_gq) {
  const Runs runs = runs_of(p);
  const int64_t run = balanced(item % runs.count, runs.count), head = item / runs.count;
  const int64_t hk = head % p.Hk, b = head / p.Hk, group = p.group();
  const int64_t padded_d = round_up(p.D, VL), padded_e = round_up(p.E, VL);
  const int64_t length = length_of(p, t, b);
  const int64_t seen = p.L > 0 ? visible_keys(p.causal, p.causal_offset, length, p.L - 1) : 0;
  float* gq = !p.need_q        ? nullptr
              : runs.count > 1 ? shared_gq + (run * p.B * p.H + b * p.H + hk * group) * query_sums(p)
                               : s.gq;
  if (p.need_q) memset(gq, 0, size_t(group * query_sums(p)) * sizeof(float));
  const int64_t end = smaller((run + 1) * runs.keys, p.S);
  for (int64_t j0 = run * runs.keys; j0 < end; j0 += KEYS) {
    const int64_t whole = smaller(KEYS, end - j0), keys = smaller(whole, larger(seen - j0, 0));
    const int64_t summed = smaller(round_up(whole, ROWS), KEYS);  // register tiles round rows up
    memset(s.gk, 0, size_t(summed * padded_d) * sizeof(float));
    memset(s.gv, 0, size_t(summed * padded_e) * sizeof(float));
    if (keys > 0) {
      pack_key_tile<T>(p, t, b, hk, j0, keys, s.tile);
      const int64_t first = p.causal ? larger(j0 - p.causal_offset, 0) / BLOCK * BLOCK : 0;
      for (int64_t g = 0; g < group; ++g)
        for (int64_t i0 = first; i0 < p.L; i0 += BLOCK)
          backward_block<T>(p, t, dropout, b, hk * group + g, i0, smaller(BLOCK, p.L - i0), j0, keys, length,
                            s, p.need_q ? gq + g * query_sums(p) : nullptr);
    }
    if (!p.need_kv) continue;
    T* gk = static_cast<T*>(t.gk) + b * p.gk_strides.b + hk * p.gk_strides.h + j0 * p.gk_strides.n;
    T* gv = static_cast<T*>(t.gv) + b * p.gv_strides.b + hk * p.gv_strides.h + j0 * p.gv_strides.n;
    write_rows(gk, p.gk_strides.n, whole, p.D, 1.0f, s.gk);  // the packed queries carried the scale
    write_rows(gv, p.gv_strides.n, whole, p.E, 1.0f, s.gv);
  }
  if (!p.need_q || runs.count > 1) return;
  for (int64_t g = 0; g < group; ++g)
    write_rows(static_cast<T*>(t.gq) + b * p.gq_strides.b + (hk * group + g) * p.gq_strides.h, p.gq_strides.n,
               p.L, p.D, float(p.scale), s.gq + g * query_sums(p));
}

// Adds the runs' shares of a block of gq, into the first of them.
template <class T>
void add_runs(const AttentionProblem& p, const AttentionTensors& t, int64_t item, float* shared_gq) {
  const int64_t blocks = (p.L + BLOCK - 1) / BLOCK, i0 = item % blocks * BLOCK, head = item / blocks;
  const int64_t padded_d = round_up(p.D, VL), n = smaller(BLOCK, p.L - i0);
  const int64_t share = p.B * p.H * query_sums(p);
  float* sums = shared_gq + head * query_sums(p) + i0 * padded_d;
  for (int64_t run = 1; run < runs_of(p).count; ++run)
    for (int64_t d = 0; d < n * padded_d; d += VL)
      store(sums + d, load(sums + d) + load(sums + run * share + d));
  write_rows(
      static_cast<T*>(t.gq) + head / p.H * p.gq_strides.b + head % p.H * p.gq_strides.h + i0 * p.gq_strides.n,
      p.gq_strides.n, n, p.D, float(p.scale), sums);
}

WorkPlan plan_backward(const AttentionProblem& p) {
  constexpr int64_t worth_a_thread = 400000;  // multiplications: about 20 microseconds
  WorkPlan plan;
  const Runs runs = runs_of(p);
  const int64_t work = p.L * p.group() * smaller(runs.keys, p.S) * (3 * p.D + 2 * p.E);
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

// ---- gradient of an additive mask ----

struct MaskItem {
  int64_t mb, mh, i0, i1;  // of the mask's batch and head; the queries that it reads
};
int64_t mask_blocks(const AttentionProblem& p) { return p.mask_L == 1 ? 1 : (p.L + BLOCK - 1) / BLOCK; }
MaskItem mask_item_of(const AttentionProblem& p, int64_t k) {
  const int64_t blocks = mask_blocks(p), head = k / blocks, i0 = k % blocks * BLOCK;
  return {head / p.mask_H, head % p.mask_H, i0, p.mask_L == 1 ? p.L : smaller(i0 + BLOCK, p.L)};
}

struct MaskScratch {
  KeyTile tile;
  QueryBlock block;
  float* sums;  // [rows of the mask][round_up(S, KEYS)]
  MaskScratch(Carver& carve, const AttentionProblem& p)
      : tile(carve, p),
        block(carve, p),
        sums(carve.take<float>((p.mask_L == 1 ? 1 : smaller(p.L, BLOCK)) * round_up(p.S, KEYS))) {}
};

template <class T>
void add_mask_gradients(const AttentionProblem& p, const AttentionTensors& t, const Dropout& dropout,
                        const MaskItem& at, int64_t b, int64_t h, const MaskScratch& s) {
  const int64_t length = length_of(p, t, b), row_length = round_up(p.S, KEYS);
  const int64_t seen = visible_keys(p.causal, p.causal_offset, length, at.i1 - 1);
  for (int64_t j0 = 0; j0 < seen; j0 += KEYS) {
    const int64_t keys = smaller(KEYS, seen - j0), columns = round_up(keys, VL);
    pack_key_tile<T>(p, t, b, h / p.group(), j0, keys, s.tile);
    for (int64_t i0 = at.i0; i0 < at.i1; i0 += BLOCK) {
      const int64_t n = smaller(BLOCK, at.i1 - i0);
      pack_query_block<T>(p, t, b, h, i0, n, s.block);
      for (int64_t r0 = 0; r0 < n; r0 += ROWS) {
        const int64_t rows = smaller(ROWS, n - r0);
        if (gradient_tile<T>(p, t, dropout, b, h, i0, r0, rows, j0, keys, length, s.tile, s.block) == 0)
          continue;
        for (int64_t r = r0; r < r0 + rows; ++r) {
          float* sums = s.sums + (p.mask_L == 1 ? 0 : r * row_length) + j0;
          for (int64_t c = 0; c < columns; c += VL)
            store(sums + c, load(sums + c) + load(s.block.gradients + r * KEYS + c));
        }
      }
    }
  }
}

template <class M>
void write_mask_gradient(const AttentionProblem& p, const AttentionTensors& t, const MaskItem& at,
                         const MaskScratch& s) {
  const int64_t columns = round_up(p.S, KEYS), rows = p.mask_L == 1 ? 1 : at.i1 - at.i0;
  M* gmask = static_cast<M*>(t.gmask) +
             ((at.mb * p.mask_H + at.mh) * p.mask_L + (p.mask_L == 1 ? 0 : at.i0)) * p.mask_S;
  for (int64_t r = 0; r < rows; ++r, gmask += p.mask_S) {
    const float* sums = s.sums + r * columns;
    if (p.mask_S == 1) {
      vf sum = {};
      for (int64_t c = 0; c < columns; c += VL) sum += load(sums + c);
      round_to(gmask[0], hsum(sum));
    } else {
      for (int64_t c = 0; c < p.S; c += VL) store_lanes_n(gmask + c, load(sums + c), p.S - c);
    }
  }
}

WorkPlan plan_mask_gradient(const AttentionProblem& p) {
  WorkPlan plan;
  plan.add_phase(p.mask_L > 0 ? p.mask_B * p.mask_H * mask_blocks(p) : 0);
  Carver carve(nullptr);
  MaskScratch(carve, p);
  plan.thread_bytes = carve.used();
  return plan;
}

void run_mask_gradient(const AttentionProblem& p, const AttentionTensors& t, const WorkSlice& slice) {
  FlushDenormals guard;
  Carver carve(slice.scratch);
  const MaskScratch s(carve, p);
  const Dropout dropout(p, t);
  with_element(p.dtype, [&](auto tag) {
    using T = decltype(tag);
    for (int64_t k = slice.begin; k < slice.end; ++k) {
      const MaskItem at = mask_item_of(p, k);
      const int64_t rows = p.mask_L == 1 ? 1 : at.i1 - at.i0;
      memset(s.sums, 0, size_t(rows * round_up(p.S, KEYS)) * sizeof(float));
      for (int64_t b = at.mb; b < (p.mask_B == 1 ? p.B : at.mb + 1); ++b)
        for (int64_t h = at.mh; h < (p.mask_H == 1 ? p.H : at.mh + 1); ++h)
          if (at.i1 > at.i0) add_mask_gradients<T>(p, t, dropout, at, b, h, s);
      if (p.mask_dtype == DType::f32)
        write_mask_gradient<float>(p, t, at, s);
      else
        write_mask_gradient<T>(p, t, at, s);
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
    for (int64_t row = slice.begin; row < slice.end; ++row) {
      float* delta = static_cast<float*>(t.delta) + row;
      *delta = 0;
      if (static_cast<const float*>(t.lse)[row] == -INFINITE) continue;
      const int64_t i = row % p.L, h = row / p.L % p.H, b = row / p.L / p.H;
      const T* gout = static_cast<const T*>(t.gout) + b * p.gout_strides.b + h * p.gout_strides.h;
      const T* out = static_cast<const T*>(t.out) + b * p.out_strides.b + h * p.out_strides.h;
      float sum = dot_rows(gout + i * p.gout_strides.n, out + i * p.out_strides.n, p.E);
      if (p.with_gweights)
        sum += dot_rows(static_cast<const T*>(t.weights) + row * p.S,
                        static_cast<const T*>(t.gweights) + row * p.S, p.S);
      if (p.with_glse) sum -= static_cast<const float*>(t.glse)[row];
      *delta = sum;
    }
  });
}

}  // namespace

extern const AttentionCpuKernel attention_tile_backward, attention_tile_mask_gradient, attention_rows_delta;
const AttentionCpuKernel attention_tile_backward = {"tile_" PYSEQNET_ISA_NAME, this_isa, refuses,
                                                    plan_backward, run_backward};
const AttentionCpuKernel attention_tile_mask_gradient = {"tile_" PYSEQNET_ISA_NAME, this_isa, refuses,
                                                         plan_mask_gradient, run_mask_gradient};
const AttentionCpuKernel attention_rows_delta = {"rows_" PYSEQNET_ISA_NAME, this_isa, refuses, plan_delta,
                                                 run_delta};

}  // namespace PYSEQNET_ISA
}  // namespace pyseqnet
