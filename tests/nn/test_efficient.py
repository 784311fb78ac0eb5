"""What every layer of `nn.efficient` promises: its interface, masks, causality, gradients, seeds, sizes."""

from __future__ import annotations

import copy
import functools
import io
import math
import pickle

import pytest
import torch
from support import normal
from torch import Tensor

from pyseqnet import masks, nn
from pyseqnet.nn import efficient
from pyseqnet.nn._transformer_parts import ATTENTION

B, T, E, H = 2, 13, 16, 4
SMALL = {  # options that make something happen at this length
    "local": {"window": 2},
    "big_bird": {"window": 1, "global_tokens": 1, "random_blocks": 1, "block": 2},
    "mixed_heads": {"patterns": [masks.Local(2), masks.Causal(), masks.Global(1) | masks.Local(0)]},
    "top_k": {"k": 3},
    "clustered": {"clusters": 3},
    "reformer": {"bucket_size": 4, "n_hashes": 2},
    "routing": {"clusters": 3},
    "sinkhorn": {"block_size": 4},
    "memory_compressed": {"factor": 3},
    "linformer": {"seq_len": 16, "k": 4},
    "efficient": {},
    "rfa": {"num_features": 6},
    "performer": {"num_features": 6},
    "synthesizer": {"seq_len": 16, "mode": "dense"},
    "fnet": {},
    "gmlp": {"seq_len": 16},
    "mlp_mixer": {"seq_len": 16},
}
NAMES = list(SMALL)
CAUSAL = [n for n in NAMES if getattr(efficient.EFFICIENT[n], "never_causal", None) is None]
# Others choose keys by what all positions hold, so a later token may take an earlier one's place.
STRICTLY_CAUSAL = [n for n in CAUSAL if n not in ("reformer", "routing")]
LINEAR = ("efficient", "rfa", "performer")  # of linear attention: padding at the end only
MIXERS = [n for n in NAMES if issubclass(efficient.EFFICIENT[n], efficient.base.TokenMixer)]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def make(name: str, dtype: torch.dtype = torch.float64, **options: object) -> torch.nn.Module:
    given = {"batch_first": True, **SMALL[name], **options}
    return efficient.EFFICIENT[name](E, H, dtype=dtype, **given)


def tokens(length: int = T, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return normal((B, length, E), seed, dtype)


def run(layer: torch.nn.Module, x: Tensor, causal: bool = False, padding: Tensor | None = None) -> Tensor:
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1) if causal else None
    return layer(x, x, x, key_padding_mask=padding, attn_mask=mask, is_causal=causal, need_weights=False)[0]


def test_every_layer_is_tested() -> None:
    assert set(efficient.EFFICIENT) == set(SMALL)
    assert set(efficient.EFFICIENT) < set(ATTENTION)
    for name in NAMES:
        assert "Paper" in (efficient.EFFICIENT[name].__doc__ or "")


@pytest.mark.parametrize("name", NAMES)
def test_transformer_layers_take_it_by_name_and_train(name: str) -> None:
    x = tokens(dtype=torch.float32)
    padding = torch.arange(T) >= torch.tensor([[T], [7]])
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, 32, 0.0, batch_first=True, attention=name), 2)
    decoder = nn.TransformerDecoderLayer(E, H, 32, 0.0, batch_first=True, attention=name, norm_first=True)
    causal = name in CAUSAL
    mask = torch.ones(T, T, dtype=torch.bool).triu(1) if causal else None
    output = decoder(
        encoder(x, src_key_padding_mask=padding), x, tgt_mask=mask, tgt_is_causal=causal, tgt_key_padding_mask=padding
    )
    assert output.shape == x.shape
    output[~padding].square().sum().backward()
    for module in (encoder, decoder):
        for key, parameter in module.named_parameters():
            assert parameter.grad is not None, key
            assert parameter.grad.isfinite().all(), key
    # an additive causal mask makes the padding additive, too
    if causal:
        added = torch.nn.Transformer.generate_square_subsequent_mask(T)
        with pytest.warns(UserWarning, match="mismatched"):
            same = encoder(x, mask=added, src_key_padding_mask=padding, is_causal=True)
        expected = encoder(x, mask=mask, src_key_padding_mask=padding, is_causal=True)
        torch.testing.assert_close(same[~padding], expected[~padding])


def test_options_come_through_partial() -> None:
    make_attention = functools.partial(efficient.LinformerAttention, seq_len=20, k=5)
    layer = nn.TransformerEncoderLayer(E, H, 32, batch_first=True, attention=make_attention)
    assert layer.self_attn.key_projection.shape == (5, 20)
    with pytest.raises(ValueError, match="made for at most seq_len=20 keys; got 21"):
        layer(torch.zeros(1, 21, E))


