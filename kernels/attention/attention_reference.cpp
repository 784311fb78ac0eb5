// The oracle of softmax attention: the formulae of attention.h in plain loops, accumulated in double, for
// every dtype and stride. It is also the kernel that serves what the fast ones refuse (float64 among it).
//
//   forward        two sweeps over the visible keys of a row: the largest logit, then the sums
//   backward       gq: one item a query; gk, gv: one item a key, sweeping the queries that see it. Logits are
//                  recomputed each time: no workspace
//   mask_gradient  one item an element row of the mask, sweeping what it was broadcast along
//
// Every sum runs in a fixed order within one item: any split gives the same bits.
#include "attention/attention_math.h"
#include "common/random.h"

namespace pyseqnet {
namespace {

// lse and delta: float, and double for double.
template <class T>
struct StatisticOf {
  using type = float;
};
template <>
struct StatisticOf<double> {
  using type = double;
};

template <class T>
class Attention {
 public:
  using Statistic = typename StatisticOf<T>::type;

  Attention(const AttentionProblem& problem, const AttentionTensors& tensors) : p(problem), t(tensors) {
    if (p.dropout_p > 0) seed_ = *t.seed, threshold_ = dropout_threshold(p.dropout_p);
  }

  const T* query(int64_t b, int64_t h, int64_t i) const { return row(t.q, p.q_strides, b, h, i); }
  const T* key(int64_t b, int64_t h, int64_t j) const { return row(t.k, p.k_strides, b, h / p.group(), j); }
  const T* value(int64_t b, int64_t h, int64_t j) const { return row(t.v, p.v_strides, b, h / p.group(), j); }
  const T* gout(int64_t b, int64_t h, int64_t i) const { return row(t.gout, p.gout_strides, b, h, i); }
  int64_t row_index(int64_t b, int64_t h, int64_t i) const { return (b * p.H + h) * p.L + i; }
  double lse(int64_t row) const { return double(static_cast<const Statistic*>(t.lse)[row]); }
  double delta(int64_t row) const { return double(static_cast<const Statistic*>(t.delta)[row]); }

  int64_t keys_of(int64_t b, int64_t i) const {
    const int64_t length = p.with_key_lengths ? clamped_length(t.key_lengths[b], p.S) : p.S;
    return visible_keys(p.causal, p.causal_offset, length, i);
  }
  // Whether the mask lets the pair through; adds an additive mask to z.
  bool masked_in(int64_t b, int64_t h, int64_t i, int64_t j, double& z) const {
    if (p.mask == AttentionMask::none) return true;
    const int64_t at =
        b * p.mask_strides.b + h * p.mask_strides.h + i * p.mask_strides.n + j * p.mask_stride_s;
    if (p.mask == AttentionMask::boolean) return static_cast<const uint8_t*>(t.mask)[at] != 0;
    const double added = p.mask_dtype == p.dtype ? to_double(static_cast<const T*>(t.mask)[at])
                                                 : double(static_cast<const float*>(t.mask)[at]);
    z += added;
    return added != -__builtin_inf();
  }
  // Calls f(j, z) for every key that the query sees.
  template <class F>
  void for_visible(int64_t b, int64_t h, int64_t i, F&& f) const {
    const T* q = query(b, h, i);
    for (int64_t j = 0, end = keys_of(b, i); j < end; j++) {
      double z = 0;
      if (!masked_in(b, h, i, j, z)) continue;
      f(j, z + p.scale * dot(q, key(b, h, j), p.D));
    }
  }
  // The logit of one pair and whether it is visible.
  bool visible(int64_t b, int64_t h, int64_t i, int64_t j, double& z) const {
    z = 0;
    if (j >= keys_of(b, i) || !masked_in(b, h, i, j, z)) return false;
    z += p.scale * dot(query(b, h, i), key(b, h, j), p.D);
    return true;
  }
  double keep(int64_t row, int64_t j) const {
    if (!(p.dropout_p > 0)) return 1;
    return dropout_keeps(dropout_row_key(seed_, row), j, threshold_) ? 1 / (1 - p.dropout_p) : 0;
  }
  static double dot(const T* a, const T* b, int64_t n) {
    double sum = 0;
    for (int64_t d = 0; d < n; d++) sum += to_double(a[d]) * to_double(b[d]);
    return sum;
  }
  double weight_gradient(int64_t b, int64_t h, int64_t i, int64_t j) const {
    double gradient = dot(gout(b, h, i), value(b, h, j), p.E);
    if (p.with_gweights)
      gradient += to_double(static_cast<const T*>(t.gweights)[row_index(b, h, i) * p.S + j]);
    return gradient;
  }
  double gradient_of_logit(int64_t b, int64_t h, int64_t i, int64_t j, double z) const {
    const int64_t row = row_index(b, h, i);
    return logit_gradient(__builtin_exp(z - lse(row)), weight_gradient(b, h, i, j), keep(row, j), delta(row));
  }

