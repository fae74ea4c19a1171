"""What a comparison of two generators will do and what would count as success, written down before the first run.

A `Registration` is a value: its canonical JSON is hashed, the hash stands in every measured block, and the order of
blocks follows from it alone. Whoever publishes the hash first cannot choose prompts, margins or the stopping point
afterwards. Nothing here measures anything.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from operator import attrgetter
from typing import Any, Literal

from millijoule.workers.errors import InputError
from millijoule.workers.records import decode, refuse_unknown
from millijoule.workers.scenes.vocabulary import DEFAULT_NOUNS, VOCABULARIES

ARMS = ("A", "B")

#: 60 and 60.0 are different bytes, and so different hashes: both are kept as they were written.
Number = float | int

#: Blocks that come when needed. Scheduled are "idle", "same", "telemetry" and "compare", which alone enters the ratio.
UNSCHEDULED_KINDS = ("warmup", "topup")

#: Whoever checks a stranger's bundle recomputes with these numbers: they bound time and memory.
MAX_RESAMPLES = 20_000
MAX_QUADRUPLES = 500


@dataclass(frozen=True)
class Arm:
    """One generator as it is run. `model` is a name for people; `sha256` says which weights."""

    model: str
    name: str
    sha256: str
    batch_size: int
    num_inference_steps: int | None = None
    guidance_scale: Number | None = None


@dataclass(frozen=True)
class Request:
    """One image that both arms draw; `seed` is in [0, 2**64)."""

    family: str
    prompt: str
    seed: int


@dataclass(frozen=True)
class Design:
    """Which blocks are run. A quadruple is four blocks of one order, ABBA or BAAB."""

    block_seconds: Number = 60.0
    quadruples: int = 10
    control_quadruples: int = 1  # of A against A, and of telemetry on against off for each arm
    order_seed: int = 0
    warmup_window_seconds: Number = 5.0
    warmup_windows: int = 3  # stable where the speeds of this many windows in a row differ little, ...
    warmup_cv: Number = 0.03  # ... by this coefficient of variation
    warmup_max_windows: int = 60


@dataclass(frozen=True)
class Metric:
    """A further score per image (higher is better); A may be lower than B by less than `margin` on average."""

    name: str
    sha256: str
    margin: Number


@dataclass(frozen=True)
class Gate:
    """When A's images count as no worse than B's. Margins are what A may be worse by."""

    judge: str
    judge_sha256: str
    rule: Literal["icon-scene", "threshold"] = "icon-scene"
    threshold: Number = 0.5  # of "threshold": an image is accepted from this score on
    score_margin: Number = 0.02  # of the mean share accepted over families
    frechet_margin: Number = 0.05  # share of B's Frechet distance
    max_blank: Number = 0.01  # share of an arm's images
    max_duplicates: Number = 0.01  # share of an arm's images
    min_images: int = 500
    resamples: int = 2000
    frechet_resamples: int = 200
    seed: int = 1
    metrics: tuple[Metric, ...] = ()
    nouns: int = DEFAULT_NOUNS  # of "icon-scene": prompts are read with the vocabulary's first so many


@dataclass(frozen=True)
class Statistics:
    """How the interval is made and when there is none."""

    confidence: Number = 0.95
    resamples: int = 10_000
    seed: int = 2
    min_quadruples: int = 5
    max_missing: Number = 0.2  # share of quadruples without energy


@dataclass(frozen=True)
class Systematics:
    """What the meter may do wrong in the same way in every block, and what the controls may show at most."""

    counter_delay_s: Number = 0.2  # how late a counter's value may be at a block's ends
    offset_watts: Number = 5.0  # a constant error of the meter's power
    max_control: Number = 0.05  # largest log ratio that A against A, or telemetry on against off, may show
    closure_tolerance: Number = 0.05  # of a second meter against the counters
    declared_rest_watts: Number | None = (
        None  # what a node meter sees and no counter does; None: not declared
    )
    declared_rest_tolerance_watts: Number | None = None  # by how much that may be wrong


@dataclass(frozen=True)
class Registration:
    """Everything that is fixed before the first run."""

    factor: Number  # to prove: A needs at least this many times less energy than B
    registered_wall_ns: int
    device: str
    width: int
    height: int
    a: Arm
    b: Arm
    requests: tuple[Request, ...]
    gate: Gate
    design: Design = Design()
    statistics: Statistics = Statistics()
    systematics: Systematics = Systematics()
    format: Literal["millijoule-energy-comparison-registration/1"] = (
        "millijoule-energy-comparison-registration/1"
    )

    def arm(self, name: str) -> Arm:
        return {"A": self.a, "B": self.b}[name]

    def to_json(self) -> bytes:
        said = asdict(self)
        if self.gate.nouns == DEFAULT_NOUNS:
            del said["gate"]["nouns"]  # so a registration from before there were more keeps its hash
        return canonical_json(said)

    @cached_property  # every block is compared with it
    def sha256(self) -> str:
        return hashlib.sha256(self.to_json()).hexdigest()

    @staticmethod
    def from_json(data: bytes, *, where: str = "registration.json") -> Registration:
        """Read back what `to_json` wrote, and nothing else.

        Raises:
            InputError: not JSON, fields missing, unknown or of the wrong type, values out of range, or bytes that
                are not canonical (their hash would not be that of the content).
        """
        try:
            registration = decode(Registration, data)
            check_values(registration)
            canonical = registration.to_json()
            if canonical != data:
                refuse_unknown(Registration, decode(dict, data))
        except ValueError as error:
            raise InputError(f"{where}: not a registration this version reads: {error}") from error
        if canonical != data:
            raise InputError(
                f"{where}: not canonical JSON with all fields; write it with `millijoule verify --register-only`"
            )
        return registration


@dataclass(frozen=True)
class ScheduledBlock:
    """One block to run.

    `arm` is the generator ("" when idle), `side` which side of its quadruple the block stands for: in A against A and
    in telemetry on (A) against off (B) both sides are one generator.
    """

    block_id: str
    kind: str
    arm: str
    side: str
    telemetry: bool
    quadruple: int  # -1 when idle


#: What numbers may be: in words, the test, and the fields it is for.
_BOUNDS: tuple[tuple[str, Callable[[Number], bool], str], ...] = (
    (
        "above 0",
        lambda value: 0 < value < math.inf,
        "factor a.batch_size b.batch_size design.block_seconds design.quadruples design.warmup_window_seconds "
        "design.warmup_windows gate.min_images gate.resamples gate.frechet_resamples statistics.resamples",
    ),
    (
        "in [0, 1)",
        lambda value: 0 <= value < 1,
        "gate.score_margin gate.frechet_margin gate.max_blank gate.max_duplicates statistics.max_missing "
        "systematics.max_control systematics.closure_tolerance",
    ),
    (
        "at least 0",
        lambda value: 0 <= value < math.inf,
        "systematics.counter_delay_s systematics.offset_watts systematics.declared_rest_watts "
        "systematics.declared_rest_tolerance_watts",
    ),
)


def check_values(registration: Registration) -> None:
    """Raise ValueError for numbers that make no comparison. Looser ones than the protocol's are `protocol_floor`'s."""
    r, design, gate, limits = registration, registration.design, registration.gate, registration.systematics
    rest = (limits.declared_rest_watts, limits.declared_rest_tolerance_watts)
    if (rest[0] is None) != (rest[1] is None):
        raise ValueError("the rest of the node is declared with its tolerance")
    for bounds, within, names in _BOUNDS:
        for name in names.split():
            value = attrgetter(name)(registration)
            if value is not None and not within(value):
                raise ValueError(f"{name} must be {bounds}, not {value}")
    for metric in gate.metrics:
        if not 0 <= metric.margin < math.inf:
            raise ValueError(f"margin of metric {metric.name} must be at least 0, not {metric.margin}")
    if max(r.statistics.resamples, gate.resamples, gate.frechet_resamples) > MAX_RESAMPLES:
        raise ValueError(f"more than {MAX_RESAMPLES} resamples show nothing more")
    if max(design.quadruples, design.control_quadruples) > MAX_QUADRUPLES:
        raise ValueError(f"more than {MAX_QUADRUPLES} quadruples")
    if gate.nouns not in VOCABULARIES.values():
        raise ValueError(f"gate.nouns must be one of {list(VOCABULARIES.values())}, not {gate.nouns}")
    if not 0.5 < r.statistics.confidence < 1:
        raise ValueError(f"confidence must be in (0.5, 1), not {r.statistics.confidence}")
    if r.statistics.min_quadruples < 3:
        raise ValueError("min_quadruples below 3 leaves nothing to resample")
    if not r.requests or any(not 0 <= q.seed < 2**64 for q in r.requests):
        raise ValueError("requests must not be empty, their seeds in [0, 2**64)")
    if len(set(r.requests)) != len(r.requests):
        raise ValueError("a request (family, prompt, seed) stands there twice")


def schedule(registration: Registration) -> tuple[ScheduledBlock, ...]:
    """The blocks in order: idle, controls, the first half of the comparison, idle, the second half, idle.

    ABBA and BAAB alternate, so that drift that is linear in time cancels within a quadruple and most of what is left
    between two; which comes first follows from the seed.
    """
    design = registration.design
    first = hashlib.sha256(f"order {design.order_seed}".encode()).digest()[0] & 1
    blocks: list[ScheduledBlock] = []

    def add(kind: str, arm: str, side: str, telemetry: bool, quadruple: int) -> None:
        blocks.append(ScheduledBlock(f"{len(blocks):04d}", kind, arm, side, telemetry, quadruple))

    def quadruple(kind: str, number: int, arm: str | None = None) -> None:
        for side in "BAAB" if (number + first) % 2 else "ABBA":
            add(kind, arm or side, side, not (kind == "telemetry" and side == "B"), number)

    add("idle", "", "", True, -1)
    for number in range(design.control_quadruples):
        quadruple("same", number, "A")
        quadruple("telemetry", 2 * number, "A")
        quadruple("telemetry", 2 * number + 1, "B")
    for number in range(design.quadruples):
        if number == design.quadruples // 2:
            add("idle", "", "", True, -1)
        quadruple("compare", number)
    add("idle", "", "", True, -1)
    return tuple(blocks)


def canonical_json(value: Any) -> bytes:
    """One byte sequence per value: sorted keys, no spaces, ASCII, no NaN; a newline at the end."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode() + b"\n"
