// Linear attention on any CUDA device: every dtype, head size, length, stride and option.
//
// Forward:  sum_parts      a block: 64 x 64 numbers of one part's sum of f v^T (and z)
//           scan_states    a thread: one number of the state, over the parts in order
//           write_outputs  a block: 64 rows x 64 columns of out = lower(a f^T) v + a S, divided by the sums
// Backward: weigh_rows     a warp: one row's dd and 1/sum, or 0 where its gradient is all zero
//           sum_parts, scan_states  the same over queries: sums of a dn^T, from the other end
//           write_query_gradients, write_key_gradients, write_value_gradients
//           write_decay_gradients where the decay wants one (linear_attention_decay.cuh)
// The map softmax has kernels before sum_parts and behind the scan (linear_attention_softmax.cuh).
// A part is a chunk of 64 rows where attention is causal; the scan leaves the state before (backward: behind)
// each. Otherwise parts are up to 16 pieces of the sequence and the scan leaves their total. The triangular
// matrix of a chunk is formed again by every block that needs it: cheaper than storing it.
//
// All products are one function: 64 x 64 results in 256 threads, 4 x 4 in each thread's registers, both
// operands staged in shared memory 16 (double: 8) deep. Operands are functions of (row, depth) that convert,
// apply the feature map and mask as they load, so no tensor is rewritten. No atomics: sums have one order.
//
// Bound, f32: multiply-adds. A step of depth reads 8 numbers from shared memory for 16 multiply-adds a
// thread, 3 cycles of the shared-memory pipe beside 4 of arithmetic. Predicted before any measurement, for an
// H200 (60 Tflop/s of f32, 4.3 TB/s), causal B4 H16 N4096 D64 E64 f32: forward 4 products of 64 x 64 x 64 a
// chunk, 17 Gflop, 0.29 ms at the peak, 0.6 ms expected at half of it; 0.34 GB with the states, 0.08 ms.
// Backward 12 products, 52 Gflop, 1.7 ms. Tensor cores would make forward memory-bound; these kernels do
// without.
#include "linear_attention/linear_attention_decay.cuh"
#include "linear_attention/linear_attention_generic.cuh"
#include "linear_attention/linear_attention_softmax.cuh"

