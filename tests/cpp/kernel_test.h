// What the programs here share: random numbers, numbers of any dtype, arrays between guards, and how a CPU kernel is run,
// whole or in randomly cut ranges.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <random>
#include <utility>
#include <vector>

#include "common/dispatch.h"
#include "common/numerics.h"
#include "common/types.h"

namespace pyseqnet {

using Random = std::mt19937_64;

inline int64_t uniform(Random& random, int64_t low, int64_t high) {
  return low + int64_t(random() % uint64_t(high - low + 1));
}
inline bool chance(Random& random, int64_t one_in) { return uniform(random, 1, one_in) == 1; }
inline double normal(Random& random) {
  double sum = -6;
  for (int i = 0; i < 12; i++) sum += double(random() >> 11) * 0x1p-53;
  return sum;
}

inline double read(const void* p, DType t, int64_t i) {
  return t == DType::f32    ? double(static_cast<const float*>(p)[i])
         : t == DType::bf16 ? to_double(static_cast<const bfloat16*>(p)[i])
         : t == DType::f16  ? to_double(static_cast<const float16*>(p)[i])
                            : static_cast<const double*>(p)[i];
}
inline void write(void* p, DType t, int64_t i, double v) {
  if (t == DType::f32) round_to(static_cast<float*>(p)[i], v);
  if (t == DType::bf16) round_to(static_cast<bfloat16*>(p)[i], v);
  if (t == DType::f16) round_to(static_cast<float16*>(p)[i], v);
  if (t == DType::f64) round_to(static_cast<double*>(p)[i], v);
}

// Full of NaN at first. An input is exactly as large as it is said to be, for a sanitizer; an output lies between guards.
struct Array {
  static constexpr size_t guard = 256;
  static constexpr std::byte guard_byte{0x5a};
  DType dtype;
  int64_t count;
  bool guarded;
  std::vector<std::byte> bytes;

  Array(DType type, int64_t n, bool output) : dtype(type), count(n), guarded(output) {
    const size_t size = size_t(n * bytes_of(type));
    bytes.assign(size + (output ? 2 * guard : 0), guard_byte);
    std::fill_n(bytes.begin() + (output ? guard : 0), size, std::byte{0xff});
  }
  void* data() { return bytes.data() + (guarded ? guard : 0); }
  double at(int64_t i) { return read(data(), dtype, i); }
  void set(int64_t i, double v) { write(data(), dtype, i, v); }
  bool guards_hold() const {
    for (size_t i = 0; guarded && i < guard; i++)
      if (bytes[i] != guard_byte || bytes[bytes.size() - 1 - i] != guard_byte) return false;
    return true;
  }
};
inline Array random_array(DType type, int64_t n, Random& random, double scale = 1) {
  Array a(type, n, false);
  for (int64_t i = 0; i < n; i++) a.set(i, scale * normal(random));
  return a;
}

struct Workspace {
  std::vector<std::byte> bytes;
  explicit Workspace(int64_t size) : bytes(size_t(size + workspace_alignment), std::byte{0xff}) {}
  std::byte* data() {
    const int64_t at = int64_t(reinterpret_cast<uintptr_t>(bytes.data()));
    return bytes.data() + (align_up(at) - at);
  }
};
// All items at once, or in randomly cut ranges in random order, each with scratch of its own.
template <class Kernel, class Problem, class Tensors>
void execute(const Kernel& kernel, const Problem& p, const Tensors& t, Random* cuts) {
  const WorkPlan plan = kernel.plan(p);
  Workspace shared(plan.shared_bytes);
  for (int phase = 0; phase < plan.phases; phase++) {
    const int64_t items = plan.phase[phase].items;
    std::vector<int64_t> ends = {items};
    for (int i = 0; cuts && i < 3; i++) ends.push_back(uniform(*cuts, 0, items));
    std::sort(ends.begin(), ends.end());
    std::vector<std::pair<int64_t, int64_t>> ranges;
    int64_t begin = 0;
    for (int64_t end : ends) {
      if (end > begin) ranges.push_back({begin, end});
      begin = end;
    }
    if (cuts) std::shuffle(ranges.begin(), ranges.end(), *cuts);
    for (auto [from, to] : ranges) {
      Workspace scratch(plan.thread_bytes);
      kernel.run(p, t, {phase, from, to, shared.data(), scratch.data()});
    }
  }
}

template <class Kernel>
bool available(const Kernel& kernel) {
  return kernel.isa <= best_isa();
}

}  // namespace pyseqnet
