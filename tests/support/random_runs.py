"""Whole jobs in which processes, nodes and drivers die, judged by the counters of the boards and nothing else.

`python -m support.random_runs RUNS FOLDER [AT_ONCE] [RECORD]`, RUNS such as `0:300` (seeds), `7,9` or names of
`fault_plans.KNOWN`; prints one JSON object per run, and writes their summary to RECORD. All modules are the product's own: driver (`JobRun` with pool, coordinator, accounts,
writer), workers, attempts, meters, counter book, life locks, commits, the end of the job and `check`. Only Ray is
`support.forked_cluster`, and constants of time are shorter. `support.counter_judge` judges.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from support import boards, spending_model
from support.counter_judge import judge
from support.fault_plans import KNOWN, DriverPlan, Plan, make_plan
from support.forked_cluster import ActorContext, Cluster, Driver, ForkedRay, Node

from millijoule.jobs.generate import signals_heeded
from millijoule.jobs.machine import describe_machine
from millijoule.jobs.measuring.measurement import write_result
from millijoule.jobs.options.model import ModelOptions
from millijoule.jobs.set_up.job import begin, open_or_plan
from millijoule.jobs.set_up.options import GenerateOptions
from millijoule.jobs.set_up.request import request_of
from millijoule.jobs.simulating.clocked_ray import install
from millijoule.pipeline.closing.check import check_output
from millijoule.pipeline.closing.finish import finish_job
from millijoule.pipeline.output import other_runs
from millijoule.pipeline.output.job import read_job
from millijoule.pipeline.running import accounts, coordinator, crew, node_health, outcomes, pool, run
from millijoule.pipeline.running.demand import PoolOptions
from millijoule.workers import actor as actor_module
from millijoule.workers import orphan
from millijoule.workers.actor import ShardWorker
from millijoule.workers.attempts import questions
from millijoule.workers.errors import JobError
from millijoule.workers.layout import CLOSINGS_PREFIX, SEGMENTS_PREFIX, WORKERS_PREFIX
from millijoule.workers.meters import nvml
from millijoule.workers.storage.local import LocalStore
from millijoule.workers.storage.open import open_store

MODEL = "python:support.spending_model:load"

#: A driver that needs longer hangs.
DRIVER_TIMEOUT_S = 120.0

# -- one job's world --------------------------------------------------------------------------------------------------


@dataclass
class World:
    """The processes of a seed, and its files: `out` is the job's output, `hosts/N` the folder of host N."""

    plan: Plan
    folder: Path
    rng: random.Random = field(init=False)
    cluster: Cluster = field(init=False)
    boots: list[int] = field(init=False)
    codes: list[int | None] = field(default_factory=list)
    hung: bool = False
    paused_s: float = 0.0  # between drivers

    def __post_init__(self) -> None:
        self.rng = random.Random(self.plan.seed + 1_000_000)
        self.cluster = Cluster(self.rng, self._actor_main, self.plan.owner_most_s, self.plan.kill_most_s)
        self.boots = [0] * len(self.plan.hosts)
        for i, n in enumerate(self.plan.hosts):
            boards.make_boards(self._host(i), n, f"{i}-")
        (self.folder / "prompts.txt").write_text("".join(p + "\n" for p in self.plan.prompts))
        (self.folder / "passed").mkdir()
        os.environ["MILLIJOULE_TEST_SLOW_S"] = str(self.plan.slow_s)
        os.environ["MILLIJOULE_TEST_DIR"] = str(self.folder)

    def run(self) -> None:
        """All drivers of the plan, and then further ones until the job is finished."""
        for i in range(len(self.plan.hosts)):
            self._join(i)
        plans = list(self.plan.drivers)
        while plans:
            self._run_driver(plans.pop(0))
            if not plans and self.codes[-1] not in (0, 3) and len(self.codes) < len(self.plan.drivers) + 3:
                plans.append(DriverPlan())
            if self.codes[-1] in (0, 3):
                break
        if self.plan.again or any(d.twin_after_s is not None for d in self.plan.drivers):
            # of two drivers the one that does not finish the job may have records to write after the other has
            self._run_driver(DriverPlan())
        until = time.monotonic() + 2 * self.cluster.owner_most_s
        while self.cluster.actors and time.monotonic() < until:
            self.cluster.turn()
        self.cluster.close()

    def check(self) -> list[str]:
        """What `check` finds, in a process of its own: it starts threads."""
        found = self.folder / "check.json"
        pid = os.fork()
        if pid == 0:
            try:
                found.write_text(json.dumps(list(check_output(open_store(str(self.folder / "out"))))))
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        return json.loads(found.read_text())

    def _host(self, i: int) -> Path:
        return self.folder / "hosts" / str(i)

    def _join(self, i: int) -> None:
        folder = self._host(i)
        names = tuple(b.uuid for b in boards.boards_of(folder))
        self.cluster.add_node(Node(f"host-{i}", folder, boot_id_of(i, self.boots[i]), names, cpus=8.0))

    def _run_driver(self, plan: DriverPlan) -> None:
        cluster = self.cluster
        for i in range(len(self.plan.hosts)):
            alive = [n for n in cluster.nodes if n.alive and n.folder == self._host(i)]
            if i in plan.reboot or i in plan.away:
                for node in alive:
                    cluster.lose_node(node)
                cluster.turn()
            if i in plan.reboot:
                cluster.end_processes(self._host(i))
                self.boots[i] += 1
                for board in boards.boards_of(self._host(i)):
                    board.reset(reboot=True)
                for name in self._host(i).glob("millijoule-*"):  # shared memory does not outlive a boot
                    name.unlink()
            # one that is draining has ended in a moment, and who would have brought another up may have gone with the last driver
            if i not in plan.away and (i in plan.reboot or all(n.draining for n in alive)):
                self._join(i)
        main = partial(drive, self.plan, plan, self.folder)
        driver = cluster.start_driver(main)
        twins: list[Driver] = []
        begun = len(self.codes)

        def if_running(act):
            return lambda: act() if len(self.codes) == begun else None

        for at_s in plan.kills:
            cluster.at(at_s, if_running(cluster.kill_worker))
        for at_s, preempted, linger_s in plan.losses:
            cluster.at(at_s, if_running(lambda p=preempted, s=linger_s: self._lose(p, s)))
        for at_s in plan.joins:
            cluster.at(at_s, if_running(lambda: self._join(self.rng.randrange(len(self.plan.hosts)))))
        for at_s in plan.resets:
            cluster.at(at_s, if_running(lambda: self.rng.choice(self.boards()).reset()))
        if plan.twin_after_s is not None:
            cluster.at(plan.twin_after_s, if_running(lambda: twins.append(cluster.start_driver(main))))
        if plan.end is not None:
            how, at_s = plan.end
            signum = {"kill": signal.SIGKILL, "term": signal.SIGTERM}.get(how, signal.SIGINT)

            def signal_driver() -> None:
                if driver.returncode is None:  # a twin may still be at work when it is not
                    os.kill(driver.pid, signum)

            def end() -> None:
                commits = len(list(self.folder.glob("out/_job/commits/*/*.json")))
                if commits < (plan.end_at_commits or 0):
                    cluster.at(0.01, if_running(end))
                    return
                signal_driver()
                if how == "int-int":
                    cluster.at(0.1, if_running(signal_driver))

            cluster.at(at_s, if_running(end))
        for one in chain([driver], twins):  # a twin may come while the first is waited for
            if not cluster.run(one, DRIVER_TIMEOUT_S):
                self.hung = True
        self.codes.append(twins[0].returncode if twins else driver.returncode)
        pause_s = self.rng.choice((0.0, 0.0, 0.2, 0.7))
        self.paused_s += pause_s
        pause = time.monotonic() + pause_s
        while time.monotonic() < pause:
            cluster.turn()

    def _lose(self, preempted: bool, linger_s: float) -> None:
        """A node goes, the last one too; a preempted one is told to drain a moment before."""
        alive = [n for n in self.cluster.nodes if n.alive and not n.draining]
        if not alive:
            return
        node = self.rng.choice(alive)
        if preempted:
            node.draining = node.preempted = True
        self.cluster.at(
            0.2 if preempted else 0.0, lambda: self.cluster.lose_node(node, 0.0 if preempted else linger_s)
        )
        if len(alive) == 1:  # or nothing could ever go on
            self.cluster.at(0.3, lambda: self._join(self.rng.randrange(len(self.plan.hosts))))

    def boots_of(self, board: boards.Board) -> list[str]:
        host = int(board.path.parents[1].name)
        return [boot_id_of(host, boot) for boot in range(self.boots[host] + 1)]

    def boards(self) -> list[boards.Board]:
        return [b for i in range(len(self.plan.hosts)) for b in boards.boards_of(self._host(i))]

    def _actor_main(self, context: ActorContext, arguments: tuple) -> Any:
        enter_host(context.node, self.plan, self.folder)
        actor_module.ray = context
        return _Worker(*arguments)


