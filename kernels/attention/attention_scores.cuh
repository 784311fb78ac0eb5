// The tile of logits that every pass of the generic CUDA kernels works on: which keys its queries see, which
// tiles a pattern leaves, logits in units of log 2, dropout, and the gradient through the softmax.
#pragma once
#include "attention/attention_math.h"
#include "attention/attention_tile.cuh"
#include "common/random.h"

namespace pyseqnet {

// The problem as kernels want it; the names are those of AttentionProblem and AttentionTensors. Statistics
// (lse, delta) are float, double for double.
template <class T>
struct AttentionInputs {
  using Acc = accumulator_t<T>;
  int64_t B, H, Hk, L, S, D, E, group;
  Operand<const T> q, k, v, gout;
  const Acc *lse, *delta;
  const T* gweights;
  Acc scale, scale_log2;  // scale_log2: logits in units of log 2
  Acc softcap;            // 0: none

  bool causal, with_key_lengths;
  int64_t causal_offset;
  const int64_t* key_lengths;
  const uint8_t* mask;  // null: none
  AttentionStrides mask_strides;
  int64_t mask_stride_s;
  const void* bias;    // null: none
  bool bias_is_float;  // and T is not
  AttentionStrides bias_strides;
  int64_t bias_stride_s;
  const Acc* slopes;  // null: none
  int64_t slopes_stride_b, alibi_offset;

  bool with_blocks;
  int64_t block_heads;
  AttentionBlocks blocks;
  bool packed, causal_bottom_right, alibi_bottom_right;
  int64_t total_q, total_k;
  const int32_t *cu_q, *cu_k;

  bool dropout;
  const int64_t* seed;
  uint32_t threshold;
  Acc keep_scale;  // 1 / (1 - p)
};

// Shared memory of a block. `left` and `right` hold the operands of whichever product comes next.
template <class T>
struct alignas(16) AttentionMemory {
  using Acc = accumulator_t<T>;
  using Tile = AttentionTile<T>;
  Acc left[Tile::positions * Tile::line], right[Tile::positions * Tile::line];
  uint64_t row_key[Tile::positions];
  Acc lse[Tile::positions], delta[Tile::positions];  // of the queries; lse in units of log 2
  AttentionSequence at;                              // what the block works on: here it takes no registers
  // Which keys of the tile some of its queries see: bit j of word c is key c + 8 j. Three of them: while one
  // is being filled, another may still be read, and the third is cleared.
  unsigned seen[3][lanes_across];
  unsigned any_seen[3];
  unsigned ever_seen[lanes_across];
};

// One head of one batch entry or packed sequence.
struct AttentionHead {
  const AttentionSequence& at;
  int64_t h, kv;  // query head; head of k and v
};
// A barrier; nobody may still read the sequence before.
template <class T>
PYSEQNET_DEVICE void begin_sequence(AttentionMemory<T>& memory, const AttentionInputs<T>& a, int64_t b) {
  if (threadIdx.x == 0) memory.at = sequence_of(a, a.key_lengths, a.cu_q, a.cu_k, b);
  __syncthreads();
}
template <class T>
PYSEQNET_DEVICE AttentionHead head_of(const AttentionMemory<T>& memory, const AttentionInputs<T>& a,
                                      int64_t h) {
  return {memory.at, h, h / a.group};
}

PYSEQNET_DEVICE bool key_is_seen(const unsigned (&seen)[lanes_across], int key) {
  return seen[key % lanes_across] >> (key / lanes_across) & 1u;
}

// -infinity hides the key.
template <class T>
PYSEQNET_DEVICE accumulator_t<T> bias_value(const AttentionInputs<T>& a, int64_t at) {
  using Acc = accumulator_t<T>;
  if (sizeof(T) != sizeof(float) && a.bias_is_float) return Acc(static_cast<const float*>(a.bias)[at]);
  return load(static_cast<const T*>(a.bias) + at);
}
// The first element of a row of a mask or bias.
PYSEQNET_DEVICE int64_t row_offset(const AttentionStrides& s, int64_t stride_s, const AttentionHead& head,
                                   int64_t query, int64_t key) {
  return head.at.b * s.b + head.h * s.h + query * s.n + key * stride_s;
}

// What holds for pairs of a thread's queries and keys is kept in bits: i * thread_columns + j.
template <class T>
PYSEQNET_DEVICE bool has_pair(uint32_t pairs, int i, int j) {
  return pairs >> (i * AttentionTile<T>::thread_columns + j) & 1u;
}

// A tile of keys, or of queries, on a walk: its first position, and the words of a pattern's bit tile for the
// queries of the pair of tiles, or null.
struct TileStop {
  int64_t first;
  const uint64_t* bits;
};
// The stops of a walk over the tiles of an entry list (or over all tiles: `entries` null). Tiles of doubles
// are quarters of a pattern's.
template <class T>
struct TileStops {
  static constexpr int64_t per_entry = block_tile / AttentionTile<T>::positions;
  const AttentionBlockEntry* entries;
  const uint64_t* bits;  // of the pool
  int64_t count;

