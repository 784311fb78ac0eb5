// The bias gradient on any CUDA device: gb[k] = sum over n, p, q of gy[n,k,p,q].
//
// Two stages without atomics: blocks sum parts of the pixels of each channel (conv_generic.cuh says who takes
// which), sum_parts adds the parts in order. Bound: memory, gy is read once; in 16 bits the 36 instructions
// an element. 32 to 40 registers.
//
// Predicted before any measurement, for an H200 (4.3 TB/s), N32 K64 56x56: 26 MB in float32, 12 us; as long
// in 16 bits.
#include "conv/conv_generic.cuh"

namespace pyseqnet {
namespace {

template <class T>
__global__ void __launch_bounds__(channel_threads)
    sum_channels(const T* __restrict__ gy, void* __restrict__ out, ChannelSums s) {
  using Acc = accumulator_t<T>;
  PYSEQNET_SHARED(Acc, memory, [1][channel_threads]);
  const int t = int(threadIdx.x), pixel_lanes = channel_threads / s.channel_lanes;
  const ChannelShare mine(s, t);
  Acc sum[1] = {0};
  if (mine.channel < s.channels && mine.begin < mine.end) {
    gy += mine.channel * s.gy.c;
    Digits<3> d = digits_of(mine.begin, s.item.extent);
#pragma unroll 4
    for (int64_t pixel = mine.begin; pixel < mine.end; pixel += pixel_lanes) {
      sum[0] += load(gy + d.digit[0] * s.gy.n + d.digit[1] * s.gy.h + d.digit[2] * s.gy.w);
      advance(d, s.item);
    }
  }
  add_pixel_lanes(sum, memory, t, s.channel_lanes);
  if (t >= s.channel_lanes || mine.channel >= s.channels) return;
  if (s.accumulators_out)
    static_cast<Acc*>(out)[blockIdx.x / s.channel_blocks * s.channels + mine.channel] = sum[0];
  else
    store(static_cast<T*>(out) + mine.channel, sum[0]);
}

// More channels than blocks in a grid are beyond coordinate_limit already, and parts are few by construction.
Refusal refuses(const ConvProblem& p) { return refuse_beyond_coordinates(simplified(p)); }

int64_t workspace_bytes(const ConvProblem& p) { return parts_bytes(p.dtype, channel_sums(p).parts, p.K); }

int launch_sums(const ConvProblem& p, const ConvTensors& tensors, void* workspace, void* stream) {
  if (p.K == 0) return launch_ok;
  const ChannelSums s = channel_sums(p);
  return dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const int error = launch(
        {.grid = dim3(s.channel_blocks * s.parts), .block = dim3(channel_threads), .stream = stream},
        sum_channels<T>, static_cast<const T*>(tensors.gy), s.accumulators_out ? workspace : tensors.gb, s);
    if (error != launch_ok || !s.accumulators_out) return error;
    return launch_sum_parts<T>(workspace, tensors.gb, p.K, s.parts, stream);
  });
}

}  // namespace

extern const ConvCudaKernel conv_bias_gradient_cuda;
const ConvCudaKernel conv_bias_gradient_cuda = {"bias_generic", 80, 0, refuses, workspace_bytes, launch_sums};

}  // namespace pyseqnet
