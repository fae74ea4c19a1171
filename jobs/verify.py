"""`millijoule verify`: how many times less energy A needs than B per accepted image, with evidence; and check of it."""

from __future__ import annotations

import dataclasses
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import tyro

from millijoule.jobs.entry import COMPLETE, ERROR, run_command
from millijoule.jobs.node_meter_options import parse_rest
from millijoule.jobs.torch_device import torch_device
from millijoule.workers.errors import InputError
from millijoule.workers.judging.image_judge import (
    ICON_JUDGE,
    ImageJudge,
    ImageMetric,
    load_judge,
    load_metric,
)
from millijoule.workers.visible_text import visible

if TYPE_CHECKING:
    from millijoule.pipeline.comparison.registration import Arm, Registration, Request
    from millijoule.workers.generators.protocol import Generator

#: Exit code of a comparison that was run to its end and does not show what was to be shown.
NOT_SHOWN = 6
MAX_PRINTED = 100


@dataclass(frozen=True)
class VerifyOptions:
    """Measure how many times less energy generator A needs than B per accepted image; or check such a measurement.

    What is to be shown and how is written to OUTPUT/registration.json first; publish its printed hash before the
    run (`--register-only` stops there). Blocks alternate as ABBA and BAAB on one device, after warm-up, with idle blocks and
    controls. Every image is judged, and images that are not accepted still cost energy. A run that was interrupted goes
    on where it was when started again with the same options. The result is the folder OUTPUT/bundle, which anyone can
    recompute with `--check`. Exit codes: 0 shown, or bundle sound; 6 measured and not shown; 1 error or mismatch.
    """

    a: str | None = None
    """Generator A, as `millijoule generate --model` takes it: the one that is to need less."""

    b: str | None = None
    """Generator B, the baseline."""

    output: str | None = None
    """Folder for the registration, the blocks and the bundle."""

    check: str | None = None
    """Check this bundle instead, offline; exit code 0 only if all of it can be recomputed."""

    public_key: str | None = None
    """PEM file of the Ed25519 public key that must have signed the bundle that is checked."""

    rejudge: bool = False
    """With --check: read the images again with the packaged verifier (icon scenes only)."""

    register_only: bool = False
    """Write the registration and its hash, and stop."""

    key: str | None = None
    """PEM file of an Ed25519 private key to sign with; without it the bundle is unsigned."""

    factor: float = 100.0
    """What is to be shown: A needs at least this many times less energy."""

    blocks: int = 40
    """Blocks of the comparison, a multiple of 4; the interval needs 20 or more."""

    block_seconds: float = 60.0
    """Length of a block; a batch that has begun is finished. With less than 60 nothing is established."""

    control_quadruples: int = 1
    """Quadruples of each control: A against A, telemetry on against off for A and for B."""

    warmup_cv: float = 0.03
    """Warm-up ends when the speeds of three windows differ by no more than this share. With more than 0.05 nothing is
    established."""

    prompts: str | None = None
    """Text file of prompts, one per line, "family<TAB>prompt" or prompts alone; by default held-out icon scenes."""

    prompts_per_family: int = 100
    """Icon scenes of each of the six families."""

    images_per_prompt: int = 2
    """Different seeds of each prompt."""

    seed: int = 0
    """Seed of prompts, seeds and the order of blocks."""

    judge: str = ICON_JUDGE
    """Who accepts images: "icon-scene" or "python:MODULE:FACTORY"."""

    metric: tuple[str, ...] = ()
    """Further scores with their margins: "clip:FOLDER=0.2" or "python:MODULE:FACTORY=MARGIN"."""

    score_margin: float = 0.02
    """A's share of accepted images may be lower than B's by this much. With a wider margin than the default nothing is
    established; the same holds for the next two options."""

    frechet_margin: float = 0.05
    """A's Frechet distance may exceed B's by this share of it."""

    min_images: int = 500
    """The quality gate fails with fewer images of an arm."""

    a_batch_size: int | None = None
    """Images per batch of A, in place of the model's own."""

    b_batch_size: int | None = None
    """As above, of B."""

    a_steps: int | None = None
    """Inference steps of A, in place of the model's own."""

    b_steps: int | None = None
    """As above, of B."""

    a_guidance: float | None = None
    """Guidance scale of A, in place of the model's own."""

    b_guidance: float | None = None
    """As above, of B."""

    second_meter: str | None = None
    """CSV file of another meter's energy over the run (source, t_wall_ns, energy_mj; source: node, or power where the
    run could not sample it itself)."""

    rest: Annotated[str | None, tyro.conf.arg(metavar="W+-W")] = None
    """Watts that a node's meter sees and no counter does, and by how much that may be wrong, such as 180+-30. Registered
    before the run; without it a node cannot close."""

    omit_images: bool = False
    """Leave the images out of the bundle; their hashes stay."""

    device: Literal["auto", "gpu", "cpu", "cuda"] = "auto"
    """Where both generators run; gpu is cuda, auto a GPU where there is one."""

    threads: int | None = None
    """CPU threads; PyTorch's default if not given."""


