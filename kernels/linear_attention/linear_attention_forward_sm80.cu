// Causal linear attention forward on tensor cores by mma.sync, sm_80 and newer: bfloat16, heads up to 128 wide.
//
// A block walks over the chunks of a head (or of a segment of one) with the state on chip: S in float in the
// registers of its warps, 16 rows of S each, and rounded to 16 bits in shared memory, where it is the right
// operand of the next chunk; z in float in shared memory. Queries, keys and values are read once, outputs are
// written once: one pass. A chunk of 64 rows:
//   features         the tiles that cp.async brought become features, in place
//   a S, a f^T       one walk over a's fragments; the second masked, faded, summed by rows, rounded
//   + (a f^T) v      from registers; divided by the sums, stored by rows of 16 bytes
//   S += f^T v       and z, in float
// A warp has 16 rows of outputs; where heads are 128 wide two warps share them, half of the columns each, and
// both form a f^T: the product of a chunk's own keys is small beside those with the state.
//
// Heads that do not fill the device are cut into segments, in two levels: sweeps sum each segment's f v^T
// (keys and values alone are read), a scan makes them the states that segments start from, and the same sweep
// gives outputs, a block a segment. That reads keys and values twice.
//
// float16 has no room for a state in 16 bits (fla's issue 1187) and stays with the generic kernel.
//
// Counted for B 4, T 4096, H 64, D = E = 128, bfloat16, inference:
//   q, k, v, out        1.07 GB               0.224 ms at 4.8 TB/s
//   products            6.2 MFLOP a chunk     101 GFLOP, 0.17 ms at the 600 TFLOP/s that mma.sync reaches
//   shared memory       fragments 0.43 MB a chunk, features, staging and z 0.2 MB: 5 k clocks at 128 bytes,
//                       124 chunks a multiprocessor: 0.35 ms
// Bound: reads of fragments from shared memory, since a warp uses each for 16 rows only; and eight warps a
// multiprocessor hide little between the five barriers of a chunk. Predicted before any measurement, H200: 0.8
// ms; training writes a state a chunk besides, 1.1 GB, 0.25 ms more. The floor of traffic needs warp tiles of
// 32 rows or wgmma.
#include <algorithm>

#include "common/cuda_numerics.cuh"
#include "common/ptx.cuh"
#include "common/residency.cuh"
#include "linear_attention/linear_attention.h"
#include "linear_attention/linear_attention_features.cuh"

