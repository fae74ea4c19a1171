"""`generate` as a function: its name in any order of imports, its options, and what it returns; Ray is stood in for."""

import inspect
import json
import logging
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import fields
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import support.models
from support.jobs import assert_exactly_once, hashes, manifest, write_prompts
from support.models import Careful
from support.stand_in_jobs import start_cluster

from millijoule.jobs import JobResult, generate
from millijoule.jobs import check as check_command
from millijoule.jobs import gc as gc_command
from millijoule.jobs import report as report_command
from millijoule.jobs.generate import EXIT_CODES, main, run_options
from millijoule.jobs.options.model import ModelOptions
from millijoule.jobs.options.rates import RateOptions
from millijoule.jobs.set_up import job as set_up_job
from millijoule.jobs.set_up.options import GenerateOptions, options_of
from millijoule.pipeline.output.job import last_epoch, open_epoch
from millijoule.pipeline.running import head_watch, live_metrics
from millijoule.workers.actor import ShardWorker
from millijoule.workers.errors import InputError, JobError, NodeError, SupersededError
from millijoule.workers.generators.protocol import Rejection
from millijoule.workers.storage.open import open_store

PLAIN = "python:support.models:plain"


# -- the name ----------------------------------------------------------------------------------------------------------

#: Each in a process of its own, where nothing is imported yet; `function` and `module` are compared afterwards.
ORDERS = {
    "function first": """
from millijoule.jobs import generate as function
import millijoule.jobs.generate
""",
    "submodule first": """
import millijoule.jobs.generate
from millijoule.jobs import generate as function
""",
    "something of the submodule first": """
from millijoule.jobs.generate import main
from millijoule.jobs import generate as function
""",
    "as the command does": """
import importlib
importlib.import_module("millijoule.jobs.generate")
import millijoule.jobs
function = millijoule.jobs.generate
""",
}

AFTERWARDS = """
import importlib, inspect, sys
import millijoule.jobs
module = importlib.import_module("millijoule.jobs.generate")
assert inspect.ismodule(module) and callable(module.main), module
assert inspect.isfunction(function), function
assert millijoule.jobs.generate is function is module.generate
importlib.reload(module)
from millijoule.jobs import generate
assert inspect.isfunction(generate) and generate is module.generate
from millijoule.jobs import *
assert inspect.isfunction(generate) and JobResult.__name__ == "JobResult"
assert not {"ray", "torch", "pyarrow"} & set(sys.modules), "expensive to import"
"""


def python(code):
    return subprocess.run(
        [sys.executable, "-W", "error::ImportWarning", "-c", code],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("order", ORDERS)
def test_the_package_gives_the_function_whatever_was_imported_before(order):
    done = python(ORDERS[order] + AFTERWARDS)
    assert done.returncode == 0, done.stderr


def test_the_package_itself_imports_nothing():
    done = python(
        "import sys\nimport millijoule.jobs\nassert not {'ray', 'torch', 'tyro'} & set(sys.modules), sys.modules"
    )
    assert done.returncode == 0, done.stderr


def test_the_module_runs_as_a_command():
    command = [sys.executable, "-W", "error", "-m", "millijoule.jobs.generate", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--no-speculate" in done.stdout
    assert done.stderr == ""


# -- options -----------------------------------------------------------------------------------------------------------


def test_every_option_is_a_keyword_with_the_commands_default_and_words():
    parameters = inspect.signature(generate).parameters
    groups = (GenerateOptions, ModelOptions, RateOptions)
    flat = [f for kind in groups for f in fields(kind) if f.name not in ("rates", "model_options")]
    assert set(parameters) == {f.name for f in flat}
    assert parameters["prompts"].default is inspect.Parameter.empty
    assert parameters["lease_seconds"].default == 120.0
    documented = inspect.getdoc(generate)
    for f in flat:
        assert f"\n    {f.name}: " in documented
    assert "    workers: Number of workers, or a range for autoscaling" in documented


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"shard_sise": 8}, "no option 'shard_sise'; did you mean shard_size"),
        ({"price": 0.3}, "no option 'price'; did you mean price_per_kwh"),
        ({"zzz": 1}, "no option 'zzz'; there are prompts, output"),
        ({"rates": {}}, "no option 'rates'"),
    ],
)
def test_an_unknown_keyword_names_those_near_it(keywords, words):
    with pytest.raises(TypeError) as refused:
        generate(prompts="p.txt", output="out", **keywords)
    assert words in str(refused.value)


