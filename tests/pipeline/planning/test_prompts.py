"""Reading prompt files: what is accepted, what is quarantined and how the messages name it."""

import gzip
import json
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from millijoule.pipeline.planning import prompt_text, raw_chunks
from millijoule.pipeline.planning.plan_options import PlanOptions
from millijoule.pipeline.planning.prompts import PROMPT_ROW_SCHEMA, read_prompts
from millijoule.workers.errors import InputError
from millijoule.workers.storage.inputs import expand_inputs


@pytest.fixture
def read(tmp_path):
    """`read(name, content)` writes a file (bytes, text or an Arrow table) and gives its (rows, bad rows)."""

    def read(name, content, **options):
        path = tmp_path / name
        if isinstance(content, pa.Table):
            pq.write_table(content, path)
        else:
            data = content if isinstance(content, bytes) else content.encode()
            path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        chunks = list(read_prompts(expand_inputs([str(path)]), PlanOptions(**options)))
        for chunk in chunks:
            assert chunk.rows.schema == PROMPT_ROW_SCHEMA
            chunk.rows.validate(full=True)
            assert len(chunk.row_numbers) == len(chunk.rows)
        return [r for c in chunks for r in c.rows.to_pylist()], [b for c in chunks for b in c.bad]

    return read


def jsonl(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


def the_only(bad, *words):
    """The one bad row, whose message must hold all `words`."""
    (row,) = bad
    for word in words:
        assert str(word) in str(row), str(row)
    return row


# Formats


def test_txt_has_one_prompt_per_line_and_no_comments(read):
    rows, bad = read("p.txt", "a cat\r\n\n# not a comment\n  \n\tindented 'n quoted\"")
    assert [r["prompt"] for r in rows] == ["a cat", "# not a comment", "\tindented 'n quoted\""]
    assert [r["source"].rpartition(":")[2] for r in rows] == ["1", "3", "5"]
    assert not bad


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.txt", "\ufeffein Kätzchen\nzwei\n"),
        ("p.csv", "\ufeffprompt\nein Kätzchen\nzwei\n"),
        ("p.tsv", "\ufeffprompt\nein Kätzchen\nzwei\n"),
        ("p.jsonl", '\ufeff{"prompt":"ein Kätzchen"}\n{"prompt":"zwei"}\n'),
        ("P.NDJSON", '{"prompt":"ein Kätzchen"}\n\n{"prompt":"zwei"}'),
    ],
)
def test_text_formats_are_utf8_with_or_without_byte_order_mark_and_gzip(read, name, text, suffix):
    rows, bad = read(name + suffix, text)
    assert [r["prompt"] for r in rows] == ["ein Kätzchen", "zwei"]
    assert not bad


def test_csv_quotes_delimiters_and_line_feeds(read):
    rows, bad = read("p.csv", 'id,prompt\n1,"a ""big"", red\ncat"\n\n2,dog\n')
    assert [(r["prompt_id"], r["prompt"]) for r in rows] == [("1", 'a "big", red\ncat'), ("2", "dog")]
    assert [r["source"].rpartition(":")[2] for r in rows] == ["1", "2"]
    assert not bad


@pytest.mark.parametrize(
    "kind",
    [
        pa.string(),
        pa.large_string(),
        pa.binary(),
        pa.string_view(),
        pa.dictionary(pa.int32(), pa.string()),
    ],
)
def test_parquet_text_of_any_type(read, kind):
    rows, bad = read("p.parquet", pa.table({"caption": pa.array(["ä", "b", None], pa.string()).cast(kind)}))
    assert [r["prompt"] for r in rows] == ["ä", "b"]
    the_only(bad, "p.parquet:3", "'caption'", "null")


def test_an_unknown_extension_is_refused(read):
    for name in ("p.docx", "p", "gz", "p.gz", "p.parquet.gz"):
        with pytest.raises(InputError, match=rf"{name}: .*"):
            read(name, b"x")


