"""Pipelines of many families on a real cluster, with the default engine, to a bucket."""

import json
import shutil

import pytest
from support.jobs import assert_exactly_once, generate, manifest
from support.tiny_pipelines import SIZES, tiny_pipeline

FAMILIES = [
    "sdxl",
    *(
        pytest.param(family, marks=pytest.mark.slow)
        for family in (
            "sd15",
            "sd3",
            "pixart_sigma",
            "sana",
            "flux",
            "qwen_image",
            "lcm",
            "kandinsky22",
            "z_image",
        )
    ),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_runs_a_whole_job(family, tmp_path, ray_address, moto_s3, s3_env):
    s3_env(moto_s3)
    output = f"s3://{moto_s3.make_bucket('families')}/out"
    folder = shutil.copytree(tiny_pipeline(family), tmp_path / family)
    (folder / "millijoule.json").write_text(json.dumps({"num_inference_steps": 2}))
    texts = ("a red dog", "a blue cat " * 300, "the moon", "a green heart", "an old house", "a tree")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        "".join(json.dumps({"prompt_id": str(i), "prompt": text}) + "\n" for i, text in enumerate(texts))
    )
    side = ("--width", SIZES[family], "--height", SIZES[family])
    model = ("--model", folder, "--shard-size", 3, "--workers", 1, "--device", "cpu", *side)
    done = generate(tmp_path, "--prompts", prompts, "--output", output, *model, ray=ray_address)
    assert done.returncode == 0, done.stderr
    rows = {row["prompt_id"]: row for row in manifest(output)}
    said = {name: row["warnings"] for name, row in rows.items()}
    assert {row["status"] for row in rows.values()} == {"ok"}
    assert "lost are" in said.pop("1")[0]
    assert not any(said.values())
    assert_exactly_once(output, len(rows))
    for noise in ("Loading pipeline", "Token indices", "truncated because CLIP", "deprecated"):
        assert noise not in done.stderr
