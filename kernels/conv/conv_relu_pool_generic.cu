// The fused block on any CUDA device, every dtype and option: convolution kernels (those of tensor cores where
// they take the problem) and three small ones, launched by one operation.
//
//   forward           bands of images: convolution -> z in the workspace, pool_windows -> y, arg
//   input gradient    bands of images: open_windows -> gradient of z in the workspace, input gradient
//   weight gradient   open_windows on the whole batch, weight gradient (its sums run over all images)
//   bias gradient     mask_gradient -> gy of the open windows, bias gradient
//
// Only y and arg outlive the call. A band of z is at most 32 MiB, so that on a GPU with 50 MiB of
// second-level cache what one kernel writes the next still finds there: of z, almost nothing reaches memory.
// Without pooling z is y and ReLU happens in place.
//
// pool_windows: a thread owns an element of y; open_windows: a thread owns an element of z and asks the
// windows that cover it, in the order of the oracle, so nothing is scattered and there are no atomics.
// Neighbouring threads hold neighbouring addresses of what they write, in both layouts. Threads walk the
// tensor in steps of the whole grid; the coordinates of an element are divided out once and then advanced.
//
// Bound: the convolution's. The steps are bound by the second-level cache: 2x2 windows in float32 read 16 and
// write 5 bytes an output, and back the same. Predicted before any measurement, for an H200 and z of 32 MiB:
// 10 us a step, beside 60 us or more for the convolution that made it (3 channels, 3x3).
#include "conv/conv_generic.cuh"
#include "conv/conv_relu_pool.h"

