"""The report on a terminal: what the page says, within 80 columns, and nothing in a job's texts that a terminal obeys."""

import io
from dataclasses import replace

import pytest
from rich.console import Console
from support.report_outputs import GPUS, HOSTILE, measured_output, unmeasured_output

from millijoule.pipeline.energy.carbon import Rates
from millijoule.pipeline.report import cells, words
from millijoule.pipeline.report.data import MAX_CLOSURE_ROWS, Report, collect_report, some_of_each_check
from millijoule.pipeline.report.devices import Straggler
from millijoule.pipeline.report.terminal import MAX_PROMPTS, MAX_ROWS, print_report
from millijoule.workers.visible_text import visible

PROMPTS = [*HOSTILE, *(f"prompt {i}" for i in range(12))]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """With two stragglers, whatever else this machine had to do."""
    report = collect_report([measured_output(tmp_path_factory.mktemp("measured"), PROMPTS)], Rates())
    slow = tuple(Straggler(n, f"w{n}", "host-b", GPUS[2], 4, 0.5, 3.0 / n) for n in (1, 2))
    return changed(report, speed=replace(report.jobs[0].speed, stragglers=2, slowest=slow))


@pytest.fixture(scope="module")
def unmeasured(tmp_path_factory):
    return collect_report([unmeasured_output(tmp_path_factory.mktemp("unmeasured"), PROMPTS)], Rates())


def printed(report, width=80):
    """What a terminal gets that takes control codes but has no colours."""
    out = io.StringIO()
    print_report(report, Console(file=out, width=width, force_terminal=True, color_system=None))
    return out.getvalue()


def rows(text, *beginnings):
    """The cells of the lines that begin with these."""
    lines = [line.split("  ") for line in text.splitlines() if line.lstrip().startswith(beginnings)]
    return [[cell.strip() for cell in line if cell.strip()] for line in lines]


def changed(report, **changes):
    """`report` with changes to its one job."""
    return Report((replace(report.jobs[0], **changes),))


def test_eighty_columns_are_enough(measured, unmeasured):
    text = printed(Report(measured.jobs + unmeasured.jobs))
    assert max(map(len, text.splitlines())) <= 80
    for torn in ("measure\n", "device\ns", "applicabl\n"):
        assert torn not in text.replace(" ", "")


def test_pools_have_both_classes_in_eighty_columns_and_no_figure_is_torn(measured):
    figures = {
        "workers": 1_000,
        "shards": 123_456,
        "shards_made": 100.0,
        "images_ok": 98_765_432,
        "shard_s": 9_999.0,
    }
    gpu = {**figures, "shard_mj": 12_345_678, "shard_estimate_mj": 23_456_789, "device_cost": 1.234}
    pools = {
        "gpu": gpu,
        "c" * 40: {**figures, "shard_mj": None, "shard_estimate_mj": 7 * 10**9, "device_cost": None},
    }
    report = changed(measured, pools=pools)
    text = printed(report)
    assert max(map(len, text.splitlines())) <= 80
    assert [row[1:] for row in rows(text, "gpu  ")] == [
        ["1,000", "123,456", "98,765,432", *cells.pool_cells(report.jobs[0])[0][4:6]],
        list(cells.pool_cells(report.jobs[0])[0][6:]),
    ]
    assert "not measured" in text
    for head in ("direct per image", "estimate direct", "estimate per shard", "device cost per shard"):
        assert all(word in text for word in head.split())


def test_nodes_kinds_and_devices_have_their_rows(measured):
    job = measured.jobs[0]
    found = {row[0]: row[1:] for row in rows(printed(measured, 120), "host-", "GPU, ")}
    for row in job.nodes:
        assert found[f"{row.host}, {row.device}"] == [
            str(row.images),
            words.count(row.images_per_worker_second),
            words.share(row.time_shares["idle"]),
            words.energy(row.direct_mj_per_image),
            words.energy(row.full_mj_per_image),
        ]
    assert found["GPU, model not recorded, 3 devices, 2 nodes"][0] == str(job.images_ok)
    assert {f"host-a, {words.short_device(gpu)}" for gpu in GPUS[:2]} <= found.keys()


def test_what_was_not_measured_has_its_estimate_by_name(measured, unmeasured):
    (row,) = unmeasured.jobs[0].nodes
    (shown,) = rows(printed(unmeasured, 120), "host, 1 device")
    assert shown[4:] == [
        words.energy(row.direct_estimate_mj_per_image),
        words.energy(row.full_estimate_mj_per_image),
    ]
    assert printed(unmeasured, 120).count("estimate, ") == 3  # two heads, and what E0 means
    assert "estimate," not in printed(measured, 120)
    first, *others = measured.jobs[0].devices
    partly = changed(measured, devices=(replace(first, direct_mj_per_image=None), *others))
    (shown,) = rows(printed(partly, 120), "host-a, 11111111")  # "measured" is on the next line
    assert shown[4:] == ["not", words.energy(first.full_mj_per_image)]


def test_throughput_and_stragglers(measured, unmeasured):
    job = measured.jobs[0]
    for report in (measured, unmeasured):
        assert cells.speed(report.jobs[0].speed)[0] in printed(report, 400)
    assert [r for r in rows(printed(measured, 120), "host-b") if r[0] == "host-b"] == [
        ["host-b", "33333333", "w1", "1", "4", "500 ms", "3.00 x"],
        ["host-b", "33333333", "w2", "2", "4", "500 ms", "1.50 x"],
    ]
    even = changed(measured, speed=replace(job.speed, stragglers=0, slowest=()))
    assert "No stragglers" in printed(even)


