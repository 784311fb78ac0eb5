// Every CPU linear-attention kernel of every instruction set that this machine has, against the oracle; edge
// shapes and random ones from fixed seeds; every dtype, feature map, option and order of heads and rows, keys
// beyond their length full of NaN. The oracle itself is held against the masked matrix of scores.
//
// Outputs lie between guards and begin as NaN, as do the workspaces; inputs are exactly as large as they are
// said to be, for a sanitizer. Each problem is run again in randomly cut ranges and must give the same bits.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "common/numerics.h"
#include "kernel_test.h"
#include "linear_attention/linear_attention.h"

namespace pyseqnet {
extern const LinearAttentionCpuKernel linear_attention_reference_forward, linear_attention_reference_backward;
}

namespace {
using namespace pyseqnet;
using Problem = LinearAttentionProblem;
using Tensors = LinearAttentionTensors;

struct Options {
  bool lengths, states, rows_first;
};

// The tensors of one problem.
struct Call {
  Problem p;
  Options o;
  DType number;  // of the states
  Array q, k, v, gout, state0, z0, gstate, gz;
  std::vector<int64_t> lengths;
  std::vector<double> decay;  // of each head

  static HeadStrides strides(const Problem& p, int64_t rows, int64_t width, bool rows_first) {
    if (rows_first) return {rows * p.H * width, width, p.H * width};
    return {p.H * rows * width, rows * width, width};
  }
  Call(Problem problem, Options options, Random& random)
      : p(problem),
        o(options),
        number(p.dtype == DType::f64 ? DType::f64 : DType::f32),
        q(random_array(p.dtype, p.heads() * p.L * p.D, random)),
        k(random_array(p.dtype, p.heads() * p.S * p.D, random)),
        v(random_array(p.dtype, p.heads() * p.S * p.E, random)),
        gout(random_array(p.dtype, p.heads() * p.L * p.E, random)),
        state0(random_array(number, p.heads() * p.D * p.E, random)),
        z0(random_array(number, p.heads() * p.D, random)),
        gstate(random_array(number, p.heads() * p.D * p.E, random)),
        gz(random_array(number, p.heads() * p.D, random)) {
    p.scale = 0.75, p.eps = 1e-2, p.with_saved = true;
    p.q = p.dq = strides(p, p.L, p.D, o.rows_first);
    p.k = p.dk = strides(p, p.S, p.D, o.rows_first);
    p.v = p.dv = strides(p, p.S, p.E, o.rows_first);
    p.out = p.gout = strides(p, p.L, p.E, o.rows_first);
    // Sums of scores that are nearly zero have no accuracy to compare.
    for (Array* a : {&q, &k})
      for (int64_t i = 0; p.feature_map == FeatureMap::identity && p.normalize && i < a->count; i++)
        a->set(i, std::fabs(a->at(i)));
    for (int64_t i = 0; i < z0.count; i++) z0.set(i, std::fabs(z0.at(i)));
    for (int64_t b = 0; b < p.B; b++) lengths.push_back(uniform(random, 0, p.S));
    constexpr double strengths[] = {0, 0.5, 0.9, 0.99, 0.999, 1};
    for (int64_t h = 0; h < p.H; h++) decay.push_back(strengths[p.decayed ? uniform(random, 0, 5) : 5]);
    for (int64_t b = 0; o.lengths && b < p.B; b++)
      for (int64_t h = 0; h < p.H; h++)
        for (int64_t j = lengths[size_t(b)]; j < p.S; j++) {
          for (int64_t d = 0; d < p.D; d++) k.set(b * p.k.b + h * p.k.h + j * p.k.row + d, NAN);
          for (int64_t e = 0; e < p.E; e++) v.set(b * p.v.b + h * p.v.h + j * p.v.row + e, NAN);
        }
  }
  Tensors inputs() {
    Tensors t;
    t.q = q.data(), t.k = k.data(), t.v = v.data(), t.gout = gout.data();
    if (o.lengths) t.key_lengths = lengths.data();
    if (p.decayed) t.decay = decay.data();
    if (o.states) {
      t.state0 = state0.data(), t.normalizer0 = z0.data();
      t.gstate = gstate.data(), t.gnormalizer = gz.data();
    }
    return t;
  }
};

struct Results {
  Array out, inverse, saved, state, z, dq, dk, dv, dstate, dz;
  explicit Results(const Call& c)
      : out(c.p.dtype, c.gout.count, true),
        inverse(c.number, c.p.normalize ? c.p.heads() * c.p.L : 0, true),
        saved(c.number, c.p.heads() * c.p.saved_states() * c.p.state_size(), true),
        state(c.number, c.o.states ? c.state0.count : 0, true),
        z(c.number, c.o.states ? c.z0.count : 0, true),
        dq(c.p.dtype, c.q.count, true),
        dk(c.p.dtype, c.k.count, true),
        dv(c.p.dtype, c.v.count, true),
        dstate(c.number, c.o.states ? c.state0.count : 0, true),
        dz(c.number, c.o.states ? c.z0.count : 0, true) {}
  Tensors tensors(const Call& c, Tensors t) {
    t.out = out.data(), t.saved = saved.data(), t.dq = dq.data(), t.dk = dk.data(), t.dv = dv.data();
    if (c.p.normalize) t.inverse = inverse.data();
    if (!c.o.states) return t;
    t.state = state.data(), t.normalizer = z.data();
    t.dstate0 = dstate.data(), t.dnormalizer0 = dz.data();
    return t;
  }
  std::vector<std::pair<const char*, Array*>> all() {
    return {{"out", &out}, {"inverse", &inverse}, {"saved", &saved}, {"state", &state},    {"z", &z},
            {"dq", &dq},   {"dk", &dk},           {"dv", &dv},       {"dstate0", &dstate}, {"dz0", &dz}};
  }
};

int checks = 0, failures = 0;
void fail(const Call& c, const char* kernel, const std::string& words) {
  if (failures++ < 20)
    std::printf("FAILED %s %s%s%s%s: %s\n", kernel, describe(c.p).c_str(), c.o.lengths ? " lengths" : "",
                c.o.states ? " states" : "", c.o.rows_first ? " rows first" : "", words.c_str());
}

void compare(const Call& c, const char* kernel, Results& got, Results& want) {
  const auto found = got.all(), wanted = want.all();
  // Gradients of queries, keys and z0 are differences; where a query sees one key, of equal numbers. What is left
  // is judged by the size of the gradients that are no differences.
  double gradients = 0;
  for (int64_t i = 0; i < want.dv.count; i++) gradients = std::max(gradients, std::fabs(want.dv.at(i)));
  for (size_t n = 0; n < found.size(); n++) {
    auto [name, a] = found[n];
    Array* b = wanted[n].second;
    checks++;
    if (!a->guards_hold()) fail(c, kernel, std::string(name) + ": wrote outside");
    double largest = 0;
    for (int64_t i = 0; i < b->count; i++) largest = std::max(largest, std::fabs(b->at(i)));
    const bool stored_whole = a->dtype == DType::f32 || a->dtype == DType::f64;
    const double storage = stored_whole ? 0 : a->dtype == DType::bf16 ? 0x1p-7 : 0x1p-10;
    for (int64_t i = 0; i < b->count; i++) {
      const double error = std::fabs(a->at(i) - b->at(i));
      const double difference = a == &got.dq || a == &got.dk ? (0x1p-18 + storage) * gradients
                                : a == &got.dz               ? 0x1p-18 * gradients
                                                             : 0;
      if (error <= 0x1p-16 * largest + (0x1p-18 + storage) * std::fabs(b->at(i)) + difference) continue;
      fail(c, kernel,
           std::string(name) + "[" + std::to_string(i) + "] is " + std::to_string(a->at(i)) + ", wanted " +
               std::to_string(b->at(i)));
      break;
    }
  }
}

// out of the formula: scores = phi(scale q) . phi(k), masked; float64 only.
void check_oracle(Call& c, Results& r) {
  const Problem& p = c.p;
  const auto phi = [&](double x) {
    return p.feature_map == FeatureMap::elu    ? (x > 0 ? x + 1 : std::exp(x))
           : p.feature_map == FeatureMap::relu ? std::max(x, 0.0)
           : p.feature_map == FeatureMap::exp  ? std::exp(x)
                                               : x;
  };
  for (int64_t b = 0; b < p.B; b++)
    for (int64_t h = 0; h < p.H; h++)
      for (int64_t i = 0; i < p.L; i++) {
        std::vector<double> out(size_t(p.E), 0.0);
        double sum = p.eps;
        const int64_t keys = c.o.lengths ? c.lengths[size_t(b)] : p.S,
                      seen = std::min(keys, p.causal ? i + 1 : p.S);
        for (int64_t j = 0; j < seen; j++) {
          double score = 0;
          for (int64_t d = 0; d < p.D; d++)
            score += phi(p.scale * c.q.at(b * p.q.b + h * p.q.h + i * p.q.row + d)) *
                     phi(c.k.at(b * p.k.b + h * p.k.h + j * p.k.row + d));
          score *= std::pow(c.decay[size_t(h)], double(seen - 1 - j));
          sum += score;
          for (int64_t e = 0; e < p.E; e++)
            out[size_t(e)] += score * c.v.at(b * p.v.b + h * p.v.h + j * p.v.row + e);
        }
        checks++;
        for (int64_t e = 0; e < p.E; e++) {
          const double want = out[size_t(e)] / (p.normalize ? sum : 1.0);
          const double got = r.out.at(b * p.out.b + h * p.out.h + i * p.out.row + e);
          if (std::fabs(got - want) > 1e-10 * (1 + std::fabs(want)) * double(p.S))
            return fail(c, "oracle", "out is " + std::to_string(got) + ", wanted " + std::to_string(want));
        }
      }
}

void check_problem(const Problem& p, const Options& o, Random& random) {
  Call c(p, o, random);
  Results want(c);
  const Tensors inputs = c.inputs(), oracle = want.tensors(c, inputs);
  execute(linear_attention_reference_forward, c.p, oracle, nullptr);
  execute(linear_attention_reference_backward, c.p, oracle, nullptr);
  if (p.dtype == DType::f64 && !o.states) check_oracle(c, want);
  const auto forwards = linear_attention_cpu_table(LinearAttentionPass::forward);
  const auto backwards = linear_attention_cpu_table(LinearAttentionPass::backward);
  for (int n = 0; n < forwards.count; n++) {
    const LinearAttentionCpuKernel &forward = *forwards.kernels[n], &backward = *backwards.kernels[n];
    if (!available(forward) || forward.refuses(c.p)) continue;
    Results whole(c), cut(c);
    const Tensors t = whole.tensors(c, inputs), in_pieces = cut.tensors(c, inputs);
    execute(forward, c.p, t, nullptr);
    execute(backward, c.p, t, nullptr);
    compare(c, forward.name, whole, want);
    execute(forward, c.p, in_pieces, &random);
    execute(backward, c.p, in_pieces, &random);
    const auto a = whole.all(), b = cut.all();
    for (size_t i = 0; i < a.size(); i++)
      if (a[i].second->bytes != b[i].second->bytes)
        fail(c, forward.name, std::string(a[i].first) + " depends on how the work is cut");
    // Nothing kept for backward: the same outputs.
    Results brief(c);
    Tensors only = brief.tensors(c, inputs);
    only.saved = only.inverse = nullptr;
    Problem forgetful = c.p;
    forgetful.with_saved = false;
    execute(forward, forgetful, only, &random);
    checks++;
    const bool single = p.L == 1 && p.S == 1;  // another path, which may round otherwise
    if (!brief.out.guards_hold() || !brief.state.guards_hold()) fail(c, forward.name, "wrote outside");
    for (int64_t i = 0; i < brief.out.count; i++)
      if (std::fabs(brief.out.at(i) - whole.out.at(i)) >
          (single ? 0x1p-6 * (1 + std::fabs(whole.out.at(i))) : 0.0))
        return fail(c, forward.name, "inference and training differ");
    for (int64_t i = 0; i < brief.state.count; i++)
      if (std::fabs(brief.state.at(i) - whole.state.at(i)) > 1e-5 * (1 + std::fabs(whole.state.at(i))))
        return fail(c, forward.name, "states of inference and training differ");
  }
}

Problem problem(int64_t B, int64_t H, int64_t L, int64_t S, int64_t D, int64_t E, bool causal) {
  Problem p;
  p.B = B, p.H = H, p.L = L, p.S = S, p.D = D, p.E = E, p.causal = causal;
  return p;
}

}  // namespace

