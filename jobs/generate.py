"""`millijoule generate`: prompts in, images and a joule ledger out. Reads top to bottom as the story of a job."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tyro

from millijoule.jobs.entry import CAP_REACHED, COMPLETE, ERROR, INTERRUPTED, QUARANTINED, run_command
from millijoule.jobs.rate_options import RateOptions

Format = Literal["parquet", "webdataset", "files"]
Device = Literal["auto", "gpu", "cpu"]
DuplicatePolicy = Literal["error", "keep-first", "suffix"]


@dataclass(frozen=True)
class GenerateOptions:
    """Make images from prompt files on a Ray cluster, and account for the energy.

    Run the same command again to resume: finished shards are kept, whatever was killed. Inside `ray job submit` (or
    with --ray-address) the job runs on that cluster; otherwise Ray starts on this machine for the length of the job.

    Prompt files may have these columns (aliases in brackets): prompt [prompts, text, caption], prompt_id [id,
    custom_id], negative_prompt, seed (-1: none), num_images [n], width, height, size (1024x768), num_inference_steps
    [steps, step], guidance_scale [cfg_scale, cfg, cfgs]; case, spaces, _ and - do not matter. Other columns are passed
    through. In a .txt file each line is a prompt. docs/prompt-files.md has the details.

    Exit codes: 0 complete; 1 error; 2 a command line that does not parse; 3 complete, but some rows were quarantined; 4 a cap was reached;
    5 interrupted, resumable.
    """

    prompts: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PATH|URL ...")]
    """Prompt files: txt, csv, tsv, json, jsonl (also .gz), parquet; paths, folders, globs, s3:// URLs and prefixes."""

    output: Annotated[str, tyro.conf.arg(metavar="DIR|URL")]
    """Output folder, or s3://bucket/prefix. All nodes must see it."""

    model: Annotated[str, tyro.conf.arg(metavar="NAME|PATH")] = "default"
    """`default` or `baseline` (models in the package), a .safetensors file, a diffusers directory, or
    python:MODULE:FACTORY for your own generator."""

    format: Format = "parquet"
    """How images are stored: parquet files, webdataset tars, or plain PNG files named by prompt id."""

    images_per_prompt: int = 1
    """For rows without a num_images column."""

    seed: int = 0
    """Job seed; an image's own seed follows from it, the prompt id and the image index."""

    shard_size: Annotated[str, tyro.conf.arg(metavar="N|SECONDSs")] = "256"
    """Images per shard, or a target duration such as 60s (a short calibration then sets the number)."""

    workers: Annotated[str, tyro.conf.arg(metavar="N|MIN:MAX")] = "auto"
    """Number of workers, or a range for autoscaling: 0:8 holds nothing while nothing waits, and asks for nodes only as
    far as there is work for them. auto: one per device; where all devices are yet to come, one for each that the cluster
    says may come, or 0:8 if it does not say."""

    device: Device = "auto"
    """What workers run on. auto: GPUs where the cluster has some, or where its autoscaler can start a node with one
    (asked when there is work to do); else CPUs, except for a diffusers pipeline too heavy for them. The log says what was
    decided and why. gpu: GPUs, or an error where none can come. cpu: never a GPU."""

    gpus_per_worker: float | None = None
    """GPUs each worker asks for, may be fractional. Default: 1, or 0 on CPUs."""

    cpus_per_worker: float = 1.0
    """CPUs each worker asks for, and threads it computes with."""

    batch_size: int | None = None
    """Images per call of the model. Default: what suits the model on the device."""

    resources: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=AMOUNT ...")] = ()
    """Custom Ray resources each worker asks for."""

    lease_seconds: float = 120.0
    """A worker without progress (a step or batch of images, a part of a file stored) for this long loses its shard to
    another; after twice as long it is replaced."""

    speculate: bool = True
    """Do not let idle workers race stragglers at the end of the job."""

    prompt_column: str | None = None
    """Exact name of the prompt column where it is none of the known ones, or one of several."""

    delimiter: Annotated[str | None, tyro.conf.arg(metavar="CHAR|comma|semicolon|pipe|tab")] = None
    """What stands between the fields of csv and tsv files. Default: what the header shows."""

    duplicate_ids: DuplicatePolicy = "error"
    """What to do with a prompt id that stands twice: refuse, keep the first row, or add ~2, ~3 to the later ones."""

    max_prompt_chars: int = 10_000
    """Longer prompts are rejected, row by row."""

    dry_run: bool = False
    """Plan, draw a few images, and print what the whole job would take in time, energy, money and bytes."""

    max_kwh: float | None = None
    """Stop leasing when the job, earlier runs included, will have used this much: shards at work are finished, exit
    code 4, resumable. Counted by the energy counters; a worker without one counts by its estimate, and that is said."""

    max_cost: float | None = None
    """The same in your currency, for electricity; needs --price-per-kwh."""

    max_gco2: float | None = None
    """The same in grams of CO2e; needs --gco2-per-kwh."""

    deadline: str | None = None
    """The same in time: a duration of this run such as 90m or 2h, or a time with its zone (2026-03-01T18:00+01:00)."""

    rates: Annotated[RateOptions, tyro.conf.arg(name="")] = field(default_factory=RateOptions)

    node_meter: Annotated[str | None, tyro.conf.arg(metavar="ipmi|redfish:URL|FILE")] = None
    """Read the nodes' own meters while the job runs, to check the devices' counters (C3): ipmi (ipmitool as root, on
    every node), redfish:https://bmc-{host}/redfish/v1/Chassis/1, or a TOML file that names a meter per node, with
    login and certificate (docs/meters.md). A meter that cannot be read is missing and never ends the job."""

    node_rest: Annotated[str | None, tyro.conf.arg(metavar="W+-W")] = None
    """Watts of a node that no counter sees (fans, board, network cards, losses), and by how much that may be wrong, such
    as 180+-30; without it nodes cannot close. In a FILE: rest_watts and rest_tolerance_watts."""

    telemetry: bool = True
    """Read no energy counter, sample no power, write no live tables and no metrics: the job's energy is missing.
    The finished tables are written and say so."""

    retry_failed: bool = False
    """Give quarantined rows of a finished job one more try, as new shards."""

    ray_address: str | None = None
    """Ray cluster to join, e.g. auto or ray-head:6379. Default: RAY_ADDRESS, else a local one."""

    quiet: bool = False
    """No progress, only warnings and the result."""


