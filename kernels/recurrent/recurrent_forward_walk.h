// Time and sequences in the CPU kernels' forward pass: what surrounds their products and cells.
//
// A kernel is a struct of names that plan_forward() and run_forward() take:
//   Sizes(p)               a ForwardSizes, with packing_items(p)
//   Shared(carver, p, z)   what all threads read; has the `schedule`
//   Scratch(carver, p, z)  a thread's: a ForwardScratch
//   pack(...)              one item of phase 0; item 0 makes the schedule
//   Walk                   a ForwardWalk, with input_part(q, rows): the slots of `rows` rows of x, and
//                          step(q, s, n, row): the first n sequences from at.h to at.h_next, slots from `row` on
#pragma once
#include "recurrent/recurrent_products.h"
#include "recurrent/recurrent_schedule.h"

namespace pyseqnet {
inline namespace PYSEQNET_ISA {
namespace recurrent {

// Sizes that plan() and run() agree on.
struct ForwardSizes {
  int64_t slots;  // elements of a row of slots
  int64_t chunk;  // rows of slots made by one product, before the step that exceeds it
  int64_t batch;

  ForwardSizes(const RecurrentProblem& p, int64_t slots) : slots(slots), batch(Batch::batch_bound(p)) {
    constexpr int64_t chunk_floats = 1 << 18, longest_chunk = 384;  // half of a second-level cache
    chunk = chunk_floats / (slots + 1) + 1;
    chunk = chunk < longest_chunk ? chunk : longest_chunk;
  }
  int64_t rows() const { return chunk + batch; }
};

struct ForwardScratch {
  Batch batch;
  float *h, *h_next, *c, *y, *slots, *x;
  float* h_words;  // h as products read it
  const float **x_rows, **a_rows;
  float **slot_rows, **to_rows;

  ForwardScratch(Carver& scratch, const RecurrentProblem& p, const ForwardSizes& z)
      : batch(Batch::carve(scratch, p)) {
    h = scratch.take<float>(z.batch * p.R()), h_next = scratch.take<float>(z.batch * p.R());
    h_words = pairs ? scratch.take<float>(z.batch * words(p.R())) : nullptr;
    c = scratch.take<float>(p.has_cell() ? z.batch * p.H : 0);
    y = scratch.take<float>(p.is_jordan() ? z.batch * p.P : 0);
    slots = scratch.take<float>(p.reserve && p.saved() ? 0 : z.rows() * z.slots);
    x = scratch.take<float>(p.dtype == DType::f32 ? 0 : z.rows() * p.I);
    x_rows = scratch.take<const float*>(z.rows()), slot_rows = scratch.take<float*>(z.rows());
    a_rows = scratch.take<const float*>(z.batch), to_rows = scratch.take<float*>(z.batch);
  }
};

struct ForwardWalk {
  const RecurrentProblem& p;
  const RecurrentTensors& t;
  const ForwardSizes& z;
  ForwardScratch& at;

  int64_t row_at(const Batch& q, int64_t k, int64_t s) const {
    const int64_t b = q.sequence[k];
    return q.d * p.rows() + p.row(p.step(s, b, q.d), b);
  }
  // Where rows of the slots and of x lie for step s.
  void place_rows(const Batch& q, int64_t s, int64_t n, int64_t first) const {
    float* reserve = p.reserve && p.saved() ? static_cast<float*>(t.gates) : nullptr;
    for (int64_t k = 0; k < n; k++) {
      const int64_t b = q.sequence[k], row = first + k;
      at.x_rows[row] = word_row(p.dtype, t.x, p.x_at(p.step(s, b, q.d), b), p.I, at.x + row * p.I);
      at.slot_rows[row] = reserve ? reserve + row_at(q, k, s) * z.slots : at.slots + row * z.slots;
    }
  }
  // The state of sequence k as the next step's product reads it.
  void round_state(int64_t k) const {
    if (!pairs) return;
    const int64_t R = p.R();
    bfloat16* row = reinterpret_cast<bfloat16*>(at.h_words + k * words(R));
    store_row(DType::bf16, at.h + k * R, row, 0, R);
    if (R % 2) row[R] = {};
  }
  void store_final(const Batch& q, int64_t k) const {
    const int64_t state = q.d * p.B + q.sequence[k];
    store_row(p.dtype, at.h + k * p.R(), t.h_n, state * p.R(), p.R());
    if (p.has_cell()) store_row(p.dtype, at.c + k * p.H, t.c_n, state * p.H, p.H);
  }
  void begin(const Batch& q) const {
    const int64_t R = p.R();
    for (int64_t k = 0; k < q.n; k++) {
      const int64_t b = q.sequence[k], state = q.d * p.B + b;
      load_row(p.dtype, t.h0, state * R, R, at.h + k * R);
      if (p.has_cell()) load_row(p.dtype, t.c0, state * p.H, p.H, at.c + k * p.H);
      round_state(k);
      if (q.length[k] == 0) store_final(q, k);
      for (int64_t step = q.length[k]; !p.packed() && step < p.T; step++)
        zero_row(p.dtype, t.y, p.y_at(step, b) + q.d * R, R);
    }
  }
  // Results of step s; at.h is the new state.
  void store_step(const Batch& q, int64_t s, int64_t n) const {
    const int64_t R = p.R(), width = p.cell_width();
    for (int64_t k = 0; k < n; k++) {
      const int64_t b = q.sequence[k];
      const float* output = (p.is_jordan() ? at.y : at.h) + k * R;
      store_row(p.dtype, output, t.y, p.y_at(p.step(s, b, q.d), b) + q.d * R, R);
      if (width && p.reserve)
        memcpy(static_cast<float*>(t.cells) + row_at(q, k, s) * width,
               (p.is_jordan() ? at.h : at.c) + k * width, size_t(width) * sizeof(float));
      round_state(k);
      if (q.length[k] == s + 1) store_final(q, k);
    }
  }
};

// All steps of a batch of sequences.
template <class Walk>
void walk_through_time(const Walk& walk, const Batch& q) {
  ForwardScratch& at = walk.at;
  walk.begin(q);
  int64_t ahead = q.n, n = q.n;
  for (int64_t s = 0; s < q.steps();) {
    int64_t rows = 0, end = s;
    for (; end < q.steps() && rows < walk.z.chunk; end++) {
      ahead = q.active(end, ahead);
      walk.place_rows(q, end, ahead, rows);
      rows += ahead;
    }
    walk.input_part(q, rows);
    for (int64_t row = 0; s < end; s++, row += n) {
      n = q.active(s, n);
      walk.step(q, s, n, row);
      float* spare = at.h;
      at.h = at.h_next, at.h_next = spare;
      walk.store_step(q, s, n);
    }
  }
}

inline int64_t packing_floats(const RecurrentProblem& p) {
  const int64_t longest = p.I > p.R() ? p.I : p.R();
  return VL * (longest > p.H ? longest : p.H);
}
template <class Kernel>
WorkPlan plan_forward(const RecurrentProblem& p) {
  constexpr int64_t elements_worth_a_thread = 20000;
  const typename Kernel::Sizes z(p);
  WorkPlan plan;
  plan.add_phase(z.packing_items(p), 1 + elements_worth_a_thread / (4 * VL * (p.I + p.R() + 1)));
  plan.add_phase(p.D * p.B, sequence_grain(p));
  Carver shared(nullptr), scratch(nullptr), packing(nullptr);
  typename Kernel::Shared(shared, p, z);
  typename Kernel::Scratch(scratch, p, z);
  packing.take<float>(packing_floats(p));
  plan.shared_bytes = shared.used();
  plan.thread_bytes = scratch.used() > packing.used() ? scratch.used() : packing.used();
  return plan;
}
template <class Kernel>
void run_forward(const RecurrentProblem& p, const RecurrentTensors& t, const WorkSlice& slice) {
  const FlushSmall guard(p.dtype);
  const typename Kernel::Sizes z(p);
  Carver shared_memory(slice.shared), scratch_memory(slice.scratch);
  const typename Kernel::Shared shared(shared_memory, p, z);
  if (slice.phase == 0) {
    float* copy = scratch_memory.take<float>(packing_floats(p));
    for (int64_t item = slice.begin; item < slice.end; item++) Kernel::pack(p, t, z, item, shared, copy);
    return;
  }
  typename Kernel::Scratch scratch(scratch_memory, p, z);
  const typename Kernel::Walk walk{{p, t, z, scratch}, z, shared, scratch};
  for_batches(p, shared.schedule, slice.begin, slice.end, scratch.batch,
              [&](const Batch& q) { walk_through_time(walk, q); });
}

}  // namespace recurrent
}  // namespace PYSEQNET_ISA
}  // namespace pyseqnet
