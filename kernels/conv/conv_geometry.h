// Forward convolution and the input gradient are the same thing, a strided correlation: forward reads x and
// writes y; the input gradient reads gy and writes gx. With strides, an input gradient falls apart into
// stride_h x stride_w independent correlations, one for each remainder of the written position, each with
// the taps that reach it: nothing is ever multiplied by an inserted zero.
//
// A correlation's outputs are numbered in one line, image by image, row by row. Work is cut into intervals of
// that line ("blocks"), which may begin and end anywhere and may span images: batches of small images then
// fill vectors as well as one large image does.
#pragma once
#include "conv/conv.h"
#include "conv/conv_words.h"

namespace pyseqnet {
inline namespace PYSEQNET_ISA {
namespace conv {

PYSEQNET_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
PYSEQNET_INLINE int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }
PYSEQNET_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }  // a >= 0
PYSEQNET_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// One dimension: output i reads positions i * in_step + tap_offset + t * tap_step for t < taps, where tap t
// is filter position filter_first + t * filter_step, and is written at out_first + i * out_step.
struct Axis {
  int64_t in, out;
  int64_t out_first, out_step;
  int64_t in_step;
  int64_t taps, tap_offset, tap_step;
  int64_t filter_first, filter_step;

  int64_t reach() const {
    return taps > 0 ? (taps - 1) * tap_step + 1 : 0;
  }  // positions from first to last tap
  // Positions kept for each further output: no more than its taps span.
  int64_t kept_step() const { return smaller(in_step, reach()); }
  bool inside() const {  // no tap of any output leaves the input
    return taps > 0 && tap_offset >= 0 && (out - 1) * in_step + tap_offset + reach() <= in;
  }
};

PYSEQNET_INLINE Axis forward_axis(int64_t in, int64_t out, int64_t taps, int64_t stride, int64_t pad,
                                  int64_t dilation) {
  return {in, out, 0, 1, stride, taps, -pad, dilation, 0, 1};
}

// Of the input gradient, the written positions h = remainder + i * stride. Tap r reaches h where
// h + pad - r * dilation is a multiple of stride: for every (stride / gcd)th r, gcd that of stride and
// dilation. Taps are listed backwards, so that the position read rises with the tap.
PYSEQNET_INLINE Axis gradient_axis(int64_t read, int64_t written, int64_t taps, int64_t stride, int64_t pad,
                                   int64_t dilation, int64_t remainder) {
  int64_t gcd = stride;
  for (int64_t b = dilation; b != 0;) {
    const int64_t rest = gcd % b;
    gcd = b;
    b = rest;
  }
  const int64_t every = stride / gcd;
  const int64_t out = written > remainder ? ceil_div(written - remainder, stride) : 0;
  Axis axis = {read, out, remainder, stride, 1, 0, 0, dilation / gcd, 0, -every};
  for (int64_t r = 0; r < smaller(every, taps); ++r) {
    if ((remainder + pad - r * dilation) % stride != 0) continue;
    axis.taps = (taps - 1 - r) / every + 1;
    axis.filter_first = r + (axis.taps - 1) * every;
    axis.tap_offset = (remainder + pad - axis.filter_first * dilation) / stride;
    break;
  }
  return axis;
}

struct Correlation {
  Axis h, w;
  int64_t images, groups;
  int64_t channels, rows;  // channels read and channels written, of a group
  int64_t depth;           // words of channels: channels, or pairs of them
  Layout layout;           // of the tensors read and written
  Strides in, out;
  int64_t group_in;  // from one group of channels read to the next
  int64_t row_stride, depth_stride, r_stride, s_stride, group_stride;  // of the filters
  // Where words are pairs: the partners of the tensor read, of the filters and of the tensor written, and the
  // image pair (paired_images) or channel pair that has none, or -1. Strides of a paired dimension step by
  // words.
  bool paired_images;
  int64_t in_partner, filter_partner, out_partner, unpaired;
  bool paired_taps;  // one channel has no partner: in panels, pairs are neighbours in the list of its taps

