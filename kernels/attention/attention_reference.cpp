// The oracle of softmax attention: the formulae of attention.h in plain loops, accumulated in double, for
// every dtype and stride. It is also the kernel that serves what the fast ones refuse (float64 among it).
//
//   forward        two sweeps over the visible keys of a row: the largest logit, then the sums
//   backward       gq: one item a query; gk, gv: one item a key, sweeping the queries that see it. Logits are
//                  recomputed each time: no workspace
//   bias_gradient  one item an element row of the bias, sweeping what it was broadcast along
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

// One query head of one batch entry or packed sequence.
struct Head {
  AttentionSequence at;
  int64_t h;
};

template <class T>
class Attention {
 public:
  using Statistic = typename StatisticOf<T>::type;

  Attention(const AttentionProblem& problem, const AttentionTensors& tensors) : p(problem), t(tensors) {
    if (p.dropout_p > 0) seed_ = *t.seed, threshold_ = dropout_threshold(p.dropout_p);
  }

  Head head(int64_t b, int64_t h) const { return {sequence_of(p, t.key_lengths, t.cu_q, t.cu_k, b), h}; }
  const T* q(const Head& head, int64_t i) const { return query(t.q, p.q_strides, head, i); }
  const T* out(const Head& head, int64_t i) const { return query(t.out, p.out_strides, head, i); }
  const T* gout(const Head& head, int64_t i) const { return query(t.gout, p.gout_strides, head, i); }
  const T* key(const Head& head, int64_t j) const { return key(t.k, p.k_strides, head, j); }
  const T* value(const Head& head, int64_t j) const { return key(t.v, p.v_strides, head, j); }
  static int64_t row(const Head& head, int64_t i) { return lse_row(head.at, head.h, i); }
  int64_t weights_at(const Head& head, int64_t i) const { return weights_offset(p, head.at, head.h, i); }
  double lse(int64_t row) const { return double(static_cast<const Statistic*>(t.lse)[row]); }
  double delta(int64_t row) const { return double(static_cast<const Statistic*>(t.delta)[row]); }

