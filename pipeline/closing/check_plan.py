"""`check`: do `job.json`, the plan's index and the table of rejected rows say the same of the input?"""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from millijoule.pipeline.output.job import JobSpec
from millijoule.pipeline.planning.plan import load_plan
from millijoule.workers.counted import counted
from millijoule.workers.errors import NotFoundError
from millijoule.workers.layout import BAD_ROWS_KEY, JOB_KEY
from millijoule.workers.storage.protocol import Store


def check_plan(store: Store, job: JobSpec) -> Iterator[str]:
    """Every difference between the counts of a job, its plan and its rejected rows, as a message.

    Raises:
        StoreError: there is no plan, or it cannot be read.
    """
    plan, shards = load_plan(store, job.fingerprint)
    counts = {
        "rows": plan.n_rows,
        "images": plan.n_images,
        "shards": plan.n_shards,
        "bad_rows": plan.n_bad_rows,
    }
    for name, planned in counts.items():
        if (said := getattr(job, name)) != planned:
            yield f"{JOB_KEY}: {name} is {said}, the plan has {planned}"
    listed = {"rows": "n_rows", "images": "n_images"}
    for name, column in listed.items():
        if (found := pc.sum(shards[column]).as_py() or 0) != counts[name]:
            yield f"the plan says {counts[name]} {name}, its shards have {found}"
    if plan.n_bad_rows:
        keys = (plan.bad_rows_key, BAD_ROWS_KEY)
        differences = [text for key in keys for text in _check_bad_rows(store, key, plan.n_bad_rows)]
        yield from differences
        if not differences and store.get(plan.bad_rows_key) != store.get(BAD_ROWS_KEY):
            yield f"{BAD_ROWS_KEY}: not the copy of {plan.bad_rows_key} that a job makes of it"


def _check_bad_rows(store: Store, key: str, planned: int) -> Iterator[str]:
    try:
        with store.open_input(key) as source:
            found = pq.ParquetFile(source).metadata.num_rows
    except NotFoundError:
        yield f"{key}: missing, though {counted(planned, 'input row was', 'input rows were')} rejected"
    except (pa.ArrowException, OSError) as error:
        yield f"{key}: cannot be read as Parquet: {error}"
    else:
        if found != planned:
            yield f"{key}: {counted(found, 'row')}, {counted(planned, 'input row was', 'input rows were')} rejected"
