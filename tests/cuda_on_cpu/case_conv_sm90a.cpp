// The tensor-core convolutions of sm_90a against the oracle. Its kernels: product_wgmma, weight_wgmma; beside
// them pack_lines and sum_filter_parts of case_conv_sm80.cpp.
// clang-format off
// Sources: conv/conv_sm90a.cu conv/conv_weight_sm90a.cu conv/conv_pack.cu conv/conv_reference.cpp
// clang-format on
#include "conv_tensor_core.h"

namespace pyseqnet {
extern const ConvCudaKernel conv_sm90a_forward_cuda, conv_sm90a_input_gradient_cuda,
    conv_sm90a_weight_gradient_cuda;
}  // namespace pyseqnet

using namespace pyseqnet;
using namespace pyseqnet::testing;

namespace {

// Passes that the kernels must take. An input gradient sees the filters as its channels.
void check_problem(Suite& suite, ConvProblem p, bool with_bias, bool forward, bool gradient, bool weights) {
  p.layout = Layout::nhwc;
  const TensorCoreKernels kernels = {forward ? &conv_sm90a_forward_cuda : nullptr,
                                     gradient ? &conv_sm90a_input_gradient_cuda : nullptr,
                                     weights ? &conv_sm90a_weight_gradient_cuda : nullptr};
  check_tensor_cores(suite, p, with_bias, kernels);
  if (!forward && !conv_sm90a_forward_cuda.refuses(p)) suite.fail("forward", "takes what it should not");
  if (!gradient && !conv_sm90a_input_gradient_cuda.refuses(p))
    suite.fail("gradient", "takes what it should not");
  if (!weights && !conv_sm90a_weight_gradient_cuda.refuses(p))
    suite.fail("weights", "takes what it should not");
}

// A tile is 128 pixels by 64 or 128 filters, 64 channels a stage, of which there are 8 or 6.
void check_edges(Suite& suite) {
  struct Edge {
    ConvProblem p;
    bool forward, gradient, weights;
  };
  const Edge edges[] = {
      {problem(1, 40, {1, 1}, 8, {1, 1}, {1, 1}, {0, 0}), true, false, false},   // one pixel
      {problem(1, 72, {6, 5}, 67, {3, 3}, {1, 1}, {1, 1}), true, false, false},  // 18 stages, odd filters
      {problem(2, 64, {9, 8}, 136, {3, 3}, {1, 1}, {1, 1}), true, true, true},   // two tiles each way
      {problem(1, 40, {12, 11}, 40, {3, 3}, {2, 2}, {1, 1}), true, true, true},  // four residues
      {problem(1, 64, {7, 7}, 40, {1, 1}, {2, 2}, {0, 0}), true, true, true},    // residues without taps
      {problem(1, 40, {10, 11}, 40, {2, 5}, {2, 1}, {0, 2}), true, true, true},  // its own shape
      {problem(1, 40, {9, 9}, 40, {3, 3}, {2, 2}, {2, 2}, {2, 2}), true, true, true},  // stride and dilation
      {problem(1, 40, {11, 13}, 40, {3, 2}, {3, 1}, {3, 1}, {1, 2}), true, true, true},     // stride 3
      {problem(1, 40, {11, 13}, 40, {3, 2}, {3, 3}, {3, 1}), true, false, true},            // nine residues
      {problem(3, 128, {5, 4}, 128, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 2), true, true, true},  // groups
      {sized(problem(1, 40, {6, 6}, 48, {3, 3}, {1, 1}, {0, 2}), 8, 5), true, true,
       true},                                                                    // padding on one side
      {problem(2, 40, {1, 40}, 40, {1, 5}, {1, 2}, {0, 2}), true, true, true},   // one dimension
      {problem(1, 24, {4, 4}, 64, {1, 1}, {1, 1}, {0, 0}), false, true, false},  // few channels
      {problem(1, 64, {4, 4}, 36, {1, 1}, {1, 1}, {0, 0}), true, false, false},  // no whole chunks
      {problem(1, 96, {4, 4}, 96, {1, 1}, {1, 1}, {0, 0}, {1, 1}, 2), false, false,
       true},  // stages of two groups
  };
  int which = 0;
  for (const Edge& edge : edges) {
    which++;
    ConvProblem p = edge.p;
    p.dtype = which % 2 ? DType::bf16 : DType::f16;
    p.filter_layout = which % 3 ? Layout::nhwc : Layout::nchw;
    check_problem(suite, p, which % 2, edge.forward, edge.gradient, edge.weights);
  }
}

// More tiles than there are blocks: warpgroups take turns, and wait for each other's stages.
void check_persistent(Suite& suite) {
  ConvProblem p = problem(16, 72, {33, 32}, 132, {1, 1}, {1, 1}, {0, 0});
  p.dtype = DType::bf16, p.filter_layout = Layout::nhwc;
  check_problem(suite, p, true, true, false, false);
}

// More stages than the ring has, in two parts.
void check_deep_weights(Suite& suite) {
  for (int64_t filters : {int64_t{48}, int64_t{136}}) {
    ConvProblem p = problem(2, 72, {21, 20}, filters, {3, 3}, {1, 1}, {1, 1});
    p.dtype = DType::bf16, p.layout = p.filter_layout = Layout::nhwc;
    check_tensor_cores(suite, p, false, {nullptr, nullptr, &conv_sm90a_weight_gradient_cuda});
  }
}

void check_refusals(Suite& suite) {
  suite.begin("refusals");
  ConvProblem p = problem(1, 64, {4, 4}, 64, {1, 1}, {1, 1}, {0, 0});
  const auto refused = [&](const ConvProblem& q, const char* what) {
    for (const ConvCudaKernel* kernel :
         {&conv_sm90a_forward_cuda, &conv_sm90a_input_gradient_cuda, &conv_sm90a_weight_gradient_cuda})
      if (!kernel->refuses(q)) suite.fail(kernel->name, std::string("takes ") + what);
  };
  p.dtype = DType::bf16;
  refused(p, "NCHW");
  p.layout = p.filter_layout = Layout::nhwc;
  if (conv_sm90a_forward_cuda.refuses(p)) suite.fail("forward", "refuses what it can");
  p.aligned = false;
  refused(p, "what begins off a chunk");
  p.aligned = true, p.dtype = DType::f32, p.allow_tf32 = true;
  refused(p, "float32");
  p.dtype = DType::bf16, p.pad_h = p.pad_w = 200, p.P = p.Q = 404;
  refused(p, "padding beyond a corner");
}

}  // namespace

int main(int argc, char** argv) {
  Suite suite(argc, argv);
  check_refusals(suite);
  check_edges(suite);
  check_persistent(suite);
  check_deep_weights(suite);
  return suite.finish();
}
