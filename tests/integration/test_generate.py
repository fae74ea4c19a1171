"""`millijoule generate` end to end on a local Ray, with a generator that costs nothing."""

import hashlib
import io
import json
import platform
import socket
import subprocess
import sys
import tarfile

import pyarrow.parquet as pq
import pytest
from PIL import Image
from support.jobs import assert_exactly_once, environment, generate, hashes, manifest, write_prompts
from support.models import Plain

from millijoule.workers.schemas import ImageRequest


@pytest.fixture
def run(tmp_path, ray_address):
    """`run(*arguments)`: a job on the shared cluster."""
    return lambda *arguments: generate(tmp_path, *arguments, ray=ray_address)


PLAIN = ("--model", "python:support.models:plain")
#: Where nothing depends on how many there are: a worker's start takes longer than what it then does.
ONE = ("--workers", 1)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, ray_address):
    """One finished parquet job: 40 prompts, 2 images each, shards of 16 images."""
    folder = tmp_path_factory.mktemp("finished")
    prompts = write_prompts(folder / "prompts.txt", 40)
    arguments = ("--prompts", prompts, "--images-per-prompt", 2, "--shard-size", 16, *PLAIN)
    done = generate(folder, *arguments, "--output", folder / "out", ray=ray_address)
    assert done.returncode == 0, done.stderr
    return folder, arguments, done


def test_every_image_is_there_once_and_says_what_it_is(finished, run):
    folder, _, _ = finished
    assert_exactly_once(folder / "out", 80)
    rows = manifest(folder / "out")
    first = rows[0]
    table = pq.read_table(folder / "out" / first["path"]).to_pylist()
    image = next(
        r["image"]
        for r in table
        if (r["prompt_id"], r["image_index"]) == (first["prompt_id"], first["image_index"])
    )
    assert hashlib.sha256(image).hexdigest() == first["sha256"]
    picture = Image.open(io.BytesIO(image))
    assert picture.size == (8, 8)
    assert picture.text["parameters"].startswith(first["prompt"])
    assert json.loads(picture.text["millijoule"])["seed"] == first["seed"]


def test_the_result_names_the_report_and_does_not_call_an_estimate_a_measurement(finished, run):
    folder, _, done = finished
    stats = json.loads((folder / "out" / "stats.json").read_text())
    assert stats["images_ok"] == 80
    if stats["energy_methods"] == {"missing": 80}:
        assert stats["direct_mj_per_image"] is None
        assert all(r["energy_mj"] is None for r in manifest(folder / "out"))
        assert "not measured" in done.stderr
    assert {p.name for p in (folder / "out" / "energy").iterdir()} >= {"segment", "image"}
    assert (folder / "out" / "_SUCCESS").is_file()


def test_without_telemetry_the_images_are_the_same_and_energy_is_missing(finished, run):
    folder, arguments, _ = finished
    output = folder / "untold"
    done = run(*arguments, *ONE, "--output", output, "--no-telemetry")
    assert done.returncode == 0, done.stderr
    assert [r["sha256"] for r in manifest(output)] == [r["sha256"] for r in manifest(folder / "out")]
    stats = json.loads((output / "stats.json").read_text())
    assert stats["energy_methods"] == {"missing": 80}
    assert stats["direct_mj_per_image"] is None
    assert (
        sum(p.num_rows for p in map(pq.read_table, (output / "energy" / "counter").rglob("*.parquet"))) == 0
    )


def test_running_again_changes_nothing(finished, run):
    folder, arguments, _ = finished
    before = hashes(folder / "out")
    again = run(*arguments, "--output", folder / "out")
    assert again.returncode == 0, again.stderr
    assert hashes(folder / "out") == before
    assert_exactly_once(folder / "out", 80)


@pytest.mark.parametrize("output_format", ["webdataset", "files"])
def test_other_formats_hold_the_same_images(finished, tmp_path, output_format, run):
    folder, arguments, _ = finished
    done = run(*arguments, *ONE, "--output", tmp_path / "out", "--format", output_format)
    assert done.returncode == 0, done.stderr
    assert hashes(tmp_path / "out") == hashes(folder / "out")
    assert_exactly_once(tmp_path / "out", 80)
    row = manifest(tmp_path / "out")[5]
    if output_format == "files":
        data = (tmp_path / "out" / row["path"]).read_bytes()
    else:
        tar, member = row["path"].split("#")
        with tarfile.open(tmp_path / "out" / tar) as archive:
            data = archive.extractfile(member).read()
    assert hashlib.sha256(data).hexdigest() == row["sha256"]


