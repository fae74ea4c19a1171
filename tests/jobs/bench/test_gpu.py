"""`millijoule bench gpu` without a GPU: the boards' clock and counter are stood in for, the models are real."""

import json
import time
from types import SimpleNamespace

import pytest
import torch
from support.counters import UUIDS, FakeNvml

from millijoule.jobs.bench import gpu as bench_gpu
from millijoule.workers.generators import registry as generator
from millijoule.workers.meters import meter

WATTS, IDLE_WATTS = 300, 100


@pytest.fixture
def board(monkeypatch, tmp_path):
    """A board of 300 W while a model draws and of 100 W else; `load_generator` loads onto the CPU."""
    nvml, state = FakeNvml(), SimpleNamespace(watts=IDLE_WATTS, t=time.monotonic(), mj=5_000_000.0)

    def advance(watts):
        now = time.monotonic()
        state.mj += (now - state.t) * state.watts * 1000
        state.t, state.watts = now, watts
        nvml.energy_mj[UUIDS[0]] = int(state.mj)

    nvml.latency = lambda: advance(state.watts)

    def load(model, device):
        loaded = real_load(model, device="cpu")
        draw = loaded.generate

        def generate(requests):
            advance(WATTS)
            drawn = draw(requests)
            advance(IDLE_WATTS)
            return drawn

        loaded.generate = generate
        return loaded

    real_load, real_meter = generator.load_generator, meter.open_meter
    monkeypatch.setattr(generator, "load_generator", load)
    monkeypatch.setattr(
        meter, "open_meter", lambda gpus: real_meter(gpus, nvml=nvml, book_directory=tmp_path)
    )
    for name, value in (
        ("is_available", lambda: True),
        ("set_device", lambda index: None),
        ("synchronize", lambda: None),
        ("get_device_name", lambda index: "Stand-in"),
        ("get_device_properties", lambda index: SimpleNamespace(uuid=UUIDS[0].removeprefix("GPU-"))),
    ):
        monkeypatch.setattr(torch.cuda, name, value)
    return nvml


def test_joules_are_those_of_the_counter(board, tmp_path):
    path = tmp_path / "gpu.json"
    assert bench_gpu.main([str(path), "--b", "default", "--seconds", "0.6", "--pause", "0.3"]) == 0
    result = json.loads(path.read_text())
    assert len(result["blocks"]) == 4
    for block in result["blocks"]:
        assert block["joules"] == pytest.approx(WATTS * block["seconds"], rel=0.35)
    assert result["idle"]["watts"] == pytest.approx(IDLE_WATTS, rel=0.5)
    assert [block["arm"] for block in result["blocks"]] == list("abba")
    for arm, model in result["models"].items():  # of one name, and told apart all the same
        own = [b for b in result["blocks"] if b["arm"] == arm]
        assert model["images"] == sum(b["images"] for b in own)
        assert model["joules_per_image"] == pytest.approx(sum(b["joules"] for b in own) / model["images"])
    a, b = (result["models"][arm]["joules_per_image"] for arm in "ab")
    assert result["ratio"]["joules_per_image"] == pytest.approx(b / a)


def test_a_board_without_a_counter_is_refused(board, capsys):
    board.error = board.NVMLError(1)
    assert bench_gpu.main(["--seconds", "0.1"]) != 0
    assert "cannot be read" in capsys.readouterr().err
