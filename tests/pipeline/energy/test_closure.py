"""The ledger closes whatever happens: C1, C2 and C5 exactly, in Python and again in SQL from the rows alone."""

from collections import Counter

import pyarrow as pa
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.histories import histories
from support.ledgers import JOB, SECOND, chain, commit, image_rows, read, segment

from millijoule.pipeline.energy.closure import EXACT_CHECKS, ClosureRow, evidence_class
from millijoule.pipeline.energy.commit_table import CommitTable
from millijoule.pipeline.energy.ledger import build_ledger
from millijoule.pipeline.energy.rows import EnergyRows, RowTables
from millijoule.pipeline.energy.schemas import table_of
from millijoule.pipeline.sql.query import CLOSURE_QUERIES, connect, run_query
from millijoule.workers.schemas import BOOK_EPOCHS, CounterRead

FEW = settings(max_examples=25, deadline=None)  # each asks DuckDB all questions
DUCKDB = connect({}, threads=1)  # opening one takes as long as asking it


def build(segments, commits, devices=None):
    """All tables of a job, and the closure rows."""
    ledger = build_ledger(segments, {c.shard_id: c.attempt_id for c in commits}, devices)
    rows = EnergyRows(JOB, ledger, CommitTable.of(commits), RowTables(image_rows))
    tables = {
        name: pa.concat_tables([table_of(name, []), *(t for _, t in blocks)])
        for name, blocks in rows.tables()
    }
    return tables, rows.closure


def violations(tables, queries=CLOSURE_QUERIES):
    """What each of these closure files of `sql/` finds."""
    with_run = {
        name: t.append_column("run_id", pa.array(["r"] * t.num_rows, pa.string()))
        for name, t in tables.items()
    }
    for name, table in with_run.items():
        DUCKDB.register(name, table)
    return {q: run_query(DUCKDB, q, {}).to_pylist() for q in queries}


NONE: dict[str, list] = {q: [] for q in CLOSURE_QUERIES}


def changed(tables, name, row, column, value):
    rows = tables[name].to_pylist()
    rows[row] = rows[row] | {column: value}
    return tables | {name: pa.Table.from_pylist(rows, tables[name].schema)}


@pytest.mark.long
@settings(max_examples=75, deadline=None)
@given(histories())
def test_exact_checks_never_fail(history):
    _, closure = build(history.segments, history.commits)
    assert {r.check for r in closure} >= set(EXACT_CHECKS)
    for row in closure:
        if row.check in EXACT_CHECKS:
            assert row.passed is not False, row
            assert row.residual_mj in (0, None)
        if row.passed and row.expected_mj is not None:
            assert row.expected_mj == row.found_mj


@pytest.mark.long
@FEW
@given(histories())
def test_sql_agrees_from_the_rows_alone(history):
    tables, _ = build(history.segments, history.commits)
    assert violations(tables) == NONE


@pytest.mark.long
@FEW
@given(histories())
def test_a_job_with_a_board_that_was_not_read_closes_for_what_was(history):
    devices = {s.worker_id: ("Z",) for s in history.segments}
    tables, closure = build(history.segments, history.commits, devices)
    assert violations(tables) == NONE
    verdicts = {(r.check, r.scope): r.passed for r in closure if r.check in EXACT_CHECKS}
    assert verdicts["C2", "job, full"] is None
    assert False not in verdicts.values()
    assert set(tables["image"]["energy_full_mj"].to_pylist()) <= {None}
    assert set(tables["image"]["energy_direct_mj"].to_pylist()) <= {None}


