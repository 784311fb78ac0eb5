// A compiled attention pattern: which keys each query sees, as data, in tiles of 64 queries x 64 keys.
//
// Per pattern head (one for all, or one a query head) and per tile of queries a list of the tiles of keys in
// which it sees anything, ascending. An entry is full (every pair of the tile that exists is visible: no
// arithmetic) or names one of a pool of bit tiles, in which equal tiles are stored once. What is in no list
// is empty and costs nothing. The same entries once more by tile of keys, for the gradients of keys and
// values.
//
//   row_begin      (heads * query_tiles + 1)   row r = head * query_tiles + query tile owns the entries
//                                              row_begin[r] .. row_begin[r + 1] of
//   row_entries    (entries)                   {key tile, bits}
//   column_begin   (heads * key_tiles + 1)     column c = head * key_tiles + key tile likewise of
//   column_entries (entries)                   {query tile, bits}
//   row_order      (heads * query_tiles)       rows by falling number of entries, for schedules that take the
//   column_order   (heads * key_tiles)         longest first
//   bits           (pool, 64)                  word i, bit j: query i of the tile sees its key j; 0 for
//                                              queries and keys that do not exist. No bit tile is all zero
//
// Tensors are int32 (bits: int64), dense, owned by the caller and on the device of the inputs. Causality, key
// lengths and masks stay what they are: a pair is visible if they and the pattern let it through. Built by
// pyseqnet/masks.py.
#pragma once
#include <cstdint>

#include "common/numerics.h"

namespace pyseqnet {

constexpr int64_t block_tile = 64;  // queries, and keys, of a tile
constexpr int32_t block_full = -1;  // in place of a bit tile

struct AttentionBlockEntry {
  int32_t tile;
  int32_t bits;  // index into the pool, or block_full
};

struct AttentionBlocks {
  const int32_t *row_begin = nullptr, *column_begin = nullptr, *row_order = nullptr, *column_order = nullptr;
  const AttentionBlockEntry *row_entries = nullptr, *column_entries = nullptr;
  const uint64_t* bits = nullptr;
};

PYSEQNET_HOST_DEVICE int64_t block_tiles_of(int64_t positions) {
  return (positions + block_tile - 1) / block_tile;
}
// The keys of an entry's tile that one of its queries (0 .. 63) sees.
PYSEQNET_HOST_DEVICE uint64_t block_row_bits(const AttentionBlocks& blocks, AttentionBlockEntry entry,
                                             int64_t query) {
  return entry.bits == block_full ? ~uint64_t(0) : blocks.bits[entry.bits * block_tile + query];
}

// The entry of a tile of keys in a row's list, or null.
PYSEQNET_HOST_DEVICE const AttentionBlockEntry* find_block(const AttentionBlocks& blocks, int64_t row,
                                                           int64_t key_tile) {
  int32_t begin = blocks.row_begin[row], end = blocks.row_begin[row + 1];
  while (begin < end) {
    const int32_t middle = begin + (end - begin) / 2;
    if (blocks.row_entries[middle].tile < key_tile)
      begin = middle + 1;
    else
      end = middle;
  }
  const bool found = begin < blocks.row_begin[row + 1] && blocks.row_entries[begin].tile == key_tile;
  return found ? blocks.row_entries + begin : nullptr;
}
// Whether query i sees key j; `row` is that of i's tile.
PYSEQNET_HOST_DEVICE bool block_sees(const AttentionBlocks& blocks, int64_t row, int64_t i, int64_t j) {
  const AttentionBlockEntry* entry = find_block(blocks, row, j / block_tile);
  return entry && block_row_bits(blocks, *entry, i % block_tile) >> (j % block_tile) & 1;
}

}  // namespace pyseqnet
