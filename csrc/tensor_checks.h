// Reading tensors at the border: types, layouts, allocation, and the checks that memory safety needs. What a
// person should be told about an argument is said earlier, in pyseqnet/functional; these messages carry no
// C++ paths.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <stdexcept>
#include <string>

#include "common/types.h"
#include "huge_pages.h"

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // torch before 2.13 calls it so
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif

namespace pyseqnet {

using torch::stable::Tensor;

// Thrown text reaches Python as ValueError with exactly this message.
inline void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

inline DType dtype_of(const Tensor& t) {
  using torch::headeronly::ScalarType;
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    case ScalarType::Double:
      return DType::f64;
    default:
      throw std::invalid_argument("pyseqnet: expected float32, bfloat16, float16 or float64");
  }
}

// Extents of a batched image or sequence: (N, C, W) is an image of height 1.
struct ImageShape {
  int64_t n, c, h, w;
};
inline ImageShape image_shape(const Tensor& t, const char* complaint) {
  const int64_t dims = t.dim();
  require(dims == 3 || dims == 4, complaint);
  return {t.size(0), t.size(1), dims == 4 ? t.size(2) : 1, t.size(dims - 1)};
}

// torch's own reading of strides (is_channels_last_strides_2d): ambiguous shapes count as contiguous.
inline Layout suggested_layout(const Tensor& t) {
  if (t.dim() != 4 || t.stride(1) == 0) return Layout::nchw;
  int64_t smallest = 0;
  for (int d : {1, 3, 2, 0}) {
    if (t.size(d) == 0 || t.stride(d) < smallest) return Layout::nchw;
    if (d == 0 && smallest == t.stride(1)) return Layout::nchw;
    smallest = t.stride(d);
    if (t.size(d) > 1) smallest *= t.size(d);
  }
  return Layout::nhwc;
}

// Torch's own text does not pass its C interface; what reaches us names a line of this file.
[[noreturn]] inline void throw_out_of_memory(const int64_t* sizes, int64_t dims) {
  std::string shape;
  for (int64_t d = 0; d < dims; d++) shape += (d ? ", " : "") + std::to_string(sizes[d]);
  throw std::runtime_error("pyseqnet: out of memory: cannot allocate a tensor of shape (" + shape + ")");
}

// The tensor itself when it is dense in this layout, else a dense copy.
inline Tensor dense(const Tensor& t, Layout layout) {
  using torch::headeronly::MemoryFormat;
  if (layout == Layout::nchw && t.is_contiguous()) return t;
  try {
    return torch::stable::contiguous(
        t, layout == Layout::nchw ? MemoryFormat::Contiguous : MemoryFormat::ChannelsLast);
  } catch (const std::exception&) {
    throw_out_of_memory(t.sizes().data(), t.dim());
  }
}

// Geometry as numbers that kernels can add and multiply: nothing below overflows int64_t with extents up to
// this.
constexpr int64_t largest_padding = int64_t(1) << 48;

// How far a dilated window reaches, dilation * (taps - 1) + 1.
inline int64_t reach(int64_t taps, int64_t dilation, const char* complaint) {
  int64_t between = 0;
  require(!__builtin_mul_overflow(taps - 1, dilation, &between) && between < (int64_t(1) << 62), complaint);
  return between + 1;
}

// Whether a product of extents fits.
inline bool product_fits(std::initializer_list<int64_t> extents) {
  constexpr int64_t largest_product = int64_t(1) << 58;  // elements: their bytes fit as well
  int64_t product = 1;
  for (int64_t extent : extents) {
    if (extent == 0) return true;
    if (__builtin_mul_overflow(product, extent, &product) || product > largest_product) return false;
  }
  return true;
}

inline Tensor new_tensor(const Tensor& like, const int64_t* sizes, const int64_t* strides, int64_t dims,
                         torch::headeronly::ScalarType type) {
  AtenTensorHandle handle = nullptr;
  int32_t device_type = 0, device_index = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  // Only these types are ever allocated here; the shim's codes are functions, not constants.
  using torch::headeronly::ScalarType;
  const int32_t code = type == ScalarType::Float      ? aoti_torch_dtype_float32()
                       : type == ScalarType::BFloat16 ? aoti_torch_dtype_bfloat16()
                       : type == ScalarType::Half     ? aoti_torch_dtype_float16()
                       : type == ScalarType::Double   ? aoti_torch_dtype_float64()
                       : type == ScalarType::Byte     ? aoti_torch_dtype_uint8()
                       : type == ScalarType::Int      ? aoti_torch_dtype_int32()
                                                      : aoti_torch_dtype_int64();
  if (aoti_torch_empty_strided(dims, sizes, strides, code, device_type, device_index, &handle))
    throw_out_of_memory(sizes, dims);
  Tensor tensor(handle);
  if (device_type == aoti_torch_device_type_cpu())
    advise_huge_pages(tensor.mutable_data_ptr(), tensor.numel() * int64_t(tensor.element_size()));
  return tensor;
}

// An uninitialised image (or, with rank 3, sequence) in a layout.
inline Tensor new_image(const Tensor& like, const ImageShape& s, Layout layout, int64_t rank,
                        torch::headeronly::ScalarType type) {
  if (!product_fits({s.n, s.c, s.h, s.w})) {
    const int64_t sizes[] = {s.n, s.c, s.h, s.w};
    throw_out_of_memory(sizes, 4);
  }
  const Strides strides = dense_strides(layout, s.c, s.h, s.w);
  if (rank == 3) {
    const int64_t sizes[] = {s.n, s.c, s.w}, steps[] = {s.c * s.w, s.w, 1};
    return new_tensor(like, sizes, steps, 3, type);
  }
  const int64_t sizes[] = {s.n, s.c, s.h, s.w}, steps[] = {strides.n, strides.c, strides.h, strides.w};
  return new_tensor(like, sizes, steps, 4, type);
}

inline Tensor new_vector(const Tensor& like, int64_t length, torch::headeronly::ScalarType type) {
  const int64_t step = 1;
  return new_tensor(like, &length, &step, 1, type);
}

}  // namespace pyseqnet
