// Masked softmax attention forward on Hopper's tensor cores: TMA, mbarriers, wgmma (FlashAttention-3: Shah et
// al., 2024). bfloat16 and float16, up to 256 channels a head.
//
// Persistent blocks, one a multiprocessor. The first warpgroup produces: one thread of it has TMA bring a
// tile of queries and, through a ring of stages, tiles of keys and values; it gives its registers away. Each
// of the others (three up to 64 channels, else two) consumes them for 64 queries of its own:
//
//   scores of tile j + 1 are issued, then the product of the weights of tile j with its values; while both run
//   on the tensor cores, the softmax of tile j + 1 begins as soon as its scores are there
//
// Warpgroups wait for nobody but the ring, so that one's softmax falls between another's products. Weights stay
// in registers: as the left operand of wgmma. Results leave by way of the queries' place in shared memory, and
// TMA. Blocks take work items in a fixed order: heads in groups whose keys and values stay in the second-level
// cache, within a group the tiles with the most keys first, so that causal problems end evenly.
//
// A tile in which a warpgroup's queries see everything costs no mask arithmetic. TMA fills what is outside a
// tensor with zeros; values of keys that exist but that no query sees are overwritten by zeros before use.
//
// Counted for B 1, H 16, L = S = 16384, D = E = 128, bfloat16, not causal:
//   4 * B * H * L * S * D = 2.2 TFLOP         2.8 ms at 790 TFLOP/s
//   B * H * L * S exponentials = 4.3 G        16 a clock and multiprocessor: 1.1 ms, half of the products' time;
//     about 4 more instructions each          1.0 ms at 128 a clock
//   shared memory: a step of m64n128k16 reads 2 + 4 KB (scores) or 4 KB (weights from registers) in the 64
//     clocks that it takes                    up to 75 %
//   q, k, v, out: 268 MB                      0.06 ms at 4.8 TB/s; keys and values again for each block, 17 GB,
//                                             from the second-level cache (6 TB/s)
// With 64 channels products take as long as exponentials (1.1 ms each at H 16): every fourth one is a polynomial
// on the FMA units, which leaves the special-function units 0.8 ms.
// Bound: tensor cores, as far as warpgroups overlap. Predicted before any measurement, H200: 3.8 ms, 580
// TFLOP/s; causal 520; D = 64 400; D = 256 550.
#include "attention/attention_sm80.cuh"
#include "common/tensor_map.cuh"

namespace pyseqnet {
namespace {

template <int channels_>
struct HopperShape {
  static constexpr int channels = channels_;
  static constexpr int consumers = channels == 64 ? 3 : 2;
  static constexpr int warpgroup_queries = 64, queries = consumers * warpgroup_queries;
  static constexpr int keys = channels == 256 ? 64 : 128;
  static constexpr int stages = channels == 64 ? 4 : 2;
  static constexpr int threads = 128 * (consumers + 1);
  // What a warpgroup has of the 64 K registers once it knows its role.
  static constexpr int consumer_registers = consumers == 3 ? 160 : 240, producer_registers = 24;

