"""`--engine compile`: modules through torch.compile, one compilation for each signature of their calls.

Shapes are compiled in as they are (`dynamic=False`), so callers pad their batches (`fixed_shapes`). A call that would be compiled
anew although it looks like an earlier one is reported; a module that meets too many kinds of calls runs the rest plainly.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from millijoule.workers.drawing.out_of_memory import is_out_of_memory
from millijoule.workers.engines.cuda_graphs import signature_of
from millijoule.workers.engines.protocol import EngineSettings, Module
from millijoule.workers.engines.routing import RoutingEngine, plain_call
from millijoule.workers.errors import InputError

log = logging.getLogger(__name__)

#: Kinds of calls (shapes, and arguments that are no tensors) a module is compiled for; PyTorch itself stops at 8.
MAX_COMPILED = 8


class CompileEngine(RoutingEngine):
    """See `Engine`."""

    name = "compile"
    exact = False
    fixed_shapes = True
    title = f"torch.compile {torch.__version__}"

    def __init__(self, settings: EngineSettings) -> None:
        """Raises InputError where there is no compiler."""
        super().__init__()
        self.settings = settings
        check_compiler(settings)
        self._compiled: list[_CompiledCalls] = []

    def prepare(self, module: Module, name: str, *, static: bool = True, large: bool = False) -> Module:
        """See `Engine`."""
        if static:
            graphs = self.settings.cuda_graphs and self.settings.on_gpu
            calls = _CompiledCalls(module, name, graphs, self.events)
            self._compiled.append(calls)
            self._route(module, calls)
        else:
            log.warning("--engine compile: %s runs as it is, its shapes differ from call to call", name)
        self._note(module, name, "compiled" if static else "as it is")
        return module

    def renew(self) -> None:
        """See `Engine`."""
        for calls in self._compiled:
            calls.clear()

    def release(self) -> bool:
        """See `Engine`."""
        return sum(calls.release_graphs() for calls in self._compiled) > 0


def check_compiler(settings: EngineSettings) -> None:
    """Raise InputError, which says what is missing, unless torch.compile can make code for the device.

    A compiler is the one that `CC` (Triton, on a GPU) or `CXX` names, else what they look for.
    """
    if settings.on_gpu:
        try:
            import triton  # noqa: F401
        except ImportError as error:
            raise InputError(
                f"--engine compile: on a GPU it needs Triton, which is not installed ({error})"
            ) from error
        named = os.environ.get("CC")
        if not any(shutil.which(name) for name in (("gcc", "clang") if named is None else (named,))):
            raise InputError(
                f"--engine compile: on a GPU it needs a C compiler{_not_there('CC')}: install gcc, or name another in CC, or take "
                "another engine"
            )
        return
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as error:  # what it raises differs between versions
        raise InputError(
            f"--engine compile: on a CPU it needs a C++ compiler{_not_there('CXX')}: install g++, or name another in CXX, or take "
            "another engine"
        ) from error


def _not_there(variable: str) -> str:
    """What a message adds where the environment names a compiler. Neither library takes arguments in it, as build tools do."""
    named = os.environ.get(variable)
    return "" if named is None else f", and {variable}={named} is not the name of a program here"


class _CompiledCalls:
    """Calls `module`, compiled for each signature that comes."""

    def __init__(self, module: nn.Module, name: str, graphs: bool, events: Counter[str]) -> None:
        self._module = module
        self._name = name
        self._graphs = graphs
        self._events = events
        self._known: set[Any] = set()
        self._failed = False
        self._warned = False
        self._compiled = self._make()

    def _make(self) -> Any:
        mode = "reduce-overhead" if self._graphs else None
        return torch.compile(plain_call(self._module), dynamic=False, mode=mode)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._failed:
            return plain_call(self._module)(*args, **kwargs)
        leaves, spec = tree_flatten((args, kwargs))
        signature = signature_of(leaves, spec)
        new = signature not in self._known
        if new and (signature is None or len(self._known) == MAX_COMPILED):
            self._warn_once("more than %d kinds of calls: the others run as they are", MAX_COMPILED)
            return plain_call(self._module)(*args, **kwargs)
        if new:
            log.info("%s: compiles for a new kind of call, which can take minutes", self._name)
        before = _graphs_made()
        try:
            out = self._run(args, kwargs)
        except _compilation_errors() as error:
            if is_out_of_memory(error):
                raise
            self._failed = True
            self._events["not compiled"] += 1
            log.warning("%s: cannot be compiled, runs as it is: %s", self._name, str(error).splitlines()[0])
            return plain_call(self._module)(*args, **kwargs)
        if new:
            self._known.add(signature)
            self._events["compiled"] += 1
        elif _graphs_made() > before:
            self._events["compiled again"] += 1
            self._warn_once("compiled again for a call like an earlier one, which costs time")
        return out

    def _run(self, args: Any, kwargs: Any) -> Any:
        if not self._graphs:
            return self._compiled(*args, **kwargs)
        torch.compiler.cudagraph_mark_step_begin()
        out, spec = tree_flatten(self._compiled(*args, **kwargs))
        # the next replay writes over what the last one returned
        return spec.unflatten([x.clone() if isinstance(x, Tensor) else x for x in out])

    def clear(self) -> None:
        """Compile anew from the next call on."""
        self._known.clear()
        self._failed = False
        self._compiled = self._make()

    def release_graphs(self) -> bool:
        """Go on without CUDA graphs; whether there were any."""
        had, self._graphs = self._graphs, False
        if had:
            self.clear()
        return had

    def _warn_once(self, words: str, *values: Any) -> None:
        if not self._warned:
            self._warned = True
            log.warning(f"{self._name}: {words}", *values)


def _graphs_made() -> int:
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def _compilation_errors() -> tuple[type[Exception], ...]:
    from torch._dynamo.exc import TorchDynamoException

    return (TorchDynamoException,)
