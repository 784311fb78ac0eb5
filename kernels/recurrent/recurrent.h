// Contract of the recurrent family: one layer, one or both directions, over sequences of any length.
//
// Letters: T steps, B sequences, I input features, H hidden units, D directions (1 or 2), G gates of a cell,
// P projected features (0: none), R = P ? P : H the features of h. The engine owns time, a cell is a unit:
//
//   rnn_tanh  G 1   h = tanh(a)                    (Elman, 1990)       a = W_ih x + b_ih + W_hh h' + b_hh
//   rnn_relu  G 1   h = max(a, 0)
//   lstm      G 4   gates i, f, g, o of a          (Hochreiter & Schmidhuber, 1997; Gers et al., 2000)
//                   i, f, o = sigmoid, g = tanh;   c = f c' + i g;   h = o tanh(c)
//                   with projection (Sak et al., 2014)  h = W_hr (o tanh(c))
//   gru       G 3   gates r, z, n                  (Cho et al., 2014, as torch: the reset after the product)
//                   q = W_hn h' + b_hn             r, z = sigmoid of their a;   n = tanh(W_in x + b_in + r q)
//                   h = (1 - z) n + z h'
//
// h', c' are the states of the step before in the direction's own order: t - 1 forward; t + 1 in reverse,
// which begins at each sequence's own last step. Before the first step they are h0, c0 (null: zeros).
// The pointwise maths, forward and backward, is written once in cells.h.
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
//   h0, h_n, gh0, gh_n     T  (D, B, R)            c0, c_n, gc0, gc_n   T  (D, B, H), LSTM only
//   w_ih (G*H, I)   w_hh (G*H, R)   b_ih, b_hh (G*H)   w_hr (P, H)      T, gates in the order above; one set
//              a direction; biases null: zeros. w_hr is null unless P. Gradients g_* have the same shapes.
//   gates      A  (D, N, S, H), S = saved():  lstm i, f, g, o and gru r, z, n, q, after their nonlinearities
//              (q has none); rnn_tanh and rnn_relu save nothing (S = 0): y is all that backward needs
//   cells      A  (D, N, H): c; LSTM only
//   Together `gates` and `cells` are the reserve, the same whichever kernel wrote it.
//
// forward   x, h0, c0, weights -> y, h_n, c_n, and the reserve if the problem says so (else null, not written)
// backward  gy, gh_n, gc_n (null: zeros), x, y, h0, c0, weights, reserve -> every one of gx, gh0, gc0 and the
//           weights' gradients that is not null; every element of it is written. Weights' gradients: all or
//           none. h' is read from y and h0.
//
// Rounding: inputs are widened to A, all sums and states are kept in A within a call; what is stored in T is
// rounded once. (Elman and dW_hh in 16 bits: backward sees the rounded h, as torch does.) Kernels that
// multiply bfloat16 may also round, to bfloat16, what a product reads: h and the gradients of gates' sums.
#pragma once
#include <string>

#include "common/dispatch.h"
#include "common/types.h"

namespace pyseqnet {

enum class RecurrentCell : int32_t { rnn_tanh, rnn_relu, lstm, gru };
constexpr const char* name_of(RecurrentCell c) {
  return c == RecurrentCell::rnn_tanh   ? "rnn_tanh"
         : c == RecurrentCell::rnn_relu ? "rnn_relu"
         : c == RecurrentCell::lstm     ? "lstm"
                                        : "gru";
}
constexpr int64_t gates_of(RecurrentCell c) {
  return c == RecurrentCell::lstm ? 4 : c == RecurrentCell::gru ? 3 : 1;
}
constexpr int64_t saved_of(RecurrentCell c) {
  return c == RecurrentCell::lstm || c == RecurrentCell::gru ? 4 : 0;
}

constexpr int max_directions = 2;

struct RecurrentProblem {
  DType dtype = DType::f32;
  RecurrentCell cell = RecurrentCell::lstm;
  int64_t T = 0, B = 0, I = 0, H = 0, P = 0, D = 1;
  bool reserve = true;  // forward: whether gates and cells are written

  // Host memory on every device, alive during the call: plans are made from them.
  const int64_t* lengths = nullptr;  // B, or null: all T
  const int64_t* offsets = nullptr;  // T + 1, or null: padded

  // Element strides; in packed data only *_b counts, the distance from row to row.
  int64_t x_t = 0, x_b = 0, y_t = 0, y_b = 0, gy_t = 0, gy_b = 0, gx_t = 0, gx_b = 0;

  int64_t R() const { return P ? P : H; }
  int64_t gates() const { return gates_of(cell); }
  int64_t saved() const { return saved_of(cell); }
  bool has_cell() const { return cell == RecurrentCell::lstm; }
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
};
struct RecurrentGradients {
  void *w_ih = nullptr, *w_hh = nullptr, *b_ih = nullptr, *b_hh = nullptr, *w_hr = nullptr;
};

// Pointers of one call; null what does not exist, is zero, or is not wanted.
struct RecurrentTensors {
  const void *x = nullptr, *h0 = nullptr, *c0 = nullptr;
  RecurrentWeights weights[max_directions];
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

using RecurrentCpuKernel = CpuKernel<RecurrentProblem, RecurrentTensors>;
using RecurrentCudaKernel = CudaKernel<RecurrentProblem, RecurrentTensors>;
Table<RecurrentCpuKernel> recurrent_cpu_table(RecurrentPass);    // recurrent_table.cpp
Table<RecurrentCudaKernel> recurrent_cuda_table(RecurrentPass);  // recurrent_table.cpp; empty without CUDA

}  // namespace pyseqnet
