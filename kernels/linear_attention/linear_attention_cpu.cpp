// Linear attention on the CPU, forward and backward, in chunks of 64 rows.
//
// Causal: within a chunk the product is a lower triangular matrix A = tril(a f^T), between chunks the running
// state S (and z). Forward is one sweep that leaves the state of every chunk's start; with them backward is
// one reverse sweep that carries R, the sum of a dn^T over later queries. Products of a chunk (64 x 64 x head
// size): 4 forward, 9 backward, of which the triangular ones cost little more than half.
// Not causal: S is the sum over all keys, then each query reads it: 2 products forward, 4 backward.
//
// Work items are heads. Where heads are few, a head's rows are cut into segments: their sums first, then the
// state at each segment's start, then the segments side by side (causal: one product more, 5 instead of 4 and
// 10 instead of 9). How many segments depends on the problem alone, so results are the same for any number of
// threads.
//
// Bound: the products run from the first two cache levels at the machine's multiply-add peak; loading,
// feature maps, transposes and stores take a fifth on top at D = 64.
//
// Efficient attention (the map softmax) reads the keys twice more, for the largest and the sum of exponentials
// of each feature; a segment has its own, and the states are weighed when they are put together.
//
// Decay scales rows and states by powers of g between the products; its table is made for each head.
//
// A single position (decoding) is not a chunk: the state is read, updated, used and written in one pass,
// bound by memory.
#include "linear_attention/linear_attention_head.h"

