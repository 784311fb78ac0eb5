// Recurrent layers on the CPU, forward.
// ISA: +avx512bf16
//
// Weights are packed once a call with the rows of the gates interleaved by vector: one register tile of the
// recurrent product holds every gate of VL units, and the cell is the product's epilogue; its sums never
// leave registers. The input's part of several steps is one product into rows of slots (the reserve itself
// where it is kept, else scratch), and the step turns these into what backward needs. States stay in a small
// float scratch, doubled for h, so a step reads nothing that another row of it writes.
//
// Sequences run in lockstep, longest first, so that those of a step are a prefix: padding costs nothing, and
// packed, padded and reversed data differ in addresses only. Items are single sequences; a range of them is
// one batch. That is what two threads share, and a row's result does not depend on the rows beside it.
//
// Where there are few rows in all (a single step of a decoder), packing would cost more than the products:
// both factors are then read where they lie (recurrent_few_rows.h).
//
// Bound: FMA throughput, 2 * rows * G * H * (I + R) in all; the recurrent weights stream from the second or
// third level once a step. The cell costs about 100 cycles for VL units and step.
#include "recurrent/recurrent_few_rows.h"
#include "recurrent/recurrent_forward_walk.h"

namespace pyseqnet {
inline namespace PYSEQNET_ISA {
namespace recurrent {
namespace {

// How the units of a gated cell lie in a register tile: its gates side by side, VL units.
template <class CellT, int vectors>
struct Tiling {
  using Cell = CellT;
  static constexpr int NV = vectors, NR = vectors * VL, slots = CellT::facts.slots;
  static constexpr bool keeps_recurrent_part = vectors < slots;  // GRU: q is a slot of its own
};
using LstmTiling = Tiling<LstmCell<LaneMath>, 4>;
using GruTiling = Tiling<GruCell<LaneMath>, 3>;

constexpr int most_slots = 4;

struct Sizes : ForwardSizes {
  bool gated;
  bool few;        // weights are read where they lie
  bool in_one_go;  // and a step makes both parts of the sums
  int64_t NR, panels, projection_panels;

  explicit Sizes(const RecurrentProblem& p) : ForwardSizes(p, (p.saved() > 0 ? p.saved() : 1) * p.H) {
    gated = p.saved() > 0;
    few = p.T * p.B <= few_rows && !p.P && !(pairs && (p.I % 2 || p.H % 2));
    in_one_go = p.T == 1;
    NR = (p.cell == RecurrentCell::gru ? 3 : 4) * VL;
    const int64_t units = gated ? VL : NR;
    panels = (p.H + units - 1) / units;
    projection_panels = (p.P + 4 * VL - 1) / (4 * VL);
  }
  int64_t packing_items(const RecurrentProblem& p) const { return 1 + p.D * (panels + projection_panels); }
};

// Shared by all threads.
struct Shared {
  Schedule schedule;
  float *w_ih[max_directions], *w_hh[max_directions], *w_hr[max_directions], *bias[max_directions];

  Shared(Carver& shared, const RecurrentProblem& p, const Sizes& z) : schedule(Schedule::carve(shared, p)) {
    for (int64_t d = 0; d < p.D; d++) {
      w_ih[d] = shared.take<float>(z.few ? 0 : z.panels * z.NR * words(p.I));
      w_hh[d] = shared.take<float>(z.few ? 0 : z.panels * z.NR * words(p.R()));
      w_hr[d] = shared.take<float>(z.projection_panels * 4 * VL * p.H);
      bias[d] = shared.take<float>(z.panels * most_slots * VL);
    }
  }
};

struct Scratch : ForwardScratch {
  float* m;  // what h is a projection of

  Scratch(Carver& scratch, const RecurrentProblem& p, const Sizes& z) : ForwardScratch(scratch, p, z) {
    m = scratch.take<float>(p.P ? z.batch * p.H : 0);
  }
};

// ---- Phase 0: packing. Items: the schedule, then the panels of each direction. ----

// One panel of w_ih and w_hh with its biases. A slot's bias is added once: by the input's part, or, for a sum
// of the recurrent part alone, by the step.
void pack_panel(const RecurrentProblem& p, const RecurrentWeights& w, const Sizes& z, int64_t panel,
                int64_t d, const Shared& shared, float* copy) {
  const int64_t R = p.R(), vectors = z.NR / VL;
  float* bias = shared.bias[d] + panel * most_slots * VL;
  memset(bias, 0, most_slots * VL * sizeof(float));
  for (int64_t v = 0; v < vectors; v++) {
    const int64_t u = z.gated ? panel * VL : panel * z.NR + v * VL, first = (z.gated ? v * p.H : 0) + u;
    const int n = int(u >= p.H ? 0 : p.H - u < VL ? p.H - u : VL);
    const auto row = [&](int j) { return first + j; };
    if (!z.few) {
      pack_columns(p.dtype, w.w_ih, p.I, n, row, shared.w_ih[d] + panel * z.NR * words(p.I) + v * VL, z.NR,
                   copy);
      pack_columns(p.dtype, w.w_hh, R, n, row, shared.w_hh[d] + panel * z.NR * words(R) + v * VL, z.NR, copy);
    }
    if (!w.b_ih || n == 0) continue;
    const bool apart = p.cell == RecurrentCell::gru && v == 2;
    float* of_x = bias + v * VL;
    float* of_h = apart ? bias + 3 * VL : of_x;
    float value[VL];
    add_row(p.dtype, w.b_ih, first, n, of_x);
    load_row(p.dtype, w.b_hh, first, n, value);
    add_row(DType::f32, value, 0, n, of_h);
  }
}
void pack_projection(const RecurrentProblem& p, const RecurrentWeights& w, int64_t panel, float* to,
                     float* copy) {
  for (int v = 0; v < 4; v++) {
    const int64_t first = (panel * 4 + v) * VL;
    const int n = int(first >= p.P ? 0 : p.P - first < VL ? p.P - first : VL);
    pack_columns(
        p.dtype, w.w_hr, p.H, n, [&](int j) { return first + j; }, to + panel * 4 * VL * p.H + v * VL, 4 * VL,
        copy);
  }
}
void pack_item(const RecurrentProblem& p, const RecurrentTensors& t, const Sizes& z, int64_t item,
               const Shared& shared, float* copy) {
  if (item == 0) return shared.schedule.make(p);
  const int64_t each = z.panels + z.projection_panels, d = (item - 1) / each, panel = (item - 1) % each;
  if (panel < z.panels)
    pack_panel(p, t.weights[d], z, panel, d, shared, copy);
  else
    pack_projection(p, t.weights[d], panel - z.panels, shared.w_hr[d], copy);
}

// ---- Phase 1: sequences. ----

PYSEQNET_INLINE int lanes(int64_t left) { return left < VL ? int(left) : VL; }

// All that the products of a step read and write, without the sequences' addresses.
struct StepRows {
  int64_t H, depth;  // depth: words of h
  const float *w, *bias;
  float* const* slots;
  const float *h, *h_words;
  float *to, *c;  // new h, or what it is a projection of; c in place
  bool keep;      // whether slots are left for backward
};

// Gated cells: all sums of VL units meet in one register tile.
template <class Tile>
struct Gated {
  using Cell = typename Tile::Cell;
  static constexpr int NV = Tile::NV;

  // Slots of `rows` rows: the input's part with its biases.
  __attribute__((noinline)) static void input_part(const StepRows& at, int64_t rows, int64_t units, int64_t I,
                                                   const float* const* x_rows, const float* w) {
    const int64_t H = at.H;
    float* const* slots = at.slots;
    const float* bias = at.bias;
    product_of_rows<NV>(
        rows, units * NV, words(I), [&](int64_t i) { return x_rows[i]; }, w,
        [&](auto R, auto, int64_t i, int64_t j, int64_t, auto& acc) PYSEQNET_LAMBDA {
          const int64_t u = j / NV;
          const float* b = bias + u * most_slots;
          const int n = lanes(H - u);
#pragma GCC unroll 8
          for (int r = 0; r < R.value; ++r) {
            float* slot = slots[i + r] + u;
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) store_n(slot + v * H, acc[r][v] + load(b + v * VL), n);
          }
        });
  }

  // The cell of VL units of one sequence; `full`: all of them exist.
  template <bool full>
  PYSEQNET_INLINE static void units_of_row(const StepRows& at, const vf (&sum)[NV], vf bias_of_recurrent_part,
                                           int64_t row, int64_t u, int n) {
    const auto get = [&](const float* p) PYSEQNET_LAMBDA { return full ? load(p) : load_n(p, n); };
    const auto put = [&](float* p, vf x) PYSEQNET_LAMBDA { full ? store(p, x) : store_n(p, x, n); };
    float* slot = at.slots[row] + u;
    const int64_t unit = row * at.H + u;
    vf s[Tile::slots];
    CellState<vf> previous{};
    constexpr int common = Tile::keeps_recurrent_part ? NV - 1 : NV;
#pragma GCC unroll 4
    for (int v = 0; v < common; ++v) s[v] = sum[v] + get(slot + v * at.H);
    if constexpr (Tile::keeps_recurrent_part) {
      s[NV - 1] = get(slot + (NV - 1) * at.H);
      s[NV] = sum[NV - 1] + bias_of_recurrent_part;
      previous.h = get(at.h + unit);
    }
    if constexpr (Cell::facts.has_cell) previous.c = get(at.c + unit);
    const CellState<vf> next = Cell::forward(s, previous);
    if (at.keep)
#pragma GCC unroll 4
      for (int v = 0; v < Tile::slots; ++v) put(slot + v * at.H, s[v]);
    if constexpr (Cell::facts.has_cell) put(at.c + unit, next.c);
    put(at.to + unit, next.h);
  }
  // Out of line: the last units of a row must not be compiled once for each height of a tile.
  __attribute__((noinline)) static void last_units_of_row(const StepRows& at, const float* sums,
                                                          vf bias_of_recurrent_part, int64_t row, int64_t u,
                                                          int n) {
    vf sum[NV];
    for (int v = 0; v < NV; ++v) sum[v] = load(sums + v * VL);
    units_of_row<false>(at, sum, bias_of_recurrent_part, row, u, n);
  }

  // One step of the first n sequences: recurrent part and cell.
  __attribute__((noinline)) static void step(const StepRows at, int64_t n, int64_t units) {
    product_of_rows<NV>(
        n, units * NV, at.depth, [&](int64_t i) { return at.h_words + i * at.depth; }, at.w,
        [&](auto R, auto, int64_t i, int64_t j, int64_t, auto& acc) PYSEQNET_LAMBDA {
          const int64_t u = j / NV;
          const vf bias = load(at.bias + u * most_slots + 3 * VL);
          if (at.H - u >= VL)
#pragma GCC unroll 8
            for (int r = 0; r < R.value; ++r) units_of_row<true>(at, acc[r], bias, i + r, u, VL);
          else
#pragma GCC unroll 8
            for (int r = 0; r < R.value; ++r) {
              float sums[NV * VL];
#pragma GCC unroll 4
              for (int v = 0; v < NV; ++v) store(sums + v * VL, acc[r][v]);
              last_units_of_row(at, sums, bias, i + r, u, int(at.H - u));
            }
        });
  }
};

// Elman's cell has one sum a unit: a tile is 4 * VL units, and the input's part a plain product.
struct Plain {
  static void input_part(const StepRows& at, int64_t rows, int64_t, int64_t I, const float* const* x_rows,
                         const float* w) {
    multiply_rows(rows, at.H, words(I), x_rows, w, at.slots, false);
  }
  __attribute__((noinline)) static void step(const StepRows at, int64_t n, bool relu) {
    product_of_rows<4>(
        n, at.H, at.depth, [&](int64_t i) { return at.h_words + i * at.depth; }, at.w,
        [&](auto R, auto, int64_t i, int64_t j, int64_t columns, auto& acc) PYSEQNET_LAMBDA {
          const CellState<vf> none{};
#pragma GCC unroll 8
          for (int r = 0; r < R.value; ++r)
#pragma GCC unroll 4
            for (int v = 0; v < 4; ++v) {
              if (columns <= v * VL) break;
              const int64_t u = j + v * VL;
              const int n = lanes(columns - v * VL);
              vf s[1] = {acc[r][v] + load(at.bias + u) + load_n(at.slots[i + r] + u, n)};
              const vf h = relu ? ReluCell<LaneMath>::forward(s, none, {}).h
                                : TanhCell<LaneMath>::forward(s, none, {}).h;
              store_n(at.to + (i + r) * at.H + u, h, n);
            }
        });
  }
};

// Few rows, weights where they lie. The input's part is made for all steps at once, so that w_ih is read once; a
// single step makes both parts in one go.
template <class T>
void input_part_of_few(const RecurrentProblem& p, const RecurrentWeights& w, int64_t rows,
                       const float* const* x_rows, float* const* slots) {
  const Term<T> of_x{x_rows, static_cast<const T*>(w.w_ih), words(p.I)};
  dot_rows(&of_x, 1, rows, p.gates() * p.H, slots);
}
template <class T>
void sums_of_few(const RecurrentProblem& p, const RecurrentWeights& w, const StepRows& at, int64_t n,
                 const float* const* x_rows, const float* const* h_rows, float** to, bool has_input_part) {
  const int64_t H = at.H, I = words(p.I), R = at.depth,
                common = (p.cell == RecurrentCell::gru ? 2 : p.gates()) * H;
  const T *w_ih = static_cast<const T*>(w.w_ih), *w_hh = static_cast<const T*>(w.w_hh);
  const Term<T> both[] = {{x_rows, w_ih, I}, {h_rows, w_hh, R}};
  if (has_input_part)
    dot_rows(both + 1, 1, n, common, at.slots, true);
  else
    dot_rows(both, 2, n, common, at.slots);
  if (p.cell != RecurrentCell::gru) return;
  const Term<T> of_x{x_rows, w_ih + 2 * H * I, I}, of_h{h_rows, w_hh + 2 * H * R, R};
  for (int64_t k = 0; k < n; k++) to[k] = at.slots[k] + 2 * H;
  if (!has_input_part) dot_rows(&of_x, 1, n, H, to);
  for (int64_t k = 0; k < n; k++) to[k] = at.slots[k] + 3 * H;
  dot_rows(&of_h, 1, n, H, to);
}
void cells_of_few(const RecurrentProblem& p, const StepRows& at, int64_t n) {
  for (int64_t row = 0; row < n; row++)
    for (int64_t u = 0; u < at.H; u += VL) {
      const int n = lanes(at.H - u);
      const float* bias = at.bias + u * most_slots;
      float* slot = at.slots[row] + u;
      if (p.cell == RecurrentCell::lstm) {
        Gated<LstmTiling>::last_units_of_row(at, bias, vf{}, row, u, n);
      } else if (p.cell == RecurrentCell::gru) {
        float sums[3 * VL];
        store(sums, load(bias)), store(sums + VL, load(bias + VL));
        store(sums + 2 * VL, load_n(slot + 3 * at.H, n));
        store_n(slot + 2 * at.H, load_n(slot + 2 * at.H, n) + load(bias + 2 * VL), n);
        Gated<GruTiling>::last_units_of_row(at, sums, load(bias + 3 * VL), row, u, n);
      } else {
        vf s[1] = {load_n(slot, n) + load(at.bias + u)};
        const CellState<vf> none{};
        store_n(at.to + row * at.H + u,
                p.cell == RecurrentCell::rnn_relu ? ReluCell<LaneMath>::forward(s, none, {}).h
                                                  : TanhCell<LaneMath>::forward(s, none, {}).h,
                n);
      }
    }
}

struct Forward : ForwardWalk {
  const Sizes& z;
  const Shared& shared;
  Scratch& at;

  StepRows rows_of(int64_t d, float* const* slots) const {
    return {p.H,
            words(p.R()),
            shared.w_hh[d],
            shared.bias[d],
            slots,
            at.h,
            pairs ? at.h_words : at.h,
            p.P ? at.m : at.h_next,
            at.c,
            p.reserve};
  }
  void input_part(const Batch& q, int64_t rows) const {
    if (z.few) {
      if (!z.in_one_go)
        with_weight_type([&](auto type) {
          input_part_of_few<decltype(type)>(p, t.weights[q.d], rows, at.x_rows, at.slot_rows);
        });
      return;
    }
    const StepRows step = rows_of(q.d, at.slot_rows);
    const int64_t units = z.panels * VL;
    switch (p.cell) {
      case RecurrentCell::lstm:
        return Gated<LstmTiling>::input_part(step, rows, units, p.I, at.x_rows, shared.w_ih[q.d]);
      case RecurrentCell::gru:
        return Gated<GruTiling>::input_part(step, rows, units, p.I, at.x_rows, shared.w_ih[q.d]);
      default:
        return Plain::input_part(step, rows, units, p.I, at.x_rows, shared.w_ih[q.d]);
    }
  }
  // h -> h_next (m where h is a projection of it).
  void recurrent_part(const StepRows& step, int64_t n) const {
    switch (p.cell) {
      case RecurrentCell::lstm:
        return Gated<LstmTiling>::step(step, n, z.panels * VL);
      case RecurrentCell::gru:
        return Gated<GruTiling>::step(step, n, z.panels * VL);
      default:
        return Plain::step(step, n, p.cell == RecurrentCell::rnn_relu);
    }
  }
  // f(T{}): weights as products of few rows read them.
  template <class F>
  void with_weight_type(F&& f) const {
    if (p.dtype == DType::f32 || pairs)
      f(float{});
    else if (p.dtype == DType::bf16)
      f(bfloat16{});
    else
      f(float16{});
  }
  void step_of_few(const Batch& q, const StepRows& step, int64_t n, const float* const* x_rows) const {
    for (int64_t k = 0; k < n; k++) at.a_rows[k] = step.h_words + k * step.depth;
    with_weight_type([&](auto type) {
      sums_of_few<decltype(type)>(p, t.weights[q.d], step, n, x_rows, at.a_rows, at.to_rows, !z.in_one_go);
    });
    cells_of_few(p, step, n);
  }
  void project(int64_t d, int64_t n) const {
    for (int64_t k = 0; k < n; k++) at.a_rows[k] = at.m + k * p.H, at.to_rows[k] = at.h_next + k * p.P;
    multiply_rows(n, p.P, p.H, at.a_rows, shared.w_hr[d], at.to_rows, false);
  }
  void step(const Batch& q, int64_t, int64_t n, int64_t row) const {
    const StepRows step = rows_of(q.d, at.slot_rows + row);
    if (z.few)
      step_of_few(q, step, n, at.x_rows + row);
    else
      recurrent_part(step, n);
    if (p.P) project(q.d, n);
  }
};

struct Fused {
  using Sizes = recurrent::Sizes;
  using Shared = recurrent::Shared;
  using Scratch = recurrent::Scratch;
  using Walk = Forward;
  static constexpr auto pack = pack_item;
};

Refusal refuses_fused(const RecurrentProblem& p) {
  return is_plain(p) ? refuses_products(p) : "only the plain cells are fused";
}

}  // namespace
}  // namespace recurrent

extern const RecurrentCpuKernel recurrent_forward;
const RecurrentCpuKernel recurrent_forward = {"fused_" PYSEQNET_ISA_NAME, this_isa, recurrent::refuses_fused,
                                              recurrent::plan_forward<recurrent::Fused>,
                                              recurrent::run_forward<recurrent::Fused>};

}  // namespace PYSEQNET_ISA
}  // namespace pyseqnet
