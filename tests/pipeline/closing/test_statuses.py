"""What became of each image, from the worker that says so to all that is left of a job: files, tables, books, report.

Shards are drawn by a generator of which the prompt says what it makes of it, beside a counter whose watts are constant.
"""

import io
import json
import tarfile
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from support.local_job import plan, runner, work
from support.models import Careful, Plain
from support.report_outputs import Clock, WattMeter

from millijoule.pipeline.closing.check import check_output
from millijoule.pipeline.closing.finish import finish_job
from millijoule.pipeline.energy.carbon import Rates
from millijoule.pipeline.energy.schemas import ADDED_COLUMNS
from millijoule.pipeline.output.job import open_epoch
from millijoule.pipeline.planning.retry_rounds import load_job_shards, plan_retry_round
from millijoule.pipeline.report.data import collect_report
from millijoule.pipeline.report.page import render_page
from millijoule.pipeline.report.terminal import print_report
from millijoule.pipeline.running.coordinator import Coordinator
from millijoule.pipeline.running.progress import closing_lines
from millijoule.pipeline.sql.query import CLOSURE_QUERIES, open_tables, run_query
from millijoule.workers.layout import commit_key

#: By what becomes of them: 14 accepted (two with warnings), 3 filtered, 2 that are no numbers, 1 refused.
PROMPTS = [
    *("a cat", "a dog", "a hidden face", "a strange zorgon", "a nan", "a hut", "a cow", "refused"),
    *(
        "a hat",
        "a mat",
        "a bat",
        "a rat",
        "hidden strange <b>sight</b>",
        "hidden again",
        "the nan",
        "a strange pot",
    ),
    *(f"picture {i}" for i in range(4)),
]
EXPECTED = {"ok": 14, "filtered": 3, "quarantined": 3}
DRAWN = 19
WATTS, SECONDS_PER_IMAGE = 50.0, 0.0101


def expected_status(prompt):
    if "hidden" in prompt:
        return "filtered"
    return "quarantined" if "nan" in prompt or "refused" in prompt else "ok"


def job(folder, *, shard_size=8, output_format="parquet", prompts=PROMPTS):
    """A finished job: its store and what was planned."""
    store, planned = plan(folder, prompts, shard_size=shard_size, output_format=output_format)
    clock = Clock()
    meter = WattMeter(clock, "boot", {"cpu:package-0": WATTS})
    work(store, planned, Careful("cpu", lambda: clock.sleep(SECONDS_PER_IMAGE)), meter)
    return store, planned


def manifest(store):
    with store.open_input("manifest.parquet") as source:
        return pq.ParquetFile(source).read().to_pylist()


def stats_of(store):
    return json.loads(store.get("stats.json"))


def energy_rows(store, table):
    rows = []
    for item in store.list(f"energy/{table}/"):
        with store.open_input(item.key) as source:
            rows += pq.ParquetFile(source).read().to_pylist()
    return rows


def images_in_files(store, output_format):
    """(prompt id, image index) of every encoded image in the data files."""
    found = []
    for item in store.list("data/"):
        data = store.get(item.key)
        if output_format == "files" and item.key.endswith(".png"):
            found.append(item.key.rpartition("/")[2].removesuffix(".png"))
        elif item.key.endswith(".tar"):
            with tarfile.open(fileobj=io.BytesIO(data)) as tar:
                found += [name.removesuffix(".png") for name in tar.getnames() if name.endswith(".png")]
        elif output_format == "parquet" and item.key.endswith(".parquet"):
            table = pq.ParquetFile(io.BytesIO(data)).read(columns=["prompt_id", "image_index", "image"])
            rows = table.to_pylist()
            found += [f"{r['prompt_id']}_{r['image_index']}" for r in rows if r["image"] is not None]
    return Counter(found)


