// Tests of the simulator itself: kernels with faults planted in them. A kernel takes the number of the fault
// that it shall have; 0 is the correct kernel, which must give the right values without a report. Every other
// number must be caught: by a report that contains the words named beside it, or, where those are "values",
// by wrong results (no checker can know what a kernel was meant to compute).
//
// The correct kernels also run on a real device (nvcc -x cu); the planted faults are left out there.
#pragma once
#include <cmath>
#include <cstdio>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "common/ptx.cuh"
#include "device_memory.h"
#include "harness.h"

namespace pyseqnet::faults {

using testing::Random;

template <class V>
struct Buffer {
  V* device;
  size_t count;
  Buffer(size_t n, const char* name)
      : device(static_cast<V*>(device_memory::allocate(n * sizeof(V), name))), count(n) {}
  Buffer(const std::vector<V>& values, const char* name) : Buffer(values.size(), name) {
    device_memory::upload(device, values.data(), count * sizeof(V));
  }
  void poison() { device_memory::poison(device, count * sizeof(V)); }
  void zero() {
    const std::vector<unsigned char> zeros(count * sizeof(V));
    device_memory::upload(device, zeros.data(), zeros.size());
  }
  std::vector<V> get() const {
    std::vector<V> v(count);
    device_memory::download(v.data(), device, count * sizeof(V));
    return v;
  }
};

template <class V>
std::vector<V> normals(size_t n, Random& random, float scale = 1) {
  std::vector<V> v(n);
  for (V& x : v) x = V(scale * float(random.normal()));
  return v;
}

template <class V>
bool close(const Buffer<V>& got, const std::vector<double>& want, double absolute, double relative) {
  const std::vector<V> values = got.get();
  for (size_t i = 0; i < want.size(); i++) {
    const double g = double(float(values[i]));
    if (g != want[i] && !(std::fabs(g - want[i]) <= absolute + relative * std::fabs(want[i]))) return false;
  }
  return true;
}

// The fault that a kernel shall have. A device runs the correct kernel, compiled as if there were no other.
PYSEQNET_DEVICE constexpr int planted(int fault) { return device_memory::simulated ? fault : 0; }

struct Fault {
  int number;
  const char* what;       // in words
  const char* caught_by;  // part of the report, or "values"
};
constexpr const char* by_values = "values";

class Program {
 public:
  Program(const char* name, std::vector<Fault> list) : name_(name), list_(std::move(list)) {}

  // One shape: launch(fault) for every fault and several schedules; right() judges the values.
  void run(const std::function<int(int)>& launch, const std::function<bool()>& right) {
    static constexpr int schedules = 4;
    for (int seed = 1; seed <= schedules; seed++) judge(0, "", seed, launch, right);
    if constexpr (device_memory::simulated)
      for (const Fault& fault : list_)
        for (int seed = 1; seed <= schedules; seed++)
          judge(fault.number, fault.caught_by, seed, launch, right);
  }

  int finish() {
    int failures = 0;
    for (const auto& [number, seen] : seen_) {
      const bool good = number == 0 ? seen.caught == 0 : seen.caught > 0;
      const char* what = "correct kernel";
      for (const Fault& f : list_)
        if (f.number == number) what = f.what;
      std::printf("%s %s %d (%s): caught in %d of %d runs%s%s\n", good ? "ok    " : "FAILED", name_, number,
                  what, seen.caught, seen.runs, seen.words.empty() ? "" : "; ", seen.words.c_str());
      failures += !good;
    }
    device_memory::free_all();
    return failures != 0 || seen_.empty();
  }

 private:
  struct Seen {
    int runs = 0, caught = 0;
    std::string words;
  };
  void judge(int fault, const std::string& caught_by, int seed, const std::function<int(int)>& launch,
             const std::function<bool()>& right) {
    device_memory::set_seed(uint64_t(seed));
    const std::string words = device_memory::finish(launch(fault));
    const bool wrong = !right();
    Seen& seen = seen_[fault];
    seen.runs++;
    bool caught = fault == 0               ? wrong || !words.empty()
                  : caught_by == by_values ? wrong
                                           : words.find(caught_by) != std::string::npos;
    if (caught && seen.caught++ == 0) seen.words = words.empty() ? "wrong values" : words.substr(0, 300);
  }

  const char* name_;
  std::vector<Fault> list_;
  std::map<int, Seen> seen_;
};

}  // namespace pyseqnet::faults
