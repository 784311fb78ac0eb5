// Every CPU convolution kernel of every instruction set that this machine has, against the oracle: forward,
// input, weight and bias gradient; both layouts of images and filters; f32, bf16, f16 (and f64, where a
// kernel takes it); edge shapes and random ones from fixed seeds.
//
// Each run finds its output, its shared workspace and its scratch filled with NaN, and its output between
// guards. Each problem is run again in randomly cut ranges, with scratch poisoned anew for each: the bits
// must be the same. Kernels come from the dispatch tables, so a new kernel is tested as soon as it is listed.
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
#include "conv/conv.h"
#include "kernel_test.h"

namespace pyseqnet {
extern const ConvCpuKernel conv_reference_forward, conv_reference_input_gradient,
    conv_reference_weight_gradient, conv_reference_bias_gradient;
}

namespace {
using namespace pyseqnet;

constexpr ConvPass passes[] = {ConvPass::forward, ConvPass::input_gradient, ConvPass::weight_gradient,
                               ConvPass::bias_gradient};
const ConvCpuKernel* const oracle[] = {&conv_reference_forward, &conv_reference_input_gradient,
                                       &conv_reference_weight_gradient, &conv_reference_bias_gradient};

// Winograd kernels round differently: their bound is the one that DESIGN states, relative to the largest
// result.
constexpr double WINOGRAD_TOLERANCE = 5e-6;

// Exactly as large as the tensor, so that a sanitizer sees every access beyond it.
struct Tensor {
  DType dtype;
  int64_t count;
  std::vector<std::byte> bytes;
  Tensor(DType dtype, int64_t count) : dtype(dtype), count(count), bytes(size_t(count * bytes_of(dtype))) {}
  void* data() { return bytes.data(); }
  double at(int64_t i) const { return read(bytes.data(), dtype, i); }
  void randomize(Random& random) {
    for (int64_t i = 0; i < count; i++) write(data(), dtype, i, double(random() >> 11) * 0x1p-52 - 1.0);
  }
};

// An output between guards, full of NaN.
struct Output {
  static constexpr int64_t guard = 256;
  static constexpr std::byte guard_byte{0x5a};
  DType dtype;
  int64_t count;
  std::vector<std::byte> bytes;
  Output(DType dtype, int64_t count)
      : dtype(dtype), count(count), bytes(size_t(2 * guard + count * bytes_of(dtype)), guard_byte) {
    std::memset(data(), 0xff, size_t(count * bytes_of(dtype)));
  }
  std::byte* data() { return bytes.data() + guard; }
  double at(int64_t i) const { return read(bytes.data() + guard, dtype, i); }
  bool guards_hold() const {
    for (int64_t i = 0; i < guard; i++)
      if (bytes[size_t(i)] != guard_byte || bytes[bytes.size() - 1 - size_t(i)] != guard_byte) return false;
    return true;
  }
};

struct Group {
  const char* name;
  int64_t runs = 0, failures = 0;
  double worst = 0;  // error as a fraction of what is allowed
};

int64_t result_size(const ConvProblem& p, ConvPass pass) {
  switch (pass) {
    case ConvPass::forward:
      return p.N * p.K * p.P * p.Q;
    case ConvPass::input_gradient:
      return p.N * p.C * p.H * p.W;
    case ConvPass::weight_gradient:
      return p.K * p.group_channels() * p.R * p.S;
    case ConvPass::bias_gradient:
      return p.K;
  }
  return 0;
}
double depth_of(const ConvProblem& p, ConvPass pass) {
  switch (pass) {
    case ConvPass::forward:
      return double(p.group_channels() * p.R * p.S);
    case ConvPass::input_gradient:
      return double(p.group_filters() * p.R * p.S);
    default:
      return double(p.N * p.P * p.Q);
  }
}
void set_result(ConvTensors& t, ConvPass pass, void* result) {
  (pass == ConvPass::forward           ? t.y
   : pass == ConvPass::input_gradient  ? t.gx
   : pass == ConvPass::weight_gradient ? t.gw
                                       : t.gb) = result;
}

void check(Group& group, ConvPass pass, const ConvProblem& p, bool with_bias, Random& random) {
  Tensor x(p.dtype, p.N * p.C * p.H * p.W), w(p.dtype, p.K * p.group_channels() * p.R * p.S),
      bias(p.dtype, p.K), gy(p.dtype, p.N * p.K * p.P * p.Q);
  for (Tensor* t : {&x, &w, &bias, &gy}) t->randomize(random);
  ConvTensors t;
  t.x = x.data(), t.w = w.data(), t.bias = with_bias ? bias.data() : nullptr, t.gy = gy.data();

  Output expected(p.dtype, result_size(p, pass));
  set_result(t, pass, expected.data());
  execute(*oracle[int(pass)], p, t, nullptr);
  // The size of a typical sum, so that one lone result near zero asks for no more accuracy than float has.
  constexpr double typical_product = 1.0 / 3;
  double scale = typical_product * std::sqrt(depth_of(p, pass));
  for (int64_t i = 0; i < expected.count; i++) scale = std::max(scale, std::fabs(expected.at(i)));

  const double unit = p.dtype == DType::bf16  ? 0x1p-8
                      : p.dtype == DType::f16 ? 0x1p-11
                      : p.dtype == DType::f64 ? 0x1p-53
                                              : 0x1p-24;
  const double sum_unit = p.dtype == DType::f64 ? 0x1p-53 : 0x1p-24;
  const auto table = conv_cpu_table(pass);
  for (int i = 0; i < table.count; i++) {
    const ConvCpuKernel& kernel = *table.kernels[i];
    if (kernel.isa > detected_isa() || kernel.refuses(p)) continue;
    Output got(p.dtype, expected.count), cut(p.dtype, expected.count);
    set_result(t, pass, got.data());
    execute(kernel, p, t, nullptr);
    set_result(t, pass, cut.data());
    execute(kernel, p, t, &random);

    const bool winograd = std::string(kernel.name).find("winograd") == 0;
    const double of_scale = winograd ? WINOGRAD_TOLERANCE : sum_unit * (4 + 2 * std::sqrt(depth_of(p, pass)));
    double worst = 0;
    int64_t where = -1;
    for (int64_t e = 0; e < expected.count; e++) {
      const double allowed = 2 * unit * std::fabs(expected.at(e)) + of_scale * scale + 0x1p-25;
      const double error = std::fabs(got.at(e) - expected.at(e)) / allowed;
      if (!(error <= worst)) worst = std::isnan(error) ? INFINITY : error, where = e;
    }
    const char* fault = worst > 1                                  ? "wrong result"
                        : !got.guards_hold() || !cut.guards_hold() ? "wrote outside its output"
                        : got.bytes != cut.bytes                   ? "depends on how the work is cut"
                                                                   : nullptr;
    group.runs++;
    group.worst = std::max(group.worst, worst);
    if (fault && group.failures++ < 5)
      std::printf("FAILED %s %s: %s, filters %s, %s: at %lld got %g, expected %g\n", operation_of(pass),
                  kernel.name, describe(p).c_str(), name_of(p.filter_layout), fault, (long long)where,
                  where < 0 ? 0.0 : got.at(where), where < 0 ? 0.0 : expected.at(where));
  }
}

// Fills in P and Q; false where the filter does not fit.
bool finish(ConvProblem& p) {
  const int64_t h = p.H + 2 * p.pad_h - (p.R - 1) * p.dilation_h - 1;
  const int64_t w = p.W + 2 * p.pad_w - (p.S - 1) * p.dilation_w - 1;
  if (h < 0 || w < 0) return false;
  p.P = h / p.stride_h + 1;
  p.Q = w / p.stride_w + 1;
  return true;
}

ConvProblem random_problem(Random& random) {
  for (;;) {
    ConvProblem p;
    const bool one_dimensional = uniform(random, 0, 3) == 0;
    const bool pointwise = uniform(random, 0, 4) == 0;
    p.groups = uniform(random, 0, 2) ? 1 : uniform(random, 1, 4);
    p.N = uniform(random, 1, 4);
    p.C = p.groups * uniform(random, 1, uniform(random, 0, 3) ? 8 : 40);
    p.K = p.groups * uniform(random, 1, uniform(random, 0, 3) ? 20 : 90);
    p.H = one_dimensional ? 1 : uniform(random, 1, 17);
    p.W = uniform(random, 1, one_dimensional ? 80 : 20);
    p.R = one_dimensional || pointwise ? 1 : uniform(random, 1, 5);
    p.S = pointwise ? 1 : uniform(random, 1, 5);
    const bool plain = uniform(random, 0, 1) == 0;
    p.stride_h = plain ? 1 : uniform(random, 1, 3);
    p.stride_w = plain ? 1 : uniform(random, 1, 3);
    p.dilation_h = plain ? 1 : uniform(random, 1, 3);
    p.dilation_w = plain ? 1 : uniform(random, 1, 3);
    p.pad_h = one_dimensional ? 0 : uniform(random, 0, 3);
    p.pad_w = uniform(random, 0, 3);
    if (uniform(random, 0, 3) == 0) {  // depthwise, with filters up to 31 taps and padding to match
      p.groups = p.C = p.K = uniform(random, 2, 70);
      if (one_dimensional) p.S = uniform(random, 1, 31), p.pad_w = uniform(random, 0, p.S * p.dilation_w);
      if (!one_dimensional) p.R = p.S = uniform(random, 1, 7);
    }
    if (!finish(p)) continue;
    p.layout = uniform(random, 0, 1) ? Layout::nchw : Layout::nhwc;
    p.filter_layout = uniform(random, 0, 3)      ? p.layout
                      : p.layout == Layout::nchw ? Layout::nhwc
                                                 : Layout::nchw;
    // The output may stop short of what the padding allows: padding after the end is implied by P and Q.
    if (uniform(random, 0, 5) == 0) p.P = uniform(random, 1, p.P), p.Q = uniform(random, 1, p.Q);
    return p;
  }
}

struct Edge {
  const char* why;
  int64_t N, C, H, W, K, R, S, stride, pad, dilation, groups;
};
constexpr Edge edges[] = {
    {"no image", 0, 3, 8, 8, 4, 3, 3, 1, 1, 1, 1},
    {"no input channel", 2, 0, 8, 8, 4, 3, 3, 1, 1, 1, 1},
    {"no filter", 2, 3, 8, 8, 0, 3, 3, 1, 1, 1, 1},
    {"one pixel", 5, 37, 1, 1, 70, 1, 1, 1, 0, 1, 1},
    {"one pixel, filter in the padding", 2, 3, 1, 1, 5, 3, 3, 1, 1, 1, 1},
    {"filter as large as the image", 3, 6, 7, 9, 33, 7, 9, 1, 0, 1, 1},
    {"padding wider than the filter", 2, 3, 5, 5, 4, 2, 2, 1, 4, 1, 1},
    {"stride larger than the filter", 2, 5, 13, 13, 6, 2, 2, 4, 0, 1, 1},
    {"stride and dilation share a factor", 2, 4, 15, 15, 6, 3, 3, 2, 2, 2, 1},
    {"stride and dilation differ", 2, 4, 17, 17, 6, 3, 3, 2, 3, 3, 1},
    {"pointwise, strided", 2, 19, 9, 9, 21, 1, 1, 2, 0, 1, 1},
    {"patches", 2, 3, 16, 16, 40, 4, 4, 4, 0, 1, 1},
    {"depthwise", 2, 19, 9, 9, 19, 3, 3, 1, 1, 1, 19},
    {"depthwise with multiplier", 2, 6, 9, 9, 18, 3, 3, 2, 1, 1, 6},
    {"depthwise, several tiles", 1, 17, 90, 70, 17, 3, 3, 1, 1, 1, 17},
    {"depthwise, strided and dilated", 2, 33, 19, 21, 33, 3, 3, 2, 2, 2, 33},
    {"depthwise sequence, long filter", 2, 20, 1, 300, 20, 1, 31, 1, 15, 1, 20},
    {"depthwise sequence, far taps", 1, 8, 1, 9000, 8, 1, 3, 1, 512, 512, 8},
    {"many small images", 33, 5, 3, 3, 9, 3, 3, 1, 1, 1, 1},
    {"deep: several depth blocks", 1, 300, 6, 6, 20, 3, 3, 1, 1, 1, 1},
    {"deep and many filters", 1, 280, 5, 5, 150, 3, 3, 1, 1, 1, 1},
    {"large pointwise, without padding", 1, 64, 24, 24, 64, 1, 1, 1, 0, 1, 1},
    {"large image, strided", 1, 3, 61, 67, 64, 7, 7, 2, 3, 1, 1},
    {"long sequence", 2, 8, 1, 3000, 16, 1, 5, 1, 2, 1, 1},
    {"long sequence, far taps", 1, 4, 1, 900, 16, 1, 3, 1, 128, 128, 1},
    {"Winograd's favourite", 2, 32, 13, 14, 64, 3, 3, 1, 1, 1, 1},
};

void check_edges(Group& group, ConvPass pass) {
  Random random(7);
  for (const Edge& e : edges)
    for (DType dtype : {DType::f32, DType::bf16, DType::f16, DType::f64})
      for (Layout layout : {Layout::nchw, Layout::nhwc}) {
        ConvProblem p;
        p.dtype = dtype;
        p.layout = p.filter_layout = layout;
        p.N = e.N, p.C = e.C, p.H = e.H, p.W = e.W, p.K = e.K, p.R = e.R, p.S = e.S, p.groups = e.groups;
        p.stride_h = p.stride_w = e.stride;
        p.pad_h = e.H == 1 && e.R == 1 ? 0 : e.pad;
        p.pad_w = e.pad;
        p.dilation_h = p.dilation_w = e.dilation;
        if (!finish(p)) {
          std::printf("FAILED edge case '%s' is no convolution\n", e.why);
          group.failures++;
          continue;
        }
        check(group, pass, p, true, random);
      }
}

void check_random(Group& group, ConvPass pass, DType dtype, int count) {
  Random random(uint64_t(pass) * 10 + uint64_t(dtype));
  for (int i = 0; i < count; i++) {
    ConvProblem p = random_problem(random);
    p.dtype = dtype;
    check(group, pass, p, uniform(random, 0, 1) == 0, random);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int count = argc > 1 ? std::atoi(argv[1]) : 60;
  int64_t failures = 0;
  auto report = [&](const Group& group, const char* what) {
    std::printf("%-21s %-6s %5lld runs, worst error %.2f of the bound%s\n", group.name, what,
                (long long)group.runs, group.worst, group.failures ? "  FAILED" : "");
    failures += group.failures;
  };
  for (ConvPass pass : passes) {
    Group edge_group{operation_of(pass)};
    check_edges(edge_group, pass);
    report(edge_group, "edges");
    for (DType dtype : {DType::f32, DType::bf16, DType::f16, DType::f64}) {
      Group group{operation_of(pass)};
      check_random(group, pass, dtype, count);
      report(group, name_of(dtype));
    }
  }
  return failures ? 1 : 0;
}
