// Every CUDA kernel of additive attention against the oracle: forward, weights, and backward from the oracle's
// own forward; all dtypes and options, padding full of NaN.
// Sources: attention/additive_generic.cu attention/additive_reference.cpp
#include "attention/additive.h"
#include "harness.h"

namespace pyseqnet {
extern const AdditiveCpuKernel additive_reference_forward, additive_reference_weights,
    additive_reference_backward;
extern const AdditiveCudaKernel additive_forward_cuda, additive_weights_cuda, additive_backward_cuda;
}  // namespace pyseqnet

using namespace pyseqnet;
using namespace pyseqnet::testing;

namespace {

using Problem = AdditiveProblem;

constexpr DType all_dtypes[] = {DType::f32, DType::bf16, DType::f16, DType::f64};

struct Options {
  bool heads_inside;  // rows are further apart than they are wide
  bool scores, value;
};

std::string label(const Problem& p, const Options& o) {
  char words[200];
  std::snprintf(words, sizeof words, "%s B%lld L%lld S%lld D%lld E%lld%s%s%s%s%s%s", name_of(p.dtype),
                (long long)p.B, (long long)p.L, (long long)p.S, (long long)p.D, (long long)p.E,
                p.with_bias ? " bias" : "", p.with_key_lengths ? " lengths" : "",
                p.with_gweights ? " gweights" : "", o.heads_inside ? " apart" : "",
                o.scores ? "" : " no scores", o.value ? "" : " no value");
  return words;
}

double largest(const Tensor& t) {
  double most = 0;
  for (int64_t i = 0; i < t.count(); i++) most = std::max(most, std::fabs(t.at(i)));
  return most;
}
// Sums of float products, rounded once to the storage type. Gradients may cancel to nothing: with one key they are
// 0, and what is left are ulps of their terms.
std::string wrong(const Tensor& got, const Tensor& want, DType stored, DType computed) {
  const double sum = computed == DType::f64 ? 0x1p-42 : 0x1p-15;
  return difference(got, want, sum * largest(want) + (computed == DType::f64 ? 0x1p-44 : 0x1p-16),
                    sum + epsilon_of(stored));
}

void check_problem(Suite& suite, Problem p, const Options& o) {
  p.need_scores = o.scores, p.need_value = o.value;
  if (!suite.begin(label(p, o))) return;
  const Kind element = kind_of(p.dtype);
  const DType accumulation = p.dtype == DType::f64 ? DType::f64 : DType::f32;
  const Kind number = kind_of(accumulation);
  const int64_t gap = o.heads_inside ? 3 : 0;
  const auto strides = [&](int64_t rows, int64_t width) {
    return AdditiveStrides{rows * (width + gap), width + gap};
  };
  p.q = strides(p.L, p.D), p.k = strides(p.S, p.D), p.v = strides(p.S, p.E), p.gout = strides(p.L, p.E);

  Tensor q(element, p.B * p.q.b, "q"), k(element, p.B * p.k.b, "k"), v(element, p.B * p.v.b, "v");
  Tensor w(element, p.D, "w"), bias(element, p.D, "bias"), lengths(Kind::i64, p.B, "lengths");
  Tensor gout(element, p.B * p.gout.b, "gout"), gweights(element, p.B * p.L * p.S, "gweights");
  for (Tensor* t : {&q, &k, &v, &w, &bias, &gout, &gweights}) fill(*t, suite.random);
  for (int64_t b = 0; b < p.B; b++) {
    const int64_t length = suite.random.in(0, p.S);
    lengths.set(b, length);
    if (!p.with_key_lengths) continue;
    for (int64_t j = length; j < p.S; j++) {
      for (int64_t d = 0; d < p.D; d++) k.set(b * p.k.b + j * p.k.n + d, NAN);
      for (int64_t e = 0; e < p.E; e++) v.set(b * p.v.b + j * p.v.n + e, NAN);
    }
  }
  k.upload(), v.upload(), lengths.upload();

  const int64_t rows = p.B * p.L, keys = p.B * p.S;
  Tensor out(element, rows * p.E, "out"), want_out(element, rows * p.E, "want out");
  Tensor lse(number, rows, "lse"), want_lse(number, rows, "want lse");
  Tensor weights(element, rows * p.S, "weights"), want_weights(element, rows * p.S, "want weights");
  Tensor gq(element, rows * p.D, "gq"), want_gq(element, rows * p.D, "want gq");
  Tensor gk(element, keys * p.D, "gk"), want_gk(element, keys * p.D, "want gk");
  Tensor gv(element, keys * p.E, "gv"), want_gv(element, keys * p.E, "want gv");
  Tensor gw(element, p.D, "gw"), want_gw(element, p.D, "want gw");
  Tensor gbias(element, p.D, "gbias"), want_gbias(element, p.D, "want gbias");

  AdditiveTensors host, device;
  const auto both = [&](auto member, Tensor& on_host, Tensor& on_device) {
    host.*member = on_host.host(), device.*member = on_device.device();
  };
  using T = AdditiveTensors;
  both(&T::q, q, q), both(&T::k, k, k), both(&T::v, v, v), both(&T::w, w, w), both(&T::gout, gout, gout);
  if (p.with_bias) both(&T::bias, bias, bias);
  if (p.with_key_lengths) {
    host.key_lengths = static_cast<const int64_t*>(lengths.host());
    device.key_lengths = static_cast<const int64_t*>(lengths.device());
  }
  if (p.with_gweights) both(&T::gweights, gweights, gweights);
  both(&T::out, want_out, out), both(&T::lse, want_lse, lse), both(&T::weights, want_weights, weights);
  both(&T::gq, want_gq, gq), both(&T::gk, want_gk, gk), both(&T::gv, want_gv, gv);
  both(&T::gw, want_gw, gw), both(&T::gbias, want_gbias, gbias);
  run_cpu(additive_reference_forward, p, host);
  run_cpu(additive_reference_weights, p, host);
  run_cpu(additive_reference_backward, p, host);

  suite.check(
      "forward", {&out, &lse}, [&] { return run_cuda(additive_forward_cuda, p, device); },
      [&] {
        return wrong(out, want_out, p.dtype, accumulation) + wrong(lse, want_lse, accumulation, accumulation);
      });
  // Independent of forward: from the oracle's own results.
  const auto copy = [](Tensor& to, const Tensor& from) {
    std::memcpy(to.host(), from.bytes().data(), from.bytes().size());
    to.upload();
  };
  copy(out, want_out), copy(lse, want_lse);
  suite.check(
      "weights", {&weights}, [&] { return run_cuda(additive_weights_cuda, p, device); },
      [&] { return wrong(weights, want_weights, p.dtype, accumulation); });
  copy(weights, want_weights);
  std::vector<Tensor*> gradients;
  if (p.need_scores) gradients = {&gq, &gk, &gw, &gbias};
  if (p.need_value) gradients.push_back(&gv);
  suite.check(
      "backward", gradients, [&] { return run_cuda(additive_backward_cuda, p, device); },
      [&] {
        std::string words = p.need_value ? wrong(gv, want_gv, p.dtype, accumulation) : "";
        if (!p.need_scores) return words;
        words += wrong(gq, want_gq, p.dtype, accumulation) + wrong(gk, want_gk, p.dtype, accumulation);
        return words + wrong(gw, want_gw, p.dtype, accumulation) +
               wrong(gbias, want_gbias, p.dtype, accumulation);
      });
}

Problem problem(int64_t B, int64_t L, int64_t S, int64_t D, int64_t E) {
  Problem p;
  p.B = B, p.L = L, p.S = S, p.D = D, p.E = E;
  return p;
}

void check_edges(Suite& suite) {
  const Problem edges[] = {
      problem(1, 1, 1, 1, 1),      // one element
      problem(0, 3, 3, 4, 4),      // no batch
      problem(2, 0, 5, 3, 5),      // no queries
      problem(2, 5, 0, 3, 5),      // no keys
      problem(1, 16, 32, 32, 32),  // whole tiles
      problem(2, 17, 33, 33, 5),   // tiles and one more
      problem(1, 3, 100, 5, 130),  // four tiles of keys, two sweeps over the values' channels
      problem(1, 50, 7, 130, 3),   // four tiles of queries, two sweeps over the channels
      problem(3, 1, 40, 17, 9),    // a decoder's step
  };
  int number = 0;
  for (Problem p : edges)
    for (DType dtype : {DType::f32, all_dtypes[1 + number / 2 % 3]}) {
      p.dtype = dtype, p.with_bias = number % 3 != 1, p.with_key_lengths = number % 2 == 1;
      p.with_gweights = number % 4 < 2;
      check_problem(suite, p, {number % 5 < 2, number % 7 != 3, number % 7 != 5});
      number++;
    }
}

void check_random(Suite& suite) {
  Random& random = suite.random;
  for (int k = 0; k < suite.random_problems / 2; k++) {
    Problem p =
        problem(random.in(1, 2), random.in(1, 40), random.in(1, 70), random.in(1, 24), random.in(1, 24));
    p.dtype = random.any(all_dtypes), p.with_bias = random.chance(0.5);
    p.with_key_lengths = random.chance(0.5), p.with_gweights = random.chance(0.5);
    check_problem(suite, p, {random.chance(0.5), random.chance(0.9), random.chance(0.9)});
  }
}

}  // namespace

int main(int argc, char** argv) {
  Suite suite(argc, argv);
  check_edges(suite);
  check_random(suite);
  return suite.finish();
}
