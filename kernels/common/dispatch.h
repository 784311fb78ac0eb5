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

template <class Kernel>
struct Choice {
  const Kernel* kernel = nullptr;
  std::string error;  // set when kernel is null
};

// The kernel that PYSEQNET_FORCE pins for this operation, or an empty string. Operation names begin with the
// family.
std::string forced_kernel(const char* family, const char* operation);
bool verbose();
void print_choice(const char* operation, const std::string& problem, const char* chosen,
                  const std::string& refusals);

// fits(kernel) -> nullptr, or why the machine cannot run it.
template <class Kernel, class Problem, class Fits>
Choice<Kernel> choose(const char* family, const char* operation, Table<Kernel> table, const Problem& problem,
                      Fits fits) {
  Choice<Kernel> choice;
  std::string refusals;
  const std::string forced = forced_kernel(family, operation);
  for (int i = 0; i < table.count && !choice.kernel; i++) {
    const Kernel* k = table.kernels[i];
    if (!forced.empty() && forced != k->name) continue;
    Refusal why = fits(*k);
    if (!why) why = k->refuses(problem);
    if (!why) {
      choice.kernel = k;
    } else {
      if (!refusals.empty()) refusals += "; ";
      refusals += std::string(k->name) + ": " + why;
    }
  }
  const bool say = verbose();
  if (choice.kernel && !say) return choice;
  if (say) print_choice(operation, describe(problem), choice.kernel ? choice.kernel->name : "none", refusals);
  if (choice.kernel) return choice;
  if (!forced.empty() && refusals.empty()) {
    std::string names;
    for (int i = 0; i < table.count; i++) names += std::string(i ? ", " : "") + table.kernels[i]->name;
    choice.error = std::string(operation) + ": PYSEQNET_FORCE asks for '" + forced +
                   "', which is not in its table: " + names;
  } else {
    choice.error = std::string(operation) + ": no kernel takes " + describe(problem) + " (" + refusals + ")";
  }
  return choice;
}

}  // namespace pyseqnet
