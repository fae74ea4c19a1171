"""`millijoule bench ladder MODEL`: rung after rung of a diffusion pipeline, what each saves and what it does to images.

Every rung runs in a process of its own, in blocks A B B A with the pipeline that has none, and draws the same prompts and seeds. A
rung stays, below those that follow, if it is cheaper and its images pass the gate. OUTPUT gets ladder.json (all rows),
ladder.png (the frontier), sheet.png (the same seeds on every rung) and preset.json, which `--optimize` takes.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from millijoule.jobs.entry import COMPLETE
from millijoule.jobs.ladder.candidates import candidates, choose
from millijoule.jobs.ladder.climb import DENSE, TOP, Climb, Gate, Ground, describe, save_json
from millijoule.jobs.ladder.prompts import are_icon_scenes, file_requests, icon_requests
from millijoule.jobs.machine import describe_machine
from millijoule.jobs.options.model import ModelOptions
from millijoule.jobs.set_up.model_rungs import pipeline_of
from millijoule.workers.diffusion.pipeline_folder import PipelineFolder
from millijoule.workers.errors import InputError, UsageError
from millijoule.workers.generators.options import GeneratorOptions, ModelPart
from millijoule.workers.judging.image_judge import ICON_JUDGE
from millijoule.workers.meters.meter import open_meter
from millijoule.workers.rungs.preset_file import FORMAT, PresetFile, write_preset
from millijoule.workers.rungs.presets import PRESET_NAMES, preset
from millijoule.workers.schemas import ImageRequest
from millijoule.workers.sources.obtain import ObtainedModel

log = logging.getLogger(__name__)

ICONS = "icon-scenes"
#: PSNR that is asked for where nobody can say what an image shows: differences are hardly seen.
MIN_PSNR_DB = 30.0


@dataclass(frozen=True)
class BenchOptions:
    """Climb the ladder of rungs of a diffusion pipeline, and recommend the cheapest combination whose images pass."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """A diffusion pipeline, as `millijoule generate --model` takes it."""

    output: str = "ladder"
    """Folder for ladder.json, ladder.png, sheet.png and preset.json. A climb that was interrupted goes on there."""

    prompts: Annotated[str, tyro.conf.arg(metavar="FILE|icon-scenes")] = ICONS
    """Prompts, as `millijoule generate --prompts` takes them; or icon scenes nobody was trained on."""

    images: int = 48
    """Images of every rung. Two seeds per prompt."""

    top_images: int | None = None
    """Images of the combination at the top, and of --presets; default: as many as --images."""

    tiny_decoder: Annotated[str | None, tyro.conf.arg(metavar="PATH")] = None
    """A smaller decoder to try, such as an AutoencoderTiny, as `millijoule generate --vae` takes it."""

    rungs: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")] = ()
    """Only these rungs; default: all that this pipeline can take here."""

    presets: tuple[Literal["lossless", "balanced", "max"], ...] = ()
    """Measure these presets, too."""

    min_psnr: float | None = None
    """The gate: least PSNR in dB to the dense images of the same seeds. Default: 30, or none where there is a score."""

    max_score_loss: float = 2.0
    """The gate where prompts are icon scenes: most points (of 100) of images lost that show what the prompt says."""

    features: str = ICON_JUDGE
    """Whose features say how far images are apart: the packaged verifier's, which reads 64x64 pixels, or those of a judge of
    yours, python:MODULE:FACTORY (an `ImageJudge`)."""

    device: Literal["auto", "gpu", "cpu"] = "auto"
    """What to measure on."""

    threads: int | None = None
    """CPU threads of a process that draws; PyTorch's default if not given."""

    block_seconds: float = 5.0
    """Length of a block; a batch that has begun is finished."""

    rounds: int = 1
    """How often A B B A is repeated for each rung."""

    seed: int = 0
    """Seed of prompts and images."""


def run(options: BenchOptions) -> int:
    obtained, folder = _pipeline(options)
    from millijoule.jobs.torch_device import torch_device
    from millijoule.workers.judging.image_judge import load_judge

    device = torch_device(options.device)
    on_gpu = device.startswith("cuda")
    requests = _requests(options)
    scored = options.features == ICON_JUDGE and are_icon_scenes(folder, requests)
    psnr = MIN_PSNR_DB if options.min_psnr is None and not scored else options.min_psnr
    gate = Gate(psnr, options.max_score_loss if scored else None)
    rungs = choose(candidates(folder, on_gpu=on_gpu, decoder=_decoder(options)), options.rungs)
    output = Path(options.output)
    (output / "images").mkdir(parents=True, exist_ok=True)
    meter = open_meter(_gpus(device))
    domains = _domains(meter.domains, on_gpu)
    ground = Ground(
        model=obtained.model,
        base=obtained.options,
        device=device,
        requests=requests,
        threads=options.threads,
        judge=load_judge(options.features),
        scored=scored,
        meter=meter,
        domains=domains,
        block_seconds=options.block_seconds,
        rounds=options.rounds,
        first_images=min(options.images, len(requests)),
        work=output / "images",
    )
    result = _begin(output, options, folder, ground)
    climb = Climb(ground, gate, result["rows"], lambda: save_json(output / "ladder.json", result))
    extra = [
        (
            f"preset {name}",
            replace(obtained.options, rungs=preset(name, folder)),
            ground.first_images if name == "lossless" else len(requests),  # rounding shows in few
        )
        for name in PRESET_NAMES
        if name in options.presets
    ]
    try:
        climb.run(rungs, extra)
    finally:
        meter.close()
    result["recommended"] = _recommend(output, climb, folder, ground)
    save_json(output / "ladder.json", result)
    _draw(output, result["rows"], ground)
    _say(result, ground, output)
    return COMPLETE