  const AttentionProblem& p;
  const AttentionTensors& t;

 private:
  static const T* row(const void* base, const AttentionStrides& s, int64_t b, int64_t h, int64_t n) {
    return static_cast<const T*>(base) + b * s.b + h * s.h + n * s.n;
  }
  int64_t seed_ = 0;
  uint32_t threshold_ = 0;
};

template <class T>
T* row_of(void* base, const AttentionStrides& s, int64_t b, int64_t h, int64_t n) {
  return static_cast<T*>(base) + b * s.b + h * s.h + n * s.n;
}

template <class T>
void forward_row(const Attention<T>& a, int64_t row, double* sums) {
  using Statistic = typename Attention<T>::Statistic;
  const AttentionProblem& p = a.p;
  const int64_t i = row % p.L, h = row / p.L % p.H, b = row / p.L / p.H;
  SoftmaxState<double> state{-__builtin_inf(), 0};
  a.for_visible(b, h, i, [&](int64_t, double z) {
    if (z * log2_e > state.largest || z != z) state.largest = z * log2_e;
  });
  for (int64_t e = 0; e < p.E; e++) sums[e] = 0;
  a.for_visible(b, h, i, [&](int64_t j, double z) {
    const double probability = exp2_of(z * log2_e - softmax_origin(state.largest));
    state.sum += probability;
    const double weight = probability * a.keep(row, j);
    const T* v = a.value(b, h, j);
    for (int64_t e = 0; weight != 0 && e < p.E; e++) sums[e] += weight * to_double(v[e]);
  });
  T* out = row_of<T>(a.t.out, p.out_strides, b, h, i);
  const double inverse = softmax_inverse(state);
  for (int64_t e = 0; e < p.E; e++) round_to(out[e], sums[e] * inverse);
  static_cast<Statistic*>(a.t.lse)[row] = Statistic(softmax_lse(state));
}

template <class T>
void weights_row(const Attention<T>& a, int64_t row) {
  const AttentionProblem& p = a.p;
  const int64_t i = row % p.L, h = row / p.L % p.H, b = row / p.L / p.H;
  T* weights = static_cast<T*>(a.t.weights) + row * p.S;
  for (int64_t j = 0; j < p.S; j++) round_to(weights[j], 0.0);
  a.for_visible(b, h, i, [&](int64_t j, double z) {
    round_to(weights[j], __builtin_exp(z - a.lse(row)) * a.keep(row, j));
  });
}

template <class T>
void delta_row(const Attention<T>& a, int64_t row) {
  using Statistic = typename Attention<T>::Statistic;
  const AttentionProblem& p = a.p;
  const int64_t i = row % p.L, h = row / p.L % p.H, b = row / p.L / p.H;
  double sum = 0;
  if (a.lse(row) != -__builtin_inf()) {
    sum = Attention<T>::dot(a.gout(b, h, i), row_of<T>(a.t.out, p.out_strides, b, h, i), p.E);
    if (p.with_gweights) {
      const T* weights = static_cast<const T*>(a.t.weights) + row * p.S;
      sum += Attention<T>::dot(weights, static_cast<const T*>(a.t.gweights) + row * p.S, p.S);
    }
    if (p.with_glse) sum -= double(static_cast<const Statistic*>(a.t.glse)[row]);
  }
  static_cast<Statistic*>(a.t.delta)[row] = Statistic(sum);
}

template <class T>
void query_gradient_row(const Attention<T>& a, int64_t row, double* sums) {
  const AttentionProblem& p = a.p;
  const int64_t i = row % p.L, h = row / p.L % p.H, b = row / p.L / p.H;
  for (int64_t d = 0; d < p.D; d++) sums[d] = 0;
  if (a.lse(row) != -__builtin_inf())
    a.for_visible(b, h, i, [&](int64_t j, double z) {
      const double gradient = a.gradient_of_logit(b, h, i, j, z);
      const T* k = a.key(b, h, j);
      for (int64_t d = 0; d < p.D; d++) sums[d] += gradient * to_double(k[d]);
    });
  T* gq = row_of<T>(a.t.gq, p.gq_strides, b, h, i);
  for (int64_t d = 0; d < p.D; d++) round_to(gq[d], p.scale * sums[d]);
}

template <class T>
void key_gradient_row(const Attention<T>& a, int64_t item, double* gk_sums, double* gv_sums) {
  const AttentionProblem& p = a.p;
  const int64_t j = item % p.S, hk = item / p.S % p.Hk, b = item / p.S / p.Hk;
  for (int64_t d = 0; d < p.D; d++) gk_sums[d] = 0;
  for (int64_t e = 0; e < p.E; e++) gv_sums[e] = 0;
  for (int64_t h = hk * p.group(); h < (hk + 1) * p.group(); h++)
    for (int64_t i = 0; i < p.L; i++) {
      const int64_t row = a.row_index(b, h, i);
      double z;
      if (a.lse(row) == -__builtin_inf() || !a.visible(b, h, i, j, z)) continue;
      const double gradient = a.gradient_of_logit(b, h, i, j, z);
      const double weight = __builtin_exp(z - a.lse(row)) * a.keep(row, j);
      const T *q = a.query(b, h, i), *gout = a.gout(b, h, i);
      for (int64_t d = 0; d < p.D; d++) gk_sums[d] += gradient * to_double(q[d]);
      for (int64_t e = 0; weight != 0 && e < p.E; e++) gv_sums[e] += weight * to_double(gout[e]);
    }
  T* gk = row_of<T>(a.t.gk, p.gk_strides, b, hk, j);
  T* gv = row_of<T>(a.t.gv, p.gv_strides, b, hk, j);
  for (int64_t d = 0; d < p.D; d++) round_to(gk[d], p.scale * gk_sums[d]);
  for (int64_t e = 0; e < p.E; e++) round_to(gv[e], gv_sums[e]);
}

// One row (of mask_S elements) of the mask, summed over all pairs that read it.
template <class T>
void mask_gradient_row(const Attention<T>& a, int64_t item, double* sums) {
  const AttentionProblem& p = a.p;
  const int64_t mi = item % p.mask_L, mh = item / p.mask_L % p.mask_H, mb = item / p.mask_L / p.mask_H;
  const auto begin = [](int64_t extent, int64_t at) { return extent == 1 ? 0 : at; };
  const auto end = [](int64_t extent, int64_t at, int64_t full) { return extent == 1 ? full : at + 1; };
  for (int64_t j = 0; j < p.mask_S; j++) sums[j] = 0;
  for (int64_t b = begin(p.mask_B, mb); b < end(p.mask_B, mb, p.B); b++)
    for (int64_t h = begin(p.mask_H, mh); h < end(p.mask_H, mh, p.H); h++)
      for (int64_t i = begin(p.mask_L, mi); i < end(p.mask_L, mi, p.L); i++) {
        if (a.lse(a.row_index(b, h, i)) == -__builtin_inf()) continue;
        a.for_visible(b, h, i, [&](int64_t j, double z) {
          sums[p.mask_S == 1 ? 0 : j] += a.gradient_of_logit(b, h, i, j, z);
        });
      }
  for (int64_t j = 0; j < p.mask_S; j++) {
    const int64_t at = item * p.mask_S + j;
    if (p.mask_dtype == p.dtype)
      round_to(static_cast<T*>(a.t.gmask)[at], sums[j]);
    else
      static_cast<float*>(a.t.gmask)[at] = float(sums[j]);
  }
}

template <class F>
void with_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32:
      return f(float{});
    case DType::f64:
      return f(double{});
    case DType::bf16:
      return f(bfloat16{});
    case DType::f16:
      return f(float16{});
  }
}

