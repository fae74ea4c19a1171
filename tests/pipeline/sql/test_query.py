"""Questions and SQL over the energy tables: answers, many outputs, and what a query may not do."""

import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from support.ledgers import JOB, chain, commit, image_rows, read, segment

from millijoule.jobs.query import main
from millijoule.pipeline.energy.commit_table import CommitTable
from millijoule.pipeline.energy.ledger import build_ledger
from millijoule.pipeline.energy.live_tables import LiveTables
from millijoule.pipeline.energy.rows import RowTables
from millijoule.pipeline.energy.tables import write_energy_tables
from millijoule.pipeline.energy.uncommitted import Uncommitted
from millijoule.pipeline.sql.query import CLOSURE_QUERIES, named_queries, open_tables, run_query
from millijoule.workers.errors import InputError
from millijoule.workers.records import encode
from millijoule.workers.schemas import WorkerEnvironment
from millijoule.workers.storage.open import open_store

COST = {"price_per_kwh": 0.5, "gco2_per_kwh": 100, "pue": 2.0}


def finished(folder, *, scale=1, job=JOB):
    """A finished job's output: two shards of three images, one loser, a pause; energies in units of `scale` mJ."""
    reads = [read(t, mj * scale) for t, mj in ((0, 0), (5, 40), (25, 1043), (26, 1050), (46, 2100))]
    lost = segment(read(50, 2150 * scale), read(54, 2250 * scale), "loser", "w2", 3, "a2")
    return written(folder, reads, lost, job=job)


def written(folder, reads, *others, job=JOB, estimate=None, environments=None):
    """An output of a worker that loads, makes shard 1, waits and makes shard 3 between `reads`, beside `others`."""
    store = open_store(str(folder))
    store.put("_job/job.json", encode(job, indent=2))
    kinds = ["load", "shard", "idle", "shard"]
    parts = [replace(s, shard_id=n if s.shard_id else None) for n, s in enumerate(chain(reads, kinds))]
    commits = [
        commit(
            n, "a1", 3, parts, t_start_wall_ns=5 * n * 10**9, t_end_wall_ns=(5 * n + n) * 10**9, estimate=mj
        )
        for n, mj in ((1, estimate), (3, 6))
    ]
    ledger = build_ledger([*parts, *others], {1: "a1", 3: "a1"})
    uncommitted = Uncommitted(workers={e.worker_id: e for e in environments or ()})
    write_energy_tables(store, job, ledger, CommitTable.of(commits), RowTables(image_rows), uncommitted)
    return store


def environment(worker, *gpus):
    """What a worker of host h1 says of itself."""
    where = (worker, 1, "n1", "h1", gpus[0] if gpus else "cpu", gpus)
    return WorkerEnvironment(*where, None, None, "3.11", None, "nvml-counter")


def ask(stores, query, **params):
    with open_tables(stores) as connection:
        return run_query(connection, query, params).to_pylist()


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return finished(tmp_path_factory.mktemp("query") / "out")


def test_every_question_has_a_help_line_and_runs(store):
    questions = named_queries()
    assert {*CLOSURE_QUERIES, "waste", "cost_and_carbon"} <= questions.keys()
    with open_tables([store]) as connection:
        for name, sql in questions.items():
            assert re.match(r"-- \w", sql)
            params = COST if "$" in sql else {}
            rows = run_query(connection, name, params)
            assert (rows.num_rows > 0) == (name not in CLOSURE_QUERIES), name


