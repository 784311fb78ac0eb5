// How the generic CUDA kernels of softmax attention are laid over a grid, and how work that is split among
// blocks comes together again.
#pragma once
#include <algorithm>
#include <initializer_list>

#include "attention/attention_scores.cuh"

namespace pyseqnet {

// One dimension of blocks (CUDA allows 2^31 - 1 of them along x, 65535 elsewhere):
// heads x tiles x parts x column tiles, the last of them fastest. A tile takes `steps` steps, of which a part
// does part_steps.
struct AttentionGrid {
  int64_t heads = 0;
  unsigned tiles = 0, parts = 1, column_tiles = 1;
  int64_t part_steps = 0;

  int64_t blocks() const { return heads * tiles * parts * column_tiles; }
};

struct AttentionBlock {
  int64_t head;
  unsigned tile, part, column_tile;
};
PYSEQNET_DEVICE AttentionBlock block_of(const AttentionGrid& g) {
  unsigned rest = blockIdx.x;
  const unsigned column_tile = rest % g.column_tiles;
  rest /= g.column_tiles;
  const unsigned part = rest % g.parts;
  rest /= g.parts;
  const unsigned head = rest / g.tiles;
  return {int64_t(head), rest - head * g.tiles, part, column_tile};
}

constexpr int64_t max_attention_blocks = 2147483647;  // of CUDA, along x
// Fewer blocks than this leave an H200 (132 multiprocessors, three blocks each) half empty: their work is
// split. A constant, not a question to the device: the same problem gives the same bits everywhere.
constexpr int64_t enough_blocks = 198, wanted_blocks = 396;
// A part of fewer steps would spend its time on leaving and joining what it found.
constexpr int64_t least_part_steps = 3;

inline int64_t ceil_divide(int64_t a, int64_t b) { return a / b + (a % b != 0); }

// split: whether several blocks may share a tile's steps.
inline AttentionGrid attention_grid(int64_t heads, int64_t tiles, int64_t column_tiles, int64_t steps,
                                    bool split = true) {
  AttentionGrid g;
  g.heads = heads;
  g.tiles = unsigned(std::min(tiles, max_attention_blocks));
  g.column_tiles = unsigned(std::min(column_tiles, max_attention_blocks));
  const int64_t blocks = heads * tiles * column_tiles;
  int64_t parts = 1;
  if (split && blocks > 0 && blocks < enough_blocks) {
    parts = std::min(ceil_divide(wanted_blocks, blocks), ceil_divide(steps, least_part_steps));
    parts = std::max<int64_t>(parts, 1);
  }
  g.part_steps = ceil_divide(steps, parts);
  g.parts = unsigned(g.part_steps > 0 ? ceil_divide(steps, g.part_steps) : 1);
  return g;
}

inline LaunchConfig config_of(int64_t blocks, void* stream) {
  LaunchConfig config;
  config.grid = dim3(unsigned(blocks));
  config.block = dim3(attention_threads);
  config.stream = stream;
  return config;
}

// What parts of a block's work left in the workspace: `lines` lines of `channels` for each part.
template <class Acc>
struct Partials {
  Acc* data;
  int64_t lines, channels;

