// Who runs next. One thread runs until it waits; the choice follows a policy, and every choice comes from the
// seed. No single policy finds every race that only shows in values (uniform random steps warps almost in
// line), so kAuto takes a different one for different seeds:
//   in order, reverse   lowest or highest warp and lane first
//   random              any runnable lane
//   pct                 random priorities of warps with rare changes (Burckhardt et al., 2010)
// Transfers under way finish at a random moment, at the latest when nothing else can run.
#include <cstdlib>

#include "internal.h"

namespace cusim {
Thread* cur;
Options opt;
Stats stats;
bool checks_on;
Running running;
uint32_t launch_counter, run_counter;

// A spinning thread gets here in well under a second; no correct test kernel does.
constexpr int yields_of_a_livelock = 300000;

// xorshift, seeded through splitmix64.
static uint64_t rs = 88172645463325252ull;
uint64_t rng() {
  rs ^= rs << 13;
  rs ^= rs >> 7;
  rs ^= rs << 17;
  return rs;
}
void rng_seed(uint64_t s) {
  s += 0x9E3779B97F4A7C15ull;
  s = (s ^ (s >> 30)) * 0xBF58476D1CE4E5B9ull;
  s = (s ^ (s >> 27)) * 0x94D049BB133111EBull;
  rs = (s ^ (s >> 31)) | 1;
  for (int i = 0; i < 4; i++) rng();
}

void wake(Thread* t) {
  t->p->status = ThreadState::Run;
  int p = t->wp->pos;
  running.lanes_at[p] |= 1u << t->lane;
  running.positions[p >> 6] |= 1ull << (p & 63);
  running.runnable++;
}
static Thread* take(int p, int lane) {
  running.lanes_at[p] &= ~(1u << lane);
  if (!running.lanes_at[p]) running.positions[p >> 6] &= ~(1ull << (p & 63));
  running.runnable--;
  return running.warps[running.warp_at[p]]->t[lane];
}
// Who waits where: a line for each block and place, with the first thread.
static std::string waiting() {
  struct Group {
    int lanes = 0;
    const Thread* first = nullptr;
  };
  std::map<std::string, Group> groups;
  for (auto& b : running.blocks)
    for (Thread* t : b->threads) {
      if (t->p->status != ThreadState::Wait) continue;
      char place[300];
      snprintf(place, sizeof place, "%s(%llu) at %s", t->p->waits_for, (unsigned long long)t->p->waits_arg,
               where(t->p->waits_pc).c_str());
      char block[64];
      snprintf(block, sizeof block, "block(%u,%u,%u)", b->bid.x, b->bid.y, b->bid.z);
      Group& g = groups[std::string(block) + ": " + place];
      if (!g.lanes++) g.first = t;
    }
  constexpr int shown = 12;
  std::string s;
  int n = 0;
  for (auto& [place, g] : groups) {
    if (n++ == shown) return s + "\n  ...";
    char thread[64];
    snprintf(thread, sizeof thread, "thread(%u,%u,%u)", g.first->tid.x, g.first->tid.y, g.first->tid.z);
    s += "\n  " + std::to_string(g.lanes) + " lanes from " + thread + " on, " + place;
  }
  return s;
}
[[noreturn]] static void deadlock() {
  record("DEADLOCK: no thread can run" + waiting());
  running.aborted = true;
  leave_to_main();
}
Thread* pick(bool random_any) {
  for (;;) {
    if (!running.async.empty()) {
      bool go = running.runnable == 0 || (opt.async_mode != 0 && (rng() & 15) == 0);
      if (go) {
        size_t i = rng() % running.async.size();
        auto f = std::move(running.async[i]);
        running.async[i] = std::move(running.async.back());
        running.async.pop_back();
        running.idle = 0;
        f();
        continue;
      }
    }
    if (running.runnable) break;
    return nullptr;
  }
  int nw = (int)running.positions.size(), np = (int)running.lanes_at.size();
  int policy = random_any ? kRandom : running.policy;
  int start = policy == kRandom ? int(rng() % np) : 0, p = -1;
  for (int k = 0; k <= nw; k++) {
    int w = ((start >> 6) + k) % nw;
    uint64_t m = running.positions[w];
    if (k == 0) m &= ~0ull << (start & 63);
    if (m) {
      p = w * 64 + __builtin_ctzll(m);
      break;
    }
  }
  if (p < 0) {
    for (int w = 0; w < nw && p < 0; w++)
      if (running.positions[w]) p = w * 64 + __builtin_ctzll(running.positions[w]);
  }
  if (policy == kPct && np > 1 && (rng() & 63) == 0) {  // priority change point: demote the top warp
    int q = int(rng() % np);
    if (q != p) {
      std::swap(running.warp_at[p], running.warp_at[q]);
      std::swap(running.lanes_at[p], running.lanes_at[q]);
      running.warps[running.warp_at[p]]->pos = p;
      running.warps[running.warp_at[q]]->pos = q;
      auto fix = [](int x) {
        if (running.lanes_at[x])
          running.positions[x >> 6] |= 1ull << (x & 63);
        else
          running.positions[x >> 6] &= ~(1ull << (x & 63));
      };
      fix(p);
      fix(q);
      return pick(random_any);
    }
  }
  uint32_t m = running.lanes_at[p];
  int lane;
  if (policy == kInOrder)
    lane = __builtin_ctz(m);
  else if (policy == kReverse)
    lane = 31 - __builtin_clz(m);
  else {
    int r = rng() & 31;
    uint32_t x = (m >> r) | (r ? m << (32 - r) : 0);
    lane = (__builtin_ctz(x) + r) & 31;
  }
  return take(p, lane);
}
void park(const char* why, uint64_t arg, void* pc) {
  Thread* me = cur;
  me->p->status = ThreadState::Wait;
  me->p->waits_for = why;
  me->p->waits_arg = arg;
  me->p->waits_pc = pc;
  Thread* nx = pick();
  if (!nx) {
    deadlock();
  }
  if (nx == me) return;
  cur = nx;
  switch_to(me->p->context, nx->p->context);
}
__attribute__((noinline)) void yield(void* pc) {
  if (!cur) return;
  if (!pc) pc = CUSIM_PC;
  Thread* me = cur;
  wake(me);
  if (++running.idle > yields_of_a_livelock)
    fail("LIVELOCK: threads only spin (%d yields without progress), one of them at %s%s",
         yields_of_a_livelock, where(pc).c_str(), waiting().c_str());
  Thread* nx = pick(true);
  if (nx == me) {
    me->p->status = ThreadState::Run;
    return;
  }
  cur = nx;
  switch_to(me->p->context, nx->p->context);
}
void run_next_after_exit() {
  Thread* me = cur;
  if (running.live == 0) {
    while (!running.async.empty()) {
      auto f = std::move(running.async.back());
      running.async.pop_back();
      f();
    }
    leave_to_main();
  }
  Thread* next = pick();
  if (!next) deadlock();
  cur = next;
  switch_to(me->p->context, next->p->context);
  abort();  // an exited thread is never resumed
}

}  // namespace cusim
