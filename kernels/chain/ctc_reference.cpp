// The oracle of CTC: the recursions of ctc.h over the 2m + 1 states, one after another, in double precision
// (Graves et al., 2006, sections 4.1 and 4.2). It is also the kernel that serves float64.
//
// One item is one sequence. Work: n (2m + 1) log-sums each way, and n C for the gradient.
#include <cmath>
#include <limits>

#include "chain/chain_math.h"
#include "chain/ctc.h"
#include "common/numerics.h"

namespace pyseqnet {
namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();
constexpr double not_a_number = std::numeric_limits<double>::quiet_NaN();

struct Scratch {
  double *alpha, *beta, *ahead, *row, *norm;
  Scratch(const CtcProblem& p, Carver& carver) {
    const int64_t states = 2 * p.S + 1;
    alpha = carver.take<double>((p.with_gradient ? p.T : 2) * states);
    beta = carver.take<double>(states), ahead = carver.take<double>(states);
    row = carver.take<double>(p.C), norm = carver.take<double>(p.T);
  }
};

template <class T, class A>
struct Sequence {
  const CtcProblem& p;
  const CtcTensors& t;
  const Scratch& s;
  int64_t b, n, m;
  const int64_t* labels;

  Sequence(const CtcProblem& problem, const CtcTensors& tensors, const Scratch& scratch, int64_t index)
      : p(problem), t(tensors), s(scratch), b(index) {
    n = t.input_lengths[b], m = t.target_lengths[b];
    labels = t.targets + t.target_offsets[b];
  }
  const T* x(int64_t step) const { return static_cast<const T*>(t.x) + step * p.x_t + b * p.x_b; }
  T* gx(int64_t step) const { return static_cast<T*>(t.gx) + (step * p.B + b) * p.C; }
  int64_t states() const { return 2 * m + 1; }
  int64_t class_of(int64_t state) const { return state % 2 ? labels[state / 2] : p.blank; }
  double y(int64_t step, int64_t c) const { return to_double(x(step)[c]) - s.norm[step]; }
  bool skips_to(int64_t state) const { return ctc_skips(labels, state); }

  // log of the sum of exponentials of a step; NaN where the step holds NaN or +infinity.
  double normalizer(int64_t step) const {
    double largest = -infinity, sum = 0;
    for (int64_t c = 0; c < p.C; c++) {
      const double value = to_double(x(step)[c]);
      if (!(value < infinity)) return not_a_number;
      largest = std::fmax(largest, value);
    }
    if (!p.from_logits) return 0;
    if (largest == -infinity) return not_a_number;
    for (int64_t c = 0; c < p.C; c++) sum += std::exp(to_double(x(step)[c]) - largest);
    return largest + std::log(sum);
  }

  double* alpha(int64_t step) const { return s.alpha + (p.with_gradient ? step : step % 2) * (2 * p.S + 1); }

  // log of the probability of all paths; NaN where a step holds NaN.
  double sum_of_paths() const {
    for (int64_t step = 0; step < n; step++) {
      s.norm[step] = normalizer(step);
      if (std::isnan(s.norm[step])) return not_a_number;
      double* now = alpha(step);
      const double* before = step ? alpha(step - 1) : nullptr;
      for (int64_t state = 0; state < states(); state++) {
        double from = step ? before[state] : state < 2 ? 0 : -infinity;
        if (step && state > 0) from = log_add(from, before[state - 1]);
        if (step && skips_to(state)) from = log_add(from, before[state - 2]);
        now[state] = from + y(step, class_of(state));
      }
    }
    const double* last = alpha(n - 1);
    return m ? log_add(last[2 * m], last[2 * m - 1]) : last[0];
  }

  void fill_gradient(int64_t first, int64_t last, double value) const {
    for (int64_t step = first; step < last; step++)
      for (int64_t c = 0; c < p.C; c++) round_to(gx(step)[c], value);
  }

  void gradient(double total) const {
    for (int64_t state = 0; state < states(); state++) s.beta[state] = state >= 2 * m - 1 ? 0 : -infinity;
    for (int64_t step = n - 1; step >= 0; step--) {
      for (int64_t c = 0; c < p.C; c++) s.row[c] = std::exp(y(step, c));
      for (int64_t state = 0; state < states(); state++) {
        s.row[class_of(state)] -= std::exp(alpha(step)[state] + s.beta[state] - total);
        s.ahead[state] = s.beta[state] + y(step, class_of(state));
      }
      for (int64_t c = 0; c < p.C; c++) round_to(gx(step)[c], s.row[c]);
      for (int64_t state = 0; state < states(); state++) {
        s.beta[state] = s.ahead[state];
        if (state + 1 < states()) s.beta[state] = log_add(s.beta[state], s.ahead[state + 1]);
        if (state + 2 < states() && skips_to(state + 2))
          s.beta[state] = log_add(s.beta[state], s.ahead[state + 2]);
      }
    }
  }

  void run() const {
    const bool valid = ctc_is_valid(p, t, b);
    const double total = !valid ? not_a_number : m > n ? -infinity : n ? sum_of_paths() : 0;
    round_to(static_cast<A*>(t.loss)[b], ctc_loss_of(p, -total));
    if (!t.gx) return;
    const int64_t steps = valid ? n : 0;
    if (total > -infinity)
      gradient(total);
    else
      fill_gradient(0, steps, std::isnan(total) ? total : 0);
    fill_gradient(steps, p.T, 0);
  }
};

WorkPlan plan(const CtcProblem& p) {
  WorkPlan plan;
  plan.add_phase(p.B);
  Carver carver(nullptr);
  const Scratch scratch(p, carver);
  plan.thread_bytes = carver.used();
  return plan;
}

template <class T, class A>
void run_as(const CtcProblem& p, const CtcTensors& t, const WorkSlice& slice) {
  Carver carver(slice.scratch);
  const Scratch scratch(p, carver);
  for (int64_t b = slice.begin; b < slice.end; b++) Sequence<T, A>(p, t, scratch, b).run();
}
void run(const CtcProblem& p, const CtcTensors& t, const WorkSlice& slice) {
  switch (p.dtype) {
    case DType::f32:
      return run_as<float, float>(p, t, slice);
    case DType::bf16:
      return run_as<bfloat16, float>(p, t, slice);
    case DType::f16:
      return run_as<float16, float>(p, t, slice);
    case DType::f64:
      return run_as<double, double>(p, t, slice);
  }
}

}  // namespace

extern const CtcCpuKernel ctc_reference;
const CtcCpuKernel ctc_reference = {"reference", Isa::portable,
                                    [](const CtcProblem&) -> Refusal { return accepted; }, plan, run};

}  // namespace pyseqnet
