// Masked softmax attention forward on any CUDA device: every dtype, head size, stride and option of
// attention.h.
//
//   forward_tiles   a block owns a tile of 64 queries (32 in double) and walks over tiles of as many keys:
//                   logits, the online softmax step, weights times values (FlashAttention: Dao et al., 2022).
//                   Nothing of the size L x S exists. Tiles in which no query sees a key are left out; that
//                   needs the mask alone, not the logits
//   combine_parts   where there are few queries, several blocks share a tile's keys; this joins their results
//   weights_tiles   the weights, asked for: recomputed from lse, a block a tile
//   row_delta       what backward needs of a row: gout . out + W . gW - glse, a warp a row
//
// Tile products are in attention_tile.cuh. A key that no query of the tile sees is staged as zero where its
// weight of zero meets its value: padding that holds NaN stays there.
//
// Bound: FMA issue. Of forward with D = E = 64 in float, a tile costs a thread 4096 FMA among about 6000
// instructions (counted in sm_90a code: 384 are vector loads from shared memory, 1300 staging, visibility and
// softmax). With B 4, H 16, L = S = 2048 that is 4 * B * H * L * S * D = 68.7 GFLOP, 1.03 ms at the 67
// TFLOP/s of an H200, while q, k, v and out are 134 MB (0.03 ms), and keys and values, read again for each
// tile of queries, 2.1 GB, most of it from the second-level cache. Predicted before any measurement: 1.7 ms,
// 60 % of FMA peak; a causal problem a little more than half of it. 16-bit types take as long as float:
// tensor cores are other kernels' business. Registers: 152 to 164, 216 to 254 for more than 64 channels; no
// spills on sm_80, 90a, 100, 120; three or two blocks a multiprocessor.
#include "attention/attention_launch.cuh"