@pytest.mark.parametrize("shard_size", [8, 20], ids=["rows in commits", "rows in tables"])
@pytest.mark.parametrize("output_format", ["parquet", "webdataset", "files"])
def test_a_row_says_what_happened_and_only_an_accepted_one_has_an_image(tmp_path, output_format, shard_size):
    store, _ = job(tmp_path, shard_size=shard_size, output_format=output_format)
    rows = manifest(store)
    assert {r["prompt"]: r["status"] for r in rows} == {p: expected_status(p) for p in PROMPTS}
    for row in rows:
        has = [row[name] is not None for name in ("path", "sha256", "size_bytes")]
        assert has == [row["status"] == "ok"] * 3
        assert (row["error"] is None) == (row["status"] == "ok")
        assert (row["width"] is None) == (row["prompt"] == "refused")
    accepted = Counter(f"{r['prompt_id']}_{r['image_index']}" for r in rows if r["status"] == "ok")
    assert images_in_files(store, output_format) == accepted
    assert list(check_output(store)) == []


def test_totals_and_success_count_each_status_and_reasons_by_status(tmp_path):
    store, _ = job(tmp_path)
    stats = stats_of(store)
    assert {s: stats[f"images_{s}"] for s in EXPECTED} == EXPECTED
    assert {s: json.loads(store.get("_SUCCESS"))[f"images_{s}"] for s in EXPECTED} == EXPECTED
    assert stats["filter_reasons"] == {"the safety checker hid this image": 3}
    assert stats["errors"] == {"its pixels are not finite numbers": 2, "RowError: no such picture": 1}
    commits = [json.loads(store.get(commit_key(shard))) for shard in range(3)]
    assert sum(sum(c["errors"].values()) for c in commits) == 6
    for status, n in EXPECTED.items():
        assert sum(c[f"images_{status}"] for c in commits) == n
    assert sum(c["images_drawn"] for c in commits) == DRAWN


def test_every_drawn_image_used_the_same_and_what_nobody_got_is_waste_to_the_millijoule(tmp_path):
    store, _ = job(tmp_path)
    shards = {
        s["shard_id"]: s["energy_mj"] for s in energy_rows(store, "segment") if s["segment_class"] == "shard"
    }
    rows, stats = manifest(store), stats_of(store)
    for shard_id, energy_mj in shards.items():
        mine = [r["energy_mj"] for r in rows if r["shard_id"] == shard_id and r["energy_mj"] is not None]
        assert sum(mine) == energy_mj
        assert max(mine) - min(mine) <= 1
        assert energy_mj >= WATTS * 1000 * SECONDS_PER_IMAGE * len(mine)
    of_status = {
        status: sum(r["energy_mj"] or 0 for r in rows if r["status"] == status) for status in EXPECTED
    }
    assert stats["rejected_mj"] == {s: of_status[s] for s in ("filtered", "quarantined")}
    assert min(of_status.values()) > 0
    images = energy_rows(store, "image")
    assert len(images) == EXPECTED["ok"]
    assert sum(r["energy_direct_mj"] for r in images) == of_status["ok"]
    assert stats["direct_mj_per_image"] == of_status["ok"] / EXPECTED["ok"]
    assert sum(r["energy_full_mj"] for r in images) == stats["energy"]["total_mj"]
    assert stats["full_mj_per_image"] == stats["energy"]["total_mj"] / EXPECTED["ok"]
    assert {c: stats["closure"][c] for c in ("C1", "C2", "C5")} == dict.fromkeys(("C1", "C2", "C5"), True)
    attempts = energy_rows(store, "attempt")
    assert sum(a["energy_filtered_mj"] for a in attempts) == of_status["filtered"]
    assert sum(a["energy_quarantined_mj"] for a in attempts) == of_status["quarantined"]


def test_a_shard_without_any_accepted_image_is_waste_as_a_whole(tmp_path):
    store, _ = job(tmp_path, prompts=["hidden", "hidden", "refused", "refused", "a", "b"], shard_size=2)
    by_shard = {a["shard_id"]: a for a in energy_rows(store, "attempt")}
    assert by_shard[0]["energy_filtered_mj"] == by_shard[0]["energy_mj"] > 0
    assert by_shard[1]["energy_quarantined_mj"] == by_shard[1]["energy_mj"]
    assert (by_shard[2]["energy_filtered_mj"], by_shard[2]["energy_quarantined_mj"]) == (0, 0)
    assert stats_of(store)["direct_mj_per_image"] == by_shard[2]["energy_mj"] / 2
    assert list(check_output(store)) == []


