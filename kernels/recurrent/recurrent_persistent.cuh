// The persistent recurrent kernel: all steps of a layer in one launch, with the recurrent weights resident in
// registers (and, where those are full, in shared memory). A team of blocks holds the weights once and runs a
// few sequences in one direction; every block of it owns some hidden units. A step is
//
//   wait       for the sources of the step before: h forward, the gradients of the gates' sums backward
//   product    sum[row, sequence] = sum over depth of  weight[row, depth] * source[sequence, depth]
//              by mma.sync m16n8k16, rows being the block's units (times gates, forward)
//   cell       on the thread that holds the sums of all gates of a unit: nothing but h, or the gradients of
//              the sums, leaves it
//   publish    the block's slice of the next sources to the team
//
// How a team publishes and waits is the Exchange: within a block, a cluster, or a grid
// (recurrent_exchanges.cuh). What a unit does is the Task (recurrent_persistent_tasks.cuh).
//
// Which thread holds what. A warp has a row group and a slice of the depth. Its rows come in blocks of 8: row
// block j is gate j / halves of the units 8 * (j % halves) ...; two of them fill an mma. The accumulator of
// lane l has row l / 4 of each block and sequences 2 (l % 4), + 1: so all gates of a unit meet in one thread.
// Depths are dealt to the lanes so that a source is read by 16-byte vectors without ldmatrix: lane l takes
// depths 8 (l % 4) ... + 7 of each 32, for both operands alike, and a sum does not mind the order.
//
// Sequences count their own steps, s = 0 at the end where their direction begins; so all sequences of a team
// begin together and end at their own lengths. Tiles of 8 sequences that have all ended cost nothing.
//
// Stores that only a later call reads (y, the reserve) are issued after a step's slice was published, and
// what the next step reads is fetched before it waits.
#pragma once
#include "common/ptx.cuh"
#include "recurrent/recurrent_sequences.cuh"

namespace pyseqnet {

constexpr int persistent_warps = 16, persistent_threads = 32 * persistent_warps;
constexpr int pair_depth = 32;        // depths of two mma steps, which one vector of each lane covers
constexpr int tile_sequences = 8;     // of an mma
constexpr int weight_registers = 48;  // of the 128 that a thread may have; with 64 some kernels would spill
constexpr int vector_elements = 8;    // 16-bit elements of 16 bytes

struct alignas(16) Vector16 {
  uint32_t word[4];
};

// How a layer is spread over blocks. Made by plan_team(); the offsets are of dynamic shared memory, in bytes.
struct Team {
  int blocks = 1;        // of a team
  int units = 8;         // of a block; a multiple of 8
  int groups = 1;        // of rows: warps side by side
  int slices = 1;        // of the depth: warps that add up the same rows
  int pairs = 1;         // of a slice, 32 depths each
  int shared_pairs = 0;  // the last ones of them, whose weights lie in shared memory
  int sequences = 8;     // of a team; a multiple of 8
  int staged = 8;        // sequences whose sources lie in shared memory at once
  int width = 8;         // elements of a block's slice of a source
  int stride = 32;       // elements from source to source in shared memory
  int teams = 1;         // of a direction
  int first_team = 0;    // of this launch
  int first_direction = 0;
  unsigned sources = 0, own = 0, sums = 0, states = 0, seats = 0, bytes = 0;