def test_a_prompt_that_cannot_be_drawn_is_quarantined_alone_and_can_be_retried(tmp_path, run):
    prompts = tmp_path / "prompts.csv"
    lines = [f"id{i},{'poison' if i in (3, 17) else 'fine'} {i}" for i in range(30)]
    prompts.write_text("prompt_id,prompt\n" + "\n".join(lines) + "\n")
    arguments = ("--prompts", prompts, "--output", tmp_path / "out", "--shard-size", 10)
    model = ("--model", "python:support.models:raises_on_poison")
    done = run(*arguments, *model)
    assert done.returncode == 3, done.stderr
    rows = {r["prompt_id"]: r for r in manifest(tmp_path / "out")}
    assert {i for i, r in rows.items() if r["status"] == "quarantined"} == {"id3", "id17"}
    assert "cannot draw poison" in rows["id3"]["error"]
    again = run(*arguments, *model, "--retry-failed")
    assert again.returncode == 3, again.stderr
    assert "retrying 2 quarantined images" in again.stderr
    assert_exactly_once(tmp_path / "out", 30)


@pytest.mark.slow  # the same as in tests/chaos/test_failure_domains.py, with more rows
def test_a_row_that_kills_its_workers_is_found_and_quarantined(tmp_path, run):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"{'poison' if i == 11 else 'fine'} {i}\n" for i in range(24)))
    done = run(
        *("--prompts", prompts, "--output", tmp_path / "out", "--shard-size", 8),
        *("--model", "python:support.models:dies_on_poison"),
    )
    assert done.returncode == 3, done.stderr
    rows = manifest(tmp_path / "out")
    assert [r["prompt"] for r in rows if r["status"] == "quarantined"] == ["poison 11"]
    assert_exactly_once(tmp_path / "out", 24)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB with almost no room left, and the file that fills it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(2**20 - 200 * 1024))
    yield disk, ballast
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow  # a refusal is waited for a minute; test_record_writer.py has its steps
def test_a_full_disk_ends_the_job_with_a_message_and_resume_finishes_it(tmp_path, small_disk, run):
    disk, ballast = small_disk
    prompts = write_prompts(tmp_path / "prompts.txt", 200)
    arguments = ("--prompts", prompts, "--output", disk / "out", "--shard-size", 8, *PLAIN)
    full = run(*arguments)
    assert full.returncode == 1
    assert "disk full" in full.stderr
    assert "Traceback" not in full.stderr
    ballast.unlink()
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    assert_exactly_once(disk / "out", 200)


def test_dry_run_writes_nothing_and_says_what_it_would_take(tmp_path, run):
    prompts = write_prompts(tmp_path / "prompts.txt", 50)
    done = run(
        "--prompts", prompts, "--output", tmp_path / "out", *PLAIN, "--dry-run", "--price-per-kwh", 0.3
    )
    assert done.returncode == 0, done.stderr
    for words in ("50 usable", "images      50", "time", "energy", "cost", "bytes"):
        assert words in done.stdout
    assert not (tmp_path / "out").exists()


def test_an_address_without_a_cluster_is_named_at_once(tmp_path):
    prompts = write_prompts(tmp_path / "prompts.txt", 2)
    done = generate(tmp_path, "--prompts", prompts, "--output", tmp_path / "out", *PLAIN, ray="127.0.0.1:1")
    assert done.returncode == 1
    assert "--ray-address 127.0.0.1:1: no Ray cluster answers there" in done.stderr
    assert "Traceback" not in done.stderr


def test_at_the_deadline_what_is_in_hand_is_sealed_and_another_run_goes_on_from_there(tmp_path, run):
    """One shard of 20 s of drawing, whose model notes each image that it begins."""
    out, drawn = tmp_path / "out", tmp_path / "drawn"
    arguments = ("--prompts", write_prompts(tmp_path / "prompts.txt", 2000), "--output", out)
    arguments += ("--model", "python:support.work_redone:notes", "--shard-size", 2000, "--workers", 1)
    late = run(*arguments, "--deadline", "20s")
    assert late.returncode == 4, late.stderr
    assert "cap reached: --deadline (" in late.stderr
    assert 0 < len(drawn.read_text().splitlines()) < 2000
    assert list(out.glob("_job/parts/*/*/*.json"))
    assert not list(out.glob("_job/commits/*/*.json"))
    resumed = run(*arguments)
    assert resumed.returncode == 0, resumed.stderr
    assert_exactly_once(out, 2000)
    assert len(drawn.read_text().splitlines()) == 2000