namespace pyseqnet {
namespace {

constexpr int chunk = LinearAttentionProblem::chunk_rows;
constexpr int row_groups = chunk / 16;
constexpr unsigned whole_warp = 0xffffffffu;

template <int width>
struct Shape {
  static constexpr int warps = width / 16, threads = 32 * warps;
  static constexpr int parts = warps / row_groups;  // warps that share rows of outputs
  static constexpr int columns = width / parts;     // of a warp's outputs
  static constexpr unsigned tile_bytes = chunk * width * 2, stage_bytes = 3 * tile_bytes;
  static constexpr unsigned state_bytes = width * width * 2;
  static constexpr unsigned number_bytes = (width + chunk + 2 * chunk) * 4;  // z, a . z, powers
  static constexpr unsigned shared_bytes(int stages) {
    return unsigned(stages) * stage_bytes + state_bytes + number_bytes;
  }
};

struct Sweep {
  LinearAttentionProblem p;
  LinearAttentionTensors t;
  float* segments;    // [heads][count][D*E + D]: sums, after the scan the states before
  int count;          // of segments a head
  int64_t rows_each;  // whole chunks
  int stages;         // 2: the next chunk's rows come while one is worked on
};

// ---------------------------------------------------------------- tiles in shared memory
// Rows of `width` 16-bit numbers in pieces of 16 bytes; piece c of row r lies where piece c ^ (r % 8) would, so
// that the eight rows that ldmatrix reads at once meet eight groups of banks.
template <int width>
PYSEQNET_DEVICE uint32_t piece_at(int row, int piece) {
  return uint32_t(row * (width * 2) + ((piece ^ (row & 7)) << 4));
}

// Begins to copy `rows` rows of `columns`; the rest of the tile becomes zero.
template <int width>
PYSEQNET_DEVICE void stage_rows(uint32_t tile, const __nv_bfloat16* from, int64_t stride, int rows,
                                int columns) {
  constexpr int across = width / 8, down = Shape<width>::threads / across;
  const int piece = int(threadIdx.x) % across;
#pragma unroll
  for (int k = 0; k < chunk / down; k++) {
    const int row = int(threadIdx.x) / across + k * down;
    const bool exists = row < rows && piece * 8 < columns;
    ptx::cp_async_16(tile + piece_at<width>(row, piece), exists ? from + row * stride + piece * 8 : from,
                     exists);
  }
}

// x of each number of a tile becomes of(x, row, column).
template <int width, class F>
PYSEQNET_DEVICE void rewrite_tile(unsigned char* tile, F of) {
  constexpr int across = width / 8;
  for (int k = int(threadIdx.x); k < chunk * across; k += Shape<width>::threads) {
    const int row = k / across, piece = k % across;
    uint4* at = reinterpret_cast<uint4*>(tile + piece_at<width>(row, piece));
    uint4 bits = *at;
    uint32_t* words[4] = {&bits.x, &bits.y, &bits.z, &bits.w};
#pragma unroll
    for (int w = 0; w < 4; w++) {
      const float low = bits_float(*words[w] << 16), high = bits_float(*words[w] & 0xffff0000u);
      const int column = piece * 8 + 2 * w;
      *words[w] = ptx::pack_bf16(of(low, row, column), of(high, row, column + 1));
    }
    *at = bits;
  }
}
template <int width>
PYSEQNET_DEVICE float number_at(const unsigned char* tile, int row, int column) {
  return __bfloat162float(
      *reinterpret_cast<const __nv_bfloat16*>(tile + piece_at<width>(row, column / 8) + column % 8 * 2));
}

PYSEQNET_DEVICE void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t b[2] = {b0, b1};
  ptx::mma_m16n8k16_bf16(sum, a, b, sum);
}
// sum[16][columns] += a b[16 rows from row0][columns from piece0].
template <int width, int columns>
PYSEQNET_DEVICE void multiply_rows(float (&sum)[columns / 8][4], const uint32_t (&a)[4], uint32_t tile,
                                   int row0, int piece0) {
  const int lane = int(threadIdx.x) % 32;
#pragma unroll
  for (int c = 0; c < columns / 16; c++) {
    uint32_t b[4];
    ptx::ldmatrix_x4_trans(b, tile + piece_at<width>(row0 + lane % 16, piece0 + c * 2 + lane / 16));
    multiply_add(sum[2 * c], a, b[0], b[1]);
    multiply_add(sum[2 * c + 1], a, b[2], b[3]);
  }
}

// ---------------------------------------------------------------- a block's state
template <int width>
struct State {
  float s[width / 8][4];  // rows 16 warp + lane / 4 and 8 on, columns 8 n + lane % 4 * 2 and one on

  PYSEQNET_DEVICE static int row(int e) {
    return int(threadIdx.x) / 32 * 16 + int(threadIdx.x) % 32 / 4 + e / 2 * 8;
  }
  PYSEQNET_DEVICE static int column(int n, int e) { return n * 8 + int(threadIdx.x) % 4 * 2 + e % 2; }

  template <class F>
  PYSEQNET_DEVICE void each(const LinearAttentionProblem& p, F f) {
#pragma unroll
    for (int n = 0; n < width / 8; n++)
#pragma unroll
      for (int e = 0; e < 4; e++)
        if (row(e) < p.D && column(n, e) < p.E) f(s[n][e], row(e) * p.E + column(n, e));
  }
  PYSEQNET_DEVICE void read(const LinearAttentionProblem& p, const float* from) {
#pragma unroll
    for (int n = 0; n < width / 8; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) s[n][e] = 0;
    if (from) each(p, [&](float& x, int64_t at) { x = from[at]; });
  }
  PYSEQNET_DEVICE void write(const LinearAttentionProblem& p, float* to) {
    each(p, [&](float& x, int64_t at) { to[at] = x; });
  }
  PYSEQNET_DEVICE void scale(float by) {
#pragma unroll
    for (int n = 0; n < width / 8; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) s[n][e] *= by;
  }
  // The right operand of the next chunk.
  PYSEQNET_DEVICE void publish(unsigned char* tile) const {
#pragma unroll
    for (int n = 0; n < width / 8; n++)
#pragma unroll
      for (int half = 0; half < 2; half++)
        *reinterpret_cast<uint32_t*>(tile + piece_at<width>(row(2 * half), n) + int(threadIdx.x) % 4 * 4) =
            ptx::pack_bf16(s[n][2 * half], s[n][2 * half + 1]);
  }
  // += f^T v
  PYSEQNET_DEVICE void add(uint32_t f_tile, uint32_t v_tile) {
    const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
#pragma unroll
    for (int n = 0; n < chunk; n += 16) {
      uint32_t a[4];
      ptx::ldmatrix_x4_trans(a,
                             f_tile + piece_at<width>(n + lane / 16 * 8 + lane % 8, warp * 2 + lane / 8 % 2));
      multiply_rows<width, width>(s, a, v_tile, n, 0);
    }
  }
};

// ---------------------------------------------------------------- the sweep
// What the threads of a block share; `fades` and the powers as in linear_attention_generic.cuh.
template <int width>
struct Block {
  const Sweep& c;
  unsigned char *tiles, *state;
  float *z, *along_z, *powers;
  int b, h, keys = 0;  // keys of the chunk

