// The two kernels that walk a sequence in a block, forward and backward: every cell and option of the family
// (recurrent_walk.cu says why, and launches them). A thread owns units, or features of the state, the same ones in
// every step; what crosses units - products, statistics of a row - goes through a block's own scratch in global
// memory, or through shuffles and a few words of shared memory, between barriers.
#pragma once
#include "recurrent/recurrent_sequences.cuh"

namespace pyseqnet {
namespace {  // each source compiles its own

constexpr int walk_threads = 256, walk_warps = walk_threads / 32;
constexpr int walk_blocks = 1;  // a multiprocessor: a sequence's latency counts, so nothing may spill

// A tensor in memory whose dtype is known when the kernel runs: a kernel is compiled for what it sums in alone.
// Null: zeros.
template <class Acc>
struct Stored {
  const void* elements;
  DType dtype;

  PYSEQNET_DEVICE explicit operator bool() const { return elements; }
  PYSEQNET_DEVICE Acc operator[](int64_t i) const {
    if (!elements) return 0;
    if constexpr (sizeof(Acc) == 8)
      return static_cast<const double*>(elements)[i];
    else
      return dtype == DType::f32    ? static_cast<const float*>(elements)[i]
             : dtype == DType::bf16 ? load(static_cast<const __nv_bfloat16*>(elements) + i)
                                    : load(static_cast<const __half*>(elements) + i);
  }
  PYSEQNET_DEVICE void put(int64_t i, Acc v) const {
    void* const to = const_cast<void*>(elements);
    if constexpr (sizeof(Acc) == 8)
      static_cast<double*>(to)[i] = v;
    else if (dtype == DType::f32)
      static_cast<float*>(to)[i] = v;
    else if (dtype == DType::bf16)
      store(static_cast<__nv_bfloat16*>(to) + i, v);
    else
      store(static_cast<__half*>(to) + i, v);
  }
};

// f(typed pointer): what a loop asks once, not at each element.
template <class Acc, class F>
PYSEQNET_DEVICE void with_elements(const Stored<Acc>& tensor, F&& f) {
  if constexpr (sizeof(Acc) == 8)
    f(static_cast<const double*>(tensor.elements));
  else if (tensor.dtype == DType::f32)
    f(static_cast<const float*>(tensor.elements));
  else if (tensor.dtype == DType::bf16)
    f(static_cast<const __nv_bfloat16*>(tensor.elements));
  else
    f(static_cast<const __half*>(tensor.elements));
}

// A thread a unit (cells/rows.h); `warp_sums` is shared memory.
template <class Acc>
struct BlockRow {
  using Real = Acc;
  using Math = ScalarMath<Acc>;
  Acc* warp_sums;

  struct Units {
    int64_t u, end;
    PYSEQNET_DEVICE bool inside() const { return u < end; }
    PYSEQNET_DEVICE void next() { u += walk_threads; }
  };
  PYSEQNET_DEVICE Units units(int64_t H) const { return {int64_t(threadIdx.x), H}; }
  PYSEQNET_DEVICE Acc load(const Acc* p, Units u) const { return p[u.u]; }
  PYSEQNET_DEVICE void store(Acc* p, Units u, Acc v) const { p[u.u] = v; }
  PYSEQNET_DEVICE Acc flags(const uint8_t* p, Units u) const { return p[u.u] ? Acc(1) : Acc(0); }
  PYSEQNET_DEVICE Acc within(Units, Acc x) const { return x; }
  PYSEQNET_DEVICE Acc total(Acc x) const {
    for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
    __syncthreads();  // whoever still reads the sums before
    if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = x;
    __syncthreads();
    Acc sum = 0;
    for (int w = 0; w < walk_warps; w++) sum += warp_sums[w];
    return sum;
  }
};

// What both walks know of the layer.
template <class Acc>
struct WalkLayer {
  using Tensor = Stored<Acc>;
  Sequences q;
  int64_t H, R, P, gates;  // gates: G * H
  Tensor w_hh[max_directions], w_ch[max_directions], w_hr[max_directions];
  Tensor recurrent_bias[max_directions], output_bias[max_directions];
  const Acc* parameters;  // (D, parameters, H)
  Tensor h0, c0;
  const uint8_t *zone_h, *zone_c;
  CellOptions<Acc> options;
  Acc decay;
  OutputUnit unit;
  bool is_jordan;
  Acc* scratch;  // of each sequence and direction
  int64_t scratch_elements;

