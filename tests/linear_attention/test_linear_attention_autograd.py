"""Linear attention inside torch: gradients of every order, compilers, autocast, threads, and the layer."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch._dynamo.testing
from support import normal, run_python, threads
from torch import Tensor

import pyseqnet.functional as F
import pyseqnet.nn as nn

ops = torch.ops.pyseqnet
MAPS = ("identity", "elu", "relu", "exp", "softmax")


def inputs(device: str, dtype: torch.dtype = torch.float64, length: int = 5) -> list[Tensor]:
    return [normal((2, 2, length, 3), i, dtype).to(device).requires_grad_() for i in range(3)]


def states(device: str, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [
        normal((2, 2, 3, 3), 5, dtype).to(device).requires_grad_(),
        normal((2, 2, 3), 6, dtype).abs().to(device).requires_grad_(),
    ]


OPTIONS = [
    *({"feature_map": name} for name in MAPS),
    {"causal": True},
    {"causal": True, "feature_map": "relu", "normalize": False},
    {"causal": True, "lengths": True, "scale": 0.5},
    {"causal": True, "state": True, "eps": 0.1},
    {"causal": True, "state": True, "lengths": True, "decay": [0.5, 0.9]},
    {"causal": True, "normalize": False, "decay": 0.7},
    {"causal": True, "state": True, "packed": True, "decay": 0.7},
    {"packed": True, "state": True},
    {"packed": True, "feature_map": "softmax"},
    {"state": True, "lengths": True},
    {"state": True, "normalize": False, "feature_map": "identity"},
]


def call(options: dict, device: str, function=F.linear_attention):
    """A function of query, key, value [, S, z] [, decay] and those tensors."""
    options = dict(options)
    lengths = torch.tensor([5, 3], device=device) if options.pop("lengths", False) else None
    packed = torch.tensor([0, 2, 2, 10], device=device) if options.pop("packed", False) else None
    tensors = inputs(device)
    if packed is not None:  # (2, 2, 5, 3) -> (1, 2, 10, 3), three sequences, one of them empty
        tensors = [t.detach().transpose(0, 1).reshape(1, 2, 10, 3).requires_grad_() for t in tensors]
    if options.get("feature_map") == "identity":  # keep sums away from zero
        tensors[:2] = [t.detach().abs().requires_grad_() for t in tensors[:2]]
    with_state = options.pop("state", False)
    if with_state:
        tensors += states(device)
        if packed is not None:
            tensors[3:] = [torch.cat([t, t[:1]]).detach().requires_grad_() for t in tensors[3:]]
    decayed = "decay" in options
    if decayed:
        tensors.append(torch.tensor(options.pop("decay"), dtype=torch.float64, device=device).requires_grad_())

    def run(*t: Tensor):
        start = t[3:5] if with_state else None
        if decayed:
            options["decay"] = t[-1]
        result = function(*t[:3], key_lengths=lengths, cu_seqlens=packed, initial_state=start, return_state=with_state,
                          **options)  # fmt: skip
        return (result[0], *result[1]) if with_state else result

    return run, tensors


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradcheck(device: str, options: dict) -> None:
    function, tensors = call(options, device)
    assert torch.autograd.gradcheck(function, tensors)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradgradcheck(device: str, options: dict) -> None:
    function, tensors = call(options, device)
    assert torch.autograd.gradgradcheck(function, tensors)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_reference_is_the_function(device: str, options: dict) -> None:
    ours, tensors = call(options, device)
    reference, _ = call(options, device, F.linear_attention_reference)
    for a, b in zip(ours(*tensors), reference(*tensors), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


def test_third_derivative(device: str) -> None:
    def third(function) -> Tensor:
        q, k, v = inputs(device)
        result = function(q, k, v, causal=True).square().sum()
        for _ in range(2):
            (gradient,) = torch.autograd.grad(result, k, create_graph=True)
            result = gradient.square().sum()
        return torch.autograd.grad(result, q)[0]

    torch.testing.assert_close(third(F.linear_attention), third(F.linear_attention_reference))


@pytest.mark.parametrize("wanted", range(1, 32))
def test_any_subset_of_inputs_may_want_gradients(device: str, wanted: int) -> None:
    function, tensors = call({"causal": True, "state": True}, device)
    everything = torch.autograd.grad(sum(t.sum() for t in function(*tensors)), tensors)
    some = [t.detach().requires_grad_(bool(wanted >> i & 1)) for i, t in enumerate(tensors)]
    chosen = [t for t in some if t.requires_grad]
    found = torch.autograd.grad(sum(t.sum() for t in function(*some)), chosen)
    expected = [g for i, g in enumerate(everything) if wanted >> i & 1]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 1), (1, 2)])
@pytest.mark.parametrize("twice", [False, True])
def test_outputs_that_nobody_used_have_no_gradient(device: str, used: tuple[int, ...], twice: bool) -> None:
    def gradients(function) -> list[Tensor]:
        run, tensors = call({"causal": True, "state": True}, device, function)
        results = run(*tensors)
        total = sum(results[i].square().sum() for i in used)
        found = torch.autograd.grad(total, tensors, create_graph=twice, materialize_grads=True)
        if twice:
            found = torch.autograd.grad(sum(g.square().sum() for g in found), tensors, materialize_grads=True)
        return list(found)

    for a, b in zip(gradients(F.linear_attention), gradients(F.linear_attention_reference), strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("kind", ["expanded", "scalar", "narrowed", "transposed"])
def test_gradients_arrive_with_any_strides(device: str, kind: str) -> None:
    q, k, v = inputs(device, length=6)
    out = F.linear_attention(q, k, v, causal=True)
    g = {
        "expanded": lambda: normal((1, 1, 1, 3), 1).to(device).expand(out.shape),
        "scalar": lambda: torch.ones((), dtype=torch.float64, device=device).expand(out.shape),
        "narrowed": lambda: normal((2, 2, 6, 7), 1).to(device)[..., 2:5],
        "transposed": lambda: normal((2, 2, 3, 6), 1).to(device).transpose(2, 3),
    }[kind]()
    found = torch.autograd.grad(out, (q, k, v), g)
    wanted = torch.autograd.grad(F.linear_attention(q, k, v, causal=True), (q, k, v), g.contiguous())
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)


def test_rows_first_tensors_are_read_in_place_and_answered_in_kind(device: str) -> None:
    leaves = [normal((2, 7, 3, 4), i, torch.float32).to(device).requires_grad_() for i in range(3)]
    out = F.linear_attention(*(t.transpose(1, 2) for t in leaves), causal=True)
    assert out.transpose(1, 2).is_contiguous()
    torch.autograd.backward(out.sum())
    assert all(t.grad.is_contiguous() for t in leaves)
    plain = F.linear_attention(*(t.detach().transpose(1, 2).contiguous() for t in leaves), causal=True)
    assert torch.equal(out, plain)


@pytest.mark.parametrize("with_saved", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_opcheck(device: str, causal: bool, with_saved: bool) -> None:
    q, k, v = (t.detach() for t in inputs(device, torch.float32, 70))
    lengths = torch.tensor([70, 11], device=device)
    state = [t.detach() for t in states(device, torch.float32)]
    tests = ("test_schema", "test_faketensor")
    for arguments in (
        (q, k, v, None, None, None, 1, causal, True, 1.0, 1e-6, False, with_saved),
        (q, k, v, lengths, *state, 2, causal, False, 0.5, 1e-6, True, with_saved),
        (*(t.transpose(1, 2) for t in (q, k, v)), None, None, None, 0, causal, True, 1.0, 1.0, True, True),
    ):  # fmt: skip
        torch.library.opcheck(ops.linear_attention_forward, arguments, test_utils=tests)
    out, inverse, saved, last, last_z = ops.linear_attention_forward(
        q, k, v, lengths, *state, 1, causal, True, 1.0, 1e-6, True, True
    )
    for gradients, need in (((None, None), False), ((last, last_z), True)):
        arguments = (out, *gradients, q, k, v, lengths, out, inverse, saved, 1, causal, True, 1.0, need)
        torch.library.opcheck(ops.linear_attention_backward, arguments, test_utils=tests)
        if causal:
            decay = torch.tensor([0.5, 0.9], dtype=torch.float64, device=device)
            arguments = (*arguments, decay, None, True)
            torch.library.opcheck(ops.linear_attention_backward, arguments, test_utils=tests)


def test_opcheck_of_the_step(device: str) -> None:
    q, k, v = (normal((2, 3, 5), i, torch.float32).to(device) for i in range(3))
    state = normal((2, 3, 5, 5), 3, torch.float32).to(device), normal((2, 3, 5), 4, torch.float32).to(device)
    for start in ((None, None), state):
        torch.library.opcheck(
            ops.linear_attention_step,
            (q, k, v, *start, 1, True, 1.0, 1e-6),
            test_utils=("test_schema", "test_faketensor"),
        )


def test_steps_can_be_differentiated(device: str) -> None:
    q, k, v = inputs(device)
    state, outs = None, []
    for i in range(5):
        out, state = F.linear_attention_step(q[:, :, i], k[:, :, i], v[:, :, i], state)
        outs.append(out)
    whole = F.linear_attention(q, k, v, causal=True)
    g = normal(tuple(whole.shape), 3).to(device)
    for a, b in zip(
        torch.autograd.grad(torch.stack(outs, 2), (q, k, v), g), torch.autograd.grad(whole, (q, k, v), g), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


@pytest.fixture
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_compile(device: str, causal: bool, dynamic: bool) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor):
        out, (state, z) = F.linear_attention(q, k, v, causal=causal, key_lengths=lengths, return_state=True)
        return F.linear_attention(q, k, out, causal=causal, initial_state=(state, z)) * 2 + state.mean()

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for length in (20, 70, 131):
        q, k, v = inputs(device, torch.float32, length)
        lengths = torch.tensor([length, 7], device=device)
        ours, plain = compiled(q, k, v, lengths), function(q, k, v, lengths)
        torch.testing.assert_close(ours, plain)
        for a, b in zip(
            torch.autograd.grad(ours.sum(), (q, k, v)), torch.autograd.grad(plain.sum(), (q, k, v)), strict=True
        ):
            torch.testing.assert_close(a, b)


@pytest.mark.usefixtures("_fresh_compiler")
def test_compile_the_step(device: str) -> None:
    q, k, v = (normal((2, 3, 5), i, torch.float32).to(device) for i in range(3))
    compiled = torch.compile(F.linear_attention_step, fullgraph=True, backend="aot_eager")
    out, state = compiled(q, k, v)
    again, last = compiled(q, k, v, state)
    wanted, first = F.linear_attention_step(q, k, v)
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close((again, last), F.linear_attention_step(q, k, v, first))


@pytest.mark.usefixtures("_fresh_compiler")
def test_dynamic_lengths_do_not_recompile() -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    layer = nn.LinearAttention(8, 2, causal=True, batch_first=True)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    frames = []
    for length in (9, 64, 65, 200):
        x = torch.randn(2, length, 8)
        torch.testing.assert_close(compiled(x), layer(x))
        frames.append(counter.frame_count)
    assert frames == frames[:1] * 4  # the compiler may begin twice, when it finds that eps is a constant


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast_casts_the_inputs_and_not_the_states(device: str, low: torch.dtype) -> None:
    q, k, v = inputs(device, torch.float32)
    with torch.autocast(device, dtype=low):
        out, (state, z) = F.linear_attention(q, k.to(low), v, causal=True, return_state=True)
    assert out.dtype == low
    assert state.dtype == z.dtype == torch.float32
    gradients = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(g.dtype == torch.float32 for g in gradients)


def test_forward_mode_and_functorch_work_or_are_refused_in_words() -> None:
    q, k, v = (t.detach() for t in inputs("cpu"))

    def function(x: Tensor) -> Tensor:
        return F.linear_attention(x, k, v).sum()

    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.func.jvp(function, (q,), (q,))
    with pytest.raises(RuntimeError, match=r"setup_context|vmap"):
        torch.func.grad(function)(q)
    batched = torch.vmap(lambda x: F.linear_attention(x, k, v))(torch.stack([q, q]))
    torch.testing.assert_close(batched[1], F.linear_attention(q, k, v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1, 1400, 8), (1, 3, 600, 16), (2, 8, 100, 16), (2, 8, 1, 16)])
@pytest.mark.parametrize("causal", [False, True])
def test_bitwise_equal_for_any_number_of_threads(shape: tuple[int, ...], dtype: torch.dtype, causal: bool) -> None:
    q, k, v = (normal(shape, i, dtype).requires_grad_() for i in range(3))
    g = normal(shape, 9, dtype)

    def run(count: int) -> list[Tensor]:
        with threads(count):
            out, (state, z) = F.linear_attention(q, k, v, causal=causal, return_state=True)
            return [
                out,
                state,
                z,
                *torch.autograd.grad([out, state.sum()], (q, k, v), [g, torch.ones_like(state.sum())]),
            ]

    first = run(1)
    for count in (2, 3, 2):
        for a, b in zip(run(count), first, strict=True):
            assert torch.equal(a, b)


def test_saved_tensors_notice_changes_in_place(device: str) -> None:
    q, k, v = inputs(device)
    out = F.linear_attention(q, k, v)
    with torch.no_grad():
        k.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_the_state_of_a_call_without_gradients_needs_none(device: str) -> None:
    with torch.no_grad():
        out, (state, _) = F.linear_attention(*inputs(device), return_state=True)
    assert not out.requires_grad
    assert not state.requires_grad


# --- the layer --------------------------------------------------------------------------------------------------


def by_hand(layer: nn.LinearAttention, q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    """The layer in plain torch; tensors (N, L, embed_dim)."""
    if layer.in_proj_weight is None:
        weights = (layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight)
    else:
        weights = layer.in_proj_weight.chunk(3)
    biases = (0, 0, 0) if layer.in_proj_bias is None else layer.in_proj_bias.chunk(3)
    heads = [
        (x @ w.T + b).unflatten(2, (layer.num_heads, -1)).transpose(1, 2)
        for x, w, b in zip((q, k, v), weights, biases, strict=True)
    ]
    out = F.linear_attention_reference(*heads, feature_map=layer.feature_map, causal=layer.causal, **options)
    return layer.out_proj(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 5, "vdim": 7}, {"feature_map": "relu"}], ids=str)
def test_layer_is_its_formula(device: str, options: dict, batch_first: bool) -> None:
    layer = nn.LinearAttention(12, 3, batch_first=batch_first, dtype=torch.float64, device=device, **options)
    q, k, v = normal((2, 6, 12), 0), normal((2, 9, layer.kdim), 1), normal((2, 9, layer.vdim), 2)
    q, k, v = (t.to(device) for t in (q, k, v))
    lengths = torch.tensor([9, 4], device=device)
    given = (q, k, v) if batch_first else tuple(t.transpose(0, 1) for t in (q, k, v))
    out = layer(*given, key_lengths=lengths)
    out = out if batch_first else out.transpose(0, 1)
    torch.testing.assert_close(out, by_hand(layer, q, k, v, key_lengths=lengths))
    unbatched = layer(q[0], k[0], v[0])
    torch.testing.assert_close(unbatched, by_hand(layer, q[:1], k[:1], v[:1])[0])


def test_layer_self_attention_and_decoding_agree(device: str) -> None:
    layer = nn.LinearAttention(8, 2, causal=True, batch_first=True, dtype=torch.float64, device=device)
    x = normal((2, 11, 8), 0).to(device)
    whole = layer(x)
    torch.testing.assert_close(whole, by_hand(layer, x, x, x))
    state = None
    for i in range(11):
        out, state = layer(x[:, i : i + 1], initial_state=state, return_state=True)
        torch.testing.assert_close(out, whole[:, i : i + 1])


def test_layer_takes_the_state_dict_of_torchs_attention() -> None:
    for options in ({}, {"kdim": 5, "vdim": 7}, {"bias": False}):
        ours, theirs = nn.LinearAttention(12, 3, **options), torch.nn.MultiheadAttention(12, 3, **options)
        assert {k: v.shape for k, v in ours.state_dict().items()} == {
            k: v.shape for k, v in theirs.state_dict().items()
        }
        ours.load_state_dict(theirs.state_dict())
        theirs.load_state_dict(ours.state_dict())


def test_layer_initialises_as_torchs_attention_does() -> None:
    torch.manual_seed(3)
    ours = nn.LinearAttention(12, 3)
    torch.manual_seed(3)
    theirs = torch.nn.MultiheadAttention(12, 3)
    for (name, a), (_, b) in zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_layer_trains_a_feature_map() -> None:
    layer = nn.LinearAttention(8, 2, feature_map=torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Softplus()))
    names = {name for name, _ in layer.named_parameters()}
    assert "feature_map.0.weight" in names
    layer(torch.randn(5, 2, 8)).sum().backward()
    assert layer.feature_map[0].weight.grad.abs().sum() > 0


def test_layer_copies_pickles_and_prints() -> None:
    layer = nn.LinearAttention(8, 2, causal=True, batch_first=True)
    x = torch.randn(2, 5, 8)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))
    assert "8, 2, feature_map='elu', causal=True, batch_first=True" in repr(layer)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [((8, 3), "divisible"), ((0, 1), "positive"), ((8, 0), "positive")],
)
def test_layer_refuses_sizes(arguments: tuple, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        nn.LinearAttention(*arguments)


def test_layer_refuses_shapes() -> None:
    layer = nn.LinearAttention(8, 2)
    with pytest.raises(ValueError, match=r"query must have 2 or 3 dimensions.*\(5, 7\)"):
        layer(torch.zeros(5, 7))
    with pytest.raises(ValueError, match="key must have"):
        layer(torch.zeros(5, 2, 8), torch.zeros(5, 8))


def test_layer_keeps_its_time_linear() -> None:
    """Not a clock: the largest tensor that a causal call of a long sequence makes is a multiple of its input."""
    done = run_python(
        "import torch, resource, pyseqnet.nn as nn\n"
        "layer = nn.LinearAttention(16, 2, causal=True, batch_first=True)\n"
        "with torch.no_grad():\n"
        "    layer(torch.zeros(1, 64, 16)); before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "    layer(torch.zeros(1, 100_000, 16))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 200_000  # KB; the scores of 100 000 positions would be 40 GB a head
