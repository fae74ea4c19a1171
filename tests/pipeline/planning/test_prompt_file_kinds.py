"""Prompt files as people have them: exports of spreadsheets, data frames, data sets, web interfaces and batch requests.

Every file is a small look-alike, and what a person reads in it is written beside it by hand.
"""

import csv
import gzip
import io
import json
import logging
from decimal import Decimal
from math import nan

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millijoule.pipeline.planning import prompt_json, raw_chunks
from millijoule.pipeline.planning.column_names import KnownNames, Remarks
from millijoule.pipeline.planning.plan_options import PlanOptions
from millijoule.pipeline.planning.prompt_json import read_json
from millijoule.pipeline.planning.prompt_text import TextFile
from millijoule.pipeline.planning.prompts import read_prompts
from millijoule.workers.errors import InputError
from millijoule.workers.storage.inputs import expand_inputs


def lines(*records):
    return "\n".join(json.dumps(record) for record in records)


def batch(custom_id, **body):
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/images/generations", "body": body}


def read(files, **options):
    """(rows, bad rows) of paths or patterns."""
    chunks = list(read_prompts(expand_inputs(map(str, files)), PlanOptions(**options)))
    return [r for c in chunks for r in c.rows.to_pylist()], [b for c in chunks for b in c.bad]


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, pa.Table):
        pq.write_table(content, path)
    else:
        data = content if isinstance(content, bytes) else content.encode()
        path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)
    return path


def said(caplog):
    return [record.getMessage() for record in caplog.records]


def row(prompt, **others):
    return {"prompt": prompt} | others


def same(found, expected):
    """Whether a row has what is expected of it, and of `extra`, if that is, exactly that."""
    found = found | {"extra": json.loads(found["extra"] or "{}")}
    return {name: found[name] for name in expected} == expected


# Each: file name, content, the rows a person sees in it, words that the log must say

