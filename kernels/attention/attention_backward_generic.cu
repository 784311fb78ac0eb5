// Gradients of masked softmax attention on any CUDA device: every dtype, head size, stride and option of
// attention.h. The weights are recomputed from lse, tile by tile (FlashAttention: Dao et al., 2022).
//
//   query_gradient_tiles   a block owns a tile of queries and walks over keys:     gq = scale * dZ k
//   key_gradient_tiles     a block owns a tile of keys and walks over the queries of all heads that share it:
//                          gv = W^T gout, gk = scale * dZ^T q
//   bias_gradient_tiles    a block owns a tile of the bias's gradient, or a row or column of it or one number
//                          where the bias was broadcast, and walks over everything that it was broadcast to
//   sum_parts              where there are few tiles, several blocks share the walk of each; this adds up
//
// Nothing is scattered, so no atomics on floats: the same bits in every run. Queries that saw no key and keys
// that none of the tile's queries sees are staged as zero where their weight of zero meets them.
//
// Bound: FMA issue. gq costs three tile products, gk and gv four, a bias gradient two more. With B 4, H 16,
// L = S = 2048, D = E = 64 in float that is 7 * 2 * B * H * L * S * D = 240 GFLOP, 3.6 ms at the 67 TFLOP/s
// of an H200, against 0.3 GB of tensors. Predicted before any measurement: 6.5 ms, 55 % of FMA peak; a causal
// problem a little more than half of it. Registers: 198 to 254 in float, no spills on sm_80, 90a, 100, 120:
// two blocks a multiprocessor.
#include "attention/attention_launch.cuh"

