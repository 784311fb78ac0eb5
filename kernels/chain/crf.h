// Contract of the linear-chain conditional random field (Lafferty, McCallum, Pereira, 2001).
//
// Letters: B sequences, T steps, C tags. Sequence b has n = lengths[b] steps. With emissions e, transitions A
// (A[i,j]: tag i, then tag j), start s and end z,
//
//   score[b](y) = s[y[0]] + sum over t < n of e[b,t,y[t]] + sum over 0 < t < n of A[y[t-1], y[t]] + z[y[n-1]]
//   logZ[b]     = log sum over all C^n sequences y of exp(score[b](y))
//
//   log_likelihood   score[b](tags[b]) - logZ[b]; without tags -logZ[b]
//   gradient         of sum over b of g[b] * log_likelihood[b]: ge[b,t,j] = g[b] ([tags[b,t] = j] - P(y[t] = j)),
//                    likewise gs, gz, and gA[i,j] with P(y[t-1] = i, y[t] = j) summed over steps and sequences.
//                    Without tags the brackets are 0: with g = -1 ge holds the marginals.
//   viterbi          the `nbest` sequences of the highest scores, best first, and their scores. Of equal scores the
//                    one whose last difference, read from the end, has the lower tag comes first.
//
// Rules at the edges:
//   - Tags and emissions of steps t >= n are never looked at; ge is 0 there, paths hold -1.
//   - -infinity (below -1e30 in kernels of floats) forbids a tag or a transition. If all sequences are forbidden logZ = -infinity and gradients are NaN.
//   - NaN or +infinity in what a sequence reads: its log-likelihood and gradients are NaN.
//   - n outside 1..T or a tag outside 0..C-1: log-likelihood NaN, no part in any gradient; paths -1, scores NaN.
//   - Fewer than nbest sequences: the paths that do not exist hold -1, their scores are -infinity.
//
// Tensors (owned by the caller; element strides). A is float, double for f64:
//   e     (B, T, C)  dtype  e_b, e_t, tags side by side        ge  (B, T, C) dtype, dense
//   tags  (B, T) int64, dense (null: none)                     lengths  (B) int64
//   start, end (C), transitions (C, C)   A, dense; gradients gstart, gend, gtransitions likewise
//   llh, g  (B) A                                              paths (B, nbest, T) int64, scores (B, nbest) A
#pragma once
#include <string>

#include "common/dispatch.h"
#include "common/types.h"

namespace pyseqnet {

struct CrfProblem {
  DType dtype = DType::f32;
  int64_t B = 0, T = 0, C = 0;
  int64_t e_b = 0, e_t = 0;
  int64_t nbest = 1;       // viterbi
  bool with_tags = false;  // log_likelihood, gradient
};

// Pointers of one call.
//   log_likelihood  e, lengths, start, end, transitions [tags] -> llh
//   gradient        the same and g                             -> ge, gstart, gend, gtransitions (all written)
//   viterbi         e, lengths, start, end, transitions        -> paths, scores
struct CrfTensors {
  const void *e = nullptr, *start = nullptr, *end = nullptr, *transitions = nullptr, *g = nullptr;
  const int64_t *tags = nullptr, *lengths = nullptr;
  void *llh = nullptr, *ge = nullptr, *gstart = nullptr, *gend = nullptr, *gtransitions = nullptr;
  int64_t* paths = nullptr;
  void* scores = nullptr;
};

enum class CrfPass : int32_t { log_likelihood, gradient, viterbi };
constexpr CrfPass all_crf_passes[] = {CrfPass::log_likelihood, CrfPass::gradient, CrfPass::viterbi};
constexpr const char* operation_of(CrfPass pass) {
  return pass == CrfPass::log_likelihood ? "crf_log_likelihood"
         : pass == CrfPass::gradient     ? "crf_gradient"
                                         : "crf_viterbi";
}

std::string describe(const CrfProblem&);

using CrfCpuKernel = CpuKernel<CrfProblem, CrfTensors>;
using CrfCudaKernel = CudaKernel<CrfProblem, CrfTensors>;
Table<CrfCpuKernel> crf_cpu_table(CrfPass);    // chain_table.cpp
Table<CrfCudaKernel> crf_cuda_table(CrfPass);  // chain_table.cpp; empty without CUDA

}  // namespace pyseqnet
