// cuda_sim.cpp - runtime of the CUDA-on-CPU test simulator. Build WITHOUT -fsanitize=thread.
#include "cuda_sim.h"

#include <dlfcn.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdarg>
#include <cstdlib>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>
#undef min
#undef max
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace cusim {
Thread* cur;
Options opt;
Stats stats;
bool checks_on;

// ------------------------------------------------------------------ rng (splitmix/xorshift)
static uint64_t rs = 88172645463325252ull;
uint64_t rng() {
  rs ^= rs << 13;
  rs ^= rs >> 7;
  rs ^= rs << 17;
  return rs;
}
static void rng_seed(uint64_t s) {
  s += 0x9E3779B97F4A7C15ull;
  s = (s ^ (s >> 30)) * 0xBF58476D1CE4E5B9ull;
  s = (s ^ (s >> 27)) * 0x94D049BB133111EBull;
  rs = (s ^ (s >> 31)) | 1;
  for (int i = 0; i < 4; i++) rng();
}

// ------------------------------------------------------------------ fibers
extern "C" void cusim_switch(void** save, void* to);
#if defined(__x86_64__)
asm(R"(
.text
.globl cusim_switch
.type cusim_switch,@function
cusim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cusim_switch,.-cusim_switch
)");
#else
#error "add a context switch for this CPU (aarch64: x19-x30,d8-d15) or use boost.context"
#endif
#ifdef __SANITIZE_ADDRESS__
static const size_t kStack = 512 << 10;
#else
static const size_t kStack = 256 << 10;
#endif
struct Ctx {
  void* sp = nullptr;
  void* fake = nullptr;
  char* lo = nullptr;
  size_t size = 0;
};
static Ctx main_ctx;

// ------------------------------------------------------------------ vector clocks
using VC = std::vector<uint32_t>;
using VCp = std::shared_ptr<VC>;
static void vc_max(VC& a, const VC& b) {
  for (size_t i = 0; i < a.size(); i++)
    if (b[i] > a[i]) a[i] = b[i];
}

struct Copy {
  char* dst;
  const char* src;
  int bytes, src_bytes;
};
struct WgOp {
  float* d[32];
  uint32_t a[32][4];
  int n;
  uint64_t da, db;
  bool scale, ta, tb, bf16, has_a;
};
struct Priv {
  Ctx ctx;
  enum { Free, Run, Wait, Done } st = Free;
  const char* why = "";
  uint64_t why_arg = 0;
  void* why_pc = nullptr;
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;  // cp.async
  std::vector<std::function<void()>> bopen;
  std::deque<std::vector<std::function<void()>>> bgroups;  // bulk stores
  VCp base;
  uint32_t clk = 1, fence_clk = 0;
  uint32_t aclk[3] = {1, 1, 1}, aseen[3] = {0, 0, 0};  // async agents: cp.async, bulk, wgmma
};
struct Coll {
  uint32_t mask, arrived;
  int op;
};
struct Warp {
  Thread* t[32];
  void* arg[32];
  uint32_t exists = 0, exited = 0;
  Coll c[32];
  int nc = 0;
  int pos = 0;
  std::vector<WgOp> wopen;
  std::deque<std::vector<WgOp>> wgroups;
};
struct Bar {
  int arrived = 0, expected = 0;
  std::vector<Thread*> wait, arr;
};
struct Mbar {
  uint32_t count = 0, pending = 0, phase = 0;
  int64_t tx = 0;
  std::vector<Thread*> wait;
  VCp pend, done;
};
struct StaticVar {
  const void* tag;
  uint32_t off, bytes;
};
struct Cluster;
struct Block {
  uint3 bid;
  int slot;
  char* win;
  uint32_t dyn_off, dyn_bytes, top;
  std::vector<StaticVar> statics;
  std::vector<Thread*> th;
  std::vector<Warp*> wp;
  int live;
  Bar bar[16], wgbar[8];
  std::vector<Mbar> mb;
  Cluster* cl;
  uint32_t rank;
  uint32_t run_id;
  bool warned_exit = false, started = false;
};
struct Cluster {
  std::vector<Block*> b;
  int arrived = 0, live = 0;
  uint32_t phase = 0;
  std::vector<Thread*> wait;
  std::vector<Thread*> arr;
  VCp pend;
  std::map<Thread*, uint32_t> my;
};

struct Launch {
  Config cfg;
  void (*thunk)(void*) = nullptr;
  void* arg = nullptr;
  int policy = 1;
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<std::unique_ptr<Cluster>> clusters;
  std::vector<Warp*> warps;
  int R = 0;
  int live = 0;
  std::vector<uint32_t> rl;
  std::vector<uint64_t> rw;
  std::vector<int> at;
  int nrun = 0;  // runnable lanes by priority position
  std::vector<std::function<void()>> async;
  Bar grid_bar;
  uint64_t idle = 0;
  bool aborted = false;
  uint32_t set_id = 0;
  bool active = false;
};
static Launch L;
static uint32_t g_epoch = 0, g_run = 0;
static std::vector<std::unique_ptr<Thread>> tpool;
static std::vector<std::unique_ptr<Priv>> ppool;
static std::vector<std::unique_ptr<Warp>> wpool;
static std::vector<char*> stacks;

// ------------------------------------------------------------------ errors
static std::string g_err;
static int g_nerr;
static std::set<std::pair<void*, void*>> g_seen;
const char* last_error() { return g_err.c_str(); }
int error_count() { return g_nerr; }
void clear_error() {
  g_err.clear();
  g_nerr = 0;
  g_seen.clear();
}
static std::string where_raw(void* pc);
static std::string where(void* pc) {
  static std::unordered_map<void*, std::string> m;
  auto it = m.find(pc);
  if (it != m.end()) return it->second;
  return m[pc] = where_raw(pc);
}
static std::string where_raw(void* pc) {
  if (!pc) return "?";
  Dl_info di;
  char cmd[600];
  std::string s;
  if (!dladdr(pc, &di) || !di.dli_fname) return "?";
  uintptr_t a = (uintptr_t)pc - 1;
  const char* exe = di.dli_fname;
  // PIE and shared objects: addresses relative to the load base
  a -= (uintptr_t)di.dli_fbase;
  snprintf(cmd, sizeof cmd, "addr2line -C -f -i -s -e '%s' 0x%zx 2>/dev/null", exe, (size_t)a);
  if (FILE* f = popen(cmd, "r")) {  // innermost frame outside the simulator headers
    char fn[2048], ln[512];
    std::string first;
    while (fgets(fn, sizeof fn, f) && fgets(ln, sizeof ln, f)) {
      std::string l(ln);
      while (!l.empty() && (l.back() == '\n' || l.back() == ' ')) l.pop_back();
      auto p = l.find(" (disc");
      if (p != std::string::npos) l.resize(p);
      if (first.empty()) first = l;
      if (l.rfind("cuda_sim", 0) && l.rfind("ptx.cuh", 0) && l.rfind("cuda_bf16", 0) &&
          l.rfind("cuda_fp16", 0)) {
        s = l;
        break;
      }
    }
    pclose(f);
    if (s.empty()) s = first;
  }
  return s.empty() ? "?" : s;
}
static std::string who(const Thread* t) {
  char b[160];
  if (!t) return "host";
  snprintf(b, sizeof b, "block(%u,%u,%u) thread(%u,%u,%u) warp %d lane %d", t->bid.x, t->bid.y, t->bid.z,
           t->tid.x, t->tid.y, t->tid.z, t->warp, t->lane);
  return b;
}
static void record(const std::string& s) {
  if (!g_nerr++)
    g_err = s;
  else if (g_nerr <= 5)
    g_err += "\n" + s;
}
void report(const char* fmt, ...) {
  char b[2000];
  va_list ap;
  va_start(ap, fmt);
  vsnprintf(b, sizeof b, fmt, ap);
  va_end(ap);
  record(b);
}
static void switch_to(Ctx& from, Ctx& to);
static void to_main() {
  Thread* me = cur;
  cur = nullptr;
  switch_to(me->p->ctx, main_ctx);
}
void fail(const char* fmt, ...) {
  char b[2000];
  va_list ap;
  va_start(ap, fmt);
  vsnprintf(b, sizeof b, fmt, ap);
  va_end(ap);
  record(std::string(b) + (cur ? " [" + who(cur) + "]" : ""));
  if (!cur) {
    fprintf(stderr, "cusim: %s\n", b);
    abort();
  }
  L.aborted = true;
  to_main();
  abort();
}

// ------------------------------------------------------------------ context switching
static void switch_to(Ctx& from, Ctx& to) {
  stats.switches++;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&from.fake, to.lo, to.size);
#endif
  cusim_switch(&from.sp, to.sp);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(from.fake, nullptr, nullptr);
#endif
}
static void wake(Thread* t) {
  t->p->st = Priv::Run;
  int p = t->wp->pos;
  L.rl[p] |= 1u << t->lane;
  L.rw[p >> 6] |= 1ull << (p & 63);
  L.nrun++;
}
static Thread* take(int p, int lane) {
  L.rl[p] &= ~(1u << lane);
  if (!L.rl[p]) L.rw[p >> 6] &= ~(1ull << (p & 63));
  L.nrun--;
  return L.warps[L.at[p]]->t[lane];
}
static void describe_deadlock(std::string& s) {
  std::map<std::string, int> m;
  for (auto& b : L.blocks)
    for (Thread* t : b->th)
      if (t->p->st == Priv::Wait) {
        char k[200];
        snprintf(k, sizeof k, "block(%u,%u,%u): %s(%llu) at %s", b->bid.x, b->bid.y, b->bid.z, t->p->why,
                 (unsigned long long)t->p->why_arg, where(t->p->why_pc).c_str());
        m[k]++;
      }
  int n = 0;
  for (auto& [k, c] : m) {
    if (n++ == 12) {
      s += "\n  ...";
      break;
    }
    s += "\n  " + std::to_string(c) + " lanes " + k;
  }
}
static Thread* pick(bool random_any = false) {
  for (;;) {
    if (!L.async.empty()) {
      bool go = L.nrun == 0 || (opt.async_mode != 0 && (rng() & 15) == 0);
      if (go) {
        size_t i = rng() % L.async.size();
        auto f = std::move(L.async[i]);
        L.async[i] = std::move(L.async.back());
        L.async.pop_back();
        L.idle = 0;
        f();
        continue;
      }
    }
    if (L.nrun) break;
    return nullptr;
  }
  int nw = (int)L.rw.size(), np = (int)L.rl.size();
  int policy = random_any ? kRandom : L.policy;
  int start = policy == kRandom ? int(rng() % np) : 0, p = -1;
  for (int k = 0; k <= nw; k++) {
    int w = ((start >> 6) + k) % nw;
    uint64_t m = L.rw[w];
    if (k == 0) m &= ~0ull << (start & 63);
    if (m) {
      p = w * 64 + __builtin_ctzll(m);
      break;
    }
  }
  if (p < 0) {
    for (int w = 0; w < nw && p < 0; w++)
      if (L.rw[w]) p = w * 64 + __builtin_ctzll(L.rw[w]);
  }
  if (policy == kPct && np > 1 && (rng() & 63) == 0) {  // priority change point: demote the top warp
    int q = int(rng() % np);
    if (q != p) {
      std::swap(L.at[p], L.at[q]);
      std::swap(L.rl[p], L.rl[q]);
      L.warps[L.at[p]]->pos = p;
      L.warps[L.at[q]]->pos = q;
      auto fix = [](int x) {
        if (L.rl[x])
          L.rw[x >> 6] |= 1ull << (x & 63);
        else
          L.rw[x >> 6] &= ~(1ull << (x & 63));
      };
      fix(p);
      fix(q);
      return pick(random_any);
    }
  }
  uint32_t m = L.rl[p];
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
static void park(const char* why, uint64_t arg, void* pc) {
  Thread* me = cur;
  me->p->st = Priv::Wait;
  me->p->why = why;
  me->p->why_arg = arg;
  me->p->why_pc = pc;
  Thread* nx = pick();
  if (!nx) {
    std::string s = "DEADLOCK: no thread can run";
    describe_deadlock(s);
    record(s);
    L.aborted = true;
    to_main();
    abort();
  }
  if (nx == me) return;
  cur = nx;
  switch_to(me->p->ctx, nx->p->ctx);
}
void yield() {
  if (!cur) return;
  Thread* me = cur;
  wake(me);
  if (++L.idle > 300000) fail("LIVELOCK: threads only spin (300k yields without progress)");
  Thread* nx = pick(true);
  if (nx == me) {
    me->p->st = Priv::Run;
    return;
  }
  cur = nx;
  switch_to(me->p->ctx, nx->p->ctx);
}
static void thread_exit();
static void fiber_entry() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
  cur->blk->started = true;
  L.thunk(L.arg);
  thread_exit();
  abort();
}
static void prepare(Thread* t, char* stk, int i) {
  Ctx& c = t->p->ctx;
  c.lo = stk;
  c.size = kStack;
  c.fake = nullptr;
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(stk, kStack);
#endif
  memset(stk + kStack - 12288, 0xFF, 12288);  // uninitialised locals that live in memory read as NaN
  uintptr_t* s = (uintptr_t*)(stk + kStack - 64 - (i % 64) * 64);
  *--s = 0;
  *--s = (uintptr_t)&fiber_entry;
  for (int k = 0; k < 6; k++) *--s = 0;
  c.sp = s;
}