namespace pyseqnet {
namespace {

// Where a block's sums go: to the tensor, or to the workspace for sum_parts.
template <class T>
struct GradientResult {
  Operand<T> out;
  Partials<accumulator_t<T>> partials;
};

// Stores the channels channel0 ... of a tile's rows, as far as they exist; rows for which keep says no are
// zero, whatever their sums are. origin: the offset of position 0.
template <class T, int groups, class Keep>
PYSEQNET_DEVICE void store_gradient(const ChannelRegisters<T> (&sum)[groups], const GradientResult<T>& to,
                                    const AttentionGrid& g, const AttentionBlock& block, int64_t origin,
                                    int64_t position0, int64_t positions, int64_t channel0, int64_t channels,
                                    accumulator_t<T> scale, TilePlace<T> at, Keep keep) {
  using Tile = AttentionTile<T>;
  using Acc = accumulator_t<T>;
#pragma unroll
  for (int i = 0; i < Tile::thread_rows; i++) {
    const int64_t position = position0 + at.row(i);
    if (position >= positions) continue;
    const bool kept = keep(at.row(i));
#pragma unroll
    for (int v = 0; v < groups * Tile::channel_vectors; v++) {
      const int group = v / Tile::channel_vectors, first = v % Tile::channel_vectors * Tile::vector;
      const int64_t channel = channel0 + group * Tile::channels + at.channel(v % Tile::channel_vectors);
      if (channel >= channels) continue;
      Acc value[Tile::vector];
#pragma unroll
      for (int c = 0; c < Tile::vector; c++) value[c] = kept ? sum[group][i][first + c] * scale : Acc(0);
      if (g.parts == 1)
        store_channels<T>(to.out.data + origin + position * to.out.strides.n + channel, to.out.vectors, value,
                          channels - channel);
      else
        store_channels<Acc>(to.partials.at(block.part, block.head * positions + position) + channel, false,
                            value, channels - channel);
    }
  }
}

// groups x 64 channels of gq a block.
template <class T, int groups>
__global__ void __launch_bounds__(attention_threads, 2)
    attention_query_gradient_tiles(const AttentionInputs<T> a, const AttentionGrid g,
                                   const GradientResult<T> gq) {
  using Tile = AttentionTile<T>;
  using Acc = accumulator_t<T>;
  PYSEQNET_SHARED(AttentionMemory<T>, memory, );
  const TilePlace<T> at(threadIdx.x);
  const AttentionBlock block = block_of(g);
  begin_sequence(memory, a, block.head / a.H);
  const AttentionHead head = head_of(memory, a, block.head % a.H);
  const int64_t query0 = query_tile_of(a, g.tiles, block.tile) * Tile::positions;
  if (query0 >= head.at.L) return;
  const int64_t channel0 = int64_t(block.column_tile) * (groups * Tile::channels);
  const TileStops<T> stops = key_stops(a, head.h, query0);
  const int64_t end_key = keys_of_queries(a, head, query0);
  const int64_t begin = block.part * g.part_steps, end = min(begin + g.part_steps, stops.count);

  ChannelRegisters<T> sum[groups] = {};
  TileWalk<T> walk;
  clear_seen(memory);
  stage_queries<T, true, true>(memory, a, head, query0);
  __syncthreads();  // for blocks without a key
  for (int64_t step = begin; step < end; step++) {
    const TileStop stop = stops.keys_at(step, query0);
    const int64_t key0 = stop.first;
    if (key0 >= end_key) break;
    const uint32_t visible = visible_pairs(a, head, query0, key0, stop.bits, at);
    if (!walk.enter(memory, visible, at)) continue;
    ScoreRegisters<T> weight = {}, gradient = {};
    gradients_of_tile<T>(weight, gradient, memory, visible, a, head, query0, key0, at);
    __syncthreads();
    store_tile<T>(memory.left, gradient, at);
    const int depth = positions_of<T>(end_key - key0);
    const T* keys = a.k.data + key_offset(a.k.strides, head.at, head.kv, key0);
#pragma unroll
    for (int group = 0; group < groups; group++) {
      const int64_t channel = channel0 + group * Tile::channels;
      if (channel >= a.D) break;
      if (group > 0) __syncthreads();
      stage<T>(memory.right, keys + channel, a.k, a.D - channel,
               [&](int key) { return walk.key_seen(memory, key); });
      __syncthreads();
      multiply_rows<T>(sum[group], memory.left, memory.right, depth, at);
    }
  }
  store_gradient<T, groups>(sum, gq, g, block, query_offset(gq.out.strides, head.at, head.h, 0), query0,
                            head.at.L, channel0, a.D, a.scale, at,
                            [&](int row) { return memory.lse[row] != -Acc(INFINITY); });
}

// One step of a block of key_gradient_tiles: adds values^T rows to the gradient of its keys, for 64 channels.
// Tiles in shared memory may still be read when it begins and when it returns.
template <class T>
PYSEQNET_DEVICE void add_transposed(ChannelRegisters<T>& sum, AttentionMemory<T>& memory,
                                    const ScoreRegisters<T>& value, const T* rows,
                                    const Operand<const T>& operand, int64_t channel, int64_t channels,
                                    int depth, TilePlace<T> at) {
  using Acc = accumulator_t<T>;
  __syncthreads();
  store_transposed<T>(memory.left, value, at);
  stage<T>(memory.right, rows + channel, operand, channels - channel,
           [&](int query) { return memory.lse[query] != -Acc(INFINITY); });
  __syncthreads();
  multiply_rows<T>(sum, memory.left, memory.right, depth, at);
}

// 64 channels of gk and as many of gv a block: where there are more, logits are computed once more.
template <class T>
__global__ void __launch_bounds__(attention_threads, 2)
    attention_key_gradient_tiles(const AttentionInputs<T> a, const AttentionGrid g, const int64_t query_tiles,
                                 const GradientResult<T> gk, const GradientResult<T> gv) {
  using Tile = AttentionTile<T>;
  PYSEQNET_SHARED(AttentionMemory<T>, memory, );
  const TilePlace<T> at(threadIdx.x);
  const AttentionBlock block = block_of(g);
  const int64_t b = block.head / a.Hk, kv = block.head % a.Hk;
  const int64_t key0 = int64_t(block.tile) * Tile::positions;
  const int64_t channel0 = int64_t(block.column_tile) * Tile::channels;
  const int64_t begin = block.part * g.part_steps;
  const int64_t end = min(begin + g.part_steps, a.group * query_tiles);
  begin_sequence(memory, a, b);
  const AttentionSequence& sequence = memory.at;
  if (key0 >= sequence.S) return;

  ChannelRegisters<T> key_sum[1] = {}, value_sum[1] = {};
  TileWalk<T> walk;
  clear_seen(memory);
  // Steps are query_tiles a head; a pattern's list is shorter, and its rest is passed over.
  for (int64_t step = begin; step < end; step++) {
    const AttentionHead head = head_of(memory, a, kv * a.group + step / query_tiles);
    const TileStops<T> stops = query_stops(a, head.h, key0);
    if (step % query_tiles >= stops.count) {
      step += query_tiles - step % query_tiles - 1;
      continue;
    }
    const TileStop stop = stops.queries_at(step % query_tiles);
    const int64_t query0 = stop.first;
    if (query0 >= sequence.L || keys_of_queries(a, head, query0) <= key0) continue;
    stage_queries<T, true, true>(memory, a, head, query0);
    const uint32_t visible = visible_pairs(a, head, query0, key0, stop.bits, at);
    if (!walk.enter(memory, visible, at)) continue;
    ScoreRegisters<T> weight = {}, gradient = {};
    gradients_of_tile<T>(weight, gradient, memory, visible, a, head, query0, key0, at);
    const int depth = positions_of<T>(sequence.L - query0);
    if (channel0 < a.E)
      add_transposed<T>(value_sum[0], memory, weight,
                        a.gout.data + query_offset(a.gout.strides, sequence, head.h, query0), a.gout,
                        channel0, a.E, depth, at);
    if (channel0 < a.D)
      add_transposed<T>(key_sum[0], memory, gradient,
                        a.q.data + query_offset(a.q.strides, sequence, head.h, query0), a.q, channel0, a.D,
                        depth, at);
  }
  __syncthreads();
  const auto seen = [&](int key) { return key_is_seen(memory.ever_seen, key); };
  store_gradient<T, 1>(key_sum, gk, g, block, key_offset(gk.out.strides, sequence, kv, 0), key0, sequence.S,
                       channel0, a.D, a.scale, at, seen);
  store_gradient<T, 1>(value_sum, gv, g, block, key_offset(gv.out.strides, sequence, kv, 0), key0, sequence.S,
                       channel0, a.E, accumulator_t<T>(1), at, seen);
}

// The gradient of a bias: its extents, and how many tiles of logits fold into one of its tiles.
struct BiasGradient {
  void* data;
  bool is_float;  // and T is not
  int64_t H, L, S;
  bool sums_queries, sums_keys;
  int64_t folds_b, folds_h, folds_l, folds_s;

