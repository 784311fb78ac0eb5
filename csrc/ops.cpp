// Every operation's schema. Raw operations are named *_forward and *_backward and are deliberately not
// differentiable: pyseqnet/functional ties the pairs together. Extents are plain integers, since lists cost
// an allocation each at this border; shapes that a compiler may treat as symbols are SymInt.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(pyseqnet, m) {
  m.def(
      "conv_forward(Tensor input, Tensor weight, Tensor? bias, int stride_h, int stride_w, int pad_top, int "
      "pad_left, "
      "int pad_bottom, int pad_right, int dilation_h, int dilation_w, int groups, bool allow_tf32=False) -> "
      "Tensor");
  m.def(
      "conv_backward(Tensor grad_output, Tensor input, Tensor weight, int stride_h, int stride_w, int "
      "pad_top, "
      "int pad_left, int pad_bottom, int pad_right, int dilation_h, int dilation_w, int groups, bool "
      "need_input, "
      "bool need_weight, bool need_bias, bool allow_tf32=False) -> (Tensor, Tensor, Tensor)");
  m.def(
      "conv_relu_pool_forward(Tensor input, Tensor weight, Tensor? bias, int stride_h, int stride_w, int "
      "pad_top, int pad_left, int pad_bottom, int pad_right, int dilation_h, int dilation_w, int groups, int "
      "pool_h, int pool_w, int pool_stride_h, int pool_stride_w, bool with_arg, bool allow_tf32=False) -> "
      "(Tensor, Tensor)");
  m.def(
      "conv_relu_pool_backward(Tensor grad_output, Tensor saved, Tensor input, Tensor weight, int stride_h, "
      "int stride_w, int pad_top, int pad_left, int pad_bottom, int pad_right, int dilation_h, int "
      "dilation_w, int groups, int pool_h, int pool_w, int pool_stride_h, int pool_stride_w, bool "
      "need_input, bool need_weight, bool need_bias, bool allow_tf32=False) -> (Tensor, Tensor, Tensor)");
  m.def(
      "max_pool_forward(Tensor input, int kernel_h, int kernel_w, int stride_h, int stride_w, int pad_h, int "
      "pad_w, "
      "int dilation_h, int dilation_w, bool ceil_mode, bool with_arg) -> (Tensor, Tensor)");
  m.def(
      "max_pool_backward(Tensor grad_output, Tensor arg, SymInt height, SymInt width, int kernel_h, int "
      "kernel_w, "
      "int stride_h, int stride_w, int pad_h, int pad_w, int dilation_h, int dilation_w, bool ceil_mode) -> "
      "Tensor");
  m.def(
      "max_pool_indices(Tensor arg, SymInt height, SymInt width, int kernel_h, int kernel_w, int stride_h, "
      "int stride_w, int pad_h, int pad_w, int dilation_h, int dilation_w, bool ceil_mode) -> Tensor");
  // Attention. causal: 0 none, 1 top-left, 2 bottom-right. mask (bool), bias (additive): four-dimensional, each
  // extent 1 or that of (B, H, L, S). slopes: (H) or (B H), of lse's dtype. cu_seqlens: int32; inputs are then
  // (1, H, positions of all sequences, D), max_q and max_k bound the lengths (0: by the positions), and B, L, S
  // of mask, bias and weights are the number of sequences and those bounds. pattern: nothing, or the seven
  // tensors of attention_blocks.h. softcap: 0 for none. seed: one int64, needed when dropout_p > 0. weights,
  // grad_weights: both or none.
  m.def(
      "attention_forward(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? bias, Tensor? slopes, "
      "Tensor? key_lengths, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor[] pattern, Tensor? seed, int "
      "causal, float scale, float softcap, float dropout_p, int max_q, int max_k) -> (Tensor, Tensor)");
  // attention_forward with nothing beside: reading eleven arguments fewer is a third of a small call.
  m.def(
      "attention_plain(Tensor query, Tensor key, Tensor value, bool causal, float scale) -> (Tensor, "
      "Tensor)");
  m.def(
      "attention_weights(Tensor query, Tensor key, Tensor lse, Tensor? mask, Tensor? bias, Tensor? slopes, "
      "Tensor? key_lengths, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor[] pattern, Tensor? seed, int "
      "causal, float scale, float softcap, float dropout_p, int max_q, int max_k) -> Tensor");
  m.def(
      "attention_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, "
      "Tensor? mask, Tensor? bias, Tensor? slopes, Tensor? key_lengths, Tensor? cu_seqlens_q, Tensor? "
      "cu_seqlens_k, Tensor[] pattern, Tensor? seed, Tensor? weights, Tensor? grad_weights, Tensor? "
      "grad_lse, int causal, float scale, float softcap, float dropout_p, int max_q, int max_k, bool "
      "need_query, bool need_key_value, bool need_bias) -> (Tensor, Tensor, Tensor, Tensor)");
  // Additive attention (kernels/attention/additive.h): out, lse; weights; gradients of query, key, value,
  // weight, bias, empty where not needed. saved_weights, grad_weights: both or none.
  m.def(
      "additive_attention_forward(Tensor query, Tensor key, Tensor value, Tensor weight, Tensor? bias, "
      "Tensor? key_lengths) -> (Tensor, Tensor)");
  m.def(
      "additive_attention_weights(Tensor query, Tensor key, Tensor weight, Tensor lse, Tensor? bias, Tensor? "
      "key_lengths) -> Tensor");
  m.def(
      "additive_attention_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor weight, "
      "Tensor out, Tensor lse, Tensor? bias, Tensor? key_lengths, Tensor? saved_weights, Tensor? "
      "grad_weights, bool need_scores, bool need_value) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  // One recurrent layer (kernels/recurrent/recurrent.h). cell: a name of kernels/recurrent/cells. input
  // (T, B, I), with batch_first (B, T, I), with batch_sizes (rows, I) as a PackedSequence's data; h0 (D, B, R)
  // and c0 (D, B, H), None: zeros; h0 may not be None where batch_sizes is given. weights: for each direction
  // w_ih, w_hh, then b_ih, b_hh if has_biases, then w_hr if the layer projects (torch's order), then what the
  // cell has: b_hr of a Jordan net, w_ch of peepholes, gain_ih, gain_hh, gain_c, bias_c of layer normalisation.
  // lengths (B) and batch_sizes (T) are int64 on the CPU. Results: output, h_n, c_n (empty unless lstm), and
  // what backward needs, empty unless reserve: gates (D, rows, S, H) and cells (D, rows, H), in a Jordan net
  // (D, rows, P), float32 (float64 for float64). zone_h (D, rows, R), zone_c (D, rows, H): masks of zoneout.
  // options: "output decay limit zone_h zone_c": output units and decay of a Jordan net, limit of clipping (0:
  // none), rates of zoneout where there is no mask; empty: "identity 0 0 0 0".
  m.def(
      "recurrent_forward(Tensor input, Tensor? h0, Tensor? c0, Tensor[] weights, Tensor? lengths, Tensor? "
      "batch_sizes, str cell, int directions, bool has_biases, bool batch_first, bool reserve, Tensor? "
      "zone_h=None, Tensor? zone_c=None, str options='') -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  // Gradients of input, h0, c0 and of every weight in the order of `weights`. What is not needed comes back
  // empty, shape (0), the weights' gradients as an empty list. Gradients that are None are zeros.
  m.def(
      "recurrent_backward(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor input, Tensor "
      "result, Tensor? h0, Tensor? c0, Tensor[] weights, Tensor gates, Tensor cells, Tensor? lengths, "
      "Tensor? batch_sizes, str cell, int directions, bool has_biases, bool batch_first, bool need_input, "
      "bool need_h0, bool need_c0, bool need_weights, Tensor? zone_h=None, Tensor? zone_c=None, str "
      "options='') -> (Tensor, Tensor, Tensor, Tensor[])");
  // decay (H) float64; starts (N + 1) int32: packed sequences, query (1, H, L, D), states (N, H, D, E).
  m.def(
      "linear_attention_forward(Tensor query, Tensor key, Tensor value, Tensor? key_lengths, Tensor? state, "
      "Tensor? normalizer, int feature_map, bool causal, bool normalize, float scale, float eps, bool "
      "with_state, bool with_saved, Tensor? decay=None, Tensor? starts=None) -> (Tensor, Tensor, Tensor, "
      "Tensor, "
      "Tensor)");
  m.def(
      "linear_attention_backward(Tensor grad_output, Tensor? grad_state, Tensor? grad_normalizer, Tensor "
      "query, Tensor key, Tensor value, Tensor? key_lengths, Tensor output, Tensor inverse, Tensor saved, "
      "int feature_map, bool causal, bool normalize, float scale, bool need_state, Tensor? decay=None, "
      "Tensor? "
      "starts=None, bool need_decay=False) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  // One step of one cell for inference: input (B, I), h, c (B, H), None: zeros; the next h and c (empty unless
  // lstm). csrc/recurrent_step.cpp
  m.def(
      "recurrent_step(Tensor input, Tensor? h, Tensor? c, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? "
      "b_hh, str cell) -> (Tensor, Tensor)");
  m.def(
      "linear_attention_step(Tensor query, Tensor key, Tensor value, Tensor? state, Tensor? normalizer, int "
      "feature_map, bool normalize, float scale, float eps, Tensor? decay=None) -> (Tensor, Tensor, Tensor)");
  // The same, the state updated in place: a decoder that needs the old one no more.
  m.def(
      "linear_attention_step_(Tensor query, Tensor key, Tensor value, Tensor(a!)? state, Tensor(b!)? "
      "normalizer, "
      "int feature_map, bool normalize, float scale, float eps, Tensor? decay=None) -> Tensor");
  // CTC (kernels/chain/ctc.h). input (T, B, C): logits or log-probabilities; targets (size) int64, those of sequence b
  // from target_offsets[b] on; longest bounds their lengths; lengths and offsets (B) int64 on the input's device.
  // Results: loss (B) and, empty unless with_gradient, its gradient with respect to logits.
  m.def(
      "ctc_loss(Tensor input, Tensor targets, Tensor target_offsets, Tensor input_lengths, Tensor "
      "target_lengths, "
      "SymInt longest, int blank, bool from_logits, bool zero_infinity, bool with_gradient) -> (Tensor, "
      "Tensor)");
  // Linear-chain CRF (kernels/chain/crf.h). emissions (B, T, C), tags (B, T) int64 or None: minus log Z; lengths (B)
  // int64; start, end (C), transitions (C, C) float32 (float64 for float64).
  m.def(
      "crf_log_likelihood(Tensor emissions, Tensor? tags, Tensor lengths, Tensor start, Tensor end, Tensor "
      "transitions) -> Tensor");
  // Gradients of emissions, start, end, transitions for the gradient (B) of each log-likelihood.
  m.def(
      "crf_gradient(Tensor grad, Tensor emissions, Tensor? tags, Tensor lengths, Tensor start, Tensor end, "
      "Tensor "
      "transitions) -> (Tensor, Tensor, Tensor, Tensor)");
  // Paths (B, nbest, T) int64, -1 beyond their ends, and scores (B, nbest).
  m.def(
      "crf_viterbi(Tensor emissions, Tensor lengths, Tensor start, Tensor end, Tensor transitions, int "
      "nbest) -> "
      "(Tensor, Tensor)");
}
