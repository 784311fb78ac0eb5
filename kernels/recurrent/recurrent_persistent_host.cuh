// What the tiers of the persistent kernel share on the host: how a team is planned, the memory of a call, and
// the launches around the persistent one.
//
// A tier says how a team's blocks meet:
//   template <class T> Exchange                       see recurrent_persistent.cuh
//   static Refusal plan(p, pass, Team&)               why not, or the team
//   static int64_t exchange_bytes(team, p)            of global memory
//   static int launch(kernel, team, ...)              all teams, both directions
#pragma once
#include <algorithm>

#include "common/residency.cuh"
#include "recurrent/recurrent_over_time.h"
#include "recurrent/recurrent_persistent_tasks.cuh"

namespace pyseqnet {

// Deals out a workspace; with a null base it only counts.
class PersistentWorkspace {
 public:
  explicit PersistentWorkspace(void* base) : base_(reinterpret_cast<uintptr_t>(base)) {}
  template <class T>
  T* take(int64_t count) {
    constexpr int64_t alignment = 256;
    const int64_t begin = bytes_;
    bytes_ += (count * int64_t(sizeof(T)) + alignment - 1) / alignment * alignment;
    return count > 0 ? reinterpret_cast<T*>(base_ + uintptr_t(begin)) : nullptr;
  }
  int64_t bytes() const { return bytes_; }

