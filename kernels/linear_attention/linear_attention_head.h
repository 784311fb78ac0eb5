// One head of a linear-attention call on the CPU: what is done to a chunk of its rows, forward and backward,
// and to a single position. How heads are cut and who runs what is linear_attention_cpu.cpp's.
#pragma once
#include "linear_attention/linear_attention_tiles.h"

namespace pyseqnet {
inline namespace PYSEQNET_ISA {
namespace {

using Problem = LinearAttentionProblem;
using Tensors = LinearAttentionTensors;

// One head of one call, with the scratch of the thread that works on it.
struct Head {
  const Problem& p;
  const Tensors& t;
  const Scratch& m;
  int64_t b, h;
  LinearAttentionRows rows;
  int64_t D, E;           // padded
  int64_t ahead = chunk;  // where the next chunk's rows are: behind in a reverse sweep

  Head(const Problem& p_, const Tensors& t_, const Scratch& m_, int64_t index)
      : p(p_),
        t(t_),
        m(m_),
        b(index / p_.H),
        h(index % p_.H),
        rows(t_.rows(p_, b, h)),
        D(padded(p_.D)),
        E(padded(p_.E)) {
    if (p.decayed) write_powers(t.decay[h], m.powers);
  }

  int64_t index() const { return b * p.H + h; }
  int64_t offset(const HeadStrides& s, int64_t row) const {
    return b * s.b + h * s.h + (rows.begin + row) * s.row;
  }
  int64_t valid_keys(int64_t row, int64_t n) const { return larger(0, smaller(n, rows.keys - row)); }
  float* saved(int64_t which) const {
    return static_cast<float*>(t.saved) + (rows.saved + which) * p.state_size();
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
    load_tile(p.dtype, t.q, offset(p.q, row), p.q.row, n, p.D, m.a, ahead);
    if (p.softmax()) return exponentials_of_rows(float(p.scale), n, p.D, m.a);
    apply_features(p.feature_map, float(p.scale), n, p.D, m.a);
  }
  // log_sums: of the map softmax, padded.
  void load_keys(int64_t row, int64_t n, const float* log_sums = nullptr) const {
    load_tile(p.dtype, t.k, offset(p.k, row), p.k.row, n, p.D, m.f, ahead);
    if (log_sums) shift_rows(n, D, log_sums, m.f);
    apply_features(p.feature_map, 1.0f, n, p.D, m.f);
    load_tile(p.dtype, t.v, offset(p.v, row), p.v.row, n, p.E, m.v, ahead);
  }
  // g^n, for n up to a chunk.
  float power(int64_t n) const { return m.powers[n]; }
  // g^(n-1) .. g^0, then zeros: what n keys weigh at their end.
  const float* powers_down(int64_t n) const { return m.powers + 3 * chunk - n; }
  // The same of n g^(n-1), the powers' derivatives by g.
  float power_gradient(int64_t n) const { return m.powers[powers_size + n]; }
  const float* power_gradients_down(int64_t n) const { return powers_down(n) + powers_size; }
  // How often the state has faded when query i of a chunk with nk keys reads it.
  static int64_t fades(int64_t i, int64_t nk) { return smaller(i + 1, nk); }
  // A chunk's lower triangular matrix: key j weighs g^(fades - 1 - j) with query i.
  void fade_scores(int64_t n, int64_t nk, float* A) const {
    for (int64_t i = 0; i < n; i++) {
      const float* down = powers_down(fades(i, nk));
      float* row = A + i * chunk;
      for (int64_t x = 0; x <= i; x += VL) store(row + x, load(row + x) * load(down + x));
    }
  }
  // Row i of a query's tile, times what the chunk's first state still weighs there.
  void fade_queries(int64_t n, int64_t nk, int64_t width, float* tile) const {
    for (int64_t i = 0; i < n; i++) scale_vectors(width, power(fades(i, nk)), tile + i * width);
  }
  void fade_keys(int64_t nk, int64_t width, float* tile) const {
    for (int64_t j = 0; j < nk; j++) scale_vectors(width, power(nk - 1 - j), tile + j * width);
  }
  void fade_state(int64_t nk, float* s) const {
    if (nk > 0) scale_vectors(tile_state_size(p), power(nk), s);
  }
  // s fades over n keys; s += f v^T, z += f: the keys that load_keys has loaded. With decay f is spent.
  void add_keys(int64_t n, float* s) const {
    if (p.decayed) fade_state(n, s), fade_keys(n, D, m.f);
    columns_product(p.D, E, n, m.f, D, m.v, E, s, E, true, false);
    if (!p.softmax()) add_rows(n, D, nullptr, m.f, normalizer_of(p, s));
  }
  // s += a dn^T, z += a dd: queries and their output gradients.
  void add_queries(int64_t n, float* s) const {
    columns_product(p.D, E, n, m.a, D, m.dn, E, s, E, true, false);
    if (p.normalize) add_rows(n, D, m.weights, m.a, normalizer_of(p, s));
  }

  // ---------------------------------------------------------------- forward

  // to[d] = log of the sum of exp k[j][d] over keys of a segment; -inf where there are none.
  void log_sums_of_keys(int64_t begin, int64_t end, float* to) const {
    float *most = m.a, *sums = m.wide;  // free here
    for (int64_t x = 0; x < D; x += VL) store(most + x, set1(-HUGE_VALF)), store(sums + x, vf{});
    const auto each_key = [&](auto&& f) PYSEQNET_LAMBDA {
      for (int64_t row = begin; row < smaller(end, rows.keys); row += chunk) {
        const int64_t n = valid_keys(row, smaller(chunk, end - row));
        load_tile(p.dtype, t.k, offset(p.k, row), p.k.row, n, p.D, m.f, ahead);
        for (int64_t x = 0; x < D; x += VL)
          for (int64_t j = 0; j < n; j++) f(x, load(m.f + j * D + x));
      }
    };
    each_key([&](int64_t x, vf k) PYSEQNET_LAMBDA { store(most + x, vmax(load(most + x), k)); });
    each_key([&](int64_t x, vf k) PYSEQNET_LAMBDA {
      const vf y = k - load(most + x);
      store(sums + x, load(sums + x) + (y != y ? y : expv(y)));
    });
    for (int64_t d = 0; d < D; d++) to[d] = d < p.D ? most[d] + std::log(sums[d]) : 0.0f;
  }
  void sum_keys(int64_t row, int64_t end, float* s) const {
    float* log_sums = p.softmax() ? normalizer_of(p, s) : nullptr;
    if (log_sums) log_sums_of_keys(row, end, log_sums);
    for (; row < smaller(end, rows.keys); row += chunk) {
      const int64_t n = valid_keys(row, smaller(chunk, end - row));
      load_keys(row, n, log_sums);
      add_keys(n, s);
    }
  }
  // Scales and stores the n rows of numerators in m.wide, whose denominators less eps are in m.weights.
  void store_outputs(int64_t row, int64_t n) const {
    if (p.normalize) {
      float* inverse = t.inverse ? static_cast<float*>(t.inverse) + rows.inverse + row : nullptr;
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
    if (p.decayed) fade_scores(n, nk, m.A), fade_queries(n, nk, D, m.a);
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
        for (int64_t i = 0; i < n; i++)
          m.weights[i] = p.softmax() ? sum_of(D, m.a + i * D) : dot(D, m.a + i * D, z);
      rows_product(n, E, p.D, m.a, D, s, E, m.wide, E, false, false);
      store_outputs(row, n);
    }
  }
  // One query, at most one key: every element of the state is touched once.
  void single_position() const {
    const int64_t nk = smaller(1, rows.keys);
    const vf faded = set1(p.decayed && nk ? power(1) : 1.0f);
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
      if (z0) z += load_n(z0 + x, left) * faded;
      if (z1) store_n(z1 + x, z, left);
      sum += load(m.a + x) * z;
    }
    m.weights[0] = hsum(sum);
    if (s0 && s1)
      single_position_state<true, true>(s0, s1, faded);
    else if (s0)
      single_position_state<true, false>(s0, s1, faded);
    else if (s1)
      single_position_state<false, true>(s0, s1, faded);
    else
      single_position_state<false, false>(s0, s1, faded);
    store_outputs(0, 1);
  }
  template <bool reads, bool writes>
  void single_position_state(const float* s0, float* s1, vf faded) const {
    constexpr int64_t panel = 4 * VL;
    int64_t e = 0;
    for (; e + panel <= p.E; e += panel) single_position_panel<4, reads, writes>(s0, s1, faded, e, VL);
    for (; e < p.E; e += VL)
      single_position_panel<1, reads, writes>(s0, s1, faded, e, int(smaller(VL, p.E - e)));
  }
  template <int NV, bool reads, bool writes>
  PYSEQNET_INLINE void single_position_panel(const float* s0, float* s1, vf faded, int64_t e,
                                             int left) const {
    const int64_t width = p.E;
    const float *f = m.f, *a = m.a;
    if (reads) s0 += e;
    if (writes) s1 += e;
    vf v[NV], out[NV] = {};
#pragma GCC unroll 4
    for (int x = 0; x < NV; x++) v[x] = load(m.v + e + x * VL);
    for (int64_t d = 0; d < p.D; d++, s0 += reads ? width : 0, s1 += writes ? width : 0) {
      const vf fd = set1(f[d]), ad = set1(a[d]);
#pragma GCC unroll 4
      for (int x = 0; x < NV; x++) {
        vf s = v[x] * fd;
        if (reads) s += (NV > 1 ? load(s0 + x * VL) : load_n(s0, left)) * faded;
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
    const float* inverse = p.normalize ? static_cast<const float*>(t.inverse) + rows.inverse + row : nullptr;
    for (int64_t i = 0; i < n; i++) {
      float* dn = m.dn + i * E;
      float sum = 0;
      const bool any = load_output_gradient(offset(p.gout, row + i), offset(p.out, row + i), dn, sum);
      const float factor = p.normalize ? inverse[i] : 1.0f;
      m.weights[i] = 0;
      if (!any || factor == 0) {
        clear(dn, E);
        clear(m.a + i * D, D);
      } else if (p.normalize) {
        m.weights[i] = -factor * sum;
        for (int64_t x = 0; x < E; x += VL) store(dn + x, load(dn + x) * factor);
      }
    }
  }
  // dn = gout, sum = gout . out; whether any of gout is not zero. `out` is read here and nowhere else, so it
  // is not made a tile.
  bool load_output_gradient(int64_t gout_at, int64_t out_at, float* dn, float& sum) const {
    vi any = {};
    vf products = {};
    with_elements(p.dtype, t.gout, [&](auto* base) PYSEQNET_LAMBDA {
      const auto *g = base + gout_at, *o = static_cast<decltype(base)>(t.out) + out_at;
      const int64_t whole = p.E / VL * VL, ahead_g = ahead * p.gout.row, ahead_o = ahead * p.out.row;
      const auto add = [&](int64_t x, vf gx, vf ox) PYSEQNET_LAMBDA {
        store(dn + x, gx);
        any |= (vi)gx & 0x7fffffff;
        products += gx * ox;
      };
      prefetch_row(g, ahead_g, p.E);
      if (p.normalize) prefetch_row(o, ahead_o, p.E);
      for (int64_t x = 0; x < whole; x += VL)
        add(x, load_lanes(g + x), p.normalize ? load_lanes(o + x) : vf{});
      const int64_t left = p.E - whole;
      if (left > 0)
        add(whole, load_between(g + whole, 0, left, vf{}),
            p.normalize ? load_between(o + whole, 0, left, vf{}) : vf{});
    });
    sum = hsum(products);
    return some(any);
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
  void store_key_gradients(int64_t row, int64_t n, const float* r, const float* weights = nullptr) const {
    finish_gradient(p.feature_map, 1.0f, n, D, weights, r, m.f, m.wide);
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

  // The last row first, as the state fades towards the first.
  void sum_queries(int64_t begin, int64_t end, float* r) const {
    for (int64_t row = (end - 1) / chunk * chunk; row >= begin && end > begin; row -= chunk) {
      const int64_t n = smaller(chunk, end - row), nk = valid_keys(row, n);
      load_output_gradients(row, n);
      if (p.decayed) fade_weights(n, nk), fade_gradients(n, nk, r);
      add_queries(n, r);
    }
  }
  // dd and dn as the state at the chunk's start sees them; r fades with them.
  void fade_weights(int64_t n, int64_t nk) const {
    for (int64_t i = 0; i < n; i++) m.weights[i] *= power(fades(i, nk));
  }
  void fade_gradients(int64_t n, int64_t nk, float* r) const {
    fade_queries(n, nk, E, m.dn);
    fade_state(nk, r);
  }
  // What the decay says inside a chunk: scores and their gradients, neither faded yet.
  double decay_gradient_of_pairs(int64_t n, int64_t nk) const {
    double sum = 0;
    for (int64_t i = 0; i < n; i++) {
      const float* down = power_gradients_down(fades(i, nk));
      vf part = {};
      for (int64_t x = 0; x <= i; x += VL)
        part += load(m.A + i * chunk + x) * load(m.dA + i * chunk + x) * load(down + x);
      sum += hsum(part);
    }
    return sum;
  }
  // Through the state at the chunk's start: m.wide = S dn of the queries, not faded, z_row padded.
  double decay_gradient_of_queries(int64_t n, int64_t nk, const float* z_row) const {
    double sum = 0;
    for (int64_t i = 0; i < n; i++) {
      vf part = {};
      for (int64_t x = 0; x < D; x += VL)
        part += load(m.a + i * D + x) * (load(m.wide + i * D + x) + load(z_row + x) * m.weights[i]);
      sum += hsum(part) * power_gradient(fades(i, nk));
    }
    return sum;
  }
  // Through the state at its end: m.wide = R v of the keys, not faded.
  double decay_gradient_of_keys(int64_t nk, const float* z_gradient) const {
    double sum = 0;
    for (int64_t j = 0; j < nk; j++) {
      vf part = {};
      for (int64_t x = 0; x < D; x += VL)
        part += load(m.f + j * D + x) * (load(m.wide + j * D + x) + load(z_gradient + x));
      sum += hsum(part) * power_gradient(nk - 1 - j);
    }
    return sum;
  }
  // From the one to the other: s dense, r a tile.
  double decay_gradient_of_state(int64_t nk, const float* s, const float* r) const {
    double sum = 0;
    for (int64_t d = 0; d <= p.D; d++) {  // the last row is the normaliser's
      const int64_t width = d < p.D ? p.E : p.D;
      vf part = {};
      for (int64_t x = 0; x < width; x += VL)
        part += load_n(s + d * p.E + x, int(smaller(VL, width - x))) * load(r + d * E + x);
      sum += hsum(part);
    }
    return sum * power_gradient(nk);
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
    double decay = t.ddecay ? decay_gradient_of_pairs(n, nk) + decay_gradient_of_state(nk, s, r) : 0.0;
    if (p.decayed) fade_scores(n, nk, m.A), fade_scores(n, nk, m.dA);

    transpose_tile(p.D, p.E, s, p.E, m.turned, D);
    rows_product(n, D, p.E, m.dn, E, m.turned, D, m.wide, D, false, false);
    float* z_row = m.turned;  // free again, and padded as the rows are
    load_tile(DType::f32, z, 0, p.D, 1, p.D, z_row);
    if (t.ddecay) decay += decay_gradient_of_queries(n, nk, z_row);
    if (p.decayed) fade_queries(n, nk, D, m.wide), fade_weights(n, nk);
    rows_product(n, D, nk, m.dA, chunk, m.f, D, m.wide, D, true, true);
    store_query_gradients(row, n, z_row);

    transpose_tile(p.D, p.E, r, E, m.turned, D);
    rows_product(nk, D, p.E, m.v, E, m.turned, D, m.wide, D, false, false);
    if (t.ddecay) {
      decay += decay_gradient_of_keys(nk, normalizer_of(p, r));
      static_cast<float*>(t.ddecay)[rows.saved + row / chunk] = float(decay);
    }
    if (p.decayed) fade_keys(nk, D, m.wide);
    columns_product(nk, D, n, m.dA, chunk, m.a, D, m.wide, D, true, true);
    store_key_gradients(row, nk, normalizer_of(p, r), p.decayed ? powers_down(nk) : nullptr);

    if (p.decayed) fade_keys(nk, D, m.f);
    rows_product(nk, E, p.D, m.f, D, r, E, m.wide, E, false, false);
    columns_product(nk, E, n, m.A, chunk, m.dn, E, m.wide, E, true, true);
    store_value_gradients(row, nk);
    clear_key_gradients(row + nk, n - nk);
    if (p.decayed) fade_gradients(n, nk, r);
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
    for (int64_t x = 0; p.softmax() && x < D; x += VL) store(m.f + x, set1(1.0f));
    for (; row < end; row += chunk) {
      const int64_t n = smaller(chunk, end - row);
      load_output_gradients(row, n);
      add_queries(n, r);
      rows_product(n, D, p.E, m.dn, E, m.turned, D, m.wide, D, false, false);
      store_query_gradients(row, n, m.f);
    }
  }
  // The map softmax: what its sum over keys says, in place of r; R [D][E] and S, dense.
  void write_softmax_correction(float* r) const {
    const float* s = saved(0);
    for (int64_t d = 0; d < p.D; d++) {
      vf sum = {};
      for (int64_t x = 0; x < p.E; x += VL)
        sum += load_n(s + d * p.E + x, int(smaller(VL, p.E - x))) * load(r + d * E + x);
      normalizer_of(p, r)[d] = -hsum(sum);
    }
  }
  void key_gradients(int64_t row, int64_t end, float* r) const {
    float* log_sums = p.softmax() ? m.a : nullptr;
    if (log_sums) load_tile(DType::f32, saved(0) + p.D * p.E, 0, p.D, 1, p.D, log_sums);
    transpose_tile(p.D, p.E, r, E, m.turned, D);
    for (; row < end; row += chunk) {
      const int64_t n = smaller(chunk, end - row), nk = valid_keys(row, n);
      load_keys(row, nk, log_sums);
      rows_product(nk, D, p.E, m.v, E, m.turned, D, m.wide, D, false, false);
      store_key_gradients(row, nk, normalizer_of(p, r));
      rows_product(nk, E, p.D, m.f, D, r, E, m.wide, E, false, false);
      store_value_gradients(row, nk);
      clear_key_gradients(row + nk, n - nk);
    }
  }
};

}  // namespace
}  // namespace PYSEQNET_ISA
}  // namespace pyseqnet