// ------------------------------------------------------------------ vector clock helpers
static inline uint32_t vc_get(const Thread* t, uint32_t idx) {
  Priv* p = t->p;
  int R = L.R;
  if ((int)idx == t->gid) return ~0u;
  for (int k = 0; k < 3; k++)
    if ((int)idx == (k + 1) * R + t->gid) return p->aseen[k];
  return p->base ? (*p->base)[idx] : 0;
}
static void vc_export(const Thread* t, VC& v) {  // v |= clock of t
  if (t->p->base) vc_max(v, *t->p->base);
  v[t->gid] = std::max(v[t->gid], t->p->clk);
  for (int k = 0; k < 3; k++) {
    auto& x = v[(k + 1) * L.R + t->gid];
    x = std::max(x, t->p->aseen[k]);
  }
}
static void vc_barrier(const std::vector<Thread*>& a, const std::vector<Thread*>* rel_only = nullptr) {
  if (!checks_on) return;
  auto v = std::make_shared<VC>(4 * L.R, 0);
  const VC* lastb = nullptr;
  auto add = [&](Thread* t) {
    const VC* b = t->p->base.get();
    if (b && b != lastb) {
      vc_max(*v, *b);
      lastb = b;
    }
    (*v)[t->gid] = std::max((*v)[t->gid], t->p->clk);
    for (int k = 0; k < 3; k++) {
      auto& x = (*v)[(k + 1) * L.R + t->gid];
      x = std::max(x, t->p->aseen[k]);
    }
  };
  for (Thread* t : a) add(t);
  if (rel_only)
    for (Thread* t : *rel_only) {
      add(t);
      t->p->clk++;
    }
  for (Thread* t : a) {
    t->p->base = v;
    t->p->clk++;
  }
}
static void vc_release(Thread* t, VCp& v) {
  if (!checks_on) return;
  v = v ? std::make_shared<VC>(*v) : std::make_shared<VC>(4 * L.R, 0);
  vc_export(t, *v);
  t->p->clk++;
}
static void vc_acquire(Thread* t, const VCp& v) {
  if (!checks_on || !v) return;
  auto n = std::make_shared<VC>(*v);
  if (t->p->base) vc_max(*n, *t->p->base);
  t->p->base = n;
  for (int k = 0; k < 3; k++) t->p->aseen[k] = std::max(t->p->aseen[k], (*n)[(k + 1) * L.R + t->gid]);
}

// ------------------------------------------------------------------ barriers
static void bar_complete(Bar& b, Thread* except) {
  stats.barriers++;
  L.idle = 0;
  vc_barrier(b.wait, &b.arr);
  for (Thread* t : b.wait)
    if (t != except) wake(t);
  b.wait.clear();
  b.arr.clear();
  b.arrived = 0;
  b.expected = 0;
}
static void check_exit_strict(Block* b, void* pc) {
  if (opt.strict_barrier && b->live != (int)b->th.size() && !b->warned_exit) {
    b->warned_exit = true;
    report("SYNC: __syncthreads reached by %d of %zu threads, the others have exited; at %s", b->live,
           b->th.size(), where(pc).c_str());
  }
}
__attribute__((noinline)) void sync_block(int id, int n, bool arrive_only) {
  Block* b = cur->blk;
  Bar& r = b->bar[id];
  int expect = n < 0 ? b->live : n;
  if (n >= 0 && (n % 32 || n > (int)b->th.size())) fail("bar.sync %d: bad thread count %d", id, n);
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
    if (arrive_only) return;
    return;
  }
  if (r.arrived > expect) fail("bar.sync %d: too many arrivals", id);
  if (!arrive_only) park("bar.sync", id, CUSIM_PC);
}
void sync_grid() {
  if (!L.cfg.cooperative) fail("grid sync in a non-cooperative launch");
  Bar& r = L.grid_bar;
  r.arrived++;
  r.wait.push_back(cur);
  if (r.arrived == L.R)
    bar_complete(r, cur);
  else
    park("grid.sync", 0, CUSIM_PC);
}
void cluster_arrive() {
  Cluster* c = cur->blk->cl;
  c->my[cur] = c->phase;
  vc_release(cur, c->pend);
  if (++c->arrived == c->live) {
    c->arrived = 0;
    c->phase++;
    L.idle = 0;
    for (Thread* t : c->wait) wake(t);
    c->wait.clear();
  }
}
void cluster_wait() {
  Cluster* c = cur->blk->cl;
  auto it = c->my.find(cur);
  if (it == c->my.end()) fail("cluster wait without arrive");
  uint32_t ph = it->second;
  c->my.erase(it);
  if (c->phase == ph) {
    c->wait.push_back(cur);
    park("barrier.cluster", ph, CUSIM_PC);
  }
  vc_acquire(cur, c->pend);
}
static void thread_exit() {
  Thread* me = cur;
  Block* b = me->blk;
  me->p->st = Priv::Done;
  me->wp->exited |= 1u << me->lane;
  b->live--;
  L.live--;
  L.idle = 0;
  for (int i = 0; i < me->wp->nc; i++)
    if (me->wp->c[i].mask >> me->lane & 1)
      fail("lane exited while the rest of its warp waits in a collective that names it");
  if (b->bar[0].arrived && b->bar[0].expected == 0 && b->bar[0].arrived == b->live) {
    check_exit_strict(b, b->bar[0].wait[0]->p->why_pc);
    bar_complete(b->bar[0], nullptr);
  }
  Cluster* c = b->cl;
  c->live--;
  if (c->live && c->arrived == c->live) {
    c->arrived = 0;
    c->phase++;
    for (Thread* t : c->wait) wake(t);
    c->wait.clear();
  }
  if (L.live == 0) {
    while (!L.async.empty()) {
      auto f = std::move(L.async.back());
      L.async.pop_back();
      f();
    }
    to_main();
    abort();
  }
  Thread* nx = pick();
  if (!nx) {
    std::string s = "DEADLOCK: no thread can run";
    describe_deadlock(s);
    record(s);
    L.aborted = true;
    to_main();
    abort();
  }
  cur = nx;
  switch_to(me->p->ctx, nx->p->ctx);
  abort();
}

