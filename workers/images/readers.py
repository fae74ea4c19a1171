"""Reading back what a job wrote: the encoded image of a row whatever the output format, and what an image says of itself."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, JpegImagePlugin, PngImagePlugin

from millijoule.workers.errors import InputError, NotFoundError
from millijoule.workers.images.exif import read_exif
from millijoule.workers.storage.protocol import Store

log = logging.getLogger(__name__)

FORMATS = ("PNG", "JPEG", "WEBP")
#: Larger images are not unpacked only to be shown: as many pixels as the largest pipelines make.
MAX_SHOWN_PIXELS = 2**26


def read_images(
    store: Store, rows: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[Mapping[str, Any], bytes | None]]:
    """The encoded image of each row of one shard (records of `IMAGE_ROW_SCHEMA` with status "ok").

    Yields `(row, bytes)` in order, `(row, None)` where the object or the member is not there. Whole files are read
    once, however many images they hold.
    """
    parquet: dict[str, dict[tuple[str, int], bytes]] = {}
    tars: dict[str, tuple[bytes, dict[str, tuple[int, int]]]] = {}
    for row in rows:
        path = row["path"]
        try:
            if path.endswith(".parquet"):
                if path not in parquet:
                    parquet = {path: _parquet_images(store, path)}
                yield row, parquet[path].get((row["prompt_id"], row["image_index"]))
            elif "#" in path:
                tar, member = path.split("#", 1)
                if tar not in tars:
                    index = json.loads(store.get(tar.removesuffix(".tar") + ".index.json"))
                    tars = {tar: (store.get(tar), index)}
                data, index = tars[tar]
                offset, size = index.get(member, (0, 0))
                yield row, data[offset : offset + size] or None
            else:
                yield row, store.get(path)
        except NotFoundError:
            yield row, None


def read_images_to_show(
    store: Store, rows: Iterable[Mapping[str, Any]]
) -> Iterator[tuple[Mapping[str, Any], bytes | None]]:
    """As `read_images`, of any shards; `(row, None)`, and a warning, for those of a damaged file, which `millijoule check` tells."""
    for path, of_file in groupby(rows, key=lambda row: row["path"].partition("#")[0]):
        some = list(of_file)
        try:
            found = list(read_images(store, some))
        except (pa.ArrowException, OSError, ValueError, KeyError) as error:
            log.warning("%s: cannot be read, and its images are not shown: %s", path, error)
            found = [(row, None) for row in some]
        yield from found


def _parquet_images(store: Store, key: str) -> dict[tuple[str, int], bytes]:
    with store.open_input(key) as source:
        table = pq.ParquetFile(source).read(columns=["prompt_id", "image_index", "image"])
    keys = zip(table["prompt_id"].to_pylist(), table["image_index"].to_pylist(), strict=True)
    return dict(zip(keys, table["image"].to_pylist(), strict=True))


def open_small(encoded: bytes) -> Image.Image | None:
    """The picture, in RGB, of an image to be shown; None, and a warning, where it is damaged or would unpack to too much."""
    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
            if image.width * image.height > MAX_SHOWN_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels")
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # Syntax: a broken PNG
        log.warning("an image cannot be read, and is not shown: %s", error)
        return None


def read_provenance(encoded: bytes) -> tuple[str, dict[str, Any]]:
    """(A1111 parameters, exact record) that an image of a job carries: PNG, JPEG or WebP; see `workers.images.provenance`.

    Raises:
        InputError: it is none of these, or carries no record.
    """
    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
            if isinstance(image, PngImagePlugin.PngImageFile):
                image.load()
                parameters, record = image.text.get("parameters", ""), image.text.get("millijoule", "")
            else:
                parameters, record = read_exif(image.getexif())
                if not record and isinstance(image, JpegImagePlugin.JpegImageFile):
                    record = b"".join(data for kind, data in image.applist if kind == "COM").decode()
            return parameters, json.loads(record)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"not an image of a job: {error}") from error
