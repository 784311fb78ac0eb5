// Contract of the masked softmax attention family (Vaswani et al., Attention is all you need, 2017).
//
//   s[i,j] = scale * sum_d q[i,d] k[j,d]                     scores of batch b, head h
//   z[i,j] = cap(s[i,j]) + bias[i,j] - slope * |i + alibi_offset - j|         logits
//            cap(s) = softcap * tanh(s / softcap), s without a softcap; bias and slope: if given
//   P[i,j] = exp(z[i,j] - lse[i])  where key j is visible to query i, else 0
//   lse[i] = log sum over visible j of exp(z[i,j])           natural logarithm
//   W[i,j] = P[i,j] * keep[i,j] / (1 - dropout_p)            the returned weights; W = P without dropout
//   out[i,e] = sum_j W[i,j] v[j,e]
//
// Backward, for gradients gout, gW (optional) and glse (optional):
//   dW[i,j]  = sum_e gout[i,e] v[j,e] + gW[i,j]
//   delta[i] = sum_e gout[i,e] out[i,e] + sum_j W[i,j] gW[i,j] - glse[i]      (= sum_j W dW - glse)
//   dZ[i,j]  = W[i,j] dW[i,j] - P[i,j] delta[i]   = P * (keep/(1-p) * dW - delta)
//   dS[i,j]  = dZ[i,j] * cap'(s[i,j])             cap'(s) = 1 - tanh(s / softcap)^2
//   gq[i] = scale * sum_j dS[i,j] k[j]     gk[j] = scale * sum_i dS[i,j] q[i]
//   gv[j] = sum_i W[i,j] gout[i]
//   gbias[i,j] = dZ[i,j], summed over every dimension that the bias was broadcast along
// Only q, k, v, out and lse are kept from forward: memory is linear in L and S, in both directions.
//
// Which keys a query sees: j is visible to i iff all of
//   - j < key_lengths[b]                        (if given; kernels clamp the value to 0..S)
//   - j <= i + causal_offset    (if causal; 0 is torch's top-left alignment, S - L bottom-right)
//   - the pattern (attention_blocks.h) lets the pair through, if there is one
//   - mask[i,j] is true, if there is a mask; bias[i,j] is not -inf, if there is a bias.
// Rules at the edges:
//   - A query that sees no key: out = 0, weights = 0, lse = -inf, all its gradients 0. Backward uses neither
//     its q nor its gout (lse = -inf tells): they may hold NaN.
//   - A key that no query sees (of any query head that shares it): never leaks, forward or backward, even if
//     k, v or the bias there hold NaN or infinity; gk = gv = 0. So 0 * v must not be computed for it.
//   - A key masked for some queries only must be finite. A NaN that a query does see makes its row NaN.
//   - L, S, B or H may be 0: with S = 0 no query sees a key. D, E >= 1.
//   - Grouped queries: H = Hk * group, query head h uses key/value head h / group (torch's
//   repeat_interleave).
//
// Packed sequences: B sequences stand one behind the other along the positions. Queries cu_q[b] .. cu_q[b + 1]
// and keys cu_k[b] .. cu_k[b + 1] are sequence b; all of the above holds in each by itself, with i and j
// counted from its beginning. L and S bound the lengths from above (what there is of mask, bias and pattern
// is that large). causal_bottom_right and alibi_bottom_right add each sequence's own S_b - L_b to the offsets.
// Queries and keys that belong to no sequence are neither read nor written.
//
// Dropout: keep[i,j] = dropout_keeps(dropout_row_key(seed, row), j, dropout_threshold(dropout_p)) of
// common/random.h, with the row's index in lse: a function of its arguments only, the same bits for any
// tiling, on CPU and CUDA, in forward and backward. The sum and lse are those before dropout.
//
// Tensors (owned by the caller; element strides; extents of 16-bit and 32-bit problems in `dtype`):
//   q, gq      (B, H, L, D)    strides q_strides, gq_strides;    packed: (H, total_q, D), stride b unused
//   k, gk      (B, Hk, S, D)   k_strides, gk_strides;            packed: (Hk, total_k, D)
//   v, gv      (B, Hk, S, E)   v_strides, gv_strides
//   out, gout  (B, H, L, E)    out_strides, gout_strides
//              the last dimension of each has stride 1; other strides of inputs are anything, 0 included
//              (expanded)
//   mask       (B, H, L, S) by mask_strides, 0 along broadcast dimensions, any stride along S; one byte, 0 or 1
//   bias       likewise by bias_strides; bias_dtype, which is `dtype` or f32
//   gbias      dense (bias_B, bias_H, bias_L, bias_S) in bias_dtype, each extent 1 or that of the problem;
//              every element is written
//   slopes     (B, H), element b * slopes_stride_b + h; float, double for f64
//   key_lengths (B) int64    cu_q, cu_k  (B + 1) int32, rising from 0; kernels clamp    seed  one int64
//   lse, glse, delta  (B, H, L) dense, float; double for f64. Packed: (H, total_q)
//   weights, gweights (B, H, L, S) dense, in dtype
// Accumulation, softmax and delta are in float for f32, bf16, f16 and in double for f64.
#pragma once
#include <string>

#include "attention/attention_blocks.h"
#include "common/dispatch.h"
#include "common/types.h"

