"""What is certified is what the counters ran, whoever died: the counters are the judge, not the ledger."""

from __future__ import annotations

import io
import json
from collections import Counter
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from support.ledgers import GPU, SECOND, chain, commit, read, segment
from support.report_outputs import GPUS, measured_output

from millijoule.jobs import check as check_command
from millijoule.pipeline.closing.check import check_output
from millijoule.pipeline.closing.finish import finish_job, load_records
from millijoule.pipeline.energy.account_gaps import NEVER_CLOSED
from millijoule.pipeline.energy.carbon import Rates
from millijoule.pipeline.energy.closure import ImageTotals, close_ledger, evidence_class
from millijoule.pipeline.energy.commit_table import CommitTable
from millijoule.pipeline.energy.counter_split import MAX_GAP_NS
from millijoule.pipeline.energy.ledger import build_ledger
from millijoule.pipeline.energy.uncommitted import UncommittedWriter
from millijoule.pipeline.output.job import require_job
from millijoule.pipeline.planning.retry_rounds import load_job_shards
from millijoule.pipeline.report.data import Report, collect_job
from millijoule.pipeline.report.page import render_page
from millijoule.pipeline.report.terminal import print_report
from millijoule.pipeline.running.progress import closing_lines
from millijoule.pipeline.sql.query import CLOSURE_QUERIES, open_tables, run_query
from millijoule.workers.layout import closing_key, commit_key, worker_key
from millijoule.workers.schemas import CounterRead, Segment, WorkerClosing, WorkerEnvironment
from millijoule.workers.storage.protocol import ObjectInfo

LONG_S = MAX_GAP_NS // SECOND + 60


class MemoryStore:
    """The part of a store that reading back needs."""

    url = "memory:"

    def __init__(self):
        self.objects = {}

    def put(self, key, data):
        self.objects[key] = data

    def get(self, key):
        return self.objects[key]

    def list(self, prefix=""):
        return [ObjectInfo(k, len(v), 0) for k, v in sorted(self.objects.items()) if k.startswith(prefix)]

    def open_input(self, key):
        return io.BytesIO(self.objects[key])


def environment(worker, opened, run=1, gpus=("GPU-1",), host="h1"):
    device = gpus[0] if gpus else "cpu"
    return WorkerEnvironment(worker, run, "n1", host, device, gpus, None, None, "3", None, "nvml", opened)


# --- a world whose counters are known ---------------------------------------------------------------------------------


@dataclass
class Host:
    """Counters over time: at `at_s[i]` seconds `domain` has run `truth[domain][i]` mJ in all, whatever it shows."""

    boot: str
    at_s: list[int]
    truth: dict[str, list[int]]
    reset_at: int | None  # of all counters, at this tick

    def read(self, i, domains, wall=10**9):
        was_reset = self.reset_at is not None and i >= self.reset_at
        shown = {d: self.truth[d][i] - (self.truth[d][self.reset_at] if was_reset else -500) for d in domains}
        t = self.at_s[i] * SECOND
        return CounterRead(self.boot, t, t + wall, 0, shown, None, int(was_reset))


@dataclass
class Account:
    """A worker was there from tick `begin` to `end`, and used `domains`; `closed_at` None: nobody read afterwards."""

    host: Host
    domains: tuple[str, ...]
    begin: int
    end: int
    closed_at: int | None = None


@dataclass
class World:
    """What a job left in its output, and what really happened."""

    store: MemoryStore
    shards: int
    accounts: dict[str, Account]

    def ledger(self):
        return load_records(self.store, self.shards).ledger

    def ran_mj(self):
        """What all counters ran while workers were there, pauses of up to half an hour between two included.

        None where a counter was reset meanwhile: then nobody can know.
        """
        total = 0
        spans = {}
        for a in self.accounts.values():
            end = a.end if a.closed_at is None else max(a.end, a.closed_at)
            for d in a.domains:
                spans.setdefault((a.host.boot, d), (a.host, []))[1].append((a.begin, end))
        for (_, domain), (host, of_counter) in spans.items():
            merged = []
            for begin, end in sorted(of_counter):
                pause = host.at_s[begin] - host.at_s[merged[-1][1]] if merged else 0
                lost = host.reset_at is not None and merged and merged[-1][1] < host.reset_at <= begin
                if merged and pause <= MAX_GAP_NS // SECOND and not (lost and pause > 0):
                    merged[-1] = merged[-1][0], max(merged[-1][1], end)
                else:
                    merged.append((begin, end))
            for begin, end in merged:
                if host.reset_at is not None and begin < host.reset_at <= end:
                    return None
                total += host.truth[domain][end] - host.truth[domain][begin]
        return total