int main() {
  Random random(20);
  constexpr DType dtypes[] = {DType::f32, DType::bf16, DType::f16, DType::f64};
  constexpr FeatureMap maps[] = {FeatureMap::elu, FeatureMap::identity, FeatureMap::relu, FeatureMap::exp};
  const Problem edges[] = {
      problem(1, 1, 1, 1, 1, 1, true),       problem(0, 2, 3, 3, 4, 4, true),
      problem(2, 0, 3, 3, 4, 4, false),      problem(1, 2, 0, 0, 3, 5, true),
      problem(1, 1, 0, 5, 3, 5, false),      problem(1, 1, 5, 0, 3, 5, false),
      problem(3, 2, 1, 1, 17, 33, true),     problem(1, 2, 64, 64, 64, 64, true),
      problem(1, 1, 65, 65, 16, 80, true),   problem(1, 2, 200, 200, 33, 15, true),
      problem(1, 1, 1100, 1100, 5, 7, true), problem(2, 1, 1100, 1300, 5, 7, false),
      problem(1, 1, 30, 30, 260, 3, true),   problem(3, 3, 7, 90, 12, 20, false),
  };
  for (Problem p : edges)
    for (DType dtype : dtypes)
      for (FeatureMap map : maps) {
        p.dtype = dtype, p.feature_map = map, p.normalize = !chance(random, 3);
        p.decayed = p.causal && chance(random, 2);
        check_problem(p, {chance(random, 2), chance(random, 2), chance(random, 2)}, random);
      }
  for (int n = 0; n < 150; n++) {
    const bool causal = chance(random, 2);
    const int64_t most = chance(random, 10) ? 1200 : 150, L = uniform(random, 1, most);
    Problem p =
        problem(uniform(random, 1, 2), uniform(random, 1, 3), L, causal ? L : uniform(random, 1, most),
                uniform(random, 1, 40), uniform(random, 1, 40), causal);
    p.dtype = dtypes[uniform(random, 0, 3)], p.feature_map = maps[uniform(random, 0, 3)];
    p.normalize = !chance(random, 3), p.decayed = causal && chance(random, 2);
    check_problem(p, {chance(random, 2), chance(random, 2), chance(random, 2)}, random);
  }
  std::printf("%d checks, %d failed\n", checks, failures);
  return failures || !checks;
}
