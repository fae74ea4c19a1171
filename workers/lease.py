"""What the coordinator hands to a worker and what comes back: leases, results, and the job's constants.

These are the only values that cross Ray between driver and workers; image bytes never do.
"""

from __future__ import annotations

from dataclasses import dataclass

from millijoule.workers.generators.options import GeneratorOptions
from millijoule.workers.images.formats import ImageFormat
from millijoule.workers.schemas import CounterRead, PowerTrace, Segment
from millijoule.workers.shard_rows import Shard
from millijoule.workers.sources.copies import ModelCopy

#: A worker holds at most so many leases: one is drawn, the other is finished or waits for the device.
MAX_LEASES = 2


@dataclass(frozen=True)
class WorkerConfig:
    """What every worker of a job needs to know; constant for the job's life.

    Attributes:
        fingerprint: of the plan; a worker that finds another one in the output refuses to start.
        commits_exclusively: True where the store has exclusive create and workers commit for themselves;
            False where the driver has to write the commits (see docs/commit-protocol.md).
        options: how the model is loaded and run.
        image_format: what images are encoded as.
        copies: files that `model` and `options` name, for nodes that do not see them.
        part_s: seconds of drawing that a death may cost: a shard that takes longer is sealed in parts; 0: never.
        pool: name of the worker's pool; empty where there is only one.
        price_per_hour: of the worker's device, as its pool states it.
        telemetry: False: open no meter and sample no power; energy is missing.
    """

    output_url: str
    fingerprint: str
    job_seed: int
    output_format: str
    model: str
    model_sha256: str
    driver_epoch: int
    commits_exclusively: bool = True
    cpu_threads: int = 1
    telemetry: bool = True
    options: GeneratorOptions = GeneratorOptions()  # noqa: RUF009 (frozen)
    image_format: ImageFormat = ImageFormat()  # noqa: RUF009 (frozen)
    copies: tuple[ModelCopy, ...] = ()
    part_s: float = 0.0
    pool: str = ""
    price_per_hour: float | None = None


@dataclass(frozen=True)
class Suspect:
    """An image that one worker failed to draw although it draws others; `row` counts within the shard's plan rows."""

    row: int
    image_index: int
    reason: str


@dataclass(frozen=True)
class Lease:
    """The right to attempt one shard until the coordinator takes it back. Correctness never depends on it.

    Attributes:
        probe_rows: the lease asks only whether these plan rows `[start, stop)` can be generated at all; nothing is written.
        confirm: the lease asks only whether these images fail here, too, each alone beside a healthy request.
        healthy: (row, image index) of an image that the other worker drew; None: it drew none of this shard.
        quarantine: (row, reason) of plan rows to quarantine unseen.
        resumes: earlier attempts at the shard may have sealed parts.
        distrusted: workers whose parts are not to be taken over.
        at_most_s: after so many seconds of drawing the attempt seals what it has and gives the shard back; None: it makes all of it.
    """

    shard: Shard
    attempt_id: str
    worker_id: str
    probe_rows: tuple[int, int] | None = None
    confirm: tuple[Suspect, ...] = ()
    healthy: tuple[int, int] | None = None
    quarantine: tuple[tuple[int, str], ...] = ()
    resumes: bool = False
    distrusted: tuple[str, ...] = ()
    at_most_s: float | None = None

    @property
    def writes(self) -> bool:
        """Whether the attempt makes the shard, instead of asking a question about it."""
        return self.probe_rows is None and not self.confirm


@dataclass(frozen=True)
class Node:
    """A node of the Ray cluster: Ray's id, and its host name as the node itself says it."""

    node_id: str
    host: str


@dataclass(frozen=True)
class AttemptProgress:
    """How far one attempt is.

    `images_done` grows as batches are drawn; `steps` whenever the attempt got further in any stage: a step of a batch, an
    image encoded, a part of a file stored. `waits`: it only waits for its own worker's device, which draws another one.
    `has_begun`: the device has come to it.
    """

    attempt_id: str
    images_done: int = 0
    steps: int = 0
    waits: bool = False
    has_begun: bool = False


@dataclass(frozen=True)
class WorkerStatus:
    """The attempts at work. `waits_for_store`: storage has just failed, and the worker repeats its request."""

    attempts: tuple[AttemptProgress, ...] = ()
    waits_for_store: bool = False


@dataclass(frozen=True)
class Piece:
    """What an attempt sealed of a shard that it gave back, in how many seconds of drawing; energy None: not measured."""

    images: int
    seconds: float
    energy_mj: int | None
    energy_estimate_mj: int | None = None


@dataclass(frozen=True)
class AttemptResult:
    """How one lease ended.

    Attributes:
        outcome: "committed"; "exists" (another attempt's commit was first; ours is waste); "prepared" (data is in place,
            the driver must write `commit_json` under the shard's key); "suspect" (the same, but only once another worker
            fails on `suspects`, too: the commit has them quarantined); "probed" (the probe's rows survived); "confirmed"
            (all of the lease's suspects failed here, too); "contradicted" (one of them did not); "superseded" (a later run
            of the job has begun: nothing is committed, what was finished is sealed as a part); or "cancelled" (the driver
            said that another attempt has won, or the lease's time is over).
        commit_json: the commit that now stands for the shard, the other attempt's for "exists"; or that is to stand.
        healthy: (row, image index) of an image that was drawn beside the suspects.
        piece: what a cancelled attempt has sealed, for whoever makes the rest; None: nothing.
    """

    lease: Lease
    outcome: str
    commit_json: bytes | None = None
    suspects: tuple[Suspect, ...] = ()
    healthy: tuple[int, int] | None = None
    piece: Piece | None = None


@dataclass(frozen=True)
class WorkerStopped:
    """A stopped worker's last words: the segments and power samples no commit carried."""

    worker_id: str
    segments: tuple[Segment, ...]
    power: tuple[PowerTrace, ...] = ()


@dataclass(frozen=True)
class AccountRead:
    """What a node reads for a worker that is gone: its devices' counters, or why there is nothing to be read."""

    read: CounterRead | None
    reason: str = ""


@dataclass(frozen=True)
class Calibration:
    """A short measured run: what `images` images took on one worker. Energy None: not measured."""

    images: int
    seconds: float
    encoded_bytes: int
    energy_mj: int | None
    energy_estimate_mj: int | None
    energy_method: str
