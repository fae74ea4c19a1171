import hashlib
import io
import json
import tarfile
from pathlib import PurePosixPath

import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from millijoule.workers.errors import InputError
from millijoule.workers.images import writers
from millijoule.workers.images.writers import FORMATS, MAX_NAME_BYTES, image_name, open_writer
from millijoule.workers.schemas import IMAGE_ROW_SCHEMA, ImageRequest, ImageRow

PREFIX = "data/000012-abc"
any_id = st.text(st.characters(exclude_categories=()), max_size=200)
hostile_ids = [
    *("../../etc/x", "a/b", "a%2Fb", "con", "\x00", "", ".", "..", "%"),
    *("x" * 4000, "é" * 90, "a.b", "\ud800"),
]


def ok_row(prompt_id="p", index=0, **fields):
    request = ImageRequest(prompt_id, image_index=index, prompt="a red cat", seed=2**64 - 1, **fields)
    return ImageRow(request, "ok", width=32, height=32, num_inference_steps=16, warnings=("unknown word: x",))


def quarantined_row(prompt_id="bad"):
    return ImageRow(ImageRequest(prompt_id, 0, "?", 1), "quarantined", error="ValueError: no")


def write(tmp_path, format, rows):
    tmp_path.mkdir(exist_ok=True)
    writer = open_writer(format, tmp_path, PREFIX)
    for row, encoded in rows:
        writer.add(row, encoded)
    return writer.finish()


def image_bytes(tmp_path, row):
    """The image of `row` as a reader finds it."""
    if "#" in row.path:
        tar, member = row.path.split("#")
        index = json.loads((tmp_path / tar).with_suffix(".index.json").read_bytes())
        offset, size = index[member]
        return (tmp_path / tar).read_bytes()[offset : offset + size]
    if row.path.endswith(".parquet"):
        table = pq.read_table(tmp_path / row.path).to_pylist()
        return next(r["image"] for r in table if r["sha256"] == row.sha256)
    return (tmp_path / row.path).read_bytes()


@pytest.mark.parametrize("format", FORMATS)
def test_every_image_is_found_where_its_row_says(tmp_path, format):
    images = [bytes([i]) * (100 + i) for i in range(5)]
    shard = write(
        tmp_path,
        format,
        [*((ok_row(f"p/{i}"), image) for i, image in enumerate(images)), (quarantined_row(), None)],
    )
    assert len(shard.rows) == 6
    for row, image in zip(shard.rows, images, strict=False):
        assert image_bytes(tmp_path, row) == image
        assert row.sha256 == hashlib.sha256(image).hexdigest()
        assert row.size_bytes == len(image)
    assert (shard.rows[-1].path, shard.rows[-1].sha256, shard.rows[-1].size_bytes) == (None, None, None)


@pytest.mark.parametrize("format", FORMATS)
def test_files_are_described_by_what_is_on_disk(tmp_path, format):
    shard = write(tmp_path, format, [(ok_row("a"), b"png"), (quarantined_row(), None)])
    on_disk = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file())
    assert sorted(f.path for f in shard.files) == on_disk
    assert shard.rows_key in on_disk
    for file in shard.files:
        data = (tmp_path / file.path).read_bytes()
        assert (file.size_bytes, file.sha256) == (len(data), hashlib.sha256(data).hexdigest())
        assert file.path.startswith(PREFIX)


@pytest.mark.parametrize("format", FORMATS)
def test_the_rows_file_holds_every_row_in_order(tmp_path, format):
    shard = write(tmp_path, format, [(ok_row("b"), b"1"), (quarantined_row(), None), (ok_row("a", 3), b"2")])
    table = pq.read_table(tmp_path / shard.rows_key)
    rows = table.select(IMAGE_ROW_SCHEMA.names)
    assert rows.schema.equals(IMAGE_ROW_SCHEMA)
    assert rows.to_pylist() == [row.as_record() for row in shard.rows]
    if format == "parquet":
        assert table["image"].to_pylist() == [b"1", None, b"2"]


