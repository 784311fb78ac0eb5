// Every CUDA kernel of CTC and CRF against the oracles: all dtypes, ragged lengths, repeated labels, forbidden
// transitions, sequences and labels that are not valid, and NaN beyond what may be read.
// Sources: chain/ctc_generic.cu chain/ctc_reference.cpp chain/crf_generic.cu chain/crf_reference.cpp
#include "chain/crf.h"
#include "chain/ctc.h"
#include "harness.h"

namespace pyseqnet {
extern const CtcCpuKernel ctc_reference;
extern const CtcCudaKernel ctc_cuda;
extern const CrfCpuKernel crf_reference_log_likelihood, crf_reference_gradient, crf_reference_viterbi;
extern const CrfCudaKernel crf_log_likelihood_cuda, crf_gradient_cuda, crf_viterbi_cuda;
}  // namespace pyseqnet

using namespace pyseqnet;
using namespace pyseqnet::testing;

namespace {

constexpr DType all_dtypes[] = {DType::f32, DType::bf16, DType::f16, DType::f64};

// Log-domain sums of `terms` values of size up to `size`, and what is stored in a dtype.
double slack(DType dtype, double size) { return (dtype == DType::f64 ? 0x1p-46 : 0x1p-18) * (1 + size); }
DType sum_dtype(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }

// ---------------------------------------------------------------- CTC

void check_ctc(Suite& suite, CtcProblem p, bool invalid) {
  char words[200];
  std::snprintf(words, sizeof words, "ctc %s T%lld B%lld C%lld S%lld%s%s%s", name_of(p.dtype), (long long)p.T,
                (long long)p.B, (long long)p.C, (long long)p.longest, p.from_logits ? " logits" : "",
                p.zero_infinity ? " zero" : "", invalid ? " invalid" : "");
  if (!suite.begin(words)) return;
  Random& random = suite.random;
  p.with_gradient = true;
  p.S = std::min(p.T, p.longest), p.targets_size = p.B * p.longest;
  p.x_b = p.C + 1, p.x_t = p.B * p.x_b;  // a gap behind each row
  p.blank = p.C - 1;
  const Kind element = kind_of(p.dtype), number = kind_of(sum_dtype(p.dtype));
  Tensor x(element, p.T * p.x_t, "x"), targets(Kind::i64, p.targets_size, "targets"),
      offsets(Kind::i64, p.B, "offsets");
  Tensor steps(Kind::i64, p.B, "input_lengths"), counts(Kind::i64, p.B, "target_lengths");
  Tensor loss(number, p.B, "loss"), want_loss(number, p.B, "want loss");
  Tensor gx(element, p.T * p.B * p.C, "gx"), want_gx(element, gx.count(), "want gx");
  fill(x, random);
  for (int64_t b = 0; b < p.B; b++) {
    offsets.set(b, double(b * p.longest));
    steps.set(b, double(invalid && b % 3 == 0 ? p.T + 1 : random.in(0, p.T)));
    counts.set(b, double(random.in(0, p.longest)));
    for (int64_t j = 0; j < p.longest; j++)
      targets.set(b * p.longest + j,
                  double(p.C > 1 && !(invalid && b % 3 == 1) ? random.in(0, std::min<int64_t>(p.C - 2, 2))
                                                             : p.blank));
    for (int64_t step = 0; step < p.T; step++) {
      x.set(step * p.x_t + b * p.x_b + p.C, NAN);
      for (int64_t c = 0; c < p.C; c++) {
        const int64_t at = step * p.x_t + b * p.x_b + c;
        x.set(at, step >= int64_t(steps.at(b)) ? NAN : p.from_logits ? 4 * x.at(at) : -2 - x.at(at));
      }
    }
  }
  if (invalid && p.T && p.B > 2) x.set(2 * p.x_b, INFINITY), steps.set(2, double(p.T));
  for (Tensor* t : {&x, &targets, &offsets, &steps, &counts}) t->upload();
  CtcTensors host, device;
  host.x = x.host(), device.x = x.device(), host.loss = want_loss.host(), device.loss = loss.device();
  host.gx = want_gx.host(), device.gx = gx.device();
  const auto integers = [&](auto member, Tensor& t) {
    host.*member = static_cast<const int64_t*>(t.host()),
    device.*member = static_cast<const int64_t*>(t.device());
  };
  integers(&CtcTensors::targets, targets), integers(&CtcTensors::target_offsets, offsets);
  integers(&CtcTensors::input_lengths, steps), integers(&CtcTensors::target_lengths, counts);
  run_cpu(ctc_reference, p, host);
  const double size = 8.0 * double(p.T);
  const auto wrong_loss = [&] {
    return difference(loss, want_loss, slack(p.dtype, size), epsilon_of(sum_dtype(p.dtype)));
  };
  suite.check(
      "loss and gradient", {&loss, &gx}, [&] { return run_cuda(ctc_cuda, p, device); },
      [&] { return wrong_loss() + difference(gx, want_gx, slack(p.dtype, size), 2 * epsilon_of(p.dtype)); });
  CtcProblem alone = p;
  alone.with_gradient = false;
  device.gx = nullptr;
  suite.check("loss alone", {&loss}, [&] { return run_cuda(ctc_cuda, alone, device); }, wrong_loss);
}

CtcProblem ctc_problem(int64_t T, int64_t B, int64_t C, int64_t longest) {
  CtcProblem p;
  p.T = T, p.B = B, p.C = C, p.longest = longest;
  return p;
}

// ---------------------------------------------------------------- CRF

struct CrfOptions {
  bool tags, forbidden, invalid;
};

void check_crf(Suite& suite, CrfProblem p, const CrfOptions& o) {
  char words[200];
  std::snprintf(words, sizeof words, "crf %s B%lld T%lld C%lld nbest %lld%s%s%s", name_of(p.dtype),
                (long long)p.B, (long long)p.T, (long long)p.C, (long long)p.nbest, o.tags ? " tags" : "",
                o.forbidden ? " forbidden" : "", o.invalid ? " invalid" : "");
  if (!suite.begin(words)) return;
  Random& random = suite.random;
  p.with_tags = o.tags;
  p.e_t = p.B * (p.C + 1), p.e_b = p.C + 1;  // time first, a gap behind each row
  const Kind element = kind_of(p.dtype), number = kind_of(sum_dtype(p.dtype));
  Tensor e(element, p.T * p.e_t, "e"), tags(Kind::i64, p.B * p.T, "tags"), lengths(Kind::i64, p.B, "lengths");
  Tensor start(number, p.C, "start"), end(number, p.C, "end"), transitions(number, p.C * p.C, "transitions");
  Tensor g(number, p.B, "g");
  for (Tensor* t : {&e, &start, &end, &transitions, &g}) fill(*t, random);
  for (int64_t i = 0; o.forbidden && i < p.C; i++)
    transitions.set(i * p.C + (i + 1) % p.C, p.C > 1 ? -INFINITY : 0);
  for (int64_t b = 0; b < p.B; b++) {
    lengths.set(b, double(o.invalid && b % 3 == 0 ? (b % 2 ? 0 : p.T + 1) : random.in(1, p.T)));
    const int64_t tag = random.in(0, p.C - 1);  // the same all the way: never forbidden
    for (int64_t step = 0; step < p.T; step++) {
      const bool real = step < int64_t(lengths.at(b));
      tags.set(b * p.T + step, double(!real || (o.invalid && b % 3 == 1) ? -100
                                      : o.forbidden                      ? tag
                                                                         : random.in(0, p.C - 1)));
      for (int64_t c = 0; c <= p.C; c++) {
        const int64_t at = step * p.e_t + b * p.e_b + c;
        e.set(at, real && c < p.C ? 3 * e.at(at) : NAN);
      }
    }
  }
  for (Tensor* t : {&e, &tags, &lengths, &transitions}) t->upload();
  Tensor llh(number, p.B, "llh"), want_llh(number, p.B, "want llh");
  Tensor ge(element, p.B * p.T * p.C, "ge"), want_ge(element, ge.count(), "want ge");
  Tensor gstart(number, p.C, "gstart"), want_gstart(number, p.C, "want gstart");
  Tensor gend(number, p.C, "gend"), want_gend(number, p.C, "want gend");
  Tensor gtransitions(number, p.C * p.C, "gtransitions"),
      want_gtransitions(number, p.C * p.C, "want gtransitions");
  Tensor paths(Kind::i64, p.B * p.nbest * p.T, "paths"), want_paths(Kind::i64, paths.count(), "want paths");
  Tensor scores(number, p.B * p.nbest, "scores"), want_scores(number, scores.count(), "want scores");
  CrfTensors host, device;
  const auto both = [&](auto member, Tensor& on_host, Tensor& on_device) {
    host.*member = on_host.host(), device.*member = on_device.device();
  };
  using T = CrfTensors;
  both(&T::e, e, e), both(&T::start, start, start), both(&T::end, end, end), both(&T::g, g, g);
  both(&T::transitions, transitions, transitions), both(&T::llh, want_llh, llh), both(&T::ge, want_ge, ge);
  both(&T::gstart, want_gstart, gstart), both(&T::gend, want_gend, gend),
      both(&T::scores, want_scores, scores);
  both(&T::gtransitions, want_gtransitions, gtransitions);
  host.lengths = static_cast<const int64_t*>(lengths.host());
  device.lengths = static_cast<const int64_t*>(lengths.device());
  host.paths = static_cast<int64_t*>(want_paths.host()), device.paths = static_cast<int64_t*>(paths.device());
  if (o.tags) {
    host.tags = static_cast<const int64_t*>(tags.host());
    device.tags = static_cast<const int64_t*>(tags.device());
  }
  run_cpu(crf_reference_log_likelihood, p, host);
  run_cpu(crf_reference_gradient, p, host);
  const double size = 6.0 * double(p.T);
  const double sums = slack(p.dtype, size), shared = sums * double(p.B * p.T + 1),
               eps = epsilon_of(sum_dtype(p.dtype));
  suite.check(
      "log-likelihood", {&llh}, [&] { return run_cuda(crf_log_likelihood_cuda, p, device); },
      [&] { return difference(llh, want_llh, sums, eps); });
  suite.check(
      "gradient", {&ge, &gstart, &gend, &gtransitions},
      [&] { return run_cuda(crf_gradient_cuda, p, device); },
      [&] {
        return difference(ge, want_ge, sums, 2 * epsilon_of(p.dtype)) +
               difference(gstart, want_gstart, shared, eps) + difference(gend, want_gend, shared, eps) +
               difference(gtransitions, want_gtransitions, shared, eps);
      });
  // Viterbi knows no tags. Scores are sums in another precision: paths are compared where no two scores are near.
  host.tags = device.tags = nullptr;
  p.with_tags = false;
  run_cpu(crf_reference_viterbi, p, host);
  suite.check(
      "viterbi", {&paths, &scores}, [&] { return run_cuda(crf_viterbi_cuda, p, device); },
      [&] {
        std::string said = difference(scores, want_scores, sums, eps);
        for (int64_t b = 0; b < p.B; b++)
          for (int64_t r = 0; r < p.nbest; r++) {
            const auto near = [&](int64_t other) {
              return other >= 0 && other < p.nbest &&
                     std::fabs(want_scores.at(b * p.nbest + other) - want_scores.at(b * p.nbest + r)) <
                         4 * sums;
            };
            if (near(r - 1) || near(r + 1) || r + 1 == p.nbest) continue;
            for (int64_t step = 0; step < p.T; step++) {
              const int64_t at = (b * p.nbest + r) * p.T + step;
              if (paths.at(at) != want_paths.at(at)) said += "another path; ";
            }
          }
        return said;
      });
}

CrfProblem crf_problem(int64_t B, int64_t T, int64_t C, int64_t nbest) {
  CrfProblem p;
  p.B = B, p.T = T, p.C = C, p.nbest = nbest;
  return p;
}

void check_edges(Suite& suite) {
  const CtcProblem ctc_edges[] = {
      ctc_problem(1, 1, 2, 1),      // one step, one label
      ctc_problem(0, 2, 3, 2),      // no steps
      ctc_problem(3, 0, 3, 2),      // no batch
      ctc_problem(4, 3, 1, 0),      // blank alone
      ctc_problem(9, 4, 33, 3),     // classes beyond a warp
      ctc_problem(20, 2, 5, 20),    // many repeats
      ctc_problem(90, 2, 140, 70),  // states and classes beyond a block
  };
  int number = 0;
  for (CtcProblem p : ctc_edges)
    for (DType dtype : {DType::f32, all_dtypes[1 + number % 3]}) {
      p.dtype = dtype, p.from_logits = number % 2, p.zero_infinity = number % 3 == 1;
      check_ctc(suite, p, number % 4 > 1);
      number++;
    }
  const CrfProblem crf_edges[] = {
      crf_problem(1, 1, 1, 2),  // one of everything; more paths asked for than there are
      crf_problem(0, 3, 2, 1),  // no batch
      crf_problem(4, 5, 3, 4),   crf_problem(36, 2, 2, 1),  // more sequences than shares
      crf_problem(2, 3, 131, 2),                            // tags beyond a block
  };
  for (CrfProblem p : crf_edges)
    for (DType dtype : {DType::f32, all_dtypes[1 + number % 3]}) {
      p.dtype = dtype;
      check_crf(suite, p, {number % 2 == 1, number % 3 == 1, number % 5 == 2});
      number++;
    }
}

void check_random(Suite& suite) {
  Random& random = suite.random;
  for (int k = 0; k < suite.random_problems; k++) {
    CtcProblem ctc = ctc_problem(random.in(1, 25), random.in(1, 4), random.in(2, 40), random.in(0, 9));
    ctc.dtype = random.any(all_dtypes), ctc.from_logits = random.chance(0.5),
    ctc.zero_infinity = random.chance(0.3);
    check_ctc(suite, ctc, random.chance(0.3));
    CrfProblem crf = crf_problem(random.in(1, 5), random.in(1, 9), random.in(1, 40), random.in(1, 3));
    crf.dtype = random.any(all_dtypes);
    check_crf(suite, crf, {random.chance(0.6), random.chance(0.4), random.chance(0.3)});
  }
}

}  // namespace

int main(int argc, char** argv) {
  Suite suite(argc, argv);
  check_edges(suite);
  check_random(suite);
  return suite.finish();
}
