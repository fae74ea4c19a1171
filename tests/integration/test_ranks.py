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
    manifest,
    start,
    wait_for_commits,
    write_prompts,
)
from support.nodes import SteadyNode
from support.tiny_pipelines import tiny_pipeline

from millijoule.workers.diffusion.families import LEVELS, PIXELS
from millijoule.workers.diffusion.generator import DiffusersGenerator
from millijoule.workers.generators.options import GeneratorOptions
from millijoule.workers.schemas import ImageRequest

pytest.importorskip("diffusers")

PROMPTS, STEPS = 16, 2


def pictures(output):
    """Pixels by prompt id."""
    rows = [
        r for path in {r["path"] for r in manifest(output)} for r in pq.read_table(output / path).to_pylist()
    ]
    return {
        r["prompt_id"]: np.asarray(Image.open(io.BytesIO(r["image"])).convert("RGB")).astype(int)
        for r in rows
    }


def ranks_at_work():
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if "millijoule.workers.ranks.rank_main" in (process.info["cmdline"] or ()):
            found.append(process)
    return found


def test_a_rank_killed_in_a_batch_costs_no_row_and_the_images_are_those_of_one_rank(tmp_path, ray_address):
    arguments = (
        *("--prompts", write_prompts(tmp_path / "prompts.txt", PROMPTS), "--model", tiny_pipeline("sd15")),
        *("--shard-size", 2, "--steps", STEPS, "--device", "cpu", "--cpus-per-worker", 2, "--workers", 1),
    )
    out = tmp_path / "out"
    with SteadyNode(tmp_path) as node:
        driver = start(
            tmp_path, *arguments, "--ranks-per-worker", 2, "--output", out, ray=ray_address, **node.env
        )
        wait_for_commits(out, 1, 180.0)
        (rank,) = ranks_at_work()
        os.kill(rank.pid, signal.SIGKILL)
        assert driver.wait(240) == 0, (tmp_path / "driver.log").read_text()
        log = (tmp_path / "driver.log").read_text()
    assert "rank 1 of 2 has ended (SIGKILL)" in log
    assert_exactly_once(out, PROMPTS)
    assert {row["status"] for row in manifest(out)} == {"ok"}
    assert_books_close(out)
    alone = DiffusersGenerator.load(tiny_pipeline("sd15"), options=GeneratorOptions(engine="eager"))
    drawn = pictures(out)
    for row in manifest(out):
        asked = ImageRequest(row["prompt_id"], 0, row["prompt"], seed=row["seed"], num_inference_steps=STEPS)
        difference = np.abs(drawn[row["prompt_id"]] - alone.generate([asked]).images[0])
        assert difference.max() <= LEVELS
        assert (difference > 0).mean() <= PIXELS
    deadline = time.monotonic() + 20
    while ranks_at_work() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert ranks_at_work() == []
