// The tensor-core kernels of softmax attention against the oracle. What no query sees and what sees no key
// holds NaN, and so do the gaps of strided tensors.
// Sources: attention/attention_forward_sm80.cu attention/attention_backward_sm80.cu
// Sources: attention/attention_forward_sm90a.cu
// Sources: attention/attention_reference.cpp
#include <memory>

#include "attention/attention_math.h"
#include "attention_pattern.h"
#include "harness.h"

namespace pyseqnet {
extern const AttentionCpuKernel attention_reference_forward, attention_reference_delta,
    attention_reference_backward;
extern const AttentionCudaKernel attention_forward_sm80, attention_forward_sm90a, attention_backward_sm80;
}  // namespace pyseqnet

using namespace pyseqnet;
using namespace pyseqnet::testing;

namespace {

constexpr const AttentionCudaKernel* forward_kernels[] = {&attention_forward_sm80, &attention_forward_sm90a};
constexpr const AttentionCudaKernel* backward_kernels[] = {&attention_backward_sm80};

// How a (B, H, N, channels) tensor lies in memory.
enum class Form { heads_outside, heads_inside, padded, expanded };

struct Options {
  AttentionProblem p;
  Form form = Form::heads_outside;
  double logits = 1;  // factor of the queries
  int window = 0, stride = 0;
};

std::string label(const Options& o) {
  const AttentionProblem& p = o.p;
  char words[300];
  std::snprintf(words, sizeof words,
                "%s B%lld H%lld/%lld L%lld S%lld D%lld E%lld form %d logits %g%s%s offset %lld%s%s",
                name_of(p.dtype), (long long)p.B, (long long)p.H, (long long)p.Hk, (long long)p.L,
                (long long)p.S, (long long)p.D, (long long)p.E, int(o.form), o.logits,
                p.with_key_lengths ? " lengths" : "", p.causal ? " causal" : "", (long long)p.causal_offset,
                p.need_q && p.need_kv ? "" : " partial", p.with_blocks ? " pattern" : "");
  return words;
}

struct Strided {
  AttentionStrides strides;
  Tensor tensor;
  static int64_t line(Form form, int64_t channels) { return form == Form::padded ? channels + 16 : channels; }
  Strided(DType dtype, Form form, int64_t B, int64_t H, int64_t N, int64_t channels, const char* name)
      : tensor(kind_of(dtype), B * H * N * line(form, channels), name) {
    const int64_t n = line(form, channels);
    strides = form == Form::heads_inside ? AttentionStrides{N * H * n, n, H * n}
                                         : AttentionStrides{H * N * n, N * n, n};
    if (form == Form::expanded) strides.h = 0;
  }
  // Normal deviates, and NaN in the lines for which `poisoned` says so.
  template <class F>
  void fill(Random& random, int64_t B, int64_t H, int64_t N, int64_t channels, double scale, F poisoned) {
    for (int64_t b = 0; b < B; b++)
      for (int64_t h = 0; h < H; h++)
        for (int64_t n = 0; n < N; n++)
          for (int64_t c = 0; c < channels; c++)
            tensor.set(b * strides.b + h * strides.h + n * strides.n + c,
                       poisoned(b, h, n) ? NAN : scale * random.normal());
    tensor.upload();
  }
};

// The tensors of one problem.
class Case {
 public:
  Case(Suite& suite, const Options& o) : suite_(suite), random_(suite.random), p(o.p), logits_(o.logits) {
    const auto make = [&](Form form, int64_t H, int64_t N, int64_t channels, const char* name) {
      return std::make_unique<Strided>(p.dtype, form, p.B, H, N, channels, name);
    };
    const Form out_form = o.form == Form::expanded ? Form::heads_outside : o.form;
    q = make(out_form, p.H, p.L, p.D, "q"), k = make(o.form, p.Hk, p.S, p.D, "k");
    v = make(o.form, p.Hk, p.S, p.E, "v"), gout = make(o.form, p.H, p.L, p.E, "gout");
    out = make(out_form, p.H, p.L, p.E, "out"), want_out = make(out_form, p.H, p.L, p.E, "want out");
    gq = make(out_form, p.H, p.L, p.D, "gq"), want_gq = make(out_form, p.H, p.L, p.D, "want gq");
    gk = make(out_form, p.Hk, p.S, p.D, "gk"), want_gk = make(out_form, p.Hk, p.S, p.D, "want gk");
    gv = make(out_form, p.Hk, p.S, p.E, "gv"), want_gv = make(out_form, p.Hk, p.S, p.E, "want gv");
    p.q_strides = q->strides, p.k_strides = k->strides, p.v_strides = v->strides;
    p.gout_strides = gout->strides, p.out_strides = out->strides;
    p.gq_strides = gq->strides, p.gk_strides = gk->strides, p.gv_strides = gv->strides;
    const int64_t rows = p.B * p.H * p.L;
    const auto statistic = [&](const char* name) { return std::make_unique<Tensor>(Kind::f32, rows, name); };
    lse = statistic("lse"), want_lse = statistic("want lse");
    delta = statistic("delta");
    lengths = std::make_unique<Tensor>(Kind::i64, p.B, "key lengths");
    // Some of them below 0 or beyond S.
    for (int64_t b = 0; b < p.B; b++) lengths->set(b, double(b == 0 ? p.S * 2 / 3 : random_.in(-2, p.S + 2)));
    lengths->upload();

    if (p.with_blocks) make_pattern(o);
    const bool expanded = o.form == Form::expanded;
    const auto blind = [&](int64_t b, int64_t h, int64_t i) { return !expanded && !query_sees_any(b, h, i); };
    const auto unseen = [&](int64_t b, int64_t h, int64_t j) { return !expanded && !key_is_seen(b, h, j); };
    q->fill(random_, p.B, p.H, p.L, p.D, o.logits, blind);
    k->fill(random_, p.B, p.Hk, p.S, p.D, 1, unseen);
    v->fill(random_, p.B, p.Hk, p.S, p.E, 1, unseen);
    gout->fill(random_, p.B, p.H, p.L, p.E, 1, blind);
  }

