// TMA beyond matrices. `conv`: a convolution of an NHWC image as implicit GEMM in bfloat16; the pixels of a
// filter tap come through TMA's im2col mode, wgmma multiplies them, three stages run through an mbarrier ring;
// in the cluster form two blocks share the pixels and each loads half of them for both. `box_copy`: boxes of
// three to five dimensions with steps, read, written back and added. `conv1d`, `conv3d`: im2col of three and
// five dimensions without a product.
#include "faults.h"

namespace pyseqnet::faults {

using bf16 = __nv_bfloat16;
constexpr int pixels_a_block = 64, filters_a_block = 64, channels_a_step = 64, stages = 3, threads = 160;
constexpr unsigned row_bytes = channels_a_step * sizeof(bf16);
constexpr unsigned pixel_bytes = pixels_a_block * row_bytes, filter_bytes = filters_a_block * row_bytes;
constexpr unsigned stage_bytes = pixel_bytes + filter_bytes;

struct Geometry {
  int n, h, w, c, k, r, s, padding, stride, dilation;
  int p() const { return (h + 2 * padding - dilation * (r - 1) - 1) / stride + 1; }
  int q() const { return (w + 2 * padding - dilation * (s - 1) - 1) / stride + 1; }
};
struct ConvParams {
  float* y;  // (n p q, k)
  Geometry g;
  int p, q, fault;
};

template <int cluster>
__global__ void __launch_bounds__(threads)
    conv(const __grid_constant__ ptx::TensorMap map_x, const __grid_constant__ ptx::TensorMap map_w,
         const ConvParams a) {
#if PYSEQNET_SM90A
  PYSEQNET_DYNAMIC_SHARED(unsigned char, shared);
  PYSEQNET_SHARED(uint64_t, bars, [2 * stages]);
  const uint32_t tiles = ptx::smem_u32(shared), full = ptx::smem_u32(bars), empty = full + 8 * stages;
  const Geometry g = a.g;
  const int fault = planted(a.fault);
  const int rank = cluster > 1 ? int(ptx::cluster_rank()) : 0;
  const int first_pixel = int(blockIdx.y) * pixels_a_block, first_filter = int(blockIdx.x) * filters_a_block;
  const int c_steps = g.c / channels_a_step, steps = g.r * g.s * c_steps;
  if (threadIdx.x == 0) {
    for (int s = 0; s < stages; s++) {
      ptx::mbar_init(full + 8 * s, 1);
      ptx::mbar_init(empty + 8 * s, cluster);
    }
    ptx::mbar_fence_init();
  }
  if (cluster > 1)
    ptx::cluster_sync();
  else
    __syncthreads();

  if (threadIdx.x >= 128) {
    constexpr int mine = pixels_a_block / cluster;
    const int pixel = first_pixel + rank * mine;
    const int q = pixel % a.q, p = pixel / a.q % a.p, image = pixel / (a.q * a.p);
    const int w = q * g.stride - (fault == 6 ? 0 : g.padding) + (fault == 3 ? 1 : 0);
    const int h = p * g.stride - g.padding;
    for (int i = 0; i < steps && threadIdx.x == 128; i++) {
      const int s = i % stages, tap = i / c_steps, c = i % c_steps * channels_a_step;
      const uint32_t phase = (i / stages) & 1, to = tiles + s * stage_bytes, bar = full + 8 * s;
      const int spread = fault == 2 ? 1 : g.dilation;
      const uint16_t across = uint16_t(tap % g.s * spread), down = uint16_t(tap / g.s * spread);
      if (fault != 9) ptx::mbar_wait(empty + 8 * s, phase ^ 1);
      ptx::mbar_arrive_expect_tx(bar, fault == 1 ? stage_bytes - row_bytes : stage_bytes);
      if constexpr (cluster == 1)
        ptx::tma_load_im2col(to, &map_x, {c, w, h, image}, {fault == 4 ? uint16_t(256) : across, down}, bar);
      else
        ptx::tma_load_im2col_multicast(to + rank * mine * row_bytes, &map_x, {c, w, h, image}, {across, down},
                                       bar, uint16_t((1 << cluster) - 1));
      ptx::tma_load(to + pixel_bytes, &map_w, {c, tap, first_filter}, bar);
    }
  } else {
    float acc[filters_a_block / 2];
#pragma unroll
    for (int i = 0; i < filters_a_block / 2; i++) acc[i] = 0.f;
    for (int i = 0; i < steps; i++) {
      const int s = i % stages;
      const uint32_t phase = (i / stages) & 1, from = tiles + s * stage_bytes;
      if (fault != 7) ptx::mbar_wait(full + 8 * s, phase);
      if (fault != 10) ptx::wgmma_fence();
#pragma unroll
      for (int k = 0; k < channels_a_step / 16; k++)
        ptx::wgmma<bf16>(acc, ptx::wgmma_desc_sw128(from + k * 32),
                         ptx::wgmma_descriptor(from + pixel_bytes + k * 32, 16, 1024,
                                               fault == 5 ? Swizzle::b64 : Swizzle::b128),
                         1);
      ptx::wgmma_commit();
      if (fault != 8) ptx::wgmma_wait<0>();
      if (threadIdx.x == 0)
        for (int b = 0; b < cluster; b++) {
          if (cluster > 1)
            ptx::mbar_arrive_cluster(empty + 8 * s, b);
          else
            ptx::mbar_arrive(empty + 8 * s);
        }
    }
    if (fault == 8) ptx::wgmma_wait<0>();
    const int lane = threadIdx.x & 31, row0 = first_pixel + (threadIdx.x >> 5) * 16 + (lane >> 2);
#pragma unroll
    for (int i = 0; i < filters_a_block / 2; i++) {
      const int row = row0 + (i >> 1 & 1) * 8, col = first_filter + (i >> 2) * 8 + (lane & 3) * 2 + (i & 1);
      if (row < g.n * a.p * a.q && col < g.k) a.y[size_t(row) * g.k + col] = acc[i];
    }
  }
  if (cluster > 1) ptx::cluster_sync();
#endif
}

// The convolution in double precision, (n p q, k); x is (n, h, w, c), w is (k, r, s, c).
static std::vector<double> convolution(const Geometry& g, const std::vector<bf16>& x,
                                       const std::vector<bf16>& w) {
  std::vector<double> y(size_t(g.n) * g.p() * g.q() * g.k);
  size_t out = 0;
  for (int n = 0; n < g.n; n++)
    for (int p = 0; p < g.p(); p++)
      for (int q = 0; q < g.q(); q++)
        for (int k = 0; k < g.k; k++, out++)
          for (int r = 0; r < g.r; r++)
            for (int s = 0; s < g.s; s++) {
              const int i = p * g.stride - g.padding + r * g.dilation,
                        j = q * g.stride - g.padding + s * g.dilation;
              if (i < 0 || j < 0 || i >= g.h || j >= g.w) continue;
              const bf16* px = &x[size_t((n * g.h + i) * g.w + j) * g.c];
              const bf16* pw = &w[size_t((k * g.r + r) * g.s + s) * g.c];
              for (int c = 0; c < g.c; c++) y[out] += double(float(px[c])) * double(float(pw[c]));
            }
  return y;
}

static TmaTensor image(const bf16* x, const Geometry& g) {
  const uint64_t c = uint64_t(g.c), w = uint64_t(g.w), h = uint64_t(g.h), stride = uint64_t(g.stride);
  return {.data = x,
          .rank = 4,
          .extent = {c, w, h, uint64_t(g.n)},
          .stride_bytes = {0, 2 * c, 2 * c * w, 2 * c * w * h},
          .step = {1, uint32_t(stride), uint32_t(stride), 1, 1}};
}

template <int cluster>
static void check_conv(Program& program, Random& random, const Geometry& g) {
  device_memory::free_all();
  const auto x = normals<bf16>(size_t(g.n * g.h * g.w * g.c), random);
  const auto w = normals<bf16>(size_t(g.k * g.r * g.s * g.c), random, 0.1f);
  const auto want = convolution(g, x, w);
  Buffer<bf16> dx(x, "x"), dw(w, "w");
  Buffer<float> dy(want.size(), "y");
  const uint64_t c = uint64_t(g.c), taps = uint64_t(g.r * g.s);
  const auto corners_w = im2col_corners(g.padding, g.s, g.dilation),
             corners_h = im2col_corners(g.padding, g.r, g.dilation);
  program.run(
      [&](int fault) {
        dy.poison();
        ptx::TensorMap map_x, map_w;
        Im2colBox box{{corners_w.lower, corners_h.lower},
                      {corners_w.upper, corners_h.upper},
                      channels_a_step,
                      uint32_t(pixels_a_block / cluster)};
        if (fault == 11) box.upper[0] = g.padding - (g.s - 1);  // forgets the dilation
        if (fault == 12) box.lower[1] = -129;
        TmaTensor tensor = image(dx.device, g);
        if (fault == 13) tensor.extent[3]++;
        if (int error = make_im2col_map(&map_x, tensor, box)) return error;
        if (int error = make_tensor_map(&map_w,
                                        {.data = dw.device,
                                         .rank = 3,
                                         .extent = {c, taps, uint64_t(g.k)},
                                         .stride_bytes = {0, 2 * c, 2 * c * taps}},
                                        {{channels_a_step, 1, filters_a_block}}))
          return error;
        const unsigned across =
            unsigned((g.k + filters_a_block - 1) / filters_a_block + cluster - 1) / cluster * cluster;
        const unsigned down = unsigned((g.n * g.p() * g.q() + pixels_a_block - 1) / pixels_a_block);
        return launch({.grid = dim3(across, down),
                       .block = dim3(threads),
                       .dynamic_shared_bytes = stages * stage_bytes,
                       .cluster = dim3(cluster)},
                      conv<cluster>, map_x, map_w, ConvParams{dy.device, g, g.p(), g.q(), fault});
      },
      [&] { return close(dy, want, 1e-3, 1e-4); });
}

// ---------------------------------------------------------------- boxes
constexpr int box_threads = 32;

// Reads a box into shared memory, doubles it there, writes it back at other coordinates, and adds it once more.
template <int R>
__global__ void __launch_bounds__(box_threads)
    box_copy(const __grid_constant__ ptx::TensorMap from, const __grid_constant__ ptx::TensorMap to,
             const __grid_constant__ ptx::TensorMap sum, int elements, int shift, int fault) {
#if PYSEQNET_SM90
  PYSEQNET_DYNAMIC_SHARED(float, tile);
  PYSEQNET_SHARED(uint64_t, bars, [1]);
  const uint32_t bar = ptx::smem_u32(bars), shared = ptx::smem_u32(tile);
  int at[R], back[R];
  for (int i = 0; i < R; i++) at[i] = i == 0 ? -4 : -1, back[i] = i == 0 ? 0 : shift;
  if (threadIdx.x == 0) {
    ptx::mbar_init(bar, 1);
    ptx::mbar_fence_init();
    ptx::mbar_arrive_expect_tx(bar, uint32_t(elements * 4));
    ptx::tma_load(fault == 1 ? shared + 64 : shared, &from, at, bar);
  }
  __syncthreads();
  ptx::mbar_wait(bar, 0);
  for (int i = threadIdx.x; i < elements; i += box_threads) tile[i] *= 2.f;
  if (fault != 2) ptx::fence_async_proxy();
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::tma_store(&to, shared, back);
    ptx::tma_reduce_add(&sum, shared, back);
    ptx::bulk_commit();
    if (fault != 3) ptx::bulk_wait_read<0>();
  }
  __syncthreads();
  if (fault == 3) tile[threadIdx.x] = 0.f;
#endif
}

