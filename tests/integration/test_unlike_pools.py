"""A GPU and a processor in one job on a real Ray cluster: who draws what and how, what each pool uses, and who ends when.

The oracles are the model's own notes of its calls and the stand-in counters on which it spends; the output's files say the rest.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pyarrow.parquet as pq
import pytest
from support import boards
from support.cluster import RayCluster
from support.jobs import assert_exactly_once, energy_rows, generate, manifest, write_prompts
from support.tiny_pipelines import tiny_pipeline
from support.unlike_model import MJ, calls_of, make_processor

from millijoule.jobs.options.model import ModelOptions
from millijoule.jobs.set_up.options import GenerateOptions
from millijoule.jobs.set_up.request import request_of
from millijoule.pipeline.sql.query import open_tables, run_query
from millijoule.workers.generators.registry import load_generator
from millijoule.workers.storage.open import open_store

GPU_POOL = "gpu:class=gpu:workers=1:gpus=1:cpus=1:batch=6:price=3.6"
CPU_POOL = "cpu:class=cpu:workers=1:cpus=2:batch=2:price=0.36"
POOL_OF = {"cuda": "gpu", "cpu": "cpu"}


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    """Folders of the counters of two hosts."""
    folder = tmp_path_factory.mktemp("hosts")
    boards.make_boards(folder / "gpu", 1)
    make_processor(folder / "cpu")
    return folder


@pytest.fixture(scope="module")
def cluster(hosts):
    with RayCluster(head_cpus=0) as made:
        made.add_node(1, 1, labels={"class": "gpu"}, env={"MILLIJOULE_TEST_BOARDS": str(hosts / "gpu")})
        made.add_node(2, labels={"class": "cpu"}, env={"MILLIJOULE_TEST_BOARDS": str(hosts / "cpu")})
        yield made


def run(cluster, tmp_path, images, shard_size, *more, **env):
    prompts, output = write_prompts(tmp_path / "p.txt", images), tmp_path / "out"
    job = ("--prompts", prompts, "--output", output, "--shard-size", shard_size, *more)
    path = f"{boards.SITE}:{boards.TESTS}"
    done = generate(tmp_path, *job, ray=cluster.address, PYTHONPATH=path, **env)
    assert done.returncode == 0, done.stderr
    assert_exactly_once(output, images)
    return output


def drawn_by_pool(folder):
    """Images that each pool's device was asked for."""
    counts = Counter()
    for call in calls_of(folder):
        counts[POOL_OF[call["device"]]] += len(call["ids"])
    return counts


def assert_pools_are_told_apart(output, folder, images):
    """Every image is of the pool whose device drew it, and every joule of the counter on which it was spent."""
    drawn = drawn_by_pool(folder)
    assert drawn.total() == images, "nothing was drawn twice"
    workers = {row["worker_id"]: row for row in energy_rows(output, "env")}
    used, ever = Counter(), Counter()
    for s in energy_rows(output, "segment"):
        pool = workers[s["worker_id"]]["pool"]
        ever[pool] += s["energy_mj"]
        used[pool] += s["energy_mj"] if s["segment_class"] == "shard" else 0
    pools = json.loads((output / "stats.json").read_text())["pools"]
    assert {name: pool["images_ok"] for name, pool in pools.items()} == drawn
    assert {name: pool["shard_mj"] for name, pool in pools.items()} == used
    # a board uses a millijoule with each reading, a processor and its memory one now and then; a board's counter is not read more
    # often than it moves, so that a short shard and the pause beside it lend each other a little
    for device, pool in POOL_OF.items():
        spent = drawn[pool] * MJ[device]
        assert spent <= ever[pool] < 1.1 * spent
        assert used[pool] == pytest.approx(spent, rel=0.1)
    with open_tables([open_store(str(output))]) as connection:
        rows = run_query(connection, "energy_per_pool", {}).to_pylist()
    assert {row["pool"]: row["energy_mj"] for row in rows} == used
    for row in rows:
        price = {"gpu": 3.6, "cpu": 0.36}[row["pool"]]
        assert row["device_cost"] == pytest.approx(row["device_seconds"] * price / 3600)
        assert row["device_cost"] == pytest.approx(pools[row["pool"]]["device_cost"], rel=1e-3)
    return pools