  PYSEQNET_HOST_DEVICE int warps() const { return groups * slices; }
  PYSEQNET_HOST_DEVICE int tiles() const { return sequences / tile_sequences; }
};

// A sequence of a team; one that is not there has no steps, and b = -1.
struct Seat {
  int b, length;
};
// A step of a sequence. Made again wherever it is needed: registers are what the weights take.
struct Moment {
  int b, t;
  bool takes, first, last;
};
PYSEQNET_DEVICE Moment moment_of(const Seat& seat, int s, int d) {
  return {seat.b, d ? seat.length - 1 - s : s, s < seat.length, s == 0, s + 1 == seat.length};
}

template <class T>
PYSEQNET_DEVICE void multiply_accumulate(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t b[2] = {b0, b1};
  ptx::mma_m16n8k16<T>(d, a, b, d);
}

// Two 16-bit elements as the mma wants them: the first one in the lower half.
template <class T>
PYSEQNET_DEVICE uint32_t pack_elements(T low, T high) {
  static_assert(sizeof(T) == 2);
  return uint32_t(__builtin_bit_cast(uint16_t, low)) | uint32_t(__builtin_bit_cast(uint16_t, high)) << 16;
}

// The weights of one mma pair of a lane: both steps' four registers of each tile of rows.
template <int tiles>
struct WeightPair {
  uint32_t word[tiles][2][4];
};

template <class Task, class Exchange>
struct PersistentBlock {
  using T = typename Task::Element;
  static constexpr int gates = Task::gates, halves = Task::halves;
  static constexpr int row_blocks = gates * halves, tiles = (row_blocks + 1) / 2;
  static constexpr int register_pairs = weight_registers / (8 * tiles);
  static constexpr int group_units = 8 * halves;
  // A grid's backward has no registers left to hold back what it writes.
  static constexpr bool defers = Exchange::defers && (Task::is_forward || !Exchange::stages);

  const Task& task;
  const Team& team;
  Exchange exchange;
  unsigned char* shared;
  int d, rank, lane, warp, group, slice, steps;
  WeightPair<tiles> weights[register_pairs];

  PYSEQNET_DEVICE PersistentBlock(const Task& task, const Team& team, const typename Exchange::Memory& memory,
                                  unsigned char* shared)
      : task(task), team(team), exchange(team, memory, shared), shared(shared) {
    rank = int(blockIdx.x) % team.blocks;
    d = team.first_direction + int(blockIdx.y);
    lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
    group = warp / team.slices, slice = warp % team.slices;
  }

  PYSEQNET_DEVICE const Seat& seat(int i) const {
    return reinterpret_cast<const Seat*>(shared + team.seats)[i];
  }
  // A job is a tile's units of one half: of each thread one unit and two sequences. The warps of a row group
  // take them in turn.
  PYSEQNET_DEVICE int jobs() const { return team.tiles() * halves; }
  PYSEQNET_DEVICE int seat_of(int job, int column) const {
    return job / halves * tile_sequences + lane % 4 * 2 + column;
  }
  PYSEQNET_DEVICE int local_unit(int job) const { return group * group_units + job % halves * 8 + lane / 4; }
  PYSEQNET_DEVICE int unit_of(int job) const { return rank * team.units + local_unit(job); }
  PYSEQNET_DEVICE float& state(int job, int column) const {
    float* const states = reinterpret_cast<float*>(shared + team.states);
    return states[((job * team.groups + group) * 2 + column) * 32 + lane];
  }

  PYSEQNET_DEVICE void seat_sequences() {
    Seat* const seats = reinterpret_cast<Seat*>(shared + team.seats);
    const int64_t first = (int64_t(blockIdx.x) / team.blocks + team.first_team) * team.sequences;
    for (int i = int(threadIdx.x); i < team.sequences; i += int(blockDim.x)) {
      const bool exists = first + i < task.sequences.B;
      const int b = !exists ? -1 : task.order ? task.order[first + i] : int(first + i);
      seats[i] = {b, exists ? int(task.sequences.length(b)) : 0};
    }
    // Sources that nobody writes are multiplied with weights of zero: they must be numbers.
    Vector16* const sources = reinterpret_cast<Vector16*>(shared + team.sources);
    for (unsigned i = threadIdx.x; i < (team.sums - team.sources) / sizeof(Vector16); i += blockDim.x)
      sources[i] = {};
    __syncthreads();
    int* const of_tile = reinterpret_cast<int*>(seats + team.sequences);
    for (int tile = int(threadIdx.x); tile < team.tiles(); tile += int(blockDim.x)) {
      int most = 0;
      for (int i = 0; i < tile_sequences; i++)
        most =
            seats[tile * tile_sequences + i].length > most ? seats[tile * tile_sequences + i].length : most;
      of_tile[tile] = most;
    }
    __syncthreads();
    steps = 0;
    for (int tile = 0; tile < team.tiles(); tile++) steps = longest(tile) > steps ? longest(tile) : steps;
  }
  // Steps of the longest sequence of a tile.
  PYSEQNET_DEVICE int longest(int tile) const {
    return reinterpret_cast<const int*>(shared + team.seats + unsigned(team.sequences) * sizeof(Seat))[tile];
  }