template <int R>
static int check_boxes(const char* name) {
  device_memory::free_all();
  Program program(name, {{1, "destination is not a multiple of 128", "multiple of 128"},
                         {2, "no fence between stores and TMA", "fence.proxy.async"},
                         {3, "overwrites what the store still reads", "RACE"},
                         {4, "stride that is no multiple of 16", "TMA MAP"},
                         {5, "box of 257 elements", "TMA MAP"}});
  // Extents 8, 3, 4, ...; boxes reach beyond them on both sides; every second element of dimension 1.
  const int extent[5] = {8, 5, 3, 2, 2}, box[5] = {16, 6, 3, 2, 2};
  const int count[5] = {16, 3, 3, 2, 2};
  int total = 1, elements = 1;
  uint64_t pitch[5];
  for (int i = 0; i < R; i++) pitch[i] = 4 * uint64_t(total), total *= extent[i], elements *= count[i];
  std::vector<float> x(total);
  for (int i = 0; i < total; i++) x[i] = float(i + 1);
  // What lies in the box, in its order; then where that goes.
  std::vector<double> want(total, -1), want_sum(total, 1);
  for (int e = 0; e < elements; e++) {
    int rest = e, in = 0, out = 0;
    bool inside = true, written = true;
    for (int i = 0; i < R; i++) {
      const int k = rest % count[i];
      rest /= count[i];
      const int source = (i == 0 ? -4 : -1) + k * (i == 1 ? 2 : 1), target = (i == 0 ? 0 : 1) + k;
      inside = inside && source >= 0 && source < extent[i];
      written = written && target < extent[i];
      in += source * int(pitch[i] / 4);
      out += target * int(pitch[i] / 4);
    }
    const double value = inside ? 2 * double(x[size_t(in)]) : 0;
    if (written) want[size_t(out)] = value, want_sum[size_t(out)] = 1 + value;
  }
  Buffer<float> dx(x, "x"), dy(size_t(total), "y"), ds(size_t(total), "sum");
  const std::vector<float> minus(total, -1.f), ones(total, 1.f);
  const auto map = [&](ptx::TensorMap* m, const float* data, int step, int fault) {
    TmaTensor t{.data = data, .type = DType::f32, .rank = R, .swizzle = Swizzle::none};
    TmaBox b;
    for (int i = 0; i < R; i++) {
      t.extent[i] = uint64_t(extent[i]);
      t.stride_bytes[i] = pitch[i];
      b.extent[i] = uint32_t(step == 1 ? count[i] : box[i]);
    }
    t.step[1] = uint32_t(step);
    if (fault == 4) t.stride_bytes[1] -= 4;
    if (fault == 5) b.extent[1] = 257;
    return make_tensor_map(m, t, b);
  };
  program.run(
      [&](int fault) {
        device_memory::upload(dy.device, minus.data(), sizeof(float) * size_t(total));
        device_memory::upload(ds.device, ones.data(), sizeof(float) * size_t(total));
        ptx::TensorMap from, to, sum;
        if (int error = map(&from, dx.device, 2, fault)) return error;
        if (int error = map(&to, dy.device, 1, 0) + map(&sum, ds.device, 1, 0)) return error;
        return launch(
            {.grid = dim3(1), .block = dim3(box_threads), .dynamic_shared_bytes = unsigned(elements * 4)},
            box_copy<R>, from, to, sum, elements, 1, fault);
      },
      [&] { return close(dy, want, 0, 0) && close(ds, want_sum, 0, 0); });
  return program.finish();
}