  // A row of a tile is cut into spans of 128 bytes, the reach of the swizzle; a span of all rows lies together.
  static constexpr int span = 64, spans = channels / span;
  static constexpr unsigned box_bytes = warpgroup_queries * span * 2;  // of queries and results
  static constexpr unsigned query_bytes = queries * channels * 2, tile_bytes = keys * channels * 2;
  static constexpr unsigned span_bytes = keys * span * 2;
  // 152, 160 and 192 KiB
  static constexpr unsigned shared_bytes = query_bytes + 2 * stages * tile_bytes;
  static constexpr bool polynomials = channels == 64;
};

struct HopperInputs {
  ptx::TensorMap q, k, v, out;
  float* lse;
  const int64_t* key_lengths;
  int B, H, L, S, group;
  float scale_log2;
  Reach reach;
  int tiles;           // of queries
  int heads_together;  // see above
};

// A tile of queries of a head.
struct WorkItem {
  int b, h, kv, query0;
  int keys;  // by length
  int tiles;
};

template <class Shape>
PYSEQNET_DEVICE WorkItem item_of(const HopperInputs& a, int index) {
  const int heads = a.B * a.H, of_group = a.heads_together * a.tiles;
  const int group = index / of_group, in_group = index - group * of_group;
  const int heads_here = min(a.heads_together, heads - group * a.heads_together);
  const int tile = in_group / heads_here, head = group * a.heads_together + in_group - tile * heads_here;
  WorkItem item;
  item.b = head / a.H, item.h = head - item.b * a.H, item.kv = item.h / a.group;
  item.query0 = (a.tiles - 1 - tile) * Shape::queries;
  item.keys = a.key_lengths ? int(clamped_length(a.key_lengths[item.b], a.S)) : a.S;
  const int last = min(item.query0 + Shape::queries, a.L) - 1;
  item.tiles = (a.reach.keys_of(last, item.keys) + Shape::keys - 1) / Shape::keys;
  return item;
}

// The barriers of a block, and where its tiles lie.
template <class Shape>
struct Ring {
  uint32_t queries, keys, values;  // in shared memory
  uint32_t bars;

