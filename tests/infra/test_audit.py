"""The audit of pinned packages: what an advisory means, and what the record of the last comparison says of today's pins."""

from __future__ import annotations

import datetime
import importlib.util
import json
import sys
import warnings

import pytest
import yaml
from support.manifests.documents import ROOT

spec = importlib.util.spec_from_file_location("audit", ROOT / "infra/audit/audit.py")
audit = importlib.util.module_from_spec(spec)
spec.loader.exec_module(audit)
RECORD = json.loads(audit.RECORD.read_text())


def advisory(*ranges: dict[str, str], versions=(), kind="ECOSYSTEM", package="Some.Package", **more):
    events = [{bound: version} for told in ranges for bound, version in told.items()]
    affected = {
        "package": {"ecosystem": "PyPI", "name": package},
        "versions": list(versions),
        "ranges": [{"type": kind, "events": events}] if events else [],
    }
    return {"id": "TEST-1", "aliases": ["CVE-0000-1"], "affected": [affected], **more}


CASES = [
    ({"introduced": "0", "fixed": "2.0"}, {"1.9": True, "2.0rc1": True, "2.0": False, "2.0.1": False}),
    ({"introduced": "1.5"}, {"1.4": False, "1.5": True, "99": True}),
    ({"introduced": "0", "last_affected": "2.0"}, {"2.0": True, "2.0.1": False}),
    ({"introduced": "0", "fixed": "1.10"}, {"1.9": True, "1.10": False, "1.11": False}),
    ({"introduced": "not a version"}, {"1.0": True}),
]


@pytest.mark.parametrize(("told", "expected"), CASES)
def test_a_range_means_the_versions_in_it(told, expected):
    found = {version: audit.affects(advisory(told), "some-package", version) for version in expected}
    assert found == expected


def test_two_ranges_listed_versions_and_commits_alone():
    twice = advisory({"introduced": "0", "fixed": "1.0"}, {"introduced": "2.0", "fixed": "2.5"})
    assert [v for v in ("0.9", "1.5", "2.4", "2.5") if audit.affects(twice, "some-package", v)] == [
        "0.9",
        "2.4",
    ]
    listed = advisory({"introduced": "0", "fixed": "a1b2c3"}, versions=["1.0"], kind="GIT")
    assert audit.affects(listed, "some-package", "1.0")
    assert not audit.affects(listed, "some-package", "1.1")
    # nothing that could be compared: a person has to look
    assert audit.affects(advisory({"introduced": "0", "fixed": "a1b2c3"}, kind="GIT"), "some-package", "1.1")
    assert not audit.affects(twice, "another-package", "0.9")


@pytest.fixture
def database(tmp_path):
    """A folder as pypa/advisory-database has it, with one advisory that means `some-package` below 2."""
    told = advisory({"introduced": "0", "fixed": "2.0"})
    for number, record in enumerate([told, {**told, "withdrawn": "2026-01-01T00:00:00Z", "id": "TEST-2"}]):
        file = tmp_path / "vulns/some-package" / f"TEST-{number}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.safe_dump(record))
    return tmp_path


def test_a_comparison_finds_what_a_database_says_and_says_which_database(database):
    record = audit.compare(database, "abc", "2026-11-01", {"some-package": "1.0", "fine": "1.0"})
    assert record["matches"] == [
        {"id": "TEST-1", "aliases": ["CVE-0000-1"], "package": "some-package", "version": "1.0"}
    ]
    assert (record["revision"], record["date"], record["advisories_of_pinned_packages"]) == (
        "abc",
        "2026-11-01",
        1,
    )
    assert record["pins"] == {"fine": "1.0", "some-package": "1.0"}
    assert audit.compare(database, "abc", "2026-11-01", {"some-package": "2.0"})["matches"] == []
    (database / "vulns/some-package/TEST-0.json").write_text(json.dumps(advisory({"introduced": "0"})))
    assert len(audit.compare(database, "abc", "2026-11-01", {"some-package": "2.0"})["matches"]) == 1
    with pytest.raises(SystemExit, match="is it a database"):
        audit.compare(database / "vulns/other", "abc", "2026-11-01", {"some-package": "2.0"})


