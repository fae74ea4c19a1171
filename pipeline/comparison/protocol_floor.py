"""What a registration must at least ask for, so that its result may count as established.

Shorter blocks, wider margins and smaller allowances are good for trying things out, and a registration may have them.
Nothing is established with them: each departure is an obstacle to the claim, for whoever measures and for whoever checks.
"""

from __future__ import annotations

from typing import Any

from millijoule.pipeline.comparison.registration import Design, Gate, Registration, Statistics, Systematics

#: MLPerf's floor: a counter that is late by its 0.2 s costs a shorter block more than the interval is wide.
MIN_BLOCK_SECONDS = 60.0
#: Speeds that differ by more than this are no warm device.
MAX_WARMUP_CV = 0.05

#: The protocol's numbers; the defaults of a registration, where nothing else is given.
_PROTOCOL = {
    "design": Design(block_seconds=MIN_BLOCK_SECONDS, warmup_cv=MAX_WARMUP_CV),
    "gate": Gate("", ""),
    "statistics": Statistics(),
    "systematics": Systematics(),
}
#: What may be more than the protocol's number, and not less; then what may be less, and not more.
_AT_LEAST = {
    "design": ("block_seconds", "warmup_windows"),
    "gate": ("min_images", "resamples", "frechet_resamples"),
    "statistics": ("confidence", "resamples", "min_quadruples"),
    "systematics": ("counter_delay_s", "offset_watts"),
}
_AT_MOST = {
    "design": ("warmup_cv",),
    "gate": ("score_margin", "frechet_margin", "max_blank", "max_duplicates"),
    "statistics": ("max_missing",),
    "systematics": ("max_control", "closure_tolerance"),
}


def find_loosened(registration: Registration) -> tuple[str, ...]:
    """Every number of `registration` that is looser than the protocol allows, in words."""
    found = []
    for names, sign, word in ((_AT_LEAST, 1, "at least"), (_AT_MOST, -1, "at most")):
        for part, name in ((p, n) for p, own in names.items() for n in own):
            value, limit = (getattr(of, name) for of in (getattr(registration, part), _PROTOCOL[part]))
            if sign * value < sign * limit:
                found.append(f"registered {name} {value:g}: the protocol needs {word} {limit:g}")
    return tuple(found)


def state_protocol(registration: Registration) -> dict[str, Any]:
    """Block length and margins, for the result: what a reader must know beside the verdict.

    Margins of further metrics have no common scale and so no floor; they are stated only.
    """
    design, gate = registration.design, registration.gate
    margins = ("score_margin", "frechet_margin", "max_blank", "max_duplicates", "min_images")
    return {
        "block_seconds": design.block_seconds,
        "warmup_cv": design.warmup_cv,
        **{name: getattr(gate, name) for name in margins},
        "metric_margins": {metric.name: metric.margin for metric in gate.metrics},
        "loosened": list(find_loosened(registration)),
    }
