// Division by a number that is known at launch only. A 32-bit division costs about 25 instructions on a GPU;
// with a multiplier worked out on the host it is a multiply, an add and a shift (Granlund & Montgomery,
// 1994).
//
//   FastDivider<int32_t> by_width(W);  // host, passed to the kernel by value
//   row = by_width.divide(pixel);      // device: pixel / W, for 0 <= pixel < 2^31
#pragma once
#include "common/launch.cuh"

namespace pyseqnet {

// Wide indices are for problems so large that nobody waits for a division.
template <class Index>
class FastDivider {
 public:
  FastDivider() = default;
  explicit FastDivider(Index divisor) : divisor_(divisor) {}
  PYSEQNET_HOST_DEVICE Index divide(Index n) const { return n / divisor_; }

 private:
  Index divisor_ = 1;
};

template <>
class FastDivider<int32_t> {
 public:
  FastDivider() = default;
  // With 2^shift >= divisor: n / divisor = floor((n + floor(n * multiplier / 2^32)) / 2^shift). The sum stays
  // below 2^32 because n is below 2^31.
  explicit FastDivider(int32_t divisor) {
    while ((int64_t{1} << shift_) < divisor) shift_++;
    multiplier_ = uint32_t(
        ((uint64_t{1} << 32) * ((uint64_t{1} << shift_) - uint64_t(divisor))) / uint64_t(divisor) + 1);
  }
  PYSEQNET_DEVICE int32_t divide(int32_t n) const {
    return int32_t((__umulhi(uint32_t(n), multiplier_) + uint32_t(n)) >> shift_);
  }

 private:
  uint32_t multiplier_ = 1;
  int32_t shift_ = 0;
};

}  // namespace pyseqnet
