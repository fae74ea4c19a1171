"""Fused modules take the place of the library's and change no image, no name and no weight; what they do not know stays."""

import json
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.normalization import AdaLayerNormZero, AdaLayerNormZeroSingle
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from support.interpreted import interpreted
from support.networks import draw, first_call, interpreted_call, load, networks
from support.tiny_pipelines import FAMILIES as ALL_FAMILIES
from torch import nn

from millijoule.workers.engines.injection import fused as fused_forms
from millijoule.workers.engines.injection import policy
from millijoule.workers.engines.injection.policy import fused_modules, inject

#: All but one that diffusers itself does not load; its parts are none of those that are fused.
FAMILIES = [family for family in ALL_FAMILIES if family != "wuerstchen"]

#: Of 255 levels: what float32's roundings leave after two steps.
LEVELS = 0.05

#: What each family has that can be fused, by what is fused; other parts are the same for all.
EXPECTED = {
    "sd15": {"GEGLU", "ResNet block's GroupNorm + SiLU twice", "GroupNorm + SiLU", "GroupNorm"},
    "sdxl": {"GEGLU", "ResNet block's GroupNorm + SiLU twice", "GroupNorm + SiLU", "GroupNorm"},
    "sd3": {"AdaLN", "AdaLN and gates of a block"},
    "pixart_sigma": {"AdaLN of a block"},
    "sana": {"AdaLN of a block"},
    "flux": {"AdaLN", "AdaLN and gates of a block", "gate of a block", "QK norm + rotation"},
    "qwen_image": {"AdaLN", "AdaLN of a block", "QK norm + rotation"},
    "z_image": {"RMSNorm of heads"},
    "chroma": {"QK norm + rotation"},
    "kandinsky22": {"ResNet block's GroupNorm + SiLU twice", "GroupNorm + SiLU", "GroupNorm"},
    "deepfloyd_if": {"GroupNorm"},
}


@pytest.fixture
def on_cpu(monkeypatch):
    """Modules are replaced on a CPU, too, and run the plain form of what is fused."""
    monkeypatch.setattr(policy, "fuses_on", lambda device: True)


@pytest.mark.parametrize(
    ("family", "last"), [*((family, False) for family in FAMILIES), ("sd15", True), ("sdxl", True)]
)
def test_a_family_draws_the_same_images_with_the_same_weights(family, last, on_cpu):
    pipeline = load(family)
    if last:
        for module in networks(pipeline).values():
            module.to(memory_format=torch.channels_last)
    before = draw(family, pipeline)
    replaced = Counter()
    for module in networks(pipeline).values():
        weights = {name: id(weight) for name, weight in module.named_parameters()}
        keys = list(module.state_dict())
        replaced.update(inject(module, "cpu").replaced)
        assert list(module.state_dict()) == keys
        assert {name: id(weight) for name, weight in module.named_parameters()} == weights
        assert not inject(module, "cpu").replaced  # a second time there is nothing to do
    assert EXPECTED.get(family, set()) <= set(replaced)
    assert np.abs(draw(family, pipeline) - before).max() < LEVELS


def test_parts_are_counted_as_they_are(on_cpu):
    for family in ("sdxl", "flux"):
        (module, _), original = first_call(family), Counter()
        original.update(type(part) for part in module.modules())
        replaced = inject(module, "cpu").replaced
        assert replaced.get("ResNet block's GroupNorm + SiLU twice", 0) == original[ResnetBlock2D]
        assert replaced.get("GEGLU", 0) == original[GEGLU]
        assert replaced.get("AdaLN", 0) >= original[AdaLayerNormZero] + original[AdaLayerNormZeroSingle]
        norms = replaced.get("GroupNorm", 0) + replaced.get("GroupNorm + SiLU", 0)
        assert norms + 2 * original[ResnetBlock2D] == original[nn.GroupNorm]


@pytest.mark.long
@pytest.mark.parametrize(
    ("family", "last", "smaller", "kernels"),
    [
        ("sd15", True, {"width": 32, "height": 32, "guidance_scale": 1.0}, {"_whole_group", "_gated"}),
        ("flux", False, {"max_sequence_length": 5}, {"_modulated_norm", "_norm_and_rotate"}),
    ],
)
def test_kernels_in_a_denoiser_give_what_the_library_gives(family, last, smaller, kernels):
    found = interpreted(interpreted_call, family, last, **smaller)
    assert found["replaced"]
    assert kernels <= set(found["launched"])
    size = float(found["plain"].abs().max())
    torch.testing.assert_close(found["fused"], found["plain"], rtol=1e-4, atol=1e-4 * size)


def test_whatever_has_weights_is_still_called(on_cpu):
    """Whoever brings weights to the device when a module is called (offloading) must find the call."""
    for family in ("sdxl", "sd3", "flux", "qwen_image", "pixart_sigma"):
        called = []
        for fuse in (False, True):
            denoiser, call = first_call(family)
            names = [
                name
                for name, part in denoiser.named_modules()
                if any(p is not None for p in part._parameters.values())
            ]
            if fuse:
                assert inject(denoiser, "cpu").replaced
            heard = set()
            for name in names:
                denoiser.get_submodule(name).register_forward_pre_hook(
                    lambda *_, name=name, heard=heard: heard.add(name)
                )
            call()
            called.append(heard)
        assert called[0] == called[1]
        assert len(called[0]) > 10


