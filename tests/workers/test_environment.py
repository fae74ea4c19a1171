"""What a worker states of itself names the encoder that writes its PNG files; statements from before it did are read."""

import json

import pytest

from millijoule.kernels.native_library import forms_here, only
from millijoule.workers.environment import describe_worker
from millijoule.workers.meters.meter import open_meter
from millijoule.workers.schemas import WorkerEnvironment


@pytest.mark.parametrize("form", ["reference", *forms_here()])
def test_the_png_encoder_is_named(form):
    meter = open_meter()
    with only(form):
        stated = describe_worker("w", 1, "node", (), meter, meter.read())
    assert stated.png_encoder == ("zlib" if form == "reference" else "compiled")
    assert WorkerEnvironment.from_json(stated.to_json()) == stated
    assert stated.kernels == ("pytorch" if form == "reference" else form)
    assert describe_worker("w", 1, "node", (), meter, meter.read(), "triton").kernels == "triton"
    before = json.loads(stated.to_json())
    del before["png_encoder"], before["kernels"]
    assert WorkerEnvironment.from_json(json.dumps(before).encode()).png_encoder is None
