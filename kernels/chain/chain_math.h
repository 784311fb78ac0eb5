// What the kernels of chains have in common: sums of exponentials in the log domain, and the rules of CTC that do
// not depend on how the sums are made. Written once for the oracles, the CPU kernels and the CUDA kernels.
#pragma once
#include <cmath>

#include "chain/crf.h"
#include "chain/ctc.h"
#include "common/numerics.h"

namespace pyseqnet {

// log(exp(a) + exp(b)); -infinity is log 0.
template <class Real>
PYSEQNET_HOST_DEVICE Real log_add(Real a, Real b) {
  const Real largest = a > b ? a : b, smallest = a > b ? b : a;
  if (!(smallest > Real(-HUGE_VAL))) return largest;
  return largest + log1p(exp(smallest - largest));
}

// log of the sum of exponentials of term(0 .. count); NaN for NaN and +infinity.
template <class Real, class Term>
PYSEQNET_HOST_DEVICE Real log_sum(int64_t count, Term&& term) {
  Real largest = Real(-HUGE_VAL), sum = 0;
  bool bad = false;
  for (int64_t i = 0; i < count; i++) {
    const Real v = term(i);
    bad |= !(v < Real(HUGE_VAL));
    largest = v > largest ? v : largest;
  }
  if (bad) return Real(NAN);
  if (largest == Real(-HUGE_VAL)) return largest;
  for (int64_t i = 0; i < count; i++) sum += exp(term(i) - largest);
  return largest + Real(log(sum));
}

// The k largest values, best first, and where they came from; of equal ones the first stays in front.
template <class Real>
struct Best {
  Real* value;
  int32_t* from;
  int k;
  PYSEQNET_HOST_DEVICE void clear() const {
    for (int r = 0; r < k; r++) value[r] = Real(-HUGE_VAL), from[r] = -1;
  }
  PYSEQNET_HOST_DEVICE void offer(Real v, int origin) const {
    if (!(v > value[k - 1])) return;
    int r = k - 1;
    for (; r > 0 && v > value[r - 1]; r--) value[r] = value[r - 1], from[r] = from[r - 1];
    value[r] = v, from[r] = origin;
  }
};

// Whether state s of the 2m + 1 may be reached from s - 2: both are labels and differ.
PYSEQNET_HOST_DEVICE bool ctc_skips(const int64_t* labels, int64_t state) {
  return state % 2 == 1 && state > 1 && labels[state / 2] != labels[state / 2 - 1];
}

// Whether a sequence's lengths and labels are such as its tensors can hold.
PYSEQNET_HOST_DEVICE bool ctc_is_valid(const CtcProblem& p, const CtcTensors& t, int64_t b) {
  const int64_t n = t.input_lengths[b], m = t.target_lengths[b], first = t.target_offsets[b];
  if (n < 0 || n > p.T || m < 0 || m > p.longest || first < 0 || first > p.targets_size ||
      m > p.targets_size - first)
    return false;
  for (int64_t s = first; s < first + m; s++)
    if (t.targets[s] < 0 || t.targets[s] >= p.C || t.targets[s] == p.blank) return false;
  return true;
}

// Of a finite, infinite or NaN sum of paths, as the caller wants it.
template <class Real>
PYSEQNET_HOST_DEVICE Real ctc_loss_of(const CtcProblem& p, Real loss) {
  return p.zero_infinity && loss == Real(HUGE_VAL) ? Real(0) : loss;
}

// Whether a sequence has a length, and tags if it needs them, that its tensors can hold.
PYSEQNET_HOST_DEVICE bool crf_is_valid(const CrfProblem& p, const CrfTensors& t, int64_t b) {
  const int64_t n = t.lengths[b];
  if (n < 1 || n > p.T) return false;
  for (int64_t step = 0; t.tags && step < n; step++)
    if (t.tags[b * p.T + step] < 0 || t.tags[b * p.T + step] >= p.C) return false;
  return true;
}

}  // namespace pyseqnet
