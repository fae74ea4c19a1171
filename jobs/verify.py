"""`millijoule verify`: how many times less energy A needs than B per accepted image, with evidence; and check of it."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from millijoule.jobs.comparing.options import VerifyOptions
from millijoule.jobs.entry import COMPLETE, ERROR, check_writable, run_command
from millijoule.jobs.torch_device import torch_device
from millijoule.workers.counted import counted
from millijoule.workers.errors import InputError, UsageError
from millijoule.workers.judging.image_judge import ICON_JUDGE, ImageMetric, load_judge, load_metric
from millijoule.workers.scenes.vocabulary import VOCABULARIES
from millijoule.workers.visible_text import visible

#: Exit code of a comparison that was run to its end and does not show what was to be shown.
NOT_SHOWN = 6
MAX_PRINTED = 100


def run(options: VerifyOptions) -> int:
    if options.check is not None:
        return check(options)
    if options.a is None or options.b is None or options.output is None:
        raise UsageError("give --a, --b and --output to measure, or --check BUNDLE")
    return compare(options, {"A": options.a, "B": options.b}, Path(options.output))


def compare(options: VerifyOptions, models: dict[str, str], output: Path) -> int:
    """Register, run, judge, write the bundle."""
    from millijoule.jobs.comparing.register import (
        choose_suite,
        plan_comparison,
        read_file,
        register,
        words_of_knowledge,
    )
    from millijoule.jobs.comparing.run import ComparisonRun, describe_environment, judge_images
    from millijoule.pipeline.comparison.attestation import load_private_key
    from millijoule.pipeline.comparison.bundle import write_bundle
    from millijoule.pipeline.comparison.parts import PartStore
    from millijoule.pipeline.comparison.protocol_floor import find_loosened
    from millijoule.pipeline.comparison.second_meter import read_second_meter
    from millijoule.workers.generators.registry import load_generator
    from millijoule.workers.judging.comparison_blocks import open_sampler
    from millijoule.workers.meters.meter import open_meter
    from millijoule.workers.sources.obtain import obtain_model

    key = load_private_key(read_file(options.key), where=options.key) if options.key else None
    bundle = output / "bundle"
    if bundle.exists():
        raise InputError(
            f"{bundle}: there is a bundle already; check it with --check, or give another --output"
        )
    check_writable(output, "--output")
    device, gpus = find_device(options)
    found = {arm: obtain_model(model) for arm, model in models.items()}
    generators = {arm: load_generator(f.model, device=device, options=f.options) for arm, f in found.items()}
    suite = choose_suite(options, generators)
    judge = load_judge(options.judge, VOCABULARIES[suite])
    metrics = _load_metrics(options)
    planned = plan_comparison(options, generators, judge, metrics, device, VOCABULARIES[suite])
    registration = register(planned, output / "registration.json")
    print(f"registration {registration.sha256}")
    if judge.rule == ICON_JUDGE:
        print(f"suite {suite}: {VOCABULARIES[suite]} nouns; {words_of_knowledge(generators)}")
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


def check(options: VerifyOptions) -> int:
    """Recompute a bundle and print every mismatch."""
    from millijoule.jobs.comparing.register import read_file
    from millijoule.jobs.comparing.reread import reread_images
    from millijoule.pipeline.comparison.attestation import load_public_key
    from millijoule.pipeline.comparison.bundle import REGISTRATION, hash_file
    from millijoule.pipeline.comparison.bundle_check import check_bundle

    folder = Path(str(options.check))
    key = (
        load_public_key(read_file(options.public_key), where=options.public_key)
        if options.public_key
        else None
    )
    report = check_bundle(folder, key, rejudge=reread_images if options.rejudge else None)
    for mismatch in report.mismatches[:MAX_PRINTED]:
        print(visible(mismatch))
    if len(report.mismatches) > MAX_PRINTED:
        print(f"... and {len(report.mismatches) - MAX_PRINTED} more")
    if report.mismatches:
        print(
            f"{folder}: {counted(len(report.mismatches), 'mismatch', 'mismatches')}; nothing in it can be relied on"
        )
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
            f"{arm}: {sums['accepted']:,} of {counted(sums['images'], 'image')} accepted, "
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


def _load_metrics(options: VerifyOptions) -> list[tuple[ImageMetric, float]]:
    metrics = []
    for text in options.metric:
        name, equals, margin = text.rpartition("=")
        try:
            metrics.append((load_metric(name if equals else text), float(margin)))
        except ValueError as error:
            raise UsageError(f"--metric {text}: end it with =MARGIN, a number") from error
    return metrics


def find_device(options: VerifyOptions) -> tuple[str, list[str] | None]:
    """The device, and the GPUs to meter."""
    if options.threads is None and options.device == "cpu":
        return "cpu", None
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    if torch_device(options.device) == "cpu":
        return "cpu", None
    return "cuda", [f"GPU-{torch.cuda.get_device_properties(0).uuid}"]


def main(argv: list[str] | None = None) -> int:
    return run_command("verify", VerifyOptions, run, argv)


if __name__ == "__main__":
    sys.exit(main())
