// Every generic CUDA kernel of convolution against the oracle: forward and all gradients, within the rounding
// of their sums. Its kernels: implicit_gemm, sum_parts and the bias and depthwise kernels.
// clang-format off
// Sources: conv/conv_gemm_generic.cu conv/conv_bias_generic.cu conv/conv_depthwise_generic.cu conv/conv_reference.cpp
// clang-format on
#include "conv_problems.h"

namespace pyseqnet {
extern const ConvCpuKernel conv_reference_forward, conv_reference_input_gradient,
    conv_reference_weight_gradient, conv_reference_bias_gradient;
extern const ConvCudaKernel conv_gemm_forward_cuda, conv_gemm_input_gradient_cuda,
    conv_gemm_weight_gradient_cuda, conv_bias_gradient_cuda, conv_depthwise_forward_cuda,
    conv_depthwise_input_gradient_cuda, conv_depthwise_weight_gradient_cuda;
}  // namespace pyseqnet

using namespace pyseqnet;
using namespace pyseqnet::testing;

namespace {

// Sums of products of deviates of order 1, in float32 (in double for float64): each of `terms` additions
// rounds a partial sum of at most about sqrt(terms), which random signs keep below terms roundings of 1. One
// rounding to the storage type follows, to either side where the sum lies close to a tie.
std::string wrong(const Tensor& got, const Tensor& want, DType dtype, int64_t terms) {
  const double unit = dtype == DType::f64 ? 0x1p-52 : 0x1p-24;  // in float64 the oracle rounds as often
  return difference(got, want, 2 * unit * double(terms + 8), epsilon_of(dtype));
}

void check_problem(Suite& suite, const ConvProblem& p, bool with_bias) {
  if (!suite.begin(label(p, with_bias))) return;
  const Kind kind = kind_of(p.dtype);
  const int64_t images = p.N * p.C * p.H * p.W, outputs = p.N * p.K * p.P * p.Q;
  const int64_t filters = p.K * p.group_channels() * p.R * p.S;
  Tensor x(kind, images, "x"), w(kind, filters, "w"), bias(kind, p.K, "bias"), gy(kind, outputs, "gy");
  Tensor y(kind, outputs, "y"), gx(kind, images, "gx"), gw(kind, filters, "gw"), gb(kind, p.K, "gb");
  Tensor want_y(kind, outputs, "want y"), want_gx(kind, images, "want gx");
  Tensor want_gw(kind, filters, "want gw"), want_gb(kind, p.K, "want gb");
  for (Tensor* t : {&x, &w, &bias, &gy}) fill(*t, suite.random);

  ConvTensors host, device;
  host.x = x.host(), host.w = w.host(), host.bias = with_bias ? bias.host() : nullptr, host.gy = gy.host();
  host.y = want_y.host(), host.gx = want_gx.host(), host.gw = want_gw.host(), host.gb = want_gb.host();
  device.x = x.device(), device.w = w.device(), device.bias = with_bias ? bias.device() : nullptr;
  device.gy = gy.device();
  device.y = y.device(), device.gx = gx.device(), device.gw = gw.device(), device.gb = gb.device();
  run_cpu(conv_reference_forward, p, host);
  run_cpu(conv_reference_input_gradient, p, host);
  run_cpu(conv_reference_weight_gradient, p, host);
  run_cpu(conv_reference_bias_gradient, p, host);

  const auto check = [&](const char* pass, const ConvCudaKernel& kernel, Tensor& got, const Tensor& want,
                         int64_t terms) {
    const std::string what = std::string(pass) + " " + kernel.name;
    if (Refusal why = kernel.refuses(p)) return suite.fail(what, std::string("refused: ") + why);
    suite.check(
        what, {&got}, [&] { return run_cuda(kernel, p, device); },
        [&] { return wrong(got, want, p.dtype, terms); });
  };
  const int64_t taps = p.R * p.S, pixels = p.N * p.P * p.Q;
  // A group is a matrix product of its own, of whole tiles. The simulator pays for every one of their
  // threads.
  constexpr int64_t most_simulated = 1000;
  if (!device_memory::simulated || p.groups * pixels < most_simulated || !p.depthwise()) {
    check("forward", conv_gemm_forward_cuda, y, want_y, p.group_channels() * taps + 1);
    check("input gradient", conv_gemm_input_gradient_cuda, gx, want_gx, p.group_filters() * taps);
    check("weight gradient", conv_gemm_weight_gradient_cuda, gw, want_gw, pixels);
  }
  check("bias gradient", conv_bias_gradient_cuda, gb, want_gb, pixels);
  if (p.depthwise()) {
    check("forward", conv_depthwise_forward_cuda, y, want_y, taps + 1);
    check("input gradient", conv_depthwise_input_gradient_cuda, gx, want_gx, taps);
    check("weight gradient", conv_depthwise_weight_gradient_cuda, gw, want_gw, pixels);
  } else {
    for (const ConvCudaKernel* kernel : {&conv_depthwise_forward_cuda, &conv_depthwise_input_gradient_cuda,
                                         &conv_depthwise_weight_gradient_cuda})
      if (!kernel->refuses(p)) suite.fail(kernel->name, "takes what is not depthwise");
  }
}

// Each in both layouts and in three of the dtypes. The tile is 64 (32) rows by 128 columns, eight depths a
// step.
void check_edges(Suite& suite) {
  constexpr int64_t huge = int64_t{1} << 40;
  const ConvProblem edges[] = {
      problem(1, 1, {1, 1}, 1, {1, 1}, {1, 1}, {0, 0}),                // one element
      problem(0, 3, {4, 4}, 2, {3, 3}, {1, 1}, {1, 1}),                // no images: gw, gb are 0
      problem(2, 0, {4, 4}, 3, {3, 3}, {1, 1}, {1, 1}),                // no channels: y is the bias
      problem(2, 3, {4, 4}, 0, {3, 3}, {1, 1}, {1, 1}),                // no filters: gx is 0
      problem(1, 2, {2, 2}, 3, {3, 3}, {1, 1}, {0, 0}),                // no outputs
      problem(2, 2, {0, 3}, 2, {1, 2}, {1, 1}, {1, 1}),                // no pixels but padding
      problem(2, 8, {8, 8}, 64, {1, 1}, {1, 1}, {0, 0}),               // whole tiles
      problem(1, 9, {5, 5}, 67, {3, 3}, {1, 1}, {1, 1}),               // a row tile and a tail
      problem(2, 3, {12, 11}, 5, {3, 3}, {1, 1}, {1, 1}),              // column tiles and a tail
      problem(1, 5, {9, 7}, 6, {3, 3}, {2, 2}, {1, 1}),                // four residues
      problem(2, 3, {10, 11}, 4, {2, 5}, {3, 1}, {0, 2}),              // its own shape, lines nobody reads
      problem(1, 4, {9, 9}, 3, {3, 3}, {2, 2}, {2, 2}, {2, 2}),        // residues without taps
      problem(1, 2, {11, 13}, 3, {3, 2}, {2, 3}, {3, 1}, {3, 2}),      // stride and dilation, coprime
      problem(2, 2, {16, 16}, 9, {4, 4}, {4, 4}, {0, 0}),              // patches
      problem(2, 3, {5, 4}, 4, {1, 1}, {3, 3}, {0, 0}),                // stride beyond the filter
      problem(2, 3, {1, 40}, 7, {1, 5}, {1, 2}, {0, 2}),               // one dimension
      problem(3, 12, {6, 5}, 6, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 3),    // groups
      problem(2, 6, {6, 7}, 6, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 6),     // depthwise
      problem(2, 35, {5, 9}, 35, {3, 3}, {2, 2}, {1, 1}, {1, 1}, 35),  // strided, more than a warp
      problem(1, 3, {3, 60}, 3, {2, 5}, {1, 3}, {1, 2}, {2, 1}, 3),    // ten taps: two blocks of them
      problem(2, 4, {1, 33}, 4, {1, 4}, {1, 1}, {0, 2}, {1, 2}, 4),    // one dimension
      problem(1, 4, {6, 6}, 8, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 4),     // two filters a channel: not depthwise
      sized(problem(1, 3, {6, 6}, 4, {3, 3}, {1, 1}, {0, 2}), 8, 5),   // padding on one side
      sized(problem(1, 2, {7, 7}, 2, {2, 2}, {2, 2}, {0, 1}, {1, 1}, 2), 4, 3),
      problem(1, 3, {9, 6}, 3, {3, 3}, {1, 2}, {1, 1}, {1, 1}, 3),        // depthwise, four lines and a tail
      problem(2, 2, {17, 5}, 2, {3, 3}, {2, 1}, {1, 0}, {1, 1}, 2),       // the same, every other line
      problem(1, 2, {9, 6}, 2, {5, 2}, {1, 1}, {2, 1}, {1, 1}, 2),        // the same, any filter
      problem(1, 5, {9, 10}, 5, {7, 7}, {1, 1}, {3, 3}, {1, 1}, 5),       // rows of taps, a tail of columns
      problem(2, 3, {1, 45}, 3, {1, 31}, {1, 1}, {0, 15}, {1, 1}, 3),     // a long filter
      problem(1, 2, {8, 9}, 2, {5, 4}, {2, 1}, {2, 3}, {2, 1}, 2),        // lines at a distance
      problem(1, 2, {5, 4}, 3, {3, 2}, {huge, huge}, {1, 0}),             // one output: the stride is idle
      problem(1, 2, {5, 4}, 2, {1, 1}, {1, 2}, {0, 0}, {huge, huge}, 2),  // one tap: the dilation is idle
  };
  int which = 0;
  for (ConvProblem p : edges)
    for (Layout layout : all_layouts) {
      which++;
      // The 16-bit types differ in their conversions only: they take turns.
      for (DType dtype : {DType::f32, DType::f64, which % 4 < 2 ? DType::bf16 : DType::f16}) {
        // Filters in the layout of the images, and now and then not.
        const Layout other = layout == Layout::nchw ? Layout::nhwc : Layout::nchw;
        p.layout = layout, p.dtype = dtype;
        p.filter_layout = (which + int(dtype)) % 3 ? layout : other;
        check_problem(suite, p, (which + int(dtype)) % 2);
      }
    }
}

// Gradients of many pixels, and few outputs with many terms: split over blocks, summed in a second kernel.
void check_split(Suite& suite) {
  const ConvProblem problems[] = {
      problem(3, 2, {20, 20}, 3, {3, 3}, {1, 1}, {1, 1}),
      problem(3, 3, {41, 37}, 3, {1, 1}, {1, 1}, {0, 0}, {1, 1}, 3),
      problem(1, 2, {1, 4500}, 2, {1, 3}, {1, 1}, {0, 1}, {1, 1}, 2),
      problem(1, 60, {6, 5}, 40, {3, 3}, {2, 1}, {1, 1}),  // three parts of y, by residue two and more of gx
      problem(2, 64, {3, 7}, 16, {2, 4}, {1, 1}, {0, 0}),  // parts of exactly one chunk of a sum
  };
  for (ConvProblem p : problems)
    for (Layout layout : all_layouts) {
      p.layout = p.filter_layout = layout;
      p.dtype = suite.random.any(all_dtypes);
      check_problem(suite, p, !p.depthwise());
    }
}

void check_random(Suite& suite) {
  Random& random = suite.random;
  for (int k = 0; k < suite.random_problems; k++) {
    ConvProblem p;
    p.dtype = random.any(all_dtypes), p.layout = random.any(all_layouts);
    p.filter_layout = random.any(all_layouts);
    p.N = random.in(1, 3), p.H = random.in(1, 12), p.W = random.in(1, 14);
    p.groups = random.chance(0.5) ? 1 : random.in(1, 4);
    const bool depthwise = random.chance(0.3);
    p.C = p.groups * (depthwise ? 1 : random.in(1, 6));
    p.K = p.groups * (depthwise ? 1 : random.chance(0.1) ? random.in(33, 70) : random.in(1, 9));
    p.R = random.in(1, 4), p.S = random.in(1, 4);
    p.stride_h = random.in(1, 3), p.stride_w = random.in(1, 3);
    p.dilation_h = random.in(1, 3), p.dilation_w = random.in(1, 3);
    p.pad_h = random.in(0, p.R), p.pad_w = random.in(0, p.S);
    p = with_outputs(p);
    // An output more or less at the end: 'same' padding, cropped and overhanging windows.
    if (random.chance(0.3)) p.P = random.in(p.P > 0 ? p.P - 1 : 0, p.P + 1);
    if (random.chance(0.3)) p.Q = random.in(p.Q > 0 ? p.Q - 1 : 0, p.Q + 1);
    check_problem(suite, p, random.chance(0.5));
  }
}

// Offsets beyond 32 bits. Real devices only.
void check_large(Suite& suite) {
  constexpr int64_t beyond = (int64_t{1} << 31) + 4099;
  for (int64_t groups : {int64_t{1}, int64_t{2}}) {
    ConvProblem p =
        problem(beyond / (2 * 64 * 64) + 1, 2, {64, 64}, 2, {1, 1}, {1, 1}, {0, 0}, {1, 1}, groups);
    p.dtype = DType::bf16;
    check_problem(suite, p, true);
  }
}

}  // namespace

int main(int argc, char** argv) {
  Suite suite(argc, argv);
  check_edges(suite);
  check_split(suite);
  check_random(suite);
  if (suite.large) check_large(suite);
  return suite.finish();
}
