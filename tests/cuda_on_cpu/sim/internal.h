// State that the parts of the simulator share. Kernels and tests see cuda_sim.h only.
//
//   fibers.cpp       a CUDA thread is a fiber: stacks and the context switch
//   scheduler.cpp    who runs next; parking, yielding, deadlock and livelock
//   clocks.cpp       vector clocks: what happened before what
//   barriers.cpp     __syncthreads, named, grid and cluster barriers; thread exit
//   warp.cpp         operations of a warp: rendezvous, shuffles, votes
//   memory.cpp       shared-memory windows and the device heap
//   checker.cpp      shadow memory: races, bounds, uninitialised reads
//   hooks.cpp        entry points that -fsanitize=thread and -fsanitize=undefined make kernel code call
//   atomics.cpp      atomics and acquire/release accesses
//   tensor_core.cpp  mma, ldmatrix, stmatrix
//   wgmma.cpp        asynchronous warpgroup mma (sm_90a)
//   async_engine.cpp cp.async, mbarrier
//   tma.cpp          TMA, tiled and im2col, and bulk copies
//   errors.cpp       reports, and source lines for them
//   launch.cpp       one kernel launch, block by block
//
// One operating-system thread runs everything: plain globals, no locks.
#pragma once
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#include "../cuda_sim.h"
#undef min
#undef max

