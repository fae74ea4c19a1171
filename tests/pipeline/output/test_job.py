"""`job.json`: read whatever version wrote it, and refused where it is none or of another job."""

import json
from dataclasses import asdict, replace

import pytest
from support.ledgers import JOB

from millijoule.pipeline.output.job import (
    Epoch,
    check_same_job,
    open_epoch,
    publish_job,
    read_epochs,
    read_job,
    require_job,
    this_epoch,
)
from millijoule.workers.errors import InputError, SupersededError
from millijoule.workers.generators.options import GeneratorOptions, LoraChoice, ModelPart
from millijoule.workers.records import encode
from millijoule.workers.rungs.rungs import Rungs
from millijoule.workers.storage.open import open_store


@pytest.fixture
def store(tmp_path):
    return open_store(str(tmp_path))


def test_a_job_comes_back_as_it_was_published(store):
    assert read_job(store) is None
    assert publish_job(store, JOB) == JOB
    assert read_job(store) == require_job(store) == JOB
    assert json.loads(store.get("_job/job.json")) == json.loads(json.dumps(asdict(JOB)))


def test_a_job_of_an_earlier_or_later_version_is_read(store):
    old = json.dumps({**asdict(JOB), "created_unix": 7, "of a later version": [1]}, indent=2, sort_keys=True)
    store.put("_job/job.json", old.encode() + b"\n")
    assert require_job(store) == replace(JOB, created_unix=7.0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rows": "many"}, r"\$\.rows"),
        ({"prompts": "p.csv"}, r"\$\.prompts"),
        ({"model": None}, r"\$\.model"),
    ],
)
def test_what_is_no_job_is_refused_by_the_name_of_the_field(store, change, words):
    store.put("_job/job.json", json.dumps({**asdict(JOB), **change}).encode())
    with pytest.raises(InputError, match=rf"_job/job\.json: not a job description: .*{words}"):
        require_job(store)


def test_another_job_is_refused_with_what_changed(store):
    asked = {**asdict(JOB), "job_seed": JOB.job_seed + 1}
    check_same_job(JOB, JOB.fingerprint, asked, store)
    with pytest.raises(InputError, match=rf"--seed was {JOB.job_seed}, now {JOB.job_seed + 1}\)"):
        check_same_job(JOB, "0" * 64, asked, store)
    with pytest.raises(InputError, match=r"another job \(--model was .*, now other\)"):
        check_same_job(JOB, "0" * 64, {**asdict(JOB), "model": "other", "model_sha256": "1" * 64}, store)
    newer = {**asdict(JOB), "model_name": "the next", "model_sha256": "1" * 64}
    words = rf"the weights of --model {JOB.model} were {JOB.model_name}, SHA-256 {JOB.model_sha256[:12]}, now they are the next, "
    with pytest.raises(
        InputError, match=words + "SHA-256 111111111111: to continue, give the former as a file"
    ):
        check_same_job(JOB, "0" * 64, newer, store)
    with pytest.raises(InputError, match="the prompt files' content or column options changed"):
        check_same_job(JOB, "0" * 64, asdict(JOB), store)


def test_options_of_the_model_that_changed_are_named_as_they_are_given(store):
    """As job.json has them, after JSON, beside as they are read from the command line."""
    options = GeneratorOptions(
        rungs=Rungs(steps=5, fuse_qkv=True),
        loras=(LoraChoice("/a/style.safetensors", 0.8, "style", "1" * 64),),
        vae=ModelPart("/a/vae", "2" * 64),
    )
    job = replace(JOB, model_options=json.loads(json.dumps(options.identity())))

    def refusal(**changes):
        asked = {**asdict(job), "model_options": replace(options, **changes).identity()}
        with pytest.raises(InputError) as refused:
            check_same_job(job, "0" * 64, asked, store)
        return str(refused.value).partition("another job (")[2].partition("). Give")[0]

    assert refusal(rungs=Rungs(steps=6, fuse_qkv=True)) == "--steps was 5, now 6"
    assert refusal(loras=()) == "--lora was style=0.8 (111111111111), now the default"
    assert refusal(vae=None, engine="eager") == (
        "--engine was the default, now eager; --vae was 222222222222, now the default"
    )
    pools = {"pool_engines": ["compile", "eager"], "pool_rungs": [{"steps": 9}, {}]}
    with pytest.raises(InputError) as refused:
        check_same_job(
            job, "0" * 64, asdict(replace(job, model_options={**job.model_options, **pools})), store
        )
    assert "engines of --pool was the default, now ['compile', 'eager']; optimize= of --pool was" in str(
        refused.value
    )


