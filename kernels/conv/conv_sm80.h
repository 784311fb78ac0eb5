// The tensor-core convolution of sm_80 as the fused block calls it: a forward pass with a fused epilogue.
#pragma once
#include "conv/conv_tensor_core.cuh"

namespace pyseqnet {

// Both are for problems that refuse_tensor_cores accepts; pass is forward or input_gradient.
int64_t product_workspace_sm80(ConvPass pass, const ConvProblem& p);
int launch_product_sm80(ConvPass pass, const ConvProblem& p, const ConvTensors& tensors,
                        const ConvEpilogue& epilogue, void* workspace, void* stream);

}  // namespace pyseqnet
