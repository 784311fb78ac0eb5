// The gradient of a head's decay, by chunks of 64 rows, for the generic CUDA kernels.
//
//   dg = sum over the keys j of R[j] . S[j-1] + r[j] . z[j-1]
// What happens in a chunk to the state S at its start and to the gradient R at its end is a sum over pairs,
// each with a power of g, so that dg is the same sum with the powers' derivatives n g^(n-1):
//   pairs     query i, key j <= i of the chunk     (a[i] . f[j]) (dn[i] . v[j] + dd[i])
//   queries   through the state at its start       a[i] . (S dn[i] + z dd[i])
//   keys      through the state at its end         f[j] . (R v[j] + r)
//   the state from start to end                    S . R + z . r
// Nothing is divided by g and no large sums are subtracted: exact at g = 0, and no worse for long sequences.
//
// A block is a chunk: products of 64 x 64 x (3 D + E) by the generic tiles, as much as the other gradients'
// kernels do; one number is written. Bound as theirs, f32 multiply-adds: predicted for an H200, B4 H16 N4096
// D64 f32, 64 x 64 x 256 a chunk, 4096 chunks, 8.6 Gflop, 0.3 ms.
#pragma once
#include "linear_attention/linear_attention_generic.cuh"

namespace pyseqnet {
namespace {

// The sum over a block's threads, in one order; every thread calls it, thread 0 has the result.
template <class Acc>
PYSEQNET_DEVICE Acc sum_of_block(Acc x, Acc* warps) {
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  Acc sum = 0;
  for (int w = 0; w < threads / 32; w++) sum += warps[w];
  return sum;
}
// Sums weight(i, j) x[i][j] over this thread's results.
template <class Acc, class W>
PYSEQNET_DEVICE Acc weighed(const Acc (&x)[each][each], W weight) {
  Acc sum = 0;
#pragma unroll
  for (int i = 0; i < each; i++)
#pragma unroll
    for (int j = 0; j < each; j++) sum += weight(x[i][j], my_row() + i, my_column() + j);
  return sum;
}

template <class T>
__global__ void __launch_bounds__(threads) write_decay_gradients(const Call<T> c) {
  using Acc = accumulator_t<T>;
  PYSEQNET_SHARED(Staged<Acc>, staged, [1]);
  PYSEQNET_SHARED(Powers<Acc>, powers, [1]);
  PYSEQNET_SHARED(Acc, slopes, [tile + 1]);
  PYSEQNET_SHARED(Acc, warps, [threads / 32]);
  const BlockIndex block = BlockIndex::of_tiles(c, c.p.L, 1);
  const Head<T> head(c, block.head);
  const int64_t row0 = block.second * tile, D = c.p.D, E = c.p.E;
  if (row0 >= head.rows.L) return;
  if (int(threadIdx.x) <= tile)
    slopes[threadIdx.x] = Acc(integer_power_gradient(c.t.decay[head.index % c.p.H], int64_t(threadIdx.x)));
  powers[0].fill(head, row0);
  const Acc *state = head.saved(block.second), *ahead = head.scanned(block.second);
  const auto query = [&](int x, int64_t k) { return head.query(row0 + x, k); };
  const auto key = [&](int x, int64_t k) { return head.key(row0 + x, k); };
  const auto value = [&](int x, int64_t k) { return head.value(row0 + x, k); };
  const auto gradient = [&](int x, int64_t k) { return head.output_gradient(row0 + x, k); };

  Acc scores[each][each] = {}, score_gradients[each][each] = {};
  add_product<true, true>(staged[0], D, query, key, scores);
  add_product<true, true>(staged[0], E, gradient, value, score_gradients);
  Acc sum = 0;
#pragma unroll
  for (int i = 0; i < each; i++)
#pragma unroll
    for (int j = 0; j < each; j++) {
      const int r = my_row() + i, s = my_column() + j;
      if (s <= r && s < powers[0].keys)
        sum += scores[i][j] * (score_gradients[i][j] + head.row_weight(row0 + r)) *
               slopes[powers[0].fades(r) - 1 - s];
    }
  for (int64_t d0 = 0; d0 < D; d0 += tile) {
    Acc back[each][each] = {}, forth[each][each] = {};
    add_product<true, true>(
        staged[0], E, gradient, [&](int x, int64_t k) { return head.entry(state, d0 + x, k); }, back);
    sum += weighed(back, [&](Acc x, int row, int column) {
      const int64_t d = d0 + column;
      if (d >= D) return Acc(0);
      return query(row, d) * (x + state[D * E + d] * head.row_weight(row0 + row)) *
             slopes[powers[0].fades(row)];
    });
    add_product<true, true>(
        staged[0], E, value, [&](int x, int64_t k) { return head.entry(ahead, d0 + x, k); }, forth);
    sum += weighed(forth, [&](Acc x, int row, int column) {
      const int64_t d = d0 + column;
      if (d >= D || row >= powers[0].keys) return Acc(0);
      return key(row, d) * (x + ahead[D * E + d]) * slopes[powers[0].keys - 1 - row];
    });
  }
  Acc through = 0;
  for (int64_t x = threadIdx.x; x < c.state_size; x += threads) through += state[x] * ahead[x];
  sum = sum_of_block(sum + through * slopes[powers[0].keys], warps);
  if (threadIdx.x == 0) static_cast<Acc*>(c.t.ddecay)[head.rows.saved + block.second] = sum;
}

}  // namespace
}  // namespace pyseqnet