  PYSEQNET_DEVICE Block(const Sweep& sweep, unsigned char* shared, int head)
      : c(sweep), tiles(shared), b(head / int(sweep.p.H)), h(head % int(sweep.p.H)) {
    state = shared + unsigned(c.stages) * Shape<width>::stage_bytes;
    z = reinterpret_cast<float*>(state + Shape<width>::state_bytes);
    along_z = z + width, powers = along_z + chunk;
  }
  PYSEQNET_DEVICE unsigned char* stage(int64_t n) const {
    return tiles + unsigned(n % c.stages) * Shape<width>::stage_bytes;
  }
  PYSEQNET_DEVICE const __nv_bfloat16* rows_of(const void* base, const HeadStrides& s, int64_t row) const {
    return static_cast<const __nv_bfloat16*>(base) + b * s.b + h * s.h + row * s.row;
  }
  PYSEQNET_DEVICE int fades(int row) const { return row < keys ? row + 1 : keys; }
  PYSEQNET_DEVICE float power(int n) const { return c.p.decayed ? powers[n] : 1.f; }

  // along_z[i] = a[i] . z, by neighbouring threads.
  PYSEQNET_DEVICE void multiply_normalizer(const unsigned char* a_tile) const {
    constexpr int each = Shape<width>::threads / chunk;
    const int row = int(threadIdx.x) / each, part = int(threadIdx.x) % each;
    float sum = 0;
    for (int d = part; d < width; d += each) sum += number_at<width>(a_tile, row, d) * z[d];
#pragma unroll
    for (int distance = 1; distance < each; distance *= 2) sum += __shfl_xor_sync(whole_warp, sum, distance);
    if (part == 0) along_z[row] = sum;
  }
  PYSEQNET_DEVICE void add_normalizer(const unsigned char* f_tile) const {
    const int d = int(threadIdx.x);
    if (d >= width) return;
    float sum = z[d] * power(keys);
    for (int j = 0; j < keys; j++) sum += number_at<width>(f_tile, j, d) * power(keys - 1 - j);
    z[d] = sum;
  }
};

// A warp's 16 rows of outputs of a chunk, in the layout of mma's sums.
template <int width>
struct Outputs {
  static constexpr int columns = Shape<width>::columns;
  float sum[columns / 8][4] = {};
  float total[2] = {};

  PYSEQNET_DEVICE static int group() { return int(threadIdx.x) / 32 % row_groups; }
  PYSEQNET_DEVICE static int piece0() { return int(threadIdx.x) / 32 / row_groups * (columns / 8); }
  PYSEQNET_DEVICE static int row(int half) { return group() * 16 + int(threadIdx.x) % 32 / 4 + half * 8; }

