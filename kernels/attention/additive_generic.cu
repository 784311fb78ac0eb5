// Additive attention on any GPU, fused: the L x S x D tangents are made where they are used and never stored.
//
// A block owns 16 rows: queries (forward, weights, gradient of the queries) or keys (gradients of keys and
// values), and passes over the other side in tiles of 32. Scores: channels come through shared memory 32 at a
// time, a thread sums 4 pairs. Softmax: a warp has 4 rows, a lane a key; online over the tiles. Sums over a
// tile (values, gradients): a thread has a channel and 16 rows in registers, so each operand is read once a
// tile; between tiles they rest in the workspace, which is as large as the results. Backward makes the scores
// again for each side, and the tangents once more for the gradients: nothing is added atomically, and the same
// problem gives the same bits. gw and gbias come as one line a block, summed by a last kernel in order.
//
// Bound: arithmetic. tanhf is about 20 instructions, two of them on the special-function unit (16 a clock and
// multiprocessor). Counted for B = 8, L = S = 256, D = E = 128: 67 M tangents forward and 268 M back, 134
// MFLOP of products with the values forward; bytes: 4 MB of operands, which stay in the second-level cache.
// Predicted on an H200 (132 multiprocessors, 1.8 GHz, 128 lanes): 67 M x 22 instructions / 30 T/s = 50 us
// forward, and about 270 us back. A prediction: nothing here was measured.
#include <algorithm>

#include "attention/additive.h"
#include "attention/additive_math.h"
#include "attention/attention_math.h"
#include "common/cuda_numerics.cuh"

namespace pyseqnet {
namespace {

constexpr int threads = 128, warps = threads / 32;
constexpr int own_rows = 16, other_rows = 32, pairs = own_rows * other_rows / threads;
constexpr int chunk = 32;  // channels that are staged at a time
// Blocks that a multiprocessor's registers must hold: unasked, ptxas aims at more and spills for it.
constexpr int resident = 2;

// One side of the pairs: rows of one batch entry.
template <class T>
struct Side {
  const T* data = nullptr;
  int64_t stride = 0, rows = 0;  // rows that take part

  PYSEQNET_DEVICE accumulator_t<T> at(int64_t row, int64_t channel) const {
    return row < rows ? load(data + row * stride + channel) : accumulator_t<T>(0);
  }
};

// The problem as kernels want it.
template <class T>
struct Call {
  using Acc = accumulator_t<T>;
  AdditiveProblem p;
  const T *q, *k, *v, *w, *bias, *gout, *weights_read, *gweights, *out_read;
  const int64_t* key_lengths;
  Acc *lse, *delta;
  T *out, *weights, *gq, *gk, *gv, *gw, *gbias;
  Acc *first_sum, *second_sum;  // between tiles: out; gq; gk and gv
  Acc *gw_lines, *gbias_lines;  // [blocks of queries][D]

