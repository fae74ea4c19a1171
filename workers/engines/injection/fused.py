"""What a fused module is: a subclass of the one it stands for, which a module of that class can become.

Becoming changes a module's class and nothing else: its parameters, names, hooks and place in other modules stay what they are, so
weights are shared by being the same, `state_dict` has the same keys, and LoRA or offloading find what they look for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import nn

from millijoule.workers.engines.injection.known_forms import digest_of

#: Why a fused form does not take the place of code that it does not know.
OTHER_VERSION = "this version of the library computes it another way"


class Fits(Protocol):
    """Whether a module of the original class is one that its fused form takes: "" or the reason why not."""

    def __call__(self, module: nn.Module) -> str: ...


@dataclass(frozen=True)
class Fusion:
    """One fused form.

    Attributes:
        original: the class it stands for, exactly.
        fused: what a module of it becomes.
        does: what is fused, for people.
        fits: which modules of the class.
        known: digests (`known_forms`) of the original's `forward` that the fused one was written after; empty: the original is
            PyTorch's own, whose meaning is documented.
        covers: attributes of the module whose work its fused form does or calls in ways of its own.
        parts: what those become with it, by class.
    """

    original: type[nn.Module]
    fused: type[nn.Module]
    does: str
    fits: Fits = lambda module: ""
    known: frozenset[str] = frozenset()
    covers: tuple[str, ...] = ()
    parts: Mapping[type[nn.Module], type[nn.Module]] = field(default_factory=dict)

    def reason_against(self, module: nn.Module) -> str:
        """Why `module`, of the original class, is left alone; "" where it is not."""
        if self.known and digest_of(self.original.forward) not in self.known:
            return OTHER_VERSION
        return self.fits(module)

    def covered(self, module: nn.Module) -> list[nn.Module]:
        """The parts of `module` that `covers` names."""
        found = (getattr(module, name, None) for name in self.covers)
        return [part for part in found if isinstance(part, nn.Module)]

    def become(self, module: nn.Module) -> nn.Module:
        """`module`, which is of the fused class from now on."""
        assert type(module) is self.original
        for part in self.covered(module):
            part.__class__ = self.parts.get(type(part), type(part))
        module.__class__ = self.fused
        return module
