"""What efficient attention costs in quality: small models of one size, trained alike, on three tasks.

python -m bench.quality                      all tasks and layers; writes bench/results/efficient-quality.md
python -m bench.quality --task listops --only softmax --only linear --steps 50 --out quality.md

* Duplication (Kitaev, Kaiser, Levskaya, 2020): a word of 31 random digits comes twice, the second half is predicted:
  Reformers trained with so many rounds of hashing, each evaluated with 1 to 8 rounds and with all pairs.
* Characters of tinyshakespeare (``$PYSEQNET_DATA/tinyshakespeare/input.txt``): causal, validation loss in nats.
* ListOps, short (Nangia and Bowman, 2018; the long one is of Long Range Arena, Tay et al., 2021): the value, 0 to 9, of
  a nested expression of MAX, MIN, MED and SM (sum modulo 10), accuracy on unseen ones.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import random
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from bench.machine import RESULTS
from pyseqnet import nn
from pyseqnet.data import find
from pyseqnet.nn._transformer_parts import ATTENTION

WIDTH, HEADS, LAYERS = 64, 4, 2
LENGTHS = {"duplication": 64, "characters": 64, "listops": 128}
URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"

# Options that leave something out at these lengths.
OPTIONS: dict[str, dict[str, object]] = {
    "softmax": {},
    "linear": {},
    "local": {"window": 8},
    "big_bird": {"window": 8, "global_tokens": 1, "random_blocks": 2, "block": 8},
    "performer": {"num_features": 32},
    "rfa": {"num_features": 32},
    "efficient": {},
    "linformer": {"k": 32},
    "reformer": {"bucket_size": 16, "n_hashes": 2},
    "routing": {"clusters": 8},
    "sinkhorn": {"block_size": 16},
    "synthesizer": {"mode": "random"},
    "top_k": {"k": 8},
    "gmlp": {},
    "fnet": {},
    "mlp_mixer": {},
}
OF_ONE_LENGTH = ("linformer", "synthesizer", "gmlp", "mlp_mixer")  # take seq_len
HASHES = (1, 2, 4)
CAUSAL = ("softmax", "linear", "local", "big_bird", "performer", "rfa", "reformer", "routing", "sinkhorn",
          "synthesizer", "top_k", "gmlp")  # fmt: skip


class Model(torch.nn.Module):
    """Embeddings, Transformer layers (normalised first), and a linear map: of every position, or of their mean."""

    def __init__(
        self, attention: str, symbols: int, classes: int, length: int, causal: bool, **changed: object
    ) -> None:
        super().__init__()
        self.causal = causal
        self.symbols = torch.nn.Embedding(symbols, WIDTH)
        self.positions = torch.nn.Parameter(torch.randn(length, WIDTH) * 0.02)
        chosen = {**OPTIONS[attention], **({"seq_len": length} if attention in OF_ONE_LENGTH else {}), **changed}
        kind = partial(ATTENTION[attention], **chosen) if chosen else attention
        options = {"batch_first": True, "norm_first": True, "attention": kind}
        layers = [nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, 0.0, **options) for _ in range(LAYERS)]
        self.encoder = nn.TransformerEncoder(layers, None, norm=nn.LayerNorm(WIDTH))
        self.head = torch.nn.Linear(WIDTH, classes)

    def forward(self, tokens: Tensor, padding: Tensor | None = None) -> Tensor:
        x = self.symbols(tokens) + self.positions[: tokens.shape[1]]
        length = tokens.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool).triu(1) if self.causal else None
        x = self.encoder(x, mask=mask, src_key_padding_mask=padding, is_causal=self.causal)
        if self.causal:
            return self.head(x)
        real = (~padding).to(x.dtype).unsqueeze(2)
        return self.head((x * real).sum(1) / real.sum(1))


def train(model: Model, loss: Callable[[int], Tensor], steps: int) -> float:
    """Adam, one warm-up and one decay for all; seconds."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.2)
    begin = time.perf_counter()
    for step in range(steps):
        optimizer.zero_grad()
        loss(step).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return time.perf_counter() - begin


# --- characters ------------------------------------------------------------------------------------------------------


def characters() -> tuple[Tensor, Tensor, int]:
    text = find("tinyshakespeare/input.txt", URL, "Andrej Karpathy, char-rnn").read_text()
    symbols = sorted(set(text))
    ids = torch.tensor([symbols.index(c) for c in text])
    cut = int(0.9 * len(ids))
    return ids[:cut], ids[cut:], len(symbols)


def character_model(attention: str, steps: int, seed: int) -> dict[str, float]:
    trained_on, held_out, symbols = characters()
    length = LENGTHS["characters"]
    torch.manual_seed(seed)
    model = Model(attention, symbols, symbols, length, causal=True)
    generator = torch.Generator().manual_seed(seed)

    def nats(ids: Tensor, starts: Tensor) -> Tensor:
        windows = torch.stack([ids[s : s + length + 1] for s in starts.tolist()])
        return torch.nn.functional.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())

    def loss(step: int) -> Tensor:
        return nats(trained_on, torch.randint(len(trained_on) - length - 1, (32,), generator=generator))

    seconds = train(model, loss, steps)
    starts = torch.linspace(0, len(held_out) - length - 1, 512).long()
    model.eval()
    with torch.no_grad():
        found = nats(held_out, starts).item()
    return {"loss": found, "seconds": seconds, "parameters": sum(p.numel() for p in model.parameters())}


