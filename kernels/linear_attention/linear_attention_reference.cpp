// The oracle of linear attention: the recurrences of linear_attention.h one position after another, in double
// precision, for every dtype, head size and length (Katharopoulos et al., 2020, equations 9, 10 and 13 to
// 15). It is also the kernel that serves float64.
//
//   forward    keys enter the state one by one; causal queries read it as it grows, others when it is full
//   backward   the same sweep gives dq; a sweep from the other end, over queries, gives dk and dv. The
//              gradient of the decay goes forward: beside the state S its derivative by g,
//              S'[i] = S[i-1] + g S'[i-1], which queries and the last state's gradient read
//
// One item is one head. About 4 D E multiplications a position forward, twice that backward.
#include <cmath>

#include "common/numerics.h"
#include "linear_attention/linear_attention.h"
#include "linear_attention/linear_attention_features.h"

namespace pyseqnet {
namespace {

double feature_of(FeatureMap map, double x) {
  return with_feature_map(
      map, [&](auto tag) { return feature<decltype(tag)::map>(x, [](double y) { return std::exp(y); }); });
}
double feature_gradient_of(FeatureMap map, double f) {
  return with_feature_map(map, [&](auto tag) { return feature_gradient<decltype(tag)::map>(f); });
}

// One head of a call: T is the dtype, A that of the states.
template <class T, class A>
struct Head {
  const LinearAttentionProblem& p;
  const LinearAttentionTensors& t;
  int64_t b, h;
  LinearAttentionRows rows = t.rows(p, b, h);
  double decay = p.decayed ? t.decay[h] : 1.0;
  double* log_sums = nullptr;  // the map softmax: of each key feature

  int64_t index() const { return b * p.H + h; }
  template <class P>
  P* at(P* base, const HeadStrides& s, int64_t row) const {
    return base + b * s.b + h * s.h + (rows.begin + row) * s.row;
  }
  const T* q(int64_t i) const { return at(static_cast<const T*>(t.q), p.q, i); }
  const T* k(int64_t j) const { return at(static_cast<const T*>(t.k), p.k, j); }
  const T* v(int64_t j) const { return at(static_cast<const T*>(t.v), p.v, j); }
  const T* gout(int64_t i) const { return at(static_cast<const T*>(t.gout), p.gout, i); }
  T* out(int64_t i) const { return at(static_cast<T*>(t.out), p.out, i); }
  T* dq(int64_t i) const { return at(static_cast<T*>(t.dq), p.dq, i); }
  T* dk(int64_t j) const { return at(static_cast<T*>(t.dk), p.dk, j); }
  T* dv(int64_t j) const { return at(static_cast<T*>(t.dv), p.dv, j); }

  // S [D][E] then z [D] of this head, from a tensor pair; zeros where there is none.
  void read_state(const void* state, const void* normalizer, double* s) const {
    const int64_t matrix = p.D * p.E;
    for (int64_t x = 0; x < matrix; x++)
      s[x] = state ? double(static_cast<const A*>(state)[index() * matrix + x]) : 0.0;
    for (int64_t d = 0; d < p.D; d++)
      s[matrix + d] = normalizer ? double(static_cast<const A*>(normalizer)[index() * p.D + d]) : 0.0;
  }
  void write_state(void* state, void* normalizer, const double* s) const {
    const int64_t matrix = p.D * p.E;
    if (state)
      for (int64_t x = 0; x < matrix; x++) static_cast<A*>(state)[index() * matrix + x] = A(s[x]);
    if (normalizer)
      for (int64_t d = 0; d < p.D; d++) static_cast<A*>(normalizer)[index() * p.D + d] = A(s[matrix + d]);
  }
  void save(int64_t which, const double* s) const {
    A* to = static_cast<A*>(t.saved) + (rows.saved + which) * p.state_size();
    for (int64_t x = 0; x < p.state_size(); x++) to[x] = A(s[x]);
  }

