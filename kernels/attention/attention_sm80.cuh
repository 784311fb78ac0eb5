// What the tensor-core kernels of softmax attention for sm_80 and newer are made of (mma.sync m16n8k16,
// ldmatrix, cp.async): tiles of 16-bit rows in shared memory and the two products of such tiles.
//
//   similarity   sum[row, column]  += a[row, :] . b[column, :]          q k^T, gout v^T and their transposes
//   accumulate   sum[row, channel] += weight[row, n] * b[n, channel]    W v, dZ k, dZ^T q, W^T gout
//
// A tile is `channels` wide (64, 128 or 256: the smallest that holds D and E; what is missing is zero, filled
// by cp.async itself). Its rows are cut into chunks of 16 bytes, and chunk c of row r lies where chunk
// c ^ (r % 8) would: the eight rows that ldmatrix reads at once then meet eight different groups of banks.
//
// A warp owns 16 * row_tiles rows of the left operand and all columns. What it has computed as a sum is laid
// out over its lanes exactly as the next product wants its left operand: weights and gradients of logits go
// from product to product in registers, rounded to 16 bits, and never through shared memory.
#pragma once
#include "attention/attention_launch.cuh"
#include "common/ptx.cuh"

namespace pyseqnet {

constexpr int mma_warps = 4, mma_threads = 32 * mma_warps;
constexpr int key_tile = 64;  // keys that a tile of forward holds

// ---------------------------------------------------------------- 16-bit types
template <class T>
PYSEQNET_DEVICE uint32_t pack_pair(float low, float high);
template <>
PYSEQNET_DEVICE uint32_t pack_pair<__nv_bfloat16>(float low, float high) {
  return ptx::pack_bf16(low, high);
}
template <>
PYSEQNET_DEVICE uint32_t pack_pair<__half>(float low, float high) {
  return ptx::pack_f16(low, high);
}
template <class T>
PYSEQNET_DEVICE void multiply_add(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, __half>)
    ptx::mma_m16n8k16_f16(sum, a, b, sum);
  else
    ptx::mma_m16n8k16_bf16(sum, a, b, sum);
}

// ---------------------------------------------------------------- tiles in shared memory
template <int channels>
PYSEQNET_DEVICE uint32_t chunk_at(int row, int chunk) {
  return uint32_t(row * (channels * 2) + ((chunk ^ (row & 7)) << 4));
}
// The chunk that lies `chunks` (even) beyond the one at `address`, in a row of a tile; address: of chunk 0 or 1.
// One exclusive or, so that a lane keeps one address, not one for each step.
PYSEQNET_DEVICE uint32_t chunks_on(uint32_t address, int chunks) {
  return (address ^ uint32_t((chunks & 7) << 4)) + uint32_t((chunks >> 3) << 7);
}

// Begins to copy rows into a tile; rows that keep() does not want and channels past `width` become zero and
// are not read. The caller commits the group.
template <int channels, int rows, class T, class Keep>
PYSEQNET_DEVICE void stage_rows(uint32_t tile, const T* from, int stride, int width, Keep keep) {
  constexpr int across = channels / 8, down = mma_threads / across;
  static_assert(rows % down == 0);
  const int t = int(threadIdx.x), chunk = t % across;
  const int row0 = t / across;
  // Few copies at a time: addresses of more of them would take registers from the sums.
#pragma unroll 8
  for (int k = 0; k < rows / down; k++) {
    const int row = row0 + k * down;
    const bool exists = keep(row) && chunk * 8 < width;
    ptx::cp_async_16(tile + chunk_at<channels>(row, chunk), exists ? from + (row * stride + chunk * 8) : from,
                     exists);
  }
}

// Where a lane reads left operands from: rows row0 .. row0 + 15 of a tile, step 0.
template <int channels>
PYSEQNET_DEVICE uint32_t left_address(uint32_t tile, int row0) {
  const int lane = int(threadIdx.x) % 32;
  return tile + chunk_at<channels>(row0 + lane % 16, lane / 16);
}

