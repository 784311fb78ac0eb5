// Which sequences run together: the order of lengths, how items are dealt to threads, batches in lockstep.
#pragma once
#include "common/simd.h"
#include "recurrent/recurrent.h"

namespace pyseqnet {
inline namespace PYSEQNET_ISA {
namespace recurrent {

// Sequences in order of length, longest first: at step s the first active(s) of them run, in both directions,
// since each direction counts from its own end. Made once a call.
struct Schedule {
  int64_t* order;  // B: rank -> sequence
  int64_t* seat;   // B: rank -> item within a direction
  int64_t* start;  // T + 1: rows of all steps before; start[T] is their number
  int64_t *cursor, *hand, *spare;

  static Schedule carve(Carver& shared, const RecurrentProblem& p) {
    return {shared.take<int64_t>(p.B),     shared.take<int64_t>(p.B), shared.take<int64_t>(p.T + 1),
            shared.take<int64_t>(p.T + 1), shared.take<int64_t>(p.B), shared.take<int64_t>(p.B)};
  }

  void make(const RecurrentProblem& p) const {
    for (int64_t s = 0; s <= p.T; s++) cursor[s] = 0;
    for (int64_t b = 0; b < p.B; b++) cursor[p.length(b)]++;
    // cursor[l] becomes the number of sequences longer than l: the rank of the first of length l.
    for (int64_t l = p.T, longer = 0; l >= 0; l--) {
      const int64_t here = cursor[l];
      cursor[l] = longer;
      longer += here;
    }
    start[0] = 0;
    for (int64_t s = 0; s < p.T; s++) start[s + 1] = start[s] + cursor[s];
    for (int64_t b = 0; b < p.B; b++) order[cursor[p.length(b)]++] = b;
    for (int64_t r = 0; r < p.B; r++) hand[r] = r;
    if (p.lengths) deal(hand, p.B);
    for (int64_t k = 0; k < p.B; k++) seat[hand[k]] = k;
  }
  int64_t active(int64_t s) const { return start[s + 1] - start[s]; }

 private:
  // Reorders sequences so that any half, quarter, ... of the items holds long and short ones alike: of each
  // four in a row the outer two go to one half, the inner two to the other; the larger half comes first.
  void deal(int64_t* ranks, int64_t n) const {
    if (n <= 2) return;
    const bool outer_first = n % 4 != 3;
    int64_t first = 0, second = 0;
    for (int64_t k = 0; k < n; k++) {
      const bool outer = k % 4 == 0 || k % 4 == 3;
      if (outer == outer_first)
        ranks[first++] = ranks[k];
      else
        spare[second++] = ranks[k];
    }
    for (int64_t k = 0; k < second; k++) ranks[first + k] = spare[k];
    deal(ranks, first);
    deal(ranks + first, second);
  }
};

// Sequences that run in lockstep, longest first. No result depends on which they are: each row of a product
// is summed in the same order whatever rows lie beside it.
constexpr int64_t largest_batch = 128;
struct Batch {
  int64_t d = 0, n = 0;
  int64_t *rank, *sequence, *length;

  static Batch carve(Carver& scratch, const RecurrentProblem& p) {
    const int64_t most = batch_bound(p);
    Batch batch;
    batch.rank = scratch.take<int64_t>(most);
    batch.sequence = scratch.take<int64_t>(most);
    batch.length = scratch.take<int64_t>(most);
    return batch;
  }
  static int64_t batch_bound(const RecurrentProblem& p) { return p.B < largest_batch ? p.B : largest_batch; }
  int64_t steps() const { return n ? length[0] : 0; }
  // How many run at step s, given how many ran at the step before or after.
  int64_t active(int64_t s, int64_t guess) const {
    while (guess > 0 && length[guess - 1] <= s) guess--;
    while (guess < n && length[guess] > s) guess++;
    return guess;
  }
};

// f(batch) for the sequences of items [begin, end); an item is direction * B + seat.
template <class F>
PYSEQNET_INLINE void for_batches(const RecurrentProblem& p, const Schedule& schedule, int64_t begin,
                                 int64_t end, Batch batch, F f) {
  const int64_t most = Batch::batch_bound(p);
  for (int64_t d = begin / (p.B ? p.B : 1); d < p.D && d * p.B < end; d++) {
    batch.d = d, batch.n = 0;
    for (int64_t r = 0; r < p.B; r++) {
      const int64_t item = d * p.B + schedule.seat[r];
      if (item >= begin && item < end) {
        const int64_t b = schedule.order[r];
        batch.rank[batch.n] = r, batch.sequence[batch.n] = b, batch.length[batch.n] = p.length(b);
        batch.n++;
      }
      if (batch.n == most || (r + 1 == p.B && batch.n > 0)) {
        f(batch);
        batch.n = 0;
      }
    }
  }
}

// Sequences to a thread: fewer than four share too little of each weight that is read.
inline int64_t sequence_grain(const RecurrentProblem& p) {
  constexpr int64_t fewest = 4;
  constexpr double products_worth_a_thread = 1e6;  // about 20 microseconds
  const double products = double(p.T) * double(p.gates()) * double(p.H) * double(p.I + p.R()) + 1.0;
  const int64_t worth = int64_t(products_worth_a_thread / products) + 1;
  const int64_t least = p.D > 1 && p.B < fewest ? p.B : fewest;
  return worth > least ? worth : least;
}

}  // namespace recurrent
}  // namespace PYSEQNET_ISA
}  // namespace pyseqnet