def test_chunks_do_not_change_rows_or_numbers(read, monkeypatch):
    lines = [f"prompt {i}" if i % 7 else "" for i in range(100)]
    whole = read("p.txt", "\n".join(lines))
    table = pa.table({"prompt": lines})
    whole_table = read("p.parquet", table)
    monkeypatch.setattr(raw_chunks, "CHUNK_ROWS", 9)
    assert read("p.txt", "\n".join(lines)) == whole
    assert read("p.parquet", table) == whole_table
    monkeypatch.setattr(raw_chunks, "CHUNK_CHARS", 20)
    assert read("p.txt", "\n".join(lines)) == whole
    assert read("p.parquet", table) == whole_table


# Columns


def test_aliases_and_passed_through_columns(read):
    text = "TEXT,custom_id,n,steps,cfg_scale,tag,place\ncat,7,2,4,1.5,x,\n"
    (row,), _ = read("p.csv", text)
    assert row["prompt"] == "cat"
    assert row["prompt_id"] == "7"
    assert (row["num_images"], row["num_inference_steps"], row["guidance_scale"]) == (2, 4, 1.5)
    assert json.loads(row["extra"]) == {"tag": "x", "place": ""}


def test_jsonl_rows_pass_through_their_own_keys(read):
    rows, bad = read(
        "p.jsonl", jsonl({"prompt": "a", "x": [1, {"y": None}]}, {"prompt": "b"}, {"id": "k", "prompt": "c"})
    )
    assert [r["extra"] and json.loads(r["extra"]) for r in rows] == [{"x": [1, {"y": None}]}, None, None]
    assert [r["prompt_id"] for r in rows] == [None, None, "k"]
    assert not bad


def test_parquet_columns_of_any_type_pass_through_as_json(read):
    extra = {
        "when": pa.array([1], pa.timestamp("ns")),
        "price": [Decimal("1.50")],
        "raw": [b"\xff"],
        "score": [float("nan")],
        "tags": [["a", "b"]],
        "box": [{"x": 1}],
        "none": pa.nulls(1),
    }
    (row,), _ = read("p.parquet", pa.table({"prompt": ["a"], **extra}))
    assert json.loads(row["extra"]) == {
        "when": "1970-01-01 00:00:00.000000001",
        "price": "1.50",
        "raw": {"base64": "/w=="},
        "score": "NaN",
        "tags": ["a", "b"],
        "box": {"x": 1},
        "none": None,
    }


def test_two_names_for_one_column_are_refused(read):
    with pytest.raises(InputError, match=r"p\.csv: columns 'text' and 'caption' both .*--prompt-column text"):
        read("p.csv", "text,caption\na,b\n")
    with pytest.raises(InputError, match=r"p\.csv: columns 'id' and 'custom_id' both mean 'prompt_id'"):
        read("p.csv", "prompt,id,custom_id\na,b,c\n")
    with pytest.raises(InputError, match=r"p\.jsonl: columns 'steps' and 'num_inference_steps'"):
        read("p.jsonl", jsonl({"prompt": "a", "steps": 1}, {"prompt": "a", "num_inference_steps": 1}))


def test_prompt_column_settles_which_counts(read):
    (row,), _ = read("p.csv", "text,caption\na,b\n", prompt_column="caption")
    assert row["prompt"] == "b"
    assert json.loads(row["extra"]) == {"text": "a"}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.csv", "titel,size\na,b\n"),
        ("p.csv", "titel,size\n"),
        ("p.jsonl", jsonl({"titel": "a", "size": 1})),
        ("p.parquet", pa.table({"titel": ["a"], "size": [1]})),
    ],
)
def test_a_file_without_a_prompt_column_is_refused_with_the_columns_it_has(read, name, content):
    with pytest.raises(InputError, match=rf"{name}: no prompt column .*titel, size.*--prompt-column"):
        read(name, content)
    with pytest.raises(InputError, match=r"looked for beschreibung"):
        read(name, content, prompt_column="beschreibung")


def test_a_parquet_prompt_column_of_another_type_is_refused(read):
    with pytest.raises(InputError, match=r"p\.parquet: column 'prompt' is int64.*--prompt-column"):
        read("p.parquet", pa.table({"prompt": [1]}))


def test_repeated_column_names_are_refused(read):
    with pytest.raises(InputError, match=r"p\.csv: more than one column is named 'prompt'"):
        read("p.csv", "prompt,prompt\na,b\n")


