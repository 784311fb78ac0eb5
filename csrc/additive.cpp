// Additive attention at the border to torch: reads shapes and strides, allocates, hands the problem to the
// dispatch tables. Nothing is copied unless its last dimension is strided.
#include "attention/additive.h"

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "run_on_cpu.h"
#if defined(PYSEQNET_WITH_CUDA)
#include "run_on_cuda.h"
#endif

namespace pyseqnet {
namespace {

using torch::headeronly::ScalarType;
using RunPass = void (*)(AdditivePass, const AdditiveProblem&, const AdditiveTensors&, const Tensor& like);

void run_pass_on_cpu(AdditivePass pass, const AdditiveProblem& p, const AdditiveTensors& t,
                     const Tensor& like) {
  run_on_cpu("additive_attention", operation_of(pass), additive_cpu_table(pass), p, t, like);
}

Tensor compact(const Tensor& t) { return dense(t, Layout::nchw); }

Tensor with_unit_channels(const Tensor& t, const char* complaint) {
  require(t.dim() == 3, complaint);
  return t.stride(2) == 1 || t.size(2) == 1 ? t : compact(t);
}
AdditiveStrides strides_of(const Tensor& t) { return {t.stride(0), t.stride(1)}; }

Tensor new_dense(const Tensor& like, std::initializer_list<int64_t> extents, ScalarType type) {
  int64_t sizes[3], steps[3], dims = 0, step = 1;
  for (int64_t extent : extents) sizes[dims++] = extent;
  if (!product_fits(extents)) throw_out_of_memory(sizes, dims);
  for (int64_t d = dims - 1; d >= 0; d--) steps[d] = step, step *= sizes[d];
  return new_tensor(like, sizes, steps, dims, type);
}

void require_tensor(const Tensor& t, const Tensor& query, std::initializer_list<int64_t> sizes,
                    const char* complaint) {
  bool fits = t.scalar_type() == query.scalar_type() && t.device() == query.device() &&
              t.dim() == int64_t(sizes.size());
  int64_t d = 0;
  for (int64_t size : sizes) fits = fits && t.size(d++) == size;
  require(fits, complaint);
}

// What every pass reads: kept alive here, described in problem and pointers.
struct Call {
  Tensor query, key, weight;
  std::optional<Tensor> bias, key_lengths;
  AdditiveProblem p;
  AdditiveTensors t;

  Call(const Tensor& q, const Tensor& k, const Tensor& w, const std::optional<Tensor>& b,
       const std::optional<Tensor>& lengths)
      : query(with_unit_channels(q, "additive_attention: query must have 3 dimensions")),
        key(with_unit_channels(k, "additive_attention: key must have 3 dimensions")),
        weight(compact(w)) {
    p.dtype = dtype_of(query);
    p.B = query.size(0), p.L = query.size(1), p.D = query.size(2), p.S = key.size(1), p.E = 1;
    require(p.D > 0, "additive_attention: the width of query and key must not be empty");
    require_tensor(key, query, {p.B, p.S, p.D}, "additive_attention: key does not fit the query");
    require_tensor(weight, query, {p.D}, "additive_attention: weight does not fit the query");
    require(product_fits({p.B, p.L, p.S}), "additive_attention: the problem is too large");
    p.q = strides_of(query), p.k = strides_of(key);
    t.q = query.const_data_ptr(), t.k = key.const_data_ptr(), t.w = weight.const_data_ptr();
    if (b) {
      bias = compact(*b);
      require_tensor(*bias, query, {p.D}, "additive_attention: bias does not fit the query");
      p.with_bias = true;
      t.bias = bias->const_data_ptr();
    }
    if (lengths) {
      require(lengths->dim() == 1 && lengths->size(0) == p.B && lengths->scalar_type() == ScalarType::Long &&
                  lengths->device() == query.device(),
              "additive_attention: key_lengths must be (batch,) int64 on the query's device");
      key_lengths = compact(*lengths);
      p.with_key_lengths = true;
      t.key_lengths = static_cast<const int64_t*>(key_lengths->const_data_ptr());
    }
  }

