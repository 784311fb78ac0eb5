"""Models of Hugging Face transformers, built from configurations: converted, and with our attention."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import allowed_error, error_of, normal
from torch import Tensor

import pyseqnet
from pyseqnet import nn

transformers = pytest.importorskip("transformers", minversion="5.0")
transformers.utils.logging.set_verbosity_error()

import pyseqnet.integrations.huggingface  # noqa: E402 - needs transformers

VOCABULARY, LENGTH = 60, 24
SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
TEXT = {"num_key_value_heads": 2, "head_dim": 8, **SMALL}


def tokens(length: int = LENGTH) -> Tensor:
    return torch.randint(3, VOCABULARY, (3, length), generator=torch.Generator().manual_seed(1))


def padding(side: str, length: int = LENGTH) -> Tensor:
    """Of three sequences one is whole."""
    position = torch.arange(length).expand(3, length)
    kept = position < torch.tensor([[length], [length - 7], [length // 2]])
    return (kept if side == "right" else kept.flip(1)).long()


def resnet(kind: str) -> Any:
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type=kind, num_labels=5
    )
    return transformers.ResNetForImageClassification(config)


def bert(**options: Any) -> Any:
    return transformers.BertForMaskedLM(transformers.BertConfig(**SMALL, **options))


def gpt2(**options: Any) -> Any:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=VOCABULARY, **sizes, **options))


def wav2vec2(norm: str, stable: bool) -> Any:
    config = transformers.Wav2Vec2Config(
        **SMALL, conv_dim=(16, 16, 16), conv_stride=(5, 2, 2), conv_kernel=(10, 3, 2), num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4, feat_extract_norm=norm, do_stable_layer_norm=stable, mask_time_prob=0.0,
    )  # fmt: skip
    return transformers.Wav2Vec2ForCTC(config)


def vit() -> Any:
    return transformers.ViTForImageClassification(transformers.ViTConfig(image_size=32, patch_size=8, **SMALL))


def convnext() -> Any:
    config = transformers.ConvNextConfig(hidden_sizes=[8, 16, 16, 16], depths=[1] * 4, num_labels=5)
    return transformers.ConvNextForImageClassification(config)


def t5() -> Any:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=VOCABULARY, **sizes))


def whisper() -> Any:
    both = {f"{side}_{what}": n for side in ("encoder", "decoder")
            for what, n in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))}  # fmt: skip
    config = transformers.WhisperConfig(
        vocab_size=VOCABULARY, d_model=32, num_mel_bins=8, max_source_positions=20, max_target_positions=20,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, **both,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config)


def conformer() -> Any:
    config = transformers.Wav2Vec2ConformerConfig(
        **SMALL, conv_dim=(16, 16, 16), conv_stride=(5, 2, 2), conv_kernel=(10, 3, 2), num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4, conv_depthwise_kernel_size=7, mask_time_prob=0.0,
    )  # fmt: skip
    return transformers.Wav2Vec2ConformerForCTC(config)


def mistral(window: int | None = 8) -> Any:
    return transformers.MistralForCausalLM(transformers.MistralConfig(**TEXT, sliding_window=window))


def sound() -> dict[str, Tensor]:
    kept = torch.arange(1200).expand(2, 1200) < torch.tensor([[1200], [700]])
    return {"input_values": normal((2, 1200), 4, torch.float32), "attention_mask": kept.long()}


def text(side: str) -> Callable[[], dict[str, Tensor]]:
    return lambda: {"input_ids": tokens(), "attention_mask": padding(side)}


# a model, its inputs, classes of ours that are in it afterwards
MODELS: dict[str, tuple[Callable[[], Any], Callable[[], dict[str, Tensor]], set[type]]] = {
    "resnet, basic": (
        lambda: resnet("basic"), lambda: {"pixel_values": normal((2, 3, 48, 40), 0, torch.float32)},
        {nn.Conv2d, nn.MaxPool2d},
    ),
    "resnet, bottleneck": (
        lambda: resnet("bottleneck"), lambda: {"pixel_values": normal((2, 3, 33, 47), 0, torch.float32)},
        {nn.Conv2d, nn.MaxPool2d},
    ),
    "bert": (bert, text("right"), {nn.LayerNorm}),
    "bert, a decoder": (lambda: bert(is_decoder=True), text("right"), {nn.LayerNorm}),
    "gpt2": (gpt2, text("left"), {nn.LayerNorm}),
    "gpt2, scaled by layer": (
        lambda: gpt2(scale_attn_by_inverse_layer_idx=True), lambda: {"input_ids": tokens()}, {nn.LayerNorm},
    ),
    "wav2vec2, group norm": (lambda: wav2vec2("group", False), sound, {nn.Conv1d, nn.LayerNorm}),
    "wav2vec2, layer norm": (lambda: wav2vec2("layer", True), sound, {nn.Conv1d, nn.LayerNorm}),
    "mistral": (mistral, text("right"), set()),
    "mistral, left": (mistral, text("left"), set()),
    "mistral, without a window": (lambda: mistral(None), lambda: {"input_ids": tokens()}, set()),
    "vit": (vit, lambda: {"pixel_values": normal((2, 3, 32, 32), 0, torch.float32)}, {nn.Conv2d, nn.LayerNorm}),
    "convnext": (convnext, lambda: {"pixel_values": normal((2, 3, 64, 64), 0, torch.float32)}, {nn.Conv2d}),
    "t5": (t5, lambda: {"input_ids": tokens(), "decoder_input_ids": tokens(9)}, set()),
    "whisper": (
        whisper, lambda: {"input_features": normal((3, 8, 40), 0, torch.float32), "decoder_input_ids": tokens(9)},
        {nn.Conv1d, nn.LayerNorm},
    ),
    "conformer": (conformer, sound, {nn.Conv1d, nn.LayerNorm}),
}  # fmt: skip
WITHOUT_ATTENTION = ("resnet", "convnext")


def results(model: Any, inputs: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Logits where something is to be read, and the gradients of all parameters."""
    moved = {key: x.to(dtype) if x.is_floating_point() else x for key, x in inputs.items()}
    logits = model(**moved).logits
    kept = inputs.get("attention_mask")
    if kept is not None and kept.shape == logits.shape[:2]:  # a padded query sees nothing or anything
        logits = logits * kept.unsqueeze(-1)
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(logits.square().sum(), parameters, allow_unused=True)
    return [logits.detach(), *(torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True))]


