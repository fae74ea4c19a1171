"""`millijoule bench un0`: the loop it compares with draws what the equations say, and figures follow from the blocks."""

import json
import math

import pytest
import torch

from millijoule.jobs.bench import main
from millijoule.jobs.bench.cpu.un0.own_loop import own_loops, random_checkpoint
from millijoule.workers.generators.un0 import Un0Generator
from millijoule.workers.generators.un0_integers import convolutions_of


def test_figures_follow_from_the_blocks(tmp_path):
    path = tmp_path / "result.json"
    sizes = ["--sizes", "64", "--batches", "2", "3", "--images", "4", "--rounds", "2", "--no-compiled"]
    assert main(["un0", str(path), *sizes]) == 0
    found = json.loads(path.read_text())["models"]["64"]
    assert found["bench_images"]["integer_forms_agree"]
    assert found["integers"]["near"] >= 0.9995
    for form, least in found["cpu_ms_per_image"].items():
        own = [1000 * b["cpu_s"] / b["images"] for b in found["blocks"] if b["form"] == form]
        assert len(own) == 4
        assert least == pytest.approx(min(own), abs=1e-3)
    loop = min(v for k, v in found["cpu_ms_per_image"].items() if k.startswith("own loop, batch"))
    ours = found["cpu_ms_per_image"]["our float form"]
    assert found["times_as_fast"]["our float form"]["as own loop"] == pytest.approx(loop / ours, rel=0.01)


def test_the_loop_draws_the_models_images(monkeypatch):
    """From the same start, beside our float form, which tests hold to the equations."""
    architecture, tensors = random_checkpoint(64, 1.0)
    start = torch.rand(3, 64 + 8, generator=torch.Generator().manual_seed(5))
    monkeypatch.setattr(torch, "rand", lambda *shape: start.clone())
    loops = own_loops(64, tensors, (3,), False)
    images = {name: draw() for name, (_, draw) in loops.items()}
    assert set(images) == {"own loop, batch 3", "own loop, diagonal once, batch 3"}
    generator = Un0Generator(architecture, tensors, None, "", "", "cpu")  # type: ignore[arg-type]
    monkeypatch.setattr(
        "millijoule.workers.generators.un0.start_angles",
        lambda seeds, n: torch.cat([start, start[:1].repeat(len(seeds) - 3, 1)]) * 2 * math.pi - math.pi,
    )
    from millijoule.workers.schemas import ImageRequest

    expected = generator.decode(
        generator.relax([0, 1, 2], [ImageRequest("p", i, "", seed=i) for i in range(3)])
    )
    for name, drawn in images.items():
        assert abs(drawn.numpy().astype(int) - expected).max() <= 1, name
    assert expected.std() > 20


def test_the_checkpoint_has_the_published_number_of_parameters():
    architecture, tensors = random_checkpoint(1024, 1.0)
    assert sum(t.numel() for t in tensors.values()) == architecture.parameters == 1_289_387
    assert len(convolutions_of(architecture, tensors)) == 7


def test_nothing_to_measure_is_refused(capsys):
    assert main(["un0", "--images", "0"]) == 2
    assert "--images" in capsys.readouterr().err
