// Contract of the linear-attention family (Katharopoulos, Vyas, Pappas, Fleuret: Transformers are RNNs,
// 2020).
//
//   a[i] = phi(scale q[i])   f[j] = phi(k[j])                     phi: identity, elu(x) + 1, max(x, 0)
//   S[i] = S0 + sum of f[j] v[j]^T                                over the keys j that query i sees
//   z[i] = z0 + sum of f[j]
//   normalised   out[i] = S[i]^T a[i] / (z[i] . a[i] + eps)       as fast-transformers; 0 where that sum is 0
//   plain        out[i] = S[i]^T a[i]
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
//   df[j] = R[j] v[j] + r[j]                                      dk = df phi'
//   dv[j] = R[j]^T f[j]                                           dS0, dz0 = R, r over all queries
//
// Tensors, owned by the caller. Rows of q, k, v, out and their gradients have unit stride and lie at
// b strides.b + h strides.h + row strides.row; everything else is dense.
//   q, dq (B,H,L,D)   k, dk (B,H,S,D)   v, dv (B,H,S,E)   out, gout (B,H,L,E)    in the problem's dtype
//   key_lengths (B) int64; values outside 0 .. S count as the nearest of them
//   state0, state, gstate, dstate0 (B,H,D,E)   normalizer0 ... (B,H,D)           float32, float64 for float64
//   inverse (B,H,L)   saved (B,H,saved_states()*(D*E + D))                       likewise
#pragma once
#include <string>

#include "common/dispatch.h"
#include "common/types.h"

namespace pyseqnet {

enum class FeatureMap : int32_t { identity, elu, relu };
constexpr int feature_maps = 3;
constexpr const char* name_of(FeatureMap f) {
  return f == FeatureMap::identity ? "identity" : f == FeatureMap::elu ? "elu" : "relu";
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
  bool causal = false, normalize = true;
  bool with_saved = false;  // forward: whether inverse and saved are written
  double scale = 1, eps = 1e-6;
  HeadStrides q, k, v, out, gout, dq, dk, dv;

  int64_t heads() const { return B * H; }
  int64_t chunks() const { return (L + chunk_rows - 1) / chunk_rows; }
  int64_t state_size() const { return D * E + D; }
  int64_t saved_states() const { return causal ? chunks() : 1; }
};

// Pointers of one call; null where the call has no such tensor.
//   forward   q, k, v [key_lengths, state0 + normalizer0] -> out [inverse + saved, state + normalizer]
//   backward  gout [gstate, gnormalizer], q, k, v [key_lengths], out, inverse, saved
//             -> dq, dk, dv [dstate0 + dnormalizer0]
struct LinearAttentionTensors {
  const void *q = nullptr, *k = nullptr, *v = nullptr;
  const int64_t* key_lengths = nullptr;
  const void *state0 = nullptr, *normalizer0 = nullptr;
  void* out = nullptr;  // read by backward
  void *inverse = nullptr, *saved = nullptr;
  void *state = nullptr, *normalizer = nullptr;
  const void *gout = nullptr, *gstate = nullptr, *gnormalizer = nullptr;
  void *dq = nullptr, *dk = nullptr, *dv = nullptr;
  void *dstate0 = nullptr, *dnormalizer0 = nullptr;

  int64_t keys(const LinearAttentionProblem& p, int64_t b) const {
    if (!key_lengths) return p.S;
    const int64_t n = key_lengths[b];
    return n < 0 ? 0 : n > p.S ? p.S : n;
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
