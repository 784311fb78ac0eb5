// Shadow memory. For every 2 bytes of shared and global memory it keeps who wrote each byte last, and some of
// those who read since; for every access of kernel code it asks:
//   bounds         does it lie in an array of this block, or in a buffer of the heap?
//   initialised    was shared memory written before it is read?
//   races          is every earlier access by another thread or asynchronous agent ordered before this one?
//   async proxy    were ordinary writes fenced before TMA or wgmma reads them?
//   clusters       is the block whose shared memory is accessed started, and not yet over?
// A race is found from the order of events, not from wrong values: whatever the schedule was. What is kept is
// bounded (4 readers of a shared cell, 2 of a global one), so that a write after a dropped read can be
// missed; nothing is reported that is not there.
#include <sys/mman.h>

#include <cstdlib>

#include "internal.h"

namespace cusim {

struct Access {
  uint32_t run, clock, agent, pc;
  uint16_t flags, bytes;  // bytes: bit 0 and 1 for the lower and the upper one of the cell
  bool same_event(const Access& o) const { return run == o.run && clock == o.clock && agent == o.agent; }
};
template <int readers>
struct Cell {
  uint32_t epoch;
  Access written[2];  // by byte
  Access read[readers];
};
using SharedCell = Cell<4>;
using GlobalCell = Cell<2>;

// Blocks that are not resident together are unordered, except through atomics on a common variable ("the last
// block reduces").
using RunClocks = std::unordered_map<uint32_t, ClockRef>;  // what is known of blocks that are over, by run
struct SyncVariable {
  ClockRef clock;
  uint32_t set = 0;
  RunClocks runs;
};
static std::unordered_map<uintptr_t, SyncVariable> sync_variables;
static RunClocks known_runs;
static void add_runs(RunClocks& to, const RunClocks& from) {
  for (const auto& [run, clock] : from) {
    ClockRef& known = to[run];
    if (known == clock) continue;
    if (known) {
      auto both = std::make_shared<Clock>(*known);
      clock_max(*both, *clock);
      known = both;
    } else {
      known = clock;
    }
  }
}
static SharedCell* shared_shadow;
static GlobalCell* global_shadow;
static uintptr_t code_base;

static void* map_shadow(size_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) {
    perror("cusim: shadow memory");
    abort();
  }
  return p;
}
void begin_checks(void* code) {
  sync_variables.clear();
  checks_on = instrumented();
  if (!code_base) code_base = load_base(code);
  if (!checks_on || shared_shadow) return;
  shared_shadow = (SharedCell*)map_shadow((window_stride / 2) * max_windows * sizeof(SharedCell));
  global_shadow = (GlobalCell*)map_shadow((heap_bytes / 2) * sizeof(GlobalCell));
}
void begin_resident_set() { known_runs.clear(); }

static const Thread* thread_by(uint32_t agent) {
  uint32_t g = agent % running.threads;
  for (auto& b : running.blocks) {
    if (g < b->threads.size()) return b->threads[g];
    g -= b->threads.size();
  }
  return nullptr;
}
// Runs count up, and the resident blocks share one.
static bool resident(const Access& a) { return a.run >= cur->blk->run_id; }
static std::string who_did(const Access& a) {
  if (!resident(a)) return "an earlier block";
  static const char* kind[agents] = {
      "", "cp.async of ", "bulk copy of ", "wgmma of ", "bulk store (reading) of ", "bulk store of "};
  const uint32_t slot = a.agent / uint32_t(running.threads);
  return kind[slot ? running.agent_at[slot] : 0] + who(thread_by(a.agent));
}
static void race(const char* kind, const char* memory, uint64_t off, const Access& earlier, void* pc,
                 bool async) {
  void* earlier_pc = (void*)(code_base + earlier.pc);
  if (!reported_pairs.insert({earlier_pc, pc}).second) return;
  report("RACE (%s) on %s+%llu: %s%s at %s; earlier %s by %s at %s; no synchronisation between", kind, memory,
         (unsigned long long)off, async ? "async op of " : "", who(cur).c_str(), where(pc).c_str(),
         (earlier.flags & kWrite) ? "write" : "read", who_did(earlier).c_str(), where(earlier_pc).c_str());
}
static inline bool ordered(const Access& a) {
  if (!resident(a)) [[unlikely]] {
    if (known_runs.empty()) return false;
    const auto known = known_runs.find(a.run);
    return known != known_runs.end() && a.agent < known->second->size() &&
           (*known->second)[a.agent] >= a.clock;
  }
  if (a.agent < (uint32_t)running.threads && (int)a.agent != cur->gid) {  // almost always
    const Clock* known = cur->p->base.get();
    return known && (*known)[a.agent] >= a.clock;
  }
  return clock_get(cur, a.agent) >= a.clock;
}