template <int row_tiles, int columns>
using SumRegisters = float[row_tiles][columns / 8][4];
template <int row_tiles, int columns>
using LeftRegisters = uint32_t[row_tiles][columns / 16][4];

// sum = a b^T. a_address: left_address of a's rows.
template <class T, int channels, int row_tiles, int columns>
PYSEQNET_DEVICE void similarity(SumRegisters<row_tiles, columns>& sum, uint32_t a_address, uint32_t b_tile) {
  constexpr uint32_t row_bytes = channels * 2;
#pragma unroll
  for (int r = 0; r < row_tiles; r++)
#pragma unroll
    for (int n = 0; n < columns / 8; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) sum[r][n][e] = 0.f;
  const int lane = int(threadIdx.x) % 32;
  const uint32_t b_address = b_tile + chunk_at<channels>(lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
  for (int step = 0; step < channels / 16; step++) {
    uint32_t a[row_tiles][4];
#pragma unroll
    for (int r = 0; r < row_tiles; r++)
      ptx::ldmatrix_x4(a[r], chunks_on(a_address, step * 2) + 16 * r * row_bytes);
#pragma unroll
    for (int n = 0; n < columns / 16; n++) {
      uint32_t b[4];
      ptx::ldmatrix_x4(b, chunks_on(b_address, step * 2) + n * 16 * row_bytes);
      const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
#pragma unroll
      for (int r = 0; r < row_tiles; r++) {
        multiply_add<T>(sum[r][n * 2], a[r], first);
        multiply_add<T>(sum[r][n * 2 + 1], a[r], second);
      }
    }
  }
}

// Sums become a left operand of the next product.
template <class T, int row_tiles, int columns>
PYSEQNET_DEVICE void to_left(LeftRegisters<row_tiles, columns>& a,
                             const SumRegisters<row_tiles, columns>& sum) {
#pragma unroll
  for (int r = 0; r < row_tiles; r++)
#pragma unroll
    for (int n = 0; n < columns / 16; n++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        a[r][n][i] = pack_pair<T>(sum[r][n * 2 + i / 2][i % 2 * 2], sum[r][n * 2 + i / 2][i % 2 * 2 + 1]);
}

// sum += weights b, over `width` channels of a tile from chunk0 on.
template <class T, int channels, int width, int row_tiles, int columns>
PYSEQNET_DEVICE void accumulate(SumRegisters<row_tiles, width>& sum,
                                const LeftRegisters<row_tiles, columns>& weights, uint32_t b_tile,
                                int chunk0 = 0) {
  const int lane = int(threadIdx.x) % 32;
  const uint32_t b_address = chunks_on(b_tile + chunk_at<channels>(lane % 16, lane / 16), chunk0);
#pragma unroll
  for (int n = 0; n < columns / 16; n++)
#pragma unroll
    for (int c = 0; c < width / 16; c++) {
      uint32_t b[4];
      ptx::ldmatrix_x4_trans(b, chunks_on(b_address, c * 2) + n * 16 * (channels * 2));
      const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
#pragma unroll
      for (int r = 0; r < row_tiles; r++) {
        multiply_add<T>(sum[r][c * 2], weights[r][n], first);
        multiply_add<T>(sum[r][c * 2 + 1], weights[r][n], second);
      }
    }
}

// Writes a warp's rows to global memory by way of its own rows of a tile, so that lanes store 16 bytes side by
// side. factor: of row 16 r + 8 half + lane / 4. `to` is where row row0 of the tile belongs; `rows` of the
// warp's rows and `width` channels exist.
template <class T, int channels, int width, int row_tiles>
PYSEQNET_DEVICE void store_rows(T* to, int64_t stride, int rows, int count,
                                const SumRegisters<row_tiles, width>& sum,
                                const float (&factor)[row_tiles][2], unsigned char* tile, int row0) {
  const int lane = int(threadIdx.x) % 32;
  __syncwarp();
#pragma unroll
  for (int r = 0; r < row_tiles; r++)
#pragma unroll
    for (int n = 0; n < width / 8; n++)
#pragma unroll
      for (int half = 0; half < 2; half++)
        *reinterpret_cast<uint32_t*>(tile + chunk_at<channels>(row0 + 16 * r + 8 * half + lane / 4, n) +
                                     lane % 4 * 4) =
            pack_pair<T>(sum[r][n][half * 2] * factor[r][half], sum[r][n][half * 2 + 1] * factor[r][half]);
  __syncwarp();
  constexpr int across = width / 8;
#pragma unroll
  for (int k = 0; k < 16 * row_tiles * across / 32; k++) {
    const int row = (k * 32 + lane) / across, chunk = lane % across;
    if (row < rows && chunk * 8 < count)
      *reinterpret_cast<uint4*>(to + row * stride + chunk * 8) =
          *reinterpret_cast<const uint4*>(tile + chunk_at<channels>(row0 + row, chunk));
  }
}

// ---------------------------------------------------------------- which keys a query sees
// A row of a tile of up to 64 columns as bits: column c is seen where bit c is set.
PYSEQNET_DEVICE uint64_t bits_below(int end) {
  return end <= 0 ? 0 : end >= 64 ? ~uint64_t(0) : (uint64_t(1) << end) - 1;
}
PYSEQNET_DEVICE uint64_t bits_from(int begin) { return ~bits_below(begin); }

// Which of a lane's columns of a row are seen; columns n * 8 + lane % 4 * 2 + odd.
struct SeenColumns {
  uint32_t low, high;
  PYSEQNET_DEVICE explicit SeenColumns(uint64_t row_bits) {
    const uint64_t mine = row_bits >> (int(threadIdx.x) % 4 * 2);
    low = uint32_t(mine), high = uint32_t(mine >> 32);
  }
  PYSEQNET_DEVICE bool sees(int n, int odd) const {
    return (n < 4 ? low >> (n * 8 + odd) : high >> ((n - 4) * 8 + odd)) & 1u;
  }
};

// Positions and offsets as int: the kernels take up to 2^29 of them.
constexpr int64_t most_positions = int64_t{1} << 29;

// Causality as kernels use it: query i sees keys up to i + offset. No causality is an offset that hides nothing.
struct Reach {
  int offset, queries;

  // Keys that query i sees, out of `keys`.
  PYSEQNET_DEVICE int keys_of(int i, int keys) const { return max(0, min(keys, i + offset + 1)); }
  // First query that sees key j.
  PYSEQNET_DEVICE int first_query(int j) const { return max(0, min(queries, j - offset)); }
};
inline Reach reach_of(const AttentionProblem& p) {
  const int64_t offset = p.causal ? p.causal_offset : most_positions;
  return {int(std::clamp(offset, -most_positions, most_positions)), int(p.L)};
}

// One head of one batch, in as few registers as it takes; keys: visible by length.
struct ShortHead {
  int b, h, kv, keys;
};
template <class T>
PYSEQNET_DEVICE ShortHead short_head_of(const AttentionInputs<T>& a, unsigned head) {
  const unsigned b = head / unsigned(a.H), h = head - b * unsigned(a.H);
  const int64_t length = a.with_key_lengths ? clamped_length(a.key_lengths[b], a.S) : a.S;
  return {int(b), int(h), int(h / unsigned(a.group)), int(length)};
}

// ---------------------------------------------------------------- patterns
// A tile of the pattern (attention_blocks.h) has as many queries as a block has then: 64.

// The head and the tile that a block works on: rows with the most tiles first.
struct PatternRow {
  unsigned head;           // of all batches
  int tile, begin, count;  // entries of its row
};
template <class T>
PYSEQNET_DEVICE PatternRow pattern_row_of(const AttentionInputs<T>& a, int tiles) {
  const unsigned rows = unsigned(a.block_heads) * unsigned(tiles), lead = blockIdx.x / rows;
  const unsigned row = unsigned(a.blocks.row_order[blockIdx.x - lead * rows]), h = row / unsigned(tiles);
  const int begin = a.blocks.row_begin[row];
  return {lead * unsigned(a.block_heads) + h, int(row - h * unsigned(tiles)), begin,
          a.blocks.row_begin[row + 1] - begin};
}

// The keys of a tile that some query of the block sees, by pattern and reach: what others hold may be NaN. All
// lanes of a warp ask together.
PYSEQNET_DEVICE uint64_t keys_seen(const AttentionBlocks& blocks, AttentionBlockEntry entry,
                                   const Reach& reach, int query0, int keys) {
  if (entry.bits == block_full) return ~uint64_t(0);
  const int lane = int(threadIdx.x) % 32, key0 = entry.tile * int(block_tile);
  uint64_t seen = 0;
#pragma unroll
  for (int query = lane; query < block_tile; query += 32)
    seen |= block_row_bits(blocks, entry, query) & bits_below(reach.keys_of(query0 + query, keys) - key0);
  return __reduce_or_sync(whole_warp, unsigned(seen)) |
         uint64_t(__reduce_or_sync(whole_warp, unsigned(seen >> 32))) << 32;
}

// ---------------------------------------------------------------- what is refused
// Elements between neighbouring lines: places within a tile are 32-bit numbers.
constexpr int64_t widest_stride = int64_t{1} << 23;
inline Refusal refuses_tensor_cores(const AttentionProblem& p) {
  if (p.dtype != DType::bf16 && p.dtype != DType::f16) return "tensor cores take bfloat16 and float16";
  if (p.D > 256 || p.E > 256) return "more than 256 channels a head";
  if (p.D % 8 || p.E % 8) return "channels are no multiple of 8";
  if (!p.lines_aligned) return "a line does not begin at a multiple of 16 bytes";
  if (p.dropout_p > 0) return "dropout";
  if (p.with_mask) return "a mask of its own";
  if (p.with_bias) return "a bias";
  if (p.with_slopes) return "ALiBi";
  if (p.softcap > 0) return "soft-capping";
  if (p.packed) return "packed sequences";
  if (!(p.scale > 0)) return "a scale that is not positive";
  for (const AttentionStrides* s : {&p.q_strides, &p.k_strides, &p.v_strides, &p.out_strides, &p.gout_strides,
                                    &p.gq_strides, &p.gk_strides, &p.gv_strides})
    if (s->n < 0 || s->n > widest_stride) return "lines are too far apart";
  if (p.L > most_positions || p.S > most_positions) return "more than 2^29 positions";
  return accepted;
}

// Forward alone: a block owns queries and walks over all their keys, so a few queries leave most of the device idle
// (decoding: one block a head). Worth it only if blocks are many or keys few.
inline Refusal refuses_few_queries(const AttentionProblem& p) {
  constexpr int64_t few_queries = 16, enough_blocks = 128, few_keys = 1024;
  return p.L <= few_queries && p.B * p.H < enough_blocks && p.S > few_keys
             ? "few queries: their keys are shared among blocks elsewhere"
             : accepted;
}

// Calls f(width) with the smallest of 64, 128, 256 channels that holds a head, as an integral constant.
template <class F>
int dispatch_channels(const AttentionProblem& p, F&& f) {
  const int64_t channels = std::max(p.D, p.E);
  if (channels <= 64) return f(std::integral_constant<int, 64>{});
  if (channels <= 128) return f(std::integral_constant<int, 128>{});
  return f(std::integral_constant<int, 256>{});
}
template <class F>
int dispatch_16bit(DType dtype, F&& f) {
  return dtype == DType::f16 ? f(TypeTag<__half>{}) : f(TypeTag<__nv_bfloat16>{});
}

}  // namespace pyseqnet
