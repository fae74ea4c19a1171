"""A job in its output folder: `job.json` (what was asked, once for all) and epochs (who works on it).

`job.json` is created exclusively after the plan is complete, so it either does not exist or names a whole plan. Later
runs with the same inputs and options continue it; anything else is refused with the differences named.
"""

from __future__ import annotations

import dataclasses
import getpass
import json
import os
import socket
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

from millijoule.workers.errors import AlreadyExistsError, InputError, NotFoundError
from millijoule.workers.layout import EPOCHS_PREFIX, JOB_KEY, epoch_key
from millijoule.workers.storage.protocol import Store


@dataclass(frozen=True)
class JobSpec:
    """Everything that decides which images a job makes and how they are stored.

    `shard_size` is images per shard. `images_per_prompt` multiplies rows that do not say a number themselves.
    """

    fingerprint: str
    model: str
    model_name: str
    model_sha256: str
    job_seed: int
    images_per_prompt: int
    output_format: str
    shard_size: int
    duplicate_ids: str
    prompts: tuple[str, ...]
    rows: int
    images: int
    shards: int
    bad_rows: int
    created_unix: float
    millijoule_version: str
    schema_version: int = 1

    @staticmethod
    def from_json(data: bytes, where: str) -> JobSpec:
        """Parse job.json; raises InputError naming `where` if it is not one."""
        try:
            raw = json.loads(data)
            names = {f.name for f in dataclasses.fields(JobSpec)}
            raw["prompts"] = tuple(raw["prompts"])
            return JobSpec(**{k: v for k, v in raw.items() if k in names})
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"{where}: not a job description: {error}") from error

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=2, sort_keys=True).encode() + b"\n"


#: Options whose change makes another job, with the words a user knows them by.
_IDENTITY = {
    "model_sha256": "--model",
    "job_seed": "--seed",
    "images_per_prompt": "--images-per-prompt",
    "output_format": "--format",
    "shard_size": "--shard-size",
    "duplicate_ids": "--duplicate-ids",
}


def read_job(store: Store) -> JobSpec | None:
    """The job in this output, or None where there is none."""
    try:
        return JobSpec.from_json(store.get(JOB_KEY), f"{store.url}/{JOB_KEY}")
    except NotFoundError:
        return None


def require_job(store: Store) -> JobSpec:
    """The job in this output; raises InputError where there is none."""
    job = read_job(store)
    if job is None:
        raise InputError(f"{store.url}: no job here (it has no {JOB_KEY})")
    return job


def check_same_job(existing: JobSpec, fingerprint: str, asked: dict[str, Any], url: str) -> None:
    """Refuse to mix two jobs in one output.

    Raises:
        InputError: the fingerprints differ; the message names the options that changed, or the input.
    """
    if existing.fingerprint == fingerprint:
        return
    changed = [
        f"{option} was {getattr(existing, name)!r}, now {asked[name]!r}"
        for name, option in _IDENTITY.items()
        if name in asked and getattr(existing, name) != asked[name]
    ]
    if existing.model_sha256 != asked.get(
        "model_sha256", existing.model_sha256
    ) and existing.model != asked.get("model", existing.model):
        changed[0] = f"--model was {existing.model}, now {asked['model']}"
    what = "; ".join(changed) or "the prompt files' content or column options changed"
    raise InputError(
        f"{url}: this folder holds another job ({what}). Give the same inputs and options to continue it, "
        "or another --output"
    )


def publish_job(store: Store, job: JobSpec) -> JobSpec:
    """Create `job.json`, or accept the one a simultaneous driver created for the same job.

    Raises:
        InputError: another job was put there meanwhile.
    """
    try:
        store.put_exclusive(JOB_KEY, job.to_json())
        return job
    except AlreadyExistsError:
        existing = require_job(store)
        check_same_job(existing, job.fingerprint, asdict(job), store.url)
        return existing


def open_epoch(store: Store, *, exclusive: bool) -> int:
    """Take the next epoch number: one per driver run, recorded with who runs it.

    Without exclusive create the number is only as unique as the caller's promise to run one driver at a time.
    """
    who = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "user": _user(),
        "started_unix": time.time(),
        "ray_job_id": os.environ.get("RAY_JOB_ID"),
    }
    body = json.dumps(who, sort_keys=True).encode()
    taken = [int(name) for item in store.list(EPOCHS_PREFIX) if (name := _stem(item.key)).isdigit()]
    epoch = max(taken, default=0) + 1
    while True:
        try:
            if exclusive:
                store.put_exclusive(epoch_key(epoch), body)
            else:
                store.put(epoch_key(epoch), body)
            return epoch
        except AlreadyExistsError:
            epoch += 1


def software_version() -> str:
    return version("millijoule")


def _stem(key: str) -> str:
    return key.rsplit("/", 1)[-1].removesuffix(".json")


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container user without a name
        return str(os.getuid())
