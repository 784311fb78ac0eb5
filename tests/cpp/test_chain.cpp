// Every CPU kernel of the chain family of every instruction set that this machine has, against the oracles; edge shapes
// and random ones from fixed seeds; every dtype, peaked inputs, -infinity and NaN among them. The oracles themselves
// are held against the sum over all paths, one by one, on problems small enough.
//
// Outputs lie between guards and begin as NaN, as do the workspaces; inputs are exactly as large as they are said to
// be, for a sanitizer. Each problem is run again in randomly cut ranges and must give the same bits.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "chain/crf.h"
#include "chain/ctc.h"
#include "common/numerics.h"
#include "kernel_test.h"

namespace {
using namespace pyseqnet;

DType sum_type(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }

int checks = 0, failures = 0;
void fail(const std::string& problem, const char* kernel, const std::string& words) {
  if (failures++ < 20) std::printf("FAILED %s %s: %s\n", kernel, problem.c_str(), words.c_str());
}
// `size`: of what an element is the difference of; NaN and infinities must be the same.
void compare(const std::string& problem, const char* kernel, const char* name, Array& got, Array& want,
             double size) {
  checks++;
  if (!got.guards_hold()) fail(problem, kernel, std::string(name) + ": wrote outside");
  const double storage = got.dtype == DType::bf16 ? 0x1p-7 : got.dtype == DType::f16 ? 0x1p-10 : 0;
  for (int64_t i = 0; i < want.count; i++) {
    const double a = got.at(i), b = want.at(i);
    if ((std::isnan(a) && std::isnan(b)) || a == b) continue;
    if (std::fabs(a - b) <= 0x1p-17 * size + (0x1p-18 + storage) * (std::fabs(b) + size * (storage > 0)))
      continue;
    return fail(problem, kernel,
                std::string(name) + "[" + std::to_string(i) + "] is " + std::to_string(a) + ", wanted " +
                    std::to_string(b));
  }
}
// ---------------------------------------------------------------- CTC

struct CtcCall {
  CtcProblem p;
  std::string words;
  Array x;
  std::vector<int64_t> targets, offsets, steps, counts;

