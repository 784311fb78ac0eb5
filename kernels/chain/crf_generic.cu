// The linear-chain CRF on any CUDA device: every dtype and number of tags.
//
// sum_sequences  a block: one sequence; a thread: every 128th tag. A step is C log-sums of C terms; the states of the
//                step before lie in shared memory, transitions are read side by side from the cache, one barrier a step
// scan_back      a block: one sequence, the same from the end over transposed transitions: the marginals
// sum_pairs      a thread: one pair of tags, over the steps of a share of the sequences
// sum_shares     a thread: one pair, over the shares; and the gradients of start and end, over the sequences
// best_sequences a block: one sequence; Viterbi, with the nbest largest values a tag instead of their log-sum
// No atomics: every sum has one order. Lengths and tags are read by the kernels, so nothing waits for the device.
//
// Why a block a sequence: a step needs the step before. A step takes 2 C reads of shared memory and of transitions and C
// exponentials a thread and tag, C / 128 tags a thread; sequences run side by side, 132 and more on an H200.
// Predicted there, before any measurement: B 16, T 100, C 120, f32: a step 240 dependent pairs of loads and 120
// exponentials, about 3 us; log-likelihood 0.3 ms, gradient 0.9 ms (23 million exponentials for the pairs, 0.05 ms of
// it). B 32, T 50, C 20: 0.03 and 0.1 ms. 7 MB are moved at most: latency, not memory, bounds all of it.
#include <type_traits>

#include "chain/chain_math.h"
#include "chain/crf.h"
#include "common/cuda_numerics.cuh"
#include "common/launch.cuh"

namespace pyseqnet {
namespace {

constexpr int threads = 128;
constexpr int64_t most_shares = 32;

template <class T>
struct Call {
  using Acc = accumulator_t<T>;
  CrfProblem p;
  CrfTensors t;
  const Acc *start, *end, *transitions, *g;
  Acc* transposed;     // (C, C)
  Acc *alpha, *ahead;  // (B, T, C) forward states; emissions plus backward states
  Acc* logz;           // (B)
  Acc* shares;         // (share, C, C)
  int64_t share;       // number of shares
  int32_t* from;       // (B, T, C, nbest)

