"""Progress for people: a bar on a terminal or in a notebook, a plain line every ten seconds elsewhere; and the result."""

from __future__ import annotations

import sys
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping
from importlib.util import find_spec
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from millijoule.pipeline.closing.warning_kinds import kind_of
from millijoule.pipeline.output.job import JobSpec
from millijoule.pipeline.running.pool import CAPACITY_NOTICE_S
from millijoule.pipeline.running.run import JobRun
from millijoule.workers.counted import counted
from millijoule.workers.visible_text import visible

#: Between two lines where there is no terminal.
LINE_PERIOD_S = 10.0
#: Longest reason or warning that is printed; the manifest has them whole.
MAX_WORDS = 200
#: Kinds of warning that are printed.
MAX_KINDS = 5
#: Between two redraws of the bar.
BAR_PERIOD_S = 0.25


class Bar(RichProgress):
    """A bar, and below it what there is to say, which with pools is as long as a terminal is wide."""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            yield Text(task.fields["detail"])


class Progress:
    """Shows a `JobRun` while it works. Use as a context manager and call `tick` from the run."""

    def __init__(
        self, job: JobSpec, run: JobRun, *, quiet: bool = False, console: Console | None = None
    ) -> None:
        self.job = job
        self.run = run
        self.quiet = quiet
        self.console = console or Console(stderr=True)
        self._next = 0.0
        self._bar: Bar | None = None
        widgets = self.console.is_jupyter and find_spec("ipywidgets") is not None  # rich draws with them
        if not quiet and (self.console.is_terminal or widgets):
            columns = (SpinnerColumn(), TextColumn("images"), BarColumn(None), MofNCompleteColumn())
            self._bar = Bar(*columns, console=self.console, auto_refresh=False, expand=True)
            self._task = self._bar.add_task("images", total=job.images, detail="starting workers")

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._draw()
            self._bar.stop()

    def tick(self) -> None:
        """Show the current state, if it is time to."""
        now = time.monotonic()
        if self.quiet or now < self._next:
            return
        if self._bar is not None:
            self._next = now + BAR_PERIOD_S
            self._draw()
        else:
            self._next = now + LINE_PERIOD_S
            print(f"{self._done()}/{self.job.images} images, {self._detail()}", file=sys.stderr, flush=True)

    def _draw(self) -> None:
        assert self._bar is not None
        self._bar.update(self._task, completed=self._done(), detail=self._detail(), refresh=True)

    def _done(self) -> int:
        return min(self.job.images, self.run.counts.images_done + self.run.images_at_work())

    def _detail(self) -> str:
        """ "41 images/s, 0:12 left, 3.1 J/image, 2 workers" as far as it is known."""
        run, counts = self.run, self.run.counts
        parts = []
        if rate := run.images_per_second():
            left = (self.job.images - counts.images_done) / rate
            parts.append(f"{_rate(rate)} images/s, {clock(left)} left")
        if counts.images_this_run:
            if counts.energy_mj is not None:
                parts.append(f"{joules(counts.energy_mj / counts.images_this_run)}/image")
            else:
                parts.append(f"~{joules(counts.estimate_mj / counts.images_this_run)}/image (modelled)")
        rejected = (counts.filtered_this_run, "filtered"), (counts.quarantined_this_run, "quarantined")
        parts += [f"{n} {status}" for n, status in rejected if n]
        if run.writer.waits_for_storage:
            parts.append("waiting for storage")
        working = workers_words(run.pool.workers.values(), time.monotonic())
        return ", ".join([*parts, "done" if run.complete else working])


def workers_words(workers: Collection[Any], now: float) -> str:
    """ "2 workers (a 1, b 1), 1 starting (b 1) for 12 s": those at work, and those that are to come, by pool where there are some.

    Args:
        workers: each has `pool`, `node`, `ready`, `stopping` and `spawned`, as `crew.Worker`.
    """
    ready: list[Any] = []
    starting: list[Any] = []
    waiting: list[Any] = []  # where there is room a worker says within seconds which node it has
    for worker in workers:
        if worker.ready is not None:
            ready.append(worker)
        elif not worker.stopping:
            is_late = worker.node is None and now - worker.spawned > CAPACITY_NOTICE_S
            (waiting if is_late else starting).append(worker)
    parts = [f"{counted(len(ready), 'worker')}{_by_pool(ready)}"] if ready else []
    for some, what in ((starting, "starting"), (waiting, "waiting for a node")):
        if some:
            longest_s = max(now - w.spawned for w in some)
            so_far = f" for {longest_s:.0f} s" if longest_s >= 1 else ""
            parts.append(
                f"{len(some) if parts else counted(len(some), 'worker')} {what}{_by_pool(some)}{so_far}"
            )
    return ", ".join(parts) or "starting workers"