@pytest.mark.parametrize("later", [5, 100])  # at once, one after the other
def test_a_package_in_two_books_closes_in_sql_too(later):
    def chained(book, offset, worker, begin, shard):
        reads = [
            CounterRead("boot", t * SECOND, t * SECOND, 0, {"cpu:0": offset + 100 * t}, None, 0, book)
            for t in range(begin, begin + 30, 10)
        ]
        return chain(reads, ["load", "shard"], worker, shard)

    segments = [
        *chained(3 * BOOK_EPOCHS, 900_000, "w1", 0, 1),
        *chained(7 * BOOK_EPOCHS, 0, "w2", later, 2),
    ]
    commits = [commit(n, "a1", 2, worker=f"w{n}", device="cpu") for n in (1, 2)]
    tables, closure = build(segments, commits)
    assert violations(tables) == NONE
    assert [r.passed for r in closure if r.check in EXACT_CHECKS].count(False) == 0
    counted = sum(r.found_mj for r in closure if r.check == "C1")
    assert counted == (2000 if later == 5 else 4000)
    verdicts = {(r.check, r.scope): r.passed for r in closure}
    assert verdicts["C2", "job, full"] is (None if later == 5 else True)


@pytest.mark.long
@settings(max_examples=50, deadline=None)
@given(histories())
def test_losers_and_retries_stay_in_the_books(history):
    tables, _ = build(history.segments, history.commits)
    attempts = {(r["shard_id"], r["attempt_id"]): r["outcome"] for r in tables["attempt"].to_pylist()}
    won = {(c.shard_id, c.attempt_id) for c in history.commits}
    assert {a for a, outcome in attempts.items() if outcome == "committed"} == won
    tried = {(s.shard_id, s.attempt_id) for s in history.segments if s.attempt_id}
    assert attempts.keys() == tried
    ledger = build_ledger(history.segments, history.winners)
    per_class = Counter()
    for row in tables["segment"].to_pylist():
        per_class[row["segment_class"]] += row["energy_mj"] or 0
    assert +per_class == +Counter(ledger.summary()["measured_mj"])


@pytest.mark.long
@FEW
@given(histories(), st.data())
def test_a_changed_segment_is_found(history, data):
    tables, _ = build(history.segments, history.commits)
    energies = tables["segment"]["energy_mj"].to_pylist()
    known = [n for n, mj in enumerate(energies) if mj is not None]
    assume(known)
    row = data.draw(st.sampled_from(known))
    by = data.draw(st.sampled_from([-1000, -1, 1, 1000]))
    more = changed(tables, "segment", row, "energy_mj", energies[row] + by)
    found = violations(more, ["closure_c1"])["closure_c1"]
    assert [r["found_mj"] - r["expected_mj"] for r in found] == [by]


@pytest.mark.long
@FEW
@given(histories(), st.data())
def test_a_changed_image_is_found(history, data):
    tables, _ = build(history.segments, history.commits)
    rows = tables["image"].to_pylist()
    known = [n for n, r in enumerate(rows) if r["energy_direct_mj"] is not None]
    assume(known)
    row = data.draw(st.sampled_from(known))
    more = changed(tables, "image", row, "energy_direct_mj", rows[row]["energy_direct_mj"] + 1)
    assert violations(more, ["closure_c2"])["closure_c2"]
    stolen = changed(tables, "image", row, "attempt_id", "nobody")
    assert violations(stolen, ["closure_c5"])["closure_c5"]


# --- Python's checks can fail -------------------------------------------------------------------------------------------


def closed(segments, commits, images=image_rows):
    ledger = build_ledger(segments)
    rows = EnergyRows(JOB, ledger, CommitTable.of(commits), RowTables(images))
    for _, blocks in rows.tables():
        for _ in blocks:
            pass
    return {(r.check, r.scope.split(",")[-1].strip()): r.passed for r in rows.closure}


SHARD = chain([read(0, 0), read(20, 90), read(40, 200)], ["load", "shard"])


def test_a_sound_job_closes():
    assert closed(SHARD, [commit(1, "a1", 2, SHARD)]) == {
        ("C1", "gpu:GPU-1 boot boot epoch 0"): True,
        ("C2", "direct"): True,
        ("C2", "full"): True,
        ("C5", "job"): True,
        ("C6", "boot boot"): True,
        ("C3", "node"): None,
        ("C4", "device"): None,
    }


