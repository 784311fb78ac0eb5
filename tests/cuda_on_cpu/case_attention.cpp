// Every CUDA kernel of softmax attention against the oracle, each pass from the oracle's own intermediate
// results. What no query sees and what sees no key holds NaN, and so do the gaps of strided tensors.
// Sources: attention/attention_generic.cu attention/attention_backward_generic.cu
// Sources: attention/attention_reference.cpp
#include <algorithm>
#include <memory>
#include <vector>

#include "attention/attention_math.h"
#include "attention_pattern.h"
#include "harness.h"

namespace pyseqnet {
extern const AttentionCpuKernel attention_reference_forward, attention_reference_weights,
    attention_reference_delta, attention_reference_backward, attention_reference_bias_gradient;
extern const AttentionCudaKernel attention_forward_cuda, attention_weights_cuda, attention_delta_cuda,
    attention_backward_cuda, attention_bias_gradient_cuda;
}  // namespace pyseqnet

using namespace pyseqnet;
using namespace pyseqnet::testing;

namespace {

constexpr DType all_dtypes[] = {DType::f32, DType::bf16, DType::f16, DType::f64};

// How a (B, H, N, channels) tensor lies in memory.
enum class Form { heads_outside, heads_inside, padded, unaligned, expanded_heads, expanded_batch, far_apart };

struct Options {
  AttentionProblem p;
  Form form = Form::heads_outside;
  // The bias is -infinity and the mask false with this probability.
  double hidden = 0.2;
  bool hide_a_row = false, hide_a_column = false;
  bool every_dtype = false, float_bias = false;
  int64_t window = 20, stride = 0;  // of a pattern; odd heads of several have another
  const char* words = "";
};

std::string label(const Options& o) {
  const AttentionProblem& p = o.p;
  char words[400];
  std::snprintf(
      words, sizeof words,
      "%s B%lld H%lld/%lld L%lld S%lld D%lld E%lld form %d%s%s %s %lldx%lldx%lldx%lld%s%s%s%s%s%s%s%s%s%s "
      "offset %lld %s",
      name_of(p.dtype), (long long)p.B, (long long)p.H, (long long)p.Hk, (long long)p.L, (long long)p.S,
      (long long)p.D, (long long)p.E, int(o.form), p.with_mask ? " mask" : "", p.with_bias ? " bias" : "",
      name_of(p.bias_dtype), (long long)p.bias_B, (long long)p.bias_H, (long long)p.bias_L,
      (long long)p.bias_S, p.with_blocks ? " pattern" : "", p.packed ? " packed" : "",
      p.with_slopes ? " alibi" : "", p.softcap > 0 ? " softcap" : "", p.causal ? " causal" : "",
      p.with_key_lengths ? " lengths" : "", p.dropout_p > 0 ? " dropout" : "",
      p.with_gweights ? " gweights" : "", p.with_glse ? " glse" : "", p.need_q && p.need_kv ? "" : " partial",
      (long long)p.causal_offset, o.words);
  return words;
}

// Strides of a tensor, the offset of its first element and the number of elements that hold it.
struct Place {
  AttentionStrides strides;
  int64_t first = 0, count = 0;
};
Place place_of(Form form, int64_t B, int64_t H, int64_t N, int64_t channels) {
  constexpr int64_t far = int64_t{1} << 26;
  Place place;
  const int64_t line = form == Form::padded      ? channels + 8 - channels % 8
                       : form == Form::far_apart ? far
                                                 : channels;
  place.strides = form == Form::heads_inside ? AttentionStrides{N * H * line, line, H * line}
                                             : AttentionStrides{H * N * line, N * line, line};
  place.count = B * H * N * line;
  if (form == Form::unaligned) place.first = 1, place.count++, place.strides.b++, place.count += B;
  if (form == Form::expanded_heads) place.strides.h = 0;
  if (form == Form::expanded_batch) place.strides.b = 0;
  return place;
}
int64_t element(const AttentionStrides& s, int64_t b, int64_t h, int64_t n) {
  return b * s.b + h * s.h + n * s.n;
}

struct Strided {
  Place place;
  Tensor tensor;
  Strided(DType dtype, Form form, int64_t B, int64_t H, int64_t N, int64_t channels, const char* name)
      : place(place_of(form, B, H, N, channels)), tensor(kind_of(dtype), place.count, name) {}
  char* at_first(void* p) const {
    return static_cast<char*>(p) + place.first * testing::bytes_of(tensor.kind());
  }
  void* host() { return at_first(tensor.host()); }
  void* device() { return at_first(tensor.device()); }
};

// Normal deviates, and NaN in the lines for which `poisoned` says so.
template <class F>
void fill_lines(Strided& t, Random& random, int64_t B, int64_t H, int64_t N, int64_t channels, double scale,
                F poisoned) {
  for (int64_t b = 0; b < B; b++)
    for (int64_t h = 0; h < H; h++)
      for (int64_t n = 0; n < N; n++)
        for (int64_t c = 0; c < channels; c++)
          t.tensor.set(t.place.first + element(t.place.strides, b, h, n) + c,
                       poisoned(b, h, n) ? NAN : scale * random.normal());
  t.tensor.upload();
}

// The tensors of one problem.
class Case {
 public:
  Case(Suite& suite, const Options& o) : suite_(suite), random_(suite.random), p(o.p), o_(o) {
    const bool expanded = o.form == Form::expanded_heads || o.form == Form::expanded_batch;
    const Form out_form = expanded ? Form::heads_outside : o.form;
    make_sequences();
    const int64_t B = p.packed ? 1 : p.B, L = p.packed ? p.total_q : p.L, S = p.packed ? p.total_k : p.S;
    const auto make = [&](Form form, int64_t H, int64_t N, int64_t channels, const char* name) {
      return std::make_unique<Strided>(p.dtype, form, B, H, N, channels, name);
    };
    q = make(out_form, p.H, L, p.D, "q"), k = make(o.form, p.Hk, S, p.D, "k");
    v = make(o.form, p.Hk, S, p.E, "v"), gout = make(o.form, p.H, L, p.E, "gout");
    out = make(out_form, p.H, L, p.E, "out"), want_out = make(out_form, p.H, L, p.E, "want out");
    gq = make(out_form, p.H, L, p.D, "gq"), want_gq = make(out_form, p.H, L, p.D, "want gq");
    gk = make(out_form, p.Hk, S, p.D, "gk"), want_gk = make(out_form, p.Hk, S, p.D, "want gk");
    gv = make(out_form, p.Hk, S, p.E, "gv"), want_gv = make(out_form, p.Hk, S, p.E, "want gv");
    p.q_strides = q->place.strides, p.k_strides = k->place.strides, p.v_strides = v->place.strides;
    p.gout_strides = gout->place.strides, p.out_strides = out->place.strides;
    p.gq_strides = gq->place.strides, p.gk_strides = gk->place.strides, p.gv_strides = gv->place.strides;

    const int64_t rows = B * p.H * L, pairs = p.B * p.H * p.L * p.S;
    const Kind statistic = p.dtype == DType::f64 ? Kind::f64 : Kind::f32, kind = kind_of(p.dtype);
    const Kind bias_kind = kind_of(p.bias_dtype);
    const int64_t bias_count = p.bias_B * p.bias_H * p.bias_L * p.bias_S;
    const auto dense = [&](Kind k, int64_t n, const char* name) {
      return std::make_unique<Tensor>(k, n, name);
    };
    lse = dense(statistic, rows, "lse"), want_lse = dense(statistic, rows, "want lse");
    delta = dense(statistic, rows, "delta"), want_delta = dense(statistic, rows, "want delta");
    glse = dense(statistic, rows, "glse");
    weights = dense(kind, pairs, "weights"), want_weights = dense(kind, pairs, "want weights");
    gweights = dense(kind, pairs, "gweights");
    mask = dense(Kind::u8, mask_count(), "mask"), bias = dense(bias_kind, bias_count, "bias");
    gbias = dense(bias_kind, bias_count, "gbias"), want_gbias = dense(bias_kind, bias_count, "want gbias");
    slopes = dense(statistic, p.B * p.H, "slopes");
    lengths = dense(Kind::i64, p.B, "key lengths"), seed = dense(Kind::i64, 1, "seed");
    p.bias_stride_s = p.bias_S > 1;
    p.bias_strides = {p.bias_B > 1 ? p.bias_H * p.bias_L * p.bias_S : 0,
                      p.bias_H > 1 ? p.bias_L * p.bias_S : 0, p.bias_L > 1 ? p.bias_S : 0};
    if (p.with_blocks) make_pattern();
    fill_masks();
    fill_tensors();
  }

