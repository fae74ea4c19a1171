"""What a finished job must have left, from its files alone: pyarrow, Pillow and hashlib, nothing of the product.

The energy is judged by `support.counter_judge`, from what the boards ran.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
from PIL import Image


def image_problems(
    output: Path, prompts: Sequence[str], undisturbed: Mapping[str, str] | None = None
) -> Iterator[str]:
    """Every prompt has one image, of its own; its bytes are where the manifest says; `undisturbed`: hashes by prompt."""
    rows = pq.ParquetFile(output / "manifest.parquet").read().to_pylist()
    times = Counter(r["prompt"] for r in rows)
    for prompt in prompts:
        if times[prompt] != 1:
            yield f"{prompt!r} is in the manifest {times[prompt]} times"
    yield from (
        f"{prompt!r} is in the manifest, and nobody asked for it" for prompt in times.keys() - set(prompts)
    )
    files: dict[str, dict[tuple[str, int], bytes]] = {}
    for row in rows:
        if row["status"] != "ok":
            yield f"{row['prompt']!r} is {row['status']}: a row is blamed ({row['error']})"
            continue
        if row["path"] not in files:
            try:
                table = pq.ParquetFile(output / row["path"]).read(["prompt_id", "image_index", "image"])
            except (OSError, ValueError) as error:
                yield f"{row['path']}: {error}"
                continue
            files[row["path"]] = {
                (r["prompt_id"], r["image_index"]): _bytes(r["image"]) for r in table.to_pylist()
            }
        data = files[row["path"]].get((row["prompt_id"], row["image_index"]))
        if data is None:
            yield f"{row['prompt']!r} is not in {row['path']}"
            continue
        found = hashlib.sha256(data).hexdigest()
        if found != row["sha256"]:
            yield f"{row['prompt']!r} has not the bytes of the manifest's hash"
        if undisturbed is not None and found != undisturbed.get(row["prompt"]):
            yield f"{row['prompt']!r} is not the image of an undisturbed run"
        if not np.array_equal(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")), _pixels(row)):
            yield f"{row['prompt']!r} has other pixels than its prompt and seed"


def _bytes(value: bytes | dict) -> bytes:
    return value["bytes"] if isinstance(value, dict) else value


def _pixels(row: Mapping) -> np.ndarray:
    """What the stand-in model draws: eight by eight pixels that follow from prompt and seed."""
    digest = hashlib.sha256(f"{row['prompt']}\0{row['seed']}".encode()).digest()
    return np.frombuffer((digest * 6)[:192], np.uint8).reshape(8, 8, 3)


def hashes(output: Path) -> dict[str, str]:
    """SHA-256 of each image by its prompt."""
    rows = pq.ParquetFile(output / "manifest.parquet").read(["prompt", "sha256"]).to_pylist()
    return {r["prompt"]: r["sha256"] for r in rows}


def data_files(output: Path) -> set[Path]:
    """The files that hold the images of the manifest."""
    paths = pq.ParquetFile(output / "manifest.parquet").read(["path"]).column("path").to_pylist()
    return {output / path for path in paths if path}


def committed_files(output: Path) -> set[Path]:
    """The files of shards that are committed, as far as their commits can be read and they are there."""
    files = set()
    for commit in output.glob("_job/commits/*/*.json"):
        try:
            files |= {output / file["path"] for file in json.loads(commit.read_bytes())["files"]}
        except ValueError:
            pass
    return {path for path in files if path.exists()}


def stray_files(folder: Path, allowed: Collection[str]) -> Iterator[str]:
    """What lies in `folder` beside what was put there and the output."""
    yield from (f"{name} is outside the output" for name in sorted(set(os.listdir(folder)) - set(allowed)))


def orphans(session: int) -> Iterator[str]:
    """Other processes of this session that still run."""
    for process in psutil.process_iter():
        try:
            ours = process.pid != os.getpid() and os.getsid(process.pid) == session
            if ours and process.status() != psutil.STATUS_ZOMBIE:
                yield f"process {process.pid} still runs: {' '.join(process.cmdline())[:80]}"
        except (ProcessLookupError, psutil.Error):
            pass
