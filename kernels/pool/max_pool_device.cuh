// What the CUDA kernels of max-pooling share: vectors, and the rule by which a tap wins.
#pragma once
#include <cmath>

#include "common/cuda_numerics.cuh"

namespace pyseqnet {

template <class T, int n>
struct alignas(sizeof(T) * n) Pack {
  T value[n];
};

template <class T>
PYSEQNET_DEVICE T lowest() {
  return from_accumulator<T>(-INFINITY);
}

// The rule of the contract: the first of equal maxima stays, a NaN always wins.
template <class T>
PYSEQNET_DEVICE bool beats(T challenger, T champion) {
  const auto a = to_accumulator(challenger), b = to_accumulator(champion);
  return a > b || a != a;
}

// What a window reports if nothing beats -infinity: its first tap inside the image. Without one (the window
// jumps over the image) it is the first tap that is not before the image.
template <class Index>
PYSEQNET_DEVICE Index first_tap(Index start, Index dilation, Index taps) {
  Index t = 0;
  while (t + 1 < taps && start + t * dilation < 0) t++;
  return t;
}

}  // namespace pyseqnet