def test_prompts_and_output_are_needed():
    with pytest.raises(TypeError, match="needs prompts and output"):
        generate()


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"format": "jpeg"}, "`$.format`"),
        ({"images_per_prompt": "2"}, "`$.images_per_prompt`"),
        ({"pue": "high"}, "`$.rates.pue`"),
        ({"workers": "8:2"}, "--workers 8:2"),
        ({"workers": 0}, "--workers 0"),
        ({"shard_size": True}, "`$.shard_size`"),
        ({"prompts": ["nowhere.csv"]}, "nowhere.csv"),
    ],
)
def test_a_value_that_means_nothing_is_refused_by_name(tmp_path, keywords, words):
    prompts = write_prompts(tmp_path / "p.txt", 1)
    with pytest.raises(InputError) as refused:
        generate(**{"prompts": prompts, "output": tmp_path / "out", "model": PLAIN, **keywords})
    assert words in str(refused.value)
    assert not (tmp_path / "out").exists()


# -- jobs --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cluster(monkeypatch):
    """`cluster(worker_class)`: one node with two CPUs, to which this process is connected."""

    def started(worker=ShardWorker):
        ray = start_cluster(monkeypatch, worker)
        ray.shutdown = lambda: pytest.fail("the caller's connection was ended")
        ray.add_node("host-1", CPU=2.0)
        return ray

    return started


@pytest.fixture
def job(tmp_path):
    """`job(**more)`: forty images of ten shards; the test's node has no GPU, and is not asked for one."""
    prompts = write_prompts(tmp_path / "p.txt", 40)

    def call(**more):
        options = {"shard_size": 4, "device": "cpu", "quiet": True, "telemetry": False, "model": PLAIN}
        return generate(**{"prompts": str(prompts), "output": tmp_path / "out", **options, **more})

    return call


def test_a_complete_job_says_what_was_made_and_where(cluster, job, tmp_path):
    ray = cluster()
    result = job()
    assert (result.status, result.images, result.shards_left) == ("complete", 40, 0)
    assert (result.images_quarantined, result.rows_rejected, result.reason) == (0, 0, "")
    assert_exactly_once(tmp_path / "out", 40)
    assert json.loads(Path(result.stats).read_text()) == result.totals
    assert Path(result.manifest).is_file()
    assert Path(result.energy_tables, "segment").is_dir()
    assert (result.total_mj, result.joules_per_image, result.evidence_class) == (None, None, "E0")
    assert ray.running == ray.requests == []
    again = job()
    assert (again.status, again.images) == ("complete", 40)
    assert "stats" not in repr(again).replace("status", "")


def test_energy_is_what_the_totals_say():
    totals = {
        "images_ok": 10,
        "images_filtered": 0,
        "images_with_warnings": 0,
        "images_quarantined": 0,
        "input_rows_rejected": 0,
        "energy": {"total_mj": 5000},
        "direct_mj_per_image": 300.0,
        "full_mj_per_image": 500.0,
        "evidence_class": "E1",
    }
    result = JobResult.of_complete("s3://bucket/out/", totals, 1.0)
    assert (result.total_mj, result.joules_per_image, result.full_joules_per_image) == (5000, 0.3, 0.5)
    assert (result.status, result.evidence_class) == ("complete", "E1")
    assert result.manifest == "s3://bucket/out/manifest.parquet"


POISON = [f"{'poison' if i in (5, 17) else 'fine'} {i}" for i in range(24)]


@pytest.mark.parametrize("workers", [1, "0:2"])
@pytest.mark.parametrize(
    ("model", "reason"),
    [("raises_on_poison", "cannot draw poison"), ("returns_nonsense_on_poison", "images as float32")],
)
def test_a_row_that_cannot_be_drawn_costs_that_row_alone_and_nobody_dies_for_it(
    cluster, job, tmp_path, caplog, model, reason, workers
):
    """A lone worker is heard, too."""
    ray = cluster()
    (tmp_path / "q.txt").write_text("\n".join(POISON))
    result = job(
        prompts=tmp_path / "q.txt", model=f"python:support.models:{model}", shard_size=12, workers=workers
    )
    assert (result.status, result.images, result.images_quarantined) == ("complete_with_quarantined", 22, 2)
    bad = {r["prompt"]: r["error"] for r in manifest(tmp_path / "out") if r["status"] == "quarantined"}
    assert set(bad) == {"poison 5", "poison 17"}
    assert all(reason in error for error in bad.values())
    assert_exactly_once(tmp_path / "out", len(POISON))
    assert len(ray.asked_for) == (1 if workers == 1 else 2)
    assert "is gone" not in caplog.text
    assert "node host-1" not in caplog.text


