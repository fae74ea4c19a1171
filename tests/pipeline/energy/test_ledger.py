import json
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.ledgers import GPU, SECOND, chain, commit, read, segment, shard_mj
from support.plain_split import apportion, image_energy

from millijoule.pipeline.energy.counter_split import MAX_GAP_NS
from millijoule.pipeline.energy.ledger import build_ledger
from millijoule.workers.schemas import Commit, CounterRead


def totals(ledger):
    """Everything the ledger holds per counter."""
    sums = Counter()
    for entry in ledger.entries:
        for domain, mj in entry.energy_mj.items():
            sums[domain] += mj or 0
    for gap in ledger.gaps:
        sums[gap.domain] += gap.energy_mj
    return sums


def growth(ledger):
    sums = Counter()
    for run in ledger.runs:
        sums[run.domain] += run.energy_mj
    return sums


# --- apportion --------------------------------------------------------------------------------------------------------


@given(st.integers(0, 10**15), st.lists(st.integers(0, 10**6), min_size=1, max_size=40).filter(any))
def test_shares_add_up_and_are_within_one_of_fair(total, weights):
    shares = apportion(total, weights)
    assert sum(shares) == total
    for share, weight in zip(shares, weights, strict=True):
        assert abs(share * sum(weights) - total * weight) < sum(weights)


@given(st.integers(0, 10**9), st.integers(1, 500))
def test_equal_weights_differ_by_at_most_one_and_favour_the_first(total, n):
    shares = apportion(total, [1] * n)
    assert shares == sorted(shares, reverse=True)
    assert shares[0] - shares[-1] <= 1
    assert image_energy(total, n) == shares


def test_energy_is_never_given_to_nobody():
    assert apportion(0, []) == []
    with pytest.raises(ValueError, match="cannot apportion 5 mJ"):
        apportion(5, [0, 0])
    with pytest.raises(ValueError):
        apportion(-1, [1])


def test_missing_shard_energy_is_missing_for_its_images():
    assert image_energy(None, 2) == [None, None]
    assert image_energy(7, 0) == []


# --- one worker -------------------------------------------------------------------------------------------------------


def test_segments_of_one_worker_are_its_differences():
    reads = [read(0, 100), read(1, 150), read(2, 150), read(30, 9000)]
    ledger = build_ledger(chain(reads, ["load", "idle", "shard"]))
    assert [e.total_mj for e in ledger.entries] == [50, 0, 8850]
    assert ledger.gaps == ()
    assert ledger.complete
    assert shard_mj(ledger, 1, "a1") == 8850
    assert shard_mj(ledger, 1, "other") is None
    summary = ledger.summary()
    assert (summary["total_mj"], summary["shard_mj"], summary["overhead_mj"]) == (8900, 8850, 50)
    assert summary["measured_mj"] == {"load": 50, "idle": 0, "shard": 8850}


def test_a_segment_reported_twice_counts_once():
    parts = chain([read(0, 0), read(1, 10), read(2, 30)], ["load", "shard"])
    assert build_ledger(parts + parts[::-1]) == build_ledger(parts)


def test_a_stretch_reported_as_shard_and_as_waste_is_the_shard_in_any_order():
    shard = segment(read(0, 0), read(1, 10))
    waste = replace(shard, segment_class="loser")
    for order in ([shard, waste], [waste, shard]):
        assert [e.segment_class for e in build_ledger(order).entries] == ["shard"]


def test_a_shard_that_did_not_win_is_waste():
    won, lost = segment(read(0, 0), read(1, 10)), segment(read(1, 10), read(2, 30), attempt="a2")
    ledger = build_ledger([won, lost], winners={1: "a1"})
    assert ledger.summary()["measured_mj"] == {"shard": 10, "loser": 20}


# --- missing is never zero --------------------------------------------------------------------------------------------


def test_a_worker_without_counters_has_no_energy_and_no_total():
    ledger = build_ledger([segment(read(0, estimate=5), read(1, estimate=9))])
    summary = ledger.summary()
    assert ledger.entries[0].total_mj is None
    assert shard_mj(ledger, 1, "a1") is None
    assert (summary["total_mj"], summary["shard_mj"], summary["measured_mj"]) == (None, None, {})
    assert summary["estimate_total_mj"] == 4
    assert not ledger.complete


def test_a_failed_read_leaves_both_neighbours_unknown_and_their_energy_in_a_gap():
    ledger = build_ledger(chain([read(0, 0), read(1), read(2, 30), read(3, 37)], ["shard", "idle", "load"]))
    assert [e.total_mj for e in ledger.entries] == [None, None, 7]
    assert [(g.segment_class, g.energy_mj) for g in ledger.gaps] == [("gap", 30)]
    assert ledger.complete  # nothing is lost: all 37 mJ are there
    assert ledger.summary()["total_mj"] == 37
    assert ledger.summary()["shard_mj"] is None


