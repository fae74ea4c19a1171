"""Every scheduler draws a row's noise from the row's own generator: alone, in a batch, again, in another process."""

import hashlib
import inspect
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.tiny_pipelines import tiny_pipeline

from millijoule.workers.diffusion.families import LEVELS
from millijoule.workers.errors import RowError
from millijoule.workers.schemas import ImageRequest

diffusers = pytest.importorskip("diffusers")

#: What diffusers has of the kind, those that lie about their steps included.
SCHEDULERS = sorted(
    name
    for name in dir(diffusers)
    if name.endswith("Scheduler") and not name.startswith(("Flax", "Onnx")) and name != "KarrasVeScheduler"
)

#: Those that Stable Diffusion 1.5 draws with; whatever else diffusers has is refused by its name.
DRAWING = {
    "CMStochasticIterativeScheduler",
    "CogVideoXDDIMScheduler",
    "CosineDPMSolverMultistepScheduler",
    "DDIMInverseScheduler",
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepInverseScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "EDMDPMSolverMultistepScheduler",
    "EDMEulerScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "IPNDMScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
}

#: Those of flow matching, and settings that make one stochastic.
FLOWS = {
    "FlowMatchEulerDiscreteScheduler": {"stochastic_sampling": True},
    "FlowMatchHeunDiscreteScheduler": {},
    "FlowMatchLCMScheduler": {},
    "FlowMapEulerDiscreteScheduler": {},
    "LTXEulerAncestralRFScheduler": {},
    "DPMSolverMultistepScheduler": {
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "algorithm_type": "sde-dpmsolver++",
    },
}

#: Those whose image follows from more than the first noise.
STOCHASTIC = {
    *("DDPMScheduler", "DPMSolverSDEScheduler", "EulerAncestralDiscreteScheduler", "SASolverScheduler"),
    *("KDPM2AncestralDiscreteScheduler", "LCMScheduler", "CosineDPMSolverMultistepScheduler"),
}


def kind(name):
    scheduler = getattr(diffusers, name)
    if "torchsde" in getattr(scheduler, "_backends", ()):
        pytest.skip("torchsde is not installed")
    return scheduler


@pytest.fixture
def with_scheduler(tiny):
    """`with_scheduler(family, name, **settings)`: the generator with that scheduler; its own is put back at the end."""
    changed = {}

    def give(family, name, **settings):
        generator = tiny(family)
        pipeline = generator.pipeline
        own = changed.setdefault(family, pipeline.scheduler)
        pipeline.scheduler = kind(name).from_config(own.config, **settings)
        return generator

    yield give
    for family, own in changed.items():
        tiny(family).pipeline.scheduler = own


def requests(count, steps, side=32):
    prompts = ("a red dog", "a blue cat on the moon")
    return [
        ImageRequest("p", i, prompts[i % 2], 2**40 + i, width=side, height=side, num_inference_steps=steps)
        for i in range(count)
    ]


def levels(a, b):
    return int(np.abs(a.astype(int) - b.astype(int)).max())


def check_rows(generator, steps, side):
    asked = requests(3, steps, side)
    together = generator.generate(asked).images
    assert levels(generator.generate([asked[1]]).images[0], together[1]) <= LEVELS, (steps, "alone")
    if steps == 3:
        assert np.array_equal(generator.generate(asked).images, together), "again"
        assert levels(generator.generate(asked[::-1]).images[::-1], together) <= LEVELS, "permuted"
    if steps > 1:
        assert levels(together[0], together[1]) > LEVELS
    assert not generator.call.alone


@pytest.mark.long
@pytest.mark.parametrize("name", SCHEDULERS)
def test_noise_is_a_rows_own_with_every_scheduler(with_scheduler, name):
    try:
        generator = with_scheduler("sd15", name)
    except (TypeError, ValueError):
        assert name not in DRAWING
        return  # cannot stand in a pipeline's folder
    for steps in range(1, 6):
        if name in DRAWING:
            check_rows(generator, steps, 32)
        else:
            with pytest.raises(RowError, match=f"num_inference_steps {steps}: {name}"):
                check_rows(generator, steps, 32)


