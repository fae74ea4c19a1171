"""`millijoule bench NAME`: measurements whose result files the README quotes. Each is a module of this folder.

A measurement has `BenchOptions`, a dataclass, and `run`, which takes them and returns an exit code.
"""

from __future__ import annotations

import importlib

from millijoule.jobs.cli import dispatch

BENCHES = {
    "pipeline": "a job against a bare loop of the same generator, encoder and writer",
    "controls": "forms of the oscillator generator, coupled and not, trained alike with several seeds, and judged",
    "clocks": "joules per accepted image over clocks and power limits of a GPU, which it changes and puts back",
    "counters": "a board's energy counter and power readings: period, read rates, square waves, idle states",
    "coupling": "a coupled oscillator model with its K and without, and how often its oscillators change",
    "drawings": "whether coupled oscillators agree on one of several drawings of a noun",
    "encode": "processor time and bytes per image of PNG encoders, JPEG and WebP, for icons and photographs",
    "engines": "what runs the networks: DeepSpeed-Inference, torch.compile and PyTorch as it is, in turn",
    "events": "coupled oscillators with sums updated by what changed against sums made anew, by share of quiet ones",
    "finish": "time and memory of closing the books of a job of 100,000 shards",
    "fleet": "simulated fleets of unlike devices under the real driver: joules, money, time, and the driver's own load",
    "gpu": "joules and seconds per image of two models on one GPU, alternating, by the board's counter",
    "image": "processor time per image of the oscillator generators, by the form that draws: PyTorch, or compiled",
    "kernels": "time and joules of our fused GPU kernels against PyTorch's own operations, run plainly and compiled",
    "ladder": "rungs of a diffusion pipeline one by one: joules or CPU time, and what they do to images",
    "leases": "simulated fleets of unlike devices: leases of equal time, with pieces of shards, against whole shards",
    "memory": "memory of several workers of one model on a host; time and memory of batches by their size",
    "roofline": "compiled CPU kernels against the peaks of this processor, measured in the same run",
    "scaling": "two workers against one, beside two plain processes against one in the same run",
    "stages": "how long the device waits while images are encoded, written and stored",
    "worker": "where the processor time of an image goes, stage by stage, before and after a change",
    "telemetry": "the same job with and without energy telemetry: throughput, CPU time, memory",
    "un0": "processor time per image of Un-0 models: their own loop, eager and compiled, and our forms",
}

#: Those that lie in the room `cpu`.
ON_CPU = frozenset(("encode", "events", "image", "roofline", "un0", "worker"))


def main(argv: list[str] | None = None) -> int:
    """Run one measurement; the exit code is the measurement's, 2 for an unknown one."""
    return dispatch("millijoule bench", BENCHES, _run, argv)


def _run(name: str, args: list[str]) -> int:
    from millijoule.jobs.entry import run_command

    room = "cpu." if name in ON_CPU else ""
    bench = importlib.import_module(f"millijoule.jobs.bench.{room}{name.replace('-', '_')}")
    return run_command(f"bench {name}", bench.BenchOptions, bench.run, args)