def test_a_failed_last_read_makes_the_total_unknown():
    ledger = build_ledger(chain([read(0, 0), read(1, 20), read(2)], ["load", "shard"]))
    assert not ledger.complete
    assert ledger.summary()["total_mj"] is None
    assert ledger.summary()["measured_mj"]["load"] == 20


def test_one_missing_domain_makes_the_sum_missing():
    reads = [read(0, 0, **{"cpu:0": 5}), read(1, 10), read(2, 20, **{"cpu:0": 9})]
    ledger = build_ledger(chain(reads, ["shard", "idle"]))
    assert ledger.entries[0].energy_mj == {GPU: 10, "cpu:0": None}
    assert ledger.entries[0].total_mj is None
    assert totals(ledger) == {GPU: 20, "cpu:0": 4}


# --- a worker's own device belongs to the measurement -----------------------------------------------------------------


def cpu_read(t, mj, **more):
    return read(t, **{"cpu:0": mj}, **more)


SILENT = chain([cpu_read(0, 0), cpu_read(5, 40), cpu_read(20, 90)], ["load", "shard"])


@pytest.mark.parametrize(
    ("devices", "missing"),
    [
        (("GPU-1",), ("gpu:GPU-1",)),  # the only board has no counter
        (("MIG-1",), ("gpu:MIG-1",)),
        (("GPU-1", "GPU-2"), ("gpu:GPU-1", "gpu:GPU-2")),
    ],
)
def test_processors_do_not_stand_in_for_a_board_without_counter(devices, missing):
    ledger = build_ledger(SILENT, devices={"w1": devices})
    summary = ledger.summary()
    assert [e.energy_mj for e in ledger.entries] == [
        {"cpu:0": mj} | dict.fromkeys(missing) for mj in (40, 50)
    ]
    assert [e.total_mj for e in ledger.entries] == [None, None]
    assert shard_mj(ledger, 1, "a1") is None
    assert not ledger.complete
    assert [summary[f"{what}_mj"] for what in ("total", "shard", "overhead")] == [None] * 3
    assert (summary["domains"], summary["segments_not_measured"]) == (["cpu:0"], 2)
    assert summary["measured_mj"] == {"load": 40, "shard": 50}  # what was read stays visible
    assert +totals(ledger) == growth(ledger) == {"cpu:0": 90}
    assert ledger.unread == {"w1": missing}
    assert ledger.read_domains("w1") == ("cpu:0",)


def test_one_dead_board_of_two_makes_the_total_missing():
    ledger = build_ledger(chain([read(0, 0), read(10, 100)], ["shard"]), devices={"w1": ("GPU-1", "GPU-2")})
    assert ledger.entries[0].energy_mj == {GPU: 100, "gpu:GPU-2": None}
    assert (ledger.entries[0].total_mj, ledger.complete) == (None, False)


def test_memory_does_not_stand_in_for_a_processor_and_any_package_is_one():
    def complete(domain):
        segments = chain([read(0, **{domain: 0}), read(1, **{domain: 9})], ["shard"])
        return build_ledger(segments, devices={"w1": ("cpu",)}).complete

    assert complete("cpu:package-0")
    assert not complete("dram:package-0")


def test_a_board_that_another_worker_reads_is_not_lost_but_its_share_is_nobodys():
    """As for any failed read: the energy is there, in a gap, and who used it is not known."""
    silent = chain([cpu_read(0, 0), cpu_read(10, 20)], ["shard"], "w2", shard=2)
    seeing = segment(read(0, 0, **{"cpu:0": 0}), read(10, 100, **{"cpu:0": 20}))
    ledger = build_ledger([seeing, *silent], devices=dict.fromkeys(["w1", "w2"], ("GPU-1",)))
    assert {e.segment.worker_id: e.total_mj for e in ledger.entries} == {"w1": 60, "w2": None}
    assert [(g.domain, g.energy_mj) for g in ledger.gaps] == [(GPU, 50)]
    assert (ledger.complete, ledger.summary()["total_mj"], ledger.summary()["shard_mj"]) == (True, 120, None)


def test_a_worker_of_which_nothing_is_known_answers_for_what_it_read():
    assert build_ledger(SILENT, devices={"w2": ("GPU-1",)}) == build_ledger(SILENT)
    assert build_ledger(SILENT).complete


# --- resets (Zeus: negative; Aitra: clamped to 0; CodeCarbon: lifetime counter) ---------------------------------------