namespace pyseqnet {
namespace {

template <class Acc>
struct ForwardResults {
  Acc* lse;
  Partials<Acc> sums;    // weighted values of a part, not normalised
  Partials<Acc> states;  // largest and sum of a part
};

// One tile's logits become weights, relative to the largest logit so far; sums are brought to that scale.
template <class T, int groups>
PYSEQNET_DEVICE void softmax_tile(ScoreRegisters<T>& score, SoftmaxState<accumulator_t<T>>* state,
                                  ChannelRegisters<T> (&sum)[groups], const AttentionMemory<T>& memory,
                                  const AttentionInputs<T>& a, int64_t key0, TilePlace<T> at) {
  using Tile = AttentionTile<T>;
  using Acc = accumulator_t<T>;
  const auto larger = [](Acc x, Acc y) { return y > x ? y : x; };
#pragma unroll
  for (int i = 0; i < Tile::thread_rows; i++) {
    Acc largest = score[i][0];
#pragma unroll
    for (int j = 1; j < Tile::thread_columns; j++) largest = larger(largest, score[i][j]);
    largest = reduce_lanes<Lanes::row>(largest, larger);
    const Acc factor = softmax_step(state[i], largest), origin = softmax_origin(state[i].largest);
#pragma unroll
    for (int j = 0; j < Tile::thread_columns; j++) {
      score[i][j] = exp2_of(score[i][j] - origin);
      state[i].sum += score[i][j];
    }
#pragma unroll
    for (int g = 0; g < groups; g++)
#pragma unroll
      for (int c = 0; c < Tile::thread_channels; c++) sum[g][i][c] *= factor;
  }
  if (!a.dropout) return;
  const uint32_t kept = kept_pairs(memory, a, key0, at);
#pragma unroll
  for (int i = 0; i < Tile::thread_rows; i++)
#pragma unroll
    for (int j = 0; j < Tile::thread_columns; j++)
      if (!has_pair<T>(kept, i, j)) score[i][j] = 0;
}

template <class T, int groups>
PYSEQNET_DEVICE void store_forward(const ChannelRegisters<T> (&sum)[groups],
                                   SoftmaxState<accumulator_t<T>>* state, const AttentionInputs<T>& a,
                                   const AttentionGrid& g, const AttentionBlock& block,
                                   const AttentionHead& head, int64_t query0, int64_t channel0,
                                   const Operand<T>& out, const ForwardResults<accumulator_t<T>>& results,
                                   TilePlace<T> at) {
  using Tile = AttentionTile<T>;
  using Acc = accumulator_t<T>;
#pragma unroll
  for (int i = 0; i < Tile::thread_rows; i++) {
    state[i].sum = reduce_lanes<Lanes::row>(state[i].sum, [](Acc x, Acc y) { return x + y; });
    const int64_t query = query0 + at.row(i), line = block.head * a.L + query;  // of the partial results
    if (query >= head.at.L) continue;
    const Acc inverse = softmax_inverse(state[i]) * a.keep_scale;
    if (block.column_tile == 0 && at.first_column == 0) {
      if (g.parts == 1) {
        results.lse[lse_row(head.at, head.h, query)] = softmax_lse(state[i]);
      } else {
        results.states.at(block.part, line)[0] = state[i].largest;
        results.states.at(block.part, line)[1] = state[i].sum;
      }
    }
#pragma unroll
    for (int v = 0; v < groups * Tile::channel_vectors; v++) {
      const int group = v / Tile::channel_vectors, first = v % Tile::channel_vectors * Tile::vector;
      const int64_t channel = channel0 + group * Tile::channels + at.channel(v % Tile::channel_vectors);
      if (channel >= a.E) continue;
      Acc value[Tile::vector];
#pragma unroll
      for (int c = 0; c < Tile::vector; c++)
        value[c] = g.parts == 1 ? sum[group][i][first + c] * inverse : sum[group][i][first + c];
      if (g.parts == 1)
        store_channels<T>(out.data + query_offset(out.strides, head.at, head.h, query) + channel, out.vectors,
                          value, a.E - channel);
      else
        store_channels<Acc>(results.sums.at(block.part, line) + channel, false, value, a.E - channel);
    }
  }
}

// groups x 64 channels of values a block.
template <class T, int groups>
__global__ void __launch_bounds__(attention_threads, groups == 1 ? 3 : 2)
    attention_forward_tiles(const AttentionInputs<T> a, const AttentionGrid g, const Operand<T> out,
                            const ForwardResults<accumulator_t<T>> results) {
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

  SoftmaxState<Acc> state[Tile::thread_rows];
#pragma unroll
  for (int i = 0; i < Tile::thread_rows; i++) state[i] = {-Acc(INFINITY), Acc(0)};
  ChannelRegisters<T> sum[groups] = {};
  TileWalk<T> walk;
  clear_seen(memory);
  stage_queries<T, false, false>(memory, a, head, query0);
  for (int64_t step = begin; step < end; step++) {
    const TileStop stop = stops.keys_at(step, query0);
    const int64_t key0 = stop.first;
    if (key0 >= end_key) break;
    const uint32_t visible = visible_pairs(a, head, query0, key0, stop.bits, at);
    if (!walk.enter(memory, visible, at)) continue;
    ScoreRegisters<T> score = {};
    logits_of_tile<T>(score, memory, visible, a, head, query0, key0, at);
    softmax_tile<T, groups>(score, state, sum, memory, a, key0, at);
    __syncthreads();
    store_tile<T>(memory.left, score, at);
    const int depth = positions_of<T>(end_key - key0);
    const T* values = a.v.data + key_offset(a.v.strides, head.at, head.kv, key0);
#pragma unroll
    for (int group = 0; group < groups; group++) {
      const int64_t channel = channel0 + group * Tile::channels;
      if (channel >= a.E) break;
      if (group > 0) __syncthreads();
      stage<T>(memory.right, values + channel, a.v, a.E - channel,
               [&](int key) { return walk.key_seen(memory, key); });
      __syncthreads();
      multiply_rows<T>(sum[group], memory.left, memory.right, depth, at);
    }
  }
  store_forward<T, groups>(sum, state, a, g, block, head, query0, channel0, out, results, at);
}

// A thread joins the parts of one element of out.
template <class T>
__global__ void __launch_bounds__(attention_threads, 4)
    attention_combine_parts(const ForwardResults<accumulator_t<T>> results, const unsigned parts,
                            const int64_t H, const int64_t L, const accumulator_t<T> keep_scale,
                            const Operand<T> out) {
  using Acc = accumulator_t<T>;
  const int64_t E = results.sums.channels, step = int64_t(gridDim.x) * attention_threads;
  for (int64_t k = int64_t(blockIdx.x) * attention_threads + threadIdx.x; k < results.sums.lines * E;
       k += step) {
    const int64_t line = k / E, channel = k - line * E;
    SoftmaxState<Acc> state = {-Acc(INFINITY), Acc(0)};
    Acc sum = 0;
#pragma unroll 1
    for (unsigned part = 0; part < parts; part++) {
      const Acc* of_part = results.states.at(part, line);
      const Acc factor = softmax_step(state, of_part[0]);
      const Acc part_factor = exp2_of(of_part[0] - softmax_origin(state.largest));
      state.sum += of_part[1] * part_factor;
      sum = sum * factor + results.sums.at(part, line)[channel] * part_factor;
    }
    const int64_t head = line / L, query = line - head * L, b = head / H;
    store(out.at(b, head - b * H, query) + channel, sum * (softmax_inverse(state) * keep_scale));
    if (channel == 0) results.lse[line] = softmax_lse(state);
  }
}

// A block is a tile of queries and, as its column tile, a tile of keys.
template <class T>
__global__ void __launch_bounds__(attention_threads, 4)
    attention_weights_tiles(const AttentionInputs<T> a, const AttentionGrid g, T* __restrict__ weights) {
  using Tile = AttentionTile<T>;
  using Acc = accumulator_t<T>;
  PYSEQNET_SHARED(AttentionMemory<T>, memory, );
  const TilePlace<T> at(threadIdx.x);
  const AttentionBlock block = block_of(g);
  begin_sequence(memory, a, block.head / a.H);
  const AttentionHead head = head_of(memory, a, block.head % a.H);
  const int64_t query0 = int64_t(block.tile) * Tile::positions;
  const int64_t key0 = int64_t(block.column_tile) * Tile::positions;
  TileWalk<T> walk;
  clear_seen(memory);
  stage_queries<T, true, false>(memory, a, head, query0);
  TileStop stop;
  const bool listed = find_stop(a, head.h, query0, key0, stop);
  const uint32_t visible = listed ? visible_pairs(a, head, query0, key0, stop.bits, at) : 0;
  ScoreRegisters<T> score = {};
  if (walk.enter(memory, visible, at)) logits_of_tile<T>(score, memory, visible, a, head, query0, key0, at);
  const uint32_t kept = kept_pairs(memory, a, key0, at);
#pragma unroll
  for (int i = 0; i < Tile::thread_rows; i++) {
    const int64_t query = query0 + at.row(i);
    if (query >= a.L) continue;
    const Acc lse = memory.lse[at.row(i)];
    T* line = weights + (block.head * a.L + query) * a.S + key0;
#pragma unroll
    for (int j = 0; j < Tile::thread_columns; j++) {
      if (key0 + at.column(j) >= a.S) continue;
      const bool counts = has_pair<T>(visible, i, j) && has_pair<T>(kept, i, j) && lse != -Acc(INFINITY);
      const Acc z = score[i][j] - lse;
      store(line + at.column(j), counts ? exp2_of(z > 0 ? Acc(0) : z) * a.keep_scale : Acc(0));
    }
  }
}

template <class T>
struct DeltaTensors {
  Operand<const T> out;
  const T* weights;  // with gradients of the weights
  const accumulator_t<T>* glse;
  accumulator_t<T>* delta;
};

template <class T>
__global__ void __launch_bounds__(attention_threads)
    attention_row_delta(const AttentionInputs<T> a, const DeltaTensors<T> t) {
  using Acc = accumulator_t<T>;
  constexpr int warps = attention_threads / 32;
  const int lane = int(threadIdx.x) % 32;
  const int64_t rows = a.B * a.H * a.L, step = int64_t(gridDim.x) * warps;
  for (int64_t item = int64_t(blockIdx.x) * warps + threadIdx.x / 32; item < rows; item += step) {
    const int64_t head = item / a.L, query = item - head * a.L, b = head / a.H, h = head - b * a.H;
    const AttentionSequence at = sequence_of(a, a.key_lengths, a.cu_q, a.cu_k, b);
    if (query >= at.L) continue;
    const int64_t row = lse_row(at, h, query), line = weights_offset(a, at, h, query);
    const bool alive = a.lse[row] != -Acc(INFINITY);
    Acc sum = 0;
    if (alive) {
      const T* gout = a.gout.data + query_offset(a.gout.strides, at, h, query);
      const T* out = t.out.data + query_offset(t.out.strides, at, h, query);
      for (int64_t e = lane; e < a.E; e += 32) sum += load(gout + e) * load(out + e);
    }
    if (alive && a.gweights)
      for (int64_t j = lane; j < a.S; j += 32) {
        // Behind a weight of zero there may be anything.
        const Acc weight = load(t.weights + line + j);
        if (weight != 0) sum += weight * load(a.gweights + line + j);
      }
    sum = reduce_lanes<Lanes::all>(sum, [](Acc x, Acc y) { return x + y; });
    if (alive && t.glse) sum -= t.glse[row];
    if (lane == 0) t.delta[row] = sum;
  }
}

// ---------------------------------------------------------------- launching
constexpr int64_t channels_of_a_group = 64;

// 64 channels of values a block; 128 in float, where there are so many. For each 64 or 128 the logits are
// computed once more. (16-bit heads that wide are the tensor-core kernels' business.)
int64_t groups_of(const AttentionProblem& p) {
  return p.dtype == DType::f32 && p.E > channels_of_a_group ? 2 : 1;
}
AttentionGrid forward_grid(const AttentionProblem& p) {
  return attention_grid(p.B * p.H, tiles_of(p, p.L), ceil_divide(p.E, groups_of(p) * channels_of_a_group),
                        tiles_of(p, p.S), !p.packed);
}
int64_t lines_of(const AttentionProblem& p) { return p.B * p.H * p.L; }

Refusal refuses_forward(const AttentionProblem& p) {
  return fits_grid({p.B, p.H, tiles_of(p, p.L), ceil_divide(p.E, channels_of_a_group)}) ? accepted
                                                                                        : too_many_tiles;
}
int64_t forward_workspace(const AttentionProblem& p) {
  const AttentionGrid g = forward_grid(p);
  return g.parts > 1 ? g.parts * lines_of(p) * (p.E + 2) * accumulator_bytes(p) : 0;
}

int forward(const AttentionProblem& p, const AttentionTensors& t, void* workspace, void* stream) {
  const AttentionGrid g = forward_grid(p);
  if (g.blocks() == 0) return launch_ok;
  return dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using Acc = accumulator_t<T>;
    const AttentionInputs<T> a = inputs_of<T>(p, t);
    const Operand<T> out = operand_of<T>(t.out, p.out_strides, p.E);
    ForwardResults<Acc> results = {static_cast<Acc*>(t.lse), {}, {}};
    results.sums = {static_cast<Acc*>(workspace), lines_of(p), p.E};
    if (g.parts > 1) results.states = {results.sums.data + g.parts * lines_of(p) * p.E, lines_of(p), 2};
    const LaunchConfig config = config_of(g.blocks(), stream);
    int error = launch_ok;
    if (groups_of(p) == 1) {
      error = launch(config, attention_forward_tiles<T, 1>, a, g, out, results);
    } else {
      if constexpr (sizeof(T) == sizeof(float))
        error = launch(config, attention_forward_tiles<T, 2>, a, g, out, results);
    }
    if (error || g.parts == 1) return error;
    return launch(config_of(blocks_of_elements(lines_of(p) * p.E), stream), attention_combine_parts<T>,
                  results, g.parts, p.H, p.L, a.keep_scale, out);
  });
}

