// mma.sync, ldmatrix and stmatrix: the fragment layouts of the PTX manual. Products of one mma are summed in
// double and rounded once; hardware rounds differently, so tests need a tolerance.
#include "internal.h"

namespace cusim {
struct MmaArg {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
  const float* c;
};
static void mma_compute(Mma kind, void** arg) {
  stats.mma++;
  float A[16][16], B[16][8];
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
  if (collective_arrive(~0u, kMma, &x)) {
    mma_compute(k, cur->wp->arg);
    collective_release(~0u);
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
  if (collective_arrive(~0u, kLdsm, &x)) {
    void** arg = cur->wp->arg;
    uint16_t m[8][8];
    for (int i = 0; i < num; i++) {
      for (int q = 0; q < 8; q++)
        memcpy(m[q],
               address_block(((LdArg*)arg[8 * i + q])->addr)->window +
                   (((LdArg*)arg[8 * i + q])->addr & 0xFFFFFF),
               16);
      for (int l = 0; l < 32; l++) {
        int a = l >> 2, b = (l & 3) * 2;
        uint32_t lo = trans ? m[b][a] : m[a][b], hi = trans ? m[b + 1][a] : m[a][b + 1];
        ((LdArg*)arg[l])->r[i] = lo | hi << 16;
      }
    }
    collective_release(~0u);
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
  if (collective_arrive(~0u, kLdsm, &x)) {
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
      for (int q = 0; q < 8; q++) memcpy(cur->blk->window + ((LdArg*)arg[8 * i + q])->addr, m[q], 16);
    }
    collective_release(~0u);
  }
}

}  // namespace cusim
