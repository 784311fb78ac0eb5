// Linear attention at the border to torch: reads shapes and strides, allocates, hands the problem to the
// dispatch tables.
#include "linear_attention/linear_attention.h"

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <utility>

#include "run_on_cpu.h"
#if defined(PYSEQNET_WITH_CUDA)
#include "run_on_cuda.h"
#endif

namespace pyseqnet {
namespace {

using torch::headeronly::ScalarType;
using Problem = LinearAttentionProblem;
using Tensors = LinearAttentionTensors;
using Six = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using RunPass = void (*)(LinearAttentionPass, const Problem&, const Tensors&, const Tensor& like);

ScalarType state_type(DType dtype) { return dtype == DType::f64 ? ScalarType::Double : ScalarType::Float; }

Tensor empty(const Tensor& like, ScalarType type) { return new_vector(like, 0, type); }

bool is_shape(const Tensor& t, std::initializer_list<int64_t> sizes) {
  if (t.dim() != int64_t(sizes.size())) return false;
  int64_t d = 0;
  for (int64_t size : sizes)
    if (t.size(d++) != size) return false;
  return true;
}

// (B, H, rows, width) as kernels read it: rows of unit stride. Anything else is copied.
Tensor with_unit_rows(const Tensor& t) {
  return t.stride(3) == 1 || t.size(3) <= 1 ? t : dense(t, Layout::nchw);
}
HeadStrides strides_of(const Tensor& t) { return {t.stride(0), t.stride(1), t.stride(2)}; }

// A new (B, H, rows, width) in the order of `like`: where the heads of a row lie side by side there, as in a
// view of (B, rows, H, width), they do here.
Tensor new_heads(const Tensor& like, int64_t rows, int64_t width, ScalarType type) {
  const int64_t b = like.size(0), h = like.size(1);
  const int64_t sizes[] = {b, h, rows, width};
  if (!product_fits({b, h, rows, width})) throw_out_of_memory(sizes, 4);
  const bool side_by_side = h > 1 && like.size(2) > 1 && like.stride(1) < like.stride(2);
  const int64_t planes[] = {h * rows * width, rows * width, width, 1};
  const int64_t rows_first[] = {rows * h * width, width, h * width, 1};
  return new_tensor(like, sizes, side_by_side ? rows_first : planes, 4, type);
}

void check_sizes(const Problem& p, int64_t feature_map) {
  require(p.D > 0 && p.E > 0, "linear_attention: the head sizes D and E must be positive");
  constexpr int64_t widest = int64_t(1)
                             << 24;  // of a head: squares and sums of squares stay far from overflow
  require(p.D < widest && p.E < widest, "linear_attention: the head size is too large");
  require(product_fits({p.B, p.H, p.D, p.E + 1}), "linear_attention: the states are too large");
  require(feature_map >= 0 && feature_map < feature_maps, "linear_attention: unknown feature map");
}

Problem make_problem(const Tensor& q, const Tensor& k, const Tensor& v, int64_t feature_map, bool causal,
                     bool normalize, double scale) {
  require(q.dim() == 4 && k.dim() == 4 && v.dim() == 4,
          "linear_attention: query, key and value must have 4 dimensions");
  require(q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type(),
          "linear_attention: query, key and value must have the same dtype");
  require(q.device() == k.device() && q.device() == v.device(),
          "linear_attention: query, key and value must be on the same device");
  Problem p;
  p.dtype = dtype_of(q);
  p.B = q.size(0), p.H = q.size(1), p.L = q.size(2), p.D = q.size(3);
  p.S = k.size(2), p.E = v.size(3);
  require(is_shape(k, {p.B, p.H, p.S, p.D}),
          "linear_attention: key must be (B, H, S, D), query (B, H, L, D)");
  require(is_shape(v, {p.B, p.H, p.S, p.E}),
          "linear_attention: value must be (B, H, S, E), key (B, H, S, D)");
  check_sizes(p, feature_map);
  require(!causal || p.L == p.S, "linear_attention: causal needs as many queries as keys");
  require(feature_map != int64_t(FeatureMap::softmax) || (!causal && normalize),
          "linear_attention: the map softmax is normalised and not causal");
  require(product_fits({p.B, p.H, p.L, p.D + p.E}) && product_fits({p.B, p.H, p.S, p.D + p.E}),
          "linear_attention: the tensors are too large");
  p.feature_map = static_cast<FeatureMap>(feature_map);
  p.causal = causal, p.normalize = normalize, p.scale = scale;
  require(product_fits({p.B, p.H, p.saved_states(), p.state_size()}),
          "linear_attention: the saved states are too large");
  return p;
}

Tensor kept(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// (H) float64, the same for every sequence. On the CPU the values are checked.
Tensor checked_decay(const Tensor& decay, Problem& p, const Tensor& q, bool on_cpu) {
  require(p.causal, "linear_attention: decay needs causal attention");
  require(is_shape(decay, {p.H}) && decay.scalar_type() == ScalarType::Double,
          "linear_attention: decay must be (H,) float64");
  require(decay.device() == q.device(), "linear_attention: decay must be on the query's device");
  const Tensor dense_decay = kept(decay);
  if (on_cpu) {
    const auto* g = static_cast<const double*>(dense_decay.const_data_ptr());
    for (int64_t h = 0; h < p.H; h++)
      require(g[h] >= 0 && g[h] <= 1, "linear_attention: decay must lie between 0 and 1");
  }
  p.decayed = true;
  return dense_decay;
}

// (N + 1) int32, rising from 0 to the number of positions: the problem then has N sequences, the longest of
// which the CPU finds.
Tensor checked_starts(const Tensor& starts, Problem& p, const Tensor& q, bool on_cpu) {
  require(p.B == 1 && p.L == p.S,
          "linear_attention: packed query, key and value must be (1, H, L, .) of one L");
  require(starts.dim() == 1 && starts.size(0) > 0 && starts.scalar_type() == ScalarType::Int,
          "linear_attention: cu_seqlens must be (N + 1,) int32");
  require(starts.device() == q.device(), "linear_attention: cu_seqlens must be on the query's device");
  const Tensor dense_starts = kept(starts);
  p.packed = true, p.total = p.L, p.B = starts.size(0) - 1;
  constexpr int64_t most_positions = int64_t(1) << 31;
  require(p.total < most_positions && (p.B > 0 || p.total == 0),
          "linear_attention: cu_seqlens must rise from 0 to the number of positions");
  require(product_fits({p.B, p.H, p.D, p.E + 1}) && product_fits({p.H, p.slots(), p.state_size()}),
          "linear_attention: the states are too large");
  if (on_cpu) {
    const auto* at = static_cast<const int32_t*>(dense_starts.const_data_ptr());
    bool rises = at[0] == 0 && at[p.B] == p.total;
    p.L = 0;
    for (int64_t b = 0; b < p.B; b++) {
      rises = rises && at[b + 1] >= at[b];
      p.L = at[b + 1] - at[b] > p.L ? at[b + 1] - at[b] : p.L;
    }
    require(rises, "linear_attention: cu_seqlens must rise from 0 to the number of positions");
    p.S = p.L;
  }
  return dense_starts;
}
// What strides and pointers say last. Packed tensors have no batch to step over.
void place(Problem& p, const Tensors& t) {
  const int64_t element = bytes_of(p.dtype);
  constexpr int64_t line = 16;
  p.lines_aligned = true;
  const std::pair<HeadStrides*, const void*> all[] = {{&p.q, t.q},     {&p.k, t.k},       {&p.v, t.v},
                                                      {&p.out, t.out}, {&p.gout, t.gout}, {&p.dq, t.dq},
                                                      {&p.dk, t.dk},   {&p.dv, t.dv}};
  for (const auto& [s, at] : all) {
    if (p.packed) s->b = 0;
    for (int64_t step : {s->b, s->h, s->row}) p.lines_aligned &= step * element % line == 0;
    p.lines_aligned &= reinterpret_cast<uintptr_t>(at) % line == 0;
  }
}

// (B) int64. On the CPU the values are checked, on CUDA they are clamped, since reading them would wait.
Tensor checked_lengths(const Tensor& lengths, const Problem& p, const Tensor& q, bool on_cpu) {
  require(is_shape(lengths, {p.B}) && lengths.scalar_type() == ScalarType::Long,
          "linear_attention: key_lengths must be (B,) int64");
  require(lengths.device() == q.device(), "linear_attention: key_lengths must be on the query's device");
  require(!p.packed, "linear_attention: packed sequences have no key_lengths");
  const Tensor dense_lengths = kept(lengths);
  if (on_cpu) {
    const auto* n = static_cast<const int64_t*>(dense_lengths.const_data_ptr());
    for (int64_t b = 0; b < p.B; b++)
      require(n[b] >= 0 && n[b] <= p.S, "linear_attention: key_lengths must lie between 0 and S");
  }
  return dense_lengths;
}

// A state (B, H, D, E) or normaliser (B, H, D), dense.
Tensor checked_state(const Tensor& t, const Problem& p, const Tensor& q, bool is_matrix) {
  require(is_matrix ? is_shape(t, {p.B, p.H, p.D, p.E}) : is_shape(t, {p.B, p.H, p.D}),
          "linear_attention: a state must be (B, H, D, E), its normaliser (B, H, D)");
  require(t.scalar_type() == state_type(p.dtype),
          "linear_attention: states are float32 (float64 for float64 inputs)");
  require(t.device() == q.device(), "linear_attention: states must be on the query's device");
  return kept(t);
}

// The shapes of what forward keeps for backward.
struct SavedShapes {
  int64_t inverse[3], saved[3];
  explicit SavedShapes(const Problem& p) {
    const int64_t states = p.packed && p.causal ? p.slots() : p.saved_states();
    inverse[0] = p.packed ? 1 : p.B, inverse[1] = p.H, inverse[2] = p.packed ? p.total : p.L;
    // One dimension for chunks and their numbers: a compiler that knows no length need not ask for one chunk.
    saved[0] = p.packed && p.causal ? 1 : p.B, saved[1] = p.H, saved[2] = states * p.state_size();
  }
};
bool has_shape(const Tensor& t, const int64_t (&sizes)[3]) {
  return is_shape(t, {sizes[0], sizes[1], sizes[2]});
}
Tensor new_dense(const Tensor& like, const int64_t (&sizes)[3], ScalarType type) {
  const int64_t steps[] = {sizes[1] * sizes[2], sizes[2], 1};
  return new_tensor(like, sizes, steps, 3, type);
}

Tensor new_matrix(const Tensor& like, const Problem& p) {
  const int64_t sizes[] = {p.B, p.H, p.D, p.E}, steps[] = {p.H * p.D * p.E, p.D * p.E, p.E, 1};
  return new_tensor(like, sizes, steps, 4, state_type(p.dtype));
}
Tensor new_normalizer(const Tensor& like, const Problem& p) {
  const int64_t sizes[] = {p.B, p.H, p.D}, steps[] = {p.H * p.D, p.D, 1};
  return new_tensor(like, sizes, steps, 3, state_type(p.dtype));
}

bool is_on_cpu(const Tensor& t) {
  int32_t type = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &type));
  return type == aoti_torch_device_type_cpu();
}

// What a call has besides its tensors, kept alive while it runs.
struct Constants {
  Tensor decay, starts;
  Constants(const std::optional<Tensor>& given_decay, const std::optional<Tensor>& given_starts, Problem& p,
            Tensors& t, const Tensor& q)
      : decay(q), starts(q) {  // second references, replaced where given
    const bool on_cpu = is_on_cpu(q);
    if (given_decay) {
      decay = checked_decay(*given_decay, p, q, on_cpu);
      t.decay = static_cast<const double*>(decay.const_data_ptr());
    }
    if (given_starts) {
      starts = checked_starts(*given_starts, p, q, on_cpu);
      t.starts = static_cast<const int32_t*>(starts.const_data_ptr());
    }
  }
};

Five forward(const Tensor& query, const Tensor& key, const Tensor& value,
             const std::optional<Tensor>& lengths, const std::optional<Tensor>& state,
             const std::optional<Tensor>& normalizer, int64_t feature_map, bool causal, bool normalize,
             double scale, double eps, bool with_state, bool with_saved, const std::optional<Tensor>& decay,
             const std::optional<Tensor>& starts, RunPass run) {
  Problem p = make_problem(query, key, value, feature_map, causal, normalize, scale);
  p.eps = eps, p.with_saved = with_saved;
  const int64_t rows = p.L;
  require(state.has_value() == normalizer.has_value(),
          "linear_attention: a state and its normaliser come together");
  require(!p.softmax() || (!state && !with_state && eps == 0),
          "linear_attention: the map softmax has no state and no eps");
  const Tensor q = with_unit_rows(query), k = with_unit_rows(key), v = with_unit_rows(value);
  p.q = strides_of(q), p.k = strides_of(k), p.v = strides_of(v);
  Tensors t;
  t.q = q.const_data_ptr(), t.k = k.const_data_ptr(), t.v = v.const_data_ptr();
  const Constants constants(decay, starts, p, t, q);
  Tensor kept_lengths = q, kept_state = q, kept_normalizer = q;  // second references, replaced where given
  if (lengths) {
    kept_lengths = checked_lengths(*lengths, p, q, is_on_cpu(q));
    t.key_lengths = static_cast<const int64_t*>(kept_lengths.const_data_ptr());
  }
  if (state) {
    kept_state = checked_state(*state, p, q, true), kept_normalizer = checked_state(*normalizer, p, q, false);
    t.state0 = kept_state.const_data_ptr(), t.normalizer0 = kept_normalizer.const_data_ptr();
  }
  const ScalarType type = state_type(p.dtype);
  Tensor out = new_heads(query, rows, p.E, query.scalar_type());
  p.out = strides_of(out);
  t.out = out.mutable_data_ptr();
  Tensor inverse = empty(q, type), saved = empty(q, type), last = empty(q, type), last_z = empty(q, type);
  if (with_saved) {
    const SavedShapes shapes(p);
    saved = new_dense(q, shapes.saved, type);
    t.saved = saved.mutable_data_ptr();
    if (normalize) {
      inverse = new_dense(q, shapes.inverse, type);
      t.inverse = inverse.mutable_data_ptr();
    }
  }
  if (with_state) {
    last = new_matrix(q, p), last_z = new_normalizer(q, p);
    t.state = last.mutable_data_ptr(), t.normalizer = last_z.mutable_data_ptr();
  }
  place(p, t);
  run(LinearAttentionPass::forward, p, t, q);
  return {out, inverse, saved, last, last_z};
}

Six backward(const Tensor& grad_output, const std::optional<Tensor>& grad_state,
             const std::optional<Tensor>& grad_normalizer, const Tensor& query, const Tensor& key,
             const Tensor& value, const std::optional<Tensor>& lengths, const Tensor& output,
             const Tensor& inverse, const Tensor& saved, int64_t feature_map, bool causal, bool normalize,
             double scale, bool need_state, const std::optional<Tensor>& decay,
             const std::optional<Tensor>& starts, bool need_decay, RunPass run) {
  Problem p = make_problem(query, key, value, feature_map, causal, normalize, scale);
  p.with_saved = true;
  require(!p.softmax() || (!grad_state && !grad_normalizer && !need_state),
          "linear_attention: the map softmax has no state");
  require(!need_decay || decay, "linear_attention: there is no decay to want a gradient of");
  const ScalarType type = state_type(p.dtype);
  require(is_shape(grad_output, {p.B, p.H, p.L, p.E}) && is_shape(output, {p.B, p.H, p.L, p.E}),
          "linear_attention: output and grad_output must be (B, H, L, E)");
  require(grad_output.scalar_type() == query.scalar_type() && output.scalar_type() == query.scalar_type(),
          "linear_attention: output and grad_output must have the query's dtype");
  require(grad_output.device() == query.device() && output.device() == query.device() &&
              saved.device() == query.device() && inverse.device() == query.device(),
          "linear_attention: all tensors must be on the same device");
  const Tensor q = with_unit_rows(query), k = with_unit_rows(key), v = with_unit_rows(value);
  const Tensor g = with_unit_rows(grad_output), o = with_unit_rows(output);
  p.q = strides_of(q), p.k = strides_of(k), p.v = strides_of(v), p.gout = strides_of(g),
  p.out = strides_of(o);
  Tensors t;
  const int64_t rows = p.L;
  const Constants constants(decay, starts, p, t, q);
  const SavedShapes shapes(p);
  require(has_shape(saved, shapes.saved) && saved.scalar_type() == type && saved.is_contiguous(),
          "linear_attention: saved is not what forward made");
  require(!normalize || (has_shape(inverse, shapes.inverse) && inverse.scalar_type() == type &&
                         inverse.is_contiguous()),
          "linear_attention: inverse is not what forward made");
  t.q = q.const_data_ptr(), t.k = k.const_data_ptr(), t.v = v.const_data_ptr();
  t.gout = g.const_data_ptr(), t.out = const_cast<void*>(o.const_data_ptr());
  t.saved = const_cast<void*>(saved.const_data_ptr());
  if (normalize) t.inverse = const_cast<void*>(inverse.const_data_ptr());
  Tensor kept_lengths = q, kept_state = q, kept_normalizer = q;
  if (lengths) {
    kept_lengths = checked_lengths(*lengths, p, q, is_on_cpu(q));
    t.key_lengths = static_cast<const int64_t*>(kept_lengths.const_data_ptr());
  }
  if (grad_state) {
    kept_state = checked_state(*grad_state, p, q, true);
    t.gstate = kept_state.const_data_ptr();
  }
  if (grad_normalizer) {
    kept_normalizer = checked_state(*grad_normalizer, p, q, false);
    t.gnormalizer = kept_normalizer.const_data_ptr();
  }
  Tensor dq = new_heads(query, rows, p.D, query.scalar_type());
  Tensor dk = new_heads(key, key.size(2), p.D, query.scalar_type());
  Tensor dv = new_heads(value, key.size(2), p.E, query.scalar_type());
  p.dq = strides_of(dq), p.dk = strides_of(dk), p.dv = strides_of(dv);
  t.dq = dq.mutable_data_ptr(), t.dk = dk.mutable_data_ptr(), t.dv = dv.mutable_data_ptr();
  Tensor first = empty(q, type), first_z = empty(q, type);
  if (need_state) {
    first = new_matrix(q, p), first_z = new_normalizer(q, p);
    t.dstate0 = first.mutable_data_ptr(), t.dnormalizer0 = first_z.mutable_data_ptr();
  }
  Tensor shares = empty(q, type);
  if (need_decay) {
    const int64_t sizes[] = {shapes.saved[0], shapes.saved[1], shapes.saved[2] / p.state_size()};
    shares = new_dense(q, sizes, type);
    if (p.packed) shares = torch::stable::zero_(shares);
    t.ddecay = shares.mutable_data_ptr();
  }
  place(p, t);
  run(LinearAttentionPass::backward, p, t, q);
  return {dq, dk, dv, first, first_z, shares};
}

// One position: query and key (B, H, D), value (B, H, E). An operation of its own because a decoder calls it
// for every token: it makes three tensors where forward makes five, and one where the state is updated in place.
std::tuple<Tensor, Tensor, Tensor> step(const Tensor& query, const Tensor& key, const Tensor& value,
                                        const std::optional<Tensor>& state,
                                        const std::optional<Tensor>& normalizer, int64_t feature_map,
                                        bool normalize, double scale, double eps,
                                        const std::optional<Tensor>& decay, bool in_place, RunPass run) {
  require(query.dim() == 3 && value.dim() == 3,
          "linear_attention_step: query, key and value must have 3 dimensions");
  Problem p;
  p.B = query.size(0), p.H = query.size(1), p.D = query.size(2), p.E = value.size(2);
  require(is_shape(key, {p.B, p.H, p.D}) && is_shape(value, {p.B, p.H, p.E}),
          "linear_attention_step: expected query and key (B, H, D), value (B, H, E)");
  require(query.scalar_type() == key.scalar_type() && query.scalar_type() == value.scalar_type(),
          "linear_attention_step: query, key and value must have the same dtype");
  require(query.device() == key.device() && query.device() == value.device(),
          "linear_attention_step: query, key and value must be on the same device");
  require(state.has_value() == normalizer.has_value(),
          "linear_attention_step: a state and its normaliser come together");
  check_sizes(p, feature_map);
  require(feature_map != int64_t(FeatureMap::softmax),
          "linear_attention_step: the map softmax is not causal");
  p.dtype = dtype_of(query);
  p.L = p.S = 1;
  p.feature_map = static_cast<FeatureMap>(feature_map);
  p.causal = true, p.normalize = normalize, p.scale = scale, p.eps = eps;
  const auto dense_rows = [](const Tensor& t) {
    return t.stride(2) == 1 || t.size(2) <= 1 ? t : torch::stable::contiguous(t);
  };
  const auto strides = [](const Tensor& t) { return HeadStrides{t.stride(0), t.stride(1), 0}; };
  const Tensor q = dense_rows(query), k = dense_rows(key), v = dense_rows(value);
  p.q = strides(q), p.k = strides(k), p.v = strides(v);
  Tensors t;
  t.q = q.const_data_ptr(), t.k = k.const_data_ptr(), t.v = v.const_data_ptr();
  const Constants constants(decay, std::nullopt, p, t, q);
  Tensor kept_state = q, kept_normalizer = q;
  if (state) {
    kept_state = checked_state(*state, p, q, true), kept_normalizer = checked_state(*normalizer, p, q, false);
    t.state0 = kept_state.const_data_ptr(), t.normalizer0 = kept_normalizer.const_data_ptr();
  }
  const int64_t sizes[] = {p.B, p.H, p.E}, steps[] = {p.H * p.E, p.E, 1};
  require(!in_place || (state && state->is_contiguous() && normalizer->is_contiguous()),
          "linear_attention_step: a state that is updated in place must be contiguous");
  Tensor out = new_tensor(q, sizes, steps, 3, q.scalar_type());
  Tensor last = in_place ? *state : new_matrix(q, p), last_z = in_place ? *normalizer : new_normalizer(q, p);
  p.out = {p.H * p.E, p.E, 0};
  t.out = out.mutable_data_ptr(), t.state = last.mutable_data_ptr();
  t.normalizer = last_z.mutable_data_ptr();
  place(p, t);
  run(LinearAttentionPass::forward, p, t, q);
  return {out, last, last_z};
}

#define FORWARD_PARAMETERS                                                                             \
  const Tensor &query, const Tensor &key, const Tensor &value, std::optional<Tensor> lengths,          \
      std::optional<Tensor> state, std::optional<Tensor> normalizer, int64_t feature_map, bool causal, \
      bool normalize, double scale, double eps, bool with_state, bool with_saved,                      \
      std::optional<Tensor> decay, std::optional<Tensor> starts
#define FORWARD_ARGUMENTS                                                                                \
  query, key, value, lengths, state, normalizer, feature_map, causal, normalize, scale, eps, with_state, \
      with_saved, decay, starts
#define STEP_PARAMETERS                                                                                \
  const Tensor &query, const Tensor &key, const Tensor &value, std::optional<Tensor> state,            \
      std::optional<Tensor> normalizer, int64_t feature_map, bool normalize, double scale, double eps, \
      std::optional<Tensor> decay
#define STEP_ARGUMENTS query, key, value, state, normalizer, feature_map, normalize, scale, eps, decay
#define BACKWARD_PARAMETERS                                                                               \
  const Tensor &grad_output, std::optional<Tensor> grad_state, std::optional<Tensor> grad_normalizer,     \
      const Tensor &query, const Tensor &key, const Tensor &value, std::optional<Tensor> lengths,         \
      const Tensor &output, const Tensor &inverse, const Tensor &saved, int64_t feature_map, bool causal, \
      bool normalize, double scale, bool need_state, std::optional<Tensor> decay,                         \
      std::optional<Tensor> starts, bool need_decay
#define BACKWARD_ARGUMENTS                                                                                   \
  grad_output, grad_state, grad_normalizer, query, key, value, lengths, output, inverse, saved, feature_map, \
      causal, normalize, scale, need_state, decay, starts, need_decay

void run_pass_on_cpu(LinearAttentionPass pass, const Problem& p, const Tensors& t, const Tensor& like) {
  run_on_cpu("linear_attention", operation_of(pass), linear_attention_cpu_table(pass), p, t, like);
}
Five forward_cpu(FORWARD_PARAMETERS) { return forward(FORWARD_ARGUMENTS, run_pass_on_cpu); }
std::tuple<Tensor, Tensor, Tensor> step_cpu(STEP_PARAMETERS) {
  return step(STEP_ARGUMENTS, false, run_pass_on_cpu);
}
Tensor step_in_place_cpu(STEP_PARAMETERS) { return std::get<0>(step(STEP_ARGUMENTS, true, run_pass_on_cpu)); }
Six backward_cpu(BACKWARD_PARAMETERS) { return backward(BACKWARD_ARGUMENTS, run_pass_on_cpu); }

STABLE_TORCH_LIBRARY_IMPL(pyseqnet, CPU, m) {
  m.impl("linear_attention_forward", TORCH_BOX(&forward_cpu));
  m.impl("linear_attention_backward", TORCH_BOX(&backward_cpu));
  m.impl("linear_attention_step", TORCH_BOX(&step_cpu));
  m.impl("linear_attention_step_", TORCH_BOX(&step_in_place_cpu));
}

#if defined(PYSEQNET_WITH_CUDA)
void run_pass_on_cuda(LinearAttentionPass pass, const Problem& p, const Tensors& t, const Tensor& like) {
  run_on_cuda("linear_attention", operation_of(pass), linear_attention_cuda_table(pass), p, t, like);
}
Five forward_cuda(FORWARD_PARAMETERS) { return forward(FORWARD_ARGUMENTS, run_pass_on_cuda); }
std::tuple<Tensor, Tensor, Tensor> step_cuda(STEP_PARAMETERS) {
  return step(STEP_ARGUMENTS, false, run_pass_on_cuda);
}
Tensor step_in_place_cuda(STEP_PARAMETERS) {
  return std::get<0>(step(STEP_ARGUMENTS, true, run_pass_on_cuda));
}
Six backward_cuda(BACKWARD_PARAMETERS) { return backward(BACKWARD_ARGUMENTS, run_pass_on_cuda); }

STABLE_TORCH_LIBRARY_IMPL(pyseqnet, CUDA, m) {
  m.impl("linear_attention_forward", TORCH_BOX(&forward_cuda));
  m.impl("linear_attention_backward", TORCH_BOX(&backward_cuda));
  m.impl("linear_attention_step", TORCH_BOX(&step_cuda));
  m.impl("linear_attention_step_", TORCH_BOX(&step_in_place_cuda));
}
#endif

}  // namespace
}  // namespace pyseqnet
