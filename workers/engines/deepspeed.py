"""`--engine deepspeed`: every module in a container of DeepSpeed-Inference.

`deepspeed.init_inference` makes the container, an `InferenceEngine`: it checks that the device computes in the module's type,
holds it to that type, and captures CUDA graphs. Without graphs it runs the module's own code: the same numbers as PyTorch run plainly.

Fused modules come in through `deepspeed.module_inject.replace_module`, the function below its injection policies. The option
`injection_policy` itself takes names of linear layers alone and cuts these up for tensor parallelism; other policies are of
DeepSpeed's own containers, a closed list of language models.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from millijoule.workers.engines.cuda_graphs import CapturedCalls
from millijoule.workers.engines.deepspeed_library import import_deepspeed
from millijoule.workers.engines.protocol import EngineSettings, Module
from millijoule.workers.engines.routing import Call, RoutingEngine, float_dtypes, plain_call
from millijoule.workers.engines.weight_offload import offload_weights

log = logging.getLogger(__name__)

#: Fused modules for parts of a module: the class that each can stand for, and what makes it of one of that class.
FusedModules = dict[type[nn.Module], Callable[[nn.Module], nn.Module]]


class DeepSpeedEngine(RoutingEngine):
    """See `Engine`. One process may have several, of any devices; they share nothing."""

    name = "deepspeed"

    def __init__(self, settings: EngineSettings, fused: Callable[[nn.Module, str], FusedModules]) -> None:
        """`fused` finds the fused modules for parts of a module on a device; it is asked where the settings want them.

        Raises:
            InputError: DeepSpeed is not installed.
        """
        super().__init__()
        self.settings = settings
        self.deepspeed = import_deepspeed(settings.device)
        self.title = f"DeepSpeed-Inference {self.deepspeed.__version__}"
        self.fixed_shapes = settings.cuda_graphs and settings.on_gpu
        self.exact = not (settings.fused_modules or settings.offload_weights)
        self._fused = fused
        self._captured: list[CapturedCalls] = []

    def prepare(self, module: Module, name: str, *, static: bool = True, large: bool = False) -> Module:
        """See `Engine`."""
        replaced = self._inject(module) if self.settings.fused_modules else {}
        if large and self.settings.offload_weights:
            self._route(module, offload_weights(self.deepspeed, module, self.settings.device))
            how = "offloaded"
        elif static and self.fixed_shapes:
            captured = CapturedCalls(module, name, self._capture, self.events)
            self._captured.append(captured)
            self._route(module, captured)
            how = "captured"
        else:
            self._route(module, self._contain(_Contained(module)))
            how = "contained"
        self._note(module, name, how, replaced)
        return module

    def renew(self) -> None:
        """See `Engine`."""
        for captured in self._captured:
            captured.clear()

    def release(self) -> bool:
        """See `Engine`."""
        return sum(captured.stop() for captured in self._captured) > 0

    def _contain(self, contained: _Contained, **config: Any) -> Call:
        """The calls of a container around `contained`; as a function, for it is to become no part of the module."""
        owned = _owned_dtype(contained, self.deepspeed.get_accelerator().supported_dtypes())
        contained.keeps_types = owned is None
        engine = self.deepspeed.init_inference(
            contained,
            dtype=owned or torch.float32,
            keep_module_on_host=True,  # it stays where it is, which is the device
            **config,
        )
        return engine.forward

    def _capture(self, flat: nn.Module) -> Call:
        return self._contain(_Contained(flat), enable_cuda_graph=True)

    def _inject(self, module: nn.Module) -> dict[str, int]:
        """Put fused modules in place; how many, by the class they stand for."""
        from deepspeed.module_inject.replace_module import replace_module

        counts: Counter[str] = Counter()
        for original, make in self._fused(module, self.settings.device).items():

            def replace(
                child: nn.Module, make: Callable[[nn.Module], nn.Module], *_: Any, **__: Any
            ) -> nn.Module:
                kind = type(child)
                fused = make(child)
                if type(fused) is not kind:  # one that must stay as it is comes back as it is
                    counts[kind.__name__] += 1
                return fused

            replace_module(
                model=module, orig_class=original, replace_fn=replace, _replace_policy=make, checkpoint=None
            )
        for part in module.modules():  # a method of DeepSpeed's language models, given to all it passes
            part.__dict__.pop("reset_cache", None)
        return dict(counts)


class _Contained(nn.Module):
    """What DeepSpeed holds of a module: its own way to be called. With `keeps_types`, conversions pass it by."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.keeps_types = False
        self.train(module.training)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return plain_call(self.module)(*args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> _Contained:
        return self if self.keeps_types else super()._apply(fn, recurse)


def _owned_dtype(module: nn.Module, supported: list[torch.dtype]) -> torch.dtype | None:
    """The one type of a module that DeepSpeed can hold it to.

    None where it has several on purpose (a coupling in float64 beside a decoder in float32), where its numbers are of a
    class of their own (quantised), or where DeepSpeed does not know the type on this device.
    """
    dtypes = float_dtypes(module)
    plain = all(type(p) in (nn.Parameter, Tensor) for p in (*module.parameters(), *module.buffers()))
    return next(iter(dtypes)) if plain and len(dtypes) == 1 and dtypes <= set(supported) else None
