"""A job whose worker is two processes, under a real Ray: what one rank draws, and one of them killed in the middle."""

import io
import os
import signal
import time

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support.jobs import (
    assert_books_close,
    assert_exactly_once,
    generate,
    manifest,
    start,
    wait_for_commits,
    write_prompts,
)
from support.nodes import SteadyNode
from support.tiny_pipelines import tiny_pipeline

from millijoule.workers.diffusion.families import LEVELS, PIXELS

pytest.importorskip("diffusers")

PROMPTS = 16


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    prompts = write_prompts(tmp_path_factory.mktemp("ranks") / "prompts.txt", PROMPTS)
    return (
        *("--prompts", prompts, "--model", tiny_pipeline("sd15"), "--shard-size", 2, "--steps", 2),
        *("--device", "cpu", "--cpus-per-worker", 2, "--workers", 1, "--engine", "eager"),
    )


def pictures(output):
    """Pixels by prompt id."""
    rows = [
        r for path in {r["path"] for r in manifest(output)} for r in pq.read_table(output / path).to_pylist()
    ]
    return {r["prompt_id"]: np.asarray(Image.open(io.BytesIO(r["image"]))).astype(int) for r in rows}


def ranks_at_work():
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if "millijoule.workers.ranks.rank_main" in (process.info["cmdline"] or ()):
            found.append(process)
    return found


def test_a_rank_killed_in_a_batch_costs_no_row_and_the_images_are_those_of_one_rank(
    tmp_path, ray_address, arguments
):
    alone = generate(tmp_path, *arguments, "--output", tmp_path / "alone", ray=ray_address)
    assert alone.returncode == 0, alone.stderr
    out = tmp_path / "out"
    with SteadyNode(tmp_path) as node:
        driver = start(
            tmp_path, *arguments, "--ranks-per-worker", 2, "--output", out, ray=ray_address, **node.env
        )
        wait_for_commits(out, 1, 180.0)
        (rank,) = ranks_at_work()
        os.kill(rank.pid, signal.SIGKILL)
        killed = time.monotonic()
        assert driver.wait(240) == 0, (tmp_path / "driver.log").read_text()
        log = (tmp_path / "driver.log").read_text()
    assert "rank 1 of 2 has ended (SIGKILL)" in log
    assert time.monotonic() - killed < 120, "somebody waited for a dead rank"
    assert_exactly_once(out, PROMPTS)
    assert {row["status"] for row in manifest(out)} == {"ok"}
    assert_books_close(out)
    expected, drawn = pictures(tmp_path / "alone"), pictures(out)
    assert expected.keys() == drawn.keys()
    for prompt_id, picture in expected.items():
        difference = np.abs(drawn[prompt_id] - picture)
        assert difference.max() <= LEVELS
        assert (difference > 0).mean() <= PIXELS
    deadline = time.monotonic() + 20
    while ranks_at_work() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert ranks_at_work() == []
