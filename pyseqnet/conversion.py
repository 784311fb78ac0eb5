"""Turning a model made of torch's layers into one made of ours."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch.nn import Module as _TorchModule
from torch.nn import Sequential as _TorchSequential
from torch.nn import TransformerEncoder as _TorchTransformerEncoder
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from pyseqnet import _C, nn
from pyseqnet.functional._common import SUPPORTED_DTYPES
from pyseqnet.nn.sequential import fused_run

# torch's layer -> ours. A class of ours that has more attributes than torch's gives them defaults in its class body,
# since a converted layer never passes through our constructor.
_TWINS: dict[type, type] = {
    getattr(torch.nn, name): getattr(nn, name)
    for name in nn.__all__
    if name != "Sequential" and hasattr(torch.nn, name)
}
_OURS = tuple(cls for name in nn.__all__ if isinstance(cls := getattr(nn, name), type))  # not its functions

Skip = Iterable["str | type[_TorchModule] | _TorchModule"] | Callable[[str, _TorchModule], bool]


@dataclass
class Conversion:
    """What `convert` did. Names are those of ``model.named_modules()``; the model itself is ``""``."""

    replaced: dict[str, str] = field(default_factory=dict)  # name of a layer: its new class, with its module
    fused: list[tuple[str, ...]] = field(default_factory=list)  # layers that run as one operation
    not_fused: dict[str, str] = field(default_factory=dict)  # name of a convolution before a ReLU: why not, or not all
    left: dict[str, str] = field(default_factory=dict)  # name of a layer that stays as it is: why
    attention: dict[str, str] = field(default_factory=dict)  # name of a transformers model: "pyseqnet", or why not

    def __str__(self) -> str:
        lines = [f"replaced: {len(self.replaced)}"]
        lines += [f"  {name or '(the model)'}: {new}" for name, new in self.replaced.items()]
        lines += [f"run as one operation: {len(self.fused)}"]
        lines += [f"  {' + '.join(names)}" for names in self.fused]
        lines += [f"  {name}: not fused: {reason}" for name, reason in self.not_fused.items()]
        lines += [f"attention of {name or '(the model)'}: {result}" for name, result in self.attention.items()]
        lines += [f"left: {len(self.left)}"]
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.left.items():
            by_reason.setdefault(reason, []).append(name or "(the model)")
        lines += [f"  {reason}: {', '.join(names)}" for reason, names in by_reason.items()]
        return "\n".join(lines)


def _skipped(model: _TorchModule, skip: Skip) -> set[int]:
    """The ids of the modules that are not to be touched: what `skip` names, and everything inside."""
    roots: list[_TorchModule] = []
    if callable(skip) and not isinstance(skip, (type, _TorchModule)):
        roots = [module for name, module in model.named_modules() if skip(name, module)]
        return {id(part) for root in roots for part in root.modules()}
    wanted = (skip,) if isinstance(skip, (str, type, _TorchModule)) else tuple(skip)
    for item in wanted:
        if isinstance(item, str):
            try:
                roots.append(model.get_submodule(item))
            except AttributeError:
                raise ValueError(f"skip: the model has no module named {item!r}") from None
        elif isinstance(item, type) and issubclass(item, _TorchModule):
            roots += [module for module in model.modules() if isinstance(module, item)]
        elif isinstance(item, _TorchModule):
            roots.append(item)
        else:
            raise TypeError(f"skip: expected names, layer classes or modules, got {item!r}")
    return {id(part) for root in roots for part in root.modules()}


def _plain_class(module: _TorchModule) -> type:
    """The class of the module; of a parametrised one the class it had before."""
    return type(module).__bases__[0] if is_parametrized(module) else type(module)


def _why_left(module: _TorchModule) -> str:
    """Why a module stays as it is; empty if we have a layer for it."""
    kind = _plain_class(module)
    name = kind.__name__
    if isinstance(module, torch.jit.ScriptModule):
        return "it is scripted"
    if kind not in _TWINS:
        bases = [twin.__name__ for twin in _TWINS if isinstance(module, twin)]
        if any(is_lazy(parameter) for parameter in module.parameters(recurse=False)):
            return f"{name} has no shape yet: run the model once, then convert"
        if bases:
            return f"{name} derives from torch.nn.{bases[0]} and may compute something else"
        return f"pyseqnet has no {name}"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    for parameter in module.parameters(recurse=False):
        if parameter.dtype not in SUPPORTED_DTYPES:
            return f"no kernels for {str(parameter.dtype).removeprefix('torch.')}"
        if parameter.device.type == "cuda" and not _C.build_info()["cuda"]:
            return "this build has no CUDA kernels"
        if parameter.device.type not in ("cpu", "cuda", "meta"):
            return f"no kernels for {parameter.device.type}"
    return ""


def _take_class(module: _TorchModule, new: type) -> None:
    """The object stays the same, with all it holds: parameters, hooks, buffers, attributes; its class changes."""
    old = type(module)
    if is_parametrized(module):  # a class made for this one object, which holds the computed parameters as properties
        own = {key: value for key, value in vars(old).items() if key not in ("__dict__", "__weakref__")}
        new = type(old.__name__, (new,), own)
    module.__class__ = new


def _fuse(model: _TorchModule, untouched: set[int], report: Conversion) -> None:
    for prefix, row in model.named_modules():
        if not isinstance(row, _TorchSequential) or id(row) in untouched:
            continue
        names = [f"{prefix}.{name}" if prefix else name for name in row._modules]
        layers, position, found = list(row), 0, False
        while position < len(layers):
            length, reason = fused_run(layers, position)
            if length and type(row) not in (_TorchSequential, nn.Sequential):
                length, reason = 0, f"{type(row).__name__} is a subclass of Sequential"
            if length:
                report.fused.append(tuple(names[position : position + length]))
                found = True
            if reason:
                report.not_fused[names[position]] = reason
            position += max(length, 1)
        if found and type(row) is _TorchSequential:
            if "forward" in row.__dict__:
                report.left[prefix] = "its forward was replaced on the instance"
                continue
            _take_class(row, nn.Sequential)
            report.replaced[prefix] = "pyseqnet.nn.Sequential"


def _exchange_attention(model: _TorchModule, untouched: set[int], report: Conversion) -> None:
    """Models of Hugging Face transformers have their attention in a function, not in a layer."""
    library = sys.modules.get("transformers")
    if library is None:  # then no module can be a model of it
        return
    outermost: list[_TorchModule] = []
    for name, module in model.named_modules():
        if not isinstance(module, library.PreTrainedModel) or any(module is part for part in outermost):
            continue
        outermost += [part for part in module.modules() if part is not module]
        if any(id(part) in untouched and isinstance(part, library.PreTrainedModel) for part in module.modules()):
            report.attention[name] = "skipped"
            continue
        from pyseqnet.integrations import huggingface  # that library is not ours to import unasked

        report.attention[name] = huggingface.switch(module) or huggingface.NAME


def convert(model: _TorchModule, skip: Skip = (), *, fuse: bool = True, attention: bool = True) -> Conversion:
    """Replace torch's layers by ours, in place, wherever we have the layer.

    No object is exchanged: a layer gets another class. So parameters stay the same objects (tied ones stay tied, an
    optimizer keeps its grip), hooks, parametrisations, weight norm, pruning, buffers, ``training``, names and
    ``state_dict`` stay as they are, as do references to layers from elsewhere; `model` may itself be a layer.

    Args:
        model: any module; the one that is changed.
        skip: what to leave alone, with everything inside it: a module, a layer class, a name as in
            ``model.named_modules()``, several of these, or a function ``(name, module) -> bool``.
        fuse: `Conv2d, ReLU, MaxPool2d` and convolution and ReLU that follow one another in a `torch.nn.Sequential` run
            as one operation: see `pyseqnet.nn.Sequential`, which such a row becomes. A layer that is hooked then or
            later, called alone, or used in a slice still runs by itself.
        attention: a model of Hugging Face ``transformers`` that runs ``sdpa`` gets ``attn_implementation="pyseqnet"``;
            ``model.set_attn_implementation("sdpa")`` undoes it. See `pyseqnet.integrations.huggingface`.

    Returns:
        A `Conversion`: which layers were replaced, which run as one, which were left, and why. ``print`` shows it.

    Raises:
        TypeError: `model` is not a module, or an entry of `skip` is of another kind.
        ValueError: `skip` names a module that is not there.

    What stays torch's: layers that we do not have, subclasses (they may compute something else), lazy layers before
    their first call, scripted ones, dtypes and devices without kernels. Replaced recurrent layers are no instances of
    ``torch.nn.LSTM`` any more, but of ``torch.nn.RNNBase``. To undo it, copy the model before.

    >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3), torch.nn.ReLU(), torch.nn.MaxPool2d(2))
    >>> report = convert(model)
    >>> report.replaced["0"], report.fused
    ('pyseqnet.nn.Conv2d', [('0', '1', '2')])
    """
    if not isinstance(model, _TorchModule):
        raise TypeError(f"convert: expected a torch.nn.Module, got {type(model).__name__}")
    untouched = _skipped(model, skip)
    report = Conversion()
    nested: set[int] = set()  # the layers of encoders that may hand them nested tensors, which ours refuse
    for name, module in list(model.named_modules()):
        if isinstance(module, _OURS):
            continue
        if id(module) in untouched:
            if _plain_class(module) in _TWINS:
                report.left[name] = "skipped"
            continue
        reason = _why_left(module)
        if id(module) in nested:
            reason = reason or "it stands in a subclass of TransformerEncoder, which may use nested tensors"
        if not reason:
            new = _TWINS[_plain_class(module)]
            _take_class(module, new)
            report.replaced[name] = f"pyseqnet.nn.{new.__name__}"
        elif not any(True for _ in module.children()) or isinstance(module, tuple(_TWINS)):
            report.left[name] = reason
            if isinstance(module, _TorchTransformerEncoder):
                nested |= {id(part) for part in module.modules()}
    if fuse:
        _fuse(model, untouched, report)
    if attention:
        _exchange_attention(model, untouched, report)
    return report
