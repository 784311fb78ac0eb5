"""Training and attention spread over processes (gloo, started by torchrun) equal one process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pyseqnet
import pyseqnet.distributed as spread

HERE = Path(__file__).parent


def torchrun(ranks: int, *names: str) -> None:
    path = os.pathsep.join([str(Path(pyseqnet.__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    result = subprocess.run(
        [*command, str(HERE / "distributed_worker.py"), *names],
        capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]
    done = re.findall(r"rank (\d+): (\w+) done", result.stdout)
    assert sorted(done) == sorted((str(rank), name) for rank in range(ranks) for name in names)


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_training_of_a_transformer(how: str) -> None:
    torchrun(2, how)


@pytest.mark.parametrize("ranks", [2, 3])
def test_attention_over_ranks(ranks: int) -> None:
    torchrun(ranks, "linear", "local", "planted")


def test_groups_beside_each_other() -> None:
    torchrun(4, "groups")


def test_refusals() -> None:
    q = torch.randn(1, 2, 4, 8)
    with pytest.raises(ValueError, match="softmax"):
        spread.linear_attention(q, q, q, feature_map="softmax")
    with pytest.raises(ValueError, match="whole sequences"):
        spread.linear_attention(q, q, q, causal=True, cu_seqlens=torch.tensor([0, 4]))
    with pytest.raises(ValueError, match="decay needs causal"):
        spread.linear_attention(q, q, q, decay=0.5)
    with pytest.raises(ValueError, match="a constant across ranks"):
        spread.linear_attention(q, q, q, causal=True, decay=torch.full((2,), 0.5, requires_grad=True))
    with pytest.raises(ValueError, match="same positions"):
        spread.local_attention(q, q[:, :, :3], q, 2)
    with pytest.raises(ValueError, match="left"):
        spread.local_attention(q, q, q, -1)
    for call in (lambda: spread.linear_attention(q, q, q), lambda: spread.local_attention(q, q, q, 2)):
        with pytest.raises(RuntimeError, match="init_process_group"):
            call()
