"""The report page in headless Chromium: charts are drawn, filters filter, nothing is asked for, nothing runs wild.

Screenshots go to the folder named by MILLIJOULE_SCREENSHOTS, for people to look at.
"""

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.chromium import browse, find_chromium
from support.report_outputs import HOSTILE, measured_output, unmeasured_output

from millijoule.pipeline.energy.carbon import Rate, Rates
from millijoule.pipeline.report.data import collect_report
from millijoule.pipeline.report.page import render_page

# on CI it must be there, or nothing would ever test the page
pytestmark = pytest.mark.skipif(
    find_chromium() is None and os.environ.get("CI") != "true",
    reason="chromium is not installed (Debian: apt-get install chromium)",
)

PROMPTS = [*HOSTILE[:4], *(f"prompt {i}" for i in range(40))]
READY = "document.documentElement.dataset.ready === '1'"

#: Per chart: how many pixels of its canvases are not empty, whatever shadow roots they are in.
DRAWN_PIXELS = """
Object.fromEntries([...document.querySelectorAll(".chart")].map((chart) => {
  const canvases = [];
  const walk = (node) => {
    if (node.tagName === "CANVAS") canvases.push(node);
    if (node.shadowRoot) [...node.shadowRoot.children].forEach(walk);
    [...(node.children ?? [])].forEach(walk);
  };
  walk(chart);
  let drawn = 0;
  for (const c of canvases) {
    if (!c.width || !c.height) continue;
    const copy = new OffscreenCanvas(c.width, c.height).getContext("2d", { willReadFrequently: true });
    copy.drawImage(c, 0, 0);
    const data = copy.getImageData(0, 0, c.width, c.height).data;
    for (let i = 3; i < data.length; i += 4) drawn += data[i] > 0;
  }
  return [chart.id, drawn];
}))
"""


@pytest.fixture(scope="module")
def page_url(tmp_path_factory):
    """A page of a measured and an unmeasured job."""
    folder = tmp_path_factory.mktemp("page")
    stores = [
        measured_output(folder / "measured", PROMPTS),
        unmeasured_output(folder / "unmeasured", PROMPTS),
    ]
    path = folder / "report.html"
    path.write_bytes(render_page(collect_report(stores, Rates(Rate("grid", (400.0,)), pue=1.2))))
    return path.as_uri()


@pytest.fixture
def picture(tmp_path):
    """`await picture(page, name)`: the page as an image; kept where MILLIJOULE_SCREENSHOTS says."""

    async def take(page, name):
        path = Path(os.environ.get("MILLIJOULE_SCREENSHOTS", tmp_path)) / f"report-{name}.png"
        await page.screenshot(path)
        return Image.open(io.BytesIO(path.read_bytes())).convert("RGB")

    return take


def brightness(image):
    """Mean of the page's left margin, 0 to 255."""
    return float(np.asarray(image)[:, :4].mean())


def test_charts_are_drawn_without_network_errors_or_prompts_that_run(page_url):
    async def script(page):
        await page.resize(1200)
        await page.open(page_url)
        await page.wait_for(READY)
        kinds = ("power", "work", "throughput", "shares")
        charts = [f"chart-{n}-{kind}" for n in (0, 1) for kind in kinds]
        await page.wait_for(f"Object.values({DRAWN_PIXELS}).every((n) => n > 1000)")
        assert sorted(await page.evaluate(DRAWN_PIXELS)) == sorted(charts)
        assert [url for url in page.requests if not url.startswith("data:")] == [page_url]
        assert await page.evaluate("document.title") == "Energy report: plain"
        shown = await page.evaluate(
            "[...document.querySelectorAll('#gallery-0 .prompt')].map((p) => p.textContent)"
        )
        assert shown[:4] == PROMPTS[:4]
        assert await page.evaluate("[...document.images].every((i) => i.complete && i.naturalWidth > 0)")
        assert page.problems == []

    browse(script)


def test_the_policy_stops_scripts_and_network_even_after_loading(page_url):
    async def script(page):
        await page.open(page_url)
        await page.wait_for(READY)
        await page.evaluate(
            "(() => { const s = document.createElement('script'); s.textContent = 'window.ran = 1';"
            " document.body.append(s);"
            " document.body.insertAdjacentHTML('beforeend', '<p onclick=\"window.ran = 1\" id=trap>x</p>');"
            " document.getElementById('trap').click();"
            " return fetch('http://127.0.0.1:9/').catch(() => 0); })()"
        )
        assert await page.evaluate("window.ran === undefined")
        blocked = " ".join(page.problems)
        assert "script-src" in blocked
        assert "default-src" in blocked or "connect-src" in blocked

    browse(script)


