// A CUDA thread is a fiber with a stack of its own (guard page below, top filled with 0xFF bytes). The switch
// saves the registers that the calling convention preserves: 5 to 9 ns on x86-64. Other processors than x86-64
// and aarch64, and -DCUSIM_UCONTEXT, take the C library's ucontext, which asks the kernel each time: 250 ns.
#include <sys/mman.h>

#include <cstdlib>

#include "internal.h"

#if !defined(CUSIM_UCONTEXT) && !defined(__x86_64__) && !defined(__aarch64__)
#define CUSIM_UCONTEXT
#endif
#ifdef CUSIM_UCONTEXT
#include <ucontext.h>
#endif

namespace cusim {
#ifndef CUSIM_UCONTEXT
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
constexpr int saved_words = 6;  // below the address to return to
#else
asm(R"(
.text
.globl cusim_switch
.type cusim_switch,%function
cusim_switch:
  stp x29,x30,[sp,#-160]!
  stp x19,x20,[sp,#16]
  stp x21,x22,[sp,#32]
  stp x23,x24,[sp,#48]
  stp x25,x26,[sp,#64]
  stp x27,x28,[sp,#80]
  stp d8,d9,[sp,#96]
  stp d10,d11,[sp,#112]
  stp d12,d13,[sp,#128]
  stp d14,d15,[sp,#144]
  mov x9,sp
  str x9,[x0]
  mov sp,x1
  ldp x19,x20,[sp,#16]
  ldp x21,x22,[sp,#32]
  ldp x23,x24,[sp,#48]
  ldp x25,x26,[sp,#64]
  ldp x27,x28,[sp,#80]
  ldp d8,d9,[sp,#96]
  ldp d10,d11,[sp,#112]
  ldp d12,d13,[sp,#128]
  ldp d14,d15,[sp,#144]
  ldp x29,x30,[sp],#160
  ret
.size cusim_switch,.-cusim_switch
)");
constexpr int frame_words = 20;  // x29, x30 first
#endif
#endif
constexpr size_t guard_bytes = 4096, poisoned_bytes = 12288;
Context main_context;
#ifdef CUSIM_UCONTEXT
static std::map<char*, ucontext_t*> contexts;  // of each stack
#endif

void switch_to(Context& from, Context& to) {
  stats.switches++;
#ifdef CUSIM_UCONTEXT
  if (!from.sp) from.sp = new ucontext_t;  // the main program's
  swapcontext(static_cast<ucontext_t*>(from.sp), static_cast<ucontext_t*>(to.sp));
#else
  cusim_switch(&from.sp, to.sp);
#endif
}

void leave_to_main() {
  Thread* me = cur;
  cur = nullptr;
  switch_to(me->p->context, main_context);
  abort();  // nobody comes back here
}

char* new_stack() {
  char* s = (char*)mmap(nullptr, stack_bytes + guard_bytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (s == MAP_FAILED) {
    perror("cusim: stack");
    abort();
  }
  mprotect(s, guard_bytes, PROT_NONE);
  return s + guard_bytes;
}

// The first switch to t enters entry().
void prepare(Thread* t, char* stack, int i, void (*entry)()) {
  memset(stack + stack_bytes - poisoned_bytes, 0xFF, poisoned_bytes);  // uninitialised locals read as NaN
  // Stacks that all begin at the same offset of a page would fight for the same cache sets.
  char* const top = stack + stack_bytes - 64 - (i % 64) * 64;
#if defined(CUSIM_UCONTEXT)
  auto*& context = contexts[stack];
  if (!context) context = new ucontext_t;
  getcontext(context);
  context->uc_stack.ss_sp = stack;
  context->uc_stack.ss_size = size_t(top - stack);
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
  t->p->context.sp = context;
#elif defined(__x86_64__)
  uintptr_t* s = (uintptr_t*)top;
  *--s = 0;
  *--s = (uintptr_t)entry;
  for (int k = 0; k < saved_words; k++) *--s = 0;
  t->p->context.sp = s;
#else
  uintptr_t* s = (uintptr_t*)top - frame_words;
  for (int k = 0; k < frame_words; k++) s[k] = 0;
  s[1] = (uintptr_t)entry;
  t->p->context.sp = s;
#endif
}

}  // namespace cusim
