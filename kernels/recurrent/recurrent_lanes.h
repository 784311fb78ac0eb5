// What the CPU kernels share: the cells' maths on lanes, and rows that may be stored in 16 bits.
#pragma once
#include "common/element_lanes.h"
#include "recurrent/recurrent.h"

namespace pyseqnet {
inline namespace PYSEQNET_ISA {
namespace recurrent {

// The approximations clamp their argument, which would turn a NaN into a number.
struct LaneMath {
  using Real = vf;
  PYSEQNET_INLINE static vf sigmoid(vf x) { return x == x ? pyseqnet::sigmoid(x) : x; }
  PYSEQNET_INLINE static vf tanh(vf x) { return x == x ? tanhv(x) : x; }
  PYSEQNET_INLINE static vf relu(vf x) { return x < 0.0f ? vf{} : x; }
  PYSEQNET_INLINE static vf where_positive(vf y, vf x) { return y > 0.0f ? x : vf{}; }
  PYSEQNET_INLINE static vf clip(vf x, vf limit) { return x > limit ? limit : x < -limit ? -limit : x; }
  PYSEQNET_INLINE static vf unless_beyond(vf x, vf limit, vf y) {
    return x > limit ? vf{} : x < -limit ? vf{} : y;
  }
  PYSEQNET_INLINE static vf inverse_root(vf x) {
#if defined(__AVX512F__)
    return 1.0f / (vf)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
    return 1.0f / (vf)_mm256_sqrt_ps((__m256)x);
#else
    vf y;
    for (int i = 0; i < VL; ++i) y[i] = 1.0f / __builtin_sqrtf(x[i]);
    return y;
#endif
  }
};

// Units in vectors of lanes (cells/rows.h); `whole`: they fill all vectors, so that no load looks for the end.
template <bool whole>
struct LaneRow {
  using Real = vf;
  using Math = LaneMath;
  struct Units {
    int64_t u, end;
    PYSEQNET_INLINE bool inside() const { return u < end; }
    PYSEQNET_INLINE void next() { u += VL; }
    PYSEQNET_INLINE int lanes() const { return whole || end - u >= VL ? VL : int(end - u); }
  };
  PYSEQNET_INLINE Units units(int64_t H) const { return {0, H}; }
  PYSEQNET_INLINE vf load(const float* p, Units u) const { return load_n(p + u.u, u.lanes()); }
  template <class T>
  PYSEQNET_INLINE void store(T* p, Units u, vf v) const {
    store_lanes_n(p + u.u, v, u.lanes());
  }
  PYSEQNET_INLINE vf flags(const uint8_t* p, Units u) const {
    vf v{};
    for (int i = 0; i < u.lanes(); ++i) v[i] = p[u.u + i] ? 1.0f : 0.0f;
    return v;
  }
  PYSEQNET_INLINE vf total(vf x) const { return set1(hsum(x)); }
  PYSEQNET_INLINE vf within(Units u, vf x) const {
    if constexpr (whole) return x;
    return iota() < u.lanes() ? x : vf{};
  }
};

// f(row) for a row of H units.
template <class F>
PYSEQNET_INLINE void with_lane_row(int64_t H, F&& f) {
  if (H % VL == 0)
    f(LaneRow<true>{});
  else
    f(LaneRow<false>{});
}

// Numbers too small for a normal float are zero, as operands and as results, for the life of a kernel call:
// gradients that decay through time would cost about 100 cycles each. float16 operands are left alone: without
// F16C one is widened by way of such a number.
struct FlushSmall {
#if defined(__x86_64__)
  unsigned saved = _mm_getcsr();
  explicit FlushSmall(DType dtype) { _mm_setcsr(saved | (dtype == DType::f16 ? 0x8000 : 0x8040)); }
  ~FlushSmall() { _mm_setcsr(saved); }
#else
  explicit FlushSmall(DType) {}
#endif
};

// ---- Rows in the problem's dtype (16-bit types are widened; float rows are used where they lie). ----

template <class T>
PYSEQNET_INLINE void widen_row(const T* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; i += VL) store_lanes_n(to + i, load_between(from + i, 0, n - i, vf{}), n - i);
}
// n elements at `from` + `at` as floats: in place, or in `copy`.
inline const float* float_row(DType dtype, const void* from, int64_t at, int64_t n, float* copy) {
  if (dtype == DType::f32) return static_cast<const float*>(from) + at;
  if (dtype == DType::bf16)
    widen_row(static_cast<const bfloat16*>(from) + at, copy, n);
  else
    widen_row(static_cast<const float16*>(from) + at, copy, n);
  return copy;
}
// to = from, or zeros where there is nothing.
inline void load_row(DType dtype, const void* from, int64_t at, int64_t n, float* to) {
  if (!from)
    memset(to, 0, size_t(n) * sizeof(float));
  else if (const float* row = float_row(dtype, from, at, n, to); row != to)
    memcpy(to, row, size_t(n) * sizeof(float));
}
template <class T>
PYSEQNET_INLINE void add_row_of(const T* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; i += VL)
    store_lanes_n(to + i, load_between(to + i, 0, n - i, vf{}) + load_between(from + i, 0, n - i, vf{}),
                  n - i);
}
inline void add_row(DType dtype, const void* from, int64_t at, int64_t n, float* to) {
  if (dtype == DType::f32)
    add_row_of(static_cast<const float*>(from) + at, to, n);
  else if (dtype == DType::bf16)
    add_row_of(static_cast<const bfloat16*>(from) + at, to, n);
  else
    add_row_of(static_cast<const float16*>(from) + at, to, n);
}
template <class T>
PYSEQNET_INLINE void round_row(const float* from, T* to, int64_t n) {
  for (int64_t i = 0; i < n; i += VL) store_lanes_n(to + i, load_between(from + i, 0, n - i, vf{}), n - i);
}
inline void store_row(DType dtype, const float* from, void* to, int64_t at, int64_t n) {
  if (dtype == DType::f32)
    memcpy(static_cast<float*>(to) + at, from, size_t(n) * sizeof(float));
  else if (dtype == DType::bf16)
    round_row(from, static_cast<bfloat16*>(to) + at, n);
  else
    round_row(from, static_cast<float16*>(to) + at, n);
}
inline void zero_row(DType dtype, void* to, int64_t at, int64_t n) {
  memset(static_cast<char*>(to) + at * bytes_of(dtype), 0, size_t(n * bytes_of(dtype)));
}
// A cell's unit parameters in one piece (parameters, H).
inline void gather_parameters(const RecurrentProblem& p, const RecurrentWeights& w, float* to) {
  const auto blocks = parameter_blocks<const void*>(p.cell, w);
  for (int k = 0; k < blocks.count; k++) {
    const int64_t n = blocks.block[k].rows * p.H;
    load_row(p.dtype, blocks.block[k].values, 0, n, to);
    if (blocks.block[k].also) add_row(p.dtype, blocks.block[k].also, 0, n, to);
    to += n;
  }
}
// Asks for a row that will be read or written soon: rows come from far away in long strides, which the
// processor does not foresee.
PYSEQNET_INLINE void prefetch_to_read(const void* row, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(static_cast<const char*>(row) + at, 0, 2);
}
PYSEQNET_INLINE void prefetch_to_write(void* row, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(static_cast<char*>(row) + at, 1, 3);
}
inline const void* element(DType dtype, const void* p, int64_t at) {
  return static_cast<const char*>(p) + at * bytes_of(dtype);
}

}  // namespace recurrent
}  // namespace PYSEQNET_ISA
}  // namespace pyseqnet
