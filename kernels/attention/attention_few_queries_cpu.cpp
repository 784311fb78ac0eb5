// Softmax attention on the CPU for a handful of queries: decoding step by step. Keys and values are read
// where they lie: packing them would cost more than using them.
//
// One item is one query. Logits: dot products of 16 keys at a time, whose partial sums a register transpose
// turns into one vector of logits. Then masks and softmax over the whole row, and the weighted sum of the
// values with two accumulators a vector, so that additions overlap. Weights of zero under a mask skip their
// value, which may hold NaN.
//
// Backward: one item is a key/value head with all its queries. The same two dot products give each query's
// row of weights and of logit gradients; gq is the weighted sum of the keys, and gk, gv are sums of few outer
// products, written in one sweep. Bound: reading K and V, and writing gk and gv.
#include "attention/attention_tile.h"

namespace pyseqnet {
inline namespace PYSEQNET_ISA {
namespace {

constexpr int64_t FEW = 4;  // queries; with more, packing the keys pays

template <class T>
PYSEQNET_INLINE vf load_part(const T* p, int64_t left) {
  return left >= VL ? load_lanes(p) : load_between(p, 0, left, vf{});
}

// z[j] = q . key j for j < n; q is packed. Writes whole vectors.
template <class T>
PYSEQNET_NOINLINE void dot_keys(const float* q, const T* keys, int64_t stride, int64_t n, int64_t D,
                                float* z) {
  for (int64_t j = 0; j < n; j += VL) {
    const T* key[VL];
    for (int l = 0; l < VL; ++l) key[l] = keys + smaller(j + l, n - 1) * stride;
    vf sums[VL] = {};
    int64_t d = 0;
    for (; d + VL <= D; d += VL) {
      const vf x = load(q + d);
#pragma GCC unroll 16
      for (int l = 0; l < VL; ++l) {
        sums[l] += x * load_lanes(key[l] + d);
        // Sixteen rows at once are too many streams for the hardware to foresee.
        __builtin_prefetch(reinterpret_cast<const char*>(key[l] + d) + VL * stride * int64_t(sizeof(T)));
      }
    }
    if (d < D) {
      const vf x = load(q + d);
      for (int l = 0; l < VL; ++l) sums[l] += x * load_between(key[l] + d, 0, D - d, vf{});
    }
    transpose(sums);
    vf total = sums[0];
#pragma GCC unroll 16
    for (int l = 1; l < VL; ++l) total += sums[l];
    store(z + j, total);
  }
}

// out[NV vectors] = inverse * sum_j z[j] v[j]
template <int NV, bool skip_zeros, class T>
PYSEQNET_INLINE void weigh_values(const float* z, const T* values, int64_t stride, int64_t n, int64_t left,
                                  float inverse, T* out) {
  vf even[NV] = {}, odd[NV] = {};
  const auto add = [&](vf(&sums)[NV], int64_t j) PYSEQNET_LAMBDA {
    if (skip_zeros && z[j] == 0.0f) return;
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) sums[v] += z[j] * load_part(values + j * stride + v * VL, left - v * VL);
  };
  int64_t j = 0;
  for (; j + 2 <= n; j += 2) add(even, j), add(odd, j + 1);
  if (j < n) add(even, j);
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) store_lanes_n(out + v * VL, (even[v] + odd[v]) * inverse, left - v * VL);
}
template <bool skip_zeros, class T>
PYSEQNET_NOINLINE void weigh_row(const float* z, const T* values, int64_t stride, int64_t n, int64_t E,
                                 float inverse, T* out) {
  int64_t e = 0;
  for (; e + 4 * VL <= E; e += 4 * VL)
    weigh_values<4, skip_zeros>(z, values + e, stride, n, 4 * VL, inverse, out + e);
  for (; e < E; e += VL) weigh_values<1, skip_zeros>(z, values + e, stride, n, E - e, inverse, out + e);
}

struct Scratch {
  float *q, *z;
  Scratch(Carver& carve, const AttentionProblem& p) {
    q = carve.take<float>(round_up(p.D, VL));
    z = carve.take<float>(round_up(p.S, VL));
  }
};

template <class T>
void forward_row(const AttentionProblem& p, const AttentionTensors& t, const Dropout& dropout, int64_t row,
                 const Scratch& s) {
  const int64_t i = row % p.L, h = row / p.L % p.H, hk = h / p.group();
  const AttentionSequence at = sequence_of(p, t, row / p.L / p.H);
  const int64_t end = visible_to(p, at, i);
  const T* keys = static_cast<const T*>(t.k) + key_offset(p.k_strides, at, hk, 0);
  const T* values = static_cast<const T*>(t.v) + key_offset(p.v_strides, at, hk, 0);
  alignas(64) float sums[VL] = {};
  float largest = -INFINITE, factor;
  const int32_t limit = int32_t(end);
  pack_rows(static_cast<const T*>(t.q) + query_offset(p.q_strides, at, h, i), 0, 1, p.D, float(p.scale), s.q);
  dot_keys(s.q, keys, p.k_strides.n, end, p.D, s.z);
  to_logits(p, t, at, h, i, 1, 0, {}, &limit, s.z, 0);
  softmax_tile(1, end, &limit, s.z, 0, {&largest, sums}, &factor);
  if (dropout.on) drop_tile(dropout, row, 1, 0, end, s.z, 0);
  const SoftmaxState<float> state{largest, hsum(load(sums))};
  T* out = static_cast<T*>(t.out) + query_offset(p.out_strides, at, h, i);
  if (!hides_pairs(p))
    weigh_row<false>(s.z, values, p.v_strides.n, end, p.E, softmax_inverse(state), out);
  else
    weigh_row<true>(s.z, values, p.v_strides.n, end, p.E, softmax_inverse(state), out);
  static_cast<float*>(t.lse)[row] =
      state.sum == 0.0f ? -INFINITE : softmax_origin(state.largest) + logf(state.sum);
}

// Weights and logit gradients of one query: w[S], dz[S], zero where not seen.
template <class T>
void gradient_row(const AttentionProblem& p, const AttentionTensors& t, const Dropout& dropout, int64_t row,
                  const float* q, const float* gout, float* slopes, float* w, float* dz) {
  const int64_t i = row % p.L, h = row / p.L % p.H, hk = h / p.group(), padded = round_up(p.S, VL);
  const AttentionSequence at = sequence_of(p, t, row / p.L / p.H);
  const int64_t end = visible_to(p, at, i);
  const float lse = static_cast<const float*>(t.lse)[row], delta = static_cast<const float*>(t.delta)[row];
  const int32_t limit = int32_t(end);
  if (lse == -INFINITE) {
    memset(w, 0, size_t(padded) * sizeof(float));
    memset(dz, 0, size_t(padded) * sizeof(float));
    return;
  }
  const T* keys = static_cast<const T*>(t.k) + key_offset(p.k_strides, at, hk, 0);
  const T* values = static_cast<const T*>(t.v) + key_offset(p.v_strides, at, hk, 0);
  const bool capped = p.softcap > 0;
  dot_keys(q, keys, p.k_strides.n, end, p.D, w);
  to_logits(p, t, at, h, i, 1, 0, {}, &limit, w, 0, capped ? slopes : nullptr);
  probabilities_tile(1, padded, &limit, w, 0, &lse);
  dot_keys(gout, values, p.v_strides.n, end, p.E, dz);
  const uint64_t key = dropout.on ? dropout_row_key(dropout.seed, row) : 0;
  const T* gweights = p.with_gweights ? static_cast<const T*>(t.gweights) + row * p.S : nullptr;
  for (int64_t j = 0; j < padded; j += VL) {
    const vf probability = load(w + j);
    vf gradient = j < end ? load(dz + j) : vf{};
    if (gweights) gradient += load_between(gweights + j, 0, p.S - j, vf{});
    if (dropout.on) {
      const vf keep = keep_lanes(dropout, key, j);
      gradient *= keep;
      store(w + j, probability * keep);
    }
    gradient = probability * (gradient - delta);
    if (capped && j < end) gradient *= load(slopes + j);
    // What is masked may hold NaN, and so may its products.
    store(dz + j, probability == 0.0f ? vf{} : gradient);
  }
}

// dst[j] = sum_r factors[r][j] rows[r] for j < n.
template <class T>
PYSEQNET_NOINLINE void sum_outer(int64_t rows, const float* factors, int64_t ldf, const float* a,
                                 int64_t width, int64_t n, T* dst, int64_t stride) {
  const int64_t padded = round_up(width, VL);
  for (int64_t j = 0; j < n; ++j, dst += stride)
    for (int64_t d = 0; d < width; d += VL) {
      vf sum = {};
      for (int64_t r = 0; r < rows; ++r) sum += factors[r * ldf + j] * load(a + r * padded + d);
      store_lanes_n(dst + d, sum, width - d);
    }
}

struct BackwardScratch {
  float *q, *gout, *w, *dz;  // one row a query of the key head
  float* slopes;             // of the soft cap
  BackwardScratch(Carver& carve, const AttentionProblem& p) {
    const int64_t rows = p.group() * p.L;
    q = carve.take<float>(rows * round_up(p.D, VL));
    gout = carve.take<float>(rows * round_up(p.E, VL));
    w = carve.take<float>(rows * round_up(p.S, VL));
    dz = carve.take<float>(rows * round_up(p.S, VL));
    slopes = carve.take<float>(p.softcap > 0 ? round_up(p.S, VL) : 0);
  }
};

template <class T>
void backward_item(const AttentionProblem& p, const AttentionTensors& t, const Dropout& dropout, int64_t item,
                   const BackwardScratch& s) {
  const int64_t hk = item % p.Hk, b = item / p.Hk, rows = p.group() * p.L;
  const int64_t padded_d = round_up(p.D, VL), padded_e = round_up(p.E, VL), padded_s = round_up(p.S, VL);
  const T* keys = static_cast<const T*>(t.k) + b * p.k_strides.b + hk * p.k_strides.h;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t h = hk * p.group() + r / p.L, i = r % p.L, row = (b * p.H + h) * p.L + i;
    const T* query = static_cast<const T*>(t.q) + b * p.q_strides.b + h * p.q_strides.h + i * p.q_strides.n;
    const T* gradient =
        static_cast<const T*>(t.gout) + b * p.gout_strides.b + h * p.gout_strides.h + i * p.gout_strides.n;
    float *q = s.q + r * padded_d, *gout = s.gout + r * padded_e, *dz = s.dz + r * padded_s;
    memset(q, 0, size_t(padded_d) * sizeof(float));
    memset(gout, 0, size_t(padded_e) * sizeof(float));
    if (static_cast<const float*>(t.lse)[row] != -INFINITE) {
      pack_rows(query, 0, 1, p.D, float(p.scale), q);
      pack_rows(gradient, 0, 1, p.E, 1.0f, gout);
    }
    gradient_row<T>(p, t, dropout, row, q, gout, s.slopes, s.w + r * padded_s, dz);
    if (p.need_q)
      weigh_row<true>(dz, keys, p.k_strides.n, p.S, p.D, float(p.scale),
                      static_cast<T*>(t.gq) + b * p.gq_strides.b + h * p.gq_strides.h + i * p.gq_strides.n);
  }
  if (!p.need_kv) return;
  T* gk = static_cast<T*>(t.gk) + b * p.gk_strides.b + hk * p.gk_strides.h;
  T* gv = static_cast<T*>(t.gv) + b * p.gv_strides.b + hk * p.gv_strides.h;
  sum_outer(rows, s.dz, padded_s, s.q, p.D, p.S, gk, p.gk_strides.n);
  sum_outer(rows, s.w, padded_s, s.gout, p.E, p.S, gv, p.gv_strides.n);
}

