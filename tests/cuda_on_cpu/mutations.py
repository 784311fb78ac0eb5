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
linear.drop("scores are read before they are written", "sum[i][j] + weight(r) : Acc(0);", file=header)
linear.swap("sees the next key", "scores.at[r][s] = ", "s <= r", "s <= r + 1", file=header)
linear.swap("a column too many of the state", "sum_parts(const Call<T> c)", "e < c.p.E", "e <= c.p.E")

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

MUTATIONS: dict[str, list[Mutation]] = {
    "case_attention": attention.mutations,
    "case_conv": gemm.mutations + depthwise.mutations,
    "case_conv_relu_pool": block.mutations,
    "case_linear_attention": linear.mutations,
    "case_max_pool": pool.mutations,
    "case_recurrent": recurrent.mutations,
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
