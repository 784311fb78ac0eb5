// The feature maps of linear attention and their derivatives: the same lines for the oracle (double), the CPU
// kernels (vectors of float) and the CUDA kernels.
//
//   identity   x
//   elu        elu(x) + 1 = x + 1 above 0, exp(x) below     (Katharopoulos et al., 2020)
//   relu       max(x, 0)
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
  return x;
}
template <FeatureMap map, class V>
PYSEQNET_HOST_DEVICE V feature_gradient(V f) {
  const V one = V{} + 1;
  if constexpr (map == FeatureMap::elu) return f > 1 ? one : f;
  if constexpr (map == FeatureMap::relu) return f > 0 ? one : V{};
  return one;
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
    default:
      return f(FeatureTag<FeatureMap::identity>{});
  }
}

}  // namespace pyseqnet
