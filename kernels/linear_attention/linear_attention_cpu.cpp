// Linear attention on the CPU, forward and backward, in chunks of 64 rows.
//
// Causal: within a chunk the product is a lower triangular matrix A = tril(a f^T), between chunks the running
// state S (and z). Forward is one sweep that leaves the state of every chunk's start; with them backward is
// one reverse sweep that carries R, the sum of a dn^T over later queries. Products of a chunk (64 x 64 x head
// size): 4 forward, 9 backward, of which the triangular ones cost little more than half.
// Not causal: S is the sum over all keys, then each query reads it: 2 products forward, 4 backward.
//
// Work items are heads. Where heads are few, a head's rows are cut into segments: their sums first, then the
// state at each segment's start, then the segments side by side (causal: one product more, 5 instead of 4 and
// 10 instead of 9). How many segments depends on the problem alone, so results are the same for any number of
// threads.
//
// Bound: the products run from the first two cache levels at the machine's multiply-add peak; loading,
// feature maps, transposes and stores take a fifth on top at D = 64.
//
// A single position (decoding) is not a chunk: the state is read, updated, used and written in one pass,
// bound by memory.
#include "linear_attention/linear_attention_tiles.h"

namespace pyseqnet {
inline namespace PYSEQNET_ISA {
namespace {

using Problem = LinearAttentionProblem;
using Tensors = LinearAttentionTensors;

// ---------------------------------------------------------------- how a head is cut

struct Segments {
  int64_t count, rows;
};
Segments segments_of(const Problem& p, int64_t rows) {
  // Heads of which there are fewer do not keep eight threads busy; a causal head pays a fifth for being cut.
  constexpr int64_t enough_heads = 8, fewest_chunks = 8;
  const int64_t chunks = ceil_div(rows, chunk), heads = larger(1, p.heads());
  const int64_t count =
      heads >= enough_heads ? 1 : larger(1, smaller(ceil_div(enough_heads, heads), chunks / fewest_chunks));
  const int64_t chunks_each = larger(1, ceil_div(chunks, count));
  return {larger(1, ceil_div(chunks, chunks_each)), chunks_each * chunk};
}
struct Cut {
  Segments queries, keys;
  explicit Cut(const Problem& p) : queries(segments_of(p, p.L)), keys(segments_of(p, p.S)) {}
  // Whether one item does a whole head, from its rows to its results.
  bool whole() const { return queries.count == 1 && keys.count == 1; }
};

enum Step { sums = 0, combine = 1, results = 2 };

// ---------------------------------------------------------------- scratch

// Decoding: one query, one key at most, and nothing kept for backward.
bool is_single_position(const Problem& p) { return p.L == 1 && p.S == 1 && !p.with_saved; }

struct Scratch {
  float *a, *f, *v, *wide, *weights;
  float *dn = nullptr, *A = nullptr, *dA = nullptr, *turned = nullptr, *state = nullptr;
  // Backward needs all of it. A single position needs five rows: the rest would cost it a page fault each 4
  // KB.
  Scratch(const Problem& p, Carver& carver, bool backward) {
    const int64_t D = padded(p.D), E = padded(p.E);
    const bool single = is_single_position(p) && !backward;
    const int64_t rows = single ? 1 : chunk;
    a = carver.take<float>(rows * D);
    f = carver.take<float>(rows * D);
    v = carver.take<float>(rows * E);
    wide = carver.take<float>(rows * larger(D, E));
    weights = carver.take<float>(rows);
    if (single) return;
    state = carver.take<float>(tile_state_size(p));
    A = carver.take<float>(chunk * chunk);
    turned = carver.take<float>(larger(p.D, p.E) * larger(chunk, D));
    if (!backward) return;
    dn = carver.take<float>(chunk * E);
    dA = carver.take<float>(chunk * chunk);
  }
};
int64_t scratch_bytes(const Problem& p, bool backward) {
  Carver carver(nullptr);
  Scratch(p, carver, backward);
  return carver.used();
}

// One head of one call, with the scratch of the thread that works on it.
struct Head {
  const Problem& p;
  const Tensors& t;
  const Scratch& m;
  int64_t b, h, keys;
  int64_t D, E;  // padded

  Head(const Problem& p_, const Tensors& t_, const Scratch& m_, int64_t index)
      : p(p_),
        t(t_),
        m(m_),
        b(index / p_.H),
        h(index % p_.H),
        keys(t_.keys(p_, b)),
        D(padded(p_.D)),
        E(padded(p_.E)) {}

  int64_t index() const { return b * p.H + h; }
  int64_t offset(const HeadStrides& s, int64_t row) const { return b * s.b + h * s.h + row * s.row; }
  int64_t valid_keys(int64_t row, int64_t n) const { return larger(0, smaller(n, keys - row)); }
  float* saved(int64_t which) const {
    return static_cast<float*>(t.saved) + (index() * p.saved_states() + which) * p.state_size();
  }
  const float* matrix(const void* state) const {
    return state ? static_cast<const float*>(state) + index() * p.D * p.E : nullptr;
  }
  const float* vector(const void* normalizer) const {
    return normalizer ? static_cast<const float*>(normalizer) + index() * p.D : nullptr;
  }
  void write(const float* s, void* state, void* normalizer) const {
    write_state(p, s, const_cast<float*>(matrix(state)), const_cast<float*>(vector(normalizer)));
  }

  void load_queries(int64_t row, int64_t n) const {
    load_tile(p.dtype, t.q, offset(p.q, row), p.q.row, n, p.D, m.a);
    apply_features(p.feature_map, float(p.scale), n, p.D, m.a);
  }
  void load_keys(int64_t row, int64_t n) const {
    load_tile(p.dtype, t.k, offset(p.k, row), p.k.row, n, p.D, m.f);
    apply_features(p.feature_map, 1.0f, n, p.D, m.f);
    load_tile(p.dtype, t.v, offset(p.v, row), p.v.row, n, p.E, m.v);
  }
  // s += f v^T, z += f: the keys that load_keys has loaded.
  void add_keys(int64_t n, float* s) const {
    columns_product(p.D, E, n, m.f, D, m.v, E, s, E, true, false);
    add_rows(n, D, nullptr, m.f, normalizer_of(p, s));
  }
  // s += a dn^T, z += a dd: queries and their output gradients.
  void add_queries(int64_t n, float* s) const {
    columns_product(p.D, E, n, m.a, D, m.dn, E, s, E, true, false);
    if (p.normalize) add_rows(n, D, m.weights, m.a, normalizer_of(p, s));
  }

  // ---------------------------------------------------------------- forward

  void sum_keys(int64_t row, int64_t end, float* s) const {
    for (; row < smaller(end, keys); row += chunk) {
      const int64_t n = valid_keys(row, smaller(chunk, end - row));
      load_keys(row, n);
      add_keys(n, s);
    }
  }
  // Scales and stores the n rows of numerators in m.wide, whose denominators less eps are in m.weights.
  void store_outputs(int64_t row, int64_t n) const {
    if (p.normalize) {
      float* inverse = t.inverse ? static_cast<float*>(t.inverse) + index() * p.L + row : nullptr;
      for (int64_t i = 0; i < n; i++) {
        const float sum = m.weights[i] + float(p.eps), scale = sum == 0 ? 0.0f : 1.0f / sum;
        if (inverse) inverse[i] = scale;
        float* out = m.wide + i * E;
        for (int64_t x = 0; x < E; x += VL) store(out + x, sum == 0 ? vf{} : load(out + x) * scale);
      }
    }
    store_tile(p.dtype, t.out, offset(p.out, row), p.out.row, n, p.E, m.wide);
  }
  // One chunk of causal outputs; s is the state at its start and becomes that at its end.
  void causal_chunk(int64_t row, int64_t n, float* s) const {
    const int64_t nk = valid_keys(row, n);
    const float* z = normalizer_of(p, s);
    if (t.saved) write_state(p, s, saved(row / chunk), saved(row / chunk) + p.D * p.E);
    load_queries(row, n);
    load_keys(row, nk);
    transpose_tile(nk, p.D, m.f, D, m.turned, chunk);
    lower_product(n, p.D, m.a, D, m.turned, nullptr, m.A);
    if (p.normalize)
      for (int64_t i = 0; i < n; i++) {
        vf sum = {};
        for (int64_t x = 0; x < chunk; x += VL) sum += load(m.A + i * chunk + x);
        for (int64_t x = 0; x < D; x += VL) sum += load(m.a + i * D + x) * load(z + x);
        m.weights[i] = hsum(sum);
      }
    rows_product(n, E, nk, m.A, chunk, m.v, E, m.wide, E, false, true);
    rows_product(n, E, p.D, m.a, D, s, E, m.wide, E, true, false);
    store_outputs(row, n);
    add_keys(nk, s);
  }
  void causal_sweep(int64_t row, int64_t end, float* s) const {
    for (; row < end; row += chunk) causal_chunk(row, smaller(chunk, end - row), s);
  }
  void read_outputs(int64_t row, int64_t end, float* s) const {
    const float* z = normalizer_of(p, s);
    for (; row < end; row += chunk) {
      const int64_t n = smaller(chunk, end - row);
      load_queries(row, n);
      if (p.normalize)
        for (int64_t i = 0; i < n; i++) m.weights[i] = dot(D, m.a + i * D, z);
      rows_product(n, E, p.D, m.a, D, s, E, m.wide, E, false, false);
      store_outputs(row, n);
    }
  }
  // One query, at most one key: every element of the state is touched once.
  void single_position() const {
    const int64_t nk = smaller(1, keys);
    const float *s0 = matrix(t.state0), *z0 = vector(t.normalizer0);
    float *s1 = const_cast<float*>(matrix(t.state)), *z1 = const_cast<float*>(vector(t.normalizer));
    load_queries(0, 1);
    if (nk)
      load_keys(0, 1);
    else
      clear(m.f, D), clear(m.v, E);
    vf sum = {};
    for (int64_t x = 0; x < p.D; x += VL) {
      const int left = int(smaller(VL, p.D - x));
      vf z = load(m.f + x);
      if (z0) z += load_n(z0 + x, left);
      if (z1) store_n(z1 + x, z, left);
      sum += load(m.a + x) * z;
    }
    m.weights[0] = hsum(sum);
    if (s0 && s1)
      single_position_state<true, true>(s0, s1);
    else if (s0)
      single_position_state<true, false>(s0, s1);
    else if (s1)
      single_position_state<false, true>(s0, s1);
    else
      single_position_state<false, false>(s0, s1);
    store_outputs(0, 1);
  }
  template <bool reads, bool writes>
  void single_position_state(const float* s0, float* s1) const {
    constexpr int64_t panel = 4 * VL;
    int64_t e = 0;
    for (; e + panel <= p.E; e += panel) single_position_panel<4, reads, writes>(s0, s1, e, VL);
    for (; e < p.E; e += VL) single_position_panel<1, reads, writes>(s0, s1, e, int(smaller(VL, p.E - e)));
  }
  template <int NV, bool reads, bool writes>
  PYSEQNET_INLINE void single_position_panel(const float* s0, float* s1, int64_t e, int left) const {
    const int64_t rows = p.D, width = p.E;
    const float *f = m.f, *a = m.a;
    if (reads) s0 += e;
    if (writes) s1 += e;
    vf v[NV], out[NV] = {};
#pragma GCC unroll 4
    for (int x = 0; x < NV; x++) v[x] = load(m.v + e + x * VL);
    for (int64_t d = 0; d < rows; d++, s0 += reads ? width : 0, s1 += writes ? width : 0) {
      const vf fd = set1(f[d]), ad = set1(a[d]);
#pragma GCC unroll 4
      for (int x = 0; x < NV; x++) {
        vf s = v[x] * fd;
        if (reads) s += NV > 1 ? load(s0 + x * VL) : load_n(s0, left);
        if (writes) NV > 1 ? store(s1 + x * VL, s) : store_n(s1, s, left);
        out[x] += s * ad;
      }
    }
#pragma GCC unroll 4
    for (int x = 0; x < NV; x++) store(m.wide + e + x * VL, out[x]);
  }

  // ---------------------------------------------------------------- backward

  // m.a, m.dn and m.weights (dd): n queries and what their outputs' gradients say. A row whose gradient is
  // all zero becomes a row of zeros, so that what it holds, NaN too, reaches nothing.
  void load_output_gradients(int64_t row, int64_t n) const {
    load_queries(row, n);
    load_tile(p.dtype, t.gout, offset(p.gout, row), p.gout.row, n, p.E, m.dn);
    const float* inverse = p.normalize ? static_cast<const float*>(t.inverse) + index() * p.L + row : nullptr;
    if (p.normalize) load_tile(p.dtype, t.out, offset(p.out, row), p.out.row, n, p.E, m.wide);
    for (int64_t i = 0; i < n; i++) {
      float* dn = m.dn + i * E;
      vi any = {};
      for (int64_t x = 0; x < E; x += VL) any |= (vi)load(dn + x) & 0x7fffffff;
      const float factor = p.normalize ? inverse[i] : 1.0f;
      m.weights[i] = 0;
      if (!some(any) || factor == 0) {
        clear(dn, E);
        clear(m.a + i * D, D);
      } else if (p.normalize) {
        m.weights[i] = -factor * dot(E, dn, m.wide + i * E);
        for (int64_t x = 0; x < E; x += VL) store(dn + x, load(dn + x) * factor);
      }
    }
  }
  static PYSEQNET_INLINE bool some(vi bits) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)bits, (__m512i)bits) != 0;
#else
    int32_t all = 0;
    for (int l = 0; l < VL; l++) all |= bits[l];
    return all != 0;
#endif
  }
  void store_query_gradients(int64_t row, int64_t n, const float* z) const {
    finish_gradient(p.feature_map, float(p.scale), n, D, m.weights, z, m.a, m.wide);
    store_tile(p.dtype, t.dq, offset(p.dq, row), p.dq.row, n, p.D, m.wide);
  }
  void store_key_gradients(int64_t row, int64_t n, const float* r) const {
    finish_gradient(p.feature_map, 1.0f, n, D, nullptr, r, m.f, m.wide);
    store_tile(p.dtype, t.dk, offset(p.dk, row), p.dk.row, n, p.D, m.wide);
  }
  void store_value_gradients(int64_t row, int64_t n) const {
    store_tile(p.dtype, t.dv, offset(p.dv, row), p.dv.row, n, p.E, m.wide);
  }
  // Keys beyond the length.
  void clear_key_gradients(int64_t row, int64_t n) const {
    clear_rows(p.dtype, t.dk, offset(p.dk, row), p.dk.row, n, p.D);
    clear_rows(p.dtype, t.dv, offset(p.dv, row), p.dv.row, n, p.E);
  }