  void check() {
    AttentionTensors host, device;
    host.q = q->host(), host.k = k->host(), host.v = v->host(), host.gout = gout->host();
    host.out = want_out->host(), host.gq = want_gq->host(), host.gk = want_gk->host();
    host.gv = want_gv->host(), host.lse = want_lse->host(), host.delta = want_delta->host();
    host.weights = want_weights->host(), host.gbias = want_gbias->host();
    host.mask = mask->host(), host.bias = bias->host(), host.slopes = slopes->host();
    host.cu_q = cu_q_.data(), host.cu_k = cu_k_.data();
    if (pattern) host.blocks = blocks_of([](Tensor& t) { return t.host(); });
    host.glse = glse->host(), host.gweights = gweights->host();
    host.key_lengths = static_cast<int64_t*>(lengths->host()),
    host.seed = static_cast<int64_t*>(seed->host());
    device.q = q->device(), device.k = k->device(), device.v = v->device(), device.gout = gout->device();
    device.out = out->device(), device.gq = gq->device(), device.gk = gk->device();
    device.gv = gv->device(), device.lse = lse->device(), device.delta = delta->device();
    device.weights = weights->device(), device.gbias = gbias->device();
    device.mask = mask->device(), device.bias = bias->device(), device.slopes = slopes->device();
    device.cu_q = static_cast<int32_t*>(cu_q->device()), device.cu_k = static_cast<int32_t*>(cu_k->device());
    if (pattern) device.blocks = blocks_of([](Tensor& t) { return t.device(); });
    device.glse = glse->device(), device.gweights = gweights->device();
    device.key_lengths = static_cast<int64_t*>(lengths->device());
    device.seed = static_cast<int64_t*>(seed->device());

    run_cpu(attention_reference_forward, p, host);
    run_cpu(attention_reference_weights, p, host);
    run_cpu(attention_reference_delta, p, host);
    run_cpu(attention_reference_backward, p, host);
    suite_.check(
        "forward", {&out->tensor, lse.get()}, [&] { return run_cuda(attention_forward_cuda, p, device); },
        [&] { return either(compare(out->tensor, want_out->tensor, 1), compare(*lse, *want_lse, 1)); });
    take(*want_lse, *lse);
    suite_.check(
        "weights", {weights.get()}, [&] { return run_cuda(attention_weights_cuda, p, device); },
        [&] { return compare(*weights, *want_weights, 1); });
    take(*want_weights, *weights);
    take(want_out->tensor, out->tensor);
    suite_.check(
        "delta", {delta.get()}, [&] { return run_cuda(attention_delta_cuda, p, device); },
        [&] { return compare(*delta, *want_delta, 2); });
    take(*want_delta, *delta);
    suite_.check(
        "backward", {&gq->tensor, &gk->tensor, &gv->tensor},
        [&] { return run_cuda(attention_backward_cuda, p, device); },
        [&] {
          std::string wrong;
          if (p.need_q) wrong = compare(gq->tensor, want_gq->tensor, 4);
          if (p.need_kv)
            wrong = either(wrong, either(compare(gk->tensor, want_gk->tensor, 4),
                                         compare(gv->tensor, want_gv->tensor, 4)));
          return wrong;
        });
    if (!p.with_bias) return;
    run_cpu(attention_reference_bias_gradient, p, host);
    suite_.check(
        "bias gradient", {gbias.get()}, [&] { return run_cuda(attention_bias_gradient_cuda, p, device); },
        [&] { return compare(*gbias, *want_gbias, 8, p.bias_dtype); });
  }

