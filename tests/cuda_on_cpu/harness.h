// What the cases of tests/cuda_on_cpu share: tensors that live on the host and on the device, a random
// generator, runners for the kernels of both tables, and Suite, which runs one check under several schedules.
//
// A case is a program of its own: `case_<family>.cpp`, with lines
//   // Sources: <files below kernels/ that it is linked with>
// at its top. It includes only contracts and this header, so that the same source, compiled with
// `nvcc -x cu`, is the conformance test of a real device.
//
//   int main(int argc, char** argv) {
//     Suite suite(argc, argv);
//     for (...) {
//       suite.begin("label of the problem");               // frees the previous problem's memory
//       Tensor x(Kind::f32, n, "x"), y(Kind::f32, n, "y"), want(Kind::f32, n, "want");
//       fill(x, suite.random);
//       run_cpu(reference, problem, {.x = x.host(), .y = want.host()});
//       suite.check(kernel.name, {&y}, [&] { return run_cuda(kernel, problem, {.x = x.device(), ...}); },
//                   [&] { return difference(y, want, absolute, relative); });
//     }
//     return suite.finish();
//   }
#pragma once
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include "common/dispatch.h"
#include "common/numerics.h"
#include "device_memory.h"

namespace pyseqnet::testing {

// splitmix64: the same problems on every machine and compiler.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next() {
    uint64_t z = (state_ += 0x9E3779B97F4A7C15ull);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
  }
  int64_t in(int64_t low, int64_t high) { return low + int64_t(next() % uint64_t(high - low + 1)); }
  double uniform() { return double(next() >> 11) * 0x1p-53; }
  bool chance(double p) { return uniform() < p; }
  template <class T, size_t n>
  T any(const T (&list)[n]) {
    return list[next() % n];
  }
  // Sum of twelve uniforms: close enough to a normal deviate, and exact on every machine.
  double normal() {
    double sum = -6;
    for (int i = 0; i < 12; i++) sum += uniform();
    return sum;
  }

 private:
  uint64_t state_;
};

enum class Kind { f32, bf16, f16, f64, u8, i32, i64 };
constexpr Kind kind_of(DType t) {
  return t == DType::f32    ? Kind::f32
         : t == DType::bf16 ? Kind::bf16
         : t == DType::f16  ? Kind::f16
                            : Kind::f64;
}
constexpr int64_t bytes_of(Kind k) {
  return k == Kind::f64 || k == Kind::i64 ? 8 : k == Kind::f32 || k == Kind::i32 ? 4 : k == Kind::u8 ? 1 : 2;
}
// The distance of 1 to the next number of the type.
constexpr double epsilon_of(DType t) {
  return t == DType::f32 ? 0x1p-23 : t == DType::bf16 ? 0x1p-7 : t == DType::f16 ? 0x1p-10 : 0x1p-52;
}

// A dense tensor with a copy on the host and one on the device. Both begin poisoned.
class Tensor {
 public:
  Tensor(Kind kind, int64_t count, const char* name)
      : kind_(kind),
        count_(count),
        name_(name),
        host_(size_t(count * testing::bytes_of(kind)),
              static_cast<unsigned char>(device_memory::poison_byte)),
        device_(device_memory::allocate(host_.size(), name)) {}
  Tensor(const Tensor&) = delete;

  Kind kind() const { return kind_; }
  int64_t count() const { return count_; }
  const char* name() const { return name_; }
  void* host() { return host_.data(); }
  void* device() const { return device_; }
  const std::vector<unsigned char>& bytes() const { return host_; }

  void upload() { device_memory::upload(device_, host_.data(), host_.size()); }
  void download() { device_memory::download(host_.data(), device_, host_.size()); }
  void poison() {
    device_memory::poison(device_, host_.size());
    host_.assign(host_.size(), static_cast<unsigned char>(device_memory::poison_byte));
  }