def test_answers(store):
    run_id = "0123456789ab"
    assert ask([store], "energy_per_node") == [
        {
            "run_id": run_id,
            "host": "h1",
            "node_id": "n1",
            "kind": "gpu",
            "devices": 1,
            "energy_mj": 2250,
            "energy_kwh": 2250 / 3.6e9,
            "known_mj": 2250,
            "segments_not_measured": 0,
            "devices_without_counter": 0,
        }
    ]
    shares = {r["segment_class"]: (r["seconds"], r["energy_mj"]) for r in ask([store], "idle_share")}
    assert shares == {
        "shard": (40, 2053),
        "loser": (4, 100),
        "gap": (4, 50),
        "load": (5, 40),
        "idle": (1, 7),
    }
    assert sum(r["energy_share"] for r in ask([store], "idle_share")) == pytest.approx(1)
    assert [(r["segment_class"], r["attempt_id"], r["energy_mj"]) for r in ask([store], "waste")] == [
        ("loser", "a2", 100),
        ("gap", None, 50),
    ]
    (per_kwh,) = ask([store], "images_per_kwh")
    assert (per_kwh["images"], per_kwh["full_mj_per_image"]) == (6, 375)
    assert per_kwh["images_per_kwh_full"] == pytest.approx(3.6e9 / 375)
    (cost,) = ask([store], "cost_and_carbon", **COST)
    kwh = 2250 / 3.6e9
    assert cost == {
        "run_id": run_id,
        "images": 6,
        "metered_kwh": pytest.approx(kwh),  # what the counters say: PUE is not in it
        "declared_pue": 2.0,
        "cost_with_pue": pytest.approx(2 * kwh / 2),
        "gco2e_with_pue": pytest.approx(2 * kwh * 100),
        "cost_per_image_with_pue": pytest.approx(2 * kwh / 2 / 6),
        "gco2e_per_image_with_pue": pytest.approx(2 * kwh * 100 / 6),
        "images_not_measured": 0,
    }
    slowest = ask([store], "slowest_shards")
    assert [(r["shard_id"], r["seconds"], r["times_median"]) for r in slowest] == [(3, 3, 1.5), (1, 1, 0.5)]
    (model,) = ask([store], "energy_per_model_and_device")
    assert (model["model"], model["device"], model["images"], model["energy_mj"]) == (
        "plain",
        "GPU-1",
        6,
        2053,
    )
    (minute,) = ask([store], "energy_over_time")
    assert (minute["energy_mj"], minute["watts"]) == (2250, pytest.approx(2.25 / 54))


# --- missing is never zero ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def partly(tmp_path_factory):
    """The read between shard 1 and the pause failed: both are missing, and what they used stands in a gap."""
    reads = [read(t, mj) for t, mj in ((0, 0), (5, 40), (25, None), (26, 1050), (46, 2100))]
    return written(tmp_path_factory.mktemp("partly") / "out", reads)


def test_a_sum_with_a_missing_part_is_null_beside_what_is_known(partly):
    (node,) = ask([partly], "energy_per_node")
    assert (node["energy_mj"], node["energy_kwh"]) == (None, None)
    assert (node["known_mj"], node["segments_not_measured"]) == (2100, 2)
    classes = {
        r["segment_class"]: (r["energy_mj"], r["energy_share"], r["known_mj"], r["segments_not_measured"])
        for r in ask([partly], "idle_share")
    }
    assert classes == {
        "load": (40, None, 40, 0),  # its own energy is known, the job's is not
        "shard": (None, None, 1050, 1),
        "idle": (None, None, None, 1),
        "gap": (1010, None, 1010, 0),
    }
    (images,) = ask([partly], "images_per_kwh")
    assert {images[c] for c in images if "_per_" in c} == {None}
    assert (images["known_direct_mj"], images["images_not_measured"]) == (1050, 3)
    (cost,) = ask([partly], "cost_and_carbon", **COST)
    assert {cost[c] for c in cost if "_with_pue" in c or "kwh" in c} == {None}
    assert (cost["images"], cost["images_not_measured"]) == (6, 6)
    (model,) = ask([partly], "energy_per_model_and_device")
    assert (model["energy_mj"], model["direct_mj_per_image"]) == (None, None)
    assert (model["known_mj"], model["shards_not_measured"]) == (1050, 1)


def test_an_estimate_of_some_images_is_not_one_of_all(store, tmp_path):
    reads = [read(t, t) for t in range(5)]
    (images,) = ask([written(tmp_path / "all", reads, estimate=3)], "images_per_kwh")
    assert images["estimate_mj_per_image"] == 1.5
    (images,) = ask([written(tmp_path / "some", reads, estimate=None)], "images_per_kwh")
    assert images["estimate_mj_per_image"] is None


def test_one_domain_of_two_is_not_the_waste(tmp_path):
    lost = segment(read(50, 10, **{"cpu:0": 5}), read(54, 30), "loser", "w2", 3, "a2")
    rows = ask([written(tmp_path / "out", [read(t, t) for t in range(5)], lost)], "waste")
    (row,) = [r for r in rows if r["segment_class"] == "loser"]
    assert (row["energy_mj"], row["known_mj"], row["domains_not_measured"]) == (None, 20, 1)