  int64_t folds() const { return folds_b * folds_h * folds_l * folds_s; }
};

// Sums a thread's share of a tile over the tile's queries, its keys, or both. The sum over keys stands in
// column 0 of the first lane of a row, that over queries in row 0 of thread `key`.
template <class T>
PYSEQNET_DEVICE void fold_tile(ScoreRegisters<T>& sum, AttentionMemory<T>& memory, const BiasGradient& bias,
                               TilePlace<T> at) {
  using Tile = AttentionTile<T>;
  using Acc = accumulator_t<T>;
  if (bias.sums_keys) {
#pragma unroll
    for (int i = 0; i < Tile::thread_rows; i++) {
#pragma unroll
      for (int j = 1; j < Tile::thread_columns; j++) sum[i][0] += sum[i][j];
      sum[i][0] = reduce_lanes<Lanes::row>(sum[i][0], [](Acc x, Acc y) { return x + y; });
    }
  }
  if (!bias.sums_queries) return;
  __syncthreads();
#pragma unroll
  for (int j = 0; j < Tile::thread_columns; j++) {
#pragma unroll
    for (int i = 1; i < Tile::thread_rows; i++) sum[0][j] += sum[i][j];
    memory.left[at.first_row * Tile::line + at.column(j)] = sum[0][j];
  }
  __syncthreads();
  const int key = int(threadIdx.x);
  if (key >= Tile::positions) return;
  Acc total = 0;
  for (int row = 0; row < lanes_down; row++) total += memory.left[row * Tile::line + key];
  sum[0][0] = total;
}

template <class T>
__global__ void __launch_bounds__(attention_threads, 2)
    attention_bias_gradient_tiles(const AttentionInputs<T> a, const AttentionGrid g, const BiasGradient bias,
                                  const Partials<accumulator_t<T>> partials) {
  using Tile = AttentionTile<T>;
  using Acc = accumulator_t<T>;
  PYSEQNET_SHARED(AttentionMemory<T>, memory, );
  const TilePlace<T> at(threadIdx.x);
  const AttentionBlock block = block_of(g);
  const int64_t bias_b = block.head / bias.H, bias_h = block.head % bias.H;
  const int64_t begin = block.part * g.part_steps;
  const int64_t end = min(begin + g.part_steps, bias.folds_b * bias.folds_h * bias.folds_l * bias.folds_s);

  ScoreRegisters<T> sum = {};
  TileWalk<T> walk;
  clear_seen(memory);
  for (int64_t fold = begin; fold < end; fold++) {
    const int64_t s = fold % bias.folds_s, rest = fold / bias.folds_s, l = rest % bias.folds_l;
    const int64_t bh = rest / bias.folds_l, fold_h = bh % bias.folds_h, fold_b = bh / bias.folds_h;
    // Of tile and fold, block and fold and so on one is 0: a dimension is either the bias's or summed over.
    __syncthreads();
    begin_sequence(memory, a, bias_b + fold_b);
    const AttentionHead head = head_of(memory, a, bias_h + fold_h);
    const int64_t query0 = (block.tile + l) * Tile::positions,
                  key0 = (block.column_tile + s) * Tile::positions;
    TileStop stop;
    if (query0 >= head.at.L || keys_of_queries(a, head, query0) <= key0) continue;
    if (!find_stop(a, head.h, query0, key0, stop)) continue;
    stage_queries<T, true, true>(memory, a, head, query0);
    const uint32_t visible = visible_pairs(a, head, query0, key0, stop.bits, at);
    if (!walk.enter(memory, visible, at)) continue;
    ScoreRegisters<T> weight = {}, gradient = {};
    gradients_of_tile<T, true>(weight, gradient, memory, visible, a, head, query0, key0, at);
#pragma unroll
    for (int i = 0; i < Tile::thread_rows; i++)
#pragma unroll
      for (int j = 0; j < Tile::thread_columns; j++) sum[i][j] += gradient[i][j];
  }

  fold_tile<T>(sum, memory, bias, at);
  const auto store_at = [&](int64_t query, int64_t key, Acc value) {
    if (query >= bias.L || key >= bias.S) return;
    const int64_t element = ((bias_b * bias.H + bias_h) * bias.L + query) * bias.S + key;
    if (g.parts > 1)
      partials.at(block.part, 0)[element] = value;
    else if (bias.is_float)
      static_cast<float*>(bias.data)[element] = float(value);
    else
      store(static_cast<T*>(bias.data) + element, value);
  };
  const int64_t query0 = int64_t(block.tile) * Tile::positions;
  const int64_t key0 = int64_t(block.column_tile) * Tile::positions;
  if (bias.sums_queries) {
    const int key = int(threadIdx.x);
    if (key < (bias.sums_keys ? 1 : Tile::positions)) store_at(0, key0 + key, sum[0][0]);
    return;
  }
#pragma unroll
  for (int i = 0; i < Tile::thread_rows; i++)
#pragma unroll
    for (int j = 0; j < Tile::thread_columns; j++)
      if (!bias.sums_keys || (j == 0 && at.first_column == 0))
        store_at(query0 + at.row(i), key0 + at.column(j), sum[i][j]);
}

// ---------------------------------------------------------------- launching
constexpr int64_t channels_of_a_group = 64;

// 64 channels of gq a block; 128 in float, where there are so many. For each 64 or 128 the logits are
// computed once more.
int64_t query_groups_of(const AttentionProblem& p) {
  return p.dtype == DType::f32 && p.D > channels_of_a_group ? 2 : 1;
}
AttentionGrid query_grid(const AttentionProblem& p) {
  if (!p.need_q) return {};
  return attention_grid(p.B * p.H, tiles_of(p, p.L),
                        ceil_divide(p.D, query_groups_of(p) * channels_of_a_group), tiles_of(p, p.S),
                        !p.packed);
}
AttentionGrid key_grid(const AttentionProblem& p) {
  if (!p.need_kv) return {};
  return attention_grid(p.B * p.Hk, tiles_of(p, p.S), ceil_divide(std::max(p.D, p.E), channels_of_a_group),
                        p.group() * tiles_of(p, p.L), !p.packed);
}
int64_t query_lines(const AttentionProblem& p) { return p.B * p.H * p.L; }
int64_t key_lines(const AttentionProblem& p) { return p.B * p.Hk * p.S; }

Refusal refuses_backward(const AttentionProblem& p) {
  const int64_t columns = ceil_divide(std::max(p.D, p.E), channels_of_a_group);
  return fits_grid({p.B, p.H, std::max(tiles_of(p, p.L), tiles_of(p, p.S)), columns}) ? accepted
                                                                                      : too_many_tiles;
}
int64_t backward_workspace(const AttentionProblem& p) {
  const AttentionGrid queries = query_grid(p), keys = key_grid(p);
  const int64_t for_queries = queries.parts > 1 ? queries.parts * query_lines(p) * p.D : 0;
  const int64_t for_keys = keys.parts > 1 ? keys.parts * key_lines(p) * (p.D + p.E) : 0;
  return std::max(for_queries, for_keys) * accumulator_bytes(p);
}

template <class T>
int launch_query_gradient(const AttentionProblem& p, const AttentionInputs<T>& a, const AttentionTensors& t,
                          accumulator_t<T>* workspace, void* stream) {
  const AttentionGrid g = query_grid(p);
  if (g.blocks() == 0) return launch_ok;
  const GradientResult<T> gq = {operand_of<T>(t.gq, p.gq_strides, p.D), {workspace, query_lines(p), p.D}};
  const LaunchConfig config = config_of(g.blocks(), stream);
  int error = launch_ok;
  if (query_groups_of(p) == 1) {
    error = launch(config, attention_query_gradient_tiles<T, 1>, a, g, gq);
  } else {
    if constexpr (sizeof(T) == sizeof(float))
      error = launch(config, attention_query_gradient_tiles<T, 2>, a, g, gq);
  }
  if (error || g.parts == 1) return error;
  return sum_parts(gq.partials, g.parts, p.H, p.L, gq.out, stream);
}

template <class T>
int launch_key_gradient(const AttentionProblem& p, const AttentionInputs<T>& a, const AttentionTensors& t,
                        accumulator_t<T>* workspace, void* stream) {
  const AttentionGrid g = key_grid(p);
  if (g.blocks() == 0) return launch_ok;
  const GradientResult<T> gk = {operand_of<T>(t.gk, p.gk_strides, p.D), {workspace, key_lines(p), p.D}};
  const GradientResult<T> gv = {operand_of<T>(t.gv, p.gv_strides, p.E),
                                {workspace + g.parts * key_lines(p) * p.D, key_lines(p), p.E}};
  const int error =
      launch(config_of(g.blocks(), stream), attention_key_gradient_tiles<T>, a, g, tiles_of(p, p.L), gk, gv);
  if (error || g.parts == 1) return error;
  const int error_of_k = sum_parts(gk.partials, g.parts, p.Hk, p.S, gk.out, stream);
  return error_of_k ? error_of_k : sum_parts(gv.partials, g.parts, p.Hk, p.S, gv.out, stream);
}

int backward(const AttentionProblem& p, const AttentionTensors& t, void* workspace, void* stream) {
  return dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    auto* memory = static_cast<accumulator_t<T>*>(workspace);
    const AttentionInputs<T> a = inputs_of<T>(p, t);
    const int error = launch_query_gradient(p, a, t, memory, stream);
    return error ? error : launch_key_gradient(p, a, t, memory, stream);
  });
}