  CtcCall(CtcProblem problem, double scale, bool faint, Random& random)
      : p(problem), x(random_array(p.dtype, p.T * p.B * p.C, random, scale)) {
    words = describe(p) + " scale " + std::to_string(scale) + (faint ? " faint" : "");
    p.x_t = p.B * p.C, p.x_b = p.C, p.longest = p.S;
    for (int64_t b = 0; b < p.B; b++) {
      const int64_t m = p.C > 1 ? (faint ? p.S : uniform(random, 0, p.S)) : 0;
      offsets.push_back(int64_t(targets.size())), counts.push_back(m);
      steps.push_back(faint ? p.T : uniform(random, 0, p.T));
      for (int64_t j = 0; j < m; j++) {
        int64_t label = uniform(random, 0, p.C - 2);
        targets.push_back(label + (label >= p.blank));
      }
    }
    p.targets_size = int64_t(targets.size());
    // The blank is all but certain, and yet hardly a step is free for it: the states that count vanish at first.
    for (int64_t row = 0; faint && row < p.T * p.B; row++) x.set(row * p.C + p.blank, 40);
  }
  CtcTensors tensors(Array& loss, Array* gx) {
    CtcTensors t;
    t.x = x.data(), t.targets = targets.data(), t.target_offsets = offsets.data();
    t.input_lengths = steps.data(), t.target_lengths = counts.data();
    t.loss = loss.data(), t.gx = gx ? gx->data() : nullptr;
    return t;
  }
};

// Loss by adding up every path that collapses to the target.
double enumerated(CtcCall& c, int64_t b) {
  const int64_t n = c.steps[size_t(b)], m = c.counts[size_t(b)];
  double sum = 0;
  std::vector<int64_t> path(size_t(n), 0);
  for (bool more = true; more;) {
    std::vector<int64_t> collapsed;
    double log_p = 0;
    for (int64_t t = 0; t < n; t++) {
      const int64_t row = t * c.p.x_t + b * c.p.x_b;
      double norm = 0;
      for (int64_t k = 0; k < c.p.C; k++) norm += std::exp(c.x.at(row + k));
      log_p += c.x.at(row + path[size_t(t)]) - (c.p.from_logits ? std::log(norm) : 0);
      if (path[size_t(t)] != c.p.blank && (t == 0 || path[size_t(t)] != path[size_t(t - 1)]))
        collapsed.push_back(path[size_t(t)]);
    }
    if (int64_t(collapsed.size()) == m &&
        std::equal(collapsed.begin(), collapsed.end(), c.targets.begin() + c.offsets[size_t(b)]))
      sum += std::exp(log_p);
    more = false;
    for (int64_t t = 0; t < n && !more; t++) {
      more = ++path[size_t(t)] < c.p.C;
      if (!more) path[size_t(t)] = 0;
    }
  }
  return sum == 0 && c.p.zero_infinity ? 0 : -std::log(sum);
}

void check_ctc(const CtcProblem& problem, double scale, bool faint, Random& random) {
  CtcCall c(problem, scale, faint, random);
  const int64_t elements = c.p.T * c.p.B * c.p.C;
  const auto table = ctc_cpu_table();
  const CtcCpuKernel& oracle = *table.kernels[table.count - 1];
  Array loss(sum_type(c.p.dtype), c.p.B, true), gx(c.p.dtype, elements, true);
  execute(oracle, c.p, c.tensors(loss, &gx), nullptr);
  for (int64_t b = 0; c.p.dtype == DType::f64 && b < c.p.B; b++)
    if (std::pow(double(c.p.C), double(c.steps[size_t(b)])) < 3000) {
      checks++;
      const double want = enumerated(c, b), got = loss.at(b);
      if (got != want && !(std::fabs(got - want) < 1e-9 * (1 + std::fabs(want))))
        fail(c.words, "oracle", "loss is " + std::to_string(got) + ", wanted " + std::to_string(want));
    }
  for (int k = 0; k + 1 < table.count; k++) {
    const CtcCpuKernel& kernel = *table.kernels[k];
    if (!available(kernel) || kernel.refuses(c.p)) continue;
    Array l1(loss.dtype, c.p.B, true), l2 = l1, l3 = l1, g1(c.p.dtype, elements, true), g2 = g1;
    execute(kernel, c.p, c.tensors(l1, &g1), nullptr);
    execute(kernel, c.p, c.tensors(l2, &g2), &random);
    CtcProblem alone = c.p;
    alone.with_gradient = false;
    execute(kernel, alone, c.tensors(l3, nullptr), &random);
    compare(c.words, kernel.name, "loss", l1, loss, 1);
    compare(c.words, kernel.name, "loss alone", l3, loss, 1);
    // In the log domain a posterior is as good as its logarithm is: of the size of the loss.
    double largest = 1;
    for (int64_t b = 0; b < c.p.B; b++)
      if (std::isfinite(loss.at(b))) largest = std::max(largest, std::fabs(loss.at(b)));
    compare(c.words, kernel.name, "gradient", g1, gx, std::max(1.0, 0.1 * largest));
    if (l1.bytes != l2.bytes || g1.bytes != g2.bytes)
      fail(c.words, kernel.name, "depends on how the work is cut");
  }
}

// ---------------------------------------------------------------- CRF

struct CrfCall {
  CrfProblem p;
  std::string words;
  Array e, start, end, transitions, g;
  std::vector<int64_t> lengths, tags;

