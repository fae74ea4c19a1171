"""Many commits in little memory: what the end of a job needs of each, as columns; parsed once.

A commit's segments go to `PackedSegments` and its power samples to a file, both while it is parsed; here remain the
numbers and names that manifest, energy tables and closure checks look at again. Image rows that it carries go to a file, too.
"""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import fields
from sys import intern
from typing import IO, Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from millijoule.pipeline.energy.packed_segments import NONE
from millijoule.pipeline.output.image_rows import RowSpool
from millijoule.workers.schemas import Commit, PowerTrace, parse_carried_rows

_NEEDED = {f.name for f in fields(Commit) if f.default is NO_DEFAULT}
_ALLOWED = {f.name for f in fields(Commit)}

#: Columns of names that stand in many commits, kept as places in `names`.
_NAMES = ("worker_id", "node_id", "host", "device", "plan_fingerprint", "model_sha256", "energy_method")
_NUMBERS = (
    *("shard_id", "driver_epoch", "images_ok", "images_quarantined", "t_start_wall_ns", "t_end_wall_ns"),
    *("energy_estimate_mj", "schema_version"),
)


class AttemptIndex:
    """Finds attempts by shard and attempt id among many; `attempt_ids` is an Arrow array of strings."""

    def __init__(self, shard_ids: np.ndarray, attempt_ids: pa.Array) -> None:
        self._order = np.argsort(shard_ids, kind="stable")
        self._shards = shard_ids[self._order]
        self._attempts = attempt_ids

    def find(self, shard_ids: np.ndarray, attempt_ids: pa.Array) -> np.ndarray:
        """The place of the first such attempt, -1 where there is none: int64, as `shard_ids`."""
        begin, end = (np.searchsorted(self._shards, shard_ids, side) for side in ("left", "right"))
        found = np.full(len(shard_ids), -1, np.int64)
        one = np.flatnonzero(end - begin == 1)
        place = self._order[begin[one]]
        same = pc.equal(self._attempts.take(pa.array(place)), attempt_ids.take(pa.array(one)))
        found[one] = np.where(same.fill_null(False).to_numpy(zero_copy_only=False), place, -1)
        for i in np.flatnonzero(end - begin > 1).tolist():
            places = self._order[begin[i] : end[i]]
            of_shard = self._attempts.take(pa.array(places)).to_pylist()
            wanted = attempt_ids[i].as_py()
            found[i] = next((p for p, a in zip(places.tolist(), of_shard, strict=True) if a == wanted), -1)
        return found


class CommitTable(Sequence[Commit]):
    """Commits in the order in which they were added; what comes out has no segments, files, errors, power or rows.

    Raises:
        OverflowError, TypeError, ValueError: what was added is no commit.
    """

    def __init__(self) -> None:
        self.power = PowerSpool()
        self.rows = RowSpool()
        self.names: list[str] = []
        self._name_numbers: dict[str, int] = {}
        self._named = {name: array("i") for name in (*_NAMES, "energy_domains")}
        self._numbers = {name: array("q") for name in _NUMBERS}
        self._texts = {name: (array("q", [0]), bytearray()) for name in ("attempt_id", "rows_path")}

    @staticmethod
    def of(commits: Iterable[Commit]) -> CommitTable:
        """`commits` as a table, their power samples included."""
        table = CommitTable()
        for commit in commits:
            table.add(commit)
        return table

    def add(self, commit: Commit) -> None:
        """Append a commit."""
        self._append({name: getattr(commit, name) for name in _ALLOWED})
        self.rows.add(commit.rows)
        for trace in commit.power:
            self.power.add(trace, commit.node_id, commit.host)

    def add_raw(self, raw: dict[str, Any]) -> None:
        """Append a commit as its JSON says it; the segments are not looked at."""
        keys = raw.keys()
        if not keys >= _NEEDED or keys - _ALLOWED:
            raise ValueError(f"has {', '.join(sorted(map(str, keys)))}")
        rows = raw.get("rows")
        carried = None if rows is None else parse_carried_rows(rows)
        self._append(raw)
        self.rows.add(carried)
        for trace in raw.get("power", ()):
            self.power.add(PowerTrace.from_dict(trace), raw["node_id"], raw["host"])

    def _append(self, raw: dict[str, Any]) -> None:
        for name in _NUMBERS:
            value = raw.get(name, 1)
            self._numbers[name].append(NONE if value is None and name == "energy_estimate_mj" else value)
        for name in _NAMES:
            self._named[name].append(self._number(intern(raw[name])))
        self._named["energy_domains"].append(self._number(",".join(raw["energy_domains"])))
        for name, (ends, text) in self._texts.items():
            if not isinstance(raw[name], str):
                raise TypeError(f"{name} is {raw[name]!r}")
            text += raw[name].encode()
            ends.append(len(text))

    def _number(self, text: str) -> int:
        number = self._name_numbers.get(text)
        if number is None:
            number = self._name_numbers[text] = len(self.names)
            self.names.append(text)
        return number

    def __len__(self) -> int:
        return len(self._numbers["shard_id"])

    @overload
    def __getitem__(self, number: int) -> Commit: ...
    @overload
    def __getitem__(self, number: slice) -> list[Commit]: ...
    def __getitem__(self, number: int | slice) -> Commit | list[Commit]:
        if isinstance(number, slice):
            return [self[n] for n in range(*number.indices(len(self)))]
        n = range(len(self))[number]
        values: dict[str, Any] = {name: column[n] for name, column in self._numbers.items()}
        values |= {name: self.names[column[n]] for name, column in self._named.items()}
        values |= {name: text[ends[n] : ends[n + 1]].decode() for name, (ends, text) in self._texts.items()}
        if values["energy_estimate_mj"] == NONE:
            values["energy_estimate_mj"] = None
        values["energy_domains"] = tuple(d for d in values["energy_domains"].split(",") if d)
        return Commit(**values, files=(), errors={}, energy_mj=None, segments=())

    # -- columns; while one of them is in use, nothing can be added ---------------------------------------------------

    def number(self, name: str) -> np.ndarray:
        """A column of numbers, int64 `[n]`, not copied; `NONE` stands for None."""
        column = self._numbers[name]
        return np.frombuffer(column, np.int64) if len(column) else np.zeros(0, np.int64)

    def name_codes(self, name: str) -> np.ndarray:
        """A column of repeated names as places in `names`, `[n]`, not copied; domains are joined by commas."""
        column = self._named[name]
        return np.frombuffer(column, np.int32) if len(column) else np.zeros(0, np.int32)

    def text(self, name: str) -> pa.Array:
        """A column of strings, copied."""
        ends, text = self._texts[name]
        offsets = pa.py_buffer(np.array(ends, np.int32))
        return pa.StringArray.from_buffers(len(self), offsets, pa.py_buffer(bytes(text)))

    def first_of_each(self, *names: str) -> list[Commit]:
        """The first commit of every combination of such repeated names, in order."""
        if not len(self):
            return []
        codes = np.stack([self.name_codes(name) for name in names], axis=1)
        _, first = np.unique(codes, axis=0, return_index=True)
        return [self[n] for n in np.sort(first).tolist()]

    def last_of_each_worker(self) -> list[Commit]:
        """The last commit of every worker."""
        _, last = np.unique(self.name_codes("worker_id")[::-1], return_index=True)
        return [self[len(self) - 1 - n] for n in np.sort(last).tolist()]

    def index(self) -> AttemptIndex:  # type: ignore[override]
        """Finds a commit by its shard and attempt."""
        return AttemptIndex(self.number("shard_id"), self.text("attempt_id"))


