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
uint32_t exists(uint32_t mask) { return mask & cur->wp->exists; }

// The lanes of the mask bring a value each; the last to come calls compute(lanes, lane -> its Exchange).
struct Exchange {
  uint64_t in;
  uint32_t out;
};
template <class Compute>
static uint32_t exchange(uint32_t mask, int op, uint64_t value, const Compute& compute) {
  Exchange mine{value, 0};
  if (collective_arrive(mask, op, &mine)) {
    Warp* w = cur->wp;
    compute(mask & w->exists, [w](int lane) -> Exchange& { return *(Exchange*)w->arg[lane]; });
    collective_release(mask);
  }
  return mine.out;
}
template <class Body>
static void for_lanes(uint32_t lanes, const Body& body) {
  for (uint32_t m = lanes; m; m &= m - 1) body(__builtin_ctz(m));
}
uint32_t vote(uint32_t mask, bool pred) {
  return exchange(mask, kVote, pred, [](uint32_t lanes, const auto& at) {
    uint32_t yes = 0;
    for_lanes(lanes, [&](int l) { yes |= uint32_t(at(l).in) << l; });
    for_lanes(lanes, [&](int l) { at(l).out = yes; });
  });
}
uint32_t match_any(uint32_t mask, uint64_t v) {
  return exchange(mask, kMatch, v, [](uint32_t lanes, const auto& at) {
    for_lanes(lanes, [&](int l) {
      at(l).out = 0;
      for_lanes(lanes, [&](int k) { at(l).out |= uint32_t(at(k).in == at(l).in) << k; });
    });
  });
}
uint32_t reduce(uint32_t mask, Reduce op, bool is_signed, uint32_t v) {
  return exchange(mask, kRedux, v, [=](uint32_t lanes, const auto& at) {
    const auto less = [&](uint32_t a, uint32_t b) { return is_signed ? int(a) < int(b) : a < b; };
    uint32_t r = uint32_t(at(__builtin_ctz(lanes)).in);
    for_lanes(lanes & (lanes - 1), [&](int l) {
      const uint32_t x = uint32_t(at(l).in);
      switch (op) {
        case Reduce::add:
          r += x;
          break;
        case Reduce::min:
          r = less(x, r) ? x : r;
          break;
        case Reduce::max:
          r = less(r, x) ? x : r;
          break;
        case Reduce::land:
          r &= x;
          break;
        case Reduce::lor:
          r |= x;
          break;
        case Reduce::lxor:
          r ^= x;
          break;
      }
    });
    for_lanes(lanes, [&](int l) { at(l).out = r; });
  });
}
// Any lane, but the same in all calls of a launch.
bool elect_one() {
  return exchange(~0u, kElect, 0, [](uint32_t lanes, const auto& at) {
    const int count = __builtin_popcount(lanes), chosen = int((opt.seed * 7 + 3) % uint64_t(count));
    int i = 0;
    for_lanes(lanes, [&](int l) { at(l).out = i++ == chosen; });
  });
}

}  // namespace cusim