def assert_as_exact_as_torch(
    ours: list[Tensor], theirs: list[Tensor], exact: list[Tensor], factor: float = 3.0
) -> None:
    """Gradients of layers below are sums of sums: their scale is that of the largest gradient, not of each."""
    scale = max(float(e.abs().max()) for e in exact[1:])
    for number, (a, b, e) in enumerate(zip(ours, theirs, exact, strict=True)):
        bound = allowed_error(b, e, e if number == 0 else torch.full((1,), scale), factor)
        assert error_of(a, e) <= bound + 1e-6 * (scale if number else 1), f"result {number} of shape {tuple(a.shape)}"


@pytest.mark.parametrize("name", MODELS)
def test_a_converted_model_gives_the_same(name: str) -> None:
    make, inputs, expected = MODELS[name]
    theirs = make().eval()
    ours = copy.deepcopy(theirs)
    assert theirs.config._attn_implementation in ("sdpa", "eager")
    parameters, keys = list(ours.parameters()), list(ours.state_dict())
    report = pyseqnet.convert(ours)
    assert all(a is b for a, b in zip(parameters, ours.parameters(), strict=True))
    assert list(ours.state_dict()) == keys
    assert expected <= {type(part) for part in ours.modules()} | {
        type(part).__bases__[0] for part in ours.modules() if "Parametrized" in type(part).__name__
    }
    named = dict(ours.named_modules())
    assert set(report.replaced) <= set(named)
    leaves = {n for n, part in named.items() if not list(part.children())}
    assert leaves <= set(report.replaced) | set(report.left)  # every layer is accounted for
    if name.startswith(WITHOUT_ATTENTION):
        assert report.attention == {"": "it has no 'sdpa' attention"}
    else:
        assert report.attention == {"": "pyseqnet"}
        assert ours.config._attn_implementation == "pyseqnet"
        assert "attention of (the model): pyseqnet" in str(report)
    exact = results(copy.deepcopy(theirs).double(), inputs(), torch.float64)
    assert_as_exact_as_torch(results(ours, inputs()), results(theirs, inputs()), exact)