@pytest.mark.parametrize("format", FORMATS)
def test_a_shard_without_images_still_has_its_rows(tmp_path, format):
    shard = write(tmp_path, format, [(quarantined_row(), None)])
    assert pq.read_table(tmp_path / shard.rows_key)["status"].to_pylist() == ["quarantined"]
    assert pq.read_table(tmp_path / "empty" / write(tmp_path / "empty", format, []).rows_key).num_rows == 0


@pytest.mark.parametrize("format", FORMATS)
def test_the_same_shard_gives_the_same_bytes(tmp_path, format):
    rows = [(ok_row(f"p{i}"), b"x" * i) for i in range(1, 4)]
    first, second = (write(tmp_path / name, format, rows) for name in "ab")
    assert [f.sha256 for f in first.files] == [f.sha256 for f in second.files]


@pytest.mark.parametrize("format", FORMATS)
def test_a_row_added_twice_is_refused(tmp_path, format):
    with pytest.raises(ValueError, match="'p', image 0: added twice"):
        write(tmp_path, format, [(ok_row(), b"1"), (ok_row(), b"2")])


@pytest.mark.parametrize("format", FORMATS)
def test_status_and_image_must_agree(tmp_path, format):
    writer = open_writer(format, tmp_path, PREFIX)
    with pytest.raises(ValueError, match="no image was given"):
        writer.add(ok_row(), None)
    with pytest.raises(ValueError, match="an image was given"):
        writer.add(quarantined_row(), b"x")


def test_an_unknown_format_names_the_known_ones(tmp_path):
    with pytest.raises(InputError, match="'zip' is not known: use one of parquet, webdataset, files"):
        open_writer("zip", tmp_path, PREFIX)


def test_parquet_row_groups_are_small_and_images_uncompressed(tmp_path, monkeypatch):
    monkeypatch.setattr("millijoule.workers.images.writers.ROW_GROUP_BYTES", 1000)
    shard = write(tmp_path, "parquet", [(ok_row(f"p{i}"), bytes(400)) for i in range(20)])
    meta = pq.ParquetFile(tmp_path / shard.files[0].path).metadata
    assert meta.num_row_groups == 7
    columns = {
        meta.row_group(0).column(i).path_in_schema: meta.row_group(0).column(i)
        for i in range(meta.num_columns)
    }
    assert columns["image"].compression == "UNCOMPRESSED"
    assert columns["image"].statistics is None
    assert {c.compression for name, c in columns.items() if name != "image"} == {"ZSTD"}
    assert columns["prompt_id"].statistics.min == "p0"


def test_webdataset_members_follow_the_convention(tmp_path):
    shard = write(tmp_path, "webdataset", [(ok_row("a.b/c"), b"png"), (ok_row("x" * 300), b"png2")])
    with tarfile.open(tmp_path / shard.files[0].path) as tar:
        members = tar.getmembers()
        assert {(m.mtime, m.uid, m.gid, m.uname, m.mode, m.isfile()) for m in members} == {
            (0, 0, 0, "", 0o644, True)
        }
        names = [m.name for m in members]
        assert names[:3] == ["a%2Eb%2Fc_0.png", "a%2Eb%2Fc_0.txt", "a%2Eb%2Fc_0.json"]
        assert all(name.count(".") == 1 and "/" not in name for name in names)
        contents = {name: tar.extractfile(name).read() for name in names}
    assert contents["a%2Eb%2Fc_0.txt"] == b"a red cat"
    record = json.loads(contents["a%2Eb%2Fc_0.json"])
    assert (record["prompt_id"], record["seed"]) == ("a.b/c", 2**64 - 1)
    assert shard.files[0].size_bytes % 10240 == 0


def test_the_index_gives_the_byte_range_of_every_member(tmp_path):
    shard = write(tmp_path, "webdataset", [(ok_row(i * 60), i.encode()) for i in ("a", "bb", "ccc")])
    data = (tmp_path / shard.files[0].path).read_bytes()
    index = json.loads((tmp_path / shard.files[1].path).read_bytes())
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert index == {m.name: [m.offset_data, m.size] for m in tar.getmembers()}