BiasGradient bias_gradient_of(const AttentionProblem& p, const AttentionTensors& t) {
  BiasGradient m = {};
  m.data = t.gbias, m.is_float = p.bias_dtype != p.dtype;
  m.H = p.bias_H, m.L = p.bias_L, m.S = p.bias_S;
  m.sums_queries = p.bias_L == 1, m.sums_keys = p.bias_S == 1;
  m.folds_b = p.bias_B == 1 ? p.B : 1, m.folds_h = p.bias_H == 1 ? p.H : 1;
  m.folds_l = m.sums_queries ? tiles_of(p, p.L) : 1, m.folds_s = m.sums_keys ? tiles_of(p, p.S) : 1;
  return m;
}
AttentionGrid bias_grid(const AttentionProblem& p) {
  return attention_grid(p.bias_B * p.bias_H, tiles_of(p, p.bias_L), tiles_of(p, p.bias_S),
                        bias_gradient_of(p, {}).folds());
}
int64_t bias_elements(const AttentionProblem& p) { return p.bias_B * p.bias_H * p.bias_L * p.bias_S; }

Refusal refuses_bias_gradient(const AttentionProblem& p) {
  return fits_grid({p.bias_B, p.bias_H, tiles_of(p, p.bias_L), tiles_of(p, p.bias_S)}) ? accepted
                                                                                       : too_many_tiles;
}
int64_t bias_workspace(const AttentionProblem& p) {
  const AttentionGrid g = bias_grid(p);
  return g.parts > 1 ? g.parts * bias_elements(p) * accumulator_bytes(p) : 0;
}
int bias_gradient(const AttentionProblem& p, const AttentionTensors& t, void* workspace, void* stream) {
  const AttentionGrid g = bias_grid(p);
  if (g.blocks() == 0) return launch_ok;
  return dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using Acc = accumulator_t<T>;
    const Partials<Acc> partials = {static_cast<Acc*>(workspace), 1, bias_elements(p)};
    const int error = launch(config_of(g.blocks(), stream), attention_bias_gradient_tiles<T>,
                             inputs_of<T>(p, t), g, bias_gradient_of(p, t), partials);
    if (error || g.parts == 1) return error;
    if (p.bias_dtype != p.dtype)
      return sum_parts(partials, g.parts, 1, 1, operand_of<float>(t.gbias, {}, 1), stream);
    return sum_parts(partials, g.parts, 1, 1, operand_of<T>(t.gbias, {}, 1), stream);
  });
}

}  // namespace

extern const AttentionCudaKernel attention_backward_cuda, attention_bias_gradient_cuda;
const AttentionCudaKernel attention_backward_cuda = {"cuda_generic",     80,      0, refuses_backward,
                                                     backward_workspace, backward};
const AttentionCudaKernel attention_bias_gradient_cuda = {
    "cuda_generic", 80, 0, refuses_bias_gradient, bias_workspace, bias_gradient};

}  // namespace pyseqnet