def test_a_conversion_of_attention_can_be_declined_and_undone() -> None:
    model = gpt2()
    assert pyseqnet.convert(model, attention=False).attention == {}
    assert model.config._attn_implementation == "sdpa"
    assert pyseqnet.convert(model, skip=transformers.GPT2Model).attention == {"": "skipped"}
    assert model.config._attn_implementation == "sdpa"
    pyseqnet.convert(model)
    model.set_attn_implementation("sdpa")
    assert model.config._attn_implementation == "sdpa"
    eager = bert(attn_implementation="eager")
    assert pyseqnet.convert(eager).attention == {"": "its attention is 'eager', not 'sdpa'"}
    holder = torch.nn.ModuleDict({"text": gpt2(), "sound": wav2vec2("group", False)})
    assert pyseqnet.convert(holder).attention == {"text": "pyseqnet", "sound": "pyseqnet"}


def test_the_report_says_what_was_left_and_why() -> None:
    report = pyseqnet.convert(gpt2())
    assert report.left["transformer.h.0.attn.c_attn"] == "pyseqnet has no Conv1D"  # that library's name of a linear
    assert report.left["lm_head"] == "pyseqnet has no Linear"
    assert report.replaced["transformer.ln_f"] == "pyseqnet.nn.LayerNorm"


def test_hooks_weight_norm_and_tied_parameters_survive(tmp_path: Path) -> None:
    model = wav2vec2("group", False)
    seen: list[str] = []
    first = model.wav2vec2.feature_extractor.conv_layers[0].conv
    first.register_forward_hook(lambda *_: seen.append("forward"))
    first.register_full_backward_hook(lambda *_: seen.append("backward"))
    position = model.wav2vec2.encoder.pos_conv_embed.conv
    pyseqnet.convert(model)
    assert type(first) is nn.Conv1d
    assert isinstance(position, nn.Conv1d)
    assert type(position.parametrizations.weight[0]).__name__ == "_WeightNorm"
    model(**sound()).logits.sum().backward()
    assert seen == ["forward", "backward"]
    assert position.parametrizations.weight.original0.grad.abs().sum() > 0

    tied = gpt2()
    pyseqnet.convert(tied)
    assert tied.lm_head.weight is tied.transformer.wte.weight
    tied(tokens()).logits.sum().backward()
    tied.save_pretrained(tmp_path)
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    assert again.config._attn_implementation == "sdpa"  # what is stored names no kernel
    assert again.lm_head.weight is again.transformer.wte.weight
    torch.testing.assert_close(again.eval()(tokens()).logits, tied.eval()(tokens()).logits)
    assert pyseqnet.convert(again).attention == {"": "pyseqnet"}


def test_trains_as_torch_does() -> None:
    theirs = wav2vec2("layer", False)
    ours = copy.deepcopy(theirs)
    pyseqnet.convert(ours)
    labels = torch.randint(1, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(2))
    losses: list[list[float]] = []
    for model in (ours.eval(), theirs.eval()):
        optimizer = torch.optim.SGD(model.parameters(), 0.02)
        losses.append([])
        for _ in range(4):
            optimizer.zero_grad()
            loss = model(**sound(), labels=labels).loss
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0][-1] < losses[0][0]


