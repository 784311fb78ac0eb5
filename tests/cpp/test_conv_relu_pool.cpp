// Every CPU kernel of the fused block of every instruction set that this machine has, against the oracle:
// both layouts, float32 and the 16-bit types, edge shapes and random ones from fixed seeds.
//
// Images, filters and biases are small integers: their sums are exact in every order, so y and arg must agree
// in every bit, ties included (Winograd rounds: it is turned off here, its own test bounds it). Gradients
// start from random winners; those of float32 are small integers as well and must agree in every bit. Each
// run finds its output and its scratch filled with NaN and its output between guards; each problem is run
// again in randomly cut ranges.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <utility>
#include <vector>

#include "common/numerics.h"
#include "conv/conv_relu_pool.h"
#include "kernel_test.h"

namespace pyseqnet {
extern const ConvReluPoolCpuKernel conv_relu_pool_reference_forward, conv_relu_pool_reference_input_gradient,
    conv_relu_pool_reference_weight_gradient, conv_relu_pool_reference_bias_gradient;
}

namespace {
using namespace pyseqnet;

constexpr DType dtypes[] = {DType::f32, DType::bf16, DType::f16};
constexpr ConvPass passes[] = {ConvPass::forward, ConvPass::input_gradient, ConvPass::weight_gradient,
                               ConvPass::bias_gradient};

// Exactly as large as its tensor, so that a sanitizer sees every access beyond it.
using Bytes = std::vector<std::byte>;

Bytes integers(int64_t count, DType t, int64_t most, Random& random) {
  Bytes bytes(size_t(count * bytes_of(t)));
  for (int64_t i = 0; i < count; i++) write(bytes.data(), t, i, double(uniform(random, -most, most)));
  return bytes;
}

struct Output {
  static constexpr size_t guard = 256;
  static constexpr std::byte guard_byte{0x5a};
  Bytes bytes;
  explicit Output(int64_t size) : bytes(2 * guard + size_t(size), guard_byte) {
    std::fill(bytes.begin() + guard, bytes.end() - guard, std::byte{0xff});
  }
  std::byte* data() { return bytes.data() + guard; }
  bool guards_hold() const {
    for (size_t i = 0; i < guard; i++)
      if (bytes[i] != guard_byte || bytes[bytes.size() - 1 - i] != guard_byte) return false;
    return true;
  }
};

struct Report {
  int64_t runs = 0, failures = 0;
  void result(const char* fault, ConvPass pass, const char* kernel, const ConvReluPoolProblem& p) {
    runs++;
    if (fault && failures++ < 10)
      std::printf("FAILED %s %s: %s: %s\n", fused_operation_of(pass), kernel, describe(p).c_str(), fault);
  }
};

const ConvReluPoolCpuKernel& oracle(ConvPass pass) {
  return pass == ConvPass::forward           ? conv_relu_pool_reference_forward
         : pass == ConvPass::input_gradient  ? conv_relu_pool_reference_input_gradient
         : pass == ConvPass::weight_gradient ? conv_relu_pool_reference_weight_gradient
                                             : conv_relu_pool_reference_bias_gradient;
}

// Sums of gradients in 16 bits are rounded once more where a kernel stores what others keep in float: only
// windows that do not overlap, whose pixels have one gradient each, are exact everywhere.
bool exact(ConvPass pass, const ConvReluPoolProblem& p) {
  return pass == ConvPass::forward || p.conv.dtype == DType::f32 || p.disjoint();
}

void check(Report& report, const ConvReluPoolProblem& p, bool with_bias, Random& random) {
  const ConvProblem& c = p.conv;
  const int64_t pixels = c.N * c.C * c.H * c.W, outputs = c.N * c.K * p.U * p.V;
  const int64_t filters = c.K * c.group_channels() * c.R * c.S, tap_bytes = p.wide_arg() ? 4 : 1;
  const Bytes x = integers(pixels, c.dtype, 2, random), w = integers(filters, c.dtype, 1, random);
  const Bytes b = integers(c.K, c.dtype, 2, random), gy = integers(outputs, c.dtype, 1, random);
  Bytes kept(size_t(outputs * (p.pooled ? tap_bytes : bytes_of(c.dtype))));
  for (int64_t i = 0; i < outputs; i++) {
    const int64_t tap = uniform(random, 0, p.closed());
    if (!p.pooled)
      write(kept.data(), c.dtype, i, double(uniform(random, -1, 1)));
    else if (p.wide_arg())
      reinterpret_cast<int32_t*>(kept.data())[i] = int32_t(tap);
    else
      reinterpret_cast<uint8_t*>(kept.data())[i] = uint8_t(tap);
  }
  for (ConvPass pass : passes) {
    const bool forward = pass == ConvPass::forward, args = forward && p.pooled && p.with_arg;
    const int64_t size = (forward                             ? outputs
                          : pass == ConvPass::input_gradient  ? pixels
                          : pass == ConvPass::weight_gradient ? filters
                                                              : c.K) *
                         bytes_of(c.dtype);
    auto tensors = [&](Output& result, Output& arg) {
      ConvReluPoolTensors t;
      t.x = x.data(), t.w = w.data(), t.gy = gy.data();
      if (with_bias) t.bias = b.data();
      t.arg = forward ? (args ? arg.data() : nullptr) : const_cast<std::byte*>(kept.data());
      if (forward) t.y = result.data();
      if (pass == ConvPass::input_gradient) t.gx = result.data();
      if (pass == ConvPass::weight_gradient) t.gw = result.data();
      if (pass == ConvPass::bias_gradient) t.gb = result.data();
      return t;
    };
    Output want(size), want_arg(args ? outputs * tap_bytes : 0);
    execute(oracle(pass), p, tensors(want, want_arg), nullptr);
    const auto table = conv_relu_pool_cpu_table(pass);
    for (int k = 0; k < table.count; k++) {
      const ConvReluPoolCpuKernel& kernel = *table.kernels[k];
      if (kernel.isa > detected_isa() || kernel.refuses(p)) continue;
      Output first(size), first_arg(args ? outputs * tap_bytes : 0);
      for (Random* cuts : {static_cast<Random*>(nullptr), &random}) {
        Output got(size), got_arg(args ? outputs * tap_bytes : 0);
        execute(kernel, p, tensors(got, got_arg), cuts);
        const char* fault = nullptr;
        if (!got.guards_hold() || !got_arg.guards_hold()) fault = "wrote outside its output";
        if (!fault && exact(pass, p) && got.bytes != want.bytes) fault = "wrong bits";
        if (!fault && got_arg.bytes != want_arg.bytes) fault = "wrong winners";
        if (!fault && cuts && got.bytes != first.bytes) fault = "differs when the work is cut";
        if (!cuts) first = got;
        report.result(fault, pass, kernel.name, p);
      }
    }
  }
}

ConvReluPoolProblem problem(int64_t N, int64_t C, int64_t H, int64_t W, int64_t K, int64_t R, int64_t S,
                            int64_t pool_h, int64_t pool_w, int64_t pool_stride_h, int64_t pool_stride_w,
                            int64_t pad, int64_t stride = 1, int64_t dilation = 1, int64_t groups = 1) {
  ConvReluPoolProblem p;
  ConvProblem& c = p.conv;
  c.N = N, c.C = C, c.H = H, c.W = W, c.K = K, c.R = R, c.S = S, c.groups = groups;
  c.pad_h = c.pad_w = pad, c.stride_h = c.stride_w = stride, c.dilation_h = c.dilation_w = dilation;
  c.P = (H + 2 * pad - dilation * (R - 1) - 1) / stride + 1;
  c.Q = (W + 2 * pad - dilation * (S - 1) - 1) / stride + 1;
  p.pool_h = pool_h, p.pool_w = pool_w, p.pool_stride_h = pool_stride_h, p.pool_stride_w = pool_stride_w;
  p.pooled = pool_h != 1 || pool_w != 1 || pool_stride_h != 1 || pool_stride_w != 1;
  p.U = (c.P - pool_h) / pool_stride_h + 1, p.V = (c.Q - pool_w) / pool_stride_w + 1;
  return p;
}

void check_layouts(Report& report, ConvReluPoolProblem p, Random& random) {
  for (DType dtype : dtypes)
    for (Layout layout : {Layout::nchw, Layout::nhwc}) {
      p.conv.dtype = dtype, p.conv.layout = layout;
      p.conv.filter_layout = uniform(random, 0, 1) ? Layout::nchw : Layout::nhwc;
      p.with_arg = uniform(random, 0, 3) > 0;
      check(report, p, uniform(random, 0, 1), random);
    }
}

void check_edges(Report& report) {
  Random random(5);
  const ConvReluPoolProblem edges[] = {
      problem(1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0),              // one element
      problem(0, 3, 8, 8, 4, 3, 3, 2, 2, 2, 2, 1),              // no image
      problem(2, 1, 28, 28, 32, 5, 5, 2, 2, 2, 2, 2),           // a first layer
      problem(2, 3, 32, 32, 33, 3, 3, 2, 2, 2, 2, 1),           // colours, one filter more than a panel
      problem(2, 32, 14, 14, 64, 3, 3, 2, 2, 2, 2, 1),          // whole vectors of channels
      problem(1, 17, 9, 13, 5, 5, 5, 2, 2, 2, 2, 2),            // one channel more than a vector
      problem(2, 3, 13, 17, 6, 3, 3, 3, 3, 2, 2, 1),            // windows that overlap
      problem(2, 3, 13, 17, 6, 3, 3, 3, 3, 3, 3, 0),            // odd windows
      problem(1, 2, 17, 19, 20, 3, 3, 2, 2, 3, 4, 1),           // gaps between windows
      problem(2, 2, 8, 9, 3, 3, 3, 1, 1, 2, 2, 1),              // every second pixel
      problem(1, 2, 20, 20, 3, 3, 3, 16, 16, 1, 1, 1),          // more than 255 taps
      problem(2, 3, 21, 23, 9, 3, 3, 2, 2, 2, 2, 2, 2),         // stride
      problem(2, 3, 15, 19, 9, 3, 2, 2, 2, 2, 2, 1, 1, 2),      // dilation
      problem(1, 2, 2, 2, 3, 3, 3, 2, 2, 2, 2, 9),              // more padding than image
      problem(2, 34, 9, 9, 40, 3, 3, 2, 2, 2, 2, 1, 1, 1, 2),   // groups
      problem(2, 19, 9, 9, 19, 3, 3, 2, 2, 2, 2, 1, 1, 1, 19),  // depthwise
      problem(1, 1, 4, 700, 17, 3, 3, 2, 2, 2, 2, 1),           // a wide image
      problem(2, 3, 11, 40, 7, 3, 3, 1, 1, 1, 1, 1),            // no pool
  };
  for (const ConvReluPoolProblem& p : edges) check_layouts(report, p, random);
}

void check_random(Report& report, int count) {
  Random random(11);
  for (int i = 0; i < count; i++) {
    const int64_t groups = uniform(random, 0, 3) ? 1 : 2,
                  channels = uniform(random, 1, uniform(random, 0, 1) ? 4 : 36);
    const int64_t R = uniform(random, 1, 5), S = uniform(random, 0, 1) ? R : uniform(random, 1, 5);
    const int64_t window = uniform(random, 1, 3),
                  step = uniform(random, 0, 2) ? window : uniform(random, 1, 4);
    const int64_t stride = uniform(random, 0, 3) ? 1 : uniform(random, 1, 3);
    check_layouts(
        report,
        problem(uniform(random, 1, 3), groups * channels, R + window * stride + uniform(random, 0, 12),
                S + window * stride + uniform(random, 0, 30), groups * uniform(random, 1, 40), R, S, window,
                window, step, step, uniform(random, 0, 2), stride, 1, groups),
        random);
  }
}

}  // namespace

int main(int argc, char** argv) {
  setenv("PYSEQNET_WINOGRAD", "0", 1);
  const int count = argc > 1 ? std::atoi(argv[1]) : 25;
  int64_t failures = 0;
  auto print = [&](const Report& report, const char* what) {
    std::printf("conv_relu_pool %-6s %6lld runs%s\n", what, (long long)report.runs,
                report.failures ? "  FAILED" : "");
    failures += report.failures;
  };
  Report edges, random;
  check_edges(edges);
  print(edges, "edges");
  check_random(random, count);
  print(random, "random");
  return failures ? 1 : 0;
}