namespace pyseqnet {
inline namespace PYSEQNET_ISA {
namespace {

// ---------------------------------------------------------------- how a head is cut

struct Segments {
  int64_t count, rows;
};
Segments segments_of(const Problem& p, int64_t rows) {
  // Heads of which there are fewer do not keep eight threads busy; a causal head pays a fifth for being cut.
  constexpr int64_t enough_heads = 8, fewest_chunks = 8;
  const int64_t chunks = ceil_div(rows, chunk), heads = larger(1, p.heads());
  const int64_t count =
      heads >= enough_heads ? 1 : larger(1, smaller(ceil_div(enough_heads, heads), chunks / fewest_chunks));
  const int64_t chunks_each = larger(1, ceil_div(chunks, count));
  return {larger(1, ceil_div(chunks, chunks_each)), chunks_each * chunk};
}
struct Cut {
  Segments queries, keys;
  explicit Cut(const Problem& p) : queries(segments_of(p, p.L)), keys(segments_of(p, p.S)) {}
  // Whether one item does a whole head, from its rows to its results.
  bool whole() const { return queries.count == 1 && keys.count == 1; }
};

enum Step { sums = 0, combine = 1, results = 2 };

// ---------------------------------------------------------------- plans

Refusal refuses(const Problem& p) {
  if (p.dtype == DType::f64) return "float64 is served by the reference";
  return accepted;
}

WorkPlan plan_pass(const Problem& p, const Segments& first, const Segments& last, int64_t products,
                   bool backward) {
  // About 20 microseconds at the speed of these kernels.
  constexpr int64_t grain_products = 1000 * 1000;
  const Cut cut(p);
  const int64_t rows = larger(larger(p.L, p.S), 1), width = p.D * p.E + 64 * (p.D + p.E);
  const auto grain = [&](int64_t work) { return larger(1, grain_products / larger(1, work)); };
  WorkPlan plan;
  plan.add_phase(cut.whole() ? 0 : p.heads() * first.count, grain(smaller(first.rows, rows) * width));
  plan.add_phase(cut.whole() ? 0 : p.heads(), grain(first.count * width));
  plan.add_phase(p.heads() * last.count, grain(smaller(last.rows, rows) * width * products));
  plan.thread_bytes = scratch_bytes(p, backward);
  if (!cut.whole()) plan.shared_bytes = align_up(p.heads() * first.count * tile_state_size(p) * 4);
  return plan;
}
// Which segments each step walks over: sums over `first`, results over `last`.
WorkPlan plan_forward(const Problem& p) {
  const Cut cut(p);
  return plan_pass(p, cut.keys, cut.queries, p.causal ? 4 : 2, false);
}
WorkPlan plan_backward(const Problem& p) {
  const Cut cut(p);
  return plan_pass(p, cut.queries, cut.keys, p.causal ? 9 : 4, true);
}

// partial[0 .. count): causal, the sum before each in the order of the sweep, from `start`; else all of them
// in partial[0].
void combine_partials(const Head& head, const Segments& segments, bool reverse, float* partial,
                      float* start) {
  const Problem& p = head.p;
  const int64_t size = tile_state_size(p);
  for (int64_t n = 0; n < segments.count; n++) {
    const int64_t g = reverse ? segments.count - 1 - n : n;
    float* one = partial + g * size;
    const int64_t keys = head.valid_keys(g * segments.rows, segments.rows);
    const float faded = p.decayed ? float(integer_power(head.t.decay[head.h], keys)) : 1.0f;
    if (!p.causal) {
      add_vectors(size, one, start);
      continue;
    }
    for (int64_t x = 0; x < size; x += VL) {
      const vf before = load(start + x);
      store(start + x, before * faded + load(one + x));
      store(one + x, before);
    }
  }
  if (!p.causal) memcpy(partial, start, size_t(size) * sizeof(float));
}

// States of segments, each of keys weighed by exp(k - its log-sum), as one: in partial[0].
void combine_softmax(const Head& head, const Segments& segments, float* partial) {
  const Problem& p = head.p;
  const int64_t size = tile_state_size(p), width = padded(p.E);
  float* to = partial;
  for (int64_t d = 0; d < p.D; d++) {
    const auto log_sum = [&](int64_t g) { return normalizer_of(p, partial + g * size) + d; };
    float most = -HUGE_VALF, sum = 0;
    for (int64_t g = 0; g < segments.count; g++) most = *log_sum(g) > most ? *log_sum(g) : most;
    if (most == -HUGE_VALF) continue;  // no keys: zeros
    for (int64_t g = 0; g < segments.count; g++) sum += std::exp(*log_sum(g) - most);
    const float all = most + std::log(sum);
    for (int64_t g = 0; g < segments.count; g++) {
      const float weight = std::exp(*log_sum(g) - all);
      const float* from = partial + g * size + d * width;
      for (int64_t x = 0; x < width; x += VL)
        store(to + d * width + x, (g ? load(to + d * width + x) : vf{}) + load(from + x) * weight);
    }
    *log_sum(0) = all;
  }
}

void forward_item(const Problem& p, const Head& head, const Cut& cut, int step, int64_t g, float* partial) {
  const Tensors& t = head.t;
  float* s = head.m.state;
  const int64_t size = tile_state_size(p);
  if (step == sums) {
    clear(partial + g * size, size);
    return head.sum_keys(g * cut.keys.rows, smaller(head.rows.S, (g + 1) * cut.keys.rows),
                         partial + g * size);
  }
  const auto finish_state = [&](const float* state) {
    if (!p.causal && t.saved) write_state(p, state, head.saved(0), head.saved(0) + p.D * p.E);
    head.write(state, t.state, t.normalizer);
  };
  if (step == combine) {
    read_state(p, head.matrix(t.state0), head.vector(t.normalizer0), s);
    p.softmax() ? combine_softmax(head, cut.keys, partial)
                : combine_partials(head, cut.keys, false, partial, s);
    if (!p.causal) finish_state(partial);
    return;
  }
  const int64_t begin = g * cut.queries.rows, end = smaller(head.rows.L, begin + cut.queries.rows);
  if (cut.whole()) {
    if (is_single_position(p)) return head.single_position();
    read_state(p, head.matrix(t.state0), head.vector(t.normalizer0), s);
    if (!p.causal) head.sum_keys(0, head.rows.S, s), finish_state(s);
  } else if (p.causal) {
    memcpy(s, partial + g * size, size_t(size) * sizeof(float));
  } else {
    s = partial;
  }
  p.causal ? head.causal_sweep(begin, end, s) : head.read_outputs(begin, end, s);
  if (p.causal && g == cut.queries.count - 1) finish_state(s);
}

void backward_item(const Problem& p, const Head& head, const Cut& cut, int step, int64_t g, float* partial) {
  const Tensors& t = head.t;
  float* r = head.m.state;
  const int64_t size = tile_state_size(p);
  if (step == sums) {
    const int64_t begin = g * cut.queries.rows, end = smaller(head.rows.L, begin + cut.queries.rows);
    clear(partial + g * size, size);
    return p.causal ? head.sum_queries(begin, end, partial + g * size)
                    : head.query_gradients(begin, end, partial + g * size);
  }
  if (step == combine) {
    read_state(p, head.matrix(t.gstate), head.vector(t.gnormalizer), r);
    combine_partials(head, cut.queries, true, partial, r);
    if (!p.causal) head.write(partial, t.dstate0, t.dnormalizer0);
    if (p.softmax()) head.write_softmax_correction(partial);
    return;
  }
  const int64_t begin = g * cut.keys.rows, end = smaller(head.rows.S, begin + cut.keys.rows);
  if (cut.whole()) {
    read_state(p, head.matrix(t.gstate), head.vector(t.gnormalizer), r);
    if (!p.causal) head.query_gradients(0, head.rows.L, r), head.write(r, t.dstate0, t.dnormalizer0);
    if (p.softmax()) head.write_softmax_correction(r);
  } else if (p.causal) {
    memcpy(r, partial + g * size, size_t(size) * sizeof(float));
  } else {
    r = partial;
  }
  p.causal ? head.causal_gradient_sweep(begin, end, r) : head.key_gradients(begin, end, r);
  if (p.causal && g == 0) head.write(r, t.dstate0, t.dnormalizer0);
}

template <class Item>
PYSEQNET_INLINE void run_items(const Problem& p, const Tensors& t, const WorkSlice& slice, int64_t first,
                               int64_t last, bool backward, Item&& item) {
  const Cut cut(p);
  Carver carver(slice.scratch);
  const Scratch scratch(p, carver, backward);
  const int64_t per_head = slice.phase == sums ? first : slice.phase == combine ? 1 : last;
  float* partials = reinterpret_cast<float*>(slice.shared);
  for (int64_t k = slice.begin; k < slice.end; k++) {
    const int64_t index = k / per_head;
    Head head(p, t, scratch, index);
    if (backward && p.causal) head.ahead = -chunk;
    item(p, head, cut, slice.phase, k % per_head,
         cut.whole() ? nullptr : partials + index * first * tile_state_size(p));
  }
}
void run_forward(const Problem& p, const Tensors& t, const WorkSlice& slice) {
  const Cut cut(p);
  run_items(p, t, slice, cut.keys.count, cut.queries.count, false, forward_item);
}
void run_backward(const Problem& p, const Tensors& t, const WorkSlice& slice) {
  const Cut cut(p);
  run_items(p, t, slice, cut.queries.count, cut.keys.count, true, backward_item);
}

}  // namespace

extern const LinearAttentionCpuKernel linear_attention_forward, linear_attention_backward;
const LinearAttentionCpuKernel linear_attention_forward = {PYSEQNET_ISA_NAME, this_isa, refuses, plan_forward,
                                                           run_forward};
const LinearAttentionCpuKernel linear_attention_backward = {PYSEQNET_ISA_NAME, this_isa, refuses,
                                                            plan_backward, run_backward};

}  // namespace PYSEQNET_ISA
}  // namespace pyseqnet
