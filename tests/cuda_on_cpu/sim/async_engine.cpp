// Copies that run beside the thread that issued them. cp.async data moves at its wait_group, or at issue (a
// coin flip); TMA data at a random later moment, then it completes its mbarrier. Each is an agent with a
// clock of its own: reading too early is a race, whatever the schedule was.
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
  access_async(d, bytes, true, 1, pc, false);
  if (src_bytes) access_async(src, src_bytes, false, 1, pc, false);
  if (eager())
    do_copy(c);
  else
    cur->p->copies_open.push_back(c);
}
void cp_async_commit() {
  auto* p = cur->p;
  p->copy_groups.push_back(std::move(p->copies_open));
  p->copies_open.clear();
  p->async_clock[0]++;
}
void cp_async_wait(int n) {
  auto* p = cur->p;
  if (n < 0) cp_async_commit();  // wait_all
  int keep = n < 0 ? 0 : n;
  while ((int)p->copy_groups.size() > keep) {
    for (auto& c : p->copy_groups.front()) do_copy(c);
    p->copy_groups.pop_front();
  }
  uint32_t done = p->async_clock[0] - 1 - (uint32_t)p->copy_groups.size();
  if (done > p->async_seen[0]) p->async_seen[0] = done;
}

// ---------------------------------------------------------------- mbarrier
static const uint32_t kMagic = 0x4D424152;
static MBarrier& mbar_at(uint32_t a, const char* op, Block** bo = nullptr) {
  if (a & 7) fail("%s: mbarrier address not 8-byte aligned", op);
  char* p = smem_ptr(a, 8, op);
  uint32_t v[2];
  memcpy(v, p, 8);
  Block* b = address_block(a);
  if (v[0] != kMagic || v[1] >= b->mbarriers.size())
    fail("%s: no initialised mbarrier at shared offset %u", op, a & 0xFFFFFF);
  if (bo) *bo = b;
  return b->mbarriers[v[1]];
}
void mbar_init(uint32_t a, uint32_t count) {
  char* p = smem_ptr(a, 8, "mbarrier.init");
  access(p, 8, true, 0, CUSIM_PC);
  Block* b = address_block(a);
  MBarrier m;
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
  yield();
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
void fence_async_proxy() {
  cur->p->fence_clock = cur->p->clock;
  if (checks_on) cur->p->clock++;
}

// ---------------------------------------------------------------- TMA and bulk copies
static void post(std::function<void()> f) {
  stats.async_ops++;
  if (opt.async_mode == 1)
    f();
  else
    running.async.push_back(std::move(f));
}
static void complete_tx(Block* b, uint32_t off, uint32_t bytes, uint32_t agent_idx, uint32_t clk) {
  uint32_t v[2];
  memcpy(v, b->window + off, 8);
  if (v[0] != kMagic) {
    report("TMA: mbarrier overwritten before completion");
    return;
  }
  MBarrier& m = b->mbarriers[v[1]];
  m.tx -= bytes;
  if (checks_on) {
    m.pend = m.pend ? std::make_shared<Clock>(*m.pend) : new_clock();
    auto& x = (*m.pend)[agent_idx];
    x = std::max(x, clk);
  }
  mbar_check(m);
}
__attribute__((noinline)) void tma_load_2d(uint32_t dst, const TensorMap* m, int x, int y, uint32_t mbar,
                                           uint16_t cmask) {
  void* pc = CUSIM_PC;
  TensorMap t = *m;
  Block* me = cur->blk;
  uint32_t bytes = t.box[0] * t.box[1] * t.elem, rowb = t.box[0] * t.elem;
  if (dst & 127) fail("TMA: shared destination not 128-byte aligned");
  if (t.swizzle && rowb > (uint32_t)t.swizzle)
    fail("TMA: inner box of %u bytes exceeds the swizzle span", rowb);
  std::vector<Block*> targets;
  if (!cmask)
    targets.push_back(address_block(dst));
  else
    for (size_t r = 0; r < me->cluster->b.size(); r++)
      if (cmask >> r & 1) {
        if (!me->cluster->b[r]->live) fail("CLUSTER: multicast into a CTA that has already exited");
        targets.push_back(me->cluster->b[r]);
      }
  uint32_t off = dst & 0xFFFFFF, moff = mbar & 0xFFFFFF;
  Block* mb_blk = cmask ? nullptr : address_block(mbar);
  for (Block* b : targets) {
    if (!shared_valid(b, off, bytes))
      fail("OUT OF BOUNDS: TMA write of %u bytes at shared offset %u, at %s", bytes, off, where(pc).c_str());
    access_async(b->window + off, bytes, true, 2, pc, true);
  }
  mbar_at(mbar, "TMA completion");
  uint32_t agent = 2 * running.threads + cur->gid, clk = cur->p->async_clock[1]++;
  post([=] {
    for (Block* b : targets) {
      for (uint32_t r = 0; r < t.box[1]; r++)
        for (uint32_t c = 0; c < rowb; c += 16) {
          uint32_t a = swizzled(off + r * rowb + c, t.swizzle);
          char buf[16];
          for (int e = 0; e < 16 / t.elem; e++) {
            int64_t gx = (int64_t)x + c / t.elem + e, gy = (int64_t)y + r;
            if (gx < 0 || gy < 0 || gx >= (int64_t)t.dim[0] || gy >= (int64_t)t.dim[1])
              memset(buf + e * t.elem, 0, t.elem);
            else
              memcpy(buf + e * t.elem, t.base + gy * t.row_stride + gx * t.elem, t.elem);
          }
          memcpy(b->window + a, buf, 16);
        }
      complete_tx(cmask ? b : mb_blk, moff, bytes, agent, clk);
    }
  });
}
void bulk_g2s(uint32_t dst, const void* src, uint32_t bytes, uint32_t mbar) {
  if ((dst & 15) || (bytes & 15) || ((uintptr_t)src & 15)) fail("cp.async.bulk: 16-byte alignment");
  void* pc = CUSIM_PC;
  char* d = smem_ptr(dst, bytes, "cp.async.bulk write");
  access_async(d, bytes, true, 2, pc, true);
  access_async(src, bytes, false, 2, pc, false);
  mbar_at(mbar, "bulk completion");
  uint32_t agent = 2 * running.threads + cur->gid, clk = cur->p->async_clock[1]++;
  Block* b = address_block(mbar);
  uint32_t moff = mbar & 0xFFFFFF;
  post([=] {
    memcpy(d, src, bytes);
    complete_tx(b, moff, bytes, agent, clk);
  });
}
__attribute__((noinline)) void tma_store_2d(const TensorMap* m, uint32_t src, int x, int y) {
  void* pc = CUSIM_PC;
  TensorMap t = *m;
  uint32_t rowb = t.box[0] * t.elem, bytes = rowb * t.box[1];
  char* s = smem_ptr(src, bytes, "TMA store read");
  (void)s;
  access_async(s, bytes, false, 2, pc, true);
  Block* b = cur->blk;
  uint32_t off = src & 0xFFFFFF;
  for (uint32_t r = 0; r < t.box[1]; r++)
    if ((int64_t)y + r < (int64_t)t.dim[1] && y + (int)r >= 0) {
      int64_t x0 = std::max(x, 0), x1 = std::min<int64_t>(x + t.box[0], t.dim[0]);
      if (x1 > x0)
        access_async(t.base + (y + r) * t.row_stride + x0 * t.elem, (x1 - x0) * t.elem, true, 2, pc, false);
    }
  cur->p->bulk_open.push_back([=] {
    for (uint32_t r = 0; r < t.box[1]; r++)
      for (uint32_t c = 0; c < t.box[0]; c++) {
        int64_t gx = (int64_t)x + c, gy = (int64_t)y + r;
        if (gx < 0 || gy < 0 || gx >= (int64_t)t.dim[0] || gy >= (int64_t)t.dim[1]) continue;
        memcpy(t.base + gy * t.row_stride + gx * t.elem,
               b->window + swizzled(off + r * rowb + c * t.elem, t.swizzle), t.elem);
      }
  });
}
void bulk_commit() {
  auto* p = cur->p;
  p->bulk_groups.push_back(std::move(p->bulk_open));
  p->bulk_open.clear();
  p->async_clock[1]++;
}
void bulk_wait(int n, bool) {
  auto* p = cur->p;
  while ((int)p->bulk_groups.size() > n) {
    for (auto& f : p->bulk_groups.front()) f();
    p->bulk_groups.pop_front();
    stats.async_ops++;
  }
  if (n == 0) p->async_seen[1] = p->async_clock[1] - 1;
}

}  // namespace cusim