  PYSEQNET_DEVICE Acc* at(unsigned part, int64_t line) const {
    return data + (part * lines + line) * channels;
  }
};

// Adds up the parts, in order: out[b, h, n, :] = sum over parts of partial[part][(b * heads + h) * N + n][:].
template <class Acc, class Out>
__global__ void __launch_bounds__(attention_threads)
    attention_sum_parts(const Partials<Acc> partials, const unsigned parts, const int64_t heads,
                        const int64_t N, const Operand<Out> out) {
  const int64_t step = int64_t(gridDim.x) * attention_threads;
  for (int64_t k = int64_t(blockIdx.x) * attention_threads + threadIdx.x;
       k < partials.lines * partials.channels; k += step) {
    const int64_t line = k / partials.channels, channel = k - line * partials.channels;
    Acc sum = 0;
    for (unsigned part = 0; part < parts; part++) sum += partials.at(part, line)[channel];
    const int64_t head = line / N, n = line - head * N, b = head / heads;
    out.at(b, head - b * heads, n)[channel] = from_accumulator<Out>(accumulator_t<Out>(sum));
  }
}

// Blocks of a kernel whose threads stride over elements.
inline int64_t blocks_of_elements(int64_t elements) {
  return std::min(ceil_divide(elements, attention_threads), max_attention_blocks);
}

template <class Acc, class Out>
int sum_parts(const Partials<Acc>& partials, unsigned parts, int64_t heads, int64_t N,
              const Operand<Out>& out, void* stream) {
  return launch(config_of(blocks_of_elements(partials.lines * partials.channels), stream),
                attention_sum_parts<Acc, Out>, partials, parts, heads, N, out);
}

// ---------------------------------------------------------------- the contract's structs as kernels want
// them
inline int64_t tiles_of(const AttentionProblem& p, int64_t positions) {
  return ceil_divide(
      positions, p.dtype == DType::f64 ? AttentionTile<double>::positions : AttentionTile<float>::positions);
}
inline int64_t accumulator_bytes(const AttentionProblem& p) { return p.dtype == DType::f64 ? 8 : 4; }

template <class T>
Operand<T> operand_of(void* data, const AttentionStrides& s, int64_t channels) {
  constexpr int64_t n = AttentionTile<T>::vector;
  const bool vectors = reinterpret_cast<uintptr_t>(data) % (n * sizeof(T)) == 0 && s.b % n == 0 &&
                       s.h % n == 0 && s.n % n == 0 && channels % n == 0;
  return {static_cast<T*>(data), s, vectors};
}
template <class T>
Operand<const T> operand_of(const void* data, const AttentionStrides& s, int64_t channels) {
  const Operand<T> o = operand_of<T>(const_cast<void*>(data), s, channels);
  return {o.data, o.strides, o.vectors};
}

template <class T>
AttentionInputs<T> inputs_of(const AttentionProblem& p, const AttentionTensors& t) {
  using Acc = accumulator_t<T>;
  AttentionInputs<T> a = {};
  a.B = p.B, a.H = p.H, a.Hk = p.Hk, a.L = p.L, a.S = p.S, a.D = p.D, a.E = p.E, a.group = p.group();
  a.q = operand_of<T>(t.q, p.q_strides, p.D), a.k = operand_of<T>(t.k, p.k_strides, p.D);
  a.v = operand_of<T>(t.v, p.v_strides, p.E), a.gout = operand_of<T>(t.gout, p.gout_strides, p.E);
  a.lse = static_cast<const Acc*>(t.lse), a.delta = static_cast<const Acc*>(t.delta);
  a.gweights = p.with_gweights ? static_cast<const T*>(t.gweights) : nullptr;
  a.scale = Acc(p.scale), a.scale_log2 = Acc(p.scale * log2_e);
  a.softcap = Acc(p.softcap);
  a.causal = p.causal, a.causal_offset = p.causal_offset;
  a.with_key_lengths = p.with_key_lengths, a.key_lengths = t.key_lengths;
  a.mask = p.with_mask ? static_cast<const uint8_t*>(t.mask) : nullptr;
  a.mask_strides = p.mask_strides, a.mask_stride_s = p.mask_stride_s;
  a.bias = p.with_bias ? t.bias : nullptr, a.bias_is_float = p.bias_dtype != p.dtype;
  a.bias_strides = p.bias_strides, a.bias_stride_s = p.bias_stride_s;
  a.slopes = p.with_slopes ? static_cast<const Acc*>(t.slopes) : nullptr;
  a.slopes_stride_b = p.slopes_stride_b, a.alibi_offset = p.alibi_offset;
  a.with_blocks = p.with_blocks, a.block_heads = p.block_heads, a.blocks = t.blocks;
  a.packed = p.packed, a.total_q = p.total_q, a.total_k = p.total_k, a.cu_q = t.cu_q, a.cu_k = t.cu_k;
  a.causal_bottom_right = p.causal_bottom_right, a.alibi_bottom_right = p.alibi_bottom_right;
  a.dropout = p.dropout_p > 0, a.seed = t.seed;
  a.threshold = dropout_threshold(p.dropout_p), a.keep_scale = Acc(1 / (1 - p.dropout_p));
  return a;
}

constexpr Refusal too_many_tiles = "more tiles than a grid has blocks";
// Whether a product of counts is one that a grid holds.
inline bool fits_grid(std::initializer_list<int64_t> counts) {
  int64_t product = 1;
  for (int64_t count : counts)
    if (count == 0) return true;
  for (int64_t count : counts) {
    if (count > max_attention_blocks / product) return false;
    product *= count;
  }
  return true;
}

}  // namespace pyseqnet