namespace pyseqnet {

extern const ConvCudaKernel conv_gemm_forward_cuda, conv_gemm_input_gradient_cuda,
    conv_gemm_weight_gradient_cuda, conv_bias_gradient_cuda, conv_depthwise_forward_cuda,
    conv_depthwise_input_gradient_cuda, conv_depthwise_weight_gradient_cuda, conv_sm80_forward_cuda,
    conv_sm80_input_gradient_cuda, conv_sm80_weight_gradient_cuda;

namespace {

constexpr int block_threads = 256;
constexpr int64_t most_blocks = 2048;  // about two for each place on the largest GPUs
constexpr int64_t band_bytes = int64_t(32) << 20;
constexpr int64_t workspace_line = 256;

// At least one: no tensor begins at a null pointer, even an empty one.
constexpr int64_t whole_lines(int64_t bytes) { return (bytes / workspace_line + 1) * workspace_line; }

// A tensor walked in its order in memory: digits (n, channel, row, column) or (n, row, column, channel).
struct Walk {
  Radix<4> radix;
  int64_t count;
  bool planes;
};
struct Place {
  int n, k, row, column;
};
PYSEQNET_DEVICE Place place_of(const Digits<4>& d, bool planes) {
  return planes ? Place{d.digit[0], d.digit[1], d.digit[2], d.digit[3]}
                : Place{d.digit[0], d.digit[3], d.digit[1], d.digit[2]};
}

struct Windows {
  Walk walk;      // of y (pool_windows) or z (open_windows)
  Strides other;  // of z or y
  int pool_h, pool_w, stride_h, stride_w, rows, columns;
  int32_t closed;
  bool wide_arg;
};

PYSEQNET_DEVICE int32_t read_tap(const void* arg, int64_t i, bool wide) {
  return wide ? static_cast<const int32_t*>(arg)[i] : int32_t(static_cast<const uint8_t*>(arg)[i]);
}

// y = max(0, z) over windows; arg, where there is one, the tap that won. z may be y where windows are pixels.
template <class T>
__global__ void __launch_bounds__(block_threads) pool_windows(const T* z, T* y, void* arg, Windows w) {
  using Acc = accumulator_t<T>;
  const int64_t threads = int64_t(gridDim.x) * block_threads;
  int64_t i = int64_t(blockIdx.x) * block_threads + threadIdx.x;
  if (i >= w.walk.count) return;
  Digits<4> d = digits_of(i, w.walk.radix.extent);
  for (; i < w.walk.count; i += threads, advance(d, w.walk.radix)) {
    const Place at = place_of(d, w.walk.planes);
    const T* row = z + at.n * w.other.n + at.k * w.other.c + int64_t(at.row) * w.stride_h * w.other.h +
                   int64_t(at.column) * w.stride_w * w.other.w;
    Acc best = 0;
    int32_t winner = w.closed, tap = 0;
    for (int r = 0; r < w.pool_h; r++, row += w.other.h)
      for (int s = 0; s < w.pool_w; s++, tap++) {
        const Acc v = load(row + s * w.other.w);
        if (v > best || v != v) best = v, winner = tap;
      }
    store(y + i, best);
    if (!arg) continue;
    if (w.wide_arg)
      static_cast<int32_t*>(arg)[i] = winner;
    else
      static_cast<uint8_t*>(arg)[i] = uint8_t(winner);
  }
}

// The gradient of z: the sum of gy over the windows that a pixel won.
template <class T>
__global__ void __launch_bounds__(block_threads)
    open_windows(const T* __restrict__ gy, const void* __restrict__ arg, T* __restrict__ gz, Windows w) {
  using Acc = accumulator_t<T>;
  const int64_t threads = int64_t(gridDim.x) * block_threads;
  int64_t i = int64_t(blockIdx.x) * block_threads + threadIdx.x;
  if (i >= w.walk.count) return;
  Digits<4> d = digits_of(i, w.walk.radix.extent);
  for (; i < w.walk.count; i += threads, advance(d, w.walk.radix)) {
    const Place at = place_of(d, w.walk.planes);
    const int64_t image = at.n * w.other.n + at.k * w.other.c;
    int u1 = at.row / w.stride_h, v1 = at.column / w.stride_w;
    if (u1 >= w.rows) u1 = w.rows - 1;
    if (v1 >= w.columns) v1 = w.columns - 1;
    const int u0 = at.row < w.pool_h ? 0 : (at.row - w.pool_h) / w.stride_h + 1;
    const int v0 = at.column < w.pool_w ? 0 : (at.column - w.pool_w) / w.stride_w + 1;
    Acc sum = 0;
    for (int u = u0; u <= u1; u++)
      for (int v = v0; v <= v1; v++) {
        const int64_t from = image + u * w.other.h + v * w.other.w;
        const int32_t tap = (at.row - u * w.stride_h) * w.pool_w + at.column - v * w.stride_w;
        if (read_tap(arg, from, w.wide_arg) == tap) sum += load(gy + from);
      }
    store(gz + i, sum);
  }
}

// gy where the window (or, without pooling, the pixel) is open, else 0. kept: arg or y.
template <class T>
__global__ void __launch_bounds__(block_threads)
    mask_gradient(const T* __restrict__ gy, const void* __restrict__ kept, T* __restrict__ out, int64_t count,
                  bool pooled, bool wide_arg, int32_t closed) {
  const int64_t threads = int64_t(gridDim.x) * block_threads;
  for (int64_t i = int64_t(blockIdx.x) * block_threads + threadIdx.x; i < count; i += threads) {
    const bool open = pooled ? uint32_t(read_tap(kept, i, wide_arg)) < uint32_t(closed)
                             : !(load(static_cast<const T*>(kept) + i) <= 0);
    store(out + i, open ? load(gy + i) : accumulator_t<T>(0));
  }
}

// ---------------------------------------------------------------- host side

LaunchConfig grid_for(int64_t count, void* stream) {
  const int64_t blocks = ceil_div(count, block_threads);
  return {.grid = dim3(unsigned(blocks < most_blocks ? blocks : most_blocks)),
          .block = dim3(block_threads),
          .stream = stream};
}

Windows windows_of(const ConvReluPoolProblem& f, bool over_z) {
  const ConvProblem& p = f.conv;
  const int64_t rows = over_z ? p.P : f.U, columns = over_z ? p.Q : f.V;
  Windows w = {};
  w.walk.planes = p.layout == Layout::nchw;
  w.walk.count = p.N * p.K * rows * columns;
  const int64_t threads = int64_t(grid_for(w.walk.count, nullptr).grid.x) * block_threads;
  if (w.walk.count > 0)
    w.walk.radix = w.walk.planes ? radix_of<4>({p.N, p.K, rows, columns}, threads)
                                 : radix_of<4>({p.N, rows, columns, p.K}, threads);
  w.other = over_z ? f.y_strides() : p.y_strides();
  w.pool_h = int(f.pool_h), w.pool_w = int(f.pool_w);
  w.stride_h = int(f.pool_stride_h), w.stride_w = int(f.pool_stride_w);
  w.rows = int(f.U), w.columns = int(f.V);
  w.closed = int32_t(f.closed()), w.wide_arg = f.wide_arg();
  return w;
}

int launch_pool(const ConvReluPoolProblem& f, const void* z, void* y, void* arg, void* stream) {
  const Windows w = windows_of(f, false);
  if (w.walk.count == 0) return launch_ok;
  return dispatch_dtype(f.conv.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return launch(grid_for(w.walk.count, stream), pool_windows<T>, static_cast<const T*>(z),
                  static_cast<T*>(y), arg, w);
  });
}
int launch_mask(const ConvReluPoolProblem& f, const void* gy, const void* kept, void* out, void* stream) {
  const int64_t count = f.conv.N * f.conv.K * f.U * f.V;
  if (count == 0) return launch_ok;
  return dispatch_dtype(f.conv.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return launch(grid_for(count, stream), mask_gradient<T>, static_cast<const T*>(gy), kept,
                  static_cast<T*>(out), count, f.pooled, f.wide_arg(), int32_t(f.closed()));
  });
}
int launch_open(const ConvReluPoolProblem& f, const void* gy, const void* kept, void* gz, void* stream) {
  if (!f.pooled) return launch_mask(f, gy, kept, gz, stream);
  const Windows w = windows_of(f, true);
  if (w.walk.count == 0) return launch_ok;
  return dispatch_dtype(f.conv.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return launch(grid_for(w.walk.count, stream), open_windows<T>, static_cast<const T*>(gy), kept,
                  static_cast<T*>(gz), w);
  });
}