# --- attention ---------------------------------------------------------------------------------------------------


def gemma2() -> Any:
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**TEXT, sliding_window=300))


def gpt_oss() -> Any:
    config = transformers.GptOssConfig(**TEXT, sliding_window=300, num_local_experts=2, num_experts_per_tok=1)
    config._experts_implementation = "eager"  # the others lack float64
    model = transformers.GptOssForCausalLM(config)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks)
    return model


def modern_bert() -> Any:
    config = transformers.ModernBertConfig(**SMALL, cls_token_id=1, sep_token_id=2, local_attention=128)
    return transformers.ModernBertForMaskedLM(config)


def t5() -> Any:
    sizes = {"d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_kv": 8, "decoder_start_token_id": 0}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=VOCABULARY, **sizes))


LONG = 420  # longer than the windows, in several tiles
ATTENTION = {
    "grouped heads, a window": (lambda: mistral(300), {}),
    "grouped heads, a window, padding": (lambda: mistral(300), {"attention_mask": padding("left", LONG)}),
    "soft-capping": (gemma2, {}),
    "sinks": (gpt_oss, {}),
    "sinks, padding": (gpt_oss, {"attention_mask": padding("right", LONG)}),
    "a window to both sides": (modern_bert, {}),
    "a bias of positions": (t5, {"attention_mask": padding("right", LONG), "decoder_input_ids": tokens(30)}),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_of_many_kinds_equals_the_definition(name: str) -> None:
    make, more = ATTENTION[name]
    theirs = make().eval()  # runs sdpa where that computes what the model wants, else the library's formula
    ours = copy.deepcopy(theirs)
    ours.set_attn_implementation("pyseqnet")
    inputs = {"input_ids": tokens(LONG), **more}
    exact = results(copy.deepcopy(theirs).double(), inputs, torch.float64)
    assert_as_exact_as_torch(results(ours, inputs), results(theirs, inputs), exact)


@pytest.mark.parametrize("make", [lambda: mistral(300), modern_bert])
def test_a_window_becomes_a_pattern(make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[tuple[bool, bool]] = []
    function = pyseqnet.integrations.huggingface.scaled_dot_product_attention

    def spy(*args: Any, **options: Any) -> Any:
        called.append((options["pattern"] is not None, options["attn_mask"] is not None))
        return function(*args, **options)

    monkeypatch.setattr(pyseqnet.integrations.huggingface, "scaled_dot_product_attention", spy)
    model = make().eval()
    model.set_attn_implementation("pyseqnet")
    with torch.no_grad():
        model(tokens(LONG))
        assert (True, False) in called
        called.clear()
        model(tokens(LONG), attention_mask=padding("right", LONG))
    assert (False, True) in called
    assert (True, False) not in called


def test_a_mask_that_is_no_window_stays_a_mask() -> None:
    """Llama 4's chunks hand over a size, too."""
    from transformers.masking_utils import chunked_causal_mask_function

    options = {"batch_size": 2, "q_length": LONG, "kv_length": LONG, "local_size": 300}
    chunks = chunked_causal_mask_function(300, torch.zeros(2, dtype=torch.int64))
    mask = pyseqnet.integrations.huggingface.attention_mask(**options, mask_function=chunks, allow_is_causal_skip=False)
    assert mask is not None
    assert not hasattr(mask, "_pyseqnet_pattern")


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("make", [gpt2, mistral, gemma2, t5])
def test_generation_with_a_cache(make: Callable[[], Any], cache: str) -> None:
    theirs = make().eval()
    if make is t5 and cache == "static":
        pytest.skip("one cache is enough for the encoder and decoder")
    theirs.set_attn_implementation("eager")
    ours = copy.deepcopy(theirs)
    ours.set_attn_implementation("pyseqnet")
    prompt = {"input_ids": tokens(12), "attention_mask": padding("left", 12)}
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "cache_implementation": cache}
    options |= {"return_dict_in_generate": True, "output_logits": True, "disable_compile": True, "pad_token_id": 0}
    if cache == "dynamic":
        options.pop("cache_implementation")
    found, expected = (model.generate(**prompt, **options) for model in (ours, theirs))
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=1e-4, atol=1e-5)


