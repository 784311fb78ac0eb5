// Every CPU attention kernel of every instruction set that this machine has, against the oracle: all passes,
// dtypes, masks, lengths, causal offsets, grouped heads, dropout and strides, on random problems from fixed
// seeds. Inputs are as large as their tensors and not a byte more; what lies between a view's elements, keys
// that no query sees and rows that see no key hold NaN. Each run finds its outputs and its scratch full of
// NaN and its outputs between guards; each problem is run again in randomly cut ranges and must give the same
// bits.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <optional>
#include <random>
#include <utility>
#include <vector>

#include "../cuda_on_cpu/attention_pattern.h"
#include "attention/attention_math.h"
#include "kernel_test.h"

namespace pyseqnet {
extern const AttentionCpuKernel attention_reference_forward, attention_reference_weights,
    attention_reference_delta, attention_reference_backward, attention_reference_bias_gradient;
}

namespace {
using namespace pyseqnet;

using Bytes = std::vector<std::byte>;

bool one_in(Random& random, int64_t n) { return uniform(random, 1, n) == 1; }
template <class T>
T pick(Random& random, std::initializer_list<T> choices) {
  return choices.begin()[uniform(random, 0, int64_t(choices.size()) - 1)];
}
double spread(Random& random) { return double(random() >> 11) * 0x1p-52 - 1.0; }

// A (B, H, N, X) tensor with some strides, all NaN at first, between guards.
struct Strided {
  static constexpr size_t guard = 256;
  DType dtype = DType::f32;
  int64_t B = 0, H = 0, N = 0, X = 0, length = 0;
  AttentionStrides strides;
  Bytes bytes;

  Strided(DType type, int64_t b, int64_t h, int64_t n, int64_t x, int64_t layout)
      : dtype(type), B(b), H(h), N(n), X(x) {
    const int64_t gap = layout == 2 ? 3 : 0, row = x + gap;
    strides = layout == 1 ? AttentionStrides{n * h * row, row, h * row}
                          : AttentionStrides{h * n * row, n * row, row};
    length = b && h && n ? (b - 1) * strides.b + (h - 1) * strides.h + (n - 1) * strides.n + x : 0;
    clear();
  }
  void clear() {
    bytes.assign(2 * guard + size_t(length * bytes_of(dtype)), std::byte{0x5a});
    std::fill(bytes.begin() + guard, bytes.end() - guard, std::byte{0xff});
  }
  std::byte* data() { return bytes.data() + guard; }
  int64_t at(int64_t b, int64_t h, int64_t n) const { return b * strides.b + h * strides.h + n * strides.n; }
  bool guards_hold() const {
    for (size_t i = 0; i < guard; i++)
      if (bytes[i] != std::byte{0x5a} || bytes[bytes.size() - 1 - i] != std::byte{0x5a}) return false;
    return true;
  }
  template <class F>
  void for_rows(F&& f) const {
    for (int64_t b = 0; b < B; b++)
      for (int64_t h = 0; h < H; h++)
        for (int64_t n = 0; n < N; n++) f(b, h, n, at(b, h, n));
  }
  void fill(Random& random, double size = 1) {
    for_rows([&](int64_t, int64_t, int64_t, int64_t from) {
      for (int64_t x = 0; x < X; x++) write(data(), dtype, from + x, size * spread(random));
    });
  }
  void poison(int64_t b, int64_t h, int64_t n) {
    for (int64_t x = 0; x < X; x++) write(data(), dtype, at(b, h, n) + x, NAN);
  }
};

// The largest difference relative to the largest magnitude (at least `floor`); infinite where one is NaN or
// infinite and the other not.
double difference(Strided& a, Strided& b, double floor) {
  double worst = 0, largest = floor;
  a.for_rows([&](int64_t, int64_t, int64_t, int64_t from) {
    for (int64_t x = 0; x < a.X; x++) {
      const double u = read(a.data(), a.dtype, from + x), v = read(b.data(), b.dtype, from + x);
      if (u == v) continue;
      if (!std::isfinite(u) || !std::isfinite(v)) worst = INFINITY;
      worst = std::max(worst, std::fabs(u - v));
      largest = std::max(largest, std::fabs(u));
    }
  });
  return worst / largest;
}

struct Report {
  int64_t runs = 0, failures = 0;
  void result(const char* fault, AttentionPass pass, const char* kernel, const AttentionProblem& p,
              double error) {
    runs++;
    if (fault && failures++ < 10)
      std::printf("FAILED %s %s: %s: %s (%g)\n", operation_of(pass), kernel, describe(p).c_str(), fault,
                  error);
  }
};

// One problem with all its tensors.
struct Setup {
  std::vector<int32_t> cu_q, cu_k;
  AttentionProblem p;
  Strided q, k, v, out, gout, gq, gk, gv, bias, gbias, lse, delta, glse, weights, gweights;
  std::vector<uint8_t> mask;
  std::vector<int64_t> lengths;
  std::vector<float> slopes;
  std::vector<double> wide_slopes;
  std::optional<testing::PatternLists> pattern;
  int64_t seed;