  void save_decay_share(int64_t i, double share) const {
    static_cast<A*>(t.ddecay)[rows.saved + i / p.chunk_rows] = A(share);
  }
  void read_saved(double* s) const {
    const A* from = static_cast<const A*>(t.saved) + rows.saved * p.state_size();
    for (int64_t x = 0; x < p.state_size(); x++) s[x] = double(from[x]);
  }

  void query_features(int64_t i, double* a) const {
    double most = 0;
    for (int64_t d = 0; p.softmax() && d < p.D; d++)
      most = d == 0 || p.scale * to_double(q(i)[d]) > most ? p.scale * to_double(q(i)[d]) : most;
    for (int64_t d = 0; d < p.D; d++) a[d] = feature_of(p.feature_map, p.scale * to_double(q(i)[d]) - most);
  }
  void key_features(int64_t j, double* f) const {
    for (int64_t d = 0; d < p.D; d++)
      f[d] = feature_of(p.feature_map, to_double(k(j)[d]) - (log_sums ? log_sums[d] : 0.0));
  }
  void sum_logs() {
    for (int64_t d = 0; d < p.D; d++) {
      double most = -HUGE_VAL, sum = 0;
      for (int64_t j = 0; j < rows.keys; j++) most = std::fmax(most, to_double(k(j)[d]));
      for (int64_t j = 0; j < rows.keys; j++) sum += std::exp(to_double(k(j)[d]) - most);
      log_sums[d] = most + std::log(sum);
    }
  }
  // What query i's features are summed with: z, or the ones that softmax makes of it.
  double normalizer(const double* s, int64_t d) const { return p.softmax() ? 1.0 : s[p.D * p.E + d]; }
  void fade(double* s) const {
    if (!p.decayed) return;
    for (int64_t x = 0; x < p.state_size(); x++) s[x] *= decay;
  }
  // The state's derivative by the decay fades and takes up the state before it fades.
  void fade_derivative(const double* s, double* derivative) const {
    for (int64_t x = 0; x < p.state_size(); x++) derivative[x] = s[x] + decay * derivative[x];
  }
  void add_key(int64_t j, const double* f, double* s) const {
    for (int64_t d = 0; d < p.D; d++) {
      for (int64_t e = 0; e < p.E; e++) s[d * p.E + e] += f[d] * to_double(v(j)[e]);
      s[p.D * p.E + d] += f[d];
    }
  }

  void forward(double* scratch) {
    double *s = scratch, *feature = s + p.state_size(), *numerator = feature + p.D;
    read_state(t.state0, t.normalizer0, s);
    if (p.softmax()) log_sums = numerator + p.E + 1, sum_logs();
    if (!p.causal) {
      for (int64_t j = 0; j < rows.keys; j++) key_features(j, feature), add_key(j, feature, s);
      for (int64_t d = 0; p.softmax() && d < p.D; d++) s[p.D * p.E + d] = log_sums[d];
      if (t.saved) save(0, s);
    }
    for (int64_t i = 0; i < rows.L; i++) {
      if (p.causal) {
        if (t.saved && i % p.chunk_rows == 0) save(i / p.chunk_rows, s);
        if (i < rows.keys) fade(s), key_features(i, feature), add_key(i, feature, s);
      }
      query_features(i, feature);
      for (int64_t e = 0; e < p.E; e++) numerator[e] = 0;
      double sum = p.eps;
      for (int64_t d = 0; d < p.D; d++) {
        for (int64_t e = 0; e < p.E; e++) numerator[e] += feature[d] * s[d * p.E + e];
        sum += feature[d] * normalizer(s, d);
      }
      const double inverse = !p.normalize ? 1.0 : sum == 0 ? 0.0 : 1.0 / sum;
      for (int64_t e = 0; e < p.E; e++) round_to(out(i)[e], inverse == 0 ? 0.0 : numerator[e] * inverse);
      if (t.inverse) static_cast<A*>(t.inverse)[rows.inverse + i] = A(inverse);
    }
    write_state(t.state, t.normalizer, s);
  }

