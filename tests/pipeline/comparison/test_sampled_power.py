"""Power sampled in the blocks is a second meter: it raises the class where it agrees, and cannot be edited unnoticed."""

import dataclasses
import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pynvml
import pytest
from support.comparisons import (
    ENVIRONMENT,
    START_NS,
    Board,
    registration,
    run_comparison,
    small_registration,
)

from millijoule.pipeline.comparison.bundle import RESULT, hash_inputs, seal, write_bundle
from millijoule.pipeline.comparison.bundle_check import check_bundle
from millijoule.pipeline.comparison.registration import Systematics, canonical_json
from millijoule.pipeline.comparison.rows import (
    POWER_SCHEMA,
    READ_SCHEMA,
    SCHEMAS,
    SECOND_METER_SCHEMA,
    read_row,
)
from millijoule.pipeline.comparison.sampled_power import add_sampled_power, integrate_power
from millijoule.workers.errors import InputError
from millijoule.workers.schemas import CounterRead

SECOND = 10**9


# ---- integration -------------------------------------------------------------------------------------------------


def reads(*spans, device="GPU-1"):
    """One block per (begin, end), seconds; a wall clock that is a thousand seconds ahead."""
    rows = []
    for number, span in enumerate(spans):
        for index, t in enumerate(span):
            read = CounterRead("boot", t * SECOND, (t + 1000) * SECOND, 0, {f"gpu:{device}": t})
            rows.append(read_row(f"{number:04d}", index, read))
    return pa.Table.from_pylist(rows, READ_SCHEMA)


def samples(found, block="0000", device="GPU-1"):
    """(seconds, average watts, instantaneous watts)"""

    def mw(watts):
        return None if watts is None else round(watts * 1000)

    rows = [
        {
            "block_id": block,
            "device": device,
            "t_mono_ns": round(t * SECOND),
            "power_average_mw": mw(average),
            "power_instant_mw": mw(instant),
        }
        for t, average, instant in found
    ]
    return pa.Table.from_pylist(rows, POWER_SCHEMA)


def energies(power, read_table):
    rows = integrate_power(power, read_table).to_pylist()
    assert {r["source"] for r in rows} <= {"power"}
    return [(r["t_wall_ns"] / SECOND - 1000, r["energy_mj"]) for r in rows]


def test_a_sample_stands_for_the_time_before_it():
    found = energies(samples([(11, 100, 1), (12, 200, 1), (13, 300, 1)]), reads((10, 13)))
    assert found == [(10, 0), (11, 100_000), (12, 300_000), (13, 600_000)]


def test_the_last_sample_stands_until_the_block_ends_unless_one_follows():
    assert energies(samples([(11, 100, 1)]), reads((10, 12)))[-1] == (12, 200_000)
    assert energies(samples([(11, 100, 1), (12.5, 300, 1)]), reads((10, 12)))[-1] == (12, 400_000)


def test_instantaneous_power_is_taken_only_where_there_is_no_average():
    assert energies(samples([(11, None, 50), (12, None, 70)]), reads((10, 12)))[-1] == (12, 120_000)
    assert energies(samples([(11, 100, 50), (12, None, 70)]), reads((10, 12)))[-1] == (12, 200_000)


@pytest.mark.parametrize(
    "found",
    [
        [],
        [(16, 100, 1), (18, 100, 1), (20, 100, 1)],  # silent at first
        [(11, 100, 1), (14, 100, 1)],  # silent at last
        [(11, 100, 1), (13, 100, 1), (19, 100, 1)],  # in between
        [(26, 100, 1)],
    ],
)
def test_a_silence_of_more_than_five_seconds_leaves_no_rows(found):
    assert energies(samples(found), reads((10, 20))) == []


def test_energy_goes_on_from_block_to_block_and_stands_still_between_them():
    power = pa.concat_tables([samples([(11, 100, 1)]), samples([(21, 300, 1)], "0001")])
    assert energies(power, reads((10, 11), (20, 21))) == [
        (10, 0),
        (11, 100_000),
        (20, 100_000),
        (21, 400_000),
    ]