  Tensor read_value(const Tensor& value_in) {
    Tensor value = with_unit_channels(value_in, "additive_attention: value must have 3 dimensions");
    p.E = value.size(2);
    require(p.E > 0, "additive_attention: the width of value must not be empty");
    require_tensor(value, query, {p.B, p.S, p.E}, "additive_attention: value does not fit the key");
    p.v = strides_of(value), t.v = value.const_data_ptr();
    return value;
  }
  ScalarType statistic_type() const { return p.dtype == DType::f64 ? ScalarType::Double : ScalarType::Float; }
  Tensor read_lse(const Tensor& lse_in) {
    require(lse_in.dim() == 2 && lse_in.size(0) == p.B && lse_in.size(1) == p.L &&
                lse_in.scalar_type() == statistic_type() && lse_in.device() == query.device(),
            "additive_attention: lse is not what forward gave");
    Tensor lse = compact(lse_in);
    t.lse = const_cast<void*>(lse.const_data_ptr());
    return lse;
  }
};

std::tuple<Tensor, Tensor> forward(Call call, const Tensor& value_in, RunPass run) {
  const AdditiveProblem& p = call.p;
  const Tensor value = call.read_value(value_in);
  Tensor out = new_dense(call.query, {p.B, p.L, p.E}, call.query.scalar_type());
  Tensor lse = new_dense(call.query, {p.B, p.L}, call.statistic_type());
  call.t.out = out.mutable_data_ptr(), call.t.lse = lse.mutable_data_ptr();
  run(AdditivePass::forward, p, call.t, call.query);
  return {out, lse};
}

Tensor weights(Call call, const Tensor& lse_in, RunPass run) {
  const Tensor lse = call.read_lse(lse_in);
  Tensor result = new_dense(call.query, {call.p.B, call.p.L, call.p.S}, call.query.scalar_type());
  call.t.weights = result.mutable_data_ptr();
  run(AdditivePass::weights, call.p, call.t, call.query);
  return result;
}

struct BackwardInputs {
  const Tensor &grad_out, &value, &out, &lse;
  std::optional<Tensor> weights, grad_weights;
  bool need_scores, need_value;
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(Call call, BackwardInputs in, RunPass run) {
  AdditiveProblem& p = call.p;
  AdditiveTensors& t = call.t;
  const Tensor& query = call.query;
  const Tensor value = call.read_value(in.value);
  const Tensor lse = call.read_lse(in.lse), out = compact(in.out);
  const Tensor gout =
      with_unit_channels(in.grad_out, "additive_attention: the gradient must have 3 dimensions");
  require_tensor(gout, query, {p.B, p.L, p.E}, "additive_attention: the gradient does not fit the output");
  require_tensor(out, query, {p.B, p.L, p.E}, "additive_attention: out is not what forward gave");
  p.gout = strides_of(gout), t.gout = gout.const_data_ptr();
  t.out = const_cast<void*>(out.const_data_ptr());
  require(in.weights.has_value() == in.grad_weights.has_value(),
          "additive_attention: weights and their gradient come together");
  if (in.weights) {
    const char* complaint = "additive_attention: the weights' gradient does not fit the weights";
    in.weights = compact(*in.weights), in.grad_weights = compact(*in.grad_weights);
    require_tensor(*in.weights, query, {p.B, p.L, p.S}, complaint);
    require_tensor(*in.grad_weights, query, {p.B, p.L, p.S}, complaint);
    p.with_gweights = true;
    t.weights = const_cast<void*>(in.weights->const_data_ptr());
    t.gweights = in.grad_weights->const_data_ptr();
  }
  p.need_scores = in.need_scores, p.need_value = in.need_value;
  const ScalarType type = query.scalar_type();
  const auto result = [&](bool needed, std::initializer_list<int64_t> extents, void*& pointer) {
    Tensor made = needed ? new_dense(query, extents, type) : new_dense(query, {0}, type);
    pointer = made.mutable_data_ptr();
    return made;
  };
  Tensor gq = result(p.need_scores, {p.B, p.L, p.D}, t.gq), gk = result(p.need_scores, {p.B, p.S, p.D}, t.gk);
  Tensor gv = result(p.need_value, {p.B, p.S, p.E}, t.gv);
  Tensor gw = result(p.need_scores, {p.D}, t.gw), gbias = result(p.need_scores, {p.D}, t.gbias);
  if (p.need_scores || p.need_value) run(AdditivePass::backward, p, t, query);
  return {gq, gk, gv, gw, gbias};
}

// The CPU can look at the lengths; kernels clamp them as well, for on a GPU nobody can without waiting for it.
void check_lengths(const std::optional<Tensor>& key_lengths, const Tensor& key) {
  if (!key_lengths || key.dim() != 3 || key_lengths->scalar_type() != ScalarType::Long) return;
  const Tensor lengths = compact(*key_lengths);
  const int64_t* length = static_cast<const int64_t*>(lengths.const_data_ptr());
  for (int64_t b = 0; b < lengths.numel(); b++)
    if (length[b] < 0 || length[b] > key.size(1))
      throw std::invalid_argument("key_lengths must be between 0 and the number of keys (" +
                                  std::to_string(key.size(1)) + "), got " + std::to_string(length[b]));
}

#define FORWARD_PARAMETERS                                                           \
  const Tensor &query, const Tensor &key, const Tensor &value, const Tensor &weight, \
      std::optional<Tensor> bias, std::optional<Tensor> key_lengths
#define WEIGHTS_PARAMETERS                                                         \
  const Tensor &query, const Tensor &key, const Tensor &weight, const Tensor &lse, \
      std::optional<Tensor> bias, std::optional<Tensor> key_lengths
#define BACKWARD_PARAMETERS                                                                                  \
  const Tensor &grad_out, const Tensor &query, const Tensor &key, const Tensor &value, const Tensor &weight, \
      const Tensor &out, const Tensor &lse, std::optional<Tensor> bias, std::optional<Tensor> key_lengths,   \
      std::optional<Tensor> saved_weights, std::optional<Tensor> grad_weights, bool need_scores,             \
      bool need_value
#define CALL \
  Call { query, key, weight, bias, key_lengths }
#define BACKWARD_INPUTS \
  BackwardInputs { grad_out, value, out, lse, saved_weights, grad_weights, need_scores, need_value }
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

std::tuple<Tensor, Tensor> forward_cpu(FORWARD_PARAMETERS) {
  check_lengths(key_lengths, key);
  return forward(CALL, value, run_pass_on_cpu);
}
Tensor weights_cpu(WEIGHTS_PARAMETERS) { return weights(CALL, lse, run_pass_on_cpu); }
Gradients backward_cpu(BACKWARD_PARAMETERS) { return backward(CALL, BACKWARD_INPUTS, run_pass_on_cpu); }

STABLE_TORCH_LIBRARY_IMPL(pyseqnet, CPU, m) {
  m.impl("additive_attention_forward", TORCH_BOX(&forward_cpu));
  m.impl("additive_attention_weights", TORCH_BOX(&weights_cpu));
  m.impl("additive_attention_backward", TORCH_BOX(&backward_cpu));
}

#if defined(PYSEQNET_WITH_CUDA)
void run_pass_on_cuda(AdditivePass pass, const AdditiveProblem& p, const AdditiveTensors& t,
                      const Tensor& like) {
  run_on_cuda("additive_attention", operation_of(pass), additive_cuda_table(pass), p, t, like);
}
std::tuple<Tensor, Tensor> forward_cuda(FORWARD_PARAMETERS) { return forward(CALL, value, run_pass_on_cuda); }
Tensor weights_cuda(WEIGHTS_PARAMETERS) { return weights(CALL, lse, run_pass_on_cuda); }
Gradients backward_cuda(BACKWARD_PARAMETERS) { return backward(CALL, BACKWARD_INPUTS, run_pass_on_cuda); }

STABLE_TORCH_LIBRARY_IMPL(pyseqnet, CUDA, m) {
  m.impl("additive_attention_forward", TORCH_BOX(&forward_cuda));
  m.impl("additive_attention_weights", TORCH_BOX(&weights_cuda));
  m.impl("additive_attention_backward", TORCH_BOX(&backward_cuda));
}
#endif

}  // namespace
}  // namespace pyseqnet