def test_a_cap_stops_leasing_and_the_job_resumes_without_it(tmp_path, run):
    """Energy counters or estimates of any size are over a billionth of a kWh."""
    prompts = write_prompts(tmp_path / "prompts.txt", 64)
    out = tmp_path / "out"
    arguments = (
        "--prompts",
        prompts,
        "--shard-size",
        1,
        "--model",
        "python:support.models:slow",
        "--output",
        out,
        *ONE,
    )
    capped = run(*arguments, "--max-kwh", "1e-9")
    assert capped.returncode == 4, capped.stderr
    assert "cap reached: --max-kwh 1e-09 (" in capped.stderr
    commits = len(list(out.glob("_job/commits/*/*.json")))
    assert 0 < commits < 64
    again = run(*arguments, "--max-kwh", "1e-9")  # what the first run used counts
    assert again.returncode == 4
    assert len(list(out.glob("_job/commits/*/*.json"))) == commits
    late = run(*arguments, "--deadline", "2020-01-01T00:00Z")
    assert late.returncode == 4
    assert "cap reached: --deadline (20" in late.stderr
    resumed = run(*arguments)
    assert resumed.returncode == 0, resumed.stderr
    assert_exactly_once(out, 64)
    workers = [r for p in out.glob("energy/env/*/*/*.parquet") for r in pq.ParquetFile(p).read().to_pylist()]
    assert {w["driver_epoch"] for w in workers} >= {1, 4}  # of the first run, and of the last
    for w in workers:
        assert (w["python_version"], w["host"]) == (platform.python_version(), socket.gethostname())
        assert (w["device"], w["gpus"], w["driver_version"]) == ("cpu", "", None)
        assert w["energy_method"] is not None


def test_what_this_machine_can_never_hold_is_refused_instead_of_waited_for(tmp_path):
    prompts = write_prompts(tmp_path / "prompts.txt", 1)
    arguments = ("--prompts", prompts, "--output", tmp_path / "out", "--cpus-per-worker", 4096)
    done = generate(tmp_path, *arguments, "--model", "python:support.models:plain")
    assert done.returncode == 1
    assert "no room for a worker that asks for 4096 CPU; lower --cpus-per-worker" in done.stderr


FROM_PYTHON = """
import dataclasses, json, sys
import ray
from millijoule.jobs import generate

address, prompts, folder = sys.argv[1:]
options = dict(prompts=[prompts], model="python:support.models:plain", shard_size=16, images_per_prompt=2, workers="1", quiet=True)
results = []
ray.init(address=address, log_to_driver=False)
for name in ("one", "two"):
    results.append(generate(**options, output=f"{folder}/{name}"))
    assert ray.is_initialized(), "the caller's connection was ended"
ray.shutdown()
results.append(generate(**options, output=f"{folder}/two", ray_address=address))
assert not ray.is_initialized()
print(json.dumps([dataclasses.asdict(r) for r in results]))
"""


def test_the_function_uses_a_connection_that_is_there_and_leaves_it(finished, tmp_path, ray_address):
    folder, _, _ = finished
    done = subprocess.run(
        [sys.executable, "-c", FROM_PYTHON, ray_address, str(folder / "prompts.txt"), str(tmp_path)],
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for result in json.loads(done.stdout):
        assert (result["status"], result["images"], result["shards_left"]) == ("complete", 80, 0)
    for name in ("one", "two"):
        assert_exactly_once(tmp_path / name, 80)
        assert hashes(tmp_path / name) == hashes(folder / "out")


def test_a_device_that_is_too_small_for_the_batch_costs_no_row_and_no_worker(run, tmp_path):
    prompts = write_prompts(tmp_path / "prompts.txt", 24)
    with open(prompts, "a") as file:
        file.write("a large cat\n")
    arguments = ("--prompts", prompts, "--shard-size", 8, "--workers", 1)
    small = run(*arguments, "--model", "python:support.models:cramped", "--output", tmp_path / "small")
    assert small.returncode == 0, small.stderr
    assert_exactly_once(tmp_path / "small", 25)
    assert {row["status"] for row in manifest(tmp_path / "small")} == {"ok"}
    assert "cannot work" not in small.stderr
    rows = {row["prompt"]: row for row in manifest(tmp_path / "small")}
    plain = Plain("cpu")
    for prompt, picture in pixels(tmp_path / "small").items():
        row = rows[prompt]
        assert picture == plain.draw(ImageRequest(row["prompt_id"], 0, prompt, row["seed"])).tobytes()


def pixels(output):
    """The picture of each prompt, decoded."""
    return {
        row["prompt"]: Image.open(io.BytesIO(row["image"])).convert("RGB").tobytes()
        for path in {row["path"] for row in manifest(output)}
        for row in pq.read_table(output / path).to_pylist()
    }