  CrfCall(CrfProblem problem, double scale, bool forbidden, Random& random)
      : p(problem),
        e(random_array(p.dtype, p.B * p.T * p.C, random, scale)),
        start(random_array(sum_type(p.dtype), p.C, random)),
        end(random_array(sum_type(p.dtype), p.C, random)),
        transitions(random_array(sum_type(p.dtype), p.C * p.C, random, scale)),
        g(random_array(sum_type(p.dtype), p.B, random)) {
    words = describe(p) + " scale " + std::to_string(scale) + (forbidden ? " forbidden" : "");
    p.e_b = p.T * p.C, p.e_t = p.C;
    for (int64_t b = 0; b < p.B; b++) lengths.push_back(uniform(random, 1, p.T));
    for (int64_t i = 0; i < p.B * p.T; i++) tags.push_back(uniform(random, 0, p.C - 1));
    // Staying is allowed always, so that some sequence is.
    for (int64_t i = 0; forbidden && i < p.C; i++)
      for (int64_t j = 0; j < p.C; j++)
        if (i != j && chance(random, 3)) transitions.set(i * p.C + j, -HUGE_VAL);
  }
  CrfTensors inputs() {
    CrfTensors t;
    t.e = e.data(), t.start = start.data(), t.end = end.data(), t.transitions = transitions.data();
    t.g = g.data(), t.lengths = lengths.data(), t.tags = p.with_tags ? tags.data() : nullptr;
    return t;
  }
  double score(int64_t b, const std::vector<int64_t>& y) {
    double sum = start.at(y[0]) + end.at(y.back());
    for (size_t t = 0; t < y.size(); t++) {
      sum += e.at(b * p.e_b + int64_t(t) * p.e_t + y[t]);
      if (t) sum += transitions.at(y[t - 1] * p.C + y[t]);
    }
    return sum;
  }
};

struct CrfResults {
  Array llh, ge, gstart, gend, gtransitions, scores;
  std::vector<int64_t> paths;
  explicit CrfResults(const CrfProblem& p)
      : llh(sum_type(p.dtype), p.B, true),
        ge(p.dtype, p.B * p.T * p.C, true),
        gstart(llh.dtype, p.C, true),
        gend(llh.dtype, p.C, true),
        gtransitions(llh.dtype, p.C * p.C, true),
        scores(llh.dtype, p.B, true),
        paths(size_t(p.B * p.T), -7) {}
  CrfTensors tensors(CrfTensors t) {
    t.llh = llh.data(), t.ge = ge.data(), t.gstart = gstart.data(), t.gend = gend.data();
    t.gtransitions = gtransitions.data(), t.scores = scores.data(), t.paths = paths.data();
    return t;
  }
  void run(int kernel, CrfCall& c, Random* cuts) {
    for (CrfPass pass : all_crf_passes)
      execute(*crf_cpu_table(pass).kernels[kernel], c.p, tensors(c.inputs()), cuts);
  }
};

// logZ and the best score over all C^n sequences.
void check_crf_oracle(CrfCall& c, CrfResults& r) {
  for (int64_t b = 0; b < c.p.B; b++) {
    const size_t n = size_t(c.lengths[size_t(b)]);
    if (std::pow(double(c.p.C), double(n)) > 3000) continue;
    double sum = 0, best = -HUGE_VAL;
    std::vector<int64_t> y(n, 0);
    for (bool more = true; more;) {
      const double score = c.score(b, y);
      sum = best < score ? sum * std::exp(best - score) + 1 : sum + std::exp(score - best);
      best = std::max(best, score);
      more = false;
      for (size_t t = 0; t < n && !more; t++) {
        more = ++y[t] < c.p.C;
        if (!more) y[t] = 0;
      }
    }
    const auto given = c.tags.begin() + b * c.p.T;
    const double tagged = c.p.with_tags ? c.score(b, {given, given + int64_t(n)}) : 0;
    const double want = tagged - best - std::log(sum);
    checks += 2;
    if (r.llh.at(b) != want && !(std::fabs(r.llh.at(b) - want) < 1e-9 * (1 + std::fabs(want))))
      fail(c.words, "oracle", "llh is " + std::to_string(r.llh.at(b)) + ", wanted " + std::to_string(want));
    if (std::fabs(r.scores.at(b) - best) > 1e-9 * (1 + std::fabs(best)))
      fail(c.words, "oracle", "best is " + std::to_string(r.scores.at(b)) + ", not " + std::to_string(best));
  }
}

void check_crf(const CrfProblem& problem, double scale, bool forbidden, Random& random) {
  CrfCall c(problem, scale, forbidden, random);
  const int count = crf_cpu_table(CrfPass::gradient).count;
  CrfResults want(c.p);
  want.run(count - 1, c, nullptr);
  if (c.p.dtype == DType::f64) check_crf_oracle(c, want);
  for (int k = 0; k + 1 < count; k++) {
    const CrfCpuKernel& kernel = *crf_cpu_table(CrfPass::gradient).kernels[k];
    if (!available(kernel) || kernel.refuses(c.p)) continue;
    CrfResults got(c.p), cut(c.p);
    got.run(k, c, nullptr);
    cut.run(k, c, &random);
    const double terms = scale * double(c.p.T + 8);
    compare(c.words, kernel.name, "llh", got.llh, want.llh, terms);
    compare(c.words, kernel.name, "ge", got.ge, want.ge, 4 * scale + 4);
    compare(c.words, kernel.name, "gstart", got.gstart, want.gstart, (4 * scale + 4) * double(c.p.B));
    compare(c.words, kernel.name, "gend", got.gend, want.gend, (4 * scale + 4) * double(c.p.B));
    compare(c.words, kernel.name, "gtransitions", got.gtransitions, want.gtransitions,
            (4 * scale + 4) * double(c.p.B * c.p.T));
    compare(c.words, kernel.name, "scores", got.scores, want.scores, terms);
    // A path of the same score will do where two come close.
    for (int64_t b = 0; b < c.p.B; b++) {
      const auto row = got.paths.begin() + b * c.p.T;
      const double score = c.score(b, {row, row + c.lengths[size_t(b)]});
      if (!(std::fabs(score - want.scores.at(b)) <= 0x1p-17 * terms))
        fail(c.words, kernel.name, "the path has score " + std::to_string(score));
      for (int64_t t = c.lengths[size_t(b)]; t < c.p.T; t++)
        if (row[t] != -1) fail(c.words, kernel.name, "a path goes on behind the end");
    }
    if (got.llh.bytes != cut.llh.bytes || got.ge.bytes != cut.ge.bytes || got.paths != cut.paths ||
        got.gtransitions.bytes != cut.gtransitions.bytes)
      fail(c.words, kernel.name, "depends on how the work is cut");
  }
}

}  // namespace