// One access to (a part of) one cell, held against what the cell remembers.
template <int readers>
static void touch(Cell<readers>& c, uint32_t epoch, const Access& me, void* pc, const char* memory,
                  uint64_t off, bool async_proxy) {
  constexpr bool global = std::is_same_v<Cell<readers>, GlobalCell>;
  if (c.epoch != epoch) {
    memset(&c, 0, sizeof c);
    c.epoch = epoch;
  }
  const bool write = me.flags & kWrite;
  const auto mine = [&](const Access& a) { return a.agent == me.agent && a.run == me.run; };
  const auto both_atomic = [&](const Access& a) { return (a.flags & kAtomic) && (me.flags & kAtomic); };
  for (int byte = 0; byte < 2; byte++) {
    const Access& w = c.written[byte];
    if (!(me.bytes >> byte & 1) || !w.clock) continue;
    if (byte == 1 && (me.bytes & 1) && w.same_event(c.written[0])) continue;
    if (!mine(w) && !both_atomic(w) && !ordered(w))
      race(write ? "write after write" : "read after write", memory, off, w, pc, async_proxy);
    if (async_proxy && !(w.flags & kAsync) && w.agent < (uint32_t)running.threads && resident(w) &&
        (global ? thread_by(w.agent)->p->global_fence_clock : thread_by(w.agent)->p->fence_clock) < w.clock)
      race("generic write not followed by fence.proxy.async before an async-proxy access", memory, off, w, pc,
           true);
  }
  if (write) {
    for (const Access& a : c.read)
      if (a.clock && (a.bytes & me.bytes) && !mine(a) && !both_atomic(a) && !ordered(a)) {
        race("write after read", memory, off, a, pc, async_proxy);
        break;
      }
    for (int byte = 0; byte < 2; byte++)
      if (me.bytes >> byte & 1) c.written[byte] = me;
    return;
  }
  // Take the place of my own earlier read, of none, or of one that is ordered before me.
  Access* place = nullptr;
  for (Access& a : c.read)
    if (!a.clock || (mine(a) && a.bytes == me.bytes)) {
      place = &a;
      break;
    }
  for (int i = 0; i < readers && !place; i++)
    if (ordered(c.read[i])) place = &c.read[i];
  *(place ? place : &c.read[cur->warp % readers]) = me;
}

// The bytes of [a, a + n) in the cell that begins at `cell`.
static uint16_t bytes_in_cell(uintptr_t a, size_t n, uintptr_t cell) {
  return uint16_t((cell >= a && cell < a + n ? 1 : 0) | (cell + 1 >= a && cell + 1 < a + n ? 2 : 0));
}

// Shared memory that was never seen written and still holds the poison. (GCC does not instrument
// `memory = f()` for class types, so that the shadow alone would not do.)
static void check_initialised(const SharedCell& s, const Block* b, uintptr_t cell, const Access& me,
                              long long off, void* pc) {
  for (int byte = 0; byte < 2; byte++)
    if (me.bytes >> byte & 1)
      if ((s.epoch == b->run_id && s.written[byte].clock) || (uint8_t)shared_base[cell * 2 + byte] != 0xFF)
        return;
  if (reported_pairs.insert({nullptr, pc}).second)
    report("UNINITIALISED shared memory read at offset %lld by %s at %s", off, who(cur).c_str(),
           where(pc).c_str());
}

// A block has surely started if this thread knows of any event of one of its threads.
static bool known_to_have_started(const Block* b) {
  for (const Thread* t : b->threads)
    if (clock_get(cur, t->gid)) return true;
  return false;
}