  void sum_queries(int64_t row, int64_t end, float* r) const {
    for (; row < end; row += chunk) {
      const int64_t n = smaller(chunk, end - row);
      load_output_gradients(row, n);
      add_queries(n, r);
    }
  }
  // One chunk of causal gradients; r sums the queries behind it and becomes the sum with its own.
  void causal_chunk_gradient(int64_t row, int64_t n, float* r) const {
    const int64_t nk = valid_keys(row, n);
    const float *s = saved(row / chunk), *z = s + p.D * p.E;
    load_output_gradients(row, n);
    load_keys(row, nk);
    transpose_tile(nk, p.D, m.f, D, m.turned, chunk);
    lower_product(n, p.D, m.a, D, m.turned, nullptr, m.A);
    transpose_tile(nk, p.E, m.v, E, m.turned, chunk);
    lower_product(n, p.E, m.dn, E, m.turned, p.normalize ? m.weights : nullptr, m.dA);

    transpose_tile(p.D, p.E, s, p.E, m.turned, D);
    rows_product(n, D, nk, m.dA, chunk, m.f, D, m.wide, D, false, true);
    rows_product(n, D, p.E, m.dn, E, m.turned, D, m.wide, D, true, false);
    float* z_row = m.turned;  // free again, and padded as the rows are
    load_tile(DType::f32, z, 0, p.D, 1, p.D, z_row);
    store_query_gradients(row, n, z_row);

    transpose_tile(p.D, p.E, r, E, m.turned, D);
    columns_product(nk, D, n, m.dA, chunk, m.a, D, m.wide, D, false, true);
    rows_product(nk, D, p.E, m.v, E, m.turned, D, m.wide, D, true, false);
    store_key_gradients(row, nk, normalizer_of(p, r));

    columns_product(nk, E, n, m.A, chunk, m.dn, E, m.wide, E, false, true);
    rows_product(nk, E, p.D, m.f, D, r, E, m.wide, E, true, false);
    store_value_gradients(row, nk);
    clear_key_gradients(row + nk, n - nk);
    add_queries(n, r);
  }
  void causal_gradient_sweep(int64_t begin, int64_t end, float* r) const {
    for (int64_t row = (end - 1) / chunk * chunk; row >= begin && end > begin; row -= chunk)
      causal_chunk_gradient(row, smaller(chunk, end - row), r);
  }
  // dq, and the queries' share of r.
  void query_gradients(int64_t row, int64_t end, float* r) const {
    const float *s = saved(0), *z = s + p.D * p.E;
    transpose_tile(p.D, p.E, s, p.E, m.turned, D);
    load_tile(DType::f32, z, 0, p.D, 1, p.D, m.f);
    for (; row < end; row += chunk) {
      const int64_t n = smaller(chunk, end - row);
      load_output_gradients(row, n);
      add_queries(n, r);
      rows_product(n, D, p.E, m.dn, E, m.turned, D, m.wide, D, false, false);
      store_query_gradients(row, n, m.f);
    }
  }
  void key_gradients(int64_t row, int64_t end, float* r) const {
    transpose_tile(p.D, p.E, r, E, m.turned, D);
    for (; row < end; row += chunk) {
      const int64_t n = smaller(chunk, end - row), nk = valid_keys(row, n);
      load_keys(row, nk);
      rows_product(nk, D, p.E, m.v, E, m.turned, D, m.wide, D, false, false);
      store_key_gradients(row, nk, normalizer_of(p, r));
      rows_product(nk, E, p.D, m.f, D, r, E, m.wide, E, false, false);
      store_value_gradients(row, nk);
      clear_key_gradients(row + nk, n - nk);
    }
  }
};

