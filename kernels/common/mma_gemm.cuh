// The inside of a tensor-core product of 16-bit matrices: tiles of both operands in shared memory, fragments
// by ldmatrix, mma.sync m16n8k16 with sums in float. What is loaded into the tiles, and where sums go, is the
// kernel's.
//
// 256 threads, 128 x 128 results, 32 depths a stage. Each of 8 warps computes 64 x 32. An operand lies in its
// tile as it lies in memory, so that 16 bytes are copied at a time:
//   along depth   tile[line][depth]   rows of 40 elements (80 bytes)
//   along lines   tile[depth][line]   rows of 136 elements (272 bytes), read by ldmatrix.trans
// Both strides put the eight rows of an 8 x 8 matrix into eight different groups of banks.
#pragma once
#include "common/ptx.cuh"

namespace pyseqnet {

constexpr int mma_threads = 256;
constexpr int mma_lines = 128, mma_depth = 32;
constexpr int mma_warp_rows = 64, mma_warp_columns = 32;

template <bool along_depth>
struct MmaTile {
  static constexpr int stride = (along_depth ? mma_depth : mma_lines) + 8;
  static constexpr int elements = stride * (along_depth ? mma_lines : mma_depth);
  PYSEQNET_HOST_DEVICE static constexpr int at(int line, int depth) {
    return along_depth ? line * stride + depth : depth * stride + line;
  }
};

struct MmaSums {
  float value[mma_warp_rows / 16][mma_warp_columns / 8][4];
};

// The place of a thread's results in the block's 128 x 128: value[i][j][e] is row_of(i, e), column_of(j, e).
struct MmaPlace {
  int row, column, lane;
  PYSEQNET_DEVICE explicit MmaPlace(int thread)
      : row(thread / 32 / 4 * mma_warp_rows), column(thread / 32 % 4 * mma_warp_columns), lane(thread % 32) {}
  PYSEQNET_DEVICE int row_of(int i, int e) const { return row + i * 16 + lane / 4 + e / 2 * 8; }
  PYSEQNET_DEVICE int column_of(int j, int e) const { return column + j * 8 + lane % 4 * 2 + e % 2; }
};

// Adds the product of two tiles, 32 depths.
template <bool row_along, bool column_along, class T>
PYSEQNET_DEVICE void multiply_tiles(MmaSums& sums, const T* rows, const T* columns, const MmaPlace& at) {
  const int octet = at.lane / 8, within = at.lane % 8;
  const uint32_t row_tile = ptx::smem_u32(rows), column_tile = ptx::smem_u32(columns);
#pragma unroll
  for (int k = 0; k < mma_depth; k += 16) {
    uint32_t b[mma_warp_columns / 8][2];
#pragma unroll
    for (int j = 0; j < mma_warp_columns / 16; j++) {
      // Matrices: columns 0-7 with depths 0-7 and 8-15, then columns 8-15.
      const int column = at.column + j * 16 + octet / 2 * 8, depth = k + octet % 2 * 8;
      uint32_t r[4];
      if constexpr (column_along)
        ptx::ldmatrix_x4(r, column_tile + 2 * MmaTile<true>::at(column + within, depth));
      else
        ptx::ldmatrix_x4_trans(r, column_tile + 2 * MmaTile<false>::at(column, depth + within));
      b[2 * j][0] = r[0], b[2 * j][1] = r[1], b[2 * j + 1][0] = r[2], b[2 * j + 1][1] = r[3];
    }
#pragma unroll
    for (int i = 0; i < mma_warp_rows / 16; i++) {
      // Matrices: rows 0-7 and 8-15 with depths 0-7, then depths 8-15.
      const int row = at.row + i * 16 + octet % 2 * 8, depth = k + octet / 2 * 8;
      uint32_t a[4];
      if constexpr (row_along)
        ptx::ldmatrix_x4(a, row_tile + 2 * MmaTile<true>::at(row + within, depth));
      else
        ptx::ldmatrix_x4_trans(a, row_tile + 2 * MmaTile<false>::at(row, depth + within));
#pragma unroll
      for (int j = 0; j < mma_warp_columns / 8; j++)
        ptx::mma_m16n8k16<T>(sums.value[i][j], a, b[j], sums.value[i][j]);
    }
  }
}

}  // namespace pyseqnet
