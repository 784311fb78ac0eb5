// The recurrent family on any CUDA device, for every cell and option: one block walks one sequence in one
// direction from its first step to its last. It takes what the kernels that go step by step leave, because a
// cell wants more than its own sums: unit parameters, statistics over a row, masks, the other state, an output
// layer.
//
//   forward   list_rows, recurrent_product   the input's part of all gates, of all steps at once
//             walk_forward                   the walk: sums, cell, output, step after step
//   backward  walk_backward                  back: leaves the gradients of all slots' sums
//             recurrent_product              the gradients of x and of the weights from them
//             sum_parameter_gradients        the cell's parameters', over sequences, in one order
//
// Why a block a sequence: all that a step needs of the step before is in one block, so the barrier is
// __syncthreads, a row's statistics are a reduction inside it, and any H, T and B works. Its price is that each
// block reads all recurrent weights every step, from L2, and that a small batch leaves most of a GPU idle: this
// is the kernel that is always right, not the fast one. The walks are compiled for each cell and for float and
// double sums; the tensors' dtype is asked when they run, once a loop.
//
// Work and traffic of a layer-normalised LSTM in float32, T 100, B 32, H = I = 256: a block reads 1 MiB of
// weights a step, 3.4 GB in all from L2; 1.7 GFLOP in each walk; to and from memory 3.3 MB of x, 3.3 MB of y,
// 39 MB of slots and 3.3 MB of cells. Predicted for an H200 before any measurement (none was made when this was
// written): one multiprocessor draws at most 64 bytes a clock from L2, 9.4 us a step. A thread has 16 loads
// under way, forward (a warp sums 4 rows, 4 of a row's loads each) as backward (a thread sums a column): 64 round
// trips of 0.4 us, 26 us a step, 2.6 ms in all, each way. Bound by the latency of these loads.
#include <algorithm>

#include "recurrent/recurrent_gemm.cuh"
#include "recurrent/recurrent_launches.cuh"
#include "recurrent/recurrent_walk.cuh"

namespace pyseqnet {
namespace {

// ---------------------------------------------------------------- parameters
constexpr int parameter_threads = 128;

// to = values + also.
template <class Acc>
__global__ void __launch_bounds__(parameter_threads)
    gather_parameters(const Stored<Acc> values, const Stored<Acc> also, Acc* __restrict__ to, int64_t count) {
  const int64_t i = int64_t(blockIdx.x) * parameter_threads + threadIdx.x;
  if (i < count) to[i] = values[i] + also[i];
}
// to = also = the sum over sequences; null: not wanted.
template <class Acc>
__global__ void __launch_bounds__(parameter_threads)
    sum_parameter_gradients(const Acc* __restrict__ from, int64_t sequences, int64_t stride,
                            const Stored<Acc> to, const Stored<Acc> also, int64_t count) {
  const int64_t i = int64_t(blockIdx.x) * parameter_threads + threadIdx.x;
  if (i >= count) return;
  Acc sum = 0;
  for (int64_t b = 0; b < sequences; b++) sum += from[b * stride + i];
  if (to) to.put(i, sum);
  if (also) also.put(i, sum);
}

// ---------------------------------------------------------------- host
template <class Acc>
struct ForwardMemory {
  Workspace memory;
  RowLists rows = {};
  Acc *parameters, *from_input, *scratch;
  ForwardScratch layout;
  int64_t bytes;

  static bool in_reserve(const RecurrentProblem& p) { return p.reserve && p.saved(); }
  ForwardMemory(const RecurrentProblem& p, void* base) : memory(base), layout(p, !in_reserve(p)) {
    rows.row = memory.take<int64_t>(p.rows());
    rows.x = memory.take<int64_t>(p.rows());
    parameters = memory.take<Acc>(p.D * p.facts().parameters * p.H);
    from_input = memory.take<Acc>(in_reserve(p) ? 0 : p.D * p.rows() * p.gates() * p.H);
    scratch = memory.take<Acc>(p.D * p.B * layout.elements);
    bytes = memory.bytes();
  }
};

template <class Acc>
Product gradient_product(int64_t existing, int64_t rows, int64_t columns) {
  Product product;
  product.rows = rows, product.columns = columns, product.depth = existing;
  cut_into_parts<Acc>(product);
  return product;
}
int64_t existing_rows(const RecurrentProblem& p) {
  if (p.packed()) return p.rows();
  int64_t rows = p.lengths ? 0 : p.T * p.B;
  for (int64_t b = 0; p.lengths && b < p.B; b++) rows += p.lengths[b];
  return rows;
}

template <class Acc>
struct BackwardMemory {
  Workspace memory;
  RowLists rows = {};
  Acc *parameters, *parameter_gradients, *slot_gradients, *outputs, *unprojected, *h_before, *c_before;
  Acc *scratch, *partial;
  BackwardScratch layout;
  int64_t bytes;

