"""The energy tables: what stands in them, where, and how they are encoded."""

from dataclasses import replace
from datetime import date
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.ledgers import JOB, SECOND, chain, commit, image_rows, read, segment

from millijoule.pipeline.energy.commit_table import CommitTable
from millijoule.pipeline.energy.ledger import build_ledger
from millijoule.pipeline.energy.rows import RowTables
from millijoule.pipeline.energy.schemas import ENERGY_SCHEMAS
from millijoule.pipeline.energy.tables import parse_part_key, write_energy_tables
from millijoule.workers.schemas import PowerSample, PowerTrace
from millijoule.workers.storage.open import open_store

DAY = "run_id=0123456789ab/date=1970-01-01"


@pytest.fixture
def output(tmp_path):
    return open_store(str(tmp_path / "out"))


def write(store, ledger, commits=()):
    return write_energy_tables(store, JOB, ledger, CommitTable.of(commits), RowTables(image_rows))


def load(tmp_path, name):
    """Everything of a table, part by part, without the partition columns."""
    parts = sorted((tmp_path / "out/energy" / name).glob("run_id=*/date=*/part-*.parquet"))
    return pa.concat_tables(pq.ParquetFile(p).read() for p in parts)


def test_the_tables_close_to_the_millijoule(tmp_path, output):
    reads = [
        read(0, 0, estimate=0),
        read(5, 40, estimate=3),
        read(25, 1043, estimate=7),
        read(26, 1050, estimate=7),
    ]
    reads.append(read(46, 2100, estimate=20))
    kinds = ["load", "shard", "idle", "shard"]
    segments = [replace(s, shard_id=n if s.shard_id else None) for n, s in enumerate(chain(reads, kinds))]
    waste = segment(read(46, 2100, estimate=0), read(50, 2200, estimate=1), "loser", "w2", 3, "a2")
    commits = [commit(n, "a1", 3, segments, estimate=5) for n in (1, 3)]
    ledger = build_ledger([*segments, waste])
    result = write(output, ledger, commits)

    tables = {name: load(tmp_path, name) for name in ENERGY_SCHEMAS}
    assert {name: t.num_rows for name, t in tables.items()} == {
        "counter": 7,
        "power": 0,
        "segment": 5,
        "attempt": 3,
        "image": 6,
        "env": 2,
        "node_reading": 0,
        "node_energy": 0,
        "closure": 7,
    }
    image = tables["image"].to_pylist()
    assert [r["energy_direct_mj"] for r in image] == [335, 334, 334, 350, 350, 350]
    assert sum(r["energy_full_mj"] for r in image) == ledger.summary()["total_mj"] == 2200
    assert sum(r["energy_estimate_mj"] for r in image) == 10
    assert sum(tables["segment"]["energy_mj"].to_pylist()) == 2200
    assert tables["segment"]["quality"].to_pylist() == ["short", "measured", "short", "measured", "short"]
    attempts = {(r["shard_id"], r["attempt_id"]): r for r in tables["attempt"].to_pylist()}
    assert attempts[3, "a2"]["outcome"] == "loser"
    assert attempts[3, "a2"]["energy_mj"] == 100
    assert attempts[1, "a1"]["energy_mj"] == 1003
    workers = {r["worker_id"]: r for r in tables["env"].to_pylist()}
    assert (workers["w1"]["host"], workers["w1"]["device"], workers["w1"]["boot_id"]) == (
        "h1",
        "GPU-1",
        "boot",
    )
    assert (workers["w2"]["host"], workers["w2"]["energy_domains"]) == (None, "gpu:GPU-1")
    assert {r["check"]: r["passed"] for r in tables["closure"].to_pylist()} == {
        "C1": True,
        "C2": True,
        "C5": True,
        "C6": True,
        "C3": None,
        "C4": None,
    }
    assert result.evidence_class == "E1"


