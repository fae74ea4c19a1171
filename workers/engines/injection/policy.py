"""Which parts of a loaded network our fused modules can stand for on its device, and what is left as it is, with the reason.

`fused_modules` is the form in which an engine takes it (DeepSpeed's `replace_module` asks for a class and what makes the replacement);
`inject` does it to a module at once. Both change modules in place: before hooks (step caches, offloading) are put on them and before
they are compiled or captured.

On a CPU nothing is replaced: the fused forms are for GPUs, and PyTorch's own stay. Under torch.compile they are not wanted
either: it fuses these operations itself, and sees into its own.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from millijoule.workers.engines.injection.fused import Fusion

log = logging.getLogger(__name__)

#: What makes, of a module of some class, the one that takes its place.
Maker = Callable[[nn.Module], nn.Module]

#: The modules here that have fused forms, wholes before their parts.
ROOMS = ("blocks", "attention", "ada_layer_norm", "feed_forward", "norms")

#: Pairs of attributes of a module, a norm and the activation that it calls next.
PAIRS = (("conv_norm_out", "conv_act"),)

#: Parts of these names are what could be fused: such as stay as they are, are listed.
TOLD = ("norm", "glu")

#: Of a GPU: what Triton's kernels, and bfloat16, need.
MIN_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class Injection:
    """What was done to a module, in numbers of its parts.

    Attributes:
        replaced: by what is fused, "GroupNorm + SiLU twice".
        left: by class and the reason why it was left alone.
    """

    replaced: Mapping[str, int] = field(default_factory=dict)
    left: Mapping[tuple[str, str], int] = field(default_factory=dict)

    def words(self) -> str:
        """One line for a log."""
        done = ", ".join(f"{count} {what}" for what, count in sorted(self.replaced.items()))
        kept = "; ".join(f"{count} {name}: {why}" for (name, why), count in sorted(self.left.items()))
        return f"fused: {done or 'nothing'}" + (f" (left: {kept})" if kept else "")


def fused_modules(module: nn.Module, device: str) -> dict[type[nn.Module], Maker]:
    """The classes below `module` of which some can be replaced on `device`, each with what replaces one of it.

    A maker returns what it is given where that is one of those to be left alone.
    """
    survey = _Survey(module, device)
    return {original: survey.maker(original) for original in survey.originals}


def inject(module: nn.Module, device: str) -> Injection:
    """Put fused modules in their places below `module`, and say what was done and what was left."""
    survey = _Survey(module, device)
    injection = survey.injection
    for original in survey.originals:
        make = survey.maker(original)
        for part in survey.parts(original):
            make(part)
    return injection


def fuses_on(device: str) -> bool:
    """Whether fused forms run there: on a GPU that is new enough, or in Triton's interpreter."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return True
    if not device.startswith("cuda") or torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        return False
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


class _Survey:
    """What a module has, by the fusion that each part gets. Nothing is changed by looking."""

    def __init__(self, module: nn.Module, device: str) -> None:
        self._fusions: dict[int, Fusion] = {}
        self._activated: dict[int, nn.Module] = {}
        self._module = module
        replaced: Counter[str] = Counter()
        left: Counter[tuple[str, str]] = Counter()
        known = _fusions() if fuses_on(device) and _is_of_diffusers(module) else {}
        covered: set[int] = set()
        for parent in module.modules():
            for norm, activation in PAIRS:
                pair = getattr(parent, norm, None), getattr(parent, activation, None)
                if type(pair[0]) is nn.GroupNorm and type(pair[1]) is nn.SiLU and known:
                    self._activated[id(pair[0])] = parent
        for part in module.modules():
            fusion, name = known.get(type(part)), type(part).__name__
            reason = fusion.reason_against(part) if fusion else "no fused form is known"
            if part is module and fusion:
                reason = "it is the whole"
            if id(part) in covered:
                continue
            if fusion and not reason:
                self._fusions[id(part)] = fusion
                covered |= {id(own) for own in fusion.covered(part)}
                replaced[fusion.does + (" + SiLU" if id(part) in self._activated else "")] += 1
            elif known and (fusion or any(word in name.lower() for word in TOLD)):
                left[name, reason] += 1
        self.injection = Injection(dict(replaced), dict(left))
        found = {id(part): type(part) for part in module.modules()}
        chosen = {found[key] for key in self._fusions}
        self.originals = [original for original in known if original in chosen]

    def parts(self, original: type[nn.Module]) -> list[nn.Module]:
        """Those of a class that are there now: what replaces a whole has replaced its parts as well."""
        return [part for part in self._module.modules() if type(part) is original]

    def maker(self, original: type[nn.Module]) -> Maker:
        """See `fused_modules`."""

        def make(part: nn.Module) -> nn.Module:
            fusion = self._fusions.get(id(part))
            if fusion is None or type(part) is not original:
                return part
            part = fusion.become(part)
            parent = self._activated.get(id(part))
            if parent is not None:
                part.__dict__["activates"] = True
                for _, activation in PAIRS:
                    setattr(parent, activation, nn.Identity())
            return part

        return make


def _is_of_diffusers(module: nn.Module) -> bool:
    return any(type(part).__module__.startswith("diffusers.") for part in module.modules())


def _fusions() -> dict[type[nn.Module], Fusion]:
    """All there are, wholes before their parts. Late, for they import diffusers and Triton."""
    found: dict[type[nn.Module], Fusion] = {}
    for room in ROOMS:
        try:
            fusions = importlib.import_module(f"{__package__}.{room}").FUSIONS
        except ImportError as error:  # a name of diffusers that this version does not have
            log.warning("no fused %s: %s", room.replace("_", " "), error)
            continue
        found |= {fusion.original: fusion for fusion in fusions}
    return found
