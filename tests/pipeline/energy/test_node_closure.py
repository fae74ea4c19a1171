"""C3: devices and declared rest against a node's own meter, from rows to verdict; and again in SQL."""

from dataclasses import replace

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.histories import histories
from support.ledgers import JOB, SECOND, chain, commit, image_rows, read

from millijoule.pipeline.energy.closure import evidence_class
from millijoule.pipeline.energy.commit_table import CommitTable
from millijoule.pipeline.energy.ledger import build_ledger
from millijoule.pipeline.energy.node_closure import MAX_TOLERANCE_SHARE, round_ns
from millijoule.pipeline.energy.node_readings import MeteredNode
from millijoule.pipeline.energy.rows import EnergyRows, RowTables
from millijoule.pipeline.energy.schemas import ENERGY_SCHEMAS, table_of
from millijoule.pipeline.energy.uncommitted import Uncommitted
from millijoule.pipeline.sql.query import connect, run_query
from millijoule.workers.node_meters.config import DeclaredRest
from millijoule.workers.node_meters.meter import NodeFailure, NodeReading
from millijoule.workers.schemas import PowerSample, PowerTrace

DUCKDB = connect({}, threads=1)  # opening one takes as long as asking it

GPU_W, CPU_W, REST_W = 300, 100, 150
REST = DeclaredRest(REST_W * 1000, 10_000)
NODE = MeteredNode("h1", "bmc", 30 * SECOND, None, REST, "n1", "boot", domains=("cpu:0", "gpu:GPU-1"))


def job(seconds=600, step=10, **reads):
    """A worker with one GPU and one package at constant power, from 0 to `seconds`, read every `step`."""
    ends = [
        read(t, t * GPU_W * 1000, **{"cpu:0": t * CPU_W * 1000}, **reads) for t in range(0, seconds + 1, step)
    ]
    segments = chain(ends, ["load", *["idle"] * (len(ends) - 3), "shard"])
    samples = [PowerSample(t * SECOND, t * SECOND, None, GPU_W * 1000) for t in range(-1, seconds + 2)]
    trace = PowerTrace("GPU-1", "boot", "nvml", tuple(samples))
    return segments, [commit(1, "a1", 2, segments, power=(trace,))]


def power(watts, times, node=NODE, **fields):
    """Readings of power at these seconds."""
    readings = [NodeReading("bmc-power", "power", int(t * SECOND), watts * 1000, 1000) for t in times]
    return [replace(node, **fields).row(r) for r in readings]


def energy(watts, times, node=NODE, quantum=1000, **fields):
    """Readings of a cumulative meter at these seconds."""
    said = [
        NodeReading("bmc-energy", "energy", int(t * SECOND), int(t * watts) * 1000, quantum) for t in times
    ]
    return [replace(node, **fields).row(r) for r in said]


AROUND = range(-10, 621, 10)


def build(segments, commits, rows):
    """All tables, the closure rows and the evidence class."""
    ledger = build_ledger(segments, {c.shard_id: c.attempt_id for c in commits})
    readings = table_of("node_reading", rows)
    made = EnergyRows(
        JOB, ledger, CommitTable.of(commits), RowTables(image_rows), Uncommitted(nodes=readings)
    )
    tables = {
        name: pa.concat_tables([table_of(name, []), *(t for _, t in blocks)])
        for name, blocks in made.tables()
    }
    return tables, [r for r in made.closure if r.check == "C3"], made.evidence_class


def c3(rows, segments_and_commits=None):
    segments, commits = segments_and_commits or job()
    return build(segments, commits, rows)[1]


def problems(tables):
    """What closure_c3 finds in the rows alone."""
    with_run = {
        name: t.append_column("run_id", pa.array(["r"] * t.num_rows, pa.string()))
        for name, t in tables.items()
    }
    for name, table in with_run.items():
        DUCKDB.register(name, table)
    return run_query(DUCKDB, "closure_c3", {}).to_pylist()


# --- verdicts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("readings", [power, energy])
def test_a_node_that_adds_up_closes_and_is_evidence_of_class_3(readings):
    tables, (row,), evidence = build(*job(), readings(550, AROUND))
    assert (row.passed, evidence) == (True, "E3")
    assert row.scope == "h1 boot boot by bmc"
    assert row.expected_mj == row.found_mj == 550 * 600_000
    assert row.residual_mj == 0
    assert 0.03 < row.tolerance_share < MAX_TOLERANCE_SHARE
    assert problems(tables) == []