  PYSEQNET_DEVICE const uint8_t* zone_of_h(int64_t row) const { return zone_h ? zone_h + row * R : nullptr; }
  PYSEQNET_DEVICE const uint8_t* zone_of_c(int64_t row) const { return zone_c ? zone_c + row * H : nullptr; }
};

// Rows of a product that a warp sums side by side: that many loads are under way in each lane, and more where
// the loop is unrolled.
constexpr int walk_rows = 4;

// sum[r] += sum over a lane's share of j of w[k + r, j] * x[j]. Rows past the last read the last.
template <class Element, class Acc>
PYSEQNET_DEVICE void add_rows(Acc (&sum)[walk_rows], const Element* w, const Acc* x, int64_t depth, int64_t k,
                              int64_t count) {
  const Element* row[walk_rows];
#pragma unroll
  for (int r = 0; r < walk_rows; r++) row[r] = w + (k + r < count ? k + r : count - 1) * depth;
#pragma unroll 4
  for (int64_t j = threadIdx.x % 32; j < depth; j += 32)
#pragma unroll
    for (int r = 0; r < walk_rows; r++) sum[r] += load(row[r] + j) * x[j];
}
// to[k] = sum over j of w[k, j] * x[j], a warp walk_rows of k; with a second pair added, of the same dtype, and a
// bias from `biased` on.
template <class Acc>
PYSEQNET_DEVICE void multiply_rows_of(const Stored<Acc>& w, const Acc* x, int64_t depth,
                                      const Stored<Acc>& more, const Acc* z, int64_t more_depth,
                                      const Stored<Acc>& bias, int64_t biased, int64_t count, Acc* to) {
  const int lane = int(threadIdx.x % 32);
  for (int64_t k = threadIdx.x / 32 * walk_rows; k < count; k += walk_warps * walk_rows) {
    Acc sum[walk_rows] = {};
    with_elements(w, [&](const auto* elements) {
      add_rows(sum, elements, x, depth, k, count);
      if (more) add_rows(sum, static_cast<decltype(elements)>(more.elements), z, more_depth, k, count);
    });
#pragma unroll
    for (int r = 0; r < walk_rows; r++) {
      for (int distance = 16; distance > 0; distance /= 2)
        sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], distance);
      if (lane == r && k + r < count) to[k + r] = k + r >= biased ? sum[r] + bias[k + r] : sum[r];
    }
  }
}
// Element j of the transposed product: sum over k of x[k] * w[k, j], where x lies `gap` further from gap_from on.
template <class Acc>
PYSEQNET_DEVICE Acc multiply_column(const Stored<Acc>& w, const Acc* x, int64_t count, int64_t gap_from,
                                    int64_t gap, int64_t width, int64_t j) {
  Acc sum = 0;
  with_elements(w, [&](const auto* elements) {
#pragma unroll 16
    for (int64_t k = 0; k < count; k++)
      sum += x[k + (k >= gap_from ? gap : 0)] * load(elements + k * width + j);
  });
  return sum;
}

// ---------------------------------------------------------------- forward
template <class Acc>
struct WalkForward : WalkLayer<Acc> {
  using Tensor = Stored<Acc>;
  Acc* from_input;     // (D, N, G * H); null: in the reserve
  Acc *saved, *cells;  // the reserve; null: not wanted
  Tensor y, h_n, c_n;
  int64_t y_t, y_b;
};
struct ForwardScratch {
  int64_t state[2], m, sums, y, c, recurrent, slots, elements;

  ForwardScratch(const RecurrentProblem& p, bool own_slots) {
    int64_t used = 0;
    const auto take = [&](int64_t n) {
      const int64_t at = used;
      used += n;
      return at;
    };
    for (int64_t& s : state) s = take(p.R());
    m = take(p.H), sums = take(p.P), y = take(p.P), c = take(p.H), recurrent = take(p.gates() * p.H);
    slots = take(own_slots ? p.facts().slots * p.H : 0);
    elements = used;
  }
};