  void check() {
    AttentionTensors host, device;
    host.q = q->tensor.host(), host.k = k->tensor.host(), host.v = v->tensor.host();
    host.gout = gout->tensor.host(), host.out = want_out->tensor.host(), host.lse = want_lse->host();
    host.gq = want_gq->tensor.host(), host.gk = want_gk->tensor.host(), host.gv = want_gv->tensor.host();
    host.delta = delta->host();
    host.key_lengths = static_cast<int64_t*>(lengths->host());
    device.q = q->tensor.device(), device.k = k->tensor.device(), device.v = v->tensor.device();
    device.gout = gout->tensor.device(), device.out = out->tensor.device(), device.lse = lse->device();
    device.gq = gq->tensor.device(), device.gk = gk->tensor.device(), device.gv = gv->tensor.device();
    device.delta = delta->device();
    device.key_lengths = static_cast<int64_t*>(lengths->device());
    if (p.with_blocks) {
      host.blocks = blocks_of([](Tensor& t) { return t.host(); });
      device.blocks = blocks_of([](Tensor& t) { return t.device(); });
    }
    p.lines_aligned = lines_are_aligned(p, device);

    run_cpu(attention_reference_forward, p, host);
    for (const AttentionCudaKernel* kernel : forward_kernels) {
      const Refusal why = kernel->refuses(p);
      if ((why != accepted) != expects_refusal(*kernel))
        suite_.fail(kernel->name, why ? why : "accepts this");
      if (why) continue;
      suite_.check(
          kernel->name, {&out->tensor, lse.get()}, [&] { return run_cuda(*kernel, p, device); },
          [&] {
            const double eps = epsilon_of(p.dtype);
            const std::string wrong = difference(*lse, *want_lse, 2e-5, 2e-6);
            return wrong.empty() ? difference(out->tensor, want_out->tensor, 0.5 * eps, eps) : wrong;
          });
    }
    run_cpu(attention_reference_delta, p, host);
    run_cpu(attention_reference_backward, p, host);
    std::memcpy(lse->host(), want_lse->host(), want_lse->bytes().size());
    lse->upload(), delta->upload();
    for (const AttentionCudaKernel* kernel : backward_kernels) {
      if (const Refusal why = kernel->refuses(p)) {
        suite_.fail(kernel->name, why);
        continue;
      }
      std::vector<Tensor*> results;
      if (p.need_q) results.push_back(&gq->tensor);
      if (p.need_kv) results.push_back(&gk->tensor), results.push_back(&gv->tensor);
      suite_.check(
          kernel->name, results, [&] { return run_cuda(*kernel, p, device); },
          [&] {
            std::string wrong;
            if (p.need_q) wrong = compare_gradient(gq->tensor, want_gq->tensor);
            if (p.need_kv && wrong.empty()) wrong = compare_gradient(gk->tensor, want_gk->tensor);
            if (p.need_kv && wrong.empty()) wrong = compare_gradient(gv->tensor, want_gv->tensor);
            return wrong;
          });
    }
  }