Refusal refuses_weights(const AttentionProblem& p) {
  return fits_grid({p.B, p.H, tiles_of(p, p.L), tiles_of(p, p.S)}) ? accepted : too_many_tiles;
}
int weights(const AttentionProblem& p, const AttentionTensors& t, void*, void* stream) {
  const AttentionGrid g = attention_grid(p.B * p.H, tiles_of(p, p.L), tiles_of(p, p.S), 1);
  if (g.blocks() == 0) return launch_ok;
  return dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return launch(config_of(g.blocks(), stream), attention_weights_tiles<T>, inputs_of<T>(p, t), g,
                  static_cast<T*>(t.weights));
  });
}

Refusal refuses_nothing(const AttentionProblem&) { return accepted; }
int64_t no_workspace(const AttentionProblem&) { return 0; }
int delta(const AttentionProblem& p, const AttentionTensors& t, void*, void* stream) {
  if (lines_of(p) == 0) return launch_ok;
  return dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using Acc = accumulator_t<T>;
    DeltaTensors<T> tensors = {};
    tensors.out = operand_of<T>(static_cast<const void*>(t.out), p.out_strides, p.E);
    tensors.weights = static_cast<const T*>(t.weights);
    tensors.glse = p.with_glse ? static_cast<const Acc*>(t.glse) : nullptr;
    tensors.delta = static_cast<Acc*>(t.delta);
    return launch(config_of(blocks_of_elements(lines_of(p) * 32), stream), attention_row_delta<T>,
                  inputs_of<T>(p, t), tensors);
  });
}

}  // namespace

extern const AttentionCudaKernel attention_forward_cuda, attention_weights_cuda, attention_delta_cuda;
const AttentionCudaKernel attention_forward_cuda = {"cuda_generic",    80,     0, refuses_forward,
                                                    forward_workspace, forward};
const AttentionCudaKernel attention_weights_cuda = {"cuda_generic",  80,           0,
                                                    refuses_weights, no_workspace, weights};
const AttentionCudaKernel attention_delta_cuda = {"cuda_generic",  80,           0,
                                                  refuses_nothing, no_workspace, delta};

}  // namespace pyseqnet
