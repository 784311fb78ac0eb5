// The recurrent layers at the border to torch: reads shapes, allocates, hands the problem to the dispatch
// tables.
#include "recurrent/recurrent.h"

#include <torch/csrc/stable/library.h>

#include <locale>
#include <optional>
#include <sstream>
#include <string>
#include <tuple>
#include <vector>

#include "common/numerics.h"
#include "run_on_cpu.h"
#include "string_argument.h"
#if defined(PYSEQNET_WITH_CUDA)
#include "run_on_cuda.h"
#endif

namespace pyseqnet {
namespace {

using torch::headeronly::ScalarType;
using Tensors = std::vector<Tensor>;
using Optional = std::optional<Tensor>;

// The raw operations' arguments that say what layer it is, in the schema's order.
struct Options {
  const std::string cell;
  int64_t directions;
  bool has_biases, batch_first;
  const Optional &zone_h, &zone_c;
  const std::string across;
};

RecurrentCell cell_named(const std::string& name) {
  RecurrentCell cell = {};
  if (find_cell(name, cell)) return cell;
  std::string names;
  for (int k = 0; k < recurrent_cells; k++) names += std::string(k ? ", " : "") + name_of(RecurrentCell(k));
  throw std::invalid_argument("recurrent: cell must be one of " + names + "; got '" + name + "'");
}

bool has_shape(const Tensor& t, std::initializer_list<int64_t> shape) {
  if (t.dim() != int64_t(shape.size())) return false;
  int64_t d = 0;
  for (int64_t extent : shape)
    if (t.size(d++) != extent) return false;
  return true;
}
void require_like(const Tensor& t, const Tensor& input, const char* complaint) {
  require(t.scalar_type() == input.scalar_type() && t.device() == input.device(), complaint);
}
Tensor row_major(const Tensor& t) { return dense(t, Layout::nchw); }
// Rows may lie anywhere, but a row's elements side by side.
Tensor with_dense_rows(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return t.stride(last) == 1 || t.size(last) <= 1 ? t : row_major(t);
}

// Of what is there.
Optional row_major(const Optional& t) {
  if (!t) return {};
  return row_major(*t);
}
Optional with_dense_rows(const Optional& t) {
  if (!t) return {};
  return with_dense_rows(*t);
}

Tensor new_dense(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType type) {
  constexpr int most = 4;
  int64_t sizes[most], strides[most];
  int64_t dims = int64_t(shape.size()), d = 0;
  for (int64_t extent : shape) sizes[d++] = extent;
  if (!product_fits(shape)) throw_out_of_memory(sizes, dims);
  for (int64_t k = dims - 1, step = 1; k >= 0; k--) {
    strides[k] = step;
    step *= sizes[k] > 0 ? sizes[k] : 1;
  }
  return new_tensor(like, sizes, strides, dims, type);
}
Tensor nothing(const Tensor& like, ScalarType type) { return new_vector(like, 0, type); }

const int64_t* host_integers(const Tensor& t, const char* complaint) {
  require(t.is_cpu() && t.scalar_type() == ScalarType::Long && t.dim() == 1 && t.is_contiguous(), complaint);
  return static_cast<const int64_t*>(t.const_data_ptr());
}

// A problem, and the memory that its lengths and offsets lie in.
struct Layer {
  RecurrentProblem p;
  std::vector<int64_t> lengths, offsets;
  Optional on_device;  // both of them, for a GPU
  bool batch_first = false;