  // dn[E], and dd in dn[E]; false where the row adds nothing.
  bool output_gradient(int64_t i, double* dn) const {
    bool any = false;
    double dot = 0;
    for (int64_t e = 0; e < p.E; e++) {
      dn[e] = to_double(gout(i)[e]);
      any |= dn[e] != 0;
      if (p.normalize) dot += dn[e] * to_double(out(i)[e]);
    }
    if (!any) return false;
    const double inverse = p.normalize ? double(static_cast<const A*>(t.inverse)[rows.inverse + i]) : 1.0;
    for (int64_t e = 0; e < p.E; e++) dn[e] = inverse == 0 ? 0.0 : dn[e] * inverse;
    dn[p.E] = p.normalize && inverse != 0 ? -dot * inverse : 0.0;
    return inverse != 0;
  }

  void query_gradient(int64_t i, const double* s, double* a, double* dn) const {
    const bool any = output_gradient(i, dn);
    if (any) query_features(i, a);
    for (int64_t d = 0; d < p.D; d++) {
      double g = 0;
      if (any) {
        g = normalizer(s, d) * dn[p.E];
        for (int64_t e = 0; e < p.E; e++) g += s[d * p.E + e] * dn[e];
        g *= feature_gradient_of(p.feature_map, a[d]) * p.scale;
      }
      round_to(dq(i)[d], g);
    }
  }
  void key_gradient(int64_t j, const double* r, double* f, double* gv) const {
    key_features(j, f);
    for (int64_t e = 0; e < p.E; e++) gv[e] = 0;
    for (int64_t d = 0; d < p.D; d++) {
      double g = r[p.D * p.E + d];
      for (int64_t e = 0; e < p.E; e++) {
        g += r[d * p.E + e] * to_double(v(j)[e]);
        gv[e] += r[d * p.E + e] * f[d];
      }
      round_to(dk(j)[d], g * feature_gradient_of(p.feature_map, f[d]));
    }
    for (int64_t e = 0; e < p.E; e++) round_to(dv(j)[e], gv[e]);
  }
  void add_query(int64_t i, double* r, double* a, double* dn) const {
    if (!output_gradient(i, dn)) return;
    query_features(i, a);
    for (int64_t d = 0; d < p.D; d++) {
      for (int64_t e = 0; e < p.E; e++) r[d * p.E + e] += a[d] * dn[e];
      r[p.D * p.E + d] += a[d] * dn[p.E];
    }
  }

  // What query i says to the decay through a state's derivative.
  double decay_gradient(int64_t i, const double* derivative, double* a, double* dn) const {
    if (!output_gradient(i, dn)) return 0;
    query_features(i, a);
    double sum = 0;
    for (int64_t d = 0; d < p.D; d++) {
      sum += a[d] * derivative[p.D * p.E + d] * dn[p.E];
      for (int64_t e = 0; e < p.E; e++) sum += a[d] * derivative[d * p.E + e] * dn[e];
    }
    return sum;
  }

