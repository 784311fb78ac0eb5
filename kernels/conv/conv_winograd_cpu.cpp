// 3 x 3 convolution, stride 1, dilation 1, by Winograd F(4x4, 3x3): forward, input gradient, weight gradient.
// A quarter of the multiplications of the direct sum, for transforms that cost 15 to 30 % of the rest. 16-bit
// tensors are widened on the way in and rounded once on the way out; transforms and products are float32. A
// quarter of the products in float32 is still less work than all of them as bfloat16 dot products.
//
// Design
//   Lanes are channels, so the transforms (winograd_points.h) are elementwise arithmetic on one tile, and the
//   products are 36 independent matrix products with a register tile of 14 tiles x 2 vectors
//   (winograd_panels.h). The input gradient is the forward routine on gy with turned filters and C and K
//   exchanged. There are two orders of the same work (winograd_convolution.h):
//     by tiles     the transformed filters of all channels are kept; blocks of tiles pass through transform,
//                  products and transform back inside the second-level cache. For many tiles.
//     by channels  the transformed tiles of the whole batch are kept; panels of output channels pass through
//                  products and transform back, and transform their filters on the way, which then are never
//                  written to memory (36 / 9 times their size). For few tiles and many channels.
//   The weight gradient likewise (winograd_weight_gradient.h): by tiles, each of a fixed number of chunks of
//   tiles sums its own U', and a last phase adds them in order; by channels, a 2 VL x 2 VL panel of U' stays
//   in the cache over all tiles. Chunks and blocks depend on the problem only, and so do the results.
//
// Bound: FMA in the products.
// Accuracy: root mean square of the error <= 2e-6, largest error <= 5e-6 of the largest result
// (tests/cpp/test_conv_winograd.cpp). PYSEQNET_WINOGRAD=0 in the environment, read at every call, turns these
// kernels off.
// Infinite and NaN inputs: a tile is computed as a whole, so one such pixel makes every output of the tiles
// that read it NaN (up to 4 pixels away with padding 1), where the direct sum keeps it within 3 x 3 outputs.
#include <cstdlib>

#include "conv/winograd_convolution.h"
#include "conv/winograd_weight_gradient.h"

namespace pyseqnet {
inline namespace PYSEQNET_ISA {
namespace winograd {

// Costs in vector operations, of the size of a multiply-add of VL channels (measured with 4 to 256 channels
// on images of 2 to 56 pixels, one thread: where the two sides are equal, this is as fast as the general
// kernel or up to a third faster).
constexpr double TRANSFORM_COST = 250;  // one tile, VL channels: in or out, with its gather or scatter
constexpr double FILTER_COST = 170;     // one filter of VL output channels
// A multiply-add of the direct sum where the processor has dot products of bfloat16 pairs.
constexpr double DOT_PRODUCT_COST = 0.5;

constexpr int64_t FEWEST_CHANNELS = 8;

// Whether the transforms cost less than they save; the direct sum is taken at full speed.
template <ConvPass pass>
bool pays(const ConvProblem& p) {
  const bool turned = pass == ConvPass::input_gradient;
  const int64_t C = turned ? p.K : p.C, K = turned ? p.C : p.K, P = turned ? p.H : p.P,
                Q = turned ? p.W : p.Q;
  const double pixels = double(p.N) * double(P) * double(Q), tiles = double(Tiling(p.N, P, Q).tiles());
  const double c = double(ceil_div(C, VL)), k = double(ceil_div(K, VL));
  const double direct = double(taps) * pixels * double(C) * double(K) / VL;
  const double products = double(points) * tiles * double(C) * k;
  const double price = p.dtype == DType::bf16 && best_isa() >= Isa::avx512bf16 ? DOT_PRODUCT_COST : 1;
  return products + TRANSFORM_COST * tiles * (c + k) + FILTER_COST * double(C) * k <= price * direct;
}

template <ConvPass pass>
Refusal refuses(const ConvProblem& p) {
  const char* wanted = std::getenv("PYSEQNET_WINOGRAD");
  if (wanted && wanted[0] == '0' && !wanted[1]) return "PYSEQNET_WINOGRAD=0 turns it off";
  if (this_isa == Isa::portable) return "needs AVX2 or AVX-512";
  if (p.dtype == DType::f64) return "float64 is served by the reference";
  if (p.R != 3 || p.S != 3) return "3x3 filters only";
  if (p.stride_h != 1 || p.stride_w != 1) return "stride 1 only";
  if (p.dilation_h != 1 || p.dilation_w != 1) return "dilation 1 only";
  if (p.groups != 1) return "groups = 1 only";
  if (p.N == 0 || p.C == 0 || p.K == 0 || p.H == 0 || p.W == 0 || p.P == 0 || p.Q == 0)
    return "an extent is zero";
  // Fewer fill too little of a vector of lanes; measured, the direct sum is up to a third faster at 3 and
  // level at 8.
  if (p.C < FEWEST_CHANNELS || p.K < FEWEST_CHANNELS) return "fewer than 8 channels or filters";
  if (!pays<pass>(p)) return "too few channels or pixels: the transforms would cost more than they save";
  return accepted;
}

}  // namespace winograd

extern const ConvCpuKernel conv_winograd_forward, conv_winograd_input_gradient, conv_winograd_weight_gradient;
const ConvCpuKernel conv_winograd_forward = {
    "winograd_" PYSEQNET_ISA_NAME, this_isa, winograd::refuses<ConvPass::forward>,
    winograd::plan_convolution<ConvPass::forward>, winograd::run_convolution<ConvPass::forward>};
const ConvCpuKernel conv_winograd_input_gradient = {"winograd_" PYSEQNET_ISA_NAME, this_isa,
                                                    winograd::refuses<ConvPass::input_gradient>,
                                                    winograd::plan_convolution<ConvPass::input_gradient>,
                                                    winograd::run_convolution<ConvPass::input_gradient>};
const ConvCpuKernel conv_winograd_weight_gradient = {
    "winograd_" PYSEQNET_ISA_NAME, this_isa, winograd::refuses<ConvPass::weight_gradient>,
    winograd::plan_weight_gradient, winograd::run_weight_gradient};

}  // namespace PYSEQNET_ISA
}  // namespace pyseqnet
