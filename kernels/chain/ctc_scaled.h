// CTC of one sequence with probabilities themselves, in double: sums of products instead of log-sums.
//
// States as in ctc_log_domain.h, two arrays with a vector of zeros on either side. A step is
//   blank[j] <- (blank[j] + label[j-1]) q        label[j] <- (label[j] + blank[j] + skip[j] label[j-1]) p[j]
// with q, p the probabilities of blank and of the labels, times a power of two that brings the largest state of the
// step before to [1/2, 1) (Rabiner, 1989, section V.A). The way back is the same with the roles turned round, the
// posteriors are products of both, divided by their sum. Where the gradient is float it holds the softmax from the
// way forward, and the way back only takes the posteriors off.
//
// Bound: 5 double operations a state each way, 8 for posteriors, against 50 float ones in the log domain, so half as
// many lanes win threefold; then the softmax, one exp2 a class and step; then a scalar subtraction a label.
//
// What it cannot hold: double reaches 2^-1022. A step lowers a state by less than 2^-100, or hands over (`lost`); so a
// state that vanishes has been below `noticed` first. What such states of a step can be worth is bounded by the largest
// state of the other way at that step or, for the loss alone, by the largest probabilities of the steps ahead. Only if
// that bound is not far below the sum over all paths does the log domain do the sequence over. -infinity is an exact
// zero and harmless.
#pragma once
#include <cmath>

#include "chain/ctc_log_domain.h"

