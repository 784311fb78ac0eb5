// The feature maps where the map is known at run time only, for CUDA kernels.
#pragma once
#include <cmath>

#include "common/cuda_numerics.cuh"
#include "linear_attention/linear_attention_features.h"

namespace pyseqnet {
namespace {

struct Exponential {
  PYSEQNET_HOST_DEVICE float operator()(float x) const { return expf(x); }
  PYSEQNET_HOST_DEVICE double operator()(double x) const { return exp(x); }
};
template <class Acc>
PYSEQNET_DEVICE Acc feature_of(FeatureMap map, Acc x) {
  if (map == FeatureMap::elu) return feature<FeatureMap::elu>(x, Exponential{});
  if (map == FeatureMap::relu) return feature<FeatureMap::relu>(x, Exponential{});
  if (map == FeatureMap::exp || map == FeatureMap::softmax) return feature<FeatureMap::exp>(x, Exponential{});
  return x;
}
template <class Acc>
PYSEQNET_DEVICE Acc feature_gradient_of(FeatureMap map, Acc f) {
  if (map == FeatureMap::elu) return feature_gradient<FeatureMap::elu>(f);
  if (map == FeatureMap::relu) return feature_gradient<FeatureMap::relu>(f);
  if (map == FeatureMap::exp || map == FeatureMap::softmax) return feature_gradient<FeatureMap::exp>(f);
  return Acc(1);
}

}  // namespace
}  // namespace pyseqnet
