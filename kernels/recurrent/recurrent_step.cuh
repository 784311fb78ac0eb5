// One time step of a recurrent layer as one kernel: the product with the recurrent weights, and what happens
// to its results unit by unit (the "task"), for all sequences and both directions.
//
//   sum[b, unit, gate] = sum over k of  source[b][k] * weight[gate, unit, k]        then  task.finish(...)
//
// A step has little work and the next one waits for it, so its time is latency. The work is therefore spread
// thin: a block takes 32 sequences and 128 / slices columns (4 columns are the gates of a unit, or 4 units of
// a cell with one gate), and its 8 warps share these columns and `slices` slices of the sum over k. So 64
// blocks serve an LSTM of 256 units and 32 sequences; with many units a block takes 128 columns, and less is
// read twice. Where columns are few and the sum is long (back through time: four times as long as forward),
// it is cut into parts as well, each a block's; whichever block of a tile arrives last adds them up. The host
// chooses slices and parts from the problem alone, and they are added in order: the same bits in every run.
//
// A thread computes 4 sequences x 4 columns; shared memory is read in vectors, two of them for 16 FMA. The
// next depths travel from global memory to registers while the present ones are multiplied. Sequences that
// have no step at t cost nothing but their place in a tile; a tile without any ends at once.
#pragma once
#include "recurrent/cells.h"
#include "recurrent/recurrent_sequences.cuh"

