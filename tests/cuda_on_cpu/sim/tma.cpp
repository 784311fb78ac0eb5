// TMA and bulk copies. Loads happen at a random later moment, then complete their mbarrier; stores happen
// when their group is waited for. Each is an agent with a clock of its own: reading too early is a race,
// whatever the schedule was. Maps are held against the limits of cuTensorMapEncodeTiled and -Im2col, boxes
// against shared memory; what lies outside the tensor is zero.
#include <algorithm>

#include "internal.h"

namespace cusim {
void fence_async_proxy(bool global) {
  (global ? cur->p->global_fence_clock : cur->p->fence_clock) = cur->p->clock;
  if (checks_on) cur->p->clock++;
}

// ---------------------------------------------------------------- maps
static constexpr int most_dimensions = 5;

// What both kinds of map have in common.
static bool common_rules(const TensorMap& m, int least_rank) {
  const char* what = "TMA MAP";
  if (m.rank < least_rank || m.rank > most_dimensions) {
    report("%s: %d dimensions, %d to %d are possible", what, m.rank, least_rank, most_dimensions);
    return false;
  }
  if ((uintptr_t)m.base % 16) {
    report("%s: the tensor's address is not a multiple of 16", what);
    return false;
  }
  for (int i = 0; i < m.rank; i++) {
    if (!m.extent[i] || m.extent[i] > 1ull << 32) {
      report("%s: dimension %d has %llu elements", what, i, (unsigned long long)m.extent[i]);
      return false;
    }
    if (i && (m.stride[i] % 16 || m.stride[i] >= 1ull << 40)) {
      report("%s: the stride of dimension %d, %llu bytes, is not a multiple of 16 below 2^40", what, i,
             (unsigned long long)m.stride[i]);
      return false;
    }
    if (!m.step[i] || m.step[i] > 8) {
      report("%s: the step of dimension %d is %u, 1 to 8 are possible", what, i, m.step[i]);
      return false;
    }
  }
  if (m.swizzle != 0 && m.swizzle != 32 && m.swizzle != 64 && m.swizzle != 128) {
    report("%s: a swizzle of %d bytes", what, m.swizzle);
    return false;
  }
  return true;
}
// Stricter than the driver, which takes shorter rows: how those lie in swizzled memory is not documented.
static bool row_rules(const TensorMap& m, uint32_t row_bytes) {
  if (m.swizzle && row_bytes != (uint32_t)m.swizzle)
    report("TMA MAP: rows of %u bytes with a swizzle of %d", row_bytes, m.swizzle);
  else if (!row_bytes || row_bytes % 16)
    report("TMA MAP: rows of %u bytes, not a multiple of 16", row_bytes);
  else
    return true;
  return false;
}
int check_tiled(const TensorMap& m) {
  if (!common_rules(m, 1)) return 1;
  for (int i = 0; i < m.rank; i++)
    if (!m.box[i] || m.box[i] > 256) {
      report("TMA MAP: the box has %u elements in dimension %d, 1 to 256 are possible", m.box[i], i);
      return 1;
    }
  return !row_rules(m, m.box[0] * m.element_bytes);
}
int check_im2col(const TensorMap& m) {
  if (!common_rules(m, 3)) return 1;
  const int limit = m.rank == 3 ? 32768 : m.rank == 4 ? 128 : 16;
  for (int i = 0; i < m.rank - 2; i++) {
    for (int corner : {m.lower[i], m.upper[i]})
      if (corner < -limit || corner >= limit) {
        report("TMA MAP: a corner of %d in dimension %d, %d to %d are possible", corner, i + 1, -limit,
               limit - 1);
        return 1;
      }
    if ((int64_t)m.extent[i + 1] + m.upper[i] - m.lower[i] <= 0) {
      report("TMA MAP: the box of pixels is empty in dimension %d", i + 1);
      return 1;
    }
  }
  if (!m.channels || m.channels > 256 || !m.pixels || m.pixels > 1024) {
    report("TMA MAP: %u channels of %u pixels; at most 256 and 1024 are possible", m.channels, m.pixels);
    return 1;
  }
  return !row_rules(m, m.channels * m.element_bytes);
}

// ---------------------------------------------------------------- what a box is made of
// One row of a box: its elements lie side by side in global and in shared memory.
struct Row {
  char* global = nullptr;       // of the first element inside; null where the row is outside
  uint32_t first = 0, end = 0;  // elements of the row that are inside the tensor
};
struct Box {
  uint32_t row_bytes = 0;
  std::vector<Row> rows;
  uint32_t bytes() const { return row_bytes * (uint32_t)rows.size(); }
};
// The row of `length` elements at these coordinates; i > 0 may be anywhere, dimension 0 is clipped.
static Row row_at(const TensorMap& m, const int64_t* at, uint32_t length) {
  char* p = m.base;
  for (int i = 1; i < m.rank; i++) {
    if (at[i] < 0 || at[i] >= (int64_t)m.extent[i]) return {};
    p += at[i] * (int64_t)m.stride[i];
  }
  const int64_t first = std::max<int64_t>(0, -at[0]);
  const int64_t end = std::min<int64_t>(length, (int64_t)m.extent[0] - at[0]);
  if (first >= end) return {};
  return {p + (at[0] + first) * m.element_bytes, (uint32_t)first, (uint32_t)end};
}
static Box tiled_box(const TensorMap& m, const int* at) {
  Box box;
  box.row_bytes = m.box[0] * m.element_bytes;
  uint32_t count[most_dimensions] = {1, 1, 1, 1, 1}, i[most_dimensions] = {};
  for (int d = 1; d < m.rank; d++) count[d] = (m.box[d] + m.step[d] - 1) / m.step[d];
  for (;;) {
    int64_t x[most_dimensions];
    for (int d = 0; d < m.rank; d++) x[d] = (int64_t)at[d] + i[d] * m.step[d];
    box.rows.push_back(row_at(m, x, m.box[0]));
    int d = 1;
    while (d < m.rank && ++i[d] == count[d]) i[d++] = 0;
    if (d >= m.rank) return box;
  }
}
static Box im2col_box(const TensorMap& m, const int* at, const uint16_t* tap, void* pc) {
  const int spatial = m.rank - 2;
  const uint32_t offset_limit = m.rank == 3 ? 65536 : m.rank == 4 ? 256 : 32;
  int64_t x[most_dimensions], high[3];
  for (int d = 0; d < m.rank; d++) x[d] = at[d];
  for (int s = 0; s < spatial; s++) {
    high[s] = (int64_t)m.extent[s + 1] + m.upper[s];
    if (tap[s] >= offset_limit)
      fail("TMA IM2COL: the offset %u of dimension %d is not below %u, at %s", tap[s], s + 1, offset_limit,
           where(pc).c_str());
    if (x[s + 1] < m.lower[s] || x[s + 1] >= high[s] || (x[s + 1] - m.lower[s]) % m.step[s + 1])
      fail(
          "TMA IM2COL: coordinate %d of dimension %d is no pixel of the box [%d, %lld) in steps of %u, at %s",
          at[s + 1], s + 1, m.lower[s], (long long)high[s], m.step[s + 1], where(pc).c_str());
  }
  Box box;
  box.row_bytes = m.channels * m.element_bytes;
  for (uint32_t pixel = 0; pixel < m.pixels; pixel++) {
    int64_t seen[most_dimensions];
    for (int d = 0; d < m.rank; d++) seen[d] = x[d] + (d >= 1 && d <= spatial ? tap[d - 1] : 0);
    box.rows.push_back(row_at(m, seen, m.channels));
    int s = 0;
    for (; s < spatial; s++) {
      x[s + 1] += m.step[s + 1];
      if (x[s + 1] < high[s]) break;
      x[s + 1] = m.lower[s];
    }
    if (s == spatial) x[m.rank - 1] += m.step[m.rank - 1];
  }
  return box;
}

// ---------------------------------------------------------------- loads
static void post(std::function<void()> f) {
  stats.async_ops++;
  if (opt.async_mode == 1)
    f();
  else
    running.async.push_back(std::move(f));
}
static uint32_t copy_agent() { return clock_index(cur, agent_bulk_load); }
static constexpr uint32_t offset_of(uint32_t shared_address) { return shared_address & 0xFFFFFF; }

// Shared memory is moved in chunks of 16 bytes: what a swizzle exchanges.
static constexpr uint32_t chunk = 16;
static void read_row(const TensorMap& m, const Row& row, uint32_t c, char* to) {
  const uint32_t first = std::max(c, row.first * m.element_bytes);
  const uint32_t end = std::min(c + chunk, row.end * m.element_bytes);
  memset(to, 0, chunk);
  if (row.global && first < end)
    memcpy(to + (first - c), row.global + (first - row.first * m.element_bytes), end - first);
}
static void check_destination(const TensorMap& m, uint32_t offset, uint32_t bytes, Block* b, void* pc,
                              const char* what) {
  if (offset % 128)
    fail("TMA: the address in shared memory is not a multiple of 128, at %s", where(pc).c_str());
  if (m.swizzle && offset % (8 * m.swizzle))
    fail("TMA: a swizzle of %d bytes needs a multiple of %d in shared memory, at %s", m.swizzle,
         8 * m.swizzle, where(pc).c_str());
  if (!shared_valid(b, offset, bytes))
    fail("OUT OF BOUNDS: TMA %s of %u bytes at shared offset %u, at %s", what, bytes, offset,
         where(pc).c_str());
}
static void load_box(uint32_t dst, const TensorMap& m, Box&& found, uint32_t mbar, uint16_t blocks,
                     void* pc) {
  std::vector<Block*> targets;
  if (!blocks) targets.push_back(address_block(dst));
  const auto& cluster = cur->blk->cluster->b;
  for (size_t r = 0; r < 16; r++)
    if (blocks >> r & 1) {
      if (r >= cluster.size()) fail("CLUSTER: multicast to rank %zu of a cluster of %zu", r, cluster.size());
      if (!cluster[r]->live) fail("CLUSTER: multicast into a block that has already exited");
      targets.push_back(cluster[r]);
    }
  const uint32_t offset = offset_of(dst), bar_offset = offset_of(mbar), bytes = found.bytes();
  for (Block* b : targets) {
    check_destination(m, offset, bytes, b, pc, "write");
    access_async(b->window + offset, bytes, true, agent_bulk_load, pc, true);
  }
  for (const Row& row : found.rows)
    if (row.global)
      access_async(row.global, (row.end - row.first) * m.element_bytes, false, agent_bulk_load, pc, true);
  mbar_at(mbar, "TMA completion");
  Block* bar_block = blocks ? nullptr : address_block(mbar);
  const uint32_t agent = copy_agent(), clock = cur->p->async_clock[agent_bulk_load]++;
  post([=, box = std::move(found)] {
    for (Block* b : targets) {
      for (uint32_t r = 0; r < box.rows.size(); r++)
        for (uint32_t c = 0; c < box.row_bytes; c += chunk)
          read_row(m, box.rows[r], c, b->window + swizzled(offset + r * box.row_bytes + c, m.swizzle));
      complete_tx(blocks ? b : bar_block, bar_offset, bytes, agent, clock);
    }
  });
}
static void check_rank(const TensorMap& m, int rank, bool im2col, void* pc) {
  if (m.rank != rank || m.im2col != im2col)
    fail("TMA: %d coordinates of an %s for a map of %d and %s, at %s", rank,
         im2col ? "im2col load" : "tiled copy", m.rank, m.im2col ? "im2col" : "tiled", where(pc).c_str());
}
__attribute__((noinline)) void tma_load(uint32_t dst, const TensorMap* m, int rank, const int* at,
                                        uint32_t mbar, uint16_t blocks) {
  void* pc = CUSIM_PC;
  check_rank(*m, rank, false, pc);
  load_box(dst, *m, tiled_box(*m, at), mbar, blocks, pc);
}
__attribute__((noinline)) void tma_load_im2col(uint32_t dst, const TensorMap* m, int rank, const int* at,
                                               const uint16_t* tap, uint32_t mbar, uint16_t blocks) {
  void* pc = CUSIM_PC;
  check_rank(*m, rank, true, pc);
  load_box(dst, *m, im2col_box(*m, at, tap, pc), mbar, blocks, pc);
}
__attribute__((noinline)) void bulk_load(uint32_t dst, const void* src, uint32_t bytes, uint32_t mbar) {
  void* pc = CUSIM_PC;
  if (dst % 16 || bytes % 16 || (uintptr_t)src % 16)
    fail("cp.async.bulk: an address or the size is not a multiple of 16, at %s", where(pc).c_str());
  char* d = smem_ptr(dst, bytes, "cp.async.bulk write");
  access_async(d, bytes, true, agent_bulk_load, pc, true);
  access_async(src, bytes, false, agent_bulk_load, pc, true);
  mbar_at(mbar, "bulk completion");
  const uint32_t agent = copy_agent(), clock = cur->p->async_clock[agent_bulk_load]++,
                 bar_offset = offset_of(mbar);
  Block* b = address_block(mbar);
  post([=] {
    memcpy(d, src, bytes);
    complete_tx(b, bar_offset, bytes, agent, clock);
  });
}

// ---------------------------------------------------------------- stores
template <class T>
static T read_as(const char* p) {
  T v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
static void write_as(char* p, T v) {
  memcpy(p, &v, sizeof v);
}
static void add_to(char* to, const char* from, uint32_t bytes, Numbers numbers) {
  const uint32_t size = numbers == Numbers::f64 ? 8 : numbers == Numbers::f32 ? 4 : 2;
  for (uint32_t i = 0; i < bytes; i += size) {
    if (numbers == Numbers::f64)
      write_as(to + i, read_as<double>(to + i) + read_as<double>(from + i));
    else if (numbers == Numbers::f32)
      write_as(to + i, read_as<float>(to + i) + read_as<float>(from + i));
    else if (numbers == Numbers::bf16)
      write_as(to + i, __float2bfloat16(__bfloat162float(read_as<__nv_bfloat16>(to + i)) +
                                        __bfloat162float(read_as<__nv_bfloat16>(from + i))));
    else
      write_as(to + i,
               __float2half(__half2float(read_as<__half>(to + i)) + __half2float(read_as<__half>(from + i))));
  }
}
static void note_write(const void* p, size_t bytes, bool add, void* pc) {
  if (checks_on)
    check_access(p, bytes, true, kAsync | (add ? kAtomic : 0), pc, agent_bulk_write,
                 cur->p->async_clock[agent_bulk_write], true);
}
__attribute__((noinline)) void tma_store(const TensorMap* map, uint32_t src, int rank, const int* at,
                                         bool add) {
  void* pc = CUSIM_PC;
  const TensorMap m = *map;
  check_rank(m, rank, false, pc);
  Box box = tiled_box(m, at);
  Block* b = cur->blk;
  const uint32_t offset = offset_of(src);
  check_destination(m, offset, box.bytes(), b, pc, "read");
  access_async(b->window + offset, box.bytes(), false, agent_bulk_read, pc, true);
  for (const Row& row : box.rows)
    if (row.global) note_write(row.global, (row.end - row.first) * m.element_bytes, add, pc);
  cur->p->bulk_open.push_back([=, box = std::move(box)] {
    for (uint32_t r = 0; r < box.rows.size(); r++) {
      const Row& row = box.rows[r];
      if (!row.global) continue;
      const uint32_t first = row.first * m.element_bytes, end = row.end * m.element_bytes;
      for (uint32_t c = first / chunk * chunk; c < end; c += chunk) {
        const uint32_t low = std::max(c, first), high = std::min(c + chunk, end);
        const char* from = b->window + swizzled(offset + r * box.row_bytes + c, m.swizzle) + (low - c);
        if (add)
          add_to(row.global + (low - first), from, high - low, m.numbers);
        else
          memcpy(row.global + (low - first), from, high - low);
      }
    }
  });
}
__attribute__((noinline)) void bulk_store(void* dst, uint32_t src, uint32_t bytes, Numbers add) {
  void* pc = CUSIM_PC;
  if (src % 16 || bytes % 16 || (uintptr_t)dst % 16)
    fail("cp.async.bulk: an address or the size is not a multiple of 16, at %s", where(pc).c_str());
  const char* s = smem_ptr(src, bytes, "cp.async.bulk read");
  access_async(s, bytes, false, agent_bulk_read, pc, true);
  note_write(dst, bytes, add != Numbers::none, pc);
  cur->p->bulk_open.push_back([=] {
    if (add == Numbers::none)
      memcpy(dst, s, bytes);
    else
      add_to((char*)dst, s, bytes, add);
  });
}
// Stores into the memory of a block of the cluster.
__attribute__((noinline)) void st_async(uint32_t addr, const float* v, int n, uint32_t mbar) {
  void* pc = CUSIM_PC;
  const uint32_t bytes = uint32_t(n) * 4;
  if (addr % bytes) fail("st.async: the address is not a multiple of %u, at %s", bytes, where(pc).c_str());
  if (address_block(addr) != address_block(mbar))
    fail("st.async: address and mbarrier belong to different blocks, at %s", where(pc).c_str());
  char* d = smem_ptr(addr, bytes, "st.async");
  access_async(d, bytes, true, agent_bulk_load, pc, false);
  mbar_at(mbar, "st.async");
  const uint32_t agent = copy_agent(), clock = cur->p->async_clock[agent_bulk_load]++,
                 bar_offset = offset_of(mbar);
  Block* b = address_block(mbar);
  std::vector<float> values(v, v + n);
  post([=] {
    memcpy(d, values.data(), bytes);
    complete_tx(b, bar_offset, bytes, agent, clock);
  });
}

// Stores of a group happen at the first wait that covers it. A wait for reads joins the reads of shared memory
// only: whoever uses the results must wait for the whole.
void bulk_commit() {
  auto* p = cur->p;
  p->bulk_groups.push_back(std::move(p->bulk_open));
  p->bulk_open.clear();
  p->async_clock[agent_bulk_read]++;
  p->async_clock[agent_bulk_write]++;
}
void bulk_wait(int n, bool read) {
  auto* p = cur->p;
  while ((int)p->bulk_groups.size() > n) {
    for (auto& f : p->bulk_groups.front()) f();
    p->bulk_groups.pop_front();
    stats.async_ops++;
  }
  const auto join = [&](int agent) {
    const uint32_t done = p->async_clock[agent] - 1 - (uint32_t)p->bulk_groups.size();
    p->async_seen[agent] = std::max(p->async_seen[agent], done);
  };
  join(agent_bulk_read);
  if (!read) join(agent_bulk_write);
}

}  // namespace cusim
