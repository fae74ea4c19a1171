"""Weights of a module in host memory, each layer's brought to the device as it runs: DeepSpeed's ZeRO stage 3 ("ZeRO-Inference").

It wants a process group and a variable that launchers set, whenever it runs. The group made here has this process alone in it
and is found by nobody (its store is in memory; gloo listens on a port of the loopback device, as it always does); the variable is
there during calls only. The module's parameters are empty between calls: what needs their values (saving, LoRA) comes before.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch.distributed
from torch import nn

from millijoule.workers.engines.deepspeed_library import kept_environment
from millijoule.workers.engines.routing import Call, plain_call
from millijoule.workers.errors import InputError

log = logging.getLogger(__name__)

#: DeepSpeed's name of what it compiles for ranks of one host.
SHARED_MEMORY = "deepspeed_shm_comm"

#: Parameters of at most this many numbers stay on the device: bringing them costs more than keeping them.
PERSISTENT_NUMBERS = 10_000


def offload_weights(deepspeed: ModuleType, module: nn.Module, device: str) -> Call:
    """Take the weights of `module` to host memory; returns what its calls are to be.

    Raises:
        InputError: this process is one of several ranks already.
    """
    _join_own_group("nccl" if device.startswith("cuda") else "gloo")
    config = {
        "train_micro_batch_size_per_gpu": 1,  # asked for, and of no meaning here
        "zero_optimization": {
            "stage": 3,
            "offload_param": {"device": "cpu", "pin_memory": device.startswith("cuda")},
            "stage3_param_persistence_threshold": PERSISTENT_NUMBERS,
        },
    }
    dtypes = {p.dtype for p in module.parameters()}
    for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        config[name] = {"enabled": dtypes == {dtype}}
    said = io.StringIO()
    with kept_environment(LOCAL_RANK="0"), contextlib.redirect_stdout(said), _nothing_compiled(deepspeed):
        engine, *_ = deepspeed.initialize(model=module, config=config)
    engine.eval()
    log.debug("DeepSpeed: %s", said.getvalue().strip())
    plain = plain_call(module)

    def call(*args: Any, **kwargs: Any) -> Any:
        with kept_environment(LOCAL_RANK="0"):
            return plain(*args, **kwargs)

    call.engine = engine  # type: ignore[attr-defined]  # it lives as long
    return call


@contextlib.contextmanager
def _nothing_compiled(deepspeed: ModuleType) -> Iterator[None]:
    """DeepSpeed would compile for a minute, on a CPU, what lets the ranks of a host share memory; there is one rank here."""
    usable = deepspeed.ops.__compatible_ops__
    before = usable.get(SHARED_MEMORY)
    usable[SHARED_MEMORY] = False
    try:
        yield
    finally:
        usable[SHARED_MEMORY] = before


def _join_own_group(backend: str) -> None:
    """A process group of this process alone, unless there is one."""
    distributed = torch.distributed
    if not distributed.is_initialized():
        distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)
    elif distributed.get_world_size() != 1:
        raise InputError("--offload-weights: not in a process that is one of several ranks")
