// Contract of the recurrent family: one layer, one or both directions, over sequences of any length.
//
// Letters: T steps, B sequences, I input features, H hidden units, D directions (1 or 2), G gates of a cell,
// P projected or output features (0: none), R = P ? P : H the features of what is fed back. The engine owns
// time, sequences and products; a cell is a unit, and its file in cells/ says all about it (cells.h lists them):
//
//   rnn_tanh, rnn_relu    G 1   Elman
//   lstm                  G 4   gates i, f, g, o; lstm_peephole: diagonal peepholes; lstm_full_peephole: c' enters
//                               all gates by a matrix; lstm_layer_norm: layer normalisation
//   gru                   G 3   gates r, z, n, as torch
//   jordan_tanh, _relu    G 1   Jordan: the output y = phi(W_hr m + b_hr) is fed back by way of the state
//                               s = decay s' + y; P > 0
//
// A step takes a = W_ih x + b_ih + W_hh h' + b_hh (and W_ch c') through the cell to m (and c). What the engine
// adds to any cell:
//   projection   h = W_hr m, of the LSTMs (Sak et al., 2014). Otherwise h = m; in a Jordan net h is the state s
//   zoneout      h = z_h h' + (1 - z_h) h and c likewise, after everything else; o tanh(c) sees the c before
//                (Krueger et al., 2017). z: from masks, or one rate for all
//   clipping     c of the LSTMs, m of Elman's and Jordan's units, to [-limit, limit]
//
// h', c' are the states of the step before in the direction's own order: t - 1 forward; t + 1 in reverse,
// which begins at each sequence's own last step. Before the first step they are h0, c0 (null: zeros).
//
// Sequences. Sequence b has length(b) steps, 0 <= length(b) <= T; its step t lies in row(t, b):
//   padded   offsets null: row = t * B + b. lengths null: every sequence has T steps. Any order of lengths.
//   packed   offsets given (T + 1 values): row = offsets[t] + b, as torch's PackedSequence: lengths never
//            increase with b, and offsets[t + 1] - offsets[t] sequences still run at step t. lengths is
//            given.
// N = rows(): T * B, or offsets[T]. Padded positions (length(b) <= t < T) are never read, whatever they hold;
// there y and gx are written 0, the reserve is left as it is. A sequence of length 0 has h_n = h0, c_n = c0.
//
// Tensors. `T` marks the problem's dtype; `A` is float, or double where the dtype is f64: what sums, states
// and the reserve are kept in. Every tensor belongs to the caller and is dense unless strides are named.
//   x          T  element (t, b, i) at  x_t * t + x_b * b + i    (packed: x_b * row(t, b) + i)
//   y          T  element (t, b, d*R + j) likewise with y_t, y_b: the directions lie side by side
//   gy, gx     T  as y and x, with gy_t, gy_b and gx_t, gx_b. Strides of what is read may be 0 (expanded)
//   h0, h_n, gh0, gh_n     T  (D, B, R)            c0, c_n, gc0, gc_n   T  (D, B, H), of cells with a c
//   w_ih (G*H, I)   w_hh (G*H, R)   b_ih, b_hh (G*H)   w_hr (P, H)      T, gates in the order above; one set
//              a direction; biases null: zeros. w_hr is null unless P. Gradients g_* have the same shapes.
//   b_hr (P)   of a Jordan net with biases;  w_ch (4*H, H) of lstm_full_peephole, (3*H) of lstm_peephole: i, f, o
//   gain_ih, gain_hh (4*H)   gain_c, bias_c (H)   of lstm_layer_norm
//   zone_h (D, N, R), zone_c (D, N, H)   bytes: 1 keeps the state of the step before. Null: the rate everywhere
//   gates      A  (D, N, S, H), S = saved(): the cell's slots as forward leaves them. S = 0 of an Elman net without
//              zoneout: y is all that backward needs
//   cells      A  (D, N, H): c;  in a Jordan net (D, N, P): the state s. Width cell_width(), 0: none
//   Together `gates` and `cells` are the reserve, the same whichever kernel wrote it.
//
// forward   x, h0, c0, weights -> y, h_n, c_n, and the reserve if the problem says so (else null, not written)
// backward  gy, gh_n, gc_n (null: zeros), x, y, h0, c0, weights, reserve -> every one of gx, gh0, gc0 and the
//           weights' gradients that is not null; every element of it is written. Weights' gradients: all or
//           none. h' is read from y and h0.
//
// Rounding: inputs are widened to A, all sums and states are kept in A within a call; what is stored in T is
// rounded once. (Elman and dW_hh in 16 bits: backward sees the rounded h, as torch does.) Kernels that
// multiply 16-bit numbers may also round, to the problem's dtype, what a product reads: h and the gradients of
// gates' sums.
#pragma once
#include <string>

