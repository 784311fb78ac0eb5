// Contract of additive attention (Bahdanau, Cho and Bengio: Neural machine translation by jointly learning to
// align and translate, 2015).
//
//   t[i,j,d] = tanh(q[i,d] + k[j,d] + bias[d])
//   z[i,j]   = sum_d w[d] t[i,j,d]                               the score of query i and key j
//   P[i,j]   = exp(z[i,j] - lse[i])  for keys j < key_lengths[b], else 0
//   lse[i]   = log sum over visible j of exp(z[i,j])             natural logarithm
//   out[i,e] = sum_j P[i,j] v[j,e]
//
// Backward, for gradients gout and gP (optional, of the returned weights):
//   delta[i] = sum_e gout[i,e] out[i,e] + sum_j P[i,j] gP[i,j]
//   dz[i,j]  = P[i,j] (sum_e gout[i,e] v[j,e] + gP[i,j] - delta[i])
//   gw[d]    = sum_ij dz[i,j] t[i,j,d]
//   g[i,j,d] = dz[i,j] w[d] (1 - t[i,j,d]^2)
//   gq[i] = sum_j g[i,j]    gk[j] = sum_i g[i,j]    gbias = sum_i gq[i]    gv[j] = sum_i P[i,j] gout[i]
//
// (out as it was stored: in 16 bits its rounding reaches delta.)
//
// t has L x S x D elements and is never stored: a kernel makes it where it is used, in forward and again in
// backward. Only q, k, v, out and lse are kept: memory is linear in L and S.
//
// Rules at the edges: a query that sees no key (length 0, or S = 0) has out = 0, weights = 0, lse = -inf and
// gradients 0. Keys at or beyond key_lengths[b] (kernels clamp it to 0..S) are never read: they may hold NaN;
// their gk and gv are 0. B, L and S may be 0; D, E >= 1.
//
// Tensors (owned by the caller; elements in `dtype` unless said):
//   q (B, L, D)  k (B, S, D)  v (B, S, E)  gout (B, L, E)   by strides; the last dimension has stride 1
//   w, bias, gw, gbias (D) dense
//   out (B, L, E)  gq (B, L, D)  gk (B, S, D)  gv (B, S, E)  weights, gweights (B, L, S)   dense
//   key_lengths (B) int64
//   lse (B, L) dense, float; double for f64
// Accumulation and softmax are in float for f32, bf16, f16 and in double for f64.
#pragma once
#include <string>

#include "common/dispatch.h"
#include "common/types.h"

namespace pyseqnet {

// Element strides of a (batch, position, channel) tensor; channels have stride 1.
struct AdditiveStrides {
  int64_t b = 0, n = 0;
};

struct AdditiveProblem {
  DType dtype = DType::f32;
  int64_t B = 0, L = 0, S = 0, D = 0, E = 0;
  AdditiveStrides q, k, v, gout;
  bool with_bias = false, with_key_lengths = false;
  bool with_gweights = false;                  // backward
  bool need_scores = true, need_value = true;  // backward: of gq, gk, gw, gbias, and of gv
};

// Pointers of one call.
//   forward   q, k, v, w [bias, key_lengths]                                   -> out, lse
//   weights   q, k, w, lse [bias, key_lengths]                                 -> weights
//   backward  q, k, v, w, gout, out, lse [bias, key_lengths, weights, gweights]
//             -> gq, gk, gw, gbias (if need_scores), gv (if need_value); every element is written
struct AdditiveTensors {
  const void *q = nullptr, *k = nullptr, *v = nullptr, *w = nullptr, *bias = nullptr;
  const int64_t* key_lengths = nullptr;
  const void *gout = nullptr, *gweights = nullptr;
  void *out = nullptr, *lse = nullptr, *weights = nullptr;  // backward reads them
  void *gq = nullptr, *gk = nullptr, *gv = nullptr, *gw = nullptr, *gbias = nullptr;
};

enum class AdditivePass : int32_t { forward, weights, backward };
constexpr AdditivePass all_additive_passes[] = {AdditivePass::forward, AdditivePass::weights,
                                                AdditivePass::backward};
constexpr const char* operation_of(AdditivePass pass) {
  return pass == AdditivePass::forward   ? "additive_attention_forward"
         : pass == AdditivePass::weights ? "additive_attention_weights"
                                         : "additive_attention_backward";
}

std::string describe(const AdditiveProblem&);

using AdditiveCpuKernel = CpuKernel<AdditiveProblem, AdditiveTensors>;
using AdditiveCudaKernel = CudaKernel<AdditiveProblem, AdditiveTensors>;
Table<AdditiveCpuKernel> additive_cpu_table(AdditivePass);    // additive_table.cpp
Table<AdditiveCudaKernel> additive_cuda_table(AdditivePass);  // additive_table.cpp; empty without CUDA

}  // namespace pyseqnet
