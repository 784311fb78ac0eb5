// The CUDA kernels of the fused block against the oracle. Its own kernels: pool_windows, open_windows,
// mask_gradient; the convolutions between them are those of case_conv.cpp.
//
// Two oracles decide alike only where no two taps of a window are close: the images are small integers, whose
// sums are exact in every dtype and order, so y and arg must agree in every bit. Gradients start from the
// oracle's arg and are deviates.
// clang-format off
// Sources: conv/conv_relu_pool_generic.cu conv/conv_gemm_generic.cu conv/conv_bias_generic.cu
// Sources: conv/conv_depthwise_generic.cu conv/conv_relu_pool_reference.cpp
// Sources: conv/conv_sm80.cu conv/conv_pack.cu conv/conv_relu_pool_sm80.cu
// clang-format on
#include "conv/conv_relu_pool.h"
#include "harness.h"

namespace pyseqnet {
extern const ConvReluPoolCpuKernel conv_relu_pool_reference_forward, conv_relu_pool_reference_input_gradient,
    conv_relu_pool_reference_weight_gradient, conv_relu_pool_reference_bias_gradient;
extern const ConvReluPoolCudaKernel conv_relu_pool_forward_cuda, conv_relu_pool_input_gradient_cuda,
    conv_relu_pool_weight_gradient_cuda, conv_relu_pool_bias_gradient_cuda, conv_relu_pool_sm80_forward_cuda;
}  // namespace pyseqnet

using namespace pyseqnet;
using namespace pyseqnet::testing;