@pytest.mark.parametrize("watts", [500, 620])
def test_a_residual_beyond_the_error_bounds_fails_and_is_stated_as_it_is(watts):
    tables, (row,), evidence = build(*job(), power(watts, AROUND))
    assert row.passed is False
    assert row.residual_mj == (550 - watts) * 600_000
    assert evidence == "E2"
    assert [p["problem"] for p in problems(tables)] == ["residual beyond the tolerance"]


def test_the_tolerance_counts_the_meter_the_rest_and_the_counters():
    (row,) = c3(power(550, AROUND, accuracy_share=0.01))
    meter = 0.01 * 550 * 600_000 + 0.5 * 600_000  # stated accuracy, half a watt of its last digit
    rest = 10_000 * 600
    counters = 0.05 * (GPU_W + CPU_W) * 600_000
    assert row.tolerance_mj == pytest.approx(meter + rest + counters, rel=0.001)


def test_a_residual_within_the_bounds_passes_and_just_outside_fails():
    (row,) = c3(power(550, AROUND))
    allowed_w = row.tolerance_mj // 600_000
    assert [c3(power(550 + by, AROUND))[0].passed for by in (allowed_w - 1, allowed_w + 2)] == [True, False]


@pytest.mark.parametrize(
    ("rows", "note"),
    [
        ([], "no node meter was read"),
        (power(550, AROUND, boot_id="another"), "no meter of this node was read"),
        (power(550, AROUND, rest=None), "the rest of the node is not declared"),
        (power(550, AROUND, rest=DeclaredRest(150_000, 60_000)), "wider than 10%"),
        (power(550, AROUND, domains=("cpu:0", "gpu:GPU-1", "gpu:GPU-2")), "no counter for gpu:GPU-2"),
        (power(550, range(-10, 301, 10)), "known for 50.0%"),
        (power(550, [0, 300, 620]), "was not read while workers were there"),
        ([NODE.row(NodeFailure(0, "HTTP 401"))], "the meter could not be read: HTTP 401"),
        (power(550, [-100, -50]), "was not read while workers were there"),
    ],
)
def test_what_cannot_be_told_is_null_with_the_reason(rows, note):
    tables, (row,), evidence = build(*job(), rows)
    assert row.passed is None
    assert note in row.note
    assert evidence == "E2"
    assert problems(tables) == []


def test_a_device_without_a_counter_leaves_the_check_open_and_no_partial_sum():
    segments, commits = job()
    blind = [replace(s, open=without(s.open, "cpu:0"), close=without(s.close, "cpu:0")) for s in segments]
    commits = [replace(commits[0], segments=tuple(blind))]
    (row,) = c3(power(550, AROUND, domains=None), (blind, commits))
    assert (row.passed, row.found_mj) == (None, None)
    assert "no counter for the processor" in row.note
    other = replace(commits[0], device="GPU-9")
    (row,) = c3(power(550, AROUND), (blind, [other]))
    assert "no counter for cpu:0, gpu:GPU-9" in row.note


def without(counters, domain):
    return replace(counters, energy_mj={d: mj for d, mj in counters.energy_mj.items() if d != domain})


def test_a_counter_that_ends_early_leaves_the_check_open():
    segments, commits = job()
    blind = [
        replace(s, open=without(s.open, "cpu:0"), close=without(s.close, "cpu:0")) if n > 30 else s
        for n, s in enumerate(segments)
    ]
    (row,) = c3(power(550, AROUND), (blind, commits))
    assert row.passed is None
    assert "known for 5" in row.note


def test_a_meter_that_died_leaves_the_check_open_and_the_residual_of_what_it_saw():
    dead = NODE.row(NodeFailure(305 * SECOND, "HTTP 500"))
    (row,) = c3([*power(560, range(-10, 301, 10)), dead])
    assert row.passed is None
    assert (row.expected_mj, row.residual_mj) == (560 * 300_000, -10 * 300_000)
    assert row.note.startswith("known for too little of the time: the meter could not be read: HTTP 500")


