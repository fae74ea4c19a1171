"""The plan: every good row of the input exactly once in a shard, every other in quarantine, at bounded memory.

In go prompt files and options, out comes `_job/plan-<fp12>/` in the store: parts with one Parquet row group per shard,
the bad rows, and last the shard index, whose presence says that the plan is whole. The same input and options give the
same bytes, so two drivers that plan at once do no harm. Nothing here knows about workers or leases.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from millijoule.pipeline.planning.column_names import Remarks
from millijoule.pipeline.planning.duplicate_ids import DuplicateFinder, Duplicates
from millijoule.pipeline.planning.prompt_values import GUIDANCE_LIMITS, INTEGER_LIMITS
from millijoule.pipeline.planning.prompts import BAD_ROW_SCHEMA, PromptChunk, PromptOptions, read_prompts
from millijoule.pipeline.planning.raw_chunks import BadRow, shown
from millijoule.workers.errors import InputError, StoreError
from millijoule.workers.layout import plan_bad_rows_key, plan_index_key, plan_part_key
from millijoule.workers.schemas import PLAN_ROW_SCHEMA, SCHEMA_VERSION
from millijoule.workers.shard_rows import Shard, digest_inputs
from millijoule.workers.storage.inputs import InputFile, open_input_file
from millijoule.workers.storage.prompt_file_names import file_format
from millijoule.workers.storage.protocol import Store

log = logging.getLogger(__name__)

#: Row groups of a part: enough to keep objects few, few enough for a quick footer.
SHARDS_PER_PART = 256

#: Rows that wait for their shard to fill; above either limit the fullest bucket's shard is cut early.
MAX_WAITING_ROWS = 200_000
MAX_WAITING_BYTES = 128 * 2**20

#: Duplicate ids and bad rows that an error message shows.
SHOWN_PROBLEMS = 5

SHARD_INDEX_SCHEMA = pa.schema(
    [
        pa.field("shard_id", pa.int64(), nullable=False),
        pa.field("part", pa.int32(), nullable=False),
        pa.field("row_group", pa.int32(), nullable=False),
        pa.field("n_rows", pa.int32(), nullable=False),
        pa.field("n_images", pa.int32(), nullable=False),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("num_inference_steps", pa.int32()),
        pa.field("first_prompt_id", pa.string(), nullable=False),
        pa.field("rows_sha256", pa.string(), nullable=False),
    ]
)


@dataclass(frozen=True, kw_only=True)
class PlanOptions(PromptOptions):
    """How prompts become rows and shards. Every field is part of the fingerprint.

    `images_per_prompt`, `width`, `height` (pixels), `num_inference_steps`, `guidance_scale` and `negative_prompt` serve
    rows that do not say their own; None leaves it to the model. `shard_size` is in images: a shard takes rows until
    the next would exceed it, and a row alone may. `duplicate_ids` says what happens to a prompt id seen before: refuse
    the input, drop the later rows into quarantine, or name them "id~2", "id~3" and so on.
    """

    shard_size: int = 256
    duplicate_ids: Literal["error", "keep-first", "suffix"] = "error"
    images_per_prompt: int = 1
    width: int | None = None
    height: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    negative_prompt: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shard_size < 1:
            raise InputError(f"shard size {self.shard_size}: must be at least 1 image")
        if self.duplicate_ids not in ("error", "keep-first", "suffix"):
            raise InputError(f"duplicate ids {self.duplicate_ids!r}: must be error, keep-first or suffix")
        integers = {"num_images": self.images_per_prompt} | {
            name: getattr(self, name) for name in ("width", "height", "num_inference_steps")
        }
        for name, value in integers.items():
            low, high = INTEGER_LIMITS[name]
            if value is not None and not low <= value <= high:
                raise InputError(f"{name} {value}: must be from {low} to {high}")
        least, most = GUIDANCE_LIMITS
        if self.guidance_scale is not None and not least <= self.guidance_scale <= most:
            raise InputError(f"guidance_scale {self.guidance_scale}: must be from {least:g} to {most:g}")

    @property
    def row_defaults(self) -> dict[str, Any]:
        """What a null in a column of the plan becomes."""
        return {
            "negative_prompt": self.negative_prompt,
            "num_images": self.images_per_prompt,
            "width": self.width,
            "height": self.height,
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
        }


@dataclass(frozen=True)
class Plan:
    """What a finished plan holds. `n_rows` are rows in shards; `n_bad_rows` those in `bad_rows_key`."""

    fingerprint: str
    n_rows: int
    n_images: int
    n_bad_rows: int
    n_shards: int
    n_parts: int
    warnings: tuple[str, ...] = ()

    @property
    def bad_rows_key(self) -> str:
        return plan_bad_rows_key(self.fingerprint)


@dataclass(frozen=True)
class ShardIndex:
    """All shards of a plan in order, about 150 bytes each; `index[shard_id]` and iteration build `Shard`s as asked.

    `table` has `SHARD_INDEX_SCHEMA`.
    """

    plan: Plan
    table: pa.RecordBatch = field(repr=False)

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, shard_id: int) -> Shard:
        if not 0 <= shard_id < len(self):
            raise IndexError(f"no shard {shard_id} among {len(self)}")
        row = {name: self.table[name][shard_id].as_py() for name in self.table.schema.names}
        return Shard(key=plan_part_key(self.plan.fingerprint, row.pop("part")), **row)

    def __iter__(self) -> Iterator[Shard]:
        return (self[i] for i in range(len(self)))

    @property
    def n_rows(self) -> np.ndarray:
        """int32 `[n_shards]`."""
        return self.table["n_rows"].to_numpy()

    @property
    def n_images(self) -> np.ndarray:
        """int32 `[n_shards]`."""
        return self.table["n_images"].to_numpy()


def compute_fingerprint(
    files: Sequence[InputFile], options: PlanOptions, fingerprint_extra: Mapping[str, Any]
) -> str:
    """SHA-256 in hex over everything that decides the rows and the images.

    That is the content of each file in order (on S3 its size and ETag), its format, all options,
    `fingerprint_extra` (JSON values: model hash, job seed, output format ...) and the schema version. Names of files
    do not count, but for the columns in the names of their folders.

    Raises:
        StoreError: a file cannot be read.
    """
    said = asdict(options)
    if options.delimiter is None:
        del said["delimiter"]  # a job from before there was the option goes on
    content = {
        "files": [_file_identity(file) for file in files],
        "options": said,
        "extra": dict(fingerprint_extra),
        "schema_version": SCHEMA_VERSION,
    }
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _file_identity(file: InputFile) -> dict[str, Any]:
    identity: dict[str, Any] = {"format": file_format(file.url)}
    if file.columns:
        identity["columns"] = file.columns
    if file.etag is not None:
        return identity | {"etag": file.etag, "size_bytes": file.size_bytes}
    digest = hashlib.sha256()
    with open_input_file(file.url) as raw:
        while block := raw.read(2**20):
            digest.update(block)
    return identity | {"sha256": digest.hexdigest()}


def plan_job(
    files: Sequence[InputFile],
    options: PlanOptions,
    store: Store,
    fingerprint_extra: Mapping[str, Any],
    *,
    fingerprint: str | None = None,
) -> Plan:
    """Read, check and shard all prompts, and write the plan to the store.

    Needs temporary disk space for the whole plan (TMPDIR). The input is read once more where ids occur twice.

    Args:
        fingerprint: what `compute_fingerprint` said, where the caller has asked already.

    Raises:
        InputError: a file cannot be used, no row can, or a prompt id occurs twice and the options do not say what to
            do about it.
        StoreError: storage failed.
    """
    fingerprint = fingerprint or compute_fingerprint(files, options, fingerprint_extra)
    with tempfile.TemporaryDirectory(prefix="millijoule-plan-") as scratch:
        draft = _Draft(files, options, Path(scratch) / "draft", Remarks())
        draft.write()
        if draft.duplicates:
            if options.duplicate_ids == "error":
                raise InputError(_duplicates_message(draft))
            log.info("%d rows repeat a prompt id; reading the input again", len(draft.duplicates))
            draft.delete()
            draft = _Draft(files, options, Path(scratch) / "again", draft.remarks, draft.duplicates)
            draft.write()
            if draft.duplicates:
                raise InputError(
                    f"{_duplicates_message(draft)} (after repeated ids got a suffix; rename these rows or use "
                    "--duplicate-ids keep-first)"
                )
        plan = draft.plan(fingerprint)
        draft.publish(store, plan)
    for warning in plan.warnings:
        log.warning("%s", warning)
    return plan


def load_shard_index(store: Store, fingerprint: str) -> ShardIndex:
    """The shards of a plan that is already in the store.

    Raises:
        NotFoundError: there is no whole plan with this fingerprint.
        StoreError: it cannot be read, or belongs to another fingerprint with the same beginning.
    """
    where = f"{store.url}/{plan_index_key(fingerprint)}"
    with store.open_input(plan_index_key(fingerprint)) as file:
        try:
            table = pq.ParquetFile(file).read(use_threads=False)
            raw = json.loads(table.schema.metadata[b"millijoule.plan"])
        except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
            raise StoreError(
                f"{where}: damaged shard index: {error}. Delete this output's _job folder and start again"
            ) from error
    plan = Plan(**{**raw, "warnings": tuple(raw["warnings"])})
    if plan.fingerprint != fingerprint or plan.n_shards != table.num_rows:
        raise StoreError(f"{where}: this is the plan of another job ({plan.fingerprint})")
    table = table.cast(SHARD_INDEX_SCHEMA).combine_chunks()
    batches = table.to_batches()
    return ShardIndex(plan, batches[0] if batches else pa.RecordBatch.from_pylist([], SHARD_INDEX_SCHEMA))


class _Draft:
    """One pass over the input, written to a local folder.

    Args:
        remarks: what was said about the input already.
        known: the duplicates an earlier pass found; their rows are dropped or renamed as the options say.
    """

    def __init__(
        self,
        files: Sequence[InputFile],
        options: PlanOptions,
        folder: Path,
        remarks: Remarks,
        known: Duplicates | None = None,
    ) -> None:
        self.files = files
        self.options = options
        self.remarks = remarks
        self.known = known
        self.folder = folder
        self.first_ordinal: list[int] = []  # of each file
        self.first_bad: list[BadRow] = []
        self.n_bad_rows = 0
        self.duplicates: Duplicates
        self.shards: _ShardWriter

    def write(self) -> None:
        """Read everything once; afterwards `duplicates` says whether the draft may be published."""
        ids_folder = self.folder / "ids"
        ids_folder.mkdir(parents=True)
        finder = DuplicateFinder(ids_folder)
        with (
            _ShardWriter(self.folder) as self.shards,
            pq.ParquetWriter(
                self.folder / "bad_rows.parquet", BAD_ROW_SCHEMA, compression="zstd"
            ) as bad_rows,
        ):
            cutter = ShardCutter(self.options.shard_size, self.shards.write)
            for ordinals, rows, bad in self._chunks():
                if bad:
                    self.n_bad_rows += len(bad)
                    self.first_bad += bad[: SHOWN_PROBLEMS - len(self.first_bad)]
                    bad_rows.write_batch(_bad_rows_batch(bad))
                if rows.num_rows:
                    finder.add(rows["prompt_id"], ordinals)
                    cutter.add(rows)
                # The allocator else keeps what short-lived arrays of every thread once needed.
                pa.default_memory_pool().release_unused()
            cutter.finish()
        self.duplicates = finder.duplicates()
        for path in ids_folder.iterdir():
            path.unlink()

    def source(self, ordinal: int) -> str:
        """ "file:row" of the row with this ordinal."""
        i = bisect_right(self.first_ordinal, ordinal) - 1
        return f"{self.files[i].url}:{ordinal - self.first_ordinal[i] + 1}"

    def ids(self, ordinals: Sequence[int]) -> dict[int, str]:
        """The prompt ids of a few rows, read from the input again."""
        found: dict[int, str] = {}
        again = _Draft(self.files, self.options, self.folder, self.remarks, self.known)
        for chunk_ordinals, rows, _ in again._chunks():
            for ordinal in set(ordinals) - found.keys():
                i = int(np.searchsorted(chunk_ordinals, ordinal))
                if i < len(chunk_ordinals) and chunk_ordinals[i] == ordinal:
                    found[ordinal] = rows["prompt_id"][i].as_py()
            if len(found) == len(set(ordinals)):
                break
        return found

    def plan(self, fingerprint: str) -> Plan:
        """The draft's totals; raises InputError where no row can be used."""
        if not self.shards.n_rows:
            raise InputError(
                f"none of the {self.n_bad_rows:,} rows can be used; the first: "
                + "; ".join(map(str, self.first_bad))
            )
        return Plan(
            fingerprint=fingerprint,
            n_rows=self.shards.n_rows,
            n_images=self.shards.n_images,
            n_bad_rows=self.n_bad_rows,
            n_shards=self.shards.n_shards,
            n_parts=self.shards.n_parts,
            warnings=tuple(self._warnings()),
        )

    def publish(self, store: Store, plan: Plan) -> None:
        """Upload the plan, the shard index last."""
        for part in range(plan.n_parts):
            store.put_file(plan_part_key(plan.fingerprint, part), self.shards.part_path(part))
        store.put_file(plan.bad_rows_key, self.folder / "bad_rows.parquet")
        store.put_file(plan_index_key(plan.fingerprint), self.shards.write_index(plan))

    def delete(self) -> None:
        """Free the disk space."""
        for path in self.folder.iterdir():
            if path.is_file():
                path.unlink()

    def _warnings(self) -> Iterator[str]:
        ends = [*self.first_ordinal[1:], self._next_ordinal]
        for file, start, end in zip(self.files, self.first_ordinal, ends, strict=True):
            if start == end:
                yield f"{file.url}: no rows"
        full = -(-self.shards.n_images // self.options.shard_size)
        if self.shards.n_shards > 1000 and self.shards.n_shards > 8 * full:
            yield (
                f"{self.shards.n_shards:,} shards, where {full:,} of equal size and steps would do: the prompts ask for "
                "very many combinations of width, height and num_inference_steps"
            )

    def _chunks(self) -> Iterator[tuple[np.ndarray, pa.RecordBatch, list[BadRow]]]:
        """(ordinals, rows of the plan, bad rows) of each chunk of the input, known duplicates dealt with."""
        self.first_ordinal = []
        self._next_ordinal = 0
        for chunk in read_prompts(self.files, self.options, self.remarks):
            while len(self.first_ordinal) <= chunk.file_index:
                self.first_ordinal.append(self._next_ordinal)
            start = self.first_ordinal[chunk.file_index]
            ordinals = start + chunk.row_numbers - 1
            self._next_ordinal = start + chunk.last_row
            rows, bad = _plan_rows(chunk, ordinals, self.options), chunk.bad
            if self.known is not None and len(ordinals):
                ordinals, rows, bad = self._resolve(chunk, ordinals, rows)
            yield ordinals, rows, bad
        while len(self.first_ordinal) < len(self.files):
            self.first_ordinal.append(self._next_ordinal)

    def _resolve(
        self, chunk: PromptChunk, ordinals: np.ndarray, rows: pa.RecordBatch
    ) -> tuple[np.ndarray, pa.RecordBatch, list[BadRow]]:
        """The chunk with later occurrences of an id renamed or dropped."""
        assert self.known is not None
        at, ours = self.known.among(ordinals)
        if not len(at):
            return ordinals, rows, chunk.bad
        ids = rows["prompt_id"].to_pylist()
        if self.options.duplicate_ids == "suffix":
            for i, nth in zip(at.tolist(), self.known.nth[ours].tolist(), strict=True):
                ids[i] = f"{ids[i]}~{nth}"
            return ordinals, _with_column(rows, "prompt_id", pa.array(ids, pa.string())), chunk.bad
        bad = [
            BadRow(
                file=self.files[chunk.file_index].url,
                row=int(chunk.row_numbers[i]),
                column=chunk.names.get("prompt_id"),
                reason=f"prompt id {shown(ids[i])!r} is taken by {self.source(first)}",
                prompt_id=ids[i],
                prompt=shown(rows["prompt"][i].as_py()),
            )
            for i, first in zip(at.tolist(), self.known.first[ours].tolist(), strict=True)
        ]
        keep = np.ones(len(ordinals), bool)
        keep[at] = False
        return ordinals[keep], rows.filter(pa.array(keep)), sorted(chunk.bad + bad, key=lambda b: b.row)


def _duplicates_message(draft: _Draft) -> str:
    found = draft.duplicates
    first, later = (ordinals[:SHOWN_PROBLEMS].tolist() for ordinals in (found.first, found.ordinal))
    ids = draft.ids(later)
    examples = "; ".join(
        f"{shown(ids[b])!r} at {draft.source(a)} and {draft.source(b)}"
        for a, b in zip(first, later, strict=True)
    )
    rest = f" and {len(found) - len(later):,} more" if len(found) > len(later) else ""
    return (
        f"{len(found):,} rows repeat a prompt id: {examples}{rest}. Make ids unique, or use --duplicate-ids keep-first "
        "(drops later rows) or --duplicate-ids suffix (renames them)"
    )


def _plan_rows(chunk: PromptChunk, ordinals: np.ndarray, options: PlanOptions) -> pa.RecordBatch:
    """The chunk's rows with an id for every row and the job's defaults, as `PLAN_ROW_SCHEMA`."""
    rows = chunk.rows
    ids = rows["prompt_id"]
    if ids.null_count:
        # From the row as given: an id must not change with the job's options.
        ids = pc.coalesce(ids, _generated_ids(rows, ordinals))
    columns = {name: rows[name] for name in rows.schema.names} | {"prompt_id": ids}
    for name, default in options.row_defaults.items():
        if default is not None and columns[name].null_count:
            columns[name] = pc.fill_null(columns[name], pa.scalar(default, columns[name].type))
    return pa.RecordBatch.from_arrays(list(columns.values()), schema=PLAN_ROW_SCHEMA)


def _generated_ids(rows: pa.RecordBatch, ordinals: np.ndarray) -> pa.Array:
    """Ids of rows that have none: the ordinal among all input rows and a digest of the row's content."""
    content = pc.binary_join_element_wise(
        *(
            pc.cast(rows[name], pa.string())
            for name in rows.schema.names
            if name not in ("prompt_id", "source")
        ),
        "\x1f",  # neither this nor NUL occurs in a checked row
        null_handling="replace",
        null_replacement="\0",
    )
    sha256 = hashlib.sha256
    digests = [sha256(text).hexdigest()[:16] for text in pc.cast(content, pa.binary()).to_pylist()]
    padded = pc.utf8_lpad(pc.cast(pa.array(ordinals), pa.string()), 8, "0")
    return pc.binary_join_element_wise(padded, pa.array(digests, pa.string()), "-")


def _with_column(rows: pa.RecordBatch, name: str, column: pa.Array) -> pa.RecordBatch:
    return rows.set_column(rows.schema.get_field_index(name), rows.schema.field(name), column)


def _bad_rows_batch(bad: Sequence[BadRow]) -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist([asdict(row) for row in bad], BAD_ROW_SCHEMA)


class ShardCutter:
    """Sorts rows into buckets of one size and step count, and cuts a shard whenever a bucket has enough images.

    Shards come in the order in which they become full. Rows keep their order within a bucket.

    Args:
        shard_size: images per shard at most, unless a single row has more.
        emit: takes `PLAN_ROW_SCHEMA` rows and the ends of the shards among them.
    """

    def __init__(
        self, shard_size: int, emit: Callable[[pa.RecordBatch, list[tuple[int, int]]], None]
    ) -> None:
        self._shard_size = shard_size
        self._emit = emit
        self._waiting = pa.RecordBatch.from_pylist([], PLAN_ROW_SCHEMA)

    def add(self, rows: pa.RecordBatch) -> None:
        """Take rows in input order; emits the shards they complete."""
        rows = pa.concat_batches([self._waiting, rows])
        keys = _bucket_keys(rows)
        order = np.argsort(keys, kind="stable")  # [n] positions, bucket by bucket, in input order within
        counts = rows["num_images"].to_numpy()[order]
        starts = np.flatnonzero(np.concatenate(([True], np.diff(keys[order]) != 0)))
        shards: list[tuple[int, int, int]] = []  # (position that completes it, start, end) within `order`
        rests: list[tuple[int, int]] = []
        for start, end in zip(starts.tolist(), [*starts[1:].tolist(), len(order)], strict=True):
            cuts = _cuts(counts[start:end], self._shard_size)
            for a, b in zip([0, *cuts], cuts, strict=False):
                full = counts[start + a : start + b].sum() >= self._shard_size
                shards.append((int(order[start + b - 1 if full else start + b]), start + a, start + b))
            if start + (cuts[-1] if cuts else 0) < end:
                rests.append((start + (cuts[-1] if cuts else 0), end))
        shards.sort()
        early, rests = self._evicted(rests, rows)
        ranges = [(a, b) for _, a, b in shards] + early
        if ranges:
            self._emit_ranges(rows, order, ranges)
        kept = np.sort(np.concatenate([order[a:b] for a, b in rests])) if rests else np.empty(0, np.int64)
        self._waiting = rows.take(pa.array(kept))  # a copy, so that `rows` can go

    def finish(self) -> None:
        """Emit what is left, each bucket as a shard, in the order of their first rows."""
        rows = self._waiting
        if not rows.num_rows:
            return
        keys = _bucket_keys(rows)
        order = np.argsort(keys, kind="stable")
        starts = np.flatnonzero(np.concatenate(([True], np.diff(keys[order]) != 0))).tolist()
        ranges = list(zip(starts, [*starts[1:], len(order)], strict=True))
        ranges.sort(key=lambda r: order[r[0]])
        self._emit_ranges(rows, order, ranges)
        self._waiting = rows.slice(0, 0)

    def _evicted(
        self, rests: list[tuple[int, int]], rows: pa.RecordBatch
    ) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """Split the buckets' rests into those to cut early, the fullest, and those that may wait."""
        n = sum(b - a for a, b in rests)
        allowed = min(MAX_WAITING_ROWS, int(MAX_WAITING_BYTES * rows.num_rows / max(rows.nbytes, 1)))
        by_rows = sorted(rests, key=lambda r: (r[0] - r[1], r[0]))
        early = 0
        while n > allowed:
            n -= by_rows[early][1] - by_rows[early][0]
            early += 1
        return by_rows[:early], by_rows[early:]

    def _emit_ranges(self, rows: pa.RecordBatch, order: np.ndarray, ranges: list[tuple[int, int]]) -> None:
        taken = rows.take(pa.array(np.concatenate([order[a:b] for a, b in ranges])))
        ends = np.cumsum([b - a for a, b in ranges]).tolist()
        self._emit(taken, list(zip([0, *ends], ends, strict=False)))


def _bucket_keys(rows: pa.RecordBatch) -> np.ndarray:
    """int64 `[n]`: equal where size and steps are equal; null counts as 0, which no row may have."""
    width, height, steps = (
        pc.fill_null(rows[name], 0).to_numpy(zero_copy_only=False).astype(np.int64)
        for name in ("width", "height", "num_inference_steps")
    )
    return ((width << 14) | height) << 10 | steps


def _cuts(counts: np.ndarray, shard_size: int) -> list[int]:
    """Where the complete shards of a bucket end: each takes rows until the next would exceed `shard_size` images."""
    if not len(counts) or counts.sum() < shard_size:
        return []
    totals = np.cumsum(counts, dtype=np.int64)
    cuts: list[int] = []
    start, before = 0, 0
    while True:
        end = max(int(np.searchsorted(totals, before + shard_size, side="right")), start + 1)
        if end >= len(totals) and totals[-1] - before < shard_size:
            return cuts
        cuts.append(end)
        if end >= len(totals):
            return cuts
        start, before = end, int(totals[end - 1])


class _ShardWriter:
    """Writes shards as row groups of part files in a local folder, and keeps the index."""

    def __init__(self, folder: Path) -> None:
        self.n_rows = 0
        self.n_images = 0
        self.n_shards = 0
        self.n_parts = 0
        self._folder = folder
        self._part: pq.ParquetWriter | None = None
        self._index: list[pa.RecordBatch] = []

    def __enter__(self) -> _ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._part is not None:
            self._part.close()
            self._part = None

    def part_path(self, part: int) -> Path:
        return self._folder / f"part-{part:05d}.parquet"

    def write(self, rows: pa.RecordBatch, ranges: list[tuple[int, int]]) -> None:
        """Append the shards `rows[start:end]` for each of `ranges`, which follow one another."""
        starts = np.array([start for start, _ in ranges])
        n_images = np.add.reduceat(rows["num_images"].to_numpy(), starts)
        digests = _rows_digests(rows, ranges)
        shard_ids = np.arange(self.n_shards, self.n_shards + len(ranges))
        for shard_id, (start, end) in zip(shard_ids.tolist(), ranges, strict=True):
            if shard_id % SHARDS_PER_PART == 0:
                self._next_part()
            assert self._part is not None
            self._part.write_batch(rows.slice(start, end - start), row_group_size=end - start)
        self._index.append(
            pa.RecordBatch.from_arrays(
                [
                    pa.array(shard_ids),
                    pa.array((shard_ids // SHARDS_PER_PART).astype(np.int32)),
                    pa.array((shard_ids % SHARDS_PER_PART).astype(np.int32)),
                    pa.array(np.array([end - start for start, end in ranges], np.int32)),
                    pa.array(n_images),
                    *(
                        rows[name].take(pa.array(starts))
                        for name in ("width", "height", "num_inference_steps")
                    ),
                    rows["prompt_id"].take(pa.array(starts)),
                    pa.array(digests, pa.string()),
                ],
                schema=SHARD_INDEX_SCHEMA,
            )
        )
        self.n_shards += len(ranges)
        self.n_rows += rows.num_rows
        self.n_images += int(n_images.sum())

    def write_index(self, plan: Plan) -> Path:
        """Write the index file; the totals of the plan stand in its metadata."""
        path = self._folder / "shards.parquet"
        metadata = {"millijoule.plan": json.dumps(asdict(plan), sort_keys=True)}
        table = pa.Table.from_batches(self._index, SHARD_INDEX_SCHEMA).replace_schema_metadata(metadata)
        pq.write_table(table, path, compression="zstd")
        return path

    def _next_part(self) -> None:
        if self._part is not None:
            self._part.close()
        self._part = pq.ParquetWriter(
            self.part_path(self.n_parts),
            PLAN_ROW_SCHEMA,
            compression="zstd",
            use_dictionary=False,
            write_statistics=False,
        )
        self.n_parts += 1


def _rows_digests(rows: pa.RecordBatch, ranges: list[tuple[int, int]]) -> list[str]:
    """`rows_digest` of each range, hashed straight from the Arrow buffer."""
    texts = digest_inputs(rows["prompt_id"], rows["num_images"])
    _, offsets, data = texts.buffers()
    ends = np.frombuffer(offsets, np.int32)[texts.offset : texts.offset + len(texts) + 1]
    view = memoryview(data)
    return [hashlib.sha256(view[ends[start] : ends[end]]).hexdigest() for start, end in ranges]