  int64_t taps() const { return h.taps * w.taps; }
  int64_t tap_words() const { return paired_taps ? ceil_div(taps(), 2) : taps(); }  // of a channel in a panel
  Partner image_partner(int64_t offset, int64_t n) const {
    return {offset, !(paired_images && n == unpaired)};
  }
  Partner channel_partner(int64_t offset, int64_t d) const {
    return {offset, paired_images || d != unpaired};
  }
  int64_t image_pixels() const { return h.out * w.out; }
  int64_t pixels() const { return images * h.out * w.out; }
  int64_t filter_offset(int64_t group, int64_t row, int64_t d, int64_t r, int64_t s) const {
    return group * group_stride + row * row_stride + d * depth_stride +
           (h.filter_first + r * h.filter_step) * r_stride + (w.filter_first + s * w.filter_step) * s_stride;
  }
};

PYSEQNET_INLINE int64_t correlation_count(const ConvProblem& p, ConvPass pass) {
  return pass == ConvPass::input_gradient ? p.stride_h * p.stride_w : 1;
}
PYSEQNET_INLINE Correlation correlation(const ConvProblem& p, ConvPass pass, int64_t index) {
  const Strides w = p.w_strides();
  // One pixel an image: both layouts are the same bytes, and channels-last is the natural way to read them.
  const bool one_pixel = p.H == 1 && p.W == 1 && p.P == 1 && p.Q == 1;
  Correlation k;
  k.layout = one_pixel ? Layout::nhwc : p.layout;
  const Strides x = dense_strides(k.layout, p.C, p.H, p.W), y = dense_strides(k.layout, p.K, p.P, p.Q);
  k.images = p.N;
  k.groups = p.groups;
  k.r_stride = w.h;
  k.s_stride = w.w;
  k.group_stride = p.group_filters() * w.n;
  if (pass == ConvPass::input_gradient) {
    k.h = gradient_axis(p.P, p.H, p.R, p.stride_h, p.pad_h, p.dilation_h, index / p.stride_w);
    k.w = gradient_axis(p.Q, p.W, p.S, p.stride_w, p.pad_w, p.dilation_w, index % p.stride_w);
    k.channels = p.group_filters();
    k.rows = p.group_channels();
    k.in = y;
    k.out = x;
    k.row_stride = w.c;
    k.depth_stride = w.n;
  } else {
    k.h = forward_axis(p.H, p.P, p.R, p.stride_h, p.pad_h, p.dilation_h);
    k.w = forward_axis(p.W, p.Q, p.S, p.stride_w, p.pad_w, p.dilation_w);
    k.channels = p.group_channels();
    k.rows = p.group_filters();
    k.in = x;
    k.out = y;
    k.row_stride = w.n;
    k.depth_stride = w.c;
  }
  k.group_in = k.channels * k.in.c;
  k.depth = k.channels;
  k.paired_images = pass == ConvPass::weight_gradient;
  k.in_partner = k.paired_images ? k.in.n : k.in.c;
  k.filter_partner = k.depth_stride;
  k.out_partner = k.out.n;
  k.unpaired = -1;
  k.paired_taps = PAIR == 2 && !k.paired_images && k.channels == 1;
  if (PAIR == 1) return k;
  int64_t& words = k.paired_images ? k.images : k.depth;
  if (words % 2) k.unpaired = words / 2;
  words = ceil_div(words, 2);
  if (k.paired_images) {
    k.in.n *= 2;
    k.out.n *= 2;
  } else {
    k.in.c *= 2;
    k.depth_stride *= 2;
  }
  return k;
}

// Outputs of one image that are staged together: rows i0 .. i0 + rows, columns j0 .. j0 + columns.
struct Piece {
  int64_t n, i0, rows, j0, columns;
  int64_t slot;  // its first staged row
};
// A run of outputs within a row, `length` pixels from `first` of the block on.
struct Segment {
  int64_t first, length;
  int64_t n, i, j;
  int64_t piece;
};

// The interval [begin, end) of a correlation's outputs, and which rows of the input it needs.
struct PixelBlock {
  int64_t begin, end;
  Segment* segments;
  Piece* pieces;
  int64_t segment_count = 0, piece_count = 0;
  int64_t slots = 0;    // staged rows
  int64_t columns = 0;  // of the widest piece
  int64_t pixels() const { return end - begin; }
};

// Bounds over all blocks of at most `pixels` outputs, for sizing scratch.
struct BlockLimits {
  int64_t segments, pieces, slots, columns;
};
PYSEQNET_INLINE BlockLimits block_limits(const Correlation& k, int64_t pixels) {
  BlockLimits limits;
  limits.segments = smaller(pixels, smaller(k.images * k.h.out, pixels / larger(1, k.w.out) + 2));
  limits.pieces = smaller(limits.segments, 2 * smaller(k.images, pixels / larger(1, k.image_pixels()) + 2));
  limits.slots = limits.segments * k.h.kept_step() + limits.pieces * (k.h.reach() - k.h.kept_step());
  limits.columns = smaller(pixels, k.w.out);
  return limits;
}

// Fills block.segments and block.pieces, which have room for block_limits().
PYSEQNET_INLINE void split_block(const Correlation& k, PixelBlock& block) {
  const int64_t image = k.image_pixels(), Q = k.w.out;
  for (int64_t e = block.begin; e < block.end;) {
    const int64_t n = e / image, last = smaller(block.end, (n + 1) * image);
    const int64_t i0 = e % image / Q, i1 = (last - 1) % image / Q + 1;
    // Two rows that hold less than one row's pixels are staged apart, each with its own few columns.
    const bool apart = i1 - i0 == 1 || (i1 - i0 == 2 && last - e < Q);
    for (int64_t i = i0; i < i1; ++i) {
      const int64_t j = e % image % Q, length = smaller(Q - j, last - e);
      if (i == i0 || apart) {
        Piece& piece = block.pieces[block.piece_count++];
        piece = {n, i, apart ? 1 : i1 - i0, apart ? j : 0, apart ? length : Q, block.slots};
        block.slots += (piece.rows - 1) * k.h.kept_step() + k.h.reach();
        block.columns = larger(block.columns, piece.columns);
      }
      block.segments[block.segment_count++] = {e - block.begin, length, n, i, j, block.piece_count - 1};
      e += length;
    }
  }
}

}  // namespace conv
}  // namespace PYSEQNET_ISA
}  // namespace pyseqnet