const ConvCudaKernel& convolution(ConvPass pass, const ConvProblem& p) {
  const ConvCudaKernel& depthwise = pass == ConvPass::forward          ? conv_depthwise_forward_cuda
                                    : pass == ConvPass::input_gradient ? conv_depthwise_input_gradient_cuda
                                                                       : conv_depthwise_weight_gradient_cuda;
  const ConvCudaKernel& gemm = pass == ConvPass::forward          ? conv_gemm_forward_cuda
                               : pass == ConvPass::input_gradient ? conv_gemm_input_gradient_cuda
                                                                  : conv_gemm_weight_gradient_cuda;
  const ConvCudaKernel& tensor_core = pass == ConvPass::forward          ? conv_sm80_forward_cuda
                                      : pass == ConvPass::input_gradient ? conv_sm80_input_gradient_cuda
                                                                         : conv_sm80_weight_gradient_cuda;
  return !depthwise.refuses(p) ? depthwise : !tensor_core.refuses(p) ? tensor_core : gemm;
}

// The same block for a part of the images.
ConvReluPoolProblem band_of(const ConvReluPoolProblem& f, int64_t images) {
  ConvReluPoolProblem band = f;
  band.conv.N = images;
  return band;
}
int64_t z_bytes(const ConvReluPoolProblem& f) {
  return f.conv.N * f.conv.K * f.conv.P * f.conv.Q * bytes_of(f.conv.dtype);
}
// Images of a band: equal parts.
int64_t band_images(const ConvReluPoolProblem& f) {
  const int64_t bands = ceil_div(z_bytes(f), band_bytes);
  return bands > 1 ? ceil_div(f.conv.N, bands < f.conv.N ? bands : f.conv.N) : f.conv.N;
}

