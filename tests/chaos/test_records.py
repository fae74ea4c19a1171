"""What the record of storms says of its runs, and what it does not say."""

import json

import pytest
from support.chaos import costs, ray_faults, record
from support.chaos.faults import AFTER, KINDS, PARTS


def run(part, seed, faults, **more):
    base = {
        "part": part,
        "commit": "c",
        "run": seed,
        "faults": faults,
        "outcome": "certified",
        "processes": 3,
    }
    return base | {"seconds": 2.0, "done_s": 1.0, "spent_mj": 1000, "problems": []} | more


@pytest.fixture
def results(tmp_path):
    return record.Results(tmp_path, {"commit": "c"})


def test_faults_are_counted_by_kind_over_all_parts_and_a_bad_run_survives_none(results):
    results.all += [
        run("storms", 0, ["worker killed", "node lost"]),
        run("storms", 7, []),
        run("storms", 1, ["worker killed"], problems=["an image is lost"]),
        run("costs", 0, ["worker killed"], kind="worker killed", came=1, seconds_lost=1.0, joules_lost=2.0),
        run("ray", 5, ["worker killed", "head killed"], store="S", calm_done_s=0.5, calm_spent_mj=0),
        run("pixels", 0, ["x"], oracle_says_other_pixels=4, product_says=[], codes=[0]),
    ]
    whole = record.record(results)
    assert whole["kinds"]["worker killed"] | {"cost": 0} == {
        "injected": 4,
        "survived": 3,
        "of_these_on_ray": 1,
        "cost": 0,
    }
    assert whole["kinds"]["head killed"]["of_these_on_ray"] == 1
    assert (whole["faults_injected"], whole["faults_survived"], whole["runs"]) == (6, 5, 5)
    assert whole["problems"] == [{"part": "storms", "run": 1, "problems": ["an image is lost"]}]
    assert whole["seeds"] == {"storms": "0-1, 7", "ray": "5"}
    assert whole["parts"]["ray"]["seconds_lost_per_fault"] == 0.25
    assert whole["not_seen"]["device draws other pixels"]["images_with_other_pixels"] == 4
    assert "head killed" in record.table(whole)


def test_a_cost_of_fewer_than_five_pairs_is_rough_and_damage_after_the_job_has_none(results):
    def cost():
        return dict(costs.summary(results.of("costs")))

    pair = {"kind": "node lost", "came": 1, "joules_lost": 2.0}
    results.all.append(run("costs", 0, ["node lost"], seconds_lost=1.0, **pair))
    assert cost()["node lost"] == "not told: 1 of 5 pairs"
    for seconds in (2.0, 3.0, 4.0):
        results.all.append(run("costs", 0, ["node lost"], seconds_lost=seconds, **pair))
    assert cost()["node lost"]["rough"]
    results.all.append(run("costs", 0, ["node lost"], seconds_lost=5.0, **pair, outcome="missing"))
    found = cost()["node lost"]
    assert "rough" not in found
    assert (found["seconds_lost"], found["seconds_lost_error"], found["energy_missing"]) == (3.0, 0.71, 1)
    assert {cost()[kind] for kind in AFTER} == {"after the job: none by construction"}


def test_the_kind_that_has_come_least_is_next_and_one_that_never_comes_does_not_hold_up_the_others():
    last = costs.KINDS_WITH_COST[-1]
    done = [{"kind": k, "came": 1} for k in costs.KINDS_WITH_COST if k != last]
    assert costs.next_kind(done, 1) == (last, 0)
    assert costs.next_kind([*done, *[{"kind": last, "came": 0}] * 2], 1) == (last, 2)
    assert costs.next_kind([*done, *[{"kind": last, "came": 0}] * 3], 1) is None


@pytest.mark.parametrize("kind", costs.KINDS_WITH_COST)
def test_two_runs_of_a_pair_differ_in_one_fault(kind):
    without, disturbed = costs.pair(kind, 3)
    assert without.plan == disturbed.plan
    assert [r.end is None for r in disturbed.rounds][-1]
    there = [(f.kind, f.at_s) for r in disturbed.rounds for f in r.faults]
    before = [(f.kind, f.at_s) for r in without.rounds for f in r.faults]
    more = [kind for kind, _ in there if (kind, _) not in before]
    more += [k for r in disturbed.rounds for k in r.before]
    more += [r.end[0] for r in disturbed.rounds if r.end and all(r.end != w.end for w in without.rounds)]
    assert more == [kind]
    assert without.plan.part_s > 0 or kind not in PARTS


def test_a_seed_is_always_the_same_storm_on_ray_and_all_kinds_come():
    assert ray_faults.storm(3) == ray_faults.storm(3)
    assert set(ray_faults.storm(3).kinds) == set(ray_faults.KINDS)
    assert not set(ray_faults.storm(3, store_may_end=False).kinds) & set(ray_faults.ENDS_THE_STORE)
    alone = {ray_faults.storm(seed).kinds[0] for seed in range(2, 3 * len(ray_faults.KINDS), 3)}
    assert alone == set(ray_faults.KINDS)
    assert len(set(ray_faults.KINDS) & set(KINDS)) >= 20


def test_what_was_recorded_is_there_when_the_next_call_begins(tmp_path, results):
    results.add("storms", {"run": 4, "seconds": 1.5, "hashes": {"a": "b"}})
    again = record.Results(tmp_path, {"commit": "d"})
    assert record.next_seed(again, "storms", 4) == 5
    assert again.seconds("storms") == 1.5
    assert "hashes" not in json.loads((tmp_path / "results.jsonl").read_text())
