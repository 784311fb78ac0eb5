// Every CUDA kernel of max-pooling against the oracle: forward and indices bit for bit, backward within the
// rounding of float32 sums.
// Sources: pool/max_pool_generic.cu pool/max_pool_reference.cpp
#include "harness.h"
#include "pool/max_pool.h"

namespace pyseqnet {
extern const MaxPoolCpuKernel max_pool_reference_forward, max_pool_reference_backward,
    max_pool_reference_indices;
extern const MaxPoolCudaKernel max_pool_forward_cuda, max_pool_backward_cuda, max_pool_indices_cuda;
}  // namespace pyseqnet

using namespace pyseqnet;
using namespace pyseqnet::testing;

namespace {

constexpr DType all_dtypes[] = {DType::f32, DType::bf16, DType::f16, DType::f64};
constexpr Layout all_layouts[] = {Layout::nchw, Layout::nhwc};

std::string label(const MaxPoolProblem& p) {
  char words[300];
  std::snprintf(words, sizeof words,
                "%s %s N%lld C%lld H%lld W%lld P%lld Q%lld window %lldx%lld stride %lldx%lld pad %lldx%lld "
                "dilation %lldx%lld%s",
                name_of(p.dtype), name_of(p.layout), (long long)p.N, (long long)p.C, (long long)p.H,
                (long long)p.W, (long long)p.P, (long long)p.Q, (long long)p.R, (long long)p.S,
                (long long)p.stride_h, (long long)p.stride_w, (long long)p.pad_h, (long long)p.pad_w,
                (long long)p.dilation_h, (long long)p.dilation_w, p.with_arg ? "" : " without arg");
  return words;
}

// Outputs along one dimension; ceil_mode's extra window must begin inside the image or its front padding.
int64_t outputs(int64_t extent, int64_t taps, int64_t stride, int64_t pad, int64_t dilation, bool ceil_mode) {
  const int64_t room = extent + 2 * pad - dilation * (taps - 1) - 1;
  if (room < 0) return 0;
  int64_t count = (room + (ceil_mode ? stride - 1 : 0)) / stride + 1;
  if (ceil_mode && (count - 1) * stride >= extent + pad) count--;
  return count;
}

MaxPoolProblem with_outputs(MaxPoolProblem p, bool ceil_mode) {
  p.P = outputs(p.H, p.R, p.stride_h, p.pad_h, p.dilation_h, ceil_mode);
  p.Q = outputs(p.W, p.S, p.stride_w, p.pad_w, p.dilation_w, ceil_mode);
  return p;
}

// Values that meet every rule: few distinct ones (ties), now and then -infinity, infinity or NaN.
void fill_with_ties(Tensor& x, Random& random) {
  const double special = random.chance(0.5) ? 0.05 : 0.0;
  const bool only_lowest = random.chance(0.05);
  for (int64_t i = 0; i < x.count(); i++) {
    double v = double(random.in(-6, 6));
    if (random.chance(0.3)) v = random.normal();
    if (random.chance(special)) v = random.chance(0.4) ? NAN : random.chance(0.8) ? -INFINITY : INFINITY;
    x.set(i, only_lowest ? -INFINITY : v);
  }
  x.upload();
}

// Backward sums at most this many gradients a pixel, each rounded once in float32 (in double for float64).
double backward_tolerance(const MaxPoolProblem& p) {
  const double windows = double((p.R * p.S + p.stride_h * p.stride_w - 1) / (p.stride_h * p.stride_w)) + 1;
  return windows * (p.dtype == DType::f64 ? 0x1p-53 : 0x1p-24) * 8;
}

void check_problem(Suite& suite, const MaxPoolProblem& p) {
  if (!suite.begin(label(p))) return;
  const Kind element = kind_of(p.dtype), tap = p.wide_arg() ? Kind::i32 : Kind::u8;
  const int64_t in = p.N * p.C * p.H * p.W, out = p.N * p.C * p.P * p.Q;
  Tensor x(element, in, "x"), y(element, out, "y"), arg(tap, out, "arg"), indices(Kind::i64, out, "indices");
  Tensor gy(element, out, "gy"), gx(element, in, "gx");
  Tensor want_y(element, out, "want y"), want_arg(tap, out, "want arg"), want_gx(element, in, "want gx");
  Tensor want_indices(Kind::i64, out, "want indices");
  fill_with_ties(x, suite.random);
  fill(gy, suite.random);

  MaxPoolTensors host, device;
  host.x = x.host(), host.gy = gy.host(), host.y = want_y.host(), host.gx = want_gx.host();
  host.arg = want_arg.host(), host.indices = static_cast<int64_t*>(want_indices.host());
  device.x = x.device(), device.gy = gy.device(), device.y = y.device(), device.gx = gx.device();
  device.arg = arg.device(), device.indices = static_cast<int64_t*>(indices.device());
  MaxPoolProblem oracle = p;
  oracle.with_arg = true;
  run_cpu(max_pool_reference_forward, oracle, host);
  run_cpu(max_pool_reference_backward, oracle, host);
  run_cpu(max_pool_reference_indices, oracle, host);

  MaxPoolTensors forward_device = device;
  if (!p.with_arg) forward_device.arg = nullptr;
  suite.check(
      "forward", {&y, &arg}, [&] { return run_cuda(max_pool_forward_cuda, p, forward_device); },
      [&] {
        const std::string wrong = bitwise_difference(y, want_y);
        return wrong.empty() && p.with_arg ? bitwise_difference(arg, want_arg) : wrong;
      });
  if (!p.with_arg) return;

  // Independent of forward: from the oracle's arg.
  std::memcpy(arg.host(), want_arg.host(), want_arg.bytes().size());
  arg.upload();
  suite.check(
      "indices", {&indices}, [&] { return run_cuda(max_pool_indices_cuda, p, device); },
      [&] { return bitwise_difference(indices, want_indices); });
  const double tolerance = backward_tolerance(p);
  // The sums are of order 1; the second term is the one rounding to the storage type, which may go to either
  // side where the sums lie close to a tie.
  suite.check(
      "backward", {&gx}, [&] { return run_cuda(max_pool_backward_cuda, p, device); },
      [&] { return difference(gx, want_gx, tolerance, tolerance + epsilon_of(p.dtype)); });
}

MaxPoolProblem problem(int64_t N, int64_t C, int64_t H, int64_t W, int64_t R, int64_t S, int64_t stride_h,
                       int64_t stride_w, int64_t pad_h, int64_t pad_w, int64_t dilation_h = 1,
                       int64_t dilation_w = 1, bool ceil_mode = false) {
  MaxPoolProblem p;
  p.N = N, p.C = C, p.H = H, p.W = W, p.R = R, p.S = S;
  p.stride_h = stride_h, p.stride_w = stride_w, p.pad_h = pad_h, p.pad_w = pad_w;
  p.dilation_h = dilation_h, p.dilation_w = dilation_w;
  return with_outputs(p, ceil_mode);
}

void check_edges(Suite& suite) {
  const MaxPoolProblem edges[] = {
      problem(1, 1, 1, 1, 1, 1, 1, 1, 0, 0),                // one element
      problem(0, 3, 4, 4, 2, 2, 2, 2, 0, 0),                // no images
      problem(2, 0, 4, 4, 2, 2, 2, 2, 0, 0),                // no channels
      problem(1, 2, 2, 2, 3, 3, 1, 1, 0, 0),                // no outputs: backward still writes zeros
      problem(2, 8, 8, 8, 2, 2, 2, 2, 0, 0),                // vectors of channels where they are last
      problem(2, 3, 7, 9, 2, 2, 2, 2, 0, 0, 1, 1, true),    // ceil_mode's extra windows
      problem(1, 16, 9, 7, 3, 3, 2, 2, 1, 1),               // overlapping, small: no tile
      problem(1, 2, 66, 70, 3, 3, 2, 2, 1, 1),              // a tile and tails
      problem(1, 1, 40, 33, 3, 3, 1, 1, 1, 1),              // stride 1, two tiles across
      problem(1, 2, 20, 80, 2, 5, 1, 2, 1, 2),              // a window of its own shape, tiled
      problem(2, 4, 12, 13, 3, 2, 2, 1, 1, 1, 2, 3),        // dilation
      problem(1, 4, 3, 3, 2, 2, 1, 1, 1, 1, 4, 4),          // dilation jumps over the image
      problem(1, 3, 1, 65, 1, 3, 1, 2, 0, 1),               // one dimension
      problem(1, 1, 20, 40, 17, 17, 1, 2, 8, 8),            // more than 256 taps: int32 arg
      problem(1, 300, 3, 3, 2, 2, 1, 1, 0, 0),              // more channels than a block
      problem(70, 1, 2, 2, 2, 2, 2, 2, 0, 0),               // many tiny images: 70 a block's depth
      problem(1, 2, 5, 5, 2, 2, 4, 4, 0, 0),                // stride beyond the window: pixels nobody reads
      problem(1, 1, 34, 300, 3, 3, 4, 9, 1, 1, 12, 1),      // a tile too large for shared memory
      problem(3, 2, 11, 16, 3, 3, 2, 2, 1, 1),              // strips: odd rows, padding
      problem(2, 2, 16, 24, 3, 3, 2, 2, 0, 0, 1, 1, true),  // strips: overhanging windows
      problem(5, 1, 9, 64, 2, 2, 2, 2, 0, 0),               // strips: a row that no window reads
      problem(1, 1, 20, 80, 3, 3, 2, 2, 0, 0),              // 39 columns: no strips
  };
  for (MaxPoolProblem p : edges)
    for (Layout layout : all_layouts)
      for (DType dtype : all_dtypes) {
        p.layout = layout, p.dtype = dtype;
        check_problem(suite, p);
      }
}

void check_random(Suite& suite) {
  Random& random = suite.random;
  for (int k = 0; k < suite.random_problems; k++) {
    MaxPoolProblem p;
    p.dtype = random.any(all_dtypes), p.layout = random.any(all_layouts);
    p.N = random.in(1, 3), p.C = random.chance(0.5) ? 8 * random.in(1, 3) : random.in(1, 9);
    p.H = random.in(1, 24), p.W = random.in(1, 48);
    p.R = random.in(1, 4), p.S = random.in(1, 4);
    p.stride_h = random.in(1, 4), p.stride_w = random.in(1, 4);
    p.dilation_h = random.chance(0.7) ? 1 : random.in(1, 3),
    p.dilation_w = random.chance(0.7) ? 1 : random.in(1, 3);
    p.pad_h = random.in(0, p.R / 2), p.pad_w = random.in(0, p.S / 2);
    p.with_arg = random.chance(0.8);
    check_problem(suite, with_outputs(p, random.chance(0.5)));
  }
}

// Indices beyond 32 bits: one long row that does not fit into them (the 64-bit kernels), and many images
// whose offsets do not. Real devices only: the oracle takes a minute.
void check_large(Suite& suite) {
  constexpr int64_t beyond = (int64_t{1} << 31) + 4099;
  MaxPoolProblem row = problem(1, 1, 1, beyond, 1, 3, 1, 2, 0, 1);
  row.dtype = DType::bf16;
  check_problem(suite, row);
  MaxPoolProblem images = problem(beyond / (64 * 64) + 1, 1, 64, 64, 2, 2, 2, 2, 0, 0);
  images.dtype = DType::bf16;
  check_problem(suite, images);
}

// The 64-bit kernels on a small problem: a padding that no 32-bit position can hold would take a huge
// image; a stride can be that large at no cost.
void check_wide_positions(Suite& suite) {
  for (DType dtype : all_dtypes)
    for (Layout layout : all_layouts) {
      MaxPoolProblem p = problem(1, 3, 5, 7, 3, 3, int64_t{1} << 31, int64_t{1} << 31, 1, 1, 2, 1);
      p.dtype = dtype, p.layout = layout;
      check_problem(suite, p);
    }
}

}  // namespace

int main(int argc, char** argv) {
  Suite suite(argc, argv);
  check_edges(suite);
  check_wide_positions(suite);
  check_random(suite);
  if (suite.large) check_large(suite);
  return suite.finish();
}
