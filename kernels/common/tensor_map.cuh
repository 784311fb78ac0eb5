// Tensor maps: what TMA must know of a tensor in global memory. The host makes them, a kernel takes them as
// `const __grid_constant__ ptx::TensorMap` and hands their address to the wrappers of ptx.cuh. Two kinds:
//
//   tiled    tma_load moves a box of up to five dimensions, tma_store and tma_reduce_add move it back;
//   im2col   tma_load_im2col moves `channels` channels of `pixels` consecutive output pixels of a
//            convolution, as they are seen through one tap of the filter.
//
// Dimension 0 is the contiguous one: (cols, rows) of a matrix, (C, W, H, N) of an NHWC image. What lies
// outside the tensor is read as zero and never written.
//
// In shared memory the box is dense, dimension 0 fastest. A swizzle exchanges 16-byte chunks by rows of 128
// bytes (address ^= address >> 3 & 0x70, 0x30 or 0x10), so that wgmma and ldmatrix meet no bank conflict;
// then the rows are as long as its span (box[0] or `channels` elements = 128, 64 or 32 bytes), and a buffer
// begins at a multiple of eight rows.
//
// Equivalent of an im2col load at coordinates {c, w, h, n}, offsets {s, r}, for a tensor (C, W, H, N):
//
//   for (pixel = 0; pixel < pixels; pixel++) {
//     shared[pixel][0 .. channels) = x[n][h + r][w + s][c .. c + channels), or 0 outside of x
//     w += step[1];
//     if (w >= W + upper[0]) { w = lower[0]; h += step[2]; }
//     if (h >= H + upper[1]) { h = lower[1]; n += 1; }
//   }
//
// A convolution with padding p, stride t, dilation d and F taps in a dimension (see im2col_corners) takes
// lower = -p, upper = p - (F - 1) d, step = t; output pixel (q, p, n) begins at {c, q t - p, ...}, tap s is
// offset s d. The limits (of cuTensorMapEncodeIm2col) are in check_im2col of the simulator: corners in
// [-32768, 32767], [-128, 127], [-16, 15] for three, four, five dimensions, offsets in [0, 65535], [0, 255],
// [0, 31], steps up to 8, channels up to 256, pixels up to 1024.
#pragma once
#include "common/launch.cuh"
#include "common/types.h"

#ifdef __CUDACC__
#include <cuda.h>
#endif

