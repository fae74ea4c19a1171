"""From the raw rows of a comparison to its result: the same code for whoever measures and whoever checks.

Rows and registration go in, a JSON object comes out; nothing is read or written. See `comparison` for the statistic,
`quality_gate` for the gate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from millijoule.pipeline.comparison.acceptance import find_repeats
from millijoule.pipeline.comparison.protocol_floor import state_protocol
from millijoule.pipeline.comparison.quality_gate import ArmImages, accepted_spread, judge_gate
from millijoule.pipeline.comparison.registration import ARMS, Design, Registration
from millijoule.pipeline.comparison.rows import Rows, encode_images, reads_by_block, split_by_block
from millijoule.pipeline.comparison.second_meter import CountedStretch, check_closure
from millijoule.pipeline.comparison.statistics import (
    MeasuredBlock,
    SideSums,
    energy_ratio,
    judge_claim,
    sum_sides,
    systematic_budget,
    total,
    verdict_line,
)
from millijoule.pipeline.energy.counter_split import sum_or_none
from millijoule.pipeline.energy.evidence import evidence_class
from millijoule.workers.meters.segment_timeline import segment_energy_mj, segment_estimate_mj
from millijoule.workers.schemas import CounterRead, Segment

FORMAT = "millijoule-energy-comparison-result/1"


@dataclass(frozen=True)
class BlockNumbers:
    """What follows from a block's raw rows; the names are those of `DERIVED_BLOCK_COLUMNS`."""

    images: int
    accepted: int
    seconds: float
    energy_mj: int | None
    estimate_mj: int | None


@dataclass(frozen=True)
class DrawnImages:
    """Every image in the order of drawing: block and distinct (request, digest), as numbers.

    `pairs[p]` is the request and digest of distinct pair p; `counted[arm][p]` whether it counts as accepted in that arm.
    """

    block: np.ndarray  # [n] row of the block table
    pair: np.ndarray  # [n]
    pairs: list[tuple[int, str]]
    counted: dict[str, np.ndarray]
    first: dict[str, np.ndarray]  # [requests] pair of each arm's first image of a request, -1: none


def energy_domains(reads: pa.Table) -> tuple[str, ...]:
    """Every domain that some read has."""
    return tuple(sorted({part["domain"] for energy in reads["energy"].to_pylist() for part in energy}))


def boundary(domains: Sequence[str], device: str) -> str:
    """What the energies include, in words, from the domains that were read."""
    parts = [
        words
        for prefix, words in (("gpu:", "GPU board"), ("cpu:", "CPU packages"), ("dram:", "DRAM"))
        if any(d.startswith(prefix) for d in domains)
    ]
    included = " + ".join(parts) if parts else "CPU time of the process"
    note = ", GPU not included" if device != "cpu" and "GPU board" not in parts else ""
    return f"{included}{note} (drawing to hashed pixels in host memory; idle not subtracted)"