@pytest.mark.parametrize("name", NAMES)
def test_layouts_agree(name: str) -> None:
    layer = make(name).eval()
    x = tokens()
    padding = torch.arange(T) >= torch.tensor([[T], [7]])
    expected = run(layer, x, padding=padding)
    other = make(name, batch_first=False).eval()
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(run(other, x.transpose(0, 1).contiguous(), padding=padding).transpose(0, 1), expected)
    torch.testing.assert_close(run(layer, x[1], padding=padding[1]), expected[1])
    one = run(other, x[1])
    torch.testing.assert_close(one, run(layer, x[1:])[0])


@pytest.mark.parametrize("where", ["end", "holes"])
@pytest.mark.parametrize("name", NAMES)
def test_padding_reaches_nothing(name: str, where: str) -> None:
    layer = make(name, dropout=0.0).eval()
    padding = torch.arange(T) >= torch.tensor([[T], [7]])
    if where == "holes" and name in LINEAR:
        with pytest.raises(ValueError, match="padding at the end"):
            run(layer, tokens(), padding=~padding)
        return
    if where == "holes":
        padding = normal((B, T), 5) > 0.7
        assert padding.any(1).all()
    found = []
    for poison in (0.5, math.nan, math.inf, -1e4):
        x = tokens().masked_fill(padding.unsqueeze(2), poison).requires_grad_()
        output = run(layer, x, padding=padding)[~padding]
        leaves = [x, *layer.parameters()]
        gradients = torch.autograd.grad(output.square().sum(), leaves, allow_unused=True)
        assert output.isfinite().all()
        assert not gradients[0][padding].any()
        found.append((output, *gradients))
    for others in found[1:]:
        for one, other in zip(found[0], others, strict=True):
            assert one is None or torch.equal(one, other)


@pytest.mark.parametrize("name", NAMES)
def test_more_padding_changes_nothing(name: str) -> None:
    layer = make(name).eval()
    if name in ("fnet", "reformer", "routing", "clustered", "big_bird"):
        pytest.skip(
            "the length itself enters: a transform, a number of buckets, of clusters' windows, a draw of blocks"
        )
    x = tokens(11)
    longer = torch.cat([x, tokens(4, seed=3)], 1)
    padding = torch.arange(15).expand(B, -1) >= 11
    torch.testing.assert_close(run(layer, longer, padding=padding)[:, :11], run(layer, x))


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("training", [False, True])
def test_the_future_does_not_leak(name: str, training: bool) -> None:
    layer = make(name).train(training)
    x = tokens().requires_grad_()
    for at in (0, 5, T - 2):
        state = copy.deepcopy(layer.state_dict())
        (gradient,) = torch.autograd.grad(run(layer, x, causal=True)[:, at].square().sum(), x, allow_unused=True)
        assert not gradient[:, at + 1 :].any()
        if at:
            assert gradient[:, : at + 1].any()
        layer.load_state_dict(state)
    if name in STRICTLY_CAUSAL:
        later = x.detach().clone()
        later[:, 6:] = tokens(seed=9)[:, 6:] * 10
        torch.testing.assert_close(run(layer, later, causal=True)[:, :6], run(layer, x, causal=True)[:, :6])
        assert not torch.allclose(run(layer, later, causal=True)[:, 6:], run(layer, x, causal=True)[:, 6:])


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(CAUSAL)))
def test_what_cannot_be_causal_says_why(name: str) -> None:
    layer = make(name)
    with pytest.raises(ValueError, match=f"{type(layer).__name__}: cannot be causal: "):
        run(layer, tokens(), causal=True)


@pytest.mark.parametrize("name", MIXERS)
def test_bad_input_is_named(name: str) -> None:
    layer, x = make(name), tokens()
    kind = type(layer).__name__
    with pytest.raises(ValueError, match=f"{kind}: there are no weights"):
        layer(x, x, x, need_weights=True)
    with pytest.raises(ValueError, match=f"{kind}: takes no attn_mask but the causal one"):
        layer(x, x, x, attn_mask=torch.zeros(T, T))
    with pytest.raises(ValueError, match=f"{kind}: query, key and value must be all 2-D or all 3-D with 16 features"):
        layer(x[..., 1:], x[..., 1:], x[..., 1:])
    with pytest.raises(ValueError, match=r"key_padding_mask must have shape \(2, 13\); got \(2, 12\)"):
        run(layer, x, padding=torch.zeros(B, T - 1, dtype=torch.bool))
    with pytest.raises(ValueError, match="must be bool"):
        run(layer, x, padding=torch.full((B, T), 0.5))
    with pytest.raises(ValueError, match="must be bool"):
        run(layer, x, padding=torch.ones(B, T, dtype=torch.int64))
    if layer.self_attention:
        with pytest.raises(ValueError, match="this is self-attention"):
            layer(x, x.clone(), x)
    else:
        with pytest.raises(ValueError, match="equally long"):
            layer(x, x, x[:, 1:])
        with pytest.raises(ValueError, match="of one batch"):
            layer(x, x[:1], x[:1])
    with pytest.raises(ValueError, match="embed_dim must be divisible by num_heads, got 10 and 4"):
        efficient.EFFICIENT[name](10, 4)
    with pytest.raises(ValueError, match="dropout must be between 0 and 1"):
        efficient.EFFICIENT[name](E, H, 1.5)
    for option, value in SMALL[name].items():
        if isinstance(value, int):
            with pytest.raises(ValueError, match=f"{option} must be at least 1, got 0"):
                efficient.EFFICIENT[name](E, H, **{option: 0})
            with pytest.raises(TypeError, match=f"{option} must be an integer, got float"):
                efficient.EFFICIENT[name](E, H, **{option: 1.5})


