// Gradients of masked softmax attention on tensor cores by mma.sync, sm_80 and newer: bfloat16 and float16, up
// to 256 channels a head.
//
// One kernel in two roles. A block owns a tile of rows and walks over tiles of columns:
//
//   owner keys      rows are keys, columns queries     gk = dZ^T q, gv = P^T gout      4 products a tile
//   owner queries   rows are queries, columns keys     gq = dZ k                       3 products a tile
//
// Both recompute P from lse and dZ = P * (gout v^T - delta): 7 products, where one kernel that adds gq up in
// global memory does 5. It would pay with atomics whose order, and so the result, changes from run to run, or
// with an order imposed on blocks and a float copy of gq, read and written once for each tile of keys:
// 8 * S / 64 bytes for each of its elements, 2 KB at S = 16384 against 2 * 2 * S / 64 * 2 for reading keys and
// values once more. Two products on operands that are in shared memory anyway cost 40 % at most; nothing but
// q, k, v, gout, lse and delta is read, nothing but the results is written, and sums have one order.
//
// The rows' operands (k and v, or q and gout) stay in shared memory; the columns' come by cp.async, two pairs
// of tiles in turn, one barrier a pair. With keys as rows everything is transposed: P^T and dZ^T come out of
// the products laid out as the left operands of the next ones, so that they never leave registers. Query heads
// that share a key head are added up by the block that owns its keys, in order. 256 channels: two blocks share
// the sums of gk and gv, since one has no registers for them; each computes P and dZ.
//
// With a pattern a block owns the 64 rows of a tile and walks along its list, in parts of 32 (16) columns: for
// keys the column's list, one for each query head. Queries that see nothing and keys that nobody sees come as
// zeros, whatever they hold.
//
// Counted for B 1, H 16, L = S = 16384, D = E = 128, bfloat16, not causal:
//   14 * B * H * L * S * D = 7.7 TFLOP (10 of them counted as useful)    9.7 ms at 790 TFLOP/s, by mma.sync 16 ms
//   2 * B * H * L * S exponentials = 8.6 G    16 a clock and multiprocessor: 2.2 ms
//   shared memory: 40 KB a warp and tile of 16 x 32 against 128 steps of m16n8k16 for one row tile: as long as
//     mma.sync takes on an H200; half of it for two row tiles (64 channels)
//   q, k, v, out, gradients: 0.5 GB           0.1 ms at 4.8 TB/s
// Bound: shared-memory reads, then mma.sync issue. Predicted before any measurement, H200: 25 ms, 220 TFLOP/s
// useful (D = 64: 220); on an A100 110.
#include "attention/attention_sm80.cuh"