// ---------------------------------------------------------------- plans

Refusal refuses(const Problem& p) {
  if (p.dtype == DType::f64) return "float64 is served by the reference";
  return accepted;
}

WorkPlan plan_pass(const Problem& p, const Segments& first, const Segments& last, int64_t products,
                   bool backward) {
  // About 20 microseconds at the speed of these kernels.
  constexpr int64_t grain_products = 1000 * 1000;
  const Cut cut(p);
  const int64_t rows = larger(larger(p.L, p.S), 1), width = p.D * p.E + 64 * (p.D + p.E);
  const auto grain = [&](int64_t work) { return larger(1, grain_products / larger(1, work)); };
  WorkPlan plan;
  plan.add_phase(cut.whole() ? 0 : p.heads() * first.count, grain(smaller(first.rows, rows) * width));
  plan.add_phase(cut.whole() ? 0 : p.heads(), grain(first.count * width));
  plan.add_phase(p.heads() * last.count, grain(smaller(last.rows, rows) * width * products));
  plan.thread_bytes = scratch_bytes(p, backward);
  if (!cut.whole()) plan.shared_bytes = align_up(p.heads() * first.count * tile_state_size(p) * 4);
  return plan;
}
// Which segments each step walks over: sums over `first`, results over `last`.
WorkPlan plan_forward(const Problem& p) {
  const Cut cut(p);
  return plan_pass(p, cut.keys, cut.queries, p.causal ? 4 : 2, false);
}
WorkPlan plan_backward(const Problem& p) {
  const Cut cut(p);
  return plan_pass(p, cut.queries, cut.keys, p.causal ? 9 : 4, true);
}