  // Strides of a tensor (T, B, features), (B, T, features) or (rows, features).
  void strides_of(const Tensor& t, int64_t& step, int64_t& sequence) const {
    if (p.packed()) {
      step = 0, sequence = t.stride(0);
    } else {
      step = t.stride(batch_first ? 1 : 0), sequence = t.stride(batch_first ? 0 : 1);
    }
  }
  bool has_rows_of(const Tensor& t, int64_t features) const {
    if (p.packed()) return has_shape(t, {p.rows(), features});
    return batch_first ? has_shape(t, {p.B, p.T, features}) : has_shape(t, {p.T, p.B, features});
  }
  Tensor new_rows(const Tensor& like, int64_t features, ScalarType type) const {
    if (p.packed()) return new_dense(like, {p.rows(), features}, type);
    return batch_first ? new_dense(like, {p.B, p.T, features}, type)
                       : new_dense(like, {p.T, p.B, features}, type);
  }
  ScalarType reserve_type() const { return p.dtype == DType::f64 ? ScalarType::Double : ScalarType::Float; }
};

void read_batch_sizes(Layer& layer, const Tensor& batch_sizes, int64_t rows) {
  RecurrentProblem& p = layer.p;
  const int64_t* sizes = host_integers(
      batch_sizes, "recurrent: batch_sizes must be a contiguous one-dimensional int64 tensor on the CPU");
  p.T = batch_sizes.size(0);
  require(p.T > 0, "recurrent: batch_sizes is empty");
  layer.offsets.assign(size_t(p.T + 1), 0);
  require(sizes[0] >= 0 && sizes[0] <= rows, "recurrent: batch_sizes do not add up to the rows of input");
  p.B = sizes[0];
  layer.lengths.assign(size_t(p.B), 0);
  for (int64_t t = 0, running = p.B; t < p.T; t++) {
    require(sizes[t] >= 0 && sizes[t] <= running, "recurrent: batch_sizes must never increase");
    for (; running > sizes[t]; running--) layer.lengths[size_t(running - 1)] = t;
    layer.offsets[size_t(t + 1)] = layer.offsets[size_t(t)] + sizes[t];
    require(layer.offsets[size_t(t + 1)] <= rows,
            "recurrent: batch_sizes do not add up to the rows of input");
    if (t + 1 == p.T)
      while (running > 0) layer.lengths[size_t(--running)] = p.T;
  }
  require(layer.offsets[size_t(p.T)] == rows, "recurrent: batch_sizes do not add up to the rows of input");
  p.lengths = layer.lengths.data(), p.offsets = layer.offsets.data();
}

void read_lengths(Layer& layer, const Tensor& lengths) {
  RecurrentProblem& p = layer.p;
  const int64_t* values = host_integers(
      lengths, "recurrent: lengths must be a contiguous one-dimensional int64 tensor on the CPU");
  require(lengths.size(0) == p.B, "recurrent: lengths must hold one length for each sequence");
  for (int64_t b = 0; b < p.B; b++)
    require(values[b] >= 0 && values[b] <= p.T,
            "recurrent: lengths must be between 0 and the number of steps");
  p.lengths = values;
}

// What the weights of one direction, in the schema's order, are called in the problem.
constexpr int most_weights = 10;
struct WeightNames {
  bool biases, projection, output_bias, peephole, normalised;

