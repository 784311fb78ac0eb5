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
constexpr int64_t BLOCK_VECTORS = 256;  // of a plane, added before the sum goes to the next level
constexpr int64_t BLOCK_PIXELS =
    64;  // likewise; their rows of filters stay in the first-level cache or near it
constexpr int64_t ROW_VECTORS = 4;  // of filters that are added side by side

struct Sizes {
  bool planar;
  int64_t places;         // items of a chunk: filters, or 1
  int64_t parts, chunks;  // images or pixels, and in how many chunks
  int64_t pixels;         // of an image
};
Sizes sizes(const ConvProblem& p) {
  Sizes z;
  z.pixels = p.P * p.Q;
  z.planar = p.layout == Layout::nchw && z.pixels > 1;
  z.places = z.planar ? p.K : smaller(p.K, 1);
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
    const int64_t end = smaller(count, i + BLOCK_VECTORS * VL);
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

// to[f] += the sum over a few pixels of the next `vectors` vectors of filters, of which n lanes exist.
template <int vectors, class T>
PYSEQNET_INLINE void add_pixels(const T* p, int64_t stride, int64_t pixels, int64_t n, float* to) {
  vf sum[vectors] = {};
  for (int64_t e = 0; e < pixels; ++e)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) sum[v] += load_between(p + e * stride + v * VL, 0, n - v * VL, vf{});
#pragma GCC unroll 4
  for (int v = 0; v < vectors; ++v)
    store_lanes_n(to + v * VL, load_between(to + v * VL, 0, n - v * VL, vf{}) + sum[v], n - v * VL);
}
template <class T>
void pixel_sums(const T* p, int64_t pixels, int64_t filters, float* to) {
  for (int64_t f = 0; f < filters; f += VL) store_lanes_n(to + f, vf{}, filters - f);
  for (int64_t e = 0; e < pixels; e += BLOCK_PIXELS) {
    const T* rows = p + e * filters;
    const int64_t count = smaller(BLOCK_PIXELS, pixels - e);
    int64_t f = 0;
    for (; f + ROW_VECTORS * VL <= filters; f += ROW_VECTORS * VL)
      add_pixels<ROW_VECTORS>(rows + f, filters, count, ROW_VECTORS * VL, to + f);
    for (; f < filters; f += VL) add_pixels<1>(rows + f, filters, count, smaller(VL, filters - f), to + f);
  }
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
    if (z.planar) {
      float sum = 0;
      for (int64_t n = first; n < last; ++n) sum += plane_sum(gy + (n * p.K + place) * z.pixels, z.pixels);
      if (z.chunks == 1)
        round_to(gb[place], sum);
      else
        shared[chunk * p.K + place] = sum;
    } else {
      float* sums = z.chunks == 1 ? reinterpret_cast<float*>(slice.scratch) : shared + chunk * p.K;
      pixel_sums(gy + first * p.K, last - first, p.K, sums);
      if (z.chunks == 1)
        for (int64_t k = 0; k < p.K; ++k) round_to(gb[k], sums[k]);
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
  if (!z.planar && z.chunks == 1) plan.thread_bytes = p.K * int64_t(sizeof(float));
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
