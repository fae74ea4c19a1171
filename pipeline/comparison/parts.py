"""The blocks of a comparison that are done, on disk: what lets it go on after a crash.

A part is a folder `parts/00012`, written beside and renamed, so it is whole or not there. A block that was
interrupted leaves nothing and is run again.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from millijoule.pipeline.comparison.registration import Registration, ScheduledBlock
from millijoule.pipeline.comparison.rows import (
    BLOCK_SCHEMA,
    IMAGE_SCHEMA,
    PIXEL_SCHEMA,
    POWER_SCHEMA,
    READ_SCHEMA,
    power_rows,
    read_row,
)
from millijoule.workers.judging.comparison_blocks import DrawnBlock

_TABLES = {
    "reads": READ_SCHEMA,
    "blocks": BLOCK_SCHEMA,
    "images": IMAGE_SCHEMA,
    "pixels": PIXEL_SCHEMA,
    "power": POWER_SCHEMA,
}


class PartStore:
    """The parts in one folder; one process writes at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for unfinished in folder.glob("*.tmp"):
            shutil.rmtree(unfinished)

    def write(
        self,
        registration: Registration,
        ordinal: int,
        session: int,
        block: ScheduledBlock,
        drawn: DrawnBlock,
    ) -> None:
        """Store one block for good."""
        n, images = len(registration.requests), len(drawn.digests)
        row = {
            **vars(block),
            "ordinal": ordinal,
            "session": session,
            "first_request": drawn.first_request,
            "registration_sha256": registration.sha256,
            "images": images,
            "accepted": 0,  # this and the next ones follow from the other tables, see `bundle.fill_blocks`
            "seconds": 0.0,
        }
        rows: dict[str, list[dict[str, Any]]] = {
            "blocks": [row],
            "reads": [read_row(block.block_id, i, read) for i, read in enumerate(drawn.reads)],
            "power": power_rows(block.block_id, drawn.power),
            "pixels": [
                {
                    "sha256": digest,
                    "height": image.shape[0],
                    "width": image.shape[1],
                    "pixels": np.ascontiguousarray(image).tobytes(),
                }
                for digest, image in drawn.new_pixels.items()
            ],
        }
        tables = {name: pa.Table.from_pylist(rows[name], _TABLES[name]) for name in rows}
        tables["images"] = pa.table(  # by columns: there may be millions
            [
                pa.repeat(block.block_id, images),
                pa.array((drawn.first_request + np.arange(images)) % n, pa.int32()),
                pa.array(drawn.digests, pa.string()),
            ],
            schema=IMAGE_SCHEMA,
        )
        part = self.folder / f"{ordinal:05d}"
        unfinished = part.with_suffix(".tmp")
        unfinished.mkdir()
        for name, table in tables.items():
            pq.write_table(table, unfinished / f"{name}.parquet", compression="zstd")
        os.rename(unfinished, part)

    def read(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """One table, or some of its columns, over all parts, in order of execution."""
        parts = sorted(p for p in self.folder.iterdir() if p.is_dir() and p.suffix != ".tmp")
        tables = [pq.ParquetFile(part / f"{name}.parquet").read(columns=columns) for part in parts]
        return pa.concat_tables(tables) if tables else _TABLES[name].empty_table()