// ------------------------------------------------------------------ warp collectives
__attribute__((noinline)) bool coll_arrive(uint32_t mask, int op, void* arg) {
  Warp* w = cur->wp;
  uint32_t bit = 1u << cur->lane;
  stats.collectives++;
  if (!(mask & bit)) fail("warp collective: the mask 0x%08x does not name the calling lane", mask);
  if (mask & ~w->exists) mask &= w->exists;  // partial last warp
  if (mask & w->exited) fail("warp collective: the mask 0x%08x names exited lanes", mask);
  w->arg[cur->lane] = arg;
  Coll* c = nullptr;
  for (int i = 0; i < w->nc; i++) {
    if (w->c[i].mask == mask)
      c = &w->c[i];
    else if (w->c[i].mask & mask)
      fail("warp collective: overlapping masks 0x%08x / 0x%08x", mask, w->c[i].mask);
  }
  if (!c) {
    c = &w->c[w->nc++];
    *c = {mask, 0, op};
  }
  if (c->op != op) fail("warp collective: lanes of one warp are in different operations (%d, %d)", c->op, op);
  c->arrived |= bit;
  if (c->arrived == mask) return true;
  park("warp collective", op, CUSIM_PC);
  return false;
}
void coll_release(uint32_t mask) {
  Warp* w = cur->wp;
  mask &= w->exists;
  L.idle = 0;
  for (int i = 0; i < w->nc; i++)
    if (w->c[i].mask == mask) {
      w->c[i] = w->c[--w->nc];
      break;
    }
  for (uint32_t m = mask & ~(1u << cur->lane); m; m &= m - 1) wake(w->t[__builtin_ctz(m)]);
}
void** coll_args() { return cur->wp->arg; }
void sync_warp(uint32_t mask) {
  if (coll_arrive(mask, 100, nullptr)) {
    if (checks_on) {
      std::vector<Thread*> v;
      for (uint32_t m = mask & cur->wp->exists; m; m &= m - 1) v.push_back(cur->wp->t[__builtin_ctz(m)]);
      vc_barrier(v);
    }
    coll_release(mask);
  }
}
void shfl(uint32_t mask, ShflArg* a) {
  if (coll_arrive(mask, kShfl, a)) {
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
    coll_release(mask);
  }
}
uint32_t vote(uint32_t mask, bool pred) {
  struct V {
    bool p;
    uint32_t out;
  } v{pred, 0};
  if (coll_arrive(mask, kVote, &v)) {
    Warp* w = cur->wp;
    uint32_t r = 0;
    mask &= w->exists;
    for (uint32_t m = mask; m; m &= m - 1) {
      int l = __builtin_ctz(m);
      if (((V*)w->arg[l])->p) r |= 1u << l;
    }
    for (uint32_t m = mask; m; m &= m - 1) ((V*)w->arg[__builtin_ctz(m)])->out = r;
    coll_release(mask);
  }
  return v.out;
}

