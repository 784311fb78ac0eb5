// The recurrent family on any CUDA device: every cell, dtype, shape and kind of sequence of recurrent.h.
//
//   forward   list_rows         where the existing rows lie
//             recurrent_product the input's part of all gates, of all steps at once (of as many as 64 MiB
//             hold,
//                               where there is no reserve to hold it)
//             recurrent_step    once a step, both directions together: the product with the recurrent weights
//                               and the cell on its results; with a projection a second time for that
//   backward  recurrent_step    once a step, back through time: the product that carries the gradient of h
//                               back from the step after, and the cell's backward
//             recurrent_product the gradients of x and of the weights, from the slots' gradients of all
//             steps;
//                               sum_recurrent_parts rounds the weights' once
//
// Why a launch a step: it needs no grid barrier, so nothing depends on how many blocks a device holds at
// once, and any H, B and T works. Its price is a launch and a trip of h through the L2 cache every step.
//
// Traffic and work of an LSTM in float32, T 100, B 32, I = H = 256, one direction:
//   products over all steps  1.7 GFLOP forward, 5.0 GFLOP backward
//   a step                   16.8 MFLOP; from L2 1 MiB of weights and, in each of 64 blocks, 32 KiB of h
//   memory, forward          3.3 MB of x, 3.3 MB of y, 13 MB of gates written, read and written again, 3.3 MB
//                            of cells: 49 MB, 11 us at an H200's 4.3 TB/s. It is not the bound
// Predicted for an H200 before any measurement (none was made when this was written):
//   a step forward   1.5 us between dependent launches, 0.7 us to the first loads, 4 rounds of 64 depths with
//                    289 instructions in each of 2 warps a scheduler: 1.3 us, the cell 0.6 us: 4.1 us
//   a step backward  the same 4 rounds in 16 tiles times 4 parts, 1 us for the parts to meet: 5.1 us
//   forward 100 * 4.1 us + 1.7 GFLOP at 40 TFLOP/s = 0.45 ms;  backward 100 * 5.1 us + 0.13 ms = 0.64 ms
// That is latency. Where H and B are large, a step is bound by FMA issue: 128 among 289 instructions, 44 % of
// FMA peak at most.
#include <algorithm>

#include "recurrent/recurrent_gemm.cuh"
#include "recurrent/recurrent_launches.cuh"
#include "recurrent/recurrent_tasks.cuh"

namespace pyseqnet {
namespace {

// The input's part of the gates where no reserve holds it is made for some steps at a time: as many as fit,
// at least one, and no more than make a good product even of a single sequence.
constexpr int64_t sums_bytes = int64_t(64) << 20, most_sums_steps = 256;

int64_t slots_of(const RecurrentProblem& p) { return p.saved() ? p.saved() : 1; }
int64_t third_gate_of(const RecurrentProblem& p) {
  return p.cell == RecurrentCell::gru ? 2 * p.H : INT64_MAX;
}

// Rows that exist before step t.
int64_t rows_before(const RecurrentProblem& p, int64_t t) {
  if (p.packed()) return p.offsets[t];
  int64_t rows = p.lengths ? 0 : t * p.B;
  for (int64_t b = 0; p.lengths && b < p.B; b++) rows += std::min(p.lengths[b], t);
  return rows;
}
int64_t longest_of(const RecurrentProblem& p) {
  if (p.B == 0) return 0;
  return p.lengths ? *std::max_element(p.lengths, p.lengths + p.B) : p.T;
}
// Sequences 0 .. n - 1 hold all that run at step t.
int64_t sequences_at(const RecurrentProblem& p, int64_t t) {
  return p.packed() ? p.offsets[t + 1] - p.offsets[t] : p.B;
}

// What steps in parts need.
template <class Acc>
struct PartMemory {
  Acc* partial;
  unsigned* arrived;

  explicit PartMemory(Workspace& memory)
      : partial(memory.take<Acc>(wanted_step_blocks * part_results)),
        arrived(memory.take<unsigned>(wanted_step_blocks)) {}
  void give_to(RowLists& rows) const { rows.arrived = arrived, rows.counters = wanted_step_blocks; }
  template <class T>
  void give_to(StepWeights<T>& w) const {
    w.partial = partial, w.arrived = arrived;
  }
};

template <class Acc>
struct ForwardMemory {
  Workspace memory;
  PartMemory<Acc> parts;
  RowLists rows = {};
  Acc *h[2], *c, *unprojected, *sums;  // sums null: the reserve holds them
  int64_t chunk_steps;
  int64_t bytes;

