// A random attention pattern as the tile lists of attention_blocks.h, built pair by pair: for tests.
#pragma once
#include <algorithm>
#include <functional>
#include <numeric>
#include <vector>

#include "attention/attention_blocks.h"

namespace pyseqnet::testing {

struct PatternLists {
  std::vector<int32_t> row_begin, column_begin, row_order, column_order;
  std::vector<AttentionBlockEntry> row_entries, column_entries;
  std::vector<uint64_t> bits;

  // sees(head, i, j)
  PatternLists(int64_t heads, int64_t L, int64_t S,
               const std::function<bool(int64_t, int64_t, int64_t)>& sees) {
    const int64_t rows = block_tiles_of(L), columns = block_tiles_of(S);
    std::vector<std::vector<AttentionBlockEntry>> by_row(size_t(heads * rows)),
        by_column(size_t(heads * columns));
    for (int64_t h = 0; h < heads; h++)
      for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < columns; c++) {
          uint64_t words[block_tile] = {};
          bool any = false, full = true;
          for (int64_t i = r * block_tile; i < std::min(L, (r + 1) * block_tile); i++)
            for (int64_t j = c * block_tile; j < std::min(S, (c + 1) * block_tile); j++) {
              const bool one = sees(h, i, j);
              any |= one, full &= one;
              words[i % block_tile] |= uint64_t(one) << (j % block_tile);
            }
          if (!any) continue;
          const int32_t kind = full ? block_full : int32_t(bits.size() / block_tile);
          if (!full) bits.insert(bits.end(), words, words + block_tile);
          by_row[size_t(h * rows + r)].push_back({int32_t(c), kind});
          by_column[size_t(h * columns + c)].push_back({int32_t(r), kind});
        }
    lay_out(by_row, row_begin, row_entries, row_order);
    lay_out(by_column, column_begin, column_entries, column_order);
  }

 private:
  static void lay_out(const std::vector<std::vector<AttentionBlockEntry>>& lists, std::vector<int32_t>& begin,
                      std::vector<AttentionBlockEntry>& entries, std::vector<int32_t>& order) {
    begin = {0};
    for (const auto& list : lists) {
      entries.insert(entries.end(), list.begin(), list.end());
      begin.push_back(int32_t(entries.size()));
    }
    order.resize(lists.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int32_t a, int32_t b) { return lists[size_t(a)].size() > lists[size_t(b)].size(); });
  }
};

}  // namespace pyseqnet::testing
