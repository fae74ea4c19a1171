"""`millijoule bench worker`: parts add up to the job, and the picture has a bar for each side."""

import io
import json
from pathlib import Path

import pytest
from PIL import Image

from millijoule.jobs.bench import main
from millijoule.jobs.bench.cpu.worker import PARTS

ROOT = Path(__file__).parents[4]


@pytest.mark.long
def test_parts_add_up_on_both_sides(tmp_path):
    result, picture = tmp_path / "worker.json", tmp_path / "worker.png"
    words = [
        "--images",
        "300",
        "--rounds",
        "1",
        "--turns",
        "1",
        "--before",
        str(ROOT),
        "--picture",
        str(picture),
    ]
    assert main(["worker", str(result), *words]) == 0
    found = json.loads(result.read_text())
    assert set(found["cpu_us_per_image"]) == {"before", "now"}
    for side, told in found["cpu_us_per_image"].items():
        assert set(told) == {*PARTS, "job"}
        assert sum(told[part] for part in PARTS) == pytest.approx(told["job"])
        assert all(told[part] > 0 for part in ("drawing", "encoding", "writing"))
        (row,) = (row for row in found["rows"] if row["side"] == side)
        assert told["job"] == row["cpu_us_per_image"]["job"]
    with Image.open(io.BytesIO(picture.read_bytes())) as drawn:
        assert len(drawn.convert("RGB").getcolors(1 << 20)) > 6


def test_nothing_to_measure_is_refused(capsys):
    assert main(["worker", "--images", "0"]) == 2
    assert "--images" in capsys.readouterr().err
