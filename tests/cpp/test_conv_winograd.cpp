// What is special about the Winograd kernels, beside being right (test_conv.cpp): their accuracy on problems
// of the size they are made for, in every order of work that they have; that the bits do not depend on how
// the work is cut; their switch; what they refuse; and how far a NaN travels.
//
// The formula is computed in double here, for every element of small results and for a few thousand elements
// of large ones.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "conv/conv.h"
#include "kernel_test.h"

namespace {
using namespace pyseqnet;

constexpr double RMS_BOUND = 2e-6;      // relative to the root mean square of the result
constexpr double LARGEST_BOUND = 5e-6;  // relative to the largest result
constexpr ConvPass passes[] = {ConvPass::forward, ConvPass::input_gradient, ConvPass::weight_gradient};

int failures = 0;
void expect(bool holds, const std::string& what) {
  if (holds) return;
  failures++;
  std::printf("FAILED %s\n", what.c_str());
}

std::vector<const ConvCpuKernel*> winograd_kernels(ConvPass pass) {
  std::vector<const ConvCpuKernel*> found;
  const auto table = conv_cpu_table(pass);
  for (int i = 0; i < table.count; i++)
    if (!std::strncmp(table.kernels[i]->name, "winograd_", 9) && table.kernels[i]->isa <= detected_isa())
      found.push_back(table.kernels[i]);
  return found;
}

struct Data {
  ConvProblem p;
  std::vector<float> x, w, bias, gy;
  Data(const ConvProblem& p, float mean, uint64_t seed) : p(p) {
    std::mt19937_64 random(seed);
    std::normal_distribution<float> normal;
    auto fill = [&](std::vector<float>& v, int64_t count, float scale, float shift) {
      v.resize(size_t(count));
      for (float& e : v) e = scale * normal(random) + shift;
    };
    fill(x, p.N * p.C * p.H * p.W, 1, mean);
    fill(w, p.K * p.C * 9, 1 / std::sqrt(9 * float(p.C)), 0);
    fill(bias, p.K, 1, 0);
    fill(gy, p.N * p.K * p.P * p.Q, 1, 0);
  }
  int64_t result_size(ConvPass pass) const {
    return int64_t(pass == ConvPass::forward          ? gy.size()
                   : pass == ConvPass::input_gradient ? x.size()
                                                      : w.size());
  }
  ConvTensors tensors(ConvPass pass, float* result) const {
    ConvTensors t;
    t.x = x.data(), t.w = w.data(), t.bias = bias.data(), t.gy = gy.data();
    (pass == ConvPass::forward ? t.y : pass == ConvPass::input_gradient ? t.gx : t.gw) = result;
    return t;
  }

