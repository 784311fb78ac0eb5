// Masked softmax attention at the border to torch: reads shapes and strides, allocates, hands the problem to
// the dispatch tables. Nothing is copied unless its last dimension is strided.
#include "attention/attention.h"

#include <torch/csrc/stable/library.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "run_on_cpu.h"
#if defined(PYSEQNET_WITH_CUDA)
#include "run_on_cuda.h"
#endif

namespace pyseqnet {
namespace {

using torch::headeronly::ScalarType;
using RunPass = void (*)(AttentionPass, const AttentionProblem&, const AttentionTensors&, const Tensor& like);

void run_pass_on_cpu(AttentionPass pass, const AttentionProblem& p, const AttentionTensors& t,
                     const Tensor& like) {
  run_on_cpu("attention", operation_of(pass), attention_cpu_table(pass), p, t, like);
}

Tensor compact(const Tensor& t) { return dense(t, Layout::nchw); }

Tensor with_unit_channels(const Tensor& t, const char* complaint) {
  require(t.dim() == 4, complaint);
  return t.stride(3) == 1 || t.size(3) == 1 ? t : compact(t);
}

AttentionStrides strides_of(const Tensor& t) { return {t.stride(0), t.stride(1), t.stride(2)}; }

// (b, h, n, width) stored either so or, as multi-head layers have it, with heads inside positions.
Tensor new_heads(const Tensor& like, int64_t b, int64_t h, int64_t n, int64_t width, bool heads_inside,
                 AttentionStrides& strides) {
  const int64_t sizes[] = {b, h, n, width};
  if (!product_fits({b, h, n, width})) throw_out_of_memory(sizes, 4);
  strides = heads_inside ? AttentionStrides{n * h * width, width, h * width}
                         : AttentionStrides{h * n * width, n * width, width};
  const int64_t steps[] = {strides.b, strides.h, strides.n, 1};
  return new_tensor(like, sizes, steps, 4, like.scalar_type());
}
bool heads_inside(const Tensor& t) { return t.stride(1) < t.stride(2); }

Tensor new_dense(const Tensor& like, const int64_t (&sizes)[4], int64_t dims, ScalarType type) {
  if (!product_fits({sizes[0], sizes[1], sizes[2], dims > 3 ? sizes[3] : 1}))
    throw_out_of_memory(sizes, dims);
  int64_t steps[4], step = 1;
  for (int64_t d = dims - 1; d >= 0; d--) steps[d] = step, step *= sizes[d];
  return new_tensor(like, sizes, steps, dims, type);
}

ScalarType statistic_type(const AttentionProblem& p) {
  return p.dtype == DType::f64 ? ScalarType::Double : ScalarType::Float;
}
// lse has one element a query: (B, H, L), of packed sequences (1, H, their queries).
int64_t lse_batch(const AttentionProblem& p) { return p.packed ? 1 : p.B; }
int64_t queries_of(const AttentionProblem& p) { return p.packed ? p.total_q : p.L; }
int64_t keys_of(const AttentionProblem& p) { return p.packed ? p.total_k : p.S; }

void require_like(const Tensor& t, const Tensor& query, const char* complaint) {
  require(t.scalar_type() == query.scalar_type() && t.device() == query.device(), complaint);
}
void require_shape(const Tensor& t, std::initializer_list<int64_t> sizes, const char* complaint) {
  bool same = t.dim() == int64_t(sizes.size());
  int64_t d = 0;
  for (int64_t size : sizes) same = same && t.size(d++) == size;
  require(same, complaint);
}

// What a call brings along beside query, key and value: kept alive here, described in problem and pointers.
struct Extras {
  std::optional<Tensor> mask, bias, slopes, key_lengths, cu_q, cu_k;
  std::vector<Tensor> blocks;
  std::optional<Tensor> seed;
  int64_t causal;
  double scale, softcap, dropout_p;
  int64_t max_q, max_k;  // of packed sequences; 0: the totals bound them
};

// Extents and strides of a mask or bias, 0 along broadcast dimensions.
void read_broadcast(const Tensor& t, const Tensor& query, const AttentionProblem& p,
                    AttentionStrides& strides, int64_t& stride_s) {
  require(t.dim() == 4, "attention: mask and bias must have 4 dimensions");
  require(t.device() == query.device(), "attention: mask and bias must be on the query's device");
  const int64_t full[] = {p.B, p.H, p.L, p.S};
  int64_t steps[4];
  for (int64_t d = 0; d < 4; d++) {
    require(t.size(d) == full[d] || t.size(d) == 1,
            "attention: each extent of mask and bias must be 1 or that of (batch, heads, queries, keys)");
    steps[d] = t.size(d) == 1 ? 0 : t.stride(d);
  }
  strides = {steps[0], steps[1], steps[2]}, stride_s = steps[3];
}
void read_masks(const Extras& extras, const Tensor& query, AttentionProblem& p, AttentionTensors& t) {
  if (extras.mask) {
    require(extras.mask->scalar_type() == ScalarType::Bool, "attention: mask must be bool");
    read_broadcast(*extras.mask, query, p, p.mask_strides, p.mask_stride_s);
    p.with_mask = true, t.mask = extras.mask->const_data_ptr();
  }
  if (extras.bias) {
    const Tensor& bias = *extras.bias;
    p.bias_dtype = dtype_of(bias);
    require(p.bias_dtype == p.dtype || p.bias_dtype == DType::f32,
            "attention: bias must be float32 or of the query's dtype");
    read_broadcast(bias, query, p, p.bias_strides, p.bias_stride_s);
    p.bias_B = bias.size(0), p.bias_H = bias.size(1), p.bias_L = bias.size(2), p.bias_S = bias.size(3);
    p.with_bias = true, t.bias = bias.const_data_ptr();
  }
}

// A vector of a known length and type, dense and on the query's device.
const void* read_vector(std::optional<Tensor>& vector, const Tensor& query, int64_t length, ScalarType type,
                        const char* complaint) {
  require(vector->dim() == 1 && vector->size(0) == length && vector->scalar_type() == type &&
              vector->device() == query.device(),
          complaint);
  vector = compact(*vector);
  return vector->const_data_ptr();
}

// row_begin, row_entries, column_begin, column_entries, row_order, column_order, bits of attention_blocks.h.
// What the numbers say is not looked at: they come from pyseqnet/masks.py.
void read_blocks(const std::vector<Tensor>& blocks, const Tensor& query, AttentionProblem& p,
                 AttentionTensors& t) {
  if (blocks.empty() || p.L == 0 || p.S == 0) return;
  require(blocks.size() == 7, "attention: a pattern has seven tensors");
  for (size_t n = 0; n < 7; n++)
    require(blocks[n].scalar_type() == (n < 6 ? ScalarType::Int : ScalarType::Long) &&
                blocks[n].device() == query.device() && blocks[n].is_contiguous(),
            "attention: a pattern's tensors must be dense, int32 (bits: int64) and on the query's device");
  const int64_t rows = blocks[0].numel() - 1, tiles = block_tiles_of(p.L), entries = blocks[1].numel() / 2;
  p.with_blocks = true;
  p.block_heads = rows / tiles, p.block_entries = entries;
  require(rows == p.block_heads * tiles && (p.block_heads == 1 || p.block_heads == p.H) &&
              blocks[2].numel() - 1 == p.block_heads * block_tiles_of(p.S) &&
              blocks[3].numel() == 2 * entries && blocks[4].numel() == rows &&
              blocks[5].numel() == blocks[2].numel() - 1 && blocks[6].numel() % block_tile == 0,
          "attention: the pattern was made for other numbers of heads, queries or keys");
  const auto ints = [&](size_t n) { return static_cast<const int32_t*>(blocks[n].const_data_ptr()); };
  t.blocks.row_begin = ints(0), t.blocks.column_begin = ints(2);
  t.blocks.row_entries = reinterpret_cast<const AttentionBlockEntry*>(ints(1));
  t.blocks.column_entries = reinterpret_cast<const AttentionBlockEntry*>(ints(3));
  t.blocks.row_order = ints(4), t.blocks.column_order = ints(5);
  t.blocks.bits = static_cast<const uint64_t*>(blocks[6].const_data_ptr());
}

void read_sequences(Extras& extras, const Tensor& query, const Tensor& key, AttentionProblem& p,
                    AttentionTensors& t) {
  if (!extras.cu_q) return;
  require(extras.cu_k.has_value(), "attention: cu_seqlens_q needs cu_seqlens_k");
  require(query.size(0) == 1, "attention: packed sequences have no batch dimension");
  p.packed = true;
  p.B = extras.cu_q->numel() - 1, p.total_q = query.size(2), p.total_k = key.size(2);
  require(p.B >= 0, "attention: cu_seqlens must not be empty");
  p.L = extras.max_q > 0 ? extras.max_q : p.total_q, p.S = extras.max_k > 0 ? extras.max_k : p.total_k;
  const char* complaint =
      "attention: cu_seqlens must be two int32 vectors of one length on the query's device";
  t.cu_q = static_cast<const int32_t*>(read_vector(extras.cu_q, query, p.B + 1, ScalarType::Int, complaint));
  t.cu_k = static_cast<const int32_t*>(read_vector(extras.cu_k, query, p.B + 1, ScalarType::Int, complaint));
}

// Everything of the problem that query, key and the extras say; `extras` holds what pointers point to.
void read_problem(const Tensor& query, const Tensor& key, int64_t value_width, Extras& extras,
                  AttentionProblem& p, AttentionTensors& t) {
  require_like(key, query, "attention: query and key must have the same dtype and device");
  p.dtype = dtype_of(query);
  p.B = query.size(0), p.H = query.size(1), p.L = query.size(2), p.D = query.size(3);
  p.Hk = key.size(1), p.S = key.size(2), p.E = value_width;
  require(key.size(0) == p.B, "attention: query and key must have the same batch size");
  require(key.size(3) == p.D, "attention: query and key must have the same head dimension");
  require(p.H == p.Hk || (p.Hk > 0 && p.H % p.Hk == 0),
          "attention: the number of query heads must be a multiple of that of key heads");
  require(p.D > 0 && p.E > 0, "attention: the head dimension must not be empty");
  p.q_strides = strides_of(query), p.k_strides = strides_of(key);
  t.q = query.const_data_ptr(), t.k = key.const_data_ptr();
  read_sequences(extras, query, key, p, t);
  require(product_fits({p.B, p.H, p.L}) && product_fits({p.L, p.S}), "attention: the problem is too large");
  p.scale = extras.scale, p.softcap = extras.softcap;
  require(extras.causal >= 0 && extras.causal <= 2, "attention: causal must be 0, 1 or 2");
  p.causal = extras.causal != 0;
  p.causal_bottom_right = p.packed && extras.causal == 2;
  p.causal_offset = !p.packed && extras.causal == 2 ? p.S - p.L : 0;
  p.dropout_p = extras.dropout_p;
  require(p.dropout_p >= 0 && p.dropout_p < 1, "attention: dropout_p must be at least 0 and below 1");
  read_masks(extras, query, p, t);
  read_blocks(extras.blocks, query, p, t);
  if (extras.slopes) {
    require(extras.slopes->numel() == p.H || extras.slopes->numel() == p.B * p.H,
            "attention: slopes must have one element a head, or a batch entry and head");
    p.with_slopes = true, p.slopes_stride_b = extras.slopes->numel() == p.H ? 0 : p.H;
    t.slopes = read_vector(extras.slopes, query, extras.slopes->numel(), statistic_type(p),
                           "attention: slopes must be a vector of the statistics' dtype");
    // Under the causal mask that begins top-left queries stand at the keys' beginning, else at their end.
    p.alibi_bottom_right = p.packed && extras.causal != 1;
    p.alibi_offset = !p.packed && extras.causal != 1 ? p.S - p.L : 0;
  }
  if (extras.key_lengths) {
    p.with_key_lengths = true;
    t.key_lengths = static_cast<const int64_t*>(
        read_vector(extras.key_lengths, query, p.B, ScalarType::Long,
                    "attention: key_lengths must be one int64 a batch entry, on the query's device"));
  }
  if (p.dropout_p > 0) {
    require(extras.seed.has_value(), "attention: dropout needs a seed");
    require(extras.seed->numel() == 1 && extras.seed->scalar_type() == ScalarType::Long &&
                extras.seed->device() == query.device(),
            "attention: seed must be one int64 on the query's device");
    t.seed = static_cast<const int64_t*>(extras.seed->const_data_ptr());
  }
}

Tensor checked_statistic(const Tensor& lse, const Tensor& query, const AttentionProblem& p,
                         const char* what) {
  require_shape(lse, {lse_batch(p), p.H, queries_of(p)}, what);
  require(lse.scalar_type() == statistic_type(p) && lse.device() == query.device(), what);
  return compact(lse);
}

std::tuple<Tensor, Tensor> forward(const Tensor& query_in, const Tensor& key_in, const Tensor& value_in,
                                   Extras extras, RunPass run) {
  const Tensor q = with_unit_channels(query_in, "attention: query must have 4 dimensions");
  const Tensor k = with_unit_channels(key_in, "attention: key must have 4 dimensions");
  const Tensor v = with_unit_channels(value_in, "attention: value must have 4 dimensions");
  AttentionProblem p;
  AttentionTensors t;
  read_problem(q, k, v.size(3), extras, p, t);
  require_like(v, q, "attention: query and value must have the same dtype and device");
  require_shape(v, {lse_batch(p), p.Hk, keys_of(p), p.E},
                "attention: key and value must agree in batch, heads and length");
  p.v_strides = strides_of(v), t.v = v.const_data_ptr();
  Tensor out = new_heads(q, lse_batch(p), p.H, queries_of(p), p.E, true, p.out_strides);
  Tensor lse = new_dense(q, {lse_batch(p), p.H, queries_of(p), 1}, 3, statistic_type(p));
  t.out = out.mutable_data_ptr(), t.lse = lse.mutable_data_ptr();
  run(AttentionPass::forward, p, t, q);
  return {out, lse};
}

Tensor weights(const Tensor& query_in, const Tensor& key_in, const Tensor& lse_in, Extras extras,
               RunPass run) {
  const Tensor q = with_unit_channels(query_in, "attention: query must have 4 dimensions");
  const Tensor k = with_unit_channels(key_in, "attention: key must have 4 dimensions");
  AttentionProblem p;
  AttentionTensors t;
  read_problem(q, k, 1, extras, p, t);
  const Tensor lse =
      checked_statistic(lse_in, q, p, "attention: lse does not have the shape that forward gave");
  Tensor result = new_dense(q, {p.B, p.H, p.L, p.S}, 4, q.scalar_type());
  t.lse = const_cast<void*>(lse.const_data_ptr()), t.weights = result.mutable_data_ptr();
  run(AttentionPass::weights, p, t, q);
  return result;
}

struct BackwardInputs {
  const Tensor &grad_out, &query, &key, &value, &out, &lse;
  std::optional<Tensor> weights, grad_weights, grad_lse;
  bool need_query, need_key_value, need_bias;
};

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(BackwardInputs in, Extras extras, RunPass run) {
  const Tensor q = with_unit_channels(in.query, "attention: query must have 4 dimensions");
  const Tensor k = with_unit_channels(in.key, "attention: key must have 4 dimensions");
  const Tensor v = with_unit_channels(in.value, "attention: value must have 4 dimensions");
  const Tensor gout = with_unit_channels(in.grad_out, "attention: grad_out must have 4 dimensions");
  const Tensor out = with_unit_channels(in.out, "attention: out must have 4 dimensions");
  AttentionProblem p;
  AttentionTensors t;
  read_problem(q, k, v.size(3), extras, p, t);
  require_like(v, q, "attention: query and value must have the same dtype and device");
  require_like(gout, q, "attention: grad_out must have the query's dtype and device");
  require_like(out, q, "attention: out must have the query's dtype and device");
  require_shape(v, {lse_batch(p), p.Hk, keys_of(p), p.E},
                "attention: key and value must agree in batch, heads and length");
  require_shape(gout, {lse_batch(p), p.H, queries_of(p), p.E},
                "attention: grad_out does not have the output's shape");
  require_shape(out, {lse_batch(p), p.H, queries_of(p), p.E},
                "attention: out does not have the output's shape");
  const Tensor lse =
      checked_statistic(in.lse, q, p, "attention: lse does not have the shape that forward gave");
  p.v_strides = strides_of(v), p.gout_strides = strides_of(gout), p.out_strides = strides_of(out);
  t.v = v.const_data_ptr(), t.gout = gout.const_data_ptr();
  t.out = const_cast<void*>(out.const_data_ptr()), t.lse = const_cast<void*>(lse.const_data_ptr());
  if (in.grad_weights) {
    require(in.weights.has_value(), "attention: a gradient of the weights needs the weights");
    require_shape(*in.grad_weights, {p.B, p.H, p.L, p.S}, "attention: grad_weights has the wrong shape");
    require_shape(*in.weights, {p.B, p.H, p.L, p.S}, "attention: weights has the wrong shape");
    require_like(*in.grad_weights, q, "attention: grad_weights must have the query's dtype and device");
    require_like(*in.weights, q, "attention: weights must have the query's dtype and device");
    in.grad_weights = compact(*in.grad_weights), in.weights = compact(*in.weights);
    p.with_gweights = true;
    t.gweights = in.grad_weights->const_data_ptr();
    t.weights = const_cast<void*>(in.weights->const_data_ptr());
  }
  if (in.grad_lse) {
    in.grad_lse = checked_statistic(*in.grad_lse, q, p, "attention: grad_lse does not have lse's shape");
    p.with_glse = true;
    t.glse = in.grad_lse->const_data_ptr();
  }
  Tensor delta = new_dense(q, {lse_batch(p), p.H, queries_of(p), 1}, 3, statistic_type(p));
  t.delta = delta.mutable_data_ptr();
  run(AttentionPass::delta, p, t, q);

  // What nobody needs comes back empty; results may not alias each other.
  const auto nothing = [&] { return new_vector(q, 0, q.scalar_type()); };
  Tensor gq = q, gk = q, gv = q, gbias = q;
  p.need_q = in.need_query, p.need_kv = in.need_key_value;
  if (p.need_q) {
    gq = new_heads(q, lse_batch(p), p.H, queries_of(p), p.D, heads_inside(in.query), p.gq_strides);
    t.gq = gq.mutable_data_ptr();
  } else {
    gq = nothing();
  }
  if (p.need_kv) {
    gk = new_heads(q, lse_batch(p), p.Hk, keys_of(p), p.D, heads_inside(in.key), p.gk_strides);
    gv = new_heads(q, lse_batch(p), p.Hk, keys_of(p), p.E, heads_inside(in.value), p.gv_strides);
    t.gk = gk.mutable_data_ptr(), t.gv = gv.mutable_data_ptr();
  } else {
    gk = nothing(), gv = nothing();
  }
  if (p.need_q || p.need_kv) run(AttentionPass::backward, p, t, q);
  if (in.need_bias) {
    require(p.with_bias, "attention: there is no bias to differentiate");
    gbias = new_dense(q, {p.bias_B, p.bias_H, p.bias_L, p.bias_S}, 4, extras.bias->scalar_type());
    t.gbias = gbias.mutable_data_ptr();
    run(AttentionPass::bias_gradient, p, t, q);
  } else {
    gbias = nothing();
  }
  return {gq, gk, gv, gbias};
}

// The CPU can look at the lengths; kernels clamp them as well, for on a GPU nobody can without waiting for
// it.
void check_lengths(const std::optional<Tensor>& key_lengths, const Tensor& key) {
  if (!key_lengths || key.dim() != 4 || key_lengths->scalar_type() != ScalarType::Long) return;
  const Tensor lengths = compact(*key_lengths);
  const int64_t* length = static_cast<const int64_t*>(lengths.const_data_ptr());
  for (int64_t b = 0; b < lengths.numel(); b++)
    if (length[b] < 0 || length[b] > key.size(2))
      throw std::invalid_argument("key_lengths must be between 0 and the number of keys (" +
                                  std::to_string(key.size(2)) + "), got " + std::to_string(length[b]));
}

// Lengths of packed sequences, which the CPU can look at as well: the longest bounds the problem.
int64_t longest_sequence(const Tensor& cu, int64_t positions, const char* name) {
  require(cu.scalar_type() == ScalarType::Int, "attention: cu_seqlens must be int32");
  const Tensor dense_cu = compact(cu);
  const int32_t* at = static_cast<const int32_t*>(dense_cu.const_data_ptr());
  const int64_t last = dense_cu.numel() - 1;
  int64_t longest = 0;
  bool rises = last >= 0 && at[0] == 0;
  for (int64_t b = 0; b < last; b++) {
    rises = rises && at[b + 1] >= at[b];
    longest = at[b + 1] - at[b] > longest ? at[b + 1] - at[b] : longest;
  }
  if (!rises || at[last] != positions)
    throw std::invalid_argument(std::string(name) + " must rise from 0 to the number of positions (" +
                                std::to_string(positions) + ")");
  return longest;
}
void measure_sequences(Extras& extras, const Tensor& query, const Tensor& key) {
  if (!extras.cu_q || !extras.cu_k || query.dim() != 4 || key.dim() != 4) return;
  const int64_t q = longest_sequence(*extras.cu_q, query.size(2), "cu_seqlens_q");
  const int64_t k = longest_sequence(*extras.cu_k, key.size(2), "cu_seqlens_k");
  // Where masks and weights were made for a length, it stays.
  extras.max_q = extras.max_q > q ? extras.max_q : q, extras.max_k = extras.max_k > k ? extras.max_k : k;
}

#define EXTRA_PARAMETERS                                                                         \
  std::optional<Tensor> mask, std::optional<Tensor> bias, std::optional<Tensor> slopes,          \
      std::optional<Tensor> key_lengths, std::optional<Tensor> cu_q, std::optional<Tensor> cu_k, \
      std::vector<Tensor> blocks, std::optional<Tensor> seed
#define OPTIONS int64_t causal, double scale, double softcap, double dropout_p, int64_t max_q, int64_t max_k
#define EXTRAS                                                                                           \
  Extras {                                                                                               \
    mask, bias, slopes, key_lengths, cu_q, cu_k, blocks, seed, causal, scale, softcap, dropout_p, max_q, \
        max_k                                                                                            \
  }
#define BACKWARD_PARAMETERS                                                                               \
  const Tensor &grad_out, const Tensor &query, const Tensor &key, const Tensor &value, const Tensor &out, \
      const Tensor &lse, EXTRA_PARAMETERS, std::optional<Tensor> saved_weights,                           \
      std::optional<Tensor> grad_weights, std::optional<Tensor> grad_lse, OPTIONS, bool need_query,       \
      bool need_key_value, bool need_bias
#define BACKWARD_INPUTS                                                                       \
  BackwardInputs {                                                                            \
    grad_out, query, key, value, out, lse, saved_weights, grad_weights, grad_lse, need_query, \
        need_key_value, need_bias                                                             \
  }

std::tuple<Tensor, Tensor> forward_cpu(const Tensor& query, const Tensor& key, const Tensor& value,
                                       EXTRA_PARAMETERS, OPTIONS) {
  check_lengths(key_lengths, key);
  Extras extras = EXTRAS;
  measure_sequences(extras, query, key);
  return forward(query, key, value, extras, run_pass_on_cpu);
}
Extras no_extras(bool causal, double scale) {
  Extras extras{};
  extras.causal = causal, extras.scale = scale;
  return extras;
}
std::tuple<Tensor, Tensor> plain_cpu(const Tensor& query, const Tensor& key, const Tensor& value, bool causal,
                                     double scale) {
  return forward(query, key, value, no_extras(causal, scale), run_pass_on_cpu);
}
Tensor weights_cpu(const Tensor& query, const Tensor& key, const Tensor& lse, EXTRA_PARAMETERS, OPTIONS) {
  Extras extras = EXTRAS;
  measure_sequences(extras, query, key);
  return weights(query, key, lse, extras, run_pass_on_cpu);
}
std::tuple<Tensor, Tensor, Tensor, Tensor> backward_cpu(BACKWARD_PARAMETERS) {
  Extras extras = EXTRAS;
  measure_sequences(extras, query, key);
  return backward(BACKWARD_INPUTS, extras, run_pass_on_cpu);
}

STABLE_TORCH_LIBRARY_IMPL(pyseqnet, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&forward_cpu));
  m.impl("attention_plain", TORCH_BOX(&plain_cpu));
  m.impl("attention_weights", TORCH_BOX(&weights_cpu));
  m.impl("attention_backward", TORCH_BOX(&backward_cpu));
}

