"""Planning: every good row of the input exactly once in a shard, every other in quarantine, at bounded memory.

In go prompt files and options, out comes a plan in the store (`pipeline.planning.plan`). The same input and options give
the same bytes, so two drivers that plan at once do no harm.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from millijoule.pipeline.planning.column_names import Remarks
from millijoule.pipeline.planning.duplicate_ids import DuplicateFinder, Duplicates
from millijoule.pipeline.planning.plan import PLAN_METADATA, Plan
from millijoule.pipeline.planning.plan_options import PlanOptions, compute_fingerprint
from millijoule.pipeline.planning.prompts import BAD_ROW_SCHEMA, PromptChunk, read_prompts
from millijoule.pipeline.planning.raw_chunks import BadRow, shown
from millijoule.pipeline.planning.shard_cutter import ShardCutter, ShardWriter
from millijoule.workers.counted import counted
from millijoule.workers.errors import InputError
from millijoule.workers.layout import plan_index_key, plan_part_key
from millijoule.workers.records import encode
from millijoule.workers.schemas import PLAN_ROW_SCHEMA
from millijoule.workers.scratch import scratch_folder
from millijoule.workers.storage.inputs import InputFile
from millijoule.workers.storage.protocol import Store

log = logging.getLogger(__name__)

#: Duplicate ids and bad rows that an error message shows.
SHOWN_PROBLEMS = 5


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
    `fingerprint` is what `compute_fingerprint` said, where the caller has asked already.

    Raises:
        InputError: a file cannot be used, no row can, or a prompt id occurs twice and the options do not say what to
            do about it.
        StoreError: storage failed.
    """
    fingerprint = fingerprint or compute_fingerprint(files, options, fingerprint_extra)
    source = _Source(files, options)
    with scratch_folder() as scratch:
        draft = _Draft(source, Path(scratch, "draft"))
        if draft.duplicates and options.duplicate_ids != "error":
            log.info("%s a prompt id; reading the input again", _repeating(len(draft.duplicates)))
            shutil.rmtree(draft.folder)
            source.known = draft.duplicates
            draft = _Draft(source, Path(scratch, "again"))
        if draft.duplicates:
            raise InputError(_duplicates_message(source, draft.duplicates))
        plan = draft.publish(store, fingerprint)
    for warning in plan.warnings:
        log.warning("%s", warning)
    return plan