def run(options: VerifyOptions) -> int:
    if options.check is not None:
        return check(options)
    if options.a is None or options.b is None or options.output is None:
        raise InputError("give --a, --b and --output to measure, or --check BUNDLE")
    return compare(options, {"A": options.a, "B": options.b}, Path(options.output))


def compare(options: VerifyOptions, models: dict[str, str], output: Path) -> int:
    """Register, run, judge, write the bundle."""
    from millijoule.jobs.comparing.environment import describe_environment
    from millijoule.jobs.comparing.run import ComparisonRun, judge_images
    from millijoule.pipeline.comparison.attestation import load_private_key
    from millijoule.pipeline.comparison.bundle import write_bundle
    from millijoule.pipeline.comparison.parts import PartStore
    from millijoule.pipeline.comparison.protocol_floor import find_loosened
    from millijoule.pipeline.comparison.second_meter import read_second_meter
    from millijoule.workers.generators.protocol import load_generator
    from millijoule.workers.judging.comparison_blocks import open_sampler
    from millijoule.workers.meters.meter import open_meter

    key = load_private_key(_read(options.key), where=options.key) if options.key else None
    bundle = output / "bundle"
    if bundle.exists():
        raise InputError(
            f"{bundle}: there is a bundle already; check it with --check, or give another --output"
        )
    device, gpus = _find_device(options)
    generators = {arm: load_generator(model, device=device) for arm, model in models.items()}
    judge = load_judge(options.judge)
    metrics = _load_metrics(options)
    registration = register(options, models, generators, judge, metrics, device, output)
    print(f"registration {registration.sha256}")
    for departure in find_loosened(registration):
        print(f"note: {departure}; nothing can be established with it")
    if options.register_only:
        return COMPLETE
    meter = open_meter(gpus)
    try:
        parts = PartStore(output / "parts")
        ComparisonRun(registration, generators, meter, parts, open_sampler=lambda: open_sampler(meter)).run()
        environment = describe_environment(registration, generators, meter, judge.sha256)
    finally:
        meter.close()
    second = read_second_meter(Path(options.second_meter)) if options.second_meter else None
    rows = judge_images(
        registration,
        parts,
        judge,
        [metric for metric, _ in metrics],
        keep_pixels=not options.omit_images,
        second_meter=second,
    )
    unfinished = output / "bundle.tmp"
    shutil.rmtree(unfinished, ignore_errors=True)  # of a run that ended while writing it
    result = write_bundle(unfinished, registration, environment, rows, key)
    unfinished.rename(bundle)
    print_result(result)
    print(f"{bundle}{'' if key else ' (unsigned)'}")
    return COMPLETE if result["claim"]["outcome"].startswith("holds") else NOT_SHOWN


