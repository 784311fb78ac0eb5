// CTC on any CUDA device: every dtype, number of classes and length.
//
// read_logits    a warp: one step of one sequence, its largest value and the log of its sum of exponentials
// sum_paths      a block: one sequence; a thread: every 128th of its 2m + 1 states. Steps follow one another, with one
//                barrier each; a step's states are in shared memory, those of the step before beside them
// scan_back      a block: one sequence, the same from the end; writes the posterior of each state over its alpha
// write_gradient a block: one step of one sequence; a thread: every 128th class. A class's posterior is the sum over
//                the states that have it, found through a list of the states of each label, in the order of the states
// No atomics: every sum has one order. Lengths and labels are read by the kernels, so nothing waits for the device.
//
// Why a block a sequence: a step needs the step before, so time is T times the latency of a step, whatever the width.
// A step costs a log-sum of three terms (about 60 instructions), one read of x and a barrier, about 1 us; batches up
// to 132 sequences run side by side on an H200. Predicted there, before any measurement: T 200, B 16, C 30, S 40, f32:
// forward 0.2 ms, gradient 0.25 ms; 0.4 MB are moved. Where B is small and T long that latency is all there is.
#include "chain/chain_math.h"
#include "chain/ctc.h"
#include "common/cuda_numerics.cuh"
#include "common/launch.cuh"

