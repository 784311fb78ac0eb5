"""The environment variables that steer dispatch: PYSEQNET_FORCE, PYSEQNET_VERBOSE, PYSEQNET_ISA, PYSEQNET_WINOGRAD."""

from __future__ import annotations

import re

import pytest
import torch
from support import environment, forced, run_python

import pyseqnet
import pyseqnet.functional as F
from pyseqnet import _C

TABLES = _C.dispatch_tables()
FAMILIES = {
    "conv": ("conv_forward", "conv_input_gradient", "conv_weight_gradient", "conv_bias_gradient"),
    "max_pool": ("max_pool_forward", "max_pool_backward", "max_pool_indices"),
    "conv_relu_pool": (
        "conv_relu_pool_forward", "conv_relu_pool_input_gradient", "conv_relu_pool_weight_gradient",
        "conv_relu_pool_bias_gradient",
    ),
    "recurrent": ("recurrent_forward", "recurrent_backward"),
    "attention": (
        "attention_forward", "attention_weights", "attention_delta", "attention_backward", "attention_bias_gradient",
    ),
    "additive_attention": (
        "additive_attention_forward", "additive_attention_weights", "additive_attention_backward",
    ),
    "linear_attention": ("linear_attention_forward", "linear_attention_backward"),
    "chain": ("ctc_loss", "crf_log_likelihood", "crf_gradient", "crf_viterbi"),
}  # fmt: skip
OPERATIONS = [operation for operations in FAMILIES.values() for operation in operations]
LINE = re.compile(r"pyseqnet: (\w+) (.+) -> ([a-z]\w*)( \((.+)\))?")


