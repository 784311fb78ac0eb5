// ISA: +avx512bf16
//
// General convolution, forward and input gradient: every stride, padding, dilation and group count, f32, bf16
// and f16, computed in float. Which of two methods runs depends on the layout:
//
//   conv_gemm_planar.h          NCHW; also NHWC with few output channels (lanes are pixels)
//   conv_gemm_channels_last.h   NHWC (lanes are filters)
//
// Phases: filters are packed, unless they can be read where they lie; then the blocks of all correlations
// (conv_geometry.h) are one list of work items. What an item computes depends on the problem only.
#include "conv/conv_gemm_channels_last.h"
#include "conv/conv_gemm_planar.h"

namespace pyseqnet {
inline namespace PYSEQNET_ISA {
namespace conv {

inline bool lanes_are_filters(const Correlation& k) { return k.layout == Layout::nhwc && 2 * k.rows >= VL; }
// Rows of [channel][tap] in float are what a planar NCHW forward is given.
template <ConvPass pass>
bool filters_in_place(const ConvProblem& p) {
  return pass == ConvPass::forward && p.dtype == DType::f32 &&
         (p.filter_layout == Layout::nchw || p.R * p.S == 1);
}

// Items of one correlation, and where its packed filters begin.
struct Part {
  Correlation k;
  bool channels_last;
  PlanarSizes planar;
  ChannelsLastSizes last;

  int64_t items() const { return channels_last ? last.items : planar.items; }
  int64_t pack_items() const {
    return channels_last ? k.groups * last.panels * k.taps() : planar_pack_items(k);
  }
  int64_t packed_floats() const {
    return k.groups * (channels_last ? last.vectors * VL * k.taps() : k.rows * k.tap_words()) * k.depth;
  }
  int64_t scratch_bytes() const {
    return channels_last ? channels_last_scratch(k, last, nullptr).bytes
                         : planar_scratch(k, planar, nullptr).bytes;
  }
};
template <ConvPass pass>
Part part(const ConvProblem& p, int64_t index) {
  Part part;
  part.k = correlation(p, pass, index);
  part.channels_last = lanes_are_filters(part.k);
  if (part.channels_last)
    part.last = channels_last_sizes(part.k);
  else
    part.planar = planar_sizes(part.k);
  return part;
}

template <ConvPass pass>
Refusal refuses(const ConvProblem& p) {
  if (PAIR == 2) {
    if (p.dtype != DType::bf16) return "multiplies pairs of bfloat16";
    const Correlation k = correlation(p, pass, 0);
    if (k.channels < 2 && (p.R * p.S < 2 || lanes_are_filters(k)))
      return "pairs channels, or the taps of one planar channel: there is one of each";
    if (k.layout == Layout::nhwc && !lanes_are_filters(k))
      return "too few channels written for channels-last";
  }
  return p.dtype == DType::f64 ? "computes in float, not double" : accepted;
}

template <ConvPass pass>
WorkPlan plan(const ConvProblem& p) {
  constexpr int64_t pack_grain_floats = 20 * 1000;
  WorkPlan plan;
  int64_t items = 0, pack_items = 0, packed = 0;
  bool channels_last = false;
  for (int64_t i = 0; i < correlation_count(p, pass); ++i) {
    const Part one = part<pass>(p, i);
    channels_last = one.channels_last;
    items += one.items();
    pack_items += one.pack_items();
    packed += one.packed_floats();
    plan.thread_bytes = larger(plan.thread_bytes, one.scratch_bytes());
  }
  if (items == 0) pack_items = 0;
  if (channels_last || !filters_in_place<pass>(p)) {
    plan.shared_bytes = packed * int64_t(sizeof(float));
    plan.add_phase(pack_items, packed > 0 ? larger(1, pack_grain_floats * pack_items / packed) : 1);
  }
  plan.add_phase(items, grain_of(p.flops() / (2 * VL), items));
  return plan;
}

template <ConvPass pass, class T>
void run_part(const Part& part, const float* filters, const ConvTensors& t, int64_t in_elements,
              int64_t begin, int64_t end, std::byte* scratch) {
  constexpr bool forward = pass == ConvPass::forward;
  const T* in = static_cast<const T*>(forward ? t.x : t.gy);
  const T* bias = forward ? static_cast<const T*>(t.bias) : nullptr;
  T* out = static_cast<T*>(forward ? t.y : t.gx);
  if (part.channels_last) {
    ChannelsLast<T> method{
        part.k, part.last, in, filters, bias, out, channels_last_scratch(part.k, part.last, scratch)};
    for (int64_t item = begin; item < end; ++item) method.run_item(item);
  } else {
    Planar<T> method{part.k, part.planar, in,          filters,
                     bias,   out,         in_elements, planar_scratch(part.k, part.planar, scratch)};
    for (int64_t item = begin; item < end; ++item) method.run_item(item);
  }
}

template <ConvPass pass, class T>
void run_as(const ConvProblem& p, const ConvTensors& t, const WorkSlice& slice) {
  const T* w = static_cast<const T*>(t.w);
  float* packed_filters = reinterpret_cast<float*>(slice.shared);
  const int64_t in_elements = pass == ConvPass::forward ? p.N * p.C * p.H * p.W : p.N * p.K * p.P * p.Q;
  int64_t first = 0, packed = 0;  // of this correlation: among the phase's items, among the packed filters
  for (int64_t i = 0; i < correlation_count(p, pass) && first < slice.end; ++i) {
    const Part one = part<pass>(p, i);
    const bool in_place = !one.channels_last && filters_in_place<pass>(p);
    const bool packs = !in_place && slice.phase == 0;
    const int64_t items = packs ? one.pack_items() : one.items();
    const int64_t begin = larger(slice.begin - first, 0), end = smaller(slice.end - first, items);
    if (begin < end) {
      float* shared = in_place ? nullptr : packed_filters + packed;
      if (!packs)
        run_part<pass, T>(one, in_place ? reinterpret_cast<const float*>(w) : shared, t, in_elements, begin,
                          end, slice.scratch);
      else if (one.channels_last)
        pack_channels_last_filters(one.k, one.last, w, shared, begin, end);
      else
        pack_planar_filters(one.k, p.R * p.S, w, shared, begin, end);
    }
    first += items;
    packed += one.packed_floats();
  }
}

template <ConvPass pass>
void run(const ConvProblem& p, const ConvTensors& t, const WorkSlice& slice) {
#if defined(__AVX512BF16__)
  run_as<pass, bfloat16>(p, t, slice);
#else
  switch (p.dtype) {
    case DType::f32:
      return run_as<pass, float>(p, t, slice);
    case DType::bf16:
      return run_as<pass, bfloat16>(p, t, slice);
    case DType::f16:
      return run_as<pass, float16>(p, t, slice);
    case DType::f64:
      return;  // refused
  }
#endif
}

}  // namespace conv

extern const ConvCpuKernel conv_gemm_forward, conv_gemm_input_gradient;
const ConvCpuKernel conv_gemm_forward = {"gemm_" PYSEQNET_ISA_NAME, this_isa,
                                         conv::refuses<ConvPass::forward>, conv::plan<ConvPass::forward>,
                                         conv::run<ConvPass::forward>};
const ConvCpuKernel conv_gemm_input_gradient = {
    "gemm_" PYSEQNET_ISA_NAME, this_isa, conv::refuses<ConvPass::input_gradient>,
    conv::plan<ConvPass::input_gradient>, conv::run<ConvPass::input_gradient>};

}  // namespace PYSEQNET_ISA
}  // namespace pyseqnet
