// Operations of a warp: the lanes that the mask names meet; the last to come computes for all. Mismatched
// masks or operations and exited lanes are faults; so is a shuffle from a lane outside the mask.
#include "internal.h"

namespace cusim {
__attribute__((noinline)) bool collective_arrive(uint32_t mask, int op, void* arg) {
  Warp* w = cur->wp;
  uint32_t bit = 1u << cur->lane;
  stats.collectives++;
  if (!(mask & bit)) fail("warp collective: the mask 0x%08x does not name the calling lane", mask);
  if (mask & ~w->exists) mask &= w->exists;  // partial last warp
  if (mask & w->exited) fail("warp collective: the mask 0x%08x names exited lanes", mask);
  w->arg[cur->lane] = arg;
  Collective* c = nullptr;
  for (int i = 0; i < w->collective_count; i++) {
    if (w->collectives[i].mask == mask)
      c = &w->collectives[i];
    else if (w->collectives[i].mask & mask)
      fail("warp collective: overlapping masks 0x%08x / 0x%08x", mask, w->collectives[i].mask);
  }
  if (!c) {
    c = &w->collectives[w->collective_count++];
    *c = {mask, 0, op};
  }
  if (c->op != op) fail("warp collective: lanes of one warp are in different operations (%d, %d)", c->op, op);
  c->arrived |= bit;
  if (c->arrived == mask) return true;
  park("warp collective", op, CUSIM_PC);
  return false;
}
void collective_release(uint32_t mask) {
  Warp* w = cur->wp;
  mask &= w->exists;
  running.idle = 0;
  for (int i = 0; i < w->collective_count; i++)
    if (w->collectives[i].mask == mask) {
      w->collectives[i] = w->collectives[--w->collective_count];
      break;
    }
  for (uint32_t m = mask & ~(1u << cur->lane); m; m &= m - 1) wake(w->t[__builtin_ctz(m)]);
}
void sync_warp(uint32_t mask) {
  if (collective_arrive(mask, 100, nullptr)) {
    if (checks_on) {
      std::vector<Thread*> v;
      for (uint32_t m = mask & cur->wp->exists; m; m &= m - 1) v.push_back(cur->wp->t[__builtin_ctz(m)]);
      clock_barrier(v);
    }
    collective_release(mask);
  }
}
void shfl(uint32_t mask, ShflArg* a) {
  if (collective_arrive(mask, kShfl, a)) {
    Warp* w = cur->wp;
    uint32_t mm = mask & w->exists;
    for (uint32_t m = mm; m; m &= m - 1) {
      ShflArg* x = (ShflArg*)w->arg[__builtin_ctz(m)];
      if (!(mm >> x->src & 1)) {
        if (opt.strict_barrier && (w->exists >> x->src & 1))
          report("SHFL: lane reads from lane %d, which is not in the mask 0x%08x", x->src, mask);
        x->out = 0xFFFFFFFFFFFFFFFFull;
      } else
        x->out = ((ShflArg*)w->arg[x->src])->v;
    }
    collective_release(mask);
  }
}
uint32_t vote(uint32_t mask, bool pred) {
  struct V {
    bool p;
    uint32_t out;
  } v{pred, 0};
  if (collective_arrive(mask, kVote, &v)) {
    Warp* w = cur->wp;
    uint32_t r = 0;
    mask &= w->exists;
    for (uint32_t m = mask; m; m &= m - 1) {
      int l = __builtin_ctz(m);
      if (((V*)w->arg[l])->p) r |= 1u << l;
    }
    for (uint32_t m = mask; m; m &= m - 1) ((V*)w->arg[__builtin_ctz(m)])->out = r;
    collective_release(mask);
  }
  return v.out;
}

}  // namespace cusim