def test_filters_reach_charts_keys_and_tables(page_url):
    visible = "charts.find((c) => c.spec.job === 'job-0' && c.spec.key === '{}').plot.{}"
    lanes = visible.format("power", "renderers.filter((r) => r.visible).length")
    workers = visible.format("work", "y_range.factors.length")
    classes = visible.format("work", "renderers.filter((r) => r.visible).map((r) => r.name).sort()")
    rows = "[...document.querySelectorAll('#devices-0 tbody tr')].filter((r) => !r.hidden).length"
    key = "[...document.querySelectorAll('#job-0 .key li')].filter((r) => r.offsetParent !== null).length"

    def choose(name, value):
        return (
            f"(() => {{ const s = document.querySelector('#job-0 select[data-filter={name}]'); s.value = '{value}';"
            " s.dispatchEvent(new Event('change', {bubbles: true})); })()"
        )

    async def script(page):
        async def state():
            return [await page.evaluate(e) for e in (lanes, workers, rows, key)]

        await page.resize(1200)
        await page.open(page_url)
        await page.wait_for(READY)
        assert await state() == [5, 3, 3, 5]
        await page.evaluate(choose("node", "host-b"))
        assert await state() == [2, 1, 1, 2]
        await page.evaluate(choose("device", "GPU-33333333-cccc"))
        assert await state() == [1, 1, 1, 1]
        await page.evaluate(choose("node", ""))
        await page.evaluate(choose("device", ""))
        assert await state() == [5, 3, 3, 5]

        everything = await page.evaluate(classes)
        assert "class:idle" in everything
        before = await page.evaluate(DRAWN_PIXELS)
        await page.evaluate("document.querySelector('#job-0 input[data-class=idle]').click()")
        assert await page.evaluate(classes) == [c for c in everything if c != "class:idle"]
        await page.wait_for(f"({DRAWN_PIXELS})['chart-0-work'] < {before['chart-0-work'] * 0.8}")
        assert (await page.evaluate(DRAWN_PIXELS))["chart-1-work"] == before["chart-1-work"]

        await page.evaluate(
            "(() => { const s = document.querySelector('input[data-search=gallery-0]'); s.value = 'PROMPT 1';"
            " s.dispatchEvent(new Event('input', {bubbles: true})); })()"
        )
        left = await page.evaluate(
            "[...document.querySelectorAll('#gallery-0 li')].filter((l) => !l.hidden).map((l) => l.querySelector('.prompt').textContent)"
        )
        assert left == [p for p in PROMPTS[:32] if "prompt" in p and "1" in p]
        assert page.problems == []

    browse(script)


def test_light_dark_and_the_button(page_url, picture):
    async def script(page):
        await page.resize(1200)
        await page.prefer("light")
        await page.open(page_url)
        await page.wait_for(READY)
        ink = "charts[0].plot.left[0].major_label_text_color"
        assert await page.evaluate(ink) == "#1d2126"
        assert brightness(await picture(page, "light")) > 220
        await page.prefer("dark")
        await page.wait_for(f"{ink} === '#e6e9ec'")
        assert brightness(await picture(page, "dark")) < 60
        await page.evaluate("document.getElementById('theme').click()")
        await page.wait_for(f"{ink} === '#1d2126'")
        assert brightness(await picture(page, "light-by-button")) > 220
        assert page.problems == []

    browse(script)


def test_a_phone_scrolls_down_only(page_url, picture):
    async def script(page):
        await page.resize(390, 844, mobile=True)
        await page.open(page_url)
        await page.wait_for(READY)
        await page.wait_for(f"Object.values({DRAWN_PIXELS}).every((n) => n > 1000)")
        assert await page.evaluate("document.documentElement.scrollWidth") == 390
        too_wide = (
            "[...document.querySelectorAll('main *')].filter((e) => !e.closest('.scroll, .chart') &&"
            " e.getBoundingClientRect().right > 391).map((e) => e.outerHTML.slice(0, 80))"
        )
        assert await page.evaluate(too_wide) == []
        assert (
            await page.evaluate(
                "Math.min(...[...document.querySelectorAll('main p, main td, main li, main label')]"
                ".filter((e) => e.textContent).map((e) => parseFloat(getComputedStyle(e).fontSize)))"
            )
            >= 12
        )
        assert (await picture(page, "phone")).width == 390
        assert page.problems == []

    browse(script)