Refusal refuses(const AttentionProblem& p) {
  if (p.dtype == DType::f64) return "float64 is left to the reference";
  if (p.packed) return "packed sequences are left to the tiles";
  if (p.with_blocks) return "patterns are left to the tiles";
  if (p.L > FEW) return "takes at most four queries";
  if (p.S >= (int64_t(1) << 31)) return "takes fewer than 2^31 keys";
  return accepted;
}

WorkPlan plan(const AttentionProblem& p) {
  constexpr int64_t worth_a_thread = 100000;  // elements of K and V: about 20 microseconds
  WorkPlan plan;
  plan.add_phase(p.B * p.H * p.L, worth_a_thread / (p.S * (p.D + p.E) + 1) + 1);
  Carver carve(nullptr);
  Scratch(carve, p);
  plan.thread_bytes = carve.used();
  return plan;
}

void run(const AttentionProblem& p, const AttentionTensors& t, const WorkSlice& slice) {
  FlushDenormals guard;
  Carver carve(slice.scratch);
  const Scratch s(carve, p);
  const Dropout dropout(p, t);
  with_element(p.dtype, [&](auto tag) {
    for (int64_t row = slice.begin; row < slice.end; ++row) forward_row<decltype(tag)>(p, t, dropout, row, s);
  });
}