@pytest.mark.parametrize("format", FORMATS)
def test_hostile_ids_stay_in_the_folder_and_apart(tmp_path, format):
    ids = [i for i in hostile_ids if i != "\ud800"]  # the plan's own Parquet cannot hold a lone surrogate
    shard = write(tmp_path, format, [(ok_row(prompt_id), prompt_id.encode()) for prompt_id in ids])
    for row, prompt_id in zip(shard.rows, ids, strict=True):
        assert image_bytes(tmp_path, row) == prompt_id.encode()
    assert all(p.resolve().is_relative_to(tmp_path / "data") for p in tmp_path.rglob("*") if p.is_file())


@given(any_id, st.integers(0, 2**31 - 1))
@example("", 0)
@example("é" * 90, 0)
def test_a_name_is_one_plain_path_component(prompt_id, index):
    name = image_name(prompt_id, index)
    assert len(name.encode("ascii")) <= MAX_NAME_BYTES + 11
    assert set(name) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-%")
    assert PurePosixPath(name).name == name


@given(st.sets(st.tuples(any_id | st.sampled_from(hostile_ids), st.integers(0, 20)), max_size=30))
@example({("a_1", 0), ("a", 1), ("a", 10), ("a_1_0", 0)})
@example({("", 0), ("%", 0), ("\x00", 0), ("%00", 0)})
@example({("x" * 121, 0), ("x" * 122, 0), (image_name("x" * 121, 0)[:-2], 0)})
def test_no_two_images_share_a_name(images):
    assert len({image_name(*image) for image in images}) == len(images)


@pytest.mark.parametrize("format", FORMATS)
@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["image", "none", "large", "other"]), st.integers(1, 7)), max_size=12),
    st.integers(1, 9),
)
def test_rows_that_are_added_together_make_the_files_that_they_make_one_by_one(
    tmp_path_factory, format, runs, n
):
    """Also where row groups end within them, and some have no image."""
    rows = []
    for kind, count in runs:
        for _ in range(count):
            name = f"p{len(rows) // 3}"
            if kind == "none":
                rows.append((quarantined_row(f"bad{len(rows)}"), None))
                continue
            words = () if kind == "other" else ("unknown word: x",)
            row = ok_row(name, len(rows), guidance_scale=1.5 if kind == "other" else None, extra="{}")
            rows.append((row._replace(warnings=words), bytes([len(rows)]) * (400 if kind == "large" else 30)))
    made = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writers, "ROW_GROUP_BYTES", 1000)
        patch.setattr(writers, "ROW_GROUP_ROWS", 11)
        for together in (1, n):
            folder = tmp_path_factory.mktemp("shard")
            writer = open_writer(format, folder, PREFIX)
            for start in range(0, len(rows), together):
                writer.add_many(*zip(*rows[start : start + together], strict=True))
            made.append(writer.finish())
            for file in made[-1].files:
                assert hashlib.sha256((folder / file.path).read_bytes()).hexdigest() == file.sha256
    assert made[0] == made[1]


@pytest.mark.parametrize("format", FORMATS)
def test_rows_that_are_added_together_are_checked_like_others(tmp_path, format):
    twice = [ok_row("a"), ok_row("b"), ok_row("a")]
    cases = [
        (twice, [b"x"] * 3, "'a', image 0: added twice"),
        ([ok_row("a"), ok_row("b")], [b"x", None], "'b': no image was given"),
        ([quarantined_row(), ok_row("b")], [b"x", b"x"], "'bad': an image was given"),
        ([ok_row("c")], [b"x", b"x"], "shorter|longer"),
    ]
    for i, (rows, encoded, words) in enumerate(cases):
        (tmp_path / str(i)).mkdir()
        writer = open_writer(format, tmp_path / str(i), PREFIX)
        with pytest.raises(ValueError, match=words):
            writer.add_many(rows, encoded)
    writer = open_writer(format, tmp_path, PREFIX)
    writer.add(ok_row("a"), b"x")
    with pytest.raises(ValueError, match="'a', image 0: added twice"):
        writer.add_many([ok_row("b"), ok_row("a")], [b"x", b"y"])