def test_a_meter_that_died_and_came_back_counts_what_it_saw():
    rows = power(550, [*range(-10, 281, 10), *range(320, 621, 10)])
    tables, (row,), _ = build(*job(), rows)
    assert row.passed is True
    assert row.expected_mj == 550 * 560_000
    assert "93.3%" in row.note
    assert "stretches: 2" in row.note
    assert problems(tables) == []


def test_a_cumulative_meter_bridges_its_silence_but_not_its_reset():
    silent = energy(550, [*range(-10, 101, 10), *range(500, 621, 10)])
    assert c3(silent)[0].passed is True
    reset = energy(550, range(-10, 301, 10)) + [
        NODE.row(NodeReading("bmc-energy", "energy", t * SECOND, (t - 310) * 550_000, 1000))
        for t in range(310, 621, 10)
    ]
    (row,) = c3(reset)
    assert row.passed is True
    assert row.expected_mj == 550 * 590_000  # not across it
    assert "stretches: 2" in row.note


def test_the_feeds_of_a_meter_add_up_and_two_meters_do_not():
    feeds = power(300, AROUND, feed="1") + power(250, AROUND, feed="2")
    (row,) = c3(feeds)
    assert (row.passed, row.expected_mj) == (True, 550 * 600_000)
    both = c3(power(550, AROUND) + power(551, AROUND, meter="strip"))
    assert [(r.passed, r.expected_mj) for r in both] == [(True, 550 * 600_000), (True, 551 * 600_000)]


def test_a_meter_that_cannot_tell_does_not_stand_in_the_way_of_one_that_can():
    rows = [
        NODE.row(NodeFailure(0, "HTTP 401")),
        *power(550, AROUND, meter="strip", boot_id=None, node_id=None),
    ]
    tables, (row,), evidence = build(*job(), rows)
    assert (row.scope, row.passed, evidence) == ("h1 boot boot by strip", True, "E3")
    assert problems(tables) == []


def test_every_node_has_to_close():
    segments, commits = job()
    moved = [
        replace(
            s,
            worker_id="w2",
            open=replace(s.open, boot_id="boot2"),
            close=replace(s.close, boot_id="boot2"),
            **({"shard_id": 2, "attempt_id": "a2"} if s.shard_id else {}),
        )
        for s in segments
    ]
    trace = replace(commits[0].power[0], boot_id="boot2")
    commits.append(commit(2, "a2", 2, moved, worker="w2", host="h2", power=(trace,)))
    one = power(550, AROUND)
    two = power(550, AROUND, host="h2", boot_id="boot2", node_id="n2")
    assert build(segments + moved, commits, one + two)[2] == "E3"
    _, rows, evidence = build(segments + moved, commits, one)
    assert [(r.scope, r.passed) for r in rows] == [("h1 boot boot by bmc", True), ("h2 boot boot2", None)]
    assert evidence == "E2"


def test_between_reads_the_growth_of_the_counters_bounds_the_error():
    """One end is far from any read: what could have happened there is in the tolerance."""
    segments, commits = job(step=200)
    (row,) = c3(power(550, [*range(30, 621, 10)]), (segments, commits))
    assert row.passed is None
    assert "wider than 10%" in row.note
    (row,) = c3(power(550, AROUND), (segments, commits))
    assert row.passed is True


def test_a_clock_that_moved_widens_the_bounds():
    segments, commits = job()
    (still,) = c3(power(550, AROUND))
    late = replace(segments[-1].close, t_wall_ns=segments[-1].close.t_wall_ns + SECOND)
    moved = [*segments[:-1], replace(segments[-1], close=late)]
    (row,) = c3(power(550, AROUND), (moved, commits))
    assert row.tolerance_mj - still.tolerance_mj == 2 * 550_000  # a second at either end


def test_time_between_two_runs_of_a_job_is_not_the_jobs():
    first, commits = job()
    hours = 7200
    ends = [read(t, t * GPU_W * 1000, **{"cpu:0": t * CPU_W * 1000}) for t in range(hours, hours + 601, 10)]
    later = chain(ends, ["load", *["idle"] * 59], "w2")
    rows = power(550, AROUND) + power(550, range(hours - 10, hours + 611, 10))
    (row,) = c3(rows, (first + later, commits))
    assert row.passed is True
    assert row.expected_mj == 2 * 550 * 600_000


def test_without_any_worker_there_is_nothing_to_compare():
    assert [r.passed for r in c3(power(550, AROUND), ([], []))] == [None]


