// Bias gradient: gb[k] = sum of gy over images and pixels. One pass over gy at the speed of memory.
//
// NCHW sums planes, lanes are pixels; NHWC sums pixels, lanes are filters. Sums are cut into blocks, which
// keeps float sums accurate, and into a fixed number of chunks where filters alone are too few to share out;
// a second phase adds the chunks in order.
#include "common/cpu_work.h"
#include "conv/conv_stage.h"

namespace pyseqnet {
inline namespace PYSEQNET_ISA {
namespace conv {
namespace bias {

constexpr int64_t ENOUGH_ITEMS = 16;
constexpr int64_t CHUNK_ELEMENTS = 64 * 1024;  // a chunk worth having
constexpr int64_t GRAIN_ELEMENTS = 128 * 1024;
constexpr int64_t BLOCK = 256;     // vectors or pixels added before a sum goes to the next level
constexpr int64_t LANE_BLOCK = 4;  // vectors of filters of an NHWC item

struct Sizes {
  bool planar;
  int64_t places;         // items of a chunk: filters, or blocks of filters
  int64_t parts, chunks;  // images or pixels, and in how many chunks
  int64_t pixels;         // of an image
};
Sizes sizes(const ConvProblem& p) {
  Sizes z;
  z.pixels = p.P * p.Q;
  z.planar = p.layout == Layout::nchw && z.pixels > 1;
  z.places = z.planar ? p.K : ceil_div(p.K, LANE_BLOCK * VL);
  z.parts = z.planar ? p.N : p.N * z.pixels;
  const int64_t elements = p.N * p.K * z.pixels;
  z.chunks =
      z.places > 0 && z.places < ENOUGH_ITEMS
          ? larger(1, smaller(smaller(ceil_div(ENOUGH_ITEMS, z.places), z.parts), elements / CHUNK_ELEMENTS))
          : 1;
  return z;
}

template <class T>
float plane_sum(const T* p, int64_t count) {
  vf total{};
  for (int64_t i = 0; i < count;) {
    const int64_t end = smaller(count, i + BLOCK * VL);
    vf a{}, b{}, c{}, d{};
    for (; i + 4 * VL <= end; i += 4 * VL) {
      a += load_lanes(p + i);
      b += load_lanes(p + i + VL);
      c += load_lanes(p + i + 2 * VL);
      d += load_lanes(p + i + 3 * VL);
    }
    for (; i < end; i += VL) a += load_between(p + i, 0, end - i, vf{});
    total += (a + b) + (c + d);
  }
  return hsum(total);
}

// The next `vectors` vectors of filters, or the last one, of which n lanes exist.
template <int vectors, class T>
PYSEQNET_INLINE void pixel_sums_of(const T* p, int64_t stride, int64_t pixels, int64_t n, float* to) {
  vf total[vectors] = {};
  for (int64_t e = 0; e < pixels;) {
    const int64_t end = smaller(pixels, e + BLOCK);
    vf sum[vectors] = {};
    for (; e < end; ++e)
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) sum[v] += load_between(p + e * stride + v * VL, 0, n - v * VL, vf{});
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) total[v] += sum[v];
  }
#pragma GCC unroll 4
  for (int v = 0; v < vectors; ++v) store_lanes_n(to + v * VL, total[v], n - v * VL);
}
template <class T>
void pixel_sums(const T* p, int64_t stride, int64_t pixels, int64_t filters, float* to) {
  if (filters == LANE_BLOCK * VL) return pixel_sums_of<LANE_BLOCK>(p, stride, pixels, LANE_BLOCK * VL, to);
  for (int64_t f = 0; f < filters; f += VL)
    pixel_sums_of<1>(p + f, stride, pixels, smaller(VL, filters - f), to + f);
}

template <class T>
void run_as(const ConvProblem& p, const ConvTensors& t, const WorkSlice& slice) {
  const Sizes z = sizes(p);
  const T* gy = static_cast<const T*>(t.gy);
  T* gb = static_cast<T*>(t.gb);
  float* shared = reinterpret_cast<float*>(slice.shared);  // [chunk][filter]
  if (slice.phase == 1) {
    for (int64_t k = slice.begin; k < slice.end; ++k) {
      float sum = 0;
      for (int64_t chunk = 0; chunk < z.chunks; ++chunk) sum += shared[chunk * p.K + k];
      round_to(gb[k], sum);
    }
    return;
  }
  for (int64_t item = slice.begin; item < slice.end; ++item) {
    const int64_t place = item % z.places, chunk = item / z.places;
    const int64_t first = z.parts * chunk / z.chunks, last = z.parts * (chunk + 1) / z.chunks;
    float sums[LANE_BLOCK * VL];
    int64_t filter = place, filters = 1;
    if (z.planar) {
      sums[0] = 0;
      for (int64_t n = first; n < last; ++n)
        sums[0] += plane_sum(gy + (n * p.K + filter) * z.pixels, z.pixels);
    } else {
      filter = place * LANE_BLOCK * VL;
      filters = smaller(LANE_BLOCK * VL, p.K - filter);
      pixel_sums(gy + first * p.K + filter, p.K, last - first, filters, sums);
    }
    for (int64_t i = 0; i < filters; ++i) {
      if (z.chunks == 1)
        round_to(gb[filter + i], sums[i]);
      else
        shared[chunk * p.K + filter + i] = sums[i];
    }
  }
}

Refusal refuses(const ConvProblem& p) {
  return p.dtype == DType::f64 ? "computes in float, not double" : accepted;
}

WorkPlan plan(const ConvProblem& p) {
  const Sizes z = sizes(p);
  const int64_t items = z.places * z.chunks, elements = p.N * p.K * z.pixels;
  WorkPlan plan;
  plan.add_phase(items, larger(1, GRAIN_ELEMENTS * items / larger(1, elements)));
  if (z.chunks > 1) {
    plan.add_phase(p.K, GRAIN_ELEMENTS / z.chunks);
    plan.shared_bytes = z.chunks * p.K * int64_t(sizeof(float));
  }
  return plan;
}

void run(const ConvProblem& p, const ConvTensors& t, const WorkSlice& slice) {
  switch (p.dtype) {
    case DType::f32:
      return run_as<float>(p, t, slice);
    case DType::bf16:
      return run_as<bfloat16>(p, t, slice);
    case DType::f16:
      return run_as<float16>(p, t, slice);
    case DType::f64:
      return;  // refused
  }
}

}  // namespace bias
}  // namespace conv

extern const ConvCpuKernel conv_bias_gradient;
const ConvCpuKernel conv_bias_gradient = {"bias_" PYSEQNET_ISA_NAME, this_isa, conv::bias::refuses,
                                          conv::bias::plan, conv::bias::run};

}  // namespace PYSEQNET_ISA
}  // namespace pyseqnet