def test_a_gpu_that_nobody_read_is_missing_from_its_node(tmp_path):
    reads = [read(t, t) for t in range(5)]
    other = segment(read(1, **{"cpu:package-0": 0}), read(3, **{"cpu:package-0": 8}), "shard", "w2", 2, "a2")
    held = [environment("w1", "GPU-1"), environment("w2", "GPU-2", "GPU-1")]
    rows = {
        r["kind"]: r
        for r in ask([written(tmp_path / "out", reads, other, environments=held)], "energy_per_node")
    }
    assert rows.keys() == {"gpu", "cpu"}
    gpu = rows["gpu"]
    assert (gpu["energy_mj"], gpu["known_mj"], gpu["devices"], gpu["devices_without_counter"]) == (
        None,
        4,
        2,
        1,
    )
    assert (rows["cpu"]["energy_mj"], rows["cpu"]["devices_without_counter"]) == (8, 0)


def test_a_worker_without_any_counter_is_a_row_of_its_own(tmp_path):
    other = segment(read(1), read(3), "shard", "w2", 2, "a2")
    reads = [read(t, t) for t in range(5)]
    rows = {r["kind"]: r for r in ask([written(tmp_path / "out", reads, other)], "energy_per_node")}
    assert (rows["gpu"]["energy_mj"], rows[None]["energy_mj"]) == (4, None)
    assert (rows[None]["known_mj"], rows[None]["segments_not_measured"]) == (None, 1)


@pytest.mark.parametrize(
    ("later", "known_mj", "watts"),
    [
        (
            [read(26, 3, epoch=1), read(46, 23, epoch=1)],
            120,
            3.0,
        ),  # a reset: 20 mJ in 20 s, 100 in 20 before it
        ([read(26, 10**9), read(46, 10**9 + 20)], 120, 3.0),  # a step of a megajoule in a second
    ],
)
def test_a_minute_with_a_break_of_the_counter_has_no_energy(tmp_path, later, known_mj, watts):
    store = written(tmp_path / "out", [read(0, 0), read(5, 25), read(20, 100), *later])
    (minute,) = ask([store], "energy_over_time")
    assert (minute["energy_mj"], minute["known_mj"], minute["breaks"]) == (None, known_mj, 1)
    assert minute["watts"] == pytest.approx(watts / 1000)


def test_every_question_with_a_sum_says_what_is_missing():
    for name, sql in named_queries().items():
        if "sum(energy" in sql and not name.startswith("closure"):
            assert "known_" in sql or name == "cost_and_carbon", name
            assert re.search("AS (.*not_measured|breaks)", sql), name


def test_pue_multiplies_no_energy(store):
    (with_pue,), (without,) = (ask([store], "cost_and_carbon", **COST | {"pue": pue}) for pue in (2.0, 1.0))
    assert with_pue["metered_kwh"] == without["metered_kwh"]
    assert with_pue["cost_with_pue"] == 2 * without["cost_with_pue"]


def test_the_documented_query_gives_the_shards_energy(store):
    page = (Path(__file__).parents[3] / "docs/energy-tables.md").read_text()
    sql = page.rpartition("```sql")[2].partition("```")[0]
    assert sorted(r["energy_mj"] for r in ask([store], sql)) == [1003, 1050]


def test_many_jobs_are_told_apart(store, tmp_path):
    other = finished(tmp_path / "other", scale=2, job=replace(JOB, fingerprint="f" * 64))
    rows = ask([store, other], "energy_per_node")
    assert [(r["run_id"], r["energy_mj"]) for r in rows] == [("0123456789ab", 2250), ("f" * 12, 4500)]
    for check in CLOSURE_QUERIES:
        assert ask([store, other], check) == []


def test_the_same_job_in_two_outputs_is_not_added_up(store, tmp_path):
    again = finished(tmp_path / "again", scale=3)
    rows = ask([store, again], "energy_per_node")
    assert {r["run_id"]: r["energy_mj"] for r in rows} == {
        f"0123456789ab@{store.url}": 2250,
        f"0123456789ab@{again.url}": 6750,
    }