DELIMITED = {
    "excel, semicolons and decimal commas": (
        "p.csv",
        "Prompt;Seed;CFG Scale\r\na cat;7;7,5\r\n\"a dog; red\";8;10\r\n",
        [row("a cat", seed=7, guidance_scale=7.5), row("a dog; red", seed=8, guidance_scale=10.0)],
        ["fields are separated by semicolons", "'Prompt' is read as prompt", "'CFG Scale' is read as guidance_scale"],
    ),
    "excel, sep line": ("p.csv", "sep=;\r\nid;prompt\r\n1;a, b\r\n", [row("a, b", prompt_id="1")], ["semicolons"]),
    "excel, sep line with another character": ("p.csv", '"sep=^"\nid^prompt\n1^a;b|c\n', [row("a;b|c", prompt_id="1")], ["'^'"]),
    "excel, byte order mark": ("p.csv", "\ufeffPROMPT,SEED\r\na cat,5\r\n", [row("a cat", seed=5)], ["'PROMPT' is read as prompt"]),
    "excel, alt-enter in a cell": ("p.csv", 'prompt,note\r\n"a cat\r\non a mat","x\r\ny"\r\nb,z\r\n', [row("a cat\non a mat", extra={"note": "x\ny"}), row("b")], []),
    "excel, line feed in a cell": ("p.csv", 'prompt\r\n"a\nb"\r\n', [row("a\nb")], []),
    "excel for mac, carriage returns": ("p.csv", 'prompt,seed\ra cat,1\r"two\rlines",2\r', [row("a cat", seed=1), row("two\nlines", seed=2)], []),
    "excel, tabs under the name csv": ("p.csv", "prompt\tseed\na, b\t3\n", [row("a, b", seed=3)], ["tabs"]),
    "excel, empty columns and rows at the edge": ("p.csv", ",,,\nprompt,seed,,\na,1,,\nb,2\n,,,\n,,\n", [row("a", seed=1, extra={}), row("b", seed=2)], []),
    "libreoffice, everything quoted": ("p.csv", '"prompt","Seed"\n"a ""big"" cat","42"\n', [row('a "big" cat', seed=42, extra={})], []),
    "pipes": ("p.csv", "id|Prompt|n\n1|a, b; c|2\n", [row("a, b; c", prompt_id="1", num_images=2)], ["pipes"]),
    "commas under the name tsv": ("p.tsv", "prompt,seed\na,3\n", [row("a", seed=3)], ["commas"]),
    "google sheets": ("p.csv", 'Prompt,Negative Prompt,Num Images\na,"b, c",2\n', [row("a", negative_prompt="b, c", num_images=2)], []),
    "pandas, with its index": ("p.csv", ",prompt,seed\n0,a,1.0\n1,b,\n", [row("a", seed=1, extra={"column 1": "0"}), row("b", seed=None)], []),
    "pandas, ids with holes": ("p.csv", "id,prompt\n7,a\n,b\n", [row("a", prompt_id="7"), row("b", prompt_id=None)], []),
    "PartiPrompts": ("PartiPrompts.tsv", "Prompt\tCategory\tChallenge\tNote\na \"stop\" sign\tWorld\tBasic\t\n", [row('a "stop" sign', extra={"Category": "World", "Challenge": "Basic", "Note": ""})], ["'Prompt' is read as prompt"]),
    "DrawBench": ("drawbench.csv", "Prompts,Category\nA red colored car.,Colors\n", [row("A red colored car.", extra={"Category": "Colors"})], ["'Prompts' is read as prompt"]),
    "COCO captions, as a table": ("coco.csv", "image_id,id,caption\n179765,38,A black Honda\n", [row("A black Honda", prompt_id="38", extra={"image_id": "179765"})], ["'caption' is read as prompt"]),
    "LAION": ("laion.csv", "URL,TEXT,WIDTH,HEIGHT\nhttp://x,a cat,512,768\n", [row("a cat", width=512, height=768, extra={"URL": "http://x"})], []),
    "A1111, log.csv": (
        "log.csv",
        "prompt,seed,width,height,sampler,cfgs,steps,filename,negative_prompt\na cat,-1,512,768,Euler a,7,20,00001.png,blurry\n",
        [row("a cat", seed=None, width=512, height=768, guidance_scale=7.0, num_inference_steps=20, negative_prompt="blurry", extra={"sampler": "Euler a", "filename": "00001.png"})],
        ["not used: sampler"],
    ),
    "A1111, infotext columns": (
        "p.csv",
        "Prompt,Negative prompt,Steps,Sampler,CFG scale,Seed,Size,Model hash,Clip skip\na,b,20,DPM++,7.5,-1,512x768,abc,2\n",
        [row("a", negative_prompt="b", num_inference_steps=20, guidance_scale=7.5, seed=None, width=512, height=768, extra={"Sampler": "DPM++", "Size": "512x768", "Model hash": "abc", "Clip skip": "2"})],
        ["not used: Sampler, Model hash, Clip skip"],
    ),
    "A1111, styles.csv": ("styles.csv", "name,prompt,negative_prompt\nbase,a cat,\n", [row("a cat", negative_prompt=None, extra={"name": "base"})], []),
    "sizes in words": ("p.csv", "prompt,size,width\na,1024x768,\nb,1024 X 768,1024\nc,1024×768,\nd,1024*768,\ne,auto,\nf,,64\n", [row(p, width=1024, height=768) for p in "abcd"] + [row("e", width=None, height=None), row("f", width=64, height=None)], []),
    "a size that is none": ("p.csv", "prompt,size\na,large\nb,XL\n", [row("a", width=None, extra={"size": "large"}), row("b", extra={"size": "XL"})], ["'large', which is no size in pixels"]),
    "gzip": ("p.csv.gz", "Prompt;Seed\na;1\n", [row("a", seed=1)], ["semicolons"]),
}  # fmt: skip