  PYSEQNET_DEVICE Acc e(int64_t b, int64_t step, int64_t j) const {
    return load(static_cast<const T*>(t.e) + b * p.e_b + step * p.e_t + j);
  }
};

// The score of a sequence's tags, in thread 0. `sums`: one number a thread.
template <class T>
PYSEQNET_DEVICE accumulator_t<T> score_of_tags(const Call<T>& c, int64_t b, int64_t n,
                                               accumulator_t<T>* sums) {
  using Acc = accumulator_t<T>;
  const int64_t* y = c.t.tags + b * c.p.T;
  Acc sum = 0;
  for (int64_t step = threadIdx.x; step < n; step += threads) {
    sum += c.e(b, step, y[step]);
    if (step) sum += c.transitions[y[step - 1] * c.p.C + y[step]];
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x) return Acc(0);
  sum = c.start[y[0]] + c.end[y[n - 1]];
  for (int i = 0; i < threads; i++) sum += sums[i];
  return sum;
}

// Blocks that a multiprocessor's registers must hold, 0: as ptxas likes. For double on sm_120 it likes to spill.
template <class T>
constexpr int sum_blocks = std::is_same_v<T, double> ? 6 : 0;

template <class T>
__global__ void __launch_bounds__(threads, sum_blocks<T>) sum_sequences(const Call<T> c) {
  using Acc = accumulator_t<T>;
  PYSEQNET_DYNAMIC_SHARED(Acc, rows);  // two rows of tags
  PYSEQNET_SHARED(Acc, sums, [threads]);
  const int64_t b = blockIdx.x, C = c.p.C;
  const bool valid = crf_is_valid(c.p, c.t, b);
  const int64_t n = valid ? c.t.lengths[b] : 0;
  for (int64_t step = 0; step < n; step++) {
    Acc* now = rows + step % 2 * C;
    const Acc* before = rows + (step + 1) % 2 * C;
    for (int64_t j = threadIdx.x; j < C; j += threads) {
      const Acc arrived =
          step ? log_sum<Acc>(C, [&](int64_t i) { return before[i] + c.transitions[i * C + j]; })
               : c.start[j];
      now[j] = arrived + c.e(b, step, j);
      if (c.alpha) c.alpha[(b * c.p.T + step) * C + j] = now[j];
    }
    __syncthreads();
  }
  const Acc score = valid && c.t.llh && c.t.tags ? score_of_tags(c, b, n, sums) : Acc(0);
  if (threadIdx.x) return;
  Acc logz = Acc(NAN);
  if (valid) {
    const Acc* last = rows + (n + 1) % 2 * C;
    logz = log_sum<Acc>(C, [&](int64_t j) { return last[j] + c.end[j]; });
  }
  if (c.logz) c.logz[b] = logz;
  if (c.t.llh) static_cast<Acc*>(c.t.llh)[b] = score - logz;
}

template <class T>
__global__ void __launch_bounds__(threads) transpose_transitions(const Call<T> c) {
  const int64_t x = int64_t(blockIdx.x) * threads + threadIdx.x;
  if (x < c.p.C * c.p.C) c.transposed[x % c.p.C * c.p.C + x / c.p.C] = c.transitions[x];
}

template <class T>
__global__ void __launch_bounds__(threads, 8) scan_back(const Call<T> c) {
  using Acc = accumulator_t<T>;
  PYSEQNET_DYNAMIC_SHARED(Acc, rows);  // two rows of tags: emissions plus beta
  const int64_t b = blockIdx.x, C = c.p.C;
  T* ge = static_cast<T*>(c.t.ge) + b * c.p.T * C;
  const bool valid = crf_is_valid(c.p, c.t, b);
  const int64_t n = valid ? c.t.lengths[b] : 0;
  for (int64_t x = n * C + threadIdx.x; x < c.p.T * C; x += threads) store(ge + x, Acc(0));
  const Acc logz = c.logz[b], g = c.g[b];
  const int64_t* y = c.t.tags ? c.t.tags + b * c.p.T : nullptr;
  for (int64_t step = n - 1; step >= 0; step--) {
    Acc* now = rows + step % 2 * C;
    const Acc* after = rows + (step + 1) % 2 * C;
    for (int64_t i = threadIdx.x; i < C; i += threads) {
      const Acc beta = step < n - 1 ? log_sum<Acc>(
                                          C, [&](int64_t j) { return c.transposed[j * C + i] + after[j]; })
                                    : c.end[i];
      const int64_t at = (b * c.p.T + step) * C + i;
      now[i] = beta + c.e(b, step, i);
      c.ahead[at] = now[i];
      const Acc marginal = exp(c.alpha[at] + beta - logz);
      store(ge + step * C + i, g * ((y && y[step] == i ? Acc(1) : Acc(0)) - marginal));
    }
    __syncthreads();
  }
}

template <class T>
__global__ void __launch_bounds__(threads) sum_pairs(const Call<T> c) {
  using Acc = accumulator_t<T>;
  const int64_t C = c.p.C, pair = int64_t(blockIdx.x) * threads + threadIdx.x, share = blockIdx.y;
  if (pair >= C * C) return;
  const int64_t i = pair / C, j = pair % C;
  const Acc a = c.transitions[pair];
  Acc sum = 0;
  for (int64_t b = share; b < c.p.B; b += c.share) {
    if (!crf_is_valid(c.p, c.t, b)) continue;
    const int64_t n = c.t.lengths[b];
    const int64_t* y = c.t.tags ? c.t.tags + b * c.p.T : nullptr;
    Acc of_sequence = 0;
    for (int64_t step = 1; step < n; step++) {
      const Acc* alpha = c.alpha + (b * c.p.T + step - 1) * C;
      of_sequence -= exp(alpha[i] + a + c.ahead[(b * c.p.T + step) * C + j] - c.logz[b]);
      if (y && y[step - 1] == i && y[step] == j) of_sequence += Acc(1);
    }
    sum += c.g[b] * of_sequence;
  }
  c.shares[share * C * C + pair] = sum;
}

// The first C threads also sum start and end.
template <class T>
__global__ void __launch_bounds__(threads) sum_shares(const Call<T> c) {
  using Acc = accumulator_t<T>;
  const int64_t C = c.p.C, x = int64_t(blockIdx.x) * threads + threadIdx.x;
  if (x >= C * C) return;
  Acc sum = 0;
  for (int64_t share = 0; share < c.share; share++) sum += c.shares[share * C * C + x];
  static_cast<Acc*>(c.t.gtransitions)[x] = sum;
  if (x >= C) return;
  Acc start = 0, end = 0;
  for (int64_t b = 0; b < c.p.B; b++) {
    if (!crf_is_valid(c.p, c.t, b)) continue;
    const int64_t first = b * c.p.T * C, last = (b * c.p.T + c.t.lengths[b] - 1) * C;
    const int64_t* y = c.t.tags ? c.t.tags + b * c.p.T : nullptr;
    const bool starts = y && y[0] == x, ends = y && y[c.t.lengths[b] - 1] == x;
    start += c.g[b] * (Acc(starts) - exp(c.start[x] + c.ahead[first + x] - c.logz[b]));
    end += c.g[b] * (Acc(ends) - exp(c.alpha[last + x] + c.end[x] - c.logz[b]));
  }
  static_cast<Acc*>(c.t.gstart)[x] = start;
  static_cast<Acc*>(c.t.gend)[x] = end;
}

// ---------------------------------------------------------------- the best sequences

template <class T>
__global__ void __launch_bounds__(threads, 8) best_sequences(const Call<T> c) {
  using Acc = accumulator_t<T>;
  PYSEQNET_DYNAMIC_SHARED(Acc, rows);  // two rows of C lists, and one list
  PYSEQNET_SHARED(int, bad, [1]);
  const int64_t b = blockIdx.x;
  const int C = int(c.p.C), k = int(c.p.nbest);  // their product fits 32 bits
  int64_t* paths = c.t.paths + b * k * c.p.T;
  Acc* scores = static_cast<Acc*>(c.t.scores) + b * k;
  const int64_t n = crf_is_valid(c.p, c.t, b) ? c.t.lengths[b] : 0;
  int32_t* from = c.from + b * (c.p.T * C + 1) * k;
  if (threadIdx.x == 0) *bad = n == 0;
  __syncthreads();
  for (int64_t step = 0; step < n; step++) {
    Acc* now = rows + step % 2 * C * k;
    const Acc* before = rows + (step + 1) % 2 * C * k;
    for (int j = int(threadIdx.x); j < C; j += threads) {
      const Best<Acc> best{now + j * k, from + (step * C + j) * k, k};
      const Acc e = c.e(b, step, j);
      bool nan = !(e < Acc(HUGE_VAL)) || !(c.end[j] < Acc(HUGE_VAL));
      best.clear();
      if (step == 0) best.offer(c.start[j], 0), nan |= !(c.start[j] < Acc(HUGE_VAL));
      for (int i = 0; step && i < C; i++) {
        const Acc a = c.transitions[int64_t(i) * C + j];
        nan |= !(a < Acc(HUGE_VAL));
        for (int r = 0; r < k; r++) best.offer(before[i * k + r] + a, i * k + r);
      }
      for (int r = 0; r < k; r++) best.value[r] += e;
      if (nan) atomicOr(bad, 1);
    }
    __syncthreads();
  }
  const Best<Acc> last{rows + 2 * C * k, from + c.p.T * C * k, k};
  if (threadIdx.x == 0) {
    last.clear();
    for (int x = 0; !*bad && x < C * k; x++) last.offer(rows[(n + 1) % 2 * C * k + x] + c.end[x / k], x);
  }
  __syncthreads();
  for (int r = int(threadIdx.x); r < k; r += threads) {
    scores[r] = *bad ? Acc(NAN) : last.value[r];
    int at = last.from[r];
    for (int64_t step = c.p.T - 1; step >= 0; step--) {
      const bool real = step < n && at >= 0;
      paths[r * c.p.T + step] = real ? at / k : -1;
      if (real) at = from[step * C * k + at];
    }
  }
}

// ---------------------------------------------------------------- launch

template <class T>
Call<T> call_of(const CrfProblem& p, const CrfTensors& t, CrfPass pass, Carver& carver) {
  using Acc = accumulator_t<T>;
  Call<T> c = {};
  c.p = p, c.t = t;
  c.start = static_cast<const Acc*>(t.start), c.end = static_cast<const Acc*>(t.end);
  c.transitions = static_cast<const Acc*>(t.transitions), c.g = static_cast<const Acc*>(t.g);
  if (pass == CrfPass::viterbi) c.from = carver.take<int32_t>(p.B * (p.T * p.C + 1) * p.nbest);
  if (pass != CrfPass::gradient) return c;
  c.t.llh = nullptr;
  c.share = p.B < most_shares ? p.B : most_shares;
  c.transposed = carver.take<Acc>(p.C * p.C);
  c.alpha = carver.take<Acc>(p.B * p.T * p.C), c.ahead = carver.take<Acc>(p.B * p.T * p.C);
  c.logz = carver.take<Acc>(p.B);
  c.shares = carver.take<Acc>(c.share * p.C * p.C);
  return c;
}
int64_t shared_bytes(const CrfProblem& p, int64_t lists) {
  return (2 * p.C + 1) * lists * (p.dtype == DType::f64 ? 8 : 4);
}
constexpr int64_t shared_limit = 40 * 1024;

Refusal refuses(const CrfProblem& p) {
  if (shared_bytes(p, 1) > shared_limit)
    return "two rows of tags do not fit shared memory (5000 tags, 2500 in float64)";
  if (p.B >= (int64_t(1) << 31)) return "the batch must be less than 2^31";
  return accepted;
}
Refusal refuses_viterbi(const CrfProblem& p) {
  if (shared_bytes(p, p.nbest) > shared_limit)
    return "two rows of nbest values a tag do not fit shared memory";
  if (p.C * p.nbest >= (int64_t(1) << 31)) return "tags times nbest are counted in 32 bits";
  return refuses(p);
}

template <CrfPass pass>
int64_t workspace_bytes(const CrfProblem& p) {
  return dispatch_dtype(p.dtype, [&](auto tag) {
    Carver carver(nullptr);
    call_of<typename decltype(tag)::type>(p, {}, pass, carver);
    return carver.used();
  });
}

template <CrfPass pass>
int launch_pass(const CrfProblem& p, const CrfTensors& t, void* workspace, void* stream) {
  return dispatch_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    Carver carver(static_cast<std::byte*>(workspace));
    const Call<T> c = call_of<T>(p, t, pass, carver);
    const unsigned rows = unsigned(shared_bytes(p, pass == CrfPass::viterbi ? p.nbest : 1));
    const unsigned pairs = unsigned((p.C * p.C + threads - 1) / threads);
    int error = launch_ok;
    const auto then = [&](dim3 blocks, unsigned shared, auto kernel) {
      if (error == launch_ok && blocks.x && blocks.y)
        error =
            launch({.grid = blocks, .block = dim3(threads), .dynamic_shared_bytes = shared, .stream = stream},
                   kernel, c);
    };
    if constexpr (pass == CrfPass::viterbi) {
      then(dim3(unsigned(p.B)), rows, best_sequences<T>);
    } else {
      then(dim3(unsigned(p.B)), rows, sum_sequences<T>);
    }
    if constexpr (pass == CrfPass::gradient) {
      then(dim3(pairs), 0, transpose_transitions<T>);
      then(dim3(unsigned(p.B)), rows, scan_back<T>);
      then(dim3(pairs, unsigned(c.share)), 0, sum_pairs<T>);
      then(dim3(pairs), 0, sum_shares<T>);
    }
    return error;
  });
}

}  // namespace

extern const CrfCudaKernel crf_log_likelihood_cuda, crf_gradient_cuda, crf_viterbi_cuda;
const CrfCudaKernel crf_log_likelihood_cuda = {"generic",
                                               80,
                                               0,
                                               refuses,
                                               workspace_bytes<CrfPass::log_likelihood>,
                                               launch_pass<CrfPass::log_likelihood>};
const CrfCudaKernel crf_gradient_cuda = {
    "generic", 80, 0, refuses, workspace_bytes<CrfPass::gradient>, launch_pass<CrfPass::gradient>};
const CrfCudaKernel crf_viterbi_cuda = {
    "generic", 80, 0, refuses_viterbi, workspace_bytes<CrfPass::viterbi>, launch_pass<CrfPass::viterbi>};

}  // namespace pyseqnet