namespace pyseqnet {
inline namespace PYSEQNET_ISA {
namespace {

constexpr int DL = VL / 2;
typedef double vd __attribute__((vector_size(VL * 4)));
typedef double vd_u __attribute__((vector_size(VL * 4), aligned(8), may_alias));
typedef float vd_floats __attribute__((vector_size(VL * 2), aligned(4), may_alias));

PYSEQNET_INLINE vd load_d(const double* p) { return *(const vd_u*)p; }
PYSEQNET_INLINE void store_d(double* p, vd v) { *(vd_u*)p = v; }
PYSEQNET_INLINE vd load_d(const float* p) { return __builtin_convertvector(*(const vd_floats*)p, vd); }
PYSEQNET_INLINE vd max_d(vd a, vd b) {
#if defined(__AVX512F__)
  return (vd)_mm512_max_pd((__m512d)a, (__m512d)b);
#else
  return a > b ? a : b;
#endif
}
PYSEQNET_INLINE vd min_d(vd a, vd b) {
#if defined(__AVX512F__)
  return (vd)_mm512_min_pd((__m512d)a, (__m512d)b);
#else
  return a < b ? a : b;
#endif
}
PYSEQNET_INLINE double sum_of(vd v) {
  double sum = 0;
  for (int i = 0; i < DL; ++i) sum += v[i];
  return sum;
}
PYSEQNET_INLINE double largest_of(vd v) {
  double most = v[0];
  for (int i = 1; i < DL; ++i) most = most > v[i] ? most : v[i];
  return most;
}
// The e of 2^(e-1) <= x < 2^e, for a normal x; and 2^e.
PYSEQNET_INLINE int exponent_of(double x) {
  int64_t bits;
  memcpy(&bits, &x, sizeof bits);
  return int(bits >> 52 & 0x7ff) - 1022;
}
PYSEQNET_INLINE double power_of_two(int e) {
  const int64_t bits = int64_t(1023 + e) << 52;
  double x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

struct CtcScaledScratch {
  int64_t states, width, classes;  // whole vectors of blanks or labels; with their borders; of classes
  double *blank, *label;           // (T, width) forward
  double *blank_ahead, *label_ahead, *blank_back, *label_back, *skip, *posterior;  // width
  float *emission, *blank_emission;  // (T, states), (T) probabilities, those of labels 0 where there is none
  float *largest, *inverse;          // (T) of the classes; 1 over their sum
  float *row, *live;                 // classes; states, 1 where there is a label
  int32_t* labels;                   // states
  int32_t *taken, *top,
      *most;       // (T) exponents: taken off up to a step; of its largest state; of its probabilities
  uint8_t* faint;  // (T) whether a state was noticed
  CtcScaledScratch(const CtcProblem& p, Carver& carver) {
    states = whole_vectors(p.S + 1), width = states + 2 * DL, classes = whole_vectors(p.C);
    const int64_t steps = p.with_gradient ? p.T : p.T < 2 ? p.T : 2;
    blank = carver.take<double>(steps * width), label = carver.take<double>(steps * width);
    for (double** one : {&blank_ahead, &label_ahead, &blank_back, &label_back, &skip, &posterior})
      *one = carver.take<double>(width);
    emission = carver.take<float>(p.T * states), blank_emission = carver.take<float>(p.T);
    largest = carver.take<float>(p.T), inverse = carver.take<float>(p.T);
    row = carver.take<float>(classes), live = carver.take<float>(states);
    labels = carver.take<int32_t>(states);
    taken = carver.take<int32_t>(p.T), top = carver.take<int32_t>(p.T), most = carver.take<int32_t>(p.T);
    faint = carver.take<uint8_t>(p.T);
  }
};

template <class T>
struct CtcScaled : CtcSequence<T> {
  enum class Verdict { number, not_a_number, lost };
  static constexpr double noticed = 0x1p-900;
  static constexpr int noticed_exponent = -900;
  static constexpr float least = 0x1p-100f, greatest = 0x1p100f;  // of a probability
  static constexpr int worth = -40;  // what was noticed must stay below 2^worth of the sum over all paths

  const CtcScaledScratch& s;
  using CtcSequence<T>::p, CtcSequence<T>::b, CtcSequence<T>::n, CtcSequence<T>::m;
  using CtcSequence<T>::x, CtcSequence<T>::gx, CtcSequence<T>::kept;

  double* blanks(int64_t step) const { return s.blank + kept(step) * s.width + DL; }
  double* labels(int64_t step) const { return s.label + kept(step) * s.width + DL; }
  float* emissions(int64_t step) const { return s.emission + step * s.states; }
  static constexpr bool gradient_is_float = sizeof(T) == sizeof(float);

  void set_up(const int64_t* targets) const {
    for (int64_t j = 0; j < s.width; j++) s.skip[j] = 0;
    for (int64_t j = 0; j < s.states; j++) {
      s.labels[j] = j < m ? int32_t(targets[j]) : 0, s.live[j] = j < m;
      if (j > 0 && j < m && targets[j] != targets[j - 1]) s.skip[DL + j] = 1;
    }
  }

  vf classes(const T* from, int64_t c) const {
    return p.C - c >= VL ? load_lanes(from + c) : load_between(from + c, 0, p.C - c, set1(-HUGE_VALF));
  }
  // 2^y, 0 below its range.
  static vf power(vf y) { return y < -126.0f ? vf{} : exp2v(y); }

  // A step's probabilities into row. What they are of 16-bit classes is found again on the way back.
  Verdict read(int64_t step) const {
    const T* from = x(step);
    vf largest = set1(-HUGE_VALF), sum = {};
    vi bad = {};
    for (int64_t c = 0; c < p.C; c += VL) {
      const vf v = classes(from, c);
      bad |= ~(v < HUGE_VALF);
      largest = vmax(largest, v);
    }
    int32_t any = 0;
    for (int l = 0; l < VL; ++l) any |= bad[l];
    if (any) return Verdict::not_a_number;
    const float top = hmax(largest);
    if (p.from_logits && top == -HUGE_VALF) return Verdict::not_a_number;
    if (!p.from_logits && top > 69.0f) return Verdict::lost;  // 2^100 in natural units
    s.largest[step] = p.from_logits ? top : 0.0f, s.inverse[step] = 1;
    for (int64_t c = 0; c < p.C; c += VL) {
      const vf e = power((classes(from, c) - s.largest[step]) * LOG2E);
      store(s.row + c, e);
      sum += e;
    }
    if (!p.from_logits) return Verdict::number;
    s.inverse[step] = 1.0f / hsum(sum);
    for (int64_t c = 0; c < p.C; c += VL) store(s.row + c, load(s.row + c) * s.inverse[step]);
    return Verdict::number;
  }
  // Whether a probability is too small to go on with: not an exact zero.
  bool too_small(int64_t step, int64_t c) const {
    return s.row[c] < least && to_float(x(step)[c]) > -HUGE_VALF;
  }

  Verdict gather_emissions(int64_t step) const {
    float* to = emissions(step);
    vf fewest = set1(1.0f), most = set1(s.row[p.blank]);
    for (int64_t j = 0; j < s.states; j += VL) {
      const vi at = (vi)load(reinterpret_cast<const float*>(s.labels + j));
      const vf live = load(s.live + j), e = gather(s.row, at) * live;
      store(to + j, e);
      fewest = vmin(fewest, e + (1.0f - live));
      most = vmax(most, e);
    }
    s.blank_emission[step] = s.row[p.blank];
    s.most[step] = exponent_or_0(hmax(most));
    if (s.row[p.blank] < least && too_small(step, p.blank)) return Verdict::lost;
    if (-hmax(-fewest) < least)
      for (int64_t j = 0; j < m; j++)
        if (too_small(step, s.labels[j])) return Verdict::lost;
    return Verdict::number;
  }

  static int exponent_or_0(double x) { return x > 0 ? exponent_of(x) : 0; }

  // log2 of the sum over all paths; -infinity where there is none.
  Verdict sum_of_paths(double& total) const {
    double largest = 0.5;
    bool any_faint = false;
    for (int64_t step = 0; step < n; step++) {
      if (const Verdict v = read(step); v != Verdict::number) return v;
      if (!(largest > 0)) continue;  // no path is left; what follows may still be NaN
      if (const Verdict v = gather_emissions(step); v != Verdict::number) return v;
      if (p.with_gradient && gradient_is_float)
        memcpy(static_cast<void*>(gx(step)), s.row, size_t(p.C) * sizeof(float));
      double *now_blank = blanks(step), *now_label = labels(step);
      store_d(now_blank - DL, vd{}), store_d(now_label - DL, vd{});
      store_d(now_blank + s.states, vd{}), store_d(now_label + s.states, vd{});
      s.taken[step] = step ? s.taken[step - 1] + s.top[step - 1] : 0;
      vd most = {}, fewest = 1.0 - vd{};
      if (step == 0) {
        for (int64_t j = 0; j < s.states; j++) now_blank[j] = now_label[j] = 0;
        now_blank[0] = s.blank_emission[0];
        if (m) now_label[0] = emissions(0)[0];
        most[0] = now_blank[0] > now_label[0] ? now_blank[0] : now_label[0];
      } else {
        advance(step, power_of_two(-s.top[step - 1]), most, fewest);
      }
      largest = largest_of(most);
      s.top[step] = exponent_or_0(largest);
      s.faint[step] = -largest_of(-fewest) < noticed;
      any_faint |= s.faint[step] != 0;
    }
    const double last = largest > 0 ? blanks(n - 1)[m] + (m ? labels(n - 1)[m - 1] : 0) : 0;
    total = last > 0 ? log2(last) + s.taken[n - 1] : -HUGE_VAL;
    if (!any_faint) return Verdict::number;
    if (!(last > 0)) return Verdict::lost;  // nothing but what vanished
    if (p.with_gradient) return Verdict::number;
    // From the end on, what the steps ahead can multiply a state by at most.
    int64_t ahead = 0;
    for (int64_t step = n - 1; step >= 0; step--) {
      if (s.faint[step] && matter(s.taken[step] + ahead, total)) return Verdict::lost;
      ahead += s.most[step] + 2;  // up to three states come from one
    }
    return Verdict::number;
  }
  // Whether states below `noticed`, with such a power of two taken off or to come, can be seen in the total.
  bool matter(int64_t exponents, double total) const {
    return !(double(noticed_exponent + exponents) + log2(double(2 * m + 2) * double(n)) < total + worth);
  }

  PYSEQNET_INLINE void advance(int64_t step, double scale, vd& most, vd& fewest) const {
    const double *old_blank = blanks(step - 1), *old_label = labels(step - 1);
    double *now_blank = blanks(step), *now_label = labels(step);
    const float* emission = emissions(step);
    const double blank = s.blank_emission[step] * scale;
    for (int64_t j = 0; j <= m; j += DL) {
      const vd from_blank = load_d(old_blank + j), from_label = load_d(old_label + j);
      const vd from_left = load_d(old_label + j - 1);
      const vd new_blank = (from_blank + from_left) * blank;
      const vd new_label =
          (from_label + from_blank + load_d(s.skip + DL + j) * from_left) * (load_d(emission + j) * scale);
      store_d(now_blank + j, new_blank);
      store_d(now_label + j, new_label);
      most = max_d(most, max_d(new_blank, new_label));
      fewest = min_d(fewest, min_d(new_blank > 0.0 ? new_blank : 1.0, new_label > 0.0 ? new_label : 1.0));
    }
  }

  // Takes the posteriors off a step's softmax. False if they cannot be told.
  PYSEQNET_INLINE bool write(int64_t step, const double* blank_back, const double* label_back) const {
    const double *now_blank = blanks(step), *now_label = labels(step);
    vd at_blank = {}, at_labels = {};
    for (int64_t j = 0; j <= m; j += DL) {
      at_blank += load_d(now_blank + j) * load_d(blank_back + j);
      const vd label = load_d(now_label + j) * load_d(label_back + j);
      at_labels += label;
      store_d(s.posterior + j, label);
    }
    const double blank = sum_of(at_blank), sum = blank + sum_of(at_labels), inverse = 1.0 / sum;
    if (!(sum > 0x1p-500)) return false;
    float* row = s.row;
    if constexpr (gradient_is_float) {
      row = reinterpret_cast<float*>(gx(step));
    } else {
      for (int64_t c = 0; c < p.C; c += VL)
        store(s.row + c, power((classes(x(step), c) - s.largest[step]) * LOG2E) * s.inverse[step]);
    }
    for (int64_t j = 0; j < m; j++) row[s.labels[j]] -= float(s.posterior[j] * inverse);
    row[p.blank] -= float(blank * inverse);
    if constexpr (!gradient_is_float)
      for (int64_t c = 0; c < p.C; c += VL)
        store_lanes_n(gx(step) + c, load(row + c), p.C - c < VL ? int(p.C - c) : VL);
    return true;
  }

  // False if the log domain has to do it.
  bool gradient(double total) const {
    double *blank_back = s.blank_back + DL, *label_back = s.label_back + DL;
    double *blank_ahead = s.blank_ahead + DL, *label_ahead = s.label_ahead + DL;
    for (int64_t j = -DL; j < s.states + DL; j++)
      blank_back[j] = label_back[j] = blank_ahead[j] = label_ahead[j] = 0;
    blank_back[m] = 0.5;
    if (m) label_back[m - 1] = 0.5;
    int64_t taken = 1;  // exponents, of what is in blank_back and label_back and of the largest there
    int top = 0;
    bool faint = false;
    for (int64_t step = n - 1; step >= 0; step--) {
      if (s.faint[step] && matter(s.taken[step] + taken + top, total)) return false;
      if (faint && matter(taken + s.taken[step] + s.top[step], total)) return false;
      if (!write(step, blank_back, label_back)) return false;
      const float* emission = emissions(step);
      const double scale = power_of_two(-top), blank = s.blank_emission[step] * scale;
      for (int64_t j = 0; j <= m; j += DL) {
        store_d(blank_ahead + j, load_d(blank_back + j) * blank);
        store_d(label_ahead + j, load_d(label_back + j) * (load_d(emission + j) * scale));
      }
      vd most = {}, fewest = 1.0 - vd{};
      for (int64_t j = 0; j <= m; j += DL) {
        const vd at_blank = load_d(blank_ahead + j), at_label = load_d(label_ahead + j);
        const vd new_blank = at_blank + at_label;
        const vd new_label = at_label + load_d(blank_ahead + j + 1) +
                             load_d(s.skip + DL + j + 1) * load_d(label_ahead + j + 1);
        store_d(blank_back + j, new_blank);
        store_d(label_back + j, new_label);
        most = max_d(most, max_d(new_blank, new_label));
        fewest = min_d(fewest, min_d(new_blank > 0.0 ? new_blank : 1.0, new_label > 0.0 ? new_label : 1.0));
      }
      taken += top, top = exponent_or_0(largest_of(most)), faint = -largest_of(-fewest) < noticed;
    }
    return true;
  }
};

}  // namespace
}  // namespace PYSEQNET_ISA
}  // namespace pyseqnet