LINES = {
    "a list in an editor on windows": ("p.txt", "a cat  \r\n\r\n  a dog\t\r\n", [row("a cat"), row("  a dog")], []),
    "a list from an old mac": ("p.txt", "a cat\ra dog\r\rc", [row("a cat"), row("a dog"), row("c")], []),
    "a list with a no-break space behind": ("p.txt", "a cat\u00a0\u3000\n", [row("a cat")], []),
    "batch api": (
        "batch.jsonl",
        lines(batch("r-1", model="m", prompt="a cat", n=2, size="1024x1024"), batch("r-2", prompt="b", quality="hd")),
        [row("a cat", prompt_id="r-1", num_images=2, width=1024, height=1024, extra={"method": "POST", "url": "/v1/images/generations", "model": "m", "size": "1024x1024"}), row("b", prompt_id="r-2", width=None)],
        ["not used: model, quality"],
    ),
    "GenEval": ("geneval.jsonl", lines({"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}), [row("a photo of a bench", extra={"tag": "single_object", "include": [{"class": "bench", "count": 1}]})], []),
    "pandas, records by lines": ("p.jsonl", '{"Prompt":"a","id":1.0,"seed":7.0}\n{"Prompt":"b","id":null,"seed":null}\n', [row("a", prompt_id="1", seed=7), row("b", prompt_id=None, seed=None)], []),
    "python, NaN for nothing": ("p.jsonl", '{"prompt":"a","seed":NaN,"cfg":NaN,"id":NaN}\n', [row("a", seed=None, guidance_scale=None, prompt_id=None)], []),
    "javascript names": ("p.jsonl", lines({"prompt": "a", "negativePrompt": "b", "numImages": 3, "guidanceScale": 2}), [row("a", negative_prompt="b", num_images=3, guidance_scale=2.0)], []),
    "windows line ends within a prompt": ("p.jsonl", lines({"prompt": "a\r\nb\rc"}), [row("a\nb\nc")], []),
    "mongo export": ("p.jsonl", lines({"_id": {"$oid": "5f"}, "id": "x", "prompt": "a"}), [row("a", prompt_id="x", extra={"_id": {"$oid": "5f"}})], []),
    "seeds of -1 in every form": ("p.jsonl", lines(*({"prompt": "a", "seed": s} for s in (-1, -1.0, "-1", " -1.0 "))), [row("a", seed=None)] * 4, []),
}  # fmt: skip

JSON = {
    "array of objects": ("p.json", json.dumps([{"Prompt": "a", "seed": 1}, {"Prompt": "b"}], indent=4), [row("a", seed=1), row("b", seed=None)], []),
    "array of prompts": ("p.json", '["a cat", "b"]', [row("a cat"), row("b")], []),
    "COCO captions": (
        "captions_val.json",
        json.dumps({"info": {"year": 2014}, "licenses": [{"id": 1, "name": "x"}], "images": [{"id": 179765, "width": 640, "file_name": "x.jpg"}], "annotations": [{"image_id": 179765, "id": 38, "caption": "A black Honda"}, {"image_id": 9, "id": 39, "caption": "A room"}]}),
        [row("A black Honda", prompt_id="38", width=None, extra={"image_id": 179765}), row("A room", prompt_id="39", extra={"image_id": 9})],
        ["the list 'annotations'", "'caption' is read as prompt"],
    ),
    "an object with one list": ("p.json", json.dumps({"version": 2, "data": [{"text": "a"}]}), [row("a")], ["the list 'data'"]),
    "an object with a list of prompts": ("p.json", json.dumps({"prompts": ["a", "b"], "tags": ["x"]}), [row("a"), row("b")], ["the list 'prompts'"]),
    "records by id": ("p.json", json.dumps({"k1": {"prompt": "a"}, "k2": {"prompt": "b"}}), [row("a", prompt_id="k1"), row("b", prompt_id="k2")], ["their names the prompt ids"]),
    "records by name with ids of their own": ("p.json", json.dumps({"k1": {"prompt": "a", "id": 7}}), [row("a", prompt_id="7")], ["the rows are the members of the object"]),
    "one record": ("p.json", json.dumps({"prompt": "a", "seed": 3, "loras": [{"name": "x"}]}, indent=1), [row("a", seed=3, extra={"loras": [{"name": "x"}]})], ["not used: loras"]),
    "spark, lines under the name json": ("p.json", lines({"prompt": "a"}, {"prompt": "b"}) + "\n", [row("a"), row("b")], ["read as JSON lines"]),
    "pandas, table orientation": ("p.json", json.dumps({"schema": {"fields": [{"name": "index"}]}, "data": [{"index": 0, "prompt": "a"}]}), [row("a", extra={"index": 0})], []),
    "batch api as an array": ("p.json", json.dumps([batch("r", prompt="a")]), [row("a", prompt_id="r")], []),
    "gzip": ("p.json.gz", json.dumps({"rows": [{"prompt": "a"}]}), [row("a")], []),
    "byte order mark and windows line ends": ("p.json", '\ufeff[\r\n  {"prompt": "a"}\r\n]\r\n', [row("a")], []),
    "nothing in it": ("p.json", '[{"prompt": "a"}, {"prompt": ""}, 7]', [row("a")], []),
}  # fmt: skip

PARQUET = {
    "pandas, integer ids that are floats": ("p.parquet", pa.table({"prompt": ["a", "b", "c"], "id": [1.0, None, nan], "seed": [5.0, nan, -1.0]}), [row("a", prompt_id="1", seed=5), row("b", prompt_id=None, seed=None), row("c", prompt_id=None, seed=None)], []),
    "pandas, sizes that are floats": ("p.parquet", pa.table({"prompt": ["a", "b"], "Width": [512.0, nan], "Height": [768.0, None], "n": [2.0, nan]}), [row("a", width=512, height=768, num_images=2), row("b", width=None, height=None, num_images=None)], []),
    "warehouse, decimals": ("p.parquet", pa.table({"PROMPT": ["a"], "ID": [Decimal("12345678901234567890")], "SEED": [Decimal("-1")]}), [row("a", prompt_id="12345678901234567890", seed=None)], []),
    "diffusiondb": (
        "metadata.parquet",
        pa.table({"image_name": ["x.png"], "prompt": ["a"], "part_id": pa.array([1], pa.uint16()), "seed": pa.array([7], pa.uint32()), "step": pa.array([50], pa.uint16()), "cfg": pa.array([7.0], pa.float32()), "sampler": pa.array([8], pa.uint8()), "width": pa.array([512], pa.uint16()), "height": pa.array([512], pa.uint16())}),
        [row("a", seed=7, num_inference_steps=50, guidance_scale=7.0, width=512, height=512, extra={"image_name": "x.png", "part_id": 1, "sampler": 8})],
        ["not used: sampler"],
    ),
    "hugging face, captions": ("train-00000-of-00001.parquet", pa.table({"caption": ["a"], "image": [{"bytes": None, "path": "x"}]}), [row("a", extra={"image": {"bytes": None, "path": "x"}})], []),
    "seeds of -1": ("p.parquet", pa.table({"prompt": ["a", "b"], "Seed": pa.array([-1, 3], pa.int32())}), [row("a", seed=None), row("b", seed=3)], []),
    "sizes": ("p.parquet", pa.table({"prompt": ["a"], "SIZE": ["640x480"]}), [row("a", width=640, height=480)], []),
}  # fmt: skip

KINDS = {f"{group}: {name}": kind for group, kinds in {"csv": DELIMITED, "lines": LINES, "json": JSON, "parquet": PARQUET}.items() for name, kind in kinds.items()}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_this_kind_is_read_as_a_person_reads_it(tmp_path, caplog, kind):
    name, content, expected, words = KINDS[kind]
    with caplog.at_level(logging.INFO):
        rows, bad = read([put(tmp_path / name, content)])
    assert len(rows) == len(expected)
    for found, wanted in zip(rows, expected, strict=True):
        assert same(found, wanted), found
    assert [b.row for b in bad] == ([2, 3] if kind == "json: nothing in it" else [])
    text = "\n".join(said(caplog))
    for word in words:
        assert word in text


@pytest.mark.parametrize("kind", KINDS)
def test_small_chunks_and_pieces_read_the_same(tmp_path, monkeypatch, kind):
    name, content, _, _ = KINDS[kind]
    path = put(tmp_path / name, content)
    whole = read([path])
    monkeypatch.setattr(raw_chunks, "CHUNK_ROWS", 1)
    monkeypatch.setattr(prompt_json, "BLOCK_CHARS", 3)
    assert read([path]) == whole


NAMES = {
    "prompt_id": ["prompt_id", "id", "custom_id"],
    "negative_prompt": ["negative_prompt"],
    "seed": ["seed"],
    "num_images": ["num_images", "n"],
    "width": ["width"],
    "height": ["height"],
    "num_inference_steps": ["num_inference_steps", "steps", "step"],
    "guidance_scale": ["guidance_scale", "cfg_scale", "cfg", "cfgs"],
}


@pytest.mark.parametrize("name", [name for names in NAMES.values() for name in names])
def test_a_column_is_what_its_name_says_in_any_spelling(tmp_path, caplog, name):
    words = name.split("_")
    camel = words[0] + "".join(map(str.title, words[1:]))
    (ours,) = (ours for ours, names in NAMES.items() if name in names)
    for spelled in {name, name.upper(), " ".join(words).title(), "-".join(words), "".join(words), camel}:
        rows, bad = read([put(tmp_path / "p.jsonl", lines({"PROMPT": "a", spelled: "64"}))])
        assert str(rows[0][ours]) in ("64", "64.0")
        assert same(rows[0], row("a", extra={}))
        assert not bad
    with caplog.at_level(logging.INFO):
        read([put(tmp_path / "p.jsonl", lines({"prompt": "a", name.upper(): "64", f"_{name}": 1}))])
    assert any(f"column {name.upper()!r} is read as {ours}" in text for text in said(caplog))


# What cannot be right is refused, and the words help

REFUSED = {
    "two columns that fold to one": ("p.csv", "prompt,Seed,seed\na,1,2\n", r"columns 'Seed' and 'seed' both mean 'seed'"),
    "two prompt columns": ("p.csv", "Prompt,prompt\na,b\n", r"'Prompt' and 'prompt' both .*--prompt-column Prompt"),
    "a prompt column with a space": ("p.parquet", pa.table({"Text ": ["a"], "caption": ["b"]}), r"--prompt-column 'Text '"),
    "no column of prompts between semicolons": ("p.csv", "titel;zahl\na;1\n", r"no prompt column .*the file has titel;zahl.*--prompt-column"),
    "an object without rows": ("p.json", '{"a": 1, "b": [1, 2], "c": {}}', r"no list of records .*'a' \(value\), 'b' \(list of 2\), 'c' \(object\)"),
    "an empty object": ("p.json", "{}", "which has nothing"),
    "pandas' own orientation": ("p.json", '{"prompt": {"0": "a"}, "seed": {"0": 1}}', r"'prompt' \(object\).*orient='records'"),
    "columns as lists": ("p.json", '{"prompt": ["a"], "text": ["b"]}', "several lists could be the rows: 'prompt', 'text'"),
    "several lists of records": ("p.json", '{"train": [{"prompt": "a"}], "test": [{"prompt": "b"}]}', "several lists could be the rows: 'train', 'test'"),
    "a number": ("p.json", "12", "list of records is needed, but this begins with '1'"),
    "a broken list": ("p.json", '[{"prompt": "a"}, {"prompt" "b"}]', "not valid JSON: .* at character 29"),
    "a list that ends early": ("p.json", '[{"prompt": "a"},', "not valid JSON"),
    "a list without commas": ("p.json", '[{"prompt": "a"} {"prompt": "b"}]', "',' or ']' is missing at character 18"),
    "two lists": ("p.json", '[{"prompt": "a"}] [1]', r"after the end of the list comes '\['"),
    "nested without end": ("p.json", "[" * 100_000, "not valid JSON"),
    "a spreadsheet": ("p.xlsx", b"PK\x03\x04", "spreadsheets are not read; save the sheet as 'CSV UTF-8'"),
    "a spreadsheet under another name": ("p.csv", b"PK\x03\x04abc", "a zip archive or a spreadsheet"),
    "unicode text of excel": ("p.txt", "prompt\tseed\r\na\t1\r\n".encode("utf-16"), "UTF-16.*'CSV UTF-8'"),
    "UTF-16 without its mark": ("p.csv", "prompt\na\n".encode("utf-16-le"), "UTF-16"),
    "UTF-16, high byte first": ("p.csv", "prompt\na\n".encode("utf-16-be"), "UTF-16"),
    "gzip under another name": ("p.jsonl", gzip.compress(b"{}"), r"gzip data; give its name the ending \.gz"),
    "Parquet under another name": ("p.csv", b"PAR1abc", r"Parquet; give its name the ending \.parquet"),
    "a pointer to large-file storage": ("p.txt", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_read_is_refused_with_what_was_found(tmp_path, kind):
    name, content, message = REFUSED[kind]
    with pytest.raises(InputError, match=message) as error:
        read([put(tmp_path / name, content)])
    assert name in str(error.value)


@pytest.mark.parametrize(
    ("record", "column", "words"),
    [
        ({"size": "512x512", "width": 768}, "size", "'512x512' contradicts the row's width of 768; give one"),
        ({"Size": "512x512", "height": 8}, "Size", "contradicts the row's height of 8"),
        ({"size": "512x9000"}, "size", "height must be from 8 to 8192, not '512x9000'"),
        ({"size": "0x0"}, "size", "width must be from 8"),
        ({"seed": -2}, "seed", "not -2"),
        ({"seed": -1.5}, "seed", "not -1.5"),
        ({"width": -1}, "width", "not -1"),
        ({"id": 1.5}, "id", "text or an integer, not 1.5"),
        ({"cfg": "7,5"}, "cfg", "not '7,5'"),
    ],
)
def test_what_contradicts_or_exceeds_is_a_bad_row(tmp_path, record, column, words):
    rows, (bad,) = read([put(tmp_path / "p.jsonl", lines({"prompt": "fine"}, {"prompt": "a"} | record))])
    assert [r["prompt"] for r in rows] == ["fine"]
    assert (bad.row, bad.column) == (2, column)
    assert words in bad.reason


def test_a_field_beside_and_in_a_body_is_a_bad_row(tmp_path):
    text = lines({"seed": 1, "body": {"prompt": "a", "seed": 2}}, {"seed": 1, "body": {"prompt": "b"}})
    rows, (bad,) = read([put(tmp_path / "p.jsonl", text)])
    assert [(r["prompt"], r["seed"]) for r in rows] == [("b", 1)]
    assert "'seed' stands both beside and in 'body'" in bad.reason


def test_command_lines_of_a_web_interface_are_bad_rows(tmp_path):
    text = '--prompt "a cat" --steps 20\na dog --no cats\n'
    rows, (bad,) = read([put(tmp_path / "p.txt", text)])
    assert [r["prompt"] for r in rows] == ["a dog --no cats"]
    assert (bad.row, bad.prompt) == (1, '--prompt "a cat" --steps 20')
    assert "a command line, not a prompt; make a csv" in bad.reason


def test_a_body_beside_a_prompt_passes_through(tmp_path):
    ((found,), _) = read([put(tmp_path / "p.jsonl", lines({"prompt": "a", "body": {"prompt": "b"}}))])
    assert same(found, row("a", extra={"body": {"prompt": "b"}}))


def test_fractions_beside_whole_float_ids_are_bad_rows_whatever_the_chunk(tmp_path, monkeypatch):
    path = put(tmp_path / "p.parquet", pa.table({"prompt": ["a", "b", "c"], "id": [1.0, 2.5, 2.0**60]}))
    for rows_of_a_chunk in (10, 1):
        monkeypatch.setattr(raw_chunks, "CHUNK_ROWS", rows_of_a_chunk)
        rows, bad = read([path])
        assert [r["prompt_id"] for r in rows] == ["1"]
        assert [b.row for b in bad] == [2, 3]


# Options


def test_a_forced_delimiter_counts(tmp_path):
    path = put(tmp_path / "p.csv", "prompt;text,seed\na;b,1\n")
    assert read([path])[1] == []
    (found,), _ = read([path], delimiter=",", prompt_column="prompt;text")
    assert same(found, row("a;b", seed=1))
    (found,), _ = read([put(tmp_path / "q.csv", "prompt~n\na,b~2\n")], delimiter="~")
    assert same(found, row("a,b", num_images=2))
    with pytest.raises(InputError, match=r"--delimiter ';': none of the prompt files is csv or tsv"):
        read([put(tmp_path / "p.txt", "a\n")], delimiter=";")
    for wrong in ("", ";;", '"', "\n"):
        with pytest.raises(InputError, match="must be one character"):
            PlanOptions(delimiter=wrong)


def test_the_prompt_column_is_found_between_other_delimiters(tmp_path):
    path = put(tmp_path / "p.csv", "Beschreibung;prompt\nein Hund;a dog\n")
    (found,), _ = read([path], prompt_column="Beschreibung")
    assert same(found, row("ein Hund", extra={"prompt": "a dog"}))
    with pytest.raises(InputError, match="looked for beschreibung"):
        read([path], prompt_column="beschreibung")


def test_files_without_columns_go_with_a_prompt_column(tmp_path):
    files = [
        put(tmp_path / "a.csv", "Was\na\n"),
        put(tmp_path / "b.txt", "b\n"),
        put(tmp_path / "c.json", '["c"]'),
    ]
    rows, _ = read(files, prompt_column="Was")
    assert [r["prompt"] for r in rows] == ["a", "b", "c"]


# Folders


def test_a_folder_that_spark_wrote(tmp_path, caplog):
    for i, prompts in enumerate((["a", "b"], ["c"])):
        name = f"part-0000{i}-0c.snappy.parquet"
        table = pa.table({"Prompt": prompts, "sampler": ["x"] * len(prompts)})
        put(tmp_path / "out" / "style=oil" / name, table)
        put(tmp_path / "out" / "style=oil" / f".{name}.crc", b"crc")
    put(tmp_path / "out" / "style=ink" / "part-0-0c.snappy.parquet", pa.table({"Prompt": ["d"]}))
    put(tmp_path / "out" / "_SUCCESS", b"")
    with caplog.at_level(logging.INFO):
        rows, bad = read([tmp_path / "out"])
    assert [(r["prompt"], json.loads(r["extra"])["style"]) for r in rows] == [
        ("d", "ink"),
        ("a", "oil"),
        ("b", "oil"),
        ("c", "oil"),
    ]
    assert not bad
    assert len([m for m in said(caplog) if "is read as prompt" in m]) == 1  # not once per part
    assert len([m for m in said(caplog) if m.endswith("not used: sampler (passed through)")]) == 1


def test_a_folder_of_json_lines_that_spark_wrote(tmp_path):
    put(tmp_path / "out" / "seed=7" / "part-00000-0c.json", lines({"prompt": "a"}, {"prompt": "b"}))
    put(tmp_path / "out" / "seed=8" / "part-00000-0c.json", lines({"prompt": "c"}))
    put(tmp_path / "out" / "_SUCCESS", b"")
    rows, _ = read([tmp_path / "out"])
    assert [(r["prompt"], r["seed"]) for r in rows] == [("a", 7), ("b", 7), ("c", 8)]


def test_a_column_that_is_also_a_folder_is_refused(tmp_path):
    put(tmp_path / "out" / "seed=7" / "p.csv", "prompt,seed\na,1\n")
    with pytest.raises(InputError, match="'seed' is both a column and in the name of a folder"):
        read([tmp_path / "out"])


# Large JSON


def test_large_json_is_read_in_pieces(tmp_path, monkeypatch):
    """More than a buffer holds, with values of every length across its ends."""
    records = [{"caption": "x" * (i % 97), "id": i, "n": 1, "tail": -i} for i in range(1, 3000)]
    text = json.dumps({"images": [{"id": i} for i in range(500)], "annotations": records})
    monkeypatch.setattr(prompt_json, "BLOCK_CHARS", 64)
    monkeypatch.setattr(prompt_json, "MAX_VALUE_CHARS", 400)
    rows, bad = read([put(tmp_path / "p.json", text)])
    assert [(r["prompt_id"], r["prompt"]) for r in rows] == [
        (str(r["id"]), r["caption"]) for r in records if r["caption"]
    ]
    assert [b.row for b in bad] == [i for i in range(1, 3000) if i % 97 == 0]


def test_a_value_over_the_limit_is_refused_with_its_place(tmp_path, monkeypatch):
    monkeypatch.setattr(prompt_json, "MAX_VALUE_CHARS", 1000)
    monkeypatch.setattr(prompt_json, "BLOCK_CHARS", 100)
    path = put(tmp_path / "p.json", json.dumps([{"prompt": "a"}, {"prompt": "x" * 3000}]))
    with pytest.raises(
        InputError, match=r"value at character 19 is .* longer than 1,000 characters; .*JSON lines"
    ):
        read([path])


SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
VALUES = st.recursive(
    SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=3), v, max_size=3)
)


@pytest.mark.long
@settings(max_examples=150, deadline=None)
@given(
    records=st.lists(st.dictionaries(st.text(max_size=4), VALUES, max_size=3), max_size=6),
    before=st.dictionaries(st.sampled_from("abc"), SCALARS | st.lists(st.integers(), max_size=3), max_size=3),
    indent=st.none() | st.integers(0, 3),
    ascii_only=st.booleans(),
    block=st.integers(1, 40),
)
def test_pieces_of_json_are_what_a_parser_of_the_whole_reads(records, before, indent, ascii_only, block):
    for value in (records, before | {"rows": [{"prompt": "first"}, *records]}):
        data = json.dumps(value, indent=indent, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
        expected = json.loads(data.decode("utf-8", "surrogatepass"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(prompt_json, "BLOCK_CHARS", block)
            chunks = list(read_json(TextFile("p.json", io.BytesIO(data), False), KnownNames(), Remarks()))
        assert [r for c in chunks for r in c.records] == (
            expected if type(value) is list else expected["rows"]
        )
        assert not any(c.bad for c in chunks)


FIELDS = st.text(st.sampled_from("ab ;,|\t\"'\n\u00e4\u732b"), max_size=8)


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(st.tuples(FIELDS, FIELDS), min_size=1, max_size=8),
    delimiter=st.sampled_from(",;|\t"),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    line_end=st.sampled_from(["\n", "\r\n", "\r"]),
    name=st.sampled_from(["p.csv", "p.tsv"]),
)
def test_tables_come_back_as_they_were_written(tmp_path_factory, rows, delimiter, quoting, line_end, name):
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter, quoting=quoting, lineterminator="\n")
    writer.writerows([("Tag", "Prompt"), ("first", "a cat"), *rows])
    path = put(tmp_path_factory.mktemp("t") / name, text.getvalue().replace("\n", line_end))
    found, bad = read([path])
    written = [("first", "a cat"), *rows]
    wanted = [(tag, prompt) for tag, prompt in written if prompt.strip()]
    assert [(json.loads(r["extra"])["Tag"], r["prompt"]) for r in found] == wanted
    assert len(bad) == sum(1 for tag, prompt in written if tag.strip() and not prompt.strip())
