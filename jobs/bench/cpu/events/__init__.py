"""`millijoule bench events [RESULT.json]`: from which share of quiet oscillators on it pays to update sums by events, on this processor.

Made-up oscillators of which a given share rests, exactly, relax under couplings of several sizes: with all sums made anew in every step,
with sums updated by what changed, the same with images at rest left out, and with whatever of the two the measured shares say. All give
the same bits, or there is no result. Then the icons of a coupled model, as they are. Processor time of one thread, in turn, the least of
several rounds: what else a shared machine does can only make a round longer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from millijoule.jobs.bench.cpu.events.problems import OSCILLATORS, SHAPES, icons_of, made_up
from millijoule.jobs.entry import COMPLETE
from millijoule.jobs.measuring.measurement import ResultOptions, describe, write_result
from millijoule.workers.errors import InputError, UsageError

if TYPE_CHECKING:
    from millijoule.jobs.bench.cpu.events.problems import Problem

#: Steps of every call.
STEPS = 10


@dataclass(frozen=True)
class BenchOptions(ResultOptions):
    """Measure event-driven against dense sums of sparsely coupled oscillators."""

    quiet: tuple[float, ...] = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.999, 1.0)
    """Shares of oscillators that rest."""

    shapes: int = len(SHAPES)
    """How many of the sizes of couplings, the smallest first."""

    rounds: int = 10
    """How often each is called; the least time counts. The plain form takes a third of them."""

    model: str = "coupled"
    """A model of coupled oscillators, of the package or a file."""


def run(options: BenchOptions) -> int:
    import torch

    from millijoule.kernels.native_library import forms_here, only

    if options.rounds < 1 or not options.quiet or not 1 <= options.shapes <= len(SHAPES):
        raise UsageError(f"--rounds, --quiet: at least 1; --shapes: 1 to {len(SHAPES)}")
    if (
        list(options.quiet) != sorted(set(options.quiet))
        or not 0 <= options.quiet[0] <= options.quiet[-1] <= 1
    ):
        raise UsageError("--quiet: shares from 0 to 1, each larger than the one before")
    if not forms_here():
        raise InputError("no compiled kernels here: install a C++ compiler, then the package again")
    torch.set_num_threads(1)
    couplings, model = [], {}
    for form in reversed(forms_here()):
        with only(form):
            rounds = options.rounds if form != "plain" else max(options.rounds // 3, 1)
            couplings += [
                {"form": form, **measure(shape, options.quiet, rounds)} for shape in SHAPES[: options.shapes]
            ]
            model[form] = _of_model(options.model, rounds)
    about = describe(
        "sums by events against sums made anew: processor time of one thread, least of rounds", options
    )
    icons = _icons(options.model)
    write_result({**about, "couplings": couplings, "model": {**icons, "forms": model}}, options.result)
    return COMPLETE


def measure(shape: tuple[int, int, int], shares: tuple[float, ...], rounds: int) -> dict[str, Any]:
    """One coupling at all shares of quiet oscillators, in the form that is asked for."""
    from millijoule.kernels.oscillator import relax, relax_pytorch

    grid, channels, rank = shape
    n = grid * grid * channels
    images = max(3, OSCILLATORS // n)
    rows = []
    for share in shares:
        problem = made_up(shape, images, share)
        sent, timed = _compare(problem, rounds)
        rows.append({"quiet": share, **sent, **timed})
    problem = made_up(shape, images, shares[0])
    plainly = {
        "pytorch": partial(relax_pytorch, *problem, STEPS),
        "dense": partial(relax, *problem, STEPS),
    }
    used = _least(plainly, min(rounds, 5))
    return {
        "n": n,
        "channels": channels,
        "rank": rank,
        "all_to_all": grid == 1,
        "images": images,
        "steps": STEPS,
        "pytorch_over_dense": round(used["pytorch"] / used["dense"], 2),
        "events_win_from": break_even(
            [
                # where compiled products are slower than PyTorch's, PyTorch's are what there is to win against
                (row["quiet"], row["over_dense"]["events"] / min(1, used["pytorch"] / used["dense"]))
                for row in rows
            ]
        ),
        "shares": rows,
    }


def break_even(ratios: list[tuple[float, float]]) -> float | None:
    """The share from which on a ratio stays at 1 or below, interpolated linearly; None: it does not at the last."""
    if ratios[-1][1] > 1:
        return None
    for (before, above), (share, below) in reversed(list(pairwise(ratios))):
        if above > 1:
            return round(before + (share - before) * (above - 1) / (above - below), 4)
    return ratios[0][0]


def _compare(problem: Problem, rounds: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """What was sent, and times in all manners.

    Raises:
        RuntimeError: their phases differ.
    """
    import torch

    from millijoule.kernels.oscillator import relax, relax_by_events

    manners = {
        "events": partial(relax_by_events, *problem, STEPS, up_to=1.0, leave=False),
        "events_resting_images_leave": partial(relax_by_events, *problem, STEPS, up_to=1.0),
        "by_measured_share": partial(relax_by_events, *problem, STEPS),
    }
    dense = partial(relax, *problem, STEPS)
    right, found = dense(), {name: call() for name, call in manners.items()}
    if wrong := [name for name, each in found.items() if not torch.equal(each.phases, right)]:
        raise RuntimeError(f"{', '.join(wrong)}: other phases than dense sums give")
    used = _least({"dense": dense, **manners}, rounds)
    images, n = problem[0].shape
    rank = problem[1].gather.shape[1]
    counted = found["events"]
    later = max(STEPS - 1, 1)
    sent = {
        "changed_share": round(sum(counted.sent[1:]) / (later * images * n), 5),
        "changed_z_share": round(sum(counted.spread[1:]) / (later * images * rank), 5),
        "images_left": sum(found["events_resting_images_leave"].left),
    }
    return sent, {
        "cpu_ms": {name: round(1000 * x, 4) for name, x in used.items()},
        "over_dense": {name: round(used[name] / used["dense"], 4) for name in manners},
    }


def _least(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    least = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds):
        for name, call in calls.items():
            began = time.thread_time()
            call()
            least[name] = min(least[name], time.thread_time() - began)
    return least


def _of_model(model: str, rounds: int) -> dict[str, Any]:
    _, timed = icons_of(model)
    sent, used = _compare(timed, rounds)
    return {"icons": len(timed[0]), **sent, **used}


def _icons(model: str) -> dict[str, Any]:
    """How many oscillators send nothing in a step, over all icons."""
    from millijoule.kernels.oscillator import relax_by_events

    icons, _ = icons_of(model)
    found = relax_by_events(*icons, STEPS)
    return {
        "model": model,
        "icons": len(icons[0]),
        "quiet_by_step": [round(1 - sent / icons[0].numel(), 5) for sent in found.sent],
        "icons_at_rest": sum(found.left),
    }