def test_a_counter_reset_is_a_hole_and_never_a_number():
    before = chain([read(0, 1000), read(1, 1010)], ["load"])
    across = segment(read(1, 1010), read(2, 5, epoch=1))
    after = chain([read(2, 5, epoch=1), read(3, 25, epoch=1)], ["idle"])
    ledger = build_ledger([*before, across, *after])
    assert [e.total_mj for e in ledger.entries] == [10, None, 20]
    assert not ledger.complete
    assert ledger.summary()["total_mj"] is None
    assert ledger.summary()["counter_resets"] == 1
    assert totals(ledger) == growth(ledger) == {GPU: 30}


def test_a_reset_that_only_the_merged_reads_show_is_found():
    ledger = build_ledger(
        [
            *chain([read(0, 1000), read(2, 2000)], ["load"], "w1"),
            *chain([read(3, 10), read(4, 30)], ["load"], "w2"),  # a new process: epoch 0 again
        ]
    )
    assert totals(ledger) == growth(ledger) == {GPU: 1020}
    assert ledger.gaps == ()


def test_a_lifetime_counter_is_not_a_difference():
    ledger = build_ledger(chain([read(0, 1), read(1, 10**12), read(2, 10**12 + 5)], ["shard", "idle"]))
    assert [e.total_mj for e in ledger.entries] == [None, 5]


# --- several workers on one counter (CodeCarbon 544, 936, 1390: N ranks count the node N times) -----------------------


def test_two_workers_that_overlap_share_what_was_used_meanwhile():
    ledger = build_ledger(
        [
            segment(read(0, 0), read(10, 100), worker="w1"),
            segment(read(5, 40), read(15, 161), worker="w2", shard=2, attempt="a2"),
        ]
    )
    assert [e.total_mj for e in ledger.entries] == [40 + 30, 30 + 61]
    assert ledger.summary()["total_mj"] == 161


def test_a_node_is_counted_once_whatever_the_number_of_workers():
    workers = [segment(read(0, 0), read(10, 1001), worker=f"w{i}", shard=i, attempt="a") for i in range(8)]
    assert [e.total_mj for e in build_ledger(workers).entries] == [126] + [125] * 7


def test_a_pause_between_workers_is_a_gap_and_a_night_is_off():
    night = MAX_GAP_NS / SECOND + 1
    ledger = build_ledger(
        [
            *chain([read(0, 0), read(1, 10)], ["load"], "w1"),
            *chain([read(5, 50), read(6, 60)], ["load"], "w2"),
            *chain([read(6 + night, 9060), read(7 + night, 9070)], ["load"], "w3"),
        ]
    )
    assert [(g.segment_class, g.energy_mj) for g in ledger.gaps] == [("gap", 40), ("off", 9000)]
    summary = ledger.summary()
    assert summary["total_mj"] == 70
    assert sum(summary["measured_mj"].values()) == 9070


def test_another_boot_is_another_clock():
    ledger = build_ledger(
        [
            segment(read(100, 500), read(101, 600), worker="w1"),
            segment(read(100, 7, boot="next"), read(101, 8, boot="next"), worker="w2", shard=2, attempt="a2"),
        ]
    )
    assert sorted(e.total_mj for e in ledger.entries) == [1, 100]


def test_the_share_of_a_worker_that_cannot_read_is_nobody_elses():
    blind = chain([read(0, 0), read(4), read(10, 100)], ["shard", "idle"], "w2", shard=2)
    seeing = segment(read(0, 0), read(10, 100), worker="w1")
    ledger = build_ledger([seeing, *blind])
    assert {e.segment.worker_id: e.total_mj for e in ledger.entries} == {"w1": 50, "w2": None}
    assert sum(g.energy_mj for g in ledger.gaps) == 50


# --- closure under everything at once ---------------------------------------------------------------------------------


@st.composite
def worlds(draw):
    """Workers that share hosts and counters, whose reads fail, and whose counters are reset, with what is true."""
    segments = []
    for boot in ["b1", "b2"][: draw(st.integers(1, 2))]:
        domains = draw(st.sampled_from([["gpu:A"], ["cpu:0"], ["cpu:0", "gpu:A"]]))
        steps = draw(st.lists(st.tuples(*[st.integers(0, 3000)] * len(domains)), min_size=2, max_size=14))
        reset_at = draw(st.none() | st.integers(1, len(steps) - 1))
        epochs_known = draw(st.booleans())  # whether the meter noticed the reset
        counters, epoch, world = dict.fromkeys(domains, 10_000), 0, []
        for i, step in enumerate(steps):
            counters = {d: v + s for (d, v), s in zip(counters.items(), step, strict=True)}
            if i == reset_at:
                counters, epoch = {d: 1 + s for d, s in zip(domains, step, strict=True)}, int(epochs_known)
            world.append((dict(counters), epoch))
        for w in range(draw(st.integers(1, 3))):
            at = sorted(draw(st.sets(st.integers(0, len(steps) - 1), min_size=2)))
            reads = []
            for i in at:
                seen = {d: v for d, v in world[i][0].items() if draw(st.integers(0, 5))}
                reads.append(CounterRead(boot, i * SECOND, i * SECOND, 0, seen, 3 * i, world[i][1]))
            kinds = draw(
                st.lists(
                    st.sampled_from(["load", "warmup", "idle", "shard", "loser", "retry"]),
                    min_size=len(at) - 1,
                    max_size=len(at) - 1,
                )
            )
            for n, s in enumerate(chain(reads, kinds, f"{boot}-{w}", shard=100 * w + len(segments))):
                segments.append(replace(s, attempt_id=s.attempt_id and f"{boot}-{w}-{n}"))
    twice = draw(st.lists(st.sampled_from(segments), max_size=4))
    return draw(st.permutations(segments + twice))