// Calls run(band, first image) until the images are through or it returns an error.
template <class F>
int for_bands(const ConvReluPoolProblem& f, F&& run) {
  const int64_t images = band_images(f);
  for (int64_t n = 0; n < f.conv.N; n += images) {
    const int error = run(band_of(f, images < f.conv.N - n ? images : f.conv.N - n), n);
    if (error != launch_ok) return error;
  }
  return launch_ok;
}

void* moved(void* p, int64_t bytes) { return p ? static_cast<char*>(p) + bytes : nullptr; }
const void* moved(const void* p, int64_t bytes) { return p ? static_cast<const char*>(p) + bytes : nullptr; }

// y's problem for the bias gradient: only N, K and the extents of gy count.
ConvProblem pooled_convolution(const ConvReluPoolProblem& f) {
  ConvProblem p;
  p.dtype = f.conv.dtype, p.layout = f.conv.layout;
  p.N = f.conv.N, p.K = f.conv.K, p.C = 1, p.groups = 1;
  p.R = p.S = 1, p.H = p.P = f.U, p.W = p.Q = f.V;
  return p;
}

template <ConvPass pass>
Refusal refuses(const ConvReluPoolProblem& f) {
  if (const Refusal why = refuse_beyond_coordinates(simplified(f.conv))) return why;
  // Windows lie inside z, and their strides are no longer than it.
  if constexpr (pass == ConvPass::bias_gradient)
    return conv_bias_gradient_cuda.refuses(pooled_convolution(f));
  return convolution(pass, f.conv).refuses(f.conv);
}

template <ConvPass pass>
int64_t workspace_bytes(const ConvReluPoolProblem& f) {
  if constexpr (pass == ConvPass::bias_gradient) {
    const ConvProblem p = pooled_convolution(f);
    return whole_lines(p.N * p.K * p.P * p.Q * bytes_of(p.dtype)) +
           conv_bias_gradient_cuda.workspace_bytes(p);
  }
  const bool in_place = pass == ConvPass::forward && !f.pooled;
  const ConvReluPoolProblem band =
      pass == ConvPass::weight_gradient || in_place ? f : band_of(f, band_images(f));
  int64_t bytes = convolution(pass, f.conv).workspace_bytes(band.conv);
  // The last band may be smaller, and a smaller problem may be split more.
  if (band.conv.N > 0 && f.conv.N % band.conv.N != 0) {
    const int64_t last = convolution(pass, f.conv).workspace_bytes(band_of(f, f.conv.N % band.conv.N).conv);
    bytes = last > bytes ? last : bytes;
  }
  return (in_place ? 0 : whole_lines(z_bytes(band))) + bytes;
}

int launch_forward(const ConvReluPoolProblem& f, const ConvReluPoolTensors& t, void* workspace,
                   void* stream) {
  const ConvCudaKernel& kernel = convolution(ConvPass::forward, f.conv);
  ConvTensors c;
  c.w = t.w, c.bias = t.bias;
  if (!f.pooled) {
    c.x = t.x, c.y = t.y;
    const int error = kernel.launch(f.conv, c, workspace, stream);
    return error != launch_ok ? error : launch_pool(f, t.y, t.y, nullptr, stream);
  }
  const int64_t element = bytes_of(f.conv.dtype), of_x = f.conv.C * f.conv.H * f.conv.W;
  const int64_t of_y = f.conv.K * f.U * f.V, of_arg = f.wide_arg() ? 4 : 1;
  return for_bands(f, [&](const ConvReluPoolProblem& band, int64_t n) {
    c.x = moved(t.x, n * of_x * element);
    c.y = workspace;
    const int error = kernel.launch(band.conv, c, moved(workspace, whole_lines(z_bytes(band))), stream);
    if (error != launch_ok) return error;
    return launch_pool(band, workspace, moved(t.y, n * of_y * element),
                       f.with_arg ? moved(t.arg, n * of_y * of_arg) : nullptr, stream);
  });
}