 private:
  uintptr_t base_;
  int64_t bytes_ = 0;
};

// Numbers of a cell that plans are made from.
struct PersistentShape {
  int row_gates, source_gates, halves, weight_tiles;
  int group_units() const { return 8 * halves; }
  int register_pairs() const { return weight_registers / (8 * weight_tiles); }
};
inline PersistentShape shape_of(const RecurrentProblem& p, RecurrentPass pass) {
  const int gates = int(p.gates());
  const bool forward = pass == RecurrentPass::forward;
  PersistentShape shape = {forward ? gates : 1, forward ? 1 : gates, forward && gates > 1 ? 1 : 2, 0};
  shape.weight_tiles = (shape.row_gates * shape.halves + 1) / 2;
  return shape;
}

constexpr int round_up(int n, int to) { return (n + to - 1) / to * to; }

enum class Sources { doubled, staged };  // both parities in shared memory, or what is staged there

// Fills in a team of `blocks` that runs `sequences` at once, if its weights and sources fit.
inline bool plan_team(Team& team, const PersistentShape& shape, int64_t H, int blocks, int sequences,
                      Sources in, const DeviceLimits& device) {
  team.blocks = blocks;
  team.units = round_up(int(ceil_divide(H, blocks)), shape.group_units());
  team.groups = team.units / shape.group_units();
  if (team.groups > persistent_warps) return false;
  team.width = shape.source_gates * team.units;
  const int pairs = int(ceil_divide(int64_t(blocks) * team.width, pair_depth));
  // As many slices as there are warps for, of two pairs at least: fewer steps of the sum wait for each other.
  team.slices = std::min(persistent_warps / team.groups, std::max(pairs / 2, 1));
  team.pairs = int(ceil_divide(pairs, team.slices));
  team.slices = int(ceil_divide(pairs, team.pairs));
  team.shared_pairs = std::max(team.pairs - shape.register_pairs(), 0);
  // An odd multiple of 64 bytes: two sources are read at once, from all banks.
  team.stride = (team.slices * team.pairs | 1) * pair_depth;
  team.sequences = sequences;

  const int64_t element = 2, weights = int64_t(team.warps()) * team.shared_pairs * shape.weight_tiles * 1024;
  const int64_t own = in == Sources::staged ? int64_t(sequences) * team.width * element : 0;
  const int64_t sums = team.slices > 1 ? int64_t(2) * team.warps() * shape.weight_tiles * 512 : 0;
  const int64_t states = int64_t(team.tiles()) * team.groups * 2 * shape.halves * 32 * 4;
  const int64_t seats = int64_t(sequences) * int64_t(sizeof(Seat)) + int64_t(team.tiles()) * 4;
  const int64_t of_source = team.stride * element;
  const int64_t left = device.shared_bytes - (weights + own + sums + states + seats);
  if (in == Sources::staged) {
    team.staged = std::min<int64_t>(left / (of_source * tile_sequences) * tile_sequences, sequences);
    if (team.staged < tile_sequences) return false;
  } else {
    team.staged = 2 * sequences;
    if (team.staged * of_source > left) return false;
  }
  team.sources = unsigned(weights);
  team.own = team.sources + unsigned(team.staged * of_source);
  team.sums = team.own + unsigned(own);
  team.states = team.sums + unsigned(sums);
  team.seats = team.states + unsigned(states);
  team.bytes = team.seats + unsigned(seats);
  return true;
}

// What a way for a team's blocks to meet costs, in cycles: of each step, and of each byte of a source that a
// block takes in.
struct ExchangeCost {
  double step, byte;
};

// Cycles of a step, counted: mma (8 on one of four tensor cores) or the shared memory that feeds them (128
// bytes a cycle), whichever is more; the sums of slices; the cell; the exchange.
inline double cycles_of_step(const Team& team, const PersistentShape& shape, const ExchangeCost& exchange) {
  constexpr double mma = 8.0 / 4, shared_byte = 1.0 / 128, cell = 300;
  const double pairs = double(team.warps()) * team.pairs;
  const double tensor = pairs * shape.weight_tiles * 2 * mma;
  const double fragments =
      shared_byte * (pairs * 512 + double(team.warps()) * team.shared_pairs * shape.weight_tiles * 1024);
  const double sums = team.slices > 1 ? shared_byte * team.warps() * shape.weight_tiles * 1024 : 0;
  const double taken = double(team.sequences) * team.blocks * team.width * 2;
  return exchange.step + exchange.byte * taken + team.tiles() * (std::max(tensor, fragments) + sums + cell);
}

// The cheapest team of at most `most_blocks` blocks, by that count, times the rounds in which the device
// takes all teams. False where none fits. With `only_powers`, of 1, 2, 4, ... blocks.
inline bool choose_team(Team& best, const RecurrentProblem& p, const PersistentShape& shape,
                        int fewest_blocks, int most_blocks, bool only_powers, Sources in,
                        const ExchangeCost& exchange, const DeviceLimits& device, int64_t multiprocessors) {
  double cheapest = 0;
  int tried = 0;
  for (int groups = persistent_warps; groups >= 1; groups--) {
    int blocks = int(ceil_divide(p.H, int64_t(groups) * shape.group_units()));
    if (only_powers)
      while (blocks & (blocks - 1)) blocks++;
    blocks = std::max(blocks, fewest_blocks);
    if (blocks == tried || blocks > most_blocks || blocks > multiprocessors) continue;
    tried = blocks;
    for (int sequences : {8, 16, 24, 32, 48, 64, 96, 128}) {
      Team team;
      if (sequences > 8 && sequences >= p.B + tile_sequences) break;
      if (!plan_team(team, shape, p.H, blocks, sequences, in, device)) break;
      team.teams = int(ceil_divide(p.B, sequences));
      const int64_t at_once = std::max<int64_t>(multiprocessors / blocks, 1);
      const double cycles = double(std::max<int64_t>(ceil_divide(team.teams * p.D, at_once), 1)) *
                            cycles_of_step(team, shape, exchange);
      if (cheapest == 0 || cycles < cheapest) cheapest = cycles, best = team;
    }
  }
  return cheapest > 0;
}

// What no tier takes.
inline Refusal refuses_persistent(const RecurrentProblem& p) {
  if (p.dtype != DType::bf16 && p.dtype != DType::f16) return "not a 16-bit dtype";
  if (p.P) return "a projection";
  if (p.has_options() || !has_kernels_of_its_own(p.cell)) return "only the plain cells are persistent";
  if ((p.T + 1) * p.B >= int64_t(1) << 31) return "2^31 or more rows";
  if (p.H >= 1 << 16) return "more than 65535 hidden units";
  // Without a reserve the input's part of all steps needs memory of its own.
  constexpr int64_t most_sums_bytes = int64_t(2) << 30;
  const bool in_reserve = p.reserve && p.saved();
  if (!in_reserve && p.D * p.rows() * std::max<int64_t>(p.saved(), 1) * p.H * 4 > most_sums_bytes)
    return "no reserve, and the input's part would take more than 2 GiB";
  return accepted;
}

// ---------------------------------------------------------------- order of sequences
namespace {  // each source compiles its own

// Longest first, equal ones as they come. Each thread counts those that come before its own.
constexpr int order_threads = 128;
constexpr int64_t most_ordered = 4096;  // more of them would take longer than they save

__global__ void __launch_bounds__(order_threads) order_sequences(const Sequences q, int* __restrict__ order) {
  const int64_t b = int64_t(blockIdx.x) * order_threads + threadIdx.x;
  if (b >= q.B) return;
  const int64_t length = q.length(b);
  int rank = 0;
  for (int64_t other = 0; other < q.B; other++) {
    const int64_t l = q.length(other);
    rank += l > length || (l == length && other < b);
  }
  order[rank] = int(b);
}

}  // namespace

inline bool is_ordered(const RecurrentProblem& p) { return p.lengths && !p.packed() && p.B <= most_ordered; }

// ---------------------------------------------------------------- memory of a call
inline int64_t rows_that_exist(const RecurrentProblem& p) {
  if (!p.lengths || p.packed()) return p.rows();
  int64_t rows = 0;
  for (int64_t b = 0; b < p.B; b++) rows += p.lengths[b];
  return rows;
}

struct PersistentMemory {
  PersistentWorkspace memory;
  RowLists rows = {};
  int* order;
  void* exchange;
  unsigned* counters;
  float *sums = nullptr, *partial = nullptr;
  uint16_t* slot_gradients = nullptr;
  int64_t bytes;

