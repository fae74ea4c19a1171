"""`millijoule report --statement`: what is filed follows from counters, and what is missing stays missing."""

from __future__ import annotations

import csv
import io
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from support.local_job import plan, work
from support.models import Fussy
from support.report_outputs import GPUS, change_stats, measured_output, unmeasured_output

from millijoule.jobs.report import NOT_STATED, main
from millijoule.pipeline.planning.retry_rounds import plan_retry_round
from millijoule.pipeline.statements.job_energy import _first_attempt
from millijoule.workers.storage.open import open_store

PROMPTS = [f"prompt {i}" for i in range(12)]
GRID = ["--gco2-per-kwh", "400"]
EMBODIED = ["--embodied", "recorded=164/4", "node=1300/5*0.5"]
MJ_PER_KWH = 3.6e9


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> str:
    return measured_output(tmp_path_factory.mktemp("measured"), PROMPTS).url


@pytest.fixture(scope="module")
def unmeasured(tmp_path_factory) -> str:
    return unmeasured_output(tmp_path_factory.mktemp("unmeasured"), PROMPTS).url


def copy_of(output: str, folder: Path):
    there = open_store(str(folder))
    for item in (here := open_store(output)).list():
        there.put(item.key, here.get(item.key))
    return there


def table(output: str, name: str) -> list[dict]:
    return ds.dataset(f"{output}/energy/{name}").to_table().to_pylist()


def edit_table(output: str, name: str, column: str, change) -> None:
    """Give every row of a table another value in `column`: what `change` makes of the row."""
    for part in (Path(output) / "energy" / name).rglob("*.parquet"):
        rows = pq.ParquetFile(part).read()
        place = rows.schema.get_field_index(column)
        field = rows.schema.field(place)
        values = pa.array([change(row) for row in rows.to_pylist()], field.type)
        pq.write_table(rows.set_column(place, field, values), part)


def counted_mj(output: str, family: str) -> int:
    """By how much the counters of a family grew, from the raw reads alone."""
    reads: dict[tuple[str, str], list[int]] = {}
    for row in table(output, "counter"):
        if row["domain"].startswith(family):
            reads.setdefault((row["boot_id"], row["domain"]), []).append(row["energy_mj"])
    return sum(max(of) - min(of) for of in reads.values())


def held_hours(output: str) -> dict[str, float]:
    """Seconds from the first to the last segment of each worker, from the raw rows, in hours."""
    ends: dict[str, tuple[int, int]] = {}
    for row in table(output, "segment"):
        if row["worker_id"] is not None:
            first, last = ends.get(row["worker_id"], (row["t_open_mono_ns"], row["t_close_mono_ns"]))
            ends[row["worker_id"]] = (
                min(first, row["t_open_mono_ns"]),
                max(last, row["t_close_mono_ns"]),
            )
    return {worker: (last - first) / 3.6e12 for worker, (first, last) in ends.items()}


def stated(capsys, *words: str) -> tuple[int, dict]:
    code = main([*words, "--statement", "sci", "--json", "-"])
    return code, json.loads(capsys.readouterr().out)


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_the_carbon_intensity_of_an_image_follows_from_the_counters(measured, capsys):
    code, sci = stated(capsys, measured, *GRID, *EMBODIED, "--pue", "1.2", "--location", "DE")
    assert code == 0
    kwh = counted_mj(measured, "") / MJ_PER_KWH
    job = sci["jobs"][0]
    assert job["e_kwh"] == pytest.approx(kwh, rel=1e-12)
    assert job["o_grams"] == pytest.approx(kwh * 400 * 1.2, rel=1e-12)
    hours = held_hours(measured)
    a_year = 8766.0
    gpus = 164_000 * sum(hours.values()) / (4 * a_year)
    nodes = 1_300_000 * (max(hours["w0"], hours["w1"]) + hours["w2"]) / (5 * a_year) * 0.5
    assert job["m_grams"] == pytest.approx(gpus + nodes, rel=0.05)  # wall clocks of two workers on a node
    (gpu_part,) = (p for p in job["m_parts"] if p["kind"] != "node")
    assert gpu_part["grams"] == pytest.approx(gpus, rel=1e-3)
    per_image = (job["o_grams"] + job["m_grams"]) / 12
    assert job["sci_grams_per_image"] == sci["sci_grams_per_image"] == pytest.approx(per_image)
    assert (job["location"], job["r_images"], job["evidence_class"]) == ("DE", 12, "E1")
    assert job["missing"] == []
    assert any("network" in line for line in job["excluded"])