def test_no_energy_of_rejected_images_is_known_where_a_shard_was_not_measured(tmp_path):
    store, planned = plan(tmp_path, PROMPTS)
    work(store, planned, Careful("cpu"), WattMeter(Clock(), "boot", {}, method="missing"))
    stats = stats_of(store)
    assert stats["rejected_mj"] == {"filtered": None, "quarantined": None}
    assert all(mj is not None for mj in stats["rejected_estimate_mj"].values())
    assert {r["energy_mj"] for r in manifest(store)} == {None}


# --- retry and resume -------------------------------------------------------------------------------------------------


def test_a_retry_is_for_quarantined_images_and_their_first_energy_stays_waste(tmp_path):
    store, planned = job(tmp_path)
    before = stats_of(store)
    assert plan_retry_round(store, planned).images == EXPECTED["quarantined"]
    clock = Clock()
    clock.sleep(100.0)
    meter = WattMeter(clock, "boot", {"cpu:package-0": WATTS})

    class Calm(Plain):
        def draw(self, request):
            clock.sleep(SECONDS_PER_IMAGE)
            return super().draw(request)

    work(store, planned, Calm("cpu"), meter)
    after = stats_of(store)
    assert (after["images_ok"], after["images_filtered"], after["images_quarantined"]) == (17, 3, 0)
    assert after["rejected_mj"] == before["rejected_mj"]
    assert sum(r["energy_full_mj"] for r in energy_rows(store, "image")) == after["energy"]["total_mj"]
    assert list(check_output(store)) == []
    assert plan_retry_round(store, planned).images == 0


def test_a_job_that_goes_on_keeps_what_was_filtered(tmp_path):
    store, planned = plan(tmp_path, PROMPTS)
    shards = load_job_shards(store, planned)
    epoch = open_epoch(store, exclusive=True)
    lease = Coordinator(shards, np.zeros(len(shards), bool), 60.0, epoch).next_lease("w1", 0.0)
    first = runner(store, planned, epoch, Careful("cpu")).run(lease)
    store.put_exclusive(commit_key(lease.shard.shard_id), first.commit_json)
    body = store.get(commit_key(lease.shard.shard_id))
    work(store, planned, Careful("cpu"))
    assert store.get(commit_key(lease.shard.shard_id)) == body
    assert {s: stats_of(store)[f"images_{s}"] for s in EXPECTED} == EXPECTED


# --- outputs from before there were filtered images -------------------------------------------------------------------

ADDED_STATS = (
    *("images_filtered", "filter_reasons", "images_with_warnings", "warning_kinds"),
    *("rejected_mj", "rejected_estimate_mj"),
)


def age(store, planned):
    """Make the output one of the version before: of commits, tables and totals without what was added."""
    shards = load_job_shards(store, planned)
    for shard_id in range(len(shards)):
        body = json.loads(store.get(commit_key(shard_id)))
        for name in ("images_filtered", "images_drawn"):
            del body[name]
        store.put(commit_key(shard_id), json.dumps(body).encode())
    finish_job(store, planned, shards)
    for item in store.list("energy/"):
        with store.open_input(item.key) as source:
            table = pq.ParquetFile(source).read()
        name = item.key.split("/")[1]
        table = table.drop_columns(list(ADDED_COLUMNS["3"].get(name, ())))
        metadata = table.schema.metadata | {b"millijoule.schema_version": b"3"}
        sink = io.BytesIO()
        pq.write_table(table.replace_schema_metadata(metadata), sink)
        store.put(item.key, sink.getvalue())
    stats = {k: v for k, v in stats_of(store).items() if k not in ADDED_STATS}
    store.put("stats.json", json.dumps(stats).encode())