namespace pyseqnet {
namespace {

constexpr int threads = 128;
constexpr int64_t widest_states = 4096;  // of which two rows fit what a block has without asking (48 KiB)

template <class T>
struct Call {
  using Acc = accumulator_t<T>;
  CtcProblem p;
  CtcTensors t;
  Acc *largest, *norm;  // (T, B) of the classes
  Acc* alpha;           // (B, T, 2S + 1), with a gradient
  Acc* total;           // (B) log of the sum of paths; NaN where there is none to speak of
  int32_t* next;        // (B, S) links between labels of one class: link_labels
};

template <class T>
struct Sequence {
  using Acc = accumulator_t<T>;
  const Call<T>& c;
  int64_t b, n, m, states;
  const int64_t* labels;
  PYSEQNET_DEVICE Sequence(const Call<T>& call, int64_t index) : c(call), b(index) {
    n = c.t.input_lengths[b], m = c.t.target_lengths[b], states = 2 * m + 1;
    labels = c.t.targets + c.t.target_offsets[b];
  }
  PYSEQNET_DEVICE const T* x(int64_t step) const {
    return static_cast<const T*>(c.t.x) + step * c.p.x_t + b * c.p.x_b;
  }
  PYSEQNET_DEVICE int64_t class_of(int64_t state) const { return state % 2 ? labels[state / 2] : c.p.blank; }
  PYSEQNET_DEVICE Acc y(int64_t step, int64_t k) const {
    const int64_t at = step * c.p.B + b;
    return c.p.from_logits ? load(x(step) + k) - c.largest[at] - c.norm[at] : load(x(step) + k);
  }
  PYSEQNET_DEVICE Acc* alpha(int64_t step) const { return c.alpha + (b * c.p.T + step) * (2 * c.p.S + 1); }
};

// largest and norm of each step; norm NaN where the step holds NaN or +infinity, or the softmax of nothing.
template <class T>
__global__ void __launch_bounds__(threads) read_logits(const Call<T> c) {
  using Acc = accumulator_t<T>;
  const int64_t row = int64_t(blockIdx.x) * (threads / 32) + threadIdx.x / 32;
  if (row >= c.p.T * c.p.B) return;  // a whole warp
  const int lane = int(threadIdx.x) % 32;
  const int64_t step = row / c.p.B, b = row % c.p.B;
  const Sequence<T> s(c, b);
  if (step >= s.n) return;  // a whole warp: never read
  Acc largest = Acc(-HUGE_VAL), sum = 0;
  int bad = 0;
  for (int64_t k = lane; k < c.p.C; k += 32) {
    const Acc v = load(s.x(step) + k);
    bad |= !(v < Acc(HUGE_VAL));
    largest = v > largest ? v : largest;
  }
  for (int distance = 16; distance > 0; distance /= 2) {
    const Acc other = __shfl_xor_sync(0xffffffffu, largest, distance);
    largest = other > largest ? other : largest;
    bad |= __shfl_xor_sync(0xffffffffu, bad, distance);
  }
  if (c.p.from_logits) {
    bad |= largest == Acc(-HUGE_VAL);
    for (int64_t k = lane; !bad && k < c.p.C; k += 32) sum += exp(load(s.x(step) + k) - largest);
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  }
  if (lane) return;
  c.largest[row] = largest;
  c.norm[row] = bad ? Acc(NAN) : c.p.from_logits ? Acc(log(sum)) : Acc(0);
}

// Whether some step of the sequence has a NaN norm; the same for all threads of the block.
template <class T>
PYSEQNET_DEVICE bool has_nan(const Call<T>& c, const Sequence<T>& s, int* found) {
  if (threadIdx.x == 0) *found = 0;
  __syncthreads();
  for (int64_t step = threadIdx.x; step < s.n; step += threads)
    if (c.norm[step * c.p.B + s.b] != c.norm[step * c.p.B + s.b]) atomicOr(found, 1);
  __syncthreads();
  return *found != 0;
}

// The log-sum of what arrives at a state from the step before, times its class.
template <class T>
PYSEQNET_DEVICE accumulator_t<T> advance(const Sequence<T>& s, const accumulator_t<T>* before, int64_t step,
                                         int64_t state) {
  using Acc = accumulator_t<T>;
  Acc from = step ? before[state] : state < 2 ? Acc(0) : Acc(-HUGE_VAL);
  if (step && state > 0) from = log_add(from, before[state - 1]);
  if (step && ctc_skips(s.labels, state)) from = log_add(from, before[state - 2]);
  return from + s.y(step, s.class_of(state));
}

template <class T>
__global__ void __launch_bounds__(threads) sum_paths(const Call<T> c) {
  using Acc = accumulator_t<T>;
  PYSEQNET_DYNAMIC_SHARED(Acc, rows);  // two rows of states
  PYSEQNET_SHARED(int, found, [1]);
  const int64_t width = 2 * c.p.S + 1;
  const Sequence<T> s(c, blockIdx.x);
  const bool valid = ctc_is_valid(c.p, c.t, s.b);
  const bool fits = valid && s.m <= s.n;
  const bool nan = fits && has_nan(c, s, found);
  const bool scan = fits && !nan && s.n > 0;
  for (int64_t step = 0; scan && step < s.n; step++) {
    Acc* now = rows + step % 2 * width;
    const Acc* before = rows + (step + 1) % 2 * width;
    for (int64_t state = threadIdx.x; state < s.states; state += threads) {
      now[state] = advance(s, before, step, state);
      if (c.alpha) s.alpha(step)[state] = now[state];
    }
    __syncthreads();
  }
  if (threadIdx.x) return;
  Acc total = Acc(0);
  if (scan) {
    const Acc* last = rows + (s.n + 1) % 2 * width;
    total = s.m ? log_add(last[2 * s.m], last[2 * s.m - 1]) : last[0];
  } else if (!valid || nan) {
    total = Acc(NAN);
  } else if (s.m > s.n) {
    total = Acc(-HUGE_VAL);
  }
  static_cast<Acc*>(c.t.loss)[s.b] = ctc_loss_of(c.p, Acc(0) - total);
  // What the gradient asks: an invalid sequence has none, a NaN has NaN.
  if (c.total) c.total[s.b] = valid ? total : Acc(-HUGE_VAL);
}

// The first label of a class holds the next of it, -1 if there is none; later ones hold -3 - next, which is less than
// -1: so the head of a list is told by its sign.
template <class T>
__global__ void __launch_bounds__(threads) link_labels(const Call<T> c) {
  const Sequence<T> s(c, blockIdx.x);
  if (!ctc_is_valid(c.p, c.t, s.b) || s.m > s.n) return;
  for (int64_t j = threadIdx.x; j < s.m; j += threads) {
    int32_t next = -1;
    bool is_first = true;
    for (int64_t k = 0; k < j && is_first; k++) is_first = s.labels[k] != s.labels[j];
    for (int64_t k = j + 1; k < s.m && next < 0; k++)
      if (s.labels[k] == s.labels[j]) next = int32_t(k);
    c.next[s.b * c.p.S + j] = is_first ? next : -3 - next;
  }
}

template <class T>
__global__ void __launch_bounds__(threads) scan_back(const Call<T> c) {
  using Acc = accumulator_t<T>;
  PYSEQNET_DYNAMIC_SHARED(Acc, rows);  // two rows of states: beta plus the class of its step
  const int64_t width = 2 * c.p.S + 1;
  const Sequence<T> s(c, blockIdx.x);
  const Acc total = c.total[s.b];
  if (!(total > Acc(-HUGE_VAL))) return;  // the whole block; s.n may be 0: nothing to do either
  for (int64_t step = s.n - 1; step >= 0; step--) {
    Acc* now = rows + step % 2 * width;
    const Acc* after = rows + (step + 1) % 2 * width;
    for (int64_t state = threadIdx.x; state < s.states; state += threads) {
      Acc beta;
      if (step == s.n - 1) {
        beta = state >= 2 * s.m - 1 ? Acc(0) : Acc(-HUGE_VAL);
      } else {
        beta = after[state];
        if (state + 1 < s.states) beta = log_add(beta, after[state + 1]);
        if (state + 2 < s.states && ctc_skips(s.labels, state + 2)) beta = log_add(beta, after[state + 2]);
      }
      now[state] = beta + s.y(step, s.class_of(state));
      Acc* alpha = s.alpha(step) + state;
      *alpha = exp(*alpha + beta - total);
    }
    __syncthreads();
  }
}

template <class T>
__global__ void __launch_bounds__(threads) write_gradient(const Call<T> c) {
  using Acc = accumulator_t<T>;
  PYSEQNET_SHARED(Acc, blanks, [threads]);
  const int64_t step = blockIdx.x / c.p.B, b = blockIdx.x % c.p.B;
  const Sequence<T> s(c, b);
  T* gx = static_cast<T*>(c.t.gx) + (step * c.p.B + b) * c.p.C;
  const Acc total = c.total[b];
  const bool real = step < s.n && total > Acc(-HUGE_VAL);
  const Acc outside = step < s.n && total != total ? Acc(NAN) : Acc(0);
  for (int64_t k = threadIdx.x; k < c.p.C; k += threads)
    store(gx + k, real ? Acc(exp(s.y(step, k))) : outside);
  if (!real) return;  // the whole block
  const Acc* posterior = s.alpha(step);
  Acc sum = 0;
  for (int64_t j = threadIdx.x; j <= s.m; j += threads) sum += posterior[2 * j];
  blanks[threadIdx.x] = sum;
  __syncthreads();
  for (int64_t j = threadIdx.x; j < s.m; j += threads) {
    int32_t next = c.next[b * c.p.S + j];
    if (next < -1) continue;  // an earlier one heads the list
    Acc of_class = posterior[2 * j + 1];
    while (next >= 0) {
      of_class += posterior[2 * next + 1];
      const int32_t link = c.next[b * c.p.S + next];
      next = -3 - link;
    }
    store(gx + s.labels[j], Acc(exp(s.y(step, s.labels[j]))) - of_class);
  }
  if (threadIdx.x) return;
  Acc of_blank = 0;
  for (int i = 0; i < threads; i++) of_blank += blanks[i];
  store(gx + c.p.blank, Acc(exp(s.y(step, c.p.blank))) - of_blank);
}

// ---------------------------------------------------------------- launch

template <class T>
Call<T> call_of(const CtcProblem& p, const CtcTensors& t, Carver& carver) {
  using Acc = accumulator_t<T>;
  Call<T> c{p, t, nullptr, nullptr, nullptr, nullptr, nullptr};
  c.largest = carver.take<Acc>(p.T * p.B), c.norm = carver.take<Acc>(p.T * p.B);
  if (!p.with_gradient) return c;
  c.alpha = carver.take<Acc>(p.B * p.T * (2 * p.S + 1));
  c.total = carver.take<Acc>(p.B);
  c.next = carver.take<int32_t>(p.B * p.S + 1);
  return c;
}

Refusal refuses(const CtcProblem& p) {
  if (2 * p.S + 1 > (p.dtype == DType::f64 ? widest_states / 2 : widest_states))
    return "targets of more than 2047 labels (1023 in float64) do not fit shared memory";
  if (p.T * p.B >= (int64_t(1) << 31)) return "T * B must be less than 2^31";
  return accepted;
}
int64_t workspace_bytes(const CtcProblem& p) {
  return dispatch_dtype(p.dtype, [&](auto tag) {
    Carver carver(nullptr);
    call_of<typename decltype(tag)::type>(p, {}, carver);
    return carver.used();
  });
}
int launch_ctc(const CtcProblem& p, const CtcTensors& t, void* workspace, void* stream) {
  if (p.B == 0) return launch_ok;
  return dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    Carver carver(static_cast<std::byte*>(workspace));
    const Call<T> c = call_of<T>(p, t, carver);
    const unsigned rows = unsigned(2 * (2 * p.S + 1) * int64_t(sizeof(accumulator_t<T>)));
    const unsigned warps = unsigned((p.T * p.B + threads / 32 - 1) / (threads / 32));
    int error = launch_ok;
    const auto then = [&](unsigned blocks, unsigned shared, auto kernel) {
      if (error == launch_ok && blocks)
        error = launch(
            {.grid = dim3(blocks), .block = dim3(threads), .dynamic_shared_bytes = shared, .stream = stream},
            kernel, c);
    };
    then(warps, 0, read_logits<T>);
    then(unsigned(p.B), rows, sum_paths<T>);
    if (!p.with_gradient) return error;
    then(unsigned(p.B), 0, link_labels<T>);
    then(unsigned(p.B), rows, scan_back<T>);
    then(unsigned(p.T * p.B), 0, write_gradient<T>);
    return error;
  });
}

}  // namespace

extern const CtcCudaKernel ctc_cuda;
const CtcCudaKernel ctc_cuda = {"generic", 80, 0, refuses, workspace_bytes, launch_ctc};

}  // namespace pyseqnet
