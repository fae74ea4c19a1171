"""`millijoule bench memory`: what several workers of one model take of a host's memory, and what batches of a size take and give.

* **Workers.** 1 and then N processes load the model as workers do, one after another, and draw an image. While all are there, each
  reads its proportional set size (PSS, of which the kernel says what is anonymous and what are pages of files): a page that
  k processes share counts 1/k in each, so that their sum is what the host has less. The same with weights that are copied
  into each process, to compare with.
* **Batches.** Seconds per image and peak memory per image of a model, by batch size, each in a process of its own, in rounds that
  go up and down the sizes: what a worker's first guess and its bound (`workers.diffusion.memory`) rest on.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from millijoule.jobs.entry import COMPLETE
from millijoule.jobs.measuring.measurement import (
    ResultOptions,
    answer_of,
    describe,
    run_alone,
    start_alone,
    write_result,
)
from millijoule.jobs.measuring.process import peak_mb
from millijoule.workers.errors import UsageError
from millijoule.workers.generators.options import EngineName, GeneratorOptions
from millijoule.workers.schemas import ImageRequest

#: The goal: N workers' memory over one worker's.
GOAL_RATIO = 1.3

#: A process waits so long for the others to have loaded.
PATIENCE_S = 1_200.0


@dataclass(frozen=True)
class BenchOptions(ResultOptions):
    """Measure workers' memory and write the result file."""

    model: str | None = None
    """Of the workers; default: a Stable Diffusion pipeline with random float32 weights, made for this run."""

    weights_gb: Annotated[float, tyro.conf.arg(metavar="GB")] = 4.0
    """About how large that pipeline is."""

    workers: int = 4
    """Processes that load the model on this host."""

    copied_workers: int = 2
    """Processes that copy it, to compare with: each takes all of it."""

    engine: EngineName = "deepspeed"
    """What runs the networks."""

    batch_model: str = "baseline"
    """Of the batches."""

    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    """Images per call."""

    batch_images: int = 64
    """Images per batch size and round."""

    batch_steps: int = 4
    """Inference steps of them."""

    rounds: int = 4
    """Of all batch sizes, up and down in turn; 0: none are measured."""


def run(options: BenchOptions) -> int:
    """Run the measurement."""
    for name in ("workers", "copied_workers"):
        if (count := getattr(options, name)) < 2:
            raise UsageError(f"--{name.replace('_', '-')} {count}: at least 2, to be compared with one")
    result = describe("memory", options)
    with tempfile.TemporaryDirectory(prefix="millijoule-memory-") as scratch:
        model = options.model or str(made_up_pipeline(Path(scratch, "model"), options.weights_gb))
        result["weights_mb"] = weights_bytes(model) / 1e6
        for name, copied in (("mapped", False), ("copied", True)):
            many = options.copied_workers if copied else options.workers
            rows = {n: measure_workers(model, n, copied, options.engine) for n in (1, many)}
            total = {n: sum(row["pss_mb"] for row in found) for n, found in rows.items()}
            result[name] = {
                "workers": many,
                "one_worker_pss_mb": total[1],
                "all_workers_pss_mb": total[many],
                "ratio": total[many] / total[1],
                "rows": {str(n): found for n, found in rows.items()},
            }
        result["goal_ratio"] = GOAL_RATIO
    if options.rounds:
        result["batches"] = measure_batches(options)
    write_result(result, options.result)
    return COMPLETE


def made_up_pipeline(folder: Path, weights_gb: float) -> Path:
    """Save a Stable Diffusion pipeline for images of 64 by 64 pixels with random weights of about `weights_gb` * 10**9 bytes."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    letters = [chr(code) for code in range(33, 127)]
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    text = CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=768,
        intermediate_size=3072,
        num_attention_heads=12,
        bos_token_id=len(tokens) - 2,
        eos_token_id=len(tokens) - 1,
    )
    width = max(1, round(10 * (weights_gb / 3.8) ** 0.5)) * 32  # 320: 3.4 GB, beside a text encoder
    torch.manual_seed(0)
    pipeline: Any = StableDiffusionPipeline(
        vae=AutoencoderKL(
            block_out_channels=(32, 64, 64, 64),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=4,
            sample_size=64,
        ),
        text_encoder=CLIPTextModel(text),
        tokenizer=CLIPTokenizer(
            vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=77
        ),
        unet=UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(width, 2 * width, 4 * width, 4 * width),
            cross_attention_dim=768,
            attention_head_dim=8,
        ),
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def weights_bytes(model: str) -> int:
    """Size of the weights of a model's folder, or of its file."""
    from millijoule.workers.generators.registry import model_path

    path = model_path(model)
    files = path.rglob("*.safetensors") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def measure_workers(model: str, workers: int, copied: bool, engine: EngineName) -> list[dict[str, Any]]:
    """What each of `workers` processes takes once all of them have loaded `model` and drawn an image."""
    with tempfile.TemporaryDirectory(prefix="millijoule-meeting-") as meeting:
        started = [
            start_alone(one_worker, model, copied, engine, meeting, i, workers) for i in range(workers)
        ]
        return [answer_of(process) for process in started]


