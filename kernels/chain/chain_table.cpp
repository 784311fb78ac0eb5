// The dispatch tables of the chain family: ordered, first acceptance wins.
#include <cstdio>

#include "chain/crf.h"
#include "chain/ctc.h"

namespace pyseqnet {

#define DECLARE_CPU_KERNELS      \
  extern const CtcCpuKernel ctc; \
  extern const CrfCpuKernel crf_log_likelihood, crf_gradient, crf_viterbi
namespace portable {
DECLARE_CPU_KERNELS;
}
#if defined(__x86_64__)
namespace avx2 {
DECLARE_CPU_KERNELS;
}
namespace avx512 {
DECLARE_CPU_KERNELS;
}
#endif
#undef DECLARE_CPU_KERNELS

extern const CtcCpuKernel ctc_reference;
extern const CrfCpuKernel crf_reference_log_likelihood, crf_reference_gradient, crf_reference_viterbi;

namespace {

#if defined(__x86_64__)
#define EVERY_ISA(kernel) &avx512::kernel, &avx2::kernel, &portable::kernel
#else
#define EVERY_ISA(kernel) &portable::kernel
#endif

constexpr const CtcCpuKernel* ctc_cpu[] = {EVERY_ISA(ctc), &ctc_reference};
constexpr const CrfCpuKernel* log_likelihood[] = {EVERY_ISA(crf_log_likelihood),
                                                  &crf_reference_log_likelihood};
constexpr const CrfCpuKernel* gradient[] = {EVERY_ISA(crf_gradient), &crf_reference_gradient};
constexpr const CrfCpuKernel* viterbi[] = {EVERY_ISA(crf_viterbi), &crf_reference_viterbi};

}  // namespace

Table<CtcCpuKernel> ctc_cpu_table() { return table_of(ctc_cpu); }
Table<CrfCpuKernel> crf_cpu_table(CrfPass pass) {
  switch (pass) {
    case CrfPass::log_likelihood:
      return table_of(log_likelihood);
    case CrfPass::gradient:
      return table_of(gradient);
    case CrfPass::viterbi:
      return table_of(viterbi);
  }
  return {};
}

#if defined(PYSEQNET_WITH_CUDA)
extern const CtcCudaKernel ctc_cuda;
extern const CrfCudaKernel crf_log_likelihood_cuda, crf_gradient_cuda, crf_viterbi_cuda;

namespace {
constexpr const CtcCudaKernel* cuda_ctc[] = {&ctc_cuda};
constexpr const CrfCudaKernel* cuda_log_likelihood[] = {&crf_log_likelihood_cuda};
constexpr const CrfCudaKernel* cuda_gradient[] = {&crf_gradient_cuda};
constexpr const CrfCudaKernel* cuda_viterbi[] = {&crf_viterbi_cuda};
}  // namespace

Table<CtcCudaKernel> ctc_cuda_table() { return table_of(cuda_ctc); }
Table<CrfCudaKernel> crf_cuda_table(CrfPass pass) {
  switch (pass) {
    case CrfPass::log_likelihood:
      return table_of(cuda_log_likelihood);
    case CrfPass::gradient:
      return table_of(cuda_gradient);
    case CrfPass::viterbi:
      return table_of(cuda_viterbi);
  }
  return {};
}
#else
Table<CtcCudaKernel> ctc_cuda_table() { return {}; }
Table<CrfCudaKernel> crf_cuda_table(CrfPass) { return {}; }
#endif

std::string describe(const CtcProblem& p) {
  char text[256];
  std::snprintf(text, sizeof text, "T%lld B%lld C%lld S%lld %s%s%s", (long long)p.T, (long long)p.B,
                (long long)p.C, (long long)p.S, name_of(p.dtype),
                p.from_logits ? " logits" : " log-probabilities", p.with_gradient ? " with gradient" : "");
  return text;
}
std::string describe(const CrfProblem& p) {
  char text[256];
  std::snprintf(text, sizeof text, "B%lld T%lld C%lld %s%s nbest %lld", (long long)p.B, (long long)p.T,
                (long long)p.C, name_of(p.dtype), p.with_tags ? " tags" : "", (long long)p.nbest);
  return text;
}

}  // namespace pyseqnet
