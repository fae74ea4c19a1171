"""The first images of a job as small pictures inside the report. First, not picked: nobody chose the good ones."""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq
from PIL import Image

from millijoule.pipeline.report.words import shortened
from millijoule.workers.errors import NotFoundError
from millijoule.workers.images.readers import open_small, read_images_to_show
from millijoule.workers.layout import MANIFEST_KEY
from millijoule.workers.storage.protocol import Store

log = logging.getLogger(__name__)

MAX_SAMPLES = 32
#: Longest side in pixels and quality, the first that fits is used. 192 is more than the page shows, for dense screens.
JPEG_LADDER = ((192, 85), (192, 60), (128, 60), (96, 40), (64, 30))
#: Of all pictures of an output, encoded: 32 of them and the plotting library stay below 2 MB.
MAX_SAMPLE_BYTES = 300_000
MAX_PROMPT_CHARS = 400
_READ_ROWS = 256


@dataclass(frozen=True)
class Sample:
    """An image with its prompt; `picture` is a data URI, None where the image could not be shown."""

    prompt_id: str
    image_index: int
    prompt: str
    width: int | None
    height: int | None
    energy_mj: int | None
    warnings: tuple[str, ...]
    picture: str | None


def read_samples(store: Store) -> tuple[Sample, ...]:
    """The first images of the manifest; none where there is no manifest."""
    try:
        rows = _first_rows(store)
    except NotFoundError:
        return ()
    return tuple(
        Sample(
            prompt_id=row["prompt_id"],
            image_index=row["image_index"],
            prompt=shortened(row["prompt"], MAX_PROMPT_CHARS),
            width=row["width"],
            height=row["height"],
            energy_mj=row["energy_mj"],
            warnings=tuple(row["warnings"] or ()),
            picture=None if data is None else data_url(data),
        )
        for row, data in read_images_to_show(store, rows)
    )


def _first_rows(store: Store) -> list[dict[str, Any]]:
    of_sample = ["prompt_id", "image_index", "prompt", "width", "height", "energy_mj", "warnings"]
    rows: list[dict[str, Any]] = []
    with store.open_input(MANIFEST_KEY) as source:
        for batch in pq.ParquetFile(source).iter_batches(_READ_ROWS, columns=[*of_sample, "status", "path"]):
            rows += [row for row in batch.to_pylist() if row["status"] == "ok"]
            if len(rows) >= MAX_SAMPLES:
                break
    return rows[:MAX_SAMPLES]


def data_url(data: bytes) -> str | None:
    """`data` as a data URI of at most its share of `MAX_SAMPLE_BYTES`, or None."""
    image = open_small(data)
    if image is None:
        return None
    for kind, body in _encodings(image):
        uri = f"data:image/{kind};base64,{base64.b64encode(body).decode()}"
        if len(uri) <= MAX_SAMPLE_BYTES // MAX_SAMPLES:
            return uri
    return None


def _encodings(image: Image.Image) -> Iterator[tuple[str, bytes]]:
    """From good to small: PNG for what is tiny anyway, then JPEG of fewer pixels and lower quality."""
    if max(image.size) <= 64:
        yield "png", _encoded(image, "PNG")
    for pixels, quality in JPEG_LADDER:
        smaller = image.copy()
        smaller.thumbnail((pixels, pixels), Image.Resampling.LANCZOS)
        yield "jpeg", _encoded(smaller, "JPEG", quality=quality)


def _encoded(image: Image.Image, kind: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