  // The sum of conv.h for the element at offset i of the result.
  double exact(ConvPass pass, int64_t i) const {
    const Strides xs = p.x_strides(), ys = p.y_strides(), ws = p.w_strides();
    auto index = [&](const Strides& s, int64_t C, int64_t H, int64_t W) {
      struct {
        int64_t n, c, h, w;
      } at{i / s.n, i / s.c % C, i / s.h % H, i / s.w % W};
      return at;
    };
    double sum = 0;
    if (pass == ConvPass::weight_gradient) {
      const auto at = index(ws, p.C, 3, 3);
      for (int64_t n = 0; n < p.N; n++)
        for (int64_t row = 0; row < p.P; row++)
          for (int64_t column = 0; column < p.Q; column++) {
            const int64_t h = row + at.h - p.pad_h, v = column + at.w - p.pad_w;
            if (h < 0 || h >= p.H || v < 0 || v >= p.W) continue;
            sum += double(gy[size_t(n * ys.n + at.n * ys.c + row * ys.h + column * ys.w)]) *
                   double(x[size_t(n * xs.n + at.c * xs.c + h * xs.h + v * xs.w)]);
          }
      return sum;
    }
    const bool forward = pass == ConvPass::forward;
    const auto at = forward ? index(ys, p.K, p.P, p.Q) : index(xs, p.C, p.H, p.W);
    const std::vector<float>& from = forward ? x : gy;
    const Strides& fs = forward ? xs : ys;
    if (forward) sum = bias[size_t(at.c)];
    for (int64_t r = 0; r < 3; r++)
      for (int64_t s = 0; s < 3; s++) {
        const int64_t h = forward ? at.h + r - p.pad_h : at.h + p.pad_h - r;
        const int64_t v = forward ? at.w + s - p.pad_w : at.w + p.pad_w - s;
        if (h < 0 || h >= (forward ? p.H : p.P) || v < 0 || v >= (forward ? p.W : p.Q)) continue;
        for (int64_t c = 0; c < (forward ? p.C : p.K); c++)
          sum +=
              double(from[size_t(at.n * fs.n + c * fs.c + h * fs.h + v * fs.w)]) *
              double(
                  w[size_t((forward ? at.c : c) * ws.n + (forward ? c : at.c) * ws.c + r * ws.h + s * ws.w)]);
      }
    return sum;
  }
};

// Each phase in `ranges` ranges, the last first, each with poisoned scratch; the result starts as NaN.
std::vector<float> run(const ConvCpuKernel& kernel, const Data& d, ConvPass pass, int64_t ranges) {
  std::vector<float> result(size_t(d.result_size(pass)), NAN);
  const ConvTensors t = d.tensors(pass, result.data());
  const WorkPlan plan = kernel.plan(d.p);
  Workspace shared(plan.shared_bytes);
  for (int phase = 0; phase < plan.phases; phase++) {
    const int64_t items = plan.phase[phase].items;
    for (int64_t i = ranges; i-- > 0;) {
      const int64_t begin = items * i / ranges, end = items * (i + 1) / ranges;
      if (begin == end) continue;
      Workspace scratch(plan.thread_bytes);
      kernel.run(d.p, t, {phase, begin, end, shared.data(), scratch.data()});
    }
  }
  return result;
}

struct Case {
  const char* why;
  int64_t N, C, H, W, K, pad_h, pad_w, more_h, more_w;  // more_*: padding after the end
  float mean;
};
// Together they take each order of work in each pass (AVX-512 and AVX2 choose alike).
constexpr Case cases[] = {
    {"many tiles", 2, 64, 28, 28, 64, 1, 1, 1, 1, 0},
    {"large mean", 2, 64, 28, 28, 64, 1, 1, 1, 1, 10},
    {"very large mean", 2, 64, 28, 28, 64, 1, 1, 1, 1, 1000},
    {"many channels", 1, 512, 14, 14, 512, 1, 1, 1, 1, 0},
    {"many channels, small images", 8, 512, 7, 7, 512, 1, 1, 1, 1, 0},
    {"many channels, large mean", 2, 512, 7, 7, 512, 1, 1, 1, 1, 10},
    {"many channels and tiles", 4, 320, 120, 50, 300, 1, 1, 1, 1, 0},
    {"large filters, more than one sum of them", 32, 256, 14, 14, 256, 1, 1, 1, 1, 0},
    {"long sum of the weight gradient", 4, 48, 64, 64, 40, 1, 1, 1, 1, 0},
    {"long rows", 1, 32, 9, 300, 33, 1, 1, 1, 1, 0},
    {"odd channels, no padding", 3, 45, 19, 17, 71, 0, 0, 0, 0, 0},
    {"full padding", 3, 71, 10, 11, 45, 2, 2, 2, 2, 0},
    {"padding on one side", 2, 40, 15, 16, 40, 2, 0, 0, 2, 0},
    {"padding on the other side", 2, 40, 15, 16, 40, 0, 2, 1, 0, 0},
    {"padding wider than the filter", 2, 40, 12, 12, 40, 3, 5, 4, 3, 0},
};

ConvProblem problem(const Case& c, Layout layout, Layout filter_layout) {
  ConvProblem p;
  p.layout = layout, p.filter_layout = filter_layout;
  p.N = c.N, p.C = c.C, p.H = c.H, p.W = c.W, p.K = c.K, p.R = p.S = 3;
  p.pad_h = c.pad_h, p.pad_w = c.pad_w;
  p.P = c.H + c.pad_h + c.more_h - 2, p.Q = c.W + c.pad_w + c.more_w - 2;
  return p;
}

void check_accuracy(const Case& c, Layout layout, Layout filter_layout) {
  constexpr int64_t sampled = 3000;
  constexpr double all_products = 2e7;
  const Data d(problem(c, layout, filter_layout), c.mean, 11);
  for (ConvPass pass : passes) {
    const int64_t count = d.result_size(pass);
    const double depth = double(pass == ConvPass::forward          ? 9 * c.C
                                : pass == ConvPass::input_gradient ? 9 * c.K
                                                                   : c.N * d.p.P * d.p.Q);
    // An odd step visits all lanes, taps and places in a tile.
    const int64_t step = double(count) * depth < all_products ? 1 : std::max<int64_t>(1, count / sampled | 1);
    std::vector<double> exact;
    for (int64_t i = 0; i < count; i += step) exact.push_back(d.exact(pass, i));
    for (const ConvCpuKernel* kernel : winograd_kernels(pass)) {
      const std::string name = std::string(operation_of(pass)) + " " + kernel->name + ", " + c.why + ", " +
                               describe(d.p) + ", filters " + name_of(filter_layout);
      if (const char* why = kernel->refuses(d.p)) {
        expect(false, name + ": refused: " + why);
        continue;
      }
      const std::vector<float> got = run(*kernel, d, pass, 1);
      double squares = 0, error_squares = 0, largest = 0, largest_error = 0;
      for (size_t i = 0; i < exact.size(); i++) {
        const double error = double(got[i * size_t(step)]) - exact[i];
        squares += exact[i] * exact[i], error_squares += error * error;
        largest = std::max(largest, std::fabs(exact[i]));
        largest_error = std::isnan(error) ? INFINITY : std::max(largest_error, std::fabs(error));
      }
      const double rms = std::sqrt(error_squares / squares), most = largest_error / largest;
      std::printf("%-20s %-15s rms %.1e largest %.1e  %s\n", operation_of(pass), kernel->name, rms, most,
                  c.why);
      expect(rms <= RMS_BOUND && most <= LARGEST_BOUND, name + ": inaccurate");
      expect(std::none_of(got.begin(), got.end(), [](float v) { return std::isnan(v); }),
             name + ": NaN left");
      const std::vector<float> cut = run(*kernel, d, pass, kernel->plan(d.p).phase[0].items);
      expect(!std::memcmp(got.data(), cut.data(), got.size() * sizeof(float)),
             name + ": depends on how the work is cut");
    }
  }
}

void check_refusals() {
  const ConvProblem fits = problem(cases[0], Layout::nchw, Layout::nchw);
  for (ConvPass pass : passes)
    for (const ConvCpuKernel* kernel : winograd_kernels(pass)) {
      const std::string name = std::string(operation_of(pass)) + " " + kernel->name;
      auto refuses = [&](const char* what, auto change) {
        ConvProblem p = fits;
        change(p);
        expect(kernel->refuses(p) != accepted, name + " takes " + what);
      };
      refuses("5x5", [](ConvProblem& p) { p.R = p.S = 5; });
      refuses("3x1", [](ConvProblem& p) { p.S = 1; });
      refuses("stride 2", [](ConvProblem& p) { p.stride_h = 2; });
      refuses("dilation 2", [](ConvProblem& p) { p.dilation_w = 2; });
      refuses("two groups", [](ConvProblem& p) { p.groups = 2; });
      refuses("float64", [](ConvProblem& p) { p.dtype = DType::f64; });
      refuses("no image", [](ConvProblem& p) { p.N = 0; });
      refuses("no input pixel", [](ConvProblem& p) { p.H = 0; });
      refuses("no output pixel", [](ConvProblem& p) { p.Q = 0; });
      refuses("one input channel", [](ConvProblem& p) { p.C = 1; });
      refuses("one filter", [](ConvProblem& p) { p.K = 1; });
      refuses("one pixel", [](ConvProblem& p) { p.N = p.H = p.W = p.P = p.Q = 1; });
      setenv("PYSEQNET_WINOGRAD", "0", 1);
      refuses("a problem while switched off", [](ConvProblem&) {});
      setenv("PYSEQNET_WINOGRAD", "1", 1);
      expect(kernel->refuses(fits) == accepted, name + " refuses while switched on");
      unsetenv("PYSEQNET_WINOGRAD");
      expect(kernel->refuses(fits) == accepted, name + " refuses by default");
    }
}

// An infinite pixel spoils the tiles that read it; every other output keeps its bits.
void check_infinity() {
  constexpr int64_t farthest = 4, channel = 5, row = 13, column = 14;
  const Case c{"infinite pixel", 1, 32, 28, 28, 32, 1, 1, 1, 1, 0};
  const Data clean(problem(c, Layout::nchw, Layout::nchw), 0, 5);
  Data spoilt = clean;
  spoilt.x[size_t((channel * c.H + row) * c.W + column)] = INFINITY;
  for (const ConvCpuKernel* kernel : winograd_kernels(ConvPass::forward)) {
    const std::vector<float> a = run(*kernel, clean, ConvPass::forward, 1);
    const std::vector<float> b = run(*kernel, spoilt, ConvPass::forward, 1);
    bool far_kept = true, near_spoilt = true;
    for (int64_t i = 0; i < int64_t(a.size()); i++) {
      const int64_t h = std::abs(i / c.W % c.H - row), w = std::abs(i % c.W - column);
      if (h > farthest || w > farthest) far_kept &= a[size_t(i)] == b[size_t(i)];
      if (h <= 1 && w <= 1) near_spoilt &= !std::isfinite(b[size_t(i)]);
    }
    expect(far_kept, std::string(kernel->name) + ": an infinite pixel travels farther than its tiles");
    expect(near_spoilt, std::string(kernel->name) + ": an infinite pixel is lost");
  }
}

}  // namespace

int main() {
  for (const Case& c : cases) check_accuracy(c, Layout::nchw, Layout::nchw);
  for (const Case& c : cases)
    if (c.C * c.K * c.N < 20000) {
      check_accuracy(c, Layout::nhwc, Layout::nhwc);
      check_accuracy(c, Layout::nhwc, Layout::nchw);
      check_accuracy(c, Layout::nchw, Layout::nhwc);
    }
  check_refusals();
  check_infinity();
  if (failures) std::printf("%d failures\n", failures);
  return failures ? 1 : 0;
}
