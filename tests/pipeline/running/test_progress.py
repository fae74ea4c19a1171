"""The progress line: what it says of workers that are there and of those that are to come."""

import io
import re
from types import SimpleNamespace

import pytest
from rich.console import Console

from millijoule.pipeline.running.progress import Progress, workers_words

NODE = object()


def worker(spawned, pool="", *, node=None, ready=None, stopping=False):
    return SimpleNamespace(spawned=spawned, pool=pool, node=node, ready=ready, stopping=stopping)


def at_work(pool=""):
    return worker(0.0, pool, node=NODE, ready=NODE)


@pytest.mark.parametrize(
    ("workers", "words"),
    [
        ([], "starting workers"),
        ([worker(92.4)], "1 worker starting for 8 s"),
        ([worker(99.0, "a"), worker(97.0, "b", node=NODE)], "2 workers starting (a 1, b 1) for 3 s"),
        ([at_work(), at_work()], "2 workers"),
        ([at_work("b"), at_work("a"), at_work("b")], "3 workers (a 1, b 2)"),
        ([at_work("a"), worker(96.0, "b")], "1 worker (a 1), 1 starting (b 1) for 4 s"),
        # a pool whose nodes do not come is seen beside one that works
        ([at_work("a"), worker(10.0, "b"), worker(40.0, "b")], "1 worker (a 1), 2 waiting for a node (b 2) for 90 s"),
        ([worker(10.0, "b")], "1 worker waiting for a node (b 1) for 90 s"),
        ([worker(10.0, "a", node=NODE), worker(80.0, "b")],
         "1 worker starting (a 1) for 90 s, 1 waiting for a node (b 1) for 20 s"),
        ([worker(10.0, "a", stopping=True)], "starting workers"),
    ],
)  # fmt: skip
def test_workers_are_told_by_what_they_do_and_by_pool(workers, words):
    assert workers_words(workers, 100.0) == words


def run_of(workers, images_done=0, rate=None):
    this_run = {"images_this_run": images_done, "filtered_this_run": 0, "quarantined_this_run": 0}
    return SimpleNamespace(
        counts=SimpleNamespace(
            images_done=images_done, energy_mj=None, estimate_mj=900 * images_done, **this_run
        ),
        images_at_work=lambda: 0,
        images_per_second=lambda: rate,
        writer=SimpleNamespace(waits_for_storage=False),
        pool=SimpleNamespace(workers=workers),
        complete=False,
    )


def test_on_a_terminal_of_eighty_columns_bar_and_words_are_whole(monkeypatch):
    """With pools the words alone are as long as a line."""
    monkeypatch.setattr("time.monotonic", lambda: 100.0)
    workers = dict(enumerate([at_work("quick"), worker(96.0, "cheap"), worker(10.0, "spot")]))
    run, out = run_of(workers, 5, 2.19), io.StringIO()
    progress = Progress(
        SimpleNamespace(images=600), run, console=Console(file=out, width=80, force_terminal=True)
    )
    with progress:
        progress.tick()
    text = " ".join(re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue()).split())
    assert "\u2026" not in text
    assert re.search(
        r"images [\u2501\u2578\u257a ]+ 5/600 2.19 images/s, 4:31 left, ~900 mJ/image \(modelled\), "
        r"1 worker \(quick 1\), 1 starting \(cheap 1\) for 4 s, 1 waiting for a node \(spot 1\) for 90 s",
        text,
    )


def test_no_two_lines_of_the_first_minute_are_alike(monkeypatch, capsys):
    """Where nothing changes but the time, as while a model loads."""
    clock = iter(range(0, 60, 5))
    monkeypatch.setattr("time.monotonic", lambda: now)
    run = run_of({p: worker(0.0, p, node=NODE) for p in "ab"})
    now = 0.0
    progress = Progress(SimpleNamespace(images=40), run)
    for now in clock:  # noqa: B007
        progress.tick()
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == [
        "0/40 images, 2 workers starting (a 1, b 1)",
        "0/40 images, 2 workers starting (a 1, b 1) for 10 s",
    ]
    assert len(lines) == len(set(lines)) == 6
