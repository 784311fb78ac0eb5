// Dispatch is a list you can read: each operation of each family has one ordered table of kernels. The first
// whose instruction set the machine has and whose refuses() finds no fault runs. A refusal is a reason in
// words.
//
//   PYSEQNET_FORCE=conv:gemm_avx2[,max_pool_forward:portable]   pins a kernel by family or by operation; a
//   pinned
//                                                               kernel that refuses is an error, never
//                                                               replaced
//   PYSEQNET_VERBOSE=1                                          one line a call: operation, problem, choice,
//   refusals
#pragma once
#include <cstdint>
#include <string>

#include "common/cpu_work.h"
#include "common/isa.h"

namespace pyseqnet {

using Refusal = const char*;  // nullptr: accepted
constexpr Refusal accepted = nullptr;

template <class Problem, class Tensors>
struct CpuKernel {
  const char* name;  // "<method>_<isa>", unique in its table
  Isa isa;
  Refusal (*refuses)(const Problem&);
  WorkPlan (*plan)(const Problem&);
  void (*run)(const Problem&, const Tensors&, const WorkSlice&);
};

template <class Problem, class Tensors>
struct CudaKernel {
  const char* name;    // "<method>_<generic | sm80 | sm90a>"
  int min_capability;  // 80 = 8.0
  int max_capability;  // inclusive; 0 = any newer one too
  Refusal (*refuses)(const Problem&);
  int64_t (*workspace_bytes)(const Problem&);
  // Enqueues on the stream; returns a cudaError_t. Never synchronises, never throws.
  int (*launch)(const Problem&, const Tensors&, void* workspace, void* stream);
};

template <class Kernel>
struct Table {
  const Kernel* const* kernels;
  int count;
};

template <class Kernel, int n>
constexpr Table<Kernel> table_of(const Kernel* const (&kernels)[n]) {
  return {kernels, n};
}

template <class Kernel>
struct Choice {
  const Kernel* kernel = nullptr;
  std::string error;  // set when kernel is null
};

// What the environment says about an operation. Read on every call: two getenv, so that a test may change its
// mind.
struct DispatchRequest {
  std::string forced;  // kernel name, empty when free
  bool verbose = false;
};
DispatchRequest dispatch_request(const char* family, const char* operation);
void print_choice(const char* operation, const std::string& problem, const char* chosen,
                  const std::string& refusals);

// fits(kernel) -> nullptr, or why the machine cannot run it. describe(problem) is found by the problem's
// type.
template <class Kernel, class Problem, class Fits>
Choice<Kernel> choose(const char* family, const char* operation, Table<Kernel> table, const Problem& problem,
                      Fits fits) {
  Choice<Kernel> choice;
  const DispatchRequest request = dispatch_request(family, operation);
  auto refusal = [&](const Kernel& k) {
    const Refusal why = fits(k);
    return why ? why : k.refuses(problem);
  };
  auto asked_for = [&](const Kernel& k) { return request.forced.empty() || request.forced == k.name; };
  int chosen = 0;
  while (chosen < table.count && !(asked_for(*table.kernels[chosen]) && !refusal(*table.kernels[chosen])))
    chosen++;
  if (chosen < table.count) choice.kernel = table.kernels[chosen];
  if (choice.kernel && !request.verbose) return choice;

  std::string refusals, names;
  bool known = request.forced.empty();
  for (int i = 0; i < table.count; i++) {
    const Kernel& k = *table.kernels[i];
    names += std::string(i ? ", " : "") + k.name;
    if (!asked_for(k)) continue;
    known = true;
    if (i < chosen) refusals += std::string(refusals.empty() ? "" : "; ") + k.name + ": " + refusal(k);
  }
  if (request.verbose)
    print_choice(operation, describe(problem), choice.kernel ? choice.kernel->name : "none", refusals);
  if (choice.kernel) return choice;
  if (!known)
    choice.error = std::string(operation) + ": PYSEQNET_FORCE asks for '" + request.forced +
                   "', which is not in its table: " + (names.empty() ? "(empty)" : names);
  else
    choice.error = std::string(operation) + ": no kernel takes " + describe(problem) + " (" + refusals + ")";
  return choice;
}

}  // namespace pyseqnet
