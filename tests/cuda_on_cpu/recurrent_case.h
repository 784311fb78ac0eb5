// One problem of the recurrent family, forward and backward, on the kernels of a table entry and on the oracle:
// what the cases of that family share.
//
// Padded positions of x and gy hold NaN, which must not leak; what nobody may write keeps its poison, in the
// oracle's results as in the kernel's.
#pragma once
#include <algorithm>
#include <memory>

#include "harness.h"
#include "recurrent/recurrent.h"

namespace pyseqnet {
extern const RecurrentCpuKernel recurrent_reference_forward, recurrent_reference_backward;
}  // namespace pyseqnet

namespace pyseqnet::testing {

constexpr DType all_dtypes[] = {DType::f32, DType::bf16, DType::f16, DType::f64};
constexpr RecurrentCell all_cells[] = {RecurrentCell::rnn_tanh, RecurrentCell::rnn_relu, RecurrentCell::lstm,
                                       RecurrentCell::gru};

enum class Form { dense, lengths, packed };
constexpr Form all_forms[] = {Form::dense, Form::lengths, Form::packed};

// What may be there or not, and how tensors lie.
struct Choices {
  Form form = Form::dense;
  bool batch_first = false, gaps = false;  // gaps: rows do not follow each other
  bool biases = true, states = true;
  bool gy = true, gy_expanded = false, g_states = true;  // gradients that come
  bool gx = true, to_states = true, weights = true;      // gradients that are wanted
};

struct Case {
  RecurrentProblem p;
  Choices choices;
  std::vector<int64_t> lengths, offsets;
};

inline std::string label(const Case& c) {
  const RecurrentProblem& p = c.p;
  char words[400];
  std::snprintf(
      words, sizeof words, "%s %s %s T%lld B%lld I%lld H%lld P%lld D%lld%s%s%s%s%s%s%s%s%s%s%s%s%s%s%s",
      name_of(p.dtype), name_of(p.cell),
      c.choices.form == Form::dense     ? "dense"
      : c.choices.form == Form::lengths ? "lengths"
                                        : "packed",
      (long long)p.T, (long long)p.B, (long long)p.I, (long long)p.H, (long long)p.P, (long long)p.D,
      p.reserve ? "" : " without reserve", c.choices.batch_first ? " batch first" : "",
      c.choices.gaps ? " gaps" : "", c.choices.biases ? "" : " no biases", c.choices.states ? "" : " no h0",
      c.choices.gy ? "" : " no gy", c.choices.gy_expanded ? " gy expanded" : "",
      c.choices.g_states ? "" : " no gh_n", c.choices.gx ? "" : " no gx",
      c.choices.to_states ? "" : " no gh0", c.choices.weights ? "" : " no gw",
      p.zone_masks  ? " masks"
      : p.zoneout() ? " zoneout"
                    : "",
      p.limit != 0 ? " clipped" : "", p.is_jordan() ? " " : "", p.is_jordan() ? name_of(p.output) : "");
  return words;
}

inline Case make(DType dtype, RecurrentCell cell, int64_t T, int64_t B, int64_t I, int64_t H, int64_t D,
                 int64_t P = 0, Choices choices = {}) {
  Case c;
  c.p.dtype = dtype, c.p.cell = cell, c.p.T = T, c.p.B = B, c.p.I = I, c.p.H = H, c.p.D = D;
  c.p.P = c.p.has_cell() || c.p.is_jordan() ? P : 0;
  c.choices = choices;
  return c;
}

// Any lengths, 0 and T among them; never increasing and without 0 where packed.
inline void draw_lengths(Case& c, Random& random) {
  RecurrentProblem& p = c.p;
  c.lengths.clear(), c.offsets.clear();
  p.lengths = p.offsets = nullptr;
  if (c.choices.form == Form::dense) return;
  const bool packed = c.choices.form == Form::packed;
  for (int64_t b = 0; b < p.B; b++)
    c.lengths.push_back(random.chance(0.2) ? p.T : random.in(packed ? 1 : 0, p.T));
  if (packed) {
    if (p.B > 0) c.lengths[0] = p.T;
    std::sort(c.lengths.rbegin(), c.lengths.rend());
    c.offsets.push_back(0);
    for (int64_t t = 0; t < p.T; t++)
      c.offsets.push_back(c.offsets.back() + std::count_if(c.lengths.begin(), c.lengths.end(),
                                                           [&](int64_t n) { return n > t; }));
    p.offsets = c.offsets.data();
  }
  p.lengths = c.lengths.data();
}

// Strides of a tensor of `width` features; returns how many elements it spans.
inline int64_t lay_out(const Case& c, int64_t width, int64_t& stride_t, int64_t& stride_b) {
  const RecurrentProblem& p = c.p;
  const int64_t row = width + (c.choices.gaps ? 3 : 0);
  if (p.packed()) {
    stride_t = 0, stride_b = row;
    return p.rows() * row;
  }
  stride_t = c.choices.batch_first ? row : p.B * row;
  stride_b = c.choices.batch_first ? p.T * row : row;
  return p.T * p.B * row;
}

// NaN at all padded positions.
inline void spoil_padding(Tensor& t, const RecurrentProblem& p, int64_t stride_t, int64_t stride_b,
                          int64_t width) {
  if (p.packed()) return;
  for (int64_t b = 0; b < p.B; b++)
    for (int64_t step = p.length(b); step < p.T; step++)
      for (int64_t i = 0; i < width; i++) t.set(step * stride_t + b * stride_b + i, NAN);
  t.upload();
}

inline void copy_to_device(Tensor& to, Tensor& from) {
  std::memcpy(to.host(), from.host(), from.bytes().size());
  to.upload();
}

// The tensors of a case: what is read, what kernels write and what the oracle writes.
struct CaseTensors {
  std::vector<std::unique_ptr<Tensor>> all;
  RecurrentTensors host, device;