  explicit WeightNames(const RecurrentProblem& p, bool has_biases, bool projects)
      : biases(has_biases),
        projection(projects),
        output_bias(p.is_jordan() && has_biases),
        peephole(p.cell == RecurrentCell::lstm_peephole || p.cell == RecurrentCell::lstm_full_peephole),
        normalised(p.cell == RecurrentCell::lstm_layer_norm) {}
  int each() const { return 2 + 2 * biases + projection + output_bias + peephole + 4 * normalised; }
};
// f(pointer of the problem) for each.
template <class Weights, class F>
void for_weights(const WeightNames& names, Weights& w, F f) {
  f(w.w_ih), f(w.w_hh);
  if (names.biases) f(w.b_ih), f(w.b_hh);
  if (names.projection) f(w.w_hr);
  if (names.output_bias) f(w.b_hr);
  if (names.peephole) f(w.w_ch);
  if (names.normalised) f(w.gain_ih), f(w.gain_hh), f(w.gain_c), f(w.bias_c);
}
template <class Weights, class Pointer>
void name_weights(const WeightNames& names, const Pointer* pointers, Weights& w) {
  for_weights(names, w, [&](auto& pointer) { pointer = *pointers++; });
}

WeightNames names_of(const RecurrentProblem& p, const Options& o) {
  return WeightNames(p, o.has_biases, p.P > 0);
}

void check_weight_shapes(const RecurrentProblem& p, const Tensors& weights, const WeightNames& names) {
  const int64_t rows = p.gates() * p.H;
  const char* complaint = "recurrent: a weight's shape does not fit the layer";
  for (int64_t d = 0, k = 0; d < p.D; d++) {
    const auto is = [&](std::initializer_list<int64_t> shape) {
      require(has_shape(weights[size_t(k++)], shape), complaint);
    };
    is({rows, p.I}), is({rows, p.R()});
    if (names.biases) is({rows}), is({rows});
    if (names.projection) is({p.P, p.H});
    if (names.output_bias) is({p.P});
    if (names.peephole && p.facts().feeds_cell) is({rows, p.H});
    if (names.peephole && !p.facts().feeds_cell) is({3 * p.H});
    if (names.normalised) is({rows}), is({rows}), is({p.H}), is({p.H});
  }
}

void read_weights(RecurrentProblem& p, const Tensors& weights, const Tensor& input, const Options& o) {
  require(o.directions == 1 || o.directions == 2, "recurrent: directions must be 1 or 2");
  p.D = o.directions;
  const int64_t count = int64_t(weights.size());
  const int64_t plain = p.D * WeightNames(p, o.has_biases, false).each();
  require(count == plain || count == plain + p.D,
          "recurrent: expected w_ih, w_hh (b_ih, b_hh) (w_hr) and what the cell has for each direction");
  const WeightNames names(p, o.has_biases, count != plain);
  require(!names.projection || p.has_cell() || p.is_jordan(), "recurrent: only an lstm has a projection");
  require(names.projection || !p.is_jordan(), "recurrent: a jordan net has an output layer");
  const Tensor& w_hh = weights[1];
  require(w_hh.dim() == 2 && w_hh.size(0) > 0 && w_hh.size(0) % p.gates() == 0,
          "recurrent: w_hh must have gates * hidden units as rows");
  p.H = w_hh.size(0) / p.gates();
  p.P = names.projection ? w_hh.size(1) : 0;
  require(p.R() > 0, "recurrent: the projection must have at least one feature");
  for (const Tensor& w : weights)
    require_like(w, input, "recurrent: weights must have input's dtype and device");
  check_weight_shapes(p, weights, names);
}

// The number nearest to x that the dtype holds.
double rounded(double x, DType dtype) {
  const auto in = [&](auto number) {
    round_to(number, x);
    return to_double(number);
  };
  return dtype == DType::f64    ? x
         : dtype == DType::f32  ? in(float{})
         : dtype == DType::bf16 ? in(bfloat16{})
                                : in(float16{});
}

// What goes across cells: "output decay limit zone_h zone_c", or nothing. In words, because a compiler that
// makes sizes symbolic would do the same to numbers.
void read_options(RecurrentProblem& p, const Tensor& input, const Options& o) {
  if (!o.across.empty()) {
    std::istringstream words(o.across);
    words.imbue(std::locale::classic());
    std::string output;
    words >> output >> p.decay >> p.limit >> p.zone_h >> p.zone_c;
    require(!words.fail(), "recurrent: options must be 'output decay limit zone_h zone_c'");
    require(find_output_unit(output, p.output) && (p.is_jordan() || p.output == OutputUnit::identity),
            "recurrent: output must be identity, or in a jordan net tanh, relu or sigmoid");
  }
  require(p.is_jordan() || p.decay == 0, "recurrent: only a jordan net's state decays");
  require(p.limit >= 0 && (p.limit == 0 || p.cell != RecurrentCell::gru),
          "recurrent: limit must not be negative, and a gru clips nothing");
  // Backward compares the h that was stored with the limit: a limit in between would never be reached.
  if (!p.has_cell() && p.limit != 0) {
    p.limit = rounded(p.limit, p.dtype);
    require(p.limit > 0, "recurrent: limit rounds to zero in input's dtype");
  }
  for (double rate : {p.zone_h, p.zone_c})
    require(rate >= 0 && rate <= 1, "recurrent: rates of zoneout must be between 0 and 1");
  require(p.has_cell() || (!o.zone_c && p.zone_c == 0), "recurrent: only an lstm has a cell state");
  p.zone_masks = o.zone_h || o.zone_c;
  const auto check = [&](const Optional& mask, int64_t width) {
    require(!mask || (has_shape(*mask, {p.D, p.rows(), width}) && mask->scalar_type() == ScalarType::Bool &&
                      mask->device() == input.device() && mask->is_contiguous()),
            "recurrent: a mask of zoneout must be contiguous, bool and (directions, rows, features)");
  };
  check(o.zone_h, p.R()), check(o.zone_c, p.H);
}

// Sizes that the kernels' workspaces are products of; each fits, with room for a few of them side by side.
void require_sizes_fit(const RecurrentProblem& p) {
  constexpr int64_t largest_extent = int64_t(1) << 40;
  require(p.T < largest_extent && p.B < largest_extent && p.I < largest_extent && p.H < largest_extent &&
              p.R() < largest_extent && product_fits({p.T + 1, p.B + 1}) &&
              product_fits({p.T * p.B + 1, 64, p.H + p.I + p.R()}) && product_fits({64, p.H, p.I + p.R()}),
          "recurrent: the problem is too large");
}

Layer read_layer(const Tensor& input, const Optional& h0, const Optional& c0, const Tensors& weights,
                 const Optional& lengths, const Optional& batch_sizes, const Options& o) {
  Layer layer;
  RecurrentProblem& p = layer.p;
  p.dtype = dtype_of(input);
  p.cell = cell_named(o.cell);
  layer.batch_first = o.batch_first && !batch_sizes;
  require(input.dim() == (batch_sizes ? 2 : 3), "recurrent: input must be (T, B, I), or (rows, I) if packed");
  p.I = input.size(input.dim() - 1);
  require(!lengths || !batch_sizes, "recurrent: lengths and batch_sizes exclude each other");
  if (batch_sizes) {
    require(h0.has_value(), "recurrent: h0 must be given with batch_sizes");
    read_batch_sizes(layer, *batch_sizes, input.size(0));
  } else {
    p.T = input.size(o.batch_first ? 1 : 0), p.B = input.size(o.batch_first ? 0 : 1);
    if (lengths) read_lengths(layer, *lengths);
  }
  read_weights(p, weights, input, o);
  require_sizes_fit(p);
  read_options(p, input, o);
  if (h0) {
    require_like(*h0, input, "recurrent: h0 must have input's dtype and device");
    require(has_shape(*h0, {p.D, p.B, p.R()}), "recurrent: h0 must be (directions, batch, features of h)");
  }
  require(!c0 || p.has_cell(), "recurrent: only an lstm has a cell state");
  if (c0) {
    require_like(*c0, input, "recurrent: c0 must have input's dtype and device");
    require(has_shape(*c0, {p.D, p.B, p.H}), "recurrent: c0 must be (directions, batch, hidden units)");
  }
  return layer;
}

// Where the kernel of this device reads lengths and offsets.
void place_schedule(Layer& layer, RecurrentTensors& t, const Tensor& input) {
  const RecurrentProblem& p = layer.p;
  t.lengths = p.lengths, t.offsets = p.offsets;
  if (input.is_cpu() || !p.lengths) return;
  const int64_t count = p.B + (p.packed() ? p.T + 1 : 0);
  std::vector<int64_t> values(p.lengths, p.lengths + p.B);
  if (p.packed()) values.insert(values.end(), p.offsets, p.offsets + p.T + 1);
  const int64_t step = 1;
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(values.data(), 1, &count, &step, 0,
                                                                   aoti_torch_dtype_int64(),
                                                                   aoti_torch_device_type_cpu(), 0, &handle));
  const Tensor host(handle);
  Tensor device = new_vector(input, count, ScalarType::Long);
  torch::stable::copy_(device, host, false);  // blocking: `values` goes out of scope
  layer.on_device = device;
  t.lengths = static_cast<const int64_t*>(device.const_data_ptr());
  t.offsets = p.packed() ? t.lengths + p.B : nullptr;
}

const void* pointer(const Optional& t) { return t ? t->const_data_ptr() : nullptr; }

// Fills in what both passes read; `held` keeps dense copies alive.
void place_inputs(const Layer& layer, const Options& o, const Tensors& weights, const Optional& h0,
                  const Optional& c0, RecurrentTensors& t, Tensors& held) {
  const WeightNames names = names_of(layer.p, o);
  t.h0 = pointer(h0), t.c0 = pointer(c0);
  t.zone_h = static_cast<const uint8_t*>(pointer(o.zone_h));
  t.zone_c = static_cast<const uint8_t*>(pointer(o.zone_c));
  for (int64_t d = 0; d < layer.p.D; d++) {
    const void* pointers[most_weights + 1] = {};
    for (int k = 0; k < names.each(); k++) {
      held.push_back(row_major(weights[size_t(d * names.each() + k)]));
      pointers[k] = held.back().const_data_ptr();
    }
    name_weights(names, pointers, t.weights[d]);
  }
}

using RunPass = void (*)(RecurrentPass, const RecurrentProblem&, const RecurrentTensors&, const Tensor& like);

void run_pass_on_cpu(RecurrentPass pass, const RecurrentProblem& p, const RecurrentTensors& t,
                     const Tensor& like) {
  run_on_cpu("recurrent", operation_of(pass), recurrent_cpu_table(pass), p, t, like);
}

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Forward forward(const Tensor& input, const Optional& h0, const Optional& c0, const Tensors& weights,
                const Optional& lengths, const Optional& batch_sizes, const Options& o, bool reserve,
                RunPass run) {
  Layer layer = read_layer(input, h0, c0, weights, lengths, batch_sizes, o);
  RecurrentProblem& p = layer.p;
  p.reserve = reserve;
  const ScalarType type = input.scalar_type();
  const Tensor x = with_dense_rows(input);
  const Optional h = row_major(h0), c = row_major(c0);
  Tensor y = layer.new_rows(x, p.D * p.R(), type);
  Tensor h_n = new_dense(x, {p.D, p.B, p.R()}, type);
  Tensor c_n = p.has_cell() ? new_dense(x, {p.D, p.B, p.H}, type) : nothing(x, type);
  const bool save_gates = reserve && p.saved(), save_cells = reserve && p.cell_width();
  Tensor gates = save_gates ? new_dense(x, {p.D, p.rows(), p.saved(), p.H}, layer.reserve_type())
                            : nothing(x, layer.reserve_type());
  Tensor cells = save_cells ? new_dense(x, {p.D, p.rows(), p.cell_width()}, layer.reserve_type())
                            : nothing(x, layer.reserve_type());
  RecurrentTensors t;
  Tensors held;
  place_inputs(layer, o, weights, h, c, t, held);
  place_schedule(layer, t, x);
  layer.strides_of(x, p.x_t, p.x_b);
  layer.strides_of(y, p.y_t, p.y_b);
  t.x = x.const_data_ptr(), t.y = y.mutable_data_ptr(), t.h_n = h_n.mutable_data_ptr();
  if (p.has_cell()) t.c_n = c_n.mutable_data_ptr();
  if (save_gates) t.gates = gates.mutable_data_ptr();
  if (save_cells) t.cells = cells.mutable_data_ptr();
  run(RecurrentPass::forward, p, t, x);
  return {y, h_n, c_n, gates, cells};
}

struct Needs {
  bool input, h0, c0, weights;
};
using Backward = std::tuple<Tensor, Tensor, Tensor, Tensors>;

Backward backward(const Optional& grad_output, const Optional& grad_h_n, const Optional& grad_c_n,
                  const Tensor& input, const Tensor& output, const Optional& h0, const Optional& c0,
                  const Tensors& weights, const Tensor& saved_gates, const Tensor& saved_cells,
                  const Optional& lengths, const Optional& batch_sizes, const Options& o, const Needs& needs,
                  RunPass run) {
  Layer layer = read_layer(input, h0, c0, weights, lengths, batch_sizes, o);
  RecurrentProblem& p = layer.p;
  const ScalarType type = input.scalar_type();
  require_like(output, input, "recurrent: output must have input's dtype and device");
  require(layer.has_rows_of(output, p.D * p.R()), "recurrent: output does not have the layer's shape");
  for (const Optional* g : {&grad_output, &grad_h_n, &grad_c_n})
    if (*g) require_like(**g, input, "recurrent: gradients must have input's dtype and device");
  require(!grad_output || layer.has_rows_of(*grad_output, p.D * p.R()),
          "recurrent: grad_output does not have the output's shape");
  require(!grad_h_n || has_shape(*grad_h_n, {p.D, p.B, p.R()}),
          "recurrent: grad_h_n does not have the state's shape");
  require(p.has_cell() || (!grad_c_n && !needs.c0), "recurrent: only an lstm has a cell state");
  require(!grad_c_n || has_shape(*grad_c_n, {p.D, p.B, p.H}),
          "recurrent: grad_c_n does not have the state's shape");
  require(!p.saved() ||
              (has_shape(saved_gates, {p.D, p.rows(), p.saved(), p.H}) &&
               saved_gates.scalar_type() == layer.reserve_type() && saved_gates.device() == input.device()),
          "recurrent: gates are not what forward saved");
  require(!p.cell_width() ||
              (has_shape(saved_cells, {p.D, p.rows(), p.cell_width()}) &&
               saved_cells.scalar_type() == layer.reserve_type() && saved_cells.device() == input.device()),
          "recurrent: cells are not what forward saved");

  const Tensor x = with_dense_rows(input), y = with_dense_rows(output);
  const Optional h = row_major(h0), c = row_major(c0), gh_n = row_major(grad_h_n), gc_n = row_major(grad_c_n),
                 gy = with_dense_rows(grad_output);
  const Tensor gates = row_major(saved_gates), cells = row_major(saved_cells);
  Tensor gx = needs.input ? layer.new_rows(x, p.I, type) : nothing(x, type);
  Tensor gh0 = needs.h0 ? new_dense(x, {p.D, p.B, p.R()}, type) : nothing(x, type);
  Tensor gc0 = needs.c0 ? new_dense(x, {p.D, p.B, p.H}, type) : nothing(x, type);
  Tensors gw;
  RecurrentTensors t;
  Tensors held;
  const WeightNames names = names_of(p, o);
  place_inputs(layer, o, weights, h, c, t, held);
  place_schedule(layer, t, x);
  for (int64_t d = 0; needs.weights && d < p.D; d++) {
    void* pointers[most_weights + 1] = {};
    for (int k = 0; k < names.each(); k++) {
      const Tensor& w = weights[size_t(d * names.each() + k)];
      gw.push_back(w.dim() == 2 ? new_dense(x, {w.size(0), w.size(1)}, type)
                                : new_dense(x, {w.size(0)}, type));
      pointers[k] = gw.back().mutable_data_ptr();
    }
    name_weights(names, pointers, t.gradients[d]);
  }
  layer.strides_of(x, p.x_t, p.x_b);
  layer.strides_of(y, p.y_t, p.y_b);
  if (gy) layer.strides_of(*gy, p.gy_t, p.gy_b);
  if (needs.input) layer.strides_of(gx, p.gx_t, p.gx_b);
  t.x = x.const_data_ptr(), t.y = const_cast<void*>(y.const_data_ptr());
  t.gates = const_cast<void*>(gates.const_data_ptr()), t.cells = const_cast<void*>(cells.const_data_ptr());
  t.gy = pointer(gy), t.gh_n = pointer(gh_n), t.gc_n = pointer(gc_n);
  if (needs.input) t.gx = gx.mutable_data_ptr();
  if (needs.h0) t.gh0 = gh0.mutable_data_ptr();
  if (needs.c0) t.gc0 = gc0.mutable_data_ptr();
  run(RecurrentPass::backward, p, t, x);
  return {gx, gh0, gc0, gw};
}

// The schema's arguments, once for each device.
#define OPTION_PARAMETERS const Optional &zone_h, const Optional &zone_c, StringHandle options
#define OPTIONS {taken(cell), directions, has_biases, batch_first, zone_h, zone_c, taken(options)}
#define FORWARD_PARAMETERS                                                                         \
  const Tensor &input, const Optional &h0, const Optional &c0, const Tensors &weights,             \
      const Optional &lengths, const Optional &batch_sizes, StringHandle cell, int64_t directions, \
      bool has_biases, bool batch_first, bool reserve, OPTION_PARAMETERS
#define FORWARD_ON(run) forward(input, h0, c0, weights, lengths, batch_sizes, OPTIONS, reserve, run)
#define BACKWARD_PARAMETERS                                                                             \
  const Optional &grad_output, const Optional &grad_h_n, const Optional &grad_c_n, const Tensor &input, \
      const Tensor &result, const Optional &h0, const Optional &c0, const Tensors &weights,             \
      const Tensor &gates, const Tensor &cells, const Optional &lengths, const Optional &batch_sizes,   \
      StringHandle cell, int64_t directions, bool has_biases, bool batch_first, bool need_input,        \
      bool need_h0, bool need_c0, bool need_weights, OPTION_PARAMETERS
#define BACKWARD_ON(run)                                                                           \
  backward(grad_output, grad_h_n, grad_c_n, input, result, h0, c0, weights, gates, cells, lengths, \
           batch_sizes, OPTIONS, {need_input, need_h0, need_c0, need_weights}, run)

Forward forward_cpu(FORWARD_PARAMETERS) { return FORWARD_ON(run_pass_on_cpu); }
Backward backward_cpu(BACKWARD_PARAMETERS) { return BACKWARD_ON(run_pass_on_cpu); }

STABLE_TORCH_LIBRARY_IMPL(pyseqnet, CPU, m) {
  m.impl("recurrent_forward", TORCH_BOX(&forward_cpu));
  m.impl("recurrent_backward", TORCH_BOX(&backward_cpu));
}

#if defined(PYSEQNET_WITH_CUDA)
void run_pass_on_cuda(RecurrentPass pass, const RecurrentProblem& p, const RecurrentTensors& t,
                      const Tensor& like) {
  run_on_cuda("recurrent", operation_of(pass), recurrent_cuda_table(pass), p, t, like);
}
Forward forward_cuda(FORWARD_PARAMETERS) { return FORWARD_ON(run_pass_on_cuda); }
Backward backward_cuda(BACKWARD_PARAMETERS) { return BACKWARD_ON(run_pass_on_cuda); }

STABLE_TORCH_LIBRARY_IMPL(pyseqnet, CUDA, m) {
  m.impl("recurrent_forward", TORCH_BOX(&forward_cuda));
  m.impl("recurrent_backward", TORCH_BOX(&backward_cuda));
}
#endif

}  // namespace
}  // namespace pyseqnet
