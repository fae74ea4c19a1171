"""Many commits in little memory: what the end of a job needs of each, as columns.

A commit's segments go to `PackedSegments`, its power samples and the image rows it carries to files; here remain the numbers
and names that manifest, energy tables and closure checks look at again.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from millijoule.pipeline.energy.packed import NONE, Names, Packed, Texts, column
from millijoule.pipeline.energy.shard_shares import ShardShares, shard_shares
from millijoule.pipeline.output.image_rows import RowSpool, Spool
from millijoule.workers.schemas import Commit, PowerTrace

#: Columns of names that stand in many commits, kept as places in `names`.
_NAMES = ("worker_id", "node_id", "host", "device", "plan_fingerprint", "model_sha256", "energy_method")
_NUMBERS = (
    *("shard_id", "driver_epoch", "images_ok", "images_filtered", "images_quarantined", "images_drawn"),
    *("t_start_wall_ns", "t_end_wall_ns", "energy_estimate_mj", "schema_version"),
)
#: Of these, those that may be None.
_MAYBE = ("images_drawn", "energy_estimate_mj")


class AttemptIndex:
    """Finds attempts by shard and attempt id among many; `attempt_ids` is an Arrow array of strings.

    Args:
        also: further ids, as (places, ids): of the sealed parts that an attempt is made of. What is found is the attempt.
    """

    def __init__(
        self, shard_ids: np.ndarray, attempt_ids: pa.Array, also: tuple[np.ndarray, pa.Array] | None = None
    ) -> None:
        self._n = len(shard_ids)
        self._place = np.arange(self._n)
        if also is not None and len(also[0]):
            self._place = np.concatenate([self._place, also[0]])
            shard_ids = shard_ids[self._place]
            attempt_ids = pa.concat_arrays([attempt_ids, also[1].cast(attempt_ids.type)])
        self._order = np.argsort(shard_ids, kind="stable")
        self._shards = shard_ids[self._order]
        self._attempts = attempt_ids

    @staticmethod
    def of(attempts: Mapping[int, str]) -> AttemptIndex:
        """One attempt of each shard."""
        return AttemptIndex(np.array([*attempts], np.int64), pa.array(attempts.values(), pa.string()))

    def __len__(self) -> int:
        return self._n

    def find(self, shard_ids: np.ndarray, attempt_ids: pa.Array) -> np.ndarray:
        """The place of the first such attempt, -1 where there is none: int64, as `shard_ids`."""
        begin, end = (np.searchsorted(self._shards, shard_ids, side) for side in ("left", "right"))
        found = np.full(len(shard_ids), -1, np.int64)
        left = np.flatnonzero(begin < end)
        while len(left):  # as often as one shard has attempts
            place = self._order[begin[left]]
            same = pc.equal(self._attempts.take(pa.array(place)), attempt_ids.take(pa.array(left)))
            is_it = same.fill_null(False).to_numpy(zero_copy_only=False)
            found[left[is_it]] = self._place[place[is_it]]
            begin[left] += 1
            left = left[~is_it & (begin[left] < end[left])]
        return found


class CommitTable(Packed[Commit]):
    """Commits in the order in which they were added; what comes out has no segments, files, errors, power or rows.

    Raises:
        OverflowError, TypeError: a number is none, or beyond 64 bits.
    """

    def __init__(self) -> None:
        self.power = PowerSpool()
        self.rows = RowSpool()
        self._names = Names()
        self._named = {name: array("i") for name in (*_NAMES, "energy_domains")}
        self._numbers = {name: array("q") for name in _NUMBERS}
        self._texts = {name: Texts() for name in ("attempt_id", "rows_path")}
        self._part_of, self._part_id = array("q"), Texts()
        self._by_others = array("q"), array("i"), array("q")  # commit, worker, images

    @staticmethod
    def of(commits: Iterable[Commit]) -> CommitTable:
        """`commits` as a table, their power samples included."""
        table = CommitTable()
        for commit in commits:
            table.add(commit)
        return table

    def add(self, commit: Commit) -> None:
        """Append a commit; its segments are not looked at."""
        for name, numbers in self._numbers.items():
            value = getattr(commit, name)
            numbers.append(NONE if value is None and name in _MAYBE else value)
        for name in _NAMES:
            self._named[name].append(self._names.number(getattr(commit, name)))
        self._named["energy_domains"].append(self._names.number(",".join(commit.energy_domains)))
        for name, texts in self._texts.items():
            texts.append(getattr(commit, name))
        for part in commit.parts:
            self._part_of.append(len(self) - 1)
            self._part_id.append(part)
        for worker_id, images in commit.images_by_others.items():
            for numbers, value in zip(
                self._by_others, (len(self) - 1, self._names.number(worker_id), images), strict=True
            ):
                numbers.append(value)
        self.rows.add(commit.rows)
        for trace in commit.power:
            self.power.add(trace, commit.node_id, commit.host)

    def __len__(self) -> int:
        return len(self._numbers["shard_id"])

    def make(self, number: int) -> Commit:
        """Commit `number` anew, without its bulk."""
        values: dict[str, Any] = {name: numbers[number] for name, numbers in self._numbers.items()}
        values |= {name: self.names[codes[number]] for name, codes in self._named.items()}
        values |= {name: texts[number] for name, texts in self._texts.items()}
        values |= {name: None for name in _MAYBE if values[name] == NONE}
        values["energy_domains"] = tuple(d for d in values["energy_domains"].split(",") if d)
        return Commit(**values, files=(), errors={}, energy_mj=None, segments=())

    # -- columns; while one of them is in use, nothing can be added ---------------------------------------------------

    @property
    def names(self) -> list[str]:
        """The repeated names that `name_codes` number."""
        return self._names.texts

    def number(self, name: str) -> np.ndarray:
        """A column of numbers, int64 `[n]`; `NONE` stands for None."""
        return column(self._numbers[name])

    def name_codes(self, name: str) -> np.ndarray:
        """A column of repeated names as places in `names`, `[n]`; domains are joined by commas."""
        return column(self._named[name])

    def text(self, name: str) -> pa.Array:
        """A column of strings."""
        return self._texts[name].column()

    def first_of_each(self, *names: str) -> list[Commit]:
        """The first commit of every combination of such repeated names, in order."""
        codes = np.stack([self.name_codes(name) for name in names], axis=1)
        _, first = np.unique(codes, axis=0, return_index=True)
        return [self[n] for n in np.sort(first).tolist()]

    def last_of_each_worker(self) -> list[Commit]:
        """The last commit of every worker."""
        _, last = np.unique(self.name_codes("worker_id")[::-1], return_index=True)
        return [self[len(self) - 1 - n] for n in np.sort(last).tolist()]

    def shares(self, energy_mj: np.ndarray) -> ShardShares:
        """Divide `energy_mj` of each commit, int64 `[n]`, among the images it accepted and those it did not."""
        ok, filtered, drawn = (self.number(f"images_{kind}") for kind in ("ok", "filtered", "drawn"))
        return shard_shares(energy_mj, ok, filtered, drawn)

    def attempts(self) -> AttemptIndex:
        """Finds a commit by its shard and attempt, or one of the parts that it is made of."""
        also = column(self._part_of), self._part_id.column()
        return AttemptIndex(self.number("shard_id"), self.text("attempt_id"), also)

    def images_by_others(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Accepted images that were taken over from other workers: commit, worker (a place in `names`) and how many, each `[m]`."""
        places, workers, images = map(column, self._by_others)
        return places, workers, images

    def parts(self) -> np.ndarray:
        """How many sealed parts each commit is made of, int64 `[n]`."""
        return np.bincount(column(self._part_of), minlength=len(self))


