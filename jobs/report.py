"""`millijoule report`: what finished jobs cost, as a page, as JSON and on the terminal."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from millijoule.jobs.entry import COMPLETE, NamedOutputs, run_command
from millijoule.jobs.options.rates import RateOptions
from millijoule.workers.errors import InputError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from millijoule.pipeline.energy.carbon import Rates
    from millijoule.workers.storage.protocol import Store

#: Exit code of a statement in which something is missing; it is written all the same, and says what.
NOT_STATED = 6

#: The page's name in an output, where no --html says otherwise.
PAGE_KEY = "report.html"


@dataclass(frozen=True)
class ReportOptions:
    """Show what finished jobs made and cost: joules, images per kWh, CO2e, electricity and GPU time per image, direct
    and full.

    Prints tables and writes one HTML page that needs no network, by default report.html in the (first) output.
    Measured and modelled energy are kept apart; what was not measured says so. Carbon intensity is location-based.
    Needs the `report` extra: pip install "millijoule[report]".
    """

    outputs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="OUTPUT")] = ()
    """Output folders or s3:// URLs of finished jobs."""

    named: NamedOutputs = ()
    """The same, as an option."""

    html: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Where to write the page. Default: report.html in the first output."""

    json: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Also write everything the page shows as JSON; - for standard output, then without tables."""

    rates: Annotated[RateOptions, tyro.conf.arg(name="")] = field(default_factory=RateOptions)

    price_per_gpu_hour: Annotated[tuple[str, ...], tyro.conf.arg(metavar="X|MODEL=X ...")] = ()
    """What an hour of a GPU costs, for the cost of the GPU time that the job held: one price, or one per model, whose
    name needs to be in the GPU's product name (H200=3.5 A100=1.6)."""

    carbon_source: str | None = None
    """Where the carbon intensity is from, for the page. Default: the file's name."""

    statement: Literal["sci", "scope3"] | None = None
    """Instead of page and tables, a statement to file, over all outputs: sci, the Software Carbon Intensity (ISO/IEC 21031) of an
    accepted image, as text, with --json as JSON; scope3, energy by job and device kind as CSV. Nothing missing is filled in: exit
    code 6 says that something is. docs/statements.md has the details."""

    embodied: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=KG/YEARS|FILE ...")] = ()
    """For sci: kilograms of CO2e that making one device emitted, and its years of life, by a part of its product's name; node is the
    rest of each machine (H200=164/4 node=1300/5*0.5, the last a share of it). Or a TOML file."""

    location: str | None = None
    """For statements: where the machines stand, such as a country or a grid zone."""

    csv: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """For scope3: where to write it. Default: standard output."""


def run(options: ReportOptions) -> int:
    from rich.console import Console

    from millijoule.pipeline.report.data import collect_report
    from millijoule.pipeline.report.gpu_time import parse_gpu_prices
    from millijoule.pipeline.report.terminal import print_report
    from millijoule.workers.storage.open import open_store

    outputs = (*options.outputs, *options.named)
    if not outputs:
        raise UsageError("name at least one output folder or s3:// URL of a finished job")
    rates = options.rates.read(options.carbon_source)
    if options.statement is not None:
        return state(options, [open_store(url) for url in outputs], rates)
    for name in ("embodied", "location", "csv"):
        if getattr(options, name):
            raise UsageError(f"--{name} is for a statement: say which with --statement sci or scope3")
    gpu_prices = parse_gpu_prices(options.price_per_gpu_hour)
    stores = [open_store(url) for url in outputs]
    report = collect_report(stores, rates, gpu_prices)
    if options.json == "-":
        sys.stdout.write(report.to_json().decode())
    else:
        print_report(report, Console())
        if options.json is not None:
            _write(options.json, report.to_json())
    page = _render(report)
    if options.html is not None:
        _write(options.html, page)
    else:
        stores[0].put(PAGE_KEY, page)
        print(f"wrote {stores[0].url}/{PAGE_KEY} ({_size(page)})", file=sys.stderr)
    return COMPLETE


def state(options: ReportOptions, stores: Sequence[Store], rates: Rates) -> int:
    """Print or write the statement that was asked for; returns the exit code."""
    from millijoule.pipeline.statements.declared import read_declared
    from millijoule.pipeline.statements.job_energy import read_job_energy
    from millijoule.pipeline.statements.sci import sci_statement
    from millijoule.pipeline.statements.scope3 import scope3_statement
    from millijoule.pipeline.statements.shared_counters import without_shared

    is_sci = options.statement == "sci"
    for name, belongs in (
        ("html", False),
        ("price_per_gpu_hour", False),
        ("json", is_sci),
        ("csv", not is_sci),
    ):
        if getattr(options, name) and not belongs:
            raise UsageError(f"--{name.replace('_', '-')} has no part in --statement {options.statement}")
    declared = read_declared(options.embodied, options.location)
    jobs = tuple(read_job_energy(store, rates) for store in stores)
    outputs: dict[str, str] = {}  # by attempt: a link or a copy has another address
    for job in jobs:
        if job.first_attempt is None:
            continue
        if other := outputs.get(job.first_attempt):
            raise InputError(
                f"one job is given twice, as {other} and {job.output}: its energy would be stated twice"
            )
        outputs[job.first_attempt] = job.output
    jobs = without_shared(jobs)
    if is_sci:
        stated = sci_statement(jobs, declared)
        if options.json != "-":
            sys.stdout.write(stated.to_text())
        missing, target, data = bool(stated.missing), options.json, stated.to_json()
    else:
        missing, target = any(job.missing or job.carbon_missing for job in jobs), options.csv or "-"
        data = scope3_statement(jobs, declared).encode()
    if target == "-":
        sys.stdout.write(data.decode())
    elif target is not None:
        _write(target, data)
    if missing:
        print("something is missing in this statement; it says what", file=sys.stderr)
    return NOT_STATED if missing else COMPLETE


def _render(report) -> bytes:
    try:
        from millijoule.pipeline.report.page import render_page
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "bokeh":
            raise
        raise InputError('the page needs the plotting library: pip install "millijoule[report]"') from error
    return render_page(report)


def _write(path: str, data: bytes) -> None:
    """Write a local file and say so; raises InputError where that is not possible."""
    try:
        Path(path).write_bytes(data)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from error
    print(f"wrote {path} ({_size(data)})", file=sys.stderr)


def _size(data: bytes) -> str:
    return f"{len(data) / 1e6:.2f} MB" if len(data) >= 1e5 else f"{len(data) / 1e3:.1f} kB"


def main(argv: list[str] | None = None) -> int:
    return run_command("report", ReportOptions, run, argv)


if __name__ == "__main__":
    sys.exit(main())