class _Source:
    """The input, which can be read several times: rows as the plan has them, each with an id and an ordinal.

    The rows of the duplicates that an earlier pass found, `known`, are dropped or renamed as the options say.
    """

    def __init__(self, files: Sequence[InputFile], options: PlanOptions) -> None:
        self.files = files
        self.options = options
        self.known: Duplicates | None = None
        self._remarks = Remarks()
        self._first_ordinal: list[int] = []  # of each file met in the last pass

    def chunks(self) -> Iterator[tuple[np.ndarray, pa.RecordBatch, list[BadRow]]]:
        """(ordinals, rows of the plan, bad rows) of each chunk of the input, known duplicates dealt with."""
        self._first_ordinal = []
        following = 0
        for chunk in read_prompts(self.files, self.options, self._remarks):
            while len(self._first_ordinal) <= chunk.file_index:
                self._first_ordinal.append(following)
            start = self._first_ordinal[chunk.file_index]
            ordinals = start + chunk.row_numbers - 1
            following = start + chunk.last_row
            yield self._resolve(chunk, ordinals, _plan_rows(chunk, ordinals, self.options))
        self._first_ordinal += [following] * (len(self.files) + 1 - len(self._first_ordinal))

    def where(self, ordinal: int) -> str:
        """ "file:row" of the row with this ordinal, which the last pass has met."""
        i = bisect_right(self._first_ordinal, ordinal) - 1
        return f"{self.files[i].url}:{ordinal - self._first_ordinal[i] + 1}"

    def empty_files(self) -> list[str]:
        """The files that had no rows in the last pass."""
        starts = self._first_ordinal
        return [f.url for f, a, b in zip(self.files, starts, starts[1:], strict=False) if a == b]

    def ids(self, ordinals: Sequence[int]) -> dict[int, str]:
        """The prompt ids of a few rows, read from the input again."""
        found: dict[int, str] = {}
        for chunk_ordinals, rows, _ in self.chunks():
            for i in np.flatnonzero(np.isin(chunk_ordinals, ordinals)).tolist():
                found[int(chunk_ordinals[i])] = rows["prompt_id"][i].as_py()
            if len(found) == len(ordinals):
                break
        return found

    def _resolve(
        self, chunk: PromptChunk, ordinals: np.ndarray, rows: pa.RecordBatch
    ) -> tuple[np.ndarray, pa.RecordBatch, list[BadRow]]:
        """The chunk with later occurrences of an id renamed or dropped."""
        known = self.known
        start, end = 0, 0
        if known is not None and len(ordinals):
            start, end = np.searchsorted(known.ordinal, [ordinals[0], ordinals[-1] + 1]).tolist()
        if known is None or start == end:
            return ordinals, rows, chunk.bad
        at = np.searchsorted(ordinals, known.ordinal[start:end])
        ids = rows["prompt_id"].to_pylist()
        if self.options.duplicate_ids == "suffix":
            for i, nth in zip(at.tolist(), known.nth[start:end].tolist(), strict=True):
                ids[i] = f"{ids[i]}~{nth}"
            named = rows.set_column(0, PLAN_ROW_SCHEMA.field("prompt_id"), pa.array(ids, pa.string()))
            return ordinals, named, chunk.bad
        bad = [
            BadRow(
                file=self.files[chunk.file_index].url,
                row=int(chunk.row_numbers[i]),
                column=chunk.names.get("prompt_id"),
                reason=f"prompt id {shown(ids[i])!r} is taken by {self.where(first)}",
                prompt_id=ids[i],
                prompt=shown(rows["prompt"][i].as_py()),
            )
            for i, first in zip(at.tolist(), known.first[start:end].tolist(), strict=True)
        ]
        keep = np.ones(len(ordinals), bool)
        keep[at] = False
        return ordinals[keep], rows.filter(pa.array(keep)), sorted(chunk.bad + bad, key=lambda b: b.row)


