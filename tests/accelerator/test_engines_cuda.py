"""On an NVIDIA GPU: engines draw what PyTorch draws run plainly, graphs included, and a large denoiser can stay in host memory.

Rehearsed on a CPU with `make gpu-rehearsal` (`support/accelerator.py`), where there are no graphs.
"""

import numpy as np
import pytest
from support.accelerator import DEVICE, MISSING, REHEARSAL
from support.tiny_pipelines import tiny_pipeline

from millijoule.workers.generators.options import GeneratorOptions
from millijoule.workers.generators.registry import load_generator
from millijoule.workers.schemas import ImageRequest

pytestmark = pytest.mark.skipif(MISSING, reason="no CUDA device")

#: Levels of 255: kernels of another engine add in another order, in bfloat16 for the pipelines.
MEAN_LEVELS = 1.0


def draw(model, count, **options):
    generator = load_generator(model, device=DEVICE, options=GeneratorOptions(**options))
    steps = None if model == "default" else 3
    requests = [
        ImageRequest("p", i, "two red cats above a blue car", seed=i, num_inference_steps=steps)
        for i in range(count)
    ]
    twice = [generator.generate(requests).images.astype(int) for _ in range(2)]
    np.testing.assert_array_equal(twice[0], twice[1])
    return twice[0], generator.engine.report


@pytest.mark.parametrize("model", ["default", "sd15", "sdxl", "flux"])
@pytest.mark.parametrize("graphs", [False, True])
def test_deepspeed_draws_what_eager_draws(model, graphs):
    name = model if model == "default" else str(tiny_pipeline(model))
    expected, _ = draw(name, 3, engine="eager")
    images, report = draw(name, 3, cuda_graphs=graphs and not REHEARSAL)
    if (
        graphs and not REHEARSAL and model != "default"
    ):  # whose shapes differ from batch to batch: not captured
        assert report.events.get("captured", 0) > 0
        assert "not captured" not in report.events
        assert np.abs(images - expected).mean() <= MEAN_LEVELS
    else:
        np.testing.assert_array_equal(images, expected)


@pytest.mark.skipif(REHEARSAL, reason="compiles for minutes on a CPU; tests/workers/engines has it")
@pytest.mark.parametrize("graphs", [False, True])
def test_compiled_models_draw_next_to_the_same(graphs):
    name = str(tiny_pipeline("sd15"))
    expected, _ = draw(name, 3, engine="eager")
    images, report = draw(name, 3, engine="compile", cuda_graphs=graphs)
    assert np.abs(images - expected).mean() <= MEAN_LEVELS
    assert report.events["compiled"] > 0
    assert not {"not compiled", "compiled again"} & set(report.events)
    expected, _ = draw("default", 3, engine="eager")
    images, report = draw("default", 3, engine="compile", cuda_graphs=graphs)
    np.testing.assert_array_equal(images, expected)  # it runs as it is
    assert report.events == {}


def test_a_denoiser_with_its_weights_in_host_memory_draws_the_same():
    name = str(tiny_pipeline("sd15"))
    expected, _ = draw(name, 2, engine="eager")
    images, report = draw(name, 2, offload_weights=True)
    assert np.abs(images - expected).mean() <= MEAN_LEVELS
    assert "unet offloaded" in report.words()