  Tensor* add(Kind kind, int64_t count, const char* name) {
    all.push_back(std::make_unique<Tensor>(kind, count, name));
    return all.back().get();
  }
  Tensor* input(Kind kind, int64_t count, const char* name, const void*& on_host, const void*& on_device,
                Random& random, double scale = 1) {
    Tensor* t = add(kind, count, name);
    fill(*t, random, scale);
    on_host = t->host(), on_device = t->device();
    return t;
  }
};

struct Output {
  Tensor *got, *want;
};

// The kernels of a table entry, both passes.
struct RecurrentKernels {
  const RecurrentCudaKernel &forward, &backward;
  // Whether products read h and the gradients of gates' sums rounded to the problem's dtype.
  bool rounds;
};

inline void check_case(Suite& suite, Case c, const RecurrentKernels& kernels) {
  Random& random = suite.random;
  draw_lengths(c, random);
  if (!suite.begin(label(c))) return;
  RecurrentProblem& p = c.p;
  const Choices& choices = c.choices;
  const Kind element = kind_of(p.dtype), wide = p.dtype == DType::f64 ? Kind::f64 : Kind::f32;
  const int64_t G = p.gates(), H = p.H, R = p.R(), N = p.rows();
  const double weight_scale = 1 / std::sqrt(double(std::max<int64_t>(R, 1)));

  const int64_t x_count = lay_out(c, p.I, p.x_t, p.x_b), y_count = lay_out(c, p.D * R, p.y_t, p.y_b);
  const int64_t gx_count = lay_out(c, p.I, p.gx_t, p.gx_b);
  int64_t gy_count = lay_out(c, p.D * R, p.gy_t, p.gy_b);
  if (choices.gy_expanded) p.gy_t = p.gy_b = 0, gy_count = p.D * R;

  CaseTensors all;
  RecurrentTensors &host = all.host, &device = all.device;
  Tensor* x = all.input(element, x_count, "x", host.x, device.x, random);
  spoil_padding(*x, p, p.x_t, p.x_b, p.I);
  if (choices.states) {
    all.input(element, p.D * p.B * R, "h0", host.h0, device.h0, random, 0.5);
    if (p.has_cell()) all.input(element, p.D * p.B * H, "c0", host.c0, device.c0, random, 0.5);
  }
  for (int64_t d = 0; d < p.D; d++) {
    RecurrentWeights &of_host = host.weights[d], &of_device = device.weights[d];
    all.input(element, G * H * p.I, "w_ih", of_host.w_ih, of_device.w_ih, random,
              1 / std::sqrt(double(std::max<int64_t>(p.I, 1))));
    all.input(element, G * H * R, "w_hh", of_host.w_hh, of_device.w_hh, random, weight_scale);
    if (choices.biases) {
      all.input(element, G * H, "b_ih", of_host.b_ih, of_device.b_ih, random, 0.5);
      all.input(element, G * H, "b_hh", of_host.b_hh, of_device.b_hh, random, 0.5);
    }
    if (p.P)
      all.input(element, p.P * H, "w_hr", of_host.w_hr, of_device.w_hr, random, 1 / std::sqrt(double(H)));
    if (p.is_jordan() && choices.biases)
      all.input(element, p.P, "b_hr", of_host.b_hr, of_device.b_hr, random, 0.5);
    if (p.cell == RecurrentCell::lstm_peephole)
      all.input(element, 3 * H, "w_ch", of_host.w_ch, of_device.w_ch, random, 0.5);
    if (p.facts().feeds_cell)
      all.input(element, G * H * H, "w_ch", of_host.w_ch, of_device.w_ch, random, weight_scale);
    if (p.cell == RecurrentCell::lstm_layer_norm) {
      all.input(element, G * H, "gain_ih", of_host.gain_ih, of_device.gain_ih, random);
      all.input(element, G * H, "gain_hh", of_host.gain_hh, of_device.gain_hh, random);
      all.input(element, H, "gain_c", of_host.gain_c, of_device.gain_c, random);
      all.input(element, H, "bias_c", of_host.bias_c, of_device.bias_c, random, 0.5);
    }
  }
  const auto mask = [&](int64_t width, const char* name, const uint8_t*& of_host, const uint8_t*& of_device) {
    Tensor* t = all.add(Kind::u8, p.D * N * width, name);
    for (int64_t i = 0; i < p.D * N * width; i++) t->set(i, random.chance(0.3) ? 1 : 0);
    t->upload();
    of_host = static_cast<const uint8_t*>(t->host()), of_device = static_cast<const uint8_t*>(t->device());
  };
  if (p.zone_masks) mask(R, "zone_h", host.zone_h, device.zone_h);
  if (p.zone_masks && p.has_cell()) mask(H, "zone_c", host.zone_c, device.zone_c);
  const auto integers = [&](const std::vector<int64_t>& values, const char* name) -> const int64_t* {
    Tensor* t = all.add(Kind::i64, int64_t(values.size()), name);
    for (size_t i = 0; i < values.size(); i++) t->set(int64_t(i), double(values[i]));
    t->upload();
    return static_cast<const int64_t*>(t->device());
  };
  host.lengths = p.lengths, host.offsets = p.offsets;
  if (p.lengths) device.lengths = integers(c.lengths, "lengths");
  if (p.offsets) device.offsets = integers(c.offsets, "offsets");

  const auto output = [&](std::vector<Output>& list, Kind kind, int64_t count, const char* name,
                          void*& of_host, void*& of_device) {
    Tensor *got = all.add(kind, count, name), *want = all.add(kind, count, name);
    of_host = want->host(), of_device = got->device();
    list.push_back({got, want});
  };
  std::vector<Output> forward;
  output(forward, element, y_count, "y", host.y, device.y);
  output(forward, element, p.D * p.B * R, "h_n", host.h_n, device.h_n);
  if (p.has_cell()) output(forward, element, p.D * p.B * H, "c_n", host.c_n, device.c_n);
  if (p.reserve && p.saved())
    output(forward, wide, p.D * N * p.saved() * H, "gates", host.gates, device.gates);
  if (p.reserve && p.cell_width())
    output(forward, wide, p.D * N * p.cell_width(), "cells", host.cells, device.cells);
  run_cpu(recurrent_reference_forward, p, host);
  for (const RecurrentCudaKernel* k : {&kernels.forward, &kernels.backward})
    if (const Refusal why = k->refuses(p)) return suite.fail(k->name, std::string("refuses: ") + why);

  // Each sum rounds its terms once, of order 1; errors travel along with h through the steps.
  const double unit = p.dtype == DType::f64 ? 0x1p-53 : 0x1p-24;
  // Normalising divides by a deviation that may be small.
  const double amplified = p.facts().over_units ? 30 : 1;
  const double terms = amplified * double(p.I + R + H + 32) * double(std::min<int64_t>(p.T, 8) + 1);
  // A rounded h or gradient is off by half an epsilon of its size, of order 1, at random.
  const double rounding = kernels.rounds ? 2 * epsilon_of(p.dtype) : 0;
  const auto compare = [&](const std::vector<Output>& list, double absolute) {
    for (const Output& o : list) {
      const std::string wrong = difference(*o.got, *o.want, absolute, epsilon_of(p.dtype));
      if (!wrong.empty()) return wrong;
    }
    return std::string();
  };
  const auto of_kernel = [](const std::vector<Output>& list) {
    std::vector<Tensor*> tensors;
    for (const Output& o : list) tensors.push_back(o.got);
    return tensors;
  };
  suite.check(
      "forward", of_kernel(forward), [&] { return run_cuda(kernels.forward, p, device); },
      [&] { return compare(forward, unit * terms + rounding); });
  if (!p.reserve) return;

  // Independent of forward: from the oracle's results.
  for (const Output& o : forward) copy_to_device(*o.got, *o.want);
  if (choices.gy) {
    Tensor* gy = all.input(element, gy_count, "gy", host.gy, device.gy, random);
    if (!choices.gy_expanded) spoil_padding(*gy, p, p.gy_t, p.gy_b, p.D * R);
  }
  if (choices.g_states) {
    all.input(element, p.D * p.B * R, "gh_n", host.gh_n, device.gh_n, random);
    if (p.has_cell()) all.input(element, p.D * p.B * H, "gc_n", host.gc_n, device.gc_n, random);
  }
  std::vector<Output> backward;
  if (choices.gx) output(backward, element, gx_count, "gx", host.gx, device.gx);
  if (choices.to_states) {
    output(backward, element, p.D * p.B * R, "gh0", host.gh0, device.gh0);
    if (p.has_cell()) output(backward, element, p.D * p.B * H, "gc0", host.gc0, device.gc0);
  }
  for (int64_t d = 0; choices.weights && d < p.D; d++) {
    RecurrentGradients &of_host = host.gradients[d], &of_device = device.gradients[d];
    output(backward, element, G * H * p.I, "g_w_ih", of_host.w_ih, of_device.w_ih);
    output(backward, element, G * H * R, "g_w_hh", of_host.w_hh, of_device.w_hh);
    if (choices.biases) {
      output(backward, element, G * H, "g_b_ih", of_host.b_ih, of_device.b_ih);
      output(backward, element, G * H, "g_b_hh", of_host.b_hh, of_device.b_hh);
    }
    if (p.P) output(backward, element, p.P * H, "g_w_hr", of_host.w_hr, of_device.w_hr);
    if (p.is_jordan() && choices.biases)
      output(backward, element, p.P, "g_b_hr", of_host.b_hr, of_device.b_hr);
    if (p.cell == RecurrentCell::lstm_peephole)
      output(backward, element, 3 * H, "g_w_ch", of_host.w_ch, of_device.w_ch);
    if (p.facts().feeds_cell) output(backward, element, G * H * H, "g_w_ch", of_host.w_ch, of_device.w_ch);
    if (p.cell == RecurrentCell::lstm_layer_norm) {
      output(backward, element, G * H, "g_gain_ih", of_host.gain_ih, of_device.gain_ih);
      output(backward, element, G * H, "g_gain_hh", of_host.gain_hh, of_device.gain_hh);
      output(backward, element, H, "g_gain_c", of_host.gain_c, of_device.gain_c);
      output(backward, element, H, "g_bias_c", of_host.bias_c, of_device.bias_c);
    }
  }
  if (backward.empty()) return;
  run_cpu(recurrent_reference_backward, p, host);
  // The reserve that the oracle wrote is rounded to `wide`; gradients are a few times larger than states.
  suite.check(
      "backward", of_kernel(backward), [&] { return run_cuda(kernels.backward, p, device); },
      [&] {
        return compare(backward,
                       4 * unit * (terms + double(G * H + N)) + rounding * (1 + std::sqrt(double(N))));
      });
}

}  // namespace pyseqnet::testing
