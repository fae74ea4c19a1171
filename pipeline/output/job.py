"""A job in its output folder: `job.json` (what was asked, once for all) and epochs (who works on it).

`job.json` is created exclusively after the plan is complete, so it either does not exist or names a whole plan. Later
runs with the same inputs and options continue it; anything else is refused with the differences named. It is never replaced:
docs/commit-protocol.md says why. The run of the highest
epoch is the one that works on the job: it supersedes all others (`pipeline.output.other_runs`, `workers.fence`).
"""

from __future__ import annotations

import getpass
import json
import os
import re
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from millijoule.workers.counted import counted
from millijoule.workers.errors import AlreadyExistsError, InputError, NotFoundError, SupersededError
from millijoule.workers.images.formats import ImageFormatName
from millijoule.workers.layout import (
    BAD_ROWS_KEY,
    COMMITS_PREFIX,
    DATA_PREFIX,
    ENERGY_PREFIX,
    EPOCHS_PREFIX,
    JOB_KEY,
    PARTS_PREFIX,
    WORKERS_PREFIX,
    epoch_key,
)
from millijoule.workers.records import decode, encode
from millijoule.workers.storage.protocol import Store
from millijoule.workers.visible_text import visible


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
    model_options: dict[str, Any] = field(default_factory=dict)  # `GeneratorOptions.identity`
    image_format: ImageFormatName = "png"
    image_quality: int | None = None
    model_revision: str | None = None  # commit of the hub's repository


#: Options whose change makes another job, with the words a user knows them by.
_IDENTITY = {
    "model_sha256": "--model",
    "job_seed": "--seed",
    "images_per_prompt": "--images-per-prompt",
    "output_format": "--format",
    "image_format": "--image-format",
    "image_quality": "--quality",
    "shard_size": "--shard-size",
    "duplicate_ids": "--duplicate-ids",
}


def read_job(store: Store) -> JobSpec | None:
    """The job in this output, or None where there is none; raises InputError where it cannot be read."""
    try:
        job = decode(JobSpec, store.get(JOB_KEY))
        if not job.fingerprint.isalnum():  # names of objects begin with it
            raise ValueError(f"its fingerprint is {job.fingerprint!r:.100}")
        return job
    except NotFoundError:
        return None
    except ValueError as error:
        raise InputError(f"{store.url}/{JOB_KEY}: not a job description: {error}") from error


def require_job(store: Store) -> JobSpec:
    """The job in this output; raises InputError where there is none."""
    job = read_job(store)
    if job is None:
        raise InputError(f"{store.url}: no job here (it has no {JOB_KEY})")
    return job


def check_same_job(existing: JobSpec, fingerprint: str, asked: dict[str, Any], store: Store) -> None:
    """Refuse to mix two jobs in one output; `asked` are the fields of `JobSpec` that tell jobs apart, and the model's name.

    Raises:
        InputError: the fingerprints differ; the message names the options that changed, or the input, and what to do.
    """
    if existing.fingerprint == fingerprint:
        return
    changed = [
        f"{option} was {getattr(existing, name)!r}, now {asked[name]!r}"
        for name, option in _IDENTITY.items()
        if getattr(existing, name) != asked[name]
    ]
    was, now = _as_given(existing.model_options), _as_given(asked["model_options"])
    changed += [
        f"{_OF_POOLS.get(name, '--' + name.replace('_', '-'))} was {was.get(name, 'the default')}, now {now.get(name, 'the default')}"
        for name in sorted(was.keys() | now.keys())
        if was.get(name) != now.get(name)
    ]
    if existing.model_sha256 != asked["model_sha256"]:
        changed[0] = f"--model was {existing.model}, now {asked['model']}"
        if existing.model == asked["model"]:
            changed[0] = (
                f"the weights of --model {existing.model} were {existing.model_name}, SHA-256 {existing.model_sha256[:12]}, "
                f"now they are {asked['model_name']}, SHA-256 {asked['model_sha256'][:12]}: to continue, give the former "
                "as a file, with a version of millijoule that reads it"
            )
    what = "; ".join(changed) or "the prompt files' content or column options changed"
    raise InputError(
        f"{store.url}: this folder holds another job ({what}). Give the same inputs and options to continue it, "
        f"or another --output{_clearing(store)}"
    )