  PYSEQNET_DEVICE void compute(const Block<width>& block, uint32_t a_tile, uint32_t f_tile, uint32_t v_tile) {
    const int lane = int(threadIdx.x) % 32;
    const uint32_t state = ptx::smem_u32(block.state);
    float score[chunk / 8][4] = {};
    // Few steps at a time: addresses of more of them would take registers from the sums.
#pragma unroll 2
    for (int step = 0; step < width / 16; step++) {
      uint32_t a[4];
      ptx::ldmatrix_x4(a, a_tile + piece_at<width>(group() * 16 + lane % 16, step * 2 + lane / 16));
      multiply_rows<width, columns>(sum, a, state, step * 16, piece0());
#pragma unroll
      for (int n = 0; n < row_groups; n++) {
        if (n > group()) continue;  // keys behind all of the warp's queries
        uint32_t k[4];
        ptx::ldmatrix_x4(
            k, f_tile + piece_at<width>(n * 16 + lane / 16 * 8 + lane % 8, step * 2 + lane / 8 % 2));
        multiply_add(score[2 * n], a, k[0], k[1]);
        multiply_add(score[2 * n + 1], a, k[2], k[3]);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int fades = block.fades(row(half));
      const float faded = block.power(fades);
#pragma unroll
      for (int c = 0; c < columns / 8; c++) sum[c][2 * half] *= faded, sum[c][2 * half + 1] *= faded;
#pragma unroll
      for (int n = 0; n < chunk / 8; n++)
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; e++) {
          const int key = n * 8 + lane % 4 * 2 + e % 2;
          score[n][e] = key < fades ? score[n][e] * block.power(fades - 1 - key) : 0.f;
          total[half] += score[n][e];
        }
      total[half] += __shfl_xor_sync(whole_warp, total[half], 1);
      total[half] += __shfl_xor_sync(whole_warp, total[half], 2);
      if (block.c.p.normalize) total[half] += block.along_z[row(half)] * faded;
    }
#pragma unroll
    for (int n = 0; n < row_groups; n++) {
      if (n > group()) continue;
      uint32_t a[4];
#pragma unroll
      for (int i = 0; i < 4; i++)
        a[i] = ptx::pack_bf16(score[n * 2 + i / 2][i % 2 * 2], score[n * 2 + i / 2][i % 2 * 2 + 1]);
      multiply_rows<width, columns>(sum, a, v_tile, n * 16, piece0());
    }
  }

  // Through the warp's own part of a tile that nobody reads any more.
  PYSEQNET_DEVICE void store(const Block<width>& block, const LinearAttentionRows& rows, int64_t row0,
                             unsigned char* tile) {
    const LinearAttentionProblem& p = block.c.p;
    const int lane = int(threadIdx.x) % 32;
    float* inverse = static_cast<float*>(block.c.t.inverse);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float divisor = total[half] + float(p.eps);
      const float factor = !p.normalize ? 1.f : divisor == 0.f ? 0.f : 1.f / divisor;
      if (inverse && piece0() == 0 && lane % 4 == 0 && row0 + row(half) < rows.L)
        inverse[rows.inverse + row0 + row(half)] = factor;
#pragma unroll
      for (int c = 0; c < columns / 8; c++)
        *reinterpret_cast<uint32_t*>(tile + piece_at<width>(row(half), piece0() + c) + lane % 4 * 4) =
            factor == 0.f ? 0u : ptx::pack_bf16(sum[c][2 * half] * factor, sum[c][2 * half + 1] * factor);
    }
    __syncwarp();
    constexpr int across = columns / 8;
#pragma unroll
    for (int k = 0; k < 16 * across / 32; k++) {
      const int row = group() * 16 + (k * 32 + lane) / across, piece = piece0() + lane % across;
      if (row0 + row >= rows.L || piece * 8 >= p.E) continue;
      auto* to = const_cast<__nv_bfloat16*>(block.rows_of(block.c.t.out, p.out, rows.begin + row0 + row));
      *reinterpret_cast<uint4*>(to + piece * 8) =
          *reinterpret_cast<const uint4*>(tile + piece_at<width>(row, piece));
    }
  }
};

