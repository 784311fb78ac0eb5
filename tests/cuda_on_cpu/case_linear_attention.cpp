// Every CUDA kernel of linear attention against the oracle: forward (outputs, states, what backward needs)
// and backward from the oracle's own forward; all dtypes, feature maps and options, both orders of heads and
// rows, padding full of NaN.
// Sources: linear_attention/linear_attention_generic.cu
// Sources: linear_attention/linear_attention_forward_sm80.cu
// Sources: linear_attention/linear_attention_reference.cpp
#include "common/residency.cuh"
#include "harness.h"
#include "linear_attention/linear_attention.h"

namespace pyseqnet {
extern const LinearAttentionCpuKernel linear_attention_reference_forward, linear_attention_reference_backward;
extern const LinearAttentionCudaKernel linear_attention_forward_cuda, linear_attention_backward_cuda,
    linear_attention_forward_sm80;
}  // namespace pyseqnet

using namespace pyseqnet;
using namespace pyseqnet::testing;

namespace {

using Problem = LinearAttentionProblem;

constexpr DType all_dtypes[] = {DType::f32, DType::bf16, DType::f16, DType::f64};
constexpr FeatureMap all_maps[] = {FeatureMap::identity, FeatureMap::elu, FeatureMap::relu, FeatureMap::exp};

struct Options {
  bool lengths, states, rows_first;
  bool decayed = false, packed = false;  // packed: B sequences, L the length of the longest
};

std::string label(const Problem& p, const Options& o) {
  char words[300];
  std::snprintf(words, sizeof words, "%s %s B%lld H%lld L%lld S%lld D%lld E%lld%s%s%s%s%s%s%s",
                name_of(p.dtype), name_of(p.feature_map), (long long)p.B, (long long)p.H, (long long)p.L,
                (long long)p.S, (long long)p.D, (long long)p.E, p.causal ? " causal" : "",
                p.normalize ? " normalised" : "", o.lengths ? " lengths" : "", o.states ? " states" : "",
                o.rows_first ? " rows first" : "", o.decayed ? " decayed" : "", o.packed ? " packed" : "");
  return words;
}

HeadStrides strides_of(const Problem& p, int64_t rows, int64_t width, bool rows_first) {
  if (rows_first) return {rows * p.H * width, width, p.H * width};
  return {p.H * rows * width, rows * width, width};
}

double largest(const Tensor& t) {
  double most = 0;
  for (int64_t i = 0; i < t.count(); i++) most = std::max(most, std::fabs(t.at(i)));
  return most;
}
// Sums of float products, rounded once to the storage type.
std::string wrong(const Tensor& got, const Tensor& want, DType stored, DType computed, double terms = 0) {
  const double sum = computed == DType::f64 ? 0x1p-44 : 0x1p-16;
  return difference(got, want, sum * std::max(largest(want), terms), sum + epsilon_of(stored));
}

// Beyond a key's length: what must not be read.
void poison_rows(Tensor& t, const Problem& p, const HeadStrides& s, int64_t width, const Tensor& lengths) {
  for (int64_t b = 0; b < p.B; b++)
    for (int64_t h = 0; h < p.H; h++)
      for (int64_t j = int64_t(lengths.at(b)); j < p.S; j++)
        for (int64_t x = 0; x < width; x++) t.set(b * s.b + h * s.h + j * s.row + x, NAN);
  t.upload();
}

// The first rows of sequences one behind the other, none longer than `longest`, and the end of the last.
std::vector<int32_t> random_starts(Random& random, int64_t sequences, int64_t longest) {
  std::vector<int32_t> starts = {0};
  for (int64_t b = 0; b < sequences; b++) starts.push_back(starts.back() + int32_t(random.in(0, longest)));
  return starts;
}

void check_problem(Suite& suite, Problem p, const Options& o) {
  if (!suite.begin(label(p, o))) return;
  p.with_saved = true;
  p.scale = 0.75, p.eps = p.softmax() ? 0 : 1e-2;
  p.decayed = o.decayed && p.causal, p.packed = o.packed;
  const std::vector<int32_t> first = random_starts(suite.random, p.B, p.L);
  const int64_t sequences = p.B, longest = p.L;
  if (p.packed) p.B = 1, p.L = p.S = p.total = first.back();  // what the tensors hold, for now
  p.q = p.dq = strides_of(p, p.L, p.D, o.rows_first);
  p.k = p.dk = strides_of(p, p.S, p.D, o.rows_first);
  p.v = p.dv = strides_of(p, p.S, p.E, o.rows_first);
  p.out = p.gout = strides_of(p, p.L, p.E, o.rows_first);
  const int64_t query_rows = p.heads() * p.L, key_rows = p.heads() * p.S;
  if (p.packed) {
    p.B = sequences, p.L = p.S = longest;
    for (HeadStrides* s : {&p.q, &p.k, &p.v, &p.out, &p.gout, &p.dq, &p.dk, &p.dv}) s->b = 0;
  }
  const Kind element = kind_of(p.dtype);
  const DType accumulation = p.dtype == DType::f64 ? DType::f64 : DType::f32;
  const Kind number = kind_of(accumulation);
  const int64_t heads = p.heads(), matrix = heads * p.D * p.E, vector = heads * p.D;

  Tensor q(element, query_rows * p.D, "q"), k(element, key_rows * p.D, "k");
  Tensor v(element, key_rows * p.E, "v"), gout(element, query_rows * p.E, "gout");
  Tensor decay(Kind::f64, p.H, "decay"), starts(Kind::i32, p.B + 1, "starts");
  constexpr double strengths[] = {0.9, 0.5, 0.99, 1, 0, 0.999};
  for (int64_t h = 0; h < p.H; h++) decay.set(h, strengths[h % 6]);
  for (int64_t b = 0; b <= p.B; b++) starts.set(b, double(first[size_t(b)]));
  decay.upload(), starts.upload();
  Tensor lengths(Kind::i64, p.B, "lengths"), state0(number, matrix, "state0"), z0(number, vector, "z0");
  Tensor gstate(number, matrix, "gstate"), gz(number, vector, "gz");
  fill(q, suite.random), fill(k, suite.random), fill(v, suite.random), fill(gout, suite.random);
  fill(state0, suite.random), fill(gstate, suite.random), fill(gz, suite.random);
  const bool positive = p.feature_map == FeatureMap::identity && p.normalize;
  for (Tensor* t : {&q, &k}) {  // sums near zero have no accuracy to compare
    for (int64_t i = 0; positive && i < t->count(); i++) t->set(i, std::fabs(t->at(i)));
    t->upload();
  }
  for (int64_t i = 0; i < vector; i++) z0.set(i, suite.random.uniform());
  z0.upload();
  for (int64_t b = 0; b < p.B; b++) lengths.set(b, double(suite.random.in(-1, p.S + 1)));
  lengths.upload();
  // A query without a gradient may hold anything: the first row of the first head.
  for (int64_t e = 0; query_rows > 0 && e < p.E; e++) gout.set(e, 0);
  gout.upload();
  if (o.lengths) {
    Tensor inside(Kind::i64, p.B, "inside");
    for (int64_t b = 0; b < p.B; b++) inside.set(b, std::max(0.0, std::min(double(p.S), lengths.at(b))));
    poison_rows(k, p, p.k, p.D, inside);
    poison_rows(v, p, p.v, p.E, inside);
  }

  Tensor out(element, query_rows * p.E, "out"), want_out(element, out.count(), "want out");
  Tensor inverse(number, query_rows, "inverse"), want_inverse(number, inverse.count(), "want inverse");
  const int64_t saved_states = p.packed && p.causal ? p.H * p.slots() : heads * p.saved_states();
  const int64_t saved_count = saved_states * p.state_size();
  Tensor saved(number, saved_count, "saved"), want_saved(number, saved_count, "want saved");
  Tensor state(number, matrix, "state"), want_state(number, matrix, "want state");
  Tensor z(number, vector, "z"), want_z(number, vector, "want z");
  Tensor dq(element, q.count(), "dq"), want_dq(element, q.count(), "want dq");
  Tensor dk(element, k.count(), "dk"), want_dk(element, k.count(), "want dk");
  Tensor dv(element, v.count(), "dv"), want_dv(element, v.count(), "want dv");
  Tensor dstate(number, matrix, "dstate0"), want_dstate(number, matrix, "want dstate0");
  Tensor dz(number, vector, "dz0"), want_dz(number, vector, "want dz0");
  Tensor shares(number, p.decayed ? saved_states : 0, "decay's shares");
  Tensor want_shares(number, shares.count(), "want shares");
  for (Tensor* t : {&shares, &want_shares}) {
    for (int64_t i = 0; i < t->count(); i++) t->set(i, 0);
    t->upload();
  }

  LinearAttentionTensors host, device;
  const auto both = [&](auto member, Tensor& on_host, Tensor& on_device) {
    host.*member = on_host.host(), device.*member = on_device.device();
  };
  using T = LinearAttentionTensors;
  both(&T::q, q, q), both(&T::k, k, k), both(&T::v, v, v), both(&T::gout, gout, gout);
  both(&T::out, want_out, out), both(&T::saved, want_saved, saved);
  both(&T::dq, want_dq, dq), both(&T::dk, want_dk, dk), both(&T::dv, want_dv, dv);
  if (p.normalize) both(&T::inverse, want_inverse, inverse);
  if (o.lengths) {
    host.key_lengths = static_cast<const int64_t*>(lengths.host());
    device.key_lengths = static_cast<const int64_t*>(lengths.device());
  }
  if (p.decayed) {
    host.decay = static_cast<const double*>(decay.host());
    device.decay = static_cast<const double*>(decay.device());
  }
  if (p.decayed) both(&T::ddecay, want_shares, shares);
  if (p.packed) {
    host.starts = static_cast<const int32_t*>(starts.host());
    device.starts = static_cast<const int32_t*>(starts.device());
  }
  if (o.states) {
    both(&T::state0, state0, state0), both(&T::normalizer0, z0, z0);
    both(&T::state, want_state, state), both(&T::normalizer, want_z, z);
    both(&T::gstate, gstate, gstate), both(&T::gnormalizer, gz, gz);
    both(&T::dstate0, want_dstate, dstate), both(&T::dnormalizer0, want_dz, dz);
  }
  // Places that no sequence has are never written, and never read.
  for (int64_t i = 0; i < saved_count; i++) want_saved.set(i, NAN);
  run_cpu(linear_attention_reference_forward, p, host);
  run_cpu(linear_attention_reference_backward, p, host);

  std::vector<Tensor*> outputs = {&out, &saved};
  if (p.normalize) outputs.push_back(&inverse);
  if (o.states) outputs.insert(outputs.end(), {&state, &z});
  suite.check(
      "forward", outputs, [&] { return run_cuda(linear_attention_forward_cuda, p, device); },
      [&] {
        std::string words = wrong(out, want_out, p.dtype, accumulation);
        words += wrong(saved, want_saved, accumulation, accumulation);
        if (p.normalize) words += wrong(inverse, want_inverse, accumulation, accumulation);
        if (o.states) words += wrong(state, want_state, accumulation, accumulation);
        return o.states ? words + wrong(z, want_z, accumulation, accumulation) : words;
      });
  p.lines_aligned = p.D % 8 == 0 && p.E % 8 == 0;
  const bool on_tensor_cores = !linear_attention_forward_sm80.refuses(p);
  // Features, states and scores are rounded to 16 bits before they are multiplied.
  const auto roughly = [&](const Tensor& got, const Tensor& want) {
    return difference(got, want, 0x1p-7 * largest(want), 0x1p-7);
  };
  const auto rough_words = [&] {
    std::string words = roughly(out, want_out) + roughly(saved, want_saved);
    if (p.normalize) words += roughly(inverse, want_inverse);
    if (o.states) words += roughly(state, want_state) + roughly(z, want_z);
    return words;
  };
  constexpr int large_device = 232448, small_device = 101376;
  for (int shared_bytes : {large_device, small_device}) {
    if (!on_tensor_cores) break;
    simulated_device().shared_bytes = shared_bytes;
    suite.check(
        shared_bytes == large_device ? "tensor cores" : "tensor cores, little memory", outputs,
        [&] { return run_cuda(linear_attention_forward_sm80, p, device); }, rough_words);
  }
  // Without anything kept for backward the states live in the workspace.
  Problem forgetful = p;
  forgetful.with_saved = false;
  LinearAttentionTensors only = device;
  only.saved = only.inverse = nullptr;
  suite.check(
      "inference", {&out}, [&] { return run_cuda(linear_attention_forward_cuda, forgetful, only); },
      [&] { return wrong(out, want_out, p.dtype, accumulation); });
  if (on_tensor_cores)
    suite.check(
        "inference on tensor cores", {&out},
        [&] { return run_cuda(linear_attention_forward_sm80, forgetful, only); },
        [&] { return roughly(out, want_out); });

  // Independent of forward: from the oracle's own results.
  const auto copy = [](Tensor& to, const Tensor& from) {
    std::memcpy(to.host(), from.bytes().data(), from.bytes().size());
    to.upload();
  };
  copy(out, want_out), copy(inverse, want_inverse), copy(saved, want_saved);
  std::vector<Tensor*> gradients = {&dq, &dk, &dv};
  if (o.states) gradients.insert(gradients.end(), {&dstate, &dz});
  if (p.decayed && !p.packed) gradients.push_back(&shares);  // packed: spare places stay zero
  const auto fetch_shares = [&] {
    if (p.packed) shares.download();
  };
  // Which share holds which terms is a kernel's choice; their sums are compared, head by head.
  Tensor decay_sums(Kind::f64, p.H, "decay"), want_decay_sums(Kind::f64, p.H, "want decay");
  const auto add_shares = [&](const Tensor& t, Tensor& sums) {
    for (int64_t h = 0; h < p.H; h++) {
      double sum = 0;
      for (int64_t i = 0; i < t.count(); i++)
        sum += i / (p.packed ? p.slots() : p.chunks()) % p.H == h ? t.at(i) : 0.0;
      sums.set(h, sum);
    }
  };
  suite.check(
      "backward", gradients, [&] { return run_cuda(linear_attention_backward_cuda, p, device); },
      [&] {
        // Gradients of queries and keys are differences, of terms as large as those of values.
        const double terms = largest(want_dv);
        fetch_shares();
        std::string words = wrong(dq, want_dq, p.dtype, accumulation, terms);
        words += wrong(dk, want_dk, p.dtype, accumulation, terms) + wrong(dv, want_dv, p.dtype, accumulation);
        if (p.decayed) {
          add_shares(shares, decay_sums), add_shares(want_shares, want_decay_sums);
          words += wrong(decay_sums, want_decay_sums, accumulation, accumulation, terms * double(p.B * p.L));
        }
        if (o.states) words += wrong(dstate, want_dstate, accumulation, accumulation);
        return o.states ? words + wrong(dz, want_dz, accumulation, accumulation) : words;
      });
}

Problem problem(int64_t B, int64_t H, int64_t L, int64_t S, int64_t D, int64_t E, bool causal) {
  Problem p;
  p.B = B, p.H = H, p.L = L, p.S = S, p.D = D, p.E = E, p.causal = causal;
  return p;
}

void check_edges(Suite& suite) {
  const Problem edges[] = {
      problem(1, 1, 1, 1, 1, 1, true),       // one element
      problem(0, 2, 3, 3, 4, 4, true),       // no batch
      problem(1, 2, 0, 0, 3, 5, true),       // no rows: the state passes through
      problem(1, 1, 0, 5, 3, 5, false),      // no queries
      problem(1, 1, 5, 0, 3, 5, false),      // no keys
      problem(1, 2, 64, 64, 16, 16, true),   // one whole chunk
      problem(2, 1, 65, 65, 5, 7, true),     // a chunk and one row
      problem(1, 1, 130, 130, 66, 3, true),  // two column tiles of D, three chunks
      problem(1, 1, 20, 20, 3, 67, true),    // two of E
      problem(1, 2, 3, 70, 9, 4, false),     // few queries, many keys
      problem(1, 1, 70, 3, 4, 9, false),     // the other way round
      problem(1, 1, 5, 1100, 2, 3, false),   // more chunks than parts
      problem(3, 2, 1, 1, 17, 33, true),     // a decoder's step
  };
  int number = 0;
  for (Problem p : edges) {
    // Every map, dtype and option meets every shape somewhere, not everything everywhere.
    for (DType dtype : {DType::f32, all_dtypes[1 + number % 3]}) {
      p.dtype = dtype, p.feature_map = all_maps[(number + 1) % 4], p.normalize = number % 4 != 2;
      check_problem(suite, p, {number % 2 == 1, number % 3 != 1, number % 5 < 2, number % 4 < 2});
      number++;
    }
  }
}

// Efficient attention.
void check_softmax(Suite& suite) {
  const Problem edges[] = {
      problem(1, 1, 1, 1, 1, 1, false),     problem(2, 2, 70, 90, 16, 9, false),
      problem(1, 1, 0, 5, 3, 5, false),     problem(1, 2, 5, 0, 3, 5, false),
      problem(1, 2, 5, 1100, 66, 3, false), problem(2, 1, 130, 20, 3, 67, false),
      problem(0, 2, 3, 3, 4, 4, false),
  };
  int number = 0;
  for (Problem p : edges) {
    for (DType dtype : {DType::f32, all_dtypes[1 + number % 3]}) {
      p.dtype = dtype, p.feature_map = FeatureMap::softmax;
      check_problem(suite, p, {number % 2 == 1, false, number % 4 < 2});
      if (p.L == p.S || number % 4 == 0) {
        Problem in_a_row = p;
        in_a_row.L = in_a_row.S = p.L < p.S ? p.S : p.L;
        check_problem(suite, in_a_row, {false, false, number % 4 < 2, false, true});
      }
      number++;
    }
  }
}

void check_packed(Suite& suite) {
  const Problem edges[] = {problem(3, 2, 150, 150, 9, 5, true), problem(4, 1, 70, 70, 66, 3, false),
                           problem(5, 2, 3, 3, 4, 67, true),    problem(0, 2, 3, 3, 4, 4, true),
                           problem(2, 0, 3, 3, 4, 4, false),    problem(7, 1, 66, 66, 3, 4, true)};
  int number = 0;
  for (Problem p : edges) {
    p.dtype = all_dtypes[number % 4], p.feature_map = all_maps[(number + 1) % 4],
    p.normalize = number % 3 != 2;
    check_problem(suite, p, {false, number % 2 == 0, number % 4 < 2, number % 3 < 2, true});
    number++;
  }
}

void check_tensor_cores(Suite& suite) {
  const Problem edges[] = {
      problem(1, 2, 64, 64, 64, 64, true),    problem(2, 1, 65, 65, 16, 24, true),
      problem(1, 1, 140, 140, 128, 72, true), problem(1, 1, 1100, 1100, 32, 8, true),  // segments
      problem(1, 2, 20, 20, 8, 128, true),    problem(1, 2, 0, 0, 8, 8, true),
      problem(1, 1, 1090, 1090, 72, 8, true),
  };
  int number = 0;
  for (Problem p : edges) {
    p.dtype = DType::bf16;
    for (bool decayed : {false, true}) {
      p.feature_map = all_maps[number % 4], p.normalize = number % 3 != 1;
      check_problem(suite, p, {number % 4 >= 2, number % 3 != 0, number % 2 == 0, decayed});
      number++;
    }
  }
  Problem p = problem(3, 2, 150, 150, 64, 32, true);
  p.dtype = DType::bf16;
  check_problem(suite, p, {false, true, true, true, true});
}

void check_random(Suite& suite) {
  Random& random = suite.random;
  for (int k = 0; k < suite.random_problems; k++) {
    const bool causal = random.chance(0.6);
    const int64_t L = random.in(1, 150), S = causal ? L : random.in(1, 150);
    Problem p = problem(random.in(1, 2), random.in(1, 2), L, S, random.in(1, 24), random.in(1, 24), causal);
    p.dtype = random.any(all_dtypes), p.feature_map = random.any(all_maps), p.normalize = random.chance(0.7);
    const bool packed = L == S && random.chance(0.3);
    check_problem(
        suite, p,
        {!packed && random.chance(0.4), random.chance(0.5), random.chance(0.3), random.chance(0.4), packed});
  }
}

}  // namespace

int main(int argc, char** argv) {
  Suite suite(argc, argv);
  check_edges(suite);
  check_packed(suite);
  check_softmax(suite);
  check_tensor_cores(suite);
  check_random(suite);
  return suite.finish();
}
