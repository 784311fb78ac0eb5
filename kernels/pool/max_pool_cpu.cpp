// The CPU kernels of max-pooling: which form serves a problem, and what its items are.
//
//   planar (NCHW)          lanes are columns    max_pool_planes.h, max_pool_three.h, max_pool_planes_backward.h
//   channels last (NHWC)   lanes are channels   max_pool_channels.h
// One channel is the same in both layouts and goes the planar way.
//
// Items of the planar forms are bands of rows of a plane, so that one large image still feeds every thread;
// a band computes from the whole plane and writes its own rows only. float64 is left to the reference.
#include "pool/max_pool_channels.h"
#include "pool/max_pool_three.h"

namespace pyseqnet {
inline namespace PYSEQNET_ISA {
namespace {

// gx larger than this is written past the cache: by the time it is read again it would have been evicted, and
// ordinary stores would read every line before overwriting it.
constexpr int64_t streaming_bytes = 4 << 20;
// Elements of output that are one item: enough to hide what a band recomputes, few enough to balance.
constexpr int64_t band_elements = 32 * 1024;
// About 20 microseconds of work in these kernels, in elements times comparisons per element.
constexpr int64_t grain_work = 100 * 1000;

PYSEQNET_INLINE bool planar(const MaxPoolProblem& p) { return p.layout == Layout::nchw || p.C == 1; }
// Whether backward gathers: the windows are small and, with lanes = channels, the lanes are used.
PYSEQNET_INLINE bool gathers(const MaxPoolProblem& p) {
  constexpr int64_t gather_taps = VL > 4 ? 2 * VL : 9;
  if (planar(p)) return small_gradient<float, false>(p) != nullptr;
  return p.R * p.S <= gather_taps && p.C >= VL / 2;
}

// Planes cut into bands of rows.
struct Bands {
  int64_t rows, band, count;  // rows of a plane, rows of a band, bands of a plane
  Bands(int64_t rows_, int64_t columns)
      : rows(rows_), band(larger(1, band_elements / larger(1, columns))), count(ceil_div(rows_, band)) {}
};

Refusal refuses(const MaxPoolProblem& p) {
  if (p.dtype == DType::f64) return "float64 is served by the reference";
  return accepted;
}

WorkPlan plan_items(int64_t items, int64_t work_per_item) {
  WorkPlan plan;
  plan.add_phase(items, larger(1, grain_work / larger(1, work_per_item)));
  return plan;
}

WorkPlan plan_forward(const MaxPoolProblem& p) {
  const int64_t taps = p.R * p.S;
  if (!planar(p)) return plan_items(p.N * p.P, p.Q * p.C * taps);
  const Bands bands(p.P, p.Q);
  WorkPlan plan =
      plan_items(p.N * p.C * bands.count, smaller(p.P, bands.band) * p.Q * smaller(taps, p.R + p.S + 4));
  if (!small_window<float>(p) && !better_along_taps(p)) plan.thread_bytes = RowCache(p, nullptr).bytes;
  return plan;
}

template <class T>
PYSEQNET_INLINE void forward_planes(const MaxPoolProblem& p, const MaxPoolTensors& t,
                                    const WorkSlice& slice) {
  const Bands bands(p.P, p.Q);
  const T* x = static_cast<const T*>(t.x);
  T* y = static_cast<T*>(t.y);
  const Extent<T> all = {x, x + p.N * p.C * p.H * p.W};
  uint8_t* narrow = static_cast<uint8_t*>(t.arg);
  int32_t* wide = static_cast<int32_t*>(t.arg);
  const SmallWindowRows<T> of_three = window_of_three<T>(p), small = of_three ? of_three : small_window<T>(p);
  const bool along_taps = better_along_taps(p);
  for (int64_t item = slice.begin; item < slice.end; item++) {
    const int64_t plane = item / bands.count, i0 = item % bands.count * bands.band;
    const int64_t i1 = smaller(p.P, i0 + bands.band), o = plane * p.P * p.Q;
    const T* image = x + plane * p.H * p.W;
    if (small)
      small(p, image, all, i0, i1, y + o, p.with_arg ? narrow + o : nullptr);
    else if (along_taps && !p.with_arg)
      window_along_taps<T, uint8_t, false>(p, image, all, i0, i1, y + o, nullptr);
    else if (along_taps && p.wide_arg())
      window_along_taps<T, int32_t, true>(p, image, all, i0, i1, y + o, wide + o);
    else if (along_taps)
      window_along_taps<T, uint8_t, true>(p, image, all, i0, i1, y + o, narrow + o);
    else if (!p.with_arg)
      any_window_rows<T, uint8_t, false>(p, image, all, i0, i1, y + o, nullptr, slice.scratch);
    else if (p.wide_arg())
      any_window_rows<T, int32_t, true>(p, image, all, i0, i1, y + o, wide + o, slice.scratch);
    else
      any_window_rows<T, uint8_t, true>(p, image, all, i0, i1, y + o, narrow + o, slice.scratch);
  }
}

void run_forward(const MaxPoolProblem& p, const MaxPoolTensors& t, const WorkSlice& slice) {
  with_element(p.dtype, [&](auto element) PYSEQNET_LAMBDA {
    using T = decltype(element);
    if (planar(p)) return forward_planes<T>(p, t, slice);
    const T* x = static_cast<const T*>(t.x);
    T* y = static_cast<T*>(t.y);
    if (!p.with_arg)
      channel_rows<T, uint8_t, false>(p, x, y, nullptr, slice.begin, slice.end);
    else if (p.wide_arg())
      channel_rows<T, int32_t, true>(p, x, y, static_cast<int32_t*>(t.arg), slice.begin, slice.end);
    else
      channel_rows<T, uint8_t, true>(p, x, y, static_cast<uint8_t*>(t.arg), slice.begin, slice.end);
  });
}

WorkPlan plan_backward(const MaxPoolProblem& p) {
  const int64_t taps_per_pixel = larger(1, p.R * p.S / (p.stride_h * p.stride_w));
  if (!gathers(p)) {
    WorkPlan plan =
        planar(p) ? plan_items(p.N * p.C, p.P * p.Q * 20)
                  : plan_items(p.N * ceil_div(p.C, scatter_block(p)), p.P * p.Q * scatter_block(p) * 20);
    plan.thread_bytes = planar(p) ? scatter_bytes(p) : scatter_channels_bytes(p);
    return plan;
  }
  if (!planar(p)) return plan_items(p.N * p.H, p.W * p.C * (taps_per_pixel + 1));
  const Bands bands(p.H, p.W);
  return plan_items(p.N * p.C * bands.count, smaller(p.H, bands.band) * p.W * (taps_per_pixel + 1));
}

// Whether gx is written past the cache: it is large, and every row (pixel) of it is whole vectors.
template <class T>
PYSEQNET_INLINE bool streams(const MaxPoolProblem& p, const T* gx) {
  const int64_t run = planar(p) ? p.W : p.C;
  return sizeof(T) == 4 && p.N * p.C * p.H * p.W * int64_t(sizeof(T)) > streaming_bytes && run % VL == 0 &&
         reinterpret_cast<uintptr_t>(gx) % sizeof(vf) == 0;
}

template <class T>
PYSEQNET_INLINE void gather_planes(const MaxPoolProblem& p, const MaxPoolTensors& t, const WorkSlice& slice) {
  const Bands bands(p.H, p.W);
  const T* gy = static_cast<const T*>(t.gy);
  const uint8_t* arg = static_cast<const uint8_t*>(t.arg);
  T* gx = static_cast<T*>(t.gx);
  const int64_t windows = p.P * p.Q, pixels = p.H * p.W;
  const Extent<T> all_gy = {gy, gy + p.N * p.C * windows};
  const Extent<uint8_t> all_arg = {arg, arg + p.N * p.C * windows};
  const bool stream = streams(p, gx);
  const SmallGradientRows<T> small = stream ? small_gradient<T, true>(p) : small_gradient<T, false>(p);
  for (int64_t item = slice.begin; item < slice.end; item++) {
    const int64_t plane = item / bands.count, h0 = item % bands.count * bands.band;
    const int64_t h1 = smaller(p.H, h0 + bands.band), o = plane * windows;
    small(p, gy + o, arg + o, all_gy, all_arg, h0, h1, gx + plane * pixels);
  }
  if (stream) end_streaming();
}

template <class T, class Tap, bool checked>
PYSEQNET_INLINE void scatter(const MaxPoolProblem& p, const MaxPoolTensors& t, const WorkSlice& slice) {
  const T* gy = static_cast<const T*>(t.gy);
  const Tap* arg = static_cast<const Tap*>(t.arg);
  T* gx = static_cast<T*>(t.gx);
  if (planar(p))
    scatter_planes<T, Tap, checked>(p, gy, arg, gx, slice.begin, slice.end, slice.scratch);
  else
    scatter_channels<T, Tap, checked>(p, gy, arg, gx, slice.begin, slice.end, slice.scratch);
}

void run_backward(const MaxPoolProblem& p, const MaxPoolTensors& t, const WorkSlice& slice) {
  with_element(p.dtype, [&](auto element) PYSEQNET_LAMBDA {
    using T = decltype(element);
    if (gathers(p)) {
      if (planar(p)) return gather_planes<T>(p, t, slice);
      T* gx = static_cast<T*>(t.gx);
      const bool stream = streams(p, gx);
      (stream ? channel_gradient_rows<T, true>
              : channel_gradient_rows<T, false>)(p, static_cast<const T*>(t.gy),
                                                 static_cast<const uint8_t*>(t.arg), gx, slice.begin,
                                                 slice.end);
      if (stream) end_streaming();
      return;
    }
    const bool checked = !every_window_inside(p);
    if (p.wide_arg())
      checked ? scatter<T, int32_t, true>(p, t, slice) : scatter<T, int32_t, false>(p, t, slice);
    else
      checked ? scatter<T, uint8_t, true>(p, t, slice) : scatter<T, uint8_t, false>(p, t, slice);
  });
}

// Indices: rows of windows, n C P + c P + i (planar) or n P + i.
int64_t rows_of_windows(const MaxPoolProblem& p) { return p.N * p.P * (planar(p) ? p.C : 1); }

// A forged arg may name taps that the window does not have: every value of a byte has an entry in the table.
constexpr int64_t byte_values = 256;

Refusal refuses_indices(const MaxPoolProblem&) { return accepted; }

WorkPlan plan_indices(const MaxPoolProblem& p) {
  WorkPlan plan = plan_items(rows_of_windows(p), p.Q * (planar(p) ? 1 : p.C) * 4);
  plan.thread_bytes = align_up(larger(p.R * p.S, byte_values) * 8);
  return plan;
}

template <class Tap>
void index_rows(const MaxPoolProblem& p, const Tap* arg, int64_t* indices, const WorkSlice& slice) {
  int64_t* offset = reinterpret_cast<int64_t*>(slice.scratch);
  tap_offsets(p, offset);
  const int64_t taps = p.R * p.S;
  for (int64_t t = taps; t < byte_values; t++) offset[t] = 0;
  const int64_t channels = planar(p) ? 1 : p.C;
  arg += slice.begin * p.Q * channels;
  indices += slice.begin * p.Q * channels;
  for (int64_t item = slice.begin; item < slice.end; item++) {
    int64_t base = (item % p.P * p.stride_h - p.pad_h) * p.W - p.pad_w;
    for (int64_t j = 0; j < p.Q; j++, base += p.stride_w)
      for (int64_t c = 0; c < channels; c++) {
        const uint64_t tap = uint64_t(*arg++);
        *indices++ = base + offset[sizeof(Tap) == 1 || tap < uint64_t(taps) ? tap : 0];
      }
  }
}

void run_indices(const MaxPoolProblem& p, const MaxPoolTensors& t, const WorkSlice& slice) {
  if (p.wide_arg())
    index_rows(p, static_cast<const int32_t*>(t.arg), t.indices, slice);
  else
    index_rows(p, static_cast<const uint8_t*>(t.arg), t.indices, slice);
}

}  // namespace

extern const MaxPoolCpuKernel max_pool_forward, max_pool_backward, max_pool_indices;
const MaxPoolCpuKernel max_pool_forward = {PYSEQNET_ISA_NAME, this_isa, refuses, plan_forward, run_forward};
const MaxPoolCpuKernel max_pool_backward = {PYSEQNET_ISA_NAME, this_isa, refuses, plan_backward,
                                            run_backward};
const MaxPoolCpuKernel max_pool_indices = {PYSEQNET_ISA_NAME, this_isa, refuses_indices, plan_indices,
                                           run_indices};

}  // namespace PYSEQNET_ISA
}  // namespace pyseqnet