def one_worker(
    model: str, copied: bool, engine: EngineName, meeting: str, number: int, workers: int
) -> dict[str, Any]:
    """In a process of its own: load, draw, meet the others, and read what this process takes."""
    import torch

    import millijoule.workers.actor  # noqa: F401 (what a worker's process has imported besides)
    from millijoule.workers.drawing.out_of_memory import release_memory
    from millijoule.workers.generators.registry import load_generator

    torch.set_num_threads(1)
    generator: Any = load_generator(model, device="cpu", options=GeneratorOptions(engine=engine))
    if copied:
        for component in generator.pipeline.components.values():
            for weight in component.parameters() if isinstance(component, torch.nn.Module) else ():
                weight.data = weight.data.clone()
    generator.generate([ImageRequest("p", 0, "a cat", number, num_inference_steps=1)])
    release_memory()
    _meet(Path(meeting), "loaded", number, workers)
    found = {"worker": number, **pss_mb()}
    _meet(Path(meeting), "measured", number, workers)
    return found


def _meet(folder: Path, what: str, number: int, workers: int) -> None:
    """Wait until all have come so far."""
    (folder / f"{what}-{number}").touch()
    deadline = time.monotonic() + PATIENCE_S
    while len(list(folder.glob(f"{what}-*"))) < workers:
        if time.monotonic() > deadline:
            raise TimeoutError(f"not all of {workers} processes have {what} after {PATIENCE_S:.0f} s")
        time.sleep(0.05)


def pss_mb() -> dict[str, float]:
    """This process' proportional set size in MB (10**6 bytes): all, anonymous pages, pages of files."""
    names = {"Pss": "pss_mb", "Pss_Anon": "anonymous_mb", "Pss_File": "files_mb"}
    lines = [line.split() for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]]
    return {names[f[0][:-1]]: int(f[1]) * 1024 / 1e6 for f in lines if f[0][:-1] in names}


def measure_batches(options: BenchOptions) -> dict[str, Any]:
    """Seconds and peak memory per image by batch size."""
    rows = []
    for turn in range(options.rounds):
        sizes = options.batches if turn % 2 == 0 else options.batches[::-1]
        for size in sizes:
            told = [options.batch_model, size, options.batch_images, options.batch_steps, options.engine]
            rows.append({"round": turn, "batch_size": size, **run_alone(one_batch_size, *told)})

    def median(size: int, name: str) -> float:
        return statistics.median(row[name] for row in rows if row["batch_size"] == size)

    least = options.batches[0]
    return {
        "by_size": {
            str(size): {
                "seconds_per_image_over_smallest_batch": median(size, "seconds_per_image")
                / median(least, "seconds_per_image"),
                "peak_mb": median(size, "peak_mb"),
            }
            for size in options.batches
        },
        "estimated_mb_per_image": rows[0]["estimated_mb_per_image"],
        "rows": rows,
    }


def one_batch_size(
    model: str, size: int, images: int, steps: int, engine: EngineName
) -> dict[str, float | None]:
    """In a process of its own: draw `images` images in calls of `size`."""
    import torch

    from millijoule.workers.drawing.out_of_memory import release_memory
    from millijoule.workers.generators.registry import load_generator

    torch.set_num_threads(1)
    generator: Any = load_generator(model, device="cpu", options=GeneratorOptions(engine=engine))
    requests = [
        ImageRequest("p", i, "a red cat", i, num_inference_steps=steps) for i in range(max(images, size))
    ]
    generator.generate(requests[:size])
    release_memory()
    before = _resident_mb()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    began = time.process_time()
    for part in _parts(requests, size):
        generator.generate(part)
    seconds = (time.process_time() - began) / len(requests)
    memory = getattr(generator, "memory", None)
    info = generator.info
    return {
        "seconds_per_image": seconds,
        "peak_mb": peak_mb() - before,
        "estimated_mb_per_image": memory.image_bytes(info.width, info.height) / 1e6 if memory else None,
    }


def _resident_mb() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmRSS:"))


def _parts(requests: Sequence[ImageRequest], size: int) -> list[Sequence[ImageRequest]]:
    """Full calls only."""
    return [requests[at : at + size] for at in range(0, len(requests) - size + 1, size)]