  int64_t batch() const { return p.packed ? 1 : p.B; }
  int64_t queries() const { return p.packed ? p.total_q : p.L; }
  int64_t keys() const { return p.packed ? p.total_k : p.S; }
  // Ends of sequences of up to `longest` positions, one of them as long.
  static std::vector<int32_t> ends(int64_t count, int64_t longest, Random& random) {
    std::vector<int32_t> at = {0};
    const int64_t whole = count > 0 ? uniform(random, 0, count - 1) : 0;
    for (int64_t b = 0; b < count; b++)
      at.push_back(at.back() + int32_t(b == whole ? longest : uniform(random, 0, longest)));
    return at;
  }
  static AttentionProblem with_totals(AttentionProblem p, const std::vector<int32_t>& cu_q,
                                      const std::vector<int32_t>& cu_k) {
    p.total_q = cu_q.back(), p.total_k = cu_k.back();
    return p;
  }
  static DType statistic(DType t) { return t == DType::f64 ? DType::f64 : DType::f32; }

  Setup(const AttentionProblem& problem, Random& random)
      : cu_q(ends(problem.B, problem.L, random)),
        cu_k(ends(problem.B, problem.S, random)),
        p(with_totals(problem, cu_q, cu_k)),
        q(p.dtype, batch(), p.H, queries(), p.D, uniform(random, 0, 2)),
        k(p.dtype, batch(), p.Hk, keys(), p.D, uniform(random, 0, 2)),
        v(p.dtype, batch(), p.Hk, keys(), p.E, uniform(random, 0, 2)),
        out(p.dtype, batch(), p.H, queries(), p.E, uniform(random, 0, 1)),
        gout(p.dtype, batch(), p.H, queries(), p.E, uniform(random, 0, 2)),
        gq(p.dtype, batch(), p.H, queries(), p.D, uniform(random, 0, 1)),
        gk(p.dtype, batch(), p.Hk, keys(), p.D, uniform(random, 0, 1)),
        gv(p.dtype, batch(), p.Hk, keys(), p.E, uniform(random, 0, 1)),
        bias(p.bias_dtype, p.bias_B, p.bias_H, p.bias_L, p.bias_S, 0),
        gbias(p.bias_dtype, p.bias_B, p.bias_H, p.bias_L, p.bias_S, 0),
        lse(statistic(p.dtype), batch(), p.H, 1, queries(), 0),
        delta(statistic(p.dtype), batch(), p.H, 1, queries(), 0),
        glse(statistic(p.dtype), batch(), p.H, 1, queries(), 0),
        weights(p.dtype, p.B, p.H, p.L, p.S, 0),
        gweights(p.dtype, p.B, p.H, p.L, p.S, 0),
        seed(int64_t(random() >> 2)) {
    q.fill(random, 2), k.fill(random, 2), v.fill(random), gout.fill(random);
    glse.fill(random), gweights.fill(random, 0.3);
    for (int64_t b = 0; b < p.B; b++) lengths.push_back(uniform(random, 0, p.S));
    for (int64_t n = 0; n < p.B * p.H; n++) wide_slopes.push_back(std::fabs(spread(random)));
    for (double slope : wide_slopes) slopes.push_back(float(slope));
    if (p.with_mask) boolean_mask(random);
    if (p.with_bias) {
      bias.fill(random);
      const int64_t chance = uniform(random, 2, 40);
      for (int64_t i = 0; i < bias.length; i++)
        if (one_in(random, chance)) write(bias.data(), p.bias_dtype, i, -INFINITY);
    }
    const auto stride = [](int64_t extent, int64_t step) { return extent == 1 ? 0 : step; };
    p.bias_strides = {stride(p.bias_B, bias.strides.b), stride(p.bias_H, bias.strides.h),
                      stride(p.bias_L, bias.strides.n)};
    p.bias_stride_s = stride(p.bias_S, 1);
    if (p.with_blocks) random_pattern(random);
    p.q_strides = q.strides, p.k_strides = k.strides, p.v_strides = v.strides, p.out_strides = out.strides;
    p.gq_strides = gq.strides, p.gk_strides = gk.strides, p.gv_strides = gv.strides;
    p.gout_strides = gout.strides;
    poison_what_takes_no_part();
  }

