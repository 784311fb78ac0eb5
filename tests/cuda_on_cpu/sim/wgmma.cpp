// wgmma: issued per warp (16 rows each), executed when the group is waited for, so that an early read of the
// accumulators is wrong and an early overwrite of the operands is a race. Descriptors are decoded as CUTLASS
// documents them: K-major and MN-major, swizzles of 0, 32, 64 and 128 bytes.
#include <algorithm>

#include "internal.h"

namespace cusim {
// Where a descriptor finds element (row, k), row along M or N, of elements of `size` bytes.
static uint32_t element_address(uint64_t d, bool mn_major, int size, int row, int k) {
  const uint32_t start = (d & 0x3FFF) << 4, leading = (d >> 16 & 0x3FFF) << 4,
                 stride = (d >> 32 & 0x3FFF) << 4;
  const int mode = d >> 62, span = mode == 1 ? 128 : mode == 2 ? 64 : mode == 3 ? 32 : 0;
  const int chunk = 16 / size;  // elements of 16 bytes
  uint32_t o;
  if (!mn_major)
    o = span ? (row % 8) * span + (row / 8) * stride + k * size
             : (row % 8) * 16 + (row / 8) * stride + (k / chunk) * leading + (k % chunk) * size;
  else if (span) {
    const int rows = span / size;
    o = (row % rows) * size + (row / rows) * leading + (k % 8) * span + (k / 8) * stride;
  } else
    o = (row % chunk) * size + (row / chunk) * stride + (k % 8) * 16 + (k / 8) * leading;
  return swizzled(start + o, span);
}
static float operand(const WgmmaOp& op, const char* window, uint64_t d, bool mn_major, int row, int k) {
  const bool wide = op.numbers == Numbers::f32;
  const char* p = window + element_address(d, mn_major, wide ? 4 : 2, row, k);
  uint32_t bits = 0;
  memcpy(&bits, p, wide ? 4 : 2);
  return wide                          ? up_tf32(bits)
         : op.numbers == Numbers::bf16 ? up_bf16(uint16_t(bits))
                                       : up_f16(uint16_t(bits));
}
// The fragment of A in registers: that of mma.sync.
static void operand_registers(const WgmmaOp& op, float (&A)[16][16]) {
  for (int l = 0; l < 32; l++) {
    const int g = l >> 2, t = l & 3;
    const uint32_t* a = op.a[l];
    if (op.numbers == Numbers::f32) {
      A[g][t] = up_tf32(a[0]), A[g + 8][t] = up_tf32(a[1]);
      A[g][t + 4] = up_tf32(a[2]), A[g + 8][t + 4] = up_tf32(a[3]);
      continue;
    }
    for (int h = 0; h < 2; h++) {
      const auto half = [&](uint32_t v) {
        const uint16_t bits = h ? v >> 16 : v & 0xFFFF;
        return op.numbers == Numbers::bf16 ? up_bf16(bits) : up_f16(bits);
      };
      A[g][t * 2 + h] = half(a[0]);
      A[g + 8][t * 2 + h] = half(a[1]);
      A[g][t * 2 + 8 + h] = half(a[2]);
      A[g + 8][t * 2 + 8 + h] = half(a[3]);
    }
  }
}
static void wgmma_exec(Warp* w, const WgmmaOp& op) {
  stats.mma++;
  static float A[16][16], B[16][256], D[16][256];
  const Thread* first = w->t[0];
  const char* window = first->blk->window;
  const int row0 = (first->warp & 3) * 16, depth = op.k();
  if (op.has_a)
    operand_registers(op, A);
  else
    for (int i = 0; i < 16; i++)
      for (int k = 0; k < depth; k++) A[i][k] = operand(op, window, op.da, op.a_mn_major, row0 + i, k);
  for (int j = 0; j < op.n; j++)
    for (int k = 0; k < depth; k++) B[k][j] = operand(op, window, op.db, op.b_mn_major, j, k);
  for (int i = 0; i < 16; i++) {
    for (int j = 0; j < op.n; j++) D[i][j] = 0;
    for (int k = 0; k < depth; k++) {
      const float a = A[i][k];
      for (int j = 0; j < op.n; j++) D[i][j] += a * B[k][j];
    }
  }
  for (int l = 0; l < 32; l++) {
    const int g = l >> 2, t = l & 3;
    float* d = op.d[l];
    for (int j = 0; j < op.n / 8; j++) {
      const int c = j * 8 + t * 2;
      const float v[4] = {D[g][c], D[g][c + 1], D[g + 8][c], D[g + 8][c + 1]};
      for (int q = 0; q < 4; q++) d[j * 4 + q] = (op.scale ? d[j * 4 + q] : 0.f) + v[q];
    }
  }
}
struct WgArg {
  float* d;
  const uint32_t* a;
};
// Notes the reads of an operand, in chunks of 16 bytes, and checks where its descriptor points.
static void note_operand(const WgmmaOp& op, uint64_t d, bool mn_major, int row0, int rows, void* pc) {
  Block* b = cur->blk;
  const int size = op.numbers == Numbers::f32 ? 4 : 2, chunk = 16 / size, mode = d >> 62;
  const uint32_t start = (d & 0x3FFF) << 4;
  // A swizzle pattern is 8 rows long; a descriptor may begin inside its first row only (base offset 0).
  const uint32_t span = mode == 1 ? 128 : mode == 2 ? 64 : mode == 3 ? 32 : 0;
  if (span && start % (8 * span) >= span)
    fail("wgmma: descriptor address %u is not in the first row of a swizzle pattern of %u bytes, at %s",
         start, 8 * span, where(pc).c_str());
  const auto note = [&](int row, int k) {
    const uint32_t a = element_address(d, mn_major, size, row, k);
    if (!shared_valid(b, a, 16))
      fail("OUT OF BOUNDS: wgmma operand at shared offset %u, at %s", a, where(pc).c_str());
    if (checks_on) access_async(b->window + a, 16, false, agent_wgmma, pc, true);
  };
  if (mn_major)
    for (int k = 0; k < op.k(); k++)
      for (int r = row0; r < row0 + rows; r += chunk) note(r, k);
  else
    for (int r = row0; r < row0 + rows; r++)
      for (int k = 0; k < op.k(); k += chunk) note(r, k);
}
// Accumulators that a warp has changed since its last wgmma, and A in registers, need a wgmma_fence first.
static void check_fence(Warp* w, const WgmmaOp& op, void* pc) {
  if (w->wgmma_fenced) return;
  for (int l = 0; l < 32; l++) {
    const auto known = w->accumulators.find(op.d[l]);
    const size_t bytes = op.n / 2 * sizeof(float);
    if (op.has_a || known == w->accumulators.end() || known->second.size() * sizeof(float) != bytes ||
        memcmp(known->second.data(), op.d[l], bytes))
      fail("wgmma: registers were written since the last wgmma, without a wgmma_fence, at %s",
           where(pc).c_str());
  }
}
__attribute__((noinline)) void wgmma(float* d, int n, const uint32_t* a, uint64_t da, uint64_t db, bool scale,
                                     bool a_mn_major, bool b_mn_major, Numbers numbers) {
  WgArg x{d, a};
  void* pc = CUSIM_PC;
  if (collective_arrive(~0u, kWgmma, &x)) {
    Warp* w = cur->wp;
    WgmmaOp op;
    op.n = n;
    op.da = da;
    op.db = db;
    op.scale = scale;
    op.a_mn_major = a_mn_major;
    op.b_mn_major = b_mn_major;
    op.numbers = numbers;
    op.has_a = a != nullptr;
    for (int l = 0; l < 32; l++) {
      auto* y = (WgArg*)w->arg[l];
      op.d[l] = y->d;
      if (y->a) memcpy(op.a[l], y->a, 16);
    }
    check_fence(w, op, pc);
    if (!a) note_operand(op, da, a_mn_major, (cur->warp & 3) * 16, 16, pc);
    note_operand(op, db, b_mn_major, 0, n, pc);
    w->wgmma_open.push_back(op);  // accumulators change only when the group is waited for
    collective_release(~0u);
  }
}
void wgmma_fence() {
  sync_warp(~0u);
  cur->wp->wgmma_fenced = true;
}
void wgmma_commit() {
  if (collective_arrive(~0u, kWgCommit, nullptr)) {
    Warp* w = cur->wp;
    w->wgmma_groups.push_back(std::move(w->wgmma_open));
    w->wgmma_open.clear();
    for (auto* t : w->t) t->p->async_clock[agent_wgmma]++;
    collective_release(~0u);
  }
}
// wgmma is an operation of the warpgroup: the wait cannot finish before all four warps have issued the group,
// and it covers the shared-memory reads of all four (CUTLASS lets one thread per warpgroup release a pipeline
// slot on the strength of this).
void wgmma_wait(int n) {
  if (collective_arrive(~0u, kWgWait, nullptr)) {
    Warp* w = cur->wp;
    while ((int)w->wgmma_groups.size() > n) {
      for (auto& o : w->wgmma_groups.front()) {
        wgmma_exec(w, o);
        for (int l = 0; l < 32; l++) w->accumulators[o.d[l]].assign(o.d[l], o.d[l] + o.n / 2);
      }
      w->wgmma_groups.pop_front();
    }
    w->wgmma_fenced = false;
    for (auto* t : w->t)
      t->p->async_seen[agent_wgmma] = t->p->async_clock[agent_wgmma] - 1 - (uint32_t)w->wgmma_groups.size();
    collective_release(~0u);
  }
  Block* b = cur->blk;
  int g = cur->warp / 4;
  if ((int)b->warps.size() < g * 4 + 4) fail("wgmma: incomplete warpgroup");
  Barrier& r = b->wgbar[g];
  r.wait.push_back(cur);
  if (++r.arrived < 128) {
    park("wgmma.wait_group (warpgroup)", g, CUSIM_PC);
    return;
  }
  if (checks_on)
    for (int w = 0; w < 4; w++) {
      ClockRef before, after;  // threads of a warp mostly share one clock
      for (Thread* t : b->warps[g * 4 + w]->t) {
        if (!after || t->p->base != before) {
          before = t->p->base;
          after = copy_clock(before);
          for (Thread* u : r.wait) {
            auto& known = (*after)[clock_index(u, agent_wgmma)];
            known = std::max(known, u->p->async_seen[agent_wgmma]);
          }
        }
        t->p->base = after;
      }
    }
  for (Thread* t : r.wait)
    if (t != cur) wake(t);
  r.wait.clear();
  r.arrived = 0;
}

}  // namespace cusim
