"""Faults planted in copies of the real kernels: proof that their simulator cases would notice.

    python tests/cuda_on_cpu/mutations.py [case_max_pool ...]      builds the copies, tells how each fault is caught

Every mutation of a case goes into one copy of its sources, switched by a number at run time, so that a family costs
one compilation more (without optimisation: the same kernels, slower). `drop` skips a statement, a barrier if nothing
else is said; `swap` makes an expression another. `after` is text that stands before the wanted occurrence, `label`
selects problems of the case (its --only).
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import build as simulator

FOLDER = simulator.BUILD / "mutations"
# Unlike build.py's, without optimisation: it is the compiler's time that counts here.
FLAGS = ["-std=c++20", "-O0", "-g1", "-w", "-fsanitize=thread", "-DPYSEQNET_MUTATED"]
DECLARATION = "namespace cusim { extern int mutation; }\n"


@dataclass(frozen=True)
class Mutation:
    what: str
    file: str  # below kernels/
    old: str
    new: str | None  # None: the statement is dropped
    after: str
    label: str
    unit: str  # the .cu that is compiled

    def planted(self, text: str, number: int) -> str:
        """The file's text with this mutation in it, switched on where cusim::mutation is `number`."""
        start = text.index(self.after) if self.after else 0
        at = text.index(self.old, start)
        if self.new is None:
            inserted = f"if (::cusim::mutation != {number}) {{ {self.old} }}"
        else:
            inserted = f"(::cusim::mutation == {number} ? ({self.new}) : ({self.old}))"
        return text[:at] + inserted + text[at + len(self.old) :]


BARRIER = "__syncthreads();"


class Copy:
    """The mutations of what one .cu is compiled from."""

    def __init__(self, unit: str, label: str) -> None:
        self.unit, self.label = unit, label
        self.mutations: list[Mutation] = []

    def drop(self, what: str, after: str, statement: str = BARRIER, *, file: str = "", label: str = "") -> None:
        self._add(what, file, statement, None, after, label)

    def swap(self, what: str, after: str, old: str, new: str, *, file: str = "", label: str = "") -> None:
        self._add(what, file, old, new, after, label)

    def _add(self, what: str, file: str, old: str, new: str | None, after: str, label: str) -> None:
        place = str(Path(self.unit).parent / file) if file else self.unit
        self.mutations.append(Mutation(what, place, old, new, after, label or self.label, self.unit))


pool = Copy("pool/max_pool_generic.cu", "f32 nchw N1 C2 H66")
tiled = "max_pool_forward_tiled("
pool.drop("no barrier after staging", tiled)
pool.swap("staging reads a row too many", tiled, "h < v.H", "h <= v.H")
pool.swap("a column too many is written", tiled, "q >= v.Q", "q > v.Q")
pool.swap("padding is 0", tiled, "lowest<T>()", "from_accumulator<T>(0)")

gemm = Copy("conv/conv_gemm_generic.cu", "f32 nchw filters nhwc N1 C9 H5 W5 K67")
header = "conv_implicit_gemm.cuh"
gemm.drop("lists are read before they are written", "walk.list_next(memory, g, 1);", file=header)
gemm.drop("no barrier after the first tiles", "next.stash(memory, 0, t);", file=header)
gemm.drop("no barrier between steps", "next.stash(memory, 1 - now, t);", file=header)
gemm.swap("reads a bias too many", "bias && part == 0", "row < rows_left", "row <= rows_left", file=header)

depthwise = Copy("conv/conv_depthwise_generic.cu", "f16 nchw filters nchw N3 C3 H41")
header = "conv_generic.cuh"
ten_taps = "f32 nchw filters nhwc N1 C3 H3 W60"
depthwise.drop("halves are added before they are there", "half >= channel_lanes", file=header)
depthwise.drop("no barrier before the sum of parts", "lanes[y][x] = sum;", file=header)
depthwise.drop("taps are read before they are written", "taps[t] = {", label=ten_taps)
depthwise.swap("pixels beyond the image", "correlate_sums(", "unsigned(d.h.in)", "unsigned(d.h.in + 1)", label=ten_taps)

