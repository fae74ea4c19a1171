"""The bare loop the pipeline is measured against: generator, encoder and writer, and nothing else."""

from __future__ import annotations

from pathlib import Path

from millijoule.workers.generators.registry import load_generator
from millijoule.workers.images.encode import encode_png
from millijoule.workers.images.writers import open_writer
from millijoule.workers.schemas import ImageRequest, ImageRow
from millijoule.workers.shard_rows import derive_seed

#: Images per file, as in the job's default.
IMAGES_PER_FILE = 256


def draw_part(part: int, parts: int, prompts_file: str, output: str) -> None:
    """Draw, encode and write every `parts`-th prompt of `prompts_file` from `part` on, one image each, on one thread."""
    import torch

    torch.set_num_threads(1)
    prompts = Path(prompts_file).read_text().splitlines()[part::parts]
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