def test_missing_energy_is_null_in_every_table(tmp_path, output):
    unread = segment(read(0), read(1))
    result = write(output, build_ledger([unread]), [commit(1, "a1", 2, [unread])])
    assert load(tmp_path, "segment").select(["domain", "energy_mj", "quality"]).to_pylist() == [
        {"domain": None, "energy_mj": None, "quality": "missing"}
    ]
    assert load(tmp_path, "attempt")["energy_mj"].to_pylist() == [None]
    for name in ("energy_direct_mj", "energy_full_mj", "energy_estimate_mj"):
        assert load(tmp_path, "image")[name].to_pylist() == [None, None]
    assert load(tmp_path, "counter").num_rows == 0
    assert {r["check"]: r["passed"] for r in load(tmp_path, "closure").to_pylist()} == {
        "C1": None,
        "C2": None,
        "C3": None,
        "C4": None,
        "C5": True,
        "C6": True,
    }
    assert result.evidence_class == "E0"


def test_table_files_say_what_they_are(tmp_path, output):
    write(output, build_ledger(chain([read(0, 0), read(1, 5)], ["load"])))
    for name, schema in ENERGY_SCHEMAS.items():
        file = pq.ParquetFile(Path(tmp_path, "out/energy", name, DAY, "part-00000.parquet"))
        stored = file.schema_arrow
        assert stored.equals(schema)
        assert stored.metadata[b"millijoule.table"] == name.encode()
        assert stored.metadata[b"millijoule.schema_version"] == b"5"
        assert file.metadata.metadata[b"millijoule.version"]
        units = {"mj": b"mJ", "ns": b"ns", "mw": b"mW", "share": b"1"}
        for column in stored:
            if unit := units.get(column.name.rpartition("_")[2]):
                assert column.metadata[b"unit"] == unit
    counter = pq.ParquetFile(tmp_path / "out/energy/counter" / DAY / "part-00000.parquet").metadata.row_group(
        0
    )
    columns = {counter.column(i).path_in_schema: counter.column(i) for i in range(counter.num_columns)}
    assert "DELTA_BINARY_PACKED" in columns["t_mono_ns"].encodings
    assert "RLE_DICTIONARY" in columns["worker_id"].encodings
    assert columns["energy_mj"].compression == "ZSTD"


def test_many_rows_become_several_row_groups_and_parts(tmp_path, output, monkeypatch):
    monkeypatch.setattr("millijoule.pipeline.energy.tables.ROW_GROUP_ROWS", 10)
    monkeypatch.setattr("millijoule.pipeline.energy.rows.BLOCK_ROWS", 7)
    monkeypatch.setattr("millijoule.pipeline.energy.tables.PART_ROW_GROUPS", 2)
    reads = [read(i, 10 * i) for i in range(46)]
    write(output, build_ledger(chain(reads, ["idle"] * 45)))
    parts = [pq.read_metadata(p) for p in sorted((tmp_path / "out/energy/segment" / DAY).iterdir())]
    assert [p.num_rows for p in parts] == [20, 20, 5]
    assert [p.num_row_groups for p in parts] == [2, 2, 1]
    assert sum(load(tmp_path, "segment")["energy_mj"].to_pylist()) == 450


def test_a_table_without_rows_is_a_file_with_columns(tmp_path, output):
    write(output, build_ledger([]), [commit(1, "a1", 0), commit(2, "a1", 0)])  # everything was quarantined
    image = load(tmp_path, "image")
    assert (image.num_rows, image.schema.names) == (0, ENERGY_SCHEMAS["image"].names)


def test_many_small_shards_fill_row_groups(tmp_path, output, monkeypatch):
    monkeypatch.setattr("millijoule.pipeline.energy.tables.ROW_GROUP_ROWS", 10)
    write(output, build_ledger([]), [commit(n, "a1", n % 4) for n in range(20)])
    (part,) = (tmp_path / "out/energy/image" / DAY).iterdir()
    groups = pq.read_metadata(part)
    assert [groups.row_group(i).num_rows for i in range(groups.num_row_groups)] == [10, 10, 10]
    assert load(tmp_path, "image")["shard_id"].to_pylist() == [n for n in range(20) for _ in range(n % 4)]


