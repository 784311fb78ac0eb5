// Large tensors on huge pages. What glibc maps afresh for a large result (always from 32 MiB on) comes as 4 KiB
// pages that the kernel hands over one fault at a time, at several times the cost of the maximum or the
// product that is written there: 25 MB of a pooling's gradient cost 4 ms of faults and 3 ms of pooling. Where
// Linux gives huge pages to those who ask (transparent_hugepage = madvise, the usual setting), asking makes it
// one fault for 2 MiB. The memory stays torch's: it is only advised how to back it.
//
// PYSEQNET_HUGE_PAGES=0 asks for nothing.
#pragma once
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>
#include <cstdlib>

namespace pyseqnet {

constexpr int64_t huge_page = int64_t(2) << 20;
constexpr int64_t least_advised = 2 * huge_page;  // holds a whole aligned page wherever it begins

inline void advise_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (bytes < least_advised) return;
  static const bool off = [] {
    const char* value = std::getenv("PYSEQNET_HUGE_PAGES");
    return value && value[0] == '0' && !value[1];
  }();
  if (off) return;
  // Whole pages inside the tensor only: its neighbours' memory is not ours to advise.
  const auto begin = reinterpret_cast<uintptr_t>(data), end = begin + uintptr_t(bytes);
  const uintptr_t first = (begin + huge_page - 1) / huge_page * huge_page, last = end / huge_page * huge_page;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // a hint: may fail
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace pyseqnet