def _by_pool(workers: Collection[Any]) -> str:
    """ " (a 1, b 1)"; nothing where there are no pools."""
    pools = Counter(w.pool for w in workers if w.pool)
    return f" ({', '.join(f'{name} {n}' for name, n in sorted(pools.items()))})" if pools else ""


def _rate(value: float) -> str:
    """Three digits, without an exponent: "4.12", "3,690"."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def closing_lines(stats: Mapping[str, Any], url: str, *, hints: bool = True) -> list[str]:
    """What a finished job made, where it is, what it cost; with `hints` where to look. `stats`: content of `stats.json`."""
    lines = [f"{counted(stats['images_ok'], 'image')} in {url}"]
    if stats["images_per_second"]:
        lines[0] += f", {_rate(stats['images_per_second'])} images/s from first start to last commit"
    measured, modelled = stats["direct_mj_per_image"], stats["direct_estimate_mj_per_image"]
    if measured is not None:
        lines.append(
            f"energy: {joules(measured)} per image direct, {joules(stats['full_mj_per_image'])} with loading, "
            f"idling and waste ({', '.join(stats['energy_methods'])})"
        )
    else:
        lines.append(
            "energy: not measured (no counter was read: none can be on these nodes, or --no-telemetry)"
        )
        if modelled is not None:
            full = joules(stats["full_estimate_mj_per_image"])
            lines.append(
                f"        a model of CPU time says about {joules(modelled)} per image, {full} with loading and idling"
            )
    if unclosed := stats["energy"]["unclosed"]:
        first, more = unclosed[0], len(unclosed) - 1
        lines.append(
            f"warning: energy is missing, so there is no total: worker {first['worker_id']} on {first['host']}, "
            f"{', '.join(first['devices'])}: {first['reason']}" + (f" (and {more} more)" if more else "")
        )
    if stats["images_filtered"]:
        mj = stats["rejected_mj"]["filtered"]
        used = "" if mj is None else f"; {joules(mj)} of waste"
        lines.append(
            f"images filtered: {stats['images_filtered']:,}, hidden by the model's own safety checker; there are no files of them, "
            f"manifest.parquet has their rows{used}"
        )
        lines += [f"  {n} x {cut(reason)}" for reason, n in list(stats["filter_reasons"].items())[:3]]
    if stats["images_quarantined"]:
        lines.append(
            f"images quarantined: {stats['images_quarantined']}; manifest.parquet has status and error of each, "
            "--retry-failed tries them again"
        )
        lines += [f"  {n} x {cut(reason)}" for reason, n in list(stats["errors"].items())[:3]]
    if stats["input_rows_rejected"]:
        lines.append(f"{counted(stats['input_rows_rejected'], 'input row')} rejected, see bad_rows.parquet")
    if stats["images_with_warnings"]:
        lines.append(
            f"images with warnings: {stats['images_with_warnings']:,}; manifest.parquet has those of each image"
        )
        lines += [
            f"  {line}" for line in warning_lines(stats["warning_kinds"], stats["warnings"])[:MAX_KINDS]
        ]
    if hints:
        look = "look at preview.png; " if stats["images_ok"] else ""
        lines.append(
            f"{look}manifest.parquet lists every image, energy/ is the ledger, stats.json the totals"
        )
    return [visible(line) for line in lines]


def warning_lines(kinds: Mapping[str, int], texts: Mapping[str, int]) -> list[str]:
    """Each kind of warning with how many images have it, and the warning itself, or a common one of them."""
    examples: dict[str, list[str]] = defaultdict(list)
    for text in texts:
        examples[kind_of(text)].append(text)
    lines = []
    for kind, n in kinds.items():
        said = examples[kind][:2]
        if len(said) == 1 and texts[said[0]] == n:
            lines.append(f"{n} x {cut(said[0])}")
        else:
            lines.append(f"{n} x {cut(kind)}" + (f', such as "{cut(said[0])}"' if said else ""))
    return lines


def cut(text: str) -> str:
    """As much of a reason or warning as a line has room for."""
    return text if len(text) <= MAX_WORDS else f"{text[:MAX_WORDS]}..."


def joules(mj: float | None) -> str:
    """Millijoules in a readable unit."""
    if mj is None:
        return "unknown"
    return f"{mj / 1000:.3g} J" if mj >= 1000 else f"{mj:.3g} mJ"


def clock(seconds: float) -> str:
    """H:MM:SS, or M:SS under an hour."""
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"