  PYSEQNET_DEVICE TileStop keys_at(int64_t step, int64_t query0) const {
    const TileStop stop = at(step);
    return {stop.first, stop.bits ? stop.bits + query0 % block_tile : nullptr};
  }
  PYSEQNET_DEVICE TileStop queries_at(int64_t step) const {
    const TileStop stop = at(step);
    return {stop.first, stop.bits ? stop.bits + stop.first % block_tile : nullptr};
  }
  PYSEQNET_DEVICE TileStop at(int64_t step) const {
    if (!entries) return {step * AttentionTile<T>::positions, nullptr};
    const AttentionBlockEntry entry = entries[step / per_entry];
    const int64_t first = entry.tile * block_tile + step % per_entry * AttentionTile<T>::positions;
    return {first, entry.bits == block_full ? nullptr : bits + entry.bits * block_tile};
  }
};
template <class T>
PYSEQNET_DEVICE TileStops<T> key_stops(const AttentionInputs<T>& a, int64_t h, int64_t query0) {
  if (!a.with_blocks)
    return {nullptr, nullptr, (a.S + AttentionTile<T>::positions - 1) / AttentionTile<T>::positions};
  const int64_t row = block_row(a, h, query0);
  const int32_t begin = a.blocks.row_begin[row], end = a.blocks.row_begin[row + 1];
  return {a.blocks.row_entries + begin, a.blocks.bits, (end - begin) * TileStops<T>::per_entry};
}
template <class T>
PYSEQNET_DEVICE TileStops<T> query_stops(const AttentionInputs<T>& a, int64_t h, int64_t key0) {
  if (!a.with_blocks)
    return {nullptr, nullptr, (a.L + AttentionTile<T>::positions - 1) / AttentionTile<T>::positions};
  const int64_t column = block_column(a, h, key0);
  const int32_t begin = a.blocks.column_begin[column], end = a.blocks.column_begin[column + 1];
  return {a.blocks.column_entries + begin, a.blocks.bits, (end - begin) * TileStops<T>::per_entry};
}
// The stop of one pair of tiles; false where the pattern hides it all.
template <class T>
PYSEQNET_DEVICE bool find_stop(const AttentionInputs<T>& a, int64_t h, int64_t query0, int64_t key0,
                               TileStop& stop) {
  stop = {key0, nullptr};
  if (!a.with_blocks) return true;
  const AttentionBlockEntry* entry = find_block(a.blocks, block_row(a, h, query0), key0 / block_tile);
  if (!entry) return false;
  if (entry->bits != block_full) stop.bits = a.blocks.bits + entry->bits * block_tile + query0 % block_tile;
  return true;
}
// With one pattern for all heads the longest lists come first; with causality the last queries, who see the
// most keys.
template <class T>
PYSEQNET_DEVICE int64_t query_tile_of(const AttentionInputs<T>& a, unsigned tiles, unsigned tile) {
  const bool ordered = a.with_blocks && a.block_heads == 1 && TileStops<T>::per_entry == 1;
  return ordered ? a.blocks.row_order[tile] : tiles - 1 - tile;
}

// Which pairs see each other.
template <class T>
PYSEQNET_DEVICE uint32_t visible_pairs(const AttentionInputs<T>& a, const AttentionHead& head, int64_t query0,
                                       int64_t key0, const uint64_t* bits, TilePlace<T> at) {
  using Tile = AttentionTile<T>;
  using Acc = accumulator_t<T>;
  static_assert(Tile::thread_rows * Tile::thread_columns <= 32);
  uint32_t visible = 0;
#pragma unroll 1
  for (int i = 0; i < Tile::thread_rows; i++) {
    const int64_t query = query0 + at.row(i);
    if (query >= head.at.L) continue;
    const int64_t left = visible_keys(a.causal, head.at.causal_offset, head.at.length, query) - key0;
    const int keys = left < 0 ? 0 : left < Tile::positions ? int(left) : Tile::positions;
    const int64_t mask_line = row_offset(a.mask_strides, a.mask_stride_s, head, query, key0);
    const int64_t bias_line = row_offset(a.bias_strides, a.bias_stride_s, head, query, key0);
    const uint64_t word = bits ? bits[at.row(i)] >> (key0 % block_tile) : ~uint64_t(0);
#pragma unroll
    for (int j = 0; j < Tile::thread_columns; j++) {
      const int column = at.column(j);
      bool sees = column < keys && (word >> column & 1);
      if (sees && a.mask) sees = a.mask[mask_line + column * a.mask_stride_s] != 0;
      if (sees && a.bias) sees = bias_value(a, bias_line + column * a.bias_stride_s) != -Acc(INFINITY);
      visible |= uint32_t(sees) << (i * Tile::thread_columns + j);
    }
  }
  return visible;
}

template <class T>
PYSEQNET_DEVICE void clear_seen(AttentionMemory<T>& memory) {
  const int t = int(threadIdx.x);
  if (t < lanes_across) {
    memory.ever_seen[t] = 0;
#pragma unroll
    for (int slot = 0; slot < 3; slot++) memory.seen[slot][t] = 0;
  }
  if (t < 3) memory.any_seen[t] = 0;
  __syncthreads();
}

// A walk over tiles of queries x keys. enter() says which pairs see each other and whether any do; it is a
// barrier: behind it all tiles in shared memory are free, and what threads wrote before it can be read.
template <class T>
class TileWalk {
 public:
  using Tile = AttentionTile<T>;