  PYSEQNET_DEVICE uint32_t queries_full() const { return bars; }
  PYSEQNET_DEVICE uint32_t queries_empty() const { return bars + 8; }
  PYSEQNET_DEVICE uint32_t keys_full(int stage) const { return bars + 16 + 32 * stage; }
  PYSEQNET_DEVICE uint32_t keys_empty(int stage) const { return bars + 24 + 32 * stage; }
  PYSEQNET_DEVICE uint32_t values_full(int stage) const { return bars + 32 + 32 * stage; }
  PYSEQNET_DEVICE uint32_t values_empty(int stage) const { return bars + 40 + 32 * stage; }
  PYSEQNET_DEVICE uint32_t key_tile(int stage) const { return keys + stage * Shape::tile_bytes; }
  PYSEQNET_DEVICE uint32_t value_tile(int stage) const { return values + stage * Shape::tile_bytes; }
};

// Where a block is in the ring: the stage of its next tile, and how often it has been around.
template <class Shape>
struct Turn {
  int stage = 0;
  uint32_t phase = 0;
  PYSEQNET_DEVICE void next() {
    if (++stage == Shape::stages) stage = 0, phase ^= 1;
  }
};

template <class Shape>
PYSEQNET_DEVICE void produce(const HopperInputs& a, const Ring<Shape>& ring, int items) {
  Turn<Shape> turn;
  uint32_t query_phase = 0;
  for (int index = int(blockIdx.x); index < items; index += int(gridDim.x)) {
    const WorkItem item = item_of<Shape>(a, index);
    ptx::mbar_wait(ring.queries_empty(), query_phase ^ 1);
    query_phase ^= 1;
    ptx::mbar_arrive_expect_tx(ring.queries_full(), Shape::query_bytes);
    for (int s = 0; s < Shape::spans; s++)
      for (int g = 0; g < Shape::consumers; g++)
        ptx::tma_load<4>(ring.queries + (s * Shape::consumers + g) * Shape::box_bytes, &a.q,
                         {s * Shape::span, item.query0 + g * Shape::warpgroup_queries, item.h, item.b},
                         ring.queries_full());
    for (int j = 0; j < item.tiles; j++, turn.next()) {
      const int stage = turn.stage, key0 = j * Shape::keys;
      ptx::mbar_wait(ring.keys_empty(stage), turn.phase ^ 1);
      ptx::mbar_arrive_expect_tx(ring.keys_full(stage), Shape::tile_bytes);
      for (int s = 0; s < Shape::spans; s++)
        ptx::tma_load<4>(ring.key_tile(stage) + s * Shape::span_bytes, &a.k,
                         {s * Shape::span, key0, item.kv, item.b}, ring.keys_full(stage));
      ptx::mbar_wait(ring.values_empty(stage), turn.phase ^ 1);
      ptx::mbar_arrive_expect_tx(ring.values_full(stage), Shape::tile_bytes);
      for (int s = 0; s < Shape::spans; s++)
        ptx::tma_load<4>(ring.value_tile(stage) + s * Shape::span_bytes, &a.v,
                         {s * Shape::span, key0, item.kv, item.b}, ring.values_full(stage));
    }
  }
}

// ---------------------------------------------------------------- what a consumer does with a tile
// score = q k^T, issued and committed.
template <class T, class Shape>
PYSEQNET_DEVICE void issue_scores(float (&score)[Shape::keys / 2], uint32_t q_box, uint32_t k_tile) {
  ptx::wgmma_fence();
#pragma unroll
  for (int step = 0; step < Shape::channels / 16; step++) {
    const int span = step / 4, within = step % 4 * 32;
    ptx::wgmma<T>(score, ptx::wgmma_desc_sw128(q_box + span * (Shape::consumers * Shape::box_bytes) + within),
                  ptx::wgmma_desc_sw128(k_tile + span * Shape::span_bytes + within), step > 0);
  }
  ptx::wgmma_commit();
}
// sum += weights v, issued and committed. Values lie along their channels: 16 keys are 2048 bytes.
template <class T, class Shape>
PYSEQNET_DEVICE void issue_sums(float (&sum)[Shape::channels / 2],
                                const uint32_t (&weights)[Shape::keys / 16][4], uint32_t v_tile) {
  ptx::wgmma_fence();
#pragma unroll
  for (int step = 0; step < Shape::keys / 16; step++)
    ptx::wgmma<T, 1>(sum, weights[step],
                     ptx::wgmma_descriptor(v_tile + step * 2048, Shape::span_bytes, 1024, Swizzle::b128), 1);
  ptx::wgmma_commit();
}

// 2^x for x <= 0 on the FMA units: 2^round(x) by the exponent's bits, the rest by a polynomial of degree 4,
// minimax on [-1/2, 1/2], relative error 2.6e-6. Below 2^-126 zero; NaN stays NaN.
PYSEQNET_DEVICE float exp2_polynomial(float x) {
  constexpr float round = 12582912.f;  // 1.5 * 2^23: the sum's last bits are round(x)
  const float clamped = x < -126.f ? -126.f : x;
  const float shifted = clamped + round, rest = clamped - (shifted - round);
  float p = 0.009570102f;
  p = fmaf(p, rest, 0.05591786f);
  p = fmaf(p, rest, 0.24024744f);
  p = fmaf(p, rest, 0.6931218f);
  p = fmaf(p, rest, 0.9999993f);
  const float scaled = __int_as_float(__float_as_int(p) + (__float_as_int(shifted) << 23));
  return x < -126.f ? 0.f : scaled;
}

// Scores become weights relative to the largest score so far. Returns nothing that the sums still in flight
// would need: they are rescaled by `factor` once they have come.
template <class Shape>
PYSEQNET_DEVICE void softmax_tile(float (&score)[Shape::keys / 2], SoftmaxState<float> (&state)[2],
                                  float (&factor)[2], float scale_log2) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    SoftmaxState<float>& s = state[half];
    float largest = s.largest;
#pragma unroll
    for (int n = 0; n < Shape::keys / 8; n++)
      largest = fmaxf(largest, fmaxf(score[4 * n + 2 * half], score[4 * n + 2 * half + 1]));
    largest = fmaxf(largest, __shfl_xor_sync(whole_warp, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(whole_warp, largest, 2));
    const float origin = softmax_origin(largest) * scale_log2;
    factor[half] = ptx::ex2(s.largest * scale_log2 - origin);
    s.largest = largest, s.sum *= factor[half];
#pragma unroll
    for (int n = 0; n < Shape::keys / 8; n++)
#pragma unroll
      for (int odd = 0; odd < 2; odd++) {
        float& value = score[4 * n + 2 * half + odd];
        const float exponent = value * scale_log2 - origin;
        value = Shape::polynomials && n % 2 == 1 && odd == 1 ? exp2_polynomial(exponent) : ptx::ex2(exponent);
        s.sum += value;
      }
  }
}

template <class T, class Shape>
PYSEQNET_DEVICE void to_weights(uint32_t (&weights)[Shape::keys / 16][4],
                                const float (&score)[Shape::keys / 2]) {
#pragma unroll
  for (int n = 0; n < Shape::keys / 16; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) weights[n][i] = pack_pair<T>(score[8 * n + 2 * i], score[8 * n + 2 * i + 1]);
}

// A consumer: 64 queries of each work item.
template <class T, class Shape>
class Consumer {
 public:
  PYSEQNET_DEVICE Consumer(const HopperInputs& a, const Ring<Shape>& ring, unsigned char* shared, int group)
      : a_(a),
        ring_(ring),
        shared_(shared),
        group_(group),
        lane_(int(threadIdx.x) % 32),
        row_(int(threadIdx.x) % 128 / 32 * 16 + lane_ / 4) {}

