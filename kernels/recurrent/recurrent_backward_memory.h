// What all phases of the CPU kernels' backward pass agree on: sizes, and what all threads share.
#pragma once
#include "recurrent/recurrent_products.h"
#include "recurrent/recurrent_schedule.h"

namespace pyseqnet {
inline namespace PYSEQNET_ISA {
namespace recurrent {

constexpr int64_t panel = 4 * VL;

struct BackwardSizes {
  CellFacts facts;
  int64_t rows;           // of all sequences together
  int64_t width, stride;  // a row of gradients: width elements, in whole words
  int64_t kept;           // a row of what forward kept
  int64_t x_panels, h_panels, m_panels, c_panels;
  bool x_in_place, h_in_place;  // few rows multiply a weight where it lies: packing would cost more
  int64_t batch, input_blocks;
  bool splits;  // the gradient of m is not that of the state
  // A row of gradients in parts that are one piece of each weight's rows, the parts in blocks: one item each.
  int64_t parts, part, gate_blocks, gate_block;
  int64_t projection_blocks, projection_block;

  // Rows of gx that make one item: their gradients and a panel share the second level.
  static constexpr int64_t input_block = 96;

  // Rows of a product to an item: many share what is packed for them, but there are a few items to share out.
  static int64_t blocks(int64_t extent, int64_t parts) {
    constexpr int64_t widest = 512, narrowest = 48, items_wanted = 4;
    int64_t count = (extent + widest - 1) / widest;
    while (count * parts < items_wanted && extent / (count + 1) >= narrowest) count++;
    return count;
  }

  explicit BackwardSizes(const RecurrentProblem& p) : facts(p.facts()) {
    rows = p.packed() ? p.rows() : 0;
    for (int64_t b = 0; !p.packed() && b < p.B; b++) rows += p.length(b);
    width = facts.sums() * p.H, kept = p.saved() * p.H;
    splits = p.P > 0 || p.zoneout();
    stride = pairs ? 2 * words(width + p.gates() * p.H % 2) : width;  // a product may read one more element
    x_panels = (p.I + panel - 1) / panel, h_panels = (p.R() + panel - 1) / panel;
    const bool few = !pairs && p.dtype == DType::f32 && rows <= few_rows;
    x_in_place = few && p.I % panel == 0, h_in_place = few && p.R() % panel == 0;
    if (x_in_place) x_panels = 0;
    if (h_in_place) h_panels = 0;
    m_panels = p.P ? (p.H + panel - 1) / panel : 0;
    c_panels = facts.feeds_cell ? (p.H + panel - 1) / panel : 0;
    batch = Batch::batch_bound(p);
    input_blocks = (rows + input_block - 1) / input_block;
    parts = facts.apart() == facts.gates ? 2 : facts.apart() ? facts.sums() : 1;
    part = width / parts;
    gate_blocks = blocks(part, p.D * parts);
    gate_block = (part + gate_blocks - 1) / gate_blocks;
    projection_blocks = p.P ? blocks(p.P, p.D) : 0;
    projection_block = p.P ? (p.P + projection_blocks - 1) / projection_blocks : 0;
  }
  int64_t packing_items(const RecurrentProblem& p) const {
    return 1 + p.D * (1 + x_panels + h_panels + m_panels + c_panels);
  }
  int64_t gate_items(const RecurrentProblem& p) const { return p.D * parts * gate_blocks; }
};

struct BackwardShared {
  Schedule schedule;
  float *w_ih[max_directions], *w_hh[max_directions], *w_hr[max_directions], *w_ch[max_directions];
  float* parameters[max_directions];
  float* parameter_gradients[max_directions];  // of each sequence (B, parameters, H)
  float*
      initial[max_directions];  // the state before the first step in float, where others are cells (B, width)
  const void** c_rows[max_directions];  // of each row of gradients: its c of the step before
  Factor* gradients[max_directions];    // rows x stride
  const void** x_rows[max_directions];  // of each row of gradients: its x
  const void** h_rows[max_directions];  // and its h of the step before, null for zeros
  float* h_gradients[max_directions];   // rows x P, and
  float* m[max_directions];             // rows x H: what a projection was made of

  BackwardShared(Carver& shared, const RecurrentProblem& p, const BackwardSizes& z)
      : schedule(Schedule::carve(shared, p)) {
    for (int64_t d = 0; d < p.D; d++) {
      w_ih[d] = shared.take<float>(z.x_panels * panel * words(p.gates() * p.H));
      w_hh[d] = shared.take<float>(z.h_panels * panel * words(p.gates() * p.H));
      w_hr[d] = shared.take<float>(z.m_panels * panel * p.P);
      w_ch[d] = shared.take<float>(z.c_panels * panel * z.facts.gates * p.H);
      parameters[d] = shared.take<float>(z.facts.parameters * p.H);
      parameter_gradients[d] = shared.take<float>(p.B * z.facts.parameters * p.H);
      initial[d] = shared.take<float>(p.is_jordan() || z.facts.feeds_cell ? p.B * p.cell_width() : 0);
      c_rows[d] = shared.take<const void*>(z.facts.feeds_cell ? z.rows : 0);
      gradients[d] = shared.take<Factor>(z.rows * z.stride);
      x_rows[d] = shared.take<const void*>(z.rows);
      h_rows[d] = shared.take<const void*>(z.rows);
      h_gradients[d] = shared.take<float>(p.P ? z.rows * p.P : 0);
      m[d] = shared.take<float>(p.P ? z.rows * p.H : 0);
    }
  }
};

}  // namespace recurrent
}  // namespace PYSEQNET_ISA
}  // namespace pyseqnet
