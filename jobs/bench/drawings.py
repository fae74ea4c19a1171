"""`millijoule bench drawings [RESULT.json]`: whether a coupling makes oscillators agree, where one noun has several right drawings.

Networks are trained from scratch, alike but for what settles which drawing is shown (`workers.training.drawings`): each with
several seeds, for the same steps. Scores are of fresh samples: the share that is one drawing and not a blend, and how evenly
drawings are chosen.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from millijoule.jobs.entry import COMPLETE
from millijoule.jobs.measuring.measurement import ResultOptions, describe
from millijoule.jobs.measuring.runs import interval, run_forms, train_to_the_end
from millijoule.workers.errors import UsageError

Form = Literal["coupled", "uncoupled", "uncoupled-shared-noise", "frozen", "uncoupled-near"]

#: form -> coupling, noise, decoder
FORMS: dict[Form, tuple[str, str, str]] = {
    "coupled": ("trained", "own", "cell"),
    "uncoupled": ("none", "own", "cell"),
    "uncoupled-shared-noise": ("none", "shared", "cell"),
    "frozen": ("frozen", "own", "cell"),
    "uncoupled-near": ("none", "own", "near"),
}

SCORES = ("one_drawing", "overlap", "evenness")


@dataclass(frozen=True)
class BenchOptions(ResultOptions):
    """Train networks that have to agree on one of several drawings, and score what they show."""

    output: str = "drawings"
    """Folder of the runs and their sheets; one that is complete there is not trained again, one that was stopped goes on."""

    forms: tuple[Form, ...] = tuple(FORMS)
    """coupled, uncoupled: noise of its own at each oscillator, a decoder that sees one cell; uncoupled-shared-noise: all cells have the
    same noise; frozen: K as drawn at random; uncoupled-near: with the generator's decoder, whose convolutions see nearly all cells."""

    runs: int = 3
    """Runs of each form, with seeds 0, 1 and on."""

    steps: int = 5000
    """Training steps of a run."""

    samples: int = 64
    """Images of each noun that are scored."""

    threads: int = 1
    """CPU threads."""


def run(options: BenchOptions) -> int:
    import torch

    if min(options.runs, options.steps, options.samples, options.threads) < 1:
        raise UsageError("--runs, --steps, --samples, --threads: at least 1")
    torch.set_num_threads(options.threads)
    about = describe("several drawings of one noun: which networks show one of them", options)

    def settings(form: Form, seed: int) -> dict[str, Any]:
        return {"samples": options.samples, "training": asdict(training_config(form, seed, options))}

    run_forms(options, about, settings, partial(_trained, options), summary)
    return COMPLETE


def training_config(form: Form, seed: int, options: BenchOptions) -> Any:
    """How a run of `form` is trained."""
    from millijoule.workers.oscillators.config import OscillatorConfig
    from millijoule.workers.training.drawings import DrawingsConfig

    coupling, noise, decoder = FORMS[form]
    model = OscillatorConfig(coupling=coupling)  # type: ignore[arg-type]
    return DrawingsConfig(noise=noise, decoder=decoder, steps=options.steps, seed=seed, model=model)  # type: ignore[arg-type]


def _trained(options: BenchOptions, form: Form, seed: int) -> dict[str, Any]:
    """One run: trained, scored; a sheet of every sixth noun, its drawings and then the first samples, none picked."""
    import torch
    from PIL import Image

    from millijoule.workers.training.drawings import DrawingsTrainer, score

    folder = Path(options.output) / f"{form}-{seed}"
    trainer = DrawingsTrainer(training_config(form, seed, options))
    train_to_the_end(trainer, folder)
    images = trainer.sample(options.samples)
    found: dict[str, Any] = {"form": form, "seed": seed, **score(images, trainer.drawings)}
    if trainer.config.model.coupling != "none":
        trainer.model.oscillators.remove_coupling()
        found["coupling_removed"] = score(trainer.sample(options.samples), trainer.drawings)
    shown = torch.cat([trainer.drawings, images[:, :12]], 1)[::6]
    sheet = (255 * (1 - shown)).round().to(torch.uint8).transpose(1, 2).flatten(2).flatten(0, 1)
    Image.fromarray(sheet.numpy()).save(folder / "sheet.png")
    return found


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each form, [mean, low, high] of 95 % over its runs."""
    forms: dict[str, Any] = {}
    for form in dict.fromkeys(r["form"] for r in rows):
        runs = [r for r in rows if r["form"] == form]
        forms[form] = {name: interval([r[name] for r in runs]) for name in SCORES}
        if "coupling_removed" in runs[0]:
            removed = [r["coupling_removed"] for r in runs]
            forms[form]["coupling_removed"] = {name: interval([r[name] for r in removed]) for name in SCORES}
    return forms
