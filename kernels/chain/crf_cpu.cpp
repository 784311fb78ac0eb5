// The linear-chain CRF on the CPU: log-likelihood and its gradient, several sequences at a time.
//
// Where the numbers allow, sums of products of probabilities instead of log-sums: with E = exp(A - max A) packed once,
// a step of a group of sequences is one small matrix product,
//   u[t] = (u[t-1] E) / c[t-1] * w[t],   w[t] = exp(e[t] - its largest),   c[t] = sum of u[t]
// whose epilogue scales, multiplies and sums; logZ is the sum of log c and of what was taken off. Backward is the same
// with E transposed, the marginals are u b, and the gradient of the transitions is E times U^T V, one product over all
// steps of the group (Rabiner, 1989, section V.A, for the scaling).
//
// What it costs: 2 C^2 flops a step and sequence for logZ, 8 C^2 for the gradient (it runs forward again: nothing is
// kept between the passes), and C exponentials. Bound: multiply-adds, for C >= 2 VL; below, vectors are part empty.
//
// What it cannot hold: float reaches 2^-126, so a state that far below the best of its step is lost, and is missing if
// later steps make it likely. A step can lower a state by no more than the spread of A and of e[t]; so with that spread
// bounded, a state that will be lost passes through a zone above 2^-126 first, where it is noticed. Sequences in which
// it is are done over in the log domain (crf_log_domain.h), C^2 exponentials a step. -infinity (a forbidden tag or
// transition) is an exact zero and is harmless.
//
// Items are groups of sequences of similar length, so that few rows of a group run dry early. Groups depend on the
// problem alone: results are the same for any number of threads.
#include "chain/chain_math.h"
#include "chain/crf.h"
#include "chain/crf_log_domain.h"
#include "common/element_lanes.h"
#include "common/gemm.h"