// ------------------------------------------------------------------ memory: shared windows and device heap
static const size_t kSlot = 512 << 10, kPre = 64 << 10, kWin = 228 << 10;
static const int kSlots = 160;
static char* smem_lo;
static const size_t kHeap = 512ull << 20;
static char* heap_lo;
static size_t heap_top;
struct Alloc {
  uintptr_t lo, hi;
  std::string name;
};
static std::vector<Alloc> allocs;
static void init_mem() {
  if (smem_lo) return;
  smem_lo = (char*)mmap(nullptr, kSlot * kSlots, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  heap_lo = (char*)mmap(nullptr, kHeap, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
}
void* dmalloc(size_t n, const char* name) {
  init_mem();
  size_t r = (n + 15) & ~size_t(15), pages = (r + 4095) / 4096 * 4096;
  if (heap_top + pages + 8192 > kHeap) {
    fprintf(stderr, "cusim: device heap full\n");
    abort();
  }
  char* p = heap_lo + heap_top + 4096;
  heap_top += pages + 4096;  // [guard][pages][guard of the next]
  mprotect(p, pages, PROT_READ | PROT_WRITE);
  char* u = p + pages - r;
  memset(p, 0xFF, pages);
#ifdef __SANITIZE_ADDRESS__
  __asan_poison_memory_region(p, pages);
  __asan_unpoison_memory_region(u, n);
#endif
  allocs.push_back({(uintptr_t)u, (uintptr_t)u + n, name ? name : "?"});
  return u;
}
void dfree_all() {
#ifdef __SANITIZE_ADDRESS__
  if (heap_lo) __asan_unpoison_memory_region(heap_lo, heap_top);
#endif
  if (heap_lo && heap_top) {
    mmap(heap_lo, heap_top + 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  }
  heap_top = 0;
  allocs.clear();
}

static Block* block_of(uintptr_t off) {
  size_t s = off / kSlot;
  return s < L.blocks.size() ? L.blocks[s].get() : nullptr;
}
static bool smem_valid(const Block* b, uint32_t off, size_t n) {
  if (off >= b->dyn_off && off + n <= b->dyn_off + b->dyn_bytes) return true;
  for (auto& v : b->statics)
    if (off >= v.off && off + n <= v.off + v.bytes) return true;
  return false;
}
char* smem_dynamic() { return cur->blk->win + cur->blk->dyn_off; }
void* smem_static(const void* tag, size_t bytes, size_t align) {
  Block* b = cur->blk;
  for (auto& v : b->statics)
    if (v.tag == tag) return b->win + v.off;
  if (align < 16) align = 16;
  uint32_t off = (b->top + 64 + align - 1) / align * align;  // 64-byte red zone
  if (off + bytes > kWin) fail("shared memory: more than %zu KiB", kWin >> 10);
  b->statics.push_back({tag, off, (uint32_t)bytes});
  b->top = off + bytes;
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(b->win + off, bytes);
#endif
  return b->win + off;
}
uint32_t smem_addr(const void* p) {
  uintptr_t o = (uintptr_t)p - (uintptr_t)smem_lo;
  if (o >= kSlot * L.blocks.size()) fail("__cvta_generic_to_shared: %p is not shared memory", p);
  Block* b = block_of(o);
  int64_t w = (const char*)p - b->win;
  if (w < 0 || w > (int64_t)kWin) fail("__cvta_generic_to_shared: outside the window");
  return (uint32_t)w | (b == cur->blk ? 0 : (b->rank + 1) << 24);
}
static Block* addr_block(uint32_t a) {
  uint32_t r = a >> 24;
  if (!r) return cur->blk;
  Cluster* c = cur->blk->cl;
  if (r - 1 >= c->b.size()) fail("shared::cluster address: rank %u outside the cluster", r - 1);
  Block* b = c->b[r - 1];
  if (!b->live)
    fail("CLUSTER: access to the shared memory of a CTA that has already exited (rank %u)", r - 1);
  return b;
}
char* smem_ptr(uint32_t a, size_t n, const char* what) {
  Block* b = addr_block(a);
  uint32_t off = a & 0xFFFFFF;
  if (!smem_valid(b, off, n))
    fail("OUT OF BOUNDS: %s of %zu bytes at shared offset %u (dynamic region %u..%u), at %s", what, n, off,
         b->dyn_off, b->dyn_off + b->dyn_bytes, where(CUSIM_PC).c_str());
  return b->win + off;
}
uint32_t mapa(uint32_t a, uint32_t rank) {
  if (rank >= cur->blk->cl->b.size()) fail("mapa: rank %u", rank);
  return (a & 0xFFFFFF) | (rank + 1) << 24;
}
void* map_shared_rank(const void* p, uint32_t rank) {
  uint32_t a = smem_addr(p);
  if (rank >= cur->blk->cl->b.size()) fail("map_shared_rank: rank %u", rank);
  return cur->blk->cl->b[rank]->win + (a & 0xFFFFFF);
}
uint32_t cluster_rank() { return cur->blk->rank; }
uint32_t cluster_size() { return cur->blk->cl->b.size(); }

// ------------------------------------------------------------------ shadow memory: race, init and bounds
// checks
enum { fW = 1, fAtomic = 2, fInit = 4, fAsync = 8 };
struct Acc {
  uint32_t run, clk;
  uint16_t idx_lo;
  uint16_t fl;
  uint32_t idx;
  uint32_t pc;
};
template <int NR>
struct Cell {
  uint32_t epoch;
  Acc w;
  Acc r[NR];
};
using SCell = Cell<4>;
using GCell = Cell<2>;
// Blocks that are not resident together are unordered, except through atomics on a common variable ("last
// block reduces").
struct SyncVar {
  VCp vc;
  uint32_t set = 0;
  std::set<uint32_t> runs;
};
static std::unordered_map<uintptr_t, SyncVar> sync_var;
static std::set<uint32_t> known_runs;
static SCell* sshadow;
static GCell* gshadow;
static uintptr_t code_base;
static void init_shadow() {
  if (sshadow) return;
  init_mem();
  sshadow = (SCell*)mmap(nullptr, (kSlot / 2) * kSlots * sizeof(SCell), PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  gshadow = (GCell*)mmap(nullptr, (kHeap / 2) * sizeof(GCell), PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (sshadow == MAP_FAILED || gshadow == MAP_FAILED) {
    perror("cusim shadow");
    abort();
  }
}
static const Thread* thread_by(uint32_t idx) {
  uint32_t g = idx % L.R;
  for (auto& b : L.blocks) {
    if (g < b->th.size()) return b->th[g];
    g -= b->th.size();
  }
  return nullptr;
}
static std::string who_acc(const Acc& a) {
  if (a.run < L.blocks[0]->run_id) return "an earlier block";
  static const char* kind[4] = {"", "cp.async of ", "bulk copy of ", "wgmma of "};
  return std::string(kind[a.idx / L.R]) + who(thread_by(a.idx));
}
static uintptr_t pc_base(void* pc) {
  static void* lastpc;
  static uintptr_t lastb;
  if (pc == lastpc) return lastb;
  Dl_info d;
  lastpc = pc;
  return lastb = dladdr(pc, &d) ? (uintptr_t)d.dli_fbase : 0;
}
static void race(const char* kind, const char* mem, uint64_t off, const Acc& o, void* pc, bool mine_async) {
  void* opc = (void*)(code_base + o.pc);
  if (!g_seen.insert({opc, pc}).second) return;
  report("RACE (%s) on %s+%llu: %s%s at %s; earlier %s by %s at %s; no synchronisation between", kind, mem,
         (unsigned long long)off, mine_async ? "async op of " : "", who(cur).c_str(), where(pc).c_str(),
         (o.fl & fW) ? "write" : "read", who_acc(o).c_str(), where(opc).c_str());
}
static inline bool ordered(const Acc& a) {
  if (a.run < L.blocks[0]->run_id) return !known_runs.empty() && known_runs.count(a.run);
  return vc_get(cur, a.idx) >= a.clk;
}
template <int NR>
static inline void touch(Cell<NR>& c, uint32_t epoch, bool write, int fl, uint32_t idx, uint32_t clk,
                         void* pc, const char* mem, uint64_t off, bool proxy_async) {
  if (c.epoch != epoch) {
    memset(&c, 0, sizeof c);
    c.epoch = epoch;
  }
  uint32_t run = cur->blk->run_id;
  Acc me{run, clk, 0, (uint16_t)(fl | (write ? fW : 0)), idx, (uint32_t)((uintptr_t)pc - code_base)};
  if (c.w.clk && !(c.w.idx == idx && c.w.run == run)) {
    if (!((c.w.fl & fAtomic) && (fl & fAtomic)) && !ordered(c.w))
      race(write ? "write after write" : "read after write", mem, off, c.w, pc, proxy_async);
  }
  if (c.w.clk && proxy_async && !(c.w.fl & fAsync) && c.w.idx < (uint32_t)L.R &&
      c.w.run >= L.blocks[0]->run_id) {
    const Thread* t = thread_by(c.w.idx);
    if (t->p->fence_clk < c.w.clk)
      race("generic write not followed by fence.proxy.async before an async-proxy access", mem, off, c.w, pc,
           true);
  }
  if (write) {
    for (int i = 0; i < NR; i++) {
      Acc& a = c.r[i];
      if (a.clk && !(a.idx == idx && a.run == run) && !((a.fl & fAtomic) && (fl & fAtomic)) && !ordered(a)) {
        race("write after read", mem, off, a, pc, proxy_async);
        break;
      }
    }
    c.w = me;
  } else {
    int slot = -1;
    for (int i = 0; i < NR && slot < 0; i++)
      if (!c.r[i].clk || (c.r[i].idx == idx && c.r[i].run == run)) slot = i;
    if (slot < 0)
      for (int i = 0; i < NR && slot < 0; i++)
        if (ordered(c.r[i])) slot = i;
    if (slot < 0) slot = (cur->warp) % NR;
    c.r[slot] = me;
  }
}
static void check_smem(uintptr_t o, size_t n, bool write, int fl, int agent, uint32_t clk, void* pc,
                       bool proxy) {
  Block* b = block_of(o);
  int64_t w = b ? (int64_t)(o % kSlot) - (int64_t)kPre : -1;
  if (b && b != cur->blk && !b->started)
    fail("CLUSTER: DSMEM access to a CTA that has not started (no cluster barrier before it), at %s",
         where(pc).c_str());
  if (!b || w < 0 || !smem_valid(b, (uint32_t)w, n)) {
    fail("OUT OF BOUNDS: shared %s of %zu bytes at offset %lld (dynamic region %u..%u) at %s",
         write ? "write" : "read", n, (long long)w, b ? b->dyn_off : 0, b ? b->dyn_off + b->dyn_bytes : 0,
         where(pc).c_str());
  }
  if (b != cur->blk && !b->live)
    fail("CLUSTER: DSMEM access to a CTA that has already exited, at %s", where(pc).c_str());
  uint32_t idx = cur->gid + agent * L.R;
  for (uintptr_t c = o / 2; c <= (o + n - 1) / 2; c++) {
    SCell& s = sshadow[c];
    if (!write &&
        (s.epoch != b->run_id || !s.w.clk)) {  // never seen written, and still holding the poison (GCC does
                                               // not instrument `mem = f()` for class types)
      uint16_t v;
      memcpy(&v, smem_lo + c * 2, 2);
      if (v == 0xFFFF && g_seen.insert({nullptr, pc}).second)
        report("UNINITIALISED shared memory read at offset %lld by %s at %s", (long long)w, who(cur).c_str(),
               where(pc).c_str());
    }
    touch(s, b->run_id, write, fl, idx, clk, pc, "shared", c * 2 % kSlot - kPre, proxy);
  }
}
static void check_gmem(uintptr_t a, size_t n, bool write, int fl, int agent, uint32_t clk, void* pc) {
  static Alloc* last;
  Alloc* al = nullptr;
  if (last && last >= allocs.data() && last < allocs.data() + allocs.size() && a >= last->lo &&
      a + n <= last->hi)
    al = last;
  else
    for (auto& x : allocs)
      if (a >= x.lo && a + n <= x.hi) {
        al = &x;
        break;
      }
  if (!al) {
    std::string near = "no buffer";
    for (auto& x : allocs)
      if (a + 4096 >= x.lo && a < x.hi + 4096)
        near = "near buffer '" + x.name + "' (" + std::to_string(x.hi - x.lo) + " bytes), offset " +
               std::to_string((int64_t)(a - x.lo));
    fail("OUT OF BOUNDS: global %s of %zu bytes, %s, at %s", write ? "write" : "read", n, near.c_str(),
         where(pc).c_str());
  }
  last = al;
  uintptr_t o = a - (uintptr_t)heap_lo;
  uint32_t idx = cur->gid + agent * L.R;
  for (uintptr_t c = o / 2; c <= (o + n - 1) / 2; c++)
    touch(gshadow[c], g_epoch, write, fl, idx, clk, pc, al->name.c_str(), c * 2 + (uintptr_t)heap_lo - al->lo,
          false);
}
static inline void access(const void* p, size_t n, bool write, int fl, void* pc, int agent = 0,
                          uint32_t clk = 0, bool proxy = false) {
  if (!cur || !checks_on) return;
  stats.mem_checks++;
  uintptr_t a = (uintptr_t)p;
  if (!agent) clk = cur->p->clk;
  if (a - (uintptr_t)smem_lo < kSlot * kSlots)
    check_smem(a - (uintptr_t)smem_lo, n, write, fl, agent, clk, pc, proxy);
  else if (a - (uintptr_t)heap_lo < kHeap)
    check_gmem(a, n, write, fl, agent, clk, pc);
}
void note(const void* p, size_t n, bool write, bool atomic, void* pc) {
  access(p, n, write, atomic ? fAtomic : 0, pc);
}
static void note_async(const void* p, size_t n, bool write, int agent, void* pc, bool proxy) {
  access(p, n, write, fAsync, pc, agent, cur->p->aclk[agent - 1], proxy);
}

// ------------------------------------------------------------------ atomics
static void sync_point(const void* p, bool acq, bool rel) {
  if (!checks_on) return;
  auto& v = sync_var[(uintptr_t)p];
  if (v.set != L.set_id) {
    v.set = L.set_id;
    v.vc.reset();
  }
  if (acq) {
    vc_acquire(cur, v.vc);
    known_runs.insert(v.runs.begin(), v.runs.end());
  }
  if (rel) {
    vc_release(cur, v.vc);
    v.runs.insert(cur->blk->run_id);
  }
}
template <class T>
static T rmw(T* p, T (*f)(T, T), T v, bool sync, void* pc) {
  access(p, sizeof(T), true, fAtomic, pc);
  if (sync) sync_point(p, true, true);
  L.idle = 0;
  T o;
  memcpy(&o, p, sizeof o);
  T n = f(o, v);
  memcpy(p, &n, sizeof n);
  return o;
}
#define CUSIM_DEF(T, S)                                                       \
  T atomic_add(T* p, T v) {                                                   \
    return rmw<T>(p, [](T a, T b) { return (T)(a + b); }, v, S, CUSIM_PC);    \
  }                                                                           \
  T atomic_exch(T* p, T v) {                                                  \
    return rmw<T>(p, [](T, T b) { return b; }, v, S, CUSIM_PC);               \
  }                                                                           \
  T atomic_max(T* p, T v) {                                                   \
    return rmw<T>(p, [](T a, T b) { return a > b ? a : b; }, v, S, CUSIM_PC); \
  }                                                                           \
  T atomic_min(T* p, T v) {                                                   \
    return rmw<T>(p, [](T a, T b) { return a < b ? a : b; }, v, S, CUSIM_PC); \
  }                                                                           \
  T atomic_cas(T* p, T c, T v) {                                              \
    access(p, sizeof(T), true, fAtomic, CUSIM_PC);                            \
    if (S) sync_point(p, true, true);                                         \
    L.idle = 0;                                                               \
    T o = *p;                                                                 \
    if (!memcmp(&o, &c, sizeof o)) *p = v;                                    \
    return o;                                                                 \
  }                                                                           \
  T load_acquire(const T* p) {                                                \
    access(p, sizeof(T), false, fAtomic, CUSIM_PC);                           \
    sync_point(p, true, false);                                               \
    T o = *p;                                                                 \
    yield();                                                                  \
    return o;                                                                 \
  }                                                                           \
  T load_relaxed(const T* p) {                                                \
    access(p, sizeof(T), false, fAtomic, CUSIM_PC);                           \
    T o = *p;                                                                 \
    yield();                                                                  \
    return o;                                                                 \
  }                                                                           \
  void store_release(T* p, T v) {                                             \
    access(p, sizeof(T), true, fAtomic, CUSIM_PC);                            \
    sync_point(p, false, true);                                               \
    L.idle = 0;                                                               \
    *p = v;                                                                   \
  }                                                                           \
  void store_relaxed(T* p, T v) {                                             \
    access(p, sizeof(T), true, fAtomic, CUSIM_PC);                            \
    *p = v;                                                                   \
  }
CUSIM_DEF(int, true)
CUSIM_DEF(unsigned, true) CUSIM_DEF(unsigned long long, true) CUSIM_DEF(float, false)
    CUSIM_DEF(double, false) int atomic_and(int* p, int v) {
  return rmw<int>(p, [](int a, int b) { return a & b; }, v, true, CUSIM_PC);
}
int atomic_or(int* p, int v) {
  return rmw<int>(p, [](int a, int b) { return a | b; }, v, true, CUSIM_PC);
}
unsigned atomic_and(unsigned* p, unsigned v) {
  return rmw<unsigned>(p, [](unsigned a, unsigned b) { return a & b; }, v, true, CUSIM_PC);
}
unsigned atomic_or(unsigned* p, unsigned v) {
  return rmw<unsigned>(p, [](unsigned a, unsigned b) { return a | b; }, v, true, CUSIM_PC);
}

// ------------------------------------------------------------------ tensor core (warp level)
static inline float up_bf16(uint16_t h) {
  uint32_t u = (uint32_t)h << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
static inline float up_f16(uint16_t h) {
  __half_raw r;
  r.x = h;
  return __half2float(__half(r));
}
struct MmaArg {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
  const float* c;
};
static void mma_compute(Mma kind, void** arg) {
  stats.mma++;
  float A[16][16], B[16][8];
  double acc;
  int K = kind == Mma::tf32_1688 ? 8 : 16;
  for (int l = 0; l < 32; l++) {
    auto* x = (MmaArg*)arg[l];
    int g = l >> 2, t = l & 3;
    if (K == 16) {
      auto up = [&](uint32_t v, int hi) {
        uint16_t h = hi ? v >> 16 : v & 0xFFFF;
        return kind == Mma::bf16_16816 ? up_bf16(h) : up_f16(h);
      };
      for (int h = 0; h < 2; h++) {
        A[g][t * 2 + h] = up(x->a[0], h);
        A[g + 8][t * 2 + h] = up(x->a[1], h);
        A[g][t * 2 + 8 + h] = up(x->a[2], h);
        A[g + 8][t * 2 + 8 + h] = up(x->a[3], h);
        B[t * 2 + h][g] = up(x->b[0], h);
        B[t * 2 + 8 + h][g] = up(x->b[1], h);
      }
    } else {
      auto up = [&](uint32_t v) {
        v &= 0xFFFFE000u;
        float f;
        memcpy(&f, &v, 4);
        return f;
      };
      A[g][t] = up(x->a[0]);
      A[g + 8][t] = up(x->a[1]);
      A[g][t + 4] = up(x->a[2]);
      A[g + 8][t + 4] = up(x->a[3]);
      B[t][g] = up(x->b[0]);
      B[t + 4][g] = up(x->b[1]);
    }
  }
  float D[16][8];
  for (int i = 0; i < 16; i++) {
    double s[8] = {};
    for (int k = 0; k < K; k++) {
      double a = A[i][k];
      for (int j = 0; j < 8; j++) s[j] += a * B[k][j];
    }
    for (int j = 0; j < 8; j++) D[i][j] = (float)s[j];
  }
  (void)acc;
  for (int l = 0; l < 32; l++) {
    auto* x = (MmaArg*)arg[l];
    int g = l >> 2, t = l & 3;
    float c0 = x->c[0], c1 = x->c[1], c2 = x->c[2], c3 = x->c[3];
    x->d[0] = c0 + D[g][t * 2];
    x->d[1] = c1 + D[g][t * 2 + 1];
    x->d[2] = c2 + D[g + 8][t * 2];
    x->d[3] = c3 + D[g + 8][t * 2 + 1];
  }
}
void mma(Mma k, float* d, const uint32_t* a, const uint32_t* b, const float* c) {
  MmaArg x{d, a, b, c};
  if (coll_arrive(~0u, kMma, &x)) {
    mma_compute(k, cur->wp->arg);
    coll_release(~0u);
  }
}
struct LdArg {
  uint32_t* r;
  const uint32_t* w;
  uint32_t addr;
};
__attribute__((noinline)) void ldmatrix(uint32_t* r, int num, bool trans, uint32_t addr) {
  LdArg x{r, nullptr, addr};
  void* pc = CUSIM_PC;
  if (cur->lane < 8 * num) {
    if (addr & 15) fail("ldmatrix: row address %u is not 16-byte aligned, at %s", addr, where(pc).c_str());
    char* p = smem_ptr(addr, 16, "ldmatrix row");
    access(p, 16, false, 0, pc);
  }
  if (coll_arrive(~0u, kLdsm, &x)) {
    void** arg = cur->wp->arg;
    uint16_t m[8][8];
    for (int i = 0; i < num; i++) {
      for (int q = 0; q < 8; q++)
        memcpy(m[q],
               addr_block(((LdArg*)arg[8 * i + q])->addr)->win + (((LdArg*)arg[8 * i + q])->addr & 0xFFFFFF),
               16);
      for (int l = 0; l < 32; l++) {
        int a = l >> 2, b = (l & 3) * 2;
        uint32_t lo = trans ? m[b][a] : m[a][b], hi = trans ? m[b + 1][a] : m[a][b + 1];
        ((LdArg*)arg[l])->r[i] = lo | hi << 16;
      }
    }
    coll_release(~0u);
  }
}
__attribute__((noinline)) void stmatrix(const uint32_t* r, int num, bool trans, uint32_t addr) {
  LdArg x{nullptr, r, addr};
  void* pc = CUSIM_PC;
  if (cur->lane < 8 * num) {
    if (addr & 15) fail("stmatrix: row address is not 16-byte aligned");
    char* p = smem_ptr(addr, 16, "stmatrix row");
    access(p, 16, true, 0, pc);
  }
  if (coll_arrive(~0u, kLdsm, &x)) {
    void** arg = cur->wp->arg;
    uint16_t m[8][8];
    for (int i = 0; i < num; i++) {
      for (int l = 0; l < 32; l++) {
        int a = l >> 2, b = (l & 3) * 2;
        uint32_t v = ((LdArg*)arg[l])->w[i];
        if (trans) {
          m[b][a] = v;
          m[b + 1][a] = v >> 16;
        } else {
          m[a][b] = v;
          m[a][b + 1] = v >> 16;
        }
      }
      for (int q = 0; q < 8; q++) memcpy(cur->blk->win + ((LdArg*)arg[8 * i + q])->addr, m[q], 16);
    }
    coll_release(~0u);
  }
}

// ------------------------------------------------------------------ cp.async
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
  note_async(d, bytes, true, 1, pc, false);
  if (src_bytes) note_async(src, src_bytes, false, 1, pc, false);
  if (eager())
    do_copy(c);
  else
    cur->p->open.push_back(c);
}
void cp_async_commit() {
  auto* p = cur->p;
  p->groups.push_back(std::move(p->open));
  p->open.clear();
  p->aclk[0]++;
}
void cp_async_wait(int n) {
  auto* p = cur->p;
  if (n < 0) cp_async_commit();  // wait_all
  int keep = n < 0 ? 0 : n;
  while ((int)p->groups.size() > keep) {
    for (auto& c : p->groups.front()) do_copy(c);
    p->groups.pop_front();
  }
  uint32_t done = p->aclk[0] - 1 - (uint32_t)p->groups.size();
  if (done > p->aseen[0]) p->aseen[0] = done;
}

// ------------------------------------------------------------------ mbarrier
static const uint32_t kMagic = 0x4D424152;
static Mbar& mbar_at(uint32_t a, const char* op, Block** bo = nullptr) {
  if (a & 7) fail("%s: mbarrier address not 8-byte aligned", op);
  char* p = smem_ptr(a, 8, op);
  uint32_t v[2];
  memcpy(v, p, 8);
  Block* b = addr_block(a);
  if (v[0] != kMagic || v[1] >= b->mb.size())
    fail("%s: no initialised mbarrier at shared offset %u", op, a & 0xFFFFFF);
  if (bo) *bo = b;
  return b->mb[v[1]];
}
void mbar_init(uint32_t a, uint32_t count) {
  char* p = smem_ptr(a, 8, "mbarrier.init");
  access(p, 8, true, 0, CUSIM_PC);
  Block* b = addr_block(a);
  Mbar m;
  m.count = m.pending = count;
  b->mb.push_back(m);
  uint32_t v[2] = {kMagic, (uint32_t)b->mb.size() - 1};
  memcpy(p, v, 8);
}
void mbar_inval(uint32_t a) {
  char* p = smem_ptr(a, 8, "mbarrier.inval");
  memset(p, 0xFF, 8);
}
static void mbar_check(Mbar& m) {
  if (m.pending == 0 && m.tx == 0) {
    m.phase++;
    m.pending = m.count;
    m.done = m.pend;
    L.idle = 0;
    for (Thread* t : m.wait) wake(t);
    m.wait.clear();
  }
}
void mbar_arrive(uint32_t a, uint32_t count, uint32_t tx) {
  Mbar& m = mbar_at(a, "mbarrier.arrive");
  access(smem_ptr(a, 8, ""), 8, true, fAtomic, CUSIM_PC);
  vc_release(cur, m.pend);
  if (m.pending < count)
    fail("mbarrier.arrive: more arrivals than the expected %u in phase %u", m.count, m.phase);
  m.tx += tx;
  m.pending -= count;
  mbar_check(m);
}
void mbar_expect_tx(uint32_t a, uint32_t tx) {
  Mbar& m = mbar_at(a, "mbarrier.expect_tx");
  access(smem_ptr(a, 8, ""), 8, true, fAtomic, CUSIM_PC);
  m.tx += tx;
}
bool mbar_try_wait(uint32_t a, uint32_t parity) {
  {
    Mbar& m = mbar_at(a, "mbarrier.try_wait");
    access(smem_ptr(a, 8, ""), 8, false, fAtomic, CUSIM_PC);
    if ((m.phase & 1) != (parity & 1)) {
      vc_acquire(cur, m.done);
      return true;
    }
  }
  yield();
  Mbar& m = mbar_at(a, "mbarrier.try_wait");
  if ((m.phase & 1) != (parity & 1)) {
    vc_acquire(cur, m.done);
    return true;
  }
  return false;
}
void mbar_wait(uint32_t a, uint32_t parity) {
  access(smem_ptr(a, 8, "mbarrier wait"), 8, false, fAtomic, CUSIM_PC);
  for (;;) {
    Mbar& m = mbar_at(a, "mbarrier wait");
    if ((m.phase & 1) != (parity & 1)) {
      vc_acquire(cur, m.done);
      return;
    }
    m.wait.push_back(cur);
    park("mbarrier wait, smem offset", a, CUSIM_PC);
  }
}
void fence_async_proxy() {
  cur->p->fence_clk = cur->p->clk;
  if (checks_on) cur->p->clk++;
}

// ------------------------------------------------------------------ TMA
static inline uint32_t swz(uint32_t a, int w) {  // absolute shared address swizzle
  if (w == 128) return a ^ ((a >> 3) & 0x70);
  if (w == 64) return a ^ ((a >> 3) & 0x30);
  if (w == 32) return a ^ ((a >> 3) & 0x10);
  return a;
}
static void post(std::function<void()> f) {
  stats.async_ops++;
  if (opt.async_mode == 1)
    f();
  else
    L.async.push_back(std::move(f));
}
static void complete_tx(Block* b, uint32_t off, uint32_t bytes, uint32_t agent_idx, uint32_t clk) {
  uint32_t v[2];
  memcpy(v, b->win + off, 8);
  if (v[0] != kMagic) {
    report("TMA: mbarrier overwritten before completion");
    return;
  }
  Mbar& m = b->mb[v[1]];
  m.tx -= bytes;
  if (checks_on) {
    m.pend = m.pend ? std::make_shared<VC>(*m.pend) : std::make_shared<VC>(4 * L.R, 0);
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
    targets.push_back(addr_block(dst));
  else
    for (size_t r = 0; r < me->cl->b.size(); r++)
      if (cmask >> r & 1) {
        if (!me->cl->b[r]->live) fail("CLUSTER: multicast into a CTA that has already exited");
        targets.push_back(me->cl->b[r]);
      }
  uint32_t off = dst & 0xFFFFFF, moff = mbar & 0xFFFFFF;
  Block* mb_blk = cmask ? nullptr : addr_block(mbar);
  for (Block* b : targets) {
    if (!smem_valid(b, off, bytes))
      fail("OUT OF BOUNDS: TMA write of %u bytes at shared offset %u, at %s", bytes, off, where(pc).c_str());
    note_async(b->win + off, bytes, true, 2, pc, true);
  }
  mbar_at(mbar, "TMA completion");
  uint32_t agent = 2 * L.R + cur->gid, clk = cur->p->aclk[1]++;
  post([=] {
    for (Block* b : targets) {
      for (uint32_t r = 0; r < t.box[1]; r++)
        for (uint32_t c = 0; c < rowb; c += 16) {
          uint32_t a = swz(off + r * rowb + c, t.swizzle);
          char buf[16];
          for (int e = 0; e < 16 / t.elem; e++) {
            int64_t gx = (int64_t)x + c / t.elem + e, gy = (int64_t)y + r;
            if (gx < 0 || gy < 0 || gx >= (int64_t)t.dim[0] || gy >= (int64_t)t.dim[1])
              memset(buf + e * t.elem, 0, t.elem);
            else
              memcpy(buf + e * t.elem, t.base + gy * t.row_stride + gx * t.elem, t.elem);
          }
          memcpy(b->win + a, buf, 16);
        }
      complete_tx(cmask ? b : mb_blk, moff, bytes, agent, clk);
    }
  });
}
void bulk_g2s(uint32_t dst, const void* src, uint32_t bytes, uint32_t mbar) {
  if ((dst & 15) || (bytes & 15) || ((uintptr_t)src & 15)) fail("cp.async.bulk: 16-byte alignment");
  void* pc = CUSIM_PC;
  char* d = smem_ptr(dst, bytes, "cp.async.bulk write");
  note_async(d, bytes, true, 2, pc, true);
  note_async(src, bytes, false, 2, pc, false);
  mbar_at(mbar, "bulk completion");
  uint32_t agent = 2 * L.R + cur->gid, clk = cur->p->aclk[1]++;
  Block* b = addr_block(mbar);
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
  note_async(s, bytes, false, 2, pc, true);
  Block* b = cur->blk;
  uint32_t off = src & 0xFFFFFF;
  for (uint32_t r = 0; r < t.box[1]; r++)
    if ((int64_t)y + r < (int64_t)t.dim[1] && y + (int)r >= 0) {
      int64_t x0 = std::max(x, 0), x1 = std::min<int64_t>(x + t.box[0], t.dim[0]);
      if (x1 > x0)
        note_async(t.base + (y + r) * t.row_stride + x0 * t.elem, (x1 - x0) * t.elem, true, 2, pc, false);
    }
  cur->p->bopen.push_back([=] {
    for (uint32_t r = 0; r < t.box[1]; r++)
      for (uint32_t c = 0; c < t.box[0]; c++) {
        int64_t gx = (int64_t)x + c, gy = (int64_t)y + r;
        if (gx < 0 || gy < 0 || gx >= (int64_t)t.dim[0] || gy >= (int64_t)t.dim[1]) continue;
        memcpy(t.base + gy * t.row_stride + gx * t.elem, b->win + swz(off + r * rowb + c * t.elem, t.swizzle),
               t.elem);
      }
  });
}
void bulk_commit() {
  auto* p = cur->p;
  p->bgroups.push_back(std::move(p->bopen));
  p->bopen.clear();
  p->aclk[1]++;
}
void bulk_wait(int n, bool) {
  auto* p = cur->p;
  while ((int)p->bgroups.size() > n) {
    for (auto& f : p->bgroups.front()) f();
    p->bgroups.pop_front();
    stats.async_ops++;
  }
  if (n == 0) p->aseen[1] = p->aclk[1] - 1;
}

// ------------------------------------------------------------------ wgmma: executed per warp (16 rows),
// operands from shared memory
static uint32_t desc_off(uint64_t d, bool mn_major, int r,
                         int k) {  // byte address of element (r along M/N, k) of 16-bit type
  uint32_t start = (d & 0x3FFF) << 4, lbo = (d >> 16 & 0x3FFF) << 4, sbo = (d >> 32 & 0x3FFF) << 4;
  int mode = d >> 62, W = mode == 1 ? 128 : mode == 2 ? 64 : mode == 3 ? 32 : 0;
  uint32_t o;
  if (!mn_major)
    o = W ? (r % 8) * W + (r / 8) * sbo + k * 2 : (r % 8) * 16 + (r / 8) * sbo + (k / 8) * lbo + (k % 8) * 2;
  else if (W) {
    int per = W / 2;
    o = (r % per) * 2 + (r / per) * lbo + (k % 8) * W + (k / 8) * sbo;
  } else
    o = (r % 8) * 2 + (r / 8) * sbo + (k % 8) * 16 + (k / 8) * lbo;
  return swz(start + o, W);
}
static void wgmma_exec(Warp* w, const WgOp& op) {
  stats.mma++;
  static float A[16][16];
  static float B[16][256];
  Thread* t0 = w->t[0];
  Block* b = t0->blk;
  int row0 = (t0->warp & 3) * 16;
  auto up = [&](uint16_t h) { return op.bf16 ? up_bf16(h) : up_f16(h); };
  auto ld = [&](uint32_t a) {
    uint16_t h;
    memcpy(&h, b->win + a, 2);
    return up(h);
  };
  if (op.has_a)
    for (int l = 0; l < 32; l++) {
      int g = l >> 2, t = l & 3;
      for (int h = 0; h < 2; h++) {
        auto e = [&](uint32_t v) { return up(h ? v >> 16 : v & 0xFFFF); };
        A[g][t * 2 + h] = e(op.a[l][0]);
        A[g + 8][t * 2 + h] = e(op.a[l][1]);
        A[g][t * 2 + 8 + h] = e(op.a[l][2]);
        A[g + 8][t * 2 + 8 + h] = e(op.a[l][3]);
      }
    }
  else
    for (int i = 0; i < 16; i++)
      for (int k = 0; k < 16; k++) A[i][k] = ld(desc_off(op.da, op.ta, row0 + i, k));
  for (int j = 0; j < op.n; j++)
    for (int k = 0; k < 16; k++) B[k][j] = ld(desc_off(op.db, op.tb, j, k));
  static float D[16][256];
  for (int i = 0; i < 16; i++) {
    for (int j = 0; j < op.n; j++) D[i][j] = 0;
    for (int k = 0; k < 16; k++) {
      float a = A[i][k];
      for (int j = 0; j < op.n; j++) D[i][j] += a * B[k][j];
    }
  }
  for (int l = 0; l < 32; l++) {
    int g = l >> 2, t = l & 3;
    float* d = op.d[l];
    for (int j = 0; j < op.n / 8; j++) {
      const int c = j * 8 + t * 2;
      float v[4] = {D[g][c], D[g][c + 1], D[g + 8][c], D[g + 8][c + 1]};
      for (int q = 0; q < 4; q++) d[j * 4 + q] = (op.scale ? d[j * 4 + q] : 0.f) + v[q];
    }
  }
}
struct WgArg {
  float* d;
  const uint32_t* a;
};
static void wg_note(uint64_t d, bool mn, int r0, int rows, void* pc) {  // one note per 16-byte chunk
  Block* b = cur->blk;
  if (!mn) {
    for (int r = r0; r < r0 + rows; r++)
      for (int k = 0; k < 16; k += 8) {
        uint32_t a = desc_off(d, mn, r, k);
        if (!smem_valid(b, a, 16))
          fail("OUT OF BOUNDS: wgmma operand at shared offset %u, at %s", a, where(pc).c_str());
        if (checks_on) note_async(b->win + a, 16, false, 3, pc, true);
      }
  } else
    for (int k = 0; k < 16; k++)
      for (int r = r0; r < r0 + rows; r += 8) {
        uint32_t a = desc_off(d, mn, r, k);
        if (!smem_valid(b, a, 16))
          fail("OUT OF BOUNDS: wgmma operand at shared offset %u, at %s", a, where(pc).c_str());
        if (checks_on) note_async(b->win + a, 16, false, 3, pc, true);
      }
}
__attribute__((noinline)) void wgmma(float* d, int n, const uint32_t* a, uint64_t da, uint64_t db, bool scale,
                                     bool ta, bool tb, bool bf16) {
  WgArg x{d, a};
  void* pc = CUSIM_PC;
  if (coll_arrive(~0u, kWgmma, &x)) {
    Warp* w = cur->wp;
    WgOp op;
    op.n = n;
    op.da = da;
    op.db = db;
    op.scale = scale;
    op.ta = ta;
    op.tb = tb;
    op.bf16 = bf16;
    op.has_a = a != nullptr;
    for (int l = 0; l < 32; l++) {
      auto* y = (WgArg*)w->arg[l];
      op.d[l] = y->d;
      if (y->a) memcpy(op.a[l], y->a, 16);
    }
    if (!a) wg_note(da, ta, (cur->warp & 3) * 16, 16, pc);
    wg_note(db, tb, 0, n, pc);
    w->wopen.push_back(op);  // accumulators change only when the group is waited for
    coll_release(~0u);
  }
}
void wgmma_fence() { sync_warp(~0u); }
void wgmma_commit() {
  if (coll_arrive(~0u, kWgCommit, nullptr)) {
    Warp* w = cur->wp;
    w->wgroups.push_back(std::move(w->wopen));
    w->wopen.clear();
    for (auto* t : w->t) t->p->aclk[2]++;
    coll_release(~0u);
  }
}
// wgmma is an operation of the warpgroup: the wait cannot finish before all four warps have issued the group,
// and it covers the shared-memory reads of all four (CUTLASS lets one thread per warpgroup release a pipeline
// slot on the strength of this).
void wgmma_wait(int n) {
  if (coll_arrive(~0u, kWgWait, nullptr)) {
    Warp* w = cur->wp;
    while ((int)w->wgroups.size() > n) {
      for (auto& o : w->wgroups.front()) wgmma_exec(w, o);
      w->wgroups.pop_front();
    }
    for (auto* t : w->t) t->p->aseen[2] = t->p->aclk[2] - 1 - (uint32_t)w->wgroups.size();
    coll_release(~0u);
  }
  Block* b = cur->blk;
  int g = cur->warp / 4;
  if ((int)b->wp.size() < g * 4 + 4) fail("wgmma: incomplete warpgroup");
  Bar& r = b->wgbar[g];
  r.wait.push_back(cur);
  if (++r.arrived < 128) {
    park("wgmma.wait_group (warpgroup)", g, CUSIM_PC);
    return;
  }
  if (checks_on)
    for (int w = 0; w < 4; w++) {
      VCp v = std::make_shared<VC>(4 * L.R, 0);
      for (Thread* t : b->wp[g * 4 + w]->t)
        if (t->p->base) vc_max(*v, *t->p->base);  // bases of one warp are (nearly) equal
      bool same = true;
      for (Thread* t : b->wp[g * 4 + w]->t) same &= t->p->base == b->wp[g * 4 + w]->t[0]->p->base;
      auto add = [&](VC& x) {
        for (Thread* t : r.wait) {
          auto& e = x[3 * L.R + t->gid];
          e = std::max(e, t->p->aseen[2]);
        }
      };
      if (same) {
        add(*v);
        for (Thread* t : b->wp[g * 4 + w]->t) t->p->base = v;
      } else
        for (Thread* t : b->wp[g * 4 + w]->t) {
          auto x = t->p->base ? std::make_shared<VC>(*t->p->base) : std::make_shared<VC>(4 * L.R, 0);
          add(*x);
          t->p->base = x;
        }
    }
  for (Thread* t : r.wait)
    if (t != cur) wake(t);
  r.wait.clear();
  r.arrived = 0;
}

// ------------------------------------------------------------------ launch
static sigjmp_buf segv_jmp;
static struct sigaction old_segv;
static char* alt;
static void on_segv(int, siginfo_t* si, void* uc) {
  (void)uc;
  uintptr_t a = (uintptr_t)si->si_addr;
  void* pc = nullptr;
#if defined(__x86_64__)
  pc = (void*)((ucontext_t*)uc)->uc_mcontext.gregs[16];
#endif
  if (!L.active) {
    signal(SIGSEGV, SIG_DFL);
    return;
  }
  std::string near;
  for (auto& x : allocs)
    if (a + 65536 >= x.lo && a < x.hi + 65536)
      near += " near '" + x.name + "' offset " + std::to_string((int64_t)(a - x.lo)) + " of " +
              std::to_string(x.hi - x.lo);
  record("OUT OF BOUNDS: guard page hit, address " + std::to_string(a) + near + " at " +
         where((char*)pc + 1) + " [" + who(cur) + "]");
  siglongjmp(segv_jmp, 1);
}
static void setup_set(const std::vector<std::vector<uint3>>& groups, unsigned nthreads) {
  const Config& c = L.cfg;
  L.blocks.clear();
  L.clusters.clear();
  L.warps.clear();
  L.async.clear();
  L.grid_bar = Bar();
  known_runs.clear();
  size_t nb = 0;
  for (auto& g : groups) nb += g.size();
  if (nb > (size_t)kSlots) {
    fprintf(stderr, "cusim: %zu resident blocks (max %d)\n", nb, kSlots);
    abort();
  }
  L.R = nb * nthreads;
  L.live = L.R;
  int nwarp = (nthreads + 31) / 32;
  size_t ti = 0, wi = 0;
  while (tpool.size() < (size_t)L.R) {
    tpool.push_back(std::make_unique<Thread>());
    ppool.push_back(std::make_unique<Priv>());
    char* s = (char*)mmap(nullptr, kStack + 4096, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (s == MAP_FAILED) {
      perror("stack");
      abort();
    }
    mprotect(s, 4096, PROT_NONE);
    stacks.push_back(s + 4096);
  }
  while (wpool.size() < nb * nwarp) wpool.push_back(std::make_unique<Warp>());
  uint32_t run0 = ++g_run;
  for (auto& g : groups) {
    auto cl = std::make_unique<Cluster>();
    cl->live = g.size() * nthreads;
    for (auto& bid : g) {
      auto b = std::make_unique<Block>();
      b->bid = bid;
      b->slot = L.blocks.size();
      b->win = smem_lo + b->slot * kSlot + kPre;
      b->run_id = run0;
      b->cl = cl.get();
      b->rank = cl->b.size();
      cl->b.push_back(b.get());
      b->dyn_off = 1024;
      b->dyn_bytes = c.smem;
      b->top = b->dyn_off + c.smem;
      b->live = nthreads;
      // poison: only what was or can be used
#ifdef __SANITIZE_ADDRESS__
      __asan_unpoison_memory_region(b->win, kWin);
#endif
      memset(b->win, 0xFF, std::min<size_t>(kWin, b->top + 20480));
#ifdef __SANITIZE_ADDRESS__
      __asan_poison_memory_region(b->win - kPre, kSlot);
      __asan_unpoison_memory_region(b->win + b->dyn_off, c.smem);
#endif
      for (int w = 0; w < nwarp; w++) {
        Warp* wp = wpool[wi++].get();
        *wp = Warp();
        memset(wp->t, 0, sizeof wp->t);
        wp->pos = L.warps.size();
        L.warps.push_back(wp);
        b->wp.push_back(wp);
      }
      for (unsigned i = 0; i < nthreads; i++) {
        Thread* t = tpool[ti].get();
        *t = Thread();
        t->p = ppool[ti].get();
        Priv* p = t->p;
        Ctx keep = p->ctx;
        *p = Priv();
        p->ctx = keep;
        t->tid = {i % c.block.x, i / c.block.x % c.block.y, i / (c.block.x * c.block.y)};
        t->bid = bid;
        t->bdim = c.block;
        t->gdim = c.grid;
        t->lin = i;
        t->warp = i / 32;
        t->lane = i % 32;
        t->gid = ti;
        t->blk = b.get();
        t->wp = b->wp[i / 32];
        t->wp->t[t->lane] = t;
        t->wp->exists |= 1u << t->lane;
        b->th.push_back(t);
        prepare(t, stacks[ti], ti);
        ti++;
      }
      L.blocks.push_back(std::move(b));
    }
    L.clusters.push_back(std::move(cl));
  }
  int np = L.warps.size();
  L.rl.assign(np, 0);
  L.rw.assign((np + 63) / 64, 0);
  L.at.resize(np);
  L.nrun = 0;
  L.idle = 0;
  for (int i = 0; i < np; i++) L.at[i] = i;
  if (L.policy == kPct)
    for (int i = np - 1; i > 0; i--) std::swap(L.at[i], L.at[rng() % (i + 1)]);
  if (L.policy == kReverse) std::reverse(L.at.begin(), L.at.end());
  for (int i = 0; i < np; i++) L.warps[L.at[i]]->pos = i;
  for (auto& b : L.blocks)
    for (Thread* t : b->th) wake(t);
}
static void check_redzones() {  // plain builds: writes outside the declared shared arrays leave a mark
  if (checks_on) return;
#ifndef __SANITIZE_ADDRESS__
  for (auto& b : L.blocks) {
    std::vector<std::pair<uint32_t, uint32_t>> v{{b->dyn_off, b->dyn_off + b->dyn_bytes}};
    for (auto& s : b->statics) v.push_back({s.off, s.off + s.bytes});
    uint32_t p = b->dyn_off - 64;
    for (auto& [lo, hi] : v) {
      for (; p < lo; p++)
        if ((uint8_t)b->win[p] != 0xFF) {
          report("OUT OF BOUNDS: shared red zone overwritten at offset %u (block %u,%u,%u)", p, b->bid.x,
                 b->bid.y, b->bid.z);
          return;
        }
      p = hi;
    }
    for (uint32_t e = p + 1024; p < e && p < kWin; p++)
      if ((uint8_t)b->win[p] != 0xFF) {
        report("OUT OF BOUNDS: shared memory written past its end, offset %u (end %u) (block %u,%u,%u)", p,
               b->top, b->bid.x, b->bid.y, b->bid.z);
        return;
      }
  }
#endif
}
int run(const Config& c, const void* kernel, void (*thunk)(void*), void* arg) {
  (void)kernel;
  auto t0 = std::chrono::steady_clock::now();
  init_mem();
  rng_seed(opt.seed);
  int err0 = g_nerr;
  L.cfg = c;
  L.thunk = thunk;
  L.arg = arg;
  L.aborted = false;
  L.active = true;
  g_epoch++;
  g_run++;
  sync_var.clear();
  L.policy = opt.policy == kAuto
                 ? (int[]){kRandom, kPct, kRandom, kPct, kReverse, kInOrder}[(opt.seed + 5) % 6]
                 : opt.policy;
  checks_on = instrumented();
  if (checks_on) init_shadow();
  if (!code_base) code_base = pc_base((void*)thunk);
  unsigned nt = c.block.x * c.block.y * c.block.z, cs = c.cluster.x * c.cluster.y * c.cluster.z;
  if (nt == 0 || nt > 1024) {
    report("launch: %u threads per block", nt);
    goto out;
  }
  if (c.smem > 227 * 1024) {
    report("launch: %u bytes of dynamic shared memory exceed 227 KiB", c.smem);
    goto out;
  }
  if (c.grid.x % c.cluster.x || c.grid.y % c.cluster.y || c.grid.z % c.cluster.z || cs > 16) {
    report("launch: grid is not a multiple of the cluster");
    goto out;
  }
  {
    std::vector<std::vector<uint3>> groups;
    for (unsigned z = 0; z < c.grid.z; z += c.cluster.z)
      for (unsigned y = 0; y < c.grid.y; y += c.cluster.y)
        for (unsigned x = 0; x < c.grid.x; x += c.cluster.x) {
          std::vector<uint3> g;
          for (unsigned k = 0; k < c.cluster.z; k++)
            for (unsigned j = 0; j < c.cluster.y; j++)
              for (unsigned i = 0; i < c.cluster.x; i++) g.push_back({x + i, y + j, z + k});
          groups.push_back(g);
        }
    if (L.policy != kInOrder)
      for (size_t i = groups.size() - 1; i > 0; i--) std::swap(groups[i], groups[rng() % (i + 1)]);
    size_t per = c.cooperative ? groups.size() : std::max(1, opt.max_resident);
    stack_t ss{};
    if (!alt) alt = (char*)malloc(1 << 17);
    ss.ss_sp = alt;
    ss.ss_size = 1 << 17;
    sigaltstack(&ss, nullptr);
    struct sigaction sa{};
    sa.sa_sigaction = on_segv;
    sa.sa_flags = SA_SIGINFO | SA_ONSTACK;
#ifndef __SANITIZE_ADDRESS__
    sigaction(SIGSEGV, &sa, &old_segv);
#endif
    for (size_t i = 0; i < groups.size() && !L.aborted; i += per) {
      std::vector<std::vector<uint3>> s(groups.begin() + i,
                                        groups.begin() + std::min(groups.size(), i + per));
      setup_set(s, nt);
      L.set_id++;
      if (sigsetjmp(segv_jmp, 1) == 0) {
        Thread* t = pick();
        cur = t;
        switch_to(main_ctx, t->p->ctx);
      } else {
        L.aborted = true;
      }
      cur = nullptr;
      if (!L.aborted) check_redzones();
    }
#ifndef __SANITIZE_ADDRESS__
    sigaction(SIGSEGV, &old_segv, nullptr);
#endif
  }
out:
  cur = nullptr;
  L.active = false;
  stats.seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - t0).count();
  return g_nerr > err0;
}
}  // namespace cusim

// ------------------------------------------------------------------ -fsanitize=thread entry points (kernels
// only; libtsan is not linked)
static bool tsan_seen;
bool cusim::instrumented() { return tsan_seen && !getenv("CUSIM_NO_CHECKS"); }
#define PC __builtin_return_address(0)
static void misaligned(void* p, int n, void* pc) {
  if (cusim::cur && cusim::checks_on)
    cusim::fail("MISALIGNED: %d-byte access to %p at %s", n, p, cusim::where(pc).c_str());
}
#define CUSIM_ALIGN(p, n) \
  if ((uintptr_t)p & (n - 1)) misaligned(p, n, PC)
extern "C" {
void __tsan_init() { tsan_seen = true; }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
#define RW(n)                                                                   \
  void __tsan_read##n(void* p) {                                                \
    CUSIM_ALIGN(p, n);                                                          \
    cusim::access(p, n, false, 0, PC);                                          \
  }                                                                             \
  void __tsan_write##n(void* p) {                                               \
    CUSIM_ALIGN(p, n);                                                          \
    cusim::access(p, n, true, 0, PC);                                           \
  }                                                                             \
  void __tsan_unaligned_read##n(void* p) { cusim::access(p, n, false, 0, PC); } \
  void __tsan_unaligned_write##n(void* p) { cusim::access(p, n, true, 0, PC); } \
  void __tsan_volatile_read##n(void* p) { cusim::access(p, n, false, 0, PC); }  \
  void __tsan_volatile_write##n(void* p) { cusim::access(p, n, true, 0, PC); }
RW(1) RW(2) RW(4) RW(8) RW(16) void __tsan_read_range(void* p, size_t n) {
  if (n) cusim::access(p, n, false, 0, PC);
}
void __tsan_write_range(void* p, size_t n) {
  if (n) cusim::access(p, n, true, 0, PC);
}
void* __tsan_memcpy(void* d, const void* s, size_t n) {
  if (n) {
    cusim::access(s, n, false, 0, PC);
    cusim::access(d, n, true, 0, PC);
  }
  return memcpy(d, s, n);
}
void* __tsan_memset(void* d, int v, size_t n) {
  if (n) cusim::access(d, n, true, 0, PC);
  return memset(d, v, n);
}
void* __tsan_memmove(void* d, const void* s, size_t n) {
  if (n) {
    cusim::access(s, n, false, 0, PC);
    cusim::access(d, n, true, 0, PC);
  }
  return memmove(d, s, n);
}
int __tsan_atomic8_load(const volatile void* p, int) {
  return *(const volatile char*)p;
}  // static-local guards etc.
int __tsan_atomic32_load(const volatile void* p, int) { return *(const volatile int*)p; }
}