  // Whether query i sees key j.
  bool sees(const Head& head, int64_t i, int64_t j) const {
    if (j >= visible_keys(p.causal, head.at.causal_offset, head.at.length, i)) return false;
    if (p.with_blocks && !block_sees(t.blocks, block_row(p, head.h, i), i, j)) return false;
    if (p.with_mask &&
        !static_cast<const uint8_t*>(t.mask)[element(p.mask_strides, p.mask_stride_s, head, i, j)])
      return false;
    return !p.with_bias || bias(head, i, j) != -__builtin_inf();
  }
  double bias(const Head& head, int64_t i, int64_t j) const {
    const int64_t at = element(p.bias_strides, p.bias_stride_s, head, i, j);
    return p.bias_dtype == p.dtype ? to_double(static_cast<const T*>(t.bias)[at])
                                   : double(static_cast<const float*>(t.bias)[at]);
  }
  Capped<double> score(const Head& head, int64_t i, int64_t j) const {
    const double s = p.scale * dot(q(head, i), key(head, j), p.D);
    return p.softcap > 0 ? soft_cap(s, p.softcap) : Capped<double>{s, 1};
  }
  double logit(const Head& head, int64_t i, int64_t j, double score) const {
    double z = score;
    if (p.with_bias) z += bias(head, i, j);
    if (p.with_slopes) {
      const double slope = static_cast<const Statistic*>(t.slopes)[head.at.b * p.slopes_stride_b + head.h];
      z += alibi_of(slope, i, head.at.alibi_offset, j);
    }
    return z;
  }
  // Calls f(j, z, slope of the soft cap) for every key that the query sees.
  template <class F>
  void for_visible(const Head& head, int64_t i, F&& f) const {
    for (int64_t j = 0; j < head.at.length; j++) {
      if (!sees(head, i, j)) continue;
      const Capped<double> s = score(head, i, j);
      f(j, logit(head, i, j, s.value), s.slope);
    }
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
  // What the softmax makes of a logit. It is at most 1 by definition; where logits are so huge that a rounding is more
  // than 1, z may come out above its row's lse here and there.
  double weight(double z, int64_t row) const { return z > lse(row) ? 1 : __builtin_exp(z - lse(row)); }
  double gradient_of_logit(const Head& head, int64_t i, int64_t j, double z) const {
    const int64_t r = row(head, i);
    double gradient = dot(gout(head, i), value(head, j), p.E);
    if (p.with_gweights) gradient += to_double(static_cast<const T*>(t.gweights)[weights_at(head, i) + j]);
    return logit_gradient(weight(z, r), gradient, keep(r, j), delta(r));
  }

  const AttentionProblem& p;
  const AttentionTensors& t;

 private:
  const T* query(const void* base, const AttentionStrides& s, const Head& head, int64_t i) const {
    return static_cast<const T*>(base) + query_offset(s, head.at, head.h, i);
  }
  const T* key(const void* base, const AttentionStrides& s, const Head& head, int64_t j) const {
    return static_cast<const T*>(base) + key_offset(s, head.at, head.h / p.group(), j);
  }
  static int64_t element(const AttentionStrides& s, int64_t stride_s, const Head& head, int64_t i,
                         int64_t j) {
    return head.at.b * s.b + head.h * s.h + i * s.n + j * stride_s;
  }
  int64_t seed_ = 0;
  uint32_t threshold_ = 0;
};

// Items of the passes by query are (b, h, i), i below the longest sequence's length.
template <class T>
Head head_of_item(const Attention<T>& a, int64_t item) {
  return a.head(item / a.p.L / a.p.H, item / a.p.L % a.p.H);
}

template <class T>
void forward_row(const Attention<T>& a, int64_t item, double* sums) {
  using Statistic = typename Attention<T>::Statistic;
  const AttentionProblem& p = a.p;
  const Head head = head_of_item(a, item);
  const int64_t i = item % p.L, row = a.row(head, i);
  if (i >= head.at.L) return;
  SoftmaxState<double> state{-__builtin_inf(), 0};
  a.for_visible(head, i, [&](int64_t, double z, double) {
    if (z * log2_e > state.largest || z != z) state.largest = z * log2_e;
  });
  for (int64_t e = 0; e < p.E; e++) sums[e] = 0;
  a.for_visible(head, i, [&](int64_t j, double z, double) {
    const double probability = exp2_of(z * log2_e - softmax_origin(state.largest));
    state.sum += probability;
    const double weight = probability * a.keep(row, j);
    const T* v = a.value(head, j);
    for (int64_t e = 0; weight != 0 && e < p.E; e++) sums[e] += weight * to_double(v[e]);
  });
  T* out = static_cast<T*>(a.t.out) + query_offset(p.out_strides, head.at, head.h, i);
  const double inverse = softmax_inverse(state);
  for (int64_t e = 0; e < p.E; e++) round_to(out[e], sums[e] * inverse);
  static_cast<Statistic*>(a.t.lse)[row] = Statistic(softmax_lse(state));
}

template <class T>
void weights_row(const Attention<T>& a, int64_t item) {
  const AttentionProblem& p = a.p;
  const Head head = head_of_item(a, item);
  const int64_t i = item % p.L, row = a.row(head, i);
  T* weights = static_cast<T*>(a.t.weights) + a.weights_at(head, i);
  for (int64_t j = 0; j < p.S; j++) round_to(weights[j], 0.0);
  if (i >= head.at.L) return;
  a.for_visible(
      head, i, [&](int64_t j, double z, double) { round_to(weights[j], a.weight(z, row) * a.keep(row, j)); });
}

template <class T>
void delta_row(const Attention<T>& a, int64_t item) {
  using Statistic = typename Attention<T>::Statistic;
  const AttentionProblem& p = a.p;
  const Head head = head_of_item(a, item);
  const int64_t i = item % p.L, row = a.row(head, i);
  if (i >= head.at.L) return;
  double sum = 0;
  if (a.lse(row) != -__builtin_inf()) {
    sum = a.dot(a.gout(head, i), a.out(head, i), p.E);
    if (p.with_gweights) {
      const int64_t at = a.weights_at(head, i);
      sum += a.dot(static_cast<const T*>(a.t.weights) + at, static_cast<const T*>(a.t.gweights) + at, p.S);
    }
    if (p.with_glse) sum -= double(static_cast<const Statistic*>(a.t.glse)[row]);
  }
  static_cast<Statistic*>(a.t.delta)[row] = Statistic(sum);
}

template <class T>
void query_gradient_row(const Attention<T>& a, int64_t item, double* sums) {
  const AttentionProblem& p = a.p;
  const Head head = head_of_item(a, item);
  const int64_t i = item % p.L;
  if (i >= head.at.L) return;
  for (int64_t d = 0; d < p.D; d++) sums[d] = 0;
  if (a.lse(a.row(head, i)) != -__builtin_inf())
    a.for_visible(head, i, [&](int64_t j, double z, double slope) {
      const double gradient = a.gradient_of_logit(head, i, j, z) * slope;
      const T* k = a.key(head, j);
      for (int64_t d = 0; d < p.D; d++) sums[d] += gradient * to_double(k[d]);
    });
  T* gq = static_cast<T*>(a.t.gq) + query_offset(p.gq_strides, head.at, head.h, i);
  for (int64_t d = 0; d < p.D; d++) round_to(gq[d], p.scale * sums[d]);
}

// Items are (b, key head, j).
template <class T>
void key_gradient_row(const Attention<T>& a, int64_t item, double* gk_sums, double* gv_sums) {
  const AttentionProblem& p = a.p;
  const int64_t j = item % p.S, hk = item / p.S % p.Hk, b = item / p.S / p.Hk;
  const AttentionSequence at = a.head(b, 0).at;
  if (j >= at.S) return;
  for (int64_t d = 0; d < p.D; d++) gk_sums[d] = 0;
  for (int64_t e = 0; e < p.E; e++) gv_sums[e] = 0;
  for (int64_t h = hk * p.group(); h < (hk + 1) * p.group(); h++)
    for (int64_t i = 0; i < at.L; i++) {
      const Head head = {at, h};
      const int64_t row = a.row(head, i);
      if (a.lse(row) == -__builtin_inf() || !a.sees(head, i, j)) continue;
      const Capped<double> score = a.score(head, i, j);
      const double z = a.logit(head, i, j, score.value);
      const double gradient = a.gradient_of_logit(head, i, j, z) * score.slope;
      const double weight = a.weight(z, row) * a.keep(row, j);
      const T *q = a.q(head, i), *gout = a.gout(head, i);
      for (int64_t d = 0; d < p.D; d++) gk_sums[d] += gradient * to_double(q[d]);
      for (int64_t e = 0; weight != 0 && e < p.E; e++) gv_sums[e] += weight * to_double(gout[e]);
    }
  const auto write = [&](void* base, const AttentionStrides& s, const double* sums, int64_t n, double scale) {
    T* to = static_cast<T*>(base) + key_offset(s, at, hk, j);
    for (int64_t d = 0; d < n; d++) round_to(to[d], scale * sums[d]);
  };
  write(a.t.gk, p.gk_strides, gk_sums, p.D, p.scale);
  write(a.t.gv, p.gv_strides, gv_sums, p.E, 1);
}

// One row (of bias_S elements) of the bias, summed over all pairs that read it.
template <class T>
void bias_gradient_row(const Attention<T>& a, int64_t item, double* sums) {
  const AttentionProblem& p = a.p;
  const int64_t mi = item % p.bias_L, mh = item / p.bias_L % p.bias_H, mb = item / p.bias_L / p.bias_H;
  const auto begin = [](int64_t extent, int64_t at) { return extent == 1 ? 0 : at; };
  const auto end = [](int64_t extent, int64_t at, int64_t full) { return extent == 1 ? full : at + 1; };
  for (int64_t j = 0; j < p.bias_S; j++) sums[j] = 0;
  for (int64_t b = begin(p.bias_B, mb); b < end(p.bias_B, mb, p.B); b++)
    for (int64_t h = begin(p.bias_H, mh); h < end(p.bias_H, mh, p.H); h++) {
      const Head head = a.head(b, h);
      for (int64_t i = begin(p.bias_L, mi); i < end(p.bias_L, mi, p.L); i++) {
        if (i >= head.at.L || a.lse(a.row(head, i)) == -__builtin_inf()) continue;
        a.for_visible(head, i, [&](int64_t j, double z, double) {
          sums[p.bias_S == 1 ? 0 : j] += a.gradient_of_logit(head, i, j, z);
        });
      }
    }
  for (int64_t j = 0; j < p.bias_S; j++) {
    const int64_t at = item * p.bias_S + j;
    if (p.bias_dtype == p.dtype)
      round_to(static_cast<T*>(a.t.gbias)[at], sums[j]);
    else
      static_cast<float*>(a.t.gbias)[at] = float(sums[j]);
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
WorkPlan plan_bias_gradient(const AttentionProblem& p) {
  return plan_rows(p.bias_B * p.bias_H * p.bias_L, p.S * (p.D + p.E), p.bias_S);
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
void run_bias_gradient(const AttentionProblem& p, const AttentionTensors& t, const WorkSlice& slice) {
  with_type(p.dtype, [&](auto tag) {
    const Attention<decltype(tag)> a(p, t);
    for (int64_t k = slice.begin; k < slice.end; k++)
      bias_gradient_row(a, k, reinterpret_cast<double*>(slice.scratch));
  });
}

}  // namespace

extern const AttentionCpuKernel attention_reference_forward, attention_reference_weights,
    attention_reference_delta, attention_reference_backward, attention_reference_bias_gradient;
const AttentionCpuKernel attention_reference_forward = {"reference", Isa::portable, refuses, plan_forward,
                                                        run_forward};
const AttentionCpuKernel attention_reference_weights = {"reference", Isa::portable, refuses, plan_weights,
                                                        run_weights};
const AttentionCpuKernel attention_reference_delta = {"reference", Isa::portable, refuses, plan_delta,
                                                      run_delta};
const AttentionCpuKernel attention_reference_backward = {"reference", Isa::portable, refuses, plan_backward,
                                                         run_backward};
const AttentionCpuKernel attention_reference_bias_gradient = {"reference", Isa::portable, refuses,
                                                              plan_bias_gradient, run_bias_gradient};

}  // namespace pyseqnet