def test_only_counted_devices_are_summed_and_all_of_them():
    other = samples([(11, 900, 1)], device="GPU-2")
    both = pa.concat_tables([samples([(11, 100, 1)]), other])
    assert energies(both, reads((10, 11)))[-1] == (11, 100_000)
    assert energies(other, reads((10, 11))) == []


def test_two_boards_are_summed_at_the_times_of_both():
    rows = reads((10, 12)).to_pylist()
    for row in rows:
        row["energy"].append({"domain": "gpu:GPU-2", "energy_mj": 5})
    power = pa.concat_tables(
        [samples([(11, 100, 1), (12, 100, 1)]), samples([(11.5, 20, 1)], device="GPU-2")]
    )
    assert energies(power, pa.Table.from_pylist(rows, READ_SCHEMA)) == [
        (10, 0),
        (11, 120_000),
        (11.5, 180_000),
        (12, 240_000),
    ]


def test_power_that_was_sampled_cannot_be_handed_in_as_well():
    power, read_table = samples([(11, 100, 1)]), reads((10, 11))
    own = integrate_power(power, read_table)
    node = pa.Table.from_pylist([{"source": "node", "t_wall_ns": 1, "energy_mj": 1}], SECOND_METER_SCHEMA)
    assert add_sampled_power(power, read_table, None).equals(own)
    assert add_sampled_power(power, read_table, node).num_rows == own.num_rows + 1
    assert add_sampled_power(POWER_SCHEMA.empty_table(), read_table, own) is own
    assert add_sampled_power(POWER_SCHEMA.empty_table(), read_table, None) is None
    with pytest.raises(InputError, match="power was sampled in the run"):
        add_sampled_power(power, read_table, own)


# ---- a whole comparison on a stand-in board ----------------------------------------------------------------------


def run(folder, **options):
    prepare = options.pop("prepare", lambda board: None)
    folder.mkdir(exist_ok=True)
    board = Board(folder, **options)
    prepare(board)
    return run_comparison(folder / "parts", board)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return run(tmp_path_factory.mktemp("board"))


