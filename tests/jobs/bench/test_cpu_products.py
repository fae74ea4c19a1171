"""The benchmark of int8 products compares the same bits, and what is quoted is in the committed file."""

import json
from pathlib import Path

import numpy as np
import pytest

from millijoule.jobs.bench import cpu_products as bench
from millijoule.jobs.bench.scene_requests import scene_requests
from millijoule.kernels.int8_product import FORMS
from millijoule.workers.errors import MillijouleError
from millijoule.workers.generators.registry import load_generator

ROOT = Path(__file__).parents[3]
RESULT = ROOT / "benchmarks" / "kernels" / "cpu-products.json"


@pytest.fixture(scope="module")
def generator():
    return load_generator("default")


def test_each_form_draws_in_every_pair(generator, monkeypatch):
    used, only = [], bench.only
    monkeypatch.setattr(bench, "only", lambda form: used.append(form) or only(form))
    pairs = bench.measure(generator, scene_requests(2), 2)
    assert len(pairs) == 2
    assert all(set(times) == set(FORMS) for pair in pairs for times in (pair.cpu, pair.wall))
    orders = [tuple(used[i : i + 2]) for i in range(0, 6, 2)]  # of the pair that warms up, and the two
    assert orders == [FORMS[::-1], FORMS, FORMS[::-1]]


def test_other_bits_void_the_result(generator, monkeypatch):
    plain = generator.generate
    turn = iter(range(100))

    def drift(requests):
        made = plain(requests)
        made.images[0, 0, 0, 0] ^= next(turn) & 1
        return made

    monkeypatch.setattr(generator, "generate", drift)
    with pytest.raises(MillijouleError, match="different images"):
        bench.measure(generator, scene_requests(1), 1)


def test_ratios_are_of_pairs_and_times_of_images():
    pairs = [bench.Pair({"int8": 8.0, "float32": 2.0}, {"int8": 9.0, "float32": 3.0}) for _ in range(2)]
    pairs.append(bench.Pair({"int8": 5.0, "float32": 5.0}, {"int8": 9.0, "float32": 1.0}))
    found = bench.summary(pairs, 100)
    assert found["cpu"]["int8_over_float32"] == {"median": 4.0, "least": 1.0, "most": 4.0}
    assert found["wall"]["int8_over_float32"] == {"median": 3.0, "least": 3.0, "most": 9.0}
    assert found["cpu"]["ms_per_image"]["float32"] == {"median": 20.0, "least": 20.0, "most": 50.0}


def test_the_readme_quotes_the_committed_file():
    result = json.loads(RESULT.read_text())
    assert result["same_bits"] is True
    ratio, cpu = result["cpu"]["int8_over_float32"], result["cpu"]["ms_per_image"]
    readme = (ROOT / "docs/measured.md").read_text()
    (row,) = (line for line in readme.splitlines() if "benchmarks/kernels/cpu-products.json" in line)
    assert f"**{ratio['median']:.1f}x** ({ratio['least']:.1f} to {ratio['most']:.1f})" in row
    assert f"{cpu['int8']['median']:.1f} to {cpu['float32']['median']:.1f} ms" in row
    assert np.isfinite(ratio["median"])
