// What the forward and the backward CPU kernel share: the cells' maths on lanes, the order in which sequences
// are taken, rows that may be stored in 16 bits, and weights packed for gemm_prepacked.
#pragma once
#include "common/element_lanes.h"
#include "common/gemm.h"
#include "recurrent/cells.h"
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
};

// Results too small for a normal float become zero: gradients that decay through time would cost about 100
// cycles each. Operands are left alone (FlushDenormals of simd.h is not used), since without F16C a float16
// is widened by way of one.
struct FlushResults {
#if defined(__x86_64__)
  unsigned saved = _mm_getcsr();
  FlushResults() { _mm_setcsr(saved | 0x8000); }
  ~FlushResults() { _mm_setcsr(saved); }
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
inline const void* element(DType dtype, const void* p, int64_t at) {
  return static_cast<const char*>(p) + at * bytes_of(dtype);
}

// ---- Packed weights. A panel is NV vectors wide, K-major: panel[k][NV * VL]. ----

// Columns of VL lanes from rows of a matrix: to[k * ld + j] = rows[j][k], j < n. `copy`: VL * K floats.
template <class Row>
void pack_columns(DType dtype, const void* matrix, int64_t K, int n, Row row, float* to, int64_t ld,
                  float* copy) {
  static const float nothing[1] = {};
  const float* sources[VL];
  for (int j = 0; j < VL; ++j)
    sources[j] = j < n ? float_row(dtype, matrix, row(j) * K, K, copy + j * K) : nothing;
  transpose_strip(to, ld, sources, n, K);
}
template <class T>
PYSEQNET_INLINE void pack_rows_of(const void* const* rows, int64_t first, int64_t K, int64_t column,
                                  int64_t N, float* to) {
  constexpr int NR = 4 * VL;
  for (int64_t k = 0; k < K; ++k) {
    const T* from = static_cast<const T*>(rows[first + k]);
    if (from) from += column;
    for (int64_t j0 = 0; j0 < N; j0 += NR) {
      float* panel = to + j0 * K + k * NR;
      for (int v = 0; v < 4; ++v) {
        const int64_t left = N - j0 - v * VL;
        store(panel + v * VL, !from || left <= 0 ? vf{}
                              : left >= VL       ? load_lanes(from + j0 + v * VL)
                                                 : load_between(from + j0 + v * VL, 0, left, vf{}));
      }
    }
  }
}
// Panels of 4 vectors from rows that lie anywhere (null: zeros): columns `column` .. column + N.
inline void pack_rows(DType dtype, const void* const* rows, int64_t first, int64_t K, int64_t column,
                      int64_t N, float* to) {
  if (dtype == DType::f32)
    pack_rows_of<float>(rows, first, K, column, N, to);
  else if (dtype == DType::bf16)
    pack_rows_of<bfloat16>(rows, first, K, column, N, to);
  else
    pack_rows_of<float16>(rows, first, K, column, N, to);
}

// Epilogue: row i of the product goes to rows[i] (plus what is there already).
struct StoreRows {
  float* const* rows;
  bool add;
  template <int R, int NV>
  PYSEQNET_INLINE void operator()(Int<R>, Int<NV>, int64_t i, int64_t j, int64_t n, vf (&acc)[R][NV]) const {
#pragma GCC unroll 32
    for (int r = 0; r < R; ++r) {
      float* p = rows[i + r] + j;
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) {
        const int64_t left = n - v * VL;
        if (left <= 0) break;
        vf x = acc[r][v];
        if (add) x += load_n(p + v * VL, left < VL ? int(left) : VL);
        store_n(p + v * VL, x, left < VL ? int(left) : VL);
      }
    }
  }
};
// rows[i] (+)= a[i] * B, B packed in panels of 4 vectors. Out of line: one copy serves every product.
__attribute__((noinline)) inline void multiply_rows(int64_t M, int64_t N, int64_t K, const float* const* a,
                                                    const float* b, float* const* rows, bool add) {
  gemm_prepacked<4>(M, N, K, [&](int64_t i) { return a[i]; }, b, StoreRows{rows, add});
}

// ---- Which sequences run together. ----

// Sequences in order of length, longest first: at step s the first active(s) of them run, in both directions,
// since each direction counts from its own end. Made once a call.
struct Schedule {
  int64_t* order;  // B: rank -> sequence
  int64_t* seat;   // B: rank -> item within a direction
  int64_t* start;  // T + 1: rows of all steps before; start[T] is their number
  int64_t *cursor, *hand, *spare;

  static Schedule carve(Carver& shared, const RecurrentProblem& p) {
    return {shared.take<int64_t>(p.B),     shared.take<int64_t>(p.B), shared.take<int64_t>(p.T + 1),
            shared.take<int64_t>(p.T + 1), shared.take<int64_t>(p.B), shared.take<int64_t>(p.B)};
  }

