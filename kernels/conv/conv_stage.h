// Staging: a private float copy of the part of an image that a block of outputs reads, with the borders
// filled in. It pays for itself many times: the inner loops know neither borders nor strides nor storage
// types, every tap of every output is one fixed offset away from the output's own position.
//
// Where nothing needs converting and no tap leaves the image, the image itself serves ("in place").
//
//   planes    [channel][slot][phase][pitch]: lanes or depth run along pixels. A strided image is dealt out
//             into in_step phases, so that neighbouring outputs read neighbouring elements.
//   pixels    [slot][column][channel]: depth runs along channels.
#pragma once
#include "common/even_lanes.h"
#include "conv/conv_geometry.h"

namespace pyseqnet {
inline namespace PYSEQNET_ISA {
namespace conv {

// Offsets, in elements, of a staged or in-place arrangement.
struct Planes {
  int64_t channel, row, phase, kept_step;
  int64_t h_step, w_step;  // from one output to the next
  int64_t tap(const Correlation& k, int64_t r, int64_t s) const {
    const int64_t u = s * k.w.tap_step;
    return r * k.h.tap_step * row + (phase ? u % k.w.in_step * phase + u / k.w.in_step : u);
  }
};

// The part of a row that lies inside the image, as indices into a staged row whose index 0 is position
// `position` and whose indices are `step` positions apart.
struct Inside {
  int64_t first, last;
};
PYSEQNET_INLINE Inside inside_row(int64_t position, int64_t step, int64_t extent, int64_t count) {
  const int64_t first = position >= 0 ? 0 : ceil_div(-position, step);
  const int64_t last = position >= extent ? 0 : (extent - 1 - position) / step + 1;
  return {smaller(first, count), larger(smaller(first, count), smaller(last, count))};
}

// Words [i, i + VL) of a staged row: those at from[j * step] for the indices j inside the image, zero
// elsewhere.
template <int step, class T>
PYSEQNET_INLINE vf staged_vector(const T* from, int64_t i, Inside in, Partner partner) {
  if constexpr (step == 1) return load_words(from + i, in.first - i, in.last - i, partner);
  const int64_t first = 2 * (in.first - i), last = 2 * (in.last - i) - 1;
  const vf low = load_words(from + 2 * i, first, last, partner);
  const vf high = load_words(from + 2 * i + VL, first - VL, last - VL, partner);
  return even_lanes(low, high);
}
template <int step, class T>
PYSEQNET_INLINE void stage_rows_by(float* to, int64_t to_stride, const T* from, int64_t from_stride,
                                   int64_t channels, Inside in, int64_t count, Partner partner) {
  // Short rows: channels run innermost, so that what is inside is worked out once for all of them.
  constexpr int64_t short_row = 4 * VL;
  const int64_t together = count <= short_row ? channels : 1;
  for (int64_t c0 = 0; c0 < channels; c0 += together)
    for (int64_t i = 0; i < count; i += VL)
      for (int64_t c = c0; c < c0 + together; ++c)
        store_lanes_n(to + c * to_stride + i, staged_vector<step>(from + c * from_stride, i, in, partner),
                      count - i);
}
// A staged row of `count` words in each of `channels` planes. `from` may point before the image.
template <class T>
void stage_rows(float* to, int64_t to_stride, const T* from, int64_t from_stride, int64_t channels,
                int64_t step, Inside in, int64_t count, Partner partner) {
  if (step == 1) return stage_rows_by<1>(to, to_stride, from, from_stride, channels, in, count, partner);
  if (step == 2) return stage_rows_by<2>(to, to_stride, from, from_stride, channels, in, count, partner);
  for (int64_t c = 0; c < channels; ++c, to += to_stride, from += from_stride) {
    for (int64_t i = 0; i < in.first; ++i) to[i] = 0.0f;
    for (int64_t i = in.first; i < in.last; ++i) to[i] = load_word(from + i * step, partner);
    for (int64_t i = in.last; i < count; ++i) to[i] = 0.0f;
  }
}

PYSEQNET_INLINE int64_t staged_pitch(const Correlation& k, int64_t columns) {
  return columns + (k.w.taps > 0 ? (k.w.taps - 1) * k.w.tap_step / k.w.in_step : 0);
}
PYSEQNET_INLINE int64_t staged_phases(const Correlation& k) { return k.w.kept_step(); }
// Floats of a staged plane of any block within the limits.
PYSEQNET_INLINE int64_t staged_plane(const Correlation& k, const BlockLimits& limits) {
  return limits.slots * staged_phases(k) * staged_pitch(k, limits.columns);
}
PYSEQNET_INLINE Planes staged_planes(const Correlation& k, const PixelBlock& block) {
  Planes planes;
  planes.phase = staged_pitch(k, block.columns);
  planes.row = planes.phase * staged_phases(k);
  planes.channel = planes.row * block.slots;
  planes.kept_step = k.h.kept_step();
  planes.h_step = planes.kept_step * planes.row;
  planes.w_step = 1;
  return planes;
}
// Where an output's first tap lies in the staged planes.
PYSEQNET_INLINE int64_t staged_offset(const Planes& planes, const PixelBlock& block, const Segment& s) {
  const Piece& piece = block.pieces[s.piece];
  return piece.slot * planes.row + (s.i - piece.i0) * planes.h_step + s.j - piece.j0;
}

// Where no element needs converting and no tap leaves the image, the image is its own stage.
template <class T>
PYSEQNET_INLINE bool planes_in_place(const Correlation& k) {
  return sizeof(T) == sizeof(float) && k.in.w == 1 && k.w.in_step == 1 && k.h.inside() && k.w.inside();
}
PYSEQNET_INLINE Planes in_place_planes(const Correlation& k) {
  return {k.in.c, k.in.h, 0, 1, k.h.in_step * k.in.h, 1};
}
PYSEQNET_INLINE int64_t in_place_offset(const Correlation& k, const Segment& s) {
  return s.n * k.in.n + (s.i * k.h.in_step + k.h.tap_offset) * k.in.h + s.j + k.w.tap_offset;
}

// Copies `channels` words of channels, the first of which is number d0 of its group and begins at `in`, into
// `to`.
template <class T>
void stage_planes(const Correlation& k, const PixelBlock& block, const Planes& planes, const T* in,
                  int64_t d0, int64_t channels, float* to) {
  if (k.taps() == 0) return;
  const bool whole = k.channel_partner(0, d0 + channels - 1).present;  // the last channel word has two halves
  const bool planar = k.in.w == 1;
  for (int64_t i = 0; i < block.piece_count; ++i) {
    const Piece& piece = block.pieces[i];
    const int64_t slots = (piece.rows - 1) * planes.kept_step + k.h.reach();
    const int64_t pitch = staged_pitch(k, piece.columns);
    for (int64_t slot = 0; slot < slots; ++slot) {
      const int64_t h =
          (piece.i0 + slot / planes.kept_step) * k.h.in_step + slot % planes.kept_step + k.h.tap_offset;
      for (int64_t phase = 0; phase < staged_phases(k); ++phase) {
        float* row = to + (piece.slot + slot) * planes.row + phase * planes.phase;
        const int64_t position = piece.j0 * k.w.in_step + k.w.tap_offset + phase;
        Inside in_row = inside_row(position, k.w.in_step, k.w.in, pitch);
        if (h < 0 || h >= k.h.in) in_row = {pitch, pitch};
        const T* src = in + piece.n * k.in.n + h * k.in.h + position * k.in.w;
        if (planar) {
          const Partner partner = k.image_partner(k.in_partner, piece.n);
          const int64_t pairs = channels - !whole;
          stage_rows(row, planes.channel, src, k.in.c, pairs, k.w.in_step, in_row, pitch, partner);
          if (!whole)
            stage_rows(row + pairs * planes.channel, 0, src + pairs * k.in.c, 0, 1, k.w.in_step, in_row,
                       pitch, {});
        } else {
          const int64_t count = in_row.last - in_row.first;
          for (int64_t c = 0; c < channels; ++c) {
            fill_zero(row + c * planes.channel, in_row.first);
            fill_zero(row + c * planes.channel + in_row.last, pitch - in_row.last);
          }
          if (count)
            transpose_words(src + in_row.first * k.w.in_step * k.in.w, k.w.in_step * k.in.w, count, channels,
                            row + in_row.first, planes.channel, k.image_partner(k.in_partner, piece.n));
        }
      }
    }
  }
}

// Channels-last counterpart.
struct Pixels {
  int64_t row, column;  // from one staged row, one position to the next
  int64_t kept_step;
};
PYSEQNET_INLINE int64_t staged_positions(const Correlation& k, int64_t columns) {
  return (columns - 1) * k.w.in_step + k.w.reach();
}
PYSEQNET_INLINE int64_t staged_pixels_size(const Correlation& k, const BlockLimits& limits) {
  return limits.slots * staged_positions(k, limits.columns) * k.depth;
}
PYSEQNET_INLINE Pixels staged_pixels(const Correlation& k, const PixelBlock& block) {
  return {staged_positions(k, block.columns) * k.depth, k.depth, k.h.kept_step()};
}
// `count` pixels of `channels` elements each become `words` words each.
template <class T>
PYSEQNET_INLINE void copy_pixels(float* to, const T* from, int64_t count, int64_t stride, int64_t channels,
                                 int64_t words) {
  if constexpr (paired<T>) {
    // Neighbours are pairs already; an odd last channel is followed by a zero.
    uint16_t* dst = (uint16_t*)to;
    const bool dense = stride == channels && channels == 2 * words;
    const int64_t rows = dense ? 1 : count, length = dense ? count * channels : channels;
    for (int64_t u = 0; u < rows; ++u, dst += 2 * words, from += stride) {
      for (int64_t i = 0; i < length; i += VL) {
        const vh bits = load_bits_between((const uint16_t*)from + i, 0, length - i);
        if (length - i >= VL)
          *(vh_u*)(dst + i) = bits;
        else
          store_bits_n(dst + i, bits, length - i);
      }
      if (channels < 2 * words) dst[channels] = 0;
    }
  } else if (stride == channels) {
    copy_words(to, from, 1, count * channels);
  } else {
    for (int64_t u = 0; u < count; ++u) copy_words(to + u * words, from + u * stride, 1, channels);
  }
}
template <class T>
void stage_pixels(const Correlation& k, const PixelBlock& block, const Pixels& pixels, const T* in,
                  float* to) {
  if (k.taps() == 0) return;
  const int64_t D = k.depth;
  for (int64_t i = 0; i < block.piece_count; ++i) {
    const Piece& piece = block.pieces[i];
    const int64_t slots = (piece.rows - 1) * pixels.kept_step + k.h.reach();
    const int64_t positions = staged_positions(k, piece.columns);
    const int64_t position = piece.j0 * k.w.in_step + k.w.tap_offset;
    for (int64_t slot = 0; slot < slots; ++slot) {
      const int64_t h =
          (piece.i0 + slot / pixels.kept_step) * k.h.in_step + slot % pixels.kept_step + k.h.tap_offset;
      Inside in_row = inside_row(position, 1, k.w.in, positions);
      if (h < 0 || h >= k.h.in) in_row = {positions, positions};
      float* row = to + (piece.slot + slot) * pixels.row;
      const T* src = in + piece.n * k.in.n + h * k.in.h + (position + in_row.first) * k.in.w;
      const int64_t count = in_row.last - in_row.first;
      fill_zero(row, in_row.first * D);
      copy_pixels(row + in_row.first * D, src, count, k.in.w, k.channels, D);
      fill_zero(row + in_row.last * D, (positions - in_row.last) * D);
    }
  }
}

}  // namespace conv
}  // namespace PYSEQNET_ISA
}  // namespace pyseqnet