def step(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """Every operation once."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_()

    x, w, b = normal(1, 2, 8, 9), normal(3, 2, 3, 3), normal(3)
    y, indices = F.max_pool2d(F.conv2d(x, w, b), 2, return_indices=True)
    results = [y.detach(), indices, *torch.autograd.grad(y.sum(), (x, w, b))]
    fused = F.conv2d_relu_max_pool2d(x, w, b)
    results += [fused.detach(), *torch.autograd.grad(fused.sum(), (x, w, b))]
    sequence, parameters = normal(4, 2, 3), [normal(20, 3), normal(20, 5), normal(20), normal(20)]
    hidden, _ = F.lstm(sequence, None, parameters)
    results += [hidden.detach(), *torch.autograd.grad(hidden.sum(), (sequence, *parameters))]
    q, k, v, mask = normal(1, 2, 5, 8), normal(1, 2, 6, 8), normal(1, 2, 6, 4), normal(5, 6)
    out, weights = F.scaled_dot_product_attention(q, k, v, mask, return_weights=True)
    results += [out.detach(), weights.detach(), *torch.autograd.grad(out.sum(), (q, k, v, mask))]
    additive = (*(t.flatten(0, 1) for t in (q, k, v)), normal(8))
    out, weights = F.additive_attention(*additive, return_weights=True)
    results += [out.detach(), weights.detach(), *torch.autograd.grad(out.sum(), (q, k, v))]
    out = F.linear_attention(q, k, v)
    results += [out.detach(), *torch.autograd.grad(out.sum(), (q, k, v))]
    logits, tags = normal(4, 2, 3), torch.ones(2, 4, dtype=torch.int64)
    loss = F.ctc_loss(logits, tags[:, :1], [4, 4], [1, 1], from_logits=True)
    results += [loss.detach(), *torch.autograd.grad(loss, logits)]
    chain = (logits.transpose(0, 1), None, normal(3), normal(3), normal(3, 3))
    llh = F.crf_log_likelihood(chain[0], tags, *chain[1:])
    results += [llh.detach(), *torch.autograd.grad(llh.sum(), (logits, *chain[2:]))]
    return (*results, F.crf_decode(*chain, return_scores=True)[1])


def test_tables_name_every_operation_and_end_with_the_reference() -> None:
    assert set(TABLES) == set(OPERATIONS)
    for operation, tables in TABLES.items():
        assert tables["cpu"][-1] == "reference", operation
        for device, names in tables.items():
            assert len(set(names)) == len(names), f"{operation} on {device}: a name occurs twice in {names}"
            assert all(re.fullmatch(r"[a-z0-9_]+", name) for name in names)
        if pyseqnet.build_info()["cuda"]:
            assert tables["cuda"], operation


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_unknown_kernel_is_an_error_that_lists_the_known_ones(operation: str) -> None:
    with forced(operation, "abacus"), pytest.raises(RuntimeError) as caught:
        step()
    text = str(caught.value)
    assert f"{operation}: PYSEQNET_FORCE asks for 'abacus'" in text
    for name in TABLES[operation]["cpu"]:
        assert name in text
    assert ".cpp" not in text
    assert ".h" not in text


def test_a_family_can_be_pinned_and_an_operation_of_it_otherwise(capfd: pytest.CaptureFixture[str]) -> None:
    pins = ",".join(f"{family}:reference" for family in FAMILIES)
    with environment(PYSEQNET_FORCE=pins, PYSEQNET_VERBOSE="1"):
        step()
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == len(OPERATIONS)
    assert all("-> reference" in line for line in lines)
    with environment(PYSEQNET_FORCE="conv:abacus,conv_forward:reference"):
        F.conv2d(torch.zeros(1, 1, 3, 3), torch.zeros(1, 1, 1, 1))
        with pytest.raises(RuntimeError, match=r"conv_\w+_gradient: PYSEQNET_FORCE"):
            step()


def test_pins_do_not_reach_other_families() -> None:
    with forced("max_pool", "abacus"):
        F.conv2d(torch.zeros(1, 1, 3, 3), torch.zeros(1, 1, 1, 1))
    for nonsense in ("", ",", "conv", ":", "other:thing,,"):
        with environment(PYSEQNET_FORCE=nonsense):
            step()


def test_verbose_prints_one_line_a_call_with_the_refusals(capfd: pytest.CaptureFixture[str]) -> None:
    with environment(PYSEQNET_VERBOSE="1"):
        step()
    lines = capfd.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines[:3]] == ["conv_forward", "max_pool_forward", "max_pool_indices"]
    assert sorted(line.split()[1] for line in lines) == sorted(OPERATIONS)
    for line in lines:
        found = LINE.fullmatch(line)
        assert found, line
        operation, problem, chosen, refusals = found[1], found[2], found[3], found[5]
        names = TABLES[operation]["cpu"]
        assert chosen in names
        assert re.search(r"N\d+ C\d+ \d+x\d+|[TB]\d+ ", problem), "extents by their letters"
        # exactly those before the chosen one refused, each with a reason
        passed_over = names[: names.index(chosen)]
        found_names = [part.split(": ")[0] for part in refusals.split("; ")] if refusals else []
        assert found_names == passed_over
        if refusals:
            assert all(len(part.split(": ", 1)[1].split()) > 1 for part in refusals.split("; ")), "a reason in words"


@pytest.mark.parametrize("value", ["", "0"])
def test_quiet_otherwise(capfd: pytest.CaptureFixture[str], value: str) -> None:
    with environment(PYSEQNET_VERBOSE=value):
        step()
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "avx512bf16"])
def test_isa_caps_the_instruction_set(isa: str, capfd: pytest.CaptureFixture[str]) -> None:
    order = ["portable", "avx2", "avx512", "avx512bf16"]
    expected = step()
    with environment(PYSEQNET_ISA=isa, PYSEQNET_VERBOSE="1"):
        info = pyseqnet.build_info()
        found = step()
    detected = info["cpu_isa_detected"]
    assert info["cpu_isa"] == order[min(order.index(isa), order.index(detected))]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    for line in capfd.readouterr().err.splitlines():
        found_line = LINE.fullmatch(line)
        assert found_line, line
        chosen = found_line[3]
        named = [other for other in order if chosen == other or chosen.endswith("_" + other)]
        assert all(order.index(other) <= order.index(isa) for other in named), line


def test_an_unknown_isa_is_ignored() -> None:
    with environment(PYSEQNET_ISA="abacus"):
        assert pyseqnet.build_info()["cpu_isa"] == pyseqnet.build_info()["cpu_isa_detected"]


def test_a_kernel_beyond_the_capped_instruction_set_is_refused() -> None:
    beyond = [name for name in TABLES["max_pool_forward"]["cpu"] if "avx512" in name]
    if not beyond:
        pytest.skip("this build has no AVX-512 kernels")
    refused = pytest.raises(RuntimeError, match="lacks the instruction set")
    with environment(PYSEQNET_ISA="portable"), forced("max_pool_forward", beyond[0]), refused:
        F.max_pool2d(torch.zeros(1, 1, 4, 4), 2)


def test_winograd_can_be_turned_off(capfd: pytest.CaptureFixture[str]) -> None:
    x, w = torch.randn(2, 64, 28, 28), torch.randn(64, 64, 3, 3)
    with environment(PYSEQNET_VERBOSE="1"):
        with environment(PYSEQNET_WINOGRAD="0"):
            y = F.conv2d(x, w, padding=1)
        assert "-> winograd" not in capfd.readouterr().err
        torch.testing.assert_close(F.conv2d(x, w, padding=1), y, rtol=0, atol=5e-6 * y.abs().max().item())
    names = [name for name in TABLES["conv_forward"]["cpu"] if "winograd" in name]
    if not names:
        pytest.skip("this build has no Winograd kernel")
    refused = pytest.raises(RuntimeError, match=r"PYSEQNET_WINOGRAD=0|lacks the instruction set")
    with environment(PYSEQNET_WINOGRAD="0"), forced("conv_forward", names[-1]), refused:
        F.conv2d(x, w)


def test_variables_of_the_shell_count_too() -> None:
    code = "import torch, pyseqnet.functional as F; F.max_pool1d(torch.zeros(1, 1, 4), 2)"
    result = run_python(code, PYSEQNET_FORCE="max_pool:reference", PYSEQNET_VERBOSE="1")
    assert result.returncode == 0, result.stderr
    assert "pyseqnet: max_pool_forward N1 C1 1x4" in result.stderr
    assert "-> reference" in result.stderr
