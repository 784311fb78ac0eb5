// What the generic CUDA kernels of linear attention are made of: a call's operands as functions of row and
// depth, and the product of 64 x 64 results that all of them share (linear_attention_generic.cu says why).
#pragma once
#include "common/cuda_numerics.cuh"
#include "linear_attention/linear_attention.h"
#include "linear_attention/linear_attention_features.cuh"

namespace pyseqnet {
namespace {

constexpr int tile = 64;  // rows and columns of a block's results
constexpr int threads = 256;
constexpr int lanes = 16;  // threads across and down a tile
constexpr int each = tile / lanes;
constexpr int padding = 4;  // of a staged row: keeps it aligned to 16 bytes and spreads the banks
static_assert(tile == LinearAttentionProblem::chunk_rows, "a causal block's rows are one chunk");
constexpr int64_t most_parts = 16;
constexpr int64_t most_blocks = (int64_t{1} << 31) - 1;

template <class Acc>
constexpr int depth = sizeof(Acc) == 8 ? 8 : 16;

PYSEQNET_HOST_DEVICE int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What every kernel is given.
template <class T>
struct Call {
  using Acc = accumulator_t<T>;
  LinearAttentionProblem p;
  LinearAttentionTensors t;
  int64_t heads = 0, state_size = 0;
  int64_t parts = 0, part_rows = 0;      // of the sums: keys in forward, queries in backward
  Acc* sums = nullptr;                   // [heads][parts][D*E + D]; causal: after the scan, states
  Acc* total = nullptr;                  // [heads][D*E + D], not causal
  Acc *factor = nullptr, *dd = nullptr;  // backward: [heads][L]
  Acc* largest = nullptr;                // the map softmax: of each query [heads][L]
  Acc* part_logs = nullptr;              // and forward [heads][parts][2][D]
  const Acc* log_sums = nullptr;         // and of head 0's keys, a state apart
};

// One head of a call: operands as functions of row and column, zero outside.
template <class T>
struct Head {
  using Acc = accumulator_t<T>;
  const Call<T>& c;
  const LinearAttentionProblem& p;
  int64_t index;
  LinearAttentionRows rows;
  const T *q, *k, *v, *gout, *out_read;
  const Acc *factor, *dd;

  PYSEQNET_DEVICE Head(const Call<T>& call, int64_t head) : c(call), p(call.p), index(head) {
    const int64_t b = head / p.H, h = head % p.H;
    rows = call.t.rows(p, b, h);
    q = at(call.t.q, p.q, b, h, rows.begin);
    k = at(call.t.k, p.k, b, h, rows.begin);
    v = at(call.t.v, p.v, b, h, rows.begin);
    gout = at(call.t.gout, p.gout, b, h, rows.begin);
    out_read = at(call.t.out, p.out, b, h, rows.begin);
    factor = call.factor ? call.factor + rows.inverse : nullptr;
    dd = call.dd ? call.dd + rows.inverse : nullptr;
  }
  PYSEQNET_DEVICE static const T* at(const void* base, const HeadStrides& s, int64_t b, int64_t h,
                                     int64_t begin) {
    return base ? static_cast<const T*>(base) + b * s.b + h * s.h + begin * s.row : nullptr;
  }
  PYSEQNET_DEVICE T* result(void* base, const HeadStrides& s, int64_t row) const {
    return static_cast<T*>(base) + index / p.H * s.b + index % p.H * s.h + (rows.begin + row) * s.row;
  }