def register(
    options: VerifyOptions,
    models: dict[str, str],
    generators: dict[str, Generator],
    judge: ImageJudge,
    metrics: list[tuple[ImageMetric, float]],
    device: str,
    output: Path,
) -> Registration:
    """Write the registration, or take the one that is there if it says the same.

    Raises:
        InputError: options make no registration, or another one than lies there.
    """
    from millijoule.pipeline.comparison import registration as r

    infos = [g.info for g in generators.values()]
    if (infos[0].width, infos[0].height) != (infos[1].width, infos[1].height):
        raise InputError(
            f"A makes {infos[0].width}x{infos[0].height} images, B {infos[1].width}x{infos[1].height}: "
            "only equal sizes are compared"
        )
    if options.blocks % 4:
        raise InputError(f"--blocks {options.blocks}: must be a multiple of 4 (ABBA, BAAB)")
    rest = (None, None) if options.rest is None else parse_rest(options.rest, "--rest")
    path = output / "registration.json"
    there = r.Registration.from_json(path.read_bytes(), where=str(path)) if path.exists() else None
    planned = r.Registration(
        factor=options.factor,
        registered_wall_ns=there.registered_wall_ns if there else time.time_ns(),
        device=device,
        width=infos[0].width,
        height=infos[0].height,
        a=_describe_arm(options, "a", models["A"], generators["A"]),
        b=_describe_arm(options, "b", models["B"], generators["B"]),
        requests=list_requests(options),
        gate=r.Gate(
            judge.name,
            judge.sha256,
            rule=judge.rule,  # type: ignore[arg-type]
            score_margin=options.score_margin,
            frechet_margin=options.frechet_margin,
            min_images=options.min_images,
            metrics=tuple(r.Metric(m.name, m.sha256, margin) for m, margin in metrics),
        ),
        design=r.Design(
            block_seconds=options.block_seconds,
            quadruples=options.blocks // 4,
            control_quadruples=options.control_quadruples,
            order_seed=options.seed,
            warmup_window_seconds=min(r.Design.warmup_window_seconds, options.block_seconds),
            warmup_cv=options.warmup_cv,
        ),
        systematics=r.Systematics(declared_rest_watts=rest[0], declared_rest_tolerance_watts=rest[1]),
    )
    try:
        r.check_values(planned)
    except ValueError as error:
        raise InputError(str(error)) from error
    if there is None:
        output.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as file:
            file.write(planned.to_json())
    elif planned != there:
        differing = [
            f.name for f in dataclasses.fields(planned) if getattr(planned, f.name) != getattr(there, f.name)
        ]
        raise InputError(
            f"{path}: registered with other {', '.join(differing)}; give the same options, or another --output"
        )
    return planned


def list_requests(options: VerifyOptions) -> tuple[Request, ...]:
    """The prompts and seeds both arms draw, families in turn."""
    from millijoule.pipeline.comparison.registration import Request

    if options.prompts is None:
        from millijoule.jobs.evaluate import EvaluateOptions, list_items

        items = list_items(
            EvaluateOptions(
                "",
                "",
                prompts_per_family=options.prompts_per_family,
                images_per_prompt=options.images_per_prompt,
                seed=options.seed,
            )
        )
        return tuple(Request(i.family, i.prompt, i.seed) for i in items)
    lines = [x for x in _read(options.prompts).decode("utf-8", "replace").splitlines() if x.strip()]
    requests = []
    for number, line in enumerate(dict.fromkeys(lines)):
        family, tab, prompt = line.partition("\t")
        if not tab:
            family, prompt = "prompts", line
        rng = np.random.default_rng((options.seed, number))
        seeds = rng.integers(2**63, size=options.images_per_prompt)
        requests += [Request(family, prompt, int(seed)) for seed in seeds]
    return tuple(requests)