#: What one device's sample is in a spool, `PowerSample` in the middle; the names are places in `PowerSpool.names`.
_SAMPLES = pa.schema(
    [
        *((name, pa.int32()) for name in ("boot_id", "node_id", "host", "device", "source")),
        *((name, pa.int64()) for name in ("t_mono_ns", "t_wall_ns", "power_average_mw", "power_instant_mw")),
    ]
)
SPOOLED_SAMPLES = 16_384


class PowerSpool(Spool):
    """Power samples of devices."""

    def __init__(self) -> None:
        super().__init__(_SAMPLES, SPOOLED_SAMPLES)
        self.names: dict[str | None, int] = {}

    def add(self, trace: PowerTrace, node_id: str | None, host: str | None) -> None:
        """Append the samples of a device."""
        texts = (trace.boot_id, node_id, host, trace.device, trace.source)
        where = tuple(self.names.setdefault(text, len(self.names)) for text in texts)
        self.extend((*where, *sample) for sample in trace.samples)

    def tables(self) -> Iterator[pa.Table]:
        """All samples, some at a time: texts for `names`, numbers as in `PowerSample`. Nothing can be added any more."""
        names = pa.array(list(self.names), pa.string())
        for samples in super().tables():
            columns = [
                c.combine_chunks() if c.type == pa.int64() else names.take(c.combine_chunks())
                for c in samples.columns
            ]
            yield pa.table(columns, names=_SAMPLES.names)
