"""Whole jobs with models that are elsewhere: one set of requests of the hub, one fetch from a bucket on a node."""

import json
import shutil
import subprocess

import pytest
from support.jobs import command, environment, manifest
from support.stand_in_hub import StandInHub
from support.tiny_loras import save_lora
from support.tiny_pipelines import tiny_pipeline

from millijoule.workers.storage.open import open_store

pytest.importorskip("peft")

PROMPTS = "".join(
    f'{{"prompt": "a red cat number {i}", "steps": 1, "lora": "{"none" if i % 2 else ""}"}}\n'
    for i in range(12)
)
NOBODY = "http://127.0.0.1:9"


def run(tmp_path, ray, model, *arguments, **driver_env):
    (tmp_path / "prompts.jsonl").write_text(PROMPTS)
    env = environment(tmp_path, HF_ENDPOINT=NOBODY, HF_HOME=str(tmp_path / "workers"), OMP_NUM_THREADS="1")
    env |= {"MILLIJOULE_CACHE": str(tmp_path / "drivers"), **driver_env}  # the driver's alone
    options = ("--prompts", tmp_path / "prompts.jsonl", "--output", tmp_path / "out", "--shard-size", 2)
    workers = (
        "--workers",
        2,
        "--cpus-per-worker",
        0.5,
        "--ray-address",
        ray,
        "--engine",
        "eager",
    )
    done = subprocess.run(
        command(*options, "--model", model, *workers, *arguments),
        env=env,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = manifest(tmp_path / "out")
    assert [r["status"] for r in rows] == ["ok"] * 12
    job = json.loads((tmp_path / "out/_job/job.json").read_text())
    environments = [json.loads(p.read_text()) for p in (tmp_path / "out/_job/workers").iterdir()]
    return job, rows, len(environments)


def test_the_hub_is_asked_once_whatever_the_workers(tmp_path, ray_address):
    lora = save_lora(tiny_pipeline("sd15"), tmp_path / "style.safetensors", 1)
    with StandInHub() as hub:
        made = hub.add("someone/small", tiny_pipeline("sd15"))
        hub.add(
            "someone/style",
            shutil.copytree(
                lora.parent,
                tmp_path / "lora",
                ignore=lambda d, n: [x for x in n if not x.endswith(".safetensors")],
            ),
        )
        env = hub.env(tmp_path / "home")
        job, rows, workers = run(tmp_path, ray_address, "someone/small", "--lora", "someone/style=0.8", **env)
        asked = list(hub.requests)
    assert workers >= 2  # others may have come too late to find work
    assert job["model_revision"] == made.commit
    assert job["model_name"] == f"someone/small@{made.commit[:12]}"
    fetched = [p for m, p, _ in asked if m == "GET" and "/resolve/" in p]
    assert len(fetched) == len(set(fetched))
    listings = [p for m, p, _ in asked if m == "GET" and p.startswith("/api/models/")]
    assert (
        len([p for p in listings if "/tree/" not in p]) == 2
    )  # one question for each of the two repositories
    assert len({r["sha256"] for r in rows}) == 12


def test_a_bucket_is_read_once_on_a_node_whatever_the_workers(
    tmp_path, ray_address, moto_s3, s3_env, fault_proxy
):
    proxy = fault_proxy(moto_s3)
    url = f"s3://{moto_s3.make_bucket('models')}/tiny"
    s3_env(moto_s3.through(proxy))
    store = open_store(url)
    for file in tiny_pipeline("sd15").rglob("*"):
        if file.is_file():
            store.put_file(file.relative_to(tiny_pipeline("sd15")).as_posix(), file)
    proxy.requests.clear()
    _, _, workers = run(tmp_path, ray_address, url)
    weights = "unet/diffusion_pytorch_model.safetensors"
    reads = [
        line
        for line in proxy.requests
        if line.startswith("GET") and line.split()[1].split("?")[0].endswith(weights)
    ]
    assert workers >= 2
    assert len(reads) == 1  # by the driver; its workers find what it fetched
