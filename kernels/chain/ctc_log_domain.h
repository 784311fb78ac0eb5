// CTC of one sequence in the log domain: exact for logits however peaked, and what ctc_scaled.h hands over to.
//
// The 2m + 1 states are kept as two arrays, m + 1 blanks and m labels, so that a vector covers VL states of a kind and
// a shift by one state is an unaligned load:
//   blank[j] <- blank[j], label[j-1]           label[j] <- label[j], blank[j], label[j-1] if the labels differ
// Blanks need a sum of two terms, labels of three. Everything is in log2. Each step is kept relative to the largest
// value of the step before, and what was taken off is summed in double: values stay small, so that rounding does not
// grow with T. Forward keeps, for each step, the states, the label's log-probabilities and the normaliser of its
// softmax; the way back reads x once more and writes softmax minus posterior as it goes.
//
// Bound: about 35 vector operations each way for VL states of a kind, two of them exp2 chains in a row: latency shows
// where m < 2 VL. The softmax adds 2 exp2 a class and step.
#pragma once
#include "chain/chain_math.h"
#include "chain/ctc.h"
#include "common/element_lanes.h"

namespace pyseqnet {
inline namespace PYSEQNET_ISA {
namespace {

// log 0: far below any sum of log-probabilities, far above overflow when a step adds it again.
constexpr float never = -1e30f;
constexpr float unreachable = 0.5f * never;
// The least that a step is shifted by: states that all died stay recognisable.
constexpr float lowest_shift = -1e6f;
constexpr float largest_float = 3.4028235e38f;

PYSEQNET_INLINE vf log2_sum(vf a, vf b) {
  const vf m = vmax(a, b);
  return m + log2v(1.0f + exp2v(vmin(a, b) - m));
}
PYSEQNET_INLINE vf log2_sum(vf a, vf b, vf c) {
  const vf m = vmax(vmax(a, b), c);
  return m + log2v(exp2v(a - m) + exp2v(b - m) + exp2v(c - m));
}
// A sequence of n steps and m labels, where it lies; each way of summing keeps all steps for a gradient, else two.
template <class T>
struct CtcSequence {
  const CtcProblem& p;
  const CtcTensors& t;
  int64_t b, n, m;

  const T* x(int64_t step) const { return static_cast<const T*>(t.x) + step * p.x_t + b * p.x_b; }
  T* gx(int64_t step) const { return static_cast<T*>(t.gx) + (step * p.B + b) * p.C; }
  int64_t kept(int64_t step) const { return p.with_gradient ? step : step % 2; }
};

constexpr int64_t whole_vectors(int64_t n) { return (n + VL - 1) / VL * VL; }
PYSEQNET_INLINE int lanes_left(int64_t n) { return n < VL ? int(n) : VL; }

// What a sequence needs, in floats but for the last two. Rows of states have a vector of `never` on either side.
struct CtcLogScratch {
  int64_t states, width, classes;  // whole vectors of blanks or labels; with their borders; of classes
  float *blank, *label;            // (T, width) forward
  float* emission;                 // (T, states) log2 of the labels' probabilities
  float *largest, *norm;           // (T) of the classes, natural units; (T) log2 of their sum, relative to it
  float* row;                      // classes
  float *blank_ahead, *label_ahead, *blank_back, *label_back, *skip, *dead;
  int32_t* labels;
  double* taken;  // (T) what has been taken off up to a step
  CtcLogScratch(const CtcProblem& p, Carver& carver) {
    states = whole_vectors(p.S + 1), width = states + 2 * VL, classes = whole_vectors(p.C);
    const int64_t steps = p.with_gradient ? p.T : p.T < 2 ? p.T : 2;
    blank = carver.take<float>(steps * width), label = carver.take<float>(steps * width);
    emission = carver.take<float>(steps * states);
    largest = carver.take<float>(p.T), norm = carver.take<float>(p.T);
    row = carver.take<float>(classes);
    for (float** border : {&blank_ahead, &label_ahead, &blank_back, &label_back, &skip, &dead})
      *border = carver.take<float>(width);
    labels = carver.take<int32_t>(states);
    taken = carver.take<double>(p.T);
  }
};

template <class T>
struct CtcLogDomain : CtcSequence<T> {
  const CtcLogScratch& s;
  using CtcSequence<T>::p, CtcSequence<T>::b, CtcSequence<T>::n, CtcSequence<T>::m;
  using CtcSequence<T>::x, CtcSequence<T>::gx, CtcSequence<T>::kept;

  float* blanks(int64_t step) const { return s.blank + kept(step) * s.width + VL; }
  float* labels(int64_t step) const { return s.label + kept(step) * s.width + VL; }
  float* emissions(int64_t step) const { return s.emission + kept(step) * s.states; }

  void set_up(const int64_t* targets) const {
    for (int64_t j = 0; j < s.width; j++) s.skip[j] = s.dead[j] = never;
    for (int64_t j = 0; j < s.states; j++) {
      s.labels[j] = j < m ? int32_t(targets[j]) : 0;
      if (j < m) s.dead[VL + j] = 0;
      if (j > 0 && j < m && targets[j] != targets[j - 1]) s.skip[VL + j] = 0;
    }
  }

  vf classes(const T* from, int64_t c) const {
    return p.C - c >= VL ? load_lanes(from + c) : load_between(from + c, 0, p.C - c, set1(-largest_float));
  }
  // log2 of a step's probabilities, as read() found its largest value and norm. The largest is taken off first: what
  // is left keeps its digits, however large the logits.
  vf log2_probability(vf x, int64_t step) const {
    return vmax((x - s.largest[step]) * LOG2E, set1(never)) - s.norm[step];
  }

  // Finds the step's softmax and fills row with log2 of it. False for NaN and +infinity.
  bool read(int64_t step) const {
    const T* from = x(step);
    vf largest = set1(-largest_float), sum = {};
    vi bad = {};
    for (int64_t c = 0; c < p.C; c += VL) {
      const vf v = classes(from, c);
      bad |= ~(v <= largest_float);
      largest = vmax(largest, v);
    }
    int32_t any = 0;
    for (int l = 0; l < VL; ++l) any |= bad[l];
    s.largest[step] = p.from_logits ? hmax(largest) : 0;
    s.norm[step] = 0;
    if (any || s.largest[step] == -largest_float) return false;  // or the softmax of nothing but -infinity
    for (int64_t c = 0; c < p.C; c += VL) {
      const vf y = log2_probability(classes(from, c), step);
      store(s.row + c, y);
      sum += exp2v(y);
    }
    if (!p.from_logits) return true;
    s.norm[step] = log2v(set1(hsum(sum)))[0];
    for (int64_t c = 0; c < s.classes; c += VL) store(s.row + c, load(s.row + c) - s.norm[step]);
    return true;
  }

  void gather_emissions(int64_t step) const {
    float* to = emissions(step);
    for (int64_t j = 0; j < s.states; j += VL) {
      const vi at = (vi)load(reinterpret_cast<const float*>(s.labels + j));
      store(to + j, gather(s.row, at) + load(s.dead + VL + j));
    }
  }

  // log2 of the sum over all paths; `never` and less where there is none. False for NaN.
  bool sum_of_paths(double& total) const {
    float shift = 0;
    for (int64_t step = 0; step < n; step++) {
      if (!read(step)) return false;
      gather_emissions(step);
      const float blank = s.row[p.blank];
      const float* emission = emissions(step);
      float *now_blank = blanks(step), *now_label = labels(step);
      for (int i = 0; i < VL; ++i)
        now_blank[i - VL] = now_label[i - VL] = now_blank[s.states + i] = now_label[s.states + i] = never;
      s.taken[step] = step ? s.taken[step - 1] + shift : 0;
      if (step == 0) {
        for (int64_t j = 0; j < s.states; j++) now_blank[j] = now_label[j] = never;
        now_blank[0] = blank;
        if (m) now_label[0] = emission[0];
        shift = m && emission[0] > blank ? emission[0] : blank;
      } else {
        const float *old_blank = blanks(step - 1), *old_label = labels(step - 1);
        vf largest = set1(never);
        for (int64_t j = 0; j < s.states; j += VL) {
          const vf from_blank = load(old_blank + j) - shift, from_label = load(old_label + j) - shift;
          const vf from_left = load(old_label + j - 1) - shift;
          const vf new_blank = log2_sum(from_blank, from_left) + blank;
          const vf new_label =
              log2_sum(from_label, from_blank, from_left + load(s.skip + VL + j)) + load(emission + j);
          store(now_blank + j, new_blank);
          store(now_label + j, new_label);
          largest = vmax(largest, vmax(new_blank, new_label));
        }
        shift = hmax(largest);
      }
      shift = shift > lowest_shift ? shift : lowest_shift;
    }
    const float last_blank = blanks(n - 1)[m], last_label = m ? labels(n - 1)[m - 1] : never;
    const float last = log2_sum(set1(last_blank), set1(last_label))[0];
    total = last > unreachable ? last + s.taken[n - 1] : never;
    return true;
  }

  void gradient(double total) const {
    float *blank_back = s.blank_back + VL, *label_back = s.label_back + VL;
    float *blank_ahead = s.blank_ahead + VL, *label_ahead = s.label_ahead + VL;
    for (int64_t j = -VL; j < s.states + VL; j++)
      blank_back[j] = label_back[j] = blank_ahead[j] = label_ahead[j] = never;
    blank_back[m] = 0;
    if (m) label_back[m - 1] = 0;
    double taken_back = 0;
    float shift = 0;
    for (int64_t step = n - 1; step >= 0; step--) {
      const T* from = x(step);
      const float *emission = emissions(step), *now_blank = blanks(step), *now_label = labels(step);
      taken_back += shift;
      const float scale = float(s.taken[step] + taken_back - total);
      float blank = 0;
      for (int64_t c = 0; c < p.C; c += VL) {
        const vf y = log2_probability(classes(from, c), step);
        if (p.blank >= c && p.blank < c + VL) blank = y[p.blank - c];
        store(s.row + c, below(y, exp2v(y)));
      }
      vf blank_posterior = {}, largest = set1(never);
      for (int64_t j = 0; j < s.states; j += VL) {
        const vf at_blank = load(blank_back + j) - shift, at_label = load(label_back + j) - shift;
        const vf path_blank = load(now_blank + j) + at_blank + scale;
        const vf path_label = load(now_label + j) + at_label + scale;
        blank_posterior += below(path_blank, exp2v(path_blank));
        const vf posterior = below(path_label, exp2v(path_label));
        const int labels_here = int(m - j < VL ? m - j : VL);
        for (int k = 0; k < labels_here; ++k) s.row[s.labels[j + k]] -= posterior[k];
        store(blank_ahead + j, at_blank + blank);
        store(label_ahead + j, at_label + load(emission + j));
      }
      s.row[p.blank] -= hsum(blank_posterior);
      for (int64_t c = 0; c < p.C; c += VL) store_lanes_n(gx(step) + c, load(s.row + c), lanes_left(p.C - c));
      for (int64_t j = 0; j < s.states; j += VL) {
        const vf at_blank = load(blank_ahead + j), at_label = load(label_ahead + j);
        const vf new_blank = log2_sum(at_blank, at_label);
        const vf new_label = log2_sum(at_label, load(blank_ahead + j + 1),
                                      load(label_ahead + j + 1) + load(s.skip + VL + j + 1));
        store(blank_back + j, new_blank);
        store(label_back + j, new_label);
        largest = vmax(largest, vmax(new_blank, new_label));
      }
      shift = hmax(largest);
      shift = shift > lowest_shift ? shift : lowest_shift;
    }
  }
  // 2^x, which exp2v gives, but 0 where x is below its range: sums over many states must not collect 2^-126 each.
  static vf below(vf x, vf power) { return x < -126.0f ? vf{} : power; }
};

}  // namespace
}  // namespace PYSEQNET_ISA
}  // namespace pyseqnet
