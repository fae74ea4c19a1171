"""The running sum that caps look at: each counter's growth once, in whatever order segments arrive."""

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millijoule.pipeline.energy.carbon import Rate
from millijoule.pipeline.energy.counter_split import MAX_GAP_NS
from millijoule.pipeline.running.spending import Caps, Spending, parse_deadline
from millijoule.workers.errors import InputError
from millijoule.workers.schemas import CounterRead, Segment

SECOND = 1_000_000_000
MJ_PER_KWH = 3_600_000_000


def read(
    t_s: float, mj: int | None, *, boot: str = "b", epoch: int = 0, estimate: int | None = None
) -> CounterRead:
    t = round(t_s * SECOND)
    return CounterRead(boot, t, t, 0, {} if mj is None else {"gpu:0": mj}, estimate, epoch)


def segment(worker: str, a: CounterRead, b: CounterRead) -> Segment:
    return Segment(worker, "shard", a, b)


@given(
    cuts=st.lists(
        st.lists(st.integers(0, 1000), min_size=2, max_size=8, unique=True), min_size=1, max_size=4
    ),
    watts=st.integers(1, 700),
    seed=st.integers(0, 2**32),
)
def test_workers_that_share_a_counter_are_counted_once(cuts, watts, seed):
    """Every worker cuts the same counter into its own segments; arrival is shuffled. The sum is the counter's growth
    from the first read to the last."""
    segments = [
        segment(f"w{n}", read(a, 7 + a * watts * 1000), read(b, 7 + b * watts * 1000))
        for n, times in enumerate(map(sorted, cuts))
        for a, b in itertools.pairwise(times)
    ]
    random.Random(seed).shuffle(segments)
    spending = Spending()
    for s in segments:
        spending.add([s])
    first, last = min(min(c) for c in cuts), max(max(c) for c in cuts)
    assert spending.measured_mj == (last - first) * watts * 1000
    busy = {t for c in cuts for t in range(min(c), max(c))}  # seconds in which some worker had a segment
    assert spending.unclaimed_mj == (last - first - len(busy)) * watts * 1000
    assert spending.seconds["shard"] == sum(max(c) - min(c) for c in cuts)
    assert spending.basis == "measured"


def test_epochs_boots_and_runs_are_apart():
    spending = Spending()
    later = 60 + MAX_GAP_NS / SECOND + 1
    spending.add(
        [
            segment("a", read(0, 100), read(10, 300)),
            segment("a", read(20, 5, epoch=1), read(30, 45, epoch=1)),  # the counter was reset
            segment("a", read(10, 300), read(20, 5, epoch=1)),  # over the reset: not comparable
            segment("b", read(0, 1000, boot="other"), read(9, 1007, boot="other")),
            segment(
                "c", read(later, 9000), read(later + 1, 9001)
            ),  # a later run: not what others used in between
        ]
    )
    assert spending.measured_mj == 200 + 40 + 7 + 1


def test_workers_without_a_counter_count_by_their_estimate_and_that_is_said():
    spending = Spending(Caps(max_kwh=1e-6))
    assert spending.reached(0) is None
    spending.add([segment("a", read(0, None, estimate=10), read(1, None, estimate=3610))])
    assert (spending.measured_mj, spending.estimated_mj, spending.basis) == (0, 3600, "estimated")
    assert spending.reached(0) == "--max-kwh 1e-06 (1e-06 kWh used, estimated)"
    spending.add([segment("b", read(0, 5), read(1, 6))])
    assert spending.basis == "partly estimated"


@pytest.mark.parametrize("order", itertools.permutations(range(4)))
def test_what_arrives_in_last_words_and_in_the_commit_of_whoever_went_on_counts_once(order):
    """A worker without a counter that leaves: what it sealed as a part is carried twice."""
    reads = [read(t, None, estimate=10 + 100 * t) for t in (0, 5, 9, 12)]
    arrivals = [[segment("a", *pair)] for pair in itertools.pairwise(reads)]
    arrivals.append([segment("a", reads[0], reads[1]), segment("a", reads[1], reads[2])])
    spending = Spending(Caps(price=Rate("", (3_600.0,))))
    for n in order:
        spending.add(arrivals[n])
    assert (spending.estimated_mj, spending.seconds["shard"]) == (1200, 12.0)
    assert spending.cost == pytest.approx(1200 / MJ_PER_KWH * 3600)


def test_each_cap_is_reached_by_its_own_sum():
    def spent(**caps) -> Spending:
        spending = Spending(Caps(**caps))
        spending.add([segment("a", read(0, 0), read(3600, MJ_PER_KWH))])
        return spending

    assert spent(max_kwh=1.01).reached(0) is None
    assert spent(max_kwh=1.0, pue=1.0).reached(0) == "--max-kwh 1 (1 kWh used, measured)"
    assert spent(max_kwh=1.01, pue=1.5).reached(0) is None  # counters as they read
    assert spent(max_cost=0.46, price=Rate("", (0.3,)), pue=1.5).reached(0) is None
    over = spent(max_cost=0.449, price=Rate("", (0.3,)), pue=1.5)
    assert over.reached(0) == "--max-cost 0.449 (0.45 used, measured)"
    over = spent(max_gco2=400, carbon=Rate("", (400.0,)))
    assert over.reached(0) == "--max-gco2 400 (400 gCO2e used, measured)"
    assert spent(deadline_unix=100.0).reached(99.9) is None
    assert "deadline" in spent(deadline_unix=100.0).reached(100.0)
    assert spent(max_kwh=1.2).reached(0, share_at_work=0.1) is None
    assert spent(max_kwh=1.2).reached(0, share_at_work=0.25) == (
        "--max-kwh 1.2 (1 kWh used, measured; what is at work is expected to use the rest)"
    )
    assert "at work" not in spent(max_kwh=0.5).reached(0)
    assert "--deadline (1970-01-0" in spent(deadline_unix=100.0).reached(100.0)


def test_a_cap_of_nothing_is_reached_at_once_and_says_so_in_numbers():
    spending = Spending(Caps(max_kwh=0.0, max_cost=0.0, max_gco2=0.0, price=Rate("", (0.3,))))
    assert spending.reached(0) == "--max-kwh 0 (nothing used yet)"
    assert set(spending.used_shares().values()) == {1.0}
    spending.add([segment("a", read(0, 0), read(3600, MJ_PER_KWH))])
    assert spending.reached(0, share_at_work=0.5) == "--max-kwh 0 (1 kWh used, measured)"
    assert set(spending.used_shares().values()) == {1.0}


def test_prices_are_those_of_the_time():
    spending = Spending(Caps(price=Rate("a table", (0.1, 0.5), (0.0, 1800.0), 1800.0)))
    half = MJ_PER_KWH // 2
    spending.add(
        [segment("a", read(0, 0), read(1799, half)), segment("a", read(1799, half), read(3600, 2 * half))]
    )
    assert spending.cost == pytest.approx(0.5 * 0.1 + 0.5 * 0.5)


def test_deadlines_are_durations_or_times_with_a_zone():
    assert parse_deadline("90m", 1000.0) == 1000 + 5400
    assert parse_deadline("1.5h", 0) == 5400
    assert parse_deadline("1970-01-01T01:00:00+01:00", 5.0) == 0
    for bad in ("2026-03-01T18:00", "soon", "5", "-3h"):
        with pytest.raises(InputError, match="--deadline"):
            parse_deadline(bad, 0)