def test_the_text_states_boundary_and_method(measured, capsys):
    assert main([measured, "--statement", "sci", *GRID, *EMBODIED]) == 0
    shown = capsys.readouterr().out
    for words in (
        "ISO/IEC 21031",
        "R = one accepted image",
        "location-based",
        "not in it:",
        "evidence class: E1",
    ):
        assert words in shown


def test_a_job_with_an_unmeasured_device_has_no_energy_and_nothing_stands_in(measured, unmeasured, capsys):
    code, sci = stated(capsys, measured, unmeasured, *GRID, *EMBODIED)
    assert code == NOT_STATED
    whole, without = sci["jobs"]
    assert whole["sci_grams_per_image"] is not None
    assert [without[k] for k in ("e_kwh", "o_grams", "sci_grams_per_image")] == [None] * 3
    assert without["i_gco2e_per_kwh"] == 400
    assert [sci[k] for k in ("e_kwh", "o_grams", "sci_grams_per_image")] == [None] * 3
    assert sci["r_images"] == 24
    assert any("was never read" in reason for reason in sci["missing"])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (EMBODIED, "I: no carbon intensity was given"),
        ([*GRID, "--embodied", "recorded=164/4"], "M: nothing is declared of 'node'"),
        ([*GRID, "--embodied", "node=1300/5"], "M: nothing is declared of 'GPU, model not recorded'"),
    ],
)
def test_a_part_that_was_not_declared_takes_the_result_with_it(measured, capsys, options, reason):
    code, sci = stated(capsys, measured, *options)
    assert code == NOT_STATED
    assert sci["sci_grams_per_image"] is None
    assert sci["e_kwh"] is not None
    assert any(reason in line for line in sci["missing"])


def test_an_intensity_that_does_not_cover_the_job_is_missing(measured, tmp_path, capsys):
    rates = tmp_path / "grid.csv"
    rates.write_text("time,value\n2020-01-01T00:00,300\n2020-01-01T01:00,310\n")
    code, sci = stated(capsys, measured, "--gco2-per-kwh", str(rates), *EMBODIED)
    assert code == NOT_STATED
    assert sci["jobs"][0]["i_gco2e_per_kwh"] is None
    assert sci["jobs"][0]["o_grams"] is None
    assert any("does not cover" in line for line in sci["missing"])


def test_an_account_without_an_end_leaves_energy_and_hours_missing(measured, tmp_path, capsys):
    store = copy_of(measured, tmp_path / "unclosed")
    stats = json.loads(store.get("stats.json"))
    lost = {"worker_id": "w2", "host": "host-b", "devices": [f"gpu:{GPUS[2]}"], "since": "", "reason": "gone"}
    change_stats(store, energy=stats["energy"] | {"total_mj": None, "unclosed": [lost]})
    code, sci = stated(capsys, store.url, *GRID, *EMBODIED)
    assert code == NOT_STATED
    assert sci["jobs"][0]["e_kwh"] is None
    assert sci["jobs"][0]["m_grams"] is None
    assert any("nobody read it when worker w2 had ended" in line for line in sci["missing"])


def test_a_stretch_that_was_not_read_leaves_its_kind_without_energy(measured, tmp_path, capsys):
    store = copy_of(measured, tmp_path / "hole")
    stats = json.loads(store.get("stats.json"))
    change_stats(store, energy=stats["energy"] | {"total_mj": None})
    (part,) = (Path(store.url) / "energy/segment").rglob("*.parquet")
    rows = pq.read_table(part)
    energy = rows["energy_mj"].to_pylist()
    (hole, *_) = (i for i, d in enumerate(rows["domain"].to_pylist()) if d == f"gpu:{GPUS[0]}")
    energy[hole] = None
    place = rows.schema.get_field_index("energy_mj")
    pq.write_table(rows.set_column(place, rows.schema.field(place), pa.array(energy, pa.int64())), part)
    assert main([store.url, "--statement", "scope3"]) == NOT_STATED
    cpu, gpu = rows_of(capsys.readouterr().out)
    assert (gpu["measured_kwh"], gpu["evidence_class"]) == ("", "E0")
    assert 0 < float(gpu["counted_kwh"]) < counted_mj(measured, "gpu:") / MJ_PER_KWH
    assert "1 stretch of gpu:" in gpu["missing"]
    assert float(cpu["measured_kwh"]) == pytest.approx(counted_mj(measured, "cpu:") / MJ_PER_KWH)
    assert "of the job:" in cpu["missing"]