namespace pyseqnet {

// Element strides of a (batch, head, position, channel) tensor; channels have stride 1.
struct AttentionStrides {
  int64_t b = 0, h = 0, n = 0;
};

struct AttentionProblem {
  DType dtype = DType::f32;
  int64_t B = 0, H = 0, Hk = 0;        // batch, query heads, key/value heads
  int64_t L = 0, S = 0, D = 0, E = 0;  // queries, keys, head dimension, value dimension
  double scale = 1.0;
  double softcap = 0.0;  // 0: none
  bool causal = false;
  int64_t causal_offset = 0;  // -2^62 < causal_offset < 2^62
  bool with_key_lengths = false;
  double dropout_p = 0.0;  // 0 <= p < 1: p = 1 is settled above the kernels

  bool with_mask = false;
  AttentionStrides mask_strides;  // b, h, and n along the queries
  int64_t mask_stride_s = 0;

  bool with_bias = false;
  DType bias_dtype = DType::f32;
  AttentionStrides bias_strides;
  int64_t bias_stride_s = 0;
  int64_t bias_B = 1, bias_H = 1, bias_L = 1, bias_S = 1;  // extents of the bias before broadcasting

  bool with_slopes = false;  // ALiBi (Press et al., 2022)
  int64_t slopes_stride_b = 0, alibi_offset = 0;

  bool with_blocks = false;
  int64_t block_heads = 1;    // 1 or H
  int64_t block_entries = 0;  // of all heads: what there is to compute

  bool packed = false;
  bool causal_bottom_right = false, alibi_bottom_right = false;
  int64_t total_q = 0, total_k = 0;  // positions of all sequences

  AttentionStrides q_strides, k_strides, v_strides, out_strides;
  AttentionStrides gq_strides, gk_strides, gv_strides, gout_strides;

  // Every line of q, k, v, out, gout and the gradients begins at a multiple of 16 bytes, as the pointers of a
  // call tell (lines_are_aligned): vector and asynchronous copies want it.
  bool lines_aligned = false;

  bool need_q = true, need_kv = true;  // backward: which of gq and (gk, gv) are wanted
  bool with_gweights = false, with_glse = false;

  int64_t group() const { return Hk > 0 ? H / Hk : 1; }
};

// Pointers of one call.
//   forward        q, k, v [mask, bias, slopes, key_lengths, cu_q, cu_k, blocks, seed] -> out, lse
//   weights        q, k, lse [mask, ...]                            -> weights  (every element, 0 where not visible)
//   delta          gout, out, lse [weights, gweights] [glse]        -> delta    (0 where lse = -inf)
//   backward       q, k, v, gout, lse, delta [gweights, mask, ...]  -> gq and/or gk, gv  (every element is written)
//   bias_gradient  as backward                                      -> gbias
struct AttentionTensors {
  const void *q = nullptr, *k = nullptr, *v = nullptr;
  const void *mask = nullptr, *bias = nullptr, *slopes = nullptr;
  const int64_t *key_lengths = nullptr, *seed = nullptr;
  const int32_t *cu_q = nullptr, *cu_k = nullptr;
  AttentionBlocks blocks;
  const void *gout = nullptr, *gweights = nullptr, *glse = nullptr;
  void *out = nullptr, *lse = nullptr, *weights = nullptr, *delta = nullptr;
  void *gq = nullptr, *gk = nullptr, *gv = nullptr, *gbias = nullptr;
};

// What lines_aligned is to be for these tensors; those that are null do not count.
inline bool lines_are_aligned(const AttentionProblem& p, const AttentionTensors& t) {
  constexpr int64_t bytes = 16;
  const struct {
    const void* data;
    const AttentionStrides& strides;
  } tensors[] = {{t.q, p.q_strides},       {t.k, p.k_strides},   {t.v, p.v_strides},   {t.out, p.out_strides},
                 {t.gout, p.gout_strides}, {t.gq, p.gq_strides}, {t.gk, p.gk_strides}, {t.gv, p.gv_strides}};
  for (const auto& [data, s] : tensors) {
    if (!data) continue;
    if (reinterpret_cast<uintptr_t>(data) % bytes) return false;
    for (int64_t stride : {s.b, s.h, s.n})
      if (stride * bytes_of(p.dtype) % bytes) return false;
  }
  return true;
}

enum class AttentionPass : int32_t { forward, weights, delta, backward, bias_gradient };
constexpr AttentionPass all_attention_passes[] = {AttentionPass::forward, AttentionPass::weights,
                                                  AttentionPass::delta, AttentionPass::backward,
                                                  AttentionPass::bias_gradient};
constexpr const char* operation_of(AttentionPass pass) {
  return pass == AttentionPass::forward    ? "attention_forward"
         : pass == AttentionPass::weights  ? "attention_weights"
         : pass == AttentionPass::delta    ? "attention_delta"
         : pass == AttentionPass::backward ? "attention_backward"
                                           : "attention_bias_gradient";
}

std::string describe(const AttentionProblem&);

using AttentionCpuKernel = CpuKernel<AttentionProblem, AttentionTensors>;
using AttentionCudaKernel = CudaKernel<AttentionProblem, AttentionTensors>;
Table<AttentionCpuKernel> attention_cpu_table(AttentionPass);    // attention_table.cpp
Table<AttentionCudaKernel> attention_cuda_table(AttentionPass);  // attention_table.cpp; empty without CUDA

}  // namespace pyseqnet