@pytest.mark.parametrize(
    ("segments", "commits"),
    [
        (SHARD, []),  # charged, but nobody committed
        (SHARD, [commit(1, "a1", 2, SHARD), commit(1, "a2", 2)]),  # two winners
        (SHARD, [commit(1, "a1", 2, SHARD), commit(2, "a1", 2)]),  # no segment
        ([*SHARD, segment(read(40, 200), read(50, 210))], [commit(1, "a1", 2, SHARD)]),  # two segments
    ],
)
def test_attempts_that_do_not_fit_fail(segments, commits):
    assert closed(segments, commits)["C5", "job"] is False


def test_an_image_too_few_fails():
    made = commit(1, "a1", 2, SHARD)
    assert closed(SHARD, [made], lambda c: image_rows(c).slice(1))["C5", "job"] is False


def test_a_ledger_that_lost_a_millijoule_fails(monkeypatch):
    import millijoule.pipeline.energy.ledger as module

    def careless(claims):
        split = real(claims)
        shares = [s and s - 1 for s in split.shares]
        return type(split)(shares, split.unclaimed, split.runs)

    real = module.split_counter
    monkeypatch.setattr(module, "split_counter", careless)
    found = closed(SHARD, [commit(1, "a1", 2, SHARD)])
    assert found["C1", "gpu:GPU-1 boot boot epoch 0"] is False


# --- evidence class ----------------------------------------------------------------------------------------------------


def row(check, passed):
    return ClosureRow(check, "x", None, None, None, passed, "")


EXACT = [row("C1", True), row("C2", True), row("C5", True)]


@pytest.mark.parametrize(
    ("rows", "domains", "evidence"),
    [
        ([*EXACT, row("C3", None), row("C4", None)], ("gpu:GPU-1",), "E1"),
        ([*EXACT, row("C3", None), row("C4", None)], ("cpu:0",), "E0"),  # the GPU was not read
        ([*EXACT, row("C3", None), row("C4", True)], ("gpu:GPU-1",), "E2"),
        (
            [*EXACT, row("C3", None), row("C4", True), row("C4", None)],
            ("gpu:GPU-1",),
            "E1",
        ),  # one of two boards
        ([*EXACT, row("C3", None), row("C4", False)], ("gpu:GPU-1",), "E1"),
        ([*EXACT, row("C3", True), row("C4", True)], ("gpu:GPU-1",), "E3"),
        ([*EXACT, row("C3", True), row("C4", None)], ("gpu:GPU-1",), "E1"),
        ([*EXACT[:2], row("C5", False), row("C4", True)], ("gpu:GPU-1",), "E0"),
        ([*EXACT, row("C2", None), row("C4", True)], ("gpu:GPU-1",), "E0"),  # something was not measured
        ([], ("gpu:GPU-1",), "E0"),
    ],
)
def test_the_evidence_class_follows_from_the_checks(rows, domains, evidence):
    made = commit(1, "a1", 2, energy_domains=domains)
    assert evidence_class(rows, [made]) == evidence


def test_a_cpu_worker_counts_with_the_cpus_counter():
    made = commit(1, "a1", 2, energy_domains=("cpu:0",), device="cpu")
    assert evidence_class(EXACT, [made]) == "E1"


@pytest.mark.parametrize(
    ("gpus", "domains", "evidence"),
    [
        (("GPU-1",), ("gpu:GPU-1",), "E1"),
        (("GPU-1", "GPU-2"), ("gpu:GPU-1", "gpu:GPU-2"), "E1"),
        (("GPU-1", "GPU-2"), ("cpu:0", "gpu:GPU-1"), "E0"),  # one dead counter of two
        (("MIG-1",), ("cpu:0", "gpu:GPU-1"), "E0"),  # another device's counter
    ],
)
def test_every_device_of_a_worker_has_to_be_read_for_measured(gpus, domains, evidence):
    made = commit(1, "a1", 2, energy_domains=domains, device=gpus[0])
    assert evidence_class([*EXACT, row("C3", None)], [made], {"w1": gpus}) == evidence