# Rows


@pytest.mark.parametrize("value", ["", "  \t ", None])
def test_blank_prompts_are_bad_rows(read, value):
    _, bad = read("p.jsonl", jsonl({"prompt": "good"}, {"prompt": value, "id": "x"}))
    assert the_only(bad, "p.jsonl:2", "'prompt'").prompt_id == "x"


def test_a_prompt_of_100000_characters_is_quarantined_with_its_length(read):
    rows, bad = read("p.csv", "text\n" + "x" * 100_000 + "\nok\n" + "ä" * 10_000 + "\n")
    assert len(rows) == 2
    row = the_only(bad, "p.csv:1", "'text'", "100,000 characters", "10,000")
    assert row.prompt == "x" * 197 + "..."


@pytest.mark.parametrize("character", ["\0", "\x07", "\x1b", "\x0b"])
def test_control_characters_in_a_prompt_are_bad_rows(read, character):
    rows, bad = read("p.jsonl", jsonl({"prompt": f"a{character}b"}, {"prompt": "line\n\tok"}))
    assert [r["prompt"] for r in rows] == ["line\n\tok"]
    the_only(bad, "p.jsonl:1", "'prompt'", f"U+{ord(character):04X} at character 2")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("", "blank"),
        ("x" * 513, "513 characters"),
        ("a\0b", "control character"),
        ("a\nb", "control character"),
        (True, "text or an integer, not true"),
        (1.5, "text or an integer, not 1.5"),
    ],
)
def test_unusable_ids_are_bad_rows(read, value, reason):
    rows, bad = read("p.jsonl", jsonl({"prompt": "good", "id": "../a/b:ü"}, {"prompt": "bad", "id": value}))
    assert [r["prompt_id"] for r in rows] == ["../a/b:ü"]
    assert the_only(bad, "p.jsonl:2", "'id'", reason).prompt == "bad"


LIMITS = [
    ("width", 8, 8192),
    ("height", 8, 8192),
    ("steps", 1, 1000),
    ("seed", 0, 2**64 - 1),
    ("n", 1, 10_000),
]


@pytest.mark.parametrize(("column", "low", "high"), LIMITS)
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_integers_within_limits(read, column, low, high, kind):
    values = [low, high, -2 if column == "seed" else low - 1, high + 1]
    if kind == "csv":
        content = f"prompt,{column}\n" + "".join(f"p,{v}\n" for v in [*values, "", "4x", "nan"])
    elif kind == "jsonl":
        content = jsonl(*({"prompt": "p", column: v} for v in [*values, None, "4x", [1]]))
    else:
        kept = [v for v in values if -(2**63) <= v < 2**63]
        for kind_, numbers in ((pa.int64(), kept), (pa.uint64(), [v for v in values if 0 <= v < 2**64])):
            table = pa.table({"prompt": ["p"] * len(numbers), column: pa.array(numbers, kind_)})
            rows, bad = read("p.parquet", table)
            assert [b.row for b in bad] == [i + 1 for i, v in enumerate(numbers) if not low <= v <= high]
            assert len(rows) == len(numbers) - len(bad)
        return
    name = {"steps": "num_inference_steps", "n": "num_images"}.get(column, column)
    rows, bad = read(f"p.{kind}", content)
    assert [r[name] for r in rows] == [low, high, None]
    assert [b.row for b in bad] == [3, 4, 6, 7]
    assert all(f"p.{kind}:{b.row}, column '{column}': must be an integer" in str(b) for b in bad)
    assert str(values[2]) in bad[0].reason


@pytest.mark.parametrize("value", ["42", " 42 ", "42.0", "+42", "0042", 42, 42.0])
def test_integers_may_arrive_as_text_or_float(read, value):
    for others in ([], ["7"], [7], [7.0], [None]):
        rows, bad = read("p.jsonl", jsonl(*({"prompt": "p", "seed": v} for v in [value, *others])))
        assert rows[0]["seed"] == 42
        assert not bad


