"""`millijoule bench controls [RESULT.json]`: the oscillator generator against forms of itself, trained alike, several times each.

Every form is trained from scratch with several seeds, for the same steps on the same icons, and judged on the same held-out
prompts. One form without a coupling is as much wider as makes its operations those of the coupled form, so that both can be
compared at equal steps and at equal operations. Of forms with a coupling, K is removed after training, and all is judged again.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from millijoule.jobs.entry import COMPLETE
from millijoule.jobs.evaluate import EvaluateOptions, Item, list_items
from millijoule.jobs.measuring.icon_scores import judge_scenes, scene_arrays
from millijoule.jobs.measuring.measurement import ResultOptions, describe
from millijoule.jobs.measuring.runs import interval, run_forms, train_to_the_end
from millijoule.workers.errors import InputError, UsageError
from millijoule.workers.scenes.vocabulary import DEFAULT_NOUNS, NOUNS

Form = Literal["none", "wide", "trained", "frozen", "mlp"]


@dataclass(frozen=True)
class BenchOptions(ResultOptions):
    """Train forms of the generator alike, and judge them."""

    output: str = "controls"
    """Folder of the runs; one that is complete there is not trained again, one that was stopped goes on."""

    forms: tuple[Form, ...] = ("none", "wide", "trained", "frozen", "mlp")
    """none: no coupling; wide: none, with the operations of trained; trained, frozen: a K, learned or as drawn at random;
    mlp: a network of two layers per cell in place of the oscillators."""

    runs: int = 3
    """Runs of each form, with seeds 0, 1 and on."""

    steps: int = 3000
    """Training steps of a run."""

    half: int = 96
    """Icons in half windows per step."""

    whole: int = 32
    """Icons in the whole image per step."""

    nouns: int = 1040
    """Of the vocabulary's first, how many."""

    prompts_per_family: int = 167
    """Prompts of each of the six families that a run is judged by, two images each."""

    threads: int = 1
    """CPU threads."""

    device: Literal["cpu", "cuda"] = "cpu"
    """What trains."""


