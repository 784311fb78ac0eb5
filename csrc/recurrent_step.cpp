// One step of one recurrent cell, without what a backward would need: what a decoder calls for every token.
// The same kernels as a layer's (T = 1), behind a narrower door: views, lists and results that a single step
// does not need cost more there than its arithmetic.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <string>
#include <tuple>

#include "recurrent/recurrent.h"
#include "run_on_cpu.h"
#include "string_argument.h"
#if defined(PYSEQNET_WITH_CUDA)
#include "run_on_cuda.h"
#endif

namespace pyseqnet {
namespace {

using Optional = std::optional<Tensor>;

RecurrentCell cell_named(const std::string& name) {
  RecurrentCell cell = {};
  if (!find_cell(name, cell) || facts_of(cell).parameters || facts_of(cell).feeds_cell ||
      facts_of(cell).feeds_output)
    throw std::invalid_argument("recurrent: a step's cell must be rnn_tanh, rnn_relu, lstm or gru, got '" +
                                name + "'");
  return cell;
}

// A tensor of this shape, and of input's dtype and device, row-major.
Tensor operand(const Tensor& t, const Tensor& input, int64_t rows, int64_t columns, const char* complaint) {
  const bool fits = columns < 0 ? t.dim() == 1 && t.size(0) == rows
                                : t.dim() == 2 && t.size(0) == rows && t.size(1) == columns;
  require(fits && t.scalar_type() == input.scalar_type() && t.device() == input.device(), complaint);
  return dense(t, Layout::nchw);
}

Tensor new_matrix(const Tensor& like, int64_t rows, int64_t columns) {
  const int64_t sizes[] = {rows, columns}, strides[] = {columns > 0 ? columns : 1, 1};
  return new_tensor(like, sizes, strides, 2, like.scalar_type());
}

using RunForward = void (*)(const RecurrentProblem&, const RecurrentTensors&, const Tensor& like);
using States = std::tuple<Tensor, Tensor>;

States step(const Tensor& input, const Optional& h, const Optional& c, const Tensor& w_ih, const Tensor& w_hh,
            const Optional& b_ih, const Optional& b_hh, const std::string& cell, RunForward run) {
  RecurrentProblem p;
  p.dtype = dtype_of(input);
  p.cell = cell_named(cell);
  p.reserve = false;
  require(input.dim() == 2, "recurrent: a step's input must be (B, I)");
  require(w_hh.dim() == 2 && w_hh.size(1) > 0,
          "recurrent: w_hh must be (gates * hidden units, hidden units)");
  p.T = 1, p.B = input.size(0), p.I = input.size(1), p.H = w_hh.size(1);
  // The kernels' workspaces are products of these, with room for a few of them side by side.
  constexpr int64_t largest_extent = int64_t(1) << 40;
  require(p.B < largest_extent && p.I < largest_extent && p.H < largest_extent &&
              product_fits({p.B + 1, 64, p.H + p.I}) && product_fits({64, p.H, p.I + p.H}),
          "recurrent: the problem is too large");
  require(bool(b_ih) == bool(b_hh), "recurrent: a step has both biases or none");
  require(p.has_cell() || !c, "recurrent: only an lstm has a cell state");
  const int64_t rows = p.gates() * p.H;
  const Tensor x = dense(input, Layout::nchw);
  const Tensor wi = operand(w_ih, x, rows, p.I, "recurrent: w_ih does not fit the step");
  const Tensor wh = operand(w_hh, x, rows, p.H, "recurrent: w_hh does not fit the step");
  // What is absent is stood for by x: a reference costs less than an optional, and is not read.
  const Tensor bi = b_ih ? operand(*b_ih, x, rows, -1, "recurrent: b_ih does not fit the step") : x;
  const Tensor bh = b_hh ? operand(*b_hh, x, rows, -1, "recurrent: b_hh does not fit the step") : x;
  const Tensor h0 = h ? operand(*h, x, p.B, p.H, "recurrent: h does not fit the step") : x;
  const Tensor c0 = c ? operand(*c, x, p.B, p.H, "recurrent: c does not fit the step") : x;
  const Tensor h1 = new_matrix(x, p.B, p.H);
  const Tensor c1 = p.has_cell() ? new_matrix(x, p.B, p.H) : new_matrix(x, 0, 0);
  p.x_t = p.y_t = 0, p.x_b = p.I, p.y_b = p.H;
  RecurrentTensors t;
  t.x = x.const_data_ptr();
  t.h0 = h ? h0.const_data_ptr() : nullptr;
  t.c0 = c ? c0.const_data_ptr() : nullptr;
  t.weights[0].w_ih = wi.const_data_ptr(), t.weights[0].w_hh = wh.const_data_ptr();
  t.weights[0].b_ih = b_ih ? bi.const_data_ptr() : nullptr;
  t.weights[0].b_hh = b_hh ? bh.const_data_ptr() : nullptr;
  t.y = t.h_n = h1.mutable_data_ptr();  // of one step the output is the last state
  if (p.has_cell()) t.c_n = c1.mutable_data_ptr();
  run(p, t, x);
  return {h1, c1};
}

#define STEP_PARAMETERS                                                                              \
  const Tensor &input, const Optional &h, const Optional &c, const Tensor &w_ih, const Tensor &w_hh, \
      const Optional &b_ih, const Optional &b_hh, StringHandle cell

constexpr RecurrentPass forward = RecurrentPass::forward;

States step_cpu(STEP_PARAMETERS) {
  return step(input, h, c, w_ih, w_hh, b_ih, b_hh, taken(cell),
              [](const RecurrentProblem& p, const RecurrentTensors& t, const Tensor& like) {
                run_on_cpu("recurrent", operation_of(forward), recurrent_cpu_table(forward), p, t, like);
              });
}

STABLE_TORCH_LIBRARY_IMPL(pyseqnet, CPU, m) { m.impl("recurrent_step", TORCH_BOX(&step_cpu)); }

#if defined(PYSEQNET_WITH_CUDA)
States step_cuda(STEP_PARAMETERS) {
  return step(input, h, c, w_ih, w_hh, b_ih, b_hh, taken(cell),
              [](const RecurrentProblem& p, const RecurrentTensors& t, const Tensor& like) {
                run_on_cuda("recurrent", operation_of(forward), recurrent_cuda_table(forward), p, t, like);
              });
}

STABLE_TORCH_LIBRARY_IMPL(pyseqnet, CUDA, m) { m.impl("recurrent_step", TORCH_BOX(&step_cuda)); }
#endif

}  // namespace
}  // namespace pyseqnet
