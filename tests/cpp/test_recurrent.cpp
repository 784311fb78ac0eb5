// Every CPU kernel of the recurrent family on every instruction set that this machine has, against the
// oracle: all cells and dtypes, one and both directions, packed, padded and dense sequences, with and without
// biases, projection, initial states, reserve and each gradient; edge shapes and random ones from fixed
// seeds.
//
// Each run finds outputs, reserve and scratch filled with NaN, outputs between guards, and NaN in every
// padded position of what it reads. Each problem is run again in randomly cut ranges, which must not change a
// bit.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "common/numerics.h"
#include "kernel_test.h"
#include "recurrent/recurrent.h"

namespace pyseqnet {
extern const RecurrentCpuKernel recurrent_reference_forward, recurrent_reference_backward;
}

namespace {
using namespace pyseqnet;

constexpr DType dtypes[] = {DType::f32, DType::bf16, DType::f16, DType::f64};
constexpr RecurrentCell cells[] = {RecurrentCell::rnn_tanh, RecurrentCell::rnn_relu, RecurrentCell::lstm,
                                   RecurrentCell::gru};

bool coin(Random& random) { return uniform(random, 0, 1); }
template <class T>
T pick(Random& random, std::initializer_list<T> choices) {
  return choices.begin()[uniform(random, 0, int64_t(choices.size()) - 1)];
}

// An input exactly as large as its tensor, so that a sanitizer sees every access beyond it.
using Bytes = std::vector<std::byte>;
Bytes numbers(int64_t count, DType dtype, double size, Random& random) {
  Bytes values(size_t(count * bytes_of(dtype)));
  for (int64_t i = 0; i < count; i++)
    write(values.data(), dtype, i, (double(random() >> 11) * 0x1p-52 - 1.0) * size);
  return values;
}

// An output between guards, full of ones: NaN.
struct Output {
  static constexpr size_t guard = 256;
  static constexpr std::byte guard_byte{0x5a};
  DType dtype = DType::f32;
  int64_t count = 0;
  Bytes bytes;
  Output(int64_t elements, DType type)
      : dtype(type), count(elements), bytes(2 * guard + size_t(elements * bytes_of(type)), guard_byte) {
    std::fill(bytes.begin() + guard, bytes.end() - guard, std::byte{0xff});
  }
  std::byte* data() { return bytes.data() + guard; }
  const std::byte* data() const { return bytes.data() + guard; }
  bool guards_hold() const {
    for (size_t i = 0; i < guard; i++)
      if (bytes[i] != guard_byte || bytes[bytes.size() - 1 - i] != guard_byte) return false;
    return true;
  }
};

// A layer with everything that its kernels read.
struct Layer {
  RecurrentProblem p;
  std::vector<int64_t> lengths, offsets;
  bool biases = true, batch_first = false, initial = true, gradients_of_states = true, grad_output = true;
  bool need_input = true, need_initial = true, need_weights = true;
  Bytes x, h0, c0, gy, gh_n, gc_n;
  std::vector<Bytes> weights[max_directions];
  DType wide() const { return p.dtype == DType::f64 ? DType::f64 : DType::f32; }