  PYSEQNET_DEVICE Acc query(int64_t i, int64_t d) const {
    if (i >= rows.L || d >= p.D || (factor && factor[i] == Acc(0))) return Acc(0);
    const Acc x = load(q + i * p.q.row + d) * Acc(p.scale);
    return feature_of(p.feature_map, p.softmax() ? x - c.largest[rows.inverse + i] : x);
  }
  PYSEQNET_DEVICE Acc key(int64_t j, int64_t d) const {
    if (j >= rows.keys || d >= p.D) return Acc(0);
    const Acc x = load(k + j * p.k.row + d);
    return feature_of(p.feature_map, p.softmax() ? x - c.log_sums[index * c.state_size + d] : x);
  }
  PYSEQNET_DEVICE Acc value(int64_t j, int64_t e) const {
    return j < rows.keys && e < p.E ? load(v + j * p.v.row + e) : Acc(0);
  }
  PYSEQNET_DEVICE Acc output_gradient(int64_t i, int64_t e) const {
    if (i >= rows.L || e >= p.E || factor[i] == Acc(0)) return Acc(0);
    return load(gout + i * p.gout.row + e) * factor[i];
  }
  PYSEQNET_DEVICE Acc row_weight(int64_t i) const { return i < rows.L ? dd[i] : Acc(0); }
  // The state that rows of a chunk read (or the one that all read), as [D*E] then [D].
  PYSEQNET_DEVICE const Acc* saved(int64_t chunk) const {
    return static_cast<const Acc*>(c.t.saved) + (rows.saved + (p.causal ? chunk : 0)) * c.state_size;
  }
  // z of a state, or the ones that softmax makes of it.
  PYSEQNET_DEVICE Acc normalizer(const Acc* state, int64_t d) const {
    return p.softmax() ? Acc(1) : state[p.D * p.E + d];
  }
  PYSEQNET_DEVICE const Acc* scanned(int64_t chunk) const {
    return p.causal ? part(chunk) : c.total + index * c.state_size;
  }
  PYSEQNET_DEVICE Acc* part(int64_t n) const {
    return c.sums + ((p.causal ? rows.saved : index * c.parts) + n) * c.state_size;
  }
  // Keys among the rows of a chunk.
  PYSEQNET_DEVICE int keys_from(int64_t row0) const {
    return int(LinearAttentionTensors::between(0, rows.keys - row0, tile));
  }
  PYSEQNET_DEVICE Acc entry(const Acc* state, int64_t d, int64_t e) const {
    return d < p.D && e < p.E ? state[d * p.E + e] : Acc(0);
  }
};

// Rows of queries of all heads, and tiles of rows.
PYSEQNET_HOST_DEVICE int64_t rows_of(const LinearAttentionProblem& p) {
  return p.packed ? p.H * p.total : p.heads() * p.L;
}
PYSEQNET_HOST_DEVICE int64_t tiles_of(const LinearAttentionProblem& p, int64_t rows) {
  return p.packed ? p.H * p.slots() : p.heads() * ceil_divide(rows, tile);
}

// Blocks of a kernel: heads, then `second`, then `third`, the last fastest. Packed sequences whose rows are
// cut in tiles: a head of all sequences, its slots; a block finds its sequence, no row in spare slots.
struct BlockIndex {
  int64_t head, second, third;
  PYSEQNET_DEVICE BlockIndex(int64_t seconds, int64_t thirds) {
    const int64_t b = blockIdx.x;
    third = b % thirds, second = b / thirds % seconds, head = b / thirds / seconds;
  }
  template <class T>
  PYSEQNET_DEVICE static BlockIndex of_tiles(const Call<T>& c, int64_t rows, int64_t thirds) {
    const LinearAttentionProblem& p = c.p;
    if (!p.packed) return BlockIndex(ceil_divide(rows, tile), thirds);
    BlockIndex block(p.slots(), thirds);
    int64_t low = 0, high = p.B - 1;  // the last sequence whose first slot is not behind this one
    while (low < high) {
      const int64_t middle = (low + high + 1) / 2;
      const int64_t start = LinearAttentionTensors::between(0, c.t.starts[middle], p.total);
      if (p.first_slot(start, middle) <= block.second)
        low = middle;
      else
        high = middle - 1;
    }
    const int64_t start = LinearAttentionTensors::between(0, c.t.starts[low], p.total);
    block.head = low * p.H + block.head;
    block.second -= p.first_slot(start, low);
    return block;
  }
};

// Powers of a head's decay in shared memory, ones without, and what the rows of a causal chunk with `keys`
// keys weigh: a query the state at the chunk's start, a key in the state at its end, a key in a query's sum.
template <class Acc>
struct Powers {
  Acc at[tile + 1];
  int keys;