  void boolean_mask(Random& random) {
    const int64_t kind = uniform(random, 0, 2), chance = uniform(random, 2, 8);
    const bool batches = one_in(random, 2), heads = one_in(random, 2), rows = one_in(random, 2);
    p.mask_strides = {batches ? p.H * p.L * p.S : 0, heads ? p.L * p.S : 0, rows ? p.S : 0};
    p.mask_stride_s = 1;
    for (int64_t i = 0; i < p.B * p.H * p.L * p.S; i++) {
      const int64_t s = i % p.S, l = i / p.S % p.L;
      mask.push_back(kind == 0 ? !one_in(random, chance) : kind == 1 ? s <= l : l / 20 == s / 20);
    }
  }
  void random_pattern(Random& random) {
    const int64_t window = uniform(random, 0, 80), stride = uniform(random, 2, 9),
                  dense = uniform(random, 0, 70);
    const int64_t chance = uniform(random, 1, 60);
    pattern.emplace(p.block_heads, p.L, p.S, [&](int64_t h, int64_t i, int64_t j) {
      const int64_t distance = i - j;
      if (h % 2) return one_in(random, chance);
      return std::abs(distance) <= window || (distance % stride == 0 && distance > 0) ||
             (i < dense && j < dense);
    });
    p.block_entries = int64_t(pattern->row_entries.size());
  }

  bool visible(int64_t b, int64_t h, int64_t i, int64_t j) {
    const AttentionSequence at = sequence_of(p, lengths.data(), cu_q.data(), cu_k.data(), b);
    if (i >= at.L || j >= visible_keys(p.causal, at.causal_offset, at.length, i)) return false;
    if (p.with_blocks && !block_sees(tensors().blocks, block_row(p, h, i), i, j)) return false;
    const auto offset = [&](const AttentionStrides& s) { return b * s.b + h * s.h + i * s.n; };
    if (p.with_mask && !mask[size_t(offset(p.mask_strides) + j * p.mask_stride_s)]) return false;
    if (!p.with_bias) return true;
    return read(bias.data(), p.bias_dtype, offset(p.bias_strides) + j * p.bias_stride_s) != -INFINITY;
  }
  void poison_what_takes_no_part() {
    for (int64_t b = 0; b < p.B; b++) {
      const AttentionSequence at = sequence_of(p, lengths.data(), cu_q.data(), cu_k.data(), b);
      for (int64_t hk = 0; hk < p.Hk; hk++)
        for (int64_t j = 0; j < at.S; j++) {
          bool seen = false;
          for (int64_t h = hk * p.group(); !seen && h < (hk + 1) * p.group(); h++)
            for (int64_t i = 0; !seen && i < at.L; i++) seen = visible(b, h, i, j);
          if (!seen) k.poison(at.batch, hk, at.k_begin + j), v.poison(at.batch, hk, at.k_begin + j);
        }
      for (int64_t h = 0; h < p.H; h++)
        for (int64_t i = 0; i < at.L; i++) {
          bool sees = false;
          for (int64_t j = 0; !sees && j < at.S; j++) sees = visible(b, h, i, j);
          if (!sees) q.poison(at.batch, h, at.q_begin + i), gout.poison(at.batch, h, at.q_begin + i);
        }
    }
  }

