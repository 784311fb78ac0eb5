// Softmax attention on the CPU: delta, what each row of the backward pass subtracts; float32, bfloat16, float16.
//
// One item is one query: the dot product of its output and its gradient, and of its weights and theirs where they
// have one. Bound: reading them.
#include "attention/attention_tile.h"

namespace pyseqnet {
inline namespace PYSEQNET_ISA {
namespace {

template <class T>
PYSEQNET_NOINLINE float dot_rows(const T* a, const T* b, int64_t n) {
  vf sum = {};
  int64_t d = 0;
  for (; d + VL <= n; d += VL) sum += load_lanes(a + d) * load_lanes(b + d);
  if (d < n) sum += load_between(a + d, 0, n - d, vf{}) * load_between(b + d, 0, n - d, vf{});
  return hsum(sum);
}

WorkPlan plan_delta(const AttentionProblem& p) {
  constexpr int64_t worth_a_thread = 100000;  // elements: about 20 microseconds
  WorkPlan plan;
  plan.add_phase(p.B * p.H * p.L, worth_a_thread / (p.E + (p.with_gweights ? p.S : 0)) + 1);
  return plan;
}

void run_delta(const AttentionProblem& p, const AttentionTensors& t, const WorkSlice& slice) {
  FlushDenormals guard;
  with_element(p.dtype, [&](auto tag) {
    using T = decltype(tag);
    for (int64_t item = slice.begin; item < slice.end; ++item) {
      const int64_t i = item % p.L, h = item / p.L % p.H;
      const AttentionSequence at = sequence_of(p, t, item / p.L / p.H);
      if (i >= at.L) continue;
      const int64_t row = lse_row(at, h, i);
      float* delta = static_cast<float*>(t.delta) + row;
      *delta = 0;
      if (static_cast<const float*>(t.lse)[row] == -INFINITE) continue;
      float sum = dot_rows(static_cast<const T*>(t.gout) + query_offset(p.gout_strides, at, h, i),
                           static_cast<const T*>(t.out) + query_offset(p.out_strides, at, h, i), p.E);
      if (p.with_gweights) {
        const int64_t weights = weights_offset(p, at, h, i);
        sum += dot_rows(static_cast<const T*>(t.weights) + weights,
                        static_cast<const T*>(t.gweights) + weights, p.S);
      }
      if (p.with_glse) sum -= static_cast<const float*>(t.glse)[row];
      *delta = sum;
    }
  });
}

Refusal refuses(const AttentionProblem& p) {
  if (p.dtype == DType::f64) return "float64 is left to the reference";
  return accepted;
}

}  // namespace

extern const AttentionCpuKernel attention_rows_delta;
const AttentionCpuKernel attention_rows_delta = {"rows_" PYSEQNET_ISA_NAME, this_isa, refuses, plan_delta,
                                                 run_delta};

}  // namespace PYSEQNET_ISA
}  // namespace pyseqnet