 private:
  // Sums of float32: of order 1, from terms of order 1. A 16-bit result is rounded once more.
  std::string compare(const Tensor& got, const Tensor& want, double factor) {
    return compare(got, want, factor, p.dtype);
  }
  std::string compare(const Tensor& got, const Tensor& want, double factor, DType stored) {
    const double unit = factor * 256 * (p.dtype == DType::f64 ? 0x1p-53 : 0x1p-24);
    const bool statistic = got.kind() == Kind::f32 || got.kind() == Kind::f64;
    return difference(got, want, unit, unit + (statistic ? 0 : epsilon_of(stored)));
  }
  static std::string either(const std::string& a, const std::string& b) { return a.empty() ? b : a; }
  static void take(Tensor& from, Tensor& to) {
    std::memcpy(to.host(), from.host(), from.bytes().size());
    to.upload();
  }

  // Ends of sequences of up to p.L and p.S positions; the first is as long.
  void make_sequences() {
    cu_q_ = cu_k_ = {0};
    for (int64_t b = 0; b < p.B; b++) {
      cu_q_.push_back(cu_q_.back() + int32_t(b == 0 ? p.L : random_.in(0, p.L)));
      cu_k_.push_back(cu_k_.back() + int32_t(b == 0 ? p.S : random_.in(0, p.S)));
    }
    p.total_q = cu_q_.back(), p.total_k = cu_k_.back();
    cu_q = copy_of(cu_q_, "cu_q"), cu_k = copy_of(cu_k_, "cu_k");
  }
  template <class V>
  static std::unique_ptr<Tensor> copy_of(const std::vector<V>& values, const char* name,
                                         Kind kind = Kind::i32) {
    const size_t bytes = values.size() * sizeof(V);
    auto tensor = std::make_unique<Tensor>(kind, int64_t(bytes) / testing::bytes_of(kind), name);
    if (bytes) std::memcpy(tensor->host(), values.data(), bytes);
    tensor->upload();
    return tensor;
  }
  void make_pattern() {
    const int64_t window = o_.window, stride = o_.stride;
    const int64_t from = random_.in(0, 60);
    const PatternLists lists(p.block_heads, p.L, p.S, [&](int64_t h, int64_t i, int64_t j) {
      if (h % 2) return j % 5 == 0 && i > from;
      return std::abs(i - j) <= window || (stride > 0 && (i - j) % stride == 0);
    });
    p.block_entries = int64_t(lists.row_entries.size());
    pattern = std::make_unique<Pattern>();
    pattern->row_begin = copy_of(lists.row_begin, "row begin"),
    pattern->bits = copy_of(lists.bits, "bits", Kind::i64);
    pattern->row_entries = copy_of(lists.row_entries, "row entries");
    pattern->column_begin = copy_of(lists.column_begin, "column begin");
    pattern->column_entries = copy_of(lists.column_entries, "column entries");
    pattern->row_order = copy_of(lists.row_order, "row order");
    pattern->column_order = copy_of(lists.column_order, "column order");
  }
  template <class F>
  AttentionBlocks blocks_of(F&& place) const {
    AttentionBlocks blocks;
    const auto int32s = [&](Tensor& t) { return static_cast<const int32_t*>(place(t)); };
    const auto entries = [&](Tensor& t) { return static_cast<const AttentionBlockEntry*>(place(t)); };
    blocks.row_begin = int32s(*pattern->row_begin), blocks.column_begin = int32s(*pattern->column_begin);
    blocks.row_order = int32s(*pattern->row_order), blocks.column_order = int32s(*pattern->column_order);
    blocks.row_entries = entries(*pattern->row_entries);
    blocks.column_entries = entries(*pattern->column_entries);
    blocks.bits = static_cast<const uint64_t*>(place(*pattern->bits));
    return blocks;
  }