def test_on_a_cpu_nothing_is_replaced_and_nothing_is_imported():
    program = """
import json, sys
from torch import nn
from millijoule.workers.engines.injection.policy import fused_modules, inject
block = nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU())
print(json.dumps([len(fused_modules(block, "cpu")), inject(block, "cpu").words(), "triton" in sys.modules, "diffusers" in sys.modules]))
"""
    out = subprocess.check_output([sys.executable, "-c", program], text=True)
    assert json.loads(out) == [0, "fused: nothing", False, False]


def test_what_is_not_known_is_left_alone_and_listed(on_cpu):
    class OwnNorm(nn.GroupNorm):
        pass

    denoiser, _ = first_call("sd15")
    denoiser.conv_norm_out.__class__ = OwnNorm
    block = next(part for part in denoiser.modules() if isinstance(part, ResnetBlock2D))
    block.nonlinearity = nn.GELU()
    injection = inject(denoiser, "cpu")
    assert type(denoiser.conv_norm_out) is OwnNorm
    assert type(denoiser.conv_act) is nn.SiLU
    assert type(block) is ResnetBlock2D
    assert injection.left["OwnNorm", "no fused form is known"] == 1
    assert injection.left["ResnetBlock2D", "its activation is GELU"] == 1
    assert "1 OwnNorm: no fused form is known" in injection.words()


def test_code_of_another_version_is_left_alone(on_cpu, monkeypatch):
    """A library that computes something else under a known name keeps its own."""
    plain = fused_forms.digest_of
    monkeypatch.setattr(fused_forms, "digest_of", lambda f: "other" if f is GEGLU.forward else plain(f))
    denoiser, _ = first_call("sd15")
    injection = inject(denoiser, "cpu")
    assert "GEGLU" not in injection.replaced
    assert any(name == "GEGLU" and "version" in why for name, why in injection.left)
    assert any(type(part) is GEGLU for part in denoiser.modules())


@pytest.mark.parametrize("fusion", policy._fusions().values(), ids=lambda fusion: fusion.original.__name__)
def test_the_installed_library_is_one_that_the_fused_forms_know(fusion):
    """After an update: read what changed, correct the fused form, then add the new digest."""
    if fusion.known:
        assert fused_forms.digest_of(fusion.original.forward) in fusion.known
    assert issubclass(fusion.fused, fusion.original)


@pytest.mark.long
def test_deepspeed_s_injection_takes_the_same_places(on_cpu):
    from deepspeed.module_inject.replace_module import replace_module

    for family in ("sdxl", "flux", "qwen_image"):
        denoiser, call = first_call(family)
        before = call()
        for original, make in fused_modules(denoiser, "cpu").items():
            replace_module(
                denoiser, original, lambda child, make, *_, **__: make(child), make, checkpoint=None
            )
        other, _ = first_call(family)
        inject(other, "cpu")
        assert [type(part) for part in denoiser.modules()] == [type(part) for part in other.modules()]
        torch.testing.assert_close(call(), before, rtol=1e-4, atol=1e-4)


def test_lora_finds_what_it_looks_for(on_cpu):
    from peft import LoraConfig

    outputs = []
    for fuse in (False, True):
        denoiser, call = first_call("sd15")
        plain = call()
        if fuse:
            assert inject(denoiser, "cpu").replaced
        torch.manual_seed(3)
        denoiser.add_adapter(
            LoraConfig(r=2, target_modules=["to_q", "proj", "conv1"], init_lora_weights=False)
        )
        outputs.append(call())
        assert not torch.allclose(outputs[-1], plain, atol=1e-3)
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


def test_step_caches_work_on_fused_blocks(on_cpu):
    from diffusers import FirstBlockCacheConfig

    images = []
    for fuse in (False, True):
        pipeline = load("flux")
        if fuse:
            assert inject(pipeline.transformer, "cpu").replaced
        calls = []
        pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
        pipeline.transformer.single_transformer_blocks[0].norm.register_forward_pre_hook(
            lambda *_, calls=calls: calls.append(1)
        )
        images.append(draw("flux", pipeline, steps=3))
        assert len(calls) == 1  # of three steps
    assert np.abs(images[0] - images[1]).max() < LEVELS


def test_an_attention_with_another_processor_runs_that_one(on_cpu):
    class Noted(FluxAttnProcessor):
        calls = 0

        def __call__(self, *args, **kwargs):
            Noted.calls += 1
            return super().__call__(*args, **kwargs)

    denoiser, call = first_call("flux")
    before = call()
    assert inject(denoiser, "cpu").replaced["QK norm + rotation"] == 2
    denoiser.set_attn_processor(Noted())
    torch.testing.assert_close(call(), before, rtol=1e-4, atol=1e-4)
    assert Noted.calls == 2
    other, _ = first_call("sd15")
    other.set_attn_processor(AttnProcessor2_0())
    assert all(name != "Attention" or "PyTorch" in why for name, why in inject(other, "cpu").left)


def test_feed_forward_layers_in_parts_stay_in_parts(on_cpu):
    denoiser, call = first_call("sd3")
    before = call()
    inject(denoiser, "cpu")
    for block in denoiser.transformer_blocks:
        block.set_chunk_feed_forward(1, dim=1)
    torch.testing.assert_close(call(), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["flux", "sd15"])
def test_projections_in_one_stay_right(family, on_cpu):
    """Query, key and value from one product, asked for afterwards."""
    denoiser, call = first_call(family)
    before = call()
    inject(denoiser, "cpu")
    denoiser.fuse_qkv_projections()
    torch.testing.assert_close(call(), before, rtol=1e-4, atol=1e-4)
