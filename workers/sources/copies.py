"""How a worker comes to the very files that the driver looked at: where they lie on its own node, else from storage.

The driver settles once what a model is; a `ModelCopy` says it to workers. No worker asks a hub, and none lists a bucket.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from millijoule.workers.errors import NodeError
from millijoule.workers.generators.file_hashes import file_sha256
from millijoule.workers.generators.options import GeneratorOptions
from millijoule.workers.layout import MODEL_PREFIX
from millijoule.workers.sources.node_cache import WantedFile, cache_folder, content_entry, fetch_once
from millijoule.workers.storage.open import open_store
from millijoule.workers.storage.protocol import Store


@dataclass(frozen=True)
class ModelCopy:
    """Files that belong together, and where they can be had.

    Attributes:
        path: the folder in which the driver has them; what a job's options name lies in it.
        files: all of them, with hashes.
        url: of a folder or prefix with the same files under the same names; empty: there is none.
        entry: the name of the files in a node's cache; empty: by their content.
        cache: the folder of that cache; None: each node's own.
    """

    path: str
    files: tuple[WantedFile, ...]
    url: str = ""
    entry: str = ""
    cache: str | None = None


def copy_key(files: Sequence[WantedFile]) -> str:
    """The prefix of a job's output under which the driver puts files for nodes that do not see them."""
    return f"{MODEL_PREFIX}{content_entry(files)}"


def put_copy(store: Store, copy: ModelCopy) -> ModelCopy:
    """Put the files into the job's own `store`, those that an earlier run of the job did not; and say that they are there.

    Raises:
        StoreError: storage failed.
    """
    prefix = copy_key(copy.files)
    there = {item.key: item.size_bytes for item in store.list(f"{prefix}/")}
    for file in copy.files:
        key = f"{prefix}/{file.name}"
        if there.get(key) != file.size_bytes:
            # the file itself, where a cache has links to it
            store.put_file(key, Path(os.path.realpath(Path(copy.path, file.name))))
    return replace(copy, url=f"{store.url}/{prefix}")


def at_hand(
    model: str,
    options: GeneratorOptions,
    copies: Sequence[ModelCopy],
    on_part: Callable[[], None] = lambda: None,
) -> tuple[str, GeneratorOptions]:
    """`model` and `options` as this node has the files they name.

    Raises:
        NodeError: it neither sees them nor can fetch them.
        StoreError: storage failed.
    """
    places = {copy.path: str(_folder_here(copy, on_part)) for copy in copies}

    def here(path: str) -> str:
        for before, now in places.items():
            if path == before or path.startswith(f"{before}/"):
                return now + path[len(before) :]
        return path

    loras = tuple(replace(choice, path=here(choice.path)) for choice in options.loras)
    vae = options.vae and replace(options.vae, path=here(options.vae.path))
    config = options.config and here(options.config)
    return here(model), replace(options, loras=loras, vae=vae, config=config)


def _folder_here(copy: ModelCopy, on_part: Callable[[], None]) -> Path:
    if all(_is_here(Path(copy.path, file.name), file) for file in copy.files):
        return Path(copy.path)
    if not copy.url:
        raise NodeError(
            f"{copy.path}: this node does not have the files that the job was planned with there; put the same files "
            "on every node, or give the model as s3://bucket/prefix or by its hub id"
        )
    store = open_store(copy.url, patient=True)
    entry = copy.entry or content_entry(copy.files)
    return fetch_once(cache_folder(copy.cache), entry, copy.files, store, on_part)


def _is_here(path: Path, file: WantedFile) -> bool:
    try:
        return path.stat().st_size == file.size_bytes and file_sha256(path) == file.sha256
    except OSError:
        return False