WorkPlan plan_backward(const AttentionProblem& p) {
  constexpr int64_t worth_a_thread = 50000;  // elements of K and V: about 20 microseconds
  WorkPlan plan;
  plan.add_phase(p.B * p.Hk, worth_a_thread / (p.group() * p.L * p.S * (p.D + p.E) + 1) + 1);
  Carver carve(nullptr);
  BackwardScratch(carve, p);
  plan.thread_bytes = carve.used();
  return plan;
}

void run_backward(const AttentionProblem& p, const AttentionTensors& t, const WorkSlice& slice) {
  FlushDenormals guard;
  Carver carve(slice.scratch);
  const BackwardScratch s(carve, p);
  const Dropout dropout(p, t);
  with_element(p.dtype, [&](auto tag) {
    for (int64_t item = slice.begin; item < slice.end; ++item)
      backward_item<decltype(tag)>(p, t, dropout, item, s);
  });
}

Refusal refuses_backward(const AttentionProblem& p) {
  if (p.group() * p.L > FEW) return "takes at most four queries a key head";
  return refuses(p);
}

}  // namespace

extern const AttentionCpuKernel attention_few_queries_forward, attention_few_queries_backward;
const AttentionCpuKernel attention_few_queries_backward = {"few_queries_" PYSEQNET_ISA_NAME, this_isa,
                                                           refuses_backward, plan_backward, run_backward};
const AttentionCpuKernel attention_few_queries_forward = {"few_queries_" PYSEQNET_ISA_NAME, this_isa, refuses,
                                                          plan, run};

}  // namespace PYSEQNET_ISA
}  // namespace pyseqnet