int main() {
  Random random(30);
  constexpr DType dtypes[] = {DType::f32, DType::bf16, DType::f16, DType::f64};
  constexpr double scales[] = {1, 1, 4, 30, 100};
  for (int n = 0; n < 300; n++) {
    CtcProblem p;
    const bool small = chance(random, 3);
    p.dtype = dtypes[uniform(random, 0, 3)];
    p.T = uniform(random, 1, small ? 6 : 150), p.B = uniform(random, 1, 3);
    p.C = uniform(random, 1, small ? 3 : 70),
    p.S = uniform(random, 0, std::min<int64_t>(p.T, small ? 3 : 60));
    p.blank = uniform(random, 0, p.C - 1);
    p.from_logits = p.C > 1 && !chance(random, 3), p.with_gradient = true,
    p.zero_infinity = chance(random, 2);
    check_ctc(p, p.from_logits ? scales[uniform(random, 0, 4)] : 1, false, random);
    if (small || p.C == 1) continue;
    p.S = p.T - uniform(random, 0, std::min<int64_t>(p.T, 3)), p.from_logits = true;
    check_ctc(p, 1, true, random);
  }
  for (int n = 0; n < 200; n++) {
    CrfProblem p;
    const bool small = chance(random, 3);
    p.dtype = dtypes[uniform(random, 0, 3)];
    p.B = uniform(random, 1, 19), p.T = uniform(random, 1, small ? 5 : 40),
    p.C = uniform(random, 1, small ? 4 : 70);
    p.with_tags = chance(random, 2);
    check_crf(p, scales[uniform(random, 0, 4)], chance(random, 3), random);
  }
  std::printf("%d checks, %d failed\n", checks, failures);
  return failures || !checks;
}
