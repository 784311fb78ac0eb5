// The hyperbolic tangents of additive attention on lanes, and the two sweeps over a tile that make them:
// scores (forward), and the gradients of queries, keys and weight (backward). Lanes are keys; keys come as
// panels [panel][D][PANEL] (attention_products.h), queries as rows. Both sweeps exist twice: `separable`
// works on exp(2x) of both operands (additive_math.h), the other on the operands themselves.
//
// Bound: arithmetic. A tangent costs a product and a reciprocal, 5 vector operations and an approximation
// (direct: about 20); scores add 1, gradients 5. Panels are in the first-level cache while 64 rows pass.
#pragma once
#include "attention/additive.h"
#include "attention/additive_math.h"
#include "attention/attention_tile.h"

namespace pyseqnet {
inline namespace PYSEQNET_ISA {
namespace additive {

constexpr int GROUP = 4;         // rows that share the loads of a key
constexpr int64_t KEYS = 128;    // of a tile: a multiple of PANEL
constexpr int64_t QUERIES = 64;  // rows of a block: a multiple of GROUP

// e^x for |x| <= 2 * separable_up_to, to about one unit in the last place: Cody and Waite's two-step
// reduction, then the polynomial of Cephes' expf.
PYSEQNET_INLINE vf exponential(vf x) {
  const vf magic = set1(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const vf shifted = x * LOG2E + magic, n = shifted - magic;
  vf f = x - n * 0.693359375f;  // few bits: the product is exact
  f = f + n * 2.12194440e-4f;
  vf p = set1(1.9875691500e-4f);
  p = p * f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * f * f + f + 1.0f;
  return (vf)((vi)p + (((vi)shifted - (vi)magic) << 23));
}

template <bool separable>
PYSEQNET_INLINE vf tanh_of_sum(vf a, vf b) {
  if constexpr (separable) return 1.0f - 2.0f * recip(a * b + 1.0f);
  const vf x = a + b;
  return x == x ? tanhv(x) : x;  // the approximation clamps its argument, which would hide a NaN
}

// z[r][keys of `panels` panels] = sum_d w[d] tanh(a[r][d], panel[d][key])
template <bool separable, int R>
PYSEQNET_INLINE void score_rows(int64_t D, const float* a, int64_t lda, const float* w, const float* panels,
                                int64_t count, float* z) {
  for (int64_t c = 0; c < count; ++c, panels += D * PANEL) {
    vf sum[R][2] = {};
    for (int64_t d = 0; d < D; ++d) {
      const vf k0 = load(panels + d * PANEL), k1 = load(panels + d * PANEL + VL);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const vf query = set1(a[r * lda + d]);
        sum[r][0] += w[d] * tanh_of_sum<separable>(query, k0);
        sum[r][1] += w[d] * tanh_of_sum<separable>(query, k1);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      store(z + r * KEYS + c * PANEL, sum[r][0]);
      store(z + r * KEYS + c * PANEL + VL, sum[r][1]);
    }
  }
}
template <bool separable>
PYSEQNET_NOINLINE void score_tile(int64_t n, int64_t D, const float* a, int64_t lda, const float* w,
                                  const float* panels, int64_t count, float* z) {
  for (int64_t r = 0; r < n; r += GROUP)
    with_rows<GROUP>(int(smaller(n - r, GROUP)), [&](auto rr) PYSEQNET_LAMBDA {
      score_rows<separable, decltype(rr)::value>(D, a + r * lda, lda, w, panels, count, z + r * KEYS);
    });
}

// What the sweep back adds to: gq[rows][lda], gk as panels (without the factor w[d]), gw[D][VL].
struct ScoreGradients {
  float *gq, *gk, *gw;
};

template <bool separable, int R>
PYSEQNET_INLINE void gradient_rows(int64_t D, const float* a, int64_t lda, const float* w,
                                   const float* panels, int64_t count, const float* dz,
                                   const ScoreGradients& to) {
  for (int64_t d0 = 0; d0 < D; d0 += VL) {
    const int width = int(smaller(D - d0, VL));
    // Sums of a query over its keys, one vector a channel: a transpose adds the lanes of VL channels at once.
    vf sums[R][VL] = {};
    for (int x = 0; x < width; ++x) {
      const int64_t d = d0 + x;
      vf gw = load(to.gw + d * VL), gq[R] = {};
      for (int64_t v = 0; v < 2 * count; ++v) {
        const int64_t at = (v / 2 * D + d) * PANEL + v % 2 * VL;
        const vf key = load(panels + at);
        vf gk = load(to.gk + at);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          const vf t = tanh_of_sum<separable>(set1(a[r * lda + d]), key), g = load(dz + r * KEYS + v * VL);
          const vf h = tanh_gradient(t);
          gw += g * t;
          gk += g * h;
          gq[r] += g * h;
        }
        store(to.gk + at, gk);
      }
      store(to.gw + d * VL, gw);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sums[r][x] = gq[r];
    }
    const vf factor = load(w + d0);
    for (int r = 0; r < R; ++r) {
      transpose(sums[r]);
      vf total = sums[r][0];
#pragma GCC unroll 16
      for (int x = 1; x < VL; ++x) total += sums[r][x];
      float* gq = to.gq + r * lda + d0;
      store(gq, load(gq) + factor * total);
    }
  }
}
template <bool separable>
PYSEQNET_NOINLINE void gradient_tile(int64_t n, int64_t D, const float* a, int64_t lda, const float* w,
                                     const float* panels, int64_t count, const float* dz,
                                     const ScoreGradients& to) {
  for (int64_t r = 0; r < n; r += GROUP)
    with_rows<GROUP>(int(smaller(n - r, GROUP)), [&](auto rr) PYSEQNET_LAMBDA {
      gradient_rows<separable, decltype(rr)::value>(D, a + r * lda, lda, w, panels, count, dz + r * KEYS,
                                                    {to.gq + r * lda, to.gk, to.gw});
    });
}

// ---- packing ----

// The largest magnitude of n floats (whole vectors); NaN if one is.
PYSEQNET_NOINLINE float largest_magnitude(const float* x, int64_t n) {
  vf top = {};
  vi odd = {};
  for (int64_t k = 0; k < n; k += VL) {
    const vf v = load(x + k);
    top = vmax(top, vmax(v, -v));
    odd |= (v != v);
  }
  int32_t any = 0;
  for (int l = 0; l < VL; ++l) any |= odd[l];
  return any ? __builtin_nanf("") : hmax(top);
}
PYSEQNET_NOINLINE void exponentials(const float* x, int64_t n, float* y) {
  for (int64_t k = 0; k < n; k += VL) store(y + k, exponential(load(x + k) * 2.0f));
}

// Queries with their bias, packed once and used with every tile of keys.
struct PackedQueries {
  float *sum, *exp;  // [rows][width], width = D rounded up to VL
  float* largest;    // [rows / QUERIES]: of each block
  int64_t width;

  PackedQueries(Carver& carve, int64_t rows, int64_t D) : width(round_up(D, VL)) {
    sum = carve.take<float>(rows * width), exp = carve.take<float>(rows * width);
    largest = carve.take<float>((rows + QUERIES - 1) / QUERIES);
  }
  template <class T>
  void pack(const T* q, int64_t stride, int64_t n, int64_t D, const float* bias) const {
    pack_rows(q, stride, n, D, 1.0f, sum);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t d = 0; d < width; d += VL)
        store(sum + i * width + d, load(sum + i * width + d) + load(bias + d));
    for (int64_t i = 0; i < n; i += QUERIES) {
      const int64_t at = i * width, count = smaller(n - i, QUERIES) * width;
      largest[i / QUERIES] = largest_magnitude(sum + at, count);
      if (largest[i / QUERIES] <= separable_up_to) exponentials(sum + at, count, exp + at);
    }
  }
};

// A tile of keys and values.
struct PackedKeys {
  float *rows, *sum, *exp, *values;  // rows: scratch; sum, exp: panels; values [KEYS][round_up(E)]
  float largest = 0;
  int64_t count = 0;  // panels

  PackedKeys(Carver& carve, int64_t D, int64_t E) {
    rows = carve.take<float>(KEYS * round_up(D, VL));
    sum = carve.take<float>(KEYS * D), exp = carve.take<float>(KEYS * D);
    values = carve.take<float>(KEYS * round_up(E, VL));
  }
  template <class T>
  void pack(const T* k, int64_t k_stride, const T* v, int64_t v_stride, int64_t n, int64_t D, int64_t E) {
    const int64_t width = round_up(D, VL);
    count = round_up(n, PANEL) / PANEL;
    pack_rows(k, k_stride, n, D, 1.0f, rows);
    memset(rows + n * width, 0, size_t((count * PANEL - n) * width) * sizeof(float));
    pack_panels(rows, width, count * PANEL, D, sum);
    largest = largest_magnitude(rows, n * width);
    if (largest <= separable_up_to) exponentials(sum, count * PANEL * D, exp);
    if (v) pack_rows(v, v_stride, n, E, 1.0f, values);
  }
};

}  // namespace additive
}  // namespace PYSEQNET_ISA
}  // namespace pyseqnet
