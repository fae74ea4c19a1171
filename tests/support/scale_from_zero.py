"""How quickly a cluster without nodes makes its first image, is without nodes again, and whether each node it got was needed.

`python -m support.scale_from_zero IMAGES,IMAGES,... RECORD` (in `tests/`): a run of so many images each. Ray's own autoscaler (version 2) starts nodes with a GPU that is
none: real raylets on this machine, so a cloud's time to boot a machine is not in the figures. Nodes are counted by a process that
asks the cluster's head, images by the files there are; no count of the job's own is believed. A run is a cluster of its own.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from support.jobs import assert_exactly_once, energy_rows, generate, write_prompts
from support.node_watch import NodeWatch
from support.scaling_cluster import ScalingCluster

from millijoule.jobs.machine import describe_machine
from millijoule.jobs.measuring.measurement import write_result

SHARD_ROWS, IMAGE_S = 16, 0.05
IDLE_S, MOST_NODES = 10.0, 4
GOAL_FIRST_IMAGE_S, GOAL_AFTER_IDLE_S = 60.0, 30.0


def one_run(folder: Path, images: int) -> dict[str, Any]:
    """A job of `images` on an empty cluster, and the same command again when there is nothing left to do."""
    prompts, output = write_prompts(folder / "prompts.txt", images), folder / "out"
    arguments = ("--prompts", prompts, "--output", output, "--model", "python:support.models:slow")
    arguments += ("--shard-size", SHARD_ROWS, "--workers", f"0:{2 * MOST_NODES}")
    node_type = {"gpu-worker": ({"CPU": 2.0, "GPU": 1.0}, MOST_NODES)}
    with (
        ScalingCluster(node_type, idle_s=IDLE_S) as cluster,
        NodeWatch(cluster.address, output, folder / "nodes") as watch,
    ):
        watch.wait_for_none()
        submitted = time.time()
        done = generate(folder, *arguments, ray=cluster.address)
        ended = time.time()
        assert done.returncode == 0, done.stderr
        watch.wait_for_none()
        samples = watch.samples
        again = generate(folder, *arguments, ray=cluster.address)
        assert again.returncode == 0, again.stderr
        time.sleep(2 * IDLE_S)
        for_nothing = frozenset().union(*(s.nodes for s in watch.samples[len(samples) :]))
    assert_exactly_once(output, images)
    first = min(path.stat().st_mtime for path in (output / "data").iterdir())
    launched = frozenset().union(*(s.nodes for s in samples))
    worked = {row["node_id"] for row in energy_rows(output, "attempt") if row["outcome"] == "committed"}
    return {
        "images": images,
        "load_average": os.getloadavg()[0],
        "seconds_to_first_image": first - submitted,
        "seconds_to_first_node": next(s.unix for s in samples if s.nodes) - submitted,
        "seconds_of_the_job": ended - submitted,
        "seconds_from_its_end_to_no_node": next(s.unix for s in samples if s.unix > ended and not s.nodes)
        - ended,
        "nodes_launched": len(launched),
        "nodes_that_made_images": len(worked & launched),
        "most_nodes_at_once": max(len(s.nodes) for s in samples),
        "nodes_launched_for_a_finished_job": len(for_nothing),
    }


def main(runs: str, record: str) -> None:
    rows = []
    for images in runs.split(","):
        with tempfile.TemporaryDirectory(prefix="mj-zero-") as folder:
            rows.append(one_run(Path(folder), int(images)))
            print(json.dumps(rows[-1]), flush=True)
    result = {
        "what": "scale from zero: fake GPU nodes of Ray's autoscaler, version 2",
        "setting": {
            "images_per_shard": SHARD_ROWS,
            "seconds_per_image": IMAGE_S,
            "idle_timeout_s": IDLE_S,
            "nodes_at_most": MOST_NODES,
        },
        "goal": {
            "seconds_to_first_image": GOAL_FIRST_IMAGE_S,
            "seconds_from_its_end_to_no_node": IDLE_S + GOAL_AFTER_IDLE_S,
            "nodes_launched": "none that makes no image",
        },
        "worst": {
            "seconds_to_first_image": max(r["seconds_to_first_image"] for r in rows),
            "seconds_from_its_end_to_no_node": max(r["seconds_from_its_end_to_no_node"] for r in rows),
            "nodes_without_images": max(r["nodes_launched"] - r["nodes_that_made_images"] for r in rows),
            "nodes_launched_for_a_finished_job": max(r["nodes_launched_for_a_finished_job"] for r in rows),
        },
        "rows": rows,
        "environment": describe_machine(),
    }
    write_result(result, record)


if __name__ == "__main__":
    main(*sys.argv[1:])