  void strides(int64_t features, int64_t& t, int64_t& b) const {
    t = p.packed() ? 0 : batch_first ? features : p.B * features;
    b = !p.packed() && batch_first ? p.T * features : features;
  }
  // NaN where nothing may be read.
  void poison(Bytes& values, int64_t features, int64_t stride_t, int64_t stride_b) const {
    for (int64_t b = 0; b < p.B && !p.packed(); b++)
      for (int64_t t = p.length(b); t < p.T; t++)
        for (int64_t i = 0; i < features; i++)
          write(values.data(), p.dtype, p.at(t, b, stride_t, stride_b) + i, NAN);
  }
  void fill(Random& random) {
    const DType dtype = p.dtype;
    const int64_t R = p.R(), rows = p.gates() * p.H;
    p.lengths = lengths.empty() ? nullptr : lengths.data();
    p.offsets = offsets.empty() ? nullptr : offsets.data();
    strides(p.I, p.x_t, p.x_b), strides(p.I, p.gx_t, p.gx_b);
    strides(p.D * R, p.y_t, p.y_b), strides(p.D * R, p.gy_t, p.gy_b);
    x = numbers(p.rows() * p.I, dtype, 1, random), gy = numbers(p.rows() * p.D * R, dtype, 1, random);
    poison(x, p.I, p.x_t, p.x_b), poison(gy, p.D * R, p.gy_t, p.gy_b);
    h0 = numbers(p.D * p.B * R, dtype, 1, random), c0 = numbers(p.D * p.B * p.H, dtype, 1, random);
    gh_n = numbers(p.D * p.B * R, dtype, 1, random), gc_n = numbers(p.D * p.B * p.H, dtype, 1, random);
    const double scale = 1 / std::sqrt(double(p.H));
    for (int64_t d = 0; d < p.D; d++)
      for (int64_t count : {rows * p.I, rows * R, rows, rows, p.P * p.H})
        weights[d].push_back(numbers(count, dtype, scale, random));
  }
  RecurrentTensors inputs() const {
    RecurrentTensors t;
    t.x = x.data(), t.lengths = p.lengths, t.offsets = p.offsets;
    if (initial) t.h0 = h0.data();
    if (initial && p.has_cell()) t.c0 = c0.data();
    for (int64_t d = 0; d < p.D; d++) {
      RecurrentWeights& w = t.weights[d];
      w.w_ih = weights[d][0].data(), w.w_hh = weights[d][1].data();
      if (biases) w.b_ih = weights[d][2].data(), w.b_hh = weights[d][3].data();
      if (p.P) w.w_hr = weights[d][4].data();
    }
    if (grad_output) t.gy = gy.data();
    if (gradients_of_states) t.gh_n = gh_n.data();
    if (gradients_of_states && p.has_cell()) t.gc_n = gc_n.data();
    return t;
  }

