"""Names of the objects in an output folder. One place, because people and tools rely on them."""

from __future__ import annotations

import re

JOB_KEY = "_job/job.json"
FACTORY_MODEL_KEY = "_job/factory_model.txt"
RATES_KEY = "_job/rates.json"
EPOCHS_PREFIX = "_job/epochs/"
COMMITS_PREFIX = "_job/commits/"
PARTS_PREFIX = "_job/parts/"
COMPACTED_PREFIX = "_job/ledger/"
SEGMENTS_PREFIX = "_job/segments/"
WORKERS_PREFIX = "_job/workers/"
CLOSINGS_PREFIX = "_job/closed/"
NODE_METERS_PREFIX = "_job/node_meters/"
RETRY_PREFIX = "_job/retry-"
MODEL_PREFIX = "_job/model/"
DATA_PREFIX = "data/"
ENERGY_PREFIX = "energy/"
MANIFEST_KEY = "manifest.parquet"
PREVIEW_KEY = "preview.png"
BAD_ROWS_KEY = "bad_rows.parquet"
STATS_KEY = "stats.json"
SUCCESS_KEY = "_SUCCESS"

_COMMIT = re.compile(r"(?:.*/)?(\d+)\.json")
_PART = re.compile(rf"{PARTS_PREFIX}\d\d/(\d+)/[^/]+\.json")
_RETRY_INDEX = re.compile(rf"{RETRY_PREFIX}(\d{{4}})/shards\.parquet")


def epoch_key(epoch: int) -> str:
    """One object per driver that ever worked on the output."""
    return f"{EPOCHS_PREFIX}{epoch:06d}.json"


def plan_part_key(fingerprint: str, part: int) -> str:
    """The rows of shards `part * SHARDS_PER_PART` and following of the plan."""
    return f"_job/plan-{fingerprint[:12]}/part-{part:05d}.parquet"


def plan_index_key(fingerprint: str) -> str:
    """The plan's shard index, which is written last."""
    return f"_job/plan-{fingerprint[:12]}/shards.parquet"


def plan_bad_rows_key(fingerprint: str) -> str:
    """The rows of the prompt files that are not in the plan, with reasons."""
    return f"_job/plan-{fingerprint[:12]}/{BAD_ROWS_KEY}"


def retry_part_key(number: int, part: int) -> str:
    """Part `part` of retry round `number`."""
    return f"{RETRY_PREFIX}{number:04d}/part-{part:05d}.parquet"


def retry_index_key(number: int) -> str:
    """The shard index of a retry round: created exclusively, it is what makes the round exist."""
    return f"{RETRY_PREFIX}{number:04d}/shards.parquet"


def round_of_retry_index_key(key: str) -> int | None:
    """The number of the retry round whose index lies at `key`; None for every other key."""
    match = _RETRY_INDEX.fullmatch(key)
    return int(match[1]) if match else None


def commit_key(shard_id: int) -> str:
    """The commit of `shard_id`, spread over 100 folders by the shard's last two digits."""
    return f"{COMMITS_PREFIX}{shard_id % 100:02d}/{shard_id:08d}.json"


def shard_of_commit_key(key: str) -> int | None:
    """The shard whose commit lies at `key`; None for every other key."""
    match = _COMMIT.fullmatch(key)
    return int(match[1]) if match else None


def parts_prefix(shard_id: int) -> str:
    """Start of the records of a shard's sealed parts."""
    return f"{PARTS_PREFIX}{shard_id % 100:02d}/{shard_id:08d}/"


def part_key(shard_id: int, part_id: str) -> str:
    """The record of a sealed part, unique to its attempt."""
    return f"{parts_prefix(shard_id)}{part_id}.json"


def shard_of_part_key(key: str) -> int | None:
    """The shard whose part's record lies at `key`; None for every other key."""
    match = _PART.fullmatch(key)
    return int(match[1]) if match else None


def worker_key(worker_id: str) -> str:
    """The `WorkerEnvironment` that a worker writes before it loads its model."""
    return f"{WORKERS_PREFIX}{worker_id}.json"


def closing_key(worker_id: str) -> str:
    """The `WorkerClosing` of a worker, written once its account of its devices has ended."""
    return f"{CLOSINGS_PREFIX}{worker_id}.json"


def data_prefix(shard_id: int, attempt_id: str) -> str:
    """Start of every data object of one attempt: no two attempts share it."""
    return f"{DATA_PREFIX}{shard_id:08d}-{attempt_id}"