namespace pyseqnet {
namespace {

enum class Owner { keys, queries };

template <int channels, Owner owner, bool with_pattern>
struct BackwardShape {
  static constexpr int row_tiles = with_pattern || channels > 64 ? 1 : 2, columns = channels > 128 ? 16 : 32;
  static constexpr int rows = mma_warps * 16 * row_tiles, warp_rows = 16 * row_tiles;
  // Channels of the sums: all of them, unless two blocks share them.
  static constexpr int width = owner == Owner::keys && channels > 128 ? 128 : channels;
  static constexpr int shares = channels / width;
  static constexpr unsigned row_bytes = rows * channels * 2, column_bytes = columns * channels * 2;
  // 48, 64 and 96 KiB
  static constexpr unsigned shared_bytes = 2 * row_bytes + 4 * column_bytes;
};

struct BackwardGrid {
  int tiles;  // of rows; a block is (head * tiles + tile) * shares + share
  Reach reach;
};

// lse in units of log 2, and delta. lse is infinite for queries that see nothing or do not exist: their P is
// zero.
template <class T>
PYSEQNET_DEVICE float2 statistics_of(const AttentionInputs<T>& a, unsigned head, int query, int end) {
  if (query >= end) return {INFINITY, 0.f};
  const int64_t line = int64_t(head) * a.L + query;
  const float lse = a.lse[line] * float(log2_e);
  return {lse == -INFINITY ? INFINITY : lse, a.delta[line]};
}

// A row's or a column's entries.
struct TileList {
  int begin, count;
};
template <class T>
PYSEQNET_DEVICE TileList column_list(const AttentionInputs<T>& a, int h, int tile, int tiles) {
  const int column = (a.block_heads == 1 ? 0 : h * tiles) + tile;
  return {a.blocks.column_begin[column], a.blocks.column_begin[column + 1] - a.blocks.column_begin[column]};
}
// Of the queries from column0 on, those of a lane's columns that see a key of the tile.
template <int columns>
PYSEQNET_DEVICE uint64_t key_bits(const AttentionBlocks& blocks, AttentionBlockEntry entry, int key,
                                  int column0) {
  const int lane_column = int(threadIdx.x) % 4 * 2;
  uint64_t bits = 0;
#pragma unroll
  for (int n = 0; n < columns / 8; n++)
#pragma unroll
    for (int odd = 0; odd < 2; odd++) {
      const int column = n * 8 + lane_column + odd;
      bits |= (block_row_bits(blocks, entry, column0 % int(block_tile) + column) >> key & 1) << column;
    }
  return bits;
}

template <class T, int channels, Owner owner, bool with_pattern>
__global__ void __launch_bounds__(mma_threads, 2)
    attention_backward_mma(const AttentionInputs<T> a, const BackwardGrid g, const Operand<T> first,
                           const Operand<T> second) {
  using Shape = BackwardShape<channels, owner, with_pattern>;
  constexpr int row_tiles = Shape::row_tiles, columns = Shape::columns, width = Shape::width;
  constexpr bool of_keys = owner == Owner::keys;
  PYSEQNET_DYNAMIC_SHARED(unsigned char, shared);
  PYSEQNET_SHARED(float2, statistics, [2][columns]);  // lse and delta of the columns, where they are queries
  const uint32_t row_tile0 = ptx::smem_u32(shared), row_tile1 = row_tile0 + Shape::row_bytes,
                 ring = row_tile1 + Shape::row_bytes;
  const int t = int(threadIdx.x), lane = t % 32, warp_row = t / 32 * Shape::warp_rows;
  const unsigned share = blockIdx.x % unsigned(Shape::shares),
                 of_share = blockIdx.x / unsigned(Shape::shares);
  // Rows that see most begin: with causality the last queries and the first keys.
  unsigned block_head = of_share / unsigned(g.tiles), tile = of_share - block_head * unsigned(g.tiles);
  if (!of_keys) tile = unsigned(g.tiles) - 1 - tile;
  TileList list = {};
  if (with_pattern && !of_keys) {
    const PatternRow row = pattern_row_of(a, g.tiles);
    block_head = row.head, tile = unsigned(row.tile), list = {row.begin, row.count};
  }
  if (with_pattern && of_keys && a.block_heads == 1) tile = unsigned(a.blocks.column_order[tile]);
  // The head that rows belong to, and its first query head.
  const unsigned query_head = of_keys ? block_head * unsigned(a.group) : block_head;
  const ShortHead head = short_head_of(a, query_head);
  const int row0 = int(tile) * Shape::rows;
  const int past = min(row0 + Shape::rows, int(of_keys ? a.S : a.L));

  // Columns that rows of the block see lie in [begin, end).
  const int begin = of_keys ? g.reach.first_query(row0) : 0;
  const int end = !of_keys ? g.reach.keys_of(past - 1, head.keys) : row0 < head.keys ? int(a.L) : 0;
  const int first_tile = begin / columns;
  const int tiles = end > begin ? (end + columns - 1) / columns - first_tile : 0;
  // A step is a tile of columns of a query head: of those that share the keys, or of one. In a pattern it is a
  // part of an entry of the head's list.
  constexpr int parts = int(block_tile) / columns;
  struct Step {
    int head, tile;
  } step = {0, 0};
  const int heads = with_pattern ? (end <= begin ? 0
                                    : of_keys    ? int(a.group)
                                                 : 1)
                    : tiles == 0 ? 0
                    : of_keys    ? int(a.group)
                                 : 1;
  const AttentionBlockEntry* entries = of_keys ? a.blocks.column_entries : a.blocks.row_entries;
  // Goes on to the next head while this one has no tile left.
  const auto settle = [&] {
    if (!with_pattern) {
      if (step.tile == tiles) step = {step.head + 1, 0};
      return;
    }
    while (step.head < heads && step.tile == list.count * parts) {
      step = {step.head + 1, 0};
      if (of_keys && step.head < heads) list = column_list(a, head.h + step.head, int(tile), g.tiles);
    }
  };
  if (with_pattern && of_keys && heads > 0) list = column_list(a, head.h, int(tile), g.tiles);
  if (with_pattern) settle();
  // Of the step: its entry, and its first column.
  const auto entry_of_step = [&] {
    return with_pattern ? entries[list.begin + step.tile / parts]
                        : AttentionBlockEntry{first_tile + step.tile, block_full};
  };
  const auto column_of = [&](AttentionBlockEntry entry) {
    return with_pattern ? entry.tile * int(block_tile) + step.tile % parts * columns : entry.tile * columns;
  };

  const Operand<const T>&left0 = of_keys ? a.k : a.q, &left1 = of_keys ? a.v : a.gout;
  const Operand<const T>&right0 = of_keys ? a.q : a.k, &right1 = of_keys ? a.gout : a.v;
  float2 fetched = {};
  // Begins to bring the pair of tiles of the step, and statistics.
  const auto fetch = [&](int slot) {
    if (step.head < heads) {
      const AttentionBlockEntry entry = entry_of_step();
      const int column0 = column_of(entry), h = of_keys ? head.h + step.head : head.kv;
      const int64_t line0 = int64_t(query_head + unsigned(step.head)) * a.L;
      const uint32_t to = ring + unsigned(slot) * (2 * Shape::column_bytes);
      uint64_t seen = ~uint64_t(0);
      if (with_pattern && !of_keys)
        seen = keys_seen(a.blocks, entry, g.reach, row0, head.keys) >> (column0 % int(block_tile));
      // A column that sees nothing, or that nobody sees, may hold NaN: it comes as zeros.
      const auto exists = [&](int column) {
        const int position = column0 + column;
        if (position < begin || position >= end) return false;
        if (!with_pattern) return true;
        return of_keys ? a.lse[line0 + position] != -INFINITY : bool(seen >> column & 1);
      };
      stage_rows<channels, columns>(to, right0.at(head.b, h, column0), int(right0.strides.n), int(a.D),
                                    exists);
      stage_rows<channels, columns>(to + Shape::column_bytes, right1.at(head.b, h, column0),
                                    int(right1.strides.n), int(a.E), exists);
      if (of_keys && t < columns)
        fetched = statistics_of(a, query_head + unsigned(step.head), column0 + t, end);
    }
    ptx::cp_async_commit();
  };
  const auto keep_statistics = [&](int slot) {
    if (of_keys && t < columns) statistics[slot][t] = fetched;
  };

  const int h_of_rows = of_keys ? head.kv : head.h;
  if (step.head < heads) {
    const auto exists = [&](int row) { return row < past - row0; };
    stage_rows<channels, Shape::rows>(row_tile0, left0.at(head.b, h_of_rows, row0), int(left0.strides.n),
                                      int(a.D), exists);
    stage_rows<channels, Shape::rows>(row_tile1, left1.at(head.b, h_of_rows, row0), int(left1.strides.n),
                                      int(a.E), exists);
  }
  fetch(0);
  keep_statistics(0);

  float2 of_row[row_tiles][2];
  if (!of_keys) {
#pragma unroll
    for (int r = 0; r < row_tiles; r++)
#pragma unroll
      for (int half = 0; half < 2; half++)
        of_row[r][half] = statistics_of(a, query_head, row0 + warp_row + 16 * r + 8 * half + lane / 4, past);
  }
  SumRegisters<row_tiles, width> sum0 = {}, sum1 = {};  // of gk and gv; gq is in the first
  const uint32_t rows0 = left_address<channels>(row_tile0, warp_row),
                 rows1 = left_address<channels>(row_tile1, warp_row);
  const int warp_first = row0 + warp_row, warp_last = min(warp_first + Shape::warp_rows, past) - 1;
  // Which of the columns from column0 on a row sees.
  const auto row_bits = [&](int row, int column0) {
    if (!of_keys) return bits_below(g.reach.keys_of(row, head.keys) - column0);
    return row < head.keys ? bits_from(g.reach.first_query(row) - column0) & bits_below(end - column0) : 0;
  };

  int slot = 0;
#pragma unroll 1
  while (step.head < heads) {
    const AttentionBlockEntry entry = entry_of_step();
    const int column0 = column_of(entry);
    step.tile++;
    settle();
    // The pair has come, and everybody is through with the other one, whose place is taken again.
    ptx::cp_async_wait<0>();
    __syncthreads();
    fetch(slot ^ 1);
    const uint32_t column_tile0 = ring + unsigned(slot) * (2 * Shape::column_bytes),
                   column_tile1 = column_tile0 + Shape::column_bytes;
    // The warp's rows may see nothing here, or everything that exists.
    const bool idle =
        warp_last < warp_first || column0 >= end ||
        (of_keys ? warp_first >= head.keys || column0 + columns <= g.reach.first_query(warp_first)
                 : column0 >= g.reach.keys_of(warp_last, head.keys));
    const bool hidden_by_reach = of_keys ? warp_last >= head.keys || column0 < g.reach.first_query(warp_last)
                                         : column0 + columns > g.reach.keys_of(warp_first, head.keys);
    const bool masked = hidden_by_reach || entry.bits != block_full;
    if (idle) {
      keep_statistics(slot ^ 1);
    } else {
      SumRegisters<row_tiles, columns> weight, gradient;
      LeftRegisters<row_tiles, columns> left;
      // Behind what is hidden there may be NaN: it is replaced, not multiplied.
      const auto hide = [&](SumRegisters<row_tiles, columns>& values) {
#pragma unroll
        for (int r = 0; r < row_tiles; r++)
#pragma unroll
          for (int half = 0; half < 2; half++) {
            const int row = warp_first + 16 * r + 8 * half + lane / 4;
            uint64_t bits = row_bits(row, column0);
            if (with_pattern && entry.bits != block_full)
              bits &= of_keys ? key_bits<columns>(a.blocks, entry, row - row0, column0)
                              : block_row_bits(a.blocks, entry, row - row0) >> (column0 % int(block_tile));
            const SeenColumns seen(bits);
#pragma unroll
            for (int n = 0; n < columns / 8; n++)
#pragma unroll
              for (int odd = 0; odd < 2; odd++)
                if (!seen.sees(n, odd)) values[r][n][half * 2 + odd] = 0.f;
          }
      };
      const auto statistic = [&](int r, int n, int e) {
        return of_keys ? statistics[slot][n * 8 + lane % 4 * 2 + e % 2] : of_row[r][e / 2];
      };
      similarity<T, channels, row_tiles, columns>(weight, rows0, column_tile0);
#pragma unroll
      for (int n = 0; n < columns / 8; n++)
#pragma unroll
        for (int r = 0; r < row_tiles; r++)
#pragma unroll
          for (int e = 0; e < 4; e++)
            weight[r][n][e] = ptx::ex2(weight[r][n][e] * a.scale_log2 - statistic(r, n, e).x);
      if (masked) hide(weight);
      // At the earlier or the later place, as registers are short before or behind the next sum.
      if constexpr (row_tiles == 1) keep_statistics(slot ^ 1);
      if (of_keys) {
        to_left<T, row_tiles, columns>(left, weight);
        accumulate<T, channels, width, row_tiles, columns>(sum1, left, column_tile1,
                                                           int(share) * (width / 8));
      }
      if constexpr (row_tiles == 2) keep_statistics(slot ^ 1);
      similarity<T, channels, row_tiles, columns>(gradient, rows1, column_tile1);
#pragma unroll
      for (int n = 0; n < columns / 8; n++)
#pragma unroll
        for (int r = 0; r < row_tiles; r++)
#pragma unroll
          for (int e = 0; e < 4; e++)
            gradient[r][n][e] = logit_gradient(weight[r][n][e], gradient[r][n][e], 1.f, statistic(r, n, e).y);
      if (masked) hide(gradient);
      to_left<T, row_tiles, columns>(left, gradient);
      accumulate<T, channels, width, row_tiles, columns>(sum0, left, column_tile0, int(share) * (width / 8));
    }
    slot ^= 1;
  }

  float scale[row_tiles][2], one[row_tiles][2];
#pragma unroll
  for (int r = 0; r < row_tiles; r++)
#pragma unroll
    for (int half = 0; half < 2; half++) scale[r][half] = a.scale, one[r][half] = 1.f;
  const int channel0 = int(share) * width;
  store_rows<T, channels, width, row_tiles>(first.at(head.b, h_of_rows, row0 + warp_row) + channel0,
                                            first.strides.n, past - row0 - warp_row, int(a.D) - channel0,
                                            sum0, scale, shared, warp_row);
  if (of_keys)
    store_rows<T, channels, width, row_tiles>(second.at(head.b, h_of_rows, row0 + warp_row) + channel0,
                                              second.strides.n, past - row0 - warp_row, int(a.E) - channel0,
                                              sum1, one, shared + Shape::row_bytes, warp_row);
}

// ---------------------------------------------------------------- launching
int64_t row_tile_of(const AttentionProblem& p) { return p.with_blocks || std::max(p.D, p.E) > 64 ? 64 : 128; }

Refusal refuses(const AttentionProblem& p) {
  if (const Refusal why = refuses_tensor_cores(p)) return why;
  if (p.with_gweights) return "a gradient of the weights";
  return fits_grid({p.B, p.H, ceil_divide(p.L, row_tile_of(p))}) &&
                 fits_grid({p.B, p.Hk, ceil_divide(p.S, row_tile_of(p)), 2})
             ? accepted
             : too_many_tiles;
}
int64_t no_workspace(const AttentionProblem&) { return 0; }

template <class T, int channels, Owner owner, bool with_pattern>
int launch_owner(const AttentionProblem& p, const AttentionTensors& t, void* stream) {
  using Shape = BackwardShape<channels, owner, with_pattern>;
  constexpr bool of_keys = owner == Owner::keys;
  const BackwardGrid g = {int(ceil_divide(of_keys ? p.S : p.L, Shape::rows)), reach_of(p)};
  LaunchConfig config;
  const int64_t blocks = p.B * (of_keys ? p.Hk : p.H) * g.tiles * Shape::shares;
  if (blocks == 0) return launch_ok;
  config.grid = dim3(unsigned(blocks)), config.block = dim3(mma_threads), config.stream = stream;
  config.dynamic_shared_bytes = Shape::shared_bytes;
  return launch(config, attention_backward_mma<T, channels, owner, with_pattern>, inputs_of<T>(p, t), g,
                of_keys ? operand_of<T>(t.gk, p.gk_strides, p.D) : operand_of<T>(t.gq, p.gq_strides, p.D),
                operand_of<T>(t.gv, p.gv_strides, p.E));
}

int backward(const AttentionProblem& p, const AttentionTensors& t, void*, void* stream) {
  return dispatch_16bit(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return dispatch_channels(p, [&](auto width) {
      constexpr int channels = decltype(width)::value;
      const auto launch_kernels = [&](auto pattern) {
        constexpr bool with_pattern = decltype(pattern)::value;
        const int error =
            p.need_q ? launch_owner<T, channels, Owner::queries, with_pattern>(p, t, stream) : launch_ok;
        return error || !p.need_kv ? error
                                   : launch_owner<T, channels, Owner::keys, with_pattern>(p, t, stream);
      };
      return p.with_blocks ? launch_kernels(std::true_type{}) : launch_kernels(std::false_type{});
    });
  });
}

}  // namespace

extern const AttentionCudaKernel attention_backward_sm80;
const AttentionCudaKernel attention_backward_sm80 = {"tensor_core_sm80", 80,      0, refuses,
                                                     no_workspace,       backward};

}  // namespace pyseqnet