namespace cusim {

// ---------------------------------------------------------------- vector clocks
// Index i < threads: thread i. Behind them, as many again for each kind of asynchronous agent that the launch
// has used so far: the agent of thread i runs beside it, and is joined by the matching wait.
enum Agent {
  no_agent,
  agent_cp_async,
  agent_bulk_load,
  agent_wgmma,
  agent_bulk_read,
  agent_bulk_write,
  agents
};
using Clock = std::vector<uint32_t>;
using ClockRef = std::shared_ptr<Clock>;

// ---------------------------------------------------------------- threads, warps, blocks
struct Context {
  void* sp = nullptr;
};
struct Copy {  // one cp.async
  char* dst;
  const char* src;
  int bytes, src_bytes;
};
struct WgmmaOp {
  float* d[32];
  uint32_t a[32][4];
  int n;
  uint64_t da, db;
  bool scale, a_mn_major, b_mn_major, has_a;
  Numbers numbers;
  int k() const { return numbers == Numbers::f32 ? 8 : 16; }
};
struct ThreadState {
  Context context;
  enum { Free, Run, Wait, Done } status = Free;
  const char* waits_for = "";
  uint64_t waits_arg = 0;
  void* waits_pc = nullptr;
  std::vector<Copy> copies_open;
  std::deque<std::vector<Copy>> copy_groups;
  std::vector<std::function<void()>> bulk_open;
  std::deque<std::vector<std::function<void()>>> bulk_groups;
  ClockRef base;    // what this thread knows of the others; its own time is `clock`
  ClockRef fenced;  // what of that, and of itself, lies before a fence: an atomic passes it on
  uint32_t clock = 1, fence_clock = 0, global_fence_clock = 0;  // fences: of fence.proxy.async
  // By kind of agent: its time, and until when this thread has waited for it.
  uint32_t async_clock[agents], async_seen[agents] = {};
  ThreadState() {
    for (uint32_t& c : async_clock) c = 1;
  }
};
struct Collective {
  uint32_t mask, arrived;
  int op;
};
struct Warp {
  Thread* t[32];
  void* arg[32];
  uint32_t exists = 0, exited = 0;
  Collective collectives[32];
  int collective_count = 0;
  int pos = 0;                                        // priority position in the scheduler
  bool wgmma_fenced = false;                          // since the last wait
  std::map<float*, std::vector<float>> accumulators;  // as the last wgmma left them
  std::vector<WgmmaOp> wgmma_open;
  std::deque<std::vector<WgmmaOp>> wgmma_groups;
};
struct Barrier {
  int arrived = 0, expected = 0;
  int counting = 0, counted = 0;  // of __syncthreads_count: this time, last time
  std::vector<Thread*> wait, arr;
};
struct MBarrier {
  uint32_t count = 0, pending = 0, phase = 0;
  int64_t tx = 0;
  std::vector<Thread*> wait;
  ClockRef pend, done;
};
struct StaticVariable {
  const void* tag;
  uint32_t off, bytes;
};
struct Cluster;
struct Block {
  uint3 bid;
  int slot;
  char* window;  // its shared memory
  uint32_t dyn_off, dyn_bytes, top;
  std::vector<StaticVariable> statics;
  std::vector<Thread*> threads;
  std::vector<Warp*> warps;
  int live;
  Barrier bar[16], wgbar[8];
  std::vector<MBarrier> mbarriers;
  Cluster* cluster;
  uint32_t rank;
  uint32_t run_id;
  bool warned_exit = false;
};
struct Cluster {
  std::vector<Block*> b;
  int arrived = 0, live = 0;
  uint32_t phase = 0;
  std::vector<Thread*> wait;
  ClockRef pend;
  std::map<Thread*, uint32_t> my;
};

// The launch that runs, and the blocks of it that are resident now.
struct Running {
  Config config;
  const void* kernel = nullptr;
  bool named = false;  // a report has told the kernel's name
  void (*thunk)(void*) = nullptr;
  void* arg = nullptr;
  int policy = 1;
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<std::unique_ptr<Cluster>> clusters;
  std::vector<Warp*> warps;
  int threads = 0;  // resident
  int live = 0;
  // Runnable lanes by priority position; bit w of `positions` says that position w has any.
  std::vector<uint32_t> lanes_at;
  std::vector<uint64_t> positions;
  std::vector<int> warp_at;
  int runnable = 0;
  std::vector<std::function<void()>> async;  // transfers under way
  Barrier grid_bar;
  int slots = 0;  // kinds of agents in use, and where their clocks lie
  int slot_of[agents] = {}, agent_at[agents] = {};
  uint64_t idle = 0;  // yields since anything made progress
  bool aborted = false;
  uint32_t set_id = 0;
  bool active = false;
};
extern Running running;
extern uint32_t launch_counter, run_counter;

// ---------------------------------------------------------------- errors.cpp
std::string where(void* pc);  // file:line outside the simulator
std::string who(const Thread*);
void record(const std::string&);
uintptr_t load_base(void* pc);
extern int errors;
extern std::set<std::pair<void*, void*>> reported_pairs;  // so that one fault is told once

// ---------------------------------------------------------------- fibers.cpp
extern Context main_context;
void switch_to(Context& from, Context& to);
[[noreturn]] void leave_to_main();
constexpr size_t stack_bytes = 256 << 10;  // of a fiber
char* new_stack();
void prepare(Thread*, char* stack, int i, void (*entry)());

// ---------------------------------------------------------------- scheduler.cpp, barriers.cpp
void wake(Thread*);
Thread* pick(bool random_any = false);
void park(const char* what, uint64_t arg, void* pc);
[[noreturn]] void run_next_after_exit();
[[noreturn]] void thread_exit();
void release_waiters(std::vector<Thread*>&, Thread* except);

// ---------------------------------------------------------------- clocks.cpp
void clock_max(Clock& a, const Clock& b);
ClockRef new_clock();
ClockRef copy_clock(const ClockRef&);  // with room for all agents
void clock_barrier(const std::vector<Thread*>& a, const std::vector<Thread*>* release_only = nullptr);
void clock_release(Thread*, ClockRef&);
void clock_release_fenced(Thread*, ClockRef&);
void clock_acquire(Thread*, const ClockRef&);
void clock_add_agent(ClockRef&, uint32_t index, uint32_t clock);
// The place of an agent in a clock.
inline uint32_t clock_index(const Thread* t, int agent) {
  if (!agent) return uint32_t(t->gid);
  int& slot = running.slot_of[agent];
  if (!slot) running.agent_at[slot = ++running.slots] = agent;
  return uint32_t(slot * running.threads + t->gid);
}
// The clock that t knows of `index`.
inline uint32_t clock_get(const Thread* t, uint32_t index) {
  const uint32_t threads = uint32_t(running.threads);
  if (index % threads == uint32_t(t->gid)) {
    const uint32_t slot = index / threads;
    return slot ? t->p->async_seen[running.agent_at[slot]] : ~0u;
  }
  const Clock* base = t->p->base.get();
  return base && index < base->size() ? (*base)[index] : 0;
}

// ---------------------------------------------------------------- memory.cpp
// A window of shared memory a block, each in the middle of a stride of its own: a wild index of up to 64 KiB
// still belongs to the block that computed it.
constexpr size_t window_stride = 512 << 10, window_margin = 64 << 10, window_bytes = 228 << 10;
constexpr int max_windows = 160;
constexpr size_t heap_bytes = 256ull << 20;
struct Allocation {
  uintptr_t lo, hi;
  std::string name;
};
extern char *shared_base, *heap_base;
extern std::vector<Allocation> allocations;
void init_memory();
Block* address_block(uint32_t address);
inline Block* block_of(uintptr_t offset) {
  const size_t s = offset / window_stride;
  return s < running.blocks.size() ? running.blocks[s].get() : nullptr;
}
inline bool shared_valid(const Block* b, uint32_t off, size_t n) {
  if (off >= b->dyn_off && off + n <= b->dyn_off + b->dyn_bytes) return true;
  for (auto& v : b->statics)
    if (off >= v.off && off + n <= v.off + v.bytes) return true;
  return false;
}

// ---------------------------------------------------------------- checker.cpp
enum AccessFlags { kWrite = 1, kAtomic = 2, kAsync = 8 };
void begin_checks(void* code);  // of one launch
void begin_resident_set();
void check_access(const void* p, size_t n, bool write, int flags, void* pc, int agent, uint32_t clk,
                  bool async_proxy);
inline void access(const void* p, size_t n, bool write, int flags, void* pc) {
  if (cur && checks_on) check_access(p, n, write, flags, pc, 0, cur->p->clock, false);
}
// An access by an asynchronous agent of the running thread.
inline void access_async(const void* p, size_t n, bool write, int agent, void* pc, bool async_proxy) {
  if (cur && checks_on) check_access(p, n, write, kAsync, pc, agent, cur->p->async_clock[agent], async_proxy);
}
// An atomic or acquire/release access to p orders threads, and blocks that are not resident together. A plain
// atomic releases what lies before a fence.
enum class Release { nothing, fenced, all };
void sync_point(const void* p, bool acquire, Release);

// ---------------------------------------------------------------- async_engine.cpp
MBarrier& mbar_at(uint32_t address, const char* operation);  // fails where there is none
// Bytes of a transfer have arrived; `agent` at `clock` has written them.
void complete_tx(Block*, uint32_t offset, uint32_t bytes, uint32_t agent, uint32_t clock);

// ---------------------------------------------------------------- numbers of the tensor core
inline float up_bf16(uint16_t h) {
  const uint32_t u = (uint32_t)h << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
inline float up_f16(uint16_t h) {
  __half_raw r;
  r.x = h;
  return __half2float(__half(r));
}
inline float up_tf32(uint32_t u) {
  u &= 0xFFFFE000u;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
// The swizzle of TMA and wgmma: an exclusive-or on the absolute shared address.
inline uint32_t swizzled(uint32_t a, int span_bytes) {
  if (span_bytes == 128) return a ^ ((a >> 3) & 0x70);
  if (span_bytes == 64) return a ^ ((a >> 3) & 0x30);
  if (span_bytes == 32) return a ^ ((a >> 3) & 0x10);
  return a;
}

void rng_seed(uint64_t);
bool undefined_behaviour_seen();

}  // namespace cusim
