// Barriers of a block (__syncthreads is number 0), a cooperative grid and a cluster, and what the exit of a
// thread means to those who wait.
#include "internal.h"

namespace cusim {
static void bar_complete(Barrier& b, Thread* except) {
  stats.barriers++;
  running.idle = 0;
  clock_barrier(b.wait, &b.arr);
  for (Thread* t : b.wait)
    if (t != except) wake(t);
  b.wait.clear();
  b.arr.clear();
  b.arrived = 0;
  b.expected = 0;
  b.counted = b.counting;
  b.counting = 0;
}
static void check_exit_strict(Block* b, void* pc) {
  if (opt.strict_barrier && b->live != (int)b->threads.size() && !b->warned_exit) {
    b->warned_exit = true;
    report("SYNC: __syncthreads reached by %d of %zu threads, the others have exited; at %s", b->live,
           b->threads.size(), where(pc).c_str());
  }
}
__attribute__((noinline)) void sync_block(int id, int n, bool arrive_only) {
  Block* b = cur->blk;
  Barrier& r = b->bar[id];
  int expect = n < 0 ? b->live : n;
  if (n >= 0 && (n % 32 || n > (int)b->threads.size())) fail("bar.sync %d: bad thread count %d", id, n);
  if (n >= 0) {
    if (r.expected && r.expected != n) fail("bar.sync %d: thread counts differ (%d, %d)", id, r.expected, n);
    r.expected = n;
  }
  r.arrived++;
  if (arrive_only)
    r.arr.push_back(cur);
  else
    r.wait.push_back(cur);
  if (r.arrived == expect) {
    if (n < 0) check_exit_strict(b, CUSIM_PC);
    bar_complete(r, cur);
    return;
  }
  if (r.arrived > expect) fail("bar.sync %d: too many arrivals", id);
  if (!arrive_only) park("bar.sync", id, CUSIM_PC);
}
__attribute__((noinline)) int sync_block_count(bool predicate) {
  Barrier& r = cur->blk->bar[0];
  r.counting += predicate;
  sync_block(0, -1, false);
  return r.counted;  // the next count is not complete before all have read this one
}
void sync_grid() {
  if (!running.config.cooperative) fail("grid sync in a non-cooperative launch");
  Barrier& r = running.grid_bar;
  r.arrived++;
  r.wait.push_back(cur);
  if (r.arrived == running.threads)
    bar_complete(r, cur);
  else
    park("grid.sync", 0, CUSIM_PC);
}
void cluster_arrive() {
  Cluster* c = cur->blk->cluster;
  c->my[cur] = c->phase;
  clock_release(cur, c->pend);
  if (++c->arrived == c->live) {
    c->arrived = 0;
    c->phase++;
    running.idle = 0;
    for (Thread* t : c->wait) wake(t);
    c->wait.clear();
  }
}
void cluster_wait() {
  Cluster* c = cur->blk->cluster;
  auto it = c->my.find(cur);
  if (it == c->my.end()) fail("cluster wait without arrive");
  uint32_t ph = it->second;
  c->my.erase(it);
  if (c->phase == ph) {
    c->wait.push_back(cur);
    park("barrier.cluster", ph, CUSIM_PC);
  }
  clock_acquire(cur, c->pend);
}
void thread_exit() {
  Thread* me = cur;
  Block* b = me->blk;
  me->p->status = ThreadState::Done;
  if (!me->p->bulk_open.empty() || !me->p->bulk_groups.empty())
    fail(
        "a thread exits while its bulk stores may still read shared memory (bulk_commit and bulk_wait_read "
        "first)");
  me->wp->exited |= 1u << me->lane;
  b->live--;
  running.live--;
  running.idle = 0;
  for (int i = 0; i < me->wp->collective_count; i++)
    if (me->wp->collectives[i].mask >> me->lane & 1)
      fail("lane exited while the rest of its warp waits in a collective that names it");
  if (b->bar[0].arrived && b->bar[0].expected == 0 && b->bar[0].arrived == b->live) {
    check_exit_strict(b, b->bar[0].wait[0]->p->waits_pc);
    bar_complete(b->bar[0], nullptr);
  }
  Cluster* c = b->cluster;
  c->live--;
  if (c->live && c->arrived == c->live) {
    c->arrived = 0;
    c->phase++;
    for (Thread* t : c->wait) wake(t);
    c->wait.clear();
  }
  run_next_after_exit();
}

}  // namespace cusim
