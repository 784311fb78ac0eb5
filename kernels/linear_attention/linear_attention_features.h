// The feature maps of linear attention, their derivatives and the powers of a decay: the same lines for the
// oracle (double), the CPU kernels (vectors of float) and the CUDA kernels.
//
//   identity   x
//   elu        elu(x) + 1 = x + 1 above 0, exp(x) below     (Katharopoulos et al., 2020)
//   relu       max(x, 0)
//   exp        exp(x)                                    also the last step of positive random features
//   softmax    exp(x) of what the kernels have shifted, see linear_attention.h
// A derivative is a function of the feature alone, so backward keeps no argument: elu's is exp(x) = f below
// 0, where f < 1, and 1 above.
#pragma once
#include "common/numerics.h"
#include "linear_attention/linear_attention.h"

namespace pyseqnet {

// V is float, double or a vector of them; `exponential` its exp. A NaN stays one.
template <FeatureMap map, class V, class Exponential>
PYSEQNET_HOST_DEVICE V feature(V x, Exponential exponential) {
  if constexpr (map == FeatureMap::elu) return x > 0 ? x + 1 : exponential(x);
  if constexpr (map == FeatureMap::relu) return x < 0 ? V{} : x;
  if constexpr (map == FeatureMap::exp) return exponential(x);
  return x;
}
template <FeatureMap map, class V>
PYSEQNET_HOST_DEVICE V feature_gradient(V f) {
  const V one = V{} + 1;
  if constexpr (map == FeatureMap::elu) return f > 1 ? one : f;
  if constexpr (map == FeatureMap::relu) return f > 0 ? one : V{};
  if constexpr (map == FeatureMap::exp) return f;
  return one;
}

// g^n by squaring; g^0 = 1.
PYSEQNET_HOST_DEVICE double integer_power(double g, int64_t n) {
  double power = 1;
  for (; n > 0; n /= 2, g *= g)
    if (n % 2) power *= g;
  return power;
}

// Its derivative by g, n g^(n-1).
PYSEQNET_HOST_DEVICE double integer_power_gradient(double g, int64_t n) {
  return n > 0 ? double(n) * integer_power(g, n - 1) : 0.0;
}

template <FeatureMap m>
struct FeatureTag {
  static constexpr FeatureMap map = m;
};
// Calls f(FeatureTag<map>{}) and returns what it returns.
template <class F>
PYSEQNET_HOST_DEVICE auto with_feature_map(FeatureMap map, F&& f) {
  switch (map) {
    case FeatureMap::elu:
      return f(FeatureTag<FeatureMap::elu>{});
    case FeatureMap::relu:
      return f(FeatureTag<FeatureMap::relu>{});
    case FeatureMap::exp:
    case FeatureMap::softmax:
      return f(FeatureTag<FeatureMap::exp>{});
    default:
      return f(FeatureTag<FeatureMap::identity>{});
  }
}

}  // namespace pyseqnet
