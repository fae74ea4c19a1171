"""The page as text: self-contained, escaped, honest about what is missing. What a browser does with it: integration."""

import base64
import hashlib
import html
import io
import re
from dataclasses import replace

import pytest
from rich.console import Console
from support.report_outputs import HOSTILE, measured_output, unmeasured_output

from millijoule.pipeline.energy.carbon import Rates
from millijoule.pipeline.report import words
from millijoule.pipeline.report.charts import CLASS_COLOURS, LABEL_CHARS, job_charts, unique_labels
from millijoule.pipeline.report.data import Report, collect_report
from millijoule.pipeline.report.energy import GROUPS
from millijoule.pipeline.report.flags import Flag
from millijoule.pipeline.report.node_meters import NodeMeterRow
from millijoule.pipeline.report.page import render_page
from millijoule.pipeline.report.terminal import print_report
from millijoule.workers.schemas import SEGMENT_CLASSES

PROMPTS = [*HOSTILE[:4], *(f"prompt {i}" for i in range(12))]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    return collect_report([measured_output(tmp_path_factory.mktemp("measured"), PROMPTS)], Rates(pue=1.2))


@pytest.fixture(scope="module")
def unmeasured(tmp_path_factory):
    return collect_report([unmeasured_output(tmp_path_factory.mktemp("unmeasured"), PROMPTS)], Rates())


def scripts(page):
    """(attributes, content) of every script element, as a browser finds them."""
    return re.findall(r"<script\b([^>]*)>(.*?)</script", page, re.DOTALL | re.IGNORECASE)


#: Every control of direction, a separator of lines and a blank without width.
TURNING = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u2028\u200b"


def hostile(report):
    """`report` with markup and terminal codes in every text that comes from outside."""
    evil = HOSTILE[0] + HOSTILE[2] + "\x1b[2J" + TURNING
    (job,) = report.jobs
    device = replace(job.devices[0], host=evil, device=evil, model=evil)
    timeline = replace(
        job.timeline,
        power=tuple(replace(p, host=evil, device=evil) for p in job.timeline.power),
        work=tuple(replace(w, worker=evil, host=evil, device=evil) for w in job.timeline.work),
    )
    slow = replace(
        job.speed, slowest=tuple(replace(s, worker=evil, host=evil, device=evil) for s in job.speed.slowest)
    )
    closure = (
        None
        if job.closure.rows is None
        else tuple(r | {"scope": evil, "note": evil} for r in job.closure.rows)
    )
    return Report(
        (
            replace(
                job,
                output=evil,
                model=evil,
                fingerprint=evil,
                model_sha256=evil,
                millijoule_version=evil,
                evidence_class=evil,
                measured=replace(job.measured, method=evil),
                nodes=(device,),
                devices=(device,),
                models=(device,),
                timeline=timeline,
                speed=slow,
                closure=replace(job.closure, rows=closure),
                node_meters=(NodeMeterRow(evil, 1.0, 1, 1, 1, 1, 0.1, 0.1, None, evil),),
                errors={evil: 1},
                warnings={evil: 2},
                software=({"torch_version": evil},),
                flags=(Flag("problem", evil, evil),),
                samples=tuple(replace(s, prompt=evil, warnings=(evil,)) for s in job.samples),
            ),
        )
        * 2
    )


def test_the_policy_names_the_hashes_of_exactly_the_scripts_that_run(measured):
    page = render_page(measured).decode()
    policy = html.unescape(re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1])
    ours = [body for attributes, body in scripts(page) if "application/json" not in attributes]
    hashes = {f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in ours}
    assert len(ours) == 2
    directives = dict(d.split(" ", 1) for d in policy.split("; "))
    assert directives["default-src"] == "'none'"
    assert set(directives["script-src"].split()) == hashes
    assert "http" not in policy


def test_nothing_is_loaded_from_anywhere(measured):
    page = render_page(measured).decode()
    outside = re.sub(r"<script\b.*?</script", "", page, flags=re.DOTALL)
    assert re.findall(r'(?:src|href)="(?!data:)[^"]*"', outside) == []
    assert "@import" not in outside
    assert "url(" not in outside
    assert "http" not in outside.replace("http-equiv", "")


@pytest.mark.long
def test_text_from_outside_is_never_markup(measured):
    page = render_page(hostile(measured)).decode()
    found = scripts(page)
    assert len(found) == 3
    outside = re.sub(r"<script\b.*?</script>", "", page, flags=re.DOTALL)
    (charts,) = (body for attributes, body in found if "application/json" in attributes)
    for text in (outside, charts):
        assert "owned" in text  # it is there, as text
        assert not re.search(r"<script|<svg|<img src=x|[\x00-\x08\x0b\x0c\x0e-\x1f]", text)
        for character in TURNING:
            assert character not in text
            assert f"\\u{ord(character):04x}" not in text.lower()
            assert f"[U+{ord(character):04X}]" in text
    assert "<" not in charts
    assert html.escape(HOSTILE[0]) in outside


