// One CRF sequence in the log domain: for potentials that products of probabilities cannot hold (crf_cpu.cpp).
//
// A step is C log-sums of C terms, a vector of tags at a time forward; backward a tag at a time, where the exponentials
// of its row serve the next step and the gradient of the transitions alike. Each step is kept relative to the largest
// value of the step before, and what was taken off is summed in double, so that values keep their digits.
// Bound: C^2 / VL exponentials a step each way.
#pragma once
#include "chain/chain_math.h"
#include "chain/crf.h"
#include "common/element_lanes.h"

namespace pyseqnet {
inline namespace PYSEQNET_ISA {

template <class T>
class CrfLogDomain {
 public:
  static int64_t columns_of(const CrfProblem& p) { return (p.C + VL - 1) / VL * VL; }
  static int64_t floats(const CrfProblem& p, bool gradient) {
    return ((gradient ? p.T : 2) + 3) * columns_of(p) + 2 * p.T;
  }
  CrfLogDomain(const CrfProblem& problem, const CrfTensors& tensors, int64_t sequence, float* memory)
      : p(problem), t(tensors), b(sequence), n(tensors.lengths[sequence]), columns(columns_of(problem)) {
    taken = reinterpret_cast<double*>(memory);
    beta = memory + 2 * p.T, ahead = beta + columns, row = ahead + columns, alpha = row + columns;
  }

  double log_partition() const { return forward(false); }

  // ge of the sequence's steps; adds g times the gradients of transitions, start and end, without their tags' part.
  void gradient(float g, T* ge, float* partial) const {
    const double logz = forward(true);
    if (!(logz > -HUGE_VAL)) {  // NaN, or nothing is allowed
      const float nan = __builtin_nanf("") * g;
      for (int64_t x = 0; x < n * p.C; x++) round_to(ge[x], nan);
      for (int64_t x = 0; x < (p.C + 2) * p.C; x++) partial[x] += nan;
      return;
    }
    const int64_t* y = t.tags ? t.tags + b * p.T : nullptr;
    double taken_back = 0;
    for (int64_t j = 0; j < p.C; j++) beta[j] = end()[j] > never ? end()[j] : never;
    for (int64_t step = n - 1; step >= 0; step--) {
      const float* a = alpha + step * columns;
      if (step < n - 1) {
        const float shift = look_ahead(step + 1);
        taken_back += shift;
        const float offset = float(taken[step] + taken_back - logz);
        for (int64_t i = 0; i < p.C; i++) step_back(i, a[i] + offset, -g, partial + i * p.C);
      }
      const float offset = float(taken[step] + taken_back - logz);
      for (int64_t j = 0; j < p.C; j++) {
        const float marginal = probability(set1(a[j] + beta[j] + offset))[0];
        round_to(ge[step * p.C + j], g * ((y && y[step] == j ? 1.0f : 0.0f) - marginal));
        if (step == 0) partial[p.C * p.C + j] -= g * marginal;
        if (step == n - 1) partial[(p.C + 1) * p.C + j] -= g * marginal;
      }
    }
  }

 private:
  static constexpr float never = -1e30f;  // log 0; adding it every step does not overflow
  static constexpr float unreachable = 0.5f * never, lowest_shift = -1e6f;

  const CrfProblem& p;
  const CrfTensors& t;
  int64_t b, n, columns;
  double* taken;                      // (T) taken off up to a step
  float *alpha, *beta, *ahead, *row;  // (T or 2, columns); columns each

  const float* transitions() const { return static_cast<const float*>(t.transitions); }
  const float* start() const { return static_cast<const float*>(t.start); }
  const float* end() const { return static_cast<const float*>(t.end); }
  const T* emissions(int64_t step) const { return static_cast<const T*>(t.e) + b * p.e_b + step * p.e_t; }

  static vf probability(vf x) { return x < -87.0f ? vf{} : expv(x); }
  // Lanes from the last tag on are `never`.
  template <class E>
  vf lanes(const E* from, int64_t j) const {
    return vmax(p.C - j >= VL ? load_lanes(from + j) : load_between(from + j, 0, p.C - j, set1(never)),
                set1(never));
  }
  static bool all_below_infinity(const float* x, int64_t count) {
    for (int64_t i = 0; i < count; i++)
      if (!(x[i] < HUGE_VALF)) return false;
    return true;
  }
  bool is_number() const {
    for (int64_t step = 0; step < n; step++)
      for (int64_t j = 0; j < p.C; j++)
        if (!(to_float(emissions(step)[j]) < HUGE_VALF)) return false;
    return all_below_infinity(start(), p.C) && all_below_infinity(end(), p.C) &&
           all_below_infinity(transitions(), p.C * p.C);
  }

  double forward(bool keep) const {
    if (!is_number()) return __builtin_nan("");
    float shift = 0;
    for (int64_t step = 0; step < n; step++) {
      float* now = alpha + (keep ? step : step % 2) * columns;
      const float* before = alpha + (keep ? step - 1 : (step + 1) % 2) * columns;
      taken[step] = step ? taken[step - 1] + shift : 0;
      vf largest = set1(never);
      for (int64_t j = 0; j < p.C; j += VL) {
        const vf from = step ? arrive(before, shift, j) : lanes(start(), j);
        const vf value = from + lanes(emissions(step), j);
        store(now + j, value);
        largest = vmax(largest, value);
      }
      shift = clamp_shift(hmax(largest));
    }
    const float* last = alpha + (keep ? n - 1 : (n - 1) % 2) * columns;
    vf largest = set1(never), sum = {};
    for (int64_t j = 0; j < p.C; j += VL) largest = vmax(largest, load(last + j) + lanes(end(), j));
    const float m = hmax(largest);
    if (m < unreachable) return -HUGE_VAL;
    for (int64_t j = 0; j < p.C; j += VL) sum += probability(load(last + j) + lanes(end(), j) - m);
    return taken[n - 1] + double(m) + log(double(hsum(sum)));
  }
  static float clamp_shift(float x) { return x > lowest_shift ? x : lowest_shift; }

  // log of the sum over i of exp(before[i] - shift + A[i, j]), a vector of j.
  vf arrive(const float* before, float shift, int64_t j) const {
    vf m = set1(-HUGE_VALF), sum = {};
    for (int64_t i = 0; i < p.C; i++) m = vmax(m, lanes(transitions() + i * p.C, j) + (before[i] - shift));
    for (int64_t i = 0; i < p.C; i++)
      sum += expv(lanes(transitions() + i * p.C, j) + (before[i] - shift) - m);
    return m + log2v(sum) * LN2;
  }

  // ahead = e + beta of a step, relative to its largest value, which is returned.
  float look_ahead(int64_t step) const {
    vf largest = set1(never);
    for (int64_t j = 0; j < p.C; j += VL) {
      const vf value = load_lanes_n(beta + j, p.C - j) + lanes(emissions(step), j);
      store(ahead + j, value);
      largest = vmax(largest, value);
    }
    const float shift = clamp_shift(hmax(largest));
    for (int64_t j = 0; j < p.C; j += VL) store(ahead + j, load(ahead + j) - shift);
    return shift;
  }
  // beta[i] of the step before, and the row's part of the gradient: g P(i, j).
  void step_back(int64_t i, float log_alpha, float g, float* gradient) const {
    const float* a = transitions() + i * p.C;
    vf largest = set1(-HUGE_VALF), sum = {};
    for (int64_t j = 0; j < p.C; j += VL) largest = vmax(largest, lanes(a, j) + load(ahead + j));
    const float m = hmax(largest);
    for (int64_t j = 0; j < p.C; j += VL) {
      const vf x = probability(lanes(a, j) + load(ahead + j) - m);
      store(row + j, x);
      sum += x;
    }
    beta[i] = m + log2v(set1(hsum(sum)))[0] * LN2;
    const float scale = probability(set1(log_alpha + m))[0] * g;
    for (int64_t j = 0; j < p.C; j += VL) {
      const int left = p.C - j < VL ? int(p.C - j) : VL;
      store_n(gradient + j, load_n(gradient + j, left) + load(row + j) * scale, left);
    }
  }
};

}  // namespace PYSEQNET_ISA
}  // namespace pyseqnet