def run(options: GenerateOptions, worker_class: Any = None) -> int:
    """The whole job; returns the exit code. `worker_class`: the Ray actor class, default the product's own."""
    from millijoule.jobs.node_meter_options import parse_node_meters
    from millijoule.jobs.set_up import ray_cluster
    from millijoule.jobs.set_up.job import WorkerRequest, caps, has_work, open_or_plan, validate
    from millijoule.pipeline.closing.finish import finish_job
    from millijoule.pipeline.running.head_watch import HeadWatch
    from millijoule.pipeline.running.live_metrics import LiveMetrics
    from millijoule.pipeline.running.progress import Progress
    from millijoule.pipeline.running.run import JobRun
    from millijoule.pipeline.running.spending import Spending
    from millijoule.workers.actor import remote_worker_class
    from millijoule.workers.storage.open import open_store
    from millijoule.workers.visible_text import visible

    validate(options)
    store = open_store(options.output)
    with ray_cluster.cluster(options.ray_address):
        if options.dry_run:
            from millijoule.jobs.set_up.dry_run import dry_run

            return dry_run(options, store)
        request = WorkerRequest(options)
        planned = open_or_plan(options, store, request)
        store = open_store(options.output, patient=True)  # a job at work waits for storage
        job_run = JobRun(
            store,
            planned,
            request.decide(lambda: has_work(store, planned)),
            worker_class or remote_worker_class(),
            lease_s=options.lease_seconds,
            speculate=options.speculate,
            batch_size=options.batch_size,
            spending=Spending(caps(options)),
            telemetry=options.telemetry,
            node_meters=parse_node_meters(options.node_meter, options.node_rest),
        )
        metrics = LiveMetrics(planned.job, job_run) if options.telemetry else None
        with (
            HeadWatch(ray_cluster.head_address(), _head_lost),
            Progress(planned.job, job_run, quiet=options.quiet) as progress,
            _signals(job_run),
        ):

            def tick() -> None:
                progress.tick()
                if metrics:
                    metrics.tick()

            try:
                job_run.run(on_tick=tick)
            finally:
                for node in job_run.pool.nodes.faulty:
                    print(f"{node}", file=sys.stderr)
        if metrics:
            metrics.publish()
    if job_run.given_up:
        for shard_id, error in sorted(job_run.given_up.items())[:20]:
            print(visible(f"shard {shard_id} could not be made: {error}"), file=sys.stderr)
        print(
            f"{len(job_run.given_up)} of {len(planned.shards)} shards could not be made; run the same command again "
            "once the cause is mended",
            file=sys.stderr,
        )
        return ERROR
    if not job_run.complete and job_run.cap_reached:
        print(
            f"cap reached: {job_run.cap_reached}. Shards left: {job_run.remaining}; with a higher cap, or a later "
            "deadline, the same command resumes the job",
            file=sys.stderr,
        )
        return CAP_REACHED
    if not job_run.complete:
        print(
            f"interrupted: {job_run.remaining} shards left; run the same command again to resume",
            file=sys.stderr,
        )
        return INTERRUPTED
    began = time.monotonic()
    stats = finish_job(store, planned.job, planned.shards)
    progress.result(stats, finish_seconds=time.monotonic() - began)
    return QUARANTINED if stats["images_quarantined"] or stats["input_rows_rejected"] else COMPLETE


def _head_lost(reason: str) -> None:
    """End this process at once: without its head Ray answers no call, and ends the driver by itself only much later."""
    print(
        f"error: the head of the Ray cluster is gone ({reason}). Nothing that was committed is lost: run the same command "
        "again, on this cluster when it is back or on another one, to resume",
        file=sys.stderr,
        flush=True,
    )
    os._exit(ERROR)


@contextmanager
def _signals(job_run) -> Iterator[None]:
    """Ctrl-C lets running shards finish, a second one does not wait; SIGTERM (`ray job stop`) never waits.

    Set after Ray started: it installs handlers of its own.
    """

    def interrupt(signum: int, _frame) -> None:
        if signum == signal.SIGTERM or job_run.draining:
            job_run.stop_now()
            return
        print("\nfinishing the shards at work; press Ctrl-C again to stop at once", file=sys.stderr)
        job_run.drain("interrupted")

    before = {s: signal.signal(s, interrupt) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def main(argv: list[str] | None = None) -> int:
    return run_command("generate", GenerateOptions, run, argv)


if __name__ == "__main__":
    sys.exit(main())