  // ---- weights
  // The weights of pair p of the own slice. A depth is (block of the team, gate, unit of the block).
  PYSEQNET_DEVICE WeightPair<tiles> load_pair(int p) const {
    const T* const from = d ? task.weights[1] : task.weights[0];
    const T zero = from_accumulator<T>(0);
    const int depth = (slice * team.pairs + p) * pair_depth + lane % 4 * vector_elements;
    const int of_block = depth / team.width, within = depth % team.width;
    const int gate = within / team.units;
    const int unit = of_block * team.units + within % team.units;
    const int left = of_block < team.blocks ? task.H - unit : 0;  // of 8 neighbours, how many exist
    const T* const column = from + task.depth_at(gate, unit);
    WeightPair<tiles> pair = {};
#pragma unroll
    for (int j = 0; j < row_blocks; j++) {
      const int row_unit = rank * team.units + group * group_units + j % halves * 8 + lane / 4;
      if (row_unit >= task.H) continue;
      const T* at = column + task.row_at(j / halves, row_unit);
      // Depth 4 step + 2 half of the lane's eight, and its neighbour.
#pragma unroll
      for (int k = 0; k < vector_elements; k += 2) {
        const T low = k < left ? at[0] : zero, high = k + 1 < left ? at[task.depth_stride()] : zero;
        pair.word[j / 2][k / 4][j % 2 + k / 2 % 2 * 2] = pack_elements(low, high);
        at += 2 * task.depth_stride();
      }
    }
    return pair;
  }
  PYSEQNET_DEVICE Vector16* shared_weights(int p) const {
    return reinterpret_cast<Vector16*>(shared) + (warp * team.shared_pairs + p) * tiles * 2 * 32 + lane;
  }
  PYSEQNET_DEVICE void load_weights() {
#pragma unroll
    for (int p = 0; p < register_pairs; p++) {
      weights[p] = {};
      if (p < team.pairs) weights[p] = load_pair(p);
    }
    for (int p = 0; p < team.shared_pairs; p++) {
      const WeightPair<tiles> pair = load_pair(register_pairs + p);
      Vector16* const to = shared_weights(p);
#pragma unroll
      for (int tile = 0; tile < tiles; tile++)
#pragma unroll
        for (int step = 0; step < 2; step++) {
          const uint32_t (&w)[4] = pair.word[tile][step];
          to[(tile * 2 + step) * 32] = {{w[0], w[1], w[2], w[3]}};
        }
    }
  }

  // ---- product
  // The own slice of the sums of a tile, whose first source is at `sources`.
  PYSEQNET_DEVICE void multiply(float (&sum)[tiles][4], const T* sources) const {
    const Vector16* from = reinterpret_cast<const Vector16*>(
        sources + lane / 4 * team.stride + slice * team.pairs * pair_depth + lane % 4 * vector_elements);
    constexpr int vectors = pair_depth / vector_elements;
#pragma unroll
    for (int p = 0; p < register_pairs; p++) {
      if (p >= team.pairs) break;
      const Vector16 source = from[p * vectors];
#pragma unroll
      for (int step = 0; step < 2; step++)
#pragma unroll
        for (int tile = 0; tile < tiles; tile++)
          multiply_accumulate<T>(sum[tile], weights[p].word[tile][step], source.word[2 * step],
                                 source.word[2 * step + 1]);
    }
    from += register_pairs * vectors;
    for (int p = 0; p < team.shared_pairs; p++) {
      const Vector16 source = from[p * vectors];
      const Vector16* const at = shared_weights(p);
#pragma unroll
      for (int step = 0; step < 2; step++)
#pragma unroll
        for (int tile = 0; tile < tiles; tile++)
          multiply_accumulate<T>(sum[tile], at[(tile * 2 + step) * 32].word, source.word[2 * step],
                                 source.word[2 * step + 1]);
    }
  }