Refusal refuses(const AttentionProblem&) { return accepted; }

// Rows of about this many multiplications are worth a thread of their own.
WorkPlan plan_rows(int64_t rows, int64_t work_of_a_row, int64_t scratch) {
  constexpr int64_t worth_a_thread = 20000;
  WorkPlan plan;
  plan.add_phase(rows, 1 + worth_a_thread / (1 + work_of_a_row));
  plan.thread_bytes = align_up(scratch * int64_t(sizeof(double)));
  return plan;
}
WorkPlan plan_forward(const AttentionProblem& p) {
  return plan_rows(p.B * p.H * p.L, p.S * (2 * p.D + p.E), p.E);
}
WorkPlan plan_weights(const AttentionProblem& p) { return plan_rows(p.B * p.H * p.L, p.S * p.D, 0); }
WorkPlan plan_delta(const AttentionProblem& p) { return plan_rows(p.B * p.H * p.L, p.E, 0); }
WorkPlan plan_backward(const AttentionProblem& p) {
  WorkPlan plan = plan_rows(p.need_q ? p.B * p.H * p.L : 0, p.S * (2 * p.D + p.E), p.D + p.E);
  const WorkPlan keys = plan_rows(p.need_kv ? p.B * p.Hk * p.S : 0, p.group() * p.L * (2 * p.D + 2 * p.E), 0);
  plan.add_phase(keys.phase[0].items, keys.phase[0].grain);
  return plan;
}
WorkPlan plan_mask_gradient(const AttentionProblem& p) {
  return plan_rows(p.mask_B * p.mask_H * p.mask_L, p.S * (p.D + p.E), p.mask_S);
}

