"""Nothing is multiplied in bfloat16 unless the processor does that in hardware, and only one module decides."""

import platform
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import millijoule.workers
from millijoule.kernels.processor import multiplies_bfloat16
from millijoule.workers.oscillators.config import OscillatorConfig
from millijoule.workers.training import diffusion as diffusion_training
from millijoule.workers.training import icons as icons_training
from millijoule.workers.training import optimizer
from millijoule.workers.training import verifier as verifier_training


class SeenTypes(TorchDispatchMode):
    """The types of all tensors that any operation takes or gives."""

    def __init__(self) -> None:
        super().__init__()
        self.types: set[torch.dtype] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        leaves = tree_leaves((args, kwargs, result))
        self.types |= {leaf.dtype for leaf in leaves if isinstance(leaf, torch.Tensor)}
        return result


def icons():
    model = OscillatorConfig(code=8, hidden=8, channels=4, width=4, mix=4)
    return icons_training.IconTrainer(
        icons_training.IconTrainingConfig(steps=2, half=2, whole=2, model=model)
    )


def diffusion(**phases):
    pytest.importorskip("diffusers")
    config = diffusion_training.DiffusionConfig(
        steps=2, text_batch=2, batch=2, autoencoder_batch=2, decoder_width=8, decoder_blocks=(1, 1, 1),
        unet_widths=(16, 16), attention_levels=(False, True), head_width=8, text_width=16, text_layers=1, text_heads=2,
    )  # fmt: skip
    return diffusion_training.DiffusionTrainer(replace(config, **phases))


def verifier():
    config = verifier_training.VerifierConfig()
    return verifier_training.VerifierTrainer(replace(config, steps=2, batch=4, stem=8, middle=8, trunk=8))


TRAINERS = {
    "icons": icons,
    "text encoder": lambda: diffusion(text_steps=1, autoencoder_steps=0),
    "autoencoder": lambda: diffusion(text_steps=0, autoencoder_steps=1),
    "denoiser": lambda: diffusion(text_steps=0, autoencoder_steps=0),
    "verifier": verifier,
}


@pytest.mark.long
@pytest.mark.parametrize("does", [False, True])
@pytest.mark.parametrize("trainer", TRAINERS.values(), ids=TRAINERS.keys())
def test_training_uses_bfloat16_where_the_processor_multiplies_it_and_nowhere_else(
    trainer, does, monkeypatch
):
    monkeypatch.setattr(diffusion_training, "PRINCIPAL_IMAGES", 64)
    for module in (icons_training, optimizer, diffusion_training, verifier_training):
        monkeypatch.setattr(module, "multiplies_bfloat16", lambda device="cpu": does)
    trainer = trainer()
    with SeenTypes() as seen:
        trainer.train_step()
    assert torch.float32 in seen.types
    assert (torch.bfloat16 in seen.types) == does


def test_it_is_what_the_kernel_says_of_the_processor():
    if platform.machine() != "x86_64":
        pytest.skip("the kernel names its instructions otherwise")
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next(line for line in lines if line.startswith("flags")).split()
    assert multiplies_bfloat16() == ("avx512_bf16" in flags)


@pytest.mark.parametrize("emulated", [False, True])
def test_a_gpu_that_emulates_it_does_not_count(monkeypatch, emulated):
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or not emulated
    )
    assert multiplies_bfloat16("cuda:1") != emulated


#: They list types that they read or are given, and choose none; the last three run on GPUs only, but for a rehearsal.
NO_DECISION = {
    "kernels/triton_launch.py",
    "workers/diffusion/outline.py",  # without storage: nothing is computed
    "workers/engines/weight_offload.py",
    "workers/generators/un0_checkpoint.py",
    "workers/generators/saved_checkpoint.py",
    "jobs/measuring/board.py",
    "jobs/bench/kernels.py",
    "jobs/measuring/integer_kernels.py",
    "jobs/measuring/kernel_cases.py",
}


def test_no_module_decides_for_itself():
    root = Path(millijoule.workers.__path__[0]).parent
    folders = ("kernels", "workers", "pipeline", "jobs")
    text = {str(p.relative_to(root)): p.read_text() for f in folders for p in (root / f).rglob("*.py")}
    assert len(text) > 150
    deciding = {name for name in text if "torch.bfloat16" in text[name]} - NO_DECISION
    assert {"workers/training/icons.py", "workers/rungs/precision.py"} <= deciding
    assert {name for name in deciding if "multiplies_bfloat16" not in text[name]} == set()