namespace {

constexpr DType all_dtypes[] = {DType::f32, DType::bf16, DType::f16, DType::f64};
constexpr Layout all_layouts[] = {Layout::nchw, Layout::nhwc};

std::string label(const ConvReluPoolProblem& f, bool with_bias) {
  const ConvProblem& p = f.conv;
  char words[400];
  std::snprintf(words, sizeof words,
                "%s %s N%lld C%lld H%lld W%lld K%lld %lldx%lld P%lld Q%lld stride %lldx%lld groups %lld pool "
                "%lldx%lld stride %lldx%lld U%lld V%lld%s%s",
                name_of(p.dtype), name_of(p.layout), (long long)p.N, (long long)p.C, (long long)p.H,
                (long long)p.W, (long long)p.K, (long long)p.R, (long long)p.S, (long long)p.P,
                (long long)p.Q, (long long)p.stride_h, (long long)p.stride_w, (long long)p.groups,
                (long long)f.pool_h, (long long)f.pool_w, (long long)f.pool_stride_h,
                (long long)f.pool_stride_w, (long long)f.U, (long long)f.V, with_bias ? " bias" : "",
                f.with_arg ? "" : " without arg");
  return words;
}

void fill_integers(Tensor& t, Random& random) {
  for (int64_t i = 0; i < t.count(); i++) t.set(i, double(random.in(-2, 2)));
  t.upload();
}

void check_problem(Suite& suite, const ConvReluPoolProblem& f, bool with_bias, bool with_nan = false) {
  const ConvProblem& p = f.conv;
  if (!suite.begin(label(f, with_bias))) return;
  const Kind kind = kind_of(p.dtype), tap = f.wide_arg() ? Kind::i32 : Kind::u8;
  const int64_t images = p.N * p.C * p.H * p.W, outputs = p.N * p.K * f.U * f.V;
  const int64_t filters = p.K * p.group_channels() * p.R * p.S;
  Tensor x(kind, images, "x"), w(kind, filters, "w"), bias(kind, p.K, "bias"), gy(kind, outputs, "gy");
  Tensor y(kind, outputs, "y"), arg(tap, outputs, "arg"), kept(f.pooled ? tap : kind, outputs, "kept");
  Tensor gx(kind, images, "gx"), gw(kind, filters, "gw"), gb(kind, p.K, "gb");
  Tensor want_y(kind, outputs, "want y"), want_arg(tap, outputs, "want arg");
  Tensor want_gx(kind, images, "want gx"), want_gw(kind, filters, "want gw"), want_gb(kind, p.K, "want gb");
  for (Tensor* t : {&x, &w, &bias}) fill_integers(*t, suite.random);
  if (with_nan && images > 0) x.set(suite.random.in(0, images - 1), NAN), x.upload();
  fill(gy, suite.random);

  ConvReluPoolTensors host, device;
  host.x = x.host(), host.w = w.host(), host.bias = with_bias ? bias.host() : nullptr, host.gy = gy.host();
  host.y = want_y.host(), host.arg = want_arg.host(), host.gx = want_gx.host(), host.gw = want_gw.host();
  host.gb = want_gb.host();
  device.x = x.device(), device.w = w.device(), device.bias = with_bias ? bias.device() : nullptr;
  device.gy = gy.device(), device.y = y.device(), device.arg = f.with_arg ? arg.device() : nullptr;
  device.gx = gx.device(), device.gw = gw.device(), device.gb = gb.device();
  ConvReluPoolProblem oracle = f;
  oracle.with_arg = true;
  run_cpu(conv_relu_pool_reference_forward, oracle, host);
  const bool args = f.pooled && f.with_arg;
  const auto check_forward = [&](const ConvReluPoolCudaKernel& kernel, const ConvReluPoolProblem& problem) {
    suite.check(
        std::string("forward ") + kernel.name, {&y, &arg}, [&] { return run_cuda(kernel, problem, device); },
        [&] {
          const std::string wrong = bitwise_difference(y, want_y);
          return wrong.empty() && args ? bitwise_difference(arg, want_arg) : wrong;
        });
  };
  check_forward(conv_relu_pool_forward_cuda, f);
  ConvReluPoolProblem tensor_core = f;  // small integers are exact in TF32
  tensor_core.conv.allow_tf32 = true;
  const bool taken = !conv_relu_pool_sm80_forward_cuda.refuses(tensor_core);
  const bool fits = f.disjoint() && f.window() <= 128 && p.dtype != DType::f64 && outputs > 0 &&
                    (p.groups == 1 || !p.depthwise());
  if (taken != fits) suite.fail("fused_sm80", taken ? "takes what it cannot" : "refuses what it can");
  if (taken) check_forward(conv_relu_pool_sm80_forward_cuda, tensor_core);
  if (!f.with_arg || with_nan) return;

  const Tensor& saved = f.pooled ? want_arg : want_y;
  for (int64_t i = 0; i < outputs; i++) kept.set(i, saved.at(i));
  kept.upload();
  for (Tensor* t : {&x, &w}) fill(*t, suite.random);  // the gradients' own
  host.arg = kept.host(), device.arg = kept.device();
  run_cpu(conv_relu_pool_reference_input_gradient, f, host);
  run_cpu(conv_relu_pool_reference_weight_gradient, f, host);
  run_cpu(conv_relu_pool_reference_bias_gradient, f, host);
  // As in case_conv.cpp; a pixel's own gradient is a sum, too, rounded to the storage type before it is used.
  const int64_t windows = (f.pool_h / f.pool_stride_h + 1) * (f.pool_w / f.pool_stride_w + 1);
  const auto check = [&](const char* pass, const ConvReluPoolCudaKernel& kernel, Tensor& got,
                         const Tensor& want, int64_t terms) {
    if (Refusal why = kernel.refuses(f)) return suite.fail(pass, std::string("refused: ") + why);
    const double unit = p.dtype == DType::f64 ? 0x1p-52 : 0x1p-24;
    const double stored = f.disjoint() ? 0 : epsilon_of(p.dtype) * 2 * std::sqrt(double(terms * windows));
    suite.check(
        pass, {&got}, [&] { return run_cuda(kernel, f, device); },
        [&] {
          return difference(got, want, 2 * unit * double(terms * windows + 8) + stored, epsilon_of(p.dtype));
        });
  };
  const int64_t taps = p.R * p.S, pixels = p.N * p.P * p.Q;
  check("input gradient", conv_relu_pool_input_gradient_cuda, gx, want_gx, p.group_filters() * taps);
  check("weight gradient", conv_relu_pool_weight_gradient_cuda, gw, want_gw, pixels);
  check("bias gradient", conv_relu_pool_bias_gradient_cuda, gb, want_gb, pixels);
}

struct Pair {
  int64_t h, w;
};

ConvReluPoolProblem problem(int64_t N, int64_t C, Pair image, int64_t K, Pair filter, Pair pool,
                            Pair pool_stride, int64_t pad = 1, int64_t stride = 1, int64_t groups = 1) {
  ConvReluPoolProblem f;
  ConvProblem& p = f.conv;
  p.N = N, p.C = C, p.H = image.h, p.W = image.w, p.K = K, p.R = filter.h, p.S = filter.w;
  p.stride_h = p.stride_w = stride, p.pad_h = p.pad_w = pad, p.groups = groups;
  p.P = (p.H + 2 * pad - p.R) / stride + 1, p.Q = (p.W + 2 * pad - p.S) / stride + 1;
  f.pool_h = pool.h, f.pool_w = pool.w, f.pool_stride_h = pool_stride.h, f.pool_stride_w = pool_stride.w;
  f.pooled = pool.h != 1 || pool.w != 1 || pool_stride.h != 1 || pool_stride.w != 1;
  f.U = (p.P - pool.h) / pool_stride.h + 1, f.V = (p.Q - pool.w) / pool_stride.w + 1;
  return f;
}

void check_edges(Suite& suite) {
  const ConvReluPoolProblem edges[] = {
      problem(1, 1, {1, 1}, 1, {1, 1}, {1, 1}, {1, 1}, 0),          // one element, no pool
      problem(0, 2, {6, 6}, 3, {3, 3}, {2, 2}, {2, 2}),             // no images
      problem(2, 3, {9, 11}, 5, {3, 3}, {1, 1}, {1, 1}),            // no pool
      problem(2, 3, {9, 11}, 5, {3, 3}, {2, 2}, {2, 2}),            // a row and a column left over
      problem(2, 2, {12, 10}, 4, {3, 3}, {3, 3}, {2, 2}),           // windows that overlap
      problem(1, 2, {11, 13}, 3, {3, 3}, {2, 2}, {3, 4}),           // windows with gaps
      problem(2, 2, {8, 8}, 3, {3, 3}, {1, 1}, {2, 2}),             // every second pixel
      problem(1, 1, {20, 20}, 2, {3, 3}, {17, 16}, {1, 2}),         // more than 255 taps
      problem(1, 4, {12, 12}, 6, {5, 5}, {2, 3}, {2, 3}, 2, 2, 2),  // stride and groups
      problem(2, 5, {10, 9}, 5, {3, 3}, {2, 2}, {2, 2}, 1, 1, 5),   // depthwise
      problem(3, 1, {28, 28}, 4, {5, 5}, {2, 2}, {2, 2}, 2),        // a first layer
      problem(1, 24, {13, 19}, 40, {3, 3}, {3, 3}, {3, 3}),         // windows that do not fill a tile
  };
  int which = 0;
  for (ConvReluPoolProblem f : edges)
    for (Layout layout : all_layouts) {
      which++;
      for (DType dtype : {DType::f32, DType::f64, which % 4 < 2 ? DType::bf16 : DType::f16}) {
        f.conv.layout = f.conv.filter_layout = layout, f.conv.dtype = dtype;
        check_problem(suite, f, (which + int(dtype)) % 2);
      }
      f.conv.dtype = DType::f32;
      check_problem(suite, f, false, true);  // a NaN in the image
      f.with_arg = false;
      check_problem(suite, f, true);
      f.with_arg = true;
    }
}

void check_random(Suite& suite) {
  Random& random = suite.random;
  for (int k = 0; k < suite.random_problems; k++) {
    const int64_t groups = random.chance(0.7) ? 1 : random.in(2, 3);
    const Pair pool = {random.in(1, 3), random.in(1, 3)}, filter = {random.in(1, 3), random.in(1, 3)};
    const int64_t stride = random.in(1, 2), pad = random.in(0, 1);
    const Pair image = {filter.h + pool.h * stride + random.in(0, 9),
                        filter.w + pool.w * stride + random.in(0, 9)};
    ConvReluPoolProblem f =
        problem(random.in(1, 3), groups * random.in(1, 3), image, groups * random.in(1, 5), filter, pool,
                {random.in(1, 3), random.in(1, 3)}, pad, stride, groups);
    f.conv.dtype = random.any(all_dtypes);
    f.conv.layout = random.any(all_layouts), f.conv.filter_layout = random.any(all_layouts);
    check_problem(suite, f, random.chance(0.5));
  }
}

// More than a band of images. Real devices only.
void check_large(Suite& suite) {
  ConvReluPoolProblem f = problem(150, 1, {64, 64}, 33, {3, 3}, {2, 2}, {2, 2});
  check_problem(suite, f, true);
}

}  // namespace

int main(int argc, char** argv) {
  Suite suite(argc, argv);
  check_edges(suite);
  check_random(suite);
  if (suite.large) check_large(suite);
  return suite.finish();
}