@st.composite
def hosts(draw, boot):
    domains = draw(st.sampled_from([("gpu:A",), ("gpu:A", "gpu:B"), ("gpu:A", "gpu:B", "cpu:package-0")]))
    n = draw(st.integers(4, 12))
    steps = draw(st.lists(st.sampled_from([1, 1, 1, 30, LONG_S]), min_size=n, max_size=n))
    at_s, truth = [1000], {d: [draw(st.integers(0, 10**6))] for d in domains}
    for step in steps:
        at_s.append(at_s[-1] + step)
        for d in domains:
            truth[d].append(truth[d][-1] + draw(st.integers(1, 3000)))
    reset_at = draw(st.none() | st.none() | st.integers(1, n))
    return Host(boot, at_s, truth, reset_at)


FATES = ("said its last words", "read by another", "read by a later run", "unreadable", "forgotten")


@st.composite
def worlds(draw, fates=FATES, resets=True):
    store, accounts, shards = MemoryStore(), {}, 0
    writer = UncommittedWriter(store, 1)
    for boot in ("b1", "b2")[: draw(st.integers(1, 2))]:
        host = draw(hosts(boot))
        if not resets:
            host.reset_at = None
        last = len(host.at_s) - 1
        shared = tuple(d for d in host.truth if d.startswith("cpu:"))
        boards = [d for d in host.truth if d not in shared]
        for number in range(draw(st.integers(1, 3))):
            worker, run = f"{boot}-w{number}", draw(st.integers(1, 2))
            domains = (boards[number % len(boards)], *shared)
            ticks = sorted(draw(st.sets(st.integers(0, last), min_size=1, max_size=6)))
            account = accounts[worker] = Account(host, domains, ticks[0], ticks[-1])
            account.end = draw(st.integers(ticks[-1], last))  # it may have worked on and told nobody
            opened = host.read(ticks[0], domains)
            gpus = (domains[0].removeprefix("gpu:"),)
            store.put(worker_key(worker), environment(worker, opened, run, gpus, boot).to_json())
            reads = [opened]
            for i in ticks[1:]:
                failed = draw(st.sampled_from([*[None] * 6, *domains]))
                reads.append(host.read(i, [d for d in domains if d != failed]))
            carried = []
            for before, after in pairwise(reads):
                kind = draw(st.sampled_from(["load", "idle", "shard", "retry", "a driver died with it"]))
                if kind == "shard":
                    carried.append(Segment(worker, kind, before, after, shards, f"a{shards}"))
                    body = commit(shards, f"a{shards}", 1, carried, worker=worker, host=boot, device=gpus[0])
                    store.put(commit_key(shards), body.to_json())
                    shards, carried = shards + 1, []
                elif kind == "a driver died with it":
                    carried = []
                else:
                    carried.append(Segment(worker, kind, before, after))
            if draw(st.booleans()):
                writer.add(worker, carried, ())
            fate = draw(st.sampled_from(fates))
            if fate == "forgotten":
                continue
            by, closer, reason = "w9", run, ""
            if fate == "said its last words":
                by, account.closed_at = worker, account.end
            elif fate != "unreadable":
                account.closed_at = draw(st.integers(account.end, last))
                closer = run + (fate == "read by a later run")
            else:
                reason = "its node is gone"
            end = None if account.closed_at is None else host.read(account.closed_at, host.truth)
            store.put(closing_key(worker), WorkerClosing(worker, closer, by, end, reason).to_json())
    writer.flush()
    return World(store, shards, accounts)


