"""Names of the objects in an output folder. One place, because people and tools rely on them."""

from __future__ import annotations

JOB_KEY = "_job/job.json"
FACTORY_MODEL_KEY = "_job/factory_model.txt"
EPOCHS_PREFIX = "_job/epochs/"
COMMITS_PREFIX = "_job/commits/"
COMPACTED_PREFIX = "_job/ledger/"
SEGMENTS_PREFIX = "_job/segments/"
WORKERS_PREFIX = "_job/workers/"
CLOSINGS_PREFIX = "_job/closed/"
NODE_METERS_PREFIX = "_job/node_meters/"
DATA_PREFIX = "data/"
ENERGY_PREFIX = "energy/"
MANIFEST_KEY = "manifest.parquet"
PREVIEW_KEY = "preview.png"
BAD_ROWS_KEY = "bad_rows.parquet"
STATS_KEY = "stats.json"
SUCCESS_KEY = "_SUCCESS"


def epoch_key(epoch: int) -> str:
    """One object per driver that ever worked on the output."""
    return f"{EPOCHS_PREFIX}{epoch:06d}.json"


def closing_key(worker_id: str) -> str:
    """The `WorkerClosing` of a worker, written once its account of its devices has ended."""
    return f"{CLOSINGS_PREFIX}{worker_id}.json"