@pytest.mark.long
@pytest.mark.parametrize("name", FLOWS)
def test_noise_is_a_rows_own_with_every_scheduler_of_flow_matching(with_scheduler, name):
    generator = with_scheduler("sd3", name, **FLOWS[name])
    for steps in (1, 2, 3, 5):
        check_rows(generator, steps, 64)


def test_the_schedulers_that_draw_are_there():
    assert set(SCHEDULERS) >= DRAWING | set(FLOWS)


def test_schedulers_that_are_said_to_be_stochastic_are(with_scheduler, monkeypatch):
    """With no noise after the first they draw something else: the tests above look at more than the first noise."""
    asked = requests(1, 3)
    for name in sorted(STOCHASTIC):
        generator = with_scheduler("sd15", name)
        image = generator.generate(asked).images[0]
        with monkeypatch.context() as quiet:
            quiet.setattr(sys.modules[kind(name).__module__], "randn_tensor", zeros, raising=False)
            if "noise_sampler" in vars(generator.pipeline.scheduler):
                module = sys.modules["diffusers.schedulers.scheduling_dpmsolver_sde"]
                quiet.setattr(module.BatchedBrownianTree, "__call__", lambda self, a, b: torch.zeros(()))
            assert levels(generator.generate(asked).images[0], image) > 0, name


def zeros(shape, generator=None, device=None, dtype=None, layout=None):
    return torch.zeros(shape, dtype=dtype)


def test_pipelines_that_draw_from_the_global_generator_draw_each_image_alone(tiny, caplog, monkeypatch):
    generator = tiny("sd15")
    scheduler = generator.pipeline.scheduler
    step = type(scheduler).step

    def noisy(self, model_output, timestep, sample, return_dict=True):
        sample = step(self, model_output, timestep, sample, return_dict=False)[0]
        return (sample + torch.randn(sample.shape),)

    monkeypatch.setattr(type(scheduler), "step", noisy)
    state = torch.get_rng_state()
    asked = requests(3, 2)
    try:
        together = generator.generate(asked).images
        assert generator.call.alone
        for i, request in enumerate(asked):
            assert np.array_equal(generator.generate([request]).images[0], together[i])
        same_seed = [replace(r, seed=5) for r in asked]
        other = [replace(r, seed=6) for r in asked]
        a, b = generator.generate(same_seed[:1]).images, generator.generate(other[:1]).images
        assert levels(a, b) > LEVELS
    finally:
        generator.call.alone = False
    assert torch.equal(torch.get_rng_state(), state)  # the user's own generator did not move
    assert caplog.text.count("drawn alone") == 1


def test_a_pipeline_that_expects_another_schedulers_answer_names_its_own(tiny):
    """PixArt-alpha in one step is for the distilled models, whose scheduler returns more."""
    asked = [ImageRequest("p", 0, "a dog", 1, num_inference_steps=1)]
    with pytest.raises(RowError, match="num_inference_steps 1: DPMSolverMultistepScheduler does not draw"):
        tiny("pixart_alpha").generate(asked)


def test_nothing_stays_patched(tiny):
    generator = tiny("sd15")
    generator.generate(requests(1, 1))
    assert "step" not in vars(generator.pipeline.scheduler)
    assert "postprocess" not in vars(generator.pipeline.image_processor)


@pytest.mark.long
def test_another_process_draws_the_same(with_scheduler):
    names = sorted(STOCHASTIC)
    here = {
        name: hashlib.sha256(with_scheduler("sd15", name).generate(requests(2, 3)).images).hexdigest()
        for name in names
        if not hasattr(getattr(diffusers, name), "_backends")
    }
    program = f"""
import hashlib, json, sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
import diffusers, torch
torch.manual_seed(99)
from millijoule.workers.schemas import ImageRequest
{inspect.getsource(requests)}
from millijoule.workers.diffusion.generator import DiffusersGenerator
from millijoule.workers.generators.options import GeneratorOptions
from pathlib import Path
made = DiffusersGenerator.load(Path({str(tiny_pipeline("sd15"))!r}), options=GeneratorOptions(engine="eager"))
own = made.pipeline.scheduler
found = {{}}
for name in {list(here)!r}:
    made.pipeline.scheduler = getattr(diffusers, name).from_config(own.config)
    found[name] = hashlib.sha256(made.generate(requests(2, 3)).images).hexdigest()
print(json.dumps(found))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == here