namespace pyseqnet {

constexpr int step_threads = 256, step_warps = step_threads / 32;
constexpr int step_rows = 32;                         // sequences of a block
constexpr int step_group = 4;                         // rows and columns of a thread
constexpr int step_columns_of_all = step_warps * 16;  // of a block times its slices
constexpr int slice_depth = 8;
constexpr int step_padding = step_group;
constexpr int weight_loads = step_columns_of_all * slice_depth / step_threads;
constexpr int most_slices = step_warps;
constexpr int64_t wanted_step_blocks = 128;  // about one for each multiprocessor of the largest GPUs
constexpr int64_t shortest_step_part = 256;  // terms that are worth waiting for another block
// Results of a block that has a part: there are parts only where blocks are few, and then slices are many.
constexpr int part_results = step_rows * step_columns_of_all / most_slices;

// Where the weights of a step lie.
template <class T>
struct StepWeights {
  const T* weights[max_directions] = {};
  int64_t units = 0, depth = 0;
  // weight[gate, unit, k] lies at  gate * gate_stride + unit * unit_stride + k * depth_stride
  int64_t gate_stride = 0, unit_stride = 0, depth_stride = 0;
  // source[b][k] lies `gap` further from k = gap_from on: the third gate of a GRU has two slots.
  int64_t gap_from = INT64_MAX, gap = 0;
  int64_t t[max_directions] = {};  // the step of each direction
  int slices = 1;                  // 1, 2, 4 or 8
  int parts = 1;                   // of a task with one gate
  int64_t part_depth = 0;
  // With parts: sums of wanted_step_blocks blocks, and how many parts of each tile have arrived.
  accumulator_t<T>* partial = nullptr;
  unsigned* arrived = nullptr;
};

template <class T>
struct alignas(sizeof(T) * step_group) StepVector {
  T element[step_group];
};

template <class Acc>
struct StepMemory {
  static constexpr int source_elements = most_slices * slice_depth * (step_rows + step_padding);
  static constexpr int weight_elements =
      step_columns_of_all * slice_depth + most_slices * slice_depth * step_padding;
  static constexpr int results = step_rows * step_columns_of_all;
  static constexpr int elements =
      source_elements + weight_elements > results ? source_elements + weight_elements : results;
  alignas(StepVector<Acc>) Acc element[elements];  // tiles, then results
  int64_t source_at[step_rows];                    // -1: none
  bool last_part;
  unsigned active, sourced;  // bits: sequences with this step; those with a source
};

template <class Acc>
constexpr int blocks_per_multiprocessor = sizeof(Acc) == 4 ? 2 : 1;

template <class Task>
__global__ void __launch_bounds__(step_threads,
                                  blocks_per_multiprocessor<accumulator_t<typename Task::Element>>)
    recurrent_step(const Task task) {
  using T = typename Task::Element;
  using Acc = accumulator_t<T>;
  using Vector = StepVector<Acc>;
  constexpr int gates = Task::gates;
  static_assert(gates >= 1 && gates <= step_group);
  PYSEQNET_SHARED(StepMemory<Acc>, memory, );
  const StepWeights<T>& w = task.product;
  const int t = int(threadIdx.x), lane = t % 32, warp = t / 32, d = int(blockIdx.z);
  const int slices = w.slices, columns = step_columns_of_all / slices;
  const int block_units = gates == 1 ? columns : columns / step_group;
  const int64_t unit_tiles = ceil_divide(w.units, block_units);
  const int64_t first_unit = int64_t(blockIdx.x) % unit_tiles * block_units;
  const int64_t first_b = int64_t(blockIdx.x) / unit_tiles * step_rows;

  if (t < step_rows) {
    const int64_t b = first_b + t;
    const bool active = b < task.sequences.B && task.takes(d, b);
    const int64_t at = active ? task.source_at(d, b) : -1;
    memory.source_at[t] = at;
    const unsigned all_active = __ballot_sync(0xffffffffu, active);
    const unsigned all_sourced = __ballot_sync(0xffffffffu, at >= 0);
    if (t == 0) memory.active = all_active, memory.sourced = all_sourced;
  }
  __syncthreads();
  const unsigned active = memory.active, sourced = memory.sourced;
  if (!active) return;

  // What a thread's first unit needs beside its sums is on its way during the product.
  const auto is_wanted = [&](int i) {
    return i < step_rows * block_units && (active >> i / block_units & 1) &&
           first_unit + i % block_units < w.units;
  };
  typename Task::Inputs inputs = {};
  if (is_wanted(t)) inputs = task.read(d, first_b + t / block_units, first_unit + t % block_units);

  Acc* const staged_source = memory.element;
  Acc* const staged_weights = staged_source + StepMemory<Acc>::source_elements;
  const int source_line = step_rows + step_padding, weight_line = columns + step_padding;
  const int64_t begin = gates == 1 ? int64_t(blockIdx.y) * w.part_depth : 0;
  const int64_t end = gates == 1 && begin + w.part_depth < w.depth ? begin + w.part_depth : w.depth;
  Acc sum[step_group][step_group] = {};
  const int of_slice = warp / (step_warps / slices);
  const int own_row = lane / 4 * step_group;
  const int own_column = (warp % (step_warps / slices) * 4 + lane % 4) * step_group;

  if (sourced) {
    // Eight neighbouring threads load eight neighbouring depths of one slice; of the weights they load
    // neighbouring columns, where those are neighbours in memory. Sequences without a source read another's,
    // and columns past the last read the last: nobody looks at those sums.
    const int octet = t / slice_depth;
    const int own_depth = octet % slices * slice_depth + t % slice_depth;
    const int first_line = octet / slices, line_step = step_threads / slice_depth / slices;
    const bool along_depth = w.depth_stride == 1;
    const int first_column = along_depth ? first_line : t % columns;
    const int column_step = along_depth ? line_step : 0;
    const int first_depth = along_depth ? own_depth : t / columns;
    const int depth_step = along_depth ? 0 : step_threads / columns;
    const int first_sourced = __ffs(int(sourced)) - 1;
    // Load j of the sources is done where there are more than j slices.
    const bool two = slices >= 2, four = slices >= 4, eight = slices >= 8;
    const auto has = [&](int j) { return j == 0 || (j < 2 ? two : j < 4 ? four : eight); };
    const Acc* line[most_slices];
#pragma unroll
    for (int j = 0; j < most_slices; j++) {
      const int own = has(j) ? first_line + j * line_step : first_sourced;
      line[j] = task.sources + memory.source_at[sourced >> own & 1 ? own : first_sourced];
    }
    const T* column[weight_loads];
#pragma unroll
    for (int j = 0; j < weight_loads; j++) {
      const int own = first_column + j * column_step;
      const int gate = gates == 1 ? 0 : own % step_group < gates ? own % step_group : gates - 1;
      const int64_t unit = first_unit + (gates == 1 ? own : own / step_group);
      column[j] = (d ? w.weights[1] : w.weights[0]) + gate * w.gate_stride +
                  (unit < w.units ? unit : w.units - 1) * w.unit_stride +
                  (first_depth + j * depth_step) * w.depth_stride;
    }

    Acc next_source[most_slices];
    T next_weights[weight_loads];
    const auto fetch = [&](int64_t depth) {
      const int64_t k = depth + own_depth, at = k + (k >= w.gap_from ? w.gap : 0);
      const bool inside = k < end;
#pragma unroll
      for (int j = 0; j < most_slices; j++)
        if (has(j)) next_source[j] = inside ? line[j][at] : Acc(0);
      const int64_t along = depth * w.depth_stride;
#pragma unroll
      for (int j = 0; j < weight_loads; j++)
        next_weights[j] =
            depth + first_depth + j * depth_step < end ? column[j][along] : from_accumulator<T>(0);
    };
    const int chunk = slices * slice_depth;
    fetch(begin);
    for (int64_t depth = begin; depth < end; depth += chunk) {
#pragma unroll
      for (int j = 0; j < most_slices; j++)
        if (has(j)) staged_source[own_depth * source_line + first_line + j * line_step] = next_source[j];
#pragma unroll
      for (int j = 0; j < weight_loads; j++)
        staged_weights[(first_depth + j * depth_step) * weight_line + first_column + j * column_step] =
            to_accumulator(next_weights[j]);
      __syncthreads();
      fetch(depth + chunk);
#pragma unroll
      for (int k = 0; k < slice_depth; k++) {
        const int line = of_slice * slice_depth + k;
        const Vector a = *reinterpret_cast<const Vector*>(staged_source + line * source_line + own_row);
        const Vector b = *reinterpret_cast<const Vector*>(staged_weights + line * weight_line + own_column);
#pragma unroll
        for (int i = 0; i < step_group; i++)
#pragma unroll
          for (int j = 0; j < (gates == 1 ? step_group : gates); j++)
            sum[i][j] += a.element[i] * b.element[j];
      }
      __syncthreads();
    }
  }

  // Slices meet in shared memory, and the units are dealt out again, neighbours to neighbours.
  Acc* const results = memory.element;
#pragma unroll
  for (int i = 0; i < step_group; i++) {
    Vector v;
#pragma unroll
    for (int j = 0; j < step_group; j++) v.element[j] = sum[i][j];
    *reinterpret_cast<Vector*>(results + (of_slice * step_rows + own_row + i) * columns + own_column) = v;
  }
  __syncthreads();
  const auto add_slices = [&](Acc(&total)[gates], int i) {
    const int row = i / block_units, unit = i % block_units;
    for (int slice = 0; slice < slices; slice++) {
      const Acc* from = results + (slice * step_rows + row) * columns + unit * (gates == 1 ? 1 : step_group);
#pragma unroll
      for (int g = 0; g < gates; g++) total[g] += from[g];
    }
  };

  // Of several parts, the block that comes last goes on with the sums of all.
  const bool in_parts = gates == 1 && w.parts > 1;
  const int64_t tile = d * int64_t(gridDim.x) + blockIdx.x;
  Acc* const partial = in_parts ? w.partial + tile * w.parts * part_results : nullptr;
  if (in_parts) {
    for (int i = t; i < step_rows * block_units; i += step_threads) {
      Acc total[gates] = {};
      if (is_wanted(i)) add_slices(total, i);
      partial[int(blockIdx.y) * part_results + i] = total[0];
    }
    __threadfence();
    __syncthreads();
    if (t == 0) memory.last_part = atomicAdd(w.arrived + tile, 1u) + 1 == unsigned(w.parts);
    __syncthreads();
    if (!memory.last_part) return;
    __threadfence();
    if (t == 0) w.arrived[tile] = 0;  // as the next launch wants to find it
  }

  for (int i = t; i < step_rows * block_units; i += step_threads) {
    if (!is_wanted(i)) continue;
    const int row = i / block_units, unit = i % block_units;
    if (i != t) inputs = task.read(d, first_b + row, first_unit + unit);
    Acc total[gates] = {};
    if (!in_parts) add_slices(total, i);
    // Other blocks wrote these: past this multiprocessor's own cache.
    for (int part = 0; in_parts && part < w.parts; part++)
      total[0] += *const_cast<const volatile Acc*>(partial + part * part_results + i);
    task.finish(d, first_b + row, first_unit + unit, inputs, total);
  }
}

// Slices, and parts, so that about every multiprocessor has a block; `sequences` and `directions` run at
// once.
template <class Task>
int launch_step(Task task, int64_t sequences, int64_t directions, void* stream) {
  StepWeights<typename Task::Element>& w = task.product;
  if (w.units == 0 || sequences == 0) return launch_ok;
  int64_t blocks = 0;
  for (w.slices = 1;; w.slices *= 2) {
    const int64_t columns = step_columns_of_all / w.slices;
    blocks = ceil_divide(w.units, Task::gates == 1 ? columns : columns / step_group) *
             ceil_divide(sequences, step_rows);
    if (blocks * directions >= wanted_step_blocks || w.slices == most_slices) break;
  }
  w.parts = 1, w.part_depth = w.depth;
  if (Task::gates == 1 && blocks * directions * 2 <= wanted_step_blocks) {
    const int64_t wanted = wanted_step_blocks / (blocks * directions), most = w.depth / shortest_step_part;
    const int64_t parts = wanted < most ? wanted : most, chunk = w.slices * slice_depth;
    if (parts > 1) {
      w.part_depth = ceil_divide(ceil_divide(w.depth, parts), chunk) * chunk;
      w.parts = int(ceil_divide(w.depth, w.part_depth));
    }
  }
  return launch({.grid = grid_of(blocks, unsigned(w.parts), unsigned(directions)),
                 .block = dim3(step_threads),
                 .stream = stream},
                recurrent_step<Task>, task);
}

}  // namespace pyseqnet