def _pipeline(options: BenchOptions) -> tuple[ObtainedModel, PipelineFolder]:
    """The model and its pipeline, and a look at the numbers."""
    for name in ("images", "rounds"):
        if getattr(options, name) < 1:
            raise UsageError(f"--{name} {getattr(options, name)}: at least 1")
    if options.block_seconds < 0:
        raise UsageError(f"--block-seconds {options.block_seconds}: 0 or more")
    obtained = ModelOptions().obtain(options.model)
    if (folder := pipeline_of(obtained)) is None:
        raise InputError(f"{options.model}: no diffusion pipeline; only those have rungs")
    return obtained, folder


def _decoder(options: BenchOptions) -> ModelPart | None:
    if options.tiny_decoder is None:
        return None
    return ModelOptions(vae=options.tiny_decoder).obtain(options.model).options.vae


def _requests(options: BenchOptions) -> list[ImageRequest]:
    """What every rung draws: the first prompts are the same for any number of images."""
    count = max(options.images, options.top_images or 0)
    if options.prompts == ICONS:
        return icon_requests(count, options.seed)
    return file_requests(options.prompts, count, options.seed)


def _gpus(device: str) -> list[str]:
    if not device.startswith("cuda"):
        return []
    import torch

    return [f"GPU-{torch.cuda.get_device_properties(device).uuid}"]


def _domains(domains: Sequence[str], on_gpu: bool) -> tuple[str, ...]:
    """The counters of what draws: the board's, or the processors' on a CPU (all that they do is in it)."""
    beginning = "gpu:" if on_gpu else "rapl:"
    found = tuple(d for d in domains if d.startswith(beginning))
    if on_gpu and not found:
        raise InputError("bench ladder: the GPU's energy counter cannot be read")
    return found


def _begin(output: Path, options: BenchOptions, folder: PipelineFolder, ground: Ground) -> dict[str, Any]:
    """The result to go on with: the one in `output` if it is of the same measurement, else a new one."""
    told = {k: v for k, v in asdict(options).items() if k not in ("output", "rungs", "presets", "model")}
    told = json.loads(json.dumps(told)) | {"model": folder.name, "model_sha256": folder.sha256()}
    path = output / "ladder.json"
    if path.is_file():
        try:
            existing = json.loads(path.read_bytes())
            same = existing["options"] == told
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: not a climb: {error}; choose another --output") from error
        if not same:
            raise InputError(f"{path}: a climb with other options; give the same ones, or another --output")
        log.info("going on in %s: %d rungs are measured", output, len(existing["rows"]))
        return existing
    return {
        "what": "rungs of a diffusion pipeline: cost against the pipeline without any, and distance of the images to its",
        "options": told,
        "environment": describe_machine(),
        "device": ground.device,
        "cost": ground.cost,
        "counters": list(ground.domains),
        "scored": ground.scored,
        "features": f"{ground.judge.name} {ground.judge.sha256}",
        "rows": [],
    }


def _recommend(output: Path, climb: Climb, folder: PipelineFolder, ground: Ground) -> dict[str, Any] | None:
    """The combination at the top as a preset."""
    if climb.top is None:
        return None
    standing = climb.top
    row = [r for r in climb.rows if r["rung"].startswith(f"{TOP}:")][-1]
    measured = {
        k: row[k] for k in ("cost_ratio", "seconds_ratio", "images", "psnr_db", "score", "score_loss")
    }
    engine = standing.engine if standing.engine != GeneratorOptions().engine else None
    made = PresetFile(
        FORMAT,
        standing.rungs,
        engine=engine,
        batch_size=standing.batch_size,
        cuda_graphs=standing.cuda_graphs,
        fused_modules=standing.fused_modules,
        model=folder.name,
        model_sha256=folder.sha256(),
        measured={"cost": ground.cost, **measured},
    )
    write_preset(output / "preset.json", made)
    return {"options": describe(standing), **measured}


def _draw(output: Path, rows: list[dict[str, Any]], ground: Ground) -> None:
    from millijoule.jobs.ladder.pictures import draw_frontier, draw_rungs

    (output / "ladder.png").write_bytes(draw_frontier(rows, ground.cost))
    images = {
        name: path
        for name in (DENSE, *(r["rung"] for r in rows))
        if (path := ground.work / f"{name}.npy").is_file()
    }
    prompts = [r.prompt for r in ground.requests[:8]]
    drawn = {name: np.load(path, mmap_mode="r")[:8] for name, path in images.items()}
    (output / "sheet.png").write_bytes(draw_rungs(drawn, prompts))


def _say(result: dict[str, Any], ground: Ground, output: Path) -> None:
    from millijoule.jobs.ladder.pictures import print_table

    print_table(result["rows"], ground.cost)
    found = result["recommended"]
    if found is None:
        print("nothing to recommend: no rung is cheaper with images that pass")
    else:
        print(
            f"recommended: {found['options']}\n{output / 'preset.json'}: for --optimize, {1 / found['cost_ratio']:.1f} times less"
        )
    print(output / "ladder.json")
