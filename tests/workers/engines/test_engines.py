"""The same images in every engine, and pipelines that stay what they were."""

import copy

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.tiny_pipelines import SIZES, tiny_pipeline
from support.un0_checkpoints import publish
from torch import nn

from millijoule.jobs import convert
from millijoule.jobs.options.model import ModelOptions
from millijoule.kernels.native_library import only
from millijoule.workers.engines.deepspeed import DeepSpeedEngine
from millijoule.workers.engines.open import open_engine
from millijoule.workers.engines.protocol import EngineSettings
from millijoule.workers.errors import InputError
from millijoule.workers.generators.options import GeneratorOptions
from millijoule.workers.generators.registry import load_generator
from millijoule.workers.schemas import ImageRequest

EAGER, DEEPSPEED = GeneratorOptions(engine="eager"), GeneratorOptions()


def draw(generator, prompt, count=3, **fields):
    requests = [ImageRequest("p", i, prompt, seed=2**40 + i, **fields) for i in range(count)]
    return generator.generate(requests).images


def ways(module):
    """Whether calls of a module go another way than its own."""
    return module._compiled_call_impl is not None


def test_deepspeed_is_what_runs_a_model_unless_told_otherwise():
    with only("reference"):
        assert load_generator("default").engine.name == "deepspeed"
    assert GeneratorOptions().identity() == {}
    assert ModelOptions().read() == GeneratorOptions()


def test_the_default_model_draws_the_same_bits_in_deepspeed():
    with only("reference"):
        eager, deepspeed = (load_generator("default", options=o) for o in (EAGER, DEEPSPEED))
    prompt = "two red cats above a blue car"
    np.testing.assert_array_equal(draw(deepspeed, prompt), draw(eager, prompt))
    assert ways(deepspeed.drawing.shapes)
    assert not ways(eager.drawing.shapes)
    words = deepspeed.engine.report.words()
    assert words.startswith("DeepSpeed-Inference ")
    assert "shapes contained, integers" in words


def test_an_un0_model_draws_the_same_bits_in_deepspeed(tmp_path):
    source = publish(tmp_path / "published.pt", "cifar10")
    assert convert.main([str(source), str(tmp_path / "model.safetensors"), "--form", "float"]) == 0
    eager, deepspeed = (
        load_generator(str(tmp_path / "model.safetensors"), options=o) for o in (EAGER, DEEPSPEED)
    )
    np.testing.assert_array_equal(draw(deepspeed, "3"), draw(eager, "3"))
    assert [m.name for m in deepspeed.engine.report.modules] == ["dynamics", "decoder"]
    assert deepspeed.engine.report.modules[0].dtypes == ("float32", "float64")


@pytest.mark.long
@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_a_pipeline_draws_the_same_bits_in_deepspeed(family):
    folder = str(tiny_pipeline(family))
    eager, deepspeed = (load_generator(folder, options=o) for o in (EAGER, DEEPSPEED))
    fields = {"num_inference_steps": 2, "width": SIZES[family], "height": SIZES[family]}
    np.testing.assert_array_equal(draw(deepspeed, "a red dog", **fields), draw(eager, "a red dog", **fields))
    modules = {n: m for n, m in deepspeed.pipeline.components.items() if isinstance(m, nn.Module)}
    run = {m.name.removesuffix(".decoder") for m in deepspeed.engine.report.modules}
    assert run == set(modules) - {"safety_checker"}


def test_a_contained_pipeline_stays_what_it_was(tmp_path):
    folder = tiny_pipeline("sd15")
    pipeline = load_generator(str(folder)).pipeline
    unet = pipeline.unet
    assert ways(unet)
    assert type(unet).__name__ == "UNet2DConditionModel"
    assert (unet.dtype, str(unet.device), unet.config.in_channels) == (torch.float32, "cpu", 4)
    assert not any("module" in name for name, _ in unet.named_parameters())

    copied = copy.deepcopy(unet)
    assert not ways(copied)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert bool(next(unet.parameters()).any())

    pipeline.save_pretrained(tmp_path / "saved")
    name = "unet/diffusion_pytorch_model.safetensors"
    before, after = load_file(folder / name), load_file(tmp_path / "saved" / name)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)

    seen = []
    hook = unet.register_forward_hook(lambda *_: seen.append("called"))
    pipeline("a red dog", num_inference_steps=1, guidance_scale=1.0)
    hook.remove()
    assert seen == ["called"]
    pipeline.to(torch.bfloat16)
    assert unet.dtype == torch.bfloat16