  template <class T>
  PYSEQNET_DEVICE void fill(const Head<T>& head, int64_t row0) {
    const LinearAttentionProblem& p = head.p;
    const int n = int(threadIdx.x);
    if (n <= tile) at[n] = p.decayed ? Acc(integer_power(head.c.t.decay[head.index % p.H], n)) : Acc(1);
    if (n == 0) keys = head.keys_from(row0);
    __syncthreads();
  }
  PYSEQNET_DEVICE int fades(int row) const { return row < keys ? row + 1 : keys; }
  PYSEQNET_DEVICE Acc of_query(int row) const { return at[fades(row)]; }
  PYSEQNET_DEVICE Acc of_key(int row) const { return row < keys ? at[keys - 1 - row] : Acc(0); }
  PYSEQNET_DEVICE Acc of_pair(int query, int key) const { return at[fades(query) - 1 - key]; }
};

// ---------------------------------------------------------------- the product

template <class Acc>
struct alignas(16) Staged {
  Acc a[depth<Acc>][tile + padding], b[depth<Acc>][tile + padding];
};
template <class Acc>
struct Scores {
  Acc at[tile][tile + 1];
};

// Which results are this thread's: rows row .. row + each, columns likewise.
PYSEQNET_DEVICE int my_row() { return int(threadIdx.x) / lanes * each; }
PYSEQNET_DEVICE int my_column() { return int(threadIdx.x) % lanes * each; }

// Fills staged[k][x] = operand(x, k0 + k). Neighbouring threads take neighbouring depths where the operand is
// contiguous along them, else neighbouring x.
template <bool along_depth, class Acc, class Operand>
PYSEQNET_DEVICE void stage(Acc (&staged)[depth<Acc>][tile + padding], int64_t k0, int64_t K,
                           Operand operand) {
  constexpr int steps = depth<Acc>;
#pragma unroll
  for (int n = 0; n < steps * tile / threads; n++) {
    const int i = n * threads + int(threadIdx.x);
    const int k = along_depth ? i % steps : i / tile, x = along_depth ? i / steps : i % tile;
    staged[k][x] = k0 + k < K ? operand(x, k0 + k) : Acc(0);
  }
}

// sum[i][j] += sum over k < K of a(my_row() + i, k) b(my_column() + j, k). Every thread of the block calls
// it.
template <bool a_along_depth, bool b_along_depth, class Acc, class A, class B>
PYSEQNET_DEVICE void add_product(Staged<Acc>& staged, int64_t K, A a, B b, Acc (&sum)[each][each]) {
  const int row = my_row(), column = my_column();
  for (int64_t k0 = 0; k0 < K; k0 += depth<Acc>) {
    __syncthreads();  // the last step's operands have been read
    stage<a_along_depth>(staged.a, k0, K, a);
    stage<b_along_depth>(staged.b, k0, K, b);
    __syncthreads();
#pragma unroll
    for (int k = 0; k < depth<Acc>; k++) {
      Acc x[each], y[each];
#pragma unroll
      for (int i = 0; i < each; i++) x[i] = staged.a[k][row + i], y[i] = staged.b[k][column + i];
#pragma unroll
      for (int i = 0; i < each; i++)
#pragma unroll
        for (int j = 0; j < each; j++) sum[i][j] += x[i] * y[j];
    }
  }
}
// sum[i] *= weight(my_row() + i)
template <class Acc, class W>
PYSEQNET_DEVICE void scale_rows(Acc (&sum)[each][each], W weight) {
#pragma unroll
  for (int i = 0; i < each; i++)
#pragma unroll
    for (int j = 0; j < each; j++) sum[i][j] *= weight(my_row() + i);
}
// scores[i][j] = (a(i) . b(j) + weight(i)) faded over K features, for j <= i and j a key of the chunk.
template <class Acc, class A, class B, class W>
PYSEQNET_DEVICE void write_scores(const Powers<Acc>& powers, Staged<Acc>& staged, Scores<Acc>& scores,
                                  int64_t K, A a, B b, W weight) {
  Acc sum[each][each] = {};
  add_product<true, true>(staged, K, a, b, sum);
#pragma unroll
  for (int i = 0; i < each; i++)
#pragma unroll
    for (int j = 0; j < each; j++) {
      const int r = my_row() + i, s = my_column() + j;
      scores.at[r][s] = s <= r && s < powers.keys ? (sum[i][j] + weight(r)) * powers.of_pair(r, s) : Acc(0);
    }
  __syncthreads();
}

}  // namespace
}  // namespace pyseqnet