template <class Acc, template <class> class Cell>
__global__ void __launch_bounds__(walk_threads, walk_blocks)
    walk_forward(const WalkForward<Acc> w, const ForwardScratch at) {
  constexpr CellFacts facts = Cell<ScalarMath<Acc>>::facts;
  PYSEQNET_SHARED(Acc, warp_sums, [walk_warps]);
  const BlockRow<Acc> row_of_units = {warp_sums};
  const int64_t item = blockIdx.x, d = item / w.q.B, b = item % w.q.B, H = w.H, R = w.R;
  const int t = int(threadIdx.x);
  Acc* const own = w.scratch + item * w.scratch_elements;
  Acc *state = own + at.state[0], *next = own + at.state[1];
  Acc* const c = own + at.c;
  for (int64_t j = t; j < R; j += walk_threads) state[j] = w.h0[item * R + j];
  for (int64_t u = t; u < H; u += walk_threads) c[u] = w.c0[item * H + u];
  const Stored<Acc> w_hh = d ? w.w_hh[1] : w.w_hh[0], w_ch = d ? w.w_ch[1] : w.w_ch[0],
                    w_hr = d ? w.w_hr[1] : w.w_hr[0];
  const int64_t length = w.q.length(b);
  for (int64_t s = 0; s < length; s++) {
    const int64_t step = d ? length - 1 - s : s, row = d * w.q.N + w.q.row(step, b);
    Acc* const slots = w.from_input ? own + at.slots : w.saved + row * facts.slots * H;
    if (w.from_input)
      for (int64_t k = t; k < w.gates; k += walk_threads) slots[k] = w.from_input[row * w.gates + k];
    __syncthreads();
    multiply_rows_of(w_hh, state, R, w_ch, c, H, d ? w.recurrent_bias[1] : w.recurrent_bias[0],
                     facts.over_units ? w.gates : facts.apart_from * H, w.gates, own + at.recurrent);
    __syncthreads();
    forward_row<Cell<ScalarMath<Acc>>>(
        row_of_units, H,
        RowForward<Acc>{slots, own + at.recurrent, nullptr, w.parameters + d * facts.parameters * H, state, c,
                        own + at.m, c, w.zone_of_c(row), w.options, w.saved != nullptr});
    if (w.P) {
      __syncthreads();
      multiply_rows_of<Acc>(w_hr, own + at.m, H, {}, nullptr, 0, {}, w.P, w.P, own + at.sums);
    }
    __syncthreads();
    const Stored<Acc> bias = d ? w.output_bias[1] : w.output_bias[0];
    if (bias)
      for (int64_t j = t; j < R; j += walk_threads) own[at.sums + j] += bias[j];
    output_row(row_of_units, R,
               OutputForward<Acc>{own + (w.P ? at.sums : at.m), nullptr, state, next, own + at.y,
                                  w.zone_of_h(row), w.options.zone_h, w.decay, w.unit, w.is_jordan});
    for (int64_t j = t; j < R; j += walk_threads) {
      w.y.put(w.q.at(step, b, w.y_t, w.y_b) + d * R + j, w.is_jordan ? own[at.y + j] : next[j]);
      if (w.is_jordan && w.cells) w.cells[row * R + j] = next[j];
    }
    for (int64_t u = t; facts.has_cell && w.cells && u < H; u += walk_threads) w.cells[row * H + u] = c[u];
    Acc* const spare = state;
    state = next, next = spare;
  }
  for (int64_t j = t; j < R; j += walk_threads) w.h_n.put(item * R + j, state[j]);
  for (int64_t u = t; facts.has_cell && u < H; u += walk_threads) w.c_n.put(item * H + u, c[u]);
}

// ---------------------------------------------------------------- backward
template <class Acc>
struct WalkBackward : WalkLayer<Acc> {
  using Tensor = Stored<Acc>;
  const Acc *saved, *cells;
  Tensor y, gy, gh_n, gc_n;
  int64_t y_t, y_b, gy_t, gy_b;
  Acc* slot_gradients;       // (D, N, sums, H)
  Acc* outputs;              // (D, N, P): gradients of an output layer's or projection's sums
  Acc* unprojected;          // (D, N, H)
  Acc *h_before, *c_before;  // (D, N, R), (D, N, H)
  Acc* parameter_gradients;  // (D, B, parameters, H)
  Tensor gh0, gc0;           // null: not wanted
};
struct BackwardScratch {
  int64_t state, dm, dc, gy, y, elements;

  explicit BackwardScratch(const RecurrentProblem& p) {
    state = 0, dm = p.R(), dc = dm + p.H, gy = dc + p.H, y = gy + p.R(), elements = y + p.R();
  }
};