def test_one_by_one_equals_at_once() -> None:
    model = mistral(8).eval()
    model.set_attn_implementation("pyseqnet")
    with torch.no_grad():
        whole = model(tokens()).logits
        cache, parts = None, []
        for piece in tokens().split([5, 1, 1, 9, 8], 1):
            output = model(piece, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)


def test_dropout_is_torchs_in_distribution_and_off_outside_training() -> None:
    model = gpt2(attn_pdrop=0.5, resid_pdrop=0.0, embd_pdrop=0.0)
    model.set_attn_implementation("pyseqnet")
    for parameter in model.parameters():
        parameter.data.mul_(4)  # so that attention has a say
    model.train()
    torch.manual_seed(3)
    one = model(tokens()).logits
    torch.manual_seed(3)
    assert torch.equal(one, model(tokens()).logits)
    assert not torch.equal(one, model(tokens()).logits)
    layer = model.transformer.h[0].attn
    q, k, v = (normal((1, 4, LENGTH, 8), seed, torch.float32) for seed in range(3))
    mean = (
        sum(pyseqnet.integrations.huggingface.attention(layer, q, k, v, None, dropout=0.5)[0] for _ in range(2000))
        / 2000
    )
    without = pyseqnet.integrations.huggingface.attention(layer, q, k, v, None)[0]
    assert (mean - without).abs().max() < 0.15  # about five standard deviations of such a mean
    model.eval()
    assert torch.equal(model(tokens()).logits, model(tokens()).logits)


def test_weights_on_request() -> None:
    ours = mistral(8).eval()
    theirs = copy.deepcopy(ours)
    ours.set_attn_implementation("pyseqnet")
    theirs.set_attn_implementation("eager")
    found, expected = (model(tokens(), output_attentions=True).attentions for model in (ours, theirs))
    assert len(found) == 2
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    layer, q = gpt_oss().model.layers[0].self_attn, torch.randn(1, 4, 3, 8)
    with pytest.raises(ValueError, match="s_aux"):
        pyseqnet.integrations.huggingface.attention(layer, q, q, q, None, s_aux=layer.sinks, output_attentions=True)


def test_compiles_and_exports() -> None:
    model = mistral(8).eval()
    pyseqnet.convert(model)
    with torch.no_grad():
        expected = model(tokens(), use_cache=False).logits
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager")
        torch.testing.assert_close(compiled(tokens(), use_cache=False).logits, expected)
        options = {"use_cache": False, "return_dict": False}
        program = torch.export.export(model, (), {"input_ids": tokens(), **options}, strict=False)
        buffer = io.BytesIO()
        torch.export.save(program, buffer)
        buffer.seek(0)
        torch.testing.assert_close(
            torch.export.load(buffer).module()(input_ids=tokens(), **options)[0], expected, rtol=1e-4, atol=1e-5
        )
    assert any("pyseqnet.attention_forward" in str(node.target) for node in program.graph.nodes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype: torch.dtype) -> None:
    theirs = mistral(8).eval()
    exact = results(copy.deepcopy(theirs).double(), text("right")(), torch.float64)
    theirs = theirs.to(dtype)
    ours = copy.deepcopy(theirs)
    pyseqnet.convert(ours)
    a, b = (results(model, text("right")(), dtype)[0] for model in (ours, theirs))
    assert a.dtype == dtype
    assert error_of(a, exact[0]) <= 2 * error_of(b, exact[0])
