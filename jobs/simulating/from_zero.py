"""`python -m millijoule.jobs.simulating.from_zero RESULT.json [BEFORE.json]`: nodes and time of jobs that begin without a node.

The driver on simulated nodes of one kind, which come as they are asked for: how long a job takes and how many nodes it launches,
beside the same job that asks for a node per shard at once. `BEFORE.json` are the rows of another tree (`... rows`), taken along.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from millijoule.jobs.entry import USAGE, check_writable
from millijoule.jobs.machine import describe_machine
from millijoule.jobs.measuring.measurement import write_result
from millijoule.jobs.simulating.devices import DeviceKind, Fleet
from millijoule.jobs.simulating.job import made_up_plan, run_job
from millijoule.pipeline.running.demand import PoolOptions
from millijoule.workers.errors import InputError

SHARDS = (1, 3, 20, 1000)
#: Seconds from a request to a worker that is ready, of which the last two load the model.
STARTS_S, LOAD_S = (5.0, 30.0, 300.0), 2.0
SHARD_S, SHARD_IMAGES = (1.0, 60.0), 100
MOST_NODES = 1000


def one(shards: int, start_s: float, shard_s: float, at_once: int | None) -> dict[str, Any]:
    """One job; `at_once` 0: nodes as far as work is worth them, None: one for each shard."""
    kind = DeviceKind("K", SHARD_IMAGES / shard_s, 100.0, 20.0, load_s=LOAD_S, boot_s=start_s - LOAD_S)
    fleet = Fleet({"k": (kind, min(MOST_NODES, shards))}, 1)
    worked: set[str] = set()

    def look(job_run: Any) -> None:
        worked.update(w.node.node_id for w in job_run.pool.workers.values() if w.held)

    options = PoolOptions(0, MOST_NODES, gpus_per_worker=1.0, at_once=at_once)
    outcome = run_job(
        made_up_plan(shards, SHARD_IMAGES), fleet, options=options, close_books=False, on_tick=look
    )
    launched = {node.node_id for node in fleet.nodes if node.held_s > 0}
    return {
        "shards": shards,
        "start_s": start_s,
        "shard_s": shard_s,
        "all_at_once": at_once is None,
        "complete": outcome.complete,
        "makespan_s": round(outcome.makespan_s, 1),
        "nodes_launched": len(launched),
        "nodes_without_work": len(launched - worked),
        "node_hours": round(sum(node.held_s for node in fleet.nodes) / 3600, 2),
    }


def rows(strategies: tuple[int | None, ...]) -> list[dict[str, Any]]:
    return [
        one(shards, start_s, shard_s, at_once)
        for at_once in strategies
        for shards in SHARDS
        for start_s in STARTS_S
        for shard_s in SHARD_S
    ]


def rows_in(path: Path) -> Any:
    """What `... rows` printed; raises InputError."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path}: not rows of another tree: {error}") from error


def main(result: str, before: str | None = None) -> None:
    """Write `result`; of its name alone, "rows", print those of this tree's rule."""
    if result == "rows":
        machine = describe_machine()
        print(json.dumps({"environment": machine, "rows": rows((0,))}))
        return
    earlier = None if before is None else rows_in(Path(before))
    check_writable(
        Path(result).parent, "the folder of RESULT.json:"
    )  # before anything is done that takes minutes
    found = {
        "what": "jobs that begin without a node, simulated: the driver on nodes that come as they are asked for",
        "load_average": os.getloadavg()[0],
        "rows": rows((0, None)),
        "environment": describe_machine(),
    }
    if earlier is not None:
        found["before"] = earlier
    write_result(found, result)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        print(
            "usage: python -m millijoule.jobs.simulating.from_zero RESULT.json [BEFORE.json]", file=sys.stderr
        )
        sys.exit(USAGE)
    try:
        main(*sys.argv[1:])
    except (InputError, OSError) as error:
        sys.exit(f"from_zero: {error}")
