"""`millijoule generate`: prompts in, images and a joule ledger out. `run` reads top to bottom as the story of a job."""

from __future__ import annotations

import inspect
import logging
import os
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from millijoule.jobs import entry
from millijoule.jobs.job_result import JobResult
from millijoule.jobs.set_up.options import GenerateOptions, option_words, options_of, parameters
from millijoule.workers.counted import counted

if TYPE_CHECKING:
    from millijoule.jobs.set_up.request import JobRequest
    from millijoule.pipeline.running.run import JobRun

#: Exit code by how a job ended.
EXIT_CODES = {
    "complete": entry.COMPLETE,
    "complete_with_quarantined": entry.QUARANTINED,
    "cap_reached": entry.CAP_REACHED,
    "interrupted": entry.INTERRUPTED,
    "superseded": entry.SUPERSEDED,
    "planned": entry.COMPLETE,
}


def run(
    request: JobRequest, worker_class: Any = None, on_head_lost: Callable[[str], None] | None = None
) -> JobResult:
    """The whole job.

    Args:
        worker_class: the Ray actor class, default the product's own.
        on_head_lost: called, in a thread of its own, with the reason once the cluster's head is gone; default: a JobError, once the job is set up.

    Raises:
        MillijouleError: the job cannot be done, or not go on, before a person acts.
    """
    from millijoule.jobs.set_up import ray_cluster
    from millijoule.jobs.set_up.dry_run import dry_run
    from millijoule.jobs.set_up.job import set_up_job, within_reach
    from millijoule.jobs.set_up.pools import policy_of
    from millijoule.pipeline.closing.finish import finish_job
    from millijoule.pipeline.energy.carbon import Rates
    from millijoule.pipeline.output.kept_rates import keep_rates
    from millijoule.pipeline.running.head_watch import HeadLoss, head_watched
    from millijoule.pipeline.running.live_metrics import LiveMetrics
    from millijoule.pipeline.running.progress import Progress
    from millijoule.pipeline.running.run import JobRun
    from millijoule.pipeline.running.spending import Spending
    from millijoule.pipeline.telemetry.collector import exported
    from millijoule.workers.actor import remote_worker_class
    from millijoule.workers.storage.open import open_store

    began, options = time.monotonic(), request.options
    store = open_store(options.output)
    with quietly(options.quiet), ray_cluster.connected(options.ray_address) as cluster:
        # from here on: whatever calls Ray meanwhile waits for a head that is gone without end
        head_loss = HeadLoss(on_head_lost)
        with head_watched(ray_cluster.head_address(), head_loss):
            if options.dry_run:
                plan = dry_run(request, cluster)
                seconds = time.monotonic() - began
                return JobResult("planned", store.url, 0, 0, plan.n_bad_rows, plan.n_shards, seconds)
            planned, workers, pools = set_up_job(request, store, cluster)
            store = open_store(options.output, patient=True)  # a job at work waits for storage
            job_run = JobRun(
                store,
                planned,
                workers,
                worker_class or remote_worker_class(),
                lease_s=options.lease_seconds,
                speculate=options.speculate,
                part_s=options.part_seconds,
                source=within_reach(request.source, store, cluster),
                spending=Spending(request.caps),
                telemetry=options.telemetry,
                node_meters=request.node_meters,
                fleet=policy_of(request, pools),
            )
            head_loss.tell(job_run.lose_head)
            keep_rates(store, Rates(request.caps.carbon, request.caps.price, options.rates.pue))
            metrics = LiveMetrics(planned.job, job_run) if options.telemetry else None
            with (
                Progress(planned.job, job_run, quiet=options.quiet) as progress,
                signals_heeded(job_run),
                exported(request.otlp_endpoint, planned.job, job_run) as export,
            ):

                def tick() -> None:
                    progress.tick()
                    export()
                    if metrics:
                        metrics.tick()

                job_run.run(on_tick=tick)
        if metrics:
            metrics.publish()
    later = job_run.superseded
    if job_run.complete and later is None:
        totals = finish_job(store, planned.job, planned.shards)
        return JobResult.of_complete(store.url, totals, time.monotonic() - began)
    return JobResult(
        status="superseded" if later else "cap_reached" if job_run.cap_reached else "interrupted",
        output=store.url,
        images=job_run.counts.images_done,
        images_quarantined=job_run.counts.quarantined_this_run,
        rows_rejected=planned.job.bad_rows,
        shards_left=job_run.coordinator.remaining,
        seconds=time.monotonic() - began,
        reason=f"superseded by {later}" if later else job_run.cap_reached or "interrupted",
        images_filtered=job_run.counts.filtered_this_run,
    )