// ---------------------------------------------------------------- im2col of three and five dimensions
// Copies what one load sees to y (pixels x 16 floats).
template <int R>
__global__ void __launch_bounds__(box_threads)
    im2col_copy(const __grid_constant__ ptx::TensorMap map, float* y, int pixels, int n, int start, int tap) {
#if PYSEQNET_SM90
  PYSEQNET_DYNAMIC_SHARED(float, tile);
  PYSEQNET_SHARED(uint64_t, bars, [1]);
  const uint32_t bar = ptx::smem_u32(bars);
  if (threadIdx.x == 0) {
    ptx::mbar_init(bar, 1);
    ptx::mbar_fence_init();
    ptx::mbar_arrive_expect_tx(bar, uint32_t(pixels * 64));
    const uint16_t t = uint16_t(tap);
    if constexpr (R == 3)
      ptx::tma_load_im2col(ptx::smem_u32(tile), &map, {0, start, n}, {t}, bar);
    else
      ptx::tma_load_im2col(ptx::smem_u32(tile), &map, {0, start, start, start, n}, {t, t, t}, bar);
  }
  __syncthreads();
  ptx::mbar_wait(bar, 0);
  for (int i = threadIdx.x; i < pixels * 16; i += box_threads) y[i] = tile[i];
#endif
}

