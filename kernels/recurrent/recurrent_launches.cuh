// What the host's side of a kernel that is made of several launches needs: a workspace dealt out, and the first
// error kept.
#pragma once
#include <cstdint>

#include "common/launch.cuh"

namespace pyseqnet {

// Deals out a workspace; with a null base it only counts.
class Workspace {
 public:
  explicit Workspace(void* base) : base_(reinterpret_cast<uintptr_t>(base)) {}
  template <class T>
  T* take(int64_t count) {
    constexpr int64_t alignment = 256;
    const int64_t begin = bytes_;
    bytes_ += (count * int64_t(sizeof(T)) + alignment - 1) / alignment * alignment;
    return count > 0 ? reinterpret_cast<T*>(base_ + uintptr_t(begin)) : nullptr;
  }
  int64_t bytes() const { return bytes_; }

 private:
  uintptr_t base_;
  int64_t bytes_ = 0;
};

// Takes the first error of several launches; what follows it is not launched.
class Launches {
 public:
  template <class F>
  void operator()(F&& f) {
    if (!error_) error_ = f();
  }
  bool failed() const { return error_ != launch_ok; }
  int error() const { return error_; }

 private:
  int error_ = launch_ok;
};

}  // namespace pyseqnet