@pytest.mark.parametrize("name", [n for n in MIXERS if not efficient.EFFICIENT[n].self_attention])
def test_cross_attention(name: str) -> None:
    layer = make(name)
    x, memory, values = tokens(5), tokens(9, 2), tokens(9, 3)
    output, _ = layer(x, memory, values)
    assert output.shape == x.shape
    changed, _ = layer(x, memory, values + 1)
    assert not torch.allclose(output, changed)
    padding = torch.arange(9).expand(B, -1) >= 6
    hidden, _ = layer(x, memory.masked_fill(padding.unsqueeze(2), math.nan), values, key_padding_mask=padding)
    assert hidden.isfinite().all()


@pytest.mark.parametrize("length", [0, 1, 2, 3, 5, 8, 16])
@pytest.mark.parametrize("name", NAMES)
def test_odd_sizes(name: str, length: int) -> None:
    layer = make(name)
    for batch in (0, 1, 3):
        x = normal((batch, length, E), 1).requires_grad_()
        for causal in {False, name in CAUSAL}:
            output = run(layer, x, causal)
            assert output.shape == x.shape
            assert output.isfinite().all()
            assert torch.autograd.grad(output.sum(), x)[0].isfinite().all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_gradients(name: str, causal: bool) -> None:
    if causal and name not in CAUSAL:
        pytest.skip("cannot be causal")
    layer = make(name).eval()
    for parameter in layer.parameters():  # biases begin as zeros
        parameter.data.add_(torch.randn(parameter.shape, dtype=torch.float64) * 0.1)
    keys = [key for key, _ in layer.named_parameters()]
    padding = torch.arange(7) >= torch.tensor([[7], [5]])
    x = tokens(7).requires_grad_()

    def function(x: Tensor, *values: Tensor) -> Tensor:
        arguments = (x, x, x)
        options = {"key_padding_mask": padding, "need_weights": False, "is_causal": causal}
        options["attn_mask"] = torch.ones(7, 7, dtype=torch.bool).triu(1) if causal else None
        parameters = dict(zip(keys, values, strict=True))
        return torch.func.functional_call(layer, parameters, arguments, options)[0][~padding]

    torch.autograd.gradcheck(function, (x, *layer.parameters()), fast_mode=True)


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_copies_and_seeds(name: str) -> None:
    torch.manual_seed(3)
    layer, x = make(name), tokens()
    torch.manual_seed(3)
    again = make(name)
    expected = run(layer.eval(), x)
    assert torch.equal(run(again.eval(), x), expected)
    assert torch.equal(run(layer, x), expected)  # nothing is drawn in a forward pass
    torch.manual_seed(4)
    other = make(name, **({"seed": 7} if name in ("reformer", "routing", "performer", "rfa") else {})).eval()
    if list(layer.parameters()):
        assert not torch.equal(run(other, x), expected)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    assert torch.equal(run(other, x), expected)
    run(layer.train(), x.clone().requires_grad_()).sum().backward()
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(run(twin.eval(), x), run(layer.eval(), x))
    assert str(E) in repr(layer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    layer = make(name)
    x = tokens().to(dtype)
    low = make(name, dtype)
    low.load_state_dict(layer.state_dict())
    layer.load_state_dict(low.state_dict())
    output = run(low.eval(), x)
    assert output.dtype == dtype
    error = (output.double() - run(layer.eval(), x.double())).abs()
    # choices of keys may fall otherwise where scores are equal but for rounding, so the typical error is judged
    assert error.median() <= 8 * torch.finfo(dtype).eps * max(1.0, output.abs().max().item())


@pytest.mark.parametrize("name", [*MIXERS, *LINEAR])
def test_a_mask_of_other_numbers_is_refused(name: str) -> None:
    """A bias of keys, which softmax attention would add, is none here: not dropped in silence."""
    x = tokens()
    with pytest.raises(ValueError, match="0 and -inf only"):
        make(name)(x, x, x, key_padding_mask=torch.full((B, T), -1.0, dtype=x.dtype))