  PYSEQNET_DEVICE int64_t keys(int64_t b) const {
    return key_lengths ? clamped_length(key_lengths[b], p.S) : p.S;
  }
  PYSEQNET_DEVICE Side<T> queries_of(const T* data, const AdditiveStrides& s, int64_t b) const {
    return {data + b * s.b, s.n, p.L};
  }
  PYSEQNET_DEVICE Side<T> keys_of(const T* data, const AdditiveStrides& s, int64_t b) const {
    return {data + b * s.b, s.n, keys(b)};
  }
  PYSEQNET_DEVICE Acc bias_at(int64_t d) const { return bias ? load(bias + d) : Acc(0); }
};

template <class Acc>
struct Memory {
  Acc own[own_rows][chunk + 1], other[other_rows][chunk + 1], weight[chunk];
  Acc probability[own_rows][other_rows + 1], dz[own_rows][other_rows + 1];
  SoftmaxState<Acc> state[own_rows];
  Acc factor[own_rows];
};

// Which pairs a thread has: column, and rows first_row + warps * x.
PYSEQNET_DEVICE int own_column() { return int(threadIdx.x) % other_rows; }
PYSEQNET_DEVICE int first_own_row() { return int(threadIdx.x) / other_rows; }

// sum[i] += sum over channels of term(own + bias, other, weight), weight and bias null: 0; all threads take
// part.
template <class T, class Acc, class Term>
PYSEQNET_DEVICE void sum_over_channels(Memory<Acc>& m, const Side<T>& own, int64_t own0, const Side<T>& other,
                                       int64_t other0, int64_t channels, const T* bias, const T* weight,
                                       Acc (&sum)[pairs], Term term) {
  const int t = int(threadIdx.x);
  for (int64_t d0 = 0; d0 < channels; d0 += chunk) {
    __syncthreads();  // the last chunk has been read
    const int64_t d = d0 + t % chunk;
    const bool inside = d < channels;
    const Acc added = bias && inside ? load(bias + d) : Acc(0);
    for (int r = t / chunk; r < own_rows; r += threads / chunk)
      m.own[r][t % chunk] = inside ? own.at(own0 + r, d) + added : Acc(0);
    for (int r = t / chunk; r < other_rows; r += threads / chunk)
      m.other[r][t % chunk] = inside ? other.at(other0 + r, d) : Acc(0);
    if (t < chunk) m.weight[t] = weight && inside ? load(weight + d) : Acc(0);
    __syncthreads();
    const int width = channels - d0 < chunk ? int(channels - d0) : chunk;
    for (int x = 0; x < width; x++)
      for (int i = 0; i < pairs; i++)
        sum[i] += term(m.own[first_own_row() + warps * i][x], m.other[own_column()][x], m.weight[x]);
  }
}

// Scores in units of log 2; own and other are queries and keys, either way round.
template <class T, class Acc>
PYSEQNET_DEVICE void scores(const Call<T>& c, Memory<Acc>& m, const Side<T>& own, int64_t own0,
                            const Side<T>& other, int64_t other0, Acc (&z)[pairs]) {
  for (int i = 0; i < pairs; i++) z[i] = 0;
  sum_over_channels(m, own, own0, other, other0, c.p.D, c.bias, c.w, z,
                    [](Acc a, Acc b, Acc w) { return w * tanh_of(a + b); });
  for (int i = 0; i < pairs; i++) z[i] *= Acc(log2_e);
}

struct Block {
  int64_t b, first, index;
};
PYSEQNET_DEVICE Block block_of(int64_t rows) {
  const int64_t blocks = (rows + own_rows - 1) / own_rows, index = blockIdx.x;
  return {index / blocks, index % blocks * own_rows, index};
}

template <class Acc>
PYSEQNET_DEVICE Acc warp_largest(Acc x) {
  for (int offset = 16; offset > 0; offset /= 2) {
    const Acc y = __shfl_xor_sync(0xffffffffu, x, offset);
    x = y > x ? y : x;
  }
  return x;
}
template <class Acc>
PYSEQNET_DEVICE Acc warp_sum(Acc x) {
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

// sums[row][channel] = factor[row] * sums[row][channel] + sum over the tile of coefficient[row][column] *
// other[column][channel], for the block's rows; factor null: 1, and 0 at the first tile.
template <class T, class Acc>
PYSEQNET_DEVICE void add_tile(Acc* sums, const Acc* factor, bool first_tile, int rows, int64_t channels,
                              const Acc (&coefficient)[own_rows][other_rows + 1], const Side<T>& other,
                              int64_t other0) {
  for (int64_t e = threadIdx.x; e < channels; e += threads) {
    Acc sum[own_rows] = {};
    for (int c = 0; c < other_rows && other0 + c < other.rows; c++) {
      const Acc x = other.at(other0 + c, e);
      for (int r = 0; r < own_rows; r++) sum[r] += coefficient[r][c] * x;
    }
    for (int r = 0; r < own_rows; r++)
      if (r < rows) {
        Acc* const at = sums + r * channels + e;
        *at = first_tile ? sum[r] : factor ? *at * factor[r] + sum[r] : *at + sum[r];
      }
  }
}

template <class T>
__global__ void __launch_bounds__(threads, resident) additive_forward(const Call<T> c) {
  using Acc = accumulator_t<T>;
  PYSEQNET_SHARED(Memory<Acc>, m, );
  const AdditiveProblem& p = c.p;
  const Block block = block_of(p.L);
  const Side<T> queries = c.queries_of(c.q, p.q, block.b), keys = c.keys_of(c.k, p.k, block.b);
  const Side<T> values = c.keys_of(c.v, p.v, block.b);
  const int t = int(threadIdx.x), lane = t % 32, warp = t / 32;
  const int rows = p.L - block.first < own_rows ? int(p.L - block.first) : own_rows;
  const int64_t row0 = block.b * p.L + block.first;
  if (t < own_rows) m.state[t] = {-Acc(__builtin_inf()), Acc(0)};

  for (int64_t j0 = 0; j0 < keys.rows; j0 += other_rows) {
    Acc z[pairs];
    scores(c, m, queries, block.first, keys, j0, z);
    for (int i = 0; i < pairs; i++)
      m.probability[first_own_row() + warps * i][own_column()] =
          j0 + own_column() < keys.rows ? z[i] : -Acc(__builtin_inf());
    __syncthreads();
    for (int r = warp; r < own_rows; r += warps) {
      const Acc logit = m.probability[r][lane];
      SoftmaxState<Acc> state = m.state[r];
      __syncwarp();
      const Acc factor = softmax_step(state, warp_largest(logit));
      const Acc exponential = exp2_of(logit - softmax_origin(state.largest));
      m.probability[r][lane] = exponential;
      state.sum += warp_sum(exponential);
      if (lane == 0) m.state[r] = state, m.factor[r] = factor;
    }
    __syncthreads();
    add_tile(c.first_sum + row0 * p.E, m.factor, j0 == 0, rows, p.E, m.probability, values, j0);
  }
  __syncthreads();
  for (int64_t e = t; e < p.E; e += threads)
    for (int r = 0; r < rows; r++) {
      const Acc sum = keys.rows > 0 ? c.first_sum[(row0 + r) * p.E + e] : Acc(0);
      store(c.out + (row0 + r) * p.E + e, sum * softmax_inverse(m.state[r]));
    }
  if (t < rows) c.lse[row0 + t] = softmax_lse(m.state[t]);
}

template <class T>
__global__ void __launch_bounds__(threads) additive_weights(const Call<T> c) {
  using Acc = accumulator_t<T>;
  PYSEQNET_SHARED(Memory<Acc>, m, );
  const AdditiveProblem& p = c.p;
  const Block block = block_of(p.L);
  const Side<T> queries = c.queries_of(c.q, p.q, block.b), keys = c.keys_of(c.k, p.k, block.b);
  for (int64_t j0 = 0; j0 < p.S; j0 += other_rows) {
    Acc z[pairs] = {};
    if (j0 < keys.rows) scores(c, m, queries, block.first, keys, j0, z);
    const int64_t j = j0 + own_column();
    for (int i = 0; i < pairs; i++) {
      const int64_t row = block.first + first_own_row() + warps * i;
      if (row >= p.L || j >= p.S) continue;
      const int64_t line = block.b * p.L + row;
      store(c.weights + line * p.S + j, j < keys.rows ? exp2_of(z[i] - c.lse[line] * Acc(log2_e)) : Acc(0));
    }
  }
}

// delta, a warp a row.
template <class T>
__global__ void __launch_bounds__(threads) additive_delta(const Call<T> c) {
  using Acc = accumulator_t<T>;
  const AdditiveProblem& p = c.p;
  const int lane = int(threadIdx.x) % 32;
  const int64_t row = int64_t(blockIdx.x) * warps + threadIdx.x / 32;
  if (row >= p.B * p.L) return;
  const int64_t b = row / p.L, keys = c.keys(b);
  const T* gout = c.gout + b * p.gout.b + row % p.L * p.gout.n;
  Acc sum = 0;
  if (keys > 0)
    for (int64_t e = lane; e < p.E; e += 32) sum += load(gout + e) * load(c.out_read + row * p.E + e);
  if (c.gweights)
    for (int64_t j = lane; j < keys; j += 32)
      sum += load(c.weights_read + row * p.S + j) * load(c.gweights + row * p.S + j);
  sum = warp_sum(sum);
  if (lane == 0) c.delta[row] = sum;
}

// Sums over the tile of dz times the tangent's gradient, a thread a channel; of_queries: also of dz times the
// tangent, which is gw's.
template <bool of_queries, class T, class Acc>
PYSEQNET_DEVICE void add_score_gradients(const Call<T>& c, const Memory<Acc>& m, Acc* sums, Acc* gw_line,
                                         bool first_tile, int rows, const Side<T>& own, int64_t own0,
                                         const Side<T>& other, int64_t other0) {
  const int64_t D = c.p.D;
  for (int64_t d = threadIdx.x; d < D; d += threads) {
    Acc x[own_rows], sum[own_rows] = {}, gw = 0;
    for (int r = 0; r < own_rows; r++) x[r] = own.at(own0 + r, d) + c.bias_at(d);
    for (int k = 0; k < other_rows && other0 + k < other.rows; k++) {
      const Acc y = other.at(other0 + k, d);
      for (int r = 0; r < own_rows; r++) {
        const Acc tangent = tanh_of(x[r] + y);
        sum[r] += m.dz[r][k] * tanh_gradient(tangent);
        if (of_queries) gw += m.dz[r][k] * tangent;
      }
    }
    for (int r = 0; r < own_rows; r++)
      if (r < rows) sums[r * D + d] = first_tile ? sum[r] : sums[r * D + d] + sum[r];
    if (of_queries) gw_line[d] = first_tile ? gw : gw_line[d] + gw;
  }
}

template <bool of_queries, class T>
__global__ void __launch_bounds__(threads, resident) additive_backward(const Call<T> c) {
  using Acc = accumulator_t<T>;
  PYSEQNET_SHARED(Memory<Acc>, m, );
  const AdditiveProblem& p = c.p;
  const Block block = block_of(of_queries ? p.L : p.S);
  const int64_t b = block.b, all_rows = of_queries ? p.L : p.S;
  const Side<T> queries = c.queries_of(c.q, p.q, b), gout = c.queries_of(c.gout, p.gout, b);
  const Side<T> keys = c.keys_of(c.k, p.k, b), values = c.keys_of(c.v, p.v, b);
  const Side<T>& own = of_queries ? queries : keys;
  const Side<T>& other = of_queries ? keys : queries;
  const int t = int(threadIdx.x);
  const int rows = all_rows - block.first < own_rows ? int(all_rows - block.first) : own_rows;
  const int64_t row0 = b * all_rows + block.first;
  Acc* const gw_line = of_queries ? c.gw_lines + block.index * p.D : nullptr;
  // A block of padding has nothing to sum; a batch entry without keys neither.
  const bool works = block.first < own.rows && keys.rows > 0 && queries.rows > 0;

  for (int64_t other0 = 0; works && other0 < other.rows; other0 += other_rows) {
    const bool first_tile = other0 == 0;
    Acc z[pairs], product[pairs] = {};
    scores(c, m, own, block.first, other, other0, z);
    if (p.need_scores)
      sum_over_channels(m, of_queries ? gout : values, block.first, of_queries ? values : gout, other0, p.E,
                        static_cast<const T*>(nullptr), static_cast<const T*>(nullptr), product,
                        [](Acc a, Acc x, Acc) { return a * x; });
    for (int i = 0; i < pairs; i++) {
      const int r = first_own_row() + warps * i;
      const int64_t row = block.first + r, column = other0 + own_column();
      const int64_t query = of_queries ? row : column, key = of_queries ? column : row;
      Acc probability = 0, dz = 0;
      if (query < p.L && key < keys.rows) {
        const int64_t line = b * p.L + query;
        probability = exp2_of(z[i] - c.lse[line] * Acc(log2_e));
        if (c.gweights) product[i] += load(c.gweights + line * p.S + key);
        dz = additive_logit_gradient(probability, product[i], c.delta[line]);
      }
      m.probability[r][own_column()] = probability;
      m.dz[r][own_column()] = dz;
    }
    __syncthreads();
    if (p.need_scores)
      add_score_gradients<of_queries>(c, m, c.first_sum + row0 * p.D, gw_line, first_tile, rows, own,
                                      block.first, other, other0);
    if (!of_queries && p.need_value)
      add_tile(c.second_sum + row0 * p.E, static_cast<const Acc*>(nullptr), first_tile, rows, p.E,
               m.probability, gout, other0);
    __syncthreads();  // dz and the probabilities have been read
  }
  if (p.need_scores)
    for (int64_t d = t; d < p.D; d += threads) {
      Acc bias = 0;
      for (int r = 0; r < rows; r++) {
        const Acc sum = works ? c.first_sum[(row0 + r) * p.D + d] * load(c.w + d) : Acc(0);
        store((of_queries ? c.gq : c.gk) + (row0 + r) * p.D + d, sum);
        bias += sum;
      }
      if (of_queries) {
        c.gbias_lines[block.index * p.D + d] = bias;
        if (!works) gw_line[d] = 0;
      }
    }
  if (!of_queries && p.need_value)
    for (int64_t e = t; e < p.E; e += threads)
      for (int r = 0; r < rows; r++)
        store(c.gv + (row0 + r) * p.E + e, works ? c.second_sum[(row0 + r) * p.E + e] : Acc(0));
}

template <class T>
__global__ void __launch_bounds__(threads) additive_sum_lines(const Call<T> c, const int64_t lines) {
  using Acc = accumulator_t<T>;
  const int64_t d = int64_t(blockIdx.x) * threads + threadIdx.x;
  if (d >= c.p.D) return;
  Acc gw = 0, gbias = 0;
  for (int64_t line = 0; line < lines; line++)
    gw += c.gw_lines[line * c.p.D + d], gbias += c.gbias_lines[line * c.p.D + d];
  store(c.gw + d, gw);
  store(c.gbias + d, gbias);
}

// ---------------------------------------------------------------- host side

constexpr int64_t most_blocks = 2147483647;  // of CUDA, along x
int64_t blocks_of(int64_t batch, int64_t rows) { return batch * ((rows + own_rows - 1) / own_rows); }

Refusal refuses(const AdditiveProblem& p) {
  if (blocks_of(p.B, std::max(p.L, p.S)) > most_blocks || p.B * p.L / warps > most_blocks - 1)
    return "more tiles than a grid has blocks";
  return accepted;
}

// The workspace, laid out once for its size and once for its pointers.
template <class Acc>
struct Workspace {
  Acc *delta, *queries, *keys, *values, *gw, *gbias;
  int64_t bytes;
  Workspace(void* base, const AdditiveProblem& p, AdditivePass pass) {
    Carver carve(static_cast<std::byte*>(base));
    const bool backward = pass == AdditivePass::backward;
    const int64_t lines = backward ? blocks_of(p.B, p.L) * p.D : 0;
    delta = carve.take<Acc>(backward ? p.B * p.L : 0);
    queries = carve.take<Acc>(backward                        ? p.B * p.L * p.D
                              : pass == AdditivePass::forward ? p.B * p.L * p.E
                                                              : 0);
    keys = carve.take<Acc>(backward ? p.B * p.S * p.D : 0);
    values = carve.take<Acc>(backward ? p.B * p.S * p.E : 0);
    gw = carve.take<Acc>(lines), gbias = carve.take<Acc>(lines);
    bytes = carve.used();
  }
};
template <AdditivePass pass>
int64_t workspace_bytes(const AdditiveProblem& p) {
  return p.dtype == DType::f64 ? Workspace<double>(nullptr, p, pass).bytes
                               : Workspace<float>(nullptr, p, pass).bytes;
}

template <class T>
Call<T> call_of(const AdditiveProblem& p, const AdditiveTensors& t) {
  using Acc = accumulator_t<T>;
  Call<T> c = {};
  c.p = p;
  const auto read = [](const void* data) { return static_cast<const T*>(data); };
  const auto write = [](void* data) { return static_cast<T*>(data); };
  c.q = read(t.q), c.k = read(t.k), c.v = read(t.v), c.w = read(t.w), c.gout = read(t.gout);
  c.bias = p.with_bias ? read(t.bias) : nullptr;
  c.out_read = read(t.out), c.weights_read = read(t.weights);
  c.gweights = p.with_gweights ? read(t.gweights) : nullptr;
  c.key_lengths = p.with_key_lengths ? t.key_lengths : nullptr;
  c.lse = static_cast<Acc*>(t.lse);
  c.out = write(t.out), c.weights = write(t.weights);
  c.gq = write(t.gq), c.gk = write(t.gk), c.gv = write(t.gv), c.gw = write(t.gw), c.gbias = write(t.gbias);
  return c;
}

template <class Kernel, class... Arguments>
int launch_blocks(int64_t blocks, void* stream, Kernel kernel, const Arguments&... arguments) {
  if (blocks == 0) return launch_ok;
  LaunchConfig config;
  config.grid = dim3(unsigned(blocks));
  config.block = dim3(threads);
  config.stream = stream;
  return launch(config, kernel, arguments...);
}

int launch_forward(const AdditiveProblem& p, const AdditiveTensors& t, void* workspace, void* stream) {
  return dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    Call<T> c = call_of<T>(p, t);
    c.first_sum = Workspace<accumulator_t<T>>(workspace, p, AdditivePass::forward).queries;
    return launch_blocks(blocks_of(p.B, p.L), stream, additive_forward<T>, c);
  });
}
int launch_weights(const AdditiveProblem& p, const AdditiveTensors& t, void*, void* stream) {
  return dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return launch_blocks(blocks_of(p.B, p.L), stream, additive_weights<T>, call_of<T>(p, t));
  });
}
int launch_backward(const AdditiveProblem& p, const AdditiveTensors& t, void* workspace, void* stream) {
  return dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Workspace<accumulator_t<T>> space(workspace, p, AdditivePass::backward);
    Call<T> c = call_of<T>(p, t);
    c.delta = space.delta, c.gw_lines = space.gw, c.gbias_lines = space.gbias;
    int error = launch_blocks((p.B * p.L + warps - 1) / warps, stream, additive_delta<T>, c);
    if (error) return error;
    if (p.need_scores) {
      const int64_t blocks = blocks_of(p.B, p.L);
      c.first_sum = space.queries;
      error = launch_blocks(blocks, stream, additive_backward<true, T>, c);
      if (error) return error;
      error = launch_blocks((p.D + threads - 1) / threads, stream, additive_sum_lines<T>, c, blocks);
      if (error) return error;
    }
    c.first_sum = space.keys, c.second_sum = space.values;
    return launch_blocks(blocks_of(p.B, p.S), stream, additive_backward<false, T>, c);
  });
}

}  // namespace

extern const AdditiveCudaKernel additive_forward_cuda, additive_weights_cuda, additive_backward_cuda;
const AdditiveCudaKernel additive_forward_cuda = {
    "cuda_generic", 80, 0, refuses, workspace_bytes<AdditivePass::forward>, launch_forward};
const AdditiveCudaKernel additive_weights_cuda = {
    "cuda_generic", 80, 0, refuses, workspace_bytes<AdditivePass::weights>, launch_weights};
const AdditiveCudaKernel additive_backward_cuda = {
    "cuda_generic", 80, 0, refuses, workspace_bytes<AdditivePass::backward>, launch_backward};

}  // namespace pyseqnet
