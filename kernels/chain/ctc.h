// Contract of connectionist temporal classification (Graves, Fernández, Gomez, Schmidhuber, 2006).
//
// Letters: T steps, B sequences, C classes of which `blank` is one. Sequence b has n = input length steps and the
// labels l[0..m), m = target length, at most `longest`; S = min(T, longest) is the most that scratch must hold. A
// path gives every step a class; merging repeats and then dropping blanks turns a path into labels. With y[t,c] the
// log-probability of class c at step t,
//
//   loss[b] = -log sum over all paths that give l of prod over t < n of exp(y[t, path[t]])
//
// The sum is a scan over 2m + 1 states, m labels with a blank around each: state s of step t is reached from s
// and s - 1 of the step before, and from s - 2 where both are labels that differ.
//
//   from_logits   x holds logits, y = log_softmax(x): fused, x is read once forward and once for the gradient
//   otherwise     x is y itself
//   gx[t,b,c]     exp(y[t,c]) - the probability that a path of l has class c at step t: the gradient of loss[b]
//                 with respect to logits. For log-probabilities it is torch's gradient, which takes for granted
//                 that log_softmax made them.
//
// Rules at the edges:
//   - n = 0: loss 0 without labels, else infinite. Steps t >= n are never read; gx is 0 there.
//   - No path gives l (n < m + repeats, or -infinity on every path): loss = +infinity, with zero_infinity 0; gx 0.
//   - NaN or +infinity in a step t < n: loss NaN and the sequence's gx NaN; not looked for where m > n.
//   - n outside 0..T, labels outside `targets`, a label outside 0..C-1 or a blank among the labels: loss NaN, gx 0.
//     The binding refuses them where it can read them without waiting for a device.
//
// Tensors (owned by the caller; element strides):
//   x    (T, B, C)  dtype  x_t, x_b, classes side by side
//   gx   (T, B, C)  dtype  dense; null: loss alone. Every element is written
//   loss (B)        float; double for f64
//   targets         (targets_size) int64; the labels of b at target_offsets[b]
//   target_offsets, input_lengths, target_lengths   (B) int64
// 16-bit and f32 problems are summed up in float or double, each step relative to the step before.
#pragma once
#include <string>

#include "common/dispatch.h"
#include "common/types.h"

namespace pyseqnet {

struct CtcProblem {
  DType dtype = DType::f32;
  int64_t T = 0, B = 0, C = 0, S = 0, blank = 0, targets_size = 0, longest = 0;
  int64_t x_t = 0, x_b = 0;
  bool from_logits = false, with_gradient = false, zero_infinity = false;
};

struct CtcTensors {
  const void* x = nullptr;
  const int64_t *targets = nullptr, *target_offsets = nullptr, *input_lengths = nullptr,
                *target_lengths = nullptr;
  void *loss = nullptr, *gx = nullptr;
};

std::string describe(const CtcProblem&);

using CtcCpuKernel = CpuKernel<CtcProblem, CtcTensors>;
using CtcCudaKernel = CudaKernel<CtcProblem, CtcTensors>;
Table<CtcCpuKernel> ctc_cpu_table();    // chain_table.cpp
Table<CtcCudaKernel> ctc_cuda_table();  // chain_table.cpp; empty without CUDA

}  // namespace pyseqnet
