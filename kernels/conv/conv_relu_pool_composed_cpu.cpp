// The fused block composed of the convolution family's own kernels and one more step: every stride, padding,
// dilation, group count, layout and window.
//
//   forward           conv -> z in the workspace; maximum of ReLU(z) over windows -> y, arg
//   input gradient    gy and arg -> gradient of z in the workspace; conv's input gradient
//   weight gradient   the same; conv's weight gradient
//   bias gradient     the sum of gy over the open windows, directly
//
// Which convolution kernel runs is its own table's answer (Winograd, 16-bit dot products, depthwise ...), so
// this is the kernel of choice where the convolution outweighs the traffic of z: many input channels. Without
// pooling, z is y, and ReLU happens in place. Only y and arg survive the call; z lives in the workspace.
//
// Bound: the convolution's; the steps are one read and one write of z.
#include "conv/relu_pool.h"

namespace pyseqnet {
inline namespace PYSEQNET_ISA {
namespace relu_pool {

constexpr int64_t GRAIN_ELEMENTS = 20 * 1000;  // elements of z that are worth a thread
constexpr int64_t FLAT_ELEMENTS = 4096;        // of an item where the order of elements does not matter

// ---- the convolution

// The first kernel of the convolution's own table that takes the problem. A copy for one instruction set uses
// none above it, but the widest one also uses its extensions.
const ConvCpuKernel& convolution(ConvPass pass, const ConvProblem& p) {
  const Table<ConvCpuKernel> table = conv_cpu_table(pass);
  const Isa most = this_isa == Isa::avx512 ? Isa::avx512bf16 : this_isa, best = best_isa();
  int i = 0;
  while (i < table.count - 1 && (table.kernels[i]->isa > most || table.kernels[i]->isa > best ||
                                 table.kernels[i]->refuses(p) != accepted))
    ++i;
  return *table.kernels[i];  // the last, the reference, takes everything
}

// ---- steps

enum class Step { pool, relu, open };

int64_t z_elements(const ConvProblem& p) { return p.N * p.K * p.P * p.Q; }
bool planar(const ConvProblem& p) { return p.layout == Layout::nchw; }

int64_t step_items(const ConvReluPoolProblem& f) {
  const ConvProblem& p = f.conv;
  if (!f.pooled) return (z_elements(p) + FLAT_ELEMENTS - 1) / FLAT_ELEMENTS;
  return planar(p) ? p.N * p.K : p.N * p.P;
}
void add_step(const ConvReluPoolProblem& f, int64_t items, WorkPlan& plan) {
  const int64_t elements = z_elements(f.conv);
  plan.add_phase(items, elements > 0 ? 1 + GRAIN_ELEMENTS * items / elements : 1);
}

// One plane of z -> one plane of y. Lanes are windows of a row.
template <class T, class Tap>
void pool_plane(const ConvReluPoolProblem& f, const T* z, T* y, Tap* arg) {
  for (int64_t u = 0; u < f.U; ++u)
    for (int64_t v = 0; v < f.V; v += VL) {
      const int64_t lanes = f.V - v;
      const T* row = z + u * f.pool_stride_h * f.conv.Q + v * f.pool_stride_w;
      Winner winner(f.closed());
      int32_t tap = 0;
      for (int64_t i = 0; i < f.pool_h; ++i, row += f.conv.Q)
        for (int64_t j = 0; j < f.pool_w; ++j)
          winner.consider(load_every(row + j, f.pool_stride_w, lanes), tap++);
      store_lanes_n(y + u * f.V + v, winner.best, lanes);
      if (arg) store_taps(arg + u * f.V + v, winner.tap, lanes);
    }
}

// One row of windows of a channels-last image. Lanes are channels.
template <class T, class Tap>
void pool_row(const ConvReluPoolProblem& f, const T* z, T* y, Tap* arg) {
  const int64_t K = f.conv.K;
  for (int64_t v = 0; v < f.V; ++v)
    for (int64_t k = 0; k < K; k += VL) {
      Winner winner(f.closed());
      int32_t tap = 0;
      for (int64_t i = 0; i < f.pool_h; ++i)
        for (int64_t j = 0; j < f.pool_w; ++j)
          winner.consider(load_lanes_n(z + (i * f.conv.Q + v * f.pool_stride_w + j) * K + k, K - k), tap++);
      store_lanes_n(y + v * K + k, winner.best, K - k);
      if (arg) store_taps(arg + v * K + k, winner.tap, K - k);
    }
}

// One plane of the gradient of z, from one plane of gy. `plane` are P * Q floats: where T is float, the
// result itself.
template <class T, class Tap>
void open_plane(const ConvReluPoolProblem& f, const T* gy, const Tap* arg, float* plane, T* z) {
  const ConvProblem& p = f.conv;
  const int64_t pixels = p.P * p.Q, closed = f.closed();
  for (int64_t e = 0; e < pixels; e += VL) store_lanes_n(plane + e, vf{}, pixels - e);
  const bool disjoint = f.disjoint(), narrow = sizeof(Tap) == 1;
  // Where a tap lies. Closed windows, and taps that no forward pass wrote, add nothing to the first pixel.
  int32_t offsets[256] = {};
  for (int64_t tap = 0; narrow && tap < closed; ++tap)
    offsets[tap] = int32_t(tap / f.pool_w * p.Q + tap % f.pool_w);
  for (int64_t u = 0; u < f.U; ++u) {
    float* corner = plane + u * f.pool_stride_h * p.Q;
    for (int64_t v = 0; v < f.V; ++v, corner += f.pool_stride_w) {
      const int64_t tap = arg[u * f.V + v];
      const bool open = uint64_t(tap) < uint64_t(closed);
      const float g = open ? to_float(gy[u * f.V + v]) : 0.0f;
      float& to = corner[narrow ? offsets[tap] : open ? tap / f.pool_w * p.Q + tap % f.pool_w : 0];
      to = disjoint ? g : to + g;
    }
  }
  if ((const void*)plane != (const void*)z)
    for (int64_t e = 0; e < pixels; e += VL)
      store_lanes_n(z + e, load_lanes_n(plane + e, pixels - e), pixels - e);
}

// Row `row` of a channels-last gradient of z: every pixel asks the windows that cover it.
template <class T, class Tap>
void open_row(const ConvReluPoolProblem& f, const T* gy, const Tap* arg, int64_t row, T* z) {
  const int64_t K = f.conv.K;
  const Covering us = covering(row, f.pool_h, f.pool_stride_h, f.U);
  for (int64_t q = 0; q < f.conv.Q; ++q) {
    const Covering vs = covering(q, f.pool_w, f.pool_stride_w, f.V);
    for (int64_t k = 0; k < K; k += VL) {
      vf sum = {};
      for (int64_t u = us.first; u <= us.last; ++u)
        for (int64_t v = vs.first; v <= vs.last; ++v) {
          const int64_t at = (u * f.V + v) * K + k;
          const int32_t tap = int32_t((row - u * f.pool_stride_h) * f.pool_w + q - v * f.pool_stride_w);
          const vf g = load_lanes_n(gy + at, K - k);
          sum += load_taps(arg + at, K - k) == tap ? g : vf{};
        }
      store_lanes_n(z + q * K + k, sum, K - k);
    }
  }
}

// z = ReLU(z), or z = gy where y is open.
template <class T>
void relu_range(T* z, int64_t count) {
  for (int64_t e = 0; e < count; e += VL)
    store_lanes_n(z + e, relu(load_lanes_n(z + e, count - e)), count - e);
}
template <class T>
void open_range(const T* gy, const T* y, T* z, int64_t count) {
  for (int64_t e = 0; e < count; e += VL) {
    const vf g = load_lanes_n(gy + e, count - e);
    store_lanes_n(z + e, load_lanes_n(y + e, count - e) <= vf{} ? vf{} : g, count - e);
  }
}

template <class T, class Tap>
void pool_items(const ConvReluPoolProblem& f, const ConvReluPoolTensors& t, const T* z, int64_t begin,
                int64_t end) {
  const ConvProblem& p = f.conv;
  const Strides ys = f.y_strides();
  T* y = static_cast<T*>(t.y);
  Tap* arg = f.with_arg ? static_cast<Tap*>(t.arg) : nullptr;
  for (int64_t item = begin; item < end; ++item) {
    if (planar(p)) {
      const int64_t to = item * ys.c;
      pool_plane(f, z + item * p.P * p.Q, y + to, arg ? arg + to : nullptr);
      continue;
    }
    const int64_t n = item / p.P, u = item % p.P;  // items are rows of z, of which U begin a window
    if (u >= f.U) continue;
    const int64_t to = n * ys.n + u * ys.h;
    pool_row(f, z + (n * p.P + u * f.pool_stride_h) * p.Q * p.K, y + to, arg ? arg + to : nullptr);
  }
}

template <class T, class Tap>
void open_items(const ConvReluPoolProblem& f, const ConvReluPoolTensors& t, T* z, int64_t begin, int64_t end,
                float* scratch) {
  const ConvProblem& p = f.conv;
  const Strides ys = f.y_strides();
  const T* gy = static_cast<const T*>(t.gy);
  const Tap* arg = static_cast<const Tap*>(t.arg);
  for (int64_t item = begin; item < end; ++item) {
    if (planar(p)) {
      T* to = z + item * p.P * p.Q;
      open_plane(f, gy + item * ys.c, arg + item * ys.c, sizeof(T) == sizeof(float) ? (float*)to : scratch,
                 to);
      continue;
    }
    const int64_t n = item / p.P;
    open_row(f, gy + n * ys.n, arg + n * ys.n, item % p.P, z + item * p.Q * p.K);
  }
}

void run_step(Step step, const ConvReluPoolProblem& f, const ConvReluPoolTensors& t, void* workspace,
              const WorkSlice& slice) {
  with_types(f, [&](auto element, auto tap) PYSEQNET_LAMBDA {
    using T = decltype(element);
    using Tap = decltype(tap);
    T* z = static_cast<T*>(workspace);
    const int64_t first = slice.begin * FLAT_ELEMENTS, elements = z_elements(f.conv);
    const int64_t last = slice.end * FLAT_ELEMENTS < elements ? slice.end * FLAT_ELEMENTS : elements;
    if (step == Step::relu)
      relu_range(static_cast<T*>(t.y) + first, last - first);
    else if (step == Step::pool)
      pool_items<T, Tap>(f, t, z, slice.begin, slice.end);
    else if (f.pooled)
      open_items<T, Tap>(f, t, z, slice.begin, slice.end, reinterpret_cast<float*>(slice.scratch));
    else
      open_range(static_cast<const T*>(t.gy) + first, static_cast<const T*>(t.arg) + first, z + first,
                 last - first);
  });
}

// ---- passes

int64_t z_bytes(const ConvReluPoolProblem& f) {
  return align_up(z_elements(f.conv) * bytes_of(f.conv.dtype));
}
void add_convolution(const WorkPlan& inner, int64_t before, WorkPlan& plan) {
  for (int i = 0; i < inner.phases; ++i) plan.add_phase(inner.phase[i].items, inner.phase[i].grain);
  plan.shared_bytes = before + inner.shared_bytes;
  plan.thread_bytes = inner.thread_bytes > plan.thread_bytes ? inner.thread_bytes : plan.thread_bytes;
}

WorkPlan plan_forward(const ConvReluPoolProblem& f) {
  WorkPlan plan;
  add_convolution(convolution(ConvPass::forward, f.conv).plan(f.conv), f.pooled ? z_bytes(f) : 0, plan);
  add_step(f, step_items(f), plan);
  return plan;
}
void run_forward(const ConvReluPoolProblem& f, const ConvReluPoolTensors& t, const WorkSlice& slice) {
  const ConvCpuKernel& conv = convolution(ConvPass::forward, f.conv);
  const int64_t before = f.pooled ? z_bytes(f) : 0;
  if (slice.phase == conv.plan(f.conv).phases)
    return run_step(f.pooled ? Step::pool : Step::relu, f, t, slice.shared, slice);
  ConvTensors c;
  c.x = t.x, c.w = t.w, c.bias = t.bias;
  c.y = f.pooled ? slice.shared : t.y;
  conv.run(f.conv, c, {slice.phase, slice.begin, slice.end, slice.shared + before, slice.scratch});
}

template <ConvPass pass>
WorkPlan plan_gradient(const ConvReluPoolProblem& f) {
  WorkPlan plan;
  add_step(f, step_items(f), plan);
  if (f.pooled && planar(f.conv) && f.conv.dtype != DType::f32)
    plan.thread_bytes = f.conv.P * f.conv.Q * int64_t(sizeof(float));
  add_convolution(convolution(pass, f.conv).plan(f.conv), z_bytes(f), plan);
  return plan;
}
template <ConvPass pass>
void run_gradient(const ConvReluPoolProblem& f, const ConvReluPoolTensors& t, const WorkSlice& slice) {
  if (slice.phase == 0) return run_step(Step::open, f, t, slice.shared, slice);
  ConvTensors c;
  c.x = t.x, c.w = t.w, c.gx = t.gx, c.gw = t.gw;
  c.gy = slice.shared;
  convolution(pass, f.conv)
      .run(f.conv, c, {slice.phase - 1, slice.begin, slice.end, slice.shared + z_bytes(f), slice.scratch});
}

// ---- the bias gradient: an item is one filter (planar) or VL of them (channels-last). Sums of images are
// float, their total is a double: as exact as pairwise sums, and as fast.

int64_t bias_items(const ConvProblem& p) { return planar(p) ? p.K : (p.K + VL - 1) / VL; }

template <class T, class Open>
void bias_sums(const ConvReluPoolProblem& f, const T* gy, T* gb, int64_t begin, int64_t end, Open&& open) {
  const ConvProblem& p = f.conv;
  const int64_t pixels = f.U * f.V, K = p.K;
  for (int64_t item = begin; item < end; ++item) {
    if (planar(p)) {
      double total = 0;
      for (int64_t n = 0; n < p.N; ++n) {
        vf sum = {};
        for (int64_t e = 0, at = (n * K + item) * pixels; e < pixels; e += VL) {
          const vf g = load_lanes_n(gy + at + e, pixels - e);
          sum += open(at + e, pixels - e) ? g : vf{};
        }
        total += double(hsum(sum));
      }
      round_to(gb[item], float(total));
      continue;
    }
    const int64_t k = item * VL, lanes = K - k < VL ? K - k : VL;
    double total[VL] = {};
    for (int64_t n = 0; n < p.N; ++n) {
      vf sum = {};
      for (int64_t e = 0; e < pixels; ++e) {
        const int64_t at = (n * pixels + e) * K + k;
        const vf g = load_lanes_n(gy + at, lanes);
        sum += open(at, lanes) ? g : vf{};
      }
      for (int64_t l = 0; l < lanes; ++l) total[l] += double(sum[l]);
    }
    for (int64_t l = 0; l < lanes; ++l) round_to(gb[k + l], float(total[l]));
  }
}

WorkPlan plan_bias(const ConvReluPoolProblem& f) {
  WorkPlan plan;
  const int64_t items = bias_items(f.conv), elements = f.conv.N * f.conv.K * f.U * f.V;
  plan.add_phase(items, elements > 0 ? 1 + GRAIN_ELEMENTS * items / elements : 1);
  return plan;
}
void run_bias(const ConvReluPoolProblem& f, const ConvReluPoolTensors& t, const WorkSlice& slice) {
  with_types(f, [&](auto element, auto tap) PYSEQNET_LAMBDA {
    using T = decltype(element);
    const T* gy = static_cast<const T*>(t.gy);
    T* gb = static_cast<T*>(t.gb);
    if (f.pooled) {
      const auto* arg = static_cast<const decltype(tap)*>(t.arg);
      const int32_t closed = int32_t(f.closed());
      bias_sums(f, gy, gb, slice.begin, slice.end,
                [&](int64_t at, int64_t n) PYSEQNET_LAMBDA { return load_taps(arg + at, n) < closed; });
    } else {
      const T* y = static_cast<const T*>(t.arg);
      bias_sums(f, gy, gb, slice.begin, slice.end,
                [&](int64_t at, int64_t n) PYSEQNET_LAMBDA { return ~(load_lanes_n(y + at, n) <= vf{}); });
    }
  });
}

Refusal refuses(const ConvReluPoolProblem& f) {
  return f.conv.dtype == DType::f64 ? "computes in float, not double" : accepted;
}

}  // namespace relu_pool

extern const ConvReluPoolCpuKernel conv_relu_pool_composed_forward, conv_relu_pool_composed_input_gradient,
    conv_relu_pool_composed_weight_gradient, conv_relu_pool_bias_gradient;
const ConvReluPoolCpuKernel conv_relu_pool_composed_forward = {"composed_" PYSEQNET_ISA_NAME, this_isa,
                                                               relu_pool::refuses, relu_pool::plan_forward,
                                                               relu_pool::run_forward};
const ConvReluPoolCpuKernel conv_relu_pool_composed_input_gradient = {
    "composed_" PYSEQNET_ISA_NAME, this_isa, relu_pool::refuses,
    relu_pool::plan_gradient<ConvPass::input_gradient>, relu_pool::run_gradient<ConvPass::input_gradient>};
const ConvReluPoolCpuKernel conv_relu_pool_composed_weight_gradient = {
    "composed_" PYSEQNET_ISA_NAME, this_isa, relu_pool::refuses,
    relu_pool::plan_gradient<ConvPass::weight_gradient>, relu_pool::run_gradient<ConvPass::weight_gradient>};
const ConvReluPoolCpuKernel conv_relu_pool_bias_gradient = {
    "bias_" PYSEQNET_ISA_NAME, this_isa, relu_pool::refuses, relu_pool::plan_bias, relu_pool::run_bias};

}  // namespace PYSEQNET_ISA
}  // namespace pyseqnet
