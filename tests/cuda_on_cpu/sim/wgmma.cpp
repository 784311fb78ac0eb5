// wgmma: issued per warp (16 rows each), executed when the group is waited for, so that an early read of the
// accumulators is wrong and an early overwrite of the operands is a race. Descriptors are decoded as CUTLASS
// documents them: K-major and MN-major, swizzles of 0, 32, 64 and 128 bytes.
#include <algorithm>

#include "internal.h"

namespace cusim {
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
  return swizzled(start + o, W);
}
static void wgmma_exec(Warp* w, const WgmmaOp& op) {
  stats.mma++;
  static float A[16][16];
  static float B[16][256];
  Thread* t0 = w->t[0];
  Block* b = t0->blk;
  int row0 = (t0->warp & 3) * 16;
  auto up = [&](uint16_t h) { return op.bf16 ? up_bf16(h) : up_f16(h); };
  auto ld = [&](uint32_t a) {
    uint16_t h;
    memcpy(&h, b->window + a, 2);
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
        if (!shared_valid(b, a, 16))
          fail("OUT OF BOUNDS: wgmma operand at shared offset %u, at %s", a, where(pc).c_str());
        if (checks_on) access_async(b->window + a, 16, false, 3, pc, true);
      }
  } else
    for (int k = 0; k < 16; k++)
      for (int r = r0; r < r0 + rows; r += 8) {
        uint32_t a = desc_off(d, mn, r, k);
        if (!shared_valid(b, a, 16))
          fail("OUT OF BOUNDS: wgmma operand at shared offset %u, at %s", a, where(pc).c_str());
        if (checks_on) access_async(b->window + a, 16, false, 3, pc, true);
      }
}
__attribute__((noinline)) void wgmma(float* d, int n, const uint32_t* a, uint64_t da, uint64_t db, bool scale,
                                     bool ta, bool tb, bool bf16) {
  WgArg x{d, a};
  void* pc = CUSIM_PC;
  if (collective_arrive(~0u, kWgmma, &x)) {
    Warp* w = cur->wp;
    WgmmaOp op;
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
    w->wgmma_open.push_back(op);  // accumulators change only when the group is waited for
    collective_release(~0u);
  }
}
void wgmma_fence() { sync_warp(~0u); }
void wgmma_commit() {
  if (collective_arrive(~0u, kWgCommit, nullptr)) {
    Warp* w = cur->wp;
    w->wgmma_groups.push_back(std::move(w->wgmma_open));
    w->wgmma_open.clear();
    for (auto* t : w->t) t->p->async_clock[2]++;
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
      for (auto& o : w->wgmma_groups.front()) wgmma_exec(w, o);
      w->wgmma_groups.pop_front();
    }
    for (auto* t : w->t) t->p->async_seen[2] = t->p->async_clock[2] - 1 - (uint32_t)w->wgmma_groups.size();
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
      ClockRef v = new_clock();
      for (Thread* t : b->warps[g * 4 + w]->t)
        if (t->p->base) clock_max(*v, *t->p->base);  // bases of one warp are (nearly) equal
      bool same = true;
      for (Thread* t : b->warps[g * 4 + w]->t) same &= t->p->base == b->warps[g * 4 + w]->t[0]->p->base;
      auto add = [&](Clock& x) {
        for (Thread* t : r.wait) {
          auto& e = x[3 * running.threads + t->gid];
          e = std::max(e, t->p->async_seen[2]);
        }
      };
      if (same) {
        add(*v);
        for (Thread* t : b->warps[g * 4 + w]->t) t->p->base = v;
      } else
        for (Thread* t : b->warps[g * 4 + w]->t) {
          auto x = t->p->base ? std::make_shared<Clock>(*t->p->base) : new_clock();
          add(*x);
          t->p->base = x;
        }
    }
  for (Thread* t : r.wait)
    if (t != cur) wake(t);
  r.wait.clear();
  r.arrived = 0;
}

}  // namespace cusim