// with_outputs: from the state before it, a segment's outputs; else the segment's sum, which goes to where the
// state was read from.
template <int width, bool with_outputs>
__global__ void __launch_bounds__(Shape<width>::threads) sweep_chunks(const Sweep c) {
  using S = Shape<width>;
  PYSEQNET_DYNAMIC_SHARED(unsigned char, shared);
  const LinearAttentionProblem& p = c.p;
  const LinearAttentionTensors& t = c.t;
  const int head = int(blockIdx.x) / c.count, segment = int(blockIdx.x) % c.count;
  Block<width> block(c, shared, head);
  const LinearAttentionRows rows = t.rows(p, block.b, block.h);
  const int64_t begin = segment * c.rows_each, limit = begin + c.rows_each;
  const int64_t end = limit < rows.L ? limit : rows.L, matrix = p.D * p.E;
  float* partial = c.segments ? c.segments + int64_t(blockIdx.x) * p.state_size() : nullptr;

  State<width> state;
  const float* first = with_outputs && !partial ? static_cast<const float*>(t.state0) : nullptr;
  const float* first_z = static_cast<const float*>(t.normalizer0);
  const float* from = with_outputs && partial ? partial : first ? first + head * matrix : nullptr;
  state.read(p, from);
  const int d = int(threadIdx.x);
  if (d < width) {
    const float* from_z = with_outputs && partial ? partial + matrix : first ? first_z + head * p.D : nullptr;
    block.z[d] = from_z && d < p.D ? from_z[d] : 0.f;
  }
  if (p.decayed)
    for (int n = d; n <= chunk; n += S::threads) block.powers[n] = float(integer_power(t.decay[block.h], n));
  if (with_outputs) state.publish(block.state);

  const auto keys_of = [&](int64_t row) {
    return int(LinearAttentionTensors::between(0, rows.keys - row, chunk));
  };
  const auto fetch = [&](int64_t row) {
    if (row < end) {
      const int64_t left = end - row;
      const uint32_t to = ptx::smem_u32(block.stage(row / chunk));
      const int64_t at = rows.begin + row;
      if (with_outputs)
        stage_rows<width>(to, block.rows_of(t.q, p.q, at), p.q.row, int(left < chunk ? left : chunk),
                          int(p.D));
      stage_rows<width>(to + S::tile_bytes, block.rows_of(t.k, p.k, at), p.k.row, keys_of(row), int(p.D));
      stage_rows<width>(to + 2 * S::tile_bytes, block.rows_of(t.v, p.v, at), p.v.row, keys_of(row), int(p.E));
    }
    ptx::cp_async_commit();
  };
  if (c.stages == 2) fetch(begin);
#pragma unroll 1
  for (int64_t row = begin; row < end; row += chunk) {
    __syncthreads();  // everybody is through with the chunk before
    if (c.stages == 2) {
      fetch(row + chunk);
      ptx::cp_async_wait<1>();
    } else {
      fetch(row);
      ptx::cp_async_wait<0>();
    }
    __syncthreads();
    block.keys = keys_of(row);
    unsigned char *a_tile = block.stage(row / chunk), *f_tile = a_tile + S::tile_bytes;
    const uint32_t a_address = ptx::smem_u32(a_tile), f_address = a_address + S::tile_bytes,
                   v_address = f_address + S::tile_bytes;
    if (with_outputs)
      rewrite_tile<width>(a_tile, [&](float x, int, int column) {
        return column < p.D ? feature_of(p.feature_map, x * float(p.scale)) : 0.f;
      });
    rewrite_tile<width>(f_tile, [&](float x, int row, int column) {
      return row < block.keys && column < p.D ? feature_of(p.feature_map, x) : 0.f;
    });
    __syncthreads();
    if constexpr (with_outputs) {
      if (t.saved) {
        float* saved = static_cast<float*>(t.saved) + (rows.saved + row / chunk) * p.state_size();
        state.write(p, saved);
        if (d < p.D) saved[matrix + d] = block.z[d];
      }
      if (p.normalize) block.multiply_normalizer(a_tile);
      __syncthreads();
      Outputs<width> outputs;
      outputs.compute(block, a_address, f_address, v_address);
      __syncthreads();  // queries and the state have been read
      outputs.store(block, rows, row, a_tile);
    }
    block.add_normalizer(f_tile);
    if (p.decayed) {
      __syncthreads();
      rewrite_tile<width>(f_tile, [&](float x, int row, int) {
        return row < block.keys ? x * block.powers[block.keys - 1 - row] : 0.f;
      });
      __syncthreads();
      state.scale(block.powers[block.keys]);
    }
    state.add(f_address, v_address);
    if (with_outputs) state.publish(block.state);
  }
  ptx::cp_async_wait<0>();
  float* last = with_outputs ? static_cast<float*>(t.state) : partial;
  float* last_z = with_outputs ? static_cast<float*>(t.normalizer) : partial + matrix;
  if (with_outputs) {
    if (!last || segment != c.count - 1) return;
    last += head * matrix, last_z += head * p.D;
  }
  state.write(p, last);
  if (d < p.D) last_z[d] = block.z[d];
}