def _clearing(store: Store) -> str:
    """How to make room for another job, in words, where this one has not made anything; else nothing."""
    if any(True for prefix in (COMMITS_PREFIX, PARTS_PREFIX) for _ in store.list(prefix)):
        return ""
    there = [p for p in ("_job/", DATA_PREFIX, ENERGY_PREFIX) if any(True for _ in store.list(p))]
    there += [BAD_ROWS_KEY] if store.exists(BAD_ROWS_KEY) else []
    workers = sum(1 for _ in store.list(WORKERS_PREFIX))
    lost = f", and loses the record of the energy that {counted(workers, 'worker')} used" if workers else ""
    return (
        f". Nothing of it is committed: where no run is at work on it, deleting {' and '.join(there)} there makes room "
        f"for this one{lost}"
    )


def publish_job(store: Store, job: JobSpec) -> JobSpec:
    """Create `job.json`, or accept the one a simultaneous driver created for the same job.

    Raises:
        InputError: another job was put there meanwhile.
    """
    try:
        store.put_exclusive(JOB_KEY, encode(job, indent=2))
        return job
    except AlreadyExistsError:
        existing = require_job(store)
        check_same_job(existing, job.fingerprint, asdict(job), store)
        return existing


@dataclass(frozen=True)
class Epoch:
    """One driver's run of a job: who runs it, and which attempt it is for whoever started it. None: not said.

    `attempt` counts from 1, as `attempt_source` (a variable of the environment) says. `submission_id` is Ray's of the submitted job,
    `cluster` the name that KubeRay gives the cluster: a RayJob that is retried has new ones. `series` names all attempts of one
    submission alike.
    """

    host: str
    pid: int
    user: str
    started_unix: float
    ray_job_id: str | None = None
    attempt: int | None = None
    attempt_source: str | None = None
    submission_id: str | None = None
    cluster: str | None = None
    series: str | None = None

    def __str__(self) -> str:
        began = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(self.started_unix))
        also = [f"submission {self.submission_id}"] if self.submission_id else []
        also += [self.series] if self.series else []
        return visible(
            ", ".join([f"on {self.host}, process {self.pid} of {self.user}", *also, f"started {began}"])
        )


#: Variables in which a scheduler, or whoever wraps the command, says how often it has started it, and what its first value is.
ATTEMPT_VARIABLES = {"MILLIJOULE_ATTEMPT": 1, "SLURM_RESTART_COUNT": 0}
MAX_ATTEMPT_DIGITS = 9
#: What whoever wraps the command calls all attempts of one submission.
SERIES_VARIABLE = "MILLIJOULE_SERIES"
MAX_SERIES_CHARS = 200
#: KubeRay makes submission id and cluster of a RayJob's attempt of its name and five characters each.
_OF_RAYJOB = re.compile(r"(?P<name>.+?)(-raycluster)?-[a-z0-9]{5}")
#: Where Ray hands a submitted job's description to its driver.
_RAY_JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"


def this_epoch(environ: Mapping[str, str]) -> Epoch:
    """This process, as a driver. Of words that are no UTF-8 the bytes are written as `\\udcff`.

    Raises:
        InputError: a variable that says which attempt this is, or of which series, does not say it. Passing over it would decide
            whether this run may take the job from another one.
    """
    environ = {name: _writable(value) for name, value in environ.items()}
    attempt, source = _attempt(environ)
    try:
        submission_id = json.loads(environ.get(_RAY_JOB_CONFIG, ""))["metadata"]["job_submission_id"]
    except (ValueError, LookupError, TypeError):  # not submitted
        submission_id = None
    submission_id = submission_id if isinstance(submission_id, str) else None
    cluster = environ.get("RAY_CLUSTER_NAME")
    return Epoch(
        socket.gethostname(),
        os.getpid(),
        _user(),
        time.time(),
        environ.get("RAY_JOB_ID"),
        attempt,
        source,
        submission_id,
        cluster,
        _series(environ, submission_id, cluster),
    )


def _attempt(environ: Mapping[str, str]) -> tuple[int | None, str | None]:
    """The number of this attempt, from 1, and the variable that says so."""
    for name, first in ATTEMPT_VARIABLES.items():
        if not (text := environ.get(name, "").strip()):  # empty is not set
            continue
        if not text.isdecimal() or len(text) > MAX_ATTEMPT_DIGITS or int(text) < first:
            raise InputError(
                f"environment variable {name} is {text[:80]!r}: the number of this attempt, a whole number from {first}; "
                "set it to that, or unset it"
            )
        return int(text) - first + 1, name
    # Slurm counts restarts, and says nothing before the first
    return (1, "SLURM_JOB_ID") if environ.get("SLURM_JOB_ID") else (None, None)