  PYSEQNET_DEVICE bool enter(AttentionMemory<T>& memory, uint32_t visible, TilePlace<T> at) {
    slot_ = slot_ == 2 ? 0 : slot_ + 1;
    unsigned keys = 0;
#pragma unroll
    for (int i = 0; i < Tile::thread_rows; i++) keys |= visible >> (i * Tile::thread_columns);
    keys &= (1u << Tile::thread_columns) - 1;
    keys = reduce_lanes<Lanes::column>(keys, [](unsigned x, unsigned y) { return x | y; });
    if (TilePlace<T>::leads_column(threadIdx.x) && keys) {
      atomicOr(&memory.seen[slot_][at.first_column], keys);
      atomicOr(&memory.any_seen[slot_], 1u);
    }
    __syncthreads();
    const int t = int(threadIdx.x), next = slot_ == 2 ? 0 : slot_ + 1, cleared = next == 2 ? 0 : next + 1;
    if (t < lanes_across) {
      memory.ever_seen[t] |= memory.seen[slot_][t];
      memory.seen[cleared][t] = 0;
    }
    if (t == 0) memory.any_seen[cleared] = 0;
    return memory.any_seen[slot_] != 0;
  }
  PYSEQNET_DEVICE bool key_seen(const AttentionMemory<T>& memory, int key) const {
    return key_is_seen(memory.seen[slot_], key);
  }