  AttentionTensors tensors() {
    AttentionTensors t;
    t.q = q.data(), t.k = k.data(), t.v = v.data(), t.gout = gout.data();
    t.mask = mask.data(), t.bias = bias.data(), t.cu_q = cu_q.data(), t.cu_k = cu_k.data();
    t.slopes = p.dtype == DType::f64 ? static_cast<const void*>(wide_slopes.data()) : slopes.data();
    if (pattern) {
      t.blocks.row_begin = pattern->row_begin.data(), t.blocks.column_begin = pattern->column_begin.data();
      t.blocks.row_entries = pattern->row_entries.data();
      t.blocks.column_entries = pattern->column_entries.data();
      t.blocks.row_order = pattern->row_order.data(), t.blocks.column_order = pattern->column_order.data();
      t.blocks.bits = pattern->bits.data();
    }
    t.key_lengths = lengths.data(), t.seed = &seed;
    t.glse = glse.data(), t.gweights = gweights.data();
    t.out = out.data(), t.lse = lse.data(), t.delta = delta.data(), t.weights = weights.data();
    t.gq = gq.data(), t.gk = gk.data(), t.gv = gv.data(), t.gbias = gbias.data();
    return t;
  }
  std::vector<Strided*> outputs(AttentionPass pass) {
    switch (pass) {
      case AttentionPass::forward:
        return {&out, &lse};
      case AttentionPass::weights:
        return {&weights};
      case AttentionPass::delta:
        return {&delta};
      case AttentionPass::bias_gradient:
        return {&gbias};
      case AttentionPass::backward:
        break;
    }
    std::vector<Strided*> found;
    if (p.need_q) found.push_back(&gq);
    if (p.need_kv) found.push_back(&gk), found.push_back(&gv);
    return found;
  }
};

double tolerance(DType t) {
  return t == DType::f64 ? 1e-12 : t == DType::f32 ? 2e-5 : t == DType::f16 ? 4e-3 : 3e-2;
}

void check_pass(Report& report, Setup& s, AttentionPass pass, const AttentionCpuKernel& oracle,
                Random& random) {
  execute(oracle, s.p, s.tensors(), nullptr);
  std::vector<Strided> expected;
  for (Strided* output : s.outputs(pass)) expected.push_back(*output);
  // Gradients may cancel to nothing (a single key): what is lost then is measured against their terms.
  const double floor = pass == AttentionPass::backward || pass == AttentionPass::bias_gradient ? 0.3 : 1e-3;
  const auto table = attention_cpu_table(pass);
  for (int k = 0; k < table.count; k++) {
    const AttentionCpuKernel& kernel = *table.kernels[k];
    if (kernel.isa > detected_isa() || kernel.refuses(s.p)) continue;
    std::vector<Strided> whole;
    for (Random* cuts : {static_cast<Random*>(nullptr), &random}) {
      for (Strided* output : s.outputs(pass)) output->clear();
      execute(kernel, s.p, s.tensors(), cuts);
      const char* fault = nullptr;
      double error = 0;
      const std::vector<Strided*> outputs = s.outputs(pass);
      for (size_t o = 0; o < outputs.size(); o++) {
        error = std::max(error, difference(expected[o], *outputs[o], floor));
        if (!outputs[o]->guards_hold()) fault = "wrote outside its output";
        if (!cuts)
          whole.push_back(*outputs[o]);
        else if (whole[o].bytes != outputs[o]->bytes)
          fault = "differs when the work is cut";
      }
      if (!(error <= tolerance(s.p.dtype))) fault = "is off";
      report.result(fault, pass, kernel.name, s.p, error);
    }
  }
  // What follows reads the oracle's results.
  const std::vector<Strided*> outputs = s.outputs(pass);
  for (size_t o = 0; o < outputs.size(); o++) *outputs[o] = expected[o];
}

void check(Report& report, const AttentionProblem& problem, Random& random) {
  Setup s(problem, random);
  check_pass(report, s, AttentionPass::forward, attention_reference_forward, random);
  check_pass(report, s, AttentionPass::weights, attention_reference_weights, random);
  check_pass(report, s, AttentionPass::delta, attention_reference_delta, random);
  check_pass(report, s, AttentionPass::backward, attention_reference_backward, random);
  if (s.p.with_bias)
    check_pass(report, s, AttentionPass::bias_gradient, attention_reference_bias_gradient, random);
}

AttentionProblem random_problem(Random& random) {
  AttentionProblem p;
  p.dtype = pick(random, {DType::f32, DType::f32, DType::bf16, DType::f16, DType::f64});
  p.B = uniform(random, 1, 3), p.Hk = uniform(random, 1, 2);
  p.H = p.Hk * pick<int64_t>(random, {1, 1, 2, 3});
  p.L = pick<int64_t>(random, {1, 2, 3, 4, 5, 12, 13, 31, 64, 97, 110, uniform(random, 1, 210)});
  p.S = pick<int64_t>(random, {1, 2, 7, 16, 33, 64, 96, 97, 200, 260, uniform(random, 1, 300)});
  p.D = pick<int64_t>(random, {1, 3, 8, 16, 17, 32, 40, uniform(random, 1, 70)});
  p.E = pick<int64_t>(random, {p.D, p.D, 1, 5, 16, 33, uniform(random, 1, 70)});
  if (p.dtype == DType::f64) p.L = std::min<int64_t>(p.L, 20), p.S = std::min<int64_t>(p.S, 40);
  p.scale = pick(random, {1 / std::sqrt(double(p.D)), 1 / std::sqrt(double(p.D)), 0.3, 0.0, -0.2});
  p.causal = one_in(random, 3);
  p.causal_offset = pick<int64_t>(random, {0, 0, p.S - p.L, uniform(random, -20, 20)});
  p.with_key_lengths = one_in(random, 3);
  p.dropout_p = one_in(random, 3) ? pick(random, {0.1, 0.5, 0.9}) : 0.0;
  p.with_mask = one_in(random, 4), p.with_bias = one_in(random, 4);
  p.bias_dtype = one_in(random, 2) ? p.dtype : DType::f32;
  if (p.with_bias) {
    const auto extent = [&](int64_t full) { return one_in(random, 2) ? full : 1; };
    p.bias_B = extent(p.B), p.bias_H = extent(p.H), p.bias_L = extent(p.L);
    p.bias_S = one_in(random, 5) ? 1 : p.S;
  }
  p.with_slopes = one_in(random, 6);
  p.slopes_stride_b = one_in(random, 2) ? p.H : 0, p.alibi_offset = one_in(random, 2) ? p.S - p.L : 0;
  p.softcap = one_in(random, 6) ? 2.0 : 0.0;
  p.with_blocks = one_in(random, 3), p.block_heads = one_in(random, 3) ? p.H : 1;
  p.packed = one_in(random, 5);
  p.causal_bottom_right = p.packed && one_in(random, 2), p.alibi_bottom_right = p.packed && one_in(random, 2);
  if (p.packed) p.with_key_lengths = false;
  p.need_q = !one_in(random, 8), p.need_kv = !p.need_q || !one_in(random, 8);
  p.with_gweights = one_in(random, 4), p.with_glse = one_in(random, 4);
  return p;
}

struct Edge {
  const char* why;
  int64_t B, H, Hk, L, S, D, E;
  bool causal;
  int64_t causal_offset;
};
constexpr Edge edges[] = {
    {"no batch", 0, 2, 2, 4, 4, 8, 8, false, 0},
    {"no query", 2, 2, 2, 0, 4, 8, 8, true, 0},
    {"no key", 2, 2, 1, 4, 0, 8, 8, false, 0},
    {"no key of many queries", 2, 2, 1, 40, 0, 8, 8, true, 0},
    {"no head", 2, 0, 0, 4, 4, 8, 8, false, 0},
    {"one of each", 1, 1, 1, 1, 1, 1, 1, true, 0},
    {"causal offset hides everything", 1, 2, 2, 30, 20, 16, 16, true, -40},
    {"causal offset hides nothing", 1, 2, 2, 30, 20, 16, 16, true, 1000},
    {"keys in runs", 1, 1, 1, 130, 800, 16, 16, true, 0},
    {"keys in runs, bottom-right", 1, 2, 1, 100, 1000, 16, 32, true, 900},
    {"wide heads", 1, 1, 1, 100, 100, 256, 130, false, 0},
};

void check_edges(Report& report) {
  Random random(3);
  for (const Edge& e : edges)
    for (DType dtype : {DType::f32, DType::bf16, DType::f64}) {
      AttentionProblem p;
      p.dtype = p.bias_dtype = dtype;
      p.B = e.B, p.H = e.H, p.Hk = e.Hk, p.L = e.L, p.S = e.S, p.D = e.D, p.E = e.E;
      p.causal = e.causal, p.causal_offset = e.causal_offset, p.scale = 0.25;
      check(report, p, random);
    }
}

}  // namespace

int main() {
  Report report;
  check_edges(report);
  constexpr int problems = 220;
  for (int seed = 0; seed < problems; seed++) {
    Random random(uint64_t(seed) + 100);
    check(report, random_problem(random), random);
  }
  std::printf("%lld runs, %lld failures\n", (long long)report.runs, (long long)report.failures);
  return report.failures ? 1 : 0;
}