# --- duplication -----------------------------------------------------------------------------------------------------

DIGITS = 10


def duplicated(count: int, generator: torch.Generator) -> Tensor:
    """0 w 0 w, w of digits 1 to 10: (count, 64)."""
    half = LENGTHS["duplication"] // 2
    words = torch.randint(1, DIGITS + 1, (count, half - 1), generator=generator)
    return torch.nn.functional.pad(words, (1, 0)).repeat(1, 2)


def duplication_model(attention: str, steps: int, seed: int) -> dict[str, float]:
    """`attention`: softmax, or reformer with its rounds of hashing: reformer-4."""
    name, _, rounds = attention.partition("-")
    torch.manual_seed(seed)
    changed = {"n_hashes": int(rounds), "bucket_size": 8} if rounds else {}
    model = Model(name, DIGITS + 1, DIGITS + 1, LENGTHS["duplication"], causal=True, **changed)
    generator = torch.Generator().manual_seed(seed)
    half = LENGTHS["duplication"] // 2

    def second(tokens: Tensor) -> tuple[Tensor, Tensor]:
        return model(tokens)[:, half:-1].flatten(0, 1), tokens[:, half + 1 :].flatten()

    def loss(step: int) -> Tensor:
        return torch.nn.functional.cross_entropy(*second(duplicated(32, generator)))

    seconds = train(model, loss, steps)
    held_out = duplicated(200, torch.Generator().manual_seed(seed + 1))

    @torch.no_grad()
    def right() -> float:
        model.eval()
        predicted, wanted = second(held_out)
        return (predicted.argmax(1) == wanted).double().mean().item()

    found = {"accuracy": right(), "seconds": seconds, "parameters": sum(p.numel() for p in model.parameters())}
    for hashes in (1, 2, 4, 8) if rounds else ():
        rehash(model, n_hashes=hashes, bucket_size=8)
        found[f"{hashes} hashes"] = right()
    if rounds:
        rehash(model, n_hashes=1, bucket_size=LENGTHS["duplication"], attend_across_buckets=True)
        found["all pairs"] = right()
    return found


def rehash(model: Model, **options: int) -> None:
    """The layers' weights with other rotations."""
    for layer in model.encoder.layers:
        other = nn.ReformerAttention(WIDTH, HEADS, batch_first=True, seed=1, **options)
        other.load_state_dict({**layer.self_attn.state_dict(), "rotations": other.rotations})
        layer.self_attn = other.eval()


# --- ListOps ---------------------------------------------------------------------------------------------------------