 private:
  // TMA knows no stride of 0.
  bool expects_refusal(const AttentionCudaKernel& kernel) const {
    return kernel.min_capability == 90 && (p.S == 0 || p.with_blocks || (k->strides.h == 0 && p.Hk > 1));
  }
  // Weights and gradients of logits are rounded to 16 bits: errors as large as a unit in the last place of the
  // largest terms, which are of the order of the largest results.
  std::string compare_gradient(const Tensor& got, const Tensor& want) const {
    double largest = 0;
    for (int64_t i = 0; i < want.count(); i++)
      if (std::isfinite(want.at(i))) largest = std::max(largest, std::fabs(want.at(i)));
    const double eps = epsilon_of(p.dtype);
    // Of logits of the order of 1e4, float holds three decimals.
    return difference(got, want, logits_ > 1 ? 0.1 : eps * std::max(0.5, 0.5 * largest), eps);
  }
  bool sees(int64_t b, int64_t h, int64_t i, int64_t j) const {
    const int64_t length = p.with_key_lengths ? clamped_length(int64_t(lengths->at(b)), p.S) : p.S;
    if (j >= visible_keys(p.causal, p.causal_offset, length, i)) return false;
    return !p.with_blocks || pattern_[size_t((p.block_heads == 1 ? 0 : h) * p.L + i)][size_t(j)];
  }
  // A window and a stride; heads with odd numbers see every fifth key, and their first queries nothing. The
  // first 64 queries of a window of 100 and more see everything: full tiles.
  void make_pattern(const Options& o) {
    const int64_t from = random_.in(0, 60);
    const auto pair = [&](int64_t h, int64_t i, int64_t j) {
      if (h % 2) return j % 5 == 0 && i > from;
      return std::abs(i - j) <= o.window || (o.stride > 0 && (i - j) % o.stride == 0) ||
             (o.window >= 100 && i < 64);
    };
    pattern_.assign(size_t(p.block_heads * p.L), std::vector<bool>(size_t(p.S)));
    for (int64_t h = 0; h < p.block_heads; h++)
      for (int64_t i = 0; i < p.L; i++)
        for (int64_t j = 0; j < p.S; j++) pattern_[size_t(h * p.L + i)][size_t(j)] = pair(h, i, j);
    const PatternLists lists(p.block_heads, p.L, p.S, pair);
    p.block_entries = int64_t(lists.row_entries.size());
    lists_ = {copy_of(lists.row_begin, Kind::i32),   copy_of(lists.column_begin, Kind::i32),
              copy_of(lists.row_order, Kind::i32),   copy_of(lists.column_order, Kind::i32),
              copy_of(lists.row_entries, Kind::i32), copy_of(lists.column_entries, Kind::i32),
              copy_of(lists.bits, Kind::i64)};
  }
  template <class V>
  static std::shared_ptr<Tensor> copy_of(const std::vector<V>& values, Kind kind) {
    const size_t bytes = values.size() * sizeof(V);
    auto tensor = std::make_shared<Tensor>(kind, int64_t(bytes) / testing::bytes_of(kind), "pattern");
    if (bytes) std::memcpy(tensor->host(), values.data(), bytes);
    tensor->upload();
    return tensor;
  }
  template <class F>
  AttentionBlocks blocks_of(F place) const {
    const auto int32s = [&](int n) { return static_cast<const int32_t*>(place(*lists_[size_t(n)])); };
    const auto entries = [&](int n) { return reinterpret_cast<const AttentionBlockEntry*>(int32s(n)); };
    AttentionBlocks blocks;
    blocks.row_begin = int32s(0), blocks.column_begin = int32s(1);
    blocks.row_order = int32s(2), blocks.column_order = int32s(3);
    blocks.row_entries = entries(4), blocks.column_entries = entries(5);
    blocks.bits = static_cast<const uint64_t*>(place(*lists_[6]));
    return blocks;
  }
  bool query_sees_any(int64_t b, int64_t h, int64_t i) const {
    for (int64_t j = 0; j < p.S; j++)
      if (sees(b, h, i, j)) return true;
    return false;
  }
  bool key_is_seen(int64_t b, int64_t kv, int64_t j) const {
    for (int64_t h = kv * p.group(); h < (kv + 1) * p.group(); h++)
      for (int64_t i = 0; i < p.L; i++)
        if (sees(b, h, i, j)) return true;
    return false;
  }