  ForwardMemory(const RecurrentProblem& p, void* base) : memory(base), parts(memory) {
    parts.give_to(rows);
    rows.row = memory.take<int64_t>(p.rows());
    rows.x = memory.take<int64_t>(p.rows());
    for (Acc*& state : h) state = memory.take<Acc>(p.D * p.B * p.R());
    c = memory.take<Acc>(p.has_cell() ? p.D * p.B * p.H : 0);
    unprojected = memory.take<Acc>(p.P ? p.D * p.B * p.H : 0);
    const int64_t step = p.D * p.B * slots_of(p) * p.H;
    const bool in_reserve = p.reserve && p.saved();
    const int64_t fit = sums_bytes / std::max<int64_t>(step * int64_t(sizeof(Acc)), 1);
    chunk_steps = in_reserve ? p.T : std::max<int64_t>(std::min({fit, most_sums_steps, p.T}), 1);
    sums = memory.take<Acc>(in_reserve ? 0 : chunk_steps * step);
    bytes = memory.bytes();
  }
};

// A weight's gradient: rows x columns, summed over all rows that exist.
template <class Acc>
Product gradient_product(const RecurrentProblem& p, int64_t rows, int64_t columns) {
  Product product;
  product.rows = rows, product.columns = columns, product.depth = rows_before(p, p.T);
  cut_into_parts<Acc>(product);
  return product;
}

template <class Acc>
struct BackwardMemory {
  Workspace memory;
  PartMemory<Acc> parts;
  RowLists rows = {};
  Acc *slot_gradients, *h_gradients, *unprojected, *passed, *partial;
  int64_t bytes;