template <class Acc, template <class> class Cell>
__global__ void __launch_bounds__(walk_threads, walk_blocks)
    walk_backward(const WalkBackward<Acc> w, const BackwardScratch at) {
  constexpr CellFacts facts = Cell<ScalarMath<Acc>>::facts;
  PYSEQNET_SHARED(Acc, warp_sums, [walk_warps]);
  const BlockRow<Acc> row_of_units = {warp_sums};
  const int64_t item = blockIdx.x, d = item / w.q.B, b = item % w.q.B, H = w.H, R = w.R;
  const int t = int(threadIdx.x);
  Acc* const own = w.scratch + item * w.scratch_elements;
  Acc *const state = own + at.state, *const dm = own + at.dm, *const dc = own + at.dc;
  Acc* const parameter_gradients = w.parameter_gradients + item * facts.parameters * H;
  for (int64_t j = t; j < R; j += walk_threads) state[j] = w.gh_n[item * R + j];
  for (int64_t u = t; u < H; u += walk_threads) {
    dc[u] = w.gc_n[item * H + u];
    for (int k = 0; k < facts.parameters; k++) parameter_gradients[k * H + u] = 0;
  }
  const Stored<Acc> w_hh = d ? w.w_hh[1] : w.w_hh[0], w_ch = d ? w.w_ch[1] : w.w_ch[0],
                    w_hr = d ? w.w_hr[1] : w.w_hr[0];
  const int64_t length = w.q.length(b);
  for (int64_t s = length - 1; s >= 0; s--) {
    const int64_t step = d ? length - 1 - s : s, before = d ? step + 1 : step - 1;
    const int64_t row = d * w.q.N + w.q.row(step, b), row_before = s ? d * w.q.N + w.q.row(before, b) : 0;
    const int64_t width = facts.slots;
    // A thread's own features: what the step before left, and what comes from y.
    for (int64_t j = t; j < R; j += walk_threads) {
      const int64_t of_y = w.q.at(step, b, w.y_t, w.y_b) + d * R + j;
      own[at.y + j] = w.y[of_y];
      own[at.gy + j] = w.gy[w.q.at(step, b, w.gy_t, w.gy_b) + d * R + j];
      w.h_before[row * R + j] = s == 0        ? w.h0[item * R + j]
                                : w.is_jordan ? w.cells[row_before * R + j]
                                              : w.y[w.q.at(before, b, w.y_t, w.y_b) + d * R + j];
    }
    for (int64_t u = t; facts.has_cell && u < H; u += walk_threads)
      w.c_before[row * H + u] = s == 0 ? w.c0[item * H + u] : w.cells[row_before * H + u];
    Acc* const sums = w.P ? w.outputs + row * w.P : dm;
    output_row_backward(row_of_units, R,
                        OutputBackward<Acc>{state, own + at.gy, own + at.y, sums, w.zone_of_h(row),
                                            w.options.zone_h, w.decay, w.unit, w.is_jordan});
    if (w.P) {
      __syncthreads();
      for (int64_t u = t; u < H; u += walk_threads) dm[u] = multiply_column(w_hr, sums, w.P, w.P, 0, H, u);
    }
    Acc* const gradients = w.slot_gradients + row * facts.sums() * H;
    backward_row<Cell<ScalarMath<Acc>>>(
        row_of_units, H,
        RowBackward<Acc, Acc>{
            w.saved ? w.saved + row * width * H : own + at.y, w.parameters + d * facts.parameters * H,
            w.h_before + row * R, w.c_before + row * H, dm, dc, gradients, parameter_gradients,
            w.unprojected ? w.unprojected + row * H : nullptr, w.zone_of_c(row), w.options, true});
    __syncthreads();
    for (int64_t j = t; j < R; j += walk_threads) {
      state[j] += multiply_column(w_hh, gradients, w.gates, facts.apart_from * H, facts.apart() * H, R, j);
      if constexpr (facts.reads_h) state[j] += dm[j];
    }
    if constexpr (facts.feeds_cell)
      for (int64_t u = t; u < H; u += walk_threads)
        dc[u] += multiply_column(w_ch, gradients, w.gates, facts.apart_from * H, facts.apart() * H, H, u);
    __syncthreads();
  }
  for (int64_t j = t; w.gh0 && j < R; j += walk_threads) w.gh0.put(item * R + j, state[j]);
  for (int64_t u = t; w.gc0 && u < H; u += walk_threads) w.gc0.put(item * H + u, dc[u]);
}

}  // namespace
}  // namespace pyseqnet
