"""Every module here is a family: its `CASES` are found by name, so that a new family is a new file."""

from __future__ import annotations

import importlib
import pkgutil

from bench.case import Case


def families() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def all_cases() -> list[Case]:
    cases: list[Case] = []
    for family in families():
        cases.extend(importlib.import_module(f"{__name__}.{family}").CASES)
    return cases
