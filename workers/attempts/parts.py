"""Parts of shards: what a long attempt seals as it goes, so that whoever dies or leaves takes at most about ten seconds of work along.

A part is some images of a shard, drawn, encoded and stored by one attempt, and a record of them that is created last and never
changed: files with hashes, rows by range, and the energy of the time in which they were drawn. It counts for nothing by itself. The
next attempt at the shard takes sealed parts over and draws the rest; its commit names their files, their ids and their segments, and
only that makes them count. A shard that takes less than a part has none, and no more requests than before.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from millijoule.workers.attempts.drawing import DeviceTime, Requests
from millijoule.workers.attempts.encoding import DrawnImage
from millijoule.workers.errors import NotFoundError
from millijoule.workers.images.writers import ShardFiles, row_table_options
from millijoule.workers.layout import part_key, parts_prefix
from millijoule.workers.lease import Lease, Piece, WorkerConfig
from millijoule.workers.schemas import IMAGE_ROW_SCHEMA, DataFile, ImageRow, Record, Segment
from millijoule.workers.storage.protocol import Store

#: A piece that took less than this share of `part_s` is not sealed, whatever is expected of what comes next.
LEAST_PART_SHARE = 0.25

#: A lease of limited time that would be followed by less work than this, or than this share of it, goes on to the shard's end.
LEAST_REST_S, LEAST_REST_SHARE = 2.0, 0.1

log = logging.getLogger(__name__)

#: An image by (row, image index), see `Requests`.
At = tuple[int, int]


@dataclass(frozen=True)
class Part(Record):
    """The record of one sealed part.

    Attributes:
        part_id: attempt and number; its "shard" segment has it for attempt id, wherever it is carried.
        images: ranges `[start, stop)` of the shard's images, in plan order.
        energy_mj: of its segment, None where it was not measured; likewise the estimate.
        segments: all that the worker closed since the part or commit before, the part's own last.
    """

    shard_id: int
    part_id: str
    driver_epoch: int
    worker_id: str
    plan_fingerprint: str
    model_sha256: str
    files: tuple[DataFile, ...]
    rows_path: str
    images: tuple[tuple[int, int], ...]
    energy_mj: int | None
    energy_domains: tuple[str, ...]
    energy_estimate_mj: int | None
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class TakenParts:
    """Parts of earlier attempts, each image in one at most, and their rows."""

    parts: tuple[Part, ...] = ()
    rows: dict[At, ImageRow] = field(default_factory=dict)


class Expected:
    """The seconds that a thing takes that is done again and again: more at once when it took more, less by halves."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def took(self, seconds: float) -> None:
        self.seconds = max(seconds, (self.seconds + seconds) / 2)


class PartClock:
    """Says on the device's thread where to cut what is drawn of a shard, so that a death costs at most `part_s` seconds of drawing.

    A death costs what was drawn since the cut that began the oldest piece that does not stand. A piece stands once it is encoded, stored
    and recorded, and the device draws on meanwhile. So it is cut with the batch after which one more, and then sealing, would
    not fit into `part_s`; near the shard's end, too. One part is on its way at a time: another would only queue behind it.

    With batches of B seconds and sealing that takes S, as expected, a death costs at most `max(part_s, B + 2 S)`: a batch cannot be cut, and a
    store cannot be hurried. What takes longer than expected, as after a worker's first batch and part, adds its excess: never more
    than `max(part_s, S) + B + S`. Parts do not get tiny for that: each has a batch and a quarter of `part_s` at least.

    Args:
        sealing: from a cut to where its piece stands, a part or a commit; of all attempts of a worker.
    """

    def __init__(self, part_s: float, sealing: Expected, clock: Callable[[], float] = time.monotonic) -> None:
        self.part_s = part_s
        self._sealing = sealing
        self._batch = Expected()
        self._clock = clock
        self._began = self._drew = self._stood = clock()
        self._on_their_way: deque[float] = deque()  # when pieces were cut that do not stand yet

    def begin(self) -> None:
        """The device has come to the shard."""
        self._began = self._drew = self._clock()

    def drew(self, left: int) -> bool:
        """A batch was drawn, and `left` images are still to be; True: cut here."""
        now = self._clock()
        self._batch.took(now - self._drew)
        self._drew = now
        piece_s = now - self._began
        if not self.part_s or not left or self._on_their_way or piece_s < LEAST_PART_SHARE * self.part_s:
            return False
        return piece_s + self._batch.seconds + self._sealing.seconds > self.part_s

    def cut(self) -> None:
        """What was drawn goes on its way; the next piece begins."""
        self._began = self._clock()
        self._on_their_way.append(self._began)

    def stands(self) -> None:
        """The first piece that is on its way counts, whatever happens now. From the thread that finishes the attempt."""
        now = self._clock()
        cut = self._on_their_way.popleft()
        self._sealing.took(now - max(cut, self._stood))  # the last one may have waited for the one before
        self._stood = now