// A thread a number of a head's state: segments[n] becomes the state before segment n.
constexpr int scan_threads = 256;
__global__ void __launch_bounds__(scan_threads) scan_segments(const Sweep c) {
  const LinearAttentionProblem& p = c.p;
  const int64_t n = int64_t(blockIdx.x) * scan_threads + threadIdx.x, size = p.state_size();
  if (n >= p.B * p.H * size) return;
  const int64_t head = n / size, x = n % size, matrix = p.D * p.E;
  const LinearAttentionRows rows = c.t.rows(p, head / p.H, head % p.H);
  const float* first = static_cast<const float*>(c.t.state0);
  const float* first_z = static_cast<const float*>(c.t.normalizer0);
  float sum = !first ? 0.f : x < matrix ? first[head * matrix + x] : first_z[head * p.D + x - matrix];
  for (int k = 0; k < c.count; k++) {
    float* part = c.segments + (head * c.count + k) * size + x;
    const float before = sum;
    if (p.decayed) {
      const int64_t keys = LinearAttentionTensors::between(0, rows.keys - k * c.rows_each, c.rows_each);
      sum *= float(integer_power(c.t.decay[head % p.H], keys));
    }
    sum += *part;
    *part = before;
  }
}

// ---------------------------------------------------------------- launching
struct Segments {
  int64_t count, chunks_each;
};
// Twice as many blocks as multiprocessors of a large device, of no fewer than 8 chunks each. By the problem
// alone: results do not depend on the device. Packed sequences are enough work, or short.
Segments segments_of(const LinearAttentionProblem& p) {
  constexpr int64_t enough_blocks = 264, fewest_chunks = 8;
  const int64_t chunks = std::max<int64_t>(1, p.chunks()), heads = std::max<int64_t>(1, p.heads());
  const int64_t wanted = std::min((enough_blocks + heads - 1) / heads, chunks / fewest_chunks);
  if (p.packed || wanted <= 1) return {1, chunks};
  const int64_t each = (chunks + wanted - 1) / wanted;
  return {(chunks + each - 1) / each, each};
}

Refusal refuses(const LinearAttentionProblem& p) {
  if (!p.causal) return "not causal";
  if (p.dtype == DType::f16) return "a state in float16 would overflow";
  if (p.dtype != DType::bf16) return "tensor cores take bfloat16";
  if (p.D > 128 || p.E > 128) return "a head wider than 128";
  if (p.D % 8 || p.E % 8) return "head sizes are no multiples of 8";
  if (!p.lines_aligned) return "a row does not begin at a multiple of 16 bytes";
  constexpr int64_t most = int64_t(1) << 30;
  if (p.heads() * segments_of(p).count > most || p.heads() * p.state_size() / scan_threads > most)
    return "more blocks than a grid has";
  return accepted;
}
int64_t workspace_bytes(const LinearAttentionProblem& p) {
  const int64_t count = segments_of(p).count;
  return count > 1 ? p.heads() * count * p.state_size() * int64_t(sizeof(float)) : 0;
}

template <int width>
int launch_sweeps(Sweep c, void* stream) {
  using S = Shape<width>;
  c.stages = int(S::shared_bytes(2)) <= device_limits().shared_bytes ? 2 : 1;
  LaunchConfig config;
  config.grid = dim3(unsigned(c.p.heads() * c.count)), config.block = dim3(S::threads),
  config.stream = stream;
  config.dynamic_shared_bytes = S::shared_bytes(c.stages);
  if (c.segments) {
    if (const int error = launch(config, sweep_chunks<width, false>, c); error != launch_ok) return error;
    const int64_t blocks = (c.p.heads() * c.p.state_size() + scan_threads - 1) / scan_threads;
    const LaunchConfig scan = {.grid = dim3(unsigned(blocks)), .block = dim3(scan_threads), .stream = stream};
    if (const int error = launch(scan, scan_segments, c); error != launch_ok) return error;
  }
  return launch(config, sweep_chunks<width, true>, c);
}

int launch_forward(const LinearAttentionProblem& p, const LinearAttentionTensors& t, void* workspace,
                   void* stream) {
  if (p.heads() == 0) return launch_ok;
  const Segments segments = segments_of(p);
  const Sweep c = {p,
                   t,
                   segments.count > 1 ? static_cast<float*>(workspace) : nullptr,
                   int(segments.count),
                   segments.chunks_each * chunk,
                   1};
  return std::max(p.D, p.E) <= 64 ? launch_sweeps<64>(c, stream) : launch_sweeps<128>(c, stream);
}

}  // namespace

extern const LinearAttentionCudaKernel linear_attention_forward_sm80;
const LinearAttentionCudaKernel linear_attention_forward_sm80 = {
    "tensor_core_sm80", 80, 0, refuses, workspace_bytes, launch_forward};

}  // namespace pyseqnet
