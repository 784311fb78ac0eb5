// What the generic CUDA kernels of softmax attention are made of: tiles of rows x channels in shared memory
// and the two products of such tiles.
//
//   similarity        sum[query, key]   += a[query, :] . b[key, :]          q k^T, gout v^T
//   multiply_rows     sum[row, channel] += weight[row, n] * b[n, channel]   W v, dZ k, dZ^T q, W^T gout
//
// A tile is 64 x 64 in float (32 x 32 positions, 64 channels, in double) and lies in shared memory as it does
// in the tensor: one line a position, channels side by side, one vector of padding a line. Both products read
// vectors of it without bank conflicts, so that nothing is ever transposed on the way in. 16-bit elements
// become floats where they are staged.
//
// 128 threads are 16 x 8 over a tile; what belongs to a query is reduced by shuffles among 8 lanes. For four
// steps of depth a thread reads 12 vectors and does 128 FMA: a warp's shared-memory wavefronts (12) take less
// than half of the time that its FMA need.
#pragma once
#include "attention/attention.h"
#include "common/cuda_numerics.cuh"

namespace pyseqnet {

constexpr int attention_threads = 128;
constexpr int lanes_across = 8, lanes_down = attention_threads / lanes_across;
constexpr unsigned whole_warp = 0xffffffffu;

template <class T>
struct AttentionTile {
  using Acc = accumulator_t<T>;
  static constexpr int vector = 16 / int(sizeof(Acc));
  static constexpr int positions = 256 / int(sizeof(Acc));  // queries of a tile, and keys
  static constexpr int channels = 64;
  static constexpr int line = channels + vector;
  static constexpr int thread_rows = positions / lanes_down, thread_columns = positions / lanes_across;
  static constexpr int channel_vectors = channels / (lanes_across * vector);
  static constexpr int thread_channels = channel_vectors * vector;
  static_assert(positions <= channels, "weights are kept in a tile of channels");
};

// Which rows and columns of a tile belong to a thread: a warp is 4 x 8 of them. Of neighbouring lanes one bit
// of the number is the row's, the next three are the column's: what lanes share, a vector load of theirs then
// fetches once. Rows of a warp are two lines apart, so that weights are written to 32 different banks.
template <class T>
struct TilePlace {
  using Tile = AttentionTile<T>;
  int first_row, first_column;
  PYSEQNET_DEVICE explicit TilePlace(unsigned t)
      : first_row(t / 64 * 8 + t / 32 % 2 + 2 * (t % 2 + t / 16 % 2 * 2)), first_column(t / 2 % 8) {}
  PYSEQNET_DEVICE static bool leads_column(unsigned t) { return t % 2 == 0 && t / 16 % 2 == 0; }
  PYSEQNET_DEVICE int row(int i) const { return first_row + i * lanes_down; }
  PYSEQNET_DEVICE int column(int j) const { return first_column + j * lanes_across; }
  // First channel of a vector.
  PYSEQNET_DEVICE int channel(int g) const { return (first_column + g * lanes_across) * Tile::vector; }
};

template <class T, int n>
struct alignas(sizeof(T) * n) AttentionVector {
  T element[n];
};

// A (batch, head, position, channel) tensor. `vectors`: every line begins and ends with a whole vector.
template <class T>
struct Operand {
  T* data;
  AttentionStrides strides;
  bool vectors;