@pytest.mark.parametrize("workers", [1, "0:2"])
def test_an_image_that_is_no_numbers_is_heard_twice_like_a_row_that_fails(cluster, job, tmp_path, workers):
    cluster()
    (tmp_path / "q.txt").write_text("\n".join(f"{'nan' if i in (2, 9) else 'a'} {i}" for i in range(12)))
    result = job(prompts=tmp_path / "q.txt", model="python:support.models:careful", workers=workers)
    assert (result.status, result.images, result.images_quarantined) == ("complete_with_quarantined", 10, 2)
    assert_exactly_once(tmp_path / "out", 12)


def test_numbers_that_are_none_on_one_device_only_are_no_rows_fault(cluster, job, tmp_path, monkeypatch):
    """The first worker draws nothing but what is no image; the second is asked, and is believed."""
    devices = []

    def odd(device):
        devices.append(device)
        generator = Careful(device)
        if len(devices) == 1:
            generator.rejection = lambda request: (
                None if request.prompt_id == "warm-up" else Rejection("quarantined", "not finite")
            )
        return generator

    monkeypatch.setattr(support.models, "careful", odd)
    ray = cluster()
    ray.add_node("host-2", CPU=2.0)
    result = job(model="python:support.models:careful", workers=2)
    assert (result.status, result.images, result.images_quarantined) == ("complete", 40, 0)
    assert_exactly_once(tmp_path / "out", 40)


def test_filtered_images_are_counted_said_and_change_no_exit_code(cluster, tmp_path, monkeypatch, capsys):
    published = Counter()

    class Recorded:
        """Ray's metrics, which need a node to send to."""

        def __init__(self, name, description="", tag_keys=()):
            self.name = name

        def inc(self, by, tags):
            if self.name == "millijoule_images":
                published[tags["status"]] += by

        def set(self, value, tags): ...

    for kind in ("Counter", "Gauge"):
        monkeypatch.setattr(live_metrics, kind, Recorded)
    monkeypatch.setattr("millijoule.pipeline.running.progress.LINE_PERIOD_S", 0.0)
    cluster()
    prompts = tmp_path / "q.txt"
    prompts.write_text("\n".join(f"{'hidden' if i % 4 == 1 else 'strange'} {i}" for i in range(12)))
    words = ["--prompts", str(prompts), "--output", str(tmp_path / "out"), "--device", "cpu"]
    assert main([*words, "--shard-size", "4", "--model", "python:support.models:careful"]) == 0
    said = capsys.readouterr().err
    assert published == {"ok": 9, "filtered": 3}
    assert "3 filtered" in said
    assert "images filtered: 3, hidden by the model's own safety checker" in said
    assert "images with warnings: 9" in said
    rows = manifest(tmp_path / "out")
    assert {r["prompt"] for r in rows if r["status"] == "filtered"} == {"hidden 1", "hidden 5", "hidden 9"}
    assert_exactly_once(tmp_path / "out", 12)


def test_a_result_says_how_many_images_were_filtered_and_warned_of(cluster, job, tmp_path):
    cluster()
    (tmp_path / "q.txt").write_text("hidden 1\nstrange 2\na 3\n")
    result = job(prompts=tmp_path / "q.txt", model="python:support.models:careful")
    assert (result.status, result.images) == ("complete", 2)
    assert (result.images_filtered, result.images_quarantined, result.images_with_warnings) == (1, 0, 1)


def test_bad_rows_are_rejected_with_file_and_row_and_the_rest_is_made(cluster, job, tmp_path):
    cluster()
    rows = [{"prompt": "ok"}, {"prompt": None}, {"prompt": "x" * 100_000}, {"prompt": "big", "width": 10**9}]
    prompts = tmp_path / "q.jsonl"
    prompts.write_text("".join(json.dumps(r) + "\n" for r in rows) + "{broken\n")
    result = job(prompts=[prompts])
    assert (result.status, result.images, result.rows_rejected) == ("complete_with_quarantined", 1, 4)
    bad = pq.read_table(tmp_path / "out" / "bad_rows.parquet").to_pylist()
    assert [(b["row"], b["column"]) for b in bad][:3] == [(2, "prompt"), (3, "prompt"), (4, "width")]
    assert bad[3]["row"] == 5
    assert all(str(prompts) in b["file"] for b in bad)
    assert_exactly_once(tmp_path / "out", 1)


