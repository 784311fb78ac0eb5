// The vocabulary that every kernel family shares: element types, memory layouts, storage-only half types.
// Torch-free and CUDA-free, so that contracts compile with any C++20 compiler.
#pragma once
#include <cstdint>

namespace pyseqnet {

enum class DType : int32_t { f32, bf16, f16, f64 };

constexpr int64_t bytes_of(DType t) { return t == DType::f64 ? 8 : t == DType::f32 ? 4 : 2; }
constexpr const char* name_of(DType t) {
  return t == DType::f32 ? "f32" : t == DType::bf16 ? "bf16" : t == DType::f16 ? "f16" : "f64";
}

// Dense order of a four-dimensional tensor, slowest dimension first. nhwc is torch's channels_last; for
// filters the same two words mean K C R S and K R S C.
enum class Layout : int32_t { nchw, nhwc };
constexpr const char* name_of(Layout l) { return l == Layout::nchw ? "nchw" : "nhwc"; }

// Element strides of a dense four-dimensional tensor, named by the roles of an image.
struct Strides {
  int64_t n, c, h, w;
};
constexpr Strides dense_strides(Layout layout, int64_t c, int64_t h, int64_t w) {
  return layout == Layout::nchw ? Strides{c * h * w, h * w, w, 1} : Strides{h * w * c, 1, w * c, c};
}

// Storage of the 16-bit types on the host. Arithmetic never happens in them: see numerics.h for the
// conversions.
struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

}  // namespace pyseqnet