@pytest.mark.long
@settings(max_examples=150, deadline=None)
@given(worlds())
def test_what_is_certified_is_what_the_counters_ran(world):
    ledger = world.ledger()
    if ledger.complete:
        assert ledger.summary()["total_mj"] == world.ran_mj()
    else:
        assert ledger.summary()["total_mj"] is None
    silent = {w for w, a in world.accounts.items() if a.closed_at is None}
    assert silent <= {u.worker_id for u in ledger.unclosed}


@pytest.mark.long
@settings(max_examples=50, deadline=None)
@given(worlds(fates=("said its last words", "read by another"), resets=False))
def test_nothing_is_missing_where_every_account_was_closed(world):
    ledger = world.ledger()
    assert ledger.unclosed == ()
    assert ledger.complete
    assert ledger.summary()["total_mj"] == world.ran_mj()


@pytest.mark.long
@settings(max_examples=60, deadline=None)
@given(worlds())
def test_c1_holds_for_what_was_read_however_accounts_end(world):
    ledger = world.ledger()
    held, grown = Counter(), Counter()
    for run in ledger.runs:
        grown[run.boot_id, run.epoch, run.domain] += run.energy_mj
    for entry in ledger.entries:
        for domain, mj in entry.energy_mj.items():
            held[entry.segment.open.boot_id, entry.segment.open.epoch_of(domain), domain] += mj or 0
    for gap in ledger.gaps:
        held[gap.boot_id, gap.epoch, gap.domain] += gap.energy_mj
    assert +held == +grown


# --- one account at a time --------------------------------------------------------------------------------------------

CHAIN = chain([read(0, 100), read(10, 300), read(20, 700)], ["load", "shard"])
ENVIRONMENTS = {"w1": environment("w1", read(0, 100))}


def closed(end, *, by="w2", run=1, reason=""):
    return {"w1": WorkerClosing("w1", run, by, end, reason)}


def account(closings, segments=CHAIN, environments=ENVIRONMENTS):
    return build_ledger(segments, {1: "a1", 2: "a2"}, {"w1": ("GPU-1",)}, environments, closings)


def test_a_worker_that_dies_after_its_last_commit_is_read_by_another():
    ledger = account(closed(read(45, 950)))
    assert [(e.segment_class, e.total_mj) for e in ledger.entries] == [
        ("load", 200),
        ("shard", 400),
        ("gap", 250),
    ]
    assert (ledger.complete, ledger.unclosed, ledger.summary()["total_mj"]) == (True, (), 850)
    assert ledger.gaps == ()
    assert {e.segment.worker_id for e in ledger.entries} == {"w1"}


def test_last_words_that_say_nothing_new_add_nothing():
    assert account(closed(read(20, 700), by="w1")).entries == account({}, environments={}).entries
    assert account(closed(read(20, 700), by="w1")).complete


@pytest.mark.parametrize(
    ("closings", "words"),
    [
        ({}, NEVER_CLOSED),
        (closed(None, reason="its node left the cluster"), "its node left the cluster"),
        (closed(read(45, 20, epoch=1)), "reset"),
        (closed(read(45, 20)), "reset"),  # not even the meter noticed
        (closed(read(45)), "could not be read"),
        (closed(read(15, 500)), "before its last record"),
        (closed(read(45, 950, boot="next")), "started anew"),
        (closed(read(21 + LONG_S, 950), run=2), "only by a later run of the job"),
    ],
)
def test_an_account_without_an_end_leaves_no_total(closings, words):
    ledger = account(closings)
    assert not ledger.complete
    assert [(u.worker_id, u.host, u.devices, u.since_wall_ns) for u in ledger.unclosed] == [
        ("w1", "h1", (GPU,), 20 * SECOND)
    ]
    assert words in ledger.unclosed[0].reason
    summary = ledger.summary()
    assert (summary["total_mj"], summary["overhead_mj"], summary["shard_mj"]) == (None, None, 400)
    (told,) = summary["unclosed"]
    assert told["worker_id"] == "w1"
    assert told["since"] == "1970-01-01T00:00:20+00:00"
    assert json.loads(json.dumps(told)) == told
    last = ledger.entries[-1]  # what is missing stands in the tables as missing
    assert (last.segment_class, last.energy_mj, last.segment.open) == ("gap", {GPU: None}, read(20, 700))


