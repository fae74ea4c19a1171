"""How a model is loaded and run, beside what its own files say; travels from the driver to every worker."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from millijoule.workers.rungs.rungs import Rungs

EngineName = Literal["deepspeed", "compile", "eager"]
LongPrompts = Literal["truncate", "reject", "chunk"]


@dataclass(frozen=True)
class LoraChoice:
    """A LoRA file, by the path workers open, and how strongly it is applied."""

    path: str
    weight: float = 1.0


@dataclass(frozen=True)
class GeneratorOptions:
    """Read by `load_generator`. Whatever changes pixels is part of a job's fingerprint (`identity`).

    Attributes:
        engine: what runs the networks (`workers.engines`).
        rungs: what makes a diffusion pipeline cheaper (`workers.rungs`).
        batch_size: most images per call of the model; None: the worker finds it.
        variant: of the weight files, such as "fp16"; None: the fullest precision there is.
        loras: applied to every image whose row names none.
        scheduler: name of a diffusers class; None: the pipeline's own.
        vae: folder or file of another decoder.
        long_prompts: what happens to a prompt that is longer than the text encoder reads.
        devices: how many the worker has.
    """

    engine: EngineName = "deepspeed"
    rungs: Rungs = Rungs()  # noqa: RUF009 (frozen)
    batch_size: int | None = None
    variant: str | None = None
    loras: tuple[LoraChoice, ...] = ()
    scheduler: str | None = None
    vae: str | None = None
    long_prompts: LongPrompts = "truncate"
    devices: int = 1

    def identity(self) -> dict[str, Any]:
        """What of these changes pixels and is not the default, as JSON values."""
        said = asdict(self) | {"rungs": self.rungs.identity()}
        return {
            f.name: said[f.name]
            for f in fields(self)
            if f.name not in ("batch_size", "devices") and getattr(self, f.name) != f.default
        }
