// cp.async and mbarriers. cp.async data moves at its wait_group, or at issue (a coin flip). It is an agent with
// a clock of its own: reading too early is a race, whatever the schedule was.
#include <algorithm>

#include "internal.h"

namespace cusim {
static bool eager() { return opt.async_mode == 1 || (opt.async_mode < 0 && (rng() & 1)); }
static void do_copy(const Copy& c) {
  if (c.src_bytes) memcpy(c.dst, c.src, c.src_bytes);
  if (c.src_bytes < c.bytes) memset(c.dst + c.src_bytes, 0, c.bytes - c.src_bytes);
  stats.async_ops++;
}
__attribute__((noinline)) void cp_async(uint32_t dst, const void* src, int bytes, int src_bytes) {
  void* pc = CUSIM_PC;
  if (bytes != 4 && bytes != 8 && bytes != 16) fail("cp.async size %d", bytes);
  if ((dst % bytes) || (src_bytes && (uintptr_t)src % bytes))
    fail("cp.async: misaligned address, at %s", where(pc).c_str());
  char* d = smem_ptr(dst, bytes, "cp.async write");
  Copy c{d, (const char*)src, bytes, src_bytes};
  access_async(d, bytes, true, agent_cp_async, pc, false);
  if (src_bytes) access_async(src, src_bytes, false, agent_cp_async, pc, false);
  if (eager())
    do_copy(c);
  else
    cur->p->copies_open.push_back(c);
}
void cp_async_commit() {
  auto* p = cur->p;
  p->copy_groups.push_back(std::move(p->copies_open));
  p->copies_open.clear();
  p->async_clock[agent_cp_async]++;
}
void cp_async_wait(int n) {
  auto* p = cur->p;
  if (n < 0) cp_async_commit();  // wait_all
  int keep = n < 0 ? 0 : n;
  while ((int)p->copy_groups.size() > keep) {
    for (auto& c : p->copy_groups.front()) do_copy(c);
    p->copy_groups.pop_front();
  }
  uint32_t done = p->async_clock[agent_cp_async] - 1 - (uint32_t)p->copy_groups.size();
  if (done > p->async_seen[agent_cp_async]) p->async_seen[agent_cp_async] = done;
}

// ---------------------------------------------------------------- mbarrier
static const uint32_t kMagic = 0x4D424152;
MBarrier& mbar_at(uint32_t a, const char* op) {
  if (a & 7) fail("%s: mbarrier address not 8-byte aligned", op);
  char* p = smem_ptr(a, 8, op);
  uint32_t v[2];
  memcpy(v, p, 8);
  Block* b = address_block(a);
  if (v[0] != kMagic || v[1] >= b->mbarriers.size())
    fail("%s: no initialised mbarrier at shared offset %u", op, a & 0xFFFFFF);
  return b->mbarriers[v[1]];
}
void mbar_init(uint32_t a, uint32_t count) {
  char* p = smem_ptr(a, 8, "mbarrier.init");
  access(p, 8, true, 0, CUSIM_PC);
  Block* b = address_block(a);
  MBarrier m;
  if (!count || count >= 1u << 20) fail("mbarrier.init: a count of %u", count);
  m.count = m.pending = count;
  b->mbarriers.push_back(m);
  uint32_t v[2] = {kMagic, (uint32_t)b->mbarriers.size() - 1};
  memcpy(p, v, 8);
}
void mbar_inval(uint32_t a) {
  char* p = smem_ptr(a, 8, "mbarrier.inval");
  memset(p, 0xFF, 8);
}
static void mbar_check(MBarrier& m) {
  if (m.pending == 0 && m.tx == 0) {
    m.phase++;
    m.pending = m.count;
    m.done = m.pend;
    running.idle = 0;
    for (Thread* t : m.wait) wake(t);
    m.wait.clear();
  }
}
void mbar_arrive(uint32_t a, uint32_t count, uint32_t tx) {
  MBarrier& m = mbar_at(a, "mbarrier.arrive");
  access(smem_ptr(a, 8, ""), 8, true, kAtomic, CUSIM_PC);
  clock_release(cur, m.pend);
  if (m.pending < count)
    fail("mbarrier.arrive: more arrivals than the expected %u in phase %u", m.count, m.phase);
  m.tx += tx;
  m.pending -= count;
  mbar_check(m);
}
// The copies happen now, the arrival later: whoever reads them before the phase ends is told of a race.
void mbar_arrive_cp_async(uint32_t a) {
  mbar_at(a, "cp.async.mbarrier.arrive");
  access(smem_ptr(a, 8, ""), 8, true, kAtomic, CUSIM_PC);
  auto* p = cur->p;
  for (auto& group : p->copy_groups) {
    for (auto& c : group) do_copy(c);
    group.clear();
  }
  for (auto& c : p->copies_open) do_copy(c);
  p->copies_open.clear();
  const uint32_t agent = clock_index(cur, agent_cp_async), clock = p->async_clock[agent_cp_async]++;
  Block* b = address_block(a);
  const uint32_t offset = a & 0xFFFFFF;
  running.async.push_back([=] {
    uint32_t v[2];
    memcpy(v, b->window + offset, 8);
    if (v[0] == kMagic) b->mbarriers[v[1]].pending--;
    complete_tx(b, offset, 0, agent, clock);
  });
}
void mbar_expect_tx(uint32_t a, uint32_t tx) {
  MBarrier& m = mbar_at(a, "mbarrier.expect_tx");
  access(smem_ptr(a, 8, ""), 8, true, kAtomic, CUSIM_PC);
  m.tx += tx;
}
bool mbar_try_wait(uint32_t a, uint32_t parity) {
  {
    MBarrier& m = mbar_at(a, "mbarrier.try_wait");
    access(smem_ptr(a, 8, ""), 8, false, kAtomic, CUSIM_PC);
    if ((m.phase & 1) != (parity & 1)) {
      clock_acquire(cur, m.done);
      return true;
    }
  }
  yield(CUSIM_PC);
  MBarrier& m = mbar_at(a, "mbarrier.try_wait");
  if ((m.phase & 1) != (parity & 1)) {
    clock_acquire(cur, m.done);
    return true;
  }
  return false;
}
void mbar_wait(uint32_t a, uint32_t parity) {
  access(smem_ptr(a, 8, "mbarrier wait"), 8, false, kAtomic, CUSIM_PC);
  for (;;) {
    MBarrier& m = mbar_at(a, "mbarrier wait");
    if ((m.phase & 1) != (parity & 1)) {
      clock_acquire(cur, m.done);
      return;
    }
    m.wait.push_back(cur);
    park("mbarrier wait, smem offset", a, CUSIM_PC);
  }
}

void complete_tx(Block* b, uint32_t off, uint32_t bytes, uint32_t agent, uint32_t clock) {
  uint32_t v[2];
  memcpy(v, b->window + off, 8);
  if (v[0] != kMagic) {
    report("mbarrier overwritten before the transfer that it waits for was complete");
    return;
  }
  MBarrier& m = b->mbarriers[v[1]];
  m.tx -= bytes;
  clock_add_agent(m.pend, agent, clock);
  mbar_check(m);
}

}  // namespace cusim