@pytest.fixture
def old(tmp_path):
    prompts = ["a cat", "a dog", "refused", "a strange hat", "refused", "refused", "refused", "refused"]
    store, planned = job(tmp_path, prompts=prompts, shard_size=4)
    age(store, planned)
    return store, planned


def test_an_old_output_is_sound_as_it_is_and_again_when_it_is_finished_anew(old):
    store, planned = old
    assert list(check_output(store)) == []
    with open_tables([store]) as connection:
        for name in CLOSURE_QUERIES:
            assert run_query(connection, name, {}).num_rows == 0
        (model,) = run_query(connection, "energy_per_model_and_device", {}).to_pylist()
    finish_job(store, planned, load_job_shards(store, planned))
    assert list(check_output(store)) == []
    assert (model["images"], model["images_filtered"], model["rejected_mj"]) == (3, 0, 0)


def test_images_of_an_old_commit_have_all_of_its_energy_as_they_had(old):
    store, _ = old
    shards = [s["energy_mj"] for s in energy_rows(store, "segment") if s["segment_class"] == "shard"]
    assert sum(r["energy_direct_mj"] for r in energy_rows(store, "image")) == shards[0]
    assert stats_of(store)["direct_mj_per_image"] == sum(shards) / 3


def test_an_old_output_still_reports(old):
    store, _ = old
    (found,) = collect_report([store], Rates()).jobs
    assert (found.images_filtered, found.images_with_warnings) == (0, None)
    assert found.warnings == {"unknown word: 'hat'": 1}
    assert "filtered" not in {row.segment_class for row in found.classes}
    assert b"3 images" in render_page(collect_report([store], Rates()))


def test_a_column_that_an_old_table_should_have_is_missed(old):
    store, _ = old
    (item,) = store.list("energy/attempt/")
    with store.open_input(item.key) as source:
        table = pq.ParquetFile(source).read()
    sink = io.BytesIO()
    pq.write_table(table.drop_columns(["images_ok"]), sink)
    store.put(item.key, sink.getvalue())
    (problem,) = [p for p in check_output(store) if "energy/attempt" in p]
    assert "has columns" in problem


# --- what people read -------------------------------------------------------------------------------------------------


def test_the_last_lines_name_filtered_and_quarantined_images_and_kinds_of_warning(tmp_path):
    store, _ = job(tmp_path)
    lines = closing_lines(stats_of(store), "out")
    assert lines[0].endswith(" images/s from first start to last commit")  # pauses between runs are in it
    (filtered,) = [line for line in lines if line.startswith("images filtered: 3")]
    assert "of waste" in filtered
    (quarantined,) = [line for line in lines if line.startswith("images quarantined: 3")]
    assert (
        lines.index(filtered)
        < lines.index("  3 x the safety checker hid this image")
        < lines.index(quarantined)
    )
    at = lines.index("images with warnings: 3; manifest.parquet has those of each image")
    assert lines[at + 1].startswith("  3 x unknown word, such as \"unknown word: '")


def test_the_report_shows_what_was_filtered_as_waste_and_escapes_what_prompts_say(tmp_path):
    store, _ = job(tmp_path)
    report, stats = collect_report([store], Rates()), stats_of(store)
    (found,) = report.jobs
    rows = {row.segment_class: row for row in found.classes}
    rejected = stats["rejected_mj"]
    assert {s: (rows[s].energy_mj, rows[s].group) for s in rejected} == {
        status: (mj, "waste") for status, mj in rejected.items()
    }
    shard_mj = stats["energy"]["shard_mj"]
    assert rows["shard"].energy_mj == shard_mj - sum(rejected.values())
    assert sum(row.energy_mj for row in found.classes) == stats["energy"]["total_mj"]
    assert [row.direct_mj_per_image for row in found.devices] == [stats["direct_mj_per_image"]]
    flags = {flag.name: flag for flag in found.flags}
    assert (flags["images filtered"].level, flags["images with warnings"].level) == ("caution", "note")
    assert flags["images with warnings"].text.startswith("3 images; the kinds stand below")
    page = render_page(report).decode()
    assert "3 filtered, 3 quarantined" in page
    assert "Filtered by the model" in page
    assert "the safety checker hid this image" in page
    assert "<b>sight" not in page
    out = io.StringIO()
    print_report(report, Console(file=out, width=160, force_terminal=True, color_system=None))
    assert "14 images" in out.getvalue()
    assert "3 filtered, 3 quarantined" in out.getvalue()
    assert "3 x the safety checker hid this image" in out.getvalue()
    assert out.getvalue().count("unknown word") == 1