@contextmanager
def quietly(quiet: bool) -> Iterator[None]:
    """Where `quiet`, nothing below a warning is logged by the product meanwhile."""
    product = logging.getLogger("millijoule")
    before = product.level
    if quiet:
        product.setLevel(logging.WARNING)
    try:
        yield
    finally:
        product.setLevel(before)


@contextmanager
def signals_heeded(job_run: JobRun) -> Iterator[None]:
    """Ctrl-C lets running shards finish, a second one does not wait; SIGTERM (`ray job stop`) never waits.

    Set after Ray started: it installs handlers of its own. Outside the main thread, which alone may set any, none is.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(signum: int, _frame: Any) -> None:
        if signum == signal.SIGTERM or job_run.pool.draining:
            job_run.stop_now()
            return
        print("\nfinishing the shards at work; press Ctrl-C again to stop at once", file=sys.stderr)
        job_run.pool.drain("interrupted")

    before = {s: signal.signal(s, interrupt) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


# -- from Python ------------------------------------------------------------------------------------------------------


def generate(
    **options: Any,
) -> JobResult:  # signature and the rest of the docstring follow from the options, below
    """Make images from prompt files on a Ray cluster, and account for the energy.

        from millijoule.jobs import generate

        result = generate(prompts="prompts.csv", output="out/")
        print(result.status, result.images, result.joules_per_image)

    The options are those of the command. Call it again with the same ones to resume: finished shards are kept, whatever
    was killed. Where `ray.init` was called before, the job runs on that cluster, which stays; else on the one that
    `ray_address` or RAY_ADDRESS names, or on this machine for the length of the call.

    In the main thread Ctrl-C (a notebook's stop) lets the shards at work finish and returns; a second one does not wait.
    Should the cluster's head die, JobError is raised; where the cluster was the caller's, Ray itself ends this process
    some time later, unless the caller calls `ray.shutdown()`.

    Returns:
        JobResult: status, counts, energy, and where the results are.

    Raises:
        TypeError: an option has an unknown name; the message names those near it.
        MillijouleError: the job cannot be done, or not go on, before a person acts. What was committed stays.
    """
    from millijoule.jobs.set_up.request import request_of

    return run(request_of(options_of(options)))


def _describe_options() -> None:
    words = (
        textwrap.fill(f"{name}: {text}", 110, initial_indent=" " * 8, subsequent_indent=" " * 12)
        for name, text in option_words().items()
    )
    before, returns, after = inspect.cleandoc(generate.__doc__ or "").partition("Returns:")
    options = textwrap.dedent("\n".join(("    Args:", *words)))
    generate.__doc__ = f"{before}{options}\n\n{returns}{after}"
    setattr(generate, "__signature__", inspect.Signature(parameters(), return_annotation=JobResult))  # noqa: B010


_describe_options()


# -- from the command line --------------------------------------------------------------------------------------------


def run_options(options: GenerateOptions) -> int:
    """Run what the command line says, and say how it ended; returns the exit code."""
    from millijoule.jobs.set_up.request import request_of
    from millijoule.pipeline.running.progress import closing_lines

    result = run(request_of(options), on_head_lost=_end_process)
    if result.totals is not None:
        lines = closing_lines(result.totals, result.output, hints=not options.quiet)
    elif result.status == "cap_reached":
        lines = [
            f"cap reached: {result.reason}. Shards left: {result.shards_left}; with a higher cap, or a later "
            "deadline, the same command resumes the job"
        ]
    elif result.status == "interrupted":
        lines = [
            f"interrupted: {counted(result.shards_left, 'shard')} left; run the same command again to resume"
        ]
    elif result.status == "superseded":
        lines = [
            f"{result.reason}, which finishes the job; give the command again only if that run ends without finishing it"
        ]
    else:
        lines = []
    for line in lines:
        print(line, file=sys.stderr)
    return EXIT_CODES[result.status]


def _end_process(reason: str) -> None:
    """End this process at once: without its head Ray answers no call, and ends the driver by itself only much later."""
    from millijoule.pipeline.running.run import HEAD_LOST

    print(f"error: {HEAD_LOST.format(reason)}", file=sys.stderr, flush=True)
    os._exit(entry.ERROR)


def main(argv: list[str] | None = None) -> int:
    return entry.run_command("generate", GenerateOptions, run_options, argv)


if __name__ == "__main__":
    sys.exit(main())