  void backward(double* scratch) {
    double *s = scratch, *feature = s + p.state_size(), *row = feature + p.D;
    double* derivative = t.ddecay ? row + p.E + 1 : nullptr;
    for (int64_t x = 0; derivative && x < p.state_size(); x++) derivative[x] = 0;
    double share = 0;
    // Causal: the state before the first key. Otherwise: with all keys in it.
    if (rows.L > 0 || !p.causal) read_saved(s);
    if (p.softmax()) {
      log_sums = row + p.E + 1;
      for (int64_t d = 0; d < p.D; d++) log_sums[d] = s[p.D * p.E + d];
    }
    for (int64_t i = 0; i < rows.L; i++) {
      if (derivative && i < rows.keys) fade_derivative(s, derivative);
      if (p.causal && i < rows.keys) fade(s), key_features(i, feature), add_key(i, feature, s);
      query_gradient(i, s, feature, row);
      if (!derivative) continue;
      share += decay_gradient(i, derivative, feature, row);
      if ((i + 1) % p.chunk_rows == 0 && i + 1 < rows.L) save_decay_share(i, share), share = 0;
    }
    double* r = s;
    read_state(t.gstate, t.gnormalizer, r);
    if (derivative && rows.L > 0) {
      for (int64_t x = 0; x < p.state_size(); x++) share += r[x] * derivative[x];
      save_decay_share(rows.L - 1, share);
    }
    if (!p.causal)
      for (int64_t i = 0; i < rows.L; i++) add_query(i, r, feature, row);
    if (p.softmax()) {
      const A* state = static_cast<const A*>(t.saved) + rows.saved * p.state_size();
      for (int64_t d = 0; d < p.D; d++) {
        double dot = 0;
        for (int64_t e = 0; e < p.E; e++) dot += r[d * p.E + e] * double(state[d * p.E + e]);
        r[p.D * p.E + d] = -dot;
      }
    }
    for (int64_t j = rows.S - 1; j >= 0; j--) {
      if (p.causal) add_query(j, r, feature, row);
      if (j < rows.keys) {
        key_gradient(j, r, feature, row);
        fade(r);
        continue;
      }
      for (int64_t d = 0; d < p.D; d++) round_to(dk(j)[d], 0.0);
      for (int64_t e = 0; e < p.E; e++) round_to(dv(j)[e], 0.0);
    }
    write_state(t.dstate0, t.dnormalizer0, r);
  }
};

Refusal refuses(const LinearAttentionProblem&) { return accepted; }

WorkPlan plan(const LinearAttentionProblem& p) {
  constexpr int64_t products_worth_a_thread = 20000;  // about 20 microseconds
  const int64_t work = (p.L + p.S) * p.D * p.E + 1;
  WorkPlan plan;
  plan.add_phase(p.heads(), work < products_worth_a_thread ? products_worth_a_thread / work : 1);
  const int64_t more = p.decayed ? p.state_size() : p.softmax() ? p.D : 0;
  plan.thread_bytes = align_up((p.state_size() + p.D + p.E + 1 + more) * int64_t(sizeof(double)));
  return plan;
}

template <class T, class A>
void run_heads(LinearAttentionPass pass, const LinearAttentionProblem& p, const LinearAttentionTensors& t,
               const WorkSlice& slice) {
  double* scratch = reinterpret_cast<double*>(slice.scratch);
  for (int64_t k = slice.begin; k < slice.end; k++) {
    Head<T, A> head{p, t, k / p.H, k % p.H};
    pass == LinearAttentionPass::forward ? head.forward(scratch) : head.backward(scratch);
  }
}
void run_pass(LinearAttentionPass pass, const LinearAttentionProblem& p, const LinearAttentionTensors& t,
              const WorkSlice& slice) {
  switch (p.dtype) {
    case DType::f32:
      return run_heads<float, float>(pass, p, t, slice);
    case DType::bf16:
      return run_heads<bfloat16, float>(pass, p, t, slice);
    case DType::f16:
      return run_heads<float16, float>(pass, p, t, slice);
    case DType::f64:
      return run_heads<double, double>(pass, p, t, slice);
  }
}
void run_forward(const LinearAttentionProblem& p, const LinearAttentionTensors& t, const WorkSlice& slice) {
  run_pass(LinearAttentionPass::forward, p, t, slice);
}
void run_backward(const LinearAttentionProblem& p, const LinearAttentionTensors& t, const WorkSlice& slice) {
  run_pass(LinearAttentionPass::backward, p, t, slice);
}

}  // namespace

extern const LinearAttentionCpuKernel linear_attention_reference_forward, linear_attention_reference_backward;
const LinearAttentionCpuKernel linear_attention_reference_forward = {"reference", Isa::portable, refuses,
                                                                     plan, run_forward};
const LinearAttentionCpuKernel linear_attention_reference_backward = {"reference", Isa::portable, refuses,
                                                                      plan, run_backward};

}  // namespace pyseqnet
