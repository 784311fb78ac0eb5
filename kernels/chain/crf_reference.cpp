// The oracle of the linear-chain CRF: the recursions of crf.h in the log domain, in double precision (Lafferty et
// al., 2001; Rabiner, 1989, for the forward and backward variables). It is also the kernel that serves float64, and
// the one that finds more than one best sequence.
//
//   forward   a[t,j] = e[t,j] + log sum over i of exp(a[t-1,i] + A[i,j])           logZ = log sum of exp(a[n-1,j] + z[j])
//   backward  b[t,i] = log sum over j of exp(A[i,j] + e[t+1,j] + b[t+1,j])          P(y[t] = j) = exp(a + b - logZ)
//   viterbi   the same with the k largest values for the sum, and where they came from
//
// Items are sequences, except that the gradients of what all sequences share are summed by one item, in their order.
#include <cmath>
#include <limits>

#include "chain/chain_math.h"
#include "chain/crf.h"
#include "common/numerics.h"

namespace pyseqnet {
namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();
constexpr double not_a_number = std::numeric_limits<double>::quiet_NaN();

template <class T, class A>
struct Sequence {
  const CrfProblem& p;
  const CrfTensors& t;
  int64_t b, n;
  Sequence(const CrfProblem& problem, const CrfTensors& tensors, int64_t index)
      : p(problem), t(tensors), b(index), n(tensors.lengths[index]) {}

  double e(int64_t step, int64_t j) const {
    return to_double(static_cast<const T*>(t.e)[b * p.e_b + step * p.e_t + j]);
  }
  double start(int64_t j) const { return static_cast<const A*>(t.start)[j]; }
  double end(int64_t j) const { return static_cast<const A*>(t.end)[j]; }
  double transition(int64_t i, int64_t j) const { return static_cast<const A*>(t.transitions)[i * p.C + j]; }
  const int64_t* tags() const { return t.tags + b * p.T; }

  // alpha (n, C); returns logZ.
  double forward(double* alpha) const {
    for (int64_t j = 0; j < p.C; j++) alpha[j] = start(j) + e(0, j);
    for (int64_t step = 1; step < n; step++)
      for (int64_t j = 0; j < p.C; j++) {
        const double* before = alpha + (step - 1) * p.C;
        alpha[step * p.C + j] =
            e(step, j) + log_sum<double>(p.C, [&](int64_t i) { return before[i] + transition(i, j); });
      }
    return log_sum<double>(p.C, [&](int64_t j) { return alpha[(n - 1) * p.C + j] + end(j); });
  }

  double score() const {
    const int64_t* y = tags();
    double sum = start(y[0]) + end(y[n - 1]);
    for (int64_t step = 0; step < n; step++) {
      sum += e(step, y[step]);
      if (step) sum += transition(y[step - 1], y[step]);
    }
    return sum;
  }