def test_within_a_run_a_worker_may_hang_as_long_as_it_likes():
    assert account(closed(read(21 + LONG_S, 950))).summary()["total_mj"] == 850
    assert account(closed(read(20 + LONG_S // 2, 950), run=2)).summary()["total_mj"] == 850


def test_a_worker_that_dies_before_it_records_anything_has_an_account():
    worlds = [
        account(closed(read(30, 4000)), segments=[]),
        account({}, segments=[]),
        account({}, segments=[], environments={"w1": environment("w1", read(0))}),
    ]
    assert [w.summary()["total_mj"] for w in worlds] == [3900, None, None]
    assert [len(w.unclosed) for w in worlds] == [0, 1, 0]  # the last has no counter: missing, as ever
    assert [len(w.entries) for w in worlds] == [1, 1, 1]


def test_what_one_domain_lacks_does_not_hide_the_others():
    first = read(0, 0, **{"cpu:package-0": 10})
    ledger = account(
        closed(read(20, **{"cpu:package-0": 60})),
        chain([first, read(10, 100, **{"cpu:package-0": 40})], ["shard"]),
        {"w1": environment("w1", first)},
    )
    assert [u.devices for u in ledger.unclosed] == [(GPU,)]
    assert ledger.entries[-1].energy_mj == {GPU: None, "cpu:package-0": 20}


def test_who_reads_may_see_more_than_the_dead_did():
    ledger = account(closed(read(45, 950, **{"gpu:GPU-2": 7, "cpu:package-0": 9})))
    assert ledger.summary()["total_mj"] == 850
    assert ledger.summary()["domains"] == [GPU]


def test_a_hole_in_what_a_worker_recorded_is_its_own_even_if_it_is_long():
    """A driver died with its unflushed records, and another worker shares the device at one end of the hole."""
    late = 25 + LONG_S
    holed = [CHAIN[0], *chain([read(late, 5000), read(late + 1, 5100)], ["shard"])]
    ledger = account(closed(read(late + 1, 5100), by="w1"), holed)
    assert [(e.segment_class, e.total_mj) for e in ledger.entries] == [
        ("load", 200),
        ("gap", 4700),
        ("shard", 100),
    ]
    assert ledger.summary()["total_mj"] == 5000
    neighbour = segment(read(5, 200), read(12, 400), worker="w2", shard=2, attempt="a2")
    assert account(closed(read(late + 1, 5100), by="w1"), [*holed, neighbour]).summary()["total_mj"] == 5000


def test_what_lies_between_the_opening_read_and_the_first_record_belongs_to_the_account():
    ledger = account(closed(read(20, 700), by="w1"), CHAIN[1:])
    assert [(e.segment_class, e.total_mj) for e in ledger.entries] == [("gap", 200), ("shard", 400)]
    assert ledger.complete


def test_workers_that_share_a_device_share_what_one_of_them_did_not_record():
    other = segment(read(20, 700), read(30, 900), worker="w2", shard=2, attempt="a2")
    environments = ENVIRONMENTS | {"w2": environment("w2", read(20, 700))}
    ends = closed(read(30, 900)) | {"w2": WorkerClosing("w2", 1, "w2", read(30, 900))}
    ledger = account(ends, [*CHAIN, other], environments)
    assert {(e.segment.worker_id, e.segment_class): e.total_mj for e in ledger.entries[2:]} == {
        ("w1", "gap"): 100,
        ("w2", "shard"): 100,
    }
    assert ledger.summary()["total_mj"] == 800


def test_estimates_of_two_processes_are_not_subtracted():
    reads = [read(0, 0, estimate=5), read(10, 100, estimate=50)]
    environments = {"w1": environment("w1", reads[0])}
    other = account(closed(read(20, 200, estimate=9000)), chain(reads, ["shard"]), environments)
    own = account(closed(read(20, 200, estimate=70), by="w1"), chain(reads, ["shard"]), environments)
    assert [w.summary()["estimate_total_mj"] for w in (other, own)] == [None, 65]


def test_an_open_account_fails_the_evidence_but_is_no_damage():
    ledger = account({})
    commits = [commit(1, "a1", 1)]
    table = CommitTable.of(commits)
    images = ImageTotals.of(table)
    images.add(np.array([0]), np.array([400]), np.array([-1]))
    rows = close_ledger(ledger, table, images, {}, ())
    opened = [row for row in rows if row.check == "C1" and row.passed is None]
    assert [(row.scope, row.note) for row in opened] == [(f"w1 {GPU}", f"account not closed: {NEVER_CLOSED}")]
    assert evidence_class(rows, commits) == "E0"
    assert not [row for row in rows if row.passed is False]
    sound = account(closed(read(20, 700), by="w1"))
    images.full_mj = 600
    assert evidence_class(close_ledger(sound, table, images, {}, ()), commits) == "E1"


@pytest.mark.parametrize("damage", [{"t_mono_ns": "1"}, {"energy_mj": {GPU: 1.5}}, {"epoch": 2**70}])
def test_a_closing_that_is_no_read_is_named(damage):
    store = MemoryStore()
    body = json.loads(WorkerClosing("w1", 1, "w1", read(20, 700)).to_json())
    body["read"] |= damage
    store.put(closing_key("w1"), json.dumps(body).encode())
    with pytest.raises(Exception, match=r"_job/closed/w1\.json: not what a driver or worker wrote"):
        load_records(store, 0)


def test_gaps_of_an_account_do_not_depend_on_the_order_of_records():
    for segments in (CHAIN, CHAIN[::-1], [*CHAIN, replace(CHAIN[1], segment_class="loser")]):
        assert account(closed(read(45, 950)), segments).entries == account(closed(read(45, 950))).entries


# --- a whole output ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """Three workers on two hosts; of `w2` nobody knows what it used last."""
    store = measured_output(tmp_path_factory.mktemp("job"), [f"prompt {i}" for i in range(12)])
    job = require_job(store)
    shards = load_job_shards(store, job)
    reads = {}
    for entry in load_records(store, len(shards)).ledger.entries:
        reads.setdefault(entry.segment.worker_id, []).extend([entry.segment.open, entry.segment.close])
    for number, (worker, own) in enumerate(sorted(reads.items())):
        host = own[0].boot_id.removeprefix("boot-")
        store.put(worker_key(worker), environment(worker, own[0], 1, (GPUS[number],), host).to_json())
        if worker != "w2":
            store.put(closing_key(worker), WorkerClosing(worker, 1, worker, own[-1]).to_json())
    return store, finish_job(store, job, shards)


def test_stats_have_no_total_and_say_why(output):
    _, stats = output
    assert [(u["worker_id"], u["host"]) for u in stats["energy"]["unclosed"]] == [("w2", "host-b")]
    assert stats["energy"]["unclosed"][0]["devices"] == ["cpu:package-0", f"gpu:{GPUS[2]}"]
    assert (stats["energy"]["complete"], stats["evidence_class"]) == (False, "E0")
    assert stats["closure"]["C1"] is not True
    assert stats["full_mj_per_image"] is None
    assert stats["direct_mj_per_image"] > 0


def test_check_notes_it_and_finds_no_difference(output, capsys):
    store, _ = output
    notes = []
    assert list(check_output(store, on_note=notes.append)) == []
    assert len(notes) == 1
    assert f"worker w2 on host-b, cpu:package-0, gpu:{GPUS[2]}: {NEVER_CLOSED}" in notes[0]
    assert check_command.main(["--output", store.url]) == 0
    assert [line[:6] for line in capsys.readouterr().out.splitlines()][:1] == ["note: "]


def test_the_report_names_the_worker_and_leaves_its_device_and_node_without_a_sum(output):
    store, _ = output
    job = collect_job(store, Rates())
    (flag,) = [f for f in job.flags if f.name == "energy not read to the end"]
    assert flag.level == "problem"
    assert "w2 on host-b" in flag.text
    assert NEVER_CLOSED in flag.text
    for rows in (job.devices, job.nodes):
        assert {row.host: row.full_mj_per_image is None for row in rows} == {"host-a": False, "host-b": True}
    assert [row.full_mj_per_image for row in job.models] == [None]
    assert (job.measured.total_mj, job.measured.full_mj_per_image) == (None, None)
    assert job.gpu_time.workers_unclosed == 1
    assert job.gpu_time.full_seconds_per_image is None
    console = Console(file=io.StringIO(), width=200)
    print_report(Report((job,)), console)
    assert NEVER_CLOSED in console.file.getvalue()
    assert NEVER_CLOSED in render_page(Report((job,))).decode()


def test_sql_has_no_sum_of_what_is_missing(output):
    store, _ = output
    connection = open_tables([store])

    def rows(query):
        return run_query(connection, query, {}).to_pylist()

    for query in CLOSURE_QUERIES:
        assert rows(query) == [], query
    nodes = {(r["host"], r["kind"]): r["energy_mj"] for r in rows("energy_per_node")}
    assert {key for key, mj in nodes.items() if mj is None} == {("host-b", "cpu"), ("host-b", "gpu")}
    assert {r["segment_class"] for r in rows("idle_share") if r["energy_mj"] is None} == {"gap"}
    assert [r["full_mj_per_image"] for r in rows("images_per_kwh")] == [None]
    assert {r["worker_id"] for r in rows("waste") if r["energy_mj"] is None} == {"w2"}


def test_the_last_line_of_a_job_warns(output):
    store, stats = output
    (line,) = [line for line in closing_lines(stats, store.url) if line.startswith("warning: ")]
    assert "w2 on host-b" in line
    assert NEVER_CLOSED in line


@pytest.mark.parametrize("said", [True, False])
def test_a_worker_that_loaded_without_counters_has_the_estimate_that_it_stated_and_else_none(said):
    def estimated(t, mj):
        return CounterRead("boot", t * SECOND, t * SECOND, 0, {}, mj)

    done = [
        Segment("w1", c, estimated(t, 10 * t), estimated(t + 1, 10 * t + 10))
        for t, c in enumerate(("load", "idle"))
    ]
    own = environment("w2", estimated(1, 100), gpus=())
    closing = (
        WorkerClosing("w2", 1, "w2", estimated(4, 170)) if said else WorkerClosing("w2", 1, "", None, "none")
    )
    ledger = build_ledger(done, environments={"w2": own}, closings={"w2": closing})
    summary = ledger.summary()
    assert summary["unclosed"] == []
    assert summary["total_mj"] is None
    assert summary["estimate_mj"]["gap"] == (70 if said else None)
    assert summary["estimate_total_mj"] == (90 if said else None)


@pytest.mark.parametrize("said", [True, False])
def test_the_estimate_of_a_worker_without_counters_that_dies_after_its_first_records_is_not_said_to_be_whole(
    said,
):
    def estimated(t, mj):
        return CounterRead("boot", t * SECOND, t * SECOND, 0, {}, mj)

    segments = [Segment("w1", "shard", estimated(1, 100), estimated(4, 170), 0, "a1")]
    own = environment("w1", estimated(1, 100), gpus=())
    closing = (
        WorkerClosing("w1", 1, "w1", estimated(4, 170)) if said else WorkerClosing("w1", 1, "", None, "none")
    )
    summary = build_ledger(segments, {0: "a1"}, {"w1": ("cpu",)}, {"w1": own}, {"w1": closing}).summary()
    assert summary["estimate_mj"]["shard"] == 70
    assert summary["estimate_total_mj"] == (70 if said else None)