namespace pyseqnet {
inline namespace PYSEQNET_ISA {
namespace {

constexpr int64_t group_rows = 8;
// A normalised state below `noticed` sends its sequence to the log domain. One step lowers a state by at most the
// spread (nats) and the number of tags: e^-44 / 2^60 is still above 2^-126.
constexpr float noticed = 0x1p-60f, widest_spread = 44.0f;

// What all groups read: made once, by phase 0.
struct Shared {
  int64_t columns;                // C in whole vectors
  float *e, *forward, *backward;  // E (C, C) and its two packings
  float *start, *end;             // exp(start - largest), exp(end - largest), columns each
  float* numbers;                 // largest of A, start and end; spread of A; 1 if all can be held
  int64_t* order;                 // sequences, longest first
  float* partial;                 // (groups, (C + 2) C): gradients of transitions, start, end
  Shared(const CrfProblem& p, bool gradient, Carver& carver) {
    columns = (p.C + VL - 1) / VL * VL;
    e = carver.take<float>(p.C * p.C + VL);
    forward = carver.take<float>(packed_size(p.C, p.C, TILE));
    backward = carver.take<float>(gradient ? packed_size(p.C, p.C, TILE) : 0);
    start = carver.take<float>(columns), end = carver.take<float>(columns);
    numbers = carver.take<float>(5), order = carver.take<int64_t>(p.B);
    partial = carver.take<float>(gradient ? groups(p) * (p.C + 2) * p.C : 0);
  }
  static int64_t groups(const CrfProblem& p) { return (p.B + group_rows - 1) / group_rows; }
  float transition_max() const { return numbers[0]; }
  float start_max() const { return numbers[1]; }
  float end_max() const { return numbers[2]; }
  float spread() const { return numbers[3]; }
  bool holds() const { return numbers[4] != 0; }
};

// A group's own memory.
struct Scratch {
  float *u, *w, *v, *c;  // (T, rows, columns) each, v and all steps of u, w for the gradient alone; (T, rows)
  float *product, *gemm_memory;
  float* log_domain;
  Scratch(const CrfProblem& p, int64_t columns, bool gradient, Carver& carver) {
    const int64_t steps = gradient ? p.T : 2, step = group_rows * columns;
    u = carver.take<float>(steps * step), w = carver.take<float>(steps * step);
    v = carver.take<float>(gradient ? p.T * step : 0), c = carver.take<float>(p.T * group_rows);
    product = carver.take<float>(gradient ? p.C * p.C + VL : 0);
    gemm_memory =
        carver.take<float>(gradient ? gemm_scratch(p.C, p.T * group_rows, View{nullptr, 1, columns}) : 0);
    log_domain = carver.take<float>(CrfLogDomain<float>::floats(p, gradient));
  }
};

// ---------------------------------------------------------------- phase 0

struct Range {
  float largest, smallest;  // of what is finite; largest NaN if there is NaN or +infinity
};
Range range_of(const float* x, int64_t n) {
  Range r{-HUGE_VALF, HUGE_VALF};
  for (int64_t i = 0; i < n; i++) {
    if (!(x[i] < HUGE_VALF)) return {__builtin_nanf(""), 0};
    if (x[i] > r.largest) r.largest = x[i];
    if (x[i] > -HUGE_VALF && x[i] < r.smallest) r.smallest = x[i];
  }
  return r;
}

// Merge sort by length, longest first; equal ones keep their order. `other` holds as many.
void sort_by_length(const int64_t* lengths, int64_t n, int64_t* order, int64_t* other) {
  for (int64_t i = 0; i < n; i++) order[i] = i;
  for (int64_t width = 1; width < n; width *= 2) {
    for (int64_t i = 0; i < n; i += 2 * width) {
      const int64_t middle = i + width < n ? i + width : n, end = i + 2 * width < n ? i + 2 * width : n;
      for (int64_t a = i, b = middle, to = i; to < end; to++)
        other[to] =
            a < middle && (b >= end || lengths[order[a]] >= lengths[order[b]]) ? order[a++] : order[b++];
    }
    memcpy(order, other, size_t(n) * sizeof(int64_t));
  }
}

void exponentials(const float* from, int64_t n, float largest, float* to) {
  for (int64_t i = 0; i < n; i += VL) {
    const int left = n - i < VL ? int(n - i) : VL;
    const vf x = (load_n(from + i, left) - largest) * LOG2E;
    store_n(to + i, x < -126.0f ? vf{} : exp2v(x), left);
  }
}

void prepare(const CrfProblem& p, const CrfTensors& t, const Shared& s, bool gradient, int64_t* other) {
  const float *a = static_cast<const float*>(t.transitions), *start = static_cast<const float*>(t.start),
              *end = static_cast<const float*>(t.end);
  const Range ra = range_of(a, p.C * p.C), rs = range_of(start, p.C), rz = range_of(end, p.C);
  s.numbers[0] = ra.largest, s.numbers[1] = rs.largest, s.numbers[2] = rz.largest;
  s.numbers[3] = ra.largest - ra.smallest + logf(float(p.C));
  const bool finite = ra.largest > -HUGE_VALF && rs.largest > -HUGE_VALF && rz.largest > -HUGE_VALF;
  s.numbers[4] = finite && s.spread() < widest_spread && rs.largest - rs.smallest < widest_spread &&
                 rz.largest - rz.smallest < widest_spread;
  sort_by_length(t.lengths, p.B, s.order, other);
  if (!s.holds()) return;
  for (int64_t j = 0; j < s.columns; j++) s.start[j] = s.end[j] = 0;
  exponentials(start, p.C, rs.largest, s.start);
  exponentials(end, p.C, rz.largest, s.end);
  exponentials(a, p.C * p.C, ra.largest, s.e);
  const auto row = [&](int64_t i) { return s.e + i * p.C; };
  p.C <= 2 * VL ? pack_b_rows<2>(s.forward, p.C, p.C, row) : pack_b_rows<4>(s.forward, p.C, p.C, row);
  if (gradient)
    p.C <= 2 * VL ? pack_b_cols<2>(s.backward, p.C, p.C, row) : pack_b_cols<4>(s.backward, p.C, p.C, row);
}

// ---------------------------------------------------------------- a group

// T is the dtype of the emissions, NV the width of register tiles in vectors.
template <class T, int NV>
struct Group {
  const CrfProblem& p;
  const CrfTensors& t;
  const Shared& s;
  const Scratch& m;
  const int64_t index, first, rows;
  int64_t steps = 0;           // of the longest sequence
  int64_t length[group_rows];  // 0: not valid
  double logz[group_rows];
  bool lost[group_rows];  // to be done in the log domain

  Group(const CrfProblem& problem, const CrfTensors& tensors, const Shared& shared, const Scratch& scratch,
        int64_t group)
      : p(problem),
        t(tensors),
        s(shared),
        m(scratch),
        index(group),
        first(group * group_rows),
        rows(p.B - first < group_rows ? p.B - first : group_rows) {
    for (int64_t r = 0; r < rows; r++) {
      length[r] = crf_is_valid(p, t, sequence(r)) ? t.lengths[sequence(r)] : 0;
      logz[r] = 0, lost[r] = !s.holds();
      if (length[r] > steps) steps = length[r];
    }
  }
  int64_t sequence(int64_t r) const { return s.order[first + r]; }
  const T* emissions(int64_t r, int64_t step) const {
    return static_cast<const T*>(t.e) + sequence(r) * p.e_b + step * p.e_t;
  }
  int64_t stride() const { return group_rows * s.columns; }
  // Rows that take part in a step: a prefix, as lengths fall. An invalid sequence takes part and is not looked at.
  int64_t active(int64_t step) const {
    int64_t r = rows;
    while (r > 0 && t.lengths[sequence(r - 1)] <= step) r--;
    return r;
  }
  int64_t kept(bool gradient, int64_t step) const { return gradient ? step : step % 2; }

  // w[r] = exp(e - largest); what was taken off goes to logz. Notices what cannot be held.
  void weights(int64_t r, int64_t step, float* w) {
    if (step >= length[r]) {
      memset(w, 0, size_t(s.columns) * sizeof(float));
      return;
    }
    const T* e = emissions(r, step);
    vf largest = set1(-HUGE_VALF), smallest = set1(HUGE_VALF);
    vi bad = {};
    for (int64_t j = 0; j < p.C; j += VL) {
      const vf x = p.C - j >= VL ? load_lanes(e + j) : load_between(e + j, 0, p.C - j, set1(-HUGE_VALF));
      bad |= ~(x < HUGE_VALF);
      largest = vmax(largest, x);
      smallest = vmin(smallest, x > -HUGE_VALF ? x : set1(HUGE_VALF));
      store(w + j, x);
    }
    int32_t any = 0;
    for (int l = 0; l < VL; ++l) any |= bad[l];
    const float top = hmax(largest), spread = top + hmax(-smallest);
    lost[r] |= any || !(top > -HUGE_VALF) || !(spread + s.spread() < widest_spread);
    if (lost[r]) {
      memset(w, 0, size_t(s.columns) * sizeof(float));
      return;
    }
    for (int64_t j = 0; j < s.columns; j += VL) {
      const vf x = (load(w + j) - top) * LOG2E;
      store(w + j, x < -126.0f ? vf{} : exp2v(x));
    }
    logz[r] += double(top) + double(step ? s.transition_max() : s.start_max());
  }

  // u of every step, or of the last two; logz without the end.
  void forward(bool gradient) {
    for (int64_t step = 0; step < steps; step++) {
      float* u = m.u + kept(gradient, step) * stride();
      float* w = m.w + kept(gradient, step) * stride();
      float* c = m.c + step * group_rows;
      const int64_t now = active(step);
      float smallest[group_rows];
      for (int64_t r = 0; r < now; r++)
        weights(r, step, w + r * s.columns), c[r] = 0, smallest[r] = HUGE_VALF;
      if (step == 0) {
        for (int64_t r = 0; r < now; r++) begin(w + r * s.columns, u + r * s.columns, c[r], smallest[r]);
      } else {
        const float* before = m.u + kept(gradient, step - 1) * stride();
        gemm_prepacked<NV>(
            now, p.C, p.C, [&](int64_t r) { return before + r * s.columns; }, s.forward,
            [&](auto R, auto, int64_t r0, int64_t j, int64_t n, auto& acc) PYSEQNET_LAMBDA {
#pragma GCC unroll 16
              for (int r = 0; r < R.value; ++r) {
                vf sum = {}, least = set1(HUGE_VALF);
                const vf inverse = set1(1.0f / c[r0 + r - group_rows]);
#pragma GCC unroll 4
                for (int x = 0; x < NV; ++x)
                  if (x * VL < n) {
                    const int64_t at = (r0 + r) * s.columns + j + x * VL;
                    const vf y = acc[r][x] * inverse * load(w + at);
                    store(u + at, y);
                    sum += y;
                    least = vmin(least, y > 0.0f ? y : set1(HUGE_VALF));
                  }
                c[r0 + r] += hsum(sum);
                const float low = -hmax(-least);
                smallest[r0 + r] = low < smallest[r0 + r] ? low : smallest[r0 + r];
              }
            });
      }
      for (int64_t r = 0; r < now; r++) settle(r, step, c[r], smallest[r]);
      if (gradient)
        for (int64_t r = now; r < group_rows; r++)
          memset(u + r * s.columns, 0, size_t(s.columns) * sizeof(float));
      // The end of a sequence is looked at while its u is there.
      for (int64_t r = 0; r < now; r++)
        if (step == length[r] - 1 && !lost[r]) {
          const double end = end_sum(u + r * s.columns) / c[r];
          lost[r] |= !(end > 0);
          if (!lost[r]) logz[r] += log(end) + s.end_max();
        }
    }
  }
  void begin(float* w, float* u, float& c, float& smallest) const {
    vf sum = {}, least = set1(HUGE_VALF);
    for (int64_t j = 0; j < s.columns; j += VL) {
      const vf y = load(w + j) * load(s.start + j);
      store(u + j, y);
      sum += y;
      least = vmin(least, y > 0.0f ? y : set1(HUGE_VALF));
    }
    c = hsum(sum), smallest = -hmax(-least);
  }
  // A row that is lost goes on with harmless numbers.
  void settle(int64_t r, int64_t step, float& c, float smallest) {
    if (step >= length[r] || lost[r]) {
      c = 1;
      return;
    }
    if (!(c > 0) || !(smallest > noticed * c)) {
      lost[r] = true, c = 1;
      return;
    }
    logz[r] += log(double(c));
  }
  double end_sum(const float* u) const {
    vf sum = {};
    for (int64_t j = 0; j < s.columns; j += VL) sum += load(u + j) * load(s.end + j);
    return hsum(sum);
  }

  double score(int64_t r) const {
    const int64_t* y = t.tags + sequence(r) * p.T;
    const float* a = static_cast<const float*>(t.transitions);
    double sum =
        double(static_cast<const float*>(t.start)[y[0]]) + static_cast<const float*>(t.end)[y[length[r] - 1]];
    for (int64_t step = 0; step < length[r]; step++) {
      sum += to_float(emissions(r, step)[y[step]]);
      if (step) sum += a[y[step - 1] * p.C + y[step]];
    }
    return sum;
  }

  void log_likelihood() {
    if (s.holds()) forward(false);
    for (int64_t r = 0; r < rows; r++) {
      float& llh = static_cast<float*>(t.llh)[sequence(r)];
      if (length[r] == 0) {
        llh = __builtin_nanf("");
        continue;
      }
      const double z = lost[r] ? CrfLogDomain<T>(p, t, sequence(r), m.log_domain).log_partition() : logz[r];
      llh = float((t.tags ? score(r) : 0.0) - z);
    }
  }

  // ---------------------------------------------------------------- gradient

  T* ge(int64_t r, int64_t step) const { return static_cast<T*>(t.ge) + (sequence(r) * p.T + step) * p.C; }
  float weight(int64_t r) const { return static_cast<const float*>(t.g)[sequence(r)]; }
  // Adds n lanes to a shared gradient, at most a vector.
  void add(float* to, vf x, int64_t n) const {
    const int left = n < VL ? int(n) : VL;
    store_n(to, load_n(to, left) + x, left);
  }

  // One vector of tags j of a step: the gradient of its emissions from b, and v for the step before.
  PYSEQNET_INLINE void finish(int64_t r, int64_t step, int64_t j, vf b, float* partial) const {
    const int64_t at = step * stride() + r * s.columns + j;
    vf marginal = load(m.u + at) * b * -weight(r);
    if (t.tags) {
      const int64_t y = t.tags[sequence(r) * p.T + step] - j;
      if (y >= 0 && y < VL) marginal[y] += weight(r);
    }
    store_lanes_n(ge(r, step) + j, marginal, p.C - j < VL ? p.C - j : VL);
    if (step == 0) return add(partial + p.C * p.C + j, marginal, p.C - j);
    store(m.v + at, load(m.w + at) * b * (1.0f / m.c[(step - 1) * group_rows + r]));
  }
  // b of a sequence's last step.
  void end_of(int64_t r, float* partial) const {
    const int64_t step = length[r] - 1;
    const float* u = m.u + step * stride() + r * s.columns;
    const float factor = float(1.0 / end_sum(u));
    for (int64_t j = 0; j < p.C; j += VL) {
      const vf b = load(s.end + j) * factor;
      add(partial + (p.C + 1) * p.C + j, load(u + j) * b * -weight(r), p.C - j);
      finish(r, step, j, b, partial);
    }
  }

  void backward(float* partial) {
    memset(m.v, 0, size_t(steps * stride()) * sizeof(float));
    for (int64_t r = 0; r < rows; r++)
      if (lost[r] || !length[r])
        for (int64_t step = 0; step < steps; step++)
          memset(m.u + step * stride() + r * s.columns, 0, size_t(s.columns) * sizeof(float));
    for (int64_t step = steps - 1; step >= 0; step--) {
      const int64_t going_on = active(step + 1);
      const float* ahead = m.v + (step + 1) * stride();
      if (going_on)
        gemm_prepacked<NV>(
            going_on, p.C, p.C, [&](int64_t r) { return ahead + r * s.columns; }, s.backward,
            [&](auto R, auto, int64_t r0, int64_t j, int64_t n, auto& acc) PYSEQNET_LAMBDA {
#pragma GCC unroll 16
              for (int r = 0; r < R.value; ++r)
                if (!lost[r0 + r] && length[r0 + r])
#pragma GCC unroll 4
                  for (int x = 0; x < NV; ++x)
                    if (x * VL < n) finish(r0 + r, step, j + x * VL, acc[r][x], partial);
            });
      for (int64_t r = 0; r < rows; r++)
        if (length[r] - 1 == step && !lost[r]) end_of(r, partial);
    }
    transition_gradient(partial);
  }
  void transition_gradient(float* partial) {
    if (steps < 2) return;
    for (int64_t r = 0; r < rows; r++) {
      const float g = -weight(r);
      for (int64_t step = 0; step < length[r]; step++)
        for (int64_t j = 0; j < s.columns; j += VL) {
          float* u = m.u + step * stride() + r * s.columns + j;
          store(u, load(u) * g);
        }
    }
    gemm(p.C, p.C, (steps - 1) * group_rows, View{m.u, 1, s.columns}, View{m.v + stride(), s.columns, 1},
         m.product, p.C, 0.0f, NoEpi{}, m.gemm_memory);
    for (int64_t x = 0; x < p.C * p.C; x++) partial[x] = m.product[x] * s.e[x];
  }

  // What the tags add to the gradients that sequences share; that of the start came with the emissions'.
  void add_tags(int64_t r, float* partial) const {
    const float g = weight(r);
    const int64_t* y = t.tags + sequence(r) * p.T;
    for (int64_t step = 1; step < length[r]; step++) partial[y[step - 1] * p.C + y[step]] += g;
    if (lost[r]) partial[p.C * p.C + y[0]] += g;
    partial[(p.C + 1) * p.C + y[length[r] - 1]] += g;
  }

  void gradient() {
    float* partial = s.partial + index * (p.C + 2) * p.C;
    memset(partial, 0, size_t((p.C + 2) * p.C) * sizeof(float));
    if (s.holds()) {
      forward(true);
      backward(partial);
    }
    for (int64_t r = 0; r < rows; r++) {
      memset(static_cast<void*>(ge(r, length[r])), 0, size_t((p.T - length[r]) * p.C) * sizeof(T));
      if (length[r] == 0) continue;
      if (lost[r]) CrfLogDomain<T>(p, t, sequence(r), m.log_domain).gradient(weight(r), ge(r, 0), partial);
      if (t.tags) add_tags(r, partial);
    }
  }
};

// ---------------------------------------------------------------- plans

Refusal refuses(const CrfProblem& p) {
  if (p.dtype == DType::f64) return "float64 is served by the reference";
  return accepted;
}

WorkPlan plan_pass(const CrfProblem& p, bool gradient) {
  constexpr int64_t grain_products = 600 * 1000;
  WorkPlan plan;
  Carver shared(nullptr), scratch(nullptr);
  const Shared s(p, gradient, shared);
  shared.take<int64_t>(p.B);
  const Scratch m(p, s.columns, gradient, scratch);
  const int64_t work = group_rows * p.T * p.C * (s.columns + 32) * (gradient ? 4 : 1);
  plan.add_phase(1);
  plan.add_phase(Shared::groups(p), work >= grain_products ? 1 : grain_products / (work > 0 ? work : 1) + 1);
  if (gradient) plan.add_phase(p.C + 2, 1 + 50 * 1000 / (p.C * Shared::groups(p) + 1));
  plan.shared_bytes = shared.used(), plan.thread_bytes = scratch.used();
  return plan;
}
WorkPlan plan_log_likelihood(const CrfProblem& p) { return plan_pass(p, false); }
WorkPlan plan_gradient(const CrfProblem& p) { return plan_pass(p, true); }

// Row `row` of (transitions, start, end), summed over the groups.
void sum_partials(const CrfProblem& p, const CrfTensors& t, const Shared& s, int64_t row) {
  float* to = row < p.C    ? static_cast<float*>(t.gtransitions) + row * p.C
              : row == p.C ? static_cast<float*>(t.gstart)
                           : static_cast<float*>(t.gend);
  for (int64_t j = 0; j < p.C; j++) {
    double sum = 0;
    for (int64_t g = 0; g < Shared::groups(p); g++) sum += s.partial[(g * (p.C + 2) + row) * p.C + j];
    to[j] = float(sum);
  }
}

void run_pass(const CrfProblem& p, const CrfTensors& t, const WorkSlice& slice, bool gradient) {
  const FlushDenormals guard;
  Carver shared(slice.shared), carver(slice.scratch);
  const Shared s(p, gradient, shared);
  if (slice.phase == 0) return prepare(p, t, s, gradient, shared.take<int64_t>(p.B));
  if (slice.phase == 2) {
    for (int64_t row = slice.begin; row < slice.end; row++) sum_partials(p, t, s, row);
    return;
  }
  const Scratch m(p, s.columns, gradient, carver);
  with_element(p.dtype, [&](auto element) {
    using T = decltype(element);
    for (int64_t g = slice.begin; g < slice.end; g++) {
      const auto do_pass = [&](auto group) { gradient ? group.gradient() : group.log_likelihood(); };
      p.C <= 2 * VL ? do_pass(Group<T, 2>(p, t, s, m, g)) : do_pass(Group<T, 4>(p, t, s, m, g));
    }
  });
}
void run_log_likelihood(const CrfProblem& p, const CrfTensors& t, const WorkSlice& slice) {
  run_pass(p, t, slice, false);
}
void run_gradient(const CrfProblem& p, const CrfTensors& t, const WorkSlice& slice) {
  run_pass(p, t, slice, true);
}

}  // namespace

extern const CrfCpuKernel crf_log_likelihood, crf_gradient;
const CrfCpuKernel crf_log_likelihood = {PYSEQNET_ISA_NAME, this_isa, refuses, plan_log_likelihood,
                                         run_log_likelihood};
const CrfCpuKernel crf_gradient = {PYSEQNET_ISA_NAME, this_isa, refuses, plan_gradient, run_gradient};

}  // namespace PYSEQNET_ISA
}  // namespace pyseqnet