template <int R>
static int check_im2col(const char* name) {
  device_memory::free_all();
  std::vector<Fault> faults{{1, "begins between two steps", "TMA IM2COL"},
                            {2, "a corner of more bits than there are", "TMA MAP"}};
  if (R == 5) faults.push_back({3, "an offset of more bits than there are", "TMA IM2COL"});
  Program program(name, faults);
  constexpr int spatial = R - 2, size = 5, images = 2, channels = 16, padding = 2, taps = 3, stride = 2,
                pixels = 40;
  constexpr int outputs = (size + 2 * padding - taps) / stride + 1;
  int points = images;
  for (int i = 0; i < spatial; i++) points *= size;
  std::vector<float> x(size_t(points * channels));
  for (size_t i = 0; i < x.size(); i++) x[i] = float(i + 1);
  // Output pixels in order, as tap 1 of every dimension sees them; beyond the last image there are zeros.
  const int tap = 1;
  std::vector<double> want(size_t(pixels * channels));
  for (int pixel = 0; pixel < pixels; pixel++) {
    int rest = pixel, at = 0, pitch = 1;
    bool inside = true;
    for (int i = 0; i < spatial; i++) {
      const int source = rest % outputs * stride - padding + tap;
      rest /= outputs;
      inside = inside && source >= 0 && source < size;
      at += source * pitch;
      pitch *= size;
    }
    inside = inside && rest < images;
    at += rest * pitch;
    for (int c = 0; inside && c < channels; c++)
      want[size_t(pixel * channels + c)] = x[size_t(at * channels + c)];
  }
  Buffer<float> dx(x, "x"), dy(want.size(), "y");
  program.run(
      [&](int fault) {
        dy.poison();
        TmaTensor t{.data = dx.device, .type = DType::f32, .rank = R, .swizzle = Swizzle::none};
        Im2colBox box{{}, {}, channels, pixels};
        uint64_t pitch = channels * 4;
        t.extent[0] = channels;
        for (int i = 0; i < spatial; i++) {
          const auto corners = im2col_corners(padding, taps, 1);
          box.lower[i] = fault == 2 ? (R == 3 ? -32769 : -17) : corners.lower;
          box.upper[i] = corners.upper;
          t.extent[i + 1] = size;
          t.stride_bytes[i + 1] = pitch;
          t.step[i + 1] = stride;
          pitch *= size;
        }
        t.extent[R - 1] = images;
        t.stride_bytes[R - 1] = pitch;
        ptx::TensorMap map;
        if (int error = make_im2col_map(&map, t, box)) return error;
        return launch(
            {.grid = dim3(1), .block = dim3(box_threads), .dynamic_shared_bytes = pixels * channels * 4},
            im2col_copy<R>, map, dy.device, pixels, 0, -padding + (fault == 1), fault == 3 ? 32 : tap);
      },
      [&] { return close(dy, want, 0, 0); });
  return program.finish();
}

}  // namespace pyseqnet::faults

