// The oracle of max-pooling: the formula of max_pool.h in plain loops, for every dtype, layout and window. It
// is also the kernel that serves what the fast ones refuse.
//
//   forward   compares in double (widening is exact) and copies the winner's bits: y holds elements of x,
//             nothing is ever rounded.
//   backward  adds a plane's gradients in double, in the row-major order of the windows, and rounds the sum.
//   indices   tap -> h*W + w.
//
// One item is one plane of one image: planes share nothing, so any split gives the same bits.
#include <limits>

#include "common/numerics.h"
#include "pool/max_pool.h"

namespace pyseqnet {
namespace {

// The tap that a window reports before anything was compared: its first tap inside the image. A window that
// jumps over the whole image (dilation wider than the image) has none; like torch it then names the first
// tap that is not before the image, which lies behind it.
int64_t first_tap(int64_t start, int64_t dilation, int64_t taps) {
  int64_t t = 0;
  while (t + 1 < taps && start + t * dilation < 0) t++;
  return t;
}

// One plane of one image: where its elements begin and how far apart they are.
struct Plane {
  int64_t x, y;    // element offsets
  int64_t xh, xw;  // strides of x
  int64_t yh, yw;  // strides of y, gy, arg and indices
};
Plane plane_of(const MaxPoolProblem& p, int64_t item) {
  const int64_t n = item / p.C, c = item % p.C;
  const Strides x = p.x_strides(), y = p.y_strides();
  return {n * x.n + c * x.c, n * y.n + c * y.c, x.h, x.w, y.h, y.w};
}

template <class T, class Tap>
void forward_plane(const MaxPoolProblem& p, const Plane& at, const T* x, T* y, Tap* arg) {
  constexpr double lowest = -std::numeric_limits<double>::infinity();
  for (int64_t i = 0; i < p.P; i++)
    for (int64_t j = 0; j < p.Q; j++) {
      const int64_t h0 = i * p.stride_h - p.pad_h, w0 = j * p.stride_w - p.pad_w;
      int64_t tap = first_tap(h0, p.dilation_h, p.R) * p.S + first_tap(w0, p.dilation_w, p.S);
      T winner;
      round_to(winner, lowest);
      double best = lowest;
      for (int64_t r = 0; r < p.R; r++)
        for (int64_t s = 0; s < p.S; s++) {
          const int64_t h = h0 + r * p.dilation_h, w = w0 + s * p.dilation_w;
          if (h < 0 || h >= p.H || w < 0 || w >= p.W) continue;
          const T candidate = x[at.x + h * at.xh + w * at.xw];
          const double value = to_double(candidate);
          if (value > best || value != value) best = value, winner = candidate, tap = r * p.S + s;
        }
      const int64_t o = at.y + i * at.yh + j * at.yw;
      y[o] = winner;
      if (arg) arg[o] = Tap(tap);
    }
}

template <class T, class Tap>
void backward_plane(const MaxPoolProblem& p, const Plane& at, const T* gy, const Tap* arg, T* gx,
                    double* sum) {
  for (int64_t k = 0; k < p.H * p.W; k++) sum[k] = 0;
  for (int64_t i = 0; i < p.P; i++)
    for (int64_t j = 0; j < p.Q; j++) {
      const int64_t o = at.y + i * at.yh + j * at.yw;
      const int64_t h = i * p.stride_h - p.pad_h + arg[o] / p.S * p.dilation_h;
      const int64_t w = j * p.stride_w - p.pad_w + arg[o] % p.S * p.dilation_w;
      if (h >= 0 && h < p.H && w >= 0 && w < p.W) sum[h * p.W + w] += to_double(gy[o]);
    }
  for (int64_t h = 0; h < p.H; h++)
    for (int64_t w = 0; w < p.W; w++) round_to(gx[at.x + h * at.xh + w * at.xw], sum[h * p.W + w]);
}

template <class Tap>
void indices_plane(const MaxPoolProblem& p, const Plane& at, const Tap* arg, int64_t* indices) {
  for (int64_t i = 0; i < p.P; i++)
    for (int64_t j = 0; j < p.Q; j++) {
      const int64_t o = at.y + i * at.yh + j * at.yw;
      const int64_t h = i * p.stride_h - p.pad_h + arg[o] / p.S * p.dilation_h;
      const int64_t w = j * p.stride_w - p.pad_w + arg[o] % p.S * p.dilation_w;
      indices[o] = h * p.W + w;
    }
}

// Calls f(T{}, Tap{}) for the element and tap types of the problem.
template <class F>
void with_types(const MaxPoolProblem& p, F f) {
  const auto with_tap = [&](auto element) { p.wide_arg() ? f(element, int32_t{}) : f(element, uint8_t{}); };
  switch (p.dtype) {
    case DType::f32:
      return with_tap(float{});
    case DType::f64:
      return with_tap(double{});
    case DType::bf16:
      return with_tap(bfloat16{});
    case DType::f16:
      return with_tap(float16{});
  }
}

Refusal refuses(const MaxPoolProblem&) { return accepted; }

// About 20 microseconds of windows, at roughly 2 ns a tap.
WorkPlan plan_planes(const MaxPoolProblem& p, int64_t taps) {
  constexpr int64_t taps_worth_a_thread = 10000;
  const int64_t work = p.P * p.Q * taps + p.H * p.W;
  WorkPlan plan;
  plan.add_phase(p.N * p.C, work > 0 && work < taps_worth_a_thread ? taps_worth_a_thread / work : 1);
  return plan;
}
WorkPlan plan_forward(const MaxPoolProblem& p) { return plan_planes(p, p.R * p.S); }
WorkPlan plan_indices(const MaxPoolProblem& p) { return plan_planes(p, 1); }
WorkPlan plan_backward(const MaxPoolProblem& p) {
  WorkPlan plan = plan_planes(p, 1);
  plan.thread_bytes = align_up(p.H * p.W * int64_t(sizeof(double)));
  return plan;
}

void run_forward(const MaxPoolProblem& p, const MaxPoolTensors& t, const WorkSlice& slice) {
  with_types(p, [&](auto element, auto tap) {
    using T = decltype(element);
    using Tap = decltype(tap);
    Tap* arg = p.with_arg ? static_cast<Tap*>(t.arg) : nullptr;
    for (int64_t k = slice.begin; k < slice.end; k++)
      forward_plane(p, plane_of(p, k), static_cast<const T*>(t.x), static_cast<T*>(t.y), arg);
  });
}
void run_backward(const MaxPoolProblem& p, const MaxPoolTensors& t, const WorkSlice& slice) {
  with_types(p, [&](auto element, auto tap) {
    using T = decltype(element);
    using Tap = decltype(tap);
    double* sum = reinterpret_cast<double*>(slice.scratch);
    for (int64_t k = slice.begin; k < slice.end; k++)
      backward_plane(p, plane_of(p, k), static_cast<const T*>(t.gy), static_cast<const Tap*>(t.arg),
                     static_cast<T*>(t.gx), sum);
  });
}
void run_indices(const MaxPoolProblem& p, const MaxPoolTensors& t, const WorkSlice& slice) {
  with_types(p, [&](auto, auto tap) {
    using Tap = decltype(tap);
    for (int64_t k = slice.begin; k < slice.end; k++)
      indices_plane(p, plane_of(p, k), static_cast<const Tap*>(t.arg), t.indices);
  });
}

}  // namespace

extern const MaxPoolCpuKernel max_pool_reference_forward, max_pool_reference_backward,
    max_pool_reference_indices;
const MaxPoolCpuKernel max_pool_reference_forward = {"reference", Isa::portable, refuses, plan_forward,
                                                     run_forward};
const MaxPoolCpuKernel max_pool_reference_backward = {"reference", Isa::portable, refuses, plan_backward,
                                                      run_backward};
const MaxPoolCpuKernel max_pool_reference_indices = {"reference", Isa::portable, refuses, plan_indices,
                                                     run_indices};

}  // namespace pyseqnet
