"""Compiles every CUDA kernel for every architecture and says what came out: `make kernels`.

    python tests/kernel_report.py [--archs "80;90a"] [--out build/kernels.md] [kernels/pool/max_pool_generic.cu ...]

A line a kernel and architecture: registers, spilled bytes, static shared memory, occupancy (resident warps of those
that a multiprocessor takes), and how many of the instructions that matter its machine code holds. Exit status 1 if a
kernel spills more than `ALLOWED_SPILLS` explains, if ptxas serialised a wgmma, or if an instruction of `EXPECTED` or
`EXPECTED_OF_FILES` is missing. What an architecture does not have (a kernel whose body is empty there) is not judged.

Needs nvcc and nvdisasm: a CUDA toolkit's, or `pip install nvidia-cuda-nvcc nvidia-cuda-nvdisasm` (Triton's wheel has an
nvdisasm, too). Without nvdisasm the instructions are not counted.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "cuda_on_cpu"))
import build as simulator_build

ROOT = Path(__file__).resolve().parent.parent
ARCHS = "80;90a;100;120"

# Bytes that a kernel may spill on an architecture, and why it is right to let it: (kernel, architecture or "any").
ALLOWED_SPILLS: dict[tuple[str, str], tuple[int, str]] = {
    ("implicit_gemm", "90a"): (16, "two values of the 32-row tile, outside its loop"),
    ("implicit_gemm", "100"): (16, "two values of the 32-row tile, outside its loop"),
    ("write_value_gradients", "100"): (8, "two values; one block fewer a multiprocessor would cost more"),
    ("write_decay_gradients", "100"): (8, "float64, which nobody trains in: a value of the sum over pairs"),
    ("write_query_gradients", "120"): (60, "float64, of which this architecture has next to no units anyway"),
    ("max_pool_backward_gather", "100"): (16, "where the result goes: from before the loops to behind them"),
    ("max_pool_backward_gather", "120"): (16, "where the result goes: from before the loops to behind them"),
    ("max_pool_forward_direct", "100"): (16, "where the result goes: from before the loops to behind them"),
    ("max_pool_forward_direct", "120"): (8, "where the result goes: from before the loops to behind them"),
    ("recurrent_persistent", "100"): (108, "a GRU's forward in a grid, once a step; no such device has run it yet"),
    ("recurrent_persistent", "120"): (108, "a GRU's forward in a grid, once a step; no such device has run it yet"),
    ("recurrent_step", "120"): (
        24,
        "backward cells of 16-bit LSTM and GRU, once a step; no such device has run it yet",
    ),
}

# Machine instructions that a kernel is written for: (kernel, architecture or "any") -> patterns that must occur in each
# instantiation.
EXPECTED: dict[tuple[str, str], tuple[str, ...]] = {
    ("implicit_gemm", "any"): (r"\bLDS\.128",),  # shared memory is read by vectors
    ("gathered_product", "any"): (r"\bHMMA\b", r"\bLDGSTS\b", r"\bLDSM\b"),
    ("weight_product", "any"): (r"\bHMMA\b", r"\bLDGSTS\b"),
    ("product_wgmma", "90a"): (r"\bHGMMA\b", r"\bUTMALDG\b"),
    ("weight_wgmma", "90a"): (r"\bHGMMA\b", r"\bUTMALDG\b"),
    ("attention_forward_mma", "any"): (r"\bHMMA\b", r"\bLDGSTS\b", r"\bLDSM\b"),
    ("attention_forward_wgmma", "90a"): (r"\bHGMMA\b", r"\bUTMALDG\b", r"\bUTMASTG\b", r"\bUSETMAXREG\b"),
    ("attention_backward_mma", "any"): (r"\bHMMA\b", r"\bLDGSTS\b", r"\bLDSM\b"),
    ("sweep_chunks", "any"): (r"\bHMMA\b", r"\bLDGSTS\b", r"\bLDSM\b"),
    ("recurrent_mma_product", "any"): (r"\bHMMA\b", r"\bLDGSTS\b", r"\bLDSM\b"),
    # fragments of h are read as vectors; for sm_80 the kernels of clusters are empty
    ("recurrent_persistent", "90a"): (r"\bHMMA\b", r"\bLDS\.128"),
    ("recurrent_persistent", "100"): (r"\bHMMA\b", r"\bLDS\.128"),
    ("recurrent_persistent", "120"): (r"\bHMMA\b", r"\bLDS\.128"),
}

# A file's name promises an architecture and its tensor cores: some kernel of it must keep that on each architecture.
EXPECTED_OF_FILES: list[tuple[str, str, tuple[str, ...]]] = [
    ("*_sm80.cu", "any", (r"\bHMMA\b",)),
    # sources of other blocks come by cp.async; recurrent_block_sm80.cu has them in its own shared memory
    ("recurrent_grid_sm80.cu", "any", (r"\bLDGSTS\b",)),
    ("*_sm90a.cu", "90a", (r"\bHGMMA\b", r"\bUTMALDG\b")),
    ("max_pool_generic.cu", "any", (r"\bLDG\.[A-Z.]*128",)),  # four floats, or eight halves, a thread
]

# Counted in every kernel: what tells a memory-bound from a compute-bound one, and a tensor-core kernel from others.
COUNTED = {
    "FFMA": r"\bFFMA\b",
    "DFMA": r"\bDFMA\b",
    "LDG.128": r"\bLDG\.E\.128|\bLDG\.E\.[A-Z.]*128",
    "LDG": r"\bLDG\b",
    "LDS.128": r"\bLDS\.128",
    "LDGSTS": r"\bLDGSTS\b",
    "UTMALDG": r"\bUTMALDG\b",
    "HMMA": r"\bHMMA\b",
    "HGMMA": r"\bHGMMA\b",
}


@dataclass
class Limits:
    """What a multiprocessor holds."""

    threads: int
    blocks: int
    shared: int
    registers: int = 65536


def limits_of(arch: str) -> Limits:
    number = int(re.sub(r"\D", "", arch))
    if number >= 120:
        return Limits(1536, 24, 100 * 1024)
    if number >= 90:
        return Limits(2048, 32, 228 * 1024)
    if number in (86, 89):
        return Limits(1536, 24, 100 * 1024)
    return Limits(2048, 32, 164 * 1024)


@dataclass
class Kernel:
    file: str
    arch: str
    name: str  # mangled
    registers: int = 0
    spilled: int = 0
    shared: int = 0
    threads: int = 0  # of __launch_bounds__
    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    @property
    def base(self) -> str:
        """The name as the source has it: the last identifier before template arguments."""
        return base_name(self.name)

    def occupancy(self) -> float:
        return 32 * self.warps() / limits_of(self.arch).threads

    def warps(self) -> int:
        """Resident warps a multiprocessor, as registers, static shared memory and threads allow."""
        limit = limits_of(self.arch)
        warps = -(-self.threads // 32)
        if not warps:
            return 0
        by_registers = limit.registers // (-(-self.registers * 32 // 256) * 256 * warps) if self.registers else 99
        by_shared = limit.shared // (self.shared + 1024)
        blocks = min(by_registers, by_shared, limit.threads // (32 * warps), limit.blocks)
        return blocks * warps


def base_name(mangled: str) -> str:
    """`implicit_gemm` of `_ZN8pyseqnet13implicit_gemmIfLi1E...`: nested names are length-prefixed; the last one."""
    text = mangled.removeprefix("_Z").removeprefix("N")
    name = mangled
    while found := re.match(r"\d+", text):
        length = int(found[0])
        name, text = text[found.end() : found.end() + length], text[found.end() + length :]
    return name


def instruments() -> dict[str, str | None]:
    """Paths of cuobjdump and nvdisasm: of the toolkit, of Triton's package, of PyPI's nvidia-cuda-nvdisasm, of PATH."""
    folders = [str(Path(home) / "bin") for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    if triton := importlib.util.find_spec("triton"):
        folders += [
            str(Path(place) / "backends" / "nvidia" / "bin") for place in triton.submodule_search_locations or []
        ]
    folders += [str(tool.parent) for tool in simulator_build.packaged("bin/nvdisasm")]
    path = os.pathsep.join([*folders, os.environ.get("PATH", "")])
    return {tool: shutil.which(tool, path=path) for tool in ("cuobjdump", "nvdisasm")}


def parse_resources(text: str, file: str, arch: str) -> dict[str, Kernel]:
    """What `ptxas -v` says of each entry function."""
    kernels: dict[str, Kernel] = {}
    current: Kernel | None = None
    for line in text.splitlines():
        if found := re.search(r"Compiling entry function '([^']+)'", line):
            current = kernels.setdefault(found[1], Kernel(file, arch, found[1]))
        elif current and (found := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line)):
            current.spilled = max(int(found[1]), int(found[2]))
        elif current and (found := re.search(r"Used (\d+) registers", line)):
            current.registers = int(found[1])
            shared = re.search(r"(\d+) bytes smem", line)
            current.shared = int(shared[1]) if shared else 0
        if "wgmma" in line and "serializ" in line.lower():
            target = current or kernels.setdefault("?", Kernel(file, arch, "?"))
            target.faults.append("wgmma serialised: " + line.strip())
    return kernels


def count_instructions(disassembly: str) -> dict[str, Counter[str]]:
    """Of each function of nvdisasm's output, the instructions of COUNTED and whole mnemonics."""
    counts: dict[str, Counter[str]] = {}
    current: Counter[str] | None = None
    for line in disassembly.splitlines():
        if found := re.match(r"\.text\.(\S+?):", line.strip()):
            current = counts.setdefault(found[1], Counter())
        elif current is not None and (found := re.search(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line)):
            current[found[1]] += 1
    return counts