#: What one device's sample is in a spool, `PowerSample` in the middle; the names are places in `PowerSpool.names`.
_SAMPLES = pa.schema(
    [
        *((name, pa.int32()) for name in ("boot_id", "node_id", "host", "device", "source")),
        *((name, pa.int64()) for name in ("t_mono_ns", "t_wall_ns", "power_average_mw", "power_instant_mw")),
    ]
)
_SPOOL_ROWS = 16_384


class PowerSpool:
    """Power samples in the order in which they were added, in a temporary file once there are many."""

    def __init__(self) -> None:
        self.names: dict[str | None, int] = {}
        self._held: list[tuple[int | None, ...]] = []
        self._file: IO[bytes] | None = None
        self._writer: pa.RecordBatchStreamWriter | None = None

    def add(self, trace: PowerTrace, node_id: str | None, host: str | None) -> None:
        """Append the samples of a device."""
        texts = (trace.boot_id, node_id, host, trace.device, trace.source)
        where = tuple(self.names.setdefault(text, len(self.names)) for text in texts)
        self._held += [(*where, *sample) for sample in trace.samples]
        if len(self._held) >= _SPOOL_ROWS:
            self._file = self._file or tempfile.TemporaryFile(prefix="millijoule-")  # noqa: SIM115
            self._writer = self._writer or pa.ipc.new_stream(pa.PythonFile(self._file, "w"), _SAMPLES)
            self._writer.write_table(self._table())
            self._held = []

    def tables(self) -> Iterator[pa.Table]:
        """All samples, some at a time: names as dictionaries, numbers as in `PowerSample`. Nothing can be added any more."""
        if self._writer is not None and self._file is not None:
            self._writer.close()
            self._file.seek(0)
            with pa.ipc.open_stream(pa.PythonFile(self._file, "r")) as stream:
                for batch in stream:
                    yield self._named(pa.Table.from_batches([batch]))
        if self._held:
            yield self._named(self._table())

    def _table(self) -> pa.Table:
        columns = zip(*self._held, strict=True)
        return pa.table(
            [pa.array(c, f.type) for c, f in zip(columns, _SAMPLES, strict=True)], schema=_SAMPLES
        )

    def _named(self, samples: pa.Table) -> pa.Table:
        names = pa.array(list(self.names), pa.string())
        columns = [names.take(samples[f.name].combine_chunks()) for f in _SAMPLES if f.type == pa.int32()]
        numbers = [samples[f.name] for f in _SAMPLES if f.type == pa.int64()]
        return pa.table([*columns, *numbers], names=_SAMPLES.names)