block = Copy("conv/conv_relu_pool_generic.cu", "f32 nchw N2 C2 H12 W10")
block.swap("the first maximum does not stay", "pool_windows(", "v > best", "v >= best")
block.swap("a window too many", "open_windows(", "u1 >= w.rows", "u1 > w.rows")
block.swap("every gradient is 1", "out + i, open", "load(gy + i)", "accumulator_t<T>(1)")

linear = Copy("linear_attention/linear_attention_generic.cu", "f32 elu B2 H1 L65")
header = "linear_attention_generic.cuh"
linear.drop("tiles are overwritten while they are read", "k0 += depth<Acc>) {", file=header)
linear.drop("tiles are read before they are written", "stage<b_along_depth>(staged.b", file=header)
linear.drop("scores are read before they are written", "powers.of_pair(r, s) : Acc(0);", file=header)
linear.swap("sees the next key", "scores.at[r][s] = ", "s <= r", "s <= r + 1", file=header)
linear.swap("a column too many of the state", "sum_parts(const Call<T> c)", "e < c.p.E", "e <= c.p.E")

label = "f32 elu B3 H2 L150"  # decayed, packed
linear.swap("a query fades a step too little", "int fades(int row)", "row + 1", "row", file=header, label=label)
linear.swap("a key fades a step too much", "of_key(int row)", "keys - 1 - row", "keys - row", file=header, label=label)
decay = "linear_attention_decay.cuh"
slope = "slopes[powers[0].fades(r) - 1 - s]"
linear.swap(
    "a pair weighs its power",
    "sum += scores[i][j]",
    slope,
    slope.replace("slopes", "powers[0].at"),
    file=decay,
    label=label,
)
linear.swap(
    "the state's slope is left out", "sum_of_block(sum", "slopes[powers[0].keys]", "Acc(0)", file=decay, label=label
)
linear.drop("warps are summed before they are written", "warps[threadIdx.x / 32] = x;", file=decay, label=label)
linear.swap("the state does not fade over a part", "scan_states(", "p.decayed", "false", label=label)

label = "bf16 elu B1 H1 L140"  # decayed
sweep_80 = Copy("linear_attention/linear_attention_forward_sm80.cu", label)
sweep_80.drop("a chunk is overwritten while it is read", "row < end; row += chunk) {")
sweep_80.drop("features are read before they are written", "feature_of(p.feature_map, x) : 0.f;\n    });")
sweep_80.drop("a row's sum is read before it is written", "block.multiply_normalizer(a_tile);")
sweep_80.drop("the state is overwritten while it is read", "outputs.compute(block, a_address")
sweep_80.drop("keys are read before they have faded", "x * block.powers[block.keys - 1 - row] : 0.f;\n      });")
sweep_80.drop("outputs are stored before they are written", "__syncwarp();\n    constexpr int across", "__syncwarp();")
sweep_80.swap("a key too many", "const int key = n * 8", "key < fades", "key <= fades")
sweep_80.swap("the state fades a step too much", "state.scale(", "block.powers[block.keys]", "block.powers[chunk]")

attention = Copy("attention/attention_generic.cu", "f32 B3 H2/1 L14")
scores, tile = "attention_scores.cuh", "attention_tile.cuh"
attention.drop("seen keys are read before they are cleared", "memory.any_seen[t] = 0;", file=scores)
attention.drop("seen keys are read before they are written", "atomicOr(&memory.any_seen", file=scores)
attention.drop("a seen tile is left out", "atomicOr(", "atomicOr(&memory.any_seen[slot_], 1u);", file=scores)
attention.drop("channels are read before they are written", "return j < b_count; });", file=tile)
attention.swap(
    "channels are overwritten while they are read",
    "int64_t left = channels - c;",
    "c > 0",
    "c > channels",
    file=tile,
    label="f32 B1 H1/1 L8 S80 D70",
)
attention.drop("weights overwrite what is read", "softmax_tile<T, groups>(score, state, sum")
attention.drop("values are read before they are written", "walk.key_seen(memory, key); });")