  Suite& suite_;
  Random& random_;
  AttentionProblem p;
  double logits_;
  std::vector<std::vector<bool>> pattern_;      // row head * L + query
  std::vector<std::shared_ptr<Tensor>> lists_;  // in the order of AttentionBlocks
  std::unique_ptr<Strided> q, k, v, gout, out, want_out, gq, want_gq, gk, want_gk, gv, want_gv;
  std::unique_ptr<Tensor> lse, want_lse, delta, lengths;
};

Options problem(int64_t B, int64_t Hk, int64_t group, int64_t L, int64_t S, int64_t D, int64_t E) {
  Options o;
  o.p.B = B, o.p.Hk = Hk, o.p.H = Hk * group;
  o.p.L = L, o.p.S = S, o.p.D = D, o.p.E = E;
  o.p.scale = 1 / std::sqrt(double(D));
  return o;
}
Options causal(Options o, int64_t offset) {
  o.p.causal = true, o.p.causal_offset = offset;
  return o;
}
Options lengths(Options o) {
  o.p.with_key_lengths = true;
  return o;
}
Options lying(Options o, Form form) {
  o.form = form;
  return o;
}
Options large_logits(Options o, double factor) {
  o.logits = factor;
  return o;
}

Options partial(Options o, bool need_q, bool need_kv) {
  o.p.need_q = need_q, o.p.need_kv = need_kv;
  return o;
}

Options pattern(Options o, int64_t heads, int window, int stride) {
  o.p.with_blocks = true, o.p.block_heads = heads, o.window = window, o.stride = stride;
  return o;
}

void check_problem(Suite& suite, Options o, DType dtype) {
  o.p.dtype = dtype;
  if (!suite.begin(label(o))) return;
  Case(suite, o).check();
}

}  // namespace

int main(int argc, char** argv) {
  Suite suite(argc, argv);
  const Options edges[] = {
      problem(1, 1, 1, 1, 1, 8, 8),
      problem(0, 1, 1, 3, 3, 8, 8),
      problem(1, 1, 1, 0, 5, 8, 8),
      problem(1, 1, 1, 5, 0, 8, 8),
      problem(1, 1, 1, 130, 330, 40, 64),
      causal(problem(1, 1, 1, 200, 200, 64, 64), 0),
      causal(problem(1, 1, 2, 3, 270, 64, 24), 267),
      causal(problem(1, 1, 1, 150, 100, 72, 128), -40),
      lengths(lying(problem(2, 1, 2, 70, 150, 128, 128), Form::padded)),
      lengths(causal(problem(2, 2, 1, 65, 129, 128, 120), 64)),
      lying(problem(1, 2, 1, 64, 200, 256, 256), Form::heads_inside),
      causal(problem(1, 1, 1, 100, 130, 200, 136), 30),
      lying(problem(1, 2, 1, 20, 64, 16, 32), Form::expanded),
      large_logits(causal(problem(1, 1, 1, 64, 64, 64, 64), 0), 1e4),
      problem(1, 1, 1, 70, 700, 64, 64),  // more tiles of keys than stages of the ring
      causal(problem(1, 1, 1, 300, 400, 80, 96), 100),
      lengths(problem(20, 7, 1, 5, 140, 16, 8)),  // more work than blocks run at once
      pattern(problem(1, 1, 1, 200, 200, 64, 64), 1, 30, 0),
      pattern(causal(problem(1, 1, 2, 150, 330, 128, 72), 0), 2, 100, 7),
      pattern(lengths(problem(2, 2, 1, 70, 300, 40, 40)), 1, 100, 0),
      pattern(problem(2, 1, 2, 130, 100, 256, 136), 2, 5, 40),
      pattern(problem(1, 1, 1, 5, 0, 8, 8), 1, 3, 0),
      partial(problem(1, 1, 2, 6, 7, 8, 8), true, false),
      partial(problem(1, 1, 2, 6, 7, 8, 8), false, true),
  };
  bool turn = false;
  for (const Options& o : edges) {
    turn = !turn;
    check_problem(suite, o, turn ? DType::bf16 : DType::f16);
  }
  for (int n = 0; n < suite.random_problems / 3; n++) {
    Random& random = suite.random;
    constexpr int64_t widest[] = {8, 8, 16, 32};
    Options o = problem(random.in(1, 2), random.in(1, 2), random.in(1, 2), random.in(1, 200),
                        random.in(1, 200), 8 * random.in(1, random.any(widest)), 8 * random.in(1, 8));
    if (random.chance(0.5)) o = causal(o, random.in(-60, 60));
    if (random.chance(0.5)) o = lengths(o);
    if (random.chance(0.4))
      o = pattern(o, random.chance(0.5) ? 1 : o.p.H, int(random.in(0, 120)), int(random.in(0, 50)));
    constexpr Form forms[] = {Form::heads_outside, Form::heads_inside, Form::padded, Form::expanded};
    o.form = random.any(forms);
    check_problem(suite, o, random.chance(0.5) ? DType::bf16 : DType::f16);
  }
  return suite.finish();
}
