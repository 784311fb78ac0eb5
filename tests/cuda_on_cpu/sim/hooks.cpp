// What the sanitizers make kernel code call. Kernels are compiled with -fsanitize=thread, but libtsan is not
// linked: its entry points are here, and hand every load and store to the checker. -fsanitize=undefined keeps
// its library; a hook turns what it finds into a report (misaligned vector accesses, indices beyond one
// dimension of an array, overflow of signed integers, shifts too far).
#include <cstdlib>

#include "internal.h"

static bool thread_hooks_seen;
bool cusim::instrumented() { return thread_hooks_seen && !getenv("CUSIM_NO_CHECKS"); }

// Of a thread's own variables the host compiler writes two neighbours of 8 bytes as one vector, wherever they lie;
// what kernel code itself gets wrong there, -fsanitize=undefined reports.
static void misaligned(void* p, int n, void* pc) {
  const char* const here = static_cast<const char*>(__builtin_frame_address(0));
  if (n == 16 && size_t(static_cast<const char*>(p) - here) < cusim::stack_bytes) return;
  if (cusim::cur && cusim::checks_on)
    cusim::fail("MISALIGNED: %d-byte access to %p at %s", n, p, cusim::where(pc).c_str());
}

extern "C" {

// Of libubsan: called after it has printed a report, and what it printed.
void __ubsan_get_current_report_data(const char** kind, const char** message, const char** file,
                                     unsigned* line, unsigned* column, char** address) __attribute__((weak));
__attribute__((visibility("default"))) void __ubsan_on_report() {
  const char *kind = "", *message = "", *file = "";
  unsigned line = 0, column = 0;
  char* address = nullptr;
  if (__ubsan_get_current_report_data)
    __ubsan_get_current_report_data(&kind, &message, &file, &line, &column, &address);
  cusim::report("UNDEFINED (%s): %s at %s:%u", kind, message, file, line);
}

#define PC __builtin_return_address(0)

void __tsan_init() { thread_hooks_seen = true; }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

#define CUSIM_HOOKS(n)                                                          \
  void __tsan_read##n(void* p) {                                                \
    if ((uintptr_t)p & (n - 1)) misaligned(p, n, PC);                           \
    cusim::access(p, n, false, 0, PC);                                          \
  }                                                                             \
  void __tsan_write##n(void* p) {                                               \
    if ((uintptr_t)p & (n - 1)) misaligned(p, n, PC);                           \
    cusim::access(p, n, true, 0, PC);                                           \
  }                                                                             \
  void __tsan_unaligned_read##n(void* p) { cusim::access(p, n, false, 0, PC); } \
  void __tsan_unaligned_write##n(void* p) { cusim::access(p, n, true, 0, PC); } \
  void __tsan_volatile_read##n(void* p) { cusim::access(p, n, false, 0, PC); }  \
  void __tsan_volatile_write##n(void* p) { cusim::access(p, n, true, 0, PC); }
// clang-format off
CUSIM_HOOKS(1)
CUSIM_HOOKS(2)
CUSIM_HOOKS(4)
CUSIM_HOOKS(8)
CUSIM_HOOKS(16)
// clang-format on

void __tsan_read_range(void* p, size_t n) {
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

// Guards of function-local statics in host code.
int __tsan_atomic8_load(const volatile void* p, int) { return *(const volatile char*)p; }
int __tsan_atomic32_load(const volatile void* p, int) { return *(const volatile int*)p; }
}
