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
#include <random>
#include <utility>
#include <vector>

#include "attention/attention_math.h"

namespace pyseqnet {
extern const AttentionCpuKernel attention_reference_forward, attention_reference_weights,
    attention_reference_delta, attention_reference_backward, attention_reference_mask_gradient;
}

namespace {
using namespace pyseqnet;

using Random = std::mt19937_64;
using Bytes = std::vector<std::byte>;

int64_t uniform(Random& random, int64_t low, int64_t high) {
  return low + int64_t(random() % uint64_t(high - low + 1));
}
bool one_in(Random& random, int64_t n) { return uniform(random, 1, n) == 1; }
template <class T>
T pick(Random& random, std::initializer_list<T> choices) {
  return choices.begin()[uniform(random, 0, int64_t(choices.size()) - 1)];
}
double spread(Random& random) { return double(random() >> 11) * 0x1p-52 - 1.0; }

double read(const std::byte* p, DType t, int64_t i) {
  return t == DType::f32    ? double(reinterpret_cast<const float*>(p)[i])
         : t == DType::bf16 ? to_double(reinterpret_cast<const bfloat16*>(p)[i])
         : t == DType::f16  ? to_double(reinterpret_cast<const float16*>(p)[i])
                            : reinterpret_cast<const double*>(p)[i];
}
void write(std::byte* p, DType t, int64_t i, double v) {
  if (t == DType::f32) round_to(reinterpret_cast<float*>(p)[i], v);
  if (t == DType::bf16) round_to(reinterpret_cast<bfloat16*>(p)[i], v);
  if (t == DType::f16) round_to(reinterpret_cast<float16*>(p)[i], v);
  if (t == DType::f64) round_to(reinterpret_cast<double*>(p)[i], v);
}

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

struct Workspace {
  Bytes bytes;
  explicit Workspace(int64_t size) : bytes(size_t(size + workspace_alignment), std::byte{0xff}) {}
  std::byte* data() {
    const int64_t at = int64_t(reinterpret_cast<uintptr_t>(bytes.data()));
    return bytes.data() + (align_up(at) - at);
  }
};

// All items at once, or in randomly cut ranges in random order, each with scratch of its own.
void execute(const AttentionCpuKernel& kernel, const AttentionProblem& p, const AttentionTensors& t,
             Random* cuts) {
  const WorkPlan plan = kernel.plan(p);
  Workspace shared(plan.shared_bytes);
  for (int phase = 0; phase < plan.phases; phase++) {
    const int64_t items = plan.phase[phase].items;
    std::vector<int64_t> ends = {items};
    for (int i = 0; cuts && i < 3; i++) ends.push_back(uniform(*cuts, 0, items));
    std::sort(ends.begin(), ends.end());
    std::vector<std::pair<int64_t, int64_t>> ranges;
    int64_t begin = 0;
    for (int64_t end : ends) {
      if (end > begin) ranges.push_back({begin, end});
      begin = end;
    }
    if (cuts) std::shuffle(ranges.begin(), ranges.end(), *cuts);
    for (auto [from, to] : ranges) {
      Workspace scratch(plan.thread_bytes);
      kernel.run(p, t, {phase, from, to, shared.data(), scratch.data()});
    }
  }
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
  AttentionProblem p;
  Strided q, k, v, out, gout, gq, gk, gv, mask, gmask, lse, delta, glse, weights, gweights;
  std::vector<int64_t> lengths;
  int64_t seed;

  static DType statistic(DType t) { return t == DType::f64 ? DType::f64 : DType::f32; }

  Setup(const AttentionProblem& problem, Random& random)
      : p(problem),
        q(p.dtype, p.B, p.H, p.L, p.D, uniform(random, 0, 2)),
        k(p.dtype, p.B, p.Hk, p.S, p.D, uniform(random, 0, 2)),
        v(p.dtype, p.B, p.Hk, p.S, p.E, uniform(random, 0, 2)),
        out(p.dtype, p.B, p.H, p.L, p.E, uniform(random, 0, 1)),
        gout(p.dtype, p.B, p.H, p.L, p.E, uniform(random, 0, 2)),
        gq(p.dtype, p.B, p.H, p.L, p.D, uniform(random, 0, 1)),
        gk(p.dtype, p.B, p.Hk, p.S, p.D, uniform(random, 0, 1)),
        gv(p.dtype, p.B, p.Hk, p.S, p.E, uniform(random, 0, 1)),
        mask(p.mask_dtype, p.mask_B, p.mask_H, p.mask_L, p.mask_S, 0),
        gmask(p.mask_dtype, p.mask_B, p.mask_H, p.mask_L, p.mask_S, 0),
        lse(statistic(p.dtype), p.B, p.H, 1, p.L, 0),
        delta(statistic(p.dtype), p.B, p.H, 1, p.L, 0),
        glse(statistic(p.dtype), p.B, p.H, 1, p.L, 0),
        weights(p.dtype, p.B, p.H, p.L, p.S, 0),
        gweights(p.dtype, p.B, p.H, p.L, p.S, 0),
        seed(int64_t(random() >> 2)) {
    q.fill(random, 2), k.fill(random, 2), v.fill(random), gout.fill(random);
    glse.fill(random), gweights.fill(random, 0.3);
    for (int64_t b = 0; b < p.B; b++) lengths.push_back(uniform(random, 0, p.S));
    if (p.mask == AttentionMask::boolean) boolean_mask(random);
    if (p.mask == AttentionMask::additive) {
      mask.fill(random);
      const int64_t chance = uniform(random, 2, 40);
      for (int64_t i = 0; i < mask.length; i++)
        if (one_in(random, chance)) write(mask.data(), p.mask_dtype, i, -INFINITY);
    }
    const auto stride = [](int64_t extent, int64_t step) { return extent == 1 ? 0 : step; };
    p.mask_strides = {stride(p.mask_B, mask.strides.b), stride(p.mask_H, mask.strides.h),
                      stride(p.mask_L, mask.strides.n)};
    p.mask_stride_s = stride(p.mask_S, 1);
    p.q_strides = q.strides, p.k_strides = k.strides, p.v_strides = v.strides, p.out_strides = out.strides;
    p.gq_strides = gq.strides, p.gk_strides = gk.strides, p.gv_strides = gv.strides;
    p.gout_strides = gout.strides;
    poison_what_takes_no_part();
  }

  void boolean_mask(Random& random) {
    const int64_t kind = uniform(random, 0, 2), chance = uniform(random, 2, 8);
    for (int64_t i = 0; i < mask.length; i++) {
      const int64_t s = p.mask_S ? i % p.mask_S : 0, l = p.mask_S ? i / p.mask_S % p.mask_L : 0;
      const bool value = kind == 0 ? !one_in(random, chance) : kind == 1 ? s <= l : l / 20 == s / 20;
      mask.data()[i] = std::byte{value};
    }
  }

  bool visible(int64_t b, int64_t h, int64_t i, int64_t j) {
    const int64_t length = p.with_key_lengths ? lengths[size_t(b)] : p.S;
    if (j >= visible_keys(p.causal, p.causal_offset, length, i)) return false;
    if (p.mask == AttentionMask::none) return true;
    const int64_t at =
        b * p.mask_strides.b + h * p.mask_strides.h + i * p.mask_strides.n + j * p.mask_stride_s;
    if (p.mask == AttentionMask::boolean) return mask.data()[at] != std::byte{0};
    return read(mask.data(), p.mask_dtype, at) != -INFINITY;
  }
  void poison_what_takes_no_part() {
    for (int64_t b = 0; b < p.B; b++)
      for (int64_t hk = 0; hk < p.Hk; hk++)
        for (int64_t j = 0; j < p.S; j++) {
          bool seen = false;
          for (int64_t h = hk * p.group(); !seen && h < (hk + 1) * p.group(); h++)
            for (int64_t i = 0; !seen && i < p.L; i++) seen = visible(b, h, i, j);
          if (!seen) k.poison(b, hk, j), v.poison(b, hk, j);
        }
    for (int64_t b = 0; b < p.B; b++)
      for (int64_t h = 0; h < p.H; h++)
        for (int64_t i = 0; i < p.L; i++) {
          bool sees = false;
          for (int64_t j = 0; !sees && j < p.S; j++) sees = visible(b, h, i, j);
          if (!sees) q.poison(b, h, i), gout.poison(b, h, i);
        }
  }

  AttentionTensors tensors() {
    AttentionTensors t;
    t.q = q.data(), t.k = k.data(), t.v = v.data(), t.gout = gout.data();
    t.mask = p.mask == AttentionMask::none ? nullptr : mask.data();
    t.key_lengths = lengths.data(), t.seed = &seed;
    t.glse = glse.data(), t.gweights = gweights.data();
    t.out = out.data(), t.lse = lse.data(), t.delta = delta.data(), t.weights = weights.data();
    t.gq = gq.data(), t.gk = gk.data(), t.gv = gv.data(), t.gmask = gmask.data();
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
      case AttentionPass::mask_gradient:
        return {&gmask};
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
  const double floor = pass == AttentionPass::backward || pass == AttentionPass::mask_gradient ? 0.3 : 1e-3;
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
  if (s.p.mask == AttentionMask::additive)
    check_pass(report, s, AttentionPass::mask_gradient, attention_reference_mask_gradient, random);
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
  p.mask = pick(random,
                {AttentionMask::none, AttentionMask::none, AttentionMask::boolean, AttentionMask::additive});
  p.mask_dtype = one_in(random, 2) ? p.dtype : DType::f32;
  if (p.mask != AttentionMask::none) {
    const auto extent = [&](int64_t full) { return one_in(random, 2) ? full : 1; };
    p.mask_B = extent(p.B), p.mask_H = extent(p.H), p.mask_L = extent(p.L);
    p.mask_S = one_in(random, 5) ? 1 : p.S;
  }
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
      p.dtype = p.mask_dtype = dtype;
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
