"""Sends the calls of a module another way, in place.

A module's `__call__` looks at `_compiled_call_impl` first, which is where `torch.nn.Module.compile` puts what it made. Used
here, too: the module stays the object that its pipeline holds, with its class, hooks, weights and `state_dict`, and a deep copy or
a pickle of it is a plain module again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from millijoule.workers.engines.protocol import EngineReport, Module, PreparedModule

Call = Callable[..., Any]


def plain_call(module: nn.Module) -> Call:
    """The module's own way, hooks included, whatever its calls are routed through."""
    return module._call_impl


class RoutingEngine:
    """What engines share: the modules they have, their ways, and what is said of them. Does nothing to a module itself."""

    name = "eager"
    exact = True
    fixed_shapes = False
    title = f"PyTorch {torch.__version__}"

    def __init__(self) -> None:
        self.events: Counter[str] = Counter()
        self._modules: list[nn.Module] = []
        self._prepared: list[PreparedModule] = []

    def prepare(self, module: Module, name: str, *, static: bool = True, large: bool = False) -> Module:
        """See `Engine`."""
        self._note(module, name, "as it is")
        return module

    def renew(self) -> None:
        """See `Engine`."""

    def release(self) -> bool:
        """See `Engine`."""
        return False

    @contextmanager
    def plain(self) -> Iterator[None]:
        """See `Engine`."""
        ways = [module._compiled_call_impl for module in self._modules]
        for module in self._modules:
            module._compiled_call_impl = None
        try:
            yield
        finally:
            for module, way in zip(self._modules, ways, strict=True):
                module._compiled_call_impl = way

    @property
    def report(self) -> EngineReport:
        """See `Engine`."""
        return EngineReport(self.title, tuple(self._prepared), dict(self.events))

    def _route(self, module: nn.Module, call: Call) -> None:
        """Send calls of `module` through `call`, a function (a module would become a part of it)."""
        module._compiled_call_impl = call
        self._modules.append(module)

    def _note(self, module: nn.Module, name: str, how: str, replaced: dict[str, int] | None = None) -> None:
        dtypes = sorted(str(d).removeprefix("torch.") for d in float_dtypes(module))
        self._prepared.append(PreparedModule(name, how, tuple(dtypes), replaced or {}))


def float_dtypes(module: nn.Module) -> set[torch.dtype]:
    """Types of the floating-point numbers that `module` holds."""
    held = (*module.parameters(), *module.buffers())
    return {tensor.dtype for tensor in held if tensor.dtype.is_floating_point}
