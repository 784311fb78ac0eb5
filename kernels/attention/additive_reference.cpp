// The oracle of additive attention: the formulae of additive.h in plain loops, accumulated in double, for
// every dtype. Slow; it is what everything else is compared with, and it runs float64.
#include <cmath>

#include "attention/additive.h"
#include "attention/additive_math.h"
#include "common/numerics.h"

namespace pyseqnet {
namespace {

template <class T>
struct Reader {
  const AdditiveProblem& p;
  const AdditiveTensors& t;

  static double read(const void* data, int64_t at) { return to_double(static_cast<const T*>(data)[at]); }
  static void write(void* data, int64_t at, double x) { round_to(static_cast<T*>(data)[at], x); }

  int64_t keys(int64_t b) const {
    if (!p.with_key_lengths) return p.S;
    return t.key_lengths[b] < 0 ? 0 : t.key_lengths[b] > p.S ? p.S : t.key_lengths[b];
  }
  double tanh_of(int64_t b, int64_t i, int64_t j, int64_t d) const {
    const double bias = p.with_bias ? read(t.bias, d) : 0.0;
    return pyseqnet::tanh_of(read(t.q, b * p.q.b + i * p.q.n + d) + read(t.k, b * p.k.b + j * p.k.n + d) +
                             bias);
  }
  double score(int64_t b, int64_t i, int64_t j) const {
    double z = 0;
    for (int64_t d = 0; d < p.D; d++) z += read(t.w, d) * tanh_of(b, i, j, d);
    return z;
  }
  double value(int64_t b, int64_t j, int64_t e) const { return read(t.v, b * p.v.b + j * p.v.n + e); }
  double gout(int64_t b, int64_t i, int64_t e) const { return read(t.gout, b * p.gout.b + i * p.gout.n + e); }