def test_weights_are_not_copied_and_types_chosen_by_hand_are_kept():
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3).double()).eval()
    places = [p.data_ptr() for p in module.parameters()]
    engine = open_engine(DEEPSPEED, "cpu")
    assert engine.prepare(module, "mixed") is module
    assert [p.dtype for p in module.parameters()] == [torch.float32] * 2 + [torch.float64] * 2
    assert [p.data_ptr() for p in module.parameters()] == places


def test_modules_run_plainly_while_somebody_counts():
    engine = open_engine(DEEPSPEED, "cpu")
    module = engine.prepare(nn.Linear(2, 2), "linear")
    with engine.plain():
        assert not ways(module)
    assert ways(module)


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.full((4,), 2.0))

    def forward(self, x):
        return x * self.weight


class FusedNorm(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.weight = norm.weight

    def forward(self, x):
        return x * self.weight + 1


def test_fused_modules_take_the_places_of_those_they_stand_for_and_are_counted():
    module = nn.Sequential(Norm(), nn.Sequential(nn.Linear(4, 4), Norm()), nn.Linear(4, 4))
    weight, asked = module[0].weight, []

    def fused(prepared, device):
        asked.append((prepared, device))
        return {Norm: FusedNorm}

    engine = DeepSpeedEngine(EngineSettings(fused_modules=True), fused)
    engine.prepare(module, "unet")
    assert asked == [(module, "cpu")]
    assert [type(m) for m in (module[0], module[1][1], module[2])] == [FusedNorm, FusedNorm, nn.Linear]
    assert module[0].weight is weight
    assert engine.report.modules[0].replaced == {"Norm": 2}
    assert "2 Norm fused" in engine.report.words()
    assert not any("reset_cache" in m.__dict__ for m in module.modules())
    assert not engine.exact


def test_fused_modules_are_not_asked_for_unless_wanted():
    engine = DeepSpeedEngine(EngineSettings(), lambda *_: pytest.fail("asked"))
    engine.prepare(nn.Sequential(Norm()), "unet")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (ModelOptions(engine="eager", cuda_graphs=True), "--cuda-graphs: engine eager"),
        (ModelOptions(engine="compile", fused_modules=True), "--fused-modules: only --engine deepspeed"),
        (ModelOptions(engine="eager", offload_weights=True), "--offload-weights: only --engine deepspeed"),
        (ModelOptions(cuda_graphs=True, offload_weights=True), "--offload-weights: weights that come"),
    ],
)
def test_options_that_no_engine_has_together_are_refused(options, words):
    with pytest.raises(InputError, match=words):
        options.read()


def test_graphs_without_a_gpu_are_refused():
    with pytest.raises(InputError, match="--cuda-graphs: this worker has no GPU"):
        open_engine(GeneratorOptions(cuda_graphs=True), "cpu")


def test_our_fused_modules_reach_a_pipeline_through_deepspeed(monkeypatch):
    from diffusers import UNet2DConditionModel

    monkeypatch.setattr("millijoule.workers.engines.injection.policy.fuses_on", lambda device: True)
    unet = UNet2DConditionModel.from_pretrained(tiny_pipeline("sd15"), subfolder="unet")
    names = set(unet.state_dict())
    engine = open_engine(GeneratorOptions(fused_modules=True), "cpu")
    engine.prepare(unet, "unet")
    (prepared,) = engine.report.modules
    assert prepared.replaced["ResnetBlock2D"] >= 4
    assert prepared.replaced["GEGLU"] >= 1
    assert set(unet.state_dict()) == names