  BackwardMemory(const RecurrentProblem& p, void* base) : memory(base), layout(p) {
    const CellFacts facts = p.facts();
    const int64_t all = p.D * p.rows();
    rows.row = memory.take<int64_t>(p.rows());
    rows.x = memory.take<int64_t>(p.rows());
    rows.gx = memory.take<int64_t>(p.rows());
    parameters = memory.take<Acc>(p.D * facts.parameters * p.H);
    parameter_gradients = memory.take<Acc>(p.D * p.B * facts.parameters * p.H);
    slot_gradients = memory.take<Acc>(all * facts.sums() * p.H);
    outputs = memory.take<Acc>(all * p.P);
    unprojected = memory.take<Acc>(p.P ? all * p.H : 0);
    h_before = memory.take<Acc>(all * p.R());
    c_before = memory.take<Acc>(facts.has_cell ? all * p.H : 0);
    scratch = memory.take<Acc>(p.D * p.B * layout.elements);
    int64_t most = 0;
    const auto count = [&](int64_t r, int64_t c) {
      const Product product = gradient_product<Acc>(existing_rows(p), r, c);
      most = std::max(most, product.parts * product.part_results());
    };
    for (int64_t columns : {p.I, p.R(), p.H}) count(p.gates() * p.H, columns);
    count(p.P, p.H);
    partial = memory.take<Acc>(most);
    bytes = memory.bytes();
  }
};

// f(tag) with tag::Cell<Math>.
template <template <class> class Cell_>
struct CellTag {
  template <class Math>
  using Cell = Cell_<Math>;
};
template <class F>
int dispatch_cell(RecurrentCell cell, F&& f) {
  switch (cell) {
    case RecurrentCell::rnn_tanh:
      return f(CellTag<TanhCell>{});
    case RecurrentCell::rnn_relu:
      return f(CellTag<ReluCell>{});
    case RecurrentCell::gru:
      return f(CellTag<GruCell>{});
    case RecurrentCell::lstm_peephole:
      return f(CellTag<PeepholeLstmCell>{});
    case RecurrentCell::lstm_full_peephole:
      return f(CellTag<FullPeepholeLstmCell>{});
    case RecurrentCell::lstm_layer_norm:
      return f(CellTag<LayerNormLstmCell>{});
    case RecurrentCell::jordan_tanh:
      return f(CellTag<JordanTanhCell>{});
    case RecurrentCell::jordan_relu:
      return f(CellTag<JordanReluCell>{});
    case RecurrentCell::lstm:
      break;
  }
  return f(CellTag<LstmCell>{});
}

template <class Acc>
void fill_layer(WalkLayer<Acc>& w, const RecurrentProblem& p, const RecurrentTensors& t, Acc* parameters,
                Acc* scratch, int64_t scratch_elements) {
  const auto stored = [&](const void* elements) { return Stored<Acc>{elements, p.dtype}; };
  const CellFacts facts = p.facts();
  w.q = sequences_of(p, t);
  w.H = p.H, w.R = p.R(), w.P = p.P, w.gates = facts.gates * p.H;
  for (int64_t d = 0; d < p.D; d++) {
    const RecurrentWeights& of = t.weights[d];
    w.w_hh[d] = stored(of.w_hh), w.w_hr[d] = stored(of.w_hr);
    w.w_ch[d] = stored(facts.feeds_cell ? of.w_ch : nullptr);
    w.output_bias[d] = stored(of.b_hr);
    w.recurrent_bias[d] = stored(of.b_hh);
  }
  w.parameters = parameters;
  w.h0 = stored(t.h0), w.c0 = stored(t.c0);
  w.zone_h = t.zone_h, w.zone_c = t.zone_c;
  w.options = {Acc(p.limit), Acc(p.zone_h), Acc(p.zone_c), p.limit != 0};
  w.decay = Acc(p.decay), w.unit = p.output, w.is_jordan = p.is_jordan();
  w.scratch = scratch, w.scratch_elements = scratch_elements;
}

template <class Acc>
void launch_gather_parameters(Launches& run, const RecurrentProblem& p, const RecurrentTensors& t, Acc* to,
                              void* stream) {
  for (int64_t d = 0; d < p.D; d++) {
    const auto blocks = parameter_blocks<const void*>(p.cell, t.weights[d]);
    for (int k = 0; k < blocks.count; k++) {
      const int64_t count = blocks.block[k].rows * p.H;
      run([&] {
        return launch({.grid = grid_of(ceil_divide(count, parameter_threads)),
                       .block = dim3(parameter_threads),
                       .stream = stream},
                      gather_parameters<Acc>, Stored<Acc>{blocks.block[k].values, p.dtype},
                      Stored<Acc>{blocks.block[k].also, p.dtype}, to, count);
      });
      to += count;
    }
  }
}

template <class T>
int launch_forward(const RecurrentProblem& p, const RecurrentTensors& t, void* workspace, void* stream) {
  using Acc = accumulator_t<T>;
  const ForwardMemory<Acc> memory(p, workspace);
  const CellFacts facts = p.facts();
  WalkForward<Acc> w = {};
  const auto stored = [&](const void* elements) { return Stored<Acc>{elements, p.dtype}; };
  fill_layer(w, p, t, memory.parameters, memory.scratch, memory.layout.elements);
  const bool in_reserve = ForwardMemory<Acc>::in_reserve(p);
  w.from_input = in_reserve ? nullptr : memory.from_input;
  w.saved = in_reserve ? static_cast<Acc*>(t.gates) : nullptr;
  w.cells = p.reserve && p.cell_width() ? static_cast<Acc*>(t.cells) : nullptr;
  w.y = stored(t.y), w.h_n = stored(t.h_n), w.c_n = stored(t.c_n);
  w.y_t = p.y_t, w.y_b = p.y_b;
  Launches run;
  run([&] {
    return launch_list_rows(w.q, memory.rows, {.x_t = p.x_t, .x_b = p.x_b, .D = p.D, .R = p.R()}, stream);
  });
  run([&] { return launch_zero_padding<T>(w.q, t.y, p.y_t, p.y_b, p.D * p.R(), stream); });
  launch_gather_parameters<Acc>(run, p, t, memory.parameters, stream);
  for (int64_t d = 0; d < p.D; d++) {
    Product product;
    product.rows = existing_rows(p), product.columns = w.gates, product.depth = p.I;
    Operand &x = product.source[0].row, &w_ih = product.source[0].column;
    x.elements = t.x, x.line_list = memory.rows.x, x.along_depth = true;
    w_ih.elements = t.weights[d].w_ih, w_ih.line_stride = p.I, w_ih.along_depth = true;
    if (!facts.over_units) {
      product.bias = t.weights[d].b_ih, product.second_bias = t.weights[d].b_hh;
      product.second_bias_columns = facts.apart_from * p.H;
    }
    product.out_list = memory.rows.row;
    product.out_stride = in_reserve ? facts.slots * p.H : w.gates;
    product.out_origin = -d * p.rows() * product.out_stride;
    Acc* const to = in_reserve ? static_cast<Acc*>(t.gates) : memory.from_input;
    run([&] { return launch_product<T, T, Acc>(product, to, stream); });
  }
  if (p.D * p.B > 0)
    run([&] {
      return dispatch_cell(p.cell, [&](auto tag) {
        return launch({.grid = grid_of(p.D * p.B), .block = dim3(walk_threads), .stream = stream},
                      walk_forward<Acc, decltype(tag)::template Cell>, w, memory.layout);
      });
    });
  return run.error();
}

template <class T>
int launch_input_gradient(const RecurrentProblem& p, const RecurrentTensors& t,
                          const BackwardMemory<accumulator_t<T>>& memory, void* stream) {
  const int64_t width = p.facts().sums() * p.H;
  Product product;
  product.rows = existing_rows(p), product.columns = p.I, product.depth = p.gates() * p.H;
  product.sources = int(p.D);
  for (int64_t d = 0; d < p.D; d++) {
    Operand &slots = product.source[d].row, &w_ih = product.source[d].column;
    slots.elements = memory.slot_gradients + d * p.rows() * width;
    slots.line_list = memory.rows.row, slots.line_stride = width, slots.along_depth = true;
    w_ih.elements = t.weights[d].w_ih, w_ih.depth_stride = p.I;
  }
  product.out_list = memory.rows.gx, product.out_stride = 1;
  return launch_product<accumulator_t<T>, T, T>(product, t.gx, stream);
}

template <class T>
void launch_weight_gradients(Launches& run, const RecurrentProblem& p, const RecurrentTensors& t,
                             const BackwardMemory<accumulator_t<T>>& memory, int64_t d, void* stream) {
  using Acc = accumulator_t<T>;
  const CellFacts facts = p.facts();
  const RecurrentGradients& to = t.gradients[d];
  const int64_t first = d * p.rows(), existing = existing_rows(p), gates = facts.gates * p.H;
  const auto finish = [&](const Product& product, void* gradient, void* row_sums) {
    run([&] { return launch_sum_recurrent_parts<T>(product, memory.partial, gradient, row_sums, stream); });
  };
  Operand slots;
  slots.elements = memory.slot_gradients + first * facts.sums() * p.H;
  slots.depth_list = memory.rows.row, slots.depth_stride = facts.sums() * p.H;
  Product of_input = gradient_product<Acc>(existing, gates, p.I);
  of_input.source[0].row = slots;
  of_input.source[0].column.elements = t.x, of_input.source[0].column.depth_list = memory.rows.x;
  run([&] { return launch_product<Acc, T, Acc>(of_input, memory.partial, stream); });
  finish(of_input, to.w_ih, facts.over_units ? nullptr : to.b_ih);

  slots.gap_from = facts.apart_from * p.H, slots.gap = facts.apart() * p.H;
  const auto of_rows = [&](const Operand& row, int64_t rows, const Acc* columns, int64_t width) {
    Product product = gradient_product<Acc>(existing, rows, width);
    product.source[0].row = row;
    Operand& column = product.source[0].column;
    column.elements = columns + first * width;
    column.depth_list = memory.rows.row, column.depth_stride = width;
    run([&] { return launch_product<Acc, Acc, Acc>(product, memory.partial, stream); });
    return product;
  };
  finish(of_rows(slots, gates, memory.h_before, p.R()), to.w_hh, facts.over_units ? nullptr : to.b_hh);
  if (facts.feeds_cell) finish(of_rows(slots, gates, memory.c_before, p.H), to.w_ch, nullptr);
  if (!p.P) return;
  Operand outputs;
  outputs.elements = memory.outputs + first * p.P;
  outputs.depth_list = memory.rows.row, outputs.depth_stride = p.P;
  finish(of_rows(outputs, p.P, memory.unprojected, p.H), to.w_hr, to.b_hr);
}

template <class Acc>
void launch_parameter_gradients(Launches& run, const RecurrentProblem& p, const RecurrentTensors& t,
                                const Acc* from, void* stream) {
  const int64_t stride = p.facts().parameters * p.H;
  for (int64_t d = 0; d < p.D; d++) {
    const auto blocks = parameter_blocks<void*>(p.cell, t.gradients[d]);
    int64_t first = d * p.B * stride;
    for (int k = 0; k < blocks.count; k++) {
      const int64_t count = blocks.block[k].rows * p.H;
      run([&] {
        return launch({.grid = grid_of(ceil_divide(count, parameter_threads)),
                       .block = dim3(parameter_threads),
                       .stream = stream},
                      sum_parameter_gradients<Acc>, from + first, p.B, stride,
                      Stored<Acc>{blocks.block[k].values, p.dtype},
                      Stored<Acc>{blocks.block[k].also, p.dtype}, count);
      });
      first += count;
    }
  }
}

template <class T>
int launch_backward(const RecurrentProblem& p, const RecurrentTensors& t, void* workspace, void* stream) {
  using Acc = accumulator_t<T>;
  const BackwardMemory<Acc> memory(p, workspace);
  WalkBackward<Acc> w = {};
  const auto stored = [&](const void* elements) { return Stored<Acc>{elements, p.dtype}; };
  fill_layer(w, p, t, memory.parameters, memory.scratch, memory.layout.elements);
  w.saved = p.saved() ? static_cast<const Acc*>(t.gates) : nullptr;
  w.cells = static_cast<const Acc*>(t.cells);
  w.y = stored(t.y), w.gy = stored(t.gy);
  w.gh_n = stored(t.gh_n), w.gc_n = stored(t.gc_n);
  w.y_t = p.y_t, w.y_b = p.y_b, w.gy_t = p.gy_t, w.gy_b = p.gy_b;
  w.slot_gradients = memory.slot_gradients, w.outputs = memory.outputs, w.unprojected = memory.unprojected;
  w.h_before = memory.h_before, w.c_before = memory.c_before;
  w.parameter_gradients = memory.parameter_gradients;
  w.gh0 = stored(t.gh0), w.gc0 = stored(t.gc0);
  RowLists rows = memory.rows;
  if (!t.gx) rows.gx = nullptr;
  Launches run;
  run([&] {
    return launch_list_rows(w.q, rows, {p.x_t, p.x_b, p.gx_t, p.gx_b, p.y_t, p.y_b, p.D, p.R()}, stream);
  });
  launch_gather_parameters<Acc>(run, p, t, memory.parameters, stream);
  if (p.D * p.B > 0)
    run([&] {
      return dispatch_cell(p.cell, [&](auto tag) {
        return launch({.grid = grid_of(p.D * p.B), .block = dim3(walk_threads), .stream = stream},
                      walk_backward<Acc, decltype(tag)::template Cell>, w, memory.layout);
      });
    });
  if (t.gx) {
    run([&] { return launch_zero_padding<T>(w.q, t.gx, p.gx_t, p.gx_b, p.I, stream); });
    run([&] { return launch_input_gradient<T>(p, t, memory, stream); });
  }
  if (!t.weights_wanted()) return run.error();
  for (int64_t d = 0; d < p.D; d++) launch_weight_gradients<T>(run, p, t, memory, d, stream);
  launch_parameter_gradients<Acc>(run, p, t, memory.parameter_gradients, stream);
  return run.error();
}

int forward(const RecurrentProblem& p, const RecurrentTensors& t, void* workspace, void* stream) {
  return dispatch_dtype(p.dtype, [&](auto element) {
    return launch_forward<typename decltype(element)::type>(p, t, workspace, stream);
  });
}
int backward(const RecurrentProblem& p, const RecurrentTensors& t, void* workspace, void* stream) {
  return dispatch_dtype(p.dtype, [&](auto element) {
    return launch_backward<typename decltype(element)::type>(p, t, workspace, stream);
  });
}
int64_t forward_bytes(const RecurrentProblem& p) {
  return p.dtype == DType::f64 ? ForwardMemory<double>(p, nullptr).bytes
                               : ForwardMemory<float>(p, nullptr).bytes;
}
int64_t backward_bytes(const RecurrentProblem& p) {
  return p.dtype == DType::f64 ? BackwardMemory<double>(p, nullptr).bytes
                               : BackwardMemory<float>(p, nullptr).bytes;
}
Refusal refuses(const RecurrentProblem& p) {
  // list_rows() counts them in an int.
  return p.T * p.B >= int64_t(1) << 31 ? "2^31 or more rows" : accepted;
}

}  // namespace

extern const RecurrentCudaKernel recurrent_walk_forward_cuda, recurrent_walk_backward_cuda;
const RecurrentCudaKernel recurrent_walk_forward_cuda = {"cuda_walk", 80, 0, refuses, forward_bytes, forward};
const RecurrentCudaKernel recurrent_walk_backward_cuda = {"cuda_walk",    80,      0, refuses,
                                                          backward_bytes, backward};

}  // namespace pyseqnet
