// What the generic CUDA kernels of the recurrent family share: the sequences as a kernel sees them, and the
// list of the rows that exist, which products over all steps run over. A padded position has no place in that
// list: nothing is spent on it, and whatever it holds is never read.
#pragma once
#include "common/cuda_numerics.cuh"
#include "recurrent/recurrent.h"

namespace pyseqnet {

// Blocks are numbered in one dimension of the grid. Work for more of them is refused by launch(), not cut
// short.
inline dim3 grid_of(int64_t blocks, unsigned y = 1, unsigned z = 1) {
  constexpr int64_t limit = (int64_t(1) << 31) - 1;
  return dim3(unsigned(blocks <= limit ? blocks : limit + 1), y, z);
}

PYSEQNET_HOST_DEVICE constexpr int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// RecurrentProblem's steps and rows, for kernels. lengths and offsets are in the device's memory.
struct Sequences {
  int64_t T, B, N;
  const int64_t *lengths, *offsets;

  PYSEQNET_DEVICE int64_t length(int64_t b) const { return lengths ? lengths[b] : T; }
  PYSEQNET_DEVICE int64_t row(int64_t t, int64_t b) const { return offsets ? offsets[t] + b : t * B + b; }
  PYSEQNET_DEVICE int64_t at(int64_t t, int64_t b, int64_t stride_t, int64_t stride_b) const {
    return offsets ? (offsets[t] + b) * stride_b : t * stride_t + b * stride_b;
  }
  // Whether step t is where a sequence begins, or ends, in direction d.
  PYSEQNET_DEVICE bool begins(int64_t t, int64_t b, int64_t d) const {
    return d ? t + 1 == length(b) : t == 0;
  }
  PYSEQNET_DEVICE bool ends(int64_t t, int64_t b, int64_t d) const { return d ? t == 0 : t + 1 == length(b); }
};

inline Sequences sequences_of(const RecurrentProblem& p, const RecurrentTensors& t) {
  return {p.T, p.B, p.rows(), t.lengths, t.offsets};
}

// The rows of all existing (t, b), ordered by t, then by b: where each lies in x, in gx and in tensors of N
// rows, and where the state before it lies. Null: not wanted.
struct RowLists {
  int64_t *row, *x, *gx;
  int64_t* before[max_directions];  // an element of y, or ~i for element i of h0
  unsigned* arrived;                // counters that are set to 0 in passing
  int64_t counters;
};
struct RowStrides {
  int64_t x_t, x_b, gx_t, gx_b, y_t, y_b;
  int64_t D, R;
};

namespace {  // each source compiles its own

// One warp a step: it counts the rows before the step, then numbers the step's own.
constexpr int list_threads = 32;

__global__ void __launch_bounds__(list_threads)
    list_rows(const Sequences q, const RowLists to, const RowStrides s) {
  const int64_t t = blockIdx.x;
  const int lane = int(threadIdx.x);
  if (t == 0)
    for (int64_t i = lane; i < to.counters; i += list_threads) to.arrived[i] = 0;
  int before = 0;  // fewer than 2^31: refuses() sees to it
  for (int64_t b = lane; b < q.B; b += list_threads) {
    const int64_t length = q.length(b);
    before += int(length < t ? length : t);
  }
  for (int distance = list_threads / 2; distance > 0; distance /= 2)
    before += __shfl_xor_sync(0xffffffffu, before, distance);
  int64_t next = before;
  for (int64_t b0 = 0; b0 < q.B; b0 += list_threads) {
    const int64_t b = b0 + lane;
    const bool exists = b < q.B && t < q.length(b);
    const unsigned all = __ballot_sync(0xffffffffu, exists);
    if (exists) {
      const int64_t m = next + __popc(all & ((1u << lane) - 1));
      if (to.row) to.row[m] = q.row(t, b);
      if (to.x) to.x[m] = q.at(t, b, s.x_t, s.x_b);
      if (to.gx) to.gx[m] = q.at(t, b, s.gx_t, s.gx_b);
      for (int64_t d = 0; d < s.D; d++)
        if (int64_t* list = d ? to.before[1] : to.before[0])
          list[m] =
              q.begins(t, b, d) ? ~((d * q.B + b) * s.R) : q.at(d ? t + 1 : t - 1, b, s.y_t, s.y_b) + d * s.R;
    }
    next += __popc(all);
  }
}

inline int launch_list_rows(const Sequences& q, const RowLists& to, const RowStrides& strides, void* stream) {
  if (q.T == 0 || q.B == 0) return launch_ok;
  return launch({.grid = grid_of(q.T), .block = dim3(list_threads), .stream = stream}, list_rows, q, to,
                strides);
}

}  // namespace

// Writes 0 to the padded positions of a tensor (T, B, width), a warp a position.
constexpr int zero_threads = 256;

template <class T>
__global__ void __launch_bounds__(zero_threads)
    zero_padding(const Sequences q, T* __restrict__ to, int64_t stride_t, int64_t stride_b, int64_t width) {
  const int64_t position = int64_t(blockIdx.x) * (zero_threads / 32) + threadIdx.x / 32;
  const int64_t t = position / q.B, b = position % q.B;
  if (t >= q.T || t < q.length(b)) return;
  T* row = to + t * stride_t + b * stride_b;
  for (int64_t i = threadIdx.x % 32; i < width; i += 32) row[i] = from_accumulator<T>(0);
}

template <class T>
int launch_zero_padding(const Sequences& q, void* to, int64_t stride_t, int64_t stride_b, int64_t width,
                        void* stream) {
  if (!q.lengths || q.offsets || !to || q.T * q.B == 0) return launch_ok;
  return launch({.grid = grid_of(ceil_divide(q.T * q.B, zero_threads / 32)),
                 .block = dim3(zero_threads),
                 .stream = stream},
                zero_padding<T>, q, static_cast<T*>(to), stride_t, stride_b, width);
}

}  // namespace pyseqnet