namespace pyseqnet {
namespace {

// ---------------------------------------------------------------- kernels

// dd = -(gout . out) / sum and factor = 1 / sum of each row; 0 and 0 where gout is all zero. A warp a row.
template <class T>
__global__ void __launch_bounds__(threads) weigh_rows(const Call<T> c) {
  using Acc = accumulator_t<T>;
  const LinearAttentionProblem& p = c.p;
  const int64_t row = int64_t(blockIdx.x) * (threads / 32) + threadIdx.x / 32;
  if (row >= rows_of(p)) return;  // a whole warp
  const int lane = int(threadIdx.x) % 32;
  const int64_t each_head = p.packed ? p.total : p.L, head = row / each_head, i = row % each_head;
  const int64_t b = p.packed ? 0 : head / p.H, h = p.packed ? head : head % p.H;
  const T* gout = Head<T>::at(c.t.gout, p.gout, b, h, i);
  const T* out = Head<T>::at(c.t.out, p.out, b, h, i);
  Acc dot = 0;
  int any = 0;
  for (int64_t e = lane; e < c.p.E; e += 32) {
    const Acc g = load(gout + e);
    any |= g != Acc(0);
    if (c.p.normalize) dot += g * load(out + e);
  }
  for (int distance = 16; distance > 0; distance /= 2) {
    dot += __shfl_xor_sync(0xffffffffu, dot, distance);
    any |= __shfl_xor_sync(0xffffffffu, any, distance);
  }
  if (lane) return;
  const Acc inverse = c.p.normalize ? static_cast<const Acc*>(c.t.inverse)[row] : Acc(1);
  const bool counts = any && inverse != Acc(0);
  c.factor[row] = counts ? inverse : Acc(0);
  c.dd[row] = counts && c.p.normalize ? -dot * inverse : Acc(0);
}

// sums[part] = sum over the part's rows of f v^T and f (backward: a dn^T and a dd).
template <class T, bool backward>
__global__ void __launch_bounds__(threads) sum_parts(const Call<T> c) {
  using Acc = accumulator_t<T>;
  PYSEQNET_SHARED(Staged<Acc>, staged, [1]);
  PYSEQNET_SHARED(Powers<Acc>, powers, [1]);
  const int64_t tiles_d = ceil_divide(c.p.D, tile), tiles_e = ceil_divide(c.p.E, tile);
  const BlockIndex block =
      c.p.causal ? BlockIndex::of_tiles(c, c.p.L, tiles_d * tiles_e) : BlockIndex(c.parts, tiles_d * tiles_e);
  const Head<T> head(c, block.head);
  const int64_t d0 = block.third / tiles_e * tile, e0 = block.third % tiles_e * tile;
  const int64_t row0 = block.second * c.part_rows, rows = (backward ? head.rows.L : head.rows.S) - row0;
  if (c.p.causal && rows <= 0) return;
  const int64_t K = LinearAttentionTensors::between(0, rows, c.part_rows);
  powers[0].fill(head, row0);
  const auto weight = [&](int64_t k) {
    return !c.p.causal ? Acc(1) : backward ? powers[0].of_query(int(k)) : powers[0].of_key(int(k));
  };
  const auto left = [&](int x, int64_t k) {
    return backward ? head.query(row0 + k, d0 + x) : head.key(row0 + k, d0 + x);
  };
  const auto right = [&](int x, int64_t k) {
    return (backward ? head.output_gradient(row0 + k, e0 + x) : head.value(row0 + k, e0 + x)) * weight(k);
  };
  Acc sum[each][each] = {};
  add_product<false, false>(staged[0], K, left, right, sum);
  Acc* state = head.part(block.second);
#pragma unroll
  for (int i = 0; i < each; i++)
#pragma unroll
    for (int j = 0; j < each; j++) {
      const int64_t d = d0 + my_row() + i, e = e0 + my_column() + j;
      if (d < c.p.D && e < c.p.E) state[d * c.p.E + e] = sum[i][j];
    }
  const int64_t d = d0 + threadIdx.x;
  if (e0 > 0 || threadIdx.x >= tile || d >= c.p.D) return;
  Acc z = 0;
  for (int64_t k = 0; k < K; k++)
    z += left(int(threadIdx.x), k) * (backward ? head.row_weight(row0 + k) : Acc(1)) * weight(k);
  state[c.p.D * c.p.E + d] = z;
}

// One number of each head's state. Causal: sums[part] becomes the sum before it (`reverse`: behind it), from
// `start`; otherwise all go to `total`. The whole sum goes to `last` where there is such a tensor.
template <class T>
__global__ void __launch_bounds__(threads)
    scan_states(const Call<T> c, bool reverse, const accumulator_t<T>* __restrict__ start,
                const accumulator_t<T>* __restrict__ start_z, accumulator_t<T>* __restrict__ last,
                accumulator_t<T>* __restrict__ last_z) {
  using Acc = accumulator_t<T>;
  const LinearAttentionProblem& p = c.p;
  const int64_t matrix = p.D * p.E, size = c.state_size;
  const int64_t n = int64_t(blockIdx.x) * threads + threadIdx.x;
  if (n >= c.heads * size) return;
  const Head<T> head(c, n / size);
  const int64_t x = n % size;
  const bool in_matrix = x < matrix;
  const int64_t dense = in_matrix ? head.index * matrix + x : head.index * p.D + x - matrix;
  const Acc* from = in_matrix ? start : start_z;
  Acc* to = in_matrix ? last : last_z;
  Acc sum = from ? from[dense] : Acc(0);
  const int64_t parts = p.causal ? ceil_divide(head.rows.S, tile) : c.parts;
  const double decay = p.decayed ? c.t.decay[head.index % p.H] : 1;
  const Acc over_chunk = Acc(integer_power(decay, tile));
  for (int64_t k = 0; k < parts; k++) {
    const int64_t at = reverse ? parts - 1 - k : k;
    Acc* part = head.part(at) + x;
    const Acc before = sum, added = *part;
    if (p.decayed) {
      const int keys = head.keys_from(at * tile);
      sum *= keys == tile ? over_chunk : Acc(integer_power(decay, keys));
    }
    sum += added;
    if (p.causal) *part = before;
  }
  if (!p.causal && (in_matrix || !p.softmax())) c.total[n] = sum;
  if (to) to[dense] = sum;
}

template <class T>
__global__ void __launch_bounds__(threads) write_outputs(const Call<T> c) {
  using Acc = accumulator_t<T>;
  PYSEQNET_SHARED(Staged<Acc>, staged, [1]);
  PYSEQNET_SHARED(Scores<Acc>, scores, [1]);
  PYSEQNET_SHARED(Powers<Acc>, powers, [1]);
  PYSEQNET_SHARED(Acc, inverse, [tile]);
  const BlockIndex block = BlockIndex::of_tiles(c, c.p.L, ceil_divide(c.p.E, tile));
  const Head<T> head(c, block.head);
  const int64_t row0 = block.second * tile, e0 = block.third * tile;
  if (row0 >= head.rows.L) return;
  powers[0].fill(head, row0);
  const Acc* state = head.scanned(block.second);
  const auto query = [&](int x, int64_t k) { return head.query(row0 + x, k); };
  if (c.p.causal)
    write_scores(
        powers[0], staged[0], scores[0], c.p.D, query,
        [&](int x, int64_t k) { return head.key(row0 + x, k); }, [](int) { return Acc(0); });
  {  // four threads a row
    const int row = int(threadIdx.x) / 4, lane = int(threadIdx.x) % 4;
    Acc sum = 0;
    if (c.p.normalize) {
      for (int64_t d = lane; d < c.p.D; d += 4) sum += query(row, d) * head.normalizer(state, d);
      if (c.p.causal) sum *= powers[0].of_query(row);
      for (int j = lane; c.p.causal && j < tile; j += 4) sum += scores[0].at[row][j];
    }
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    sum += Acc(c.p.eps);
    const Acc factor = !c.p.normalize ? Acc(1) : sum == Acc(0) ? Acc(0) : Acc(1) / sum;
    if (lane == 0) {
      inverse[row] = factor;
      if (c.t.inverse && e0 == 0 && row0 + row < head.rows.L)
        static_cast<Acc*>(c.t.inverse)[head.rows.inverse + row0 + row] = factor;
    }
  }
  __syncthreads();
  Acc sum[each][each] = {};
  add_product<true, false>(
      staged[0], c.p.D, query, [&](int x, int64_t k) { return head.entry(state, k, e0 + x); }, sum);
  if (c.p.causal) {
    scale_rows(sum, [&](int row) { return powers[0].of_query(row); });
    add_product<true, false>(
        staged[0], tile, [&](int x, int64_t k) { return scores[0].at[x][k]; },
        [&](int x, int64_t k) { return head.value(row0 + k, e0 + x); }, sum);
  }
#pragma unroll
  for (int i = 0; i < each; i++)
#pragma unroll
    for (int j = 0; j < each; j++) {
      const int64_t row = row0 + my_row() + i, e = e0 + my_column() + j;
      const Acc factor = inverse[my_row() + i];
      if (row < head.rows.L && e < c.p.E)
        store(head.result(c.t.out, c.p.out, row) + e, factor == Acc(0) ? Acc(0) : sum[i][j] * factor);
    }
}

template <class T>
__global__ void __launch_bounds__(threads) write_query_gradients(const Call<T> c) {
  using Acc = accumulator_t<T>;
  PYSEQNET_SHARED(Staged<Acc>, staged, [1]);
  PYSEQNET_SHARED(Scores<Acc>, scores, [1]);
  PYSEQNET_SHARED(Powers<Acc>, powers, [1]);
  const BlockIndex block = BlockIndex::of_tiles(c, c.p.L, ceil_divide(c.p.D, tile));
  const Head<T> head(c, block.head);
  const int64_t row0 = block.second * tile, d0 = block.third * tile;
  if (row0 >= head.rows.L) return;
  powers[0].fill(head, row0);
  const Acc* state = head.saved(block.second);
  const auto gradient = [&](int x, int64_t k) { return head.output_gradient(row0 + x, k); };
  Acc sum[each][each] = {};
  add_product<true, true>(
      staged[0], c.p.E, gradient, [&](int x, int64_t k) { return head.entry(state, d0 + x, k); }, sum);
  if (c.p.causal) {
    scale_rows(sum, [&](int row) { return powers[0].of_query(row); });
    write_scores(
        powers[0], staged[0], scores[0], c.p.E, gradient,
        [&](int x, int64_t k) { return head.value(row0 + x, k); },
        [&](int x) { return head.row_weight(row0 + x); });
    add_product<true, false>(
        staged[0], tile, [&](int x, int64_t k) { return scores[0].at[x][k]; },
        [&](int x, int64_t k) { return head.key(row0 + k, d0 + x); }, sum);
  }
#pragma unroll
  for (int i = 0; i < each; i++)
#pragma unroll
    for (int j = 0; j < each; j++) {
      const int64_t row = row0 + my_row() + i, d = d0 + my_column() + j;
      if (row >= head.rows.L || d >= c.p.D) continue;
      const Acc faded = c.p.causal ? powers[0].of_query(my_row() + i) : Acc(1);
      Acc g = 0;
      if (head.factor[row] != Acc(0))
        g = (sum[i][j] + head.normalizer(state, d) * head.dd[row] * faded) *
            feature_gradient_of(c.p.feature_map, head.query(row, d)) * Acc(c.p.scale);
      store(head.result(c.t.dq, c.p.dq, row) + d, g);
    }
}

template <class T>
__global__ void __launch_bounds__(threads) write_key_gradients(const Call<T> c) {
  using Acc = accumulator_t<T>;
  PYSEQNET_SHARED(Staged<Acc>, staged, [1]);
  PYSEQNET_SHARED(Scores<Acc>, scores, [1]);
  PYSEQNET_SHARED(Powers<Acc>, powers, [1]);
  const BlockIndex block = BlockIndex::of_tiles(c, c.p.S, ceil_divide(c.p.D, tile));
  const Head<T> head(c, block.head);
  const int64_t row0 = block.second * tile, d0 = block.third * tile;
  if (row0 >= head.rows.S) return;
  powers[0].fill(head, row0);
  const Acc *state = head.scanned(block.second), *r = state + c.p.D * c.p.E;
  const auto value = [&](int x, int64_t k) { return head.value(row0 + x, k); };
  Acc sum[each][each] = {};
  add_product<true, true>(
      staged[0], c.p.E, value, [&](int x, int64_t k) { return head.entry(state, d0 + x, k); }, sum);
  if (c.p.causal) {
    scale_rows(sum, [&](int row) { return powers[0].of_key(row); });
    write_scores(
        powers[0], staged[0], scores[0], c.p.E,
        [&](int x, int64_t k) { return head.output_gradient(row0 + x, k); }, value,
        [&](int x) { return head.row_weight(row0 + x); });
    add_product<false, false>(
        staged[0], tile, [&](int x, int64_t k) { return scores[0].at[k][x]; },
        [&](int x, int64_t k) { return head.query(row0 + k, d0 + x); }, sum);
  }
#pragma unroll
  for (int i = 0; i < each; i++)
#pragma unroll
    for (int j = 0; j < each; j++) {
      const int64_t row = row0 + my_row() + i, d = d0 + my_column() + j;
      if (row >= head.rows.S || d >= c.p.D) continue;
      const Acc faded = c.p.causal ? powers[0].of_key(my_row() + i) : Acc(1);
      Acc g = 0;
      if (row < head.rows.keys)
        g = (sum[i][j] + r[d] * faded) * feature_gradient_of(c.p.feature_map, head.key(row, d));
      store(head.result(c.t.dk, c.p.dk, row) + d, g);
    }
}

template <class T>
__global__ void __launch_bounds__(threads) write_value_gradients(const Call<T> c) {
  using Acc = accumulator_t<T>;
  PYSEQNET_SHARED(Staged<Acc>, staged, [1]);
  PYSEQNET_SHARED(Scores<Acc>, scores, [1]);
  PYSEQNET_SHARED(Powers<Acc>, powers, [1]);
  const BlockIndex block = BlockIndex::of_tiles(c, c.p.S, ceil_divide(c.p.E, tile));
  const Head<T> head(c, block.head);
  const int64_t row0 = block.second * tile, e0 = block.third * tile;
  if (row0 >= head.rows.S) return;
  powers[0].fill(head, row0);
  const Acc* state = head.scanned(block.second);
  const auto key = [&](int x, int64_t k) { return head.key(row0 + x, k); };
  Acc sum[each][each] = {};
  add_product<true, false>(
      staged[0], c.p.D, key, [&](int x, int64_t k) { return head.entry(state, k, e0 + x); }, sum);
  if (c.p.causal) {
    scale_rows(sum, [&](int row) { return powers[0].of_key(row); });
    write_scores(
        powers[0], staged[0], scores[0], c.p.D, [&](int x, int64_t k) { return head.query(row0 + x, k); },
        key, [](int) { return Acc(0); });
    add_product<false, false>(
        staged[0], tile, [&](int x, int64_t k) { return scores[0].at[k][x]; },
        [&](int x, int64_t k) { return head.output_gradient(row0 + k, e0 + x); }, sum);
  }
#pragma unroll
  for (int i = 0; i < each; i++)
#pragma unroll
    for (int j = 0; j < each; j++) {
      const int64_t row = row0 + my_row() + i, e = e0 + my_column() + j;
      if (row < head.rows.S && e < c.p.E)
        store(head.result(c.t.dv, c.p.dv, row) + e, row < head.rows.keys ? sum[i][j] : Acc(0));
    }
}

// ---------------------------------------------------------------- launches

// How the rows that are summed are cut.
struct Parts {
  int64_t count, rows;
};
Parts parts_of(const LinearAttentionProblem& p, int64_t rows) {
  const int64_t chunks = ceil_divide(rows, tile);
  if (p.causal) return {chunks, tile};
  const int64_t chunks_each = ceil_divide(chunks, most_parts);
  return {chunks ? ceil_divide(chunks, chunks_each) : 0, chunks_each * tile};
}

// The workspace, in numbers of the accumulation type; forward keeps states in `saved` where it is asked for
// them.
struct Workspace {
  int64_t sums = 0, total = 0, factor = 0, dd = 0, largest = 0, part_logs = 0, numbers = 0;
  Workspace(const LinearAttentionProblem& p, bool backward) {
    const auto take = [&](int64_t count) {
      const int64_t at = numbers;
      numbers += count;
      return at;
    };
    const int64_t rows = backward ? p.L : p.S;
    sums = take((p.causal ? tiles_of(p, rows) : p.heads() * parts_of(p, rows).count) * p.state_size());
    if (!p.causal) total = take(p.heads() * p.state_size());
    if (p.softmax()) largest = take(rows_of(p));
    if (p.softmax() && !backward) part_logs = take(p.heads() * parts_of(p, rows).count * 2 * p.D);
    if (!backward) return;
    factor = take(rows_of(p));
    dd = take(rows_of(p));
  }
};
template <bool backward>
int64_t workspace_bytes(const LinearAttentionProblem& p) {
  return Workspace(p, backward).numbers * (p.dtype == DType::f64 ? 8 : 4);
}

Refusal refuses(const LinearAttentionProblem& p) {
  const int64_t tiles = ceil_divide(p.D, tile) * ceil_divide(p.E, tile);
  const int64_t rows = p.packed ? p.slots() : ceil_divide(p.L > p.S ? p.L : p.S, tile) + 1;
  if (p.heads() > most_blocks / (rows * tiles) || p.heads() * p.state_size() / threads >= most_blocks ||
      rows_of(p) / (threads / 32) >= most_blocks)
    return "more tiles than a grid has blocks";
  return accepted;
}

template <class T, class... Parameters, class... Arguments>
int launch_blocks(int64_t blocks, void* stream, void (*kernel)(Parameters...),
                  const Arguments&... arguments) {
  if (blocks == 0) return launch_ok;
  return launch({.grid = dim3(unsigned(blocks)), .block = dim3(threads), .stream = stream}, kernel,
                arguments...);
}

// The map softmax: what maps of queries (and in forward of keys) start from.
template <class T>
int prepare_softmax(const Call<T>& c, bool backward, void* stream) {
  int error = launch_blocks<T>(ceil_divide(rows_of(c.p), threads / 32), stream, find_largest<T>, c);
  if (error != launch_ok || backward) return error;
  const int64_t parts = c.heads * c.parts * ceil_divide(c.p.D, tile);
  error = launch_blocks<T>(parts, stream, sum_exponentials<T>, c);
  if (error != launch_ok) return error;
  return launch_blocks<T>(ceil_divide(c.heads * c.p.D, threads), stream, join_log_sums<T>, c);
}

template <class T>
int sum_and_scan(const Call<T>& c, bool backward, const void* start, const void* start_z, void* last,
                 void* last_z, void* stream) {
  using Acc = accumulator_t<T>;
  const int64_t tiles = ceil_divide(c.p.D, tile) * ceil_divide(c.p.E, tile);
  const int64_t parts = c.p.causal ? tiles_of(c.p, c.p.S) : c.p.heads() * c.parts;
  int error = launch_blocks<T>(parts * tiles, stream, backward ? sum_parts<T, true> : sum_parts<T, false>, c);
  if (error != launch_ok) return error;
  return launch_blocks<T>(ceil_divide(c.p.heads() * c.p.state_size(), threads), stream, scan_states<T>, c,
                          backward, static_cast<const Acc*>(start), static_cast<const Acc*>(start_z),
                          static_cast<Acc*>(last), static_cast<Acc*>(last_z));
}

template <class T>
Call<T> call_of(const LinearAttentionProblem& p, const LinearAttentionTensors& t, void* workspace,
                bool backward) {
  const Parts parts = parts_of(p, backward ? p.L : p.S);
  const Workspace w(p, backward);
  auto* memory = static_cast<accumulator_t<T>*>(workspace);
  Call<T> c;
  c.p = p, c.t = t;
  c.heads = p.heads(), c.state_size = p.state_size();
  c.parts = parts.count, c.part_rows = parts.rows;
  c.sums = memory + w.sums, c.total = memory + w.total;
  if (backward) c.factor = memory + w.factor, c.dd = memory + w.dd;
  if (p.softmax()) c.largest = memory + w.largest, c.part_logs = memory + w.part_logs;
  return c;
}

int launch_forward(const LinearAttentionProblem& p, const LinearAttentionTensors& t, void* workspace,
                   void* stream) {
  return dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using Acc = accumulator_t<T>;
    Call<T> c = call_of<T>(p, t, workspace, false);
    if (t.saved) (p.causal ? c.sums : c.total) = static_cast<Acc*>(t.saved);
    c.log_sums = p.softmax() ? c.total + p.D * p.E : nullptr;
    int error = p.softmax() ? prepare_softmax(c, false, stream) : launch_ok;
    if (error != launch_ok) return error;
    error = sum_and_scan<T>(c, false, t.state0, t.normalizer0, t.state, t.normalizer, stream);
    if (error != launch_ok) return error;
    return launch_blocks<T>(tiles_of(p, p.L) * ceil_divide(p.E, tile), stream, write_outputs<T>, c);
  });
}

