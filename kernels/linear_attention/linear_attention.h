// Contract of the linear-attention family (Katharopoulos, Vyas, Pappas, Fleuret: Transformers are RNNs,
// 2020).
//
//   a[i] = phi(scale q[i])   f[j] = phi(k[j])                     phi: see linear_attention_features.h
//   S[i] = S0 + sum of f[j] v[j]^T                                over the keys j that query i sees
//   z[i] = z0 + sum of f[j]
//   normalised   out[i] = S[i]^T a[i] / (z[i] . a[i] + eps)       as fast-transformers; 0 where that sum is 0
//   plain        out[i] = S[i]^T a[i]
//
// With a decay g of the head, 0 <= g <= 1, causal only (Sun et al.: Retentive network, 2023), the state fades
// by g before each key enters, z likewise:
//   S[i] = g S[i-1] + f[i] v[i]^T,  S[-1] = S0                    (g = 1: the sums above)
// so that key j weighs g^(i-j) with query i. Positions beyond the length are none: there nothing fades.
//
// The map `softmax` (Shen et al.: Efficient attention, 2021; not causal, no states in or out) is two maps:
//   a[i] = exp(scale q[i] - its largest)    f[j] = exp(k[j] - log_sum), log_sum[d] = log sum of exp k[j][d]
// so that z = 1 and the normaliser (eps = 0) makes the first a softmax over features; the second is one over
// keys. Where z would be saved, log_sum is. Without keys out is 0. In the backward r[d] = -R[d] . S[d].
//
// Packed sequences: B sequences stand one behind the other along the rows of tensors without a batch; rows
// starts[b] .. starts[b + 1] are sequence b's, L = S is the length of the longest.
//
// A query sees the keys j < length of its batch; with `causal` (L = S) also j <= i. Keys beyond the length
// count nowhere and are never read: their gradients are 0, whatever they hold. A query whose output gradient
// is all zero adds nothing to any gradient, whatever it holds.
//
// What backward needs, and any forward kernel leaves for any backward kernel:
//   inverse   1 / (z . a + eps), or 0 where out is 0 by rule; only with `normalize`
//   saved     causal: the state (S, then z: D*E + D numbers) at the start of every chunk of `chunk_rows`
//   rows,
//             so that backward is one reverse sweep; otherwise: the one state that every query sees
//
//   dn = gout inverse, dd = -(gout . out) inverse                 (plain: dn = gout, dd = 0)
//   da[i] = S[i] dn[i] + z[i] dd[i]                               dq = da phi' scale
//   R[j]  = gS + sum of a[i] dn[i]^T, r[j] = gz + sum of a[i] dd[i]   over the queries i that see key j
//                                                      (with decay: R[j] = g R[j+1] + a[j] dn[j]^T)
//   df[j] = R[j] v[j] + r[j]                                      dk = df phi'
//   dv[j] = R[j]^T f[j]                                           dS0, dz0 = R, r over all queries
//   dg = sum over the keys j of R[j] . S[j-1] + r[j] . z[j-1]     in one share for every chunk of rows: which
//                                        share holds which terms is the kernel's, their sum is the gradient
//
// Tensors, owned by the caller. Rows of q, k, v, out and their gradients have unit stride and lie at
// b strides.b + h strides.h + row strides.row; everything else is dense.
//   q, dq (B,H,L,D)   k, dk (B,H,S,D)   v, dv (B,H,S,E)   out, gout (B,H,L,E)    in the problem's dtype
//   key_lengths (B) int64; values outside 0 .. S count as the nearest of them
//   decay (H) float64   starts (B + 1) int32, rising from 0; kernels clamp. Packed: q ... gout (1,H,total,.)
//   state0, state, gstate, dstate0 (B,H,D,E)   normalizer0 ... (B,H,D)           float32, float64 for float64
//   inverse (B,H,L)   saved (B,H,saved_states()*(D*E + D))                       likewise; packed:
//   inverse (1,H,total), causal saved (1,H,slots()*(D*E + D)): a sequence's chunks from first_slot() on
//   ddecay: one number for each causal saved state, likewise; packed: zeros on arrival
#pragma once
#include <string>

#include "common/dispatch.h"
#include "common/numerics.h"
#include "common/types.h"

namespace pyseqnet {

enum class FeatureMap : int32_t { identity, elu, relu, exp, softmax };
constexpr int feature_maps = 5;
constexpr const char* name_of(FeatureMap f) {
  constexpr const char* names[feature_maps] = {"identity", "elu", "relu", "exp", "softmax"};
  return names[int(f)];
}

struct HeadStrides {
  int64_t b = 0, h = 0, row = 0;
};

struct LinearAttentionProblem {
  // Within a chunk attention is a small masked matrix, between chunks a state. 64 rows balance the two at the
  // usual head sizes, and make the saved states of D = 64 as large as one input.
  static constexpr int64_t chunk_rows = 64;

