"""Calls of a module replayed from CUDA graphs, which DeepSpeed captures.

DeepSpeed's engine captures the first call it sees and copies the tensors of later ones, by place and name, into that call's
own. That is right only where every call has tensors of the same shapes at the top level of its arguments, where all else is
equal, and where nobody keeps the tensors of the first call or the output of any. So each *signature* of a call (shapes, types and
strides of tensors however deep they lie, and all that is no tensor) gets an engine of its own here, which sees tensors only,
copies of the caller's, and gives copies back.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from millijoule.workers.drawing.out_of_memory import is_out_of_memory
from millijoule.workers.engines.routing import plain_call

log = logging.getLogger(__name__)

#: Signatures of a module that are kept as graphs; each keeps the memory of one call.
MAX_GRAPHS = 8

#: Attributes that diffusers and accelerate give to modules whose calls they change: weights that come and go, steps that are skipped.
HOOKS = ("_hf_hook", "_diffusers_hook")

#: What calls may have beside tensors, compared by value.
PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)

Signature = tuple[Any, ...]


class CapturedCalls:
    """Calls `module`, by a graph where it can.

    Args:
        module: what is called.
        name: for logs.
        capture: makes DeepSpeed's engine for a module that takes and returns tensors alone.
        events: counts what happened.
    """

    def __init__(
        self,
        module: nn.Module,
        name: str,
        capture: Callable[[nn.Module], Callable[..., Any]],
        events: Counter[str],
    ) -> None:
        self._module = module
        self._name = name
        self._capture = capture
        self._events = events
        self._graphs: OrderedDict[Signature, _Graph] = OrderedDict()
        self._stopped = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        plain = plain_call(self._module)
        if self._stopped or torch.is_grad_enabled() or _has_hook(self._module):
            return plain(*args, **kwargs)
        leaves, spec = tree_flatten((args, kwargs))
        tensors = self._on_device([x for x in leaves if isinstance(x, Tensor)])
        signature = None if tensors is None else signature_of(leaves, spec)
        if tensors is None or signature is None:
            return plain(*args, **kwargs)
        graph = self._graphs.get(signature)
        if graph is None and any(map(_has_hook, self._module.modules())):
            return plain(*args, **kwargs)
        try:
            if graph is None:
                if len(self._graphs) == MAX_GRAPHS:
                    self._graphs.popitem(last=False)
                graph = self._graphs[signature] = _Graph(self._module, leaves, spec, self._capture)
                self._events["captured"] += 1
            self._graphs.move_to_end(signature)
            return graph(tensors)
        except RuntimeError as error:
            self.clear()
            if is_out_of_memory(error):
                raise
            self._stopped = True
            self._events["not captured"] += 1
            log.warning(
                "%s: runs without CUDA graphs from now on: %s", self._name, str(error).splitlines()[0]
            )
            return plain(*args, **kwargs)

    def clear(self) -> None:
        """Drop all graphs; new ones are captured."""
        self._graphs.clear()

    def stop(self) -> bool:
        """Drop all graphs, and capture no more; whether there were any."""
        had = bool(self._graphs)
        self.clear()
        self._stopped = True
        return had

    def _on_device(self, tensors: Sequence[Tensor]) -> list[Tensor] | None:
        """`tensors` with single numbers brought to the module's device; None where others are elsewhere."""
        device = next((p.device for p in (*self._module.parameters(), *self._module.buffers())), None)
        if device is None:
            device = next((t.device for t in tensors if t.ndim), torch.device("cpu"))
        moved = [t.to(device) if t.ndim == 0 else t for t in tensors]
        return moved if all(t.device == device for t in moved) else None


def signature_of(leaves: Sequence[Any], spec: TreeSpec) -> Signature | None:
    """What must be equal for one graph to serve two calls; None where that cannot be told."""
    if not all(isinstance(x, (Tensor, *PLAIN)) for x in leaves):
        return None
    parts = [
        (tuple(x.shape), x.dtype, x.stride(), x.device) if isinstance(x, Tensor) else (type(x), x)
        for x in leaves
    ]
    return (repr(spec), *parts, torch.is_inference_mode_enabled(), _autocast("cuda"), _autocast("cpu"))


def _autocast(kind: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _has_hook(module: nn.Module) -> bool:
    return any(hasattr(module, name) for name in HOOKS)


class _Graph:
    """One signature's engine, and how its calls are taken apart and put together."""

    def __init__(
        self, module: nn.Module, leaves: Sequence[Any], spec: TreeSpec, capture: Callable[..., Any]
    ) -> None:
        self._flat = _Flat(module, leaves, spec)
        self._engine = capture(self._flat)
        self._first = True

    def __call__(self, tensors: Sequence[Tensor]) -> Any:
        if self._first:  # the graph's own buffers: DeepSpeed writes later calls' tensors into the first one's
            tensors = [t.clone(memory_format=torch.preserve_format) for t in tensors]
            self._first = False
        return self._flat.whole([t.clone() for t in self._engine(*tensors)])


class _Flat(nn.Module):
    """A module whose calls take and return tensors alone; all else of them is that of the call it was made from."""

    def __init__(self, module: nn.Module, leaves: Sequence[Any], spec: TreeSpec) -> None:
        super().__init__()
        self.module = module
        self._leaves = [None if isinstance(x, Tensor) else x for x in leaves]
        self._places = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]
        self._spec = spec
        self._out: tuple[list[Any], list[int], TreeSpec] | None = None

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        leaves = list(self._leaves)
        for place, tensor in zip(self._places, tensors, strict=True):
            leaves[place] = tensor
        args, kwargs = tree_unflatten(leaves, self._spec)
        out, spec = tree_flatten(plain_call(self.module)(*args, **kwargs))
        places = [i for i, x in enumerate(out) if isinstance(x, Tensor)]
        self._out = [None if isinstance(x, Tensor) else x for x in out], places, spec
        return tuple(out[i] for i in places)

    def whole(self, tensors: Sequence[Tensor]) -> Any:
        """What the module returned, with `tensors` in it."""
        assert self._out is not None
        leaves, places, spec = self._out
        out = list(leaves)
        for place, tensor in zip(places, tensors, strict=True):
            out[place] = tensor
        return tree_unflatten(out, spec)
