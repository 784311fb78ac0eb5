// The maths of softmax attention that every target shares: which keys a row sees, the online softmax step,
// and the gradient through the softmax. Oracle, CPU kernel and CUDA kernel include these lines.
//
// A call's sequence is one batch entry, or one of the packed sequences; sequence_of tells where it lies.
//
// Online softmax (Milakov and Gimelshein, 2018): keys arrive in tiles; a row keeps the largest logit so far
// and the sum of exponentials relative to it. Kernels may hold logits in units of log 2 (scale and mask times
// log2_e): the step below is then exp2 and nothing else changes.
//
// A mask of the lowest finite number is common ("masked" in code that fears infinity). A row that holds
// nothing else must come out as the mean of its values, not as 0 or NaN, with finite gradients: in units of
// log 2 that number overflows. Keep such logits in natural units, exp2((z - origin) * log2_e), or keep them
// finite by a clamp.
#pragma once
#include <cmath>
#include <cstdint>

#include "attention/attention.h"
#include "common/numerics.h"

namespace pyseqnet {

constexpr double log2_e = 1.4426950408889634074, ln_2 = 0.6931471805599453094;

PYSEQNET_HOST_DEVICE float exp2_of(float x) { return __builtin_exp2f(x); }
PYSEQNET_HOST_DEVICE double exp2_of(double x) { return __builtin_exp2(x); }
PYSEQNET_HOST_DEVICE float log2_of(float x) { return __builtin_log2f(x); }
PYSEQNET_HOST_DEVICE double log2_of(double x) { return __builtin_log2(x); }
// Of one number; lanes have their own.
PYSEQNET_HOST_DEVICE float tanh_of(float x) { return ::tanhf(x); }
PYSEQNET_HOST_DEVICE double tanh_of(double x) { return ::tanh(x); }

// Number of leading keys that a row may see at all, by length and causality; a mask may hide more of them.
PYSEQNET_HOST_DEVICE int64_t clamped_length(int64_t length, int64_t S) {
  return length < 0 ? 0 : length > S ? S : length;
}
PYSEQNET_HOST_DEVICE int64_t visible_keys(bool causal, int64_t causal_offset, int64_t length, int64_t i) {
  if (!causal) return length;
  const int64_t end = i + causal_offset + 1;
  return end < 0 ? 0 : end < length ? end : length;
}

// Where the queries and keys of batch entry (or packed sequence) b lie.
struct AttentionSequence {
  int64_t b, batch, q_begin, k_begin;
  int64_t L, S, length;  // queries; keys; keys visible by key_lengths
  int64_t causal_offset, alibi_offset;
  int64_t first_row, head_rows;  // query i of head h is row first_row + h * head_rows + i of lse
};
// P: AttentionProblem, or what has its fields.
template <class P>
PYSEQNET_HOST_DEVICE AttentionSequence sequence_of(const P& p, const int64_t* key_lengths,
                                                   const int32_t* cu_q, const int32_t* cu_k, int64_t b) {
  AttentionSequence s = {b, b, 0, 0, p.L, p.S, p.S, p.causal_offset, p.alibi_offset, b * p.H * p.L, p.L};
  if (p.packed) {
    s.batch = 0, s.q_begin = clamped_length(cu_q[b], p.total_q),
    s.k_begin = clamped_length(cu_k[b], p.total_k);
    const int64_t queries = cu_q[b + 1] - s.q_begin, keys = cu_k[b + 1] - s.k_begin;
    const int64_t queries_left = p.total_q - s.q_begin, keys_left = p.total_k - s.k_begin;
    s.L = clamped_length(queries, queries_left < p.L ? queries_left : p.L);
    s.S = s.length = clamped_length(keys, keys_left < p.S ? keys_left : p.S);
    if (p.causal_bottom_right) s.causal_offset += s.S - s.L;
    if (p.alibi_bottom_right) s.alibi_offset += s.S - s.L;
    s.first_row = s.q_begin, s.head_rows = p.total_q;
  }
  if (p.with_key_lengths) s.length = clamped_length(key_lengths[b], s.S);
  return s;
}

// Offsets of query i of query head h, of key j of key head hk, of the query's row in lse and in weights.
PYSEQNET_HOST_DEVICE int64_t query_offset(const AttentionStrides& s, const AttentionSequence& at, int64_t h,
                                          int64_t i) {
  return at.batch * s.b + h * s.h + (at.q_begin + i) * s.n;
}
PYSEQNET_HOST_DEVICE int64_t key_offset(const AttentionStrides& s, const AttentionSequence& at, int64_t hk,
                                        int64_t j) {
  return at.batch * s.b + hk * s.h + (at.k_begin + j) * s.n;
}
PYSEQNET_HOST_DEVICE int64_t lse_row(const AttentionSequence& at, int64_t h, int64_t i) {
  return at.first_row + h * at.head_rows + i;
}
template <class P>
PYSEQNET_HOST_DEVICE int64_t weights_offset(const P& p, const AttentionSequence& at, int64_t h, int64_t i) {
  return ((at.b * p.H + h) * p.L + i) * p.S;
}
// The pattern's list for query i of head h.
template <class P>
PYSEQNET_HOST_DEVICE int64_t block_row(const P& p, int64_t h, int64_t i) {
  return (p.block_heads > 1 ? h * block_tiles_of(p.L) : 0) + i / block_tile;
}
template <class P>
PYSEQNET_HOST_DEVICE int64_t block_column(const P& p, int64_t h, int64_t j) {
  return (p.block_heads > 1 ? h * block_tiles_of(p.S) : 0) + j / block_tile;
}

// What soft-capping does to a score, and its derivative there.
template <class A>
struct Capped {
  A value, slope;
};
template <class A>
PYSEQNET_HOST_DEVICE Capped<A> soft_cap(A score, A cap) {
  const A t = tanh_of(score / cap);
  return {cap * t, A(1) - t * t};
}
// What ALiBi adds to a logit.
template <class A>
PYSEQNET_HOST_DEVICE A alibi_of(A slope, int64_t i, int64_t alibi_offset, int64_t j) {
  const int64_t distance = i + alibi_offset - j;
  return -slope * A(distance < 0 ? -distance : distance);
}

// Logits in units of log 2; `largest` starts at -infinity, `sum` at 0.
template <class A>
struct SoftmaxState {
  A largest, sum;
};

// What exponents are relative to: the largest logit, but 0 while no key was seen, for -inf - -inf is not a
// number.
template <class A>
PYSEQNET_HOST_DEVICE A softmax_origin(A largest) {
  return largest == -A(__builtin_inf()) ? A(0) : largest;
}
// Takes in a tile whose largest logit is tile_largest; returns the factor for everything summed so far. The
// caller then adds exp2(z - softmax_origin(state.largest)) for each logit of the tile to state.sum.
template <class A>
PYSEQNET_HOST_DEVICE A softmax_step(SoftmaxState<A>& state, A tile_largest) {
  const A largest = tile_largest > state.largest ? tile_largest : state.largest;
  const A factor = exp2_of(state.largest - softmax_origin(largest));
  state.largest = largest;
  state.sum *= factor;
  return factor;
}
// 1 / sum, and 0 for a row that saw no key. A NaN sum stays one.
template <class A>
PYSEQNET_HOST_DEVICE A softmax_inverse(const SoftmaxState<A>& state) {
  return state.sum == A(0) ? A(0) : A(1) / state.sum;
}
// Natural log-sum-exp.
template <class A>
PYSEQNET_HOST_DEVICE A softmax_lse(const SoftmaxState<A>& state) {
  return state.sum == A(0) ? -A(__builtin_inf())
                           : (softmax_origin(state.largest) + log2_of(state.sum)) * A(ln_2);
}

// Gradient of a logit. probability: before dropout; gradient: of the returned weight, gout . v + gW; keep: 0
// or 1 / (1 - p).
template <class A>
PYSEQNET_HOST_DEVICE A logit_gradient(A probability, A gradient, A keep, A delta) {
  return probability * (keep * gradient - delta);
}

}  // namespace pyseqnet