// partial[0 .. count): causal, the sum before each in the order of the sweep, from `start`; else all of them
// in partial[0].
void combine_partials(const Problem& p, int64_t count, bool reverse, float* partial, float* start) {
  const int64_t size = tile_state_size(p);
  for (int64_t g = 0; g < count; g++) {
    float* one = partial + (reverse ? count - 1 - g : g) * size;
    if (!p.causal) {
      add_vectors(size, one, start);
      continue;
    }
    for (int64_t x = 0; x < size; x += VL) {
      const vf before = load(start + x);
      store(start + x, before + load(one + x));
      store(one + x, before);
    }
  }
  if (!p.causal) memcpy(partial, start, size_t(size) * sizeof(float));
}

void forward_item(const Problem& p, const Head& head, const Cut& cut, int step, int64_t g, float* partial) {
  const Tensors& t = head.t;
  float* s = head.m.state;
  const int64_t size = tile_state_size(p);
  if (step == sums) {
    clear(partial + g * size, size);
    return head.sum_keys(g * cut.keys.rows, smaller(p.S, (g + 1) * cut.keys.rows), partial + g * size);
  }
  const auto finish_state = [&](const float* state) {
    if (!p.causal && t.saved) write_state(p, state, head.saved(0), head.saved(0) + p.D * p.E);
    head.write(state, t.state, t.normalizer);
  };
  if (step == combine) {
    read_state(p, head.matrix(t.state0), head.vector(t.normalizer0), s);
    combine_partials(p, cut.keys.count, false, partial, s);
    if (!p.causal) finish_state(partial);
    return;
  }
  const int64_t begin = g * cut.queries.rows, end = smaller(p.L, begin + cut.queries.rows);
  if (cut.whole()) {
    if (is_single_position(p)) return head.single_position();
    read_state(p, head.matrix(t.state0), head.vector(t.normalizer0), s);
    if (!p.causal) head.sum_keys(0, p.S, s), finish_state(s);
  } else if (p.causal) {
    memcpy(s, partial + g * size, size_t(size) * sizeof(float));
  } else {
    s = partial;
  }
  p.causal ? head.causal_sweep(begin, end, s) : head.read_outputs(begin, end, s);
  if (p.causal && g == cut.queries.count - 1) finish_state(s);
}