def test_queries_say_what_the_images_that_nobody_got_cost(tmp_path):
    store, _ = job(tmp_path)
    rejected = stats_of(store)["rejected_mj"]
    with open_tables([store]) as connection:
        rows = run_query(connection, "images_not_accepted", {}).to_pylist()
        waste = run_query(connection, "waste", {}).to_pylist()
        assert [run_query(connection, name, {}).num_rows for name in CLOSURE_QUERIES] == [0] * 4
        (model,) = run_query(connection, "energy_per_model_and_device", {}).to_pylist()
    assert [(r["status"], r["images"], r["energy_mj"]) for r in rows] == [
        (status, 3, rejected[status]) for status in ("filtered", "quarantined")
    ]
    for status, mj in rejected.items():
        assert sum(r["energy_mj"] for r in waste if r["segment_class"] == status) == mj
    assert (model["images_filtered"], model["rejected_mj"]) == (3, sum(rejected.values()))
    assert model["direct_mj_per_image"] == stats_of(store)["direct_mj_per_image"]


@pytest.mark.parametrize("column", ["energy_filtered_mj", "energy_quarantined_mj"])
def test_waste_that_is_hidden_is_found_in_sql_and_by_check(tmp_path, column):
    store, _ = job(tmp_path)
    (item,) = store.list("energy/attempt/")
    with store.open_input(item.key) as source:
        table = pq.ParquetFile(source).read()
    zeros = pa.array([0] * table.num_rows, pa.int64())
    at = table.schema.get_field_index(column)
    sink = io.BytesIO()
    pq.write_table(table.set_column(at, table.schema.field(at), zeros), sink)
    store.put(item.key, sink.getvalue())
    with open_tables([store]) as connection:
        assert run_query(connection, "closure_c2", {}).num_rows > 0
    assert [p for p in check_output(store) if column in p]


# --- check ------------------------------------------------------------------------------------------------------------


def change_commit(store, change):
    body = json.loads(store.get(commit_key(0)))
    change(body)
    store.put(commit_key(0), json.dumps(body).encode())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.update(images_filtered=0, images_quarantined=3), "the commit says"),
        (lambda c: c.update(images_drawn=8), "the commit says"),
        (
            lambda c: c.update(images_ok=6, images_filtered=0),
            "rows say 5 ok, 1 filtered, 2 quarantined, 7 drawn",
        ),
    ],
)
def test_a_commit_that_counts_otherwise_is_named(tmp_path, change, words):
    store, _ = job(tmp_path)
    change_commit(store, change)
    assert any(words in problem for problem in check_output(store))


@pytest.mark.parametrize(
    ("row", "column", "value", "words"),
    [
        (2, "path", "data/x.png", "is filtered and has a path"),
        (0, "path", None, "is ok and has no path"),
        (0, "status", "fine", "has status 'fine'"),
    ],
)
def test_a_row_table_that_says_what_cannot_be_is_named(tmp_path, row, column, value, words):
    store, _ = job(tmp_path)
    key = json.loads(store.get(commit_key(0)))["rows_path"]
    with store.open_input(key) as source:
        table = pq.ParquetFile(source).read()
    rows = table.to_pylist()
    rows[row][column] = value
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, table.schema), sink)
    store.put(key, sink.getvalue())
    assert any(words in problem for problem in check_output(store, images=False))