  PersistentMemory(const RecurrentProblem& p, RecurrentPass pass, const Team& team, int64_t exchange_bytes,
                   void* base)
      : memory(base) {
    rows.row = memory.take<int64_t>(p.rows());
    rows.x = memory.take<int64_t>(p.rows());
    order = memory.take<int>(is_ordered(p) ? p.B : 0);
    exchange = memory.take<char>(exchange_bytes);
    counters = memory.take<unsigned>(team.teams * p.D);
    rows.arrived = counters, rows.counters = team.teams * p.D;
    const int64_t slots = p.D * p.rows() * std::max<int64_t>(p.saved(), 1) * p.H;
    if (pass == RecurrentPass::forward) {
      sums = memory.take<float>(p.reserve && p.saved() ? 0 : slots);
    } else {
      rows.gx = memory.take<int64_t>(p.rows());
      for (int64_t d = 0; d < p.D; d++) rows.before[d] = memory.take<int64_t>(p.rows());
      slot_gradients = memory.take<uint16_t>(slots);
      partial = memory.take<float>(weight_gradient_partials(p, rows_that_exist(p)));
    }
    bytes = memory.bytes();
  }
  TimeRows time_rows(const RecurrentProblem& p) const {
    return {rows.row, rows.x, rows.gx, {rows.before[0], rows.before[1]}, rows_that_exist(p)};
  }
};

// ---------------------------------------------------------------- launches
class PersistentLaunches {
 public:
  template <class F>
  void operator()(F&& f) {
    if (!error_) error_ = f();
  }
  int error() const { return error_; }

