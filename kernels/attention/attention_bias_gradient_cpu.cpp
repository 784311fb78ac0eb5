// Softmax attention on the CPU: gradient of a bias; float32, bfloat16, float16.
// ISA: +avx512bf16
//
// A bias that many heads share needs the logit gradients of all of them: the two row products are computed again
// tile by tile and added up in the fixed order of heads; one item is a block of the bias's rows.
//
// Bound: FMA, 2 D + 2 E a visible pair.
#include "attention/attention_gradient_tile.h"

namespace pyseqnet {
inline namespace PYSEQNET_ISA {
namespace {

struct BiasItem {
  int64_t mb, mh, i0, i1;  // of the bias's batch and head; the queries that it reads
};
int64_t bias_blocks(const AttentionProblem& p) {
  return p.bias_L == 1 ? 1 : (p.L + block_rows(p) - 1) / block_rows(p);
}
BiasItem bias_item_of(const AttentionProblem& p, int64_t k) {
  const int64_t blocks = bias_blocks(p), head = k / blocks, i0 = k % blocks * block_rows(p);
  return {head / p.bias_H, head % p.bias_H, i0, p.bias_L == 1 ? p.L : smaller(i0 + block_rows(p), p.L)};
}

struct BiasScratch {
  KeyTile tile;
  QueryBlock block;
  float* sums;  // [rows of the bias][round_up(S, KEYS)]
  BiasScratch(Carver& carve, const AttentionProblem& p)
      : tile(carve, p),
        block(carve, p),
        sums(carve.take<float>((p.bias_L == 1 ? 1 : smaller(p.L, block_rows(p))) * round_up(p.S, KEYS))) {}
};

template <class T>
void add_bias_gradients(const AttentionProblem& p, const AttentionTensors& t, const Dropout& dropout,
                        const AttentionSequence& at, const Pair& pair, const BiasScratch& s, int64_t row) {
  const int64_t row_length = round_up(p.S, KEYS), columns = round_up(pair.keys, VL);
  pack_query_block<T>(p, t, at, pair.h, pair.i0, pair.n, s.block);
  for (int64_t r0 = 0; r0 < pair.n; r0 += ROWS) {
    const int64_t rows = smaller(ROWS, pair.n - r0);
    if (gradient_tile<T>(p, t, dropout, at, pair, r0, rows, s.tile, s.block, true).width == 0) continue;
    for (int64_t r = r0; r < r0 + rows; ++r) {
      float* sums = s.sums + (p.bias_L == 1 ? 0 : (row + r) * row_length) + pair.j0;
      for (int64_t c = 0; c < columns; c += VL)
        store(sums + c, load(sums + c) + load(s.block.gradients + r * KEYS + c));
    }
  }
}

// Adds what head h of a batch entry says about the rows of an item.
template <class T>
void add_head(const AttentionProblem& p, const AttentionTensors& t, const Dropout& dropout,
              const BiasItem& item, const AttentionSequence& at, int64_t h, const BiasScratch& s) {
  const int64_t i1 = smaller(item.i1, at.L), step = block_rows(p);
  if (i1 <= item.i0) return;
  const int64_t seen = visible_to(p, at, i1 - 1);
  const auto meet = [&](int64_t i0, int64_t j0, int64_t keys, const uint64_t* bits) {
    add_bias_gradients<T>(p, t, dropout, at, {h, i0, smaller(step, i1 - i0), j0, keys, bits}, s,
                          i0 - item.i0);
  };
  if (!p.with_blocks) {
    for (int64_t j0 = 0; j0 < seen; j0 += KEYS) {
      const int64_t keys = smaller(KEYS, seen - j0);
      pack_key_tile<T>(p, t, at, h / p.group(), j0, keys, s.tile);
      for (int64_t i0 = item.i0; i0 < i1; i0 += step) meet(i0, j0, keys, nullptr);
    }
    return;
  }
  for (int64_t i0 = item.i0; i0 < i1; i0 += step) {
    const int64_t row = block_row(p, h, i0);
    for (int32_t e = t.blocks.row_begin[row]; e < t.blocks.row_begin[row + 1]; ++e) {
      const AttentionBlockEntry entry = t.blocks.row_entries[e];
      const int64_t j0 = entry.tile * block_tile, keys = smaller(block_tile, seen - j0);
      if (keys <= 0) break;
      pack_key_tile<T>(p, t, at, h / p.group(), j0, keys, s.tile);
      meet(i0, j0, keys, bits_of(t, entry));
    }
  }
}

template <class M>
void write_bias_gradient(const AttentionProblem& p, const AttentionTensors& t, const BiasItem& at,
                         const BiasScratch& s) {
  const int64_t columns = round_up(p.S, KEYS), rows = p.bias_L == 1 ? 1 : at.i1 - at.i0;
  M* gbias = static_cast<M*>(t.gbias) +
             ((at.mb * p.bias_H + at.mh) * p.bias_L + (p.bias_L == 1 ? 0 : at.i0)) * p.bias_S;
  for (int64_t r = 0; r < rows; ++r, gbias += p.bias_S) {
    const float* sums = s.sums + r * columns;
    if (p.bias_S == 1) {
      vf sum = {};
      for (int64_t c = 0; c < columns; c += VL) sum += load(sums + c);
      round_to(gbias[0], hsum(sum));
    } else {
      for (int64_t c = 0; c < p.S; c += VL) store_lanes_n(gbias + c, load(sums + c), p.S - c);
    }
  }
}

WorkPlan plan_bias_gradient(const AttentionProblem& p) {
  WorkPlan plan;
  plan.add_phase(p.bias_L > 0 ? p.bias_B * p.bias_H * bias_blocks(p) : 0);
  Carver carve(nullptr);
  BiasScratch(carve, p);
  plan.thread_bytes = carve.used();
  return plan;
}

void run_bias_gradient(const AttentionProblem& p, const AttentionTensors& t, const WorkSlice& slice) {
  FlushDenormals guard;
  Carver carve(slice.scratch);
  const BiasScratch s(carve, p);
  const Dropout dropout(p, t);
  with_factor_element(p.dtype, [&](auto tag) {
    using T = decltype(tag);
    for (int64_t k = slice.begin; k < slice.end; ++k) {
      const BiasItem at = bias_item_of(p, k);
      const int64_t rows = p.bias_L == 1 ? 1 : at.i1 - at.i0;
      memset(s.sums, 0, size_t(rows * round_up(p.S, KEYS)) * sizeof(float));
      for (int64_t b = at.mb; b < (p.bias_B == 1 ? p.B : at.mb + 1); ++b)
        for (int64_t h = at.mh; h < (p.bias_H == 1 ? p.H : at.mh + 1); ++h)
          add_head<T>(p, t, dropout, at, sequence_of(p, t, b), h, s);
      if (p.bias_dtype == DType::f32)
        write_bias_gradient<float>(p, t, at, s);
      else
        write_bias_gradient<T>(p, t, at, s);
    }
  });
}

Refusal refuses(const AttentionProblem& p) { return refuses_factors(p.dtype); }

}  // namespace

extern const AttentionCpuKernel attention_tile_bias_gradient;
const AttentionCpuKernel attention_tile_bias_gradient = {"tile_" PYSEQNET_ISA_NAME, this_isa, refuses,
                                                         plan_bias_gradient, run_bias_gradient};

}  // namespace PYSEQNET_ISA
}  // namespace pyseqnet