  double at(int64_t i) const {
    switch (kind_) {
      case Kind::f32:
        return get<float>(i);
      case Kind::bf16:
        return bf16_bits_to_float(get<uint16_t>(i));
      case Kind::f16:
        return f16_bits_to_float(get<uint16_t>(i));
      case Kind::f64:
        return get<double>(i);
      case Kind::u8:
        return get<uint8_t>(i);
      case Kind::i32:
        return get<int32_t>(i);
      default:
        return double(get<int64_t>(i));
    }
  }
  void set(int64_t i, double v) {
    switch (kind_) {
      case Kind::f32:
        return put(i, float(v));
      case Kind::bf16:
        return put(i, float_to_bf16_bits(float(v)));
      case Kind::f16:
        return put(i, float_to_f16_bits(float(v)));
      case Kind::f64:
        return put(i, v);
      case Kind::u8:
        return put(i, uint8_t(v));
      case Kind::i32:
        return put(i, int32_t(v));
      default:
        return put(i, int64_t(v));
    }
  }

 private:
  template <class T>
  T get(int64_t i) const {
    T v;
    std::memcpy(&v, host_.data() + i * int64_t(sizeof(T)), sizeof(T));
    return v;
  }
  template <class T>
  void put(int64_t i, T v) {
    std::memcpy(host_.data() + i * int64_t(sizeof(T)), &v, sizeof(T));
  }

  Kind kind_;
  int64_t count_;
  const char* name_;
  std::vector<unsigned char> host_;
  void* device_;
};

// Normal deviates, on both sides.
inline void fill(Tensor& t, Random& random, double scale = 1) {
  for (int64_t i = 0; i < t.count(); i++) t.set(i, scale * random.normal());
  t.upload();
}

// "" where every |got - want| <= absolute + relative * |want| (NaN only where NaN is wanted), else the worst
// element in words.
inline std::string difference(const Tensor& got, const Tensor& want, double absolute, double relative) {
  double worst = 1;
  int64_t where = -1;
  for (int64_t i = 0; i < want.count(); i++) {
    const double g = got.at(i), w = want.at(i);
    if (g == w || (std::isnan(g) && std::isnan(w))) continue;
    double error = std::fabs(g - w) / (absolute + relative * std::fabs(w));
    if (std::isnan(error)) error = INFINITY;
    if (error > worst) worst = error, where = i;
  }
  if (where < 0) return "";
  char words[200];
  std::snprintf(words, sizeof words, "%s[%lld] is %.9g, wanted %.9g: %.3g times the error allowed",
                got.name(), static_cast<long long>(where), got.at(where), want.at(where), worst);
  return words;
}
inline std::string bitwise_difference(const Tensor& got, const Tensor& want) {
  if (got.bytes() == want.bytes()) return "";
  const std::string words = difference(got, want, 0, 0);
  return words.empty() ? std::string(got.name()) + ": equal values with different bits" : words;
}

// Runs a kernel of the CPU table over its whole plan, serially: the oracles are such kernels.
template <class Problem, class Tensors>
void run_cpu(const CpuKernel<Problem, Tensors>& kernel, const Problem& problem, const Tensors& tensors) {
  const WorkPlan plan = kernel.plan(problem);
  struct alignas(workspace_alignment) Line {
    std::byte bytes[workspace_alignment];
  };
  const auto lines = [](int64_t bytes) { return size_t(align_up(bytes) / workspace_alignment); };
  std::vector<Line> shared(lines(plan.shared_bytes)), scratch(lines(plan.thread_bytes));
  for (int phase = 0; phase < plan.phases; phase++)
    kernel.run(problem, tensors,
               {phase, 0, plan.phase[phase].items, reinterpret_cast<std::byte*>(shared.data()),
                reinterpret_cast<std::byte*>(scratch.data())});
}

// Launches a kernel of the CUDA table with a poisoned workspace of exactly the size it asks for.
template <class Problem, class Tensors>
int run_cuda(const CudaKernel<Problem, Tensors>& kernel, const Problem& problem, const Tensors& tensors) {
  const int64_t bytes = kernel.workspace_bytes(problem);
  void* workspace = bytes ? device_memory::allocate(size_t(bytes), "workspace") : nullptr;
  return kernel.launch(problem, tensors, workspace, nullptr);
}

