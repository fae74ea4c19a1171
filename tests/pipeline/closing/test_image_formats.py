"""A whole job in each image format: everything that reads images afterwards reads it."""

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from support.local_job import plan, work
from support.models import Plain

from millijoule.pipeline.closing.check import check_output
from millijoule.pipeline.output.commits import read_commits
from millijoule.pipeline.report.gallery import read_samples
from millijoule.workers.images.formats import ImageFormat
from millijoule.workers.images.readers import read_images, read_provenance
from millijoule.workers.schemas import IMAGE_ROW_SCHEMA


class Fading(Plain):
    """One colour per image, which no format changes much."""

    def draw(self, request):
        return np.full((8, 8, 3), 16 * request.seed % 256, np.uint8)


@pytest.mark.parametrize("output_format", ["parquet", "webdataset", "files"])
@pytest.mark.parametrize(
    "image_format", [ImageFormat("jpeg", 80), ImageFormat("webp", 80)], ids=lambda f: f.name
)
def test_a_job_is_checked_shown_and_read_back(tmp_path, image_format, output_format):
    store, job = plan(tmp_path, [f"prompt {i}" for i in range(6)], shard_size=4, output_format=output_format)
    job = replace(job, image_format=image_format.name, image_quality=image_format.quality)
    shards = work(store, job, Fading("cpu"))
    assert list(check_output(store)) == []
    assert store.size("preview.png") > 0
    samples = read_samples(store)
    assert len(samples) == 6
    assert all(sample.picture.startswith("data:image/") for sample in samples)
    for commit in read_commits(store, len(shards)):
        mine = [dict(zip(IMAGE_ROW_SCHEMA.names, row, strict=True)) for row in commit.rows]
        for row, encoded in read_images(store, mine):
            image = Image.open(io.BytesIO(encoded))
            assert image.format == image_format.name.upper()
            assert abs(int(np.asarray(image.convert("RGB"))[4, 4, 0]) - 16 * row["seed"] % 256) <= 6
            assert read_provenance(encoded)[1]["prompt"] == row["prompt"]
