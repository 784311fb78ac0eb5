// The maths of additive attention that every target shares: the gradient of a score, and when tanh of a sum
// may be taken apart.
//
//   tanh(a + b) = 1 - 2 / (exp(2a) exp(2b) + 1)
//
// With exp(2a) made once a query and exp(2b) once a key, the L x S x D hyperbolic tangents cost one product
// and one reciprocal each. The absolute error is a few units of the last place of 1, as large as that of a
// rounded tanh near 1. It is not relative: sums near 0, and exponentials that would overflow, go the direct
// way. That is decided for a tile of queries and keys, by their largest magnitudes.
#pragma once
#include "attention/attention_math.h"

namespace pyseqnet {

constexpr float separable_from = 0.5f;    // below: an error of 2^-23 would be seen beside so small a tanh
constexpr float separable_up_to = 40.0f;  // exp(2 * 40) = 5.5e34 is far from the largest float

// largest_a, largest_b: of |a| and |b| in the tile; false for a NaN.
PYSEQNET_HOST_DEVICE bool tanh_is_separable(float largest_a, float largest_b) {
  const float largest = largest_a + largest_b;
  return largest >= separable_from && largest <= separable_up_to;
}

// dz of the contract. value_product: gout . v + gP.
template <class A>
PYSEQNET_HOST_DEVICE A additive_logit_gradient(A probability, A value_product, A delta) {
  return probability * (value_product - delta);
}
// d tanh / dx by its result.
template <class A>
PYSEQNET_HOST_DEVICE A tanh_gradient(A t) {
  return 1 - t * t;
}

}  // namespace pyseqnet
