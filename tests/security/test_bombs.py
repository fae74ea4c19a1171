"""Small files that stand for large ones: they are read in bounded memory, or refused in words."""

from __future__ import annotations

import gzip
import io
import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from millijoule.pipeline.planning.parquet_bounds import refuse_bombs
from millijoule.pipeline.report.gallery import data_url
from millijoule.workers.errors import InputError
from millijoule.workers.generators.model_files import MAX_HEADER_BYTES, read_header
from millijoule.workers.images.readers import open_small, read_provenance

#: What reading a prompt file may take beyond what an empty one takes, in a process of its own.
ROOM_BYTES = 700 * 2**20

#: Reads the prompts of a file, prints rows read or the error, then the growth of the process's peak in bytes.
READ = """
import resource, sys
from millijoule.pipeline.planning.plan_options import PlanOptions
from millijoule.pipeline.planning.prompts import read_prompts
from millijoule.workers.errors import InputError
from millijoule.workers.storage.inputs import expand_inputs
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
rows = bad = 0
try:
    for chunk in read_prompts(expand_inputs([sys.argv[1]]), PlanOptions(shard_size=8)):
        rows += len(chunk.rows)
        bad += len(chunk.bad)
except InputError as error:
    print("refused:", error)
else:
    print("read:", rows, bad)
print(peak() - before)
"""


def read_in_a_process(path: Path) -> tuple[str, int]:
    done = subprocess.run(
        [sys.executable, "-c", READ, str(path)], capture_output=True, text=True, check=True, timeout=120
    )
    said, _, grown = done.stdout.strip().rpartition("\n")
    return said, int(grown)


@pytest.mark.long
def test_a_gzip_of_one_endless_line_is_one_bad_row(tmp_path):
    path = tmp_path / "bomb.txt.gz"
    with gzip.open(path, "wb") as file:
        for _ in range(160):
            file.write(b"a" * 2**20)
        file.write(b"\na cat\n")
    assert path.stat().st_size < 2**20
    said, grown = read_in_a_process(path)
    assert said == "read: 1 1"
    assert grown < ROOM_BYTES // 5


@pytest.mark.long
@pytest.mark.parametrize("nested", [False, True])
def test_a_dictionary_of_one_long_text_is_not_copied_into_every_row_at_once(tmp_path, nested):
    path = tmp_path / "bomb.parquet"
    text = "a" * 250_000
    rows = 1_500  # 375 MB a column, were they read together
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([text]))
    column = pa.ListArray.from_arrays(pa.array(range(rows + 1), pa.int32()), texts) if nested else texts
    prompts = pa.array(["a cat"] * rows) if nested else texts
    pq.write_table(
        pa.table({"prompt": prompts, "other": column}), path, compression="zstd", store_schema=False
    )
    assert path.stat().st_size < 2**20
    said, grown = read_in_a_process(path)
    assert said == (f"read: {rows} 0" if nested else f"read: 0 {rows}")  # longer than a prompt may be
    assert grown < ROOM_BYTES


def test_a_column_that_unpacks_to_much_more_than_it_takes_is_refused(tmp_path):
    class Chunk:
        path_in_schema, num_values = "prompt", 1
        total_uncompressed_size, total_compressed_size = 2**31, 2**20

    class Group:
        num_columns, num_rows = 1, 1

        def column(self, i):
            return Chunk

    class Metadata:
        num_row_groups = 1

        def row_group(self, i):
            return Group()

    with pytest.raises(InputError, match="'prompt' unpacks from 1,048,576 to 2,147,483,648 bytes"):
        refuse_bombs(Metadata(), "p.parquet")
    Chunk.total_compressed_size = 2**28
    refuse_bombs(Metadata(), "p.parquet")


@pytest.mark.long
def test_a_list_of_equal_values_without_end_is_refused(tmp_path):
    n = 2**26 + 1
    lists = pa.ListArray.from_arrays(pa.array([0, n], pa.int32()), pa.nulls(n, pa.int8()).fill_null(1))
    sink = io.BytesIO()
    pq.write_table(pa.table({"prompt": ["x"], "l": lists}), sink)
    assert len(sink.getvalue()) < 2**20
    with pytest.raises(InputError, match="no table of prompts"):
        refuse_bombs(pq.ParquetFile(sink).metadata, "p.parquet")


@pytest.mark.parametrize("footer_bytes", [0x7FFFFFFF, 0xFFFFFFFF, 10])
def test_a_parquet_footer_that_lies_of_its_length_is_refused_in_words(tmp_path, footer_bytes):
    path = tmp_path / "p.parquet"
    path.write_bytes(b"PAR1" + bytes(100) + struct.pack("<I", footer_bytes) + b"PAR1")
    said, grown = read_in_a_process(path)
    assert said.startswith("refused:")
    assert "p.parquet" in said
    assert grown < ROOM_BYTES // 5


@pytest.mark.parametrize("length", [MAX_HEADER_BYTES + 1, 2**40, 2**63])
def test_a_safetensors_header_larger_than_any_model_has_is_refused_unread(tmp_path, length):
    path = tmp_path / "m.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", length) + b'{"a":1')
        file.truncate(MAX_HEADER_BYTES + 100)  # sparse: it takes no room
    with pytest.raises(InputError, match=r"m\.safetensors"):
        read_header(path)


def png(width: int, height: int, chunks: bytes = b"") -> bytes:
    """A PNG of one colour, as few bytes as it takes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    row = bytes(1 + (width + 7) // 8)
    body = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunks, chunk(b"IDAT", body), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("size", [(10_000, 10_000), (60_000, 60_000)])
def test_a_picture_that_unpacks_to_too_much_is_not_shown(size, caplog):
    width, height = size
    bomb = png(width, 1)[:16] + struct.pack(">II", width, height) + png(1, 1)[24:]  # its header alone decides
    assert open_small(bomb) is None
    assert data_url(bomb) is None
    assert "is not shown" in caplog.text


def test_provenance_is_not_looked_for_in_a_bomb():
    width = height = 60_000
    bomb = bytearray(png(1, 1))
    bomb[16:24] = struct.pack(">II", width, height)
    bomb[29:33] = struct.pack(">I", zlib.crc32(bytes(bomb[12:29])))
    with pytest.raises(InputError, match="not an image of a job"):
        read_provenance(bytes(bomb))


def test_a_text_of_a_png_that_unpacks_to_much_is_refused():
    text = b"millijoule\0\0" + zlib.compress(b" " * 2**27)
    chunk = struct.pack(">I", len(text)) + b"zTXt" + text + struct.pack(">I", zlib.crc32(b"zTXt" + text))
    with pytest.raises(InputError, match="not an image of a job"):
        read_provenance(png(1, 1, chunk))


def test_a_plain_picture_is_shown():
    sink = io.BytesIO()
    Image.new("RGB", (32, 32), (200, 0, 0)).save(sink, "PNG")
    assert open_small(sink.getvalue()).getpixel((0, 0)) == (200, 0, 0)


def test_a_header_of_a_model_that_nests_without_end_is_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    text = b'{"a":' * 200_000
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(InputError, match=r"m\.safetensors"):
        read_header(path)


def test_a_prompt_of_json_that_nests_without_end_is_a_bad_row(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text("[" * 100_000 + "\n" + json.dumps({"prompt": "a cat"}) + "\n")
    said, _ = read_in_a_process(path)
    assert said == "read: 1 1"