#if defined(PYSEQNET_WITH_CUDA)
void run_pass_on_cuda(AttentionPass pass, const AttentionProblem& p, const AttentionTensors& t,
                      const Tensor& like) {
  AttentionProblem placed = p;
  placed.lines_aligned = lines_are_aligned(p, t);
  run_on_cuda("attention", operation_of(pass), attention_cuda_table(pass), placed, t, like);
}
std::tuple<Tensor, Tensor> forward_cuda(const Tensor& query, const Tensor& key, const Tensor& value,
                                        EXTRA_PARAMETERS, OPTIONS) {
  return forward(query, key, value, EXTRAS, run_pass_on_cuda);
}
std::tuple<Tensor, Tensor> plain_cuda(const Tensor& query, const Tensor& key, const Tensor& value,
                                      bool causal, double scale) {
  return forward(query, key, value, no_extras(causal, scale), run_pass_on_cuda);
}
Tensor weights_cuda(const Tensor& query, const Tensor& key, const Tensor& lse, EXTRA_PARAMETERS, OPTIONS) {
  return weights(query, key, lse, EXTRAS, run_pass_on_cuda);
}
std::tuple<Tensor, Tensor, Tensor, Tensor> backward_cuda(BACKWARD_PARAMETERS) {
  return backward(BACKWARD_INPUTS, EXTRAS, run_pass_on_cuda);
}

STABLE_TORCH_LIBRARY_IMPL(pyseqnet, CUDA, m) {
  m.impl("attention_forward", TORCH_BOX(&forward_cuda));
  m.impl("attention_plain", TORCH_BOX(&plain_cuda));
  m.impl("attention_weights", TORCH_BOX(&weights_cuda));
  m.impl("attention_backward", TORCH_BOX(&backward_cuda));
}
#endif

}  // namespace
}  // namespace pyseqnet