  // Slices meet in shared memory, in two buffers in turn: who writes one again has passed the barrier behind
  // which the other's readers came.
  static constexpr int values = tiles * 4;
  PYSEQNET_DEVICE float* sums_of(int turn, int of_slice) const {
    float* const buffer = reinterpret_cast<float*>(shared + team.sums);
    return buffer + ((turn & 1) * team.warps() + group * team.slices + of_slice) * values * 32 + lane;
  }
  PYSEQNET_DEVICE void combine(const float (&sum)[tiles][4], int turn) const {
    float* const to = sums_of(turn, slice);
#pragma unroll
    for (int i = 0; i < values; i++) to[i * 32] = sum[i / 4][i % 4];
    ptx::bar_sync(1 + group, team.slices * 32);
  }
  // The sums of all gates for one half of the units, the slices' added in order.
  PYSEQNET_DEVICE void gather(float (&of_gate)[2][gates], const float (&sum)[tiles][4], int half,
                              int turn) const {
#pragma unroll
    for (int column = 0; column < 2; column++)
#pragma unroll
      for (int g = 0; g < gates; g++) {
        // Where halves are two there is one gate: row block `half`.
        const int row_block = halves == 1 ? g : 0;
        const float (&own)[4] = sum[row_block / 2];
        of_gate[column][g] = halves == 1 ? own[row_block % 2 * 2 + column]
                             : half == 0 ? own[column]
                                         : own[2 + column];
      }
    if (team.slices == 1) return;
#pragma unroll
    for (int column = 0; column < 2; column++)
#pragma unroll
      for (int g = 0; g < gates; g++) of_gate[column][g] = 0;
    for (int k = 0; k < team.slices; k++) {
      const float* const from = sums_of(turn, k);
#pragma unroll
      for (int column = 0; column < 2; column++)
#pragma unroll
        for (int g = 0; g < gates; g++)
          of_gate[column][g] += from[((halves == 1 ? g : half) * 2 + column) * 32];
    }
  }

  // ---- cells
  using Input = typename Task::Input;
  using Output = typename Task::Output;
  // A job in hand: what its two elements need beside their sums, then what became of them.
  struct Job {
    Input input[2];
    Output output[2];
  };

  PYSEQNET_DEVICE Moment moment(int job, int column, int s) const {
    Moment m = moment_of(seat(seat_of(job, column)), s, d);
    m.takes = m.takes && unit_of(job) < task.H;
    return m;
  }
  PYSEQNET_DEVICE void read(Job& at, int job, int s) const {
#pragma unroll
    for (int column = 0; column < 2; column++) {
      const Moment m = moment(job, column, s);
      if (m.takes) at.input[column] = task.read(d, m, unit_of(job));
    }
  }
  PYSEQNET_DEVICE void finish(Job& at, const float (&of_gate)[2][gates], int job, int s, int parity) const {
#pragma unroll
    for (int column = 0; column < 2; column++) {
      const Moment m = moment(job, column, s);
      if (!m.takes) continue;
      float published[Task::source_gates];
      at.output[column] =
          task.finish(d, m, unit_of(job), at.input[column], of_gate[column], state(job, column), published);
      put_sources(published, job, column, parity);
    }
  }
  PYSEQNET_DEVICE void put_sources(const float (&value)[Task::source_gates], int job, int column,
                                   int parity) const {
    T* const to = exchange.own(parity, seat_of(job, column)) + local_unit(job);
#pragma unroll
    for (int g = 0; g < Task::source_gates; g++) store(to + g * team.units, value[g]);
  }
  PYSEQNET_DEVICE void write(const Job& at, int job, int s) const {
#pragma unroll
    for (int column = 0; column < 2; column++) {
      const Moment m = moment(job, column, s);
      if (m.takes) task.write(d, m, unit_of(job), at.output[column]);
    }
  }