  AttentionSequence sequence(int64_t b) const {
    return sequence_of(p, static_cast<const int64_t*>(lengths->host()), cu_q_.data(), cu_k_.data(), b);
  }
  bool sees(int64_t b, int64_t h, int64_t i, int64_t j) const {
    const AttentionSequence at = sequence(b);
    if (i >= at.L || j >= visible_keys(p.causal, at.causal_offset, at.length, i)) return false;
    if (p.with_blocks && !block_sees(blocks_of([](Tensor& t) { return t.host(); }), block_row(p, h, i), i, j))
      return false;
    if (p.with_mask && mask->at(element(p.mask_strides, b, h, i) + j * p.mask_stride_s) == 0) return false;
    return !p.with_bias || bias->at(element(p.bias_strides, b, h, i) + j * p.bias_stride_s) != -INFINITY;
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

  // The mask is one of (batch, 1, queries, keys).
  int64_t mask_count() const { return p.with_mask ? p.B * p.L * p.S : 1; }
  void fill_masks() {
    seed->set(0, double(random_.in(-1000, 1000)));
    seed->upload();
    for (int64_t n = 0; n < slopes->count(); n++) slopes->set(n, random_.uniform());
    slopes->upload();
    // Some of them below 0 or beyond S.
    for (int64_t b = 0; b < p.B; b++) lengths->set(b, double(b == 0 ? p.S * 2 / 3 : random_.in(-2, p.S + 2)));
    lengths->upload();
    p.mask_strides = {p.L * p.S, 0, p.S}, p.mask_stride_s = 1;
    const auto hides = [&](int64_t at, int64_t rows, int64_t columns, int64_t hidden_row,
                           int64_t hidden_column) {
      return random_.chance(o_.hidden) || (o_.hide_a_column && at % columns == hidden_column) ||
             (o_.hide_a_row && at / columns % rows == hidden_row);
    };
    const int64_t row = p.L > 0 ? random_.in(0, p.L - 1) : -1, column = p.S > 0 ? random_.in(0, p.S - 1) : -1;
    for (int64_t at = 0; p.with_mask && at < mask->count(); at++)
      mask->set(at, hides(at, p.L, p.S, row, column) ? 0 : 1);
    const int64_t bias_row = p.bias_L > 1 ? row : -1, bias_column = p.bias_S > 1 ? column : -1;
    for (int64_t at = 0; at < bias->count(); at++)
      bias->set(at, hides(at, p.bias_L, p.bias_S, bias_row, bias_column) ? -INFINITY : random_.normal());
    if (p.with_bias) poison_unreachable_bias();
    mask->upload(), bias->upload();
  }
  // Where length or causality hide a key from everybody, its bias may hold NaN.
  void poison_unreachable_bias() {
    if (p.bias_S == 1) return;
    for (int64_t j = 0; j < p.S; j++) {
      bool reached = false;
      for (int64_t b = 0; b < p.B; b++) {
        const AttentionSequence at = sequence(b);
        for (int64_t i = 0; i < at.L; i++)
          reached |= j < visible_keys(p.causal, at.causal_offset, at.length, i);
      }
      for (int64_t line = 0; !reached && line < bias->count() / p.bias_S; line++)
        bias->set(line * p.bias_S + j, NAN);
    }
  }

  void fill_tensors() {
    const auto never = [](int64_t, int64_t, int64_t) { return false; };
    const bool shared = o_.form == Form::expanded_heads || o_.form == Form::expanded_batch;
    // Of packed sequences, whose the position is.
    const auto sequence_at = [&](const std::vector<int32_t>& cu, int64_t n) {
      return int64_t(std::upper_bound(cu.begin(), cu.end(), int32_t(n)) - cu.begin()) - 1;
    };
    const auto blind = [&](int64_t b, int64_t h, int64_t i) {
      if (!p.packed) return !query_sees_any(b, h, i);
      const int64_t at = sequence_at(cu_q_, i);
      return !query_sees_any(at, h, i - cu_q_[size_t(at)]);
    };
    const auto unseen = [&](int64_t b, int64_t h, int64_t j) {
      if (!p.packed) return !key_is_seen(b, h, j);
      const int64_t at = sequence_at(cu_k_, j);
      return !key_is_seen(at, h, j - cu_k_[size_t(at)]);
    };
    const int64_t B = p.packed ? 1 : p.B, L = p.packed ? p.total_q : p.L, S = p.packed ? p.total_k : p.S;
    fill_lines(*q, random_, B, p.H, L, p.D, 1, blind);
    if (shared) {
      fill_lines(*k, random_, B, p.Hk, S, p.D, 1, never);
      fill_lines(*v, random_, B, p.Hk, S, p.E, 1, never);
      fill_lines(*gout, random_, B, p.H, L, p.E, 1, never);
    } else {
      fill_lines(*k, random_, B, p.Hk, S, p.D, 1, unseen);
      fill_lines(*v, random_, B, p.Hk, S, p.E, 1, unseen);
      fill_lines(*gout, random_, B, p.H, L, p.E, 1, blind);
    }
    fill(*glse, random_);
    fill(*gweights, random_);
    for (int64_t row = 0; row < p.B * p.H * p.L; row++)
      for (int64_t j = 0; j < p.S; j++)
        if (!sees(row / p.L / p.H, row / p.L % p.H, row % p.L, j)) gweights->set(row * p.S + j, 0);
    gweights->upload();
  }

  Suite& suite_;
  Random& random_;
  AttentionProblem p;
  Options o_;
  std::unique_ptr<Strided> q, k, v, gout, out, want_out, gq, want_gq, gk, want_gk, gv, want_gv;
  std::unique_ptr<Tensor> lse, want_lse, delta, want_delta, glse, weights, want_weights, gweights, mask, bias,
      gbias, want_gbias, lengths, seed, slopes, cu_q, cu_k;
  std::vector<int32_t> cu_q_, cu_k_;
  struct Pattern {
    std::unique_ptr<Tensor> row_begin, row_entries, column_begin, column_entries, row_order, column_order,
        bits;
  };
  std::unique_ptr<Pattern> pattern;
};

void check_problem(Suite& suite, const Options& o) {
  if (!suite.begin(label(o))) return;
  Case(suite, o).check();
}

Options problem(int64_t B, int64_t Hk, int64_t group, int64_t L, int64_t S, int64_t D, int64_t E) {
  Options o;
  o.p.B = B, o.p.Hk = Hk, o.p.H = Hk * group;
  o.p.L = L, o.p.S = S, o.p.D = D, o.p.E = E;
  o.p.scale = 1 / std::sqrt(double(D));
  return o;
}
Options with_bias(Options o, int64_t B, int64_t H, int64_t L, int64_t S) {
  o.p.with_bias = true;
  o.p.bias_B = B, o.p.bias_H = H, o.p.bias_L = L, o.p.bias_S = S;
  return o;
}
Options with_pattern(Options o, int64_t heads, int64_t window, int64_t stride) {
  o.p.with_blocks = true, o.p.block_heads = heads, o.window = window, o.stride = stride;
  return o;
}
Options with(Options o, void (*change)(Options&)) {
  change(o);
  return o;
}

// The tiles of doubles hold half as many positions: sizes are given for them and doubled for the others. Most
// problems are tried in one of the 16-bit types, by turns: their kernels are the same.
void check_edges(Suite& suite) {
  const Options edges[] = {
      problem(1, 1, 1, 1, 1, 1, 1),                         // one element
      problem(0, 2, 1, 3, 3, 4, 4),                         // no batch
      problem(1, 2, 1, 0, 5, 4, 8),                         // no queries: gk and gv are zero
      with_bias(problem(1, 2, 1, 5, 0, 4, 8), 1, 1, 5, 1),  // no keys: out is zero
      with(problem(1, 1, 1, 70, 75, 8, 4), [](Options& o) { o.words = "three tiles each way"; }),
      with(problem(1, 1, 1, 3, 130, 4, 5),
           [](Options& o) { o.every_dtype = true, o.words = "keys in parts"; }),
      with(problem(1, 1, 1, 130, 3, 5, 4),
           [](Options& o) { o.every_dtype = true, o.words = "queries in parts"; }),
      with(problem(1, 1, 1, 4, 40, 70, 70), [](Options& o) { o.form = Form::unaligned; }),
      with(problem(1, 1, 1, 2, 6, 136, 200), [](Options& o) { o.every_dtype = true, o.form = Form::padded; }),
      with(problem(2, 2, 1, 5, 6, 12, 16), [](Options& o) { o.form = Form::heads_inside; }),
      with(problem(1, 1, 1, 80, 80, 8, 8), [](Options& o) { o.p.causal = true; }),
      with(problem(1, 1, 1, 20, 70, 8, 8), [](Options& o) { o.p.causal = true, o.p.causal_offset = 50; }),
      with(problem(1, 1, 2, 50, 20, 8, 8), [](Options& o) { o.p.causal = true, o.p.causal_offset = -40; }),
      with(problem(3, 1, 2, 7, 70, 8, 8), [](Options& o) { o.p.with_key_lengths = true; }),
      with(problem(2, 1, 2, 20, 40, 8, 8),
           [](Options& o) { o.p.with_mask = o.hide_a_row = o.hide_a_column = true; }),
      with(problem(2, 1, 1, 20, 70, 8, 8), [](Options& o) { o.p.with_mask = true, o.hidden = 0.98; }),
      with(with_bias(problem(1, 2, 1, 40, 40, 8, 8), 1, 2, 40, 40),
           [](Options& o) { o.p.causal = o.hide_a_row = o.hide_a_column = true; }),
      with(with_bias(problem(2, 2, 1, 40, 36, 8, 8), 1, 1, 40, 36),
           [](Options& o) { o.p.with_gweights = o.p.with_glse = o.p.with_key_lengths = true; }),
      with_bias(problem(2, 1, 2, 40, 36, 4, 4), 1, 2, 1, 36),
      with(with_bias(problem(2, 1, 2, 40, 36, 4, 4), 2, 1, 40, 1), [](Options& o) { o.p.with_mask = true; }),
      with(with_bias(problem(2, 2, 1, 40, 36, 4, 4), 1, 1, 1, 1), [](Options& o) { o.float_bias = true; }),
      with(problem(2, 1, 2, 36, 40, 8, 8), [](Options& o) { o.p.dropout_p = 0.3, o.p.with_gweights = true; }),
      with(problem(1, 1, 2, 6, 7, 8, 8), [](Options& o) { o.p.need_q = false; }),
      with(problem(1, 1, 2, 6, 7, 8, 8), [](Options& o) { o.p.need_kv = false; }),
      with(problem(2, 1, 2, 36, 40, 8, 8), [](Options& o) { o.p.softcap = 1.5, o.p.with_gweights = true; }),
      with(problem(2, 1, 2, 36, 40, 8, 8),
           [](Options& o) { o.p.with_slopes = true, o.p.slopes_stride_b = 2, o.p.alibi_offset = 4; }),
      with_pattern(problem(1, 1, 1, 200, 200, 4, 4), 1, 20, 0),  // full, partial and empty tiles
      with(with_pattern(problem(1, 1, 1, 3, 300, 4, 4), 1, 150, 0),
           [](Options& o) { o.words = "a short list in parts"; }),
      with(with_pattern(problem(2, 1, 2, 70, 110, 8, 4), 2, 10, 7),
           [](Options& o) { o.p.causal = true, o.p.with_mask = o.p.with_key_lengths = true; }),
      with(with_pattern(with_bias(problem(2, 2, 1, 70, 70, 4, 4), 1, 2, 70, 70), 1, 5, 0),
           [](Options& o) { o.p.dropout_p = 0.2, o.p.softcap = 2, o.p.with_slopes = true; }),
      with(problem(3, 1, 2, 50, 40, 8, 4), [](Options& o) { o.p.packed = true; }),
      with(with_pattern(with_bias(problem(3, 2, 1, 70, 70, 4, 8), 3, 1, 1, 70), 1, 30, 0),
           [](Options& o) {
             o.p.packed = o.p.causal = o.p.causal_bottom_right = o.p.with_slopes = o.p.alibi_bottom_right =
                 true;
             o.p.with_gweights = o.p.with_glse = true;
           }),
  };
  bool turn = false;
  for (const Options& o : edges) {
    turn = !turn;
    for (DType dtype : all_dtypes) {
      if (dtype == (turn ? DType::bf16 : DType::f16) && !o.every_dtype) continue;
      Options scaled = o;
      scaled.p.dtype = dtype, scaled.p.bias_dtype = o.float_bias ? DType::f32 : dtype;
      if (dtype != DType::f64) {
        const auto twice = [](int64_t& extent) { extent = extent > 2 ? 2 * extent : extent; };
        twice(scaled.p.L), twice(scaled.p.S), twice(scaled.p.bias_L), twice(scaled.p.bias_S);
        scaled.p.causal_offset *= 2;
      }
      check_problem(suite, scaled);
    }
  }
}

void check_random(Suite& suite) {
  Random& random = suite.random;
  for (int n = 0; n < suite.random_problems; n++) {
    Options o = problem(random.in(1, 2), random.in(1, 2), random.in(1, 2), random.in(1, 90), random.in(1, 90),
                        random.in(1, 20), random.in(1, 20));
    o.p.dtype = random.any(all_dtypes);
    o.p.scale = random.uniform();
    const auto extent = [&](int64_t full) { return random.chance(0.5) ? full : 1; };
    if (random.chance(0.4)) o = with_bias(o, extent(o.p.B), extent(o.p.H), extent(o.p.L), extent(o.p.S));
    o.p.bias_dtype = random.chance(0.5) ? o.p.dtype : DType::f32;
    o.p.with_mask = random.chance(0.3);
    if (random.chance(0.4)) o = with_pattern(o, extent(o.p.H), random.in(0, 40), random.in(0, 9));
    o.p.packed = random.chance(0.2);
    o.p.with_slopes = random.chance(0.2), o.p.slopes_stride_b = random.chance(0.5) ? o.p.H : 0;
    o.p.softcap = random.chance(0.2) ? 2 : 0;
    constexpr double shares[] = {0.0, 0.1, 0.5, 0.95};
    o.hidden = random.any(shares);
    o.hide_a_row = random.chance(0.3), o.hide_a_column = random.chance(0.3);
    o.p.causal = random.chance(0.4), o.p.causal_offset = random.in(-20, 20);
    o.p.with_key_lengths = !o.p.packed && random.chance(0.3);
    o.p.dropout_p = random.chance(0.3) ? 0.9 * random.uniform() : 0;
    o.p.with_gweights = random.chance(0.3), o.p.with_glse = random.chance(0.3);
    constexpr Form forms[] = {Form::heads_outside, Form::heads_inside,   Form::padded,
                              Form::unaligned,     Form::expanded_heads, Form::expanded_batch};
    o.form = random.any(forms);
    check_problem(suite, o);
  }
}

// Offsets of 2^31 elements and more, and more heads than a grid has blocks along y. Real devices only: 40 GiB
// of host memory, 25 of the device's, a few minutes.
void check_large(Suite& suite) {
  Options far = problem(1, 1, 1, 2, 40, 8, 8);
  far.form = Form::far_apart, far.p.dtype = DType::bf16;
  check_problem(suite, far);
  check_problem(suite, with_bias(problem(70000, 1, 1, 1, 2, 2, 2), 1, 1, 1, 2));
}

}  // namespace

int main(int argc, char** argv) {
  Suite suite(argc, argv);
  check_edges(suite);
  check_random(suite);
  if (suite.large) check_large(suite);
  return suite.finish();
}
