// The tensor-core convolutions of sm_80 against the oracle, within the rounding of their operands and sums.
// Its kernels: gathered_product, weight_product, pack_lines, sum_filter_parts.
// clang-format off
// Sources: conv/conv_sm80.cu conv/conv_pack.cu conv/conv_reference.cpp
// clang-format on
#include "conv_problems.h"

namespace pyseqnet {
extern const ConvCpuKernel conv_reference_forward, conv_reference_input_gradient,
    conv_reference_weight_gradient;
extern const ConvCudaKernel conv_sm80_forward_cuda, conv_sm80_input_gradient_cuda,
    conv_sm80_weight_gradient_cuda;
}  // namespace pyseqnet

using namespace pyseqnet;
using namespace pyseqnet::testing;

namespace {

constexpr DType tensor_core_dtypes[] = {DType::bf16, DType::f16, DType::f32};

// As in case_conv.cpp; operands of float32 are rounded to TF32 first, each term by at most twice 2^-11 of
// itself, which random signs keep within a few times the root of their number.
std::string wrong(const Tensor& got, const Tensor& want, DType dtype, int64_t terms) {
  double absolute = 2 * 0x1p-24 * double(terms + 8);
  if (dtype == DType::f32) absolute += 6 * 0x1p-11 * std::sqrt(double(terms)) + 0x1p-9;
  return difference(got, want, absolute, epsilon_of(dtype));
}

void check_problem(Suite& suite, ConvProblem p, bool with_bias, bool with_gradients = true) {
  p.allow_tf32 = true;
  if (!suite.begin(label(p, with_bias))) return;
  const Kind kind = kind_of(p.dtype);
  const int64_t images = p.N * p.C * p.H * p.W, outputs = p.N * p.K * p.P * p.Q;
  const int64_t filters = p.K * p.group_channels() * p.R * p.S;
  Tensor x(kind, images, "x"), w(kind, filters, "w"), bias(kind, p.K, "bias"), gy(kind, outputs, "gy");
  Tensor y(kind, outputs, "y"), gx(kind, images, "gx"), gw(kind, filters, "gw");
  Tensor want_y(kind, outputs, "want y"), want_gx(kind, images, "want gx"), want_gw(kind, filters, "want gw");
  for (Tensor* t : {&x, &w, &bias, &gy}) fill(*t, suite.random);
  ConvTensors host, device;
  host.x = x.host(), host.w = w.host(), host.bias = with_bias ? bias.host() : nullptr, host.gy = gy.host();
  host.y = want_y.host(), host.gx = want_gx.host(), host.gw = want_gw.host();
  device.x = x.device(), device.w = w.device(), device.bias = with_bias ? bias.device() : nullptr;
  device.gy = gy.device();
  device.y = y.device(), device.gx = gx.device(), device.gw = gw.device();
  run_cpu(conv_reference_forward, p, host);
  run_cpu(conv_reference_input_gradient, p, host);
  run_cpu(conv_reference_weight_gradient, p, host);
  const auto check = [&](const char* pass, const ConvCudaKernel& kernel, Tensor& got, const Tensor& want,
                         int64_t terms) {
    if (Refusal why = kernel.refuses(p)) return suite.fail(pass, std::string("refused: ") + why);
    suite.check(
        std::string(pass) + " " + kernel.name, {&got}, [&] { return run_cuda(kernel, p, device); },
        [&] { return wrong(got, want, p.dtype, terms); });
  };
  const int64_t taps = p.R * p.S;
  check("forward", conv_sm80_forward_cuda, y, want_y, p.group_channels() * taps + 1);
  if (!with_gradients) return;
  check("input gradient", conv_sm80_input_gradient_cuda, gx, want_gx, p.group_filters() * taps);
  check("weight gradient", conv_sm80_weight_gradient_cuda, gw, want_gw, p.N * p.P * p.Q);
}

// The tile is 128 pixels by 128, 64 or 32 filters, and 64 (float 32) values of depth a stage, three stages.
void check_edges(Suite& suite) {
  const ConvProblem edges[] = {
      problem(1, 1, {1, 1}, 1, {1, 1}, {1, 1}, {0, 0}),               // one element
      problem(2, 8, {8, 8}, 64, {1, 1}, {1, 1}, {0, 0}),              // whole tiles, one stage
      problem(1, 40, {5, 5}, 67, {3, 3}, {1, 1}, {1, 1}),             // six stages; columns with a tail
      problem(2, 3, {12, 11}, 5, {3, 3}, {1, 1}, {1, 1}),             // few channels: rows of taps
      problem(1, 3, {15, 14}, 33, {7, 7}, {2, 2}, {3, 3}),            // a first layer
      problem(2, 1, {9, 9}, 6, {5, 5}, {1, 1}, {2, 2}),               // one channel
      problem(1, 16, {9, 8}, 24, {3, 3}, {2, 2}, {1, 1}),             // four residues
      problem(1, 8, {7, 7}, 16, {1, 1}, {2, 2}, {0, 0}),              // residues without taps
      problem(2, 5, {10, 11}, 4, {2, 5}, {3, 1}, {0, 2}),             // lines nobody reads
      problem(1, 8, {9, 9}, 3, {3, 3}, {2, 2}, {2, 2}, {2, 2}),       // stride and dilation, not coprime
      problem(1, 8, {11, 13}, 9, {3, 2}, {2, 3}, {3, 1}, {3, 2}),     // coprime
      problem(2, 24, {1, 40}, 7, {1, 5}, {1, 2}, {0, 2}),             // one dimension
      problem(3, 48, {6, 5}, 24, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 3),  // groups of whole chunks
      problem(1, 6, {6, 6}, 9, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 3),    // groups of few channels
      problem(1, 4, {6, 6}, 8, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 4),    // two filters a channel
      sized(problem(1, 8, {6, 6}, 4, {3, 3}, {1, 1}, {0, 2}), 8, 5),  // padding on one side
      problem(1, 72, {12, 11}, 136, {3, 3}, {1, 1}, {1, 1}),          // more than one tile each way
  };
  int which = 0;
  for (ConvProblem p : edges)
    for (Layout layout : all_layouts) {
      which++;
      for (DType dtype : {DType::f32, which % 4 < 2 ? DType::bf16 : DType::f16}) {
        const Layout other = layout == Layout::nchw ? Layout::nhwc : Layout::nchw;
        p.layout = layout, p.dtype = dtype;
        p.filter_layout = (which + int(dtype)) % 3 ? layout : other;
        p.aligned = which % 5 != 0;
        check_problem(suite, p, (which + int(dtype)) % 2);
      }
    }
}

void check_random(Suite& suite) {
  Random& random = suite.random;
  for (int k = 0; k < suite.random_problems; k++) {
    ConvProblem p;
    p.dtype = random.any(tensor_core_dtypes), p.layout = random.any(all_layouts);
    p.filter_layout = random.any(all_layouts);
    p.N = random.in(1, 3), p.H = random.in(1, 12), p.W = random.in(1, 14);
    p.groups = random.chance(0.7) ? 1 : random.in(1, 3);
    p.C = p.groups * (random.chance(0.5) ? 8 * random.in(1, 5) : random.in(1, 12));
    p.K = p.groups * (random.chance(0.1) ? random.in(33, 140) : random.in(2, 20));
    p.R = random.in(1, 4), p.S = random.in(1, 4);
    p.stride_h = random.in(1, 3), p.stride_w = random.in(1, 3);
    p.dilation_h = random.in(1, 3), p.dilation_w = random.in(1, 3);
    p.pad_h = random.in(0, p.R), p.pad_w = random.in(0, p.S);
    p = with_outputs(p);
    if (random.chance(0.3)) p.P++;
    if (random.chance(0.3)) p.Q++;
    if (p.P == 0 || p.Q == 0) continue;
    check_problem(suite, p, random.chance(0.5));
  }
}

// Tiles of 128 filters, which only many pixels get: one stage of them. Schedules without the checker, which
// are five times faster, see every dtype.
void check_wide_tiles(Suite& suite) {
  ConvProblem p = problem(16, 8, {33, 32}, 128, {1, 1}, {1, 1}, {0, 0});
  p.layout = p.filter_layout = Layout::nhwc;
  const bool every = !device_memory::simulated || std::getenv("CUSIM_NO_CHECKS");
  for (DType dtype : tensor_core_dtypes) {
    p.dtype = dtype;
    if (every || dtype == DType::bf16) check_problem(suite, p, true, false);
  }
}

void check_refusals(Suite& suite) {
  suite.begin("refusals");
  ConvProblem p = problem(1, 8, {4, 4}, 8, {1, 1}, {1, 1}, {0, 0});
  const auto refused = [&](const ConvProblem& q, const char* what) {
    for (const ConvCudaKernel* kernel :
         {&conv_sm80_forward_cuda, &conv_sm80_input_gradient_cuda, &conv_sm80_weight_gradient_cuda})
      if (!kernel->refuses(q)) suite.fail(kernel->name, std::string("takes ") + what);
  };
  p.dtype = DType::f64;
  refused(p, "float64");
  p.dtype = DType::f32;
  refused(p, "float32 without TF32");
  p.dtype = DType::bf16;
  refused(problem(1, 8, {4, 4}, 8, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 8), "depthwise");
  p.N = 0;
  refused(p, "no images");
  p.N = int64_t{1} << 27;
  refused(p, "offsets beyond 32 bits");
}

}  // namespace

int main(int argc, char** argv) {
  Suite suite(argc, argv);
  check_refusals(suite);
  check_edges(suite);
  check_wide_tiles(suite);
  check_random(suite);
  return suite.finish();
}