  // Adds g times the gradient: to ge what belongs to the sequence, to sums (start, end, transitions) the rest.
  void gradient(double g, double* alpha, double* beta, double* ahead, double* sums) const {
    T* ge = static_cast<T*>(t.ge) + b * p.T * p.C;
    double *gstart = sums, *gend = sums + p.C, *gtransitions = sums + 2 * p.C;
    const double logz = forward(alpha);
    const int64_t* y = t.tags ? tags() : nullptr;
    for (int64_t j = 0; j < p.C; j++) beta[j] = end(j);
    for (int64_t step = n - 1; step >= 0; step--) {
      const double* a = alpha + step * p.C;
      if (step < n - 1) {
        for (int64_t j = 0; j < p.C; j++) ahead[j] = e(step + 1, j) + beta[j];
        for (int64_t i = 0; i < p.C; i++) {
          for (int64_t j = 0; j < p.C; j++)
            gtransitions[i * p.C + j] -= g * std::exp(a[i] + transition(i, j) + ahead[j] - logz);
          beta[i] = log_sum<double>(p.C, [&](int64_t j) { return transition(i, j) + ahead[j]; });
        }
      }
      for (int64_t j = 0; j < p.C; j++) {
        const double marginal = std::exp(a[j] + beta[j] - logz);
        round_to(ge[step * p.C + j], g * ((y && y[step] == j) - marginal));
        if (step == 0) gstart[j] -= g * marginal;
        if (step == n - 1) gend[j] -= g * marginal;
      }
    }
    if (!y) return;
    gstart[y[0]] += g, gend[y[n - 1]] += g;
    for (int64_t step = 1; step < n; step++) gtransitions[y[step - 1] * p.C + y[step]] += g;
  }
};

// ---------------------------------------------------------------- log-likelihood

template <class T, class A>
void log_likelihood(const CrfProblem& p, const CrfTensors& t, int64_t b, double* alpha) {
  A& llh = static_cast<A*>(t.llh)[b];
  if (!crf_is_valid(p, t, b)) return round_to(llh, not_a_number);
  const Sequence<T, A> sequence(p, t, b);
  const double logz = sequence.forward(alpha);
  round_to(llh, (t.tags ? sequence.score() : 0.0) - logz);
}

// ---------------------------------------------------------------- gradient

template <class T, class A>
void gradient(const CrfProblem& p, const CrfTensors& t, double* scratch) {
  double *alpha = scratch, *beta = alpha + p.T * p.C, *ahead = beta + p.C, *sums = ahead + p.C;
  const int64_t shared = (2 + p.C) * p.C;
  for (int64_t x = 0; x < shared; x++) sums[x] = 0;
  for (int64_t x = 0; x < p.B * p.T * p.C; x++) round_to(static_cast<T*>(t.ge)[x], 0.0);
  for (int64_t b = 0; b < p.B; b++)
    if (crf_is_valid(p, t, b))
      Sequence<T, A>(p, t, b).gradient(static_cast<const A*>(t.g)[b], alpha, beta, ahead, sums);
  for (int64_t j = 0; j < p.C; j++) {
    static_cast<A*>(t.gstart)[j] = A(sums[j]);
    static_cast<A*>(t.gend)[j] = A(sums[p.C + j]);
  }
  for (int64_t x = 0; x < p.C * p.C; x++) static_cast<A*>(t.gtransitions)[x] = A(sums[2 * p.C + x]);
}

// ---------------------------------------------------------------- the best sequences

// alpha: two rows of C lists, from (T, C, k): tag * k + rank of the step before.
template <class T, class A>
void viterbi(const CrfProblem& p, const CrfTensors& t, int64_t b, double* alpha, int32_t* from) {
  const int C = int(p.C), k = int(p.nbest);  // their product fits 32 bits
  int64_t* paths = t.paths + b * k * p.T;
  A* scores = static_cast<A*>(t.scores) + b * k;
  for (int64_t x = 0; x < k * p.T; x++) paths[x] = -1;
  for (int r = 0; r < k; r++) scores[r] = A(not_a_number);
  if (!crf_is_valid(p, t, b)) return;
  const Sequence<T, A> s(p, t, b);
  const auto row = [&](int64_t step) { return alpha + (step % 2) * C * k; };
  bool nan = false;
  for (int64_t step = 0; step < s.n; step++)
    for (int j = 0; j < C; j++) {
      Best<double> best{row(step) + j * k, from + (step * C + j) * k, k};
      best.clear();
      if (step == 0) best.offer(s.start(j), 0);
      for (int i = 0; step && i < C; i++)
        for (int r = 0; r < k; r++) {
          const double value = row(step - 1)[i * k + r] + s.transition(i, j);
          nan |= !(value < infinity);
          best.offer(value, i * k + r);
        }
      nan |= !(s.e(step, j) < infinity) || (step == 0 && !(s.start(j) < infinity));
      for (int r = 0; r < k; r++) best.value[r] += s.e(step, j);
    }
  double* last = alpha + int64_t(2) * C * k;
  Best<double> best{last, from + p.T * C * k, k};
  best.clear();
  for (int j = 0; j < C; j++)
    for (int r = 0; r < k; r++) {
      nan |= !(s.end(j) < infinity);
      best.offer(row(s.n - 1)[j * k + r] + s.end(j), j * k + r);
    }
  if (nan) return;
  for (int r = 0; r < k; r++) {
    scores[r] = A(best.value[r]);
    int at = best.from[r];
    for (int64_t step = s.n - 1; step >= 0 && at >= 0; step--) {
      paths[r * p.T + step] = at / k;
      at = from[step * C * k + at];
    }
  }
}

// ---------------------------------------------------------------- kernels

Refusal takes_everything(const CrfProblem&) { return accepted; }
Refusal refuses_viterbi(const CrfProblem& p) {
  return p.C * p.nbest < (int64_t(1) << 31) ? accepted : "tags times nbest are counted in 32 bits";
}

WorkPlan plan_of(int64_t items, int64_t words) {
  WorkPlan plan;
  plan.add_phase(items);
  plan.thread_bytes = words * int64_t(sizeof(double));
  return plan;
}
WorkPlan plan_log_likelihood(const CrfProblem& p) { return plan_of(p.B, p.T * p.C); }
WorkPlan plan_gradient(const CrfProblem& p) { return plan_of(1, p.T * p.C + 4 * p.C + p.C * p.C); }
WorkPlan plan_viterbi(const CrfProblem& p) { return plan_of(p.B, (2 * p.C + 1 + p.T * p.C + 1) * p.nbest); }

// f(T{}, A{}) for the dtype and that of sums.
template <class F>
void with_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32:
      return f(float{}, float{});
    case DType::bf16:
      return f(bfloat16{}, float{});
    case DType::f16:
      return f(float16{}, float{});
    case DType::f64:
      return f(double{}, double{});
  }
}
void run_log_likelihood(const CrfProblem& p, const CrfTensors& t, const WorkSlice& slice) {
  with_dtype(p.dtype, [&](auto element, auto sum) {
    for (int64_t b = slice.begin; b < slice.end; b++)
      log_likelihood<decltype(element), decltype(sum)>(p, t, b, reinterpret_cast<double*>(slice.scratch));
  });
}
void run_gradient(const CrfProblem& p, const CrfTensors& t, const WorkSlice& slice) {
  with_dtype(p.dtype, [&](auto element, auto sum) {
    gradient<decltype(element), decltype(sum)>(p, t, reinterpret_cast<double*>(slice.scratch));
  });
}
void run_viterbi(const CrfProblem& p, const CrfTensors& t, const WorkSlice& slice) {
  double* alpha = reinterpret_cast<double*>(slice.scratch);
  int32_t* from = reinterpret_cast<int32_t*>(alpha + (2 * p.C + 1) * p.nbest);
  with_dtype(p.dtype, [&](auto element, auto sum) {
    for (int64_t b = slice.begin; b < slice.end; b++)
      viterbi<decltype(element), decltype(sum)>(p, t, b, alpha, from);
  });
}

}  // namespace

extern const CrfCpuKernel crf_reference_log_likelihood, crf_reference_gradient, crf_reference_viterbi;
const CrfCpuKernel crf_reference_log_likelihood = {"reference", Isa::portable, takes_everything,
                                                   plan_log_likelihood, run_log_likelihood};
const CrfCpuKernel crf_reference_gradient = {"reference", Isa::portable, takes_everything, plan_gradient,
                                             run_gradient};
const CrfCpuKernel crf_reference_viterbi = {"reference", Isa::portable, refuses_viterbi, plan_viterbi,
                                            run_viterbi};

}  // namespace pyseqnet