def test_hostile_prompts_are_shown_as_they_are_written(measured):
    page = render_page(measured).decode()
    shown = [html.unescape(p) for p in re.findall(r'class="prompt" dir="auto">(.*?)</span>', page, re.DOTALL)]
    assert shown[:4] == PROMPTS[:4]


def test_missing_energy_is_said_and_the_estimate_is_labelled(unmeasured):
    page = render_page(unmeasured).decode()
    cards = page[page.index('<div class="cards">') : page.index('<ul class="flags">')]
    assert cards.count('<div class="value missing">not measured</div>') == 2
    assert cards.count("estimate (CPU time x 10 W/core)") == 2
    assert "Estimated power per device (not measured)" in page
    assert "badge measured" not in page
    rows = re.findall(r'<tr data-class="[^"]*">(.*?)</tr>', page)
    assert len(rows) == len(unmeasured.jobs[0].classes)
    assert all(re.findall(r"<td[^>]*>([^<]*)</td>", row)[4] == "not measured" for row in rows)


def test_measured_energy_names_its_method(measured):
    page = render_page(measured).decode()
    assert "measured (nvml-counter+rapl)" in page
    assert "Measured: 5 by counter." in page
    assert "PUE: 1.2, declared" in page


def test_the_page_is_small(measured):
    assert len(render_page(measured)) < 2_000_000


@pytest.mark.long
def test_several_jobs_are_compared_above(measured, unmeasured):
    page = render_page(Report(measured.jobs + unmeasured.jobs)).decode()
    assert "2 jobs" in page
    assert page.count('<section class="job"') == 2
    assert 'id="chart-1-work"' in page


def test_the_terminal_shows_the_same_figures_and_obeys_nobody(measured, unmeasured):
    out = io.StringIO()
    console = Console(file=out, width=160, force_terminal=False)
    print_report(Report(measured.jobs + unmeasured.jobs), console)
    text = out.getvalue()
    figures = measured.jobs[0].measured
    assert words.energy(figures.direct_mj_per_image) in text
    assert words.energy(figures.total_mj) in text
    assert "not measured" in text
    assert "estimate (CPU time x 10 W/core)" in text
    print_report(hostile(measured), console)
    assert "\x1b" not in out.getvalue()
    assert "[31m" not in out.getvalue()


def test_charts_have_no_code_in_them(measured):
    for chart in job_charts(measured.jobs[0]):
        kinds = {type(model).__name__ for model in chart.figure.references()}
        assert not {k for k in kinds if k.startswith("CustomJS")}


def test_every_class_has_a_group_and_a_colour():
    assert set(GROUPS) == set(CLASS_COLOURS) == set(SEGMENT_CLASSES)


def test_labels_of_an_axis_differ_and_are_short():
    labels = unique_labels(["a" * 40, "a" * 40, "b", "b #2", "b"])
    assert len(set(labels)) == 5
    assert all(len(label) <= LABEL_CHARS + 3 for label in labels)


@pytest.mark.parametrize(
    ("say", "value", "text"),
    [
        (words.energy, None, "not measured"),
        (words.energy, 0.0, "0 mJ"),
        (words.energy, 0.5, "500 µJ"),
        (words.energy, 55.79, "55.8 mJ"),
        (words.energy, 412_000, "412 J"),
        (words.energy, 7_551_000, "7.55 kJ"),
        (words.energy, 3.6e9, "1 kWh"),
        (words.energy, 4.32e13, "12,000 kWh"),
        (words.grams, None, "not given"),
        (words.grams, 1.2e-5, "12 µg CO2e"),
        (words.grams, 0.055, "55 mg CO2e"),
        (words.grams, 2500, "2.5 kg CO2e"),
        (words.money, None, "not given"),
        (words.money, 0.0000001234, "0.000000123"),
        (words.money, -0.5, "-0.500"),
        (words.money, 0.0, "0.00"),
        (words.money, 1234.5, "1,234.50"),
        (words.count, 8746.3, "8,750"),
        (words.count, 64_525_765.0, "64,500,000"),
        (words.share, 0.0001, "< 0.1 %"),
        (words.share, 0.254, "25.4 %"),
        (words.seconds, 0.0123, "12.3 ms"),
        (words.seconds, 7300.0, "2.03 h"),
        (words.byte_count, 179_552, "180 kB"),
    ],
)
def test_figures_in_words(say, value, text):
    assert say(value) == text
