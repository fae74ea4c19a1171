"""`millijoule node-energy`: a power strip's log into the energy tables of a finished job, and its books closed again."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from millijoule.jobs.entry import COMPLETE, ERROR, run_command

if TYPE_CHECKING:
    from millijoule.workers.node_meters.meter import NodeSeries


@dataclass(frozen=True)
class NodeEnergyOptions:
    """Compare the devices of a finished job with its node's power strip (check C3), from the strip's CSV log.

    Columns: time (ISO 8601), watts or kwh (cumulative), and outlet where the file has several. The readings become rows of
    the tables node_reading and node_energy; closure and evidence class are computed again. Importing again replaces what
    was imported for the same node and meter. Prints the node's checks; exit code 1 where one fails.
    """

    output: Annotated[str, tyro.conf.Positional]
    """Output folder or s3:// URL of a finished job."""

    pdu: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FILE ...")]
    """The strip's CSV files, which follow each other in time."""

    node: Annotated[str, tyro.conf.arg(metavar="HOST")]
    """The node on these outlets, all of it and nothing else, named as the job's tables name it."""

    outlet: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")] = ()
    """The node's outlets, as the column outlet names them; those of several power supplies add up."""

    rest: Annotated[str | None, tyro.conf.arg(metavar="W+-W")] = None
    """Watts of the node that no counter sees (fans, board, network cards, losses), and by how much that may be wrong,
    such as 180+-30; without it the node cannot close."""

    accuracy: float | None = None
    """Of the strip, as its maker states it: 0.01 for 1 %."""

    clock_error: Annotated[float, tyro.conf.arg(metavar="SECONDS")] = 1.0
    """How far the strip's clock may be from the node's."""

    time_zone: str | None = None
    """Of times without an offset, such as Europe/Berlin or UTC."""

    meter: str = "pdu"
    """Name of the meter in the tables; another name for another, independent meter of the same node."""


def run(options: NodeEnergyOptions) -> int:
    from millijoule.jobs.options.node_meters import parse_rest
    from millijoule.pipeline.closing.node_import import import_readings
    from millijoule.pipeline.output.job import require_job
    from millijoule.pipeline.planning.retry_rounds import load_job_shards
    from millijoule.workers.errors import UsageError
    from millijoule.workers.node_meters.config import check_accuracy, declared_rest
    from millijoule.workers.storage.open import open_store

    check_accuracy(options.accuracy, "--accuracy")
    if not 0 <= options.clock_error < 3600:
        raise UsageError(f"--clock-error {options.clock_error:g}: seconds, 0 or more and less than an hour")
    if not options.meter.isprintable() or not options.meter:
        raise UsageError("--meter: a name")
    rest = declared_rest(*parse_rest(options.rest, "--rest")) if options.rest is not None else None
    store = open_store(options.output)
    job = require_job(store)
    result = import_readings(
        store, job, load_job_shards(store, job), options.node, options.meter, read_feeds(options), rest
    )
    rows = [r for r in result.closure if r.check == "C3" and r.scope.startswith(f"{options.node} boot ")]
    for row in rows:
        print(row)
    print(f"evidence class: {result.evidence_class}")
    return ERROR if any(r.passed is False for r in rows) else COMPLETE


def read_feeds(options: NodeEnergyOptions) -> dict[str, Sequence[NodeSeries]]:
    """The series of each outlet; raises InputError."""
    from millijoule.pipeline.energy.node_readings import WHOLE_NODE
    from millijoule.workers.errors import UsageError
    from millijoule.workers.node_meters.meter import join_series
    from millijoule.workers.node_meters.pdu import read_pdu_csv

    if not options.pdu:
        raise UsageError("--pdu: name at least one file")
    if len(set(options.outlet)) != len(options.outlet):
        raise UsageError(f"--outlet {' '.join(options.outlet)}: each once")
    outlets: dict[str, str | None] = {f"outlet {name}": name for name in options.outlet}
    return {
        feed: join_series(
            [
                series
                for path in options.pdu
                for series in read_pdu_csv(
                    Path(path),
                    outlet=outlet,
                    time_zone=options.time_zone,
                    clock_error_s=options.clock_error,
                    accuracy_share=options.accuracy,
                )
            ]
        )
        for feed, outlet in (outlets or {WHOLE_NODE: None}).items()
    }


def main(argv: list[str] | None = None) -> int:
    return run_command("node-energy", NodeEnergyOptions, run, argv)


if __name__ == "__main__":
    sys.exit(main())