def index_images(registration: Registration, rows: Rows) -> DrawnImages:
    """Give numbers to blocks and distinct images, and decide which count.

    Raises:
        KeyError: an image is of an unknown block, or has no judgement.
        IndexError: a request number is out of range.
    """
    blocks = rows.blocks.select(["block_id", "ordinal", "arm"]).to_pylist()
    number = {b["block_id"]: i for i, b in enumerate(blocks)}
    encoded = encode_images(rows.images)
    n_requests = len(registration.requests)
    if len(encoded.request) and not 0 <= encoded.request.min() <= encoded.request.max() < n_requests:
        raise IndexError("an image's request number is out of range")
    block = np.array([number[b] for b in encoded.block_ids], dtype=np.int64)[encoded.block]
    ordinals = np.array([b["ordinal"] for b in blocks], dtype=np.int64)
    order = np.argsort(ordinals[block], kind="stable")
    block, request, pair, pairs = block[order], encoded.request[order], encoded.pair[order], encoded.pairs
    judged = {
        (r["request"], r["sha256"]): r["accepted"] and not r["blank"]
        for r in rows.judgements.select(["request", "sha256", "accepted", "blank"]).to_pylist()
    }
    accepted = np.array([judged[p] for p in pairs], bool)
    arm_of_block = np.array([b["arm"] for b in blocks])
    counted, first = {}, {}
    for arm in ARMS:
        mine = np.flatnonzero(arm_of_block[block] == arm)
        seen, at = np.unique(pair[mine], return_index=True)
        by_appearance = seen[np.argsort(at)]
        repeats = find_repeats(
            [registration.requests[pairs[p][0]].prompt for p in by_appearance],
            [pairs[p][1] for p in by_appearance],
        )
        counted[arm] = np.zeros(len(pairs), bool)
        counted[arm][by_appearance] = accepted[by_appearance] & ~np.array(repeats, bool)
        first[arm] = np.full(n_requests, -1)
        drawn, drawn_at = np.unique(request[mine], return_index=True)
        first[arm][drawn] = pair[mine][drawn_at]
    return DrawnImages(block, pair, pairs, counted, first)


def measure_blocks(rows: Rows, images: DrawnImages) -> list[BlockNumbers]:
    """The derived columns of every block, in the order of the block table."""
    reads, domains = reads_by_block(rows.reads), energy_domains(rows.reads)
    numbers = []
    by_block = split_by_block(images.block, images.pair, len(rows.blocks))
    for drawn, block in zip(by_block, rows.blocks.select(["block_id", "arm"]).to_pylist(), strict=True):
        chain = reads.get(block["block_id"], [])
        numbers.append(
            BlockNumbers(
                len(drawn),
                int(images.counted[block["arm"]][drawn].sum()) if block["arm"] in ARMS else 0,
                (chain[-1].t_mono_ns - chain[0].t_mono_ns) / 1e9 if chain else 0.0,
                chain_energy_mj(chain, domains),
                sum_or_none(segment_estimate_mj(s) for s in _segments(chain)),
            )
        )
    return numbers


def chain_energy_mj(chain: Sequence[CounterRead], domains: Sequence[str]) -> int | None:
    """Measured millijoules from the first to the last read; None unless every read has every domain of the run."""
    if not domains or any(set(read.energy_mj) != set(domains) for read in chain):
        return None
    return sum_or_none(segment_energy_mj(s) for s in _segments(chain))


def _segments(chain: Sequence[CounterRead]) -> list[Segment]:
    return [Segment("", "shard", a, b) for a, b in pairwise(chain)]


