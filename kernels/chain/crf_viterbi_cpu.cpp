// The best tag sequence of each sentence on the CPU (Viterbi, 1967): crf.h with the largest value for the sum.
//
// The way forward keeps values alone, of all steps: the largest a[i] + A[i,j] over the tags i of the step before, which
// pass one after another as a broadcast, for up to eight vectors of tags j in registers. Where a value came from is
// found on the way back, for the one tag a step that is asked, by the same sums again: a row of A transposed. A and its
// transpose are copied into whole vectors once for all the sequences that a thread does.
//
// Bound: C^2 / VL times (addition, maximum) a step. Items are sequences.
#include "chain/chain_math.h"
#include "chain/crf.h"
#include "common/element_lanes.h"

namespace pyseqnet {
inline namespace PYSEQNET_ISA {
namespace {

constexpr int block = 8;  // vectors of tags side by side

struct Scratch {
  int64_t columns;
  float *a, *transposed;  // (C, columns) each; -infinity behind the last tag
  float* values;          // (T, columns)
  bool* sound;            // no NaN and no +infinity among the transitions
  Scratch(const CrfProblem& p, Carver& carver) {
    columns = (p.C + VL - 1) / VL * VL;
    a = carver.take<float>(p.C * columns), transposed = carver.take<float>(p.C * columns);
    values = carver.take<float>(p.T * columns), sound = carver.take<bool>(1);
  }
  void read(const CrfProblem& p, const float* transitions) const {
    vi bad = {};
    for (int64_t i = 0; i < p.C; i++) {
      for (int64_t j = 0; j < columns; j += VL) {
        const float* from = transitions + i * p.C + j;
        const vf x = p.C - j >= VL ? load(from) : load_between(from, 0, p.C - j, set1(-HUGE_VALF));
        bad |= ~(x < HUGE_VALF);
        store(a + i * columns + j, x);
      }
      for (int64_t j = 0; j < p.C; j++) transposed[i * columns + j] = transitions[j * p.C + i];
      for (int64_t j = p.C; j < columns; j++) transposed[i * columns + j] = -HUGE_VALF;
    }
    int32_t any = 0;
    for (int l = 0; l < VL; ++l) any |= bad[l];
    *sound = !any;
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
  float* values(int64_t step) const { return s.values + step * s.columns; }

  template <int NV>
  PYSEQNET_INLINE void advance(int64_t step, int64_t j, vi& bad) const {
    const float* before = values(step - 1);
    vf best[NV];
    for (vf& one : best) one = set1(-HUGE_VALF);
    for (int64_t i = 0; i < p.C; i++) {
      const float* a = s.a + i * s.columns + j;
#pragma GCC unroll 8
      for (int x = 0; x < NV; ++x) best[x] = vmax(best[x], load(a + x * VL) + before[i]);
    }
    for (int x = 0; x < NV; ++x)
      store(values(step) + j + x * VL, best[x] + lanes(emissions(step), j + x * VL, bad));
  }

  // Values of all steps. False for NaN and +infinity.
  bool forward() const {
    const float* start = static_cast<const float*>(t.start);
    vi bad = {};
    for (int64_t j = 0; j < p.C; j += VL)
      store(values(0) + j, lanes(start, j, bad) + lanes(emissions(0), j, bad));
    for (int64_t step = 1; step < n; step++) {
      int64_t j = 0;
      for (; j + block * VL <= s.columns; j += block * VL) advance<block>(step, j, bad);
      for (; j + 4 * VL <= s.columns; j += 4 * VL) advance<4>(step, j, bad);
      for (; j + 2 * VL <= s.columns; j += 2 * VL) advance<2>(step, j, bad);
      for (; j < s.columns; j += VL) advance<1>(step, j, bad);
    }
    int32_t any = 0;
    for (int l = 0; l < VL; ++l) any |= bad[l];
    return !any && (*s.sound || n < 2);
  }

  // The first tag of the step before from which the best value of `tag` came; -1 where it is -infinity.
  int64_t origin(int64_t step, int64_t tag) const {
    const float *before = values(step - 1), *a = s.transposed + tag * s.columns;
    vf best = set1(-HUGE_VALF);
    for (int64_t i = 0; i < s.columns; i += VL) best = vmax(best, load(before + i) + load(a + i));
    const float most = hmax(best);
    for (int64_t i = 0; most > -HUGE_VALF && i < p.C; i++)
      if (before[i] + a[i] == most) return i;
    return -1;
  }

  void run() const {
    constexpr float not_a_number = __builtin_nanf("");
    int64_t* path = t.paths + b * p.T;
    float& score = static_cast<float*>(t.scores)[b];
    for (int64_t step = 0; step < p.T; step++) path[step] = -1;
    score = not_a_number;
    if (!crf_is_valid(p, t, b) || !forward()) return;
    const float* now = values(n - 1);
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
      if (step) at = origin(step, at);
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
  scratch.read(p, static_cast<const float*>(t.transitions));
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
