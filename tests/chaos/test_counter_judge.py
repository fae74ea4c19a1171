"""The judge of random runs, before outputs that say too much, too little, and what the counters ran."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.boards import READ, RESET, SPEND, Record
from support.counter_judge import judge

from millijoule.workers.records import encode
from millijoule.workers.schemas import CounterRead, WorkerEnvironment

WORKERS = {11: "w0001-0001", 12: "w0002-0001"}

#: Two workers after one another: account 1 from 1 to 702 mJ, a pause of 1 mJ, account 2 from 703 to 1204 mJ.
BOARD = [
    Record(0, RESET, 0, 0),
    Record(1, READ, 11, 10),
    Record(701, SPEND, 11, 20),
    Record(702, READ, 11, 30),
    Record(703, READ, 12, 50),
    Record(1203, SPEND, 12, 60),
    Record(1204, READ, 12, 70),
]


IDLE = (Record(0, RESET, 0, 0),)


def neighbour(reset_at):
    """Another board of the host, on which nobody works."""
    return [Record(0, RESET, 0, 0), *([Record(0, RESET, 0, reset_at)] if reset_at else [])]


def verdict_on(folder, says_mj, other_board=IDLE, *, lost_books=(), first_mj=1):
    """`first_mj`: what the first worker read when it opened its account; None: it could not."""
    energy = {"total_mj": says_mj, "complete": True, "unclosed": []}
    stats = {"energy": energy, "full_mj_per_image": 1, "images_ok": 1, "closure": {"C1": True}}
    folder.mkdir(exist_ok=True)
    folder.joinpath("stats.json").write_text(json.dumps({**stats, "evidence_class": "E2"}))
    workers = folder / "_job/workers"
    workers.mkdir(parents=True)
    for pid, t_ns, mj in ((11, 10, first_mj), (12, 50, 703)):
        opened = CounterRead("boot", t_ns, t_ns, 0, {"gpu:A": mj} if mj else {}, None, 0)
        environment = WorkerEnvironment(
            WORKERS[pid], 1, "n", "h", "A", ("A",), None, None, "3.11", None, "nvml-counter", opened=opened
        )
        (workers / f"{WORKERS[pid]}.json").write_bytes(encode(environment))
    part = folder / "energy/segment/run_id=r/date=1970-01-01/part-0.parquet"
    part.parent.mkdir(parents=True)
    row = {"segment_class": "shard", "boot_id": "boot", "domain": "gpu:A", "energy_mj": says_mj}
    pq.write_table(pa.Table.from_pylist([row]), part)
    return judge(folder, {"A": (["boot"], BOARD), "B": (["boot"], other_board)}, WORKERS, lost_books)


@pytest.mark.parametrize("reset_at", [None, 5, 40])
def test_all_that_ran_is_true(tmp_path, reset_at):
    assert verdict_on(tmp_path, 1203, neighbour(reset_at)).problems == []


def test_a_pause_may_be_left_out_when_a_board_of_the_host_was_reset_in_it(tmp_path):
    assert verdict_on(tmp_path, 1202, neighbour(40)).problems == []


@pytest.mark.parametrize(
    ("says_mj", "reset_at"), [(1202, None), (1202, 60), (1201, 40), (502, 40), (1205, 40)]
)
def test_anything_else_is_not(tmp_path, says_mj, reset_at):
    job, device = verdict_on(tmp_path, says_mj, neighbour(reset_at)).problems
    assert f"certified {says_mj} mJ" in job
    assert f"certified {says_mj} mJ" in device


def test_a_pause_may_be_left_out_when_the_counter_book_was_lost_in_it_and_nothing_else(tmp_path):
    assert verdict_on(tmp_path / "pause", 1202, lost_books=[("boot", 40)]).problems == []
    assert len(verdict_on(tmp_path / "work", 502, lost_books=[("boot", 40)]).problems) == 2
    assert len(verdict_on(tmp_path / "later", 1202, lost_books=[("boot", 60)]).problems) == 2


def test_no_total_is_whole_where_a_worker_could_not_read_its_device(tmp_path):
    spent, blind = verdict_on(tmp_path, 501, first_mj=None).problems
    assert "energy was spent before an account was open" in spent
    assert "certified, though workers could not read the counters of [('boot', 'gpu:A')]" in blind
