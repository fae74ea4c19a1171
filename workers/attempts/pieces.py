"""What one attempt has written so far: piece after piece, each a writer's. A sealed piece is a part (`workers.attempts.parts`).

For the thread that finishes the attempt. Most attempts have a single piece, which is never sealed, and make the files they always made.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from millijoule.workers.attempts.drawing import DeviceTime, Requests
from millijoule.workers.attempts.parts import (
    At,
    Part,
    TakenParts,
    as_ranges,
    labelled,
    part_id,
    put_part,
    write_all_rows,
)
from millijoule.workers.attempts.store_files import store_files
from millijoule.workers.images.writers import ShardFiles, open_writer
from millijoule.workers.layout import data_prefix
from millijoule.workers.lease import Lease, WorkerConfig
from millijoule.workers.meters.segment_timeline import segment_estimate_mj
from millijoule.workers.schemas import DataFile, ImageRow, PowerTrace, Segment
from millijoule.workers.storage.protocol import Store


class Pieces:
    """The pieces of one attempt.

    Args:
        scratch: where files are written before they are stored.
        requests: all images of the shard, in plan order.
        taken: parts of earlier attempts, which are not made again.
        energy_mj: of a segment of this worker.

    Attributes:
        sealed: parts that this attempt sealed; after an error the last one may not stand.
        to_store: files of the last piece, once `finish` was called: they are in the scratch folder still.
    """

    def __init__(
        self,
        store: Store,
        config: WorkerConfig,
        lease: Lease,
        worker_id: str,
        scratch: Path,
        requests: Requests,
        taken: TakenParts,
        energy_mj: Callable[[Segment], int | None],
    ) -> None:
        self.store = store
        self.config = config
        self.lease = lease
        self.worker_id = worker_id
        self.taken = taken
        self.sealed: list[Part] = []
        self.to_store: tuple[DataFile, ...] = ()
        self._scratch = scratch
        self._number = {at: n for n, at in enumerate(requests)}
        self._energy_mj = energy_mj
        self._prefix = data_prefix(lease.shard.shard_id, lease.attempt_id)
        self._rows: dict[At, ImageRow] = dict(taken.rows)
        self._open()

    def add(self, at: At, row: ImageRow, encoded: bytes | None) -> None:
        """See `ShardWriter.add`."""
        self._writer.add(row, encoded)
        self._added.append(at)

    def add_many(self, ats: Sequence[At], rows: Sequence[ImageRow], encoded: Sequence[bytes | None]) -> None:
        """See `ShardWriter.add_many`."""
        self._writer.add_many(rows, encoded)
        self._added += ats

    def has(self, at: At) -> bool:
        """Whether an image is in a sealed part, of this attempt or of an earlier one."""
        return at in self._rows

    def seal(self, device: DeviceTime, on_part: Callable[[], None], still_wanted: Callable[[], None]) -> None:
        """The piece so far, for which the device worked in `device`, becomes a part; the next piece begins."""
        files = self._writer.finish()
        store_files(self.store, files.files, self._scratch, on_part, still_wanted)
        part = self._part(files, device)
        self.sealed.append(part)  # where storage does not answer it may stand all the same
        put_part(self.store, self.config, part)
        on_part()
        self._rows |= zip(self._added, files.rows, strict=True)
        for file in files.files:
            (self._scratch / file.path).unlink()
        self._open()

    def finish(self) -> ShardFiles:
        """All files of the shard and all its rows; those that are not stored yet are `to_store`."""
        last = self._last = self._writer.finish()
        if not self._rows:
            self.to_store = last.files
            return last
        rows = self._rows | dict(zip(self._added, last.rows, strict=True))
        in_order = [rows[at] for at in sorted(rows, key=self._number.__getitem__)]
        table = write_all_rows(self._scratch, f"{self._prefix}.all.rows.parquet", in_order)
        self.to_store = (*(last.files if self._added else ()), *table.files)
        there = [file for part in self.parts for file in part.files]
        return replace(table, files=(*there, *self.to_store))

    def seal_last(self, device: DeviceTime) -> None:
        """The shard is not committed after all: its last piece, which is finished and stored, becomes the part `next_part`.

        Args:
            device: of the whole attempt, as its commit would have carried it.
        """
        kept: tuple[DataFile, ...] = ()
        if self._added:
            already = sum(len(part.segments) for part in self.sealed)
            kept = self._last.files
            put_part(
                self.store,
                self.config,
                self._part(self._last, replace(device, segments=device.segments[already:])),
            )
        self.store.delete([file.path for file in self.to_store if file not in kept])

    @property
    def parts(self) -> tuple[Part, ...]:
        """All sealed parts that the shard is made of."""
        return (*self.taken.parts, *self.sealed)

    @property
    def next_part(self) -> str:
        """The id of the part that would be sealed next."""
        return part_id(self.lease.attempt_id, len(self.sealed))

    def _part(self, files: ShardFiles, device: DeviceTime) -> Part:
        """The record of the piece at hand, which is `files`."""
        return Part(
            self.lease.shard.shard_id,
            self.next_part,
            self.config.driver_epoch,
            self.worker_id,
            self.config.fingerprint,
            self.config.model_sha256,
            files.files,
            files.rows_key,
            as_ranges(self._number[at] for at in self._added),
            self._energy_mj(device.segment),
            tuple(sorted(device.segment.close.energy_mj)),
            segment_estimate_mj(device.segment),
            labelled(device, self.lease.attempt_id, self.next_part),
        )

    def images_by_others(self) -> dict[str, int]:
        """Accepted images of parts that were taken over from other workers, by worker."""
        numbers = {self._number[at]: row for at, row in self.taken.rows.items()}
        made: Counter[str] = Counter()
        for part in self.taken.parts:
            if part.worker_id != self.worker_id:
                ok = (numbers[n].status == "ok" for start, stop in part.images for n in range(start, stop))
                made[part.worker_id] += sum(ok)
        return dict(made)

    def _open(self) -> None:
        number = len(self.sealed)
        prefix = f"{self._prefix}.p{number}" if number else self._prefix
        self._writer = open_writer(self.config.output_format, self._scratch, prefix, self.config.image_format)
        self._added: list[At] = []


def joined(
    attempt_id: str, stretches: Sequence[DeviceTime], sealed: Sequence[Part], last: DeviceTime | None
) -> tuple[tuple[Segment, ...], tuple[PowerTrace, ...]]:
    """All segments and power samples of an attempt, in order: of sealed parts as theirs, the rest of its own in one.

    Args:
        stretches: the device's time up to each place where a part could be sealed; the first are those of `sealed`.
        last: its time afterwards, if it was drawn to its end.
    """
    segments: list[Segment] = []
    for device, part in zip(stretches, sealed, strict=False):
        segments += labelled(device, attempt_id, part.part_id)
    rest = [*stretches[len(sealed) :], *([last] if last is not None else ())]
    of_rest = [segment for device in rest for segment in device.segments]
    own = [segment for segment in of_rest if segment.attempt_id == attempt_id]
    segments += [segment for segment in of_rest if segment.attempt_id != attempt_id]
    if own:  # a chain without a gap: the device did nothing else meanwhile
        segments.append(replace(own[-1], open=own[0].open))
    power = [trace for device in (*stretches, *([last] if last else ())) for trace in device.power]
    return tuple(segments), tuple(power)