class _Draft:
    """One pass over the input, written to a local folder; `duplicates` says whether it may be published."""

    def __init__(self, source: _Source, folder: Path) -> None:
        ids_folder = folder / "ids"
        ids_folder.mkdir(parents=True)
        finder = DuplicateFinder(ids_folder)
        self.folder = folder
        self._source = source
        self._first_bad: list[BadRow] = []
        self._n_bad_rows = 0
        self._shards = ShardWriter(folder, PLAN_ROW_SCHEMA, source.options.shard_size)
        bad_rows_writer = pq.ParquetWriter(folder / "bad_rows.parquet", BAD_ROW_SCHEMA, compression="zstd")
        with self._shards, bad_rows_writer:
            cutter = ShardCutter(source.options.shard_size, self._shards.write)
            for ordinals, rows, bad in source.chunks():
                if bad:
                    self._n_bad_rows += len(bad)
                    self._first_bad += bad[: SHOWN_PROBLEMS - len(self._first_bad)]
                    batch = pa.RecordBatch.from_pylist([asdict(row) for row in bad], BAD_ROW_SCHEMA)
                    bad_rows_writer.write_batch(batch)
                if rows.num_rows:
                    finder.add(rows["prompt_id"], ordinals)
                    cutter.add(rows)
                # The allocator else keeps what short-lived arrays of every thread once needed.
                pa.default_memory_pool().release_unused()
            cutter.finish()
        self.duplicates = finder.duplicates()
        shutil.rmtree(ids_folder)

    def publish(self, store: Store, fingerprint: str) -> Plan:
        """Upload the plan, the shard index last; raises InputError where no row can be used."""
        shards = self._shards
        if not shards.n_rows:
            raise InputError(
                f"none of the {counted(self._n_bad_rows, 'row')} can be used; the first: "
                + "; ".join(map(str, self._first_bad))
            )
        warnings = [f"{url}: no rows" for url in self._source.empty_files()]
        full = -(-shards.n_images // self._source.options.shard_size)
        if shards.n_shards > 1000 and shards.n_shards > 8 * full:
            warnings.append(
                f"{shards.n_shards:,} shards, where {full:,} of equal size and steps would do: the prompts ask for "
                "very many combinations of width, height and num_inference_steps"
            )
        plan = Plan(
            fingerprint=fingerprint,
            n_rows=shards.n_rows,
            n_images=shards.n_images,
            n_bad_rows=self._n_bad_rows,
            n_shards=shards.n_shards,
            n_parts=len(shards.parts),
            warnings=tuple(warnings),
        )

        for part, path in enumerate(shards.parts):
            store.put_file(plan_part_key(fingerprint, part), path)
        store.put_file(plan.bad_rows_key, self.folder / "bad_rows.parquet")
        store.put_file(plan_index_key(fingerprint), shards.write_index(PLAN_METADATA, encode(plan)))
        return plan


def _repeating(n: int) -> str:
    return counted(n, "row repeats", "rows repeat")


def _duplicates_message(source: _Source, found: Duplicates) -> str:
    first, later = (ordinals[:SHOWN_PROBLEMS].tolist() for ordinals in (found.first, found.ordinal))
    ids = source.ids(later)
    examples = "; ".join(
        f"{shown(ids[b])!r} at {source.where(a)} and {source.where(b)}"
        for a, b in zip(first, later, strict=True)
    )
    rest = f" and {len(found) - len(later):,} more" if len(found) > len(later) else ""
    renamed = (
        " (after repeated ids got a suffix; rename these rows or use --duplicate-ids keep-first)"
        if source.known
        else ""
    )
    return (
        f"{_repeating(len(found))} a prompt id: {examples}{rest}. Make ids unique, or use --duplicate-ids keep-first "
        f"(drops later rows) or --duplicate-ids suffix (renames them){renamed}"
    )


def _plan_rows(chunk: PromptChunk, ordinals: np.ndarray, options: PlanOptions) -> pa.RecordBatch:
    """The chunk's rows with an id and a number of images for every row, as `PLAN_ROW_SCHEMA`."""
    rows = chunk.rows
    columns = {name: rows[name] for name in rows.schema.names}
    if columns["prompt_id"].null_count:
        # From the row as given: an id must not change with the job's options.
        columns["prompt_id"] = pc.coalesce(columns["prompt_id"], _generated_ids(rows, ordinals))
    columns["num_images"] = pc.fill_null(columns["num_images"], options.images_per_prompt)
    return pa.RecordBatch.from_arrays(list(columns.values()), schema=PLAN_ROW_SCHEMA)


def _generated_ids(rows: pa.RecordBatch, ordinals: np.ndarray) -> pa.Array:
    """Ids of rows that have none: the ordinal among all input rows and a digest of the row's content."""
    content = pc.binary_join_element_wise(
        *(
            pc.cast(rows[name], pa.string())
            for name in rows.schema.names
            if name not in ("prompt_id", "source", "lora")  # `extra` has the LoRAs as the row says them
        ),
        "\x1f",  # neither this nor NUL occurs in a checked row
        null_handling="replace",
        null_replacement="\0",
    )
    sha256 = hashlib.sha256
    digests = [sha256(text).hexdigest()[:16] for text in pc.cast(content, pa.binary()).to_pylist()]
    padded = pc.utf8_lpad(pc.cast(pa.array(ordinals), pa.string()), 8, "0")
    return pc.binary_join_element_wise(padded, pa.array(digests, pa.string()), "-")