def test_tables_and_totals_that_differ_are_no_statement(measured, tmp_path, capsys):
    store = copy_of(measured, tmp_path / "differs")
    stats = json.loads(store.get("stats.json"))
    change_stats(store, energy=stats["energy"] | {"total_mj": stats["energy"]["total_mj"] + 1})
    assert main([store.url, "--statement", "sci"]) == 1
    assert "`millijoule check` says more" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"images_ok": 1200}, "have 12 accepted images, stats.json has 1,200"),
        ({"evidence_class": "E2"}, "states evidence class E2, its closure checks show E1 at most"),
        ({"evidence_class": "E4"}, "states evidence class E4"),
        ({"evidence_class": "certified"}, "states evidence class certified"),
    ],
)
@pytest.mark.parametrize("statement", ["sci", "scope3"])
def test_totals_that_say_more_than_the_tables_are_no_statement(
    measured, tmp_path, capsys, changes, words, statement
):
    store = copy_of(measured, tmp_path / "more")
    change_stats(store, **changes)
    assert main([store.url, "--statement", statement, *GRID]) == 1
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.out == ""


def test_a_failed_check_bears_out_no_class_but_e0(measured, tmp_path, capsys):
    store = copy_of(measured, tmp_path / "failed")
    edit_table(store.url, "closure", "passed", lambda row: False if row["check"] == "C2" else row["passed"])
    assert main([store.url, "--statement", "sci", *GRID]) == 1
    assert "its closure checks show E0 at most" in capsys.readouterr().err


def test_a_job_that_has_not_finished_is_no_statement(tmp_path, capsys):
    store, job = plan(tmp_path, PROMPTS, shard_size=4)
    work(store, job, Fussy("cpu"))
    assert main([store.url, "--statement", "scope3"]) == NOT_STATED  # no counter
    assert plan_retry_round(store, job).images == 6
    capsys.readouterr()
    for statement in ("sci", "scope3"):
        assert main([store.url, "--statement", statement]) == 1
        assert "a retry of 2 shards has begun and not finished" in capsys.readouterr().err
    assert main([store.url]) == 0
    assert "not finished: A retry of 2 shards has begun" in capsys.readouterr().out
    work(store, job, Fussy("cpu"))
    assert main([store.url, "--statement", "scope3"]) == NOT_STATED
    store.delete(["_SUCCESS"])
    assert main([store.url, "--statement", "scope3"]) == 1
    assert "it has no _SUCCESS" in capsys.readouterr().err


def at_another_time(measured: str, folder: Path, later_ns: int) -> str:
    """The job of `measured` as another one of the same hosts, so much later."""
    url = copy_of(measured, folder).url
    for column in ("t_open_mono_ns", "t_close_mono_ns", "t_open_wall_ns"):
        edit_table(url, "segment", column, lambda row, column=column: row[column] + later_ns)
    edit_table(url, "attempt", "attempt_id", lambda row: f"{row['attempt_id']}-other")
    return url