  PYSEQNET_DEVICE void consume(const WorkItem& item) {
    const int query0 = item.query0 + group_ * Shape::warpgroup_queries;
    const int keys = a_.reach.keys_of(min(query0 + Shape::warpgroup_queries, a_.L) - 1, item.keys);
    // Of the block's tiles, those that this warpgroup's queries see.
    const int tiles = query0 < a_.L ? (keys + Shape::keys - 1) / Shape::keys : 0;
    const uint32_t q_box = ring_.queries + group_ * Shape::box_bytes;
    float score[Shape::keys / 2], sum[Shape::channels / 2], factor[2];
    uint32_t weights[Shape::keys / 16][4];
    SoftmaxState<float> state[2] = {{-INFINITY, 0.f}, {-INFINITY, 0.f}};
#pragma unroll
    for (int i = 0; i < Shape::channels / 2; i++) sum[i] = 0.f;

    ptx::mbar_wait(ring_.queries_full(), query_phase_);
    query_phase_ ^= 1;
    if (tiles > 0) {
      ptx::mbar_wait(ring_.keys_full(turn_.stage), turn_.phase);
      issue_scores<T, Shape>(score, q_box, ring_.key_tile(turn_.stage));
      ptx::wgmma_wait<0>();
      release(ring_.keys_empty(turn_.stage));
      hide(score, query0, 0, item.keys);
      softmax_tile<Shape>(score, state, factor, a_.scale_log2);
      to_weights<T, Shape>(weights, score);
#pragma unroll 1
      for (int j = 1; j < tiles; j++) {
        const Turn<Shape> previous = turn_;
        turn_.next();
        if (j == 1) ptx::mbar_wait(ring_.keys_full(turn_.stage), turn_.phase);
        issue_scores<T, Shape>(score, q_box, ring_.key_tile(turn_.stage));
        values_arrive(previous, item, j - 1);
        issue_sums<T, Shape>(sum, weights, ring_.value_tile(previous.stage));
        ptx::wgmma_wait<1>();
        release(ring_.keys_empty(turn_.stage));
        hide(score, query0, j, item.keys);
        softmax_tile<Shape>(score, state, factor, a_.scale_log2);
        // The next keys, already here: ptxas moves the wait below up, before the softmax, unless a branch stands
        // between them. Then nothing would overlap.
        if (j + 1 < tiles) {
          Turn<Shape> next = turn_;
          next.next();
          ptx::mbar_wait(ring_.keys_full(next.stage), next.phase);
        }
        ptx::wgmma_wait<0>();
        release(ring_.values_empty(previous.stage));
        to_weights<T, Shape>(weights, score);
#pragma unroll
        for (int i = 0; i < Shape::channels / 2; i++) sum[i] *= factor[i / 2 % 2];
      }
      values_arrive(turn_, item, tiles - 1);
      issue_sums<T, Shape>(sum, weights, ring_.value_tile(turn_.stage));
      ptx::wgmma_wait<0>();
      release(ring_.values_empty(turn_.stage));
      turn_.next();
    }
    for (int j = tiles; j < item.tiles; j++, turn_.next()) {
      ptx::mbar_wait(ring_.keys_full(turn_.stage), turn_.phase);
      values_arrive(turn_, item, j);
      // No product holds the warps together here: the speaker could run ahead by a whole round of the ring, and the
      // others would wait for a phase that is long over.
      ptx::bar_sync(first_group_barrier + group_, 128);
      release(ring_.keys_empty(turn_.stage));
      release(ring_.values_empty(turn_.stage));
    }
    store(item, query0, sum, state);
  }

