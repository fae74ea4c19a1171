"""The steps of `make gpu`, in order of worth: what waits for a GPU (`benchmarks/gpu-queue.md`), as commands with time limits.

Each step has its commands as they run on a board, and the same commands at toy size, for rehearsals on a CPU. A word of a
command may hold `{folder}` (the step's own), `{results}` (all steps'), and `{minutes}` and `{seconds}`: what is left of the
step's time when the command starts, less `reserve_s`. Needs the standard library only: it is read before anything is installed.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass

#: What every step imports.
BASE = ("torch", "numpy", "pyarrow", "msgspec", "nvidia-ml-py", "pillow", "rich", "safetensors", "tyro")

#: An output in which only something is yet to be shown, see `millijoule verify`.
NOT_SHOWN = 6

PROMPTS = "infra/demo_prompts.txt"


@dataclass(frozen=True)
class Command:
    """`words` follow the Python interpreter; `accepted` are the exit codes that are no failure."""

    words: tuple[str, ...]
    accepted: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Step:
    """One check or measurement; its commands run one after the other, the first that fails ends it.

    Attributes:
        item: its number in the queue.
        shortest_s: with less time left it is not begun: nothing useful would come of it.
        longest_s: it is ended after this long.
        needs: packages beside `BASE`, by their names in registries.
        after: paths under the results that other steps leave and this one reads.
        reserve_s: kept from `{minutes}` and `{seconds}`, for starting, and for the commands that follow.
        grace_s: what it gets after `end_with`, before it is killed; part of its time.
        end_with: the signal that asks it to end when time is over.
        goes_on: what it has when its time is over is kept, and the next call continues it.
        training_steps: a training that stands at fewer, in the log of `{folder}/run`, is not done.
        in_rehearsal: files it needs at toy size, by their names in the step's folder.
    """

    name: str
    item: int
    what: str
    shortest_s: float
    longest_s: float
    commands: tuple[Command, ...]
    toy: tuple[Command, ...]
    needs: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    reserve_s: float = 0.0
    grace_s: float = 5.0
    end_with: int = signal.SIGTERM
    goes_on: bool = False
    training_steps: int = 0
    in_rehearsal: Mapping[str, str] | None = None


def job(name: str, text: str, accepted: tuple[int, ...] = (0,)) -> Command:
    """`millijoule NAME TEXT...` as a command."""
    return Command(("-m", f"millijoule.jobs.{name}", *text.split()), accepted)


def _pytest(*files: str) -> Command:
    words = "-m pytest -v --durations 10 --noconftest -p no:cacheprovider --junit-xml {folder}/junit.xml"
    return Command((*words.split(), *files))


TOY_OSCILLATOR = """
kind = "oscillator"
name = "toy"
[training]
steps = 2
scenes = 2
samples = 2
renders = 2
model = { channels = 4, driven = 4, read = 4, noise_channels = 4, rank = 2, hidden = 16, widths = [8, 8, 8], mix = 8 }
"""

TOY_BASELINE = """
kind = "diffusion"
name = "toy"
[training]
steps = 1
text_steps = 0
autoencoder_steps = 0
batch = 1
warm_up = 1
"""

TOY_MODEL = "python:millijoule.jobs.gpu.rehearsal:noise"
TOY_EVALUATION = "--prompts-per-family 1 --images-per-prompt 1 --device cpu"


def _ray_job(gpus: str, workers: int) -> tuple[Command, ...]:
    output = "{folder}/work/out"
    return (
        job(
            "generate",
            f"--prompts {PROMPTS} --output {output} --images-per-prompt 400 --shard-size 512 "
            f"--gpus-per-worker {gpus} --workers {workers} --quiet",
        ),
        job("check", f"--output {output}"),
        job("report", f"{output} --json {{folder}}/report.json"),
    )


def _toy_ray_job(workers: int) -> tuple[Command, ...]:
    output = "{folder}/work/out"
    return (
        job(
            "generate",
            f"--prompts {PROMPTS} --output {output} --shard-size 8 --gpus-per-worker 0 "
            f"--cpus-per-worker 0.5 --workers {workers} --quiet",
        ),
        job("check", f"--output {output}"),
        job("report", f"{output} --json {{folder}}/report.json"),
    )


def _control(name: str, steps: int, minutes: float, what: str) -> Step:
    return Step(
        name=name if steps == 1000 else f"{name}-long",
        item=6,
        what=what,
        shortest_s=150,
        longest_s=60 * minutes,
        reserve_s=75,
        grace_s=20,
        goes_on=True,
        training_steps=steps,
        needs=("qtawesome",),
        commands=(
            job(
                "train",
                f"--recipe {name} --steps {steps} --device cuda --minutes {{minutes}} --resume --output {{folder}}/run "
                "--sample-every 0",
            ),
            job(
                "evaluate",
                f"--model {{folder}}/run/{'model' if 'readers' in name or 'drifting' in name else 'float'}.safetensors "
                f"--output {{folder}} --name {name}",
            ),
        ),
        toy=(
            job(
                "train",
                "--recipe {folder}/toy.toml --device cpu --minutes {minutes} --resume --output {folder}/run --sample-every 0",
            ),
            job(
                "evaluate",
                f"--model {{folder}}/run/model.safetensors --output {{folder}} --name {name} {TOY_EVALUATION}",
            ),
        ),
        in_rehearsal={"toy.toml": TOY_OSCILLATOR},
    )


STEPS = (
    Step(
        name="accelerator-tests",
        item=1,
        what="tests/accelerator: the same bits, images and trainings as on a CPU",
        shortest_s=45,
        longest_s=240,
        grace_s=10,
        end_with=signal.SIGINT,  # pytest writes its results then
        needs=("pytest", "pytest-timeout", "qtawesome", "diffusers", "transformers"),
        commands=(_pytest("tests/accelerator/test_cuda.py"),),
        # trainings on a CPU take minutes: their lines are those of the tests of the trainers
        toy=(_pytest("tests/accelerator/test_cuda.py", "-k", "core or renders or drives"),),
    ),
    Step(
        name="joules-per-image",
        item=4,
        what="millijoule bench gpu: joules per image of default and baseline, by the board's counter",
        shortest_s=130,
        longest_s=200,
        needs=("diffusers", "transformers"),
        commands=(job("bench.gpu", "{folder}/gpu.json"),),
        toy=(
            job(
                "bench.gpu",
                f"{{folder}}/gpu.json --stand-in --a {TOY_MODEL} --b {TOY_MODEL} --seconds 0.4 --pause 0",
            ),
        ),
    ),
    Step(
        name="meter",
        item=3,
        what="the product's meter over a loaded minute, against the integral of power; its read-rate guard",
        shortest_s=60,
        longest_s=110,
        reserve_s=20,
        commands=(job("bench.counters", "{folder}/meter.json --parts meter --within {seconds}"),),
        toy=(job("bench.counters", "{folder}/meter.json --parts meter --within 90 --stand-in"),),
    ),
    Step(
        name="ray-one-gpu",
        item=5,
        what="a job on Ray, one worker with the whole GPU; its books",
        shortest_s=50,
        longest_s=120,
        needs=("ray",),
        commands=_ray_job("1", 1),
        toy=_toy_ray_job(1),
    ),
    Step(
        name="ray-half-gpus",
        item=5,
        what="a job on Ray, two workers on one GPU: their energy adds up to its counter",
        shortest_s=50,
        longest_s=120,
        needs=("ray",),
        commands=_ray_job("0.5", 2),
        toy=_toy_ray_job(2),
    ),
    Step(
        name="counter",
        item=8,
        what="period, quantum and read rates of the counter, square waves, idle states, energy of starting",
        shortest_s=130,
        longest_s=300,
        reserve_s=10,
        commands=(job("bench.counters", "{folder}/counter.json --within {seconds}"),),
        toy=(job("bench.counters", "{folder}/counter.json --within 120 --stand-in"),),
    ),
    Step(
        name="baseline-training",
        item=2,
        what="a better baseline: recipe baseline-continued, 10,000 steps or as many as there is time for",
        shortest_s=240,
        longest_s=600,
        reserve_s=90,
        grace_s=30,
        goes_on=True,
        training_steps=10_000,
        needs=("qtawesome", "diffusers", "transformers"),
        commands=(
            job(
                "train",
                "--recipe baseline-continued --compile --start-from workers/weights/baseline --device cuda "
                "--minutes {minutes} --resume --output {folder}/run",
            ),
            job("evaluate", "--model {folder}/run/model --output {folder} --name baseline"),
        ),
        toy=(
            job(
                "train",
                "--recipe {folder}/toy.toml --start-from workers/weights/baseline --device cpu --minutes {minutes} "
                "--resume --output {folder}/run",
            ),
            job(
                "evaluate",
                f"--model {{folder}}/run/model --output {{folder}} --name baseline --num-inference-steps 1 {TOY_EVALUATION}",
            ),
        ),
        in_rehearsal={"toy.toml": TOY_BASELINE},
    ),
    Step(
        name="un0-tests",
        item=7,
        what="images of converted Un-0 checkpoints on CUDA against a CPU's, with and without TF32",
        shortest_s=25,
        longest_s=90,
        grace_s=10,
        end_with=signal.SIGINT,  # pytest writes its results then
        needs=("pytest", "pytest-timeout"),
        commands=(_pytest("tests/accelerator/test_un0_cuda.py"),),
        toy=(_pytest("tests/accelerator/test_un0_cuda.py"),),
    ),
    Step(
        name="baseline-guidance",
        item=2,
        what="the new baseline at three guidance scales, on training combinations",
        shortest_s=60,
        longest_s=240,
        needs=("qtawesome", "diffusers", "transformers"),
        after=("baseline-training/run/model",),
        commands=tuple(
            job(
                "evaluate",
                "--model {results}/baseline-training/run/model --split train --output {folder} "
                f"--guidance-scale {g} --name guidance-{g}",
            )
            for g in (2, 3, 4)
        ),
        toy=(
            job(
                "evaluate",
                "--model {results}/baseline-training/run/model --split train --output {folder} --guidance-scale 2 "
                f"--name guidance-2 --num-inference-steps 1 {TOY_EVALUATION}",
            ),
        ),
    ),
    Step(
        name="baseline-quality",
        item=2,
        what="10,008 held-out images of the new baseline",
        shortest_s=100,
        longest_s=300,
        needs=("qtawesome", "diffusers", "transformers"),
        after=("baseline-training/run/model",),
        commands=(
            job(
                "evaluate",
                "--model {results}/baseline-training/run/model --output {folder} --name baseline "
                "--prompts-per-family 834 --images-per-prompt 2",
            ),
        ),
        toy=(
            job(
                "evaluate",
                "--model {results}/baseline-training/run/model --output {folder} --name baseline "
                f"--num-inference-steps 1 {TOY_EVALUATION}",
            ),
        ),
    ),
    _control("control-drifting", 1000, 5, "the drifting loss at the controls' budget"),
    _control("control-readers", 10_000, 10, "the incomplete drive, ten times as long"),
    _control(
        "control-readers-frozen", 10_000, 10, "the incomplete drive with random couplings, ten times as long"
    ),
    Step(
        name="verify",
        item=9,
        what="millijoule verify at full length (an hour and more, in as many calls), then --check of its bundle",
        shortest_s=200,
        longest_s=6000,
        goes_on=True,
        needs=("qtawesome", "diffusers", "transformers"),
        commands=(
            job("verify", "--a default --b baseline --output {folder}/comparison", accepted=(0, NOT_SHOWN)),
            job("verify", "--check {folder}/comparison/bundle"),
        ),
        toy=(
            job(
                "verify",
                f"--a {TOY_MODEL} --b {TOY_MODEL} --device cpu --output {{folder}}/comparison --blocks 4 "
                "--block-seconds 0.1 --control-quadruples 1 --warmup-cv 9 --prompts-per-family 1 --images-per-prompt 1 "
                "--min-images 1",
                accepted=(0, NOT_SHOWN),
            ),
            job("verify", "--check {folder}/comparison/bundle"),
        ),
    ),
    Step(
        name="cost-of-telemetry",
        item=10,
        what="millijoule bench telemetry with the driver's own calls",
        shortest_s=1500,
        longest_s=2400,
        needs=("ray", "psutil"),
        commands=(job("bench.telemetry", "{folder}/telemetry.json --workers 1 --images 200000"),),
        toy=(
            job(
                "bench.telemetry",
                "{folder}/telemetry.json --workers 1 --images 16 --quadruples 1 --stress-devices 1 --stress-seconds 1 "
                "--stress-hours 1",
            ),
        ),
    ),
)