def boot_id_of(host: int, boot: int) -> str:
    return f"boot-{host}-{boot}"


def enter_host(node: Node | None, plan: Plan, folder: Path) -> None:
    """This process is on `node`, in a world whose constants of time are shorter, and dies where the plan says."""
    pool.TICK_S, outcomes.STATUS_PERIOD_S = 0.04, 0.15
    pool.CUT_OFF_S, pool.STOP_TIMEOUT_S, crew.STOP_TIMEOUT_S = 1.0, 10.0, 10.0
    coordinator.SPECULATION_MIN_S, coordinator.SECOND_OPINION_PATIENCE_S = 0.3, 1.0
    node_health.DEATH_PAUSE_FIRST_S, node_health.FAULT_PAUSE_FIRST_S = 0.02, 0.05
    accounts.CLOSE_TIMEOUT_S, accounts.CUT_OFF_TIMEOUT_S, actor_module.GONE_TIMEOUT_S = 15.0, 4.0, 3.0
    questions.PROBE_LINGER_S, orphan.ORPHAN_CHECK_S, run.FLUSH_PERIOD_S = 0.05, 0.3, 0.2
    other_runs.LATER_PERIOD_S, other_runs.PARTS_PERIOD_FIRST_S = 0.15, 0.1
    nvml.GpuCounter.__init__.__defaults__ = (1, None, plan.spacing_ms * 1_000_000, nvml.WATCH_PERIOD_NS)
    spending_model.passing = lambda point: pass_point(plan, folder, point)
    _wrap_store(lambda point: pass_point(plan, folder, point), of_driver=node is None)
    if node is not None:
        boards.install(node.folder, node.boot_id)
        os.environ["MILLIJOULE_TEST_BOARDS"] = str(node.folder)
        socket.gethostname = lambda: node.host