@pytest.fixture(scope="module")
def original(rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle") / "bundle"
    write_bundle(folder, registration(), ENVIRONMENT, rows)
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Of a smaller registration, for what is done many times."""
    folder, plan = tmp_path_factory.mktemp("small"), small_registration()
    write_bundle(folder / "bundle", plan, ENVIRONMENT, run_comparison(folder / "parts", Board(folder), plan))
    assert check_bundle(folder / "bundle").mismatches == ()
    return folder / "bundle"


@pytest.fixture
def bundle(small, tmp_path):
    return shutil.copytree(small, tmp_path / "copy")


def result_of(folder):
    return json.loads((folder / RESULT).read_bytes())


@pytest.mark.long
def test_power_that_agrees_in_every_block_makes_class_e2(original, rows):
    result = result_of(original)
    assert result["evidence_class"] == "E2"
    assert "evidence class E2 (energy counters that agree with integrated power)" in result["verdict"]
    assert result["claim"]["outcome"] == "holds"
    assert result["second_meters"] == {"power": "sampled during the blocks"}
    assert result["closures"]["power"]["residual"] < 0.02
    assert check_bundle(original).mismatches == ()


def test_every_block_with_telemetry_is_sampled_once_a_second_and_no_other(rows):
    found = [r["block_id"] for r in rows.power.to_pylist()]
    for block in rows.blocks.to_pylist():
        if block["kind"] in ("compare", "idle", "same"):
            assert 58 <= found.count(block["block_id"]) <= 70
        if not block["telemetry"]:
            assert block["block_id"] not in found
    first = min(r["t_wall_ns"] for r in rows.second_meter.to_pylist())
    assert first >= START_NS


@pytest.mark.long
@pytest.mark.parametrize("power_error", [0.9, 1.1])
def test_power_that_disagrees_leaves_class_e1(power_error, tmp_path):
    result = write_bundle(
        tmp_path / "bundle", registration(), ENVIRONMENT, run(tmp_path / "run", power_error=power_error)
    )
    assert result["evidence_class"] == "E1"
    assert result["closures"]["power"]["residual"] == pytest.approx(0.1, abs=0.02)
    assert check_bundle(tmp_path / "bundle").mismatches == ()


def test_power_that_disagrees_in_one_block_leaves_class_e1(rows, tmp_path):
    changed = [
        {**r, "power_average_mw": r["power_average_mw"] * 2} if r["block_id"] == "0020" else r
        for r in rows.power.to_pylist()
    ]
    power = pa.Table.from_pylist(changed, POWER_SCHEMA)
    meter = integrate_power(power, rows.reads)
    folder = tmp_path / "bundle"
    result = write_bundle(
        folder, registration(), ENVIRONMENT, dataclasses.replace(rows, power=power, second_meter=meter)
    )
    assert result["evidence_class"] == "E1"
    assert check_bundle(folder).mismatches == ()


def test_power_that_fails_for_half_a_block_leaves_class_e1(rows, tmp_path):
    kept = [r for i, r in enumerate(rows.power.to_pylist()) if r["block_id"] != "0020" or i % 60 < 30]
    power = pa.Table.from_pylist(kept, POWER_SCHEMA)
    meter = integrate_power(power, rows.reads)
    changed = dataclasses.replace(rows, power=power, second_meter=meter)
    result = write_bundle(tmp_path / "bundle", registration(), ENVIRONMENT, changed)
    assert result["evidence_class"] == "E1"
    assert result["closures"]["power"] == {"residual": None, "closes": False}


def unsupported(board):
    board.nvml.power_field_errors = (pynvml.NVML_ERROR_NOT_SUPPORTED,) * 2


def failing(board):
    board.nvml.power_error = pynvml.NVML_ERROR_GPU_IS_LOST


@pytest.mark.long
@pytest.mark.parametrize("prepare", [unsupported, failing])
def test_without_power_fields_there_is_nothing_to_hand_over(prepare, tmp_path):
    rows = run(tmp_path / "run", prepare=prepare)
    assert (rows.power, rows.second_meter) == (None, None)
    result = write_bundle(tmp_path / "bundle", registration(), ENVIRONMENT, rows)
    assert result["evidence_class"] == "E1"
    assert result["second_meters"] == {}
    assert result["closures"]["power"] is None
    assert not (tmp_path / "bundle" / "power.parquet").exists()
    assert check_bundle(tmp_path / "bundle").mismatches == ()


# ---- with the node's meter ---------------------------------------------------------------------------------------


REST = Systematics(declared_rest_watts=40.0, declared_rest_tolerance_watts=1.0)


def with_node(folder, plan, watts):
    """The same world, whose node draws `watts` beside its board."""
    folder.mkdir()
    board = Board(folder)
    read = board.read
    series = []

    def read_and_note():
        found = read()
        seconds = board.ns / 1e9
        row = {"source": "node", "t_wall_ns": found.t_wall_ns}
        series.append(row | {"energy_mj": round(board.energy_uj / 1000 + 1000 * watts * seconds)})
        return found

    board.read = read_and_note
    parts = folder / "parts"
    run_comparison(parts, board, plan)
    # what a person hands in after the run: rows of the node, beside the power that was sampled
    node = pa.Table.from_pylist(series, SECOND_METER_SCHEMA)
    return run_comparison(parts, board, plan, second_meter=node)


@pytest.mark.long
@pytest.mark.parametrize(
    ("systematics", "watts", "expected"),
    [
        (REST, 40.0, "E3"),
        (REST, 80.0, "E2"),  # more than was declared
        (Systematics(), 0.0, "E2"),  # nothing was declared
        (dataclasses.replace(REST, declared_rest_tolerance_watts=39.0), 40.0, "E2"),  # too vague
    ],
)
def test_a_node_that_closes_with_the_declared_rest_makes_class_e3(systematics, watts, expected, tmp_path):
    plan = small_registration(systematics=systematics)
    rows = with_node(tmp_path / "run", plan, watts)
    result = write_bundle(tmp_path / "bundle", plan, ENVIRONMENT, rows)
    assert result["evidence_class"] == expected
    assert result["second_meters"] == {"node": "handed in", "power": "sampled during the blocks"}
    assert check_bundle(tmp_path / "bundle").mismatches == ()


# ---- edits -------------------------------------------------------------------------------------------------------


def table(name, change):
    def mutate(folder):
        path = folder / f"{name}.parquet"
        found = pq.ParquetFile(path).read().to_pylist()
        found = change(found) or found
        pq.write_table(pa.Table.from_pylist(found, SCHEMAS[path.name]), path)

    return mutate


def one(column, value):
    """One sample in the middle of a block of the comparison."""

    def change(found):
        row = [r for r in found if r.get("block_id", "0020") == "0020"][30]
        row[column] = value(row[column])

    return change


def in_telemetry_off(found):
    found.append({**found[-1], "block_id": "0006"})


def reintegrated(change):
    """Samples edited and the rows that follow from them made anew; only the result is left as it was."""

    def mutate(folder):
        table("power", change)(folder)
        power, read_table = (pq.ParquetFile(folder / f"{n}.parquet").read() for n in ("power", "reads"))
        pq.write_table(integrate_power(power, read_table), folder / "second_meter.parquet")

    return mutate


EDITS = {
    "sample raised": table("power", one("power_average_mw", lambda mw: mw + 1000)),
    "sample nulled": table("power", one("power_average_mw", lambda mw: None)),
    "sample zeroed": table("power", one("power_average_mw", lambda mw: 0)),
    "sample moved in time": table("power", one("t_mono_ns", lambda t: t + 500_000_000)),
    "sample moved to another block": table("power", one("block_id", lambda b: "0022")),
    "sample of another device": table("power", one("device", lambda d: "GPU-2")),
    "sample of no block": table("power", one("block_id", lambda b: "9999")),
    "sample in a block without telemetry": table("power", in_telemetry_off),
    "sample dropped": table("power", lambda f: f[:500] + f[501:]),
    "all averages dropped": table("power", lambda f: [{**r, "power_average_mw": None} for r in f]),
    "all samples dropped": lambda f: (f / "power.parquet").unlink(),
    "samples emptied": table("power", lambda f: f.clear()),
    "integrated row raised": table("second_meter", one("energy_mj", lambda mj: mj + 1)),
    "integrated row moved": table("second_meter", one("t_wall_ns", lambda t: t + 1)),
    "integrated rows called a node's": table("second_meter", lambda f: [{**r, "source": "node"} for r in f]),
    "integrated row dropped": table("second_meter", lambda f: f[:100] + f[101:]),
    "integrated row added": table("second_meter", lambda f: [*f, f[0]]),
    "all integrated rows dropped": lambda f: (f / "second_meter.parquet").unlink(),
    "block's power doubled and integrated anew": reintegrated(
        lambda f: [
            {**r, "power_average_mw": 2 * r["power_average_mw"]} if r["block_id"] == "0020" else r for r in f
        ]
    ),
    "origin": lambda f: edit_result(f, lambda r: r["second_meters"].update(power="handed in")),
    "residual": lambda f: edit_result(f, lambda r: r["closures"]["power"].update(residual=0.0)),
    "class": lambda f: edit_result(f, lambda r: r.update(evidence_class="E3")),
}
#: Nothing follows from these, as long as the device has the average.
QUIET = {
    "instantaneous power": table("power", one("power_instant_mw", lambda mw: mw + 1)),
    "order of samples": table("power", lambda f: f[::-1]),
}


def edit_result(folder, change):
    raw = result_of(folder)
    change(raw)
    (folder / RESULT).write_bytes(canonical_json(raw))


def rehash(folder):
    edit_result(folder, lambda r: r.update(inputs=hash_inputs(folder)))
    seal(folder, None)


@pytest.mark.long
@pytest.mark.parametrize("name", EDITS)
def test_an_edit_is_noticed_by_recomputation_alone(name, bundle):
    EDITS[name](bundle)
    rehash(bundle)
    assert check_bundle(bundle).mismatches


@pytest.mark.long
@pytest.mark.parametrize("name", [*EDITS, *QUIET])
def test_a_naive_edit_is_noticed_by_its_hash(name, bundle):
    (EDITS | QUIET)[name](bundle)
    assert any("manifest" in m for m in check_bundle(bundle).mismatches)


@pytest.mark.parametrize("name", QUIET)
def test_a_quiet_edit_changes_nothing_that_follows(name, bundle):
    QUIET[name](bundle)
    rehash(bundle)
    assert check_bundle(bundle).mismatches == ()