  DType dtype = DType::f32;
  int64_t B = 0, H = 0, L = 0, S = 0, D = 1, E = 1;
  FeatureMap feature_map = FeatureMap::elu;
  bool causal = false, normalize = true, decayed = false;
  bool packed = false;
  int64_t total = 0;        // rows of all packed sequences
  bool with_saved = false;  // forward: whether inverse and saved are written
  double scale = 1, eps = 1e-6;
  HeadStrides q, k, v, out, gout, dq, dk, dv;
  bool lines_aligned = false;  // every row begins at a multiple of 16 bytes

  PYSEQNET_HOST_DEVICE bool softmax() const { return feature_map == FeatureMap::softmax; }
  int64_t heads() const { return B * H; }
  int64_t chunks() const { return (L + chunk_rows - 1) / chunk_rows; }
  PYSEQNET_HOST_DEVICE int64_t state_size() const { return D * E + D; }
  int64_t saved_states() const { return causal ? chunks() : 1; }
  // Packed: enough places for the chunks of all sequences, whatever their lengths, that a device need not
  // look at them to know where a sequence's are.
  PYSEQNET_HOST_DEVICE static int64_t first_slot(int64_t start, int64_t b) { return start / chunk_rows + b; }
  PYSEQNET_HOST_DEVICE int64_t slots() const { return first_slot(total, B); }
};

// The rows of one head: `begin` rows into the caller's tensors, how many, and where its share of what
// backward needs begins, in rows of `inverse` and states of `saved`.
struct LinearAttentionRows {
  int64_t begin, L, S, keys, inverse, saved;
};

// Pointers of one call; null where the call has no such tensor.
//   forward   q, k, v [key_lengths, decay, starts, state0 + normalizer0]
//             -> out [inverse + saved, state + normalizer]
//   backward  gout [gstate, gnormalizer], q, k, v [key_lengths, decay, starts], out, inverse, saved
//             -> dq, dk, dv [dstate0 + dnormalizer0, ddecay]
struct LinearAttentionTensors {
  const void *q = nullptr, *k = nullptr, *v = nullptr;
  const int64_t* key_lengths = nullptr;
  const double* decay = nullptr;
  const int32_t* starts = nullptr;
  const void *state0 = nullptr, *normalizer0 = nullptr;
  void* out = nullptr;  // read by backward
  void *inverse = nullptr, *saved = nullptr;
  void *state = nullptr, *normalizer = nullptr;
  const void *gout = nullptr, *gstate = nullptr, *gnormalizer = nullptr;
  void *dq = nullptr, *dk = nullptr, *dv = nullptr;
  void *dstate0 = nullptr, *dnormalizer0 = nullptr, *ddecay = nullptr;

  PYSEQNET_HOST_DEVICE static int64_t between(int64_t low, int64_t n, int64_t high) {
    return n < low ? low : n > high ? high : n;
  }
  PYSEQNET_HOST_DEVICE LinearAttentionRows rows(const LinearAttentionProblem& p, int64_t b, int64_t h) const {
    const int64_t head = b * p.H + h;
    if (!p.packed) {
      const int64_t keys = key_lengths ? between(0, key_lengths[b], p.S) : p.S;
      const int64_t states = p.causal ? (p.L + p.chunk_rows - 1) / p.chunk_rows : 1;
      return {0, p.L, p.S, keys, head * p.L, head * states};
    }
    const int64_t begin = between(0, starts[b], p.total);
    const int64_t n = between(0, starts[b + 1] - begin, p.L < p.total - begin ? p.L : p.total - begin);
    return {begin, n, n, n, h * p.total + begin, p.causal ? h * p.slots() + p.first_slot(begin, b) : head};
  }
};

enum class LinearAttentionPass : int32_t { forward, backward };
constexpr const char* operation_of(LinearAttentionPass pass) {
  return pass == LinearAttentionPass::forward ? "linear_attention_forward" : "linear_attention_backward";
}

std::string describe(const LinearAttentionProblem&);

using LinearAttentionCpuKernel = CpuKernel<LinearAttentionProblem, LinearAttentionTensors>;
using LinearAttentionCudaKernel = CudaKernel<LinearAttentionProblem, LinearAttentionTensors>;
Table<LinearAttentionCpuKernel> linear_attention_cpu_table(
    LinearAttentionPass);  // linear_attention_table.cpp
Table<LinearAttentionCudaKernel> linear_attention_cuda_table(LinearAttentionPass);  // empty without CUDA

}  // namespace pyseqnet