#include "common/dispatch.h"
#include "common/types.h"
#include "recurrent/cells.h"

namespace pyseqnet {

constexpr const char* name_of(RecurrentCell cell) { return facts_of(cell).name; }

constexpr int max_directions = 2;

struct RecurrentProblem {
  DType dtype = DType::f32;
  RecurrentCell cell = RecurrentCell::lstm;
  int64_t T = 0, B = 0, I = 0, H = 0, P = 0, D = 1;
  bool reserve = true;  // forward: whether gates and cells are written

  OutputUnit output = OutputUnit::identity;  // phi of a Jordan net,
  double decay = 0;                          // and of its state
  double limit = 0;                          // of clipping; 0: none. Of cells without c a number of the dtype
  double zone_h = 0, zone_c = 0;             // rates of zoneout where there is no mask
  bool zone_masks = false;                   // whether masks are given

  // Host memory on every device, alive during the call: plans are made from them.
  const int64_t* lengths = nullptr;  // B, or null: all T
  const int64_t* offsets = nullptr;  // T + 1, or null: padded

  // Element strides; in packed data only *_b counts, the distance from row to row.
  int64_t x_t = 0, x_b = 0, y_t = 0, y_b = 0, gy_t = 0, gy_b = 0, gx_t = 0, gx_b = 0;

  int64_t R() const { return P ? P : H; }
  CellFacts facts() const { return facts_of(cell); }
  int64_t gates() const { return facts().gates; }
  bool zoneout() const { return zone_masks || zone_h != 0 || zone_c != 0; }
  int64_t saved() const { return facts().keeps_slots || zoneout() ? facts().slots : 0; }
  bool has_cell() const { return facts().has_cell; }
  bool is_jordan() const { return facts().feeds_output; }
  int64_t cell_width() const { return is_jordan() ? P : has_cell() ? H : 0; }
  bool has_options() const { return zoneout() || limit != 0; }
  bool packed() const { return offsets != nullptr; }
  int64_t rows() const { return offsets ? offsets[T] : T * B; }
  int64_t length(int64_t b) const { return lengths ? lengths[b] : T; }
  int64_t row(int64_t t, int64_t b) const { return offsets ? offsets[t] + b : t * B + b; }
  // The step that a sequence takes as its s-th, 0 <= s < length(b), in direction d.
  int64_t step(int64_t s, int64_t b, int64_t d) const { return d ? length(b) - 1 - s : s; }