recurrent = Copy("recurrent/recurrent_generic.cu", "f32 lstm dense T3 B3 I5 H7")
step, product = "recurrent_step.cuh", "recurrent_gemm.cuh"
in_parts = "f32 lstm lengths T3 B3 I2 H130"
recurrent.drop("places are read before they are written", "memory.active = all_active", file=step)
recurrent.drop("operands are read before they are written", "to_accumulator(next_weights[j]);", file=step)
recurrent.drop(
    "operands are overwritten while they are read", "a.element[i] * b.element[j];", file=step, label=in_parts
)
recurrent.drop("slices are added before they are there", "columns + own_column) = v;", file=step)
recurrent.swap(
    "the first part goes on, not the last", "atomicAdd(", "unsigned(w.parts)", "1u", file=step, label=in_parts
)
recurrent.drop("counted before all have written", "__threadfence();", file=step, label=in_parts)
recurrent.drop("counted without a fence", "total[0];", "__threadfence();", file=step, label=in_parts)
recurrent.drop("no barrier between steps", "stash_operand(memory.column[1 - now]", file=product)
recurrent.swap("a row too many", "void put_results(", "row >= p.rows", "row > p.rows", file=product)

gradients = Copy("attention/attention_backward_generic.cu", "f32 B3 H2/1 L14")
gradients.drop("gradients overwrite what is read", "gradients_of_tile<T>(weight, gradient")
gradients.drop("keys are read before they are written", "walk.key_seen(memory, key); });")
gradients.drop("gradients overwrite the last ones", "add_transposed(ChannelRegisters")
gradients.drop("transposed gradients are read before they are there", "memory.lse[query] != -Acc(INFINITY); });")

attention_80 = Copy("attention/attention_forward_sm80.cu", "bf16 B1 H2/1 L3 S270 D64 E24")
attention_80.drop("tiles are read before cp.async has brought them", "arrive = [&]", "ptx::cp_async_wait<slots - 2>();")
attention_80.drop("no barrier: tiles of other threads", "ptx::cp_async_wait<slots - 2>();")
attention_80.swap("prefetches into the tile in use", "fetch(item + ", "slots - 1", "slots")
attention_80.swap("a key too many", "exists = [&](int key)", "key < keys - key0", "key <= keys - key0")
attention_80.swap("a query too many", "lane % 4 == 0 && ", "query < past", "query <= past")

attention_90 = Copy("attention/attention_forward_sm90a.cu", "bf16 B1 H2/1 L3 S270 D64 E24")
more_tiles = "bf16 B1 H1/1 L70 S700 D64 E64"
consume, values_arrive, store = "void consume(", "void values_arrive(", "void store(const WorkItem"
attention_90.drop("no wait for keys", consume, "ptx::mbar_wait(ring_.keys_full(turn_.stage), turn_.phase);")
attention_90.drop("no wait for values", values_arrive, "ptx::mbar_wait(ring_.values_full(turn.stage), turn.phase);")
attention_90.drop("scores are read before they are there", consume, "ptx::wgmma_wait<1>();")
attention_90.drop("results reach TMA without a fence", store, "ptx::fence_async_proxy();")
attention_90.drop("results leave before all are there", store, "ptx::bar_sync(first_group_barrier + group_, 128);")
attention_90.drop(
    "keys arrive where keys are still read",
    "void produce(",
    "ptx::mbar_wait(ring.keys_empty(stage), turn.phase ^ 1);",
    label=more_tiles,
)

attention_back = Copy("attention/attention_backward_sm80.cu", "bf16 B1 H2/1 L3 S270 D64 E24")
arrived = "everybody is through with the other one"
attention_back.drop("back: no wait for cp.async", arrived, "ptx::cp_async_wait<0>();")
attention_back.drop("back: no barrier: tiles of other threads", arrived)
attention_back.swap(
    "back: prefetches into the tiles in use", "fetch(slot ^ 1);\n    const uint32_t column_tile0", "slot ^ 1", "slot"
)
attention_back.swap("back: a query too many", "statistics_of(", "query >= end", "query > end")