  BackwardMemory(const RecurrentProblem& p, void* base) : memory(base), parts(memory) {
    parts.give_to(rows);
    rows.row = memory.take<int64_t>(p.rows());
    rows.x = memory.take<int64_t>(p.rows());
    rows.gx = memory.take<int64_t>(p.rows());
    for (int64_t d = 0; d < p.D; d++) rows.before[d] = memory.take<int64_t>(p.rows());
    slot_gradients = memory.take<Acc>(p.D * p.rows() * slots_of(p) * p.H);
    h_gradients = memory.take<Acc>(p.D * p.rows() * p.P);
    unprojected = memory.take<Acc>(p.P ? p.D * p.rows() * p.H : 0);
    passed = memory.take<Acc>(p.D * p.B * p.H);
    int64_t most = 0;
    const auto count = [&](int64_t r, int64_t c) {
      const Product product = gradient_product<Acc>(p, r, c);
      most = std::max(most, product.parts * product.part_results());
    };
    count(p.gates() * p.H, p.I);
    count(p.gates() * p.H, p.R());
    count(p.P, p.H);
    partial = memory.take<Acc>(most);
    bytes = memory.bytes();
  }
};

// Widens the states that all sequences begin with, into one or two places; a sequence without steps ends with
// them.
constexpr int state_threads = 128;

template <class T>
__global__ void __launch_bounds__(state_threads)
    begin_states(const Sequences q, const T* __restrict__ from, accumulator_t<T>* __restrict__ to,
                 accumulator_t<T>* __restrict__ also_to, T* __restrict__ final, int64_t width,
                 int64_t count) {
  const int64_t i = int64_t(blockIdx.x) * state_threads + threadIdx.x;
  if (i >= count) return;
  const accumulator_t<T> v = load_or_zero(from, i);
  if (to) to[i] = v;
  if (also_to) also_to[i] = v;
  if (final && q.length(i / width % q.B) == 0) store(final + i, v);
}

template <class T>
int launch_begin_states(const Sequences& q, const void* from, accumulator_t<T>* to, accumulator_t<T>* also_to,
                        void* final, int64_t directions, int64_t width, void* stream) {
  const int64_t count = directions * q.B * width;
  if (count == 0) return launch_ok;
  return launch(
      {.grid = grid_of(ceil_divide(count, state_threads)), .block = dim3(state_threads), .stream = stream},
      begin_states<T>, q, static_cast<const T*>(from), to, also_to, static_cast<T*>(final), width, count);
}

template <class F>
int dispatch_cell(RecurrentCell cell, F&& f) {
  switch (cell) {
    case RecurrentCell::lstm:
      return f(TypeTag<LstmTask>{});
    case RecurrentCell::gru:
      return f(TypeTag<GruTask>{});
    default:
      return f(TypeTag<RnnTask>{});
  }
}

// w_hh for products with h (forward) and with the gradients of the slots (backward).
template <class T>
StepWeights<T> recurrent_weights(const RecurrentProblem& p, const RecurrentTensors& t, bool forward) {
  StepWeights<T> w;
  for (int64_t d = 0; d < p.D; d++) w.weights[d] = static_cast<const T*>(t.weights[d].w_hh);
  if (forward) {
    w.units = p.H, w.depth = p.R();
    w.gate_stride = p.H * p.R(), w.unit_stride = p.R(), w.depth_stride = 1;
  } else {
    w.units = p.R(), w.depth = p.gates() * p.H;
    w.unit_stride = 1, w.depth_stride = p.R();
    w.gap_from = third_gate_of(p), w.gap = p.H;
  }
  return w;
}
template <class T>
StepWeights<T> projection_weights(const RecurrentProblem& p, const RecurrentTensors& t, bool forward) {
  StepWeights<T> w;
  for (int64_t d = 0; d < p.D; d++) w.weights[d] = static_cast<const T*>(t.weights[d].w_hr);
  w.units = forward ? p.P : p.H, w.depth = forward ? p.H : p.P;
  w.unit_stride = forward ? p.H : 1, w.depth_stride = forward ? 1 : p.H;
  return w;
}

// ---------------------------------------------------------------- forward
// The input's part of all slots for the steps [begin, end) of direction d.
template <class T>
int launch_input_sums(const RecurrentProblem& p, const RecurrentTensors& t,
                      const ForwardMemory<accumulator_t<T>>& memory, accumulator_t<T>* sums, int64_t origin,
                      int64_t d, int64_t begin, int64_t end, void* stream) {
  const RecurrentWeights& w = t.weights[d];
  const int64_t first = rows_before(p, begin);
  Product product;
  product.rows = rows_before(p, end) - first, product.columns = p.gates() * p.H, product.depth = p.I;
  Operand &x = product.source[0].row, &w_ih = product.source[0].column;
  x.elements = t.x, x.line_list = memory.rows.x + first, x.along_depth = true;
  w_ih.elements = w.w_ih, w_ih.line_stride = p.I, w_ih.along_depth = true;
  product.bias = w.b_ih, product.second_bias = w.b_hh;
  product.second_bias_columns = std::min(third_gate_of(p), product.columns);
  product.out_list = memory.rows.row + first, product.out_stride = slots_of(p) * p.H;
  product.out_origin = origin;
  return launch_product<T, T, accumulator_t<T>>(product, sums, stream);
}

template <class T, class Kind>
int launch_forward(const RecurrentProblem& p, const RecurrentTensors& t, void* workspace, void* stream) {
  using Acc = accumulator_t<T>;
  const ForwardMemory<Acc> memory(p, workspace);
  const Sequences q = sequences_of(p, t);
  const int64_t steps = longest_of(p), row_width = slots_of(p) * p.H;
  Launches run;
  run([&] {
    return launch_list_rows(q, memory.rows, {.x_t = p.x_t, .x_b = p.x_b, .D = p.D, .R = p.R()}, stream);
  });
  run([&] { return launch_zero_padding<T>(q, t.y, p.y_t, p.y_b, p.D * p.R(), stream); });
  run([&] { return launch_begin_states<T>(q, t.h0, memory.h[0], memory.h[1], t.h_n, p.D, p.R(), stream); });
  if (p.has_cell())
    run([&] {
      return launch_begin_states<T>(q, t.c0, memory.c, static_cast<Acc*>(nullptr), t.c_n, p.D, p.H, stream);
    });

  ForwardCell<T, Kind> cell = {};
  cell.product = recurrent_weights<T>(p, t, true);
  memory.parts.give_to(cell.product);
  cell.sequences = q, cell.H = p.H, cell.R = p.R(), cell.relu = p.cell == RecurrentCell::rnn_relu;
  cell.c = memory.c, cell.unprojected = memory.unprojected;
  cell.saved = p.reserve && p.saved() ? static_cast<Acc*>(t.gates) : nullptr;
  cell.cells = p.reserve && p.has_cell() ? static_cast<Acc*>(t.cells) : nullptr;
  cell.y = static_cast<T*>(t.y), cell.h_n = static_cast<T*>(t.h_n), cell.c_n = static_cast<T*>(t.c_n);
  cell.y_t = p.y_t, cell.y_b = p.y_b;
  for (int64_t d = 0; d < p.D; d++)
    if (p.cell == RecurrentCell::gru && t.weights[d].b_hh)
      cell.recurrent_bias[d] = static_cast<const T*>(t.weights[d].b_hh) + third_gate_of(p);
  ForwardProjection<T> projection = {};
  if (p.P) projection.product = projection_weights<T>(p, t, true);
  memory.parts.give_to(projection.product);
  projection.sequences = q, projection.H = p.H, projection.R = p.R();
  projection.sources = memory.unprojected;
  projection.y = cell.y, projection.h_n = cell.h_n, projection.y_t = p.y_t, projection.y_b = p.y_b;

  Acc* const sums = memory.sums ? memory.sums : static_cast<Acc*>(t.gates);
  cell.from_input = sums;
  for (int64_t begin = 0; begin < steps && !run.failed(); begin += memory.chunk_steps) {
    const int64_t end = std::min(begin + memory.chunk_steps, steps);
    for (int64_t d = 0; d < p.D; d++) {
      const int64_t first = d ? steps - end : begin, last = d ? steps - begin : end;
      // Where both directions' rows of the chunk lie: in the reserve as the contract says, else side by side.
      const int64_t of_direction = memory.sums ? d * memory.chunk_steps * p.B : d * p.rows();
      const int64_t base = memory.sums ? p.row(first, 0) : 0;
      cell.from_input_origin[d] = (base - of_direction) * row_width;
      run([&] {
        return launch_input_sums<T>(p, t, memory, sums, cell.from_input_origin[d], d, first, last, stream);
      });
    }
    for (int64_t i = begin; i < end && !run.failed(); i++) {
      const int64_t at[max_directions] = {i, steps - 1 - i};
      int64_t sequences = 0;
      for (int64_t d = 0; d < p.D; d++) {
        cell.product.t[d] = projection.product.t[d] = at[d];
        sequences = std::max(sequences, sequences_at(p, at[d]));
      }
      cell.sources = memory.h[i % 2];
      projection.h_after = memory.h[1 - i % 2];
      cell.h_after = p.P ? nullptr : projection.h_after;
      run([&] { return launch_step(cell, sequences, p.D, stream); });
      if (p.P) run([&] { return launch_step(projection, sequences, p.D, stream); });
    }
  }
  return run.error();
}

// ---------------------------------------------------------------- backward
// Back through time: leaves the gradients of all slots' sums in the workspace.
template <class T, class Kind>
void launch_back_through_time(Launches& run, const RecurrentProblem& p, const RecurrentTensors& t,
                              const Sequences& q, const BackwardMemory<accumulator_t<T>>& memory,
                              void* stream) {
  using Acc = accumulator_t<T>;
  BackwardState<T> state = {};
  state.product = recurrent_weights<T>(p, t, false);
  memory.parts.give_to(state.product);
  state.sequences = q, state.R = p.R(), state.row_width = slots_of(p) * p.H;
  state.sources = memory.slot_gradients, state.h_gradients = memory.h_gradients;
  state.gy = static_cast<const T*>(t.gy), state.gh_n = static_cast<const T*>(t.gh_n);
  state.gy_t = p.gy_t, state.gy_b = p.gy_b;

  BackwardCell<T, Kind> cell = {};
  cell.product = p.P ? projection_weights<T>(p, t, false) : state.product;
  memory.parts.give_to(cell.product);
  cell.sequences = q, cell.H = p.H, cell.R = p.R(), cell.relu = p.cell == RecurrentCell::rnn_relu;
  cell.h0 = static_cast<const T*>(t.h0), cell.c0 = static_cast<const T*>(t.c0);
  cell.y = static_cast<const T*>(t.y), cell.gy = state.gy, cell.gh_n = state.gh_n;
  cell.gc_n = static_cast<const T*>(t.gc_n), cell.gc0 = static_cast<T*>(t.gc0);
  cell.y_t = p.y_t, cell.y_b = p.y_b, cell.gy_t = p.gy_t, cell.gy_b = p.gy_b;
  cell.saved = static_cast<const Acc*>(t.gates), cell.cells = static_cast<const Acc*>(t.cells);
  cell.slot_gradients = memory.slot_gradients, cell.passed = memory.passed;
  cell.unprojected = memory.unprojected, cell.projected = p.P > 0;
  cell.sources = cell.projected ? memory.h_gradients : memory.slot_gradients;

  const int64_t steps = longest_of(p);
  for (int64_t i = 0; i < steps && !run.failed(); i++) {
    const int64_t at[max_directions] = {steps - 1 - i, i};
    int64_t sequences = 0;
    for (int64_t d = 0; d < p.D; d++) {
      state.product.t[d] = cell.product.t[d] = at[d];
      sequences = std::max(sequences, sequences_at(p, at[d]));
    }
    if (p.P) run([&] { return launch_step(state, sequences, p.D, stream); });
    run([&] { return launch_step(cell, sequences, p.D, stream); });
  }
  if (t.gh0 && steps > 0) {
    state.gh0 = static_cast<T*>(t.gh0);
    state.passed = p.cell == RecurrentCell::gru ? memory.passed : nullptr;
    run([&] { return launch_step(state, p.B, p.D, stream); });
  }
}

// gx = sum over directions of slot gradients * w_ih.
template <class T>
int launch_input_gradient(const RecurrentProblem& p, const RecurrentTensors& t,
                          const BackwardMemory<accumulator_t<T>>& memory, void* stream) {
  using Acc = accumulator_t<T>;
  const int64_t row_width = slots_of(p) * p.H;
  Product product;
  product.rows = rows_before(p, p.T), product.columns = p.I, product.depth = p.gates() * p.H;
  product.sources = int(p.D);
  for (int64_t d = 0; d < p.D; d++) {
    Operand &slots = product.source[d].row, &w_ih = product.source[d].column;
    slots.elements = memory.slot_gradients + d * p.rows() * row_width;
    slots.line_list = memory.rows.row, slots.line_stride = row_width, slots.along_depth = true;
    w_ih.elements = t.weights[d].w_ih, w_ih.depth_stride = p.I;
  }
  product.out_list = memory.rows.gx, product.out_stride = 1;
  return launch_product<Acc, T, T>(product, t.gx, stream);
}

template <class T>
void launch_weight_gradients(Launches& run, const RecurrentProblem& p, const RecurrentTensors& t,
                             const BackwardMemory<accumulator_t<T>>& memory, int64_t d, void* stream) {
  using Acc = accumulator_t<T>;
  const RecurrentGradients& to = t.gradients[d];
  const auto finish = [&](const Product& product, void* gradient, void* row_sums) {
    run([&] { return launch_sum_recurrent_parts<T>(product, memory.partial, gradient, row_sums, stream); });
  };
  const int64_t row_width = slots_of(p) * p.H;
  Operand slots;
  slots.elements = memory.slot_gradients + d * p.rows() * row_width;
  // Where no row is missing, they are counted instead of looked up.
  const bool whole = !p.lengths || p.packed();
  const int64_t* const rows = whole ? nullptr : memory.rows.row;
  slots.depth_list = rows, slots.depth_stride = row_width;

  Product of_input = gradient_product<Acc>(p, p.gates() * p.H, p.I);
  of_input.source[0].row = slots;
  Operand& x = of_input.source[0].column;
  x.elements = t.x, x.depth_list = memory.rows.x;
  if (whole && (p.packed() || p.x_t == p.B * p.x_b)) x.depth_list = nullptr, x.depth_stride = p.x_b;
  run([&] { return launch_product<Acc, T, Acc>(of_input, memory.partial, stream); });
  finish(of_input, to.w_ih, to.b_ih);

  Product of_h = gradient_product<Acc>(p, p.gates() * p.H, p.R());
  slots.gap_from = third_gate_of(p), slots.gap = p.H;
  of_h.source[0].row = slots;
  Operand& before = of_h.source[0].column;
  before.elements = t.y, before.alternate = t.h0, before.depth_list = memory.rows.before[d];
  run([&] { return launch_product<Acc, T, Acc>(of_h, memory.partial, stream); });
  finish(of_h, to.w_hh, to.b_hh);

  if (!p.P) return;
  Product of_projection = gradient_product<Acc>(p, p.P, p.H);
  Operand &h = of_projection.source[0].row, &unprojected = of_projection.source[0].column;
  h.elements = memory.h_gradients + d * p.rows() * p.P;
  h.depth_list = rows, h.depth_stride = p.P;
  unprojected.elements = memory.unprojected + d * p.rows() * p.H;
  unprojected.depth_list = rows, unprojected.depth_stride = p.H;
  run([&] { return launch_product<Acc, Acc, Acc>(of_projection, memory.partial, stream); });
  finish(of_projection, to.w_hr, nullptr);
}

template <class T, class Kind>
int launch_backward(const RecurrentProblem& p, const RecurrentTensors& t, void* workspace, void* stream) {
  using Acc = accumulator_t<T>;
  const BackwardMemory<Acc> memory(p, workspace);
  const Sequences q = sequences_of(p, t);
  constexpr Acc* nowhere = nullptr;
  RowLists rows = memory.rows;
  if (!t.gx) rows.gx = nullptr;
  const RowStrides strides = {p.x_t, p.x_b, p.gx_t, p.gx_b, p.y_t, p.y_b, p.D, p.R()};
  Launches run;
  run([&] { return launch_list_rows(q, rows, strides, stream); });
  // Sequences without steps pass gradients on as they came.
  if (t.gh0)
    run([&] { return launch_begin_states<T>(q, t.gh_n, nowhere, nowhere, t.gh0, p.D, p.R(), stream); });
  if (t.gc0)
    run([&] { return launch_begin_states<T>(q, t.gc_n, nowhere, nowhere, t.gc0, p.D, p.H, stream); });
  launch_back_through_time<T, Kind>(run, p, t, q, memory, stream);
  if (t.gx) {
    run([&] { return launch_zero_padding<T>(q, t.gx, p.gx_t, p.gx_b, p.I, stream); });
    run([&] { return launch_input_gradient<T>(p, t, memory, stream); });
  }
  for (int64_t d = 0; d < p.D && t.weights_wanted(); d++)
    launch_weight_gradients<T>(run, p, t, memory, d, stream);
  return run.error();
}

int forward(const RecurrentProblem& p, const RecurrentTensors& t, void* workspace, void* stream) {
  return dispatch_dtype(p.dtype, [&](auto element) {
    return dispatch_cell(p.cell, [&](auto cell) {
      return launch_forward<typename decltype(element)::type, typename decltype(cell)::type>(p, t, workspace,
                                                                                             stream);
    });
  });
}
int backward(const RecurrentProblem& p, const RecurrentTensors& t, void* workspace, void* stream) {
  return dispatch_dtype(p.dtype, [&](auto element) {
    return dispatch_cell(p.cell, [&](auto cell) {
      return launch_backward<typename decltype(element)::type, typename decltype(cell)::type>(p, t, workspace,
                                                                                              stream);
    });
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
  if (p.T * p.B >= int64_t(1) << 31) return "2^31 or more rows";
  if (p.has_options() || !has_kernels_of_its_own(p.cell)) return "only the plain cells go step by step";
  return accepted;
}

}  // namespace

extern const RecurrentCudaKernel recurrent_forward_cuda, recurrent_backward_cuda;
const RecurrentCudaKernel recurrent_forward_cuda = {"cuda_generic", 80, 0, refuses, forward_bytes, forward};
const RecurrentCudaKernel recurrent_backward_cuda = {"cuda_generic", 80,      0, refuses,
                                                     backward_bytes, backward};

}  // namespace pyseqnet