class LeaseClock:
    """Says on the device's thread when a lease's time is over (`Lease.at_most_s`), unless the shard is nearly drawn: with the batch
    that ends nearest to it.

    Never where a row failed that another worker has to hear: the word against it is given at the shard's end only.
    """

    def __init__(
        self, at_most_s: float | None, n_images: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._at_most_s = at_most_s
        self._left = n_images
        self._clock = clock
        self._began = clock()
        self._drawn = self._batches = 0
        self._has_suspects = False

    def is_over(self, batch: Sequence[DrawnImage]) -> bool:
        """A batch was drawn; True: it was the lease's last."""
        if self._at_most_s is None or self._has_suspects:
            return False
        self._has_suspects = any(image.is_suspect for image in batch)
        self._drawn += len(batch)
        self._batches += 1
        self._left -= len(batch)
        seconds = self._clock() - self._began
        rest_s = seconds * self._left / self._drawn
        least_s = max(LEAST_REST_S, LEAST_REST_SHARE * self._at_most_s)
        is_over = seconds + seconds / self._batches / 2 >= self._at_most_s
        return is_over and rest_s >= least_s and not self._has_suspects


def piece_of(sealed: Sequence[Part]) -> Piece | None:
    """What an attempt's sealed parts are together; None: there are none."""
    if not sealed:
        return None
    own = [part.segments[-1] for part in sealed]
    joules, estimates = ([getattr(p, name) for p in sealed] for name in ("energy_mj", "energy_estimate_mj"))
    return Piece(
        sum(stop - start for part in sealed for start, stop in part.images),
        sum(s.close.t_mono_ns - s.open.t_mono_ns for s in own) / 1e9,
        None if None in joules else sum(joules),
        None if None in estimates else sum(estimates),
    )


def part_id(attempt_id: str, number: int) -> str:
    """The id of an attempt's part."""
    return f"{attempt_id}.p{number}"


def as_ranges(numbers: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Whole numbers as ranges `[start, stop)`, in order."""
    ranges: list[tuple[int, int]] = []
    for n in sorted(numbers):
        if ranges and ranges[-1][1] == n:
            ranges[-1] = ranges[-1][0], n + 1
        else:
            ranges.append((n, n + 1))
    return tuple(ranges)


def labelled(
    device: DeviceTime, attempt_id: str, new: str, segment_class: str = "shard"
) -> tuple[Segment, ...]:
    """The segments of `device`, those of `attempt_id` as of `new` and of `segment_class`."""
    return tuple(
        replace(s, attempt_id=new, segment_class=segment_class) if s.attempt_id == attempt_id else s
        for s in device.segments
    )


def put_part(store: Store, config: WorkerConfig, part: Part) -> None:
    """Seal it. Its files are in place."""
    key = part_key(part.shard_id, part.part_id)
    put = store.put_exclusive if config.commits_exclusively else store.put  # nobody else has this name
    put(key, part.to_json())


def forget_parts(store: Store, shard_id: int, parts: Sequence[str]) -> None:
    """The shard is committed: the records of `parts` say nothing any more."""
    store.delete([part_key(shard_id, part) for part in parts])


def take_parts(store: Store, config: WorkerConfig, lease: Lease, requests: Requests) -> TakenParts:
    """The sealed parts of earlier attempts at the lease's shard that are whole, of this job, and by nobody distrusted.

    Where two hold the same image, the larger one is taken. One that cannot be used is left alone: its images are drawn again.
    """
    shard_id = lease.shard.shard_id
    order = list(requests)
    found: list[Part] = []
    for item in list(store.list(parts_prefix(shard_id))):
        try:
            part = Part.from_json(store.get(item.key))
        except NotFoundError:
            continue  # its shard has just been committed
        except ValueError as error:
            log.warning("%s: cannot be read: %s", item.key, error)
            continue
        ours = part.plan_fingerprint == config.fingerprint and part.model_sha256 == config.model_sha256
        if ours and part.shard_id == shard_id and part.worker_id not in lease.distrusted:
            found.append(part)
    taken: list[Part] = []
    rows: dict[At, ImageRow] = {}
    for part in sorted(found, key=lambda p: (-sum(b - a for a, b in p.images), p.part_id)):
        places = [order[n] for start, stop in part.images for n in range(start, min(stop, len(order)))]
        if any(at in rows for at in places):
            continue
        try:
            of_part = _rows_of(store, part, {at: requests[at] for at in places})
        except (NotFoundError, ValueError, pa.ArrowException) as error:
            log.warning("part %s of shard %d cannot be taken over: %s", part.part_id, shard_id, error)
            continue
        taken.append(part)
        rows |= of_part
    if taken:
        log.info(
            "shard %d: %d of %d images are taken over from earlier attempts", shard_id, len(rows), len(order)
        )
    return TakenParts(tuple(taken), rows)


def _rows_of(store: Store, part: Part, requests: Requests) -> dict[At, ImageRow]:
    """The rows of a part; raises NotFoundError, ValueError or ArrowException where it is not what was sealed."""
    (table_file,) = (file for file in part.files if file.path == part.rows_path)
    for file in part.files:
        if file is not table_file and store.size(file.path) != file.size_bytes:
            raise ValueError(f"{file.path}: another size than was sealed")
    data = store.get(part.rows_path)
    if hashlib.sha256(data).hexdigest() != table_file.sha256:
        raise ValueError(f"{part.rows_path}: its SHA-256 is not what was sealed")
    table = pq.read_table(pa.BufferReader(data), columns=IMAGE_ROW_SCHEMA.names)
    by_key = {(r.prompt_id, r.image_index): (at, r) for at, r in requests.items()}
    rows: dict[At, ImageRow] = {}
    for record in table.to_pylist():
        at, request = by_key.pop((record["prompt_id"], record["image_index"]), (None, None))
        if at is None or request is None or request.seed != record["seed"]:
            raise ValueError(f"{part.rows_path}: a row for an image that is not the part's")
        rows[at] = _image_row(request, record)
    if by_key:
        raise ValueError(f"{part.rows_path}: {len(by_key)} of its images have no row")
    return rows


def _image_row(request: Any, record: dict[str, Any]) -> ImageRow:
    kept = ("status", "width", "height", "num_inference_steps", "path", "sha256", "size_bytes", "error")
    return ImageRow(
        request, **{name: record[name] for name in kept}, warnings=tuple(record["warnings"] or ())
    )


def write_all_rows(folder: Path, key: str, rows: Sequence[ImageRow]) -> ShardFiles:
    """The table of all rows of a shard that was made in parts, at `folder / key`."""
    columns = zip(IMAGE_ROW_SCHEMA, zip(*(row.values() for row in rows), strict=True), strict=True)
    table = pa.Table.from_arrays(
        [pa.array(values, column.type) for column, values in columns], schema=IMAGE_ROW_SCHEMA
    )
    pq.write_table(table, folder / key, **row_table_options(IMAGE_ROW_SCHEMA, len(rows)))
    with (folder / key).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    described = DataFile(key, (folder / key).stat().st_size, digest, len(rows))
    return ShardFiles((described,), tuple(rows), key)