  std::vector<Output> forward_outputs() const {
    const int64_t N = p.rows(), states = p.D * p.B;
    return {Output(N * p.D * p.R(), p.dtype), Output(states * p.R(), p.dtype),
            Output(p.has_cell() ? states * p.H : 0, p.dtype),
            Output(p.reserve ? p.D * N * p.saved() * p.H : 0, wide()),
            Output(p.reserve && p.has_cell() ? p.D * N * p.H : 0, wide())};
  }
  void bind_forward(RecurrentTensors& t, std::vector<Output>& out) const {
    t.y = out[0].data(), t.h_n = out[1].data();
    t.c_n = p.has_cell() ? out[2].data() : nullptr;
    t.gates = p.reserve && p.saved() ? out[3].data() : nullptr;
    t.cells = p.reserve && p.has_cell() ? out[4].data() : nullptr;
  }
  std::vector<Output> backward_outputs() const {
    const int64_t rows = p.gates() * p.H, states = need_initial ? p.D * p.B : 0;
    std::vector<Output> out = {Output(need_input ? p.rows() * p.I : 0, p.dtype),
                               Output(states * p.R(), p.dtype),
                               Output(p.has_cell() ? states * p.H : 0, p.dtype)};
    for (int64_t d = 0; d < p.D; d++)
      for (int64_t count : {rows * p.I, rows * p.R(), biases ? rows : 0, biases ? rows : 0, p.P * p.H})
        out.push_back(Output(need_weights ? count : 0, p.dtype));
    return out;
  }
  void bind_backward(RecurrentTensors& t, std::vector<Output>& out) const {
    if (need_input) t.gx = out[0].data();
    if (need_initial) t.gh0 = out[1].data();
    if (need_initial && p.has_cell()) t.gc0 = out[2].data();
    for (int64_t d = 0; d < p.D && need_weights; d++) {
      RecurrentGradients& g = t.gradients[d];
      Output* of = &out[size_t(3 + 5 * d)];
      g.w_ih = of[0].data(), g.w_hh = of[1].data();
      if (biases) g.b_ih = of[2].data(), g.b_hh = of[3].data();
      if (p.P) g.w_hr = of[4].data();
    }
  }
};

struct Report {
  int64_t runs = 0, failures = 0;
  void result(const std::string& fault, RecurrentPass pass, const char* kernel, const Layer& layer) {
    runs++;
    if (!fault.empty() && failures++ < 10)
      std::printf("FAILED %s %s: %s: %s\n", operation_of(pass), kernel, describe(layer.p).c_str(),
                  fault.c_str());
  }
};

// Largest error allowed, in units of the largest magnitude of a tensor: float sums over the whole sequence,
// and what one rounding to the dtype costs. Where 16-bit outputs feed back (backward of Elman reads y, and so
// does dW_hh) both sides read the same y. Kernels that multiply bfloat16 round h and the gradients of sums on
// the way, so that their float reserve is as far off as a bfloat16.
double tolerance(DType dtype) {
  return dtype == DType::f64 ? 1e-13 : dtype == DType::bf16 ? 1.6e-2 : dtype == DType::f16 ? 1e-3 : 1e-5;
}

std::string difference(const std::vector<Output>& expected, const std::vector<Output>& got, bool rounds) {
  for (size_t k = 0; k < got.size(); k++) {
    const Output &e = expected[k], &g = got[k];
    if (!g.guards_hold()) return "wrote outside output " + std::to_string(k);
    double largest = rounds ? 1 : 0.3;  // sums of numbers about as large as 1 may all but cancel
    for (int64_t i = 0; i < e.count; i++) {
      const double v = read(e.data(), e.dtype, i);
      if (v == v) largest = std::max(largest, std::fabs(v));
    }
    for (int64_t i = 0; i < e.count; i++) {
      const double v = read(e.data(), e.dtype, i), w = read(g.data(), g.dtype, i);
      if (v != v && w != w) continue;  // the reserve of padded positions
      if (!(std::fabs(v - w) <= tolerance(rounds ? DType::bf16 : e.dtype) * largest))
        return "output " + std::to_string(k) + " [" + std::to_string(i) + "] is " + std::to_string(w) +
               ", not " + std::to_string(v);
    }
  }
  return {};
}

template <class Bind>
void compare(Report& report, RecurrentPass pass, const Layer& layer, const RecurrentTensors& inputs,
             const std::vector<Output>& expected, const std::vector<Output>& empty, Random& random,
             Bind bind) {
  const auto table = recurrent_cpu_table(pass);
  for (int k = 0; k < table.count; k++) {
    const RecurrentCpuKernel& kernel = *table.kernels[k];
    if (kernel.isa > detected_isa() || kernel.refuses(layer.p)) continue;
    std::vector<Output> whole = empty, cut = empty;
    RecurrentTensors t = inputs;
    bind(t, whole);
    execute(kernel, layer.p, t, nullptr);
    std::string fault = difference(expected, whole, kernel.isa == Isa::avx512bf16);
    t = inputs;
    bind(t, cut);
    execute(kernel, layer.p, t, &random);
    for (size_t i = 0; i < cut.size() && fault.empty(); i++)
      if (cut[i].bytes != whole[i].bytes) fault = "differs when the work is cut";
    report.result(fault, pass, kernel.name, layer);
  }
}

// Padded rows of y and gx are 0, of states nothing is left unwritten.
std::string unwritten(const std::vector<Output>& out, size_t dense) {
  for (size_t k = 0; k < out.size(); k++)
    for (int64_t i = 0; k < dense && i < out[k].count; i++)
      if (const double v = read(out[k].data(), out[k].dtype, i); v != v)
        return "output " + std::to_string(k) + " holds NaN";
  return {};
}

void check(Report& report, Layer& layer, Random& random) {
  layer.fill(random);
  const RecurrentTensors inputs = layer.inputs();
  for (bool reserve : {false, true}) {
    layer.p.reserve = reserve;
    const std::vector<Output> empty = layer.forward_outputs();
    std::vector<Output> expected = empty;
    RecurrentTensors t = inputs;
    layer.bind_forward(t, expected);
    execute(recurrent_reference_forward, layer.p, t, nullptr);
    report.result(unwritten(expected, 3), RecurrentPass::forward, "reference", layer);
    const auto bind = [&](RecurrentTensors& t, std::vector<Output>& out) { layer.bind_forward(t, out); };
    compare(report, RecurrentPass::forward, layer, inputs, expected, empty, random, bind);
    if (!reserve) continue;

    const RecurrentTensors saved = t;
    const std::vector<Output> none = layer.backward_outputs();
    std::vector<Output> gradients = none;
    layer.bind_backward(t, gradients);
    execute(recurrent_reference_backward, layer.p, t, nullptr);
    report.result(unwritten(gradients, gradients.size()), RecurrentPass::backward, "reference", layer);
    compare(report, RecurrentPass::backward, layer, saved, gradients, none, random,
            [&](RecurrentTensors& t, std::vector<Output>& out) { layer.bind_backward(t, out); });
  }
}

enum class Kind { dense, padded, packed };
void set_lengths(Layer& layer, Kind kind, int64_t shortest, Random& random) {
  RecurrentProblem& p = layer.p;
  if (kind == Kind::dense || p.B == 0) return;
  for (int64_t b = 0; b < p.B; b++) layer.lengths.push_back(uniform(random, std::min(shortest, p.T), p.T));
  if (kind == Kind::padded) return;
  std::sort(layer.lengths.begin(), layer.lengths.end(), std::greater<int64_t>());
  p.T = layer.lengths[0];
  layer.offsets.push_back(0);
  for (int64_t t = 0; t < p.T; t++) {
    int64_t running = 0;
    for (int64_t length : layer.lengths) running += length > t;
    layer.offsets.push_back(layer.offsets.back() + running);
  }
}

struct Edge {
  const char* why;
  int64_t T, B, I, H, P;
  Kind kind;
};
constexpr Edge edges[] = {
    {"no step", 0, 3, 5, 6, 0, Kind::dense},
    {"no sequence", 4, 0, 5, 6, 0, Kind::dense},
    {"no feature", 3, 2, 0, 5, 0, Kind::dense},
    {"one of everything", 1, 1, 1, 1, 0, Kind::dense},
    {"a single step, as a cell", 1, 9, 20, 33, 0, Kind::dense},
    {"whole vectors", 6, 12, 32, 64, 0, Kind::dense},
    {"whole tiles and one more unit", 5, 7, 64, 65, 0, Kind::dense},
    {"empty sequences among others", 7, 9, 6, 17, 0, Kind::padded},
    {"more sequences than run together", 3, 140, 5, 18, 0, Kind::padded},
    {"more rows than one product takes", 120, 7, 4, 16, 0, Kind::packed},
    {"a projection wider than a panel", 5, 6, 7, 90, 70, Kind::padded},
    {"a projection to one feature", 5, 6, 7, 20, 1, Kind::dense},
    {"rows of gradients too long to read in place", 4, 5, 70, 150, 0, Kind::packed},
};

void check_edges(Report& report) {
  Random random(7);
  for (const Edge& e : edges)
    for (RecurrentCell cell : cells)
      for (DType dtype : dtypes)
        for (int64_t D = 1; D <= 2; D++) {
          if (e.P && cell != RecurrentCell::lstm) continue;
          if (dtype != DType::f32 && e.H > 80 && D == 1) continue;
          Layer layer;
          layer.p.dtype = dtype, layer.p.cell = cell, layer.p.D = D;
          layer.p.T = e.T, layer.p.B = e.B, layer.p.I = e.I, layer.p.H = e.H, layer.p.P = e.P;
          layer.batch_first = D == 2;
          set_lengths(layer, e.kind, 0, random);
          check(report, layer, random);
        }
}

void random_layer(Layer& layer, Random& random) {
  RecurrentProblem& p = layer.p;
  p.cell = pick(random, {RecurrentCell::rnn_tanh, RecurrentCell::rnn_relu, RecurrentCell::lstm,
                         RecurrentCell::lstm, RecurrentCell::gru});
  p.T = uniform(random, 1, 12), p.B = pick<int64_t>(random, {1, 2, 3, 4, 6, 7, 13, 17});
  p.I = pick<int64_t>(random, {1, 2, 7, 15, 16, 33, 65}),
  p.H = pick<int64_t>(random, {1, 3, 8, 16, 17, 31, 66});
  p.P = p.has_cell() && uniform(random, 0, 2) == 0 ? uniform(random, 1, p.H) : 0;
  p.D = uniform(random, 1, 2);
  layer.biases = uniform(random, 0, 3) != 0, layer.batch_first = coin(random), layer.initial = coin(random);
  layer.gradients_of_states = coin(random), layer.grad_output = uniform(random, 0, 3) != 0;
  layer.need_input = uniform(random, 0, 3) != 0, layer.need_initial = coin(random);
  layer.need_weights = uniform(random, 0, 3) != 0;
  set_lengths(layer, pick(random, {Kind::dense, Kind::padded, Kind::packed}), uniform(random, 0, 1), random);
  if (p.T == 0) layer.offsets = {0};
}

}  // namespace

int main(int argc, char** argv) {
  const int count = argc > 1 ? std::atoi(argv[1]) : 100;
  int64_t failures = 0;
  auto print = [&](const Report& report, const char* what) {
    std::printf("recurrent %-6s %6lld runs%s\n", what, (long long)report.runs,
                report.failures ? "  FAILED" : "");
    failures += report.failures;
  };
  Report edge_report;
  check_edges(edge_report);
  print(edge_report, "edges");
  for (DType dtype : dtypes) {
    Random random(uint64_t(dtype) + 1);
    Report report;
    for (int i = 0; i < count; i++) {
      Layer layer;
      layer.p.dtype = dtype;
      random_layer(layer, random);
      check(report, layer, random);
    }
    print(report, name_of(dtype));
  }
  return failures ? 1 : 0;
}