def test_telemetry_changes_no_image(cluster, job, tmp_path, monkeypatch):
    for kind in ("Counter", "Gauge"):  # Ray's, which need a node to send to
        monkeypatch.setattr(live_metrics, kind, lambda *args, **kwargs: NoMetric())
    cluster()
    with_telemetry = job(output=tmp_path / "told", telemetry=True)
    assert with_telemetry.status == "complete"
    job()
    assert hashes(tmp_path / "told") == hashes(tmp_path / "out")


class NoMetric:
    def inc(self, by, tags): ...

    def set(self, value, tags): ...


def test_a_cap_that_is_reached_and_the_job_that_goes_on_without(cluster, job):
    cluster()
    capped = job(deadline="2020-01-01T00:00Z")
    assert (capped.status, capped.images, capped.shards_left) == ("cap_reached", 0, 10)
    assert capped.reason.startswith("--deadline (20")
    assert (capped.manifest, capped.total_mj, capped.evidence_class) == (None, None, None)
    assert job().status == "complete"


def interrupted_by(*signals):
    """A worker during whose third lease a person, or the cluster, interrupts the driver."""

    class Interrupted(ShardWorker):
        def run(self, lease):
            result = super().run(lease)
            if lease.shard.shard_id == 2:
                for signum in signals:
                    signal.raise_signal(signum)
            return result

    return Interrupted


@pytest.mark.parametrize(
    "signals",
    [(signal.SIGINT,), (signal.SIGINT, signal.SIGINT), (signal.SIGTERM,)],
    ids=["once", "twice", "term"],
)
def test_an_interrupt_finishes_what_is_at_work_and_the_next_call_goes_on(cluster, job, caplog, signals):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    ray = cluster(interrupted_by(*signals))
    result = job()
    assert (result.status, result.reason) == ("interrupted", "interrupted")
    assert 3 <= result.shards_left <= 8
    assert result.images == 40 - 4 * result.shards_left
    assert ("stopped" in caplog.text) == (
        signals != (signal.SIGINT,)
    )  # at once, instead of after the shards at work
    assert ray.running == []
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    cluster()
    assert job().images == 40


class TakenOver(ShardWorker):
    """A worker of a first run during whose third lease another run begins."""

    def run(self, lease):
        store = open_store(self.config.output_url)
        if lease.shard.shard_id == 2 and last_epoch(store) == 1:
            open_epoch(store, exclusive=True)
        return super().run(lease)


def test_a_run_that_another_one_takes_over_ends_without_the_end_of_the_job(cluster, job, caplog, tmp_path):
    ray = cluster(TakenOver)
    result = job()
    assert (result.status, EXIT_CODES[result.status]) == ("superseded", 7)
    assert result.reason.startswith("superseded by run 2 (on ")
    assert caplog.text.count("run 1 (this one) stands down") == 1
    assert ray.running == []
    assert (result.manifest, result.totals) == (None, None)
    assert not {"manifest.parquet", "_SUCCESS"} & {p.name for p in (tmp_path / "out").iterdir()}
    commits = [json.loads(p.read_text()) for p in (tmp_path / "out").glob("_job/commits/*/*.json")]
    assert {c["shard_id"] for c in commits} == {0, 1}
    assert len(list((tmp_path / "out").glob("_job/parts/*/*/*.json"))) >= 1
    cluster()
    assert job().images == 40
    assert_exactly_once(tmp_path / "out", 40)


def test_a_retry_of_a_run_that_was_taken_over_starts_nothing(cluster, job, monkeypatch, tmp_path):
    ray = cluster()
    for series in ("theirs", "ours"):
        monkeypatch.setenv("MILLIJOULE_SERIES", series)
        assert job(deadline="2020-01-01T00:00Z").status == "cap_reached"
    monkeypatch.setenv("MILLIJOULE_SERIES", "theirs")
    monkeypatch.setattr(set_up_job, "choose_device", lambda *_, **__: pytest.fail("the cluster was asked"))
    with pytest.raises(SupersededError, match="has taken this job over from an earlier attempt of theirs"):
        job()
    assert ray.running == ray.requests == []
    assert sorted(p.name for p in (tmp_path / "out/_job/epochs").iterdir()) == ["000001.json", "000002.json"]