 private:
  int slot_ = 0;
};

// Gathers what belongs to the queries of a tile: dropout's keys, and in the backward passes lse and delta.
template <class T, bool with_lse, bool with_delta>
PYSEQNET_DEVICE void stage_queries(AttentionMemory<T>& memory, const AttentionInputs<T>& a,
                                   const AttentionHead& head, int64_t query0) {
  using Acc = accumulator_t<T>;
  const int t = int(threadIdx.x);
  if (t >= AttentionTile<T>::positions) return;
  const bool exists = query0 + t < head.at.L;
  const int64_t row = lse_row(head.at, head.h, query0 + t);
  if (a.dropout) memory.row_key[t] = exists ? dropout_row_key(*a.seed, row) : 0;
  if (with_lse) memory.lse[t] = exists ? a.lse[row] * Acc(log2_e) : -Acc(INFINITY);
  if (with_delta) memory.delta[t] = exists ? a.delta[row] : Acc(0);
}

// A bias of the lowest finite number must not become -infinity in units of log 2.
PYSEQNET_DEVICE float in_log2_units(float x) { return fmaxf(x * float(log2_e), -0x1p126f); }
PYSEQNET_DEVICE double in_log2_units(double x) { return fmax(x * log2_e, -0x1p1022); }

// The logits of one query, in units of log 2.
template <class T>
struct LogitRow {
  using Acc = accumulator_t<T>;
  int64_t bias_line, distance;  // from the first key of the tile
  Acc slope;