@pytest.mark.parametrize("exclusive", [True, False])
def test_each_driver_takes_the_next_epoch(store, exclusive):
    store.put("_job/epochs/note.txt", b"of a person")
    assert [open_epoch(store, exclusive=exclusive) for _ in range(3)] == [1, 2, 3]
    assert json.loads(store.get("_job/epochs/000002.json"))["pid"] > 0


@pytest.mark.parametrize(
    ("environment", "attempt", "source"),
    [
        ({}, None, None),
        ({"SLURM_RESTART_COUNT": "2"}, 3, "SLURM_RESTART_COUNT"),
        ({"SLURM_RESTART_COUNT": "0"}, 1, "SLURM_RESTART_COUNT"),
        ({"MILLIJOULE_ATTEMPT": "4", "SLURM_RESTART_COUNT": "2"}, 4, "MILLIJOULE_ATTEMPT"),
        ({"MILLIJOULE_ATTEMPT": "", "SLURM_RESTART_COUNT": " 2\n"}, 3, "SLURM_RESTART_COUNT"),
        ({"SLURM_JOB_ID": "7"}, 1, "SLURM_JOB_ID"),
        ({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}, 2, "SLURM_RESTART_COUNT"),
    ],
)
def test_an_epoch_says_which_attempt_it_is_for_whoever_started_it(
    store, monkeypatch, environment, attempt, source
):
    for name in ("MILLIJOULE_ATTEMPT", "SLURM_RESTART_COUNT", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    number = open_epoch(store, exclusive=True)
    epoch = read_epochs(store)[number]
    assert (epoch.attempt, epoch.attempt_source) == (attempt, source)


@pytest.mark.parametrize("value", ["first", "-1", "1.0", "1e3", "0x2", "1234567890", "\udcff"])
@pytest.mark.parametrize("name", ["MILLIJOULE_ATTEMPT", "SLURM_RESTART_COUNT"])
def test_an_attempt_that_is_no_number_is_refused_by_the_name_of_its_variable(store, monkeypatch, name, value):
    written = value.encode("utf-8", "backslashreplace").decode()
    with pytest.raises(InputError, match=r"a whole number from [01];") as refused:
        starts(store, monkeypatch, SLURM_JOB_ID="7", **{name: value})
    assert str(refused.value).startswith(f"environment variable {name} is {written!r}: ")
    assert read_epochs(store) == {}, "a refused run must not supersede"


def test_attempts_count_from_one_and_restarts_from_none(store, monkeypatch):
    assert starts(store, monkeypatch, SLURM_RESTART_COUNT="0") == 1
    with pytest.raises(InputError, match=r"MILLIJOULE_ATTEMPT is '0'.*from 1;"):
        starts(store, monkeypatch, MILLIJOULE_ATTEMPT="0")


def test_a_series_is_recorded_whole_or_refused(store, monkeypatch):
    """Two that differ in their last characters alone stay two."""
    starts(store, monkeypatch, MILLIJOULE_SERIES="n" * 199 + "a")
    starts(store, monkeypatch, MILLIJOULE_SERIES="n" * 199 + "b")
    assert [epoch.series[-2:] for epoch in read_epochs(store).values()] == ["na", "nb"]
    with pytest.raises(
        InputError, match=r"MILLIJOULE_SERIES has 201 characters \('n{40}' \.\.\.\): at most 200"
    ):
        starts(store, monkeypatch, MILLIJOULE_SERIES="n" * 200 + "a")
    assert len(read_epochs(store)) == 2


def test_an_epoch_names_the_submission_and_the_cluster(store, monkeypatch):
    config = {"runtime_env": {}, "metadata": {"job_submission_id": "raysubmit_x", "job_name": "n"}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(config))
    monkeypatch.setenv("RAY_CLUSTER_NAME", "rayjob-raycluster-b2xx9")
    number = open_epoch(store, exclusive=True)
    epoch = read_epochs(store)[number]
    assert (epoch.submission_id, epoch.cluster) == ("raysubmit_x", "rayjob-raycluster-b2xx9")
    assert epoch.series is None


def as_ray_says(submission_id):
    return json.dumps({"metadata": {"job_submission_id": submission_id}})


@pytest.mark.parametrize(
    ("environment", "series"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "7"}, "Slurm job 7"),
        ({"SLURM_JOB_ID": "7", "MILLIJOULE_SERIES": " night of the 3rd "}, "night of the 3rd"),
        (
            {"RAY_JOB_CONFIG_JSON_ENV_VAR": as_ray_says("my-job-x2b4z"), "RAY_CLUSTER_NAME": "my-job-9kk2q"},
            "RayJob my-job",
        ),
        (
            {
                "RAY_JOB_CONFIG_JSON_ENV_VAR": as_ray_says("my-job-x2b4z"),
                "RAY_CLUSTER_NAME": "my-job-raycluster-9kk2q",
            },
            "RayJob my-job",
        ),
        # submitted by hand to a cluster that stays
        (
            {
                "RAY_JOB_CONFIG_JSON_ENV_VAR": as_ray_says("raysubmit_EaCh6yz1R4nbb8mT"),
                "RAY_CLUSTER_NAME": "millijoule",
            },
            None,
        ),
        ({"RAY_CLUSTER_NAME": "my-job-9kk2q"}, None),
        ({"MILLIJOULE_SERIES": "caf\udce9"}, "caf\\udce9"),  # Latin-1, as Python has it in `os.environ`
    ],
)
def test_attempts_of_one_submission_are_a_series(environment, series):
    assert this_epoch(environment).series == series


