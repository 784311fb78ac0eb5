"""What torch.compile is told about our functions, without importing it: that takes a second."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

F = TypeVar("F", bound=Callable[..., object])


def constant_result(function: F) -> F:
    """`torch.compiler.assume_constant_result`, which would import the whole compiler where it decorates."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