@pytest.mark.parametrize(
    ("variable", "value"),
    [("MILLIJOULE_ATTEMPT", "second"), ("SLURM_RESTART_COUNT", "-1"), ("MILLIJOULE_SERIES", "s" * 201)],
)
def test_what_the_environment_says_amiss_of_the_attempt_is_refused_before_anything_starts(
    cluster, job, monkeypatch, tmp_path, variable, value
):
    ray = cluster()
    monkeypatch.setenv(variable, value)
    monkeypatch.setattr(set_up_job, "choose_device", lambda *_, **__: pytest.fail("the cluster was asked"))
    with pytest.raises(InputError, match=rf"^environment variable {variable} "):
        job()
    assert ray.requests == []
    assert not (tmp_path / "out/_job").exists()


def test_outside_the_main_thread_no_signal_is_touched(cluster, job, monkeypatch):
    cluster()
    monkeypatch.setattr(signal, "signal", lambda *args: pytest.fail("a handler was set"))
    results = []
    thread = threading.Thread(target=lambda: results.append(job()))
    thread.start()
    thread.join()
    assert [r.status for r in results] == ["complete"]


def test_a_lost_head_is_an_error_and_what_is_committed_stays(cluster, job, monkeypatch):
    watches = []

    class Watch:
        """One that finds the head lost at once."""

        def __init__(self, address, on_lost):
            watches.append(address)
            self.on_lost = on_lost

        def __enter__(self):
            self.on_lost("connection refused")

        def __exit__(self, *_): ...

    cluster()
    with monkeypatch.context() as patched:
        patched.setattr(head_watch, "head_watched", Watch)
        with pytest.raises(JobError, match="head of the Ray cluster is gone"):
            job()
    assert watches == ["127.0.0.1:1"]
    cluster()  # as it comes back: without the workers there were
    assert job().status == "complete"


def test_a_dry_run_prints_and_writes_nothing(cluster, job, tmp_path, capsys):
    ray = cluster()
    result = job(dry_run=True, price_per_kwh=0.3)
    assert (result.status, result.images, result.shards_left) == ("planned", 0, 10)
    said = capsys.readouterr().out
    for words in (
        "prompts     40 usable, 0 rejected",
        "images      40 in 10 shards",
        "device      cpu, because",
    ):
        assert words in said
    assert not (tmp_path / "out").exists()
    assert ray.running == []


def test_a_dry_run_calls_stated_what_a_pool_states(cluster, job, capsys):
    cluster()
    job(dry_run=True, device="auto", pool=("said::workers=0:1:images_per_s=5:joules=2", "tried::workers=0:1"))
    lines = capsys.readouterr().out.splitlines()
    said, tried = (n for n, line in enumerate(lines) if line.startswith("pool "))
    assert lines[said + 1].strip() == "5 images/s on one worker (stated), 2 J per image (stated)"
    assert "images/s on one worker, " in lines[tried + 1]
    assert "stated" not in lines[tried + 1]


def test_a_dry_run_says_what_the_output_holds_already(cluster, job, tmp_path, capsys):
    def said(**more):
        capsys.readouterr()
        assert job(dry_run=True, **more).status == "planned"
        (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("output ")]
        return line

    cluster()
    assert said().endswith("out, no job yet")
    job(deadline="2020-01-01T00:00Z")
    assert "holds this job: 0 of 10 shards are done" in said()
    job()
    assert "holds this job: 10 of 10 shards are done" in said()
    other = said(seed=7)
    assert "generate will refuse it" in other
    assert "--seed was 0, now 7" in other
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "_SUCCESS").touch()
    assert "generate will refuse it" in said(output=tmp_path / "foreign")


def test_a_dry_run_of_a_retry_is_about_what_would_be_retried(cluster, job, tmp_path, capsys):
    def said(**more):
        capsys.readouterr()
        before = sorted((tmp_path / "out").rglob("*"))
        result = job(dry_run=True, retry_failed=True, price_per_kwh=0.3, **given, **more)
        assert sorted((tmp_path / "out").rglob("*")) == before
        return result, capsys.readouterr().out

    (tmp_path / "q.txt").write_text("\n".join(POISON))
    given = {"prompts": tmp_path / "q.txt", "model": "python:support.models:raises_on_poison"}
    cluster()
    with pytest.raises(InputError, match=r"--retry-failed: .*out holds no job yet"):
        said()
    job(**given, deadline="2020-01-01T00:00Z")
    _, words = said()
    assert "to finish   24 images in 6 shards; nothing is retried before that is done" in words
    assert job(**given, workers=1).images_quarantined == 2
    result, words = said()
    assert result.shards_left == 1
    assert "retry       2 images in 1 shard\n" in words
    assert "calibrated" in words
    with pytest.raises(InputError, match="--seed was 0, now 7"):
        said(seed=7)


