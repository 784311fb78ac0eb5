// Storage types and what kernels compute in. Tensors are float, bfloat16, float16 or double; arithmetic is in
// the accumulation type: float, and double for double. 16-bit types are converted where they are loaded and
// rounded once (to nearest even) where they are stored.
#pragma once
#include "common/launch.cuh"
#include "common/types.h"

namespace pyseqnet {

template <class T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <class T>
using accumulator_t = typename AccumulatorOf<T>::type;

PYSEQNET_HOST_DEVICE float to_accumulator(float v) { return v; }
PYSEQNET_HOST_DEVICE double to_accumulator(double v) { return v; }
PYSEQNET_HOST_DEVICE float to_accumulator(__nv_bfloat16 v) { return __bfloat162float(v); }
PYSEQNET_HOST_DEVICE float to_accumulator(__half v) { return __half2float(v); }

// from_accumulator<T>(v): rounds to the storage type.
template <class T>
PYSEQNET_HOST_DEVICE T from_accumulator(accumulator_t<T> v) {
  return v;
}
template <>
PYSEQNET_HOST_DEVICE __nv_bfloat16 from_accumulator<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}
template <>
PYSEQNET_HOST_DEVICE __half from_accumulator<__half>(float v) {
  return __float2half_rn(v);
}

template <class T>
PYSEQNET_HOST_DEVICE accumulator_t<T> load(const T* p) {
  return to_accumulator(*p);
}
template <class T>
PYSEQNET_HOST_DEVICE void store(T* p, accumulator_t<T> v) {
  *p = from_accumulator<T>(v);
}

// Calls f(TypeTag<T>{}) with the C++ type of a DType and returns what f returns:
//   return dispatch_dtype(problem.dtype, [&](auto tag) {
//     using T = typename decltype(tag)::type;
//     return launch(config, kernel<T>, ...);
//   });
template <class T>
struct TypeTag {
  using type = T;
};
template <class F>
auto dispatch_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::bf16:
      return f(TypeTag<__nv_bfloat16>{});
    case DType::f16:
      return f(TypeTag<__half>{});
    case DType::f64:
      return f(TypeTag<double>{});
    default:
      return f(TypeTag<float>{});
  }
}

}  // namespace pyseqnet
