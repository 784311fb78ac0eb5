// The tensor-core kernels of convolution against the oracle, within the rounding of their operands and sums.
#pragma once
#include "conv_problems.h"

namespace pyseqnet {
extern const ConvCpuKernel conv_reference_forward, conv_reference_input_gradient,
    conv_reference_weight_gradient;
}  // namespace pyseqnet

namespace pyseqnet::testing {

// A pass that is null is not checked.
struct TensorCoreKernels {
  const ConvCudaKernel *forward, *input_gradient, *weight_gradient;
};

// As in case_conv.cpp; operands of float32 are rounded to TF32 first, each term by at most twice 2^-11 of
// itself, which random signs keep within a few times the root of their number.
inline std::string tensor_core_difference(const Tensor& got, const Tensor& want, DType dtype, int64_t terms) {
  double absolute = 2 * 0x1p-24 * double(terms + 8);
  if (dtype == DType::f32) absolute += 6 * 0x1p-11 * std::sqrt(double(terms)) + 0x1p-9;
  return difference(got, want, absolute, epsilon_of(dtype));
}

inline void check_tensor_cores(Suite& suite, ConvProblem p, bool with_bias,
                               const TensorCoreKernels& kernels) {
  p.allow_tf32 = true;
  if (!suite.begin(label(p, with_bias))) return;
  const Kind kind = kind_of(p.dtype);
  const int64_t images = p.N * p.C * p.H * p.W, outputs = p.N * p.K * p.P * p.Q;
  const int64_t filters = p.K * p.group_channels() * p.R * p.S;
  Tensor x(kind, images, "x"), w(kind, filters, "w"), bias(kind, p.K, "bias"), gy(kind, outputs, "gy");
  for (Tensor* t : {&x, &w, &bias, &gy}) fill(*t, suite.random);
  const auto check = [&](const ConvCudaKernel* kernel, const ConvCpuKernel& oracle, const char* pass,
                         int64_t count, void* ConvTensors::* result, int64_t terms) {
    if (!kernel) return;
    if (Refusal why = kernel->refuses(p)) return suite.fail(pass, std::string("refused: ") + why);
    Tensor got(kind, count, pass), want(kind, count, "wanted");
    ConvTensors host, device;
    host.x = x.host(), host.w = w.host(), host.bias = with_bias ? bias.host() : nullptr;
    host.gy = gy.host(), host.*result = want.host();
    device.x = x.device(), device.w = w.device(), device.bias = with_bias ? bias.device() : nullptr;
    device.gy = gy.device(), device.*result = got.device();
    run_cpu(oracle, p, host);
    suite.check(
        std::string(pass) + " " + kernel->name, {&got}, [&] { return run_cuda(*kernel, p, device); },
        [&] { return tensor_core_difference(got, want, p.dtype, terms); });
  };
  const int64_t taps = p.R * p.S;
  check(kernels.forward, conv_reference_forward, "y", outputs, &ConvTensors::y,
        p.group_channels() * taps + 1);
  check(kernels.input_gradient, conv_reference_input_gradient, "gx", images, &ConvTensors::gx,
        p.group_filters() * taps);
  check(kernels.weight_gradient, conv_reference_weight_gradient, "gw", filters, &ConvTensors::gw,
        p.N * p.P * p.Q);
}

}  // namespace pyseqnet::testing
