"""A denoiser whose weights stay in host memory draws what it draws otherwise."""

import json
import os
import subprocess
import sys

import pytest
from support.tiny_pipelines import tiny_pipeline

CODE = """
import json, os, sys
import numpy as np
import torch
from millijoule.workers.engines import weight_offload
from millijoule.workers.generators.options import GeneratorOptions
from millijoule.workers.generators.registry import load_generator
from millijoule.workers.schemas import ImageRequest

def draw(generator):
    requests = [ImageRequest("p", i, "a red dog", seed=i, num_inference_steps=2) for i in range(2)]
    return generator.generate(requests).images.astype(int)

folder, name = sys.argv[1:]
weight_offload.PERSISTENT_NUMBERS = 100  # a tiny model's parameters are all small
expected = draw(load_generator(folder, options=GeneratorOptions(engine="eager")))
before = dict(os.environ)
generator = load_generator(folder, options=GeneratorOptions(offload_weights=True))
module = getattr(generator.pipeline, name)

def held():
    return sum(p.numel() for p in module.parameters())

once, empty, twice = draw(generator), held(), draw(generator)
print(json.dumps({
    "difference": int(np.abs(once - expected).max()),
    "repeats": bool((once == twice).all()),
    "held between calls": empty,
    "numbers": sum(p.ds_numel for p in module.parameters()),
    "environment": {k: v for k, v in os.environ.items() if before.get(k) != v},
    "words": generator.engine.report.words(),
}))
"""


@pytest.mark.long
@pytest.mark.parametrize(("family", "name"), [("sd15", "unet")])
def test_a_denoiser_with_its_weights_in_host_memory_draws_the_same(family, name, tmp_path):
    folder = str(tiny_pipeline(family))
    said = subprocess.run(
        [sys.executable, "-c", CODE, folder, name],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_EXTENSIONS_DIR": str(tmp_path)},
    )
    assert said.returncode == 0, said.stderr
    (line,) = said.stdout.splitlines()  # DeepSpeed's own lines do not reach users
    told = json.loads(line)
    assert told["difference"] <= 1
    assert told["repeats"]
    assert told["held between calls"] < told["numbers"] / 2  # small ones stay
    assert told["environment"] == {}
    assert list(tmp_path.iterdir()) == []  # nothing was compiled: a user may have no compiler, and no minute
    assert f"{name} offloaded" in told["words"]
