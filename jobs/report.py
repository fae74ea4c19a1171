"""`millijoule report`: what finished jobs cost, as a page, as JSON and on the terminal."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from millijoule.jobs.entry import COMPLETE, NamedOutputs, run_command
from millijoule.jobs.options.rates import RateOptions
from millijoule.workers.errors import InputError

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


def run(options: ReportOptions) -> int:
    from rich.console import Console

    from millijoule.pipeline.report.data import collect_report
    from millijoule.pipeline.report.gpu_time import parse_gpu_prices
    from millijoule.pipeline.report.terminal import print_report
    from millijoule.workers.storage.open import open_store

    outputs = (*options.outputs, *options.named)
    if not outputs:
        raise InputError("name at least one output folder or s3:// URL of a finished job")
    rates = options.rates.read(options.carbon_source)
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
        print(f"wrote {stores[0].url}/{PAGE_KEY} ({len(page) / 1e6:.2f} MB)", file=sys.stderr)
    return COMPLETE


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
    print(f"wrote {path} ({len(data) / 1e6:.2f} MB)", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    return run_command("report", ReportOptions, run, argv)


if __name__ == "__main__":
    sys.exit(main())
