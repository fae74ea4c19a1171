"""LoRAs beside a loaded pipeline: loaded once, switched between batches, with the pipeline's own weights never touched.

They are adapters of peft: a layer adds `weight * B(A(x))` to what it computes, so that without them it computes bit for bit what
it did. Nothing is merged into weights and taken out again, which would round.
"""

from __future__ import annotations

import logging
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

from millijoule.workers.errors import InputError
from millijoule.workers.generators.options import LoraChoice
from millijoule.workers.loras.words import mix_of

log = logging.getLogger(__name__)

#: So many stay on the device; of more, those that were not used for longest are loaded again when a row wants them.
MAX_RESIDENT = 16


class LoraSwitch:
    """The LoRAs of a job on one pipeline.

    Attributes:
        loads: how often a file was loaded.
        switches: how often the mix was changed.
    """

    def __init__(
        self, pipeline: Any, choices: tuple[LoraChoice, ...], max_resident: int = MAX_RESIDENT
    ) -> None:
        """Load every one once, to see that it fits, and switch to all of them.

        Raises:
            InputError: peft is missing, the pipeline takes none, or one does not fit it.
        """
        self.pipeline = pipeline
        self.loads = self.switches = 0
        self._choices = {choice.name: choice for choice in choices}
        self._declared = {choice.name: choice.weight for choice in choices}
        self._resident: OrderedDict[str, None] = OrderedDict()
        self._max_resident = max_resident
        self._current: dict[str, float] | None = None
        if choices:
            check_support(type(pipeline), choices[0].path)
            for name in self._choices:
                self._bring(name, keep={name})
            self.use(None)

    def use(self, cell: str | None) -> None:
        """Make what is drawn next use the mix of a request's `lora`; nothing happens where it is in use."""
        mix = mix_of(cell, self._declared)
        if not self._choices or mix == self._current:
            return
        for name in mix:
            self._bring(name, keep=set(mix))
        self._keep_at_most(self._max_resident, keep=set(mix))
        self.switches += 1
        if mix:
            self.pipeline.enable_lora()
            names = list(mix)
            self.pipeline.set_adapters([self._adapter(n) for n in names], [mix[n] for n in names])
        else:
            self.pipeline.disable_lora()
        self._current = mix

    def _adapter(self, name: str) -> str:
        """The name of an adapter: it becomes one of a module, which may hold no dots."""
        return f"lora_{list(self._choices).index(name)}"

    def _bring(self, name: str, keep: set[str]) -> None:
        if name in self._resident:
            self._resident.move_to_end(name)
            return
        self._keep_at_most(self._max_resident - 1, keep)
        self._load(self._choices[name])
        self._resident[name] = None

    def _keep_at_most(self, count: int, keep: set[str]) -> None:
        """Take those away that were not used for longest; `keep` stay."""
        while len(self._resident) > count and (spare := [n for n in self._resident if n not in keep]):
            self.pipeline.delete_adapters(self._adapter(spare[0]))
            del self._resident[spare[0]]

    def _load(self, choice: LoraChoice) -> None:
        path, adapter = Path(choice.path), self._adapter(choice.name)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that there is more than one
                self.pipeline.load_lora_weights(
                    str(path.parent),
                    weight_name=path.name,
                    adapter_name=adapter,
                    local_files_only=True,
                    use_safetensors=True,
                )
        except Exception as error:  # whatever the libraries make of a file that is not for this model
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(
                f"--lora {path}: does not fit this {type(self.pipeline).__name__}: {reason}"
            ) from error
        found = self.pipeline.get_list_adapters()
        if not any(adapter in names for names in found.values()):
            raise InputError(
                f"--lora {path}: matches no layer of this {type(self.pipeline).__name__}; it was made for another model"
            )
        self.loads += 1


def check_support(kind: Any, path: str) -> None:
    """Raise InputError where pipelines of class `kind` take no LoRA, or peft is not installed."""
    if not hasattr(kind, "load_lora_weights"):
        raise InputError(f"--lora {path}: a {kind.__name__} takes no LoRA")
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"--lora {path}: LoRAs need peft: pip install 'millijoule[diffusers]' ({error})"
        ) from error