 private:
  // One thread speaks for the warpgroup: what it says follows a wait that covers all four warps.
  PYSEQNET_DEVICE void release(uint32_t bar) const {
    if (threadIdx.x % 128 == 0) ptx::mbar_arrive(bar);
  }

  // Waits for values. Those of keys that exist but that no query of the head sees may be NaN, which a weight of
  // zero does not survive: all consumers together put zeros there.
  PYSEQNET_DEVICE void values_arrive(const Turn<Shape>& turn, const WorkItem& item, int tile) const {
    ptx::mbar_wait(ring_.values_full(turn.stage), turn.phase);
    const int seen = a_.reach.keys_of(a_.L - 1, item.keys) - tile * Shape::keys;
    if (seen >= Shape::keys || seen + tile * Shape::keys >= a_.S) return;
    constexpr int chunks = Shape::span / 8, all = 128 * Shape::consumers;
    unsigned char* tile_data = shared_ + (ring_.value_tile(turn.stage) - ring_.queries);
    // Swizzling moves chunks within a row only, and whole rows are cleared.
    for (int c = seen * chunks + int(threadIdx.x) - 128; c < Shape::keys * chunks; c += all)
      for (int s = 0; s < Shape::spans; s++)
        *reinterpret_cast<uint4*>(tile_data + s * Shape::span_bytes + c * 16) = uint4{};
    ptx::fence_async_proxy();
    ptx::bar_sync(all_consumers, all);
  }

  // Scores of keys that queries do not see.
  PYSEQNET_DEVICE void hide(float (&score)[Shape::keys / 2], int query0, int tile, int keys) const {
    const int key0 = tile * Shape::keys;
    if (key0 + Shape::keys <= a_.reach.keys_of(query0, keys)) return;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int limit = a_.reach.keys_of(query0 + row_ + 8 * half, keys) - key0;
#pragma unroll
      for (int part = 0; part < Shape::keys / 64; part++) {
        const SeenColumns seen(bits_below(limit - 64 * part));
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
          for (int odd = 0; odd < 2; odd++)
            if (!seen.sees(n, odd)) score[4 * (8 * part + n) + 2 * half + odd] = -INFINITY;
      }
    }
  }