def test_a_match_is_open_until_the_pin_changes_or_somebody_says_why_it_does_no_harm(database):
    pins = {"some-package": "1.0"}
    record = audit.compare(database, "abc", "2026-11-01", pins)
    assert audit.open_matches(record, pins, {}) == ["some-package 1.0: TEST-1 CVE-0000-1"]
    assert audit.open_matches(record, pins, {("some-package", "TEST-1"): "why"}) == []
    assert audit.open_matches(record, {"some-package": "2.0"}, {}) == []
    assert audit.unseen(record, {"some-package": "2.0"}) == ["some-package==2.0"]
    assert audit.age_days(record, datetime.date(2026, 12, 1)) == 30


ANSWERS = {
    "clean": ('{"dependencies": [{"name": "aiohttp", "version": "1", "vulns": []}], "fixes": []}', 0),
    "flawed": ('{"dependencies": [{"name": "aiohttp", "version": "1", "vulns": [{"id": "TEST-1"}]}]}', 1),
    "silent": ('{"dependencies": [{"name": "aiohttp", "skip_reason": "not found on PyPI"}]}', 3),
    "broken": ("no network", 3),
}


@pytest.mark.parametrize("kind", ANSWERS)
def test_an_index_that_does_not_answer_is_not_taken_for_a_clean_one(tmp_path, kind, capsys, monkeypatch):
    monkeypatch.setattr(audit, "pins", lambda: {"aiohttp": "1"})
    answer, code = ANSWERS[kind]
    stand_in = tmp_path / "pip-audit"
    stand_in.write_text(f"#!{sys.executable}\nprint({answer!r})\n")
    stand_in.chmod(0o755)
    assert audit.main(["ask", str(stand_in)]) == code
    said = capsys.readouterr().err
    assert ("only the record counts" in said) is (code == 3)
    assert ("TEST-1" in said) is (code == 1)


@pytest.mark.parametrize(
    ("for_all", "code", "said"),
    [
        ("no network", 3, "only the record counts"),
        ('{"dependencies": []}', 3, "only the record counts"),
        ('{"dependencies": [{"name": "b", "version": "1", "vulns": []}]}', 3, "says nothing of a, c\n"),
        (
            '{"dependencies": [{"name": "b", "version": "1", "vulns": [{"id": "TEST-1"}]}, '
            '{"name": "a", "skip_reason": "none"}]}',
            1,
            "b 1: TEST-1",
        ),
    ],
)
def test_an_index_that_answers_for_one_pin_and_not_for_all_is_not_taken_for_a_clean_one(
    tmp_path, monkeypatch, capsys, for_all, code, said
):
    stand_in = tmp_path / "pip-audit"
    for_one = '{"dependencies": [{"name": "a", "version": "1", "vulns": []}]}'
    asks_for_one = "open(sys.argv[-1]).read().count('==') == 1"
    stand_in.write_text(
        f"#!{sys.executable}\nimport sys\nprint({for_one!r} if {asks_for_one} else {for_all!r})\n"
    )
    stand_in.chmod(0o755)
    monkeypatch.setattr(audit, "pins", lambda: {"a": "1", "b": "1", "c": "1"})
    assert audit.main(["ask", str(stand_in)]) == code
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("date", ["yesterday", "2026-13-01", "9999-01-01"])
def test_a_record_has_a_date_by_which_it_grows_old(database, date, capsys):
    record = database / "record.json"
    told = ["compare", str(database), "--revision", "abc", "--date", date, "--record", str(record)]
    with pytest.raises(SystemExit, match="2"):
        audit.main(told)
    assert "--date" in capsys.readouterr().err
    assert not record.exists()


def test_no_advisory_that_was_found_is_open_and_none_is_accepted_without_need():
    pins = audit.pins()
    assert len(pins) > 150
    assert audit.open_matches(RECORD, pins, audit.accepted()) == []
    still = {(match["package"], match["id"]) for match in RECORD["matches"]}
    assert set(audit.accepted()) <= still
    assert all(len(reason) > 20 for reason in audit.accepted().values())
    assert RECORD["advisories_of_pinned_packages"] > 100


def test_the_record_says_how_old_it_is_and_which_pins_it_has_not_seen():
    """Neither fails here, as an unchanged tree stays right; `make audit` fails on both."""
    days, new = audit.age_days(RECORD, datetime.date.today()), audit.unseen(RECORD, audit.pins())
    assert days >= 0
    if days > 31 or new:
        warnings.warn(
            f"advisories are {days} days old; pins not compared: {new or 'none'}; `make audit`", stacklevel=1
        )
