"""`millijoule evaluate`: how well a model draws what prompts say, judged by the verifier: JSON, rows and a sample sheet."""

from __future__ import annotations

import json
import math
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro

from millijoule.jobs.entry import COMPLETE, check_writable, run_command
from millijoule.jobs.machine import describe_machine
from millijoule.jobs.options.model import ModelOptions
from millijoule.jobs.torch_device import torch_device
from millijoule.workers.counted import counted
from millijoule.workers.errors import InputError, UsageError
from millijoule.workers.generators.file_hashes import file_sha256
from millijoule.workers.generators.options import GeneratorOptions
from millijoule.workers.generators.protocol import (
    CountsOperations,
    GeneratedBatch,
    Generator,
    Rejection,
    known_nouns,
)
from millijoule.workers.scenes.scenes import FAMILIES, IMAGE_SIZE, Scene, sample_scene
from millijoule.workers.scenes.vocabulary import DEFAULT_NOUNS, VOCABULARIES
from millijoule.workers.schemas import ImageRequest

if TYPE_CHECKING:
    from millijoule.workers.judging.imagenet_features import ImageNetFeatures

RENDERS = "renders"
SHEET_IMAGES = 32
FORMAT_VERSION = 1


@dataclass(frozen=True)
class EvaluateOptions:
    """Draw images for prompts of the six GenEval families and judge them.

    The verifier (an independent network, trained on true renders only) reads every image. Reported are the share of images
    that show what the prompt says, by family, with 95 % intervals; and against as many true renders of the same
    prompts, in the verifier's features, the Frechet distance, precision and recall. Needs the `train` extra for the
    renders. All models get the same prompts and seeds for the same options. What the model rejects (its safety checker hides it, say)
    counts as wrong and is left out of the other figures; "rejected" says how many.
    """

    model: str
    """What `millijoule generate --model` takes, or "renders": true renders in place of a model, the ceiling."""

    output: str
    """Folder for NAME.json (results), NAME.parquet (every image: prompt, seed, what was read) and NAME.png (the first 32
    prompts, not picked)."""

    model_options: Annotated[ModelOptions, tyro.conf.arg(name="")] = field(default_factory=ModelOptions)

    name: str | None = None
    """Name of the files; the model's own by default."""

    prompts_per_family: int = 100
    """Prompts of each of the six families."""

    images_per_prompt: int = 2
    """Images of each prompt, with different seeds."""

    split: Literal["held-out", "train"] = "held-out"
    """Combinations of nouns and colours that training never shows, or only those that it does."""

    seed: int = 0
    """Seed of prompts, images and renders."""

    suite: Literal["icons-80", "icons-1000"] | None = None
    """What nouns prompts are of: the first 80, or all of the list (a little over a thousand). By default the larger one of
    which the model knows every noun; of renders, the verifier that is given."""

    verifier: str | None = None
    """Weights of another verifier, from `millijoule train`; by default the package's own for the suite. It must know its nouns."""

    features: Literal["efficientnet-lite0"] | None = None
    """Another network, in whose features Frechet distance, precision and recall are reported beside those in the verifier's:
    EfficientNet-Lite0, trained by others on ImageNet. It takes some 20 ms of one core for an image, and as much for its render."""

    num_inference_steps: int | None = None
    """Steps, in place of the model's default."""

    guidance_scale: float | None = None
    """Guidance, in place of the model's default."""

    device: str = "auto"
    """gpu (or one of several: cuda:1), cpu, or auto: a GPU where there is one."""

    threads: int | None = None
    """CPU threads; PyTorch's default if not given."""

    processes: int = 1
    """Processes that draw, each with a model and, where there are several, one thread of its own; the images are the same."""


@dataclass(frozen=True)
class Item:
    """One image to draw: its prompt, what the prompt says, and the seed."""

    family: str
    prompt: str
    scene: Scene
    seed: int


