// Vector clocks (Lamport, 1978; Mattern, 1989): an access is ordered before another if its thread's clock at
// that time is known to the other thread. Barriers, mbarriers and integer atomics pass knowledge on; shuffles
// and mma do not, as in the CUDA memory model.
#include <algorithm>

#include "internal.h"

namespace cusim {
void clock_max(Clock& a, const Clock& b) {
  for (size_t i = 0; i < a.size(); i++)
    if (b[i] > a[i]) a[i] = b[i];
}

ClockRef new_clock() { return std::make_shared<Clock>(clocks_a_thread * running.threads, 0); }
static void clock_export(const Thread* t, Clock& v) {  // v |= clock of t
  if (t->p->base) clock_max(v, *t->p->base);
  v[t->gid] = std::max(v[t->gid], t->p->clock);
  for (int k = 0; k < async_agents; k++) {
    auto& x = v[(k + 1) * running.threads + t->gid];
    x = std::max(x, t->p->async_seen[k]);
  }
}
void clock_barrier(const std::vector<Thread*>& a, const std::vector<Thread*>* release_only) {
  if (!checks_on) return;
  auto v = new_clock();
  const Clock* lastb = nullptr;
  auto add = [&](Thread* t) {
    const Clock* b = t->p->base.get();
    if (b && b != lastb) {
      clock_max(*v, *b);
      lastb = b;
    }
    (*v)[t->gid] = std::max((*v)[t->gid], t->p->clock);
    for (int k = 0; k < async_agents; k++) {
      auto& x = (*v)[(k + 1) * running.threads + t->gid];
      x = std::max(x, t->p->async_seen[k]);
    }
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
  v = v ? std::make_shared<Clock>(*v) : new_clock();
  clock_export(t, *v);
  t->p->clock++;
}
void clock_acquire(Thread* t, const ClockRef& v) {
  if (!checks_on || !v) return;
  auto n = std::make_shared<Clock>(*v);
  if (t->p->base) clock_max(*n, *t->p->base);
  t->p->base = n;
  for (int k = 0; k < async_agents; k++)
    t->p->async_seen[k] = std::max(t->p->async_seen[k], (*n)[(k + 1) * running.threads + t->gid]);
}

}  // namespace cusim