# --- properties -------------------------------------------------------------------------------------------------------

READINGS = st.lists(
    st.tuples(
        st.sampled_from(["b1", "b2", None]),
        st.sampled_from(["energy", "power"]),
        st.sampled_from(["1", "2"]),
        st.lists(st.tuples(st.integers(95, 120), st.integers(0, 9_000)), min_size=1, max_size=12),
        st.none() | st.tuples(st.integers(0, 5_000), st.integers(0, 5_000)),
    ),
    max_size=4,
)


def node_rows(drawn):
    rows = []
    for boot, quantity, feed, readings, rest in drawn:
        node = MeteredNode(
            boot or "b1",
            f"m-{boot}",
            5 * SECOND,
            None,
            DeclaredRest(*rest) if rest else None,
            None,
            boot,
            feed,
        )
        rows += [
            node.row(NodeReading(f"s-{quantity}", quantity, t * SECOND, v, 1)) for t, v in sorted(readings)
        ]
    return rows


@pytest.mark.long
@settings(max_examples=40, deadline=None)
@given(histories(), READINGS)
def test_the_residual_is_exactly_the_sum_of_the_rows(history, drawn):
    tables, rows, _ = build(history.segments, history.commits, node_rows(drawn))
    parts = {}
    for p in tables["node_energy"].to_pylist():
        assert p["tolerance_mj"] >= 0
        scope = f"{p['host']} boot {p['boot_id']} by {p['meter']}"
        sums = parts.setdefault(scope, {"node": 0, "device": 0, "rest": 0, "tolerance": 0})
        sums[p["part"]] += p["energy_mj"]
        sums["tolerance"] += p["tolerance_mj"]
    assert rows
    for row in rows:
        if row.found_mj is None:
            assert row.passed is None
            continue
        sums = parts[row.scope]
        assert row.expected_mj == sums["node"]
        assert row.residual_mj == sums["device"] + sums["rest"] - sums["node"]
        assert row.tolerance_mj == sums["tolerance"]
        if row.passed is not None:
            assert row.passed == (abs(row.residual_mj) <= row.tolerance_mj)


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("other", [None, DeclaredRest(9, 14), DeclaredRest(150_000, 0)])
def test_of_two_rests_declared_at_one_time_python_and_sql_take_the_same(other, swapped):
    feeds = [energy(275, AROUND, feed="1"), energy(275, AROUND, feed="2", rest=other)]
    tables, (row,), _ = build(*job(), [*feeds[swapped], *feeds[not swapped]])
    rests = [p["energy_mj"] for p in tables["node_energy"].to_pylist() if p["part"] == "rest"]
    assert sum(rests) == (0 if other is None else REST_W * 600_000)
    assert problems(tables) == []
    assert row.passed is (None if other is None else True)


@pytest.mark.long
@settings(max_examples=20, deadline=None)
@given(histories(), READINGS)
def test_sql_finds_the_same_parts_in_the_raw_rows(history, drawn):
    tables, rows, _ = build(history.segments, history.commits, node_rows(drawn))
    failed = [r for r in rows if r.passed is False]
    assert len(problems(tables)) == len(failed)


@pytest.mark.parametrize("table", ["counter", "node_reading", "node_energy", "closure"])
def test_sql_notices_a_changed_row(table):
    tables, _, _ = build(*job(), energy(550, AROUND))
    column = {"closure": "found_mj"}.get(table, "energy_mj")
    rows = tables[table].to_pylist()
    n = next(i for i, r in enumerate(rows) if table != "closure" or r["check"] == "C3")
    if table == "node_reading":
        n = 1  # used at an end
    rows[n][column] += 5_000
    changed = tables | {table: pa.Table.from_pylist(rows, ENERGY_SCHEMAS[table])}
    assert problems(changed)


def test_rounding_is_half_up():
    assert [round_ns(n * 500_000_000) for n in range(4)] == [0, 1, 1, 2]


def test_evidence_follows_only_from_nodes_that_all_pass():
    _, (row,), _ = build(*job(), power(550, AROUND))
    made = commit(1, "a1", 2)
    exact = [replace(row, check=c, passed=True) for c in ("C1", "C2", "C4", "C5")]
    assert evidence_class([*exact, row], [made]) == "E3"
    assert evidence_class([*exact, row, replace(row, passed=None)], [made]) == "E2"
