"""Two result files, row by row: FASTER, SLOWER or SAME, noise considered."""

from __future__ import annotations

import json
import pathlib
from collections import Counter

from bench.timing import Timing, change

Row = dict


def load(path: str | pathlib.Path) -> dict:
    return json.loads(pathlib.Path(path).read_text())


def key(row: Row) -> tuple[str, str, str, str]:
    return row["family"], row["name"], row["dtype"], row["mode"]


def verdict(old: Row, new: Row, same_torch: bool) -> tuple[str, float, float]:
    """(word, new time / old time, noise).

    With the same torch in both files a change is taken relative to torch eager of the same run: the machine's
    own drift cancels.
    """
    labels = ("ours", "eager") if same_torch else ("ours",)
    before, after = ({label: Timing(**row["times"][label]) for label in labels} for row in (old, new))
    ratio = after["ours"].median / before["ours"].median
    if same_torch:
        ratio *= before["eager"].median / after["eager"].median
    word, noise = change(ratio, [*before.values(), *after.values()])
    return word, ratio, noise


def compare(old_path: str, new_path: str) -> int:
    old, new = load(old_path), load(new_path)
    same_torch = old["meta"]["torch"] == new["meta"]["torch"]
    for name, file in (("old", old), ("new", new)):
        meta = file["meta"]
        where = f"{meta['device']}, {meta['threads']} threads"
        print(f"{name}: {where}, torch {meta['torch']}, commit {meta['commit']}, {meta['date']}")
    if old["meta"]["device"] != new["meta"]["device"]:
        print("note: the two files come from different devices")
    print("relative to torch eager of the same run\n" if same_torch else "absolute times: torch differs\n")
    before = {key(row): row for row in old["rows"]}
    words: Counter[str] = Counter()
    for row in new["rows"]:
        was = before.pop(key(row), None)
        title = f"{row['family']}/{row['name']} {row['dtype']} {row['mode']}"
        if was is None:
            words["NEW"] += 1
            print(f"{title:<56}{'':>10}{row['times']['ours']['median'] * 1e3:>10.3f} ms             NEW")
            continue
        word, ratio, noise = verdict(was, row, same_torch)
        words[word] += 1
        print(
            f"{title:<56}{was['times']['ours']['median'] * 1e3:>10.3f}"
            f"{row['times']['ours']['median'] * 1e3:>10.3f} ms  x{1 / ratio:<5.2f} +-{noise:<4.0%} {word}"
        )
    for gone in before:
        words["GONE"] += 1
        print(f"{' '.join([gone[0] + '/' + gone[1], *gone[2:]]):<56}{'':>24} GONE")
    print("\n" + ", ".join(f"{count} {word}" for word, count in words.most_common()))
    return 0