void backward_item(const Problem& p, const Head& head, const Cut& cut, int step, int64_t g, float* partial) {
  const Tensors& t = head.t;
  float* r = head.m.state;
  const int64_t size = tile_state_size(p);
  if (step == sums) {
    const int64_t begin = g * cut.queries.rows, end = smaller(p.L, begin + cut.queries.rows);
    clear(partial + g * size, size);
    return p.causal ? head.sum_queries(begin, end, partial + g * size)
                    : head.query_gradients(begin, end, partial + g * size);
  }
  if (step == combine) {
    read_state(p, head.matrix(t.gstate), head.vector(t.gnormalizer), r);
    combine_partials(p, cut.queries.count, true, partial, r);
    if (!p.causal) head.write(partial, t.dstate0, t.dnormalizer0);
    return;
  }
  const int64_t begin = g * cut.keys.rows, end = smaller(p.S, begin + cut.keys.rows);
  if (cut.whole()) {
    read_state(p, head.matrix(t.gstate), head.vector(t.gnormalizer), r);
    if (!p.causal) head.query_gradients(0, p.L, r), head.write(r, t.dstate0, t.dnormalizer0);
  } else if (p.causal) {
    memcpy(r, partial + g * size, size_t(size) * sizeof(float));
  } else {
    r = partial;
  }
  p.causal ? head.causal_gradient_sweep(begin, end, r) : head.key_gradients(begin, end, r);
  if (p.causal && g == 0) head.write(r, t.dstate0, t.dnormalizer0);
}

