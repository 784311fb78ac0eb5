// The one inner loop of general convolution: a register tile of R rows x NV vectors of sums.
//
//   c[i][lane] = start + sum over k of  a[i][k] * b[k][lane]
//
// a is read by broadcast through row pointers, b as contiguous vectors. The depth k is a list of runs: each
// is contiguous in every row of a, at its own offset, so that rows may be taps of an image, pixels of a
// channels-last image or filters, read where they lie. What is a row and what is a lane is up to the caller:
//
//                       rows (a)               lanes (b)             depth
//   planar image        filters                pixels                channel, tap
//   channels-last       pixels                 filters               tap, channel
//   weight gradient     channel, tap           filters               pixels
//
// Bound: FMA. A full tile has 24 (AVX-512) or 12 accumulators, enough to hide the latency of the multiply-add
// and to load one vector for every 2 to 6 of them.
#pragma once
#include "common/simd.h"

namespace pyseqnet {
inline namespace PYSEQNET_ISA {
namespace conv {

constexpr int TILE_VECTORS = 4;  // the widest tile
constexpr int TILE_LANES = TILE_VECTORS * VL;
constexpr int TILE_ROWS = 12;  // the tallest tile
// Rows of a full tile: what the register file holds beside one row of b and one broadcast.
constexpr int tile_rows(int vectors) {
  const int rows = (VL == 16 ? 24 : 12) / vectors;
  return rows < TILE_ROWS ? rows : TILE_ROWS;
}

struct Run {
  int64_t offset, length;
};

struct TileJob {
  const float* const* a;  // one pointer a row
  const Run* runs;
  int64_t run_count;
  const float* b;
  int64_t b_stride;
  const float* start;  // sums to go on from, rows start_stride apart (0: the same for all rows), or null
  int64_t start_stride;
  const float* row_start;  // used when start is null: one value a row, or null for zero
  float* const* c;         // one pointer a row
  int last_lanes;          // lanes stored of the last vector, 1 .. VL
  bool narrow = false;     // c points to bfloat16 (only where tiles multiply pairs of it)
};

// 1 <= rows <= tile_rows(vectors). Reads whole vectors of b and start, stores only valid lanes.
void run_tile(int rows, int vectors, const TileJob& job);

// Calls f(first, rows) for tiles of nearly equal height: 32 rows as 6,6,5,5,5,5 and not 6,6,6,6,6,2.
template <class F>
PYSEQNET_INLINE void for_even_tiles(int64_t count, int64_t most, F&& f) {
  const int64_t tiles = (count + most - 1) / most;
  int64_t first = 0;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t n = (count - first + tiles - t - 1) / (tiles - t);
    f(first, n);
    first += n;
  }
}

}  // namespace conv
}  // namespace PYSEQNET_ISA
}  // namespace pyseqnet