def test_a_running_job_beside_a_finished_one(store, tmp_path, caplog):
    running = open_store(str(tmp_path / "running"))
    job = replace(JOB, fingerprint="e" * 64)
    running.put("_job/job.json", encode(job, indent=2))
    live = LiveTables(running, job.fingerprint, 1)
    parts = chain([read(0, 0), read(20, 90), read(40, 200)], ["load", "shard"])
    live.add_commit(commit(1, "a1", 2, parts))
    live.flush()
    rows = ask([running, store], "energy_per_node")
    assert {r["run_id"]: (r["host"], r["energy_mj"]) for r in rows} == {
        "e" * 12: ("h1", 200),
        "0123456789ab": ("h1", 2250),
    }
    assert "has not finished" in caplog.text


@pytest.mark.long
def test_tables_on_s3_answer_too(moto_s3, s3_env):
    s3_env(moto_s3)
    remote = finished(f"s3://{moto_s3.make_bucket('query')}/out")
    assert [r["energy_mj"] for r in ask([remote], "energy_per_node")] == [2250]
    for check in CLOSURE_QUERIES:
        assert ask([remote], check) == []


def test_partitions_are_columns(store):
    sql = "SELECT DISTINCT run_id, date::VARCHAR AS day, output FROM counter WHERE date = DATE '1970-01-01'"
    assert ask([store], sql) == [{"run_id": "0123456789ab", "day": "1970-01-01", "output": store.url}]


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT * FROM read_text('/etc/hostname')",
        "COPY (SELECT 1) TO '{folder}/x.csv'",
        "ATTACH '{folder}/x.db'",
        "INSTALL httpfs",
        "SET enable_external_access = true",
        "SELECT * FROM secret",  # a variable of this test
        "SELECT * FROM '{folder}/out/energy/counter/*/*/*.parquet'",
    ],
)
def test_a_query_sees_the_tables_and_nothing_else(store, tmp_path, sql):
    secret = pq.read_table(store.root / "energy/counter")
    assert secret.num_rows
    with pytest.raises(InputError, match="cannot be run"):
        ask([store], sql.replace("{folder}", str(tmp_path)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("query", "params", "message"),
    [
        ("no_such_question", {}, "no question named 'no_such_question': there are closure,"),
        ("cost_and_carbon", {"pue": 1}, "--param gco2_per_kwh=VALUE, --param price_per_kwh=VALUE"),
        ("waste", {"pue": 1}, "no parameter pue"),
        ("SELEC 1", {}, "cannot be run"),
    ],
)
def test_bad_queries_are_explained(store, query, params, message):
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        ask([store], query, **params)


def test_an_output_without_tables_is_refused(tmp_path):
    store = open_store(str(tmp_path / "out"))
    with pytest.raises(InputError, match="no job here"):
        ask([store], "waste")
    store.put("_job/job.json", encode(JOB))
    with pytest.raises(InputError, match="no energy tables yet"):
        ask([store], "waste")


# --- tampering is found by SQL alone ------------------------------------------------------------------------------


def edit(store, table, change):
    (key,) = [i.key for i in store.list(f"energy/{table}/")]
    with store.open_input(key) as source:
        rows = pq.ParquetFile(source).read()
    edited = rows.to_pylist()
    change(edited)
    pq.write_table(rows.from_pylist(edited, rows.schema), store.root / key)


@pytest.mark.parametrize(
    ("table", "change", "broken"),
    [
        ("segment", lambda rows: rows[1].update(energy_mj=1002), {"closure_c1", "closure_c2"}),
        ("segment", lambda rows: rows[0].update(energy_mj=None), {"closure_c1", "closure_c2"}),
        ("segment", lambda rows: rows.pop(4), {"closure_c1", "closure_c2", "closure_c5"}),  # the loser
        ("counter", lambda rows: rows[-1].update(energy_mj=2251), {"closure_c1"}),
        ("image", lambda rows: rows[0].update(energy_direct_mj=336), {"closure_c2"}),
        ("image", lambda rows: rows[5].update(energy_full_mj=None), {"closure_c2"}),
        ("image", lambda rows: rows.pop(), {"closure_c2", "closure_c5"}),
        ("image", lambda rows: rows[0].update(attempt_id="a2"), {"closure_c2", "closure_c5"}),
        ("image", lambda rows: rows[0].update(prompt_id="p1-1"), {"closure_c5"}),
        (
            "attempt",
            lambda rows: rows[2].update(outcome="committed", images_ok=0),
            {"closure_c2", "closure_c5"},
        ),
        ("attempt", lambda rows: rows[0].update(energy_mj=1), {"closure_c2"}),
    ],
)
def test_an_edited_table_does_not_close(tmp_path, table, change, broken):
    store = finished(tmp_path / "out")
    edit(store, table, change)
    assert {check for check in CLOSURE_QUERIES if ask([store], check)} == broken


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command_prints_what_is_asked(store, capsysbinary, tmp_path):
    sql = "SELECT segment_class, sum(energy_mj)::BIGINT AS mj, NULL AS none FROM segment GROUP BY ALL ORDER BY mj LIMIT 2"
    assert main([sql, store.url]) == 0
    assert capsysbinary.readouterr().out.decode().splitlines() == [
        "segment_class  mj  none",
        "idle            7  -",
        "load           40  -",
        "(2 rows)",
    ]
    assert main([sql, store.url, "--format", "json"]) == 0
    assert [json.loads(line) for line in capsysbinary.readouterr().out.splitlines()] == [
        {"segment_class": "idle", "mj": 7, "none": None},
        {"segment_class": "load", "mj": 40, "none": None},
    ]
    assert main([sql, store.url, "--format", "csv"]) == 0
    assert capsysbinary.readouterr().out == b'"segment_class","mj","none"\n"idle",7,\n"load",40,\n'
    assert main([sql, store.url, "--format", "parquet", "--save", str(tmp_path / "x.parquet")]) == 0
    assert pq.read_table(tmp_path / "x.parquet")["mj"].to_pylist() == [7, 40]


def test_lists_and_what_is_no_number_have_cells_in_every_format(store, capsysbinary, tmp_path):
    sql = "SELECT [1, 2] AS list, {'a': 'x,y', 'b': NULL} AS record, 'nan'::DOUBLE AS odd, [1.5, '-inf'::DOUBLE] AS far"
    assert main([sql, store.url, "--format", "csv"]) == 0
    (row,) = csv.DictReader(io.StringIO(capsysbinary.readouterr().out.decode()))
    assert json.loads(row["list"]) == [1, 2]
    assert json.loads(row["record"]) == {"a": "x,y", "b": None}
    assert json.loads(row["far"]) == [1.5, None]
    assert main([sql, store.url, "--format", "json"]) == 0

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    found = json.loads(capsysbinary.readouterr().out, parse_constant=refuse)
    assert found == {"list": [1, 2], "record": {"a": "x,y", "b": None}, "odd": None, "far": [1.5, None]}
    for form in ("table", "parquet"):
        assert main([sql, store.url, "--format", form, "--save", str(tmp_path / form)]) == 0


def test_outputs_are_given_by_place_or_by_name(store, capsysbinary):
    assert main(["idle_share", "--output", store.url]) == 0
    named = capsysbinary.readouterr().out
    assert main(["idle_share", store.url]) == 0
    assert capsysbinary.readouterr().out == named


def test_the_command_takes_parameters_and_lists_questions(store, capsysbinary):
    params = [f"{k}={v}" for k, v in COST.items()]
    assert main(["cost_and_carbon", store.url, "--format", "json", "--param", *params]) == 0
    assert json.loads(capsysbinary.readouterr().out)["images"] == 6
    assert main(["--list"]) == 0
    assert b"closure_c1  " in capsysbinary.readouterr().out


def test_the_command_explains_what_is_wrong(store, capsysbinary):
    for arguments, words, code in (
        (["waste"], b"at least one output", 2),
        (["waste", store.url, "--param", "pue"], b"--param pue: NAME=VALUE", 2),
        (["wast", store.url], b"no question named 'wast': did you mean waste?", 1),
        (["idle-share", store.url], b"no question named 'idle-share': did you mean idle_share?", 1),
    ):
        assert main(arguments) == code
        assert words in capsysbinary.readouterr().err
