"""The program that `make sanitize` runs, without the sanitizers: it goes stale where nobody runs it."""

from __future__ import annotations

import sanitize_smoke


def test_every_case_runs(monkeypatch, capsys) -> None:
    monkeypatch.delenv("PYSEQNET_FORCE", raising=False)
    monkeypatch.delenv("PYSEQNET_ISA", raising=False)
    sanitize_smoke.main()
    assert capsys.readouterr().out.endswith("no fault found\n")
