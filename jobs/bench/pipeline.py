"""`millijoule bench pipeline`: what Ray, leases and commits cost, as ratios taken in one run.

Compared are a bare loop (the same generator, encoder and writer in as many processes, no Ray, no plan, no commits) and
`millijoule generate` on a running Ray cluster: whole processes, start to end, and what is between start and finish, the
first draw to the last file. Processor time is of all processes that take part, Ray's own included; it says what a machine
with other work does not. Every raw row is in the result file.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from millijoule.jobs.entry import COMPLETE
from millijoule.jobs.measuring.measurement import answer_of, describe, start_alone, write_result
from millijoule.jobs.measuring.process import TreeCpu
from millijoule.jobs.measuring.ray_head import ray_head


@dataclass(frozen=True)
class BenchOptions:
    """Measure the pipeline and write the result file, raw rows included."""

    output: str = "benchmarks/pipeline"
    """Folder for the result file (JSON)."""

    images: int = 100_000
    """Images per run."""

    pairs: int = 3
    """Runs of each side, in turn."""

    processes: int = 2
    """Processes of the bare loop, and workers of the job."""


def run(options: BenchOptions) -> int:
    result = {**describe("pipeline", options), "throughput": throughput(options)}
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{time.strftime('%Y-%m-%d')}-{result['environment']['commit'][:7]}.json"
    write_result(result, path)
    print(path)
    return COMPLETE


def throughput(options: BenchOptions) -> dict[str, Any]:
    """Whole-process seconds of job and bare loop for the same prompts, in turn on the same machine."""
    rows: list[dict[str, Any]] = []
    n = options.processes
    with tempfile.TemporaryDirectory(prefix="millijoule-bench-") as scratch, ray_head(n) as address:
        prompts = Path(scratch, "prompts.txt")
        write_prompts(prompts, options.images)

        def bare(output: Path) -> float:
            parts = [start_alone(draw_part, i, n, str(prompts), str(output)) for i in range(n)]
            return first_to_last(parts)

        def job(output: Path) -> float:
            command = [sys.executable, "-m", "millijoule.jobs.generate", "--quiet", "--ray-address", address]
            command += ["--prompts", str(prompts), "--output", str(output), "--workers", str(n)]
            subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
            # from the first draw to the last commit
            return json.loads((output / "stats.json").read_text())["seconds_first_to_last_commit"]

        for pair in range(options.pairs):
            for side in (bare, job) if pair % 2 == 0 else (job, bare):
                output = Path(scratch, f"{side.__name__}-{pair}")
                with TreeCpu() as cpu:
                    began = time.monotonic()
                    working = side(output)
                    seconds = time.monotonic() - began
                rows.append(
                    {
                        "side": side.__name__,
                        "pair": pair,
                        "seconds": seconds,
                        "seconds_between_start_and_finish": working,
                        "seconds_of_start_and_finish": seconds - working,
                        "cpu_seconds": cpu.seconds,
                    }
                )

    def of_bare(what: str) -> dict[str, Any]:
        took = {(row["side"], row["pair"]): row[what] for row in rows}
        ratios = [took["bare", pair] / took["job", pair] for pair in range(options.pairs)]
        return {"median": statistics.median(ratios), "ratios": ratios}

    return {
        "images": options.images,
        "of_bare_loop": {
            what: of_bare(what) for what in ("seconds", "seconds_between_start_and_finish", "cpu_seconds")
        },
        "goal": "at least 0.85, at most 10 s of start and finish",
        "rows": rows,
    }


def write_prompts(path: Path, n: int) -> None:
    """`n` prompts of one icon each, one a line."""
    from millijoule.workers.scenes.scenes import BACKGROUNDS, COLOURS
    from millijoule.workers.scenes.vocabulary import DEFAULT_NOUNS, NOUNS

    nouns = NOUNS[:DEFAULT_NOUNS]
    with path.open("w") as file:
        for i in range(n):
            noun, colour = nouns[i % len(nouns)], COLOURS[i // len(nouns) % len(COLOURS)]
            ground = BACKGROUNDS[i // 7 % len(BACKGROUNDS)]
            file.write(f"a {colour} {noun} on a {ground} background\n")


def first_to_last(parts: Sequence[Any]) -> float:
    """Seconds from the first draw of any process that runs `draw_part` to the last file of all, as a job's are counted."""
    begun, ended = zip(*map(answer_of, parts), strict=True)
    return max(ended) - min(begun)


def draw_part(
    part: int, parts: int, prompts_file: str, output: str, model_word: str = "default"
) -> tuple[float, float]:
    """The bare loop: draw, encode and write every `parts`-th prompt from `part` on, one image each, on one thread.

    Args:
        model_word: as for `--model`.

    Returns:
        When the first draw began and the last file was written, in seconds on this host's monotonic clock.
    """
    import torch

    from millijoule.workers.generators.registry import load_generator, usual_shard_images
    from millijoule.workers.images.encode import Drawn, encode_images
    from millijoule.workers.images.formats import ImageFormat
    from millijoule.workers.images.provenance import ModelProvenance
    from millijoule.workers.images.writers import open_writer
    from millijoule.workers.schemas import ImageRequest, ImageRow
    from millijoule.workers.shard_rows import derive_seed

    torch.set_num_threads(1)
    prompts = Path(prompts_file).read_text().splitlines()[part::parts]
    generator = load_generator(model_word)
    info = generator.info
    steps, model = info.num_inference_steps, ModelProvenance(info.name, info.sha256)
    generator.generate([ImageRequest("warm-up", 0, "", 0)])  # as a worker does it
    per_file = usual_shard_images(model_word)  # as in the job's shards
    began = time.monotonic()
    for start in range(0, len(prompts), per_file):
        chunk = prompts[start : start + per_file]
        requests = [
            ImageRequest(f"{part}-{start + i}", 0, prompt, derive_seed(0, f"{part}-{start + i}", 0))
            for i, prompt in enumerate(chunk)
        ]
        folder = Path(output, f"{part}-{start}")
        folder.mkdir(parents=True)
        writer = open_writer("parquet", folder, f"data/{part:04d}-{start:08d}")
        for at in range(0, len(requests), info.batch_size):
            batch = requests[at : at + info.batch_size]
            drawn = [Drawn(i, r, steps) for i, r in zip(generator.generate(batch).images, batch, strict=True)]
            encoded = [one for one in encode_images(ImageFormat(), drawn, model) if isinstance(one, bytes)]
            rows = [
                ImageRow(one.request, "ok", one.image.shape[1], one.image.shape[0], steps) for one in drawn
            ]
            writer.add_many(rows, encoded)  # as a worker does it
        writer.finish()
    return began, time.monotonic()
