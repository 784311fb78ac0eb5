// Efficient attention (the map softmax of linear_attention.h) in the generic CUDA kernels: what has to be known
// of queries and keys before their exponentials are taken, and of the state before keys have gradients.
//
//   find_largest        a warp: the largest feature of a query, times the scale
//   sum_exponentials    a block: the log-sums of 64 key features over one part of the keys
//   join_log_sums       a thread: a feature's log-sum over all parts, kept where z would be
//   correct_softmax     a warp: r[d] = -R[d] . S[d], behind the scan of the backward
// Loads then map as for every other feature map, so nothing is rewritten in memory: beside the plain kernels
// this reads Q once and K once more. Bound: memory. Predicted for an H200, B4 H16 N4096 D64 f32: 134 MB, 0.03 ms
// forward; backward the queries again, 0.015 ms.
#pragma once
#include "linear_attention/linear_attention_generic.cuh"

namespace pyseqnet {
namespace {

template <class T>
__global__ void __launch_bounds__(threads) find_largest(const Call<T> c) {
  using Acc = accumulator_t<T>;
  const LinearAttentionProblem& p = c.p;
  const int64_t row = int64_t(blockIdx.x) * (threads / 32) + threadIdx.x / 32;
  if (row >= rows_of(p)) return;  // a whole warp
  const int64_t each_head = p.packed ? p.total : p.L, head = row / each_head, i = row % each_head;
  const int64_t b = p.packed ? 0 : head / p.H, h = p.packed ? head : head % p.H;
  const T* q = Head<T>::at(c.t.q, p.q, b, h, i);
  const int64_t lane = threadIdx.x % 32;
  Acc most = Acc(-HUGE_VAL);
  for (int64_t d = lane; d < p.D; d += 32) most = fmax(most, load(q + d) * Acc(p.scale));
  for (int distance = 16; distance > 0; distance /= 2)
    most = fmax(most, __shfl_xor_sync(0xffffffffu, most, distance));
  if (lane == 0) c.largest[row] = most;
}

// The log of exp(most) * sum as such a pair takes up another; -inf, 0: of nothing.
template <class Acc>
struct LogSum {
  Acc most = Acc(-HUGE_VAL), sum = 0;
  PYSEQNET_DEVICE void add(Acc other, Acc other_sum) {
    if (other_sum == Acc(0)) return;
    const Acc larger = fmax(most, other);
    const Exponential exponential;
    sum =
        (sum == Acc(0) ? Acc(0) : sum * exponential(most - larger)) + other_sum * exponential(other - larger);
    most = larger;
  }
};

template <class T>
__global__ void __launch_bounds__(threads) sum_exponentials(const Call<T> c) {
  using Acc = accumulator_t<T>;
  constexpr int groups = threads / tile;
  PYSEQNET_SHARED(Acc, most, [groups][tile]);
  PYSEQNET_SHARED(Acc, sums, [groups][tile]);
  const int64_t tiles_d = ceil_divide(c.p.D, tile), block = blockIdx.x;
  const Head<T> head(c, block / tiles_d / c.parts);
  const int column = int(threadIdx.x) % tile, group = int(threadIdx.x) / tile;
  const int64_t d = block % tiles_d * tile + column, part = block / tiles_d % c.parts;
  const int64_t end = LinearAttentionTensors::between(0, head.rows.keys, (part + 1) * c.part_rows);
  LogSum<Acc> total;
  if (d < c.p.D)
    for (int64_t j = part * c.part_rows + group; j < end; j += groups)
      total.add(load(head.k + j * c.p.k.row + d), Acc(1));
  most[group][column] = total.most, sums[group][column] = total.sum;
  __syncthreads();
  if (group || d >= c.p.D) return;
  for (int g = 1; g < groups; g++) total.add(most[g][column], sums[g][column]);
  Acc* to = c.part_logs + (head.index * c.parts + part) * 2 * c.p.D + d;
  to[0] = total.most, to[c.p.D] = total.sum;
}

template <class T>
__global__ void __launch_bounds__(threads) join_log_sums(const Call<T> c) {
  using Acc = accumulator_t<T>;
  const int64_t n = int64_t(blockIdx.x) * threads + threadIdx.x, D = c.p.D;
  if (n >= c.heads * D) return;
  const int64_t head = n / D, d = n % D;
  LogSum<Acc> total;
  for (int64_t part = 0; part < c.parts; part++) {
    const Acc* from = c.part_logs + (head * c.parts + part) * 2 * D + d;
    total.add(from[0], from[D]);
  }
  c.total[head * c.state_size + D * c.p.E + d] = total.most + Acc(log(total.sum));
}

template <class T>
__global__ void __launch_bounds__(threads) correct_softmax(const Call<T> c) {
  using Acc = accumulator_t<T>;
  const int64_t n = int64_t(blockIdx.x) * (threads / 32) + threadIdx.x / 32, D = c.p.D, E = c.p.E;
  if (n >= c.heads * D) return;  // a whole warp
  const Head<T> head(c, n / D);
  const int64_t d = n % D;
  Acc* gradient = c.total + head.index * c.state_size;
  const Acc* state = head.saved(0);
  Acc dot = 0;
  for (int64_t e = threadIdx.x % 32; e < E; e += 32) dot += gradient[d * E + e] * state[d * E + e];
  for (int distance = 16; distance > 0; distance /= 2) dot += __shfl_xor_sync(0xffffffffu, dot, distance);
  if (threadIdx.x % 32 == 0) gradient[D * E + d] = -dot;
}

}  // namespace
}  // namespace pyseqnet