// Counts checks and complaints. Options of every case:
//   --seeds N      schedules of the simulator that each check runs under (on a device: runs). Default 3
//   --random N     random problems, for the case to read. Default 20
//   --only TEXT    only problems whose label contains TEXT
//   --seed N       of the random problems, and of the first schedule
//   --large        for the case to read: problems that only a real device has the memory and the time for
//   --launched F   simulator: appends the names of all kernels that were launched to the file F
class Suite {
 public:
  Suite(int argc, char** argv) {
    for (int i = 1; i < argc; i++) {
      const std::string option = argv[i];
      const auto value = [&] { return i + 1 < argc ? argv[++i] : ""; };
      if (option == "--seeds")
        seeds_ = std::atoi(value());
      else if (option == "--random")
        random_problems = std::atoi(value());
      else if (option == "--only")
        only_ = value();
      else if (option == "--seed")
        first_seed_ = uint64_t(std::atoll(value()));
      else if (option == "--launched")
        launched_ = value();
      else if (option == "--large")
        large = true;
      else if (option == "--list")
        list_ = true;
      else if (option == "--stop")
        stop_ = true;
      else {
        std::fprintf(stderr, "unknown option %s\n", argv[i]);
        std::exit(2);
      }
    }
    random = Random(first_seed_);
  }

  Random random{1};
  int random_problems = 20;
  bool large = false;

  // Starts a problem: what the last one allocated is freed. Returns false where --only leaves it out.
  bool begin(const std::string& label) {
    end_problem();
    label_ = label;
    if (list_) std::printf("%s\n", label.c_str());
    return !list_ && (only_.empty() || label.find(only_) != std::string::npos);
  }

  // Runs `launch` (returns the kernel's error code) once per schedule, outputs poisoned before each, and asks
  // `complaint` ("" = right) about the downloaded outputs. They must be the same bits in every run.
  void check(const std::string& what, const std::vector<Tensor*>& outputs, const std::function<int()>& launch,
             const std::function<std::string()>& complaint) {
    std::vector<std::vector<unsigned char>> first;
    for (int k = 0; k < seeds_; k++) {
      const uint64_t seed = first_seed_ + uint64_t(k);
      device_memory::set_seed(seed);
      for (Tensor* t : outputs) t->poison();
      std::string trouble = device_memory::finish(launch());
      for (Tensor* t : outputs) t->download();
      const std::string wrong = complaint();
      if (!wrong.empty()) trouble += (trouble.empty() ? "" : "; ") + wrong;
      for (size_t i = 0; i < outputs.size(); i++) {
        if (k == 0)
          first.push_back(outputs[i]->bytes());
        else if (first[i] != outputs[i]->bytes())
          trouble += (trouble.empty() ? "" : "; ") + std::string(outputs[i]->name()) +
                     " differs from the first run's";
      }
      checks_++;
      if (!trouble.empty()) fail(what + " seed " + std::to_string(seed), trouble);
    }
  }

  void fail(const std::string& what, const std::string& trouble) {
    constexpr int shown = 20;
    if (failures_++ < shown)
      std::printf("FAILED %s: %s: %s\n", label_.c_str(), what.c_str(), trouble.c_str());
    if (stop_) std::exit(1);
  }

  int finish() {
    end_problem();
#ifndef __CUDACC__
    if (!launched_.empty()) cusim::append_launched_kernels(launched_.c_str());
#endif
    std::printf("%d checks, %d failed\n", checks_, failures_);
    return failures_ || (!checks_ && !list_);
  }

 private:
  void end_problem() {
    const std::string damage = device_memory::free_all();
    if (!damage.empty()) fail("memory", damage);
  }

  int seeds_ = 3, checks_ = 0, failures_ = 0;
  uint64_t first_seed_ = 1;
  bool list_ = false, stop_ = false;
  std::string only_, launched_, label_;
};

}  // namespace pyseqnet::testing