  PYSEQNET_DEVICE void store(const WorkItem& item, int query0, float (&sum)[Shape::channels / 2],
                             SoftmaxState<float> (&state)[2]) const {
    unsigned char* box = shared_ + group_ * Shape::box_bytes;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      SoftmaxState<float>& s = state[half];
      s.sum += __shfl_xor_sync(whole_warp, s.sum, 1);
      s.sum += __shfl_xor_sync(whole_warp, s.sum, 2);
      s.largest = softmax_origin(s.largest) * a_.scale_log2;
      const float inverse = softmax_inverse(s);
      const int query = query0 + row_ + 8 * half;
      if (lane_ % 4 == 0 && query < a_.L)
        a_.lse[(int64_t(item.b) * a_.H + item.h) * a_.L + query] = softmax_lse(s);
#pragma unroll
      for (int n = 0; n < Shape::channels / 8; n++)
        *reinterpret_cast<uint32_t*>(box + n / 8 * (Shape::consumers * Shape::box_bytes) +
                                     chunk_at<Shape::span>(row_ + 8 * half, n % 8) + lane_ % 4 * 4) =
            pack_pair<T>(sum[4 * n + 2 * half] * inverse, sum[4 * n + 2 * half + 1] * inverse);
    }
    ptx::fence_async_proxy();
    ptx::bar_sync(first_group_barrier + group_, 128);
    if (threadIdx.x % 128 == 0) {
      if (query0 < a_.L)
        for (int s = 0; s < Shape::spans; s++)
          ptx::tma_store<4>(&a_.out, ring_.queries + (s * Shape::consumers + group_) * Shape::box_bytes,
                            {s * Shape::span, query0, item.h, item.b});
      ptx::bulk_commit();
      ptx::bulk_wait_read<0>();
      ptx::mbar_arrive(ring_.queries_empty());
    }
  }

  // Named barriers; 0 is __syncthreads.
  static constexpr int all_consumers = 1, first_group_barrier = 2;

  const HopperInputs& a_;
  const Ring<Shape>& ring_;
  unsigned char* shared_;
  int group_, lane_, row_;  // row_: the first of a thread's two
  Turn<Shape> turn_;
  uint32_t query_phase_ = 0;
};

template <class T, int channels>
__global__ void __launch_bounds__(HopperShape<channels>::threads, 1)
    attention_forward_wgmma(const __grid_constant__ HopperInputs a, const int items) {
#if PYSEQNET_SM90A
  using Shape = HopperShape<channels>;
  PYSEQNET_DYNAMIC_SHARED(unsigned char, shared);
  PYSEQNET_SHARED(uint64_t, bars, [2 + 4 * Shape::stages]);
  Ring<Shape> ring;
  ring.queries = ptx::smem_u32(shared), ring.keys = ring.queries + Shape::query_bytes;
  ring.values = ring.keys + Shape::stages * Shape::tile_bytes, ring.bars = ptx::smem_u32(bars);
  if (threadIdx.x == 0) {
    ptx::mbar_init(ring.queries_full(), 1);
    ptx::mbar_init(ring.queries_empty(), Shape::consumers);
    for (int s = 0; s < Shape::stages; s++) {
      ptx::mbar_init(ring.keys_full(s), 1), ptx::mbar_init(ring.values_full(s), 1);
      ptx::mbar_init(ring.keys_empty(s), Shape::consumers);
      ptx::mbar_init(ring.values_empty(s), Shape::consumers);
    }
    ptx::mbar_fence_init();
  }
  __syncthreads();
  const int group = int(threadIdx.x) / 128 - 1;
  if (group < 0) {
    ptx::setmaxnreg_dec<Shape::producer_registers>();
    if (threadIdx.x == 0) produce<Shape>(a, ring, items);
  } else {
    ptx::setmaxnreg_inc<Shape::consumer_registers>();
    Consumer<T, Shape> consumer(a, ring, shared, group);
    for (int index = int(blockIdx.x); index < items; index += int(gridDim.x))
      consumer.consume(item_of<Shape>(a, index));
  }
#endif
}

// ---------------------------------------------------------------- launching
// Blocks that run at once on a full-size H100 or H200; fewer multiprocessors take them in turns.
constexpr int64_t resident_blocks = 132;
// Keys and values of the heads that are worked on together: what the second-level cache (50 MB) keeps.
constexpr int64_t bytes_together = 32 << 20;

int64_t queries_of_block(const AttentionProblem& p) { return std::max(p.D, p.E) > 64 ? 128 : 192; }

// TMA wants every stride to be a positive multiple of 16 bytes, where there is more than one of a thing.
bool has_no_stride(const AttentionStrides& s, int64_t B, int64_t H, int64_t N) {
  return (s.b == 0 && B > 1) || (s.h == 0 && H > 1) || (s.n == 0 && N > 1);
}

