"""A job with rungs on a real cluster: every image is drawn with them, and the job is not continued with others."""

import json

import pytest
from support.jobs import assert_exactly_once, generate, hashes, write_prompts
from support.tiny_pipelines import tiny_pipeline

from millijoule.jobs.cli import main
from millijoule.workers.layout import JOB_KEY

RUNGS = ("--optimize", "lossless", "--steps", "3", "--guidance-until", "0.4", "--scheduler", "DDIMScheduler")


@pytest.mark.long
def test_a_job_draws_with_the_rungs_it_was_asked_for(tmp_path, ray_address, capsys, monkeypatch):
    prompts = write_prompts(tmp_path / "prompts.txt", 4)
    common = (
        *("--prompts", prompts, "--model", tiny_pipeline("sd15"), "--shard-size", 2),
        *("--device", "cpu", "--workers", 1),
    )
    output = tmp_path / "out"
    done = generate(tmp_path, *common, *RUNGS, "--output", output, ray=ray_address)
    assert done.returncode == 0, done.stderr
    assert_exactly_once(output, 4)
    told = json.loads((output / JOB_KEY).read_text())["model_options"]
    assert told["rungs"]["steps"] == 3
    assert told["rungs"]["guidance_until"] == 0.4
    finished = hashes(output)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    more = ("--steps", "4", "--output", output, "--ray-address", ray_address)
    # in this process, which has imported diffusers: no worker is started for it
    assert main(["generate", *map(str, (*common, *RUNGS, *more))]) == 1
    assert "another job" in capsys.readouterr().err
    assert hashes(output) == finished
