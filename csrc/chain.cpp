// CTC and the linear-chain CRF at the border to torch: reads shapes and strides, allocates, hands problems to the
// dispatch tables. On the CPU lengths and labels are checked here; on CUDA kernels look at them, since reading them
// would wait for the device.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "chain/crf.h"
#include "chain/ctc.h"
#include "run_on_cpu.h"
#if defined(PYSEQNET_WITH_CUDA)
#include "run_on_cuda.h"
#endif

namespace pyseqnet {
namespace {

using torch::headeronly::ScalarType;
using Two = std::tuple<Tensor, Tensor>;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;

ScalarType sum_type(DType dtype) { return dtype == DType::f64 ? ScalarType::Double : ScalarType::Float; }

Tensor with_unit_rows(const Tensor& t) {
  return t.stride(2) == 1 || t.size(2) <= 1 ? t : dense(t, Layout::nchw);
}

Tensor new_dense(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
  int64_t steps[3] = {}, step = 1;
  require(product_fits(sizes), "pyseqnet: the tensor is too large");
  for (int64_t d = int64_t(sizes.size()) - 1; d >= 0; d--) steps[d] = step, step *= sizes.begin()[d];
  return new_tensor(like, sizes.begin(), steps, int64_t(sizes.size()), type);
}

// (count) or, with columns, (count, columns) int64 on the device of `like`, dense.
Tensor checked_integers(const Tensor& t, const Tensor& like, int64_t count, int64_t columns,
                        const char* complaint) {
  const bool shape = columns < 0 ? t.dim() == 1 && t.size(0) == count
                                 : t.dim() == 2 && t.size(0) == count && t.size(1) == columns;
  require(shape && t.scalar_type() == ScalarType::Long && t.device() == like.device(), complaint);
  return dense(t, Layout::nchw);
}
const int64_t* integers(const Tensor& t) { return static_cast<const int64_t*>(t.const_data_ptr()); }

// ---------------------------------------------------------------- CTC

using RunCtc = void (*)(const CtcProblem&, const CtcTensors&, const Tensor& like);

void check_on_host(const CtcProblem& p, const CtcTensors& t) {
  for (int64_t b = 0; b < p.B; b++) {
    const int64_t n = t.input_lengths[b], m = t.target_lengths[b], first = t.target_offsets[b];
    require(n >= 0 && n <= p.T, "ctc_loss: input_lengths must lie between 0 and T");
    require(m >= 0 && m <= p.longest && first >= 0 && first <= p.targets_size && m <= p.targets_size - first,
            "ctc_loss: target_lengths do not fit targets");
    for (int64_t s = first; s < first + m; s++) {
      require(t.targets[s] >= 0 && t.targets[s] < p.C, "ctc_loss: targets must lie between 0 and C - 1");
      require(t.targets[s] != p.blank, "ctc_loss: targets must not contain blank");
    }
  }
}

Two ctc(const Tensor& input, const Tensor& targets, const Tensor& target_offsets, const Tensor& input_lengths,
        const Tensor& target_lengths, int64_t longest, int64_t blank, bool from_logits, bool zero_infinity,
        bool with_gradient, bool on_host, RunCtc run) {
  require(input.dim() == 3, "ctc_loss: log_probs must have 3 dimensions here");
  CtcProblem p;
  p.dtype = dtype_of(input);
  p.T = input.size(0), p.B = input.size(1), p.C = input.size(2), p.blank = blank;
  require(p.C > 0, "ctc_loss: there must be at least one class");
  require(blank >= 0 && blank < p.C, "ctc_loss: blank must be in label range");
  require(longest >= 0, "ctc_loss: a target's length must not be negative");
  p.longest = longest, p.S = longest < p.T ? longest : p.T;
  p.from_logits = from_logits, p.zero_infinity = zero_infinity, p.with_gradient = with_gradient;
  require(product_fits({p.T, p.B, p.C}) && product_fits({p.T, 2 * p.S + 64, 8}),
          "ctc_loss: the tensors are too large");
  const Tensor x = with_unit_rows(input);
  p.x_t = x.stride(0), p.x_b = x.stride(1);
  require(targets.dim() == 1, "ctc_loss: targets must have 1 dimension here");
  p.targets_size = targets.size(0);
  constexpr const char* complaint =
      "ctc_loss: targets, offsets and lengths must be int64 on the input's device";
  const Tensor labels = checked_integers(targets, x, p.targets_size, -1, complaint);
  const Tensor offsets = checked_integers(target_offsets, x, p.B, -1, complaint);
  const Tensor steps = checked_integers(input_lengths, x, p.B, -1, complaint);
  const Tensor counts = checked_integers(target_lengths, x, p.B, -1, complaint);
  CtcTensors t;
  t.x = x.const_data_ptr(), t.targets = integers(labels), t.target_offsets = integers(offsets);
  t.input_lengths = integers(steps), t.target_lengths = integers(counts);
  if (on_host) check_on_host(p, t);
  Tensor loss = new_vector(x, p.B, sum_type(p.dtype));
  Tensor gx =
      with_gradient ? new_dense(x, {p.T, p.B, p.C}, x.scalar_type()) : new_vector(x, 0, x.scalar_type());
  t.loss = loss.mutable_data_ptr();
  if (with_gradient) t.gx = gx.mutable_data_ptr();
  run(p, t, x);
  return {loss, gx};
}

// ---------------------------------------------------------------- CRF

using RunCrf = void (*)(CrfPass, const CrfProblem&, const CrfTensors&, const Tensor& like);

// A call's problem, tensors, and what keeps their memory alive.
struct CrfCall {
  CrfProblem p;
  CrfTensors t;
  Tensor e, lengths, start, end, transitions;
  std::optional<Tensor> tags;