def matching(counts: Counter[str], pattern: str) -> int:
    return sum(count for mnemonic, count in counts.items() if re.search(pattern, mnemonic))


def examine(source: Path, arch: str, nvdisasm: str | None, folder: Path) -> list[Kernel]:
    """Compiles one file for one architecture."""
    nvcc = simulator_build.nvcc()
    cubin = folder / f"{source.stem}.{arch}.cubin"
    file = source.relative_to(ROOT).as_posix()
    command = [str(nvcc), "-std=c++20", "-O3", "-Ikernels", "-Xptxas=-v", f"-arch=sm_{arch}", "-cubin"]
    command.append(f'-DPYSEQNET_CUDA_ARCHS="{arch}"')
    done = subprocess.run([*command, "-o", str(cubin), str(source)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{file} does not compile for sm_{arch}:\n{done.stderr[-4000:]}")
    kernels = parse_resources(done.stdout + done.stderr, file, arch)
    elf = cubin.read_bytes()
    for kernel in kernels.values():
        kernel.threads = threads_of(elf, kernel.name)
    if nvdisasm:
        listing = subprocess.run([nvdisasm, "-c", str(cubin)], capture_output=True, text=True)
        if listing.returncode:
            raise SystemExit(f"nvdisasm refused {cubin.name}: {listing.stderr[-1000:]}")
        for name, counts in count_instructions(listing.stdout).items():
            if name in kernels:
                kernels[name].counts = counts
    for kernel in kernels.values():
        judge(kernel, counted=bool(nvdisasm))
    return list(kernels.values())


def threads_of(elf: bytes, name: str) -> int:
    """Threads of `__launch_bounds__`: attribute 0x05 (EIATTR_MAX_THREADS) of section .nv.info.<kernel>."""
    section = section_of(elf, f".nv.info.{name}")
    # Each attribute: a format byte, the attribute, then two bytes of value, or of size before the value.
    at = 0
    while at + 4 <= len(section):
        form, attribute, size = section[at], section[at + 1], int.from_bytes(section[at + 2 : at + 4], "little")
        length = size if form == 4 else 0
        if attribute == 0x05 and length >= 12:
            extents = [int.from_bytes(section[at + 4 + 4 * i : at + 8 + 4 * i], "little") for i in range(3)]
            return extents[0] * extents[1] * extents[2]
        at += 4 + length
    return 0


def section_of(elf: bytes, wanted: str) -> bytes:
    """A section of a 64-bit ELF file by name; empty if there is none."""

    def number(at: int, size: int) -> int:
        return int.from_bytes(elf[at : at + size], "little")

    table, entry, count, names = number(0x28, 8), number(0x3A, 2), number(0x3C, 2), number(0x3E, 2)
    strings = number(table + names * entry + 0x18, 8)
    for i in range(count):
        header = table + i * entry
        start = strings + number(header, 4)
        if elf[start : elf.index(b"\0", start)].decode() == wanted:
            offset, size = number(header + 0x18, 8), number(header + 0x20, 8)
            return elf[offset : offset + size]
    return b""


def judge(kernel: Kernel, counted: bool) -> None:
    allowed = max((ALLOWED_SPILLS.get((kernel.base, a), (0, ""))[0] for a in (kernel.arch, "any")), default=0)
    if kernel.spilled > allowed:
        kernel.faults.append(f"spills {kernel.spilled} bytes, allowed {allowed}")
    if not counted:
        return
    for arch in (kernel.arch, "any"):
        for pattern in EXPECTED.get((kernel.base, arch), ()):
            if not matching(kernel.counts, pattern):
                kernel.faults.append(f"holds no {pattern}")


def missing_of_files(kernels: list[Kernel]) -> list[str]:
    """What EXPECTED_OF_FILES promises and no kernel of the file holds."""
    faults = []
    for file, arch in sorted({(kernel.file, kernel.arch) for kernel in kernels}):
        mine = [kernel for kernel in kernels if (kernel.file, kernel.arch) == (file, arch)]
        for pattern, of_arch, instructions in EXPECTED_OF_FILES:
            if fnmatch.fnmatch(Path(file).name, pattern) and of_arch in ("any", arch):
                faults += [
                    f"{file}, sm_{arch}: no kernel holds {instruction}"
                    for instruction in instructions
                    if not any(matching(kernel.counts, instruction) for kernel in mine)
                ]
    return faults


def demangle(names: list[str]) -> dict[str, str]:
    tool = shutil.which("c++filt")
    if not tool or not names:
        return {name: name for name in names}
    text = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    plain = [
        re.sub(r"\(.*", "", line.replace("(anonymous namespace)::", "").replace("(bool)", "")).replace("pyseqnet::", "")
        for line in text.splitlines()
    ]
    plain = [line.removeprefix("void ") for line in plain]
    return dict(zip(names, plain, strict=True))


def report(kernels: list[Kernel], counted: bool) -> str:
    plain = demangle(sorted({kernel.name for kernel in kernels}))
    shown = [name for name in COUNTED if counted]
    lines = [
        "| kernel | sm | registers | spilled | shared | threads | warps | occupancy | " + " | ".join(shown) + " |",
        "|---|---|--:|--:|--:|--:|--:|--:|" + "--:|" * len(shown),
    ]
    for kernel in sorted(kernels, key=lambda k: (k.file, plain[k.name], k.arch)):
        cells = [str(matching(kernel.counts, COUNTED[name]) or "") for name in shown]
        lines.append(
            f"| `{plain[kernel.name]}` | {kernel.arch} | {kernel.registers} | {kernel.spilled or ''} | {kernel.shared} "
            f"| {kernel.threads or ''} | {kernel.warps() or ''} | {kernel.occupancy():.0%} | "
            + " | ".join(cells)
            + " |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="*", type=Path, help="default: every .cu of kernels/")
    parser.add_argument("--archs", default=os.environ.get("PYSEQNET_CUDA_ARCHS", ARCHS))
    parser.add_argument("--tools", action="store_true", help="say which tools there are; fail if one is missing")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "kernels.md")
    arguments = parser.parse_args()
    nvdisasm = instruments()["nvdisasm"]
    if arguments.tools:
        print(f"nvcc: {simulator_build.nvcc()}, nvdisasm: {nvdisasm}")
        return 0 if simulator_build.nvcc() and nvdisasm else 1
    if not simulator_build.nvcc():
        print(
            "make kernels: there is no nvcc in CUDA_HOME, PATH or nvidia-cuda-nvcc; nothing compiled", file=sys.stderr
        )
        return 1
    if not nvdisasm:
        print("nvdisasm is not to be found (CUDA toolkit, nvidia-cuda-nvdisasm, triton): instructions are not counted")
    sources = [path.resolve() for path in arguments.sources] or sorted((ROOT / "kernels").glob("*/*.cu"))
    archs = [arch for arch in re.split(r"[;, ]+", arguments.archs) if arch]
    workers = int(os.environ.get("MAX_JOBS", 0)) or len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(workers) as pool:
        jobs = [pool.submit(examine, source, arch, nvdisasm, Path(folder)) for source in sources for arch in archs]
        kernels = [kernel for job in jobs for kernel in job.result()]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(report(kernels, bool(nvdisasm)))
    faults = [f"{k.file}, {k.base}, sm_{k.arch}: {fault}" for k in kernels for fault in k.faults]
    if nvdisasm:
        faults += missing_of_files(kernels)
    print(f"{len(kernels)} kernels of {len(sources)} files for {', '.join(archs)}: {arguments.out}")
    for fault in faults:
        print(f"FAULT {fault}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