def starts(store, monkeypatch, **environment):
    for name in ("MILLIJOULE_ATTEMPT", "MILLIJOULE_SERIES", "SLURM_RESTART_COUNT", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return open_epoch(store, exclusive=True)


def test_a_scheduler_does_not_take_back_by_a_retry_what_another_run_has_taken_over(store, monkeypatch):
    assert starts(store, monkeypatch, SLURM_JOB_ID="7") == 1
    assert starts(store, monkeypatch, SLURM_JOB_ID="7", SLURM_RESTART_COUNT="1") == 2  # its own retry
    assert starts(store, monkeypatch) == 3  # a person's
    with pytest.raises(SupersededError, match=r"run 3 \(on .*\) has taken this job over .* Slurm job 7;"):
        starts(store, monkeypatch, SLURM_JOB_ID="7", SLURM_RESTART_COUNT="2")
    assert read_epochs(store).keys() == {1, 2, 3}, "a refused run must not supersede"
    # on purpose: a new command in the same allocation, a new word, another job
    assert starts(store, monkeypatch, SLURM_JOB_ID="7") == 4
    assert starts(store, monkeypatch, MILLIJOULE_SERIES="again") == 5
    assert starts(store, monkeypatch, SLURM_JOB_ID="8", SLURM_RESTART_COUNT="1") == 6


def test_where_nobody_counts_attempts_a_second_run_of_a_series_is_a_retry(store, monkeypatch):
    assert starts(store, monkeypatch, MILLIJOULE_SERIES="RayJob a") == 1
    assert starts(store, monkeypatch, MILLIJOULE_SERIES="RayJob b") == 2
    assert starts(store, monkeypatch, MILLIJOULE_SERIES="RayJob b") == 3
    with pytest.raises(SupersededError, match="set MILLIJOULE_SERIES to a new word"):
        starts(store, monkeypatch, MILLIJOULE_SERIES="RayJob a")
    assert starts(store, monkeypatch, MILLIJOULE_SERIES="RayJob a", MILLIJOULE_ATTEMPT="1") == 4


def test_a_series_in_another_encoding_is_recorded_and_told_apart(store, monkeypatch):
    assert starts(store, monkeypatch, MILLIJOULE_SERIES="\udce9") == 1
    assert starts(store, monkeypatch, MILLIJOULE_SERIES="\udce8", LOGNAME="\udce9") == 2
    with pytest.raises(SupersededError):
        starts(store, monkeypatch, MILLIJOULE_SERIES="\udce9")
    assert read_epochs(store).keys() == {1, 2}


def test_whoever_comes_in_between_is_seen_by_a_retry(store, monkeypatch):
    """Another submission takes the number that the retry was about to take."""
    starts(store, monkeypatch, MILLIJOULE_SERIES="a")
    create = store.put_exclusive

    def slow(key, data):
        monkeypatch.setattr(store, "put_exclusive", create)
        create(key, encode(Epoch("h", 1, "u", 1.5, series="b")))
        create(key, data)

    monkeypatch.setattr(store, "put_exclusive", slow)
    with pytest.raises(SupersededError, match="run 2 "):
        starts(store, monkeypatch, MILLIJOULE_SERIES="a")
    assert read_epochs(store).keys() == {1, 2}


def test_epochs_from_before_there_were_attempts_are_read(store):
    old = {"host": "h", "pid": 1, "user": "u", "started_unix": 1.5, "ray_job_id": None}
    store.put("_job/epochs/000007.json", json.dumps(old).encode())
    store.put("_job/epochs/000008.json", b"{")
    store.put("_job/epochs/note.txt", b"of a person")
    assert read_epochs(store) == {7: Epoch("h", 1, "u", 1.5)}


def test_a_fingerprint_that_could_lead_elsewhere_is_refused(store):
    publish_job(store, replace(JOB, fingerprint="../" * 20))
    with pytest.raises(InputError, match=r"job\.json: not a job description: its fingerprint is '\.\./"):
        require_job(store)
