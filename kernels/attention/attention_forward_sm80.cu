// Masked softmax attention forward on tensor cores by mma.sync, sm_80 and newer (FlashAttention-2: Dao, 2023):
// bfloat16 and float16, up to 256 channels a head.
//
// A block of four warps owns 128 queries (64 where heads are wider than 128) and walks over tiles of 64 keys.
// A warp owns 32 (16) of the queries: logits, softmax and weights never leave its registers, and one fragment
// of keys or values read from shared memory serves two products. Keys and values come through a ring of tiles
// that cp.async fills: while one tile is worked on, the next ones are on their way; one barrier a tile says
// that it has come and that the tile before it is free.
//
// A tile in which all of a warp's queries see all keys costs no mask arithmetic; one in which they see none is
// not computed; else a row's visible keys are 64 bits, made of its limit by causality and length. Keys that no
// query of the block can see are filled with zeros: what they hold never meets a weight of zero.
//
// With a pattern a block has the 64 queries of a row of its tiles and walks along the row's list; a warp then has
// 16 queries. What is in no list costs nothing, full tiles no mask arithmetic, and of the others the bits of a
// row are put into the same 64.
//
// Counted for B 1, H 16, L = S = 16384, D = E = 128, bfloat16, not causal:
//   4 * B * H * L * S * D = 2.2 TFLOP         2.8 ms at 790 TFLOP/s; mma.sync gets to about 62 % of that: 4.5 ms
//   B * H * L * S exponentials = 4.3 G        16 a clock and multiprocessor: 1.1 ms
//   shared memory: a step of m16n8k16 for two row tiles reads 256 bytes of keys or values (2 clocks at 128
//     bytes) and does 8192 multiply-adds (4 clocks by mma.sync): 50 %, 63 % with the queries of wide heads
//   q, k, v, out: 268 MB                      0.06 ms at 4.8 TB/s; keys and values again for each block, 17 GB,
//                                             from the second-level cache
// Bound: mma.sync issue. Predicted before any measurement, H200: 6.3 ms, 350 TFLOP/s (D = 64: 300); on an
// A100, 190 of its 312 TFLOP/s. sm_90a has a kernel of its own.
#include "attention/attention_sm80.cuh"