def test_energy_that_two_jobs_counted_at_one_time_is_missing_where_both_are_stated(
    measured, tmp_path, capsys
):
    at_once = at_another_time(measured, tmp_path / "at-once", 1)
    options = [*GRID, *EMBODIED]
    code, sci = stated(capsys, measured, at_once, *options)
    assert code == NOT_STATED
    assert [job["e_kwh"] for job in sci["jobs"]] == [None, None]
    assert [sci[k] for k in ("e_kwh", "o_grams", "sci_grams_per_image")] == [None] * 3
    assert sci["m_grams"] is not None
    assert sum(f"{at_once} counted gpu:" in reason for reason in sci["missing"]) == len(GPUS)
    for alone in (measured, at_once):
        assert stated(capsys, alone, *options)[0] == 0
    assert main([measured, at_once, "--statement", "scope3", *GRID]) == NOT_STATED
    for row in rows_of(capsys.readouterr().out):
        assert (row["measured_kwh"], row["measured_kgco2e"]) == ("", "")
        assert float(row["counted_kwh"]) > 0
        assert "of the same time" in row["missing"]


def test_jobs_one_after_the_other_are_stated_together(measured, tmp_path, capsys):
    rows = table(measured, "segment")
    took = max(r["t_close_mono_ns"] for r in rows) - min(r["t_open_mono_ns"] for r in rows)
    later = at_another_time(measured, tmp_path / "later", took)
    code, sci = stated(capsys, measured, later, *GRID, *EMBODIED)
    assert code == 0
    assert sci["e_kwh"] == pytest.approx(2 * counted_mj(measured, "") / MJ_PER_KWH)


def test_hours_of_nodes_are_of_machines_whatever_they_are_called(measured, tmp_path, capsys):
    """Two machines of one name are two; two containers of one machine, with a name each, are one machine."""

    def node_hours(output: str) -> float:
        parts = stated(capsys, output, *GRID, *EMBODIED)[1]["jobs"][0]["m_parts"]
        return next(part["hours"] for part in parts if part["kind"] == "node")

    expected = node_hours(measured)
    namesakes = copy_of(measured, tmp_path / "namesakes").url
    containers = copy_of(measured, tmp_path / "containers").url
    for name in ("attempt", "env"):
        edit_table(namesakes, name, "host", lambda row: "localhost")
        edit_table(containers, name, "host", lambda row: f"pod-of-{row['worker_id']}")
    assert node_hours(namesakes) == pytest.approx(expected)
    assert node_hours(containers) == pytest.approx(expected)


def test_books_that_do_not_close_give_no_energy(measured, tmp_path, capsys):
    store = copy_of(measured, tmp_path / "open")
    change_stats(store, evidence_class="E0")
    code, sci = stated(capsys, store.url, *GRID, *EMBODIED)
    assert (code, sci["e_kwh"]) == (NOT_STATED, None)


def test_scope_3_has_a_row_per_job_and_kind_with_estimates_apart(measured, unmeasured, tmp_path, capsys):
    file = tmp_path / "scope3.csv"
    options = ["--statement", "scope3", "--csv", str(file), *GRID, "--location", "DE"]
    assert main([measured, unmeasured, *options]) == NOT_STATED
    cpu, gpu, without = rows_of(file.read_text())
    for row, family in ((cpu, "cpu:"), (gpu, "gpu:")):
        kwh = counted_mj(measured, family) / MJ_PER_KWH
        assert float(row["measured_kwh"]) == pytest.approx(kwh, rel=1e-12)
        assert float(row["measured_kgco2e"]) == pytest.approx(kwh * 0.4)
        assert (row["evidence_class"], row["location"]) == ("E1", "DE")
    modelled = sum(row["energy_estimate_mj"] or 0 for row in table(measured, "segment"))
    assert float(cpu["estimated_kwh"]) == pytest.approx(modelled / MJ_PER_KWH)
    assert gpu["estimated_kwh"] == ""
    assert (without["measured_kwh"], without["measured_kgco2e"], without["counted_kwh"]) == ("", "", "")
    assert (without["evidence_class"], without["missing"]) == ("E0", "cpu on host was never read")
    assert float(without["estimated_kwh"]) > 0
    assert without["period_begin_utc"].endswith("+00:00")


HOSTILE = ('=HYPERLINK("http://x","y")', "+1+1", "-2+3", "@SUM(A1)", "\t=1", "＝1+1", " =1", "\x1b[31m=red")