def test_rows_lie_in_the_folder_of_their_utc_day(tmp_path, output):
    noon = 86_400 // 2
    reads = [read(noon * i, 1000 * i) for i in range(1, 6)]  # noon, midnight, noon ...
    write(output, build_ledger(chain(reads, ["load", "idle", "idle", "idle"])))
    keys = [parse_part_key(i.key) for i in output.list("energy/counter/")]
    assert sorted(day for _, _, day in keys) == [date(1970, 1, 1), date(1970, 1, 2), date(1970, 1, 3)]
    for key in output.list("energy/segment/"):
        day = (parse_part_key(key.key)[2] - date(1970, 1, 1)).days
        with output.open_input(key.key) as source:
            opened = pq.ParquetFile(source).read()["t_open_wall_ns"].to_pylist()
        assert opened
        assert all(t // (86_400 * SECOND) == day for t in opened)


def test_writing_again_removes_what_no_longer_belongs(tmp_path, output):
    stale = "energy/counter/run_id=0123456789ab/date=1969-12-31/part-00000.parquet"
    for key in (
        stale,
        "energy/counter/part-00000.parquet",
        "energy/_live/counter/x.parquet",
        "energy/notes.txt",
    ):
        output.put(key, b"x")
    write(output, build_ledger(chain([read(0, 0), read(1, 5)], ["load"])))
    left = {i.key for i in output.list("energy/")}
    assert "energy/notes.txt" in left
    assert left - {"energy/notes.txt"} == {f"energy/{t}/{DAY}/part-00000.parquet" for t in ENERGY_SCHEMAS}


def test_counter_rows_of_a_file_are_one_counter_after_the_other(tmp_path, output):
    reads = [read(i, 10 * i, **{"cpu:0": i}) for i in range(5)]
    write(output, build_ledger(chain(reads, ["idle"] * 4)))
    counter = load(tmp_path, "counter")
    assert counter["domain"].to_pylist() == ["cpu:0"] * 5 + ["gpu:GPU-1"] * 5
    assert counter["energy_mj"].to_pylist() == [*range(5), *range(0, 50, 10)]


def test_wall_time_is_rounded_down_and_latency_up(tmp_path, output):
    first = replace(read(0, 0), t_mono_ns=7, t_wall_ns=1_999_999, latency_ns=100_001)
    write(output, build_ledger([segment(first, read(1, 5), "load")]))
    row = load(tmp_path, "counter").to_pylist()[0]
    assert (row["t_mono_ns"], row["t_wall_ns"], row["read_latency_ns"]) == (7, 1_000_000, 200_000)


# --- power ------------------------------------------------------------------------------------------------------------


def powered(watts, *, counted_watts=100, seconds=130, every=1, sampled=None):
    """A worker whose counter counts `counted_watts` while its power is sampled as `watts`: a number, or one per second."""
    reads = [read(t, t * counted_watts * 1000) for t in range(0, seconds + 1, 10)]
    segments = chain(reads, ["idle"] * (len(reads) - 2) + ["shard"])
    times = [t for t in range(-1, seconds + 2, every) if sampled is None or t in sampled]
    samples = [
        PowerSample(t * SECOND, t * SECOND, None, round(1000 * (watts(t) if callable(watts) else watts)))
        for t in times
    ]
    trace = PowerTrace("GPU-1", "boot", "nvml", tuple(samples))
    return segments, commit(1, "a1", 2, segments, power=(trace,), t_start_wall_ns=0)


@pytest.mark.parametrize(
    ("watts", "passed", "evidence"), [(100, True, "E2"), (104, True, "E2"), (120, False, "E1")]
)
def test_the_counter_is_compared_with_the_integral_of_power(tmp_path, output, watts, passed, evidence):
    segments, made = powered(watts)
    result = write(output, build_ledger(segments), [made])
    (c4,) = [r for r in result.closure if r.check == "C4"]
    assert (c4.found_mj, c4.expected_mj, c4.passed) == (13_000_000, 130_000 * watts, passed)
    assert c4.residual_share == pytest.approx(100 / watts - 1)
    assert result.evidence_class == evidence
    assert load(tmp_path, "power").num_rows == len(made.power[0].samples)


def test_sparse_power_samples_prove_nothing(output):
    segments, made = powered(100, every=7)
    result = write(output, build_ledger(segments), [made])
    assert [r.passed for r in result.closure if r.check == "C4"] == [None]
    assert result.evidence_class == "E1"


def c4(output, made):
    segments, made = made
    result = write(output, build_ledger(segments), [made])
    (row,) = [r for r in result.closure if r.check == "C4"]
    return row, result.evidence_class


def test_blocks_that_are_off_in_opposite_directions_do_not_make_up_for_each_other(output):
    """The counter says 100 W throughout; power says 140 W for two minutes, then 60 W for two."""
    row, evidence = c4(output, powered(lambda t: 140 if t < 120 else 60, seconds=240))
    assert abs(row.residual_share) < 0.01  # in the sum all is well
    assert (row.passed, evidence) == (False, "E1")
    assert "blocks: 4, worst block: 6" in row.note


@pytest.mark.parametrize("watts", [96, 104])
def test_every_block_within_the_tolerance_passes_whatever_its_sign(output, watts):
    row, evidence = c4(output, powered(lambda t: watts if t < 120 else 200 - watts, seconds=240))
    assert (row.passed, evidence) == (True, "E2")
    assert "compared: 100.0% of the counted time" in row.note


def test_a_device_that_was_compared_for_half_of_its_time_is_not_confirmed(output):
    row, evidence = c4(output, powered(100, seconds=600, sampled=range(-1, 300)))
    assert (row.passed, evidence) == (None, "E1")
    assert row.residual_mj == 0
    assert "blocks: 5, worst block: 0.0%, compared: 50.0% of the counted time, less than 90%" in row.note


def test_a_block_beyond_the_tolerance_fails_however_little_was_compared(output):
    row, _ = c4(output, powered(120, seconds=600, sampled=range(-1, 100)))
    assert row.passed is False
    assert "compared: 16.7%" in row.note


def test_coverage_is_of_all_the_time_the_counter_was_followed(output):
    """A silence of 20 s costs what lies between the counter readings around it, and the next block begins after it."""
    silent = set(range(-1, 602)) - set(range(301, 319))
    row, evidence = c4(output, powered(100, seconds=600, sampled=silent))
    assert (row.passed, evidence) == (True, "E2")
    # 0 to 300 in five blocks; 320 to 600 in four, the last of 100 s
    assert "blocks: 9, worst block: 0.0%, compared: 96.7%" in row.note


def test_a_worker_reads_its_counter_before_the_first_sample_and_after_the_last(output):
    row, _ = c4(output, powered(100, seconds=90, sampled=range(1, 90)))
    assert (row.passed, "compared: 100.0%" in row.note) == (True, True)
    late, _ = c4(output, powered(100, seconds=90, sampled=range(3, 90)))
    assert (late.passed, "compared: 88.9%" in late.note) == (None, True)


def test_a_clock_that_was_set_is_seen(output):
    before, after = read(0, 0), read(1, 5)
    late = replace(after, t_wall_ns=after.t_wall_ns + 60_000_000)
    result = write(output, build_ledger([segment(before, late)]))
    (c6,) = [r for r in result.closure if r.check == "C6"]
    assert (c6.passed, c6.residual_ns) == (False, 60_000_000)
