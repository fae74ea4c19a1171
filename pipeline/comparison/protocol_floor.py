"""What a registration must at least ask for, so that its result may count as established.

Shorter blocks, wider margins and smaller allowances are good for trying things out, and a registration may have them.
Nothing is established with them: each departure is an obstacle to the claim, for whoever measures and for whoever checks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from millijoule.pipeline.comparison.registration import Design, Gate, Registration, Statistics, Systematics

#: MLPerf's floor: a counter that is late by its 0.2 s costs a shorter block more than the interval is wide.
MIN_BLOCK_SECONDS = 60.0
#: Speeds that differ by more than this are no warm device.
MAX_WARMUP_CV = 0.05

#: Part and name of what may be more than this, and not less.
_AT_LEAST: dict[tuple[str, str], float] = {
    ("design", "block_seconds"): MIN_BLOCK_SECONDS,
    ("design", "warmup_windows"): Design.warmup_windows,
    ("gate", "min_images"): Gate.min_images,
    ("gate", "resamples"): Gate.resamples,
    ("gate", "frechet_resamples"): Gate.frechet_resamples,
    ("statistics", "confidence"): Statistics.confidence,
    ("statistics", "resamples"): Statistics.resamples,
    ("statistics", "min_quadruples"): Statistics.min_quadruples,
    ("systematics", "counter_delay_s"): Systematics.counter_delay_s,
    ("systematics", "offset_watts"): Systematics.offset_watts,
}
#: What may be less than this, and not more.
_AT_MOST: dict[tuple[str, str], float] = {
    ("design", "warmup_cv"): MAX_WARMUP_CV,
    ("gate", "score_margin"): Gate.score_margin,
    ("gate", "frechet_margin"): Gate.frechet_margin,
    ("gate", "max_blank"): Gate.max_blank,
    ("gate", "max_duplicates"): Gate.max_duplicates,
    ("statistics", "max_missing"): Statistics.max_missing,
    ("systematics", "max_control"): Systematics.max_control,
    ("systematics", "closure_tolerance"): Systematics.closure_tolerance,
}


def find_loosened(registration: Registration) -> tuple[str, ...]:
    """Every number of `registration` that is looser than the protocol allows, in words."""
    return tuple(_find(registration))


def _find(registration: Registration) -> Iterator[str]:
    for limits, sign, word in ((_AT_LEAST, 1, "at least"), (_AT_MOST, -1, "at most")):
        for (part, name), limit in limits.items():
            value = getattr(getattr(registration, part), name)
            if sign * value < sign * limit:
                yield f"registered {name} {value:g}: the protocol needs {word} {limit:g}"


def state_protocol(registration: Registration) -> dict[str, Any]:
    """Block length and margins, for the result: what a reader must know beside the verdict.

    Margins of further metrics have no common scale and so no floor; they are stated only.
    """
    design, gate = registration.design, registration.gate
    return {
        "block_seconds": design.block_seconds,
        "warmup_cv": design.warmup_cv,
        "score_margin": gate.score_margin,
        "frechet_margin": gate.frechet_margin,
        "max_blank": gate.max_blank,
        "max_duplicates": gate.max_duplicates,
        "min_images": gate.min_images,
        "metric_margins": {metric.name: metric.margin for metric in gate.metrics},
        "loosened": list(find_loosened(registration)),
    }
