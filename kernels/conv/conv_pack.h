// Operands as tensor cores want them: channels last, in whole chunks of 16 bytes.
//
// Every copy from global to shared memory on tensor-core paths is 16 bytes of neighbouring channels. A tensor
// that is not made of such chunks (NCHW, or channels of a group that do not fill chunks) is packed into the
// workspace first, padded with zeros. One that is already so is used as it is.
//
//   image    (N, H, W, groups, channels of a group, in chunks)
//   filters  (rows, R, S, depth in chunks): rows = K and depth = channels of a group for the forward pass;
//            rows = C and depth = filters of a group for the input gradient
//
// Few channels (a first layer: 3 channels, 7x7) would be mostly padding. There the packed image holds, for
// each column of the output, the whole run of S taps x channels that a filter row meets: what is left is a
// convolution with R x 1 taps over "channels" s * channels + c, at most a chunk's padding a row.
#pragma once
#include "conv/conv.h"

namespace pyseqnet {

constexpr int chunk_bytes = 16;

// One destination: lines of chunks, gathered from a source by strides. Source strides count elements,
// destination strides chunks.
struct PackPlan {
  int64_t extent[3];  // of a line's digits, most significant first: the last one's neighbours share a warp
  int64_t from[3], to[3];
  int64_t groups, from_group, to_group;
  // Element d of a line is (d / inner, d % inner) while d < outer * inner, else zero.
  int64_t outer, inner, from_outer, from_inner;
  int64_t chunks;
  // Expanded images: position = first + digit[2] * step + (d / inner) * tap_step must lie in [0, limit), else
  // zero. limit 0: every position exists.
  int64_t limit, first, step, tap_step;
  int64_t from_origin;  // added to every source offset

  int64_t lines() const { return extent[0] * extent[1] * extent[2]; }
  int64_t bytes() const { return lines() * groups * chunks * chunk_bytes; }
};

int launch_pack(DType dtype, const PackPlan& plan, const void* from, void* to, void* stream);

// The convolution that remains once its image is packed: channels last, whole chunks, perhaps R x 1 taps.
struct PackedConv {
  ConvProblem conv;      // as tensor cores see it
  bool pack_x = false;   // x is not yet so
  bool pack_gy = false;  // likewise gy
  bool pack_w = false;   // likewise w for the forward pass (the input gradient's filters always are packed)
  bool expanded = false;
  int64_t x_chunks = 0, y_chunks = 0;  // of a group's channels and filters in a pixel
};
// For a simplified problem that refuse_tensor_cores accepts.
PackedConv packed_conv(const ConvProblem& p, bool expand);
PackPlan pack_image(const ConvProblem& p, const PackedConv& packed);           // x
PackPlan pack_output(const ConvProblem& p, const PackedConv& packed);          // gy
PackPlan pack_filters(const ConvProblem& p, const PackedConv& packed);         // forward
PackPlan pack_filters_turned(const ConvProblem& p, const PackedConv& packed);  // input gradient

// gw, in any filter layout, from `parts` partial sums (part, filter, R, S, chunks of channels) in float.
int launch_sum_filters(const ConvProblem& p, const PackedConv& packed, const float* partial, int64_t parts,
                       void* gw, void* stream);

// What keeps a problem from every tensor-core kernel.
Refusal refuse_tensor_cores(const ConvProblem& p);

}  // namespace pyseqnet
