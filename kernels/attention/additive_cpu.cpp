// Additive attention on the CPU, fused: scores, softmax and values of a tile of queries and keys at a time.
//
// The plain way makes tanh(q + k) as a tensor of L x S x D numbers, 268 MB for eight sequences of 256 with
// D = 128, and passes over it some five times forward and back. Here a tile of 64 queries and 128 keys lies in
// the cache: its tangents are made in registers and summed at once (additive_lanes.h), softmax runs online
// over the tiles of keys (attention_tile.h), and backward makes the tangents again, twice: for the scores, of
// which only the log-sum-exp was kept, and for the gradients.
//
// Forward and weights: an item is a block of queries of one sequence. Backward: an item is one sequence, or
// where there are few sequences a part of its queries; parts leave gk and gv in the workspace, and a second
// phase adds them up in order. How many parts there are depends on the problem only.
//
// Bound: arithmetic on L S D tangents, about 7 vector operations each forward and 18 back.
#include "attention/additive_lanes.h"

namespace pyseqnet {
inline namespace PYSEQNET_ISA {
namespace {

using namespace additive;

constexpr int64_t WANTED_ITEMS = 8;  // of backward: enough for the threads of a small machine

PYSEQNET_INLINE int64_t length_of(const AdditiveProblem& p, const AdditiveTensors& t, int64_t b) {
  return p.with_key_lengths ? clamped_length(t.key_lengths[b], p.S) : p.S;
}
template <class T>
PYSEQNET_INLINE const T* at(const void* data, const AdditiveStrides& s, int64_t b, int64_t n) {
  return static_cast<const T*>(data) + b * s.b + n * s.n;
}

// Weight and bias as floats, padded with zeros to whole vectors.
struct Vectors {
  float *w, *bias;
  Vectors(Carver& carve, const AdditiveProblem& p) {
    w = carve.take<float>(round_up(p.D, VL)), bias = carve.take<float>(round_up(p.D, VL));
  }
  template <class T>
  void fill(const AdditiveProblem& p, const AdditiveTensors& t) const {
    pack_rows(static_cast<const T*>(t.w), 0, 1, p.D, 1.0f, w);
    if (p.with_bias)
      pack_rows(static_cast<const T*>(t.bias), 0, 1, p.D, 1.0f, bias);
    else
      memset(bias, 0, size_t(round_up(p.D, VL)) * sizeof(float));
  }
};

// Scores of rows first .. first + n of the packed queries, which lie in one block. True: by exponentials.
PYSEQNET_INLINE bool score(const PackedQueries& q, const PackedKeys& k, int64_t first, int64_t n, int64_t D,
                           const float* w, float* z) {
  const int64_t from = first * q.width;
  const bool separable = tanh_is_separable(q.largest[first / QUERIES], k.largest);
  if (separable)
    score_tile<true>(n, D, q.exp + from, q.width, w, k.exp, k.count, z);
  else
    score_tile<false>(n, D, q.sum + from, q.width, w, k.sum, k.count, z);
  return separable;
}

template <class T>
PYSEQNET_INLINE void store_row(const float* from, int64_t width, T* to) {
  for (int64_t d = 0; d < width; d += VL) store_lanes_n(to + d, load(from + d), width - d);
}
template <class T>
PYSEQNET_INLINE void zero_row(int64_t width, T* to) {
  memset(to, 0, size_t(width) * sizeof(T));
}

// ---- forward, weights ----

struct Scratch {
  Vectors vectors;
  PackedQueries q;
  PackedKeys k;
  float *z, *out, *largest, *sums;
  int32_t* limits;

  Scratch(Carver& carve, const AdditiveProblem& p)
      : vectors(carve, p), q(carve, QUERIES, p.D), k(carve, p.D, p.E) {
    const int64_t rows = QUERIES + ROWS;  // products round the number of rows up
    z = carve.take<float>(rows * KEYS), out = carve.take<float>(rows * round_up(p.E, VL));
    largest = carve.take<float>(rows), sums = carve.take<float>(rows * VL);
    limits = carve.take<int32_t>(rows);
  }
};

struct Block {
  int64_t b, i0, n;
  Block(const AdditiveProblem& p, int64_t item) {
    const int64_t blocks = (p.L + QUERIES - 1) / QUERIES;
    b = item / blocks, i0 = item % blocks * QUERIES, n = smaller(QUERIES, p.L - i0);
  }
};

template <class T>
void forward_block(const AdditiveProblem& p, const AdditiveTensors& t, int64_t item, Scratch& s) {
  const Block block(p, item);
  const int64_t length = length_of(p, t, block.b), padded = round_up(p.E, VL);
  s.q.pack(at<T>(t.q, p.q, block.b, block.i0), p.q.n, block.n, p.D, s.vectors.bias);
  memset(s.out, 0, size_t(block.n * padded) * sizeof(float));
  memset(s.sums, 0, size_t(block.n * VL) * sizeof(float));
  for (int64_t i = 0; i < block.n; ++i) s.largest[i] = -INFINITE;
  for (int64_t j0 = 0; j0 < length; j0 += KEYS) {
    const int64_t m = smaller(KEYS, length - j0);
    s.k.pack(at<T>(t.k, p.k, block.b, j0), p.k.n, at<T>(t.v, p.v, block.b, j0), p.v.n, m, p.D, p.E);
    score(s.q, s.k, 0, block.n, p.D, s.vectors.w, s.z);
    for (int64_t i = 0; i < block.n; ++i) s.limits[i] = int32_t(m);
    for (int64_t r = 0; r < block.n; r += ROWS) {
      const int64_t n = smaller(ROWS, block.n - r);
      float factors[ROWS + VL];
      softmax_tile(n, round_up(m, VL), s.limits + r, s.z + r * KEYS, KEYS, {s.largest + r, s.sums + r * VL},
                   factors);
      for (int64_t x = n; x < ROWS; ++x) factors[x] = 0;
      accumulate(n, m, padded, s.z + r * KEYS, KEYS, s.k.values, s.out + r * padded, factors);
    }
  }
  for (int64_t i = 0; i < block.n; ++i) {
    const int64_t row = block.b * p.L + block.i0 + i;
    const SoftmaxState<float> state{s.largest[i], hsum(load(s.sums + i * VL))};
    const float inverse = softmax_inverse(state);
    float* out = s.out + i * padded;
    for (int64_t e = 0; e < padded; e += VL) store(out + e, load(out + e) * inverse);
    store_row(out, p.E, static_cast<T*>(t.out) + row * p.E);
    static_cast<float*>(t.lse)[row] =
        state.sum == 0.0f ? -INFINITE : softmax_origin(state.largest) + logf(state.sum);
  }
}

template <class T>
void weights_block(const AdditiveProblem& p, const AdditiveTensors& t, int64_t item, Scratch& s) {
  const Block block(p, item);
  const int64_t length = length_of(p, t, block.b), row = block.b * p.L + block.i0;
  T* weights = static_cast<T*>(t.weights) + row * p.S;
  s.q.pack(at<T>(t.q, p.q, block.b, block.i0), p.q.n, block.n, p.D, s.vectors.bias);
  for (int64_t j0 = 0; j0 < length; j0 += KEYS) {
    const int64_t m = smaller(KEYS, length - j0);
    s.k.pack<T>(at<T>(t.k, p.k, block.b, j0), p.k.n, nullptr, 0, m, p.D, p.E);
    score(s.q, s.k, 0, block.n, p.D, s.vectors.w, s.z);
    for (int64_t i = 0; i < block.n; ++i) s.limits[i] = int32_t(m);
    probabilities_tile(block.n, round_up(m, VL), s.limits, s.z, KEYS, static_cast<float*>(t.lse) + row);
    for (int64_t i = 0; i < block.n; ++i) store_row(s.z + i * KEYS, m, weights + i * p.S + j0);
  }
  for (int64_t i = 0; i < block.n; ++i) zero_row(p.S - length, weights + i * p.S + length);
}

// ---- backward ----

// How the queries of a sequence are divided.
struct Parts {
  int64_t count, rows;
  explicit Parts(const AdditiveProblem& p) {
    const int64_t blocks = (p.L + QUERIES - 1) / QUERIES, wanted = (WANTED_ITEMS + p.B - 1) / larger(p.B, 1);
    const int64_t each = larger(1, (blocks + wanted - 1) / wanted);
    rows = each * QUERIES;
    count = larger(1, (blocks + each - 1) / each);
  }
};

// The workspace of all items: gk and gv of parts, gw and gbias of all.
struct Partials {
  float *gk = nullptr, *gv = nullptr;  // [items][S][width]; null with one part
  double *gw, *gbias;                  // [items][D]
  Partials(Carver& carve, const AdditiveProblem& p, const Parts& parts) {
    const int64_t items = p.B * parts.count;
    gw = carve.take<double>(items * p.D), gbias = carve.take<double>(items * p.D);
    if (parts.count == 1) return;
    gk = carve.take<float>(items * p.S * p.D), gv = carve.take<float>(items * p.S * p.E);
  }
};

struct BackwardScratch {
  Vectors vectors;
  PackedQueries q;
  PackedKeys k;
  float *value_panels, *gout, *gq, *gk, *gv, *gw, *z, *dz, *lse, *delta, *row;
  int32_t* limits;

  BackwardScratch(Carver& carve, const AdditiveProblem& p, const Parts& parts)
      : vectors(carve, p), q(carve, smaller(parts.rows, round_up(p.L, QUERIES)), p.D), k(carve, p.D, p.E) {
    const int64_t rows = smaller(parts.rows, p.L) + ROWS, e = round_up(p.E, VL);
    value_panels = carve.take<float>(KEYS * p.E);
    gout = carve.take<float>(rows * e), gq = carve.take<float>(rows * q.width);
    gk = carve.take<float>(KEYS * p.D), gv = carve.take<float>((KEYS + ROWS) * e);
    gw = carve.take<float>(p.D * VL);
    z = carve.take<float>((QUERIES + ROWS) * KEYS), dz = carve.take<float>((QUERIES + ROWS) * KEYS);
    lse = carve.take<float>(rows), delta = carve.take<float>(rows);
    row = carve.take<float>(larger(e, q.width));
    limits = carve.take<int32_t>(QUERIES + ROWS);
  }
};

template <class T>
struct BackwardItem {
  const AdditiveProblem& p;
  const AdditiveTensors& t;
  const Partials& partials;
  BackwardScratch& s;
  int64_t item, b, i0, n, length;

  BackwardItem(const AdditiveProblem& problem, const AdditiveTensors& tensors, const Parts& parts,
               const Partials& all, BackwardScratch& scratch, int64_t which)
      : p(problem), t(tensors), partials(all), s(scratch), item(which) {
    b = item / parts.count, i0 = item % parts.count * parts.rows;
    n = larger(0, smaller(parts.rows, p.L - i0));
    length = length_of(p, t, b);
  }

  // gout, lse and delta of the rows; zeroes the sums.
  void begin() {
    const int64_t e = round_up(p.E, VL);
    double* gw = partials.gw + item * p.D;
    for (int64_t d = 0; d < p.D; ++d) gw[d] = 0;
    memset(s.gq, 0, size_t(n * s.q.width) * sizeof(float));
    s.q.pack(at<T>(t.q, p.q, b, i0), p.q.n, n, p.D, s.vectors.bias);
    pack_rows(at<T>(t.gout, p.gout, b, i0), p.gout.n, n, p.E, 1.0f, s.gout);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t row = b * p.L + i0 + i;
      pack_rows(static_cast<const T*>(t.out) + row * p.E, 0, 1, p.E, 1.0f, s.row);
      vf sum = {};
      for (int64_t x = 0; x < e; x += VL) sum += load(s.gout + i * e + x) * load(s.row + x);
      if (p.with_gweights) {
        const T* weights = static_cast<const T*>(t.weights) + row * p.S;
        const T* gweights = static_cast<const T*>(t.gweights) + row * p.S;
        for (int64_t j = 0; j < length; j += VL)
          sum += load_between(weights + j, 0, length - j, vf{}) *
                 load_between(gweights + j, 0, length - j, vf{});
      }
      s.delta[i] = hsum(sum);
      s.lse[i] = static_cast<const float*>(t.lse)[row];
    }
  }

  // z becomes P, dz the gradient of the scores: rows first .. first + rows, keys j0 .. j0 + m.
  bool score_gradients(int64_t first, int64_t rows, int64_t j0, int64_t m) {
    const int64_t e = round_up(p.E, VL), vectors = (m + VL - 1) / VL, columns = s.k.count * PANEL;
    const bool separable = score(s.q, s.k, first, rows, p.D, s.vectors.w, s.z);
    for (int64_t i = 0; i < rows; ++i) s.limits[i] = int32_t(m);
    probabilities_tile(rows, columns, s.limits, s.z, KEYS, s.lse + first);
    if (!p.need_scores) return separable;
    for (int64_t r = 0; r < rows; r += ROWS)
      multiply_panels(smaller(ROWS, rows - r), p.E, s.gout + (first + r) * e, e, s.value_panels, 0, vectors,
                      s.dz + r * KEYS, KEYS);
    for (int64_t i = 0; i < rows; ++i) {
      const T* gweights = p.with_gweights
                              ? static_cast<const T*>(t.gweights) + (b * p.L + i0 + first + i) * p.S + j0
                              : nullptr;
      for (int64_t c = 0; c < columns; c += VL) {
        float* dz = s.dz + i * KEYS + c;
        vf product = c < vectors * VL ? load(dz) : vf{};
        if (gweights) product += load_between(gweights + c, 0, m - c, vf{});
        store(dz, additive_logit_gradient(load(s.z + i * KEYS + c), product, set1(s.delta[first + i])));
      }
    }
    return separable;
  }

  void key_tile(int64_t j0) {
    const int64_t m = smaller(KEYS, length - j0), e = round_up(p.E, VL);
    s.k.pack(at<T>(t.k, p.k, b, j0), p.k.n, at<T>(t.v, p.v, b, j0), p.v.n, m, p.D, p.E);
    if (p.need_scores) pack_panels(s.k.values, e, m, p.E, s.value_panels);
    memset(s.gk, 0, size_t(s.k.count * PANEL * p.D) * sizeof(float));
    memset(s.gv, 0, size_t(m * e) * sizeof(float));
    memset(s.gw, 0, size_t(p.D * VL) * sizeof(float));
    for (int64_t first = 0; first < n; first += QUERIES) {
      const int64_t rows = smaller(QUERIES, n - first), from = first * s.q.width;
      const bool separable = score_gradients(first, rows, j0, m);
      if (p.need_value)
        for (int64_t j = 0; j < m; j += ROWS)
          accumulate_transposed(smaller(ROWS, m - j), rows, e, s.z + j, KEYS, s.gout + first * e,
                                s.gv + j * e);
      if (!p.need_scores) continue;
      const ScoreGradients to{s.gq + from, s.gk, s.gw};
      if (separable)
        gradient_tile<true>(rows, p.D, s.q.exp + from, s.q.width, s.vectors.w, s.k.exp, s.k.count, s.dz, to);
      else
        gradient_tile<false>(rows, p.D, s.q.sum + from, s.q.width, s.vectors.w, s.k.sum, s.k.count, s.dz, to);
    }
    if (p.need_scores) {
      double* gw = partials.gw + item * p.D;
      for (int64_t d = 0; d < p.D; ++d) gw[d] += double(hsum(load(s.gw + d * VL)));
      for (int64_t j = 0; j < m; ++j) store_key_gradient(j0 + j, s.gk + j / PANEL * p.D * PANEL + j % PANEL);
    }
    if (p.need_value)
      for (int64_t j = 0; j < m; ++j) {
        if (partials.gv)
          store_row(s.gv + j * e, p.E, partials.gv + (item * p.S + j0 + j) * p.E);
        else
          store_row(s.gv + j * e, p.E, static_cast<T*>(t.gv) + (b * p.S + j0 + j) * p.E);
      }
  }
  // column: of a panel of gk
  void store_key_gradient(int64_t j, const float* column) {
    for (int64_t d = 0; d < p.D; ++d) s.row[d] = column[d * PANEL] * s.vectors.w[d];
    if (partials.gk)
      store_row(s.row, p.D, partials.gk + (item * p.S + j) * p.D);
    else
      store_row(s.row, p.D, static_cast<T*>(t.gk) + (b * p.S + j) * p.D);
  }

  void finish() {
    const int64_t padding = p.S - length, key = b * p.S + length;
    if (p.need_value) {
      if (partials.gv)
        zero_row(padding * p.E, partials.gv + (item * p.S + length) * p.E);
      else
        zero_row(padding * p.E, static_cast<T*>(t.gv) + key * p.E);
    }
    if (!p.need_scores) return;
    if (partials.gk)
      zero_row(padding * p.D, partials.gk + (item * p.S + length) * p.D);
    else
      zero_row(padding * p.D, static_cast<T*>(t.gk) + key * p.D);
    double* gbias = partials.gbias + item * p.D;
    for (int64_t d = 0; d < p.D; ++d) gbias[d] = 0;
    for (int64_t i = 0; i < n; ++i) {
      const float* gq = s.gq + i * s.q.width;
      store_row(gq, p.D, static_cast<T*>(t.gq) + (b * p.L + i0 + i) * p.D);
      for (int64_t d = 0; d < p.D; ++d) gbias[d] += double(gq[d]);
    }
  }

  void run() {
    begin();
    for (int64_t j0 = 0; j0 < length; j0 += KEYS) key_tile(j0);
    finish();
  }
};

// to[n] = sum over parts of from[part][...], the parts `stride` apart.
template <class T>
void sum_parts(const float* from, int64_t parts, int64_t stride, int64_t n, T* to) {
  for (int64_t x = 0; x < n; x += VL) {
    vf sum = {};
    for (int64_t part = 0; part < parts; ++part)
      sum += load_between(from + part * stride + x, 0, n - x, vf{});
    store_lanes_n(to + x, sum, n - x);
  }
}
template <class T>
void sum_items(const double* from, int64_t items, int64_t n, T* to) {
  for (int64_t d = 0; d < n; ++d) {
    double sum = 0;
    for (int64_t item = 0; item < items; ++item) sum += from[item * n + d];
    round_to(to[d], sum);
  }
}

// Item 0 adds gw and gbias of all; with more than one part, item 1 + k adds gk and gv of key k.
template <class T>
void reduce(const AdditiveProblem& p, const AdditiveTensors& t, const Parts& parts, const Partials& partials,
            int64_t item) {
  if (item == 0) {
    if (!p.need_scores) return;
    sum_items(partials.gw, p.B * parts.count, p.D, static_cast<T*>(t.gw));
    sum_items(partials.gbias, p.B * parts.count, p.D, static_cast<T*>(t.gbias));
    return;
  }
  const int64_t key = item - 1, line = key / p.S * parts.count * p.S + key % p.S;
  if (p.need_scores)
    sum_parts(partials.gk + line * p.D, parts.count, p.S * p.D, p.D, static_cast<T*>(t.gk) + key * p.D);
  if (p.need_value)
    sum_parts(partials.gv + line * p.E, parts.count, p.S * p.E, p.E, static_cast<T*>(t.gv) + key * p.E);
}

// ---- the kernels ----

Refusal refuses(const AdditiveProblem& p) {
  return p.dtype == DType::f64 ? "float64 is left to the reference" : accepted;
}

WorkPlan plan(const AdditiveProblem& p) {
  constexpr int64_t worth_a_thread = 400000;  // tangents: about 50 microseconds
  WorkPlan plan;
  plan.add_phase(p.B * ((p.L + QUERIES - 1) / QUERIES),
                 worth_a_thread / (smaller(p.L, QUERIES) * p.S * p.D + 1) + 1);
  Carver carve(nullptr);
  Scratch(carve, p);
  plan.thread_bytes = carve.used();
  return plan;
}
template <class Step>
PYSEQNET_INLINE void run_blocks(const AdditiveProblem& p, const AdditiveTensors& t, const WorkSlice& slice,
                                Step&& step) {
  FlushDenormals guard;
  Carver carve(slice.scratch);
  Scratch s(carve, p);
  with_element(p.dtype, [&](auto tag) {
    s.vectors.fill<decltype(tag)>(p, t);
    for (int64_t item = slice.begin; item < slice.end; ++item) step(tag, item, s);
  });
}
void run_forward(const AdditiveProblem& p, const AdditiveTensors& t, const WorkSlice& slice) {
  run_blocks(p, t, slice,
             [&](auto tag, int64_t item, Scratch& s) { forward_block<decltype(tag)>(p, t, item, s); });
}
void run_weights(const AdditiveProblem& p, const AdditiveTensors& t, const WorkSlice& slice) {
  run_blocks(p, t, slice,
             [&](auto tag, int64_t item, Scratch& s) { weights_block<decltype(tag)>(p, t, item, s); });
}

WorkPlan plan_backward(const AdditiveProblem& p) {
  const Parts parts(p);
  WorkPlan plan;
  plan.add_phase(p.B * parts.count);
  plan.add_phase(parts.count > 1 ? 1 + p.B * p.S : 1, 20000 / (parts.count * (p.D + p.E)) + 1);
  Carver shared(nullptr), scratch(nullptr);
  Partials(shared, p, parts);
  BackwardScratch(scratch, p, parts);
  plan.shared_bytes = shared.used(), plan.thread_bytes = scratch.used();
  return plan;
}
void run_backward(const AdditiveProblem& p, const AdditiveTensors& t, const WorkSlice& slice) {
  FlushDenormals guard;
  const Parts parts(p);
  Carver shared(slice.shared), carve(slice.scratch);
  const Partials partials(shared, p, parts);
  BackwardScratch s(carve, p, parts);
  with_element(p.dtype, [&](auto tag) {
    using T = decltype(tag);
    s.vectors.fill<T>(p, t);
    for (int64_t item = slice.begin; item < slice.end; ++item) {
      if (slice.phase == 0)
        BackwardItem<T>(p, t, parts, partials, s, item).run();
      else
        reduce<T>(p, t, parts, partials, item);
    }
  });
}

}  // namespace

extern const AdditiveCpuKernel additive_tile_forward, additive_tile_weights, additive_tile_backward;
const AdditiveCpuKernel additive_tile_forward = {"tile_" PYSEQNET_ISA_NAME, this_isa, refuses, plan,
                                                 run_forward};
const AdditiveCpuKernel additive_tile_weights = {"tile_" PYSEQNET_ISA_NAME, this_isa, refuses, plan,
                                                 run_weights};
const AdditiveCpuKernel additive_tile_backward = {"tile_" PYSEQNET_ISA_NAME, this_isa, refuses, plan_backward,
                                                  run_backward};

}  // namespace PYSEQNET_ISA
}  // namespace pyseqnet