int launch_input_gradient(const ConvReluPoolProblem& f, const ConvReluPoolTensors& t, void* workspace,
                          void* stream) {
  const ConvCudaKernel& kernel = convolution(ConvPass::input_gradient, f.conv);
  const int64_t element = bytes_of(f.conv.dtype), of_x = f.conv.C * f.conv.H * f.conv.W;
  const int64_t of_y = f.conv.K * f.U * f.V, of_kept = !f.pooled ? element : f.wide_arg() ? 4 : 1;
  ConvTensors c;
  c.w = t.w;
  return for_bands(f, [&](const ConvReluPoolProblem& band, int64_t n) {
    const int error =
        launch_open(band, moved(t.gy, n * of_y * element),
                    moved(static_cast<const void*>(t.arg), n * of_y * of_kept), workspace, stream);
    if (error != launch_ok) return error;
    c.gy = workspace;
    c.gx = moved(t.gx, n * of_x * element);
    return kernel.launch(band.conv, c, moved(workspace, whole_lines(z_bytes(band))), stream);
  });
}

int launch_weight_gradient(const ConvReluPoolProblem& f, const ConvReluPoolTensors& t, void* workspace,
                           void* stream) {
  const int error = launch_open(f, t.gy, t.arg, workspace, stream);
  if (error != launch_ok) return error;
  ConvTensors c;
  c.x = t.x, c.gy = workspace, c.gw = t.gw;
  return convolution(ConvPass::weight_gradient, f.conv)
      .launch(f.conv, c, moved(workspace, whole_lines(z_bytes(f))), stream);
}

int launch_bias_gradient(const ConvReluPoolProblem& f, const ConvReluPoolTensors& t, void* workspace,
                         void* stream) {
  const int error = launch_mask(f, t.gy, t.arg, workspace, stream);
  if (error != launch_ok) return error;
  const ConvProblem p = pooled_convolution(f);
  ConvTensors c;
  c.gy = workspace, c.gb = t.gb;
  return conv_bias_gradient_cuda.launch(
      p, c, moved(workspace, whole_lines(p.N * p.K * p.P * p.Q * bytes_of(p.dtype))), stream);
}

}  // namespace

extern const ConvReluPoolCudaKernel conv_relu_pool_forward_cuda, conv_relu_pool_input_gradient_cuda,
    conv_relu_pool_weight_gradient_cuda, conv_relu_pool_bias_gradient_cuda;
const ConvReluPoolCudaKernel conv_relu_pool_forward_cuda = {
    "composed_generic", 80, 0, refuses<ConvPass::forward>, workspace_bytes<ConvPass::forward>,
    launch_forward};
const ConvReluPoolCudaKernel conv_relu_pool_input_gradient_cuda = {
    "composed_generic",   80, 0, refuses<ConvPass::input_gradient>, workspace_bytes<ConvPass::input_gradient>,
    launch_input_gradient};
const ConvReluPoolCudaKernel conv_relu_pool_weight_gradient_cuda = {
    "composed_generic",
    80,
    0,
    refuses<ConvPass::weight_gradient>,
    workspace_bytes<ConvPass::weight_gradient>,
    launch_weight_gradient};
const ConvReluPoolCudaKernel conv_relu_pool_bias_gradient_cuda = {
    "bias_generic",      80, 0, refuses<ConvPass::bias_gradient>, workspace_bytes<ConvPass::bias_gradient>,
    launch_bias_gradient};

}  // namespace pyseqnet
