"""The steps of `make gpu`, in order of worth: what waits for a GPU (`benchmarks/gpu-queue.md`), as commands with time limits.

A command is the same on a board and in a rehearsal on a CPU but for the words that are added there. A word may hold
`{folder}` (the step's own), `{results}` (all steps'), and `{minutes}` and `{seconds}`: what is left of the step's time when
the command starts, less `reserve_s`. Needs the standard library only: it is read before anything is installed.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass

#: What every step imports.
BASE = ("torch", "numpy", "pyarrow", "pillow", "rich", "safetensors", "tyro")
TESTS = ("pytest", "pytest-timeout")
ICONS = ("qtawesome",)
BASELINE = ("diffusers", "transformers")

#: Exit code of a `millijoule verify` that shows nothing yet.
NOT_SHOWN = 6

TOY_MODELS = "--a python:millijoule.jobs.gpu.rehearsal:noise --b python:millijoule.jobs.gpu.rehearsal:noise"
TOY_EVALUATION = "--prompts-per-family 1 --images-per-prompt 1 --device cpu"
NEW_BASELINE = "baseline-training/run/model"
TOY_BASELINE = f"--num-inference-steps 1 {TOY_EVALUATION}"


@dataclass(frozen=True)
class Command:
    """`words` follow the Python interpreter.

    Attributes:
        board: words added on a board.
        toy: words added in a rehearsal; None: not run there.
        accepted: exit codes that are no failure.
    """

    words: tuple[str, ...]
    board: tuple[str, ...] = ()
    toy: tuple[str, ...] | None = ()
    accepted: tuple[int, ...] = (0,)

    @property
    def end_with(self) -> signal.Signals:
        """The signal that asks it to end when time is over: pytest writes its results on Ctrl-C only."""
        return signal.SIGINT if self.words[:2] == ("-m", "pytest") else signal.SIGTERM


@dataclass(frozen=True)
class Step:
    """One check or measurement; its commands run one after the other, the first that fails ends it.

    Attributes:
        item: its number in the queue.
        seconds: with less time left than the first it is not begun: nothing useful would come of it; after the
            second it is ended.
        needs: packages beside `BASE`, by their names in registries.
        after: a path under the results that another step leaves and this one reads.
        reserve_s: kept from `{minutes}` and `{seconds}`, for starting, and for the commands that follow.
        grace_s: what it gets after it was asked to end, before it is killed; part of its time.
        training_steps: of a training; one that stands at fewer, in the log of `{folder}/run`, is not done.
        goes_on: what it has when its time is over is kept, and the next call continues it, as with every training.
    """

    name: str
    item: int
    what: str
    seconds: tuple[float, float]
    commands: tuple[Command, ...]
    needs: tuple[str, ...] = ()
    after: str = ""
    reserve_s: float = 0.0
    grace_s: float = 5.0
    training_steps: int = 0
    goes_on: bool = False

    def lines(self, rehearsal: bool) -> list[tuple[Command, tuple[str, ...]]]:
        """The commands that are run, each with all its words."""
        if rehearsal:
            return [(c, (*c.words, *c.toy)) for c in self.commands if c.toy is not None]
        return [(c, (*c.words, *c.board)) for c in self.commands]


def job(
    name: str, text: str, board: str = "", toy: str | None = "", accepted: tuple[int, ...] = (0,)
) -> Command:
    """`millijoule NAME TEXT...` as a command."""
    words = ("-m", f"millijoule.jobs.{name}", *text.split())
    return Command(words, tuple(board.split()), None if toy is None else tuple(toy.split()), accepted)


def _tests(file: str, toy: str = "") -> Command:
    options = "-v --durations 10 --noconftest -p no:cacheprovider --junit-xml {folder}/junit.xml"
    only = ("-k", toy) if toy else ()
    return Command(("-m", "pytest", *options.split(), f"tests/accelerator/{file}"), toy=only)


def _bench(text: str, toy: str) -> tuple[Command, ...]:
    return (job("bench", text, toy=toy),)


def _on_ray(gpus: str, workers: int) -> tuple[Command, ...]:
    output = "{folder}/work/out"
    generate = job(
        "generate",
        f"--prompts infra/demo_prompts.txt --output {output} --workers {workers} --quiet",
        board=f"--images-per-prompt 400 --shard-size 512 --gpus-per-worker {gpus}",
        toy="--shard-size 8 --gpus-per-worker 0 --cpus-per-worker 0.5",
    )
    return (
        generate,
        job("check", f"--output {output}"),
        job("report", f"{output} --json {{folder}}/report.json"),
    )


def _new_baseline(text: str, toy: str | None = TOY_BASELINE) -> Command:
    return job("evaluate", f"--model {{results}}/{NEW_BASELINE} --output {{folder}} {text}", toy=toy)


def _control(name: str, steps: int, minutes: float, what: str) -> Step:
    recipe = name.removesuffix("-long")
    train = job(
        "train",
        "--minutes {minutes} --resume --output {folder}/run --sample-every 0",
        board=f"--recipe {recipe} --steps {steps} --device cuda",
        toy="--recipe jobs/gpu/toy-oscillator.toml --device cpu",
    )
    evaluate = job(
        "evaluate",
        f"--model {{folder}}/run/model.safetensors --output {{folder}} --name {recipe}",
        toy=TOY_EVALUATION,
    )
    seconds = (150.0, 60 * minutes)
    return Step(
        *(name, 6, what, seconds, (train, evaluate), ICONS), reserve_s=75, grace_s=20, training_steps=steps
    )


STEPS = (
    Step(
        "accelerator-tests",
        item=1,
        what="tests/accelerator: the same bits, images and trainings as on a CPU",
        seconds=(45, 240),
        # trainings on a CPU take minutes: their lines are those of the tests of the trainers
        commands=(_tests("test_cuda.py", toy="core or renders or drives"),),
        needs=(*TESTS, *ICONS, *BASELINE),
        grace_s=10,
    ),
    Step(
        "joules-per-image",
        item=4,
        what="millijoule bench gpu: joules per image of default and baseline, by the board's counter",
        seconds=(130, 200),
        commands=_bench("gpu {folder}/gpu.json", f"--stand-in --seconds 0.4 --pause 0 {TOY_MODELS}"),
        needs=BASELINE,
    ),
    Step(
        "meter",
        item=3,
        what="the product's meter over a loaded minute, against the integral of power; its read-rate guard",
        seconds=(60, 110),
        commands=_bench(
            "counters {folder}/meter.json --parts meter --within {seconds}", "--within 90 --stand-in"
        ),
        reserve_s=20,
    ),
    Step(
        "ray-one-gpu",
        item=5,
        what="a job on Ray, one worker with the whole GPU; its books",
        seconds=(50, 120),
        commands=_on_ray("1", workers=1),
        needs=("ray",),
    ),
    Step(
        "ray-half-gpus",
        item=5,
        what="a job on Ray, two workers on one GPU: their energy adds up to its counter",
        seconds=(50, 120),
        commands=_on_ray("0.5", workers=2),
        needs=("ray",),
    ),
    Step(
        "counter",
        item=8,
        what="period, quantum and read rates of the counter, square waves, idle states, energy of starting",
        seconds=(130, 300),
        commands=_bench("counters {folder}/counter.json --within {seconds}", "--within 120 --stand-in"),
        reserve_s=10,
    ),
    Step(
        "baseline-training",
        item=2,
        what="a better baseline: recipe baseline-continued, 10,000 steps or as many as there is time for",
        seconds=(240, 600),
        commands=(
            job(
                "train",
                "--start-from workers/weights/baseline --minutes {minutes} --resume --output {folder}/run",
                board="--recipe baseline-continued --compile --device cuda",
                toy="--recipe jobs/gpu/toy-baseline.toml --device cpu",
            ),
            _new_baseline("--name baseline"),
        ),
        needs=(*ICONS, *BASELINE),
        reserve_s=90,
        grace_s=30,
        training_steps=10_000,
    ),
    Step(
        "un0-tests",
        item=7,
        what="images of converted Un-0 checkpoints on CUDA against a CPU's, with and without TF32",
        seconds=(25, 90),
        commands=(_tests("test_un0_cuda.py"),),
        needs=TESTS,
        grace_s=10,
    ),
    Step(
        "baseline-guidance",
        item=2,
        what="the new baseline at three guidance scales, on training combinations",
        seconds=(60, 240),
        commands=(
            _new_baseline("--split train --guidance-scale 2 --name guidance-2"),
            _new_baseline("--split train --guidance-scale 3 --name guidance-3", toy=None),
            _new_baseline("--split train --guidance-scale 4 --name guidance-4", toy=None),
        ),
        needs=(*ICONS, *BASELINE),
        after=NEW_BASELINE,
    ),
    Step(
        "baseline-quality",
        item=2,
        what="10,008 held-out images of the new baseline",
        seconds=(100, 300),
        commands=(_new_baseline("--name baseline --prompts-per-family 834 --images-per-prompt 2"),),
        needs=(*ICONS, *BASELINE),
        after=NEW_BASELINE,
    ),
    _control("control-drifting", 1000, 5, "the drifting loss at the controls' budget"),
    _control("control-readers-long", 10_000, 10, "the incomplete drive, ten times as long"),
    _control("control-readers-frozen-long", 10_000, 10, "the same with random couplings, ten times as long"),
    Step(
        "verify",
        item=9,
        what="millijoule verify at full length (an hour and more, in as many calls), then --check of its bundle",
        seconds=(200, 6000),
        commands=(
            job(
                "verify",
                "--output {folder}/comparison",
                board="--a default --b baseline",
                toy=f"{TOY_MODELS} --device cpu --blocks 4 --block-seconds 0.1 --warmup-cv 9 "
                "--prompts-per-family 1 --images-per-prompt 1 --min-images 1",
                accepted=(0, NOT_SHOWN),
            ),
            job("verify", "--check {folder}/comparison/bundle"),
        ),
        needs=(*ICONS, *BASELINE),
        goes_on=True,
    ),
    Step(
        "cost-of-telemetry",
        item=10,
        what="millijoule bench telemetry with the driver's own calls",
        seconds=(1500, 2400),
        commands=_bench(
            "telemetry {folder}/telemetry.json --workers 1 --images 200000",
            "--images 16 --quadruples 1 --stress-devices 1 --stress-seconds 1 --stress-hours 1",
        ),
        needs=("ray", "psutil"),
    ),
)