def compute_result(registration: Registration, rows: Rows) -> dict[str, Any]:
    """The whole result, as JSON values.

    Raises:
        KeyError, IndexError: rows refer to something that is not there.
    """
    images = index_images(registration, rows)
    numbers = measure_blocks(rows, images)
    blocks = rows.blocks.to_pylist()
    domains = energy_domains(rows.reads)
    measured = bool(domains)
    energies = [n.energy_mj if measured else n.estimate_mj for n in numbers]

    def of_kind(kind: str, arm: str | None = None) -> list[MeasuredBlock]:
        return [
            MeasuredBlock(b["quadruple"], b["side"], energy_mj, n.images, n.accepted, n.seconds)
            for b, n, energy_mj in zip(blocks, numbers, energies, strict=True)
            if b["kind"] == kind and arm in (None, b["arm"])
        ]

    compare = of_kind("compare")
    confidence = registration.statistics.confidence
    interval = energy_ratio(compare, registration.statistics)
    per_image = energy_ratio(compare, registration.statistics, per="images")
    arms = gather_arms(registration, rows, images)
    reference = _feature_matrix(rows, "reference")
    gate = judge_gate(registration.gate, confidence, registration.requests, arms, reference)
    controls = {
        "same": _energy_control(of_kind("same")),
        **{f"telemetry {arm}": _telemetry_control(of_kind("telemetry", arm), measured) for arm in ARMS},
    }
    limits = registration.systematics
    prompts = accepted_spread(registration.gate, confidence, registration.requests, arms)
    budget = systematic_budget(compare, limits, measured=measured, controls=controls, prompts=prompts)
    systematic = total(budget)
    stretches = _stretches(rows, domains, blocks, numbers)
    closures = {
        source: check_closure(rows.second_meter, source, stretches, limits) for source in ("power", "node")
    }
    agrees = {name: c.closes if c else None for name, c in closures.items()}
    evidence = evidence_class(measured=measured, power_agrees=agrees["power"], node_closes=agrees["node"])
    warmup = _warmup(registration.design, blocks, numbers)
    protocol = state_protocol(registration)
    obstacles = [
        *protocol["loosened"],
        *(
            f"control {name} shows a log ratio of {value:+.3f}, more than {limits.max_control:g}"
            for name, value in controls.items()
            if value is not None and not abs(value) <= limits.max_control
        ),
        *(f"warm-up {name} was not stable" for name, stable in warmup.items() if not stable),
    ]
    if registration.device != "cpu" and not any(d.startswith("gpu:") for d in domains):
        obstacles.append("the device's own energy is not measured")
    claim = judge_claim(registration.factor, interval, systematic, evidence, gate.passed, obstacles)
    where = boundary(domains, registration.device)
    return {
        "format": FORMAT,
        "registration_sha256": registration.sha256,
        "verdict": verdict_line(interval, confidence, where, evidence, gate.passed),
        "claim": {"factor": registration.factor, **asdict(claim), "reasons": list(claim.reasons)},
        "protocol": protocol,
        "ratio_per_accepted_image": asdict(interval) if interval else None,
        "ratio_per_image": asdict(per_image) if per_image else None,
        "systematics": {"parts": budget, "total": systematic},
        "boundary": where,
        "domains": list(domains),
        "evidence_class": evidence,
        "second_meters": _second_meters(rows),
        "closures": {name: asdict(c) if c else None for name, c in closures.items()},
        "arms": {arm: _arm_sums(sums) for arm, sums in sum_sides(compare).items()},
        "controls": controls,
        "idle_watts": [_watts(b.energy_mj, b.seconds) for b in of_kind("idle")],
        "warmup_stable": warmup,
        "images_included": rows.pixels is not None,
        "gate": {"passed": gate.passed, "failures": list(gate.failures), "checks": gate.checks},
    }


def gather_arms(registration: Registration, rows: Rows, images: DrawnImages) -> dict[str, ArmImages]:
    """Each arm's first image of every request, for the gate."""
    judged = {(r["request"], r["sha256"]): r for r in rows.judgements.to_pylist()}
    prompts = [r.prompt for r in registration.requests]
    arms = {}
    for arm in ARMS:
        own = [judged.get(images.pairs[p]) if p >= 0 else None for p in images.first[arm]]
        arms[arm] = ArmImages(
            [r["accepted"] if r else None for r in own],
            [r["blank"] if r else None for r in own],
            find_repeats(prompts, [r["sha256"] if r else None for r in own]),
            _feature_matrix(rows, arm, len(prompts)),
            {
                metric.name: [r["metrics"][m] if r and len(r["metrics"]) > m else None for r in own]
                for m, metric in enumerate(registration.gate.metrics)
            },
        )
    return arms


def _feature_matrix(rows: Rows, arm: str, n: int | None = None) -> np.ndarray | None:
    """`[n, d]` in the order of requests; None where a row is missing, double or of another length."""
    found = [(r["request"], r["values"]) for r in rows.features.to_pylist() if r["arm"] == arm]
    found.sort(key=lambda item: item[0])
    requests, lengths = [k for k, _ in found], {len(v) for _, v in found}
    if len(lengths) != 1 or requests != list(range(len(found) if n is None else n)):
        return None
    return np.array([[math.nan if x is None else x for x in v] for _, v in found], dtype=np.float32)