def check(options: VerifyOptions) -> int:
    """Recompute a bundle and print every mismatch."""
    from millijoule.jobs.comparing.reread import reread_images
    from millijoule.pipeline.comparison.attestation import load_public_key
    from millijoule.pipeline.comparison.bundle import REGISTRATION, hash_file
    from millijoule.pipeline.comparison.bundle_check import check_bundle

    folder = Path(str(options.check))
    key = load_public_key(_read(options.public_key), where=options.public_key) if options.public_key else None
    report = check_bundle(folder, key, rejudge=reread_images if options.rejudge else None)
    for mismatch in report.mismatches[:MAX_PRINTED]:
        print(visible(mismatch))
    if len(report.mismatches) > MAX_PRINTED:
        print(f"... and {len(report.mismatches) - MAX_PRINTED} more")
    if report.mismatches:
        print(f"{folder}: {len(report.mismatches)} mismatches; nothing in it can be relied on")
        return ERROR
    if report.result is not None:
        print_verdict(report.result)
    for note in report.notes:
        print(visible(f"note: {note}"))
    print(
        f"registration {hash_file(folder / REGISTRATION)}: compare it with what was published before the run"
    )
    print(f"{folder}: everything recomputed, no mismatch")
    return COMPLETE


def print_result(result: dict[str, Any]) -> None:
    """Systematic parts first, then arms, gate and verdict."""
    total = result["systematics"]["total"]
    for name, part in result["systematics"]["parts"].items():
        print(f"systematic  {name:<16}{_percent(part)}")
    print(f"systematic  {'sum':<16}{_percent(total)}")
    for arm, sums in result["arms"].items():
        millijoules = sums["mj_per_accepted_image"]
        print(
            f"{arm}: {sums['accepted']:,} of {sums['images']:,} images accepted, "
            f"{'no energy' if millijoules is None else f'{millijoules / 1000:.4g} J'} per accepted image"
        )
    for failure in result["gate"]["failures"]:
        print(visible(f"gate failed: {failure}"))
    print_verdict(result)


def print_verdict(result: dict[str, Any]) -> None:
    """The verdict between what it rests on and what follows for the claim."""
    protocol, claim = result["protocol"], result["claim"]
    metrics = "".join(f", {name} {margin:g}" for name, margin in protocol["metric_margins"].items())
    print(
        f"protocol: blocks of {protocol['block_seconds']:g} s, warm-up within {100 * protocol['warmup_cv']:g} %; "
        f"margins: accepted share {protocol['score_margin']:g}, Frechet distance {protocol['frechet_margin']:g}, "
        f"blank {protocol['max_blank']:g}, repeated {protocol['max_duplicates']:g}{metrics}; "
        f"at least {protocol['min_images']} images"
    )
    print(result["verdict"])
    print(f"claim (at least {claim['factor']:g} times): {'; '.join([claim['outcome'], *claim['reasons']])}")


def _percent(log_ratio: float | None) -> str:
    return "unknown" if log_ratio is None else f"{100 * log_ratio:.2f} %"


def _describe_arm(options: VerifyOptions, arm: str, model: str, generator: Generator) -> Arm:
    from millijoule.pipeline.comparison.registration import Arm
    from millijoule.workers.generators.protocol import FACTORY_PREFIX, describe_model

    identity = describe_model(model)
    return Arm(
        model=model if model.startswith(FACTORY_PREFIX) else Path(model).name,
        name=identity.name,
        sha256=identity.sha256,
        batch_size=getattr(options, f"{arm}_batch_size") or generator.info.batch_size,
        num_inference_steps=getattr(options, f"{arm}_steps"),
        guidance_scale=getattr(options, f"{arm}_guidance"),
    )


def _load_metrics(options: VerifyOptions) -> list[tuple[ImageMetric, float]]:
    metrics = []
    for text in options.metric:
        name, equals, margin = text.rpartition("=")
        try:
            metrics.append((load_metric(name if equals else text), float(margin)))
        except ValueError as error:
            raise InputError(f"--metric {text}: end it with =MARGIN, a number") from error
    return metrics


def _find_device(options: VerifyOptions) -> tuple[str, list[str] | None]:
    """The device, and the GPUs to meter."""
    if options.threads is None and options.device == "cpu":
        return "cpu", None
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    if torch_device(options.device) == "cpu":
        return "cpu", None
    return "cuda", [f"GPU-{torch.cuda.get_device_properties(0).uuid}"]


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error


def main(argv: list[str] | None = None) -> int:
    return run_command("verify", VerifyOptions, run, argv)


if __name__ == "__main__":
    sys.exit(main())
