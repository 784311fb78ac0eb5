// Shared memory: a window for every resident block. Device heap: every buffer ends at a guard page and begins
// as NaN. Shared addresses carry the rank + 1 of the block in their top byte where it is another block of the
// cluster.
#include <sys/mman.h>

#include <cstdlib>

#include "internal.h"

namespace cusim {
char *shared_base, *heap_base;
static size_t heap_top;
std::vector<Allocation> allocations;

void init_memory() {
  if (shared_base) return;
  shared_base = (char*)mmap(nullptr, window_stride * max_windows, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  heap_base = (char*)mmap(nullptr, heap_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (shared_base == MAP_FAILED || heap_base == MAP_FAILED) {
    perror("cusim: memory");
    abort();
  }
}
void* dmalloc(size_t n, const char* name) {
  init_memory();
  size_t r = (n + 15) & ~size_t(15), pages = (r + 4095) / 4096 * 4096;
  if (heap_top + pages + 8192 > heap_bytes) {
    fprintf(stderr, "cusim: device heap full\n");
    abort();
  }
  char* p = heap_base + heap_top + 4096;
  heap_top += pages + 4096;  // [guard][pages][guard of the next]
  mprotect(p, pages, PROT_READ | PROT_WRITE);
  char* u = p + pages - r;
  memset(p, 0xFF, pages);
  allocations.push_back({(uintptr_t)u, (uintptr_t)u + n, name ? name : "?"});
  return u;
}
void dfree_all() {
  if (heap_base && heap_top) {
    mmap(heap_base, heap_top + 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1,
         0);
  }
  heap_top = 0;
  allocations.clear();
}

char* smem_dynamic() { return cur->blk->window + cur->blk->dyn_off; }
void* smem_static(const void* tag, size_t bytes, size_t align) {
  Block* b = cur->blk;
  for (auto& v : b->statics)
    if (v.tag == tag) return b->window + v.off;
  if (align < 16) align = 16;
  uint32_t off = (b->top + 64 + align - 1) / align * align;  // 64-byte red zone
  if (off + bytes > window_bytes) fail("shared memory: more than %zu KiB", window_bytes >> 10);
  b->statics.push_back({tag, off, (uint32_t)bytes});
  b->top = off + bytes;
  return b->window + off;
}
uint32_t smem_addr(const void* p) {
  uintptr_t o = (uintptr_t)p - (uintptr_t)shared_base;
  if (o >= window_stride * running.blocks.size())
    fail("__cvta_generic_to_shared: %p is not shared memory", p);
  Block* b = block_of(o);
  int64_t w = (const char*)p - b->window;
  if (w < 0 || w > (int64_t)window_bytes) fail("__cvta_generic_to_shared: outside the window");
  return (uint32_t)w | (b == cur->blk ? 0 : (b->rank + 1) << 24);
}
Block* address_block(uint32_t a) {
  uint32_t r = a >> 24;
  if (!r) return cur->blk;
  Cluster* c = cur->blk->cluster;
  if (r - 1 >= c->b.size()) fail("shared::cluster address: rank %u outside the cluster", r - 1);
  Block* b = c->b[r - 1];
  if (!b->live)
    fail("CLUSTER: access to the shared memory of a CTA that has already exited (rank %u)", r - 1);
  return b;
}
char* smem_ptr(uint32_t a, size_t n, const char* what) {
  Block* b = address_block(a);
  uint32_t off = a & 0xFFFFFF;
  if (!shared_valid(b, off, n))
    fail("OUT OF BOUNDS: %s of %zu bytes at shared offset %u (dynamic region %u..%u), at %s", what, n, off,
         b->dyn_off, b->dyn_off + b->dyn_bytes, where(CUSIM_PC).c_str());
  return b->window + off;
}
uint32_t mapa(uint32_t a, uint32_t rank) {
  if (rank >= cur->blk->cluster->b.size()) fail("mapa: rank %u", rank);
  return (a & 0xFFFFFF) | (rank + 1) << 24;
}
void* map_shared_rank(const void* p, uint32_t rank) {
  uint32_t a = smem_addr(p);
  if (rank >= cur->blk->cluster->b.size()) fail("map_shared_rank: rank %u", rank);
  return cur->blk->cluster->b[rank]->window + (a & 0xFFFFFF);
}
uint32_t cluster_rank() { return cur->blk->rank; }
uint32_t cluster_size() { return cur->blk->cluster->b.size(); }

}  // namespace cusim