void run_forward(const AttentionProblem& p, const AttentionTensors& t, const WorkSlice& slice) {
  with_type(p.dtype, [&](auto tag) {
    const Attention<decltype(tag)> a(p, t);
    for (int64_t k = slice.begin; k < slice.end; k++)
      forward_row(a, k, reinterpret_cast<double*>(slice.scratch));
  });
}
void run_weights(const AttentionProblem& p, const AttentionTensors& t, const WorkSlice& slice) {
  with_type(p.dtype, [&](auto tag) {
    const Attention<decltype(tag)> a(p, t);
    for (int64_t k = slice.begin; k < slice.end; k++) weights_row(a, k);
  });
}
void run_delta(const AttentionProblem& p, const AttentionTensors& t, const WorkSlice& slice) {
  with_type(p.dtype, [&](auto tag) {
    const Attention<decltype(tag)> a(p, t);
    for (int64_t k = slice.begin; k < slice.end; k++) delta_row(a, k);
  });
}
void run_backward(const AttentionProblem& p, const AttentionTensors& t, const WorkSlice& slice) {
  with_type(p.dtype, [&](auto tag) {
    const Attention<decltype(tag)> a(p, t);
    double* sums = reinterpret_cast<double*>(slice.scratch);
    for (int64_t k = slice.begin; k < slice.end; k++)
      if (slice.phase == 0)
        query_gradient_row(a, k, sums);
      else
        key_gradient_row(a, k, sums, sums + p.D);
  });
}
void run_mask_gradient(const AttentionProblem& p, const AttentionTensors& t, const WorkSlice& slice) {
  with_type(p.dtype, [&](auto tag) {
    const Attention<decltype(tag)> a(p, t);
    for (int64_t k = slice.begin; k < slice.end; k++)
      mask_gradient_row(a, k, reinterpret_cast<double*>(slice.scratch));
  });
}

}  // namespace

extern const AttentionCpuKernel attention_reference_forward, attention_reference_weights,
    attention_reference_delta, attention_reference_backward, attention_reference_mask_gradient;
const AttentionCpuKernel attention_reference_forward = {"reference", Isa::portable, refuses, plan_forward,
                                                        run_forward};
const AttentionCpuKernel attention_reference_weights = {"reference", Isa::portable, refuses, plan_weights,
                                                        run_weights};
const AttentionCpuKernel attention_reference_delta = {"reference", Isa::portable, refuses, plan_delta,
                                                      run_delta};
const AttentionCpuKernel attention_reference_backward = {"reference", Isa::portable, refuses, plan_backward,
                                                         run_backward};
const AttentionCpuKernel attention_reference_mask_gradient = {"reference", Isa::portable, refuses,
                                                              plan_mask_gradient, run_mask_gradient};

}  // namespace pyseqnet
