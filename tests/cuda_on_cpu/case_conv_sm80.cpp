// The tensor-core convolutions of sm_80 against the oracle, within the rounding of their operands and sums.
// Its kernels: gathered_product, weight_product, pack_lines, sum_filter_parts.
// clang-format off
// Sources: conv/conv_sm80.cu conv/conv_pack.cu conv/conv_reference.cpp
// clang-format on
#include "conv_tensor_core.h"

namespace pyseqnet {
extern const ConvCudaKernel conv_sm80_forward_cuda, conv_sm80_input_gradient_cuda,
    conv_sm80_weight_gradient_cuda;
}  // namespace pyseqnet

using namespace pyseqnet;
using namespace pyseqnet::testing;

namespace {

constexpr DType tensor_core_dtypes[] = {DType::bf16, DType::f16, DType::f32};
constexpr TensorCoreKernels kernels = {&conv_sm80_forward_cuda, &conv_sm80_input_gradient_cuda,
                                       &conv_sm80_weight_gradient_cuda};

void check_problem(Suite& suite, const ConvProblem& p, bool with_bias, bool with_gradients = true) {
  check_tensor_cores(suite, p, with_bias,
                     with_gradients ? kernels : TensorCoreKernels{&conv_sm80_forward_cuda, nullptr, nullptr});
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
    for (const ConvCudaKernel* kernel : {kernels.forward, kernels.input_gradient, kernels.weight_gradient})
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