namespace pyseqnet {
namespace {

template <int channels, bool with_pattern>
struct ForwardShape {
  static constexpr int row_tiles = with_pattern || channels > 128 ? 1 : 2;
  static constexpr int queries = mma_warps * 16 * row_tiles;
  // Tiles in flight and in use. 48, 80 and 96 KiB a block: two of them fit an A100 but for the last.
  static constexpr int slots = channels == 64 ? 4 : channels == 128 ? 3 : 2;
  static constexpr unsigned query_bytes = queries * channels * 2, tile_bytes = key_tile * channels * 2;
  static constexpr unsigned shared_bytes = query_bytes + slots * tile_bytes;
};

struct TensorCoreGrid {
  int tiles;  // of queries; a block is head * tiles + tile
  Reach reach;
};

// Logits of a tile become weights relative to the largest logit so far; sums are brought to that scale.
template <int row_tiles, int channels>
PYSEQNET_DEVICE void softmax_tile(SumRegisters<row_tiles, key_tile>& score,
                                  SumRegisters<row_tiles, channels>& sum,
                                  SoftmaxState<float> (&state)[row_tiles][2], float scale_log2) {
  float factor[row_tiles][2];
  bool rescale = false;
#pragma unroll
  for (int r = 0; r < row_tiles; r++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      SoftmaxState<float>& s = state[r][half];
      float largest = s.largest;
#pragma unroll
      for (int n = 0; n < key_tile / 8; n++)
        largest = fmaxf(largest, fmaxf(score[r][n][half * 2], score[r][n][half * 2 + 1]));
      largest = fmaxf(largest, __shfl_xor_sync(whole_warp, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(whole_warp, largest, 2));
      const float origin = softmax_origin(largest) * scale_log2;
      factor[r][half] = ptx::ex2(s.largest * scale_log2 - origin);
      rescale |= factor[r][half] != 1.f;
      s.largest = largest, s.sum *= factor[r][half];
#pragma unroll
      for (int n = 0; n < key_tile / 8; n++)
#pragma unroll
        for (int e = half * 2; e < half * 2 + 2; e++) {
          score[r][n][e] = ptx::ex2(score[r][n][e] * scale_log2 - origin);
          s.sum += score[r][n][e];
        }
    }
  // Behind the first tiles a new largest logit is rare.
  if (!__any_sync(whole_warp, rescale)) return;
#pragma unroll
  for (int r = 0; r < row_tiles; r++)
#pragma unroll
    for (int c = 0; c < channels / 8; c++)
#pragma unroll
      for (int e = 0; e < 4; e++) sum[r][c][e] *= factor[r][e / 2];
}

template <class T, int channels, bool with_pattern>
__global__ void __launch_bounds__(mma_threads, 2)
    attention_forward_mma(const AttentionInputs<T> a, const TensorCoreGrid g, const Operand<T> out,
                          float* __restrict__ lse) {
  using Shape = ForwardShape<channels, with_pattern>;
  constexpr int row_tiles = Shape::row_tiles, slots = Shape::slots;
  PYSEQNET_DYNAMIC_SHARED(unsigned char, shared);
  const uint32_t q_tile = ptx::smem_u32(shared), ring = q_tile + Shape::query_bytes;
  const int lane = int(threadIdx.x) % 32, warp_row = int(threadIdx.x) / 32 * 16 * row_tiles;
  // With causality the last queries see the most keys: they begin.
  PatternRow row;
  if (with_pattern) {
    row = pattern_row_of(a, g.tiles);
  } else {
    row.head = blockIdx.x / unsigned(g.tiles);
    row.tile = g.tiles - 1 - int(blockIdx.x - row.head * unsigned(g.tiles));
  }
  const unsigned block_head = row.head;
  const ShortHead head = short_head_of(a, block_head);
  const int query0 = row.tile * Shape::queries;
  const int past = min(query0 + Shape::queries, int(a.L));
  const int keys = g.reach.keys_of(past - 1, head.keys),
            tiles = with_pattern ? row.count : (keys + key_tile - 1) / key_tile;
  const AttentionBlockEntry* entries = a.blocks.row_entries + (with_pattern ? row.begin : 0);
  const auto entry_of = [&](int tile) {
    return with_pattern ? entries[tile] : AttentionBlockEntry{tile, block_full};
  };

  const T* k = a.k.at(head.b, head.kv, 0);
  const T* v = a.v.at(head.b, head.kv, 0);
  // Keys and values take turns in the ring: item 2 j are the keys of tile j, item 2 j + 1 its values.
  const auto fetch = [&](int item) {
    if (item < 2 * tiles) {
      const AttentionBlockEntry entry = entry_of(item / 2);
      const int key0 = entry.tile * key_tile;
      uint64_t seen = ~uint64_t(0);
      if (with_pattern && item % 2) seen = keys_seen(a.blocks, entry, g.reach, query0, head.keys);
      const auto exists = [&](int key) { return key < keys - key0 && (!with_pattern || seen >> key & 1); };
      const uint32_t to = ring + item % slots * Shape::tile_bytes;
      if (item % 2 == 0)
        stage_rows<channels, key_tile>(to, k + key0 * a.k.strides.n, int(a.k.strides.n), int(a.D), exists);
      else
        stage_rows<channels, key_tile>(to, v + key0 * a.v.strides.n, int(a.v.strides.n), int(a.E), exists);
    }
    ptx::cp_async_commit();
  };
  // The item has come, and everybody is through with the one before it, whose place is taken again.
  const auto arrive = [&](int item) {
    ptx::cp_async_wait<slots - 2>();
    __syncthreads();
    fetch(item + slots - 1);
    return ring + item % slots * Shape::tile_bytes;
  };
  if (tiles > 0)
    stage_rows<channels, Shape::queries>(q_tile, a.q.at(head.b, head.h, query0), int(a.q.strides.n), int(a.D),
                                         [&](int row) { return row < past - query0; });
#pragma unroll
  for (int item = 0; item < slots - 1; item++) fetch(item);

  SoftmaxState<float> state[row_tiles][2];
#pragma unroll
  for (int r = 0; r < row_tiles; r++)
#pragma unroll
    for (int half = 0; half < 2; half++) state[r][half] = {-INFINITY, 0.f};
  SumRegisters<row_tiles, channels> sum = {};
  const uint32_t q_rows = left_address<channels>(q_tile, warp_row);

#pragma unroll 1
  for (int j = 0; j < tiles; j++) {
    const AttentionBlockEntry entry = entry_of(j);
    const int key0 = entry.tile * key_tile;
    // None of the warp's queries sees a key of the tile; all see all.
    const bool idle = key0 >= g.reach.keys_of(query0 + warp_row + 16 * row_tiles - 1, keys);
    const bool full =
        entry.bits == block_full && key0 + key_tile <= g.reach.keys_of(query0 + warp_row, head.keys);
    const uint32_t k_tile = arrive(2 * j);
    LeftRegisters<row_tiles, key_tile> weights;
    if (!idle) {
      SumRegisters<row_tiles, key_tile> score;
      similarity<T, channels, row_tiles, key_tile>(score, q_rows, k_tile);
      if (!full) {
#pragma unroll
        for (int r = 0; r < row_tiles; r++)
#pragma unroll
          for (int half = 0; half < 2; half++) {
            const int query = query0 + warp_row + 16 * r + 8 * half + lane / 4;
            uint64_t bits = bits_below(g.reach.keys_of(query, head.keys) - key0);
            if (with_pattern) bits &= block_row_bits(a.blocks, entry, query - query0);
            const SeenColumns seen(bits);
#pragma unroll
            for (int n = 0; n < key_tile / 8; n++)
#pragma unroll
              for (int odd = 0; odd < 2; odd++)
                if (!seen.sees(n, odd)) score[r][n][half * 2 + odd] = -INFINITY;
          }
      }
      softmax_tile<row_tiles, channels>(score, sum, state, float(a.scale_log2));
      to_left<T, row_tiles, key_tile>(weights, score);
    }
    const uint32_t v_tile = arrive(2 * j + 1);
    if (!idle) accumulate<T, channels, channels, row_tiles, key_tile>(sum, weights, v_tile);
  }

  float inverse[row_tiles][2];
#pragma unroll
  for (int r = 0; r < row_tiles; r++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      SoftmaxState<float> s = state[r][half];
      s.sum += __shfl_xor_sync(whole_warp, s.sum, 1);
      s.sum += __shfl_xor_sync(whole_warp, s.sum, 2);
      s.largest = softmax_origin(s.largest) * float(a.scale_log2);
      inverse[r][half] = softmax_inverse(s);
      const int query = query0 + warp_row + 16 * r + 8 * half + lane / 4;
      if (lane % 4 == 0 && query < past) lse[int64_t(block_head) * a.L + query] = softmax_lse(s);
    }
  store_rows<T, channels, channels, row_tiles>(out.at(head.b, head.h, query0 + warp_row), out.strides.n,
                                               past - query0 - warp_row, int(a.E), sum, inverse, shared,
                                               warp_row);
}

// ---------------------------------------------------------------- launching
int64_t query_tiles(const AttentionProblem& p) {
  return ceil_divide(p.L, p.with_blocks || std::max(p.D, p.E) > 128 ? 64 : 128);
}

Refusal refuses(const AttentionProblem& p) {
  if (const Refusal why = refuses_tensor_cores(p)) return why;
  if (const Refusal why = refuses_few_queries(p)) return why;
  return fits_grid({p.B, p.H, query_tiles(p)}) ? accepted : too_many_tiles;
}
int64_t no_workspace(const AttentionProblem&) { return 0; }

int forward(const AttentionProblem& p, const AttentionTensors& t, void*, void* stream) {
  const TensorCoreGrid g = {int(query_tiles(p)), reach_of(p)};
  const int64_t blocks = p.B * p.H * g.tiles;
  if (blocks == 0) return launch_ok;
  return dispatch_16bit(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return dispatch_channels(p, [&](auto width) {
      constexpr int channels = decltype(width)::value;
      const auto launch_kernel = [&](auto pattern) {
        constexpr bool with_pattern = decltype(pattern)::value;
        LaunchConfig config;
        config.grid = dim3(unsigned(blocks)), config.block = dim3(mma_threads), config.stream = stream;
        config.dynamic_shared_bytes = ForwardShape<channels, with_pattern>::shared_bytes;
        return launch(config, attention_forward_mma<T, channels, with_pattern>, inputs_of<T>(p, t), g,
                      operand_of<T>(t.out, p.out_strides, p.E), static_cast<float*>(t.lse));
      };
      return p.with_blocks ? launch_kernel(std::true_type{}) : launch_kernel(std::false_type{});
    });
  });
}

}  // namespace

extern const AttentionCudaKernel attention_forward_sm80;
const AttentionCudaKernel attention_forward_sm80 = {"tensor_core_sm80", 80,     0, refuses,
                                                    no_workspace,       forward};

}  // namespace pyseqnet