additive = Copy("attention/additive_generic.cu", "f32 B2 L17 S33 D33 E5 apart no scores")
additive.drop("channels are overwritten while they are read", "d0 += chunk) {")
additive.drop("channels are read before they are written", "m.weight[t] = weight")
additive.drop("a state is overwritten while it is read", "state = m.state[r];", "__syncwarp();")
additive.drop("weights are read before they are written", "m.factor[r] = factor;")
additive.drop("gradients are read before they are written", "m.dz[r][own_column()] = dz;")
additive.swap("a row too many", "at(int64_t row, int64_t channel)", "row < rows", "row <= rows")
additive.swap("a weight too many", "row >= p.L || ", "j >= p.S", "j > p.S")

ctc = Copy("chain/ctc_generic.cu", "ctc f32 T9 B4 C33 S3")
ctc.drop("paths: no barrier between steps", "s.alpha(step)[state] = now[state];")
ctc.drop("back: no barrier between steps", "*alpha = exp(*alpha + beta - total);")
ctc.drop("posteriors are added before they are there", "blanks[threadIdx.x] = sum;")
ctc.swap("a state too many", "beta = after[state];", "state + 2 < s.states", "state + 2 <= s.states")
ctc.swap("overwrites the states that it reads", "sum_paths(", "(step + 1) % 2", "step % 2")

crf = Copy("chain/crf_generic.cu", "crf bf16 B4 T5 C3 nbest 4 tags")
crf.drop("sequences: no barrier between steps", "c.alpha[(b * c.p.T + step) * C + j] = now[j];")
crf.drop("tags are added before they are there", "sums[threadIdx.x] = sum;")
crf.drop("back: no barrier between steps", "store(ge + step * C + i, g *")
crf.drop("best: no barrier between steps", "if (nan) atomicOr(bad, 1);")
crf.drop("best: the last list is read before it is written", "last.offer(rows[")

gemm_80 = Copy("conv/conv_sm80.cu", "bf16 nchw filters nhwc N1 C40 H5 W5 K67")
header = "conv_sm80.cuh"
gemm_80.drop("rows are read before they are listed", "list_row(rows, g, axes, first_window", file=header)
gemm_80.drop("no wait for cp.async", "gathered_product(", "ptx::cp_async_wait<ring_stages - 2>();", file=header)
gemm_80.drop("no barrier between stages", "ptx::cp_async_wait<ring_stages - 2>();", file=header)
gemm_80.drop(
    "results overwrite what is read", "ptx::cp_async_wait<0>();", file=header, label="bf16 nhwc filters nhwc N2 C8 H8"
)
gemm_80.drop("results leave before they are there", "pitch + column) = two;", file=header)
gemm_80.swap("a filter too many", "filter_lines; j++", "column < columns_left_", "column <= columns_left_", file=header)
header = "conv_weight_sm80.cuh"
four_stages = "f32 nhwc filters nhwc N2 C8 H8 W8 K64"
wait = "ptx::cp_async_wait<ring_stages - 2>();"
gemm_80.drop("weights: no wait for cp.async", "weight_product(", wait, file=header, label=four_stages)
gemm_80.drop("weights: no barrier between stages", wait, file=header, label=four_stages)
gemm_80.swap(
    "weights: a pixel too many",
    "gy_exists_ && ",
    "gy_pixel_ < end_",
    "gy_pixel_ <= end_",
    file=header,
    label="f32 nhwc filters nhwc N1 C16 H9",
)
pack = Copy("conv/conv_pack.cu", four_stages)
pack.drop("weights: parts are added before they are there", "lanes[y][x] = sum;")

