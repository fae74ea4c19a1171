"""The report as tables on a terminal: the page's figures without its charts and pictures.

Names and messages come from the job and are untrusted: they are shown as plain text, control characters made visible,
so that nothing in them can colour, move or clear the terminal.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from millijoule.pipeline.energy import evidence
from millijoule.pipeline.report import cells, words
from millijoule.pipeline.report.data import JobReport, Report, some_of_each_check
from millijoule.pipeline.report.devices import DeviceRow
from millijoule.workers.counted import counted
from millijoule.workers.visible_text import visible

#: Rows of a table before the rest is left to the page.
MAX_ROWS = 12

#: Prompts of the first images, and how much of each is shown.
MAX_PROMPTS = 5
MAX_PROMPT_CHARS = 160

#: Characters of a column of numbers beside long names: no less than "measured" and no more than a number needs.
_NUMBER_WIDTH = (8, 10)

_LEVEL_STYLES = {"problem": "bold red", "caution": "yellow", "note": "dim"}


def print_report(report: Report, console: Console) -> None:
    """Print every job of `report`."""
    for job in report.jobs:
        _print_job(job, console)


def _print_job(job: JobReport, console: Console) -> None:
    console.print(_plain(f"{job.model}  {job.output}", "bold"))
    made = f"{counted(job.images_ok, 'image')}, {words.rate(job.speed.images_per_second)}"
    made = ", ".join([made, *cells.not_made(job)])
    meaning = evidence.MEANINGS.get(job.evidence_class)
    why = f" ({meaning})" if meaning else ""
    console.print(_plain(f"{made}; evidence class: {job.evidence_class}{why}"))
    console.print(_figures(job))
    console.print(_classes(job))
    console.print(_work(job))
    if job.pools:
        for table in _pools(job):
            console.print(table)
    for line in cells.speed(job.speed):
        console.print(_plain(line))
    if job.speed.slowest:
        console.print(_stragglers(job))
    if job.node_meters:
        console.print(_node_meters(job))
    _print_closure(job, console)
    if job.samples:
        console.print(_prompts(job))
    for flag in job.flags:
        console.print(_plain(f"{flag.level}: {flag.name}: {flag.text}", _LEVEL_STYLES.get(flag.level, "")))
    for title, messages in cells.messages(job):
        console.print(_plain(f"{title}:", "bold"))
        for text, n in list(messages.items())[:MAX_ROWS]:
            console.print(_plain(f"{n:,} x {text}"))
        if len(messages) > MAX_ROWS:
            console.print(_plain(_rest(len(messages))))


def _figures(job: JobReport) -> Table:
    table = _table(*cells.FIGURE_HEADS, numbers=3)
    sections = cells.figure_sections(job)
    if job.estimate.direct_mj_per_image is None and job.estimate.full_mj_per_image is None:
        del sections[1]
    for title, rows in sections:
        table.add_row(_plain(title, "bold"))
        for what, *figures in rows:
            table.add_row(f"  {what}", *figures)
    return table


def _classes(job: JobReport) -> Table:
    kind, _, *heads = cells.CLASS_HEADS
    table = _table(kind, *heads, numbers=6)
    for row in job.classes:
        name, _, *figures = cells.class_cells(row)
        table.add_row(_plain(name), *figures)
    return table


def _work(job: JobReport) -> Table:
    """What nodes, kinds of device and devices did, one below the other: they share their columns.

    Energy is the measured one; where none of it was measured, the estimate.
    """
    rows = (*job.nodes, *job.models, *job.devices)
    measured = any(r.direct_mj_per_image is not None or r.full_mj_per_image is not None for r in rows)
    kind = "" if measured else "estimate, "
    heads = ("images", "images/s per worker", "time idle", f"{kind}direct per image", f"{kind}full per image")
    table = _table("", *heads, numbers=len(heads), number_width=_NUMBER_WIDTH)

    def add(title: str, rows: Sequence[tuple[str, DeviceRow]], not_shown: int = 0) -> None:
        table.add_row(_plain(f"{title}:", "bold"))
        for name, row in rows[:MAX_ROWS]:
            energy = cells.energy_cells(row)
            table.add_row(
                _plain(name),
                f"{row.images:,}",
                words.count(row.images_per_worker_second, "-"),
                words.share(row.time_shares.get("idle", 0.0)),
                *(energy[:2] if measured else energy[2:]),
            )
        if len(rows) + not_shown > MAX_ROWS:
            table.add_row(_plain(_rest(len(rows) + not_shown)))

    def of_device(r: DeviceRow) -> str:
        kind = f", {r.model}" if len(job.models) > 1 and r.model != r.device else ""
        return f"{r.host}, {words.short_device(r.device)}{kind}"

    add("nodes", [(f"{r.host}, {r.device}", r) for r in job.nodes], job.nodes_not_shown)
    add("kinds of device", [(f"{r.model}, {r.device}, {r.host}", r) for r in job.models])
    add("devices", [(of_device(r), r) for r in job.devices], job.devices_not_shown)
    return table


def _pools(job: JobReport) -> tuple[Table, Table]:
    """What pools made, and what a shard takes on each: one table would be wider than a terminal."""
    whole, shard = slice(1, cells.POOL_HEADS_IN_ALL), slice(cells.POOL_HEADS_IN_ALL, None)
    tables = []
    for part in (whole, shard):
        heads = cells.POOL_HEADS[part]
        table = _table("pool", *heads, numbers=len(heads), number_width=(None, 13))
        for row in cells.pool_cells(job):
            table.add_row(_plain(row[0]), *row[part])
        tables.append(table)
    return tables[0], tables[1]


def _stragglers(job: JobReport) -> Table:
    table = _table("node", "device", "worker", "shard", "images", "took", "times the median", numbers=4)
    for row in job.speed.slowest[:MAX_ROWS]:
        table.add_row(
            *(_plain(text) for text in (row.host, words.short_device(row.device), row.worker)),
            f"{row.shard_id:,}",
            *cells.straggler_cells(row),
        )
    _add_rest(table, job.speed.stragglers)
    return table


def _print_closure(job: JobReport, console: Console) -> None:
    closure = job.closure
    if closure.rows is None:
        console.print(_plain("closure: not recorded in this output"))
        return
    console.print(_plain(f"closure: {counted(closure.checks, 'check')}, {closure.failed:,} failed", "bold"))
    table = _table("check", "scope", "expected", "found", "residual", "result", numbers=4)
    for row in some_of_each_check(closure.rows, MAX_ROWS):
        expected, found, residual, _, verdict = cells.check_cells(row)
        scope = words.short_scope(row["scope"])
        table.add_row(_plain(row["check"]), _plain(scope), expected, found, residual, verdict)
        if not row["passed"]:
            table.add_row("", _plain(row["note"], "dim"))
    _add_rest(table, closure.checks)
    console.print(table)


def _prompts(job: JobReport) -> Table:
    """The prompts of the first images of the manifest, each once."""
    firsts = list({sample.prompt_id: sample for sample in reversed(job.samples)}.values())[::-1]
    table = _table("first prompts, not picked", "size", "energy of the image", numbers=2)
    for sample in firsts[:MAX_PROMPTS]:
        size = f"{sample.width}x{sample.height}" if sample.width and sample.height else "-"
        prompt = _plain(words.shortened(sample.prompt, MAX_PROMPT_CHARS))
        table.add_row(prompt, size, words.energy(sample.energy_mj))
    return table


def _node_meters(job: JobReport) -> Table:
    table = _table("node and meter", "its meter", "devices", "rest", "residual", "tolerance", "C3", numbers=6)
    for row in job.node_meters[:MAX_ROWS]:
        table.add_row(
            _plain(row.scope),
            *cells.meter_cells(row),
            words.signed_share(row.residual_share),
            words.share(row.tolerance_share),
            cells.VERDICTS[row.passed],
        )
        if row.passed is None:
            table.add_row(_plain(f"  {row.note}", "dim"))
    _add_rest(table, len(job.node_meters) + job.node_meters_not_shown)
    return table


def _add_rest(table: Table, rows: int) -> None:
    """Say below `table` how many of all `rows` are left to the page."""
    if rows > MAX_ROWS:
        table.caption, table.caption_justify = _plain(_rest(rows)), "left"


def _rest(rows: int) -> str:
    return f"... {rows - MAX_ROWS:,} more"


def _table(*heads: str, numbers: int, number_width: tuple[int | None, int] | None = None) -> Table:
    """A table whose last `numbers` columns are numbers, of at least and at most so many characters."""
    table = Table(box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    least, most = number_width or (None, None)
    for head in heads[: len(heads) - numbers]:
        table.add_column(head, overflow="fold")
    for head in heads[len(heads) - numbers :]:
        table.add_column(head, justify="right", overflow="fold", min_width=least, max_width=most)
    return table


def _plain(text: str, style: str = "") -> Text:
    return Text(visible(text), style=style)