@pytest.mark.long
@settings(max_examples=100, deadline=None)
@given(worlds())
def test_c1_segments_and_gaps_are_the_counters_growth(segments):
    ledger = build_ledger(segments)
    held, grown = Counter(), Counter()
    for run in ledger.runs:
        grown[run.boot_id, run.epoch, run.domain] += run.energy_mj
    for entry in ledger.entries:
        for domain, mj in entry.energy_mj.items():
            held[entry.segment.open.boot_id, entry.segment.open.epoch, domain] += mj or 0
    for gap in ledger.gaps:
        held[gap.boot_id, gap.epoch, gap.domain] += gap.energy_mj
        assert gap.energy_mj > 0
    assert +held == +grown
    # the runs themselves are the counters' first and last readings wherever no reset lies between
    readings = {}
    for s in segments:
        for r in (s.open, s.close):
            for domain, mj in r.energy_mj.items():
                readings.setdefault((r.boot_id, r.epoch, domain), set()).add((r.t_mono_ns, mj))
    for key, values in readings.items():
        ordered = [mj for _, mj in sorted(values)]
        if ordered == sorted(ordered):
            assert grown[key] == ordered[-1] - ordered[0]


@pytest.mark.long
@settings(max_examples=75, deadline=None)
@given(worlds(), st.sampled_from([("Z",), ("A", "Z")]))
def test_a_device_that_was_not_read_changes_totals_and_nothing_that_was(segments, held):
    plain = build_ledger(segments)
    ledger = build_ledger(segments, devices={s.worker_id: held for s in segments})
    assert not ledger.complete
    assert ledger.summary()["total_mj"] is None
    assert {e.total_mj for e in ledger.entries} == {None}
    assert ledger.runs == plain.runs
    assert +totals(ledger) == +totals(plain) == +growth(plain)
    if held == ("Z",):  # of A, which others may have read, the share of who did not read it goes into gaps
        assert ledger.gaps == plain.gaps
        for before, after in zip(plain.entries, ledger.entries, strict=True):
            assert before.energy_mj.items() <= after.energy_mj.items()


@pytest.mark.long
@settings(max_examples=75, deadline=None)
@given(worlds())
def test_a_lone_worker_gets_its_own_differences(segments):
    for worker in {s.worker_id for s in segments}:
        for entry in build_ledger(s for s in segments if s.worker_id == worker).entries:
            before, after = entry.segment.open, entry.segment.close
            for domain, mj in entry.energy_mj.items():
                if mj is not None:
                    assert mj == after.energy_mj[domain] - before.energy_mj[domain]


@pytest.mark.long
@settings(max_examples=75, deadline=None)
@given(worlds())
def test_the_order_of_reports_does_not_matter(segments):
    assert build_ledger(segments) == build_ledger(reversed(segments))


@pytest.mark.long
@settings(max_examples=75, deadline=None)
@given(worlds(), st.integers(1, 7))
def test_c2_images_and_overhead_are_everything(segments, n_images):
    ledger = build_ledger(segments)
    summary = ledger.summary()
    assert sum(summary["measured_mj"].values()) == totals(ledger).total()
    shards = {(s.shard_id, s.attempt_id) for s in segments if s.segment_class == "shard"}
    direct = [shard_mj(ledger, *s) for s in shards]
    if summary["overhead_mj"] is not None:
        images = sum(sum(image_energy(mj, n_images)) for mj in direct)
        off = summary["measured_mj"].get("off", 0)
        assert images + summary["overhead_mj"] + off == totals(ledger).total()
    assert (summary["shard_mj"] is None) == (not direct or None in direct)


def test_a_commit_read_back_from_json_gives_the_same_ledger():
    segments = chain([read(0, 0, estimate=1), read(1, 5, estimate=2)], ["shard"])
    stored = Commit.from_json(json.dumps(json.loads(commit(1, "a1", 1, segments).to_json())).encode())
    assert build_ledger(stored.segments) == build_ledger(segments)
