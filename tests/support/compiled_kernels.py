"""Triton kernels compiled for a GPU on any machine, exactly as a call would launch them there, and what they need of it."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

H100 = GPUTarget("cuda", 90, 32)
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
A100, B200 = GPUTarget("cuda", 80, 32), GPUTarget("cuda", 100, 32)
TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
#: What a launch tells the compiler or the driver beside the kernel's own arguments.
OPTIONS = ("num_warps", "num_stages", "launch_cooperative_grid")


@dataclass(frozen=True)
class Resources:
    """Of one launch; `spilled_bytes` is a thread's memory outside registers."""

    kernel: str
    programs: int
    warps: int
    registers: int
    spilled_bytes: int
    shared_bytes: int


def launches_of(
    function: Callable[..., Any], *arguments: Any, target: GPUTarget = H100, **options: Any
) -> list[Resources]:
    """What `function` would launch for `arguments`, tensors without storage (device "meta"), compiled for `target`."""
    recorded: list[tuple[Any, int, tuple[Any, ...], dict[str, Any]]] = []

    def record(kernel: Any, programs: int, device: Any, *given: Any, **constants: Any) -> None:
        recorded.append((kernel, programs, given, constants))

    with pytest.MonkeyPatch.context() as patch:
        module = function.__globals__
        patch.setitem(module, "launch", record)
        patch.setitem(module, "runs_on", lambda *tensors: all(t is None or t.numel() for t in tensors))
        function(*arguments, **options)
    assert recorded, "it launched nothing"
    return [_compile(*call, target) for call in recorded]


def _compile(
    kernel: Any, programs: int, given: tuple[Any, ...], constants: dict[str, Any], target: GPUTarget
) -> Resources:
    options = {name: constants.pop(name) for name in OPTIONS if name in constants}
    warps = options.setdefault("num_warps", 4)
    signature, values, aligned = {}, dict(constants), {}
    for i, (name, value) in enumerate(zip(kernel.arg_names, given, strict=False)):
        if value is None or (isinstance(value, int) and value == 1):
            signature[name], values[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
            aligned[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0:
                aligned[(i,)] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, signature, values, aligned)
    compiled = triton.compile(source, target=target, options=options)
    return Resources(
        kernel.__name__,
        programs,
        warps,
        *_registers_and_spills(compiled.asm["cubin"]),
        compiled.metadata.shared,
    )


def _registers_and_spills(cubin: bytes) -> tuple[int, int]:
    """By NVIDIA's own tool, of the one function in it."""
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.check_output([CUOBJDUMP, "-res-usage", file.name], text=True)
    (function,) = re.findall(r"REG:.*", told)
    registers, stack, local = (
        int(re.search(rf"{word}:(\d+)", function)[1]) for word in ("REG", "STACK", "LOCAL")
    )
    return registers, stack + local
