"""The options that say how a model is loaded and run: the same for every command that draws."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from millijoule.workers.errors import InputError
from millijoule.workers.generators.options import GeneratorOptions


@dataclass(frozen=True)
class ModelOptions:
    """How the model is loaded and run."""

    batch_size: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Most images per call of the model. Default: what suits the model on the device."""

    engine: Literal["deepspeed", "compile", "eager"] = "deepspeed"
    """What runs the networks: DeepSpeed-Inference, torch.compile, or PyTorch as it is."""

    cuda_graphs: bool = False
    """Replay the model's calls from CUDA graphs: fewer launches, more memory. On GPUs, with engine deepspeed or compile."""

    fused_modules: bool = False
    """Run the fused forms of norms, modulations and gates, which round differently. With engine deepspeed."""

    offload_weights: bool = False
    """Keep a diffusion pipeline's denoiser in host memory and bring each layer's weights to the device as it runs, for
    models larger than the device. Slow. With engine deepspeed (its ZeRO stage 3)."""

    def read(self) -> GeneratorOptions:
        """What these options say; raises InputError, which names the option."""
        if self.batch_size is not None and self.batch_size < 1:
            raise InputError(f"--batch-size {self.batch_size}: at least 1")
        if self.cuda_graphs and self.engine == "eager":
            raise InputError("--cuda-graphs: engine eager has none; take --engine deepspeed or compile")
        for name in ("fused_modules", "offload_weights"):
            if getattr(self, name) and self.engine != "deepspeed":
                raise InputError(
                    f"--{name.replace('_', '-')}: only --engine deepspeed does that, not {self.engine}"
                )
        if self.offload_weights and self.cuda_graphs:
            raise InputError(
                "--offload-weights: weights that come and go cannot be in a CUDA graph; drop --cuda-graphs"
            )
        return GeneratorOptions(
            engine=self.engine,
            cuda_graphs=self.cuda_graphs,
            fused_modules=self.fused_modules,
            offload_weights=self.offload_weights,
            batch_size=self.batch_size,
        )