int launch_backward(const LinearAttentionProblem& p, const LinearAttentionTensors& t, void* workspace,
                    void* stream) {
  return dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    Call<T> c = call_of<T>(p, t, workspace, true);
    if (p.softmax()) c.log_sums = static_cast<const accumulator_t<T>*>(t.saved) + p.D * p.E;
    const int64_t query_tiles = tiles_of(p, p.L), key_tiles = tiles_of(p, p.S);
    int error = launch_blocks<T>(ceil_divide(rows_of(p), threads / 32), stream, weigh_rows<T>, c);
    if (error == launch_ok && p.softmax()) error = prepare_softmax(c, true, stream);
    if (error == launch_ok)
      error = sum_and_scan<T>(c, true, t.gstate, t.gnormalizer, t.dstate0, t.dnormalizer0, stream);
    if (error == launch_ok && p.softmax())
      error = launch_blocks<T>(ceil_divide(c.heads * p.D, threads / 32), stream, correct_softmax<T>, c);
    if (error == launch_ok)
      error = launch_blocks<T>(query_tiles * ceil_divide(p.D, tile), stream, write_query_gradients<T>, c);
    if (error == launch_ok)
      error = launch_blocks<T>(key_tiles * ceil_divide(p.D, tile), stream, write_key_gradients<T>, c);
    if (error == launch_ok)
      error = launch_blocks<T>(key_tiles * ceil_divide(p.E, tile), stream, write_value_gradients<T>, c);
    if (error == launch_ok && t.ddecay)
      error = launch_blocks<T>(query_tiles, stream, write_decay_gradients<T>, c);
    return error;
  });
}

}  // namespace

extern const LinearAttentionCudaKernel linear_attention_forward_cuda, linear_attention_backward_cuda;
const LinearAttentionCudaKernel linear_attention_forward_cuda = {
    "cuda_generic", 80, 0, refuses, workspace_bytes<false>, launch_forward};
const LinearAttentionCudaKernel linear_attention_backward_cuda = {
    "cuda_generic", 80, 0, refuses, workspace_bytes<true>, launch_backward};

}  // namespace pyseqnet