  int64_t at(int64_t t, int64_t b, int64_t stride_t, int64_t stride_b) const {
    return offsets ? (offsets[t] + b) * stride_b : t * stride_t + b * stride_b;
  }
  int64_t x_at(int64_t t, int64_t b) const { return at(t, b, x_t, x_b); }
  int64_t y_at(int64_t t, int64_t b) const { return at(t, b, y_t, y_b); }
  int64_t gy_at(int64_t t, int64_t b) const { return at(t, b, gy_t, gy_b); }
  int64_t gx_at(int64_t t, int64_t b) const { return at(t, b, gx_t, gx_b); }
};

struct RecurrentWeights {
  const void *w_ih = nullptr, *w_hh = nullptr, *b_ih = nullptr, *b_hh = nullptr, *w_hr = nullptr;
  const void *b_hr = nullptr, *w_ch = nullptr;
  const void *gain_ih = nullptr, *gain_hh = nullptr, *gain_c = nullptr, *bias_c = nullptr;
};
struct RecurrentGradients {
  void *w_ih = nullptr, *w_hh = nullptr, *b_ih = nullptr, *b_hh = nullptr, *w_hr = nullptr;
  void *b_hr = nullptr, *w_ch = nullptr;
  void *gain_ih = nullptr, *gain_hh = nullptr, *gain_c = nullptr, *bias_c = nullptr;
};

// The unit parameters of a cell (CellFacts::parameters) as they lie in its weights, or in their gradients:
// `rows` of H values; the parameter is the sum of both tensors, so both have its gradient. Null: zeros.
template <class Pointer>
struct ParameterBlock {
  Pointer values, also;
  int rows;
};
template <class Pointer>
struct ParameterBlocks {
  static constexpr int most = 5;
  ParameterBlock<Pointer> block[most];
  int count;
};
template <class Pointer, class Weights>
PYSEQNET_HOST_DEVICE ParameterBlocks<Pointer> parameter_blocks(RecurrentCell cell, const Weights& w) {
  switch (cell) {
    case RecurrentCell::lstm_peephole:
      return {{{w.w_ch, nullptr, 3}}, 1};
    case RecurrentCell::lstm_layer_norm:
      return {{{w.gain_ih, nullptr, 4},
               {w.gain_hh, nullptr, 4},
               {w.gain_c, nullptr, 1},
               {w.bias_c, nullptr, 1},
               {w.b_ih, w.b_hh, 4}},
              5};
    default:
      return {{}, 0};
  }
}

// Pointers of one call; null what does not exist, is zero, or is not wanted.
struct RecurrentTensors {
  const void *x = nullptr, *h0 = nullptr, *c0 = nullptr;
  RecurrentWeights weights[max_directions];
  const uint8_t *zone_h = nullptr, *zone_c = nullptr;
  void *y = nullptr, *h_n = nullptr, *c_n = nullptr;  // backward reads y
  void *gates = nullptr, *cells = nullptr;            // written by forward, read by backward

  const void *gy = nullptr, *gh_n = nullptr, *gc_n = nullptr;
  void *gx = nullptr, *gh0 = nullptr, *gc0 = nullptr;
  RecurrentGradients gradients[max_directions];

  // The problem's lengths and offsets where the kernel can read them: on a GPU copies in its memory, on the
  // CPU the same pointers. Null as there.
  const int64_t *lengths = nullptr, *offsets = nullptr;

  bool weights_wanted() const { return gradients[0].w_hh != nullptr; }  // never empty
};

enum class RecurrentPass : int32_t { forward, backward };
constexpr const char* operation_of(RecurrentPass pass) {
  return pass == RecurrentPass::forward ? "recurrent_forward" : "recurrent_backward";
}

std::string describe(const RecurrentProblem&);

// By name; false: there is none of it.
bool find_cell(const std::string& name, RecurrentCell& cell);
bool find_output_unit(const std::string& name, OutputUnit& unit);

using RecurrentCpuKernel = CpuKernel<RecurrentProblem, RecurrentTensors>;
using RecurrentCudaKernel = CudaKernel<RecurrentProblem, RecurrentTensors>;
Table<RecurrentCpuKernel> recurrent_cpu_table(RecurrentPass);    // recurrent_table.cpp
Table<RecurrentCudaKernel> recurrent_cuda_table(RecurrentPass);  // recurrent_table.cpp; empty without CUDA

}  // namespace pyseqnet
