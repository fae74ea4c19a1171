"""One storm over one job: real processes on a forked cluster, faults as the seed says, and the oracle at the end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from itertools import count, pairwise
from pathlib import Path
from typing import Any

from support import boards, random_runs
from support.chaos import inside, oracle
from support.chaos.damage import WorldWithFiles
from support.chaos.faults import INSIDE, MAY_HIDE_ENERGY, WRONG_PIXELS, Fault, Round, Storm
from support.counter_judge import judge
from support.fault_plans import DriverPlan
from support.forked_cluster import Driver, Node

from millijoule.pipeline.running import pool, preemption
from millijoule.workers import scratch
from millijoule.workers.attempts import parts
from millijoule.workers.meters import meter

#: Drivers that follow when those of the plan did not finish the job; a new one begins with a clean slate of nodes.
MORE_DRIVERS = 8

#: A counter that stands still for so long is taken for broken; as short as the jobs are.
STALL_S = 0.1

#: A worker whose device hangs in its first call is waited for so long.
START_MOST_S = 8.0

#: What a run's folder may hold.
_OURS = {
    *("out", "hosts", "prompts.txt", "passed", "armed", "ill", "injected", "log"),
    *("check.json", "result.json", "tmp"),
}
_END_SIGNALS = {
    "driver killed": signal.SIGKILL,
    "driver terminated": signal.SIGTERM,
    "driver interrupted": signal.SIGINT,
}


class StormWorld(WorldWithFiles):
    """A world of `random_runs` whose plan is a storm."""

    def __init__(self, storm: Storm, folder: Path) -> None:
        super().__init__(storm.plan, folder)
        self.storm = storm
        self.done_s: float | None = (
            None  # of drivers and what is done between them, until the job was finished
        )

    def run(self) -> None:
        began = time.monotonic()
        for i in range(len(self.plan.hosts)):
            self._join(i)
        rounds = list(self.storm.rounds)
        more = MORE_DRIVERS
        while rounds or (self.codes[-1] not in (0, 3) and more):
            if not rounds:
                more -= 1
            self._run_round(rounds.pop(0) if rounds else Round())
            if self.codes[-1] in (0, 3):
                self.done_s = time.monotonic() - began - self.paused_s
            if self.codes[-1] in (0, 3) and all(r.end is None for r in rounds):
                break
        if any(f.kind == "second driver" for r in self.storm.rounds for f in r.faults):
            self._run_driver(DriverPlan())  # the one that came too late may have records to write
        until = time.monotonic() + 2 * self.cluster.owner_most_s + 1.0
        while self.cluster.actors and time.monotonic() < until:
            self.cluster.turn()
        self.problems += [f"worker {a.name} outlived its job" for a in self.cluster.actors.values()]
        self.cluster.close()

    def _run_round(self, round_: Round) -> None:
        mend = [self.before(kind) for kind in round_.before]
        twin_after_s = None
        for fault in round_.faults:
            if fault.kind == "second driver":
                twin_after_s = fault.at_s
            else:
                self._later(fault.at_s, partial(self._strike, fault))
        if round_.end is not None:
            self._later(0.05, partial(self._end_driver, *round_.end))
        if twin_after_s is not None:
            self._later(twin_after_s, lambda: self.ground.write("second driver"))
        reboot = tuple(
            h
            for b in round_.before
            if b == "host started anew"
            for h in [self.rng.randrange(len(self.boots))]
        )
        if reboot:
            for path in self.ground.ill.iterdir():
                path.unlink()  # counters are well again after a boot
        self._run_driver(DriverPlan(reboot=reboot, twin_after_s=twin_after_s))
        for act in mend:
            act()

    def _later(self, at_s: float, act: Callable[[], None]) -> None:
        begun = len(self.codes)
        self.cluster.at(at_s, lambda: act() if len(self.codes) == begun else None)

    def _end_driver(self, kind: str, commits: int) -> None:
        if len(list(self.folder.glob("out/_job/commits/*/*.json"))) < commits:
            self._later(0.01, partial(self._end_driver, kind, commits))
        elif self._signal_driver(_END_SIGNALS[kind]):
            self.ground.write(kind)

    def _signal_driver(self, signum: int, driver: Driver | None = None) -> bool:
        driver = driver or (self.cluster.drivers[-1] if self.cluster.drivers else None)
        if driver is None or driver.returncode is not None:
            return False
        os.kill(driver.pid, signum)
        return True

    def _strike(self, fault: Fault) -> None:
        """The moment of `fault` has come; where there is nobody to strike it waits a little."""
        kind, done = fault.kind, False
        if kind in INSIDE or kind == WRONG_PIXELS:
            self.ground.arm(kind)
            return
        if kind.startswith("worker ") or kind == "reader killed":
            done = self._signal_actor(fault)
        elif kind == "driver stopped for a while":
            done = self._signal_driver(signal.SIGSTOP)
            self.cluster.at(
                fault.seconds, partial(self._signal_driver, signal.SIGCONT, self.cluster.drivers[-1])
            )
        elif kind in ("node lost", "node preempted"):
            done = any(n.alive and not n.draining for n in self.cluster.nodes)
            self._lose(kind == "node preempted", fault.seconds if kind == "node lost" else 0.0)
            self._later(0.6, self._join_missing)
        elif kind == "node drained":
            staying = [n for n in self.cluster.nodes if n.alive and not n.draining]
            done = bool(staying)
            if staying:
                self.cluster.drain(self.rng.choice(staying), fault.seconds)
                self._later(fault.seconds + 0.4, self._join_missing)
        elif kind == "counter reset":
            self.rng.choice(self.boards()).reset()
            done = True
        else:
            done = self.spoil_files(kind)
        if done:
            self.ground.write(kind)
        else:
            self._later(0.1, partial(self._strike, fault))

    def _signal_actor(self, fault: Fault) -> bool:
        first = "r" if fault.kind == "reader killed" else "w"
        pids = sorted(
            a.pid for a in self.cluster.actors.values() if a.pid and a.name[0] == first and not a.gone
        )
        if not pids:
            return False
        pid = self.rng.choice(pids)
        signum = {"worker stopped for a while": signal.SIGSTOP, "worker terminated": signal.SIGTERM}.get(
            fault.kind, signal.SIGKILL
        )
        try:
            if fault.kind == "worker taken for memory":
                self.cluster.take_for_memory(pid)
            else:
                os.kill(pid, signum)
        except ProcessLookupError:
            return False
        if signum == signal.SIGSTOP:
            self.cluster.at(fault.seconds, partial(self._wake, pid))
        return True

    def _wake(self, pid: int) -> None:
        if any(a.pid == pid for a in self.cluster.actors.values()):
            os.kill(pid, signal.SIGCONT)

    def _join_missing(self) -> None:
        for i in range(len(self.plan.hosts)):
            if not any(n.alive and not n.draining and n.folder == self._host(i) for n in self.cluster.nodes):
                self._join(i)


def run_storm(storm: Storm, folder: Path, undisturbed: dict[str, Any] | None) -> dict[str, Any]:
    """One whole storm in this process and its children, judged."""
    enter_host = random_runs.enter_host

    def enter(node: Node | None, plan: Any, where: Path) -> None:
        enter_host(node, plan, where)
        meter.STALL_AFTER_NS = int(STALL_S * 1e9)
        pool.START_MOST_S = START_MOST_S
        preemption.LOOK_PERIOD_S, preemption.LAST_WORDS_S, parts.LEAST_REST_S = 0.1, 0.3, 0.02
        inside.install(where, worker=node is not None)

    random_runs.enter_host = enter
    began = time.monotonic()
    world = StormWorld(storm, folder)
    world.run()
    seconds = time.monotonic() - began
    problems = world.problems
    out = folder / "out"
    kinds = [line["kind"] for line in world.ground.written()]
    verdict = judge(
        *(out, {b.uuid: (world.boots_of(b), b.records()) for b in world.boards()}, world.cluster.names),
        world.lost_books,
    )
    problems += verdict.problems
    if world.hung:
        problems.append("a driver hung")
    if verdict.outcome == "unfinished":
        problems.append(f"unfinished: drivers ended with {world.codes}")
    else:
        problems += oracle.image_problems(
            out, storm.plan.prompts, undisturbed["hashes"] if undisturbed else None
        )
        problems += world.check()
        world.damage_objects(storm.after)
        if verdict.outcome == "missing" and not set(kinds) & MAY_HIDE_ENERGY:
            problems.append(f"energy is missing though its counters could be read: {verdict.reasons}")
    scratch_left = len(os.listdir(folder / "tmp"))
    for host in (None, *(f"host-{i}" for i in range(len(storm.plan.hosts)))):
        scratch.remove_abandoned(folder / "tmp", host)  # as the next process with files there does
    problems += (f"scratch that nobody removes: {name}" for name in os.listdir(folder / "tmp"))
    problems += oracle.stray_files(folder, _OURS)
    problems += oracle.orphans(os.getsid(0))
    spent = sum(
        after.value_mj - before.value_mj
        for board in world.boards()
        for records in [board.records()]
        for before, after in pairwise(records)
        if after.kind == boards.SPEND
    )
    kinds = [line["kind"] for line in world.ground.written()]
    result = {
        "run": storm.seed,
        "shape": storm.shape,
        "faults": kinds,
        "outcome": verdict.outcome,
        "codes": world.codes,
        "processes": len(world.cluster.names),
        "seconds": round(seconds, 2),
        "done_s": round(world.done_s or seconds, 3),
        "spent_mj": spent,
        "certified_mj": verdict.total_mj,
        "scratch_left": scratch_left,
        "problems": problems,
    }
    if undisturbed is None:
        result["hashes"] = oracle.hashes(out)
    return result


def run_in_child(storm: Storm, folder: Path, undisturbed: dict[str, Any] | None) -> dict[str, Any]:
    """The same in a session of its own; `folder` stays where there were problems."""
    os.waitpid(begin(storm, folder, undisturbed), 0)
    return result_of(storm, folder)


def begin(storm: Storm, folder: Path, undisturbed: dict[str, Any] | None) -> int:
    """Start `run_storm` in a session of its own, the pid of which is returned; `result_of` takes what it has left."""
    if folder.exists():  # what an earlier call left unfinished, or with a problem, stays beside it
        names = (folder.with_name(f"{folder.name}.{i}") for i in count())
        folder.rename(next(path for path in names if not path.exists()))
    folder.mkdir(parents=True)
    (folder / "tmp").mkdir()
    return random_runs.fork_run(folder, folder / "tmp", lambda: run_storm(storm, folder, undisturbed))


def result_of(storm: Storm, folder: Path) -> dict[str, Any]:
    """What a run that has ended has left; its folder is removed, unless there were problems."""
    try:
        result = json.loads((folder / "result.json").read_text())
    except (OSError, ValueError):
        tail = (folder / "log").read_text()[-3000:]
        result = {
            "run": storm.seed,
            "shape": storm.shape,
            "faults": [],
            "problems": [f"the run itself failed:\n{tail}"],
        }
        result |= {"outcome": "unfinished", "seconds": 0.0, "spent_mj": 0, "processes": 0, "codes": []}
    if not result["problems"] and "MILLIJOULE_KEEP_RUNS" not in os.environ:
        shutil.rmtree(folder)
    return result