  PYSEQNET_DEVICE LogitRow(const AttentionInputs<T>& a, const AttentionHead& head, int64_t query,
                           int64_t key0)
      : bias_line(row_offset(a.bias_strides, a.bias_stride_s, head, query, key0)),
        distance(query + head.at.alibi_offset - key0),
        slope(a.slopes ? a.slopes[head.at.b * a.slopes_stride_b + head.h] : Acc(0)) {}
  // Of a dot product of query and key; `derivative`: of the soft cap.
  PYSEQNET_DEVICE Acc of(const AttentionInputs<T>& a, Acc product, int column, Acc& derivative) const {
    Acc z = product * a.scale_log2;
    derivative = 1;
    if (a.softcap > 0) {
      const Capped<Acc> capped = soft_cap(product * a.scale, a.softcap);
      z = capped.value * Acc(log2_e), derivative = capped.slope;
    }
    if (a.bias) z += in_log2_units(bias_value(a, bias_line + column * a.bias_stride_s));
    if (a.slopes) z += alibi_of(slope, distance, 0, column) * Acc(log2_e);
    return z;
  }
};

// Dot products of queries and keys become logits in units of log 2, -infinity for hidden pairs.
template <class T>
PYSEQNET_DEVICE void to_logits(ScoreRegisters<T>& score, uint32_t visible, const AttentionInputs<T>& a,
                               const AttentionHead& head, int64_t query0, int64_t key0, TilePlace<T> at) {
  using Tile = AttentionTile<T>;
  using Acc = accumulator_t<T>;
  const bool plain = !a.bias && !a.slopes && !(a.softcap > 0);
#pragma unroll
  for (int i = 0; i < Tile::thread_rows; i++) {
    const LogitRow<T> row(a, head, query0 + at.row(i), key0);
#pragma unroll
    for (int j = 0; j < Tile::thread_columns; j++) {
      const bool sees = has_pair<T>(visible, i, j);
      Acc unused;
      score[i][j] = !sees   ? -Acc(INFINITY)
                    : plain ? score[i][j] * a.scale_log2
                            : row.of(a, score[i][j], at.column(j), unused);
    }
  }
}

// Which pairs dropout keeps.
template <class T>
PYSEQNET_DEVICE uint32_t kept_pairs(const AttentionMemory<T>& memory, const AttentionInputs<T>& a,
                                    int64_t key0, TilePlace<T> at) {
  using Tile = AttentionTile<T>;
  if (!a.dropout) return ~uint32_t(0);
  uint32_t kept = 0;
#pragma unroll 1
  for (int i = 0; i < Tile::thread_rows; i++) {
    const uint64_t row_key = memory.row_key[at.row(i)];
#pragma unroll
    for (int j = 0; j < Tile::thread_columns; j++)
      kept |= uint32_t(dropout_keeps(row_key, key0 + at.column(j), a.threshold))
              << (i * Tile::thread_columns + j);
  }
  return kept;
}

template <class T>
PYSEQNET_DEVICE void products_of_tile(ScoreRegisters<T>& score, AttentionMemory<T>& memory,
                                      const AttentionInputs<T>& a, const AttentionHead& head, int64_t query0,
                                      int64_t key0, TilePlace<T> at) {
  similarity<T>(
      score, memory.left, memory.right, a.q.data + query_offset(a.q.strides, head.at, head.h, query0), a.q,
      positions_of<T>(head.at.L - query0), a.k.data + key_offset(a.k.strides, head.at, head.kv, key0), a.k,
      positions_of<T>(head.at.S - key0), a.D, at);
}
template <class T>
PYSEQNET_DEVICE void logits_of_tile(ScoreRegisters<T>& score, AttentionMemory<T>& memory, uint32_t visible,
                                    const AttentionInputs<T>& a, const AttentionHead& head, int64_t query0,
                                    int64_t key0, TilePlace<T> at) {
  products_of_tile<T>(score, memory, a, head, query0, key0, at);
  to_logits<T>(score, visible, a, head, query0, key0, at);
}

// The backward passes: weights W (before them dot products q . k) and gradients of scores, or of logits
// (before them gout . v).
template <class T, bool of_logits>
PYSEQNET_DEVICE void to_gradients(ScoreRegisters<T>& weight, ScoreRegisters<T>& gradient, uint32_t visible,
                                  const AttentionMemory<T>& memory, const AttentionInputs<T>& a,
                                  const AttentionHead& head, int64_t query0, int64_t key0, TilePlace<T> at) {
  using Tile = AttentionTile<T>;
  using Acc = accumulator_t<T>;
  const uint32_t kept = kept_pairs(memory, a, key0, at);
  const bool plain = !a.bias && !a.slopes && !(a.softcap > 0);
#pragma unroll
  for (int i = 0; i < Tile::thread_rows; i++) {
    const Acc lse = memory.lse[at.row(i)], delta = memory.delta[at.row(i)];
    const LogitRow<T> row(a, head, query0 + at.row(i), key0);
    const T* gweights = a.gweights + weights_offset(a, head.at, head.h, query0 + at.row(i)) + key0;
#pragma unroll
    for (int j = 0; j < Tile::thread_columns; j++) {
      const bool sees = has_pair<T>(visible, i, j) && lse != -Acc(INFINITY);
      Acc probability = 0, derivative = 1, of_weight = gradient[i][j];
      if (sees) {
        const Acc product = weight[i][j];
        const Acc z = (plain ? product * a.scale_log2 : row.of(a, product, at.column(j), derivative)) - lse;
        probability = exp2_of(z > 0 ? Acc(0) : z);  // at most 1, however large what it was computed from
        if (a.gweights) of_weight += load(gweights + at.column(j));
      }
      const Acc keep = has_pair<T>(kept, i, j) ? a.keep_scale : Acc(0);
      Acc of_logit = logit_gradient(probability, of_weight, keep, delta);
      if (!of_logits) of_logit *= derivative;
      gradient[i][j] =
          probability == 0 ? Acc(0) : of_logit;  // 0 * NaN must not be computed for what is hidden
      weight[i][j] = probability * keep;
    }
  }
}

// W and the gradients of a tile. Enters with free tiles in shared memory, leaves with tiles that others may
// still read.
template <class T, bool of_logits = false>
PYSEQNET_DEVICE void gradients_of_tile(ScoreRegisters<T>& weight, ScoreRegisters<T>& gradient,
                                       AttentionMemory<T>& memory, uint32_t visible,
                                       const AttentionInputs<T>& a, const AttentionHead& head, int64_t query0,
                                       int64_t key0, TilePlace<T> at) {
  products_of_tile<T>(weight, memory, a, head, query0, key0, at);
  __syncthreads();
  similarity<T>(gradient, memory.left, memory.right,
                a.gout.data + query_offset(a.gout.strides, head.at, head.h, query0), a.gout,
                positions_of<T>(head.at.L - query0),
                a.v.data + key_offset(a.v.strides, head.at, head.kv, key0), a.v,
                positions_of<T>(head.at.S - key0), a.E, at);
  to_gradients<T, of_logits>(weight, gradient, visible, memory, a, head, query0, key0, at);
}

// Keys that some query of the tile sees lie before this one, as far as length and causality tell.
template <class T>
PYSEQNET_DEVICE int64_t keys_of_queries(const AttentionInputs<T>& a, const AttentionHead& head,
                                        int64_t query0) {
  const int64_t past = query0 + AttentionTile<T>::positions, last = (past < head.at.L ? past : head.at.L) - 1;
  return visible_keys(a.causal, head.at.causal_offset, head.at.length, last);
}

}  // namespace pyseqnet