  void make(const RecurrentProblem& p) const {
    for (int64_t s = 0; s <= p.T; s++) cursor[s] = 0;
    for (int64_t b = 0; b < p.B; b++) cursor[p.length(b)]++;
    // cursor[l] becomes the number of sequences longer than l: the rank of the first of length l.
    for (int64_t l = p.T, longer = 0; l >= 0; l--) {
      const int64_t here = cursor[l];
      cursor[l] = longer;
      longer += here;
    }
    start[0] = 0;
    for (int64_t s = 0; s < p.T; s++) start[s + 1] = start[s] + cursor[s];
    for (int64_t b = 0; b < p.B; b++) order[cursor[p.length(b)]++] = b;
    for (int64_t r = 0; r < p.B; r++) hand[r] = r;
    if (p.lengths) deal(hand, p.B);
    for (int64_t k = 0; k < p.B; k++) seat[hand[k]] = k;
  }
  int64_t active(int64_t s) const { return start[s + 1] - start[s]; }

 private:
  // Reorders sequences so that any half, quarter, ... of the items holds long and short ones alike: of each
  // four in a row the outer two go to one half, the inner two to the other; the larger half comes first.
  void deal(int64_t* ranks, int64_t n) const {
    if (n <= 2) return;
    const bool outer_first = n % 4 != 3;
    int64_t first = 0, second = 0;
    for (int64_t k = 0; k < n; k++) {
      const bool outer = k % 4 == 0 || k % 4 == 3;
      if (outer == outer_first)
        ranks[first++] = ranks[k];
      else
        spare[second++] = ranks[k];
    }
    for (int64_t k = 0; k < second; k++) ranks[first + k] = spare[k];
    deal(ranks, first);
    deal(ranks + first, second);
  }
};

// Sequences that run in lockstep, longest first. No result depends on which they are: each row of a product
// is summed in the same order whatever rows lie beside it.
constexpr int64_t largest_batch = 128;
struct Batch {
  int64_t d = 0, n = 0;
  int64_t *rank, *sequence, *length;

  static Batch carve(Carver& scratch, const RecurrentProblem& p) {
    const int64_t most = batch_bound(p);
    Batch batch;
    batch.rank = scratch.take<int64_t>(most);
    batch.sequence = scratch.take<int64_t>(most);
    batch.length = scratch.take<int64_t>(most);
    return batch;
  }
  static int64_t batch_bound(const RecurrentProblem& p) { return p.B < largest_batch ? p.B : largest_batch; }
  int64_t steps() const { return n ? length[0] : 0; }
  // How many run at step s, given how many ran at the step before or after.
  int64_t active(int64_t s, int64_t guess) const {
    while (guess > 0 && length[guess - 1] <= s) guess--;
    while (guess < n && length[guess] > s) guess++;
    return guess;
  }
};

// f(batch) for the sequences of items [begin, end); an item is direction * B + seat.
template <class F>
PYSEQNET_INLINE void for_batches(const RecurrentProblem& p, const Schedule& schedule, int64_t begin,
                                 int64_t end, Batch batch, F f) {
  const int64_t most = Batch::batch_bound(p);
  for (int64_t d = begin / (p.B ? p.B : 1); d < p.D && d * p.B < end; d++) {
    batch.d = d, batch.n = 0;
    for (int64_t r = 0; r < p.B; r++) {
      const int64_t item = d * p.B + schedule.seat[r];
      if (item >= begin && item < end) {
        const int64_t b = schedule.order[r];
        batch.rank[batch.n] = r, batch.sequence[batch.n] = b, batch.length[batch.n] = p.length(b);
        batch.n++;
      }
      if (batch.n == most || (r + 1 == p.B && batch.n > 0)) {
        f(batch);
        batch.n = 0;
      }
    }
  }
}

// Sequences to a thread: fewer than four share too little of each weight that is read.
inline int64_t sequence_grain(const RecurrentProblem& p) {
  constexpr int64_t fewest = 4;
  constexpr double products_worth_a_thread = 1e6;  // about 20 microseconds
  const double products = double(p.T) * double(p.gates()) * double(p.H) * double(p.I + p.R()) + 1.0;
  const int64_t worth = int64_t(products_worth_a_thread / products) + 1;
  const int64_t least = p.D > 1 && p.B < fewest ? p.B : fewest;
  return worth > least ? worth : least;
}

inline Refusal refuses_double(const RecurrentProblem& p) {
  return p.dtype == DType::f64 ? "float64 runs on the reference" : accepted;
}

}  // namespace recurrent
}  // namespace PYSEQNET_ISA
}  // namespace pyseqnet