@pytest.mark.long
def test_a_gpu_and_a_processor_share_a_job_and_their_batches_images_and_joules_are_told_apart(
    cluster, tmp_path
):
    model = ("--model", "python:support.unlike_model:load", "--pool", GPU_POOL, CPU_POOL)
    output = run(cluster, tmp_path, 480, 8, *model, "--prefer", "speed")
    assert_pools_are_told_apart(output, tmp_path, 480)
    batches = {
        device: max(len(c["ids"]) for c in calls_of(tmp_path) if c["device"] == device) for device in MJ
    }
    assert batches == {"cuda": 6, "cpu": 2}
    stated = {row["pool"]: row for row in energy_rows(output, "env")}
    assert {name: (row["batch_size"], row["cpu_threads"]) for name, row in stated.items()} == {
        "gpu": (6, 1),
        "cpu": (2, 2),
    }
    # the processor took no shard that others would have waited for
    ended = dict.fromkeys(stated, 0)
    for row in energy_rows(output, "attempt"):
        pool = next(s["pool"] for s in stated.values() if s["worker_id"] == row["worker_id"])
        ended[pool] = max(ended[pool], row["t_end_wall_ns"])
    assert ended["cpu"] - ended["gpu"] < 8 * 0.3e9 / 2


@pytest.mark.slow
def test_a_slow_device_makes_pieces_of_shards_and_the_quick_one_the_rest(cluster, tmp_path):
    """A shard takes the processor 96 s and the GPU five: it gives back what it has not made after a minute."""
    model = ("--model", "python:support.unlike_model:load", "--pool", GPU_POOL, CPU_POOL)
    seconds = {"MILLIJOULE_TEST_SECONDS": "0.05 1.0"}
    output = run(cluster, tmp_path, 96 * 20, 96, *model, "--prefer", "speed", **seconds)
    pools = assert_pools_are_told_apart(output, tmp_path, 96 * 20)
    assert pools["cpu"]["images_ok"] >= 40
    by_cpu = {i for call in calls_of(tmp_path) if call["device"] == "cpu" for i in call["ids"]}
    committer = {
        row["shard_id"]: row["worker_id"]
        for row in energy_rows(output, "attempt")
        if row["outcome"] == "committed"
    }
    (gpu,) = (row["worker_id"] for row in energy_rows(output, "env") if row["pool"] == "gpu")
    shard_of = {row["prompt_id"]: row["shard_id"] for row in energy_rows(output, "image")}
    assert any(committer[shard_of[i]] == gpu for i in by_cpu), "the GPU ended none of the processor's shards"


@pytest.mark.slow
def test_engines_and_presets_of_pools_are_what_their_workers_loaded(cluster, tmp_path):
    """Two pools of processors that load a tiny pipeline in different ways; the job is long enough for both to be ready."""
    family = tiny_pipeline("sd15")
    pools = (
        "plain:class=cpu:workers=1:cpus=1:engine=eager",
        "half:class=cpu:workers=1:cpus=1:batch=2:optimize=lossless",
    )
    more = ("--model", family, "--pool", *pools, "--prefer", "speed", "--steps", 2)
    output = run(cluster, tmp_path, 600, 2, *more)
    stated = {row["pool"]: row for row in energy_rows(output, "env")}
    assert stated["plain"]["engine"] == "eager"
    assert stated["half"]["engine"] == "deepspeed"
    assert stated["half"]["batch_size"] == 2
    assert stated["plain"]["rungs"] == "--steps 2"
    assert stated["half"]["rungs"] == "--precision half --channels-last --steps 2"
    job = json.loads((output / "_job" / "job.json").read_text())
    assert job["model_options"]["pool_engines"] == ["deepspeed", "eager"]
    assert len(job["model_options"]["pool_rungs"]) == 2
    assert len(manifest(output)) == 600
    assert pq.ParquetFile(output / "manifest.parquet").metadata.num_rows == 600


@pytest.mark.long
def test_generators_state_the_engine_and_the_rungs_that_their_pool_asked_for(tmp_path):
    """The same two pools, loaded in this process as their workers would."""
    prompts, family = write_prompts(tmp_path / "p.txt", 1), tiny_pipeline("sd15")
    pools = (
        "plain:class=cpu:workers=1:cpus=1:engine=eager",
        "half:class=cpu:workers=1:cpus=1:batch=2:optimize=lossless",
    )
    options = GenerateOptions(
        prompts=(str(prompts),), output=str(tmp_path / "out"), model=str(family), pool=pools
    )
    request = request_of(replace(options, model_options=ModelOptions(steps=2)))
    plain, half = (load_generator(request.source.model, device="cpu", options=p.model) for p in request.pools)
    assert (plain.engine_name, plain.rungs_words) == ("eager", "--steps 2")
    assert (half.engine_name, half.rungs_words) == (
        "deepspeed",
        "--precision half --channels-last --steps 2",
    )
    assert half.info.batch_size == 2
    assert request.model_identity()["pool_engines"] == ["deepspeed", "eager"]