@pytest.mark.parametrize("value", ["0x2A", "4_2", "42.5", "1e2", 42.5, True, [42], "٤٢", "", 2.0**60])
def test_other_things_are_no_integers(read, value):
    rows, bad = read("p.jsonl", jsonl({"prompt": "p", "seed": value}))
    if value == "":
        assert rows[0]["seed"] is None
    else:
        the_only(bad, "p.jsonl:1", "'seed'")


def test_float_seeds_that_lost_digits_are_refused(read):
    table = pa.table({"prompt": ["a", "b"], "seed": [float(2**53), float(2**60)]})
    rows, bad = read("p.parquet", table)
    assert rows[0]["seed"] == 2**53
    the_only(bad, "p.parquet:2", "'seed'", "not exact above 2**53")


def test_parquet_decimals_and_booleans(read):
    rows, bad = read("p.parquet", pa.table({"prompt": ["a"], "seed": [Decimal("42.00")], "n": [True]}))
    assert not rows
    the_only(bad, "'n'", "not 'true'")
    rows, _ = read("p.parquet", pa.table({"prompt": ["a"], "seed": [Decimal("42.00")]}))
    assert rows[0]["seed"] == 42


@pytest.mark.parametrize("value", [-0.1, 100.5, float("inf"), "nan", "inf", "high", True, "1_0", "7,5"])
def test_guidance_scale_is_finite_and_within_limits(read, value):
    rows, bad = read("p.jsonl", jsonl({"prompt": "p", "cfg_scale": 7.5}, {"prompt": "p", "cfg_scale": value}))
    assert [r["guidance_scale"] for r in rows] == [7.5]
    the_only(bad, "p.jsonl:2", "'cfg_scale'", "must be a number from 0 to 100")


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0, 0.0), ("7.5", 7.5), (100, 100.0), ("1e1", 10.0), ("", None), (float("nan"), None)],
)
def test_guidance_scale_forms(read, value, expected):
    (row,), _ = read("p.jsonl", jsonl({"prompt": "p", "guidance_scale": value}))
    assert row["guidance_scale"] == expected


def test_negative_prompts_follow_the_rules_of_prompts(read):
    rows, bad = read("p.csv", "prompt,negative_prompt\na,blurry\nb,\nc,x\x07\n" + f"d,{'y' * 10_001}\n")
    assert [r["negative_prompt"] for r in rows] == ["blurry", None]
    assert [(b.row, b.column) for b in bad] == [(3, "negative_prompt"), (4, "negative_prompt")]


def test_a_large_passed_through_value_is_a_bad_row(read):
    _, bad = read("p.jsonl", jsonl({"prompt": "a", "blob": "x" * 2**20}))
    the_only(bad, "p.jsonl:1", "'blob'", "1,048,576")


# Broken files


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.txt", b"good\nb\xe4d\n"),
        ("p.csv", b"prompt\ngood\nb\xe4d\n"),
        ("p.jsonl", b'{"prompt":"good"}\n{"prompt":"b\xe4d"}\n'),
        ("p.parquet", pa.table({"prompt": pa.array([b"good", b"b\xe4d"], pa.binary()).view(pa.string())})),
    ],
)
def test_wrong_encoding_is_a_bad_row_and_never_replaced(read, name, content):
    rows, bad = read(name, content)
    assert [r["prompt"] for r in rows] == ["good"]
    the_only(bad, f"{name}:2", "'prompt'", "0xE4 at character 2", "UTF-8")


def test_wrong_encoding_in_a_passed_through_column(read):
    _, bad = read("p.csv", b"prompt,tag\na,\xff\n")
    the_only(bad, "p.csv:1", "'tag'", "0xFF")
    _, bad = read("p.jsonl", '{"prompt":"a","tag":"\\ud800"}\n')
    the_only(bad, "p.jsonl:1", "'tag'", "half a surrogate pair")


@pytest.mark.parametrize("name", ["p.txt", "p.csv", "p.jsonl"])
def test_utf16_is_refused_with_the_remedy(read, name):
    with pytest.raises(InputError, match=rf"{name}: this is UTF-16.*iconv"):
        read(name, "prompt\na\n".encode("utf-16"))


