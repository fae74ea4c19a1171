"""The plan: every row once, shards of one size, the same bytes for the same input, memory that does not grow."""

import dataclasses
import gzip
import hashlib
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millijoule.pipeline.planning import duplicate_ids, raw_chunks, shard_cutter
from millijoule.pipeline.planning.make_plan import plan_job
from millijoule.pipeline.planning.plan import load_plan
from millijoule.pipeline.planning.plan_options import PlanOptions, compute_fingerprint
from millijoule.pipeline.planning.prompts import BAD_ROW_SCHEMA
from millijoule.pipeline.planning.retry_rounds import JobShards
from millijoule.workers.errors import InputError, NotFoundError, StoreError
from millijoule.workers.layout import plan_index_key
from millijoule.workers.schemas import PLAN_ROW_SCHEMA, ImageRequest
from millijoule.workers.shard_rows import (
    PlanRow,
    derive_seed,
    read_shard_rows,
    requests_by_place,
    shard_requests,
)
from millijoule.workers.storage.inputs import InputFile, expand_inputs
from millijoule.workers.storage.open import open_store

EXTRA = {"model_sha256": "0" * 64, "job_seed": 0}


class World:
    """A folder with prompt files and an output."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = open_store(str(folder / "out"))
        self.files: list[InputFile] = []

    def file(self, name, content):
        path = self.folder / name
        if isinstance(content, pa.Table):
            pq.write_table(content, path)
        elif isinstance(content, list):
            path.write_text("".join(json.dumps(record) + "\n" for record in content))
        else:
            path.write_text(content)
        self.files += expand_inputs([str(path)])
        return self

    def plan(self, **options):
        self.made = plan_job(self.files, PlanOptions(**options), self.store, EXTRA)
        self.stored, self.table = load_plan(self.store, self.made.fingerprint)
        self.index = JobShards(self.made.fingerprint, self.table)
        return self

    def shards(self) -> list[list[PlanRow]]:
        return [read_shard_rows(self.store, shard) for shard in self.index]

    def rows(self) -> list[PlanRow]:
        return [row for rows in self.shards() for row in rows]

    def bad_rows(self):
        with self.store.open_input(self.made.bad_rows_key) as file:
            table = pq.ParquetFile(file).read()
        assert table.schema == BAD_ROW_SCHEMA
        return table.to_pylist()

    def objects(self):
        return {o.key: self.store.get(o.key) for o in self.store.list()}


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def numbers(rows):
    return [int(row.source.rpartition(":")[2]) for row in rows]


# Shards


def test_rows_keep_their_order_and_shards_their_size(world):
    world.file("p.txt", "".join(f"prompt {i}\n" for i in range(1000))).plan(shard_size=64)
    assert world.made.n_rows == world.made.n_images == 1000
    assert world.table["n_rows"].to_pylist() == [64] * 15 + [40]
    assert [r.prompt for r in world.rows()] == [f"prompt {i}" for i in range(1000)]
    assert [s.shard_id for s in world.index] == list(range(16))


def test_each_shard_is_one_row_group_of_a_part_with_the_plan_schema(world):
    world.file("p.txt", "".join(f"prompt {i}\n" for i in range(600))).plan(shard_size=1)
    assert world.made.n_parts == 3
    prefix = f"_job/plan-{world.made.fingerprint[:12]}"
    assert sorted(world.objects()) == [
        f"{prefix}/bad_rows.parquet",
        *(f"{prefix}/part-{i:05d}.parquet" for i in range(3)),
        f"{prefix}/shards.parquet",
    ]
    shard = world.index[599]
    assert (shard.key, shard.row_group) == (f"{prefix}/part-00002.parquet", 599 - 512)
    with world.store.open_input(shard.key) as file:
        part = pq.ParquetFile(file)
        assert part.schema_arrow == PLAN_ROW_SCHEMA
        assert part.num_row_groups == 600 - 512


def test_shard_size_counts_images_and_rows_are_never_split(world):
    counts = [100, 100, 100, 300, 56, 200, 256, 1]
    world.file("p.jsonl", [{"prompt": str(i), "n": n} for i, n in enumerate(counts)]).plan(shard_size=256)
    assert [numbers(rows) for rows in world.shards()] == [[1, 2], [3], [4], [5, 6], [7], [8]]
    assert world.table["n_images"].to_pylist() == [200, 100, 300, 256, 256, 1]
    assert world.made.n_images == sum(counts)


def test_shards_are_homogeneous_in_size_and_steps(world):
    records = [
        {"prompt": str(i), "width": [256, 512][i % 2], "height": 512, "steps": [None, 4, 8][i % 3]}
        for i in range(120)
    ]
    world.file("p.jsonl", records).plan(shard_size=8)
    for shard, rows in zip(world.index, world.shards(), strict=True):
        assert {(r.width, r.height, r.num_inference_steps) for r in rows} == {
            (shard.width, shard.height, shard.num_inference_steps)
        }
        assert numbers(rows) == sorted(numbers(rows))
    assert sorted(numbers(world.rows())) == list(range(1, 121))


def test_the_job_s_number_of_images_serves_rows_that_do_not_say(world):
    world.file("p.csv", "id,prompt,n,width,steps,cfg_scale,negative_prompt\na,x,,,,,\nb,y,2,64,3,1.5,bad\n")
    a, b = sorted(world.plan(images_per_prompt=5).rows(), key=lambda r: r.prompt_id)
    assert (a.num_images, a.width, a.num_inference_steps, a.guidance_scale) == (5, None, None, None)
    assert (b.num_images, b.width, b.height, b.num_inference_steps, b.guidance_scale) == (2, 64, None, 3, 1.5)
    assert (a.negative_prompt, b.negative_prompt) == (None, "bad")


@pytest.mark.parametrize(
    "options",
    [
        {"shard_size": 0},
        {"images_per_prompt": 0},
        {"images_per_prompt": 10_001},
        {"duplicate_ids": "first"},
    ],
)
def test_impossible_options_are_refused(options):
    with pytest.raises(InputError, match="must be"):
        PlanOptions(**options)


def test_too_many_waiting_rows_cut_the_fullest_bucket_early(world, monkeypatch):
    monkeypatch.setattr(shard_cutter, "MAX_WAITING_ROWS", 10)
    monkeypatch.setattr(raw_chunks, "CHUNK_ROWS", 7)
    records = [{"prompt": str(i), "width": 8 * (1 + i % 5), "id": str(i)} for i in range(100)]
    world.file("p.jsonl", records).plan(shard_size=50)
    assert len(world.index) > 5
    assert sorted(numbers(world.rows())) == list(range(1, 101))


# Ids and seeds


def test_rows_without_an_id_get_ordinal_and_digest(world):
    world.file("a.txt", "cat\n\ncat\n").file("b.jsonl", [{"prompt": "cat"}, {"prompt": "dog", "id": "mine"}])
    ids = [r.prompt_id for r in world.plan().rows()]
    assert [i[:9] for i in ids[:3]] == ["00000000-", "00000002-", "00000003-"]
    assert ids[0][9:] == ids[1][9:] == ids[2][9:]
    assert len(ids[0]) == 25
    assert ids[3] == "mine"


def test_generated_ids_depend_on_the_row_and_not_on_options(world):
    world.file("p.csv", "prompt,tag\ncat,1\ncat,2\n")
    first = [r.prompt_id for r in world.plan().rows()]
    assert first[0][9:] != first[1][9:]
    assert [r.prompt_id for r in world.plan(images_per_prompt=4, shard_size=1).rows()] == first


def test_requests_by_place_are_those_of_all_rows_in_order():
    def row(name, seed, count, first=0):
        return PlanRow(name, "p", None, seed, count, None, None, None, None, None, f"f:{name}", None, first)

    plain = [row("a", None, 1), row("b", None, 1), row("c", 5, 1)]
    for rows in (
        plain,
        [*plain, row("d", None, 2)],
        [row("e", 7, 1, first=2), row("f", None, 1, first=1)],
        [],
    ):
        by_place = requests_by_place(rows, 7)
        assert list(by_place.values()) == shard_requests(rows, 7)
        assert list(by_place) == [(i, k) for i, r in enumerate(rows) for k in r.image_indices]
        for (i, k), request in by_place.items():
            seed = derive_seed(7, rows[i].prompt_id, k) if rows[i].seed is None else rows[i].seed + k
            assert (request.prompt_id, request.image_index, request.seed) == (rows[i].prompt_id, k, seed)
            assert request == ImageRequest(rows[i].prompt_id, k, "p", seed, source=rows[i].source)


def test_seeds():
    def row(seed):
        return PlanRow("id", "p", "neg", seed, 3, 8, 16, 4, 1.5, "{}", "f:1")

    assert [r.seed for r in shard_requests([row(2**64 - 2)], 7)] == [2**64 - 2, 2**64 - 1, 0]
    expected = [int.from_bytes(hashlib.sha256(f"7\0id\0{k}".encode()).digest()[:8], "big") for k in range(3)]
    requests = shard_requests([row(None)], 7)
    assert [r.seed for r in requests] == expected == [derive_seed(7, "id", k) for k in range(3)]
    assert [r.image_index for r in requests] == [0, 1, 2]
    first = requests[0]
    made = ImageRequest("id", 0, "p", expected[0], "neg", 8, 16, 4, 1.5, "{}", "f:1")
    assert (first, hash(first), vars(first)) == (made, hash(made), vars(made))
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.seed = 1
    assert (first.width, first.height, first.num_inference_steps, first.guidance_scale) == (8, 16, 4, 1.5)
    assert (first.prompt, first.negative_prompt, first.extra, first.source) == ("p", "neg", "{}", "f:1")


# Duplicate ids


@pytest.fixture
def duplicates(world):
    world.file("a.csv", "id,prompt\nx,1\ny,2\nx,3\n")
    return world.file("b.csv", "prompt,custom_id\n4,z\n5,y\n6,x\n")


def test_duplicate_ids_are_refused_naming_both_places_and_the_way_out(duplicates):
    with pytest.raises(InputError) as caught:
        duplicates.plan()
    message = str(caught.value)
    folder = duplicates.folder
    assert "3 rows repeat a prompt id" in message
    assert f"'x' at {folder}/a.csv:1 and {folder}/a.csv:3" in message
    assert f"'y' at {folder}/a.csv:2 and {folder}/b.csv:2" in message
    assert "--duplicate-ids keep-first" in message
    assert not duplicates.objects()


def test_keep_first_quarantines_later_rows(duplicates):
    duplicates.plan(duplicate_ids="keep-first")
    assert [(r.prompt_id, r.prompt) for r in duplicates.rows()] == [("x", "1"), ("y", "2"), ("z", "4")]
    bad = duplicates.bad_rows()
    assert [(Path(b["file"]).name, b["row"], b["column"], b["prompt_id"], b["prompt"]) for b in bad] == [
        ("a.csv", 3, "id", "x", "3"),
        ("b.csv", 2, "custom_id", "y", "5"),
        ("b.csv", 3, "custom_id", "x", "6"),
    ]
    assert bad[1]["reason"].endswith("a.csv:2")
    assert duplicates.made.n_bad_rows == 3


def test_suffix_renames_later_rows(duplicates):
    rows = duplicates.plan(duplicate_ids="suffix").rows()
    assert [(r.prompt_id, r.prompt) for r in rows] == [
        ("x", "1"),
        ("y", "2"),
        ("x~2", "3"),
        ("z", "4"),
        ("y~2", "5"),
        ("x~3", "6"),
    ]


def test_a_suffix_that_is_taken_is_refused(world):
    world.file("p.csv", "id,prompt\nx,1\nx,2\nx~2,3\n")
    with pytest.raises(InputError, match=r"'x~2' at .*p\.csv:2 and .*p\.csv:3.*keep-first"):
        world.plan(duplicate_ids="suffix")


def test_a_given_id_may_equal_a_generated_one(world):
    generated = world.file("a.txt", "cat\n").plan().rows()[0].prompt_id
    world.file("b.csv", f"id,prompt\n{generated},dog\n")
    with pytest.raises(InputError, match=rf"{generated}.*a\.txt:1 and .*b\.csv:1"):
        world.plan()


@pytest.mark.parametrize("pending", [10, 10**9])
def test_duplicates_are_found_in_files_and_in_memory(tmp_path, monkeypatch, pending):
    monkeypatch.setattr(duplicate_ids, "PENDING_RECORDS", pending)
    random = np.random.default_rng(0)
    values = random.integers(0, 300, 2000)
    finder = duplicate_ids.DuplicateFinder(tmp_path)
    for start in range(0, 2000, 7):
        part = values[start : start + 7]
        finder.add(pa.array([f"id{v}" for v in part]), np.arange(start, start + len(part)) * 3)
    found = finder.duplicates()
    seen: dict[int, list[int]] = {}
    expected = []
    for i, v in enumerate(values.tolist()):
        seen.setdefault(v, []).append(3 * i)
        if len(seen[v]) > 1:
            expected.append((3 * i, seen[v][0], len(seen[v])))
    assert (
        list(zip(found.ordinal.tolist(), found.first.tolist(), found.nth.tolist(), strict=True)) == expected
    )
    assert any(tmp_path.iterdir()) == (pending == 10)


# Bad rows and warnings


def test_bad_rows_are_written_with_file_row_column_and_reason(world):
    world.file("p.csv", "id,prompt,width\na,ok,64\nb,,64\nc,wide,9000\nd,x\n").plan()
    assert [(b["row"], b["column"], b["prompt_id"], b["prompt"]) for b in world.bad_rows()] == [
        (2, "prompt", "b", ""),
        (3, "width", "c", "wide"),
        (4, None, None, None),
    ]
    assert world.made.n_bad_rows == 3
    assert world.made.n_rows == 1


def test_input_without_one_usable_row_is_refused(world):
    world.file("p.csv", "prompt,width\na,1\nb,2\n")
    with pytest.raises(InputError, match=r"none of the 2 rows.*p\.csv:1, column 'width'.*p\.csv:2"):
        world.plan()
    assert not world.objects()


def test_an_empty_file_among_others_is_a_warning(world):
    world.file("a.txt", "").file("b.txt", "cat\n").file("c.csv", "prompt\n").plan()
    assert [Path(w.split(":")[0]).name for w in world.made.warnings] == ["a.txt", "c.csv"]
    assert world.stored == world.made
    assert len(world.rows()) == 1


# What must always hold

TEXTS = st.one_of(st.sampled_from(["cat", "dog", "", " ", "a\0b", "ä\n"]), st.text(max_size=8))
RECORDS = st.lists(
    st.fixed_dictionaries(
        {"prompt": TEXTS},
        optional={
            "id": st.one_of(st.sampled_from(["a", "b", "a~2", "", None]), st.integers(0, 9)),
            "width": st.sampled_from([None, 8, "16", 64.0, 7, "x", 9000]),
            "steps": st.sampled_from([1, 2, None, 0]),
            "n": st.integers(-1, 12),
            "seed": st.sampled_from([0, 2**64 - 1, -1, "5", 2**64]),
            "cfg_scale": st.sampled_from([1, 2.5, "x", -1, None]),
            "tag": TEXTS,
        },
    ),
    min_size=1,
    max_size=40,
)


@pytest.mark.long
@settings(max_examples=30, deadline=None)
@given(
    files=st.lists(RECORDS, min_size=1, max_size=3),
    shard_size=st.integers(1, 20),
    chunk_rows=st.integers(1, 12),
    duplicate_ids=st.sampled_from(["keep-first", "suffix"]),
)
def test_every_row_ends_once_in_a_shard_or_in_quarantine(
    tmp_path_factory, files, shard_size, chunk_rows, duplicate_ids
):
    world = World(tmp_path_factory.mktemp("w"))
    for i, records in enumerate(files):
        world.file(f"{i}.jsonl", [{"prompt": "always fine"}, *records])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(raw_chunks, "CHUNK_ROWS", chunk_rows)
        try:
            world.plan(shard_size=shard_size, duplicate_ids=duplicate_ids)
        except InputError as error:
            if duplicate_ids == "suffix" and "got a suffix" in str(error):
                return  # "a~2" was taken
            raise
    shards = world.shards()
    rows = [row for shard_rows in shards for row in shard_rows]
    bad = [f"{b['file']}:{b['row']}" for b in world.bad_rows()]
    expected = [
        f"{world.files[i].url}:{k + 1}" for i, records in enumerate(files) for k in range(len(records) + 1)
    ]
    assert Counter(expected) == Counter([r.source for r in rows] + bad)
    assert max(Counter(r.prompt_id for r in rows).values()) == 1
    assert world.made.n_images == sum(r.num_images for r in rows)
    for shard, shard_rows in zip(world.index, shards, strict=True):
        assert len(shard_rows) == shard.n_rows
        assert shard.first_prompt_id == shard_rows[0].prompt_id
        assert shard.n_images == sum(r.num_images for r in shard_rows)
        assert shard.n_images <= shard_size or shard.n_rows == 1
        sizes = {(r.width, r.height, r.num_inference_steps) for r in shard_rows}
        assert sizes == {(shard.width, shard.height, shard.num_inference_steps)}
    once, bad_rows = world.objects(), world.bad_rows()
    world.plan(shard_size=shard_size, duplicate_ids=duplicate_ids)  # in one chunk a file
    again = world.objects()
    assert world.bad_rows() == bad_rows
    changed = {key for key in once.keys() | again.keys() if once.get(key) != again.get(key)}
    assert changed <= {world.made.bad_rows_key}  # which has a row group for each chunk


@settings(deadline=None)
@given(
    rows=st.lists(st.tuples(st.sampled_from([None, 8, 16]), st.integers(1, 9)), min_size=1, max_size=60),
    shard_size=st.integers(1, 20),
    chunk_rows=st.integers(1, 60),
)
def test_shards_come_as_they_become_full_however_rows_arrive(rows, shard_size, chunk_rows):
    waiting: dict[int | None, list[int]] = {}
    expected: list[list[int]] = []
    for i, (width, n) in enumerate(rows):
        bucket = waiting.setdefault(width, [])
        if bucket and sum(rows[k][1] for k in bucket) + n > shard_size:
            expected.append(waiting.pop(width))
            bucket = waiting.setdefault(width, [])
        bucket.append(i)
        if sum(rows[k][1] for k in bucket) >= shard_size:
            expected.append(waiting.pop(width))
    expected += sorted(waiting.values())

    shards: list[list[int]] = []

    def emit(batch, ranges):
        positions = [int(v) for v in batch["prompt_id"].to_pylist()]
        shards.extend(positions[start:end] for start, end in ranges)

    records = [
        dict.fromkeys(PLAN_ROW_SCHEMA.names)
        | {"prompt_id": str(i), "prompt": "p", "source": "f:1", "width": width, "num_images": n}
        for i, (width, n) in enumerate(rows)
    ]
    cutter = shard_cutter.ShardCutter(shard_size, emit)
    for start in range(0, len(records), chunk_rows):
        cutter.add(pa.RecordBatch.from_pylist(records[start : start + chunk_rows], PLAN_ROW_SCHEMA))
    cutter.finish()
    assert shards == expected


# Fingerprint and what stands in the store


def test_the_fingerprint_follows_content_and_options_and_not_names(tmp_path):
    def fingerprint(files, extra=None, **options):
        return compute_fingerprint(
            expand_inputs([str(f) for f in files]), PlanOptions(**options), extra or EXTRA
        )

    paths = [tmp_path / name for name in ("a.txt", "b.txt", "c.csv", "d.txt")]
    for path, text in zip(paths, ["prompt\n", "other\n", "prompt\n", "prompt\n"], strict=True):
        path.write_text(text)
    a, b, c, d = paths
    base = fingerprint([a])
    assert base == fingerprint([a]) == fingerprint([d])
    assert len(base) == 64
    others = [
        fingerprint([b]),
        fingerprint([c]),
        fingerprint([a, b]),
        fingerprint([a, d]),
        fingerprint([a], shard_size=8),
        fingerprint([a], images_per_prompt=2),
        fingerprint([a], max_prompt_chars=99),
        fingerprint([a], delimiter=";"),
        fingerprint([a], extra={**EXTRA, "job_seed": 1}),
    ]
    assert len({base, *others}) == len(others) + 1
    assert fingerprint([a, b]) != compute_fingerprint(
        [*expand_inputs([str(b)]), *expand_inputs([str(a)])], PlanOptions(), EXTRA
    )


def test_fingerprints_stay_what_they_were():
    """A job goes on only while its fingerprint is computed as it was when the job began."""
    file = InputFile("s3://b/p.txt", 5, "e")
    options = PlanOptions(
        shard_size=8, images_per_prompt=3, duplicate_ids="suffix", prompt_column="x", delimiter=";"
    )
    assert compute_fingerprint([file], PlanOptions(), EXTRA) == (
        "3e86db85873b342cf57f7992bcecc0f246233f69269359f36732fdbd0914367b"
    )
    assert compute_fingerprint([file], options, EXTRA) == (
        "f14435491956a9875aad17f10c07f3f8949107aa5c8c6294e59726ae24394bf3"
    )


def test_the_columns_of_folders_count(tmp_path):
    for folder in ("x/tag=1", "x2/tag=1", "y/tag=2", "z/1"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "p.csv").write_text("prompt\na\n")
    found = [
        compute_fingerprint(expand_inputs([str(tmp_path / folder)]), PlanOptions(), EXTRA)
        for folder in ("x", "x2", "y", "z", "x/tag=1")
    ]
    assert found[0] == found[1]
    assert found[3] == found[4]
    assert len(set(found)) == 3


def test_a_second_pass_says_nothing_twice(world, caplog):
    with caplog.at_level("INFO"):
        world.file("p.csv", "Prompt;id;sampler\na;1;x\nb;1;x\n").plan(duplicate_ids="suffix")
    said = [record.getMessage() for record in caplog.records]
    assert [r.prompt_id for r in world.rows()] == ["1", "1~2"]
    for words in ("separated by semicolons", "'Prompt' is read as prompt", "not used: sampler"):
        assert len([text for text in said if words in text]) == 1


def test_an_s3_file_counts_by_size_and_etag():
    def fingerprint(size, etag):
        return compute_fingerprint([InputFile("s3://b/p.txt", size, etag)], PlanOptions(), EXTRA)

    assert fingerprint(5, "e") == fingerprint(5, "e")
    assert len({fingerprint(5, "e"), fingerprint(6, "e"), fingerprint(5, "f")}) == 3


@pytest.mark.long
def test_input_and_plan_on_s3(moto_s3, s3_env, world):
    s3_env(moto_s3)
    url = f"s3://{moto_s3.make_bucket()}"
    inputs, store = open_store(f"{url}/in"), open_store(f"{url}/out")
    pq.write_table(pa.table({"prompt": ["one", "two"]}), world.folder / "a.parquet")
    inputs.put_file("a.parquet", world.folder / "a.parquet")
    inputs.put("b.csv", b"prompt,tag\nthree,x\n")
    inputs.put("c.jsonl.gz", gzip.compress(b'{"prompt":"four"}\nbroken\n'))
    inputs.put("d.txt", b"five\n" * 3)
    made = plan_job(expand_inputs([f"{url}/in/*"]), PlanOptions(shard_size=4), store, EXTRA)
    shards = JobShards(made.fingerprint, load_plan(store, made.fingerprint)[1])
    rows = [row for shard in shards for row in read_shard_rows(store, shard)]
    assert [r.prompt for r in rows] == ["one", "two", "three", "four", "five", "five", "five"]
    assert rows[0].source == f"{url}/in/a.parquet:1"
    assert made.n_bad_rows == 1


def test_a_plan_without_its_index_does_not_exist(world):
    world.file("p.txt", "cat\n").plan()
    world.store.delete([plan_index_key(world.made.fingerprint)])
    with pytest.raises(NotFoundError):
        load_plan(world.store, world.made.fingerprint)


def test_damage_is_noticed(world):
    world.file("p.txt", "cat\ndog\n").plan(shard_size=1)
    shards, fingerprint = list(world.index), world.made.fingerprint
    with pytest.raises(StoreError, match=r"other rows than the plan's index says for shard 1"):
        read_shard_rows(
            world.store,
            type(shards[1])(**{f: getattr(shards[1], f) for f in shards[1].__slots__} | {"row_group": 0}),
        )
    world.store.put(shards[0].key, b"no parquet")
    with pytest.raises(StoreError, match=r"part-00000\.parquet, row group 0: cannot read"):
        read_shard_rows(world.store, shards[0])
    with pytest.raises(StoreError, match="plan of another job"):
        load_plan(world.store, fingerprint[:12] + "0" * 52)
    world.store.put(plan_index_key(fingerprint), b"no parquet")
    with pytest.raises(StoreError, match=r"shards\.parquet: damaged"):
        load_plan(world.store, fingerprint)


# VmHWM and not ru_maxrss, which a process inherits from the one that started it.
MEASURE = """
import re, sys
from millijoule.pipeline.planning.make_plan import plan_job
from millijoule.pipeline.planning.plan_options import PlanOptions
from millijoule.workers.storage.inputs import expand_inputs
from millijoule.workers.storage.open import open_store
plan_job(expand_inputs([sys.argv[1]]), PlanOptions(), open_store(sys.argv[2]), {})
print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""


@pytest.mark.slow
@pytest.mark.parametrize("with_ids", [False, True])
def test_memory_does_not_grow_with_the_input(tmp_path, with_ids):
    peak_kib = {}
    for n in (10_000, 1_000_000):
        columns = {"prompt": [f"a photo of cat number {i} on a mat in the sun" for i in range(n)]}
        if with_ids:
            columns["id"] = [f"cat-{i}" for i in range(n)]
        path = tmp_path / f"{n}.parquet"
        pq.write_table(pa.table(columns), path)
        command = [sys.executable, "-c", MEASURE, str(path), str(tmp_path / f"out-{n}")]
        peak_kib[n] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert peak_kib[1_000_000] <= 1.3 * peak_kib[10_000]