  // States before the first step; a sequence without steps ends with them.
  PYSEQNET_DEVICE void begin() const {
    for (int job = slice; job < jobs(); job += team.slices)
#pragma unroll
      for (int column = 0; column < 2; column++) {
        const Seat at = seat(seat_of(job, column));
        if (at.b < 0 || unit_of(job) >= task.H) continue;
        float published[Task::source_gates] = {};
        state(job, column) = task.begin(d, at.b, at.length, unit_of(job), published);
        if constexpr (Task::is_forward) put_sources(published, job, column, 0);
      }
  }

  // The gradient of the state before the first step, from the sums of all that has one.
  PYSEQNET_DEVICE void finish_first(const float (&of_gate)[2][gates], int job) const {
#pragma unroll
    for (int column = 0; column < 2; column++) {
      const Seat at = seat(seat_of(job, column));
      if (at.length > 0 && unit_of(job) < task.H)
        task.finish_first(d, at.b, unit_of(job), of_gate[column][0], state(job, column));
    }
  }

  PYSEQNET_DEVICE void run() {
    seat_sequences();
    load_weights();
    begin();
    exchange.begin();
    int parity = 0, turn = 0;
    if (Task::is_forward && steps > 0) exchange.publish(parity);
    // Backward, "step" -1 is what comes out before the first.
    const int rounds = steps + (steps > 0 && task.wants_first());
    Job at;
    for (int i = 0; i < rounds; i++) {
      const int s = Task::is_forward ? i : steps - 1 - i;
      const bool has_sources = Task::is_forward || i > 0;
      if (s >= 0 && slice < jobs()) read(at, slice, s);
      if (has_sources) exchange.wait();
      int pending = -1;  // the job whose results are still to be written
      for (int tile = 0; tile < team.tiles(); tile++) {
        if (Exchange::stages && has_sources && tile * tile_sequences % team.staged == 0)
          exchange.stage(parity, tile * tile_sequences);
        const int most = longest(tile);
        if (most <= s || most == 0) continue;
        float sum[tiles][4] = {};
        // Backward, nothing comes from behind a sequence's end.
        const bool sourced = Task::is_forward || most > s + 1;
        if (sourced) {
          multiply(sum, exchange.source(parity, tile * tile_sequences));
          if (team.slices > 1) combine(sum, ++turn);
        }
#pragma unroll 1
        for (int half = 0; half < halves; half++) {
          const int job = tile * halves + half;
          if (job % team.slices != slice) continue;
          float of_gate[2][gates] = {};
          if (sourced) gather(of_gate, sum, half, turn);
          if (!Task::is_forward && s < 0) {
            finish_first(of_gate, job);
            continue;
          }
          if (job != slice) {
            if (defers && pending >= 0) write(at, pending, s);
            read(at, job, s);
          }
          finish(at, of_gate, job, s, 1 - parity);
          pending = job;
          if (!defers) write(at, job, s);
        }
      }
      if (i + 1 < rounds) exchange.publish(1 - parity);
      if (defers && pending >= 0) write(at, pending, s);
      parity = 1 - parity;
    }
  }
};

template <class Task, class Exchange>
__global__ void __launch_bounds__(persistent_threads, 1)
    recurrent_persistent(const Task task, const Team team, const typename Exchange::Memory memory) {
  PYSEQNET_DYNAMIC_SHARED(unsigned char, shared);
  // Where its instructions are missing the kernel is empty; nobody launches it there.
  if constexpr (PYSEQNET_SM90 || !Exchange::needs_sm90) {
    PersistentBlock<Task, Exchange> block(task, team, memory, shared);
    block.run();
  }
}

}  // namespace pyseqnet
