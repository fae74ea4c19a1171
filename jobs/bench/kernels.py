"""`millijoule bench kernels [RESULT.json]`: seconds and joules of each fused kernel against PyTorch's own operations.

For each case, a shape of a model people run, three forms of the same computation: "eager" (the plain reference), "compile" (the
reference through torch.compile) and "fused". A form is checked against the reference in float32 first. Then each runs as a CUDA
graph of some calls, replayed for a block of seconds: what the device needs, without what starting kernels costs the host. Blocks go
forth and back, so that a drift falls on all alike. Joules are the board's counter over the block, idle power included.

The kernels that compute in integers, whole images and dense couplings, are measured against peaks of the same run, products of large
int8 matrices and copying: `jobs/measuring/integer_kernels.py`.

On a CPU (`--stand-in`) sizes are small, fused kernels are their plain form unless Triton interprets them, and figures mean nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from millijoule.jobs.entry import COMPLETE
from millijoule.jobs.measuring.integer_kernels import measure_integers
from millijoule.jobs.measuring.kernel_cases import Case, make_cases
from millijoule.jobs.measuring.measurement import ResultOptions, describe, write_result
from millijoule.jobs.measuring.one_gpu import OneGpu, captured, open_one_gpu, run_for

Form = Literal["eager", "compile", "fused"]
Part = Literal["fused", "integers"]

#: Calls in one CUDA graph: a replay costs the host some microseconds.
CALLS = 20

#: What a form may differ from the reference in float32, as a share of the largest value: roundings of the type, some in a row.
TOLERANCE = {torch.bfloat16: 0.03, torch.float16: 0.005, torch.float32: 1e-4}


@dataclass(frozen=True)
class BenchOptions(ResultOptions):
    """Measure the fused kernels on one GPU."""

    seconds: float = 1.0
    """Length of a block. The counter moves in steps of some 100 ms."""

    rounds: int = 1
    """How often the forms are gone through forth and back."""

    forms: tuple[Form, ...] = ("eager", "compile", "fused")
    """What is compared."""

    parts: tuple[Part, ...] = ("fused", "integers")
    """Which kernels: those of diffusion pipelines, those that compute in integers."""

    device: int = 0
    """The GPU's index."""

    stand_in: bool = False
    """Run small sizes on the CPU, with a made-up counter: a rehearsal, whose figures mean nothing."""


def run(options: BenchOptions) -> int:
    gpu = open_one_gpu("bench kernels", options.device, stand_in=options.stand_in)
    found = []
    if "fused" in options.parts:
        found = [compare(case, gpu, options) for case in make_cases(gpu.device)]
    integers = None
    if "integers" in options.parts:
        integers = measure_integers(gpu, options.seconds, options.rounds)
    result = {
        **describe("joules and seconds of one call of a kernel, on the device", options),
        "stand_in": options.stand_in,
        "device": gpu.name,
        "driver": gpu.meter.boards.driver_version,
        "cases": found,
        "integers": integers,
    }
    gpu.meter.close()
    write_result(result, options.result)
    return COMPLETE


def compare(case: Case, gpu: OneGpu, options: BenchOptions) -> dict[str, Any]:
    """All forms of one case: how far each is from the reference, and what a call of it needs.

    Raises:
        RuntimeError: a form computes something else, or the counter was lost.
    """
    torch._dynamo.reset()
    exact = _tensors(case.plain(*(_widened(a) for a in case.arguments)))
    forms = {form: _form(case, form) for form in options.forms}
    errors = {form: _error(_tensors(call(*case.arguments)), exact) for form, call in forms.items()}
    dtype = case.arguments[0].dtype
    for form, error in errors.items():
        if not error <= TOLERANCE[dtype]:
            raise RuntimeError(f"{case.kernel}, {case.name}: {form} is {error:.2g} off, of the largest value")
    works = {form: _captured(call, case.arguments, gpu) for form, call in forms.items()}
    order = [*options.forms, *reversed(options.forms)] * options.rounds
    blocks = [{"form": form, **_block(works[form], gpu, options.seconds)} for form in order]
    summary = {form: _per_call([b for b in blocks if b["form"] == form], case) for form in options.forms}
    for form, told in summary.items():
        told["error"] = errors[form]
    ratio = {
        form: {key: _ratio(summary[form][key], summary["fused"][key]) for key in ("seconds", "joules")}
        for form in summary
        if "fused" in summary and form != "fused"
    }
    shape = list(case.arguments[0].shape)
    return {
        "kernel": case.kernel, "case": case.name, "shape": shape, "dtype": str(dtype).removeprefix("torch."),
        "bytes_moved": case.bytes_moved, "forms": summary, "over_fused": ratio, "blocks": blocks,
    }  # fmt: skip


def _ratio(value: float, fused: float) -> float | None:
    """None where the counter did not move: the blocks were too short for it."""
    return value / fused if value and fused else None


def _form(case: Case, form: Form) -> Callable[..., Any]:
    if form == "compile":
        return torch.compile(case.plain, dynamic=False)
    return case.plain if form == "eager" else case.fused


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) else value


def _tensors(found: Any) -> Sequence[Tensor]:
    return found if isinstance(found, tuple) else (found,)


def _error(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Greatest difference, as a share of the greatest value; NaN is greater than all."""
    pairs = zip(found, exact, strict=True)
    return max(float((a.float() - b).abs().max() / b.abs().max()) for a, b in pairs)


def _captured(call: Callable[..., Any], arguments: tuple[Any, ...], gpu: OneGpu) -> Callable[[], object]:
    """What does `CALLS` calls: a CUDA graph of them, on a GPU."""

    def calls() -> None:
        for _ in range(CALLS):
            call(*arguments)

    return captured(calls, gpu)


def _block(work: Callable[[], object], gpu: OneGpu, seconds: float) -> dict[str, Any]:
    """`work`, which is `CALLS` calls, for `seconds`."""
    block = run_for(gpu, work, seconds)
    return {**block, "calls": block["calls"] * CALLS}


def _per_call(blocks: Sequence[dict[str, Any]], case: Case) -> dict[str, float]:
    calls = sum(b["calls"] for b in blocks)
    seconds, joules = (sum(b[key] for b in blocks) / calls for key in ("seconds", "joules"))
    return {"seconds": seconds, "joules": joules, "bytes_per_second": case.bytes_moved / seconds}