def _energy_control(blocks: Sequence[MeasuredBlock]) -> float | None:
    a, b = sum_sides(blocks).values()
    if min(a.images, b.images, a.energy_mj, b.energy_mj) <= 0:
        return None
    return math.log(b.energy_mj / b.images) - math.log(a.energy_mj / a.images)


def _telemetry_control(blocks: Sequence[MeasuredBlock], measured: bool) -> float | None:
    """What reading within blocks does: the larger of its effects on energy per image and on speed.

    Speed by the wall clock says nothing about the estimate, which is CPU time: on a shared machine others set it.
    """
    energy = _energy_control(blocks)
    if energy is None or not measured:
        return energy
    a, b = sum_sides(blocks).values()
    if min(a.seconds, b.seconds) <= 0:
        return None
    return max(energy, math.log(b.images / b.seconds) - math.log(a.images / a.seconds), key=abs)


def _arm_sums(sums: SideSums) -> dict[str, Any]:
    """Totals of an arm over the complete quadruples; null where there is no such block."""
    energy_mj = sums.energy_mj if sums.blocks else None
    return {
        **asdict(sums),
        "energy_mj": energy_mj,
        "mj_per_accepted_image": energy_mj / sums.accepted
        if energy_mj is not None and sums.accepted
        else None,
        "mj_per_image": energy_mj / sums.images if energy_mj is not None and sums.images else None,
        "images_per_second": sums.images / sums.seconds if sums.seconds > 0 else None,
        "watts": _watts(energy_mj, sums.seconds),
    }


def _watts(energy_mj: int | None, seconds: float) -> float | None:
    return None if energy_mj is None or seconds <= 0 else energy_mj / 1000 / seconds


def _warmup(
    design: Design, blocks: Sequence[Mapping[str, Any]], numbers: Sequence[BlockNumbers]
) -> dict[str, bool]:
    """Whether each arm's speed had settled, by session in which it has scheduled blocks."""
    needed = {(b["session"], b["arm"]) for b in blocks if b["arm"] and b["kind"] not in ("warmup", "topup")}
    stable = {}
    for session, arm in sorted(needed):
        own = sorted(
            (b["ordinal"], n.images / n.seconds if n.seconds > 0 else 0.0)
            for b, n in zip(blocks, numbers, strict=True)
            if (b["kind"], b["session"], b["arm"]) == ("warmup", session, arm)
        )
        stable[f"{arm} in session {session}"] = is_stable([speed for _, speed in own], design)
    return stable


def is_stable(speeds: Sequence[float], design: Design) -> bool:
    """Whether the last windows' speeds differ by no more than the registered coefficient of variation."""
    last = np.array(speeds[-design.warmup_windows :])
    if len(last) < design.warmup_windows or last.min() <= 0:
        return False
    return bool(last.std() / last.mean() <= design.warmup_cv)


def _second_meters(rows: Rows) -> dict[str, str]:
    """Where the rows of each second meter come from."""
    table = rows.second_meter
    found = dict.fromkeys([] if table is None else sorted(set(table["source"].to_pylist())), "handed in")
    if rows.power is not None:
        found["power"] = "sampled during the blocks"
    return found


def _stretches(
    rows: Rows, domains: Sequence[str], blocks: Sequence[Mapping[str, Any]], numbers: Sequence[BlockNumbers]
) -> list[CountedStretch]:
    """What the counters say about the blocks of the comparison."""
    reads = reads_by_block(rows.reads)
    devices = [d for d in domains if d.startswith("gpu:")]
    found = []
    for block, n in zip(blocks, numbers, strict=True):
        chain = reads.get(block["block_id"], [])
        if block["kind"] != "compare" or not chain:
            continue
        device_mj = None
        if n.energy_mj is not None and devices:
            device_mj = sum(chain[-1].energy_mj[d] - chain[0].energy_mj[d] for d in devices)
        found.append(CountedStretch(chain[0].t_wall_ns, chain[-1].t_wall_ns, device_mj, n.energy_mj))
    return found
