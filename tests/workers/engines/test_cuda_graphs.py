"""Calls replayed from graphs give what the module gives, whatever the caller does with inputs and outputs.

Graphs are DeepSpeed's, on a stand-in for a GPU that replays noted operations on the captured tensors.
"""

import pytest
import torch
from support.graph_stand_in import StandInGpu
from torch import nn

from millijoule.workers.engines.deepspeed import DeepSpeedEngine
from millijoule.workers.engines.protocol import EngineSettings


class Denoiser(nn.Module):
    """Takes and returns what denoisers of diffusers do: tensors by place, by name, in a dictionary, and plain values."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.calls = 0

    def forward(self, latents, timestep, added=None, scale=1.0, return_dict=True):
        self.calls += 1
        out = self.linear(latents) * scale + timestep
        if added is not None:
            out = out + added["text"] * added["ids"][0]
        return {"sample": out} if return_dict else (out,)


@pytest.fixture
def gpu(monkeypatch):
    gpu = StandInGpu()
    monkeypatch.setattr("deepspeed.inference.engine.get_accelerator", lambda: gpu)
    return gpu


def captured(module):
    engine = DeepSpeedEngine(EngineSettings("cpu"), lambda module, device: {})
    engine.fixed_shapes = True  # as on a GPU with graphs
    return engine, engine.prepare(module, "unet")


@pytest.fixture
def both(gpu):
    """(engine, captured module, the same module run plainly)."""
    torch.manual_seed(0)
    module, plain = Denoiser().eval(), Denoiser().eval()
    plain.load_state_dict(module.state_dict())
    return *captured(module), plain


def call_of(rows=2, seed=0, **changed):
    random = torch.Generator().manual_seed(seed)
    latents, text = (torch.randn(rows, 6, generator=random) for _ in range(2))
    added = {"text": text, "ids": [torch.randn(rows, 6, generator=random)]}
    return (latents, torch.tensor(float(seed))), {"added": added, **changed}


@torch.inference_mode()
def test_what_is_nested_in_arguments_is_new_in_every_call(both, gpu):
    engine, module, plain = both
    for seed in range(5):
        args, kwargs = call_of(seed=seed)
        assert torch.equal(module(*args, **kwargs)["sample"], plain(*args, **kwargs)["sample"])
    assert len(gpu.graphs) == 1
    assert engine.report.events == {"captured": 1}
    assert module.calls < 5  # captured once, after three calls that warm up; the others ran no Python


@torch.inference_mode()
def test_an_output_that_is_kept_stays_and_an_input_is_not_written_to(both):
    _, module, plain = both
    calls = [call_of(seed=seed) for seed in range(4)]
    inputs = [args[0].clone() for args, _ in calls]
    kept = [module(*args, **kwargs)["sample"] for args, kwargs in calls]
    for (args, kwargs), out, before in zip(calls, kept, inputs, strict=True):
        assert torch.equal(args[0], before)
        assert torch.equal(out, plain(*args, **kwargs)["sample"])


@torch.inference_mode()
def test_shapes_and_plain_values_have_graphs_of_their_own(both, gpu):
    _, module, plain = both
    for _ in range(2):
        for rows, changed in (
            (1, {}),
            (3, {}),
            (3, {"scale": 2.0}),
            (3, {"added": None}),
            (3, {"return_dict": False}),
        ):
            args, kwargs = call_of(rows)
            kwargs |= changed
            out, expected = module(*args, **kwargs), plain(*args, **kwargs)
            assert type(out) is type(expected)
            for ours, theirs in zip(
                out.values() if isinstance(out, dict) else out,
                expected.values() if isinstance(expected, dict) else expected,
                strict=True,
            ):
                assert torch.equal(ours, theirs)
    assert len(gpu.graphs) == 5


@torch.inference_mode()
def test_the_oldest_graph_is_dropped_when_there_are_many(both, gpu, monkeypatch):
    monkeypatch.setattr("millijoule.workers.engines.cuda_graphs.MAX_GRAPHS", 2)
    _, module, plain = both
    for rows in (1, 2, 3, 1):
        args, kwargs = call_of(rows)
        assert torch.equal(module(*args, **kwargs)["sample"], plain(*args, **kwargs)["sample"])
    assert len(gpu.graphs) == 4


@torch.inference_mode()
def test_new_weights_are_seen_after_renew_and_released_graphs_stay_away(both, gpu):
    engine, module, plain = both
    args, kwargs = call_of()
    module(*args, **kwargs)
    for changed in (module, plain):
        changed.linear = nn.Linear(6, 6)
    plain.linear.load_state_dict(module.linear.state_dict())
    engine.renew()
    assert torch.equal(module(*args, **kwargs)["sample"], plain(*args, **kwargs)["sample"])
    assert len(gpu.graphs) == 2
    assert engine.release()
    assert torch.equal(module(*args, **kwargs)["sample"], plain(*args, **kwargs)["sample"])
    assert len(gpu.graphs) == 2
    assert not engine.release()


@torch.inference_mode()
def test_a_module_that_cannot_be_captured_runs_without_and_says_so_once(both, gpu, caplog):
    engine, module, plain = both
    gpu.fails = True
    for seed in range(3):
        args, kwargs = call_of(seed=seed)
        assert torch.equal(module(*args, **kwargs)["sample"], plain(*args, **kwargs)["sample"])
    assert [r.getMessage() for r in caplog.records] == [
        "unet: runs without CUDA graphs from now on: CUDA error: operation not permitted when stream is capturing"
    ]
    assert engine.report.events["not captured"] == 1


@torch.inference_mode()
def test_a_module_whose_steps_are_skipped_by_a_hook_is_never_captured(both, gpu):
    _, module, plain = both
    module.linear._diffusers_hook = object()  # as diffusers' caches leave it
    args, kwargs = call_of()
    assert torch.equal(module(*args, **kwargs)["sample"], plain(*args, **kwargs)["sample"])
    assert not gpu.graphs


@torch.inference_mode()
def test_an_argument_that_cannot_be_compared_is_not_captured(both, gpu):
    _, module, plain = both
    (latents, timestep), kwargs = call_of()

    for _ in range(2):
        out = module(
            latents,
            timestep,
            scale=object.__new__(type("Scale", (), {"__rmul__": lambda s, x: x * 3})),
            **kwargs,
        )
        assert torch.equal(out["sample"], plain(latents, timestep, scale=3.0, **kwargs)["sample"])
    assert not gpu.graphs
