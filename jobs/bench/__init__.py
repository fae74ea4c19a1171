"""`millijoule bench NAME`: measurements whose result files the README quotes. Each is a module of this folder."""

from __future__ import annotations

import importlib
import sys

BENCHES = {
    "pipeline": "a job against a bare loop, planning, resume and leases",
    "counters": "a board's energy counter and power readings: period, read rates, square waves, idle states",
    "cpu-products": "the generator on this CPU with each form of its int8 products, in turn",
    "energy-tables": "size of the energy tables and speed of SQL over them",
    "finish": "time and memory of closing the books of a job of 100,000 shards",
    "gpu": "joules and seconds per image of two models on one GPU, alternating, by the board's counter",
    "interval": "how often the interval of `millijoule verify` covers the true ratio",
    "report": "size of the report page of 100,000 images, and time to build it",
    "telemetry": "the same job with and without energy telemetry: throughput, CPU time, memory",
}


def usage() -> str:
    lines = ["usage: millijoule bench NAME [options]", "", "names:"]
    return "\n".join([*lines, *(f"  {name:<14} {text}" for name, text in BENCHES.items())])


def main(argv: list[str] | None = None) -> int:
    """Run one measurement; the exit code is the measurement's, 2 for an unknown one."""
    args = sys.argv[1:] if argv is None else argv
    if args and args[0] in BENCHES:
        return importlib.import_module(f"millijoule.jobs.bench.{args[0].replace('-', '_')}").main(args[1:])
    if args and args[0] in ("-h", "--help"):
        print(usage())
        return 0
    problem = f"no measurement named {args[0]!r}" if args else "a name is missing"
    print(f"millijoule bench: {problem}\n\n{usage()}", file=sys.stderr)
    return 2
