"""From options and loaded generators to the registration of a comparison, written once."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from millijoule.jobs.comparing.options import VerifyOptions
from millijoule.jobs.evaluate import EvaluateOptions, largest_suite, list_items
from millijoule.jobs.options.node_meters import parse_rest
from millijoule.pipeline.comparison.registration import (
    Arm,
    Design,
    Gate,
    Metric,
    Registration,
    Request,
    Systematics,
    check_values,
)
from millijoule.workers import factories
from millijoule.workers.errors import InputError, UsageError
from millijoule.workers.generators.protocol import Generator, known_nouns
from millijoule.workers.judging.image_judge import ICON_JUDGE, ImageJudge, ImageMetric
from millijoule.workers.scenes.vocabulary import DEFAULT_NOUNS, VOCABULARIES
from millijoule.workers.sources.obtain import obtain_model


def read_file(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error


def register(planned: Registration, path: Path) -> Registration:
    """Write `planned` to `path`, or take the registration that is there if it says the same.

    Raises:
        InputError: there is another one, or what is there is none.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as file:
            file.write(planned.to_json())
        return planned
    there = Registration.from_json(path.read_bytes(), where=str(path))
    planned = dataclasses.replace(planned, registered_wall_ns=there.registered_wall_ns)
    names = [f.name for f in dataclasses.fields(there)]
    differing = [name for name in names if getattr(planned, name) != getattr(there, name)]
    if differing:
        raise InputError(
            f"{path}: registered with other {', '.join(differing)}; give the same options, or another --output"
        )
    return there


def plan_comparison(
    options: VerifyOptions,
    generators: Mapping[str, Generator],
    judge: ImageJudge,
    metrics: Sequence[tuple[ImageMetric, float]],
    device: str,
    nouns: int = DEFAULT_NOUNS,
) -> Registration:
    """The registration that `options` ask for, as of now; its prompts, where `options` bring none, name the first `nouns`.

    Raises:
        InputError: they make none.
    """
    a, b = (generators[arm].info for arm in "AB")
    if (a.width, a.height) != (b.width, b.height):
        raise InputError(
            f"A makes {a.width}x{a.height} images, B {b.width}x{b.height}: only equal sizes are compared"
        )
    if options.blocks % 4:
        raise UsageError(f"--blocks {options.blocks}: must be a multiple of 4 (ABBA, BAAB)")
    rest = (None, None) if options.rest is None else parse_rest(options.rest, "--rest")
    planned = Registration(
        factor=options.factor,
        registered_wall_ns=time.time_ns(),
        device=device,
        width=a.width,
        height=a.height,
        a=_describe_arm(options, "a", generators["A"]),
        b=_describe_arm(options, "b", generators["B"]),
        requests=list_requests(options, nouns),
        gate=Gate(
            judge.name,
            judge.sha256,
            rule=judge.rule,  # type: ignore[arg-type]
            score_margin=options.score_margin,
            frechet_margin=options.frechet_margin,
            min_images=options.min_images,
            metrics=tuple(Metric(m.name, m.sha256, margin) for m, margin in metrics),
            nouns=nouns if judge.rule == ICON_JUDGE else DEFAULT_NOUNS,
        ),
        design=Design(
            block_seconds=options.block_seconds,
            quadruples=options.blocks // 4,
            control_quadruples=options.control_quadruples,
            order_seed=options.seed,
            warmup_window_seconds=min(Design.warmup_window_seconds, options.block_seconds),
            warmup_cv=options.warmup_cv,
        ),
        systematics=Systematics(declared_rest_watts=rest[0], declared_rest_tolerance_watts=rest[1]),
    )
    try:
        check_values(planned)
    except ValueError as error:
        raise InputError(str(error)) from error
    return planned


def _describe_arm(options: VerifyOptions, arm: str, generator: Generator) -> Arm:
    model = getattr(options, arm)
    identity = obtain_model(model).identity
    return Arm(
        model=model if model.startswith(factories.PREFIX) else Path(model).name,
        name=identity.name,
        sha256=identity.sha256,
        batch_size=getattr(options, f"{arm}_batch_size") or generator.info.batch_size,
        num_inference_steps=getattr(options, f"{arm}_steps"),
        guidance_scale=getattr(options, f"{arm}_guidance"),
    )


def choose_suite(options: VerifyOptions, generators: Mapping[str, Generator]) -> str:
    """The suite of the comparison: of nouns that both models know, all that they can.

    Raises:
        InputError: the suite that is asked for has nouns that a model does not know.
    """
    known = {arm: known_nouns(generator) for arm, generator in generators.items()}
    fewest = min(known, key=known.__getitem__)
    possible = largest_suite(known[fewest])
    if options.suite and VOCABULARIES[options.suite] > max(known[fewest], VOCABULARIES[possible]):
        raise InputError(
            f"--suite {options.suite}: its prompts are of {VOCABULARIES[options.suite]} nouns, and {fewest} "
            f"({generators[fewest].info.name}) knows the first {known[fewest]}: compare with --suite {possible}"
        )
    return options.suite or possible


def words_of_knowledge(generators: Mapping[str, Generator]) -> str:
    """How many nouns each model knows."""
    return ", ".join(f"{arm} ({g.info.name}) knows {known_nouns(g)}" for arm, g in generators.items())


def list_requests(options: VerifyOptions, nouns: int = DEFAULT_NOUNS) -> tuple[Request, ...]:
    """The prompts and seeds both arms draw, families in turn."""
    if options.prompts is None:
        items = list_items(
            EvaluateOptions(
                "",
                "",
                prompts_per_family=options.prompts_per_family,
                images_per_prompt=options.images_per_prompt,
                seed=options.seed,
            ),
            nouns,
        )
        return tuple(Request(i.family, i.prompt, i.seed) for i in items)
    lines = [x for x in read_file(options.prompts).decode("utf-8", "replace").splitlines() if x.strip()]
    requests = []
    for number, line in enumerate(dict.fromkeys(lines)):
        family, tab, prompt = line.partition("\t")
        if not tab:
            family, prompt = "prompts", line
        rng = np.random.default_rng((options.seed, number))
        seeds = rng.integers(2**63, size=options.images_per_prompt)
        requests += [Request(family, prompt, int(seed)) for seed in seeds]
    return tuple(requests)
