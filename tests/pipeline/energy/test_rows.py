"""Tables made as columns are the tables made row by row, whatever happened in a job."""

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.histories import histories
from support.ledgers import JOB, image_rows
from support.plain_rows import attempt_rows, counter_rows, image_rows_of, segment_rows

from millijoule.pipeline.energy import commit_table
from millijoule.pipeline.energy import rows as energy_rows
from millijoule.pipeline.energy.commit_table import CommitTable, PowerSpool
from millijoule.pipeline.energy.ledger import build_ledger
from millijoule.pipeline.energy.rows import EnergyRows, RowTables
from millijoule.workers.schemas import Commit, PowerSample, PowerTrace


def rows_of(blocks):
    return [tuple(row.values()) for _, block in blocks for row in block.to_pylist()]


@pytest.mark.long
@pytest.mark.parametrize("at_once", [1, 3, 4096])
def test_columns_hold_the_rows_that_are_made_one_by_one(at_once, monkeypatch):
    monkeypatch.setattr(energy_rows, "ENTRIES_AT_ONCE", at_once)
    monkeypatch.setattr(energy_rows, "COMMITS_AT_ONCE", at_once)

    @settings(max_examples=40, deadline=None)
    @given(histories())
    def compare(history):
        ledger = build_ledger(history.segments, history.winners)
        commits = sorted(history.commits, key=lambda c: c.shard_id)
        made = EnergyRows(JOB, ledger, CommitTable.of(commits), RowTables(image_rows))
        tables = {name: rows_of(blocks) for name, blocks in made.tables()}
        assert tables["counter"] == list(counter_rows(ledger))
        assert [row for row in tables["segment"] if row[0] is not None] == list(segment_rows(ledger))
        gaps = [(g.segment_class, g.domain, g.energy_mj) for g in ledger.gaps]
        assert [(r[2], r[10], r[11]) for r in tables["segment"] if r[0] is None] == gaps
        assert [r for r in tables["attempt"] if r[2] == "committed"] == list(attempt_rows(ledger, commits))
        images = [(*row[:6], row[7]) for row in tables["image"]]
        assert images == list(image_rows_of(ledger, commits, image_rows))
        full, total = [row[6] for row in tables["image"]], ledger.summary()["total_mj"]
        if full and None not in full:
            assert sum(full) == total

    compare()


@settings(max_examples=50, deadline=None)
@given(histories())
def test_a_commit_comes_out_of_the_table_as_it_went_in_but_for_its_bulk(history):
    table = CommitTable.of(history.commits)
    bulk = {"segments": (), "files": (), "errors": {}, "power": (), "energy_mj": None}
    stripped = [Commit(**{f: getattr(c, f) for f in Commit.__slots__} | bulk) for c in history.commits]
    assert list(table) == stripped
    assert table.attempts().find(table.number("shard_id"), table.text("attempt_id")).tolist() == [
        *range(len(table))
    ]
    none = table.attempts().find(table.number("shard_id"), pa.array(["other"] * len(table), pa.string()))
    assert set(none.tolist()) <= {-1}


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("ab"), st.none() | st.just("n"), st.lists(st.none() | st.integers(0, 9)))
    ),
    st.integers(1, 5),
)
def test_power_samples_come_back_in_order_from_a_file_or_memory(added, rows):
    expected = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commit_table, "SPOOLED_SAMPLES", rows)
        spool = PowerSpool()
        for device, node, powers in added:
            samples = tuple(PowerSample(i, 10 * i, mw, 7) for i, mw in enumerate(powers))
            spool.add(PowerTrace(device, "boot", "nvml", samples), node, "host")
            expected += [("boot", node, "host", device, "nvml", *sample) for sample in samples]
    found = [tuple(row.values()) for table in spool.tables() for row in table.to_pylist()]
    assert found == expected
