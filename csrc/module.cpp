// pyseqnet._C: what was built, what this machine has. Importing it also registers the operations of the other
// files.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "attention/additive.h"
#include "attention/attention.h"
#include "chain/crf.h"
#include "chain/ctc.h"
#include "common/dispatch.h"
#include "common/isa.h"
#include "common/probe.h"
#include "conv/conv.h"
#include "conv/conv_relu_pool.h"
#include "linear_attention/linear_attention.h"
#include "pool/max_pool.h"
#include "recurrent/recurrent.h"

namespace py = pybind11;
using namespace pyseqnet;

namespace {

template <class Kernel>
void append_names(py::list& names, Table<Kernel> table) {
  for (int i = 0; i < table.count; i++) names.append(table.kernels[i]->name);
}

// {operation: {"cpu": [...], "cuda": [...]}}, each list in dispatch order.
py::dict dispatch_tables() {
  py::dict result;
  auto add = [&](const char* operation, auto cpu, auto cuda) {
    py::list on_cpu, on_cuda;
    append_names(on_cpu, cpu);
    append_names(on_cuda, cuda);
    py::dict both;
    both["cpu"] = on_cpu;
    both["cuda"] = on_cuda;
    result[operation] = both;
  };
  for (ConvPass pass :
       {ConvPass::forward, ConvPass::input_gradient, ConvPass::weight_gradient, ConvPass::bias_gradient})
    add(operation_of(pass), conv_cpu_table(pass), conv_cuda_table(pass));
  for (ConvPass pass :
       {ConvPass::forward, ConvPass::input_gradient, ConvPass::weight_gradient, ConvPass::bias_gradient})
    add(fused_operation_of(pass), conv_relu_pool_cpu_table(pass), conv_relu_pool_cuda_table(pass));
  for (MaxPoolPass pass : {MaxPoolPass::forward, MaxPoolPass::backward, MaxPoolPass::indices})
    add(operation_of(pass), max_pool_cpu_table(pass), max_pool_cuda_table(pass));
  for (AttentionPass pass : all_attention_passes)
    add(operation_of(pass), attention_cpu_table(pass), attention_cuda_table(pass));
  for (AdditivePass pass : all_additive_passes)
    add(operation_of(pass), additive_cpu_table(pass), additive_cuda_table(pass));
  for (RecurrentPass pass : {RecurrentPass::forward, RecurrentPass::backward})
    add(operation_of(pass), recurrent_cpu_table(pass), recurrent_cuda_table(pass));
  for (LinearAttentionPass pass : {LinearAttentionPass::forward, LinearAttentionPass::backward})
    add(operation_of(pass), linear_attention_cpu_table(pass), linear_attention_cuda_table(pass));
  add("ctc_loss", ctc_cpu_table(), ctc_cuda_table());
  for (CrfPass pass : all_crf_passes) add(operation_of(pass), crf_cpu_table(pass), crf_cuda_table(pass));
  return result;
}

py::dict build_info() {
  py::dict info;
#if defined(PYSEQNET_WITH_CUDA)
  info["cuda"] = true;
  info["archs"] = PYSEQNET_CUDA_ARCHS;
  info["nvcc"] = PYSEQNET_NVCC_VERSION;
#else
  info["cuda"] = false;
  info["archs"] = "";
  info["nvcc"] = "";
#endif
  info["cpu_isa"] = name_of(best_isa());
  info["cpu_isa_detected"] = name_of(detected_isa());
#if defined(__x86_64__)
  info["cpu_isas_built"] = "portable, avx2, avx512, avx512bf16";
#else
  info["cpu_isas_built"] = "portable";
#endif
  info["torch_target"] = "2.10";
  info["compiler"] = __VERSION__;
  return info;
}

// The copy of a probe that the best instruction set of this machine calls for.
#if defined(__x86_64__)
#define ON_BEST_ISA(call)                             \
  (best_isa() >= Isa::avx512 ? pyseqnet::avx512::call \
   : best_isa() >= Isa::avx2 ? pyseqnet::avx2::call   \
                             : pyseqnet::portable::call)
#else
#define ON_BEST_ISA(call) pyseqnet::portable::call
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information and machine probes of pyseqnet; importing it registers torch.ops.pyseqnet.";
  m.def("build_info", &build_info);
  m.def("dispatch_tables", &dispatch_tables);
  m.def(
      "fma_gflops",
      [](double seconds) {
        py::gil_scoped_release unlocked;
        return ON_BEST_ISA(probe_fma_gflops(seconds));
      },
      py::arg("seconds") = 0.2, "Measured fp32 fused multiply-add peak of one thread, in GFLOP/s.");
  m.def(
      "copy_gbps",
      [](double seconds, int64_t bytes) {
        if (bytes <= 0) throw std::invalid_argument("copy_gbps: bytes must be positive");
        py::gil_scoped_release unlocked;
        return ON_BEST_ISA(probe_copy_gbps(seconds, bytes));
      },
      py::arg("seconds") = 0.2, py::arg("bytes") = int64_t(256) << 20,
      "Measured copy bandwidth of one thread, bytes read plus bytes written, in GB/s.");
}