def test_every_closure_check_is_listed_with_its_residual(measured):
    text = printed(measured, 120)
    assert "closure: 12 checks, 0 failed" in text
    listed = rows(text, "C1", "C2", "C3", "C4", "C5", "C6")
    assert len(listed) == 12
    for row in measured.jobs[0].closure.rows:
        line = [
            *(row["check"], row["scope"]),
            *(words.energy(row["expected_mj"], "-"), words.energy(row["found_mj"], "-")),
            words.residual(row["residual_mj"], row["residual_share"], row["residual_ns"]),
            cells.VERDICTS[row["passed"]],
        ]
        assert line in listed
    assert "no node meter was read" in text  # why C3 does not apply


def test_a_failed_check_is_first_and_says_what_it_found(measured):
    closure = measured.jobs[0].closure
    bad = closure.rows[-1] | {
        "check": "C1",
        "scope": "gpu:GPU-9",
        "expected_mj": 1000,
        "found_mj": 990,
        "residual_mj": -10,
        "residual_share": -0.01,
        "residual_ns": None,
        "passed": False,
        "note": "it was edited",
    }
    edited = replace(closure, rows=(bad, *closure.rows), checks=13, failed=1)
    text = printed(changed(measured, closure=edited), 120)
    assert "closure: 13 checks, 1 failed" in text
    assert rows(text, "C1")[0] == ["C1", "gpu:GPU-9", "1 J", "990 mJ", "-10 mJ, -1 %", "FAILED"]
    assert "it was edited" in text


def test_many_devices_hide_no_check(measured):
    closure = measured.jobs[0].closure
    first = closure.rows[0]
    many = (*(first | {"scope": f"gpu:{i}"} for i in range(500)), *closure.rows[1:])
    kept = some_of_each_check(many, MAX_CLOSURE_ROWS)
    assert len(kept) == MAX_CLOSURE_ROWS
    assert {r["check"] for r in kept} == {"C1", "C2", "C3", "C4", "C5", "C6"}
    assert kept == [r for r in many if r in kept]  # in their order
    crowded = replace(closure, rows=tuple(kept), checks=len(many))
    text = printed(changed(measured, closure=crowded), 120)
    listed = rows(text, "C1", "C2", "C3", "C4", "C5", "C6")
    assert {row[0] for row in listed} == {"C1", "C2", "C3", "C4", "C5", "C6"}
    assert f"... {len(many) - len(listed)} more" in text


def test_no_closure_is_said(measured):
    unknown = replace(measured.jobs[0].closure, rows=None)
    assert "closure: not recorded" in printed(changed(measured, closure=unknown))


def test_long_tables_say_what_they_leave_out(measured):
    job = measured.jobs[0]
    text = printed(changed(measured, nodes=job.nodes[:1] * 20, nodes_not_shown=3), 120)
    assert len(rows(text, "host-a, 2 devices")) == MAX_ROWS
    assert f"... {23 - MAX_ROWS} more" in text


def test_uuids_are_short_where_columns_are_narrow():
    gpu, boot = "GPU-1a2b3c4d-0000-1111-2222-333344445555", "5e6f7a8b-0000-1111-2222-333344445555"
    assert words.short_scope(f"gpu:{gpu} boot {boot} epoch 0") == "gpu:1a2b3c4d boot 5e6f7a8b epoch 0"
    assert words.short_scope("job, direct") == "job, direct"


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_first_prompts_are_shown_once_each_as_they_are_written(measured):
    job = measured.jobs[0]
    text = printed(measured, 200)
    for prompt in HOSTILE[:4]:
        assert prompt in text
    assert "prompt 1" not in text.partition("first prompts")[2]  # five are enough
    twice = tuple(s for s in job.samples for _ in range(2))
    again = printed(changed(measured, samples=twice), 200)
    assert again.count(HOSTILE[2]) == 1
    assert len(rows(again, *HOSTILE[:4])) == MAX_PROMPTS - 1
    assert "first prompts" not in printed(changed(measured, samples=()))


@pytest.mark.parametrize(
    "prompt",
    [
        "\x1b[2J\x1b]0;owned\x07\x1b]8;;http://evil\x1b\\click",
        "\x9b2J\x90q\x9c",  # the same codes in one byte
        "a\rb\bc\nd\x00e\x7ff",
        "\u202eright to left\u202c\u2066\u200b",
        "\u061c\u200e\u200f\u202a\u202b\u202d\u2067\u2068\u2069\u2028\u2029\ufeff\u00ad\U000e0041 tags",
        "[bold red]x[/bold red] [link=http://evil]y[/link] [/nothing] [@click=f()]z :warning:",
        "\ud800",
    ],
)
def test_a_prompt_is_never_obeyed(measured, prompt):
    job = measured.jobs[0]
    sample = replace(job.samples[0], prompt=prompt, prompt_id=prompt)
    straggler = replace(job.speed.slowest[0], worker=prompt, host=prompt, device=prompt)
    row = replace(job.nodes[0], host=prompt, device=prompt, model=prompt)
    closure = replace(
        job.closure,
        rows=tuple(r | {"check": prompt, "scope": prompt, "note": prompt} for r in job.closure.rows),
    )
    everywhere = changed(
        measured,
        samples=(sample,),
        speed=replace(job.speed, slowest=(straggler,)),
        nodes=(row,),
        models=(row,),
        devices=(row,),
        closure=closure,
    )
    text = printed(everywhere, 400)
    assert {c for c in text if not c.isprintable()} == {"\n"}
    assert text.count(visible(prompt)) >= 6 + len(job.closure.rows)
    if prompt.startswith("["):
        assert prompt in text.partition("first prompts")[2]


def test_a_long_prompt_is_cut(measured):
    sample = replace(measured.jobs[0].samples[0], prompt="cat " * 100)
    assert printed(changed(measured, samples=(sample,))).count("cat") == 40