 private:
  int error_ = launch_ok;
};

template <class T>
void describe_layer(PersistentLayer<T>& layer, const RecurrentProblem& p, const RecurrentTensors& t,
                    const int* order) {
  layer.sequences = sequences_of(p, t), layer.order = order;
  for (int64_t d = 0; d < p.D; d++) layer.weights[d] = static_cast<const T*>(t.weights[d].w_hh);
  layer.H = int(p.H), layer.relu = p.cell == RecurrentCell::rnn_relu;
  layer.h0 = static_cast<const T*>(t.h0), layer.c0 = static_cast<const T*>(t.c0);
  layer.y_t = p.y_t, layer.y_b = p.y_b;
}

inline int launch_order(const RecurrentProblem& p, const Sequences& q, int* order, void* stream) {
  if (!order) return launch_ok;
  return launch(
      {.grid = grid_of(ceil_divide(p.B, order_threads)), .block = dim3(order_threads), .stream = stream},
      order_sequences, q, order);
}

template <class Tier, class T, class Unit>
int launch_persistent_forward(const RecurrentProblem& p, const RecurrentTensors& t, const Team& team,
                              void* workspace, void* stream) {
  const PersistentMemory memory(p, RecurrentPass::forward, team, Tier::exchange_bytes(team, p), workspace);
  PersistentForward<T, Unit> task = {};
  describe_layer(task, p, t, memory.order);
  const Sequences& q = task.sequences;
  float* const sums = memory.sums ? memory.sums : static_cast<float*>(t.gates);
  PersistentLaunches run;
  run([&] {
    const RowStrides strides = {p.x_t, p.x_b, 0, 0, 0, 0, p.D, p.H};
    return launch_list_rows(q, memory.rows, strides, stream);
  });
  run([&] { return launch_order(p, q, memory.order, stream); });
  run([&] { return launch_zero_padding<T>(q, t.y, p.y_t, p.y_b, p.D * p.H, stream); });
  for (int64_t d = 0; d < p.D; d++)
    run([&] { return launch_input_part(p, t, memory.time_rows(p), sums, d, stream); });
  task.from_input = sums;
  for (int64_t d = 0; d < p.D; d++)
    if (Unit::is_gru && t.weights[d].b_hh)
      task.recurrent_bias[d] = static_cast<const T*>(t.weights[d].b_hh) + 2 * p.H;
  task.saved = p.reserve && p.saved() ? static_cast<float*>(t.gates) : nullptr;
  task.cells = p.reserve && p.has_cell() ? static_cast<float*>(t.cells) : nullptr;
  task.y = static_cast<T*>(t.y), task.h_n = static_cast<T*>(t.h_n), task.c_n = static_cast<T*>(t.c_n);
  run([&] { return Tier::template launch<T>(task, team, memory.exchange, memory.counters, p.D, stream); });
  return run.error();
}

template <class Tier, class T, class Unit>
int launch_persistent_backward(const RecurrentProblem& p, const RecurrentTensors& t, const Team& team,
                               void* workspace, void* stream) {
  const PersistentMemory memory(p, RecurrentPass::backward, team, Tier::exchange_bytes(team, p), workspace);
  PersistentBackward<T, Unit> task = {};
  describe_layer(task, p, t, memory.order);
  const Sequences& q = task.sequences;
  task.saved = static_cast<const float*>(t.gates), task.cells = static_cast<const float*>(t.cells);
  task.y = static_cast<const T*>(t.y), task.gy = static_cast<const T*>(t.gy);
  task.gh_n = static_cast<const T*>(t.gh_n), task.gc_n = static_cast<const T*>(t.gc_n);
  task.gy_t = p.gy_t, task.gy_b = p.gy_b;
  task.slot_gradients = reinterpret_cast<T*>(memory.slot_gradients);
  task.gh0 = static_cast<T*>(t.gh0), task.gc0 = static_cast<T*>(t.gc0);
  RowLists rows = memory.rows;
  if (!t.gx) rows.gx = nullptr;
  const RowStrides strides = {p.x_t, p.x_b, p.gx_t, p.gx_b, p.y_t, p.y_b, p.D, p.H};
  PersistentLaunches run;
  run([&] { return launch_list_rows(q, rows, strides, stream); });
  run([&] { return launch_order(p, q, memory.order, stream); });
  run([&] { return Tier::template launch<T>(task, team, memory.exchange, memory.counters, p.D, stream); });
  const TimeRows listed = memory.time_rows(p);
  if (t.gx) {
    run([&] { return launch_zero_padding<T>(q, t.gx, p.gx_t, p.gx_b, p.I, stream); });
    run([&] { return launch_input_gradient(p, t, listed, memory.slot_gradients, stream); });
  }
  for (int64_t d = 0; d < p.D && t.weights_wanted(); d++)
    run([&] {
      return launch_weight_gradients(p, t, listed, memory.slot_gradients, memory.partial, d, stream);
    });
  return run.error();
}

// f(T, Unit) for the problem's dtype and cell.
template <class F>
int dispatch_persistent(const RecurrentProblem& p, F&& f) {
  const auto with = [&](auto element) {
    switch (p.cell) {
      case RecurrentCell::lstm:
        return f(element, TypeTag<LstmUnit>{});
      case RecurrentCell::gru:
        return f(element, TypeTag<GruUnit>{});
      default:
        return f(element, TypeTag<RnnUnit>{});
    }
  };
  return p.dtype == DType::bf16 ? with(TypeTag<__nv_bfloat16>{}) : with(TypeTag<__half>{});
}

// The functions of a table entry.
template <class Tier, RecurrentPass pass>
struct PersistentEntry {
  static Refusal refuses(const RecurrentProblem& p) {
    Team team;
    const Refusal why = refuses_persistent(p);
    return why ? why : Tier::plan(p, pass, team);
  }
  static int64_t workspace_bytes(const RecurrentProblem& p) {
    Team team;
    if (Tier::plan(p, pass, team)) return 0;
    return PersistentMemory(p, pass, team, Tier::exchange_bytes(team, p), nullptr).bytes;
  }
  static int launch(const RecurrentProblem& p, const RecurrentTensors& t, void* workspace, void* stream) {
    Team team;
    if (Tier::plan(p, pass, team)) return int(launch_invalid);
    return dispatch_persistent(p, [&](auto element, auto unit) {
      using T = typename decltype(element)::type;
      using Unit = typename decltype(unit)::type;
      if constexpr (pass == RecurrentPass::forward)
        return launch_persistent_forward<Tier, T, Unit>(p, t, team, workspace, stream);
      else
        return launch_persistent_backward<Tier, T, Unit>(p, t, team, workspace, stream);
    });
  }
  static constexpr int launch_invalid = 1;  // = cudaErrorInvalidValue
};

}  // namespace pyseqnet
