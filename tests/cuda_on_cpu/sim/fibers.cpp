// A CUDA thread is a fiber with a stack of its own (guard page below, top filled with 0xFF bytes). The switch
// saves the six registers that the x86-64 calling convention preserves: 5 to 9 ns, where ucontext takes 250.
#include <sys/mman.h>

#include <cstdlib>

#include "internal.h"

namespace cusim {
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
constexpr size_t stack_bytes = 256 << 10, guard_bytes = 4096, poisoned_bytes = 12288;
Context main_context;

void switch_to(Context& from, Context& to) {
  stats.switches++;
  cusim_switch(&from.sp, to.sp);
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

// Lays out a stack on which the first switch "returns" into entry().
void prepare(Thread* t, char* stack, int i, void (*entry)()) {
  memset(stack + stack_bytes - poisoned_bytes, 0xFF, poisoned_bytes);  // uninitialised locals read as NaN
  // Stacks that all begin at the same offset of a page would fight for the same cache sets.
  uintptr_t* s = (uintptr_t*)(stack + stack_bytes - 64 - (i % 64) * 64);
  *--s = 0;
  *--s = (uintptr_t)entry;
  for (int k = 0; k < 6; k++) *--s = 0;
  t->p->context.sp = s;
}

}  // namespace cusim
