// The best tag sequence of each sentence on the CPU (Viterbi, 1967): crf.h with the largest value for the sum.
//
// A vector holds VL tags j of a step; the tags i of the step before pass one after another, as a broadcast, and each
// lane keeps the largest a[i] + A[i,j] and its i. Values are compared, not added up, apart from one addition a step: no
// range to look after. The tags that values came from are kept, 4 bytes each, and followed back from the end.
//
// Bound: C^2 / VL times (addition, comparison, two selections) a step; with C tags of a row in registers the loads of A
// are one a vector. Items are sequences.
#include "chain/chain_math.h"
#include "chain/crf.h"
#include "common/element_lanes.h"

namespace pyseqnet {
inline namespace PYSEQNET_ISA {
namespace {

struct Scratch {
  int64_t columns;
  float *now, *before;
  int32_t* from;  // (T, columns)
  Scratch(const CrfProblem& p, Carver& carver) {
    columns = (p.C + VL - 1) / VL * VL;
    now = carver.take<float>(columns), before = carver.take<float>(columns);
    from = carver.take<int32_t>(p.T * columns);
  }
};

template <class T>
struct Sequence {
  const CrfProblem& p;
  const CrfTensors& t;
  const Scratch& s;
  int64_t b, n;

  template <class E>
  vf lanes(const E* from, int64_t j, vi& bad) const {
    const vf x = p.C - j >= VL ? load_lanes(from + j) : load_between(from + j, 0, p.C - j, set1(-HUGE_VALF));
    bad |= ~(x < HUGE_VALF);
    return x;
  }
  const T* emissions(int64_t step) const { return static_cast<const T*>(t.e) + b * p.e_b + step * p.e_t; }

  // Values of the last step in `now`. False for NaN and +infinity.
  bool forward(float*& now, float*& before) const {
    const float *a = static_cast<const float*>(t.transitions), *start = static_cast<const float*>(t.start);
    vi bad = {};
    for (int64_t j = 0; j < p.C; j += VL) store(now + j, lanes(start, j, bad) + lanes(emissions(0), j, bad));
    for (int64_t step = 1; step < n; step++) {
      float* swap = now;
      now = before, before = swap;
      int32_t* from = s.from + step * s.columns;
      for (int64_t j = 0; j < p.C; j += VL) {
        vf best = set1(-HUGE_VALF);
        vi origin = {};
        for (int64_t i = 0; i < p.C; i++) {
          const vf value = lanes(a + i * p.C, j, bad) + before[i];
          const vi better = value > best;  // of equal ones the first stays
          origin = better ? vi{} + int32_t(i) : origin;
          best = better ? value : best;
        }
        store(reinterpret_cast<float*>(from + j), (vf)origin);
        store(now + j, best + lanes(emissions(step), j, bad));
      }
    }
    int32_t any = 0;
    for (int l = 0; l < VL; ++l) any |= bad[l];
    return !any;
  }

  void run() const {
    constexpr float not_a_number = __builtin_nanf("");
    int64_t* path = t.paths + b * p.T;
    float& score = static_cast<float*>(t.scores)[b];
    for (int64_t step = 0; step < p.T; step++) path[step] = -1;
    score = not_a_number;
    float *now = s.now, *before = s.before;
    if (!crf_is_valid(p, t, b) || !forward(now, before)) return;
    const float* end = static_cast<const float*>(t.end);
    float best = -HUGE_VALF;
    int64_t at = -1;
    for (int64_t j = 0; j < p.C; j++) {
      if (!(end[j] < HUGE_VALF)) return;
      if (now[j] + end[j] > best) best = now[j] + end[j], at = j;
    }
    score = best;
    for (int64_t step = n - 1; step >= 0 && at >= 0; step--) {
      path[step] = at;
      if (step) at = s.from[step * s.columns + at];
    }
  }
};

Refusal refuses(const CrfProblem& p) {
  if (p.dtype == DType::f64) return "float64 is served by the reference";
  if (p.nbest != 1) return "more than one best sequence is found by the reference";
  if (p.C >= (int64_t(1) << 31)) return "tags are counted in 32 bits";
  return accepted;
}

WorkPlan plan(const CrfProblem& p) {
  constexpr int64_t grain_pairs = 200 * 1000;
  WorkPlan plan;
  Carver carver(nullptr);
  const Scratch s(p, carver);
  const int64_t work = p.T * p.C * s.columns;
  plan.add_phase(p.B, 1 + grain_pairs / (work + 1));
  plan.thread_bytes = carver.used();
  return plan;
}

void run(const CrfProblem& p, const CrfTensors& t, const WorkSlice& slice) {
  Carver carver(slice.scratch);
  const Scratch scratch(p, carver);
  with_element(p.dtype, [&](auto element) {
    for (int64_t b = slice.begin; b < slice.end; b++)
      Sequence<decltype(element)>{p, t, scratch, b, t.lengths[b]}.run();
  });
}

}  // namespace

extern const CrfCpuKernel crf_viterbi;
const CrfCpuKernel crf_viterbi = {PYSEQNET_ISA_NAME, this_isa, refuses, plan, run};

}  // namespace PYSEQNET_ISA
}  // namespace pyseqnet