Refusal refuses(const AttentionProblem& p) {
  if (const Refusal why = refuses_tensor_cores(p)) return why;
  if (const Refusal why = refuses_few_queries(p)) return why;
  if (has_no_stride(p.q_strides, p.B, p.H, p.L) || has_no_stride(p.k_strides, p.B, p.Hk, p.S) ||
      has_no_stride(p.v_strides, p.B, p.Hk, p.S) || has_no_stride(p.out_strides, p.B, p.H, p.L))
    return "an expanded dimension, of stride 0";
  if (p.S == 0) return "no keys";
  if (p.with_blocks) return "a pattern";
  return fits_grid({p.B, p.H, ceil_divide(p.L, queries_of_block(p)) + 1}) ? accepted : too_many_tiles;
}
int64_t no_workspace(const AttentionProblem&) { return 0; }

// A (channels, positions, heads, batch) view whose boxes are 64 channels of `rows` positions.
int map_of(ptx::TensorMap* map, DType type, const void* data, const AttentionStrides& s, int64_t channels,
           int64_t positions, int64_t heads, int64_t batch, int rows) {
  // Of a dimension of extent 1 the stride is not used, but must be one.
  const auto stride = [](int64_t elements, int64_t extent) {
    return extent > 1 ? uint64_t(elements) * 2 : 16;
  };
  TmaTensor tensor;
  tensor.data = data, tensor.type = type, tensor.rank = 4;
  const int64_t extents[] = {channels, positions, heads, batch};
  for (int i = 0; i < 4; i++) tensor.extent[i] = uint64_t(extents[i]);
  tensor.stride_bytes[1] = stride(s.n, positions), tensor.stride_bytes[2] = stride(s.h, heads);
  tensor.stride_bytes[3] = stride(s.b, batch);
  return make_tensor_map(map, tensor, {{64, uint32_t(rows), 1, 1, 1}});
}

int forward(const AttentionProblem& p, const AttentionTensors& t, void*, void* stream) {
  if (p.B * p.H * p.L == 0) return launch_ok;
  return dispatch_16bit(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return dispatch_channels(p, [&](auto width) {
      using Shape = HopperShape<decltype(width)::value>;
      HopperInputs a;
      int error = map_of(&a.q, p.dtype, t.q, p.q_strides, p.D, p.L, p.H, p.B, Shape::warpgroup_queries);
      if (!error) error = map_of(&a.k, p.dtype, t.k, p.k_strides, p.D, p.S, p.Hk, p.B, Shape::keys);
      if (!error) error = map_of(&a.v, p.dtype, t.v, p.v_strides, p.E, p.S, p.Hk, p.B, Shape::keys);
      if (!error)
        error = map_of(&a.out, p.dtype, t.out, p.out_strides, p.E, p.L, p.H, p.B, Shape::warpgroup_queries);
      if (error) return error;
      a.lse = static_cast<float*>(t.lse), a.key_lengths = p.with_key_lengths ? t.key_lengths : nullptr;
      a.B = int(p.B), a.H = int(p.H), a.L = int(p.L), a.S = int(p.S), a.group = int(p.group());
      a.scale_log2 = float(p.scale * log2_e), a.reach = reach_of(p);
      a.tiles = int(ceil_divide(p.L, Shape::queries));
      const int64_t bytes_of_head = p.S * (p.D + p.E) * 2 / p.group();
      a.heads_together =
          int(std::clamp<int64_t>(bytes_together / std::max<int64_t>(bytes_of_head, 1), 1, p.B * p.H));
      const int64_t items = p.B * p.H * a.tiles;
      LaunchConfig config;
      config.grid = dim3(unsigned(std::min(items, resident_blocks))), config.block = dim3(Shape::threads);
      config.dynamic_shared_bytes = Shape::shared_bytes, config.stream = stream;
      return launch(config, attention_forward_wgmma<T, Shape::channels>, a, int(items));
    });
  });
}

}  // namespace

extern const AttentionCudaKernel attention_forward_sm90a;
const AttentionCudaKernel attention_forward_sm90a = {"tensor_core_sm90a", 90,     90, refuses,
                                                     no_workspace,        forward};

}  // namespace pyseqnet