template <class Item>
PYSEQNET_INLINE void run_items(const Problem& p, const Tensors& t, const WorkSlice& slice, int64_t first,
                               int64_t last, bool backward, Item&& item) {
  const Cut cut(p);
  Carver carver(slice.scratch);
  const Scratch scratch(p, carver, backward);
  const int64_t per_head = slice.phase == sums ? first : slice.phase == combine ? 1 : last;
  float* partials = reinterpret_cast<float*>(slice.shared);
  for (int64_t k = slice.begin; k < slice.end; k++) {
    const int64_t index = k / per_head;
    const Head head(p, t, scratch, index);
    item(p, head, cut, slice.phase, k % per_head,
         cut.whole() ? nullptr : partials + index * first * tile_state_size(p));
  }
}
void run_forward(const Problem& p, const Tensors& t, const WorkSlice& slice) {
  const Cut cut(p);
  run_items(p, t, slice, cut.keys.count, cut.queries.count, false, forward_item);
}
void run_backward(const Problem& p, const Tensors& t, const WorkSlice& slice) {
  const Cut cut(p);
  run_items(p, t, slice, cut.queries.count, cut.keys.count, true, backward_item);
}

}  // namespace

extern const LinearAttentionCpuKernel linear_attention_forward, linear_attention_backward;
const LinearAttentionCpuKernel linear_attention_forward = {PYSEQNET_ISA_NAME, this_isa, refuses, plan_forward,
                                                           run_forward};
const LinearAttentionCpuKernel linear_attention_backward = {PYSEQNET_ISA_NAME, this_isa, refuses,
                                                            plan_backward, run_backward};

}  // namespace PYSEQNET_ISA
}  // namespace pyseqnet
