"""How a model is loaded and run, beside what its own files say; travels from the driver to every worker."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from millijoule.workers.rungs.rungs import Rungs

EngineName = Literal["deepspeed", "compile", "eager"]
LongPrompts = Literal["truncate", "reject", "chunk"]


@dataclass(frozen=True)
class LoraChoice:
    """A LoRA file, by the path workers open, and how strongly it is applied.

    Attributes:
        name: what a row's cell calls it.
        sha256: of the file; empty: not known yet.
    """

    path: str
    weight: float = 1.0
    name: str = ""
    sha256: str = ""


@dataclass(frozen=True)
class ModelPart:
    """A file or folder that stands in for a part of the model, by the path workers open, and the hash of its content."""

    path: str
    sha256: str = ""


@dataclass(frozen=True)
class GeneratorOptions:
    """Read by `load_generator`. Whatever changes pixels is part of a job's fingerprint (`identity`).

    Attributes:
        engine: what runs the networks (`workers.engines`).
        cuda_graphs: replay their calls from CUDA graphs.
        fused_modules: run fused forms of their parts.
        offload_weights: keep a denoiser's weights in host memory.
        rungs: what makes a diffusion pipeline cheaper (`workers.rungs`).
        batch_size: most images per call of the model; None: the worker finds it.
        variant: of the weight files, such as "fp16"; None: the fullest precision there is.
        loras: applied to every image whose row names none.
        scheduler: name of a diffusers class, with settings (`pipeline_parts.scheduler_choice`); None: the pipeline's own.
        vae: folder or file of another decoder.
        long_prompts: what happens to a prompt that is longer than the text encoder reads.
        width, height: of images whose row says nothing, in pixels; None: the model's own.
        ranks: processes of one worker, each with a device, among which a denoiser is spread (`workers.ranks`).
        config: folder of a pipeline whose configurations and vocabularies serve a checkpoint in one file; its content is in
            the model's own hash.
        name: what images call the model; None: what its files say.
    """

    engine: EngineName = "deepspeed"
    cuda_graphs: bool = False
    fused_modules: bool = False
    offload_weights: bool = False
    rungs: Rungs = Rungs()  # noqa: RUF009 (frozen)
    batch_size: int | None = None
    variant: str | None = None
    loras: tuple[LoraChoice, ...] = ()
    scheduler: str | None = None
    vae: ModelPart | None = None
    long_prompts: LongPrompts = "truncate"
    width: int | None = None
    height: int | None = None
    ranks: int = 1
    config: str | None = None
    name: str | None = None

    def identity(self) -> dict[str, Any]:
        """What of these changes pixels and is not the default, as JSON values: files by their content, wherever they lie."""
        said = asdict(self) | {"rungs": self.rungs.identity()}
        for part in (*said["loras"], said["vae"] or {}):
            part.pop("path", None)
        return {
            f.name: said[f.name]
            for f in fields(self)
            if f.name not in _ELSEWHERE and getattr(self, f.name) != f.default
        }


#: What does not change pixels, or is in the model's hash, as the weights of a variant and the files of `config` are.
_ELSEWHERE = ("batch_size", "ranks", "variant", "config", "name")