gemm_90 = Copy("conv/conv_sm90a.cu", "f16 nhwc filters nhwc N1 C72 H6 W5 K67")
header = "conv_sm90a.cuh"
gemm_90.drop("no wait for TMA", "product_wgmma(", "ptx::mbar_wait(full + 8 * at.slot, at.phase);", file=header)
gemm_90.drop(
    "no wait for a free slot", "product_wgmma(", "ptx::mbar_wait(empty + 8 * at.slot, at.phase ^ 1);", file=header
)
gemm_90.drop("a slot is given back while it is read", "product_wgmma(", "ptx::wgmma_wait<1>();", file=header)
gemm_90.drop("sums are read before they are there", "product_wgmma(", "ptx::wgmma_wait<0>();", file=header)
gemm_90.swap("expects a pixel less", "expect_tx(bar, ", "Tile::stage_bytes", "Tile::stage_bytes - 128", file=header)
gemm_90.swap("a pixel too many", "transpose_quad(word, lane);", "pixel < pixels", "pixel <= pixels", file=header)
weights_90 = Copy("conv/conv_weight_sm90a.cu", "f16 nhwc filters nhwc N1 C40 H12 W11 K40")
weights_90.drop("weights: no wait for TMA", "weight_wgmma(", "ptx::mbar_wait(full + 8 * at.slot, at.phase);")
weights_90.drop("weights: sums are read before they are there", "weight_wgmma(", "ptx::wgmma_wait<0>();")
weights_90.swap("weights: a filter too many", "weight_wgmma(", "row >= g.filters", "row > g.filters")

grid = Copy("recurrent/recurrent_grid_sm80.cu", "bf16 lstm lengths T3 B19 I5 H130 P0 D2")
header = "recurrent_exchanges.cuh"
exchange = "struct GridExchange"
grid.drop("grid: copied before it is written", exchange, file=header)
grid.drop("grid: counted before all have copied", "copy(parity);\n    __syncthreads", file=header)
grid.drop("grid: no barrier between steps", exchange, "wait_for(++epoch);", file=header)
grid.drop("grid: goes on before its first thread", "wait_for(++epoch);", file=header)
grid.drop("grid: no wait for cp.async", exchange, "ptx::cp_async_wait<0>();", file=header)
grid.drop("grid: sources of other threads", "ptx::cp_async_wait<0>();", file=header)
cluster = Copy("recurrent/recurrent_cluster_sm90.cu", "bf16 lstm dense T2 B2 I2 H260")
cluster.drop("cluster: a neighbour may not have begun", "void begin()", "ptx::cluster_sync();", file=header)
cluster.drop("cluster: no barrier between steps", "void wait()", "ptx::cluster_wait();", file=header)
cluster.drop("cluster: copied before it is written", "struct ClusterExchange", file=header)
meet = "ptx::bar_sync(1 + group, team.slices * 32);"
cluster.drop("cluster: sums of other warps", "void combine(", meet, file="recurrent_persistent.cuh")
over_time = Copy("recurrent/recurrent_over_time_sm80.cu", "f16 gru packed T4 B3 I16 H64 P0 D1")
stage_arrives = "ptx::cp_async_wait<stages - 2>();"
over_time.drop("products: lines are read before they are listed", "list_lines(column_at, column")
over_time.drop("products: no wait for cp.async", "recurrent_mma_product(", stage_arrives)
over_time.drop("products: no barrier between stages", stage_arrives)
over_time.swap("products: a row too many", "at.row_of(i, 2 * half);", "row >= p.rows", "row > p.rows")

walk = Copy("recurrent/recurrent_walk.cu", "f32 lstm_layer_norm lengths T3 B3 I5 H11")
header = "recurrent_walk.cuh"
walk.drop("a step's products read the state while it is written", "w.from_input[row * w.gates + k];", file=header)
walk.drop(
    "sums are read before they are written",
    "own + at.recurrent);",
    file=header,
    label="f32 lstm_peephole lengths T3 B3",
)
walk.drop("a row's total is read before it is written", "warp_sums[threadIdx.x / 32] = x;", file=header)
walk.drop("gradients of sums are read before they are written", "w.options, true});", file=header)
walk.swap("the step after instead of before", "walk_backward(", "step + 1", "step - 1", file=header)
walk.swap("a parameter's gradient lacks a sequence", "sum_parameter_gradients(", "b < sequences", "b + 1 < sequences")

