"""Engines by name. Only the one that is asked for is imported."""

from __future__ import annotations

from millijoule.workers.engines.protocol import Engine, EngineSettings
from millijoule.workers.errors import InputError
from millijoule.workers.generators.options import GeneratorOptions


def open_engine(options: GeneratorOptions, device: str) -> Engine:
    """The engine of `options` for a model on `device`.

    Raises:
        InputError: what it needs is not installed, or an option is not for it.
    """
    settings = EngineSettings(device, options.cuda_graphs, options.fused_modules, options.offload_weights)
    if settings.cuda_graphs and not settings.on_gpu:
        raise InputError("--cuda-graphs: this worker has no GPU")
    if options.engine == "compile":
        from millijoule.workers.engines.compile import CompileEngine

        return CompileEngine(settings)
    if options.engine == "deepspeed":
        from millijoule.workers.engines.deepspeed import DeepSpeedEngine
        from millijoule.workers.engines.injection.policy import fused_modules

        return DeepSpeedEngine(settings, fused_modules)
    from millijoule.workers.engines.eager import EagerEngine

    return EagerEngine()
