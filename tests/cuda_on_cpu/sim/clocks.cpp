// Vector clocks (Lamport, 1978; Mattern, 1989): an access is ordered before another if its thread's clock at
// that time is known to the other thread. Barriers, mbarriers and integer atomics pass knowledge on; shuffles
// and mma do not, as in the CUDA memory model.
#include <algorithm>

#include "internal.h"

namespace cusim {
void clock_max(Clock& a, const Clock& b) {
  if (a.size() < b.size()) a.resize(b.size());
  for (size_t i = 0; i < b.size(); i++)
    if (b[i] > a[i]) a[i] = b[i];
}

static size_t clock_size() { return size_t(1 + running.slots) * size_t(running.threads); }
ClockRef new_clock() { return std::make_shared<Clock>(clock_size()); }
ClockRef copy_clock(const ClockRef& v) {
  if (!v) return new_clock();
  auto copy = std::make_shared<Clock>(*v);
  if (copy->size() < clock_size()) copy->resize(clock_size());
  return copy;
}
// v |= what t knows of itself and of its agents.
static void add_own(const Thread* t, Clock& v) {
  v[t->gid] = std::max(v[t->gid], t->p->clock);
  for (int slot = 1; slot <= running.slots; slot++) {
    auto& x = v[slot * running.threads + t->gid];
    x = std::max(x, t->p->async_seen[running.agent_at[slot]]);
  }
}
// Behind a barrier each thread's fences count for all.
static void share_fences(const std::vector<Thread*>& threads, const std::vector<Thread*>* more) {
  ClockRef all, last;
  bool own = false;  // `all` is a copy
  const auto add = [&](const ClockRef& fenced) {
    if (!fenced || fenced == last || fenced == all) return;
    last = fenced;
    if (!all) {
      all = fenced;
      return;
    }
    if (!own) all = copy_clock(all), own = true;
    clock_max(*all, *fenced);
  };
  for (Thread* t : threads) add(t->p->fenced);
  if (more)
    for (Thread* t : *more) add(t->p->fenced);
  if (all)
    for (Thread* t : threads) t->p->fenced = all;
}
void clock_barrier(const std::vector<Thread*>& a, const std::vector<Thread*>* release_only) {
  if (!checks_on) return;
  share_fences(a, release_only);
  auto v = new_clock();
  const Clock* last = nullptr;  // threads of a block mostly share one
  const auto add = [&](Thread* t) {
    const Clock* base = t->p->base.get();
    if (base && base != last) {
      clock_max(*v, *base);
      last = base;
    }
    add_own(t, *v);
  };
  for (Thread* t : a) add(t);
  if (release_only)
    for (Thread* t : *release_only) {
      add(t);
      t->p->clock++;
    }
  for (Thread* t : a) {
    t->p->base = v;
    t->p->clock++;
  }
}
void clock_release(Thread* t, ClockRef& v) {
  if (!checks_on) return;
  v = copy_clock(v);
  if (t->p->base) clock_max(*v, *t->p->base);
  add_own(t, *v);
  t->p->clock++;
}
void clock_release_fenced(Thread* t, ClockRef& v) {
  if (!checks_on || !t->p->fenced) return;
  v = copy_clock(v);
  clock_max(*v, *t->p->fenced);
}
void clock_add_agent(ClockRef& v, uint32_t index, uint32_t clock) {
  if (!checks_on) return;
  v = copy_clock(v);
  (*v)[index] = std::max((*v)[index], clock);
}
void clock_acquire(Thread* t, const ClockRef& v) {
  if (!checks_on || !v) return;
  auto n = copy_clock(v);
  if (t->p->base) clock_max(*n, *t->p->base);
  t->p->base = n;
  for (int slot = 1; slot <= running.slots; slot++) {
    uint32_t& seen = t->p->async_seen[running.agent_at[slot]];
    seen = std::max(seen, (*n)[slot * running.threads + t->gid]);
  }
}

}  // namespace cusim