  CrfCall(const Tensor& emissions, std::optional<Tensor> given_tags, const Tensor& given_lengths,
          const Tensor& given_start, const Tensor& given_end, const Tensor& given_transitions, bool on_host)
      : e(emissions),
        lengths(given_lengths),
        start(given_start),
        end(given_end),
        transitions(given_transitions) {
    require(e.dim() == 3, "crf: emissions must have 3 dimensions");
    p.dtype = dtype_of(e);
    p.B = e.size(0), p.T = e.size(1), p.C = e.size(2);
    require(p.C > 0, "crf: there must be at least one tag");
    require(product_fits({p.B + 8, p.T + 1, p.C + 64}) && product_fits({p.B + 8, p.C + 64, p.C + 64}),
            "crf: the tensors are too large");
    e = with_unit_rows(e);
    p.e_b = e.stride(0), p.e_t = e.stride(1);
    const ScalarType sum = sum_type(p.dtype);
    const auto is_sum = [&](const Tensor& x) { return x.scalar_type() == sum && x.device() == e.device(); };
    require(
        start.dim() == 1 && start.size(0) == p.C && is_sum(start) && end.dim() == 1 && end.size(0) == p.C &&
            is_sum(end) && transitions.dim() == 2 && transitions.size(0) == p.C &&
            transitions.size(1) == p.C && is_sum(transitions),
        "crf: start and end must be (C,), transitions (C, C), float32 (float64 for float64), on one device");
    start = dense(start, Layout::nchw), end = dense(end, Layout::nchw),
    transitions = dense(transitions, Layout::nchw);
    lengths =
        checked_integers(lengths, e, p.B, -1, "crf: lengths must be (B,) int64 on the emissions' device");
    t.e = e.const_data_ptr(), t.lengths = integers(lengths), t.start = start.const_data_ptr();
    t.end = end.const_data_ptr(), t.transitions = transitions.const_data_ptr();
    if (given_tags) {
      tags = checked_integers(*given_tags, e, p.B, p.T,
                              "crf: tags must be (B, T) int64 on the emissions' device");
      t.tags = integers(*tags);
      p.with_tags = true;
    }
    if (on_host) check_on_host();
  }
  void check_on_host() const {
    for (int64_t b = 0; b < p.B; b++) {
      require(t.lengths[b] >= 1 && t.lengths[b] <= p.T, "crf: lengths must lie between 1 and T");
      for (int64_t step = 0; t.tags && step < t.lengths[b]; step++) {
        const int64_t tag = t.tags[b * p.T + step];
        require(tag >= 0 && tag < p.C, "crf: tags must lie between 0 and C - 1");
      }
    }
  }
};

Tensor crf_log_likelihood(CrfCall call, RunCrf run) {
  Tensor llh = new_vector(call.e, call.p.B, sum_type(call.p.dtype));
  call.t.llh = llh.mutable_data_ptr();
  run(CrfPass::log_likelihood, call.p, call.t, call.e);
  return llh;
}

Four crf_gradient(const Tensor& grad, CrfCall call, RunCrf run) {
  const CrfProblem& p = call.p;
  const ScalarType sum = sum_type(p.dtype);
  require(
      grad.dim() == 1 && grad.size(0) == p.B && grad.scalar_type() == sum && grad.device() == call.e.device(),
      "crf: grad must be (B,), float32 (float64 for float64), on the emissions' device");
  const Tensor g = dense(grad, Layout::nchw);
  Tensor ge = new_dense(call.e, {p.B, p.T, p.C}, call.e.scalar_type());
  Tensor gstart = new_vector(call.e, p.C, sum), gend = new_vector(call.e, p.C, sum);
  Tensor gtransitions = new_dense(call.e, {p.C, p.C}, sum);
  call.t.g = g.const_data_ptr(), call.t.ge = ge.mutable_data_ptr(), call.t.gstart = gstart.mutable_data_ptr();
  call.t.gend = gend.mutable_data_ptr(), call.t.gtransitions = gtransitions.mutable_data_ptr();
  run(CrfPass::gradient, p, call.t, call.e);
  return {ge, gstart, gend, gtransitions};
}

Two crf_viterbi(CrfCall call, int64_t nbest, RunCrf run) {
  CrfProblem& p = call.p;
  require(nbest >= 1, "crf: nbest must be positive");
  require(product_fits({p.B, p.T + 2, p.C, nbest, 8}), "crf: nbest is too large");
  p.nbest = nbest;
  Tensor paths = new_dense(call.e, {p.B, nbest, p.T}, ScalarType::Long);
  Tensor scores = new_dense(call.e, {p.B, nbest}, sum_type(p.dtype));
  call.t.paths = static_cast<int64_t*>(paths.mutable_data_ptr()), call.t.scores = scores.mutable_data_ptr();
  run(CrfPass::viterbi, p, call.t, call.e);
  return {paths, scores};
}

#define CTC_PARAMETERS                                                                                    \
  const Tensor &input, const Tensor &targets, const Tensor &target_offsets, const Tensor &input_lengths,  \
      const Tensor &target_lengths, int64_t longest, int64_t blank, bool from_logits, bool zero_infinity, \
      bool with_gradient
#define CTC_ARGUMENTS                                                                                        \
  input, targets, target_offsets, input_lengths, target_lengths, longest, blank, from_logits, zero_infinity, \
      with_gradient
#define CRF_POTENTIALS \
  const Tensor &lengths, const Tensor &start, const Tensor &end, const Tensor &transitions

void run_ctc_on_cpu(const CtcProblem& p, const CtcTensors& t, const Tensor& like) {
  run_on_cpu("chain", "ctc_loss", ctc_cpu_table(), p, t, like);
}
void run_crf_on_cpu(CrfPass pass, const CrfProblem& p, const CrfTensors& t, const Tensor& like) {
  run_on_cpu("chain", operation_of(pass), crf_cpu_table(pass), p, t, like);
}
Two ctc_cpu(CTC_PARAMETERS) { return ctc(CTC_ARGUMENTS, true, run_ctc_on_cpu); }
Tensor crf_log_likelihood_cpu(const Tensor& emissions, std::optional<Tensor> tags, CRF_POTENTIALS) {
  return crf_log_likelihood({emissions, tags, lengths, start, end, transitions, true}, run_crf_on_cpu);
}
Four crf_gradient_cpu(const Tensor& grad, const Tensor& emissions, std::optional<Tensor> tags,
                      CRF_POTENTIALS) {
  return crf_gradient(grad, {emissions, tags, lengths, start, end, transitions, true}, run_crf_on_cpu);
}
Two crf_viterbi_cpu(const Tensor& emissions, CRF_POTENTIALS, int64_t nbest) {
  return crf_viterbi({emissions, std::nullopt, lengths, start, end, transitions, true}, nbest,
                     run_crf_on_cpu);
}

STABLE_TORCH_LIBRARY_IMPL(pyseqnet, CPU, m) {
  m.impl("ctc_loss", TORCH_BOX(&ctc_cpu));
  m.impl("crf_log_likelihood", TORCH_BOX(&crf_log_likelihood_cpu));
  m.impl("crf_gradient", TORCH_BOX(&crf_gradient_cpu));
  m.impl("crf_viterbi", TORCH_BOX(&crf_viterbi_cpu));
}

#if defined(PYSEQNET_WITH_CUDA)
void run_ctc_on_cuda(const CtcProblem& p, const CtcTensors& t, const Tensor& like) {
  run_on_cuda("chain", "ctc_loss", ctc_cuda_table(), p, t, like);
}
void run_crf_on_cuda(CrfPass pass, const CrfProblem& p, const CrfTensors& t, const Tensor& like) {
  run_on_cuda("chain", operation_of(pass), crf_cuda_table(pass), p, t, like);
}
Two ctc_cuda(CTC_PARAMETERS) { return ctc(CTC_ARGUMENTS, false, run_ctc_on_cuda); }
Tensor crf_log_likelihood_cuda(const Tensor& emissions, std::optional<Tensor> tags, CRF_POTENTIALS) {
  return crf_log_likelihood({emissions, tags, lengths, start, end, transitions, false}, run_crf_on_cuda);
}
Four crf_gradient_cuda(const Tensor& grad, const Tensor& emissions, std::optional<Tensor> tags,
                       CRF_POTENTIALS) {
  return crf_gradient(grad, {emissions, tags, lengths, start, end, transitions, false}, run_crf_on_cuda);
}
Two crf_viterbi_cuda(const Tensor& emissions, CRF_POTENTIALS, int64_t nbest) {
  return crf_viterbi({emissions, std::nullopt, lengths, start, end, transitions, false}, nbest,
                     run_crf_on_cuda);
}

STABLE_TORCH_LIBRARY_IMPL(pyseqnet, CUDA, m) {
  m.impl("ctc_loss", TORCH_BOX(&ctc_cuda));
  m.impl("crf_log_likelihood", TORCH_BOX(&crf_log_likelihood_cuda));
  m.impl("crf_gradient", TORCH_BOX(&crf_gradient_cuda));
  m.impl("crf_viterbi", TORCH_BOX(&crf_viterbi_cuda));
}
#endif

}  // namespace
}  // namespace pyseqnet
