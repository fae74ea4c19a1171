"""`millijoule report` as a command."""

import json
import sys

import pytest
from support.report_outputs import measured_output

from millijoule.jobs.report import main
from millijoule.workers.storage.open import open_store


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    return measured_output(tmp_path_factory.mktemp("job"), [f"prompt {i}" for i in range(12)]).url


def test_the_page_goes_into_the_output_and_the_tables_to_the_terminal(output, tmp_path, capsys):
    assert main([output]) == 0
    shown = capsys.readouterr()
    assert "energy per image" in shown.out
    assert f"wrote {output}/report.html" in shown.err
    with open(f"{output}/report.html", encoding="utf-8") as page:
        assert page.readline() == "<!DOCTYPE html>\n"


def test_outputs_are_given_by_place_or_by_name(output, capsys):
    assert main(["--output", output]) == 0
    assert "energy per image" in capsys.readouterr().out
    assert main([]) == 2
    assert "name at least one output" in capsys.readouterr().err


def test_files_go_where_they_are_asked_to(output, tmp_path, capsys):
    page, data = tmp_path / "page.html", tmp_path / "report.json"
    options = ["--html", str(page), "--json", str(data), "--gco2-per-kwh", "400", "--price-per-kwh", "0.3"]
    assert main([output, *options, "--pue", "1.1", "--carbon-source", "my grid, 2025"]) == 0
    job = json.loads(data.read_text())["jobs"][0]
    assert job["carbon"]["source"] == "my grid, 2025"
    assert job["carbon"]["fallback"] is True
    kwh = job["measured"]["full_mj_per_image"] / 3.6e9
    assert job["measured"]["full_gco2e_per_image"] == pytest.approx(kwh * 400 * 1.1)
    assert "my grid, 2025" in page.read_text()


@pytest.mark.long
def test_json_on_standard_output_stands_alone(output, tmp_path, capsys):
    assert main([output, output, "--json", "-", "--html", str(tmp_path / "p.html")]) == 0
    assert len(json.loads(capsys.readouterr().out)["jobs"]) == 2


@pytest.mark.parametrize(
    ("options", "words", "code"),
    [
        (
            ["--gco2-per-kwh", "lots"],
            "--gco2-per-kwh lots",
            1,
        ),  # no file of this name; there may be one later
        (["--price-per-kwh", "nan"], "--price-per-kwh nan", 2),
        (["--pue", "0.5"], "--pue 0.5", 2),
        (["--html", "/nowhere/at/all.html"], "cannot be written", 1),
    ],
)
def test_what_cannot_be_used_is_named(output, capsys, options, words, code):
    assert main([output, *options]) == code
    assert words in capsys.readouterr().err


@pytest.mark.long
def test_an_output_on_s3_gets_its_page_there(output, moto_s3, s3_env, capsys):
    s3_env(moto_s3)
    url = f"s3://{moto_s3.make_bucket('report')}/out"
    here, there = open_store(output), open_store(url)
    for item in here.list():
        if item.key != "report.html":
            there.put(item.key, here.get(item.key))
    assert main([url]) == 0
    assert f"wrote {url}/report.html" in capsys.readouterr().err
    assert b"First images" in there.get("report.html")


def test_no_job_is_an_error(tmp_path, capsys):
    assert main([str(tmp_path)]) == 1
    assert "no job here" in capsys.readouterr().err


def test_without_the_plotting_library_the_message_says_what_to_install(output, monkeypatch, capsys):
    for name in [
        n for n in sys.modules if n.startswith("millijoule.pipeline.report.") or n.split(".")[0] == "bokeh"
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "bokeh", None)
    assert main([output]) == 1
    assert 'pip install "millijoule[report]"' in capsys.readouterr().err