  PYSEQNET_DEVICE T* at(int64_t b, int64_t h, int64_t n) const {
    return data + b * strides.b + h * strides.h + n * strides.n;
  }
};

// Copies lines of `count` channels into a tile, zero where there is no channel and where keep(line) says no:
// such a line is not read. By vectors where the tensor allows it, else by elements: the latter for odd head
// sizes and slices only.
template <class T, class Keep>
PYSEQNET_DEVICE void stage(accumulator_t<T>* tile, const T* from, const Operand<const T>& operand,
                           int64_t count, Keep keep) {
  using Tile = AttentionTile<T>;
  using Acc = accumulator_t<T>;
  const int t = threadIdx.x % attention_threads;  // what the compiler then knows saves it instructions
  if (operand.vectors) {
    constexpr int n = Tile::vector, across = Tile::channels / n, down = attention_threads / across;
    const int channel = t % across * n;
#pragma unroll 4
    for (int k = 0; k < Tile::positions / down; k++) {
      const int position = t / across + k * down;
      AttentionVector<Acc, n> value = {};
      if (channel < count && keep(position)) {
        const auto v =
            *reinterpret_cast<const AttentionVector<T, n>*>(from + position * operand.strides.n + channel);
#pragma unroll
        for (int i = 0; i < n; i++) value.element[i] = to_accumulator(v.element[i]);
      }
      *reinterpret_cast<AttentionVector<Acc, n>*>(tile + position * Tile::line + channel) = value;
    }
  } else {
    constexpr int down = attention_threads / Tile::channels;
    const int channel = t % Tile::channels;
#pragma unroll 4
    for (int k = 0; k < Tile::positions / down; k++) {
      const int position = t / Tile::channels + k * down;
      tile[position * Tile::line + channel] =
          channel < count && keep(position) ? load(from + position * operand.strides.n + channel) : Acc(0);
    }
  }
}

template <class T>
using ScoreRegisters = accumulator_t<T>[AttentionTile<T>::thread_rows][AttentionTile<T>::thread_columns];
template <class T>
using ChannelRegisters = accumulator_t<T>[AttentionTile<T>::thread_rows][AttentionTile<T>::thread_channels];

template <class T>
PYSEQNET_DEVICE void multiply_similarity(ScoreRegisters<T>& sum, const accumulator_t<T>* a,
                                         const accumulator_t<T>* b, int depth, TilePlace<T> at) {
  using Tile = AttentionTile<T>;
  using Vector = AttentionVector<accumulator_t<T>, Tile::vector>;
#pragma unroll 1
  for (int d = 0; d < depth; d += Tile::vector) {
    Vector x[Tile::thread_rows];
#pragma unroll
    for (int i = 0; i < Tile::thread_rows; i++)
      x[i] = *reinterpret_cast<const Vector*>(a + at.row(i) * Tile::line + d);
#pragma unroll
    for (int j = 0; j < Tile::thread_columns; j++) {
      const Vector y = *reinterpret_cast<const Vector*>(b + at.column(j) * Tile::line + d);
#pragma unroll
      for (int i = 0; i < Tile::thread_rows; i++)
#pragma unroll
        for (int k = 0; k < Tile::vector; k++) sum[i][j] += x[i].element[k] * y.element[k];
    }
  }
}

// sum[row, channel] += weights[row, :] . b[:, channel], over the first `depth` positions.
template <class T>
PYSEQNET_DEVICE void multiply_rows(ChannelRegisters<T>& sum, const accumulator_t<T>* weights,
                                   const accumulator_t<T>* b, int depth, TilePlace<T> at) {
  using Tile = AttentionTile<T>;
  using Vector = AttentionVector<accumulator_t<T>, Tile::vector>;
#pragma unroll 1
  for (int n = 0; n < depth; n += Tile::vector) {
    Vector x[Tile::thread_rows];
#pragma unroll
    for (int i = 0; i < Tile::thread_rows; i++)
      x[i] = *reinterpret_cast<const Vector*>(weights + at.row(i) * Tile::line + n);
#pragma unroll
    for (int k = 0; k < Tile::vector; k++)
#pragma unroll
      for (int g = 0; g < Tile::channel_vectors; g++) {
        const Vector y = *reinterpret_cast<const Vector*>(b + (n + k) * Tile::line + at.channel(g));
#pragma unroll
        for (int i = 0; i < Tile::thread_rows; i++)
#pragma unroll
          for (int v = 0; v < Tile::vector; v++)
            sum[i][g * Tile::vector + v] += x[i].element[k] * y.element[v];
      }
  }
}

// How many positions of a tile there are, when `left` are.
template <class T>
PYSEQNET_DEVICE int positions_of(int64_t left) {
  return left < AttentionTile<T>::positions ? int(left) : AttentionTile<T>::positions;
}

// sum[query, key] += a[query, :] . b[key, :] over any number of channels, by way of two tiles that nobody
// reads any more. When it returns, others may still read them. Positions past the counts are not read.
template <class T>
PYSEQNET_DEVICE void similarity(ScoreRegisters<T>& sum, accumulator_t<T>* a_tile, accumulator_t<T>* b_tile,
                                const T* a, const Operand<const T>& a_operand, int a_count, const T* b,
                                const Operand<const T>& b_operand, int b_count, int64_t channels,
                                TilePlace<T> at) {
  using Tile = AttentionTile<T>;
  for (int64_t c = 0; c < channels; c += Tile::channels) {
    const int64_t left = channels - c;
    if (c > 0) __syncthreads();
    stage<T>(a_tile, a + c, a_operand, left, [=](int i) { return i < a_count; });
    stage<T>(b_tile, b + c, b_operand, left, [=](int j) { return j < b_count; });
    __syncthreads();
    multiply_similarity<T>(sum, a_tile, b_tile, left < Tile::channels ? int(left) : Tile::channels, at);
  }
}

// A thread's share of a tile of weights goes to shared memory, as query x key or as key x query.
template <class T>
PYSEQNET_DEVICE void store_tile(accumulator_t<T>* tile, const ScoreRegisters<T>& value, TilePlace<T> at) {
  using Tile = AttentionTile<T>;
#pragma unroll
  for (int i = 0; i < Tile::thread_rows; i++)
#pragma unroll
    for (int j = 0; j < Tile::thread_columns; j++) tile[at.row(i) * Tile::line + at.column(j)] = value[i][j];
}
template <class T>
PYSEQNET_DEVICE void store_transposed(accumulator_t<T>* tile, const ScoreRegisters<T>& value,
                                      TilePlace<T> at) {
  using Tile = AttentionTile<T>;
#pragma unroll
  for (int i = 0; i < Tile::thread_rows; i++)
#pragma unroll
    for (int j = 0; j < Tile::thread_columns; j++) tile[at.column(j) * Tile::line + at.row(i)] = value[i][j];
}

// Writes a thread's vector of channels of one line, of which `count` exist.
template <class T>
PYSEQNET_DEVICE void store_channels(T* to, bool vectors, const accumulator_t<T>* value, int64_t count) {
  constexpr int n = AttentionTile<T>::vector;
  if (vectors && count >= n) {
    AttentionVector<T, n> v;
#pragma unroll
    for (int i = 0; i < n; i++) v.element[i] = from_accumulator<T>(value[i]);
    *reinterpret_cast<AttentionVector<T, n>*>(to) = v;
    return;
  }
#pragma unroll
  for (int i = 0; i < n; i++)
    if (i < count) store(to + i, value[i]);
}

// Over all lanes of a warp, or over those that share a row of a tile, or a column.
enum class Lanes { all = 31, row = 14, column = 17 };
template <Lanes lanes, class A, class F>
PYSEQNET_DEVICE A reduce_lanes(A value, F combine) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2)
    if (int(lanes) & step) value = combine(value, __shfl_xor_sync(whole_warp, value, step));
  return value;
}

}  // namespace pyseqnet