def _series(environ: Mapping[str, str], submission_id: str | None, cluster: str | None) -> str | None:
    if said := environ.get(SERIES_VARIABLE, "").strip():
        if len(said) > MAX_SERIES_CHARS:
            raise InputError(
                f"environment variable {SERIES_VARIABLE} has {len(said)} characters ({said[:40]!r} ...): at most {MAX_SERIES_CHARS}"
            )
        return said
    if slurm := environ.get("SLURM_JOB_ID"):
        return f"Slurm job {slurm}"
    job, own = _OF_RAYJOB.fullmatch(submission_id or ""), _OF_RAYJOB.fullmatch(cluster or "")
    return f"RayJob {job['name']}" if job and own and job["name"] == own["name"] else None


def open_epoch(store: Store, *, exclusive: bool) -> int:
    """Take the next epoch number: one per driver run, recorded with who runs it. It supersedes every earlier run.

    Without exclusive create the number is only as unique as the caller's promise to run one driver at a time.

    Raises:
        SupersededError: see `check_not_superseded`.
    """
    who = this_epoch(os.environ)
    put = store.put_exclusive if exclusive else store.put
    epoch = 0
    while True:
        epoch = max(epoch, last_epoch(store)) + 1
        check_not_superseded(
            store, who
        )  # whoever comes in between has this number, and is seen at the next try
        try:
            put(epoch_key(epoch), encode(who))
            return epoch
        except AlreadyExistsError:
            continue


def check_not_superseded(store: Store, who: Epoch) -> None:
    """Refuse what a scheduler starts again although another submission has taken the job over since.

    Without this two schedulers, each with a retry for every end, would take the job from each other in turn. Whether the other
    run still lives is not asked: it has a scheduler, or a person, of its own.

    Raises:
        SupersededError: an attempt before `who` has opened an epoch, and the last one is another submission's.
    """
    if who.series is None or who.attempt == 1 or not (epochs := read_epochs(store)):
        return
    number, last = list(epochs.items())[-1]
    if last.series != who.series and any(epoch.series == who.series for epoch in epochs.values()):
        raise SupersededError(
            f"{store.url}: run {number} ({last}) has taken this job over from an earlier attempt of {who.series}; attempts after that "
            f"do not take it back by themselves. To do so on purpose, set {SERIES_VARIABLE} to a new word"
        )


def read_epochs(store: Store) -> dict[int, Epoch]:
    """Every driver's run of the job, by its number, in order; what is no such record is passed over."""
    found = {}
    for item in store.list(EPOCHS_PREFIX):
        stem = item.key.removeprefix(EPOCHS_PREFIX).removesuffix(".json")
        if stem.isdigit():
            try:
                found[int(stem)] = decode(Epoch, store.get(item.key))
            except (NotFoundError, ValueError):
                continue
    return dict(sorted(found.items()))


def last_epoch(store: Store) -> int:
    """The number of the driver that started last; 0 where there was none."""
    stems = (item.key.removeprefix(EPOCHS_PREFIX).removesuffix(".json") for item in store.list(EPOCHS_PREFIX))
    return max((int(stem) for stem in stems if stem.isdigit()), default=0)


def _writable(text: str) -> str:
    """`text` as JSON can hold it: a variable's bytes that are no UTF-8 come as halves of pairs."""
    return text.encode("utf-8", "backslashreplace").decode()


def _user() -> str:
    try:
        return _writable(getpass.getuser())
    except (KeyError, OSError):  # a container user without a name
        return str(os.getuid())


#: Of `JobSpec.model_options`, what no option of its own says.
_OF_POOLS = {
    "pool_engines": "engines of --pool",
    "pool_rungs": "optimize= of --pool",
    "pool_cuda_graphs": "CUDA graphs of --pool",
    "pool_fused_modules": "fused modules of --pool",
}


def _as_given(model_options: dict[str, Any]) -> dict[str, str]:
    """`JobSpec.model_options` by the names of the command line's options; files by the beginning of their SHA-256."""
    given = {}
    for name, value in (model_options | model_options.get("rungs", {})).items():
        if name == "loras":
            given["lora"] = " ".join(
                f"{part['name']}={part['weight']:g} ({part['sha256'][:12]})" for part in value
            )
        elif name != "rungs":
            given[name] = value["sha256"][:12] if isinstance(value, dict) else str(value)
    return given
