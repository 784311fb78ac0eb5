// A block of queries against a tile of keys, backward: packing both, the logits and the gradient of the weights
// in register tiles, and the softmax's gradient, which turns them into W and dZ. What follows (gradients of
// query, key and value, or of a bias) sums them up.
#pragma once
#include "attention/attention_tile.h"

namespace pyseqnet {
inline namespace PYSEQNET_ISA {
namespace {

constexpr int64_t KEYS = 96;  // keys of a tile: a multiple of every ROWS and PANEL
static_assert(KEYS >= block_tile && BLOCK >= block_tile && BLOCK % ROWS == 0 && KEYS % ROWS == 0);

int64_t block_rows(const AttentionProblem& p) { return p.with_blocks ? block_tile : BLOCK; }

struct KeyTile {
  float *rows, *panels, *value_panels, *value_rows;
  float* row_pairs;  // keys for the sum over them
  KeyTile(Carver& carve, const AttentionProblem& p) {
    rows = carve.take<float>(KEYS * row_words(p.D));
    value_rows = carve.take<float>(KEYS * row_words(p.E));
    panels = carve.take<float>(KEYS * words_of(p.D));
    value_panels = carve.take<float>(KEYS * words_of(p.E));
    row_pairs = PAIR == 1 ? rows : carve.take<float>(KEYS / PAIR * round_up(p.D, VL));
  }
};
struct QueryBlock {
  float *q, *gout, *lse, *delta;
  float *q_pairs, *gout_pairs;       // rows for the sums over them
  float *probabilities, *gradients;  // [BLOCK][KEYS]
  float* slopes;                     // of the soft cap, for a register tile
  // With slots > 1 so many blocks stay packed, one after the other.
  QueryBlock(Carver& carve, const AttentionProblem& p, int64_t slots = 1) {
    q = carve.take<float>(slots * BLOCK * row_words(p.D));
    gout = carve.take<float>(slots * BLOCK * row_words(p.E));
    lse = carve.take<float>(slots * BLOCK);
    delta = carve.take<float>(slots * BLOCK);
    q_pairs = PAIR == 1 ? q : carve.take<float>(slots * BLOCK / PAIR * round_up(p.D, VL));
    gout_pairs = PAIR == 1 ? gout : carve.take<float>(slots * BLOCK / PAIR * round_up(p.E, VL));
    probabilities = carve.take<float>(BLOCK * KEYS);
    gradients = carve.take<float>(BLOCK * KEYS);
    slopes = carve.take<float>(ROWS * KEYS);
  }
  QueryBlock in_slot(const AttentionProblem& p, int64_t slot) const {
    QueryBlock block = *this;
    block.q += slot * BLOCK * row_words(p.D), block.gout += slot * BLOCK * row_words(p.E);
    block.lse += slot * BLOCK, block.delta += slot * BLOCK;
    block.q_pairs += slot * BLOCK / PAIR * round_up(p.D, VL);
    block.gout_pairs += slot * BLOCK / PAIR * round_up(p.E, VL);
    return block;
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
  pack_panels(tile.rows, row_words(p.D), n, words_of(p.D), tile.panels);
  pack_panels(tile.value_rows, row_words(p.E), n, words_of(p.E), tile.value_panels);
  if constexpr (PAIR > 1) pair_rows(tile.rows, n, p.D, tile.row_pairs);
}

// Queries, gradients and statistics of a block. A row that sees no key becomes zero, whatever it
// holds, and so do the rows up to the next register tile.
template <class T>
void pack_query_block(const AttentionProblem& p, const AttentionTensors& t, const AttentionSequence& at,
                      int64_t h, int64_t i0, int64_t n, const QueryBlock& block) {
  const int64_t words_d = row_words(p.D), words_e = row_words(p.E), first = lse_row(at, h, i0);
  const T* q = static_cast<const T*>(t.q) + query_offset(p.q_strides, at, h, i0);
  const T* gout = static_cast<const T*>(t.gout) + query_offset(p.gout_strides, at, h, i0);
  pack_rows(q, p.q_strides.n, n, p.D, query_scale(p.scale), block.q);
  pack_rows(gout, p.gout_strides.n, n, p.E, 1.0f, block.gout);
  for (int64_t r = 0; r < round_up(n, ROWS); ++r) {
    const float lse = r < n ? static_cast<const float*>(t.lse)[first + r] : -INFINITE;
    block.lse[r] = lse == -INFINITE ? INFINITE : lse;
    block.delta[r] = r < n ? static_cast<const float*>(t.delta)[first + r] : 0.0f;
    if (lse != -INFINITE) continue;
    memset(block.q + r * words_d, 0, size_t(words_d) * sizeof(float));
    memset(block.gout + r * words_e, 0, size_t(words_e) * sizeof(float));
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
  const int64_t words_d = row_words(p.D), words_e = row_words(p.E), i0 = pair.i0 + r0;
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
  multiply_panels(n, words_of(p.D), block.q + r0 * words_d, words_d, tile.panels, first / VL, vectors,
                  weights, KEYS, score_scale(p.scale));
  to_logits(p, t, at, pair.h, i0, n, j0, columns, limits, weights, KEYS, slopes);
  probabilities_tile(n, end, limits, weights, KEYS, block.lse + r0);
  multiply_panels(n, words_of(p.E), block.gout + r0 * words_e, words_e, tile.value_panels, first / VL,
                  vectors, gradients, KEYS);
  if (p.with_gweights)
    add_weight_gradients(static_cast<const T*>(t.gweights) + weights_offset(p, at, pair.h, i0) + j0, p.S, n,
                         limits, gradients);
  softmax_gradient_tile(dropout, lse_row(at, pair.h, i0), n, j0, end, limits, weights, gradients,
                        block.delta + r0, slopes);
  return columns;
}

}  // namespace
}  // namespace PYSEQNET_ISA
}  // namespace pyseqnet
