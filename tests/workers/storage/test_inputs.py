"""The prompt files that paths, folders, globs and URLs name."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.stores import open_empty

from millijoule.workers.errors import InputError, NotFoundError
from millijoule.workers.storage.inputs import expand_inputs, open_input_file
from millijoule.workers.storage.open import open_store


@pytest.fixture(params=["local", "moto"])  # what Ceph lists is what `test_store` shows
def prompts(request: pytest.FixtureRequest) -> str:
    """A place with prompt files: its URL."""
    store = open_empty(request, request.param)
    for key in ("b.csv", "a.csv", "notes.txt", "deep/er/c.csv", "deep/d.csv", "odd[1].csv", "ü 2.csv"):
        store.put(key, key.encode())
    return store.url


def _expand(base: str, *patterns: str) -> list[str]:
    return [f.url.removeprefix(f"{base}/") for f in expand_inputs(f"{base}/{p}" for p in patterns)]


def test_patterns_expand_to_sorted_distinct_files(prompts: str) -> None:
    assert _expand(prompts, "b.csv") == ["b.csv"]
    assert _expand(prompts, "b.csv", "a.csv", "?.csv", "b.csv") == ["a.csv", "b.csv"]
    assert _expand(prompts, "*.csv") == ["a.csv", "b.csv", "odd[1].csv", "ü 2.csv"]
    assert _expand(prompts, "[ab].csv") == ["a.csv", "b.csv"]
    assert _expand(prompts, "deep/*") == ["deep/d.csv"]
    assert _expand(prompts, "deep/**/*.csv") == ["deep/d.csv", "deep/er/c.csv"]
    assert _expand(prompts, "odd[1].csv") == ["odd[1].csv"]


@pytest.mark.long
def test_an_input_knows_its_size_and_on_s3_its_etag(prompts: str) -> None:
    (file,) = expand_inputs([f"{prompts}/deep/d.csv"])
    assert file.size_bytes == len("deep/d.csv")
    assert (file.etag is None) == (not prompts.startswith("s3://"))
    assert file == expand_inputs([f"{prompts}/deep/d.*"])[0]
    with open_input_file(file.url) as opened:
        assert opened.read() == b"deep/d.csv"


def test_a_pattern_without_a_match_is_named(prompts: str) -> None:
    for pattern in ("missing.csv", "*.parquet", "missing/*.csv"):
        with pytest.raises(InputError, match="no prompt file matches") as error:
            expand_inputs([f"{prompts}/a.csv", f"{prompts}/{pattern}"])
        assert pattern in str(error.value)


def _fill(url: str, files: dict[str, bytes]) -> None:
    """Put files whose names a store of ours would refuse, too."""
    if url.startswith("s3://"):
        store = open_store(url)
        for name, data in files.items():
            store.put(name, data)
        return
    for name, data in files.items():
        path = Path(url, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def test_a_folder_stands_for_its_data_files(prompts: str) -> None:
    """As Spark leaves them: markers, checksums, empty parts and what an unfinished job wrote."""
    names = ["part-00000-a.snappy.parquet", "part-00001-a.snappy.parquet", "more/part-00002.parquet"]
    markers = [".part-00000-a.snappy.parquet.crc", "_temporary/0/part-9.parquet", "x.crc", "_metadata"]
    files = {f"spark/{name}": b"x" for name in (*names, *markers, "_SUCCESS")}
    _fill(prompts, files | {"spark/part-00003.parquet": b"", "spark/_started": b""})
    found = [f"spark/{name}" for name in sorted(names)]
    assert _expand(prompts, "spark") == _expand(prompts, "spark/") == found
    assert _expand(prompts, "spark/**/*.parquet") == sorted([*found, "spark/part-00003.parquet"])
    assert _expand(prompts, "spark/*") == sorted([*found[1:], "spark/part-00003.parquet"])
    assert _expand(prompts, "spark/_temp*/0/*") == ["spark/_temporary/0/part-9.parquet"]
    assert _expand(prompts, "deep") == ["deep/d.csv", "deep/er/c.csv"]


@pytest.mark.long
def test_an_output_among_the_prompts_is_no_prompt(prompts: str) -> None:
    output = ["_job/job.json", "manifest.parquet", "preview.png", "data/x.parquet"]
    _fill(prompts, {f"mine/{name}": b"x" for name in ("p.csv", "outer.csv", *(f"out/{n}" for n in output))})
    assert _expand(prompts, "mine") == ["mine/outer.csv", "mine/p.csv"]


def test_folders_of_partitions_add_columns(prompts: str) -> None:
    names = ["lang=de/style=a%2Fb/p.csv", "lang=__HIVE_DEFAULT_PARTITION__/style=c/p.csv", "_x=1/p.csv"]
    _fill(prompts, {f"hive/{name}": b"x" for name in (*names, "lang=de/_SUCCESS")})

    def columns(pattern: str) -> list[dict[str, str | None]]:
        return [dict(f.columns) for f in expand_inputs([f"{prompts}/{pattern}"])]

    assert columns("hive") == [{"_x": "1"}, {"lang": None, "style": "c"}, {"lang": "de", "style": "a/b"}]
    assert columns("hive/lang=de") == [{"style": "a/b"}]
    assert columns("hive/lang=*/*/*.csv") == columns("hive")[1:]
    assert columns("hive/lang=de/style=a%2Fb/p.csv") == [{}]


@pytest.mark.long
@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            ["a.csv", "b.jsonl"],
            r"several formats \(csv: a\.csv; jsonl: b\.jsonl\).*example '.*/odd-folder/\*\.csv'",
        ),
        (["a.csv", "README.md"], r"unknown format besides prompt files: README\.md; .*odd-folder/\*\.csv'"),
        (["in/a.csv", "x.png"], r"unknown format .*x\.png; .*odd-folder/\*\*/\*\.csv'"),
        (["x.png", "y.docx"], r"without prompt files \(.*\*\.parquet.*\); it has x\.png, y\.docx"),
        (["_SUCCESS"], r"without prompt files; it has _SUCCESS, which hold no rows"),
        (["_delta_log/0.json", "a.parquet"], "Delta table"),
        ([f"{i}.png" for i in range(9)], r"3\.png, 4\.png and 4 more"),
    ],
)
def test_a_folder_of_something_else_is_refused_by_name(prompts: str, files: list[str], message: str) -> None:
    _fill(prompts, {f"odd-folder/{name}": b"x" for name in files})
    with pytest.raises(InputError, match=message):
        expand_inputs([f"{prompts}/odd-folder"])


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="folder without prompt files"):
        expand_inputs([str(tmp_path)])


def test_a_missing_prompt_file_is_not_found(prompts: str) -> None:
    with pytest.raises(NotFoundError):
        open_input_file(f"{prompts}/missing.csv")


def test_a_glob_of_another_scheme_is_refused() -> None:
    with pytest.raises(InputError, match="gs: URLs"):
        expand_inputs(["gs://bucket/*.csv"])
