"""What commands print: text from prompts, keys and messages is shown and never obeyed."""

import json
import logging
from dataclasses import dataclass

import pytest

from millijoule.jobs import check, entry, gc, query
from millijoule.jobs.entry import run_command
from millijoule.pipeline.closing.garbage import Orphan
from millijoule.pipeline.running.progress import closing_lines
from millijoule.workers.errors import InputError

EVIL = "\u202egnp.\u202c\x1b[2J\u2067"
SHOWN = "[U+202E]gnp.[U+202C][U+001B][2J[U+2067]"


@dataclass(frozen=True)
class NoOptions:
    """Nothing."""


def safe(text):
    assert "\u202e" not in text
    assert "\x1b" not in text
    assert SHOWN in text
    return text


def test_errors_and_log_lines(capsys, monkeypatch):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # as in a new process

    def run(options):
        logging.getLogger("millijoule.anything").warning("about %s", EVIL)
        raise InputError(f"bad: {EVIL}")

    assert run_command("x", NoOptions, run, []) == entry.ERROR
    error = safe(capsys.readouterr().err)
    assert error.splitlines() == [f"about {SHOWN}", f"millijoule x: bad: {SHOWN}"]


def test_check(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(
        "millijoule.pipeline.closing.check.check_output", lambda *a, **k: iter([f"shard 1: {EVIL}"])
    )
    assert check.run(check.CheckOptions(str(tmp_path))) == entry.ERROR
    safe(capsys.readouterr().out)


def test_differences_of_a_kind_are_counted_and_a_few_shown(capsys, monkeypatch, tmp_path):
    found = [
        f"data/{i:08d}-e0001-{i:03x}.parquet: image {i} of prompt {chr(39) * (i % 2) + str(i)!r} is not what was made"
        for i in range(200)
    ]
    found[100:100] = ["manifest.parquet: missing", "stats.json: missing"]
    monkeypatch.setattr("millijoule.pipeline.closing.check.check_output", lambda *a, **k: iter(found))
    assert check.main([str(tmp_path)]) == entry.ERROR
    *shown, kind, rest, total = capsys.readouterr().out.splitlines()
    assert shown == [*found[:3], "manifest.parquet: missing", "stats.json: missing"]
    assert kind == "... 200 like this: data/....parquet: image ... of prompt ... is not what was made"
    assert rest == "... 197 differences not shown; --all prints every one"
    assert total == f"{tmp_path}: 0 shards checked, 202 differences"
    assert check.main([str(tmp_path), "--all"]) == entry.ERROR
    assert capsys.readouterr().out.splitlines() == [*found, total]


def test_gc(capsys, monkeypatch, tmp_path):
    orphans = [Orphan(f"files/{EVIL}", 1, False, "because")]
    monkeypatch.setattr("millijoule.pipeline.closing.garbage.find_orphans", lambda store: iter(orphans))
    assert gc.run(gc.GcOptions(str(tmp_path))) == entry.COMPLETE
    safe(capsys.readouterr().out)


@pytest.mark.parametrize("command", [check, gc])
def test_an_output_is_given_by_place_or_by_name_and_once(command, capsys, tmp_path):
    said = []
    for words, code in (
        (["OUT"], entry.ERROR),
        (["--output", "OUT"], entry.ERROR),
        ([], entry.USAGE),
        (["OUT", "--output", "OUT"], entry.USAGE),
    ):
        assert command.main([word.replace("OUT", str(tmp_path)) for word in words]) == code
        said.append(capsys.readouterr().err)
    placed, named, none, both = said
    assert "no job here" in placed
    assert named == placed
    assert "none is given" in none
    assert "give one" in both


def test_the_closing_lines_of_a_job():
    stats = dict.fromkeys(
        ("images_ok", "images_per_second", "direct_mj_per_image", "direct_estimate_mj_per_image"), 0
    )
    stats |= {"direct_mj_per_image": None, "direct_estimate_mj_per_image": None}
    stats |= {"images_quarantined": 0, "input_rows_rejected": 0, "warnings": {f"unknown word {EVIL}": 3}}
    stats |= {"images_filtered": 1, "filter_reasons": {EVIL: 1}, "rejected_mj": {"filtered": 1}}
    stats |= {"images_with_warnings": 3, "warning_kinds": {f"unknown word {EVIL}": 3}}
    stats |= {"images_quarantined": 1, "errors": {f"cannot draw {EVIL}": 1}}
    stats |= {"energy": {"unclosed": [{"worker_id": "w1", "host": EVIL, "devices": ["cpu"], "reason": EVIL}]}}
    safe("\n".join(closing_lines(stats, "out")))


def test_rows_of_a_query():
    import pyarrow as pa

    safe(query.as_text(pa.table({"prompt": [EVIL]})))


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@x", "\t=1", "＝1", " =1", f"a{EVIL}"])
def test_rows_of_a_query_as_csv_hold_no_formula_and_no_escape(text):
    import pyarrow as pa

    rows = pa.table(
        {text: pa.array([text, None, "plain"]), "d": pa.array(["x", text, None]).dictionary_encode()}
    )
    shown = query.encode(rows, "csv").decode()
    assert "\x1b" not in shown
    cells = [cell.strip('"') for line in shown.splitlines() for cell in line.split(",")]
    assert "plain" in cells
    assert not [c for c in cells if c.strip().startswith(("=", "+", "-", "@", "＝"))]
    exact = query.encode(pa.table({"p": [text]}), "json").decode()
    assert json.loads(exact) == {"p": text}  # for programs


def test_json_of_a_query_is_shown_on_a_terminal_and_not_obeyed(monkeypatch, tmp_path):
    import io
    import sys

    import pyarrow as pa

    class Terminal(io.TextIOWrapper):
        def isatty(self):
            return True

    class NoTables:
        def __enter__(self):
            return None

        def __exit__(self, *error):
            return None

    from millijoule.pipeline.sql import query as sql

    monkeypatch.setattr(sql, "open_tables", lambda stores: NoTables())
    monkeypatch.setattr(sql, "run_query", lambda *a: pa.table({"prompt": ["\u202e\x9b2J"]}))
    terminal = Terminal(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert query.run(query.QueryOptions("SELECT 1", (str(tmp_path),), format="json")) == entry.COMPLETE
    assert terminal.buffer.getvalue().decode() == '{"prompt": "[U+202E][U+009B]2J"}\n'
