// The arithmetic of Winograd convolution F(4x4, 3x3): a tile of 4 x 4 outputs from 36 products instead of 144
// (Winograd, 1980; Lavin & Gray, 2016).
//
//   y  = A' [ (G w G') . (B' x B) ] A        4 x 4 outputs from a 6 x 6 patch of inputs
//   gw = G' [ (B' x B) . (A gy A') ] G       the transposed algorithm: 3 x 3 filter taps from the same points
//
// A polynomial product evaluated at the six points 0, +-a, +-b, infinity. The usual a = 1, b = 2 loses about
// one decimal digit, because 2^4 = 16 stands beside 1 in the transforms. a = sqrt(1/2), b = sqrt(2) keeps all
// powers within 1/2 .. 2.83 and costs nothing more: a^2 and b^2 are still exact, the odd powers appear once
// per pair +-a (measured: two to three times closer to float64, in the mean; three to six times at worst).
//
// A transform works on vectors, one channel a lane, so it is plain elementwise arithmetic. Even and odd parts
// of +-a are shared.
#pragma once
#include "common/simd.h"

namespace pyseqnet {
inline namespace PYSEQNET_ISA {
namespace winograd {

constexpr int64_t M = 4;           // outputs of a tile, in each dimension
constexpr int64_t T = 6;           // inputs of a tile, and points
constexpr int64_t points = T * T;  // products of a tile for each pair of channels
constexpr int64_t taps = 9;

constexpr float a = 0.70710678118654752f, b = 1.41421356237309505f;
constexpr float a2 = 0.5f, b2 = 2.0f;
// Lagrange weights of the points +-a, +-b and 0; they go to the filter side.
constexpr float weight_a = 1 / (2 * a2 * (a2 - b2)), weight_b = 1 / (2 * b2 * (b2 - a2)),
                weight_0 = 1 / (a2 * b2);

// One-dimensional transforms, in place; `in` entries are valid before, `out` entries after.
struct InputTransform {  // B'
  static constexpr int in = 6, out = 6;
  static PYSEQNET_INLINE void apply(vf (&d)[6]) {
    const vf even_a = d[4] - b2 * d[2], odd_a = a * (d[3] - b2 * d[1]);
    const vf even_b = d[4] - a2 * d[2], odd_b = b * (d[3] - a2 * d[1]);
    d[0] = a2 * b2 * d[0] - (a2 + b2) * d[2] + d[4];
    d[5] = a2 * b2 * d[1] - (a2 + b2) * d[3] + d[5];
    d[1] = even_a + odd_a;
    d[2] = even_a - odd_a;
    d[3] = even_b + odd_b;
    d[4] = even_b - odd_b;
  }
};
struct OutputTransform {  // A'
  static constexpr int in = 6, out = 4;
  static PYSEQNET_INLINE void apply(vf (&m)[6]) {
    const vf even_a = m[1] + m[2], odd_a = a * (m[1] - m[2]), even_b = m[3] + m[4], odd_b = b * (m[3] - m[4]);
    m[0] = m[0] + even_a + even_b;
    m[1] = odd_a + odd_b;
    m[2] = a2 * even_a + b2 * even_b;
    m[3] = a2 * odd_a + b2 * odd_b + m[5];
  }
};
struct OutputGradientTransform {  // A
  static constexpr int in = 4, out = 6;
  static PYSEQNET_INLINE void apply(vf (&y)[6]) {
    const vf even_a = y[0] + a2 * y[2], odd_a = a * (y[1] + a2 * y[3]);
    const vf even_b = y[0] + b2 * y[2], odd_b = b * (y[1] + b2 * y[3]);
    y[5] = y[3];
    y[1] = even_a + odd_a;
    y[2] = even_a - odd_a;
    y[3] = even_b + odd_b;
    y[4] = even_b - odd_b;
  }
};
struct FilterTransform {  // G
  static constexpr int in = 3, out = 6;
  static PYSEQNET_INLINE void apply(vf (&w)[6]) {
    const vf even_a = weight_a * (w[0] + a2 * w[2]), odd_a = weight_a * a * w[1];
    const vf even_b = weight_b * (w[0] + b2 * w[2]), odd_b = weight_b * b * w[1];
    w[5] = w[2];
    w[0] = weight_0 * w[0];
    w[1] = even_a + odd_a;
    w[2] = even_a - odd_a;
    w[3] = even_b + odd_b;
    w[4] = even_b - odd_b;
  }
};
struct FilterGradientTransform {  // G'
  static constexpr int in = 6, out = 3;
  static PYSEQNET_INLINE void apply(vf (&m)[6]) {
    const vf even_a = weight_a * (m[1] + m[2]), odd_a = weight_a * (m[1] - m[2]);
    const vf even_b = weight_b * (m[3] + m[4]), odd_b = weight_b * (m[3] - m[4]);
    m[0] = weight_0 * m[0] + even_a + even_b;
    m[1] = a * odd_a + b * odd_b;
    m[2] = a2 * even_a + b2 * even_b + m[5];
  }
};

// The transform of both dimensions: read(r, c) yields in x in vectors, write(r, c, v) takes out x out.
template <class Transform, class Read, class Write>
PYSEQNET_INLINE void transform(Read&& read, Write&& write) {
  constexpr int in = Transform::in, out = Transform::out;
  vf half[out][in];
#pragma GCC unroll 6
  for (int c = 0; c < in; ++c) {
    vf v[6] = {};
#pragma GCC unroll 6
    for (int r = 0; r < in; ++r) v[r] = read(r, c);
    Transform::apply(v);
#pragma GCC unroll 6
    for (int r = 0; r < out; ++r) half[r][c] = v[r];
  }
#pragma GCC unroll 6
  for (int r = 0; r < out; ++r) {
    vf v[6] = {};
#pragma GCC unroll 6
    for (int c = 0; c < in; ++c) v[c] = half[r][c];
    Transform::apply(v);
#pragma GCC unroll 6
    for (int c = 0; c < out; ++c) write(r, c, v[c]);
  }
}

}  // namespace winograd
}  // namespace PYSEQNET_ISA
}  // namespace pyseqnet