def run(options: BenchOptions) -> int:
    import torch

    counts = (
        options.runs,
        options.steps,
        options.half,
        options.whole,
        options.threads,
        options.prompts_per_family,
    )
    if min(counts) < 1:
        raise UsageError("--runs, --steps, --half, --whole, --threads, --prompts-per-family: at least 1")
    if not DEFAULT_NOUNS <= options.nouns <= len(NOUNS):  # fewer leave no prompts that are held out
        raise UsageError(f"--nouns {options.nouns}: {DEFAULT_NOUNS} to {len(NOUNS)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise InputError("bench controls: PyTorch finds no GPU here")
    torch.set_num_threads(options.threads)
    about = describe("forms of the oscillator generator, trained alike", options)

    def settings(form: Form, seed: int) -> dict[str, Any]:
        training = asdict(training_config(form, seed, options))
        return {"prompts_per_family": options.prompts_per_family, "training": training}

    run_forms(options, about, settings, partial(_trained, options), summary)
    return COMPLETE


def _trained(options: BenchOptions, form: Form, seed: int) -> dict[str, Any]:
    """One run: trained, judged."""
    from millijoule.workers.training.icons import IconTrainer, overlap

    folder = Path(options.output) / f"{form}-{seed}"
    trainer = IconTrainer(training_config(form, seed, options), device=options.device)
    train_to_the_end(trainer, folder)
    network = trainer.exported_network()
    covers = [cover.cpu() for cover in trainer.covers]
    row: dict[str, Any] = {
        "form": form,
        "seed": seed,
        "parameters": sum(p.numel() for name, p in network.named_parameters() if name != "code.weight"),
        "loss": _last_loss(folder / "log.jsonl"),
        "overlap": round(float(overlap(network, covers).mean()), 5),
        **_judged(network, options),
    }
    if form in ("trained", "frozen"):
        network.remove_coupling()
        row["coupling_removed"] = {
            "overlap": round(float(overlap(network, covers).mean()), 5),
            "score": _judged(network, options)["score"],
        }
    return row


def training_config(form: Form, seed: int, options: BenchOptions) -> Any:
    """How a run of `form` is trained: alike but for the model."""
    from millijoule.workers.oscillators.config import OscillatorConfig
    from millijoule.workers.training.icons import IconTrainingConfig

    model = OscillatorConfig(nouns=options.nouns, coupling="none" if form == "wide" else form)
    if form == "wide":
        model = replace(model, width=equal_width(model))
    return IconTrainingConfig(
        steps=options.steps, half=options.half, whole=options.whole, seed=seed, model=model
    )


def equal_width(model: Any) -> int:
    """The width of the decoder at which the form without a coupling has, to the nearest, the operations of the coupled."""
    wanted = _operations(replace(model, coupling="trained"))
    low, high = model.width, 4 * model.width
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _operations(replace(model, width=middle)) < wanted else (low, middle)
    return min(low, high, key=lambda width: abs(_operations(replace(model, width=width)) - wanted))


@cache
def _operations(model: Any) -> float:
    """Of an image of the suite, mean over 480, with the ink of the true icons: alike for all forms."""
    from millijoule.workers.oscillators.operations import operations

    tokens, _ = scene_arrays(_items(model.nouns, 40))
    counted = operations(model, true_ink(model.nouns), tokens)
    return float(sum(part.double().mean() for part in counted.values()))


@cache
def true_ink(nouns: int) -> Any:
    """The cells in which the font's own icons have ink."""
    import torch

    from millijoule.workers.oscillators.ink import InkCells
    from millijoule.workers.training.icons import true_covers

    inked = [(cover != 0).any(4).flatten(1) for cover in true_covers(nouns)]
    return InkCells(torch.from_numpy(np.packbits(torch.cat(inked, 1).numpy(), axis=1)))


@cache
def _items(nouns: int, prompts_per_family: int) -> list[Item]:
    return list_items(EvaluateOptions("", "", prompts_per_family=prompts_per_family), nouns)


def _judged(network: Any, options: BenchOptions) -> dict[str, Any]:
    """Score on held-out prompts and operations per image, of a network as it was trained."""
    from millijoule.workers.oscillators.draw import Painter
    from millijoule.workers.oscillators.float_shapes import FloatShapes

    items = _items(options.nouns, options.prompts_per_family)
    correct = judge_scenes(Painter.of(FloatShapes(network)), items)  # type: ignore[arg-type]
    return {
        "operations_per_image": round(_operations(network.config)),
        "images": len(items),
        "score": round(float(correct.mean()), 5),
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each form: means over its runs, [mean, low, high] of 95 % where there are several; and against "none", run by run."""
    forms: dict[str, Any] = {}
    by_form = {
        form: [r for r in rows if r["form"] == form] for form in dict.fromkeys(r["form"] for r in rows)
    }
    for form, runs in by_form.items():
        forms[form] = {
            "operations_per_image": runs[0]["operations_per_image"],
            "parameters": runs[0]["parameters"],
            **{name: interval([r[name] for r in runs]) for name in ("loss", "overlap", "score")},
        }
        if "coupling_removed" in runs[0]:
            forms[form]["coupling_removed"] = {
                name: interval([r["coupling_removed"][name] for r in runs]) for name in ("overlap", "score")
            }
        for other in ("none", "wide"):
            if form != other and other in by_form:
                pairs = list(zip(runs, by_form[other], strict=True))
                forms[form][f"more_than_{other}"] = {
                    name: interval([a[name] - b[name] for a, b in pairs]) for name in ("overlap", "score")
                }
    return forms


def _last_loss(log: Path) -> float:
    return float(json.loads(log.read_text().splitlines()[-1])["loss"])