def run(options: EvaluateOptions) -> int:
    import torch

    from millijoule.workers.judging.imagenet_features import ImageNetFeatures
    from millijoule.workers.judging.verifier import Verifier, packaged_weights
    from millijoule.workers.scenes.renderer import render_prompted

    if options.prompts_per_family < 1 or options.images_per_prompt < 1:
        raise UsageError("--prompts-per-family and --images-per-prompt must be at least 1")
    if options.processes < 1 or (options.processes > 1 and options.threads):
        raise UsageError(
            "--processes must be at least 1; with several, each has one thread, and --threads says nothing"
        )
    folder = Path(options.output)
    check_writable(folder, "--output")
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch_device(options.device)
    verifier = Verifier.load(Path(options.verifier)) if options.verifier else None
    model = None if options.model == RENDERS else open_model(options, device)
    known = model.nouns if model else verifier.nouns if verifier else DEFAULT_NOUNS
    suite = options.suite or largest_suite(known)
    weights = Path(options.verifier) if options.verifier else packaged_weights(VOCABULARIES[suite])
    verifier = verifier or Verifier.load(weights)
    if VOCABULARIES[suite] > verifier.nouns:
        raise InputError(
            f"suite {suite} has {VOCABULARIES[suite]} nouns, the verifier knows the first {verifier.nouns}: give "
            "--verifier one that was trained on all of them, or another --suite"
        )
    if model is not None and VOCABULARIES[suite] > model.nouns:
        print(
            f"warning: suite {suite} has {VOCABULARIES[suite]} nouns, {options.model} knows the first {model.nouns}: prompts with others count "
            "against it",
            file=sys.stderr,
        )
    independent = ImageNetFeatures.load() if options.features else None
    items = list_items(options, VOCABULARIES[suite])
    scenes = [item.scene for item in items]
    began = time.monotonic()
    if model is None:
        images = np.concatenate(list(render_prompted(scenes, options.seed + 2)))
        rejected: list[Rejection | None] = [None] * len(items)
        about: dict[str, Any] = {"name": RENDERS, "sha256": None}
    else:
        images, rejected, about = draw_items(items, model, options)
    true = np.concatenate(list(render_prompted(scenes, options.seed + 1)))
    result = {
        "format_version": FORMAT_VERSION,
        "model": about,
        "options": {
            k: v
            for k, v in asdict(options).items()
            if k not in ("model", "output", "model_options", "suite", "verifier")
        },
        "suite": {"name": suite, "nouns": VOCABULARIES[suite]},
        "nouns_known": model.nouns if model else None,
        "verifier_sha256": file_sha256(weights),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
        "environment": describe_machine(),
        "seconds": round(time.monotonic() - began, 1),
        **measure(items, images, true, verifier, rejected),
    }
    if independent:
        there = np.array([why is None for why in rejected])
        result["independent_features"] = measure_independently(images[there], true[there], independent)
    name = options.name or about["name"].replace("/", "-")
    rows = result.pop("rows")
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet", compression="zstd")
    _draw_sheet(items, images, rejected, folder / f"{name}.png")
    print_table(result)
    print(folder / f"{name}.json")
    return COMPLETE


def largest_suite(nouns: int) -> str:
    """The largest of `VOCABULARIES` that is known to who knows the first `nouns`; the smallest, if none is."""
    known = [name for name, size in VOCABULARIES.items() if size <= nouns]
    return known[-1] if known else next(iter(VOCABULARIES))


def list_items(options: EvaluateOptions, nouns: int = DEFAULT_NOUNS) -> list[Item]:
    """Every image to draw, families in turn; depends on seed, split, the two counts and `nouns` alone.

    The first k prompts of each family are the same for any larger number of prompts.
    """
    from millijoule.workers.scenes.prompts import write_prompt

    held_out = options.split == "held-out"
    items = []
    for k in range(options.prompts_per_family):
        for f, family in enumerate(FAMILIES):
            rng = np.random.default_rng((options.seed, int(held_out), f, k))
            scene = sample_scene(family, rng, held_out=held_out, nouns=nouns)
            prompt = write_prompt(scene, rng)
            seeds = rng.integers(2**63, size=options.images_per_prompt)
            items += [Item(family, prompt, scene, int(seed)) for seed in seeds]
    return items


@dataclass(frozen=True)
class OpenedModel:
    """A model to judge: loaded, and what another process needs to load it again."""

    generator: Generator
    model: str
    how: GeneratorOptions
    device: str

    @property
    def nouns(self) -> int:
        """How many of the vocabulary's first nouns it knows."""
        return known_nouns(self.generator)


def open_model(options: EvaluateOptions, device: str) -> OpenedModel:
    """Load the model.

    Raises:
        InputError: it cannot be loaded, or makes images of a size that the verifier does not read.
    """
    from millijoule.workers.generators.registry import load_generator

    obtained = options.model_options.obtain(options.model, on_gpu=device.startswith("cuda"))
    generator = load_generator(obtained.model, device=device, options=obtained.options)
    info = generator.info
    size = (IMAGE_SIZE, IMAGE_SIZE)
    if (info.width, info.height) != size and size not in info.sizes:
        raise InputError(
            f"--model {options.model}: makes {info.width}x{info.height}, the verifier reads {IMAGE_SIZE}x{IMAGE_SIZE}"
        )
    return OpenedModel(generator, obtained.model, obtained.options, device)