static void check_shared(uintptr_t o, size_t n, Access me, void* pc, bool async_proxy) {
  Block* b = block_of(o);
  const int64_t off = b ? (int64_t)(o % window_stride) - (int64_t)window_margin : -1;
  if (b && b != cur->blk && !known_to_have_started(b))
    fail("CLUSTER: DSMEM access to a CTA that may not have started (no cluster barrier before it), at %s",
         where(pc).c_str());
  if (!b || off < 0 || !shared_valid(b, (uint32_t)off, n))
    fail("OUT OF BOUNDS: shared %s of %zu bytes at offset %lld (dynamic region %u..%u) at %s",
         me.flags & kWrite ? "write" : "read", n, (long long)off, b ? b->dyn_off : 0,
         b ? b->dyn_off + b->dyn_bytes : 0, where(pc).c_str());
  if (b != cur->blk && !b->live)
    fail("CLUSTER: DSMEM access to a CTA that has already exited, at %s", where(pc).c_str());
  for (uintptr_t c = o / 2; c <= (o + n - 1) / 2; c++) {
    me.bytes = bytes_in_cell(o, n, c * 2);
    if (!(me.flags & kWrite)) check_initialised(shared_shadow[c], b, c, me, (long long)off, pc);
    touch(shared_shadow[c], b->run_id, me, pc, "shared", c * 2 % window_stride - window_margin, async_proxy);
  }
}

static const Allocation* allocation_of(uintptr_t a, size_t n) {
  static const Allocation* last;
  const auto holds = [&](const Allocation& x) { return a >= x.lo && a + n <= x.hi; };
  const Allocation* begin = allocations.data();
  if (last >= begin && last < begin + allocations.size() && holds(*last)) return last;
  for (auto& x : allocations)
    if (holds(x)) return last = &x;
  return nullptr;
}

static void check_global(uintptr_t a, size_t n, Access me, void* pc, bool async_proxy) {
  const Allocation* buffer = allocation_of(a, n);
  if (!buffer) {
    std::string near = "no buffer";
    for (auto& x : allocations)
      if (a + 4096 >= x.lo && a < x.hi + 4096)
        near = "near buffer '" + x.name + "' (" + std::to_string(x.hi - x.lo) + " bytes), offset " +
               std::to_string((int64_t)(a - x.lo));
    fail("OUT OF BOUNDS: global %s of %zu bytes, %s, at %s", me.flags & kWrite ? "write" : "read", n,
         near.c_str(), where(pc).c_str());
  }
  const uintptr_t o = a - (uintptr_t)heap_base;
  for (uintptr_t c = o / 2; c <= (o + n - 1) / 2; c++) {
    me.bytes = bytes_in_cell(o, n, c * 2);
    touch(global_shadow[c], launch_counter, me, pc, buffer->name.c_str(),
          c * 2 + (uintptr_t)heap_base - buffer->lo, async_proxy);
  }
}

void check_access(const void* p, size_t n, bool write, int flags, void* pc, int agent, uint32_t clock,
                  bool async_proxy) {
  stats.mem_checks++;
  const uintptr_t a = (uintptr_t)p;
  const Access me{cur->blk->run_id,
                  clock,
                  clock_index(cur, agent),
                  (uint32_t)((uintptr_t)pc - code_base),
                  uint16_t(flags | (write ? kWrite : 0)),
                  0};
  if (a - (uintptr_t)shared_base < window_stride * max_windows)
    check_shared(a - (uintptr_t)shared_base, n, me, pc, async_proxy);
  else if (a - (uintptr_t)heap_base < heap_bytes)
    check_global(a, n, me, pc, async_proxy);
}

void sync_point(const void* p, bool acquire, Release release) {
  if (!checks_on) return;
  auto& v = sync_variables[(uintptr_t)p];
  if (v.set != running.set_id) {
    v.set = running.set_id;
    v.clock.reset();
  }
  if (acquire) {
    clock_acquire(cur, v.clock);
    add_runs(known_runs, v.runs);
  }
  if (release == Release::nothing || (release == Release::fenced && !cur->p->fenced)) return;
  if (release == Release::all)
    clock_release(cur, v.clock);
  else
    clock_release_fenced(cur, v.clock);
  add_runs(v.runs, known_runs);
  v.runs[cur->blk->run_id] = v.clock;
}

}  // namespace cusim