def pass_point(plan: Plan, folder: Path, point: str) -> None:
    """Die here, if this is the passing of `point` at which the plan says so; counts over all processes."""
    deaths = [n for name, n in plan.points if name == point]
    if not deaths:
        return
    file = os.open(folder / "passed" / point, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC)
    fcntl.flock(file, fcntl.LOCK_EX)
    os.write(file, b".")
    passed = os.fstat(file).st_size
    os.close(file)
    if passed in deaths:
        os.kill(os.getpid(), signal.SIGKILL)


def _wrap_store(passing, *, of_driver: bool) -> None:
    """Places before and after writes of this process to the store."""
    put, put_exclusive = LocalStore.put, LocalStore.put_exclusive

    def wrapped_put(self, key, data):
        before, after = {
            (WORKERS_PREFIX, False): ("before-account", "account"),
            (CLOSINGS_PREFIX, True): ("driver-closing", "driver-closed"),
            (SEGMENTS_PREFIX, True): ("driver-segments", ""),
        }.get((f"{key.rsplit('/', 1)[0]}/", of_driver), ("", ""))
        passing(before)
        put(self, key, data)
        passing(after)

    def wrapped_put_exclusive(self, key, data):
        commits = key.startswith("_job/commits/") and not of_driver
        passing("before-commit" if commits else "")
        put_exclusive(self, key, data)
        passing("after-commit" if commits else "")

    LocalStore.put, LocalStore.put_exclusive = wrapped_put, wrapped_put_exclusive


class _Worker(ShardWorker):
    """With places to die at the end of its life, and in that of a reader."""

    def stop(self):
        spending_model.passing("stopping")
        stopped = super().stop()
        spending_model.passing("stopped")
        return stopped

    def read_for(self, worker):
        spending_model.passing("reading")
        answer = super().read_for(worker)
        spending_model.passing("read")
        return answer

    def open_own_meter(self, gpus):
        opened = super().open_own_meter(gpus)
        if self.worker_id.startswith("r"):
            spending_model.passing("reader-opened")
        return opened


def drive(plan: Plan, own: DriverPlan, folder: Path, ray: ForkedRay) -> int:
    """A driver's process: what `jobs/generate.py` does, with the forked cluster for Ray."""
    enter_host(None, plan, folder)
    install(setattr, ray)
    options = GenerateOptions(
        prompts=(str(folder / "prompts.txt"),),
        output=str(folder / "out"),
        model=MODEL,
        shard_size=str(plan.shard_size),
        model_options=ModelOptions(batch_size=plan.batch_size),
    )
    store = open_store(options.output)
    request = request_of(options)
    existing = read_job(store)
    planned = open_or_plan(request, store, existing)
    if existing is None:
        planned = begin(store, planned)
    store = open_store(options.output, patient=True)
    all_boards = sum(plan.hosts) * round(1 / plan.gpus_per_worker)
    job_run = run.JobRun(
        store,
        replace(planned, exclusive=plan.exclusive),
        PoolOptions(1, own.max_workers or all_boards, 1.0, plan.gpus_per_worker),
        ray.actor_class,
        lease_s=plan.lease_s,
        speculate=plan.speculate,
        source=request.source,
        part_s=plan.part_s,
    )
    with signals_heeded(job_run):
        try:
            job_run.run()
        except JobError:
            return 1
    if job_run.superseded is not None:
        return 7
    if not job_run.complete:
        return 5
    stats = finish_job(store, planned.job, planned.shards)
    return 3 if stats["images_quarantined"] else 0