def draw_items(
    items: list[Item], model: OpenedModel, options: EvaluateOptions
) -> tuple[np.ndarray, list[Rejection | None], dict[str, Any]]:
    """uint8 `[n, 64, 64, 3]`, why some of these are no images, and what there is to say about the model."""
    from rich.console import Console
    from rich.progress import track

    generator, how = model.generator, model.how
    info = generator.info
    asked: dict[str, Any] = {
        "num_inference_steps": options.num_inference_steps,
        "guidance_scale": options.guidance_scale,
    }
    requests = [ImageRequest(str(i), 0, item.prompt, item.seed, **asked) for i, item in enumerate(items)]
    many = how.batch_size or info.batch_size
    batches = [requests[i : i + many] for i in range(0, len(requests), many)]
    drawn: Iterator[GeneratedBatch] = (generator.generate(batch) for batch in batches)
    if options.processes > 1:
        drawn = _draw_in_processes(model.model, how, options.processes, model.device, batches)
    words = f"drawing {counted(len(requests), 'image')}"
    made = list(track(drawn, words, total=len(batches), console=Console(stderr=True)))
    rejected = [why for batch in made for why in batch.rejected or (None,) * len(batch.images)]
    about: dict[str, Any] = {
        "name": info.name,
        "sha256": info.sha256,
        "options": how.identity(),
        "num_inference_steps": options.num_inference_steps or info.num_inference_steps,
        **count_operations(generator, requests, [item.family for item in items]),
    }
    if rejected and None not in rejected:
        first = next(why for why in rejected if why is not None)
        raise InputError(
            f"--model {options.model}: gives no image of any prompt; the first is {first.status}: {first.reason}"
        )
    return np.concatenate([batch.images for batch in made]), rejected, about


def count_operations(
    generator: Generator, requests: Sequence[ImageRequest], families: Sequence[str]
) -> dict[str, Any]:
    """What is reported of a model's operations: of an image by part, of all parts by family, and what share is left out."""
    if not isinstance(generator, CountsOperations):
        return {"operations_per_image": None}
    parts = generator.operations_of(requests)
    done = np.sum(list(parts.values()), 0)
    dense = np.sum(list(generator.operations_of(requests, dense=True).values()), 0)
    of = np.array(families)
    return {
        "operations_per_image": mean_operations(parts),
        "operations_by_family": {f: round(float(done[of == f].mean())) for f in FAMILIES if f in families},
        "operations_left_out": round(float(1 - done.sum() / dense.sum()), 4),
    }


