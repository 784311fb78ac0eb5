// How a CPU kernel tells its caller what work there is. Kernels never start threads: the caller owns a thread
// pool, asks plan() once, and calls run() for disjoint [begin, end) ranges of each phase. All ranges of a
// phase must have returned before the next phase starts.
//
// What makes results bitwise equal for any number of threads: the items of a phase write disjoint outputs,
// and what one item computes depends on the problem only, never on the range it came in, nor on the thread
// that ran it.
#pragma once
#include <cstddef>
#include <cstdint>

namespace pyseqnet {

struct Phase {
  int64_t items = 0;
  int64_t grain =
      1;  // the fewest items that are worth handing to a second thread (about 20 microseconds of work)
};

struct WorkPlan {
  static constexpr int max_phases = 4;
  int phases = 0;
  Phase phase[max_phases];
  int64_t shared_bytes = 0;  // one workspace for all threads, lives through all phases, uninitialised
  int64_t thread_bytes = 0;  // scratch private to a thread, uninitialised at the start of every range

  void add_phase(int64_t items, int64_t grain = 1) { phase[phases++] = {items, grain}; }
};

// One range of one phase. Both pointers are aligned to workspace_alignment.
struct WorkSlice {
  int phase;
  int64_t begin, end;
  std::byte* shared;
  std::byte* scratch;
};

constexpr int64_t workspace_alignment = 64;
constexpr int64_t align_up(int64_t bytes) {
  return (bytes + workspace_alignment - 1) / workspace_alignment * workspace_alignment;
}

// Carves typed arrays, each aligned, out of a workspace. With a null base it only counts: plan() and run()
// can share the code that lays out a workspace.
class Carver {
 public:
  explicit Carver(std::byte* base) : base_(base) {}
  template <class T>
  T* take(int64_t count) {
    T* p = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += align_up(count * int64_t(sizeof(T)));
    return p;
  }
  int64_t used() const { return used_; }

 private:
  std::byte* base_;
  int64_t used_ = 0;
};

}  // namespace pyseqnet
