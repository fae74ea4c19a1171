"""What decides a plan: its options, and the fingerprint over them and the input."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from millijoule.pipeline.planning.prompt_values import LIMITS
from millijoule.workers.errors import InputError
from millijoule.workers.schemas import SCHEMA_VERSION
from millijoule.workers.storage.inputs import InputFile, open_input_file
from millijoule.workers.storage.prompt_file_names import file_format

#: Options there once were, which nobody could set: in the fingerprint of every job there is.
_FORMER_OPTIONS = dict.fromkeys(
    ("width", "height", "num_inference_steps", "guidance_scale", "negative_prompt")
)


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """How prompts become rows and shards. Every field but `loras` is part of the fingerprint.

    `prompt_column` names the column that holds the prompt where it has none of the usual names, or several;
    `delimiter` is the character between the fields of csv and tsv, None to find out from the header.
    `images_per_prompt` serves rows that do not say their own. `shard_size` is in images: a shard takes rows until the
    next would exceed it, and a row alone may. `duplicate_ids` says what happens to a prompt id seen before: refuse the
    input, drop the later rows into quarantine, or name them "id~2", "id~3" and so on. `loras` are the names that rows may
    choose among, with weights; where there are none, a column `lora` has no meaning. Their files are in the fingerprint
    elsewhere, with these.
    """

    prompt_column: str | None = None
    delimiter: str | None = None
    max_prompt_chars: int = 10_000
    shard_size: int = 256
    duplicate_ids: Literal["error", "keep-first", "suffix"] = "error"
    images_per_prompt: int = 1
    loras: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        if self.delimiter is not None and (len(self.delimiter) != 1 or self.delimiter in '"\r\n'):
            raise InputError(f"delimiter {self.delimiter!r}: must be one character, no quote and no line end")
        if self.shard_size < 1:
            raise InputError(f"shard size {self.shard_size}: must be at least 1 image")
        if self.duplicate_ids not in ("error", "keep-first", "suffix"):
            raise InputError(f"duplicate ids {self.duplicate_ids!r}: must be error, keep-first or suffix")
        low, high = LIMITS["num_images"]
        if not low <= self.images_per_prompt <= high:
            raise InputError(f"num_images {self.images_per_prompt}: must be from {low} to {high}")


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
    said = asdict(options) | _FORMER_OPTIONS
    del said["loras"]
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
