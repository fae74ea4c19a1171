"""Which modules of a pipeline an engine runs: all that compute, each as a whole, decoders by the part that is called."""

from __future__ import annotations

from typing import Any

from torch import nn

from millijoule.workers.diffusion.loading import DENOISERS
from millijoule.workers.engines.protocol import Engine

#: A pipeline calls methods of its decoder (`vae.decode`), and these the part that does the work.
DECODER_PART = "decoder"


def prepare_pipeline(pipeline: Any, engine: Engine) -> None:
    """Have `engine` run the modules of `pipeline`, which stays as it is to whoever uses it.

    Safety checkers are left alone: what they do depends on what they see. Text encoders are called as many times as there are
    prompts of a kind, a denoiser at every step.
    """
    for name, component in pipeline.components.items():
        if not isinstance(component, nn.Module) or name == "safety_checker":
            continue
        part = getattr(component, DECODER_PART, None)
        if isinstance(part, nn.Module) and hasattr(component, "decode"):
            engine.prepare(part, f"{name}.{DECODER_PART}")
        else:
            engine.prepare(component, name, large=name in DENOISERS)
