"""A report of 100,000 images: the page stays below 2 MB and says the right things."""

import json

import pytest
from support.large_output import GPUS_PER_NODE, IMAGES_PER_SHARD, NODES, is_slow, write_output

from millijoule.jobs import report
from millijoule.workers.storage.open import open_store

MAX_PAGE_BYTES = 2_000_000


@pytest.mark.parametrize("images", [4_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_many_images_make_a_small_page(tmp_path, images):
    store = open_store(str(tmp_path / "out"))
    write_output(store, images)
    assert report.main([store.url, "--gco2-per-kwh", "400", "--json", str(tmp_path / "report.json")]) == 0
    assert store.size("report.html") < MAX_PAGE_BYTES
    (job,) = json.loads((tmp_path / "report.json").read_text())["jobs"]
    assert job["images_ok"] == images
    assert job["evidence_class"] == "E2"
    assert len(job["devices"]) == NODES * GPUS_PER_NODE
    assert sum(row["images"] for row in job["devices"]) == images
    assert job["speed"]["stragglers"] == len([s for s in range(images // IMAGES_PER_SHARD) if is_slow(s)])
    watts = job["timeline"]["power"][0]["watts"]
    assert job["timeline"]["power"][0]["source"] == "power reading"
    assert min(w for w in watts[:150] if w is not None) >= 400
    assert all(sample["picture"] for sample in job["samples"])
