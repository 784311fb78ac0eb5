// The tile of logits that every pass of the generic CUDA kernels works on: which keys its queries see,
// logits in units of log 2, dropout, and the gradient through the softmax.
#pragma once
#include "attention/attention_math.h"
#include "attention/attention_tile.cuh"
#include "common/random.h"

namespace pyseqnet {

// The problem as kernels want it. Statistics (lse, delta) are float, double for double.
template <class T>
struct AttentionInputs {
  using Acc = accumulator_t<T>;
  int64_t B, H, Hk, L, S, D, E, group;
  Operand<const T> q, k, v, gout;
  const Acc *lse, *delta;
  const T* gweights;
  Acc scale, scale_log2;  // scale_log2: logits in units of log 2

  bool causal;
  int64_t causal_offset;
  const int64_t* key_lengths;
  AttentionMask mask_kind;
  bool mask_is_float;  // and T is not
  const void* mask;
  AttentionStrides mask_strides;
  int64_t mask_stride_s;

  bool dropout;
  const int64_t* seed;
  uint32_t threshold;
  Acc keep_scale;  // 1 / (1 - p)
};

// One head of one batch.
struct AttentionHead {
  int64_t b, h, kv, keys;  // kv: head of k and v; keys: visible by length
};
template <class T>
PYSEQNET_DEVICE AttentionHead head_of(const AttentionInputs<T>& a, int64_t b, int64_t h) {
  const int64_t length = a.key_lengths ? clamped_length(a.key_lengths[b], a.S) : a.S;
  return {b, h, h / a.group, length};
}

// Shared memory of a block. `left` and `right` hold the operands of whichever product comes next.
template <class T>
struct alignas(16) AttentionMemory {
  using Acc = accumulator_t<T>;
  using Tile = AttentionTile<T>;
  Acc left[Tile::positions * Tile::line], right[Tile::positions * Tile::line];
  uint64_t row_key[Tile::positions];
  Acc lse[Tile::positions], delta[Tile::positions];  // of the queries; lse in units of log 2
  // Which keys of the tile some of its queries see: bit j of word c is key c + 8 j. Three of them: while one
  // is being filled, another may still be read, and the third is cleared.
  unsigned seen[3][lanes_across];
  unsigned any_seen[3];
  unsigned ever_seen[lanes_across];
};

PYSEQNET_DEVICE bool key_is_seen(const unsigned (&seen)[lanes_across], int key) {
  return seen[key % lanes_across] >> (key / lanes_across) & 1u;
}

// What the mask adds to a logit; -infinity hides the key.
template <class T>
PYSEQNET_DEVICE accumulator_t<T> mask_value(const AttentionInputs<T>& a, int64_t at) {
  using Acc = accumulator_t<T>;
  if (a.mask_kind == AttentionMask::boolean)
    return static_cast<const uint8_t*>(a.mask)[at] ? Acc(0) : -Acc(INFINITY);
  if (sizeof(T) != sizeof(float) && a.mask_is_float) return Acc(static_cast<const float*>(a.mask)[at]);
  return load(static_cast<const T*>(a.mask) + at);
}
template <class T>
PYSEQNET_DEVICE int64_t mask_offset(const AttentionInputs<T>& a, const AttentionHead& head, int64_t query,
                                    int64_t key) {
  return head.b * a.mask_strides.b + head.h * a.mask_strides.h + query * a.mask_strides.n +
         key * a.mask_stride_s;
}

// What holds for pairs of a thread's queries and keys is kept in bits: i * thread_columns + j.
template <class T>
PYSEQNET_DEVICE bool has_pair(uint32_t pairs, int i, int j) {
  return pairs >> (i * AttentionTile<T>::thread_columns + j) & 1u;
}

// Which pairs see each other.
template <class T>
PYSEQNET_DEVICE uint32_t visible_pairs(const AttentionInputs<T>& a, const AttentionHead& head, int64_t query0,
                                       int64_t key0, TilePlace<T> at) {
  using Tile = AttentionTile<T>;
  using Acc = accumulator_t<T>;
  static_assert(Tile::thread_rows * Tile::thread_columns <= 32);
  uint32_t visible = 0;
#pragma unroll 1
  for (int i = 0; i < Tile::thread_rows; i++) {
    const int64_t query = query0 + at.row(i);
    if (query >= a.L) continue;
    const int64_t left = visible_keys(a.causal, a.causal_offset, head.keys, query) - key0;
    const int keys = left < 0 ? 0 : left < Tile::positions ? int(left) : Tile::positions;
    const int64_t line = mask_offset(a, head, query0, key0) + at.row(i) * a.mask_strides.n;
#pragma unroll
    for (int j = 0; j < Tile::thread_columns; j++) {
      bool sees = at.column(j) < keys;
      if (sees && a.mask_kind != AttentionMask::none)
        sees = mask_value(a, line + at.column(j) * a.mask_stride_s) != -Acc(INFINITY);
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
  const bool exists = query0 + t < a.L;
  const int64_t row = (head.b * a.H + head.h) * a.L + query0 + t;
  if (a.dropout) memory.row_key[t] = exists ? dropout_row_key(*a.seed, row) : 0;
  if (with_lse) memory.lse[t] = exists ? a.lse[row] * Acc(log2_e) : -Acc(INFINITY);
  if (with_delta) memory.delta[t] = exists ? a.delta[row] : Acc(0);
}

// Dot products of queries and keys become logits in units of log 2, -infinity for hidden pairs.
template <class T>
PYSEQNET_DEVICE void to_logits(ScoreRegisters<T>& score, uint32_t visible, const AttentionInputs<T>& a,
                               const AttentionHead& head, int64_t query0, int64_t key0, TilePlace<T> at) {
  using Tile = AttentionTile<T>;
  using Acc = accumulator_t<T>;
#pragma unroll
  for (int i = 0; i < Tile::thread_rows; i++)
#pragma unroll
    for (int j = 0; j < Tile::thread_columns; j++)
      score[i][j] = has_pair<T>(visible, i, j) ? score[i][j] * a.scale_log2 : -Acc(INFINITY);
  if (a.mask_kind != AttentionMask::additive) return;
#pragma unroll
  for (int i = 0; i < Tile::thread_rows; i++) {
    const int64_t line = mask_offset(a, head, query0, key0) + at.row(i) * a.mask_strides.n;
#pragma unroll
    for (int j = 0; j < Tile::thread_columns; j++)
      if (has_pair<T>(visible, i, j))
        score[i][j] += mask_value(a, line + at.column(j) * a.mask_stride_s) * Acc(log2_e);
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
PYSEQNET_DEVICE void logits_of_tile(ScoreRegisters<T>& score, AttentionMemory<T>& memory, uint32_t visible,
                                    const AttentionInputs<T>& a, const AttentionHead& head, int64_t query0,
                                    int64_t key0, TilePlace<T> at) {
  similarity<T>(score, memory.left, memory.right, a.q.at(head.b, head.h, query0), a.q,
                positions_of<T>(a.L - query0), a.k.at(head.b, head.kv, key0), a.k,
                positions_of<T>(a.S - key0), a.D, at);
  to_logits<T>(score, visible, a, head, query0, key0, at);
}

// The backward passes: weights W (before them logits) and gradients dZ of logits (before them gout . v).
template <class T>
PYSEQNET_DEVICE void to_gradients(ScoreRegisters<T>& weight, ScoreRegisters<T>& gradient, uint32_t visible,
                                  const AttentionMemory<T>& memory, const AttentionInputs<T>& a,
                                  const AttentionHead& head, int64_t query0, int64_t key0, TilePlace<T> at) {
  using Tile = AttentionTile<T>;
  using Acc = accumulator_t<T>;
  if (a.gweights) {
#pragma unroll
    for (int i = 0; i < Tile::thread_rows; i++) {
      const T* line = a.gweights + ((head.b * a.H + head.h) * a.L + query0) * a.S + key0 + at.row(i) * a.S;
#pragma unroll
      for (int j = 0; j < Tile::thread_columns; j++)
        if (has_pair<T>(visible, i, j)) gradient[i][j] += load(line + at.column(j));
    }
  }
#pragma unroll
  for (int i = 0; i < Tile::thread_rows; i++) {
    const Acc lse = memory.lse[at.row(i)];
#pragma unroll
    for (int j = 0; j < Tile::thread_columns; j++)
      weight[i][j] =
          has_pair<T>(visible, i, j) && lse != -Acc(INFINITY) ? exp2_of(weight[i][j] - lse) : Acc(0);
  }
  const uint32_t kept = kept_pairs(memory, a, key0, at);
  // 0 * NaN must not be computed for what is hidden.
#pragma unroll
  for (int i = 0; i < Tile::thread_rows; i++) {
    const Acc delta = memory.delta[at.row(i)];
#pragma unroll
    for (int j = 0; j < Tile::thread_columns; j++) {
      const Acc keep = has_pair<T>(kept, i, j) ? a.keep_scale : Acc(0), probability = weight[i][j];
      const Acc of_logit = logit_gradient(probability, gradient[i][j], keep, delta);
      gradient[i][j] = probability == 0 ? Acc(0) : of_logit;
      weight[i][j] = probability * keep;
    }
  }
}

// W and dZ of a tile. Enters with free tiles in shared memory, leaves with tiles that others may still read.
template <class T>
PYSEQNET_DEVICE void gradients_of_tile(ScoreRegisters<T>& weight, ScoreRegisters<T>& gradient,
                                       AttentionMemory<T>& memory, uint32_t visible,
                                       const AttentionInputs<T>& a, const AttentionHead& head, int64_t query0,
                                       int64_t key0, TilePlace<T> at) {
  logits_of_tile<T>(weight, memory, visible, a, head, query0, key0, at);
  __syncthreads();
  similarity<T>(gradient, memory.left, memory.right, a.gout.at(head.b, head.h, query0), a.gout,
                positions_of<T>(a.L - query0), a.v.at(head.b, head.kv, key0), a.v,
                positions_of<T>(a.S - key0), a.E, at);
  to_gradients<T>(weight, gradient, visible, memory, a, head, query0, key0, at);
}

// Keys that some query of the tile sees lie before this one, as far as length and causality tell.
template <class T>
PYSEQNET_DEVICE int64_t keys_of_queries(const AttentionInputs<T>& a, const AttentionHead& head,
                                        int64_t query0) {
  const int64_t past = query0 + AttentionTile<T>::positions, last = (past < a.L ? past : a.L) - 1;
  return visible_keys(a.causal, a.causal_offset, head.keys, last);
}

}  // namespace pyseqnet