MUTATIONS: dict[str, list[Mutation]] = {
    "case_additive": additive.mutations,
    "case_attention": attention.mutations + gradients.mutations,
    "case_attention_tensor_core": attention_80.mutations + attention_90.mutations + attention_back.mutations,
    "case_chain": ctc.mutations + crf.mutations,
    "case_conv": gemm.mutations + depthwise.mutations,
    "case_conv_relu_pool": block.mutations,
    "case_conv_sm80": gemm_80.mutations + pack.mutations,
    "case_conv_sm90a": gemm_90.mutations + weights_90.mutations,
    "case_linear_attention": linear.mutations + sweep_80.mutations,
    "case_max_pool": pool.mutations,
    "case_recurrent": recurrent.mutations,
    "case_recurrent_persistent": grid.mutations + cluster.mutations + over_time.mutations,
    "case_recurrent_walk": walk.mutations,
}


def write_if_new(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def build(case: Path, mutations: list[Mutation]) -> Path:
    """The case linked with copies of its kernels that hold all mutations; cusim::mutation 0 is none of them."""
    folder = FOLDER / case.stem
    texts: dict[str, str] = {}
    for number, mutation in enumerate(mutations, 1):
        text = texts.get(mutation.file) or DECLARATION + (simulator.KERNELS / mutation.file).read_text()
        texts[mutation.file] = mutation.planted(text, number)
    for name, text in texts.items():
        write_if_new(folder / name, text)
    write_if_new(
        folder / "mutation.cpp",
        "#include <cstdlib>\nnamespace cusim {\nextern int mutation;\n"
        'int mutation = std::getenv("CUSIM_MUTATION") ? std::atoi(std::getenv("CUSIM_MUTATION")) : 0;\n}\n',
    )
    units = {mutation.unit for mutation in mutations}
    sources = [folder / name if (folder / name).exists() else simulator.KERNELS / name for name in sorted(units)]
    mutated = [
        simulator.compile_one(source, FLAGS, includes=(folder,), target=folder / f"{source.stem}.o")
        for source in [*sources, folder / "mutation.cpp"]
    ]
    unchanged = [
        source for source in simulator.sources_of(case) if source.relative_to(simulator.KERNELS).as_posix() not in units
    ]
    # First come the copies: a template that several files instantiate is taken from there.
    return simulator.link(folder / case.stem, mutated, simulator.objects_of([case, *unchanged]))


def run(program: Path, number: int, mutation: Mutation) -> tuple[int, str]:
    environment = {**os.environ, "CUSIM_MUTATION": str(number), "UBSAN_OPTIONS": "print_stacktrace=0"}
    environment.pop("CUSIM_NO_CHECKS", None)
    command = [str(program), "--seeds", "1", "--stop", "--only", mutation.label]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    return done.returncode, done.stdout + done.stderr


def survivors(name: str, say: bool = False) -> list[str]:
    """What of a case's mutations is not caught, and what is reported without a mutation."""
    mutations = MUTATIONS[name]
    program = build(simulator.HERE / f"{name}.cpp", mutations)
    wrong = []
    for label in dict.fromkeys(mutation.label for mutation in mutations):
        status, said = run(program, 0, next(m for m in mutations if m.label == label))
        if status:
            wrong.append(f"{name}, no mutation, {label}: {said[-2000:]}")
    for number, mutation in enumerate(mutations, 1):
        status, said = run(program, number, mutation)
        if "FAILED" not in said:  # a crash is no report
            wrong.append(f"{name}, {mutation.file}: {mutation.what}: exit status {status}\n{said[-500:]}")
        elif say:
            print(f"{mutation.what:50}  {said.splitlines()[0][:230]}")
    return wrong


if __name__ == "__main__":
    for case in sys.argv[1:] or MUTATIONS:
        print(f"== {case}")
        for line in survivors(case, say=True):
            print("SURVIVES", line)
