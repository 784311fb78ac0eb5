// Reports: what went wrong, who did it and on which source line. The first five are kept. addr2line
// (binutils) turns addresses into lines; without it a report says "?".
#include <dlfcn.h>

#include <cstdarg>
#include <cstdlib>

#include "internal.h"

namespace cusim {
static std::string error_text;
int errors;
std::set<std::pair<void*, void*>> reported_pairs;
const char* last_error() { return error_text.c_str(); }
int error_count() { return errors; }
void clear_error() {
  error_text.clear();
  errors = 0;
  reported_pairs.clear();
}
static std::string where_raw(void* pc);
std::string where(void* pc) {
  static std::unordered_map<void*, std::string> m;
  auto it = m.find(pc);
  if (it != m.end()) return it->second;
  return m[pc] = where_raw(pc);
}
uintptr_t load_base(void* pc) {
  static void* last_pc;
  static uintptr_t last_base;
  if (pc == last_pc) return last_base;
  Dl_info info;
  last_pc = pc;
  return last_base = dladdr(pc, &info) ? (uintptr_t)info.dli_fbase : 0;
}

// Calls frame(function, "file:line") for each level of inlining at an address of this program, innermost
// first, until it returns false.
static void for_each_frame(void* pc,
                           const std::function<bool(const std::string&, const std::string&)>& frame) {
  Dl_info info;
  if (!dladdr(pc, &info) || !info.dli_fname) return;
  char command[600];
  snprintf(command, sizeof command, "addr2line -C -f -i -s -e '%s' 0x%zx 2>/dev/null", info.dli_fname,
           (size_t)((uintptr_t)pc - (uintptr_t)info.dli_fbase));
  FILE* f = popen(command, "r");
  if (!f) return;
  const auto trimmed = [](std::string s) {
    while (!s.empty() && (s.back() == '\n' || s.back() == ' ')) s.pop_back();
    const auto p = s.find(" (disc");
    if (p != std::string::npos) s.resize(p);
    return s;
  };
  char function[4096], place[512];
  while (fgets(function, sizeof function, f) && fgets(place, sizeof place, f))
    if (!frame(trimmed(function), trimmed(place))) break;
  pclose(f);
}

static std::string where_raw(void* pc) {
  if (!pc) return "?";
  std::string first, found;
  for_each_frame((char*)pc - 1, [&](const std::string&, const std::string& place) {
    if (first.empty()) first = place;
    for (const char* ours : {"cuda_sim", "ptx.cuh", "launch.cuh", "cuda_numerics", "cuda_bf16", "cuda_fp16"})
      if (place.rfind(ours, 0) == 0) return true;
    found = place;
    return false;
  });
  if (!found.empty()) return found;
  return first.empty() ? "?" : first;
}

// ---------------------------------------------------------------- names of kernels
static std::string symbol_of(const void* kernel) {
  std::string name = "?";
  for_each_frame(const_cast<void*>(kernel), [&](const std::string& function, const std::string&) {
    name = function;  // the outermost frame is the kernel itself
    return true;
  });
  return name;
}
// `kernel<float, 1>` of `void pyseqnet::(anonymous namespace)::kernel<float, 1>(float const*, ...)`.
static std::string short_name(std::string name) {
  for (const char* part : {"(anonymous namespace)::", "pyseqnet::", "void "})
    for (size_t at; (at = name.find(part)) != std::string::npos;) name.erase(at, strlen(part));
  int depth = 0;
  for (size_t i = 0; i < name.size(); i++) {
    if (name[i] == '<') depth++;
    if (name[i] == '>') depth--;
    if (name[i] == '(' && !depth) return name.substr(0, i);
  }
  return name;
}

static std::set<const void*> launched;
void note_launch(const void* kernel) { launched.insert(kernel); }
void append_launched_kernels(const char* path) {
  FILE* f = fopen(path, "a");
  if (!f) {
    fprintf(stderr, "cusim: cannot write %s\n", path);
    exit(2);
  }
  for (const void* kernel : launched) fprintf(f, "%s\n", symbol_of(kernel).c_str());
  fclose(f);
}

std::string who(const Thread* t) {
  char b[160];
  if (!t) return "host";
  snprintf(b, sizeof b, "block(%u,%u,%u) thread(%u,%u,%u) warp %d lane %d", t->bid.x, t->bid.y, t->bid.z,
           t->tid.x, t->tid.y, t->tid.z, t->warp, t->lane);
  return b;
}
void record(const std::string& s) {
  constexpr int kept = 5;
  if (++errors > kept) return;
  if (!error_text.empty()) error_text += "\n";
  if (running.kernel && !running.named) {
    error_text += "kernel " + short_name(symbol_of(running.kernel)) + ": ";
    running.named = true;
  }
  error_text += s;
}
void report(const char* fmt, ...) {
  char b[2000];
  va_list ap;
  va_start(ap, fmt);
  vsnprintf(b, sizeof b, fmt, ap);
  va_end(ap);
  record(b);
}
void fail(const char* fmt, ...) {
  char b[2000];
  va_list ap;
  va_start(ap, fmt);
  vsnprintf(b, sizeof b, fmt, ap);
  va_end(ap);
  record(std::string(b) + (cur ? " [" + who(cur) + "]" : ""));
  if (!cur) {
    fprintf(stderr, "cusim: %s\n", b);
    abort();
  }
  running.aborted = true;
  leave_to_main();
}

}  // namespace cusim