namespace pyseqnet {

namespace ptx {
#ifdef __CUDACC__
using TensorMap = CUtensorMap;
#else
using TensorMap = cusim::TensorMap;
#endif
}  // namespace ptx

// The span in bytes.
enum class Swizzle : int { none = 0, b32 = 32, b64 = 64, b128 = 128 };

constexpr int tma_dimensions = 5;

struct TmaTensor {
  const void* data = nullptr;  // a multiple of 16 bytes
  DType type = DType::bf16;
  int rank = 2;
  uint64_t extent[tma_dimensions] = {};             // elements
  uint64_t stride_bytes[tma_dimensions] = {};       // multiples of 16; [0] is not read
  uint32_t step[tma_dimensions] = {1, 1, 1, 1, 1};  // traversal strides, 1 to 8; [0] is not read
  Swizzle swizzle = Swizzle::b128;
};

// The extents of a tiled box before steps are taken: a step of 2 and a box of 8 move 4 elements.
struct TmaBox {
  uint32_t extent[tma_dimensions] = {1, 1, 1, 1, 1};
};

// Corners of the first tap's pixels, in the order W, H, D: lower relative to 0, upper relative to the extent.
struct Im2colBox {
  int lower[tma_dimensions - 2] = {}, upper[tma_dimensions - 2] = {};
  uint32_t channels = 0, pixels = 0;
};

struct Im2colCorners {
  int lower, upper;
};
constexpr Im2colCorners im2col_corners(int padding, int taps, int dilation) {
  return {-padding, padding - (taps - 1) * dilation};
}

#ifdef __CUDACC__
namespace detail {
// The driver's functions come through the runtime, so that nothing links against libcuda.
template <class Function>
int driver_entry(const char* name, Function** function) {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found;
  const cudaError_t error = cudaGetDriverEntryPointByVersion(name, &entry, 12000, cudaEnableDefault, &found);
  if (error != cudaSuccess) return int(error);
  if (found != cudaDriverEntryPointSuccess || !entry) return int(cudaErrorNotSupported);
  *function = reinterpret_cast<Function*>(entry);
  return launch_ok;
}
constexpr CUtensorMapDataType map_type(DType t) {
  return t == DType::f32    ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
         : t == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
         : t == DType::f16  ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                            : CU_TENSOR_MAP_DATA_TYPE_FLOAT64;
}
constexpr CUtensorMapSwizzle map_swizzle(Swizzle s) {
  return s == Swizzle::b128  ? CU_TENSOR_MAP_SWIZZLE_128B
         : s == Swizzle::b64 ? CU_TENSOR_MAP_SWIZZLE_64B
         : s == Swizzle::b32 ? CU_TENSOR_MAP_SWIZZLE_32B
                             : CU_TENSOR_MAP_SWIZZLE_NONE;
}
}  // namespace detail
#else
namespace detail {
inline cusim::TensorMap simulated_map(const TmaTensor& t) {
  cusim::TensorMap map{};
  map.base = const_cast<char*>(static_cast<const char*>(t.data));
  map.rank = t.rank;
  map.element_bytes = int(bytes_of(t.type));
  map.numbers = t.type == DType::f32    ? cusim::Numbers::f32
                : t.type == DType::bf16 ? cusim::Numbers::bf16
                : t.type == DType::f16  ? cusim::Numbers::f16
                                        : cusim::Numbers::f64;
  map.swizzle = int(t.swizzle);
  for (int i = 0; i < tma_dimensions; i++) {
    map.extent[i] = t.extent[i];
    map.stride[i] = i ? t.stride_bytes[i] : uint64_t(map.element_bytes);
    map.step[i] = i ? t.step[i] : 1;
  }
  return map;
}
}  // namespace detail
#endif

// Both return 0, or a cudaError_t: cudaErrorInvalidValue for a shape that TMA does not take (the simulator
// says which rule it breaks).
inline int make_tensor_map(ptx::TensorMap* map, const TmaTensor& tensor, const TmaBox& box) {
#ifdef __CUDACC__
  decltype(cuTensorMapEncodeTiled)* encode;
  if (const int error = detail::driver_entry("cuTensorMapEncodeTiled", &encode)) return error;
  const CUresult result =
      encode(map, detail::map_type(tensor.type), cuuint32_t(tensor.rank), const_cast<void*>(tensor.data),
             reinterpret_cast<const cuuint64_t*>(tensor.extent),
             reinterpret_cast<const cuuint64_t*>(tensor.stride_bytes + 1), box.extent, tensor.step,
             CU_TENSOR_MAP_INTERLEAVE_NONE, detail::map_swizzle(tensor.swizzle),
             CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? launch_ok : int(cudaErrorInvalidValue);
#else
  *map = detail::simulated_map(tensor);
  for (int i = 0; i < tma_dimensions; i++) map->box[i] = box.extent[i];
  return cusim::check_tiled(*map);
#endif
}

inline int make_im2col_map(ptx::TensorMap* map, const TmaTensor& tensor, const Im2colBox& box) {
#ifdef __CUDACC__
  decltype(cuTensorMapEncodeIm2col)* encode;
  if (const int error = detail::driver_entry("cuTensorMapEncodeIm2col", &encode)) return error;
  const CUresult result =
      encode(map, detail::map_type(tensor.type), cuuint32_t(tensor.rank), const_cast<void*>(tensor.data),
             reinterpret_cast<const cuuint64_t*>(tensor.extent),
             reinterpret_cast<const cuuint64_t*>(tensor.stride_bytes + 1), box.lower, box.upper, box.channels,
             box.pixels, tensor.step, CU_TENSOR_MAP_INTERLEAVE_NONE, detail::map_swizzle(tensor.swizzle),
             CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? launch_ok : int(cudaErrorInvalidValue);
#else
  *map = detail::simulated_map(tensor);
  map->im2col = true;
  for (int i = 0; i < tma_dimensions - 2; i++) map->lower[i] = box.lower[i], map->upper[i] = box.upper[i];
  map->channels = box.channels;
  map->pixels = box.pixels;
  return cusim::check_im2col(*map);
#endif
}

// A row-major matrix, `row_elements` apart, in boxes of box_rows x box_cols.
inline int make_tensor_map_2d(ptx::TensorMap* map, const void* data, uint64_t rows, uint64_t cols,
                              uint64_t row_elements, uint32_t box_rows, uint32_t box_cols,
                              DType type = DType::bf16, Swizzle swizzle = Swizzle::b128) {
  return make_tensor_map(map,
                         {.data = data,
                          .type = type,
                          .extent = {cols, rows},
                          .stride_bytes = {0, row_elements * uint64_t(bytes_of(type))},
                          .swizzle = swizzle},
                         {{box_cols, box_rows, 1, 1, 1}});
}

}  // namespace pyseqnet
