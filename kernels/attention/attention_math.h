// The maths of softmax attention that every target shares: which keys a row sees, the online softmax step,
// and the gradient through the softmax. Oracle, CPU kernel and CUDA kernel include these lines.
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
#include <cstdint>

#include "attention/attention.h"
#include "common/numerics.h"

namespace pyseqnet {

constexpr double log2_e = 1.4426950408889634074, ln_2 = 0.6931471805599453094;

PYSEQNET_HOST_DEVICE float exp2_of(float x) { return __builtin_exp2f(x); }
PYSEQNET_HOST_DEVICE double exp2_of(double x) { return __builtin_exp2(x); }
PYSEQNET_HOST_DEVICE float log2_of(float x) { return __builtin_log2f(x); }
PYSEQNET_HOST_DEVICE double log2_of(double x) { return __builtin_log2(x); }

// Number of leading keys that a row may see at all, by length and causality; a mask may hide more of them.
PYSEQNET_HOST_DEVICE int64_t clamped_length(int64_t length, int64_t S) {
  return length < 0 ? 0 : length > S ? S : length;
}
PYSEQNET_HOST_DEVICE int64_t visible_keys(bool causal, int64_t causal_offset, int64_t length, int64_t i) {
  if (!causal) return length;
  const int64_t end = i + causal_offset + 1;
  return end < 0 ? 0 : end < length ? end : length;
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
