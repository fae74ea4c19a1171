"""The bare loop the pipeline is measured against: generator, encoder and writer, and nothing else.

`python -m millijoule.jobs.bench.bare_loop PROMPTS.txt OUTPUT PROCESSES`
"""

from __future__ import annotations

import multiprocessing
import sys
from pathlib import Path

from millijoule.workers.generators.protocol import load_generator
from millijoule.workers.images.encode import encode_png
from millijoule.workers.images.writers import open_writer
from millijoule.workers.schemas import ImageRequest, ImageRow
from millijoule.workers.shard_rows import derive_seed

#: Images per file, as in the job's default.
IMAGES_PER_FILE = 256


def work(part: int, prompts: list[str], output: str) -> None:
    """Draw, encode and write `prompts`, one image each, on one thread."""
    import torch

    torch.set_num_threads(1)
    generator = load_generator("default")
    info = generator.info
    for start in range(0, len(prompts), IMAGES_PER_FILE):
        chunk = prompts[start : start + IMAGES_PER_FILE]
        requests = [
            ImageRequest(f"{part}-{start + i}", 0, prompt, derive_seed(0, f"{part}-{start + i}", 0))
            for i, prompt in enumerate(chunk)
        ]
        folder = Path(output, f"{part}-{start}")
        folder.mkdir(parents=True)
        writer = open_writer("parquet", folder, f"data/{part:04d}-{start:08d}")
        for at in range(0, len(requests), info.batch_size):
            batch = requests[at : at + info.batch_size]
            for request, image in zip(batch, generator.generate(batch).images, strict=True):
                height, width = image.shape[:2]
                encoded = encode_png(
                    image,
                    request,
                    steps=info.num_inference_steps,
                    model_name=info.name,
                    model_sha256=info.sha256,
                )
                row = ImageRow(
                    request, "ok", width=width, height=height, num_inference_steps=info.num_inference_steps
                )
                writer.add(row, encoded)
        writer.finish()


def main() -> None:
    prompts, output, processes = Path(sys.argv[1]).read_text().splitlines(), sys.argv[2], int(sys.argv[3])
    context = multiprocessing.get_context("spawn")
    parts = [context.Process(target=work, args=(i, prompts[i::processes], output)) for i in range(processes)]
    for part in parts:
        part.start()
    for part in parts:
        part.join()
    if any(part.exitcode for part in parts):
        sys.exit(1)


if __name__ == "__main__":
    main()