@pytest.mark.parametrize("text", HOSTILE)
def test_no_cell_begins_a_formula_whoever_named_the_model(measured, tmp_path, capsys, text):
    store = copy_of(measured, tmp_path / "hostile")
    change_stats(store, model=text)
    assert main([store.url, "--statement", "scope3", *GRID, f"--location={text}"]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    for row in csv.reader(io.StringIO(shown)):
        for cell in row:
            assert not cell.strip().startswith(("=", "+", "-", "@", "＝")), cell
            assert "\t" not in cell


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--embodied", "node"], "--embodied node: neither NAME=KG/YEARS"),
        (["--embodied", "node=heavy"], "NAME=KG/YEARS"),
        (["--embodied", "node=1/0"], "more than 0"),
        (["--embodied", "node=-1/4"], "0 or more"),
        (["--embodied", "node=1/4*2"], "from 0 to 1"),
        (["--embodied", "node=nan/4"], "0 or more"),
        (["--embodied", "node=1/4", "NODE=1/4"], "stands twice"),
        (["--html", "x.html"], "--html has no part"),
        (["--csv", "x.csv"], "--csv has no part"),
    ],
)
def test_what_cannot_be_used_is_named(measured, capsys, options, words):
    assert main([measured, "--statement", "sci", *options]) == (2 if "has no part" in words else 1)
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("way", ["again", "by a link", "copied"])
@pytest.mark.parametrize("statement", ["sci", "scope3"])
def test_a_job_given_twice_is_refused(measured, tmp_path, capsys, way, statement):
    other = tmp_path / "other"
    if way == "by a link":
        other.symlink_to(measured)
    elif way == "copied":
        copy_of(measured, other)
    second = measured if way == "again" else str(other)
    assert main([measured, second, "--statement", statement]) == 1
    captured = capsys.readouterr()
    assert f"given twice, as {measured} and {second}" in captured.err
    assert captured.out == ""


def test_scope_3_without_an_intensity_says_that_grams_are_missing(measured, capsys):
    assert main([measured, "--statement", "scope3"]) == NOT_STATED
    for row in rows_of(capsys.readouterr().out):
        assert float(row["measured_kwh"]) > 0
        assert (row["measured_kgco2e"], row["evidence_class"]) == ("", "E1")
        assert "no carbon intensity was given" in row["missing"]


def test_two_jobs_of_the_same_prompts_are_two(measured, unmeasured, capsys):
    _, sci = stated(capsys, measured, unmeasured, *GRID)
    assert sci["jobs"][0]["fingerprint"] == sci["jobs"][1]["fingerprint"]
    assert sci["r_images"] == 2 * len(PROMPTS)


def test_options_of_statements_need_one(measured, capsys):
    assert main([measured, "--location", "DE"]) == 2
    assert "--location is for a statement" in capsys.readouterr().err


def test_embodied_figures_of_a_file_name_their_source(measured, tmp_path, capsys):
    file = tmp_path / "hardware.toml"
    file.write_text(
        '[[device]]\nname = "recorded"\nkg = 164\nyears = 4\nsource = "maker\'s study, 2024"\n'
        '[[device]]\nname = "node"\nkg = 0\nyears = 4\nsource = "in the GPUs\' figure"\n'
    )
    code, sci = stated(capsys, measured, *GRID, "--embodied", str(file))
    assert code == 0
    assert {p["declared"]["source"] for p in sci["jobs"][0]["m_parts"]} == {
        "maker's study, 2024",
        "in the GPUs' figure",
    }
    file.write_text('[[device]]\nname = "node"\nkilos = 1\n')
    assert main([measured, "--statement", "sci", "--embodied", str(file)]) == 1
    assert "no field is named 'kilos'" in capsys.readouterr().err


def test_a_jobs_first_attempt_is_the_earliest_by_time_and_then_by_name():
    draw = random.Random(3)
    for n in (0, 1, 2, 7, 40):
        rows = [
            {"t_start_wall_ns": draw.randrange(5), "attempt_id": f"e0001-{draw.randrange(2**40):010x}"}
            for _ in range(n)
        ]
        kinds = {"t_start_wall_ns": pa.int64(), "attempt_id": pa.string()}
        table = pa.Table.from_pylist(rows, pa.schema(kinds))
        expected = min(((r["t_start_wall_ns"], r["attempt_id"]) for r in rows), default=(0, None))
        assert _first_attempt(table) == expected[1]