using namespace pyseqnet;
using namespace pyseqnet::faults;

int main() {
  Random random(1);
  Program program("conv", {{1, "mbarrier expects a pixel less", "DEADLOCK"},
                           {2, "offsets of the taps without the dilation", by_values},
                           {3, "begins between two pixels", "TMA IM2COL"},
                           {4, "an offset of more bits than there are", "TMA IM2COL"},
                           {5, "wgmma reads another swizzle", by_values},
                           {6, "coordinates without the padding", by_values},
                           {7, "does not wait for the tiles", "RACE"},
                           {8, "slot released before wgmma has read it", "RACE"},
                           {9, "producer does not wait for a free slot", "more arrivals"},
                           {10, "no wgmma_fence", "wgmma_fence"},
                           {11, "box of pixels without the dilation", by_values},
                           {12, "a corner of more bits than there are", "TMA MAP"},
                           {13, "one image more than there is", "OUT OF BOUNDS"}});
  check_conv<1>(program, random, {2, 5, 7, 64, 72, 3, 3, 2, 2, 2});
  int failed = program.finish();
  Program plain("conv, other geometries", {});
  check_conv<1>(plain, random, {3, 9, 6, 128, 40, 1, 1, 0, 1, 1});
  check_conv<1>(plain, random, {1, 12, 11, 64, 64, 5, 3, 1, 3, 1});
  failed += plain.finish();
  Program pair("conv, clusters of two", {{1, "mbarrier expects a pixel less", "DEADLOCK"},
                                         {8, "slot released before wgmma has read it", "RACE"}});
  check_conv<2>(pair, random, {2, 6, 7, 64, 72, 3, 3, 1, 1, 1});
  failed += pair.finish();
  failed += check_boxes<2>("boxes of two dimensions") + check_boxes<3>("boxes of three") +
            check_boxes<4>("boxes of four") + check_boxes<5>("boxes of five");
  failed += check_im2col<3>("im2col of three dimensions") + check_im2col<5>("im2col of five");
  return failed != 0;
}