def mean_operations(parts: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Of `operations_of`, the mean over images, by part."""
    return {part: round(float(values.mean())) for part, values in parts.items()}


def _draw_in_processes(
    model: str, how: GeneratorOptions, processes: int, device: str, batches: list[list[ImageRequest]]
) -> Iterator[GeneratedBatch]:
    """Each batch, in order."""
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(partial(_draw_in_process, model, how, device), batches)


def _draw_in_process(
    model: str, how: GeneratorOptions, device: str, batch: list[ImageRequest]
) -> GeneratedBatch:
    return _loaded(model, how, device).generate(batch)


@cache
def _loaded(model: str, how: GeneratorOptions, device: str) -> Generator:
    """The model of a process that draws, on one thread."""
    import torch

    from millijoule.workers.generators.registry import load_generator

    torch.set_num_threads(1)
    return load_generator(model, device=device, options=how)


def measure(
    items: list[Item],
    images: np.ndarray,
    true: np.ndarray,
    verifier: Any,
    rejected: Sequence[Rejection | None],
) -> dict[str, Any]:
    """Everything that is reported of the images `[n, 64, 64, 3]`, against true renders of the same prompts.

    What is rejected is no image: it does not show what its prompt says, and sets of images are compared without it.
    """
    from millijoule.workers.judging import quality

    there = np.array([why is None for why in rejected])
    readings = verifier.read(images)
    verdicts = [quality.judge(i.scene, i.family, r) for i, r in zip(items, readings, strict=True)]
    families, prompts = np.array([i.family for i in items]), np.array([i.prompt for i in items])
    correct, strict = (
        np.array([getattr(v, name) for v in verdicts]) & there for name in ("correct", "strict")
    )
    exact, near = quality.duplicate_rates(images[there], prompts[there].tolist())
    return {
        "images": len(items),
        "rejected": dict(Counter(why.status for why in rejected if why is not None)),
        "score": quality.family_means(correct, families, prompts),
        "strict_score": quality.family_means(strict, families, prompts),
        **compare_features(verifier.features(images[there]), verifier.features(true[there])),
        "exact_duplicates": exact,
        "near_duplicates": near,
        "rows": [
            {
                "family": item.family,
                "prompt": item.prompt,
                "seed": item.seed,
                "rejected": None if why is None else f"{why.status}: {why.reason}",
                "read": [
                    {"noun": i.noun, "colour": i.colour, "size": i.size, "x": round(i.x), "y": round(i.y)}
                    for i in (reading.icons if why is None else ())
                ],
                "background": reading.background if why is None else None,
                "correct": bool(right),
                "strict": bool(strictly),
            }
            for item, reading, why, right, strictly in zip(
                items, readings, rejected, correct, strict, strict=True
            )
        ],
    }


def compare_features(features: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """How far features `[n, d]` of images are from those of as many true renders; not a number for three images or fewer."""
    from millijoule.workers.judging import quality

    if len(features) <= quality.NEIGHBOURS:
        return dict.fromkeys(("frechet_distance", "precision", "recall"), math.nan)
    precision, recall = quality.precision_recall(features, true)
    distance = quality.frechet_distance(features, true)
    return {"frechet_distance": distance, "precision": precision, "recall": recall}


def measure_independently(images: np.ndarray, true: np.ndarray, network: ImageNetFeatures) -> dict[str, Any]:
    """What is reported of the images `[n, 64, 64, 3]` in the features of a network that never saw a render."""
    from rich.console import Console
    from rich.progress import track

    words = f"looking at {counted(len(images), 'image')} and as many renders"
    parts = [part for kind in (images, true) for part in np.array_split(kind, math.ceil(len(kind) / 64))]
    found = [network.features(part) for part in track(parts, words, console=Console(stderr=True))]
    features, true_features = np.split(np.concatenate(found), 2)
    return {
        "network": network.name,
        "sha256": network.sha256,
        **compare_features(features, true_features),
    }


def _draw_sheet(
    items: list[Item], images: np.ndarray, rejected: Sequence[Rejection | None], path: Path
) -> None:
    from PIL import Image

    from millijoule.workers.judging.contact_sheet import draw_contact_sheet

    first: dict[str, int] = {}
    for i, item in enumerate(items):
        first.setdefault(item.prompt, i)
    chosen = list(first.values())[:SHEET_IMAGES]
    shown, words = [Image.fromarray(images[i]) for i in chosen], []
    for i in chosen:
        why = rejected[i]
        words.append(items[i].prompt if why is None else f"{why.status}: {items[i].prompt}")
    path.write_bytes(draw_contact_sheet(shown, words))


def print_table(result: dict[str, Any]) -> None:
    """Scores with intervals, then the set metrics, for people."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{result['model']['name']}: {result['images']} images, {result['suite']['name']}",
        title_justify="left",
    )
    for heading in ("", "score", "95 % interval", "strict"):
        table.add_column(heading, justify="left" if not heading else "right")
    for family, (value, low, high) in result["score"].items():
        strict = result["strict_score"][family][0]
        table.add_row(family, f"{value:.3f}", f"{low:.3f} to {high:.3f}", f"{strict:.3f}")
    console = Console()
    console.print(table)
    operations = result["model"].get("operations_per_image")
    rejected = ", ".join(f"{n} {status}" for status, n in result["rejected"].items())
    lines = {
        **(
            {"no image": f"{rejected}; they count as wrong, lines below are without them"} if rejected else {}
        ),
        "Frechet distance": f"{result['frechet_distance']:.3f}",
        "precision, recall": f"{result['precision']:.3f}, {result['recall']:.3f}",
        "duplicates": f"{result['exact_duplicates']:.3f} exact, {result['near_duplicates']:.3f} near",
        **_independent_lines(result.get("independent_features")),
        "operations per image": f"{sum(operations.values()):,}" if operations else "not counted",
    }
    for name, text in lines.items():
        console.print(f"{name:<22}{text}", highlight=False)


def _independent_lines(found: dict[str, Any] | None) -> dict[str, str]:
    if found is None:
        return {}
    text = "Frechet distance {frechet_distance:.3f}; precision, recall {precision:.3f}, {recall:.3f}"
    return {f"in {found['network']}": text.format(**found)}


def main(argv: list[str] | None = None) -> int:
    return run_command("evaluate", EvaluateOptions, run, argv)


if __name__ == "__main__":
    sys.exit(main())
