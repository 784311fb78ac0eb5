// CTC on the CPU: loss and gradient of one sequence after another, both in one call.
//
// Sums of products of probabilities in double (ctc_scaled.h) where the numbers allow, which is shown, not assumed; else
// in the log domain (ctc_log_domain.h). Nothing but the gradient outlives the call. Bounds are there.
#include "chain/ctc_log_domain.h"
#include "chain/ctc_scaled.h"

namespace pyseqnet {
inline namespace PYSEQNET_ISA {
namespace {

template <class T>
struct Sequence : CtcSequence<T> {
  const CtcScaledScratch& scaled;
  const CtcLogScratch& logs;
  using CtcSequence<T>::p, CtcSequence<T>::t, CtcSequence<T>::b, CtcSequence<T>::n, CtcSequence<T>::m;
  using CtcSequence<T>::gx;

  void fill_gradient(int64_t first, int64_t last, float value) const {
    for (int64_t step = first; step < last; step++)
      for (int64_t c = 0; c < p.C; c += VL) store_lanes_n(gx(step) + c, set1(value), lanes_left(p.C - c));
  }

  enum class Outcome { reached, unreachable, not_a_number };

  // Loss in log2 of the sum over paths, and the gradient where there is one.
  Outcome solve(double& total) const {
    const int64_t* targets = t.targets + t.target_offsets[b];
    const CtcScaled<T> fast{*this, scaled};
    fast.set_up(targets);
    switch (fast.sum_of_paths(total)) {
      case CtcScaled<T>::Verdict::not_a_number:
        return Outcome::not_a_number;
      case CtcScaled<T>::Verdict::number:
        if (total == -HUGE_VAL) return Outcome::unreachable;
        if (!t.gx || fast.gradient(total)) return Outcome::reached;
        break;
      case CtcScaled<T>::Verdict::lost:
        break;
    }
    const CtcLogDomain<T> exact{*this, logs};
    exact.set_up(targets);
    if (!exact.sum_of_paths(total)) return Outcome::not_a_number;
    if (!(total > unreachable)) return Outcome::unreachable;
    if (t.gx) exact.gradient(total);
    return Outcome::reached;
  }

  void run() const {
    constexpr float not_a_number = __builtin_nanf("");
    const bool valid = ctc_is_valid(p, t, b);
    double total = 0;
    Outcome outcome = !valid ? Outcome::not_a_number : m > n ? Outcome::unreachable : Outcome::reached;
    if (outcome == Outcome::reached && n) outcome = solve(total);
    const float loss = outcome == Outcome::not_a_number  ? not_a_number
                       : outcome == Outcome::unreachable ? HUGE_VALF
                                                         : float(0.0 - total * double(LN2));
    static_cast<float*>(t.loss)[b] = ctc_loss_of(p, loss);
    if (!t.gx) return;
    const int64_t steps = valid ? n : 0;
    if (outcome != Outcome::reached) fill_gradient(0, steps, valid && loss != loss ? not_a_number : 0.0f);
    fill_gradient(steps, p.T, 0);
  }
};

Refusal refuses(const CtcProblem& p) {
  if (p.dtype == DType::f64) return "float64 is served by the reference";
  if (p.C >= (int64_t(1) << 31)) return "classes are counted in 32 bits";
  return accepted;
}

// One sequence's memory serves both ways, one after the other.
struct Scratch {
  CtcScaledScratch scaled;
  CtcLogScratch logs;
  Scratch(const CtcProblem& p, Carver first, Carver second) : scaled(p, first), logs(p, second) {}
};

WorkPlan plan(const CtcProblem& p) {
  constexpr int64_t grain_states = 120 * 1000;  // about 20 microseconds
  WorkPlan plan;
  const int64_t work = p.T * (2 * p.S + p.C + 16);
  plan.add_phase(p.B, work > grain_states ? 1 : grain_states / (work > 0 ? work : 1) + 1);
  Carver scaled(nullptr), logs(nullptr);
  const CtcScaledScratch a(p, scaled);
  const CtcLogScratch b(p, logs);
  plan.thread_bytes = scaled.used() > logs.used() ? scaled.used() : logs.used();
  return plan;
}

void run(const CtcProblem& p, const CtcTensors& t, const WorkSlice& slice) {
  const FlushDenormals guard;
  const Scratch scratch(p, Carver(slice.scratch), Carver(slice.scratch));
  with_element(p.dtype, [&](auto element) {
    for (int64_t b = slice.begin; b < slice.end; b++)
      Sequence<decltype(element)>{
          {p, t, b, t.input_lengths[b], t.target_lengths[b]}, scratch.scaled, scratch.logs}
          .run();
  });
}

}  // namespace

extern const CtcCpuKernel ctc;
const CtcCpuKernel ctc = {PYSEQNET_ISA_NAME, this_isa, refuses, plan, run};

}  // namespace PYSEQNET_ISA
}  // namespace pyseqnet