# -- many of them -----------------------------------------------------------------------------------------------------


def run_one(name: str, folder: Path) -> dict[str, Any]:
    """One whole job in this process and its children; what became of it, for people and for sums."""
    began = time.monotonic()
    world = World(KNOWN[name] if name in KNOWN else make_plan(int(name)), folder)
    world.run()
    history = {b.uuid: (world.boots_of(b), b.records()) for b in world.boards()}
    verdict = judge(folder / "out", history, world.cluster.names)
    if world.hung:
        verdict.problems.append("a driver hung")
    if verdict.outcome != "unfinished":
        verdict.problems += world.check()
    return {
        "run": name,
        "benign": world.plan.benign,
        "codes": world.codes,
        "processes": len(world.cluster.names),
        "seconds": round(time.monotonic() - began, 1),
        **asdict(verdict),
    }


def run_all(names: Sequence[str], folder: Path, at_once: int) -> Iterator[dict[str, Any]]:
    """Each run in processes of its own, some at a time; results as they come. What had problems stays in `folder`."""
    todo, running = list(names), {}
    while todo or running:
        while todo and len(running) < at_once:
            name = todo.pop(0)
            own = folder / name.replace(" ", "-")
            own.mkdir(parents=True)
            running[fork_run(own, own, partial(run_one, name, own))] = name, own
        pid, _ = os.waitpid(-1, 0)
        name, own = running.pop(pid)
        try:
            result = json.loads((own / "result.json").read_text())
        except (OSError, ValueError):
            problem = f"the run itself failed:\n{(own / 'log').read_text()[-3000:]}"
            result = {"run": name, "outcome": "unfinished", "benign": False, "problems": [problem]}
        if not result["problems"] and "MILLIJOULE_KEEP_RUNS" not in os.environ:
            shutil.rmtree(own)
        yield result


def fork_run(own: Path, tmp: Path, run: Callable[[], dict[str, Any]]) -> int:
    """Start `run` in a session of its own, the pid of which is returned; `own` gets its log and `result.json`, scratch goes to `tmp`."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        log = os.open(own / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ["TMPDIR"] = tempfile.tempdir = str(tmp)
        (own / "result.json").write_text(json.dumps(run()))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def summary(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Counts over runs. Of those that only kill workers and readers nearly all must be certified, or nothing is proven."""
    benign = [r for r in results if r["benign"]]
    others = [r for r in results if not r["benign"]]

    def outcomes(some: Sequence[dict[str, Any]]) -> dict[str, int]:
        return {o: sum(r["outcome"] == o for r in some) for o in ("certified", "missing", "unfinished")}

    return {
        "runs": len(results),
        "runs_in_which_something_certified_differs": sum(bool(r["problems"]) for r in results),
        "only_workers_and_readers_die": {"runs": len(benign), **outcomes(benign)},
        "nodes_drivers_and_counters_too": {"runs": len(others), **outcomes(others)},
        "processes": sum(r.get("processes", 0) for r in results),
        "drivers_that_died": sum(c < 0 for r in results for c in r.get("codes", ())),
        "certified_mj": sum(r["total_mj"] or 0 for r in results if r["outcome"] == "certified"),
        "why_missing": dict(Counter(_kind(w) for r in results for w in r.get("reasons", ())).most_common()),
    }


def _kind(reason: str) -> str:
    """A reason without the names in it."""
    return " ".join(reason.split(": ", 1)[1].split(": ")[:2])


def main(names: str, folder: str, at_once: str = "6", record: str | None = None) -> None:
    logging.basicConfig(
        level=logging.INFO, format="%(relativeCreated)d %(process)d %(levelname)s %(name)s: %(message)s"
    )
    first, colon, end = names.partition(":")
    wanted = [str(seed) for seed in range(int(first), int(end))] if colon else names.split(",")
    results = []
    for result in run_all(wanted, Path(folder), int(at_once)):
        results.append(result)
        print(json.dumps(result), flush=True)
    if record is not None:
        write_result(
            {"what": "random runs", "of": names, **summary(results), "environment": describe_machine()},
            record,
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
