"""What an engine is, what it is told, and what it says of its work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from torch import nn

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class EngineSettings:
    """What an engine is told.

    Attributes:
        device: "cpu", "cuda" or "cuda:1": where the modules are, or will be when they run. Engines move nothing else there.
        cuda_graphs: capture the calls of modules on a GPU whose shapes repeat, and replay them.
        fused_modules: put our fused modules in the place of those they can stand for.
        offload_weights: keep weights of large modules in host memory, and bring each layer's to the device when it runs.
    """

    device: str = "cpu"
    cuda_graphs: bool = False
    fused_modules: bool = False
    offload_weights: bool = False

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")


@dataclass(frozen=True)
class PreparedModule:
    """What became of one module: `how` its calls go now, `dtypes` of its numbers, how many of its parts were `replaced`, by
    the name of their class."""

    name: str
    how: str
    dtypes: tuple[str, ...]
    replaced: Mapping[str, int] = field(default_factory=dict)

    def words(self) -> str:
        parts = [f"{self.name} {self.how}", "+".join(self.dtypes) or "integers"]
        parts += [f"{count} {name} fused" for name, count in sorted(self.replaced.items())]
        return ", ".join(parts)


@dataclass(frozen=True)
class EngineReport:
    """What an engine has done since it was opened.

    `events` counts what happened while modules ran: "compiled", "compiled again", "captured", "not captured".
    """

    engine: str
    modules: tuple[PreparedModule, ...]
    events: Mapping[str, int] = field(default_factory=Counter)

    def words(self) -> str:
        """One line for a log."""
        return f"{self.engine}: " + ("; ".join(m.words() for m in self.modules) or "nothing to run")


class Engine(Protocol):
    """Runs the networks of one loaded model, on one device.

    Modules are prepared in place: `prepare` changes which way a module's calls go, not the module. What is done to it
    later by its attributes, hooks or `state_dict` works as before. Images of the integer core are the same bits in every
    engine; floating-point ones differ by roundings at most where `exact` is False.

    Attributes:
        name: as `--engine` has it.
        exact: whether it computes the very same numbers as PyTorch run plainly.
        fixed_shapes: whether a new batch size costs dearly (a compilation, a capture), so that batches had better be padded.
    """

    name: str
    exact: bool
    fixed_shapes: bool

    def prepare(self, module: Module, name: str, *, static: bool = True, large: bool = False) -> Module:
        """Take over the calls of `module`, and return what is to be called from now on.

        Args:
            module: in evaluation mode and in its final types.
            name: for reports and logs: "unet", "decoder".
            static: its shapes repeat, and what it does depends on no value of a tensor and on nothing that it remembers.
            large: the module that a model is mostly made of.
        """
        ...

    def renew(self) -> None:
        """Forget what was compiled or captured: weights or parts of a module have been changed."""
        ...

    def release(self) -> bool:
        """Give up memory that speeds things up, for good; whether there was any."""
        ...

    def plain(self) -> AbstractContextManager[None]:
        """While this is open, modules run as PyTorch has them: for whoever counts operations."""
        ...

    @property
    def report(self) -> EngineReport: ...
