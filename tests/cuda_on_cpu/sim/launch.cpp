// One kernel launch. Blocks are independent, so one at a time is resident (Options::max_resident for more);
// all blocks of a cluster, and of a cooperative grid, are resident together. The order of blocks is shuffled.
#include <setjmp.h>
#include <signal.h>
#include <ucontext.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>

#include "internal.h"

namespace cusim {

using Group = std::vector<uint3>;  // the blocks of one cluster

static std::vector<std::unique_ptr<Thread>> thread_pool;
static std::vector<std::unique_ptr<ThreadState>> state_pool;
static std::vector<std::unique_ptr<Warp>> warp_pool;
static std::vector<char*> stacks;

// ---------------------------------------------------------------- guard pages
static sigjmp_buf fault_jump;
static void on_fault(int, siginfo_t* info, void* context) {
  const uintptr_t a = (uintptr_t)info->si_addr;
  if (!running.active) {
    signal(SIGSEGV, SIG_DFL);
    return;
  }
  void* pc = nullptr;
#if defined(__x86_64__)
  pc = (void*)((ucontext_t*)context)->uc_mcontext.gregs[REG_RIP];
#endif
  constexpr uintptr_t nearby = 65536;
  std::string near;
  for (auto& x : allocations)
    if (a + nearby >= x.lo && a < x.hi + nearby)
      near += " near '" + x.name + "' offset " + std::to_string((int64_t)(a - x.lo)) + " of " +
              std::to_string(x.hi - x.lo);
  record("OUT OF BOUNDS: guard page hit, address " + std::to_string(a) + near + " at " +
         where((char*)pc + 1) + " [" + who(cur) + "]");
  siglongjmp(fault_jump, 1);
}

// ---------------------------------------------------------------- resident blocks
static void fiber_entry() {
  running.thunk(running.arg);
  thread_exit();
}

static void grow_pools(size_t threads, size_t warps) {
  while (thread_pool.size() < threads) {
    thread_pool.push_back(std::make_unique<Thread>());
    state_pool.push_back(std::make_unique<ThreadState>());
    stacks.push_back(new_stack());
  }
  while (warp_pool.size() < warps) warp_pool.push_back(std::make_unique<Warp>());
}

static std::unique_ptr<Block> make_block(uint3 bid, Cluster* cluster, uint32_t run) {
  constexpr uint32_t dynamic_offset = 1024;  // what lies before it is a red zone
  constexpr size_t static_shared_limit = 48 * 1024;
  auto b = std::make_unique<Block>();
  b->bid = bid;
  b->slot = running.blocks.size();
  b->window = shared_base + b->slot * window_stride + window_margin;
  b->run_id = run;
  b->cluster = cluster;
  b->rank = cluster->b.size();
  cluster->b.push_back(b.get());
  b->dyn_off = dynamic_offset;
  b->dyn_bytes = running.config.smem;
  b->top = b->dyn_off + b->dyn_bytes;
  memset(b->window, 0xFF, std::min(window_bytes, b->top + static_shared_limit));  // NaN poison
  return b;
}

static void add_threads(Block* b, unsigned count, size_t first_thread, size_t first_warp) {
  const Config& c = running.config;
  b->live = count;
  for (unsigned w = 0; w < (count + 31) / 32; w++) {
    Warp* warp = warp_pool[first_warp + w].get();
    *warp = Warp();
    memset(warp->t, 0, sizeof warp->t);
    warp->pos = running.warps.size();
    running.warps.push_back(warp);
    b->warps.push_back(warp);
  }
  for (unsigned i = 0; i < count; i++) {
    const size_t index = first_thread + i;
    Thread* t = thread_pool[index].get();
    *t = Thread();
    t->p = state_pool[index].get();
    *t->p = ThreadState();
    t->tid = {i % c.block.x, i / c.block.x % c.block.y, i / (c.block.x * c.block.y)};
    t->bid = b->bid;
    t->bdim = c.block;
    t->gdim = c.grid;
    t->lin = i;
    t->warp = i / 32;
    t->lane = i % 32;
    t->gid = index;
    t->blk = b;
    t->wp = b->warps[i / 32];
    t->wp->t[t->lane] = t;
    t->wp->exists |= 1u << t->lane;
    b->threads.push_back(t);
    prepare(t, stacks[index], index, fiber_entry);
  }
}

static void set_priorities() {
  const int n = running.warps.size();
  running.lanes_at.assign(n, 0);
  running.positions.assign((n + 63) / 64, 0);
  running.warp_at.resize(n);
  running.runnable = 0;
  running.idle = 0;
  for (int i = 0; i < n; i++) running.warp_at[i] = i;
  if (running.policy == kPct)
    for (int i = n - 1; i > 0; i--) std::swap(running.warp_at[i], running.warp_at[rng() % (i + 1)]);
  if (running.policy == kReverse) std::reverse(running.warp_at.begin(), running.warp_at.end());
  for (int i = 0; i < n; i++) running.warps[running.warp_at[i]]->pos = i;
}

static void make_resident(const Group* begin, const Group* end, unsigned threads) {
  running.blocks.clear();
  running.clusters.clear();
  running.warps.clear();
  running.async.clear();
  running.grid_bar = Barrier();
  begin_resident_set();
  size_t blocks = 0;
  for (auto g = begin; g != end; g++) blocks += g->size();
  if (blocks > (size_t)max_windows) {
    fprintf(stderr, "cusim: %zu resident blocks (max %d)\n", blocks, max_windows);
    abort();
  }
  running.threads = running.live = blocks * threads;
  const size_t warps = (threads + 31) / 32;
  grow_pools(running.threads, blocks * warps);
  const uint32_t run = ++run_counter;
  for (auto g = begin; g != end; g++) {
    auto cluster = std::make_unique<Cluster>();
    cluster->live = g->size() * threads;
    for (const uint3& bid : *g) {
      const size_t slot = running.blocks.size();
      running.blocks.push_back(make_block(bid, cluster.get(), run));
      add_threads(running.blocks.back().get(), threads, slot * threads, slot * warps);
    }
    running.clusters.push_back(std::move(cluster));
  }
  running.set_id++;
  set_priorities();
  for (auto& b : running.blocks)
    for (Thread* t : b->threads) wake(t);
}

// Without the checker: writes outside the declared shared arrays leave a mark.
static void check_red_zones() {
  if (checks_on) return;
  constexpr uint32_t before = 64, behind = 1024;
  for (auto& b : running.blocks) {
    std::vector<std::pair<uint32_t, uint32_t>> arrays{{b->dyn_off, b->dyn_off + b->dyn_bytes}};
    for (auto& s : b->statics) arrays.push_back({s.off, s.off + s.bytes});
    arrays.push_back({std::min<uint32_t>(b->top + behind, window_bytes), 0});
    uint32_t p = b->dyn_off - before;
    for (auto& [lo, hi] : arrays) {
      for (; p < lo; p++)
        if ((uint8_t)b->window[p] != 0xFF) {
          report("OUT OF BOUNDS: shared memory written outside its arrays, offset %u (block %u,%u,%u)", p,
                 b->bid.x, b->bid.y, b->bid.z);
          return;
        }
      p = hi;
    }
  }
}

// ---------------------------------------------------------------- run
static bool config_is_valid(const Config& c) {
  const uint64_t threads = uint64_t(c.block.x) * c.block.y * c.block.z;
  const uint64_t cluster = uint64_t(c.cluster.x) * c.cluster.y * c.cluster.z;
  const int before = errors;
  if (threads == 0 || threads > 1024 || c.block.z > 64)
    report("LAUNCH: a block of %u x %u x %u threads", c.block.x, c.block.y, c.block.z);
  else if (!c.grid.x || !c.grid.y || !c.grid.z || c.grid.x > 0x7fffffffu || c.grid.y > 65535 ||
           c.grid.z > 65535)
    report("LAUNCH: a grid of %u x %u x %u blocks", c.grid.x, c.grid.y, c.grid.z);
  else if (c.smem > 227 * 1024)
    report("LAUNCH: %u bytes of dynamic shared memory exceed 227 KiB", c.smem);
  else if (!cluster || c.grid.x % c.cluster.x || c.grid.y % c.cluster.y || c.grid.z % c.cluster.z ||
           cluster > 16)
    report("LAUNCH: the grid is not a multiple of the cluster");
  return errors == before;
}

static std::vector<Group> groups_of(const Config& c) {
  std::vector<Group> groups;
  for (unsigned z = 0; z < c.grid.z; z += c.cluster.z)
    for (unsigned y = 0; y < c.grid.y; y += c.cluster.y)
      for (unsigned x = 0; x < c.grid.x; x += c.cluster.x) {
        Group g;
        for (unsigned k = 0; k < c.cluster.z; k++)
          for (unsigned j = 0; j < c.cluster.y; j++)
            for (unsigned i = 0; i < c.cluster.x; i++) g.push_back({x + i, y + j, z + k});
        groups.push_back(g);
      }
  if (running.policy != kInOrder)
    for (size_t i = groups.size() - 1; i > 0; i--) std::swap(groups[i], groups[rng() % (i + 1)]);
  return groups;
}

static void run_resident() {
  // volatile: read after the jump.
  volatile bool faulted = false;
  if (sigsetjmp(fault_jump, 1) == 0) {
    cur = pick();
    switch_to(main_context, cur->p->context);
  } else {
    faulted = true;
  }
  cur = nullptr;
  if (faulted) running.aborted = true;
  if (!running.aborted) check_red_zones();
}

int run(const Config& c, const void* kernel, void (*thunk)(void*), void* arg) {
  const auto start = std::chrono::steady_clock::now();
  const int errors_before = errors;
  note_launch(kernel);
  init_memory();
  rng_seed(opt.seed);
  running.config = c;
  running.kernel = kernel;
  running.named = false;
  running.thunk = thunk;
  running.arg = arg;
  running.aborted = false;
  running.slots = 0;
  std::fill(std::begin(running.slot_of), std::end(running.slot_of), 0);
  constexpr int rotation[] = {kRandom, kPct, kRandom, kPct, kReverse, kInOrder};
  running.policy = opt.policy == kAuto ? rotation[(opt.seed + 5) % 6] : opt.policy;
  launch_counter++;
  run_counter++;
  begin_checks((void*)thunk);
  if (config_is_valid(c)) {
    constexpr size_t signal_stack = 1 << 17;
    static char* alternate = (char*)malloc(signal_stack);
    stack_t stack{};
    stack.ss_sp = alternate;
    stack.ss_size = signal_stack;
    sigaltstack(&stack, nullptr);
    struct sigaction action{}, previous{};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, &previous);
    running.active = true;
    const auto groups = groups_of(c);
    const unsigned threads = c.block.x * c.block.y * c.block.z;
    const size_t together = c.cooperative ? groups.size() : std::max(1, opt.max_resident);
    for (size_t i = 0; i < groups.size() && !running.aborted; i += together) {
      const Group* first = groups.data() + i;
      make_resident(first, first + std::min(together, groups.size() - i), threads);
      run_resident();
    }
    running.active = false;
    sigaction(SIGSEGV, &previous, nullptr);
  }
  running.kernel = nullptr;
  stats.seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return errors > errors_before;
}

}  // namespace cusim