OPERATIONS: dict[str, Callable[[list[int]], int]] = {
    "[MAX": max,
    "[MIN": min,
    "[MED": lambda values: sorted(values)[len(values) // 2],
    "[SM": lambda values: sum(values) % 10,
}
VOCABULARY = {word: n for n, word in enumerate(["", *map(str, range(10)), *OPERATIONS, "]"])}


def expression(rng: random.Random, depth: int) -> tuple[list[str], int]:
    """An expression and its value."""
    if depth == 0 or rng.random() < 0.3:
        digit = rng.randrange(10)
        return [str(digit)], digit
    operation = rng.choice(list(OPERATIONS))
    parts = [expression(rng, depth - 1) for _ in range(rng.randint(2, 5))]
    words = [operation, *(word for part, _ in parts for word in part), "]"]
    return words, OPERATIONS[operation]([value for _, value in parts])


def list_operations(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Token ids (count, 128), 0 for padding, and values; between 4 and 128 tokens."""
    rng, length = random.Random(seed), LENGTHS["listops"]
    tokens, values = torch.zeros(count, length, dtype=torch.int64), []
    while len(values) < count:
        words, value = expression(rng, 3)
        if 4 <= len(words) <= length:
            tokens[len(values), : len(words)] = torch.tensor([VOCABULARY[word] for word in words])
            values.append(value)
    return tokens, torch.tensor(values)


def list_operations_model(attention: str, steps: int, seed: int) -> dict[str, float]:
    tokens, values = list_operations(20_000, 1)
    held_out, answers = list_operations(2_000, 2)
    torch.manual_seed(seed)
    model = Model(attention, len(VOCABULARY), 10, LENGTHS["listops"], causal=False)
    generator = torch.Generator().manual_seed(seed)

    def loss(step: int) -> Tensor:
        at = torch.randint(len(values), (32,), generator=generator)
        longest = int((tokens[at] != 0).sum(1).max())
        batch = tokens[at, :longest]
        return torch.nn.functional.cross_entropy(model(batch, batch == 0), values[at])

    seconds = train(model, loss, steps)
    model.eval()
    with torch.no_grad():
        right = torch.cat([model(part, part == 0).argmax(1) for part in held_out.split(100)]) == answers
    return {
        "accuracy": right.double().mean().item(),
        "seconds": seconds,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


TASKS = {
    "duplication": (duplication_model, ("softmax", *(f"reformer-{n}" for n in HASHES)), 1500),
    "characters": (character_model, CAUSAL, 2000),
    "listops": (list_operations_model, tuple(OPTIONS), 1000),
}
Results = dict[str, dict[str, dict[str, float]]]


def claims(results: Results) -> list[tuple[str, str, bool]]:
    """What the papers claim, what was found, and whether that is the claim's direction."""
    found = []
    loss = {name: row["loss"] for name, row in results.get("characters", {}).items()}
    right = {name: row["accuracy"] for name, row in results.get("listops", {}).items()}
    copied = results.get("duplication", {})
    if {"softmax", "linear"} <= loss.keys():
        gap = loss["linear"] - loss["softmax"]
        claim = "Linear attention loses little: at most 0.15 nats, and no less than nothing (Katharopoulos 2020)"
        found.append((claim, f"{gap:+.3f} nats", 0 <= gap <= 0.15))
    if {"softmax", "synthesizer"} <= loss.keys():
        gap = loss["synthesizer"] - loss["softmax"]
        claim = "A learned matrix is within 0.2 nats of softmax at one length (Tay 2020)"
        found.append((claim, f"{gap:+.3f} nats", gap <= 0.2))
    if {"softmax", "linear"} <= right.keys():
        gap = right["softmax"] - right["linear"]
        found.append(("Dense is no worse than linear on ListOps (Tay 2021)", f"{100 * gap:+.1f} points", gap >= 0))
    for name in (f"reformer-{n}" for n in HASHES if f"reformer-{n}" in copied):
        row = copied[name]
        steps = [row[f"{n} hashes"] for n in (1, 2, 4, 8)]
        words = " ".join(f"{100 * value:.1f}" for value in steps)
        claim = f"{name}: more rounds when evaluated, no fewer copied right (Kitaev 2020)"
        found.append((claim, f"{words} %", all(b >= a - 0.005 for a, b in pairwise(steps))))
        claim = f"{name}: full attention with the same weights copies worse"
        fall = row[f"{name[9:]} hashes"] - row["all pairs"]
        found.append((claim, f"{100 * row['all pairs']:.1f} %", fall > 0.005))
    return found


def table(results: Results, steps: dict[str, int], seed: int) -> str:
    lines = [
        "# Quality of efficient attention",
        "",
        f"Written by `python -m bench.quality`: {LAYERS} layers of width {WIDTH}, {HEADS} heads, seed {seed}, the",
        "same batches, steps and learning rates for all of a task. Small models, briefly trained: directions, not the",
        "papers' numbers. A loss near 2.5 is that of a model of letter pairs, which needs no attention; the standard",
        "error of an accuracy on ListOps is about 0.011.",
        "",
        "| claim | found | direction |",
        "|---|--:|---|",
        *(f"| {claim} | {value} | {'shown' if shown else 'not shown'} |" for claim, value, shown in claims(results)),
    ]
    for task, rows in results.items():
        keys = list(dict.fromkeys(key for row in rows.values() for key in row if key != "seconds"))
        better = "lower" if task == "characters" else "higher"
        lines += ["", f"## {task}, length {LENGTHS[task]}, {steps[task]} steps ({keys[0]}: {better} is better)", ""]
        lines += [f"| attention | {' | '.join(keys)} | options |", "|---|" + "--:|" * len(keys) + "---|"]
        for name, row in sorted(rows.items(), key=lambda item: item[1][keys[0]], reverse=better == "higher"):
            options = ", ".join(f"{key}={value}" for key, value in OPTIONS.get(name, {}).items())
            cells = (
                "" if key not in row else str(row[key]) if key == "parameters" else f"{row[key]:.3f}" for key in keys
            )
            lines.append(f"| {name} | {' | '.join(cells)} | {options} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=tuple(TASKS), action="append")
    parser.add_argument("--only", choices=(*OPTIONS, *TASKS["duplication"][1]), action="append", help="these layers")
    parser.add_argument("--steps", type=int, help="of training, the same for all tasks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kept", type=pathlib.Path, help="JSON of finished models: read first, written after each")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS / "efficient-quality.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    kept = options.kept
    results: Results = json.loads(kept.read_text()) if kept is not None and kept.exists() else {}
    steps: dict[str, int] = {}
    for task, (_, _, default) in TASKS.items():
        steps[task] = options.steps or default
    for task in options.task or TASKS:
        run, names, _ = TASKS[task]
        for name in names:
            if (options.only and name not in options.only) or name in results.get(task, {}):
                continue
            found = run(name, steps[task], options.seed)
            print(task, name, {key: round(value, 4) for key, value in found.items()}, flush=True)
            results.setdefault(task, {})[name] = found
            if kept is not None:
                kept.write_text(json.dumps(results, indent=1))
            options.out.write_text(table(results, steps, options.seed))


if __name__ == "__main__":
    main()
