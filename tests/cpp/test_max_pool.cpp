// Every CPU max-pooling kernel of every instruction set that this machine has, against the oracle, bit for
// bit: maxima, taps, indices and gradients; both layouts, all dtypes, with and without arg; edge shapes and
// random ones from fixed seeds; values with ties, -inf and NaN. The oracle itself is held against a window
// scanned from the definition.
//
// Gradients are small integers, whose sums are exact in any order, so they too must agree in every bit; a
// second run with random gradients bounds the rounding. Each run finds its output and its scratch filled
// with NaN and its output between guards; each problem is run again in randomly cut ranges.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <utility>
#include <vector>

#include "common/numerics.h"
#include "kernel_test.h"
#include "pool/max_pool.h"

namespace pyseqnet {
extern const MaxPoolCpuKernel max_pool_reference_forward, max_pool_reference_backward,
    max_pool_reference_indices;
}

namespace {
using namespace pyseqnet;

constexpr DType dtypes[] = {DType::f32, DType::bf16, DType::f16, DType::f64};

template <class T>
T pick(Random& random, std::initializer_list<T> choices) {
  return choices.begin()[uniform(random, 0, int64_t(choices.size()) - 1)];
}

// An input exactly as large as its tensor, so that a sanitizer sees every access beyond it.
using Bytes = std::vector<std::byte>;

// An output between guards, full of ones (NaN, or no tap).
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

// What an image is filled with.
enum class Values { spread, ties, minus_infinity, nan };

Bytes image(const MaxPoolProblem& p, Values values, Random& random) {
  const int64_t count = p.N * p.C * p.H * p.W;
  Bytes x(size_t(count * bytes_of(p.dtype)));
  for (int64_t i = 0; i < count; i++) {
    double v =
        values == Values::spread ? double(random() >> 11) * 0x1p-52 - 1.0 : double(uniform(random, -2, 2));
    if (v == 0 && uniform(random, 0, 1)) v = -0.0;  // equal to 0: whichever comes first wins
    if (values >= Values::minus_infinity && uniform(random, 0, 1)) v = -INFINITY;
    if (values == Values::nan && uniform(random, 0, 9) == 0) v = NAN;
    write(x.data(), p.dtype, i, v);
  }
  return x;
}
Bytes gradients(const MaxPoolProblem& p, bool integers, Random& random) {
  const int64_t count = p.N * p.C * p.P * p.Q;
  Bytes g(size_t(count * bytes_of(p.dtype)));
  for (int64_t i = 0; i < count; i++)
    write(g.data(), p.dtype, i,
          integers ? double(uniform(random, -3, 3)) : double(random() >> 11) * 0x1p-52 - 1.0);
  return g;
}

struct Report {
  int64_t runs = 0, failures = 0;
  void result(const char* fault, MaxPoolPass pass, const char* kernel, const MaxPoolProblem& p) {
    runs++;
    if (fault && failures++ < 10)
      std::printf("FAILED %s %s: %s: %s\n", operation_of(pass), kernel, describe(p).c_str(), fault);
  }
};

// One pass of one kernel, whole and cut, against the expected bytes of its outputs.
template <class Bind>
void compare(Report& report, MaxPoolPass pass, const MaxPoolCpuKernel& kernel, const MaxPoolProblem& p,
             std::vector<const Output*> expected, Random& random, Bind bind) {
  for (Random* cuts : {static_cast<Random*>(nullptr), &random}) {
    std::vector<Output> got;
    for (const Output* e : expected) got.emplace_back(int64_t(e->bytes.size() - 2 * Output::guard));
    MaxPoolTensors t;
    bind(t, got);
    execute(kernel, p, t, cuts);
    const char* fault = nullptr;
    for (size_t k = 0; k < got.size(); k++) {
      if (!got[k].guards_hold()) fault = "wrote outside its output";
      if (!fault && got[k].bytes != expected[k]->bytes)
        fault = cuts ? "differs when the work is cut" : "wrong bits";
    }
    report.result(fault, pass, kernel.name, p);
  }
}

// Random gradients: the sum of a pixel may round differently from the oracle's, by an ulp or so of each
// addition. All gradients are smaller than 1 and a pixel wins at most `windows` times.
void bound_rounding(Report& report, const MaxPoolCpuKernel& kernel, const MaxPoolProblem& p,
                    const Output& arg, Random& random) {
  const Bytes gy = gradients(p, false, random);
  const int64_t count = p.N * p.C * p.H * p.W;
  Output expected(count * bytes_of(p.dtype)), got(count * bytes_of(p.dtype));
  MaxPoolTensors t;
  t.gy = gy.data(), t.arg = const_cast<std::byte*>(arg.bytes.data() + Output::guard);
  t.gx = expected.data();
  execute(max_pool_reference_backward, p, t, nullptr);
  t.gx = got.data();
  execute(kernel, p, t, nullptr);
  const double unit = p.dtype == DType::bf16 ? 0x1p-8 : p.dtype == DType::f16 ? 0x1p-11 : 0x1p-24;
  const double windows = double(std::min(p.P, (p.R - 1) * p.dilation_h / p.stride_h + 1) *
                                std::min(p.Q, (p.S - 1) * p.dilation_w / p.stride_w + 1));
  const char* fault = nullptr;
  for (int64_t i = 0; i < count; i++) {
    const double e = read(expected.data(), p.dtype, i), g = read(got.data(), p.dtype, i);
    if (!(std::fabs(e - g) <= 2 * unit * std::fabs(e) + windows * windows * 0x1p-24)) fault = "sum is off";
  }
  report.result(fault, MaxPoolPass::backward, kernel.name, p);
}

void check(Report& report, MaxPoolProblem p, Values values, Random& random) {
  const Bytes x = image(p, values, random), gy = gradients(p, true, random);
  const int64_t windows = p.N * p.C * p.P * p.Q, pixels = p.N * p.C * p.H * p.W;
  Output y(windows * bytes_of(p.dtype)), arg(windows * p.arg_bytes()), gx(pixels * bytes_of(p.dtype)),
      indices(windows * 8);
  MaxPoolTensors t;
  t.x = x.data(), t.gy = gy.data(), t.y = y.data(), t.arg = arg.data(), t.gx = gx.data();
  t.indices = reinterpret_cast<int64_t*>(indices.data());
  p.with_arg = true;
  execute(max_pool_reference_forward, p, t, nullptr);
  execute(max_pool_reference_backward, p, t, nullptr);
  execute(max_pool_reference_indices, p, t, nullptr);

  for (MaxPoolPass pass : {MaxPoolPass::forward, MaxPoolPass::backward, MaxPoolPass::indices}) {
    const auto table = max_pool_cpu_table(pass);
    for (int k = 0; k < table.count; k++) {
      const MaxPoolCpuKernel& kernel = *table.kernels[k];
      if (kernel.isa > detected_isa() || kernel.refuses(p)) continue;
      if (pass == MaxPoolPass::forward) {
        compare(report, pass, kernel, p, {&y, &arg}, random,
                [&](MaxPoolTensors& t, std::vector<Output>& got) {
                  t.x = x.data(), t.y = got[0].data(), t.arg = got[1].data();
                });
        MaxPoolProblem inference = p;
        inference.with_arg = false;
        compare(report, pass, kernel, inference, {&y}, random,
                [&](MaxPoolTensors& t, std::vector<Output>& got) { t.x = x.data(), t.y = got[0].data(); });
      } else if (pass == MaxPoolPass::backward) {
        compare(report, pass, kernel, p, {&gx}, random, [&](MaxPoolTensors& t, std::vector<Output>& got) {
          t.gy = gy.data(), t.arg = arg.data(), t.gx = got[0].data();
        });
        bound_rounding(report, kernel, p, arg, random);
      } else {
        compare(report, pass, kernel, p, {&indices}, random,
                [&](MaxPoolTensors& t, std::vector<Output>& got) {
                  t.arg = arg.data(), t.indices = reinterpret_cast<int64_t*>(got[0].data());
                });
      }
    }
  }
}

// The oracle against the definition, on one float32 plane: the winner of a window is an element of it that no
// other element beats, the first of its kind (of NaN: the last).
void check_oracle(Report& report, MaxPoolProblem p, Values values, Random& random) {
  p.dtype = DType::f32, p.layout = Layout::nchw, p.N = p.C = 1;
  const Bytes x = image(p, values, random);
  Output y(p.P * p.Q * 4), arg(p.P * p.Q * p.arg_bytes()), indices(p.P * p.Q * 8);
  MaxPoolTensors t;
  t.x = x.data(), t.y = y.data(), t.arg = arg.data(), t.indices = reinterpret_cast<int64_t*>(indices.data());
  execute(max_pool_reference_forward, p, t, nullptr);
  execute(max_pool_reference_indices, p, t, nullptr);
  const float* pixel = reinterpret_cast<const float*>(x.data());
  const char* fault = nullptr;
  for (int64_t o = 0; o < p.P * p.Q; o++) {
    const int64_t h0 = o / p.Q * p.stride_h - p.pad_h, w0 = o % p.Q * p.stride_w - p.pad_w,
                  winner = t.indices[o];
    const float best = reinterpret_cast<const float*>(y.data())[o];
    bool inside = false, earlier = true, found = false;
    for (int64_t h = h0; h < h0 + p.R * p.dilation_h; h += p.dilation_h)
      for (int64_t w = w0; w < w0 + p.S * p.dilation_w; w += p.dilation_w) {
        if (h < 0 || h >= p.H || w < 0 || w >= p.W) continue;
        inside = true;
        const float v = pixel[h * p.W + w];
        if (h * p.W + w == winner) {
          found = true, earlier = false;
          if (std::memcmp(&v, &best, 4)) fault = "y is not the winner's value";
        } else if (std::isnan(best) ? !earlier && std::isnan(v)
                                    : std::isnan(v) || v > best || (earlier && v == best)) {
          fault = "another element should have won";
        }
      }
    if (inside ? !found : best != -INFINITY) fault = "the winner is not in the window";
  }
  report.result(fault, MaxPoolPass::forward, "reference", p);
}

// Output size as torch computes it; false where the window does not fit.
bool finish(MaxPoolProblem& p, bool ceil_mode) {
  auto size = [&](int64_t extent, int64_t taps, int64_t stride, int64_t pad, int64_t dilation) -> int64_t {
    const int64_t room = extent + 2 * pad - dilation * (taps - 1) - 1;
    if (room < 0) return 0;
    const int64_t n = (room + (ceil_mode ? stride - 1 : 0)) / stride + 1;
    return ceil_mode && (n - 1) * stride >= extent + pad ? n - 1 : n;
  };
  p.P = size(p.H, p.R, p.stride_h, p.pad_h, p.dilation_h);
  p.Q = size(p.W, p.S, p.stride_w, p.pad_w, p.dilation_w);
  return p.P > 0 && p.Q > 0;
}

MaxPoolProblem random_problem(Random& random, bool& ceil_mode) {
  for (;;) {
    MaxPoolProblem p;
    const bool one_dimensional = uniform(random, 0, 3) == 0, common = uniform(random, 0, 1) == 0;
    p.N = uniform(random, 1, 3);
    p.C = pick<int64_t>(random, {1, 2, 3, 8, 15, 16, 17, 33, 70});
    p.H = one_dimensional ? 1 : uniform(random, 1, 30);
    p.W = uniform(random, 1, one_dimensional ? 200 : 75);
    if (common) {
      p.R = one_dimensional ? 1 : uniform(random, 2, 3), p.S = one_dimensional ? uniform(random, 2, 3) : p.R;
      p.stride_h = p.stride_w = uniform(random, 1, 2);
    } else {
      p.R = one_dimensional ? 1 : pick<int64_t>(random, {1, 2, 3, 5, 7, 17});
      p.S = pick<int64_t>(random, {1, 2, 3, 4, 5, 16, 40});
      p.stride_h = uniform(random, 1, 4), p.stride_w = pick<int64_t>(random, {1, 2, 3, 4, 5, 6, 7, 8, 9, 20});
      p.dilation_h = uniform(random, 1, 3), p.dilation_w = uniform(random, 1, 3);
    }
    p.pad_h = uniform(random, 0, p.R / 2), p.pad_w = uniform(random, 0, p.S / 2);
    p.layout = uniform(random, 0, 1) ? Layout::nchw : Layout::nhwc;
    ceil_mode = uniform(random, 0, 1);
    if (finish(p, ceil_mode)) return p;
  }
}

struct Edge {
  const char* why;
  int64_t N, C, H, W, R, S, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  bool ceil_mode;
};
constexpr Edge edges[] = {
    {"no image", 0, 3, 8, 8, 2, 2, 2, 2, 0, 0, 1, 1, false},
    {"no channel", 2, 0, 8, 8, 2, 2, 2, 2, 0, 0, 1, 1, false},
    {"one pixel", 3, 5, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1, false},
    {"one pixel, padded window", 3, 5, 1, 1, 3, 3, 2, 2, 1, 1, 1, 1, false},
    {"whole vectors", 2, 16, 32, 32, 2, 2, 2, 2, 0, 0, 1, 1, false},
    {"last window half outside", 2, 3, 7, 7, 2, 2, 2, 2, 0, 0, 1, 1, true},
    {"ResNet's stem", 1, 2, 112, 112, 3, 3, 2, 2, 1, 1, 1, 1, false},
    {"same size", 1, 17, 28, 28, 3, 3, 1, 1, 1, 1, 1, 1, false},
    {"rows only", 2, 4, 9, 21, 2, 1, 2, 1, 0, 0, 1, 1, false},
    {"columns only", 2, 4, 9, 21, 1, 2, 1, 2, 0, 0, 1, 1, false},
    {"dilation wider than the image", 1, 20, 2, 2, 2, 2, 1, 1, 1, 1, 3, 3, false},
    {"pixels that no window covers", 2, 18, 11, 23, 1, 1, 3, 3, 0, 0, 1, 1, false},
    {"window as large as the image", 2, 19, 7, 9, 7, 9, 1, 1, 0, 0, 1, 1, false},
    {"maximum over time", 3, 6, 1, 77, 1, 77, 1, 77, 0, 0, 1, 1, false},
    {"more than 256 taps", 1, 5, 20, 40, 17, 17, 2, 3, 8, 8, 1, 1, false},
    {"more than 256 taps, few windows", 1, 18, 20, 40, 20, 40, 1, 1, 0, 0, 1, 1, false},
    {"more columns than a block of the row cache", 1, 1, 6, 3000, 5, 5, 1, 1, 2, 2, 1, 1, false},
    {"tall window over wide rows", 1, 1, 70, 700, 60, 4, 1, 3, 30, 2, 1, 1, false},
    {"large enough to be written past the cache", 1, 64, 130, 160, 3, 3, 2, 2, 1, 1, 1, 1, false},
    {"long sequence", 1, 2, 1, 5000, 1, 3, 1, 2, 0, 1, 1, 1, true},
};

void check_edges(Report& report) {
  Random random(3);
  for (const Edge& e : edges)
    for (DType dtype : dtypes)
      for (Layout layout : {Layout::nchw, Layout::nhwc}) {
        MaxPoolProblem p;
        p.dtype = dtype, p.layout = layout;
        p.N = e.N, p.C = e.C, p.H = e.H, p.W = e.W, p.R = e.R, p.S = e.S;
        p.stride_h = e.stride_h, p.stride_w = e.stride_w, p.pad_h = e.pad_h, p.pad_w = e.pad_w;
        p.dilation_h = e.dilation_h, p.dilation_w = e.dilation_w;
        if (!finish(p, e.ceil_mode)) {
          std::printf("FAILED edge case '%s' has no windows\n", e.why);
          report.failures++;
          continue;
        }
        const bool large = p.N * p.C * p.H * p.W > 1000000;
        for (Values values : {Values::spread, Values::ties, Values::minus_infinity, Values::nan})
          if (!large || (values == Values::spread && dtype == DType::f32)) check(report, p, values, random);
      }
}

}  // namespace

int main(int argc, char** argv) {
  const int count = argc > 1 ? std::atoi(argv[1]) : 150;
  int64_t failures = 0;
  auto print = [&](const Report& report, const char* what) {
    std::printf("max_pool %-6s %6lld runs%s\n", what, (long long)report.runs,
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
      bool ceil_mode = false;
      MaxPoolProblem p = random_problem(random, ceil_mode);
      p.dtype = dtype;
      const Values values = pick(random, {Values::spread, Values::ties, Values::minus_infinity, Values::nan});
      check(report, p, values, random);
      check_oracle(report, p, values, random);
    }
    print(report, name_of(dtype));
  }
  return failures ? 1 : 0;
}