def test_a_dry_run_of_a_retry_of_nothing_starts_no_worker(cluster, job, capsys):
    ray = cluster()
    job()
    asked = len(ray.asked_for)
    assert job(dry_run=True, retry_failed=True).shards_left == 0
    assert "retry       no image stands quarantined" in capsys.readouterr().out
    assert len(ray.asked_for) == asked


class NowhereToLoad(ShardWorker):
    def start(self):
        raise NodeError("no model on this disk")


def test_a_node_that_the_last_error_names_is_not_named_by_the_log_as_well(cluster, job, caplog):
    cluster(NowhereToLoad)
    with pytest.raises(
        JobError,
        match=r"no node is left that can work:\n  node .*: left out for this run: no model on this disk",
    ):
        job()
    assert [m for m in caplog.messages if m.startswith("node ")] == []
    assert "no model on this disk (fault 1 in a row" in caplog.text


def test_the_report_goes_by_the_rates_that_the_job_was_given(cluster, job, tmp_path, capsys):
    cluster()
    (tmp_path / "p.csv").write_text("time,price\n0,0.5\n")
    job(price_per_kwh=str(tmp_path / "p.csv"), pue=1.25)
    assert job(gco2_per_kwh="300").status == "complete"
    given = []
    for more in ([], ["--price-per-kwh", "2", "--pue", "1"]):
        capsys.readouterr()
        assert report_command.main([str(tmp_path / "out"), "--json", "-", *more]) == 0
        given.append(json.loads(capsys.readouterr().out)["jobs"][0])
    kept, own = given
    assert (kept["price"]["source"], kept["carbon"]["source"], kept["pue"]) == (
        "p.csv, as given to generate",
        "declared value, as given to generate",
        1.25,
    )
    (pue,) = [f["text"] for f in kept["flags"] if f["name"] == "PUE declared"]
    assert pue == "Grams and money are multiplied by a PUE of 1.25, as given to generate. Joules are not."
    assert (own["price"]["source"], own["carbon"]["source"], own["pue"]) == (
        "declared value",
        "declared value, as given to generate",
        1.0,
    )


#: Nouns that messages count.
COUNTED = "images|shards|rows|prompts|workers|checks|files|bytes|differences|segments|nodes|stragglers"


def test_no_message_about_one_thing_has_a_plural(cluster, tmp_path, capsys, caplog):
    caplog.set_level(logging.INFO)
    cluster()
    (tmp_path / "one.jsonl").write_text('{"prompt": "poison 1"}\nno json\n')
    out = str(tmp_path / "out")
    options = {"prompts": str(tmp_path / "one.jsonl"), "output": out, "device": "cpu", "workers": 1}
    options["model"] = "python:support.models:raises_on_poison"
    run_options(options_of({**options, "dry_run": True}))
    run_options(options_of({**options, "deadline": "2020-01-01T00:00Z"}))
    run_options(options_of({**options}))
    run_options(options_of({**options, "retry_failed": True}))
    check_command.main([out])
    gc_command.main([out])
    report_command.main([out])
    shown = capsys.readouterr()
    said = "\n".join([*caplog.messages, shown.out, shown.err])
    for words in (
        "1 image of 1 prompt, in 1 shard",
        "1 input row rejected",
        "retrying 1 quarantined image",
        "2 shards checked",
    ):
        assert words in said
    assert re.findall(rf"(?<![\d.,/])1 (?:\w+ )?(?:{COUNTED})\b", said) == []


@pytest.mark.parametrize("quiet", [True, False])
def test_quiet_says_nothing_below_a_warning(cluster, job, caplog, quiet):
    caplog.set_level(logging.INFO)
    product = logging.getLogger("millijoule")
    cluster()
    before = product.level
    job(quiet=quiet)
    assert any(r.getMessage().startswith("planned: 40 images") for r in caplog.records) != quiet
    assert product.level == before


def test_another_cluster_than_the_one_that_is_connected_is_refused(cluster, job):
    cluster()
    with pytest.raises(InputError, match=r"connected to 127\.0\.0\.1:1 already"):
        job(ray_address="10.0.0.1:6379")
    assert job(ray_address="127.0.0.1:1").status == "complete"
