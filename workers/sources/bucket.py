"""Models in a bucket: listed by the driver, fetched once per node into its cache.

What is under `s3://bucket/prefix` is the folder of a pipeline, a model or a LoRA; a key of its own is one file.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from millijoule.workers.errors import InputError, NotFoundError
from millijoule.workers.sources.node_cache import WantedFile, cache_folder, fetch_once, listing_entry
from millijoule.workers.storage.open import open_store, split_s3_url

log = logging.getLogger(__name__)

#: Given the names of all files and a function that reads one: the names of those that are wanted.
Chooser = Callable[[Collection[str], Callable[[str], bytes]], Collection[str]]


@dataclass(frozen=True)
class BucketFiles:
    """Files of a prefix, as they lie in this node's cache under `entry`."""

    folder: Path
    url: str
    entry: str
    names: tuple[str, ...]


def fetch_from_bucket(option: str, url: str, choose: Chooser, cache: str | None) -> BucketFiles:
    """The files that `choose` wants of those under `url`, or the one file that `url` is.

    Raises:
        InputError: there is nothing.
        NodeError: there is no room for it in the cache.
        StoreError: storage failed.
    """
    from millijoule.workers.storage.s3 import S3Settings, shared_bucket  # s3fs takes 0.5 s to import

    name, key = split_s3_url(url)
    bucket = shared_bucket(name, S3Settings.from_environment())
    if key.endswith(".safetensors"):
        above, _, own = key.rpartition("/")
        try:
            head = bucket.head(key)
        except NotFoundError as error:
            raise InputError(f"{option} {url}: there is no such object") from error
        listed = {own: (int(head["ContentLength"]), str(head["ETag"]))}
        root, chosen = f"s3://{name}/{above}".rstrip("/"), [own]
    else:
        start = f"{key}/" if key else ""
        found = {o["Key"][len(start) :]: o for o in bucket.list_objects(start) if not o["Key"].endswith("/")}
        if not found:
            raise InputError(f"{option} {url}: there is nothing under that prefix")
        listed = {n: (int(o["Size"]), str(o["ETag"])) for n, o in found.items()}
        root = f"s3://{name}/{key}".rstrip("/")
        chosen = sorted(choose(list(listed), lambda n: bucket.get(start + n)))
    entry = listing_entry(root, [(n, *listed[n]) for n in chosen])
    wanted = [WantedFile(n, listed[n][0]) for n in chosen]
    folder = fetch_once(cache_folder(cache), entry, wanted, open_store(root))
    return BucketFiles(folder, root, entry, tuple(chosen))