def test_a_header_in_another_encoding_is_refused(read):
    with pytest.raises(InputError, match=r"p\.csv: the header is not UTF-8"):
        read("p.csv", b"prompt,gr\xf6sse\na,1\n")


def test_malformed_csv_lines_are_bad_rows_and_reading_goes_on(read):
    text = 'id,prompt\n1,a\n2,b,c\n3\n4,"x"y\n5,e\n6,"never closed\n'
    rows, bad = read("p.csv", text)
    assert [r["prompt_id"] for r in rows] == ["1", "5"]
    assert [b.row for b in bad] == [2, 3, 4, 6]
    assert "p.csv:2: line 3: 3 fields, but the header has 2" in str(bad[0])
    assert "p.csv:4: line 5: malformed" in str(bad[2])
    assert "line 7: malformed" in str(bad[3])


def test_an_unclosed_csv_quote_spoils_a_bounded_stretch(read):
    text = 'prompt\n"open\n' + "".join(f"some prompt {i}\n" for i in range(20_000))
    rows, bad = read("p.csv", text)
    assert len(rows) > 5_000
    the_only(bad, "p.csv:1", "field larger than field limit")


@pytest.mark.parametrize("line", ['{"prompt":', "nonsense", '["a"]', "1", "[" * 100_000, "9" * 5_000])
def test_malformed_jsonl_lines_are_bad_rows_and_reading_goes_on(read, line):
    rows, bad = read("p.jsonl", f'{{"prompt":"a"}}\n{line}\n{{"prompt":"b"}}\n')
    assert [r["prompt"] for r in rows] == ["a", "b"]
    the_only(bad, "p.jsonl:2", "JSON")


def test_an_overlong_line_is_a_bad_row(read, monkeypatch):
    monkeypatch.setattr(prompt_text, "MAX_LINE_CHARS", 100)
    rows, bad = read("p.txt", "a\n" + "x" * 1000 + "\nb\n")
    assert [(r["prompt"], r["source"][-2:]) for r in rows] == [("a", ":1"), ("b", ":3")]
    the_only(bad, "p.txt:2", "longer than 100")
    with pytest.raises(InputError, match=r"p\.csv: line 2 is longer"):
        read("p.csv", "prompt\n" + "x" * 1000 + "\n")


@pytest.mark.parametrize("kind", ["txt", "csv", "jsonl"])
def test_broken_gzip_names_file_and_line(tmp_path, kind):
    line = {"txt": "prompt\n", "csv": "prompt\n", "jsonl": '{"prompt":"p"}\n'}[kind]
    path = tmp_path / f"p.{kind}.gz"
    for data in (gzip.compress(line.encode() * 100_000)[:-300], b"no gzip at all"):
        path.write_bytes(data)
        with pytest.raises(InputError, match=rf"p\.{kind}\.gz: broken gzip data after line \d+"):
            list(read_prompts(expand_inputs([str(path)]), PlanOptions()))


def test_unreadable_parquet_names_file_and_row(tmp_path):
    path = tmp_path / "p.parquet"
    path.write_bytes(b"PAR1 and nothing else")
    with pytest.raises(InputError, match=r"p\.parquet: unreadable Parquet after row 0"):
        list(read_prompts(expand_inputs([str(path)]), PlanOptions()))
    pq.write_table(pa.table({"prompt": [f"p{i}" for i in range(1000)]}), path, row_group_size=500)
    data = bytearray(path.read_bytes())
    second = pq.ParquetFile(path).metadata.row_group(1).column(0).dictionary_page_offset
    data[second : second + 40] = b"\xff" * 40
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"p\.parquet: unreadable Parquet after row"):
        list(read_prompts(expand_inputs([str(path)]), PlanOptions()))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.txt", ""),
        ("p.txt", "\n \n"),
        ("p.csv", ""),
        ("p.csv", "prompt\n"),
        ("p.jsonl", ""),
        ("p.txt.gz", ""),
    ],
)
def test_no_rows_at_all_is_refused(read, name, content):
    with pytest.raises(InputError, match=rf"no prompts: no row in .*{name}"):
        read(name, content)
    with pytest.raises(InputError, match="no row"):
        read("p.parquet", pa.table({"prompt": pa.array([], pa.string())}))