  double lse(int64_t row) const {
    return p.dtype == DType::f64 ? static_cast<const double*>(t.lse)[row]
                                 : double(static_cast<const float*>(t.lse)[row]);
  }
  void set_lse(int64_t row, double x) const {
    if (p.dtype == DType::f64)
      static_cast<double*>(t.lse)[row] = x;
    else
      static_cast<float*>(t.lse)[row] = float(x);
  }
};

template <class F>
void with_type(DType dtype, F&& f) {
  if (dtype == DType::f32) f(float{});
  if (dtype == DType::bf16) f(bfloat16{});
  if (dtype == DType::f16) f(float16{});
  if (dtype == DType::f64) f(double{});
}

template <class T>
void forward_row(const Reader<T>& r, int64_t row, double* z) {
  const AdditiveProblem& p = r.p;
  const int64_t b = row / p.L, i = row % p.L, keys = r.keys(b);
  double largest = -INFINITY, sum = 0;
  for (int64_t j = 0; j < keys; j++) {
    z[j] = r.score(b, i, j);
    largest = z[j] > largest || std::isnan(z[j]) ? z[j] : largest;
  }
  for (int64_t j = 0; j < keys; j++) sum += std::exp(z[j] - largest);
  const double lse = keys > 0 ? largest + std::log(sum) : -INFINITY;
  r.set_lse(row, lse);
  for (int64_t e = 0; e < p.E; e++) {
    double out = 0;
    for (int64_t j = 0; j < keys; j++) out += std::exp(z[j] - lse) * r.value(b, j, e);
    r.write(r.t.out, row * p.E + e, out);
  }
}

template <class T>
void weights_row(const Reader<T>& r, int64_t row) {
  const AdditiveProblem& p = r.p;
  const int64_t b = row / p.L, i = row % p.L, keys = r.keys(b);
  for (int64_t j = 0; j < p.S; j++)
    r.write(r.t.weights, row * p.S + j, j < keys ? std::exp(r.score(b, i, j) - r.lse(row)) : 0.0);
}

// Sums of gradients, in double, before they are rounded.
struct Sums {
  double *gq, *gk, *gv, *gw, *gbias;
  Sums(Carver& carve, const AdditiveProblem& p) {
    gq = carve.take<double>(p.B * p.L * p.D);
    gk = carve.take<double>(p.B * p.S * p.D);
    gv = carve.take<double>(p.B * p.S * p.E);
    gw = carve.take<double>(p.D);
    gbias = carve.take<double>(p.D);
  }
};

template <class T>
void add_pair(const Reader<T>& r, int64_t b, int64_t i, int64_t j, double delta, const Sums& s) {
  const AdditiveProblem& p = r.p;
  const int64_t row = b * p.L + i, key = b * p.S + j;
  const double probability = std::exp(r.score(b, i, j) - r.lse(row));
  double product = p.with_gweights ? r.read(r.t.gweights, row * p.S + j) : 0.0;
  for (int64_t e = 0; e < p.E; e++) {
    product += r.gout(b, i, e) * r.value(b, j, e);
    s.gv[key * p.E + e] += probability * r.gout(b, i, e);
  }
  const double dz = additive_logit_gradient(probability, product, delta);
  for (int64_t d = 0; d < p.D; d++) {
    const double t = r.tanh_of(b, i, j, d), g = dz * r.read(r.t.w, d) * tanh_gradient(t);
    s.gw[d] += dz * t;
    s.gq[row * p.D + d] += g;
    s.gk[key * p.D + d] += g;
    s.gbias[d] += g;
  }
}

template <class T>
void backward(const Reader<T>& r, const Sums& s) {
  const AdditiveProblem& p = r.p;
  const auto clear = [](double* x, int64_t n) {
    for (int64_t k = 0; k < n; k++) x[k] = 0;
  };
  clear(s.gq, p.B * p.L * p.D), clear(s.gk, p.B * p.S * p.D), clear(s.gv, p.B * p.S * p.E);
  clear(s.gw, p.D), clear(s.gbias, p.D);
  for (int64_t b = 0; b < p.B; b++)
    for (int64_t i = 0; i < p.L; i++) {
      const int64_t row = b * p.L + i, keys = r.keys(b);
      double delta = 0;
      if (keys > 0)
        for (int64_t e = 0; e < p.E; e++) delta += r.gout(b, i, e) * r.read(r.t.out, row * p.E + e);
      if (p.with_gweights)
        for (int64_t j = 0; j < keys; j++)
          delta += r.read(r.t.weights, row * p.S + j) * r.read(r.t.gweights, row * p.S + j);
      for (int64_t j = 0; j < keys; j++) add_pair(r, b, i, j, delta, s);
    }
  const auto round = [&](void* to, const double* from, int64_t n) {
    for (int64_t k = 0; k < n; k++) r.write(to, k, from[k]);
  };
  if (p.need_scores) {
    round(r.t.gq, s.gq, p.B * p.L * p.D), round(r.t.gk, s.gk, p.B * p.S * p.D);
    round(r.t.gw, s.gw, p.D), round(r.t.gbias, s.gbias, p.D);
  }
  if (p.need_value) round(r.t.gv, s.gv, p.B * p.S * p.E);
}

Refusal refuses(const AdditiveProblem&) { return accepted; }

WorkPlan plan_rows(const AdditiveProblem& p) {
  WorkPlan plan;
  plan.add_phase(p.B * p.L);
  plan.thread_bytes = p.S * int64_t(sizeof(double));  // a row of scores
  return plan;
}
WorkPlan plan_backward(const AdditiveProblem& p) {
  WorkPlan plan;
  plan.add_phase(1);
  Carver carve(nullptr);
  Sums(carve, p);
  plan.shared_bytes = carve.used();
  return plan;
}

void run_forward(const AdditiveProblem& p, const AdditiveTensors& t, const WorkSlice& slice) {
  with_type(p.dtype, [&](auto tag) {
    for (int64_t row = slice.begin; row < slice.end; row++)
      forward_row(Reader<decltype(tag)>{p, t}, row, reinterpret_cast<double*>(slice.scratch));
  });
}
void run_weights(const AdditiveProblem& p, const AdditiveTensors& t, const WorkSlice& slice) {
  with_type(p.dtype, [&](auto tag) {
    for (int64_t row = slice.begin; row < slice.end; row++) weights_row(Reader<decltype(tag)>{p, t}, row);
  });
}
void run_backward(const AdditiveProblem& p, const AdditiveTensors& t, const WorkSlice& slice) {
  Carver carve(slice.shared);
  const Sums sums(carve, p);
  with_type(p.dtype, [&](auto tag) { backward(Reader<decltype(tag)>{p, t}, sums); });
}

}  // namespace

extern const AdditiveCpuKernel additive_reference_forward, additive_reference_weights,
    additive_reference_backward;
const AdditiveCpuKernel additive_reference_forward = {"reference", Isa::portable, refuses, plan_rows,
                                                      run_forward};
const AdditiveCpuKernel additive_reference_weights = {"reference", Isa::portable, refuses, plan_rows,
                                                      run_weights};
const AdditiveCpuKernel additive_reference_backward = {"reference", Isa::portable, refuses, plan_backward,
                                                       run_backward};

}  // namespace pyseqnet
